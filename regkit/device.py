"""Where to compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


def free_memory(device: torch.device) -> int:
    """Bytes that may still be allotted: of the GPU, or of this machine and this process's limits.

    A large number where the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [1 << 62]
    with suppress(OSError, StopIteration, ValueError):  # Linux alone has these files
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        limits.append(1024 * int(available.split()[1]))
    with suppress(OSError, ValueError):  # of a container
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        limits.append(limit - int((group / "memory.current").read_text()))
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        if limit != resource.RLIM_INFINITY:
            limits.append(limit - pages * resource.getpagesize())
    return max(0, min(limits))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is exhausted, of a GPU or of the machine, as Python and PyTorch say it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # PyTorch has no class of its own for the machine's memory
    words = ("allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextmanager
def enough_memory(sentence: str) -> Iterator[None]:
    """Where the memory of the GPU or of the machine is exhausted, `sentence` says what helps.

    Raises:
        ValueError: with that sentence.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(sentence) from None
