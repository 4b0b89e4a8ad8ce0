"""What every notebook starts and ends with: seeds, runs, numbers for the prose, their bands."""

from __future__ import annotations

import io
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
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
from regkit.device import choose_device, free_memory
from regkit.plot import STYLE
from regkit.record import device_name, peak_memory
from regkit.training.recipes import BUDGETS, Recipe, budget, identity

T = TypeVar("T")
DRIVE = Path("/content/drive/MyDrive")  # where Colab shows the Google Drive that a reader mounts
_started = time.perf_counter()


def setup(
    chapter: str | None = None, seed: int = 0, seconds: Mapping[str, float] | None = None
) -> None:
    """Start a notebook: fixed seeds, the figures of the book, no distracting warnings, the clock.

    It prints one line: the device and its free memory, the budget, and how long the chapter takes.
    Without a GPU the budget "gpu" becomes "cpu" for this process, and a sentence says so; another
    one says in Colab that what is trained is lost with the session while no Drive is mounted.

    Args:
        chapter: its number, such as "08".
        seed: of Python's, numpy's and torch's random numbers.
        seconds: how long the whole chapter took, by budget, such as {"cpu": 519}.

    Raises:
        ValueError: the environment names a budget that does not exist.
    """
    print(_conditions(chapter, {} if seconds is None else seconds))
    if "google.colab" in sys.modules and not DRIVE.is_dir():
        print(
            "What is trained here ends with the session: to keep it, mount your Google Drive "
            '(from google.colab import drive; drive.mount("/content/drive")) before you train.'
        )
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


def _conditions(chapter: str | None, seconds: Mapping[str, float]) -> str:
    """Under which conditions the notebook runs; settles on a budget that this machine can run."""
    device = choose_device("auto")
    if budget() == "gpu" and device.type == "cpu":
        print("The budget gpu needs a GPU, and PyTorch sees none here: the budget is cpu instead.")
        os.environ["REGKIT_BUDGET"] = "cpu"
    memory = f"{free_memory(device) / 1e9:.0f} GB of memory free"
    line = f"{device_name(device)}, {memory}; budget {budget()}"
    if chapter is None or not seconds:
        return f"{line}."
    if budget() not in seconds:
        return f"{line}; how long chapter {chapter} takes at this budget is not measured yet."
    minutes = max(1, round(seconds[budget()] / 60))
    return f"{line}; chapter {chapter} takes about {minutes} min."


def run_folder(chapter: str, recipe: Recipe | None = None) -> Path:
    """Where a chapter keeps what it trains, so that a training outlives the session.

    It is in folder `runs` of: the folder `regkit` of the Google Drive that is mounted in Colab;
    else the folder that the environment variable REGKIT_HOME names; else the checkout that holds
    the working folder; else the working folder. Nothing is made here: `regkit.training.train` does.

    Args:
        chapter: its number, such as "08".
        recipe: of one training in it. The folder's name then holds the recipe's name, the budget,
            and eight digits of `regkit.training.recipes.identity`: changed settings start a new
            run, and the same ones go on where they were.

    Returns:
        The chapter's folder, or that of one training below it, to give to `train` as `out` together
        with `resume=True`.

    Raises:
        ValueError: `chapter` is not the name of a folder.
    """
    if not chapter or Path(chapter).name != chapter:
        raise ValueError(f"chapter is {chapter!r}, expected a number such as '08'.")
    folder = _home() / "runs" / chapter
    if recipe is None:
        return folder
    return folder / f"{recipe.name}_{budget()}_{identity(recipe)[:8]}"


def _home() -> Path:
    """The folder that holds `runs`, see `run_folder`."""
    if DRIVE.is_dir():
        return DRIVE / "regkit"
    if named := os.environ.get("REGKIT_HOME"):
        return Path(named).expanduser()
    here = Path.cwd()
    checkouts = (p for p in (here, *here.parents) if (p / "regkit" / "book").is_dir())
    return next(checkouts, here)


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


def expect(
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
