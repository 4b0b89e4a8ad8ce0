"""The first code cell of a chapter, as a reader gets it.

In the text of a chapter the cell has two lines, for regkit is there. A reader may have one file,
opened in Colab or in any folder: this longer cell finds the library, or installs it.
"""

import json
from collections.abc import Mapping

WANTED = "0.3.0"  # the oldest version that has all that the chapters call

TEMPLATE = '''\
# @title Setup: find regkit or install it, and say where this chapter runs
import importlib
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.version import Version

WANTED = "{wanted}"  # this version of regkit, or a newer one
SOURCE = os.environ.get("REGKIT_REPOSITORY") or "{address}"


class SetupError(Exception):
    """Shown as one sentence, without the lines of code that led to it."""

    def _render_traceback_(self):
        return [f"Setup stopped: {{self}}"]


def install(source):
    """Install regkit from a repository, or from a file or folder of this machine."""
    if not source:
        raise SetupError(
            "regkit is not installed here and this notebook names no repository of it: run "
            'pip install ".[notebook]" in a copy of the project, or set REGKIT_REPOSITORY to its '
            "address, then restart the kernel."
        )
    if "://" not in source:
        source = Path(source).resolve().as_uri()
    elif source.startswith("https://") and not source.endswith(".whl"):
        source = f"git+{{source}}"
    print(f"Installing regkit from {{source}}, which takes a minute or two.")
    here = metadata.distributions()
    stay = [f"{{d.name}}=={{d.version}}" for d in here if d.name in ("numpy", "torch")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *stay]
    done = subprocess.run(
        [*pip, f"regkit-course[notebook] @ {{source}}"], capture_output=True, text=True
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error:" in line.lower()]
        raise SetupError(
            f"pip could not install regkit from {{source}} ({{said[0] if said else 'no reason given'}}): "
            "look at the network and at the address, then run this cell again."
        )
    importlib.invalidate_caches()


folders = [Path.cwd(), *Path.cwd().parents]
checkout = next((folder for folder in folders if (folder / "regkit/book.py").is_file()), None)
if checkout:
    sys.path.insert(0, str(checkout))
else:
    try:
        metadata.version("regkit-course")
    except metadata.PackageNotFoundError:
        install(SOURCE)

try:
    import regkit

    old = Version(regkit.__version__) < Version(WANTED)
    if not old:
        import regkit.book
except ImportError as error:
    raise SetupError(
        f"regkit needs what is not installed here ({{error}}): run pip install -e "
        f'".[notebook]" in {{checkout or "a copy of the project"}}, then restart the kernel.'
    ) from None
if old:
    raise SetupError(
        f"this chapter wants regkit {{WANTED}} or newer, and {{regkit.__version__}} is here: update it "
        "(git pull in a copy of the project, else pip uninstall regkit-course), then restart the "
        "kernel."
    )

regkit.book.setup("{chapter}"{seconds})
'''


def source(chapter: str, address: str = "", seconds: Mapping[str, int] | None = None) -> str:
    """The code of the cell.

    Args:
        chapter: its number, such as "08".
        address: what pip installs the library from, such as
            "git+https://github.com/NAME/REPOSITORY@main"; "" where nobody knows.
        seconds: how long the chapter takes, by budget, such as {"cpu": 519}.
    """
    known = f", seconds={json.dumps(dict(seconds))}" if seconds else ""
    return TEMPLATE.format(
        wanted=WANTED, address=address, chapter=chapter, seconds=known
    ).removesuffix("\n")
