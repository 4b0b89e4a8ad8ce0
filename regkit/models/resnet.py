"""Rigid and affine registration by a residual network.

Paper: Hu, "Registration of brain magnetic resonance images based on residual neural network",
Intelligent Computer and Applications 14(11), 2024, pages 99-102 (in Chinese); the backbone is
ResNet-34 of He et al., "Deep residual learning for image recognition", CVPR 2016, table 1.

    moving, fixed -> ResNet-34 -> two fully connected layers -> a few numbers -> theta -> disp

The numbers are the motion itself: `rigid_resnet34` has 3 in 2D (an angle and two shifts, equation
2) and 6 in 3D; `affine_resnet34` has 6 in 2D (equation 1) and 12 in 3D. Nothing else can bend the
image, so no smoothness term is needed.

Parameters at width 64, the paper's: 21,314,563 (2D rigid), 21,314,758 (2D affine), 63,524,806 (3D
rigid), 63,525,196 (3D affine). At width 16, as shipped: 1,342,915 (2D rigid).
The shipped ones see images at half size (`reduce=2`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regkit.blocks import AVERAGE_POOL, CONV, MAX_POOL, ResidualBlock, group_norm, raised
from regkit.models.base import RegistrationModel
from regkit.spatial import affine_to_disp, check_spacing, rigid_theta

BLOCKS = (3, 4, 6, 3)  # residual blocks of each stage of ResNet-34
SCALE = 0.1  # radians, and half images, per unit of the last layer


class LinearResNet(RegistrationModel):
    """`rigid_resnet34` and `affine_resnet34`: model(moving, fixed) with `theta` in the result.

    Args:
        kind: "rigid" or "affine".
        ndim: 2 or 3.
        width: channels of the first stage; each next stage has twice as many.
        hidden: size of the first fully connected layer.
        reduce: the network looks at averages over cubes of this many voxels along each axis; the
            motion is found, and applied, at full size. 2 makes a 2D answer four times as fast.
        spacing: voxel size, mm, of the images to come: one number or one per axis.

    What differs from the paper:

    - The angle. Equation 2 writes the rotation as [[cos, sin], [-sin, cos]] and maps the moving to
      the moved image. Ours is [[cos, -sin], [sin, cos]] in array-axis order and maps the fixed
      voxel to the place in the moving image where its value is found. The two turn opposite ways.
    - The numbers start at 0, the identity, and a turn counts in radians, a shift in half images:
      both then move the rim of the image alike. A rigid motion turns in millimetres (`spacing`), so
      nothing shears on oblong images or oblong voxels.
    - The last layer counts in tenths of that (`SCALE`). A step of Adam moves every weight by about
      the learning rate, whatever the loss; at full scale 1e-3 moves the image by a tenth of a voxel
      and more, and training across contrasts did not begin to learn in a thousand steps.
    - Group instead of batch normalisation: the answer to a pair does not depend on its batch, and
      one pair at a time can be trained.
    """

    def __init__(
        self,
        kind: str,
        ndim: int = 3,
        *,
        width: int = 64,
        hidden: int = 64,
        reduce: int = 1,
        spacing: float | Sequence[float] = 1.0,
    ):
        super().__init__(ndim)
        if reduce < 1:
            raise ValueError(f"reduce is {reduce}, expected 1 or more")
        self.kind, self.reduce = kind, reduce
        with torch.device("cpu"):  # numbers, also where the network is laid out without memory
            self.spacing = check_spacing(spacing, ndim).tolist()
        self.stem = nn.Sequential(
            CONV[ndim](2, width, kernel_size=7, stride=2, padding=3, bias=False),
            group_norm(width),
            nn.ReLU(),
            MAX_POOL[ndim](3, stride=2, padding=1),
        )
        blocks, channels = [], width
        for stage, count in enumerate(BLOCKS):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResidualBlock(ndim, channels, width * 2**stage, stride=stride))
                channels = width * 2**stage
        self.features = nn.Sequential(*blocks)
        self.turns = ndim**2 if kind == "affine" else 1 if ndim == 2 else 3
        self.hidden = nn.Linear(channels, hidden)
        self.numbers = nn.Linear(hidden, self.turns + ndim)
        nn.init.zeros_(self.numbers.weight)
        nn.init.zeros_(self.numbers.bias)

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        shape = fixed.shape[2:]
        pair = torch.cat([moving, fixed], dim=1)
        if self.reduce > 1:
            pair = AVERAGE_POOL[self.ndim](self.reduce, ceil_mode=True)(pair)
        features = self.features(self.stem(pair))
        features = features.flatten(2).mean(2)  # (B, 8 width)
        numbers = SCALE * raised(self.numbers(torch.relu(self.hidden(features))))
        theta = self.theta(numbers, shape)
        return {"disp": affine_to_disp(theta, shape), "theta": theta}

    def theta(self, numbers: Tensor, shape: Sequence[int]) -> Tensor:
        """(B, count) -> (B, d, d+1), voxels: [R | t], equation 2, or [I + W | t], equation 1."""
        spacing = numbers.new_tensor(self.spacing)
        half = (spacing * spacing.new_tensor(shape)).max() / 2  # mm
        turn, shift = numbers[:, : self.turns], numbers[:, self.turns :] * half / spacing
        if self.kind == "rigid":
            return rigid_theta(turn, shift, spacing)
        d = self.ndim
        matrix = torch.eye(d, device=turn.device, dtype=turn.dtype) + turn.reshape(-1, d, d)
        return torch.cat([matrix * spacing / spacing[:, None], shift[:, :, None]], dim=2)
