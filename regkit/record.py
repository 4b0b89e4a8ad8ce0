"""How a number was made: on what, from which code, when, and with how much memory.

Everything that writes a file of results/ says so in these words. `device` is always the name of the
processor or of the GPU, such as "AMD EPYC"; threads and other things have keys of their own.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def made_now(device: torch.device | str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """Where, from what, and when: device, threads, load, commit and date.

    load: processes that wanted the processor in the last minute. None where the system has no such
        number; nor has `commit` one outside a git checkout.
    """
    return {
        "device": device_name(device),
        "threads": threads or torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: torch.device | str = "cpu") -> str:
    """The name of the processor, or of the GPU that is named."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the code that runs, if it is a git checkout; and whether it was changed."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + " with changes" * bool(git("status", "--porcelain", "."))
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory() -> float:
    """The most memory this process has held at once, in GB of 1e9 bytes; NaN where unknown.

    On Linux VmHWM of /proc/self/status: with Python, PyTorch and the images, and since the program
    was started. `getrusage` would hand on the peak of the process that started it. Elsewhere there
    is only that.
    """
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1]) / 1e9  # the file says kB and means 1024 bytes
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
