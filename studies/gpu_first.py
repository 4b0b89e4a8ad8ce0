"""The first ten minutes on a GPU: what the book calls "not measured yet", the shortest first.

    make gpu-ten-minutes                                 # or, in Colab, with the environment there:
    make gpu-ten-minutes VENV=no PYTHON=python3

1. `studies/cost.py` of vxm and unfolding at 160x192x160: seconds and peak memory of a pair and of a
   training step, into results/vxm_cost_gpu.json and results/unfolding_cost_gpu.json.
2. `make bench` on the GPU, for four minutes at most, into results/bench-gpu.json.
3. In what is left, updates of the contest in 3D: `regkit benchmark sun2025-table1`, budget "gpu",
   into results/sun2025-table1_3d_gpu.json and runs/. `make gpu-results` goes on with it.

Each part is a process of its own, so that one which fails, or takes too long, costs no other. What
is there already is not measured again. Nothing of it has run on a GPU yet.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import common
import typer

from regkit.cli import NOT_FINISHED
from regkit.device import choose_device

BENCH = ("-m", "pytest", "benchmarks/bench.py", "--disable-warnings", "--quiet")
BENCH_MINUTES = 4.0
SPARE = 0.5  # minutes of the contest: what stands between two validations may take longer


def parts(device: str, budget: str, results: Path, runs: Path) -> dict[str, list[str]]:
    """Commands behind `python`, in order; --minutes is added to the last one."""
    costs = {
        f"cost of {model}": [
            "studies/cost.py", "--model", model, "--device", device,
            "--out", str(results / f"{model}_cost_gpu.json"),
        ]
        for model in ("vxm", "unfolding")
    }  # fmt: skip
    bench = [*BENCH, "--device", device, "--out", str(results / "bench-gpu.json")]
    contest = ["-m", "regkit", "benchmark", "sun2025-table1", "--ndim", "3", "--budget", budget]
    contest += ["--device", device, "--runs", str(runs)]
    contest += ["--out", str(results / f"sun2025-table1_3d_{budget}.json")]
    return {**costs, "bench": bench, "contest": contest}


def main(
    minutes: Annotated[float, typer.Option(help="For all of it.")] = 10.0,
    device: Annotated[str, typer.Option(help="cuda; cpu to rehearse.")] = "cuda",
    budget: Annotated[str, typer.Option(help="Of the contest.")] = "gpu",
    only: Annotated[list[str] | None, typer.Option(help="A part, by its name; repeat.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the files.")] = common.RESULTS,
    runs: Annotated[Path, typer.Option(help="Folder of the trainings.")] = common.RUNS,
) -> None:
    """What a GPU can say in ten minutes."""
    choose_device(device)  # that there is one
    commands = parts(device, budget, results, runs)
    common.check_names("only", only or (), commands)
    end = time.monotonic() + 60 * minutes
    for name, words in commands.items():
        left = (end - time.monotonic()) / 60
        if (only and name not in only) or left <= 0:
            continue
        if name == "bench":
            left = min(left, BENCH_MINUTES)
        if name == "contest":
            words = [*words, "--minutes", f"{max(left - SPARE, 0.1):.2f}"]
        start = time.monotonic()
        try:
            done = subprocess.run([sys.executable, *words], cwd=common.ROOT, timeout=60 * left)
            ended = {0: "done", NOT_FINISHED: "not finished"}.get(done.returncode, "failed")
        except subprocess.TimeoutExpired:
            ended = "stopped: its time is up"
        typer.echo(f"{name}: {ended}, {time.monotonic() - start:.0f} s", err=True)


if __name__ == "__main__":
    common.start(main)
