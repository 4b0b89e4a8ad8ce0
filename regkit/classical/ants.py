"""Registration by ANTs, as two thin wrappers: `align` is rigid or affine, `syn` is deformable.

Both need antspyx, which the extra `baselines` installs. How many threads ANTs takes is said by the
environment variable ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS, before the first call.

`align` has the settings of ANTs' types "Rigid" and "Affine": four levels, a fifth of the voxels, a
start where the centres of mass agree. It draws those voxels at random, so that two runs differ in
their last digits.

`syn` is the symmetric normalisation of Avants et al. (2008): both images move towards a middle, by
maps that are smooth and can be inverted, and the answer leads from one image through that middle to
the other. It has the settings that ANTs recommends in its script antsRegistrationSyN, as antspyx
states them. It looks at every voxel and draws nothing at random.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from regkit.classical.frame import InFrame, check_images, common_frame
from regkit.classical.linear import Progress
from regkit.classical.space import LARGEST
from regkit.io import LPS, Image, read_transform
from regkit.messages import install
from regkit.transform import Floats, Grid, inverted

METRICS = {"mutual_information": "mattes", "correlation": "GC"}
TYPES = {"rigid": "Rigid", "affine": "Affine"}
# of `syn`: ANTs' name, and its parameter: bins of the histogram, radius of the window in voxels
SYN_METRICS = {"mutual_information": ("mattes", 32), "correlation": ("CC", 2)}
SYN_ITERATIONS = (100, 70, 50, 20)  # at most, with 8, 4, 2 and 1 voxels in one
SMALLEST = 4  # voxels along an axis; ANTs gives up on fewer


def load() -> Any:
    """The package `ants`.

    Raises:
        ImportError: antspyx is not installed.
    """
    try:
        import ants
    except ImportError:
        raise ImportError(
            f"ANTs is not installed, expected the package antspyx: {install('baselines')}."
        ) from None
    return ants


def _image(x: InFrame) -> Any:
    return load().from_numpy(
        x.values, x.origin.tolist(), x.spacing.tolist(), np.ascontiguousarray(x.direction)
    )


def align(
    moving: Image,
    fixed: Image,
    kind: str = "affine",
    *,
    metric: str = "mutual_information",
    largest: int = LARGEST,
    progress: Progress | None = None,
) -> Floats:
    """`regkit.classical.align`, by ANTs.

    Args:
        moving, fixed, kind, largest: as there.
        metric: "mutual_information" or "correlation".
        progress: called once, at the end.

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
    ants = load()
    with tempfile.TemporaryDirectory() as folder:
        try:
            answer = ants.registration(
                _image(b),
                _image(a),
                TYPES[kind],
                outprefix=f"{folder}/",
                aff_metric=METRICS[metric],
                singleprecision=False,
            )
            transform = ants.read_transform(answer["fwdtransforms"][0], precision="double")
        except Exception:  # ANTs has no exceptions of its own
            raise ValueError(
                "moving and fixed could not be aligned, expected images that show the same thing."
            ) from None
    if progress is not None:
        progress(1.0)
    return to_world(lambda points: np.array([transform.apply_to_point(p) for p in points.tolist()]))


def syn(
    moving: Image,
    fixed: Image,
    metric: str = "correlation",
    iterations: Sequence[int] = SYN_ITERATIONS,
) -> Tensor:
    """The deformation that lays the moving image over the fixed one, by ANTs' SyN.

    No rigid or affine search comes before it: the images should roughly agree already, as they do
    after `regkit.classical.align`.

    Args:
        moving, fixed: images of 2 or 3 axes, see `regkit.io.as_image`. Their grids may differ;
            ANTs works in millimetres, on the voxels of the fixed grid.
        metric: "correlation", in windows of 5 voxels, or "mutual_information", which is faster and
            asks less of the images, and on two images of one contrast aligns them less well.
        iterations: of each level at most, from coarse to fine; a level has voxels half as wide as
            the one before it, and the last one is the fixed grid. 0 leaves a level out.

    Returns:
        (1, d, *S) float32, voxels, fixed grid -> moving grid: what the headers say and the
        deformation, in one. With one thread the same every time.

    Raises:
        ImportError: antspyx is not installed.
        ValueError: unknown metric, wrong iterations, 2D with 3D, slices of different planes, a
            constant image, fewer than 4 voxels along an axis, or images that ANTs gives up on.
    """
    if metric not in SYN_METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(SYN_METRICS)}.")
    if not iterations or any(not isinstance(n, int) or n < 0 for n in iterations):
        raise ValueError(f"iterations is {iterations!r}, expected a number, 0 or more, per level.")
    check_images(moving, fixed)
    for name, image in (("moving", moving), ("fixed", fixed)):
        if min(image.shape) < SMALLEST:
            raise ValueError(
                f"{name} has shape {image.shape}, expected {SMALLEST} or more voxels per axis."
            )
    ants, d = load(), fixed.ndim
    # mm along the axes of the fixed grid, see `regkit.classical.frame`
    grid = np.diag([*fixed.spacing, 1.0])
    moving_matrix: Floats = grid @ inverted(fixed.grid.map_to(moving.grid))
    a = InFrame(moving.data[0, 0].numpy(), moving_matrix)
    b = InFrame(fixed.data[0, 0].numpy(), grid)
    name, parameter = SYN_METRICS[metric]
    with tempfile.TemporaryDirectory() as folder:
        try:
            answer = ants.registration(
                _image(b),
                _image(a),
                "SyNOnly",
                outprefix=f"{folder}/",
                syn_metric=name,
                syn_sampling=parameter,
                reg_iterations=tuple(iterations),
            )
        except Exception:  # ANTs has no exceptions of its own
            raise ValueError(
                "moving and fixed could not be registered, expected images that overlap and show "
                "the same thing."
            ) from None
        full, axes = np.eye(4), [*range(d), 3]
        full[np.ix_(axes, axes)] = moving_matrix
        in_frame = Grid(moving.shape, LPS @ full)
        return read_transform(answer["fwdtransforms"][0], in_frame).voxels()
