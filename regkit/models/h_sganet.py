"""H-SGANet: a light U-Net whose voxels also look along their own rows, far away.

Paper: Zhou and Cao, "H-SGANet: hybrid sparse graph attention network for deformable medical image
registration", Neurocomputing, 2025, arXiv 2408.16719. The graph is that of Munir, Avery and
Marculescu, "MobileViG", CVPR Workshops 2023, with the max-relative convolution of Li et al.,
"DeepGCNs", ICCV 2019; the attention at the bottleneck that of Mehta and Rastegari, "Separable
self-attention for mobile vision transformers", 2022, equations 2 to 4.

Parameters, 3D / 2D: 366,291 / 134,306. `HSGANet` says what the published 367,764 are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regkit.blocks import (
    AVERAGE_POOL,
    CONV,
    DispHead,
    NormBlock,
    Recomputed,
    checkpointed,
    doubled,
    group_norm,
    init_weights,
)
from regkit.models.base import RegistrationModel


def largest_other(x: Tensor, hop: int, axis: int) -> Tensor:
    """At each place the largest value at the places 1, 2, ... hops away along an axis, either way.

    The place itself takes no part, and none beyond the image: -inf where there is no other place.
    Places that are a number of hops apart are one class. Its two largest values answer for all of
    them: the largest is that of all others, and for the place that holds it the second is.

    Args:
        x: (B, C, *S), any S.
        hop: at least 1, voxels.
        axis: of x.

    Returns:
        Like x.
    """
    size = x.shape[axis]
    if size <= hop:
        return torch.full_like(x, -torch.inf)
    x = x.movedim(axis, -1)
    rows = F.pad(x, (0, -size % hop), value=-torch.inf).unflatten(-1, (-1, hop))  # (..., n, hop)
    values, places = rows.topk(2, dim=-2)
    place = torch.arange(rows.shape[-2], device=x.device)[:, None]
    others = torch.where(place == places[..., :1, :], values[..., 1:, :], values[..., :1, :])
    return others.flatten(-2)[..., :size].movedim(-1, axis)


def max_relative(x: Tensor, hop: int) -> Tensor:
    """max over the neighbours q of x(p) in the graph, of x(q) - x(p): (B, C, *S) -> (B, C, *S).

    Li et al. 2019, equation 7 (the max-relative aggregation). A neighbour lies a multiple of `hop`
    voxels away along one of the axes, inside the image; 0 where there is none.
    """
    best = largest_other(x, hop, 2)
    for axis in range(3, x.ndim):
        best = torch.maximum(best, largest_other(x, hop, axis))
    return (best - x).masked_fill(best == -torch.inf, 0)


class GraphBlock(Recomputed):
    """x + graph convolution of x, with fixed connections: (B, C, *S) -> (B, C, *S), any S.

    A kernel of 1, then x beside `max_relative`, a kernel of 1 and GELU, and a kernel of 1.
    """

    def __init__(self, ndim: int, channels: int, hop: int):
        super().__init__()
        self.hop = hop
        self.before = pointwise(ndim, channels, channels)
        self.mix = pointwise(ndim, 2 * channels, channels)
        self.after = pointwise(ndim, channels, channels)

    def layers(self, x: Tensor) -> Tensor:
        """As of `Recomputed`."""
        y = self.before(x)
        mixed: Tensor = self.mix(torch.cat([y, max_relative(y, self.hop)], dim=1))
        answer: Tensor = self.after(F.gelu(mixed))
        return x + answer


def pointwise(ndim: int, c_in: int, c_out: int) -> nn.Sequential:
    """A kernel of 1 and group normalisation."""
    return nn.Sequential(CONV[ndim](c_in, c_out, kernel_size=1), group_norm(c_out))


class SeparableAttention(nn.Module):
    """All tokens write one summary, and each reads from it: (B, N, C) -> (B, N, C).

    Mehta and Rastegari 2022: the weights of the tokens are the softmax over all N of one score
    each; the context is the weighted sum of the keys; each token takes from it what its own value
    lets pass, ReLU(V x) * context. The price grows as N. The score has no bias, as the softmax
    would not see it.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.score = nn.Linear(channels, 1, bias=False)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(x).softmax(dim=1)  # (B, N, 1)
        context = weights.transpose(1, 2).to(x.dtype) @ self.key(x)  # (B, 1, C)
        result: Tensor = self.out(torch.relu(self.value(x)) * context)
        return result


