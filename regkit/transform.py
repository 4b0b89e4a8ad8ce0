"""Grids in space, and the map between two of them: what a registration finds.

Inside a network everything is voxels. An image adds its `Grid`: how many voxels there are, and the
*affine*, the 4x4 matrix that sends a voxel index to a place in the scanner, in millimetres, with
the axes to the Right, Anterior and Superior (RAS, the convention of NIfTI and nibabel).

A `Transform` sends each place of the fixed image to its counterpart in the moving image,

    y = matrix (x + u(x)),   x and y in mm,

where the displacement u is given on the fixed grid. Because both ends are places and not voxels,
it can be applied, inverted, composed and judged whatever the voxels of the two images are. The one
tensor of the models, voxels of one grid in and voxels of another out, is `Transform.voxels`.

A 2D image is a plane in space; what leads out of the plane is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor

from regkit import metrics
from regkit.spatial import affine_to_disp, check_disp, jacobian_determinant, warp, warp_points

Floats = NDArray[np.float64]  # matrices and places
# An image on new voxels is blurred first where these are wider than so many of the old ones. Below,
# interpolating between the old voxels averages enough.
COARSER = 1.5
# A voxel is seen as a Gaussian of this standard deviation, in its widths: between that of a box,
# 0.29, and that of a Gaussian which is as wide as the voxel at half its height, 0.42.
VOXEL = 0.4


# grids ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Grid:
    """The voxels of an image, and where they lie.

    shape: S, of 2 or 3 axes.
    affine: (4, 4) float64, voxel index -> mm, RAS. Also 4x4 in 2D, where its first two columns lie
        in the plane and the third across.
    across: of a slice of a volume, the axis of its file that has one voxel, 0, 1 or 2; None for
        volumes, and for images whose file has two axes.
    """

    shape: tuple[int, ...]
    affine: Floats
    across: int | None = None

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3) or min(self.shape) < 1:
            raise ValueError(f"shape is {tuple(self.shape)}, expected 2 or 3 positive sizes.")
        affine = np.asarray(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not usable(affine):
            raise ValueError(
                "affine cannot be inverted, expected a (4, 4) matrix from voxels to mm."
            )
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "affine", affine)

    @property
    def ndim(self) -> int:
        """2 or 3."""
        return len(self.shape)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size along each array axis, mm: the lengths of the columns."""
        sizes: list[float] = np.linalg.norm(self.affine[:3, : self.ndim], axis=0).tolist()
        return tuple(sizes)

    @property
    def centre(self) -> Floats:
        """The middle of the grid, (3,) mm."""
        middle: Floats = self.to_mm((np.asarray(self.shape)[None] - 1) / 2)[0]
        return middle

    def same_as(self, other: Grid) -> bool:
        """Whether both have one shape, and corners within 1 % of a voxel of each other."""
        apart = corners_apart(self.affine, other.affine, self.shape)
        return self.shape == other.shape and apart <= 0.01 * min(self.spacing)

    def to_mm(self, voxels: ArrayLike) -> Floats:
        """(N, d) voxel coordinates to (N, 3) mm, RAS."""
        linear, origin = self.affine[:3, : self.ndim], self.affine[:3, 3]
        mm: Floats = np.asarray(voxels) @ linear.T + origin
        return mm

    def to_voxels(self, mm: ArrayLike) -> Floats:
        """(N, 3) mm, RAS, to (N, d) voxel coordinates; of a slice, of the nearest place in it."""
        back = inverted(self.affine)
        voxels: Floats = np.asarray(mm) @ back[:3, :3].T + back[:3, 3]
        return voxels[:, : self.ndim]

    def map_to(self, other: Grid, matrix: Floats | None = None) -> Floats:
        """The matrix that sends a voxel of this grid to the voxel of the other one it lies on.

        This voxel -> mm -> (matrix) -> mm -> the other's voxel. In 2D both are planes in space;
        what leads out of the plane is dropped.

        Args:
            other: of as many axes.
            matrix: (4, 4), mm -> mm, for example from `regkit.classical.align`.

        Returns:
            (d + 1, d + 1) float64, homogeneous.
        """
        mm = np.eye(4) if matrix is None else matrix
        full: Floats = inverted(other.affine) @ mm @ self.affine
        return full if self.ndim == 3 else full[np.ix_([0, 1, 3], [0, 1, 3])]

    def theta_to(self, other: Grid, matrix: Floats | None = None) -> Tensor:
        """The map of `map_to` as theta, (1, d, d+1) float64, about the centre of this grid."""
        voxels, d = self.map_to(other, matrix), self.ndim
        centre = (np.asarray(self.shape) - 1) / 2
        linear, offset = voxels[:d, :d], voxels[:d, d]
        theta = np.concatenate([linear, (linear @ centre + offset - centre)[:, None]], axis=1)
        return torch.from_numpy(theta)[None]

    def disp_to(self, other: Grid, matrix: Floats | None = None) -> Tensor:
        """The map of `map_to` as displacement, (1, d, *S) float32: the other's voxel x' less x."""
        return affine_to_disp(self.theta_to(other, matrix), self.shape).float()

    def matrix_of(self, theta: Tensor, other: Grid) -> Floats:
        """theta (1, d, d+1) as (4, 4), mm -> mm: undoes `theta_to`. In 2D slice 0 stays slice 0."""
        d = self.ndim
        centre = (np.asarray(self.shape) - 1) / 2
        voxels = theta[0].double().cpu().numpy()
        linear, shift = voxels[:, :d], voxels[:, d]
        full = np.eye(4)
        full[:d, :d] = linear
        full[:d, 3] = centre + shift - linear @ centre
        matrix: Floats = other.affine @ full @ inverted(self.affine)
        return matrix

    def axis_order(self) -> list[tuple[int, int]]:
        """Which array axis runs along R, then A, then S, and which way: (axis, +1 or -1).

        In 2D: the two axes of the slice in the order of the world axes they run along.
        """
        import nibabel

        world = nibabel.io_orientation(self.affine)[: self.ndim]  # per array axis: world axis, sign
        order = np.argsort(world[:, 0])
        return [(int(k), int(world[k, 1])) for k in order]

    def canonical(self) -> Grid:
        """These voxels with their axes reordered and flipped to R, A, S, as nearly as they go.

        Of a slice two of the three; its plane stays. `to_canonical` turns the values.
        """
        affine, corner = self.affine.copy(), np.array([0.0, 0.0, 0.0, 1.0])
        order = self.axis_order()
        for k, (axis, sign) in enumerate(order):
            affine[:3, k] = sign * self.affine[:3, axis]
            corner[axis] = 0 if sign > 0 else self.shape[axis] - 1
        affine[:, 3] = self.affine @ corner
        return Grid(tuple(self.shape[axis] for axis, _ in order), affine, self.across)

    def to_canonical(self, values: Tensor) -> Tensor:
        """Values (B, C, *S) on this grid as they lie on `canonical`."""
        order = self.axis_order()
        flipped = [k + 2 for k, (_, sign) in enumerate(order) if sign < 0]
        return values.permute(0, 1, *(axis + 2 for axis, _ in order)).flip(flipped)

    def directions(self) -> tuple[str, ...]:
        """Where each array axis runs to, most nearly: "R" or "L", "A" or "P", "S" or "I"."""
        import nibabel

        return tuple(nibabel.aff2axcodes(self.affine)[: self.ndim])

    def covering(self, spacing: Sequence[float], size: Sequence[int] | None = None) -> Grid:
        """A grid of another voxel size that covers this one, its axes to R, A, S as it goes.

        The new axes run along the old ones, reordered and flipped, about the same centre. An
        oblique scan keeps its obliqueness. With `size` the new grid has that many voxels, whether
        they cover the old one or not.
        """
        d, old = self.ndim, self.canonical()
        affine = old.affine.copy()  # in 2D: across the slice, as it was
        shape = []
        for k in range(d):
            extent = (old.shape[k] - 1) * old.spacing[k]
            shape.append(int(np.ceil(extent / spacing[k] - 1e-3)) + 1 if size is None else size[k])
            affine[:3, k] = old.affine[:3, k] / old.spacing[k] * spacing[k]
        middle = np.append((np.asarray(shape) - 1) / 2, [0.0] * (3 - d))
        affine[:3, 3] = self.centre - affine[:3, :3] @ middle
        return Grid(tuple(shape), affine)


