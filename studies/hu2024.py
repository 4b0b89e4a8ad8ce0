"""Rigid registration as in Hu (2024), beside the classical tools: writes results/hu2024_cpu.json.

    python studies/hu2024.py

Every method gets the same pairs: heads of the embedded population that no network has seen (seed
2), each beside itself, turned and shifted by a known motion, 200x200 pixels of 1 mm. Three sets: T1
within 5 degrees and 5 pixels; between T1, T2 and Flair within the same; T1 within 30 degrees and 20
pixels. A row holds the errors of a method on a set, its success rate (less than half a degree and
half a pixel), the Dice of the labels it moves, and its time per pair.

Each row is written when it is there, and a row that is there is not measured again, unless its
weights, the number of pairs or of threads are others: a run that was stopped goes on. Alone on the
machine, please.

The affine network is not shipped. Ours learned with

    regkit train --recipe affine_resnet34_2d --budget cpu --steps 4000 -o affine

and came in with `--affine`, the last weights, in half precision (`models.save(..., half=True)`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from torch import Tensor

from regkit import classical, io, metrics, models
from regkit.data import RigidPair, RigidPairs, heads
from regkit.record import Row, Rows, fingerprint, rounded
from regkit.spatial import affine_to_disp, warp

OUT = common.RESULTS / "hu2024_cpu.json"
SHAPE = (200, 200)
SEED = 2  # of the heads and of the motions; networks learn from 0 and are chosen by 1
HEADS = 50
BATCH = 32
STEPS = 10  # of descent after a network
SUCCESS = (0.5, 0.5)  # degrees, pixels

Method = Callable[[Tensor, Tensor], Tensor]  # two (1, 1, H, W) -> theta (1, 2, 3)


@dataclass(frozen=True)
class Set:
    """Pairs to measure on. weights: shipped for them. similarity: what our descent minimises."""

    contrasts: tuple[str, ...]
    angle: float
    shift: float
    similarity: str
    weights: str


SETS = {
    "t1": Set(("t1",), 5, 5, "ncc", "rigid_resnet34_2d"),
    "contrasts": Set(("t1", "t2", "flair"), 5, 5, "mutual_information", "rigid_resnet34_2d_multi"),
    "wide": Set(("t1",), 30, 20, "mutual_information", "rigid_resnet34_2d_wide"),
}


@dataclass(frozen=True)
class Entry:
    """One row to be: which method on which set, and how to get it.

    make: gives the method; FileNotFoundError or ImportError where something is missing.
    weights: a file or the name of shipped weights, of networks. timed_only: it has learned nothing.
    """

    set: str
    method: str
    make: Callable[[], Method]
    weights: str | None = None
    timed_only: bool = False


# ------------------------------------------------------------------------------------ the methods


class Network:
    """A model as method; it stays in memory, so that only its answer is timed."""

    def __init__(self, model: models.RegistrationModel):
        self.model = model.eval()

    @torch.no_grad()
    def __call__(self, moving: Tensor, fixed: Tensor) -> Tensor:
        theta = self.model(moving, fixed).theta
        if theta is None:
            raise ValueError(f"{self.model.name!r} has no theta, expected a rigid or affine model.")
        return theta


def network(weights: str) -> Method:
    """A trained network: shipped weights by name, or a file."""
    return Network(models.load(weights))


def refined(weights: str, similarity: str) -> Method:
    """A network, and some steps of descent from its answer."""
    first = network(weights)

    def method(moving: Tensor, fixed: Tensor) -> Tensor:
        theta = first(moving, fixed)
        return classical.fit(
            moving, fixed, "rigid", similarity, theta, iterations=STEPS, search=False, levels=1
        )

    return method


def twin(kind: str, similarity: str) -> Method:
    """Our own descent, from nothing."""
    return lambda moving, fixed: classical.fit(moving, fixed, kind, similarity)


def peer(align: Callable[..., Any]) -> Method:
    """SimpleITK or ANTs, on images of 1 mm."""

    def method(moving: Tensor, fixed: Tensor) -> Tensor:
        a, b = (io.Image(x, torch.eye(4, dtype=torch.float64).numpy()) for x in (moving, fixed))
        return b.grid.theta_to(a.grid, align(a, b, "rigid")).float()

    return method


def ants() -> Method:
    """ANTs; ImportError where it is not installed."""
    import ants  # noqa: F401

    return peer(classical.ants.align)


def untrained() -> Method:
    """The network at the paper's width, for its time."""
    return Network(models.create("rigid_resnet34", ndim=2, width=64))


