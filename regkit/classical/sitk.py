"""Rigid and affine registration by SimpleITK, as a thin wrapper: `regkit.classical.sitk.align`.

Two metrics: the correlation, for images of one kind, and the mutual information of Mattes et al.
(2003), which asks only that intensities of the two images predict each other, so that T1 and T2, or
MR and CT, may be mixed. The search goes from a blurred, coarse copy of the images to a fine one,
and starts where the centres of mass agree.

The settings are those of SimpleITK's own material: the optimiser of its example
ImageRegistrationMethod3, the levels and bins of its notebook 60, "Registration Introduction". That
notebook looks at one pixel in a hundred, drawn at random (`sampling=0.01`); by default SimpleITK
looks at all of them, and so do we.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regkit.classical.frame import InFrame, common_frame
from regkit.classical.linear import LARGEST, Progress
from regkit.io import Image
from regkit.transform import Floats

METRICS = ("mutual_information", "correlation")
BINS = 50
LEVELS = ((4, 2.0), (2, 1.0), (1, 0.0))  # shrink factor, Gaussian sigma in voxels
ITERATIONS = 500  # per level at most


def align(
    moving: Image,
    fixed: Image,
    kind: str = "affine",
    *,
    metric: str = "mutual_information",
    sampling: float = 1.0,
    threads: int = 1,
    largest: int = LARGEST,
    progress: Progress | None = None,
) -> Floats:
    """`regkit.classical.align`, by SimpleITK.

    Args:
        moving, fixed, largest, progress: as there.
        kind: "rigid" (turn and shift), or "affine" (stretch and shear as well, after that).
        metric: "mutual_information" or "correlation".
        sampling: which part of the voxels the metric looks at; less than 1 draws them at random,
            with a fixed seed.
        threads: of SimpleITK. They add up the histogram in no fixed order: with one the answer is
            the same every time.

    Returns:
        (4, 4) float64, as `regkit.classical.align`: fixed mm -> moving mm, RAS.

    Raises:
        ValueError: unknown kind or metric, 2D with 3D, slices of different planes, a constant
            image, or images in which nothing can be aligned.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}.")
    if not 0 < sampling <= 1:
        raise ValueError(f"sampling is {sampling}, expected more than 0 and at most 1.")
    a, b, to_world = common_frame(moving, fixed, kind, largest)
    import SimpleITK as sitk

    images = _to_sitk(b), _to_sitk(a)
    search = _search(metric, sampling)
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    try:
        transform = sitk.CenteredTransformInitializer(
            *images,
            sitk.Euler2DTransform() if fixed.ndim == 2 else sitk.Euler3DTransform(),
            sitk.CenteredTransformInitializerFilter.MOMENTS,
        )
        stages = 1 if kind == "rigid" else 2
        for stage in range(stages):
            if stage == 1:
                transform = _to_affine(transform)
            search.SetOptimizerAsRegularStepGradientDescent(
                learningRate=2.0 if stage == 0 else 0.5,
                minStep=1e-4,
                numberOfIterations=ITERATIONS,
                gradientMagnitudeTolerance=1e-8,
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
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
    return to_world(lambda points: np.array([transform.TransformPoint(p) for p in points.tolist()]))


def _search(metric: str, sampling: float) -> Any:
    """SimpleITK's method with the metric and the levels, for the transform and the optimiser."""
    import SimpleITK as sitk

    search = sitk.ImageRegistrationMethod()
    if metric == "correlation":
        search.SetMetricAsCorrelation()
    else:
        search.SetMetricAsMattesMutualInformation(BINS)
    if sampling < 1:
        search.SetMetricSamplingStrategy(search.RANDOM)
        search.SetMetricSamplingPercentage(sampling, seed=1)
    search.SetInterpolator(sitk.sitkLinear)
    search.SetShrinkFactorsPerLevel([shrink for shrink, _ in LEVELS])
    search.SetSmoothingSigmasPerLevel([sigma for _, sigma in LEVELS])
    search.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    search.SetOptimizerScalesFromPhysicalShift()
    return search


def _to_affine(rigid: Any) -> Any:
    """A rigid transform as an affine one, which has numbers for stretch and shear as well."""
    import SimpleITK as sitk

    affine = sitk.AffineTransform(rigid.GetDimension())
    affine.SetCenter(rigid.GetCenter())
    affine.SetMatrix(rigid.GetMatrix())
    affine.SetTranslation(rigid.GetTranslation())
    return affine


def _to_sitk(image: InFrame) -> Any:
    import SimpleITK as sitk

    out = sitk.GetImageFromArray(np.ascontiguousarray(image.values.T))
    out.SetSpacing(image.spacing.tolist())
    out.SetDirection(image.direction.ravel().tolist())
    out.SetOrigin(image.origin.tolist())
    return out


def _report(search: Any, progress: Progress, stage: int, stages: int) -> None:
    """Call `progress` at every iteration; how many there will be is not known, so it creeps."""
    import SimpleITK as sitk

    def step() -> None:
        level, iteration = search.GetCurrentLevel(), search.GetOptimizerIteration()
        within = (level + min(1.0, iteration / ITERATIONS)) / len(LEVELS)
        progress((stage + min(1.0, within)) / stages)

    search.AddCommand(sitk.sitkIterationEvent, step)
