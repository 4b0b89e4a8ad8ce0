"""The rigid or affine map of two images in physical space, and whether to believe it.

`regkit.classical.fit` always answers. Of two images that have little in common the answer may be
anything: an image turned upside down, pressed flat, or thrown out of view. So `aligned` holds a
ladder of answers, affine, rigid, none, and takes the highest that is sane; what it refused, it
says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regkit.classical.linear import KINDS, Progress, fit
from regkit.classical.similarity import BINS, ENERGIES
from regkit.io import Image
from regkit.losses import ncc
from regkit.spatial import warp
from regkit.transform import Floats, Grid, check_one_plane, resample

# Finer than this many voxels costs time and moves an affine map by less than a tenth of a voxel.
LARGEST = 400_000
COARSE = 50_000  # what the search looks at
AUTO = "auto"
STRETCH = 2.2  # no two organs of a kind differ by more than 2 along any direction
OVERLAP = 1 / 3  # of what two fields of view of these sizes can have
# Images that correlate better than this may be of one kind, and are believed. Seen, aligned: heads
# of two people 0.97, T1 and T2 0.85, two visits of a lung 0.89, MR and ultrasound 0.3 to 0.7.
ALIKE = 0.8
# And a curve through their joint histogram leaves at least this part of the variance that a line
# does. Seen: 0.58 or more for one kind, 0.46 for T1 and T2, 0.11 for a head and its square root.
CURVED = 0.5
# There and back, a point may come to lie so far from where it was, in the mean distance of a point
# from the centre. Seen: 0.01 to 0.05 where the answer is right, 0.8 to 1.7 where it is not.
ASTRAY = 0.25
# An intensity that fills what was not measured lies so far below all others, in their range, and
# above it lies the true background, at least this part of the image.
GAP, BACKGROUND = 0.2, 0.1


@dataclass(frozen=True, eq=False)
class Aligned:
    """What `aligned` found.

    matrix: (4, 4) float64, a point of the fixed image in mm (RAS) -> its counterpart in the moving
        image in mm (RAS).
    warnings: one sentence for each answer that was refused.
    believed: False where no answer was left, so that the matrix is what the headers say.
    """

    matrix: Floats
    warnings: tuple[str, ...] = ()
    believed: bool = True


def align(
    moving: Image,
    fixed: Image,
    kind: str = "affine",
    progress: Progress | None = None,
    largest: int = LARGEST,
    similarity: str = AUTO,
    mask: Tensor | None = None,
) -> Floats:
    """The rigid or affine map that lays the moving image over the fixed one, in physical space.

    Args:
        moving, fixed: images of 2 or 3 axes, see `regkit.io.as_image`. Their grids may differ.
        kind, progress: as in `fit`.
        largest: each image is brought to cubic voxels, about this many of them, if it has more. The
            search takes 50,000 at most.
        similarity: as in `fit`, or "auto": mutual information, and lncc after it where the images
            are of one kind and have enough voxels.
        mask: (1, 1, *S) on the fixed grid: the similarity counts where it is not 0, alone.

    Returns:
        (4, 4) float64: a point of the fixed image in mm (RAS) -> its counterpart in the moving
        image in mm (RAS). This is the pull-back direction, as for displacements. In 2D the map
        stays in the plane of the slices. Where no answer can be believed, see `aligned`, it is the
        identity: what the headers say.

    Raises:
        ValueError: unknown kind or similarity, 2D with 3D, slices of different planes, a constant
            image, an axis of one voxel, a mask that does not fit.
    """
    return aligned(moving, fixed, kind, progress, largest, similarity, mask).matrix


def aligned(
    moving: Image,
    fixed: Image,
    kind: str = "affine",
    progress: Progress | None = None,
    largest: int = LARGEST,
    similarity: str = AUTO,
    mask: Tensor | None = None,
) -> Aligned:
    """As `align`, with a sentence for each answer that was refused.

    An answer is refused if it mirrors the image, stretches it by more than `STRETCH` along any
    direction, takes it out of view, or fits less well than the headers do. Images that hardly
    correlate after it are also registered the other way round: if the two maps do not undo each
    other, neither is an answer. The next lower answer is taken then: the rigid map, or none.
    """
    _check(moving, fixed, kind, similarity)
    coarse = _Pair.of(moving, fixed, mask, min(largest, COARSE))
    wide = {AUTO: "mutual_information", "lncc": "ncc"}.get(similarity, similarity)
    progress = progress or (lambda fraction: None)
    theta = fit(
        coarse.moving, coarse.fixed, "rigid", wide, coarse.headers, coarse.spacing,
        mask=coarse.mask, progress=lambda f: progress(0.4 * f),
    )  # fmt: skip
    found = [("rigid", theta)]
    if kind == "affine":
        found.append((kind, coarse.descent(theta, kind, wide)))
    progress(0.6)
    if max(coarse.correlation(answer) for _, answer in found) <= ALIKE:
        astray = coarse.astray(theta, wide)
        if astray:
            return _headers_alone(coarse, astray)
    warnings = []
    for name, theta in reversed(found):
        reason = coarse.fault(theta, wide)
        if reason is None:
            break
        warnings.append(f"The {name} map found for the two images is refused: it {reason}.")
    else:
        answer = _headers_alone(coarse)
        return Aligned(answer.matrix, (*warnings, *answer.warnings), False)
    matrix = coarse.matrix(theta)
    fine = _Pair.of(moving, fixed, mask, largest)
    local = similarity == "lncc" or similarity == AUTO and fine.sharp and coarse.of_one_kind(theta)
    if local or largest > COARSE:
        last = "lncc" if local else wide
        finer = fine.descent(fine.grid.theta_to(fine.moving_grid, matrix), name, last)
        if fine.fault(finer, last) is None:
            matrix = fine.matrix(finer)
    progress(1.0)
    return Aligned(matrix, tuple(warnings))


def affine(moving: Image, fixed: Image) -> Tensor:
    """The map of `align` as displacement on the fixed grid, voxels: (1, d, *S)."""
    return fixed.grid.disp_to(moving.grid, align(moving, fixed))


def _check(moving: Image, fixed: Image, kind: str, similarity: str) -> None:
    if moving.ndim != fixed.ndim:
        raise ValueError(f"moving is {moving.ndim}D and fixed {fixed.ndim}D, expected the same.")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected 'rigid' or 'affine'.")
    if similarity not in (AUTO, *ENERGIES):
        raise ValueError(
            f"similarity is {similarity!r}, expected one of {', '.join((AUTO, *ENERGIES))}."
        )
    for name, image in (("moving", moving), ("fixed", fixed)):
        if min(image.shape) < 2:
            raise ValueError(
                f"{name} has shape {tuple(image.shape)}, expected 2 voxels or more along each axis."
            )
    check_one_plane(moving.grid, fixed.grid)


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two images on cubic voxels, as `fit` takes them, and where they lie. theta: as there."""

    moving: Tensor
    fixed: Tensor
    mask: Tensor | None
    moving_grid: Grid
    grid: Grid

    @classmethod
    def of(cls, moving: Image, fixed: Image, mask: Tensor | None, largest: int) -> _Pair:
        if mask is not None and mask.shape != fixed.data.shape:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, expected {tuple(fixed.data.shape)}, as fixed."
            )
        a, moving_grid = to_isotropic(moving, largest)
        b, grid = to_isotropic(fixed, largest)
        if mask is not None:
            # coarse voxels that a thin mask touches belong to it
            mask = (resample((mask > 0).float(), fixed.grid, grid) > 0.1).float()
        return cls(a, b, mask, moving_grid, grid)

    @property
    def spacing(self) -> tuple[float, ...]:
        return self.grid.spacing

    @property
    def headers(self) -> Tensor:
        """The theta of no motion at all."""
        return self.grid.theta_to(self.moving_grid)

    @property
    def sharp(self) -> bool:
        """Whether voxels are fine enough for lncc, which goes by borders: seen in voxels of 4 to
        6 mm, two heads of one size come to differ by up to a tenth."""
        return bool(self.fixed.numel() ** (1 / (self.fixed.ndim - 2)) > COARSE ** (1 / 3))

    def matrix(self, theta: Tensor) -> Floats:
        return self.grid.matrix_of(theta, self.moving_grid)

    def moved(self, theta: Tensor) -> Tensor:
        disp = self.grid.disp_to(self.moving_grid, self.matrix(theta))
        return warp(self.moving, disp)

    def descent(self, theta: Tensor, kind: str, similarity: str) -> Tensor:
        """From a start that is near; lncc at the finest level alone, as its hills are narrow."""
        levels = 1 if similarity == "lncc" else None
        return fit(
            self.moving, self.fixed, kind, similarity, theta, self.spacing,
            search=False, levels=levels, mask=self.mask,
        )  # fmt: skip

    def correlation(self, theta: Tensor) -> float:
        moved, fixed = self.moved(theta), self.fixed
        if self.mask is not None:
            moved, fixed = (x[self.mask > 0].reshape(1, 1, 1, -1) for x in (moved, fixed))
        return 1 - float(ncc(moved, fixed))

    def of_one_kind(self, theta: Tensor) -> bool:
        """Whether a straight line leads from the intensities of one image to those of the other.

        lncc asks for that in each window; where the way is a curve it errs at the rim of a head,
        which the blur of coarse voxels bends most.
        """
        if self.correlation(theta) <= ALIKE:
            return False
        inside = torch.ones_like(self.fixed) if self.mask is None else self.mask
        a, b = (x[inside > 0].double() for x in (self.moved(theta), self.fixed))
        by_line = 1 - float(torch.corrcoef(torch.stack([a, b]))[0, 1]) ** 2
        by_curve = min(_unexplained(a, b), _unexplained(b, a))
        return by_curve > CURVED * by_line

    def overlap(self, theta: Tensor) -> float:
        """The part of the fixed image that looks into the moving one, in what could be at most."""
        inside = warp(
            torch.ones_like(self.moving), self.grid.disp_to(self.moving_grid, self.matrix(theta))
        )
        volumes = [
            math.prod(n * s for n, s in zip(grid.shape, grid.spacing, strict=True))
            for grid in (self.moving_grid, self.grid)
        ]
        return float((inside > 0.5).float().mean()) / min(1.0, volumes[0] / volumes[1])

    def fault(self, theta: Tensor, similarity: str) -> str | None:
        """Why theta is no answer, as the end of a sentence; None if nothing speaks against it."""
        linear = self._in_mm(theta)
        if not torch.isfinite(linear).all():
            return "is not finite"
        if torch.linalg.det(linear) * torch.linalg.det(self._in_mm(self.headers)) <= 0:
            return "mirrors the image"
        stretches = torch.linalg.svdvals(linear)
        stretch = max(float(stretches[0]), 1 / float(stretches[-1]))
        if stretch > STRETCH:
            return f"stretches the image by a factor of {stretch:.1f}"
        overlap = self.overlap(theta)
        if overlap < OVERLAP:
            return f"takes the image out of view, up to {100 * overlap:.0f} %"
        energy = ENERGIES[similarity](self.moving, self.fixed, self.mask)
        if float(energy(self.moved(theta))) > float(energy(self.moved(self.headers))):
            return "fits less well than the headers do"
        return None

    def _in_mm(self, theta: Tensor) -> Tensor:
        """(d, d), the linear part along the axes of the two grids, both in mm."""
        there, here = (theta.new_tensor(grid.spacing) for grid in (self.moving_grid, self.grid))
        return (there[:, None] * theta[0, :, :-1] / here).double()

    def astray(self, theta: Tensor, similarity: str) -> float | None:
        """How far, mm, a point comes back from where it was, if too far to believe theta."""
        back = fit(
            self.fixed, self.moving, "rigid", similarity,
            self.moving_grid.theta_to(self.grid), self.moving_grid.spacing,
        )  # fmt: skip
        matrix = self.moving_grid.matrix_of(back, self.grid) @ self.matrix(theta)
        points = np.array(list(_corners(self.grid)))
        there_and_back = points @ matrix[:3, :3].T + matrix[:3, 3]
        apart, size = (
            float(np.sqrt((x**2).sum(1).mean()))
            for x in (there_and_back - points, points - points.mean(0))
        )
        return apart if apart > ASTRAY * size else None


