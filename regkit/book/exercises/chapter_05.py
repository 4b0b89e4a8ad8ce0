"""Chapter 05: steps that are joined, what adding them does, blur, weights, and when to stop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regkit import metrics, spatial
from regkit.book.exercise import Exercise, Mistake

# 1, steps in a row


def _some_steps() -> list[tuple[Tensor]]:
    """Three steps, (3, 1, 2, 30, 36): a bend, a turn by 20 degrees, a squeeze along axis 0."""
    i, j = spatial.identity_grid((30, 36))
    bend = torch.stack([2 * torch.sin(j / 6), 1.5 * torch.cos(i / 5)])[None]
    turn = spatial.rigid_theta(torch.tensor([[math.radians(20)]]), torch.zeros(1, 2))
    squeeze = torch.stack([-0.2 * (i - 14.5), 0 * j])[None]
    return [(torch.stack([bend, spatial.affine_to_disp(turn, (30, 36)), squeeze]),)]


def _joined(steps: Tensor) -> Tensor:
    disp = steps[0]
    for step in steps[1:]:
        disp = spatial.compose(disp, step)
    return disp


def _moved_on(steps: Tensor) -> Tensor:
    """Each step is carried along by what was found before it, and added."""
    disp = steps[0]
    for step in steps[1:]:
        disp = disp + spatial.warp(step, disp, padding="border")
    return disp


# 2, two turns


def _of_matrix(a: float, c: float) -> tuple[float, float]:
    """Angle and stretch of a turn whose matrix has the first column (a, c)."""
    return math.atan2(c, a), math.hypot(a, c)


def _summed(alpha: float) -> tuple[float, float]:
    return _of_matrix(2 * math.cos(alpha) - 1, 2 * math.sin(alpha))


# 3, a sum that folds

RIGHT, PLACES, AGAINST, ITSELF, COMPOSED, BOTH, NOTHING = range(7)


def _squeeze(along: tuple[float, float]) -> Tensor:
    """Towards the centre, (1, 2, 21, 21): each axis by a share of the distance."""
    centred = spatial.identity_grid((21, 21)) - 10
    return (torch.tensor(along).reshape(2, 1, 1) * -centred)[None]


def _wave() -> Tensor:
    """Waves of 12 voxels, (1, 2, 21, 21), too short for the grid: composed, they fold."""
    i, j = spatial.identity_grid((21, 21))
    return torch.stack([1.5 * torch.sin(j / 2), 1.5 * torch.sin(i / 2)])[None]


def _folds(disp: Tensor) -> bool:
    return metrics.folding_count(disp).item() > 0


def _alone(disp: Tensor) -> int:
    """What a displacement does by itself, composed with itself, and added to itself."""
    if _folds(disp):
        return ITSELF
    if _folds(spatial.compose(disp, disp)):
        return COMPOSED
    if _folds(2 * disp):
        return RIGHT
    along = torch.stack([disp[0, axis].diff(dim=axis).min() for axis in range(2)])
    return BOTH if (along < -0.5).all() else NOTHING


def _sum_that_folds(disp: Tensor) -> int:
    """Does a sum fold, and nothing else? If not, would a change of it do?"""
    disp = disp.float()
    found = _alone(disp)
    if found == RIGHT:
        return RIGHT
    if _alone(disp - spatial.identity_grid((21, 21))) == RIGHT:
        return PLACES
    return AGAINST if _alone(-disp) == RIGHT else found


# 4, what an interpolation costs


def _kept(xi: float, a: float) -> float:
    return math.sqrt(1 - 2 * a * (1 - a) * (1 - math.cos(xi)))


# 6, when to stop


def _some_curves() -> list[tuple[Tensor]]:
    return [
        (torch.tensor([0.50, 0.62, 0.68, 0.70, 0.702, 0.701, 0.703]),),
        (torch.tensor([0.80, 0.83, 0.831, 0.85, 0.86, 0.861, 0.861]),),
        (torch.tensor([0.40, 0.46, 0.51, 0.55, 0.58, 0.60, 0.61]),),
        (torch.tensor([0.90, 0.89, 0.91, 0.92, 0.91, 0.91, 0.91]),),
    ]


def _stop(alike: Tensor, least: float = 0.005) -> int:
    rises = (alike.diff() >= least).tolist()
    return [*rises, False].index(False)


EXERCISES = (
    Exercise(
        asks="tensor",
        inputs=_some_steps,
        reference=_joined,
        mistakes=(
            Mistake(
                "added instead of composed",
                lambda steps: steps.sum(dim=0),
                "The steps were added. Each was found on an image that the steps before it had "
                "warped.",
            ),
            Mistake(
                "the wrong order",
                lambda steps: _joined(steps.flip(0)),
                "The order is exchanged. The newest step is the last warp: it is *then* in "
                "`compose(first, then)`.",
            ),
            Mistake(
                "step warped instead of displacement",
                _moved_on,
                "You have warped the new step by what was found before. It is the other way round: "
                "the new step says where to read what was found before.",
            ),
            Mistake(
                "last step only",
                lambda steps: steps[-1],
                "This is the last step alone: what was found before it is lost.",
            ),
            Mistake(
                "places instead of a displacement",
                lambda steps: _joined(steps) + spatial.identity_grid((30, 36)),
                "These are the places x + u(x). A displacement is u(x) alone.",
            ),
            Mistake(
                "normalised coordinates",
                lambda steps: _joined(steps) * torch.tensor([2 / 29, 2 / 35]).reshape(1, 2, 1, 1),
                "This is on a grid from -1 to 1. A displacement is in voxels.",
            ),
        ),
    ),
    Exercise(
        asks="numbers",
        inputs=lambda: [(math.radians(10),), (math.radians(40),), (math.radians(80),)],
        reference=_summed,
        mistakes=(
            Mistake(
                "composed",
                lambda alpha: (2 * alpha, 1.0),
                "This is what composing makes: a turn by twice the angle. What does the sum make?",
            ),
            Mistake(
                "missing identity",
                lambda alpha: _of_matrix(2 * math.cos(alpha) - 2, 2 * math.sin(alpha)),
                "x itself is missing: this is the matrix of the displacement 2 (R - I). The map is "
                "x + u(x).",
            ),
            Mistake(
                "identity not taken off",
                lambda alpha: (alpha, 2.0),
                "Twice R is not it: the displacement of a turn is R - I, and that is what is added "
                "twice.",
            ),
            Mistake(
                "degrees",
                lambda alpha: (math.degrees(_summed(alpha)[0]), _summed(alpha)[1]),
                "The stretch is right. The angle is in degrees where radians are asked.",
            ),
            Mistake(
                "area",
                lambda alpha: (_summed(alpha)[0], _summed(alpha)[1] ** 2),
                "The angle is right. Your second number is by how much an area grows; a length is "
                "asked.",
            ),
            Mistake(
                "axes exchanged",
                lambda alpha: (-_summed(alpha)[0], _summed(alpha)[1]),
                "The turn goes the wrong way round: the first component belongs to array axis 0, "
                "and R is (cos, -sin) over (sin, cos).",
            ),
            Mistake(
                "atan instead of atan2",
                lambda alpha: (
                    math.atan(2 * math.sin(alpha) / (2 * math.cos(alpha) - 1)),
                    _summed(alpha)[1],
                ),
                "For small angles it is right. For large ones the cosine of the new angle is "
                "negative, and `atan` cannot tell: take `atan2`.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        reference=lambda: _squeeze((0.6, 0.0)),
        measure=_sum_that_folds,
        remark="How much a real cascade folds with a plus sign is in the chapter.",
        mistakes=(
            Mistake(
                "too weak",
                lambda: _squeeze((0.3, 0.0)),
                "Nothing folds, the sum neither. One voxel further, how much has the displacement "
                "to fall so that twice of it overtakes the place itself?",
            ),
            Mistake(
                "folds by itself",
                lambda: _squeeze((1.2, 0.0)),
                "Your displacement folds already by itself.",
            ),
            Mistake(
                "both axes",
                lambda: _squeeze((0.6, 0.6)),
                "Twice of it turns *both* axes round. Two mirror images make a turn, and the "
                "determinant is positive again: squeeze along one axis only.",
            ),
            Mistake(
                "stretched",
                lambda: _squeeze((-0.6, 0.0)),
                "This pulls the places apart, and no sum of it folds. Change its sign.",
            ),
            Mistake(
                "places instead of a displacement",
                lambda: _squeeze((0.6, 0.0)) + spatial.identity_grid((21, 21)),
                "These are the places x + u(x). The displacement is u(x), without x.",
            ),
            Mistake(
                "composed folds as well",
                _wave,
                "Composed with itself it folds as well: it bends within a few voxels, and the grid "
                "is too coarse for that. Take a smoother one.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=lambda: [(math.pi / 2, 0.5), (math.pi / 2, 0.3), (1.0, 0.1), (2.5, 0.8)],
        reference=_kept,
        mistakes=(
            Mistake(
                "square of the height",
                lambda xi, a: _kept(xi, a) ** 2,
                "This is the factor of the wave's *square*. Take the root.",
            ),
            Mistake(
                "half a voxel only",
                lambda xi, a: math.cos(xi / 2),
                "For a shift by half a voxel it is right. Your function does not depend on a.",
            ),
            Mistake(
                "the real part",
                lambda xi, a: 1 - a + a * math.cos(xi),
                "This is the new value at a crest of the old wave. But the crest has moved: take "
                "the length of the complex number.",
            ),
            Mistake(
                "the shift alone",
                lambda xi, a: math.cos(a * xi),
                "This is the value of a wave that was shifted exactly. Linear interpolation mixes "
                "two neighbours, and makes it lower.",
            ),
            Mistake(
                "nothing is lost",
                lambda xi, a: 1.0,
                "So it is for whole voxels. In between, two neighbours are mixed.",
            ),
            Mistake(
                "cycles instead of radians",
                lambda xi, a: _kept(2 * math.pi * xi, a),
                "xi is in radians per voxel already.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=lambda: [(1,), (2,), (3,), (5,)],
        reference=lambda n: 0.1 * n,
        mistakes=(
            Mistake(
                "unchanged",
                lambda n: 0.1,
                "With the same weight n steps pay less than one: the slopes are squared before "
                "they are added up.",
            ),
            Mistake(
                "the wrong direction",
                lambda n: 0.1 / n,
                "The wrong direction: small steps are cheap already, so their weight has to grow.",
            ),
            Mistake(
                "one step",
                lambda n: 0.1 * n**2,
                "With this weight *one* of the steps pays as much as the whole. There are n of "
                "them.",
            ),
            Mistake(
                "n - 1 instead of n",
                lambda n: 0.1 * (n - 1),
                "With n = 1 nothing would be asked of a single network.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=_some_curves,
        reference=_stop,
        remark="What the rule does to the Dice is for you to measure.",
        mistakes=(
            Mistake(
                "one look too many",
                lambda alike: min(_stop(alike) + 1, len(alike) - 1),
                "One too many: the look that rises by too little is not counted.",
            ),
            Mistake(
                "the best of all looks",
                lambda alike: alike.argmax(),
                "This is the look with the highest likeness of all. The rule stops at the first "
                "look that gains too little, and does not see what comes later.",
            ),
            Mistake(
                "any rise",
                lambda alike: _stop(alike, 1e-6),
                "You go on for any rise, however small. The rule asks for 0.005.",
            ),
            Mistake(
                "sign of the loss",
                lambda alike: _stop(-alike),
                "The sign is wrong: a likeness rises when the images come closer. It is 1 minus "
                "the loss.",
            ),
            Mistake(
                "never",
                lambda alike: len(alike) - 1,
                "You use all looks, whatever the likeness says. When does a look gain too little?",
            ),
            Mistake(
                "looks that gain, counted",
                lambda alike: (alike.diff() >= 0.005).sum(),
                "You have counted all looks that gain. The rule stops at the first that does not, "
                "and later ones never happen.",
            ),
        ),
    ),
    Exercise(
        asks="numbers",
        reference=lambda: (1, 3, 3, 0.3, 0.3, 0.1),
        remark="This is a fair plan. Which cascade you would ship is not checked: train them.",
        mistakes=(
            Mistake(
                "nine looks",
                lambda: (3, 3, 3, 0.3, 0.3, 0.1),
                "The weights are right. Three networks that are repeated three times look nine "
                "times.",
            ),
            Mistake(
                "as in training",
                lambda: (1, 3, 1, 0.3, 0.3, 0.1),
                "The weights are right. The third cascade would look once in the test, and the "
                "others three times.",
            ),
            Mistake(
                "one weight for all",
                lambda: (1, 3, 3, 0.1, 0.1, 0.1),
                "The repeats are right. A cascade that is trained with three steps pays a third "
                "for the same displacement, so its weight has to grow.",
            ),
            Mistake(
                "networks counted instead of steps",
                lambda: (1, 3, 3, 0.3, 0.1, 0.1),
                "The repeats are right. Smoothness is asked of each *step*, and the second cascade "
                "takes three steps in training, with one network.",
            ),
            Mistake(
                "steps of the test counted",
                lambda: (1, 3, 3, 0.3, 0.3, 0.3),
                "The repeats are right. The weight belongs to the training, and there the third "
                "cascade takes one step.",
            ),
        ),
    ),
)
