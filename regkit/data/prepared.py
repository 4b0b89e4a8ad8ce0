"""Public data sets, as the scripts of data_scripts/ prepare them: one folder, one layout.

A prepared set is a folder with dataset.json, which lists its subjects and says who is there to
learn from, to validate with, to test on, and to be the one fixed image; and a folder a subject. See
data_scripts/README.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from regkit import io
from regkit.data.population import Subject

SPLITS = ("fixed", "train", "validation", "test")


def description(folder: str | os.PathLike) -> dict[str, Any]:
    """What dataset.json says; `complete` is False while a script still writes the set.

    Raises:
        FileNotFoundError: `folder` is no prepared set.
        ValueError: dataset.json cannot be read.
    """
    file = Path(folder) / "dataset.json"
    if not file.is_file():
        raise FileNotFoundError("folder has no dataset.json, expected a prepared set.")
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        return {"name": "", "contrasts": [], "subjects": [], "complete": False, **held}
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
    folder: str | os.PathLike, contrast: str, split: str | None = None, keep: bool = True
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
    held = _complete(folder)
    if contrast not in held["contrasts"]:
        known = ", ".join(held["contrasts"])
        raise ValueError(f"contrast is {contrast!r}, expected one of {known}.")
    if split not in (None, *SPLITS):
        known = ", ".join(map(repr, SPLITS))
        raise ValueError(f"split is {split!r}, expected one of {known}, or None.")
    entries = [e for e in held["subjects"] if split in (None, e["split"])]
    return _Subjects(Path(folder), contrast, entries, keep)


def structures(folder: str | os.PathLike) -> dict[int, str]:
    """The names of the structures that count, by label; empty where the set names none."""
    named = _complete(folder).get("structures", {})
    return {int(label): name for label, name in named.items()}


def _complete(folder: str | os.PathLike) -> dict[str, Any]:
    held = description(folder)
    if not held["complete"]:
        raise ValueError("folder is not complete: run the script that makes it again.")
    return held
