"""What all data sets of pairs share: they end, their cache holds whole files, subjects compare."""

import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass

import pytest
import torch

from regkit import data, metrics, spatial
from regkit.data import cache, chest, prepared, rigid, vessels
from regkit.data.anatomies import Anatomy, anatomies
from regkit.data.contrast import PaintedPairs
from regkit.models import Registration

SHAPE = (48, 56)
population = importlib.import_module("regkit.data.population")  # not the function


def subjects():
    return data.population(3, SHAPE)


DATASETS = {
    "RandomPairs": lambda n: data.RandomPairs(subjects(), n),
    "RandomPairs to one": lambda n: data.RandomPairs(subjects(), n, fixed=subjects()[0]),
    "GivenPairs": lambda n: data.GivenPairs(data.chain(subjects()), n),
    "RigidPairs": lambda n: data.RigidPairs([subjects()], n),
    "ChestPairs": lambda n: chest.ChestPairs(chest.chests(2, 2), SHAPE, n),
    "PaintedPairs": lambda n: PaintedPairs(anatomies(2, SHAPE, brains=False), SHAPE, n),
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_ends(name):
    pairs = DATASETS[name](5)
    listed = list(pairs)
    assert len(listed) == len(pairs) == 5
    assert pairs[-1]["name"] == listed[4]["name"] == pairs[4]["name"]
    assert torch.equal(pairs[-5]["moving"], listed[0]["moving"])
    for index in (5, 6, 1000, -6):
        with pytest.raises(IndexError, match=f"index is {index}, expected less than the 5 pairs"):
            pairs[index]
    assert list(DATASETS[name](0)) == []


def test_the_pair_behind_an_item_ends_there_too():
    pairs = DATASETS["RigidPairs"](2)
    assert torch.equal(pairs.pair(-1).theta, pairs.pair(1).theta)
    with pytest.raises(IndexError, match="index is 2"):
        pairs.pair(2)


# ----------------------------------------------------------------------------------- the cache


@pytest.mark.slow
def test_threads_that_ask_for_one_subject_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("REGKIT_DATA", str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: data.population([7], SHAPE)[0], range(16)))
        brains = list(pool.map(lambda _: anatomies(1, SHAPE, brains=False)[0], range(16)))
    assert all(torch.equal(one.image, found[0].image) for one in found)
    assert all(torch.equal(one.labels, brains[0].labels) for one in brains)
    left = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(left) == ["0-0007.safetensors", "template-0-0000.npz"]


@pytest.mark.slow
def test_processes_that_write_one_file_leave_it_whole(tmp_path):
    code = """if True:
        import sys
        from pathlib import Path
        from regkit.data.cache import written_once
        for _ in range(200):
            with written_once(Path(sys.argv[1])) as partial:
                partial.write_bytes(b"whole" * 10_000)
    """
    file = tmp_path / "kept.npz"
    command = [sys.executable, "-c", code, str(file)]
    running = [subprocess.Popen(command) for _ in range(2)]
    while any(one.poll() is None for one in running):
        assert not file.exists() or file.read_bytes() == b"whole" * 10_000
    assert [one.returncode for one in running] == [0, 0]
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_of_the_cache_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "kept.npz"
    with pytest.raises(OSError, match="full"), cache.written_once(path) as partial:
        partial.write_bytes(b"half")
        raise OSError("the disk is full")
    assert list(path.parent.iterdir()) == []
    with cache.written_once(path) as partial:
        assert partial.suffix == ".npz" and partial.parent == path.parent
        partial.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and list(path.parent.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask  # others may read it, as any new file


def test_the_key_of_the_cache_changes_with_the_code_that_makes_subjects():
    """With the file itself, and with each function of another module that subjects go through."""

    def integrate(svf):
        return svf

    keys = [
        cache.source_hash(population.__file__),
        cache.source_hash(population.__file__, spatial.integrate),
        cache.source_hash(population.__file__, integrate),
        cache.source_hash(cache.__file__, integrate),
    ]
    assert len(set(keys)) == 4
    assert {spatial.integrate, spatial.warp, spatial.compose} <= set(population.SPATIAL)


# ------------------------------------------------------------------------------------ equality


def test_what_holds_tensors_is_equal_to_itself_alone_and_may_stand_in_a_set():
    """Comparing tensors one by one has no single answer; the same object is the same."""
    a, b = data.population(2, SHAPE)
    pair = vessels.vessel_pair(size=64)
    held = [
        a,
        pair,
        pair.moving,
        data.RigidPairs([[a]], 1).pair(0),
        anatomies(1, SHAPE, brains=False)[0],
        chest.chests(1, 2)[0],
        Registration(a.image[None], torch.zeros(1, 2, *SHAPE)),
    ]
    for one in held:
        assert one == one and one in [b, one] and len({one, one, b}) == 2
    assert a != b and a != data.population(1, SHAPE)[0]
    for module in (population, prepared, rigid, vessels, chest):
        for kind in vars(module).values():
            if is_dataclass(kind) and any(
                "Tensor" in f.type or "ndarray" in f.type for f in fields(kind)
            ):
                assert kind.__eq__ is object.__eq__, kind
    assert Anatomy.__eq__ is object.__eq__


# -------------------------------------------------------------------------------- label maps


WHOLE = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", [*WHOLE, torch.uint16])
def test_metrics_take_labels_of_every_whole_dtype(dtype):
    a = torch.zeros(1, 1, 12, 14, dtype=torch.int64)
    b = a.clone()
    a[..., 3:9, 3:9], b[..., 4:9, 3:9] = 1, 1
    assert float(metrics.dice(a.to(dtype), b.to(dtype))) == pytest.approx(2 * 30 / 66)
    assert float(metrics.hd95(a.to(dtype), b.to(dtype))) == pytest.approx(1)
    shift = torch.zeros(1, 2, 12, 14)
    moved = spatial.warp(a.to(dtype), shift, mode="nearest")
    assert moved.dtype == dtype and torch.equal(moved.long(), a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_metrics_refuse_labels_that_are_not_whole_numbers_by_type(dtype):
    a = torch.ones(1, 1, 12, 14, dtype=dtype)
    for metric in (metrics.dice, metrics.hd95):
        with pytest.raises(ValueError, match="expected integer label maps"):
            metric(a, a)


def test_labels_beyond_int16_stay_what_they_are():
    a = torch.zeros(1, 1, 12, 14, dtype=torch.int64)
    a[..., 3:9, 3:9] = 40001
    assert metrics.dice(a, a, [40001]).tolist() == [[1.0]]
    assert metrics.hd95(a, a).shape == (1, 1)
