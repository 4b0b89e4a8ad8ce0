"""Chapter 00: shapes, slopes, weights, how far a network sees, Adam, and bootstrap intervals."""

from __future__ import annotations

import torch
from torch import Tensor

from regkit.book.exercise import Exercise, Mistake

# 2, the slope of a mean


def _some_images() -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.rand(1, 1, 4, 6), torch.rand(1, 1, 4, 6)),
        (torch.rand(1, 1, 8, 12), torch.rand(1, 1, 8, 12)),
    ]


# 3, weights


def _formula(c_in: int, c_out: int, ndim: int, size: int = 3) -> int:
    return c_out * c_in * int(size**ndim) + c_out


def _unet(skips: bool = True, added: bool = True, last: int = 1) -> int:
    """How many numbers `SmallUNet` holds.

    Args:
        skips: whether the layers on the way up are given the features that were kept.
        added: count the numbers that are added, too.
        last: side of the last kernel.
    """
    widths = (8, 16, 32, 32)
    layers = [*zip((1, *widths), widths)]
    layers += [(a + b if skips else b, a) for a, b in zip(widths, widths[1:])]
    total = sum(_formula(a, b, 2) for a, b in layers) + _formula(8, 1, 2, last)
    return total if added else total - sum(b for _, b in layers) - 1


# 4, how far a stack of layers sees


def _sees(strides: tuple[int, ...], own: bool = False) -> int:
    """Voxels across; `own` counts the stride of a layer for its own kernel."""
    across, step = 1, 1
    for stride in strides:
        across += 2 * step * (stride if own else 1)
        step *= stride
    return across


# 6 and 7, drawing heads and trainings

DRAWS = 4000


def _some_errors() -> list[tuple[Tensor, Tensor]]:
    """Two methods on the same 20 heads, of which some are hard for both."""
    hard = 3 * torch.randn(20)
    return [(10 + hard + 0.5 * torch.randn(20), 9 + hard + 0.5 * torch.randn(20))]


def _some_trainings() -> list[tuple[Tensor]]:
    """The difference of two networks, (5 trainings, 24 heads), in percent."""
    training = torch.tensor([-30.0, -12.0, 6.0, 12.0, 24.0])
    head = torch.linspace(-90, 90, 24)
    return [(4 + training[:, None] + head + torch.randn(5, 24),)]


def _means(values: Tensor) -> Tensor:
    """DRAWS means of values that are drawn with replacement."""
    return values[torch.randint(len(values), (DRAWS, len(values)))].mean(dim=1)


def _both(table: Tensor, same: bool = True) -> Tensor:
    """Means over drawn trainings and drawn heads: the same heads for all trainings, or not."""
    trainings, heads = table.shape
    rows = torch.randint(trainings, (DRAWS, trainings, 1))
    columns = torch.randint(heads, (DRAWS, 1 if same else trainings, heads))
    return table[rows, columns].mean(dim=(1, 2))


def _spread(means: Tensor) -> Tensor:
    """The deviation of many means, and by how many deviations they differ from 0."""
    deviation = means.double().std()
    return torch.stack([deviation, means.double().mean() / deviation.clamp(min=1e-3)])


