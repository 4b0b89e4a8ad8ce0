"""What the studies share: their command line, how a row is measured once, and a pyramid.

A study is one script, `python studies/NAME.py`. It measures, writes a file of results/ with the
help of `regkit.record`, and has its command line in `main`. results/README.md lists the studies.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from scipy import ndimage
from torch import Tensor

from regkit.record import Row, Rows, how_made, rounded, typed_command
from regkit.spatial import resize
from regkit.training import recipes
from regkit.training.recipes import Recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
RUNS = ROOT / "runs"  # trainings, which go on where they stopped

# options that several studies have
Threads = Annotated[int, typer.Option(help="Threads, for every method.")]
Out = Annotated[Path, typer.Option(help="The file to write.")]
Fresh = Annotated[bool, typer.Option(help="Measure every row again.")]


def start(main: Callable[..., None]) -> None:
    """Run `main` as command line; wrong input ends in one sentence and exit code 2."""
    try:
        typer.run(main)
    except (ValueError, FileNotFoundError) as error:
        typer.echo(str(error), err=True)
        raise SystemExit(2) from None


def use_threads(threads: int) -> None:
    """Let PyTorch and ANTs compute with so many threads."""
    torch.set_num_threads(threads)
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(threads)  # read by ANTs


def made(file: str, device: str = "cpu", seed: int | None = None) -> Row:
    """`regkit.record.how_made` of a study, with the versions of what it compares.

    file: of the study, `__file__`; without its options where another program calls it.
    """
    command = f"python studies/{Path(file).name}"
    if Path(sys.argv[0]).name == Path(file).name:
        command = typed_command(command)
    packages = ("SimpleITK", "antspyx", "picsl_greedy", "itk-elastix", "numpy")
    return how_made(command, device, seed=seed, packages=packages)


def check_names(argument: str, names: Sequence[str], expected: Collection[str]) -> None:
    """Raise a ValueError where a name is none of those that exist."""
    for name in names:
        if name not in expected:
            raise ValueError(f"{argument} holds {name!r}, expected some of {', '.join(expected)}.")


def measure_once(
    rows: Rows,
    settings: Row,
    title: str,
    measure: Callable[[], Row],
    describe: Callable[[Row], str],
    missing: tuple[type[Exception], ...] = (FileNotFoundError, ImportError),
) -> bool:
    """Measure a row and write it, unless it is there with the same settings; say so on stderr.

    Numbers get four digits, but for those in a list: there, the study has chosen how many.

    Args:
        settings: the first fields of the row: its key, and what it depends on.
        title: names the row in what is said. describe: the numbers of the row in short.
        missing: errors that say that something is not installed or not there. The row is left out
            then; one of other settings is removed, as it would not compare with its neighbours.

    Returns:
        False where it is left out.
    """
    if rows.has(settings):
        return True
    try:
        measured = measure()
    except missing as error:
        typer.echo(f"{title} is left out. {error}", err=True)
        rows.remove(settings)
        return False
    numbers = {k: v if isinstance(v, list) else rounded(v) for k, v in measured.items()}
    stamp = {key: rows.fields["made"][key] for key in ("commit", "date")}
    rows.add({**settings, **numbers, **stamp})
    typer.echo(f"{title}: {describe(numbers)}", err=True)
    return True


def recipe_of(name: str, **changes: Any) -> Recipe:
    """A recipe at budget "cpu", with the precision of this CPU, so that its identity tells it."""
    return recipes.settled(recipes.get(name, "cpu", **changes), torch.device("cpu"))


def unfolding_2d(steps: int, **options: Any) -> Recipe:
    """The recipe of `unfolding` in 2D with these options of the network, validated at its end."""
    changes = {"steps": steps, "validate_every": steps, "precision": "auto"}
    return recipe_of("unfolding_2d", options=options, **changes)


def levels(shape: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Grids from coarse to fine, each half as fine along every axis of more than 16 voxels."""
    grids = [tuple(shape)]
    while len(grids) < count and max(grids[0]) > 16:
        grids.insert(0, tuple((n + 1) // 2 if n > 16 else n for n in grids[0]))
    return grids


def coarser(image: Tensor, shape: Sequence[int]) -> Tensor:
    """(1, 1, *S) blurred by half of what is lost, then resampled."""
    factors = [n / m for n, m in zip(image.shape[2:], shape, strict=True)]
    blurred = ndimage.gaussian_filter(
        image[0, 0].numpy(), [0.5 * (f**2 - 1) ** 0.5 for f in factors], mode="nearest"
    )
    return resize(torch.from_numpy(blurred)[None, None], shape)
