"""Public data sets, as the scripts of data_scripts/ prepare them: one folder, one layout.

A prepared set is a folder with dataset.json, which lists its subjects and says who is there to
learn from, to validate with, to test on, and to be the one fixed image; and a folder a subject, or
a folder a pair where the set is one of pairs. See data_scripts/README.md.

Nothing that stands in such a folder is trusted: `description` checks dataset.json, `check` the
headers of all images, and each image is checked again when it is read.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regkit import io
from regkit.data.subject import Subject
from regkit.messages import unknown
from regkit.transform import Grid

SPLITS = ("fixed", "train", "validation", "test")
SIDES = ("moving", "fixed")  # the contrasts of a set of pairs


def description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What dataset.json says; `complete` is False while a script still writes the set.

    Returns:
        name: of the set. settings: what its script was told. contrasts: names of the images of
        each subject. subjects: a dictionary each, with `name` (of its folder), `split` (one of
        `SPLITS`), `labels` (whether there is a label map) and, in sets of pairs, `category`.
        structures, if there are any: names of labels, by label. complete.

    Raises:
        FileNotFoundError: `folder` is no prepared set.
        ValueError: dataset.json cannot be read, or a field of it is something else than that.
    """
    file = Path(folder) / "dataset.json"
    if not file.is_file():
        raise FileNotFoundError("folder has no dataset.json, expected a prepared set.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # no UTF-8, no JSON, a number too long, too deep
        raise ValueError("dataset.json cannot be read, expected that of a prepared set.") from None
    if not isinstance(manifest, dict):
        raise _unexpected("", manifest, "an object with name, contrasts and subjects")
    manifest = {"name": "", "contrasts": [], "subjects": [], "complete": False, **manifest}
    _check_names(manifest)
    for entry in manifest["subjects"]:
        _check_entry(entry, manifest)
    names = Counter(entry["name"] for entry in manifest["subjects"])
    if names and (most := names.most_common(1)[0])[1] > 1:
        raise ValueError(f"dataset.json lists {most[0]!r} twice, expected each subject once.")
    return manifest


def _check_names(manifest: dict[str, Any]) -> None:
    """Everything in dataset.json but the entries of subjects."""
    for key, kind, wanted in (
        ("name", str, "a plain name"),
        ("contrasts", list, "a list of plain names"),
        ("subjects", list, "a list with an object for each subject"),
        ("settings", dict, "an object"),
        ("structures", dict, "an object of names by label"),
        ("complete", bool, "true or false"),
    ):
        if not isinstance(manifest.get(key, kind()), kind):
            raise _unexpected(key, manifest[key], wanted)
    if manifest["name"] and not _plain(manifest["name"]):
        raise _unexpected("name", manifest["name"], "a plain name")
    contrasts = manifest["contrasts"]
    if not all(_plain(one) and one != "labels" for one in contrasts):
        raise _unexpected("contrasts", contrasts, "plain names of images")
    if len(set(contrasts)) < len(contrasts):
        raise _unexpected("contrasts", contrasts, "each name once")
    for label, name in manifest.get("structures", {}).items():
        if not (label.isascii() and label.isdigit() and len(label) < 11 and isinstance(name, str)):
            raise _unexpected("structures", {label: name}, "names by label, such as {'17': 'left'}")
        if not 0 < int(label) < 2**31:
            raise _unexpected("structures", {label: name}, "labels from 1 to 2^31 - 1")


def _check_entry(entry: Any, manifest: dict[str, Any]) -> None:
    """One entry of `subjects`."""
    if not isinstance(entry, dict):
        raise _unexpected("subjects", entry, "an object for each subject")
    name = entry.get("name")
    if not _plain(name) or name == "dataset.json":
        raise _unexpected("a subject's name", name, "the plain name of a folder in the set's own")
    if entry.get("split") not in SPLITS:
        raise _unexpected(f"the split of {name}", entry.get("split"), "one of " + ", ".join(SPLITS))
    if not isinstance(entry.get("labels"), bool):
        raise _unexpected(f"the labels of {name}", entry.get("labels"), "true or false")
    paired = set(SIDES) <= set(manifest["contrasts"])
    if not isinstance(entry.get("category", None if paired else ""), str):
        raise _unexpected(f"the category of {name}", entry.get("category"), "a text")


def _plain(name: Any) -> bool:
    """Whether this is the name of a file or folder, and no path, nor a hidden one."""
    if not isinstance(name, str) or not name.isprintable():  # unprintable: also half a surrogate
        return False
    short = 0 < len(name.encode()) <= 200
    return short and name[0] not in ". " and name[-1] not in ". " and not set(name) & set("/\\:")


def _unexpected(field: str, value: Any, expected: str) -> ValueError:
    plain = value is None or isinstance(value, (str, int, float))
    text = repr(value) if plain else json.dumps(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    place = f"dataset.json has {text}" + (f" for {field}" if field else "")
    return ValueError(f"{place}, expected {expected}.")


class _Subjects(Sequence[Subject]):
    """Subjects that are read when they are asked for. A slice is as lazy, and shares what was read.

    `shape` is that of every image: of the first of the whole set, as its header says.
    """

    def __init__(
        self, folder: Path, contrast: str, entries: list[dict[str, Any]], keep: bool,
        shape: tuple[int, ...],
    ):  # fmt: skip
        self.folder, self.contrast, self.entries, self.keep = folder, contrast, entries, keep
        self.shape = shape
        self.kept: dict[str, Subject] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            part = copy(self)
            part.entries = self.entries[index]
            return part
        entry = self.entries[index]
        subject = self.kept.get(entry["name"]) or self._read(entry)
        if self.keep:
            self.kept[entry["name"]] = subject
        return subject

    def _read(self, entry: dict[str, Any]) -> Subject:
        name, folder = entry["name"], self.folder / entry["name"]
        called = f"{name}, {self.contrast}"
        image = io.read(folder / f"{self.contrast}.nii.gz", called)
        _check_shape(called, image.shape, self.shape)
        low, high = float(image.data.min()), float(image.data.max())
        if low < -0.01 or high > 1.01:
            raise ValueError(f"{called} has intensities from {low:g} to {high:g}, expected 0 to 1.")
        labels = torch.zeros_like(image.data[0], dtype=torch.int32)
        if entry["labels"]:
            called = f"{name}, labels"
            read = io.read(folder / "labels.nii.gz", called, labels=True)
            _check_shape(called, read.shape, self.shape)
            if not read.grid.same_as(image.grid):
                raise ValueError(
                    f"{called} lies elsewhere than {self.contrast}, expected one grid for both."
                )
            labels = read.data[0]
        points = _points(folder / "points.csv", name, self.contrast, image.ndim)
        return Subject(name, image.data[0], labels, image.affine, points=points)


def _check_shape(called: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"{called} has shape {tuple(shape)}, expected {tuple(expected)} as the first of the "
            "set."
        )


def _points(file: Path, name: str, contrast: str, ndim: int) -> Tensor:
    """(N, d) float32, the landmarks of one image; (0, d) where there is no such file."""
    if not file.is_file():
        return torch.empty(0, ndim)
    columns = [f"{contrast}_{axis}" for axis in range(ndim)]
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = [[float(row[c]) for c in columns] for row in csv.DictReader(lines)]
        if not all(math.isfinite(value) for row in rows for value in row):
            raise ValueError
    except (ValueError, KeyError, TypeError, csv.Error):
        raise ValueError(
            f"{name}, points.csv cannot be read, expected the columns {', '.join(columns)} and "
            "finite numbers below them."
        ) from None
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, ndim)


class _Pairs(Sequence[tuple[Subject, Subject]]):
    """The subjects of two sequences, side by side."""

    def __init__(
        self, moving: Sequence[Subject], fixed: Sequence[Subject], categories: Sequence[str]
    ):
        self.moving, self.fixed, self.categories = moving, fixed, categories

    def __len__(self) -> int:
        return len(self.fixed)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Pairs(self.moving[index], self.fixed[index], self.categories[index])
        return self.moving[index], self.fixed[index]


def subjects(
    folder: str | os.PathLike[str], contrast: str, split: str | None = None, keep: bool = True
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
        real patients. Reading one raises ValueError if its image is damaged, not finite or of
        another shape than the first of the set, or if its labels lie elsewhere.

    Raises:
        FileNotFoundError: `folder` is no prepared set.
        ValueError: it is not complete, or has no such contrast or split.
    """
    manifest = complete(folder)
    if contrast not in manifest["contrasts"]:
        raise unknown("contrast", contrast, manifest["contrasts"])
    entries = _entries(manifest, split)
    return _Subjects(Path(folder), contrast, entries, keep, _first_shape(Path(folder), manifest))


def pairs(
    folder: str | os.PathLike[str],
    split: str | None = None,
    category: str | None = None,
    keep: bool = True,
) -> Sequence[tuple[Subject, Subject]]:
    """The pairs of a prepared set of pairs, (moving, fixed), in the order of dataset.json.

    Args:
        folder: with dataset.json in it.
        split, keep: as of `subjects`.
        category: one of those that the set has, or None for all of them.

    Returns:
        A sequence of pairs, each read when it is first used. Their `points` are what the set knows
        of the truth; `categories` of the sequence names the category of each.

    Raises:
        FileNotFoundError: `folder` is no prepared set.
        ValueError: it is not complete, or no set of pairs, or has no such split or category.
    """
    manifest = complete(folder)
    if not of_pairs(manifest):
        raise ValueError(f"folder holds the set {manifest['name']!r}, expected a set of pairs.")
    entries, categories = _entries(manifest, split), {e["category"] for e in manifest["subjects"]}
    if category is not None and not categories:
        raise ValueError("dataset.json lists no subjects, expected at least one.")
    if category not in (None, *categories):
        listed = ", ".join(map(repr, sorted(categories)))
        raise ValueError(f"category is {category!r}, expected one of {listed}, or None.")
    entries = [e for e in entries if category in (None, e["category"])]
    shape = _first_shape(Path(folder), manifest)
    moving, fixed = (_Subjects(Path(folder), side, entries, keep, shape) for side in SIDES)
    return _Pairs(moving, fixed, [e["category"] for e in entries])


def structures(folder: str | os.PathLike[str]) -> dict[int, str]:
    """The names of the structures that count, by label; empty where the set names none."""
    return {int(label): name for label, name in complete(folder).get("structures", {}).items()}


def of_pairs(manifest: dict[str, Any]) -> bool:
    """Whether a `description` is that of a set of pairs, such as FIRE."""
    return set(SIDES) <= set(manifest["contrasts"])


def complete(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The `description` of a set that has images and is not being written any more."""
    manifest = description(folder)
    if not manifest["complete"]:
        raise ValueError("folder is not complete: run the script that makes it again.")
    if not manifest["contrasts"]:
        raise ValueError("dataset.json lists no contrasts, expected at least one.")
    return manifest


def check(folder: str | os.PathLike[str], contrasts: Sequence[str]) -> tuple[int, ...]:
    """The shape of all images in a prepared set, after a look at everybody's headers.

    Nothing but headers is read, so that this takes a second where reading takes minutes.

    Args:
        folder: with dataset.json in it.
        contrasts: of those that the set has, the ones to look at; label maps are looked at anyway.

    Raises:
        FileNotFoundError: `folder` is no prepared set, or a file is not there.
        ValueError: dataset.json is damaged; or a person's image cannot be read, has another shape
            or voxel size than the first of the set, axes that do not run to R, A, S, or another
            grid than the person's first image.
    """
    manifest, folder = complete(folder), Path(folder)
    first: Grid | None = None
    for entry in manifest["subjects"]:
        own: tuple[str, Grid] | None = None  # of the person's first image
        for key in (*contrasts, *["labels"] * entry["labels"]):
            called = f"{entry['name']}, {key}"
            grid = io.read_grid(folder / entry["name"] / f"{key}.nii.gz", called)
            first, own = first or grid, own or (key, grid)
            _check_shape(called, grid.shape, first.shape)
            if not np.allclose(grid.spacing, first.spacing, rtol=0.01):
                raise ValueError(
                    f"{called} has voxels of {_millimetres(grid)}, expected {_millimetres(first)} "
                    "as the first of the set."
                )
            _check_axes(called, grid)
            if not of_pairs(manifest) and not grid.same_as(own[1]):
                raise ValueError(
                    f"{called} lies elsewhere than {own[0]}, expected one grid for both."
                )
    if first is None:
        raise ValueError("dataset.json lists no subjects, expected at least one.")
    return first.shape


def _check_axes(called: str, grid: Grid) -> None:
    """Weights that have learned from other axes would see what `register` shows them turned."""
    import nibabel

    codes = nibabel.aff2axcodes(grid.affine)[: grid.ndim]
    places = ["RAS".find(code) if code else -1 for code in codes]
    if -1 in places or places != sorted(places):
        raise ValueError(
            f"{called} has axes to {', '.join(map(str, codes))}, expected to R, A and S in this "
            "order, as the scripts of data_scripts write them."
        )


def _first_shape(folder: Path, manifest: dict[str, Any]) -> tuple[int, ...]:
    """Of the first image, () where there is none."""
    for entry in manifest["subjects"][:1]:
        key, name = manifest["contrasts"][0], entry["name"]
        return io.read_grid(folder / name / f"{key}.nii.gz", f"{name}, {key}").shape
    return ()


def _millimetres(grid: Grid) -> str:
    return " x ".join(f"{size:g}" for size in grid.spacing) + " mm"


def _entries(manifest: dict[str, Any], split: str | None) -> list[dict[str, Any]]:
    if split not in (None, *SPLITS):
        listed = ", ".join(map(repr, SPLITS))
        raise ValueError(f"split is {split!r}, expected one of {listed}, or None.")
    return [e for e in manifest["subjects"] if split in (None, e["split"])]
