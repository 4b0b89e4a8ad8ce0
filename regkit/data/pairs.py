"""Pairs of images to learn from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from regkit.data.population import Subject


class RandomPairs(Dataset):
    """Two different subjects at a time, drawn at random but the same for the same (seed, index).

    Because an index names its pair, a run that was stopped goes on with the pairs it had not seen.

    Args:
        subjects: at least two, all of one shape.
        length: how many pairs there are.
        seed: of the draw.
        flip: mirror a pair along axis 0 (left and right) half of the time. Labels are then left
            out: a mirrored left label is not a right one.

    Each item is a dictionary of `moving` and `fixed`, (1, *S), and without `flip` also
    `moving_labels` and `fixed_labels`, (1, *S).
    """

    def __init__(self, subjects: Sequence[Subject], length: int, seed: int = 0, flip: bool = False):
        if len(subjects) < 2:
            raise ValueError(f"subjects holds {len(subjects)}, expected at least 2 to make pairs.")
        self.subjects, self.length, self.seed, self.flip = subjects, length, seed, flip

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = np.random.default_rng([self.seed, index])
        first, second = random.choice(len(self.subjects), 2, replace=False)
        moving, fixed = self.subjects[first], self.subjects[second]
        if self.flip:
            axes = [1] if random.random() < 0.5 else []
            return {"moving": moving.image.flip(axes), "fixed": fixed.image.flip(axes)}
        return {
            "moving": moving.image,
            "fixed": fixed.image,
            "moving_labels": moving.labels,
            "fixed_labels": fixed.labels,
        }


def chain(subjects: Sequence[Subject]) -> list[tuple[Subject, Subject]]:
    """Fixed pairs for validation and test: each subject is registered to the next, the last one to
    the first, so that every subject is once moving and once fixed."""
    return list(zip(subjects, [*subjects[1:], subjects[0]], strict=True))
