"""What the layers of a network make of their input, printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from regkit.models import Registration, RegistrationModel


@torch.no_grad()
def shapes(
    model: RegistrationModel, layers: Mapping[str, nn.Module], moving: Tensor, fixed: Tensor
) -> Registration:
    """Let a model register two images, and print what goes into each of some layers, and comes out.

    A hook on each layer, which is taken off again, notes the sizes, without the batch.

    Args:
        layers: name -> a layer of the model that takes and gives one tensor.
        moving, fixed: (B, 1, *S).

    Returns:
        What the model says of the pair.
    """

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            print(f"{name:12s} {tuple(inputs[0].shape[1:])!s:16s} -> {tuple(output.shape[1:])}")

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        result: Registration = model(moving, fixed)
    finally:
        for hook in hooks:
            hook.remove()
    return result
