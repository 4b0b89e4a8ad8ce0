"""Runs each notebook alone in an empty folder, as somebody has it who opened it in Colab.

    python tests/alone.py WHEEL [NAMES]

To be run by a Python with the versions of tests/colab.txt and without regkit (`make colab-test`).
Before each notebook regkit is removed, so that its setup cell has to install it, from the wheel. A
package `google.colab` is there. The budget is REGKIT_BUDGET, by default smoke. What the setup cell
prints is printed, and the versions of what it must not touch are compared.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
COLAB = "import google.colab\n"  # a Colab kernel has imported it before the first cell


def kept() -> dict[str, str]:
    """The versions of what regkit must not replace."""
    listed = (Path(__file__).parent / "colab.txt").read_text(encoding="utf-8").splitlines()
    names = [line.split("==")[0] for line in listed if line and not line.startswith("#")]
    return {name: metadata.version(name) for name in names}


def run(path: Path, standin: Path) -> str:
    """Execute a copy of one notebook in a new folder; what its setup cell prints."""
    subprocess.run(
        [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "regkit-course"], check=True
    )
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, folder)
        NotebookClient(
            notebook,
            timeout=1200,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
        ).execute(env=os.environ | {"PYTHONPATH": str(standin)})
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    return "".join(output.get("text", "") for output in first.outputs)


def main(wheel: str, names: list[str]) -> None:
    """Run the notebooks whose names begin with one of `names`, by default all."""
    os.environ["REGKIT_REPOSITORY"] = str(Path(wheel).resolve(strict=True))
    os.environ.setdefault("REGKIT_BUDGET", "smoke")
    for name in ("PYTHONPATH", "REGKIT_HOME"):
        os.environ.pop(name, None)
    before = kept()
    print(f"Python {sys.version.split()[0]}, torch {before['torch']}, numpy {before['numpy']}")
    with tempfile.TemporaryDirectory() as folder:
        standin = Path(folder)
        (standin / "google" / "colab").mkdir(parents=True)
        (standin / "google" / "colab" / "__init__.py").touch()
        (standin / "sitecustomize.py").write_text(COLAB, encoding="utf-8")
        for path in sorted(NOTEBOOKS.glob("*.ipynb")):
            if path.name.startswith(tuple(names) or ""):
                start = time.perf_counter()
                said = run(path, standin)
                print(f"\n{path.name}: {time.perf_counter() - start:.0f} s\n{said.rstrip()}")
    changed = {name: now for name, now in kept().items() if now != before[name]}
    if changed:
        sys.exit(f"The setup cell has replaced {changed}.")
    print("\nAll of them ran, and nothing of tests/colab.txt was replaced.")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
