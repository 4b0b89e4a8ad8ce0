"""Where data is kept, and what all data sets share."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pooch


def cache_folder() -> Path:
    """The folder named by the environment variable REGKIT_DATA, else the user's cache folder."""
    return Path(os.environ.get("REGKIT_DATA") or pooch.os_cache("regkit")).expanduser()


@contextmanager
def written_once(path: Path) -> Iterator[Path]:
    """Write a file of the cache beside its place, then move it there.

    Two threads or processes that make one file each write their own; whoever ends last leaves
    another copy of the same. A file that is there is always complete.

    Yields:
        Where to write: a new, empty file with the ending of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp lets nobody else read it
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    """What this process takes from the permissions of a new file; reading it means setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@functools.cache
def source_hash(file: str, *others: Callable[..., Any] | ModuleType) -> str:
    """Changes whenever a module, or something from elsewhere that it calls, does.

    For the name of a folder in the cache: what was made by other code is made anew.

    Args:
        file: the module's `__file__`.
        others: modules, and functions of other modules, on which the content of the cache depends.
    """
    text = Path(file).read_bytes()
    for other in others:
        source = other if isinstance(other, ModuleType) else inspect.unwrap(other)
        text += inspect.getsource(source).encode()
    return hashlib.sha256(text).hexdigest()[:12]


def place_of(index: int, dataset: Sized) -> int:
    """The index of an item, from 0; negative ones count from the end, as in a list.

    Raises:
        IndexError: beyond the end. A `for` loop over a data set ends there.
    """
    try:
        return range(len(dataset))[index]
    except IndexError:
        raise IndexError(
            f"index is {index}, expected less than the {len(dataset)} pairs there are."
        ) from None
