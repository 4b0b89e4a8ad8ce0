"""Where to compute."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.nn import functional as F


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


def half_precision(device: torch.device) -> str:
    """The numbers of 16 bits to train with on a device: "bf16", "fp16", or "no" for float32.

    A GPU has bfloat16 from compute capability 8.0 on. Before that, as on a T4 (7.5), it is
    emulated, which `torch.cuda.is_bf16_supported` counts as supported; float16 is fast there, and
    training with it scales the loss. On the CPU bfloat16 where a convolution, tried once a process,
    takes clearly less time with it than in float32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if _bfloat16_is_faster() else "no"


@functools.cache
def _bfloat16_is_faster() -> bool:
    """Whether a convolution in bfloat16 takes under 0.7 of its time in float32, on this CPU.

    The fastest of five counts, in turns and by one thread: another busy process then hits both, or
    none. Processors that have bfloat16 take a quarter to a half of the time, others longer.
    """
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _, dtype in itertools.product(range(5), seconds):
            image = torch.ones(1, 32, 96, 96, dtype=dtype).to(memory_format=torch.channels_last)
            weight = torch.ones(32, 32, 3, 3, dtype=dtype)
            start = time.perf_counter()
            F.conv2d(image, weight, padding=1)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


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
