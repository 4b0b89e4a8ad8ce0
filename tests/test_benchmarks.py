"""The benchmarks compare like with like: at toy size both sides run and agree."""

import json
import math
from pathlib import Path

import bench
import cases
import pytest
import torch

ROOT = Path(__file__).parents[1]
SHAPE = (20, 24, 22)


@pytest.fixture(scope="module")
def toys():
    return cases.toys(SHAPE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of MONAI, about itself
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_ours_and_the_peer_compute_the_same(case, toys):
    if "MONAI" in case.peer:
        pytest.importorskip("monai")
    ours, peer = case.build(toys)
    assert cases.difference(ours(), peer()) <= case.tolerance


def test_the_difference_sees_one_voxel_and_lets_equal_infinities_pass():
    a = torch.tensor([0.0, 1.0, torch.nan, torch.inf])
    assert cases.difference(a, a.clone()) == 0
    assert cases.difference(a, torch.tensor([0.0, 1.5, torch.nan, torch.inf])) == 0.5
    assert math.isnan(cases.difference(a, torch.tensor([torch.nan, 1.0, torch.nan, torch.inf])))


def test_the_smooth_field_does_not_fold():
    from regkit.spatial import jacobian_determinant

    for shape in cases.SCALING[:2]:
        assert jacobian_determinant(cases.smooth_disp(shape)).min() > 0


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_results_are_those_of_the_cases(device):
    """A case that is added or renamed asks for a new run."""
    path = ROOT / "results" / f"bench-{device}.json"
    if device == "gpu" and not path.exists():
        pytest.skip("no GPU has run the benchmarks yet.")
    result = json.loads(path.read_text())
    expected = [
        (case.operation, case.describe(case.shape), case.peer)
        for case in cases.CASES
        if device == "cpu" or case.device == "any"
    ]
    for kind in ("speed", "memory"):
        found = [(row["operation"], row["case"], row["peer"]) for row in result[kind]]
        assert found == expected
    for row in result["speed"]:
        assert row["ratio"] == pytest.approx(row["peer_seconds"] / row["seconds"], rel=1e-3)
    assert {tuple(row["shape"]) for row in result["scaling"]} == set(cases.SCALING)
    assert {row["operation"] for row in result["scaling"]} == set(bench.SCALED)
    assert [row["window"] for row in result["windows"]] == list(bench.WINDOWS)
