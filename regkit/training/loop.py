"""One training loop for every model, on Hugging Face Accelerate: CPU, one GPU, or several.

`checkpoints` says what a run leaves in its folder, and how one that was killed goes on.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from regkit import models
from regkit.device import choose_device, enough_memory
from regkit.messages import install
from regkit.models import RegistrationModel
from regkit.training import recipes
from regkit.training.batches import batches, living_workers, worker_count
from regkit.training.checkpoints import (
    alone_in,
    best_score,
    check_run,
    go_on,
    save,
    seconds_of,
    taken_precision,
    wait_for_the_next_second,
    write_json,
)
from regkit.training.data import fitted
from regkit.training.objective import SIMILARITIES, check_levels, objective
from regkit.training.recipes import Recipe, get
from regkit.training.tasks import Task, task_of

if TYPE_CHECKING:  # it belongs to the extra "train"
    from accelerate import Accelerator

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass(frozen=True)
class Trained:
    """What a training run gives back: the model (evaluation mode, CPU) and what happened.

    history: one dictionary a step: `step`, `loss`, each term without its weight (the label loss as
        `dice_loss`), and on validation steps its numbers: `dice`, `dice_before`, `folding_percent`.
        With several processes the mean over them. Shorter than the steps of the recipe where
        `minutes` have ended the run.
    recipe: with the precision that was taken where it said "auto".
    seconds: wall-clock time from the first update to the end of the last validation, all sittings
        together: with making pairs and saving, without making the population. What a sitting did
        after the last state that it saved is lost and does not count. NaN where an earlier version
        of regkit has begun the run.
    """

    model: RegistrationModel
    history: list[dict[str, float]]
    recipe: Recipe
    seconds: float


def train(
    recipe: Recipe | str,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    device: str = "auto",
    start: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    task: Task | None = None,
    workers: int | None = None,
    minutes: float | None = None,
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
            the recipe, see `regkit.training.data.fitted`; `regkit.data.prepared` reads it.
        task: images of your own to learn from and to judge by, see `regkit.training.tasks.Task`;
            the recipe then says only how.
        workers: processes that make pairs while this one trains. None: on a GPU as many as there
            are cores, at most four; else none. Any number gives the same weights.
        minutes: end after a validation, with the state saved in `out`, where the next one would
            come later than so many minutes after the first update, as far as the last interval
            tells. `resume` goes on.

    Raises:
        ValueError: settings or data that do not fit, a folder that holds another run, a damaged one
            or one that another process works in, a state that cannot be written, or a term of the
            objective that is not finite (named, with the step and the pairs of the batch); or the
            extra "train" is not installed.
    """
    _check_installed()
    recipe = get(recipe) if isinstance(recipe, str) else recipe
    recipe = fitted(recipe, data) if task is None else recipe
    folder = None if out is None else Path(out)
    chosen = choose_device(device)
    worker_count(workers, chosen)
    if minutes is not None and (folder is None or not minutes > 0):
        raise ValueError(
            f"minutes is {minutes} and out is {'not ' if folder is None else ''}given, expected "
            "more than 0 and a folder from which to go on."
        )
    taken = None if folder is None else taken_precision(folder)
    if taken is not None and recipe.precision == "auto":
        recipe = replace(recipe, precision=taken)
    recipe = recipes.settled(recipe, chosen)
    _check(recipe, folder, resume, chosen)
    with alone_in(folder):
        run = _set_up(recipe, folder, resume, progress, chosen, start, data, task)
        return _loop(run, workers, math.inf if minutes is None else 60 * minutes)


@dataclass
class _Run:
    """What the loop works with.

    network, model: the network itself, and what Accelerate has made of it for training.
    history, best: of the steps so far; the best score of their validations.
    seconds: that they took, see `Trained`. began: when they would have begun in one sitting.
    """

    recipe: Recipe
    folder: Path | None
    progress: bool
    accelerator: Accelerator
    task: Task
    network: RegistrationModel
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    history: list[dict[str, float]]
    best: float
    seconds: float
    began: float = 0.0


