"""Rigid and affine registration by ANTs, as a thin wrapper: `regkit.classical.ants.align`.

It needs antspyx, which the extra `baselines` installs. The settings are ANTs' own, those of its
types "Rigid" and "Affine": four levels, a fifth of the voxels, a start where the centres of mass
agree. It draws those voxels at random, so that two runs differ in their last digits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from regkit.classical.frame import InFrame, common_frame
from regkit.classical.linear import LARGEST
from regkit.io import Image

METRICS = {"mutual_information": "mattes", "correlation": "GC"}
TYPES = {"rigid": "Rigid", "affine": "Affine"}


def align(
    moving: Image,
    fixed: Image,
    kind: str = "affine",
    progress: Callable[[float], None] | None = None,
    largest: int = LARGEST,
    metric: str = "mutual_information",
) -> np.ndarray:
    """The rigid or affine map that lays the moving image over the fixed one, by ANTs.

    How many threads it takes is said by the environment variable
    ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS, before the first call.

    Args:
        moving, fixed, kind, largest: as in `regkit.classical.align`.
        progress: called once, at the end.
        metric: "mutual_information" or "correlation".

    Returns:
        (4, 4) float64, as `regkit.classical.align`: fixed mm -> moving mm, RAS.

    Raises:
        ImportError: antspyx is not installed.
        ValueError: unknown kind or metric, 2D with 3D, slices of different planes, a constant
            image, or images in which nothing can be aligned.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}.")
    a, b, to_world = common_frame(moving, fixed, kind, largest)
    try:
        import ants
    except ImportError:
        raise ImportError(
            "ANTs is not installed, expected the package antspyx: "
            'pip install "regkit-course[baselines]".'
        ) from None

    def image(x: InFrame) -> Any:
        return ants.from_numpy(
            x.values, x.origin.tolist(), x.spacing.tolist(), np.ascontiguousarray(x.direction)
        )

    with tempfile.TemporaryDirectory() as folder:
        try:
            found = ants.registration(
                image(b),
                image(a),
                TYPES[kind],
                outprefix=f"{folder}/",
                aff_metric=METRICS[metric],
                singleprecision=False,
            )
            transform = ants.read_transform(found["fwdtransforms"][0], precision="double")
        except Exception:  # ANTs raises whatever comes
            raise ValueError(
                "moving and fixed could not be aligned, expected images that show the same thing."
            ) from None
    if progress is not None:
        progress(1.0)
    return to_world(lambda points: np.array([transform.apply_to_point(p) for p in points.tolist()]))
