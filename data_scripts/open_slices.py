"""Slices of the open samples as prepared sets, for the table of Zheng et al. (2023).

    python data_scripts/open_slices.py ptbp_brain --out FOLDER
    python data_scripts/open_slices.py oasis_3d --out FOLDER

"ptbp_brain" gives `ptbp_slices`: axial T1 slices of 25 children, 4 tissues. Children are divided by
name: 7 to test on (`TEST`), 18 to learn from, of whom one (`FIXED`) is the image that all others go
to. The skull is taken away by the union of the tissues. The slabs come aligned, on one grid: an
affine map between two of them adds less than half a point to their Dice (studies/real_scans.py),
so none is applied. Of a child to learn from these are the slices at five heights, 1 mm apart, as
all go to the middle one; of a child to test on it is the middle one alone. The segmentation is
automatic and driven by intensity: its Dice rewards matching tissue, not anatomy alone.

"oasis_3d" gives `oasis_slices`: one coronal slice to test on and one fixed, of two brains of OASIS
that come aligned affinely, with the 19 structures that both hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import layout
import torch
import typer

from regkit import io
from regkit.data import samples
from regkit.data.subject import Subject

SIZE = (160, 192)  # of the slices, mm
FIXED = "child3"
TEST = (  # drawn by layout.split with seed 0
    "child1", "child6", "child9", "child16", "child43", "child49", "child59"
)  # fmt: skip
MIDDLE = 9  # of 18 slices
HEIGHTS = (7, 8, 9, 10, 11)  # of children to learn from
TISSUES = {1: "CSF", 2: "cortical grey matter", 3: "white matter", 4: "deep grey matter"}

Images = dict[str, io.Image]


def children(names: list[str], spacing: int) -> tuple[dict[str, Any], Callable[[str], Images]]:
    """Description of the set, and how to make its slices."""
    parts = {name: "test" if name in TEST else "train" for name in names} | {FIXED: "fixed"}
    heights = {"fixed": (MIDDLE,), "train": HEIGHTS, "test": (MIDDLE,)}
    places = {
        f"{name}_slice{height}": (name, height, part)
        for name, part in parts.items()
        for height in heights[part]
    }
    description = _description(
        "ptbp_slices", spacing, TISSUES, {name: part for name, (_, _, part) in places.items()}
    )

    @functools.cache
    def slabs() -> dict[str, Subject]:
        return {slab.name: slab for slab in samples.load_ptbp_slabs()}

    def prepare(entry: str) -> Images:
        name, height, _ = places[entry]
        whole, fixed = stripped(slabs()[name]), stripped(slabs()[FIXED])["labels"]
        return {key: cut(image, height, fixed, spacing) for key, image in whole.items()}

    return description, prepare


def stripped(slab: Subject) -> Images:
    """Image and labels of a slab, without what has no label, intensities to [0, 1]."""
    brain = layout.scaled(torch.where(slab.labels > 0, slab.image, 0), slab.name)
    return {
        "t1": io.Image(brain[None], slab.affine),
        "labels": io.Image(slab.labels[None], slab.affine),
    }


def cut(slab: io.Image, height: int, about: io.Image, spacing: int) -> io.Image:
    """One slice, cropped to `SIZE` about the box of what `about` labels."""
    affine = slab.affine.copy()
    affine[:, 3] += affine[:, 2] * height
    places = (about.data[0, 0] > 0).nonzero()[:, :2]
    centre = (places.amin(0) + places.amax(0) + 1) / 2
    x, y = (
        min(max(0, round(float(c) - size / 2)), whole - size)
        for c, size, whole in zip(centre, SIZE, slab.shape, strict=False)
    )
    affine[:, 3] += affine[:, 0] * x + affine[:, 1] * y
    values = slab.data[:, :, x : x + SIZE[0], y : y + SIZE[1], height]
    return layout.smaller(io.Image(values.contiguous(), affine), spacing)


def brains(spacing: int) -> tuple[dict[str, Any], Callable[[str], Images]]:
    """Description of the pair, and how to make its two slices."""
    moving, fixed, shared = samples.load_oasis_slices()
    scans = {"vxm_subject_slice100": moving, "atlas_2d": fixed}
    description = _description(
        "oasis_slices",
        spacing,
        {label: f"FreeSurfer {label}" for label in shared},
        {"atlas_2d": "fixed", "vxm_subject_slice100": "test"},
    )

    def prepare(entry: str) -> Images:
        scan = scans[entry]
        whole = {"t1": scan.image, "labels": scan.labels}
        return {
            k: layout.smaller(io.Image(x[None], scan.affine), spacing) for k, x in whole.items()
        }

    return description, prepare


def _description(
    name: str, spacing: int, structures: Mapping[int, str], parts: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "name": name,
        "settings": {"spacing": spacing},
        "contrasts": ["t1"],
        "structures": {str(label): structure for label, structure in structures.items()},
        "complete": True,
        "subjects": [
            {"name": entry, "split": part, "labels": True} for entry, part in parts.items()
        ],
    }


def names() -> list[str]:
    """The 25 children, in the order of their numbers, as `load_ptbp_slabs` calls them."""
    files = (file.path for file in samples.samples()["ptbp_brain"].files)
    numbers = [path.split("ilist")[1].split(".")[0] for path in files if "ilist" in path]
    return [f"child{number}" for number in sorted(map(int, numbers))]


SETS = {"ptbp_brain": lambda spacing: children(names(), spacing), "oasis_3d": brains}


def main(
    sample: Annotated[str, typer.Argument(help="ptbp_brain or oasis_3d.")],
    out: Annotated[Path, typer.Option(help="The folder to write, new or of a stopped run.")],
    spacing: Annotated[int, typer.Option(help="mm: 1, as they are; 2 or 4 is smaller.")] = 1,
) -> None:
    """Cut slices from an open sample, which is fetched unless the cache holds it."""
    if sample not in SETS:
        raise ValueError(f"sample is {sample!r}, expected one of {', '.join(SETS)}.")
    if spacing not in layout.SPACINGS:
        raise ValueError(f"spacing is {spacing}, expected 1, 2 or 4 (mm).")
    typer.echo(samples.samples()[sample].terms, err=True)
    samples.fetch(sample, progress=True)
    description, prepare = SETS[sample](spacing)
    layout.build(out, description, prepare, "slices")
    parts = [entry["split"] for entry in description["subjects"]]
    counts = [f"{parts.count(part)} for {part}" for part in dict.fromkeys(parts)]
    typer.echo(f"{len(parts)} slices: {', '.join(counts)}.")


if __name__ == "__main__":
    layout.run(main)
