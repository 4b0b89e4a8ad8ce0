"""What notebooks share, the sliders, and the worked solutions of the chapters."""

import io
import math
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

from regkit import book, plot, widgets
from regkit.book import notebook
from regkit.book.exercises import EXERCISES
from regkit.training import recipes

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.fixture(autouse=True)
def untouched_style():
    with pyplot.rc_context():
        yield


def test_setup_makes_the_run_repeatable():
    book.setup()
    first = torch.rand(3), np.random.rand(3)  # noqa: NPY002 (it is this generator that is set)
    book.setup()
    assert torch.equal(first[0], torch.rand(3))
    assert np.array_equal(first[1], np.random.rand(3))  # noqa: NPY002
    assert pyplot.rcParams["image.origin"] == "lower"


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(notebook, "device_name", lambda device: "Some CPU")
    monkeypatch.setattr(notebook, "free_memory", lambda device: 11_800_000_000)


@pytest.mark.parametrize(
    ("chapter", "seconds", "line"),
    [
        (None, None, "Some CPU, 12 GB of memory free; budget cpu."),
        ("08", None, "Some CPU, 12 GB of memory free; budget cpu."),
        ("08", {"cpu": 519, "gpu": 60}, "budget cpu; chapter 08 takes about 9 min."),
        ("01", {"cpu": 23}, "budget cpu; chapter 01 takes about 1 min."),
        ("08", {"gpu": 60}, "how long chapter 08 takes at this budget is not measured yet."),
    ],
)
def test_setup_says_where_it_runs_and_for_how_long(
    chapter, seconds, line, monkeypatch, capsys, no_gpu
):
    monkeypatch.setenv("REGKIT_BUDGET", "cpu")
    book.setup(chapter, seconds=seconds)
    said = capsys.readouterr().out
    assert said.endswith(f"{line}\n") and said.count("\n") == 1


def test_the_budget_gpu_without_a_gpu_becomes_cpu_and_says_so(monkeypatch, capsys, no_gpu):
    monkeypatch.setenv("REGKIT_BUDGET", "gpu")
    book.setup("08", seconds={"cpu": 519, "gpu": 60})
    sentence, line = capsys.readouterr().out.splitlines()
    assert sentence == (
        "The budget gpu needs a GPU, and PyTorch sees none here: the budget is cpu instead."
    )
    assert line.endswith("budget cpu; chapter 08 takes about 9 min.")
    assert recipes.get("vxm_diff_2d") == recipes.get("vxm_diff_2d", "cpu")


