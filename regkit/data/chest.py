"""Synthetic CT of the chest, before and after a breath whose motion is known.

A chest is a handful of numbers and a tree of vessels in each lung, in millimetres; it can be drawn
at any places. So a pair of images needs no interpolation: the moving image is the chest drawn at
the voxels of a grid, the fixed one the same chest drawn at the places to which the true
displacement leads. Brightness is in Hounsfield units with the values of textbooks (air -1000, lung
-800, fat -100, water 0, soft tissue 40, bone 400), then `scaled` to [0, 1]. Sizes without a source
in this file are ours, chosen so that a picture looks like a chest; ribs and vessels are wider than
real ones, so that they are still there at 4 mm. Vessels divide as those of
`regkit.data.vessels`. In 2D a chest is one coronal slice, in front of the spine.

The motion. A breath moves the diaphragm along the body, and what lies above it the less, the higher
it is; a random smooth part comes on top. Their sum is a velocity, which is integrated: the map is
smooth and has an inverse. Lungs do not slide along the ribs here. `ChestPairs` can move real
volumes in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor
from torch.utils.data import Dataset

from regkit.data.cache import place_of
from regkit.data.population import smooth_noise
from regkit.data.subject import Subject
from regkit.data.vessels import murray
from regkit.messages import unknown
from regkit.spatial import identity_grid, integrate, resize, warp

LABELS: dict[int, str] = {1: "lungs", 2: "heart", 3: "bones"}
AIR, LUNG, FAT, SOFT, HEART, BONE = -1000.0, -800.0, -100.0, 40.0, 50.0, 400.0  # Hounsfield units
# what an image shows, mm to the right, to the front and to the top of the middle of the chest
FIELDS = {
    "chest": ((-180.0, 180.0), (-130.0, 130.0), (-170.0, 170.0)),
    "right lung": ((0.0, 157.0), (-107.0, 107.0), (-161.0, 161.0)),  # as the sample `lung_ct`
}
WIDEST, NARROWEST = 6.0, 1.5  # mm, radii of vessels
TRUNKS = {2: 5, 3: 14}  # vessels that enter a lung
FADE = 0.35  # of the image's height: the breath fades over it, from DIAPHRAGM upwards
DIAPHRAGM = 0.2  # where a breath moves most


@dataclass(frozen=True, eq=False)
class Chest:
    """One synthetic chest, in mm; see `chests`.

    name: such as "chest-0-0007" (seed, index).
    ndim: 3, or 2 for the coronal slice.
    size: (3,) factors of the whole. lungs: (2, 2, 3), centre and half axes of the right and the
        left one. domes: (2,), how high the diaphragm is there. heart: (2, 3), centre, half axes.
    vessels: (n, d) points along them. radii: (n + 1,), theirs, and -inf for "none near".
    """

    name: str
    ndim: int
    size: np.ndarray
    lungs: np.ndarray
    domes: np.ndarray
    heart: np.ndarray
    vessels: KDTree
    radii: np.ndarray

    def draw(self, places: np.ndarray, voxel: float) -> tuple[np.ndarray, np.ndarray]:
        """What is at `places` (d, *S), mm: Hounsfield units and labels, both (*S).

        voxel: mm over which an edge is spread, as a voxel that lies on it does.
        """
        places = places / self.size[[0, 2] if self.ndim == 2 else [0, 1, 2]].reshape(
            -1, *[1] * self.ndim
        )
        x, z = places[0], places[-1]
        y = places[1] if self.ndim == 3 else np.zeros_like(x)

        # all of these are depths below a surface, mm, about; negative outside
        body = _ellipsoid((x, y), (0, 0), (165, 118))
        whole = [_ellipsoid((x, y, z), centre, half) for centre, half in self.lungs]
        heart = _ellipsoid((x, y, z), *self.heart)
        lungs = np.maximum(
            *(np.minimum(lung, z - self._diaphragm(x, y, side)) for side, lung in enumerate(whole))
        )
        lungs = np.minimum(lungs, -2 - heart)
        wall = np.maximum(*whole)  # ribs lie 2 to 12 mm outside of the lungs
        ribs = np.minimum(5 - abs(wall + 7), 8 * np.cos(2 * np.pi * (z + 0.4 * y) / 36))
        ribs = np.minimum(ribs, np.minimum(abs(x) - 35, 105 - abs(z)))
        spine = np.minimum(18 - np.hypot(x, y + 82), 10 + 12 * np.cos(2 * np.pi * z / 30))
        airways = np.maximum(
            _tube((x, y, z), (0, 0, 300), (0, 0, 38), 9),
            np.maximum(*(_tube((x, y, z), (0, 0, 38), (s * 42, 0, 10), 7) for s in (-1, 1))),
        )

        hu = np.full(x.shape, AIR)
        for depth, value in (
            (body, FAT),
            (body - 10, SOFT),
            (np.maximum(ribs, spine), BONE),
            (heart, HEART),
            (airways, AIR),
            (lungs, LUNG - 0.4 * y),  # what lies behind is compressed
        ):
            hu += np.clip(depth / voxel + 0.5, 0, 1) * (value - hu)
        near = lungs > -voxel
        reach = WIDEST + voxel
        distance, which = self.vessels.query(
            np.moveaxis(places[:, near], 0, -1), distance_upper_bound=reach
        )
        share = np.clip((self.radii[which] - np.minimum(distance, reach)) / voxel + 0.5, 0, 1)
        hu[near] += share * (SOFT - hu[near])
        labels = np.select([lungs > 0, heart > 0, np.maximum(ribs, spine) > 0], [1, 2, 3])
        return hu, labels.astype(np.int16)

    def _diaphragm(self, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
        """Its height at (x, y): a dome below each lung."""
        centre, half = self.lungs[side]
        across = ((x - centre[0]) / half[0]) ** 2 + ((y - centre[1]) / half[1]) ** 2
        height: np.ndarray = self.domes[side] - 45 * across
        return height


def _ellipsoid(
    places: Sequence[np.ndarray], centre: Sequence[float], half: Sequence[float]
) -> np.ndarray:
    """Depth below the surface of an ellipsoid with these half axes."""
    squares = sum(((p - c) / h) ** 2 for p, c, h in zip(places, centre, half))
    depth: np.ndarray = (1 - np.sqrt(squares)) * min(half)
    return depth


def _tube(
    places: Sequence[np.ndarray], start: Sequence[float], end: Sequence[float], radius: float
) -> np.ndarray:
    """Depth below the surface of a straight tube with round ends."""
    along = np.subtract(end, start)
    share = sum((p - s) * a for p, s, a in zip(places, start, along)) / (along @ along)
    share = np.clip(share, 0, 1)
    squares = sum((p - s - share * a) ** 2 for p, s, a in zip(places, start, along))
    depth: np.ndarray = radius - np.sqrt(squares)
    return depth


def _tree(
    random: np.random.Generator, start: np.ndarray, way: np.ndarray
) -> tuple[list[np.ndarray], list[float]]:
    """Points (n, d) along each branch of a tree that starts in a direction; the radius at each."""
    points, radii = [], []
    tips = [(start, way / np.linalg.norm(way), WIDEST * random.uniform(0.8, 1.0))]
    while tips:
        place, way, radius = tips.pop()
        steps = 4 + int(radius * random.uniform(2, 4))
        ways = way + random.normal(0, 0.06, (steps, len(way))).cumsum(axis=0)
        ways /= np.linalg.norm(ways, axis=1, keepdims=True)
        line = place + 2.0 * ways.cumsum(axis=0)
        points.append(line)
        radii += [radius] * steps
        place, way = line[-1], ways[-1]
        aside = random.standard_normal(len(way))  # the plane in which it divides
        aside -= (aside @ way) * way
        aside /= np.linalg.norm(aside)
        share = random.uniform(0.15, 0.5)
        for part, side in ((share, aside), (1 - share, -aside)):
            k, turn = murray(part)
            if k * radius > NARROWEST:
                tips.append((place, np.cos(turn) * way + np.sin(turn) * side, k * radius))
    return points, radii


def _make(ndim: int, seed: int, index: int) -> Chest:
    random = np.random.default_rng([seed, index, ndim])

    def varied(values: Sequence[float], by: float) -> np.ndarray:
        return np.array(values) * random.uniform(1 - by, 1 + by, len(values))

    half = varied((56, 82, 135), 0.06)
    lungs = np.array([[(s * 74, -8, random.uniform(-8, 8)), half * (1, 1, 1)] for s in (1, -1)])
    lungs[1, 1, 0] *= random.uniform(0.88, 0.97)  # the left one is narrower
    points: list[np.ndarray] = []
    radii: list[float] = []
    axes = [0, 2] if ndim == 2 else [0, 1, 2]
    for side in (1, -1):
        for _ in range(TRUNKS[ndim]):
            way = random.standard_normal(ndim)
            way[0] = side * (abs(way[0]) + 0.5)
            start = np.array([side * 40, 0, 8]) + random.normal(0, 6, 3)
            tree = _tree(random, start[axes], way)
            points += tree[0]
            radii += tree[1]
    return Chest(
        name=f"chest-{seed}-{index:04d}",
        ndim=ndim,
        size=random.uniform(0.92, 1.06, 3),
        lungs=lungs,
        domes=np.array([-62, -72]) + random.uniform(-12, 12, 2),
        heart=np.stack([(-22, 22, -48) + random.uniform(-6, 6, 3), varied((52, 45, 50), 0.08)]),
        vessels=KDTree(np.concatenate(points)),
        radii=np.array([*radii, -np.inf]),
    )


def chests(n: int, ndim: int = 3, seed: int = 0) -> list[Chest]:
    """Synthetic chests; one depends on (seed, index) alone, not on n."""
    if ndim not in (2, 3):
        raise ValueError(f"ndim is {ndim!r}, expected 2 or 3.")
    if n < 0:
        raise ValueError(f"n is {n}, expected 0 or more.")
    return [_make(ndim, seed, index) for index in range(n)]


def scaled(hounsfield: Tensor) -> Tensor:
    """Hounsfield units to [0, 1]: air and less is 0, bone and more is 1."""
    return ((hounsfield.float() - AIR) / (BONE - AIR)).clamp(0, 1)


def breath(
    random: np.random.Generator,
    shape: Sequence[int],
    spacing: Sequence[float],
    depth: float = 25.0,
    other: float = 4.0,
    width: float = 40.0,
) -> Tensor:
    """A random motion between two breaths: (1, d, *S), voxels; x + disp(x) has an inverse.

    The last axis runs to the top.

    Args:
        random: draws how deep it is, of which sign, and what comes on top.
        shape, spacing: of the grid; spacing in mm.
        depth: mm that the diaphragm moves at most; at least a third of it.
        other: mm, standard deviation of the random smooth part along each axis.
        width: mm, standard deviation of the smoothing of that part.
    """
    d = len(shape)
    height = np.linspace(0, 1, shape[-1])
    fading = np.exp(-(((height - DIAPHRAGM) / FADE) ** 2))
    deep = random.choice([-1, 1]) * random.uniform(1 / 3, 1) * depth
    # drawn at points half a width apart, which is enough for noise as smooth as that
    lattice = [max(2, round(2 * n * h / width) + 1) for n, h in zip(shape, spacing, strict=True)]
    noise = np.stack([smooth_noise(random, lattice, 2.0) for _ in range(d)])
    velocity = other * resize(torch.from_numpy(noise).float()[None], shape)
    velocity[:, -1] += torch.from_numpy(deep * fading).float()
    return integrate(velocity / velocity.new_tensor(spacing).reshape(1, d, *[1] * d))


class ChestPairs(Dataset[dict[str, Tensor | str]]):
    """A chest before and after a breath, drawn at random; the same for the same (seed, index).

    Args:
        patients: chests of the number of axes that `shape` has, at least one, unless there are
            volumes.
        shape: of the images.
        length: how many pairs there are.
        seed: of the motions, the noise, and who is drawn.
        field: what an image of a synthetic chest shows, one of FIELDS.
        depth, other, width: of `breath`.
        noise: its standard deviation, Hounsfield units.
        volumes: real scans of this shape to be moved in the same way, images `scaled`, their last
            axis to the top; every second pair is of them.

    Each item is a dictionary of `moving`, `fixed` (1, *S) float32 in [0, 1]; `moving_labels`,
    `fixed_labels` (1, *S) int16, named by LABELS (or as the volume has them); `disp` (d, *S), the
    true displacement, voxels; and `name`.
    """

    def __init__(
        self,
        patients: Sequence[Chest],
        shape: Sequence[int],
        length: int,
        seed: int = 0,
        field: str = "chest",
        depth: float = 25.0,
        other: float = 4.0,
        width: float = 40.0,
        noise: float = 20.0,
        volumes: Sequence[Subject] = (),
    ):
        self.shape, self.length, self.seed = tuple(int(n) for n in shape), length, seed
        if len(self.shape) not in (2, 3) or min(self.shape) < 16:
            raise ValueError(
                f"shape is {self.shape}, expected two or three sizes of at least 16 voxels."
            )
        if not patients and not volumes:
            raise ValueError("patients is empty, expected at least one chest or volume.")
        for patient in patients:
            if patient.ndim != len(self.shape):
                raise ValueError(
                    f"patients holds {patient.ndim}D chests and shape is {self.shape}, "
                    "expected the same number of axes."
                )
        for volume in volumes:
            if tuple(volume.image.shape[1:]) != self.shape:
                raise ValueError(
                    f"volumes holds one of shape {tuple(volume.image.shape[1:])}, expected "
                    f"{self.shape}."
                )
        if field not in FIELDS:
            raise unknown("field", field, FIELDS)
        self.patients, self.volumes, self.noise = patients, volumes, noise
        self.motion = {"depth": depth, "other": other, "width": width}
        self._still: dict[int, tuple[Tensor, Tensor]] = {}  # chests before any breath, once drawn
        ranges = FIELDS[field] if len(self.shape) == 3 else (FIELDS[field][0], FIELDS[field][2])
        self.start = np.array([low for low, _ in ranges])
        self.spacing = tuple((b - a) / n for (a, b), n in zip(ranges, self.shape, strict=True))

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), voxel -> mm, RAS, of the images of synthetic chests."""
        axes = [0, 2] if len(self.shape) == 2 else [0, 1, 2]
        affine = np.zeros((4, 4))
        affine[axes, range(len(axes))] = self.spacing
        affine[axes, 3] = self.start + np.array(self.spacing) / 2
        affine[3, 3] = 1
        if len(axes) == 2:
            affine[1, 2] = 1  # across the slice
        return affine

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        index = place_of(index, self)
        random = np.random.default_rng([self.seed, index])
        real = bool(self.volumes) and (index % 2 == 0 or not self.patients)
        among = self.volumes if real else self.patients
        number = int(random.integers(len(among)))
        who = among[number]
        spacing = who.spacing if isinstance(who, Subject) else self.spacing
        disp = breath(random, self.shape, spacing, **self.motion)
        item: dict[str, Tensor | str] = {"disp": disp[0], "name": f"{who.name}, breath {index}"}
        for side, field in (("moving", torch.zeros_like(disp)), ("fixed", disp)):
            if isinstance(who, Subject):
                image = warp(who.image[None], field, padding="border")[0]
                labels = warp(who.labels[None], field, mode="nearest", padding="border")[0]
            elif side == "fixed":
                image, labels = self._drawn(who, field[0])
            else:
                if number not in self._still:
                    self._still[number] = self._drawn(who, field[0])
                image, labels = self._still[number]
            grain = self.noise / (BONE - AIR) * random.standard_normal(self.shape)
            item[side] = (image + torch.from_numpy(grain).float()).clamp(0, 1)
            item[f"{side}_labels"] = labels.clone()
        return item

    def _drawn(self, who: Chest, disp: Tensor) -> tuple[Tensor, Tensor]:
        """A chest drawn where disp (d, *S) leads: image without noise, and labels, both (1, *S)."""
        column = np.array(self.spacing).reshape(-1, *[1] * len(self.shape))
        voxels = (identity_grid(self.shape) + disp).numpy().astype(np.float64)
        places = (voxels + 0.5) * column + self.start.reshape(column.shape)
        image, labels = who.draw(places, float(np.mean(self.spacing)))
        return scaled(torch.from_numpy(image))[None], torch.from_numpy(labels)[None]

    def subjects(self, index: int) -> tuple[Subject, Subject]:
        """The pair of this index as `regkit.training.evaluation` takes it, (moving, fixed)."""
        item = self[index]
        moving, fixed = (
            Subject(
                name=f"{item['name']} ({side})",
                image=item[side],  # type: ignore[arg-type]
                labels=item[f"{side}_labels"],  # type: ignore[arg-type]
                affine=self.affine,
            )
            for side in ("moving", "fixed")
        )
        return moving, fixed
