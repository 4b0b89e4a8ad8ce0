"""What is measured: each operation of regkit beside a peer that computes the same thing.

A case builds two calls from the same inputs, ours and the peer's, and both return what they
computed: a comparison of speed means little where the results differ, so `difference` says how far
apart they are, and `tests/test_benchmarks.py` holds each case to its `tolerance`. Where a peer
follows another definition, `note` says which.

The forms written out here (`five_convolutions`, `numpy_jacobian`, `one_hot_dice`) are the ones that
papers and their code commonly use, written from the formula. Calls into other libraries get their
inputs in the form they like best: building that form is never timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regkit import losses, metrics, spatial

Run = Callable[[], Tensor]

SMALL = (80, 96, 80)
LARGE = (160, 192, 160)
LARGEST = (160, 192, 224)
SCALING = ((32, 32, 32), (64, 64, 64), SMALL, (128, 128, 128), LARGE)
LABELS = tuple(range(1, 31))


@dataclass(frozen=True)
class Inputs:
    """One pair: images (1, 1, *S) float32, labels (1, 1, *S) int16, a smooth disp (1, 3, *S)."""

    moving: Tensor
    fixed: Tensor
    labels_a: Tensor
    labels_b: Tensor
    disp: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.moving.shape[2:])

    def resized(self, shape: Sequence[int], device: str = "cpu") -> Inputs:
        """The same pair on another grid."""

        def near(labels: Tensor) -> Tensor:
            return F.interpolate(labels.float(), size=tuple(shape), mode="nearest").to(labels.dtype)

        same = tuple(shape) == self.shape
        made = Inputs(
            *(x if same else spatial.resize(x, shape) for x in (self.moving, self.fixed)),
            *(x if same else near(x) for x in (self.labels_a, self.labels_b)),
            smooth_disp(shape),
        )
        return Inputs(*(x.contiguous().to(device) for x in vars(made).values()))


def smooth_disp(shape: Sequence[int], size: float = 3.0) -> Tensor:
    """A displacement (1, d, *S) of a few cosines, a whole wave along an axis at most: no folds."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*(torch.arange(n) / n for n in shape), indexing="ij")
    channels = []
    for _ in shape:
        wave = torch.zeros(*shape)
        for _ in range(4):
            turns = torch.rand(len(shape) + 1, generator=generator) * 2 - 1
            phase = sum(t * x for t, x in zip(turns, axes)) + turns[-1]
            wave += torch.cos(2 * math.pi * phase)
        channels.append(wave / 4)
    return size * torch.stack(channels)[None]


def brains() -> Inputs:
    """Two subjects of the embedded population, at the largest size."""
    from regkit.data import population

    a, b = population(2, LARGEST)
    generator = torch.Generator().manual_seed(0)
    # a little noise everywhere: the peers of `lncc` treat constant windows in their own ways
    noise = 0.05 * torch.randn(2, 1, 1, *LARGEST, generator=generator)
    return Inputs(
        a.image[None] + noise[0],
        b.image[None] + noise[1],
        a.labels[None],
        b.labels[None],
        smooth_disp(LARGEST),
    )


