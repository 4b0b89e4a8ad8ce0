"""One frame for two images, for the tools that register in millimetres: SimpleITK and ANTs.

Their world is LPS, ours RAS, and neither has a good answer for a slice in an oblique plane. Both
are served by mm along the axes of the fixed grid: the fixed image lies straight in it, the moving
image where its header puts it relative to the fixed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from regkit.classical.linear import KINDS, to_isotropic
from regkit.io import Image
from regkit.transform import check_one_plane


@dataclass(frozen=True, eq=False)
class InFrame:
    """An image on cubic voxels, in [0, 1], and where they lie in the frame.

    values: (*S,) float32. matrix: (d+1, d+1), voxel -> frame, mm.
    """

    values: np.ndarray
    matrix: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """(d,) mm."""
        return np.linalg.norm(self.matrix[:-1, :-1], axis=0)

    @property
    def direction(self) -> np.ndarray:
        """(d, d), its columns the array axes in the frame."""
        return self.matrix[:-1, :-1] / self.spacing

    @property
    def origin(self) -> np.ndarray:
        """(d,) mm: voxel 0."""
        return self.matrix[:-1, -1]


ToWorld = Callable[[Callable[[np.ndarray], np.ndarray]], np.ndarray]


def common_frame(
    moving: Image, fixed: Image, kind: str, largest: int
) -> tuple[InFrame, InFrame, ToWorld]:
    """Both images in one frame, and what turns the map that a tool has found into ours.

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
    if moving.ndim != fixed.ndim:
        raise ValueError(f"moving is {moving.ndim}D and fixed {fixed.ndim}D, expected the same.")
    for name, image in (("moving", moving), ("fixed", fixed)):
        if image.data.min() == image.data.max():
            raise ValueError(f"{name} is constant, expected an image that shows something.")
    d = fixed.ndim
    check_one_plane(moving.grid, fixed.grid)
    (moving_values, moving_grid), (fixed_values, grid) = (
        to_isotropic(image, largest) for image in (moving, fixed)
    )
    fixed_matrix = np.diag([*grid.spacing, 1.0])
    moving_matrix = fixed_matrix @ np.linalg.inv(grid.map_to(moving_grid))

    def to_world(found: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        size = max(grid.shape) * fixed_matrix[0, 0]  # far apart, for tools of single precision
        ends = found(np.concatenate([np.zeros((1, d)), size * np.eye(d)]))
        between = np.eye(d + 1)
        between[:d, :d] = (ends[1:] - ends[0]).T / size
        between[:d, d] = ends[0]
        voxels, full, axes = (
            np.linalg.inv(moving_matrix) @ between @ fixed_matrix,
            np.eye(4),
            [*range(d), 3],
        )
        full[np.ix_(axes, axes)] = voxels
        return moving_grid.affine @ full @ np.linalg.inv(grid.affine)

    return (
        InFrame(moving_values[0, 0].numpy(), moving_matrix),
        InFrame(fixed_values[0, 0].numpy(), fixed_matrix),
        to_world,
    )