def test_the_budget_gpu_stays_where_there_is_a_gpu(monkeypatch, capsys, no_gpu):
    monkeypatch.setenv("REGKIT_BUDGET", "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    book.setup("08", seconds={"cpu": 519, "gpu": 840})
    assert capsys.readouterr().out.endswith("budget gpu; chapter 08 takes about 14 min.\n")


def test_colab_without_a_drive_says_that_nothing_is_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(notebook, "DRIVE", tmp_path / "MyDrive")
    for colab, mounted, lines in ((True, False, 2), (True, True, 1), (False, True, 1)):
        if colab:
            monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
        else:
            monkeypatch.delitem(sys.modules, "google.colab")
        if mounted:
            notebook.DRIVE.mkdir(exist_ok=True)
        book.setup()
        said = capsys.readouterr().out.splitlines()
        assert len(said) == lines and ("drive.mount" in said[-1]) == (lines == 2)


# -------------------------------------------------------------------------- the folder of a run


@pytest.fixture
def places(monkeypatch, tmp_path):
    """A working folder two levels below a checkout; no REGKIT_HOME; a Drive that is not there."""
    monkeypatch.delenv("REGKIT_HOME", raising=False)
    monkeypatch.setattr(notebook, "DRIVE", tmp_path / "drive" / "MyDrive")
    (tmp_path / "checkout" / "regkit" / "book").mkdir(parents=True)
    (tmp_path / "checkout" / "notebooks" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "checkout" / "notebooks" / "mine")
    return tmp_path


def test_runs_are_kept_on_the_drive_else_at_home_else_in_the_checkout(places, monkeypatch):
    assert book.run_folder("08") == places / "checkout" / "runs" / "08"
    monkeypatch.chdir(places)  # outside of any checkout
    assert book.run_folder("08") == places / "runs" / "08"
    monkeypatch.setenv("REGKIT_HOME", str(places / "home"))
    assert book.run_folder("08") == places / "home" / "runs" / "08"
    notebook.DRIVE.mkdir(parents=True)  # mounted
    assert book.run_folder("08") == notebook.DRIVE / "regkit" / "runs" / "08"
    assert sorted(p.name for p in places.iterdir()) == ["checkout", "drive"]  # nothing was made


def test_a_run_goes_on_with_the_same_settings_and_starts_anew_with_others(places, monkeypatch):
    monkeypatch.setenv("REGKIT_BUDGET", "smoke")
    recipe = recipes.get("unfolding_2d")
    folder = book.run_folder("08", recipe)
    assert folder.parent == book.run_folder("08")
    assert folder.name.startswith("unfolding_2d_smoke_")
    assert book.run_folder("08", recipes.get("unfolding_2d")) == folder
    others = [
        book.run_folder("08", recipes.get("unfolding_2d", **changed))
        for changed in ({"steps": 5}, {"seed": 1}, {"weights": {"similarity": 1.0}})
    ]
    others.append(book.run_folder("08", replace(recipe, name="other")))
    others.append(book.run_folder("03", recipe))
    monkeypatch.setenv("REGKIT_BUDGET", "cpu")
    others.append(book.run_folder("08", recipe))
    assert len({folder, *others}) == 7


@pytest.mark.parametrize("chapter", ["", "../08", "a/b", "/08", "08/", "."])
def test_a_chapter_that_is_no_name_of_a_folder_is_refused(chapter):
    with pytest.raises(ValueError, match="chapter is .*, expected a number such as '08'"):
        book.run_folder(chapter)


def test_a_notebook_figure_is_a_small_picture_of_the_same_colours():
    fig, (ax,) = plot.panels(1)
    plot.image(torch.rand(1, 1, 40, 40), ax)
    picture = Image.open(io.BytesIO(book.small_png(fig)))
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.05)
    original = Image.open(buffer).convert("RGB")
    assert picture.mode == "P" and picture.size == original.size
    gap = np.asarray(picture.convert("RGB"), int) - np.asarray(original, int)
    assert abs(gap).mean() < 1


@pytest.mark.parametrize(
    ("budget", "value", "ok"),
    [
        ("cpu", 0.75, True),
        ("cpu", 0.70, True),
        ("cpu", 0.5, False),
        ("smoke", 0.5, True),
        ("smoke", 1.5, False),
        ("gpu", 0.95, True),
        ("gpu", 0.75, False),
        ("cpu", math.nan, False),
    ],
)
def test_a_number_has_to_lie_in_the_band_of_its_budget(monkeypatch, budget, value, ok):
    monkeypatch.setenv("REGKIT_BUDGET", budget)
    bands = {"cpu": (0.7, 0.8), "smoke": (0, 1), "every": (0.9, 1)}
    if ok:
        book.expect(value, **bands)
    else:
        with pytest.raises(AssertionError, match=rf"value is .* at budget {budget}"):
            book.expect(value, **bands)


def test_expect_takes_tensors_and_arrays(monkeypatch):
    monkeypatch.setenv("REGKIT_BUDGET", "cpu")
    book.expect(torch.tensor([0.1, 0.9], requires_grad=True), every=(0, 1))
    book.expect(np.array(3), cpu=(3, 3))
    with pytest.raises(AssertionError):
        book.expect(torch.tensor([0.1, 1.1]), every=(0, 1))
    with pytest.raises(AssertionError):
        book.expect([])


