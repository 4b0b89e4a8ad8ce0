"""A U-Net with short skips beside the long ones, and channels that are weighed on the way up.

Paper: Zheng et al., "Unsupervised single-modal medical image registration based on deep learning",
Computer Science and Application, 2023 (in Chinese), DOI 10.12677/csa.2023.131006. The dense skips
are those of Zhou et al., "UNet++", 2018; the channel attention is that of Wang et al., "ECA-Net",
CVPR 2020.

A long skip of a U-Net puts features side by side that lie far apart: one has seen three voxels, the
other has been to 1/16 of the size and back. Section 3.2.1 fills the gap with nodes of medium depth.
X(i, j) lies at 1/2^i of the size, and j counts the upsamplings behind it:

    X(0,0)    X(0,1)    X(0,2)    X(0,3)    X(0,4) -> head -> disp        1
        X(1,0)    X(1,1)    X(1,2)    X(1,3)                              1/2
            X(2,0)    X(2,1)    X(2,2)                                    1/4
                X(3,0)    X(3,1)                                          1/8
                    X(4,0)                                                1/16

The encoder goes down the left edge, the decoder comes up the right one. A node takes all nodes to
its left in its row, and from the row below its neighbour X(i+1, j-1), upsampled.

Parameters, 3D / 2D: 666,127 / 222,174; with dense=False 285,823 / 95,310; ECA is 12 of them. One
training step of a pair of 160x192x160 holds about 13.5 GB at once in float32, and 8.7 GB with
`save_memory`, as estimated on a CPU (results/dense_unet_eca_cost.json).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regkit.blocks import MAX_POOL, ConvBlock, DispHead, checkpointed
from regkit.models.base import RegistrationModel


def eca_kernel(channels: int, r: float = 2, b: float = 1) -> int:
    """How many neighbouring channels ECA looks at: the odd number next to (log2 C + b) / r.

    Of two that are equally near the larger, as in the published code of ECA-Net: 3 for 8 to 127
    channels, 5 for 128 to 2047.
    """
    t = (math.log2(channels) + b) / r  # equation 2
    return 2 * int(t / 2) + 1


class ECA(nn.Module):
    """Efficient channel attention, figure 3: (B, C, *S) -> (B, C, *S), each channel weighed.

    A channel's weight comes from its mean over space and those of its neighbours in the list of
    channels: a convolution along that list, with zeros beyond its ends and no bias.
    """

    def __init__(self, channels: int):
        super().__init__()
        k = eca_kernel(channels)
        self.conv = nn.Conv1d(1, 1, kernel_size=k, padding=k // 2, bias=False)

    def weights(self, x: Tensor) -> Tensor:
        """The weight of each channel, in (0, 1): (B, C, *S) -> (B, C)."""
        mean = x.mean(dim=tuple(range(2, x.ndim)))
        return torch.sigmoid(self.conv(mean.unsqueeze(1)).squeeze(1))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x)
        return x * weights.reshape(*weights.shape, *[1] * (x.ndim - 2))


class Node(ConvBlock):
    """X(i, j) with j > 0: (B, below, *S / 2) and any of its row, (B, c, *S) -> (B, width, *S).

    Args:
        below: channels of X(i+1, j-1).
        row: channels of the nodes to the left, together.
        width: channels of this node.
        eca: weigh the channels that come from below.
    """

    def __init__(self, ndim: int, *, below: int, row: int, width: int, eca: bool):
        super().__init__(ndim, row + below, width)
        self.attention = ECA(below) if eca else nn.Identity()

    def layers(self, below: Tensor, *row: Tensor) -> Tensor:
        """As of `ConvBlock`, of all that the node takes."""
        raised = self.attention(F.interpolate(below, scale_factor=2, mode="nearest"))
        return super().layers(torch.cat([*row, raised], dim=1))


class DenseUNet(RegistrationModel):
    """`dense_unet_eca`: model(moving, fixed) with `disp` (B, d, *S) in voxels.

    Args:
        channels: of the nodes at 1, 1/2, 1/4, ... of the image; two levels or more.
        dense: the nodes between encoder and decoder. Without them the long skips are left: a node
            of the right edge takes X(i, 0) and the one below, which is a plain U-Net.
        eca: weigh channels after each upsampling of the right edge.
        save_memory: compute the nodes again on the way back instead of keeping what lies within
            them, see `regkit.blocks.ConvBlock`. It changes no number.

    Raises:
        ValueError: fewer than two levels, or a level without channels.

    How we read the paper, which prints its network as a picture without numbers:

    - Section 3.2.1 says that after each downsampling comes an upsampling, whose result is joined to
      the features of the same size: the nodes above. Which nodes of its row a node sees is not
      said: here all of them, as in UNet++.
    - Four convolutions with pooling, then a decoder of "the same convolutions" with upsampling:
      X(4,0) is the decoder's first. One convolution a node, one after the last upsampling, and the
      head.
    - Pooling stands before the LeakyReLU in the text, behind it in the caption of figure 2. Both
      orders are one function, since LeakyReLU is monotone. Its slope is not said: 0.2, as in
      VoxelMorph.
    - Figure 2 has two kinds of upsampling, black arrows and grey ones with attention, and section
      3.2.2 puts ECA on the decoder: here on the four upsamplings of the right edge, not on those
      between.
    - Upsampling repeats voxels, the default of Keras, in which the paper was written.
    - Channels are not said. Ours are the encoder's of VoxelMorph, with which the paper compares:
      what differs is then the connections.
    - The head is VoxelMorph's: a convolution whose weights start near zero, no activation behind
      it.
    - Any image size: the images are padded to a multiple of 16, and zeros at the border count in
      the mean over space that ECA takes.
    """

    def __init__(
        self,
        ndim: int = 3,
        *,
        channels: Sequence[int] = (16, 32, 32, 32, 32),
        dense: bool = True,
        eca: bool = True,
        save_memory: bool = False,
    ):
        super().__init__(ndim)
        if len(channels) < 2 or min(channels) < 1:
            raise ValueError(
                f"channels is {channels}, expected one positive number a level, two levels or more"
            )
        last = len(channels) - 1
        self.divisor = 2**last
        self.encoder = nn.ModuleList(ConvBlock(ndim, a, b) for a, b in pairwise((2, *channels)))
        self.pool = MAX_POOL[ndim](2)
        # one diagonal of the picture after the other, each from the bottom up; the last is the edge
        diagonals = range(1 if dense else last, last + 1)
        self.places = [(i, k - i) for k in diagonals for i in reversed(range(k))]
        self.nodes = nn.ModuleList(
            Node(ndim, below=channels[i + 1], row=channels[i] * (j if dense else 1),
                 width=channels[i], eca=eca and i + j == last)
            for i, j in self.places
        )  # fmt: skip
        self.head = DispHead(ndim, channels[0])
        if save_memory:
            self.apply(checkpointed)

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        x = torch.cat([moving, fixed], dim=1)  # (B, 2, *S)
        # row i: X(i, 0), X(i, 1), ..., each (B, channels[i], *S / 2^i)
        rows: list[list[Tensor]] = []
        for conv in self.encoder:
            x = conv(self.pool(x) if rows else x)
            rows.append([x])
        for (i, _), node in zip(self.places, self.nodes, strict=True):
            rows[i].append(node(rows[i + 1][-1], *rows[i]))
        return {"disp": self.head(rows[0][-1])}
