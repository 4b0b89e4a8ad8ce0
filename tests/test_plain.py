"""The reader's notebooks are plain Markdown, and each conversion of plain.py does what it says."""

import re
from functools import cache
from pathlib import Path

import nbformat
import plain
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import notebooks as tool

FOLDER = tool.FOLDER
# Markdown as the viewers know it: CommonMark with tables, and formulas between dollars.
VIEWER = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin)


@cache
def opened(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def prose(name: str) -> list[str]:
    return [cell.source for cell in opened(name).cells if cell.cell_type == "markdown"]


def tokens(text: str) -> list[Token]:
    """All tokens, those inside a line included."""
    blocks = VIEWER.parse(text)
    return [inner for block in blocks for inner in (block, *(block.children or []))]


every_chapter = pytest.mark.parametrize("name", [md.stem for md in tool.select(None)])


# --------------------------------------------------------------------- all committed notebooks


@every_chapter
def test_no_markup_of_the_book_is_left(name):
    for token in (token for text in prose(name) for token in tokens(text)):
        if token.type == "text":
            raw = re.search(r"\{[\w:-]+\}|:::|^\([\w-]+\)=|\$|\\[a-z]+\{|^%|^\+\+\+", token.content)
            assert not raw, token.content
        if token.type in ("fence", "code_inline"):
            assert not re.match(r"\{", token.info), token.content
            assert not re.search(r"\{[a-z:]+\}$", token.content), token.content


@every_chapter
def test_formulas_stand_where_all_viewers_draw_them(name):
    drawn = [t for text in prose(name) for t in tokens(text) if t.type == "math_block"]
    written = [
        block
        for cell in tool.read_text(FOLDER / f"{name}.md").cells
        if cell.cell_type == "markdown"
        for block in MarkdownIt("commonmark").use(dollarmath_plugin).parse(cell.source)
        if block.type in ("math_block", "math_block_label")
    ]
    least = 1 if name.startswith("12") else 3  # chapter 12 tells of cases
    assert len(drawn) == len(written) >= least
    for text in prose(name):  # GitHub wants the dollars of a display on lines of their own
        lines = text.splitlines()
        for n in (n for n, line in enumerate(lines) if "$$" in line):
            assert lines[n] == "$$", lines[n]
        assert "> $$" not in text
    for formula in drawn:
        assert len(re.findall(r"\\tag\{", formula.content)) <= 1


@every_chapter
def test_every_figure_has_its_caption_below_and_alt_text(name):
    cells, count = opened(name).cells, 0
    for cell, below in zip(cells, cells[1:]):
        alts = [
            output.metadata.get(kind, {}).get("alt", "")
            for output in cell.get("outputs", [])
            for kind in output.get("data", {})
            if kind.startswith("image/")
        ]
        if alts:
            count += 1
            assert all(len(alt) >= 20 for alt in alts), cell.source
            assert below.metadata.get("tags") == ["caption"], cell.source
            number = f"**Figure {int(name[:2])}.{count}.** "
            assert below.source.startswith(number) and len(below.source) > len(number) + 20
    assert count == sum(cell.metadata.get("tags") == ["caption"] for cell in cells) > 3


@every_chapter
def test_every_exercise_has_a_heading_and_a_folded_solution(name):
    section = "\n\n".join(prose(name)).partition("\n## Exercises\n")[2].partition("\n\n## ")[0]
    found = re.split(r"^(?=### Exercise)", section, flags=re.MULTILINE)[1:]
    source = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert len(found) == source.count("{exercise}") == source.count("{solution}") > 4
    for count, text in enumerate(found, 1):
        number = f"{int(name[:2])}.{count}"
        question, *hints, solution = text.strip().split("<details>")
        assert re.fullmatch(rf"### Exercise {number}\. .{{4,}}", question.splitlines()[0])
        assert len(question) > 100
        assert solution.startswith(f"\n<summary>Solution to exercise {number}</summary>\n\n")
        assert solution.endswith("\n\n</details>")
        assert len(hints) == (source.count("{hint}") > 0)
        for hint in hints:
            assert hint.startswith("\n<summary>Hint</summary>\n\n")
            assert hint.endswith("\n\n</details>\n\n")
        fences = [token for token in VIEWER.parse(text) if token.type == "fence"]
        assert {fence.info for fence in fences} == {"python"}


@every_chapter
def test_result_tables_are_tables(name):
    drawn = sum(token.type == "table_open" for text in prose(name) for token in tokens(text))
    source = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    written = len(re.findall(r"^\|[ :|-]+\|$", source, re.MULTILINE))
    assert drawn == written + source.count("{result-table}")


@every_chapter
def test_links_lead_to_files_and_headings_that_exist(name):
    for token in (token for text in prose(name) for token in tokens(text)):
        target = token.attrs.get("href") if token.type == "link_open" else None
        if target is None or target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        assert (FOLDER / path).is_file(), target
        assert not re.match(r"\d\d_.*\.md", path), target  # a reader's chapter is its notebook
        if anchor:
            page = path.endswith(".md")
            texts = [(FOLDER / path).read_text()] if page else prose(Path(path).stem)
            lines = [line for text in texts for line in text.splitlines() if line.startswith("#")]
            headings = [line.lstrip("# ").replace(" ", "-") for line in lines]
            if page:  # as GitHub and the book name them; Jupyter keeps every character
                headings = [re.sub(r"[^\w-]", "", heading.lower()) for heading in headings]
            assert anchor in headings


@every_chapter
def test_cells_of_the_author_are_folded_behind_a_title(name):
    text = tool.read_text(FOLDER / f"{name}.md")
    for written, shown in zip(tool.code_cells(text), tool.code_cells(opened(name)), strict=True):
        hidden = {"remove-cell", "hide-input"} & set(written.metadata.get("tags", []))
        assert bool(hidden) == shown.metadata.get("jupyter", {}).get("source_hidden", False)
        assert bool(hidden) == (shown.metadata.get("cellView") == "form")
        assert bool(hidden) == shown.source.startswith("# @title ")


def test_a_gpu_is_asked_for_where_it_helps():
    for md in tool.select(None):
        trains = any(re.search(r"\btrain\(", c.source) for c in tool.code_cells(opened(md.stem)))
        assert trains == (opened(md.stem).metadata.get("accelerator") == "GPU"), md.stem


# ------------------------------------------------------------------------------ each conversion


def chapter(*texts: str, code: tuple = (), values: dict | None = None, **places: str):
    """A Chapter of these texts and code cells, beside another one, and its notebook."""
    notebook = new_notebook(cells=[*map(new_markdown_cell, texts), *code])
    other = "# Other\n\n## Two warps: a `row`\n\n$$ b $$ (eq-07-b)"
    texts = {
        "07_other": new_notebook(cells=[new_markdown_cell(other)]),
        "08_small": notebook,
    }
    return plain.Chapter("08_small", texts, values or {}, **places), notebook


def converted(text: str, **options) -> str:
    return chapter(text, **options)[0].markdown(text)


def figure(name: str, caption: str = "What one sees.", **metadata):
    picture = {"image": {"alt": "A brain."}, "figure": {"name": name, "caption": caption}}
    output = new_output("display_data", data={"image/png": "AAAA"})
    return new_code_cell("draw()", outputs=[output], metadata={"mystnb": picture, **metadata})


@pytest.mark.parametrize(
    ("text", "plainly"),
    [
        ("{glue:text}`ch08-dice:.2f` and", "0.72 and"),
        ("{glue:text}`ch08-steps`", "300"),
        ("{glue:text}`ch08-name`", r"vxm\_2d \| a"),
        ("{cite:t}`sun2025` say", "Sun *et al.* (2025) say"),
        ("so {cite}`monga2021`", "so (Monga *et al.*, 2021)"),
        ("{cite}`geman1995, hu2024`", "(Geman and Yang, 1995; Hu, 2024)"),
        ("{cite:t}`vaswani2017`", "Vaswani *et al.* (2017)"),  # "and others" in the file
        ("{cite:t}`maes1997`", "Maes *et al.* (1997)"),
        ("{term}`folding`", "[folding](../book/glossary.md)"),
        ("{term}`Deep\nunfolding <deep unfolding>`", "[Deep unfolding](../book/glossary.md)"),
        ("{doc}`the other <07_other>`", "[the other](07_other.ipynb)"),
        (
            "[it](07_other.md), [n](../book/notation.md)",
            "[it](07_other.ipynb), [n](../book/notation.md)",
        ),
        ("[w](07_other.md#two-warps-a-row)", "[w](07_other.ipynb#Two-warps:-a-row)"),
        ("[g](https://example.org/a_(b))", "[g](https://example.org/a_(b))"),
        ("see {eq}`eq-07-b`", "see [(7.1)](07_other.ipynb)"),
        ("a formula $a\n= b$ of two lines", "a formula $a = b$ of two lines"),
        ("`{eq}` and ``{eq}`a` `` and `x[0](1)`", "`{eq}` and ``{eq}`a` `` and `x[0](1)`"),
        (r"$\text{eq}`a`$ and \$5 and \{x}", r"$\text{eq}`a`$ and \$5 and \{x}"),
        ("```python\n{eq}`a`\n```", "```python\n{eq}`a`\n```"),
        ("- a {cite}`hu2024`\n- b\n\n  c", "- a (Hu, 2024)\n- b\n\n  c"),
        ("| a |\n|---|\n| {glue:text}`ch08-steps` |", "| a |\n|---|\n| 300 |"),
        (
            ":::{admonition} A *title*\n:class: tip\n- a\n- b\n:::",
            "> **A *title***\n>\n> - a\n> - b",
        ),
        (":::{note}\nMind {eq}`eq-07-b`.\n:::", "> **Note**\n>\n> Mind [(7.1)](07_other.ipynb)."),
        ("$$\na\n$$", "$$\na\n$$"),
    ],
)
def test_a_piece_of_text(text, plainly):
    values = {"ch08-dice": "0.7199", "ch08-steps": "300", "ch08-name": "'vxm_2d | a'"}
    assert converted(text, values=values) == plainly


def test_numbers_of_figures_equations_and_exercises():
    text = (
        "$$ a $$ (eq-a)\n\n$$ c $$\n\n$$ b $$ (eq-b)\n\n"
        "````{exercise} One\n:label: ex-a\n\nAsk.\n\n$$ d $$ (eq-d)\n````\n\n"
        "````{exercise} Two\n:label: ex-b\n\nAsk {eq}`eq-d`.\n````\n\n"
        "{eq}`eq-b`, {numref}`fig-b`, {ref}`ex-b`, {ref}`that <ex-a>`"
    )
    made, notebook = chapter(text, code=(figure("fig-a"), new_code_cell("1"), figure("fig-b")))
    markdown = made.markdown(text)
    assert "$$\na \\tag{8.1}\n$$\n\n$$ c $$\n\n$$\nb \\tag{8.2}\n$$" in markdown
    assert "### Exercise 8.2. Two\n\nAsk (8.3)." in markdown
    assert markdown.endswith("(8.2), Figure 8.2, Exercise 8.2, that")
    captions = [
        cell.source for cell in made.cells(notebook) if "caption" in cell.metadata.get("tags", [])
    ]
    assert captions == ["**Figure 8.1.** What one sees.", "**Figure 8.2.** What one sees."]


def test_an_exercise_and_its_solution():
    text = (
        "````{exercise} Is it $x$?\n:label: ex-a\n\nShow it.\n````\n\n"
        "````{solution} ex-a\n:label: sol-a\n:class: dropdown\n\n"
        "```python\nprint(1)\n```\n\nIt is {cite:t}`hu2024`.\n\n$$ x $$ (eq-x)\n````"
    )
    assert converted(text) == (
        "### Exercise 8.1. Is it $x$?\n\nShow it.\n\n"
        "<details>\n<summary>Solution to exercise 8.1</summary>\n\n"
        "```python\nprint(1)\n```\n\nIt is Hu (2024).\n\n$$\nx \\tag{8.1}\n$$\n\n</details>"
    )


EXERCISE = (
    "````{exercise} Is it?\n:label: ex-a\n\nShow it.\n````\n\n"
    ":::{hint}\n:class: dropdown\nMind {eq}`eq-07-b`.\n:::"
)
SOLVED = "````{solution} ex-a\n:label: sol-a\n\nBy {cite:t}`hu2024`.\n````\n\n## Summary\n\nText."


def test_a_hint_is_folded_and_a_stub_stands_before_the_solution():
    stub = new_code_cell('check("08-1", ...)', metadata={"tags": ["stub"]})
    made, notebook = chapter(EXERCISE, SOLVED)
    notebook.cells.insert(1, stub)
    question, asked, solution, *_ = made.cells(notebook)
    assert question.source == (
        "### Exercise 8.1. Is it?\n\nShow it.\n\n<details>\n<summary>Hint</summary>\n\n"
        "Mind [(7.1)](07_other.ipynb).\n\n</details>"
    )
    assert (asked.source, asked.outputs, asked.execution_count) == (stub.source, [], None)
    assert asked.metadata == {"tags": ["stub"]}
    assert solution.source.startswith("<details>\n<summary>Solution to exercise 8.1</summary>")


def test_a_student_gets_hints_and_no_solutions():
    numbers = new_code_cell("x = 1", metadata={"tags": ["remove-cell", "solution"]})
    made, notebook = chapter(EXERCISE, SOLVED, code=(numbers, new_code_cell("y")), solutions=False)
    question, rest, code = made.cells(notebook)
    assert "<summary>Hint</summary>" in question.source
    assert (rest.source, code.source) == ("## Summary\n\nText.", "y")  # Hu was cited there only


def test_numbers_and_tables_of_results(monkeypatch):
    rows = [
        {"name": "`a` | b", "size": 1.23, "seconds": None},
        {"name": "c", "size": 2, "seconds": 3},
    ]
    monkeypatch.setattr(
        plain, "lookup", lambda folder, name, keys: {"rows": rows, "n": 0.076}[keys]
    )
    assert (
        converted("It is {result}`made n percent`.").replace("\N{NO-BREAK SPACE}", " ")
        == "It is 7.6 %."
    )
    table = ":::{result-table} made rows\nwhat = {name}\nsize, mm = {size:.1f}\n:::"
    assert converted(table) == (
        "| what | size, mm |\n| --- | --: |\n| `a` \\| b | 1.2 |\n| c | 2.0 |"
    )
    chosen = table.replace("rows\n", "rows\n:where: size>2\n:empty: None is so large.\n")
    assert converted(chosen) == "None is so large."


def test_what_was_cited_is_listed_once_by_author():
    made, notebook = chapter("{cite:t}`sun2025`, {cite}`hu2024,sun2025`")
    last = made.cells(notebook)[-1].source
    assert last.startswith("### Where to find them\n\n- Wanting Hu. Registration of brain magnetic")
    assert last.count("\n- ") == 2
    doi = "[doi:10.11834/jig.250283](https://doi.org/10.11834/jig.250283)."
    assert last.endswith(f"*Journal of Image and Graphics*, 2025. In Chinese. {doi}")


def test_a_cell_of_text_begins_at_each_heading():
    made, notebook = chapter("Before.\n\n# A\n\nText.\n\n```\n# no heading\n```\n\n## B", "more")
    texts = [cell.source for cell in made.cells(notebook)]
    assert texts == ["Before.", "# A\n\nText.\n\n```\n# no heading\n```", "## B", "more"]


def test_code_is_folded_where_the_book_hides_it_and_outputs_stay():
    cells = (
        figure("fig-a", "See {eq}`eq-07-b`.", tags=["hide-input"]),
        new_code_cell("check(1)", metadata={"tags": ["remove-cell"]}, execution_count=3),
        new_code_cell("print(1)", metadata={"tags": ["nbval-check-output"]}),
    )
    made, notebook = chapter(code=cells)
    drawn, caption, checked, printed = made.cells(notebook)
    assert drawn.source == "# @title Code of figure 8.1\ndraw()"
    assert drawn.metadata == {
        "tags": ["hide-input"],
        "cellView": "form",
        "jupyter": {"source_hidden": True},
    }
    assert drawn.outputs[0].metadata == {"image/png": {"alt": "A brain."}}
    assert caption.source == "**Figure 8.1.** See [(7.1)](07_other.ipynb)."
    assert checked.source.splitlines()[1:] == ["check(1)"] and checked.execution_count == 3
    assert checked.source.startswith("# @title Numbers and checks") and checked.metadata.cellView
    assert printed.source == "print(1)"
    assert printed.metadata == {"tags": ["nbval-check-output"]}
    assert notebook.cells[1].outputs == [] and notebook.cells[0].outputs[0].metadata == {}


def test_a_slider_says_what_it_is_where_no_widget_is_drawn():
    data = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "VBox(..."}
    code = new_code_cell("slide()", outputs=[new_output("display_data", data=data)])
    made, notebook = chapter(code=(code,))
    shown = made.cells(notebook)[0].outputs[0].data
    assert shown == data | {"text/plain": "A slider: run this cell to move it."}


