"""PyTorch's base of functions with a gradient of their own, with a type for its `apply`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch


class Function(torch.autograd.Function):
    """`torch.autograd.Function`; PyTorch's own `apply` has no type."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Any: ...
