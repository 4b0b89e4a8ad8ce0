"""Pairs that differ by a known rigid motion: the data of Hu (2024), made from the population."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from regkit.data.population import FIELD_OF_VIEW, Subject, population
from regkit.spatial import affine_to_disp, rigid_theta, warp


@dataclass(frozen=True)
class RigidPair:
    """One pair and its truth.

    moving, fixed: subjects; the moving one has been turned and shifted.
    theta: (1, d, d+1), the motion that registration should find, fixed voxel -> moving voxel.
    """

    moving: Subject
    fixed: Subject
    theta: Tensor


class RigidPairs(Dataset):
    """The same head twice, once turned and shifted at random; the same for the same (seed, index).

    Args:
        subjects: one list per contrast, all of the same heads in the same order. With one list both
            images of a pair are of this contrast; with more, of two different ones.
        length: how many pairs there are.
        seed: of the draw.
        angle: the moving image is turned by up to this many degrees, either way (3D: about each
            axis in turn). shift: and shifted by up to this many mm along each axis.
        gamma: as in `RandomPairs`.
        noise: standard deviation of fresh noise inside the head, on either image. Two scans do not
            share theirs, but a warped copy would, and so do the contrasts of one subject: without
            fresh noise a similarity can lock onto the old one.

    Each item is a dictionary of `moving` and `fixed`, (1, *S), and `name`; `pair(index)` gives the
    same as a `RigidPair`, with the labels and the answer.

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
    ):
        if not subjects or not subjects[0] or len({len(group) for group in subjects}) != 1:
            raise ValueError(
                f"subjects has lists of {[len(group) for group in subjects]}, expected one list "
                "per contrast, all of one length, at least 1."
            )
        self.subjects, self.length, self.seed = subjects, length, seed
        self.angle, self.shift, self.gamma, self.noise = angle, shift, gamma, noise

    def __len__(self) -> int:
        return self.length

    def pair(self, index: int) -> RigidPair:
        """The pair of this index, with labels and truth."""
        source, fixed, theta, images = self._draw(index)
        shape, d = fixed.image.shape[1:], theta.shape[1]
        labels = warp(source.labels[None], affine_to_disp(theta, shape).float(), mode="nearest")[0]
        # moving(x) = source(theta x): registration looks for the way back
        inverse = torch.linalg.inv(theta[0, :, :d])
        back = torch.cat([inverse, -inverse @ theta[0, :, d:]], dim=1).float()
        return RigidPair(
            moving=replace(source, image=images[0], labels=labels),
            fixed=replace(fixed, image=images[1]),
            theta=back[None],
        )

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        _, fixed, _, images = self._draw(index)
        return {"moving": images[0], "fixed": images[1], "name": f"{fixed.name}, pair {index}"}

    def _draw(self, index: int) -> tuple[Subject, Subject, Tensor, list[Tensor]]:
        """The two subjects, the motion that makes the moving image, and both images."""
        random = np.random.default_rng([self.seed, index])
        who = int(random.integers(len(self.subjects[0])))
        contrasts = random.permutation(len(self.subjects)).tolist()
        fixed = self.subjects[contrasts[0]][who]
        source = self.subjects[contrasts[-1]][who]  # with one contrast, the same
        d = fixed.image.ndim - 1
        turn = random.uniform(-1, 1, (1, 1 if d == 2 else 3)) * math.radians(self.angle)
        shift = random.uniform(-self.shift, self.shift, (1, d)) / np.asarray(fixed.spacing)
        theta = rigid_theta(torch.from_numpy(turn), torch.from_numpy(shift), fixed.spacing)
        moved = warp(source.image[None], affine_to_disp(theta, fixed.image.shape[1:]).float())[0]
        images = []
        for image in (moved, fixed.image):
            power = math.exp(random.uniform(-self.gamma, self.gamma))
            noise = torch.from_numpy(random.normal(0, self.noise, image.shape)).float()
            images.append((image**power + noise * (image > 0)).clamp(0, 1))
        return source, fixed, theta, images


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
) -> list[Subject]:
    """The embedded population on cubic voxels, its empty margin cut off: a turn stays a turn.

    The longest side of the field of view has about 5 % more voxels than that of `shape`; the rest
    is cropped about the centre, as in Hu (2024), section 3.2. (200, 200) has voxels of 1.006 mm.

    Args:
        n, seed, contrast, progress: as in `regkit.data.population`.
        shape: (H, W) or (D, H, W).
    """
    # the sides of the field of view are as 5 to 6 to 5
    size = round(1.05 * max(shape) / 6)
    grid = [round(extent / FIELD_OF_VIEW.max() * 6 * size) for extent in FIELD_OF_VIEW]
    subjects = population(n, grid[: len(shape)], seed, contrast=contrast, progress=progress)
    return [centre_crop(subject, shape) for subject in subjects]


def moved_heads(
    n: int,
    shape: Sequence[int],
    seed: int,
    length: int,
    draw: int = 0,
    contrasts: Sequence[str] = ("t1",),
    progress: bool = False,
    **motion: float,
) -> RigidPairs:
    """`RigidPairs` of the embedded population: `length` pairs of `n` heads.

    Args:
        n, shape, seed, progress: as in `heads`.
        draw: the seed of the motions.
        contrasts: as in `regkit.data.population`; one, or those between which a pair is formed.
        motion: `angle`, `shift`, `gamma` and `noise` of `RigidPairs`.
    """
    groups = [heads(n, shape, seed, contrast, progress) for contrast in contrasts]
    return RigidPairs(groups, length, draw, **motion)
