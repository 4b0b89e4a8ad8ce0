"""Whether budget "gpu" fits 15 minutes on a Colab T4 with two cores: writes results/t4_budget.json.

    python studies/t4_budget.py               # goes on where it was stopped
    python studies/t4_budget.py --part pairs  # four minutes, alone on the machine

No T4 is needed, and none was at hand. What a step takes there is *counted*, with tensors that have
a shape and no content (fake tensors of PyTorch): the arithmetic of convolutions and matrix products
on the way there and back, with the objective; the bytes that operations read and write; and the
number of operations. The label losses are left out: PyTorch cannot count what depends on labels. A
warp of eight label maps stands for soft Dice. Then three assumptions of ours, on the careful side:

- FLOPS: three tenths of the 8.1e12 a second that NVIDIA's data sheet gives a T4 in float32. It
  gives 65e12 in float16, of which convolutions of 16 or 32 channels reach little.
- BYTES: two thirds of the 320e9 a second of the data sheet.
- OPERATION: seconds until the next one is started, by Python on a slow core.

Their sum is a step. Pairs are made beside it, by two workers: the larger of both times counts.
`pairs` measures them on the machine that it runs on: how many a second with 0, 1 and 2 workers, and
with 0 the time of the processor for one, which other busy processes change little. That time,
halved, is what two workers are expected to take. Memory is what the
way back keeps, each storage counted once, and four times the weights; what a convolution takes
beside its result is not in it.

Not in it either: the population, which is made once and kept in the cache, and validation. A
chapter is the sum of the trainings in its text; those of exercises do not count.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any
from unittest import mock

import common
import torch
import typer
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from regkit import models
from regkit.models import Registration
from regkit.record import Row, Rows, made_now, rounded
from regkit.spatial import warp
from regkit.training import batches, recipes, tasks
from regkit.training.objective import objective
from regkit.training.recipes import Recipe

FLOPS, BYTES, OPERATION = 0.3 * 8.1e12, 0.66 * 320e9, 10e-6
MINUTES, WORKERS = 15.0, 2
MEMORY = 15.0  # GB of a T4 that PyTorch can have
SECONDS = 6.0  # to spend on a row of pairs
SUBJECTS = 6  # to measure pairs with: how many there are changes no time
# what has its own way of making pairs; other recipes take as long as one of these
MEASURED = (
    "rigid_resnet34_2d",
    "rigid_resnet34_2d_wide",
    "fcn_2d",
    "fcn_3d",
    "any_contrast_2d",
    "any_contrast_3d",
    "vxm_2d",
    "unfolding_3d",
)
LABEL_TERMS = ("dice", "segmentation")
VIEWS = ("view", "detach", "expand", "slice", "select", "permute", "unsqueeze", "squeeze", "alias",
         "transpose", "t", "as_strided", "split", "unbind", "_unsafe_view")  # fmt: skip


def chapters() -> dict[str, list[Recipe]]:
    """The trainings of each chapter at budget "gpu"."""

    def get(name: str, **changes: Any) -> Recipe:
        return recipes.get(name, "gpu", **changes)

    dense, pyramids, unfolding = get("dense_unet_eca_2d"), get("pyramids_2d"), get("unfolding_2d")
    multi = get("rigid_resnet34_2d_multi", steps=150)
    plain = replace(dense, options={"dense": False, "eca": False})
    vxm = replace(pyramids, model="vxm", levels=None)
    small = {"size": "small", "channels": 24, "drop_path": 0.0}
    return {
        "02": [get("rigid_resnet34_2d"), multi, multi],
        "03": [get("vxm_diff_2d"), get("vxm_2d")],
        "04": [dense, plain, replace(dense, model="vxm2")],
        "05": [get("rcn_2d", amplitude=2.0)],
        "06": [vxm, replace(pyramids, model="dual_prnet"), pyramids],
        "07": [
            replace(dense, model="vxm"),
            replace(dense, model="transmorph", options=small),
        ],
        "08": [
            unfolding,
            get("vxm_2d", steps=unfolding.steps),
            get("vxm_2d", steps=4 * unfolding.steps),
            replace(unfolding, options={"shared": True}),
        ],
        "08 in 3D": [get("unfolding_3d")],
    }


# ---------------------------------------------------------------------------------------- counted


class Traffic(TorchDispatchMode):
    """Counts operations, and the bytes of what they read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operations = 0, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        if function._schema.name.partition("::")[2] not in VIEWS:
            self.operations += 1
            moved = tree_leaves((arguments, options, result))
            self.bytes += sum(x.nbytes for x in moved if isinstance(x, torch.Tensor))
        return result


