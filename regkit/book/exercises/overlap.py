"""How well labels overlap after an answer, as several exercises ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from regkit import metrics, spatial
from regkit.data import Subject


def mean_dice(
    pairs: Sequence[tuple[Subject, Subject]],
    answer: Callable[[Subject, Subject], Tensor],
    mode: str = "nearest",
) -> float:
    """Mean Dice of labels that were warped, over pairs of a moving and a fixed subject.

    Args:
        answer: gives the displacement (1, d, *S) of a pair, in voxels.
        mode: "nearest"; or "linear", which is a mistake: names of labels are averaged and rounded.
    """
    values = []
    for moving, fixed in pairs:
        disp, labels = answer(moving, fixed), moving.labels[None]
        if mode == "nearest":
            warped = spatial.warp(labels, disp, mode="nearest")
        else:
            warped = spatial.warp(labels.float(), disp).round().to(labels.dtype)
        values.append(metrics.dice(warped, fixed.labels[None]).nanmean().item())
    return sum(values) / len(values)
