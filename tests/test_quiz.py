"""The quizzes of the chapters: what a good item needs, how it is shown, and what Moodle reads."""

import re
from collections import Counter
from functools import cache
from pathlib import Path

import gift as tool
import plain
import pytest
from bs4 import BeautifulSoup
from markdown_it import MarkdownIt
from nbformat.v4 import new_markdown_cell, new_notebook

from regkit import book
from regkit.book.gift import escaped
from regkit.book.quiz import Item, Option, Quiz, chapters, inline_html, invitation

ROOT = Path(__file__).parents[1]
ITEMS = [
    pytest.param(name, item, id=f"{name}-{number}")
    for name in chapters()
    for number, item in enumerate(book.quiz(name).items, 1)
]
every_chapter = pytest.mark.parametrize("name", chapters())
every_item = pytest.mark.parametrize(("name", "item"), ITEMS)


@cache
def taught(name: str) -> str:
    """The text of a chapter, without its exercises."""
    (path,) = (ROOT / "notebooks").glob(f"{name}_*.md")
    return path.read_text(encoding="utf-8").partition("\n## Exercises")[0]


@cache
def terms() -> set[str]:
    """What the glossary explains."""
    text = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8")
    return {line.lower() for line in re.findall(r"(?m)^(\w.*)\n(?:\w.*\n)?  ", text)}


def said(item: Item) -> list[str]:
    """All texts of an item."""
    return [item.question, *(text for o in item.options for text in (o.text, o.why))]


# --------------------------------------------------------------------------------- good items


@every_chapter
def test_a_quiz_has_six_to_eight_questions_and_no_two_alike(name):
    questions = [item.question for item in book.quiz(name).items]
    assert 6 <= len(questions) <= 8
    assert len(set(questions)) == len(questions)


@every_item
def test_an_item_has_an_answer_and_explains_every_option(name, item):
    right = sum(option.right for option in item.options)
    assert 3 <= len(item.options) <= 5
    assert (2 <= right < len(item.options)) if item.several else right == 1
    assert len({option.text.lower() for option in item.options}) == len(item.options)
    assert len({option.why.lower() for option in item.options}) == len(item.options)
    assert item.question.endswith(("?", ".", ":")) and len(item.question) > 20
    for option in item.options:
        assert option.text.strip() == option.text != ""
        assert len(option.why) >= 20 and option.why.endswith((".", "?", "`"))


@every_item
def test_an_item_uses_what_its_chapter_has_taught(name, item):
    """A word of the glossary or code of the chapter, and no code that the chapter does not show."""
    code = {
        word
        for text in said(item)
        for piece in re.findall(r"`([^`]+)`", text)
        for word in re.findall(r"[A-Za-z_]\w{2,}", piece)
    }
    assert {word for word in code if not re.search(rf"\b{word}\b", taught(name))} == set()
    prose = " ".join(said(item)).lower()
    assert code or any(term in prose for term in terms())


@every_item
def test_the_texts_are_plain_but_for_code_and_emphasis(name, item):
    for text in said(item):
        assert text.count("`") % 2 == 0
        rest = re.sub(r"`[^`]+`", "", text)
        assert not re.search(r"[$<>\\_~#\[\]]", rest), text
        assert rest.count("*") % 2 == 0 and "\n" not in text


@every_chapter
def test_the_length_of_an_option_gives_nothing_away(name):
    """At most in a third of the items the right option is longer than all others by a fifth."""
    single = [item for item in book.quiz(name).items if not item.several]
    loud = 0
    for item in single:
        (right,) = (len(option.text) for option in item.options if option.right)
        longest = max(len(option.text) for option in item.options if not option.right)
        loud += right > 1.2 * longest
    assert loud <= len(single) / 3


@every_chapter
def test_the_right_answer_has_no_favourite_place(name):
    single = [item for item in book.quiz(name).items if not item.several]
    places = Counter([option.right for option in item.options].index(True) for item in single)
    assert max(places.values()) <= len(single) / 2
    assert len(places) >= 3


