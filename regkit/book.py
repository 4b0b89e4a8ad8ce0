"""What the notebooks of the book share: the same start, numbers for the prose, bands to stay in."""

from __future__ import annotations

import io
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from regkit.data.samples import cached
from regkit.plot import STYLE
from regkit.record import peak_memory
from regkit.training.recipes import BUDGETS, budget

T = TypeVar("T")
_started = time.perf_counter()


def setup(seed: int = 0) -> None:
    """Start a notebook: fixed seeds, the figures of the book, no distracting warnings, the clock.

    Args:
        seed: of Python's, numpy's and torch's random numbers.
    """
    global _started
    _started = time.perf_counter()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - other libraries draw from it
    torch.manual_seed(seed)
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        # in a container: the cores we have, not the machine's
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(nilearn|torch|tqdm)\b")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(nilearn|torch)\b")

    pyplot.rcParams.update(STYLE)
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and hasattr(shell, "display_formatter"):
        pyplot.switch_backend(matplotlib.get_backend())  # first, for it brings its own formatter
        shell.display_formatter.formatters["image/png"].for_type(Figure, small_png)


def small_png(fig: Figure) -> bytes:
    """The figure as PNG of at most 256 colours: a third of the bytes, for small notebooks."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.05)
    picture = Image.open(buffer).convert("RGB")
    # the default, median cut, turns rare colours into grey
    picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def glue(name: str, value: Any) -> None:
    """Give a number to the prose of the page: {glue:text}`name:.2f`. Outside the book, nothing.

    Args:
        name: unique in the book; starts with the chapter, such as "ch01-dice".
        value: a number, or a tensor or array that holds one, or text.
    """
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.item()
    try:
        from myst_nb import glue as paste
    except ImportError:  # Colab, or a plain Jupyter
        return
    paste(name, value, display=False)


def check(
    value: float | Tensor | ArrayLike, every: tuple[float, float] | None = None, **bands: Any
) -> None:
    """Assert that a number, or each of several, lies in the band of the current budget.

    Args:
        value: numbers. They must be finite at every budget.
        every: (low, high), ends included, for budgets that have no band of their own.
        bands: smoke, cpu, gpu or paper = (low, high).

    Raises:
        AssertionError: outside the band; the sentence says what came and what was expected.
        ValueError: a budget that does not exist.
    """
    unknown = set(bands) - set(BUDGETS)
    if unknown:
        raise ValueError(f"bands name {sorted(unknown)}, expected some of {', '.join(BUDGETS)}.")
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    numbers = np.asarray(value, dtype=float)
    low, high = bands.get(budget()) or every or (-math.inf, math.inf)
    ok = np.isfinite(numbers) & (numbers >= low) & (numbers <= high)
    if numbers.size == 0 or not ok.all():
        shown = np.array2string(numbers.ravel()[:6], precision=4, separator=", ", threshold=6)
        raise AssertionError(
            f"value is {shown}, expected finite numbers from {low:g} to {high:g} "
            f"at budget {budget()}."
        )


def cost() -> tuple[float, float]:
    """Seconds since `setup()`, and the peak memory of this process, see `record.peak_memory`."""
    return time.perf_counter() - _started, peak_memory()


def sample(name: str, load: Callable[[], T]) -> T | None:
    """What `load` reads from an open sample, or None (and one printed sentence) without it.

    At budget "smoke" only the cache is asked, never the network.

    Args:
        name: of the sample, as in `regkit data list`.
        load: one of the loaders in `regkit.data`.
    """
    if cached(name) or budget() != "smoke":
        with suppress(FileNotFoundError):
            return load()
    print(f"The open sample {name} is not here: `regkit data get {name}` fetches it.")
    return None
