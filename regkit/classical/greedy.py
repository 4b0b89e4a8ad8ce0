"""The engine: align one pair of images by a smooth map, found anew for this pair.

It climbs the similarity in small steps, from coarse copies of the images to fine ones. A step, with
u the map so far (as displacement), m the moved image, f the fixed one and E the dissimilarity:

    w = -dE/dm  grad m    where the moved image should look to become more like the fixed one
    v = K w'              the running mean w' of w, of a typical length, smoothed by a Gaussian K
    u <- v + u(x + v)     the step comes before the map: composed, not added
    u <- G u              the map itself is smoothed, a little

Composing small smooth steps keeps the map free of folds, where adding them would not (Christensen
et al. 1996; Vercauteren et al. 2009 call it compositive). Smoothing the step is the regularisation
of a fluid, smoothing the map that of an elastic body. The program greedy (Yushkevich et al. 2016)
works in this way.

What is ours: a running mean of the directions instead of the last one, over one scale for the whole
image. Adam (Kingma and Ba 2015), which FireANTs (Jena et al. 2024) moves by, has a scale for each
voxel, and so makes as much of noise in a flat region as of a border. Coarse levels are held stiffer
than the last one. Everything is in millimetres: of slices 5 mm apart no step leads 5 mm through
them. The gradient dE/dm is that of any loss, worked out by `regkit.losses`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regkit.classical.deformation import Deformation
from regkit.classical.pairs import check_one_grid
from regkit.classical.refine import with_gradients
from regkit.losses import lncc, mind_features, mind_ssc, mse, mutual_information
from regkit.messages import unknown
from regkit.spatial import (
    _twice_the_derivative,
    check_disp,
    check_spacing,
    compose,
    invert,
    jacobian_determinant,
    resize_disp,
    warp,
)
from regkit.transform import background

Progress = Callable[[float, float], None]  # takes the fraction done, 0 to 1, and the value
Dissimilarity = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Effort:
    """How far the engine goes.

    finest: the last level's voxels, in those of the image (2: twice as wide).
    steps: at most, of every level but the finest one. last: of a level in the image's own voxels.
    """

    finest: int
    steps: int
    last: int


#: name -> how far the engine goes with this effort.
EFFORTS = {
    "fast": Effort(2, 30, 0),
    "default": Effort(1, 30, 8),
    "best": Effort(1, 100, 40),
}
# Voxels along the shortest long axis of the coarsest level, at least. Two contrasts have little to
# go by in fewer: a map of 12 x 15 x 4 voxels led a slab out of its own slices.
COARSEST = {"lncc": 12, "mse": 12, "mind": 20, "mutual_information": 20}
WINDOW = {2: 9, 3: 5}  # voxels, of lncc: about a hundred voxels in a window
RATE = 2.0  # voxels of the level: a step, root mean square over the image, before it is smoothed
MEAN, SCALE = 0.9, 0.99  # of the running means of the directions and of their squares
# Standard deviations of K and of G, in voxels of the level: of coarse levels, of the image's own
# voxels. Coarse levels choose which fold of the brain goes to which: there a stiff map errs less.
# The image's own voxels may follow what they see.
SMOOTHING = {2: ((3.0, 0.7), (1.0, 0.4)), 3: ((3.0, 0.5), (1.5, 0.0))}
# Across contrasts each voxel knows less of where it belongs, so neighbours have to agree more:
# of coarse levels, of the image's own voxels. Chosen on seeds 100, 101 of studies/modalities.py.
STIFFER = {
    "mind": ((6.0, 1.0), (3.0, 1.0)),
    "mutual_information": ((6.0, 2.0), (4.0, 2.0)),
}
LONGEST = 1.0  # voxels of the level, of the longest step
PATIENCE, GAIN = 10, 0.01  # a level ends when so many steps bring less than this part of its gain
UNFOLD, NEAR = 20, 3  # times that a map is smoothed near its folds, at most; voxels that are near
# Of the size of an image, in memory at once, at most. MIND compares twelve features a voxel.
VOLUMES = {"lncc": 25, "mse": 25, "mutual_information": 30, "mind": 135}
MARGIN = 6  # voxels around what the images show
# Where nothing pulls, the map would fade to numbers so small that processors slow down a
# hundredfold; this many voxels keep it above them.
NEARLY_ZERO = 1e-10


def _compared(loss: Callable[[Tensor, Tensor], Tensor]) -> Dissimilarity:
    """A loss that compares voxel with voxel: only those inside the mask are shown to it."""

    def dissimilarity(moved: Tensor, fixed: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return loss(moved, fixed)
        inside = mask > 0.5
        if not inside.any():  # a mask of a few voxels, seen on a coarse level
            return moved.sum() * 0
        return loss(moved[inside][None, None, None], fixed[inside][None, None, None])

    return dissimilarity


def _around(loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Dissimilarity:
    """A loss that looks around each voxel: outside the mask it sees a constant in both images."""

    def dissimilarity(moved: Tensor, fixed: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return loss(moved, fixed, None)
        inside = mask > 0.5
        if not inside.any():
            return moved.sum() * 0
        seen = [torch.where(inside, x, x.detach()[inside].mean()) for x in (moved, fixed)]
        return loss(seen[0], seen[1], inside)

    return dissimilarity


def _local(moved: Tensor, fixed: Tensor, mask: Tensor | None) -> Tensor:
    return lncc(moved, fixed, WINDOW[fixed.ndim - 2], mask)


def _self_similarity(moved: Tensor, fixed: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return mind_ssc(moved, fixed)
    squares = (mind_features(moved) - mind_features(fixed)).square().mean(1, keepdim=True)
    return squares[mask].mean()


#: name -> the dissimilarity that the engine lowers, of the moved image, the fixed one and a mask.
DISSIMILARITIES: dict[str, Dissimilarity] = {
    "lncc": _around(_local),
    "mse": _compared(mse),
    "mutual_information": _compared(mutual_information),
    "mind": _around(_self_similarity),
}


@with_gradients
def greedy(
    moving: Tensor,
    fixed: Tensor,
    start: Tensor | None = None,
    *,
    spacing: float | Sequence[float] = 1.0,
    similarity: str = "lncc",
    effort: str = "default",
    mask: Tensor | None = None,
    moving_mask: Tensor | None = None,
    symmetric: bool = False,
    steps: int | None = None,
    progress: Progress | None = None,
) -> Deformation:
    """The smooth map that lays the moving image over the fixed one.

    No rigid or affine search comes before it: the images should roughly agree, as they do after
    `regkit.classical.align`.

    Args:
        moving, fixed: (1, 1, *S), on one grid, intensities of any scale.
        start: (1, d, *S), voxels, where to start: the answer of a network, say. By default 0.
        spacing: voxel size, mm.
        similarity: "lncc" for images of one contrast, of any brightness; "mse" where intensities
            are the same; "mind" or "mutual_information" for two contrasts.
        effort: "fast" stops at voxels twice as wide, "default" takes a few steps on the image's
            own, "best" as many as bring something.
        mask, moving_mask: (1, 1, *S), of the fixed and the moving image: what lies where one of
            them is 0 does not count.
        symmetric: let both images move, half-way each, as SyN does: the answer does not prefer one
            of them, and its inverse comes with it. Twice the time.
        steps: of each level at most, instead of the effort's; on the image's own voxels no more
            than the effort's.
        progress: called with the fraction done and the value of the dissimilarity.

    Returns:
        `disp`; with `symmetric` also `inverse`; `values` are the dissimilarity at every step, less
        is better. It differs between levels, as images differ in sharpness.

    Raises:
        ValueError: shapes that do not fit, a constant image, an unknown similarity or effort, masks
            that leave nothing to compare.
    """
    size = _check(moving, fixed, start, spacing, similarity, effort, steps)
    d, shape = fixed.ndim - 2, fixed.shape[2:]
    masks = _masks(moving_mask, mask, fixed.new_zeros(1, d, *shape) if start is None else start)
    pair = _Pair(moving.float(), fixed.float(), masks, start)
    none = (fixed.new_full((1, d, *pair.shape), NEARLY_ZERO, dtype=torch.float32) for _ in "ab")
    maps = [next(none) if pair.start is None else pair.start]
    if symmetric:
        maps.append(next(none))
    plan = _plan(pair.shape, size, similarity, EFFORTS[effort], steps)
    work = sum(math.prod(grid) * most for grid, _, most in plan)
    done, values = 0, []
    for grid, factor, most in plan:
        if most == 0:
            continue
        level = pair.level(grid, size, factor, similarity)
        maps = [resize_disp(u, grid) for u in maps]
        for value in level.climb(maps, most):
            values.append((tuple(grid), value))
            done += math.prod(grid)
            if progress is not None:
                progress(min(1.0, done / max(work, 1)), value)
        del level
        maps = [resize_disp(u, pair.shape) for u in maps]
    disp, inverse = maps[0], None
    if symmetric:
        # from the middle, one map leads to the moving image, the other to the fixed one
        back = [invert(u) for u in (disp, maps[1])]
        disp, inverse = compose(disp, back[1]), compose(maps[1], back[0])
        inverse = _unfolded(inverse)
    disp = _unfolded(disp)
    whole = partial(_whole, box=pair.box, shape=shape)
    return Deformation(whole(disp), None if inverse is None else whole(inverse), tuple(values))


class _Pair:
    """Both images and their masks, and the start, cut to where the images show something."""

    def __init__(
        self, moving: Tensor, fixed: Tensor, masks: list[Tensor | None], start: Tensor | None
    ):
        seen = moving if start is None else warp(moving, start, padding="border")
        self.box = _box([moving, seen, fixed])
        cut: Any = (..., *self.box)
        self.images, self.shape = [moving[cut], fixed[cut]], tuple(fixed[cut].shape[2:])
        self.masks = [None if x is None else x[cut] for x in masks]
        self.start = None if start is None else start[cut].float().clone()

    def level(self, grid: Sequence[int], size: Tensor, factor: int, similarity: str) -> _Level:
        """One level, see `_plan`. size: (d,), voxels of the images."""
        coarse, fine = STIFFER.get(similarity, SMOOTHING[len(grid)])
        widths = [
            float(h) * (n - 1) / (m - 1) if m > 1 else float(h)
            for h, n, m in zip(size, self.shape, grid, strict=True)
        ]
        return _Level(
            [_shrink(x, grid) for x in self.images],
            [None if x is None else _shrink(x, grid) for x in self.masks],
            [width / (factor * float(size.min())) for width in widths],
            coarse if factor > 1 else fine,
            DISSIMILARITIES[similarity],
        )


@with_gradients
def disagreement(
    moving: Tensor,
    fixed: Tensor,
    disp: Tensor,
    similarity: str = "lncc",
    mask: Tensor | None = None,
    moving_mask: Tensor | None = None,
) -> float:
    """What `greedy` minimises, of the images moved by a map (1, d, *S), voxels; less is better."""
    masks = _masks(moving_mask, mask, disp)
    level = _Level([moving.float(), fixed.float()], masks, [], (), DISSIMILARITIES[similarity])
    with torch.no_grad():
        moved = warp(level.images[0], disp, padding="border")
        return float(level.dissimilarity(moved, level.images[1], level.mask([disp])))


def expected(
    fixed: Tensor,
    *,
    spacing: float | Sequence[float] = 1.0,
    similarity: str = "lncc",
    effort: str = "default",
    symmetric: bool = False,
) -> tuple[float, int]:
    """Seconds that `greedy` takes at most, about, and bytes of memory.

    It measures steps on two small images, here and now: a step costs so much, and so much a voxel.
    """
    d = fixed.ndim - 2
    clock, voxels = [], []
    for side in (8, 8, *((64, 128) if d == 2 else (16, 40))):  # the first pays for what is loaded
        image = torch.arange(side**d, device=fixed.device).sin().reshape(1, 1, *[side] * d)
        level = _Level(
            [image, image.flip(2)],
            [None, None],
            [1.0] * d,
            SMOOTHING[d][0],
            DISSIMILARITIES[similarity],
        )
        start = time.perf_counter()
        for _ in level.climb([torch.full((1, d, *image.shape[2:]), NEARLY_ZERO).to(image)], 2):
            pass
        clock.append((time.perf_counter() - start) / 2)
        voxels.append(image.numel())
    each = max(0.0, (clock[-1] - clock[1]) / (voxels[-1] - voxels[1]))
    once = max(0.0, clock[1] - each * voxels[1])
    plan = _plan(fixed.shape[2:], check_spacing(spacing, d), similarity, EFFORTS[effort], None)
    seconds = sum((once + each * math.prod(grid)) * most for grid, _, most in plan)
    factor = 2 if symmetric else 1
    return factor * seconds, 4 * VOLUMES[similarity] * factor * fixed.numel()


def _check(
    moving: Tensor,
    fixed: Tensor,
    start: Tensor | None,
    spacing: float | Sequence[float],
    similarity: str,
    effort: str,
    steps: int | None,
) -> Tensor:
    """The voxel size (d,), or a ValueError for what cannot be registered."""
    check_one_grid(moving, fixed)
    if similarity not in DISSIMILARITIES:
        raise unknown("similarity", similarity, DISSIMILARITIES)
    if effort not in EFFORTS:
        raise unknown("effort", effort, EFFORTS)
    if steps is not None and steps < 0:
        raise ValueError(f"steps is {steps}, expected 0 or more.")
    if start is not None:
        check_disp(start, "start")
        if start.shape != (1, fixed.ndim - 2, *fixed.shape[2:]):
            raise ValueError(
                f"start has shape {tuple(start.shape)}, expected "
                f"{(1, fixed.ndim - 2, *fixed.shape[2:])}: a displacement on that grid."
            )
    return check_spacing(spacing, fixed.ndim - 2)


def _masks(moving: Tensor | None, fixed: Tensor | None, disp: Tensor) -> list[Tensor | None]:
    """Both masks, or a ValueError where they leave nothing to compare."""
    for name, mask in (("moving_mask", moving), ("mask", fixed)):
        if mask is not None and (mask.shape[:2] != (1, 1) or mask.shape[2:] != disp.shape[2:]):
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)}, expected {(1, 1, *disp.shape[2:])}, as the "
                "images."
            )
    masks = [None if x is None else (x > 0.5).to(disp) for x in (moving, fixed)]
    inside = None if masks[0] is None else warp(masks[0], disp)
    both = [x for x in (inside, masks[1]) if x is not None]
    if both and not (torch.stack(both).amin(0) > 0.5).any():
        raise ValueError(
            "moving_mask and mask have no voxel in common, expected masks of what both images show."
            if len(both) == 2
            else "The mask is empty, expected voxels that count."
        )
    return masks


def _box(images: Sequence[Tensor]) -> tuple[slice, ...]:
    """Where an image differs from its background, and a margin: the rest moves nothing."""
    shown = torch.stack([image != background(image) for image in images]).any(0)[0, 0]
    box = []
    for axis, n in enumerate(shown.shape):
        index = shown.movedim(axis, 0).flatten(1).any(1).nonzero()
        low, high = max(0, int(index.min()) - MARGIN), min(n, int(index.max()) + 1 + MARGIN)
        box.append(slice(low, high))
    return tuple(box)


def _whole(disp: Tensor, box: Sequence[slice], shape: Sequence[int]) -> Tensor:
    """A displacement in a box on the whole grid; beyond the box it goes on as it ends."""
    for axis, (part, n) in enumerate(zip(box, shape, strict=True)):
        index = torch.arange(n, device=disp.device).clamp(part.start, part.stop - 1) - part.start
        disp = disp.index_select(axis + 2, index)
    return disp


Plan = list[tuple[tuple[int, ...], int, int]]


def _plan(
    shape: Sequence[int], size: Tensor, similarity: str, effort: Effort, steps: int | None
) -> Plan:
    """The levels from coarse to fine: grid, voxel in smallest voxels of the image, most steps.

    A level has voxels of one width along all axes, but never finer ones than the image has.
    """

    def grid(factor: int) -> tuple[int, ...]:
        width = factor * float(size.min())
        wide = [max(float(h), width) / float(h) for h in size]
        return tuple(
            n if f == 1 else max(min(n, 4), round((n - 1) / f) + 1)
            for n, f in zip(shape, wide, strict=True)
        )

    factors = [effort.finest]
    while sorted(grid(2 * factors[0]))[1 - len(shape)] >= COARSEST[similarity]:
        factors.insert(0, 2 * factors[0])
    coarse = effort.steps if steps is None else steps
    last = effort.last if steps is None else min(steps, effort.last)
    return [(grid(f), f, last if f == 1 else coarse) for f in factors]


def _gaussian(old: int, new: int, sigma: float, like: Tensor) -> Tensor:
    """(new, old): blurs by sigma voxels and takes samples, the corner voxels at the corners.

    Cut off at four standard deviations; each row sums to 1, so a constant stays.
    """
    at = torch.linspace(0, old - 1, new) if new > 1 else torch.tensor([(old - 1) / 2])
    apart = at.double()[:, None] - torch.arange(old, dtype=torch.float64)
    weights = torch.exp(-0.5 * (apart / sigma) ** 2) * (apart.abs() <= max(4 * sigma, 1))
    return (weights / weights.sum(1, keepdim=True)).to(like)


def _along_axes(field: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply (B, C, *S) by a matrix along each axis."""
    for axis, matrix in enumerate(matrices):
        before, after = field.shape[: axis + 2], field.shape[axis + 3 :]
        if not after:  # one product of two matrices, where the other form takes many
            field = field @ matrix.T
            continue
        product = matrix @ field.reshape(math.prod(before), field.shape[axis + 2], -1)
        field = product.reshape(*before, len(matrix), *after)
    return field


