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
from regkit.spatial import full_precision

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOL = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


class ConvBlock(nn.Module):
    """Convolution and LeakyReLU: (B, c_in, *S) -> (B, c_out, *S / stride). No normalisation.

    With `save_memory` (set it by `model.apply(checkpointed)`) the gradient keeps the input alone;
    what lies between is computed a second time on the way back (activation checkpointing): the
    same numbers, about a third more time. The peak of a step falls less than what it keeps, because
    the way back through the largest layer needs its share all the same.
    """

    save_memory = False

    def __init__(
        self,
        ndim: int,
        c_in: int,
        c_out: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        slope: float = 0.2,
    ):
        super().__init__()
        self.conv = CONV[ndim](c_in, c_out, kernel_size=kernel, stride=stride, padding=1)
        self.activation = nn.LeakyReLU(slope)

    def forward(self, *x: Tensor) -> Tensor:
        if self.save_memory and torch.is_grad_enabled():
            result: Tensor = checkpoint(self.layers, *x, use_reentrant=False)
            return result
        return self.layers(*x)

    def layers(self, x: Tensor) -> Tensor:
        """The block itself, without the saving of memory."""
        result: Tensor = self.activation(self.conv(x))
        return result


def checkpointed(module: nn.Module) -> None:
    """For `model.apply`: let each ConvBlock save memory."""
    if isinstance(module, ConvBlock):
        module.save_memory = True


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
        return raised(self.conv(x))


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

    def __init__(self, ndim: int, c_in: int, c_out: int, *, stride: int = 1):
        super().__init__(ndim, c_in, c_out, stride=stride)
        self.norm = group_norm(c_out)

    def layers(self, x: Tensor) -> Tensor:
        """As of `ConvBlock`."""
        return torch.relu(self.norm(self.conv(x)))


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


# attention: every place of an image is a token --------------------------------------------------

ATTENTION = ("full", "linear", "window")


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Katharopoulos et al. 2020, equations 5 and 7: (..., N, c) three times -> (..., N, c).

    The weight of a token is f(q) f(k), f = elu + 1, where the softmax has exp(q k / sqrt(c)). The
    sum over all tokens is then done once, for all who ask: N c^2 products instead of N^2 c.

    The result has the dtype of v. Half precision is raised to float32 inside: a sum over thousands
    of tokens is larger than float16 can hold, and bfloat16 keeps three digits of it.
    """
    return _linear_attention(q, k, v).to(v.dtype)


@full_precision
def _linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    total = q @ k.sum(-2).unsqueeze(-1)  # (..., N, 1)
    return q @ (k.transpose(-2, -1) @ v) / total


def cut_windows(
    x: Tensor, side: int, shift: bool = False
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Cut an image into windows of `side` places along each axis (Liu et al., "Swin", 2021).

    With `shift` the cuts lie half a side away, so that neighbours that one cut parts are together
    in the other. Windows at the border are then smaller, as where the size is no multiple of
    `side`: what is missing is padding. An axis shorter than `side` is not cut.

    Args:
        x: (B, *S, C).

    Returns:
        The windows, (B * windows, places, C); which of the places are real, (B * windows, places),
        None where all are; and what puts windows together again, to (B, *S, C).
    """
    shape = x.shape[1:-1]
    d = len(shape)
    sides = [min(side, n) for n in shape]
    before = [s // 2 if shift and s < n else 0 for s, n in zip(sides, shape)]
    after = [-(n + b) % s for s, n, b in zip(sides, shape, before)]
    padding = [0, 0, *(p for i in reversed(range(d)) for p in (before[i], after[i]))]
    counts = [(n + b + a) // s for n, b, a, s in zip(shape, before, after, sides)]

    def cut(x: Tensor) -> Tensor:
        x = F.pad(x, padding)
        split = [n for pair in zip(counts, sides) for n in pair]
        x = x.reshape(len(x), *split, -1)  # (B, count, side, count, side, ..., C)
        x = x.permute(0, *range(1, 2 * d, 2), *range(2, 2 * d + 1, 2), 2 * d + 1)
        return x.flatten(d + 1, 2 * d).flatten(0, d)

    def join(windows: Tensor) -> Tensor:
        x = windows.reshape(-1, *counts, *sides, windows.shape[-1])
        x = x.permute(0, *(k for i in range(d) for k in (1 + i, 1 + d + i)), 2 * d + 1)
        x = x.reshape(len(x), *(c * s for c, s in zip(counts, sides)), -1)
        return x[:, *(slice(b, b + n) for b, n in zip(before, shape))]

    real = cut(torch.ones_like(x[..., :1], dtype=torch.bool))[..., 0] if any(padding) else None
    return cut(x), real, join


class Attention(nn.Module):
    """Multi-head self-attention, (B, *S, C) -> (B, *S, C), with the weights of torch's own.

    kind: "full", each token looks at all (Vaswani et al. 2017); "linear", the same at a price that
    grows as the number of tokens, not as its square; "window", each looks at those in its window.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        kind: str = "full",
        *,
        window: int = 4,
        shift: bool = False,
    ):
        super().__init__()
        self.heads, self.kind, self.window, self.shift = heads, kind, window, shift
        self.out_proj = nn.Linear(channels, channels)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        if self.kind == "window":
            tokens, real, join = cut_windows(qkv, self.window, self.shift)
            result: Tensor = self.out_proj(join(self._attend(tokens, real)))
        else:
            result = self.out_proj(self._attend(qkv.flatten(1, -2)).reshape(x.shape))
        return result

    def _attend(self, qkv: Tensor, real: Tensor | None = None) -> Tensor:
        """(B, tokens, 3 C) -> (B, tokens, C)."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, c)
        if self.kind == "linear":
            result = linear_attention(q, k, v)
        else:
            mask = None if real is None else real[:, None, None]
            result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return result.transpose(1, 2).flatten(2)


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (B, *S, C) -> (B, *S, C).

    With full attention the function and the weights of nn.TransformerEncoderLayer, norm first.
    """

    def __init__(self, channels: int, mlp: int, attention: Attention):
        super().__init__()
        self.self_attn = attention
        self.linear1 = nn.Linear(channels, mlp)
        self.linear2 = nn.Linear(mlp, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        mixed: Tensor = self.linear2(torch.relu(self.linear1(self.norm2(x))))
        return x + mixed


class Transformer(nn.Module):
    """Places look at each other: (B, C, *S) -> (B, C, *S), one token a voxel, any S.

    attention: one of ATTENTION. window: the side of a window, in tokens; every second layer has its
    windows shifted.
    """

    def __init__(
        self,
        ndim: int,
        channels: int,
        *,
        heads: int,
        layers: int,
        mlp: int,
        attention: str = "full",
        window: int = 4,
    ):
        super().__init__()
        self.position = CONV[ndim](channels, channels, kernel_size=3, padding=1, groups=channels)
        self.layers = nn.Sequential(
            *(
                TransformerLayer(
                    channels,
                    mlp,
                    Attention(channels, heads, attention, window=window, shift=i % 2 == 1),
                )
                for i in range(layers)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x)
        tokens: Tensor = self.layers(x.movedim(1, -1))
        return tokens.movedim(-1, 1)


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