def test_without_a_band_a_number_still_has_to_be_finite(monkeypatch):
    monkeypatch.setenv("REGKIT_BUDGET", "smoke")
    book.expect(1e9, cpu=(0, 1))
    with pytest.raises(AssertionError, match="finite"):
        book.expect(math.inf, cpu=(0, 1))


def test_a_budget_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="'big'"):
        book.expect(1, big=(0, 1))


def test_glue_hands_on_plain_numbers(monkeypatch):
    glued = {}
    fake = types.SimpleNamespace(glue=lambda name, value, display: glued.update({name: value}))
    monkeypatch.setitem(sys.modules, "myst_nb", fake)
    book.glue("a", torch.tensor([0.5], requires_grad=True))
    book.glue("b", np.float64(2))
    book.glue("c", "text")
    assert glued == {"a": 0.5, "b": 2.0, "c": "text"}
    assert type(glued["a"]) is float and type(glued["b"]) is float


def test_glue_is_silent_without_the_book_tools(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "myst_nb", None)
    book.glue("a", 1)
    assert capsys.readouterr().out == ""


def test_the_cost_is_counted_from_the_start_of_the_notebook():
    book.setup()
    seconds, memory = book.cost()
    assert 0 <= seconds < 60
    assert 0.01 < memory < 1000


def test_a_sample_that_is_not_here_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("REGKIT_DATA", str(tmp_path))
    monkeypatch.setenv("REGKIT_BUDGET", "smoke")
    assert book.sample("lung_ct", lambda: pytest.fail("asked the network")) is None
    assert capsys.readouterr().out.count("lung_ct") == 2

    def no_network():
        raise FileNotFoundError("sample 'lung_ct' is not in the cache")

    monkeypatch.setenv("REGKIT_BUDGET", "cpu")
    assert book.sample("lung_ct", no_network) is None
    assert book.sample("lung_ct", lambda: "scan") == "scan"


# ---------------------------------------------------------------------------------- sliders


def test_a_slider_moves_through_pictures_inside_the_browser():
    drawn = []

    def draw(value):
        drawn.append(value)
        return plot.panels(1, size=0.5)[0]

    box = widgets.frames(draw, [0.0, 0.5, 1.0], label="amplitude", start=1)
    _, slider, stack = box.children
    assert drawn == [0.0, 0.5, 1.0]
    assert (slider.min, slider.max, slider.value) == (0, 2, 1)
    assert stack.selected_index == 1 and len(stack.children) == 3
    page = stack.children[2].value
    assert 'alt="amplitude 1"' in page and 'src="data:image/webp;base64,' in page


def test_the_slider_and_the_pictures_are_linked_without_python(monkeypatch):
    import ipywidgets

    linked = []
    monkeypatch.setattr(ipywidgets, "jslink", lambda *ends: linked.append(ends))
    _, slider, stack = widgets.frames(lambda v: plot.panels(1, size=0.5)[0], [0, 1]).children
    assert linked == [((slider, "value"), (stack, "selected_index"))]


def test_a_stored_notebook_keeps_the_link_and_drops_what_no_view_needs():
    import nbformat

    from notebooks import WIDGET, WIDGETS, drop_progress_bars

    ends = {"source": ["IPY_MODEL_slider", "value"], "target": ["IPY_MODEL_tab", "selected_index"]}
    state = {
        "box": {"model_name": "VBoxModel", "state": {"children": ["IPY_MODEL_slider"]}},
        "slider": {"model_name": "IntSliderModel", "state": {"layout": "IPY_MODEL_tab"}},
        "tab": {"model_name": "TabModel", "state": {}},
        "link": {"model_name": "LinkModel", "state": ends},
        "other": {"model_name": "LinkModel", "state": {"source": ["IPY_MODEL_gone", "value"]}},
        "bar": {"model_name": "FloatProgressModel", "state": {}},
    }
    cell = nbformat.v4.new_code_cell("1")
    cell.outputs = [nbformat.v4.new_output("display_data", {WIDGET: {"model_id": "box"}})]
    notebook = nbformat.v4.new_notebook(
        cells=[cell], metadata={"widgets": {WIDGETS: {"state": state}}}
    )
    drop_progress_bars(notebook)
    assert set(notebook.metadata.widgets[WIDGETS].state) == {"box", "slider", "tab", "link"}


