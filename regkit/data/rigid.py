"""Pairs that differ by a known rigid motion: the data of Hu (2024), made from the population."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from regkit.data.cache import place_of
from regkit.data.population import population
from regkit.data.subject import Subject
from regkit.data.template import FIELD_OF_VIEW
from regkit.spatial import affine_to_disp, compose_theta, invert_theta, rigid_theta, warp


@dataclass(frozen=True, eq=False)
class RigidPair:
    """One pair and its truth.

    moving, fixed: subjects; the moving one has been turned and shifted.
    theta: (1, d, d+1), the motion that registration should find, fixed voxel -> moving voxel.
    """

    moving: Subject
    fixed: Subject
    theta: Tensor


class RigidPairs(Dataset[dict[str, Tensor | str]]):
    """The same head twice, once turned and shifted at random; the same for the same (seed, index).

    Args:
        subjects: one list per contrast, all of the same heads in the same order. With one list both
            images of a pair are of this contrast; with more, of two different ones.
        across: False for pairs within a contrast, which is drawn anew for each.
        length: how many pairs there are.
        seed: of the draw.
        angle: the moving image is turned by up to this many degrees, either way (3D: about each
            axis in turn). shift: and shifted by up to this many mm along each axis.
        gamma: as in `RandomPairs`.
        noise: standard deviation of fresh noise inside the head, on either image. Two scans do not
            share theirs, but a warped copy would, and so do the contrasts of one subject: without
            fresh noise a similarity can lock onto the old one.
        tilt, size: both images of a pair are first turned together by up to this many degrees, and
            made larger or smaller together by a factor x with |log x| <= size (2D). A network that
            always sees the fixed head upright and of one size learns that head, not the motion.

    Each item is a dictionary of `moving` and `fixed`, (1, *S), of the answer `disp`, (d, *S), and
    `name`; `pair(index)` gives the same as a `RigidPair`, with the labels.

    Hu (2024), section 3.2, turns by "a random radian in [-5, 5]" and shifts by up to 5 pixels
    of 1 mm.
    Five radians are most of a full turn and could not be called a motion artefact; we read degrees.
    """

    def __init__(
        self,
        subjects: Sequence[Sequence[Subject]],
        length: int,
        seed: int = 0,
        angle: float = 5.0,
        shift: float = 5.0,
        gamma: float = 0.0,
        noise: float = 0.02,
        tilt: float = 0.0,
        size: float = 0.0,
        across: bool = True,
    ):
        if not subjects or not subjects[0] or len({len(group) for group in subjects}) != 1:
            raise ValueError(
                f"subjects has lists of {[len(group) for group in subjects]}, expected one list "
                "per contrast, all of one length, at least 1."
            )
        if (tilt or size) and subjects[0][0].image.ndim != 3:
            raise ValueError(
                f"tilt is {tilt} and size {size} for images in 3D, expected 0: they are for slices."
            )
        self.subjects, self.length, self.seed = subjects, length, seed
        self.angle, self.shift, self.gamma, self.noise = angle, shift, gamma, noise
        self.tilt, self.size, self.across = tilt, size, across

    def __len__(self) -> int:
        return self.length

    def pair(self, index: int) -> RigidPair:
        """The pair of this index, with labels and truth."""
        index = place_of(index, self)
        drawn = self._draw(index)
        sides = []
        for subject, theta, image in zip(drawn.subjects, drawn.thetas, drawn.images):
            labels = subject.labels
            if theta is not None:
                labels = _looked_up(labels, theta, "nearest")
            sides.append(replace(subject, image=image, labels=labels))
        return RigidPair(moving=sides[0], fixed=sides[1], theta=drawn.answer)

    def pairs(self) -> list[RigidPair]:
        """All pairs, in order."""
        return [self.pair(index) for index in range(len(self))]

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        index = place_of(index, self)
        drawn = self._draw(index)
        moving, fixed = drawn.images
        return {
            "moving": moving,
            "fixed": fixed,
            "disp": affine_to_disp(drawn.answer, fixed.shape[1:])[0],
            "name": f"{drawn.subjects[1].name}, pair {index}",
        }

    def _draw(self, index: int) -> _Drawn:
        random = np.random.default_rng([self.seed, index])
        who = int(random.integers(len(self.subjects[0])))
        contrasts = random.permutation(len(self.subjects)).tolist()
        fixed = self.subjects[contrasts[0]][who]
        source = self.subjects[contrasts[-1 if self.across else 0]][who]
        d = fixed.image.ndim - 1
        turn = random.uniform(-1, 1, (1, 1 if d == 2 else 3)) * math.radians(self.angle)
        shift = random.uniform(-self.shift, self.shift, (1, d)) / np.asarray(fixed.spacing)
        motion = rigid_theta(torch.from_numpy(turn), torch.from_numpy(shift), fixed.spacing)
        pose = self._pose(random) if self.tilt or self.size else None
        # moving(x) = source(pose(motion(x))) and fixed(x) = fixed(pose(x))
        thetas = (motion if pose is None else compose_theta(pose, motion), pose)
        images = []
        for subject, theta in zip((source, fixed), thetas):
            image = subject.image if theta is None else _looked_up(subject.image, theta)
            power = math.exp(random.uniform(-self.gamma, self.gamma))
            noise = torch.from_numpy(random.normal(0, self.noise, image.shape)).float()
            images.append((image**power + noise * (image > 0)).clamp(0, 1))
        # registration looks for the way back
        return _Drawn((source, fixed), thetas, images, invert_theta(motion).float())

    def _pose(self, random: np.random.Generator) -> Tensor:
        """(1, 2, 3): how both images lie before one of them moves."""
        turn = torch.tensor([[math.radians(random.uniform(-self.tilt, self.tilt))]]).double()
        theta = rigid_theta(turn, torch.zeros(1, 2, dtype=torch.float64))
        return theta / math.exp(random.uniform(-self.size, self.size))


@dataclass(frozen=True, eq=False)
class _Drawn:
    """A pair as drawn: per side (moving, fixed) the subject, the map through which it is looked up
    (None: as it is) and the image; and the motion (1, d, d+1) that registration should find."""

    subjects: tuple[Subject, Subject]
    thetas: tuple[Tensor, Tensor | None]
    images: list[Tensor]
    answer: Tensor


def known_pair(subject: Subject, theta: Tensor, noise: float = 0.02, seed: int = 0) -> RigidPair:
    """A head beside itself, moved so that registration should find this very motion.

    Args:
        theta: (1, d, d+1), voxels, of the fixed image, which is the head as it is.
        noise: standard deviation of fresh noise inside the head, on either image.
        seed: of the noise.
    """
    back = invert_theta(theta)
    moved = _looked_up(subject.image, back)
    labels = _looked_up(subject.labels, back, "nearest")
    return RigidPair(
        moving=replace(subject, image=noisy(moved, 2 * seed, noise), labels=labels),
        fixed=replace(subject, image=noisy(subject.image, 2 * seed + 1, noise)),
        theta=theta,
    )


def noisy(image: Tensor, seed: int, level: float = 0.02) -> Tensor:
    """The image with fresh noise where it is above 0, inside the head.

    Args:
        image: of any shape.
        seed: of the draw. level: the standard deviation of the noise.
    """
    draw = torch.Generator().manual_seed(seed)
    return image + level * torch.randn(image.shape, generator=draw) * (image > 0)


def _looked_up(
    image: Tensor, theta: Tensor, mode: Literal["linear", "nearest"] = "linear"
) -> Tensor:
    """(1, *S), read through theta (1, d, d+1)."""
    return warp(image[None], affine_to_disp(theta, image.shape[1:]).float(), mode=mode)[0]


def centre_crop(subject: Subject, shape: Sequence[int]) -> Subject:
    """Image and labels cut, or padded with zeros, to `shape` about their centre.

    The subject keeps its voxel size and its place in space. Its velocity no longer fits the grid.
    """
    old = subject.image.shape[1:]
    before = [(new - n) // 2 for new, n in zip(shape, old, strict=True)]
    sides = [(b, new - n - b) for b, new, n in zip(before, shape, old)]
    pad = [n for side in reversed(sides) for n in side]
    affine = subject.affine.copy()
    d = len(old)
    affine[:3, 3] -= affine[:3, :d] @ np.asarray(before, dtype=float)
    return replace(
        subject, image=F.pad(subject.image, pad), labels=F.pad(subject.labels, pad), affine=affine
    )


def heads(
    n: int | Sequence[int],
    shape: Sequence[int],
    seed: int = 0,
    contrast: str = "t1",
    progress: bool = False,
    scalp: bool = False,
) -> list[Subject]:
    """The embedded population on cubic voxels, its empty margin cut off: a turn stays a turn.

    The longest side of the field of view has about 5 % more voxels than that of `shape`; the rest
    is cropped about the centre, as in Hu (2024), section 3.2. (200, 200) has voxels of 1.006 mm.

    Args:
        n, seed, contrast, progress: as in `regkit.data.population`.
        shape: (H, W) or (D, H, W).
        scalp: every second head gets one, see `with_scalp`; `n` is a number then.
    """
    # the sides of the field of view are as 5 to 6 to 5
    size = round(1.05 * max(shape) / 6)
    grid = [round(extent / FIELD_OF_VIEW.max() * 6 * size) for extent in FIELD_OF_VIEW]
    subjects = population(n, grid[: len(shape)], seed, contrast=contrast, progress=progress)
    cropped = [centre_crop(subject, shape) for subject in subjects]
    if not scalp:
        return cropped
    return [
        with_scalp(subject, seed, index, contrast) if index % 2 else subject
        for index, subject in enumerate(cropped)
    ]


def with_scalp(subject: Subject, seed: int, index: int, contrast: str) -> Subject:
    """A head as scanners see it: around the brain a dark skull, around that skin and fat.

    Thickness (2 to 8 mm, 3 to 12 mm) depends on (seed, index) alone, so that all contrasts of a
    head get one scalp; the greys of skull and scalp differ from contrast to contrast.
    """
    shape = np.random.default_rng([seed, index])
    grey = np.random.default_rng([seed, index, *contrast.encode()])
    brain = (subject.labels[0] > 0).numpy()
    away = ndimage.distance_transform_edt(~brain, sampling=subject.spacing)
    skull, skin = shape.uniform(2, 8), shape.uniform(3, 12)
    image = np.where((away > 0) & (away <= skull), grey.uniform(0, 0.2), subject.image[0].numpy())
    image = np.where((away > skull) & (away <= skull + skin), grey.uniform(0.3, 1), image)
    image = ndimage.gaussian_filter(image, 0.5)
    return replace(subject, image=torch.from_numpy(image).float()[None])


def moved_heads(
    n: int,
    shape: Sequence[int],
    seed: int,
    length: int,
    draw: int = 0,
    contrasts: Sequence[str] = ("t1",),
    progress: bool = False,
    scalp: bool = False,
    **motion: Any,
) -> RigidPairs:
    """`RigidPairs` of the embedded population: `length` pairs of `n` heads.

    Args:
        n, shape, seed, progress, scalp: as in `heads`.
        draw: the seed of the motions.
        contrasts: as in `regkit.data.population`; one, or those between which a pair is formed.
        motion: `angle`, `shift`, `gamma`, `noise`, `tilt`, `size` and `across` of `RigidPairs`.
    """
    groups = [heads(n, shape, seed, contrast, progress, scalp) for contrast in contrasts]
    return RigidPairs(groups, length, draw, **motion)
