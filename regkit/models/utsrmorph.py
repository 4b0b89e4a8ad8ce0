"""UTSRMorph: TransMorph whose windows overlap, and whose way up makes its own fine grid.

Paper: Zhang, Mo, Zhang et al., "UTSRMorph: a unified transformer and superresolution network for
unsupervised medical image registration", IEEE Transactions on Medical Imaging, 2024. Its attention
is that of Chen et al., "Activating more pixels in image super-resolution transformer" (HAT), CVPR
2023. Its way up is in `regkit.models.super_resolution`.

Two forms are published, with other numbers of parameters for the same three sizes (3D):

    form     small        base          large         super-resolution          last step
    oasis    20,417,999   89,943,159    421,495,867   each channel for itself   of the displacement
    ixi      62,737,103   250,633,919   321,842,143   over all channels         of features

In 2D, where there is none published: oasis 11,631,150, 51,705,334 and 247,056,954; ixi 18,692,638,
74,669,710 and 117,376,302. `UTSRMorph` says what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regkit.attention import SwinLayer, cut_windows, mlp, relative_index
from regkit.blocks import AVERAGE_POOL, CONV, InstanceBlock, Recomputed, checkpointed, quiet_head
from regkit.messages import unknown
from regkit.models.base import RegistrationModel
from regkit.models.super_resolution import FinerBlock, SuperResolution
from regkit.models.transmorph import (
    FULL,
    PATCH,
    Size,
    SwinEncoder,
    check_size,
    decoded,
    windows,
)
from regkit.spatial import full_precision

SIZES = {
    "oasis": {
        "small": Size(48, (2, 2, 2, 2), (4, 4, 4, 4)),
        "base": Size(96, (2, 2, 4, 2), (4, 4, 8, 8)),
        "large": Size(160, (2, 2, 18, 2), (8, 8, 8, 8)),
    },
    "ixi": {
        "small": Size(48, (2, 2, 2, 2), (4, 4, 4, 4)),
        "base": Size(96, (2, 2, 2, 2), (4, 4, 4, 4)),
        "large": Size(96, (2, 2, 18, 2), (8, 8, 8, 8)),
    },
}
SIDE, REACH = 4, 1  # overlapping windows: 4 places a side look at those and at 1 more on each side
OVERLAP_HEADS = 4


class ChannelBranch(nn.Module):
    """Two convolutions, then each channel times a number: (B, *S, C) -> (B, *S, C).

    The number, between 0 and 1, is found from the means of all channels (Hu et al.,
    "Squeeze-and-excitation networks", CVPR 2018).
    """

    def __init__(self, ndim: int, channels: int):
        super().__init__()
        narrow, squeezed = max(1, channels // 3), max(1, channels // 30)
        self.convs = nn.Sequential(
            CONV[ndim](channels, narrow, kernel_size=3, padding=1),
            nn.GELU(),
            CONV[ndim](narrow, channels, kernel_size=3, padding=1),
        )
        self.weigh = nn.Sequential(
            nn.Linear(channels, squeezed), nn.GELU(), nn.Linear(squeezed, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x.movedim(-1, 1))
        weights: Tensor = self.weigh(x.flatten(2).mean(-1))  # (B, C)
        return x.movedim(1, -1) * weights.reshape(len(x), *[1] * (x.ndim - 2), -1)


class FusionLayer(Recomputed):
    """FAB: a Swin layer with 0.01 of a `ChannelBranch` beside its attention, (B, *S, C), kept."""

    def __init__(self, ndim: int, channels: int, swin: SwinLayer):
        super().__init__()
        self.swin = swin
        self.branch = ChannelBranch(ndim, channels)

    def layers(self, x: Tensor) -> Tensor:
        """As of `Recomputed`."""
        swin, y = self.swin, self.swin.norm1(x)
        x = x + swin.drop(swin.attention(y)) + 0.01 * self.branch(y)
        mixed: Tensor = swin.drop(swin.mlp(swin.norm2(x)))
        return x + mixed


def overlapping_windows(x: Tensor, sides: Sequence[int], reach: int) -> Tensor:
    """The windows of `cut_windows`, each with `reach` places more beyond each of its sides.

    (B, *S, C) -> (B * windows, places, C), 0 beyond the image. Where S are multiples of the sides:
    F.unfold of kernel side + 2 reach, stride side and padding reach.
    """
    shape = x.shape[1:-1]
    beyond = [(reach, reach - n % -s) for n, s in zip(shape, sides, strict=True)]
    x = F.pad(x, [0, 0, *(p for pair in reversed(beyond) for p in pair)])
    for axis, side in enumerate(sides, start=1):
        x = x.unfold(axis, side + 2 * reach, side)
    x = x.movedim(len(shape) + 1, -1)  # (B, count, count, ..., side, side, ..., C)
    return x.flatten(0, len(shape)).flatten(1, -2)


class OverlapLayer(Recomputed):
    """OAB: attention from windows to larger ones around them, then an MLP. (B, *S, C), kept.

    x + attention(norm(x)), then x + mlp(norm(x)). The queries of a window of 4 places a side look
    at the keys and values of 6, so that what one window holds reaches its neighbours without a
    shift. Places beyond the image take no part.
    """

    def __init__(self, ndim: int, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.bias = nn.Parameter(torch.empty((2 * SIDE + 2 * REACH - 1) ** ndim, OVERLAP_HEADS))
        nn.init.trunc_normal_(self.bias, std=0.02)
        self.mlp = mlp(channels, 4 * channels)

    def layers(self, x: Tensor) -> Tensor:
        """As of `Recomputed`."""
        x = x + self.attend(self.norm1(x))
        mixed: Tensor = self.mlp(self.norm2(x))
        return x + mixed

    def attend(self, x: Tensor) -> Tensor:
        """The overlapping attention, (B, *S, C) -> (B, *S, C)."""
        shape = x.shape[1:-1]
        sides = [min(SIDE, n) for n in shape]
        key_sides = [s + 2 * REACH for s in sides]
        qkv = self.qkv(x)
        q, _, join = cut_windows(qkv[..., : x.shape[-1]], SIDE)
        k, v = overlapping_windows(qkv[..., x.shape[-1] :], sides, REACH).chunk(2, dim=-1)
        real = overlapping_windows(torch.ones_like(x[..., :1]), sides, REACH)[..., 0] > 0
        d = len(shape)
        index = relative_index((SIDE,) * d, sides, (SIDE + 2 * REACH,) * d, key_sides)
        bias = self.bias[index.to(x.device)].permute(2, 0, 1)[None]  # (1, heads, queries, keys)
        bias = bias.masked_fill(~real[:, None, None], -torch.inf)  # (windows, heads, ...)
        q, k, v = (t.unflatten(-1, (OVERLAP_HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        result: Tensor = self.out(join(found.transpose(1, 2).flatten(2)))
        return result


class Encoder(SwinEncoder):
    """That of `transmorph`, of `FusionLayer`s, with an `OverlapLayer` last on each level."""

    def __init__(self, ndim: int, c_in: int, size: Size, window: Sequence[int], drop_path: float):
        super().__init__(ndim, c_in, size, window, drop_path)
        for k, stage in enumerate(self.stages):
            c = size.channels * 2**k
            layers = [FusionLayer(ndim, c, cast(SwinLayer, layer)) for layer in stage.children()]
            self.stages[k] = nn.Sequential(*layers, OverlapLayer(ndim, c))


class UTSRMorph(RegistrationModel):
    """`utsrmorph`: by default 89,943,159 parameters in 3D, 11,631,150 in 2D; published for OASIS.

    Args:
        size: "small", "base" or "large", see `SIZES`; by default base, in 2D small.
        form: "oasis": convolutions of one channel each write the finer grid, and the level at full
            size is not there: the displacement itself is brought from half the size to the whole.
            "ixi": convolutions over all channels, up to full size, as published for IXI.
        window, drop_path, save_memory: as of `transmorph`.
        channels, layers, heads: in place of those of `size`, as of `transmorph`; channels a
            multiple of 4, the heads of the overlapping attention.

    What differs from the published code:

    - Keys that lie beyond the image take no part; there, they are zeros that do. The larger window
      reaches one place further on every side; there, two before it and none behind it.
    - A table of relative positions is read from its first entry to its last; there, HAT's formula
      gives negative numbers where keys and queries have windows of different sides, and Python
      takes those from the end of the table.
    - A super-resolution starts as linear interpolation, so that the network starts as TransMorph
      would. There its weights start at N(0, 0.001^2): what comes from below is then hardly seen
      beside the skip, and the one behind the head, small numbers times small numbers, learns late.
    - The displacement is in voxels of the image before its super-resolution as after it.
    - The squeezed numbers of a channel branch pass GELU; with ReLU, one number alone (C / 30 of 48
      channels) can be dead for good.
    - What `transmorph` does: any size, padding takes no part, a start as PyTorch has it.
    - The heads of the large sizes are not told by our source. The published counts ask for 192 in
      all layers together, as 8 everywhere makes; so would 4, 4, 8, 16.
    """

    divisor = PATCH

    def __init__(
        self,
        ndim: int = 3,
        *,
        size: str | None = None,
        form: str = "oasis",
        window: int | Sequence[int] | None = None,
        drop_path: float = 0.3,
        channels: int | None = None,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        save_memory: bool = False,
    ):
        super().__init__(ndim)
        if form not in SIZES:
            raise unknown("form", form, SIZES)
        size = {2: "small", 3: "base"}[ndim] if size is None else size
        if size not in SIZES[form]:
            raise unknown("size", size, SIZES[form])
        named = SIZES[form][size]
        chosen = Size(channels or named.channels, layers or named.layers, heads or named.heads)
        c, alone = chosen.channels, form == "oasis"
        if c < 1 or c % OVERLAP_HEADS:
            raise ValueError(f"channels is {c}, expected a multiple of {OVERLAP_HEADS}")
        check_size(chosen)
        self.encoder = Encoder(ndim, 2, chosen, windows(window, ndim), drop_path)
        # from 1/32 up: channels that come from below, of the skip, and those handed on
        skips = [4 * c, 2 * c, c, c // 2] + ([] if alone else [FULL])
        widths = [8 * c, *skips[:-1], FULL]
        self.pool = AVERAGE_POOL[ndim](3, stride=2, padding=1)
        self.stem_half = InstanceBlock(ndim, 2, c // 2)
        self.stem_full = None if alone else InstanceBlock(ndim, 2, FULL)
        self.up = nn.ModuleList(
            FinerBlock(ndim, a, skip, b, alone) for (a, b), skip in zip(pairwise(widths), skips)
        )
        self.head = quiet_head(ndim, FULL)
        self.finer = SuperResolution(ndim, ndim, alone) if alone else nn.Identity()
        if save_memory:
            self.apply(checkpointed)

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        return {"disp": full_precision(self.finer)(self.head(decoded(self, moving, fixed)))}
