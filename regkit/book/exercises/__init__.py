"""The exercises of the chapters that check answers, one module a chapter, each with its references.

The references are what a check compares with; the worked solutions stand in the chapters.
"""

from collections.abc import Mapping

from regkit.book.exercise import Exercise
from regkit.book.exercises import (
    chapter_00,
    chapter_01,
    chapter_02,
    chapter_03,
    chapter_04,
    chapter_05,
    chapter_06,
    chapter_07,
    chapter_08,
    chapter_11,
    chapter_12,
)

CHAPTERS = (
    chapter_00, chapter_01, chapter_02, chapter_03, chapter_04, chapter_05, chapter_06,
    chapter_07, chapter_08, chapter_11, chapter_12,
)  # fmt: skip
#: All exercises by chapter and number, such as "02-3".
EXERCISES: Mapping[str, Exercise] = {
    f"{module.__name__[-2:]}-{number}": exercise
    for module in CHAPTERS
    for number, exercise in enumerate(module.EXERCISES, 1)
}

__all__ = ["EXERCISES"]