def toys(shape: Sequence[int]) -> Inputs:
    """Small inputs of the same kind, made at once: boxes as labels."""
    generator = torch.Generator().manual_seed(0)
    a, noise = torch.randn(2, 1, 1, *shape, generator=generator)  # mean 0, as beyond the border
    b = 0.7 * a + 0.7 * noise
    boxes = [(torch.arange(n) * k // n) for n, k in zip(shape, (4, 3, 3))]
    i, j, k = torch.meshgrid(*boxes, indexing="ij")
    labels = (1 + i + 4 * j + 12 * k).to(torch.int16)[None, None]
    return Inputs(a, b, labels, labels.roll((1, 2), (2, 4)), smooth_disp(shape, 0.5))


@dataclass(frozen=True)
class Case:
    """One operation against one peer. `asked` is the ratio peer / ours that we set out to reach."""

    operation: str
    work: str
    shape: tuple[int, ...]
    peer: str
    build: Callable[[Inputs], tuple[Run, Run]]
    tolerance: float  # largest difference at toy size, absolute
    asked: float | None = None
    note: str = ""
    device: str = "any"  # "cpu": the peer knows no other

    @property
    def name(self) -> str:
        return f"{self.operation} | {self.describe(self.shape)} | {self.peer}"

    def describe(self, shape: Sequence[int]) -> str:
        return f"{self.work}, {'x'.join(map(str, shape))}"


def difference(ours: Tensor, peer: Tensor) -> float:
    """Largest absolute difference; two NaN or two infinities agree."""
    ours, peer = ours.double().cpu(), peer.double().cpu()
    if ours.shape != peer.shape:
        raise ValueError(f"ours has shape {tuple(ours.shape)} and peer {tuple(peer.shape)}.")
    same = (ours == peer) | (ours.isnan() & peer.isnan())
    return float((ours - peer).abs().where(~same, 0.0).max())


def forward(function: Callable[..., Tensor], *inputs: Tensor) -> Run:
    """A call without gradients."""

    def run() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return run


def backward(function: Callable[..., Tensor], first: Tensor, *rest: Tensor) -> Run:
    """A call and its gradient with respect to the first input; returns the value."""
    first = first.detach().clone().requires_grad_()

    def run() -> Tensor:
        value = function(first, *rest)
        torch.autograd.grad(value, first, torch.ones_like(value))
        return value.detach()

    return run


# --- the common forms, written out ---------------------------------------------------------------


def five_convolutions(moved: Tensor, fixed: Tensor, window: int = 9) -> Tensor:
    """Local correlation as published with VoxelMorph: box sums of I, J, I^2, J^2 and I J, each a
    convolution with a window^3 kernel of ones (Balakrishnan et al. 2019, equation 5)."""
    ones = moved.new_ones(1, 1, window, window, window)
    n = window**3

    def box(x: Tensor) -> Tensor:
        return F.conv3d(x, ones, padding=window // 2)

    sum_i, sum_j = box(moved), box(fixed)
    cross = box(moved * fixed) - sum_i * sum_j / n
    var_i = box(moved * moved) - sum_i * sum_i / n
    var_j = box(fixed * fixed) - sum_j * sum_j / n
    return 1 - (cross * cross / (var_i * var_j + 1e-5)).mean()


def sampling_grid(disp: Tensor) -> Tensor:
    """What a bare `grid_sample` wants ready: (1, *S, 3) in [-1, 1], last axis first."""
    shape = disp.shape[2:]
    coords = spatial.identity_grid(shape, disp.device) + disp
    scaled = [2 * coords[:, i] / (n - 1) - 1 for i, n in enumerate(shape)]
    return torch.stack(scaled[::-1], dim=-1).contiguous()


def numpy_jacobian(disp: np.ndarray, identity: np.ndarray) -> Tensor:
    """Determinant of x + disp(x) by `numpy.gradient`, (1, *S), in the precision of `identity`."""
    rows = np.gradient(np.moveaxis(disp + identity, 0, -1), axis=(0, 1, 2))
    (a, b, c), (d, e, f), (g, h, i) = (np.moveaxis(row, -1, 0) for row in rows)
    det = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    return torch.from_numpy(det)[None]


def one_hot_dice(a: Tensor, b: Tensor) -> Tensor:
    """Dice of one channel per label, the channels made here from label maps; (1, L)."""

    def one_hot(x: Tensor) -> Tensor:
        return F.one_hot(x[:, 0].long(), 1 + LABEL_COUNT).movedim(-1, 1)[:, 1 : len(LABELS) + 1]

    a, b = one_hot(a), one_hot(b)
    axes = (2, 3, 4)
    return 2 * (a * b).sum(axes) / (a.sum(axes) + b.sum(axes)).double()


LABEL_COUNT = 37  # of the embedded population


def one_mask_per_label(a: np.ndarray, b: np.ndarray) -> Tensor:
    """Dice in a loop over the labels, two masks for each, (1, L)."""
    row = []
    for label in LABELS:
        mask_a, mask_b = a == label, b == label
        row.append(2 * np.sum(mask_a & mask_b) / (np.sum(mask_a) + np.sum(mask_b)))
    return torch.tensor([row])


def channels(labels: Tensor) -> Tensor:
    """(1, L + 1, *S) of 0 and 1, background first: what MONAI's metrics ask for."""
    values = torch.tensor((0, *LABELS), device=labels.device).reshape(1, -1, 1, 1, 1)
    return (labels == values).float()


# --- the cases -----------------------------------------------------------------------------------


def lncc_convolutions(x: Inputs) -> tuple[Run, Run]:
    return backward(losses.lncc, x.moving, x.fixed), backward(five_convolutions, x.moving, x.fixed)


def lncc_monai(x: Inputs) -> tuple[Run, Run]:
    from monai.losses import LocalNormalizedCrossCorrelationLoss

    peer = LocalNormalizedCrossCorrelationLoss(spatial_dims=3, kernel_size=9)
    return (
        backward(losses.lncc, x.moving, x.fixed),
        backward(lambda a, b: 1 + peer(a, b), x.moving, x.fixed),
    )


def mutual_information_monai(x: Inputs) -> tuple[Run, Run]:
    from monai.losses import GlobalMutualInformationLoss

    peer = GlobalMutualInformationLoss(kernel_type="b-spline", num_bins=32)
    return (
        backward(losses.mutual_information, x.moving, x.fixed),
        backward(peer, x.moving, x.fixed),
    )


def bare_grid_sample(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def warp_forward(x: Inputs) -> tuple[Run, Run]:
    return (
        forward(spatial.warp, x.moving, x.disp),
        forward(bare_grid_sample, x.moving, sampling_grid(x.disp)),
    )


def warp_backward(x: Inputs) -> tuple[Run, Run]:
    return (
        backward(lambda disp: spatial.warp(x.moving, disp), x.disp),
        backward(lambda grid: bare_grid_sample(x.moving, grid), sampling_grid(x.disp)),
    )


def warp_monai(x: Inputs) -> tuple[Run, Run]:
    from monai.networks.blocks import Warp

    peer = Warp(mode="bilinear", padding_mode="zeros")
    return (
        backward(lambda disp: spatial.warp(x.moving, disp), x.disp),
        backward(lambda disp: peer(x.moving, disp), x.disp),
    )


def compose_monai(x: Inputs) -> tuple[Run, Run]:
    from monai.networks.blocks import Warp

    peer = Warp(mode="bilinear", padding_mode="border")
    return (
        backward(lambda disp: spatial.compose(disp, disp), x.disp),
        backward(lambda disp: disp + peer(disp, disp), x.disp),
    )


def integrate_monai(x: Inputs) -> tuple[Run, Run]:
    from monai.networks.blocks import DVF2DDF

    peer = DVF2DDF(num_steps=7, mode="bilinear", padding_mode="border")
    return backward(spatial.integrate, x.disp), backward(peer, x.disp)


def diffusion_monai(x: Inputs) -> tuple[Run, Run]:
    from monai.losses import DiffusionLoss

    peer = DiffusionLoss()  # sums over the three axes where ours takes the mean
    return backward(losses.diffusion, x.disp), backward(lambda disp: peer(disp) / 3, x.disp)


def bending_monai(x: Inputs) -> tuple[Run, Run]:
    from monai.losses import BendingEnergyLoss

    return backward(losses.bending, x.disp), backward(BendingEnergyLoss(), x.disp)


def jacobian_numpy(dtype: type) -> Callable[[Inputs], tuple[Run, Run]]:
    def build(x: Inputs) -> tuple[Run, Run]:
        identity = np.indices(x.shape).astype(dtype)
        disp = x.disp[0].numpy()
        return (
            forward(spatial.jacobian_determinant, x.disp),
            lambda: numpy_jacobian(disp, identity),
        )

    return build


def our_dice(x: Inputs) -> Run:
    return forward(lambda a, b: metrics.dice(a, b, LABELS), x.labels_a, x.labels_b)


def dice_one_hot(x: Inputs) -> tuple[Run, Run]:
    return our_dice(x), forward(one_hot_dice, x.labels_a, x.labels_b)


def dice_masks(x: Inputs) -> tuple[Run, Run]:
    a, b = x.labels_a.numpy(), x.labels_b.numpy()
    return our_dice(x), lambda: one_mask_per_label(a, b)


def dice_monai(x: Inputs) -> tuple[Run, Run]:
    from monai.metrics import compute_dice

    a, b = channels(x.labels_a), channels(x.labels_b)
    return our_dice(x), forward(lambda a, b: compute_dice(a, b, include_background=False), a, b)


def hd95_monai(x: Inputs) -> tuple[Run, Run]:
    from monai.metrics import compute_hausdorff_distance

    a, b = channels(x.labels_a), channels(x.labels_b)
    return (
        forward(lambda a, b: metrics.hd95(a, b, LABELS), x.labels_a, x.labels_b),
        forward(lambda a, b: compute_hausdorff_distance(a, b, percentile=95), a, b),
    )


BOTH = "forward + backward"
# A coordinate in [-1, 1] is known to 6e-8, of 24 voxels that is 1.4e-6 voxels; neighbours of `toys`
# lie up to 6 apart, and both sides round.
ROUNDING = 3e-5
CASES = (
    Case(
        *("lncc", f"{BOTH}, window 9", SMALL, "five convolutions", lncc_convolutions),
        tolerance=0.02,
        asked=30,
        note="the peer counts zeros beyond the border, and 1e-5 in the denominator",
    ),
    Case(
        *("lncc", f"{BOTH}, window 9", SMALL, "MONAI LocalNormalizedCrossCorrelationLoss"),
        lncc_monai,
        tolerance=0.02,
        asked=4,
        note="the peer counts zeros beyond the border",
    ),
    Case(
        *("mutual_information", f"{BOTH}, 32 bins", SMALL, "MONAI GlobalMutualInformationLoss"),
        mutual_information_monai,
        tolerance=0.5,
        note="the peer counts the fixed image in whole bins, ours spreads it over four",
    ),
    Case(
        *("warp", "forward", SMALL, "bare grid_sample, grid ready", warp_forward),
        tolerance=ROUNDING,
        asked=1 / 1.3,
    ),
    Case(
        *("warp", BOTH, SMALL, "bare grid_sample, grid ready", warp_backward),
        tolerance=ROUNDING,
        asked=1 / 1.3,
        note="gradient with respect to disp; of the peer with respect to its grid",
    ),
    Case("warp", BOTH, SMALL, "MONAI Warp", warp_monai, tolerance=ROUNDING),
    Case("compose", BOTH, SMALL, "MONAI Warp, added", compose_monai, tolerance=1e-5),
    Case("integrate", f"{BOTH}, 7 steps", SMALL, "MONAI DVF2DDF", integrate_monai, tolerance=1e-4),
    Case(
        *("diffusion", BOTH, SMALL, "MONAI DiffusionLoss", diffusion_monai),
        tolerance=5e-5,
        note="the peer takes central differences and leaves the border out",
    ),
    Case(
        *("bending", BOTH, SMALL, "MONAI BendingEnergyLoss", bending_monai),
        tolerance=1e-5,
        note="the peer takes central differences of central differences, without the border",
    ),
    Case(
        *("jacobian_determinant", "forward", LARGE, "numpy.gradient, float32"),
        jacobian_numpy(np.float32),
        tolerance=1e-4,
        device="cpu",
    ),
    Case(
        *("jacobian_determinant", "forward", LARGE, "numpy.gradient, float64 grid"),
        jacobian_numpy(np.float64),
        tolerance=1e-4,
        asked=5,
        note="float32 disp added to a float64 grid: the form in use, in VoxelMorph for example",
        device="cpu",
    ),
    Case(
        *("dice", "30 labels", LARGEST, "one-hot", dice_one_hot),
        tolerance=1e-12,
        asked=10,
        note="making the channels is part of the peer's time",
    ),
    Case(
        *("dice", "30 labels", LARGEST, "one mask per label, NumPy", dice_masks),
        tolerance=1e-12,
        device="cpu",
    ),
    Case(
        *("dice", "30 labels", LARGE, "MONAI compute_dice", dice_monai),
        tolerance=1e-6,
        note="the peer's channels are ready before the clock starts",
    ),
    Case(
        *("hd95", "30 labels", LARGE, "MONAI compute_hausdorff_distance", hd95_monai),
        tolerance=1e-5,
        asked=3,
        note="the peer's channels are ready before the clock starts",
        device="cpu",
    ),
)


def ours(operation: str, inputs: Inputs) -> Run:
    """Our side alone, of the first case of an operation: for memory and scaling."""
    x = inputs
    return {
        "lncc": lambda: backward(losses.lncc, x.moving, x.fixed),
        "warp": lambda: backward(lambda disp: spatial.warp(x.moving, disp), x.disp),
        "integrate": lambda: backward(spatial.integrate, x.disp),
        "mutual_information": lambda: backward(losses.mutual_information, x.moving, x.fixed),
        "bending": lambda: backward(losses.bending, x.disp),
        "jacobian_determinant": lambda: forward(spatial.jacobian_determinant, x.disp),
        "dice": lambda: our_dice(x),
    }[operation]()
