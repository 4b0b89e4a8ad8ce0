"""Registration by SimpleITK, as thin wrappers: `align`, `demons` and `bspline`.

`align` is rigid or affine, the two others are deformable and take tensors of one grid. `demons`
moves each voxel by what its own intensities ask for and smooths after each step (Thirion 1998;
Vercauteren et al. 2009); `bspline` moves the points of a coarse mesh (Rueckert et al. 1999).

Of `align`. Two metrics: the correlation, for images of one kind, and the mutual information of
Mattes et al. (2003), which asks only that intensities of the two images predict each other, so that
T1 and T2, or MR and CT, may be mixed. The search goes from a blurred, coarse copy of the images to
a fine one, and starts where the centres of mass agree.

The settings are those of SimpleITK's own material: the optimiser of its example
ImageRegistrationMethod3, the levels and bins of its notebook 60, "Registration Introduction". That
notebook looks at one pixel in a hundred, drawn at random (`sampling=0.01`); by default SimpleITK
looks at all of them, and so do we.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regkit.classical.deformation import Deformation
from regkit.classical.frame import InFrame, common_frame
from regkit.classical.linear import Progress
from regkit.classical.pairs import block, check_pair
from regkit.classical.space import LARGEST
from regkit.io import Image
from regkit.transform import Floats

METRICS = ("mutual_information", "correlation")
BINS = 50
LEVELS = ((4, 2.0), (2, 1.0), (1, 0.0))  # shrink factor, Gaussian sigma in voxels
ITERATIONS = 500  # per level at most
DEMONS = {  # the filters of ITK, by kind
    "diffeomorphic": "DiffeomorphicDemonsRegistrationFilter",
    "additive": "FastSymmetricForcesDemonsRegistrationFilter",
    "thirion": "DemonsRegistrationFilter",
}
SMALLEST = 4  # voxels along an axis; what blurs the levels of `bspline` takes no fewer
BSPLINE_METRICS = ("mse", *METRICS)


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
    search.SetNumberOfThreads(threads)  # it was made with the default of before
    with _run(threads, "aligned"):
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


@contextmanager
def _run(threads: int, what: str) -> Iterator[None]:
    """SimpleITK with so many threads; where it gives up, a ValueError that says what failed."""
    import SimpleITK as sitk

    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    try:
        yield
    except RuntimeError:
        raise ValueError(
            f"moving and fixed could not be {what}, expected images that show the same thing."
        ) from None
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


# ------------------------------------------------------------------------------------ deformable


def demons(
    moving: Tensor,
    fixed: Tensor,
    *,
    spacing: float | Sequence[float] = 1.0,
    kind: str = "diffeomorphic",
    smoothing: float = 1.5,
    update_smoothing: float = 0.0,
    levels: Sequence[int] = (4, 2, 1),
    iterations: int = 50,
    threads: int = 1,
    progress: Progress | None = None,
) -> Deformation:
    """Demons: each voxel follows the difference of the intensities, then the field is smoothed.

    It takes the intensities of the two images as they are: both should have one contrast.

    Args:
        moving, fixed: (1, 1, *S) in [0, 1], on one grid. 2D or 3D.
        spacing: voxel size, mm, one number or one per axis.
        kind: "diffeomorphic" (Vercauteren et al. 2009: updates are composed, as exponentials),
            "additive" (the same forces, added up) or "thirion" (the forces of Thirion 1998: the
            slope of the fixed image alone).
        smoothing: of the field after each step, a standard deviation in voxels of the level; 0 for
            none. Smoothing the field is what an elastic body does.
        update_smoothing: of each update before it is taken, in the same units; 0 for none. What a
            fluid does.
        levels: one voxel in so many along each axis, from coarse to fine.
        iterations: of each level; it goes on to the last.
        threads: of SimpleITK.
        progress: called with the fraction done, 0 to 1.

    Returns:
        `disp` (voxels, fixed -> moving) and `values`: the mean squared difference per step.

    Raises:
        ValueError: images that are not two (1, 1, *S) of one grid, or are constant or not finite; a
            setting out of its range.
    """
    size = check_pair(moving, fixed, spacing, levels)
    _check_iterations(iterations)
    if kind not in DEMONS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(DEMONS)}.")
    for name, value in (("smoothing", smoothing), ("update_smoothing", update_smoothing)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}, expected 0 voxels or more.")
    import SimpleITK as sitk

    search = _demons(kind, iterations, smoothing, update_smoothing)
    search.SetNumberOfThreads(threads)  # it was made with the default of before
    values: list[tuple[tuple[int, ...], float]] = []
    images = [_tensor_to_sitk(x, size) for x in (moving, fixed)]
    field: Any = None
    with _run(threads, "registered"):
        for number, level in enumerate(levels):
            small, target = (
                sitk.BinShrink(image, block(image.GetSize(), size, level)) for image in images
            )
            shape = target.GetSize()
            if field is None:
                field = sitk.Image(shape, sitk.sitkVectorFloat64, len(size))
                field.CopyInformation(target)
            else:
                field = sitk.Resample(field, target, useNearestNeighborExtrapolator=True)

            def step(shape: tuple[int, ...] = shape, number: int = number) -> None:
                values.append((shape, search.GetMetric()))
                if progress is not None:
                    done = search.GetElapsedIterations() / iterations
                    progress((number + min(1.0, done)) / len(levels))

            search.RemoveAllCommands()
            search.AddCommand(sitk.sitkIterationEvent, step)
            field = search.Execute(target, small, field)
        field = sitk.Resample(field, images[1], useNearestNeighborExtrapolator=True)
    return Deformation(_field_to_disp(field, size, moving), None, tuple(values))


def _demons(kind: str, iterations: int, smoothing: float, update_smoothing: float) -> Any:
    """SimpleITK's filter with these settings."""
    import SimpleITK as sitk

    search = getattr(sitk, DEMONS[kind])()
    search.SetNumberOfIterations(iterations)
    search.SetMaximumRMSError(0.0)  # it stops at the last iteration, and not before
    search.SetSmoothDisplacementField(smoothing > 0)
    search.SetStandardDeviations(smoothing)
    search.SetSmoothUpdateField(update_smoothing > 0)
    search.SetUpdateFieldStandardDeviations(update_smoothing)
    return search


