"""As many stages as a pair needs, and by which sign: writes results/adaptive_stages.json.

    python studies/adaptive.py

A deep unfolding network of shared weights, trained with three stages, is run for ten on pairs of
test subjects (seed 2) that lie half as far apart as usual, as usual, and twice as far. For each
stage: |u - v|, the sign that the paper's future work names, |v - v before|, the sign of an
optimiser, and the Dice; all are means over the pairs of one difficulty. And for tolerances of
either sign: how many stages a pair takes, the Dice there, and Spearman's rank correlation between
the stages used and the difficulty (1 - Dice before registration).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import common
import numpy as np
import torch
import typer
from scipy.stats import spearmanr

from regkit import metrics, models
from regkit.data import population
from regkit.models import RegistrationModel
from regkit.record import write_json
from regkit.spatial import warp
from regkit.training import loop

OUT = common.RESULTS / "adaptive_stages.json"
STAGES = 10
AMPLITUDES = (0.5, 1.0, 2.0)
TOLERANCES = {
    "split": (0.02, 0.05, 0.06, 0.08, 0.1, 0.2),
    "change": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8),
}


@torch.no_grad()
def curves(model: RegistrationModel, pairs: int) -> list[dict[str, Any]]:
    """Per pair: its amplitude, the Dice before, and per stage both signs, Dice and folding."""
    rows = []
    for amplitude in AMPLITUDES:
        subjects = population(pairs + 1, (80, 96), seed=2, amplitude=amplitude)
        for a, b in zip(subjects, subjects[1:]):
            labels = a.labels[None], b.labels[None]
            row = {"amplitude": amplitude, "before": float(metrics.dice(*labels).nanmean())}
            row |= {key: [] for key in ("split", "change", "dice", "folding_percent")}
            before = torch.zeros(1, 2, 80, 96)
            for u, v in model(a.image[None], b.image[None]).stages:
                moved = warp(labels[0], v, mode="nearest")
                row["split"].append(float(metrics.endpoint_error(v, u)))
                row["change"].append(float(metrics.endpoint_error(v, before)))
                row["dice"].append(float(metrics.dice(moved, labels[1]).nanmean()))
                row["folding_percent"].append(float(metrics.folding_percent(v)))
                before = v
            rows.append(row)
    return rows


def stopped(row: dict[str, Any], sign: str, tolerance: float) -> int:
    """How many stages the model takes with `settled=sign` and this tolerance."""
    return next((k for k, x in enumerate(row[sign], 1) if x <= tolerance), len(row[sign]))


def stages_used(rows: list[dict[str, Any]], sign: str, tolerance: float) -> dict[str, Any]:
    """Stages and Dice per amplitude, and how far the stages follow the difficulty."""
    used = [stopped(row, sign, tolerance) for row in rows]
    difficulty = [1 - row["before"] for row in rows]
    rank = spearmanr(used, difficulty)[0] if len(set(used)) > 1 else None  # none where all agree

    def mean(values: list[float]) -> dict[str, float]:
        groups = {a: [v for v, r in zip(values, rows) if r["amplitude"] == a] for a in AMPLITUDES}
        return {str(a): round(float(np.mean(v)), 4) for a, v in groups.items()}

    return {
        "sign": sign,
        "tolerance": tolerance,
        "stages": mean(used),
        "dice": mean([row["dice"][k - 1] for row, k in zip(rows, used)]),
        "rank_correlation": None if rank is None else round(float(rank), 3),
    }


def main(
    pairs: Annotated[int, typer.Option(help="At each amplitude.")] = 12,
    steps: Annotated[int, typer.Option(help="Of the training.")] = 300,
    weights: Annotated[Path | None, typer.Option(help="Of shared weights; else train.")] = None,
    threads: common.Threads = 1,
    out: common.Out = OUT,
) -> None:
    """How many stages pairs of known difficulty need, and whether the network can tell."""
    common.use_threads(threads)
    made = common.made(__file__)
    if weights is None:
        recipe = common.unfolding_2d(steps, shared=True)
        trained = loop.train(recipe).model
        model = models.create("unfolding", 2, shared=True, stages=STAGES).eval()
        model.load_state_dict(trained.state_dict())
        model.info = trained.info
    else:
        model = models.load(weights, stages=STAGES)
    rows = curves(model, pairs)
    groups = {a: [row for row in rows if row["amplitude"] == a] for a in AMPLITUDES}
    keys = ("before", "split", "change", "dice", "folding_percent")
    table = {
        "made": made,
        "training": model.info,
        "pairs": pairs,
        "curves": [
            {"amplitude": a}
            | {key: np.round(np.mean([row[key] for row in group], 0), 4).tolist() for key in keys}
            for a, group in groups.items()
        ],
        "rows": [stages_used(rows, sign, t) for sign, some in TOLERANCES.items() for t in some],
    }
    write_json(out, table)


if __name__ == "__main__":
    common.start(main)
