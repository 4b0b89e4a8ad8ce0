"""What trained weights reach on pairs that they have not seen, of the population or a prepared set.

Which numbers these are depends on what is known of the pairs: Dice and HD95 where there are labels,
the distance of landmarks where there are some, the error of the motion where it is known.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from regkit.data import LABELS, Subject, prepared
from regkit.data.chest import LABELS as CHEST_LABELS
from regkit.data.chest import ChestPairs, chests
from regkit.data.pairs import chain
from regkit.data.population import population
from regkit.data.rigid import RigidPair, moved_heads
from regkit.files import staged
from regkit.models import RegistrationModel
from regkit.training.data import SEEDS, adapted, evaluation_pairs, rigid_pairs
from regkit.training.evaluation import (
    evaluate,
    labels_of,
    landmark_errors,
    landmark_summary,
    motion_rows,
    motion_summary,
    summary,
)
from regkit.training.recipes import Recipe

PAIRS = 8  # of the embedded population


@dataclass(frozen=True)
class Measured:
    """What a model has reached.

    rows: one dictionary a pair, of `evaluate`, `landmark_errors` or `motion_rows`.
    summary: means over the pairs. names: of the structures, by label.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, float]
    names: Mapping[int, str]

    def per_structure(self) -> dict[str, dict[str, float]]:
        """name -> mean `dice` and, where distances were asked for, `hd95` over the pairs.

        What is not finite is left out of a mean: a structure that neither image of a pair has, and
        the distance to one that was lost.
        """
        structures = {}
        for label in sorted({n for row in self.rows for n in row.get("dice_per_label", ())}):
            structures[self.names.get(label, str(label))] = {
                key: _mean(row[f"{key}_per_label"].get(label, math.nan) for row in rows)
                for key in ("dice", "hd95")
                if (rows := [row for row in self.rows if f"{key}_per_label" in row])
            }
        return structures


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def measure(
    model: RegistrationModel,
    recipe: Recipe,
    data: str | os.PathLike[str] | None = None,
    split: str = "test",
    pairs: int | None = None,
    seed: int = SEEDS["test"],
    distances: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Measured:
    """Register pairs that a model has not seen, and measure the results.

    Args:
        model: on `device`.
        recipe: that it was trained with: says which pairs it is meant for.
        data: folder of a prepared set, whatever set it was trained on. Where the set calls somebody
            fixed, everyone else goes to them. None: the embedded population.
        split: of the prepared set. seed: of the population, where 0 and 1 serve training.
        pairs: how many; by default 8 of the population, all of a prepared set.
        distances: HD95 as well (mm; slow in 3D).
        progress: show a progress bar while the population is made.

    Raises:
        FileNotFoundError: `data` is no prepared set, or lacks a file.
        ValueError: the model learned from a prepared set and `data` is not given; or the set does
            not fit the model, is damaged, or has nobody in this split.
    """
    if data is None:
        return _on_population(model, recipe, pairs or PAIRS, seed, distances, device, progress)
    recipe = adapted(replace(recipe, painted=None, chest=None), data)
    description = prepared.complete(data)
    names = prepared.structures(data)
    if prepared.of_pairs(description):
        return _on_given_pairs(model, data, split, pairs, distances, device, names)
    if recipe.motion is not None:
        moved = rigid_pairs(recipe, split, pairs, data=data)
        return _on_motions(model, moved.pairs(), distances, device, names)
    has_fixed = any(entry["split"] == "fixed" for entry in description["subjects"])
    recipe = replace(recipe, atlas=recipe.atlas or has_fixed)
    tested, labels = evaluation_pairs(recipe, split, pairs, data)
    rows = _by_images(model, tested, labels, distances, device)
    return Measured(rows, summary(rows), names)


def _by_images(
    model: RegistrationModel,
    pairs: Sequence[tuple[Subject, Subject]],
    labels: Sequence[int] | None,
    distances: bool,
    device: torch.device | str,
) -> list[dict[str, Any]]:
    """`evaluate`, without the numbers of labels for pairs of which one image has none."""
    rows = []
    for moving, fixed in pairs:
        chosen = labels if labels_of(moving) and labels_of(fixed) else []
        rows += evaluate(model, [(moving, fixed)], chosen, distances, device=device)
    return rows


def _on_given_pairs(
    model: RegistrationModel,
    data: str | os.PathLike[str],
    split: str,
    count: int | None,
    distances: bool,
    device: torch.device | str,
    names: Mapping[int, str],
) -> Measured:
    """Of a set of pairs, by landmarks where all pairs have some."""
    pairs = prepared.pairs(data, split)
    tested, categories = pairs[:count], pairs.categories[:count]  # type: ignore[attr-defined]
    if not len(tested):
        raise ValueError(f"data holds no one for {split!r}, expected at least one.")
    if not all(len(fixed.points) for _, fixed in tested):
        rows = _by_images(model, tested, list(names) or None, distances, device)
        return Measured(rows, summary(rows), names)
    rows = landmark_errors(model, tested, device)
    for row, category in zip(rows, categories, strict=True):
        row["category"] = category
    return Measured(rows, landmark_summary(rows, categories), names)


def _on_motions(
    model: RegistrationModel,
    pairs: Sequence[RigidPair],
    distances: bool,
    device: torch.device | str,
    names: Mapping[int, str],
) -> Measured:
    """By the error of known motions, and by images and labels too."""
    errors = motion_rows(model, pairs, device)
    tested = [(pair.moving, pair.fixed) for pair in pairs]
    rows = _by_images(model, tested, None, distances, device)
    both = [row | error for row, error in zip(rows, errors, strict=True)]
    return Measured(both, summary(rows) | motion_summary(errors), names)


def _on_population(
    model: RegistrationModel,
    recipe: Recipe,
    pairs: int,
    seed: int,
    distances: bool,
    device: torch.device | str,
    progress: bool,
) -> Measured:
    """Of the embedded population, or of synthetic chests where these were learned from."""
    if recipe.data != "population":
        raise ValueError(
            f"data is not given and method learned from the prepared set {recipe.data!r}, "
            "expected its folder, or that of another prepared set."
        )
    if recipe.chest is not None:
        breaths = ChestPairs(
            chests(pairs, recipe.ndim, seed), recipe.shape, pairs, seed, **recipe.chest
        )
        chest_pairs = [breaths.subjects(i) for i in range(pairs)]
        rows = _by_images(model, chest_pairs, None, distances, device)
        return Measured(rows, summary(rows), CHEST_LABELS)
    if recipe.motion is not None:
        heads = moved_heads(
            pairs, recipe.shape, seed, pairs, gamma=recipe.gamma, **dict(recipe.motion)
        )
        tests = [heads.pair(i) for i in range(pairs)]
        return _on_motions(model, tests, distances, device, LABELS)
    looks = recipe.amplitude, recipe.contrast
    people = population(pairs, recipe.shape, seed, *looks, progress=progress)
    tested = chain(people)
    if recipe.atlas:
        (target,) = population(1, recipe.shape, SEEDS["fixed"], *looks)
        tested = [(moving, target) for moving in people]
    rows = evaluate(model, tested, distances=distances, ceiling=True, device=device)
    return Measured(rows, summary(rows), LABELS)


def write_csv(measured: Measured, path: str | os.PathLike[str]) -> None:
    """One line a pair and structure, or a pair where no structure is known; complete or not at all.

    Columns: moving, fixed, structure, label, dice and hd95 of the structure, then every other
    number of the pair.
    """
    lines = []
    for row in measured.rows:
        pair = {k: v for k, v in row.items() if not k.endswith("_per_label")}
        whole = {f"{k}_pair" if k in ("dice", "hd95") else k: v for k, v in pair.items()}
        of_pair = {"moving": whole.pop("moving"), "fixed": whole.pop("fixed")}
        for label in row.get("dice_per_label") or [None]:
            one: dict[str, Any] = {}
            if label is not None:
                one = {"structure": measured.names.get(label, str(label)), "label": label}
                for key in ("dice", "hd95"):
                    if f"{key}_per_label" in row:
                        one[key] = row[f"{key}_per_label"][label]
            lines.append(of_pair | one | whole)
    columns = list(dict.fromkeys(column for line in lines for column in line))
    path = Path(path)
    with staged(path.parent) as folder:
        with (folder / path.name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(lines)
