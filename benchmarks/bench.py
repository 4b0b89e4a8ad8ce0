"""Speed, memory and scaling: `make bench`, or some of it:

    python -m pytest benchmarks/bench.py -k "speed and lncc"

`test_speed` times each case of `cases.py`, ours and then the peer's, with the same inputs.
`test_memory` asks for the most that is allocated at once beside the inputs. `test_scaling` times
ours from 32^3 voxels to 160x192x160. Nothing is asserted about the clock: the numbers are written
to `results/` and read from there. The best of a few repetitions counts, after one to warm up.
"""

import math
import time
import tracemalloc

import cases
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

SECONDS = 2.0  # to spend on the repetitions of one side
SCALED = ("lncc", "warp", "integrate", "mutual_information", "jacobian_determinant", "dice")


@pytest.fixture(scope="session")
def brains():
    return cases.brains()


@pytest.fixture(scope="session")
def inputs(brains, device):
    """`inputs(shape)`: the pair at that size; only the last one is kept."""
    held = {}

    def at(shape):
        if shape not in held:
            held.clear()
            held[shape] = brains.resized(shape, device)
        return held[shape]

    return at


def best(benchmark, run, device):
    """Seconds of the fastest call."""

    def call():
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    call()
    rounds = int(SECONDS / (time.perf_counter() - start))
    benchmark.pedantic(call, rounds=min(20, max(2, rounds)))
    return benchmark.stats.stats.min


def peak_bytes(run, device):
    """The most that was allocated at once during a call, beyond what was there before it.

    On the CPU the allocator of torch and that of NumPy are watched, and the larger peak counts.
    """
    run()  # what is made once and kept does not count
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    tracemalloc.start()
    run()
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = record.profiler.kineto_results.events()
    steps = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = torch_peak = 0
    for _, size in steps:  # a release counts negative
        held += size
        torch_peak = max(torch_peak, held)
    return max(torch_peak, numpy_peak)


def skip_unless_possible(case, device):
    if device == "cuda" and case.device == "cpu":
        pytest.skip("the peer computes on the CPU only")
    if "MONAI" in case.peer:
        pytest.importorskip("monai")


@pytest.mark.parametrize("side", ["ours", "peer"])
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_speed(case, side, benchmark, inputs, device, results):
    skip_unless_possible(case, device)
    benchmark.group = case.name
    both = case.build(inputs(case.shape))
    seconds = best(benchmark, both[side == "peer"], device)
    row = results["speed"].setdefault(
        case.name,
        {"operation": case.operation, "case": case.describe(case.shape), "peer": case.peer},
    )
    if side == "ours":
        row["seconds"] = seconds
    else:
        row |= {
            "peer_seconds": seconds,
            "ratio": None,  # filled in when both are there
            "asked": case.asked,
            "difference": cases.difference(both[0](), both[1]()),
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
