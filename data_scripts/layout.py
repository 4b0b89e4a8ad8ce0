"""What the scripts here have in common: the terms, how a prepared set is written, the errors.

`regkit.data.prepared` reads one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from regkit import io
from regkit.data import prepared
from regkit.files import staged
from regkit.transform import Grid, resample

FOUR_TO_ONE = {"train": 4, "test": 1}
SPACINGS = (1, 2, 4)  # mm, of sets that come at 1 mm
BRIGHT = 99.5  # percentile of the brain that becomes 1


def run(command: Callable[..., None]) -> None:
    """Run a script's function as command line; wrong input ends in one sentence and exit code 2."""
    try:
        typer.run(command)
    except (ValueError, OSError, ImportError) as error:
        typer.echo(_reason(error) if isinstance(error, OSError) else str(error), err=True)
        raise SystemExit(2) from None


def _reason(error: OSError) -> str:
    """Without the path, which `str(error)` has in it."""
    return f"Reading or writing failed: {error.strerror}." if error.strerror else str(error)


def show_terms(terms: str, accepted: bool) -> None:
    """Print the terms of use, and stop unless they have been accepted."""
    typer.echo(terms.strip() + "\n", err=True)
    if not accepted:
        raise ValueError("The terms above are not accepted: run this again with --accept-terms.")


def split(
    names: Sequence[str], seed: int, parts: Mapping[str, int] = FOUR_TO_ONE
) -> dict[str, str]:
    """name -> one of the keys of `parts`, drawn at random in these proportions; the same for the
    same names and seed."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    ends = [round(n / sum(parts.values()) * len(names)) for n in accumulate(parts.values())]
    drawn: dict[str, str] = {}
    for part, end in zip(parts, ends, strict=True):
        drawn |= {names[i]: part for i in order[len(drawn) : end]}
    return {name: drawn[name] for name in names}


def find(folder: Path, stem: str, ends: Sequence[str] = (".nii.gz", ".nii")) -> Path | None:
    """The file of this name with one of these endings, if there is one."""
    return next((p for p in (folder / f"{stem}{end}" for end in ends) if p.is_file()), None)


def upright(
    labels: np.ndarray,
    spacing: Sequence[float],
    ends: Sequence[tuple[Sequence[int], Sequence[int]]],
    name: str,
) -> np.ndarray:
    """The affine that sends voxels to mm, axes to the Right, Anterior and Superior.

    Where a file does not say which way its axes run, the structures do: those of the right lie to
    the right. The middle of the volume is at 0.

    Args:
        labels: a label map in 3D.
        spacing: voxel size along each array axis, mm.
        ends: labels that lie to the right and to the left, to the front and to the back, on top and
            at the bottom.
        name: what errors call it.
    """

    def middle(numbers: Sequence[int]) -> np.ndarray:
        places = np.argwhere(np.isin(labels, numbers))
        if not len(places):
            raise ValueError(f"{name} lacks label {numbers[0]}, which tells how its axes run.")
        return places.mean(axis=0) * spacing

    ways = np.array([middle(end) - middle(start) for end, start in ends])
    axes = np.abs(ways).argmax(axis=1)
    if sorted(axes) != [0, 1, 2]:
        raise ValueError(f"{name} lies obliquely in its volume, expected it upright.")
    affine = np.eye(4)
    affine[:3, :3] = 0
    for world, axis in enumerate(axes):
        affine[world, axis] = np.sign(ways[world, axis]) * spacing[axis]
    affine[:3, 3] = -affine[:3, :3] @ ((np.asarray(labels.shape) - 1) / 2)
    return affine


def scaled(values: Tensor, name: str) -> Tensor:
    """Divided by the `BRIGHT` percentile of what is not black, at most 1."""
    brain = values[values > 0]
    if not len(brain):
        raise ValueError(f"{name} is empty, expected a brain.")
    return (values / float(np.percentile(brain.numpy(), BRIGHT))).clamp(0, 1)


def coarser(grid: Grid, step: int) -> Grid:
    """Every `step`-th voxel of a grid. Its voxels lie on old ones, not between."""
    if step not in SPACINGS:
        raise ValueError(f"spacing is {step}, expected 1, 2 or 4 (mm).")
    affine, d = grid.affine.copy(), grid.ndim
    affine[:, :d] *= step
    affine[:, 3] += grid.affine[:, :d].sum(axis=1) * ((step - 1) // 2)
    return Grid(tuple(n // step for n in grid.shape), affine)


def smaller(image: io.Image, step: int) -> io.Image:
    """An image on every `step`-th voxel; whole numbers are label maps."""
    mode = "linear" if image.data.is_floating_point() else "nearest"
    grid = coarser(image.grid, step)
    return io.Image(resample(image.data, image.grid, grid, mode), grid.affine)


def build(
    out: Path,
    description: dict[str, Any],
    prepare: Callable[[str], Mapping[str, io.Image | str]],
    what: str = "subjects",
) -> None:
    """Make what `description` describes, or go on with it.

    Args:
        out: the folder to write.
        description: what dataset.json will hold.
        prepare: the name of a subject -> its images, one per contrast, and "labels"; or the text
            of a file, such as "points.csv". A subject's folder appears in one step, when all its
            files are written.
        what: the word for subjects beside the bar.
    """
    begin(out, description)
    for entry in tqdm(description["subjects"], desc=what, disable=None):
        folder = out / entry["name"]
        if folder.is_dir():
            continue
        files = prepare(entry["name"])
        with staged(folder) as temporary:
            for key, made in files.items():
                if isinstance(made, str):
                    (temporary / key).write_text(made, encoding="utf-8")
                else:
                    io.write_image(made.data, made.affine, temporary / f"{key}.nii.gz")
    write_description(out, description)


def begin(out: Path, description: dict[str, Any]) -> None:
    """Write dataset.json, not complete yet; or go on with the folder of a run that was stopped.

    Raises:
        ValueError: the folder holds another set, or one made with other settings.
    """
    held = prepared.description(out) if (out / "dataset.json").exists() else None
    if held is None and out.is_dir() and any(out.iterdir()):
        raise ValueError("out is a folder with other files in it, expected a new or an empty one.")
    if held is not None and held | {"complete": False} != description | {"complete": False}:
        raise ValueError(
            "out holds a set made from other files or with other settings, expected a new folder."
        )
    if held is None:
        write_description(out, description | {"complete": False})


def write_description(out: Path, description: dict[str, Any]) -> None:
    """Write dataset.json."""
    with staged(out) as folder:
        text = json.dumps(description, indent=1)
        (folder / "dataset.json").write_text(text + "\n", encoding="utf-8")
