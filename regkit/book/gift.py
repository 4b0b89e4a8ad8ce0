"""A quiz as GIFT, the text format in which Moodle and others import questions.

The rules are those of Moodle's documentation, https://docs.moodle.org/en/GIFT_format.
"""

from __future__ import annotations

from regkit.book.quiz import Item, Option, Quiz, inline_html


def gift(quiz: Quiz) -> str:
    """The questions of a quiz in GIFT, in a category of their own, explanations as feedback.

    Of a question with several right options each is worth an equal share, and a wrong one takes as
    much away.
    """
    items = (_item(quiz.chapter, number, item) for number, item in enumerate(quiz.items, 1))
    return "\n\n".join([f"$CATEGORY: regkit/chapter {quiz.chapter}", *items]) + "\n"


def _item(chapter: str, number: int, item: Item) -> str:
    share = 100 / sum(option.right for option in item.options)
    options = "\n".join(f"    {_mark(option, item.several, share)}" for option in item.options)
    title = escaped(f"regkit {chapter}, question {number}")
    return f"::{title}::[html]{escaped(inline_html(item.asked))} {{\n{options}\n}}"


def _mark(option: Option, several: bool, share: float) -> str:
    if several:
        sign = f"~%{share if option.right else -share:.7g}%"
    else:
        sign = "=" if option.right else "~"
    text, why = escaped(inline_html(option.text)), escaped(inline_html(option.why))
    return f"{sign}{text} # {why}"


def escaped(text: str) -> str:
    r"""Text in which nothing is a sign of GIFT: a backslash before each of \ ~ = # { } and :."""
    return "".join(f"\\{letter}" if letter in "\\~=#{}:" else letter for letter in text)
