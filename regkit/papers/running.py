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
difference has an interval, see `interval`.

A method is the name of a model, or of a classical method: a function of `regkit.classical` (or of
`regkit.classical.ants`) that takes two `regkit.io.Image` and returns the displacement (1, d, *S),
as `syn` does. One that does not exist yet is a row that says so, and runs as soon as it exists.

A training is known by what it asks for (`regkit.training.recipes.identity`), so that rows of
several tables which are the same share one. It lives in a folder of its own below `runs` and goes
on where it was stopped. The results file is written after each row; a row that is there is not run
again unless its recipe, its pairs or the kind of device are others.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import regkit
from regkit import classical, io, metrics, models
from regkit.data import LABELS, Subject, prepared
from regkit.device import choose_device
from regkit.files import alone
from regkit.models import Registration
from regkit.names import unknown
from regkit.papers.comparing import COLUMNS, COSTS, PAPER_SETS, Json, compare, orders
from regkit.papers.tables import LAMBDA2, TABLES, Row, Table
from regkit.record import made_now, peak_memory
from regkit.spatial import warp
from regkit.training import recipes
from regkit.training.checkpoints import saved
from regkit.training.data import adapted, evaluation_pairs, rigid_pairs, subjects
from regkit.training.evaluation import (
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

PAIRS = 9  # to test on, of the embedded population: as many as LPBA40 has
MAIN = {"dice": "dice", "landmarks": "tre", "motion": "rotation_error"}  # number of each measure


# ------------------------------------------------------------------------------------ one row


def exists(method: str) -> bool:
    """Whether a row of this method can run."""
    return method in models.names() or _classical(method) is not None


def _classical(method: str) -> Callable[[io.Image, io.Image], Tensor] | None:
    return getattr(classical, method, None) or getattr(classical.ants, method, None)


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
    if alike:
        own = replace(protocol, options=own.options)
    shared = protocol.weights if alike else {"similarity": 1.0}
    usual = shared.get("diffusion", 0.0) if alike else LAMBDA2.get(row.method, LAMBDA2["vxm"])
    chosen = (row.lambda2, lambda2, usual)
    smooth = next(value for value in chosen if value is not None)
    weights = dict(shared)
    if not alike or "diffusion" in shared:  # not where nothing can bend
        weights["diffusion"] = smooth
    if row.weights is not None:
        weights = dict(row.weights)
    elif row.method == "unfolding" and not alike:
        weights = {
            "similarity_u": row.lambda1,
            "similarity": round(1 - row.lambda1, 10),
            "diffusion_u": smooth,
            "consistency": row.lambda3,
        }
    options = {**own.options, **row.options}
    leveled = models.create(row.method, protocol.ndim, **options).levels
    return replace(
        protocol,
        model=row.method,
        options=options,
        levels=protocol.levels if leveled else None,
        weights=weights,
        lr=own.lr,
        warmup=own.warmup,
        steps=round(row.updates * protocol.steps),
    )


class Run(NamedTuple):
    """A trained model, and what its training cost. None: it was killed after its last update."""

    model: models.RegistrationModel
    seconds: float | None
    memory_gb: float | None


def trained(
    recipe: Recipe,
    runs: Path,
    device: torch.device,
    data: str | os.PathLike | None = None,
    progress: bool = True,
    at_test: Mapping[str, Any] | None = None,
) -> Run:
    """The model of a recipe: trained now, or gone on with, or read from its folder below `runs`.

    `at_test` holds options that its training did not know. The seconds are those of the updates
    made in one go, scaled to all of them: a run that was killed does not know how long its other
    part took.
    """
    folder = runs / f"{recipe.model}_{recipe.ndim}d_{recipes.identity(recipe)}"
    held = folder / "cost.json"
    with _alone(folder):
        done = len(saved(folder))
        if done < recipe.steps:
            before = time.perf_counter()
            with _peak(device) as memory:
                train(recipe, folder, True, progress, str(device), data=data)
            seconds = (time.perf_counter() - before) * recipe.steps / (recipe.steps - done)
            _write(held, {"seconds": round(seconds, 3), "memory_gb": round(memory[0], 3)})
        spent = _json(held) if held.is_file() else {}
        if not isinstance(spent, dict):
            raise ValueError("runs holds a cost.json of something else, expected that of a run.")
        return Run(
            models.load(folder / "last.safetensors", **at_test or {}),
            spent.get("seconds"),
            spent.get("memory_gb"),
        )


def judge(
    method: Callable[[Tensor, Tensor], Registration],
    pairs: Sequence[tuple[Subject, Subject]],
    labels: Sequence[int] | None,
    device: torch.device,
    names: Mapping[int, str] = LABELS,
) -> Json:
    """What a method reaches on these pairs: the numbers of a row.

    Returns:
        Means over the pairs as `regkit.training.summary` gives them, but seconds as median (the
        first pair warms up); memory_gb, the peak while it registers, see `_peak`; dice_pairs (one a
        pair), dice_per_structure (by name), dice_sd_labels (the standard deviation over the labels
        of a pair, mean over the pairs), and stages: for each (u, v) Dice and percent of
        non-positive Jacobians of both, and the mean of |u - v| in voxels.
    """
    known = all(len(s.velocity) for pair in pairs for s in pair)
    rows, stages, peaks = [], [], []
    answer = Registration(torch.empty(0), torch.empty(0))

    def watched(moving: Tensor, fixed: Tensor) -> Registration:
        nonlocal answer
        with _peak(device) as memory:
            answer = method(moving, fixed)
        peaks.append(memory[0])
        return answer

    for moving, fixed in pairs:
        found = evaluate(watched, [(moving, fixed)], labels, True, known, device)[0]
        rows.append(found)
        chosen = list(found["dice_per_label"])
        split = [stage for stage in answer.stages if isinstance(stage, tuple)]
        stages.append([_stage(u, v, moving, fixed, chosen) for u, v in split])
    numbers: Json = summary(rows)
    numbers["memory_gb"] = max(peaks)
    numbers["seconds"] = statistics.median(row["seconds"] for row in rows)
    numbers["dice_pairs"] = [row["dice"] for row in rows]
    numbers["dice_sd_labels"] = _mean(
        [float(np.nanstd(list(row["dice_per_label"].values()))) for row in rows]
    )
    structures = sorted({label for row in rows for label in row["dice_per_label"]})
    numbers["dice_per_structure"] = {
        names.get(label, str(label)): _mean(
            [row["dice_per_label"].get(label, np.nan) for row in rows]
        )
        for label in structures
    }
    if stages[0]:
        numbers["stages"] = [
            {key: _mean([pair[key] for pair in of_one]) for key in of_one[0]}
            for of_one in zip(*stages, strict=True)
        ]
    return numbers


def _stage(u: Tensor, v: Tensor, moving: Subject, fixed: Subject, labels: list[int]) -> Json:
    """Of one pair (u, v)."""
    found = {"difference": float((u - v).norm(dim=1).mean())}
    for name, disp in (("u", u.cpu()), ("v", v.cpu())):
        warped = warp(moving.labels[None], disp, mode="nearest")
        dice = metrics.dice(warped, fixed.labels[None], labels)
        found[f"dice_{name}"] = float(dice.nanmean())
        found[f"folding_percent_{name}"] = float(metrics.folding_percent(disp))
    return found


def _mean(values: Sequence[float]) -> float:
    """Over those that are finite; NaN if none is."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def _method(
    run: Callable[[io.Image, io.Image], Tensor], affine: np.ndarray
) -> Callable[[Tensor, Tensor], Registration]:
    """A classical method, for images that lie on one grid."""

    def method(moving: Tensor, fixed: Tensor) -> Registration:
        disp = run(*(io.Image(x.cpu(), affine) for x in (moving, fixed))).to(moving)
        return Registration(warp(moving, disp), disp)

    return method


class Tests(NamedTuple):
    """What a table is measured on.

    pairs: (moving, fixed), or `RigidPair` where the measure is the motion. measure: of the table.
    labels: which count, None for all. names: of labels. categories: of given pairs.
    """

    pairs: Sequence[Any]
    measure: str = "dice"
    labels: Sequence[int] | None = None
    names: Mapping[int, str] = LABELS
    categories: Sequence[str] = ()


def _tests(
    table: Table,
    recipe: Recipe,
    pairs: int | None,
    source: str | os.PathLike | None,
    progress: bool = False,
) -> Tests:
    """The first of a table's test pairs (all: None), as its recipe says."""
    names = LABELS if source is None else prepared.structures(source) or LABELS
    if table.measure == "motion":
        moved = rigid_pairs(recipe, table.split, pairs, data=source, progress=progress)
        known = [moved.pair(i) for i in range(len(moved))]
        return Tests(known, table.measure, None, names)
    if table.measure == "landmarks":
        subjects(recipe, table.split, 1, source)  # that it is the set, and the size
        found = prepared.pairs(source or "", table.split)
        categories: Sequence[str] = found.categories  # type: ignore[attr-defined]
        return Tests(found[:pairs], table.measure, None, names, categories[:pairs])
    people, labels = evaluation_pairs(recipe, table.split, pairs, source, progress)
    for one in dict.fromkeys(s.name for pair in people for s in pair if not labels_of(s)):
        raise ValueError(f"data holds {one!r} without labels, expected labels: Dice needs them.")
    return Tests(people, table.measure, labels, names)


def _measured(
    method: Callable[[Tensor, Tensor], Registration], tests: Tests, device: torch.device
) -> Json:
    """What a method reaches on the test pairs of a table, by the table's measure."""
    if tests.measure == "dice":
        return judge(method, tests.pairs, tests.labels, device, tests.names)
    start = time.perf_counter()
    with _peak(device) as memory:
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
        "memory_gb": memory[0],
        f"{main}_pairs": [row[main] for row in rows],
    }


