"""TransMorph: a Swin transformer looks at both images, and convolutions write the displacement.

Paper: Chen, Frey, He, Segars, Li and Du, "TransMorph: transformer for unsupervised medical image
registration", Medical Image Analysis 82, 2022; figure 3 and section 3. The transformer is that of
Liu et al., "Swin transformer", ICCV 2021.

    1      convolution, 16 channels ------------------------- 16, displacement
    1/2    mean of 3, convolution, E / 2 ---------------- E / 2
    1/4    patches of 4 voxels, Swin layers, E ------- E
    1/8    merged by 2, Swin layers, 2 E ---------- 2 E
    1/16   merged by 2, Swin layers, 4 E ------- 4 E
    1/32   merged by 2, Swin layers, 8 E ----- up

Parameters in 3D, as published: tiny 244,527, small 11,757,195, base 46,771,251, large 108,343,907.
In 2D, where a kernel has 9 weights instead of 27 and 4 neighbours merge instead of 8: tiny 132,698,
small 7,771,610, base 31,005,506, large 80,301,810.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regkit.attention import PatchMerging, SwinLayer
from regkit.blocks import (
    AVERAGE_POOL,
    CONV,
    InstanceBlock,
    UpBlock,
    checkpointed,
    quiet_head,
)
from regkit.messages import unknown
from regkit.models.base import RegistrationModel
from regkit.spatial import integrate, resize_disp, spline_disp

PATCH = 4  # voxels a side
WINDOW = (5, 6, 7)  # tokens: 40 x 48 x 56 of them, from 160 x 192 x 224 voxels, are whole windows
FULL = 16  # channels at full size


class Size(NamedTuple):
    """channels: E, of the tokens at 1/4; layers and heads: at 1/4, 1/8, 1/16 and 1/32."""

    channels: int
    layers: Sequence[int]
    heads: Sequence[int]


SIZES = {
    "tiny": Size(6, (2, 2, 4, 2), (2, 2, 4, 4)),
    "small": Size(48, (2, 2, 4, 2), (4, 4, 4, 4)),
    "base": Size(96, (2, 2, 4, 2), (4, 4, 8, 8)),
    "large": Size(128, (2, 2, 12, 2), (4, 4, 8, 16)),
}


class Patches(nn.Module):
    """One token of C channels for each patch: (B, c_in, *S) -> (B, *S / 4, C), normalised."""

    def __init__(self, ndim: int, c_in: int, channels: int):
        super().__init__()
        self.conv = CONV[ndim](c_in, channels, kernel_size=PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.conv(x).movedim(1, -1))
        return tokens


class SwinEncoder(nn.Module):
    """(B, c_in, *S) -> features at 1/4, 1/8, ...: (B, C, *S / 4), (B, 2 C, *S / 8), ...

    S is a multiple of 4; further down, sizes are rounded up. Every second layer of a stage has its
    windows shifted. `drop_path` grows from 0 in the first layer to that in the last one.
    """

    def __init__(self, ndim: int, c_in: int, size: Size, window: Sequence[int], drop_path: float):
        super().__init__()
        c, total, done = size.channels, sum(size.layers), 0
        self.down, self.stages, self.norms = (nn.ModuleList() for _ in range(3))
        for k, (layers, heads) in enumerate(zip(size.layers, size.heads)):
            self.down.append(PatchMerging(ndim, c) if k else Patches(ndim, c_in, c))
            c = 2 * c if k else c
            stage = [
                SwinLayer(
                    c,
                    heads,
                    window,
                    shift=i % 2 == 1,
                    drop_path=drop_path * (done + i) / max(1, total - 1),
                )
                for i in range(layers)
            ]
            self.stages.append(nn.Sequential(*stage))
            self.norms.append(nn.LayerNorm(c))
            done += layers

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for down, stage, norm in zip(self.down, self.stages, self.norms):
            x = stage(down(x))
            features.append(norm(x).movedim(-1, 1))
        return features


class TransMorph(RegistrationModel):
    """`transmorph`: by default 46,771,251 parameters in 3D, 7,771,610 in 2D.

    Args:
        size: "tiny", "small", "base" or "large", see `SIZES`; by default base, in 2D, where images
            have fewer voxels than base has weights, small.
        window: tokens a side, one number or one for each axis; by default (5, 6, 7), in 2D (5, 6).
            Larger than an image it becomes the image.
        drop_path: the share of images for which training leaves out what the last layer adds; of
            the layers before less, see `regkit.attention.DropPath`.
        channels, layers, heads: in place of those of `size`: E, a multiple of 2, and for each of
            the four levels how many layers and heads.
        diffeomorphic: write a velocity at half size, as TransMorph-diff does, which `steps`
            squarings integrate; the level at full size is not there.
        bspline: write control points of a cubic B-spline, one for each patch, after the idea of
            TransMorph-bspl; the levels at half and at full size are not there.
        save_memory: compute layers again on the way back instead of keeping what they need.

    What differs from the published code, and what does not:

    - Images have any size. They are padded to whole patches, a multiple of 4 and not of 32; further
      down an odd number of tokens is filled up to the next even one, and cut off again on the way
      up. The published network asks for the size of the image, and for multiples of 32.
    - Padding takes no part in attention. In Swin's, filled-up tokens are looked at like others.
    - Weights start as published, which is as PyTorch has it (the published code has another start
      and never calls it), tables of positions as truncated N(0, 0.02^2). Only the head starts at
      N(0, 1e-6), published N(0, 1e-5), so that an untrained model moves nothing by 0.001 voxels.
    - `train()` and `eval()` return the model, as those of any module.
    - The velocity of `diffeomorphic` is one answer, not a distribution: no variance, no sampling.
    - The points of `bspline` lie one patch apart and are a displacement. Published, they lie on a
      lattice of a size of its own, and may be a velocity.
    - Kept: no bias in queries, keys and values; relative positions and no absolute ones; a norm
      behind each stage, for what the decoder is shown; drop path up to 0.3.
    """

    divisor = PATCH

    def __init__(
        self,
        ndim: int = 3,
        *,
        size: str | None = None,
        window: int | Sequence[int] | None = None,
        drop_path: float = 0.3,
        channels: int | None = None,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        diffeomorphic: bool = False,
        steps: int = 7,
        bspline: bool = False,
        save_memory: bool = False,
    ):
        super().__init__(ndim)
        size = {2: "small", 3: "base"}[ndim] if size is None else size
        if size not in SIZES:
            raise unknown("size", size, SIZES)
        named = SIZES[size]
        chosen = Size(
            named.channels if channels is None else channels,
            named.layers if layers is None else layers,
            named.heads if heads is None else heads,
        )
        if chosen.channels < 2 or chosen.channels % 2:
            raise ValueError(f"channels is {chosen.channels}, expected an even number of 2 or more")
        check_size(chosen)
        if steps < 0:
            raise ValueError(f"steps is {steps}, expected 0 or more")
        if diffeomorphic and bspline:
            raise ValueError("bspline is True, expected False where diffeomorphic is True")
        self.steps, self.bspline = steps if diffeomorphic else 0, bspline
        self.encoder = SwinEncoder(ndim, 2, chosen, windows(window, ndim), drop_path)
        c = chosen.channels
        # from 1/32 up: channels of each level, which are also those of its skip
        widths = [8 * c, 4 * c, 2 * c, c, c // 2, FULL]
        widths = widths[:4] if bspline else widths[:5] if diffeomorphic else widths
        self.pool = AVERAGE_POOL[ndim](3, stride=2, padding=1)
        self.stem_half = InstanceBlock(ndim, 2, c // 2) if len(widths) > 4 else None
        self.stem_full = InstanceBlock(ndim, 2, FULL) if len(widths) == 6 else None
        self.up = nn.ModuleList(UpBlock(ndim, a, b, b) for a, b in pairwise(widths))
        self.head = quiet_head(ndim, widths[-1])
        if save_memory:
            self.apply(checkpointed)

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        shape, x = moving.shape[2:], self.head(decoded(self, moving, fixed))
        if self.bspline:
            return {"disp": spline_disp(x, shape)}
        if self.stem_full is not None:
            return {"disp": x}
        disp = integrate(x, self.steps)
        return {"disp": resize_disp(disp, shape), "svf": resize_disp(x, shape)}


def decoded(model: Any, moving: Tensor, fixed: Tensor) -> Tensor:
    """Features of both images at full size, or at half or 1/4 where a model has no stem for more.

    Args:
        model: has `encoder` (1/4, 1/8, 1/16; 1/32), `pool`, `stem_half` and `stem_full` (or None)
            and the blocks `up`.
        moving, fixed: (B, 1, *S).
    """
    pair = torch.cat([moving, fixed], dim=1)  # (B, 2, *S)
    *skips, x = model.encoder(pair)
    if model.stem_half is not None:
        skips.insert(0, model.stem_half(model.pool(pair)))
    if model.stem_full is not None:
        skips.insert(0, model.stem_full(pair))
    result: Tensor = x
    for up in model.up:
        result = up(result, skips.pop())
    return result


def windows(window: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """The sides of a window along each axis; None: those of the paper.

    Raises:
        ValueError: not one number for each axis, or one below 1.
    """
    if window is None:
        return WINDOW[:ndim]
    sides = (window,) * ndim if isinstance(window, int) else tuple(window)
    if len(sides) != ndim or min(sides) < 1:
        raise ValueError(
            f"window is {window}, expected one number of 1 or more, or {ndim} of them, "
            "one for each axis"
        )
    return sides


def check_size(size: Size) -> None:
    """Refuse a size whose stages do not fit together.

    Raises:
        ValueError: `layers` that are not four numbers of 1 or more, or `heads` that are not four
            divisors of the channels of the four levels.
    """
    if len(size.layers) != 4 or min(size.layers) < 1:
        raise ValueError(f"layers is {tuple(size.layers)}, expected four numbers of 1 or more")
    widths = [size.channels * 2**k for k in range(4)]
    if len(size.heads) != 4 or any(h < 1 or c % h for c, h in zip(widths, size.heads)):
        raise ValueError(
            f"heads is {tuple(size.heads)}, expected divisors of the channels {widths} of the "
            "four levels"
        )
