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

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from regkit import models
from regkit.device import choose_device, enough_memory
from regkit.models import RegistrationModel
from regkit.training import recipes
from regkit.training.checkpoints import (
    alone_in,
    best_score,
    check_run,
    go_on,
    save,
    wait_for_the_next_second,
    write_json,
)
from regkit.training.objective import SIMILARITIES, check_levels, objective
from regkit.training.recipes import Recipe, get
from regkit.training.tasks import Task, fitted, task_of

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


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe) -> Any:
    """Factor on the learning rate at each step."""
    if recipe.schedule not in ("constant", "cosine"):
        raise ValueError(f"schedule is {recipe.schedule!r}, expected 'constant' or 'cosine'.")

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(recipe.warmup, 1))
        fall = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
        return rise * (fall if recipe.schedule == "cosine" else 1.0)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


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
    with alone_in(folder):
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
        check_run(folder, plan, resume)

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
        task = task or task_of(recipe, data, not quiet)
    network.info |= {"recipe": plan, **task.info}
    model, optimizer, schedule = accelerator.prepare(network, optimizer, schedule)

    history = go_on(folder, accelerator) if resume and folder is not None else []
    best = best_score(task, [entry for entry in history if _validates(recipe, int(entry["step"]))])
    if (
        folder is not None and accelerator.is_main_process
    ):  # nothing can be said against it any more
        write_json(folder / "recipe.json", plan)
    done = len(history)
    if folder is not None:
        wait_for_the_next_second(folder / "log")
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
                save(folder, accelerator, network, history, scores, better)
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
