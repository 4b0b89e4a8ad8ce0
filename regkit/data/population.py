"""The embedded population: synthetic brains whose true correspondence is known.

Every subject is the MNI152 template that nilearn ships, seen through a random smooth invertible
map, with its own tissue contrast, shading, blur and noise. No download, no real person, and for any
two subjects `true_displacement` gives the exact answer that registration looks for.

How a subject is made. A random stationary velocity field (smooth noise at three scales, in mm) is
integrated to a map from the subject's space to the template's. Tissue maps and labels of the
template are looked up through it: intensities linearly, labels by nearest neighbour. The same
(seed, index) is the same anatomy at every shape.

How the labels are made (`LABELS` names them). They are drawn once on the template at 1 mm from its
tissue probability maps and from plain geometry in MNI millimetres; they are *not* an anatomical
atlas. CSF, cortex and white matter are the most probable tissue after a little smoothing; an outer
rim of CSF, which the skull-stripped template lacks, is added around the brain. Deep grey matter is
the grey matter inside an ellipsoid per hemisphere, ventricles are the CSF deep inside the brain,
cerebellum and brain stem are cut off by planes, left is x < 0. The cortex is divided among named
points, each voxel going to the nearest one. Last, every label is reduced to the part that a ball
three voxels wide (of the size asked for) can reach, and what falls off goes to the nearest label:
thin slivers would measure the grid, not the registration.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from scipy import ndimage
from torch import Tensor
from tqdm.auto import tqdm

from regkit import spatial
from regkit.data.cache import cache_folder, source_hash, written_once
from regkit.spatial import compose, identity_grid, integrate, warp
from regkit.transform import VOXEL, Grid

FIELD_OF_VIEW = np.array([176.0, 211.2, 176.0])  # mm: the whole brain, its CSF, and room to move
CENTRE = np.array([0.0, -17.0, 5.0])  # MNI mm
SLICE_Z = 12.0  # MNI mm: the axial slice of the 2D population

CORTEX = {  # named points in MNI mm, right hemisphere; the left one mirrors them
    "frontal pole": (22, 60, 5),
    "orbitofrontal": (22, 34, -18),
    "superior frontal": (16, 25, 55),
    "inferior frontal": (48, 25, 12),
    "medial frontal": (6, 45, 15),
    "central": (42, -15, 52),
    "superior parietal": (25, -60, 60),
    "inferior parietal": (52, -45, 30),
    "precuneus": (7, -60, 32),
    "superior temporal": (58, -15, 2),
    "inferior temporal": (52, -30, -24),
    "temporal pole": (38, 12, -32),
    "lateral occipital": (38, -82, 8),
    "medial occipital": (9, -85, 5),
}
SIDES = ("left", "right")
#: Names of the structures in a label map of the population, by label; 0 is the background.
LABELS: dict[int, str] = {
    1: "left white matter",
    2: "right white matter",
    3: "left deep grey matter",
    4: "right deep grey matter",
    5: "ventricles",
    6: "outer CSF",
    7: "left cerebellum",
    8: "right cerebellum",
    9: "brain stem",
} | {10 + 2 * i + side: f"{SIDES[side]} {name}" for i, name in enumerate(CORTEX) for side in (0, 1)}

# mean intensity of CSF, cortex, white matter, deep grey matter; weight of the template's texture
CONTRASTS = {
    "t1": (0.25, 0.58, 0.85, 0.68, 1.0),
    "t2": (0.90, 0.55, 0.38, 0.50, -0.5),
    "pd": (0.70, 0.85, 0.60, 0.75, 0.4),
    "flair": (0.15, 0.75, 0.58, 0.65, 0.4),
}
# smooth noise of the velocity: (standard deviation of the smoothing, of the velocity), both mm
SCALES = ((9.0, 1.6), (18.0, 2.3), (36.0, 2.1))
LATTICE = 4.4  # mm between the points at which the velocity is drawn
# what subjects are made with, see `_recipe_hash`
SPATIAL = (
    integrate,
    compose,
    warp,
    identity_grid,
    spatial._Scaled,
    spatial._sample,
    spatial._as_float,
    spatial.full_precision,
)


@dataclass(frozen=True, eq=False)
class Subject:
    """One synthetic brain.

    name: such as "population-0-0007" (seed, index).
    image: (1, *S) float32 in [0, 1]. labels: (1, *S) int16, named by `LABELS`.
    affine: 4x4 float64, voxel -> RAS mm (2D: the third axis is the slice).
    velocity: (d, *L) float32, mm per unit time, on a coarse lattice; `svf` resamples it.
    """

    name: str
    image: Tensor
    labels: Tensor
    affine: np.ndarray
    velocity: Tensor

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size along each array axis, mm."""
        return tuple(float(self.affine[i, i]) for i in range(self.image.ndim - 1))

    @property
    def grid(self) -> Grid:
        """Its voxels, and where they lie."""
        return Grid(tuple(self.image.shape[1:]), self.affine)

    @property
    def svf(self) -> Tensor:
        """(1, d, *S), voxels per unit time: subject(x) = template(x + integrate(svf)(x))."""
        return _resample_velocity(self.velocity, self.image.shape[1:])


