"""What all tests share: one thread and fixed seeds, and the way to the open samples."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window


@pytest.fixture(autouse=True)
def reproducible() -> None:
    """The same bits in each run: sums depend on the number of threads."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries still draw from it)


@pytest.fixture
def sample(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """`sample(name)`: the folder of an open sample in the cache, never downloaded.

    A test that asks for one carries the mark `real`. Where the sample is not cached, the test
    skips; with REGKIT_REQUIRE_REAL=1 it fails.
    """
    from regkit.data import samples

    if request.node.get_closest_marker("real") is None:
        pytest.fail("a test that uses a real image carries @pytest.mark.real.", pytrace=False)

    def folder(name: str) -> Path:
        if not samples.cached(name):
            message = f"sample {name!r} is not cached: `regkit data get {name}` fetches it."
            if os.environ.get("REGKIT_REQUIRE_REAL") == "1":
                pytest.fail(message, pytrace=False)
            pytest.skip(message)
        return samples.fetch(name)

    return folder