def usable(affine: Floats) -> bool:
    """Finite, with voxels between a nanometre and ten metres, and far enough from singular that
    float64 can invert it."""
    if not np.isfinite(affine).all():
        return False
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not ((sizes > 1e-6) & (sizes < 1e4)).all() or np.abs(affine[:3, 3]).max() > 1e7:
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / sizes)) > 1e-3)


def inverted(matrix: Floats) -> Floats:
    """The inverse of a matrix, in float64."""
    return np.asarray(np.linalg.inv(matrix), dtype=np.float64)


def corners_apart(a: Floats, b: Floats, shape: Sequence[int]) -> float:
    """How far two affines put one corner of a grid from each other at most, mm."""
    sizes = (*shape, 1, 1)[:3]
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in sizes])).reshape(3, -1)
    return float(np.linalg.norm((a - b)[:3, :3] @ corners + (a - b)[:3, 3:], axis=0).max())


def check_one_plane(moving: Grid, fixed: Grid) -> None:
    """Refuse two slices whose planes lie at more than about 45 degrees to each other."""
    if fixed.ndim == 3:
        return
    normals = [np.cross(grid.affine[:3, 0], grid.affine[:3, 1]) for grid in (moving, fixed)]
    cosine = abs(normals[0] @ normals[1]) / np.prod(np.linalg.norm(normals, axis=1))
    if cosine < 0.7:
        raise ValueError(
            "moving is a slice of another plane than fixed, expected two slices of one orientation."
        )


