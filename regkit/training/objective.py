"""What training minimises: `TERMS`, a table of the terms that a recipe may name in `weights`.

A term is a function of `Inputs`, that is, of a batch and of what the model made of it. To add one,
write the function and give it a name in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regkit import losses
from regkit.blocks import AVERAGE_POOL
from regkit.metrics import endpoint_error
from regkit.models import Registration
from regkit.spatial import integrate, resize, resize_disp, warp
from regkit.training.recipes import Recipe

SIMILARITIES: dict[str, Callable[..., Tensor]] = {
    "lncc": losses.lncc,
    "mse": losses.mse,
    "ncc": losses.ncc,
    "mutual_information": losses.mutual_information,
}


def objective(result: Registration, batch: dict[str, Any], recipe: Recipe) -> dict[str, Tensor]:
    """The terms that a recipe asks for, without their weights.

    Args:
        result: of the model on this batch.
        batch: `moving`, `fixed` (B, 1, *S), the labels for the terms "dice" and "segmentation", and
            the answer `disp` for "endpoint". A similarity compares `moving_clean` and
            `fixed_clean` where they are.
        recipe: its `weights` name the terms, `similarity`, `levels` and `bidirectional` say how.

    Raises:
        ValueError: a term that is unknown, or that this model or these pairs do not have.
    """
    inputs = Inputs.of(result, batch, recipe)
    return {name: _term(name)(inputs) for name in recipe.weights}


@dataclass(frozen=True)
class Level:
    """One level of a coarse-to-fine model: images and displacement on its grid, and its weight."""

    weight: float
    moved: Tensor
    fixed: Tensor
    disp: Tensor


@dataclass(frozen=True)
class Inputs:
    """What a term may look at.

    moving, fixed, moved: the images that a similarity compares.
    levels: of a recipe with `levels`, the finest first.
    """

    result: Registration
    batch: dict[str, Any]
    recipe: Recipe
    moving: Tensor
    fixed: Tensor
    moved: Tensor
    levels: list[Level]

    @staticmethod
    def of(result: Registration, batch: dict[str, Any], recipe: Recipe) -> Inputs:
        """From a batch, what the model made of it, and the recipe."""
        moving, fixed, moved = batch["moving"], batch["fixed"], result.moved
        if "moving_clean" in batch:  # a similarity could not compare the images themselves
            moving, fixed = batch["moving_clean"], batch["fixed_clean"]
            moved = warp(moving, result.disp)
        levels = _levels(result.stages, moving, moved, fixed, recipe)
        return Inputs(result, batch, recipe, moving, fixed, moved, levels)

    def compare(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """The similarity of the recipe."""
        options = {"window": self.recipe.window} if self.recipe.similarity == "lncc" else {}
        return SIMILARITIES[self.recipe.similarity](moved, fixed, **options)


# --- the images ---------------------------------------------------------------------------------


def similarity(x: Inputs) -> Tensor:
    """Of the moved and the fixed image: the sum over levels, or the mean of both directions.

    The inverse of the exponential of a velocity field is the exponential of its negative (Dalca et
    al., Medical Image Analysis 2019).
    """
    if x.levels and not x.recipe.bidirectional:
        return torch.stack(
            [level.weight * x.compare(level.moved, level.fixed) for level in x.levels]
        ).sum()
    forward = x.compare(x.moved, x.fixed)
    if not x.recipe.bidirectional:
        return forward
    if x.result.svf is None:
        raise ValueError(
            f"bidirectional is on for model {x.recipe.model!r}, expected a model with a "
            "velocity field, such as vxm_diff: only that has an inverse."
        )
    back = warp(x.fixed, integrate(-x.result.svf))
    return (forward + x.compare(back, x.moving)) / 2


# --- the displacement ---------------------------------------------------------------------------


def smoothness(measure: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Tensor]:
    """A term that sums `measure` over the levels, else over the steps of a cascade."""

    def term(x: Inputs) -> Tensor:
        if x.levels:
            return torch.stack([level.weight * measure(level.disp) for level in x.levels]).sum()
        whole = x.result.disp if x.result.svf is None else x.result.svf
        # a cascade is asked for smooth steps: not to give back what the affine stem has found
        return torch.stack([measure(field) for field in x.result.steps or (whole,)]).sum()

    return term


def folding(x: Inputs) -> Tensor:
    """What folds, see `regkit.losses.folding`."""
    return losses.folding(x.result.disp)


def endpoint(x: Inputs) -> Tensor:
    """Mean distance from the true displacement, in voxels."""
    if "disp" not in x.batch:
        raise ValueError("weights names 'endpoint', expected pairs whose answer is known.")
    return endpoint_error(x.result.disp, x.batch["disp"]).mean()


# --- the affine map -----------------------------------------------------------------------------


def of_affine_map(name: str, measure: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Tensor]:
    """A term that keeps an affine map near a rotation (Zhao et al., IEEE JBHI 2020)."""

    def term(x: Inputs) -> Tensor:
        if x.result.theta is None:
            raise ValueError(
                f"weights names {name!r}, expected a model that finds an affine map, such as "
                "rcn with affine=True."
            )
        return measure(x.result.theta)

    return term


# --- labels -------------------------------------------------------------------------------------


def label_loss(x: Inputs) -> Tensor:
    """Soft Dice of the warped labels: the semi-supervised term of VoxelMorph (TMI 2019).

    The mean over the pairs of a batch, each with its own labels, so that processes that share a
    batch follow one that has it whole.
    """
    if "moving_labels" not in x.batch:
        raise ValueError("weights names 'dice', expected pairs with labels.")
    terms = []
    sides = x.batch["moving_labels"], x.batch["fixed_labels"]
    for disp, *maps in zip(x.result.disp, *sides, strict=True):
        labels = torch.unique(torch.cat(maps))
        labels = labels[labels != 0].reshape(-1, *[1] * len(disp))
        moving, fixed = ((labels_map == labels).to(disp.dtype)[None] for labels_map in maps)
        terms.append(losses.soft_dice(warp(moving, disp[None]), fixed))
    return torch.stack(terms).mean()


def segmentation(x: Inputs) -> Tensor:
    """Soft Dice of the labels that a model finds in each image for itself; others do not count."""
    if not x.result.logits:
        raise ValueError(
            "weights names 'segmentation', expected a model that segments, such as fcn with "
            "segment=2."
        )
    if "moving_labels" not in x.batch:
        raise ValueError("weights names 'segmentation', expected pairs with labels.")
    count = x.result.logits[0].shape[1] - 1
    values = torch.cat([torch.unique(x.batch[f"{side}_labels"]) for side in ("moving", "fixed")])
    if not ((values > 0) & (values <= count)).any():
        raise ValueError(
            f"weights names 'segmentation' of the labels 1 to {count}, expected pairs that have "
            f"them: these have {', '.join(map(str, torch.unique(values).tolist()[:6]))}."
        )
    terms = []
    for logits, side in zip(x.result.logits, ("moving", "fixed"), strict=True):
        labels = x.batch[f"{side}_labels"]  # (B, 1, *S)
        classes = torch.arange(1, logits.shape[1], device=labels.device)
        target = (labels == classes.reshape(1, -1, *[1] * (labels.ndim - 2))).to(logits.dtype)
        terms.append(losses.soft_dice(logits.softmax(dim=1)[:, 1:], target))
    return torch.stack(terms).mean()


# --- the pairs (u, v) of an unfolding model: Sun et al. 2025, equation 7 ------------------------

OfPair = Callable[[Inputs, Tensor, Tensor], Tensor]


def similarity_u(x: Inputs, u: Tensor, v: Tensor) -> Tensor:
    """Of the moving image warped by u and the fixed one: weight lambda1 of equation 7."""
    return x.compare(warp(x.moving, u), x.fixed)


def diffusion_u(x: Inputs, u: Tensor, v: Tensor) -> Tensor:
    """Smoothness of u: weight lambda2 of equation 7."""
    return losses.diffusion(u)


def consistency(x: Inputs, u: Tensor, v: Tensor) -> Tensor:
    """Distance of u and v: weight lambda3 of equation 7."""
    return losses.consistency(u, v)


def of_stages(name: str, measure: OfPair) -> Callable[[Inputs], Tensor]:
    """A term on the pair of the last stage; with "_all" in its name the mean over all stages."""

    def term(x: Inputs) -> Tensor:
        pairs = x.result.stages if name.endswith("_all") else x.result.stages[-1:]
        if not all(isinstance(pair, tuple) for pair in pairs) or not pairs:
            raise ValueError(
                f"weights names {name!r}, expected a model whose stages are pairs (u, v): "
                "unfolding."
            )
        return torch.stack([measure(x, u, v) for u, v in pairs]).mean()

    return term


# --- the table: `regkit.losses` has the equation and the source of each measure -----------------

OF_PAIR: dict[str, OfPair] = {
    "similarity_u": similarity_u,
    "diffusion_u": diffusion_u,
    "consistency": consistency,
}
TERMS: dict[str, Callable[[Inputs], Tensor]] = {
    "similarity": similarity,
    "diffusion": smoothness(losses.diffusion),
    "bending": smoothness(losses.bending),
    "folding": folding,
    "dice": label_loss,
    "segmentation": segmentation,
    "endpoint": endpoint,
    "determinant": of_affine_map("determinant", losses.determinant),
    "orthogonality": of_affine_map("orthogonality", losses.orthogonality),
}
TERMS |= {name: of_stages(name, measure) for name, measure in OF_PAIR.items()}
TERMS |= {f"{name}_all": of_stages(f"{name}_all", measure) for name, measure in OF_PAIR.items()}


def _term(name: str) -> Callable[[Inputs], Tensor]:
    if name not in TERMS:
        *names, last = (term for term in TERMS if not term.endswith("_all"))
        raise ValueError(f"weights names {name!r}, expected {', '.join(names)} or {last}.")
    return TERMS[name]


# --- levels -------------------------------------------------------------------------------------


def check_levels(recipe: Recipe, count: int) -> None:
    """Refuse weights of levels that do not fit a model with `count` of them, in one sentence."""
    if recipe.levels is not None and (len(recipe.levels) != count or not count):
        wanted = f"{count} numbers, one a level" if count else "None: it shows no levels"
        raise ValueError(
            f"levels is {tuple(recipe.levels)}, expected for the model {recipe.model!r} {wanted}."
        )


def _levels(
    stages: Sequence[Tensor], moving: Tensor, moved: Tensor, fixed: Tensor, recipe: Recipe
) -> list[Level]:
    """The levels that the recipe has weights for, the finest first, each on its own grid.

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
    levels: list[Level] = []
    for weight, disp in zip(reversed(recipe.levels or ()), reversed(stages)):
        if levels:
            shape = tuple((n + 1) // 2 for n in shape)
            mean = AVERAGE_POOL[recipe.ndim](3, stride=1, padding=1, count_include_pad=False)
            moving, fixed = (resize(mean(image), shape) for image in (moving, fixed))
            disp = resize_disp(disp, shape)
            moved = warp(moving, disp)
        levels.append(Level(weight, moved, fixed, disp))
    return levels
