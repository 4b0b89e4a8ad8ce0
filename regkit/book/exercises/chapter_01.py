"""Chapter 01: displacements, warps of labels, inverses, folds."""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor

from regkit import metrics, spatial
from regkit.book.exercise import Exercise, Mistake
from regkit.data import population, true_displacement

SHAPE = (80, 96)


# 1, a displacement of one value everywhere


def _constant(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, 2, 1, 1).expand(1, 2, 20, 20)


# 3, an affine map and its inverse


def _affine(linear: Tensor, shift: Tensor) -> Tensor:
    return torch.cat([linear, shift], dim=-1)


def _parts(theta: Tensor) -> tuple[Tensor, Tensor]:
    return theta[..., :-1], theta[..., -1:]


def _transposed(theta: Tensor) -> Tensor:
    linear, shift = _parts(theta)
    return _affine(linear.mT, -linear.mT @ shift)


def _some_thetas() -> list[tuple[Tensor]]:
    theta = spatial.rigid_theta(torch.tensor([[0.2]]), torch.tensor([[3.0, -2.0]]))
    theta[:, :, :2] *= 1.1
    sheared = torch.tensor([[[1.0, 0.4, 1.0], [0.0, 0.8, 5.0]]])
    return [(theta,), (sheared,)]


# 4, labels warped by maps of zeros and ones


def _by_maps(labels: Tensor, disp: Tensor) -> Tensor:
    names = labels.unique()
    maps = (labels == names.reshape(1, -1, 1, 1)).float()
    result: Tensor = names[spatial.warp(maps, disp, padding="border").argmax(1, keepdim=True)]
    return result


def _numbers_of_maps(labels: Tensor, disp: Tensor) -> Tensor:
    return torch.searchsorted(labels.unique(), _by_maps(labels, disp))


def _some_labels() -> list[tuple[Tensor, Tensor]]:
    """Structures 3, 7 and 20 in a background of 0, and a smooth motion that ends at the border."""
    i, j = spatial.identity_grid((32, 40))
    labels = torch.zeros(1, 1, 32, 40, dtype=torch.int64)
    for name, (a, b, radius) in {3: (15, 18, 11), 7: (13, 15, 6), 20: (19, 23, 5)}.items():
        labels[0, 0][(i - a) ** 2 + (j - b) ** 2 < radius**2] = name
    edge = (i * (31 - i) / 240).clamp(max=1) * (j * (39 - j) / 380).clamp(max=1)
    motion = torch.stack([1.7 * torch.sin(j / 6), -2.3 * torch.cos(i / 5)])
    return [(labels, (motion * edge)[None])]


# 5, one-sided differences


