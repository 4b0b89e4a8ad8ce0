"""IXI as TransMorph brings it: 576 brains of healthy people and an atlas, with label maps.

    python data_scripts/ixi.py SOURCE --out FOLDER --accept-terms

The set is published as pickles, which may run code when they are opened; this script opens none
(arrays.py). What is taken from the set and what is ours: see README.md beside this file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import archives
import arrays
import layout
import numpy as np
import torch
import typer

from regkit import io

PARTS = {"Train": "train", "Val": "validation", "Test": "test"}  # its folders
COUNTS = {"train": 403, "validation": 58, "test": 115}
ATLAS = "atlas"
# FreeSurfer's numbers of the structure on the left and on the right
PAIRS = {
    "cerebral white matter": (2, 41),
    "cerebral cortex": (3, 42),
    "lateral ventricle": (4, 43),
    "cerebellar white matter": (7, 46),
    "cerebellar cortex": (8, 47),
    "thalamus": (10, 49),
    "caudate": (11, 50),
    "putamen": (12, 51),
    "pallidum": (13, 52),
    "hippocampus": (17, 53),
    "amygdala": (18, 54),
    "ventral diencephalon": (28, 60),
    "choroid plexus": (31, 63),
}
STRUCTURES = {  # the 30 that TransMorph counts
    number: f"{side} {name}"
    for name, numbers in PAIRS.items()
    for side, number in zip(("left", "right"), numbers, strict=True)
} | {14: "third ventricle", 15: "fourth ventricle", 16: "brain stem", 24: "cerebrospinal fluid"}
# Structures that lie to the right, to the front and on top of others, whatever the brain.
ENDS = (
    ([right for _, right in PAIRS.values()], [left for left, _ in PAIRS.values()]),
    (PAIRS["caudate"] + PAIRS["putamen"], PAIRS["cerebellar cortex"]),
    (PAIRS["thalamus"], (16,)),
)
TERMS = """
IXI is published by its makers (brain-development.org), and prepared for registration by the authors
of TransMorph, both under the licence Creative Commons Attribution-ShareAlike 3.0: name the source,
and pass on what you make from it under the same licence only. Acknowledge IXI and its page, do not
try to find out who the people are, and cite in what you publish

- Chen et al., TransMorph: Transformer for unsupervised medical image registration, Medical Image
  Analysis 82, 2022, for whom the data were prepared.

The terms on the pages of IXI and of TransMorph come before this summary of ours.
"""


def people(source: Path) -> dict[str, tuple[Path, str]]:
    """name -> file and part of the split: the atlas, then subject_0, subject_1 and so on."""
    heads: dict[str, tuple[Path, str]] = {}
    for path in sorted(source.rglob("*.pkl")):
        part = PARTS.get(path.parent.name)
        if path.name == f"{ATLAS}.pkl":
            part = "fixed"
        elif part is None or re.fullmatch(r"subject_\d+\.pkl", path.name) is None:
            continue
        if heads.setdefault(path.stem, (path, part)) != (path, part):
            raise ValueError(f"{path.stem} is there twice, expected each person once.")
    if next(source.rglob("IXI[0-9][0-9][0-9]-*-T1.nii*"), None) is not None and not heads:
        raise ValueError(
            "source holds scans as IXI publishes them, which have no label maps, expected the set "
            "that TransMorph prepared from them."
        )
    if ATLAS not in heads:
        raise ValueError(f"source has no file {ATLAS}.pkl in it, expected IXI of TransMorph.")
    if len(heads) == 1:
        raise ValueError(
            "source has no file Train/subject_0.pkl or alike in it, expected IXI of TransMorph."
        )
    names = sorted(heads, key=lambda name: (name != ATLAS, len(name), name))
    return {name: heads[name] for name in names}


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Brain, float32 in [0, 1], and labels, int32, of a person."""
    try:
        held = arrays.arrays(path)
    except ValueError:
        raise ValueError(
            f"{path.stem} cannot be read as a pickle of two arrays: it is damaged, cut short, or "
            "holds something else."
        ) from None
    if not (
        len(held) == 2
        and all(a.dtype.kind in "buif" and a.ndim == 3 for a in held)
        and held[0].shape == held[1].shape
    ):
        raise ValueError(f"{path.stem} holds something else, expected two volumes of one shape.")
    image, labels = held
    low, high = float(image.min()), float(image.max())
    if not (-0.01 <= low and 0.1 < high <= 1.01):  # also where one is not a number
        raise ValueError(f"{path.stem} has intensities from {low:g} to {high:g}, expected 0 to 1.")
    with np.errstate(invalid="ignore"):
        whole = labels.astype(np.int32)
    if not ((whole == labels).all() and whole.min() >= 0 and whole.max() <= 255):
        raise ValueError(
            f"{path.stem} has labels from {labels.min():g} to {labels.max():g}, expected whole "
            "numbers of FreeSurfer, 0 to 255."
        )
    return image.astype(np.float32).clip(0, 1), whole


def place(atlas: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine of everyone's volume, told by the atlas' structures: there is no header."""
    _, labels = read(atlas)
    return labels.shape, layout.upright(labels, (1.0, 1.0, 1.0), ENDS, ATLAS)


def prepare(
    path: Path, shape: tuple[int, ...], affine: np.ndarray, spacing: int
) -> dict[str, io.Image]:
    """Brain and labels of a person, axes to R, A, S."""
    volumes = read(path)
    if volumes[0].shape != shape:
        raise ValueError(f"{path.stem} has shape {volumes[0].shape}, expected the atlas' {shape}.")
    made = {}
    for key, values in zip(("t1", "labels"), volumes, strict=True):
        image = io.canonical(io.Image(torch.from_numpy(values)[None, None], affine))
        made[key] = layout.smaller(image, spacing)
    return made


def main(
    source: archives.Source,
    out: Annotated[Path, typer.Option(help="The folder to write, new or of a stopped run.")],
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Else they are only shown.")
    ] = False,
    spacing: Annotated[int, typer.Option(help="mm: 1, as they are; 2 or 4 is smaller.")] = 1,
    sha256: archives.Sha256 = None,
) -> None:
    """Prepare IXI: T1 and labels of 576 people in three parts, and of an atlas, which is fixed."""
    layout.show_terms(TERMS, accept_terms)
    if spacing not in layout.SPACINGS:
        raise ValueError(f"spacing is {spacing}, expected 1, 2 or 4 (mm).")
    heads = people(archives.folder_of(source, out, sha256))
    shape, affine = place(heads[ATLAS][0])
    description: dict[str, Any] = {
        "name": "ixi",
        "settings": {"spacing": spacing},
        "contrasts": ["t1"],
        "structures": {str(label): name for label, name in sorted(STRUCTURES.items())},
        "complete": True,
        "subjects": [
            {"name": name, "split": part, "labels": True} for name, (_, part) in heads.items()
        ],
    }
    layout.build(
        out, description, lambda name: prepare(heads[name][0], shape, affine, spacing), "people"
    )
    parts = [part for _, part in heads.values()]
    counts = {part: parts.count(part) for part in COUNTS}
    said = ", ".join(f"{n} for {part}" for part, n in counts.items())
    typer.echo(f"The atlas is fixed, {len(parts) - 1} people: {said}.")
    if counts != COUNTS:
        typer.echo("The whole set has 403, 58 and 115.", err=True)


if __name__ == "__main__":
    layout.run(main)
