"""Dilformer, reconstructed from its abstract: two streams, dilated attention, separable fusion.

Paper: Peng, Yan, Liu, Wei, Bai and Deng, "Multi-scale residual learning combined with Dilformer for
dual-stream medical image registration network", Journal of Zhejiang University (Engineering
Science) 60(5), 2026, DOI 10.3785/j.issn.1008-973X.2026.05.017 (in Chinese). Only its abstract and
its references are public. The order of the blocks and what each is for come from there; every layer
and every number here is ours. So the paper's results are not results of this network, nor this
network's the paper's. `Dilformer` says block by block what was taken from where.

Parameters, 3D / 2D: dilformer 846,015 / 484,010.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regkit.blocks import CONV, ConvBlock, DispHead, checkpointed, init_weights, neighbour_attention
from regkit.models.dual_prnet import Pyramid, check_channels
from regkit.spatial import resize


class MSR(nn.Module):
    """x + what two kernels of 3, one after the other, see of it: (B, C, *S) -> (B, C, *S)."""

    def __init__(self, ndim: int, channels: int):
        super().__init__()
        half = max(1, channels // 2)
        self.near = ConvBlock(ndim, channels, half)  # 3^d voxels
        self.far = ConvBlock(ndim, half, half)  # of near: 5^d
        self.join = CONV[ndim](2 * half, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        near = self.near(x)
        joined: Tensor = self.join(torch.cat([near, self.far(near)], dim=1))
        return x + joined


class Encoder(nn.Module):
    """(B, 1, *S) -> features at 1/2^(n-1), ..., 1/2, 1, for channels c_1 ... c_n at 1, 1/2, ...

    S counts a multiple of 2^(n-1), and one. At full size there is one convolution, without MSR.
    """

    def __init__(self, ndim: int, channels: Sequence[int], msr: bool):
        super().__init__()
        self.first = ConvBlock(ndim, 1, channels[0])
        self.down = nn.ModuleList(
            nn.Sequential(ConvBlock(ndim, a, b, stride=2), MSR(ndim, b) if msr else nn.Identity())
            for a, b in pairwise(channels)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [self.first(x)]
        for block in self.down:
            features.append(block(features[-1]))
        return features[::-1]


class ChannelNorm(nn.LayerNorm):
    """Each place by itself, over its channels: (B, C, *S) -> (B, C, *S)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class DilatedAttention(nn.Module):
    """One head a rate: it looks at its 3^d neighbours, that many voxels apart. (B, C, *S), kept."""

    def __init__(self, ndim: int, channels: int, dilations: Sequence[int]):
        super().__init__()
        self.dilations = tuple(dilations)
        self.qkv = CONV[ndim](channels, 3 * channels, kernel_size=1)
        self.out = CONV[ndim](channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.chunk(len(self.dilations), dim=1) for part in self.qkv(x).chunk(3, dim=1))
        heads = [
            neighbour_attention(q[i], k[i], v[i], dilation=rate)
            for i, rate in enumerate(self.dilations)
        ]
        result: Tensor = self.out(torch.cat(heads, dim=1))
        return result


class DilatedMLP(nn.Module):
    """Twice the channels, each rate's share of them through its depthwise convolution, and back."""

    def __init__(self, ndim: int, channels: int, dilations: Sequence[int]):
        super().__init__()
        conv, share = CONV[ndim], 2 * channels // len(dilations)
        self.widen = conv(channels, 2 * channels, kernel_size=1)
        self.mix = nn.ModuleList(
            conv(share, share, kernel_size=3, padding=rate, dilation=rate, groups=share)
            for rate in dilations
        )
        self.narrow = conv(2 * channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.widen(x).chunk(len(self.mix), dim=1)
        mixed = torch.cat([conv(share) for conv, share in zip(self.mix, shares)], dim=1)
        result: Tensor = self.narrow(F.gelu(mixed))
        return result


class DilformerLayer(nn.Module):
    """x + position, x + attention(norm(x)), x + mlp(norm(x)): (B, C, *S) -> (B, C, *S), any S."""

    def __init__(self, ndim: int, channels: int, dilations: Sequence[int]):
        super().__init__()
        self.position = CONV[ndim](channels, channels, kernel_size=3, padding=1, groups=channels)
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.attention = DilatedAttention(ndim, channels, dilations)
        self.mlp = DilatedMLP(ndim, channels, dilations)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x)
        x = x + self.attention(self.norm1(x))
        mixed: Tensor = self.mlp(self.norm2(x))
        return x + mixed


