"""Fully convolutional registration of the chest, with a branch that segments it.

Source: Tan, "A survey of medical image registration", 2023 (in Chinese), the section on "A
FCN-based unsupervised learning model for deformable chest CT image registration" and its figure 6.
The survey's text says that there are two fully convolutional branches, one that segments the chest
and one that registers it, that registration is learned without labels, and nothing of layers, sizes
or losses; the drawing was not to be had. All of it is therefore a reconstruction: `Fcn` says block
by block from which published relative.

The displacement's last layers begin at 0: the identity, exactly. The convolutions before them keep
a signal's strength (`regkit.blocks.init_weights`); with PyTorch's own start neither branch learned
anything in 400 steps. Parameters, 3D / 2D: 505,001 / 167,174; with segment=2 they are 997,791 /
331,932.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from regkit.blocks import CONV, MAX_POOL, ConvBlock, DispHead, checkpointed, init_weights, raised
from regkit.models.base import RegistrationModel
from regkit.spatial import resize, resize_disp

ANSWERS = 3  # at the three coarsest levels


class FCN(nn.Module):
    """Long et al. 2015: (B, c_in, *S) -> an answer of size S / 2^(levels - 3).

    Args:
        ndim: 2 or 3.
        c_in: channels of the input.
        channels: of the levels, from full size down, each half as large as the one before; at
            least 3.
        head: makes a last layer for features of so many channels.
        enlarge: brings an answer to a finer grid, (B, c_out, *S), shape -> (B, c_out, *shape).
    """

    def __init__(
        self,
        ndim: int,
        c_in: int,
        channels: Sequence[int],
        *,
        head: Callable[[int], nn.Module],
        enlarge: Callable[[Tensor, Sequence[int]], Tensor],
    ):
        super().__init__()
        if len(channels) < ANSWERS:
            raise ValueError(f"channels is {tuple(channels)}, expected {ANSWERS} levels or more")
        self.levels = nn.ModuleList(
            nn.Sequential(ConvBlock(ndim, a, b), ConvBlock(ndim, b, b))
            for a, b in pairwise((c_in, *channels))
        )
        self.pool = MAX_POOL[ndim](2)
        self.heads = nn.ModuleList(head(c) for c in channels[-ANSWERS:])
        self.enlarge = enlarge

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for i, level in enumerate(self.levels):
            x = level(self.pool(x) if i else x)
            maps.append(x)  # 1, 1/2, 1/4, 1/8, 1/16
        *finer, coarsest = (head(x) for head, x in zip(self.heads, maps[-ANSWERS:], strict=True))
        answer: Tensor = coarsest
        for fine in reversed(finer):
            answer = fine + self.enlarge(answer, fine.shape[2:])
        return answer


class Fcn(RegistrationModel):
    """`fcn`: model(moving, fixed), with `logits` of both images in the result if it segments.

    Args:
        ndim: 2 or 3.
        channels: of the levels of each branch. The displacement is found at the size of the third
            from the end: 1/4 with five of them.
        segment: number of classes, background (class 0) included; None: no segmentation branch. The
            term "segmentation" of an objective teaches it the labels 1 to segment - 1.
        save_memory: compute the layers again on the way back instead of keeping them.

    Block by block, each from a published relative:

    - A fully convolutional network, `FCN` above: convolutions and pooling; coarse answers are
      doubled and added to finer ones, and there is no decoder. Long, Shelhamer and Darrell, "Fully
      convolutional networks for semantic segmentation", CVPR 2015, figure 3; theirs adds the
      answers at 1/32, 1/16 and 1/8, ours those at 1/16, 1/8 and 1/4.
    - The registration branch regresses a displacement at 1/4 of the image's size, which is resized;
      its coarse answers are displacements too. Li and Fan, "Non-rigid image registration using
      self-supervised fully convolutional networks without training data", ISBI 2018, who also have
      an answer at each of several sizes; the regression at a reduced size is also that of de Vos et
      al., "End-to-end unsupervised deformable image registration with a convolutional neural
      network", 2017.
    - The segmentation branch is the same network with classes as answers. It sees each image for
      itself, with the same weights. This, and that both branches learn together, is as in Xu and
      Niethammer, "DeepAtlas: joint semi-supervised learning of image registration and
      segmentation", MICCAI 2019.
    - How the branches meet. The smallest way that has an effect on the answer: the probabilities
      that the first finds are further channels of what the second sees, beside the images. (In
      DeepAtlas they meet in the loss alone. The term "dice" of an objective is that loss, with
      known labels.)
    - Channels, two convolutions a level, LeakyReLU and no normalisation: as in `vxm`, ours.
    """

    def __init__(
        self,
        ndim: int = 3,
        *,
        channels: Sequence[int] = (16, 32, 32, 64, 64),
        segment: int | None = None,
        save_memory: bool = False,
    ):
        super().__init__(ndim)
        if segment is not None and segment < 2:
            raise ValueError(f"segment is {segment}, expected 2 classes or more, or None")
        self.divisor = 2 ** (len(channels) - 1)
        classes = 0 if segment is None else segment - 1  # channels of an image, beside itself
        self.registration = FCN(
            ndim,
            2 + 2 * classes,
            channels,
            head=lambda c: DispHead(ndim, c),
            enlarge=resize_disp,
        )
        self.segmentation: FCN | None = None
        if segment is not None:
            self.segmentation = FCN(
                ndim,
                1,
                channels,
                head=lambda c: CONV[ndim](c, segment, kernel_size=1),
                enlarge=resize,
            )
        self.apply(init_weights)
        if save_memory:
            self.apply(checkpointed)

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        shape = fixed.shape[2:]
        seen, logits = [moving, fixed], []
        if self.segmentation is not None:
            for image in (moving, fixed):
                logits.append(raised(resize(self.segmentation(image), shape)))  # (B, classes, *S)
                seen.append(logits[-1].softmax(dim=1)[:, 1:])
        disp = self.registration(torch.cat(seen, dim=1))
        return {"disp": resize_disp(disp, shape), "logits": tuple(logits)}
