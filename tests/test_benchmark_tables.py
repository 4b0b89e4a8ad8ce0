"""`regkit benchmark`: what the paper prints, which training a row is, and runs that go on."""

import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import regkit_book
import scipy.stats
import torch
from typer.testing import CliRunner

import regkit.device
from regkit import classical, cli, io, models
from regkit.data import LABELS, population, true_displacement
from regkit.models import Registration
from regkit.papers import running
from regkit.papers.comparing import compare, orders, tau_interval
from regkit.papers.running import Settings, judge, recipe_of
from regkit.papers.tables import TABLES
from regkit.spatial import warp
from regkit.training import data as training_data
from regkit.training import loop, objective, recipes, tasks

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data_scripts"))
import layout  # noqa: E402

SUN = {name: table for name, table in TABLES.items() if table.recipes == ("sun2025",)}
RESULTS = sorted((ROOT / "results").glob("*-*_cpu.json"))
QUICK = {"budget": "smoke", "ndim": 2, "progress": False, "device": "cpu"}


def fails(*arguments, **options):
    raise AssertionError("nothing is to be trained here")


def rows_of(file):
    return {row["label"]: row for row in json.loads(file.read_text())["rows"]}


# ------------------------------------------------------------------------------------ as data


@pytest.mark.parametrize(
    ("table", "label", "column", "printed"),
    [
        ("1", "LDDMM", "lpba40", (67.3, 0, 89.24)),
        ("1", "VoxelMorph", "lpba40", (68.3, 0.03, 0.45)),
        ("1", "H-SGANet", "oasis", (81.4, 0.02, 0.26)),
        ("1", "Unfolding", "oasis", (79.9, 0.01, 0.37)),
        ("2", "without transformer", "lpba40", (68.1, 0.019, 0.36)),
        ("2", "without skips", "lpba40", (67.7, 0.005, 0.54)),
        ("2", "plain convolutions as denoiser", "lpba40", (68.9, 0.016, 0.50)),
        ("3", "U-Net", "oasis", (78.3, 0.015, 0.44)),
        ("4", "lambda1 = 0.8, lambda3 = 0.1", "lpba40", (69.5, 0.010, None)),
        ("4", "lambda1 = 0.8, lambda3 = 10.0", "lpba40", (68.7, 0.007, None)),
        ("5", "MLP 256", "lpba40", (70.3, 0.003, 0.50)),
        ("6", "K = 5", "lpba40", (68.3, 0.003, 0.56)),
    ],
)
def test_numbers_are_those_of_the_paper(table, label, column, printed):
    (row,) = (r for r in TABLES[f"sun2025-table{table}"].rows if r.label == label)
    assert getattr(row, column) == printed


def test_every_table_but_the_fourth_prints_the_same_for_the_default():
    """Section 3.4.3 prints 69.5 for what the other tables give as 70.1."""
    printed = {
        name: next(row.lpba40.dice for row in table.rows if row.default)
        for name, table in SUN.items()
        if name != "sun2025-lambda2"
    }
    assert printed.pop("sun2025-table4") == 69.5
    assert set(printed.values()) == {70.1} and len(printed) == 5
    assert [len(table.rows) for table in TABLES.values()] == [
        8, 4, 2, 7, 6, 3, 25, 8, 16, 9, 3, 3, 2, 2
    ]  # fmt: skip
    for table in TABLES.values():
        assert len({row.label for row in table.rows}) == len(table.rows)


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_default_rows_are_one_training_and_all_others_are_trainings_of_their_own(ndim):
    shared = recipes.get(f"sun2025_{ndim}d", "cpu")
    default, others = set(), []
    for name, table in SUN.items():
        for row in table.rows:
            if row.method not in models.names():
                continue
            recipe = recipe_of(row, shared, "cpu")
            assert recipe.steps == shared.steps and recipe.seed == shared.seed
            identity = recipes.identity(recipe)
            if row.default:
                default.add(identity)
                paper = replace(recipe, weights=recipe.weights | {"diffusion_u": 1.0})
                # but for the weight of smoothness it is what the recipe of the paper says
                assert recipes.identity(paper) == recipes.identity(shared)
            elif name != "sun2025-lambda2":
                others.append(identity)
    assert len(default) == 1
    assert len(set(others)) == len(others) and not default & set(others)


def test_a_row_asks_for_the_weights_and_options_that_it_names():
    shared = recipes.get("sun2025_2d", "cpu")
    rows = {row.label: row for table in TABLES.values() for row in table.rows}
    weights = recipe_of(rows["lambda1 = 0.2, lambda3 = 0.1"], shared, "cpu", lambda2=0.5).weights
    assert weights == {
        "similarity_u": 0.2, "similarity": 0.8, "diffusion_u": 0.5, "consistency": 0.1
    }  # fmt: skip
    assert recipe_of(rows["K = 5"], shared).options == {"stages": 5}
    rival = recipe_of(rows["VoxelMorph"], shared, "cpu")
    own = recipes.get("vxm_2d", "cpu")
    assert (rival.lr, rival.warmup) == (own.lr, own.warmup) and rival.similarity == "mse"
    assert set(rival.weights) == {"similarity", "diffusion"}
    asked = recipe_of(rows["vxm, lambda2 = 0.003"], shared, "cpu", lambda2=0.5)
    assert asked.weights["diffusion"] == 0.003


