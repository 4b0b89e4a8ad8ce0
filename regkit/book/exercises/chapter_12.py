"""Chapter 12: success, landmarks, a wrong divisor, a painter, a deaf start, shifts, a teacher."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from regkit import classical, metrics, spatial
from regkit.book.exercise import Exercise, Mistake

# 1, the area under a success curve


def _some_errors() -> list[tuple[Tensor]]:
    return [(torch.tensor(errors),) for errors in ([0.4, 3.2, 9.9, 60.0], [3.0, 10.0, 25.0])]


def _shares(errors: Tensor, first: int = 1) -> Tensor:
    """Which part of the pairs ends below each of 25 whole numbers: (25,)."""
    return (errors[:, None] < torch.arange(first, first + 25)).float().mean(dim=0)


# 2, landmarks of two scans


def _two_scans() -> list[tuple[np.ndarray, ...]]:
    """A matrix fixed mm -> moving mm, the affine of each scan, five landmarks of each in voxels."""
    turn = np.array([[0.96, -0.1, 0.0, 12.0], [0.1, 1.05, 0.05, -7.0],
                     [0.0, -0.04, 1.1, 25.0], [0.0, 0.0, 0.0, 1.0]])  # fmt: skip
    fixed = np.array([[-1.4, 0, 0, 90], [0, 1.4, 0, -120], [0, 0, 2.5, -60], [0, 0, 0, 1.0]])
    moving = np.array([[-1.2, 0, 0, 80], [0, 1.2, 0, -110], [0, 0, 3.0, -20], [0, 0, 0, 1.0]])
    points = np.array([[40, 60, 20], [80, 50, 31], [55, 90, 12], [70, 71, 44], [30, 82, 27.0]])
    miss = np.array([[3, -1, 2], [0, 4, 1], [-2, 2, 0], [5, 1, -3], [1, 0, 6.0]])
    partners = _led(np.linalg.inv(moving), _led(turn, _led(fixed, points)) + miss)
    return [(turn, fixed, moving, points, partners)]


def _led(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (N, 3) through a matrix (4, 4)."""
    led: np.ndarray = points @ matrix[:3, :3].T + matrix[:3, 3]
    return led


