"""Learned registration of medical images, in 2D and 3D: a course and its library.

>>> import regkit
>>> result = regkit.register("moving.nii.gz", "fixed.nii.gz")  # doctest: +SKIP
>>> result.save("out")  # doctest: +SKIP

For research and teaching. Not a medical device.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

__all__ = [
    "Result",
    "__version__",
    "book",
    "classical",
    "data",
    "io",
    "losses",
    "metrics",
    "models",
    "papers",
    "plot",
    "register",
    "spatial",
    "training",
    "transform",
    "widgets",
]

if TYPE_CHECKING:  # what `__getattr__` imports, with its types
    from regkit import (
        book,
        classical,
        data,
        io,
        losses,
        metrics,
        models,
        papers,
        plot,
        spatial,
        training,
        transform,
        widgets,
    )
    from regkit.registration import Result, register
else:

    def __getattr__(name: str) -> Any:
        """Import what is asked for when it is asked for: `regkit --help` needs no PyTorch."""
        if name in ("register", "Result"):
            return getattr(import_module("regkit.registration"), name)
        if name in __all__:
            return import_module(f"regkit.{name}")
        raise AttributeError(f"module 'regkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
