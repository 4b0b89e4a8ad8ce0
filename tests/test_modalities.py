"""Across modalities: the known maps are known, descent recovers them, and the benchmark resumes."""

import json
from dataclasses import replace

import common
import modalities
import numpy as np
import pytest
import torch
from scipy import ndimage

from regkit import metrics
from regkit.spatial import compose, warp, warp_points
from regkit.training import train


def contrasts(n=24):
    """Two contrasts of one smooth texture, (1, 1, n, n, 8): the second is not monotonic."""
    noise = np.random.default_rng(0).standard_normal((n, n))
    texture = ndimage.gaussian_filter(noise, 2.5, mode="wrap")[..., None].repeat(8, axis=-1)
    low, high = texture.min(), texture.max()
    image = torch.from_numpy((texture - low) / (high - low)).float()[None, None]
    return image, (image - 0.6).abs()


@pytest.mark.parametrize("kind", ["rigid", "smooth"])
def test_a_known_map_stays_in_the_plane_and_has_its_inverse(kind):
    shape = (60, 70, 4)
    there, back = modalities.known_map(kind, 3, shape)
    assert there.shape == (1, 3, *shape) and not there[:, 2].any()
    assert not metrics.folding_count(there) and not metrics.folding_count(back)
    inside = (slice(None), slice(None), slice(12, -12), slice(12, -12))
    left = compose(there, back)[inside].norm(dim=1)
    assert left.max() < 0.1 and there[inside].norm(dim=1).mean() > 1  # voxels, there and back
    again = modalities.known_map(kind, 3, shape)[0]
    assert torch.equal(again, there)
    assert not torch.equal(modalities.known_map(kind, 4, shape)[0], there)
    if kind == "rigid":  # one turn and one shift: distances are kept
        points = torch.tensor([[[10.0, 10, 1], [40, 50, 2]]])
        moved = warp_points(points, there)
        torch.testing.assert_close(
            (moved[0, 0] - moved[0, 1]).norm(), (points[0, 0] - points[0, 1]).norm()
        )
    else:
        strength = there.square().sum(1).mean().sqrt() * modalities.MM
        assert float(strength) == pytest.approx(modalities.LENGTH, rel=0.2)


def test_levels_halve_long_axes_only():
    assert common.levels((64, 40, 8), 4) == [(16, 10, 8), (32, 20, 8), (64, 40, 8)]
    assert common.levels((70, 18, 4), 2) == [(35, 9, 4), (70, 18, 4)]
    assert common.levels((12, 12, 4), 4) == [(12, 12, 4)]


@pytest.mark.slow
def test_descent_finds_a_shift_between_two_contrasts():
    """By two voxels along one axis, away from the border, where the moving image ends."""
    image, other = contrasts(40)
    true = torch.zeros(1, 3, *image.shape[2:])
    true[:, 0] = 2.0
    moving = warp(other, -true, padding="border")  # moving(x + 2) is other(x)
    inside = torch.zeros_like(image)
    inside[:, :, 6:-6, 6:-6] = 1
    disp = modalities.descent(moving, image)
    assert float(metrics.endpoint_error(disp, true, inside)) < 1.0
    assert float(metrics.endpoint_error(-disp, true, inside)) > 2.0


def test_augmented_pairs_move_both_sides_apart_and_are_the_same_again():
    image, _ = contrasts()
    person = modalities.Patient(
        "toy",
        image,
        image,
        (image > 0.5).short(),
        (image > 0.5).short(),
        *[torch.zeros(1, 0, 3)] * 2,
    )
    pairs = modalities.AugmentedPairs([person], 4, seed=1)
    one, again, two = pairs[0], modalities.AugmentedPairs([person], 4, seed=1)[0], pairs[1]
    for key in ("moving", "fixed", "moving_labels", "fixed_labels"):
        assert one[key].shape == (1, 24, 24, 8) and torch.equal(one[key], again[key])
        assert not torch.equal(one[key], two[key])
    assert not torch.equal(one["moving_labels"], one["fixed_labels"])
    # labels go with their image: half as bright, or brighter, is where the label is, the power
    # of at most e^0.3 aside
    bright = one["fixed"] > 0.5
    assert (bright == (one["fixed_labels"] > 0)).float().mean() > 0.75


