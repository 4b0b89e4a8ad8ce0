"""What training minimises: the terms of a recipe's objective, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from regkit import losses
from regkit.blocks import AVERAGE_POOL
from regkit.metrics import endpoint_error
from regkit.models import Registration
from regkit.spatial import integrate, resize, resize_disp, warp
from regkit.training.recipes import Recipe

SIMILARITIES = {
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
