"""Options of the benchmarks, and the file that a whole run leaves behind."""

import datetime
import json
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cpuinfo
import pytest
import torch

ROOT = Path(__file__).parents[1]
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


def _made(device: str) -> dict[str, object]:
    """How, from what, where and when."""
    if device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        brand = cpuinfo.get_cpu_info().get("brand_raw", platform.machine())
        threads = torch.get_num_threads()
        where = f"{brand}, {threads} thread{'s' if threads > 1 else ''}"
    changed = (
        "" if not _git("status", "--porcelain", "--", "regkit", "benchmarks") else " + changes"
    )
    return {
        "command": "make bench",
        "commit": _git("rev-parse", "HEAD") + (" with changes" if changed else ""),
        "date": datetime.date.today().isoformat(),
        "device": where,
        "python": platform.python_version(),
        "versions": _versions(),
    }


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, device: str) -> Iterator[dict[str, dict]]:
    """Rows by kind and name. Written at the end of a run in which nothing failed."""
    rows: dict[str, dict] = {"speed": {}, "memory": {}, "scaling": {}}
    yield rows
    out = request.config.getoption("--out")
    if out and not request.session.testsfailed:
        for row in rows["speed"].values():
            if "seconds" in row and "peer_seconds" in row:
                row["ratio"] = row["peer_seconds"] / row["seconds"]
        table = {kind: [_rounded(row) for row in rows[kind].values()] for kind in rows}
        Path(out).write_text(json.dumps(_made(device) | table, indent=1) + "\n")


def _rounded(row: dict) -> dict:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
