"""The committed notebooks are in order, and the checker that says so sees what is wrong."""

from pathlib import Path

import nbformat
import pytest
from address import Address

import notebooks as tool

HEADER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
    format_version: 0.13
kernelspec:
  display_name: Python 3 (ipykernel)
  language: python
  name: python3
---

"""
# The kernel does not import regkit here: the setup cell of these small notebooks is its own.
TWO_CELLS = """\
# A title

```{code-cell} ipython3
:tags: [setup]

x = 20
```

Some text.

```{code-cell} ipython3
print(x + 1)
```
"""


STALE = "01_small.ipynb is stale: its outputs come from other code; execute it."
DIFFERS = "01_small.ipynb is not what 01_small.md and its outputs make: execute it."


# -------------------------------------------------------------------- the committed notebooks


@pytest.mark.parametrize("md", tool.select(None), ids=lambda md: md.stem)
def test_committed_pair_is_in_order(md):
    assert tool.check_pair(md) == []


@pytest.mark.slow
def test_every_notebook_has_its_text_and_all_are_small():
    assert tool.check_all() == []


def test_setup_cell_is_the_same_everywhere():
    for md in tool.select(None):
        first = tool.code_cells(tool.read_text(md))[0]
        assert first.source == f'import regkit.book\n\nregkit.book.setup("{md.stem[:2]}")'


# ------------------------------------------------------------------------------- the checker


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An own notebook folder, with the setup cell `x = 20`."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(tool, "FOLDER", folder)
    monkeypatch.setattr(tool, "SETUP", "x = 20")
    monkeypatch.setattr(tool.setup_cell, "source", lambda *given: "x = 20")
    monkeypatch.setenv("REGKIT_BUDGET", "cpu")  # so that what an execution sets is undone
    return folder


def write(folder: Path, body: str = TWO_CELLS, name: str = "01_small") -> Path:
    md = folder / f"{name}.md"
    md.write_text(HEADER + body)
    return md


def executed(folder: Path, body: str = TWO_CELLS) -> Path:
    """A pair in order, its outputs written by hand instead of by a kernel."""
    md = write(folder, body)
    text = tool.read_text(md)
    for count, cell in enumerate(tool.executed_cells(text), 1):
        cell.execution_count = count
    text.metadata.regkit = {"budget": "cpu", "seconds": 7, "source_hash": tool.source_hash(text)}
    nbformat.write(tool.made_plain(md, text), md.with_suffix(".ipynb"))
    return md


def spoil(md: Path, change) -> list[str]:
    """What `check_pair` says after `change` was applied to the executed notebook."""
    path = md.with_suffix(".ipynb")
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)
    return tool.check_pair(md)


def add_output(kind: str, **fields):
    def change(notebook):
        notebook.cells[-1].outputs = [nbformat.v4.new_output(kind, **fields)]

    return change


def test_pair_in_order_passes(folder):
    assert tool.check_pair(executed(folder)) == []


def test_missing_notebook(folder):
    assert tool.check_pair(write(folder)) == ["01_small.ipynb is missing: execute it."]


def test_notebook_without_text(folder):
    md = executed(folder)
    md.unlink()
    assert tool.check_all() == ["01_small.ipynb has no .md."]


def test_changed_text_is_seen(folder):
    md = executed(folder)
    md.write_text(md.read_text().replace("Some text.", "Other text."))
    assert tool.check_pair(md) == [DIFFERS]


@pytest.mark.parametrize("cell", [0, 1, 2, 3], ids=["title", "setup", "text", "code"])
def test_a_change_of_the_notebook_alone_is_seen(folder, cell):
    def change(notebook):
        notebook.cells[cell].source += " "

    assert spoil(executed(folder), change) == [DIFFERS]


def test_a_change_of_the_metadata_alone_is_seen(folder):
    def change(notebook):
        notebook.cells[-1].metadata.jupyter = {"source_hidden": True}

    assert spoil(executed(folder), change) == [DIFFERS]


def test_changed_code_is_seen_and_makes_no_page(folder):
    md = executed(folder)
    md.write_text(md.read_text().replace("x + 1", "x + 2"))
    assert tool.check_pair(md) == [STALE]
    with pytest.raises(ValueError, match="is stale"):
        tool.joined(md)


def test_stale_outputs_are_seen_when_both_halves_agree(folder):
    md = executed(folder)
    md.write_text(md.read_text().replace("x + 1", "x + 2"))

    def same_code(notebook):
        notebook.cells[-1].source = "print(x + 2)"

    assert spoil(md, same_code) == [STALE]


def test_a_lost_cell_is_seen(folder):
    assert spoil(executed(folder), lambda notebook: notebook.cells.pop()) == [STALE]


def test_another_setup_cell_leaves_the_outputs_fresh(folder, monkeypatch):
    md = executed(folder)
    monkeypatch.setattr(tool, "SETUP", "x = 21")
    monkeypatch.setattr(tool.setup_cell, "source", lambda *given: "x = 21")
    tool.sync_command()
    assert tool.check_pair(md) == [DIFFERS]
    assert tool.update(md, "cpu") is False  # nothing ran
    assert tool.check_pair(md) == []


def test_text_that_cannot_be_made_plain_is_one_sentence(folder):
    md = executed(folder)
    md.write_text(md.read_text().replace("Some text.", "{eq}`nowhere`"))
    assert tool.check_pair(md) == ["01_small refers to 'nowhere', which does not exist."]


def test_wrong_budget_is_seen(folder):
    problems = spoil(executed(folder), lambda nb: nb.metadata.regkit.update(budget="smoke"))
    assert problems == ["01_small.ipynb was executed at budget smoke, not cpu."]


def test_disorder_is_seen(folder):
    problems = spoil(executed(folder), lambda nb: nb.cells[-1].update(execution_count=7))
    assert problems == ["01_small.ipynb was not executed in order, once, from its first cell."]


def test_error_is_seen_unless_the_cell_announces_it(folder):
    error = add_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"])
    problems = spoil(executed(folder), error)
    assert problems == ["01_small.ipynb, code cell 2: holds an error (ValueError: no)."]
    announced = TWO_CELLS.replace("print", ":tags: [raises-exception]\n\nprint")
    assert spoil(executed(folder, announced), error) == []


def test_warnings_and_progress_bars_are_seen(folder):
    problems = spoil(executed(folder), add_output("stream", name="stderr", text="10%|#  |"))
    assert problems == ["01_small.ipynb, code cell 2: wrote to stderr: '10%|#  |'."]


def test_picture_needs_alt_text(folder):
    picture = add_output("display_data", data={"image/png": "AAAA"})
    problems = spoil(executed(folder), picture)
    assert problems == [
        "01_small.ipynb, code cell 2: shows a picture without alt text (mystnb: image: alt)."
    ]
    header = "---\nmystnb:\n  image:\n    alt: Two brains side by side.\n---\nprint"
    md = executed(folder, TWO_CELLS.replace("print", header))
    assert spoil(md, picture) == [DIFFERS]  # viewers read it beside the picture
    alt = {"image/png": {"alt": "Two brains side by side."}}
    picture = add_output("display_data", data={"image/png": "AAAA"}, metadata=alt)
    assert spoil(md, picture) == []


@pytest.mark.parametrize("top", ["home", "root", "Users"])
def test_machine_path_is_seen(folder, top):
    text = f"wrote /{top}/ada/moved.nii.gz"
    problems = spoil(executed(folder), add_output("stream", name="stdout", text=text))
    assert problems == ["01_small.ipynb, code cell 2: prints a path of one machine."]


def test_missing_sample_is_seen(folder, capsys, monkeypatch, tmp_path):
    from regkit import book

    monkeypatch.setenv("REGKIT_DATA", str(tmp_path))
    monkeypatch.setenv("REGKIT_BUDGET", "smoke")
    assert book.sample("ants_slices", lambda: 1) is None
    said = add_output("stream", name="stdout", text=capsys.readouterr().out)
    problem = "01_small.ipynb, code cell 2: was executed without an open sample that it shows."
    assert spoil(executed(folder), said) == [problem]


def test_large_notebook_is_seen(folder):
    text = "1" * (tool.MAX_BYTES + 1)
    problems = spoil(executed(folder), add_output("stream", name="stdout", text=text))
    assert problems == [f"01_small.ipynb is larger than {tool.MAX_BYTES} bytes."]


def test_foreign_setup_cell_is_seen_and_sync_repairs_it(folder):
    md = executed(folder, TWO_CELLS.replace("x = 20", "x=21"))
    assert tool.check_pair(md) == [
        "01_small.md is not as `sync` writes it (setup cell, formatting): run sync."
    ]
    tool.sync_command()
    assert "\n\nx = 20\n```" in md.read_text()


def test_missing_setup_cell_is_seen(folder):
    md = executed(folder, TWO_CELLS.replace(":tags: [setup]\n\n", ""))
    problem = "01_small.ipynb: the first code cell, and no other, is tagged `setup`."
    assert tool.check_pair(md) == [problem]


def test_unknown_name_is_refused(folder):
    write(folder)
    assert tool.select(["01"]) == tool.select(["notebooks/01_small.ipynb"]) == tool.select(None)
    with pytest.raises(tool.typer.BadParameter, match="'02'; there are: 01_small"):
        tool.select(["02"])


STUB = """\

