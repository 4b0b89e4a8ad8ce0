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
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from regkit.device import is_out_of_memory
from regkit.files import staged
from regkit.messages import unknown
from regkit.models import quantised
from regkit.models.base import Registration, RegistrationModel
from regkit.models.cascade import Rcn, Vtn
from regkit.models.dense_unet import DenseUNet
from regkit.models.dilformer import Dilformer
from regkit.models.dual_prnet import DualPRNet
from regkit.models.fcn import Fcn
from regkit.models.h_sganet import HSGANet
from regkit.models.info import check_info
from regkit.models.options import check_options, option_types, short
from regkit.models.resnet import LinearResNet
from regkit.models.transmorph import TransMorph
from regkit.models.unfolding import Unfolding
from regkit.models.utsrmorph import UTSRMorph
from regkit.models.vit_v_net import ViTVNet
from regkit.models.voxelmorph import Vxm, VxmDiff, VxmStrided

__all__ = [
    "About",
    "Registration",
    "RegistrationModel",
    "about",
    "create",
    "load",
    "names",
    "parameter_count",
    "pretrained",
    "save",
]


_BASES: dict[str, Callable[..., RegistrationModel]] = {}  # what a cascade may be made of
_MODELS: dict[str, Callable[..., RegistrationModel]] = {
    "rigid_resnet34": functools.partial(LinearResNet, "rigid"),
    "affine_resnet34": functools.partial(LinearResNet, "affine"),
    "vxm1": VxmStrided,
    "vxm2": functools.partial(VxmStrided, decoder=(32, 32, 32, 32, 32, 16, 16)),
    "vxm": Vxm,
    "vxm_diff": VxmDiff,
    "dense_unet_eca": DenseUNet,
    "fcn": Fcn,
    "vtn": Vtn,
    "rcn": functools.partial(Rcn, _BASES),
    "dual_prnet": DualPRNet,
    "dilformer": Dilformer,
    "vit_v_net": ViTVNet,
    "transmorph": TransMorph,
    "utsrmorph": UTSRMorph,
    "h_sganet": HSGANet,
    "unfolding": Unfolding,
}
_BASES.update((name, make) for name, make in _MODELS.items() if name != "rcn")


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
        check_options(options, _known_options(name, options))
        model = _MODELS[name](ndim=ndim, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"options {short(options)} do not fit the model {name!r}: {str(error).rstrip('.')}."
        ) from None
    except (ArithmeticError, LookupError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"options {short(options)} do not fit the model {name!r}: no network can be made of "
            "them."
        ) from None
    model.name, model.options = name, options
    return model


def _known_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The types of a model's options; of a cascade, those of its base network as well."""
    types = option_types(_MODELS[name])
    if name == "rcn":
        base = options.get("base", "vtn")
        if isinstance(base, str) and base in _MODELS and base != name:
            types = option_types(_MODELS[base]) | types
    return types


def parameter_count(model: RegistrationModel) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def save(
    model: RegistrationModel,
    path: str | os.PathLike[str],
    half: bool = False,
    bits: int | None = None,
    **info: Any,
) -> None:
    """Write weights, name and options to one safetensors file.

    Args:
        model: made by `create` or `load`.
        path: the file. It is written beside its place and moved there when complete.
        half: keep weights in float16, three digits each, for half the file; `load` gives float32.
        bits: keep weights in 8 or 12 bits, for a quarter of the file or three eighths, see
            `regkit.models.quantised`. 12 round about as float16 does the largest weights.
        info: anything JSON can hold that a user of the weights should know: recipe, seed, spacing,
            orientation, metrics. Added to `model.info`.

    Raises:
        ValueError: the folder of `path` does not exist or cannot be written; other bits.
        OSError: the system refuses, such as a full disk.
    """
    if bits not in (None, *quantised.LARGEST) or (half and bits is not None):
        raise ValueError(f"bits is {bits!r}, expected 8, 12 or None, and None with half=True.")
    header = {"name": model.name, "ndim": model.ndim, "options": model.options}
    header["info"] = {**model.info, **info}
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(
            f"path is {path.name!r}, expected a file in a folder that exists and can be written."
        )
    weights = model.state_dict()
    if bits is not None:
        weights = quantised.pack(weights, bits)
    elif half:
        weights = {key: value.to(torch.float16) for key, value in weights.items()}
    weights = {key: value.contiguous() for key, value in weights.items()}
    content = to_bytes(weights, metadata={"regkit": json.dumps(header)})
    with staged(path.parent, "path") as folder:
        (folder / path.name).write_bytes(content)