def bspline(
    moving: Tensor,
    fixed: Tensor,
    *,
    spacing: float | Sequence[float] = 1.0,
    mesh: float = 16.0,
    metric: str = "mutual_information",
    levels: Sequence[int] = (4, 2, 1),
    iterations: int = 50,
    threads: int = 1,
    progress: Progress | None = None,
) -> Deformation:
    """A displacement that is a cubic B-spline: found for a coarse mesh first, then for finer ones.

    There is no term of smoothness: what holds the displacement back is the mesh.

    Args:
        moving, fixed: (1, 1, *S) in [0, 1], on one grid. 2D or 3D.
        spacing: voxel size, mm, one number or one per axis.
        mesh: distance of the control points on the last level, mm, about; twice that on the one
            before it, and so on. A mesh has at least one cell.
        metric: "mutual_information" (Mattes), "correlation" or "mse".
        levels: one voxel in so many along each axis, from coarse to fine.
        iterations: of gradient descent with line search on each level, at most.
        threads: of SimpleITK.
        progress: called with the fraction done, 0 to 1.

    Returns:
        `disp` (voxels, fixed -> moving) and `values`: the metric per step, lower is better.

    Raises:
        ValueError: as `demons`, or an unknown metric, or fewer than 4 voxels along an axis.
    """
    size = check_pair(moving, fixed, spacing, levels)
    _check_iterations(iterations)
    if metric not in BSPLINE_METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(BSPLINE_METRICS)}.")
    if min(fixed.shape[2:]) < SMALLEST:
        raise ValueError(
            f"fixed has shape {tuple(fixed.shape)}, expected {SMALLEST} voxels or more along each "
            "axis."
        )
    if not 0 < mesh < float("inf"):
        raise ValueError(f"mesh is {mesh}, expected a positive number of mm.")
    import SimpleITK as sitk

    source, target = (_tensor_to_sitk(x, size) for x in (moving, fixed))
    search = _bspline(metric, iterations)
    search.SetNumberOfThreads(threads)
    finest = 2 ** (len(levels) - 1)
    extent = [n * h for n, h in zip(target.GetSize(), size, strict=True)]
    cells = [max(1, round(length / mesh / finest)) for length in extent]
    transform = sitk.BSplineTransformInitializer(target, cells, order=3)
    search.SetInitialTransformAsBSpline(
        transform, inPlace=True, scaleFactors=[2**i for i in range(len(levels))]
    )
    factors = [min(block(target.GetSize(), size, level)) for level in levels]  # one for all axes
    search.SetShrinkFactorsPerLevel(factors)
    search.SetSmoothingSigmasPerLevel([(factor - 1) / 2 for factor in factors])
    search.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    values: list[tuple[tuple[int, ...], float]] = []

    def step() -> None:
        number = search.GetCurrentLevel()
        shape = tuple(n // factors[number] for n in target.GetSize())
        values.append((shape, search.GetMetricValue()))
        if progress is not None:
            done = (search.GetOptimizerIteration() + 1) / iterations
            progress((number + min(1.0, done)) / len(levels))

    search.AddCommand(sitk.sitkIterationEvent, step)
    with _run(threads, "registered"):
        found = search.Execute(target, source)
        field = sitk.TransformToDisplacementField(
            found, sitk.sitkVectorFloat64, target.GetSize(), target.GetOrigin(),
            target.GetSpacing(), target.GetDirection(),
        )  # fmt: skip
    return Deformation(_field_to_disp(field, size, moving), None, tuple(values))


def _bspline(metric: str, iterations: int) -> Any:
    """SimpleITK's method with metric and optimiser, for the mesh and the levels."""
    import SimpleITK as sitk

    search = sitk.ImageRegistrationMethod()
    if metric == "mse":
        search.SetMetricAsMeanSquares()
    elif metric == "correlation":
        search.SetMetricAsCorrelation()
    else:
        search.SetMetricAsMattesMutualInformation(BINS)
    search.SetInterpolator(sitk.sitkLinear)
    search.SetOptimizerAsGradientDescentLineSearch(
        learningRate=1.0,
        numberOfIterations=iterations,
        convergenceMinimumValue=1e-5,
        convergenceWindowSize=5,
        lineSearchMaximumIterations=6,
    )
    search.SetOptimizerScalesFromPhysicalShift()
    return search


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected 1 or more.")


def _tensor_to_sitk(image: Tensor, size: Sequence[float]) -> Any:
    """(1, 1, *S) as an image whose axes are those of the array, voxel 0 at the origin."""
    import SimpleITK as sitk

    values = image[0, 0].detach().cpu().float().numpy()
    out = sitk.GetImageFromArray(np.ascontiguousarray(values.T))  # SimpleITK counts x first
    out.SetSpacing(size)
    return out


def _field_to_disp(field: Any, size: Sequence[float], like: Tensor) -> Tensor:
    """A field of vectors in mm as (1, d, *S), voxels, on the device of `like`."""
    import SimpleITK as sitk

    vectors = sitk.GetArrayFromImage(field).T  # (d, *S): the component along axis i is number i
    return torch.from_numpy(vectors / np.reshape(size, (-1, *[1] * len(size))))[None].to(
        like.device, torch.float32
    )
