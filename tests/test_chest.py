"""Synthetic chests: drawn by their definition, and breathing by a motion that is known."""

import dataclasses
import json

import lung
import numpy as np
import pytest
import torch
from scipy.spatial import KDTree
from torch.utils.data import default_collate

from regkit import metrics, models
from regkit.data import chest, samples
from regkit.data.chest import Chest, ChestPairs, chests
from regkit.data.subject import Subject
from regkit.data.vessels import murray
from regkit.spatial import warp
from regkit.training import loop, objective, recipes

both = pytest.mark.parametrize("ndim", [2, 3])
SHAPES = {2: (60, 56), 3: (40, 28, 36)}


def pairs(ndim, length=3, **options):
    return ChestPairs(chests(2, ndim), SHAPES[ndim], length, **options)


def plain(ndim):
    """A chest of round numbers, and one vessel: straight, of radius 5, along the right lung."""
    axes = [0, 2] if ndim == 2 else [0, 1, 2]
    line = np.array([(74.0, 0.0, z) for z in np.arange(-20, 61)])[:, axes]
    return Chest(
        name="plain",
        ndim=ndim,
        size=np.ones(3),
        lungs=np.array([[(s * 74, 0, 0), (50, 80, 130)] for s in (1, -1)], dtype=float),
        domes=np.array([-60.0, -60.0]),
        heart=np.array([(-30, 20, -50), (40, 40, 40)], dtype=float),
        vessels=KDTree(line),
        radii=np.array([5.0] * len(line) + [-np.inf]),
    )


@both
def test_known_places_of_a_plain_chest(ndim):
    """Hounsfield units and label, far from any edge."""
    expected = {
        (0, 0, 0): (40, 0),  # between the lungs
        (0, 0, 120): (-1000, 0),  # in the trachea
        (90, 0, 60): (-800, 1),
        (90, 0, -50): (-800, 1),
        (-90, 0, 60): (-800, 1),
        (74, 0, 20): (40, 1),  # the vessel belongs to the lung
        (74, 0, 70): (-800, 1),  # beyond its end
        (74, 0, -75): (40, 0),  # below the diaphragm
        (-30, 0, -50): (50, 2),
        (74 + 50 + 7, 0, 0): (400, 3),  # a rib
        (74 + 50 + 7, 0, 18): (40, 0),  # between two
        (160, 0, 0): (-100, 0),
        (175, 0, 0): (-1000, 0),
    }
    if ndim == 3:
        expected |= {
            (0, -82, 0): (400, 3),  # a vertebra
            (0, -82, 15): (40, 0),  # between two
            (90, -40, 60): (-784, 1),
            (0, 114, 0): (-100, 0),
        }
    places = np.array(list(expected), dtype=float).T
    places = (places[[0, 2]] if ndim == 2 else places).reshape(ndim, -1, *[1] * (ndim - 1))
    hu, labels = plain(ndim).draw(places, 2.0)
    for where, found, label, known in zip(
        expected, hu.ravel(), labels.ravel(), expected.values(), strict=True
    ):
        assert (round(float(found)), int(label)) == known, where


def test_an_edge_is_spread_over_a_voxel():
    depth_at = 50 - np.array([-4, -1, -0.5, 0, 0.5, 1, 4])  # of the vessel's surface, radius 5
    places = np.array([(74 + 5 + s, 20.0) for s in 50 - depth_at]).T.reshape(2, -1, 1)
    hu, _ = plain(2).draw(places, 2.0)
    share = (hu.ravel() + 800) / 840
    np.testing.assert_allclose(share, np.clip(0.5 - (50 - depth_at) / 2, 0, 1), atol=1e-9)


def test_vessels_divide_as_murray_says():
    k, turn = murray(0.5)
    assert k == pytest.approx(2 ** (-1 / 3))
    assert np.degrees(2 * turn) == pytest.approx(74.9, abs=0.1)  # two equal branches: the known 75
    for share in (0.15, 0.3):
        (a, one), (b, other) = murray(share), murray(1 - share)
        assert a**3 + b**3 == pytest.approx(1)
        # forces balance: r^2 = a^2 cos + b^2 cos, and nothing pulls to a side
        assert a**2 * np.cos(one) + b**2 * np.cos(other) == pytest.approx(1)
        assert a**2 * np.sin(one) == pytest.approx(b**2 * np.sin(other))


