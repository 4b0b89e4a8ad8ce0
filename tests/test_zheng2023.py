"""`regkit benchmark zheng2023-table1`: its rows, its interval, and slices of real children."""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from regkit import cli, io, models
from regkit.classical import align
from regkit.data import Subject, population
from regkit.data import prepared as sets
from regkit.models import Registration
from regkit.papers import running
from regkit.papers.comparing import compare, interval
from regkit.papers.running import Settings, recipe_of
from regkit.papers.tables import TABLES
from regkit.training import recipes
from regkit.training.data import evaluation_pairs
from regkit.training.evaluation import evaluate, summary
from regkit.transform import resample

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data_scripts"))
import layout  # noqa: E402
import open_slices  # noqa: E402

TABLE = TABLES["zheng2023-table1"]
QUICK = {"budget": "smoke", "progress": False, "device": "cpu", "steps": 1}


def fails(*arguments, **options):
    raise AssertionError("nothing is to be made again")


def rows_of(file):
    return {row["label"]: row for row in json.loads(file.read_text())["rows"]}


# ------------------------------------------------------------------------------------ as data

PAPER = {  # table 1, five test images: Dice, and its standard deviation over labels
    "Affine only": (
        [0.5254, 0.5019, 0.5059, 0.5637, 0.5608],
        [0.2752, 0.2767, 0.2459, 0.2355, 0.2840],
    ),
    "VoxelMorph-1": (
        [0.7314, 0.7240, 0.7343, 0.7570, 0.7387],
        [0.2308, 0.2291, 0.2647, 0.2260, 0.2097],
    ),
    "VoxelMorph-2": (
        [0.7642, 0.7544, 0.7563, 0.7651, 0.7664],
        [0.2071, 0.2116, 0.2321, 0.2246, 0.1918],
    ),
    "Dense U-Net, ECA": (
        [0.7938, 0.7815, 0.7834, 0.8173, 0.8055],
        [0.1464, 0.2041, 0.1681, 0.1548, 0.1868],
    ),
}


def test_numbers_are_those_of_the_paper():
    """The line of means is that of its five lines: also the deviation is a mean of theirs."""
    lines = {line["label"]: line for line in compare(TABLE, [], "oasis")}
    for label, (dice, deviations) in PAPER.items():
        line = lines.pop(label)
        assert line["paper_dice"] == pytest.approx(statistics.fmean(dice), abs=6e-5)
        printed = line["paper_dice_sd_labels"]
        assert printed == pytest.approx(statistics.fmean(deviations), abs=6e-5)
        assert line["paper_folding_percent"] is line["paper_seconds"] is None
    assert all(line["paper_dice"] is None for line in lines.values())
    ours = [row for row in TABLE.rows if row.label in lines]
    assert len(ours) == 4 and all(row.note for row in ours)


@pytest.mark.parametrize("budget", recipes.BUDGETS)
def test_rows_differ_in_their_network_alone(budget):
    for name in ("zheng2023_2d", "zheng2023_ptbp"):
        shared = recipes.get(name, budget)
        plans = [
            recipe_of(row, shared, budget, alike=True)
            for row in TABLE.rows
            if row.method in models.names()
        ]
        assert len({recipes.identity(plan) for plan in plans}) == 7
        for plan in plans:
            assert replace(plan, model=shared.model, options=shared.options, steps=0) == replace(
                shared, steps=0
            )
        longer = [plan for plan in plans if plan.steps != shared.steps]
        assert [(plan.model, plan.steps) for plan in longer] == [("vxm2", 4 * shared.steps)]
        ours = next(plan for plan in plans if plan.model == "dense_unet_eca")
        assert ours == shared
    smooth = recipe_of(TABLE.rows[1], shared, budget, lambda2=0.5, alike=True).weights
    assert smooth == {"similarity": 1.0, "diffusion": 0.5}


