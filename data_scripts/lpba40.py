"""The data of Sun et al. (2025), LPBA40, from a folder of its "delineation space".

    python data_scripts/lpba40.py SOURCE --out FOLDER --accept-terms

What is taken from the paper and what is ours: see README.md beside this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import archives
import layout
import nibabel
import numpy as np
import typer
from nibabel.fileholders import FileHolder

from regkit import classical, io
from regkit.transform import Grid, resample

BRAIN, LABELS = "delineation.skullstripped", "delineation.structure.label"
SHAPE = (160, 192, 160)  # of the paper
CENTRE = (0.0, -17.0, 5.0)  # MNI mm: the middle of the template's brain
LEARN, TEST = 30, 9
# the number of the structure on the left; the one on the right has the next number
PAIRS = {
    21: "superior frontal gyrus",
    23: "middle frontal gyrus",
    25: "inferior frontal gyrus",
    27: "precentral gyrus",
    29: "middle orbitofrontal gyrus",
    31: "lateral orbitofrontal gyrus",
    33: "gyrus rectus",
    41: "postcentral gyrus",
    43: "superior parietal gyrus",
    45: "supramarginal gyrus",
    47: "angular gyrus",
    49: "precuneus",
    61: "superior occipital gyrus",
    63: "middle occipital gyrus",
    65: "inferior occipital gyrus",
    67: "cuneus",
    81: "superior temporal gyrus",
    83: "middle temporal gyrus",
    85: "inferior temporal gyrus",
    87: "parahippocampal gyrus",
    89: "lingual gyrus",
    91: "fusiform gyrus",
    101: "insular cortex",
    121: "cingulate gyrus",
    161: "caudate",
    163: "putamen",
    165: "hippocampus",
}
STRUCTURES = {  # the 54 of the paper
    number + k: f"{side} {name}"
    for number, name in PAIRS.items()
    for k, side in enumerate(("left", "right"))
}
OTHERS = {181: "cerebellum", 182: "brain stem"}  # drawn as well, and not counted
# Structures that lie to the right, to the front and on top of others, whatever the brain.
ENDS = (
    ([number + 1 for number in PAIRS], list(PAIRS)),
    ((23, 24, 29, 30), (61, 62, 63, 64, 65, 66)),
    ((27, 28, 41, 42), (85, 86, 182)),
)
TERMS = """
LPBA40 belongs to the Laboratory of Neuro Imaging (LONI), which gives it to those who accept its
licence (https://resource.loni.usc.edu/resources/atlases-downloads/). What you agreed to there holds
for everything made from it: research only, no commercial use, do not pass it on, do not try to find
out who the people are, and cite in what you publish

- Shattuck et al., Construction of a 3D probabilistic atlas of human cortical structures,
  NeuroImage 39, 2008.

The licence of LONI comes before this summary of ours.
"""


def people(source: Path) -> dict[str, Path]:
    """name -> folder of each person, S01 to S40: where S01.delineation.skullstripped... lies."""
    folders: dict[str, Path] = {}
    for path in sorted(source.rglob(f"S[0-9][0-9].{BRAIN}.*")):
        name = path.name[:3]
        if folders.setdefault(name, path.parent) != path.parent:
            raise ValueError(f"{name} is there twice, expected each person once.")
    if not folders:
        raise ValueError(
            f"source has no file S01/S01.{BRAIN}.img.gz or alike in it, expected LPBA40 in "
            "delineation space."
        )
    return dict(sorted(folders.items()))


def read(folder: Path, person: str) -> tuple[io.Image, io.Image]:
    """Brain and labels of a person, at their place up to a rigid motion."""
    brain = _volume(folder, f"{person}.{BRAIN}", False)
    labels = _volume(folder, f"{person}.{LABELS}", True)
    if brain.ndim != 3 or brain.shape != labels.shape:
        raise ValueError(
            f"{person} has a brain of shape {brain.shape} and labels of {labels.shape}, expected "
            "two volumes of one shape."
        )
    there = set(labels.data.unique().tolist())
    strange = sorted(there - {0, *STRUCTURES, *OTHERS})
    if strange:
        raise ValueError(f"{person} holds label {strange[0]}, expected those of LPBA40.")
    lost = sorted({*STRUCTURES, *OTHERS} - there)
    if lost:
        raise ValueError(f"{person} lacks label {lost[0]}, expected all of LPBA40.")
    # An Analyze header does not say which way the axes run, and readers guess differently.
    affine = layout.upright(labels.data[0, 0].numpy(), brain.spacing, ENDS, person)
    return io.Image(layout.scaled(brain.data, person), affine), io.Image(labels.data, affine)


def _volume(folder: Path, stem: str, labels: bool) -> io.Image:
    """NIfTI, or a pair of Analyze, either half packed or not."""
    path = layout.find(folder, stem)
    if path is not None:
        return io.read(path, stem, labels)
    header, data = (
        layout.find(folder, stem, (end, f"{end}.gz")) for end in (".hdr", ".img")
    )  # one packed and the other not is what LONI hands out, and what nibabel.load does not find
    if header is None or data is None:
        raise ValueError(f"{stem}: there is no such file, expected {stem}.hdr and {stem}.img.gz.")
    try:
        files = {"header": FileHolder(str(header)), "image": FileHolder(str(data))}
        image = nibabel.AnalyzeImage.from_file_map(files)
    except Exception:  # nibabel raises whatever comes
        raise ValueError(f"{stem} cannot be read as Analyze: it is damaged or cut short.") from None
    return io.from_nibabel(image, stem, labels)


def template() -> io.Image:
    """The brain of MNI152 that nilearn ships, at 1 mm; the embedded population is made from it."""
    from nilearn import datasets  # takes seconds to import

    return io.from_nibabel(datasets.load_mni152_template(resolution=1), "template")


def grid(spacing: int) -> Grid:
    """Of what is written."""
    affine = np.eye(4)
    affine[:3, 3] = np.asarray(CENTRE) - (np.asarray(SHAPE) - 1) / 2
    return layout.coarser(Grid(SHAPE, affine), spacing)


def prepare(folder: Path, person: str, target: io.Image, spacing: int) -> dict[str, io.Image]:
    """Brain and labels of a person, aligned with `target` by an affine map, on `grid`."""
    brain, labels = read(folder, person)
    matrix, new = classical.align(brain, target, "affine"), grid(spacing)
    image = resample(brain.data, brain.grid, new, matrix=matrix)
    moved = resample(labels.data, labels.grid, new, "nearest", matrix)
    lost = sorted(set(STRUCTURES) - set(moved.unique().tolist()))
    if lost:
        raise ValueError(
            f"{person} lost the {STRUCTURES[lost[0]]} when it was aligned and cropped, expected "
            "a brain like the template's."
        )
    return {"t1": io.Image(image, new.affine), "labels": io.Image(moved, new.affine)}


def main(
    source: archives.Source,
    out: Annotated[Path, typer.Option(help="The folder to write, new or of a stopped run.")],
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Else they are only shown.")
    ] = False,
    spacing: Annotated[int, typer.Option(help="mm: 1 as in the paper; 2 or 4 is smaller.")] = 1,
    fixed: Annotated[str, typer.Option(help="To whom the others are registered.")] = "S01",
    sha256: archives.Sha256 = None,
) -> None:
    """Prepare LPBA40: T1 and labels of 40 people, one of them fixed, aligned affinely."""
    layout.show_terms(TERMS, accept_terms)
    if spacing not in layout.SPACINGS:
        raise ValueError(f"spacing is {spacing}, expected 1, 2 or 4 (mm).")
    folders = people(archives.folder_of(source, out, sha256))
    if fixed not in folders:
        raise ValueError(f"fixed is {fixed!r}, expected one of {', '.join(folders)}.")
    others = [name for name in folders if name != fixed]
    tests = others[: round(TEST / (LEARN + TEST) * len(others))]
    parts = {name: "test" if name in tests else "train" for name in others} | {fixed: "fixed"}
    description: dict[str, Any] = {
        "name": "lpba40",
        "settings": {"spacing": spacing, "fixed": fixed},
        "contrasts": ["t1"],
        "structures": {str(label): name for label, name in STRUCTURES.items()},
        "complete": True,
        "subjects": [{"name": name, "split": parts[name], "labels": True} for name in folders],
    }
    target = template()
    layout.build(
        out, description, lambda name: prepare(folders[name], name, target, spacing), "people"
    )
    learn = len(others) - len(tests)
    typer.echo(f"{fixed} is fixed, {learn} people to learn from and {len(tests)} to test on.")


if __name__ == "__main__":
    layout.run(main)
