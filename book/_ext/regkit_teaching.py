"""The lecturer's pages of the book, book/teaching: what a chapter has measured, and what it holds.

    {measured}`03`                          how long the chapter took when its outputs were made
    {measured}`03 ch03-gap .0f`             a number that the chapter's run has handed to its prose

The first is the metadata that book/tools/notebooks.py writes. So nobody types a time, and a chapter
that is executed again says its new one.

    ```{what-chapters-hold}
    ```

a table of the chapters in _toc.yml, counted in their sources: aims, minutes, exercises and what
they recognise, quiz questions, slides, and views without a kernel.
"""

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nbformat
from docutils import nodes
from regkit_front import chapters, markdown
from sphinx.util.docutils import SphinxDirective, SphinxRole

from regkit.book.exercises import EXERCISES
from regkit.book.quiz import chapters as chapters_with_quiz
from regkit.book.quiz import quiz

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import plain  # noqa: E402
import slides  # noqa: E402

from notebooks import code_cells, is_stub, joined, read_text, select  # noqa: E402

# A call that makes something to handle on a page; `amplitude` and `moved_by` of the module do not.
VIEW = re.compile(r"\bwidgets\.(?:compare|explore|frames|path|series|show|turn|volumes)\(")


def spoken(seconds: float) -> str:
    """A time as one says it: seconds up to a minute and a half, else minutes."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes"


@cache
def _glued(number: str) -> dict[str, str]:
    return plain.glued(joined(select([number])[0]))


def measured(text: str) -> str:
    """What the role says.

    Raises:
        ValueError: if there is no such chapter, it was not executed, or it has no such number.
    """
    number, *rest = text.split()
    paths = [path for path in select(None) if path.stem.startswith(f"{number}_")]
    if not paths:
        raise ValueError(f"measured names chapter {number!r}, which does not exist.")
    if rest:
        name, spec = rest[0], rest[1] if len(rest) > 1 else ""
        if name not in _glued(number):
            raise ValueError(f"measured asks chapter {number} for {name!r}, which it lacks.")
        return format(float(_glued(number)[name]), spec)
    made = nbformat.read(paths[0].with_suffix(".ipynb"), as_version=4).metadata.get("regkit", {})
    if made.get("budget") != "cpu":
        raise ValueError(f"measured asks how long chapter {number} takes: execute it first.")
    return spoken(made["seconds"])


class Measured(SphinxRole):
    """{measured}`chapter`, or {measured}`chapter name format`."""

    def run(self):
        for path in select(None):
            self.env.note_dependency(str(path.with_suffix(".ipynb")))
        try:
            return [nodes.Text(measured(self.text))], []
        except ValueError as error:
            return [], [self.inliner.reporter.error(str(error), line=self.lineno)]


@dataclass(frozen=True)
class Holds:
    """What there is of a chapter, counted; `mistakes` are the wrong answers that checks name."""

    number: str
    page: str
    title: str
    aims: int
    minutes: float
    seconds: float
    exercises: int
    mistakes: int
    questions: int
    slides: int
    views: int


def what_chapters_hold(root: Path) -> list[Holds]:
    """A row for each chapter that _toc.yml lists, in its order."""
    decks = {path.stem: len(slides.read_deck(path)) for path in slides.decks()}
    with_quiz = chapters_with_quiz()
    found = []
    for chapter in chapters(root):
        text = (root / f"{chapter.page}.md").read_text(encoding="utf-8")
        aims = re.search(
            r"What you will be able to do\n(?::class: \w+\n)?(.*?)\n:::", text, re.DOTALL
        )
        code = [
            c.source for c in code_cells(read_text(root / f"{chapter.page}.md")) if not is_stub(c)
        ]
        known = [e for name, e in EXERCISES.items() if name.startswith(f"{chapter.number}-")]
        found.append(
            Holds(
                number=chapter.number,
                page=chapter.page,
                title=chapter.title,
                aims=len(re.findall(r"(?m)^- ", aims[1])) if aims else 0,
                minutes=chapter.reading,
                seconds=60 * chapter.running,
                exercises=len(known),
                mistakes=sum(len(exercise.mistakes) for exercise in known),
                questions=len(quiz(chapter.number).items) if chapter.number in with_quiz else 0,
                slides=decks.get(chapter.number, 0),
                views=sum(len(VIEW.findall(source)) for source in code),
            )
        )
    return found


def table_of(found: list[Holds]) -> list[str]:
    """The lines of a Markdown table of them, the sum last."""
    counted = ("aims", "exercises", "mistakes", "questions", "slides", "views")
    rows = [
        f"| {{doc}}`{row.number} {row.title} </{row.page}>` | {row.minutes:.0f} "
        f"| {row.seconds / 60:.1f} | "
        + " | ".join(str(getattr(row, name)) for name in counted)
        + " |"
        for row in found
    ]
    sums = [sum(getattr(row, name) for row in found) for name in counted]
    return [
        "| chapter | read, min | run, min | aims | exercises | mistakes | quiz | slides | views |",
        "|---|---:|---:|" + "---:|" * len(counted),
        *rows,
        f"| together | {sum(row.minutes for row in found):.0f} "
        f"| {sum(row.seconds for row in found) / 60:.1f} | " + " | ".join(map(str, sums)) + " |",
    ]


class WhatChaptersHold(SphinxDirective):
    """The table of `table_of`."""

    def run(self):
        for path in select(None):
            self.env.note_dependency(str(path))
        try:
            lines = table_of(what_chapters_hold(Path(self.env.srcdir)))
        except ValueError as error:
            return [self.state.document.reporter.error(str(error), line=self.lineno)]
        return markdown(self, lines)


def setup(app):
    app.add_role("measured", Measured())
    app.add_directive("what-chapters-hold", WhatChaptersHold)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
