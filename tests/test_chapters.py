"""A chapter can be read in one sitting: how much code and text stand before its exercises."""

import pytest
import reading
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import notebooks as tool

MOST_LINES, MOST_MINUTES = 250, 90

# Where a word is taught: no earlier chapter may use it.
TAUGHT = {
    "00": ["Adam", "autograd", "bootstrap", "group normalisation", "hook", "U-Net"],
    "01": ["Dice", "HD95", "Jacobian", "landmark"],
    "02": ["mutual information", "residual block"],
    "03": ["LNCC", "local correlation"],
    "04": ["ablation", "attention"],
    "05": ["SyN"],
    "07": ["softmax", "token"],
    "08": ["denoiser"],
    "11": ["MIND"],
}

each_chapter = pytest.mark.parametrize("md", tool.select(None), ids=lambda md: md.stem)


@each_chapter
def test_a_chapter_shows_so_much_code(md):
    lines = reading.of(tool.read_text(md)).lines
    assert lines <= MOST_LINES, f"{md.stem} shows {lines} lines of code: fold what only draws."


@each_chapter
def test_a_chapter_takes_so_many_minutes(md):
    minutes = reading.of(tool.read_text(md)).minutes
    assert minutes <= MOST_MINUTES, (
        f"{md.stem} takes {minutes:.0f} minutes: cut it, or move a part out."
    )


@each_chapter
def test_the_minutes_that_a_chapter_says_are_those_counted(md):
    said = reading.stated(md)
    assert said is not None
    assert abs(said - reading.of(tool.read_text(md)).minutes) < 5


@pytest.mark.parametrize(
    ("number", "word"), [(number, word) for number, words in TAUGHT.items() for word in words]
)
def test_a_word_is_used_from_the_chapter_on_that_teaches_it(number, word):
    using = [md.stem[:2] for md in tool.select(None) if word in reading.prose(tool.read_text(md))]
    assert using[0] == number, f"chapter {using[0]} says {word!r}, which chapter {number} teaches"


def test_what_is_counted():
    notebook = new_notebook(
        cells=[
            new_markdown_cell("# A title\n\nFour words of text: $a$ -- `b`."),
            new_code_cell("x = 1", metadata={"tags": ["setup"]}),
            new_code_cell("x = 1\n\n# why\ny = 2\n"),
            new_code_cell("draw(x)", metadata={"tags": ["hide-input"]}),
            new_code_cell("check(x)", metadata={"tags": ["remove-cell"]}),
            new_code_cell("print(x)", metadata={"tags": ["nbval-check-output"]}),
            new_markdown_cell("More.\n\n## Exercises\n\nNot counted."),
            new_code_cell("stub = None"),
            new_markdown_cell("## Summary\n\nNot counted."),
        ]
    )
    counted = reading.of(notebook)
    assert counted == (9, 4)
    assert counted.minutes == pytest.approx(9 / 200 + 4 / 6)


def test_the_minutes_that_are_stated(tmp_path):
    md = tmp_path / "01_small.md"
    md.write_text("# A\n\n*Reading, with the code: about 25 minutes.*\n", encoding="utf-8")
    assert reading.stated(md) == 25
    md.write_text("# A\n", encoding="utf-8")
    assert reading.stated(md) is None
