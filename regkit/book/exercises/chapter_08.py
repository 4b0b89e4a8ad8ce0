"""Chapter 08: limits of a blur, a last ReLU, units of a weight, denoisers, and when to stop."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from regkit.book.exercise import Exercise, Mistake
from regkit.book.exercises.overlap import mean_dice
from regkit.data import chain, population, true_displacement

# 1, the formula


def _rough_field() -> list[tuple[Tensor]]:
    return [(torch.randn(1, 2, 5, 6) + torch.tensor([1.0, -2.0]).reshape(1, 2, 1, 1),)]


def _limits(u: Tensor) -> Tensor:
    return torch.stack([u.mean(dim=(2, 3), keepdim=True).expand_as(u), u])


# 2, a last ReLU

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda u: 0 * u,
    "truth": lambda u: u,
    "backwards": lambda u: -u,
    "ReLU": torch.relu,
    "ReLU, backwards": lambda u: torch.relu(-u),
    "positive ones cut": lambda u: u.clamp(max=0),
    "signs dropped": torch.abs,
}


@cache
def _mean_dice(change: str, mode: str = "nearest") -> float:
    """Over four pairs of slices, whose true displacement is changed."""
    pairs = chain(population(4, (80, 96), seed=2))
    return mean_dice(pairs, lambda one, other: CHANGES[change](true_displacement(one, other)), mode)


def _three(last: str, mode: str = "nearest", truth: str = "truth") -> tuple[float, float, float]:
    return _mean_dice("nothing"), _mean_dice(truth, mode), _mean_dice(last, mode)


# 4, noise through a denoiser


def _some_denoisers() -> list[tuple[Callable[[Tensor], Tensor], Tensor, Tensor]]:
    u, noise = torch.randn(1, 2, 12, 14), 0.3 * torch.randn(1, 2, 12, 14)
    return [(torch.tanh, u, noise), (lambda x: F.avg_pool2d(x, 3, 1, 1), u, noise)]


def _power(x: Tensor) -> Tensor:
    return x.square().sum()


def _left(denoiser: Callable[[Tensor], Tensor], u: Tensor, noise: Tensor) -> Tensor:
    return _power(denoiser(u + noise) - denoiser(u)) / _power(noise)


# 5, every stage


def _some_terms() -> list[tuple[Tensor, ...]]:
    """Of three stages: likeness of u and of v, roughness of u, squared distance of u and v."""
    return [(torch.tensor([0.6, 0.4, 0.3]), torch.tensor([0.5, 0.38, 0.29]),
             torch.tensor([0.01, 0.03, 0.05]), torch.tensor([0.9, 0.4, 0.1]))]  # fmt: skip


def _objective(like_u: Tensor, like_v: Tensor, rough_u: Tensor, apart: Tensor) -> Tensor:
    """Of numbers, one a term."""
    return 0.8 * like_u + 0.2 * like_v + 1.0 * rough_u + 0.1 * apart


# 7, when to stop


def _some_losses() -> list[tuple[tuple[float, ...], float]]:
    return [
        ((0.60, 0.40, 0.30, 0.295, 0.20), 0.01),
        ((0.50, 0.45, 0.47, 0.30), 0.01),
        ((0.40, 0.30, 0.20, 0.10), 0.01),
        ((0.50, 0.60, 0.55, 0.30), 0.02),
    ]


def _used(losses: tuple[float, ...], least: float, wasted: int = 0) -> int:
    """Stages until one gains less than `least`; `wasted` of them after that count as well."""
    for k in range(len(losses) - 1):
        if losses[k] - losses[k + 1] < least:
            return k + wasted
    return len(losses) - 1


EXERCISES = (
    Exercise(
        asks="tensor",
        inputs=_rough_field,
        reference=_limits,
        mistakes=(
            Mistake(
                "limits exchanged",
                lambda u: _limits(u).flip(0),
                "The two are exchanged. A small price on the difference lets v go far from u.",
            ),
            Mistake(
                "zero instead of the mean",
                lambda u: torch.stack([0 * u, u]),
                "The second is right. For the first, zero is smooth; but is it the smooth field "
                "that is nearest to u?",
            ),
            Mistake(
                "one mean for both components",
                lambda u: torch.stack([u.mean().expand_as(u), u]),
                "This is one mean over both components. Each component has a mean of its own, for "
                "the two axes of a shift are independent.",
            ),
            Mistake(
                "mean along one axis",
                lambda u: torch.stack([u.mean(dim=2, keepdim=True).expand_as(u), u]),
                "The mean was taken along axis 0 only, so v is still rough along the other axis.",
            ),
            Mistake(
                "nothing removed",
                lambda u: torch.stack([u, u]),
                "v is u in both. With a small price on the difference, roughness is all that "
                "counts.",
            ),
        ),
    ),
    Exercise(
        asks="numbers",
        reference=lambda: _three("ReLU"),
        tolerance=5e-4,
        mistakes=(
            Mistake(
                "labels interpolated",
                lambda: _three("ReLU", mode="linear"),
                "The labels were interpolated: between two of them lies the name of a third. Warp "
                'label maps with `mode="nearest"`.',
            ),
            Mistake(
                "forward instead of backward",
                lambda: _three("ReLU, backwards", truth="backwards"),
                "The displacement has the wrong sign: the truth should bring Dice up, and here it "
                "does not.",
            ),
            Mistake(
                "positive components cut",
                lambda: _three("positive ones cut"),
                "Here the positive components are gone. A ReLU sets the negative ones to zero.",
            ),
            Mistake(
                "signs dropped",
                lambda: _three("signs dropped"),
                "The negative components have become positive. A ReLU makes them zero.",
            ),
            Mistake(
                "order",
                lambda: _three("ReLU")[::-1],
                "The three are right, in the opposite order: nothing, truth, truth with a ReLU.",
            ),
        ),
    ),
    Exercise(
        asks="numbers",
        inputs=lambda: [(2.2, 80), (1.5, 33)],
        reference=lambda spacing, n: (spacing**2, (2 / (n - 1)) ** 2),
        tolerance=1e-6,
        mistakes=(
            Mistake(
                "not squared",
                lambda spacing, n: (spacing, 2 / (n - 1)),
                "These are the factors of the displacement. The roughness is a mean of squares.",
            ),
            Mistake(
                "upside down",
                lambda spacing, n: (spacing**-2, ((n - 1) / 2) ** 2),
                "Both are upside down. A voxel of 2.2 mm is the number 1 here and the number 2.2 "
                "there: where is the same roughness the larger number?",
            ),
            Mistake(
                "n against n - 1",
                lambda spacing, n: (spacing**2, (2 / n) ** 2),
                "The first is right. The units of `grid_sample` lead from the centre of the first "
                "voxel to that of the last one: how many steps are there between n voxels?",
            ),
            Mistake(
                "an image of width 1",
                lambda spacing, n: (spacing**2, (1 / (n - 1)) ** 2),
                "The first is right. From -1 to 1 the image has the width 2.",
            ),
            Mistake(
                "steps in millimetres as well",
                lambda spacing, n: (1.0, (2 / (n - 1)) ** 2),
                "The first one holds where the slope is taken per millimetre as well. Here it is "
                "the difference from voxel to voxel.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=_some_denoisers,
        reference=_left,
        remark="What the module does in 3D is for you to print: it is not checked.",
        mistakes=(
            Mistake(
                "compared with what went in",
                lambda denoiser, u, noise: _power(denoiser(u + noise) - u) / _power(noise),
                "You compare with u. But a denoiser changes u as well: compare with what it makes "
                "of u without the noise.",
            ),
            Mistake(
                "length instead of power",
                lambda denoiser, u, noise: _left(denoiser, u, noise).sqrt(),
                "This is a ratio of lengths. Power is the sum of squares, without the root.",
            ),
            Mistake(
                "removed instead of left",
                lambda denoiser, u, noise: 1 - _left(denoiser, u, noise),
                "This is the part that is missing behind the denoiser. The part that is left is "
                "asked.",
            ),
            Mistake(
                "noise alone",
                lambda denoiser, u, noise: _power(denoiser(noise)) / _power(noise),
                "The noise went through alone. A network is not linear: what it does to noise "
                "depends on the u in which it is hidden.",
            ),
            Mistake(
                "divided by the power of u",
                lambda denoiser, u, noise: _power(denoiser(u + noise) - denoiser(u)) / _power(u),
                "The upper part is right. Below stands the power of the noise that was hidden, and "
                "not that of u.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=_some_terms,
        reference=lambda like_u, like_v, rough_u, apart: _objective(
            like_u.mean(), like_v[-1], rough_u.mean(), apart.mean()
        ),
        tolerance=1e-4,
        remark="What the training with it brings is for you to compare.",
        mistakes=(
            Mistake(
                "last stage only",
                lambda *terms: _objective(*(x[-1] for x in terms)),
                "This is the objective of the chapter: it looks at the last stage only.",
            ),
            Mistake(
                "v of every stage as well",
                lambda *terms: _objective(*(x.mean() for x in terms)),
                "The likeness of v is asked of all stages here. It was to stay as it is, with the "
                "last stage alone.",
            ),
            Mistake(
                "sum instead of mean",
                lambda like_u, like_v, rough_u, apart: _objective(
                    like_u.sum(), like_v[-1], rough_u.sum(), apart.sum()
                ),
                "The stages were added up. With a mean the weights keep their meaning, however "
                "many stages there are.",
            ),
            Mistake(
                "u and v exchanged",
                lambda like_u, like_v, rough_u, apart: _objective(
                    like_v[-1], like_u.mean(), rough_u.mean(), apart.mean()
                ),
                "The weights 0.8 and 0.2 are exchanged: the larger one belongs to u.",
            ),
            Mistake(
                "sign of the loss",
                lambda like_u, like_v, rough_u, apart: _objective(
                    -like_u.mean(), -like_v[-1], rough_u.mean(), apart.mean()
                ),
                "The likeness has the wrong sign: these are losses, less is better, so they are "
                "added.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=lambda: [(0.5, 1.0, 0.1), (2.0, 0.3, 0.1), (4.0, 0.5, 0.2)],
        reference=lambda w, rough, price: 1 / (1 + w * rough / price),
        tolerance=1e-4,
        remark="So v is asked to smooth. Whether the trained module does it only training can say.",
        mistakes=(
            Mistake(
                "upside down",
                lambda w, rough, price: 1 / (1 + w * price / rough),
                "The ratio of the two weights is upside down. A higher price on the difference "
                "keeps v nearer to u.",
            ),
            Mistake(
                "removed instead of kept",
                lambda w, rough, price: 1 - 1 / (1 + w * rough / price),
                "This is what v leaves away of the wave. What it keeps is asked.",
            ),
            Mistake(
                "one weight forgotten",
                lambda w, rough, price: 1 / (1 + w / price),
                "The weight of the roughness is missing. In the formula of the chapter it was "
                "divided out: what is its beta here?",
            ),
            Mistake(
                "weights multiplied",
                lambda w, rough, price: 1 / (1 + w * rough * price),
                "The two weights were multiplied. Only their ratio matters: twice both is the same "
                "question.",
            ),
            Mistake(
                "roughness billed to u",
                lambda w, rough, price: 1.0,
                "So it is where the roughness is billed to u: then nothing asks v to change "
                "anything. Here it is billed to v.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=_some_losses,
        reference=_used,
        remark="A sign that a network could learn is still to be found.",
        mistakes=(
            Mistake(
                "the stage that brought nothing",
                lambda losses, least: _used(losses, least, wasted=1),
                "The stage that gained too little counts here. It had to be computed, but the "
                "answer is that of the stage before it.",
            ),
            Mistake(
                "n against n - 1",
                lambda losses, least: _used(losses, least) + 1,
                "One too many: the first number was measured before any stage.",
            ),
            Mistake(
                "sign of the loss",
                lambda losses, least: _used(tuple(-x for x in losses), least),
                "You go on as long as the loss *rises*. It is one minus a correlation: less is "
                "better.",
            ),
            Mistake(
                "best of all",
                lambda losses, least: losses.index(min(losses)),
                "This looks at all stages and takes the best. A rule to stop does not know the "
                "stages that it saves.",
            ),
            Mistake(
                "any gain is enough",
                lambda losses, least: _used(losses, 0.0),
                "Here any gain is enough to go on. It has to be at least `least`.",
            ),
        ),
    ),
)