# from grid to grid ------------------------------------------------------------------------------


def background(image: Tensor) -> Tensor:
    """What lies outside an image (B, C, *S): the median of its edges, of a slice its corners.

    It is 0 for a brain without skull and for a map of z values, and air, about -1000, for a CT.

    Returns:
        (B, C, 1, ...), one value an image.
    """
    d, shape = image.ndim - 2, image.shape[2:]
    ends = [torch.tensor([0, n - 1], device=image.device) for n in shape]
    edges = []
    for along in range(d if d == 3 else 1):  # the edges of a box run along one axis each
        at = image
        for axis in range(d):
            if d == 2 or axis != along:
                at = at.index_select(axis + 2, ends[axis])
        edges.append(at.flatten(2))
    return torch.cat(edges, dim=2).median(dim=2).values.reshape(*image.shape[:2], *[1] * d)


def pull(
    image: Tensor, disp: Tensor, mode: str = "linear", fill: float | Tensor | None = None
) -> Tensor:
    """`regkit.spatial.warp`, with a chosen value outside the image.

    Args:
        image: (B, C, *M). disp: (B, d, *S), voxels. mode: "linear", or "nearest" for label maps.
        fill: the value outside, one number or (B, C, 1, ...); by default 0 for "nearest", else that
            of `background`.
    """
    if fill is None:
        fill = 0.0 if mode == "nearest" else background(image)
    outside = torch.as_tensor(fill).to(image)
    if not outside.any():
        return warp(image, disp, mode)
    if mode == "nearest":
        inside = warp(torch.ones_like(image), disp, mode)
        return torch.where(inside > 0, warp(image, disp, mode), outside)
    return warp(image - outside, disp) + outside


