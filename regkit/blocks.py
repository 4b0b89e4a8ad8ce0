"""Layers shared by two models or more. `ndim` is 2 or 3 everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from types import EllipsisType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from regkit.autograd import Function
from regkit.spatial import LINEAR, full_precision

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOL = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


class Recomputed(nn.Module):
    """A part of a network, `layers`, whose inner results need not be kept for the gradient.

    With `save_memory` (set it by `model.apply(checkpointed)`) the gradient keeps the input alone;
    what lies between is computed a second time on the way back (activation checkpointing): the
    same numbers, about a third more time. The peak of a step falls less than what it keeps, because
    the way back through the largest layer needs its share all the same.
    """

    save_memory = False
    layers: Callable[..., Tensor]  # of a subclass: the part itself, without the saving of memory

    def forward(self, *x: Tensor) -> Tensor:
        if self.save_memory and torch.is_grad_enabled():
            result: Tensor = checkpoint(self.layers, *x, use_reentrant=False)
            return result
        return self.layers(*x)


def checkpointed(module: nn.Module) -> None:
    """For `model.apply`: let each `Recomputed` part save memory."""
    if isinstance(module, Recomputed):
        module.save_memory = True


class ConvBlock(Recomputed):
    """Convolution and LeakyReLU: (B, c_in, *S) -> (B, c_out, *S / stride). No normalisation."""

    def __init__(
        self,
        ndim: int,
        c_in: int,
        c_out: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        slope: float = 0.2,
        bias: bool = True,
    ):
        super().__init__()
        self.conv = CONV[ndim](c_in, c_out, kernel_size=kernel, stride=stride, padding=1, bias=bias)
        self.activation = nn.LeakyReLU(slope)

    def layers(self, x: Tensor) -> Tensor:
        """As of `Recomputed`."""
        return self.after(self.conv(x))

    def after(self, x: Tensor) -> Tensor:
        """What follows the convolution."""
        result: Tensor = self.activation(x)
        return result


def raised(x: Tensor) -> Tensor:
    """In float32 at least: what a head answers, before anything is computed with it."""
    return x.float() if x.dtype.itemsize < 4 else x


class DispHead(nn.Module):
    """Features to a displacement or velocity: (B, c_in, *S) -> (B, d, *S), voxels, float32.

    Weights start at N(0, 1e-5) and the bias at 0, as in VoxelMorph: an untrained model leaves the
    image where it is, and training starts from the identity.
    """

    def __init__(self, ndim: int, c_in: int):
        super().__init__()
        self.conv = CONV[ndim](c_in, ndim, kernel_size=3, padding=1)
        nn.init.normal_(self.conv.weight, std=1e-5)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return raised(self.conv(x)).contiguous()  # wherever the features had their channels


def quiet_head(ndim: int, c_in: int) -> DispHead:
    """A head whose weights start at N(0, 1e-6): for features that a norm has made large."""
    head = DispHead(ndim, c_in)
    nn.init.normal_(head.conv.weight, std=1e-6)
    return head


def init_weights(module: nn.Module) -> None:
    """For `model.apply`: heads start at 0, the identity, convolutions as in He et al. 2015.

    So a signal stays as strong. With PyTorch's own start it loses most of itself in each layer
    before ReLU, and learning starts late.
    """
    if isinstance(module, DispHead):
        nn.init.zeros_(module.conv.weight)
    elif isinstance(module, ConvBlock):
        nn.init.kaiming_normal_(module.conv.weight, a=module.activation.negative_slope)
        nn.init.zeros_(module.conv.bias)  # type: ignore[arg-type]


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalisation over groups of 8 channels of each image: independent of the batch."""
    return nn.GroupNorm(max(1, channels // 8), channels)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, ReLU(F(x) + x): (B, c_in, *S) -> (B, c_out, *S / stride).

    He et al. 2016, figure 2, with group normalisation. Where the size changes, the shortcut is a
    convolution of kernel 1.
    """

    def __init__(self, ndim: int, c_in: int, c_out: int, *, stride: int = 1):
        super().__init__()
        conv = CONV[ndim]
        self.residual = nn.Sequential(
            conv(c_in, c_out, kernel_size=3, stride=stride, padding=1, bias=False),
            group_norm(c_out),
            nn.ReLU(),
            conv(c_out, c_out, kernel_size=3, padding=1, bias=False),
            group_norm(c_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                conv(c_in, c_out, kernel_size=1, stride=stride, bias=False), group_norm(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


class NormBlock(ConvBlock):
    """Convolution, group normalisation, ReLU: (B, c_in, *S) -> (B, c_out, *S / stride)."""

    def __init__(self, ndim: int, c_in: int, c_out: int, *, stride: int = 1, bias: bool = True):
        super().__init__(ndim, c_in, c_out, stride=stride, bias=bias)
        self.norm = group_norm(c_out)

    def after(self, x: Tensor) -> Tensor:
        """As of `ConvBlock`."""
        return torch.relu(self.norm(x))


class InstanceBlock(ConvBlock):
    """Convolution without bias, instance normalisation, LeakyReLU 0.01: as of `ConvBlock`.

    Each channel of each image is normalised over its own places (Ulyanov et al., "Instance
    normalization", 2016), so that a bias would change nothing. A single place has nothing to be
    compared with: it stays as it is.
    """

    def __init__(self, ndim: int, c_in: int, c_out: int, *, stride: int = 1):
        super().__init__(ndim, c_in, c_out, stride=stride, slope=0.01, bias=False)

    def after(self, x: Tensor) -> Tensor:
        """As of `ConvBlock`."""
        alone = x[0, 0].numel() == 1
        return F.leaky_relu_(x if alone else F.instance_norm(x), 0.01)


class UpBlock(Recomputed):
    """A level up in a U-Net: (B, c_in, *S) and a skip (B, skip, *S') -> (B, c_out, *S').

    Doubled by `doubled`, beside the skip, then two convolutions.

    Args:
        block: makes one from (ndim, c_in, c_out): a class such as `InstanceBlock`, or a part of it.
    """

    def __init__(
        self,
        ndim: int,
        c_in: int,
        skip: int,
        c_out: int,
        *,
        block: Callable[[int, int, int], ConvBlock] = InstanceBlock,
    ):
        super().__init__()
        self.first = block(ndim, c_in + skip, c_out)
        self.second = block(ndim, c_out, c_out)

    def layers(self, x: Tensor, skip: Tensor) -> Tensor:
        """As of `Recomputed`."""
        joined = torch.cat([doubled(x, like=skip), channels_last(skip)], dim=1)
        return self.second.layers(self.first.layers(joined))


def channels_last(x: Tensor) -> Tensor:
    """The same image, on a CPU with its channels side by side in memory.

    Interpolation is several times faster there, and a convolution takes it as it is. GPUs choose
    for themselves.
    """
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim - 2]) if x.device.type == "cpu" else x


def doubled(x: Tensor, like: Tensor) -> Tensor:
    """Features at twice the size, linearly, cut to that of `like`: (B, C, *S) -> (B, C, *S').

    Place k comes to lie on places 2k and 2k + 1, which it was made from, at odd sizes as well:
    there the last one is cut off.

    Args:
        like: any channels; S' is 2 S, or 2 S - 1 along an axis.
    """
    x = F.interpolate(channels_last(x), scale_factor=2, mode=LINEAR[x.ndim - 2])
    return x[:, :, *(slice(n) for n in like.shape[2:])]


class PlainConv(nn.Sequential):
    """Convolutions and ReLU from (B, d, *S) to (B, d, *S): no norm, and no residual connection.

    The identity all the same at the start: d channels carry +u, d carry -u, ReLU lets one of each
    pass, and the last layer takes their difference.
    """

    def __init__(self, ndim: int, *, width: int, depth: int):
        widths = (ndim, *[width] * (depth - 1))
        blocks = [ConvBlock(ndim, a, b, slope=0.0) for a, b in pairwise(widths)]
        head = DispHead(ndim, width)
        super().__init__(*blocks, head)
        first, *middle = (block.conv for block in blocks)
        with torch.no_grad():
            nn.init.dirac_(first.weight[:ndim])
            first.weight[ndim : 2 * ndim] = -first.weight[:ndim]
            for conv in middle:
                nn.init.dirac_(conv.weight[: 2 * ndim])
            for conv in (first, *middle):
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)
            nn.init.dirac_(head.conv.weight[:, :ndim])
            head.conv.weight[:, ndim : 2 * ndim] = -head.conv.weight[:, :ndim]


# neighbours: every place of an image compares itself with those around it ------------------------


def neighbours(ndim: int, radius: int = 1, dilation: int = 1) -> list[tuple[int, ...]]:
    """The (2 radius + 1)^d shifts to a place's neighbours, itself among them, in array order.

    With a dilation they lie that many voxels apart.
    """
    return list(product([dilation * i for i in range(-radius, radius + 1)], repeat=ndim))


Index = tuple[EllipsisType | slice, ...]


def _meeting(shape: Sequence[int], shift: Sequence[int]) -> tuple[Index, Index]:
    """Where x lies and where x + shift lies, for all x for which both are on the grid."""
    here = [slice(max(0, -s), max(0, min(n, n - s))) for n, s in zip(shape, shift)]
    there = [slice(max(0, s), max(0, min(n, n + s))) for n, s in zip(shape, shift)]
    return (..., *here), (..., *there)


def _compare(a: Tensor, b: Tensor, shifts: Sequence[Sequence[int]], singly: bool = False) -> Tensor:
    """result[:, k](x) = sum over channels of a(x) b(x + shift k).

    singly: one channel after the other, slower and without a product of all of them in memory.
    """
    result = a.new_zeros(len(a), len(shifts), *a.shape[2:])
    for k, shift in enumerate(shifts):
        here, there = _meeting(a.shape[2:], shift)
        x, y, target = a[here], b[there], result[:, k][here]
        if singly:
            for x_c, y_c in zip(x.unbind(1), y.unbind(1)):
                target.addcmul_(x_c, y_c)
        else:
            target.copy_((x * y).sum(dim=1))
    return result


def _gather(weights: Tensor, b: Tensor, shifts: Sequence[Sequence[int]]) -> Tensor:
    """result(x) = sum over k of weights[:, k](x) b(x + shift k)."""
    result = torch.zeros_like(b)
    for k, shift in enumerate(shifts):
        here, there = _meeting(b.shape[2:], shift)
        result[here].addcmul_(weights[:, k : k + 1][here], b[there])
    return result


def _scatter(weights: Tensor, a: Tensor, shifts: Sequence[Sequence[int]]) -> Tensor:
    """result(x + shift k) = sum over k of weights[:, k](x) a(x)."""
    result = torch.zeros_like(a)
    for k, shift in enumerate(shifts):
        here, there = _meeting(a.shape[2:], shift)
        result[there].addcmul_(weights[:, k : k + 1][here], a[here])
    return result


class _Compare(Function):
    """Automatic differentiation would keep a product of all channels for each neighbour."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        shifts: Sequence[Sequence[int]],
        scale: float,
        singly: bool = False,
    ) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.shifts, ctx.scale = shifts, scale
        return _compare(a, b, shifts, singly).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        grad_a = _gather(grad, b, ctx.shifts).mul_(ctx.scale)
        return grad_a, _scatter(grad, a, ctx.shifts).mul_(ctx.scale), None, None, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, b: Tensor, shifts: Sequence[Sequence[int]]) -> Tensor:
        ctx.save_for_backward(weights, b)
        ctx.shifts = shifts
        return _gather(weights, b, shifts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, b = ctx.saved_tensors
        return _compare(grad, b, ctx.shifts), _scatter(weights, grad, ctx.shifts), None


@full_precision
def local_correlation(fixed: Tensor, moving: Tensor, radius: int = 1, dilation: int = 1) -> Tensor:
    """How alike the features at x are to those of the other image around x.

    result[:, k](x) = mean over channels of fixed(x) moving(x + shift k), with the shifts of
    `neighbours`; 0 where x + shift lies outside. Dosovitskiy et al., "FlowNet", 2015, equation 1,
    with patches of one voxel. Beyond its result it takes no memory: one product of two channels is
    added at a time.

    Args:
        fixed, moving: features, (B, C, *S).
        radius: of the search, in places of this grid; dilation: how many voxels apart they lie.

    Returns:
        (B, (2 radius + 1)^d, *S), float32 at least.
    """
    shifts = neighbours(fixed.ndim - 2, radius, dilation)
    result: Tensor = _Compare.apply(fixed, moving, shifts, 1 / fixed.shape[1], True)
    return result


@full_precision
def neighbour_attention(
    q: Tensor, k: Tensor, v: Tensor, radius: int = 1, dilation: int = 1
) -> Tensor:
    """Each place looks at its neighbours on the grid: (B, C, *S) three times -> (B, C, *S).

    The softmax over `neighbours` of q(x) k(x + shift) / sqrt(C) weighs v(x + shift); places outside
    the image take no part. Jiao et al., "DilateFormer", 2023, where those outside count
    as zeros. The neighbours are met by shifts: nothing is unfolded into (2 radius + 1)^d copies.
    """
    shifts = neighbours(q.ndim - 2, radius, dilation)
    scores: Tensor = _Compare.apply(q, k, shifts, q.shape[1] ** -0.5)
    ones = q.new_ones(1, 1, *q.shape[2:])
    outside = _compare(ones, ones, shifts) == 0
    weights = scores.masked_fill(outside, -torch.inf).softmax(dim=1)
    result: Tensor = _Gather.apply(weights, v, shifts)
    return result
