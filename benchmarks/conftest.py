"""Options of the benchmarks, and the file that a whole run leaves behind."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from regkit.record import device_name

ROOT = Path(__file__).parents[1]
LOAD = pytest.StashKey[float]()
ROWS = pytest.StashKey[dict]()
PACKAGES = ("torch", "monai", "numpy", "scipy", "pytest-benchmark")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to compute")
    parser.addoption("--threads", default=2, type=int, help="of torch; 1 on a busy machine")
    parser.addoption("--out", help="write the results there, as JSON")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    torch.set_num_threads(request.config.getoption("--threads"))
    return str(request.config.getoption("--device"))


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _made(config: pytest.Config, device: str) -> dict[str, object]:
    """How, from what, where, when; `load`: processes that wanted the processor at the start."""
    threads = config.getoption("--threads")
    changed = _git("status", "--porcelain", "--", "regkit", "benchmarks")
    return {
        "command": "make bench" if threads == 2 else f"make bench, with --threads {threads}",
        "commit": _git("rev-parse", "HEAD") + (" with changes" if changed else ""),
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "threads": threads,
        "load": config.stash[LOAD],
        "python": platform.python_version(),
        "versions": _versions(),
    }


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LOAD] = os.getloadavg()[0]
    config.stash[ROWS] = {"speed": {}, "memory": {}, "scaling": {}, "windows": {}}


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, device: str) -> Iterator[dict[str, dict]]:
    """Rows by kind and name. Written at the end of a run in which nothing failed."""
    rows = request.config.stash[ROWS]
    yield rows
    out = request.config.getoption("--out")
    if out and not request.session.testsfailed:
        table = {kind: [_rounded(row) for row in rows[kind].values()] for kind in rows}
        made = _made(request.config, device)
        Path(out).write_text(json.dumps(made | table, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Each operation beside its peer; pytest-benchmark's own table shows ours only."""
    for row in terminalreporter.config.stash[ROWS]["speed"].values():
        asked = f" (asked {row['asked']:.3g})" if row["asked"] else ""
        terminalreporter.write_line(
            f"{row['operation']}, {row['case']}: {1e3 * row['seconds']:.1f} ms, "
            f"{row['peer']}: {1e3 * row['peer_seconds']:.1f} ms, ratio {row['ratio']:.3g}{asked}"
        )


def _rounded(row: dict) -> dict:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
