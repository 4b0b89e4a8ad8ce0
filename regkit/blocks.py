"""Layers shared by two models or more. `ndim` is 2 or 3 everywhere."""

from __future__ import annotations

from torch import Tensor, nn

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


class ConvBlock(nn.Module):
    """Convolution and LeakyReLU: (B, c_in, *S) -> (B, c_out, *S / stride). No normalisation."""

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
        return self.activation(self.conv(x))


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
