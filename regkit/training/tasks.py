"""What a run learns from, and how it is judged: one class for each kind of pairs.

    SubjectsTask     two subjects, of the embedded population or of a prepared set
    RigidTask        one head twice, behind a known motion
    PaintedTask      two label maps painted in any contrast
    ChestTask        a synthetic chest before and after a breath
    GivenPairsTask   pairs that belong together, judged by labels or by the images
    LandmarkTask     the same, judged by landmarks

`train(recipe, task=...)` takes any object that has what `Task` says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from regkit.data import Subject, prepared
from regkit.data.anatomies import anatomies
from regkit.data.chest import ChestPairs, chests
from regkit.data.contrast import PaintedPairs
from regkit.data.pairs import GivenPairs, RandomPairs
from regkit.models import RegistrationModel
from regkit.training.data import evaluation_pairs, rigid_pairs, subjects
from regkit.training.evaluation import (
    check_labels,
    evaluate,
    labels_of,
    landmark_errors,
    motion_errors,
    summary,
)
from regkit.training.recipes import Recipe

OTHER_BREATHS = 1_000_000  # the seed of those to validate with, which nobody takes to learn from


class Task(Protocol):
    """What a run learns from, and how it is judged."""

    @property
    def pairs(self) -> Dataset[Any]:
        """One dictionary a pair, in the order of training, `recipe.batch` of them a step.

        `moving` and `fixed` (1, *S), `name` for messages, and what the terms of the objective need.
        """
        ...

    @property
    def info(self) -> Mapping[str, Any]:
        """What a user of the weights should know of the images, see `models.save`."""
        ...

    def validate(self, model: RegistrationModel, device: torch.device) -> dict[str, float]:
        """The numbers of a validation, of a model on `device`."""
        ...

    def score(self, scores: dict[str, float]) -> float:
        """One number from these, higher for a better model: it chooses best.safetensors."""
        ...


def task_of(recipe: Recipe, data: str | os.PathLike[str] | None, progress: bool) -> Task:
    """The task that a recipe names."""
    if recipe.motion is not None:
        return RigidTask(recipe, data, progress)
    if recipe.painted is not None:
        return PaintedTask(recipe, progress)
    if recipe.chest is not None:
        return ChestTask(recipe)
    if data is not None and prepared.of_pairs(prepared.description(data)):
        return _of_given_pairs(recipe, data)
    return SubjectsTask(recipe, data, progress)


def _of_given_pairs(recipe: Recipe, data: str | os.PathLike[str]) -> Task:
    """Pairs of a prepared set; where it has none to validate with, those to learn from serve.

    Landmarks judge where all of these have some, else labels or the images themselves.
    """
    learn = list(prepared.pairs(data, "train")[: recipe.subjects])
    tested = list(prepared.pairs(data, "validation")[: recipe.validation])
    tested = tested or learn[: recipe.validation]
    if all(len(fixed.points) for _, fixed in tested):
        return LandmarkTask(recipe, learn, tested)
    return GivenPairsTask(recipe, learn, tested, list(prepared.structures(data)) or None)


def _dice(
    model: RegistrationModel, pairs: Iterable[tuple[Subject, Subject]], device: torch.device
) -> dict[str, float]:
    scores = summary(evaluate(model, pairs, device=device))
    return {name: scores[name] for name in ("dice", "dice_before", "folding_percent")}


class _JudgedByImages:
    """Validation on pairs by Dice, or by the local correlation where some have no labels.

    labels: which count, None for all.
    """

    def __init__(
        self, tested: Sequence[tuple[Subject, Subject]], labels: Sequence[int] | None
    ) -> None:
        self.tested = tested
        if all(labels_of(subject) for pair in tested for subject in pair):
            check_labels(labels, *tested[0])
            self.labels = labels
            self.names: tuple[str, ...] = ("dice", "dice_before", "folding_percent")
        else:
            self.labels = []
            self.names = ("lncc", "folding_percent")

    def validate(self, model: RegistrationModel, device: torch.device) -> dict[str, float]:
        scores = summary(evaluate(model, self.tested, self.labels, device=device))
        return {name: scores[name] for name in self.names}

    def score(self, scores: dict[str, float]) -> float:
        return scores[self.names[0]]


class SubjectsTask(_JudgedByImages):
    """Pairs of two subjects, or of one with the fixed one; validation on other subjects.

    They are of the embedded population, or of the prepared set in the folder `data`.
    """

    def __init__(
        self, recipe: Recipe, data: str | os.PathLike[str] | None = None, progress: bool = False
    ) -> None:
        learn = list(subjects(recipe, "train", recipe.subjects, data, progress))
        fixed = subjects(recipe, "fixed", 1, data)[0] if recipe.atlas else None
        tested, labels = evaluation_pairs(recipe, "validation", recipe.validation, data, progress)
        super().__init__(tested, labels)
        length = recipe.steps * recipe.batch
        with_truth = "endpoint" in recipe.weights and recipe.data == "population"
        self.pairs = RandomPairs(learn, length, recipe.seed, recipe.gamma, fixed, with_truth)
        self.info = {"spacing": learn[0].spacing, "orientation": "RAS", "range": [0, 1]}


class RigidTask:
    """A head and itself behind a known rigid motion; validation by how well that is found."""

    def __init__(
        self, recipe: Recipe, data: str | os.PathLike[str] | None = None, progress: bool = False
    ) -> None:
        length, count = recipe.steps * recipe.batch, recipe.validation
        learn = rigid_pairs(recipe, "train", recipe.subjects, length, recipe.seed, data, progress)
        self.pairs = learn
        self.tested = rigid_pairs(recipe, "validation", count, count, 0, data, progress)
        self.info = {
            "spacing": learn.subjects[0][0].spacing,
            "orientation": "RAS",
            "range": [0, 1],
            "motion": [learn.angle, learn.shift],
        }

    def validate(self, model: RegistrationModel, device: torch.device) -> dict[str, float]:
        """See `Task`."""
        return motion_errors(model, self.tested.pairs(), device)

    def score(self, scores: dict[str, float]) -> float:
        """See `Task`."""
        return -scores["rotation_error"] - scores["translation_error"]


class PaintedTask:
    """Pairs painted from label maps in any contrast; validation by Dice on other deformations."""

    def __init__(self, recipe: Recipe, progress: bool = False) -> None:
        options = dict(recipe.painted or {})
        brains = options.pop("brains", True)
        shape, length = recipe.shape, recipe.steps * recipe.batch
        learn = anatomies(recipe.subjects, shape, 0, brains, progress)
        others = anatomies(max(6, recipe.validation), shape, 1, brains, progress)
        self.tested = PaintedPairs(others, shape, recipe.validation, seed=1, labels=None)
        self.pairs = PaintedPairs(learn, shape, length, recipe.seed, **options)
        self.info = {
            "spacing": self.tested.subjects(0)[0].spacing,
            "orientation": "RAS",
            "range": [0, 1],
            "contrast": "any",
        }

    def validate(self, model: RegistrationModel, device: torch.device) -> dict[str, float]:
        """See `Task`."""
        return _dice(model, (self.tested.subjects(i) for i in range(len(self.tested))), device)

    def score(self, scores: dict[str, float]) -> float:
        """See `Task`."""
        return scores["dice"]


class ChestTask:
    """Synthetic chests before and after a breath; validation by Dice on other chests.

    Args:
        recipe: `subjects` chests to learn from, `validation` pairs of as many others; its `chest`
            says how they breathe.
        volumes: real scans to learn from as well, see `ChestPairs`.
    """

    def __init__(self, recipe: Recipe, volumes: Sequence[Subject] = ()) -> None:
        options, shape, count = recipe.chest or {}, recipe.shape, recipe.validation
        learn, others = chests(recipe.subjects, recipe.ndim, 0), chests(count, recipe.ndim, 1)
        length = recipe.steps * recipe.batch
        breaths = ChestPairs(others, shape, count, seed=OTHER_BREATHS, **options)
        self.tested = [breaths.subjects(i) for i in range(count)]
        self.pairs = ChestPairs(learn, shape, length, recipe.seed, volumes=volumes, **options)
        self.info = {"spacing": breaths.spacing, "orientation": "RAS", "range": [0, 1]}

    def validate(self, model: RegistrationModel, device: torch.device) -> dict[str, float]:
        """See `Task`."""
        return _dice(model, self.tested, device)

    def score(self, scores: dict[str, float]) -> float:
        """See `Task`."""
        return scores["dice"]


class GivenPairsTask(_JudgedByImages):
    """Pairs that belong together, judged by labels or by the images themselves.

    Args:
        recipe: says how many steps, and how many pairs each.
        learn: (moving, fixed) to learn from, such as `prepared.pairs(folder, "train")`.
        tested: to validate with.
        labels: which count, None for all.
    """

    def __init__(
        self,
        recipe: Recipe,
        learn: Sequence[tuple[Subject, Subject]],
        tested: Sequence[tuple[Subject, Subject]],
        labels: Sequence[int] | None = None,
    ) -> None:
        super().__init__(tested, labels)
        self.pairs = GivenPairs(learn, recipe.steps * recipe.batch, recipe.seed)
        self.info = {"spacing": learn[0][1].spacing, "range": [0, 1]}


class LandmarkTask:
    """Pairs that belong together, judged by their landmarks.

    Args:
        recipe: says how many steps, and how many pairs each.
        learn: (moving, fixed) to learn from, such as `prepared.pairs(folder, "train")`; their
            landmarks are not looked at.
        tested: to validate with, by the mean distance of their landmarks.
    """

    def __init__(
        self,
        recipe: Recipe,
        learn: Sequence[tuple[Subject, Subject]],
        tested: Sequence[tuple[Subject, Subject]],
    ) -> None:
        self.tested = tested
        self.pairs = GivenPairs(learn, recipe.steps * recipe.batch, recipe.seed)
        self.info = {"spacing": learn[0][1].spacing, "range": [0, 1]}

    def validate(self, model: RegistrationModel, device: torch.device) -> dict[str, float]:
        """See `Task`."""
        return summary(landmark_errors(model, self.tested, device))

    def score(self, scores: dict[str, float]) -> float:
        """See `Task`."""
        return -scores["tre"]
