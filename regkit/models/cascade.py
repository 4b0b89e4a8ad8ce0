"""Cascades: network after network, each of which sees what the ones before it have left to do.

Papers: Zhao, Lau, Luo, Chang and Xu, "Unsupervised 3D end-to-end medical image registration with
volume tweening network", IEEE JBHI 2020 (`vtn`); Zhao, Dong, Chang and Xu, "Recursive cascaded
networks for unsupervised medical image registration", ICCV 2019 (`rcn`). Where the two differ we
follow the published code of the second (microsoft/Recursive-Cascaded-Networks).

    theta  = affine stem(moving, fixed)                         u^0 = its displacement
    step^k = network_k(moving warped by u^(k-1), fixed) / n     k = 1 ... n
    u^k    = compose(u^(k-1), step^k)
    moved  = moving warped by u^n

Each network finds a step, and steps are composed, never added: they start where the one before has
ended. The original image is interpolated once, however many networks there are. What training
compares with the fixed image is the last result alone, so that all networks work for one end; a
smooth answer is asked of each step (the term "diffusion"), a map that is nearly a rotation of the
stem (the terms "determinant" and "orthogonality").

Any model can be the network. The framework that Tan (2023) recommends at the end of section 4 of
his survey (figure 9: affine registration, then a U-Net, then a spatial transformer) is
`rcn` with cascades=1 and base="vxm": the recipes `affine_vxm_2d` and `affine_vxm_3d`.

Parameters, 3D / 2D: vtn 28,252,203 / 8,232,554; affine stem 14,166,288 / 4,719,312; rcn, the stem
and three vtn, 98,922,897 / 29,416,974.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regkit.blocks import CONV, ConvBlock, raised
from regkit.messages import unknown
from regkit.models.base import RegistrationModel
from regkit.spatial import affine_to_disp, compose, warp

TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
ADAPTIVE_POOL = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
LEVELS = 6  # halvings of the encoder
SCALE = 20  # voxels per unit of the last layer of vtn
SLOPE = 0.1  # of LeakyReLU


def _uniform_scaling(module: nn.Module) -> None:
    """The first weights of the published code: they keep the variance of what comes in."""
    if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _double(ndim: int, c_in: int, c_out: int) -> nn.Module:
    """(B, c_in, *S) -> (B, c_out, *2S)."""
    return TRANSPOSED[ndim](c_in, c_out, kernel_size=4, stride=2, padding=1, bias=False)


def _cut(x: Tensor, shape: Sequence[int]) -> Tensor:
    """What was doubled is one voxel too long where an odd size had been halved."""
    return x[(slice(None), slice(None), *(slice(n) for n in shape))]


class Encoder(nn.Module):
    """Ten convolutions: (B, 2, *S) -> six maps of c to 32 c channels, at 1/2, 1/4, ..., 1/64."""

    def __init__(self, ndim: int, channels: int):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels is {channels}, expected 1 or more")
        self.channels = [channels * 2**level for level in range(LEVELS)]
        self.levels = nn.ModuleList()
        for level, (a, b) in enumerate(pairwise((2, *self.channels))):
            blocks = [ConvBlock(ndim, a, b, stride=2, slope=SLOPE)]
            if level >= 2:
                blocks.append(ConvBlock(ndim, b, b, slope=SLOPE))
            self.levels.append(nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps


class Up(nn.Module):
    """One level up: the skip, the features doubled, and a displacement that they predict, doubled.

    (B, c_in, *S/2) and the skip (B, c_out, *S) -> (B, 2 c_out + d, *S).
    """

    def __init__(self, ndim: int, c_in: int, c_out: int):
        super().__init__()
        self.features = _double(ndim, c_in, c_out)
        self.activation = nn.LeakyReLU(SLOPE)
        self.predict = CONV[ndim](c_in, ndim, kernel_size=3, padding=1)
        self.prediction = _double(ndim, ndim, ndim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        doubled = [self.activation(self.features(x)), self.prediction(self.predict(x))]
        return torch.cat([skip, *(_cut(y, skip.shape[2:]) for y in doubled)], dim=1)


class Vtn(RegistrationModel):
    """`vtn`, the base network of the cascades: 28,252,203 parameters in 3D.

    Coarse displacements are predicted on the way up and handed on as features, as in FlowNet. The
    last layer doubles once more, so that nothing is computed at full size but the answer.

    Args:
        ndim: 2 or 3.
        channels: of the first convolution; the deepest have 32 times as many.
    """

    def __init__(self, ndim: int = 3, *, channels: int = 16):
        super().__init__(ndim)
        self.encoder = Encoder(ndim, channels)
        *skips, c = self.encoder.channels
        self.up = nn.ModuleList()
        for skip in reversed(skips):  # to 1/32, ..., 1/2
            self.up.append(Up(ndim, c, skip))
            c = 2 * skip + ndim
        self.head = _double(ndim, c, ndim)
        self.apply(_uniform_scaling)
        for weight in self.head.parameters():
            nn.init.zeros_(weight)

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        *skips, x = self.encoder(torch.cat([moving, fixed], dim=1))
        for up, skip in zip(self.up, reversed(skips), strict=True):
            x = up(x, skip)
        return {"disp": SCALE * _cut(raised(self.head(x)), fixed.shape[2:])}


class AffineStem(nn.Module):
    """The encoder of `vtn`, then d (d + 1) numbers: theta (B, d, d+1) = [I + W | t], voxels.

    Args:
        ndim: 2 or 3.
        channels: as in `Vtn`.
        size: None: any, the last map is averaged to 2 voxels along each axis. S: the published
            head, which covers the whole map of an image of this size, and of no other.
    """

    def __init__(self, ndim: int, *, channels: int = 16, size: Sequence[int] | None = None):
        super().__init__()
        if size is not None and (len(size) != ndim or min(size) < 1):
            raise ValueError(f"affine_size is {size}, expected {ndim} positive sizes or None")
        self.ndim, self.size = ndim, size
        self.encoder = Encoder(ndim, channels)
        self.encoder.apply(_uniform_scaling)
        last = [2] * ndim if size is None else [math.ceil(n / 2**LEVELS) for n in size]
        features = self.encoder.channels[-1] * math.prod(last)
        self.numbers = nn.Linear(features, ndim * (ndim + 1), bias=False)
        nn.init.zeros_(self.numbers.weight)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        d, shape = self.ndim, tuple(fixed.shape[2:])
        if self.size is not None and shape != tuple(self.size):
            raise ValueError(
                f"fixed has the size {shape}, expected {tuple(self.size)}, for which the affine "
                "stem was made (affine_size=None is for any)."
            )
        x = self.encoder(torch.cat([moving, fixed], dim=1))[-1]
        if self.size is None:
            x = ADAPTIVE_POOL[d](x, 2)
        linear, shift = raised(self.numbers(x.flatten(1))).split([d * d, d], dim=1)
        linear = torch.eye(d, device=linear.device, dtype=linear.dtype) + linear.reshape(-1, d, d)
        half = linear.new_tensor(shape) / 2
        return torch.cat([linear, (half * shift)[:, :, None]], dim=2)


class Rcn(RegistrationModel):
    """`rcn`: model(moving, fixed) with `theta`, `stages` and `steps` in the result.

    `stages` holds the displacement u^k after each network, the last one being `disp`; `steps` what
    each of them has added to it, step^k; both (B, d, *S), voxels.

    Args:
        bases: the models by name; `regkit.models.create` hands them over.
        ndim: 2 or 3.
        cascades: n, the number of networks, not counting the stem, at least 1.
        base: the name of the model that each of them is.
        affine: begin with an affine stem.
        affine_channels, affine_size: of the stem, see `AffineStem`.
        repeats: how often each network follows itself, at least 1: more cascades after training,
            of the weights that are there ("shared-weight cascading" in the paper):
            `models.load(path, repeats=2)`.
        options: of the base, such as `channels` of `vtn` or `save_memory` of `vxm`.

    What differs from the published code:

    - The identity at the start: the last layers begin at 0. The published ones begin anywhere, and
      the cascade is held together by 1/n alone. All other layers begin as there.
    - Any size: the stem averages its last map to 2 voxels along each axis. The published head
      covers that map whole, so it fits one size; `affine_size` makes it, and at 128^3 it is ours.
    - The stem's translation counts in half images, so that a step of training moves the rim of the
      image alike through A and through t; published: voxels.
    - A displacement is held constant beyond its border, also that of the stem; the published code
      goes on with the affine map there.
    - A convolution of stride 2 pads both sides alike; TensorFlow pads an even size at its end
      alone, so that each map of the encoder lies half of its input's voxels further on.
    - Losses are means over a batch, not sums. The 2D forms are ours.
    - The second published base is `vxm2` with a LeakyReLU of slope 0.1; ours keep their own slope.
    """

    def __init__(
        self,
        bases: Mapping[str, Callable[..., RegistrationModel]],
        ndim: int = 3,
        *,
        cascades: int = 3,
        base: str = "vtn",
        affine: bool = True,
        affine_channels: int = 16,
        affine_size: Sequence[int] | None = None,
        repeats: int = 1,
        **options: Any,
    ):
        super().__init__(ndim)
        for name, count in (("cascades", cascades), ("repeats", repeats)):
            if count < 1:
                raise ValueError(f"{name} is {count}, expected 1 or more")
        if base not in bases:
            raise unknown("base", base, bases)
        self.repeats = repeats
        self.stem: AffineStem | None = None
        if affine:
            self.stem = AffineStem(ndim, channels=affine_channels, size=affine_size)
        self.networks = nn.ModuleList(bases[base](ndim=ndim, **options) for _ in range(cascades))

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        theta: Tensor | None = None
        disp: Tensor | None = None
        if self.stem is not None:
            theta = self.stem(moving, fixed)
            disp = affine_to_disp(theta, fixed.shape[2:])
        stages, steps = [], []
        order: list[Any] = [network for network in self.networks for _ in range(self.repeats)]
        for network in order:
            warped = moving if disp is None else warp(moving, disp)
            step = network.estimate_any_size(warped, fixed)["disp"] / len(self.networks)
            disp = step if disp is None else compose(disp, step)
            stages.append(disp)
            steps.append(step)
        return {"disp": disp, "theta": theta, "stages": tuple(stages), "steps": tuple(steps)}