def entries(
    name: str, threads: int, affine: str | None = None, full: str | None = None
) -> list[Entry]:
    """The rows of a set.

    Args:
        name: of the set.
        threads: of SimpleITK.
        affine, full: weights of the affine network and of the paper's width, a file or a name.
    """
    one = SETS[name]
    row = partial(Entry, name)
    rows = [
        row("network", partial(network, one.weights), one.weights),
        row(f"network + {STEPS} steps", partial(refined, one.weights, one.similarity), one.weights),
    ]
    if name == "t1":  # where it is asked what 3 more degrees of freedom, and a wide network, give
        affine = affine or "affine_resnet34_2d"
        rows += [
            row("network, width 64", partial(network, full), full)
            if full
            else row("network, width 64", untrained, timed_only=True),
            row("affine network", partial(network, affine), affine),
            row("affine descent", partial(twin, "affine", one.similarity)),
        ]
    align = partial(classical.sitk.align, threads=threads)
    return [
        *rows,
        row("descent", partial(twin, "rigid", one.similarity)),
        row("SimpleITK, correlation", partial(peer, partial(align, metric="correlation"))),
        row("SimpleITK, Mattes", partial(peer, align)),
        row("SimpleITK, Mattes, 1 % of the pixels", partial(peer, partial(align, sampling=0.01))),
        row("ANTs", ants),
    ]


# ---------------------------------------------------------------------------------- the measuring


def dice(pair: RigidPair, theta: Tensor) -> float:
    """Mean Dice over the labels of the head, after the moving ones went through `theta`."""
    disp = affine_to_disp(theta, pair.fixed.image.shape[1:])
    moved = warp(pair.moving.labels[None], disp, mode="nearest")
    per_label = metrics.dice(moved, pair.fixed.labels[None])
    return float(per_label[torch.isfinite(per_label)].mean())


def errors(thetas: Sequence[Tensor], pairs: Sequence[RigidPair]) -> Row:
    """How far the motions found are from the true ones."""
    answers, truth = torch.cat(list(thetas)), torch.cat([pair.theta for pair in pairs])
    turn = metrics.rotation_error(answers, truth)
    shift = metrics.translation_error(answers, truth)
    good = (turn < SUCCESS[0]) & (shift < SUCCESS[1])
    return {
        "rotation_median": float(turn.median()),
        "rotation_mean": float(turn.mean()),
        "rotation_largest": float(turn.max()),
        "shift_median": float(shift.median()),
        "shift_mean": float(shift.mean()),
        "shift_largest": float(shift.max()),
        "success": float(good.double().mean()),
        "dice": sum(dice(p, t) for p, t in zip(pairs, answers[:, None])) / len(pairs),
    }


def images(pairs: Sequence[RigidPair], device: str = "cpu") -> tuple[Tensor, Tensor]:
    """(N, 1, H, W) moving and fixed."""
    moving = torch.stack([pair.moving.image for pair in pairs])
    return moving.to(device), torch.stack([pair.fixed.image for pair in pairs]).to(device)


def clock(method: Method, moving: Tensor, fixed: Tensor) -> tuple[Tensor, float]:
    """The answer, and how long it took."""
    start = time.perf_counter()
    theta = method(moving, fixed)
    if moving.is_cuda:
        torch.cuda.synchronize()
    return theta, time.perf_counter() - start


def measure(entry: Entry, pairs: Sequence[RigidPair]) -> Row:
    """The numbers of one row.

    `seconds` is the median over the pairs, one at a time; `seconds_batch_32` is per pair, the best
    of three batches of 32. The first call is not counted.
    """
    method = entry.make()
    row: Row = {}
    moving, fixed = images(pairs)
    method(moving[:1], fixed[:1])
    results = [clock(method, a, b) for a, b in zip(moving[:, None], fixed[:, None])]
    row["seconds"] = float(torch.tensor([seconds for _, seconds in results]).median())
    if not entry.timed_only:
        row |= errors([theta for theta, _ in results], pairs)
    if isinstance(method, Network):
        row["parameters"] = models.parameter_count(method.model)
        row["seconds_batch_32"] = batched(method, pairs, "cpu")
        if torch.cuda.is_available():
            method.model.cuda()
            moving, fixed = images(pairs, "cuda")
            method(moving[:1], fixed[:1])
            on_gpu = [clock(method, a, b)[1] for a, b in zip(moving[:, None], fixed[:, None])]
            row["seconds_gpu"] = float(torch.tensor(on_gpu).median())
            row["seconds_gpu_batch_32"] = batched(method, pairs, "cuda")
    return row


