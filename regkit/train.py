"""One training loop for every model, on Hugging Face Accelerate: CPU, one GPU, or several.

A run in a folder leaves

    recipe.json            what was asked for
    history.json           the terms of the objective, and the validation
    last.safetensors       the weights after the last validation
    best.safetensors       the weights with the best validation
    log/                   the same numbers for `tensorboard --logdir`
    state/STEP/            what resuming needs (weights, optimiser, schedule, random states)

A run may be killed at any moment. Everything is saved after a validation, and history.json last: it
is written beside its place and moved there, and its last step names the one folder below `state/`
that counts, which gets that name afterwards. So a run goes on from the last validation that was
saved completely; on the CPU, with the same number of threads, it ends in the same weights, bit by
bit. One process at a time works in a folder. A run in which something does not go together is not
gone on with, and nothing in it is changed. What was refused before its first step leaves nothing.

`state/` is Accelerate's own folder and holds pickled random states, and a pickle may run code when
it is read. It serves to resume one's own run, and nothing else in regkit reads it: no download is
ever resumed from. Weights travel as safetensors. Never resume from a folder that somebody else
made.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from regkit import losses, models, recipes
from regkit.blocks import AVERAGE_POOL
from regkit.data import prepared
from regkit.data.anatomies import anatomies
from regkit.data.chest import ChestPairs, chests
from regkit.data.contrast import PaintedPairs
from regkit.data.pairs import GivenPairs, RandomPairs, chain
from regkit.data.population import Subject, population
from regkit.data.prepared import Scan
from regkit.data.rigid import RigidPairs, moved_heads
from regkit.device import choose_device, enough_memory
from regkit.evaluate import (
    check_labels,
    evaluate,
    labels_of,
    landmark_errors,
    motion_errors,
    summary,
)
from regkit.files import alone, check_writable, staged
from regkit.metrics import endpoint_error
from regkit.models import Registration, RegistrationModel
from regkit.recipes import Recipe, get
from regkit.spatial import integrate, resize, resize_disp, warp

SIMILARITIES = {
    "lncc": losses.lncc,
    "mse": losses.mse,
    "ncc": losses.ncc,
    "mutual_information": losses.mutual_information,
}
SEEDS = {"train": 0, "validation": 1, "test": 2, "fixed": 3}  # of the embedded population
OTHER_BREATHS = 1_000_000  # the seed of those to validate with, which nobody takes to learn from
Validate = Callable[[RegistrationModel, torch.device], dict[str, float]]
FRESH = "new-"  # before the name of a state that the history does not hold yet
MEMORY = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass(frozen=True)
class Trained:
    """What a training run gives back: the model (evaluation mode, CPU) and what happened.

    history: one dictionary a step: `step`, `loss`, each term without its weight (the label loss as
        `dice_loss`), and on validation steps its numbers: `dice`, `dice_before`, `folding_percent`.
        With several processes the mean over them.
    """

    model: RegistrationModel
    history: list[dict[str, float]]
    recipe: Recipe


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


def _task(recipe: Recipe, data: str | os.PathLike | None, progress: bool) -> Task:
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
    answers = "endpoint" in recipe.weights and recipe.data == "population"
    return Task(
        pairs=RandomPairs(learn, length, recipe.seed, recipe.gamma, fixed, answers),
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


def chest_task(recipe: Recipe, volumes: Sequence[Scan] = ()) -> Task:
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
    recipe: Recipe, learn: Sequence[tuple[Scan, Scan]], tested: Sequence[tuple[Scan, Scan]]
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


def objective(result: Registration, batch: dict[str, Any], recipe: Recipe) -> dict[str, Tensor]:
    """The terms that a recipe asks for, without their weights.

    Args:
        result: of the model on this batch.
        batch: `moving`, `fixed` (B, 1, *S), the labels for the terms "dice" and "segmentation", and
            the answer `disp` for "endpoint". A similarity compares `moving_clean` and
            `fixed_clean` where they are.
        recipe: its `weights` name the terms, `similarity`, `levels` and `bidirectional` say how.
    """
    moving, fixed, moved = batch["moving"], batch["fixed"], result.moved
    if "moving_clean" in batch:  # a similarity could not compare the images themselves
        moving, fixed = batch["moving_clean"], batch["fixed_clean"]
        moved = warp(moving, result.disp)
    similarity = SIMILARITIES[recipe.similarity]
    options = {"window": recipe.window} if recipe.similarity == "lncc" else {}
    # a cascade is asked for smooth steps: not to give back what the affine stem has found
    smooth = result.steps or (result.disp if result.svf is None else result.svf,)
    levels = _levels(result.stages, moving, moved, fixed, recipe)
    terms = {}
    for name in recipe.weights:
        if levels and name == "similarity" and not recipe.bidirectional:
            terms[name] = _sum((w, similarity(m, f, **options)) for w, m, f, _ in levels)
        elif levels and name in ("diffusion", "bending"):
            terms[name] = _sum((w, getattr(losses, name)(u)) for w, _, _, u in levels)
        elif name == "similarity":
            terms[name] = similarity(moved, fixed, **options)
            if recipe.bidirectional:
                if result.svf is None:
                    raise ValueError(
                        f"bidirectional is on for model {recipe.model!r}, expected a model with a "
                        "velocity field, such as vxm_diff: only that has an inverse."
                    )
                back = warp(fixed, integrate(-result.svf))
                terms[name] = (terms[name] + similarity(back, moving, **options)) / 2
        elif name == "diffusion":
            terms[name] = torch.stack([losses.diffusion(u) for u in smooth]).sum()
        elif name == "bending":
            terms[name] = torch.stack([losses.bending(u) for u in smooth]).sum()
        elif name == "folding":
            terms[name] = losses.folding(result.disp)
        elif name in ("determinant", "orthogonality"):
            if result.theta is None:
                raise ValueError(
                    f"weights names {name!r}, expected a model that finds an affine map, such as "
                    "rcn with affine=True."
                )
            terms[name] = getattr(losses, name)(result.theta)
        elif name == "dice":
            terms[name] = _label_loss(result.disp, batch)
        elif name == "segmentation":
            terms[name] = _segmentation_loss(result, batch)
        elif name == "endpoint":
            if "disp" not in batch:
                raise ValueError("weights names 'endpoint', expected pairs whose answer is known.")
            terms[name] = endpoint_error(result.disp, batch["disp"]).mean()
        elif name.removesuffix("_all") in ("similarity_u", "diffusion_u", "consistency"):
            terms[name] = _split(
                name, result, lambda u: similarity(warp(moving, u), fixed, **options)
            )
        else:
            raise ValueError(
                f"weights names {name!r}, expected similarity, diffusion, bending, folding, dice, "
                "segmentation, endpoint, determinant, orthogonality, similarity_u, diffusion_u or "
                "consistency."
            )
    return terms


def check_levels(recipe: Recipe, count: int) -> None:
    """Refuse weights of levels that do not fit a model with `count` of them, in one sentence."""
    if recipe.levels is not None and (len(recipe.levels) != count or not count):
        wanted = f"{count} numbers, one a level" if count else "None: it shows no levels"
        raise ValueError(
            f"levels is {tuple(recipe.levels)}, expected for the model {recipe.model!r} {wanted}."
        )


def _levels(
    stages: Sequence[Tensor], moving: Tensor, moved: Tensor, fixed: Tensor, recipe: Recipe
) -> list[tuple[float, Tensor, Tensor, Tensor]]:
    """(weight, moved, fixed, disp) of each level, the finest first, each on its own grid.

    An image is smoothed, by the mean of 3^d, before it is drawn with half as many voxels along each
    axis, (n + 1) / 2. Where n is odd, these are its every second voxel, and the grid is that on
    which a pyramid has found the level; where n is even, they lie a little further apart, and the
    displacement is interpolated.
    """
    check_levels(recipe, len(stages))
    shape = tuple(fixed.shape[2:])
    if recipe.levels and min(shape) <= (coarsest := 2 ** (len(stages) - 1)):
        raise ValueError(
            f"shape is {shape}, expected at least {coarsest + 1} voxels along each axis, so that "
            f"images can be compared on {len(stages)} levels."
        )
    levels: list[tuple[float, Tensor, Tensor, Tensor]] = []
    for weight, disp in zip(reversed(recipe.levels or ()), reversed(stages)):
        if levels:
            shape = tuple((n + 1) // 2 for n in shape)
            mean = AVERAGE_POOL[recipe.ndim](3, stride=1, padding=1, count_include_pad=False)
            moving, fixed = (resize(mean(image), shape) for image in (moving, fixed))
            disp = resize_disp(disp, shape)
            moved = warp(moving, disp)
        levels.append((weight, moved, fixed, disp))
    return levels


def _sum(weighted: Iterable[tuple[float, Tensor]]) -> Tensor:
    return torch.stack([weight * value for weight, value in weighted]).sum()


def _split(name: str, result: Registration, similarity: Callable[[Tensor], Tensor]) -> Tensor:
    """A term of Sun et al. 2025, equation 7, on the last pair (u, v), or the mean over `_all`.

    `similarity` compares the moving image warped by u with the fixed one.
    """
    pairs = result.stages if name.endswith("_all") else result.stages[-1:]
    if not all(isinstance(pair, tuple) for pair in pairs) or not pairs:
        raise ValueError(
            f"weights names {name!r}, expected a model whose stages are pairs (u, v): unfolding."
        )
    if name.startswith("consistency"):
        found = [losses.consistency(u, v) for u, v in pairs]
    else:
        measure = losses.diffusion if name.startswith("diffusion") else similarity
        found = [measure(u) for u, _ in pairs]
    return torch.stack(found).mean()


def _label_loss(disp: Tensor, batch: dict[str, Any]) -> Tensor:
    """Soft Dice of the warped labels: the semi-supervised term of VoxelMorph (TMI 2019).

    The mean over the pairs of a batch, each with its own labels, so that processes that share a
    batch follow one that has it whole.
    """
    if "moving_labels" not in batch:
        raise ValueError("weights names 'dice', expected pairs with labels.")
    terms = []
    for field, *maps in zip(disp, batch["moving_labels"], batch["fixed_labels"], strict=True):
        labels = torch.unique(torch.cat(maps))
        labels = labels[labels != 0].reshape(-1, *[1] * len(field))
        moving, fixed = ((x == labels).to(disp.dtype)[None] for x in maps)
        terms.append(losses.soft_dice(warp(moving, field[None]), fixed))
    return torch.stack(terms).mean()


def _segmentation_loss(result: Registration, batch: dict[str, Any]) -> Tensor:
    """Soft Dice of the labels that a model finds in each image for itself; others do not count."""
    if not result.logits:
        raise ValueError(
            "weights names 'segmentation', expected a model that segments, such as fcn with "
            "segment=2."
        )
    if "moving_labels" not in batch:
        raise ValueError("weights names 'segmentation', expected pairs with labels.")
    count = result.logits[0].shape[1] - 1
    there = torch.cat([batch["moving_labels"].unique(), batch["fixed_labels"].unique()])
    if not ((there > 0) & (there <= count)).any():
        raise ValueError(
            f"weights names 'segmentation' of the labels 1 to {count}, expected pairs that have "
            f"them: these have {', '.join(map(str, there.unique().tolist()[:6]))}."
        )
    terms = []
    for logits, side in zip(result.logits, ("moving", "fixed"), strict=True):
        labels = batch[f"{side}_labels"]  # (B, 1, *S)
        classes = torch.arange(1, logits.shape[1], device=labels.device)
        known = (labels == classes.reshape(1, -1, *[1] * (labels.ndim - 2))).to(logits.dtype)
        terms.append(losses.soft_dice(logits.softmax(dim=1)[:, 1:], known))
    return torch.stack(terms).mean()


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe) -> Any:
    """Factor on the learning rate at each step."""
    if recipe.schedule not in ("constant", "cosine"):
        raise ValueError(f"schedule is {recipe.schedule!r}, expected 'constant' or 'cosine'.")

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(recipe.warmup, 1))
        fall = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
        return rise * (fall if recipe.schedule == "cosine" else 1.0)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _write_json(path: Path, value: Any) -> None:
    with staged(path.parent) as folder:
        (folder / path.name).write_text(json.dumps(value, indent=1))


def _read_json(path: Path) -> Any:
    """What a file of a run holds; ValueError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(
            f"out holds a {path.name} that cannot be read, expected that of a run."
        ) from None


