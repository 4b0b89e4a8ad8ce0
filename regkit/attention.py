"""Attention: every place of an image is a token, and tokens look at each other.

Tokens are images with the channels last, (B, *S, C): S of two axes or three, of any size.

- `Attention`, `TransformerLayer`, `Transformer`: as PyTorch has them, over all tokens, the same at
  a linear price, or inside windows without positions.
- `WindowAttention`, `SwinLayer`, `PatchMerging`: the parts of Swin (Liu et al., "Swin transformer:
  hierarchical vision transformer using shifted windows", ICCV 2021), with a learned bias for where
  in the window another token lies. TransMorph is made of them.

How a place compares itself with its neighbours is in `regkit.blocks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regkit.blocks import CONV, Recomputed
from regkit.spatial import full_precision

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
    x: Tensor, side: int | Sequence[int], shift: bool = False
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Cut an image into windows of `side` places along each axis (Liu et al., "Swin", 2021).

    With `shift` the cuts lie half a side (rounded down) further on, so that neighbours that one cut
    parts are together in the other: the image is rolled, and what comes in from its other end
    shares a window with strangers. Where the size is no multiple of `side`, the image is padded at
    its end. An axis no longer than `side` is not cut.

    Args:
        x: (B, *S, C).
        side: places of a window along each axis, or one number for all axes.

    Returns:
        The windows, (B * windows, places, C); which places of a window may look at which, (B *
        windows, places, places), None where all may; and what puts windows together again, to
        (B, *S, C). Strangers may not look at each other, and nobody at padding, but padding itself.
    """
    shape = x.shape[1:-1]
    d = len(shape)
    wanted = [side] * d if isinstance(side, int) else side
    sides = [min(s, n) for s, n in zip(wanted, shape, strict=True)]
    counts = [-(-n // s) for s, n in zip(sides, shape)]
    padding = [0, 0, *(p for i in reversed(range(d)) for p in (0, counts[i] * sides[i] - shape[i]))]
    shifts = [s // 2 if shift and s < n else 0 for s, n in zip(sides, shape)]
    axes = list(range(1, d + 1))

    def cut(x: Tensor, fill: float = 0) -> Tensor:
        x = F.pad(x, padding, value=fill) if any(padding) else x
        x = torch.roll(x, [-s for s in shifts], axes) if any(shifts) else x
        split = [n for pair in zip(counts, sides) for n in pair]
        x = x.reshape(len(x), *split, -1)  # (B, count, side, count, side, ..., C)
        x = x.permute(0, *range(1, 2 * d, 2), *range(2, 2 * d + 1, 2), 2 * d + 1)
        return x.flatten(d + 1, 2 * d).flatten(0, d)

    def join(windows: Tensor) -> Tensor:
        x = windows.reshape(-1, *counts, *sides, windows.shape[-1])
        x = x.permute(0, *(k for i in range(d) for k in (1 + i, 1 + d + i)), 2 * d + 1)
        x = x.reshape(len(x), *(c * s for c, s in zip(counts, sides)), -1)
        x = torch.roll(x, shifts, axes) if any(shifts) else x
        return x[:, *(slice(n) for n in shape)]

    if not any(padding) and not any(shifts):
        return cut(x), None, join
    party = torch.zeros_like(x[..., :1], dtype=torch.int64)  # places that may share a window
    for axis, s in zip(axes, shifts):
        party.narrow(axis, 0, s).add_(2**axis)  # they come in at the other end
    parties = cut(party, fill=-1)
    return cut(x), parties == parties.transpose(1, 2), join


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, tokens, 3 C) -> queries, keys and values, (B, heads, tokens, C / heads) each."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def check_heads(channels: int, heads: int) -> None:
    """Raise ValueError unless each head gets a whole number of channels."""
    if heads < 1 or channels % heads:
        raise ValueError(f"heads is {heads}, expected a divisor of {channels}, the channels.")


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
            tokens, together, join = cut_windows(qkv, self.window, self.shift)
            result: Tensor = self.out_proj(join(self._attend(tokens, together)))
        else:
            result = self.out_proj(self._attend(qkv.flatten(1, -2)).reshape(x.shape))
        return result

    def _attend(self, qkv: Tensor, together: Tensor | None = None) -> Tensor:
        """(B, tokens, 3 C) -> (B, tokens, C)."""
        q, k, v = split_heads(qkv, self.heads)
        if self.kind == "linear":
            result = linear_attention(q, k, v)
        else:
            mask = None if together is None else together[:, None]
            result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return result.transpose(1, 2).flatten(2)


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (B, *S, C) -> (B, *S, C).

    With full attention the function and the weights of nn.TransformerEncoderLayer, norm first.

    Args:
        mlp: channels between the two linear layers.
        activation: between them: F.relu, or F.gelu as in ViT.
        dropout: the share of numbers that training leaves out, after both layers of the MLP.
    """

    def __init__(
        self,
        channels: int,
        mlp: int,
        attention: Attention,
        *,
        activation: Callable[[Tensor], Tensor] = F.relu,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.activation, self.dropout = activation, dropout
        self.self_attn = attention
        self.linear1 = nn.Linear(channels, mlp)
        self.linear2 = nn.Linear(mlp, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        mixed = self._drop(self.activation(self.linear1(self.norm2(x))))
        return x + self._drop(self.linear2(mixed))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


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


# Swin: windows with learned relative positions ---------------------------------------------------


def relative_index(
    window: Sequence[int],
    sides: Sequence[int],
    key_window: Sequence[int] | None = None,
    key_sides: Sequence[int] | None = None,
) -> Tensor:
    """Which entry of a table of relative positions belongs to each pair of places of a window.

    The table has an entry for each difference query - key, -(key side - 1) ... side - 1 along each
    axis, in array order: prod(window + key_window - 1) of them.

    Args:
        window: the sides that the table is made for.
        sides: those at hand, no longer than `window`: of a window that an image cuts short.
        key_window, key_sides: the same for the keys, where they lie in a larger window than the
            queries. None: in the same window.

    Returns:
        (queries, keys), int64, on the CPU.
    """
    key_window = window if key_window is None else key_window
    key_sides = sides if key_sides is None else key_sides
    d = len(window)
    index = torch.zeros([1] * (2 * d), dtype=torch.int64)
    for i in range(d):
        query = torch.arange(sides[i]).reshape([-1 if a == i else 1 for a in range(2 * d)])
        key = torch.arange(key_sides[i]).reshape([-1 if a == d + i else 1 for a in range(2 * d)])
        along = query - key + key_window[i] - 1  # from 0
        index = index * (window[i] + key_window[i] - 1) + along
    return index.flatten(0, d - 1).flatten(1)


class WindowAttention(nn.Module):
    """Each token looks at those in its window: (B, *S, C) -> (B, *S, C).

    softmax(q k / sqrt(c) + bias) v, Liu et al. 2021, equation 4. The bias is learned, one number
    for each head and each difference of places. Padding, and in Swin what the image's other end
    would lend to a shifted window, is never looked at.

    Args:
        channels: C, a multiple of `heads`.
        window: places along each axis; an image may be smaller: then the window is cut down to it
            and the weights fit all the same.
        shift: cut half a window further on, see `cut_windows`.
        qkv_bias: queries, keys and values have a bias. Swin has one, TransMorph has none.

    Raises:
        ValueError: heads that do not divide the channels, a window below 1, tokens of as many axes
            as the window has not.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        window: Sequence[int],
        *,
        shift: bool = False,
        qkv_bias: bool = False,
    ):
        super().__init__()
        check_heads(channels, heads)
        if not window or min(window) < 1:
            raise ValueError(f"window is {tuple(window)}, expected numbers of 1 or more.")
        self.heads, self.window, self.shift = heads, tuple(window), shift
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.out = nn.Linear(channels, channels)
        self.bias = nn.Parameter(torch.empty(math.prod(2 * w - 1 for w in self.window), heads))
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[1:-1]
        if len(shape) != len(self.window):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected (B, *S, C) with as many axes S as the "
                f"window {self.window} has."
            )
        tokens, together, join = cut_windows(self.qkv(x), self.window, self.shift)
        index = relative_index(self.window, [min(w, n) for w, n in zip(self.window, shape)])
        bias = self.bias[index.to(x.device)].permute(2, 0, 1)[None]  # (1, heads, N, N)
        if together is not None:
            bias = bias.masked_fill(~together[:, None], -torch.inf)  # (windows, heads, N, N)
        q, k, v = split_heads(tokens, self.heads)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        result: Tensor = self.out(join(found.transpose(1, 2).flatten(2)))
        return result