def pretrained() -> list[str]:
    """Names of the shipped weights that `load` takes."""
    folder = resources.files("regkit") / "weights"
    return sorted(
        p.name.removesuffix(".safetensors")
        for p in folder.iterdir()
        if p.name.endswith(".safetensors")
    )


class About(NamedTuple):
    """What a weights file says of itself.

    name, ndim, options: as `create` takes them. info: see `save`. tensors: of each parameter the
    type of its numbers and its shape; packed ones are "I8", see `regkit.models.quantised`.
    """

    name: str
    ndim: int
    options: dict[str, Any]
    info: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]


def about(path_or_name: str | os.PathLike[str]) -> About:
    """What a weights file says of itself, checked, without reading its weights.

    Raises:
        FileNotFoundError: neither a file nor the name of shipped weights.
        ValueError: not a file of `save`, or one that says something of the wrong kind.
    """
    path = _weights_file(path_or_name)
    foreign = ValueError(
        f"path_or_name is {path.name!r}, expected a safetensors file written by regkit."
    )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})["regkit"]
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            stored = {k: (p.get_dtype(), tuple(p.get_shape())) for k, p in parts.items()}
        tensors = quantised.parameters(stored)
        header = json.loads(text)
        name, ndim, options, info = (header[k] for k in ("name", "ndim", "options", "info"))
    except PermissionError:
        raise ValueError(
            f"path_or_name is {path.name!r}, which may not be read; check its permissions."
        ) from None
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        raise foreign from None
    well_formed = (
        isinstance(name, str)
        and len(name) < 100
        and type(ndim) is int
        and isinstance(options, dict)
        and not {"name", "ndim"} & set(options)
        and isinstance(info, dict)
    )
    if not well_formed:
        raise foreign
    check_info(info, ndim, path.name)
    return About(name, ndim, options, info, tensors)


def _weights_file(path_or_name: str | os.PathLike[str]) -> Path:
    path = Path(path_or_name)
    if str(path_or_name) in pretrained():
        return Path(str(resources.files("regkit") / "weights" / f"{path_or_name}.safetensors"))
    if not path.is_file():
        raise FileNotFoundError(
            f"path_or_name is {path.name!r}, expected a weights file or one of "
            f"{', '.join(pretrained()) or 'the shipped weights (none here)'}."
        )
    return path


def load(path_or_name: str | os.PathLike[str], **options: Any) -> RegistrationModel:
    """A model with trained weights, in evaluation mode, on the CPU.

    The file may be a stranger's: what its header says is checked, and the network is laid out
    without memory and compared with the file, before anything is allotted. No random number is
    drawn.

    Args:
        path_or_name: a file written by `save`, or one of `pretrained()`.
        options: of the model, in place of those in the file, where its weights fit them: such as
            stages=5 for an `unfolding` of shared weights, or repeats=2 for an `rcn`.

    Raises:
        FileNotFoundError: neither a file nor the name of shipped weights.
        ValueError: not a file of `save`, or weights that do not fit the model it names.
    """
    path, header = _weights_file(path_or_name), about(path_or_name)
    misfit = ValueError(
        f"path_or_name is {path.name!r}: its weights do not fit the model {header.name!r} "
        "that it names."
    )
    try:
        with torch.device("meta"), _NothingDrawn(), _at_most(2 * len(header.tensors) + 1000):
            model = create(header.name, header.ndim, **{**header.options, **options})
            model.load_state_dict(
                {k: torch.empty(shape) for k, (_, shape) in header.tensors.items()}
            )
    except (RuntimeError, _TooMany) as error:  # names or shapes
        if is_out_of_memory(error):
            raise
        raise misfit from None
    with safetensors.safe_open(path, framework="pt") as file:
        stored = frozenset(file.keys())
        weights = {
            k: quantised.read(file, k, kind, stored) for k, (kind, _) in header.tensors.items()
        }
    model.load_state_dict(weights, assign=True)
    model.info = header.info
    return model.eval()


class _NothingDrawn(TorchFunctionMode):
    """Leaves out normal initial weights, which nobody reads where the network is only laid out.

    On the device "meta" they would import PyTorch's compiler, which takes two seconds.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.__name__.endswith("normal_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


class _TooMany(Exception):
    """A constructor makes more parameters than a file could hold."""


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stop a constructor in this thread that makes more parameters than `count`."""
    made, thread = 0, threading.get_ident()

    def watch(module: Any, name: str, parameter: Any) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > count:
            raise _TooMany

    handle = register_module_parameter_registration_hook(watch)
    try:
        yield
    finally:
        handle.remove()
