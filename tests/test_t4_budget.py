"""Budget "gpu" fits a T4: what is counted, and results/t4_budget.json against today's recipes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regkit.cli import NOT_FINISHED
from regkit.training import recipes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "studies"))
import gpu_first  # noqa: E402
import t4_budget  # noqa: E402

HELD = json.loads((ROOT / "results" / "t4_budget.json").read_text())["rows"]
BY_NAME = {(row["part"], row["name"], row["workers"]): row for row in HELD}


def test_operations_and_what_they_move_are_counted():
    """A sum of two images reads two and writes one; a view moves nothing."""
    a, b = torch.zeros(3, 5), torch.zeros(3, 5)
    with t4_budget.Traffic() as traffic:
        (a + b).reshape(5, 3)[0].detach()
    assert (traffic.operations, traffic.bytes) == (1, 3 * 15 * 4)


def test_the_arithmetic_of_a_convolution_is_that_of_its_definition():
    """One recipe with known layers: vxm1_2d in half a dozen lines.

    Two operations a weight and output pixel; the way back costs as much for the input and for the
    weights. The first convolution needs none for its input.
    """
    recipe = recipes.get("vxm1_2d", "smoke", weights={"similarity": 1.0}, similarity="mse")
    counted = t4_budget.arithmetic(recipe)
    expected, first = 0, True
    model = t4_budget.models.create("vxm1", 2)

    def count(module, inputs, output):
        nonlocal expected, first
        each = 2 * module.weight[0].numel() * output.numel()
        expected += each * (2 if first else 3)
        first = False

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    image = torch.zeros(recipe.batch, 1, *recipe.shape)
    model(image, image)
    assert 1e9 * counted["gigaflop"] == pytest.approx(expected, rel=1e-6)


def test_a_step_on_a_t4_is_arithmetic_traffic_and_operations():
    row = {"gigaflop": 2430.0, "gigabytes_moved": 211.2, "operations": 100_000}
    assert t4_budget.step_seconds(row) == pytest.approx(1 + 1 + 1)


def test_the_slower_of_computing_and_making_pairs_counts():
    recipe = recipes.get("vxm_2d", "gpu", steps=60, batch=10)
    row = {"gigaflop": 2430.0, "gigabytes_moved": 0.0, "operations": 0}
    for speed, minutes in ((100.0, 1.0), (5.0, 2.0)):
        found = t4_budget.training(recipe, row, {"vxm_2d": speed})
        assert found["minutes"] == pytest.approx(minutes)
        assert found["minutes_making_pairs"] == pytest.approx(10 / speed)
        assert found["teraflop"] == pytest.approx(60 * 2.43)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_fits_fifteen_minutes_and_the_memory_of_a_t4(name):
    row, recipe = BY_NAME["recipe", name, None], recipes.get(name, "gpu")
    assert row["identity"] == recipes.identity(recipe)  # else: python studies/t4_budget.py
    assert row["count"] == t4_budget.step_of(recipe)
    count = BY_NAME["count", row["count"], None]
    assert recipe.steps * t4_budget.step_seconds(count) / 60 <= 15
    assert row["minutes"] <= 15 and row["minutes_making_pairs"] <= 15
    assert row["gigabytes_kept"] <= t4_budget.MEMORY


@pytest.mark.parametrize("name", t4_budget.chapters())
def test_every_chapter_fits_fifteen_minutes(name):
    row, plans = BY_NAME["chapter", name, None], t4_budget.chapters()[name]
    assert row["trains"] == [recipes.identity(plan) for plan in plans]
    assert row["minutes"] <= 15


def test_chapter_08_fits_with_its_section_in_3d():
    assert sum(BY_NAME["chapter", name, None]["minutes"] for name in ("08", "08 in 3D")) <= 15


def recounted(name):
    recipe = recipes.get(name, "gpu")
    counted, row = t4_budget.arithmetic(recipe), BY_NAME["count", t4_budget.step_of(recipe), None]
    assert counted["gigaflop"] == pytest.approx(row["gigaflop"], rel=1e-3)
    for key in ("gigabytes_moved", "operations", "gigabytes_kept"):  # of PyTorch's own choice
        assert counted[key] == pytest.approx(row[key], rel=0.1)


def test_a_count_is_made_again():
    recounted("vxm1_2d")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vxm_diff_2d", "rigid_resnet34_2d_wide", "fcn_3d", "rcn_2d", "unfolding_3d",
             "any_contrast_2d", "dense_unet_eca_2d"],
)  # fmt: skip
def test_other_counts_are_made_again(name):
    recounted(name)


def test_pairs_were_made_with_no_one_and_two_workers():
    for name in t4_budget.MEASURED:
        assert all(BY_NAME["pairs", name, n]["pairs_per_second"] > 0 for n in (0, 1, 2))
        assert BY_NAME["pairs", name, 0]["cpu_milliseconds"] > 0


# --- the first ten minutes on a GPU -----------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Commands that take as long as they are said to; returns the time, and what was run."""
    now, ran, lasts = [0.0], [], {}

    def run(words, cwd, timeout):
        name = next((key for key in lasts if key in " ".join(words)), "")
        seconds, code = lasts.get(name, (10.0, 0))
        ran.append((words[1:], timeout))
        now[0] += min(seconds, timeout)
        if seconds > timeout:
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, code)

    monkeypatch.setattr(gpu_first.subprocess, "run", run)
    monkeypatch.setattr(gpu_first.time, "monotonic", lambda: now[0])
    return now, ran, lasts


