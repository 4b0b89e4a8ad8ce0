"""Where to compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def choose_device(device: str) -> torch.device:
    """The device of that name. "auto" is a GPU where there is one.

    Raises:
        ValueError: an unknown name, or CUDA where PyTorch sees no such GPU.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, expected 'auto', 'cpu' or 'cuda'.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {device!r} and PyTorch sees no such GPU here, expected 'cpu' or 'auto'."
        )
    return chosen


@contextmanager
def enough_memory(sentence: str) -> Iterator[None]:
    """Where the memory of the GPU is exhausted, `sentence` says what came and what helps.

    Raises:
        ValueError: with that sentence.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise ValueError(sentence) from None
