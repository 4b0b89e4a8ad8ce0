"""The protocols of the papers on their own sets, from the script to a row of the table.

Each set is a stand-in in the published layout, prepared by its script, learned from by its recipe
at budget "smoke", evaluated, and measured again as a row of the paper's table; all by the commands.
"""

import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import pytest
from standins import add_case, add_ixi, add_lpba, add_person, to_the_middle
from typer.testing import CliRunner

from regkit import classical, cli, models
from regkit.data import prepared
from regkit.data.vessels import vessel_pair, write_as_fire
from regkit.papers.comparing import compare
from regkit.papers.tables import TABLES
from regkit.training import recipes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data_scripts"))
import brats  # noqa: E402
import fire  # noqa: E402
import ixi  # noqa: E402
import lpba40  # noqa: E402
import oasis  # noqa: E402


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


# the sets ---------------------------------------------------------------------------------------


def _brats(top, out, _):
    for i in range(5):
        add_case(top / "HGG", f"BraTS19_CBICA_AA{i}_1", i, zoom=2, labels=i != 0)
    brats.main([top], out, accept_terms=True, patients=None, size=48, seed=0)


def _oasis(ndim):
    def make(top, out, _):
        for number in range(1, 8):
            add_person(top, number, ndim, zoom=2)
        oasis.main(top, out, accept_terms=True, ndim=ndim, spacing=1, seed=0)

    return make


def _lpba40(top, out, monkeypatch):
    monkeypatch.setattr(classical, "align", to_the_middle)
    monkeypatch.setattr(lpba40, "template", lambda: None)
    for k in range(4):
        add_lpba(top, f"S0{k + 1}", k)
    lpba40.main(top, out, accept_terms=True, spacing=4, fixed="S01")


def _ixi(top, out, _):
    ixi.main(add_ixi(top, zoom=2, rim=4), out, accept_terms=True, spacing=1, sha256=None)


def _fire(top, out, _):
    write_as_fire([vessel_pair(f"{c}{i:02d}", 64) for c in "SPA" for i in (1, 2)], top)
    fire.main(top, out, accept_terms=True, size=64, seed=0)


class Protocol(NamedTuple):
    """prepare: makes the stand-in and runs the script. recipe, table: of the paper. row: of it."""

    prepare: Callable
    recipe: str
    table: str
    row: str
    paper_set: str


