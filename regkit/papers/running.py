"""Tables of published comparisons, run again: what each row is, what the paper prints, what we get.

    regkit benchmark list
    regkit benchmark sun2025-table1 --budget cpu --ndim 2
    regkit benchmark zheng2023-table1 --budget cpu --seed 0 --seed 1 --seed 2

A table is data (`regkit.papers.tables`): rows of a method with its settings, beside the numbers
that the paper prints. All rows of a table learn from the same pairs in the same order, with the
same number of updates, and are measured on the same test pairs by the same code; the weights are
those after the last update, so nothing is chosen by looking. The learning rate and its warm-up are
those of each model's own recipe, or of the table's protocol where it says so (`Table.alike`).

One row of a table is the one that others are compared with (or one that a row names), and each
difference has an interval, see `regkit.papers.comparing.interval`.

A method is the name of a model, or of a classical method: a function of `regkit.classical` (or of
`regkit.classical.ants`), which takes the options of its row. Those of `ON_TENSORS` take two tensors
and their spacing and return a `regkit.classical.Deformation`; all others take two `regkit.io.Image`
and return the displacement (1, d, *S), as `syn` does. One that does not exist yet is a row that
says so, and runs as soon as it exists.

A training is known by what it asks for (`regkit.training.recipes.identity`), so that rows of
several tables which are the same share one. It lives in a folder of its own below `runs` and goes
on where it was stopped. The results file is written after each row; a row that is there is not run
again unless its recipe, its pairs or the kind of device are others.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from regkit import classical, io, metrics, models
from regkit.data import LABELS, Subject, prepared
from regkit.device import choose_device
from regkit.files import alone, check_writable
from regkit.messages import unknown
from regkit.models import Registration
from regkit.papers.comparing import COLUMNS, COSTS, PAPER_SETS, Json, compare, orders
from regkit.papers.tables import LAMBDA2, TABLES, Row, Table
from regkit.record import Rows, how_made, made_now, peak_inside, rounded, write_json
from regkit.spatial import warp
from regkit.training import recipes
from regkit.training.checkpoints import saved
from regkit.training.data import adapted, evaluation_pairs, rigid_pairs, subjects
from regkit.training.evaluation import (
    dice_by_label,
    evaluate,
    labels_of,
    landmark_errors,
    landmark_summary,
    motion_rows,
    motion_summary,
    summary,
)
from regkit.training.loop import train
from regkit.training.objective import SIMILARITIES
from regkit.training.recipes import Recipe
from regkit.transform import Grid

PAIRS = 9  # to test on, of the embedded population: as many as LPBA40 has
MAIN = {"dice": "dice", "landmarks": "tre", "motion": "rotation_error"}  # number of each measure

Method = Callable[[Tensor, Tensor], Registration]
ClassicalMethod = Callable[..., Any]
ON_TENSORS = ("greedy", "lddmm")  # of the classical methods, see above
Folder = str | os.PathLike[str]


# ------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class Settings:
    """What to run of a table, and where to write.

    table: one of `TABLES`.
    budget: by default that of the process.
    ndim: 2 or 3; by default 3 at budgets "gpu" and "paper", else 2; of a table in 2D alone 2.
    protocol: "atlas" (all to one fixed image, the paper's LPBA40) or "pairs" (any two, its OASIS),
        on the embedded population; by default the first that the table has.
    data: folder of a prepared set instead; which one it is says ndim and protocol.
    seeds: of the trainings, one each; a row is their mean.
    steps, similarity: instead of the recipe's. lambda2: instead of `LAMBDA2`.
    pairs: how many test subjects; by default 9, or all of a prepared set.
    rows: labels, methods or numbers (from 1) of the rows to run; by default all.
    test: folder of another prepared set to test on; what is learned from stays as it is.
    amplitude: of the embedded population to test on, the same way.
    runs: folder of the trainings.
    out: the JSON file; by default results/<table>_<data>_<budget>.json, with _on_<test> or
        _at_<amplitude> behind the data.
    device, progress, workers: as in `regkit.training.train`.
    until: None, or when to end on the clock `time.monotonic`, see `NotFinished`.
    command: what to say of how it was made.
    """

    table: str
    budget: str | None = None
    ndim: int | None = None
    protocol: str | None = None
    data: Folder | None = None
    seeds: Sequence[int] = (0,)
    steps: int | None = None
    pairs: int | None = None
    similarity: str | None = None
    lambda2: float | None = None
    rows: Sequence[str] = ()
    test: Folder | None = None
    amplitude: float | None = None
    runs: Folder = "runs"
    out: Folder | None = None
    device: str = "auto"
    progress: bool = True
    workers: int | None = None
    until: float | None = None
    command: str = ""


class NotFinished(Exception):
    """The time that was given has passed: the same command goes on with what is left.

    A training ends with its state saved, before the next validation would come too late; a row that
    is being measured is finished.
    """


# ------------------------------------------------------------------------------------ methods


def exists(method: str) -> bool:
    """Whether a row of this method can run."""
    return method in models.names() or _classical_method(method) is not None


def _classical_method(name: str) -> ClassicalMethod | None:
    return getattr(classical, name, None) or getattr(classical.ants, name, None)


def _options(row: Row, ndim: int) -> Json:
    """What a classical method is called with, beside two images."""
    return {**row.options, **(row.in_3d if ndim == 3 else {})}


def _as_model(row: Row, affine: np.ndarray) -> Method:
    """A row's classical method as a model is called, for images that lie on one grid."""
    function = _classical_method(row.method)
    assert function is not None

    def register(moving: Tensor, fixed: Tensor) -> Registration:
        options = _options(row, moving.ndim - 2)
        if row.method in ON_TENSORS:
            spacing = Grid(tuple(fixed.shape[2:]), affine).spacing
            disp = function(moving, fixed, spacing=spacing, **options).disp
        else:
            images = (io.Image(x.cpu(), affine) for x in (moving, fixed))
            disp = function(*images, **options).to(moving)
        return Registration(warp(moving, disp), disp)

    return register


# ------------------------------------------------------------------------------------ trainings


def recipe_of(
    row: Row,
    protocol: Recipe,
    budget: str | None = None,
    lambda2: float | None = None,
    alike: bool = False,
) -> Recipe:
    """The training that a row asks for.

    Args:
        row: of a model.
        protocol: says everything that the rows of a table share: data, size, similarity, updates.
        budget: of the model's own recipe, which says its options, rate and warm-up.
        lambda2: instead of `LAMBDA2`, where the row names none.
        alike: weights, rate and warm-up are those of the protocol, too; see `Table`.
    """
    own = replace(protocol, options={})
    if row.method == protocol.model:
        own = protocol
    elif (name := f"{row.method}_{protocol.ndim}d") in recipes.names():
        own = recipes.get(name, budget)
    rate = protocol if alike else own
    options = {**own.options, **row.options}
    has_levels = models.create(row.method, protocol.ndim, **options).levels
    return replace(
        protocol,
        model=row.method,
        options=options,
        levels=protocol.levels if has_levels else None,
        weights=_weights(row, protocol, lambda2, alike),
        lr=rate.lr,
        warmup=rate.warmup,
        steps=round(row.updates * protocol.steps),
    )


def _weights(row: Row, protocol: Recipe, lambda2: float | None, alike: bool) -> dict[str, float]:
    """The weights of the objective that a row learns with; arguments as of `recipe_of`."""
    if row.weights is not None:
        return dict(row.weights)
    weights = dict(protocol.weights) if alike else {"similarity": 1.0}
    usual = weights.get("diffusion", 0.0) if alike else LAMBDA2.get(row.method, LAMBDA2["vxm"])
    smoothness = next(value for value in (row.lambda2, lambda2, usual) if value is not None)
    if row.method == "unfolding" and not alike:
        return {
            "similarity_u": row.lambda1,
            "similarity": round(1 - row.lambda1, 10),
            "diffusion_u": smoothness,
            "consistency": row.lambda3,
        }
    if not alike or "diffusion" in weights:  # not where nothing can bend
        weights["diffusion"] = smoothness
    return weights


class Training(NamedTuple):
    """A trained model, and what its training cost, see `regkit.training.Trained`.

    memory_gb: the largest peak of its sittings; None where each was killed.
    """

    model: models.RegistrationModel
    seconds: float | None
    memory_gb: float | None


def trained(
    recipe: Recipe,
    runs: Path,
    device: torch.device,
    data: Folder | None = None,
    progress: bool = True,
    at_test: Mapping[str, Any] | None = None,
    workers: int | None = None,
    minutes: float | None = None,
) -> Training:
    """The model of a recipe: trained now, or gone on with, or read from its folder below `runs`.

    `at_test` holds options that its training did not know.

    Raises:
        NotFinished: the minutes have passed.
    """
    folder = runs / f"{recipe.model}_{recipe.ndim}d_{recipes.identity(recipe)}"
    cost_file = folder / "cost.json"
    with _locked(folder):
        cost = _read_json(cost_file) if cost_file.is_file() else {}
        if not isinstance(cost, dict):
            raise ValueError("runs holds a cost.json of something else, expected that of a run.")
        if (done := len(saved(folder))) < recipe.steps:
            with peak_inside(device) as memory:
                how: Json = {"data": data, "workers": workers, "minutes": minutes}
                run = train(recipe, folder, True, progress, str(device), **how)
            done = len(run.history)
            peak = max(memory.gigabytes, cost.get("memory_gb", 0.0))
            cost = {"seconds": round(run.seconds, 3), "memory_gb": round(peak, 3)}
            write_json(cost_file, cost)
        if done < recipe.steps:
            raise NotFinished(f"{recipe.model} has made {done} of {recipe.steps} updates")
        model = models.load(folder / "last.safetensors", **at_test or {})
        return Training(model, cost.get("seconds"), cost.get("memory_gb"))


# ------------------------------------------------------------------------------------ measuring


def judge(
    method: Method,
    pairs: Sequence[tuple[Subject, Subject]],
    labels: Sequence[int] | None,
    device: torch.device,
    names: Mapping[int, str] = LABELS,
) -> Json:
    """What a method reaches on these pairs: the numbers of a row.

    Returns:
        Means over the pairs as `regkit.training.summary` gives them, but seconds as median (the
        first pair warms up); memory_gb, the peak while it registers, see `_peak_inside`; dice_pairs
        (one a pair), dice_per_structure (by name), dice_sd_labels (the standard deviation over the
        labels of a pair, mean over the pairs), and stages: for each (u, v) Dice and percent of
        non-positive Jacobians of both, and the mean of |u - v| in voxels.
    """
    with_truth = all(len(subject.velocity) for pair in pairs for subject in pair)
    rows, stages, peaks = [], [], []
    registration = Registration(torch.empty(0), torch.empty(0))

    def watched(moving: Tensor, fixed: Tensor) -> Registration:
        nonlocal registration
        with peak_inside(device) as memory:
            registration = method(moving, fixed)
        peaks.append(memory.gigabytes)
        return registration

    for moving, fixed in pairs:
        row = evaluate(watched, [(moving, fixed)], labels, True, with_truth, device)[0]
        rows.append(row)
        counted = list(row["dice_per_label"])
        split = [stage for stage in registration.stages if isinstance(stage, tuple)]
        stages.append([_stage(u, v, moving, fixed, counted) for u, v in split])
    numbers: Json = summary(rows)
    numbers["memory_gb"] = max(peaks)
    numbers["seconds"] = statistics.median(row["seconds"] for row in rows)
    numbers["dice_pairs"] = [row["dice"] for row in rows]
    numbers["dice_sd_labels"] = _finite_mean(
        [float(np.nanstd(list(row["dice_per_label"].values()))) for row in rows]
    )
    numbers["dice_per_structure"] = {
        names.get(label, str(label)): dice for label, dice in dice_by_label(rows).items()
    }
    if stages[0]:
        numbers["stages"] = [_mean_by_number(of_one) for of_one in zip(*stages, strict=True)]
    return numbers


def _stage(u: Tensor, v: Tensor, moving: Subject, fixed: Subject, labels: list[int]) -> Json:
    """The numbers of one stage (u, v), of one pair of images."""
    numbers = {"difference": float((u - v).norm(dim=1).mean())}
    for name, disp in (("u", u.cpu()), ("v", v.cpu())):
        warped = warp(moving.labels[None], disp, mode="nearest")
        dice = metrics.dice(warped, fixed.labels[None], labels)
        numbers[f"dice_{name}"] = float(dice.nanmean())
        numbers[f"folding_percent_{name}"] = float(metrics.folding_percent(disp))
    return numbers


def _finite_mean(values: Sequence[float]) -> float:
    """Over those that are finite; NaN if none is."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def _mean_by_number(records: Sequence[Any]) -> Any:
    """The mean of records of one structure (dictionaries, lists, numbers), number by number."""
    first = records[0]
    if isinstance(first, dict):
        return {key: _mean_by_number([record[key] for record in records]) for key in first}
    if isinstance(first, list):
        return [_mean_by_number(parts) for parts in zip(*records, strict=True)]
    return _finite_mean(records)


class _TestPairs(NamedTuple):
    """What the rows of a table are measured on.

    pairs: (moving, fixed), or `RigidPair` where the measure is the motion. measure: of the table.
    labels: which count, None for all. names: of labels. categories: of given pairs.
    """

    pairs: Sequence[Any]
    measure: str = "dice"
    labels: Sequence[int] | None = None
    names: Mapping[int, str] = LABELS
    categories: Sequence[str] = ()


def _test_pairs(
    table: Table, recipe: Recipe, count: int | None, data: Folder | None, progress: bool = False
) -> _TestPairs:
    """The first of a table's test pairs (all: None), as its recipe says.

    Args:
        data: folder of the prepared set that they are of; None for the embedded population.
    """
    names = LABELS if data is None else prepared.structures(data) or LABELS
    if table.measure == "motion":
        moved = rigid_pairs(recipe, table.split, count, data=data, progress=progress)
        return _TestPairs(moved.pairs(), table.measure, None, names)
    if table.measure == "landmarks":
        subjects(recipe, table.split, 1, data)  # that it is the set, and the size
        given: Any = prepared.pairs(data or "", table.split)  # it knows the categories, too
        return _TestPairs(given[:count], table.measure, None, names, given.categories[:count])
    people, labels = evaluation_pairs(recipe, table.split, count, data, progress)
    for name in (one.name for pair in people for one in pair if not labels_of(one)):
        raise ValueError(f"data holds {name!r} without labels, expected labels: Dice needs them.")
    return _TestPairs(people, table.measure, labels, names)


def _measure(method: Method, tests: _TestPairs, device: torch.device) -> Json:
    """What a method reaches on the test pairs of a table, by the table's measure."""
    if tests.measure == "dice":
        return judge(method, tests.pairs, tests.labels, device, tests.names)
    start = time.perf_counter()
    with peak_inside(device) as memory:
        if tests.measure == "motion":
            rows = motion_rows(method, tests.pairs, device)
            numbers: Json = motion_summary(rows)
        else:
            rows = landmark_errors(method, tests.pairs, device)
            numbers = landmark_summary(rows, tests.categories)
    main = MAIN[tests.measure]
    return {
        **numbers,
        "seconds": (time.perf_counter() - start) / len(rows),
        "memory_gb": memory.gigabytes,
        f"{main}_pairs": [row[main] for row in rows],
    }


# ------------------------------------------------------------------------------------ one row


def row_key(
    row: Row,
    plans: Sequence[Recipe],
    tested_on: Recipe,
    split: str,
    pairs: int | None,
    device: torch.device,
) -> str:
    """Twelve hexadecimal digits of everything that a row depends on.

    Args:
        plans: the trainings of the row, one a seed; none of a classical method.
        tested_on: the recipe whose data the row is measured on.
        split, pairs: of these data; how many pairs, or None for all.
        device: of which the kind counts, "cpu" or "cuda".
    """
    method: list[Any] = [recipes.identity(plan) for plan in plans]
    if not method:
        options = _options(row, tested_on.ndim)
        method = [row.method, tested_on.shape, *([options] if options else [])]
    method += [dict(row.at_test)] if row.at_test else []
    data = [tested_on.data, tested_on.atlas, tested_on.contrast, tested_on.amplitude]
    parts = [*method, *data, split, pairs, device.type]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _row_of_model(
    plans: Sequence[Recipe],
    tests: _TestPairs,
    device: torch.device,
    training_of: Callable[[Recipe], Training],
) -> Json:
    """The numbers of a model: means over its trainings, one a seed."""
    reached, costs = [], []
    for plan in plans:
        training = training_of(plan)
        model = training.model.to(device)
        reached.append(_measure(model, tests, device))
        costs.append((training.seconds, training.memory_gb))
    times, sizes = zip(*costs, strict=True)
    main = MAIN[tests.measure]
    return {
        **_mean_by_number(reached),
        f"{main}_seeds": [numbers[main] for numbers in reached],
        f"{main}_pairs_seeds": [numbers[f"{main}_pairs"] for numbers in reached],
        "parameters": models.parameter_count(model),
        "training_seconds": None if None in times else sum(times) / len(times),
        "training_memory_gb": None if None in sizes else max(sizes),
        "updates": plans[0].steps,
        "batch": plans[0].batch,
        "learning_rate": plans[0].lr,
        "smoothness": plans[0].weights.get("diffusion_u", plans[0].weights.get("diffusion")),
        "recipe": recipes.plan(plans[0]),
        "precision": model.info["recipe"]["precision"],  # what "auto" in the recipe has meant
        "seeds": [plan.seed for plan in plans],
    }


def _row_of_classical_method(row: Row, tests: _TestPairs) -> Json:
    """The numbers of a classical method, on the CPU."""
    fixed = tests.pairs[0][1]
    numbers = _measure(_as_model(row, fixed.affine), tests, torch.device("cpu"))
    if options := _options(row, fixed.image.ndim - 1):
        numbers["options"] = options
    return {**numbers, "threads": int(os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"])}


# ------------------------------------------------------------------------------------ one table


def run(settings: Settings) -> Path:
    """Run what is missing of a table, and write the file after each row.

    Returns:
        The file. Rows that do not exist yet or could not be run say so in `state`.

    Raises:
        ValueError: an unknown table, row, protocol or set, or settings that do not fit.
        NotFinished: the time of the settings has passed.
    """
    comparison = Comparison.planned(settings)
    # ANTs gets as many cores as PyTorch
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", str(torch.get_num_threads()))
    read_rows(comparison.file)  # that it is a results file, if it is there
    results = Rows(
        comparison.file, ("label",), comparison.header(), derive=comparison.beside_the_paper
    )
    for row in comparison.rows:
        plans = comparison.plans(row)
        key = comparison.key(row, plans)
        if comparison.is_done(row, key):
            continue
        comparison.minutes_left(row)
        numbers = rounded(comparison.measured(row, plans), 5)
        result = {"label": row.label, "key": key, **made_now(comparison.device), **numbers}
        if row.note:
            result["note"] = row.note
        results.add(result)
    return comparison.file


@dataclass(frozen=True)
class Comparison:
    """A table with the settings of a call, once they are known to fit.

    rows: to run. protocol: what they share, and learn from. budget: of the process, or as asked.
    tested_on, test_folder: the recipe, and the folder of a prepared set (None: the population), of
        the pairs to test on. pairs: how many; None: all.
    file: of the results.
    """

    settings: Settings
    table: Table
    rows: Sequence[Row]
    budget: str
    protocol: Recipe
    tested_on: Recipe
    test_folder: Folder | None
    pairs: int | None
    device: torch.device
    file: Path

    @classmethod
    def planned(cls, settings: Settings) -> Comparison:
        """Everything is looked at before hours of work: settings, folders, everybody's headers."""
        if settings.table not in TABLES:
            raise unknown("table", settings.table, TABLES)
        table, device = TABLES[settings.table], choose_device(settings.device)
        rows = _chosen_rows(table, settings.rows)
        budget = settings.budget or recipes.budget()
        protocol = _protocol(table, budget, settings.ndim, settings.protocol, settings.data)
        _check_settings(settings, table)
        protocol = replace(
            _at_precision(protocol, device),
            steps=settings.steps or protocol.steps,
            similarity=settings.similarity or protocol.similarity,
        )
        tested_on, folder, suffix = _tested_on(settings, protocol)
        pairs = settings.pairs
        if folder is None:
            pairs = pairs or (2 if budget == "smoke" else PAIRS)
        _check_headers(settings, table, protocol, tested_on)
        kind = protocol.name
        for prefix in table.recipes:
            kind = kind.removeprefix(f"{prefix}_")
        name = f"{settings.table}_{kind}{suffix}_{budget}.json"
        file = Path(settings.out or Path("results") / name)
        check_writable(file.parent)
        if file.is_dir():
            raise ValueError("out is a folder, expected the name of a JSON file.")
        return cls(
            settings, table, rows, budget, protocol, tested_on, folder, pairs, device, file
        )  # fmt: skip

    def minutes_left(self, row: Row) -> float | None:
        """Until the time that the settings give; None where they give none.

        Raises:
            NotFinished: it has passed, and this row is not done.
        """
        if self.settings.until is None:
            return None
        left = (self.settings.until - time.monotonic()) / 60
        if left <= 0:
            raise NotFinished(f"of {self.settings.table} the row {row.label!r} comes next")
        return left

    @cached_property
    def tests(self) -> _TestPairs:
        """Made when the first row needs them."""
        return _test_pairs(
            self.table, self.tested_on, self.pairs, self.test_folder, self.settings.progress
        )

    def header(self) -> Json:
        """What the results file says of all rows."""
        return {
            "table": self.settings.table,
            "title": self.table.title,
            "note": self.table.note,
            "paper": self.table.paper,
            "paper_set": self.paper_set,
            "data": self.protocol.data,
            "tested_on": self.tested_on.data,
            "amplitude": self.tested_on.amplitude,
            "split": self.table.split,
            "made": how_made(self.settings.command, self.device),
        }

    def beside_the_paper(self, rows: Sequence[Json]) -> Json:
        """The rows in the order of the table, with what the paper prints, and the orders."""
        lines = compare(self.table, rows, self.paper_set)
        return {"order": orders(lines), "rows": lines}

    @property
    def paper_set(self) -> str:
        """The set whose printed numbers the results stand beside."""
        named = (one for one in PAPER_SETS if self.protocol.data.startswith(one))
        return next(named, self.table.atlas if self.protocol.atlas else self.table.pairs)

    def plans(self, row: Row) -> list[Recipe]:
        """The trainings of a row, one a seed; none of a classical method."""
        if row.method not in models.names():
            return []
        plan = recipe_of(row, self.protocol, self.budget, self.settings.lambda2, self.table.alike)
        return [replace(plan, seed=seed) for seed in self.settings.seeds]

    def key(self, row: Row, plans: Sequence[Recipe]) -> str:
        """What tells this row from the same one at other settings, see `row_key`."""
        return row_key(row, plans, self.tested_on, self.table.split, self.pairs, self.device)

    def is_done(self, row: Row, key: str) -> bool:
        """Whether the results file has the row, of the same training, pairs and kind of device."""
        stored = {one["label"]: one for one in read_rows(self.file)}.get(row.label, {})
        return stored.get("key") == key and stored["state"] == "done"

    def measured(self, row: Row, plans: Sequence[Recipe]) -> Json:
        """The numbers of a row, or in `state` why it has none."""
        if not exists(row.method):
            return {"state": "not yet"}
        settings, tests = self.settings, self.tests

        def training_of(plan: Recipe) -> Training:
            runs, data = Path(settings.runs), settings.data
            how = (settings.progress, row.at_test, settings.workers, self.minutes_left(row))
            return trained(plan, runs, self.device, data, *how)

        try:
            if plans:
                numbers = _row_of_model(plans, tests, self.device, training_of)
            else:
                numbers = _row_of_classical_method(row, tests)
        except (ValueError, ImportError) as error:
            return {"state": f"left out: {error}"}
        return {"state": "done", **numbers}


def _check_settings(settings: Settings, table: Table) -> None:
    similarity, steps, lambda2 = settings.similarity, settings.steps, settings.lambda2
    if similarity not in (None, *SIMILARITIES):
        raise ValueError(
            f"similarity is {similarity!r}, expected one of {', '.join(SIMILARITIES)}."
        )
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}, expected 1 or more.")
    if lambda2 is not None and table.measure == "motion":
        raise ValueError(f"lambda2 is {lambda2}, expected None: nothing bends in a rigid motion.")
    if not settings.seeds:
        raise ValueError("seeds is empty, expected at least one.")
    if settings.pairs is not None and settings.pairs < 2:
        raise ValueError(f"pairs is {settings.pairs}, expected 2 or more.")


def _tested_on(settings: Settings, protocol: Recipe) -> tuple[Recipe, Folder | None, str]:
    """The recipe of the test pairs, the folder of their set, and what the file's name adds."""
    tested_on, folder, suffix = protocol, settings.data, ""
    if settings.test is not None:
        folder = settings.test
        tested_on = replace(protocol, data=prepared.description(folder)["name"])
        suffix = f"_on_{tested_on.data}"
    amplitude = settings.amplitude
    if amplitude is not None:
        if amplitude < 0 or folder is not None:
            raise ValueError(
                f"amplitude is {amplitude}, expected 0 or more, and the embedded population."
            )
        tested_on = replace(protocol, amplitude=amplitude)
        suffix += f"_at_{amplitude:g}"
    return tested_on, folder, suffix


def _check_headers(settings: Settings, table: Table, protocol: Recipe, tested_on: Recipe) -> None:
    """That the prepared sets hold what is to be learned from, and tested on."""
    if settings.data is not None:
        subjects(protocol, "train", 1, settings.data)
        adapted(protocol, settings.data)
    if settings.test is not None:
        subjects(tested_on, table.split, 1, settings.test)
        adapted(tested_on, settings.test)
    folder = settings.data if settings.test is None else settings.test
    if folder is not None:
        _test_pairs(table, tested_on, 2, folder)


def _chosen_rows(table: Table, asked: Sequence[str]) -> list[Row]:
    """The rows of these labels, methods or numbers; all if none is named."""
    chosen: list[Row] = []
    for name in asked:
        rows = [
            row
            for number, row in enumerate(table.rows, 1)
            if name.lower() in (str(number), row.label.lower(), row.method)
        ]
        if not rows:
            raise unknown("rows", name, [row.label for row in table.rows])
        chosen += [row for row in rows if row not in chosen]
    return chosen or list(table.rows)


def left_out(name: str, results: Json, rows: Sequence[str] = ()) -> list[str]:
    """Labels of the rows, of those that were asked for, which an error kept out of a results file.

    Args:
        name: of the table. results: what its file holds. rows: as in `Settings`.
    """
    asked = {row.label for row in _chosen_rows(TABLES[name], rows)}
    return [
        row["label"]
        for row in results["rows"]
        if row["label"] in asked and row["state"].startswith("left out")
    ]


# ------------------------------------------------------------------------------------ protocols


def tables_for(
    budget: str | None = None,
    ndim: int | None = None,
    protocol: str | None = None,
    data: Folder | None = None,
) -> list[str]:
    """The tables that have a protocol for these settings, which are those of `Settings`.

    Raises:
        ValueError: there is no such table, or one of the settings is none that exists.
    """
    names: list[str] = []
    for name, table in TABLES.items():
        with suppress(_NoProtocol):
            _protocol(table, budget or recipes.budget(), ndim, protocol, data)
            names.append(name)
    if not names:
        what = "these settings" if data is None else repr(prepared.description(data)["name"])
        raise ValueError(
            f"table is 'all' and none has a protocol for {what}, expected one that has."
        )
    return names


class _NoProtocol(ValueError):
    """A table has no protocol for what is asked."""


def _protocol(
    table: Table, budget: str, ndim: int | None, protocol: str | None, data: Folder | None
) -> Recipe:
    """The recipe that says what all rows share."""
    if protocol not in ("atlas", "pairs", None):
        raise ValueError(f"protocol is {protocol!r}, expected 'atlas' or 'pairs'.")
    if ndim not in (None, 2, 3):
        raise ValueError(f"ndim is {ndim}, expected 2 or 3.")
    prefixes = tuple(f"{prefix}_" for prefix in table.recipes)
    of_sets: dict[str, Recipe] = {}
    of_population: dict[tuple[int, str], Recipe] = {}
    for name in (name for name in recipes.names() if name.startswith(prefixes)):
        recipe = recipes.get(name, budget)
        if recipe.data != "population":
            of_sets.setdefault(recipe.data, recipe)
        else:
            of_population[recipe.ndim, "atlas" if recipe.atlas else "pairs"] = recipe
    if data is not None:
        return _protocol_of_set(of_sets, prepared.description(data)["name"])
    if not of_population:
        raise _NoProtocol(
            "data is not given, expected the folder of a prepared set, one of "
            f"{', '.join(sorted(of_sets))}."
        )
    axes = {d for d, _ in of_population}
    ndim = ndim or (max(axes) if budget in ("gpu", "paper") else min(axes))
    asked = (ndim, protocol or ("atlas" if (ndim, "atlas") in of_population else "pairs"))
    if asked not in of_population:
        listed = ", ".join(f"{d} with {p!r}" for d, p in sorted(of_population))
        raise _NoProtocol(
            f"ndim is {ndim} and protocol {protocol!r}, expected of this table {listed}."
        )
    return of_population[asked]


def _protocol_of_set(of_sets: Mapping[str, Recipe], name: str) -> Recipe:
    if not of_sets:
        raise _NoProtocol(
            f"data holds the set {name!r}, expected none: this table runs on the embedded "
            "population alone."
        )
    if name not in of_sets:
        listed = ", ".join(sorted(of_sets))
        raise _NoProtocol(f"data holds the set {name!r}, expected one of {listed}.")
    return of_sets[name]


def _at_precision(recipe: Recipe, device: torch.device) -> Recipe:
    """On a GPU in the half precision of whichever begins the training: another may go on with it.

    On the CPU what "auto" means is said, so that a row tells with what it was measured.
    """
    if device.type == "cuda":
        return replace(recipe, precision="auto")
    return recipes.settled(recipe, device)


# ------------------------------------------------------------------------------------ the file


def read_rows(file: Path) -> list[Json]:
    """The rows that a results file holds; none where there is no file.

    Raises:
        ValueError: it holds something else.
    """
    if not file.is_file():
        return []
    results = _read_json(file)
    rows = results.get("rows") if isinstance(results, dict) else None
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise ValueError(
            f"out is {file.name!r}, which holds something else, expected a results file or none."
        )
    return rows


def _is_row(row: Any) -> bool:
    """Whether what `compare` and `as_text` look at is there and of the right kind."""
    if not isinstance(row, dict) or not all(
        isinstance(row.get(key), str) for key in ("label", "state")
    ):
        return False
    pairs, seeds = row.get("dice_pairs") or [], row.get("dice_pairs_seeds") or [[]]
    if not isinstance(pairs, list) or not isinstance(seeds, list):
        return False
    if not all(isinstance(part, list) for part in seeds):
        return False
    columns = [column for of_measure in (*COLUMNS.values(), COSTS) for column in of_measure]
    single = [row.get(key) for _, key, _ in columns]
    whole = [row.get(key) for _, key, form in columns if form == "d"]
    if not all(value is None or isinstance(value, int) for value in whole):
        return False
    numbers = [*single, *pairs, *(value for part in seeds for value in part)]
    return len({len(part) for part in seeds}) == 1 and all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        for value in numbers
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process works on this; a process that dies lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.parent, "runs", work=path.name):
        yield


def _read_json(file: Path) -> Any:
    """What a file holds; None where it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
