"""Warps, and everything that is done to a displacement. The only module that calls `grid_sample`.

The contract of the whole library, in one line: at every voxel x of the fixed grid, a displacement
says where in the moving image to look,

    moved(x) = moving(x + disp(x)).

A displacement `disp` has the shape (B, d, *S) with d = len(S) in {2, 3}. Channel i moves along
array axis i, in voxels. Nothing here knows about millimetres, except `rigid_theta`, which takes the
voxel size so that a rotation stays a rotation on anisotropic voxels; physical space lives in
`regkit.transform`.

Under autocast everything here still computes in float32: a displacement of 40.03 voxels has no room
for its fraction in half precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from regkit.autograd import Function

HALF = (torch.float16, torch.bfloat16)
LINEAR = {2: "bilinear", 3: "trilinear"}
P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` in float32 at least: half-precision arguments are raised, autocast is off."""

    call: Callable[..., R] = function  # a type checker cannot follow arguments through `raised`

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        def raised(x: Any) -> Any:
            return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x

        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        device_type = tensors[0].device.type if tensors else "cpu"
        with torch.autocast(device_type, enabled=False):
            return call(*map(raised, args), **{k: raised(v) for k, v in kwargs.items()})

    return wrapper


def one_batch(x: Tensor, dim: int | None, size: int) -> Tensor:
    """`size` batches (B, ...) of `torch.vmap` as one batch (size B, ...).

    For the `vmap` of an autograd function whose result for an image does not depend on the others.

    Args:
        x: with all batches along the axis `dim`; with None one batch that serves each.
    """
    batches = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return batches.flatten(0, 1)


def check_disp(disp: Tensor, name: str = "disp") -> None:
    """Raise ValueError unless `disp` is a floating point (B, d, *S) with d = len(S) in {2, 3}."""
    shape = tuple(disp.shape)
    if disp.ndim not in (4, 5) or shape[1] != disp.ndim - 2:
        raise ValueError(
            f"{name} has shape {shape}, expected (B, 2, H, W) or (B, 3, D, H, W): "
            "one channel per spatial axis."
        )
    if not disp.is_floating_point():
        raise ValueError(f"{name} is {disp.dtype}, expected floating point voxels.")


def check_spacing(spacing: float | Sequence[float] | Tensor, d: int) -> Tensor:
    """Voxel sizes (d,) float64 from one number or d of them; ValueError for anything else."""
    size = torch.as_tensor(spacing, dtype=torch.float64)
    # a compiled graph does not branch on values
    if size.shape not in ((), (d,)) or not (torch.compiler.is_compiling() or (size > 0).all()):
        raise ValueError(f"spacing is {spacing}, expected one positive number or {d} of them.")
    return size.expand(d)


