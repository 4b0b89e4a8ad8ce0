"""Super-resolution: a convolution writes the finer grid. The way up of `regkit.models.utsrmorph`.

Shi et al., "Real-time single image and video super-resolution using an efficient sub-pixel
convolutional neural network", CVPR 2016.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor, nn

from regkit.blocks import CONV, UpBlock


def pixel_shuffle(x: Tensor) -> Tensor:
    """2^d channels become one of twice the size: (B, 2^d C, *S) -> (B, C, *2 S).

    In 2D torch.nn.PixelShuffle(2), Shi et al. 2016, equation 4: the 2^d channels of one lie side by
    side, in array order of the places that they go to.
    """
    d = x.ndim - 2
    x = x.unflatten(1, (-1, *[2] * d))  # (B, C, 2, 2, ..., *S)
    x = x.permute(0, 1, *(axis for i in range(d) for axis in (2 + d + i, 2 + i)))
    for axis in range(2, 2 + d):
        x = x.flatten(axis, axis + 1)
    return x


class SuperResolution(nn.Module):
    """A convolution writes the 2^d finer places of each: (B, C, *S) -> (B, C, *2 S).

    Each channel from itself alone (`alone`) or from all. It starts as linear interpolation, that of
    `transmorph`; to be so at the border as well, the last place is repeated beyond it.
    """

    def __init__(self, ndim: int, channels: int, alone: bool):
        super().__init__()
        groups, parts = channels if alone else 1, 2**ndim
        self.conv = CONV[ndim](
            channels,
            parts * channels,
            kernel_size=3,
            padding=1,
            groups=groups,
            padding_mode="replicate",
        )
        with torch.no_grad():
            for parameter in self.conv.parameters():
                parameter.zero_()
            weight = self.conv.weight.unflatten(0, (channels, parts))  # (C, 2^d, C or 1, 3, ...)
            own = weight[:, :, 0] if alone else weight.diagonal(0, 0, 2).movedim(-1, 0)
            own.copy_(linear_kernels(ndim))  # (C, 2^d, 3, ...)

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle(self.conv(x))


def linear_kernels(ndim: int) -> Tensor:
    """The weights of linear interpolation for each of the 2^d finer places, (2^d, 3, ..., 3)."""
    sides = ((0.25, 0.75, 0.0), (0.0, 0.75, 0.25))
    kernels = [
        [math.prod(weights) for weights in product(*place)] for place in product(sides, repeat=ndim)
    ]
    return torch.tensor(kernels).reshape(-1, *[3] * ndim)


class FinerBlock(UpBlock):
    """An `UpBlock` that starts from a `SuperResolution`: (B, c_in, *S), skip -> (B, c_out, *S')."""

    def __init__(self, ndim: int, c_in: int, skip: int, c_out: int, alone: bool):
        super().__init__(ndim, c_in, skip, c_out)
        self.finer = SuperResolution(ndim, c_in, alone)

    def layers(self, x: Tensor, skip: Tensor) -> Tensor:
        """As of `Recomputed`."""
        x = self.finer(x)[(..., *map(slice, skip.shape[2:]))]
        x = torch.cat([x, skip], dim=1)
        return self.second.layers(self.first.layers(x))
