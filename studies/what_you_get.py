"""What each effort of the engine brings, and what it costs: writes results/what_you_get.json.

    python studies/what_you_get.py

Every method gets the same pair after the same affine registration, on the grid of the fixed image,
with one thread: the engine at its three efforts, the start by a network that `auto` takes, and the
peers SyN, greedy and elastix. The images are prepared as `regkit.register` does it, the moving one
resampled through the affine map, intensities scaled to [0, 1]; the clock runs while they are, but
not while the answer is judged. Labels and landmarks go through the whole map, once.

The sets:

- "oasis": the pair of `studies/real_scans.py`, 13 structures. "slabs": the first of its children.
- "population": two synthetic heads of 1.1 mm, whose true map is known; "population_2d": slices.
- "oasis_slices": a coronal pair, 19 structures. "slices": one axial slice each of the children.
- "lung": CT of a lung at two visits, 26 landmarks, of which one is an outlier (`studies/lung.py`).
- "prostates": MR to ultrasound, the first four patients; the gland is the only label. Here
  every method compares by what it has for two contrasts.

A row holds a method on a pair: Dice, the mean over the labels that both images hold; error of the
landmarks in mm, or of the map where the truth is known; percent of the voxels where it folds;
seconds of the processor (all threads) and of the clock after the affine registration, that itself
has a row; and memory, the most that the process held beyond what it held before, the images on
their common grid included. Each method lives in a process of its own, which has seen a tiny pair
before: loading its libraries does not count. The methods take turns on each pair, so that a busy
machine slows all of them. The summary has the mean over the pairs of a set, the median of seconds
and memory.

A row that is there is not measured again. `--fresh` measures those of the chosen sets and methods
again; when it redoes "affine", the others have to follow.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import common
import numpy as np
import real_scans
import torch
import typer
from lung import OUTLIER
from torch import Tensor

from regkit import classical, io, metrics, registration
from regkit.data import samples
from regkit.data.pairs import chain
from regkit.data.population import population, true_displacement
from regkit.data.subject import Subject
from regkit.record import Row, Rows, fingerprint, peak_inside
from regkit.transform import Transform

OUT = common.RESULTS / "what_you_get.json"
SEED = 23  # of the population: no other study, table or constant has looked at it
SLICE = 9  # of a child's slab
SMALL = {2: (48, 56), 3: (32, 40, 32)}  # what a process sees first


@dataclass(frozen=True)
class Pair:
    """Two scans, and what their answer is judged by: labels, landmarks, or the true map.

    moving_points, fixed_points: (N, 3) mm, of which that of index OUTLIER is left out.
    truth: (1, d, *S), voxels, of two images on one grid.
    """

    moving: Subject
    fixed: Subject
    moving_points: np.ndarray | None = None
    fixed_points: np.ndarray | None = None
    truth: Tensor | None = None
    contrasts: int = 1

    @property
    def name(self) -> str:
        return f"{self.moving.name} to {self.fixed.name}"


# ---------------------------------------------------------------------------------------- the pairs


def _synthetic(shape: Sequence[int], people: int) -> list[Pair]:
    heads = population(people, shape, SEED)
    return [Pair(a, b, truth=true_displacement(a, b)) for a, b in zip(heads, heads[1:])]


def _oasis() -> list[Pair]:
    return [Pair(pair.moving, pair.fixed) for pair in real_scans.oasis()]


def _slabs() -> list[Pair]:
    return [Pair(pair.moving, pair.fixed) for pair in real_scans.slabs()[:4]]


def _slices() -> list[Pair]:
    children = samples.load_ptbp_slices((SLICE,))[:7]
    cut = [real_scans.prepared(child, mask=True) for child in children]
    return [Pair(a, b) for a, b in chain(cut)[:6]]


def _oasis_slices() -> list[Pair]:
    moving, fixed, labels = samples.load_oasis_slices()

    def known(scan: Subject) -> Subject:
        kept = torch.isin(scan.labels, torch.tensor(labels, dtype=scan.labels.dtype))
        return Subject(scan.name, scan.image, scan.labels * kept, scan.affine)

    return [Pair(known(moving), known(fixed))]


def _lung() -> list[Pair]:
    baseline, followup, points, partners = samples.load_lung()
    return [Pair(followup, baseline, partners, points)]


def _prostates() -> list[Pair]:
    return [Pair(mr, us, contrasts=2) for mr, us, *_ in samples.load_prostates()[:4]]


SETS: dict[str, Callable[[], list[Pair]]] = {
    "oasis": _oasis,
    "slabs": _slabs,
    "population": lambda: _synthetic((160, 192, 160), 2),
    "oasis_slices": _oasis_slices,
    "slices": _slices,
    "population_2d": lambda: _synthetic((160, 192), 5),
    "lung": _lung,
    "prostates": _prostates,
}


@lru_cache(maxsize=1)
def pairs(name: str) -> list[Pair]:
    """The pairs of a set; the last set is kept."""
    return SETS[name]()


# -------------------------------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Prepared:
    """A pair as `regkit.register` would work on it: (1, 1, *S) on the fixed grid, spacing in mm."""

    moving: Tensor
    fixed: Tensor
    spacing: tuple[float, ...]
    affine: np.ndarray
    contrasts: int


Method = Callable[[Pair, np.ndarray], Tensor]  # with fixed mm -> moving mm; (1, d, *S), voxels


def steps(pair: Pair, matrix: np.ndarray, method: str) -> registration._Work:
    """Where `register` stands after preparing the pair and the affine registration."""
    engine = registration._Engine("default", "auto", False, 0, True)
    scans = (pair.moving.nifti(), pair.fixed.nifti())
    work = registration._prepare(*scans, method, False, engine, "cpu")
    work.matrix = matrix
    return work


def auto(pair: Pair, matrix: np.ndarray) -> Tensor:
    """What `register` does by itself after that: a network, if it brings the pair closer, and the
    engine."""
    work = steps(pair, matrix, "auto")
    start = registration._on_fixed_grid(work, registration._answer(work, _quiet))
    return registration._improve(work, start, _quiet)


def _quiet(*_: Any) -> None:
    """No progress is shown."""


def alone(run: Callable[[Prepared], Tensor], pair: Pair, matrix: np.ndarray) -> Tensor:
    """The answer of one method to the images that `register` would show to it."""
    work = steps(pair, matrix, "greedy")
    grid = work.fixed.grid
    images = registration._on_grid(work, grid)
    return run(Prepared(*images, grid.spacing, grid.affine, pair.contrasts))


def engine(effort: str, pair: Prepared) -> Tensor:
    similarity = "lncc" if pair.contrasts == 1 else "mind"
    settings = {"spacing": pair.spacing, "similarity": similarity, "effort": effort}
    return classical.greedy(pair.moving, pair.fixed, **settings).disp


def syn(pair: Prepared) -> Tensor:
    """SyN with the settings of `register`."""
    images = [io.Image(x, pair.affine) for x in (pair.moving, pair.fixed)]
    metric = "correlation" if pair.contrasts == 1 else "mutual_information"
    return classical.ants.syn(*images, metric)


def syn_as_it_comes(pair: Prepared) -> Tensor:
    """SyN with the defaults of antspyx: mutual information, no step on the image's own voxels."""
    images = [io.Image(x, pair.affine) for x in (pair.moving, pair.fixed)]
    return classical.ants.syn(*images, "mutual_information", (40, 20, 0))


