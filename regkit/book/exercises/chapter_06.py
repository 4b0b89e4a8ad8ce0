"""Chapter 06: how far a pyramid reaches, how grids are laid, and comparisons with neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regkit.blocks import local_correlation, neighbours
from regkit.book.exercise import Exercise, Mistake

# 2, two ways to lay a grid


def _apart(size: int, corners: bool = True, mean: bool = False) -> float:
    """How far an image that says where it is lies from its place after four halvings."""
    small = torch.arange(size, dtype=torch.float32)[None, None, ::16]
    back = F.interpolate(small, size=size, mode="linear", align_corners=corners)[0, 0]
    off = (back - torch.arange(size)).abs()
    return (off.mean() if mean else off.max()).item()


# 3, a correlation volume


def _some_features() -> list[tuple[Tensor, Tensor, int]]:
    return [
        (torch.randn(2, 5, 7, 9), torch.randn(2, 5, 7, 9), 1),
        (torch.randn(1, 3, 8, 6), torch.randn(1, 3, 8, 6), 2),
    ]


def _transposed(fixed: Tensor, moving: Tensor, radius: int) -> Tensor:
    side = 2 * radius + 1
    volume = local_correlation(fixed, moving, radius)
    result: Tensor = volume.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
    return result


# 4, the step of a place


def _step(volume: Tensor) -> Tensor:
    shifts = torch.tensor(neighbours(2), dtype=torch.float32)
    step: Tensor = shifts[volume.argmax(dim=1)].permute(0, 3, 1, 2)
    return step


# 5, queries without a say


def _silent(weight: Tensor, part: int) -> Tensor:
    """Without the queries (0), the keys (1) or the values (2)."""
    parts = list(weight.clone().chunk(3))
    parts[part] = torch.zeros_like(parts[part])
    return torch.cat(parts)


def _first_inputs(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[:, : weight.shape[1] // 3] = 0
    return weight


EXERCISES = (
    Exercise(
        asks="number",
        inputs=lambda: [(1, 1), (5, 1), (3, 2), (4, 3)],
        reference=lambda n, r: r * (2**n - 1),
        mistakes=(
            Mistake(
                "added instead of composed",
                lambda n, r: n * r,
                "You have added the steps of all levels as if they had the same voxels. A coarse "
                "step counts more voxels of the full grid.",
            ),
            Mistake(
                "only the coarsest level",
                lambda n, r: r * 2 ** (n - 1),
                "This is what the coarsest level reaches. The finer ones add their own steps.",
            ),
            Mistake(
                "one voxel too far",
                lambda n, r: r * 2**n,
                "Nearly: sum r, 2r, 4r, ... once more. With one level it is r.",
            ),
            Mistake(
                "diameter instead of radius",
                lambda n, r: 2 * r * (2**n - 1) + 1,
                "This is the width of everything in reach, to both sides. How far one gets is "
                "asked.",
            ),
            Mistake(
                "one level too many",
                lambda n, r: r * (2 ** (n + 1) - 1),
                "The finest level has the full size, so the coarsest of n was halved n - 1 times.",
            ),
        ),
    ),
    Exercise(
        asks="numbers",
        reference=lambda: (_apart(80), _apart(81)),
        mistakes=(
            Mistake(
                "exchanged",
                lambda: (_apart(81), _apart(80)),
                "The two are exchanged: first 80 voxels, then 81.",
            ),
            Mistake(
                "align_corners=False",
                lambda: (_apart(80, corners=False), _apart(81, corners=False)),
                "This is with `align_corners=False`. It misses as well, but elsewhere.",
            ),
            Mistake(
                "mean instead of largest",
                lambda: (_apart(80, mean=True), _apart(81, mean=True)),
                "This is the mean distance. The largest one is asked.",
            ),
            Mistake(
                "normalised coordinates",
                lambda: (2 * _apart(80) / 79, 2 * _apart(81) / 80),
                "This is on a grid from -1 to 1. How many voxels is it?",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=_some_features,
        reference=local_correlation,
        mistakes=(
            Mistake(
                "sum instead of mean",
                lambda fixed, moving, radius: (
                    local_correlation(fixed, moving, radius) * fixed.shape[1]
                ),
                "You have summed over the channels. With a mean the value does not grow with their "
                "number.",
            ),
            Mistake(
                "axes exchanged",
                _transposed,
                "The neighbours stand in another order: the shift along array axis 1 runs first.",
            ),
            Mistake(
                "images exchanged",
                lambda fixed, moving, radius: local_correlation(moving, fixed, radius),
                "Fixed and moving are exchanged: a place of the fixed image looks around in the "
                "moving one.",
            ),
            Mistake(
                "looked in the opposite direction",
                lambda fixed, moving, radius: local_correlation(fixed, moving, radius).flip(1),
                "The shifts have the opposite sign: channel 0 is for the neighbour at (-r, -r).",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=lambda: [(torch.rand(2, 9, 5, 6),)],
        reference=_step,
        remark="With this step you can build the matcher; how far it gets is for you to measure.",
        mistakes=(
            Mistake(
                "the least alike",
                lambda volume: _step(-volume),
                "You step to the neighbour that is least alike. A product is a similarity: the "
                "largest is best.",
            ),
            Mistake(
                "counted from the corner",
                lambda volume: _step(volume) + 1,
                "Shifts run from -1 to 1, and yours from 0 to 2: the fifth neighbour is the place "
                "itself.",
            ),
            Mistake(
                "axes exchanged",
                lambda volume: _step(volume).flip(1),
                "The two components are exchanged: neighbours come in array order, so the shift "
                "along axis 1 runs first.",
            ),
            Mistake(
                "forward instead of backward",
                lambda volume: -_step(volume),
                "The sign is wrong: a displacement says where to look in the moving image, and "
                "that is where the best neighbour lies.",
            ),
            Mistake(
                "voxels against a normalised grid",
                lambda volume: _step(volume) * torch.tensor([2 / 5, 2 / 6]).reshape(1, 2, 1, 1),
                "The steps are right on a grid from -1 to 1. A displacement is in voxels.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=lambda: [(torch.randn(12, 4, 1, 1),)],
        reference=lambda weight: _silent(weight, 0),
        remark="Now measure the Dice before and after.",
        mistakes=(
            Mistake(
                "keys",
                lambda weight: _silent(weight, 1),
                "These are the keys. It would make the weights alike too, but the exercise asks "
                "for the queries, which come first.",
            ),
            Mistake(
                "values",
                lambda weight: _silent(weight, 2),
                "These are the values: with them gone the attention answers nothing at all, and "
                "its weights stay as they were.",
            ),
            Mistake(
                "everything",
                torch.zeros_like,
                "You have silenced queries, keys and values. Only the first third of the outputs "
                "makes queries.",
            ),
            Mistake(
                "inputs instead of outputs",
                _first_inputs,
                "You have cut off inputs. The weight of a convolution has its outputs along "
                "axis 0.",
            ),
        ),
    ),
)
