"""Does `regkit.checks.one_kind` notice two contrasts? Writes results/contrasts.json.

    python studies/contrasts.py

Pairs of which it is known whether they are of one contrast, each aligned as roughly as an affine
registration leaves it: two people of the population in every pair of its contrasts, and one person
in two of them; the open samples of real images. A row has what the test goes by and what it says;
the summary counts, for each set, false alarms (pairs of one kind taken for two) and misses.

The two limits of the test were chosen on the same real pairs, and on other people of the population
(seed 7). Pairs with contrasts drawn at random are left out: two of them may be much alike. The MR of
two prostates are not aligned, centre on centre alone; the slabs lie as their source has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import common
import modalities
import numpy as np
import torch
from torch import Tensor

from regkit import checks, classical, io
from regkit.data import samples
from regkit.data.pairs import Subject
from regkit.data.population import CONTRASTS, population
from regkit.record import Row, Rows
from regkit.spatial import affine_to_disp, warp
from regkit.transform import resample

OUT = common.RESULTS / "contrasts.json"
SEED = 11  # of the population
SHAPES = ((96, 112), (64, 80, 64))


@dataclass(frozen=True)
class Pair:
    """Two images (1, 1, *S) in [0, 1] on one grid, and whether they are of one contrast."""

    set: str
    name: str
    one_kind: bool
    moving: Tensor
    fixed: Tensor


def scaled(image: Tensor) -> Tensor:
    """(1, *S) -> (1, 1, *S) in [0, 1], as `regkit.register` shows images to a method."""
    bottom, top = np.percentile(image.numpy(), (0.5, 99.5))
    scaled: Tensor = ((image.float() - bottom) / (top - bottom)).clamp(0, 1)
    return scaled[None]


def people() -> list[Pair]:
    """Of the population, every pair of contrasts: two people, and one person."""
    pairs = []
    for shape, first in itertools.product(SHAPES, (0, 2, 4)):
        images = {
            (index, contrast): population([index], shape, SEED, contrast=contrast)[0].image[None]
            for index, contrast in itertools.product((first, first + 1), CONTRASTS)
        }
        for a, b in itertools.product(CONTRASTS, repeat=2):
            name = f"{len(shape)}D, {first} {a} to "
            other = images[first + 1, b]
            pairs.append(
                Pair("two people", f"{name}{first + 1} {b}", a == b, images[first, a], other)
            )
            if a < b:
                same = images[first, b]
                pairs.append(Pair("one person", f"{name}{b}", False, images[first, a], same))
    return pairs


def child() -> list[Pair]:
    """T1, FA and CBF of one child, as they are and after a warp of 4 mm."""
    images = modalities.child().images
    shape = images["t1"].shape[2:]
    pairs = []
    for a, b in itertools.product(images, repeat=2):
        if a != b:
            pairs.append(Pair("child", f"{a} to {b}", False, images[a], images[b]))
        for seed in (100, 101):
            _, inverse = modalities.known_map("smooth", seed, shape)
            name = f"{a} to {b}, warped {seed}"
            pairs.append(Pair("child", name, a == b, warp(images[a], inverse), images[b]))
    return pairs


def t1_scans() -> list[Pair]:
    """T1 of two people: OASIS in 3D and in slices, children's slabs, the slices of ANTs."""
    moving, fixed = samples.load_oasis_pair()
    both = [(moving, fixed), samples.load_oasis_slices()[:2]]
    pairs = [_of("T1 of two people", a, b) for a, b in both]
    for a, b in itertools.pairwise(samples.load_oasis_stack()[::4]):
        pairs.append(Pair("T1 of two people", f"stack {len(pairs)}", True, a[None], b[None]))
    children = samples.load_ptbp_slabs()
    pairs += [_of("T1 of two people", a, b) for a, b in itertools.pairwise(children)]
    for a, b in itertools.combinations(samples.load_ants_slices().values(), 2):
        images = scaled(a.image), scaled(b.image)
        disp = affine_to_disp(classical.fit(*images, "affine", "ncc"), images[1].shape[2:])
        name = f"{a.name} to {b.name}"
        pairs.append(Pair("T1 of two people", name, True, warp(images[0], disp), images[1]))
    return pairs