def _unexplained(a: Tensor, b: Tensor) -> float:
    """The part of the variance of a (N,) that no function of b (N,) explains: 1 - eta^2."""
    bins = ((b - b.min()) / (b.max() - b.min()) * BINS).long().clamp_max(BINS - 1)
    count = torch.bincount(bins, minlength=BINS).clamp_min(1)
    mean = torch.bincount(bins, a, BINS) / count
    return float((a - mean[bins]).square().mean() / a.var(correction=0))


def _corners(grid: Grid) -> Iterator[Floats]:
    """Of the middle half of a grid, mm."""
    for corner in np.ndindex(*[2] * grid.ndim):
        voxel = (np.asarray(grid.shape) - 1) * (0.25 + 0.5 * np.asarray(corner))
        yield grid.to_mm(voxel[None])[0]


def _headers_alone(pair: _Pair, astray: float | None = None) -> Aligned:
    """No motion; or centre on centre, where the headers put the images out of each other's view."""
    matrix, where = np.eye(4), "the images stay where their headers put them"
    if pair.overlap(pair.headers) < OVERLAP:
        matrix[:3, 3] = pair.moving_grid.centre - pair.grid.centre
        where = "the images are laid centre on centre, as their headers put them far apart"
    if astray is None:
        return Aligned(matrix, (f"No answer is left: {where}.",), False)
    return Aligned(
        matrix,
        (
            "The images show too little alike to be aligned: registered one to the other and back, "
            f"a point comes back {astray:.0f} mm from where it was. So {where}.",
        ),
        False,
    )