def arithmetic(recipe: Recipe) -> Row:
    """What one step counts: see the head of this file."""
    weights = {k: v for k, v in recipe.weights.items() if k not in LABEL_TERMS}
    counted = replace(recipe, weights=weights)
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage
        return x

    # regkit does not look at the content of a tensor where PyTorch compiles, which has none either
    compiling = mock.patch.object(torch.compiler, "is_compiling", return_value=True)
    fake, model = FakeTensorMode(), models.create(recipe.model, recipe.ndim, **recipe.options)
    for module in model.train().modules():
        for held in (module._parameters, module._buffers):
            held.update({k: fake.from_tensor(v) for k, v in held.items() if v is not None})
    with compiling, fake, FlopCounterMode(display=False) as flops, Traffic() as traffic:
        shape = (recipe.batch, 1, *recipe.shape)
        pair = {"moving": torch.zeros(shape), "fixed": torch.zeros(shape)}
        pair["disp"] = torch.zeros(recipe.batch, recipe.ndim, *recipe.shape)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            with torch.autocast("cpu", torch.float16):  # as the training loop does
                result = model(pair["moving"], pair["fixed"])
            terms = [*objective(result, pair, counted).values(), *_of_labels(result, recipe)]
            loss = torch.stack(terms).sum()
        loss.backward()
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        activations = sum(s.nbytes() for address, s in kept.items() if address not in own)
        size = sum(p.nbytes for p in model.parameters())
    return {
        "gigaflop": flops.get_total_flops() / 1e9,
        "gigabytes_moved": traffic.bytes / 1e9,
        "operations": traffic.operations,
        "gigabytes_kept": (activations + 4 * size) / 1e9,
    }


def _of_labels(result: Registration, recipe: Recipe) -> Iterator[torch.Tensor]:
    """What stands for the terms that look at labels."""
    yield from (logits.softmax(1).mean() for logits in result.logits or ())
    if "dice" in recipe.weights:
        labels = torch.zeros(recipe.batch, 8, *recipe.shape)
        yield warp(labels, result.disp).mean()


def step_seconds(row: Row) -> float:
    """Of one step on a T4, by the assumptions at the head of this file."""
    computing = 1e9 * row["gigaflop"] / FLOPS
    moving = 1e9 * row["gigabytes_moved"] / BYTES
    return float(computing + moving + row["operations"] * OPERATION)


# --------------------------------------------------------------------------------------- measured


def made_like(recipe: Recipe) -> str:
    """The recipe of `MEASURED` whose pairs take as long to make."""
    if recipe.motion is not None:
        return "rigid_resnet34_2d_wide" if recipe.motion.get("tilt") else "rigid_resnet34_2d"
    kind = "any_contrast" if recipe.painted is not None else "fcn" if recipe.chest else ""
    return f"{kind}_{recipe.ndim}d" if kind else ("vxm_2d", "unfolding_3d")[recipe.ndim - 2]


def speed(recipe: Recipe, workers: int) -> Row:
    """Pairs a second in `SECONDS`, after a first batch for which the workers start."""
    few = replace(recipe, subjects=SUBJECTS, validation=2)
    pairs, size = tasks.task_of(few, None, False).pairs, recipe.batch
    for index in range(2 * SUBJECTS):  # what is made once
        pairs[index]
    left = range(len(pairs))  # type: ignore[arg-type]
    loader = batches.batches(pairs, left, size, workers, Accelerator(cpu=True))
    next(loader)
    start, began, count = time.perf_counter(), time.process_time(), 0
    # what workers have made in advance, two batches each, is theirs: it is made in this time again
    for _ in loader:
        count += size
        if time.perf_counter() - start > SECONDS and count >= 4 * size:
            break
    seconds = time.perf_counter() - start
    used = time.process_time() - began
    loader.close()
    numbers = {"pairs_per_second": count / seconds}
    return numbers if workers else numbers | {"cpu_milliseconds": 1000 * used / count}


