"""The images that a recipe asks for: of the embedded population, or of a prepared set.

`fitted` and `adapted` set a recipe up for a prepared set and refuse one that it cannot learn from;
`subjects`, `evaluation_pairs` and `rigid_pairs` give its images and pairs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from regkit.data import Subject, prepared
from regkit.data.pairs import chain
from regkit.data.population import population
from regkit.data.rigid import RigidPairs, moved_heads
from regkit.training.recipes import Recipe

SEEDS = {"train": 0, "validation": 1, "test": 2, "fixed": 3}  # of the embedded population


# --- a recipe for a prepared set ----------------------------------------------------------------


def fitted(recipe: Recipe, data: str | os.PathLike[str] | None) -> Recipe:
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
            raise _not_given(recipe)
        return recipe
    if recipe.painted is not None or recipe.chest is not None:
        raise ValueError(
            f"data is given and recipe {recipe.name!r} makes its own images, expected a recipe "
            "that learns from given ones, such as vxm_2d."
        )
    recipe = adapted(recipe, data)
    _check_people(recipe, prepared.complete(data))
    return recipe


def adapted(recipe: Recipe, data: str | os.PathLike[str]) -> Recipe:
    """The recipe with name, shape and contrast of a prepared set; errors as of `fitted`."""
    description = prepared.complete(data)
    name = description["name"]
    if name in ("", "population"):
        raise ValueError(f"data holds a set called {name!r}, expected another name.")
    of_pairs = prepared.of_pairs(description)
    contrasts = prepared.SIDES if of_pairs else _contrasts(recipe, description["contrasts"])
    shape = prepared.check(data, contrasts)
    if len(shape) != recipe.ndim:
        raise ValueError(
            f"data holds images of shape {shape}, expected {recipe.ndim} axes as recipe "
            f"{recipe.name!r} says."
        )
    if of_pairs and recipe.motion is not None:
        raise ValueError(
            f"data holds the set of pairs {name!r}, expected one of single heads: recipe "
            f"{recipe.name!r} registers a head with itself."
        )
    changes: dict[str, Any] = {"data": name, "shape": shape, "amplitude": 1.0}
    if recipe.motion is None:
        changes["contrast"] = contrasts[0]
    return replace(recipe, **changes, atlas=recipe.atlas and not of_pairs)


def _not_given(recipe: Recipe) -> ValueError:
    return ValueError(
        f"data is not given, expected the folder of the prepared set {recipe.data!r} "
        "(see data_scripts)."
    )


def _contrasts(recipe: Recipe, available: Sequence[str]) -> Sequence[str]:
    """The contrasts of a set that a recipe looks at."""
    if recipe.motion is None:
        wanted: Sequence[str] = available if len(available) == 1 else (recipe.contrast,)
    else:
        wanted = recipe.motion.get("contrasts", ("t1",))
        if recipe.motion.get("scalp"):
            raise ValueError(
                "motion asks for a scalp, expected none: the set's heads are as they are."
            )
    if missing := [contrast for contrast in wanted if contrast not in available]:
        raise ValueError(
            f"data holds the contrasts {', '.join(available)}, expected {missing[0]!r} as recipe "
            f"{recipe.name!r} says."
        )
    return tuple(dict.fromkeys(wanted))


def _check_people(recipe: Recipe, description: dict[str, Any]) -> None:
    """Refuse a set with too few people to learn from, or without what the objective needs."""
    learn = [entry for entry in description["subjects"] if entry["split"] == "train"]
    has_fixed = any(entry["split"] == "fixed" for entry in description["subjects"])
    one_is_enough = (
        recipe.motion is not None or prepared.of_pairs(description) or (recipe.atlas and has_fixed)
    )
    if len(learn) < (least := 1 if one_is_enough else 2):
        raise ValueError(f"data holds {len(learn)} for 'train', expected at least {least}.")
    if "endpoint" in recipe.weights and recipe.motion is None:
        raise ValueError(
            f"weights names 'endpoint', expected pairs whose answer is known: nobody knows it of "
            f"the set {description['name']!r}."
        )
    unlabelled = next((entry["name"] for entry in learn if not entry["labels"]), None)
    for term in {"dice", "segmentation"} & set(recipe.weights):
        if unlabelled is not None:
            raise ValueError(
                f"weights names {term!r}, expected labels for everyone: {unlabelled} has none."
            )


# --- its subjects and pairs ---------------------------------------------------------------------


def subjects(
    recipe: Recipe,
    split: str,
    count: int | None = None,
    data: str | os.PathLike[str] | None = None,
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
        raise _not_given(recipe)
    name = prepared.description(data)["name"]
    if name != recipe.data:
        raise ValueError(f"data holds the set {name!r}, expected {recipe.data!r}.")
    people = _of_set(recipe, split, data)
    if not people:
        raise ValueError(f"data holds no one for {split!r}, expected at least one.")
    if (shape := tuple(people[0].image.shape[1:])) != tuple(recipe.shape):
        raise ValueError(
            f"data holds images of shape {shape}, expected {tuple(recipe.shape)} as the recipe "
            "says: prepare the set at another spacing, or take another budget."
        )
    return people if count is None else people[:count]


def _of_set(recipe: Recipe, split: str, data: str | os.PathLike[str]) -> Sequence[Subject]:
    """The subjects of a prepared set that a recipe means by a split, see `subjects`."""
    people = prepared.subjects(data, recipe.contrast, split)
    least = 1 if recipe.atlas or recipe.motion is not None else 2
    if split == "validation" and len(people) < least:
        split, people = "train", prepared.subjects(data, recipe.contrast, "train")
    if recipe.atlas and not prepared.subjects(data, recipe.contrast, "fixed"):
        learn = prepared.subjects(data, recipe.contrast, "train")
        return learn[:1] if split == "fixed" else learn[1:] if split == "train" else people
    return people


def evaluation_pairs(
    recipe: Recipe,
    split: str,
    count: int | None = None,
    data: str | os.PathLike[str] | None = None,
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


def rigid_pairs(
    recipe: Recipe,
    split: str,
    count: int | None = None,
    length: int | None = None,
    draw: int = 0,
    data: str | os.PathLike[str] | None = None,
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
