"""The build for a class holds no text of a solution: pages, search index and notebooks are grepped.

The instructor's book is looked at as well, so that a grep which finds nothing means something.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from page_checks import BOOK

STUDENT = BOOK.parent / "student"
CHAPTERS = sorted((BOOK.parents[1] / "notebooks").glob("*.md"))
SOLUTION = re.compile(r"^`{4}\{solution\} (\S+)\n:label: (\S+)\n.*?\n\n(.*?)\n`{4}$", re.M | re.S)
# a cell with what the solutions quote is no part of the student's notebook
QUOTED = re.compile(r"^```\{code-cell\}[^\n]*\n:tags: \[[^\]]*\bsolution\b.*?^```$", re.M | re.S)
SHORT = 25  # characters: a shorter piece may stand anywhere


def bare(text: str) -> str:
    """Letters and digits only: blanks, quotation marks and markup differ between formats."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def pieces(solution: str) -> set[str]:
    """Its lines of code, and what stands between the marks of its prose."""
    prose = re.sub(r"```python.*?```", "", solution, flags=re.DOTALL)
    prose = re.sub(r"\{[\w:]+\}`[^`]*`|\$[^$]+\$|`[^`]*`", "\n\n", prose)
    code = "\n".join(re.findall(r"```python\n(.*?)```", solution, re.DOTALL))
    paragraphs = (" ".join(part.split()) for part in prose.split("\n\n"))
    sentences = [s for part in paragraphs for s in re.split(r"(?<=[.:?!])\s", part)]
    return {bare(piece) for piece in [*code.splitlines(), *sentences] if len(bare(piece)) >= SHORT}


@cache
def elsewhere() -> str:
    """Everything in the sources that a student may read."""
    root = BOOK.parents[1]
    texts = [path.read_text(encoding="utf-8") for path in [*CHAPTERS, *root.glob("book/**/*.md")]]
    return bare("\n".join(QUOTED.sub("", SOLUTION.sub("", text)) for text in texts))


def solutions() -> list:
    found = []
    for path in CHAPTERS:
        for _, label, body in SOLUTION.findall(path.read_text(encoding="utf-8")):
            found.append(pytest.param(path.stem, body, id=label))
    return found


@cache
def written(folder: Path) -> str:
    """All text of a folder: of pages as a browser shows it, of other files as they are."""
    texts = []
    for path in sorted(folder.rglob("*")):
        vendored = {"mathjax", "html-manager", "requirejs"} & set(path.parts)
        if path.suffix == ".html":
            page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
            texts.append(page.get_text(""))
        elif path.suffix == ".ipynb":
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            texts += ["".join(cell["source"]) for cell in cells]
        elif path.suffix in (".js", ".txt", ".md", ".json") and not vendored:
            texts.append(path.read_text(encoding="utf-8"))
    return bare("\n".join(texts))


@pytest.fixture(scope="module")
def student() -> Path:
    """The folder of the build without solutions."""
    if not (STUDENT / "html" / "index.html").is_file():
        pytest.fail(
            "The test needs the book without solutions in _build/student: run 'make book-student'.",
            pytrace=False,
        )
    return STUDENT


@pytest.mark.parametrize(("chapter", "body"), solutions())
def test_no_piece_of_a_solution_is_shipped(student, book, chapter, body):
    own = {piece for piece in pieces(body) if piece not in elsewhere()}
    assert len(own) >= 2
    shown = written(book / "notebooks")
    assert sum(piece in shown for piece in own) >= 0.8 * len(own)  # in the instructor's book
    assert [piece for piece in own if piece in written(student)] == []


def test_the_exercises_and_their_hints_are_still_there(student, book):
    for path in CHAPTERS:
        with_them, without = (
            BeautifulSoup(path_of.read_text(encoding="utf-8"), "html.parser")
            for path_of in (
                book / "notebooks" / f"{path.stem}.html",
                student / "html" / "notebooks" / f"{path.stem}.html",
            )
        )
        for kind, left in ((".exercise", True), (".hint", True), (".solution", False)):
            count = len(with_them.select(kind))
            assert len(without.select(kind)) == (count if left else 0)
            assert kind == ".hint" or count > 4
        text = (student / "notebooks" / f"{path.stem}.ipynb").read_text(encoding="utf-8")
        assert text.count("### Exercise") == len(with_them.select(".exercise"))
        assert "Solution to" not in text


def test_no_source_and_no_label_of_a_solution_is_shipped(student):
    assert sorted(path.name for path in student.iterdir()) == ["html", "notebooks"]
    assert not (student / "html" / "_sources").exists()
    index = (student / "html" / "searchindex.js").read_text(encoding="utf-8")
    assert "ex-01-direction" in index or "images_grids" in index
    for path in CHAPTERS:
        for _, label, _ in SOLUTION.findall(path.read_text(encoding="utf-8")):
            assert label not in index
