"""Which window the local correlation of `regkit.classical.fit` takes: results/affine_window.json.

    python studies/affine_window.py

Seven pairs of two heads of the embedded population (seed 1, which no table of the book tests on),
registered affinely with the plain correlation (window 0) and, from there, with the correlation in
windows of several sizes. A row holds the mean Dice over all labels of each pair.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import common
import torch
import typer

from regkit import classical, io, losses, metrics
from regkit.classical import linear
from regkit.data import population
from regkit.record import write_json
from regkit.spatial import warp

OUT = common.RESULTS / "affine_window.json"
SHAPE, SEED, LARGEST = (80, 96, 80), 1, 100_000
WINDOWS = (0, 3, 5, 7, 9)


def dice(window: int, moving: io.Image, fixed: io.Image, labels: list[torch.Tensor]) -> float:
    """Mean Dice after the affine registration with one window; 0 is the plain correlation."""
    if window:
        linear.ENERGIES["lncc"] = partial(losses.lncc, window=window)
    matrix = classical.align(
        moving, fixed, "affine", largest=LARGEST, similarity="lncc" if window else "ncc"
    )
    disp = fixed.grid.disp_to(moving.grid, matrix)
    moved = warp(labels[0][None].int(), disp, mode="nearest")
    return float(metrics.dice(moved, labels[1][None].int()).nanmean())


def main(
    pairs: Annotated[int, typer.Option(help="How many.")] = 7,
    threads: common.Threads = 1,
    out: common.Out = OUT,
) -> None:
    """Compare windows of the local correlation by the overlap they reach."""
    common.use_threads(threads)
    made = common.made(__file__)
    subjects = population(pairs + 1, SHAPE, SEED)
    rows = []
    for window in WINDOWS:
        scores = []
        for a, b in zip(subjects, subjects[1:]):
            images = (io.Image(x.image[None], x.affine) for x in (a, b))
            scores.append(round(dice(window, *images, [a.labels, b.labels]), 4))
        mean = round(sum(scores) / len(scores), 4)
        rows.append({"window": window, "dice": mean, "dice_of_each_pair": scores})
        typer.echo(f"window {window}: {mean:.4f}", err=True)
    table = {"made": made, "shape": SHAPE, "seed": SEED, "largest": LARGEST, "rows": rows}
    write_json(out, table)


if __name__ == "__main__":
    common.start(main)
