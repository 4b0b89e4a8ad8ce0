"""Metrics over pairs of subjects: one row a pair, and their summary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from regkit import classical, losses, metrics
from regkit.data.population import true_displacement
from regkit.data.rigid import RigidPair
from regkit.data.subject import Subject
from regkit.models import Registration
from regkit.spatial import affine_to_disp, warp

Method = Callable[[Tensor, Tensor], Registration]


def _finite_mean(values: Tensor) -> float:
    """Mean over the labels that have a finite value; NaN if none has."""
    values = values[torch.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def labels_of(*subjects: Subject) -> list[int]:
    """The labels that any of the subjects has, without the background, 0."""
    return sorted({int(n) for one in subjects for n in torch.unique(one.labels)} - {0})


def check_labels(labels: Sequence[int] | None, *subjects: Subject) -> None:
    """Refuse labels of which the subjects have none: every Dice would be NaN."""
    if not labels or not set(labels).isdisjoint(present := labels_of(*subjects)):
        return
    raise ValueError(
        f"labels is {_some(labels)}, of which {subjects[-1].name!r} has none, expected some of "
        f"{_some(present) or 'its labels, and it has no'}."
    )


def _some(labels: Sequence[int]) -> str:
    return ", ".join(map(str, labels[:6])) + (" ..." if len(labels) > 6 else "")


@torch.no_grad()
def evaluate(
    method: Method,
    pairs: Iterable[tuple[Subject, Subject]],
    labels: Sequence[int] | None = None,
    distances: bool = False,
    ceiling: bool = False,
    device: str | torch.device = "cpu",
) -> list[dict[str, Any]]:
    """Register every (moving, fixed) pair and measure the result.

    Args:
        method: a model, or anything that maps two (1, 1, *S) images to a `Registration`.
        pairs: subjects with images (1, *S) and labels (1, *S).
        labels: which labels count; by default all of a pair.
        distances: also HD95, in mm of the fixed subject's spacing (slow in 3D).
        ceiling: also the Dice that the true displacement reaches: embedded population only.
        device: where the model is.

    Raises:
        ValueError: a pair has none of `labels`.

    Returns:
        Per pair: moving, fixed (names), dice_before, dice, folding_percent, sd_log_jacobian, lncc
        (local correlation, in [0, 1]), seconds, dice_per_label; with `distances` hd95,
        hd95_per_label and hd95_infinite (how many labels were lost and left out of the mean); with
        `ceiling` dice_ceiling and endpoint_error (voxels, inside the head). A pair without labels
        has none of the numbers that labels give.
    """
    rows = []
    for moving, fixed in pairs:
        a, b = moving.image[None].to(device), fixed.image[None].to(device)
        start = time.perf_counter()
        result = method(a, b)
        if a.device.type == "cuda":
            torch.cuda.synchronize(a.device)
        seconds = time.perf_counter() - start
        disp = result.disp.cpu()
        from_labels, to_labels = moving.labels[None], fixed.labels[None]
        warped = warp(from_labels, disp, mode="nearest")
        chosen = labels_of(moving, fixed) if labels is None else labels
        check_labels(labels, moving, fixed)
        per_label = metrics.dice(warped, to_labels, chosen)[0]
        row = {
            "moving": moving.name,
            "fixed": fixed.name,
            "dice_before": _finite_mean(metrics.dice(from_labels, to_labels, chosen)),
            "dice": _finite_mean(per_label),
            "folding_percent": float(metrics.folding_percent(disp)),
            "sd_log_jacobian": float(metrics.sd_log_jacobian(disp)),
            "lncc": 1 - float(losses.lncc(result.moved.cpu(), fixed.image[None])),
            "seconds": seconds,
            "dice_per_label": dict(zip(map(int, chosen), per_label.tolist(), strict=True)),
        }
        if not chosen:
            row = {key: value for key, value in row.items() if not key.startswith("dice")}
        if distances and chosen:
            apart = metrics.hd95(warped, to_labels, chosen, spacing=fixed.spacing)[0]
            row["hd95"] = _finite_mean(apart)
            row["hd95_infinite"] = int(torch.isinf(apart).sum())
            row["hd95_per_label"] = dict(zip(map(int, chosen), apart.tolist(), strict=True))
        if ceiling:
            truth = true_displacement(moving, fixed)
            best = warp(from_labels, truth, mode="nearest")
            row["dice_ceiling"] = _finite_mean(metrics.dice(best, to_labels, chosen))
            row["endpoint_error"] = float(metrics.endpoint_error(disp, truth, to_labels > 0))
        rows.append(row)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean over pairs of every number in the rows, and the standard deviation of a Dice.

    A number that only some pairs have is the mean over those.

    With a ceiling also `gap_closed`: how far, in percent, the mean Dice has come from where it was
    before registration (0) to where the true displacement takes it (100); NaN where there is
    nothing to gain.
    """
    if not rows:
        raise ValueError("rows is empty, expected at least one evaluated pair.")
    columns: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, (int, float)):
                columns.setdefault(key, []).append(value)
    mean = {key: float(np.mean(values)) for key, values in columns.items()}
    if "dice" in mean:
        mean["dice_sd"] = float(np.std(columns["dice"]))
    if "dice_ceiling" in mean:
        gained, possible = (mean[k] - mean["dice_before"] for k in ("dice", "dice_ceiling"))
        mean["gap_closed"] = 100 * gained / possible if possible else math.nan
    return mean