def _lengths(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.linalg.norm(a - b, axis=1)
    return lengths


# 3, a wrong divisor

FITS, EMPTY, NEGATIVE, POSITIVE, OUTSIDE = range(5)


def _what_it_is(window: Tensor) -> int:
    """Is the "variance" with the divisor 81 zero, and does the window show anything?"""
    a = window.double()
    if a.min() < 0 or a.max() > 1:
        return OUTSIDE
    squares = a.square().sum()
    wrong = squares - a.sum().square() / 81
    if squares < 1e-6:
        return EMPTY
    if wrong.abs() < 1e-4 * squares:
        return FITS
    return NEGATIVE if wrong < 0 else POSITIVE


def _window(colours: int, voxels: int = 81, grey: float = 1.0) -> Tensor:
    """(3, 9, 9): the first of the colours are `grey` in the first of the voxels, else 0."""
    window = torch.zeros(3, 81)
    window[:colours, :voxels] = grey
    return window.reshape(3, 9, 9)


# 4, a painter


def _some_maps() -> list[tuple[Tensor, Tensor, Tensor]]:
    i, j = spatial.identity_grid((20, 26))
    labels = torch.zeros(1, 1, 20, 26, dtype=torch.int16)
    for name, radius in ((1, 8), (2, 6), (3, 3)):
        labels[0, 0, (i - 9) ** 2 + (j - 12) ** 2 < radius**2] = name
    disp = torch.stack([1.6 * torch.sin(j / 4), 2.3 * torch.cos(i / 5)])[None]
    return [(labels, disp, torch.tensor([0.0, 0.9, 0.2, 0.5]))]


def _deformed(labels: Tensor, disp: Tensor) -> Tensor:
    return spatial.warp(labels, disp, mode="nearest").long()


# 6, all shifts at once


def _dots(size: tuple[int, int], corner: tuple[int, int], pattern: Tensor) -> Tensor:
    image = torch.zeros(size)
    (i, j), (h, w) = corner, pattern.shape
    image[i : i + h, j : j + w] = pattern
    return image


def _some_dots() -> list[tuple[Tensor, Tensor]]:
    """Two pairs: one is further apart than half of the image along both axes."""
    pattern = torch.rand(10, 12) * (torch.rand(10, 12) > 0.7)
    places = (((28, 3), (2, 30)), ((12, 20), (9, 25)))
    return [(_dots((40, 48), a, pattern), _dots((40, 48), b, pattern)) for a, b in places]


def _best(
    moving: Tensor, fixed: Tensor, wide: int = 2, signed: bool = True, mirrored: bool = False
) -> Tensor:
    """The shift (2,) with the largest correlation, on images of `wide` times the size.

    Args:
        signed: does the far half mean a shift the other way?
        mirrored: without the conjugate, it is a convolution.
    """
    size = [wide * n for n in moving.shape]
    a, b = torch.fft.rfft2(moving, size), torch.fft.rfft2(fixed, size)
    scores = torch.fft.irfft2(a * (b if mirrored else b.conj()), size)
    best = [int(k) for k in torch.unravel_index(scores.argmax(), scores.shape)]
    return torch.tensor([k - n if signed and k > n // 2 else k for k, n in zip(best, size)])


def _shift(moving: Tensor, fixed: Tensor) -> Tensor:
    return classical.shift(moving[None, None], fixed[None, None])[0, :, 2]


# 7, a teacher


def _some_answers() -> list[tuple[Tensor, Tensor, Tensor]]:
    truth = torch.randn(1, 2, 16, 18)
    return [(truth + 0.7 * torch.randn(1, 2, 16, 18), truth, torch.rand(1, 1, 16, 18) > 0.4)]


def _miss(disp: Tensor, truth: Tensor) -> Tensor:
    length: Tensor = (disp - truth).norm(dim=1, keepdim=True)
    return length


EXERCISES = (
    Exercise(
        asks="number",
        inputs=_some_errors,
        reference=metrics.success_auc,
        tolerance=1e-4,
        mistakes=(
            Mistake(
                "at most instead of below",
                lambda errors: (errors[:, None] <= torch.arange(1, 26)).float().mean(),
                "A pair with an error of exactly t counts here. The formula asks for less than t.",
            ),
            Mistake(
                "thresholds from 0",
                lambda errors: _shares(errors, first=0).mean(),
                "The limits run from 0 to 24 here. In the formula t goes from 1 to 25.",
            ),
            Mistake(
                "not divided by 25",
                lambda errors: _shares(errors).sum(),
                "The shares are added, and not yet divided by their number. The best AUC is 1.",
            ),
            Mistake(
                "only the last limit",
                lambda errors: _shares(errors)[-1],
                "This is the share of pairs that succeed at 25 pixels: the last point of the "
                "curve, and not the area under it.",
            ),
            Mistake(
                "no steps",
                lambda errors: (1 - errors / 25).clamp(min=0).mean(),
                "This is the area under a curve without steps. The formula looks at whole pixels "
                "only.",
            ),
            Mistake(
                "mean error",
                lambda errors: errors.mean(),
                "This is the mean error. One lost pair decides it.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=_two_scans,
        reference=lambda matrix, fixed, moving, points, partners: _lengths(
            _led(matrix, _led(fixed, points)), _led(moving, partners)
        ).mean(),
        mistakes=(
            Mistake(
                "voxels for millimetres",
                lambda matrix, fixed, moving, points, partners: _lengths(
                    _led(matrix, points), partners
                ).mean(),
                "The landmarks are still in voxels. The affine of each scan leads from its voxels "
                "to millimetres.",
            ),
            Mistake(
                "one affine for both",
                lambda matrix, fixed, moving, points, partners: _lengths(
                    _led(matrix, _led(fixed, points)), _led(fixed, partners)
                ).mean(),
                "The partners went through the affine of the fixed scan. They are voxels of the "
                "moving one, which has a grid of its own.",
            ),
            Mistake(
                "forward instead of backward",
                lambda matrix, fixed, moving, points, partners: _lengths(
                    _led(np.linalg.inv(matrix), _led(fixed, points)), _led(moving, partners)
                ).mean(),
                "The matrix was inverted. It leads from fixed to moving already.",
            ),
            Mistake(
                "partners led",
                lambda matrix, fixed, moving, points, partners: _lengths(
                    _led(fixed, points), _led(matrix, _led(moving, partners))
                ).mean(),
                "The matrix was given the landmarks of the moving scan. It takes places of the "
                "fixed one.",
            ),
            Mistake(
                "shift forgotten",
                lambda matrix, fixed, moving, points, partners: _lengths(
                    _led(fixed, points) @ matrix[:3, :3].T, _led(moving, partners)
                ).mean(),
                "The last column of the matrix is missing: it holds the shift.",
            ),
            Mistake(
                "root of the mean square",
                lambda matrix, fixed, moving, points, partners: np.sqrt(
                    (
                        _lengths(_led(matrix, _led(fixed, points)), _led(moving, partners)) ** 2
                    ).mean()
                ),
                "This is the root of the mean square, in which large distances weigh more. The "
                "plain mean is asked.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        reference=lambda: _window(1),
        measure=_what_it_is,
        remark="Only the zero was checked. That a pole of the loss lies there is your argument.",
        mistakes=(
            Mistake(
                "black",
                lambda: _window(0),
                "All of it is black, and then the true variance is zero as well. Find a window "
                "that shows something.",
            ),
            Mistake(
                "flat",
                lambda: _window(3, grey=0.5),
                "Of this window the code makes a negative number: as a whole it is too bright. Let "
                "a part of it be dark.",
            ),
            Mistake(
                "nearly black",
                lambda: _window(1, voxels=9),
                "Of this window the code makes a positive number, as it should of any. Let more of "
                "it be bright.",
            ),
            Mistake(
                "greys up to 255",
                lambda: _window(1, grey=255.0),
                "There are values outside of 0 to 1. The brightness of a pixel lies between them.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=_some_maps,
        reference=lambda labels, disp, greys: greys[_deformed(labels, disp)],
        mistakes=(
            Mistake(
                "labels interpolated",
                lambda labels, disp, greys: greys[
                    spatial.warp(labels.float(), disp).round().long()
                ],
                "The labels were interpolated: where 1 meets 3 there is a seam of 2 now. Warp the "
                'map with `mode="nearest"`.',
            ),
            Mistake(
                "painted first",
                lambda labels, disp, greys: spatial.warp(greys[labels.long()], disp),
                "The picture was painted first and then interpolated, so its borders have mixed "
                "greys. Deform the labels, then paint.",
            ),
            Mistake(
                "forward instead of backward",
                lambda labels, disp, greys: greys[_deformed(labels, -disp)],
                "The map is deformed the other way: the displacement says where to look, and needs "
                "no sign.",
            ),
            Mistake(
                "axes exchanged",
                lambda labels, disp, greys: greys[_deformed(labels, disp.flip(1))],
                "The two components of the displacement are exchanged. Component i goes along "
                "array axis i.",
            ),
            Mistake(
                "names for greys",
                lambda labels, disp, greys: _deformed(labels, disp).float(),
                "These are the labels themselves. They are names: `greys` says how bright each is.",
            ),
            Mistake(
                "not deformed",
                lambda labels, disp, greys: greys[labels.long()],
                "The colours are right, but nothing has moved.",
            ),
        ),
    ),
    Exercise(
        asks="numbers",
        inputs=lambda: [(1,), (4,), (10,)],
        reference=lambda layers: (6 ** (-layers / 2), 1.0),
        tolerance=1e-5,
        mistakes=(
            Mistake(
                "mean square instead of its root",
                lambda layers: (6.0**-layers, 1.0),
                "The first is the mean square. Its root is asked, which is how large a value is.",
            ),
            Mistake(
                "without the ReLU",
                lambda layers: (3 ** (-layers / 2), 2 ** (layers / 2)),
                "The ReLU is missing. It halves the mean square in each layer.",
            ),
            Mistake(
                "variance of uniform numbers",
                lambda layers: (2 ** (-layers / 2), 1.0),
                "The second is right. Numbers drawn evenly from -b to b have a mean square smaller "
                "than b squared: work out that mean.",
            ),
            Mistake(
                "only one layer",
                lambda layers: (6**-0.5, 1.0),
                "This is one layer. What one layer leaves is what the next one gets.",
            ),
            Mistake(
                "layers added",
                lambda layers: (1 / (layers * 6**0.5), 1.0),
                "The loss of the layers was added up. Factors multiply: it is a power.",
            ),
        ),
    ),
    Exercise(
        asks="numbers",
        inputs=_some_dots,
        reference=_shift,
        mistakes=(
            Mistake(
                "forward instead of backward",
                lambda moving, fixed: -_shift(moving, fixed),
                "The signs are wrong: asked is where a pixel of the fixed image looks in the "
                "moving one. Which of the two transforms gets the conjugate?",
            ),
            Mistake(
                "not padded",
                lambda moving, fixed: _best(moving, fixed, wide=1),
                "For small shifts it is right. One by more than half of the image has wrapped "
                "round: add zeros before you transform.",
            ),
            Mistake(
                "far half not negative",
                lambda moving, fixed: _best(moving, fixed, signed=False),
                "Negative shifts stand at the far end of the scores: an index in the far half is a "
                "shift the other way.",
            ),
            Mistake(
                "axes exchanged",
                lambda moving, fixed: _shift(moving, fixed).flip(0),
                "The two numbers are exchanged: the first goes along array axis 0.",
            ),
            Mistake(
                "convolution instead of correlation",
                lambda moving, fixed: _best(moving, fixed, mirrored=True),
                "This is the best place of a convolution, which mirrors one of the images. For a "
                "correlation one of the transforms is conjugated.",
            ),
            Mistake(
                "normalised instead of voxels",
                lambda moving, fixed: _shift(moving, fixed) * 2 / torch.tensor([39, 47]),
                "These are the units of `grid_sample`, from -1 to 1. Whole pixels are asked.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=_some_answers,
        reference=metrics.endpoint_error,
        remark="What the two networks do on other pairs is for your table to say.",
        mistakes=(
            Mistake(
                "in the black as well",
                lambda disp, truth, head: _miss(disp, truth).mean(),
                "All voxels count here, also those outside of the head, where nobody can know.",
            ),
            Mistake(
                "divided by all voxels",
                lambda disp, truth, head: (_miss(disp, truth) * head).mean(),
                "The sum is over the head, but it is divided by the number of all voxels.",
            ),
            Mistake(
                "components instead of lengths",
                lambda disp, truth, head: (disp - truth).abs()[head.expand_as(disp)].mean(),
                "You have averaged the components. The distance is their length: squares, sum, "
                "root.",
            ),
            Mistake(
                "squared",
                lambda disp, truth, head: _miss(disp, truth)[head].square().mean(),
                "These are squared distances. A distance is asked, in voxels.",
            ),
            Mistake(
                "forward instead of backward",
                lambda disp, truth, head: _miss(-disp, truth)[head].mean(),
                "The two displacements were added: the difference is what is wrong with an answer.",
            ),
        ),
    ),
)
