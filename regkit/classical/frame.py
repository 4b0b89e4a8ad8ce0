"""One frame for two images, for the tools that register in millimetres: SimpleITK and ANTs.

Their world is LPS, ours RAS, and neither has a good answer for a slice in an oblique plane. Both
are served by mm along the axes of the fixed grid: the fixed image lies straight in it, the moving
image where its header puts it relative to the fixed one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regkit.classical.linear import KINDS
from regkit.classical.pairs import check_one_grid
from regkit.classical.space import to_isotropic
from regkit.io import Image
from regkit.spatial import check_spacing
from regkit.transform import Floats, check_one_plane, inverted


@dataclass(frozen=True, eq=False)
class InFrame:
    """An image on cubic voxels, in [0, 1], and where they lie in the frame.

    values: (*S,) float32. matrix: (d+1, d+1), voxel -> frame, mm.
    """

    values: NDArray[np.float32]
    matrix: Floats

    @property
    def spacing(self) -> Floats:
        """(d,) mm."""
        sizes: Floats = np.linalg.norm(self.matrix[:-1, :-1], axis=0)
        return sizes

    @property
    def direction(self) -> Floats:
        """(d, d), its columns the array axes in the frame."""
        axes: Floats = self.matrix[:-1, :-1] / self.spacing
        return axes

    @property
    def origin(self) -> Floats:
        """(d,) mm: voxel 0."""
        return self.matrix[:-1, -1]


PointMap = Callable[[Floats], Floats]  # points (N, d), mm in the frame, to points
ToWorld = Callable[[PointMap], Floats]


def check_images(moving: Image, fixed: Image) -> None:
    """Refuse two images that no tool could register.

    Raises:
        ValueError: 2D with 3D, a constant image, slices of different planes.
    """
    if moving.ndim != fixed.ndim:
        raise ValueError(f"moving is {moving.ndim}D and fixed {fixed.ndim}D, expected the same.")
    for name, image in (("moving", moving), ("fixed", fixed)):
        if image.data.min() == image.data.max():
            raise ValueError(f"{name} is constant, expected an image that shows something.")
    check_one_plane(moving.grid, fixed.grid)


def common_frame(
    moving: Image, fixed: Image, kind: str, largest: int
) -> tuple[InFrame, InFrame, ToWorld]:
    """Both images in one frame, and a function that brings a map from the frame into space.

    Args:
        moving, fixed, kind, largest: as in `regkit.classical.align`.

    Returns:
        moving, fixed, and a function: a map of points (N, d) of the fixed image to points of the
        moving image, in the frame, -> (4, 4) fixed mm -> moving mm, RAS.

    Raises:
        ValueError: as in `regkit.classical.align`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected 'rigid' or 'affine'.")
    check_images(moving, fixed)
    d = fixed.ndim
    (moving_values, moving_grid), (fixed_values, grid) = (
        to_isotropic(image, largest) for image in (moving, fixed)
    )
    fixed_matrix = np.diag([*grid.spacing, 1.0])
    moving_matrix = fixed_matrix @ inverted(grid.map_to(moving_grid))

    def to_world(point_map: PointMap) -> Floats:
        size = max(grid.shape) * fixed_matrix[0, 0]  # far apart, for tools of single precision
        ends = point_map(np.concatenate([np.zeros((1, d)), size * np.eye(d)]))
        between = np.eye(d + 1)
        between[:d, :d] = (ends[1:] - ends[0]).T / size
        between[:d, d] = ends[0]
        full, axes = np.eye(4), [*range(d), 3]
        full[np.ix_(axes, axes)] = inverted(moving_matrix) @ between @ fixed_matrix
        world: Floats = moving_grid.affine @ full @ inverted(grid.affine)
        return world

    return (
        InFrame(moving_values[0, 0].numpy(), moving_matrix),
        InFrame(fixed_values[0, 0].numpy(), fixed_matrix),
        to_world,
    )


def in_millimetres(
    moving: Tensor, fixed: Tensor, spacing: float | Sequence[float]
) -> tuple[InFrame, InFrame]:
    """Two images of one grid in the frame: mm along its axes, voxel 0 at 0.

    Args:
        moving, fixed: (1, 1, *S).
        spacing: voxel size, one number or one per axis, mm.

    Raises:
        ValueError: other shapes, a constant image, a wrong spacing.
    """
    check_one_grid(moving, fixed)
    matrix = np.diag([*check_spacing(spacing, fixed.ndim - 2).tolist(), 1.0])
    a, b = (InFrame(x[0, 0].detach().cpu().float().numpy(), matrix) for x in (moving, fixed))
    return a, b


def to_voxels(
    field: NDArray[np.floating], spacing: float | Sequence[float], fixed: Tensor
) -> Tensor:
    """A field of ITK on that grid, (*S reversed, d) in mm, as displacement (1, d, *S) in voxels.

    float32, on the device of `fixed`.
    """
    disp = torch.from_numpy(np.ascontiguousarray(field.T, dtype=np.float32))
    size = check_spacing(spacing, len(disp)).to(disp)
    return (disp / size.reshape(-1, *[1] * (disp.ndim - 1)))[None].to(fixed.device)
