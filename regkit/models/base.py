"""What every model has in common: its call, its result, its file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regkit.spatial import pad_to_multiple, warp


@dataclass(frozen=True, eq=False)
class Registration:
    """The answer of a model. All tensors live on the grid of the fixed image.

    moved: (B, C, *S), the moving image looked up through `disp`.
    disp: (B, d, *S), voxels, moved(x) = moving(x + disp(x)).
    svf: (B, d, *S), voxels per unit time, of models that integrate one: disp ~ integrate(svf).
    theta: (B, d, d+1), of models that estimate an affine map.
    stages: the displacements of its intermediate steps, or tuples of them: the model's docstring
        says which.
    steps: (B, d, *S) each, voxels, of models that compose `disp` of steps: what each one adds.
    logits: (B, classes, *S), of models that also segment: of the moving image, on its own grid, and
        of the fixed one. Their softmax along axis 1 are probabilities; class 0 is the background.
    """

    moved: Tensor
    disp: Tensor
    svf: Tensor | None = None
    theta: Tensor | None = None
    stages: tuple[Any, ...] = ()
    steps: tuple[Tensor, ...] = ()
    logits: tuple[Tensor, ...] = ()


class RegistrationModel(nn.Module):
    """Base of all networks: model(moving, fixed) -> Registration, for images of any size.

    A subclass implements `estimate`, which sees images padded to a multiple of `divisor`. Set by
    `regkit.models.create`: `name` and `options`; by `load`: `info`, what the file says of the
    training (spacing, orientation, recipe, seed, ...). `levels`: how many `stages` its answer has
    that go from coarse to fine, each found on half as many voxels along each axis as the next.
    """

    divisor: int = 1
    levels: int = 0
    name: str = ""

    def __init__(self, ndim: int):
        super().__init__()
        if ndim not in (2, 3):
            raise ValueError(f"ndim is {ndim!r}, expected 2 or 3.")
        self.ndim = ndim
        self.options: dict[str, Any] = {}
        self.info: dict[str, Any] = {}

    def estimate(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        """`disp`, and any other field of `Registration` but `moved`, for padded images."""
        raise NotImplementedError(f"{type(self).__name__} does not define estimate.")

    def forward(self, moving: Tensor, fixed: Tensor) -> Registration:
        self._check(moving, fixed)
        answer = self.estimate_any_size(moving, fixed)
        return Registration(moved=warp(moving, answer["disp"]), **answer)

    def estimate_any_size(self, moving: Tensor, fixed: Tensor) -> dict[str, Any]:
        """`estimate` for images of any size: pads them, and cuts back the answer."""
        padded_moving, crop = pad_to_multiple(moving, self.divisor)
        padded_fixed, _ = pad_to_multiple(fixed, self.divisor)
        # numpy's float64 meets the float32 of the weights
        dtype = next(self.parameters(), moving).dtype
        answer = self.estimate(padded_moving.to(dtype), padded_fixed.to(dtype))

        def cut(x: Tensor) -> Tensor:
            return crop(x).contiguous()

        for key in ("disp", "svf"):
            if answer.get(key) is not None:
                answer[key] = cut(answer[key])
        for key in ("stages", "steps", "logits"):
            answer[key] = tuple(
                cut(stage) if isinstance(stage, Tensor) else tuple(map(cut, stage))
                for stage in answer.get(key, ())
            )
        return answer

    def _check(self, moving: Tensor, fixed: Tensor) -> None:
        expected = "(B, 1, H, W)" if self.ndim == 2 else "(B, 1, D, H, W)"
        for name, image in (("moving", moving), ("fixed", fixed)):
            if image.ndim != self.ndim + 2 or image.shape[1] != 1:
                colour = image.ndim == self.ndim + 2 and image.shape[1] in (3, 4)
                raise ValueError(
                    f"{name} has shape {tuple(image.shape)}, expected {expected} "
                    f"for this {self.ndim}D model"
                    + (": of a colour picture one channel." if colour else ".")
                )
            if not image.is_floating_point():
                raise ValueError(f"{name} is {image.dtype}, expected a floating point image.")
            # in training the loop stops on a loss that is not finite, without a look at each image
            # and a compiled graph does not branch on values
            look = not self.training and not torch.compiler.is_compiling()
            if look and not torch.isfinite(image).all():
                raise ValueError(f"{name} holds NaN or infinity, expected finite intensities.")
        if moving.shape != fixed.shape:
            raise ValueError(
                f"moving has shape {tuple(moving.shape)} and fixed {tuple(fixed.shape)}, "
                "expected the same grid (regkit.register brings two scans to one)."
            )
