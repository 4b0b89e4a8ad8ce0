"""What sentences to a user share: names that are not known, and how to install an extra."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(argument: str, name: object, known: Iterable[str]) -> ValueError:
    """The error to raise: what came, what is expected, and the nearest of the known names."""
    known = list(known)
    if not known:
        return ValueError(
            f"{argument} is {name!r}, expected none: there is nothing to choose from."
        )
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}" if near else ""
    return ValueError(f"{argument} is {name!r}, expected one of {', '.join(known)}{hint}.")


def install(extra: str) -> str:
    """The command that installs what an extra of pyproject.toml asks for.

    From a clone: no index has the project, and its name there could be taken by anybody.
    """
    return f'in a clone of the repository, pip install -e ".[{extra}]"'
