"""Where a figure of panels side by side may be cut, so that a narrow screen can stack its parts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WHITE = 250  # grey values from here on are paper
NARROW = 60  # pixels; what is narrower is no panel: a name of a row, its numbers, a colour bar
GAP = 6  # pixels of paper between two panels, at least
LABEL = 20  # pixels; a name written upwards beside an axis is narrower, and a colour bar is solid


def cuts(picture: Image.Image) -> list[int]:
    """The columns between two panels, in the middle of the paper that parts them.

    Left and right of each lie two parts with ink, each at least as wide as a panel. What is
    narrower belongs to the nearer of its neighbours, and a name written upwards to the axis on its
    right.

    Args:
        picture: a figure on white, or on nothing.

    Returns:
        Columns in pixels, from the left; none where nothing can be parted.
    """
    ink = _ink(picture)
    parts = _runs(np.asarray(ink.any(axis=0)))
    for k in range(len(parts) - 2, -1, -1):
        if _is_label(ink, parts[k]):
            parts[k : k + 2] = [(parts[k][0], parts[k + 1][1])]
    while len(parts) > 1:
        gaps = [right[0] - left[1] for left, right in zip(parts, parts[1:])]
        joined = [
            gap
            for gap, left, right in zip(gaps, parts, parts[1:])
            if gap < GAP or min(left[1] - left[0], right[1] - right[0]) < NARROW
        ]
        if not joined:
            break
        k = gaps.index(min(joined))
        parts[k : k + 2] = [(parts[k][0], parts[k + 1][1])]
    return [(left[1] + right[0]) // 2 for left, right in zip(parts, parts[1:])]


def _ink(picture: Image.Image) -> NDArray[Any]:
    """(height, width) bool: where there is no paper."""
    paper = Image.new("RGBA", picture.size, "white")
    paper.alpha_composite(picture.convert("RGBA"))
    ink: NDArray[Any] = np.any(np.asarray(paper.convert("RGB")) < WHITE, axis=2)
    return ink


def _is_label(ink: NDArray[Any], part: tuple[int, int]) -> bool:
    """Whether these columns hold letters only: no line or bar is half as high as all of them."""
    piece = ink[:, slice(*part)]
    tall = np.flatnonzero(piece.any(axis=1))
    runs = [end - start for column in piece.T for start, end in _runs(column)]
    return part[1] - part[0] < LABEL and max(runs) < (tall[-1] + 1 - tall[0]) / 2


def _runs(inked: NDArray[Any]) -> list[tuple[int, int]]:
    """First column, and the one behind the last, of each run of columns with ink."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inked.astype(int), [0]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
