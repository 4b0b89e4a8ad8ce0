"""One training loop for every model, on Hugging Face Accelerate: CPU, one GPU, or several.

A run in a folder leaves

    recipe.json            what was asked for
    history.json           the terms of the objective, and the validation
    last.safetensors       the weights after the last validation
    best.safetensors       the weights with the best validation Dice
    state/                 what resuming needs (optimiser, schedule, random states)

`state/` is Accelerate's own folder and holds pickled random states. It serves to resume one's own
run, and nothing else in regkit reads it: weights travel as safetensors. Never resume from a folder
that somebody else made.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from regkit import losses, models
from regkit.data.pairs import RandomPairs, chain
from regkit.data.population import population
from regkit.device import choose_device
from regkit.evaluate import evaluate, summary
from regkit.models import Registration, RegistrationModel
from regkit.recipes import Recipe, get
from regkit.spatial import integrate, warp

SIMILARITIES = {
    "lncc": losses.lncc,
    "mse": losses.mse,
    "ncc": losses.ncc,
    "mutual_information": losses.mutual_information,
}


@dataclass(frozen=True)
class Trained:
    """What a training run gives back: the model (evaluation mode, CPU) and what happened.

    history: one dictionary a step: `step`, `loss`, each term without its weight, and on validation
        steps `dice`, `dice_before`, `folding_percent`.
    """

    model: RegistrationModel
    history: list[dict[str, float]]
    recipe: Recipe


def objective(result: Registration, batch: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The terms that a recipe asks for, without their weights.

    Args:
        result: of the model on this batch.
        batch: `moving`, `fixed` (B, 1, *S), and the labels for the term "dice".
        recipe: its `weights` name the terms, `similarity` and `bidirectional` say how.
    """
    moving, fixed = batch["moving"], batch["fixed"]
    similarity = SIMILARITIES[recipe.similarity]
    options = {"window": recipe.window} if recipe.similarity == "lncc" else {}
    smooth = result.disp if result.svf is None else result.svf
    terms = {}
    for name in recipe.weights:
        if name == "similarity":
            terms[name] = similarity(result.moved, fixed, **options)
            if recipe.bidirectional:
                if result.svf is None:
                    raise ValueError(
                        f"bidirectional is on for model {recipe.model!r}, expected a model with a "
                        "velocity field, such as vxm_diff: only that has an inverse."
                    )
                back = warp(fixed, integrate(-result.svf))
                terms[name] = (terms[name] + similarity(back, moving, **options)) / 2
        elif name == "diffusion":
            terms[name] = losses.diffusion(smooth)
        elif name == "bending":
            terms[name] = losses.bending(smooth)
        elif name == "folding":
            terms[name] = losses.folding(result.disp)
        elif name == "dice":
            terms[name] = _label_loss(result.disp, batch)
        else:
            raise ValueError(
                f"weights names {name!r}, expected similarity, diffusion, bending, folding or dice."
            )
    return terms