def _loop(run: _Run, workers: int | None, limit: float) -> Trained:
    """Update the weights, and validate now and then, until the steps of the recipe are done.

    limit: seconds in which this sitting is to end, see `minutes` of `train`.
    """
    recipe, done = run.recipe, len(run.history)
    run.model.train()
    start = saved = time.monotonic()
    run.began = start - run.seconds
    with living_workers(), closing(_batches(run, workers)) as left:
        bar = tqdm(left, recipe.name, recipe.steps, initial=done, disable=not run.progress)
        for step, batch in enumerate(bar, start=done + 1):
            terms = _update(run, step, batch)
            bar.set_postfix({k: f"{v:.3f}" for k, v in terms.items()}, refresh=False)
            if _validates(recipe, step):
                _validate(run, step)
                before, saved = saved, time.monotonic()
                if saved + (saved - before) > start + limit:
                    break
        bar.close()
    return _ended(run)


def _batches(run: _Run, workers: int | None) -> Generator[dict[str, Any]]:
    """The batches of the steps that are left."""
    recipe, accelerator = run.recipe, run.accelerator
    left = range(len(run.history) * recipe.batch, recipe.steps * recipe.batch)
    size = recipe.batch // accelerator.num_processes
    count = worker_count(workers, accelerator.device, accelerator.num_processes)
    return batches(run.task.pairs, left, size, count, accelerator)


def _update(run: _Run, step: int, batch: dict[str, Any]) -> dict[str, float]:
    """One step of the optimiser, and the terms of the objective before it."""
    recipe, accelerator = run.recipe, run.accelerator
    with enough_memory(_memory(recipe)):
        with accelerator.autocast():
            result = run.model(batch["moving"], batch["fixed"])
        terms = objective(result, batch, recipe)
        loss = torch.stack([recipe.weights[k] * v for k, v in terms.items()]).sum()
        values = _values(accelerator, {**terms, "loss": loss}, step, batch)
        accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(run.model.parameters(), recipe.clip)
    if accelerator.scaler is None:  # a scaler leaves out a step whose gradient is not finite
        _values(accelerator, {"gradient": norm}, step, batch)
    run.optimizer.step()
    logged = {**values, "lr": run.schedule.get_last_lr()[0]}
    accelerator.log({f"train/{k}": v for k, v in logged.items()}, step)
    run.schedule.step()
    run.optimizer.zero_grad()
    run.history.append({"step": step, **values})
    return values


def _validate(run: _Run, step: int) -> None:
    """Judge the weights after a step, and save them in the folder of the run."""
    run.model.eval()
    scores = run.task.validate(run.network, run.accelerator.device)
    run.model.train()
    run.history[-1].update(scores)
    run.accelerator.log({f"validation/{k}": v for k, v in scores.items()}, step)
    score = run.task.score(scores)
    run.seconds = time.monotonic() - run.began
    if run.folder is not None:
        better = score > run.best
        save(run.folder, run.accelerator, run.network, run.history, scores, better, run.seconds)
    run.best = max(run.best, score)


def _ended(run: _Run) -> Trained:
    for tracker in run.accelerator.trackers:
        tracker.finish()
    # autocast was for training alone
    run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    _lay_out(run.network, torch.contiguous_format)  # as a file of its weights gives it
    return Trained(run.network.cpu().eval(), run.history, run.recipe, run.seconds)


# --- before the first step ----------------------------------------------------------------------


