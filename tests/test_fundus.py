"""The fundus benchmark: its measures are what they say, its methods work, and it resumes."""

import json
from dataclasses import replace

import fundus
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regkit.data import prepared
from regkit.data.vessels import vessel_pair
from regkit.spatial import affine_to_disp, warp

SIZE = 128


@pytest.fixture(scope="module")
def pair():
    made = vessel_pair("S01", SIZE)
    return made, (made.moving, made.fixed)


def shifted(by):
    """A constant displacement along the first axis, voxels."""
    return torch.tensor([by, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, SIZE, SIZE)


def test_the_measures_of_a_known_shift(pair):
    """Of a photograph to itself, shifted by 3 voxels: errors in pixels of a width of 2912."""
    _, (_, fixed) = pair
    same = fixed, replace(fixed, name="S02")
    row = fundus.measured(lambda moving, fixed: shifted(3.0), [(fixed, fixed), same])
    assert row["error"] == pytest.approx(3 * 2912 / SIZE, rel=1e-5)  # 68: above 25
    assert row["errors"] == [68.2, 68.2]
    assert row["auc"] == row["auc_S"] == 0 and row["folding_percent"] == 0
    still = fundus.measured(fundus.nothing, [(fixed, fixed)])
    assert still["error"] == 0 and still["auc"] == still["auc_S"] == 1
    assert still["vessel_dice"] == 1 > row["vessel_dice"]
    away = fundus.measured(lambda moving, fixed: shifted(float(SIZE)), [(fixed, fixed)])
    assert away["vessel_dice"] == 0 and away["image_dice"] == 0


def test_the_survey_s_dice_of_an_image_with_itself_is_not_one(pair):
    _, (_, fixed) = pair
    image = fixed.image.double()
    expected = float(image.square().sum() / image.sum())
    found = fundus.image_dice(fixed, fixed, fundus.nothing(fixed, fixed))
    assert found == pytest.approx(expected, rel=1e-4) and found < 0.5


def test_a_window_of_three_colours_holds_three_times_the_values():
    """One window, 9x9 with its border of zeros: counted right, it is numpy's correlation."""
    a, b = torch.rand(2, 1, 3, 7, 7, dtype=torch.float64).unbind(0)
    one, other = (F.pad(x, [1] * 4).flatten() for x in (a, b))
    expected = np.corrcoef(one, other)[0, 1] ** 2
    found = fundus.squared_correlation(a.float(), b.float(), 243)
    assert float(found) == pytest.approx(expected, abs=1e-5)
    # counted as one colour: with the sum s of the values and q of their squares, q - s^2 / 81
    cross, va, vb = (
        float((x * y).sum() - x.sum() * y.sum() / 81)
        for x, y in ((one, other), (one, one), (other, other))
    )
    assert va < 0 and vb < 0  # no variance is
    wrong = fundus.squared_correlation(a.float(), b.float(), 81)
    assert float(wrong) == pytest.approx(cross**2 / (va * vb), rel=1e-3)


@pytest.mark.slow
def test_only_the_window_that_is_counted_wrong_loses_the_image():
    pairs = [vessel_pair(f"{c}{k:02d}", 64) for c in "SPA" for k in range(1, 9)]
    lost, kept = (fundus.colours(count, pairs, 5)[-1] for count in (81, 243))
    assert lost["brightness"] < 0.01 > lost["image_dice"]
    assert kept["brightness"] > 0.15 and kept["image_dice"] > 0.35


def test_affine_and_refined_come_near_and_the_truth_is_best(pair):
    made, both = pair
    none, affine, refined, truth = (
        fundus.measured(method, [both])
        for method in (fundus.nothing, fundus.affine, fundus.refined, lambda a, b: made.disp)
    )
    assert none["auc"] == 0 and none["error"] > 100
    assert affine["error"] < 25 and refined["error"] < affine["error"]
    assert truth["error"] < 0.5 and truth["auc"] == 1
    assert none["vessel_dice"] + 0.3 < affine["vessel_dice"] < refined["vessel_dice"]
    # what the survey computed hardly knows the difference
    assert abs(truth["image_dice"] - none["image_dice"]) < 0.05


def test_an_aligned_pair_has_its_points_where_its_image_is(pair):
    _, (moving, fixed) = pair
    one, other = fundus.aligned(moving, fixed)
    theta = fundus.theta_of(moving, fixed)
    there = theta[0, :, :2] @ (one.points - (SIZE - 1) / 2).T + theta[0, :, 2:] + (SIZE - 1) / 2
    torch.testing.assert_close(there.T, moving.points, atol=1e-3, rtol=0)
    assert (one.points - other.points).norm(dim=1).mean() < 1  # voxels
    moved = warp(fundus.contrasts(moving, fixed)[0], affine_to_disp(theta, (SIZE, SIZE)))
    torch.testing.assert_close(one.image, moved[0])


def test_a_network_after_the_affine_map_answers_for_both(pair):
    """One that answers with a constant: it adds that to what the affine map says."""

    class Constant(torch.nn.Module):
        def forward(self, moving, fixed):
            return type("Answer", (), {"disp": shifted(2.0)})()

    _, both = pair
    alone = fundus.affine(*both)
    found = fundus.after_affine(Constant())(*both)
    assert torch.equal(fundus.directly(Constant())(*both), shifted(2.0))
    inside = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    moved = alone.roll(-2, 2) + shifted(2.0)  # first two voxels further, then the affine map
    torch.testing.assert_close(found[inside], moved[inside], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_rows_resume_and_wrong_options_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(fundus, "STEPS", 2)
    options = {"runs": tmp_path / "runs", "each": 5, "size": 64, "epochs": 1, "real": False}
    out = tmp_path / "results" / "fundus.json"
    trained = []

    def stop(recipe, learn, folder):
        trained.append(recipe)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(fundus, "learned", stop)
        fundus.run(None, out, **options)
    first = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in first[:2]] == [
        "unregistered",
        "affine, photographs as they are",
    ]
    assert (trained[0].lr, trained[0].steps) == (1e-4, 12)  # 12 of 15 pairs, once

    table = fundus.run(None, out, **options)
    assert json.loads(json.dumps(table)) == json.loads(out.read_text())
    assert table["rows"][: len(first)] == first  # not measured again
    methods = [row["method"] for row in table["rows"]]
    assert methods[len(first) :] == [*fundus.SURVEY, *fundus.WORKING]
    assert all(row["pairs"] == 3 and row["set"] == "synthetic" for row in table["rows"])
    assert [(row["divided_by"], row["epoch"]) for row in table["colours"]] == [(81, 1), (243, 1)]
    again = fundus.run(None, out, **options)
    assert again["rows"] == table["rows"] and again["colours"] == table["colours"]

    folder = next((tmp_path / "runs").glob("vessels-5-64-*[0-9]"))
    assert len(prepared.pairs(folder, "train")) == 12
    with pytest.raises(ValueError, match="each is 1 and size 64, expected at least 5 and 64"):
        fundus.run(None, out, **options | {"each": 1})
    with pytest.raises(ValueError, match="epochs is 0, expected 1 or more"):
        fundus.run(None, out, **options | {"epochs": 0})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dataset.json").write_text('{"name": "lpba40"}')
    with pytest.raises(ValueError, match="data holds the set 'lpba40', expected 'fire'"):
        fundus.run(tmp_path / "other", out, **options)


@pytest.mark.real
def test_the_vessels_of_the_real_pair_meet(sample):
    sample("fundus_pair")
    pair = fundus.real_pair()
    before, after = (fundus.measured(method, [pair]) for method in (fundus.nothing, fundus.affine))
    assert "error" not in before and before["vessel_dice"] < 0.2 and after["vessel_dice"] > 0.45
