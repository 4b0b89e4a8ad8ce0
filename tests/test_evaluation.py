"""What is measured along a path of displacements, and of each label, against known numbers."""

import numpy as np
import pytest
import torch

from regkit.data.subject import Subject
from regkit.metrics import rotation_error, translation_error
from regkit.models import Registration
from regkit.spatial import affine_to_disp, invert_theta, rigid_theta, warp
from regkit.training.evaluation import (
    by_descent,
    by_disp,
    dice_by_label,
    evaluate,
    evaluate_path,
    half_interval,
    nothing,
    summary,
)


def bar(start: int, name: str) -> Subject:
    """A bar of ten voxels along axis 0 that begins at `start`, on 40 x 8 voxels."""
    labels = torch.zeros(1, 40, 8, dtype=torch.int16)
    labels[:, start : start + 10] = 1
    return Subject(name, labels.float(), labels, np.eye(4))


def looks(voxels: float) -> torch.Tensor:
    """Every voxel looks so far along axis 0."""
    disp = torch.zeros(1, 2, 40, 8)
    disp[:, 0] = voxels
    return disp


def test_a_path_is_measured_place_by_place():
    """Bars 4 and 2 voxels apart: moved half of the way, then all of it."""
    fixed = bar(10, "fixed")
    pairs = [(bar(14, "four"), fixed), (bar(12, "two"), fixed)]
    gaps = iter((4, 2))

    def path_of(moving, fixed):
        assert moving.shape == fixed.shape == (1, 1, 40, 8)
        gap = next(gaps)
        return [looks(0), looks(gap / 2), looks(gap)]

    before, half, after = map(summary, evaluate_path(path_of, pairs, distances=True))
    assert before["dice"] == before["dice_before"] == pytest.approx((0.6 + 0.8) / 2)
    assert half["dice"] == pytest.approx((0.8 + 0.9) / 2)
    assert after["dice"] == pytest.approx(1) and after["folding_percent"] == 0
    assert [score["hd95"] for score in (before, half, after)] == pytest.approx([3, 1.5, 0])
    assert half["dice_before"] == before["dice_before"]


def test_a_path_has_one_length():
    fixed = bar(10, "fixed")
    pairs = [(bar(14, "a"), fixed), (bar(12, "b"), fixed)]
    paths = iter(([looks(0)], [looks(0), looks(1)]))
    with pytest.raises(ValueError, match=r"path_of gave \[1, 2\] displacements, expected one"):
        evaluate_path(lambda moving, fixed: next(paths), pairs)
    with pytest.raises(ValueError, match=r"path_of gave \[\] displacements"):
        evaluate_path(lambda moving, fixed: [looks(0)], [])


def test_the_dice_of_each_label_is_the_mean_over_those_who_have_it():
    rows = [
        {"dice_per_label": {3: 0.5, 1: 0.8}},
        {"dice_per_label": {1: 0.6, 2: float("nan")}},
    ]
    found = dice_by_label(rows)
    assert list(found) == [1, 2, 3]
    assert found[1] == pytest.approx(0.7) and found[3] == 0.5 and np.isnan(found[2])


@pytest.mark.parametrize("shape", [(6, 7), (4, 5, 6)])
def test_nothing_moves(shape):
    moving, fixed = torch.rand(2, 2, 1, *shape)
    result = nothing(moving, fixed)
    torch.testing.assert_close(result.moved, moving)
    assert result.disp.shape == (2, len(shape), *shape) and not result.disp.any()


def test_the_interval_of_a_mean_is_that_of_the_tables():
    """1, 2, 3: a standard error of 1/sqrt(3), and for n - 1 = 2 the tables have 4.303 and 2.920."""
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, abs=1e-3)
    assert half_interval([1.0, 2.0, 3.0], level=0.9) == pytest.approx(2.920 / 3**0.5, abs=1e-3)
    assert half_interval([0.7, 0.7]) == 0
    with pytest.raises(ValueError, match="values holds 1 of them, expected two or more"):
        half_interval([0.9])


def test_a_method_of_a_displacement_is_told_both_images_and_warps_the_moving_one():
    """A bar that begins at 14 is looked up 4 voxels further on, and then lies on one at 10."""
    moving, fixed = bar(14, "moving"), bar(10, "fixed")
    first = [s.labels[0, :, 0].nonzero()[0, 0] for s in (moving, fixed)]

    def find(a, b):
        torch.testing.assert_close((a, b), (moving.image[None], fixed.image[None]))
        return looks(float(first[0] - first[1]))

    result = by_disp(find)(moving.image[None], fixed.image[None])
    torch.testing.assert_close(result.moved, fixed.image[None])
    assert evaluate(by_disp(find), [(moving, fixed)])[0]["dice"] == 1


def comma() -> torch.Tensor:
    """A large and a small blob, (1, 1, 48, 48): turned, it is never like itself."""
    place = torch.stack(torch.meshgrid(*2 * [torch.arange(48.0)], indexing="ij"))
    large, small = (
        torch.exp(-((place - torch.tensor(at)[:, None, None]) ** 2).sum(0) / (2 * width**2))
        for at, width in (((23.0, 20.0), 6.0), ((28.0, 32.0), 3.0))
    )
    return (large + small)[None, None]


def test_descent_finds_a_known_motion_and_starts_where_it_is_told():
    """Turned by 150 degrees: found from nothing, and from 5 degrees beside it, not from 0."""
    fixed = comma()
    truth = rigid_theta(torch.tensor([[np.deg2rad(150.0)]]), torch.tensor([[1.5, -1.0]])).float()
    moving = warp(fixed, affine_to_disp(invert_theta(truth), (48, 48)))

    def answers(degrees):
        theta = rigid_theta(torch.tensor([[np.deg2rad(degrees)]]), torch.tensor([[1.5, -1.0]]))
        return lambda moving, fixed: Registration(moving, moving, theta=theta.float())

    for method in (by_descent(), by_descent(first=answers(145.0), steps=20)):
        found = method(moving, fixed)
        assert rotation_error(found.theta, truth) < 0.5
        assert translation_error(found.theta, truth) < 0.2
        torch.testing.assert_close(found.moved, warp(moving, found.disp))
    lost = by_descent(first=answers(0.0), steps=20)(moving, fixed)
    assert rotation_error(lost.theta, truth) > 20
    plain = by_descent(plain=True)(moving, fixed)  # from the identity, too, and to the nearest top
    assert rotation_error(plain.theta, truth) > 20
    still = by_descent(first=answers(145.0), steps=0)(moving, fixed)
    assert rotation_error(still.theta, truth).item() == pytest.approx(5, abs=0.01)
