"""The quizzes of the chapters: questions, options, and why each option is right or wrong.

A chapter's questions stand in `quizzes/NN.toml`. Texts in it are plain, but for `code` and
*emphasis*. `Quiz.html` draws them in a cell and on the page of the book; a small script (`static/`)
lets a reader answer and counts. Without the script each answer stands folded below its question.
"""

from __future__ import annotations

import html
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from string import ascii_uppercase

from regkit.messages import unknown

_HERE = files("regkit.book")
_CODE = re.compile(r"`([^`]+)`")
_EMPHASIS = re.compile(r"\*([^*]+)\*")


@dataclass(frozen=True)
class Option:
    """One option of a question.

    text: what it says.
    right: whether it answers the question.
    why: the explanation of that.
    """

    text: str
    right: bool
    why: str


@dataclass(frozen=True)
class Item:
    """One question.

    question: what is asked.
    options: in the order in which they are shown.
    several: whether more than one of them may be right.
    """

    question: str
    options: tuple[Option, ...]
    several: bool = False

    @property
    def asked(self) -> str:
        """The question, and that several options are right where they are."""
        return f"{self.question} (Choose all that are right.)" if self.several else self.question

    def lettered(self) -> Iterator[tuple[str, Option]]:
        """A letter for each option: A, B, ..."""
        return zip(ascii_uppercase, self.options)


@dataclass(frozen=True, repr=False)
class Quiz:
    """The quiz of one chapter. As the last line of a cell it is shown, and can be answered.

    chapter: its number, such as "07".
    items: the questions, in order.
    """

    chapter: str
    items: tuple[Item, ...]

    def __repr__(self) -> str:
        return f"Quiz of chapter {self.chapter}, {len(self.items)} questions: a notebook shows it."

    def _repr_html_(self) -> str:
        """What a notebook shows: the questions with their own style and script."""
        return (
            f"<style>{static('quiz.css')}</style>{self.html()}<script>{static('quiz.js')}</script>"
        )

    def html(self) -> str:
        """The questions with folded answers; `static/quiz.js` makes them a quiz that counts."""
        items = "".join(_item_html(n, item) for n, item in enumerate(self.items, 1))
        return f'<div class="regkit-quiz">\n{items}</div>'

    def markdown(self) -> str:
        """The same as Markdown that needs no script."""
        return "\n\n".join(_item_markdown(n, item) for n, item in enumerate(self.items, 1))


def quiz(chapter: str) -> Quiz:
    """The quiz of a chapter: `regkit.book.quiz("07")` as the last line of a cell asks and counts.

    Args:
        chapter: its number, such as "07".

    Raises:
        ValueError: that chapter has no quiz; the sentence names those that have one.
    """
    if chapter not in chapters():
        raise unknown("chapter", chapter, chapters())
    return _read(_HERE / "quizzes" / f"{chapter}.toml")


def chapters() -> list[str]:
    """The chapters that have a quiz, such as ["01", "02"]."""
    names = (path.name for path in (_HERE / "quizzes").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def _read(path: Traversable) -> Quiz:
    tables = tomllib.loads(path.read_text(encoding="utf-8"))["item"]
    items = (
        Item(
            table["question"],
            tuple(Option(**option) for option in table["options"]),
            table.get("several", False),
        )
        for table in tables
    )
    return Quiz(path.name.removesuffix(".toml"), tuple(items))


@cache
def static(name: str) -> str:
    """The text of a file in `static/`: "quiz.css", the style, or "quiz.js", the script."""
    return (_HERE / "static" / name).read_text(encoding="utf-8")


def invitation(chapter: str) -> str:
    """What stands above a chapter's quiz on its page and in its notebook, as Markdown."""
    return (
        "Answer first, then look: each answer says why. In the notebook of this chapter, "
        f'`regkit.book.quiz("{chapter}")` asks the same questions in a cell, and counts.'
    )


def inline_html(text: str) -> str:
    """A text of a quiz as HTML: `code` and *emphasis* are marked up, all else is itself."""
    pieces = _CODE.split(text)  # what stands in backticks has odd places
    for k, piece in enumerate(pieces):
        safe = html.escape(piece, quote=False)
        pieces[k] = f"<code>{safe}</code>" if k % 2 else _EMPHASIS.sub(r"<em>\1</em>", safe)
    return "".join(pieces)


def _verdict(option: Option) -> str:
    return f"{'Right' if option.right else 'Wrong'}. {option.why}"


def _item_html(number: int, item: Item) -> str:
    options = "".join(
        f"<li{' data-right' if option.right else ''}>"
        f"<p><strong>{letter}</strong> {inline_html(option.text)}</p></li>\n"
        for letter, option in item.lettered()
    )
    answers = "".join(
        f"<li><p><strong>{letter}</strong> {inline_html(_verdict(option))}</p></li>\n"
        for letter, option in item.lettered()
    )
    return (
        f'<div class="regkit-item"{" data-several" if item.several else ""}>\n'
        f"<p><strong>{number}.</strong> {inline_html(item.asked)}</p>\n"
        f'<ul class="regkit-options">\n{options}</ul>\n'
        f"<details><summary>Answer to question {number}</summary>\n<ul>\n{answers}</ul></details>\n"
        "</div>\n"
    )


def _item_markdown(number: int, item: Item) -> str:
    options = "\n".join(f"- **{letter}** {option.text}" for letter, option in item.lettered())
    answers = "\n".join(f"- **{letter}** {_verdict(option)}" for letter, option in item.lettered())
    return (
        f"**{number}.** {item.asked}\n\n{options}\n\n"
        f"<details>\n<summary>Answer to question {number}</summary>\n\n{answers}\n\n</details>"
    )