def _learned(
    plans: Sequence[Recipe],
    tests: Tests,
    device: torch.device,
    train_it: Callable[[Recipe], Run],
) -> Json:
    """A row of a model: means over its trainings, one a seed."""
    found, costs = [], []
    for plan in plans:
        run = train_it(plan)
        model = run.model.to(device)
        found.append(_measured(model, tests, device))
        costs.append((run.seconds, run.memory_gb))
    numbers = _average(found)
    times, sizes = zip(*costs, strict=True)
    main = MAIN[tests.measure]
    return {
        **numbers,
        f"{main}_seeds": [one[main] for one in found],
        f"{main}_pairs_seeds": [one[f"{main}_pairs"] for one in found],
        "parameters": models.parameter_count(model),
        "training_seconds": None if None in times else sum(times) / len(times),
        "training_memory_gb": None if None in sizes else max(sizes),
        "updates": plans[0].steps,
        "batch": plans[0].batch,
        "learning_rate": plans[0].lr,
        "smoothness": plans[0].weights.get("diffusion_u", plans[0].weights.get("diffusion")),
        "recipe": recipes.plan(plans[0]),
    }  # fmt: skip


def _average(found: Sequence[Any]) -> Any:
    """The mean of things of one structure, number by number."""
    first = found[0]
    if isinstance(first, dict):
        return {key: _average([one[key] for one in found]) for key in first}
    if isinstance(first, list):
        return [_average(parts) for parts in zip(*found, strict=True)]
    return _mean(found)


