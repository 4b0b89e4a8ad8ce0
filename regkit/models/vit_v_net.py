"""ViT-V-Net: a vision transformer at the bottom of a V-Net.

Paper: Chen, He, Frey, Li and Du, "ViT-V-Net: vision transformer for unsupervised volumetric medical
image registration", MIDL 2021 (short papers). The transformer is that of Dosovitskiy et al., "An
image is worth 16x16 words", ICLR 2021.

    1      two convolutions, 16 ------------------------------- two, 16, displacement
    1/2    largest of 2, two convolutions, 32 ------------- two, 32
    1/4    largest of 2, two convolutions, 32 ---------- two, 32
    1/8    largest of 2 ----------------------------- two, 48
    1/16   largest of 2 -------------------------- two, 96
    1/32   patches of 8 places at 1/4: tokens, 12 layers, convolution, 512

Parameters in 3D, as published: 31,560,079, with positions learned for images of 160 x 192 x 224. In
2D, with positions for images of 160 x 192: 24,112,686.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regkit.attention import Attention, TransformerLayer, check_heads
from regkit.blocks import (
    CONV,
    MAX_POOL,
    ConvBlock,
    NormBlock,
    UpBlock,
    checkpointed,
    quiet_head,
)
from regkit.models.base import RegistrationModel
from regkit.spatial import LINEAR

PATCH = 8  # places a side, at 1/4 of the image
BASE = (160, 192, 224)  # voxels


class ViT(nn.Module):
    """Features to tokens, which look at each other: (B, c_in, *S) -> (B, C, *S / 8), rounded up.

    A position is learned for each token of `grid`; on another grid they are interpolated.
    """

    def __init__(
        self,
        ndim: int,
        c_in: int,
        channels: int,
        *,
        grid: Sequence[int],
        heads: int,
        layers: int,
        mlp: int,
        dropout: float,
    ):
        super().__init__()
        self.dropout = dropout
        self.patches = CONV[ndim](c_in, channels, kernel_size=PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.zeros(1, channels, *grid))
        self.layers = nn.Sequential(
            *(
                TransformerLayer(
                    channels,
                    mlp,
                    Attention(channels, heads),
                    activation=F.gelu,
                    dropout=dropout,
                )
                for _ in range(layers)
            )
        )
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, [p for n in reversed(x.shape[2:]) for p in (0, -n % PATCH)])
        x = self.patches(x)
        position: Tensor = self.position
        if position.shape[2:] != x.shape[2:]:
            position = F.interpolate(position, x.shape[2:], mode=LINEAR[x.ndim - 2])
        x = F.dropout(x + position, self.dropout, self.training)
        tokens: Tensor = self.norm(self.layers(x.movedim(1, -1)))
        return tokens.movedim(-1, 1)


class ViTVNet(RegistrationModel):
    """`vit_v_net`: 31,560,079 parameters in 3D.

    Args:
        encoder: channels at 1, 1/2 and 1/4, three numbers.
        decoder: channels at 1/16, 1/8, ..., 1, five numbers.
        bottom: channels of the convolution behind the transformer.
        channels, heads, layers, mlp: of the transformer; `heads` divides `channels`.
        base: the image size, in voxels, for whose tokens positions are learned, by default
            (160, 192, 224), in 2D (160, 192).
        dropout: the share of numbers that training leaves out in the transformer.
        save_memory: compute the convolutions again on the way back instead of keeping them.

    What differs from the published code:

    - Images have any size: they are padded to a multiple of 4, and further down what is missing of
      a patch or a pair is filled up, and cut off again on the way up. Positions are interpolated
      linearly to the tokens of an image; on images of the size `base` they are as learned. In the
      published network an image has one size for ever.
    - Group normalisation, over 8 channels of one image, where the published decoder has batch
      normalisation. At batch 1, the paper's, that is not the same function in training and in use.
      Both have as many parameters.
    - The head starts at N(0, 1e-6), published N(0, 1e-5), so that an untrained model moves nothing
      by 0.001 voxels.
    - Layer norms inside the transformer's layers add 1e-5 to the variance, published 1e-6.
    """

    divisor = 4

    def __init__(
        self,
        ndim: int = 3,
        *,
        encoder: Sequence[int] = (16, 32, 32),
        decoder: Sequence[int] = (96, 48, 32, 32, 16),
        bottom: int = 512,
        channels: int = 252,
        heads: int = 12,
        layers: int = 12,
        mlp: int = 3072,
        base: Sequence[int] | None = None,
        dropout: float = 0.1,
        save_memory: bool = False,
    ):
        super().__init__(ndim)
        base = BASE[:ndim] if base is None else base
        if len(encoder) != 3 or len(decoder) != 5 or min(*encoder, *decoder, bottom, mlp) < 1:
            raise ValueError(
                f"encoder is {tuple(encoder)}, decoder {tuple(decoder)}, bottom {bottom} and mlp "
                f"{mlp}, expected 3, 5, 1 and 1 positive numbers"
            )
        if len(base) != ndim or min(base) < 1:
            raise ValueError(f"base is {tuple(base)}, expected {ndim} numbers of voxels")
        if not 0 <= dropout < 1 or layers < 0:
            raise ValueError(
                f"dropout is {dropout} and layers {layers}, expected a share below 1 and 0 or more"
            )
        check_heads(channels, heads)
        e1, e2, e4 = encoder
        self.down = nn.ModuleList(
            nn.Sequential(ConvBlock(ndim, a, b, slope=0.0), ConvBlock(ndim, b, b, slope=0.0))
            for a, b in pairwise((2, *encoder))
        )
        # an odd size is filled up: its half is rounded up
        self.pool = MAX_POOL[ndim](2, ceil_mode=True)
        self.vit = ViT(
            ndim,
            e4,
            channels,
            grid=[-(-n // (4 * PATCH)) for n in base],
            heads=heads,
            layers=layers,
            mlp=mlp,
            dropout=dropout,
        )
        block = partial(NormBlock, bias=False)
        self.bottom = block(ndim, channels, bottom)
        skips = (e4, e4, e4, e2, e1)  # at 1/16, 1/8, 1/4, 1/2, 1
        self.up = nn.ModuleList(
            UpBlock(ndim, a, skip, b, block=block)
            for (a, b), skip in zip(pairwise((bottom, *decoder)), skips)
        )
        self.head = quiet_head(ndim, decoder[-1])
        if save_memory:
            self.apply(checkpointed)

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        x = torch.cat([moving, fixed], dim=1)  # (B, 2, *S)
        skips: list[Tensor] = []
        for conv in self.down:
            x = conv(self.pool(x) if skips else x)
            skips.append(x)  # 1, 1/2, 1/4
        skips.append(self.pool(x))  # 1/8
        skips.append(self.pool(skips[-1]))  # 1/16
        x = self.bottom(self.vit(x))
        for up in self.up:
            x = up(x, skips.pop())
        return {"disp": self.head(x)}
