"""Chapter 07: attention, its price, and what it knows of places."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from regkit import attention, metrics, spatial
from regkit.book.exercise import Exercise, Mistake
from regkit.data import population, true_displacement

# 1, softmax


def _naive(scores: Tensor) -> Tensor:
    return scores.exp() / scores.exp().sum()


# 2, linear attention


def _linear(q: Tensor, k: Tensor, v: Tensor, more: float = 1.0) -> Tensor:
    """Not divided by the sum of the weights."""
    return (F.elu(q) + more) @ ((F.elu(k) + more).mT @ v)


def _all_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[1])).softmax(dim=1) @ v


# 4, towards the truth

RIGHT, AGAINST, EXCHANGED, NOTHING, FAR = range(5)


@cache
def _pair() -> tuple[Tensor, Tensor]:
    """The true displacement of the pair, and where the head is."""
    one, other = population(2, (80, 96), seed=2, amplitude=2.0)
    return true_displacement(one, other), other.labels[None] > 0


def _towards(disp: Tensor) -> int:
    """Does a displacement come nearer to the truth? If not, would a change of it?"""
    truth, head = _pair()

    def error(found: Tensor) -> float:
        return metrics.endpoint_error(found.float(), truth, head).item()

    enough = 0.8 * error(0 * truth)
    if error(disp) < enough:
        return RIGHT
    if error(-disp) < enough:
        return AGAINST
    if error(disp.flip(1)) < enough:
        return EXCHANGED
    small = 0.25 * metrics.endpoint_error(0 * truth, truth, head).item()
    return NOTHING if metrics.endpoint_error(disp.float(), 0 * truth, head) < small else FAR


# 6, attention that answers with a displacement


def _some_weights() -> list[tuple[Tensor, Tensor, tuple[int, int]]]:
    places = spatial.identity_grid((4, 5)).flatten(1).T
    return [(torch.randn(20, 20).softmax(dim=1), places, (4, 5))]


def _field(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 2) -> (1, 2, *size)."""
    return tokens.T.reshape(1, 2, *size)