@both
def test_the_truth_lays_the_labels_over_each_other(ndim):
    data = pairs(ndim)
    for index in range(2):
        item = data[index]
        disp = item["disp"][None]
        moving, fixed = (item[f"{side}_labels"][None] for side in ("moving", "fixed"))
        before = metrics.dice(moving, fixed, [1, 2, 3])[0]
        after = metrics.dice(warp(moving, disp, mode="nearest"), fixed, [1, 2, 3])[0]
        assert after[0] > 0.95 and after[1] > 0.9
        assert after[2] > before[2] + 0.1  # ribs are about two voxels thick
        assert (after > before).all() and before[0] < 0.97
        moved = warp(item["moving"][None], disp, padding="border")[0]
        errors = [(x - item["fixed"]).square().mean() for x in (moved, item["moving"])]
        assert errors[0] < 0.3 * errors[1]
        # the other way round it would be worse than nothing
        wrong = metrics.dice(warp(moving, -disp, mode="nearest"), fixed, [1])[0]
        assert wrong < before[0]


@both
def test_items_are_what_the_docstring_says(ndim):
    data = pairs(ndim, length=7)
    assert len(data) == 7
    item = data[3]
    for side in ("moving", "fixed"):
        image, labels = item[side], item[f"{side}_labels"]
        assert image.shape == labels.shape == (1, *SHAPES[ndim])
        assert image.dtype == torch.float32 and labels.dtype == torch.int16
        assert image.min() == 0 and 0.9 < image.max() <= 1
        assert set(labels.unique().tolist()) == {0, *chest.LABELS}
    assert item["disp"].shape == (ndim, *SHAPES[ndim])
    batch = default_collate([data[0], data[1]])
    assert batch["disp"].shape == (2, ndim, *SHAPES[ndim])


@both
def test_the_same_seed_is_the_same_pair(ndim):
    first, again, other = pairs(ndim), pairs(ndim, length=5), pairs(ndim, seed=1)
    a, b, c, d = first[1], again[1], other[1], first[2]
    for key in ("moving", "fixed", "disp", "fixed_labels"):
        assert torch.equal(a[key], b[key])
        assert not torch.equal(a[key], c[key]) and not torch.equal(a[key], d[key])
    one, same = chests(1, ndim, seed=3)[0], chests(2, ndim, seed=3)
    assert (one.lungs == same[0].lungs).all() and (one.vessels.data == same[0].vessels.data).all()
    assert (one.lungs != same[1].lungs).any() and one.name != same[1].name


@both
def test_a_breath_is_deepest_at_the_diaphragm_and_has_an_inverse(ndim):
    shape, spacing = SHAPES[ndim], (5.0, 6.0, 7.0)[-ndim:]
    random = np.random.default_rng(0)
    for _ in range(5):
        disp = chest.breath(random, shape, spacing, depth=30.0, other=0.0)
        assert disp.shape == (1, ndim, *shape)
        assert disp[:, :-1].abs().max() == 0  # along the body alone
        mm = disp[0, -1].reshape(-1, shape[-1])[0] * spacing[-1]
        assert 8 < mm.abs().max() <= 30 and (mm.sign() == mm.sign()[0]).all()
        peak = int(mm.abs().argmax()) / (shape[-1] - 1)
        assert abs(peak - chest.DIAPHRAGM) < 0.15
        assert mm[-1].abs() < 0.1 * mm.abs().max()
    for seed in range(3):
        disp = chest.breath(np.random.default_rng(seed), shape, spacing)
        assert metrics.folding_count(disp) == 0
        assert disp[:, 0].abs().mean() * spacing[0] > 1


def test_the_random_part_has_the_size_that_is_asked_for():
    random = np.random.default_rng(0)
    drawn = torch.cat([
        chest.breath(random, (40, 40), (10.0, 5.0), depth=0.0, other=0.5) for _ in range(60)
    ])  # fmt: skip
    # small, so that the displacement is the velocity; between lattice points it is a mean
    spread = drawn.std(dim=(0, 2, 3)) * torch.tensor([10.0, 5.0])
    assert ((spread > 0.4) & (spread < 0.55)).all()


def test_scaled():
    hu = torch.tensor([-2048, -1000, -300, 400, 1435], dtype=torch.int16)
    assert torch.equal(chest.scaled(hu), torch.tensor([0, 0, 0.5, 1, 1]))


@both
def test_the_affine_puts_voxels_where_they_are_drawn(ndim):
    data = pairs(ndim, noise=0.0, field="right lung")
    moving, fixed = data.subjects(0)
    axes = [0, 2] if ndim == 2 else [0, 1, 2]
    low, high = np.array(chest.FIELDS["right lung"])[axes].T
    assert moving.spacing == pytest.approx((high - low) / SHAPES[ndim])
    ends = [np.zeros(ndim), np.array(SHAPES[ndim]) - 1]
    first, last = ((moving.affine @ [*e, *[0] * (3 - ndim), 1])[axes] for e in ends)
    np.testing.assert_allclose(first, low + np.array(moving.spacing) / 2)
    np.testing.assert_allclose(last, high - np.array(moving.spacing) / 2)
    assert abs(np.linalg.det(moving.affine)) > 0
    voxels = np.argwhere(moving.labels[0].numpy() == 1)
    places = (voxels @ moving.affine[:3, :ndim].T + moving.affine[:3, 3])[:, axes]
    names = {c.name: c for c in data.patients}
    who = names[moving.name.split(",")[0]]
    _, labels = who.draw(places.T.reshape(ndim, -1, *[1] * (ndim - 1)), 1.0)
    assert (labels == 1).all()
    assert fixed.labels.shape == moving.labels.shape