def _of(title: str, a: Subject, b: Subject) -> Pair:
    """Two scans that share a grid."""
    return Pair(title, f"{a.name} to {b.name}", True, scaled(a.image), scaled(b.image))


def brainweb() -> list[Pair]:
    """T1 and proton density of one simulated head."""
    t1, pd = (scaled(samples.load_brainweb()[name].image) for name in ("t1", "pd"))
    return [
        Pair("BrainWeb", "t1 to pd", False, t1, pd),
        Pair("BrainWeb", "pd to t1", False, pd, t1),
    ]


def prostates() -> list[Pair]:
    """MR and ultrasound of a patient, and the MR of two, centre on centre."""
    patients = modalities.patients()
    pairs = [Pair("prostate", f"{p.name}, MR to US", False, p.moving, p.fixed) for p in patients]
    for a, b in itertools.pairwise(patients):
        name = f"{a.name} to {b.name}, MR"
        pairs.append(Pair("prostate", name, True, a.moving, b.moving))
    return pairs


def lung() -> list[Pair]:
    """CT of one lung at two visits, after affine registration."""
    moving, fixed = samples.load_lung()[:2]
    matrix = classical.align(*(io.from_nibabel(s.nifti()) for s in (moving, fixed)), "affine")
    moved = resample(moving.image[None], moving.grid, fixed.grid, matrix=matrix)
    return [Pair("lung CT", "baseline to follow-up", True, scaled(moved[0]), scaled(fixed.image))]


SETS: dict[str, Callable[[], list[Pair]]] = {
    "people": people,
    "child": child,
    "t1_scans": t1_scans,
    "brainweb": brainweb,
    "prostates": prostates,
    "lung": lung,
}


def measured(pair: Pair) -> Row:
    """What the test goes by, and what it says."""
    correlation, distance = checks.likeness(pair.moving, pair.fixed)
    found = checks.one_kind(pair.moving, pair.fixed)
    return {"correlation": correlation, "distance": distance, "found": found}


def _counted(rows: Sequence[Row]) -> Row:
    """Pairs and errors of each set, and the ends of both numbers."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["one_kind"]), []).append(row)
    lines = []
    for (title, one), group in groups.items():
        line: Row = {"set": title, "one_kind": one, "pairs": len(group)}
        line["wrong"] = sum(row["found"] != one for row in group)
        for name in ("correlation", "distance"):
            line[name] = [f([row[name] for row in group]) for f in (min, max)]
        lines.append(line)
    return {"summary": lines}


def run(out: common.Out = OUT, threads: int = 1, fresh: bool = False) -> Row:
    """Measure what is not there yet, and write the file after each row. Arguments as in `main`."""
    common.use_threads(threads)
    torch.manual_seed(0)
    settings = {"alike": checks.ALIKE, "apart": checks.APART, "seed": SEED, "shapes": SHAPES}
    fields = {"made": common.made(__file__, seed=SEED), "settings": settings}
    rows = Rows(out, ("set", "name"), fields, fresh=fresh, derive=_counted)
    for make in SETS.values():
        try:
            pairs = make()
        except FileNotFoundError as error:
            common.typer.echo(str(error), err=True)
            continue
        for pair in pairs:
            key = {"set": pair.set, "name": pair.name, "one_kind": pair.one_kind}
            title = f"{pair.set}: {pair.name}"
            common.measure_once(rows, key, title, lambda p=pair: measured(p), str)
    return rows.table


def main(threads: common.Threads = 1, out: common.Out = OUT, fresh: common.Fresh = False) -> None:
    """Measure whether two contrasts are noticed."""
    run(out, threads, fresh)


if __name__ == "__main__":
    common.start(main)