def train(
    recipe: Recipe | str,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
    device: str = "auto",
    start: str | os.PathLike | None = None,
    data: str | os.PathLike | None = None,
    task: Task | None = None,
) -> Trained:
    """Train a model as a recipe says, on the embedded population or on a prepared set.

    Args:
        recipe: a `Recipe`, or the name of one (then at the current budget).
        out: folder for checkpoints, history and log; without it nothing is written.
        resume: go on where the run in `out` stopped. Only in a folder of your own: it holds
            pickles, which may run code.
        progress: show a progress bar with the terms of the objective.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        start: weights to begin with, a file or the name of shipped ones, of the same model; what
            they say of their own training is kept as `started_from`.
        data: folder of a prepared set to learn from, whose name, shape and contrast then stand in
            the recipe, see `fitted`; `regkit.data.prepared` reads it.
        task: images of your own to learn from and to judge by; the recipe then says only how.

    Raises:
        ValueError: settings or data that do not fit, a folder that holds another run, a damaged one
            or one that another process works in, a state that cannot be written, or a term of the
            objective that is not finite (named, with the step and the pairs of the batch).
    """
    recipe = get(recipe) if isinstance(recipe, str) else recipe
    recipe = fitted(recipe, data) if task is None else recipe
    folder = None if out is None else Path(out)
    chosen = choose_device(device)
    _check(recipe, folder, resume, chosen)
    with _alone_in(folder):
        return _train(recipe, folder, resume, progress, chosen, start, data, task)


