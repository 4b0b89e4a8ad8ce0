"""What the deformable methods ask of two images of one grid, and how they shrink them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regkit.spatial import check_spacing

SMALLEST = 8  # voxels of a level along an axis, at least, if the image has them


def check_one_grid(moving: Tensor, fixed: Tensor) -> None:
    """Raise ValueError unless both are (1, 1, *S) of one grid, finite, and show something."""
    for name, image in (("moving", moving), ("fixed", fixed)):
        shape = tuple(image.shape)
        if image.ndim not in (4, 5) or shape[:2] != (1, 1) or shape != tuple(fixed.shape):
            raise ValueError(
                f"{name} has shape {shape}, expected (1, 1, H, W) or (1, 1, D, H, W), "
                f"the same as fixed {tuple(fixed.shape)}."
            )
        if not torch.isfinite(image).all():
            raise ValueError(f"{name} holds NaN or infinity, expected finite intensities.")
        if image.amin() == image.amax():
            raise ValueError(f"{name} is constant, expected an image that shows something.")


def check_pair(
    moving: Tensor, fixed: Tensor, spacing: float | Sequence[float], levels: Sequence[int]
) -> list[float]:
    """The voxel size along each axis, mm, of two images that can be registered.

    Raises:
        ValueError: images that are not two floating point (1, 1, *S) of one grid in 2D or 3D, or
            are constant or not finite, or have an axis of one voxel; a spacing or levels that are
            not positive.
    """
    check_one_grid(moving, fixed)
    for name, image in (("moving", moving), ("fixed", fixed)):
        shape = tuple(image.shape)
        if min(shape[2:]) < 2:
            raise ValueError(f"{name} has shape {shape}, expected 2 voxels or more along an axis.")
        if not image.is_floating_point():
            raise ValueError(f"{name} is {image.dtype}, expected floating point.")
    if not levels or any(not isinstance(level, int) or level < 1 for level in levels):
        raise ValueError(f"levels is {levels!r}, expected whole numbers of 1 or more.")
    size: list[float] = check_spacing(spacing, fixed.ndim - 2).tolist()
    return size


def block(shape: Sequence[int], size: Sequence[float], level: int) -> list[int]:
    """How many voxels along each axis become one: `level`, but fewer of thick slices or of few.

    Args:
        shape, size: of the image, in voxels and mm.
    """
    return [
        max(1, min(round(level * min(size) / h), n // SMALLEST))
        for n, h in zip(shape, size, strict=True)
    ]