# ------------------------------------------------------------------------------------ one table


def run(
    name: str,
    budget: str | None = None,
    ndim: int | None = None,
    protocol: str | None = None,
    data: str | os.PathLike | None = None,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    pairs: int | None = None,
    similarity: str | None = None,
    lambda2: float | None = None,
    rows: Sequence[str] = (),
    test: str | os.PathLike | None = None,
    amplitude: float | None = None,
    runs: str | os.PathLike = "runs",
    out: str | os.PathLike | None = None,
    device: str = "auto",
    progress: bool = True,
    command: str = "",
) -> Path:
    """Run what is missing of a table, and write the file after each row.

    Args:
        name: one of `TABLES`.
        budget: by default that of the process.
        ndim: 2 or 3; by default 3 at budgets "gpu" and "paper", else 2; of a table in 2D alone 2.
        protocol: "atlas" (all to one fixed image, the paper's LPBA40) or "pairs" (any two, its
            OASIS), on the embedded population; by default the first that the table has.
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
        device, progress: as in `regkit.training.train`. command: what to say of how it was made.

    Returns:
        The file. Rows that do not exist yet or could not be run say so in `state`.

    Raises:
        ValueError: an unknown table, row, protocol or set, or settings that do not fit.
    """
    if name not in TABLES:
        raise unknown("table", name, TABLES)
    table, chosen = TABLES[name], choose_device(device)
    wanted = _wanted(table, rows)
    budget = budget or recipes.budget()
    shared = _at_precision(_protocol(table, budget, ndim, protocol, data), chosen)
    if similarity not in (None, *SIMILARITIES):
        raise ValueError(
            f"similarity is {similarity!r}, expected one of {', '.join(SIMILARITIES)}."
        )
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}, expected 1 or more.")
    shared = replace(
        shared, steps=steps or shared.steps, similarity=similarity or shared.similarity
    )
    if lambda2 is not None and table.measure == "motion":
        raise ValueError(f"lambda2 is {lambda2}, expected None: nothing bends in a rigid motion.")
    if not seeds:
        raise ValueError("seeds is empty, expected at least one.")
    if pairs is not None and pairs < 2:
        raise ValueError(f"pairs is {pairs}, expected 2 or more.")
    source, tested_on = data, shared
    kind = shared.name
    for prefix in table.recipes:
        kind = kind.removeprefix(f"{prefix}_")
    if test is not None:
        source, tested_on = test, replace(shared, data=prepared.description(test)["name"])
        kind += f"_on_{tested_on.data}"
    if amplitude is not None:
        if amplitude < 0 or source is not None:
            raise ValueError(
                f"amplitude is {amplitude}, expected 0 or more, and the embedded population."
            )
        tested_on = replace(shared, amplitude=amplitude)
        kind += f"_at_{amplitude:g}"
    if source is None:
        pairs = pairs or (2 if budget == "smoke" else PAIRS)
    for folder, plan, split in ((data, shared, "train"), (test, tested_on, table.split)):
        if folder is not None:  # before hours of work, a look at everybody's headers
            subjects(plan, split, 1, folder)
            adapted(plan, folder)
    if source is not None:
        _tests(table, tested_on, 2, source)
    file = Path(out or Path("results") / f"{name}_{kind}_{budget}.json")
    io.check_writable(file.parent)
    if file.is_dir():
        raise ValueError("out is a folder, expected the name of a JSON file.")
    # ANTs gets as many cores as PyTorch
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", str(torch.get_num_threads()))

    known: list[Tests] = []

    def tested() -> Tests:
        if not known:
            known.append(_tests(table, tested_on, pairs, source, progress))
        return known[0]

    paper_set = next((one for one in PAPER_SETS if shared.data.startswith(one)), None)
    said = {
        "table": name,
        "title": table.title,
        "note": table.note,
        "paper": table.paper,
        "paper_set": paper_set or (table.atlas if shared.atlas else table.pairs),
        "data": shared.data,
        "tested_on": tested_on.data,
        "amplitude": tested_on.amplitude,
        "split": table.split,
        "made": _made(command, chosen),
    }
    _read(file)  # that it is one of ours
    for row in wanted:

        def train_it(plan: Recipe, row: Row = row) -> Run:
            return trained(plan, Path(runs), chosen, data, progress, row.at_test)

        plans = []
        if row.method in models.names():
            planned = recipe_of(row, shared, budget, lambda2, table.alike)
            plans = [replace(planned, seed=seed) for seed in seeds]
        key = _key(row, plans, tested_on, table.split, pairs, chosen)
        held = {one["label"]: one for one in _read(file)}.get(row.label, {})
        if held.get("key") == key and held["state"] == "done":
            continue
        found: Json = {"state": "done"}
        if not exists(row.method):
            found = {"state": "not yet"}
        else:
            tests = tested()
            try:
                if plans:
                    found |= _learned(plans, tests, chosen, train_it)
                    found["seeds"] = list(seeds)
                else:
                    found |= _optimised(row.method, tests)
            except (ValueError, ImportError) as error:
                found = {"state": f"left out: {error}"}
        fresh = {"label": row.label, "key": key, **made_now(chosen), **_rounded(found)}
        if row.note:
            fresh["note"] = row.note
        with _alone(Path(runs) / file.name):
            others = [one for one in _read(file) if one["label"] != row.label]
            _store(file, said, table, [*others, fresh])
    return file


