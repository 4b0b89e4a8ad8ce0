"""Writes the quizzes of the chapters for Moodle: build/quizzes/01.gift, and so on."""

import sys
from pathlib import Path

from regkit.book.gift import gift
from regkit.book.quiz import chapters, quiz


def write(folder: Path) -> None:
    """One file of GIFT a chapter."""
    folder.mkdir(parents=True, exist_ok=True)
    for chapter in chapters():
        path = folder / f"{chapter}.gift"
        path.write_text(gift(quiz(chapter)), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
