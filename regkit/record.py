"""How a number was made, and the file that keeps it.

- `how_made` says with what command, on what processor, from which code, when, and with which
  versions; `made_now` is the part of it that a single row carries.
- `peak_memory` and `peak_inside` measure the memory of this process, `peak_bytes` what a call
  allots, `timed` how long it takes.
- `rounded` cuts numbers to the digits that mean something.
- `Rows` keeps rows of measurements in a JSON file that is complete at every moment, so that a study
  that was stopped goes on where it was.

Everything that writes a file of results/ uses these words: `device` is the name of the processor or
of the GPU, such as "AMD EPYC"; memory is in GB of 1e9 bytes.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import regkit
from regkit.files import alone, check_writable, staged

CODE = ("regkit", "studies", "benchmarks", "data_scripts")  # what numbers are computed by

Row = dict[str, Any]

# ------------------------------------------------------------------------------------ provenance


def how_made(
    command: str,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    seed: int | None = None,
    packages: Sequence[str] = (),
) -> Row:
    """What a file of results says of itself: `command`, `made_now`, `seed` if given, `versions`.

    Args:
        command: see `typed_command`.
        device, threads: see `made_now`.
        packages: whose versions count beside those of Python, regkit and torch, by the names they
            are installed under. One that is not installed is left out.
    """
    versions = {
        "python": platform.python_version(),
        "regkit": regkit.__version__,
        "torch": torch.__version__,
    }
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    drawn = {} if seed is None else {"seed": seed}
    return {"command": command, **made_now(device, threads), **drawn, "versions": versions}


def made_now(device: torch.device | str = "cpu", threads: int | None = None) -> Row:
    """Where, from what, and when: device, threads (by default torch's), load, commit and date.

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


def typed_command(program: str) -> str:
    """The command as it was typed after `program`; of a path only the last part.

    program: such as "regkit" or "python studies/lung.py"; sys.argv[0] is a path of one machine.
    """
    return " ".join([program, *(shlex.quote(_without_folders(word)) for word in sys.argv[1:])])


def _without_folders(word: str) -> str:
    """A word of a command; "--out=runs/a.json" becomes "--out=a.json"."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return option + equals + (Path(value).name or value)


def device_name(device: torch.device | str = "cpu") -> str:
    """The name of the processor, or of the GPU that is named."""
    if _on_gpu(device):
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _on_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def commit() -> str | None:
    """The commit of the code that runs, with " with changes" behind it where the code was changed.

    None where the package is not tracked by git, as when it is installed.
    """
    file = Path(__file__)

    def git(folder: Path, *words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git(file.parent, "ls-files", "--error-unmatch", file.name)
        changed = git(file.parents[1], "status", "--porcelain", "--", *CODE)
        return git(file.parent, "rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def fingerprint(file: str | os.PathLike[str], digits: int = 12) -> str | None:
    """The first digits of the sha256 of a file: another file has another one. None without a file.

    file: a path, or the name of shipped weights.
    """
    path = Path(file)
    shipped = Path(__file__).parent / "weights" / f"{path.name}.safetensors"
    if str(path) == path.name and shipped.is_file():  # a name without folders
        path = shipped
    return hashlib.sha256(path.read_bytes()).hexdigest()[:digits] if path.is_file() else None


def rounded(value: Any, digits: int | None = 4) -> Any:
    """The same, as JSON can hold it: floats cut to some digits, None where one is not finite.

    Goes through dictionaries, lists and tuples (which become lists). Other values stay.

    Args:
        digits: significant ones; None keeps them all.
    """
    if isinstance(value, Mapping):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry, digits) for entry in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value


# ------------------------------------------------------------------------------- memory and time


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


@dataclass
class Peak:
    """gigabytes: 1e9 bytes; NaN until the block has ended, and where it is unknown."""

    gigabytes: float = math.nan


@contextmanager
def peak_inside(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """The peak memory of what is done inside the block; it is there when the block has ended.

    On a GPU what PyTorch had allotted there. Else what the whole process held, with PyTorch itself
    and the images; where the system, other than Linux, cannot forget an earlier peak, that one.
    """
    if _on_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM is what is held now
    peak = Peak()
    yield peak
    on_gpu = _on_gpu(device)
    peak.gigabytes = torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else peak_memory()


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most that was allocated at once during a call, beyond what was there before it.

    On the CPU the allocator of torch and that of NumPy are watched, and the larger peak counts.
    """
    run()  # what is made once and kept does not count
    if _on_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    tracemalloc.start()
    run()
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    profiler: Any = watched.profiler
    events = profiler.kineto_results.events()
    steps = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    size = torch_peak = 0
    for _, step in steps:  # a release counts negative
        size += step
        torch_peak = max(torch_peak, size)
    return max(torch_peak, numpy_peak)


def timed(run: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    if _on_gpu(device):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------- files


def write_json(file: Path, table: Mapping[str, Any]) -> None:
    """Write a file of results, whole or not at all; a number that is not finite becomes null."""
    text = json.dumps(rounded(table, None), indent=1, allow_nan=False)
    with staged(file.parent) as folder:
        (folder / file.name).write_text(text + "\n", encoding="utf-8")


class Rows:
    """Rows of measurements in a JSON file, which is complete at every moment.

    Each change reads the file anew, while no other process changes it, and replaces it in one step:
    a process may be killed at any time, and several may fill one file.

    Args:
        file: to read and write; it need not be there yet.
        key: the fields that tell rows apart. A new row takes the place of the one with the same.
        fields: what the file says beside its rows, such as `made`. Other fields of it stay.
        fresh: begin anew; what the file holds is lost with the first row.
        within: the field of the file that holds these rows; by default the file itself.
        derive: what follows from all rows, computed at each change and put beside them. It may
            also say `rows`, in another order for instance.

    Raises:
        ValueError: the file holds something else, or its folder cannot be written.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        key: Sequence[str],
        fields: Mapping[str, Any] | None = None,
        *,
        fresh: bool = False,
        within: str | None = None,
        derive: Callable[[list[Row]], Mapping[str, Any]] | None = None,
    ):
        self.file, self.key, self.fields = Path(file), tuple(key), dict(fields or {})
        self._fresh, self._within, self._derive = fresh, within, derive
        check_writable(self.file.parent)
        self.table = self._read()

    @property
    def rows(self) -> list[Row]:
        """As they were when this process last looked."""
        rows: list[Row] = _place(self.table, self._within).get("rows", [])
        return rows

    def has(self, settings: Mapping[str, Any]) -> bool:
        """Whether there is a row with this key, measured with these settings."""
        row, wanted = self._same(settings), rounded(settings, None)
        return row is not None and wanted.items() <= row.items()

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row, in the place of the one with the same key."""
        with self._changed() as rows:
            old = self._same(row)
            place = len(rows) if old is None else rows.index(old)
            rows[place : place + 1] = [rounded(row, None)]

    def remove(self, settings: Mapping[str, Any]) -> None:
        """Take out the row with this key, if there is one."""
        if self._same(settings) is not None:
            with self._changed() as rows:
                rows[:] = [row for row in rows if row != self._same(settings)]

    def put(self, **fields: Any) -> None:
        """Write other fields of the file."""
        self.fields |= fields
        with self._changed():
            pass

    def _same(self, settings: Mapping[str, Any]) -> Row | None:
        """The row with this key."""
        key = [rounded(settings.get(name), None) for name in self.key]
        same = (row for row in self.rows if [row.get(name) for name in self.key] == key)
        return next(same, None)

    @contextmanager
    def _changed(self) -> Iterator[list[Row]]:
        """The rows of the file as it is now, to be changed; they are written at the end."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with alone(self.file.parent, "out", work=self.file.name):
            self.table = self._read()
            rows = list(self.rows)
            yield rows
            derived = self._derive(rows) if self._derive else {}
            place = {**_place(self.table, self._within), **derived}
            place["rows"] = derived.get("rows", rows)
            table = {**self.table, self._within: place} if self._within else place
            table = rounded({**self.fields, **table, **self.fields}, None)
            write_json(self.file, table)
            self.table, self._fresh = table, False

    def _read(self) -> Row:
        """What the file holds, but for what is to be lost."""
        if not self.file.exists() or (self._fresh and not self._within):
            return {}
        try:
            table = json.loads(self.file.read_text(encoding="utf-8"))
            rows = _place(table, self._within).get("rows", [])
            if not all(isinstance(row, dict) for row in rows):
                raise TypeError
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f"out is {self.file.name!r}, which holds something else, expected a results file "
                "or none."
            ) from None
        if self._fresh:
            table.pop(self._within, None)
        return dict(table)


def _place(table: Row, within: str | None) -> Row:
    """The part of a results file that holds the rows."""
    place: Row = table.get(within, {}) if within else table
    return place
