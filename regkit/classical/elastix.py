"""Deformable registration by elastix, as a thin wrapper: `bspline`.

A free-form deformation (Rueckert et al. 1999) found by elastix (Klein et al. 2010): the values of a
cubic B-spline on a coarse lattice of control points, by stochastic gradient descent that draws its
voxels anew in each step and adapts its step size. The package itk-elastix, which the extra
`baselines` installs, runs it inside this process. Its first call takes longer than the others, as
ITK's Python modules load then: about 20 seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from regkit.classical.deformation import Deformation
from regkit.classical.frame import InFrame, in_millimetres, to_voxels
from regkit.messages import install, unknown

METRICS = {
    "correlation": "AdvancedNormalizedCorrelation",
    "mutual_information": "AdvancedMattesMutualInformation",
}
SPACING = 10.0  # mm between control points
LEVELS = 4
ITERATIONS = 256  # per level


def load() -> Any:
    """The package `itk`, with elastix in it.

    Raises:
        ImportError: itk-elastix is not installed.
    """
    try:
        import itk

        found = hasattr(itk, "ElastixRegistrationMethod")
    except ImportError:
        found = False
    if not found:
        raise ImportError(
            f"elastix is not installed, expected the package itk-elastix: {install('baselines')}."
        )
    return itk


def bspline(
    moving: Tensor,
    fixed: Tensor,
    *,
    spacing: float | Sequence[float] = 1.0,
    metric: str = "correlation",
    control: float = SPACING,
    iterations: int = ITERATIONS,
    threads: int = 1,
) -> Deformation:
    """The deformation that lays the moving image over the fixed one, by elastix.

    No rigid or affine search comes before it: the images should roughly agree already. The settings
    are elastix's own parameter map "bspline", but for the metric: that map adds the bending energy
    to the mutual information, this function takes one metric alone. The voxels are drawn with a
    fixed seed, that of elastix.

    Args:
        moving, fixed: (1, 1, *S), on one grid.
        spacing: voxel size along each axis, mm.
        metric: "correlation", of all intensities, or "mutual_information", which asks only that
            intensities predict each other, and takes longer.
        control: distance of the control points at the finest level, mm.
        iterations: of each of the four levels.
        threads: of elastix.

    Returns:
        disp: (1, d, *S) float32, voxels, fixed grid -> moving grid. No inverse, no values.

    Raises:
        ImportError: itk-elastix is not installed.
        ValueError: unknown metric, wrong control or iterations, images of two grids, a constant
            image, or images that elastix gives up on.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, list(METRICS))
    if not control > 0:
        raise ValueError(f"control is {control}, expected more than 0 mm.")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected 1 or more.")
    a, b = in_millimetres(moving, fixed, spacing)
    itk = load()
    settings = itk.ParameterObject.New()
    chosen = settings.GetDefaultParameterMap("bspline", LEVELS, control)
    chosen["Registration"] = ["MultiResolutionRegistration"]
    chosen["Metric"] = [METRICS[metric]]
    chosen["MaximumNumberOfIterations"] = [str(iterations)]
    chosen["WriteResultImage"] = ["false"]
    settings.AddParameterMap(chosen)
    before = itk.MultiThreaderBase.GetGlobalDefaultNumberOfThreads()
    itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(threads)
    try:
        search = itk.ElastixRegistrationMethod.New(_image(itk, b), _image(itk, a))
        search.SetParameterObject(settings)
        search.SetNumberOfThreads(threads)
        search.SetLogToConsole(False)
        search.UpdateLargestPossibleRegion()
        found = search.GetTransformParameterObject()
        with tempfile.TemporaryDirectory() as folder:  # it writes the field to a file as well
            look_up = itk.TransformixFilter.New(_image(itk, a))
            look_up.SetTransformParameterObject(found)
            look_up.SetComputeDeformationField(True)
            look_up.SetOutputDirectory(f"{folder}/")
            look_up.UpdateLargestPossibleRegion()
            field = look_up.GetOutputDeformationField()
    except RuntimeError:
        raise ValueError(
            "moving and fixed could not be registered, expected images that overlap and show the "
            "same thing."
        ) from None
    finally:
        itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(before)
    return Deformation(to_voxels(itk.array_from_image(field), spacing, fixed))


def _image(itk: Any, image: InFrame) -> Any:
    out = itk.image_from_array(np.ascontiguousarray(image.values.T))
    out.SetSpacing(image.spacing.tolist())
    return out
