"""Dual-stream pyramids: find the large shifts on small images first, then what is left of them.

Papers: Hu, Kang, Huang, Scott, Wiest and Reyes, "Dual-stream pyramid registration network", MICCAI
2019; Kang, Hu, Huang, Scott and Reyes, the same title, Medical Image Analysis 2022, whose "++" form
has the correlations. `vxm` sees both images as two channels of one. Here one encoder-decoder looks
at each image for itself, with the same weights, and describes it by features at 1/16, 1/8, 1/4, 1/2
and the full size. On each level, the coarsest first:

    F_m'     = F_m warped by u, the displacement so far, brought to this level
    step     = head(F_m', F_f)                  with correlation=r also their local correlation
    u        = compose(u, step)

A step of one voxel at 1/16 is one of 16 voxels of the image, so that no level has far to look, and
every level sees the features as the ones before have left them. Displacements are composed, never
added: a step starts where the displacement before it has ended.

Parameters, 3D / 2D: dual_prnet 510,367 / 169,586; with correlation=1 586,183 / 178,010.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regkit.blocks import (
    ConvBlock,
    DispHead,
    checkpointed,
    init_weights,
    local_correlation,
    neighbours,
)
from regkit.models.base import RegistrationModel
from regkit.spatial import compose, resize, resize_disp, warp


class Pyramid(RegistrationModel):
    """What the two-stream models share: features of both images, then level after level.

    `stages` of the result holds the displacement so far after each level, the coarsest first, the
    last one being `disp`: each (B, d, *S), voxels, brought to the grid of the image. On level k of
    n it was found on every 2^(n-k)-th voxel of it: `stage[..., ::step, ::step] / step`.

    A subclass sets `describe`, (B, 1, *S) -> the features of each level, the coarsest first, each
    with twice as many voxels less one along each axis as the one before, and `heads`, one a level:
    (F_m', F_f, what the level before hands on or None) -> the step, and what it hands on.

    Args:
        ndim: 2 or 3.
        levels: how many.
        reach: how many voxels of each level a comparison of its features looks away.
        multi_resolution: give `stages`; else they are empty, and no level is brought to full size.
    """

    describe: nn.Module
    heads: nn.ModuleList

    def __init__(self, ndim: int, levels: int, *, reach: int = 0, multi_resolution: bool = True):
        super().__init__(ndim)
        self.divisor = 2 ** (levels - 1)
        self.reach = reach
        self.levels = levels if multi_resolution else 0  # that the result shows

    def estimate_any_size(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        shape = tuple(fixed.shape[2:])
        if min(shape) < self.divisor:
            raise ValueError(
                f"fixed has the size {shape}, expected at least {self.divisor} voxels along each "
                f"axis: that is one voxel of the coarsest of {len(self.heads)} levels."
            )
        if (places := -(-min(shape) // self.divisor) + 1) <= self.reach:
            raise ValueError(
                f"correlation is {self.reach}, expected at most {places - 1} for images of size "
                f"{shape}, whose coarsest level has {places} voxels along an axis."
            )
        return super().estimate_any_size(moving, fixed)

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        shape = [n + 1 for n in fixed.shape[2:]]
        both = F.pad(torch.cat([moving, fixed]), [0, 1] * self.ndim)
        disp: Tensor | None = None
        handed: Tensor | None = None
        disps = []
        for features, head in zip(self.describe(both), self.heads, strict=True):
            f_moving, f_fixed = features.chunk(2)
            if disp is not None:
                disp = resize_disp(disp, f_fixed.shape[2:])
                f_moving = warp(f_moving, disp, padding="border")
            step, handed = head(f_moving, f_fixed, handed)
            disp = step if disp is None else compose(disp, step)
            disps.append(disp)
        inside = (slice(None), slice(None), *(slice(n - 1) for n in shape))
        shown = disps if self.levels else disps[-1:]
        stages = tuple(resize_disp(u, shape)[inside].contiguous() for u in shown)
        return {"disp": stages[-1], "stages": stages if self.levels else ()}


class EncoderDecoder(nn.Module):
    """(B, 1, *S) -> features at 1/2^(n-1), ..., 1/2, 1, for channels c_1 ... c_n at 1, 1/2, ...

    S counts a multiple of 2^(n-1), and one. Coming up, features are enlarged and meet those of the
    way down.
    """

    def __init__(self, ndim: int, channels: Sequence[int]):
        super().__init__()
        self.down = nn.ModuleList(
            ConvBlock(ndim, a, b, stride=1 if level == 0 else 2, slope=0.0)
            for level, (a, b) in enumerate(pairwise((1, *channels)))
        )
        self.up = nn.ModuleList(
            ConvBlock(ndim, a + b, b, slope=0.0) for a, b in pairwise(reversed(channels))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        beside = []
        for conv in self.down:
            x = conv(x)
            beside.append(x)
        features = [beside.pop()]
        for conv in self.up:
            skip = beside.pop()
            enlarged = resize(features[-1], skip.shape[2:])
            features.append(conv(torch.cat([enlarged, skip], dim=1)))
        return features


class Head(nn.Module):
    """The pyramid registration module: two convolutions, a residual pair of them, and the step.

    (B, C, *S) twice -> (B, d, *S), voxels of this level, and nothing to hand on.
    """

    def __init__(self, ndim: int, channels: int, *, correlation: int):
        super().__init__()
        self.correlation = correlation
        c = channels
        c_in = 2 * c + (len(neighbours(ndim, correlation)) if correlation else 0)
        self.join = nn.Sequential(
            ConvBlock(ndim, c_in, c, slope=0.0), ConvBlock(ndim, c, c, slope=0.0)
        )
        self.residual = nn.Sequential(
            ConvBlock(ndim, c, c, slope=0.0), ConvBlock(ndim, c, c, slope=0.0)
        )
        self.step = DispHead(ndim, c)

    def forward(
        self, moving: Tensor, fixed: Tensor, handed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x = [moving, fixed]
        if self.correlation:
            x.append(local_correlation(fixed, moving, self.correlation))
        joined = self.join(torch.cat(x, dim=1))
        return self.step(joined + self.residual(joined)), None


class DualPRNet(Pyramid):
    """`dual_prnet`: 510,367 parameters in 3D, 169,586 in 2D; `stages` as in `Pyramid`.

    Args:
        ndim: 2 or 3.
        channels: of the encoder-decoder at 1, 1/2, 1/4, ...: one number a level, at least 2 levels.
        correlation: 0, or the "++" form: how many voxels of a level to search around each voxel.
        save_memory: compute the convolutions again on the way back instead of keeping them.

    How we read the papers, and what differs from the published code
    (kangmiao15/Dual-Stream-PRNet-Plus; we worked from a description of it, and copied nothing):

    - Version. The encoder is that of the code, of the paper of 2022: 8, 16, 16, 32 and 32 channels,
      stride 2 from the second on, ReLU, no normalisation. The one of 2019, by a comment there, had
      residual blocks of 8, 16, 32 and 32 channels, 32 on every level of its pyramid, and answered
      at half the size. The code's decoder has five convolutions, ours four, since our first level
      is the encoder's own. Parameters in 3D: there 613,855, of which the encoder-decoder has
      174,944 and the heads, with their correlations, 438,911; here with correlation=1 147,272 and
      438,911.
    - Grids. There, sampling grids run from corner to corner, and are enlarged and read as if they
      ran from edge to edge (`align_corners`). Here an image gets one voxel more along each axis: 16
      m + 1 voxels halve to 8 m + 1, ..., m + 1. Voxel i of a level then lies on voxel 2i of the
      next, for the strided convolutions as for `resize_disp`, and a shift doubles exactly.
    - The first displacement is found at 1/16, on the encoder's own features, in place of a second
      one at full size: the published code has levels at 1/8, 1/4, 1/2, 1 and 1. At full size
      features have 8 channels; there 16, then 8.
    - Gradients also run through the warp of the features, to the displacements that warp them.
      There they are cut off.
    - Correlations. With correlation=1 3^d products, as many as there; there with places 2 voxels
      away, here with the nearest ones. No CUDA operator.
    - The identity at the start: the heads begin at 0, other layers as in He et al. 2015.
    - Displacements are in voxels of a level; there on a scale from -1 to 1.
    - The loss is the recipe's. Published: local correlation at full size, and the squared slopes of
      the step of every level. The recipes here ask every level for likeness and for a smooth
      displacement.
    - The 2D form is ours.
    """

    def __init__(
        self,
        ndim: int = 3,
        *,
        channels: Sequence[int] = (8, 16, 16, 32, 32),
        correlation: int = 0,
        save_memory: bool = False,
    ):
        check_channels(channels)
        if correlation < 0:
            raise ValueError(f"correlation is {correlation}, expected 0 or more")
        super().__init__(ndim, len(channels), reach=correlation)
        self.describe = EncoderDecoder(ndim, channels)
        self.heads = nn.ModuleList(
            Head(ndim, c, correlation=correlation) for c in reversed(channels)
        )
        self.apply(init_weights)
        if save_memory:
            self.apply(checkpointed)


def check_channels(channels: Sequence[int]) -> None:
    """One positive number a level, at least 2 levels."""
    if len(channels) < 2 or min(channels) < 1:
        raise ValueError(
            f"channels is {tuple(channels)}, expected a positive number a level, at least 2 levels"
        )
