"""Synthetic photographs of the retina, in pairs whose true motion is known: a stand-in for FIRE.

FIRE (Hernandez-Matas et al., Journal for Modeling in Ophthalmology 2017) holds pairs of fundus
photographs in three categories, named by the first letter of a pair: S, which overlap by more than
75 %, P, by less, and A, by more than 75 % but with changes of the retina between two visits. Its
truth are control points, ten in each pair, most of them on vessels.

How a pair is made. A retina is drawn that is twice as wide as a photograph: trees of vessels grow
from the optic disc and divide by Murray's law. The moving photograph is its middle. The fixed one
is the same retina seen through a projective map and a smooth wave, both in closed form; so the true
displacement and the control points are known. Each photograph then gets its own light and noise,
and the round edge of the camera's field of view, which does not move with the retina. Numbers
without a source in this file are ours, chosen so that a pair looks like a photograph; vessels are
wider than real ones, so that they are still there at 256 pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from regkit.data.subject import Subject
from regkit.spatial import identity_grid, resize, warp

# lengths are in radii of a photograph: half of its side
SHIFTS = {"S": (0.05, 0.2), "P": (0.55, 0.85), "A": (0.05, 0.2)}  # between the two photographs
FIELD = 0.96  # radius of what the camera sees
DISC, FOVEA = (0.45, 0.05), (-0.35, -0.05)
DISC_RADIUS = 0.16
TRUNKS, WIDEST, NARROWEST, LENGTH = 8, 0.018, 0.0065, 0.45  # trees, radii of vessels, a branch
POINTS = 10  # in each pair, as in FIRE
FINER = 4  # the trees are drawn on a grid so much finer
BACKGROUND, PALE = (0.78, 0.40, 0.17), (0.98, 0.85, 0.55)  # red, green, blue
VESSEL = (0.75, 0.45, 0.60)  # what a vessel leaves of each colour


@dataclass(frozen=True, eq=False)
class VesselPair:
    """Two photographs of one synthetic retina.

    name: such as "S01"; its first letter is the category.
    moving, fixed: `image` (1, *S) is the green channel in [0, 1], which shows vessels best,
        `labels` (1, *S) 1 on vessels, `points` (10, 2) the control points, voxels; row k of both
        is one place of the retina.
    moving_rgb, fixed_rgb: (3, *S) in [0, 1].
    inside: (1, *S) bool, the field of view, at the same place in both.
    disp: (1, 2, *S), voxels, the true displacement; known outside of the field of view as well.
    """

    name: str
    moving: Subject
    fixed: Subject
    moving_rgb: Tensor
    fixed_rgb: Tensor
    inside: Tensor
    disp: Tensor

    @property
    def overlap(self) -> Tensor:
        """(1, *S) bool: what the fixed photograph shows and the moving one shows as well."""
        seen = warp(self.inside[None].float(), self.disp, mode="nearest")[0]
        return self.inside & (seen > 0)

    @property
    def overlap_percent(self) -> float:
        """How much of the fixed photograph the moving one shows as well."""
        return 100 * float(self.overlap.sum() / self.inside.sum())


@dataclass(frozen=True, eq=False)
class _Motion:
    """A map of the plane, fixed to moving: projective, then a wave. Lengths in radii."""

    linear: np.ndarray  # (2, 2)
    shift: np.ndarray  # (2,)
    tilt: np.ndarray  # (2,)
    wave: np.ndarray  # (2,)
    phase: np.ndarray  # (2,)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """(..., 2) -> (..., 2)"""
        straight = (places @ self.linear.T + self.shift) / (1 + places @ self.tilt)[..., None]
        wave = self.wave * np.sin(np.pi * places[..., ::-1] + self.phase)
        moved: np.ndarray = straight + wave
        return moved

    def inverse(self, places: np.ndarray) -> np.ndarray:
        """By fixed-point iteration; each step leaves less than a third of the error."""
        origin: np.ndarray = places - self.shift
        for _ in range(40):
            origin = origin + places - self(origin)
        return origin


def _motion(random: np.random.Generator, category: str) -> _Motion:
    angle, turn = random.uniform(0, 2 * np.pi), np.radians(random.uniform(-5, 5))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return _Motion(
        linear=rotation * random.uniform(0.98, 1.02),
        shift=random.uniform(*SHIFTS[category]) * np.array([np.cos(angle), np.sin(angle)]),
        tilt=random.uniform(-0.02, 0.02, 2),
        wave=random.uniform(0.005, 0.015, 2),
        phase=random.uniform(0, 2 * np.pi, 2),
    )


def murray(share: float) -> tuple[float, float]:
    """How a vessel divides: the radius of a branch, of a stem of radius 1, and its angle to it.

    Murray (1926): a vessel of radius r divides into two with r^3 = a^3 + b^3, at the angles at
    which blood and walls cost least.

    Args:
        share: a^3 / r^3, in (0, 1).

    Returns:
        a / r, and the angle in radians.
    """
    k = share ** (1 / 3)
    return k, np.arccos((1 + k**4 - (1 - k**3) ** (4 / 3)) / (2 * k**2))


def _trees(random: np.random.Generator) -> list[tuple[np.ndarray, float]]:
    """The branches of all trees: a line (n, 2) from the disc outwards, and the radius."""
    branches = []
    turns = 2 * np.pi * (np.arange(TRUNKS) + random.uniform(-0.3, 0.3, TRUNKS)) / TRUNKS
    tips = [(np.array(DISC), turn, WIDEST) for turn in turns]
    while tips:
        start, angle, radius = tips.pop()
        angles = angle + random.normal(0, 0.12, 8).cumsum()
        steps = np.stack([np.cos(angles), np.sin(angles)], axis=1) / 8
        line = start + LENGTH * random.uniform(0.6, 1.4) * np.vstack([[0, 0], steps.cumsum(axis=0)])
        branches.append((line, radius))
        share, side = random.uniform(0.15, 0.5), random.choice([-1, 1])
        for part, way in ((share, side), (1 - share, -side)):
            k, turn = murray(part)
            if k * radius > NARROWEST:
                tips.append((line[-1], angles[-1] + way * turn, k * radius))
    return branches


def _draw(branches: Iterable[tuple[np.ndarray, float]], size: int) -> Tensor:
    """Which part of each voxel of the retina is vessel: (1, 1, 2 size, 2 size), in [0, 1]."""
    n = 2 * size * FINER
    picture = Image.new("L", (n, n))
    pen = ImageDraw.Draw(picture)
    for line, radius in branches:
        places = (line[:, ::-1] / 2 + 1) * n / 2 - 0.5  # a picture's first axis is our second
        width = max(1, round(radius * size * FINER))
        pen.line([tuple(place) for place in places.tolist()], 255, width, joint="curve")
    return torch.from_numpy(np.asarray(picture.reduce(FINER), dtype=np.float32) / 255)[None, None]


def _colour(colour: Sequence[float]) -> Tensor:
    return torch.tensor(colour, dtype=torch.float32).reshape(1, 3, 1, 1)


def _around(places: Tensor, centre: Sequence[float]) -> Tensor:
    """Distance (1, 1, *S) of the voxels at `places` (2, *S) from a centre."""
    apart: Tensor = (places - places.new_tensor(centre).reshape(2, 1, 1)).norm(dim=0)
    return apart[None, None]


def _retina(random: np.random.Generator, vessels: Tensor) -> Tensor:
    """The retina in colour, before any light: (1, 3, 2 size, 2 size)."""
    n = vessels.shape[-1]
    places = 4 * (identity_grid((n, n)) + 0.5) / n - 2
    grain = resize(torch.from_numpy(random.normal(0, 0.05, (1, 1, 48, 48))).float(), (n, n))
    dark = 0.4 * torch.exp(-_around(places, FOVEA).square() / 0.04)
    retina = _colour(BACKGROUND) * (1 + grain) * (1 - dark)
    disc = torch.sigmoid((DISC_RADIUS - _around(places, DISC)) / 0.015)
    retina = retina + disc * (_colour(PALE) - retina)
    return retina * (1 - vessels * (1 - _colour(VESSEL)))


def _changed(random: np.random.Generator, retina: Tensor) -> Tensor:
    """The retina at another visit: with small bleedings, dark, and cotton-wool spots, pale."""
    n = retina.shape[-1]
    places = 4 * (identity_grid((n, n)) + 0.5) / n - 2
    for k in range(16):
        radius = random.uniform(0.02, 0.06)
        spot = torch.sigmoid(
            (radius - _around(places, random.uniform(-0.8, 0.8, 2).tolist())) / 0.01
        )
        retina = retina + spot * ((_colour(PALE) if k % 2 else 0.4 * retina) - retina)
    return retina


def _photograph(random: np.random.Generator, retina: Tensor, inside: Tensor) -> Tensor:
    """What the camera makes of the part of the retina before it: (3, *S), in [0, 1]."""
    size = retina.shape[-1]
    places = 2 * (identity_grid((size, size)) + 0.5) / size - 1
    slope = torch.from_numpy(random.uniform(-0.15, 0.15, 2)).float().reshape(2, 1, 1)
    light = random.uniform(0.8, 1.05) + (slope * places).sum(0) - 0.3 * places.square().sum(0)
    colours = _colour(random.uniform(0.92, 1.08, 3).tolist())
    noise = torch.from_numpy(random.normal(0, 0.01, (3, size, size))).float()
    return ((retina * light * colours)[0] + noise).clamp(0, 1) * inside


def _spread(candidates: np.ndarray, count: int) -> np.ndarray:
    """Rows of some of them, far from each other: the next is the farthest from those before."""
    chosen = [int(np.linalg.norm(candidates - candidates.mean(axis=0), axis=1).argmin())]
    while len(chosen) < min(count, len(candidates)):
        apart = np.linalg.norm(candidates[:, None] - candidates[chosen], axis=2).min(axis=1)
        chosen.append(int(apart.argmax()))
    return np.array(chosen)


def vessel_pair(name: str = "S01", size: int = 256, seed: int = 0) -> VesselPair:
    """A pair of synthetic fundus photographs; the same for the same arguments.

    Args:
        name: category S, P or A, and two digits, as in FIRE. Other digits are another retina.
        size: voxels along each side, even, at least 64.
        seed: of everything that is drawn at random.
    """
    if re.fullmatch(r"[SPA]\d\d", name) is None:
        raise ValueError(f"name is {name!r}, expected S, P or A and two digits, such as 'S01'.")
    if size < 64 or size % 2:
        raise ValueError(f"size is {size}, expected an even number of at least 64 voxels.")
    category = name[0]
    random = np.random.default_rng([seed, ord(category), int(name[1:])])
    branches, motion = _trees(random), _motion(random, category)
    vessels = _draw(branches, size)
    retina = _retina(random, vessels)
    later = _changed(random, retina) if category == "A" else retina

    centre, radius = (size - 1) / 2, size / 2
    voxels = np.moveaxis(np.indices((size, size)), 0, -1)
    places = (voxels - centre) / radius
    inside = torch.from_numpy(np.linalg.norm(places, axis=-1) <= FIELD)[None]
    moved = np.moveaxis(motion(places) * radius + centre - voxels, -1, 0)
    disp = torch.from_numpy(moved)[None].float()

    middle = (..., slice(size // 2, size // 2 + size), slice(size // 2, size // 2 + size))
    both = torch.cat([later, vessels], dim=1)
    seen = warp(both, disp + size // 2)  # the retina begins size / 2 before the moving photograph
    moving_rgb, fixed_rgb = [
        _photograph(random, image, inside) for image in (retina[middle], seen[:, :3])
    ]
    masks = [((part[0] > 0.5) & inside).to(torch.int16) for part in (vessels[middle], seen[:, 3:])]

    on_vessels = np.concatenate([line for line, _ in branches])
    in_fixed = motion.inverse(on_vessels)
    shown = np.linalg.norm([on_vessels, in_fixed], axis=2).max(axis=0) < FIELD - 0.06
    chosen = np.flatnonzero(shown)[_spread(in_fixed[shown], POINTS)]
    points = [torch.from_numpy(p[chosen] * radius + centre).float() for p in (on_vessels, in_fixed)]
    moving, fixed = (
        Subject(name, rgb[1:2], mask, np.eye(4), points=at)
        for rgb, mask, at in zip((moving_rgb, fixed_rgb), masks, points, strict=True)
    )
    return VesselPair(name, moving, fixed, moving_rgb, fixed_rgb, inside, disp)


def vessel_contrast(image: Tensor) -> Tensor:
    """What is darker than its surroundings, vessels above all: bright, before a black background.

    In a photograph of the retina light and the round edge of the field of view do not move with the
    retina; to a similarity they say that nothing moves. Here both are gone: from the mean around
    each voxel, over the field of view, its value is subtracted. Along the edge, four voxels wide,
    the result is 0.

    Args:
        image: (B, 1, H, W), the green channel, 0 outside of the field of view, any scale.

    Returns:
        (B, 1, H, W) in [0, 1]; 1 is three standard deviations. Above 0.3, most of it is vessel.
    """
    if image.ndim != 4 or image.shape[1] != 1:
        raise ValueError(f"image has shape {tuple(image.shape)}, expected (B, 1, H, W).")
    if not (image.amax(dim=(2, 3)) > 0).all():
        raise ValueError("image is black, expected a photograph of the retina.")

    def mean(values: Tensor, width: int) -> Tensor:
        for _ in range(2):
            values = F.avg_pool2d(values, width, stride=1, padding=width // 2)
        return values

    width = 2 * (min(image.shape[2:]) // 32) + 1
    inside = (image > 0.04 * image.amax(dim=(2, 3), keepdim=True)).to(image)
    around = mean(image * inside, width) / mean(inside, width).clamp(min=1e-6)
    darker = (around - image) * (mean(inside, 5) > 0.999)
    sd = (darker.square().sum(dim=(2, 3)) / inside.sum(dim=(2, 3))).sqrt()[..., None, None]
    return (darker / (3 * sd).clamp(min=1e-12)).clamp(0, 1)


def write_as_fire(pairs: Iterable[VesselPair], folder: Path) -> None:
    """Write pairs with the folders, names and tables of FIRE, for data_scripts/fire.py to read.

    Images/S01_1.jpg is the fixed photograph and S01_2.jpg the moving one, Ground Truth/
    control_points_S01_1_2.txt has a line "x y x y" for each control point, in pixels to the right
    and down, and Masks/mask.png is white in the field of view.
    """

    def picture(values: Tensor) -> Image.Image:
        # our axes run right and up, those of a picture down and right
        array = (255 * values.float()).round().byte().flip(2).permute(2, 1, 0).numpy()
        return Image.fromarray(array.squeeze())

    for name in ("Images", "Ground Truth", "Masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for pair in pairs:
        sides = ((pair.fixed, pair.fixed_rgb), (pair.moving, pair.moving_rgb))
        columns = []
        for number, (scan, rgb) in enumerate(sides, 1):
            picture(rgb).save(folder / "Images" / f"{pair.name}_{number}.jpg", quality=95)
            columns += [scan.points[:, 0], rgb.shape[2] - 1 - scan.points[:, 1]]
        table = folder / "Ground Truth" / f"control_points_{pair.name}_1_2.txt"
        np.savetxt(table, torch.stack(columns, dim=1).numpy(), fmt="%.3f")
        picture(pair.inside).save(folder / "Masks" / "mask.png")
