"""What a run learns from, and how it is judged: a task for each kind of pairs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from regkit.data import prepared
from regkit.data.anatomies import anatomies
from regkit.data.chest import ChestPairs, chests
from regkit.data.contrast import PaintedPairs
from regkit.data.pairs import GivenPairs, RandomPairs, chain
from regkit.data.population import population
from regkit.data.rigid import RigidPairs, moved_heads
from regkit.data.subject import Subject
from regkit.models import RegistrationModel
from regkit.training.evaluation import (
    check_labels,
    evaluate,
    labels_of,
    landmark_errors,
    motion_errors,
    summary,
)
from regkit.training.recipes import Recipe

SEEDS = {"train": 0, "validation": 1, "test": 2, "fixed": 3}  # of the embedded population
OTHER_BREATHS = 1_000_000  # the seed of those to validate with, which nobody takes to learn from
Validate = Callable[[RegistrationModel, torch.device], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """What a run learns from, and how it is judged.

    pairs: one dictionary a pair, in the order of training, `recipe.batch` of them a step: `moving`
        and `fixed` (1, *S), `name` for messages, and what the terms of the objective need.
    validate: takes the model and its device, gives the numbers of a validation.
    score: takes these numbers, gives one that is higher for a better model: it chooses
        best.safetensors.
    info: what a user of the weights should know of the images, see `models.save`.
    """

    pairs: Dataset
    validate: Validate
    score: Callable[[dict[str, float]], float]
    info: dict[str, Any]


def fitted(recipe: Recipe, data: str | os.PathLike | None) -> Recipe:
    """The recipe as it learns from the prepared set in a folder: with its name, shape and contrast.

    Any set will do whose images fit the model, whatever its name. Of a set of one contrast that is
    the one to learn from, of one of several contrasts the one that the recipe names. Everybody's
    headers are looked at, so that nobody turns out to have another shape after hours of work.

    Args:
        recipe: of the embedded population or of a prepared set.
        data: folder of the prepared set; None for the embedded population.

    Raises:
        FileNotFoundError: `data` is no prepared set, or lacks a file.
        ValueError: `data` is not given to a recipe of a prepared set; it is damaged or still being
            written; or it has not what the recipe asks for: a contrast, as many axes, people to
            learn from, labels or a known answer for a term of the objective.
    """
    if data is None:
        if recipe.data != "population":
            raise ValueError(
                f"data is not given, expected the folder of the prepared set {recipe.data!r} "
                "(see data_scripts)."
            )
        return recipe
    if recipe.painted is not None or recipe.chest is not None:
        raise ValueError(
            f"data is given and recipe {recipe.name!r} makes its own images, expected a recipe "
            "that learns from given ones, such as vxm_2d."
        )
    found = adapted(recipe, data)
    _check_people(found, prepared.complete(data))
    return found


def adapted(recipe: Recipe, data: str | os.PathLike) -> Recipe:
    """The recipe with name, shape and contrast of a prepared set; errors as of `fitted`."""
    held = prepared.complete(data)
    if held["name"] in ("", "population"):
        raise ValueError(f"data holds a set called {held['name']!r}, expected another name.")
    paired = prepared.of_pairs(held)
    contrasts = prepared.SIDES if paired else _contrasts(recipe, held["contrasts"])
    shape = prepared.check(data, contrasts)
    if len(shape) != recipe.ndim:
        raise ValueError(
            f"data holds images of shape {shape}, expected {recipe.ndim} axes as recipe "
            f"{recipe.name!r} says."
        )
    if paired and recipe.motion is not None:
        raise ValueError(
            f"data holds the set of pairs {held['name']!r}, expected one of single heads: recipe "
            f"{recipe.name!r} registers a head with itself."
        )
    changes: dict[str, Any] = {"data": held["name"], "shape": shape, "amplitude": 1.0}
    if recipe.motion is None:
        changes["contrast"] = contrasts[0]
    return replace(recipe, **changes, atlas=recipe.atlas and not paired)


def _contrasts(recipe: Recipe, there: Sequence[str]) -> Sequence[str]:
    """The contrasts of a set that a recipe looks at."""
    if recipe.motion is None:
        asked: Sequence[str] = there if len(there) == 1 else (recipe.contrast,)
    else:
        asked = recipe.motion.get("contrasts", ("t1",))
        if recipe.motion.get("scalp"):
            raise ValueError(
                "motion asks for a scalp, expected none: the set's heads are as they are."
            )
    if strange := [one for one in asked if one not in there]:
        raise ValueError(
            f"data holds the contrasts {', '.join(there)}, expected {strange[0]!r} as recipe "
            f"{recipe.name!r} says."
        )
    return tuple(dict.fromkeys(asked))


def _check_people(recipe: Recipe, held: dict[str, Any]) -> None:
    """Refuse a set with too few people to learn from, or without what the objective needs."""
    learn = [entry for entry in held["subjects"] if entry["split"] == "train"]
    fixed = any(entry["split"] == "fixed" for entry in held["subjects"])
    alone = recipe.motion is not None or prepared.of_pairs(held) or (recipe.atlas and fixed)
    if len(learn) < (least := 1 if alone else 2):
        raise ValueError(f"data holds {len(learn)} for 'train', expected at least {least}.")
    if "endpoint" in recipe.weights and recipe.motion is None:
        raise ValueError(
            f"weights names 'endpoint', expected pairs whose answer is known: nobody knows it of "
            f"the set {held['name']!r}."
        )
    bare = next((entry["name"] for entry in learn if not entry["labels"]), None)
    for term in {"dice", "segmentation"} & set(recipe.weights):
        if bare is not None:
            raise ValueError(
                f"weights names {term!r}, expected labels for everyone: {bare} has none."
            )


def task_of(recipe: Recipe, data: str | os.PathLike | None, progress: bool) -> Task:
    if recipe.motion is not None:
        return _one_head_moved(recipe, data, progress)
    if recipe.painted is not None:
        return _painted(recipe, progress)
    if recipe.chest is not None:
        return chest_task(recipe)
    if data is not None and prepared.of_pairs(prepared.description(data)):
        return _given_pairs(recipe, data)
    return _two_subjects(recipe, data, progress)


def _two_subjects(recipe: Recipe, data: str | os.PathLike | None, progress: bool) -> Task:
    """Pairs of two subjects, or of one with the fixed one; validation on other subjects."""
    learn = list(subjects(recipe, "train", recipe.subjects, data, progress))
    fixed = subjects(recipe, "fixed", 1, data)[0] if recipe.atlas else None
    pairs, labels = held_out(recipe, "validation", recipe.validation, data, progress)
    validate, score = _by_images(pairs, labels)
    length = recipe.steps * recipe.batch
    with_truth = "endpoint" in recipe.weights and recipe.data == "population"
    return Task(
        pairs=RandomPairs(learn, length, recipe.seed, recipe.gamma, fixed, with_truth),
        validate=validate,
        score=score,
        info={"spacing": learn[0].spacing, "orientation": "RAS", "range": [0, 1]},
    )


def _by_images(
    pairs: Sequence[tuple[Subject, Subject]], labels: Sequence[int] | None
) -> tuple[Validate, Callable[[dict[str, float]], float]]:
    """How to validate on pairs, and what counts: Dice, or the local correlation without labels."""
    labelled = all(labels_of(one) for pair in pairs for one in pair)
    if labelled:
        check_labels(labels, *pairs[0])
    counts = "dice" if labelled else "lncc"
    told = ("dice", "dice_before", "folding_percent") if labelled else ("lncc", "folding_percent")

    def validate(model: RegistrationModel, device: torch.device) -> dict[str, float]:
        scores = summary(evaluate(model, pairs, labels if labelled else [], device=device))
        return {key: scores[key] for key in told}

    return validate, lambda scores: scores[counts]


def subjects(
    recipe: Recipe,
    split: str,
    count: int | None = None,
    data: str | os.PathLike | None = None,
    progress: bool = False,
) -> Sequence[Subject]:
    """The subjects that a recipe means by "train", "validation", "test" or "fixed".

    Args:
        recipe: says whether they are of the embedded population or of a prepared set.
        split: one of the keys of `SEEDS`.
        count: how many of the population; at most how many of a prepared set, by default all.
        data: folder of the prepared set. A set that has nobody to validate with, or too few for a
            pair, gives those to learn from, so that a run can be watched; it then says nothing of
            other people. One that calls nobody fixed gives the first of those to learn from to a
            recipe with `atlas`, and learns from the others.
        progress: show a progress bar.

    Raises:
        ValueError: `data` is not given, or is another set, or one of another size or without
            anyone in this split.
        FileNotFoundError: `data` is no prepared set.
    """
    if recipe.data == "population":
        if data is not None:
            raise ValueError(
                f"data is given and recipe {recipe.name!r} learns from the embedded population, "
                "expected a recipe of a prepared set, such as sun2025_lpba40."
            )
        return population(
            1 if count is None else count,
            recipe.shape,
            SEEDS[split],
            amplitude=recipe.amplitude,
            contrast=recipe.contrast,
            progress=progress,
        )
    if data is None:
        raise ValueError(
            f"data is not given, expected the folder of the prepared set {recipe.data!r} "
            "(see data_scripts)."
        )
    name = prepared.description(data)["name"]
    if name != recipe.data:
        raise ValueError(f"data holds the set {name!r}, expected {recipe.data!r}.")
    found = _of_set(recipe, split, data)
    if not found:
        raise ValueError(f"data holds no one for {split!r}, expected at least one.")
    if (shape := tuple(found[0].image.shape[1:])) != tuple(recipe.shape):
        raise ValueError(
            f"data holds images of shape {shape}, expected {tuple(recipe.shape)} as the recipe "
            "says: prepare the set at another spacing, or take another budget."
        )
    return found if count is None else found[:count]


def _of_set(recipe: Recipe, split: str, data: str | os.PathLike) -> Sequence[Subject]:
    """The subjects of a prepared set that a recipe means by a split, see `subjects`."""
    found = prepared.subjects(data, recipe.contrast, split)
    least = 1 if recipe.atlas or recipe.motion is not None else 2
    if split == "validation" and len(found) < least:
        split, found = "train", prepared.subjects(data, recipe.contrast, "train")
    if recipe.atlas and not prepared.subjects(data, recipe.contrast, "fixed"):
        learn = prepared.subjects(data, recipe.contrast, "train")
        return learn[:1] if split == "fixed" else learn[1:] if split == "train" else found
    return found


def held_out(
    recipe: Recipe,
    split: str,
    count: int | None = None,
    data: str | os.PathLike | None = None,
    progress: bool = False,
) -> tuple[list[tuple[Subject, Subject]], list[int] | None]:
    """Pairs of a recipe to validate with or to test on, and which labels count (None: all).

    Each subject to the fixed one in atlas-based registration, else each to the next, of at least
    two. Arguments and errors as of `subjects`.
    """
    people = subjects(recipe, split, count, data, progress)
    labels = None if data is None else list(prepared.structures(data)) or None
    if not recipe.atlas:
        if len(people) < 2:
            raise ValueError(f"{split} holds {len(people)}, expected at least 2 to make pairs.")
        return chain(people), labels
    fixed = subjects(recipe, "fixed", 1, data)[0]
    return [(moving, fixed) for moving in people], labels


def moved_once(
    recipe: Recipe,
    split: str,
    count: int | None = None,
    length: int | None = None,
    draw: int = 0,
    data: str | os.PathLike | None = None,
    progress: bool = False,
) -> RigidPairs:
    """Pairs of one head and itself, moved as the recipe's `motion` says.

    Args:
        recipe, split, data, progress: as of `subjects`.
        count: how many heads of the population, at most how many of a prepared set, by default
            all. length: how many pairs, by default as many. draw: the seed of the motions.
    """
    motion: dict[str, Any] = {"gamma": recipe.gamma, **(recipe.motion or {})}
    if data is None:
        count = count or 1
        seed, length = SEEDS[split], length or count
        return moved_heads(count, recipe.shape, seed, length, draw, progress=progress, **motion)
    motion.pop("scalp", None)
    groups = [
        list(subjects(replace(recipe, contrast=contrast), split, count, data))
        for contrast in motion.pop("contrasts", ("t1",))
    ]
    return RigidPairs(groups, length or len(groups[0]), draw, **motion)


def _one_head_moved(recipe: Recipe, data: str | os.PathLike | None, progress: bool) -> Task:
    """A head and itself behind a known rigid motion; validation by how well that is found."""
    length, count = recipe.steps * recipe.batch, recipe.validation
    learn = moved_once(recipe, "train", recipe.subjects, length, recipe.seed, data, progress)
    tested = moved_once(recipe, "validation", count, count, 0, data, progress)

    def validate(model: RegistrationModel, device: torch.device) -> dict[str, float]:
        return motion_errors(model, [tested.pair(i) for i in range(len(tested))], device)

    return Task(
        pairs=learn,
        validate=validate,
        score=lambda scores: -scores["rotation_error"] - scores["translation_error"],
        info={
            "spacing": learn.subjects[0][0].spacing,
            "orientation": "RAS",
            "range": [0, 1],
            "motion": [learn.angle, learn.shift],
        },
    )


def _painted(recipe: Recipe, progress: bool) -> Task:
    """Pairs painted from label maps in any contrast; validation by Dice on other deformations."""
    options = dict(recipe.painted or {})
    brains = options.pop("brains", True)
    learn = anatomies(recipe.subjects, recipe.shape, 0, brains, progress)
    others = anatomies(max(6, recipe.validation), recipe.shape, 1, brains, progress)
    tested = PaintedPairs(others, recipe.shape, recipe.validation, seed=1, labels=None)

    def validate(model: RegistrationModel, device: torch.device) -> dict[str, float]:
        pairs = (tested.subjects(i) for i in range(len(tested)))
        scores = summary(evaluate(model, pairs, device=device))
        return {k: scores[k] for k in ("dice", "dice_before", "folding_percent")}

    return Task(
        pairs=PaintedPairs(
            learn, recipe.shape, recipe.steps * recipe.batch, recipe.seed, **options
        ),
        validate=validate,
        score=lambda scores: scores["dice"],
        info={
            "spacing": tested.subjects(0)[0].spacing,
            "orientation": "RAS",
            "range": [0, 1],
            "contrast": "any",
        },
    )


def chest_task(recipe: Recipe, volumes: Sequence[Subject] = ()) -> Task:
    """A task for `train`: synthetic chests before and after a breath, validation on other chests.

    Args:
        recipe: `subjects` chests to learn from, `validation` pairs of as many others; its `chest`
            says how they breathe.
        volumes: real scans to learn from as well, see `ChestPairs`.
    """
    options, d = recipe.chest or {}, recipe.ndim
    learn, others = chests(recipe.subjects, d, 0), chests(recipe.validation, d, 1)
    length = recipe.steps * recipe.batch
    tested = ChestPairs(others, recipe.shape, recipe.validation, seed=OTHER_BREATHS, **options)
    held_out = [tested.subjects(i) for i in range(recipe.validation)]

    def validate(model: RegistrationModel, device: torch.device) -> dict[str, float]:
        scores = summary(evaluate(model, held_out, device=device))
        return {k: scores[k] for k in ("dice", "dice_before", "folding_percent")}

    return Task(
        pairs=ChestPairs(learn, recipe.shape, length, recipe.seed, volumes=volumes, **options),
        validate=validate,
        score=lambda scores: scores["dice"],
        info={"spacing": tested.spacing, "orientation": "RAS", "range": [0, 1]},
    )


def _given_pairs(recipe: Recipe, data: str | os.PathLike) -> Task:
    """Pairs of a prepared set; where it has none to validate with, those to learn from serve.

    Landmarks judge where all of these have some, else labels or the images themselves.
    """
    learn = list(prepared.pairs(data, "train")[: recipe.subjects])
    tested = list(prepared.pairs(data, "validation")[: recipe.validation])
    tested = tested or learn[: recipe.validation]
    task = landmark_task(recipe, learn, tested)
    if all(len(fixed.points) for _, fixed in tested):
        return task
    validate, score = _by_images(tested, list(prepared.structures(data)) or None)
    return replace(task, validate=validate, score=score)


def landmark_task(
    recipe: Recipe,
    learn: Sequence[tuple[Subject, Subject]],
    tested: Sequence[tuple[Subject, Subject]],
) -> Task:
    """A task for `train`: pairs that belong together, judged by their landmarks.

    Args:
        recipe: says how many steps, and how many pairs each.
        learn: (moving, fixed) to learn from, such as `prepared.pairs(folder, "train")`; their
            landmarks are not looked at.
        tested: to validate with, by the mean distance of their landmarks.
    """

    def validate(model: RegistrationModel, device: torch.device) -> dict[str, float]:
        return summary(landmark_errors(model, tested, device))

    return Task(
        pairs=GivenPairs(learn, recipe.steps * recipe.batch, recipe.seed),
        validate=validate,
        score=lambda scores: -scores["tre"],
        info={"spacing": learn[0][1].spacing, "range": [0, 1]},
    )
