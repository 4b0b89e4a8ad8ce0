"""Checks of a pair of images and of the answer: what is refused, and what is warned of.

`regkit.register` checks in this order: do the images make a pair, is anything about them suspect,
is the working grid too large, are they of the kind that the network was trained on, and is anything
about the answer suspect. The first and the third check refuse, by a ValueError; the others give the
`warnings` of a result, one sentence each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regkit import metrics
from regkit.blocks import AVERAGE_POOL
from regkit.io import Image
from regkit.models import RegistrationModel
from regkit.transform import Grid, Transform, check_one_plane

# The least `correlation` of two images of one contrast. Seen with T1 against T1, aligned: 0.31 or
# more on the population, 0.17 at twice its amplitude, 0.36 on real pairs; against T2, PD or FLAIR,
# on both: 0.09 or less. T1 against fractional anisotropy, both bright in white matter: 0.56.
ALIKE = 0.15
# Voxels of a working grid. An image may be shown to a network in so many times its own voxels, or
# in a few million where it has few; no scanner's field of view needs more than the largest number.
FINER, FEW, LARGEST = 20, 4_000_000, 40_000_000


def are_a_pair(moving: Image, fixed: Image) -> None:
    """Refuse two images that cannot be brought together.

    Raises:
        ValueError: 2D with 3D, arrays of two shapes, slices of different planes.
    """
    if moving.ndim != fixed.ndim:
        raise ValueError(
            f"moving is {moving.ndim}D {moving.shape} and fixed {fixed.ndim}D {fixed.shape}, "
            "expected the same number of axes."
        )
    if not (moving.physical and fixed.physical) and moving.shape != fixed.shape:
        raise ValueError(
            f"moving has shape {moving.shape} and fixed {fixed.shape}, expected the same: arrays "
            "are on one grid (files and nibabel images may differ)."
        )
    check_one_plane(moving.grid, fixed.grid)


def labels_fit(name: str, labels: Image, image: Image) -> None:
    """Refuse a label map that is not on the grid of its image."""
    if labels.shape != image.shape:
        raise ValueError(
            f"{name} has shape {labels.shape}, expected that of its image, {image.shape}."
        )
    if image.physical and not labels.grid.same_as(image.grid):
        raise ValueError(f"{name} lies elsewhere in space than its image, expected one grid.")


def against_pair(moving: Image, fixed: Image, model: RegistrationModel | None) -> list[str]:
    """Warnings about the pair, before anything is computed."""
    warnings = [*moving.notes, *fixed.notes]
    for name, image in (("moving", moving), ("fixed", fixed)):
        if image.data.min() == image.data.max():
            warnings.append(f"{name} has the same intensity everywhere.")
        elif model is not None and image.physical and image.data.min() < -200:
            warnings.append(
                f"{name} has intensities down to {float(image.data.min()):.0f}, as in a CT: "
                "the network was trained on brain MR."
            )
    one_grid = moving.grid.same_as(fixed.grid)
    covered = 1.0 if one_grid else coverage(fixed.grid.disp_to(moving.grid), moving.shape)
    if covered < 0.25:
        warnings.append(
            f"By their headers the images hardly overlap ({100 * covered:.0f} % of the fixed grid)."
        )
    if fixed.ndim == 2 and (moving.across is None) != (fixed.across is None):
        slice_of = "fixed" if moving.across is None else "moving"
        warnings.append(
            f"{slice_of} is a slice of a volume and the other image a file of two axes: ITK and "
            "ANTs cannot take a displacement between them."
        )
    if model is not None and model.info.get("spacing") and fixed.physical:
        if fixed.ndim == 2 and {"S", "I"} & {*fixed.grid.directions()}:
            warnings.append("The images are no axial slices, which the network was trained on.")
        shape = fixed.grid.covering(model.info["spacing"]).shape
        if max(shape) > 400:
            warnings.append(f"The field of view is large for the network: {shape} of its voxels.")
    return warnings


def small_enough(fixed: Grid, working: Grid) -> None:
    """Refuse, before memory is taken for it, a working grid of far more voxels than the image has.

    Raises:
        ValueError: with the extent of the image: many metres where a header gives its voxel sizes
            in another unit than it says.
    """
    voxels = math.prod(working.shape)
    if voxels <= min(LARGEST, max(FEW, FINER * math.prod(fixed.shape))):
        return
    extent = " x ".join(f"{n * size:.0f}" for n, size in zip(fixed.shape, fixed.spacing))
    raise ValueError(
        f"fixed covers {extent} mm, {voxels / 1e6:.0f} million voxels of the network's size, "
        f"expected at most {LARGEST / 1e6:.0f} million and at most {FINER} for one of its own: "
        "look whether its header gives voxel sizes in mm, or crop it to the organ."
    )


def one_contrast(info: Mapping[str, Any]) -> bool:
    """Whether weights were trained on pairs of one contrast alone, by their own metadata."""
    recipe = info.get("recipe")
    if not recipe or recipe.get("painted") or info.get("contrast") == "any":
        return False
    contrasts = (recipe.get("motion") or {}).get("contrasts") or [recipe.get("contrast", "t1")]
    return len(set(contrasts)) == 1 and "random" not in contrasts


def correlation(moving: Tensor, fixed: Tensor) -> float:
    """Of two aligned images, where both are brighter than 0.7 of their head's median, in [-1, 1].

    CSF is dark in T1 and in FLAIR and would make them look alike. What is left is grey against
    white matter, whose order differs between T1 and T2, PD or FLAIR. Taken at about 96 voxels along
    the longest axis, where what a deformation leaves apart still overlaps.
    """
    coarse = max(1, round(max(fixed.shape) / 96))
    pool = AVERAGE_POOL[fixed.ndim - 2](coarse, ceil_mode=True)
    moving, fixed = pool(moving), pool(fixed)
    bright = torch.ones_like(fixed, dtype=torch.bool)
    for image in (moving, fixed):
        bright &= image > 0.7 * image[image > 0.05].median()
    if bright.sum() < 100:
        return 1.0
    return float(torch.corrcoef(torch.stack([moving[bright], fixed[bright]]))[0, 1])


def against_contrast(
    model: RegistrationModel, aligned: Tensor, fixed: Tensor, physical: bool
) -> list[str]:
    """A warning where weights of one contrast meet two; none for arrays, which may lie apart."""
    if not physical or not one_contrast(model.info) or correlation(aligned, fixed) >= ALIKE:
        return []
    return [
        "The images seem to be of two contrasts and the network was trained on one: try method "
        "'syn', or weights that were trained across contrasts."
    ]


def beyond_training(model: RegistrationModel, theta: Tensor) -> list[str]:
    """A warning where the motion that a network answers is larger than those of its training."""
    if "motion" not in model.info:
        return []
    angle, shift = model.info["motion"]
    identity = torch.eye(*theta.shape[1:], dtype=theta.dtype)
    turned = float(metrics.rotation_error(theta, identity[None])[0])
    spacing = theta.new_tensor(model.info["spacing"])
    moved = float((theta[0, :, -1] * spacing).abs().max())
    if turned <= angle and moved <= shift:
        return []
    return [
        f"The motion found, {turned:.1f} degrees and {moved:.1f} mm, lies outside what the "
        f"network was trained on ({angle:g} degrees, {shift:g} mm): try method 'rigid'."
    ]


def against_answer(transform: Transform, numbers: Mapping[str, Any]) -> list[str]:
    """Warnings about the answer."""
    warnings = []
    covered = coverage(transform.voxels(), transform.moving.shape)
    if covered < 0.5:
        warnings.append(
            f"Only {100 * covered:.0f} % of the fixed image lies inside the moving image."
        )
    if numbers["folding_percent"] > 1:
        warnings.append(
            f"The displacement folds in {numbers['folding_percent']:.1f} % of the voxels."
        )
    if numbers["lncc"]["after"] < numbers["lncc"]["before"] - 0.01:
        warnings.append("The images agree less after registration than before (LNCC).")
    return warnings


def coverage(disp: Tensor, moving_shape: tuple[int, ...]) -> float:
    """The fraction of the fixed grid that looks into the moving image, not beside it."""
    inside = torch.ones(disp.shape[2:], dtype=torch.bool)
    for axis, n in enumerate(moving_shape):
        index = torch.arange(disp.shape[axis + 2]).reshape(
            [-1 if k == axis else 1 for k in range(inside.ndim)]
        )
        coordinate = disp[0, axis] + index
        inside &= (coordinate > -0.5) & (coordinate < n - 0.5)
    return float(inside.float().mean())
