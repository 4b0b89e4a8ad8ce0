"""Chapter 03: landmarks, local correlation, scaling and squaring, symmetric velocities, labels."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from regkit import losses, models, spatial
from regkit.book.exercise import Exercise, Mistake
from regkit.book.exercises.overlap import mean_dice
from regkit.data import Subject, chain, population

# 1, landmarks


def _some_points() -> list[tuple[Tensor, Tensor]]:
    i, j = spatial.identity_grid((30, 40))
    svf = torch.stack([4 * torch.sin(j / 7), 3 * torch.cos(i / 6)])[None]
    points = torch.tensor([[[8.0, 12.0], [15.0, 20.5], [21.0, 9.0], [14.0, 30.0]]])
    return [(points, svf)]


def _carried(points: Tensor, disp: Tensor) -> Tensor:
    return spatial.warp_points(points, disp)


# 2, what LNCC sees


@cache
def _tissues() -> Tensor:
    """Which of four tissues a voxel shows, 0 to 3: (1, 1, 80, 96)."""
    labels = population(1, (80, 96))[0].labels[None]
    tissue = torch.zeros(labels.shape, dtype=torch.int64)
    for chosen, value in ((labels == 6, 1), (labels > 9, 2), ((labels > 0) & (labels < 3), 3)):
        tissue[chosen] = value
    return tissue


def _seen(greys: Tensor) -> Tensor:
    """How many different greys there are, and whether LNCC notices the change."""
    tissue = _tissues()
    changed = losses.lncc(greys.float()[tissue], tissue.float(), window=7)
    return torch.tensor([len(greys.unique()), changed.item() > 1e-3])


# 3, squarings


def _enough(largest: float) -> int:
    return max(0, math.ceil(math.log2(largest / 0.5)))


# 4, symmetric


def _some_velocities() -> list[tuple[Tensor, Tensor]]:
    i, j = spatial.identity_grid((20, 24))
    one = torch.stack([2 * torch.sin(j / 4), 2 * torch.cos(i / 5)])[None]
    other = torch.stack([-1.5 * torch.sin(j / 4 + 0.2), -2.2 * torch.cos(i / 5)])[None]
    return [(one, other)]


# 5, a head start


@cache
def _pairs(amplitude: float) -> list[tuple[Subject, Subject]]:
    return chain(population(4, (80, 96), seed=2, amplitude=amplitude))


@cache
def _mean_dice(amplitude: float = 1.6, mode: str = "nearest", share: float = 1.0) -> float:
    network = models.load("vxm_diff_brain_2d")

    def answer(moving: Subject, fixed: Subject) -> Tensor:
        disp: Tensor = network(moving.image[None], fixed.image[None]).disp
        return share * disp

    return mean_dice(_pairs(amplitude), answer, mode)


# 6, labels of one side


def _without(labels: Tensor, left: bool = True, inner: bool = True, fill: int = 0) -> Tensor:
    """Without the labels of one side. Below 10 the odd numbers are left, from 10 on the even ones.

    Args:
        left: which side goes.
        inner: do the paired structures below 10 go as well?
        fill: what takes the place.
    """
    paired = (labels > 0) & ((labels < 5) | (labels == 7) | (labels == 8))
    outer = labels >= 10
    odd = labels % 2 == 1
    side = (paired & (odd == left) if inner else torch.zeros_like(odd)) | (outer & (odd != left))
    return labels.masked_fill(side, fill)


EXERCISES = (
    Exercise(
        asks="tensor",
        inputs=_some_points,
        reference=lambda points, svf: _carried(points, spatial.integrate(-svf)),
        mistakes=(
            Mistake(
                "forward instead of backward",
                lambda points, svf: _carried(points, spatial.integrate(svf)),
                "This carries points of the fixed head to the moving one. An image is pulled and a "
                "point is pushed: you need the way back.",
            ),
            Mistake(
                "displacement negated",
                lambda points, svf: _carried(points, -spatial.integrate(svf)),
                "The negative of a displacement is not its inverse: it is read off at the wrong "
                "place. Negate what is integrated.",
            ),
            Mistake(
                "velocity not integrated",
                lambda points, svf: _carried(points, -svf),
                "The direction is right, but a velocity is no displacement yet.",
            ),
            Mistake(
                "axes in the order y, x",
                lambda points, svf: _carried(points.flip(-1), spatial.integrate(-svf)).flip(-1),
                "The coordinates of the points were read in the opposite order: the first is along "
                "array axis 0.",
            ),
            Mistake(
                "not moved",
                lambda points, svf: points,
                "The points are where they were.",
            ),
        ),
    ),
    Exercise(
        asks="numbers",
        reference=lambda: (0, 2, 1, 3),
        measure=_seen,
        mistakes=(
            Mistake(
                "a linear change",
                lambda: (5, 4, 3, 2),
                "LNCC does not see this one: your new greys are a number times the old ones, plus "
                "a number. Exchange two in the middle.",
            ),
            Mistake(
                "two tissues alike",
                lambda: (0, 1, 1, 3),
                "LNCC sees it, but two tissues have the same grey now: a border has gone. Give "
                "each its own.",
            ),
            Mistake(
                "two greys only",
                lambda: (0, 1, 1, 1),
                "Only two greys are left. Each of the four tissues keeps a brightness of its own.",
            ),
            Mistake(
                "one grey",
                lambda: (1, 1, 1, 1),
                "All four have the same grey: nothing is left to see.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=lambda: [(0.3,), (3.0,), (5.0,), (40.0,)],
        reference=_enough,
        mistakes=(
            Mistake(
                "one voxel instead of half, or rounded down",
                lambda v: max(0, math.ceil(math.log2(v))),
                "With so many the first step can be nearly a whole voxel. Half of one is the "
                "limit, and the number is rounded up.",
            ),
            Mistake(
                "divided instead of halved",
                lambda v: math.ceil(v / 0.5),
                "This is how many equal steps one would need. A squaring doubles what is there, so "
                "far fewer are enough.",
            ),
            Mistake(
                "one too many",
                lambda v: max(0, math.ceil(math.log2(v / 0.5))) + 1,
                "That is enough, but one fewer is too: the smallest number is asked.",
            ),
            Mistake(
                "natural logarithm",
                lambda v: max(0, math.ceil(math.log(v / 0.5))),
                "Each squaring doubles the step, so the logarithm has the base 2.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=_some_velocities,
        reference=lambda there, back: (there - back) / 2,
        mistakes=(
            Mistake(
                "added",
                lambda there, back: (there + back) / 2,
                "The two go in opposite directions, so their sum nearly cancels. Turn one round "
                "first.",
            ),
            Mistake(
                "not halved",
                lambda there, back: there - back,
                "This goes twice as far as each of the two: a mean is asked.",
            ),
            Mistake(
                "the way back",
                lambda there, back: (back - there) / 2,
                "This is the mean for the way from b to a. The exercise asks for a to b.",
            ),
            Mistake(
                "integrated too early",
                lambda there, back: (spatial.integrate(there) - spatial.integrate(back)) / 2,
                "You have averaged displacements, which do not add. Average the velocities, and "
                "integrate afterwards.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        reference=_mean_dice,
        tolerance=2e-3,
        remark="The first point of the curve is right; the rest of it is for you to draw.",
        mistakes=(
            Mistake(
                "labels interpolated",
                lambda: _mean_dice(mode="linear"),
                "The labels were interpolated linearly. Between 3 and 20 lie names of other "
                'structures: use mode="nearest".',
            ),
            Mistake(
                "the easy heads",
                lambda: _mean_dice(1.0),
                "This is the mean for amplitude 1. The exercise asks for 1.6.",
            ),
            Mistake(
                "from zero",
                lambda: _mean_dice(share=0.0),
                "This is the overlap without any registration: warp with the network's answer.",
            ),
            Mistake(
                "forward instead of backward",
                lambda: _mean_dice(share=-1.0),
                "This is worse than no registration: the displacement is used with the wrong sign.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=lambda: [(torch.arange(34).reshape(1, 2, 17).to(torch.uint8),)],
        reference=_without,
        remark="With such subjects you can train; what comes out is for you to measure.",
        mistakes=(
            Mistake(
                "the other side",
                lambda labels: _without(labels, left=False),
                "These are without the right side; the exercise asks for the left to go. Print "
                "`LABELS`.",
            ),
            Mistake(
                "all even numbers",
                lambda labels: labels.masked_fill(labels % 2 == 0, 0),
                "Below 10 it is the odd numbers that are left, and some structures have no side at "
                "all. Print `LABELS`.",
            ),
            Mistake(
                "only the cortex",
                lambda labels: _without(labels, inner=False),
                "The cortex is right. Below 10 there are structures of the left side as well: "
                "white matter, deep grey matter, cerebellum.",
            ),
            Mistake(
                "the middle as well",
                lambda labels: labels.masked_fill((labels < 10) | (labels % 2 == 0), 0),
                "Everything below 10 is gone, also ventricles, CSF and brain stem, which have no "
                "side, and the right side of the others.",
            ),
            Mistake(
                "marked instead of removed",
                lambda labels: _without(labels, fill=255),
                "The right voxels are chosen, but they hold 255. Background is 0.",
            ),
        ),
    ),
)
