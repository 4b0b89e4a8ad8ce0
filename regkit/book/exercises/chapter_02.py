"""Chapter 02: rotations and translations, mutual information, and how motions are joined."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regkit import spatial
from regkit.book.exercise import Exercise, Mistake

CENTRE = torch.tensor([[99.5], [99.5]])
NECK = torch.tensor([[100.0], [20.0]])
SIZE = 48  # voxels along each axis of the head in 3D


def _affine(linear: Tensor, shift: Tensor) -> Tensor:
    return torch.cat([linear, shift], dim=-1)[None]


def _turn(radians: float) -> Tensor:
    return spatial.rigid_theta(torch.tensor([[radians]]), torch.zeros(1, 2))[0, :, :2]


# 1, a turn about another centre


def _about(
    neck: Tensor, centre: Tensor = CENTRE, radians: float = math.radians(10), sign: float = 1
) -> Tensor:
    turn = _turn(radians)
    return _affine(turn, sign * (torch.eye(2) - turn) @ (neck - centre))


# 2, the paper's convention

PAPER, SHIFT = _turn(-0.1), torch.tensor([[12.0], [-3.0]])


def _from_paper(linear: Tensor, shift: Tensor, centre: Tensor = CENTRE) -> Tensor:
    """x -> linear x + shift, from voxel (0, 0), in the form about the centre."""
    return _affine(linear, linear @ centre + shift - centre)


# 3, mutual information


def _table(a: Any, b: Any) -> Any:
    return np.histogram2d(a.ravel(), b.ravel(), 16, [(-0.5, 15.5), (-0.5, 15.5)])[0] / a.size


def _entropy(p: Any) -> float:
    seen = p > 0
    return float(-(p[seen] * np.log(p[seen])).sum())


def _information(a: Any, b: Any) -> float:
    p = _table(a, b)
    return _entropy(p.sum(0)) + _entropy(p.sum(1)) - _entropy(p)


def _some_greys() -> list[tuple[Any, Any]]:
    random = np.random.default_rng(0)
    grey = random.integers(0, 16, (40, 40))
    noisy = np.clip(grey + random.integers(-2, 3, grey.shape), 0, 15)
    return [(grey, noisy), (grey, noisy // 4), (grey, random.permutation(16)[grey])]


# 4 and 5, two motions


def _motion(degrees: float, *shift: float) -> Tensor:
    return spatial.rigid_theta(torch.tensor([[math.radians(degrees)]]), torch.tensor([shift]))


def _two_motions() -> list[tuple[Tensor, Tensor]]:
    return [
        (_motion(20, 4.0, -6.0), _motion(-5, 1.0, 2.0)),
        (_motion(-35, 0.0, 8.0), _motion(10, -3, 1)),
    ]


def _split(theta: Tensor) -> tuple[Tensor, Tensor]:
    return theta[..., :-1], theta[..., -1:]


def _added(first: Tensor, then: Tensor) -> Tensor:
    return first + then - torch.eye(2, 3)


def _shifts_added(first: Tensor, then: Tensor) -> Tensor:
    (a, s), (b, t) = _split(first), _split(then)
    return torch.cat([a @ b, s + t], dim=-1)


def _mean(one: Tensor, other: Tensor, transposed: bool = False, share: float = 0.5) -> Tensor:
    (a, s), (b, t) = _split(one), _split(other)
    u, _, v = torch.linalg.svd((a + b) / 2)
    return torch.cat([u @ (v.mT if transposed else v), share * (s + t)], dim=-1)


def _first_shift(one: Tensor, other: Tensor) -> Tensor:
    return torch.cat([_split(_mean(one, other))[0], _split(one)[1]], dim=-1)


# 6, three dimensions

ANGLES, STEP = [0.05, -0.04, 0.08], [1.0, -2.0, 0.5]


def _in_3d(angles: list[float], step: list[float]) -> Tensor:
    return spatial.rigid_theta(torch.tensor([angles]), torch.tensor([step]))


def _at_the_rim(theta: Tensor) -> Tensor:
    """All in voxels: a turn counts as the way of a place at the rim."""
    linear, shift = _split(theta)
    return torch.cat([linear * SIZE / 2, shift], dim=-1)


# 7, a loss with the answers


def _unit(size: float) -> Tensor:
    return torch.tensor([size / 2, size / 2, 1.0])


def _some_answers() -> list[tuple[Tensor, Tensor, int]]:
    found = torch.cat([_motion(20, 4.0, -6.0), _motion(-5, 1.0, 2.0)])
    return [(found, found + 0.3 * torch.randn(2, 2, 3), 96), (found, found.flip(0), 48)]


def _supervised(found: Tensor, true: Tensor, size: int) -> Tensor:
    return ((found - true) * _unit(size)).square().mean()


EXERCISES = (
    Exercise(
        asks="tensor",
        reference=lambda: _about(NECK),
        mistakes=(
            Mistake(
                "shift with the wrong sign",
                lambda: _about(NECK, sign=-1),
                "The matrix is right, and the shift has the wrong sign: with it the neck moves "
                "twice as far as without any.",
            ),
            Mistake(
                "about the centre of the image",
                lambda: _about(CENTRE),
                "This turns about the centre of the image. The neck then moves; which shift brings "
                "it back?",
            ),
            Mistake(
                "about voxel 0",
                lambda: _about(NECK, centre=torch.zeros(2, 1)),
                "The shift is that of a formula which counts from voxel (0, 0). Ours counts from "
                "the centre of the image.",
            ),
            Mistake(
                "axes exchanged",
                lambda: _about(NECK.flip(0)),
                "This turns about voxel (20, 100): the two axes of the neck are exchanged.",
            ),
            Mistake(
                "turned the other way",
                lambda: _about(NECK, radians=-math.radians(10)),
                "The angle has the wrong sign: the exercise asks for +10 degrees, as `rigid_theta` "
                "counts them.",
            ),
            Mistake(
                "degrees as radians",
                lambda: _about(NECK, radians=10.0),
                "`rigid_theta` takes radians, and this is a turn by 10 of them.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        reference=lambda: _from_paper(torch.linalg.inv(PAPER), -torch.linalg.inv(PAPER) @ SHIFT),
        tolerance=1e-4,
        mistakes=(
            Mistake(
                "forward instead of backward",
                lambda: _from_paper(PAPER, SHIFT),
                "This is still their direction, from the moving image to the result. Ours asks "
                "where a voxel of the result comes from: invert the map.",
            ),
            Mistake(
                "centre forgotten",
                lambda: _affine(torch.linalg.inv(PAPER), -torch.linalg.inv(PAPER) @ SHIFT),
                "The direction is right. But this shift counts from voxel (0, 0), and ours from "
                "the centre of the image.",
            ),
            Mistake(
                "shift not turned",
                lambda: _from_paper(torch.linalg.inv(PAPER), -SHIFT),
                "On the way back the shift comes first and is then turned with all the rest: it is "
                "not just the negative of theirs.",
            ),
            Mistake(
                "n against n - 1",
                lambda: _from_paper(
                    torch.linalg.inv(PAPER), -torch.linalg.inv(PAPER) @ SHIFT, CENTRE + 0.5
                ),
                "Nearly. The centre of voxels 0 to 199 is not 100: count from 0 to n - 1.",
            ),
            Mistake(
                "angle with the other sign",
                lambda: _from_paper(PAPER, -PAPER @ SHIFT),
                "The angle has the wrong sign. Their matrix is that of a turn by -0.1 in our "
                "convention, and you need its inverse.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=_some_greys,
        reference=_information,
        mistakes=(
            Mistake(
                "bits",
                lambda a, b: _information(a, b) / math.log(2),
                "This is right in bits. The exercise asks for the natural logarithm.",
            ),
            Mistake(
                "sign of a loss",
                lambda a, b: -_information(a, b),
                "The sign is that of a loss, which one makes small. The information itself is "
                "never negative.",
            ),
            Mistake(
                "joint entropy",
                lambda a, b: _entropy(_table(a, b)),
                "This is the entropy of the table. What the two images would have without each "
                "other is missing.",
            ),
            Mistake(
                "entropy of one image",
                lambda a, b: _entropy(_table(a, b).sum(1)),
                "This is the entropy of one image alone. It is the information only where the "
                "other image tells everything.",
            ),
            Mistake(
                "divided by the joint entropy",
                lambda a, b: _information(a, b) / _entropy(_table(a, b)),
                "This is normalised by the entropy of the table. The exercise asks for the "
                "information itself.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=_two_motions,
        reference=spatial.compose_theta,
        mistakes=(
            Mistake(
                "wrong order",
                lambda first, then: spatial.compose_theta(then, first),
                "The two are joined in the wrong order. The result asks the last answer first: x, "
                "then `then`, then `first`.",
            ),
            Mistake(
                "added instead of composed",
                _added,
                "The motions were added. Motions are composed: one is applied to what the other "
                "has given.",
            ),
            Mistake(
                "shifts added",
                _shifts_added,
                "The matrices are multiplied, which is right. One of the shifts is turned by the "
                "other motion, though.",
            ),
            Mistake(
                "only the last answer",
                lambda first, then: then,
                "This is the last answer alone. It belongs to the warped image; the original one "
                "needs the first answer as well.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=_two_motions,
        reference=_mean,
        mistakes=(
            Mistake(
                "mean of the matrices",
                lambda one, other: (one + other) / 2,
                "The mean of two rotations is not a rotation: its columns are shorter than 1. Take "
                "the nearest rotation.",
            ),
            Mistake(
                "v transposed",
                lambda one, other: _mean(one, other, transposed=True),
                "`torch.linalg.svd` hands over the last matrix transposed already: u @ v, and no "
                "second transposition.",
            ),
            Mistake(
                "shifts not halved",
                lambda one, other: _mean(one, other, share=1.0),
                "The rotation is right. The shifts were added, and not divided by two.",
            ),
            Mistake(
                "shift of one",
                _first_shift,
                "The rotation is right. The shift is that of the first motion alone.",
            ),
            Mistake(
                "composed",
                spatial.compose_theta,
                "This is one motion after the other. Half-way between them is asked.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        reference=lambda: _in_3d(ANGLES, STEP),
        measure=_at_the_rim,
        tolerance=0.2,
        mistakes=(
            Mistake(
                "the way back",
                lambda: spatial.invert_theta(_in_3d(ANGLES, STEP)),
                "This is the inverse. Warp the head by the inverse of the motion to make the "
                "moving image; the search then finds the motion.",
            ),
            Mistake(
                "axes in the order z, y, x",
                lambda: _in_3d(ANGLES[::-1], STEP[::-1]),
                "Angles and shifts stand in the opposite order: the first belongs to array axis 0.",
            ),
            Mistake(
                "voxels against a normalised grid",
                lambda: _in_3d(ANGLES, [2 * x / SIZE for x in STEP]),
                "The turn is right. The shift is that of a grid from -1 to 1; ours counts voxels.",
            ),
            Mistake(
                "nothing found",
                lambda: _in_3d([0.0] * 3, [0.0] * 3),
                "This is no motion at all: the two images are the same, or the search did not "
                "move.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=_some_answers,
        reference=_supervised,
        remark="The loss is right. Which training ends better is for you to measure.",
        mistakes=(
            Mistake(
                "radians beside voxels",
                lambda found, true, size: (found - true).square().mean(),
                "An error of the matrix counts here as much as one of a voxel. A turn moves the "
                "rim by size / 2 times its angle: weigh it so.",
            ),
            Mistake(
                "diameter instead of radius",
                lambda found, true, size: _supervised(found, true, 2 * size),
                "The turn is weighed by the whole size. The rim lies half of it from the centre.",
            ),
            Mistake(
                "sum instead of mean",
                lambda found, true, size: _supervised(found, true, size) * found.numel(),
                "You have summed. With a mean the loss does not grow with the batch.",
            ),
            Mistake(
                "sign of the loss",
                lambda found, true, size: -_supervised(found, true, size),
                "The sign is that of a similarity. A loss gets smaller as the answer gets better.",
            ),
            Mistake(
                "absolute instead of squared",
                lambda found, true, size: ((found - true) * _unit(size)).abs().mean(),
                "This is the absolute error. The exercise asks for the squared one.",
            ),
        ),
    ),
)