def test_tables_that_have_no_such_protocol_are_left_out(tmp_path):
    everything = [name for name in TABLES if name != "tan2023-fundus"]  # which needs a prepared set
    assert running.tables_for("smoke") == everything
    others = [name for name in everything if name != "zheng2023-table1"]
    flat = (  # of 2D alone
        "zhao2019-cascades", "peng2026-pyramids", "tan2023-supervised", "hu2024-single",
        "hu2024-multi",
    )  # fmt: skip
    assert running.tables_for("gpu", 3) == [name for name in others if name not in flat]
    assert running.tables_for("gpu", protocol="pairs") == others
    with pytest.raises(ValueError, match="ndim is 3 .*expected of this table 2 with 'atlas'"):
        running.run(Settings("zheng2023-table1", **QUICK, ndim=3, out=tmp_path / "1.json"))
    with pytest.raises(ValueError, match="budget is 'huge'"):
        running.tables_for("huge")


# ------------------------------------------------------------------------------------ interval


def test_the_interval_of_a_normal_mean():
    """One seed: mean -+ 1.96 sd / sqrt(n), the plug-in deviation."""
    draw = np.random.default_rng(1).normal(0.02, 0.05, (1, 100))
    reach = 1.959964 * draw.std() / 10
    assert interval(draw) == pytest.approx((draw.mean() - reach, draw.mean() + reach), abs=5e-4)
    low, high = interval(draw, level=0.5)
    assert (high - low) / 2 == pytest.approx(0.674490 * draw.std() / 10, rel=0.05)


def test_seeds_and_pairs_both_count():
    """A seed's effect plus a pair's: the variance of the mean is the sum of both."""
    draw = np.random.default_rng(2)
    seeds, pairs = draw.normal(0, 0.04, (40, 1)), draw.normal(0, 0.1, (1, 80))
    reach = 1.959964 * np.sqrt(seeds.var() / 40 + pairs.var() / 80)
    low, high = interval(seeds + pairs)
    assert (high - low) / 2 == pytest.approx(reach, rel=0.05)
    assert (low + high) / 2 == pytest.approx((seeds + pairs).mean(), abs=1e-3)
    only = 1.959964 * pairs.std() / np.sqrt(80)  # pairs alone would say less
    assert reach > 1.1 * only


def test_the_interval_covers_as_often_as_it_says():
    """Of 200 samples of 30 normal numbers about 95 % contain the true mean."""
    draw = np.random.default_rng(3)
    found = [interval(draw.normal(1, 1, (1, 30)), resamples=500) for _ in range(200)]
    assert 0.89 <= np.mean([low < 1 < high for low, high in found]) <= 0.98


def test_a_row_has_the_interval_of_its_difference_from_vxm2():
    def row(label, *seeds):
        return {
            "label": label,
            "state": "done",
            "dice": float(np.mean(seeds)),
            "dice_pairs": np.mean(seeds, 0).tolist(),
            **({"dice_pairs_seeds": [list(s) for s in seeds]} if len(seeds) > 1 else {}),
        }

    middle = row("VoxelMorph-2", [0.70, 0.80, 0.6], [0.72, 0.82, 0.62])
    lines = {
        line["label"]: line
        for line in compare(
            TABLE,
            [
                middle,
                row(
                    "Affine only", [0.5, 0.6, 0.4]
                ),  # always 0.2 less than seed 0, 0.22 than seed 1
                row("VoxelMorph-1", [0.69, 0.79, 0.59], [0.71, 0.81, 0.61]),
                row("without ECA", [0.6, 0.7], [0.6, 0.7]),  # on other pairs
                row("without both", *[[0.6, 0.7, 0.8]] * 3),  # of other seeds
            ],
            "oasis",
        )
    }
    assert lines["VoxelMorph-1"]["difference_interval"] == [-0.01, -0.01]
    assert lines["Affine only"]["difference_interval"] == [-0.22, -0.2]
    for label in ("VoxelMorph-2", "without ECA", "without both", "Dense U-Net, ECA"):
        assert lines[label]["difference_interval"] is None


