"""How long a chapter takes to read: its words, and the lines of its code that a reader sees.

    python book/tools/reading.py        words, visible lines and minutes of every chapter

Counted is what stands before the exercises, which take a time of their own. A minute is WORDS words
of text, or LINES lines of code. Code that the page folds or removes is not counted.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nbformat import NotebookNode

from notebooks import is_setup, read_text, select

WORDS, LINES = 200, 6  # a minute
UNSEEN = {"hide-cell", "hide-input", "remove-cell", "remove-input"}
EXERCISES = re.compile(r"^## Exercises$", re.MULTILINE)
STATED = re.compile(r"^\*Reading, with the code: about (\d+) minutes\.\*$", re.MULTILINE)


class Reading(NamedTuple):
    """What there is to read in a chapter: words of text, and lines of code in open cells."""

    words: int
    lines: int

    @property
    def minutes(self) -> float:
        return self.words / WORDS + self.lines / LINES


def of(text: NotebookNode) -> Reading:
    """What a reader of a chapter has before the eyes, up to its exercises."""
    lines = 0
    for cell in _before_the_exercises(text):
        if cell.cell_type == "code" and not _unseen(cell):
            lines += sum(bool(line.strip()) for line in cell.source.splitlines())
    words = sum(any(c.isalnum() for c in word) for word in prose(text).split())
    return Reading(words, lines)


def prose(text: NotebookNode) -> str:
    """The text of a chapter up to its exercises, as it is written, without its code."""
    cells = (c for c in _before_the_exercises(text) if c.cell_type == "markdown")
    return "\n\n".join(cell.source for cell in cells)


def stated(md: Path) -> int | None:
    """The minutes that a chapter itself says, if it says them."""
    found = STATED.search(md.read_text(encoding="utf-8"))
    return int(found[1]) if found else None


def _unseen(cell: NotebookNode) -> bool:
    return is_setup(cell) or bool(UNSEEN & set(cell.metadata.get("tags", [])))


def _before_the_exercises(text: NotebookNode) -> Iterator[NotebookNode]:
    for cell in text.cells:
        last = cell.cell_type == "markdown" and EXERCISES.search(cell.source)
        if last:
            yield NotebookNode(cell_type="markdown", source=cell.source[: last.start()])
            return
        yield cell


if __name__ == "__main__":
    for chapter in select(None):
        reading = of(read_text(chapter))
        print(
            f"{chapter.stem:28s} {reading.words:5d} words, {reading.lines:3d} lines, "
            f"{reading.minutes:3.0f} minutes"
        )
