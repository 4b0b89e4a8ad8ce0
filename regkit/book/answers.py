"""Checks a reader's answer: right, not answered yet, or which mistake it looks like."""

from __future__ import annotations

from typing import Any

from regkit import messages
from regkit.book.exercise import Verdict
from regkit.book.exercises import EXERCISES


def check(exercise: str, answer: Any) -> Verdict:
    """What an exercise of the book says of your answer.

    A wrong answer raises nothing: the verdict is then false and says what is wrong.

    Args:
        exercise: its chapter and its number there, such as "02-3".
        answer: a number, a tensor, a function or a word, as the exercise asks. A function is called
            with arguments of the exercise's own.

    Raises:
        ValueError: there is no exercise of this name.
    """
    if exercise not in EXERCISES:
        chapter = str(exercise).partition("-")[0]
        near = [name for name in EXERCISES if name.partition("-")[0] == chapter]
        raise messages.unknown("exercise", exercise, near or EXERCISES)
    return EXERCISES[exercise].judge(exercise, answer)