PROTOCOLS = {
    "Sun, LPBA40": Protocol(_lpba40, "sun2025_lpba40", "sun2025-table1", "VoxelMorph", "lpba40"),
    "Sun, OASIS": Protocol(_oasis(3), "sun2025_oasis", "sun2025-table1", "VoxelMorph", "oasis"),
    "Sun, slices": Protocol(_oasis(2), "sun2025_oasis_2d", "sun2025-table1", "VoxelMorph", "oasis"),
    "Zheng, slices": Protocol(
        _oasis(2), "zheng2023_oasis", "zheng2023-table1", "VoxelMorph-1", "oasis"
    ),
    "Peng, IXI": Protocol(_ixi, "peng2026_ixi", "peng2026-pyramids", "VoxelMorph", "ixi"),
    "Peng, LPBA40": Protocol(
        _lpba40, "peng2026_lpba40", "peng2026-pyramids", "VoxelMorph", "lpba40"
    ),
    "Hu, 3 within": Protocol(_brats, "hu2024_single_rigid", "hu2024-single", "1", "brats"),
    "Hu, 6 within": Protocol(_brats, "hu2024_single_affine", "hu2024-single", "2", "brats"),
    "Hu, 3 between": Protocol(_brats, "hu2024_multi_rigid", "hu2024-multi", "1", "brats"),
    "Hu, 6 between": Protocol(_brats, "hu2024_multi_affine", "hu2024-multi", "2", "brats"),
    "Tan, FIRE": Protocol(_fire, "tan2023_fundus", "tan2023-fundus", "VoxelMorph", "fire"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROTOCOLS)
def test_from_the_script_to_the_row_of_the_table(name, tmp_path, monkeypatch):
    protocol, data, out = PROTOCOLS[name], tmp_path / "set", tmp_path / "run"
    protocol.prepare(tmp_path / "source", data, monkeypatch)
    monkeypatch.setenv("REGKIT_BUDGET", "smoke")
    held = prepared.complete(data)
    here = ("--data", data, "--device", "cpu")

    said = run("train", protocol.recipe, *here, "--steps", 2, "-o", out).stdout
    stored, asked = json.loads((out / "recipe.json").read_text()), recipes.get(protocol.recipe)
    assert stored["data"] == asked.data == held["name"]
    assert tuple(stored["shape"]) == asked.shape  # the stand-in has the size of the protocol
    weights = out / "best.safetensors"
    assert weights.is_file() and f"wrote {weights}" in said

    run("evaluate", weights, *here, "--csv", tmp_path / "a.csv", "-o", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    lines = list(csv.DictReader((tmp_path / "a.csv").open()))
    tests = [entry["name"] for entry in held["subjects"] if entry["split"] == "test"]
    assert len(found["pairs"]) == len(tests)
    {"dice": _check_dice, "landmarks": _check_landmarks, "motion": _check_motion}[
        TABLES[protocol.table].measure
    ](found, lines, data, tests)

    file = tmp_path / "table.json"
    run(
        "benchmark", protocol.table, *here, "--row", protocol.row, "--steps", 1,
        "--runs", tmp_path / "runs", "-o", file,
    )  # fmt: skip
    table = json.loads(file.read_text())
    (row,) = (row for row in table["rows"] if row["state"] != "not run")
    assert row["state"] == "done" and table["tested_on"] == held["name"]
    assert row["recipe"]["data"] == held["name"] and row["parameters"] > 0
    main = {"dice": "dice", "landmarks": "tre", "motion": "rotation_error"}
    number = main[TABLES[protocol.table].measure]
    assert math.isfinite(row[number]) and len(row[f"{number}_pairs"]) == len(tests)
    assert table["paper_set"] == protocol.paper_set


def _values(data, name, key):
    return np.asarray(nibabel.load(data / name / f"{key}.nii.gz").dataobj)


def _check_dice(found, lines, data, tests):
    """Dice before registration is that of the files; structures and lines are all there."""
    names = prepared.structures(data)
    assert [pair["moving"] for pair in found["pairs"]] == tests
    pair = found["pairs"][0]
    moving, fixed = (_values(data, pair[side], "labels") for side in ("moving", "fixed"))
    dice = []
    for label in names:
        a, b = moving == label, fixed == label
        if a.any() or b.any():
            dice.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert pair["dice_before"] == pytest.approx(np.mean(dice))
    assert {"dice", "hd95", "folding_percent", "sd_log_jacobian"} <= set(found["summary"])
    assert set(found["structures"]) == set(names.values())
    assert len(lines) == len(tests) * len(names)
    first = lines[0]
    assert first["structure"] == names[int(first["label"])]
    for key in ("dice", "hd95"):
        assert float(first[key]) == pytest.approx(pair[f"{key}_per_label"][first["label"]])
        of_one = [float(x[key]) for x in lines if x["structure"] == first["structure"]]
        mean = np.mean([x for x in of_one if np.isfinite(x)])
        assert found["structures"][first["structure"]][key] == pytest.approx(mean)


def _check_landmarks(found, lines, data, tests):
    """The error before registration is the distance of the points; the areas are there."""
    assert [line["moving"] for line in lines] == tests
    for pair in found["pairs"]:
        table = np.genfromtxt(data / pair["fixed"] / "points.csv", delimiter=",", skip_header=1)
        apart = np.linalg.norm(table[:, :2] - table[:, 2:], axis=1).mean()
        assert pair["tre_before"] == pytest.approx(apart, rel=1e-4)  # one pixel a voxel here
        assert pair["category"] == pair["fixed"][0]
    assert 0 <= found["summary"]["success_auc"] <= 1
    category = found["pairs"][0]["category"]
    errors = [pair["tre"] for pair in found["pairs"] if pair["category"] == category]
    assert found["summary"][f"tre_{category}"] == pytest.approx(np.mean(errors))


def _check_motion(found, lines, data, tests):
    """Each patient once moved: the errors of the motion, and Dice where the patient has labels."""
    summary = found["summary"]
    assert {"rotation_error", "translation_error", "success", "folding_percent"} <= set(summary)
    errors = [pair["rotation_error"] for pair in found["pairs"]]
    assert summary["rotation_error_mean"] == pytest.approx(np.mean(errors))
    assert 0 < max(errors) <= 10 and {pair["moving"] for pair in found["pairs"]} <= set(tests)
    labelled = {e["name"] for e in prepared.complete(data)["subjects"] if e["labels"]}
    for pair in found["pairs"]:
        assert ("dice" in pair) == (pair["moving"] in labelled)
    assert len(lines) == len(tests)


def test_every_recipe_of_a_set_has_its_protocol_here():
    """No script prepares a set that nothing takes, and no recipe names one that nothing tests."""
    named = {n for n in recipes.names() if recipes.get(n, "smoke").data != "population"}
    assert named == {protocol.recipe for protocol in PROTOCOLS.values()} | {"zheng2023_ptbp"}


def test_the_recipes_say_what_the_papers_say():
    """Hu, section 3.2: 80 % of 2000 patients, three contrasts, 200x200, the correlation within a
    contrast and mutual information between two, 3 and 6 numbers. Zheng, section 4.3: 2000 epochs,
    one fixed image."""
    for kind, similarity in (("single", "ncc"), ("multi", "mutual_information")):
        for name, numbers in (("rigid", 3), ("affine", 6)):
            recipe = recipes.get(f"hu2024_{kind}_{name}", "paper")
            model = models.create(recipe.model, recipe.ndim, **recipe.options)
            assert model.numbers.out_features == numbers and recipe.similarity == similarity
            assert recipe.subjects == 0.8 * 2000 and recipe.shape == (brats.SIZE, brats.SIZE)
            assert sorted(recipe.motion["contrasts"]) == sorted(brats.CONTRASTS)
            assert recipe.motion["angle"] == recipe.motion["shift"] == 5
            assert recipe.motion.get("across", True) == (kind == "multi")
    zheng = recipes.get("zheng2023_oasis", "paper")
    assert zheng.atlas and zheng.subjects + 1 == oasis.PARTS["train"]
    assert zheng.steps * zheng.batch == 2000 * zheng.subjects


def test_what_peng_prints_for_ixi_stands_in_its_row():
    (row,) = (row for row in TABLES["peng2026-pyramids"].rows if row.label == "Dilformer")
    assert (row.ixi.dice, row.ixi.seconds) == (76.9, 0.29)
    assert "8.937" in row.note and "0.029" in row.note
    lines = {line["label"]: line for line in compare(TABLES["peng2026-pyramids"], [], "ixi")}
    assert lines["Dilformer"]["paper_dice"] == 0.769
    assert all(line["paper_dice"] is None for label, line in lines.items() if label != "Dilformer")


# any set, any recipe ----------------------------------------------------------------------------


@pytest.fixture
def slices(tmp_path):
    """Slices of seven people, under a name that no recipe has."""
    _oasis(2)(tmp_path / "source", tmp_path / "set", None)
    edit(tmp_path / "set", name="my scans")
    return tmp_path / "set"


def edit(folder, entries=None, **changes):
    """Change dataset.json: whole fields, and each entry of its subjects by a function."""
    file = folder / "dataset.json"
    held = json.loads(file.read_text()) | changes
    if entries is not None:
        held["subjects"] = [entries(k, entry) for k, entry in enumerate(held["subjects"])]
    file.write_text(json.dumps(held))


def train(recipe, data, out, *more, code=0):
    return run(
        "train", "--recipe", recipe, "--budget", "smoke", "--steps", 2, "--data", data,
        "--device", "cpu", "-o", out, *more, code=code,
    )  # fmt: skip


def test_any_set_trains_any_recipe_whose_model_takes_its_images(slices, tmp_path):
    said = train("vxm_2d", slices, tmp_path / "run").stdout
    assert "recipe vxm_2d, data my scans, images of (40, 48) voxels" in said
    stored = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (stored["data"], stored["shape"], stored["name"]) == ("my scans", [40, 48], "vxm_2d")
    assert models.load(tmp_path / "run" / "best.safetensors").info["recipe"] == stored
    train("vxm_2d", slices, tmp_path / "run", "--resume")  # the same run


def test_weights_of_a_set_are_not_measured_on_synthetic_heads_in_silence(slices, tmp_path):
    train("vxm_2d", slices, tmp_path / "run")
    weights = tmp_path / "run" / "best.safetensors"
    said = run("evaluate", weights, "-o", tmp_path / "e.json", code=2).stderr
    assert "method learned from the prepared set 'my scans', expected its folder" in said
    assert not (tmp_path / "e.json").exists()
    said = run("evaluate", weights, "--split", "test", code=2).stderr
    assert "split is given and data is not" in said


@pytest.mark.parametrize(
    "damage",
    [
        {"shape": [4000, 4000, 4000], "ndim": 3},
        {"shape": "large"},
        {"shape": [48, True]},
        {"ndim": 4},
        {"contrast": 3},
        {"amplitude": math.nan},
        {"amplitude": "1"},
        {"gamma": 1e6},
        {"atlas": "yes"},
        {"motion": [1, 2]},
        {"motion": {"angle": "far"}},
        {"motion": {"gamma": 1.0}},
        {"motion": {"contrasts": []}},
        {"motion": {"contrasts": "t1"}},
        {"chest": {"size": 3}},
        {"chest": {"field": 3}},
        {"from the future": 1},
        None,
    ],
)  # fmt: skip
def test_weights_with_a_damaged_recipe_are_one_sentence(tmp_path, damage):
    """Weights may come from strangers, and evaluation does what their recipe says."""
    held = [] if damage is None else recipes.plan(recipes.get("vxm_2d", "smoke")) | damage
    with pytest.raises(ValueError, match="method holds a recipe that cannot be read"):
        recipes.restored(held)


@pytest.mark.parametrize("name", models.pretrained())
def test_the_recipes_of_shipped_weights_are_read(name):
    held = models.load(name).info["recipe"]
    assert recipes.plan(recipes.restored(held)).items() >= held.items()


def test_weights_of_chests_are_measured_on_chests(tmp_path):
    run(
        "train", "fcn_2d", "--budget", "smoke", "--steps", 2, "--device", "cpu",
        "-o", tmp_path / "run",
    )  # fmt: skip
    weights, file = tmp_path / "run" / "best.safetensors", tmp_path / "e.json"
    run("evaluate", weights, "--pairs", 2, "--device", "cpu", "-o", file)
    pairs = json.loads(file.read_text())["pairs"]
    assert len(pairs) == 2 and all(pair["fixed"].endswith("(fixed)") for pair in pairs)
    assert {"1", "2"} <= set(pairs[0]["dice_per_label"]) and "endpoint_error" not in pairs[0]


def test_weights_of_the_population_are_measured_on_a_set(slices, tmp_path):
    run("train", "vxm_2d", "--budget", "smoke", "--device", "cpu", "-o", tmp_path / "run")
    weights = tmp_path / "run" / "best.safetensors"
    run("evaluate", weights, "--data", slices, "--split", "train", "-o", tmp_path / "e.json")
    found = json.loads((tmp_path / "e.json").read_text())
    learn = [e["name"] for e in prepared.complete(slices)["subjects"] if e["split"] == "train"]
    assert [pair["moving"] for pair in found["pairs"]] == learn


def test_a_set_without_labels_is_learned_from_by_the_images(slices, tmp_path):
    edit(slices, lambda _, entry: entry | {"labels": False})
    said = train("vxm_2d", slices, tmp_path / "run").stdout
    weights = tmp_path / "run" / "best.safetensors"
    assert "validation lncc" in said and "dice" not in said and weights.is_file()
    run("evaluate", weights, "--data", slices, "--csv", tmp_path / "e.csv")
    lines = list(csv.DictReader((tmp_path / "e.csv").open()))
    assert len(lines) == 2 and "dice" not in lines[0] and 0 < float(lines[0]["lncc"]) < 1


def _cut(folder, name, key):
    """The image of one person, four voxels shorter."""
    file = folder / name / f"{key}.nii.gz"
    image = nibabel.load(file)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[:-4], image.affine), file)


