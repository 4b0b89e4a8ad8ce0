"""What each effort brings: scores are those of maps that are known, and the study resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import common
import numpy as np
import pytest
import torch
import what_you_get
from what_you_get import OUTLIER, Pair, judged, measured

from regkit.data.population import population, true_displacement
from regkit.data.subject import Subject


@pytest.fixture
def people() -> Pair:
    a, b = population(2, (48, 56), 0)
    return Pair(a, b, truth=true_displacement(a, b))


def test_without_a_map_the_error_is_the_truth_and_with_the_truth_it_is_none(people):
    still = measured(people, "headers")
    inside = people.fixed.labels[0] > 0
    lengths = people.truth[0].norm(dim=0)[inside] * people.fixed.spacing[0]
    assert still["error"] == pytest.approx(float(lengths.mean()), rel=1e-4)
    assert still["folding_percent"] == 0 and still["memory_gb"] >= 0
    best = judged(people, np.eye(4), people.truth)
    assert best["error"] < 1e-3 and best["dice"] > still["dice"] + 0.1


HUNGRY = """
import json
import numpy as np
import torch
import what_you_get
from regkit.data.population import population, true_displacement

def hungry(pair, matrix):
    held = [torch.ones(50_000) for _ in range(400)]  # 80 MB in small pieces
    return what_you_get.still(pair, matrix) + 0 * len(held)

