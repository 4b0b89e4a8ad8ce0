"""Speed, memory and scaling: `make bench`, or some of it:

    python -m pytest benchmarks/bench.py -k "speed and lncc"

`test_speed` times each case of `cases.py`, ours and the peer's in turns, with the same inputs.
`test_memory` asks for the most that is allocated at once beside the inputs, by torch and by NumPy;
what a library takes past their allocators (scratch space of a convolution) is not seen.
`test_scaling` times ours from 32^3 voxels to 160x192x160, `test_windows` with small and large
windows. Nothing is asserted about the clock: the numbers are written to `results/` and read from
there. The best of a few repetitions counts. One peer takes 6 GB.
"""

import math

import cases
import pytest

from regkit import losses
from regkit.record import peak_bytes, timed

WINDOWS = (3, 9, 21)
SECONDS = 2.0  # to spend on the repetitions of one side
SCALED = ("lncc", "warp", "mutual_information", "jacobian_determinant", "dice")


@pytest.fixture(scope="session")
def brains():
    return cases.brains()


@pytest.fixture(scope="session")
def inputs(brains, device):
    """`inputs(shape)`: the pair at that size; only the last one is kept."""
    pairs = {}

    def at(shape):
        if shape not in pairs:
            pairs.clear()
            pairs[shape] = brains.resized(shape, device)
        return pairs[shape]

    return at


def best(benchmark, run, device, between=None):
    """Seconds of the fastest call; `between` is called before each repetition, untimed."""
    rounds = int(SECONDS / timed(run, device))
    benchmark.pedantic(
        lambda: timed(run, device), setup=between, rounds=min(50, max(2, rounds)), iterations=1
    )
    return benchmark.stats.stats.min


def best_of_both(benchmark, ours, peer, device):
    """Seconds of the fastest call of each, in turns: what else the machine does hits both."""
    spent = [timed(peer, device)]

    def the_peer_goes_first():
        if len(spent) < 3 or sum(spent) < SECONDS:
            spent.append(timed(peer, device))

    return best(benchmark, ours, device, the_peer_goes_first), min(spent)


def skip_unless_possible(case, device):
    if device == "cuda" and case.device == "cpu":
        pytest.skip("the peer computes on the CPU only")
    if "MONAI" in case.peer:
        pytest.importorskip("monai")


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_speed(case, benchmark, inputs, device, results):
    skip_unless_possible(case, device)
    ours, peer = case.build(inputs(case.shape))
    seconds, peer_seconds = best_of_both(benchmark, ours, peer, device)
    results["speed"][case.name] = {
        "operation": case.operation,
        "case": case.describe(case.shape),
        "peer": case.peer,
        "seconds": seconds,
        "peer_seconds": peer_seconds,
        "ratio": peer_seconds / seconds,
        "asked": case.asked,
        "difference": cases.difference(ours(), peer()),
        "note": case.note,
    }


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_memory(case, inputs, device, results):
    skip_unless_possible(case, device)
    ours, peer = (peak_bytes(run, device) for run in case.build(inputs(case.shape)))
    volume = 4 * math.prod(case.shape)
    results["memory"][case.name] = {
        "operation": case.operation,
        "case": case.describe(case.shape),
        "bytes": ours,
        "volumes": ours / volume,
        "asked": 12 if case.operation == "lncc" else None,
        "peer": case.peer,
        "peer_bytes": peer,
        "peer_volumes": peer / volume,
    }


@pytest.mark.parametrize("shape", cases.SCALING, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("operation", SCALED)
def test_scaling(operation, shape, benchmark, inputs, device, results):
    benchmark.group = operation
    run = cases.ours(operation, inputs(shape))
    seconds = best(benchmark, run, device)
    size = peak_bytes(run, device)
    results["scaling"][operation, shape] = {
        "operation": operation,
        "shape": list(shape),
        "seconds": seconds,
        "ns_per_voxel": 1e9 * seconds / math.prod(shape),
        "bytes": size,
        "volumes": size / (4 * math.prod(shape)),
    }


@pytest.mark.parametrize("window", WINDOWS)
def test_windows(window, benchmark, inputs, device, results):
    """The cost of `lncc` does not depend on its window."""
    benchmark.group = "lncc, windows"
    x = inputs(cases.SMALL)
    run = cases.backward(lambda a, b: losses.lncc(a, b, window), x.moving, x.fixed)
    results["windows"][window] = {
        "operation": "lncc",
        "shape": list(cases.SMALL),
        "window": window,
        "seconds": best(benchmark, run, device),
    }
