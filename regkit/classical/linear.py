"""Rigid and affine registration of one pair by descent on the similarity itself: the classical twin
of the networks in `regkit.models.resnet`.

Both minimise one energy, the dissimilarity of the moved and the fixed image as a function of a few
numbers. The network answers from experience, in one step; `fit` starts anew for every pair and
follows the gradient (by the quasi-Newton method L-BFGS), from blurred, coarse copies of the images
to fine ones, so that it does not stop at the first small match.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from regkit.classical.refine import with_gradients
from regkit.classical.similarity import ENERGIES, Energy
from regkit.spatial import (
    affine_to_disp,
    check_spacing,
    compose_theta,
    identity_grid,
    resize,
    rigid_theta,
    warp,
)
from regkit.transform import blur

KINDS = ("rigid", "affine")
Progress = Callable[[float], None]  # takes the fraction done, 0 to 1

COARSEST = 24  # voxels along the longest axis of the coarsest level, about
# Turns that are tried first, at the coarsest level, in degrees; in 3D about each axis in turn. The
# far ones are a class of their own: heads that lie on their side, or upside down.
NEAR = (20.0, -20.0, 40.0, -40.0, 60.0, -60.0)
FAR = (80.0, -80.0, 100.0, -100.0, 120.0, -120.0, 140.0, -140.0, 160.0, -160.0, 180.0)
GUESSES = {"near": 4, "far": 2}  # so many of the best of either class are followed
ITERATIONS = 40  # of L-BFGS per level, at most
SEARCHING = 15  # and after each of the first turns
# Descent stops where a step changes the energy by less than this: at the last level, and before it.
EXACT, ROUGH = 1e-8, 1e-5


@with_gradients
def fit(
    moving: Tensor,
    fixed: Tensor,
    kind: str = "rigid",
    similarity: str = "mutual_information",
    theta: Tensor | None = None,
    spacing: float | Sequence[float] = 1.0,
    iterations: int = ITERATIONS,
    search: bool = True,
    levels: int | None = None,
    progress: Progress | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The rigid or affine map that minimises the dissimilarity of one pair.

    Args:
        moving: (1, 1, *M). fixed: (1, 1, *S).
        kind: "rigid" (turn and shift), or "affine" (stretch and shear as well).
        similarity: "ncc" for images of one kind, "mutual_information" for any two. "lncc", the mean
            of the correlations in windows of 5 voxels, follows an "ncc": for two subjects of one
            contrast it is slower and better, as it looks at borders everywhere alike. See
            `regkit.classical.similarity`.
        theta: (1, d, d+1), where to start; by default the identity.
        spacing: voxel size of the fixed image: a rigid motion is rigid in millimetres.
        iterations: of L-BFGS per level, at most.
        search: at the coarsest level try turns of a full circle (in 3D about each axis in turn),
            and the shift that lays the centres of mass over each other. Without it only the nearest
            minimum is found.
        levels: of the pyramid, the finest ones; by default all, from about 24 voxels up. 1 is plain
            descent at full size, to polish the answer of a network.
        progress: called with the fraction done, 0 to 1.
        mask: (1, 1, *S), of the fixed image: the similarity counts where it is not 0, alone.

    Returns:
        (1, d, d+1) float32, voxels, as in `regkit.spatial.affine_to_disp`: fixed voxel -> moving
        voxel. The numbers of the motion, and every sum over voxels, are float64, so that descent
        stops where the images say and not where rounding does: with another number of threads the
        answer is the same to a thousandth of a voxel.

    Raises:
        ValueError: unknown kind or similarity, shapes that do not fit, an axis of one voxel, a
            constant image, an empty mask.
    """
    _check_pair(moving, fixed)
    _check_mask(mask, fixed)
    d = fixed.ndim - 2
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected 'rigid' or 'affine'.")
    if similarity not in ENERGIES:
        raise ValueError(f"similarity is {similarity!r}, expected one of {', '.join(ENERGIES)}.")
    if levels is not None and levels < 1:
        raise ValueError(f"levels is {levels}, expected 1 or more.")
    size = check_spacing(spacing, d)
    start = torch.eye(d, d + 1, dtype=torch.float64)[None] if theta is None else theta.detach()
    shapes = _levels(tuple(fixed.shape[2:]))[-levels if levels else 0 :]

    def descend(
        start: Tensor, kind: str, similarity: str, shapes: Sequence[Sequence[int]], search: bool
    ) -> Tensor:
        energy = ENERGIES[similarity]
        at = partial(_level, moving, fixed, mask, size=size, kind=kind, energy=energy)
        return _from_coarse_to_fine(at, start.double(), shapes, iterations, search, progress)

    if not search:
        return descend(start, kind, similarity, shapes, False).float()
    wide = "ncc" if similarity == "lncc" else similarity  # the hills of lncc are narrow
    if kind == "affine":  # turn and shift first; the finest level adds nothing that stays
        start = descend(start, "rigid", wide, shapes[:-1] or shapes, True)
    start = descend(start, kind, wide, shapes, kind == "rigid")
    if similarity == "lncc":
        start = descend(start, kind, similarity, shapes[-1:], False)
    return start.float()


