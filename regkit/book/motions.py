"""What chapter 02 measures of methods that find a turn and a shift, and prints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
from torch import Tensor

from regkit import register
from regkit.data import RigidPairs, Subject, known_pair
from regkit.models import Registration
from regkit.training.evaluation import Method, motion_errors, motion_rows, motion_summary


def judge(methods: Mapping[str, Method], data: RigidPairs) -> dict[str, dict[str, Any]]:
    """Ask each method for the motion of each pair, one at a time; print how far it is off.

    Args:
        methods: name -> a model, or anything that `regkit.training.evaluation.motion_rows` takes.

    Returns:
        By name: `rows`, one a pair, of `motion_rows`; what `motion_summary` says of them, medians
        and the percentage of successes; `mm`, the median error of the shift in mm; `ms`, the mean
        time of a pair in milliseconds. A line of each is printed.
    """
    pairs = data.pairs()
    scores: dict[str, dict[str, Any]] = {}
    for name, method in methods.items():
        start = time.perf_counter()
        rows = motion_rows(method, pairs, batch=1)
        ms = 1000 * (time.perf_counter() - start) / len(pairs)
        score: dict[str, Any] = dict(motion_summary(rows))
        score |= {"mm": pairs[0].fixed.spacing[0] * score["translation_error"], "ms": ms}
        scores[name] = score | {"rows": rows}
        print(
            f"{name:17s} {score['rotation_error']:6.3f} degrees {score['mm']:6.3f} mm  "
            f"success {score['success']:3.0f} %  {ms:6.1f} ms"
        )
    return scores


def when_turned(
    methods: Mapping[str, Method],
    subjects: Sequence[Subject],
    thetas: Sequence[Tensor],
    noise: float = 0.02,
) -> dict[str, list[float]]:
    """How far each method is off where a head is moved further and further.

    Args:
        methods: as of `judge`.
        subjects: the heads.
        thetas: the motions to find, (1, d, d+1) each, voxels.
        noise: fresh, on both images, see `regkit.data.known_pair`.

    Returns:
        By name: for each motion the median over the heads of the error of the angle, degrees.
    """
    found: dict[str, list[float]] = {name: [] for name in methods}
    for theta in thetas:
        pairs = [known_pair(subject, theta, noise) for subject in subjects]
        for name, method in methods.items():
            found[name].append(motion_errors(method, pairs, batch=1)["rotation_error"])
    return found


def with_header(method: str, affine: np.ndarray) -> Method:
    """A method that asks `regkit.register`, and tells it where the voxels of both images lie.

    Args:
        method: of `register`.
        affine: (4, 4), voxel -> RAS mm, of the moving and of the fixed image, (1, 1, *S) each.
    """

    def ask(moving: Tensor, fixed: Tensor) -> Registration:
        files = [nib.Nifti1Image(image[0, 0].numpy(), affine) for image in (moving, fixed)]
        result = register(files[0], files[1], method=method)
        return Registration(result.moved, result.disp, theta=result.theta)

    return ask