def test_chapters_without_a_quiz_are_refused_with_the_nearest_that_has_one():
    with pytest.raises(ValueError, match=r"chapter is '001', expected one of 00, .*mean '01'\.$"):
        book.quiz("001")
    with pytest.raises(ValueError, match="chapter is 2, expected one of 00, "):
        book.quiz(2)
    with pytest.raises(ValueError, match="chapter is '../quizzes/01', expected one of 00, "):
        book.quiz("../quizzes/01")


# ----------------------------------------------------------------------------------- as shown

SMALL = Quiz(
    "08",
    (
        Item(
            "Is `a < b` *always* so?",
            (
                Option("Yes & no", False, "It is one of them."),
                Option("Yes", True, "By definition: `a = b - 1`."),
                Option("No", False, "See {1} ~ #2."),
            ),
        ),
        Item(
            "Which are even?",
            (
                Option("2", True, "Two times one."),
                Option("3", False, "One is left."),
                Option("4", True, "Two times two."),
            ),
            several=True,
        ),
    ),
)


def test_marks_of_code_and_emphasis():
    assert inline_html("`a<b` & *c*, d<e") == "<code>a&lt;b</code> &amp; <em>c</em>, d&lt;e"
    assert inline_html("`x * y * z`") == "<code>x * y * z</code>"


def test_the_html_marks_what_is_right_and_folds_the_answers():
    soup = BeautifulSoup(SMALL.html(), "html.parser")
    first, second = soup.select(".regkit-item")
    assert not first.has_attr("data-several") and second.has_attr("data-several")
    assert [li.has_attr("data-right") for li in soup.select(".regkit-options > li")] == [
        *(False, True, False),
        *(True, False, True),
    ]
    answers = [li.get_text() for li in first.select("details:not([open]) li")]
    assert answers == [
        "A Wrong. It is one of them.",
        "B Right. By definition: a = b - 1.",
        "C Wrong. See {1} ~ #2.",
    ]
    assert second.p.get_text() == "2. Which are even? (Choose all that are right.)"
    assert soup.find(["script", "style", "input"]) is None  # the script adds what can be clicked


def test_a_notebook_gets_style_and_script_of_its_own_and_asks_no_other_host():
    shown = SMALL._repr_html_()
    assert shown.startswith("<style>") and SMALL.html() in shown and shown.endswith("</script>")
    assert "regkit-item" in shown.partition("</style>")[0]
    assert "://" not in shown and " src=" not in shown
    assert repr(SMALL) == "Quiz of chapter 08, 2 questions: a notebook shows it."


@every_chapter
def test_html_and_markdown_say_the_same(name):
    quiz = book.quiz(name)
    tokens = (viewer := MarkdownIt("commonmark")).parse(quiz.markdown())
    for token in tokens:
        token.hidden = False  # a paragraph in each item of a list
    drawn = viewer.renderer.render(tokens, viewer.options, {})
    said = [
        [place.get_text() for place in BeautifulSoup(html, "html.parser").select("p, summary")]
        for html in (quiz.html(), drawn)
    ]
    assert said[0] == said[1]
    assert len(said[0]) == sum(2 + 2 * len(item.options) for item in quiz.items)


def converted(text: str) -> str:
    texts = {"08_small": new_notebook(cells=[new_markdown_cell(text)])}
    return plain.Chapter("08_small", texts, {"ch08-dice": "0.7199"}).markdown(text)


def test_the_readers_notebook_has_the_questions_and_folded_answers():
    text = converted(":::{quiz} 01\n:::")
    assert text == f"{invitation('01')}\n\n{book.quiz('01').markdown()}"
    assert '`regkit.book.quiz("01")`' in text
    assert text.count("<details>\n<summary>Answer to question ") == len(book.quiz("01").items)


