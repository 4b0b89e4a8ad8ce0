"""Deformed brains to be painted: the shares of their materials, and their labels.

Two families. "template" is the MNI152 template with the labels of the embedded population; "brains"
are the five label maps of the open sample `brain_labelmaps`, laid over the template by an affine
map. Each anatomy is one of these behind a random map of the embedded population, kept as the
share that every *material* has in every voxel: a voxel of 2.2 mm that is half cortex and half CSF
is to be painted so. `regkit.data.contrast` gives each material a brightness.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from tqdm.auto import tqdm

from regkit.data.cache import cache_folder
from regkit.data.population import (
    LABELS,
    SLICE_Z,
    _affine,
    _draw_velocity,
    _drawn_labels,
    _on_grid,
    _resample_velocity,
    _spacing,
    _template,
)
from regkit.data.population import _recipe_hash as _population_hash
from regkit.data.samples import load_labelmaps
from regkit.spatial import identity_grid, integrate, warp

CSF, CORTEX, WHITE, DEEP = range(4)  # the order of `CONTRASTS`
# FreeSurfer's numbers in `brain_labelmaps`, left and right in one: the name, and the tissue
FREESURFER = {
    2: ("cerebral white matter", WHITE),
    3: ("cerebral cortex", CORTEX),
    4: ("lateral ventricle", CSF),
    5: ("inferior lateral ventricle", CSF),
    7: ("cerebellum white matter", WHITE),
    8: ("cerebellum cortex", CORTEX),
    10: ("thalamus", DEEP),
    11: ("caudate", DEEP),
    12: ("putamen", DEEP),
    13: ("pallidum", DEEP),
    14: ("third ventricle", CSF),
    15: ("fourth ventricle", CSF),
    16: ("brain stem", WHITE),
    17: ("hippocampus", CORTEX),
    18: ("amygdala", CORTEX),
    26: ("accumbens", DEEP),
    28: ("ventral diencephalon", DEEP),
    31: ("choroid plexus", CSF),
}
TOO_SMALL = (5, 26, 31)  # to learn from: about a cubic centimetre in thin sheets
TISSUES = {  # of each material of a family, in the order of `Anatomy.maps`
    "template": (CSF, CORTEX, WHITE, DEEP),
    "brains": (*(tissue for _, tissue in FREESURFER.values()), CSF),
}
ALIGNED = (176, 211, 176)  # voxels of the field of view at 1 mm
WHOLE = 127  # the share of a voxel that is all of one material


@dataclass(frozen=True)
class Anatomy:
    """A deformed brain to be painted.

    name: such as "brains-0-0007" (family, seed, index).
    family: "template" or "brains". Within a family the labels mean the same.
    maps: (M, *S) int8, the share of each material in each voxel, in 127ths, see `TISSUES`; of the
        template also the texture, last. labels: (1, *S) int16, named by `LABELS` of the population
        or by `FREESURFER`.
    affine: 4x4 float64, voxel -> RAS mm.
    """

    name: str
    family: str
    maps: Tensor
    labels: Tensor
    affine: np.ndarray


# --- brains to deform ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Atlas:
    """What is deformed: maps (1, M, *N) float32, labels (1, 1, *N), and where both lie, mm."""

    maps: Tensor
    maps_affine: np.ndarray
    labels: Tensor
    labels_affine: np.ndarray


@functools.lru_cache(maxsize=2)
def _template_atlas(shape: tuple[int, ...]) -> _Atlas:
    maps, labels, affine = _on_grid(shape)
    return _Atlas(maps, affine, labels, affine)


@functools.lru_cache(maxsize=10)
def _brain_atlas(number: int, shape: tuple[int, ...]) -> _Atlas:
    """One of the five brains, laid over the template."""
    labels, affine = _aligned_brains()[number], _affine(ALIGNED)
    brain = labels > 0

    # what skull stripping leaves around a brain: the sulci filled up, and 2 mm
    near = ndimage.distance_transform_edt(~brain) <= 6
    filled = ndimage.distance_transform_edt(near) > 4
    rim = ndimage.binary_fill_holes(filled | brain) & ~brain
    materials = [labels == label for label in FREESURFER] + [rim]
    spacing = float(_spacing(shape).max())
    if len(shape) == 2:
        k = round((SLICE_Z - affine[2, 3]) / affine[2, 2])
        labels = labels[..., k]
        materials = [m[..., k] for m in materials]
    step = max(1, int(spacing))  # mm; a coarse voxel averages what it covers
    sigma = 0.4 * np.sqrt(max(spacing**2 - 1, 0))
    every = (slice(None, None, step),) * len(shape)
    maps = np.stack([_blurred(m, sigma)[every] for m in materials])
    coarse = affine @ np.diag([step, step, step, 1.0])
    learned = np.where(np.isin(labels, [*set(FREESURFER) - set(TOO_SMALL)]), labels, 0)
    return _Atlas(torch.from_numpy(maps)[None], coarse, torch.from_numpy(learned)[None, None],
                  affine)  # fmt: skip


def _blurred(mask: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of a mask, where there is anything to blur: float32."""
    blurred = mask.astype(np.float32)
    reach = int(4 * sigma) + 1
    for box in ndimage.find_objects(mask.astype(np.int8)):
        near = tuple(slice(max(0, s.start - reach), s.stop + reach) for s in box)
        blurred[near] = ndimage.gaussian_filter(blurred[near], sigma)
    return blurred


