"""Pairs made by worker processes: the same for any number of them, and no process stays behind."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from regkit import models
from regkit.data import RandomPairs, chain, population
from regkit.data.chest import ChestPairs, chests
from regkit.training import batches, loop, recipes, tasks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks")
ROOT = Path(__file__).parents[1]
SMALL = {"subjects": 4, "validation": 2, "steps": 4, "batch": 2, "validate_every": 2}
MOTION = {"angle": 30.0, "shift": 20.0, "contrasts": ("t1", "t2"), "tilt": 15.0, "size": 0.2}
PAIRS = {  # one recipe for each kind of pairs
    "RandomPairs": ("vxm_2d", {"shape": (32, 48), "gamma": 0.3}),
    "RandomPairs of one fixed image": ("sun2025_2d", {"shape": (32, 48)}),
    "RigidPairs": ("rigid_resnet34_2d", {"shape": (48, 48), "gamma": 0.3, "motion": MOTION}),
    "PaintedPairs": ("any_contrast_2d", {"shape": (32, 48)}),
    "ChestPairs": ("fcn_2d", {"shape": (32, 32)}),
}


def given_pairs(recipe):
    subjects = population(3, recipe.shape, 0)
    return tasks.GivenPairsTask(recipe, chain(subjects), chain(subjects)[:1])


def small(kind):
    if kind == "GivenPairs":
        recipe = recipes.get("vxm_2d", "smoke", **SMALL, shape=(32, 48))
        return recipe, given_pairs(recipe)
    name, changes = PAIRS[kind]
    recipe = recipes.get(name, "smoke", **{**SMALL, **changes})
    return recipe, tasks.task_of(recipe, None, False)


def children():
    """The processes below this one, zombies included, except those of multiprocessing itself."""
    found = subprocess.run(
        ["ps", "-o", "pid=,stat=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    ).stdout.splitlines()
    own = ("ps -o", "resource_tracker", "forkserver")
    return [line for line in found if not any(word in line for word in own)]


def same(a, b):
    return all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
        for key in a
    )


def made(pairs, workers, size=2):
    made = batches.batches(pairs, range(1, len(pairs)), size, workers, Accelerator(cpu=True))
    return list(made)


@pytest.mark.parametrize("kind", [*PAIRS, "GivenPairs"])
def test_any_number_of_workers_makes_the_same_batches(kind):
    """Also where this process has several threads, of which a worker has one."""
    recipe, task = small(kind)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = made(task.pairs, 0)
    finally:
        torch.set_num_threads(threads)
    assert len(alone) == 4 and len(alone[0]["name"]) == 2 and len(alone[-1]["name"]) == 1
    for workers in (1, 2):
        assert all(map(same, alone, made(task.pairs, workers)))
    expected = [task.pairs[i]["moving"] for i in range(1, 8)]
    assert torch.equal(torch.cat([batch["moving"] for batch in alone]), torch.stack(expected))
    assert children() == []


@pytest.mark.parametrize("kind", ["RandomPairs", "GivenPairs"])
def test_any_number_of_workers_ends_in_the_same_weights(kind, tmp_path):
    """And a run goes on with another number, after the sitting that had to end early."""
    recipe, task = small(kind)
    runs = [
        loop.train(recipe, progress=False, device="cpu", task=task, workers=workers)
        for workers in (0, 1, 2)
    ]
    how = {"progress": False, "device": "cpu", "task": task}
    early = loop.train(recipe, tmp_path, workers=2, minutes=1e-9, **how)
    assert len(early.history) == 2 and children() == []
    runs.append(loop.train(recipe, tmp_path, resume=True, workers=1, **how))
    for other in runs[1:]:
        assert other.history == runs[0].history
        for key, value in runs[0].model.state_dict().items():
            assert torch.equal(other.model.state_dict()[key], value)
    assert children() == []


def test_workers_take_no_random_numbers_of_the_run():
    _, task = small("RandomPairs")
    torch.manual_seed(3)
    expected = torch.rand(4)
    for workers in (0, 2):
        torch.manual_seed(3)
        made(task.pairs, workers)
        assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("workers", "device", "processes", "expected"),
    [
        (None, "cpu", 1, 0), (None, "cuda", 1, 3), (None, "cuda", 2, 1), (None, "cuda", 8, 1),
        (0, "cuda", 1, 0), (2, "cpu", 1, 2), (7, "cuda", 1, 7),
    ],
)  # fmt: skip
def test_how_many_workers_there_are(workers, device, processes, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    count = batches.worker_count(workers, torch.device(device), processes)
    assert count == expected


def test_at_most_four_workers_unless_more_are_asked_for(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert batches.worker_count(None, torch.device("cuda")) == 4
    monkeypatch.setattr(sys, "platform", "darwin")
    assert batches.worker_count(None, torch.device("cuda")) == 0
    with pytest.raises(ValueError, match="workers is 2 on darwin, expected 0: only Linux forks"):
        batches.worker_count(2, torch.device("cpu"))


def test_a_wrong_number_of_workers_leaves_no_folder(tmp_path):
    recipe, task = small("RandomPairs")
    with pytest.raises(ValueError, match="workers is -1, expected 0 or more"):
        loop.train(recipe, tmp_path / "run", progress=False, task=task, workers=-1)
    assert not (tmp_path / "run").exists()


# --- what goes wrong --------------------------------------------------------------------------


class Failing(Dataset):
    """Pairs, the fifth of which raises."""

    def __init__(self, pairs, error):
        self.pairs, self.error = pairs, error

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        if index == 5:
            raise self.error
        return self.pairs[index]


class Custom:
    """A task that somebody has written."""

    def __init__(self, error):
        subjects = population(3, (32, 48), 0)
        self.pairs, self.info = Failing(RandomPairs(subjects, 8), error), {}

    def validate(self, model, device):
        return {"dice": 0.0}

    def score(self, scores):
        return scores["dice"]


SENTENCES = [
    ValueError("data holds an image that cannot be read, expected one."),
    FileNotFoundError("data lacks a.nii.gz, expected the file."),
]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("error", SENTENCES)
def test_an_error_of_a_worker_is_the_same_sentence(error, workers, tmp_path):
    recipe, _ = small("RandomPairs")
    with pytest.raises(type(error)) as caught:
        loop.train(
            recipe, tmp_path, progress=False, device="cpu", task=Custom(error), workers=workers
        )
    assert str(caught.value) == str(error) and type(caught.value) is type(error)
    assert children() == []
    # the first validation is there, and the run goes on once the file is back
    assert (tmp_path / "history.json").is_file()
    assert len(json.loads((tmp_path / "history.json").read_text())) == 2
    task = Custom(error)
    task.pairs = task.pairs.pairs
    resumed = loop.train(recipe, tmp_path, resume=True, progress=False, device="cpu", task=task)
    assert len(resumed.history) == 4


def test_a_fault_of_the_code_keeps_its_traceback():
    _, task = small("RandomPairs")
    with pytest.raises(TypeError, match="unsupported operand") as caught:
        made(Failing(task.pairs, TypeError("unsupported operand")), 1)
    assert "in __getitem__" in str(caught.value)


def test_a_worker_that_is_killed_is_one_sentence():
    class Kills(Failing):
        def __getitem__(self, index):
            if index == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.pairs[index]

    _, task = small("RandomPairs")
    with (
        pytest.raises(ValueError, match="A process that makes pairs has died, expected it to"),
        batches.living_workers(),
    ):
        made(Kills(task.pairs, None), 1)
    assert children() == []


def cut(pid):
    """What unpickling does where a worker dies in the middle of handing over a tensor."""
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    raise ConnectionResetError("Connection reset by peer")


class CutOff(str):
    """A name that cannot be handed over to another process."""

    def __reduce__(self):
        return cut, (os.getpid(),)


def test_a_worker_that_dies_while_it_hands_over_a_batch_is_the_same_sentence():
    """The connection is cut before PyTorch knows that the worker is dead."""

    class Cuts(Failing):
        def __getitem__(self, index):
            name = self.pairs[index]["name"]
            return {"name": CutOff(name) if index == 5 else name}

    _, task = small("RandomPairs")
    said = "nothing"
    try:
        with batches.living_workers():
            made(Cuts(task.pairs, None), 1)
    except Exception as error:
        said = repr(error)
    with contextlib.suppress(RuntimeError):  # a signal that comes late is not for the next test
        time.sleep(1.0)
    assert "ValueError('A process that makes pairs has died, expected it to live" in said
    assert children() == []


def test_a_worker_may_die_while_the_network_computes(monkeypatch):
    """The error then comes at a line of the training, not where the next batch is asked for."""
    real = loop.objective

    def slow(*arguments):
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        for _ in range(1000):
            pass  # the signal arrives between two lines of Python
        return real(*arguments)

    monkeypatch.setattr(loop, "objective", slow)
    recipe, _ = small("RandomPairs")
    with pytest.raises(ValueError, match="A process that makes pairs has died, expected it to"):
        loop.train(recipe, progress=False, device="cpu", workers=1)
    assert children() == []


KILLED = """
import os, signal, sys
from regkit.training import loop, recipes
real, calls = loop.objective, []
def counted(*arguments):
    calls.append(1)
    if len(calls) == 4 + 1:  # one before the first step: settings are tried with zeros
        print(*[p.pid for p in __import__("multiprocessing").active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
loop.objective = counted
recipe = recipes.get("vxm_2d", "smoke", subjects=4, validation=2, steps=6, batch=2,
                     validate_every=2, shape=(32, 48))
loop.train(recipe, sys.argv[1], resume=True, progress=False, device="cpu", workers=2)
"""


@pytest.mark.slow
def test_killed_with_its_workers_a_run_goes_on_to_the_same_weights(tmp_path):
    """Its workers die with it: they would hold the lock on the folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "run")],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert run.returncode == -signal.SIGKILL, run.stderr
    workers = run.stdout.split()
    assert len(workers) == 2
    deadline = time.monotonic() + 2  # their own check would take five seconds
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    recipe = recipes.get("vxm_2d", "smoke", **{**SMALL, "steps": 6}, shape=(32, 48))
    resumed = loop.train(
        recipe, tmp_path / "run", resume=True, progress=False, device="cpu", workers=2
    )
    whole = loop.train(recipe, tmp_path / "whole", progress=False, device="cpu")
    assert resumed.history == whole.history
    for key, value in models.load(tmp_path / "whole" / "last.safetensors").state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value)
    shutil.rmtree(tmp_path / "run")


# --- what is drawn once -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 28), (16, 20, 16)])
def test_a_chest_that_is_drawn_once_is_what_it_was(shape):
    """The same pair from pairs that have drawn everybody already, and from fresh ones."""
    patients = chests(2, len(shape), 0)
    used = ChestPairs(patients, shape, 6)
    for index in range(6):
        used[index]
    for index in range(6):
        fresh = ChestPairs(patients, shape, 6)[index]
        again = used[index]
        assert same(fresh, again)
        again["moving_labels"] += 1  # what somebody does to an item, others do not see
        assert same(fresh, used[index])
