"""What the book's notebooks share, and what checks a reader's answers.

`notebook` holds what every chapter starts and ends with: seeds, run folders, numbers for the prose.
`motions` and `layers` measure what a chapter prints.
`answers` says of an exercise's answer whether it is right, `exercises` what is right.
`quiz` asks the questions of a chapter, `gift` writes them for Moodle.
"""

from regkit.book.answers import check
from regkit.book.gift import gift
from regkit.book.layers import shapes
from regkit.book.notebook import cost, expect, glue, run_folder, sample, setup, small_png
from regkit.book.quiz import quiz

__all__ = [
    "check",
    "cost",
    "expect",
    "gift",
    "glue",
    "quiz",
    "run_folder",
    "sample",
    "setup",
    "shapes",
    "small_png",
]