def _label_loss(disp: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Soft Dice of the warped labels: the semi-supervised term of VoxelMorph (TMI 2019)."""
    if "moving_labels" not in batch:
        raise ValueError("weights names 'dice', expected pairs with labels.")
    moving, fixed = batch["moving_labels"].long(), batch["fixed_labels"].long()
    labels = torch.unique(torch.cat([moving, fixed]))
    labels = labels[labels != 0]

    def one_hot(x: Tensor) -> Tensor:
        return torch.cat([(x == label).to(disp.dtype) for label in labels], dim=1)

    return losses.soft_dice(warp(one_hot(moving), disp), one_hot(fixed))


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
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)


def train(
    recipe: Recipe | str,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
    device: str = "auto",
    start: str | os.PathLike | None = None,
) -> Trained:
    """Train a model as a recipe says, on the embedded population.

    Args:
        recipe: a `Recipe`, or the name of one (then at the current budget).
        out: folder for checkpoints and history; without it nothing is written.
        resume: go on where the run in `out` stopped.
        progress: show a progress bar with the terms of the objective.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        start: weights to begin with, a file or the name of shipped ones, of the same model; what
            they say of their own training is kept as `started_from`.

    Raises:
        ValueError: settings that do not fit, a folder that holds another run, or a term of the
            objective that is not finite (named, with the step).
    """
    recipe = get(recipe) if isinstance(recipe, str) else recipe
    if recipe.similarity not in SIMILARITIES:
        raise ValueError(
            f"similarity is {recipe.similarity!r}, expected one of {', '.join(SIMILARITIES)}."
        )
    for name in ("batch", "steps", "validate_every", "validation"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name} is {getattr(recipe, name)}, expected 1 or more.")
    if not recipe.weights:
        raise ValueError("weights is empty, expected at least one term of the objective.")
    folder = None if out is None else Path(out)
    plan = json.loads(json.dumps(asdict(recipe)))
    if resume and folder is None:
        raise ValueError("resume is on and out is not given, expected the folder of the run.")

    chosen = choose_device(device)
    set_seed(recipe.seed)
    accelerator = Accelerator(
        cpu=chosen.type == "cpu",
        mixed_precision=recipe.precision,
        step_scheduler_with_optimizer=False,  # else once per process: the rate would fall too fast
    )
    processes = accelerator.num_processes
    if recipe.batch % processes:
        raise ValueError(
            f"batch is {recipe.batch}, expected a multiple of the {processes} processes "
            "that share it."
        )
    network = models.create(recipe.model, recipe.ndim, **recipe.options)
    if start is not None:
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
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr)
    schedule = _schedule(optimizer, recipe)
    # nothing is left behind by settings that do not fit
    if folder is not None and accelerator.is_main_process:
        _prepare(folder, plan, resume)

    quiet = not (progress and accelerator.is_main_process)
    make: dict[str, Any] = {
        "contrast": recipe.contrast,
        "amplitude": recipe.amplitude,
        "progress": not quiet,
    }
    with accelerator.main_process_first():  # the others then read what the first one made
        subjects = population(recipe.subjects, recipe.shape, seed=0, **make)
        held_out = chain(population(recipe.validation, recipe.shape, seed=1, **make))
    pairs = RandomPairs(subjects, recipe.steps * recipe.batch, recipe.seed, recipe.gamma)
    network.info |= {
        "recipe": plan,
        "spacing": subjects[0].spacing,
        "orientation": "RAS",
        "range": [0, 1],
    }
    model, optimizer, schedule = accelerator.prepare(network, optimizer, schedule)

    history: list[dict[str, float]] = []
    if resume and folder is not None and (folder / "state").is_dir():
        accelerator.load_state(str(folder / "state"))
        history = json.loads((folder / "history.json").read_text())
    done = len(history)
    rest = Subset(pairs, range(done * recipe.batch, len(pairs)))
    loader = accelerator.prepare(DataLoader(rest, batch_size=recipe.batch // processes))
    best = max((entry["dice"] for entry in history if "dice" in entry), default=-math.inf)

    bar = tqdm(loader, total=recipe.steps, initial=done, disable=quiet, desc=recipe.name)
    model.train()
    for step, batch in enumerate(bar, start=done + 1):
        with accelerator.autocast():
            result = model(batch["moving"], batch["fixed"])
        terms = objective(result, batch, recipe)
        for name, value in terms.items():
            if not torch.isfinite(value):
                raise ValueError(
                    f"The term {name!r} is {value.item()} at step {step}, expected a finite loss: "
                    "lower the learning rate, or look at the images of this batch."
                )
        loss = torch.stack([recipe.weights[k] * v for k, v in terms.items()]).sum()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        entry = {"step": step, "loss": loss.item(), **{k: v.item() for k, v in terms.items()}}
        history.append(entry)
        bar.set_postfix({k: f"{v:.3f}" for k, v in entry.items() if k != "step"}, refresh=False)
        if step % recipe.validate_every == 0 or step == recipe.steps:
            model.eval()
            scores = summary(evaluate(network, held_out, device=accelerator.device))
            model.train()
            entry.update({k: scores[k] for k in ("dice", "dice_before", "folding_percent")})
            if folder is not None and accelerator.is_main_process:
                models.save(network, folder / "last.safetensors", step=step, **_scores(entry))
                if entry["dice"] > best:
                    models.save(network, folder / "best.safetensors", step=step, **_scores(entry))
                _write_json(folder / "history.json", history)
            if folder is not None:
                accelerator.save_state(str(folder / "state"))
            best = max(best, entry["dice"])
    return Trained(network.cpu().eval(), history, recipe)


def _scores(entry: dict[str, float]) -> dict[str, dict[str, float]]:
    return {"validation": {k: entry[k] for k in ("dice", "dice_before", "folding_percent")}}


def _prepare(folder: Path, plan: dict[str, Any], resume: bool) -> None:
    """Make the run's folder, or make sure that it holds the same run."""
    held = folder / "recipe.json"
    if held.is_file():
        if not resume:
            raise ValueError(f"out is {folder.name!r}, which holds a run: expected resume=True.")
        if json.loads(held.read_text()) != plan:
            raise ValueError(f"out is {folder.name!r}, which holds a run of another recipe.")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(held, plan)
