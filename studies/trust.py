"""What the trust map is worth: writes results/trust.json.

    python studies/trust.py

On the embedded population the true error of every voxel is known. Each method registers pairs of
neighbouring subjects; the second run goes back, see `regkit.trust.second_run`. The weights of
`regkit.trust.WEIGHTS` are the least-squares fit of the cues to log(error + 0.2 mm) within each run
of the subjects of seed 11, so that the order within one image is what is learned; the constant is
that of all runs. Tested are subjects of seed 12, of whom the fit has seen none.

A row holds, per method and grid, the rank correlation (Spearman) of 1 - trust with the true error
over the voxels of the brain, mean and lowest over the pairs, "with" a second run and "without", and
for each cue alone. Also the mean error in mm of the tenth of the voxels that is trusted least, and
of the tenth that is trusted most. "seconds" (of the answer and of the second run) are means of one
run each. "second_runs" compares the one that is taken with others, by the consistency cue alone.
"fitted" holds what the weights would be, from this run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import common
import numpy as np
import torch
import typer
from scipy import stats
from torch import Tensor

from regkit import classical, models
from regkit.data.population import population, true_displacement
from regkit.record import Row, Rows, rounded
from regkit.spatial import affine_to_disp, warp
from regkit.trust import WEIGHTS, cues, second_run, trust_map

OUT = common.RESULTS / "trust.json"
SHAPES = ((80, 96), (160, 192), (48, 56, 48))
FIT, TEST = 11, 12  # seeds
DRAWN = 4000  # voxels of a run that the fit looks at
Method = Callable[[Tensor, Tensor], Tensor]


def methods(d: int, spacing: tuple[float, ...]) -> dict[str, Method]:
    """name -> a function of moving and fixed that answers a displacement."""
    network = models.load(f"vxm_diff_brain_{d}d")

    def affine(moving: Tensor, fixed: Tensor) -> Tensor:
        theta = classical.fit(moving, fixed, "affine", "ncc", search=False)
        return affine_to_disp(theta, fixed.shape[2:])

    def one_pass(moving: Tensor, fixed: Tensor) -> Tensor:
        with torch.no_grad():
            return network(moving, fixed).disp

    def both(moving: Tensor, fixed: Tensor) -> Tensor:
        return classical.greedy(moving, fixed, one_pass(moving, fixed), spacing=spacing).disp

    return {
        "affine": affine,
        "vxm_diff": one_pass,
        "greedy": lambda m, f: classical.greedy(m, f, spacing=spacing).disp,
        "vxm_diff, greedy": both,
    }


def second_runs(spacing: tuple[float, ...]) -> dict[str, Method]:
    """name -> a function of moving and fixed that answers the displacement from fixed to moving."""
    runs: dict[str, Method] = {"taken": partial(second_run, spacing=spacing)}
    for effort, similarity in (("fast", "lncc"), ("default", "lncc"), ("default", "mind")):
        settings = {"effort": effort, "similarity": similarity, "spacing": spacing}
        runs[f"{effort}, {similarity}"] = partial(_back, **settings)
    return runs


def _back(moving: Tensor, fixed: Tensor, **settings: object) -> Tensor:
    return classical.greedy(fixed, moving, **settings).disp


class Runs:
    """Registrations of one population; none is computed twice."""

    def __init__(self, shape: tuple[int, ...], seed: int, pairs: int) -> None:
        subjects = population(pairs + 1, shape, seed=seed)
        self.pairs = list(zip(subjects, subjects[1:]))
        self.spacing = tuple(float(s) for s in subjects[0].grid.spacing)
        self.methods = methods(len(shape), self.spacing)
        self.seconds = second_runs(self.spacing)
        self._kept: dict[tuple[str, int], tuple[Tensor, float]] = {}

    def disp(self, name: str, pair: int) -> tuple[Tensor, float]:
        """Of a method or a second run, and the seconds that it took."""
        if (name, pair) not in self._kept:
            start = time.perf_counter()
            run = (self.methods | self.seconds)[name]
            disp = run(*(s.image[None] for s in self.pairs[pair]))
            self._kept[name, pair] = disp, time.perf_counter() - start
        return self._kept[name, pair]

    def run(self, method: str, second: str | None, pair: int) -> tuple[tuple, np.ndarray, Tensor]:
        """Arguments of `trust_map`, the true error in mm and the brain (bool), both of shape S."""
        moving, fixed = self.pairs[pair]
        disp = self.disp(method, pair)[0]
        inverse = self.disp(second, pair)[0] if second else None
        arguments = (warp(moving.image[None], disp), fixed.image[None], disp, inverse, self.spacing)
        mm = (disp - true_displacement(moving, fixed))[0].movedim(0, -1) * torch.tensor(
            self.spacing, dtype=torch.float32
        )
        return arguments, mm.norm(dim=-1).numpy(), (fixed.labels[0] > 0).numpy()


def fitted(all_runs: list[Runs], second: bool) -> Row:
    """The weights: slopes within the runs, the constant of all of them."""
    random = np.random.default_rng(0)
    xs, ys = [], []
    for runs in all_runs:
        for method in runs.methods:
            for pair in range(len(runs.pairs)):
                arguments, error, brain = runs.run(method, "taken" if second else None, pair)
                found = cues(*arguments)
                chosen = random.choice(int(brain.sum()), min(DRAWN, int(brain.sum())), False)
                values = [cue[0, 0].numpy()[brain][chosen] for cue in found.values()]
                xs.append(np.stack(values, 1))
                ys.append(np.log(error[brain][chosen] + 0.2))
    x, y = (np.concatenate([v - v.mean(0) for v in values]) for values in (xs, ys))
    slopes = np.linalg.lstsq(x, y, rcond=None)[0]
    constant = float(np.mean([b.mean() - a.mean(0) @ slopes for a, b in zip(xs, ys)]))
    return {"constant": constant, **dict(zip(found, slopes.tolist()))}


def rank(unsure: Tensor, error: np.ndarray, brain: np.ndarray) -> float:
    """Spearman's rank correlation over the brain."""
    return float(stats.spearmanr(unsure[0, 0].numpy()[brain], error[brain]).statistic)