def _wanted(table: Table, rows: Sequence[str]) -> list[Row]:
    """The rows of these labels, methods or numbers; all if none is named."""
    chosen = []
    for asked in rows:
        found = [
            row
            for number, row in enumerate(table.rows, 1)
            if asked.lower() in (str(number), row.label.lower(), row.method)
        ]
        if not found:
            raise unknown("rows", asked, [row.label for row in table.rows])
        chosen += [row for row in found if row not in chosen]
    return chosen or list(table.rows)


def left_out(name: str, held: Json, rows: Sequence[str] = ()) -> list[str]:
    """Labels of the rows, of those that were asked for, which an error kept out of a results file.

    Args:
        name: of the table. held: its results file. rows: as in `run`.
    """
    asked = {row.label for row in _wanted(TABLES[name], rows)}
    return [
        row["label"]
        for row in held["rows"]
        if row["label"] in asked and row["state"].startswith("left out")
    ]


def tables_for(
    budget: str | None = None,
    ndim: int | None = None,
    protocol: str | None = None,
    data: str | os.PathLike | None = None,
) -> list[str]:
    """The tables that have a protocol for these settings, which are those of `run`.

    Raises:
        ValueError: there is no such table, or one of the settings is none that exists.
    """
    found: list[str] = []
    for name, table in TABLES.items():
        with suppress(_NoProtocol):
            _protocol(table, budget or recipes.budget(), ndim, protocol, data)
            found.append(name)
    if not found:
        what = "these settings" if data is None else repr(prepared.description(data)["name"])
        raise ValueError(
            f"table is 'all' and none has a protocol for {what}, expected one that has."
        )
    return found