def _spacing(shape: Sequence[int]) -> np.ndarray:
    return FIELD_OF_VIEW[: len(shape)] / np.asarray(shape)


def _affine(shape: Sequence[int]) -> np.ndarray:
    """Voxel -> MNI mm of a grid over the field of view; a 2D slice lies at z = SLICE_Z."""
    d = len(shape)
    spacing = _spacing(shape)
    affine = np.eye(4)
    affine[range(d), range(d)] = spacing
    affine[:d, 3] = CENTRE[:d] - FIELD_OF_VIEW[:d] / 2 + spacing / 2
    if d == 2:
        affine[2, 3] = SLICE_Z
    return affine


@functools.cache
def _template() -> tuple[np.ndarray, np.ndarray]:
    """The template at 1 mm: maps (5, *M) of CSF, cortex, white and deep grey matter, and texture;
    and the affine voxel -> MNI mm. The first four add up to at most 1; outside the head all are 0.
    """
    from nilearn import datasets  # takes seconds to import

    loaders = (
        datasets.load_mni152_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
    )
    images = [load(resolution=1) for load in loaders]
    affine = np.asarray(images[0].affine)
    # room for the rim of CSF and for maps that look beyond the template
    t1, grey, white = (np.pad(np.asarray(i.dataobj, np.float32), 12) for i in images)
    affine = affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, 12.0)
    brain = ndimage.binary_fill_holes(t1 > 0)
    grey, white = grey * brain, white * brain
    rim = ndimage.distance_transform_edt(~brain) <= 6
    csf = np.clip(1 - grey - white, 0, 1) * (brain | rim)
    deep = grey * _deep_ellipsoids(affine, t1.shape)
    texture = (t1 - 0.25 * csf - 0.58 * grey - 0.85 * white) * brain
    maps = np.stack([csf, grey - deep, white, deep, np.clip(texture, -0.15, 0.15)])
    return maps.astype(np.float32), affine


def _coordinates(affine: np.ndarray, shape: Sequence[int]) -> list[np.ndarray]:
    """MNI mm of each voxel, one broadcastable array per axis (the affine is axis-aligned)."""
    return [
        (affine[i, 3] + affine[i, i] * np.arange(n)).reshape(
            [-1 if k == i else 1 for k in range(3)]
        )
        for i, n in enumerate(shape)
    ]


