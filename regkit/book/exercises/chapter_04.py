"""Chapter 04: what a dense U-Net costs, what its attention hears, and what an energy means."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regkit import losses, models, spatial
from regkit.book.exercise import Exercise, Mistake
from regkit.data import population, true_displacement

# 1, where the work is


def _share(dense: bool, smaller: int = 4, voxels: int = 80 * 96, encoder: bool = True) -> float:
    """Share of the first row in all multiplications of a slice.

    Args:
        smaller: how many times fewer voxels a level has than the one above.
        voxels: of the slice; 1 counts weights instead.
        encoder: do the nodes of the left edge count?
    """
    model: Any = models.create("dense_unet_eca", ndim=2, dense=dense)
    work = [0.0] * 5
    nodes = list(zip((i for i, _ in model.places), model.nodes))
    for i, node in [*(enumerate(model.encoder) if encoder else ()), *nodes]:
        work[i] += voxels / smaller**i * node.conv.weight.numel()
    return work[0] / sum(work)


# 2, attention over channels


def _weights(x: Tensor, kernel: Tensor) -> Tensor:
    mean = x.mean(dim=(2, 3))
    return torch.sigmoid(_along_channels(mean, kernel))


def _along_channels(mean: Tensor, kernel: Tensor) -> Tensor:
    return F.conv1d(mean[:, None], kernel[None, None], padding=1)[:, 0]


def _ring(x: Tensor, kernel: Tensor) -> Tensor:
    mean = F.pad(x.mean(dim=(2, 3))[:, None], (1, 1), mode="circular")
    return torch.sigmoid(F.conv1d(mean, kernel[None, None])[:, 0])


# 3, a sum or a mean


@cache
def _pair() -> tuple[Tensor, Tensor, Tensor]:
    one, other = population(2, (160, 192), seed=2)
    return one.image[None], other.image[None], true_displacement(one, other)


def _energies(
    sign: float = 1.0, likeness: float = 1.0, weight: float = 0.01
) -> tuple[float, float, float, float]:
    """Of the truth and of nothing, by the mean over voxels; and of both, by the sum.

    Args:
        sign: of the displacement with which the image is warped.
        likeness: by what the mean squared difference is multiplied beside the sum.
        weight: of the gradient.
    """
    moving, fixed, truth = _pair()
    found = []
    for voxels, times in ((1, 1.0), (truth[0, 0].numel(), likeness)):
        for disp in (truth, torch.zeros_like(truth)):
            unlike = losses.mse(spatial.warp(moving, sign * disp), fixed)
            found.append(float(times * unlike + weight * voxels * losses.diffusion(disp)))
    return found[0], found[1], found[2], found[3]


# 4, the peak of a channel


def _raw_peak(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    return (flat.amax(2) - flat.mean(2)) / (flat.std(2) + 1e-6)


def _standardised(peak: Tensor, dim: int = 1, correction: int = 0) -> Tensor:
    deviation = peak.std(dim=dim, keepdim=True, correction=correction)
    return (peak - peak.mean(dim=dim, keepdim=True)) / deviation


def _height(x: Tensor) -> Tensor:
    return x.amax((2, 3)) - x.mean((2, 3))


# 5, width


@cache
def _dense_count() -> int:
    return models.parameter_count(models.create("dense_unet_eca", ndim=2))


def _how_wide(channels: Tensor) -> int:
    """0: as large as the dense network, within 5 percent; -2, -1 too small; 1, 2 too large."""
    widths = channels.clamp(1, 200).long().tolist()  # millions of channels fit nowhere
    model = models.create("dense_unet_eca", ndim=2, channels=widths, dense=False, eca=False)
    ratio = models.parameter_count(model) / _dense_count()
    return sum(ratio > limit for limit in (0.75, 0.95, 1.05, 1.5)) - 2


def _channels(*widths: int) -> Sequence[int]:
    return widths


EXERCISES = (
    Exercise(
        asks="numbers",
        reference=lambda: (_share(False), _share(True)),
        mistakes=(
            Mistake(
                "weights instead of multiplications",
                lambda: (_share(False, 1, 1), _share(True, 1, 1)),
                "You have counted weights. Each of them is used once for every voxel.",
            ),
            Mistake(
                "halved along one axis only",
                lambda: (_share(False, 2), _share(True, 2)),
                "A level has half the size along both axes, so it has a quarter of the voxels.",
            ),
            Mistake(
                "without the encoder",
                lambda: (_share(False, encoder=False), _share(True, encoder=False)),
                "The nodes of the left edge are missing: the encoder works as well.",
            ),
            Mistake(
                "exchanged",
                lambda: (_share(True), _share(False)),
                "The two are exchanged: first the plain network, then the dense one.",
            ),
            Mistake(
                "percent",
                lambda: (100 * _share(False), 100 * _share(True)),
                "This is in percent. A share from 0 to 1 is asked.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=lambda: [(torch.randn(2, 16, 4, 5), torch.tensor([0.9, -0.4, 1.7]))],
        reference=_weights,
        remark="Now shuffle its channels.",
        mistakes=(
            Mistake(
                "no logistic function",
                lambda x, kernel: _along_channels(x.mean(dim=(2, 3)), kernel),
                "These are not between 0 and 1: the logistic function is missing.",
            ),
            Mistake(
                "softmax",
                lambda x, kernel: _along_channels(x.mean(dim=(2, 3)), kernel).softmax(dim=1),
                "A softmax lets the channels compete. Here each weight is a logistic function of "
                "its own number.",
            ),
            Mistake(
                "kernel turned round",
                lambda x, kernel: _weights(x, kernel.flip(0)),
                "The kernel is turned round. What PyTorch calls a convolution does not turn it: "
                "its first number meets the channel before.",
            ),
            Mistake(
                "channels in a ring",
                _ring,
                "You let the last channel be a neighbour of the first. Beyond the ends of the list "
                "stand zeros.",
            ),
            Mistake(
                "largest instead of mean",
                lambda x, kernel: torch.sigmoid(_along_channels(x.amax(dim=(2, 3)), kernel)),
                "You take the largest value of each channel where the formula takes the mean.",
            ),
        ),
    ),
    Exercise(
        asks="numbers",
        reference=_energies,
        mistakes=(
            Mistake(
                "forward instead of backward",
                lambda: _energies(sign=-1.0),
                "The image was warped by the negative of the displacement.",
            ),
            Mistake(
                "both summed",
                lambda: _energies(likeness=160 * 192),
                "You have summed the squared difference too. In the paper that one is a mean, "
                "and only the gradient can be read as a sum.",
            ),
            Mistake(
                "sign of the gradient",
                lambda: _energies(weight=-0.01),
                "The roughness is subtracted: with this sign a rough displacement is rewarded.",
            ),
            Mistake(
                "weight forgotten",
                lambda: _energies(weight=1.0),
                "The weight 0.01 of the squared gradient is missing.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=lambda: [(torch.rand(3, 16, 6, 7) ** torch.linspace(1, 6, 16)[:, None, None],)],
        reference=lambda x: _standardised(_raw_peak(x)),
        tolerance=1e-4,
        remark="Whether it registers better is for you to measure.",
        mistakes=(
            Mistake(
                "not standardised",
                _raw_peak,
                "These are the peaks. Standardise them over the channels of each image.",
            ),
            Mistake(
                "standardised over the batch",
                lambda x: _standardised(_raw_peak(x), dim=0),
                "You have standardised over the images of the batch: an answer would then depend "
                "on who else is in it. Do it over the channels.",
            ),
            Mistake(
                "n against n - 1",
                lambda x: _standardised(_raw_peak(x), correction=1),
                "Nearly: `std` divides by n - 1 unless told otherwise. Over the channels divide by "
                "n, as `F.layer_norm` does.",
            ),
            Mistake(
                "not in units of the own deviation",
                lambda x: _standardised(_height(x)),
                "The height of a peak is measured in units of the deviation of its own channel: "
                "that division is missing.",
            ),
            Mistake(
                "mean not taken away",
                lambda x: _standardised(x.amax((2, 3)) / (x.flatten(2).std(2) + 1e-6)),
                "You take the largest value. The peak is how far it lies above the mean of its "
                "channel.",
            ),
        ),
    ),
    Exercise(
        asks="numbers",
        reference=lambda: _channels(24, 50, 50, 50, 50),
        measure=_how_wide,
        remark="Both networks have as many parameters, within 5 percent. Now train them.",
        mistakes=(
            Mistake(
                "as it was",
                lambda: _channels(16, 32, 32, 32, 32),
                "The plain network is still much smaller than the dense one. Print "
                "`models.parameter_count` of both.",
            ),
            Mistake(
                "a little too small",
                lambda: _channels(24, 46, 46, 46, 46),
                "Nearly: the plain network is still more than 5 percent smaller than the dense "
                "one.",
            ),
            Mistake(
                "a little too large",
                lambda: _channels(28, 55, 55, 55, 55),
                "Nearly: the plain network is now more than 5 percent larger than the dense one.",
            ),
            Mistake(
                "twice the channels",
                lambda: _channels(32, 64, 64, 64, 64),
                "Too much: a convolution grows with its input channels times its output channels, "
                "so twice as wide has four times the parameters.",
            ),
        ),
    ),
)