def _from_coarse_to_fine(
    level_at: Callable[..., _Level],
    start: Tensor,
    shapes: Sequence[Sequence[int]],
    iterations: int,
    search: bool,
    progress: Progress | None,
) -> Tensor:
    """`start`, on the grid of the fixed image, after descent on one level after the other."""
    found = start
    for number, shape in enumerate(shapes):
        level = level_at(start, shape)
        motion = level.whole
        if number == 0:
            numbers = torch.zeros(motion.count, dtype=torch.float64)
            if search:
                turn, numbers = _search(level, iterations)
                start = compose_theta(start, motion.turn(turn))
                level = level.turned(turn)
        last = number == len(shapes) - 1
        numbers = _descend(level, numbers, iterations, EXACT if last else ROUGH)
        found = compose_theta(start, motion.theta(numbers))
        if progress is not None:
            progress((number + 1) / len(shapes))
    return found


def _check_mask(mask: Tensor | None, fixed: Tensor) -> None:
    """Raise ValueError for a mask of another grid, or one that leaves nothing."""
    if mask is None:
        return
    if mask.shape != fixed.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, expected {tuple(fixed.shape)}, as fixed."
        )
    if not (mask > 0).any():
        raise ValueError("mask is 0 everywhere, expected a region of the fixed image.")
    inside = fixed[mask > 0]
    if inside.min() == inside.max():
        raise ValueError("fixed is constant inside mask, expected a region that shows something.")


def _check_pair(moving: Tensor, fixed: Tensor) -> None:
    """Raise ValueError unless both are (1, 1, *S) of as many axes and neither is constant."""
    for name, image in (("moving", moving), ("fixed", fixed)):
        if image.shape[:2] != (1, 1) or image.ndim not in (4, 5) or image.ndim != fixed.ndim:
            raise ValueError(
                f"{name} has shape {tuple(image.shape)}, expected (1, 1, H, W) or (1, 1, D, H, W), "
                "as the other."
            )
        if min(image.shape[2:]) < 2:
            raise ValueError(
                f"{name} has shape {tuple(image.shape)}, expected 2 voxels or more along each "
                "axis (a slice is an image of two axes)."
            )
        if image.min() == image.max():
            raise ValueError(
                f"{name} is constant, expected an image: the correlation is undefined."
            )


class _Motion:
    """A rigid or affine motion about the centre of the fixed image, as a few numbers in mm.

    A turn by an angle counts as the way of a point at the rim, so that all numbers are alike in
    size: descent then takes steps that fit each of them.
    """

    def __init__(self, kind: str, shape: Sequence[int], spacing: Tensor):
        self.kind, self.d, self.spacing = kind, len(shape), spacing
        self.turns = (1 if self.d == 2 else 3) if kind == "rigid" else self.d**2
        self.count = self.turns + self.d
        self.radius = float((spacing * (torch.tensor(shape) - 1)).max()) / 2

    def theta(self, numbers: Tensor) -> Tensor:
        """(count,) -> (1, d, d+1) on this grid."""
        linear, shift = numbers[: self.turns] / self.radius, numbers[self.turns :] / self.spacing
        if self.kind == "rigid":
            return rigid_theta(linear[None], shift[None], self.spacing)
        matrix = torch.eye(self.d, dtype=linear.dtype) + linear.reshape(self.d, self.d)
        matrix = matrix * self.spacing / self.spacing[:, None]
        return torch.cat([matrix, shift[:, None]], dim=1)[None]

    def turn(self, angles: Tensor) -> Tensor:
        """(1, d, d+1) of a turn about the centre by these angles, see `rigid_theta`."""
        return rigid_theta(angles[None], torch.zeros(1, self.d).to(angles), self.spacing)


def _at_level(
    theta: Tensor,
    fixed: Sequence[int],
    new_fixed: Sequence[int],
    moving: Sequence[int],
    new_moving: Sequence[int],
) -> Tensor:
    """The same map (1, d, d+1) between resized grids: corner voxels stay corner voxels."""
    down = theta.new_tensor([(n - 1) / max(m - 1, 1) for n, m in zip(fixed, new_fixed)])
    up = theta.new_tensor([(m - 1) / max(n - 1, 1) for n, m in zip(moving, new_moving)])
    old_centre = (theta.new_tensor(fixed) - 1) / 2
    new_centre = (theta.new_tensor(new_fixed) - 1) / 2
    linear = up[:, None] * theta[0, :, :-1] * down
    shift = up * (old_centre + theta[0, :, -1]) - new_centre
    return torch.cat([linear, shift[:, None]], dim=1)[None]