def blur(image: Tensor, step: ArrayLike) -> Tensor:
    """Blur voxels of width 1 to voxels of width `step`, axis by axis, so that detail which the new
    voxels cannot show does not turn into noise.

    A voxel is seen as a Gaussian, see `VOXEL`; variances add up. Axes along which the new voxels
    are at most `COARSER` old ones are left as they are.

    Args:
        image: (B, C, *S) on the CPU. step: (d,), the new voxel in old ones.
    """
    wide = np.asarray(step, dtype=np.float64)
    sigma = np.where(wide > COARSER, VOXEL * np.sqrt(np.maximum(wide**2 - 1, 0)), 0.0)
    if not sigma.any():
        return image
    blurred = ndimage.gaussian_filter(image.numpy(), (0, 0, *sigma), mode="nearest")
    return torch.from_numpy(blurred)


def resample(
    image: Tensor,
    grid: Grid,
    new: Grid,
    mode: str = "linear",
    matrix: Floats | None = None,
) -> Tensor:
    """Bring an image to another grid: (1, C, *M) to (1, C, *S).

    Args:
        image: (1, C, *M), on `grid`.
        grid, new: where it is, and where it is wanted.
        mode: "linear", or "nearest" for label maps. Where the new voxels are larger, "linear" blurs
            first, see `blur`. Outside the image lies its `background`.
        matrix: (4, 4), new mm -> old mm, if the image is to move as well.
    """
    to_old = new.map_to(grid, matrix)
    if new.shape == grid.shape and np.allclose(to_old, np.eye(len(to_old)), atol=1e-6):
        return image
    fill = 0.0 if mode == "nearest" else background(image)
    if mode == "linear":
        image = blur(image, _step(to_old))
    return pull(image, new.disp_to(grid, matrix), mode, fill)


def _step(voxel_map: Floats) -> Floats:
    """(d,): along each axis of the old grid, the width of a new voxel in old ones."""
    width: Floats = np.linalg.norm(voxel_map[:-1, :-1], axis=1)
    return width


def map_points(matrix: Floats, points: Tensor) -> Tensor:
    """Send voxel coordinates (1, d, *S) through the matrix of `Grid.map_to`, (d+1, d+1)."""
    d = points.shape[1]
    m = torch.from_numpy(matrix).to(points)
    return (m[:d, :d] @ points.flatten(2) + m[:d, d:]).reshape(points.shape)


# the map ----------------------------------------------------------------------------------------


class OnGrid(Protocol):
    """An image that knows where it lies, such as `regkit.io.Image`."""

    @property
    def data(self) -> Tensor:
        """(1, C, *S), S of 2 or 3 axes."""
        ...

    @property
    def grid(self) -> Grid:
        """Its voxels, and where they lie."""
        ...


