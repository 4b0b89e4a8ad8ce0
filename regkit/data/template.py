"""What the synthetic brains are made of: tissue maps and labels, drawn once on the MNI152 template.

The template is the one that nilearn ships. This module also says where grids lie in its space: all
of them cover one field of view, so that the voxel size follows from the shape, and a lattice over
the same field of view carries the random fields of `regkit.data.population`.

The labels (`LABELS` names them) are drawn once on the template at 1 mm from its tissue probability
maps and from plain geometry in MNI millimetres; they are *not* an anatomical atlas. CSF, cortex and
white matter are the most probable tissue after a little smoothing; an outer rim of CSF, which the
skull-stripped template lacks, is added around the brain. Deep grey matter is the grey matter inside
an ellipsoid per hemisphere, ventricles are the CSF deep inside the brain, cerebellum and brain stem
are cut off by planes, left is x < 0. The cortex is divided among named points, each voxel going to
the nearest one. Last, every label is reduced to the part that a ball three voxels wide (of the size
asked for) can reach, and what falls off goes to the nearest label: thin slivers would measure the
grid, not the registration.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from regkit.transform import VOXEL

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
LATTICE = 4.4  # mm between the points at which the velocity is drawn


def spacing_of(shape: Sequence[int]) -> np.ndarray:
    """Voxel size, mm, of a grid over the field of view: (d,)."""
    spacing: np.ndarray = FIELD_OF_VIEW[: len(shape)] / np.asarray(shape)
    return spacing


def affine_of(shape: Sequence[int]) -> np.ndarray:
    """Voxel -> MNI mm of a grid over the field of view; a 2D slice lies at z = SLICE_Z."""
    d = len(shape)
    spacing = spacing_of(shape)
    affine = np.eye(4)
    affine[range(d), range(d)] = spacing
    affine[:d, 3] = CENTRE[:d] - FIELD_OF_VIEW[:d] / 2 + spacing / 2
    if d == 2:
        affine[2, 3] = SLICE_Z
    return affine


@functools.cache
def tissue_maps() -> tuple[np.ndarray, np.ndarray]:
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
def drawn_labels() -> np.ndarray:
    """The label map on the template's grid, before thin parts are removed."""
    maps, affine = tissue_maps()
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
def on_grid(shape: Sequence[int]) -> tuple[Tensor, Tensor, np.ndarray]:
    """Template maps (1, 5, *M) and labels (1, 1, *M) for subjects of `shape`, and their affine."""
    maps, affine = tissue_maps()
    labels = drawn_labels()
    spacing = float(spacing_of(shape).max())
    if len(shape) == 2:
        k = round((SLICE_Z - affine[2, 3]) / affine[2, 2])
        maps, labels = maps[..., k], labels[..., k]
    if spacing > 1:  # a coarse voxel averages what it covers
        sigma = VOXEL * np.sqrt(spacing**2 - 1)
        maps = np.stack([ndimage.gaussian_filter(m, sigma) for m in maps])
    labels = _thicken(labels, [1.0] * len(shape), 3 * spacing)
    return torch.from_numpy(maps)[None], torch.from_numpy(labels)[None, None], affine


def sample_lattice(field: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Values of a field on the lattice at the voxel centres of a grid over the field of view."""
    axes = [
        (np.arange(n) + 0.5) * h / LATTICE for n, h in zip(shape, spacing_of(shape), strict=True)
    ]
    where = np.meshgrid(*axes, indexing="ij")
    values: np.ndarray = ndimage.map_coordinates(field, where, order=3, mode="nearest")
    return values


def resample_velocity(velocity: Tensor, shape: Sequence[int]) -> Tensor:
    """Velocity in mm on the lattice -> (1, d, *S) in voxels of a grid over the field of view."""
    fields = [
        sample_lattice(v, shape) / h
        for v, h in zip(velocity.numpy(), spacing_of(shape), strict=True)
    ]
    return torch.from_numpy(np.stack(fields)).float()[None]