def _sides(disp: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(forward, backward) differences along axis 0, and along axis 1, of the inner voxels."""
    inner = disp[:, :, 1:-1, 1:-1]
    along_0 = (disp[:, :, 2:, 1:-1] - inner, inner - disp[:, :, :-2, 1:-1])
    along_1 = (disp[:, :, 1:-1, 2:] - inner, inner - disp[:, :, 1:-1, :-2])
    return along_0, along_1


def _determinants(disp: Tensor, identity: float = 1.0, sign: float = -1.0) -> Tensor:
    """The four one-sided determinants, (4, B, H - 2, W - 2)."""
    return torch.stack(
        [
            (identity + a[:, 0]) * (identity + b[:, 1]) + sign * b[:, 0] * a[:, 1]
            for a, b in itertools.product(*_sides(disp))
        ]
    )


def _worst(disp: Tensor) -> Tensor:
    return _determinants(disp).amin(dim=0)


# 6, a spoilt map


@cache
def _pair() -> tuple[Tensor, Tensor, Tensor]:
    """Labels of the moving and of the fixed head of this chapter, and the displacement between."""
    first, second = population(2, SHAPE)
    return first.labels[None], second.labels[None], true_displacement(first, second)


def _mean_dice(disp: Tensor) -> float:
    moving, fixed, _ = _pair()
    return metrics.dice(spatial.warp(moving, disp, mode="nearest"), fixed).nanmean().item()


def _overlap_and_folds(disp: Tensor) -> Tensor:
    """Is the overlap nearly that of the truth? Do five percent of the voxels fold?"""
    kept = _mean_dice(disp.float()) > _mean_dice(_pair()[2]) - 0.01
    return torch.tensor([kept, metrics.folding_percent(disp.float()).item() > 5])


def _inside() -> Tensor:
    """Which voxels have nothing but their own structure within three voxels: (1, 1, *SHAPE)."""
    labels = _pair()[1].float()
    high = torch.nn.functional.max_pool2d(labels, 7, stride=1, padding=3)
    low = -torch.nn.functional.max_pool2d(-labels, 7, stride=1, padding=3)
    return (high == low).float()


def _noise() -> Tensor:
    return 3 * torch.randn(1, 2, *SHAPE, generator=torch.Generator().manual_seed(0))


EXERCISES = (
    Exercise(
        asks="tensor",
        reference=lambda: _constant(-3, -5),
        mistakes=(
            Mistake(
                "forward instead of backward",
                lambda: _constant(3, 5),
                "This moves the content left and down: `disp` says where a voxel of the result "
                "looks, so the content goes the opposite way.",
            ),
            Mistake(
                "axes exchanged",
                lambda: _constant(-5, -3),
                "The two axes are exchanged: right is axis 0 and up is axis 1, and component i "
                "goes along axis i.",
            ),
            Mistake(
                "axes exchanged and forward",
                lambda: _constant(5, 3),
                "Two things at once: the axes are exchanged, and the content moves against `disp`.",
            ),
            Mistake(
                "up counted downwards",
                lambda: _constant(-3, 5),
                "Right is fine, but the content moves down. As drawn in this book axis 1 points "
                "up; only on a screen do rows count downwards.",
            ),
            Mistake(
                "normalised coordinates",
                lambda: _constant(-0.3, -0.5),
                "These are numbers for a grid that reaches from -1 to 1. A displacement of this "
                "library is in voxels.",
            ),
        ),
    ),
    Exercise(
        asks="numbers",
        inputs=lambda: [(10, 2), (40, 2), (12, 5)],
        reference=lambda s, k: (1 - k / s, k),
        mistakes=(
            Mistake(
                "Jaccard",
                lambda s, k: ((s - k) / (s + k), k),
                "This is what both share over what either covers, the Jaccard index. Dice divides "
                "twice the shared part by the sum of the two sizes.",
            ),
            Mistake(
                "without the factor of two",
                lambda s, k: ((s - k) / (2 * s), k),
                "Your Dice of two equal squares would be one half: the factor of two is missing.",
            ),
            Mistake(
                "shift along both axes",
                lambda s, k: (((s - k) / s) ** 2, k),
                "You have moved the square along both axes; the exercise moves it along one.",
            ),
            Mistake(
                "n against n - 1",
                lambda s, k: (1 - k / (s - 1), k),
                "A side of s voxels has s - 1 steps between them. Overlap counts the voxels.",
            ),
            Mistake(
                "95 percent of the distance",
                lambda s, k: (1 - k / s, 0.95 * k),
                "Dice is right. HD95 is the 95th percentile of the distances: not 95 percent of "
                "the largest, but the distance that 95 percent of the surface stays below.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=_some_thetas,
        reference=spatial.invert_theta,
        mistakes=(
            Mistake(
                "shift only negated",
                lambda theta: _affine(torch.linalg.inv(_parts(theta)[0]), -_parts(theta)[1]),
                "The matrix is right. The way back starts in the turned frame, so the shift has to "
                "be turned as well.",
            ),
            Mistake(
                "transposed",
                _transposed,
                "You have transposed the matrix. That is the inverse of a turn alone; this one "
                "also scales and shears.",
            ),
            Mistake(
                "shift turned forward",
                lambda theta: _affine(
                    torch.linalg.inv(_parts(theta)[0]), -_parts(theta)[0] @ _parts(theta)[1]
                ),
                "The matrix is right. The shift is multiplied by A where the inverse of A is due.",
            ),
            Mistake(
                "shift with the wrong sign",
                lambda theta: _affine(
                    torch.linalg.inv(_parts(theta)[0]),
                    torch.linalg.inv(_parts(theta)[0]) @ _parts(theta)[1],
                ),
                "The matrix is right, and the shift has the wrong sign: solve for x and look at "
                "what happens to t.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=_some_labels,
        reference=_by_maps,
        mistakes=(
            Mistake(
                "nearest neighbour",
                lambda labels, disp: spatial.warp(labels, disp, mode="nearest"),
                "This is nearest neighbour, which the exercise wants to replace.",
            ),
            Mistake(
                "labels interpolated",
                lambda labels, disp: spatial.warp(labels.float(), disp).round().long(),
                "The names themselves were interpolated: between 3 and 20 new structures appear. "
                "Interpolate one map per label.",
            ),
            Mistake(
                "place in the list",
                _numbers_of_maps,
                "These are places in the list of labels. The voxel needs the name that stands at "
                "that place.",
            ),
            Mistake(
                "forward instead of backward",
                lambda labels, disp: _by_maps(labels, -disp),
                "The labels moved the opposite way: use `disp` as `spatial.warp` takes it.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=lambda: [(0.8 * torch.randn(1, 2, 9, 11),), (torch.randn(2, 2, 6, 6),)],
        reference=_worst,
        remark="Now count with it.",
        mistakes=(
            Mistake(
                "central differences",
                lambda disp: spatial.jacobian_determinant(disp)[:, 1:-1, 1:-1],
                "These are central differences, or the mean of the four determinants, which is the "
                "same: they skip the voxel in the middle, where the fold hides.",
            ),
            Mistake(
                "missing identity",
                lambda disp: _determinants(disp, identity=0.0).amin(dim=0),
                "The map is x + disp(x). Its derivative holds the identity as well.",
            ),
            Mistake(
                "two of four",
                lambda disp: _determinants(disp)[[0, 3]].amin(dim=0),
                "You take forward with forward and backward with backward. The mixed pairs can "
                "fold as well: there are four.",
            ),
            Mistake(
                "sum instead of difference",
                lambda disp: _determinants(disp, sign=1.0).amin(dim=0),
                "A determinant is a difference of two products; yours is their sum.",
            ),
            Mistake(
                "largest instead of smallest",
                lambda disp: _determinants(disp).amax(dim=0),
                "You take the largest of the four determinants. One that folds is enough: take the "
                "smallest.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        reference=lambda: _pair()[2] + _noise() * _inside(),
        measure=_overlap_and_folds,
        remark="The overlap is kept, and more than 5 percent of the voxels fold. Which metric "
        "notices without the truth is for you to argue.",
        mistakes=(
            Mistake(
                "noise everywhere",
                lambda: _pair()[2] + _noise(),
                "It folds, but the overlap falls by more than 0.01: Dice looks at borders, so "
                "leave them as they are.",
            ),
            Mistake(
                "nothing folds",
                lambda: _pair()[2],
                "The overlap is kept, but hardly a voxel folds: be rougher where no border is "
                "near.",
            ),
            Mistake(
                "no registration",
                lambda: torch.zeros(1, 2, *SHAPE),
                "The overlap is lost and nothing folds. Start from the true displacement.",
            ),
        ),
    ),
)