@dataclass(frozen=True, eq=False)
class Transform:
    """Where each place of the fixed image lies in the moving image: y = matrix (x + u(x)), in mm.

    fixed, moving: the two grids.
    matrix: (4, 4), fixed mm -> moving mm, RAS: the affine part; the identity where the headers
        alone say how the images lie to each other.
    disp: (1, d, *S), on the fixed grid and in its voxels: u. Beyond the grid it is held constant.
    """

    fixed: Grid
    moving: Grid
    matrix: Floats
    disp: Tensor

    def __post_init__(self) -> None:
        check_disp(self.disp)
        if tuple(self.disp.shape) != (1, self.fixed.ndim, *self.fixed.shape):
            raise ValueError(
                f"disp has shape {tuple(self.disp.shape)}, expected "
                f"{(1, self.fixed.ndim, *self.fixed.shape)}, that of the fixed grid."
            )
        if self.moving.ndim != self.fixed.ndim:
            raise ValueError(
                f"moving is {self.moving.ndim}D and fixed {self.fixed.ndim}D, expected the same."
            )

    @classmethod
    def affine(cls, fixed: Grid, moving: Grid, matrix: Floats | None = None) -> Transform:
        """A map without displacement; without a matrix, what the two headers say."""
        disp = torch.zeros(1, fixed.ndim, *fixed.shape, dtype=torch.float32)
        return cls(fixed, moving, np.eye(4) if matrix is None else np.asarray(matrix), disp)

    @classmethod
    def from_voxels(cls, disp: Tensor, fixed: Grid, moving: Grid) -> Transform:
        """The map that `voxels` describes: (1, d, *S), voxels of `fixed` in, of `moving` out."""
        index = _index(fixed)
        in_fixed_voxels = map_points(moving.map_to(fixed), disp.double() + index) - index
        return cls(fixed, moving, np.eye(4), in_fixed_voxels.float())

    def voxels(self, grid: Grid | None = None) -> Tensor:
        """The map as a displacement that `regkit.spatial.warp` takes: (1, d, *S) on the fixed grid.

        Args:
            grid: in whose voxels it answers, moved(x) = image(x + voxels(x)); by default the moving
                grid. An image of the same person on a third grid wants that one.
        """
        grid = grid or self.moving
        # x -> map(x) + linear part times u(x)
        linear = torch.from_numpy(self.fixed.map_to(grid, self.matrix)[:-1, :-1]).float()
        turned = (linear @ self.disp.flatten(2)).reshape(self.disp.shape)
        return self.fixed.disp_to(grid, self.matrix) + turned

    def moved(
        self, image: Tensor | OnGrid, mode: str = "linear", fill: float | None = None
    ) -> Tensor:
        """The image on the fixed grid: (1, C, *S).

        Args:
            image: (1, C, *M) on the moving grid, or a `regkit.io.Image` anywhere in the moving
                image's space. Where the fixed voxels are larger, it is blurred first, see `blur`.
            mode: "linear", or "nearest" for label maps, which keeps integers.
            fill: the value outside the image; by default 0 for "nearest", else its `background`.
        """
        data, grid = self._of_moving(image)
        outside: float | Tensor | None = fill
        if fill is None and mode == "linear":
            outside = background(data)
        source = self.antialiased(data, grid) if mode == "linear" else data
        return pull(source, self.voxels(grid), mode, outside)

    def antialiased(self, data: Tensor, grid: Grid | None = None) -> Tensor:
        """An image (1, C, *M) in the moving space, without what fixed voxels cannot show."""
        return blur(data, _step(self.fixed.map_to(grid or self.moving, self.matrix)))

    def _of_moving(self, image: Tensor | OnGrid) -> tuple[Tensor, Grid]:
        if not isinstance(image, Tensor):
            return image.data, image.grid
        if tuple(image.shape[2:]) != self.moving.shape:
            raise ValueError(
                f"image has shape {tuple(image.shape)}, expected (1, C, *S) with the moving grid's "
                f"{self.moving.shape}, or a regkit.io.Image with a grid of its own."
            )
        return image, self.moving

    def points(
        self,
        p: ArrayLike,
        start: Literal["fixed", "moving"] = "fixed",
        unit: Literal["mm", "voxel"] = "mm",
    ) -> Floats:
        """Send points of one image to their counterparts in the other.

        Args:
            p: (N, 3) mm, RAS, or (N, d) voxels of the image they start in.
            start: "fixed", the way of the map, or "moving", by solving for where it comes from.
            unit: of what comes and of what is returned.

        Returns:
            (N, 3) or (N, d) float64, in mm or in voxels of the other image.
        """
        if start not in ("fixed", "moving") or unit not in ("mm", "voxel"):
            raise ValueError(
                f"start is {start!r} and unit {unit!r}, expected 'fixed' or 'moving', and 'mm' or "
                "'voxel'."
            )
        p = np.asarray(p, dtype=np.float64)
        width = 3 if unit == "mm" else self.fixed.ndim
        if p.ndim != 2 or p.shape[1] != width:
            raise ValueError(f"p has shape {p.shape}, expected (N, {width}) for unit {unit!r}.")
        from_grid, to_grid = (self.fixed, self.moving)[:: 1 if start == "fixed" else -1]
        voxels = from_grid.to_voxels(p) if unit == "mm" else p
        disp = self.disp.double()

        def displaced(x: Tensor) -> Tensor:
            return warp_points(x, disp)

        if start == "fixed":
            ends = _homogeneous(self.fixed.map_to(to_grid, self.matrix), displaced(_batch(voxels)))
        else:  # z = matrix^-1 y is x + u(x): x is found by steps against what is missing
            back = inverted(self.fixed.map_to(from_grid, self.matrix))
            goal = _homogeneous(back, _batch(voxels))
            ends = goal.clone()
            for _ in range(ITERATIONS):
                ends = ends - DAMPING * (displaced(ends) - goal)
        result: Floats = ends[0].numpy()
        return to_grid.to_mm(result) if unit == "mm" else result

    def inverse(self, iterations: int = 30) -> Transform:
        """The map back, on the moving grid: moving mm -> fixed mm.

        By the fixed-point iteration of `regkit.spatial.invert`; exact where the map does not fold
        and the moving grid lies within what the fixed grid covers.
        """
        # y -> z = matrix^-1 y, and z + v(z) is where u leads to z: v(z) = -u(z + v(z))
        back = inverted(self.matrix)
        start = self.moving.disp_to(self.fixed, back)
        v = torch.zeros_like(start)
        for _ in range(iterations):
            v = v - DAMPING * (v + warp(self.disp, start + v, padding="border"))
        # matrix^-1 (y + w(y)) = z + v(z), so w is the linear part of the matrix times v
        linear = torch.from_numpy(self.fixed.map_to(self.moving, self.matrix)[:-1, :-1]).float()
        w = (linear @ v.flatten(2)).reshape(v.shape)
        return Transform(self.moving, self.fixed, back, w)

    def then(self, other: Transform) -> Transform:
        """This map, then another one that starts where this one ends: fixed -> moving -> other's.

        An image of `other.moving`'s space is brought here by it with one interpolation. A place
        that leads beyond `other.fixed` is displaced as at its border.
        """
        # matrix (x + u(x)) = y; y + v(y), then the other's matrix: u'(x) = u(x) + matrix^-1 v(y)
        v = warp(other.disp, self.voxels(other.fixed), padding="border")
        linear = other.fixed.map_to(self.fixed, inverted(self.matrix))[:-1, :-1]
        turned = (torch.from_numpy(linear).float() @ v.flatten(2)).reshape(v.shape)
        return Transform(self.fixed, other.moving, other.matrix @ self.matrix, self.disp + turned)

    def jacobian_determinant(self) -> Tensor:
        """Local change of volume in mm, (1, *S): 2 where the moving image has twice the tissue.

        0 or less where the map folds. The voxel sizes and the handedness of the moving image do not
        count: a mirrored header folds nothing.
        """
        return jacobian_determinant(self.voxels(self.fixed))

    def folding_percent(self) -> float:
        """Percent of the fixed voxels at which the map folds."""
        return float(metrics.folding_percent(self.voxels(self.fixed))[0])


ITERATIONS, DAMPING = 60, 0.7  # of the fixed point, see `regkit.spatial.invert`


def _index(grid: Grid) -> Tensor:
    """(1, d, *S) float64: the voxel coordinates of a grid."""
    axes = [torch.arange(n, dtype=torch.float64) for n in grid.shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def _batch(points: Floats) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(points))[None]


def _homogeneous(matrix: Floats, points: Tensor) -> Tensor:
    """(1, N, d) through (d+1, d+1)."""
    m = torch.from_numpy(matrix)
    return points @ m[:-1, :-1].T + m[:-1, -1]
