"""What the book's notebooks share, and what checks a reader's answers.

`notebook` holds what every chapter starts and ends with: seeds, run folders, numbers for the prose.
"""

from regkit.book.answers import check
from regkit.book.notebook import cost, expect, glue, run_folder, sample, setup, small_png

__all__ = ["check", "cost", "expect", "glue", "run_folder", "sample", "setup", "small_png"]