@dataclass(frozen=True, eq=False)
class _Level:
    """One level of the pyramid: two images, where to start, and what is minimised.

    start: (1, d, d+1) on this level; the motion comes before it.
    motion, whole: the same motion, on this level and on the grid of the fixed image.
    """

    moving: Tensor
    fixed: Tensor
    start: Tensor
    motion: _Motion
    whole: _Motion
    dissimilarity: Energy

    def energy(self, numbers: Tensor) -> Tensor:
        theta = compose_theta(self.start, self.motion.theta(numbers))
        return self.dissimilarity(warp(self.moving, affine_to_disp(theta, self.fixed.shape[2:])))

    def turned(self, angles: Tensor) -> _Level:
        """With a turn by these angles (see `rigid_theta`) before `start`."""
        return replace(self, start=compose_theta(self.start, self.motion.turn(angles)))

    @torch.no_grad()
    def value(self, numbers: Tensor) -> float:
        return float(self.energy(numbers))


def _level(
    moving: Tensor,
    fixed: Tensor,
    mask: Tensor | None,
    start: Tensor,
    shape: Sequence[int],
    size: Tensor,
    kind: str,
    energy: Callable[[Tensor, Tensor, Tensor | None], Energy],
) -> _Level:
    """Both images on the grid `shape` of the pyramid; start and size are those of the finest."""
    whole, whole_moving = tuple(fixed.shape[2:]), tuple(moving.shape[2:])
    factor = [(n - 1) / max(m - 1, 1) for n, m in zip(whole, shape)]
    moving_shape = tuple(max(1, round((n - 1) / f) + 1) for n, f in zip(whole_moving, factor))
    small_moving, small_fixed = _smaller(moving, moving_shape), _smaller(fixed, shape)
    return _Level(
        small_moving,
        small_fixed,
        _at_level(start, whole, shape, whole_moving, moving_shape),
        _Motion(kind, shape, size * torch.tensor(factor, dtype=torch.float64)),
        _Motion(kind, whole, size),
        energy(small_moving, small_fixed, _smaller_mask(mask, shape)),
    )


def _smaller_mask(mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """On another grid, as wide as it was: a voxel that it touches belongs to it."""
    return None if mask is None else (resize((mask > 0).float(), shape) > 0).float()


def _descend(level: _Level, numbers: Tensor, iterations: int, tolerance: float = EXACT) -> Tensor:
    numbers = numbers.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [numbers], max_iter=iterations, tolerance_change=tolerance, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = level.energy(numbers)
        loss.backward()
        return loss

    optimiser.step(closure)
    return numbers.detach()


def _search(level: _Level, iterations: int) -> tuple[Tensor, Tensor]:
    """The best of several first turns, as angles, and the numbers that descent adds to it."""
    followed = []
    for name, count in GUESSES.items():
        guesses = [
            (turn, level.turned(turn), numbers)
            for turn in _turns(level.motion.turns, name)
            for numbers in _first_shifts(level, turn)
        ]
        guesses.sort(key=lambda guess: guess[1].value(guess[2]))
        for turn, turned, numbers in guesses[:count]:
            numbers = _descend(turned, numbers, min(iterations, SEARCHING), ROUGH)
            followed.append((turned.value(numbers), turn, numbers))
    _, turn, numbers = min(followed, key=lambda end: end[0])
    return turn, numbers


def _turns(count: int, name: str) -> list[Tensor]:
    """Angles (count,) in radians of the first turns "near" or "far"; see `rigid_theta`."""
    angles = NEAR if name == "near" else FAR
    turns = [torch.zeros(count, dtype=torch.float64)] if name == "near" else []
    for axis in range(count):
        for degrees in angles:
            turns.append(torch.zeros(count, dtype=torch.float64))
            turns[-1][axis] = math.radians(degrees)
    return turns


def _first_shifts(level: _Level, turn: Tensor) -> list[Tensor]:
    """Numbers of two shifts after a turn: none, and centre of mass on centre of mass."""
    motion, d = level.motion, level.motion.d
    still = torch.zeros(motion.count, dtype=torch.float64)
    # where, from the fixed centre, `start` finds the middle of the moving image
    centre = (torch.tensor(level.fixed.shape[2:], dtype=torch.float64) - 1) / 2
    target = _centre_of_mass(level.moving) - centre - level.start[0, :, d]
    target = torch.linalg.solve(level.turned(turn).start[0, :, :d], target)
    shift = (target - (_centre_of_mass(level.fixed) - centre)) * motion.spacing
    return [still, torch.cat([still[: motion.turns], shift])]


def _centre_of_mass(image: Tensor) -> Tensor:
    """(d,) voxels, of the intensities above the smallest."""
    mass = (image - image.min())[0, 0].double()
    return (identity_grid(mass.shape) * mass).flatten(1).sum(1) / mass.sum()


def _levels(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Grids from coarse to fine, each about twice as fine as the one before; the last is `shape`.

    The corner voxels stay corner voxels, so that the centre stays the centre.
    """
    levels = [tuple(shape)]
    while max(levels[0]) >= 2 * COARSEST:
        levels.insert(0, tuple(max((n + 1) // 2, min(n, 8)) for n in levels[0]))
    return levels


def _smaller(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Blurred by what is lost, then resampled: (1, 1, *M) to (1, 1, *shape)."""
    if tuple(image.shape[2:]) == tuple(shape):
        return image
    return resize(blur(image, [n / m for n, m in zip(image.shape[2:], shape)]), shape)
