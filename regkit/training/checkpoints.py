"""The folder of a run: what is saved there, and going on from it.

A run in a folder leaves

    recipe.json            what was asked for
    history.json           the terms of the objective, and the validation
    last.safetensors       the weights after the last validation
    best.safetensors       the weights with the best validation
    log/                   the same numbers for `tensorboard --logdir`
    state/STEP/            what resuming needs (weights, optimiser, schedule, random states), and
                           how long the run took until then

A run may be killed at any moment. Everything is saved after a validation, and history.json last: it
is written beside its place and moved there, and its last step names the one folder below `state/`
that counts, which gets that name afterwards. So a run goes on from the last validation that was
saved completely; on the CPU, with the same number of threads, it ends in the same weights, bit by
bit. One process at a time works in a folder. A run whose files do not fit each other is not
resumed, and nothing in it is changed. A run that is refused before its first step leaves nothing.

`state/` is Accelerate's own folder and holds pickled random states, and a pickle may run code when
it is read. It serves to resume one's own run, and nothing else in regkit reads it: no download is
ever resumed from. Weights travel as safetensors. Never resume from a folder that somebody else
made.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from regkit import models
from regkit.files import alone, check_writable, staged
from regkit.models import RegistrationModel
from regkit.training import recipes
from regkit.training.tasks import Task

if TYPE_CHECKING:  # it belongs to the extra "train"
    from accelerate import Accelerator

FRESH = "new-"  # before the name of a state that the history does not hold yet
SECONDS = "seconds.txt"  # of a state


def write_json(path: Path, value: Any) -> None:
    """Write what JSON can hold into the folder of a run: the whole file, or nothing."""
    with staged(path.parent) as folder:
        (folder / path.name).write_text(json.dumps(value, indent=1))


def read_json(path: Path) -> Any:
    """What a file of a run holds; ValueError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(
            f"out holds a {path.name} that cannot be read, expected that of a run."
        ) from None


