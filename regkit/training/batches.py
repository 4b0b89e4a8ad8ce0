"""The batches of a run, made by the training itself or by worker processes beside it.

Every pair depends on the seed and on its index alone, so that any number of workers makes the same
batches. A worker is forked: it shares the images with the training, and never touches a GPU.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

if TYPE_CHECKING:  # it belongs to the extra "train"
    from accelerate import Accelerator

MOST = 4  # workers that nobody has asked for
ON_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux
SECONDS_TO_DIE = 5.0  # a killed process of some GB is gone in less


def worker_count(workers: int | None, device: torch.device, processes: int = 1) -> int:
    """How many processes make pairs: as asked for, else a core each, at most four, beside a GPU.

    None on the CPU, whose cores train, and none where the system does not fork as Linux does.

    Args:
        workers: as asked for, or None.
        device: that trains.
        processes: that share one run and the cores.

    Raises:
        ValueError: a negative number, or workers on a system that does not fork.
    """
    forks = sys.platform == "linux"
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if forks else 0
        return min(MOST, max(1, cores // processes)) if device.type == "cuda" and forks else 0
    if workers < 0:
        raise ValueError(f"workers is {workers}, expected 0 or more.")
    if workers and not forks:
        raise ValueError(f"workers is {workers} on {sys.platform}, expected 0: only Linux forks.")
    return workers


def batches(
    pairs: Dataset[Any], left: range, size: int, workers: int, accelerator: Accelerator
) -> Generator[dict[str, Any]]:
    """The batches that are left, on the device of the accelerator; processes share each batch.

    The workers end with the iterator: close it where it is not read to its end.

    Args:
        pairs: of the task. left: the indices of those to come. size: of a batch of one process.
        workers: how many processes make them; 0: this one.

    Raises:
        ValueError, OSError: as `pairs` raises them, also in a worker. For one that dies see
            `living_workers`.
    """
    loader = accelerator.prepare(
        DataLoader(
            Subset(_Told(pairs), left),
            batch_size=size,
            num_workers=workers,
            collate_fn=_collated,
            worker_init_fn=_die_with_the_training,
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # else workers would draw from the run's random numbers
        )
    )
    try:
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    except (ConnectionError, EOFError):
        # A worker that dies while it hands over a batch cuts the connection before PyTorch knows
        # of its death. The signal that tells it interrupts the sleep, see `living_workers`.
        time.sleep(SECONDS_TO_DIE)
        raise


@contextmanager
def living_workers() -> Iterator[None]:
    """Where a worker dies, one sentence says what helps.

    PyTorch tells it by a signal, at any line of the training: so this stands around all of it.

    Raises:
        ValueError: with that sentence.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            "A process that makes pairs has died, expected it to live: there may be too little "
            "memory for so many, and workers=0 needs none."
        ) from None


class _Told(Dataset[Any]):
    """The same pairs; an error that says what is wrong with them comes as an item.

    PyTorch would put the traceback of a worker into its sentence.
    """

    def __init__(self, pairs: Dataset[Any]) -> None:
        self.pairs = pairs

    def __getitem__(self, index: int) -> Any:
        try:
            return self.pairs[index]
        except (ValueError, OSError) as error:
            return error


def _collated(items: list[Any]) -> Any:
    """A batch of items, or the first error among them."""
    errors = (item for item in items if isinstance(item, Exception))
    return next(errors, None) or default_collate(items)


def _die_with_the_training(worker: int) -> None:
    """Its own check takes five seconds, in which nobody could go on with the run in its folder."""
    ctypes.CDLL(None).prctl(ON_PARENT_DEATH, signal.SIGKILL)
