"""Known misspellings, and one variety of English: British. Both from the dictionaries of codespell.

`book/words.txt` lists words that are right here although a dictionary has another one for them.
"""

import ast
import re
import subprocess
import sys
from functools import cache
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROSE = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "book").rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.md")),
    *sorted((ROOT / "results").glob("*.md")),
    *sorted((ROOT / "data_scripts").glob("*.md")),
]
CODE = [*sorted((ROOT / "regkit").rglob("*.py")), *sorted((ROOT / "book").rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def allowed() -> set[str]:
    """The words of book/words.txt, without its comments."""
    lines = (ROOT / "book" / "words.txt").read_text(encoding="utf-8").splitlines()
    return {word for line in lines if (word := line.partition("#")[0].strip())}


@cache
def american() -> dict[str, str]:
    """American spelling -> the British one."""
    data = resources.files("codespell_lib") / "data" / "dictionary_en-GB_to_en-US.txt"
    pairs = [line.split("->") for line in data.read_text(encoding="utf-8").splitlines() if line]
    found = {us.strip(): gb for gb, list_ in pairs for us in list_.rstrip(",").split(",")}
    return {us: gb for us, gb in found.items() if us not in allowed()}


def without_code(text: str) -> str:
    """Prose alone: no fenced or inline code, no targets of links, no names of roles."""
    text = re.sub(r"(?ms)^(`{3,})(?:\{code-cell\}.*?|[a-z]*)\n.*?^\1 *$", "", text)
    text = re.sub(r"`[^`\n]*`|\]\([^)]*\)|<[^>\n]*>|https?://\S+|\{[\w:-]+\}", " ", text)
    return re.sub(r"(?m)^:[\w-]+:", " ", text)


def docstrings(path: Path) -> str:
    """All docstrings of a file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    return "\n".join(ast.get_docstring(node) or "" for node in nodes)


def americanisms(text: str) -> list[str]:
    """American spellings in a text, with the British ones."""
    words = re.findall(r"[^\W\d_]+", text)
    return sorted({f"{w} ({american()[w.lower()]})" for w in words if w.lower() in american()})


def test_nothing_is_misspelt_in_a_way_that_is_known():
    ignored = ",".join(sorted(allowed()))
    command = [sys.executable, "-m", "codespell_lib", "--ignore-words-list", ignored]
    done = subprocess.run([*command, *PROSE, *CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout.replace(f"{ROOT}/", "") + done.stderr


def test_a_misspelling_is_noticed(tmp_path):
    (tmp_path / "page.md").write_text("A registation that recieves an image.")
    command = [sys.executable, "-m", "codespell_lib", tmp_path / "page.md"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "recieves ==> receives" in done.stdout


@pytest.mark.parametrize("path", PROSE, ids=name_of)
def test_a_page_is_written_in_british_english(path):
    assert americanisms(without_code(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_a_docstring_is_written_in_british_english(path):
    assert americanisms(without_code(docstrings(path))) == []


def test_an_american_spelling_is_noticed_in_prose_and_not_in_code():
    text = "The color of `color` is\n```python\ncolor = 1\n```\nNormalized, [center](color.md)."
    assert americanisms(without_code(text)) == [
        "Normalized (normalised)",
        "center (centre)",
        "color (colour)",
    ]


def test_every_allowed_word_is_used_and_stands_there_once():
    lines = (ROOT / "book" / "words.txt").read_text(encoding="utf-8").splitlines()
    words = [w for line in lines if (w := line.partition("#")[0].strip())]
    assert words == sorted(set(words))
    text = " ".join(path.read_text(encoding="utf-8") for path in [*PROSE, *CODE]).lower()
    assert [w for w in words if not re.search(rf"(?<![a-z]){w}(?![a-z])", text)] == []