@pytest.mark.slow
def test_a_task_of_ones_own_is_learned_from():
    """Weak labels: glands that differ by a shift, in noise that says nothing of the shift."""
    block = torch.zeros(1, 1, 16, 16, 16)
    block[:, :, 4:12, 4:12, 4:12] = 1
    person = modalities.Patient(
        "toy",
        block.roll(2, 2),
        block,
        block.roll(2, 2).short(),
        block.short(),
        *[torch.zeros(1, 0, 3)] * 2,
    )

    class Same(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            names = ("moving", "fixed", "moving_labels", "fixed_labels")
            return {name: getattr(person, name)[0] for name in names} | {"name": "toy"}

    recipe = replace(
        modalities.WEAK, shape=(16, 16, 16), steps=40, batch=1, validate_every=40, lr=1e-2,
        options={"stages": 1, "channels": (8, 16), "transformer": False, "denoiser": None},
        weights={"dice": 1.0, "diffusion": 0.01}, precision="no",
    )  # fmt: skip

    class Own:
        pairs, info = Same(), {}

        def validate(self, model, device):
            return {"dice": 0.0}

        def score(self, scores):
            return scores["dice"]

    trained = train(recipe, progress=False, device="cpu", task=Own())
    before, after = (trained.history[i]["dice_loss"] for i in (0, -1))
    assert before == pytest.approx(1 - 0.75, abs=1e-3)  # 6 of 8 layers overlap
    assert after < 0.5 * before


def test_rows_resume_and_what_is_missing_is_left_out(tmp_path, monkeypatch, capsys):
    measured = []

    def row(method, kind, moving, seed):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((kind, moving, seed))
        return {"dice": 0.5, "error": float(seed), "seconds": 1.0}

    def prostate(make, fold, learns):
        return {"dice": 0.5, "dices": [0.4, 0.6], "distances": [1.0] * fold[0], "seconds": 1.0}

    monkeypatch.setattr(modalities, "child_row", row)
    monkeypatch.setattr(modalities, "prostate_row", prostate)
    out = tmp_path / "results" / "modalities.json"
    with pytest.raises(KeyboardInterrupt):
        modalities.run(out, weights="nowhere.safetensors", seeds=(1, 3))
    assert len(json.loads(out.read_text())["child"]["rows"]) == 3
    first = measured.copy()
    measured.clear()
    with pytest.raises(KeyboardInterrupt):
        modalities.run(out, weights="nowhere.safetensors", seeds=(1, 3))
    assert not set(first) & set(measured)

    monkeypatch.setattr(
        modalities, "child_row", lambda method, *which: {"dice": 0.5, "error": float(which[2])}
    )
    table = modalities.run(out, weights="nowhere.safetensors", seeds=(1, 3))
    assert json.loads(json.dumps(table)) == json.loads(out.read_text())  # tuples are lists there
    assert "any-contrast network is left out. path_or_name is" in capsys.readouterr().err
    # one network on two maps, two methods on the one and four on the other; three images, two seeds
    assert len(table["child"]["rows"]) == (2 + 2 + 4) * 3 * 2
    assert {line["error"] for line in table["child"]["summary"]} == {2.0}
    assert {line["error_sd"] for line in table["child"]["summary"]} == {1.0}
    line = table["prostate"]["summary"][0]
    assert line["dice_n"] == 8 and line["distance_n"] == 0 + 2 + 4 + 6
    with pytest.raises(ValueError, match="parts holds 'knee', expected some of child, prostate"):
        modalities.run(out, parts=("knee",))


@pytest.mark.slow
@pytest.mark.real
def test_a_known_warp_between_fa_and_t1_is_found_by_mutual_information(sample):
    """A third of the error has to go.

    In T1 and FA alike only edges show, and in the flat parts, where nothing but smoothness speaks,
    error stays; a third is what a method that finds nothing cannot reach, and one that finds the
    inverse makes the error larger.
    """
    sample("ptbp_brain")
    found = []

    def kept(moving, fixed):
        found.append(modalities.descent(moving, fixed))
        return found[-1]

    row = modalities.child_row(kept, "smooth", "fa", seed=100)
    assert row["error"] < 0.67 * row["error_before"]
    assert row["dice_before"] + 0.05 < row["dice"] < row["dice_ceiling"]
    assert row["folding_percent"] < 0.1
    wrong = modalities.child_row(lambda moving, fixed: -found[0], "smooth", "fa", seed=100)
    assert wrong["error"] > row["error_before"] and wrong["dice"] < row["dice_before"]


@pytest.mark.real
def test_the_child_is_on_one_grid_and_truth_carries_its_labels(sample):
    sample("ptbp_brain")
    child = modalities.child()
    assert set(child.labels.unique().tolist()) == {0, *modalities.TISSUES}
    for image in child.images.values():
        assert image.shape == child.labels.shape and image.shape[-1] == 4
        assert 0 <= float(image.min()) and 0.9 < float(image.max()) <= 1
    row = modalities.child_row(modalities.nothing, "rigid", "cbf", seed=0)
    assert row["error"] == row["error_before"] and row["dice"] == row["dice_before"]
    assert row["dice_ceiling"] > 0.9 > row["dice_before"]


@pytest.mark.slow
@pytest.mark.real
def test_prostates_on_one_grid(sample):
    sample("prostate_mr_us")
    row = modalities.prostate_row(lambda others: modalities.by_images(modalities.nothing), (0, 1))
    np.testing.assert_allclose(row["dices"], [0.554, 0.709], atol=0.015)  # on the other grid
    assert len(row["distances"]) == 4
    better = modalities.prostate_row(lambda others: modalities.by_outlines, (0, 1))
    assert min(better["dices"]) > 0.8
    # the landmarks were not fitted, and come nearer as well
    assert np.mean(better["distances"]) < np.mean(row["distances"])