class _NoProtocol(ValueError):
    """A table has no protocol for what is asked."""


def _protocol(
    table: Table,
    budget: str,
    ndim: int | None,
    protocol: str | None,
    data: str | os.PathLike | None,
) -> Recipe:
    """The recipe that says what all rows share."""
    if protocol not in ("atlas", "pairs", None):
        raise ValueError(f"protocol is {protocol!r}, expected 'atlas' or 'pairs'.")
    if ndim not in (None, 2, 3):
        raise ValueError(f"ndim is {ndim}, expected 2 or 3.")
    prefixes = tuple(f"{prefix}_" for prefix in table.recipes)
    ours = [recipes.get(n, budget) for n in recipes.names() if n.startswith(prefixes)]
    sets: dict[str, Recipe] = {}
    embedded: dict[tuple[int, str], Recipe] = {}
    for recipe in ours:
        if recipe.data != "population":
            sets.setdefault(recipe.data, recipe)
        else:
            embedded[recipe.ndim, "atlas" if recipe.atlas else "pairs"] = recipe
    listed = ", ".join(sorted(sets))
    if data is not None:
        held = prepared.description(data)["name"]
        if not sets:
            raise _NoProtocol(
                f"data holds the set {held!r}, expected none: this table runs on the embedded "
                "population alone."
            )
        if held not in sets:
            raise _NoProtocol(f"data holds the set {held!r}, expected one of {listed}.")
        return sets[held]
    if not embedded:
        raise _NoProtocol(
            f"data is not given, expected the folder of a prepared set, one of {listed}."
        )
    axes = {d for d, _ in embedded}
    ndim = ndim or (max(axes) if budget in ("gpu", "paper") else min(axes))
    asked = (ndim, protocol or ("atlas" if (ndim, "atlas") in embedded else "pairs"))
    if asked not in embedded:
        listed = ", ".join(f"{d} with {p!r}" for d, p in sorted(embedded))
        raise _NoProtocol(
            f"ndim is {asked[0]} and protocol {protocol!r}, expected of this table {listed}."
        )
    return embedded[asked]


