"""Synthetic pairs of fundus photographs, and the script that prepares FIRE, on files like its."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch
from PIL import Image
from typer.testing import CliRunner

from regkit import classical, cli, io, metrics
from regkit.data import GivenPairs, prepared
from regkit.data.vessels import VesselPair, vessel_contrast, vessel_pair, write_as_fire
from regkit.models import Registration
from regkit.spatial import (
    affine_to_disp,
    invert,
    jacobian_determinant,
    warp,
    warp_points,
)
from regkit.training import loop, recipes, tasks
from regkit.training.evaluation import landmark_errors, summary

SCRIPTS = Path(__file__).parents[1] / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
import fire  # noqa: E402
import layout  # noqa: E402

NAMES = ("S01", "P01", "A01")
SIZE = 192


@pytest.fixture(scope="module")
def made() -> dict[str, VesselPair]:
    return {name: vessel_pair(name, SIZE) for name in NAMES}


# the pairs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_truth_lays_points_on_points_and_vessels_on_vessels(made, name):
    pair = made[name]
    mapped = warp_points(pair.fixed.points[None], pair.disp)[0]
    assert (mapped - pair.moving.points).norm(dim=1).max() < 0.5
    back = invert(pair.disp), pair.moving.points[None], pair.fixed.points[None]
    assert metrics.tre(*back).max() < 0.5  # the way that FIRE goes
    before = (pair.fixed.points - pair.moving.points).norm(dim=1).mean()
    assert before > 0.05 * SIZE / 2 - 5  # the smallest shift, less what the rest of the map may do
    assert (jacobian_determinant(pair.disp) > 0.8).all()
    shared = pair.overlap[None]
    there, here = (x[None] * shared for x in (pair.fixed.labels, pair.moving.labels))
    found = warp(pair.moving.labels[None], pair.disp, mode="nearest") * shared
    assert metrics.dice(found, there, [1]).item() > 0.9
    assert metrics.dice(here, there, [1]).item() < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_what_both_show_has_the_same_colour_up_to_light(made, name):
    """The truth lays image on image, not only mask on mask: structure correlates, before it not."""
    pair = made[name]
    shared = pair.overlap[0]

    def alike(a, b):
        return float(torch.corrcoef(torch.stack([a[0][shared], b[0][shared]]))[0, 1])

    found = warp(pair.moving.image[None], pair.disp)[0]
    aligned, apart = (alike(x, pair.fixed.image) for x in (found, pair.moving.image))
    assert aligned > 0.6 and aligned > apart + 0.2
    assert pair.moving_rgb.shape == pair.fixed_rgb.shape == (3, SIZE, SIZE)
    assert torch.equal(pair.moving.image[0], pair.moving_rgb[1])
    for rgb in (pair.moving_rgb, pair.fixed_rgb):
        assert rgb.min() >= 0 and rgb.max() <= 1 and (rgb * ~pair.inside == 0).all()


def test_points_lie_on_vessels_spread_over_what_both_show(made):
    for pair in made.values():
        for scan in (pair.fixed, pair.moving):
            assert scan.points.shape == (10, 2)
            at = scan.points.round().long()
            near = torch.stack(
                [scan.labels[0, at[:, 0] + i, at[:, 1] + j] for i in (-1, 0, 1) for j in (-1, 0, 1)]
            )
            assert (near.amax(dim=0) == 1).sum() >= 9  # the finest may be less than a voxel wide
        at = pair.fixed.points.round().long()
        assert pair.overlap[0, at[:, 0], at[:, 1]].all()
        assert torch.pdist(pair.fixed.points).min() > SIZE / 16


def test_the_categories_are_those_of_fire():
    """S and A overlap by more than 75 %, P by less; A alone has changed between the visits."""
    for number in range(1, 5):
        pairs = {c: vessel_pair(f"{c}{number:02d}", 64) for c in "SPA"}
        assert all(pairs[c].overlap_percent > 75 for c in "SA")
        assert 25 < pairs["P"].overlap_percent < 75


def test_the_retina_of_category_a_has_changed(made):
    def largest_difference(pair):
        found = warp(pair.moving_rgb[None], pair.disp)[0]
        light = pair.fixed_rgb / found.clamp(min=0.05)
        light = light[:, pair.overlap[0] & (found[0] > 0.2)]
        return float(light.quantile(0.999) / light.median())

    assert largest_difference(made["A01"]) > 1.5 * largest_difference(made["S01"])


def test_overlap_is_that_of_two_circles():
    """(2 / pi) (acos(h) - h sqrt(1 - h^2)) for circles that lie 2 h radii apart."""
    pair = vessel_pair("S01", 128)
    shift = torch.zeros_like(pair.disp)
    shift[:, 0] = 0.5 * 0.96 * 64
    still = VesselPair(**{**vars(pair), "disp": shift})
    h = 0.25
    expected = 200 / np.pi * (np.arccos(h) - h * np.sqrt(1 - h**2))
    assert still.overlap_percent == pytest.approx(expected, abs=1)


def test_a_pair_is_the_same_each_time_and_another_for_another_name_or_seed():
    first, again = vessel_pair("P07", 64, seed=3), vessel_pair("P07", 64, seed=3)
    for one, two in ((first.fixed_rgb, again.fixed_rgb), (first.disp, again.disp)):
        assert torch.equal(one, two)
    assert torch.equal(first.moving.points, again.moving.points)
    for other in (vessel_pair("P08", 64, seed=3), vessel_pair("P07", 64, seed=4)):
        assert not torch.equal(first.moving_rgb, other.moving_rgb)
        assert not torch.equal(first.disp, other.disp)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("X01",), "name is 'X01', expected S, P or A and two digits"),
        (("S1",), "name is 'S1', expected S, P or A"),
        (("S01", 63), "size is 63, expected an even number of at least 64"),
        (("S01", 32), "size is 32, expected an even number of at least 64"),
    ],
)
def test_a_wrong_pair_is_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        vessel_pair(*arguments)


# affine first -----------------------------------------------------------------------------------


def test_contrast_shows_vessels_whatever_the_light(made):
    """What it shows is vessel, most vessels are there, and a ramp of light changes little."""
    ramp = torch.linspace(0.6, 1.2, SIZE)[None, None, :, None]
    for pair in made.values():
        image, mask = pair.fixed.image[None], pair.fixed.labels[None]
        found = vessel_contrast(image)
        assert found.shape == image.shape and found.min() == 0 and 0.99 < found.max() <= 1
        assert metrics.dice((found > 0.3).int(), mask.int(), [1]).item() > 0.75
        assert (found[:, ~pair.inside] == 0).all()
        both = torch.stack([vessel_contrast(255 * ramp * image), found]).flatten(1)
        assert torch.corrcoef(both)[0, 1] > 0.95
        two = vessel_contrast(torch.cat([image, 7 * image.flip(2)]))
        assert torch.allclose(two, torch.cat([found, found.flip(2)]), atol=1e-4)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (torch.ones(1, 3, 64, 64), r"image has shape \(1, 3, 64, 64\), expected \(B, 1, H, W\)"),
        (torch.ones(64, 64), r"image has shape \(64, 64\), expected"),
        (torch.zeros(1, 1, 64, 64), "image is black, expected a photograph"),
    ],
)
def test_contrast_of_no_photograph_is_one_sentence(image, sentence):
    with pytest.raises(ValueError, match=sentence):
        vessel_contrast(image)


@pytest.mark.parametrize(("moving", "fixed"), [((12, 9), (7, 15)), ((6, 7, 8), (9, 5, 4))])
def test_the_shift_is_the_largest_of_scipy_s_correlations(moving, fixed):
    a, b = torch.rand(1, 1, *moving), torch.rand(1, 1, *fixed)
    theta = classical.shift(a, b)
    # its first entry is the shift at which the last voxel of b lies on the first one of a
    every = scipy.signal.correlate(a[0, 0].numpy(), b[0, 0].numpy(), "full")
    best = np.unravel_index(every.argmax(), every.shape)
    assert theta.shape == (1, len(fixed), len(fixed) + 1)
    assert torch.equal(theta[0, :, :-1], torch.eye(len(fixed)))
    assert theta[0, :, -1].tolist() == [k - (n - 1) for k, n in zip(best, fixed, strict=True)]


def test_the_shift_is_a_theta_that_undoes_it():
    image = torch.zeros(1, 1, 20, 24)
    image[..., 5:9, 6:8] = torch.rand(4, 2)
    moved = image.roll((8, -5), (2, 3))
    theta = classical.shift(image, moved)
    assert theta[0, :, -1].tolist() == [-8, 5]
    assert torch.allclose(warp(image, affine_to_disp(theta, (20, 24))), moved, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"moving has shape \(1, 20, 24\), expected \(1, 1, H, W\)"
    ):
        classical.shift(image[0], moved)


def affine_error(pair, moving, fixed, theta=None):
    """Mean error of the control points, voxels, after an affine registration of these images."""
    found = classical.fit(moving, fixed, "affine", "ncc", theta, search=theta is None)
    disp = affine_to_disp(found, fixed.shape[2:])
    points = pair.fixed.points[None], pair.moving.points[None]
    return float(metrics.tre(disp, *points).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["S01", "P01"])
def test_affine_registration_finds_the_motion_from_contrast_and_shift(name):
    """The photographs as they are keep it where it was: the edge of the field fits already."""
    pair = vessel_pair(name, 128)
    before = float((pair.fixed.points - pair.moving.points).norm(dim=1).mean())
    as_they_are = pair.moving.image[None], pair.fixed.image[None]
    moving, fixed = (vessel_contrast(image) for image in as_they_are)
    assert before > 8 and affine_error(pair, *as_they_are) > 0.7 * before
    assert affine_error(pair, moving, fixed, classical.shift(moving, fixed)) < 1


# learning ---------------------------------------------------------------------------------------


def test_given_pairs_come_once_an_epoch(made):
    pairs = [(pair.moving, pair.fixed) for pair in made.values()]
    drawn = GivenPairs(pairs, 60, seed=1)
    names = [drawn[i]["name"] for i in range(60)]
    every = {f"{name} to {name}" for name in NAMES}
    assert all(set(names[i : i + 3]) == every for i in range(0, 60, 3))
    assert len({tuple(names[i : i + 3]) for i in range(0, 60, 3)}) == 6  # all orders
    assert len(drawn) == 60 and drawn[7]["name"] == GivenPairs(pairs, 8, seed=1)[7]["name"]
    item = drawn[names.index("P01 to P01")]
    for key, scan in (("moving", made["P01"].moving), ("fixed", made["P01"].fixed)):
        assert torch.equal(item[key], scan.image) and torch.equal(
            item[f"{key}_labels"], scan.labels
        )
    with pytest.raises(ValueError, match="pairs is empty, expected at least one"):
        GivenPairs([], 3)


def test_landmarks_measure_the_truth_and_doing_nothing(made):
    pairs = [(pair.moving, pair.fixed) for pair in made.values()]
    truths = iter([pair.disp for pair in made.values()])

    def know_it_all(moving, fixed):
        disp = next(truths)
        return Registration(warp(moving, disp), disp)

    best = landmark_errors(know_it_all, pairs)
    none = landmark_errors(lambda a, b: Registration(a, torch.zeros(1, 2, SIZE, SIZE)), pairs)
    assert [row["fixed"] for row in best] == list(NAMES)
    for one, other, (moving, fixed) in zip(best, none, pairs, strict=True):
        apart = float((moving.points - fixed.points).norm(dim=1).mean())
        assert one["tre"] < 0.01 and one["tre_before"] == pytest.approx(apart, rel=1e-5)
        assert other["tre"] == other["tre_before"] and other["folding_percent"] == 0
    assert summary(none)["tre"] == pytest.approx(np.mean([row["tre"] for row in none]))
    bare = replace(made["S01"].fixed, points=torch.empty(0, 2))
    with pytest.raises(ValueError, match="pairs holds 'S01' without landmarks"):
        landmark_errors(know_it_all, [(bare, bare)])


def test_a_network_learns_from_given_pairs_and_is_judged_by_landmarks(tmp_path):
    made = [vessel_pair(f"S{i:02d}", 64) for i in range(3)]
    pairs = [(pair.moving, pair.fixed) for pair in made]
    recipe = recipes.get(
        "vxm2_2d", "smoke", shape=(64, 64), lr=1e-4, batch=2, steps=4, validate_every=2
    )
    task = tasks.LandmarkTask(recipe, pairs[:2], pairs[2:])
    trained = loop.train(recipe, tmp_path, progress=False, device="cpu", task=task)
    apart = (pairs[2][0].points - pairs[2][1].points).norm(dim=1).mean()
    for entry in trained.history[1::2]:
        assert entry["tre_before"] == pytest.approx(float(apart), rel=1e-5)
        assert entry["tre"] > 0 and entry["folding_percent"] == 0
    (row,) = landmark_errors(trained.model, pairs[2:])
    assert row["tre"] == pytest.approx(trained.history[-1]["tre"], rel=1e-4)
    assert task.score({"tre": 1.0}) > task.score({"tre": 2.0})
    assert tuple(trained.model.info["spacing"]) == (1.0, 1.0)


# the script -------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path, made):
    write_as_fire(made.values(), tmp_path / "FIRE")
    return tmp_path / "FIRE"


def call(source, out, **options):
    fire.main(source, out, **{"accept_terms": True, "size": 64, "seed": 0, **options})
    return json.loads((out / "dataset.json").read_text())


def test_fire_s_own_size_is_reduced_by_a_whole_number_to_a_multiple_of_16():
    assert 2912 % fire.SIZE == 0 and fire.SIZE % 16 == 0


@pytest.mark.slow
def test_the_command_shows_the_terms_and_works(source, tmp_path):
    command = [
        sys.executable,
        str(SCRIPTS / "fire.py"),
        str(source),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--size", "64", "--accept-terms"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0 and "find out who they are" in said.stderr, said.stderr
    assert "3 pairs of 6 photographs, 2 to learn from and 1 to test on." in said.stdout


def test_what_is_prepared_are_pairs_with_the_points_in_voxels(source, tmp_path, made):
    description = call(source, tmp_path / "out")
    assert description["settings"] == {"size": 64, "seed": 0} and description["complete"]
    assert [e["category"] for e in description["subjects"]] == ["A", "P", "S"]
    pairs = prepared.pairs(tmp_path / "out")
    assert len(pairs) == 3 and [fixed.name for _, fixed in pairs] == ["A01", "P01", "S01"]
    for moving, fixed in pairs:
        pair = made[fixed.name]
        for scan, true in ((moving, pair.moving), (fixed, pair.fixed)):
            assert scan.image.shape == (1, 64, 64) and scan.spacing == (3.0, 3.0)
            # three pixels a voxel, whose middle one lies on the voxel
            assert torch.allclose(3 * scan.points + 1, true.points, atol=0.002)
            mean = true.image.reshape(64, 3, 64, 3).mean(dim=(1, 3))
            assert (scan.image[0] - mean).abs().max() < 0.06  # JPEG
            assert (scan.image[0] - mean).abs().mean() < 0.005
        # the error is that of the photograph, in its pixels, whatever the size
        still = torch.zeros(1, 2, 64, 64)
        error = metrics.tre(still, fixed.points[None], moving.points[None], moving.spacing)
        true_error = (pair.fixed.points - pair.moving.points).norm(dim=1)
        assert torch.allclose(error[0], true_error, atol=0.01)


def test_a_voxel_lies_where_its_pixels_lay(source, tmp_path, made):
    """In space: x to the right and y up, in pixels of the photograph."""
    call(source, tmp_path / "out")
    image = io.read(tmp_path / "out" / "S01" / "fixed.nii.gz")
    with Image.open(source / "Images" / "S01_1.jpg") as picture:
        pixels = np.asarray(picture)[..., 1] / 255
    for voxel in ((0, 0), (20, 45), (33, 10)):
        x, y = (image.affine @ [*voxel, 0, 1])[:2]
        column, row = round(x), round(-y)
        block = pixels[row - 1 : row + 2, column - 1 : column + 2]
        assert float(image.data[0, 0][voxel]) == pytest.approx(block.mean(), abs=0.01)
    table = np.loadtxt(source / "Ground Truth" / "control_points_S01_1_2.txt")
    fixed = prepared.pairs(tmp_path / "out", category="S")[0][1]
    homogeneous = np.c_[fixed.points.double(), np.zeros(10), np.ones(10)]
    assert np.allclose((homogeneous @ image.affine.T)[:, :2] * [1, -1], table[:, :2], atol=0.01)


def test_outside_of_the_mask_all_is_black(source, tmp_path, made):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[60:90, :] = 255  # rows of a picture: the second axis, from above
    Image.fromarray(mask).save(source / "Masks" / "mask.png")
    call(source, tmp_path / "out")
    moving = prepared.pairs(tmp_path / "out", category="S")[0][0]
    assert moving.image[0].amax(dim=0).nonzero().flatten().tolist() == list(range(34, 44))
    (source / "Masks" / "mask.png").unlink()
    call(source, tmp_path / "without")
    whole = prepared.pairs(tmp_path / "without", category="S")[0][0]
    assert torch.equal(whole.image[0][:, 34:44], moving.image[0][:, 34:44])
    assert (whole.image > 0).float().mean() > 0.6


def test_pairs_that_share_a_photograph_stay_together(tmp_path, monkeypatch):
    """In FIRE 129 photographs make 134 pairs. Ten pairs in a row, each with one of the next."""
    (tmp_path / "FIRE" / "Images").mkdir(parents=True)
    (tmp_path / "FIRE" / "Ground Truth").mkdir()
    for i in range(20):
        name = f"S{i:02d}"
        (tmp_path / "FIRE" / "Ground Truth" / f"control_points_{name}_1_2.txt").touch()
        # pairs 5, 6 and 7 hang together through 6, and 9 with 12
        first = {6: "eye 5, photograph 2", 7: "eye 6, photograph 2", 12: "eye 9, photograph 1"}
        for number in (1, 2):
            text = first.get(i, "") if number == 1 else ""
            (tmp_path / "FIRE" / "Images" / f"{name}_{number}.jpg").write_text(
                text or f"eye {i}, photograph {number}"
            )
    blank = io.Image(torch.zeros(1, 1, 4, 4), np.eye(4))
    monkeypatch.setattr(fire, "prepare", lambda *args: {"moving": blank, "fixed": blank})
    splits = []
    for seed in range(3):
        parts = {
            entry["name"]: entry["split"]
            for entry in call(tmp_path / "FIRE", tmp_path / f"{seed}", seed=seed)["subjects"]
        }
        assert parts["S05"] == parts["S06"] == parts["S07"] and parts["S09"] == parts["S12"]
        assert 13 <= list(parts.values()).count("train") <= 18  # 14 of 17 groups
        splits.append(tuple(parts.values()))
    assert len(set(splits)) > 1
    assert fire.eyes(fire.pairs(tmp_path / "FIRE"))[1] == 37


def test_splits_and_categories_of_the_prepared_set(source, tmp_path):
    call(source, tmp_path / "out")
    learn, test = (prepared.pairs(tmp_path / "out", split) for split in ("train", "test"))
    assert (len(learn), len(test)) == (2, 1)
    pairs = prepared.pairs(tmp_path / "out", category="P", keep=False)
    assert len(pairs) == 1 and pairs[0][0] is not pairs[0][0] and len(pairs[:]) == 1
    kept = prepared.pairs(tmp_path / "out")
    assert kept[-1][1] is kept[2][1]
    with pytest.raises(ValueError, match="category is 'X', expected one of 'A', 'P', 'S', or None"):
        prepared.pairs(tmp_path / "out", category="X")
    with pytest.raises(ValueError, match="split is 'tests', expected one of 'fixed', 'train'"):
        prepared.pairs(tmp_path / "out", "tests")
    other = {"name": "lpba40", "contrasts": ["t1"], "complete": True}
    layout.write_description(tmp_path / "other", other)
    with pytest.raises(ValueError, match="folder holds the set 'lpba40', expected a set of pairs"):
        prepared.pairs(tmp_path / "other")


def test_the_survey_s_recipe_learns_from_the_prepared_set(source, tmp_path):
    """By the command, in whatever size it is prepared, and with a sentence where there is none."""
    call(source, tmp_path / "fire")
    call(source, tmp_path / "larger", size=96)
    layout.write_description(
        tmp_path / "other", {"name": "lpba40", "contrasts": ["t1"], "complete": True}
    )

    def said(*arguments):
        order = ("train", "--recipe", "tan2023_fundus", "--budget", "smoke", "--device", "cpu")
        return CliRunner().invoke(cli.app, [*order, "-o", str(tmp_path / "run"), *arguments])

    for folder, sentence in (
        (None, "data is not given, expected the folder of the prepared set 'fire'"),
        ("other", "dataset.json lists no subjects, expected at least one"),
    ):
        failed = said() if folder is None else said("--data", str(tmp_path / folder))
        assert failed.exit_code == 2 and not (tmp_path / "run").exists()
        assert sentence in failed.stderr
    done = said("--data", str(tmp_path / "fire"))
    assert done.exit_code == 0, done.exception
    # in pixels of the photographs, whatever the size; those to learn from, as there are no others
    apart = [
        float((fixed.points - moving.points).norm(dim=1).mean()) * 3
        for moving, fixed in prepared.pairs(tmp_path / "fire", "train")
    ]
    assert f"tre_before        {np.mean(apart):8.4f}" in done.stdout
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [entry["step"] for entry in history if "tre" in entry] == [2, 4]
    done = said("--data", str(tmp_path / "larger"), "-o", str(tmp_path / "other_run"))
    assert done.exit_code == 0, done.exception
    stored = json.loads((tmp_path / "other_run" / "recipe.json").read_text())
    assert (stored["shape"], stored["data"]) == ([96, 96], "fire")


def test_the_survey_s_recipe_says_what_the_survey_says():
    recipe = recipes.get("tan2023_fundus", "paper")
    assert (recipe.model, recipe.ndim, recipe.similarity, recipe.lr) == ("vxm", 2, "lncc", 1e-4)
    assert recipe.weights == {"similarity": 1.0, "diffusion": 1.0}
    assert recipe.subjects + recipe.validation == 134 and recipe.subjects == round(0.8 * 134)
    assert recipe.steps * recipe.batch == 10 * recipe.subjects
    assert recipe.shape == (fire.SIZE, fire.SIZE)


def _no_partner(source):
    (source / "Images" / "P01_2.jpg").unlink()


def _cut_short(source):
    path = source / "Images" / "P01_2.jpg"
    path.write_bytes(path.read_bytes()[:900])


def _oblong(source):
    Image.new("RGB", (SIZE, SIZE - 8)).save(source / "Images" / "P01_2.jpg")


def _larger(source):
    Image.new("RGB", (SIZE + 8, SIZE + 8)).save(source / "Images" / "P01_2.jpg")
    (source / "Masks" / "mask.png").unlink()


def _other_mask(source):
    Image.new("L", (SIZE + 8, SIZE + 8)).save(source / "Masks" / "mask.png")


def _words(source):
    (source / "Ground Truth" / "control_points_P01_1_2.txt").write_text("one two three four\n")


def _two_columns(source):
    (source / "Ground Truth" / "control_points_P01_1_2.txt").write_text("1 2\n3 4\n")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_no_partner, "P01: there is no file Images/P01_2.jpg, expected both."),
        (_cut_short, "P01_2.jpg cannot be read as a picture: it is damaged or cut short."),
        (_oblong, "P01_2.jpg has 192x184 pixels, expected a square of 64 or more."),
        (_larger, "P01_2.jpg is 200 pixels wide, expected 192 as its partner."),
        (_other_mask, "mask.png has 200x200 pixels, expected 192x192."),
        (_words, "control_points_P01_1_2.txt is no table of control points, expected lines of 4"),
        (_two_columns, "control_points_P01_1_2.txt is no table of control points"),
    ],
)
def test_a_broken_pair_is_named_and_leaves_nothing(source, tmp_path, damage, sentence):
    damage(source)
    with pytest.raises(ValueError, match=sentence):
        call(source, tmp_path / "out")
    assert not (tmp_path / "out" / "P01").exists()


def test_a_grey_photograph_is_its_own_green_channel(source, tmp_path):
    path = source / "Images" / "S01_1.jpg"
    with Image.open(path) as picture:
        grey = picture.getchannel("G")
    grey.save(path, quality=100)
    call(source, tmp_path / "out")
    fixed = prepared.pairs(tmp_path / "out", category="S")[0][1]
    mean = np.asarray(grey).T[:, ::-1].reshape(64, 3, 64, 3).mean(axis=(1, 3)) / 255
    assert np.abs(fixed.image[0].numpy() - mean).max() < 0.02


def test_wrong_options_are_one_sentence(source, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, options, sentence in (
        ("FIRE", {"accept_terms": False}, "terms above are not accepted"),
        ("FIRE", {"size": 8}, "size is 8, expected at least 16"),
        ("empty", {}, "source has no file Ground Truth/control_points_S01_1_2.txt or alike"),
        ("FIRE.7z", {}, "source is no folder, expected FIRE"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call(tmp_path / folder, tmp_path / "out", **options)
    write_as_fire([vessel_pair("S01", 64)], source / "again")
    with pytest.raises(ValueError, match="S01 is there twice"):
        call(source, tmp_path / "out")
    (source / "Ground Truth" / "control_points_B01_1_2.txt").touch()
    with pytest.raises(ValueError, match="source has control points of B01, expected S, P or A"):
        call(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# the real pair ----------------------------------------------------------------------------------


@pytest.mark.real
def test_the_real_pair_is_its_green_channel(sample):
    from regkit.data.samples import load_fundus_pair

    folder = sample("fundus_pair")
    for scan, name in zip(load_fundus_pair(), ("query", "refer"), strict=True):
        assert scan.name == name and scan.image.shape == (1, 1382, 1382)
        with Image.open(folder / f"{name}.jpg") as picture:
            for x, y in ((700, 300), (400, 1000)):
                assert scan.image[0, x, 1381 - y] == picture.getpixel((x, y))[1]
        assert scan.image[0, :40, :40].max() < 30  # the corners are dark, the middle is not
        assert scan.image[0, 600:800, 600:800].mean() > 50


@pytest.mark.real
def test_the_real_pair_is_found_from_contrast_and_shift(sample):
    """A third of the image apart and seven degrees turned; nobody knows the truth, vessels tell."""
    from regkit.data.samples import load_fundus_pair

    sample("fundus_pair")
    moving, fixed = (
        vessel_contrast(torch.nn.functional.avg_pool2d(scan.image[None], 6))
        for scan in load_fundus_pair()
    )

    def overlap(theta):
        disp = affine_to_disp(theta, fixed.shape[2:])
        seen = warp(torch.ones_like(moving), disp) > 0.5
        found, there = (warp(moving, disp) > 0.3) & seen, (fixed > 0.3) & seen
        return metrics.dice(found.int(), there.int(), [1]).item()

    start = classical.shift(moving, fixed)
    theta = classical.fit(moving, fixed, "affine", "ncc", start, search=False)
    before, after = overlap(torch.eye(2, 3)[None]), overlap(theta)
    assert before < 0.2 and after > 0.45
    assert metrics.rotation_error(theta, torch.eye(2, 3)[None]).item() == pytest.approx(7, abs=2)
