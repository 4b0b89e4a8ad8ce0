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
from torch import Tensor, nn

from regkit import losses, metrics
from regkit.io import Image
from regkit.models import RegistrationModel
from regkit.transform import Grid, Transform, check_one_plane

# What `one_kind` wants: a correlation of at least ALIKE in what is bright, and distributions of
# intensity at most APART standard deviations apart. Measured: results/contrasts.json.
ALIKE, APART = 0.15, 0.2
# Mean trust below which an answer is warned of. Two images that show nothing alike have 0 to 0.1.
UNTRUSTED = 0.15
# Two images that show nothing alike: NCC of any answer; or, of a deformed one, LNCC and mutual
# information where the fixed image shows something, looked at if LNCC over all voxels is below LOW.
# There a fundus and a brain have 0.20 to 0.29 and 0.06 to 0.18; T1 and fractional anisotropy of one
# head, the least alike of what belongs together, 0.18 and 0.21; T1 and proton density 0.5 and 0.6.
NOTHING, LITTLE, TOLD, LOW = 0.1, 0.3, 0.2, 0.4
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


def _bright_correlation(moving: Tensor, fixed: Tensor) -> float:
    """Where both are brighter than 0.7 of their head's median, in [-1, 1]; 1 where little is.

    CSF is dark in T1 and in FLAIR and would make them look alike. What is left is grey against
    white matter, whose order differs between T1 and T2, PD or FLAIR.
    """
    bright = torch.ones_like(fixed, dtype=torch.bool)
    for image in (moving, fixed):
        bright &= image > 0.7 * image[image > 0.05].median()
    if bright.sum() < 100:
        return 1.0
    return float(torch.corrcoef(torch.stack([moving[bright], fixed[bright]]))[0, 1])


def _histogram_distance(moving: Tensor, fixed: Tensor) -> float:
    """Mean distance of the quantiles of two (N,), each with mean 0 and deviation 1: 0 or more.

    In two images of one contrast, as much of the head is as bright, whatever the scanner's units.
    T1 and fractional anisotropy are both brightest in white matter, but most of the anisotropy is
    dark.
    """
    at = torch.linspace(0.02, 0.98, 49, dtype=torch.float32)
    drawn = [x[:: len(x) // 500_000 + 1].float().cpu() for x in (moving, fixed)]
    first, second = (((x - x.mean()) / x.std()).quantile(at) for x in drawn)
    return float((first - second).abs().mean())


def likeness(moving: Tensor, fixed: Tensor) -> tuple[float, float]:
    """What `one_kind` goes by, of two aligned images (1, 1, *S) in [0, 1].

    Taken at about 96 voxels along the longest axis, where what a deformation leaves apart still
    overlaps.

    Returns:
        The correlation of what is bright in both, in [-1, 1], and the distance of the distributions
        of intensity where neither is background, in standard deviations, 0 or more. 1 and 0 where
        there is too little to tell.
    """
    coarse = max(1, round(max(fixed.shape) / 96))
    edges = [min(coarse, n) for n in fixed.shape[2:]]  # of a slab, at most all its slices
    pool = nn.functional.avg_pool3d if fixed.ndim == 5 else nn.functional.avg_pool2d
    moving, fixed = (pool(image, edges, ceil_mode=True) for image in (moving, fixed))
    both = (moving > 0.05) & (fixed > 0.05)
    if both.sum() < 100 or any(image[both].std() < 1e-3 for image in (moving, fixed)):
        return 1.0, 0.0
    return _bright_correlation(moving, fixed), _histogram_distance(moving[both], fixed[both])


def one_kind(moving: Tensor, fixed: Tensor) -> bool:
    """Whether two aligned images (1, 1, *S) in [0, 1] seem to be of one contrast.

    Roughly aligned is enough, as two heads are after an affine registration. Both have to hold: a
    correlation of at least `ALIKE`, distributions at most `APART`. Where there is too little to
    tell, they are taken for one kind. How often it errs is in results/contrasts.json.
    """
    correlation, distance = likeness(moving, fixed)
    return correlation >= ALIKE and distance <= APART


def against_contrast(
    model: RegistrationModel, aligned: Tensor, fixed: Tensor, physical: bool
) -> list[str]:
    """A warning where weights of one contrast meet two; none for arrays, which may lie apart."""
    if not physical or not one_contrast(model.info) or one_kind(aligned, fixed):
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


def against_unlike(
    moved: Tensor, fixed: Tensor, shown: Tensor, deformed: bool, ncc: float, lncc: float
) -> list[str]:
    """A warning where two images show nothing alike, though registered.

    Args:
        moved, fixed: (1, 1, *S) in [0, 1].
        shown: (1, 1, *S) bool, where the fixed image shows something.
        deformed: whether there was more than a rigid or affine map: that would have made alike what
            can be.
        ncc, lncc: correlations over all voxels, in [-1, 1] and [0, 1]. The second may be low for
            noise in the air alone, so that it is taken of what is shown then.
    """
    unlike = abs(ncc) < NOTHING
    if not unlike and deformed and lncc < LOW:
        lncc = 1 - float(losses.lncc(moved, fixed, mask=shown))
        seen = [x[shown][None, None, None] for x in (moved, fixed)]
        told = -float(losses.mutual_information(seen[0], seen[1]))
        unlike = lncc < LITTLE and told < TOLD
    if not unlike:
        return []
    return [
        "This registration cannot be trusted: the images show little alike after it "
        f"(NCC {ncc:.2f}, LNCC {lncc:.2f})."
    ]


def against_trust(mean: float) -> list[str]:
    """A warning where little of an answer is trusted, by the mean of `regkit.trust.trust_map`."""
    if mean >= UNTRUSTED:
        return []
    return [
        "This registration cannot be trusted: a second run, from the fixed image to the moving "
        f"one, leads elsewhere (mean trust {mean:.2f})."
    ]


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
