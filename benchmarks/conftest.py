"""Options of the benchmarks, and the file that a whole run leaves behind."""

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from regkit.record import how_made, rounded, write_json

MADE = pytest.StashKey[dict]()
ROWS = pytest.StashKey[dict]()
PACKAGES = ("monai", "numpy", "scipy", "pytest-benchmark")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to compute")
    parser.addoption("--threads", default=2, type=int, help="of torch; 1 on a busy machine")
    parser.addoption("--out", help="write the results there, as JSON")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    torch.set_num_threads(request.config.getoption("--threads"))
    return str(request.config.getoption("--device"))


def pytest_configure(config: pytest.Config) -> None:
    """How the numbers are made is noted before the first of them keeps the processor busy."""
    threads = config.getoption("--threads")
    command = "make bench" if threads == 2 else f"make bench, with --threads {threads}"
    config.stash[MADE] = how_made(
        command, config.getoption("--device"), threads, packages=PACKAGES
    ) | {"python": platform.python_version()}
    config.stash[ROWS] = {"speed": {}, "memory": {}, "scaling": {}, "windows": {}}


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, device: str) -> Iterator[dict[str, dict]]:
    """Rows by kind and name. Written at the end of a run in which nothing failed."""
    rows = request.config.stash[ROWS]
    yield rows
    out = request.config.getoption("--out")
    if out and not request.session.testsfailed:
        table = {kind: rounded(list(rows[kind].values())) for kind in rows}
        write_json(Path(out), request.config.stash[MADE] | table)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Each operation beside its peer; pytest-benchmark's own table shows ours only."""
    for row in terminalreporter.config.stash[ROWS]["speed"].values():
        asked = f" (asked {row['asked']:.3g})" if row["asked"] else ""
        terminalreporter.write_line(
            f"{row['operation']}, {row['case']}: {1e3 * row['seconds']:.1f} ms, "
            f"{row['peer']}: {1e3 * row['peer_seconds']:.1f} ms, ratio {row['ratio']:.3g}{asked}"
        )
