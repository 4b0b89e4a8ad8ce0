"""Learned registration of medical images, in 2D and 3D: a course and its library.

>>> import regkit
>>> result = regkit.register("moving.nii.gz", "fixed.nii.gz")  # doctest: +SKIP
>>> result.save("out")  # doctest: +SKIP

For research and teaching. Not a medical device.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regkit.registration import Result, register

__version__ = "0.2.0"

_MODULES = (
    "book",
    "classical",
    "data",
    "io",
    "losses",
    "metrics",
    "models",
    "papers",
    "plot",
    "spatial",
    "training",
    "transform",
    "widgets",
)
__all__ = ["Result", "__version__", "register", *_MODULES]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `regkit --help` needs no PyTorch."""
    if name in ("register", "Result"):
        return getattr(import_module("regkit.registration"), name)
    if name in _MODULES:
        return import_module(f"regkit.{name}")
    raise AttributeError(f"module 'regkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
