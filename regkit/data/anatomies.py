"""Deformed brains to be painted: label maps, of voxels half as wide as those of the images.

Two families. "template" is the MNI152 template with the labels of the embedded population; "brains"
are the five label maps of the open sample `brain_labelmaps`, laid over the template by an affine
map. Each anatomy is one of these behind a random map of the embedded population. The voxels are
fine so that an image painted on them, `regkit.data.contrast`, has voxels that are half cortex and
half CSF once its own are made.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from tqdm.auto import tqdm

from regkit.data.cache import cache_folder, source_hash, written_once
from regkit.data.population import draw_velocity
from regkit.data.population import recipe_hash as population_hash
from regkit.data.samples import load_labelmaps
from regkit.data.template import (
    LABELS,
    SLICE_Z,
    affine_of,
    drawn_labels,
    resample_velocity,
    spacing_of,
    tissue_maps,
)
from regkit.spatial import identity_grid, integrate, resize, resize_disp, warp

CSF, CORTEX, WHITE, DEEP = range(4)  # the order of `CONTRASTS` of the population
# FreeSurfer's numbers in `brain_labelmaps`, left and right in one, and the CSF that we add
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
    24: ("CSF", CSF),
    26: ("accumbens", DEEP),
    28: ("ventral diencephalon", DEEP),
    31: ("choroid plexus", CSF),
}
OUTER_CSF = {"brains": 24, "template": 6}
# of each family: labels that share a brightness, and their tissue
MATERIALS: dict[str, list[tuple[tuple[int, ...], int]]] = {
    "template": [
        ((1, 2), WHITE),
        ((3, 4), DEEP),
        ((5,), CSF),
        ((6,), CSF),
        ((7, 8), CORTEX),
        ((9,), WHITE),
        (tuple(label for label in LABELS if label >= 10), CORTEX),
    ],
    "brains": [((label,), tissue) for label, (_, tissue) in FREESURFER.items()],
}
# what a network is taught: not the CSF around a brain, which an image may lack, nor thin sheets of
# about a cubic centimetre
LEARNED = {
    "template": tuple(label for label in LABELS if label != OUTER_CSF["template"]),
    "brains": tuple(label for label in FREESURFER if label not in (5, 24, 26, 31)),
}
ALIGNED = (176, 211, 176)  # voxels of the field of view at 1 mm


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A deformed brain to be painted.

    name: such as "brains-0-0007" (family, seed, index).
    family: "template" or "brains". Within a family the labels mean the same.
    labels: (1, *F) uint8, named by `LABELS` of the population or by `FREESURFER`; F is `fine` of
        the images' shape.
    """

    name: str
    family: str
    labels: Tensor


