"""What a model costs: parameters, multiply-adds, what a step of training keeps, and seconds.

Counting computes nothing: tensors have a shape and a type here but no numbers, so that a network at
160x192x160 is counted in a second, on any machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from regkit import losses, models
from regkit.models.base import RegistrationModel

STORED = Path(__file__).parents[2] / "results" / "model_costs.json"  # in a clone


class Count(NamedTuple):
    """parameters; multiply_adds of one pair, on the way there; kept: bytes of one pair's step."""

    parameters: int
    multiply_adds: int
    kept: int


def laid_out(name: str, ndim: int, **options: Any) -> RegistrationModel:
    """`regkit.models.create` without memory for the weights: to be looked at, not to be called."""
    with torch.device("meta"), models._NothingDrawn():
        return models.create(name, ndim, **options)


def count(
    name: str, ndim: int, shape: Sequence[int], *, bf16: bool = False, **options: Any
) -> Count:
    """What `regkit.models.create(name, ndim, **options)` costs for one pair of images.

    Multiply-adds are those of convolutions, matrix products and attention, as
    torch.utils.flop_counter counts them (two operations each). Norms, activations, warps,
    interpolation and the products of neighbours (`regkit.blocks.local_correlation`) are left out.

    Kept is the memory of all tensors that a step with `mse` and `diffusion` holds for its way back,
    each storage once, without the parameters; where weights are turned into bfloat16, the copy
    counts. The gradient, the optimiser, and what is needed for a moment come on top. A tensor that
    is held in another way, such as the input of a part that is made again, counts only where some
    function saves it as well.

    Args:
        name, ndim, options: as of `create`, such as save_memory=True.
        shape: of the images, voxels.
        bf16: under autocast to bfloat16, as a recipe of this precision trains on a CPU.

    Raises:
        ValueError: as of `create`; a shape that is not `ndim` positive numbers.
    """
    check_shape(shape, ndim)
    model = laid_out(name, ndim, **options).train()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):  # shapes and types, but no numbers
            return _counted(model.to_empty(device="cpu"), shape, bf16)
    except DataDependentOutputException:  # `rigid_theta` looks at its spacing: with numbers, then
        return _counted(models.create(name, ndim, **options).train(), shape, bf16)


def _counted(model: RegistrationModel, shape: Sequence[int], bf16: bool) -> Count:
    held: dict[int, torch.UntypedStorage] = {}  # so that none is given to another tensor

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        held[storage._cdata] = storage
        return x

    moving, fixed = torch.rand(2, 1, 1, *shape)
    counter = FlopCounterMode(display=False, custom_mapping=_ON_CPU)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with counter, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            result = model(moving, fixed)
        losses.mse(result.moved, fixed) + losses.diffusion(result.disp)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = sum(storage.nbytes() for at, storage in held.items() if at not in weights)
    return Count(models.parameter_count(model), counter.get_total_flops() // 2, kept)


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    operations: int = sdpa_flop_count(q, k, v)
    return operations


# attention without a table of positions has a kernel of its own there, which PyTorch does not count
_ON_CPU: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention
}


def seconds(
    name: str,
    ndim: int,
    shape: Sequence[int],
    *,
    bf16: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
    **options: Any,
) -> float:
    """Seconds of one pair through a fresh model in use, on this CPU, after a small pair.

    Args:
        name, ndim, shape, bf16, options: as of `count`.
        channels_last: the weights lie in memory with the channels of a voxel side by side.
        compiled: by torch.compile, for this shape: after a pair of this shape, for which it is
            compiled. It needs a C++ compiler.
    """
    check_shape(shape, ndim)
    model = models.create(name, ndim, **options).eval()
    if channels_last:
        layout = torch.channels_last if ndim == 2 else torch.channels_last_3d
        model = model.to(memory_format=layout)  # type: ignore[call-overload]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        call = torch.compile(model) if compiled else model
        call(*torch.rand(2, 1, 1, *(shape if compiled else (32,) * ndim)))
        pair = torch.rand(2, 1, 1, *shape)
        start = time.perf_counter()
        call(*pair)
        return time.perf_counter() - start


class Cost(NamedTuple):
    """label: the model and its options in words. The rest as of `Count` and `seconds`.

    kept is None where a model has no save_memory, seconds where nobody has measured them.
    """

    label: str
    parameters: int
    multiply_adds: int
    kept: int | None
    seconds: float | None


def saves_memory(name: str, **options: Any) -> bool:
    """Whether a model has the option save_memory."""
    return "save_memory" in models._known_options(name, options)


def measured(
    name: str, shape: Sequence[int], *, save_memory: bool = False, bf16: bool = False
) -> Cost:
    """What a model costs for images of this shape, counted and measured here; a 2D one in 2D.

    Args:
        name, shape, bf16: as of `count`.
        save_memory: what is kept is that of a model with this option.

    Raises:
        ValueError: as of `count`; save_memory of a model that has none.
    """
    saving = {"save_memory": True} if save_memory else {}
    found = count(name, len(shape), shape, bf16=bf16, **saving)
    return Cost(name, *found, seconds(name, len(shape), shape, bf16=bf16))


def stored(*, save_memory: bool = False, bf16: bool = False, file: Path = STORED) -> list[Cost]:
    """What `studies/model_costs.py` found at 160x192x160, a row for each model and size of it.

    Raises:
        FileNotFoundError: the file is not there, as where the package is installed without a clone.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"results/{file.name} is not there, expected a clone of the repository; --measure "
            "counts and measures here."
        )
    held = json.loads(file.read_text(encoding="utf-8"))
    times = {row["label"]: row for row in held.get("seconds", {}).get("rows", [])}
    kept, taken = "kept" + "_saving" * save_memory + "_bf16" * bf16, "seconds" + "_bf16" * bf16
    return [
        Cost(
            row["label"],
            row["parameters"],
            row["multiply_adds"],
            row[kept],
            times.get(row["label"], {}).get(taken),
        )
        for row in held["counts"]["rows"]
    ]


def check_shape(shape: Sequence[int], ndim: int) -> None:
    """Raise ValueError unless it is `ndim` positive numbers."""
    if len(shape) != ndim or min(shape) < 1:
        raise ValueError(f"shape is {tuple(shape)}, expected {ndim} positive numbers of voxels.")