class DropPath(nn.Module):
    """Training leaves out what a layer adds for some images of a batch, chosen by chance.

    Huang et al., "Deep networks with stochastic depth", 2016. What stays is divided by the
    probability to stay, so that the mean is that of use, where nothing is left out. share: of
    images left out, from 0 to below 1.
    """

    def __init__(self, share: float):
        super().__init__()
        if not 0 <= share < 1:
            raise ValueError(f"share is {share}, expected a number from 0 to below 1.")
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.share == 0:
            return x
        stays = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.share
        return x * stays / (1 - self.share)


def mlp(channels: int, hidden: int) -> nn.Sequential:
    """Two linear layers with GELU between them: (..., C) -> (..., C)."""
    return nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))


class SwinLayer(Recomputed):
    """x + attention(norm(x)), then x + mlp(norm(x)), in windows: (B, *S, C) -> (B, *S, C).

    Args:
        channels, heads, window, shift, qkv_bias: as of `WindowAttention`.
        mlp_ratio: channels between the two linear layers of the MLP, in multiples of C.
        drop_path: see `DropPath`.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        window: Sequence[int],
        *,
        shift: bool = False,
        qkv_bias: bool = False,
        mlp_ratio: int = 4,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window, shift=shift, qkv_bias=qkv_bias)
        self.mlp = mlp(channels, mlp_ratio * channels)
        self.drop = DropPath(drop_path)

    def layers(self, x: Tensor) -> Tensor:
        """The layer itself, without the saving of memory."""
        x = x + self.drop(self.attention(self.norm1(x)))
        mixed: Tensor = self.drop(self.mlp(self.norm2(x)))
        return x + mixed


class PatchMerging(nn.Module):
    """Half as many tokens along each axis, twice the channels: (B, *S, C) -> (B, *S / 2, 2 C).

    The 2^d neighbours side by side, normalised, through one linear layer without bias (Liu et al.
    2021, section 3.1). An odd size is padded with zeros at its end: its half is rounded up.
    """

    def __init__(self, ndim: int, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(2**ndim * channels)
        self.linear = nn.Linear(2**ndim * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[1:-1]
        x = F.pad(x, [0, 0, *(p for n in reversed(shape) for p in (0, n % 2))])
        places = cut_windows(x, 2)[0]
        places = places.reshape(len(x), *((n + 1) // 2 for n in shape), -1)
        result: Tensor = self.linear(self.norm(places))
        return result