def test_every_row_names_a_method_and_rows_that_there_are():
    for table in TABLES.values():
        labels = [row.label for row in table.rows]
        assert all(row.against in ("", *labels) and row.against != row.label for row in table.rows)
        if table.paper != "Sun et al. 2025":  # which has rows that wait for their model
            assert all(running.exists(row.method) for row in table.rows)


def test_rows_may_have_an_objective_of_their_own():
    shared = recipes.get("supervised_2d", "cpu")
    rows = {row.label: row for row in TABLES["tan2023-supervised"].rows}
    plans = {name: recipe_of(row, shared, "cpu", alike=True) for name, row in rows.items()}
    assert plans["similarity"].weights == {"similarity": 1.0, "diffusion": 0.1}
    assert plans["known displacement"].weights == {"endpoint": 1.0}
    assert plans["both"].weights == {"similarity": 1.0, "diffusion": 0.1, "endpoint": 0.1}
    assert all(replace(plan, weights=shared.weights) == shared for plan in plans.values())


@pytest.mark.slow
@pytest.mark.parametrize("budget", recipes.BUDGETS)
def test_every_cascade_is_compared_on_the_same_terms(budget):
    """Smoothness costs n times as much for n cascades; what happens after training needs none."""
    shared = recipes.get("cascades_2d", budget)
    assert shared.amplitude == 2
    smooth, trainings, widths = {}, {}, set()
    for row in TABLES["zhao2019-cascades"].rows:
        if row.method not in models.names():
            continue
        plan = recipe_of(row, shared, budget, alike=True)
        assert replace(plan, model="", options={}, weights={}, steps=0) == replace(
            shared, model="", options={}, weights={}, steps=0
        )
        assert plan.steps == shared.steps * (3 if "3 times the updates" in row.label else 1)
        network = models.create(plan.model, 2, **plan.options)
        if row.label in ("VTN alone", "1 cascade"):  # the same VTN at every budget
            vtn = network if row.method == "vtn" else network.networks[0]
            widths.add(models.parameter_count(vtn))
        smooth[row.label] = plan.weights["diffusion"]
        trainings[row.label] = recipes.identity(plan)
    assert smooth["1 cascade"] == smooth["VTN alone"] == smooth["VoxelMorph alone"] == 0.1
    assert smooth["2 cascades"] == 0.2 and smooth["3 cascades"] == 0.3
    assert trainings["3 cascades, each applied 2 times"] == trainings["3 cascades"]
    assert trainings["1 cascade, applied 3 times"] == trainings["1 cascade"]
    assert len(set(trainings.values())) == 8 and len(widths) == 1


def test_only_networks_with_levels_learn_on_every_level():
    shared = recipes.get("pyramids_2d", "cpu")
    rows = {row.label: row for row in TABLES["peng2026-pyramids"].rows}
    plans = {
        name: recipe_of(row, shared, "cpu", alike=True)
        for name, row in rows.items()
        if row.method in models.names()
    }
    single = {name for name, plan in plans.items() if plan.levels is None}
    assert single == {"VoxelMorph", "without loss on every level"}
    assert len({recipes.identity(plan) for plan in plans.values()}) == 8
    for plan in plans.values():
        assert replace(plan, model="", options={}, levels=None) == replace(
            shared, model="", options={}, levels=None
        )


def test_a_table_may_be_measured_at_another_amplitude(tmp_path, monkeypatch):
    """The training is the same; the test subjects lie elsewhere, and the file says so."""
    settings = {**QUICK, "steps": 1, "rows": ("VoxelMorph",), "runs": tmp_path / "runs"}
    monkeypatch.chdir(tmp_path)
    near = running.run(Settings("peng2026-pyramids", **settings, amplitude=0.0))
    monkeypatch.setattr(running, "train", fails)
    far = running.run(Settings("peng2026-pyramids", **settings, amplitude=3.0))
    assert near.name == "peng2026-pyramids_2d_at_0_smoke.json"
    assert far.name == "peng2026-pyramids_2d_at_3_smoke.json"
    before = [rows_of(file)["VoxelMorph"]["dice_before"] for file in (near, far)]
    assert before[0] == 1 and before[1] < 0.6
    assert json.loads(far.read_text())["amplitude"] == 3
    with pytest.raises(ValueError, match="amplitude is -1"):
        running.run(Settings("peng2026-pyramids", **settings, amplitude=-1.0))


