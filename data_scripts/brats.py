"""The data of Hu (2024) from folders of BraTS 2019 and 2021.

    python data_scripts/brats.py SOURCE... --out FOLDER --accept-terms

What is taken from the paper and what is ours: see README.md beside this file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import layout
import numpy as np
import torch
import typer

from regkit import io
from regkit.data import Subject, centre_crop

CONTRASTS = ("flair", "t1", "t2")
SIZE = 200  # pixels
TERMS = """
BraTS is lent, not given away. You have got it by registering with its organisers, and what you
agreed to there holds for everything made from it: research only, do not pass it on, do not try to
find out who the patients are, and cite in what you publish

- Menze et al., The multimodal brain tumor image segmentation benchmark (BRATS), IEEE TMI 34, 2015;
- Bakas et al., Advancing the Cancer Genome Atlas glioma MRI collections, Scientific Data 4, 2017;
- Bakas et al., Identifying the best machine learning algorithms, arXiv:1811.02629, 2018;
- for the set of 2021 also Baid et al., The RSNA-ASNR-MICCAI BraTS 2021 benchmark, arXiv:2107.02314.

The terms of the organisers come before this summary of ours.
"""


def cases(sources: list[Path]) -> dict[str, Path]:
    """name -> folder of each patient, in the order of the names.

    A patient is a folder NAME that holds NAME_flair.nii.gz or NAME_flair.nii, at any depth: 2019
    sorts them into HGG and LGG, 2021 does not.
    """
    folders: dict[str, Path] = {}
    for source in sources:
        if not source.is_dir():
            raise ValueError("source is no folder, expected one of BraTS (unpack archives first).")
        here = sorted(p.parent for p in source.rglob("*_flair.nii*") if _is_case(p))
        if not here:
            raise ValueError(
                "source has no file NAME/NAME_flair.nii.gz in it, expected a folder of BraTS 2019 "
                "or 2021."
            )
        for folder in here:
            if folders.setdefault(folder.name, folder) != folder:
                raise ValueError(f"{folder.name} is there twice, expected each patient once.")
    return dict(sorted(folders.items()))


def _is_case(path: Path) -> bool:
    match = re.fullmatch(r"(\w[\w.-]*)_flair\.nii(\.gz)?", path.name)
    return match is not None and match[1] == path.parent.name


def read(folder: Path) -> dict[str, io.Image]:
    """The volumes of a patient by contrast, axes to R, A, S, and "labels" where there are any."""
    volumes: dict[str, io.Image] = {}
    for key, suffix in (*zip(CONTRASTS, CONTRASTS), ("labels", "seg")):
        name = f"{folder.name}, {suffix}"
        path = layout.find(folder, f"{folder.name}_{suffix}")
        if path is None:
            if key == "labels":
                continue
            raise ValueError(f"{name}: there is no such file, expected {', '.join(CONTRASTS)}.")
        image = io.read(path, name, labels=key == "labels")
        if image.ndim != 3:
            raise ValueError(f"{name} has shape {image.shape}, expected a volume.")
        if volumes and not image.grid.same_as(volumes[CONTRASTS[0]].grid):
            raise ValueError(f"{name} lies on another grid than {CONTRASTS[0]}, expected the same.")
        volumes[key] = image
    return {key: io.canonical(image) for key, image in volumes.items()}


def prepare(folder: Path, size: int) -> dict[str, Subject]:
    """The slice of a patient by contrast, (1, size, size), in [0, 1]; each with the same labels."""
    volumes = read(folder)
    k = int((volumes["t1"].data[0, 0] > 0).sum(dim=(0, 1)).argmax())
    affine = volumes["t1"].affine.copy()
    affine[:3, 3] += k * affine[:3, 2]
    shape = volumes["t1"].shape[:2]
    if min(shape) < size:
        raise ValueError(f"{folder.name} has slices of {shape}, expected {size}x{size} or larger.")
    labels = torch.zeros(1, *shape, dtype=torch.int32)
    if "labels" in volumes:
        labels = volumes["labels"].data[0, ..., k]
    made = {}
    for contrast in CONTRASTS:
        image = layout.scaled(volumes[contrast].data[0, ..., k], f"{folder.name}, {contrast}")
        subject = Subject(folder.name, image, labels, affine.copy(), torch.empty(0))
        made[contrast] = centre_crop(subject, (size, size))
    return made


def images(subjects: dict[str, Subject], labels: bool) -> dict[str, io.Image]:
    """One image per contrast, and the labels."""
    made = {key: io.Image(one.image[None], one.affine) for key, one in subjects.items()}
    if labels:
        one = subjects[CONTRASTS[0]]
        made["labels"] = io.Image(one.labels[None], one.affine)
    return made


def main(
    source: Annotated[list[Path], typer.Argument(help="Folders of BraTS 2019 or 2021.")],
    out: Annotated[Path, typer.Option(help="The folder to write, new or of a stopped run.")],
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Else they are only shown.")
    ] = False,
    patients: Annotated[int | None, typer.Option(help="Draw this many; default: all.")] = None,
    size: Annotated[int, typer.Option(help="Pixels along each side.")] = SIZE,
    seed: Annotated[int, typer.Option(help="Of the draw and of the split.")] = 0,
) -> None:
    """Prepare the data of Hu (2024): one axial slice per patient in Flair, T1 and T2."""
    layout.show_terms(TERMS, accept_terms)
    if size < 16:
        raise ValueError(f"size is {size}, expected at least 16.")
    folders = cases(source)
    names = list(folders)
    if patients is not None:
        if not 1 <= patients <= len(names):
            raise ValueError(f"patients is {patients}, expected 1 to {len(names)}.")
        drawn = np.random.default_rng(seed).choice(len(names), patients, replace=False)
        names = [names[i] for i in sorted(drawn)]
    parts = layout.split(names, seed)
    description: dict[str, Any] = {
        "name": "brats_hu2024",
        "settings": {"size": size, "patients": patients, "seed": seed},
        "contrasts": list(CONTRASTS),
        "complete": True,
        "subjects": [
            {"name": name, "split": parts[name], "labels": _has_labels(folders[name])}
            for name in names
        ],
    }
    labelled = {entry["name"]: entry["labels"] for entry in description["subjects"]}
    layout.build(
        out,
        description,
        lambda name: images(prepare(folders[name], size), labelled[name]),
        "patients",
    )
    learn = sum(part == "train" for part in parts.values())
    typer.echo(f"{len(names)} patients, {learn} to learn from and {len(names) - learn} to test on.")


def _has_labels(folder: Path) -> bool:
    return layout.find(folder, f"{folder.name}_seg") is not None


if __name__ == "__main__":
    layout.run(main)