def _unfolded(disp: Tensor) -> Tensor:
    """A map with the few folds smoothed away that sampling on voxels can leave, or a start had.

    Only what lies near a fold is smoothed.
    """
    d = disp.shape[1]
    pool = F.max_pool2d if d == 2 else F.max_pool3d
    for _ in range(UNFOLD):
        folds = jacobian_determinant(disp)[:, None] <= 0
        if not folds.any():
            break
        near = pool(folds.to(disp), 2 * NEAR + 1, 1, NEAR)
        share, smooth = (
            _along_axes(x, [_gaussian(n, n, 1.0, x) for n in x.shape[2:]]) for x in (near, disp)
        )
        disp = disp + share * (smooth - disp)
    return disp


def _shrink(image: Tensor, shape: Sequence[int]) -> Tensor:
    """An image on a coarser grid, blurred by half of what a new voxel is wide."""
    if tuple(image.shape[2:]) == tuple(shape):
        return image
    matrices = []
    for n, m in zip(image.shape[2:], shape, strict=True):
        wide = (n - 1) / max(m - 1, 1)
        matrices.append(_gaussian(n, m, 0.5 * wide if m < n else 1e-3, image))
    return _along_axes(image, matrices)


@dataclass(frozen=True, eq=False)
class _Level:
    """One level: moving and fixed image, their masks, voxel size in widths of the level's voxel."""

    images: list[Tensor]
    masks: list[Tensor | None]
    voxel: list[float]
    smoothing: tuple[float, ...]
    dissimilarity: Dissimilarity

    def climb(self, maps: list[Tensor], steps: int) -> Iterator[float]:
        """Improve the maps in place, of the moving image or of both; the value before each step."""
        # two maps that go half-way each: half the step, and as much variance of smoothing in all
        share = 1 / len(maps)
        smoothers = [
            [
                _gaussian(n, n, sigma / share**0.5 / h, maps[0])
                for n, h in zip(maps[0].shape[2:], self.voxel, strict=True)
                if sigma > 0
            ]
            for sigma in self.smoothing
        ]
        momenta = [_Momentum(u) for u in maps]
        best = [u.clone() for u in maps]
        values: list[float] = []
        for _ in range(steps):
            value, ways = self.directions(maps)
            yield value
            values.append(value)
            if value <= min(values):
                for u, kept in zip(maps, best, strict=True):
                    kept.copy_(u)
            if len(values) > PATIENCE:
                gain = min(values[:-PATIENCE]) - min(values[-PATIENCE:])
                if gain < GAIN * (values[0] - min(values)):
                    break
            for u, way, momentum in zip(maps, ways, momenta, strict=True):
                v = _along_axes(momentum.step(way), smoothers[0])
                longest = float(v.square().sum(1).max()) ** 0.5
                v *= share * min(1.0, LONGEST / max(longest, 1e-12))
                for axis, h in enumerate(self.voxel):
                    v[:, axis] /= h
                u.copy_(_along_axes(v.add_(warp(u, v, padding="border")), smoothers[1]))
            del ways, way, v  # memory for the next directions
        if values and values[-1] > min(values):  # the steps went past it, or follow noise
            for u, kept in zip(maps, best, strict=True):
                u.copy_(kept)

    def directions(self, maps: list[Tensor]) -> tuple[float, list[Tensor]]:
        """The value, and for each map the direction (1, d, *S) in which it falls fastest."""
        moved = [warp(image, u, padding="border") for image, u in zip(self.images, maps)]
        both = [*moved, *self.images[len(moved) :]]
        mask = self.mask(maps)
        for image in moved:
            image.requires_grad_()
        value = self.dissimilarity(both[0], both[1], mask)
        gradients = torch.autograd.grad(value, moved)
        ways = []
        for image, gradient in zip(moved, gradients, strict=True):
            # as large for few voxels as for many: the loss is a mean, and 1e-20 has no square
            gradient = gradient * -float(gradient.numel())
            image = image.detach()
            way = image.new_empty(1, len(self.voxel), *image.shape[2:])
            for axis, h in enumerate(self.voxel):
                slope = _twice_the_derivative(image, axis + 2)
                torch.mul(slope[0], gradient[0] / (2 * h), out=way[:, axis])
            ways.append(way)
        return float(value.detach()), ways

    def mask(self, maps: list[Tensor]) -> Tensor | None:
        """Where both images count, 0 to 1; None without masks."""
        parts = [
            mask if mask is None or index >= len(maps) else warp(mask, maps[index])
            for index, mask in enumerate(self.masks)
        ]
        given = [x for x in parts if x is not None]
        return torch.stack(given).amin(0) if given else None


class _Momentum:
    """The running mean of the directions, so scaled that its typical length is `RATE`."""

    def __init__(self, disp: Tensor):
        self.mean = torch.zeros_like(disp)
        self.square = self.steps = 0.0

    def step(self, way: Tensor) -> Tensor:
        """(1, d, *S), voxels of the level."""
        self.steps += 1
        self.mean.lerp_(way, 1 - MEAN)
        square = float(way.square().sum(1).mean())
        self.square += (1 - SCALE) * (square - self.square)
        typical = (self.square / (1 - SCALE**self.steps)) ** 0.5
        step: Tensor = self.mean * (RATE / (1 - MEAN**self.steps) / max(typical, 1e-30))
        return step
