"""What `regkit.classical.fit` minimises: the dissimilarity of a moved image to one fixed image.

The losses of `regkit.losses` serve training, where every pair is met once. A search meets one fixed
image a hundred times, under small motions of the other. So each energy here is made once for the
two images of a level, works out then what depends on the fixed image alone, and is a smooth
function of the moved image: no voxel and no window enters or leaves at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regkit.autograd import Function
from regkit.losses import _box_sum_, ncc

Energy = Callable[[Tensor], Tensor]  # moved (1, 1, *S) -> 0-d
BINS = 32  # of the joint histogram, per image
# What the variances of a window are raised by, in those of the whole image: a window of a hundredth
# of the image's contrast counts half as much as one of more.
FLOOR = 1e-4


class _WithGradient(Function):
    """A value whose gradient with respect to the moved image is worked out with it."""

    @staticmethod
    def forward(ctx: Any, moved: Tensor, both: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        value, gradient = both(moved)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grad, None


def correlation(moving: Tensor, fixed: Tensor, mask: Tensor | None = None) -> Energy:
    """`regkit.losses.ncc` with the fixed image, over the voxels of the mask if there is one."""
    if mask is None:
        return partial(ncc, fixed=fixed)
    inside = mask > 0
    target = fixed[inside].reshape(1, 1, 1, -1)
    return lambda moved: ncc(moved[inside].reshape(1, 1, 1, -1), target)


def local_correlation(
    moving: Tensor, fixed: Tensor, mask: Tensor | None = None, window: int = 5
) -> Energy:
    """1 - the mean squared correlation in windows, in [0, 1]; near 0 for the fixed image itself.

    As `regkit.losses.lncc`, but smooth. That one leaves out windows where both images are constant,
    so its mean jumps where one enters or leaves the background. Here a window of variances a and b
    and covariance c has the correlation c^2 / ((a + f)(b + f)) and counts with the weight
    1 - f^2 / ((a + f)(b + f)): both come to 0 by themselves as the window becomes constant. f is
    `FLOOR`, for images of unit variance.

    Args:
        moving, fixed: (1, 1, *S) each; of the moving image the mean and variance are taken.
        mask: (1, 1, *S), windows centred where it is 0 are left out.
    """
    shift, scale = float(moving.mean()), float(moving.var(correction=0).sqrt())
    j = (fixed - fixed.mean()) / fixed.var(correction=0).sqrt()
    count = _box_sum_(torch.ones_like(j), window)
    mean_j = _box_sum_(j.clone(), window).div_(count)
    within = torch.ones_like(j) if mask is None else (mask > 0).to(j)
    voxels = within.sum(dtype=torch.float64)
    # 1 / (b + f), and 0 where windows are left out
    over_j = within / _variance(j, mean_j, count, window).add_(FLOOR)

    def both(moved: Tensor) -> tuple[Tensor, Tensor]:
        i = (moved - shift) / scale
        mean_i = _box_sum_(i.clone(), window).div_(count)
        over_i = _variance(i, mean_i, count, window).add_(FLOOR).reciprocal_()
        cov = _box_sum_(i * j, window).div_(count).addcmul_(mean_i, mean_j, value=-1)
        over = over_i * over_j
        p = cov * over
        weights = voxels - FLOOR**2 * over.sum(dtype=torch.float64)
        mean = (p * cov).sum(dtype=torch.float64) / weights.clamp_min(1e-12)
        # the slope of the mean: see `regkit.losses._LocalCorrelation`, and the weights have one too
        q = (cov.square() + float(mean) * FLOOR**2).mul_(over).mul_(over_i).div_(count)
        p.div_(count)
        slope = _box_sum_((q * mean_i).addcmul_(p, mean_j, value=-1), window)
        slope.addcmul_(_box_sum_(p, window), j).addcmul_(_box_sum_(q, window), i, value=-1)
        return 1 - mean, slope.mul_(float(-2 / (scale * weights.clamp_min(1e-12))))

    return lambda moved: _WithGradient.apply(moved, both)


def _variance(x: Tensor, mean: Tensor, count: Tensor, window: int) -> Tensor:
    """Of each window; rounding may take it below 0."""
    variance = _box_sum_(x * x, window).div_(count)
    return variance.addcmul_(mean, mean, value=-1).clamp_min_(0)


def information(moving: Tensor, fixed: Tensor, mask: Tensor | None = None) -> Energy:
    """Minus the mutual information of two images, in nats, in (-inf, 0]; Mattes et al. 2003.

    As there, and unlike `regkit.losses.mutual_information`, each voxel of the fixed image lies in
    one bin, and only the moved image, which moves, is spread over four by a cubic B-spline. That
    takes an eighth of the time.

    Args:
        moving, fixed: (1, 1, *S) each; of the moving image the range is taken, with 0, which is
            what lies outside of it.
        mask: (1, 1, *S), voxels where it is 0 are left out.
    """
    inside = torch.ones_like(fixed, dtype=torch.bool) if mask is None else mask > 0
    seen = fixed[inside].double()
    span = (seen.max() - seen.min()).clamp_min(1e-12)
    rows = ((seen - seen.min()) / span * BINS).long().clamp_max_(BINS - 1) * BINS
    low, high = min(0.0, float(moving.detach().min())), float(moving.detach().max())
    rate = (BINS - 5) / max(high - low, 1e-12)  # two bins of margin on either side

    def both(moved: Tensor) -> tuple[Tensor, Tensor]:
        position = ((moved[inside] - low) * rate).add_(2).clamp_(2, BINS - 3)
        first = position.floor()
        t = position - first
        s = 1 - t
        start = rows + first.long() - 1
        weights = s**3 / 6, 2 / 3 - t * t * (1 + s) / 2, 2 / 3 - s * s * (1 + t) / 2, t**3 / 6
        slopes = -s * s / 2, t * (1.5 * t - 2), s * (2 - 1.5 * s), t * t / 2
        joint = torch.zeros(BINS * BINS, dtype=torch.float64, device=moved.device)
        for k, weight in enumerate(weights):
            joint += torch.bincount(start + k, weight.double(), BINS * BINS)
        joint = (joint / len(rows)).reshape(BINS, BINS)
        # 0 log 0 is 0: log 1 stands for the logarithm there
        log, log_rows, log_columns = (
            torch.where(x > 0, x, 1.0).log() for x in (joint, joint.sum(1), joint.sum(0))
        )
        ratio = log - log_rows[:, None] - log_columns
        value = -(joint * ratio).sum()
        ratio = ratio.to(moved.dtype).flatten()
        gain = sum(ratio[start + k] * slope for k, slope in enumerate(slopes))
        gradient = torch.zeros_like(moved)
        gradient[inside] = gain * (-rate / len(rows))
        return value, gradient

    return lambda moved: _WithGradient.apply(moved, both)


ENERGIES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Energy]] = {
    "ncc": correlation,
    "lncc": local_correlation,  # results/affine_window.json: windows of 3, 5 and 7 are alike
    "mutual_information": information,
}