def test_a_row_may_name_the_one_that_it_is_compared_with():
    """VoxelMorph-2 with the time of the dense U-Net stands beside that, not beside itself."""

    def row(label, dice):
        return {"label": label, "state": "done", "dice": dice, "dice_pairs": [dice, dice]}

    longer = "VoxelMorph-2, 4 times the updates"
    found = compare(
        TABLE,
        [row("VoxelMorph-2", 0.7), row("Dense U-Net, ECA", 0.8), row(longer, 0.75)],
        "oasis",
    )
    lines = {line["label"]: line for line in found}
    assert lines[longer]["difference"] == -0.05
    assert lines[longer]["difference_interval"] == [-0.05, -0.05]
    assert lines["Dense U-Net, ECA"]["difference"] == 0.1


# ------------------------------------------------------------------------------------ runs

ROWS = ["Affine only", "VoxelMorph-2", "VoxelMorph-1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three rows on the population, two seeds."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("zheng")
    settings = {"pairs": 3, "seeds": (0, 1), "rows": ROWS, "runs": folder / "runs"}
    file = folder / "1.json"
    return running.run(Settings("zheng2023-table1", **QUICK, **settings, out=file)), folder


@pytest.mark.slow
def test_a_row_says_what_was_reached(made):
    held = json.loads(made[0].read_text())
    assert (held["paper"], held["paper_set"]) == ("Zheng et al. 2023", "oasis")
    assert held["data"] == held["tested_on"] == "population"
    rows = rows_of(made[0])
    assert [rows[label]["state"] for label in ROWS] == ["done"] * 3
    for label in ROWS:
        row = rows[label]
        assert row["hd95"] > 0 and row["folding_percent"] >= 0 and row["seconds"] > 0
        assert 0 < row["dice_sd_labels"] < 0.5 and len(row["dice_per_structure"]) > 10
    for label in ROWS[1:]:
        row = rows[label]
        seeds = np.array(row["dice_pairs_seeds"])
        assert seeds.shape == (2, 3)
        assert row["dice"] == pytest.approx(seeds.mean(), abs=2e-5)
        assert row["seeds"] == [0, 1] and row["parameters"] > 0 and row["training_seconds"] > 0
    assert len(list((made[1] / "runs").glob("*_2d_*/last.safetensors"))) == 4  # two seeds each
    for label in (ROWS[0], ROWS[2]):
        low, high = rows[label]["difference_interval"]
        assert low <= rows[label]["difference"] <= high
    assert rows["VoxelMorph-2"]["default"] and rows["without both"]["state"] == "not run"


@pytest.mark.slow
def test_it_is_not_run_again(made, monkeypatch):
    monkeypatch.setattr(running, "train", fails)
    monkeypatch.setattr(running, "judge", fails)
    before = made[0].read_text()
    runs = made[1] / "runs"
    settings = {"pairs": 3, "seeds": (0, 1), "rows": ROWS, "runs": runs, "out": made[0]}
    running.run(Settings("zheng2023-table1", **QUICK, **settings))
    assert made[0].read_text() == before


@pytest.mark.slow
def test_affine_only_is_no_displacement_after_alignment(made):
    """The moving subjects resampled by the matrix of `align`, then judged as they lie."""
    recipe = recipes.get("zheng2023_2d", "smoke")
    pairs, _ = evaluation_pairs(recipe, "test", 3)
    placed = []
    for moving, fixed in pairs:
        images = (io.Image(one.image[None], one.affine) for one in (moving, fixed))
        matrix = align(*images)
        image = resample(moving.image[None], moving.grid, fixed.grid, "linear", matrix)[0]
        labels = resample(moving.labels[None], moving.grid, fixed.grid, "nearest", matrix)[0]
        nobody = torch.empty(0)
        placed.append((Subject(moving.name, image, labels, fixed.affine, nobody), fixed))

    def stay(moving, fixed):
        return Registration(moving, torch.zeros(1, 2, *recipe.shape))

    numbers = evaluate(stay, placed, distances=True)
    row = rows_of(made[0])["Affine only"]
    assert row["dice"] == pytest.approx(summary(numbers)["dice"], abs=1e-5)
    assert row["dice"] > row["dice_before"] and row["folding_percent"] == 0
    assert row["hd95"] == pytest.approx(summary(numbers)["hd95"], rel=1e-3)
    deviations = [np.nanstd(list(one["dice_per_label"].values())) for one in numbers]
    assert row["dice_sd_labels"] == pytest.approx(np.mean(deviations), abs=1e-5)


def test_the_command_prints_the_interval(made):
    options = ["--budget", "smoke", "--steps", "1", "--pairs", "3", "--device", "cpu"]
    seeds = ["--seed", "0", "--seed", "1"]
    rows = [word for label in ROWS for word in ("--row", label)]
    places = ["--runs", str(made[1] / "runs"), "--out", str(made[0])]
    words = ["benchmark", "zheng2023-table1", *options, *seeds, *rows, *places]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    (line,) = (x for x in result.stdout.splitlines() if x.startswith("VoxelMorph-1"))
    low, high = rows_of(made[0])["VoxelMorph-1"]["difference_interval"]
    assert f"{low:+.4f} {high:+.4f}" in line


# ------------------------------------------------------------------------------ prepared sets


def write_set(folder, name, parts):
    """Slices of synthetic people in the layout of data_scripts/open_slices.py."""
    people = dict(zip(parts, population(len(parts), (40, 48), seed=5), strict=True))
    description = {
        "name": name,
        "settings": {},
        "contrasts": ["t1"],
        "structures": {"1": "a", "3": "b"},
        "complete": True,
        "subjects": [{"name": n, "split": p, "labels": True} for n, p in parts.items()],
    }

    def images(one):
        subject = people[one]
        return {
            "t1": io.Image(subject.image[None], subject.affine),
            "labels": io.Image(subject.labels[None], subject.affine),
        }

    layout.build(folder, description, images)
    return folder


@pytest.mark.slow
def test_real_slices_are_learned_from_and_another_set_has_a_file_of_its_own(tmp_path, monkeypatch):
    parts = {"f": "fixed", "a": "train", "b": "train", "c": "test", "d": "test"}
    data = write_set(tmp_path / "data", "ptbp_slices", parts)
    pair = write_set(tmp_path / "pair", "oasis_slices", {"f": "fixed", "m": "test"})
    settings = {**QUICK, "rows": ["VoxelMorph-1", "VoxelMorph-2"], "runs": tmp_path / "runs"}
    monkeypatch.chdir(tmp_path)
    file = running.run(Settings("zheng2023-table1", **settings, data=data))
    assert file == Path("results/zheng2023-table1_ptbp_smoke.json")
    first = rows_of(file)["VoxelMorph-1"]
    assert first["recipe"]["data"] == "ptbp_slices" and len(first["dice_pairs"]) == 2
    assert first["difference_interval"] is not None
    monkeypatch.setattr(running, "train", fails)  # what was learned is there
    other = running.run(Settings("zheng2023-table1", **settings, data=data, test=pair))
    assert other == Path("results/zheng2023-table1_ptbp_on_oasis_slices_smoke.json")
    held = json.loads(other.read_text())
    assert (held["data"], held["tested_on"]) == ("ptbp_slices", "oasis_slices")
    second = rows_of(other)["VoxelMorph-1"]
    assert second["recipe"] == first["recipe"] and second["key"] != first["key"]
    assert len(second["dice_pairs"]) == 1 and second["difference_interval"] is None
    assert set(second["dice_per_structure"]) == {"a", "b"}
    with pytest.raises(FileNotFoundError, match=r"no dataset\.json"):
        running.run(Settings("zheng2023-table1", **settings, test=tmp_path))


# ------------------------------------------------------------------------------ real children


def test_no_child_is_on_both_sides():
    names = open_slices.names()
    assert len(names) == 25 and len(open_slices.TEST) == 7 and open_slices.FIXED in names
    drawn = layout.split(names, 0, {"train": 18, "test": 7})
    assert tuple(name for name, part in drawn.items() if part == "test") == open_slices.TEST
    description, _ = open_slices.children(names, 2)
    children = {}
    for entry in description["subjects"]:
        children.setdefault(entry["split"], set()).add(entry["name"].split("_")[0])
    assert children["test"] == set(open_slices.TEST) and children["fixed"] == {open_slices.FIXED}
    learned_from = children["train"] | children["fixed"]
    assert len(learned_from) == 18 and not learned_from & children["test"]
    assert learned_from | children["test"] == set(names)


@pytest.mark.slow
@pytest.mark.real
def test_slices_of_real_children_lie_on_one_grid(sample, tmp_path):
    sample("ptbp_brain")
    two = ["child6", open_slices.FIXED]  # one to test on
    description, prepare = open_slices.children(two, 4)
    layout.build(tmp_path / "set", description, prepare)
    recipe = recipes.get("zheng2023_ptbp", "smoke")
    (pair,), labels = evaluation_pairs(recipe, "test", None, tmp_path / "set")
    moving, fixed = pair
    assert (moving.name, fixed.name) == ("child6_slice9", "child3_slice9")
    assert labels == [1, 2, 3, 4] and moving.spacing == fixed.spacing == (4, 4)
    assert np.allclose(moving.affine, fixed.affine)
    for scan in pair:
        assert scan.image.shape == (1, 40, 48) and 0 <= scan.image.min() < scan.image.max() <= 1
        brain = scan.labels > 0
        assert scan.image[~brain].mean() < 0.02 < scan.image[brain].mean()  # no skull
        edges = (brain[:, 0], brain[:, -1], brain[:, :, 0], brain[:, :, -1])
        assert not any(edge.any() for edge in edges)  # nothing is cut off
    brains = [scan.labels[0] > 0 for scan in pair]
    assert (brains[0] & brains[1]).sum() > 0.95 * (brains[0] | brains[1]).sum()  # aligned
    # the place in space is that of the slab: its voxel at the centre of ours has the same label
    slab = {one.name: one for one in open_slices.samples.load_ptbp_slabs()}["child6"]
    x, y, z, _ = np.linalg.inv(slab.affine) @ moving.affine @ [20, 24, 0, 1]
    assert z == pytest.approx(9) and x == round(x) and y == round(y)
    assert moving.labels[0, 20, 24] == slab.labels[0, int(x), int(y), 9]


@pytest.mark.real
def test_the_slices_of_oasis(sample, tmp_path):
    sample("oasis_3d")
    description, prepare = open_slices.brains(4)
    layout.build(tmp_path / "set", description, prepare)
    recipe = replace(recipes.get("zheng2023_ptbp", "smoke"), data="oasis_slices")
    (pair,), labels = evaluation_pairs(recipe, "test", None, tmp_path / "set")
    assert len(labels) == 19 and [s.name for s in pair] == ["vxm_subject_slice100", "atlas_2d"]
    assert np.allclose(pair[0].affine, pair[1].affine)
    assert len(sets.structures(tmp_path / "set")) == 19


def test_a_wrong_sample_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="sample is 'lung_ct', expected one of ptbp_brain, oasis"):
        open_slices.main("lung_ct", tmp_path, 1)
    with pytest.raises(ValueError, match="spacing is 3, expected 1, 2 or 4"):
        open_slices.main("oasis_3d", tmp_path, 3)
