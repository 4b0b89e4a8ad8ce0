"""A table beside what its paper prints: differences, intervals, orders, and the table as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from regkit.papers.tables import TABLES, Printed, Table

PAPER_SETS = ("lpba40", "oasis", "ixi")  # of which a `Row` knows what a paper prints

# of a printed table, by what it measures: word, key of a row, form
COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "dice": (
        ("paper", "paper_dice", ".3f"), ("ours", "dice", ".4f"), ("sd", "dice_sd", ".4f"),
        ("labels", "dice_sd_labels", ".4f"), ("HD95", "hd95", ".2f"),
        ("% J<=0", "folding_percent", ".4f"), ("sd log J", "sd_log_jacobian", ".3f"),
    ),
    "landmarks": (
        ("before", "tre_before", ".3f"), ("error", "tre", ".3f"), ("AUC", "success_auc", ".4f"),
        ("% J<=0", "folding_percent", ".4f"),
    ),
    "motion": (
        ("degrees", "rotation_error", ".4f"), ("voxels", "translation_error", ".4f"),
        ("% good", "success", ".1f"),
    ),
}  # fmt: skip
COSTS = (
    ("s/pair", "seconds", ".2f"), ("train s", "training_seconds", ".0f"),
    ("weights", "parameters", "d"),
)  # fmt: skip

Json = dict[str, Any]


def compare(table: Table, rows: Sequence[Json], paper_set: str = "lpba40") -> list[Json]:
    """The rows in the order of the table, with what the paper prints and whether orders agree.

    Args:
        table: the rows' table.
        rows: of a results file.
        paper_set: of `PAPER_SETS`; where the paper prints nothing for it, "lpba40".

    Returns:
        Each row with paper_set, paper_dice (in [0, 1]), paper_dice_sd_labels (where the paper
        prints it), paper_folding_percent, paper_seconds; and, where there is a default row,
        against (the label of the row it is compared with: that one, or the one that the row names),
        difference and paper_difference (of the Dice, to that row), difference_interval (of
        `interval`; None with fewer than two pairs) and same_order: "yes" where both have one sign,
        else "no"; None where one of them is missing.
        Rows that have not been run are there with state "not run".
    """
    results = {row["label"]: row for row in rows}
    lines = []
    for row in table.rows:
        which = paper_set if getattr(row, paper_set, None) is not None else "lpba40"
        printed: Printed | None = getattr(row, which)
        line: Json = {"label": row.label, "method": row.method, "state": "not run"}
        line |= results.get(row.label, {})
        line |= {
            "default": row.default,
            "paper_set": which if printed else None,
            "paper_dice": round(printed.dice / 100, 4) if printed else None,
            "paper_folding_percent": printed.folding if printed else None,
            "paper_seconds": printed.seconds if printed else None,
        }
        if row.deviation is not None:
            line["paper_dice_sd_labels"] = round(row.deviation / 100, 4)
        lines.append(line)
    default = next((line for line in lines if line["default"]), {})
    for line, row in zip(lines, table.rows, strict=True):
        line |= _beside(line, next((one for one in lines if one["label"] == row.against), default))
    return lines


def _beside(line: Json, reference: Json) -> Json:
    """What `compare` says of a row and the one that it is compared with, which may be itself."""
    if line is reference:
        reference = {}
    ours = _difference(line.get("dice"), reference.get("dice"))
    paper = _difference(line.get("paper_dice"), reference.get("paper_dice"))
    same_order = None
    if ours is not None and paper is not None:
        same_order = "yes" if np.sign(ours) == np.sign(paper) else "no"
    return {
        "against": reference.get("label"),
        "difference": ours,
        "paper_difference": paper,
        "difference_interval": _interval_between(line, reference),
        "same_order": same_order,
    }


def _difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else round(value - other, 4)


def _interval_between(line: Json, reference: Json) -> list[float] | None:
    """The interval of the Dice of a row less that of another one, of the same test pairs."""
    dice = [_seeds_by_pairs(line), _seeds_by_pairs(reference)]
    (seeds_a, pairs_a), (seeds_b, pairs_b) = (values.shape for values in dice)
    if pairs_a != pairs_b or pairs_a < 2 or (seeds_a != seeds_b and 1 not in (seeds_a, seeds_b)):
        return None
    difference = dice[0] - dice[1]
    if not np.isfinite(difference).all():
        return None
    return [round(bound, 4) for bound in interval(difference)]


def _seeds_by_pairs(line: Json) -> np.ndarray:
    """The Dice of a row, (seeds, pairs): one seed where it knows of none."""
    return np.array(line.get("dice_pairs_seeds") or [line.get("dice_pairs") or []], dtype=float)


def interval(
    differences: np.ndarray, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean of paired differences.

    Each resample draws seeds and test pairs, both with replacement and apart from each other, as a
    seed is tested on all pairs. With few seeds it is too narrow: the spread of three drawn with
    replacement is on average two thirds, as variance, of that of the trainings they stand for.

    Args:
        differences: (seeds, pairs), of one method and another. What depends on no seed, as
            classical methods do, is the same in each row.
        level: how much of the resampled means lies inside.
        resamples: how many are drawn.
        seed: of the draw.

    Returns:
        The lower and the upper bound.
    """
    weights = _drawn(differences.shape, resamples, seed)
    means = np.einsum("rs,sp,rp->r", weights[0], differences, weights[1], optimize=True)
    return _ends(means, level)


