"""Time and memory of a model at 160x192x160: writes results/unfolding_cost.json (three stages).

    python studies/cost.py                    # on the CPU
    python studies/cost.py --device cuda      # what a GPU measures
    python studies/cost.py --model dense_unet_eca --part step

Inference: seconds of one pair in a process of its own, and the most memory that process held
(resident set on the CPU, with Python and torch; torch's allocator on a GPU), in float32 and in
bfloat16, with channels first and last. On a GPU without bfloat16 in float16: `half` says so.

Training, one step of the objective of the model's 3D recipe at batch 1: on a GPU measured. On the
CPU two *estimates*, each with four times the weights (themselves, gradient and both moments of
Adam). What is kept: the bytes of all tensors that the way back needs, each storage counted once, at
half the size, 80x96x80, times eight. And the peak: the most that torch's allocator had given out at
once, on the way there and back, at 32x48x32, times a hundred; it misses what a convolution takes
past the allocator. Autocast on a CPU chooses bfloat16 in other places than on a GPU.

Each row is written when it is there, and a row that is there is not made again.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer

from regkit import models
from regkit.device import half_precision
from regkit.record import Row, Rows, made_now, peak_bytes, peak_inside, timed
from regkit.training import objective, recipes

SHAPE = (160, 192, 160)
HALF = (80, 96, 80)
SMALL = (32, 48, 32)
MEMORY = "VmHWM of a process of its own on the CPU, the peak of PyTorch's allocator on a GPU"


def half_of(device: str) -> torch.dtype:
    """bfloat16; float16 on a GPU that has no bfloat16, such as a T4."""
    of_gpu = half_precision(torch.device(device)) if device == "cuda" else "bf16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[of_gpu]


def inference(name: str, device: str, threads: int, bf16: bool, last: bool) -> Row:
    """One pair, in a process of its own."""
    torch.set_num_threads(threads)
    model = models.create(name, 3).eval().to(device)
    pair = torch.rand(2, 1, 1, *SHAPE, device=device)
    if last:
        model = model.to(memory_format=torch.channels_last_3d)
    repetitions = 1 if device == "cpu" else 5  # a GPU chooses its kernels at first
    with (
        torch.no_grad(),
        torch.autocast(device, half_of(device), enabled=bf16),
        peak_inside(device) as peak,
    ):
        seconds = min(timed(lambda: model(*pair), device) for _ in range(repetitions))
    return {"seconds": round(seconds, 3), "gigabytes": round(peak.gigabytes, 2)}


def step(name: str, device: str, threads: int, bf16: bool, save: bool) -> Row:
    """One step of training: its peak on a GPU, what it keeps and its peak on the CPU."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    recipe = recipes.get(f"{name}_3d", "cpu")
    model = models.create(name, 3, save_memory=save).train().to(device)
    model = model.to(memory_format=torch.channels_last_3d)

    def loss(moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, half_of(device), enabled=bf16):
            result = model(moving, fixed)
        terms = objective.objective(result, {"moving": moving, "fixed": fixed}, recipe)
        return torch.stack([recipe.weights[k] * v for k, v in terms.items()]).sum()

    if device == "cuda":
        pair = torch.rand(2, 1, 1, *SHAPE, device=device)
        optimizer = torch.optim.Adam(model.parameters())

        def update() -> None:
            optimizer.zero_grad()
            loss(*pair).backward()
            optimizer.step()

        with peak_inside(device) as peak:
            seconds = min(timed(update, device) for _ in range(3))
        return {"seconds": round(seconds, 3), "gigabytes": round(peak.gigabytes, 2)}

    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss(*torch.rand(2, 1, 1, *HALF))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = sum(s.nbytes() for address, s in kept.items() if address not in weights)
    kept.clear()
    small = torch.rand(2, 1, 1, *SMALL)
    allotted = peak_bytes(lambda: loss(*small).backward())
    size = 4 * sum(p.nbytes for p in model.parameters())
    return {
        "estimated_gigabytes": round((8 * activations + size) / 1e9, 2),
        "estimated_peak_gigabytes": round((100 * allotted + size) / 1e9, 2),
    }


def in_a_process(function: Callable[..., Row], *arguments: Any) -> Row:
    """A row in a process of its own: what others have left in memory does not count."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main(
    model: Annotated[
        str, typer.Option(help="One that has a 3D recipe and save_memory.")
    ] = "unfolding",
    part: Annotated[
        str, typer.Option(help="step, inference, or both with a blank between.")
    ] = "step inference",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: common.Threads = 2,
    out: Annotated[Path | None, typer.Option(help="By default results/MODEL_cost.json.")] = None,
) -> None:
    """Whether a pair and a step fit, and how long a pair takes."""
    common.use_threads(threads)
    made = common.made(__file__, device) | {"memory_is": MEMORY}
    fields = {"made": made, "shape": SHAPE}
    key = ("part", "where", "bf16", "save_memory", "channels_last")
    rows = Rows(out or common.RESULTS / f"{model}_cost.json", key, fields)
    functions = {"step": (step, "save_memory"), "inference": (inference, "channels_last")}
    for name, (function, option) in functions.items():
        for bf16, value in itertools.product((False, True), repeat=2):
            row = {"part": name, "where": device, "bf16": bf16, option: value}
            if name in part.split() and not rows.has(row):
                load = made_now(device)["load"]
                if device == "cuda":
                    row["half"] = str(half_of(device)).removeprefix("torch.")
                row |= in_a_process(function, model, device, threads, bf16, value)
                rows.add(row | {"load": load})
                typer.echo(row, err=True)


if __name__ == "__main__":
    common.start(main)
