"""What the scripts here have in common: the terms, the layout of a prepared set, the errors."""

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
from regkit.data import Subject

SPLITS = ("fixed", "train", "validation", "test")
FOUR_TO_ONE = {"train": 4, "test": 1}
SPACINGS = (1, 2, 4)  # mm, of sets that come at 1 mm
BRIGHT = 99.5  # percentile of the brain that becomes 1


def run(command: Callable[..., None]) -> None:
    """Run a script's function as command line; wrong input ends in one sentence and exit code 2."""
    try:
        typer.run(command)
    except (ValueError, OSError) as error:
        typer.echo(str(error) if isinstance(error, ValueError) else _reason(error), err=True)
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


def canonical(image: io.Image) -> io.Image:
    """The same image with its axes to R, A, S, as nearly as they go; of a slice, two of them."""
    order = io.axis_order(image.affine, image.ndim)
    axes, flipped = (
        [axis for axis, _ in order],
        [k for k, (_, sign) in enumerate(order) if sign < 0],
    )
    values = image.data.permute(0, 1, *(axis + 2 for axis in axes)).flip([k + 2 for k in flipped])
    affine, start = image.affine.copy(), np.array([0.0, 0.0, 0.0, 1.0])
    for k, (axis, sign) in enumerate(order):
        affine[:, k] = sign * image.affine[:, axis]
        start[axis] = 0 if sign > 0 else image.shape[axis] - 1
    affine[:, 3] = image.affine @ start
    return io.Image(values.contiguous(), affine)


def scaled(values: Tensor, name: str) -> Tensor:
    """Divided by the `BRIGHT` percentile of what is not black, at most 1."""
    brain = values[values > 0]
    if not len(brain):
        raise ValueError(f"{name} is empty, expected a brain.")
    return (values / float(np.percentile(brain.numpy(), BRIGHT))).clamp(0, 1)


def coarser(
    shape: Sequence[int], affine: np.ndarray, step: int
) -> tuple[tuple[int, ...], np.ndarray]:
    """A grid of every `step`-th voxel: (shape, affine). Its voxels lie on old ones, not between."""
    if step not in SPACINGS:
        raise ValueError(f"spacing is {step}, expected 1, 2 or 4 (mm).")
    d, new = len(shape), affine.copy()
    new[:, :d] *= step
    new[:, 3] += affine[:, :d].sum(axis=1) * ((step - 1) // 2)
    return tuple(n // step for n in shape), new


def build(
    out: Path,
    description: dict[str, Any],
    prepare: Callable[[str], Mapping[str, io.Image]],
    what: str = "subjects",
) -> None:
    """Make what `description` describes, or go on with it.

    Args:
        out: the folder to write.
        description: what dataset.json will hold.
        prepare: the name of a subject -> its images, one per contrast, and "labels". A subject's
            folder appears in one step, when all its files are written.
        what: the word for subjects beside the bar.
    """
    begin(out, description)
    for entry in tqdm(description["subjects"], desc=what, disable=None):
        folder = out / entry["name"]
        if folder.is_dir():
            continue
        images = prepare(entry["name"])
        with io.staged(folder) as temporary:
            for key, image in images.items():
                io.write_image(image.data, image.affine, temporary / f"{key}.nii.gz")
    write_description(out, description)


def begin(out: Path, description: dict[str, Any]) -> None:
    """Write dataset.json, not complete yet; or go on with the folder of a run that was stopped.

    Raises:
        ValueError: the folder holds another set, or one made with other settings.
    """
    held = _read(out) if (out / "dataset.json").exists() else None
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
    with io.staged(out) as folder:
        text = json.dumps(description, indent=1)
        (folder / "dataset.json").write_text(text + "\n", encoding="utf-8")


def _read(folder: Path) -> dict[str, Any]:
    try:
        description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        return {"contrasts": [], "subjects": [], "complete": False, **description}
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError):
        raise ValueError("dataset.json cannot be read, expected that of a prepared set.") from None


class Scan(Subject):
    """A real subject: its axes may run any way, and nobody knows its true correspondence."""

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size along each array axis, mm."""
        return io.spacing_of(self.affine, self.image.ndim - 1)


class _Subjects(Sequence[Subject]):
    """Subjects that are read when they are asked for."""

    def __init__(self, folder: Path, contrast: str, entries: list[dict[str, Any]], keep: bool):
        self.folder, self.contrast, self.entries, self.keep = folder, contrast, entries, keep
        self.held: dict[int, Subject] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        subject = self.held[i] if i in self.held else self._read(self.entries[i])
        if self.keep:
            self.held[i] = subject
        return subject

    def _read(self, entry: dict[str, Any]) -> Subject:
        folder = self.folder / entry["name"]
        image = io.read(folder / f"{self.contrast}.nii.gz", self.contrast)
        labels = torch.zeros_like(image.data[0], dtype=torch.int16)
        if entry["labels"]:
            labels = io.read(folder / "labels.nii.gz", "labels", labels=True).data[0].short()
        return Scan(entry["name"], image.data[0], labels, image.affine, torch.empty(0))


def subjects(
    folder: str | Path, contrast: str, split: str | None = None, keep: bool = True
) -> Sequence[Subject]:
    """The subjects of a prepared set in one contrast, in the order of dataset.json.

    Args:
        folder: with dataset.json in it.
        contrast: one of those that the set has.
        split: "fixed", "train", "validation", "test", or None for all of them.
        keep: hold in memory what has been read. Without it each use reads the file anew, so that a
            set may be larger than the memory.

    Returns:
        A sequence of subjects with image and labels (zeros where the set has none), each read when
        it is first used; their `velocity` is empty, because nobody knows the true correspondence of
        real patients.

    Raises:
        FileNotFoundError: `folder` is no prepared set.
        ValueError: it is not complete, or has no such contrast or split.
    """
    description = _complete(folder)
    if contrast not in description["contrasts"]:
        known = ", ".join(description["contrasts"])
        raise ValueError(f"contrast is {contrast!r}, expected one of {known}.")
    if split not in (None, *SPLITS):
        known = ", ".join(map(repr, SPLITS))
        raise ValueError(f"split is {split!r}, expected one of {known}, or None.")
    entries = [e for e in description["subjects"] if split in (None, e["split"])]
    return _Subjects(Path(folder), contrast, entries, keep)


def structures(folder: str | Path) -> dict[int, str]:
    """The names of the structures that count, by label; empty where the set names none."""
    named = _complete(folder).get("structures", {})
    return {int(label): name for label, name in named.items()}


def _complete(folder: str | Path) -> dict[str, Any]:
    if not (Path(folder) / "dataset.json").is_file():
        raise FileNotFoundError("folder has no dataset.json, expected a prepared set.")
    description = _read(Path(folder))
    if not description["complete"]:
        raise ValueError("folder is not complete: run the script that makes it again.")
    return description