def greedy(pair: Prepared) -> Tensor:
    metric = "NCC" if pair.contrasts == 1 else "NMI"
    images = (pair.moving, pair.fixed)
    return classical.picsl.greedy(*images, spacing=pair.spacing, metric=metric).disp


def elastix(pair: Prepared) -> Tensor:
    metric = "correlation" if pair.contrasts == 1 else "mutual_information"
    images = (pair.moving, pair.fixed)
    return classical.elastix.bspline(*images, spacing=pair.spacing, metric=metric).disp


def still(pair: Pair, matrix: np.ndarray) -> Tensor:
    """No deformation."""
    return torch.zeros(1, pair.fixed.grid.ndim, *pair.fixed.grid.shape)


@dataclass(frozen=True)
class Entry:
    """A method: its name in the tables, and how it is run."""

    title: str
    run: Method


HEADERS, AFFINE, AUTO = "headers", "affine", "auto"
METHODS: dict[str, Entry] = {
    HEADERS: Entry("as the headers say", still),
    AFFINE: Entry("affine", still),
    "engine_fast": Entry("engine, fast", partial(alone, partial(engine, "fast"))),
    "engine_default": Entry("engine, default", partial(alone, partial(engine, "default"))),
    "engine_best": Entry("engine, best", partial(alone, partial(engine, "best"))),
    AUTO: Entry("network, then engine, default", auto),
    "greedy": Entry("greedy (PICSL)", partial(alone, greedy)),
    "syn": Entry("SyN (ANTs)", partial(alone, syn)),
    "syn_as_it_comes": Entry("SyN, ANTs' defaults", partial(alone, syn_as_it_comes)),
    "elastix": Entry("B-spline (elastix)", partial(alone, elastix)),
}