a, b = population(2, (48, 56), 0)
people = what_you_get.Pair(a, b, truth=true_displacement(a, b))
what_you_get.METHODS["hungry"] = what_you_get.Entry("hungry", hungry)
rows = [what_you_get.measured(people, "hungry", np.eye(4)) for _ in range(2)]
print(json.dumps([row["memory_gb"] for row in rows]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an earlier peak stays")
def test_memory_that_was_freed_before_does_not_hide_a_peak():
    """In a process of its own: one that has run other tests may have room for all of it."""
    studies = Path(what_you_get.__file__).parent
    paths = os.pathsep.join([str(studies), str(studies.parent)])
    run = subprocess.run(
        [sys.executable, "-c", HUNGRY],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 2 and all(0.07 < gigabytes < 0.1 for gigabytes in found)


@pytest.mark.parametrize("method", ["engine_fast", "auto"])
def test_a_method_of_ours_comes_nearer_to_the_truth(people, method):
    still, row = (measured(people, name, np.eye(4)) for name in ("headers", method))
    assert row["error"] < 0.8 * still["error"] and row["dice"] > still["dice"] + 0.05


def test_the_affine_map_moves_landmarks_and_labels_and_the_outlier_is_left_out():
    """A block, shifted by 3 mm along the first axis; voxels of 1.5 mm."""
    block = torch.zeros(1, 20, 16, 16)
    block[:, 6:12, 4:12, 4:12] = 1
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    fixed = Subject("fixed", block, block.short(), affine)
    moved = block.roll(2, 1)
    points = np.random.default_rng(0).uniform(8, 16, (26, 3))
    shift = np.eye(4)
    shift[0, 3] = 3.0
    disp = torch.zeros(1, 3, 20, 16, 16)
    moving = Subject("moving", moved, moved.short(), affine)
    assert judged(Pair(moving, fixed), np.eye(4), disp)["dice"] == pytest.approx(4 / 6)
    assert judged(Pair(moving, fixed), shift, disp)["dice"] == 1
    partners = points + [3.0, 0, 0]
    partners[OUTLIER] += 100
    pair = Pair(moving, fixed, partners, points)
    assert judged(pair, np.eye(4), disp)["tre"] == pytest.approx(3.0)
    assert judged(pair, shift, disp)["tre"] == pytest.approx(0.0, abs=1e-9)
    disp[:, 0] = 1.0  # a voxel, 1.5 mm, before the matrix
    assert judged(pair, shift, disp)["tre"] == pytest.approx(1.5)


class Here:
    """A process pool that runs in this process."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, call, *arguments):
        return type("Done", (), {"result": lambda self: call(*arguments)})()


def test_methods_take_turns_rows_resume_and_what_fails_is_left_out(
    people, tmp_path, monkeypatch, capsys
):
    asked = []

    def answer(name, index, method, matrix):
        asked.append((index, method))
        if method == "syn":
            raise ImportError("ANTs is not installed.")
        assert (matrix is None) == (method in ("headers", "affine"))
        row = {"dice": index / 2, "folding_percent": 0.0, "cpu_seconds": 1.0 + 3 * index}
        return row | {"seconds": 9.0, "memory_gb": 0.1, "matrix": np.eye(4).tolist()}

    swapped = Pair(people.fixed, people.moving)
    monkeypatch.setattr(what_you_get, "pairs", lambda name: [people, swapped])
    monkeypatch.setattr(what_you_get, "in_process", answer)
    monkeypatch.setattr(what_you_get, "ProcessPoolExecutor", Here)
    out = tmp_path / "what_you_get.json"
    methods = ("affine", "greedy", "syn")
    table = what_you_get.run(out, ["slices"], methods)
    assert asked == [(i, method) for i in (0, 1) for method in methods]
    assert json.loads(out.read_text()) == table
    assert capsys.readouterr().err.count("syn is left out. ANTs is not installed.") == 2
    lines = {line["method"]: line for line in table["summary"]}
    assert list(lines) == ["affine", "greedy"]  # as in METHODS
    assert lines["greedy"]["pairs"] == 2 and lines["greedy"]["dice"] == 0.25
    assert lines["greedy"]["cpu_seconds"] == 2.5  # the median of 1 and 4

    asked.clear()
    what_you_get.run(out, ["slices"], ["greedy"])
    assert not asked
    what_you_get.run(out, ["slices"], ["greedy"], most=1, fresh=True)
    assert asked == [(0, "greedy")]
    what_you_get.run(tmp_path / "other.json", ["slices"], ["greedy"], most=1)
    assert "affine registration of this pair is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"sets": ["knee"]}, "sets holds 'knee', expected some of oasis, "),
        ({"methods": ["icp"]}, "methods holds 'icp', expected some of headers, affine, "),
        ({"most": 0}, "most is 0, expected at least 1 pair."),
    ],
)
def test_wrong_input_is_one_sentence(wrong, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        what_you_get.run(tmp_path / "out.json", **wrong)


@pytest.mark.slow
@pytest.mark.real
def test_the_real_pairs_have_what_their_rows_are_judged_by(sample):
    for name in ("ptbp_brain", "oasis_3d", "lung_ct", "prostate_mr_us"):
        sample(name)
    for name, count in (("slices", 6), ("oasis_slices", 1), ("prostates", 4), ("lung", 1)):
        pairs = what_you_get.SETS[name]()
        assert len(pairs) == len({pair.name for pair in pairs}) == count
        for pair in pairs:
            if name == "lung":
                assert pair.moving_points.shape == pair.fixed_points.shape == (26, 3)
            else:
                held = [
                    {*scan.labels.unique().tolist()} - {0} for scan in (pair.moving, pair.fixed)
                ]
                assert held[0] == held[1] and held[0]
            assert pair.contrasts == (2 if name == "prostates" else 1)


RESULT = json.loads((common.RESULTS / "what_you_get.json").read_text())
PEERS = ("greedy", "syn", "syn_as_it_comes", "elastix")


def of(name: str) -> dict[str, dict]:
    return {line["method"]: line for line in RESULT["summary"] if line["set"] == name}


def test_what_the_page_says_of_the_efforts_is_in_the_numbers():
    """book/what_you_get.md, "Which effort for what": where this fails, the text has to follow."""
    for name in ("oasis", "slabs", "slices"):
        rows = of(name)
        peers = [rows[peer]["dice"] for peer in PEERS if peer in rows]
        assert rows["engine_default"]["dice"] > max(peers), name
        assert rows["engine_fast"]["dice"] > rows["syn_as_it_comes"]["dice"], name
        assert rows["engine_fast"]["cpu_seconds"] < rows["engine_default"]["cpu_seconds"], name
    for name in ("oasis", "slabs"):
        rows = of(name)
        assert rows["engine_default"]["cpu_seconds"] < rows["greedy"]["cpu_seconds"], name
        gain = rows["engine_best"]["dice"] - rows["engine_default"]["dice"]
        assert 0.01 < gain < 0.04, name
        ratio = rows["engine_best"]["cpu_seconds"] / rows["engine_default"]["cpu_seconds"]
        assert 3 < ratio < 4.5, name
    brains = of("oasis")
    half = brains["greedy"]["cpu_seconds"] / 2
    assert brains["engine_default"]["cpu_seconds"] == pytest.approx(half, rel=0.05)
    lung = of("lung")
    assert lung["engine_best"]["tre"] > lung["engine_default"]["tre"] > lung["greedy"]["tre"]
    assert lung["greedy"]["cpu_seconds"] > lung["engine_default"]["cpu_seconds"]
    heads = of("population_2d")
    assert (
        heads["headers"]["error"] > 5 and heads["syn"]["error"] < heads["engine_default"]["error"]
    )
    for name in ("population_2d", "oasis_slices", "slices"):
        rows = of(name)
        assert rows["greedy"]["dice"] < rows["engine_default"]["dice"], name
        ratio = rows["greedy"]["cpu_seconds"] / rows["engine_default"]["cpu_seconds"]
        assert 0.45 < ratio < 0.7 and rows["engine_default"]["cpu_seconds"] < 1, name
    pair = of("oasis_slices")
    assert pair["syn"]["dice"] > pair["engine_default"]["dice"]
    assert pair["syn"]["cpu_seconds"] > 3 * pair["engine_default"]["cpu_seconds"]
    prostates = of("prostates")
    order = ["engine_best", "engine_default", "engine_fast", "headers"]
    dice = [prostates[method]["dice"] for method in order]
    assert dice == sorted(dice)
    still = prostates["headers"]["dice"]
    assert prostates["greedy"]["dice"] < still < prostates["syn_as_it_comes"]["dice"]