def _at_precision(recipe: Recipe, device: torch.device) -> Recipe:
    """On a GPU in half precision."""
    if device.type == "cuda":  # bfloat16 came with compute capability 8
        half = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
        recipe = replace(recipe, precision=half)
    return recipe


def _key(
    row: Row,
    plans: Sequence[Recipe],
    shared: Recipe,
    split: str,
    pairs: int | None,
    device: torch.device,
) -> str:
    """Of everything that a row depends on."""
    what: list[Any] = [recipes.identity(plan) for plan in plans] or [row.method, shared.shape]
    what += [dict(row.at_test)] if row.at_test else []
    on = [shared.data, shared.atlas, shared.contrast, shared.amplitude, split, pairs, device.type]
    return hashlib.sha256(json.dumps([*what, *on]).encode()).hexdigest()[:12]


def _optimised(method: str, tests: Tests) -> Json:
    """A row of a classical method, on the CPU."""
    function = _classical(method)
    assert function is not None
    method_here = _method(function, tests.pairs[0][1].affine)
    numbers = _measured(method_here, tests, torch.device("cpu"))
    return {**numbers, "threads": int(os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"])}


# ------------------------------------------------------------------------------------ the paper


def _json(file: Path) -> Any:
    """What a file holds; None where it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def _read(file: Path) -> list[Json]:
    """The rows that a results file holds."""
    if not file.is_file():
        return []
    held = _json(file)
    rows = held.get("rows") if isinstance(held, dict) else None
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise ValueError(
            f"out is {file.name!r}, which holds something else, expected a results file or none."
        )
    return rows


def _is_row(row: Any) -> bool:
    """Whether what `compare` and `as_text` look at is there and of the right kind."""
    if not isinstance(row, dict) or not all(
        isinstance(row.get(k), str) for k in ("label", "state")
    ):
        return False
    pairs, seeds = row.get("dice_pairs") or [], row.get("dice_pairs_seeds") or [[]]
    if not isinstance(pairs, list) or not isinstance(seeds, list):
        return False
    if not all(isinstance(part, list) for part in seeds):
        return False
    columns = [column for of_one in (*COLUMNS.values(), COSTS) for column in of_one]
    single = [row.get(key) for _, key, _ in columns]
    whole = [row.get(key) for _, key, form in columns if form == "d"]
    if not all(one is None or isinstance(one, int) for one in whole):
        return False
    numbers = [*single, *pairs, *(one for part in seeds for one in part)]
    return len({len(part) for part in seeds}) == 1 and all(
        one is None or (isinstance(one, int | float) and not isinstance(one, bool))
        for one in numbers
    )


def _store(file: Path, said: Json, table: Table, rows: Sequence[Json]) -> None:
    lines = compare(table, rows, said["paper_set"])
    _write(file, {**said, "order": orders(lines), "rows": lines})


def _write(file: Path, value: Json) -> None:
    with io.staged(file.parent) as folder:
        (folder / file.name).write_text(json.dumps(value, indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Five digits; what is not a number (no such label, distance or truth) is null."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value


@contextmanager
def _alone(what: Path) -> Iterator[None]:
    """Wait until no other process works on this; a process that dies lets go of it."""
    what.parent.mkdir(parents=True, exist_ok=True)
    with alone(what.parent, "runs", work=what.name):
        yield


@contextmanager
def _peak(device: torch.device) -> Iterator[list[float]]:
    """The peak memory of what is done inside, GB, in a list of one number.

    On a GPU what PyTorch had allotted there; else what the whole process held, with PyTorch itself
    and the images (where the system, other than Linux, cannot forget an earlier peak, that one).
    """
    found = [float("nan")]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    yield found
    cuda = device.type == "cuda"
    found[0] = torch.cuda.max_memory_allocated(device) / 1e9 if cuda else peak_memory()


def _made(command: str, device: torch.device) -> Json:
    """How, and with what."""
    return {
        "command": command,
        "versions": {
            "python": platform.python_version(),
            "regkit": regkit.__version__,
            "torch": torch.__version__,
        },
    } | made_now(device)
