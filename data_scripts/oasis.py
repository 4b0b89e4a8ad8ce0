"""The data of Sun et al. (2025), OASIS, from a folder of neurite-oasis: volumes, or their slices.

    python data_scripts/oasis.py SOURCE --out FOLDER --accept-terms
    python data_scripts/oasis.py SOURCE --ndim 2 --out FOLDER --accept-terms

What is taken from the paper and what is ours: see README.md beside this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import layout
import typer

from regkit import io

PARTS = {"train": 254, "validation": 20, "test": 140}
NAME = "OASIS_OAS1_[0-9][0-9][0-9][0-9]_MR1"
TERMS = """
neurite-oasis is made from OASIS-1, whose Data Use Agreement (https://www.oasis-brains.org) holds
for it and for everything made from it: do not try to find out who the people are, hand these terms
on with the data, acknowledge OASIS, and cite in what you publish

- Marcus et al., Open Access Series of Imaging Studies (OASIS): cross-sectional MRI data in young,
  middle aged, nondemented, and demented older adults, Journal of Cognitive Neuroscience 19, 2007;
- Hoopes et al., HyperMorph: amortized hyperparameter learning for image registration, IPMI 2021,
  for whom the data were prepared.

The terms of OASIS come before this summary of ours.
"""


class Files(NamedTuple):
    """The names of the set's files, for volumes or for slices."""

    image: str
    labels: str
    table: str


FILES = {
    3: Files("aligned_norm", "aligned_seg35", "seg35_labels.txt"),
    2: Files("slice_norm", "slice_seg24", "seg24_labels.txt"),
}


def people(source: Path, files: Files) -> dict[str, Path]:
    """name -> folder of each person, in the order of the names: OASIS_OAS1_0001_MR1 and so on.

    Their folders may lie at any depth. A second scan of a person, MR2, is left out.
    """
    if not source.is_dir():
        raise ValueError("source is no folder, expected neurite-oasis (unpack the archive first).")
    folders: dict[str, Path] = {}
    for path in sorted(source.rglob(f"{NAME}/{files.image}.nii*")):
        if folders.setdefault(path.parent.name, path.parent) != path.parent:
            raise ValueError(f"{path.parent.name} is there twice, expected each person once.")
    if not folders:
        raise ValueError(
            f"source has no file {NAME.replace('[0-9]', '0')}/{files.image}.nii.gz or alike in it, "
            "expected a folder of neurite-oasis."
        )
    return dict(sorted(folders.items()))


def structures(source: Path, name: str) -> dict[int, str]:
    """Label -> name of the structure, from a colour table of FreeSurfer; without label 0."""
    path = next(iter(sorted(source.rglob(name))), None)
    if path is None:
        raise ValueError(f"source has no file {name}, expected the one that comes with the set.")
    lines = [line.split() for line in path.read_text(errors="replace").splitlines()]
    table = {int(words[0]): words[1] for words in lines if len(words) > 1 and words[0].isdigit()}
    table.pop(0, None)
    if not table:
        raise ValueError(f"{name} names no structure, expected lines of a number and a name.")
    return table


def read(folder: Path, files: Files, known: dict[int, str]) -> tuple[io.Image, io.Image]:
    """Image and labels of a person."""
    images = []
    for stem in (files.image, files.labels):
        name, path = f"{folder.name}, {stem}", layout.find(folder, stem)
        if path is None:
            raise ValueError(f"{name}: there is no such file, expected {stem}.nii.gz.")
        images.append(io.read(path, name, labels=stem == files.labels))
    image, labels = images
    low, high = float(image.data.min()), float(image.data.max())
    if not (-0.01 <= low and 0.1 < high <= 1.01):
        raise ValueError(
            f"{folder.name}, {files.image} has intensities from {low:g} to {high:g}, "
            "expected 0 to 1."
        )
    if not image.grid.same_as(labels.grid):
        raise ValueError(
            f"{folder.name}, {files.labels} lies on another grid than {files.image}, "
            "expected the same."
        )
    strange = sorted(set(labels.data.unique().tolist()) - {0, *known})
    if strange:
        raise ValueError(
            f"{folder.name}, {files.labels} holds label {strange[0]}, "
            f"expected those of {files.table}."
        )
    return io.Image(image.data.clamp(0, 1), image.affine), labels


def prepare(
    folder: Path, files: Files, known: dict[int, str], like: Path, spacing: int
) -> dict[str, io.Image]:
    """Image and labels of a person, axes to R, A, S, on the grid of the person in `like`."""
    image, labels = read(folder, files, known)
    path = layout.find(like, files.image)
    if path is None or not image.grid.same_as(io.read(path, like.name).grid):
        raise ValueError(
            f"{folder.name}, {files.image} lies on another grid than that of {like.name}, "
            "expected one grid for everyone."
        )
    image, labels = io.canonical(image), io.canonical(labels)
    return {"t1": layout.smaller(image, spacing), "labels": layout.smaller(labels, spacing)}


def main(
    source: Annotated[Path, typer.Argument(help="The folder of neurite-oasis, unpacked.")],
    out: Annotated[Path, typer.Option(help="The folder to write, new or of a stopped run.")],
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Else they are only shown.")
    ] = False,
    ndim: Annotated[int, typer.Option(help="3: volumes; 2: the coronal slices.")] = 3,
    spacing: Annotated[int, typer.Option(help="mm: 1, as they are; 2 or 4 is smaller.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
) -> None:
    """Prepare neurite-oasis: T1 and labels of 414 people, in three parts."""
    layout.show_terms(TERMS, accept_terms)
    if ndim not in FILES:
        raise ValueError(f"ndim is {ndim}, expected 2 or 3.")
    if spacing not in layout.SPACINGS:
        raise ValueError(f"spacing is {spacing}, expected 1, 2 or 4 (mm).")
    files = FILES[ndim]
    folders = people(source, files)
    known = structures(source, files.table)
    parts = layout.split(list(folders), seed, PARTS)
    first = next(iter(folders.values()))
    description: dict[str, Any] = {
        "name": f"oasis_{ndim}d",
        "settings": {"ndim": ndim, "spacing": spacing, "seed": seed},
        "contrasts": ["t1"],
        "structures": {str(label): name for label, name in known.items()},
        "complete": True,
        "subjects": [{"name": name, "split": parts[name], "labels": True} for name in folders],
    }
    layout.build(
        out,
        description,
        lambda name: prepare(folders[name], files, known, first, spacing),
        "people",
    )
    counts = [f"{list(parts.values()).count(part)} for {part}" for part in PARTS]
    typer.echo(f"{len(folders)} people: {', '.join(counts)}.")


if __name__ == "__main__":
    layout.run(main)
