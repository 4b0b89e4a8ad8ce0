"""The fundus example of Tan (2023): FIRE, pairs of photographs of the retina with control points.

    python data_scripts/fire.py SOURCE --out FOLDER --accept-terms

What is taken from the paper and what is ours: see README.md beside this file.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import layout
import numpy as np
import torch
import typer
from PIL import Image

from regkit import io

SIZE = 416  # pixels: a seventh of FIRE's 2912, and a multiple of 16
TERMS = """
FIRE belongs to the Institute of Computer Science of FORTH, which publishes it
(https://projects.ics.forth.gr/cvrl/fire/). We know of no licence: what its page says holds, for
everything made from it as well. These are eyes of patients, who agreed to research: do not try to
find out who they are, and cite in what you publish

- Hernandez-Matas et al., FIRE: Fundus Image Registration dataset, Journal for Modeling in
  Ophthalmology 1(4), 2017.

The page of FORTH comes before this summary of ours.
"""


class Pair(NamedTuple):
    """The files of a pair. The fixed photograph is number 1, the reference, the moving number 2."""

    fixed: Path
    moving: Path
    points: Path


def pairs(source: Path) -> dict[str, Pair]:
    """name -> files of each pair: A01 to A14, P01 to P49, S01 to S71.

    A pair is a file "Ground Truth/control_points_S01_1_2.txt", at any depth, with the photographs
    S01_1.jpg and S01_2.jpg in the folder Images beside its own.
    """
    if not source.is_dir():
        raise ValueError("source is no folder, expected FIRE (unpack the archive first).")
    by_name: dict[str, Pair] = {}
    for path in sorted(source.rglob("control_points_*_1_2.txt")):
        name = path.name.split("_")[2]
        if re.fullmatch(r"[SPA]\d\d", name) is None:
            raise ValueError(
                f"source has control points of {name}, expected S, P or A and 2 digits."
            )
        images = [path.parents[1] / "Images" / f"{name}_{number}.jpg" for number in (1, 2)]
        for image in images:
            if not image.is_file():
                raise ValueError(f"{name}: there is no file Images/{image.name}, expected both.")
        pair = Pair(*images, path)
        if by_name.setdefault(name, pair) != pair:
            raise ValueError(f"{name} is there twice, expected each pair once.")
    if not by_name:
        raise ValueError(
            "source has no file Ground Truth/control_points_S01_1_2.txt or alike in it, expected "
            "FIRE."
        )
    return dict(sorted(by_name.items()))


def eyes(by_name: dict[str, Pair]) -> tuple[dict[str, str], int]:
    """pair -> the first of the pairs that hang together with it; and the number of photographs.

    One photograph may belong to several pairs, under other names: the files are then the same.
    """
    together = {name: {name} for name in by_name}
    first: dict[str, str] = {}
    for name, pair in by_name.items():
        for file in (pair.fixed, pair.moving):
            other = first.setdefault(hashlib.sha256(file.read_bytes()).hexdigest(), name)
            both = together[other] | together[name]
            together |= dict.fromkeys(both, both)
    return {name: min(others) for name, others in together.items()}, len(first)


def picture(path: Path, mode: str) -> Image.Image:
    """A picture in mode "RGB" or "L"."""
    try:
        with Image.open(path) as held:
            return held.convert(mode)
    except Exception:  # Pillow raises whatever comes
        raise ValueError(
            f"{path.name} cannot be read as a picture: it is damaged or cut short."
        ) from None


def photograph(path: Path, mask: Path, size: int) -> tuple[io.Image, int]:
    """The green channel in [0, 1], black outside of the mask; and its size before, in pixels.

    Axes run to the right and up; its place in space is that in the photograph, in pixels.
    """
    green = picture(path, "RGB").getchannel("G")
    n = green.width
    if green.height != n or n < size:
        raise ValueError(
            f"{path.name} has {n}x{green.height} pixels, expected a square of {size} or more."
        )
    if mask.is_file():
        seen = picture(mask, "L")
        if seen.size != green.size:
            raise ValueError(
                f"{mask.name} has {seen.width}x{seen.height} pixels, expected {n}x{n}."
            )
        green = Image.composite(
            green, Image.new("L", green.size), seen.point(lambda x: 255 * (x > 127))
        )
    array = np.asarray(green.resize((size, size), Image.Resampling.BOX), dtype=np.float32)
    values = torch.from_numpy(np.ascontiguousarray(array.T[:, ::-1])) / 255
    affine = np.diag([n / size, n / size, 1.0, 1.0])
    affine[:2, 3] = (n / size - 1) / 2
    affine[1, 3] -= n - 1
    return io.Image(values[None, None], affine), n


def control_points(path: Path) -> np.ndarray:
    """(N, 4): x and y of each point in the fixed photograph, then in the moving one, pixels."""
    try:
        table = np.loadtxt(path, ndmin=2)
    except ValueError:
        table = np.empty((0, 0))
    if table.shape[1] != 4 or not np.isfinite(table).all():
        raise ValueError(f"{path.name} is no table of control points, expected lines of 4 numbers.")
    return table


def prepare(pair: Pair, size: int) -> dict[str, io.Image | str]:
    """Both photographs and their control points, in voxels."""
    mask = pair.points.parents[1] / "Masks" / "mask.png"
    fixed, n = photograph(pair.fixed, mask, size)
    moving, other = photograph(pair.moving, mask, size)
    if n != other:
        raise ValueError(f"{pair.moving.name} is {other} pixels wide, expected {n} as its partner.")
    x, y = (control_points(pair.points)[:, start::2] for start in (0, 1))
    places = np.stack([x, n - 1 - y], axis=2)  # (N, 2 photographs, 2 axes), to the right and up
    voxels = ((places + 0.5) * size / n - 0.5).reshape(-1, 4)
    lines = [",".join(f"{value:.4f}" for value in row) for row in voxels]
    table = "\n".join(["fixed_0,fixed_1,moving_0,moving_1", *lines]) + "\n"
    return {"moving": moving, "fixed": fixed, "points.csv": table}


def main(
    source: Annotated[Path, typer.Argument(help="The folder of FIRE, unpacked.")],
    out: Annotated[Path, typer.Option(help="The folder to write, new or of a stopped run.")],
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Else they are only shown.")
    ] = False,
    size: Annotated[int, typer.Option(help="Pixels along each side.")] = SIZE,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
) -> None:
    """Prepare FIRE: pairs of photographs of the retina, with their control points."""
    layout.show_terms(TERMS, accept_terms)
    if size < 16:
        raise ValueError(f"size is {size}, expected at least 16.")
    by_name = pairs(source)
    eye, photographs = eyes(by_name)
    parts = layout.split(sorted(set(eye.values())), seed)
    description: dict[str, Any] = {
        "name": "fire",
        "settings": {"size": size, "seed": seed},
        "contrasts": ["moving", "fixed"],
        "complete": True,
        "subjects": [
            {"name": name, "split": parts[eye[name]], "labels": False, "category": name[0]}
            for name in by_name
        ],
    }
    layout.build(out, description, lambda name: prepare(by_name[name], size), "pairs")
    learn = sum(parts[eye[name]] == "train" for name in by_name)
    typer.echo(
        f"{len(by_name)} pairs of {photographs} photographs, {learn} to learn from and "
        f"{len(by_name) - learn} to test on."
    )


if __name__ == "__main__":
    layout.run(main)