def affine(pair: Pair) -> np.ndarray:
    """(4, 4), fixed mm -> moving mm: the affine registration of `register`."""
    images = (io.from_nibabel(scan.nifti()) for scan in (pair.moving, pair.fixed))
    return classical.align(*images, "affine")


# ------------------------------------------------------------------------------------ the measuring


def judged(pair: Pair, matrix: np.ndarray, disp: Tensor) -> Row:
    """Dice, errors in mm and folding of the whole map."""
    moving, fixed = pair.moving, pair.fixed
    transform = Transform(fixed.grid, moving.grid, matrix, disp)
    row: Row = {"folding_percent": transform.folding_percent()}
    if pair.fixed_points is not None:
        apart = transform.points(pair.fixed_points) - pair.moving_points
        errors = np.linalg.norm(apart, axis=1)
        row["tre"] = float(np.delete(errors, OUTLIER).mean())
        return row
    held = [{*scan.labels.unique().tolist()} - {0} for scan in (moving, fixed)]
    moved = transform.moved(moving.labels[None], "nearest")
    scores = metrics.dice(moved, fixed.labels[None], sorted(held[0] & held[1]))
    row["dice"] = float(scores.mean())
    if pair.truth is not None:
        inside = fixed.labels[None] > 0
        error = metrics.endpoint_error(transform.voxels(), pair.truth, inside)
        row["error"] = float(error) * fixed.grid.spacing[0]  # voxels are cubes
    return row


def measured(pair: Pair, method: str, matrix: np.ndarray | None = None) -> Row:
    """A method on a pair. matrix: of the affine registration, which is found here without one."""
    _give_back()
    with peak_inside() as before:
        pass
    with peak_inside() as peak:
        clock, processor = time.perf_counter(), time.process_time()
        if method == AFFINE:
            matrix = affine(pair)
        elif method == HEADERS or matrix is None:
            matrix = np.eye(4)
        disp = METHODS[method].run(pair, matrix)
        processor, clock = time.process_time() - processor, time.perf_counter() - clock
    row = judged(pair, matrix, disp)
    row |= {"cpu_seconds": processor, "seconds": clock}
    row["memory_gb"] = max(0.0, peak.gigabytes - before.gigabytes)
    if method == AFFINE:
        row["matrix"] = [[float(f"{x:.8g}") for x in line] for line in matrix]
    return row


