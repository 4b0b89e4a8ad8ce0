"""Options of a model, checked by type and size before anything is made of them.

They come from a user, or from a weights file that a stranger wrote. Types are those of the
constructor's signature; its own checks follow when it runs.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# What makes a network endless before it makes it better: the largest value of each.
MOST = {
    "cascades": 100,
    "correlation": 16,
    "depth": 100,
    "dilations": 64,
    "layers": 100,
    "reduce": 64,
    "repeats": 100,
    "segment": 1000,
    "stages": 100,
    "steps": 32,
    "window": 64,
}
WIDEST = 1 << 16  # of any other whole number, such as channels
LEVELS = {
    "channels": 8,
    "encoder": 8,
}  # numbers of a list, each for half the size of the one before
LONGEST = 16  # of any other list


def option_types(make: Callable[..., Any]) -> dict[str, Any]:
    """The type of each option, by name: of a model's class, or of `functools.partial` of one.

    Where a constructor hands on options of other names, those of its parent are known as well.
    """
    while isinstance(make, functools.partial):
        make = make.func
    hints: dict[str, Any] = {}
    for one in inspect.getmro(typing.cast(type, make)):
        if "__init__" not in vars(one):
            continue
        constructor = vars(one)["__init__"]
        for name, hint in typing.get_type_hints(constructor).items():
            hints.setdefault(name, hint)
        kinds = {p.kind for p in inspect.signature(constructor).parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    for name in ("return", "ndim", "options", "bases", "kind"):
        hints.pop(name, None)
    return hints


def check_options(options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse an option that is not known, of another type, or beyond any use.

    Raises:
        ValueError: half a sentence, which names the option, what came and what is expected.
    """
    for name, value in options.items():
        if name not in known:
            listed = ", ".join(known)
            raise ValueError(f"{short(name)} is no option, expected one of {listed}")
        if not _fits(value, known[name]):
            raise ValueError(f"{name} is {short(value)}, expected {_words(known[name])}")
        numbers = value if isinstance(value, list | tuple) else [value]
        most = LEVELS.get(name, LONGEST)
        if len(numbers) > most:
            raise ValueError(f"{name} has {len(numbers)} numbers, expected at most {most}")
        bound = MOST.get(name, WIDEST)
        if any(isinstance(number, int) and abs(number) > bound for number in numbers):
            raise ValueError(f"{name} is {short(value)}, expected at most {bound}")


def short(value: Any) -> str:
    """The beginning of what a value looks like."""
    text = repr(value) if not isinstance(value, str) or len(value) < 200 else repr(value[:200])
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(_fits(one, parts[0]) for one in value)
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is Sequence:
        return "a list of whole numbers" if parts[0] is int else "a list of numbers"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a word"}
    return words.get(hint, "None")