class HSGANet(RegistrationModel):
    """`h_sganet`: 366,291 parameters in 3D, 134,306 in 2D. One shot, no integration.

    Args:
        ndim: 2 or 3.
        channels: at 1, 1/2, 1/4, ... of the image: multiples of 8, at least 2 levels.
        hop: how many voxels of the image lie between the neighbours in the graph. On a level of
            half the size it is half as many, rounded down, and at least 1.
        save_memory: compute convolutions and graph blocks again on the way back instead of keeping
            them.

    The way down: on each level a convolution, and a graph block beside a shortcut. At the bottom
    `SeparableAttention`, each voxel a token. The way up: its answer beside the features it came
    from, two convolutions, twice the size, and so on with the features of each level.

    What differs from the paper's code, which we know by a description and by its number of
    parameters:

    - Attention. There it is given the feature map as it is, so that its layers work along the last
      axis of the image, and its softmax over the channels; only images of 224 voxels along that
      axis fit, 28 at the bottom. Ours has one token a voxel, with the channels as its features, and
      takes any size. 32 channels instead of 28 columns, and a score without bias: +735 parameters.
      The value passes a ReLU, as in its source.
    - The shortcut of the third graph block is not dropped on the way to the fourth level.
    - The gradient goes through the neighbours, which the code detaches.
    - A relative value may be negative. There it is compared with 0 first.
    - No way round the image. The code shifts by `torch.roll`, which brings what leaves at one
      border in at the other. Where the hop divides the side, rolling by all its multiples meets the
      same neighbours as ours do. Elsewhere it meets other places, which depend on the image's size:
      those a side away, at the far border, next to the voxel itself.
    - The hop is 20 voxels at full size in both. On coarser levels it shrinks with the grid; 20 of
      the 20 to 28 voxels at 1/8 would leave nearly none connected.
    - Norms are over groups of 8 channels. The code has instance normalisation, which a bottom of
      one voxel does not allow, and batch normalisation, which at batch 1 is not the same function
      in training and in use. The convolutions of kernel 3 have a bias and their norms two numbers a
      channel: +1,008. ReLU has no slope of 0.01 on its negative side.
    - The graph blocks have 14,320 parameters. What the description leaves of the published number
      for them is 17,536: -3,216, the width of one layer inside, which it does not tell.

    So 367,764 + 735 + 1,008 - 3,216 = 366,291. The paper says about 0.382 million.
    """

    def __init__(
        self,
        ndim: int = 3,
        *,
        channels: Sequence[int] = (16, 32, 32, 32),
        hop: int = 20,
        save_memory: bool = False,
    ):
        super().__init__(ndim)
        if len(channels) < 2 or any(c < 8 or c % 8 for c in channels):
            raise ValueError(
                f"channels is {tuple(channels)}, expected multiples of 8, one for each of at least "
                "2 levels"
            )
        if hop < 1:
            raise ValueError(f"hop is {hop}, expected 1 or more")
        self.divisor = 2 ** (len(channels) - 1)
        self.shrink = AVERAGE_POOL[ndim](2)
        self.down = nn.ModuleList(NormBlock(ndim, a, b) for a, b in pairwise((2, *channels)))
        self.graphs = nn.ModuleList(
            GraphBlock(ndim, c, max(1, hop // 2**level)) for level, c in enumerate(channels)
        )
        self.attention = SeparableAttention(channels[-1])
        self.up, c = nn.ModuleList(), channels[-1]
        for skip in channels[::-1]:
            self.up.append(
                nn.Sequential(NormBlock(ndim, c + skip, skip), NormBlock(ndim, skip, skip))
            )
            c = skip
        self.head = DispHead(ndim, c)
        self.apply(init_weights)
        if save_memory:
            self.apply(checkpointed)

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        x = torch.cat([moving, fixed], dim=1)
        skips: list[Tensor] = []
        for level, (conv, graph) in enumerate(zip(self.down, self.graphs)):  # 1, 1/2, 1/4, 1/8
            x = graph(conv(self.shrink(x) if level else x))
            skips.append(x)
        tokens = self.attention(x.flatten(2).transpose(1, 2))
        x = tokens.transpose(1, 2).reshape(x.shape)
        for level, (conv, skip) in enumerate(zip(self.up, skips[::-1])):  # 1/8, 1/4, 1/2, 1
            x = conv(torch.cat([doubled(x, skip) if level else x, skip], dim=1))
        return {"disp": self.head(x)}