def half_interval(values: Sequence[float], level: float = 0.95) -> float:
    """How far the interval of a mean reaches to each side of it, by Student's t.

    Args:
        values: at least two, drawn independently and about normally, such as the Dice of pairs.
        level: how often such an interval holds the true mean.

    Raises:
        ValueError: fewer than two values.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"values holds {n} of them, expected two or more.")
    return float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def by_disp(find: Callable[[Tensor, Tensor], Tensor]) -> Method:
    """The method whose displacement is what `find` gives.

    Args:
        find: maps two images (1, 1, *S), moving and fixed, to a displacement (1, d, *S), voxels.
    """

    def method(moving: Tensor, fixed: Tensor) -> Registration:
        disp = find(moving, fixed)
        return Registration(warp(moving, disp), disp)

    return method


def nothing(moving: Tensor, fixed: Tensor) -> Registration:
    """The method that moves nothing: what every other one has to beat. Images (B, C, *S)."""
    still = fixed.new_zeros(len(fixed), fixed.ndim - 2, *fixed.shape[2:])
    return Registration(warp(moving, still), still)


@torch.no_grad()
def evaluate_path(
    path_of: Callable[[Tensor, Tensor], Sequence[Tensor]],
    pairs: Iterable[tuple[Subject, Subject]],
    labels: Sequence[int] | None = None,
    distances: bool = False,
    ceiling: bool = False,
) -> list[list[dict[str, Any]]]:
    """Measure each of several displacements of a pair, such as those after each stage of a network.

    Args:
        path_of: maps two (1, 1, *S) images to displacements (1, d, *S), equally many for each pair.
        pairs, labels, distances, ceiling: as of `evaluate`.

    Raises:
        ValueError: no pair, or not equally many displacements for each.

    Returns:
        For each place on the path the rows of `evaluate`; their seconds mean nothing.
    """
    pairs = list(pairs)
    paths = [path_of(moving.image[None], fixed.image[None]) for moving, fixed in pairs]
    lengths = sorted({len(path) for path in paths})
    if len(lengths) != 1:
        raise ValueError(
            f"path_of gave {lengths} displacements, expected one number for all pairs."
        )
    return [
        evaluate(_known(disps), pairs, labels, distances, ceiling)
        for disps in zip(*paths, strict=True)
    ]


def _known(disps: Sequence[Tensor]) -> Method:
    """The method that answers with these displacements, one after the other."""
    waiting = iter(disps)

    def method(moving: Tensor, fixed: Tensor) -> Registration:
        disp = next(waiting)
        return Registration(warp(moving, disp), disp)

    return method


def dice_by_label(rows: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Mean Dice of each label over the rows of `evaluate` that have it, in the labels' order."""
    seen = sorted({label for row in rows for label in row["dice_per_label"]})
    return {
        label: _finite_mean(
            torch.tensor([row["dice_per_label"].get(label, math.nan) for row in rows]).double()
        )
        for label in seen
    }


@torch.no_grad()
def landmark_errors(
    method: Method, pairs: Iterable[tuple[Subject, Subject]], device: str | torch.device = "cpu"
) -> list[dict[str, Any]]:
    """Register every (moving, fixed) pair and measure how far its landmarks end from their place.

    Args:
        method: a model, or anything that maps two (1, 1, *S) images to a `Registration`.
        pairs: with `points` that belong together row by row, at least one.
        device: where the model is.

    Returns:
        Per pair: moving, fixed (names), tre_before and tre (the mean over its landmarks, in units
        of the moving image's spacing), folding_percent. A column of `tre` is what
        `metrics.success_auc` takes.
    """
    rows = []
    for moving, fixed in pairs:
        if not len(fixed.points):
            raise ValueError(f"pairs holds {fixed.name!r} without landmarks, expected some.")
        points = fixed.points[None], moving.points[None]
        disp = method(moving.image[None].to(device), fixed.image[None].to(device)).disp.cpu()
        before, after = (
            float(metrics.tre(u, *points, moving.spacing).mean()) for u in (0 * disp, disp)
        )
        row = {"moving": moving.name, "fixed": fixed.name, "tre_before": before, "tre": after}
        rows.append(row | {"folding_percent": float(metrics.folding_percent(disp))})
    return rows