EXERCISES = (
    Exercise(
        asks="numbers",
        reference=lambda: (1, 1, 1, 0, 0, 0),
        remark="Compare the six shapes that you wrote down with those that Python prints.",
        mistakes=(
            Mistake(
                "equal shapes only",
                lambda: (0, 0, 0, 0, 0, 0),
                "None of the six has the shape of `x`, that is true. But a side of length 1 is "
                "repeated.",
            ),
            Mistake(
                "a missing side",
                lambda: (1, 0, 1, 0, 0, 0),
                "One is missing. Shapes are compared from the right, and a side that is not there "
                "counts as 1.",
            ),
            Mistake(
                "a channel that was not kept",
                lambda: (1, 1, 0, 0, 0, 0),
                "What does `keepdim=True` leave of the side over which the mean is taken?",
            ),
            Mistake(
                "as many numbers",
                lambda: (1, 1, 1, 1, 0, 0),
                "`x.flatten(2)` has as many numbers as `x`, but they stand in another shape.",
            ),
            Mistake(
                "half as long",
                lambda: (1, 1, 1, 0, 1, 0),
                "Only a side of length 1 is repeated. One that is half as long is not.",
            ),
            Mistake(
                "twice as long",
                lambda: (1, 1, 1, 0, 0, 1),
                "Six channels do not fit three: neither of the two numbers is 1.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=_some_images,
        reference=lambda a, b: 2 * (a - b) / a.numel(),
        tolerance=1e-5,
        remark="The question about the learning rate is for you to answer.",
        mistakes=(
            Mistake(
                "sign of the loss",
                lambda a, b: 2 * (b - a) / a.numel(),
                "This points downhill. The slope is asked: where a is too large, a larger a makes "
                "the loss larger.",
            ),
            Mistake(
                "sum instead of mean",
                lambda a, b: 2 * (a - b),
                "This is the slope of the sum. The loss is a mean over all voxels.",
            ),
            Mistake(
                "n - 1 instead of n",
                lambda a, b: 2 * (a - b) / (a.numel() - 1),
                "You have divided by N - 1. A mean divides by N.",
            ),
            Mistake(
                "without the two",
                lambda a, b: (a - b) / a.numel(),
                "A factor is missing: what is the derivative of a square?",
            ),
            Mistake(
                "one side only",
                lambda a, b: 2 * (a - b) / len(a[0, 0]),
                "You have divided by the length of one side. N is the number of all voxels: "
                "`a.numel()`.",
            ),
            Mistake(
                "the loss of each voxel",
                lambda a, b: (a - b).square() / a.numel(),
                "This is the share that each voxel has in the loss. Its derivative is asked.",
            ),
        ),
    ),
    Exercise(
        asks="numbers",
        reference=lambda: (_formula(16, 32, 2), _formula(16, 32, 3), _unet()),
        tolerance=1e-5,
        remark="The size of the file is for you to compare with the solution.",
        mistakes=(
            Mistake(
                "nothing added",
                lambda: (32 * 16 * 9, 32 * 16 * 27, _unet(added=False)),
                "These are the weights alone. One more number for each kernel is added to the "
                "result, and is learned as well.",
            ),
            Mistake(
                "a flat kernel in 3D",
                lambda: (_formula(16, 32, 2), _formula(16, 32, 2), _unet()),
                "In 3D a kernel of size 3 has 3 × 3 × 3 weights.",
            ),
            Mistake(
                "channels exchanged",
                lambda: (32 * 16 * 9 + 16, 32 * 16 * 27 + 16, _unet()),
                "There are as many added numbers as kernels, so as many as channels going *out*.",
            ),
            Mistake(
                "one channel going in",
                lambda: (_formula(1, 32, 2), _formula(1, 32, 3), _unet()),
                "A kernel has nine weights for *each* of the 16 channels that come in, in 3D 27.",
            ),
            Mistake(
                "kept features forgotten",
                lambda: (_formula(16, 32, 2), _formula(16, 32, 3), _unet(skips=False)),
                "The convolutions are right. On the way up a layer of the U-Net is given what was "
                "kept on the way down as well: see `torch.cat`.",
            ),
            Mistake(
                "last kernel too large",
                lambda: (_formula(16, 32, 2), _formula(16, 32, 3), _unet(last=3)),
                "The convolutions are right. Look at the last layer of the U-Net: its kernel has "
                "size 1.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=lambda: [((1, 1, 1),), ((2, 1, 1, 1),), ((2, 2, 2, 2),), ((1, 2, 1, 2),)],
        reference=_sees,
        mistakes=(
            Mistake(
                "strides ignored",
                lambda strides: 2 * len(strides) + 1,
                "This is right if all strides are 1. Behind a stride of 2, a step to the next "
                "number is two voxels wide.",
            ),
            Mistake(
                "own stride",
                lambda strides: _sees(strides, own=True),
                "A stride sets how far apart the answers of a layer lie. The layer's own kernel "
                "still sees neighbours; only the layers behind it see further.",
            ),
            Mistake(
                "added instead of multiplied",
                lambda strides: 1 + 2 * sum(strides),
                "The strides were added. Two strides of 2 in a row make steps of four voxels, and "
                "three make steps of eight.",
            ),
            Mistake(
                "kernels multiplied",
                lambda strides: 3 ** len(strides),
                "A layer adds its two neighbours to what the layers before it see. It does not "
                "multiply by 3.",
            ),
            Mistake(
                "from the wrong end",
                lambda strides: _sees(strides[::-1]),
                "The layers are in the opposite order: the first stride belongs to the layer that "
                "sees the image.",
            ),
            Mistake(
                "to one side",
                lambda strides: (_sees(strides) - 1) // 2,
                "This is how far it sees to one side. Count both sides, and the voxel itself.",
            ),
        ),
    ),
    Exercise(
        asks="numbers",
        reference=lambda: (1000, 1),
        mistakes=(
            Mistake(
                "Adam as well",
                lambda: (1000, 1000),
                "Descent is right. Adam divides the slope by something that grows as well.",
            ),
            Mistake(
                "neither",
                lambda: (1, 1),
                "Adam is right. A step of descent is the slope times the learning rate, and the "
                "slope has grown.",
            ),
            Mistake(
                "exchanged",
                lambda: (1, 1000),
                "The two are exchanged: first gradient descent, then Adam.",
            ),
            Mistake(
                "divided by the square",
                lambda: (1000, 0.001),
                "Adam divides by the *root* of the mean square.",
            ),
            Mistake(
                "root of the factor",
                lambda: (1000, 1000**0.5),
                "The mean square grows by a million, and its root by a thousand. By how much does "
                "the numerator grow?",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=_some_errors,
        reference=lambda one, other: _means(one - other),
        measure=_spread,
        tolerance=0.07,
        remark="How the width depends on the number of heads is for you to measure.",
        mistakes=(
            Mistake(
                "pairs forgotten",
                lambda one, other: _means(one) - _means(other),
                "These means are spread far too widely. Both methods saw the same heads, but here "
                "each gets heads of its own.",
            ),
            Mistake(
                "the opposite sign",
                lambda one, other: _means(other - one),
                "The sign is wrong: the errors of `one` less those of `other` are asked.",
            ),
            Mistake(
                "drawn without replacement",
                lambda one, other: torch.full((DRAWS,), (one - other).mean().item()),
                "All means are alike: you have drawn each head once. Draw with replacement, so "
                "that some come twice.",
            ),
            Mistake(
                "single heads",
                lambda one, other: (one - other)[torch.randint(len(one), (DRAWS,))],
                "These are single heads. For each of the 4000 numbers, draw as many heads as there "
                "are, and take their mean.",
            ),
            Mistake(
                "one method alone",
                lambda one, other: _means(one),
                "These are the errors of one method. Their difference is asked.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=_some_trainings,
        reference=_both,
        measure=_spread,
        tolerance=0.06,
        remark="What real trainings of the U-Net say is for you to measure.",
        mistakes=(
            Mistake(
                "heads alone",
                lambda table: _means(table.mean(dim=0)),
                "Only heads were drawn. So this says nothing of other trainings.",
            ),
            Mistake(
                "trainings alone",
                lambda table: _means(table.mean(dim=1)),
                "Only trainings were drawn. So this says nothing of other heads.",
            ),
            Mistake(
                "all numbers alike",
                lambda table: _means(table.flatten()),
                "You have drawn single numbers from the table, as if it held 120 heads. Draw whole "
                "rows and whole columns.",
            ),
            Mistake(
                "other heads for each training",
                lambda table: _both(table, same=False),
                "Each training has got other heads. Draw the heads once for each mean: all "
                "trainings are tested on the same ones.",
            ),
            Mistake(
                "the first training",
                lambda table: _means(table[0]),
                "This is the first training alone. The others say how much a training may differ.",
            ),
            Mistake(
                "the opposite sign",
                lambda table: -_both(table),
                "The sign is wrong: the table holds differences already, so nothing has to be "
                "subtracted.",
            ),
        ),
    ),
)
