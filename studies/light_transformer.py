"""Light transformers at the bottleneck of `unfolding`: writes results/light_transformer.json.

    python studies/light_transformer.py

Cost: the transformer alone (8 layers, 64 channels, 4 heads), forward, for the tokens that images of
two sizes leave at 1/16 of their size, where the network has it, and at 1/8 and 1/4, where it might
have it; and the whole network of three stages. Seconds are the faster of two calls, memory the most
that torch held at once beyond what was there before. Accuracy: the 2D network trained for 300
updates with each attention from the same seed, tested on pairs of new subjects (seed 2).

Each row is written when it is there, and a row that is there is not made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated

import common
import torch
import typer

from regkit import models
from regkit.attention import ATTENTION, Transformer
from regkit.data import population
from regkit.data.pairs import chain
from regkit.record import Row, Rows, made_now, peak_bytes, timed
from regkit.training import evaluation, loop

OUT = common.RESULTS / "light_transformer.json"
SHAPES = ((80, 96, 80), (160, 192, 160))
FRACTIONS = (16, 8, 4)
TOKENS = 10_000  # at most for full attention: with 76,800 it takes minutes a call


@torch.no_grad()
def bottleneck(attention: str, shape: tuple[int, ...], fraction: int) -> Row:
    """The transformer alone, on what an image of this shape leaves at 1/fraction."""
    size = [-(-n // fraction) for n in shape]
    x = torch.rand(1, 64, *size)
    module = Transformer(3, 64, heads=4, layers=8, mlp=96, attention=attention).eval()
    seconds = min(timed(lambda: module(x)) for _ in range(2))
    return {
        "tokens": x[0, 0].numel(),
        "seconds": round(seconds, 4),
        "megabytes": round(peak_bytes(lambda: module(x)) / 1e6, 1),
    }


@torch.no_grad()
def network(attention: str, shape: tuple[int, ...]) -> Row:
    """All three stages, one pair."""
    model = models.create("unfolding", 3, attention=attention).eval()
    pair = torch.rand(2, 1, 1, *shape)
    seconds = min(timed(lambda: model(*pair)) for _ in range(2))
    return {"seconds": round(seconds, 3), "parameters": models.parameter_count(model)}


def accuracy(attention: str, steps: int, pairs: int) -> Row:
    """The 2D network, trained with this attention."""
    recipe = common.unfolding_2d(steps, attention=attention)
    trained = loop.train(recipe, progress=False, device="cpu")
    test = chain(population(pairs + 1, recipe.shape, seed=2))
    numbers = evaluation.summary(evaluation.evaluate(trained.model, test, ceiling=True))
    keys = ("dice_before", "dice", "dice_ceiling", "gap_closed", "folding_percent")
    return {key: round(numbers[key], 4) for key in keys} | {"steps": steps, "pairs": pairs}


def main(
    steps: Annotated[int, typer.Option(help="Of each training.")] = 300,
    pairs: Annotated[int, typer.Option(help="Of the test.")] = 24,
    train_too: Annotated[bool, typer.Option(help="Measure the accuracy.")] = True,
    threads: common.Threads = 1,
    out: common.Out = OUT,
) -> None:
    """What linear and windowed attention cost, and what they reach."""
    common.use_threads(threads)
    wanted: list[tuple[Row, Callable[[], Row]]] = []
    for shape in SHAPES:
        for fraction in FRACTIONS:
            for kind in ATTENTION:
                if kind != "full" or math.prod(shape) / fraction**3 <= TOKENS:
                    name = {"part": "bottleneck", "attention": kind, "shape": list(shape)}
                    run = partial(bottleneck, kind, shape, fraction)
                    wanted.append((name | {"at": f"1/{fraction}"}, run))
    for kind in ATTENTION:
        name = {"part": "network", "attention": kind, "shape": list(SHAPES[0])}
        wanted.append((name, partial(network, kind, SHAPES[0])))
    if train_too:
        for kind in ATTENTION:
            name = {"part": "accuracy", "attention": kind}
            wanted.append((name, partial(accuracy, kind, steps, pairs)))
    made = common.made(__file__)
    rows = Rows(out, ("part", "attention", "shape", "at"), {"made": made})
    for name, run in wanted:
        if not rows.has(name):
            row = name | run() | {"load": made_now()["load"]}
            rows.add(row)
            typer.echo(row, err=True)


if __name__ == "__main__":
    common.start(main)