def measured(recipe: Recipe, workers: int) -> Row:
    """The row of a speed, with what else the machine did."""
    return {"load": made_now()["load"], **speed(recipe, workers)}


# ----------------------------------------------------------------------------------------- a table


def training(recipe: Recipe, count: Row, speeds: dict[str, float]) -> Row:
    """What a training is expected to take on a T4, from what its step counts."""
    computing = recipe.steps * step_seconds(count) / 60
    making = recipe.steps * recipe.batch / speeds[made_like(recipe)] / 60
    numbers = {
        "teraflop": recipe.steps * count["gigaflop"] / 1000,
        "minutes_computing": computing,
        "minutes_making_pairs": making,
        "minutes": max(computing, making),
    }
    return {key: rounded(value) for key, value in numbers.items()}


def main(
    part: Annotated[
        str, typer.Option(help="pairs, recipe or chapter, or several with blanks between.")
    ] = "pairs recipe chapter",
    out: common.Out = common.RESULTS / "t4_budget.json",
    fresh: common.Fresh = False,
) -> None:
    """What each recipe and each chapter takes at budget gpu."""
    assumed = {
        "flops": FLOPS,
        "bytes": BYTES,
        "operation": OPERATION,
        "workers": WORKERS,
        "minutes": MINUTES,
    }
    fields = {"made": common.made(__file__), "assumed": assumed}
    rows = Rows(out, ("part", "name", "workers"), fields, fresh=fresh)
    if "pairs" in part.split():
        for name, workers in itertools.product(MEASURED, (0, 1, 2)):
            recipe = recipes.get(name, "gpu")
            key = {"part": "pairs", "name": name, "workers": workers, "shape": recipe.shape}

            measure = partial(measured, recipe, workers)
            common.measure_once(rows, key, f"{name}, {workers} workers", measure, str)
    speeds = {
        row["name"]: WORKERS * 1000 / row["cpu_milliseconds"]
        for row in rows.rows
        if "cpu_milliseconds" in row
    }
    if "recipe" in part.split():
        for name in recipes.names():
            recipe = recipes.get(name, "gpu")
            count = counted(recipe, rows)
            row = {
                "part": "recipe",
                "name": name,
                "workers": None,
                "identity": recipes.identity(recipe),
                "count": count["name"],
                **{key: getattr(recipe, key) for key in ("steps", "batch", "shape")},
                **training(recipe, count, speeds),
                "gigabytes_kept": count["gigabytes_kept"],
            }
            rows.add(row)
            typer.echo(f"{name}: {row['minutes']} minutes", err=True)
    if "chapter" in part.split():
        for name, plans in chapters().items():
            parts = [training(plan, counted(plan, rows), speeds) for plan in plans]
            row = {key: rounded(sum(part[key] for part in parts)) for key in parts[0]}
            identities = [recipes.identity(plan) for plan in plans]
            rows.add({"part": "chapter", "name": name, "workers": None, "trains": identities} | row)
            typer.echo(f"{name}: {row['minutes']} minutes", err=True)


def counted(recipe: Recipe, rows: Rows) -> Row:
    """What a step of a recipe counts; known where another one has the same step."""
    key = {"part": "count", "name": step_of(recipe), "workers": None}
    common.measure_once(rows, key, recipe.name, lambda: arithmetic(recipe), str)
    return next(row for row in rows.rows if row["name"] == key["name"])


def step_of(recipe: Recipe) -> str:
    """The same for recipes whose steps count the same."""
    kept = ("model", "ndim", "options", "shape", "batch", "similarity", "window", "weights",
            "levels", "bidirectional")  # fmt: skip
    other = {key: value for key, value in vars(recipes.get("vxm_2d", "cpu")).items()
             if key not in kept}  # fmt: skip
    return recipes.identity(replace(recipe, **other))


if __name__ == "__main__":
    common.start(main)
