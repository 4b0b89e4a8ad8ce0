"""What the deformable methods of this package answer: `Deformation`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Deformation:
    """A map between the voxels of two images on one grid, and how it was found.

    disp: (1, d, *S), voxels, fixed grid -> moving: `warp(moving, disp)` is the moved image.
    inverse: (1, d, *S), voxels, moving grid -> fixed; None where the method makes none.
    values: what was minimised, per step, in order: (shape of the level's grid, value).
    """

    disp: Tensor
    inverse: Tensor | None = None
    values: tuple[tuple[tuple[int, ...], float], ...] = ()
