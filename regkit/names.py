"""A name that is not known, and the one that was probably meant."""

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