def test_values_that_the_code_hands_to_the_prose_are_found():
    prefix = "application/papermill.record/"
    output = new_output(
        "display_data",
        data={f"{prefix}text/plain": "0.5"},
        metadata={"scrapbook": {"name": "ch08-a", "mime_prefix": prefix}},
    )
    notebook = new_notebook(cells=[new_code_cell("glue()", outputs=[output])])
    assert plain.glued(notebook) == {"ch08-a": "0.5"}
    assert notebook.cells[0].outputs[0].data == {f"{prefix}text/plain": "0.5"}


def test_links_with_an_address():
    places = {
        "pages": "https://github.com/a/b/blob/main",
        "chapters": "https://github.com/a/b/blob/colab/notebooks",
    }
    text = "[it](07_other.md#two-warps-a-row), [n](../book/notation.md#x)"
    assert converted(text, **places) == (
        "[it](https://github.com/a/b/blob/colab/notebooks/07_other.ipynb#Two-warps:-a-row), "
        "[n](https://github.com/a/b/blob/main/book/notation.md#x)"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{glue:text}`ch08-b`", "08_small refers to 'ch08-b', which does not exist"),
        ("{eq}`eq-no`", "refers to 'eq-no', which does not exist"),
        ("{cite}`nobody1900`", "refers to 'nobody1900', which does not exist"),
        ("{mystery}`a`", "No plain Markdown is known for {mystery}`a`"),
        ("```{mermaid}\na\n```", "No plain Markdown is known for mermaid"),
        ("(a-target)=\n# A", "No plain Markdown is known for myst_target"),
        ("% a comment", "No plain Markdown is known for myst_line_comment"),
        ("[a](09_none.md)", "links to 09_none.md, which does not exist"),
        ("[a](07_other.md#nowhere)", "links to 07_other#nowhere, which does not exist"),
        ("- a\n\n  :::{note}\n  b\n  :::", "{note} stands inside a block: b"),
        ("> $$ a $$ (eq-a)", "eq-a stands inside a block"),
        (":::{note}\n$$ a $$\n:::", "A formula has a line of its own in an admonition"),
        ("[a]: https://example.org\n\ntext", "Nothing is known about the lines"),
    ],
)
def test_what_cannot_be_made_plain_is_refused(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        converted(text)