def identity_grid(
    shape: Sequence[int],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Absolute voxel coordinates of a grid: (d, *S), entry i counts along array axis i."""
    axes = [torch.arange(n, device=device, dtype=dtype) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _scaled_coordinates(disp: Tensor, sizes: Sequence[int]) -> Tensor:
    """The coordinates that `grid_sample` takes: disp (B, d, *S) becomes (B, *S, d).

    They are scaled to [-1, 1], the last array axis first. With align_corners=False the scaled
    coordinate of voxel x is (2x + 1)/n - 1, which also holds on an axis of size 1; the
    align_corners=True form 2x/(n - 1) - 1 gives the same samples elsewhere, but there it divides by
    zero.

    Args:
        disp: in voxels of the image that is sampled.
        sizes: of that image, one per axis.
    """
    if not torch.compiler.is_compiling():
        result: Tensor = _Scaled.apply(disp, sizes)
        return result
    axes = [torch.add(_start(disp, i, n), disp[:, i], alpha=2 / n) for i, n in enumerate(sizes)]
    return torch.stack(axes[::-1], dim=-1)


def _start(disp: Tensor, axis: int, size: int) -> Tensor:
    """Scaled coordinates of the voxels along an axis, (n, 1, ...), to which disp[:, axis] comes."""
    x = torch.arange(disp.shape[axis + 2], dtype=torch.float64)  # one axis: exact costs nothing
    return ((2 * x + 1) / size - 1).to(disp).reshape(-1, *[1] * (disp.shape[1] - 1 - axis))


class _Scaled(Function):
    """`_scaled_coordinates`, each axis written once, in its place: no grid is kept or added up."""

    @staticmethod
    def forward(disp: Tensor, sizes: Sequence[int]) -> Tensor:
        batch, d, *shape = disp.shape
        scaled = disp.new_empty(batch, *shape, d)
        for i, n in enumerate(sizes):
            torch.add(_start(disp, i, n), disp[:, i], alpha=2 / n, out=scaled[..., d - 1 - i])
        return scaled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Sequence[int]], output: Tensor) -> None:
        ctx.sizes = inputs[1]

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[int | None], disp: Tensor, sizes: Sequence[int]
    ) -> tuple[Tensor, int]:
        scaled: Tensor = _Scaled.apply(one_batch(disp, in_dims[0], info.batch_size), sizes)
        return scaled.unflatten(0, (info.batch_size, -1)), 0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        batch, *shape, d = grad.shape
        result = grad.new_empty(batch, d, *shape)
        for i, n in enumerate(ctx.sizes):
            torch.mul(grad[..., d - 1 - i], 2 / n, out=result[:, i])
        return result, None


def _sample(image: Tensor, scaled: Tensor, mode: str, padding: str) -> Tensor:
    """Values of `image` (B, C, *M) at `_scaled_coordinates` (B, *S, d): (B, C, *S)."""
    return F.grid_sample(
        image,
        scaled,
        mode="bilinear" if mode == "linear" else "nearest",  # "bilinear" means trilinear in 3D
        padding_mode=padding,
        align_corners=False,
    )


def _as_float(labels: Tensor) -> Tensor:
    """Whole numbers in the smallest floating point type that holds all of them exactly."""
    if labels.dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16):
        return labels.float()
    labels = labels.long()
    if torch.compiler.is_compiling():  # a graph does not branch on values
        return labels.double()
    low, high = (int(x) for x in labels.aminmax()) if labels.numel() else (0, 0)
    largest = max(-low, high)
    if largest > 2**53:
        raise ValueError(f"image holds the label {largest}, expected at most 2^53 in size.")
    return labels.to(torch.float32 if largest <= 2**24 else torch.float64)


@full_precision
def warp(image: Tensor, disp: Tensor, mode: str = "linear", padding: str = "zeros") -> Tensor:
    """Look the image up where the displacement points: moved(x) = image(x + disp(x)).

    Args:
        image: (B, C, *M). M may differ from S: coordinates are voxels of this image.
        disp: (B, d, *S), voxels, on the output grid. A batch of 1 serves every image of the batch.
        mode: "linear", or "nearest" for label maps, which keeps integer dtypes. Labels up to 2^53.
        padding: what lies outside the image: "zeros", or "border" (the nearest voxel's value).

    Returns:
        (B, C, *S) with the dtype of `image` (half precision is raised to float32).

    Raises:
        ValueError: shapes, modes or dtypes that do not fit.
    """
    check_disp(disp)
    if image.ndim != disp.ndim or image.shape[0] != disp.shape[0] and disp.shape[0] != 1:
        raise ValueError(
            f"image has shape {tuple(image.shape)}, expected (B, C, *S) with the batch and the "
            f"number of axes of disp {tuple(disp.shape)}."
        )
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode is {mode!r}, expected 'linear' or 'nearest'.")
    if padding not in ("zeros", "border"):
        raise ValueError(f"padding is {padding!r}, expected 'zeros' or 'border'.")
    dtype = image.dtype
    if not image.is_floating_point():
        if mode == "linear":
            raise ValueError(
                f"image is {dtype}, expected floating point for mode 'linear' "
                "(label maps are warped with mode 'nearest')."
            )
        image = _as_float(image)
    scaled = _scaled_coordinates(disp.to(image.dtype), image.shape[2:])
    return _sample(image, scaled.expand(len(image), *scaled.shape[1:]), mode, padding).to(dtype)


@full_precision
def warp_points(points: Tensor, disp: Tensor) -> Tensor:
    """Map points of the fixed grid to the moving grid: p -> p + disp(p).

    Landmarks go the other way than images do. An image is pulled from moving to fixed, so the same
    displacement carries a *fixed* landmark to its place in the *moving* image. To carry a moving
    landmark to the fixed image use `invert(disp)` where both images are on one grid, and
    `regkit.transform.Transform.points(p, start="moving")` where they are not: `invert` takes voxels
    in and voxels out for the same.

    Args:
        points: (B, N, d) voxels of the fixed grid.
        disp: (B, d, *S), voxels. Between voxels it is interpolated, outside it is held constant.

    Returns:
        (B, N, d) voxels of the moving grid.
    """
    check_disp(disp)
    d = disp.shape[1]
    if points.ndim != 3 or points.shape[-1] != d or points.shape[0] != disp.shape[0]:
        raise ValueError(
            f"points has shape {tuple(points.shape)}, expected ({disp.shape[0]}, N, {d}) "
            f"for disp {tuple(disp.shape)}."
        )
    sizes = disp.new_tensor(disp.shape[2:])
    scaled = ((2 * points.to(disp) + 1) / sizes - 1).flip(-1)  # as `_scaled_coordinates`
    scaled = scaled.reshape(len(points), -1, *[1] * (d - 1), d)
    moved = _sample(disp, scaled, "linear", "border").flatten(2).transpose(1, 2)
    return points + moved


@full_precision
def compose(first: Tensor, then: Tensor) -> Tensor:
    """One displacement that does what two warps in a row do.

    warp(image, compose(a, b)) is warp(warp(image, a), b) with one interpolation instead of two.
    Read from the fixed grid, the last warp is asked first: x -> y = x + then(x) -> y + first(y), so

        compose(first, then)(x) = then(x) + first(x + then(x)).

    Args:
        first: (B, d, *S), voxels, the displacement of the first warp.
        then: (B, d, *S), voxels, the displacement of the second warp.

    Returns:
        (B, d, *S), voxels. `first` is held constant beyond its border.
    """
    check_disp(first, "first")
    check_disp(then, "then")
    if first.ndim != then.ndim or then.shape[0] not in (1, first.shape[0]):
        raise ValueError(
            f"first has shape {tuple(first.shape)} and then {tuple(then.shape)}, "
            "expected the same batch and the same number of axes."
        )
    return then + warp(first, then, padding="border")


@full_precision
def integrate(svf: Tensor, steps: int = 7) -> Tensor:
    """Follow a stationary velocity field for unit time: disp = exp(svf) - identity.

    Scaling and squaring (Arsigny et al. 2006): take the step of time 1/2^steps as the velocity
    itself, then compose the result with itself `steps` times. Accurate while max|svf| / 2^steps is
    well below a voxel; half a voxel is a good limit.

    Args:
        svf: (B, d, *S), voxels per unit time.
        steps: number of squarings, at least 0.

    Returns:
        (B, d, *S) displacement in voxels. `integrate(-svf)` is its inverse.
    """
    check_disp(svf, "svf")
    if steps < 0:
        raise ValueError(f"steps is {steps}, expected 0 or more.")
    disp: Tensor = svf / 2**steps
    for _ in range(steps):
        disp = compose(disp, disp)
    return disp


@full_precision
def invert(disp: Tensor, iterations: int = 30) -> Tensor:
    """The displacement that undoes `disp`, by fixed-point iteration.

    The inverse w must satisfy w(x) = -disp(x + w(x)). The iteration applies the right-hand side
    again and again (Chen et al. 2008), but goes only 0.7 of the way each time. This differs from
    the source: full steps swing for ever where the map doubles a length (a derivative of disp above
    1), steps of 0.7 settle up to 1.8. Two residuals tell how it went: `compose(disp, invert(disp))`
    is near zero once the steps have settled; `compose(invert(disp), disp)` stays far from zero
    where the field folds, for there is no inverse.

    In and out are voxels of one grid. Between two images of different grids, mirrored ones or ones
    with other voxels, invert the `regkit.transform.Transform`.

    Args:
        disp: (B, d, *S), voxels, held constant beyond its border.
        iterations: number of steps.

    Returns:
        (B, d, *S), voxels, with compose(disp, inverse) ~ 0 and compose(inverse, disp) ~ 0.
    """
    check_disp(disp)
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected 1 or more.")
    inverse = torch.zeros_like(disp)
    for _ in range(iterations):
        inverse = inverse - 0.7 * (inverse + warp(disp, inverse, padding="border"))
    return inverse


def _twice_the_derivative(field: Tensor, axis: int) -> Tensor:
    """2 d field / d axis: central differences, one-sided at the border, 0 on an axis of size 1."""
    n = field.shape[axis]
    if n == 1:
        return torch.zeros_like(field)
    first = 2 * (field.narrow(axis, 1, 1) - field.narrow(axis, 0, 1))
    last = 2 * (field.narrow(axis, n - 1, 1) - field.narrow(axis, n - 2, 1))
    inside = field.narrow(axis, 2, n - 2) - field.narrow(axis, 0, n - 2)
    return torch.cat([first, inside, last], axis)


def _determinant(disp: Tensor) -> Tensor:
    """det(I + d disp/dx) of (B, d, *S): (B, *S). The matrix is twice that, hence the 2^d."""
    d = disp.shape[1]
    columns = [_twice_the_derivative(disp, axis + 2) for axis in range(d)]
    for i in range(d):
        columns[i][:, i].add_(2)
    if d == 2:
        (a, c), (b, e) = (x.unbind(1) for x in columns)
        return (a * e).addcmul_(b, c, value=-1).div_(4)
    (a, p, u), (b, q, v), (c, r, w) = (x.unbind(1) for x in columns)
    det = a * (q * w).addcmul_(r, v, value=-1)
    det.addcmul_(b, (r * u).addcmul_(p, w, value=-1))
    det.addcmul_(c, (p * v).addcmul_(q, u, value=-1))
    return det.div_(8)


class _JacobianDeterminant(Function):
    """`_determinant`, a slab of planes at a time, so that its dozen maps stay in the cache.

    A slab takes one plane more on either side, for the central differences. The backward pass goes
    through the slabs again instead of keeping their maps.
    """

    @staticmethod
    def slabs(disp: Tensor) -> Iterator[tuple[slice, slice, slice]]:
        """Planes of the result, planes it takes, and the first within the second."""
        n = disp.shape[2]
        thick = max(1, 2**17 * n // max(1, disp[:, 0].numel()))
        for start in range(0, n, thick):
            stop = min(start + thick, n)
            low, high = max(start - 1, 0), min(stop + 1, n)
            yield slice(start, stop), slice(low, high), slice(start - low, stop - low)

    @staticmethod
    def forward(ctx: Any, disp: Tensor) -> Tensor:
        ctx.save_for_backward(disp)
        result = torch.empty_like(disp[:, 0])
        for planes, taken, within in _JacobianDeterminant.slabs(disp):
            result[:, planes] = _determinant(disp[:, :, taken])[:, within]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (disp,) = ctx.saved_tensors
        result = torch.zeros_like(disp)
        for planes, taken, within in _JacobianDeterminant.slabs(disp):
            slab = disp[:, :, taken].detach().requires_grad_()
            with torch.enable_grad():
                det = _determinant(slab)[:, within]
            result[:, :, taken] += torch.autograd.grad(det, slab, grad[:, planes])[0]
        return result


@full_precision
def jacobian_determinant(disp: Tensor) -> Tensor:
    """Local change of volume under x -> x + disp(x): (B, *S).

    1 where nothing changes, 2 where two voxels of the moving image are squeezed into one of the
    fixed image, 0 or less where the map folds. The identity is part of the map: det(I + d disp/dx).
    Where moving and fixed have different grids, ask `regkit.transform.Transform` instead: there a
    voxel of the one is not a voxel of the other.

    Args:
        disp: (B, d, *S), voxels. Derivatives are central differences, one-sided at the border.
    """
    check_disp(disp)
    determinant: Tensor = _JacobianDeterminant.apply(disp)
    return determinant


@full_precision
def rigid_theta(
    angles: Tensor, translation: Tensor, spacing: float | Sequence[float] | Tensor = 1.0
) -> Tensor:
    """Rotation and translation as an affine map of voxels, theta = [A | t] of shape (B, d, d+1).

    A = S^-1 R S with S = diag(spacing): the rotation R happens in millimetres, so that nothing
    shears on anisotropic voxels.

    Args:
        angles: radians. 2D: (B, 1), R = [[cos, -sin], [sin, cos]] in array-axis order.
            3D: (B, 3), R = R0 R1 R2, where Ri turns about array axis i by the right-hand rule.
        translation: (B, d), voxels.
        spacing: voxel size along each axis, one number or d numbers, mm.
    """
    d = translation.shape[-1]
    if d not in (2, 3) or angles.shape != (translation.shape[0], 1 if d == 2 else 3):
        raise ValueError(
            f"angles has shape {tuple(angles.shape)} and translation {tuple(translation.shape)}, "
            "expected (B, 1) and (B, 2), or (B, 3) and (B, 3)."
        )
    cos, sin = angles.cos(), angles.sin()
    zero, one = torch.zeros_like(cos[:, 0]), torch.ones_like(cos[:, 0])

    def matrix(*rows: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.stack(list(row), dim=-1) for row in rows], dim=-2)

    if d == 2:
        c, s = cos[:, 0], sin[:, 0]
        rotation = matrix((c, -s), (s, c))
    else:
        (c0, c1, c2), (s0, s1, s2) = cos.unbind(1), sin.unbind(1)
        about0 = matrix((one, zero, zero), (zero, c0, -s0), (zero, s0, c0))
        about1 = matrix((c1, zero, s1), (zero, one, zero), (-s1, zero, c1))
        about2 = matrix((c2, -s2, zero), (s2, c2, zero), (zero, zero, one))
        rotation = about0 @ about1 @ about2
    size = check_spacing(spacing, d).to(rotation)
    return torch.cat([rotation * size / size[:, None], translation.unsqueeze(-1)], dim=-1)


@full_precision
def compose_theta(first: Tensor, then: Tensor) -> Tensor:
    """The affine map of two warps in a row, as `compose` does it for displacements.

    Args:
        first, then: (B, d, d+1) = [A | t], voxels, about the centre of one grid.

    Returns:
        (B, d, d+1): x -> first(then(x)). An image warped by `first`, then by `then`, is the image
        warped once by this.
    """
    linear, shift = first[..., :-1], first[..., -1:]
    return torch.cat([linear @ then[..., :-1], linear @ then[..., -1:] + shift], dim=-1)


@full_precision
def invert_theta(theta: Tensor) -> Tensor:
    """The affine map (B, d, d+1) that undoes `theta` (B, d, d+1), both about one centre."""
    linear = torch.linalg.inv(theta[..., :-1])
    return torch.cat([linear, -linear @ theta[..., -1:]], dim=-1)


@full_precision
def affine_to_disp(theta: Tensor, shape: Sequence[int]) -> Tensor:
    """Displacement of the affine map x -> A(x - c) + c + t about the image centre c = (n - 1)/2.

    Args:
        theta: (B, d, d+1) = [A | t], voxels.
        shape: S, the grid.

    Returns:
        (B, d, *S) = (A - I)(x - c) + t, voxels.
    """
    d = len(shape)
    if theta.ndim != 3 or tuple(theta.shape[1:]) != (d, d + 1):
        raise ValueError(
            f"theta has shape {tuple(theta.shape)}, expected (B, {d}, {d + 1}) "
            f"for a grid of shape {tuple(shape)}."
        )
    centre = theta.new_tensor([(n - 1) / 2 for n in shape])
    from_centre = identity_grid(shape, theta.device, theta.dtype).flatten(1) - centre[:, None]
    linear = theta[:, :, :d] - torch.eye(d, device=theta.device, dtype=theta.dtype)
    disp = linear @ from_centre + theta[:, :, d:]
    return disp.reshape(theta.shape[0], d, *shape)


@full_precision
def resize(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample (B, C, *S) to (B, C, *shape), linearly; the corner voxels stay corner voxels."""
    return F.interpolate(image, size=tuple(shape), mode=LINEAR[image.ndim - 2], align_corners=True)


@full_precision
def resize_disp(disp: Tensor, shape: Sequence[int]) -> Tensor:
    """Bring a displacement to a grid of another size: resample AND rescale.

    A shift of 3 voxels is one of 6 voxels where the voxels are half as big. With corner voxels
    staying corner voxels the factor along an axis is (n_new - 1)/(n_old - 1), and 1 where n_old is
    1.

    Args:
        disp: (B, d, *S), voxels of S.
        shape: the new grid.

    Returns:
        (B, d, *shape), voxels of `shape`.
    """
    check_disp(disp)
    old = disp.shape[2:]
    if len(shape) != len(old) or min(shape) < 1:
        raise ValueError(f"shape is {tuple(shape)}, expected {len(old)} positive sizes.")
    factors = [(new - 1) / (n - 1) if n > 1 else 1.0 for new, n in zip(shape, old, strict=True)]
    scale = disp.new_tensor(factors).reshape(1, -1, *[1] * len(old))
    return resize(disp, shape) * scale


def spline_disp(points: Tensor, shape: Sequence[int]) -> Tensor:
    """A displacement from its control points: a cubic B-spline along each axis.

    The corner points lie on the corner voxels. Beyond them points go on in a straight line, so that
    a linear displacement of the points is the same one of the voxels.

    Args:
        points: (B, d, *S), voxels of `shape`.
        shape: the grid of the displacement.

    Returns:
        (B, d, *shape), voxels.

    Source: Rueckert et al., "Nonrigid registration using free-form deformations", IEEE Transactions
    on Medical Imaging 1999, equation 2. There points lie outside of the image as well.
    """
    check_disp(points, "points")
    old = points.shape[2:]
    if len(shape) != len(old) or min(shape) < 1:
        raise ValueError(f"shape is {tuple(shape)}, expected {len(old)} positive sizes.")
    disp = points
    for axis, (new, n) in enumerate(zip(shape, old, strict=True), start=2):
        weights = _spline_weights(new, n).to(disp)
        disp = torch.tensordot(disp, weights, dims=([axis], [1])).movedim(-1, axis)
    return disp


def _spline_weights(new: int, n: int) -> Tensor:
    """(new, n): how much of each of n control points is in each of `new` places along an axis."""
    if n == 1:
        return torch.ones(new, 1)
    place = torch.linspace(0, n - 1, new, dtype=torch.float64)
    first = place.long().clamp(max=n - 2)
    t = place - first
    # B_0 to B_3 of the paper, for the point before, the two around, and the one behind
    basis = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    weights = torch.zeros(new, n + 2, dtype=torch.float64)
    weights.scatter_(1, first[:, None] + torch.arange(4), torch.stack(basis, dim=1) / 6)
    for beyond, last, before in ((0, 1, 2), (n + 1, n, n - 1)):  # point = 2 last - before
        weights[:, last] += 2 * weights[:, beyond]
        weights[:, before] -= weights[:, beyond]
    return weights[:, 1:-1]


def pad_to_multiple(image: Tensor, k: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Pad the spatial axes with zeros, evenly on both sides, until each is a multiple of k.

    Args:
        image: (B, C, *S).
        k: at least 1, for example the divisor of a network.

    Returns:
        The padded image and `crop`, which cuts any (B, C', *padded) tensor back to S.
    """
    if k < 1:
        raise ValueError(f"k is {k}, expected 1 or more.")
    if image.ndim not in (4, 5):
        raise ValueError(
            f"image has shape {tuple(image.shape)}, expected (B, C, H, W) or (B, C, D, H, W)."
        )
    shape = image.shape[2:]
    missing = [-n % k for n in shape]
    before = [m // 2 for m in missing]
    sides = [(b, m - b) for b, m in zip(before, missing, strict=True)]
    padded = F.pad(image, [n for side in reversed(sides) for n in side]) if any(missing) else image
    window = (
        slice(None),
        slice(None),
        *[slice(b, b + n) for b, n in zip(before, shape, strict=True)],
    )
    return padded, lambda x: x[window]
