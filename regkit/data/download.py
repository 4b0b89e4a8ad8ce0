"""Bytes from an address, bounded in number and in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import IO

import requests

BLOCK = 1 << 16  # bytes; a download that stops loses at most one block
TIMEOUT = 30.0  # seconds without an answer
GRACE = 60.0  # seconds before a server has to be as fast as that:
SLOWEST = 10_000  # bytes a second, on average


class TooLong(ValueError):
    """A body with more bytes than are taken."""


def get(address: str, headers: Mapping[str, str] | None = None) -> requests.Response:
    """The answer of a server, whose body is not read yet.

    Raises:
        requests.RequestException: it cannot be reached, or says no.
    """
    answer = requests.get(address, headers=dict(headers or {}), stream=True, timeout=TIMEOUT)
    if answer.status_code != 416:  # what was asked for lies behind the end
        try:
            answer.raise_for_status()
        except requests.RequestException:
            answer.close()
            raise
    return answer


def write(
    answer: requests.Response,
    out: IO[bytes],
    most: int,
    told: Callable[[int], object] = lambda count: None,
) -> None:
    """Write the body of an answer.

    Args:
        answer: of `get`.
        out: an open file.
        most: bytes that are taken.
        told: is called with the size of each block.

    Raises:
        requests.RequestException: the connection breaks, the body is shorter than it was announced,
            or it comes at less than `SLOWEST`.
        TooLong: it is longer than `most`.
    """
    start, count = time.monotonic(), 0
    for block in answer.iter_content(BLOCK):
        count += len(block)
        if count > most:
            raise TooLong
        if time.monotonic() - start > GRACE + count / SLOWEST:
            raise requests.Timeout("too slow")
        told(out.write(block))
