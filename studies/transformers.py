"""A transformer beside a U-Net, with equal means: writes results/transformers.json.

    python studies/transformers.py

TransMorph and VoxelMorph learn from slices of the embedded population, with the same objective,
from the same pairs in the same order, three times each:

- with equal updates: `vxm` and TransMorph with 24 channels (size "small" has 48);
- with equal parameters: size "tiny", and a `vxm` whose layers have 36 channels where it has 32;
- with equal time: `vxm` with as many more updates as take the processor time of TransMorph's;
- from fewer heads, with equal updates: from 4 and from 16 instead of 100.

Each is tested on pairs of other heads (seed 2): Dice, folding, distance from the truth, how much of
the gap it closes at other amplitudes, and what it answers to a head that was shifted against
itself. `comparisons` holds the differences, with bootstrap intervals over pairs and trainings.

Each row is written when it is there, and a row that is there is not made again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, NamedTuple

import common
import numpy as np
import torch
import typer

from regkit import models
from regkit.data import population
from regkit.data.pairs import chain
from regkit.models import RegistrationModel
from regkit.papers import interval
from regkit.record import Row, Rows
from regkit.spatial import warp
from regkit.training import loop
from regkit.training.evaluation import evaluate, summary
from regkit.training.recipes import Recipe
from regkit.training.tasks import task_of

OUT = common.RESULTS / "transformers.json"
SHAPE = (80, 96)
SEEDS = (0, 1, 2)
SUBJECTS = 100
FEWER = (4, 16)
AMPLITUDES = (0.5, 1.0, 2.0, 3.0)
SHIFTS = range(0, 25, 3)  # voxels
KEPT = ("dice_before", "dice", "dice_ceiling", "gap_closed", "folding_percent", "endpoint_error")


class Network(NamedTuple):
    """A model and its options."""

    model: str
    options: Mapping[str, Any]


VXM = Network("vxm", {})
SMALL = Network("transmorph", {"size": "small", "channels": 24, "drop_path": 0.0})
TINY = Network("transmorph", {"size": "tiny", "drop_path": 0.0})
WIDER = Network(
    "vxm",
    {"encoder": (16, 36, 36, 36), "decoder": (36, 36, 36, 36), "last": (36, 16, 16)},
)
NETWORKS = {
    "vxm": VXM,
    "transmorph": SMALL,
    "transmorph, tiny": TINY,
    "vxm, 36 channels": WIDER,
    "vxm, equal time": VXM,
}
# what is compared: the field, the network, its rival
QUESTIONS = (
    ("equal updates", "transmorph", "vxm"),
    ("equal parameters", "transmorph, tiny", "vxm, 36 channels"),
    ("equal time", "transmorph", "vxm, equal time"),
)


def recipe_of(network: Network, steps: int, subjects: int, seed: int) -> Recipe:
    """As `dense_unet_eca_2d`, so with a term against folding, in batches of 4."""
    return common.recipe_of(
        "dense_unet_eca_2d",
        model=network.model,
        options=network.options,
        subjects=subjects,
        steps=steps,
        validate_every=steps,
        batch=4,
        seed=seed,
    )


@torch.no_grad()
def shifts_found(model: RegistrationModel) -> list[float]:
    """The mean answer along axis 0, inside the head, to a head shifted by each of SHIFTS."""
    found = []
    for k in SHIFTS:
        shift = torch.zeros(1, 2, *SHAPE)
        shift[:, 0] = k
        answers = []
        for head in population(2, SHAPE, seed=2):
            there = warp(head.labels[None], shift, mode="nearest")[0, 0] > 0
            disp = model(head.image[None], warp(head.image[None], shift)).disp
            answers.append(float(disp[0, 0][there].mean()))
        found.append(round(float(np.mean(answers)), 2))
    return found


def measured(recipe: Recipe, pairs: int) -> Row:
    """Train, and test on pairs of heads that were not learned from."""
    task = task_of(recipe, None, False)
    start = time.process_time()
    model = loop.train(recipe, progress=False, device="cpu", task=task).model
    seconds = time.process_time() - start
    rows = evaluate(model, chain(population(pairs + 1, SHAPE, seed=2)), ceiling=True)
    at = []
    for amplitude in AMPLITUDES:
        some = chain(population(7, SHAPE, 2, amplitude))
        at.append(round(summary(evaluate(model, some, ceiling=True))["gap_closed"], 1))
    numbers = summary(rows)
    return {
        "parameters": models.parameter_count(model),
        "cpu_seconds": seconds,
        **{key: numbers[key] for key in KEPT},
        "dice_pairs": [round(row["dice"], 4) for row in rows],
        "amplitudes": list(AMPLITUDES),
        "gap_at": at,
        "shifts": list(SHIFTS),
        "shift_found": shifts_found(model),
    }


def comparisons(rows: list[Row]) -> dict[str, list[Row]]:
    """Differences of Dice between networks that were trained equally often, and the means."""
    groups: dict[tuple[str, int], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["subjects"]), {})[row["seed"]] = row
    asked = [(*question, SUBJECTS) for question in QUESTIONS]
    asked += [(f"{n} heads", "transmorph", "vxm", n) for n in FEWER]
    lines = []
    for name, network, rival, subjects in asked:
        a, b = (groups.get((key, subjects), {}) for key in (network, rival))
        seeds = sorted(set(a) & set(b))
        if seeds:
            apart = np.array([np.subtract(a[s]["dice_pairs"], b[s]["dice_pairs"]) for s in seeds])
            lines.append(
                {
                    "equal": name,
                    "network": network,
                    "rival": rival,
                    "seeds": len(seeds),
                    "dice": round(float(np.mean([a[s]["dice"] for s in seeds])), 4),
                    "rival_dice": round(float(np.mean([b[s]["dice"] for s in seeds])), 4),
                    "difference": round(float(apart.mean()), 4),
                    "difference_interval": [round(end, 4) for end in interval(apart)],
                }
            )
    return {"means": [_mean(some) for some in groups.values()], "comparisons": lines}


def _mean(group: Mapping[int, Row]) -> Row:
    """The mean over the seeds of a network."""
    some = list(group.values())
    first = some[0]

    def mean(key: str, digits: int) -> float:
        return round(float(np.mean([row[key] for row in some])), digits)

    return {
        "network": first["network"],
        "subjects": first["subjects"],
        "seeds": len(some),
        "updates": first["updates"],
        "parameters": first["parameters"],
        "cpu_seconds": mean("cpu_seconds", 1),
        "dice": mean("dice", 4),
        "gap_closed": mean("gap_closed", 1),
        "folding_percent": mean("folding_percent", 4),
        "endpoint_error": mean("endpoint_error", 2),
        "gap_at": np.round(np.mean([row["gap_at"] for row in some], 0), 1).tolist(),
        "shift_found": np.round(np.mean([row["shift_found"] for row in some], 0), 2).tolist(),
    }


def longer(rows: list[Row], steps: int) -> int | None:
    """How many updates of `vxm` take the processor time of TransMorph; None: not known yet."""
    took = {
        row["network"]: row["cpu_seconds"]
        for row in rows
        if row["seed"] == SEEDS[0] and row["subjects"] == SUBJECTS
    }
    if not {"vxm", "transmorph"} <= set(took):
        return None
    return round(steps * took["transmorph"] / took["vxm"])


def main(
    steps: Annotated[int, typer.Option(help="Updates of each training.")] = 300,
    pairs: Annotated[int, typer.Option(help="Of the test.")] = 16,
    threads: common.Threads = 1,
    out: common.Out = OUT,
    fresh: common.Fresh = False,
) -> None:
    """What attention brings at equal updates, equal parameters and equal time."""
    common.use_threads(threads)
    key = ("network", "subjects", "seed")
    made = {"made": common.made(__file__)}
    rows = Rows(out, key, made, fresh=fresh, derive=comparisons)
    wanted = [(name, SUBJECTS, seed) for seed in SEEDS for name in NETWORKS]
    wanted += [(n, count, s) for s in SEEDS for count in FEWER for n in ("transmorph", "vxm")]
    for name, subjects, seed in wanted:
        network = NETWORKS[name]
        updates = longer(rows.rows, steps) if name == "vxm, equal time" else steps
        if updates is None:
            continue
        recipe = recipe_of(network, updates, subjects, seed)
        settings: Row = {
            "network": name,
            "subjects": subjects,
            "seed": seed,
            "model": network.model,
            "updates": updates,
            "batch": recipe.batch,
            "learning_rate": recipe.lr,
            "precision": recipe.precision,
            "pairs": pairs,
        }
        common.measure_once(
            rows,
            settings,
            f"{name}, {subjects} heads, seed {seed}",
            partial(measured, recipe, pairs),
            lambda r: (
                f"Dice {r['dice']:.3f}, gap {r['gap_closed']:.0f} %, "
                f"folded {r['folding_percent']:.4f} %, {r['cpu_seconds']:.0f} s"
            ),
        )


if __name__ == "__main__":
    common.start(main)