def _deep_ellipsoids(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    x, y, z = _coordinates(affine, shape)
    return ((abs(x) - 17) / 17) ** 2 + ((y + 4) / 30) ** 2 + ((z - 5) / 17) ** 2 <= 1


@functools.cache
def _drawn_labels() -> np.ndarray:
    """The label map on the template's grid, before thin parts are removed."""
    maps, affine = _template()
    csf, cortex, white, deep, _ = (ndimage.gaussian_filter(m, 1.0) for m in maps)
    head = maps[:4].sum(0) > 0.5
    tissue = np.argmax([csf, cortex, white, deep], axis=0)
    x, y, z = _coordinates(affine, head.shape)
    side = np.broadcast_to(x > 0, head.shape).astype(np.int16)

    box = (abs(x) < 32) & (y > -52) & (y < 38) & (z > -12) & (z < 34)
    ventricles = (tissue == 0) & box & (ndimage.distance_transform_edt(head) > 24)
    below = z < -5 - 0.38 * abs(x) - 0.3 * np.maximum(0, -70 - y)  # under the tentorium
    stem = head & (abs(x) < 17) & (y > -46) & (y < -10) & (z < -10) & (tissue != 0)
    cerebellum = head & below & (y < -38) & (tissue != 0) & ~stem

    points = np.array(list(CORTEX.values()), dtype=float)
    distance = np.full(head.shape, np.inf, dtype=np.float32)
    parcel = np.zeros(head.shape, dtype=np.int16)
    for i, (px, py, pz) in enumerate(points):
        to_point = ((abs(x) - px) ** 2 + (y - py) ** 2 + (z - pz) ** 2).astype(np.float32)
        parcel = np.where(to_point < distance, np.int16(i), parcel)
        distance = np.minimum(to_point, distance)

    labels = np.select(
        [ventricles, stem, cerebellum, tissue == 0, tissue == 1, tissue == 2],
        [5, 9, 7 + side, 6, 10 + 2 * parcel + side, 1 + side],
        default=3 + side,
    )
    return np.where(head, labels, 0).astype(np.int16)


def _thicken(labels: np.ndarray, spacing: Sequence[float], width: float) -> np.ndarray:
    """Keep of each label what a ball of diameter `width` mm reaches; the rest goes to the nearest.

    labels: integer map on a grid of `spacing` mm. A label that no ball fits into disappears.
    """
    kept = np.zeros_like(labels)
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        mask = np.pad(labels[box] == label, 1)
        core = ndimage.distance_transform_edt(mask, sampling=spacing) >= width / 2
        if core.any():
            reached = ndimage.distance_transform_edt(~core, sampling=spacing) < width / 2
            inner = (slice(1, -1),) * labels.ndim
            kept[box][(reached & mask)[inner]] = label
    lost = (labels > 0) & (kept == 0)
    nearest = ndimage.distance_transform_edt(
        kept == 0, sampling=spacing, return_distances=False, return_indices=True
    )
    return np.where(lost, kept[tuple(nearest)], kept)


@functools.lru_cache(maxsize=2)
def _on_grid(shape: Sequence[int]) -> tuple[Tensor, Tensor, np.ndarray]:
    """Template maps (1, 5, *M) and labels (1, 1, *M) for subjects of `shape`, and their affine."""
    maps, affine = _template()
    labels = _drawn_labels()
    spacing = float(_spacing(shape).max())
    if len(shape) == 2:
        k = round((SLICE_Z - affine[2, 3]) / affine[2, 2])
        maps, labels = maps[..., k], labels[..., k]
    if spacing > 1:  # a coarse voxel averages what it covers
        sigma = VOXEL * np.sqrt(spacing**2 - 1)
        maps = np.stack([ndimage.gaussian_filter(m, sigma) for m in maps])
    labels = _thicken(labels, [1.0] * len(shape), 3 * spacing)
    return torch.from_numpy(maps)[None], torch.from_numpy(labels)[None, None], affine


def _smooth_noise(random: np.random.Generator, shape: Sequence[int], sigma: float) -> np.ndarray:
    """Gaussian noise smoothed to `sigma` lattice points, with standard deviation 1."""
    margin = int(np.ceil(2 * sigma))  # so that the border is as random as the inside
    noise = random.standard_normal([n + 2 * margin for n in shape])
    smooth = ndimage.gaussian_filter(noise, sigma, mode="wrap")
    # the sum of squared Gaussian weights is 1/(2 sqrt(pi) sigma) along each axis
    smooth *= (2 * np.sqrt(np.pi) * sigma) ** (len(shape) / 2)
    return smooth[tuple(slice(margin, margin + n) for n in shape)]


def _draw_velocity(random: np.random.Generator, d: int, amplitude: float) -> Tensor:
    """A random velocity (d, *L) in mm; the lattice covers the field of view, edge to edge."""
    lattice = [round(f / LATTICE) + 1 for f in FIELD_OF_VIEW[:d]]
    velocity = [
        sum(size * _smooth_noise(random, lattice, sigma / LATTICE) for sigma, size in SCALES)
        for _ in range(d)
    ]
    return torch.from_numpy(amplitude * np.stack(velocity)).float()


def _sample_lattice(field: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Values of a field on the lattice at the voxel centres of a grid over the field of view."""
    axes = [(np.arange(n) + 0.5) * h / LATTICE for n, h in zip(shape, _spacing(shape), strict=True)]
    where = np.meshgrid(*axes, indexing="ij")
    return ndimage.map_coordinates(field, where, order=3, mode="nearest")


def _resample_velocity(velocity: Tensor, shape: Sequence[int]) -> Tensor:
    """Velocity in mm on the lattice -> (1, d, *S) in voxels of a grid over the field of view."""
    fields = [
        _sample_lattice(v, shape) / h
        for v, h in zip(velocity.numpy(), _spacing(shape), strict=True)
    ]
    return torch.from_numpy(np.stack(fields)).float()[None]


def _make(
    shape: tuple[int, ...], seed: int, index: int, amplitude: float, contrast: str
) -> Subject:
    d = len(shape)
    random = np.random.default_rng([seed, index, d])
    maps, template_labels, template_affine = _on_grid(shape)
    affine = _affine(shape)
    velocity = _draw_velocity(random, d, amplitude)
    disp = integrate(_resample_velocity(velocity, shape))

    # voxel x of the subject looks at the template in voxel B (x + disp) + b; for `warp` minus x
    spacing = _spacing(shape)
    scale = torch.from_numpy(spacing).float().reshape(1, d, *[1] * d)
    start = torch.from_numpy((affine - template_affine)[:d, 3]).float().reshape(scale.shape)
    grid = identity_grid(shape)[None]
    to_template = (grid + disp) * scale + start - grid
    tissue = warp(maps, to_template)[0].numpy()
    labels = warp(template_labels, to_template, mode="nearest")[0]

    if contrast == "random":
        means = random.permutation(np.linspace(0.15, 0.95, 4)) * random.uniform(0.9, 1.05, 4)
        means = np.append(means, random.choice([-0.5, 0.5]))
    else:
        means = np.array(CONTRASTS[contrast])
        means[:4] *= random.uniform(0.95, 1.05, 4)
    image = np.tensordot(means, tissue, axes=1)
    shading = _smooth_noise(random, velocity.shape[1:], 40.0 / LATTICE)
    image = image * np.exp(random.uniform(0, 0.12) * _sample_lattice(shading, shape))
    image = ndimage.gaussian_filter(image, random.uniform(0, 0.5))
    head = tissue[:4].sum(0) > 0.5
    noise = random.normal(0, random.uniform(0.005, 0.025), shape)
    image = np.clip(image + noise * head, 0, 1)
    return Subject(
        name=f"population-{seed}-{index:04d}",
        image=torch.from_numpy(image).float()[None],
        labels=labels,
        affine=affine,
        velocity=velocity,
    )


def _recipe_hash() -> str:
    """Changes whenever the code that makes subjects does, so that the cache serves no others.

    That is this file, and from `regkit.spatial` what it calls and what these call in turn.
    """
    return source_hash(__file__, *SPATIAL)


def _subject(
    shape: tuple[int, ...], seed: int, index: int, amplitude: float, contrast: str
) -> Subject:
    """A subject from the cache, else made and kept there."""
    size = "x".join(map(str, shape))
    folder = cache_folder() / "population" / f"{_recipe_hash()}-{size}-{contrast}-{amplitude:g}"
    path = folder / f"{seed}-{index:04d}.safetensors"
    if path.is_file():
        held = load_file(path)
        return Subject(
            name=f"population-{seed}-{index:04d}",
            image=held["image"],
            labels=held["labels"].to(torch.int16),
            affine=_affine(shape),
            velocity=held["velocity"],
        )
    subject = _make(shape, seed, index, amplitude, contrast)
    tensors = {"image": subject.image, "labels": subject.labels.to(torch.uint8)}
    with written_once(path) as partial:
        partial.write_bytes(to_bytes({**tensors, "velocity": subject.velocity}))
    return subject


def population(
    n: int | Sequence[int],
    shape: Sequence[int],
    seed: int = 0,
    amplitude: float = 1.0,
    contrast: str = "t1",
    progress: bool = False,
) -> list[Subject]:
    """Synthetic subjects, made once and then read from the cache.

    Args:
        n: how many (indices 0 to n - 1), or the indices themselves. A subject depends on
            (seed, index) alone, not on n.
        shape: (H, W) for axial slices or (D, H, W); the whole head fits in at every shape, so the
            voxel size follows: (160, 192, 160) is 1.1 mm, (80, 96, 80) is 2.2 mm.
        seed: of the population.
        amplitude: of the random maps; 1 gives unregistered Dice as between real subjects.
        contrast: "t1", "t2", "pd", "flair" (one order of the tissues, each varied by at most 5 %),
            or "random".
        progress: show a progress bar.

    Raises:
        ValueError: an impossible shape or contrast.
    """
    shape = tuple(int(size) for size in shape)
    if len(shape) not in (2, 3) or min(shape) < 16:
        raise ValueError(f"shape is {shape}, expected two or three sizes of at least 16 voxels.")
    if contrast not in (*CONTRASTS, "random"):
        raise ValueError(
            f"contrast is {contrast!r}, expected one of {', '.join(CONTRASTS)}, random."
        )
    if amplitude < 0:
        raise ValueError(f"amplitude is {amplitude}, expected 0 or more.")
    if isinstance(n, int) and n < 0:
        raise ValueError(f"n is {n}, expected 0 or more.")
    indices = range(n) if isinstance(n, int) else n
    return [
        _subject(shape, seed, int(index), float(amplitude), contrast)
        for index in tqdm(indices, desc="subjects", disable=not progress)
    ]


def true_displacement(moving_subject: Subject, fixed_subject: Subject) -> Tensor:
    """The displacement that registration should find: (1, d, *S), voxels, fixed -> moving.

    From a voxel of the fixed subject to the template, and from there back into the moving subject:
    disp = compose(first=integrate(-svf of moving), then=integrate(svf of fixed)).
    """
    if moving_subject.image.shape != fixed_subject.image.shape:
        raise ValueError(
            f"moving_subject has shape {tuple(moving_subject.image.shape)} and fixed_subject "
            f"{tuple(fixed_subject.image.shape)}, expected the same."
        )
    return compose(first=integrate(-moving_subject.svf), then=integrate(fixed_subject.svf))
