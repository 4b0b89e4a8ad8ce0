"""Deep unfolding: an optimiser of the registration energy, with a network for each of its steps.

Paper: Sun, Yang and Ying, "Research on deep unfolding network for brain image registration",
Journal of Image and Graphics, 2025 (in Chinese), DOI 10.11834/jig.250283. The denoiser is that of
Zhang et al., "Beyond a Gaussian denoiser", IEEE TIP 2017; the U-Net with a transformer at its
bottleneck that of Chen et al., "TransUNet", 2021.

The energy of a displacement, equation 1, asks for likeness and for smoothness at once. Equations 2
and 3 give each its own displacement, u and v, and a price for their difference; equations 4 and 5
then improve them in turn. The network does this K times:

    u^k = FM(I_m warped by v^(k-1), I_f), added to v^(k-1)    equation 4, the fidelity module
    v^k = N(u^k)                                              equation 6, the denoising module

`stages` holds the pairs (u^k, v^k); `disp` is v^K. Parameters, 3D / 2D: 1,932,114 / 1,114,332, a
third of it with shared=True.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regkit.attention import ATTENTION, Transformer
from regkit.blocks import ConvBlock, NormBlock, PlainConv, checkpointed, quiet_head
from regkit.metrics import endpoint_error
from regkit.models.base import RegistrationModel
from regkit.spatial import compose, warp


class TransUNet(nn.Module):
    """Figure 3: strided convolutions, a transformer, and the way back up with skips.

    (B, c_in, *S) -> (B, d, *S), with S a multiple of 2^len(channels). The input itself is the skip
    of the last level.
    """

    def __init__(
        self,
        ndim: int,
        c_in: int,
        channels: Sequence[int],
        *,
        skips: bool = True,
        transformer: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.skips = skips
        self.down = nn.ModuleList(
            NormBlock(ndim, a, b, stride=2) for a, b in pairwise((c_in, *channels))
        )
        self.bottleneck: nn.Module = nn.Identity()
        if transformer is not None:
            self.bottleneck = Transformer(ndim, channels[-1], **transformer)
        self.up, c = nn.ModuleList(), channels[-1]
        for skip in (*channels[-2::-1], c_in):  # channels at 1/8, 1/4, 1/2, 1
            width = max(skip, channels[0])
            self.up.append(NormBlock(ndim, c + skip if skips else c, width))
            c = width
        self.head = quiet_head(ndim, c)  # its input is normalised, and 2K answers add up

    def forward(self, x: Tensor) -> Tensor:
        beside = []
        for conv in self.down:
            beside.append(x)  # 1, 1/2, 1/4, 1/8
            x = conv(x)
        x = self.bottleneck(x)  # 1/16
        for conv in self.up:  # to 1/8, 1/4, 1/2, 1
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            skip = beside.pop()
            x = conv(torch.cat([x, skip], dim=1) if self.skips else x)
        disp: Tensor = self.head(x)
        return disp


class DnCNN(nn.Sequential):
    """Figure 4: convolutions at full size, (B, d, *S) -> (B, d, *S). The first has no norm."""

    def __init__(self, ndim: int, *, width: int, depth: int):
        super().__init__(
            ConvBlock(ndim, ndim, width, slope=0.0),
            *(NormBlock(ndim, width, width) for _ in range(depth - 2)),
            quiet_head(ndim, width),
        )


class Denoiser(nn.Module):
    """N of equation 6: a displacement u (B, d, *S) in voxels to a displacement v, the same.

    kind: "dncnn" (figure 4), "unet" (table 3) or "conv" (table 2: convolutions and ReLU alone).
    """

    def __init__(self, kind: str, ndim: int, channels: Sequence[int], *, width: int, depth: int):
        super().__init__()
        self.residual = kind != "conv"
        self.network: nn.Module
        if kind == "unet":
            self.network = TransUNet(ndim, ndim, channels)
        else:
            self.network = (DnCNN if kind == "dncnn" else PlainConv)(ndim, width=width, depth=depth)

    def forward(self, u: Tensor) -> Tensor:
        axes = tuple(range(1, u.ndim))
        s = (u.square().mean(axes, keepdim=True) + 1e-6).sqrt()  # voxels; at least 0.001
        f: Tensor = s * self.network(u / s)
        return u + f if self.residual else f


class Stage(nn.Module):
    """Figure 2, one iteration of the optimiser: v^(k-1) -> u^k, v^k."""

    def __init__(self, fidelity: TransUNet, denoiser: nn.Module):
        super().__init__()
        self.fidelity = fidelity
        self.denoiser = denoiser

    def forward(self, moving: Tensor, fixed: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        warped = moving if v is None else warp(moving, v)
        step = self.fidelity(torch.cat([warped, fixed], dim=1))
        u = step if v is None else compose(v, step)  # equation 4
        return u, self.denoiser(u)  # equation 6


class Unfolding(RegistrationModel):
    """`unfolding`: model(moving, fixed) with `stages` = ((u^1, v^1), ..., (u^K, v^K)), voxels.

    Args:
        stages: K, at least 1.
        shared: all stages use the same weights.
        transformer, skips: parts of the fidelity module (table 2).
        denoiser: "dncnn", "conv", "unet" (tables 2 and 3), or None: v = u.
        channels: of the fidelity module at 1/2, 1/4, ... of the image.
        heads, layers, mlp: of the transformer (table 5). attention: "full", "linear" or "window",
            then with windows of `window` tokens a side.
        width, depth: channels and convolutions of the denoiser.
        save_memory: compute the convolutions again on the way back instead of keeping them.
        tolerance: voxels; in evaluation mode a pair stops at the first stage that is settled to
            that, and K is the most. It takes shared weights: another stage's weights would say
            nothing about this one's answer. `stages_used` tells how many each pair took.
        settled: by "change", the mean |v^k - v^(k-1)|, or by "split", the mean |u^k - v^k|, which
            in results/adaptive_stages.json grows from stage to stage where the change falls.

    How we read the paper where it leaves a choice, and what we changed:

    - How a stage builds on the one before. The fidelity module sees the moving image as v^(k-1)
      left it, and finds a step from there: u^k = compose(v^(k-1), step). The original image is
      warped by the whole. This is also where v^(k-1) enters equation 4: the search for u starts at
      it, and a small step stays near it, as the term |u - v^(k-1)|^2 asks. v^0 = 0.
    - Weights. The paper says "cascaded", not "shared": each stage has its own. With `shared` they
      are one, and the number of stages may change after training.
    - Its last layer is "a convolution and ReLU" that gives the displacement, but ReLU has no
      negative values. Ours ends in a convolution; the ReLU is before it.
    - Batch normalisation at batch 1, the paper's, is not the same function in training and in use.
      Ours is over groups of 8 channels of one image, as in the encoder of TransUNet.
    - A denoiser with such a norm does not see how large a displacement is. So N works in units of
      the displacement's own size: N(u) = u + s f(u / s), s its root mean square. N(t u) = t N(u) is
      also what equation 5 gives for a quadratic R.
    - Positions. Tokens learn where they are from their neighbours, by a convolution with one filter
      a channel (Chu et al., "Conditional positional encodings", 2021): no size is in the weights.
    - The paper gives 4 heads, 8 layers and an MLP of 96. Channels, the depth of the U-Net, depth
      and width of the denoiser are ours.
    """

    def __init__(
        self,
        ndim: int = 3,
        *,
        stages: int = 3,
        shared: bool = False,
        transformer: bool = True,
        skips: bool = True,
        denoiser: str | None = "dncnn",
        channels: Sequence[int] = (16, 32, 48, 64),
        heads: int = 4,
        layers: int = 8,
        mlp: int = 96,
        attention: str = "full",
        window: int = 4,
        width: int = 16,
        depth: int = 5,
        save_memory: bool = False,
        tolerance: float | None = None,
        settled: str = "change",
    ):
        super().__init__(ndim)
        _check(
            {
                "stages": (stages, 1),
                "depth": (depth, 2),
                "width": (width, 6),
                "window": (window, 1),
            },
            {
                "denoiser": (denoiser, ("dncnn", "conv", "unet", None)),
                "attention": (attention, ATTENTION),
                "settled": (settled, ("change", "split")),
            },
        )
        if not channels or min(channels) < 1:
            raise ValueError(f"channels is {channels}, expected one positive number a level")
        if transformer and (heads < 1 or channels[-1] % heads):
            raise ValueError(
                f"heads is {heads}, expected a divisor of the last of channels {channels}"
            )
        if tolerance is not None and not (shared and tolerance > 0):
            raise ValueError(
                f"tolerance is {tolerance} and shared {shared}, "
                "expected a positive tolerance and shared=True"
            )
        self.tolerance, self.settled = tolerance, settled
        self.count, self.shared = stages, shared
        self.divisor = 2 ** len(channels)
        size = {"heads": heads, "layers": layers, "mlp": mlp}
        tokens = {**size, "attention": attention, "window": window} if transformer else None
        self.stages = nn.ModuleList(
            Stage(
                TransUNet(ndim, 2, channels, skips=skips, transformer=tokens),
                Denoiser(denoiser, ndim, channels, width=width, depth=depth)
                if denoiser
                else nn.Identity(),
            )
            for _ in range(1 if shared else stages)
        )
        if save_memory:
            self.apply(checkpointed)

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        v: Tensor | None = None
        pairs: list[tuple[Tensor, Tensor]] = []
        going = torch.ones(len(moving), dtype=torch.bool, device=moving.device)
        tolerance = None if self.training else self.tolerance
        for k in range(self.count):  # equations 4 and 6 in turn, from v = 0
            u, new = self.stages[0 if self.shared else k](moving, fixed, v)
            if tolerance is not None:
                last = pairs[-1] if pairs else (torch.zeros_like(u), torch.zeros_like(new))
                kept = going.reshape(-1, *[1] * (self.ndim + 1))
                u, new = torch.where(kept, u, last[0]), torch.where(kept, new, last[1])
                apart = endpoint_error(new, last[1] if self.settled == "change" else u)
                going = going & (apart > tolerance)
            v = new
            pairs.append((u, v))
            # a compiled graph runs all stages; those after a pair's last one change nothing
            if tolerance is not None and not torch.compiler.is_compiling() and not going.any():
                break
        return {"disp": v, "stages": tuple(pairs)}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        count = len({key.split(".")[1] for key in state_dict if key.startswith("stages.")})
        if count not in (0, len(self.stages)):
            raise ValueError(
                f"The weights are those of {count} stages, expected {len(self.stages)}: with "
                "shared=True weights fit any number of stages, without it only their own."
            )
        return super().load_state_dict(state_dict, *args, **kwargs)


def stages_used(stages: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """How many stages each pair of a batch took, (B,): after its last one it stays where it is."""
    used = torch.ones(len(stages[0][0]), dtype=torch.int64, device=stages[0][0].device)
    for (_, before), (_, v) in pairwise(stages):
        used += (v != before).flatten(1).any(1)
    return used


def _check(
    least: Mapping[str, tuple[int, int]],
    choices: Mapping[str, tuple[str | None, Sequence[str | None]]],
) -> None:
    """Refuse options that make no network, one sentence each."""
    for name, (value, bound) in least.items():
        if value < bound:
            raise ValueError(f"{name} is {value}, expected {bound} or more")
    for name, (choice, allowed) in choices.items():
        if choice not in allowed:
            listed = ", ".join(map(repr, allowed[:-1]))
            raise ValueError(f"{name} is {choice!r}, expected {listed} or {allowed[-1]!r}")
