"""VoxelMorph: one U-Net looks at both images and writes down the displacement.

Balakrishnan, Zhao, Sabuncu, Guttag and Dalca, "An unsupervised learning model for deformable
medical image registration", CVPR 2018 (`vxm1`, `vxm2`); the same, "VoxelMorph: a learning framework
for deformable medical image registration", IEEE TMI 2019; Dalca, Balakrishnan, Guttag and Sabuncu,
"Unsupervised learning of probabilistic diffeomorphic registration", Medical Image Analysis 2019
(the velocity field of `vxm_diff`).

Three generations of the published code exist and disagree. `vxm1` and `vxm2` follow the networks of
2018 (the PyTorch form: strided convolutions of kernel 4 on the way down, 3 elsewhere), and hand the
raw images to the last level. `vxm` and `vxm_diff` follow the default of version 0.2, which shrinks
by max-pooling. Parameters, 3D / 2D: vxm1 355,579 / 104,802; vxm2 396,451 / 118,386; vxm and
vxm_diff 327,331 / 109,170.

`save_memory` trains larger images in the same memory, see `regkit.blocks.ConvBlock`; it changes no
number.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regkit.blocks import MAX_POOL, ConvBlock, DispHead, checkpointed
from regkit.models.base import RegistrationModel
from regkit.spatial import integrate, resize_disp


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class VxmStrided(RegistrationModel):
    """The networks of CVPR 2018: `vxm1` and `vxm2`. 355,579 and 396,451 parameters in 3D.

    Args:
        decoder: channels of the decoder's convolutions, the last ones at full resolution:
            (32, 32, 32, 32, 8, 8) is vxm1, (32, 32, 32, 32, 32, 16, 16) is vxm2.
        encoder: channels of the four strided convolutions.
        save_memory: compute the layers again on the way back instead of keeping them.
    """

    divisor = 16

    def __init__(
        self,
        ndim: int = 3,
        *,
        decoder: Sequence[int] = (32, 32, 32, 32, 8, 8),
        encoder: Sequence[int] = (16, 32, 32, 32),
        save_memory: bool = False,
    ):
        super().__init__(ndim)
        if len(encoder) != 4 or len(decoder) < 6 or min(*encoder, *decoder) < 1:
            raise ValueError(
                f"encoder is {encoder} and decoder {decoder}, expected 4 positive numbers and "
                "6 or more"
            )
        e1, e2, e3, e4 = encoder
        d1, d2, d3, d4, d5, d6, *last = decoder
        self.down = nn.ModuleList(
            ConvBlock(ndim, a, b, kernel=4, stride=2) for a, b in pairwise((2, *encoder))
        )
        self.up = nn.ModuleList(
            [
                ConvBlock(ndim, e4, d1),  # 1/16
                ConvBlock(ndim, d1 + e3, d2),  # 1/8
                ConvBlock(ndim, d2 + e2, d3),  # 1/4
                ConvBlock(ndim, d3 + e1, d4),  # 1/2
            ]
        )
        self.last_half = ConvBlock(ndim, d4, d5)  # 1/2 again
        self.last_full = nn.Sequential(
            *(ConvBlock(ndim, a, b) for a, b in pairwise((d5 + 2, d6, *last)))
        )
        self.head = DispHead(ndim, (d6, *last)[-1])
        if save_memory:
            self.apply(checkpointed)

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        pair = torch.cat([moving, fixed], dim=1)  # (B, 2, *S)
        skips = []
        x = pair
        for conv in self.down:
            x = conv(x)
            skips.append(x)  # 1/2, 1/4, 1/8, 1/16
        x = self.up[0](skips.pop())
        for conv in self.up[1:]:
            x = conv(torch.cat([_double(x), skips.pop()], dim=1))
        x = _double(self.last_half(x))
        x = self.last_full(torch.cat([x, pair], dim=1))
        return {"disp": self.head(x)}


class UNet(nn.Module):
    """The default U-Net of version 0.2: (B, 2, *S) -> (B, last[-1], *S), S a multiple of 16.

    One convolution a level, max-pooling down, nearest-neighbour up; the skip is the convolution's
    output before pooling. With `half_resolution` the last doubling is left out and the output has
    size S/2: the option `unet_half_res` of the published code, five times cheaper in 3D.
    """

    def __init__(
        self,
        ndim: int,
        *,
        encoder: Sequence[int],
        decoder: Sequence[int],
        last: Sequence[int],
        half_resolution: bool = False,
    ):
        super().__init__()
        self.half_resolution = half_resolution
        self.down = nn.ModuleList(ConvBlock(ndim, a, b) for a, b in pairwise((2, *encoder)))
        self.pool = MAX_POOL[ndim](2)
        skips = list(reversed(encoder))  # 1/8, 1/4, 1/2, 1
        self.up = nn.ModuleList()
        c = encoder[-1]
        for width, skip in zip(decoder, skips, strict=True):
            self.up.append(ConvBlock(ndim, c, width))
            c = width + skip
        if half_resolution:
            c = decoder[-1]  # the full-resolution skip is not used
        self.last = nn.Sequential(*(ConvBlock(ndim, a, b) for a, b in pairwise((c, *last))))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for conv in self.down:
            x = conv(x)
            skips.append(x)  # 1, 1/2, 1/4, 1/8
            x = self.pool(x)
        for conv in self.up:  # at 1/16, 1/8, 1/4, 1/2
            x = conv(x)
            skip = skips.pop()
            if skips or not self.half_resolution:
                x = torch.cat([_double(x), skip], dim=1)
        features: Tensor = self.last(x)
        return features


class Vxm(RegistrationModel):
    """`vxm`, the default network of VoxelMorph 0.2: 327,331 parameters in 3D, 109,170 in 2D.

    Args:
        encoder, decoder, last: channels of the U-Net going down, coming up, and at the end.
        half_resolution: the U-Net stops at half resolution; its displacement is resized.
        save_memory: compute the layers again on the way back instead of keeping them.

    What differs from the published code: the images may have any size (they are padded to a
    multiple of 16), and `vxm_diff` is the deterministic form: no variance, no sampling, no
    Kullback-Leibler term.
    """

    def __init__(
        self,
        ndim: int = 3,
        *,
        encoder: Sequence[int] = (16, 32, 32, 32),
        decoder: Sequence[int] = (32, 32, 32, 32),
        last: Sequence[int] = (32, 16, 16),
        half_resolution: bool = False,
        save_memory: bool = False,
    ):
        super().__init__(ndim)
        if len(encoder) != len(decoder) or min(*encoder, *decoder, *last, 0 if not last else 1) < 1:
            raise ValueError(
                f"encoder is {encoder}, decoder {decoder} and last {last}, expected as many "
                "positive numbers in decoder as in encoder, and at least one in last"
            )
        self.divisor = 2 ** len(encoder)
        self.unet = UNet(
            ndim,
            encoder=encoder,
            decoder=decoder,
            last=last,
            half_resolution=half_resolution,
        )
        self.head = DispHead(ndim, last[-1])
        if save_memory:
            self.apply(checkpointed)

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        disp = self.head(self.unet(torch.cat([moving, fixed], dim=1)))
        return {"disp": resize_disp(disp, moving.shape[2:])}


class VxmDiff(Vxm):
    """`vxm_diff`: the same network writes a velocity field, which is integrated at half resolution.

    Integration makes the map smooth and invertible (`integrate(-svf)` is its inverse), as far as
    the grid can show it. The published code calls the half-resolution velocity in training and the
    full-resolution displacement in use by one name; here `svf` is always the velocity on the grid
    of the image, in its voxels, and `disp` always the displacement.

    Args:
        steps: squarings of the integration.
        options: as in `Vxm`.
    """

    def __init__(self, ndim: int = 3, *, steps: int = 7, **options: Any):
        super().__init__(ndim, **options)
        self.steps = steps

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        shape = moving.shape[2:]
        svf = self.head(self.unet(torch.cat([moving, fixed], dim=1)))
        half = resize_disp(svf, [n // 2 for n in shape])  # as it is with half_resolution
        disp = integrate(half, self.steps)
        return {"disp": resize_disp(disp, shape), "svf": resize_disp(half, shape)}
