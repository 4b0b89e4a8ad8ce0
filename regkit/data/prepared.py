"""Public data sets, as the scripts of data_scripts/ prepare them: one folder, one layout.

A prepared set is a folder with dataset.json, which lists its subjects and says who is there to
learn from, to validate with, to test on, and to be the one fixed image; and a folder a subject, or
a folder a pair where the set is one of pairs. See data_scripts/README.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


@dataclass(frozen=True, eq=False)
class Scan(Subject):
    """A real subject: its axes may run any way, and nobody knows its true correspondence.

    points: (N, d) float32, voxels, landmarks if there are any; of the two images of a pair, row k
        of both is one place.
    """

    points: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size along each array axis, mm."""
        return io.spacing_of(self.affine, self.image.ndim - 1)


class _Subjects(Sequence[Scan]):
    """Subjects that are read when they are asked for."""

    def __init__(self, folder: Path, contrast: str, entries: list[dict[str, Any]], keep: bool):
        self.folder, self.contrast, self.entries, self.keep = folder, contrast, entries, keep
        self.held: dict[int, Scan] = {}

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

    def _read(self, entry: dict[str, Any]) -> Scan:
        folder = self.folder / entry["name"]
        image = io.read(folder / f"{self.contrast}.nii.gz", self.contrast)
        labels = torch.zeros_like(image.data[0], dtype=torch.int16)
        if entry["labels"]:
            labels = io.read(folder / "labels.nii.gz", "labels", labels=True).data[0].short()
        points = torch.empty(0, image.ndim)
        if (folder / "points.csv").is_file():
            table = np.genfromtxt(folder / "points.csv", delimiter=",", names=True, ndmin=1)
            columns = [table[f"{self.contrast}_{axis}"] for axis in range(image.ndim)]
            points = torch.from_numpy(np.stack(columns, axis=1)).float()
        return Scan(entry["name"], image.data[0], labels, image.affine, torch.empty(0), points)


class _Pairs(Sequence[tuple[Scan, Scan]]):
    """The subjects of two sequences, side by side."""

    def __init__(self, moving: Sequence[Scan], fixed: Sequence[Scan]):
        self.moving, self.fixed = moving, fixed

    def __len__(self) -> int:
        return len(self.fixed)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.moving[index], self.fixed[index]


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
    return _Subjects(Path(folder), contrast, _entries(held, split), keep)


def pairs(
    folder: str | os.PathLike,
    split: str | None = None,
    category: str | None = None,
    keep: bool = True,
) -> Sequence[tuple[Scan, Scan]]:
    """The pairs of a prepared set of pairs, (moving, fixed), in the order of dataset.json.

    Args:
        folder: with dataset.json in it.
        split, keep: as of `subjects`.
        category: one of those that the set has, or None for all of them.

    Returns:
        A sequence of pairs, each read when it is first used. Their `points` are what the set knows
        of the truth.

    Raises:
        FileNotFoundError: `folder` is no prepared set.
        ValueError: it is not complete, or no set of pairs, or has no such split or category.
    """
    held = _complete(folder)
    if not {"moving", "fixed"} <= set(held["contrasts"]):
        raise ValueError(f"folder holds the set {held['name']!r}, expected a set of pairs.")
    entries, known = _entries(held, split), {e["category"] for e in held["subjects"]}
    if category not in (None, *known):
        listed = ", ".join(map(repr, sorted(known)))
        raise ValueError(f"category is {category!r}, expected one of {listed}, or None.")
    entries = [e for e in entries if category in (None, e["category"])]
    sides = (_Subjects(Path(folder), side, entries, keep) for side in ("moving", "fixed"))
    return _Pairs(*sides)


def structures(folder: str | os.PathLike) -> dict[int, str]:
    """The names of the structures that count, by label; empty where the set names none."""
    named = _complete(folder).get("structures", {})
    return {int(label): name for label, name in named.items()}


def _entries(held: dict[str, Any], split: str | None) -> list[dict[str, Any]]:
    if split not in (None, *SPLITS):
        known = ", ".join(map(repr, SPLITS))
        raise ValueError(f"split is {split!r}, expected one of {known}, or None.")
    return [e for e in held["subjects"] if split in (None, e["split"])]


def _complete(folder: str | os.PathLike) -> dict[str, Any]:
    held = description(folder)
    if not held["complete"]:
        raise ValueError("folder is not complete: run the script that makes it again.")
    return held
