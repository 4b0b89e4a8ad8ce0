"""The embedded population: synthetic brains whose true correspondence is known.

Every subject is the MNI152 template that nilearn ships, seen through a random smooth invertible
map, with its own tissue contrast, shading, blur and noise. No download, no real person, and for any
two subjects `true_displacement` gives the exact answer that registration looks for.

How a subject is made. A random stationary velocity field (smooth noise at three scales, in mm) is
integrated to a map from the subject's space to the template's. Tissue maps and labels of the
template are looked up through it: intensities linearly, labels by nearest neighbour. The same
(seed, index) is the same anatomy at every shape. What is drawn on the template once is in
`regkit.data.template`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from scipy import ndimage
from torch import Tensor
from tqdm.auto import tqdm

from regkit import spatial
from regkit.data import template
from regkit.data.cache import cache_folder, source_hash, written_once
from regkit.data.subject import Subject
from regkit.data.template import (
    FIELD_OF_VIEW,
    LATTICE,
    affine_of,
    on_grid,
    resample_velocity,
    sample_lattice,
    spacing_of,
)
from regkit.spatial import compose, identity_grid, integrate, warp

# mean intensity of CSF, cortex, white matter, deep grey matter; weight of the template's texture
CONTRASTS = {
    "t1": (0.25, 0.58, 0.85, 0.68, 1.0),
    "t2": (0.90, 0.55, 0.38, 0.50, -0.5),
    "pd": (0.70, 0.85, 0.60, 0.75, 0.4),
    "flair": (0.15, 0.75, 0.58, 0.65, 0.4),
}
# smooth noise of the velocity: (standard deviation of the smoothing, of the velocity), both mm
SCALES = ((9.0, 1.6), (18.0, 2.3), (36.0, 2.1))
# what subjects are made with, see `recipe_hash`
SPATIAL = (
    integrate,
    compose,
    warp,
    identity_grid,
    spatial._scaled_coordinates,
    spatial._start,
    spatial._Scaled,
    spatial._sample,
    spatial._as_float,
    spatial.full_precision,
)


def smooth_noise(random: np.random.Generator, shape: Sequence[int], sigma: float) -> np.ndarray:
    """Gaussian noise smoothed to `sigma` lattice points, with standard deviation 1."""
    margin = int(np.ceil(2 * sigma))  # so that the border is as random as the inside
    noise = random.standard_normal([n + 2 * margin for n in shape])
    smooth = ndimage.gaussian_filter(noise, sigma, mode="wrap")
    # the sum of squared Gaussian weights is 1/(2 sqrt(pi) sigma) along each axis
    smooth *= (2 * np.sqrt(np.pi) * sigma) ** (len(shape) / 2)
    inner: np.ndarray = smooth[tuple(slice(margin, margin + n) for n in shape)]
    return inner


def draw_velocity(random: np.random.Generator, d: int, amplitude: float) -> Tensor:
    """A random velocity (d, *L) in mm; the lattice covers the field of view, edge to edge."""
    lattice = [round(f / LATTICE) + 1 for f in FIELD_OF_VIEW[:d]]
    velocity = [
        sum(size * smooth_noise(random, lattice, sigma / LATTICE) for sigma, size in SCALES)
        for _ in range(d)
    ]
    return torch.from_numpy(amplitude * np.stack(velocity)).float()


def _make(
    shape: tuple[int, ...], seed: int, index: int, amplitude: float, contrast: str
) -> Subject:
    d = len(shape)
    random = np.random.default_rng([seed, index, d])
    maps, template_labels, template_affine = on_grid(shape)
    affine = affine_of(shape)
    velocity = draw_velocity(random, d, amplitude)
    disp = integrate(resample_velocity(velocity, shape))

    # voxel x of the subject looks at the template in voxel B (x + disp) + b; for `warp` minus x
    spacing = spacing_of(shape)
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
    shading = smooth_noise(random, velocity.shape[1:], 40.0 / LATTICE)
    image = image * np.exp(random.uniform(0, 0.12) * sample_lattice(shading, shape))
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


def recipe_hash() -> str:
    """Changes whenever the code that makes subjects does, so that the cache serves no others.

    That is this file, the template's, and from `regkit.spatial` what it calls and what these call
    in turn.
    """
    return source_hash(__file__, template, *SPATIAL)


def _subject(
    shape: tuple[int, ...], seed: int, index: int, amplitude: float, contrast: str
) -> Subject:
    """A subject from the cache, else made and kept there."""
    size = "x".join(map(str, shape))
    folder = cache_folder() / "population" / f"{recipe_hash()}-{size}-{contrast}-{amplitude:g}"
    path = folder / f"{seed}-{index:04d}.safetensors"
    if path.is_file():
        tensors = load_file(path)
        return Subject(
            name=f"population-{seed}-{index:04d}",
            image=tensors["image"],
            labels=tensors["labels"].to(torch.int16),
            affine=affine_of(shape),
            velocity=tensors["velocity"],
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
