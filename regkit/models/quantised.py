"""Weights in 8 or 12 bits: whole numbers, times one scale for each output channel.

Rounding to the nearest of evenly spaced numbers, symmetric about 0, as network quantisation does
(Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018; one scale a channel: Krishnamoorthi, arXiv:1806.08342). Here it makes files
small; networks compute in float32.

In a file, a parameter of two or more axes is

    name         int8, in its shape        the numbers n, or with 12 bits n // 16
    name.scale   float32, (shape[0],)      the parameter is scale * n
    name.low     uint8, (numel + 1) // 2   with 12 bits: n % 16, two to a byte, the first one low

and any other is float16 under its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LARGEST = {8: 127, 12: 2047}  # bits -> the largest n
PARTS = (".scale", ".low")
FLOATS = ("F16", "BF16", "F32", "F64")


def pack(weights: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """What a file holds for these parameters. bits: 8 or 12."""
    tensors: dict[str, Tensor] = {}
    for key, weight in weights.items():
        if weight.ndim < 2 or weight.numel() == 0:
            tensors[key] = weight.to(torch.float16)
            continue
        per_channel = weight.float().flatten(1)
        scale = per_channel.abs().amax(1) / LARGEST[bits]
        steps = per_channel / torch.where(scale > 0, scale, 1)[:, None]
        n = steps.round().to(torch.int16).reshape(weight.shape)
        tensors[f"{key}.scale"] = scale
        if bits == 12:
            low = (n % 16).to(torch.uint8).flatten()
            low = torch.cat([low, low.new_zeros(low.numel() % 2)])
            tensors[f"{key}.low"] = low[::2] + 16 * low[1::2]
            n = n.div(16, rounding_mode="floor")
        tensors[key] = n.to(torch.int8)
    return tensors


def parameters(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The parameters among the tensors of a file, by type of number ("I8": packed) and shape.

    Raises:
        ValueError: tensors that `pack` does not write.
    """
    packed = {key for key, (kind, shape) in tensors.items() if kind == "I8" and len(shape) > 1}
    parts = {key + part for key in packed for part in PARTS}
    for key, (kind, shape) in tensors.items():
        if key not in packed and key not in parts and kind not in FLOATS:
            raise ValueError(f"{key} has numbers of type {kind}.")
        if key in packed:
            numel = torch.Size(shape).numel()
            low = tensors.get(f"{key}.low", ("U8", ((numel + 1) // 2,)))
            if tensors.get(f"{key}.scale") != ("F32", shape[:1]):
                raise ValueError(f"{key} has no scale for each channel.")
            if low != ("U8", ((numel + 1) // 2,)):
                raise ValueError(f"{key} has other low bits than its shape needs.")
    return {key: value for key, value in tensors.items() if key not in parts}


def read(file: Any, key: str, kind: str, names: frozenset[str]) -> Tensor:
    """A parameter of an open safetensors file in float32; a copy, which outlives the file.

    Args:
        file: opened by `safetensors.safe_open`.
        key, kind: of the parameter, from `parameters`.
        names: of all tensors of the file.
    """
    n: Tensor = file.get_tensor(key).to(torch.float32, copy=True)
    if kind != "I8":
        return n
    if f"{key}.low" in names:
        pairs = file.get_tensor(f"{key}.low")
        low = torch.stack([pairs % 16, pairs // 16], dim=1).flatten()[: n.numel()]
        n = 16 * n + low.reshape(n.shape)
    scale: Tensor = file.get_tensor(f"{key}.scale")
    return n * scale.reshape(-1, *[1] * (n.ndim - 1))