class SRF(nn.Module):
    """A kernel of 1 joins, and x + a kernel of 3 along each axis in turn: C_in -> C channels."""

    def __init__(self, ndim: int, c_in: int, channels: int):
        super().__init__()
        self.join = CONV[ndim](c_in, channels, kernel_size=1)
        conv: Any = CONV[ndim]
        layers: list[nn.Module] = []
        for axis in range(ndim):
            kernel = [3 if i == axis else 1 for i in range(ndim)]
            padding = [n // 2 for n in kernel]
            layers += [conv(channels, channels, kernel, padding=padding), nn.LeakyReLU(0.2)]
        self.along_axes = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        joined = F.leaky_relu(self.join(x), 0.2)
        mixed: Tensor = self.along_axes(joined)
        return joined + mixed


class Head(nn.Module):
    """Both images' features, the coarser level's, and the step: see `Pyramid`."""

    def __init__(
        self,
        ndim: int,
        channels: int,
        *,
        above: int,
        layers: int,
        srf: bool,
        dilations: Sequence[int],
    ):
        super().__init__()
        self.join = CONV[ndim](2 * channels, channels, kernel_size=1)
        self.dilformer = nn.Sequential(
            *(DilformerLayer(ndim, channels, dilations) for _ in range(layers))
        )
        self.fuse = (SRF if srf else ConvBlock)(ndim, channels + above, channels)
        self.step = DispHead(ndim, channels)

    def forward(
        self, moving: Tensor, fixed: Tensor, handed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = self.dilformer(self.join(torch.cat([moving, fixed], dim=1)))
        if handed is not None:
            x = torch.cat([x, resize(handed, x.shape[2:])], dim=1)
        x = self.fuse(x)
        return self.step(x), x


class Dilformer(Pyramid):
    """`dilformer`: 846,015 parameters in 3D, 484,010 in 2D; `stages` as in `Pyramid`.

    Args:
        ndim: 2 or 3.
        channels: at 1, 1/2, 1/4, ...: one number a level, at least 2 levels; the last two, where
            the Dilformer layers are, multiples of the number of dilations.
        msr, dilformer, srf: the blocks of the paper; without one, what is said below.
        multi_resolution: show `stages`, for a loss on every level.
        layers: of Dilformer on each of the two coarsest levels.
        dilations: how many voxels apart the neighbours lie that each head looks at.
        save_memory: compute the convolutions again on the way back instead of keeping them.

    Block by block: what the abstract says, the nearest published relatives, and what we took from
    which.

    - Two streams and a pyramid ("dual-stream pyramid feature extraction"): the loop of
      `dual_prnet`. The features of each level come from the way down alone, where `dual_prnet` has
      a decoder.
    - MSR ("multi-scale residual learning block", in the feature extraction). Relatives: Li et al.,
      "Multi-scale residual network", ECCV 2018: branches of kernel 3 and 5, joined by a kernel of
      1, beside a shortcut; Gao et al., "Res2Net", 2021: a branch that takes up the answer of the
      one before, so that two kernels of 3 see 5. We took the form of the first and the branches of
      the second. `msr=False`: the strided convolutions alone.
    - Dilformer ("heterogeneous receptive field interaction mechanism using multi-rate dilated
      convolutions", for "global modeling capacity at low-resolution scales"). Relatives: Jiao et
      al., "DilateFormer", 2023: the heads of one attention look at neighbours 1, 2 and 3 voxels
      apart; Guo et al., "SegNeXt", 2022: a feed-forward part with a depthwise convolution. We took
      both, gave the convolution the rates of the heads, and put two such layers on each of the two
      coarsest levels. A convolution with one filter a channel tells a token where it is (Chu et al.
      2021), as in DilateFormer. `dilformer=False`: none.
    - SRF ("separable residual fusion block", before the displacement). Relatives: Yang et al.,
      "Asymmetric 3D convolutional neural networks for action recognition", 2019, reference 19 of
      the paper: a kernel of 3 x 3 x 3 as one of 3 along each axis in turn; He et al. 2016: the
      shortcut. It joins what this level found in both images and what the coarser level hands on.
      `srf=False`: one convolution of kernel 3.
    - Multi-resolution loss ("across multiple scales"): `levels` of a `Recipe`. Relative, by its
      title: Shen, Wei, Yan et al., "Large-deformation 3D medical image registration based on
      multi-scale constraints", Chinese Journal of Lasers 51(21), 2024, reference 2 of the paper,
      not read. `multi_resolution=False`: the result shows no stages, and a recipe asks the last
      displacement alone.
    - Ours in a head: a kernel of 1 joins the features of both images before the Dilformer layers;
      they normalise each place over its channels; GELU works on twice the channels; leaky ReLU has
      the slope 0.2. Steps start at 0, convolution blocks as in He et al. 2015.
    """

    def __init__(
        self,
        ndim: int = 3,
        *,
        channels: Sequence[int] = (8, 16, 32, 48, 96),
        msr: bool = True,
        dilformer: bool = True,
        srf: bool = True,
        multi_resolution: bool = True,
        layers: int = 2,
        dilations: Sequence[int] = (1, 2, 3),
        save_memory: bool = False,
    ):
        check_channels(channels)
        if not dilations or min(dilations) < 1:
            raise ValueError(f"dilations is {tuple(dilations)}, expected numbers of 1 or more")
        if layers < 1:
            raise ValueError(f"layers is {layers}, expected 1 or more (dilformer=False: none)")
        if dilformer and any(c % len(dilations) for c in channels[-2:]):
            raise ValueError(
                f"channels is {tuple(channels)}, expected the last two to be multiples of "
                f"{len(dilations)}, the number of dilations"
            )
        super().__init__(ndim, len(channels), multi_resolution=multi_resolution)
        self.describe = Encoder(ndim, channels, msr)
        coarse = channels[::-1]
        self.heads = nn.ModuleList(
            Head(
                ndim,
                c,
                above=above,
                layers=layers if dilformer and k < 2 else 0,
                srf=srf,
                dilations=dilations,
            )
            for k, (above, c) in enumerate(pairwise((0, *coarse)))
        )
        self.apply(init_weights)
        if save_memory:
            self.apply(checkpointed)