@functools.cache
def _aligned_brains() -> list[np.ndarray]:
    """The five label maps on one grid of 1 mm, `ALIGNED`, laid over each other and the template.

    Their mean is laid over the template by centre and size, and each brain over their mean by the
    affine map that fits best, in the least squares, the centre and the extent of every structure.
    """
    scans = [scan.labels[0].numpy() for scan in load_labelmaps() if scan.labels is not None]
    template, affine = _drawn_labels(), _template()[1]
    outer_csf = next(label for label, name in LABELS.items() if name == "outer CSF")
    voxels = np.argwhere((template > 0) & (template != outer_csf))
    centre = voxels.mean(0) * affine.diagonal()[:3] + affine[:3, 3]
    spread = voxels.std(0)

    own = [_points(labels) for labels in scans]
    placed = [(points - points[0]) / np.diag(points[1:4] - points[0]) for points in own]
    target = np.mean(placed, axis=0) * spread + centre  # mm
    grid = _affine(ALIGNED)
    aligned = []
    for labels, points in zip(scans, own, strict=True):
        column = np.ones((len(target), 1))
        to_voxels = np.linalg.lstsq(np.hstack([target, column]), points, rcond=None)[0].T
        matrix = np.vstack([to_voxels, [0, 0, 0, 1]]) @ grid
        moved = ndimage.affine_transform(labels, matrix, output_shape=ALIGNED, order=0)
        aligned.append(moved)
    return aligned


def _points(labels: np.ndarray) -> np.ndarray:
    """Centre, and centre plus standard deviation along each axis, of the brain and each structure.

    In voxels, (4 + 4 n, 3).
    """
    found = []
    for mask in [labels > 0, *(labels == label for label in FREESURFER if label not in TOO_SMALL)]:
        voxels = np.argwhere(mask)
        found += [voxels.mean(0), *(voxels.mean(0) + np.diag(voxels.std(0)))]
    return np.array(found)


# --- anatomies -----------------------------------------------------------------------------------


def _make(family: str, number: int, shape: tuple[int, ...], seed: int, index: int) -> Anatomy:
    d = len(shape)
    random = np.random.default_rng([seed, index, d])
    # people differ by themselves: the brains need less of it than the one template
    low, high = (0.3, 1.0) if family == "template" else (0.0, 0.6)
    amplitude = random.uniform(low, high)
    velocity = _draw_velocity(random, d, amplitude)
    disp = integrate(_resample_velocity(velocity, shape))
    affine = _affine(shape)
    grid = identity_grid(shape)[None]

    def looked_up(source: Tensor, source_affine: np.ndarray, mode: str) -> Tensor:
        def column(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).float().reshape(1, d, *[1] * d)

        own, old = affine.diagonal()[:d], source_affine.diagonal()[:d]
        start = (affine - source_affine)[:d, 3] / old
        return warp(source, (grid + disp) * column(own / old) + column(start) - grid, mode=mode)[0]

    atlas = _template_atlas(shape) if family == "template" else _brain_atlas(number, shape)
    maps = looked_up(atlas.maps, atlas.maps_affine, "linear")
    return Anatomy(
        name=f"{family}-{seed}-{index:04d}",
        family=family,
        maps=(WHOLE * maps).round().to(torch.int8),
        labels=looked_up(atlas.labels, atlas.labels_affine, "nearest").to(torch.int16),
        affine=affine,
    )


def _recipe_hash() -> str:
    """Changes whenever this file or that of the population does."""
    return hashlib.sha256(
        Path(__file__).read_bytes() + _population_hash().encode()
    ).hexdigest()[:12]  # fmt: skip


def _anatomy(family: str, number: int, shape: tuple[int, ...], seed: int, index: int) -> Anatomy:
    """An anatomy from the cache, else made and kept there."""
    size = "x".join(map(str, shape))
    path = cache_folder() / "anatomies" / f"{_recipe_hash()}-{size}"
    path = path / f"{family}-{seed}-{index:04d}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as held:
            maps, labels = (torch.from_numpy(held[key]) for key in ("maps", "labels"))
        return Anatomy(path.stem, family, maps, labels.to(torch.int16), _affine(shape))
    made = _make(family, number, shape, seed, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.npz")
    np.savez_compressed(partial, maps=made.maps.numpy(), labels=made.labels.numpy().astype("u1"))
    partial.replace(path)
    return made


def anatomies(
    n: int, shape: Sequence[int], seed: int = 0, brains: bool = True, progress: bool = False
) -> list[Anatomy]:
    """Deformed brains, made once and then read from the cache.

    Args:
        n: how many; an anatomy depends on (seed, index) and `brains` alone, not on n.
        shape: as in `population`, with the same field of view.
        seed: of the deformations.
        brains: every third is the template and the others are the five brains in turn, for which
            the open sample `brain_labelmaps` is fetched; else all are the template.
        progress: show a progress bar.

    Raises:
        ValueError: an impossible shape.
        FileNotFoundError: the sample is not in the cache and cannot be downloaded.
    """
    shape = tuple(int(size) for size in shape)
    if len(shape) not in (2, 3) or min(shape) < 16:
        raise ValueError(f"shape is {shape}, expected two or three sizes of at least 16 voxels.")
    made = []
    for i in tqdm(range(n), desc="anatomies", disable=not progress):
        template = not brains or i % 3 == 0
        number = (i // 3 * 2 + i % 3 - 1) % 5
        made.append(_anatomy("template" if template else "brains", number, shape, seed, i))
    return made
