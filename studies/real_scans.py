"""Real scans that no network has seen: writes results/real_scans.json.

    python studies/real_scans.py

Two sets, both of the open samples (`regkit data get oasis_3d`, `regkit data get ptbp_brain`):

- "oasis": one pair, the OASIS brain vxm_subject to the OASIS brain c2fvit_A, 13 structures (left
  and right in one), see `load_oasis_heads`. Both come without skull.
- "slabs": 25 children, each registered to the next, the last one to the first; T1, 18 axial slices
  of 1 mm, 4 tissues. The segmentation is automatic and driven by intensity: its Dice rewards
  matching tissue, not anatomy alone. Read it with the folding. At the 2.2 mm of
  its training a network would have 8 slices; `register` shows it slabs in voxels of half that size.

What is done to the scans first: the axes are turned to right, front and top (no resampling); the
slabs' skull is taken away, by the union of the four tissues; every scan is cut to the box of its
brain and 10 mm around it, where there are any; and intensities are scaled to [0, 1], a thousandth
cut off at the top. A network pads what it gets to a multiple of its divisor.

Every method starts from the same affine registration, `regkit.register` with method "affine" (by
mutual information), whose matrices the file keeps: it enters the header of the moving scan, so that
a method resamples the scan once. Networks answer in one pass, without refinement. SyN is `register`
with method "syn", on the voxels of the fixed scan; it needs antspyx.

A row holds a method on a set: Dice, its gain over the affine registration in points (percent), Dice
per structure, percent of the voxels where the map folds (mean and largest), and seconds per pair
(median) after the affine registration. Each row is written when it is there, and a row that is
there is not measured again, unless its weights or the number of pairs are others.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import common
import nibabel as nib
import numpy as np
import torch
import typer

import regkit
from regkit import classical, io, metrics
from regkit.data import samples
from regkit.data.subject import Subject
from regkit.record import Row, Rows, fingerprint
from regkit.transform import resample

OUT = common.RESULTS / "real_scans.json"
MARGIN = 10  # mm around a brain
SHIPPED = ("vxm_diff_brain_3d", "unfolding_brain_3d", "any_contrast_brain_3d")
TISSUES = {1: "CSF", 2: "cortical grey matter", 3: "white matter", 4: "deep grey matter"}


@dataclass(frozen=True)
class Pair:
    """Two prepared scans, with labels."""

    moving: Subject
    fixed: Subject

    @property
    def name(self) -> str:
        return f"{self.moving.name} to {self.fixed.name}"


# ---------------------------------------------------------------------------------------- the scans


def prepared(scan: Subject, mask: bool = False) -> Subject:
    """A scan cut to the box of its brain and the margin; mask: only what has a label is brain."""
    image = torch.where(scan.labels > 0, scan.image, 0) if mask else scan.image
    image = (image / np.percentile(image.numpy(), 99.9)).clamp(0, 1)
    where = (image[0] > 0).nonzero()
    spacing = scan.grid.spacing
    box, start = [slice(None)], np.eye(4)
    for axis, size in enumerate(image.shape[1:]):
        room = round(MARGIN / spacing[axis])
        low = max(0, int(where[:, axis].min()) - room)
        box.append(slice(low, min(size, int(where[:, axis].max()) + 1 + room)))
        start[axis, 3] = low
    cut = tuple(box)
    return Subject(
        scan.name, image[cut].contiguous(), scan.labels[cut].contiguous(), scan.affine @ start
    )


def oasis() -> list[Pair]:
    """The OASIS pair, 13 structures."""
    moving, fixed = samples.load_oasis_pair()[0], samples.load_oasis_heads()[0]
    merged = samples.merge_structures(moving.labels)
    moving = Subject(moving.name, moving.image, merged, moving.affine)
    return [Pair(prepared(moving), prepared(fixed))]


def slabs() -> list[Pair]:
    """Each child to the next."""
    children = [prepared(slab, mask=True) for slab in samples.load_ptbp_slabs()]
    following = [*children[1:], children[0]]
    return [Pair(a, b) for a, b in zip(children, following, strict=True)]


SETS: dict[str, tuple[Callable[[], list[Pair]], Callable[[], dict[int, str]]]] = {
    "oasis": (oasis, samples.oasis_structures),
    "slabs": (slabs, lambda: TISSUES),
}


# ------------------------------------------------------------------------------------ the measuring


def affine(pair: Pair) -> np.ndarray:
    """(4, 4), fixed mm -> moving mm: that of `regkit.register` with method "affine"."""
    images = (io.from_nibabel(scan.nifti()) for scan in (pair.moving, pair.fixed))
    return classical.align(*images, "affine")


def in_place(scan: Subject, matrix: np.ndarray) -> Subject:
    """The moving scan with its affine registration in its header: fixed mm -> moving mm undone."""
    return Subject(scan.name, scan.image, scan.labels, np.linalg.inv(matrix) @ scan.affine)


def by_headers(pair: Pair, structures: Sequence[int]) -> Row:
    """Dice of a pair where the headers put it."""
    moving, fixed = pair.moving, pair.fixed
    moved = resample(moving.labels[None], moving.grid, fixed.grid, "nearest")
    scores = metrics.dice(moved, fixed.labels[None], structures)[0].tolist()
    return {"dice": dict(zip(structures, scores)), "folding": 0.0, "seconds": 0.0}


def registered(pair: Pair, method: str, structures: Sequence[int]) -> Row:
    """Dice of a pair after a method, which starts from where the headers put it."""
    scans = (pair.moving, pair.fixed)
    images: list[Any] = [nib.Nifti1Image(*_arrays(scan, "image")) for scan in scans]
    labels: list[Any] = [nib.Nifti1Image(*_arrays(scan, "labels")) for scan in scans]
    result = regkit.register(
        *images,
        method=method,
        affine=False,
        device="cpu",
        moving_labels=labels[0],
        fixed_labels=labels[1],
    )
    after = result.metrics["dice_per_label"]
    return {
        "dice": {
            i: after[str(i)]["after"] if str(i) in after else float("nan") for i in structures
        },
        "folding": result.metrics["folding_percent"],
        "seconds": result.metrics["seconds"],
    }


def _arrays(scan: Subject, what: str) -> tuple[np.ndarray, np.ndarray]:
    return getattr(scan, what)[0].numpy(), scan.affine


def summed_up(rows: Sequence[Row], structures: dict[int, str]) -> Row:
    """One row from those of the pairs: means of the Dice, mean and largest folding."""
    per_pair = [float(np.nanmean(list(row["dice"].values()))) for row in rows]
    return {
        "dice": statistics.fmean(per_pair),
        "dice_per_structure": {
            name: float(np.nanmean([row["dice"][label] for row in rows]))
            for label, name in structures.items()
        },
        "dice_per_pair": [round(x, 4) for x in per_pair],
        "folding_percent": statistics.fmean(row["folding"] for row in rows),
        "folding_percent_largest": max(row["folding"] for row in rows),
        "seconds": statistics.median(row["seconds"] for row in rows),
    }


# ----------------------------------------------------------------------------------------- the file


def run(
    out: Path = OUT,
    pairs: int = 25,
    sets: Sequence[str] = tuple(SETS),
    networks: Sequence[str] = SHIPPED,
    syn: bool = True,
    fresh: bool = False,
) -> Row:
    """Measure what is not there yet, and write the file after each row. Arguments as in `main`."""
    common.check_names("sets", sets, SETS)
    if pairs < 1:
        raise ValueError(f"pairs is {pairs}, expected at least 1.")
    fields = {"made": common.made(__file__, seed=0)}  # nothing is drawn at random
    rows = Rows(out, ("set", "method"), fields, fresh=fresh, derive=_by_set)
    rows.fields["affine"] = matrices = dict(rows.table.get("affine", {}))
    methods = ["unregistered", "affine", *networks, *(["syn"] if syn else [])]
    for name in sets:
        load, described = SETS[name]
        structures = described()
        scans = load()[:pairs]
        for method in methods:
            settings = {
                "set": name,
                "method": Path(method).name,
                "sha256": fingerprint(method),
                "pairs": len(scans),
            }
            start = [r for r in rows.rows if (r["set"], r["method"]) == (name, "affine")]
            before = next((r["dice"] for r in start if r["pairs"] == len(scans)), None)
            measure = partial(measured, scans, method, structures, matrices, before)
            missing = (ValueError, FileNotFoundError)
            common.measure_once(rows, settings, f"{name}: {method}", measure, _in_short, missing)
    return rows.table


def _by_set(rows: list[Row]) -> Row:
    return {"rows": sorted(rows, key=lambda row: list(SETS).index(row["set"]))}


def measured(
    pairs: Sequence[Pair],
    method: str,
    structures: dict[int, str],
    matrices: Row,
    before: float | None,
) -> Row:
    """One method on all pairs; before: Dice of the affine registration, where it is known."""
    row = summed_up([_one(pair, method, list(structures), matrices) for pair in pairs], structures)
    return row if before is None else {**row, "gain": 100 * (row["dice"] - before)}


def _in_short(row: Row) -> str:
    return f"Dice {row['dice']:.4f}, folding {row['folding_percent']:.4f} %, {row['seconds']:.1f} s"


def _one(pair: Pair, method: str, structures: Sequence[int], matrices: Row) -> Row:
    """One pair by one method; the affine matrix is looked up, or found and kept."""
    if method == "unregistered":
        return by_headers(pair, structures)
    if pair.name not in matrices:
        matrices[pair.name] = [[float(f"{x:.8g}") for x in line] for line in affine(pair)]
    placed = replace(pair, moving=in_place(pair.moving, np.array(matrices[pair.name])))
    if method == "affine":
        return by_headers(placed, structures)
    return registered(placed, method, structures)


def main(
    pairs: Annotated[int, typer.Option(help="How many pairs of a set at most.")] = 25,
    sets: Annotated[list[str] | None, typer.Option(help="Only this set; may be repeated.")] = None,
    network: Annotated[
        list[str] | None, typer.Option(help="A weights file or a name; may be repeated.")
    ] = None,
    syn: Annotated[bool, typer.Option(help="Also SyN, minutes a pair.")] = True,
    out: common.Out = OUT,
    fresh: common.Fresh = False,
) -> None:
    """Register real scans by shipped networks, by others, and by SyN."""
    run(out, pairs, sets or tuple(SETS), (*SHIPPED, *(network or ())), syn, fresh)


if __name__ == "__main__":
    common.start(main)