def _stretch(folder, name, key):
    """The image of one person, with larger voxels."""
    file = folder / name / f"{key}.nii.gz"
    image = nibabel.load(file)
    affine = image.affine @ np.diag([1.5, 1, 1, 1])
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), affine), file)


SECOND = "OASIS_OAS1_0002_MR1"


def _empty(folder, name, key):
    (folder / name / f"{key}.nii.gz").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda s: _cut(s, SECOND, "t1"),
         f"{SECOND}, t1 has shape (36, 48), expected (40, 48) as the first of the set"),
        (lambda s: _cut(s, SECOND, "labels"), f"{SECOND}, labels has shape (36, 48), expected (40"),
        (lambda s: _stretch(s, SECOND, "t1"), f"{SECOND}, t1 has voxels of 1.5 x 1 mm, expected 1"),
        (lambda s: (s / SECOND / "t1.nii.gz").unlink(), f"{SECOND}, t1: there is no such file"),
        (lambda s: _empty(s, SECOND, "labels"), f"{SECOND}, labels cannot be read as NIfTI"),
        (lambda s: edit(s, contrasts=["t2", "pd"]),
         "data holds the contrasts t2, pd, expected 't1'"),
        (lambda s: edit(s, complete=False), "folder is not complete: run the script that"),
        (lambda s: edit(s, lambda _, e: e | {"split": "test"}),
         "data holds 0 for 'train', expected at least 2"),
        (lambda s: edit(s, lambda k, e: e | {"split": "test" if k else "train"}),
         "data holds 1 for 'train', expected at least 2"),
        (lambda s: edit(s, name="population"), "data holds a set called 'population', expected"),
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_learned_from_is_one_sentence_and_no_folder(
    slices, tmp_path, damage, sentence
):
    damage(slices)
    said = train("vxm_2d", slices, tmp_path / "run", code=2)
    assert sentence in said.stderr and said.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("vxm_3d", "data holds images of shape (40, 48), expected 3 axes as recipe 'vxm_3d' says"),
        ("any_contrast_2d", "recipe 'any_contrast_2d' makes its own images, expected a recipe"),
        ("fcn_2d", "recipe 'fcn_2d' makes its own images"),
        ("hu2024_multi_rigid", "data holds the contrasts t1, expected 'flair' as recipe"),
        ("rigid_resnet34_2d_wide", "motion asks for a scalp, expected none"),
    ],
)
def test_a_recipe_that_does_not_take_a_set_is_one_sentence(slices, tmp_path, recipe, sentence):
    said = train(recipe, slices, tmp_path / "run", code=2).stderr
    assert sentence in said and not (tmp_path / "run").exists()


