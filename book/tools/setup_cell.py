"""The first code cell of a chapter, as a reader gets it.

In the text of a chapter the cell has two lines, for regkit is there. A reader may have one file,
opened in Colab or in any folder: this longer cell finds the library, or installs it.
"""

import json
from collections.abc import Mapping
from string import Template

WANTED = "0.3.0"  # the oldest version that has all that the chapters call

TEMPLATE = Template(r'''# @title Setup: find regkit or install it, and say where this chapter runs
import importlib
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.version import Version

WANTED = "$wanted"  # this version of regkit, or a newer one
SOURCE = os.environ.get("REGKIT_REPOSITORY") or "$address"


class SetupError(Exception):
    """Shown as one sentence, without the lines of code that led to it."""

    def _render_traceback_(self):
        return [f"Setup stopped: {self}"]


def install(source):
    """Install regkit from a repository, or from a file or folder of this machine."""
    if not source:
        raise SetupError(
            "regkit is not installed here, and this notebook knows no address to install it from: "
            'run pip install ".[notebook]" in a copy of the project, or set REGKIT_REPOSITORY.'
        )
    if "://" not in source:
        source = Path(source).resolve().as_uri()
    elif source.startswith("https://") and not source.endswith(".whl"):
        source = f"git+{source}"
    print(f"Installing regkit from {source}, which may take some minutes.")
    here = {d.name: d.version for d in metadata.distributions()}
    few = {name: here[name] for name in ("numpy", "torch") if name in here}
    for kept in (here, few):  # all that is here stays, or, where that cannot be, at least these two
        with TemporaryDirectory() as folder:
            file = Path(folder, "stay.txt")
            file.write_text("\n".join(f"{name}=={version}" for name, version in kept.items()))
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(file)]
            pip.append(f"regkit-course[notebook] @ {source}")
            done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode == 0:
            importlib.invalidate_caches()
            return
    said = [line for line in done.stderr.splitlines() if "fatal: " in line or "ERROR: " in line]
    reason = said[0].strip() if said else "without a reason"
    raise SetupError(f"pip could not install regkit from {source} ({reason}).")


above = [Path.cwd(), *Path.cwd().parents]
checkout = next((folder for folder in above if (folder / "regkit/book").is_dir()), None)
if checkout:
    sys.path.insert(0, str(checkout))
elif not any(d.name == "regkit-course" for d in metadata.distributions()):
    install(SOURCE)

import regkit

if Version(regkit.__version__) < Version(WANTED):
    raise SetupError(
        f"this chapter wants regkit {WANTED} or newer, and {regkit.__version__} is here: update "
        "it (git pull in a copy of the project, else pip uninstall regkit-course), restart the "
        "kernel and run this cell again."
    )
try:
    import regkit.book
except ImportError as error:
    raise SetupError(
        f'regkit misses something ({error}): run pip install -e ".[notebook]" in a copy of the '
        "project, and restart the kernel."
    ) from None

regkit.book.setup("$chapter"$seconds)
''')


def source(chapter: str, address: str = "", seconds: Mapping[str, int] | None = None) -> str:
    """The code of the cell.

    Args:
        chapter: its number, such as "08".
        address: what pip installs the library from, such as
            "git+https://github.com/NAME/REPOSITORY@main"; "" where nobody knows.
        seconds: how long the chapter takes, by budget, such as {"cpu": 519}.
    """
    known = f", seconds={json.dumps(dict(seconds))}" if seconds else ""
    cell = TEMPLATE.substitute(wanted=WANTED, address=address, chapter=chapter, seconds=known)
    return cell.removesuffix("\n")