def test_the_explorer_and_its_figure_on_paper_show_the_same():
    image, disp = torch.rand(1, 1, 20, 24), torch.rand(1, 2, 20, 24)
    _, slider, stack = widgets.explore(image, disp, [0, 2]).children
    assert slider.max == 1 and len(stack.children) == 2
    fig = widgets.amplitude(image, disp, [0, 2])
    moved = np.asarray(fig.axes[0].images[0].get_array())
    assert np.allclose(moved, image[0, 0].T, atol=1e-5)  # nothing moves at 0
    assert [ax.get_title() for ax in fig.axes[:2]] == ["0 × disp", "2 × disp"]


@pytest.mark.slow
def test_turning_by_hand_finds_the_motion_that_was_made():
    i, k = torch.meshgrid(torch.arange(40.0) - 22, torch.arange(48.0) - 20, indexing="ij")
    fixed = torch.exp(-((i / 3) ** 2) - (k / 9) ** 2)[None, None]  # a bar, off the centre
    moving = widgets.moved_by(fixed, -6)  # a turn by 6 degrees undoes it
    ready, live = widgets.turn(moving, fixed, [-6, 0, 6]).children
    _, slider, stack = ready.children
    assert slider.value == 1 and len(stack.children) == 3  # starts where nothing is turned
    assert 'alt="degrees 6"' in stack.children[2].value

    assert "regkit-live" in live._dom_classes  # which the book's style sheet hides
    *sliders, picture = live.children

    def correlation(degrees):
        sliders[0].value = degrees
        text = re.search(r'alt="(.*?)"', picture.value)[1]
        assert text.startswith(f"{degrees} degrees, 0 and 0 voxels: r ")
        return float(re.search(r"r ([\d.]+),", text)[1])

    assert correlation(6) > 0.995 > correlation(0) > correlation(-6)
    sliders[1].value = 4.5
    assert "-6 degrees, 4.5 and 0 voxels" in picture.value


def test_live_sliders_are_hidden_on_the_pages_of_the_book():
    css = (NOTEBOOKS.parent / "book" / "_static" / "regkit.css").read_text(encoding="utf-8")
    assert re.search(r"\.bd-article \.regkit-live \{\s*display: none;", css)


# --------------------------------------------------------------------------------- solutions


def solutions() -> list:
    """The code of each worked solution, which copies into a cell and runs, with its exercise."""
    found = []
    for path in sorted(NOTEBOOKS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"`{4}\{solution\} (\S+)\n(.*?)\n`{4}", text, re.DOTALL)
        for number, (label, body) in enumerate(blocks, 1):
            exercise = f"{path.stem[:2]}-{number}"
            for code in re.findall(r"```python\n(.*?)```", body, re.DOTALL):
                found.append(pytest.param(exercise, code, id=label))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("exercise", "code"), solutions())
def test_a_solution_runs_as_it_is_printed_and_its_answer_is_right(exercise, code, monkeypatch):
    monkeypatch.setenv("REGKIT_BUDGET", "smoke")  # a solution that trains takes four steps
    verdicts = []
    check = book.check
    monkeypatch.setattr(book, "check", lambda *given: verdicts.append(check(*given)))
    exec(compile(code, "solution", "exec"), {})
    if exercise in EXERCISES:
        assert [(v.exercise, v.state) for v in verdicts] == [(exercise, "right")], verdicts