def _train(
    recipe: Recipe,
    folder: Path | None,
    resume: bool,
    progress: bool,
    chosen: torch.device,
    start: str | os.PathLike | None,
    data: str | os.PathLike | None,
    task: Task | None,
) -> Trained:
    """What `train` does once the folder is this process's alone."""
    plan = recipes.plan(recipe)
    if folder is not None:
        _check_run(folder, plan, resume)

    AcceleratorState._reset_state(reset_partial_state=True)  # else precision stays the first run's
    set_seed(recipe.seed)
    accelerator = Accelerator(
        cpu=chosen.type == "cpu",
        mixed_precision=recipe.precision,
        step_scheduler_with_optimizer=False,  # else once per process: the rate would fall too fast
        log_with=None if folder is None else "tensorboard",
        project_config=ProjectConfiguration(logging_dir=None if folder is None else str(folder)),
    )
    processes = accelerator.num_processes
    if recipe.batch % processes:
        raise ValueError(
            f"batch is {recipe.batch}, expected a multiple of the {processes} processes "
            "that share it."
        )
    # channels last: the same numbers from faster convolutions
    network = _network(recipe, start)
    check_levels(recipe, network.levels)
    network.to(memory_format=MEMORY[recipe.ndim])  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr)
    schedule = _schedule(optimizer, recipe)
    # nothing is left behind by settings that do not fit
    if folder is not None and not (folder / "recipe.json").is_file():
        _rehearse(network.to(accelerator.device), recipe, accelerator)

    quiet = not (progress and accelerator.is_main_process)
    with accelerator.main_process_first():  # the others then read what the first one made
        task = task or _task(recipe, data, not quiet)
    network.info |= {"recipe": plan, **task.info}
    model, optimizer, schedule = accelerator.prepare(network, optimizer, schedule)

    history = _resume(folder, accelerator) if resume and folder is not None else []
    best = _best(task, [entry for entry in history if _validates(recipe, int(entry["step"]))])
    if (
        folder is not None and accelerator.is_main_process
    ):  # nothing can be said against it any more
        _write_json(folder / "recipe.json", plan)
    done = len(history)
    if folder is not None:
        _wait_for_the_next_second(folder / "log")
        purge = {"purge_step": done + 1}  # of a run that was killed: what came after it was saved
        accelerator.init_trackers("log", init_kwargs={"tensorboard": purge})
    rest = Subset(task.pairs, range(done * recipe.batch, recipe.steps * recipe.batch))
    loader = accelerator.prepare(DataLoader(rest, batch_size=recipe.batch // processes))

    bar = tqdm(loader, total=recipe.steps, initial=done, disable=quiet, desc=recipe.name)
    model.train()
    for step, batch in enumerate(bar, start=done + 1):
        with enough_memory(_memory(recipe)):
            with accelerator.autocast():
                result = model(batch["moving"], batch["fixed"])
            terms = objective(result, batch, recipe)
            loss = torch.stack([recipe.weights[k] * v for k, v in terms.items()]).sum()
            entry = _values(accelerator, {**terms, "loss": loss}, step, batch)
            accelerator.backward(loss)
        length = accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
        if accelerator.scaler is None:  # which leaves out a step whose gradient is too large
            _values(accelerator, {"gradient": length}, step, batch)
        optimizer.step()
        shown = {**entry, "lr": schedule.get_last_lr()[0]}
        accelerator.log({f"train/{k}": v for k, v in shown.items()}, step)
        schedule.step()
        optimizer.zero_grad()
        history.append({"step": step, **entry})
        bar.set_postfix({k: f"{v:.3f}" for k, v in entry.items()}, refresh=False)
        if _validates(recipe, step):
            model.eval()
            scores = task.validate(network, accelerator.device)
            model.train()
            history[-1].update(scores)
            accelerator.log({f"validation/{k}": v for k, v in scores.items()}, step)
            if folder is not None:
                better = task.score(scores) > best
                _save(folder, accelerator, network, history, scores, better)
            best = max(best, task.score(scores))
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # autocast was for training alone
    # as a file of its weights gives it
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return Trained(network.cpu().eval(), history, recipe)


def _check(recipe: Recipe, folder: Path | None, resume: bool, device: torch.device) -> None:
    """Settings that need no model, no data and no file to be seen as wrong."""
    if recipe.similarity not in SIMILARITIES:
        raise ValueError(
            f"similarity is {recipe.similarity!r}, expected one of {', '.join(SIMILARITIES)}."
        )
    for name in ("batch", "steps", "validate_every", "validation"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name} is {getattr(recipe, name)}, expected 1 or more.")
    if not recipe.weights:
        raise ValueError("weights is empty, expected at least one term of the objective.")
    if recipe.precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"precision is {recipe.precision!r}, expected 'no', 'bf16' or 'fp16'.")
    if recipe.precision == "fp16" and device.type == "cpu":  # Accelerate would take float32
        raise ValueError("precision is 'fp16' on the CPU, expected 'no' or 'bf16' there.")
    if resume and folder is None:
        raise ValueError("resume is on and out is not given, expected the folder of the run.")


@torch.no_grad()
def _rehearse(network: RegistrationModel, recipe: Recipe, accelerator: Accelerator) -> None:
    """The objective of one pair of zeros, so that terms and sizes which do not fit are seen."""
    shape = (1, 1, *recipe.shape)
    image = torch.zeros(shape, device=accelerator.device)
    labels = torch.ones(shape, dtype=torch.int16, device=accelerator.device)
    batch = {
        "moving": image,
        "fixed": image,
        "moving_labels": labels,
        "fixed_labels": labels,
        "disp": image.expand(1, recipe.ndim, *recipe.shape),
    }
    network.eval()  # draws no random numbers
    with enough_memory(_memory(recipe)):
        with accelerator.autocast():
            result = network(image, image)
        objective(result, batch, recipe)
    network.train()


def _memory(recipe: Recipe) -> str:
    return (
        f"shape is {recipe.shape} and batch {recipe.batch}, expected a step that fits into the "
        "memory of the GPU: set save_memory=True in options (where the model has it), "
        "precision to 'bf16' or 'fp16', or make batch or shape smaller."
    )


def _network(recipe: Recipe, start: str | os.PathLike | None) -> RegistrationModel:
    """The model of a recipe, with fresh weights or with those of `start`."""
    network = models.create(recipe.model, recipe.ndim, **recipe.options)
    if start is None:
        return network
    before = models.load(start)
    if (before.name, before.ndim) != (network.name, network.ndim):
        raise ValueError(
            f"start holds weights of {before.name} in {before.ndim}D, expected those of "
            f"{network.name} in {network.ndim}D."
        )
    try:
        network.load_state_dict(before.state_dict())
    except RuntimeError:
        raise ValueError(
            f"start holds weights of {before.name} with options {before.options}, "
            f"expected {network.options}."
        ) from None
    network.info["started_from"] = before.info
    return network


def _validates(recipe: Recipe, step: int) -> bool:
    return step % recipe.validate_every == 0 or step == recipe.steps


def _values(
    accelerator: Accelerator, terms: dict[str, Tensor], step: int, batch: dict[str, Any]
) -> dict[str, float]:
    """The terms as numbers, the mean over the processes; one that is not finite ends the run.

    All processes see the same mean, so that all of them stop, with the same sentence.
    """
    values = accelerator.reduce(torch.stack([v.detach() for v in terms.values()]), "mean").tolist()
    found = {"dice_loss" if k == "dice" else k: v for k, v in zip(terms, values, strict=True)}
    for name, value in found.items():
        if not math.isfinite(value):
            what = "gradient" if name == "gradient" else f"term {name!r}"
            pairs = ", ".join(gather_object(batch["name"]))
            raise ValueError(
                f"The {what} is {value} at step {step}, expected a finite loss: lower the learning "
                f"rate, or look at the images of this batch ({pairs})."
            )
    return found


def _save(
    folder: Path,
    accelerator: Accelerator,
    network: RegistrationModel,
    history: list[dict[str, float]],
    scores: dict[str, float],
    better: bool,
) -> None:
    """Write weights and state, then the history, which makes them count.

    A state has its final name only after that. Where it cannot be written, what was saved before
    stays as it is.
    """
    step = len(history)
    fresh = folder / "state" / f"{FRESH}{step}"
    try:
        accelerator.save_state(str(fresh))
        accelerator.wait_for_everyone()  # each process writes its random states
        if accelerator.is_main_process:
            for tracker in accelerator.trackers:
                tracker.tracker.flush()  # a run killed after its last step has it in its log
            for name in ("last", "best") if better else ("last",):
                models.save(network, folder / f"{name}.safetensors", step=step, validation=scores)
            _write_json(folder / "history.json", history)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two are PyTorch's words
        shutil.rmtree(fresh, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else None
        raise ValueError(
            f"out cannot hold the state of step {step} ({reason or 'it could not be written'}), "
            "expected room on the disk: what was saved before is there, and resume=True goes on "
            "from it."
        ) from None
    if accelerator.is_main_process:
        _settle(folder, step)


def _settle(folder: Path, step: int) -> None:
    """Give the state of a step that the history holds its name, and remove every other."""
    fresh, settled = (folder / "state" / f"{kind}{step}" for kind in (FRESH, ""))
    if fresh.is_dir():
        if settled.is_dir():
            shutil.rmtree(settled)
        fresh.replace(settled)
    for other in folder.glob("state/*"):
        if other.name != settled.name:
            shutil.rmtree(other)


def _resume(folder: Path, accelerator: Accelerator) -> list[dict[str, float]]:
    """The history of the run in this folder, with its state loaded; [] if nothing was saved."""
    history = saved(folder)
    state = folder / "state" / str(len(history))
    if history:
        if not any(state.with_name(kind + state.name).is_dir() for kind in ("", FRESH)):
            raise ValueError(
                f"out is {folder.name!r}, expected the folder state/{state.name} in it, "
                "from which to go on."
            )
        models.about(folder / "last.safetensors")
        if (folder / "best.safetensors").is_file():  # images without labels choose none
            models.about(folder / "best.safetensors")
    if accelerator.is_main_process:
        _settle(folder, len(history))
    accelerator.wait_for_everyone()
    if not history:
        return []
    try:
        # PyTorch's files are zip archives with checksums; Accelerate goes on without random states
        random = state / f"random_states_{accelerator.process_index}.pkl"
        for file in {random, *state.glob("*.bin"), *state.glob("*.pkl")}:
            with zipfile.ZipFile(file) as held:
                if held.testzip() is not None:
                    raise zipfile.BadZipFile
        accelerator.load_state(str(state))
    except MemoryError:
        raise
    except Exception:  # pickle, zip, safetensors and PyTorch each have their own
        raise ValueError(
            f"out holds a state of step {state.name} that cannot be read: it is damaged or of "
            "another model, expected that of this run."
        ) from None
    return history


def saved(folder: Path) -> list[dict[str, float]]:
    """The history of the run in a folder, one dictionary a step; [] where nothing was saved yet.

    Raises:
        ValueError: it is damaged, or is not there while a state is that it should name.
    """
    file = folder / "history.json"
    steps = [int(state.name) for state in folder.glob("state/*") if state.name.isdecimal()]
    history = _read_json(file) if file.is_file() else []
    sound = isinstance(history, list) and all(
        isinstance(entry, dict)
        and entry.get("step") == number
        and all(isinstance(value, int | float) for value in entry.values())
        for number, entry in enumerate(history, 1)
    )
    if not sound or (file.is_file() and not history) or max(steps, default=0) > len(history):
        raise ValueError(
            "out holds a history.json that does not go with its states, expected one entry a step "
            "up to the last one saved; nothing was changed."
        )
    return history


def _best(task: Task, tested: Sequence[dict[str, float]]) -> float:
    """The best score of the validations of a history."""
    try:
        return max(map(task.score, tested), default=-math.inf)
    except KeyError as error:
        raise ValueError(
            f"out holds a history.json whose validations lack {error.args[0]!r}, expected that of "
            "this run."
        ) from None


def _wait_for_the_next_second(log: Path) -> None:
    """Where this log was written to in this very second: at most one second.

    TensorBoard reads the files of a log in the order of their names, which begin with the second in
    which they were made. Two of one second may be read in the wrong order, and the one of the
    killed process would then purge what the one that resumed it has written.
    """
    written = max((int(file.stat().st_mtime) for file in log.rglob("*tfevents*")), default=0)
    time.sleep(min(1.0, max(0.0, written + 1 - time.time())))


@contextmanager
def _alone_in(folder: Path | None) -> Iterator[None]:
    """Work in the run's folder while no other process does; a new one that stays empty goes again.

    Of several processes that share one run, the first holds the folder for all.
    """
    if folder is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    check_writable(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with alone(folder, "out", 0, "run"):
            yield
    finally:
        with suppress(OSError):  # as soon as something is in it
            for place in made:
                place.rmdir()


def _check_run(folder: Path, plan: dict[str, Any], resume: bool) -> None:
    """Make sure that a folder holds this run, if it holds one: something was saved there."""
    held = folder / "recipe.json"
    if not (folder / "history.json").exists() and not any(folder.glob("state/*")):
        return
    if not resume:
        raise ValueError(f"out is {folder.name!r}, which holds a run: expected resume=True.")
    if not held.is_file():
        raise ValueError(f"out is {folder.name!r}, which holds a run without its recipe.json.")
    recipe = _read_json(held)
    if not isinstance(recipe, dict) or recipes.complete(recipe) != plan:
        raise ValueError(f"out is {folder.name!r}, which holds a run of another recipe.")
    saved(folder)
