"""Layers shared by two models or more. `ndim` is 2 or 3 everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOL = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


class ConvBlock(nn.Module):
    """Convolution and LeakyReLU: (B, c_in, *S) -> (B, c_out, *S / stride). No normalisation.

    With `save_memory` (set it by `model.apply(recompute)`) the gradient keeps the input alone; what
    lies between is computed a second time on the way back (activation checkpointing): the same
    numbers, about a third more time. The peak of a step falls less than what it keeps, because the
    way back through the largest layer needs its share all the same.
    """

    save_memory = False

    def __init__(
        self,
        ndim: int,
        c_in: int,
        c_out: int,
        kernel: int = 3,
        stride: int = 1,
        slope: float = 0.2,
    ):
        super().__init__()
        self.conv = CONV[ndim](c_in, c_out, kernel_size=kernel, stride=stride, padding=1)
        self.activation = nn.LeakyReLU(slope)

    def forward(self, x: Tensor) -> Tensor:
        if self.save_memory and torch.is_grad_enabled():
            return checkpoint(self.layers, x, use_reentrant=False)
        return self.layers(x)

    def layers(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))


def recompute(module: nn.Module) -> None:
    """For `model.apply`: let each ConvBlock save memory."""
    if isinstance(module, ConvBlock):
        module.save_memory = True


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
        x = self.conv(x)
        return x.float() if x.dtype.itemsize < 4 else x


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalisation over groups of 8 channels of each image: independent of the batch."""
    return nn.GroupNorm(max(1, channels // 8), channels)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, ReLU(F(x) + x): (B, c_in, *S) -> (B, c_out, *S / stride).

    He et al. 2016, figure 2, with group normalisation. Where the size changes, the shortcut is a
    convolution of kernel 1.
    """

    def __init__(self, ndim: int, c_in: int, c_out: int, stride: int = 1):
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
