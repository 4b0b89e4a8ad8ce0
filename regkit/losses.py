"""What training minimises. Every loss takes (moved, fixed) in that order and returns a 0-d tensor.

A smaller value is always better. The similarity losses `ncc`, `lncc` and `soft_dice` are one minus
the quantity that papers quote, so they are 0 for a perfect match, as is `mind_ssc`, a distance;
`mutual_information` is negated and has no fixed lower bound. The regularisers are in voxels of the
displacement they are given: a field at half resolution has half the values, hence a quarter of the
squared ones.

All of them compute in float32 at least, also under autocast. The similarities add up in float64, so
that a sum over millions of voxels does not depend on its order, which is another with two threads
than with one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from regkit.autograd import Function
from regkit.spatial import check_disp, full_precision, jacobian_determinant, one_batch


def _pair(
    moved: Tensor, fixed: Tensor, names: tuple[str, str] = ("moved", "fixed")
) -> tuple[Tensor, Tensor]:
    """Both images, in the wider of their dtypes; ValueError for what cannot be compared."""
    if moved.shape != fixed.shape or moved.ndim not in (4, 5):
        raise ValueError(
            f"{names[0]} has shape {tuple(moved.shape)} and {names[1]} {tuple(fixed.shape)}, "
            "expected the same (B, C, H, W) or (B, C, D, H, W)."
        )
    if not (moved.is_floating_point() and fixed.is_floating_point()):
        raise ValueError(
            f"{names[0]} is {moved.dtype} and {names[1]} {fixed.dtype}, expected floating point."
        )
    dtype = torch.promote_types(moved.dtype, fixed.dtype)
    return moved.to(dtype), fixed.to(dtype)


@full_precision
def mse(moved: Tensor, fixed: Tensor) -> Tensor:
    """Mean squared difference, in [0, inf), squared intensity units. (B, C, *S) both."""
    moved, fixed = _pair(moved, fixed)
    return (moved - fixed).square().mean()


@full_precision
def ncc(moved: Tensor, fixed: Tensor) -> Tensor:
    """1 - Pearson's correlation over the whole image, in [0, 2]; 0 up to a*x + b with a > 0.

    Averaged over batch and channels of (B, C, *S). A constant image correlates with nothing: r = 0.
    """
    moved, fixed = _pair(moved, fixed)
    r: Tensor = _Correlation.apply(moved.flatten(2), fixed.flatten(2))
    return 1 - r.mean()


class _Correlation(Function):
    """Pearson's correlation r along N of two (B, C, N): (B, C), its gradient in closed form.

    With u and v the images less their means, divided by their norms, r is u v, and its gradient
    with respect to the first image (v - r u) / norm. A constant image has u = 0 and no gradient.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        (u, norm_u), (v, norm_v) = _unit_vector(a), _unit_vector(b)
        r = (u * v).sum(-1, keepdim=True, dtype=torch.float64).to(u.dtype)
        ctx.save_for_backward(u, v, norm_u, norm_v, r)
        return r[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u, v, norm_u, norm_v, r = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        grad_a = (v - r * u).mul_(grad[..., None] / norm_u) if needs_a else None
        grad_b = (u - r * v).mul_(grad[..., None] / norm_v) if needs_b else None
        return grad_a, grad_b


def _unit_vector(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, N) less its mean, with a sum of squares of 1, and the norm it had (B, C, 1).

    Where all N are alike: 0, and infinity.
    """
    noise = _noise(x, -1)
    # once more, for the mean of large numbers is itself rounded
    for _ in range(2):
        x = x - x.mean(-1, keepdim=True, dtype=torch.float64).to(x.dtype)
    norm = x.square().sum(-1, keepdim=True, dtype=torch.float64).sqrt()
    norm = torch.where(norm <= x.shape[-1] ** 0.5 * noise, torch.inf, norm).to(x.dtype)
    return x / norm, norm


def _noise(x: Tensor, axes: int | list[int]) -> Tensor:
    """The standard deviation below which x is a constant that has been rounded.

    An image of one value, looked up between its voxels, has half an epsilon of it (measured in 2D
    and in 3D); this is four times that.
    """
    largest = torch.maximum(x.amax(axes, True), -x.amin(axes, True))
    return 2 * torch.finfo(x.dtype).eps * largest.detach()


def _running_sum_(x: Tensor, axis: int) -> None:
    """Overwrite x (B, C, *S) with its running sum along an axis."""
    if x.ndim == 5 and axis == 2 and x.device.type == "cpu":
        # plane upon plane: cumsum strides through the whole volume, for one voxel after the other
        for before, plane in itertools.pairwise(x.unbind(axis)):
            plane += before
    else:
        x.cumsum_(axis)


def _box_sum_(x: Tensor, window: int) -> Tensor:
    """Overwrite x (B, C, *S) with its sums over a window^d box around each voxel; returns x.

    Boxes are cut off at the image border. Along each axis in turn the box sum is a difference of
    two running sums, so its cost does not depend on the window.
    """
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        if n == 1:
            continue
        radius = min(window // 2, n - 1)  # a wider box holds no more than the whole axis
        shape = list(x.shape)
        shape[axis] = radius + 1
        zeros = x.new_zeros(shape)  # one more before: the running sum starts with nothing
        total = torch.cat([zeros, x, zeros.narrow(axis, 0, radius)], axis)
        _running_sum_(total, axis)
        torch.sub(total.narrow(axis, 2 * radius + 1, n), total.narrow(axis, 0, n), out=x)
        del total  # before the next one is made
    return x


def _mean_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, C, 1, ...) of each image and channel; constant: infinity."""
    axes = list(range(2, x.ndim))
    exact = x.mean(axes, keepdim=True, dtype=torch.float64)
    mean = exact.to(x.dtype)
    variance = (x - mean).square_().mean(axes, keepdim=True, dtype=torch.float64)
    scale = (variance - (exact - mean).square()).clamp_min_(0).sqrt_().to(x.dtype)
    # what a constant image keeps is not to be blown up
    return mean, torch.where(scale <= _noise(x, axes), torch.inf, scale)


class _LocalCorrelation(Function):
    """Mean squared local correlation of each image and channel (B, C), gradient in closed form.

    Per window with count n, means m, variances a, b and covariance c the value is c^2/(a b). With
    respect to one voxel of the second image, d c = (I - m_I)/n and d b = 2 (J - m_J)/n, so

        d/dJ(x) = 2 sum over windows holding x of [ p (I(x) - m_I) - q (J(x) - m_J) ] / n,
        p = c/(a b),  q = c^2/(a b^2),

    three box sums of per-window numbers; likewise for I. Automatic differentiation would keep and
    revisit every intermediate map. Here the forward pass, which has the maps at hand, works out the
    gradient too and keeps nothing else. Maps are overwritten where they are no longer needed: a
    fresh volume costs more time than the arithmetic on it.

    Both images are brought to zero mean and unit variance first. As the value does not change under
    a*x + b, neither does its gradient through the mean and the scale: both count as constants.
    """

    @staticmethod
    def forward(
        moved: Tensor, fixed: Tensor, mask: Tensor | None, window: int, needed: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The value, and the gradients with respect to both images as far as they are needed."""
        (centre_i, scale_i), (centre_j, scale_j) = _mean_and_scale(moved), _mean_and_scale(fixed)
        i, j = (moved - centre_i).div_(scale_i), (fixed - centre_j).div_(scale_j)
        count = _box_sum_(torch.ones_like(i[:1, :1]), window)
        mean_i = _box_sum_(i.clone(), window).div_(count)
        mean_j = _box_sum_(j.clone(), window).div_(count)
        var_i = _box_sum_(i * i, window).div_(count).addcmul_(mean_i, mean_i, value=-1)
        var_j = _box_sum_(j * j, window).div_(count).addcmul_(mean_j, mean_j, value=-1)
        cov = _box_sum_(i * j, window).div_(count).addcmul_(mean_i, mean_j, value=-1)
        # Images have unit variance here. Running sums leave an error of a few hundred epsilon
        # around 0: a variance below that is a constant window.
        floor = 1e3 * torch.finfo(i.dtype).eps
        flat_i, flat_j = var_i <= floor, var_j <= floor
        left_out = flat_i & flat_j
        if mask is not None:
            left_out |= mask == 0
        undefined = flat_i.logical_or_(flat_j).logical_or_(left_out)
        windows = left_out.logical_not_().flatten(2).sum(-1)
        q_i = var_i.reciprocal_().masked_fill_(undefined, 0)
        q_j = var_j.reciprocal_().masked_fill_(undefined, 0)
        p = (cov * q_i).mul_(q_j)
        cc = cov.mul_(p).clamp_max_(1.0)
        # without a counted window there is nothing to compare: a perfect score
        total = cc.flatten(2).sum(-1, dtype=torch.float64)
        value = torch.where(windows > 0, total / windows, 1.0).to(i.dtype)
        if not any(needed):
            return value, None, None

        p.div_(count)
        q_i.mul_(cc).div_(count)
        q_j.mul_(cc).div_(count)
        del cov, cc, count, flat_i, flat_j, left_out, undefined
        factor = (2 / windows.clamp_min(1)).reshape(scale_i.shape)

        def gradient(
            x: Tensor, y: Tensor, mean_x: Tensor, mean_y: Tensor, q: Tensor, scale: Tensor
        ) -> Tensor:
            """With respect to y."""
            result = _box_sum_((q * mean_y).addcmul_(p, mean_x, value=-1), window)
            result.addcmul_(_box_sum_(p.clone(), window), x)
            result.addcmul_(_box_sum_(q, window), y, value=-1)
            return result.mul_(factor / scale)

        grad_i = gradient(j, i, mean_j, mean_i, q_i, scale_i) if needed[0] else None
        grad_j = gradient(i, j, mean_i, mean_j, q_j, scale_j) if needed[1] else None
        return value, grad_i, grad_j

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor | None, ...]) -> None:
        gradients = output[1:]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*(x for x in gradients if x is not None))
        ctx.set_materialize_grads(False)  # no zeros as the gradient of a gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        grad_i, grad_j = (
            None
            if x is None or grad is None
            else x * grad.reshape(*grad.shape, *[1] * (x.ndim - 2))
            for x in ctx.saved_tensors
        )
        return grad_i, grad_j, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Sequence[int | None],
        moved: Tensor,
        fixed: Tensor,
        mask: Tensor | None,
        window: int,
        needed: tuple[bool, bool],
    ) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
        images = [one_batch(x, dim, info.batch_size) for x, dim in zip((moved, fixed), in_dims)]
        if mask is not None:
            mask = one_batch(mask, in_dims[2], info.batch_size)
        first, second = _need_gradient(*images)
        needed = (needed[0] or first, needed[1] or second)
        results = _LocalCorrelation.apply(*images, mask, window, needed)
        split = [None if x is None else x.unflatten(0, (info.batch_size, -1)) for x in results]
        return tuple(split), tuple(None if x is None else 0 for x in split)


def _need_gradient(a: Tensor, b: Tensor) -> tuple[bool, bool]:
    recording = torch.is_grad_enabled()
    return recording and a.requires_grad, recording and b.requires_grad


@full_precision
def lncc(moved: Tensor, fixed: Tensor, window: int = 9, mask: Tensor | None = None) -> Tensor:
    """1 - mean squared local correlation over window^d boxes, in [0, 1].

    Bright and dark may change places from box to box, and each box may have its own brightness and
    contrast: the value does not change when either image is replaced by a*x + b. Boxes at the
    border use the voxels that exist. Boxes in which both images are constant (background) are left
    out of the mean; where only one is constant, the correlation counts as 0; with no box left the
    loss is 0. So lncc(x, x) is 0 for any x. In float32, "constant" is a standard deviation below
    about 1 % of the image's own: less than that drowns in rounding.

    Each image and channel has its own mean over boxes, and the loss is the mean of those. So a
    batch costs what its images cost on average, however many boxes each of them has.

    Args:
        moved, fixed: (B, C, *S), any scale (Hounsfield units too).
        window: edge of the box in voxels, odd. A box larger than the image holds all of it.
        mask: (B, 1, *S) optional; boxes centred where it is 0 are left out.

    Source: Avants et al. 2008 (cross-correlation of SyN); Balakrishnan et al. 2019, section IV. It
    differs from the published code, which sums instead of averages, pads with zeros, and adds a
    constant to the denominator: that one is not invariant to scale, and fails on CT values.
    """
    moved, fixed = _pair(moved, fixed)
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}, expected an odd number of voxels.")
    if mask is not None and mask.shape != (moved.shape[0], 1, *moved.shape[2:]):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, expected (B, 1, *S) "
            f"for images {tuple(moved.shape)}."
        )
    needed = _need_gradient(moved, fixed)
    correlation: Tensor = _LocalCorrelation.apply(moved, fixed, mask, window, needed)[0]
    return 1 - correlation.mean()


def _parzen(position: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cubic B-spline windows about positions (N,) in [2, bins - 3], in units of a bin.

    Returns:
        The weights on all bins (N, bins); the four bins where they are not 0 (N, 4), int64; the
        slopes of the weights there (N, 4).
    """
    first = position.floor()
    t = position - first
    s = 1 - t
    weights = torch.stack([s**3, 4 - 3 * t * t * (1 + s), 4 - 3 * s * s * (1 + t), t**3], 1) / 6
    slopes = torch.stack([-s * s, t * (3 * t - 4), s * (4 - 3 * s), t * t], 1) / 2
    # NaN has no bin: it stays NaN in any, and so will the sum
    where = first.nan_to_num(2).long()[:, None] + torch.arange(-1, 3, device=position.device)
    return weights.new_zeros(len(weights), bins).scatter_(1, where, weights), where, slopes


class _JointInformation(Function):
    """Mutual information of two images (N,), with its gradient in closed form.

    The joint histogram p is the mean over voxels of the products of two Parzen weights, so

        d MI/d a(x) = 1/N sum over bins k, l of log(p_kl / (p_k p_l)) w_k'(a(x)) w_l(b(x)).

    Both passes run over chunks that fit into the cache; the four bins around an intensity are all
    that its slope touches. As in `_LocalCorrelation`, the forward pass works out the gradient.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bins: int) -> Tensor:
        def positions(x: Tensor) -> tuple[Tensor, Tensor]:
            """In bins, and bins per intensity; a constant image is in one place, and stays."""
            low, high = x.aminmax()
            span = torch.where(high > low, high - low, torch.inf)
            # two bins of margin on either side, so that the four-bin-wide window stays inside
            place = ((x - low) / span).mul_(bins - 5).add_(2).clamp_max_(bins - 3)
            return place, (bins - 5) / span

        (a, scale_a), (b, scale_b) = positions(a), positions(b)
        chunks = list(zip(a.split(2**14), b.split(2**14), strict=True))
        joint = a.new_zeros(bins, bins, dtype=torch.float64)
        for x, y in chunks:
            joint += _parzen(x, bins)[0].double().T @ _parzen(y, bins)[0].double()
        joint /= len(a)
        # 0 log 0 is 0: log 1 stands for the logarithm there
        log, log_a, log_b = (
            torch.where(x > 0, x, 1.0).log() for x in (joint, joint.sum(1), joint.sum(0))
        )
        ratio = log - log_a[:, None] - log_b
        value = (joint * ratio).sum().to(a.dtype)
        if not any(ctx.needs_input_grad):
            return value

        ratio = ratio.to(a.dtype)
        gradients: tuple[list[Tensor], list[Tensor]] = ([], [])
        for x, y in chunks:
            weights_a, where_a, slopes_a = _parzen(x, bins)
            weights_b, where_b, slopes_b = _parzen(y, bins)
            if ctx.needs_input_grad[0]:
                gain = (weights_b @ ratio.T).gather(1, where_a)
                gradients[0].append((gain * slopes_a).sum(1))
            if ctx.needs_input_grad[1]:
                gain = (weights_a @ ratio).gather(1, where_b)
                gradients[1].append((gain * slopes_b).sum(1))
        ctx.save_for_backward(
            *(
                torch.cat(parts).mul_(scale / len(a)) if parts else None
                for parts, scale in zip(gradients, (scale_a, scale_b), strict=True)
            )
        )
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if x is None else x * grad for x in ctx.saved_tensors), None)


@full_precision
def mutual_information(moved: Tensor, fixed: Tensor, bins: int = 32) -> Tensor:
    """Minus the mutual information of the intensities, in nats: (-inf, 0], lower is better.

    It asks only whether one intensity predicts the other, so it works across modalities. The joint
    histogram is built with cubic B-spline (Parzen) windows, which makes it differentiable (Mattes
    et al. 2003). Memory is linear in the number of voxels. Where one image is constant, nothing
    predicts it: 0, and no gradient.

    Args:
        moved, fixed: (B, C, *S); a histogram per image of the batch, averaged. Each image is scaled
            to its own minimum and maximum, which count as constants in the gradient.
        bins: per image, at least 6. Two at either end stay nearly empty.
    """
    moved, fixed = _pair(moved, fixed)
    if bins < 6:
        raise ValueError(f"bins is {bins}, expected 6 or more.")
    pairs = zip(moved.flatten(1), fixed.flatten(1), strict=True)
    values = [_JointInformation.apply(a, b, bins) for a, b in pairs]
    return -torch.stack(values).mean()


def _crop(x: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """The part of (B, C, *S) that begins at voxel `start` and holds `size` voxels."""
    for axis, (a, n) in enumerate(zip(start, size, strict=True), start=2):
        x = x.narrow(axis, a, n)
    return x


class _BoxMean(Function):
    """Means of (B, C, *S) over boxes of 2 radius + 1 voxels that lie inside: S is smaller then.

    Not by running sums, as `_box_sum_`: what is exactly 0 has to stay 0. As sums of slices it is
    ten times as fast on the CPU as pooling; so is its gradient, the same means of what comes back.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, radius: int) -> Tensor:
        width = 2 * radius + 1
        for axis in range(2, x.ndim) if radius else ():
            n = x.shape[axis] - 2 * radius
            total = x.narrow(axis, 0, n) + x.narrow(axis, 1, n)
            for start in range(2, width):
                total += x.narrow(axis, start, n)
            x = total
        return x / int(width ** (x.ndim - 2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.radius = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        around = [2 * ctx.radius] * 2 * (grad.ndim - 2)
        return _BoxMean.apply(nn.functional.pad(grad, around), ctx.radius), None


def _patch_distances(image: Tensor, dilation: int, radius: int) -> Tensor:
    """Mean squared differences of the patches about pairs of neighbours: (B, 1, *S) -> (B, K, *S).

    The pairs are those of neighbours that do not lie opposite: a step along axis a and one along
    axis b. Two pairs of them are the same pair, seen from two voxels: the patches at +a and +b, and
    those at -b and -a, are one step b - a apart. So one volume of distances serves both.
    """
    ndim, shape = image.ndim - 2, image.shape[2:]
    margin = dilation + radius
    padded = nn.functional.pad(image, [margin] * 2 * ndim, mode="replicate")
    found = []
    for a, b, sign in itertools.product(range(ndim), range(ndim), (1, -1)):
        if a >= b:
            continue
        one, other = [0] * ndim, [0] * ndim
        one[a], other[b] = dilation, sign * dilation
        # seen from x: a pair that begins at x + one, and a pair that begins at x - other
        low = [min(i, -j) for i, j in zip(one, other)]
        size = [n + max(i, -j) - k for n, i, j, k in zip(shape, one, other, low)]
        start = [dilation + k for k in low]
        step = [k + j - i for k, i, j in zip(start, one, other)]
        wide = [n + 2 * radius for n in size]
        square = (_crop(padded, start, wide) - _crop(padded, step, wide)).square()
        distance = _BoxMean.apply(square, radius)
        found.append(_crop(distance, [i - k for i, k in zip(one, low)], shape))
        found.append(_crop(distance, [-j - k for j, k in zip(other, low)], shape))
    return torch.cat(found, 1)


@full_precision
def mind_features(image: Tensor, dilation: int = 2, radius: int = 1) -> Tensor:
    """MIND-SSC: what surrounds each voxel, told by how alike its neighbours' patches are.

    Of the neighbours at `dilation` voxels along each axis, all pairs that do not lie opposite are
    taken: 12 in 3D, 4 in 2D. With D the mean squared difference of their two patches, less the
    least D of this voxel, and V the mean of D over the pairs, the features are exp(-D / V). V is
    kept between a thousandth and a thousand times its mean over the image. Like parts of an image
    have like features whatever their brightness: a*x + b, also with a < 0, changes nothing.

    Beyond its border the image goes on as it ends. One voxel along an axis is a slice that goes on
    so; along it, nothing differs. In a part of one value, and in a constant image, all are 1.

    Args:
        image: (B, C, *S), any scale.
        dilation: voxels from the centre to a neighbour, at least 1.
        radius: of a patch, in voxels: its edge is 2 radius + 1. At least 0.

    Returns:
        (B, C K, *S) in (0, 1], K = 12 in 3D and 4 in 2D: all of the first channel come first.

    Raises:
        ValueError: other shapes or dtypes, dilation or radius out of range.

    Source: Heinrich et al., "Towards realtime multimodal fusion for image-guided interventions
    using self-similarities", MICCAI 2013; the least D and the limits of V as in the authors' code.
    That one takes them over a whole batch, we over each image; at the border it repeats squared
    differences, not the image. 2D is ours.
    """
    if image.ndim not in (4, 5) or not image.is_floating_point():
        raise ValueError(
            f"image has shape {tuple(image.shape)} and is {image.dtype}, expected (B, C, H, W) or "
            "(B, C, D, H, W), floating point."
        )
    if dilation < 1 or radius < 0:
        raise ValueError(
            f"dilation is {dilation} and radius {radius}, expected at least 1 and 0 voxels."
        )
    single = image.flatten(0, 1)[:, None]
    # The features do not change with brightness and contrast, so their gradient does not go through
    # them. What rounding leaves of a constant image is 0 after this.
    mean, scale = _mean_and_scale(single.detach())
    distances = _patch_distances((single - mean) / scale, dilation, radius)
    least = distances.amin(1, keepdim=True)
    variance = distances.mean(1, keepdim=True) - least
    typical = variance.mean(list(range(1, variance.ndim)), keepdim=True)
    variance = variance.clamp(1e-3 * typical, 1e3 * typical)
    variance = variance.clamp_min(torch.finfo(image.dtype).tiny)
    features = ((least - distances) / variance).exp()
    return features.reshape(len(image), -1, *image.shape[2:])


@full_precision
def mind_ssc(moved: Tensor, fixed: Tensor, dilation: int = 2, radius: int = 1) -> Tensor:
    """Mean squared difference of the `mind_features` of two images, in [0, 1).

    It compares what each image says of itself, so it works across contrasts, and unlike
    `mutual_information` it does so locally: one contrast may be bright where the other is dark in
    one part of the image, and the other way round elsewhere. 0 for moved = a * fixed + b, a not 0.

    Args:
        moved, fixed: (B, C, *S), any scale.
        dilation, radius: as in `mind_features`, in voxels.
    """
    moved, fixed = _pair(moved, fixed)
    both = (mind_features(x, dilation, radius) for x in (moved, fixed))
    return mse(*both)


class _SquaredDifferences(Function):
    """Weighted sum of mean squared differences, with its gradient in closed form.

    A term (weight, axes) takes one difference D along each of the axes, and has the gradient
    2 weight/N D^T D disp. The transpose D^T hands each difference to the voxel ahead, and minus it
    to the one behind. As in `_LocalCorrelation`, the forward pass works out the gradient.
    """

    @staticmethod
    def forward(ctx: Any, disp: Tensor, terms: Sequence[tuple[float, Sequence[int]]]) -> Tensor:
        value = disp.new_zeros(())
        gradient = torch.zeros_like(disp) if ctx.needs_input_grad[0] else None
        for weight, axes in terms:
            x = disp
            for axis in axes:
                x = x.diff(dim=axis)
            if x.numel() == 0:  # too short for this difference
                continue
            value += weight * x.square().mean()
            if gradient is None:
                continue
            x.mul_(2 * weight / x.numel())
            for left, axis in reversed(list(enumerate(axes))):
                n = x.shape[axis]
                shape = list(x.shape)
                shape[axis] = n + 1
                target = x.new_zeros(shape) if left else gradient
                target.narrow(axis, 1, n).add_(x)
                target.narrow(axis, 0, n).sub_(x)
                x = target
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grad, None


@full_precision
def diffusion(disp: Tensor) -> Tensor:
    """Mean squared forward difference, in [0, inf), dimensionless (voxels per voxel, squared).

    The mean over voxels and channels is taken along each axis, then over the d axes, as in
    VoxelMorph (Balakrishnan et al. 2019, section IV). 0 for a translation; blind to `spacing`.
    An axis of size 1 contributes 0.
    """
    check_disp(disp)
    axes = range(2, disp.ndim)
    value: Tensor = _SquaredDifferences.apply(disp, [(1 / len(axes), (axis,)) for axis in axes])
    return value


@full_precision
def bending(disp: Tensor) -> Tensor:
    """Mean bending energy, in [0, inf), 1/voxel^2: 0 for every affine map.

    Sum over all pairs of axes of the squared second differences, averaged over voxels and channels
    (Rueckert et al. 1999). Axes too short for a second difference contribute 0.
    """
    check_disp(disp)
    axes = range(2, disp.ndim)
    terms = [(1 if i == k else 2, (i, k)) for i in axes for k in axes if i <= k]
    value: Tensor = _SquaredDifferences.apply(disp, terms)
    return value


@full_precision
def folding(disp: Tensor) -> Tensor:
    """Mean of max(0, -det J), in [0, inf): how much volume is turned inside out.

    0 where the Jacobian determinant of x + disp(x) is positive everywhere (Mok and Chung 2020).
    """
    return (-jacobian_determinant(disp)).clamp_min(0).mean()


def _linear_part(theta: Tensor) -> Tensor:
    """A (B, d, d) of theta = [A | t]; ValueError for what is no theta."""
    if theta.ndim != 3 or tuple(theta.shape[1:]) not in ((2, 3), (3, 4)):
        raise ValueError(f"theta has shape {tuple(theta.shape)}, expected (B, 2, 3) or (B, 3, 4).")
    return theta[:, :, :-1]


@full_precision
def determinant(theta: Tensor) -> Tensor:
    """Mean of (det A - 1)^2 / 2 over maps theta = [A | t] (B, d, d+1), in [0, inf).

    0 where A keeps the volume. Zhao et al., "Volume tweening network", IEEE JBHI 2020; their code
    sums over the batch.
    """
    det: Tensor = torch.linalg.det(_linear_part(theta))
    return (det - 1).square().mean() / 2


@full_precision
def orthogonality(theta: Tensor) -> Tensor:
    """How far A stretches and shears, of maps theta = [A | t] (B, d, d+1), in [0, inf).

    With s the squares of the singular values of A it is the sum of (s - 1)^2 / (s + epsilon),
    epsilon = 1e-5, and the mean over the batch: 0 where A is a rotation or a reflection; a stretch
    and a shrinkage by the same factor cost the same. Taken in voxels: spacing should be the same
    along all axes.

    Source: Zhao et al., "Volume tweening network", IEEE JBHI 2020. Their code sums the eigenvalues
    k of C = A^T A + epsilon I, and (1 + epsilon)^2 / k, less 2 d (1 + epsilon), in 3D. The same
    number, but what it adds up is no difference of larger numbers, and holds in 2D.
    """
    a = _linear_part(theta)
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    c = a.mT @ a
    # the trace of (c - 1)^2 (c + epsilon)^-1; what has no inverse gives NaN, and training says so
    ratio: Tensor
    ratio, _ = torch.linalg.solve_ex(c + 1e-5 * one, (c - one) @ (c - one))
    return ratio.diagonal(dim1=-2, dim2=-1).sum(-1).mean()


@full_precision
def soft_dice(a: Tensor, b: Tensor) -> Tensor:
    """1 - mean Dice of label maps with values in [0, 1], in [0, 1]; order does not matter.

    Args:
        a, b: (B, L, *S), one channel per label: one-hot, or warped one-hot. Channels that are empty
            in both are left out of the mean; with none left the loss is 0.
    """
    a, b = _pair(a, b, ("a", "b"))
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