def test_an_option_at_test_needs_no_second_training(tmp_path, monkeypatch):
    shared = recipes.get("cascades_2d", "smoke", steps=1, validate_every=1)
    rows = {row.label: row for row in TABLES["zhao2019-cascades"].rows}
    one, twice = rows["1 cascade"], rows["1 cascade, applied 2 times"]
    plan = recipe_of(one, shared, "smoke", alike=True)
    device = torch.device("cpu")
    once = running.trained(plan, tmp_path, device, progress=False)
    monkeypatch.setattr(running, "train", fails)
    again = running.trained(plan, tmp_path, device, None, False, twice.at_test)
    assert (once.model.repeats, again.model.repeats) == (1, 2)
    for a, b in zip(once.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    keys = {running.row_key(row, [plan], shared, "test", 2, device) for row in (one, twice)}
    assert len(keys) == 2


def test_names_and_new_fields_do_not_change_what_a_training_is():
    recipe = recipes.get("sun2025_2d", "cpu")
    assert recipes.identity(replace(recipe, name="other")) == recipes.identity(recipe)
    for change in ({"seed": 1}, {"atlas": False}, {"options": {"stages": 2}}, {"data": "lpba40"}):
        assert recipes.identity(replace(recipe, **change)) != recipes.identity(recipe)
    older = {k: v for k, v in recipes.plan(recipe).items() if k != "data"}
    assert recipes.complete(older) == recipes.plan(recipe)


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_what_was_measured_is_still_what_a_row_asks_for(file):
    """Else `regkit benchmark` would train all of it again: rows are known by hashes of recipes."""
    held = json.loads(file.read_text())
    rows = {row.label: row for row in TABLES.get(held.get("table"), TABLES["sun2025-table1"]).rows}
    device = torch.device("cpu")
    for line in held["rows"]:
        if "recipe" not in line:
            continue
        plan = recipes.Recipe(**recipes.complete(line["recipe"]))
        plans = [replace(plan, seed=seed) for seed in line["seeds"]]
        on = {key: held[name] for key, name in (("data", "tested_on"), ("amplitude",) * 2)
              if name in held}  # fmt: skip
        pairs = {len(line["dice_pairs"]), None}  # all of a prepared set
        keys = {
            running.row_key(
                rows[line["label"]], plans, replace(plan, **on), held["split"], n, device
            )
            for n in pairs
        }
        assert line["key"] in keys, line["label"]


def words_of(file):
    """Of the command that made a results file."""
    return shlex.split(json.loads(file.read_text())["made"]["command"])[2:]


ON_POPULATION = [file for file in RESULTS if not {"--data", "--test"} & set(words_of(file))]


@pytest.mark.parametrize("file", ON_POPULATION, ids=lambda file: file.stem)
def test_the_command_of_a_results_file_asks_for_the_rows_that_it_holds(file, monkeypatch):
    """From the words of the command and today's tables to the key that the file has."""
    settings = []

    def stop(asked):
        settings.append(asked)
        raise ValueError("nothing is run here.")

    monkeypatch.setattr(running, "run", stop)
    call(*words_of(file), "--device", "cpu", code=2)
    monkeypatch.setattr(regkit.device, "_bfloat16_is_faster", lambda: True)  # where it was made
    comparison = running.Comparison.planned(settings[0])
    stored = {line["label"]: line["key"] for line in json.loads(file.read_text())["rows"]
              if "key" in line}  # fmt: skip
    rows = [row for row in comparison.table.rows if row.label in stored]
    assert {row.label: comparison.key(row, comparison.plans(row)) for row in rows} == stored


def test_a_row_is_run_again_when_anything_that_it_depends_on_is_another():
    protocol, cpu = recipes.get("cascades_2d", "smoke"), torch.device("cpu")
    rows = {row.label: row for row in TABLES["zhao2019-cascades"].rows}
    row = rows["1 cascade"]
    plan = recipe_of(row, protocol, "smoke", alike=True)
    keys = [
        running.row_key(row, [plan], protocol, "test", 2, cpu),
        running.row_key(rows["1 cascade, applied 2 times"], [plan], protocol, "test", 2, cpu),
        running.row_key(row, [replace(plan, seed=1)], protocol, "test", 2, cpu),
        running.row_key(row, [plan, replace(plan, seed=1)], protocol, "test", 2, cpu),
        running.row_key(row, [plan], replace(protocol, data="ixi"), "test", 2, cpu),
        running.row_key(row, [plan], replace(protocol, atlas=True), "test", 2, cpu),
        running.row_key(row, [plan], replace(protocol, contrast="t2"), "test", 2, cpu),
        running.row_key(row, [plan], replace(protocol, amplitude=3.0), "test", 2, cpu),
        running.row_key(row, [plan], protocol, "validation", 2, cpu),
        running.row_key(row, [plan], protocol, "test", 3, cpu),
        running.row_key(row, [plan], protocol, "test", None, cpu),
        running.row_key(row, [plan], protocol, "test", 2, torch.device("cuda")),
        running.row_key(rows["SyN (ANTs)"], [], protocol, "test", 2, cpu),
        running.row_key(rows["Affine only"], [], protocol, "test", 2, cpu),
        running.row_key(rows["SyN (ANTs)"], [], replace(protocol, shape=(8, 8)), "test", 2, cpu),
    ]
    assert len(set(keys)) == len(keys)


def test_rows_that_an_error_kept_out_are_those_that_were_asked_for():
    failed = {"state": "left out: no."}
    results = {"rows": [{"label": "U-Net", **failed}, {"label": "DnCNN", **failed}]}
    assert running.left_out("sun2025-table3", results) == ["U-Net", "DnCNN"]
    assert running.left_out("sun2025-table3", results, ["1"]) == ["U-Net"]
    assert running.left_out("sun2025-table3", results, ["dncnn"]) == ["DnCNN"]
    assert running.left_out("sun2025-table3", results, ["unfolding"]) == ["U-Net", "DnCNN"]
    results["rows"][1]["state"] = "not yet"
    assert running.left_out("sun2025-table3", results) == ["U-Net"]


# ------------------------------------------------------------------------------------ numbers


def test_the_truth_closes_the_gap_and_stages_are_measured():
    subjects = population(3, (48, 64), seed=2)
    pairs = [(subjects[0], subjects[1]), (subjects[2], subjects[1])]
    truths = iter([true_displacement(*pair) for pair in pairs])

    def know_it_all(moving, fixed):
        disp = next(truths)
        return Registration(warp(moving, disp), disp, stages=((0 * disp, disp),))

    found = judge(know_it_all, pairs, None, torch.device("cpu"))
    assert found["gap_closed"] == pytest.approx(100) and found["endpoint_error"] == 0
    assert found["dice"] == pytest.approx(sum(found["dice_pairs"]) / 2)
    (stage,) = found["stages"]
    assert stage["dice_u"] == pytest.approx(found["dice_before"])
    assert stage["dice_v"] == pytest.approx(found["dice"])
    assert stage["folding_percent_u"] == 0 and stage["difference"] > 0.5
    assert stage["folding_percent_v"] == pytest.approx(found["folding_percent"])
    assert set(found["dice_per_structure"]) <= set(LABELS.values())
    assert all(0 < value <= 1 for value in found["dice_per_structure"].values())


def test_orders_against_the_paper():
    table = TABLES["sun2025-table6"]  # 69.2, 70.1 (default), 68.3

    def rows(*dice):
        return [
            {"label": row.label, "state": "done", "dice": value}
            for row, value in zip(table.rows, dice, strict=True)
        ]

    same = compare(table, rows(0.80, 0.90, 0.70))
    assert [line["same_order"] for line in same] == ["yes", None, "yes"]
    assert same[0]["difference"] == -0.1 and same[0]["paper_difference"] == -0.009
    assert same[0]["paper_dice"] == 0.692 and same[2]["paper_folding_percent"] == 0.003
    nothing_known = {"kendall_tau_interval": None}  # of the test pairs
    assert orders(same) == {"kendall_tau": 1.0, "rows": 3, "held": 2, "of": 2} | nothing_known
    other = compare(table, rows(0.80, 0.75, 0.90))
    assert [line["same_order"] for line in other] == ["no", None, "no"]
    assert orders(other)["kendall_tau"] == -1.0
    some = compare(table, rows(0.80, 0.90, 0.70)[:2])
    assert [line["state"] for line in some] == ["done", "done", "not run"]
    assert orders(some) == {"kendall_tau": 1.0, "rows": 2, "held": 1, "of": 1} | nothing_known
    assert orders(compare(table, []))["kendall_tau"] is None
    # OASIS where the paper has it
    first = {row["label"]: row for row in compare(TABLES["sun2025-table1"], [], "oasis")}
    assert first["H-SGANet"]["paper_dice"] == 0.814
    assert compare(table, [], "oasis")[0]["paper_set"] == "lpba40"


def test_ties_are_on_nobodys_side():
    """Kendall's tau-b of two concordant pairs and a tie: 2 / sqrt(2 * 3)."""
    table = TABLES["sun2025-table6"]  # 69.2, 70.1 (default), 68.3
    rows = [
        {"label": row.label, "state": "done", "dice": dice}
        for row, dice in zip(table.rows, (0.9, 0.9, 0.7), strict=True)
    ]
    lines = compare(table, rows)
    assert [line["same_order"] for line in lines] == ["no", None, "yes"]
    found = orders(lines)
    assert (found["kendall_tau"], found["rows"]) == (0.816, 3)
    assert (found["held"], found["of"]) == (1, 2)


def test_the_interval_of_tau_is_that_of_scipy_over_pairs():
    """Noise of the size of the differences, one seed: SciPy's bootstrap of paired samples."""
    printed = [0.692, 0.701, 0.683, 0.689]
    draw = np.random.default_rng(3)
    dice = 0.7 + np.arange(4)[:, None] * 0.02 + 0.05 * draw.standard_normal((4, 9))
    theirs = scipy.stats.bootstrap(
        list(dice),
        lambda *rows: scipy.stats.kendalltau(printed, [row.mean() for row in rows]).statistic,
        n_resamples=2000, paired=True, vectorized=False, method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    ours = tau_interval(printed, [row[None] for row in dice])
    assert ours == pytest.approx(tuple(theirs))
    assert ours[0] < ours[1]


def test_the_interval_of_tau_is_a_point_where_every_pair_says_the_same():
    level = np.linspace(0.6, 0.9, 9)
    rows = [level[None], np.stack([level + 0.1] * 3), np.stack([level + 0.2] * 3)]
    assert tau_interval([0.1, 0.2, 0.3], rows) == pytest.approx((1, 1))
    assert tau_interval([0.3, 0.2, 0.1], rows) == pytest.approx((-1, -1))


def test_the_interval_of_tau_holds_the_spread_over_seeds():
    """Of two rows the first is ahead at one seed of three and behind at two, at every pair."""
    ahead = np.array([[0.2], [-0.1], [-0.1]]) + np.full((1, 9), 0.7)
    level = np.full((3, 9), 0.7)
    assert tau_interval([0.2, 0.1], [ahead, level]) == pytest.approx((-1, 1))


def test_tau_has_no_interval_where_rows_do_not_belong_together():
    nine, eight = np.full((1, 9), 0.7), np.full((1, 8), 0.7)
    three, two = np.full((3, 9), 0.7), np.full((2, 9), 0.7)
    for rows in ([nine], [nine, eight], [three, two], [nine[:, :1]] * 2, [nine, np.nan * nine]):
        assert tau_interval([0.1, 0.2][: len(rows)], rows) is None
    assert tau_interval([0.1, 0.2], [nine, nine]) is None  # level


# ------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two rows of the third table, once: its file and the folder of its trainings."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("benchmark")
    options = {**QUICK, "steps": 1, "pairs": 2}
    file = running.run(
        Settings("sun2025-table3", **options, runs=folder / "runs", out=folder / "3.json")
    )
    return file, folder / "runs"


@pytest.fixture
def again(made, tmp_path):
    """A copy of both, and how to run any table with the same settings."""
    file, runs = tmp_path / "3.json", tmp_path / "runs"
    shutil.copy(made[0], file)
    shutil.copytree(made[1], runs)

    def run(name="sun2025-table3", out=file, **changes):
        settings = {"steps": 1, "pairs": 2, "runs": runs, "out": out}
        return running.run(Settings(name, **{**QUICK, **settings, **changes}))

    return run


def test_a_row_says_what_was_reached_and_how(made):
    held = json.loads(made[0].read_text())
    assert held["paper_set"] == "lpba40" and held["split"] == "test"
    unet, dncnn = held["rows"]
    assert (unet["label"], unet["paper_dice"]) == ("U-Net", 0.685)
    for row in (unet, dncnn):
        assert row["state"] == "done" and row["updates"] == 1 and row["seeds"] == [0]
        assert 0 < row["dice_before"] < row["dice_ceiling"] <= 1 and 0 < row["dice"] < 1
        assert row["hd95"] > 0 and row["seconds"] > 0 and row["training_seconds"] > 0
        assert 0.1 < row["memory_gb"] < 64 and row["threads"] == 1
        assert len(row["stages"]) == 3 and len(row["dice_pairs"]) == 2
        assert row["recipe"]["atlas"] is True and row["recipe"]["steps"] == 1
        plan = recipes.Recipe(**row["recipe"])
        model = models.create(plan.model, plan.ndim, **plan.options)
        assert row["parameters"] == models.parameter_count(model)
    assert dncnn["default"] and dncnn["same_order"] is None
    assert unet["same_order"] in ("yes", "no")
    assert len(list(made[1].glob("unfolding_2d_*/last.safetensors"))) == 2


def test_the_book_can_show_a_table(made):
    held = json.loads(made[0].read_text())["rows"]
    columns = ["row = {label}", "paper = {paper_dice:percent}", "ours = {dice:percent}"]
    head, unet, dncnn = regkit_book.table(held, [*columns, "same order? = {same_order}"])
    assert head == ["row", "paper", "ours", "same order?"]
    assert unet[:2] == ["U-Net", "68.5\N{NO-BREAK SPACE}%"] and unet[3] in ("yes", "no")
    assert dncnn[1] == "70.1\N{NO-BREAK SPACE}%" and dncnn[3] == "–"


def test_what_is_there_is_not_run_again(again, monkeypatch):
    monkeypatch.setattr(running, "train", fails)
    monkeypatch.setattr(running, "judge", fails)
    before = again().read_text()
    assert again().read_text() == before


def test_a_row_that_is_missing_is_measured_and_its_training_is_shared(again, tmp_path, monkeypatch):
    """Also by another table: the default row of all of them is one training."""
    monkeypatch.setattr(running, "train", fails)
    file = tmp_path / "3.json"
    held = json.loads(file.read_text())
    whole = rows_of(file)
    file.write_text(json.dumps({**held, "rows": held["rows"][:1]}))
    again()
    measured = rows_of(file)
    changing = {"seconds", "memory_gb", "load", "commit", "date"}
    for label, row in whole.items():
        for key in row.keys() - changing:
            assert measured[label][key] == row[key], key
    other = again("sun2025-table6", out=tmp_path / "6.json", rows=["K = 3"])
    assert rows_of(other)["K = 3"]["dice"] == whole["DnCNN"]["dice"]
    assert [row["state"] for row in rows_of(other).values()] == ["not run", "done", "not run"]
    with pytest.raises(AssertionError, match="nothing is to be trained"):
        again("sun2025-table6", out=tmp_path / "6.json", rows=["1"])


def test_other_pairs_are_measured_and_not_trained(again, monkeypatch):
    monkeypatch.setattr(running, "train", fails)
    assert all(len(row["dice_pairs"]) == 3 for row in rows_of(again(pairs=3)).values())


def test_a_training_that_was_killed_goes_on(tmp_path, monkeypatch):
    real, calls = objective.objective, []

    def stops(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    settings = {**QUICK, "rows": ["VoxelMorph"], "pairs": 2, "runs": tmp_path / "runs"}
    monkeypatch.setattr(loop, "objective", stops)
    with pytest.raises(KeyboardInterrupt):
        running.run(Settings("sun2025-table1", **settings, out=tmp_path / "1.json"))
    assert not (tmp_path / "1.json").exists()
    file = running.run(Settings("sun2025-table1", **settings, out=tmp_path / "1.json"))
    assert len(calls) == 6  # smoke has four steps and saves after the second
    assert rows_of(file)["VoxelMorph"]["state"] == "done"


def test_a_table_is_made_in_pieces_that_end_in_the_same_file(tmp_path, monkeypatch):
    """A clock that advances by a minute at each validation: 1.5 minutes have room for one."""
    changed = {**QUICK, "rows": ["VoxelMorph", "VoxelMorph, half resolution"], "pairs": 2}
    settings = Settings("sun2025-table1", **changed)
    whole = running.run(replace(settings, runs=tmp_path / "w", out=tmp_path / "whole.json"))
    now, real = [0.0], tasks.SubjectsTask.validate

    def a_minute(*arguments):
        now[0] += 60.0
        return real(*arguments)

    monkeypatch.setattr(tasks.SubjectsTask, "validate", a_minute)
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    pieces = replace(settings, runs=tmp_path / "p", out=tmp_path / "pieces.json")
    said = []
    for _ in range(8):
        try:
            made = running.run(replace(pieces, until=now[0] + 90.0))
            break
        except running.NotFinished as state:
            said.append(str(state))
    assert said[0] == "vxm has made 2 of 4 updates" and len(said) >= 2
    ours, expected = rows_of(made), rows_of(whole)
    assert ours.keys() == expected.keys()
    for label, row in ours.items():
        for field in ("state", "key", "dice", "dice_pairs", "updates", "recipe"):
            assert row.get(field) == expected[label].get(field)
        if row["state"] == "done":
            assert row["training_seconds"] == 120.0  # two sittings, two validations


@pytest.mark.parametrize(
    ("capability", "taken"), [((7, 5), "fp16"), ((8, 0), "bf16"), (None, "bf16"), (None, "no")]
)
def test_a_table_learns_in_the_precision_of_its_device(capability, taken, monkeypatch):
    """On a GPU the training takes it, so that another GPU may go on with it."""
    recipe = recipes.get("sun2025_2d", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(regkit.device, "_bfloat16_is_faster", lambda: taken == "bf16")
    device = torch.device("cpu" if capability is None else "cuda")
    planned = running._at_precision(recipe, device)
    assert planned.precision == (taken if capability is None else "auto")
    assert recipes.settled(planned, device).precision == taken


def test_the_command_says_that_it_is_not_finished(tmp_path):
    typed = ["benchmark", "sun2025-table1", "--budget", "smoke", "--ndim", "2", "--pairs", "2"]
    typed += ["--row", "VoxelMorph", "--out", str(tmp_path / "r.json"), "--device", "cpu"]
    typed += ["--runs", str(tmp_path / "runs")]
    stopped = CliRunner().invoke(cli.app, [*typed, "--minutes", "1e-7"])
    assert stopped.exit_code == cli.NOT_FINISHED == 75
    assert "regkit: not finished: " in stopped.stderr and "goes on." in stopped.stderr
    refused = CliRunner().invoke(cli.app, [*typed, "--minutes", "0"])
    assert refused.exit_code == 2 and "minutes is 0.0, expected more than 0" in refused.stderr
    ended = CliRunner().invoke(cli.app, [*typed, "--minutes", "60", "--workers", "1"])
    assert ended.exit_code == 0 and "wrote" in ended.stdout


def test_the_command_trains_in_pieces(tmp_path):
    typed = ["train", "vxm_2d", "--budget", "smoke", "--out", str(tmp_path / "run")]
    typed += ["--device", "cpu", "--workers", "1"]
    stopped = CliRunner().invoke(cli.app, [*typed, "--minutes", "1e-7"])
    assert stopped.exit_code == cli.NOT_FINISHED
    assert "not finished: 2 of 4 updates are made; the same command with --resume goes on" in (
        stopped.stderr
    )
    ended = CliRunner().invoke(cli.app, [*typed, "--resume", "--minutes", "60"])
    assert ended.exit_code == 0 and "validation dice" in ended.stdout


def test_several_seeds_are_a_mean(again, made):
    row = rows_of(again(seeds=(0, 1), rows=["DnCNN"]))["DnCNN"]
    assert len(row["dice_seeds"]) == 2 and row["seeds"] == [0, 1]
    assert row["dice_seeds"][0] == rows_of(made[0])["DnCNN"]["dice"]
    assert row["dice"] == pytest.approx(sum(row["dice_seeds"]) / 2, rel=1e-4)


def test_a_method_runs_as_soon_as_it_exists(tmp_path, monkeypatch):
    settings = {
        **QUICK, "steps": 1, "pairs": 2, "runs": tmp_path / "runs", "out": tmp_path / "1.json"
    }  # fmt: skip
    chosen = {"rows": ["LDDMM", "transmorph"]}
    monkeypatch.delattr(classical, "lddmm", raising=False)
    missing = [name for name in ("lddmm", "transmorph") if not running.exists(name)]
    rows = rows_of(running.run(Settings("sun2025-table1", **settings, **chosen))) if missing else {}
    for row in rows.values():
        assert row["state"] == ("not yet" if row["method"] in missing else row["state"])

    def stay(moving, fixed, *, spacing, **options):
        assert moving.shape == fixed.shape == (1, 1, 48, 64)
        assert spacing == pytest.approx((176 / 48, 211.2 / 64)) and options == {}
        return classical.Deformation(torch.zeros(1, 2, *fixed.shape[2:]))

    monkeypatch.setattr(classical, "lddmm", stay, raising=False)
    monkeypatch.setitem(models._MODELS, "transmorph", models._MODELS["vxm1"])
    rows = rows_of(running.run(Settings("sun2025-table1", **settings, **chosen)))
    assert rows["LDDMM"]["state"] == rows["TransMorph"]["state"] == "done"
    assert rows["LDDMM"]["dice"] == rows["LDDMM"]["dice_before"]
    assert rows["LDDMM"]["gap_closed"] == rows["LDDMM"]["sd_log_jacobian"] == 0
    assert rows["TransMorph"]["recipe"]["model"] == "transmorph"
    assert rows["SyN"]["state"] == "not run"


def test_a_method_that_is_not_installed_or_diverges_leaves_its_row_out(tmp_path, monkeypatch):
    def absent(moving, fixed):
        raise ImportError("ANTs is not installed.")

    def diverges(*arguments, **options):
        raise ValueError("term 'similarity' is nan at step 1.")

    monkeypatch.setattr(classical.ants, "syn", absent)
    monkeypatch.setattr(running, "train", diverges)
    places = {"runs": tmp_path / "runs", "out": tmp_path / "1.json"}
    file = running.run(Settings("sun2025-table1", **QUICK, pairs=2, rows=["SyN", "vxm"], **places))
    states = {label: row["state"] for label, row in rows_of(file).items()}
    assert states["SyN"] == "left out: ANTs is not installed."
    assert states["VoxelMorph"] == "left out: term 'similarity' is nan at step 1."


# ------------------------------------------------------------------------------ prepared sets


@pytest.fixture(scope="module")
def prepared_set(tmp_path_factory):
    """Slices of nine synthetic people, as data_scripts/oasis.py --ndim 2 would write them."""
    folder = tmp_path_factory.mktemp("prepared") / "set"
    people = {s.name: s for s in population(9, (40, 48), seed=5)}
    parts = ["train"] * 5 + ["validation"] * 2 + ["test"] * 2

    def images(name):
        subject = people[name]
        return {
            "t1": io.Image(subject.image[None], subject.affine),
            "labels": io.Image(subject.labels[None], subject.affine),
        }

    description = {
        "name": "oasis_2d",
        "settings": {},
        "contrasts": ["t1"],
        "structures": {"1": "a", "3": "b"},
        "complete": True,
        "subjects": [
            {"name": name, "split": part, "labels": True} for name, part in zip(people, parts)
        ],
    }
    layout.build(folder, description, images)
    return folder


def test_a_table_runs_on_a_prepared_set(prepared_set, tmp_path):
    options = {"budget": "smoke", "device": "cpu", "progress": False, "steps": 1}
    places = {"data": prepared_set, "runs": tmp_path / "runs", "out": tmp_path / "1.json"}
    file = running.run(Settings("sun2025-table1", **options, rows=["VoxelMorph"], **places))
    held = json.loads(file.read_text())
    assert held["paper_set"] == "oasis"
    row = rows_of(file)["VoxelMorph"]
    assert row["paper_dice"] == 0.776 and len(row["dice_pairs"]) == 2
    assert set(row["dice_per_structure"]) == {"a", "b"}
    assert "gap_closed" not in row and row["recipe"]["data"] == "oasis_2d"
    assert str(prepared_set) not in file.read_text()


def test_the_subjects_of_a_prepared_set_are_those_of_its_splits(prepared_set):
    recipe = recipes.get("sun2025_oasis_2d", "smoke")
    pairs, labels = training_data.evaluation_pairs(recipe, "test", None, prepared_set)
    names = [f"population-5-{i:04}" for i in range(9)]
    assert [(a.name, b.name) for a, b in pairs] == [tuple(names[7:]), tuple(names[:6:-1])]
    assert labels == [1, 3]
    learn = training_data.subjects(recipe, "train", 3, prepared_set)
    assert [s.name for s in learn] == names[:3]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": "lpba40"}, "data holds the set 'oasis_2d', expected 'lpba40'"),
        ({"shape": (80, 96)}, r"data holds images of shape \(40, 48\), expected \(80, 96\)"),
        ({"data": "population"}, "expected a recipe of a prepared set"),
    ],
)
def test_a_protocol_asks_for_its_own_set_and_size(prepared_set, changes, sentence):
    """A table compares with a published one, so that another set or size is refused."""
    recipe = recipes.get("sun2025_oasis_2d", "smoke", **changes)
    with pytest.raises(ValueError, match=sentence):
        training_data.evaluation_pairs(recipe, "test", None, prepared_set)


def test_where_nobody_is_called_fixed_the_first_to_learn_from_is(prepared_set):
    recipe = recipes.get("zheng2023_oasis", "smoke")
    names = [f"population-5-{i:04}" for i in range(9)]
    (fixed,) = training_data.subjects(recipe, "fixed", 1, prepared_set)
    learn = training_data.subjects(recipe, "train", None, prepared_set)
    assert fixed.name == names[0] and [s.name for s in learn] == names[1:5]
    pairs, _ = training_data.evaluation_pairs(recipe, "test", None, prepared_set)
    assert [(a.name, b.name) for a, b in pairs] == [(names[i], names[0]) for i in (7, 8)]


def test_a_set_without_anyone_to_validate_with_lends_those_to_learn_from(prepared_set, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(prepared_set, folder)
    held = json.loads((folder / "dataset.json").read_text())
    for entry in held["subjects"]:
        entry["split"] = entry["split"].replace("validation", "fixed")
    held["name"] = "lpba40"
    (folder / "dataset.json").write_text(json.dumps(held))
    recipe = recipes.get("sun2025_oasis_2d", "smoke", data="lpba40", atlas=True)
    pairs, _ = training_data.evaluation_pairs(recipe, "validation", 2, folder)
    names = {moving.name for moving, _ in pairs}
    assert names == {s.name for s in training_data.subjects(recipe, "train", 2, folder)}
    assert {fixed.name for _, fixed in pairs} == {"population-5-0005"}


# ------------------------------------------------------------------------------ command line


def call(*arguments, code=0):
    result = CliRunner().invoke(cli.app, ["benchmark", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else " ".join(result.stderr.split())


def test_the_list_names_tables_and_rows():
    text = call("list")
    assert all(name in text for name in TABLES)
    for line in text.splitlines():
        if "LDDMM" in line or "VoxelMorph" in line:
            missing = not running.exists("lddmm") and "LDDMM" in line
            assert line.endswith("not yet") == missing


def test_the_command_prints_the_table(made, again, tmp_path):
    options = ["--budget", "smoke", "--ndim", 2, "--steps", 1, "--pairs", 2, "--device", "cpu"]
    text = call(
        "sun2025-table3", *options, "--runs", tmp_path / "runs", "--out", tmp_path / "3.json"
    )
    (line,) = (line for line in text.splitlines() if line.startswith("DnCNN"))
    row = rows_of(made[0])["DnCNN"]
    assert line.split()[:4] == ["DnCNN", "0.701", f"{row['dice']:.4f}", f"{row['dice_sd']:.4f}"]
    assert line.endswith("default") and "Kendall's tau" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sun2025-tabel4"], "did you mean 'sun2025-table4'"),
        (["sun2025-table1", "--row", "VoxelMorf"], "did you mean 'VoxelMorph'"),
        (["sun2025-table1", "--protocol", "any"], "expected 'atlas' or 'pairs'"),
        (["sun2025-table1", "--ndim", "4"], "ndim is 4, expected 2 or 3"),
        (["sun2025-table1", "--pairs", "1"], "pairs is 1, expected 2 or more"),
        (["sun2025-table1", "--budget", "huge"], "budget is 'huge', expected one of smoke"),
        (["sun2025-table1", "--data", "."], "no dataset.json"),
        (["sun2025-table1", "--out", "."], "out is a folder"),
        (["sun2025-table1", "--similarity", "ssim"], "similarity is 'ssim', expected one of lncc"),
        (["sun2025-table1", "--steps", "0"], "steps is 0, expected 1 or more"),
        (["all", "--out", "x.json"], "expected one table"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGKIT_BUDGET", "smoke")
    said = call(*arguments, code=2)
    assert said.startswith("regkit: ") and sentence in said
    assert not list(tmp_path.iterdir())


def test_another_file_is_not_overwritten(tmp_path):
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="'other.json', which holds something else"):
        running.run(Settings("sun2025-table1", **QUICK, out=tmp_path / "other.json"))
    assert (tmp_path / "other.json").read_text() == '{"a": 1}'
