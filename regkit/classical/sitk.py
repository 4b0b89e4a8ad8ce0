"""Rigid and affine registration by SimpleITK, as a thin wrapper.

The metric is the mutual information of Mattes et al. (2003): it asks only that intensities of the
two images predict each other, so T1 and T2, or MR and CT, may be mixed. The search goes from a
blurred, coarse copy of the images to a fine one, and starts where the centres of mass agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from regkit.io import Image, resample_to, voxel_map, working_grid

BINS = 50
LEVELS = ((4, 2.0), (2, 1.0), (1, 0.0))  # shrink factor, Gaussian sigma in voxels
ITERATIONS = 200  # per level at most
# Finer than this many voxels costs time and moves an affine map by less than a tenth of a voxel.
LARGEST = 400_000


def align(
    moving: Image,
    fixed: Image,
    kind: str = "affine",
    progress: Callable[[float], None] | None = None,
    largest: int = LARGEST,
) -> np.ndarray:
    """The rigid or affine map that lays the moving image over the fixed one.

    Args:
        moving, fixed: images of 2 or 3 axes, see `regkit.io.as_image`. Their grids may differ.
        kind: "rigid" (turn and shift), or "affine" (stretch and shear as well, after that).
        progress: called with the fraction done, 0 to 1.
        largest: each image is brought to about this many voxels, if it has more.

    Returns:
        (4, 4) float64: a point of the fixed image in mm (RAS) -> its counterpart in the moving
        image in mm (RAS). This is the pull-back direction, as for displacements. In 2D the map
        stays in the plane of the slices.

    Raises:
        ValueError: unknown kind, 2D with 3D, slices of different planes, or images in which nothing
            can be aligned.
    """
    if kind not in ("rigid", "affine"):
        raise ValueError(f"kind is {kind!r}, expected 'rigid' or 'affine'.")
    if moving.ndim != fixed.ndim:
        raise ValueError(f"moving is {moving.ndim}D and fixed {fixed.ndim}D, expected the same.")
    import SimpleITK as sitk

    d = fixed.ndim
    # A frame for the search: mm along the axes of the fixed grid. The moving image keeps the place
    # its header gives it relative to the fixed one. This serves 2D and 3D, and needs no RAS or LPS.
    to_frame = np.diag([*fixed.spacing, 1.0])
    fixed_in_frame = to_frame
    moving_in_frame = to_frame @ np.linalg.inv(voxel_map(fixed.affine, moving.affine, d))
    images = []
    for image, in_frame in ((fixed, fixed_in_frame), (moving, moving_in_frame)):
        images.append(_to_sitk(*_coarse(image, in_frame, largest)))

    search = sitk.ImageRegistrationMethod()
    search.SetMetricAsMattesMutualInformation(BINS)
    search.SetMetricSamplingStrategy(search.NONE)  # every voxel: random subsets miss fine answers
    search.SetInterpolator(sitk.sitkLinear)
    search.SetShrinkFactorsPerLevel([shrink for shrink, _ in LEVELS])
    search.SetSmoothingSigmasPerLevel([sigma for _, sigma in LEVELS])
    search.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    search.SetOptimizerScalesFromPhysicalShift()
    # Threads add up the histogram in no fixed order: one of them gives the same answer every time.
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        transform = sitk.CenteredTransformInitializer(
            *images,
            sitk.Euler2DTransform() if d == 2 else sitk.Euler3DTransform(),
            sitk.CenteredTransformInitializerFilter.MOMENTS,
        )
        stages = 1 if kind == "rigid" else 2
        for stage in range(stages):
            if stage == 1:
                rigid, transform = transform, sitk.AffineTransform(d)
                transform.SetCenter(rigid.GetCenter())
                transform.SetMatrix(rigid.GetMatrix())
                transform.SetTranslation(rigid.GetTranslation())
            search.SetOptimizerAsRegularStepGradientDescent(
                learningRate=2.0 if stage == 0 else 0.5,
                minStep=1e-3,
                numberOfIterations=ITERATIONS,
                gradientMagnitudeTolerance=1e-6,
            )
            search.SetInitialTransform(transform, inPlace=True)
            search.RemoveAllCommands()
            if progress is not None:
                _report(search, progress, stage, stages)
            search.Execute(*images)
    except RuntimeError:
        raise ValueError(
            "moving and fixed could not be aligned, expected images that show the same thing."
        ) from None
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)

    # T(x) = A (x - centre) + centre + t, between points of the frame
    linear = np.array(transform.GetMatrix()).reshape(d, d)
    centre, shift = np.array(transform.GetCenter()), np.array(transform.GetTranslation())
    found = np.eye(d + 1)
    found[:d, :d] = linear
    found[:d, d] = centre + shift - linear @ centre
    return _to_world(np.linalg.inv(moving_in_frame) @ found @ fixed_in_frame, fixed, moving)


def _coarse(image: Image, in_frame: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Isotropic, not too large, in [0, 1]: the array, and its matrix to the frame."""
    spacing = image.spacing
    volume = float(np.prod([n * s for n, s in zip(image.shape, spacing, strict=True)]))
    size = max(min(spacing), (volume / largest) ** (1 / image.ndim))
    shape, affine = working_grid(image.shape, image.affine, [size] * image.ndim)
    values = resample_to(image.data, image.affine, shape, affine)[0, 0].numpy()
    low, high = float(values.min()), float(values.max())
    values = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return values, in_frame @ voxel_map(affine, image.affine, image.ndim)


def _to_sitk(values: np.ndarray, matrix: np.ndarray) -> Any:
    """A SimpleITK image of an array and the (d+1, d+1) matrix voxel -> frame."""
    import SimpleITK as sitk

    d = values.ndim
    out = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    spacing = np.linalg.norm(matrix[:d, :d], axis=0)
    out.SetSpacing(spacing.tolist())
    out.SetDirection((matrix[:d, :d] / spacing).ravel().tolist())
    out.SetOrigin(matrix[:d, d].tolist())
    return out


def _report(search: Any, progress: Callable[[float], None], stage: int, stages: int) -> None:
    """Call `progress` at every iteration; how many there will be is not known, so it creeps."""
    import SimpleITK as sitk

    def step() -> None:
        level, iteration = search.GetCurrentLevel(), search.GetOptimizerIteration()
        within = (level + min(1.0, iteration / ITERATIONS)) / len(LEVELS)
        progress((stage + min(1.0, within)) / stages)

    search.AddCommand(sitk.sitkIterationEvent, step)


def _to_world(found: np.ndarray, fixed: Image, moving: Image) -> np.ndarray:
    """A voxel map (d+1, d+1) as map from mm to mm, (4, 4). In 2D slice 0 goes to slice 0."""
    d = fixed.ndim
    full = np.eye(4)
    keep = [*range(d), 3]
    full[np.ix_(keep, keep)] = found
    return moving.affine @ full @ np.linalg.inv(fixed.affine)