def to_isotropic(image: Image, largest: int = LARGEST) -> tuple[Tensor, Grid]:
    """An image on cubic voxels, at most about `largest` of them, in [0, 1]; and their grid.

    What the scanner has not measured counts as background, see `measured`. A thousandth of the
    intensities at either end is cut off.
    """
    volume = math.prod(n * s for n, s in zip(image.shape, image.spacing, strict=True))
    size = max(min(image.spacing), (volume / largest) ** (1 / image.ndim))
    grid = image.grid.covering([size] * image.ndim)
    values = resample(measured(image.data), image.grid, grid)
    low, high = np.percentile(values.numpy(), (0.1, 99.9))
    if not high > low:
        low, high = float(values.min()), float(values.max())
    return ((values - low) / max(high - low, 1e-12)).clamp(0, 1), grid


def measured(image: Tensor) -> Tensor:
    """With the intensity that fills what was not measured raised to the lowest that was.

    A CT is often -2048 outside the circle of the scan, with air at -1000 inside. The lowest
    intensity counts as such a filling if it lies far below all others, and above it lies a
    background of its own: of a brain without its skull, the background is the lowest itself.
    """
    low = image.min()
    rest = image[image > low]
    if len(rest) < 100 or len(rest) > 0.99 * image.numel():
        return image
    bottom, top = np.percentile(rest.numpy()[:: max(1, len(rest) // 100_000)], (0.1, 99.9))
    extent = top - bottom
    if not (bottom - low) > GAP * extent > 0:
        return image
    if float((rest < bottom + 0.1 * extent).float().mean()) < BACKGROUND:
        return image
    return image.clamp_min(float(bottom))