def test_terms_that_a_set_cannot_answer_are_refused(slices, tmp_path):
    from regkit.training.data import fitted

    edit(slices, lambda k, entry: entry | {"labels": k > 2})
    for term, sentence in (
        ("dice", "weights names 'dice', expected labels for everyone: OASIS_OAS1_000"),
        ("endpoint", "weights names 'endpoint', expected pairs whose answer is known"),
    ):
        recipe = recipes.get("vxm_2d", "smoke", weights={"similarity": 1.0, term: 1.0})
        with pytest.raises(ValueError, match=sentence):
            fitted(recipe, slices)


def test_one_person_to_test_on_makes_no_pair(slices, tmp_path):
    train("vxm_2d", slices, tmp_path / "run")
    tests = iter(range(9))
    edit(slices, lambda _, e: e | {"split": "train"} if e["split"] == "test" and next(tests) else e)
    weights = tmp_path / "run" / "best.safetensors"
    said = run("evaluate", weights, "--data", slices, code=2).stderr
    assert "test holds 1, expected at least 2 to make pairs" in said
    said = run("evaluate", weights, "--data", slices, "--split", "fixed", code=2).stderr
    assert "data holds no one for 'fixed', expected at least one" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "-o", "run"], "RECIPE is not given, expected one"),
        (["train", "vxm_2d", "--recipe", "vxm_2d", "-o", "run"], "RECIPE is given twice"),
        (["benchmark", "tan2023-fundus"], "data is not given, expected the folder of a prepared "
         "set, one of fire"),
        (["benchmark", "zhao2019-cascades", "--data", "set"], "data holds the set 'my scans', "
         "expected none: this table runs on the embedded population alone"),
        (["benchmark", "hu2024-multi", "--lambda2", "1"], "lambda2 is 1.0, expected None"),
        (["benchmark", "all", "--data", "set"], "none has a protocol for 'my scans'"),
        (["benchmark", "peng2026-pyramids", "--data", "set"], "expected one of ixi, lpba40"),
        (["benchmark", "sun2025-table1", "--data", "set"], "expected one of lpba40, oasis_2d, oa"),
    ],
)  # fmt: skip
def test_wrong_commands_are_one_sentence(slices, monkeypatch, arguments, sentence):
    monkeypatch.chdir(slices.parent)
    monkeypatch.setenv("REGKIT_BUDGET", "smoke")
    before = sorted(slices.parent.iterdir())
    assert sentence in run(*arguments, code=2).stderr
    assert sorted(slices.parent.iterdir()) == before


def test_a_table_of_dice_needs_labels(slices, tmp_path):
    edit(slices, lambda _, e: e | {"labels": e["split"] != "test"}, name="oasis_2d")
    said = run(
        "benchmark", "zheng2023-table1", "--data", slices, "--budget", "smoke", "--steps", 1,
        "--runs", tmp_path / "runs", "-o", tmp_path / "t.json", code=2,
    ).stderr  # fmt: skip
    assert "without labels, expected labels: Dice needs them" in said
    assert not (tmp_path / "runs").exists() and not (tmp_path / "t.json").exists()