def test_real_volumes_are_moved_every_second_time():
    shape = SHAPES[3]
    image = torch.rand(1, *shape)
    labels = (image > 0.5).to(torch.int16)
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    volume = Subject("real", image, labels, affine, torch.empty(0))
    data = pairs(3, 4, volumes=[volume], noise=0.0)
    assert [data[i]["name"].split(",")[0] == "real" for i in range(4)] == [True, False] * 2
    item = data[2]
    torch.testing.assert_close(item["moving"], image, atol=1e-5, rtol=0)
    assert torch.equal(item["moving_labels"], labels)
    expected = warp(image[None], item["disp"][None], padding="border")[0]
    assert torch.equal(item["fixed"], expected) and not torch.equal(expected, image)
    moved = warp(labels[None], item["disp"][None], mode="nearest", padding="border")[0]
    assert torch.equal(item["fixed_labels"], moved)
    alone = ChestPairs([], shape, 2, volumes=[volume])
    assert all(alone[i]["name"].startswith("real") for i in range(2))


def test_bad_input():
    two, three = chests(1, 2), chests(1, 3)
    with pytest.raises(ValueError, match="shape is \\(8, 60\\), expected two or three sizes"):
        ChestPairs(two, (8, 60), 1)
    with pytest.raises(ValueError, match="patients is empty, expected at least one"):
        ChestPairs([], (60, 60), 1)
    with pytest.raises(ValueError, match="patients holds 3D chests and shape is \\(60, 60\\)"):
        ChestPairs(three, (60, 60), 1)
    with pytest.raises(ValueError, match="field is 'left lung', expected one of.*'right lung'"):
        ChestPairs(two, (60, 60), 1, field="left lung")
    volume = Subject("v", torch.rand(1, 20, 20), torch.zeros(1, 20, 20), np.eye(4), torch.empty(0))
    with pytest.raises(ValueError, match="volumes holds one of shape \\(20, 20\\)"):
        ChestPairs(two, (60, 60), 1, volumes=[volume])
    with pytest.raises(ValueError, match="ndim is 4"):
        chests(1, 4)
    with pytest.raises(ValueError, match="n is -1"):
        chests(-1, 2)


@pytest.mark.slow
@both
def test_a_recipe_learns_from_chests(ndim):
    recipe = recipes.get(f"fcn_{ndim}d", "smoke", subjects=2, steps=2, validate_every=2)
    run = loop.train(recipe, progress=False, device="cpu")
    assert {"similarity", "diffusion", "segmentation", "dice"} <= set(run.history[-1])
    assert 0.5 < run.history[-1]["dice_before"] < 1
    assert run.model.info["orientation"] == "RAS"
    field = np.array(chest.FIELDS[recipe.chest["field"]])[[0, 2] if ndim == 2 else [0, 1, 2]]
    assert run.model.info["spacing"] == pytest.approx((field[:, 1] - field[:, 0]) / recipe.shape)


def test_pairs_know_their_answer():
    """The term "endpoint" is 0 for the truth."""
    item = default_collate([pairs(2)[0]])
    result = models.Registration(moved=item["moving"], disp=item["disp"])
    recipe = recipes.get("fcn_2d", "smoke", weights={"endpoint": 1.0})
    assert float(objective.objective(result, item, recipe)["endpoint"]) == 0