@torch.no_grad()
def motion_rows(
    method: Method,
    pairs: Sequence[RigidPair],
    device: str | torch.device = "cpu",
    batch: int = 32,
    inside: bool = False,
) -> list[dict[str, Any]]:
    """How far a rigid or affine method is from each of some known motions.

    Args:
        method: a model whose result has `theta`, or anything that maps two (B, 1, *S) images to
            such a `Registration`.
        pairs: with their truth.
        device: where the model is. batch: how many pairs it takes at a time.
        inside: also how far places inside the fixed head are off.

    Returns:
        Per pair: moving, fixed (names), rotation_error (degrees) and translation_error (voxels, at
        the centre); with `inside` endpoint_error (voxels, the mean over the voxels with a label).
    """
    rows: list[dict[str, Any]] = []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        moving, fixed = (
            torch.stack([getattr(pair, side).image for pair in part]).to(device)
            for side in ("moving", "fixed")
        )
        theta = method(moving, fixed).theta
        if theta is None:
            raise ValueError("method gave no theta, expected a rigid or affine registration.")
        truth = torch.cat([pair.theta for pair in part])
        turns = metrics.rotation_error(theta.cpu(), truth).tolist()
        shifts = metrics.translation_error(theta.cpu(), truth).tolist()
        for pair, turn, shift in zip(part, turns, shifts, strict=True):
            who = {"moving": pair.moving.name, "fixed": pair.fixed.name}
            rows.append(who | {"rotation_error": turn, "translation_error": shift})
        if inside:
            for row, pair, found in zip(rows[start:], part, theta.cpu()[:, None], strict=True):
                row["endpoint_error"] = _inside(found, pair)
    return rows


def _inside(theta: Tensor, pair: RigidPair) -> float:
    """Mean distance between where a map, (1, d, d+1), and the true one send the head, voxels."""
    shape = pair.fixed.image.shape[1:]
    found, truth = (affine_to_disp(one.float(), shape) for one in (theta, pair.theta))
    return float(metrics.endpoint_error(found, truth, pair.fixed.labels[None] > 0))


def by_descent(
    similarity: str = "ncc",
    kind: str = "rigid",
    first: Method | None = None,
    steps: int = 10,
    plain: bool = False,
) -> Method:
    """A method that looks for the rigid or affine map of each pair by `classical.fit`.

    Args:
        similarity, kind: what it makes best, and "rigid" or "affine"; see `regkit.classical.fit`.
        first: a method whose `theta` it starts from, with so many `steps` of descent at full size
            at most; by default it searches from coarse to fine, from the identity.
        plain: without `first`, descend from the identity at full size alone: the nearest top.
    """

    def method(moving: Tensor, fixed: Tensor) -> Registration:
        if first is None and plain:
            theta = classical.fit(moving, fixed, kind, similarity, search=False, levels=1)
        elif first is None:
            theta = classical.fit(moving, fixed, kind, similarity)
        else:
            start = first(moving, fixed).theta
            theta = classical.fit(
                moving, fixed, kind, similarity, start, iterations=steps, search=False, levels=1
            )
        disp = affine_to_disp(theta, fixed.shape[2:])
        return Registration(warp(moving, disp), disp, theta=theta)

    return method


def motion_errors(
    method: Method, pairs: Sequence[RigidPair], device: str | torch.device = "cpu", batch: int = 32
) -> dict[str, float]:
    """How well a rigid or affine method finds known motions, over all pairs.

    Arguments as of `motion_rows`.

    Returns:
        Medians `rotation_error` (degrees) and `translation_error` (voxels, at the centre), the
        means of both with `_mean`, and `success`: percent of the pairs with less than 0.5 of each.
    """
    return motion_summary(motion_rows(method, pairs, device, batch))


def motion_summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What `motion_errors` returns, from the rows of `motion_rows`."""
    turn, shift = (
        torch.tensor([row[key] for row in rows]) for key in ("rotation_error", "translation_error")
    )
    return {
        "rotation_error": float(turn.median()),
        "translation_error": float(shift.median()),
        "rotation_error_mean": float(turn.mean()),
        "translation_error_mean": float(shift.mean()),
        "success": 100 * float(((turn < 0.5) & (shift < 0.5)).double().mean()),
    }


def landmark_summary(
    rows: Sequence[dict[str, Any]], categories: Sequence[str] = ()
) -> dict[str, float]:
    """Means over the rows of `landmark_errors`, and the area under the success curve.

    Args:
        rows: one a pair.
        categories: of each pair; `tre` and `success_auc` of each category then have its name
            behind them.
    """
    errors = torch.tensor([row["tre"] for row in rows])
    scores = summary(rows) | {"success_auc": float(metrics.success_auc(errors))}
    for category in sorted(set(categories) - {""}):
        of_category = errors[[c == category for c in categories]]
        scores[f"tre_{category}"] = float(of_category.mean())
        scores[f"success_auc_{category}"] = float(metrics.success_auc(of_category))
    return scores
