"""The comparison of Hu (2024) runs, measures what it says, and goes on where it was stopped."""

import json
import math
from dataclasses import replace

import hu2024
import pytest
import torch

from regkit import models
from regkit.spatial import rigid_theta


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Small heads, and a small network that has not learned anything, in the place of ours."""
    path = tmp_path / "toy.safetensors"
    models.save(models.create("rigid_resnet34", ndim=2, width=4), path)
    monkeypatch.setattr(hu2024, "SHAPE", (100, 100))
    sets = {name: replace(one, weights=str(path)) for name, one in hu2024.SETS.items()}
    monkeypatch.setattr(hu2024, "SETS", sets)
    monkeypatch.setattr(hu2024, "untrained", lambda: hu2024.network(path))
    return path


def test_the_errors_of_known_motions(toy):
    pair = hu2024.draw(hu2024.SETS["t1"], 1)[0]
    turn = torch.tensor([[math.radians(3.0)]])
    row = hu2024.errors(
        [pair.theta, rigid_theta(turn, torch.tensor([[0.3, 0.4]]))],
        [pair, replace(pair, theta=rigid_theta(0 * turn, torch.zeros(1, 2)))],
    )
    assert row["rotation_largest"] == pytest.approx(3, abs=1e-4)
    assert row["rotation_mean"] == pytest.approx(1.5, abs=1e-4)
    assert row["shift_largest"] == pytest.approx(0.5, abs=1e-4)
    assert row["success"] == 0.5
    assert hu2024.dice(pair, pair.theta) > 0.9 > hu2024.dice(pair, torch.eye(2, 3)[None])


@pytest.mark.slow
def test_a_run_measures_each_method_and_a_second_one_nothing(toy, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results" / "hu.json"
    table = hu2024.run(out, pairs=2, threads=1, sets=("t1",))
    assert table == json.loads(out.read_text())
    assert "affine network is left out" in capsys.readouterr().err  # its weights are not there
    rows = {row["method"]: row for row in table["rows"]}
    assert {"network", "network + 10 steps", "network, width 64", "descent"} <= set(rows)
    assert table["sets"][0]["pairs"] == 2 and table["made"]["threads"] == 1
    for name, row in rows.items():
        assert row["seconds"] > 0 and ("success" in row) == (name != "network, width 64")
        assert ("seconds_batch_32" in row) == name.startswith("network,") or name == "network"
        if name in ("descent", "SimpleITK, correlation", "SimpleITK, Mattes"):
            assert row["success"] == 1, name
    before = table["sets"][0]
    assert rows["network"]["rotation_mean"] == before["rotation_mean_before"]  # it says: no motion
    assert rows["descent"]["dice"] > before["dice_before"]

    def missing(entry, pairs):
        raise FileNotFoundError

    monkeypatch.setattr(hu2024, "measure", missing)  # a row that is measured again is lost
    again = hu2024.run(out, pairs=2, threads=1, sets=("t1",))
    assert again["rows"] == table["rows"]


def test_other_weights_are_measured_again_and_other_sets_stay(toy, tmp_path, monkeypatch):
    measured = []

    def measure(entry, pairs):
        measured.append((entry.set, entry.method))
        return {"seconds": 1.0}

    monkeypatch.setattr(hu2024, "measure", measure)
    out = tmp_path / "hu.json"
    hu2024.run(out, pairs=1, threads=1)
    assert {name for name, _ in measured} == set(hu2024.SETS)
    everything = list(measured)
    measured.clear()
    models.save(models.create("rigid_resnet34", ndim=2, width=4), toy)  # other random numbers
    table = hu2024.run(out, pairs=1, threads=1, sets=("wide",))
    assert measured == [("wide", "network"), ("wide", "network + 10 steps")]
    assert [(row["set"], row["method"]) for row in table["rows"]] == everything
    assert [row["set"] for row in table["sets"]] == list(hu2024.SETS)


def test_a_stopped_run_goes_on(toy, tmp_path, monkeypatch):
    done = []

    def measure(entry, pairs):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(entry.method)
        return {"seconds": 1.0}

    monkeypatch.setattr(hu2024, "measure", measure)
    out = tmp_path / "hu.json"
    with pytest.raises(KeyboardInterrupt):
        hu2024.run(out, pairs=1, threads=1)
    assert [row["method"] for row in json.loads(out.read_text())["rows"]] == done
    first = done.copy()
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        hu2024.run(out, pairs=1, threads=1)
    assert not set(first) & set(done)
    assert len(json.loads(out.read_text())["rows"]) == 6


def test_an_unknown_set_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="sets holds 't3', expected some of t1, contrasts, wide"):
        hu2024.run(tmp_path / "hu.json", sets=("t3",))
    assert list(tmp_path.iterdir()) == []