def _drawn(shape: Sequence[int], resamples: int, seed: int) -> list[np.ndarray]:
    """Of each axis of n, (resamples, n): the share of each in n draws with replacement."""
    draw = np.random.default_rng(seed)
    return [draw.multinomial(n, [1 / n] * n, resamples) / n for n in shape]


def _ends(values: Sequence[float] | np.ndarray, level: float) -> tuple[float, float]:
    """Between which the middle `level` of the values lies; NaN are not counted."""
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def tau_interval(
    printed: Sequence[float],
    ours: Sequence[np.ndarray],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Bootstrap percentile interval of Kendall's tau between printed numbers and ours.

    Each resample draws test pairs and seeds as `interval` does, the same for all rows, and orders
    the rows by what is left. It knows nothing of the spread of what the paper prints, so it is too
    narrow for the question whether both orders are of one kind.

    Args:
        printed: a number a row.
        ours: (seeds, pairs) a row; one seed where a method depends on none. All have the same
            pairs, and as many seeds as each other where they have more than one.
        level, resamples, seed: as of `interval`.

    Returns:
        The lower and the upper bound, in [-1, 1]; None with fewer than two rows or pairs, with
        numbers of pairs or seeds that differ, with a number that is not finite, or where all rows
        are level.
    """
    pairs = {values.shape[1] for values in ours}
    seeds = {len(values) for values in ours} - {1}
    finite = all(np.isfinite(values).all() for values in ours)
    if len(ours) < 2 or len(pairs) != 1 or min(pairs) < 2 or len(seeds) > 1 or not finite:
        return None
    number = max(seeds, default=1)
    every = np.stack([np.broadcast_to(values, (number, *pairs)) for values in ours])
    weights = _drawn(every.shape[1:], resamples, seed)
    means = np.einsum("rs,msp,rp->rm", weights[0], every, weights[1], optimize=True)
    taus = [_tau(printed, mean) for mean in means]
    return _ends(taus, level) if np.isfinite(taus).any() else None


def _tau(printed: Sequence[float], ours: Sequence[float] | np.ndarray) -> float:
    """Kendall's tau of two lists; NaN with fewer than two numbers, or where one list is level."""
    return float(kendalltau(printed, ours).statistic) if len(printed) > 1 else float("nan")


def orders(lines: Sequence[Json]) -> Json:
    """How far the order of the rows agrees: of what `compare` gives.

    Returns:
        kendall_tau (1: the same order, -1: the opposite; None with fewer than two rows),
        kendall_tau_interval (of `tau_interval`, or None), rows: how many it compares, held and of:
        how many rows are on the same side of the default row as in the paper, of how many.
    """
    both = [
        line for line in lines if line["paper_dice"] is not None and line.get("dice") is not None
    ]
    printed = [line["paper_dice"] for line in both]
    tau = _tau(printed, [line["dice"] for line in both])
    bounds = tau_interval(printed, [_seeds_by_pairs(line) for line in both])
    sides = [line["same_order"] for line in lines if line["same_order"] is not None]
    return {
        "kendall_tau": round(tau, 3) if np.isfinite(tau) else None,
        "kendall_tau_interval": [round(bound, 3) for bound in bounds] if bounds else None,
        "rows": len(both),
        "held": sides.count("yes"),
        "of": len(sides),
    }


def _bounds(bounds: Sequence[float] | None) -> str:
    """Such as " (95 % interval -0.2 to 0.6)"; nothing where there is none."""
    return f" (95 % interval {bounds[0]} to {bounds[1]})" if bounds else ""


def as_text(results: Json) -> str:
    """A results file as lines: row, paper, ours, which side of the default row; then the orders.

    Plain text, not a `rich.table`: one form for a terminal, a file and a test, which no terminal's
    width breaks or cuts.
    """
    measure = TABLES[results["table"]].measure if results["table"] in TABLES else "dice"
    columns = COLUMNS[measure] + COSTS
    title = f"{results['table']}: {results['title']}"
    lines = [
        f"{title} ({results['split']} subjects, paper: {results['paper_set']})",
        f"{'':<34}" + "".join(f"{word:>9}" for word, _, _ in columns)
        + f"{'95 % of difference':>20}  same order?",
    ]  # fmt: skip
    for row in results["rows"]:
        values = [(row.get(key), form) for _, key, form in columns]
        cells = ["-" if value is None else format(value, form) for value, form in values]
        bounds = row.get("difference_interval")
        between = "{:+.4f} {:+.4f}".format(*bounds) if bounds else "-"
        word = "default" if row["default"] else row["same_order"] or ""
        state = word if row["state"] == "done" else row["state"]
        numbers = "".join(f"{cell:>9}" for cell in cells)
        lines.append(f"{row['label']:<34}{numbers}{between:>20}  {state}")
    order = results["order"]
    if order["rows"] > 1:
        lines.append(
            f"Order of {order['rows']} rows: Kendall's tau {order['kendall_tau']}"
            f"{_bounds(order.get('kendall_tau_interval'))}; "
            f"{order['held']} of {order['of']} on the paper's side of the default row."
        )
    best: dict[str, Json] = {}
    if results["split"] == "validation":
        for row in (row for row in results["rows"] if row["state"] == "done"):
            if row["dice"] > best.get(row["method"], {"dice": -1})["dice"]:
                best[row["method"]] = row
    lines += [f"Best of {method}: {row['label']}" for method, row in best.items()]
    return "\n".join(lines)
