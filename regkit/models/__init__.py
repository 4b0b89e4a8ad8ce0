"""The models by name: create them, save them, load them.

>>> from regkit import models
>>> model = models.create("vxm", ndim=2)
>>> result = model(moving, fixed)  # (B, 1, H, W) both  # doctest: +SKIP
>>> result.moved, result.disp  # doctest: +SKIP

Weights travel as safetensors: numbers and a text header, nothing that can run.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as to_bytes

from regkit.models.base import Registration, RegistrationModel
from regkit.models.cascade import Rcn, Vtn
from regkit.models.dense_unet import DenseUNet
from regkit.models.dilformer import Dilformer
from regkit.models.dual_prnet import DualPRNet
from regkit.models.fcn import Fcn
from regkit.models.resnet import LinearResNet
from regkit.models.unfolding import Unfolding
from regkit.models.voxelmorph import Vxm, VxmDiff, VxmStrided
from regkit.names import unknown

__all__ = [
    "Registration",
    "RegistrationModel",
    "create",
    "load",
    "names",
    "parameter_count",
    "pretrained",
    "save",
]


def _vxm2(ndim: int = 3, **options: Any) -> VxmStrided:
    return VxmStrided(ndim, **{"decoder": (32, 32, 32, 32, 32, 16, 16), **options})


def _rcn(ndim: int = 3, **options: Any) -> Rcn:
    return Rcn({name: make for name, make in _MODELS.items() if name != "rcn"}, ndim, **options)


_MODELS: dict[str, Callable[..., RegistrationModel]] = {
    "rigid_resnet34": functools.partial(LinearResNet, "rigid"),
    "affine_resnet34": functools.partial(LinearResNet, "affine"),
    "vxm1": VxmStrided,
    "vxm2": _vxm2,
    "vxm": Vxm,
    "vxm_diff": VxmDiff,
    "dense_unet_eca": DenseUNet,
    "fcn": Fcn,
    "vtn": Vtn,
    "rcn": _rcn,
    "dual_prnet": DualPRNet,
    "dilformer": Dilformer,
    "unfolding": Unfolding,
}


def names() -> list[str]:
    """The names that `create` takes."""
    return list(_MODELS)


def create(name: str, ndim: int = 3, **options: Any) -> RegistrationModel:
    """A fresh model with the identity as its first answer.

    Args:
        name: one of `names()`.
        ndim: 2 or 3.
        options: keyword arguments of the model's class.

    Raises:
        ValueError: unknown name (the nearest is suggested), ndim or option.
    """
    if name not in _MODELS:
        raise unknown("name", name, names())
    if ndim not in (2, 3):
        raise ValueError(f"ndim is {ndim!r}, expected 2 or 3.")
    try:
        model = _MODELS[name](ndim=ndim, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"options {options} do not fit the model {name!r}: {str(error).rstrip('.')}."
        ) from None
    model.name, model.options = name, options
    return model


def parameter_count(model: RegistrationModel) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def save(
    model: RegistrationModel, path: str | os.PathLike, half: bool = False, **info: Any
) -> None:
    """Write weights, name and options to one safetensors file.

    Args:
        model: made by `create` or `load`.
        path: the file. It is written beside its place and moved there when complete.
        half: keep weights in float16, three digits each, for half the file; `load` gives float32.
        info: anything JSON can hold that a user of the weights should know: recipe, seed, spacing,
            orientation, metrics. Added to `model.info`.
    """
    header = {"name": model.name, "ndim": model.ndim, "options": model.options}
    header["info"] = {**model.info, **info}
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    dtype = torch.float16 if half else None
    weights = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items()}
    try:
        partial.write_bytes(to_bytes(weights, metadata={"regkit": json.dumps(header)}))
        partial.replace(path)
    except (OSError, safetensors.SafetensorError):
        partial.unlink(missing_ok=True)
        raise ValueError(
            f"path is {path.name!r}, expected a file in a folder that exists and can be written."
        ) from None


def pretrained() -> list[str]:
    """Names of the shipped weights that `load` takes."""
    folder = resources.files("regkit") / "weights"
    return sorted(
        p.name.removesuffix(".safetensors")
        for p in folder.iterdir()
        if p.name.endswith(".safetensors")
    )


def load(path_or_name: str | os.PathLike, **options: Any) -> RegistrationModel:
    """A model with trained weights, in evaluation mode, on the CPU.

    Args:
        path_or_name: a file written by `save`, or one of `pretrained()`.
        options: of the model, in place of those in the file, where its weights fit them: such as
            stages=5 for an `unfolding` of shared weights, or repeats=2 for an `rcn`.

    Raises:
        FileNotFoundError: neither a file nor the name of shipped weights.
        ValueError: not a file of `save`, or weights that do not fit the model it names.
    """
    path = Path(path_or_name)
    if str(path_or_name) in pretrained():
        path = Path(str(resources.files("regkit") / "weights" / f"{path_or_name}.safetensors"))
    elif not path.is_file():
        raise FileNotFoundError(
            f"path_or_name is {path.name!r}, expected a weights file or one of "
            f"{', '.join(pretrained()) or 'the shipped weights (none here)'}."
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["regkit"])
            name, ndim, held, info = (header[k] for k in ("name", "ndim", "options", "info"))
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(
            f"path_or_name is {path.name!r}, expected a safetensors file written by regkit."
        ) from None
    model = create(name, ndim, **{**held, **options})
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(
            f"path_or_name is {path.name!r}: its weights do not fit the model "
            f"{name!r} that it names."
        ) from None
    model.info = info
    return model.eval()


def describe(path_or_name: str | os.PathLike) -> dict[str, Any]:
    """What a weights file says of itself: name, ndim, options and info, without its weights.

    Arguments and errors as of `load`.
    """
    path = Path(path_or_name)
    if str(path_or_name) in pretrained():
        path = Path(str(resources.files("regkit") / "weights" / f"{path_or_name}.safetensors"))
    with safetensors.safe_open(path, framework="pt") as file:
        said: dict[str, Any] = json.loads((file.metadata() or {})["regkit"])
    return said