def fine(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of anatomies for images of `shape`: twice that, but no voxel below 1 mm."""
    factor = 2 if spacing_of(shape).min() >= 2 else 1
    return tuple(factor * n for n in shape)


# --- brains to deform ----------------------------------------------------------------------------


@functools.cache
def _aligned_brains() -> list[np.ndarray]:
    """The five label maps on one grid of 1 mm, `ALIGNED`, laid over each other and the template.

    Their mean is laid over the template by centre and size, and each brain over their mean by the
    affine map that fits best, in the least squares, the centre and the extent of every structure.
    Then the CSF is added that skull stripping leaves around a brain: sulci filled up, and 2 mm.
    """
    scans = [scan.labels[0].numpy() for scan in load_labelmaps()]
    template, affine = drawn_labels(), tissue_maps()[1]
    voxels = np.argwhere((template > 0) & (template != OUTER_CSF["template"]))
    centre = voxels.mean(0) * affine.diagonal()[:3] + affine[:3, 3]
    spread = voxels.std(0)

    own = [_points(labels) for labels in scans]
    placed = [(points - points[0]) / np.diag(points[1:4] - points[0]) for points in own]
    target = np.mean(placed, axis=0) * spread + centre  # mm
    grid = affine_of(ALIGNED)
    aligned = []
    for labels, points in zip(scans, own, strict=True):
        column = np.ones((len(target), 1))
        to_voxels = np.linalg.lstsq(np.hstack([target, column]), points, rcond=None)[0].T
        matrix = np.vstack([to_voxels, [0, 0, 0, 1]]) @ grid
        moved = ndimage.affine_transform(labels, matrix, output_shape=ALIGNED, order=0)
        moved[~np.isin(moved, [*FREESURFER])] = 0  # one map holds 4 voxels of another label
        brain = moved > 0
        near = ndimage.distance_transform_edt(~brain) <= 6
        filled = ndimage.distance_transform_edt(near) > 4
        rim = ndimage.binary_fill_holes(filled | brain) & ~brain
        aligned.append(np.where(rim, OUTER_CSF["brains"], moved).astype(np.uint8))
    return aligned


def _points(labels: np.ndarray) -> np.ndarray:
    """Centre, and centre plus standard deviation along each axis, of the brain and each structure.

    In voxels, (4 + 4 n, 3).
    """
    points = []
    for mask in [labels > 0, *(labels == label for label in LEARNED["brains"])]:
        voxels = np.argwhere(mask)
        points += [voxels.mean(0), *(voxels.mean(0) + np.diag(voxels.std(0)))]
    return np.array(points)


# --- anatomies -----------------------------------------------------------------------------------


def _make(family: str, number: int, shape: tuple[int, ...], seed: int, index: int) -> Anatomy:
    d = len(shape)
    random = np.random.default_rng([seed, index, d])
    # people differ by themselves: the brains need less of it than the one template
    low, high = (0.3, 1.0) if family == "template" else (0.0, 0.6)
    velocity = draw_velocity(random, d, random.uniform(low, high))
    # the map is smooth: its two grids, edge to edge, differ by less than a voxel at the border
    disp = resize_disp(integrate(resample_velocity(velocity, shape)), fine(shape))

    if family == "template":
        source, source_affine = drawn_labels(), tissue_maps()[1]
    else:
        source, source_affine = _aligned_brains()[number], affine_of(ALIGNED)
    if d == 2:
        k = round((SLICE_Z - source_affine[2, 3]) / source_affine[2, 2])
        source = source[..., k]

    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).float().reshape(1, d, *[1] * d)

    affine, grid = affine_of(fine(shape)), identity_grid(fine(shape))[None]
    own, old = affine.diagonal()[:d], source_affine.diagonal()[:d]
    start = (affine - source_affine)[:d, 3] / old
    where = (grid + disp) * column(own / old) + column(start) - grid
    labels = torch.from_numpy(source.astype(np.uint8))[None, None]
    return Anatomy(f"{family}-{seed}-{index:04d}", family, warp(labels, where, mode="nearest")[0])


def _recipe_hash() -> str:
    """Changes whenever the code that makes anatomies, or the population, does."""
    own = source_hash(__file__, resize_disp, resize)
    return hashlib.sha256((own + population_hash()).encode()).hexdigest()[:12]


def _anatomy(family: str, number: int, shape: tuple[int, ...], seed: int, index: int) -> Anatomy:
    """An anatomy from the cache, else made and kept there."""
    size = "x".join(map(str, shape))
    path = cache_folder() / "anatomies" / f"{_recipe_hash()}-{size}"
    path = path / f"{family}-{seed}-{index:04d}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as arrays:
            return Anatomy(path.stem, family, torch.from_numpy(arrays["labels"]))
    made = _make(family, number, shape, seed, index)
    with written_once(path) as partial:
        np.savez_compressed(partial, labels=made.labels.numpy())
    return made


def anatomies(
    n: int, shape: Sequence[int], seed: int = 0, brains: bool = True, progress: bool = False
) -> list[Anatomy]:
    """Deformed brains, made once and then read from the cache.

    Args:
        n: how many; an anatomy depends on (seed, index) and `brains` alone, not on n.
        shape: of the images, as in `population`, with the same field of view.
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