EXERCISES = (
    Exercise(
        asks="tensor",
        inputs=lambda: [(torch.tensor([0.0, 1.0, 2.0]),), (torch.tensor([100.0, 101.0, 102.0]),)],
        reference=lambda scores: scores.softmax(0),
        mistakes=(
            Mistake(
                "overflow",
                _naive,
                "For small scores it is right. For scores near 100 it gives NaN: exp(100) does not "
                "fit into float32.",
            ),
            Mistake(
                "not normalised",
                lambda scores: (scores - scores.max()).exp(),
                "These survive, but do not sum to 1.",
            ),
            Mistake(
                "logarithm",
                lambda scores: scores.log_softmax(0),
                "These are the logarithms of the weights.",
            ),
            Mistake(
                "powers of two",
                lambda scores: 2 ** (scores - scores.max()) / (2 ** (scores - scores.max())).sum(),
                "The base is 2. The softmax takes powers of e.",
            ),
            Mistake(
                "scores over their sum",
                lambda scores: scores / scores.sum(),
                "The scores are divided by their sum, without `exp`. It fails as soon as a score "
                "is negative.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=lambda: [tuple(torch.randn(3, 30, 4))],
        reference=attention.linear_attention,
        mistakes=(
            Mistake(
                "weights that do not sum to 1",
                _linear,
                "The weights of a row do not sum to 1: divide by their sum.",
            ),
            Mistake(
                "softmax",
                _all_pairs,
                "This is the usual attention, with the softmax. Here the weights are f(q) f(k).",
            ),
            Mistake(
                "without f",
                lambda q, k, v: q @ (k.mT @ v) / (q @ k.sum(dim=0))[:, None],
                "f is missing: without it weights can be negative, and their sum can be 0.",
            ),
            Mistake(
                "elu without the one",
                lambda q, k, v: _linear(q, k, v, 0.0) / (F.elu(q) @ F.elu(k).sum(dim=0))[:, None],
                "f is elu plus one. Without the one it can be negative.",
            ),
            Mistake(
                "divided by the number of tokens",
                lambda q, k, v: _linear(q, k, v) / len(k),
                "You have divided by the number of tokens. The weights of a row sum to something "
                "else.",
            ),
        ),
    ),
    Exercise(
        asks="numbers",
        reference=lambda: (0, 1, 0, 0),
        mistakes=(
            Mistake(
                "positions do not matter",
                lambda: (1, 1, 0, 0),
                "With its convolution a token knows its neighbours, so a shuffle is noticed: look "
                "at full attention with positions again.",
            ),
            Mistake(
                "windows do not matter",
                lambda: (0, 1, 0, 1),
                "Without positions a window still knows who is in it, and a shuffle changes that.",
            ),
            Mistake(
                "nothing",
                lambda: (0, 0, 0, 0),
                "One of the four does not notice. Have you set weight and bias of `position` to "
                "zero, and shuffled the answer as well?",
            ),
            Mistake(
                "distance for agreement",
                lambda: (1, 0, 1, 1),
                "The other way round: 1 is for a network whose shuffled answer is the answer to "
                "the shuffled image.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        reference=lambda: _pair()[0],
        measure=_towards,
        remark="The error is below 80 percent of that at the start. How low can you go?",
        mistakes=(
            Mistake(
                "forward instead of backward",
                lambda: -_pair()[0],
                "It points away from the truth, and with the other sign it would be near: the "
                "answer of attention less the own place is where to look.",
            ),
            Mistake(
                "axes exchanged",
                lambda: _pair()[0].flip(1),
                "The two components are exchanged. Component i goes along array axis i.",
            ),
            Mistake(
                "normalised or nothing",
                lambda: _pair()[0] / 48,
                "Hardly anything moves. Is it a displacement in voxels of the full grid, or one "
                "from -1 to 1?",
            ),
            Mistake(
                "places instead of displacements",
                lambda: _pair()[0] + spatial.identity_grid((80, 96)),
                "It is far off. Are these places? A displacement is the place found less the own "
                "place.",
            ),
        ),
    ),
    Exercise(
        asks="number",
        inputs=lambda: [((20, 24), (5, 6)), ((20, 24), (2, 2)), ((12, 12), (12, 12))],
        reference=lambda size, window: math.prod(size) * math.prod(window),
        remark="Now train: the scores say what it costs, and not what it brings.",
        mistakes=(
            Mistake(
                "all pairs",
                lambda size, window: math.prod(size) ** 2,
                "This is full attention: every token with every other. In a window a token meets "
                "only those of its window.",
            ),
            Mistake(
                "one window",
                lambda size, window: math.prod(window) ** 2,
                "These are the scores of one window. How many windows are there?",
            ),
            Mistake(
                "number of windows",
                lambda size, window: math.prod(size) // math.prod(window),
                "This is the number of windows. How many scores are there in each?",
            ),
            Mistake(
                "sides added",
                lambda size, window: math.prod(size) * sum(window),
                "The sides of the window were added. A window of 5 by 6 has 30 tokens.",
            ),
        ),
    ),
    Exercise(
        asks="tensor",
        inputs=_some_weights,
        reference=lambda weights, places, size: _field(weights @ places - places, size),
        remark="Whether the capture range grows is for you to find out.",
        mistakes=(
            Mistake(
                "missing identity",
                lambda weights, places, size: _field(weights @ places, size),
                "These are places. A displacement is the place less the own one.",
            ),
            Mistake(
                "forward instead of backward",
                lambda weights, places, size: _field(places - weights @ places, size),
                "The sign is wrong: a displacement leads from the own place to where one looks.",
            ),
            Mistake(
                "keys ask",
                lambda weights, places, size: _field(weights.T @ places - places, size),
                "The table is transposed. A row holds the weights of one query, and rows sum to 1.",
            ),
            Mistake(
                "axes mixed",
                lambda weights, places, size: (weights @ places - places).reshape(1, 2, *size),
                "The numbers are right and stand in the wrong places: bring the two components to "
                "the front before you reshape.",
            ),
            Mistake(
                "axes exchanged",
                lambda weights, places, size: _field((weights @ places - places).flip(1), size),
                "The two components are exchanged: component i goes along array axis i.",
            ),
        ),
    ),
)
