"""Files of `regkit.widgets` that pages load: a build copies them to _static/ at its beginning."""

import shutil
from collections.abc import Mapping
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "regkit" / "widgets"


def copy_to_static(app, files: Mapping[str, str]) -> None:
    """Copy each file of `regkit/widgets` (key) to _static/, under the name (value)."""
    folder = Path(app.outdir) / "_static"
    folder.mkdir(parents=True, exist_ok=True)
    for source, name in files.items():
        shutil.copyfile(SOURCES / source, folder / name)