```{code-cell} ipython3
:tags: [stub]

answer = ...
check("01-1", answer)
```
"""


def test_a_stub_comes_and_changes_without_making_the_outputs_stale(folder):
    md = executed(folder)
    spoil(md, add_output("stream", name="stdout", text="21\n"))
    before = tool.joined(md)
    for body in (TWO_CELLS + STUB, TWO_CELLS + STUB.replace("...", "0"), TWO_CELLS + 2 * STUB):
        md.write_text(HEADER + body)
        assert tool.check_pair(md)[0] == DIFFERS
        assert tool.update(md, "cpu") is False  # nothing ran
        assert tool.check_pair(md) == []
        assert tool.executed_cells(tool.joined(md))[1].outputs[0].text == "21\n"
        assert tool.joined(md).metadata == before.metadata
        stub, *_ = filter(tool.is_stub, nbformat.read(md.with_suffix(".ipynb"), 4).cells)
        assert (stub.outputs, stub.execution_count) == ([], None)


def test_a_stub_that_was_executed_is_seen(folder):
    said = nbformat.v4.new_output("stream", text="a")
    for change in ({"execution_count": 3}, {"outputs": [said]}):
        md = executed(folder, TWO_CELLS)
        md.write_text(HEADER + TWO_CELLS + STUB)
        tool.update(md, "cpu")
        assert spoil(md, lambda nb, change=change: nb.cells[-1].update(change)) == [DIFFERS]


def test_a_stub_that_hands_nothing_over_is_seen(folder):
    problem = "01_small.ipynb: a cell tagged `stub` ends in check(...)."
    for last in ('check("01-1", ...)', "print(1)", 'check("1", answer)'):
        md = executed(folder)
        md.write_text(HEADER + TWO_CELLS + STUB.replace('check("01-1", answer)', last))
        tool.update(md, "cpu")
        assert tool.check_pair(md) == [problem]


def test_a_change_of_other_code_is_seen_beside_a_stub(folder):
    md = executed(folder)
    md.write_text(HEADER + TWO_CELLS.replace("x + 1", "x + 2") + STUB)
    assert tool.check_pair(md) == [STALE]


def test_a_notebook_keeps_of_a_widget_only_what_is_not_null(folder):
    state = {"layout": {"model_name": "LayoutModel", "state": {"width": "auto", "top": None}}}

    def add(notebook):
        notebook.metadata.widgets = {tool.WIDGETS: {"state": state}}

    md = executed(folder)
    assert spoil(md, add) == [DIFFERS]
    tool.update(md, "cpu")
    assert tool.check_pair(md) == []
    kept = nbformat.read(md.with_suffix(".ipynb"), 4).metadata.widgets[tool.WIDGETS].state.layout
    assert kept == {"model_name": "LayoutModel", "state": {"width": "auto"}}


def test_notebooks_for_a_class_have_no_solutions(folder, tmp_path):
    exercise = "````{exercise} A\n:label: ex-a\n\nShow it.\n````\n"
    solution = "\n````{solution} ex-a\n\nLike this.\n````\n"
    executed(folder, f"{TWO_CELLS}\n{exercise}{STUB}{solution}")
    tool.student_command(tmp_path / "out")
    text = (tmp_path / "out" / "01_small.ipynb").read_text()
    assert "Show it." in text and "01-1" in text and "print(x + 1)" in text
    assert "Like this." not in text and "Solution" not in text
    assert "Like this." in (folder / "01_small.ipynb").read_text()


# ------------------------------------------------------------------------ sync and execution


def test_sync_keeps_what_it_need_not_change(folder):
    body = TWO_CELLS.replace("print(x + 1)", "print( x+1 )")
    md = write(folder, body)
    tool.sync_command()
    assert md.read_text() == HEADER + TWO_CELLS
    assert tool.canonical(md) == md.read_text()


def test_the_book_joins_the_text_with_the_outputs(folder):
    md = executed(folder, TWO_CELLS.replace("Some text.", "It is {eq}`eq-a`.\n\n$$ a $$ (eq-a)"))
    spoil(md, add_output("stream", name="stdout", text="21\n"))
    text, book = tool.read_text(md), tool.joined(md)
    assert [cell.source for cell in book.cells] == [cell.source for cell in text.cells]
    assert tool.code_cells(book)[1].outputs[0].text == "21\n"
    assert book.metadata.regkit.seconds == 7
    reader = nbformat.read(md.with_suffix(".ipynb"), as_version=4)
    assert reader.cells[2].source == "It is (1.1).\n\n$$\na \\tag{1.1}\n$$"


def test_a_notebook_with_an_address_says_it_in_the_button_the_links_and_the_setup_cell(
    folder, monkeypatch
):
    monkeypatch.setattr(tool.setup_cell, "source", lambda *given: f"x = 20  # {given}")
    links = "[it](01_small.md), [here](../book/notation.md)"
    md = executed(folder, TWO_CELLS.replace("Some text.", links))
    assert tool.reader_version(md).cells[1].source == f"x = 20  # {('01', '', {'cpu': 7})}"

    place = "https://github.com/ada/regkit"
    notebook = tool.reader_version(md, Address(place, "v1"), branch="colab")
    top, setup, text, _ = (cell.source for cell in notebook.cells)
    colab = f"{tool.COLAB}/ada/regkit/blob/colab/notebooks/01_small.ipynb"
    assert top.startswith("[![Open in Colab](") and top.endswith(f"]({colab})\n\n# A title")
    assert setup == f"x = 20  # {('01', f'git+{place}@v1', {'cpu': 7})}"
    file, page = f"{place}/blob/colab/notebooks/01_small.ipynb", f"{place}/blob/v1/book/notation.md"
    assert text == f"[it]({file}), [here]({page})"

    elsewhere = tool.reader_version(md, Address("https://git.example.org/ada/regkit", "main"))
    assert elsewhere.cells[0].source == "# A title"  # Colab opens nothing from there
    assert elsewhere.cells[2].source == "[it](01_small.ipynb), [here](../book/notation.md)"
    assert "git.example.org" in elsewhere.cells[1].source


@pytest.mark.slow
def test_execution_writes_a_pair_in_order_and_text_edits_keep_it(folder):
    error = "\n```{code-cell} ipython3\n:tags: [raises-exception]\n\n1 / 0\n```\n"
    wrong = STUB.replace("...", "1 / 0")  # a stub is not run
    md = write(folder, TWO_CELLS + wrong + error)
    assert tool.update(md, "cpu") is True
    assert tool.check_pair(md) == []
    notebook = nbformat.read(md.with_suffix(".ipynb"), as_version=4)
    outputs = [cell.outputs for cell in tool.executed_cells(notebook)]
    assert outputs[1][0].text == "21\n"
    assert outputs[2][0].traceback == ["ZeroDivisionError: division by zero"]

    md.write_text(md.read_text().replace("Some text.", "Other text."))
    assert tool.update(md, "cpu") is False  # nothing ran
    assert tool.check_pair(md) == []
    kept = nbformat.read(md.with_suffix(".ipynb"), as_version=4)
    assert [cell.outputs for cell in tool.executed_cells(kept)] == outputs
    assert kept.metadata.regkit == notebook.metadata.regkit

    md.write_text(md.read_text().replace("x + 1", "x + 2"))
    assert tool.update(md, "cpu") is True
    notebook = nbformat.read(md.with_suffix(".ipynb"), as_version=4)
    assert tool.code_cells(notebook)[1].outputs[0].text == "22\n"


def test_failing_cell_stops_the_execution_and_writes_nothing(folder, capsys):
    md = write(folder, TWO_CELLS.replace("x + 1", "y + 1"))
    with pytest.raises(tool.typer.Exit), tool.cell_errors_as_text(md):
        tool.update(md, "cpu")
    assert "name 'y' is not defined" in capsys.readouterr().err
    assert not md.with_suffix(".ipynb").exists()


@pytest.mark.slow
def test_progress_bars_are_dropped_and_other_widgets_kept(folder):
    cell = "\n```{{code-cell}} ipython3\n{}\n```\n"
    bar = cell.format("from tqdm.auto import tqdm\n\nfor _ in tqdm(range(3)):\n    pass")
    slider = cell.format("import ipywidgets\n\nipywidgets.IntSlider(7)")

    md = write(folder, TWO_CELLS + bar)
    tool.update(md, "cpu")
    notebook = nbformat.read(md.with_suffix(".ipynb"), as_version=4)
    assert notebook.cells[-1].outputs == [] and "widgets" not in notebook.metadata

    md = write(folder, TWO_CELLS + bar + slider)
    tool.update(md, "cpu")
    notebook = nbformat.read(md.with_suffix(".ipynb"), as_version=4)
    shown = notebook.cells[-1].outputs[0].data[tool.WIDGET]["model_id"]
    state = notebook.metadata.widgets[tool.WIDGETS].state
    assert state[shown].state.value == 7
    kinds = {model.model_name for model in state.values()}
    assert kinds == {"IntSliderModel", "LayoutModel", "SliderStyleModel"}


def test_a_class_gets_every_part_but_the_lecturers():
    written = tool.student_contents()
    assert "notebooks/08_deep_unfolding" in written and "book/reference/index" in written
    assert "teaching" not in written and "teaching" in (tool.ROOT / "_toc.yml").read_text()