def batched(method: Method, pairs: Sequence[RigidPair], device: str) -> float:
    """Seconds per pair in batches of 32."""
    batch = images([pairs[i % len(pairs)] for i in range(BATCH)], device)
    return min(clock(method, *batch)[1] for _ in range(4)) / BATCH


# --------------------------------------------------------------------------------------- the file


def run(
    out: Path = OUT,
    pairs: int = 100,
    threads: int = 2,
    sets: Sequence[str] = tuple(SETS),
    affine: str | None = None,
    full: str | None = None,
    fresh: bool = False,
) -> Row:
    """Measure what is not there yet, and write the file after each row. Arguments as in `main`."""
    common.check_names("sets", sets, SETS)
    if pairs < 1 or threads < 1:
        raise ValueError(f"pairs is {pairs} and threads {threads}, expected at least 1 of each.")
    common.use_threads(threads)
    planned = {name: entries(name, threads, affine, full) for name in SETS}
    order = [(name, entry.method) for name in SETS for entry in planned[name]]

    def as_planned(rows: list[Row]) -> Row:
        places = {(row["set"], row["method"]): row for row in rows}
        return {"rows": [places[place] for place in order if place in places]}

    fields = {"made": common.made(__file__)}
    rows = Rows(out, ("set", "method"), fields, fresh=fresh, derive=as_planned)
    for name in sets:
        settings = [_settings(entry, pairs, threads) for entry in planned[name]]
        if all(rows.has(one) for one in settings):
            continue
        drawn = draw(SETS[name], pairs)
        described = {row["set"]: row for row in rows.table.get("sets", [])}
        described[name] = describe(name, drawn)
        rows.put(sets=[described[one] for one in SETS if one in described])
        for entry, one in zip(planned[name], settings, strict=True):
            title = f"{name}: {entry.method}"
            common.measure_once(rows, one, title, partial(measure, entry, drawn), _in_short)
    return rows.table


def _settings(entry: Entry, pairs: int, threads: int) -> Row:
    """What a row depends on."""
    weights = entry.weights
    return {
        "set": entry.set,
        "method": entry.method,
        "pairs": pairs,
        "threads": threads,
        "weights": None if weights is None else Path(weights).name,
        "sha256": None if weights is None else fingerprint(weights),
        "timed_only": entry.timed_only,
    }


def draw(one: Set, pairs: int) -> list[RigidPair]:
    """The pairs of a set: the same for the same number of them."""
    subjects = [heads(min(HEADS, pairs), SHAPE, SEED, contrast) for contrast in one.contrasts]
    drawn = RigidPairs(subjects, pairs, SEED, one.angle, one.shift)
    return [drawn.pair(i) for i in range(pairs)]


def describe(name: str, pairs: Sequence[RigidPair]) -> Row:
    """A set, what it is before registration, and the Dice that the true motion reaches."""
    one = SETS[name]
    before = errors([torch.eye(2, 3)[None]] * len(pairs), pairs)
    ceiling = sum(dice(pair, pair.theta) for pair in pairs) / len(pairs)
    return {
        "set": name,
        "contrasts": list(one.contrasts),
        "angle": one.angle,
        "shift": one.shift,
        "shape": list(SHAPE),
        "seed": SEED,
        "pairs": len(pairs),
        "heads": min(HEADS, len(pairs)),
        **rounded({f"{key}_before": value for key, value in before.items()}),
        "dice_ceiling": round(ceiling, 4),
    }


def _in_short(row: Row) -> str:
    text = f"{1e3 * row['seconds']:.1f} ms"
    if "success" in row:
        text = (
            f"{row['rotation_median']:.3f} degrees, {row['shift_median']:.3f} pixels, "
            f"success {row['success']:.0%}, {text}"
        )
    return text


def main(
    pairs: Annotated[int, typer.Option(help="Pairs in each set.")] = 100,
    threads: common.Threads = 2,
    sets: Annotated[list[str] | None, typer.Option(help="Only this set; may be repeated.")] = None,
    affine: Annotated[str | None, typer.Option(help="Weights of the affine network.")] = None,
    full: Annotated[str | None, typer.Option(help="Weights of the network of width 64.")] = None,
    out: common.Out = OUT,
    fresh: common.Fresh = False,
) -> None:
    """Measure the networks of Hu (2024) and the classical tools on the same pairs."""
    run(out, pairs, threads, sets or tuple(SETS), affine, full, fresh)


if __name__ == "__main__":
    common.start(main)