def save(
    folder: Path,
    accelerator: Accelerator,
    network: RegistrationModel,
    history: list[dict[str, float]],
    scores: dict[str, float],
    better: bool,
    seconds: float,
) -> None:
    """Write weights and state, then the history, which makes them count.

    A state has its final name only after that. Where it cannot be written, what was saved before
    stays as it is.
    """
    step = len(history)
    fresh = folder / "state" / f"{FRESH}{step}"
    try:
        accelerator.save_state(str(fresh))
        accelerator.wait_for_everyone()  # each process writes its random states
        if accelerator.is_main_process:
            (fresh / SECONDS).write_text(f"{seconds:.3f}")
            for tracker in accelerator.trackers:
                tracker.tracker.flush()  # a run killed after its last step has it in its log
            for name in ("last", "best") if better else ("last",):
                models.save(network, folder / f"{name}.safetensors", step=step, validation=scores)
            write_json(folder / "history.json", history)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two are PyTorch's words
        shutil.rmtree(fresh, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else None
        raise ValueError(
            f"out cannot hold the state of step {step} ({reason or 'it could not be written'}), "
            "expected room on the disk: what was saved before is there, and resume=True goes on "
            "from it."
        ) from None
    if accelerator.is_main_process:
        _settle(folder, step)


def _settle(folder: Path, step: int) -> None:
    """Give the state of a step that the history holds its name, and remove every other."""
    fresh, settled = (folder / "state" / f"{kind}{step}" for kind in (FRESH, ""))
    if fresh.is_dir():
        if settled.is_dir():
            shutil.rmtree(settled)
        fresh.replace(settled)
    for other in folder.glob("state/*"):
        if other.name != settled.name:
            shutil.rmtree(other)


def go_on(folder: Path, accelerator: Accelerator) -> list[dict[str, float]]:
    """The history of the run in this folder, with its state loaded; [] if nothing was saved."""
    history = saved(folder)
    state = folder / "state" / str(len(history))
    if history:
        if not any(state.with_name(kind + state.name).is_dir() for kind in ("", FRESH)):
            raise ValueError(
                f"out is {folder.name!r}, expected the folder state/{state.name} in it, "
                "from which to go on."
            )
        models.about(folder / "last.safetensors")
        if (folder / "best.safetensors").is_file():  # images without labels choose none
            models.about(folder / "best.safetensors")
    if accelerator.is_main_process:
        _settle(folder, len(history))
    accelerator.wait_for_everyone()
    if not history:
        return []
    try:
        # zip archives with checksums; Accelerate would go on without a file of random states
        random = state / f"random_states_{accelerator.process_index}.pkl"
        for file in {random, *state.glob("*.bin"), *state.glob("*.pkl")}:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
        accelerator.load_state(str(state))
    except MemoryError:
        raise
    except Exception:  # pickle, zip, safetensors and PyTorch each have their own
        raise ValueError(
            f"out holds a state of step {state.name} that cannot be read: it is damaged or of "
            "another model, expected that of this run."
        ) from None
    return history


def saved(folder: Path) -> list[dict[str, float]]:
    """The history of the run in a folder, one dictionary a step; [] where nothing was saved yet.

    Raises:
        ValueError: it is damaged, or is not there while a state is that it should name.
    """
    file = folder / "history.json"
    steps = [int(state.name) for state in folder.glob("state/*") if state.name.isdecimal()]
    history = read_json(file) if file.is_file() else []
    sound = isinstance(history, list) and all(
        isinstance(entry, dict)
        and entry.get("step") == number
        and all(isinstance(value, int | float) for value in entry.values())
        for number, entry in enumerate(history, 1)
    )
    if not sound or (file.is_file() and not history) or max(steps, default=0) > len(history):
        raise ValueError(
            "out holds a history.json that does not go with its states, expected one entry a step "
            "up to the last one saved; nothing was changed."
        )
    return history


def seconds_of(folder: Path, step: int) -> float:
    """How long a run took to its state of a step; NaN where an earlier version has written it."""
    file = folder / "state" / str(step) / SECONDS
    if not file.is_file():
        return math.nan
    try:
        return float(file.read_text())
    except ValueError:
        raise ValueError(f"out holds a {SECONDS} that is damaged, expected a number.") from None


def best_score(task: Task, tested: Sequence[dict[str, float]]) -> float:
    """The best score of the validations of a history."""
    try:
        return max(map(task.score, tested), default=-math.inf)
    except KeyError as error:
        raise ValueError(
            f"out holds a history.json whose validations lack {error.args[0]!r}, expected that of "
            "this run."
        ) from None


def wait_for_the_next_second(log: Path) -> None:
    """Where this log was written to in this very second: at most one second.

    TensorBoard reads the files of a log in the order of their names, which begin with the second in
    which they were made. Two of one second may be read in the wrong order, and the one of the
    killed process would then purge what the one that resumed it has written.
    """
    written = max((int(file.stat().st_mtime) for file in log.rglob("*tfevents*")), default=0)
    time.sleep(min(1.0, max(0.0, written + 1 - time.time())))


@contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """Work in the run's folder while no other process does; a new one that stays empty goes again.

    Of several processes that share one run, the first holds the folder for all.
    """
    if folder is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    check_writable(folder)
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder, "out", 0, "run"):
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"out cannot be written ({error.strerror}), expected room on the disk: what was saved "
            "before is there, and resume=True goes on from it."
        ) from None
    finally:
        with suppress(OSError):  # as soon as something is in it
            for place in new:
                place.rmdir()


def _holds_a_run(folder: Path) -> bool:
    """Whether something was saved there."""
    return (folder / "history.json").exists() or any(folder.glob("state/*"))


def taken_precision(folder: Path) -> str | None:
    """The precision of the run that a folder holds; None where it holds none that says so."""
    file = folder / "recipe.json"
    recipe = read_json(file) if _holds_a_run(folder) and file.is_file() else None
    taken = recipe.get("precision") if isinstance(recipe, dict) else None
    return taken if isinstance(taken, str) else None


def check_run(folder: Path, plan: dict[str, Any], resume: bool) -> None:
    """Make sure that a folder holds this run, if it holds one: something was saved there."""
    file = folder / "recipe.json"
    if not _holds_a_run(folder):
        return
    if not resume:
        raise ValueError(f"out is {folder.name!r}, which holds a run: expected resume=True.")
    if not file.is_file():
        raise ValueError(f"out is {folder.name!r}, which holds a run without its recipe.json.")
    recipe = read_json(file)
    if not isinstance(recipe, dict) or _settings(recipes.complete(recipe)) != _settings(plan):
        raise ValueError(f"out is {folder.name!r}, which holds a run of another recipe.")
    saved(folder)


def _settings(plan: dict[str, Any]) -> dict[str, Any]:
    """What a plan asks for; its `source` is a text, which a newer version may word differently."""
    return {name: value for name, value in plan.items() if name != "source"}
