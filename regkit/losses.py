"""What training minimises. Every loss takes (moved, fixed) in that order and returns a 0-d tensor.

A smaller value is always better. The similarity losses `ncc`, `lncc` and `soft_dice` are one minus
the quantity that papers quote, so they are 0 for a perfect match; `mutual_information` is negated
and has no fixed lower bound. The regularisers are in voxels of the displacement they are given:
a field at half resolution has half the values, hence a quarter of the squared ones.

All of them compute in float32 at least, also under autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regkit.spatial import check_disp, full_precision, jacobian_determinant


def _check_pair(moved: Tensor, fixed: Tensor, names: tuple[str, str] = ("moved", "fixed")) -> None:
    if moved.shape != fixed.shape or moved.ndim not in (4, 5):
        raise ValueError(
            f"{names[0]} has shape {tuple(moved.shape)} and {names[1]} {tuple(fixed.shape)}, "
            "expected the same (B, C, H, W) or (B, C, D, H, W)."
        )
    if not (moved.is_floating_point() and fixed.is_floating_point()):
        raise ValueError(
            f"{names[0]} is {moved.dtype} and {names[1]} {fixed.dtype}, expected floating point."
        )


@full_precision
def mse(moved: Tensor, fixed: Tensor) -> Tensor:
    """Mean squared difference, in [0, inf), squared intensity units. (B, C, *S) both."""
    _check_pair(moved, fixed)
    return (moved - fixed).square().mean()


@full_precision
def ncc(moved: Tensor, fixed: Tensor) -> Tensor:
    """1 - Pearson's correlation over the whole image, in [0, 2]; 0 up to a*x + b with a > 0.

    Averaged over batch and channels of (B, C, *S). A constant image correlates with nothing: r = 0.
    """
    _check_pair(moved, fixed)
    a, b = moved.flatten(2), fixed.flatten(2)
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    # dividing by the norms one after the other keeps CT-sized numbers from overflowing
    tiny = torch.finfo(a.dtype).tiny ** 0.5
    a, b = (x / x.square().sum(-1, keepdim=True).clamp_min(tiny).sqrt() for x in (a, b))
    return 1 - (a * b).sum(-1).mean()


def _box_sum(x: Tensor, window: int) -> Tensor:
    """Sum over a window^d box around each voxel of (B, C, *S), cut off at the image border.

    Along each axis in turn the box sum is a difference of two running sums, so its cost does not
    depend on the window.
    """
    radius = window // 2
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        if n == 1:
            continue
        shape = list(x.shape)
        shape[axis] = radius + 1
        zeros = x.new_zeros(shape)  # one more before: the running sum starts with nothing
        total = torch.cat([zeros, x, zeros.narrow(axis, 0, radius)], axis).cumsum(axis)
        x = total.narrow(axis, 2 * radius + 1, n) - total.narrow(axis, 0, n)
    return x


class _LocalCorrelation(torch.autograd.Function):
    """Squared local correlation summed over windows, with its gradient in closed form.

    Per window with count n, means m, variances a, b and covariance c the value is c^2/(a b). With
    respect to one voxel of the second image, d c = (I - m_I)/n and d b = 2 (J - m_J)/n, so

        d/dJ(x) = 2 sum over windows holding x of [ p (I(x) - m_I) - q (J(x) - m_J) ] / n,
        p = c/(a b),  q = c^2/(a b^2),

    three box sums of per-window numbers; likewise for I. Automatic differentiation would keep and
    revisit every intermediate map instead.
    """

    @staticmethod
    def forward(ctx: Any, i: Tensor, j: Tensor, weight: Tensor | None, window: int) -> Tensor:
        count = _box_sum(torch.ones_like(i[:1, :1]), window)
        mean_i, mean_j = _box_sum(i, window) / count, _box_sum(j, window) / count
        var_i = _box_sum(i * i, window).div_(count).addcmul_(mean_i, mean_i, value=-1)
        var_j = _box_sum(j * j, window).div_(count).addcmul_(mean_j, mean_j, value=-1)
        cov = _box_sum(i * j, window).div_(count).addcmul_(mean_i, mean_j, value=-1)
        # Images have unit variance here. Running sums leave an error of a few hundred epsilon
        # around 0: a variance below that is a constant window.
        floor = 1e3 * torch.finfo(i.dtype).eps
        flat_i, flat_j = var_i <= floor, var_j <= floor
        counted = ~(flat_i & flat_j)
        if weight is not None:
            counted = counted & (weight > 0)
        defined = counted & ~(flat_i | flat_j)
        total = counted.sum().clamp_min(1)
        p = torch.where(defined, cov / (var_i * var_j), 0.0)
        cc = (p * cov).clamp_max_(1.0)
        ctx.save_for_backward(i, j, mean_i, mean_j, p, cc, var_i, var_j, count)
        ctx.window, ctx.total, ctx.floor = window, total, floor
        # without a counted window there is nothing to compare: a perfect score
        return torch.where(counted.any(), cc.sum() / total, torch.ones_like(cc.sum()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        i, j, mean_i, mean_j, p, cc, var_i, var_j, count = ctx.saved_tensors

        def gradient(x: Tensor, y: Tensor, mean_x: Tensor, mean_y: Tensor, var_y: Tensor) -> Tensor:
            """With respect to y."""
            q = torch.where(var_y > ctx.floor, cc / var_y, 0.0)
            constant = _box_sum((p * mean_x - q * mean_y).div_(count), ctx.window)
            from_x = _box_sum(p / count, ctx.window).mul_(x)
            from_y = _box_sum(q.div_(count), ctx.window).mul_(y)
            return from_x.sub_(from_y).sub_(constant).mul_(2 * grad / ctx.total)

        grad_i = gradient(j, i, mean_j, mean_i, var_i) if ctx.needs_input_grad[0] else None
        grad_j = gradient(i, j, mean_i, mean_j, var_j) if ctx.needs_input_grad[1] else None
        return grad_i, grad_j, None, None


@full_precision
def lncc(moved: Tensor, fixed: Tensor, window: int = 9, mask: Tensor | None = None) -> Tensor:
    """1 - mean squared local correlation over window^d boxes, in [0, 1].

    Bright and dark may change places from box to box, and each box may have its own brightness and
    contrast: the value does not change when either image is replaced by a*x + b. Boxes at the
    border use the voxels that exist. Boxes in which both images are constant (background) are left
    out of the mean; where only one is constant, the correlation counts as 0; with no box left the
    loss is 0. So lncc(x, x) is 0 for any x. In float32, "constant" is a standard deviation below
    about 1 % of the image's own: less than that drowns in rounding.

    Args:
        moved, fixed: (B, C, *S), any scale (Hounsfield units too).
        window: edge of the box in voxels, odd.
        mask: (B, 1, *S) optional; boxes centred where it is 0 are left out.

    Source: Avants et al. 2008 (cross-correlation of SyN); Balakrishnan et al. 2019, section IV. It
    differs from the published code, which sums instead of averages, pads with zeros, and adds a
    constant to the denominator: that one is not invariant to scale, and fails on CT values.
    """
    _check_pair(moved, fixed)
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}, expected an odd number of voxels.")
    if mask is not None:
        if mask.shape != (moved.shape[0], 1, *moved.shape[2:]):
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, expected (B, 1, *S) "
                f"for images {tuple(moved.shape)}."
            )
        mask = mask.expand_as(moved)

    def standardise(x: Tensor) -> Tensor:
        """Zero mean, unit variance. As lncc does not change under a*x + b, neither does its
        gradient through the mean and the scale: both count as constants."""
        axes = list(range(1, x.ndim))
        mean = x.detach().mean(axes, keepdim=True)
        scale = (x.detach() - mean).square().mean(axes, keepdim=True).sqrt()
        # a constant image keeps rounding noise of its own size: not to be blown up
        noise = 10 * torch.finfo(x.dtype).eps * x.detach().abs().amax(axes, keepdim=True)
        return (x - mean) / torch.where(scale > noise, scale, torch.inf)

    return 1 - _LocalCorrelation.apply(standardise(moved), standardise(fixed), mask, window)


def _parzen(x: Tensor, bins: int) -> Tensor:
    """Cubic B-spline weights of intensities x (N,) in [0, 1] on `bins` bins: (N, bins)."""
    # two bins of margin on either side, so that the four-bin-wide window stays inside
    position = 2 + x * (bins - 5)
    t = (position[:, None] - torch.arange(bins, device=x.device, dtype=x.dtype)).abs()
    near = 2 / 3 - t.square() + t**3 / 2
    far = (2 - t).clamp_min(0) ** 3 / 6
    return torch.where(t < 1, near, far)


@full_precision
def mutual_information(moved: Tensor, fixed: Tensor, bins: int = 32) -> Tensor:
    """Minus the mutual information of the intensities, in nats: (-inf, 0], lower is better.

    It asks only whether one intensity predicts the other, so it works across modalities. The joint
    histogram is built with cubic B-spline (Parzen) windows, which makes it differentiable (Mattes
    et al. 2003). Memory is linear in the number of voxels; the histogram is summed over chunks.

    Args:
        moved, fixed: (B, C, *S); a histogram per image of the batch, averaged. Each image is scaled
            to its own minimum and maximum.
        bins: per image, at least 6. Two at either end stay nearly empty.
    """
    _check_pair(moved, fixed)
    if bins < 6:
        raise ValueError(f"bins is {bins}, expected 6 or more.")

    def unit(x: Tensor) -> Tensor:
        low, high = x.detach().min(), x.detach().max()
        return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)

    def histogram(a: Tensor, b: Tensor) -> Tensor:
        return _parzen(a, bins).T @ _parzen(b, bins)

    total = moved.new_zeros(())
    for a, b in zip(moved, fixed, strict=True):
        a, b = unit(a).flatten(), unit(b).flatten()
        chunks = zip(a.split(2**16), b.split(2**16), strict=True)
        joint = sum(checkpoint(histogram, x, y, use_reentrant=False) for x, y in chunks) / a.numel()
        # 0 log 0 is 0: with log 1 for the logarithm, its gradient is a number too
        log, log_a, log_b = (
            x.where(x > 0, x.new_ones(())).log()
            for x in (joint, joint.sum(1, keepdim=True), joint.sum(0, keepdim=True))
        )
        total = total + (joint * (log - log_a - log_b)).sum()
    return -total / len(moved)


@full_precision
def diffusion(disp: Tensor) -> Tensor:
    """Mean squared forward difference, in [0, inf), dimensionless (voxels per voxel, squared).

    The mean over voxels and channels is taken along each axis, then over the d axes, as in
    VoxelMorph (Balakrishnan et al. 2019, section IV). 0 for a translation; blind to `spacing`.
    An axis of size 1 contributes 0.
    """
    check_disp(disp)
    axes = range(2, disp.ndim)
    terms = [disp.diff(dim=a).square().mean() for a in axes if disp.shape[a] > 1]
    return sum(terms, disp.new_zeros(())) / len(axes)


@full_precision
def bending(disp: Tensor) -> Tensor:
    """Mean bending energy, in [0, inf), 1/voxel^2: 0 for every affine map.

    Sum over all pairs of axes of the squared second differences, averaged over voxels and channels
    (Rueckert et al. 1999). Axes too short for a second difference contribute 0.
    """
    check_disp(disp)
    d = disp.shape[1]
    total = disp.new_zeros(())
    for i in range(2, d + 2):
        if disp.shape[i] > 2:
            total = total + disp.diff(n=2, dim=i).square().mean()
        for k in range(i + 1, d + 2):
            if disp.shape[i] > 1 and disp.shape[k] > 1:
                total = total + 2 * disp.diff(dim=i).diff(dim=k).square().mean()
    return total


@full_precision
def folding(disp: Tensor) -> Tensor:
    """Mean of max(0, -det J), in [0, inf): how much volume is turned inside out.

    0 where the Jacobian determinant of x + disp(x) is positive everywhere (Mok and Chung 2020).
    """
    return (-jacobian_determinant(disp)).clamp_min(0).mean()


@full_precision
def soft_dice(a: Tensor, b: Tensor) -> Tensor:
    """1 - mean Dice of label maps with values in [0, 1], in [0, 1]; order does not matter.

    Args:
        a, b: (B, L, *S), one channel per label: one-hot, or warped one-hot. Channels that are empty
            in both are left out of the mean; with none left the loss is 0.
    """
    _check_pair(a, b, ("a", "b"))
    overlap = (a * b).flatten(2).sum(-1)
    size = a.flatten(2).sum(-1) + b.flatten(2).sum(-1)
    present = size > 0
    dice = torch.where(present, 2 * overlap / size.where(present, size.new_ones(())), 0.0)
    return (present.sum() - dice.sum()) / present.sum().clamp_min(1)


@full_precision
def consistency(u: Tensor, v: Tensor) -> Tensor:
    """Mean squared difference of two displacements (B, d, *S), in [0, inf), voxels squared.

    It ties the two halves of a split problem together (Sun et al. 2025, equation 7, third term).
    """
    check_disp(u, "u")
    check_disp(v, "v")
    if u.shape != v.shape:
        raise ValueError(f"u has shape {tuple(u.shape)} and v {tuple(v.shape)}, expected the same.")
    return (u - v).square().mean()
