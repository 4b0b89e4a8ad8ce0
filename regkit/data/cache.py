"""Where data is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pooch


def cache_folder() -> Path:
    """The folder named by the environment variable REGKIT_DATA, else the user's cache folder."""
    return Path(os.environ.get("REGKIT_DATA") or pooch.os_cache("regkit")).expanduser()