def measured(runs: Runs, method: str) -> Row:
    """One method: rank correlations with the true error, errors of the ends, seconds."""
    row: Row = {}
    pairs = range(len(runs.pairs))
    for name, second in (("with", "taken"), ("without", None)):
        ranks, ends = [], []
        for pair in pairs:
            arguments, error, brain = runs.run(method, second, pair)
            trust = trust_map(*arguments)
            ranks.append(rank(1 - trust, error, brain))
            inside = trust[0, 0].numpy()[brain]
            low, high = np.quantile(inside, [0.1, 0.9])
            ends.append([error[brain][x].mean() for x in (inside <= low, inside >= high)])
        least, most = np.mean(ends, axis=0).tolist()
        row[name] = {
            "rank": float(np.mean(ranks)),
            "lowest_rank": min(ranks),
            "error_least_trusted": least,
            "error_most_trusted": most,
        }
    all_runs = [runs.run(method, "taken", pair) for pair in pairs]
    found = [cues(*arguments) for arguments, _, _ in all_runs]
    row["cues"] = {
        cue: float(np.mean([rank(f[cue], *run[1:]) for f, run in zip(found, all_runs)]))
        for cue in found[0]
    }
    row["error"] = float(np.mean([error[brain].mean() for _, error, brain in all_runs]))
    row["seconds"] = {
        name: float(np.mean([runs.disp(run, pair)[1] for pair in pairs]))
        for name, run in (("answer", method), ("second", "taken"))
    }
    return row


def compared(runs: Runs) -> list[Row]:
    """Other second runs: the rank correlation of the consistency cue alone, and their seconds."""
    rows = []
    for second in runs.seconds:
        row: Row = {"second": second}
        for method in runs.methods:
            ranks = []
            for pair in range(len(runs.pairs)):
                arguments, error, brain = runs.run(method, second, pair)
                ranks.append(rank(cues(*arguments)["consistency"], error, brain))
            row[method] = round(float(np.mean(ranks)), 3)
        clock = [runs.disp(second, pair)[1] for pair in range(len(runs.pairs))]
        rows.append({**row, "seconds": round(float(np.mean(clock)), 2)})
    return rows


def main(
    pairs: Annotated[int, typer.Option(help="Pairs of each population.")] = 4,
    out: common.Out = OUT,
    fresh: common.Fresh = False,
) -> None:
    """Fit the weights of the trust map on some subjects, and test the map on others."""
    common.use_threads(1)
    fields = {"made": common.made(__file__, seed=TEST)}
    rows = Rows(out, ("shape", "method"), fields, fresh=fresh)
    if fresh or not rows.table.get("fitted"):
        all_runs = [Runs(shape, FIT, pairs) for shape in SHAPES]
        weights = {n: fitted(all_runs, s) for n, s in (("with", True), ("without", False))}
        rows.put(fitted=rounded(weights))
        typer.echo(str(rows.table["fitted"]), err=True)
    weights = {"with": WEIGHTS[True], "without": WEIGHTS[False]}
    rows.put(weights=weights)
    for shape in SHAPES:
        runs = Runs(shape, TEST, pairs)
        for method in runs.methods:
            settings = {"shape": list(shape), "method": method, "pairs": pairs, "weights": weights}
            title = f"{shape} {method}"
            common.measure_once(rows, settings, title, partial(measured, runs, method), _in_short)
    if fresh or not rows.table.get("second_runs"):
        found = [
            {"shape": list(shape), **row}
            for shape in SHAPES
            for row in compared(Runs(shape, FIT, pairs))
        ]
        rows.put(second_runs=found)


def _in_short(row: Row) -> str:
    return f"rank {row['with']['rank']:.2f} with, {row['without']['rank']:.2f} without"


if __name__ == "__main__":
    common.start(main)