# --- studies/lung.py ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def breathing_lung():
    """A synthetic right lung as the benchmark takes a pair, and its true displacement, voxels."""
    data = ChestPairs(chests(1, 3), (32, 40, 32), 1, field="right lung", depth=15.0)
    moving, fixed = data.subjects(0)
    inside = np.argwhere(fixed.labels[0].numpy() == 1)
    voxels = inside[:: len(inside) // 26][:26].astype(float)
    disp = data[0]["disp"][None]
    there = voxels + disp[0][(slice(None), *voxels.astype(int).T)].T.numpy()
    # 40 mm of scanner offset, and Hounsfield units
    offset = np.eye(4)
    offset[:3, 3] = (40.0, 0, 0)
    scans = [
        Subject(scan.name, 1400 * scan.image - 1000, scan.labels, affine)
        for scan, affine in ((moving, offset @ data.affine), (fixed, data.affine))
    ]
    points = [
        places @ affine[:3, :3].T + affine[:3, 3]
        for places, affine in ((there, offset @ data.affine), (voxels, data.affine))
    ]
    return lung.Lung(*scans, *points, factor=1.0), disp, offset


def test_the_lung_benchmark_measures_the_truth_as_the_truth(breathing_lung):
    pair, disp, offset = breathing_lung
    affine = pair.grid.affine
    assert pair.grid.shape == (32, 40, 32)
    np.testing.assert_allclose(affine, pair.fixed.affine)
    truth = lung.measured(pair, pair.whole(offset, disp), affine)
    assert truth["tre"] < 1e-3 and truth["tre_34"] < 1e-3 and truth["lung_dice"] > 0.95
    before = lung.measured(pair, pair.whole(np.eye(4)), affine)
    assert 30 < before["tre"] < 50 and before["lung_dice"] < 0.9
    shifted = lung.measured(pair, pair.whole(offset), affine)
    mm = disp[0] * torch.tensor(pair.fixed.affine.diagonal()[:3]).reshape(3, 1, 1, 1)
    assert 0.5 < shifted["tre"] < mm.norm(dim=0).max()
    # a point that goes astray counts apart
    astray = pair.moving_points.copy()
    astray[lung.OUTLIER] += (0, 0, 20)
    other = lung.measured(
        dataclasses.replace(pair, moving_points=astray), pair.whole(offset, disp), affine
    )
    assert other["tre"] == truth["tre"] and other["tre_34"] == pytest.approx(20, abs=1e-3)


@pytest.mark.slow
def test_the_lung_benchmark_goes_on_where_it_stopped(breathing_lung, tmp_path, monkeypatch):
    pair, _, offset = breathing_lung
    vars(pair)["affine"] = (offset, 0.0)  # as the cached property would hold it
    small = {"channels": (4, 4, 4)}
    plan = lung.plan

    def tiny(*arguments):
        recipe = plan(*arguments)
        return dataclasses.replace(recipe, options={**recipe.options, **small}, validation=1)

    monkeypatch.setattr(lung, "plan", tiny)
    settings = {"runs": tmp_path, "train_steps": 2, "subjects": 1, "steps": 1, "syn": False}
    table = lung.run(pair, tmp_path / "lung.json", **settings)
    names = [row["method"] for row in table["rows"]]
    assert names[:3] == ["unregistered", "affine", "affine, refined"]
    assert set(names[3:]) == {
        f"affine, {name}{after}" for name in lung.BRANCHES for after in ("", ", refined")
    }
    assert table == json.loads((tmp_path / "lung.json").read_text())
    rows = {row["method"]: row for row in table["rows"]}
    assert "found_dice" in rows["affine, fcn, segmenting"] and rows["affine"]["tre"] < 15
    assert "found_dice" not in rows["affine, fcn"]

    def fail(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(lung, "after_affine", fail)
    assert lung.run(pair, tmp_path / "lung.json", **settings)["rows"] == table["rows"]
    with pytest.raises(AssertionError, match="measured again"):
        lung.run(pair, tmp_path / "lung.json", **{**settings, "steps": 2})
    with pytest.raises(ValueError, match="networks holds 'vxm'"):
        lung.run(pair, tmp_path / "lung.json", networks=["vxm"])


@pytest.mark.real
def test_the_real_lung_before_registration(sample):
    sample("lung_ct")
    index = samples._table()["lung_ct_landmarks"]["index"]
    assert index[lung.OUTLIER] == 34
    pair = lung.lung()
    row = lung.measured(pair, pair.whole(np.eye(4)), pair.grid.affine)
    assert (25 * row["tre"] + row["tre_34"]) / 26 == pytest.approx(35.3, abs=0.1)
    # an affine map fitted to the other landmarks: 34 is the outlier
    ones = np.ones((26, 1))
    here, there = np.hstack([pair.fixed_points, ones]), pair.moving_points
    rest = np.arange(26) != lung.OUTLIER
    fit = np.linalg.lstsq(here[rest], there[rest], rcond=None)[0]
    errors = np.linalg.norm(here @ fit - there, axis=1)
    assert errors[lung.OUTLIER] > 10 and errors[rest].max() < 10
    # the same through the benchmark: a matrix of mm, fixed -> moving
    matrix = np.eye(4)
    matrix[:3] = fit.T
    row = lung.measured(pair, pair.whole(matrix), pair.grid.affine)
    assert row["tre"] == pytest.approx(errors[rest].mean(), abs=0.01)
    assert row["lung_dice"] > 0.9
