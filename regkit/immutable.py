"""Settings that nobody changes: dictionaries and lists made immutable, all the way down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn


class FrozenDict(dict[Any, Any]):
    """A dictionary that cannot be changed, with a hash.

    It is a `dict`, so that JSON, `dataclasses.asdict` and `|` take it for one; what `|` gives is a
    plain dictionary again.
    """

    def _refuse(self, *arguments: Any, **more: Any) -> NoReturn:
        raise TypeError("settings cannot be changed in place, expected a copy such as {**settings}")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:  # pickle would fill an empty one
        return type(self), (dict(self),)


def frozen(value: Any) -> Any:
    """A copy of a setting in which dictionaries are `FrozenDict` and lists are tuples."""
    if isinstance(value, Mapping):
        return FrozenDict((key, frozen(one)) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(frozen(one) for one in value)
    return value
