"""Improve a displacement for one pair, by plain gradient descent on the displacement itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from regkit.losses import diffusion, lncc
from regkit.spatial import warp

P = ParamSpec("P")
R = TypeVar("R")
RATE = 0.2  # voxels per step, about
# Weight of the diffusion against lncc. At 1 the free displacement folds in 1 % of the voxels of two
# brain slices, at 4 in 0.1 %, with the same Dice; at 8 in none, and the Dice begins to fall.
SMOOTHNESS = 6.0


def with_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function` take gradients wherever it is called, `torch.inference_mode` included.

    A tensor that was made in inference mode takes part in no gradient: such arguments are copied.
    """

    call: Callable[..., R] = function  # a type checker cannot follow arguments through `usable`

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        def usable(x: Any) -> Any:
            return x.clone() if isinstance(x, Tensor) and x.is_inference() else x

        with torch.inference_mode(False), torch.enable_grad():
            return call(*map(usable, args), **{k: usable(v) for k, v in kwargs.items()})

    return wrapper


@with_gradients
def refine(
    moving: Tensor,
    fixed: Tensor,
    disp: Tensor,
    steps: int,
    smoothness: float = SMOOTHNESS,
    rate: float = RATE,
    progress: Callable[[float], None] | None = None,
    dissimilarity: Callable[[Tensor, Tensor], Tensor] = lncc,
) -> Tensor:
    """`steps` steps of Adam on every vector of `disp`, minimising

        dissimilarity(warp(moving, disp), fixed) + smoothness * diffusion(disp).

    Args:
        moving, fixed: (B, 1, *S).
        disp: (B, d, *S), voxels, where to start.
        steps: at least 0.
        smoothness: larger is smoother, and further from the images.
        rate: learning rate; Adam moves each vector by about this many voxels per step.
        progress: called with the fraction done, 0 to 1.
        dissimilarity: what is minimised of two images, see `regkit.losses`; `mutual_information`
            for two modalities. The default of `smoothness` is for lncc.

    Returns:
        (B, d, *S), voxels: the iterate with the lowest objective, so never worse than `disp`.
    """
    current = disp.detach().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([current], lr=rate)
    best, lowest = current.detach().clone(), float("inf")
    for step in range(steps + 1):
        objective = dissimilarity(warp(moving, current), fixed) + smoothness * diffusion(current)
        if objective.item() < lowest:
            best, lowest = current.detach().clone(), objective.item()
        if step == steps:
            break
        optimiser.zero_grad()
        objective.backward()
        optimiser.step()
        if progress is not None:
            progress((step + 1) / steps)
    return best