def test_ten_minutes_are_ten_minutes(clock, tmp_path, capsys):
    """The bench never ends; a cost fails; the contest gets what is left."""
    now, ran, lasts = clock
    lasts |= {"--model vxm": (30.0, 1), "bench.py": (1e9, 0), "benchmark": (250.0, NOT_FINISHED)}
    gpu_first.main(device="cpu", results=tmp_path, runs=tmp_path / "runs")
    assert now[0] <= 600
    words = [" ".join(command) for command, _ in ran]
    assert ["cost.py" in w for w in words] == [True, True, False, False]
    assert ran[2][1] == 240.0
    assert words[3].endswith(f"--minutes {10 - (30 + 10 + 240) / 60 - 0.5:.2f}")
    said = capsys.readouterr().err
    assert "cost of vxm: failed" in said and "bench: stopped: its time is up" in said
    assert "contest: not finished" in said


def test_a_part_alone_and_a_part_that_does_not_exist(clock, tmp_path):
    _, ran, _ = clock
    gpu_first.main(device="cpu", only=["bench"], results=tmp_path, runs=tmp_path / "runs")
    assert len(ran) == 1
    with pytest.raises(ValueError, match="only holds 'training', expected some of cost of vxm"):
        gpu_first.main(device="cpu", only=["training"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_sentence():
    with pytest.raises(ValueError, match="PyTorch sees no such GPU"):
        gpu_first.main()


@pytest.mark.slow
def test_the_contest_runs_in_the_time_that_is_left(tmp_path):
    """On the CPU, at budget smoke: with a file, or with a state to go on from."""
    gpu_first.main(
        minutes=2, device="cpu", budget="smoke", only=["contest"], results=tmp_path,
        runs=tmp_path / "runs",
    )  # fmt: skip
    assert [*tmp_path.glob("*_smoke.json"), *tmp_path.glob("runs/*")]


def test_the_table_of_chapters_is_that_of_the_file():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for row in (row for row in HELD if row["part"] == "chapter"):
        numbers = [row[key] for key in ("minutes_computing", "minutes_making_pairs", "minutes")]
        cells = [row["name"], f"{row['teraflop']:.0f}", *(f"{number:.1f}" for number in numbers)]
        assert f"\n|{'|'.join(cells)}|\n" in text
