"""Pairs of images to learn from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from regkit.data.cache import place_of
from regkit.data.population import true_displacement
from regkit.data.subject import Subject


class RandomPairs(Dataset[dict[str, Tensor | str]]):
    """Two different subjects at a time, drawn at random but the same for the same (seed, index).

    With `fixed`, one subject at a time, and the same fixed one in each pair. Every subject then
    comes once before any comes again, in another order each time: that is an epoch.

    Because an index names its pair, a run that was stopped goes on with the pairs it had not seen.

    Args:
        subjects: at least two, all of one shape.
        length: how many pairs there are.
        seed: of the draw.
        gamma: change the contrast of each image at random, x -> x^g with |log g| <= gamma, so that
            a network does not get used to one scanner. Images in [0, 1] stay there.
        fixed: of every pair, for atlas-based registration; one subject to move is then enough.
        with_truth: items also hold `disp` (d, *S), the true displacement in voxels, which the
            embedded population knows.

    Each item is a dictionary of `moving`, `fixed`, `moving_labels` and `fixed_labels`, (1, *S), and
    `name`, which says whose they are.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        length: int,
        seed: int = 0,
        gamma: float = 0.0,
        fixed: Subject | None = None,
        with_truth: bool = False,
    ):
        least = 2 if fixed is None else 1
        if len(subjects) < least:
            raise ValueError(
                f"subjects holds {len(subjects)}, expected at least {least} to make pairs."
            )
        self.subjects, self.length, self.seed, self.gamma = subjects, length, seed, gamma
        self.fixed, self.with_truth = fixed, with_truth

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        index = place_of(index, self)
        random = np.random.default_rng([self.seed, index])
        if self.fixed is None:
            first, second = random.choice(len(self.subjects), 2, replace=False)
            moving, fixed = self.subjects[first], self.subjects[second]
        else:
            epoch, place = divmod(index, len(self.subjects))
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.subjects))
            moving, fixed = self.subjects[order[place]], self.fixed
        powers = np.exp(random.uniform(-self.gamma, self.gamma, 2))
        item: dict[str, Tensor | str] = {
            "moving": moving.image ** powers[0],
            "fixed": fixed.image ** powers[1],
            "moving_labels": moving.labels,
            "fixed_labels": fixed.labels,
            "name": f"{moving.name} to {fixed.name}",
        }
        if self.with_truth:
            item["disp"] = true_displacement(moving, fixed)[0]
        return item


class GivenPairs(Dataset[dict[str, Tensor | str]]):
    """Pairs that belong together, such as two photographs of one eye.

    Every pair comes once before any comes again, in another order each time: that is an epoch.

    Args:
        pairs: (moving, fixed), at least one, all of one shape.
        length: how many there are to learn from, over all epochs.
        seed: of the order.

    Each item is a dictionary as of `RandomPairs`.
    """

    def __init__(self, pairs: Sequence[tuple[Subject, Subject]], length: int, seed: int = 0):
        if not pairs:
            raise ValueError("pairs is empty, expected at least one pair.")
        self.pairs, self.length, self.seed = pairs, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        index = place_of(index, self)
        epoch, place = divmod(index, len(self.pairs))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))
        moving, fixed = self.pairs[order[place]]
        return {
            "moving": moving.image,
            "fixed": fixed.image,
            "moving_labels": moving.labels,
            "fixed_labels": fixed.labels,
            "name": f"{moving.name} to {fixed.name}",
        }


def chain(subjects: Sequence[Subject]) -> list[tuple[Subject, Subject]]:
    """Fixed pairs for validation and test: each subject is registered to the next, the last one to
    the first, so that every subject is once moving and once fixed."""
    return list(zip(subjects, [*subjects[1:], subjects[0]], strict=True))