def _give_back() -> None:
    """Hand freed memory back to the system, where that can be asked for: it would hide a peak."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@cache
def ready(method: str, d: int) -> None:
    """Load what a method needs for images of d axes, once in a process."""
    common.use_threads(1)
    measured(Pair(*population(2, SMALL[d], SEED)), method)


def in_process(name: str, index: int, method: str, matrix: Any) -> Row:
    """A row, in the process of its method."""
    pair = pairs(name)[index]
    ready(method, pair.fixed.grid.ndim)
    return measured(pair, method, None if matrix is None else np.array(matrix))


# ----------------------------------------------------------------------------------------- the file


def run(
    out: Path = OUT,
    sets: Sequence[str] = tuple(SETS),
    methods: Sequence[str] = tuple(METHODS),
    most: int = 8,
    fresh: bool = False,
) -> Row:
    """Measure what is not there yet, and write the file after each row. Arguments as in `main`."""
    common.check_names("sets", sets, SETS)
    common.check_names("methods", methods, METHODS)
    if most < 1:
        raise ValueError(f"most is {most}, expected at least 1 pair.")
    common.use_threads(1)
    fields = {"made": common.made(__file__, seed=SEED)}
    rows = Rows(out, ("set", "pair", "method"), fields, derive=_summarised)
    with ExitStack() as stack:
        open_one = partial(ProcessPoolExecutor, 1, mp_context=get_context("spawn"))
        workers = {method: stack.enter_context(open_one()) for method in methods}
        for name in sets:
            for index, pair in enumerate(pairs(name)[:most]):
                for method in methods:
                    key: Row = {"set": name, "pair": pair.name, "method": method}
                    if fresh:
                        rows.remove(key)
                    if method == AUTO:
                        weights = registration.PREFERRED[pair.fixed.grid.ndim]
                        key["sha256"] = fingerprint(weights)
                    work = partial(_ask, workers[method], rows, name, index, pair.name, method)
                    title = f"{name}, {pair.name}: {method}"
                    missing = (ValueError, FileNotFoundError, ImportError)
                    common.measure_once(rows, key, title, work, _in_short, missing)
    return rows.table


def _ask(
    worker: ProcessPoolExecutor, rows: Rows, name: str, index: int, pair: str, method: str
) -> Row:
    """A row from the process of its method.

    Raises:
        ValueError: the affine registration of the pair is not there yet.
    """
    matrix = None
    if method not in (HEADERS, AFFINE):
        which = {"set": name, "pair": pair, "method": AFFINE}
        found = [r["matrix"] for r in rows.rows if which.items() <= r.items()]
        if not found:
            raise ValueError("The affine registration of this pair is missing, expected it before.")
        matrix = found[0]
    return worker.submit(in_process, name, index, method, matrix).result()


def _summarised(rows: list[Row]) -> Row:
    """Rows in the order of the tables, and a line for each method on a set."""
    order = {name: i for i, name in enumerate((*SETS, *METHODS))}
    rows = sorted(rows, key=lambda row: (order[row["set"]], order[row["method"]], row["pair"]))
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["method"]), []).append(row)
    lines = []
    for (name, method), group in groups.items():
        line: Row = {"set": name, "method": method, "title": METHODS[method].title}
        line["pairs"] = len(group)
        for key in ("dice", "tre", "error", "folding_percent"):
            if key in group[0]:
                line[key] = statistics.fmean(row[key] for row in group)
        for key in ("cpu_seconds", "seconds", "memory_gb"):
            line[key] = statistics.median(row[key] for row in group)
        lines.append(line)
    return {"rows": rows, "summary": lines}


def _in_short(row: Row) -> str:
    scores = {"Dice": "dice", "landmarks mm": "tre", "error mm": "error"}
    said = [f"{word} {row[key]:.4f}" for word, key in scores.items() if key in row]
    cost = f"{row['cpu_seconds']:.1f} CPU s, {row['memory_gb']:.2f} GB"
    return ", ".join([*said, f"folding {row['folding_percent']:.4f} %", cost])


def main(
    sets: Annotated[list[str] | None, typer.Option(help="Only this set; may be repeated.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method; may be repeated.")
    ] = None,
    most: Annotated[int, typer.Option(help="How many pairs of a set at most.")] = 8,
    out: common.Out = OUT,
    fresh: Annotated[
        bool, typer.Option(help="Measure the rows of these sets and methods again.")
    ] = False,
) -> None:
    """Measure what each effort brings and costs, beside SyN, greedy and elastix."""
    run(out, sets or tuple(SETS), method or tuple(METHODS), most, fresh)


if __name__ == "__main__":
    common.start(main)
