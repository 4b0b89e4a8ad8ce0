"""Deformable registration by greedy of the Penn Image Computing and Science Laboratory: `greedy`.

A thin wrapper of the program (Yushkevich et al., Alzheimer's & Dementia 12, P126, 2016), to compare
with: the update follows the closed-form derivative of the similarity, is smoothed, and is composed
with the map so far, from coarse to fine. The package picsl_greedy, which the extra `baselines`
installs, runs the C++ program inside this process, on images in memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from regkit.classical.deformation import Deformation
from regkit.classical.frame import InFrame, in_millimetres, to_voxels
from regkit.messages import install, unknown

METRICS = ("NCC", "WNCC", "SSD", "MI", "NMI")


def load() -> Any:
    """The package `picsl_greedy`.

    Raises:
        ImportError: picsl_greedy is not installed.
    """
    try:
        import picsl_greedy
    except ImportError:
        raise ImportError(
            f"greedy is not installed, expected the package picsl_greedy: {install('baselines')}."
        ) from None
    return picsl_greedy


def greedy(
    moving: Tensor,
    fixed: Tensor,
    *,
    spacing: float | Sequence[float] = 1.0,
    metric: str = "NCC",
    radius: int = 2,
    iterations: str = "100x50x10",
    threads: int = 1,
) -> Deformation:
    """The deformation that lays the moving image over the fixed one, by the program greedy.

    No rigid or affine search comes before it: the images should roughly agree already. What is not
    an argument has the default of the program, such as a smoothing of the update by 1.732 voxels
    and of the map by 0.7071.

    Args:
        moving, fixed: (1, 1, *S), on one grid.
        spacing: voxel size along each axis, mm.
        metric: "NCC" and "WNCC" look at windows, "SSD" at intensities; "MI" and "NMI" ask only that
            intensities predict each other.
        radius: of the windows, in voxels: 2 means windows 5 voxels wide. The others take none.
        iterations: of each level, from coarse to fine, with an "x" between; the last level is the
            grid itself, the one before it has voxels twice as wide.
        threads: of the program.

    Returns:
        disp: (1, d, *S) float32, voxels, fixed grid -> moving grid. No inverse, no values.

    Raises:
        ImportError: picsl_greedy is not installed.
        ValueError: unknown metric, wrong radius or iterations, images of two grids, a constant
            image, or images that the program gives up on.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if radius < 1:
        raise ValueError(f"radius is {radius}, expected 1 or more voxels.")
    if not re.fullmatch(r"\d+(x\d+)*", iterations):
        raise ValueError(f"iterations is {iterations!r}, expected numbers such as '100x50x10'.")
    a, b = in_millimetres(moving, fixed, spacing)
    d = fixed.ndim - 2
    window = " " + "x".join([str(radius)] * d) if metric in ("NCC", "WNCC") else ""
    program = getattr(load(), f"Greedy{d}D")()
    try:
        program.execute(
            f"-d {d} -i fixed moving -m {metric}{window} -n {iterations} -o warp "
            f"-threads {threads} -V 0",
            fixed=_image(b),
            moving=_image(a),
            warp=None,
        )
        warp = program["warp"]
    except RuntimeError:
        raise ValueError(
            "moving and fixed could not be registered, expected images that overlap and show the "
            "same thing."
        ) from None
    import SimpleITK as sitk

    return Deformation(to_voxels(sitk.GetArrayFromImage(warp), spacing, fixed))


def _image(image: InFrame) -> Any:
    import SimpleITK as sitk

    out = sitk.GetImageFromArray(np.ascontiguousarray(image.values.T))
    out.SetSpacing(image.spacing.tolist())
    return out