def _set_up(
    recipe: Recipe,
    folder: Path | None,
    resume: bool,
    progress: bool,
    device: torch.device,
    start: str | os.PathLike[str] | None,
    data: str | os.PathLike[str] | None,
    task: Task | None,
) -> _Run:
    """Everything a run needs. Nothing is written before everything is known to fit."""
    plan = recipes.plan(recipe)
    if folder is not None:
        check_run(folder, plan, resume)
    accelerator = _accelerator(recipe, folder, device)
    network = _network(recipe, start)
    check_levels(recipe, network.levels)
    _lay_out(network, CHANNELS_LAST[recipe.ndim])  # the same numbers from faster convolutions
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr)
    schedule = _schedule(optimizer, recipe)
    if folder is not None and not (folder / "recipe.json").is_file():
        _rehearse(network.to(accelerator.device), recipe, accelerator)
    progress = progress and accelerator.is_main_process
    with accelerator.main_process_first():  # the others then read what the first one made
        task = task_of(recipe, data, progress) if task is None else task
    network.info |= {"recipe": plan, **task.info}
    model, optimizer, schedule = accelerator.prepare(network, optimizer, schedule)
    history = go_on(folder, accelerator) if resume and folder is not None else []
    seconds = seconds_of(folder, len(history)) if history and folder is not None else 0.0
    best = best_score(task, [entry for entry in history if _validates(recipe, int(entry["step"]))])
    if folder is not None:
        if accelerator.is_main_process:
            write_json(folder / "recipe.json", plan)
        wait_for_the_next_second(folder / "log")
        purge = {"purge_step": len(history) + 1}  # what a killed run logged after its last save
        accelerator.init_trackers("log", init_kwargs={"tensorboard": purge})
    return _Run(
        recipe=recipe,
        folder=folder,
        progress=progress,
        accelerator=accelerator,
        task=task,
        network=network,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        history=history,
        best=best,
        seconds=seconds,
    )


def _check_installed() -> None:
    try:
        for name in ("accelerate", "tensorboard"):
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed, expected what training needs: {install('train')}."
        ) from None


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
        raise ValueError(
            f"precision is {recipe.precision!r}, expected 'auto', 'no', 'bf16' or 'fp16'."
        )
    if recipe.precision == "fp16" and device.type == "cpu":  # Accelerate would take float32
        raise ValueError("precision is 'fp16' on the CPU, expected 'auto', 'no' or 'bf16' there.")
    if resume and folder is None:
        raise ValueError("resume is on and out is not given, expected the folder of the run.")


def _accelerator(recipe: Recipe, folder: Path | None, device: torch.device) -> Accelerator:
    """Accelerate's object for this run, after the seed is set."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration, set_seed

    AcceleratorState._reset_state(reset_partial_state=True)  # else precision stays the first run's
    set_seed(recipe.seed)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
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
    return accelerator


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe) -> LambdaLR:
    """Factor on the learning rate at each step.

    In closed form: LinearLR and CosineAnnealingLR multiply the rate from step to step, which ends
    in other last digits, and states of earlier runs would not fit them.
    """
    if recipe.schedule not in ("constant", "cosine"):
        raise ValueError(f"schedule is {recipe.schedule!r}, expected 'constant' or 'cosine'.")

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(recipe.warmup, 1))
        fall = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
        return rise * (fall if recipe.schedule == "cosine" else 1.0)

    return LambdaLR(optimizer, factor)


def _lay_out(network: RegistrationModel, memory_format: torch.memory_format) -> None:
    network.to(memory_format=memory_format)  # type: ignore[call-overload]


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


def _network(recipe: Recipe, start: str | os.PathLike[str] | None) -> RegistrationModel:
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
    by_name = {"dice_loss" if k == "dice" else k: v for k, v in zip(terms, values, strict=True)}
    for name, value in by_name.items():
        if not math.isfinite(value):
            from accelerate.utils import gather_object

            what = "gradient" if name == "gradient" else f"term {name!r}"
            pairs = ", ".join(gather_object(batch["name"]))
            raise ValueError(
                f"The {what} is {value} at step {step}, expected a finite loss: lower the learning "
                f"rate, or look at the images of this batch ({pairs})."
            )
    return by_name
