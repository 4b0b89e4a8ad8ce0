"""What the scripts here have in common: the terms, the layout of a prepared set, the errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import typer

from regkit import io
from regkit.data import Subject

SPLITS = ("train", "test")


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


def split(names: Sequence[str], seed: int, part: float = 0.8) -> dict[str, str]:
    """name -> "train" or "test", drawn at random; the same for the same names and seed."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    learn = {names[i] for i in order[: round(part * len(names))]}
    return {name: SPLITS[name not in learn] for name in names}


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


def subjects(folder: str | Path, contrast: str, split: str | None = None) -> list[Subject]:
    """The subjects of a prepared set in one contrast, in the order of dataset.json.

    Args:
        folder: with dataset.json in it.
        contrast: one of those that the set has.
        split: "train", "test", or None for both.

    Returns:
        Subjects with image and labels (zeros where the set has none); their `velocity` is empty,
        because nobody knows the true correspondence of real patients.
    """
    folder = Path(folder)
    if not (folder / "dataset.json").is_file():
        raise FileNotFoundError("folder has no dataset.json, expected a prepared set.")
    description = _read(folder)
    if not description["complete"]:
        raise ValueError("folder is not complete: run the script that makes it again.")
    if contrast not in description["contrasts"]:
        known = ", ".join(description["contrasts"])
        raise ValueError(f"contrast is {contrast!r}, expected one of {known}.")
    if split not in (None, *SPLITS):
        raise ValueError(f"split is {split!r}, expected 'train', 'test' or None.")
    found = []
    for entry in description["subjects"]:
        if split in (None, entry["split"]):
            image = io.read(folder / entry["name"] / f"{contrast}.nii.gz", contrast)
            labels = torch.zeros_like(image.data[0], dtype=torch.int16)
            if entry["labels"]:
                path = folder / entry["name"] / "labels.nii.gz"
                labels = io.read(path, "labels", labels=True).data[0].short()
            found.append(
                Subject(entry["name"], image.data[0], labels, image.affine, torch.empty(0))
            )
    return found