@pytest.mark.parametrize(
    ("text", "plainly"),
    [
        (
            ":::{predict} Is it $x$?\nIt is {glue:text}`ch08-dice:.2f`.\n\nYes.\n:::",
            "**Is it $x$?**\n\n"
            "<details>\n<summary>Look</summary>\n\nIt is 0.72.\n\nYes.\n\n</details>",
        ),
        (
            ":::{predict} Which?\n:guess: the first | $x$\n\nThe first.\n:::",
            "**Which?**\n\n- the first\n- $x$\n\n"
            "<details>\n<summary>Look</summary>\n\nThe first.\n\n</details>",
        ),
        (":::{predict} Which?\n:guess: one | two\n:::", "**Which?**\n\n- one\n- two"),
    ],
)
def test_a_question_to_guess_in_the_readers_notebook(text, plainly):
    assert converted(text) == plainly


# --------------------------------------------------------------------------------------- GIFT


def test_signs_of_gift_are_escaped():
    assert escaped("~ = # { } : \\ %") == r"\~ \= \# \{ \} \: \\ %"


def test_gift_as_the_documentation_of_moodle_shows_it():
    assert book.gift(SMALL) == (
        "$CATEGORY: regkit/chapter 08\n\n"
        "::regkit 08, question 1::[html]Is <code>a &lt; b</code> <em>always</em> so? {\n"
        "    ~Yes &amp; no # It is one of them.\n"
        "    =Yes # By definition\\: <code>a \\= b - 1</code>.\n"
        "    ~No # See \\{1\\} \\~ \\#2.\n"
        "}\n\n"
        "::regkit 08, question 2::[html]Which are even? (Choose all that are right.) {\n"
        "    ~%50%2 # Two times one.\n"
        "    ~%-50%3 # One is left.\n"
        "    ~%50%4 # Two times two.\n"
        "}\n"
    )


def read_gift(text: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(question, its (mark, option, feedback)) by the rules of docs.moodle.org/en/GIFT_format.

    Like Moodle it first puts escaped signs out of the way, then splits at the others. An empty line
    ends a question.
    """

    def hidden(match: re.Match) -> str:
        return chr(0xE000 + ord(match[1]))

    def back(piece: str) -> str:
        return re.sub("[\ue000-\ue0ff]", lambda m: chr(ord(m[0]) - 0xE000), piece).strip()

    found = []
    for block in re.sub(r"\\([~=#{}:\\])", hidden, text).split("\n\n"):
        if block.startswith(("$CATEGORY:", "//")):
            continue
        question, answers = re.fullmatch(
            r"::[^:]+::\[html\]([^{}]+)\{([^{}]+)\}", block.strip()
        ).groups()
        options = re.findall(r"(=|~(?:%-?[\d.]+%)?)([^~=#]+)#([^~=#]+)", answers)
        assert sum(len(piece) + 1 for option in options for piece in option) >= len(answers) - 8
        found.append((back(question), [(m, back(o), back(f)) for m, o, f in options]))
    return found


@every_chapter
def test_gift_holds_every_word_of_the_quiz(name):
    quiz = book.quiz(name)
    read = read_gift(book.gift(quiz))
    assert len(read) == len(quiz.items)
    for item, (question, options) in zip(quiz.items, read):
        assert question == inline_html(item.asked)
        shown = [(inline_html(o.text), inline_html(o.why)) for o in item.options]
        assert [(text, feedback) for _, text, feedback in options] == shown
        if item.several:
            worth = [float(mark.strip("~%")) for mark, _, _ in options]
            assert [w > 0 for w in worth] == [o.right for o in item.options]
            assert sum(w for w in worth if w > 0) == pytest.approx(100, abs=1e-3)
        else:
            assert [m for m, _, _ in options] == ["=" if o.right else "~" for o in item.options]


def test_every_quiz_is_written_for_moodle(tmp_path):
    tool.write(tmp_path / "quizzes")
    written = {path.name for path in (tmp_path / "quizzes").iterdir()}
    assert written == {f"{name}.gift" for name in chapters()}
    text = (tmp_path / "quizzes" / "01.gift").read_text(encoding="utf-8")
    assert text == book.gift(book.quiz("01"))
