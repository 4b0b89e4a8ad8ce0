"""What weights say of their training: the fields that regkit reads, by kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from regkit.models.options import short

Test = Callable[[Any], bool]


def _number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e12 and math.isfinite(value)


def _numbers(count: int, low: float, high: float, whole: bool = False) -> Test:
    """A list of so many numbers between two bounds."""

    def test(value: Any) -> bool:
        if not isinstance(value, list | tuple) or len(value) != count:
            return False
        kind = (int,) if whole else (int, float)
        return all(_number(x) and isinstance(x, kind) and low <= x <= high for x in value)

    return test


def _ordered(value: Any) -> bool:
    return _numbers(2, -1e9, 1e9)(value) and value[0] < value[1]


def _word(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 1000


def _settings(value: Any) -> bool:
    """None, or what a recipe says of its pairs: words, numbers, and lists of them."""
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    flat = [x for one in value.values() for x in (one if isinstance(one, list | tuple) else [one])]
    return all(x is None or isinstance(x, bool) or _number(x) or _word(x) for x in flat)


def check_info(info: Mapping[str, Any], ndim: int, name: str) -> None:
    """Refuse a field of the wrong kind; fields that are not there, and others, are left alone.

    Args:
        info: see `regkit.models.save`.
        ndim: of the model.
        name: of its file.

    Raises:
        ValueError: one sentence, which names the file, the field, what came and what is expected.
    """
    fields: dict[str, tuple[Test, str]] = {
        "spacing": (_numbers(ndim, 1e-6, 1e4), f"{ndim} voxel sizes, mm"),
        "range": (_ordered, "two numbers, the lower one first"),
        "orientation": (_word, "a word"),
        "contrast": (_word, "a word"),
        "motion": (_numbers(2, 0, 1e6), "an angle and a shift"),
        "recipe": (lambda value: isinstance(value, dict), "the settings of a training"),
    }
    recipe: dict[str, tuple[Test, str]] = {
        "shape": (_numbers(ndim, 1, 4096, whole=True), f"{ndim} numbers of voxels"),
        "similarity": (_word, "a word"),
        "contrast": (_word, "a word"),
        "amplitude": (_number, "a number"),
        "gamma": (_number, "a number"),
        "motion": (_settings, "settings or None"),
        "painted": (_settings, "settings or None"),
        "chest": (_settings, "settings or None"),
    }
    _check(info, fields, name, "")
    _check(info.get("recipe", {}), recipe, name, "recipe: ")
    if "motion" in info and "spacing" not in info:
        raise ValueError(f"path_or_name is {name!r}, whose motion has no spacing beside it.")


def _check(
    info: Mapping[str, Any], fields: Mapping[str, tuple[Test, str]], name: str, where: str
) -> None:
    for field, (test, expected) in fields.items():
        if field in info and not test(info[field]):
            raise ValueError(
                f"path_or_name is {name!r}, which says {where}{field} is {short(info[field])}, "
                f"expected {expected}."
            )
