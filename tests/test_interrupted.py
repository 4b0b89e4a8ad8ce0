"""What an interruption leaves: kills at each file operation, a full disk, several processes.

The processes are forked, so that none of them imports PyTorch again. Audit events tell of a file
operation before it happens.
"""

import errno
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import attack
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import regkit
from regkit import files, models, registration

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows forks no processes")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Three results of one tiny network, each different in every file; the first has labels."""
    weights = tmp_path_factory.mktemp("weights") / "w.safetensors"
    models.save(attack.tiny(), weights)
    labels = np.ones((20, 22), int)
    made = []
    for seed in range(3):
        moving, fixed = np.random.default_rng(seed).random((2, 20, 22))
        given = {"moving_labels": labels, "fixed_labels": labels} if seed == 0 else {}
        result = regkit.register(moving, fixed, weights, affine=False, **given)
        disp = torch.full_like(result.disp, seed)
        made.append(replace(result, disp=disp, metrics={**result.metrics, "run": seed}))
    return made


@pytest.fixture(scope="module", autouse=True)
def small_report():
    """A picture that is quickly drawn, another one for each result."""

    def report(self):
        figure = Figure((1, 1))
        figure.text(0, 0, str(self.metrics.get("run", "")))
        return figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration.Result, "report", report)
        yield


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.fixture(scope="module")
def whole(results, small_report, tmp_path_factory):
    """The files of each result, saved in peace."""
    found = []
    for result in results:
        folder = tmp_path_factory.mktemp("whole") / "out"
        result.save(folder)
        found.append(contents(folder))
    return found


def in_a_process(work, stop):
    """Fork, do `work` there, and stop it. Whether it came to its end before it was to stop."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    status = 1
    try:
        sys.addaudithook(stop)
        work()
        status = int(stop.passed >= stop.moment)
    finally:
        os._exit(status)


class Killed:
    """SIGKILL before the file operation of this number."""

    def __init__(self, moment):
        self.moment, self.passed = moment, 0

    def __call__(self, event, given):
        writes = event == "open" and isinstance(given[2], int) and given[2] & WRITING
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            self.passed += 1
            self.operation(event)

    def operation(self, event):
        if self.passed == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)


class Full(Killed):
    """The disk is full from this operation on: no file can be made any more, and no folder."""

    def operation(self, event):
        new = event in ("open", "os.mkdir") and self.passed >= self.moment
        if new or (event == "os.rename" and self.passed == self.moment):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def check_one_run(folder, whole):
    """All files that are seen are of one run, and all of them if the witness is there."""
    seen = contents(folder) if folder.is_dir() else {}
    owners = [run for run in whole if seen.items() <= run.items()]
    assert owners, f"files of several runs: {sorted(seen)}"
    if registration.FILES[-1] in seen:
        assert seen in owners
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("stop", [Killed, Full])
@pytest.mark.parametrize("old", [True, False])
def test_stopped_at_every_file_operation_all_files_are_of_one_run(
    old, stop, results, whole, tmp_path
):
    """The first run has labels and the second has none; a file of somebody else's stays."""
    first, second, third = results
    moment, ended, seen = 0, False, Counter()
    while not ended:
        moment += 1
        folder = tmp_path / f"{moment}" / "out"
        folder.parent.mkdir()
        if old:
            first.save(folder)
            (folder / "mine.txt").write_text("mine")
        ended = in_a_process(lambda folder=folder: second.save(folder), stop(moment))
        left = [{**run, "mine.txt": b"mine"} if old else run for run in whole[:2]]
        found = check_one_run(folder, left)
        seen[len(found)] += 1
        assert not old or found["mine.txt"] == b"mine"
        third.save(folder)  # the next run
        expected = {**whole[2], "mine.txt": b"mine"} if old else whole[2]
        assert contents(folder) == expected
        assert sorted(p.name for p in folder.iterdir()) == sorted(expected)
        assert [p.name for p in folder.parent.iterdir()] == ["out"]
    assert moment > 20
    print(f"{moment - 1} stops; files that were seen after them: {dict(seen)}")


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_that_write_one_folder_do_not_mix(processes, results, whole, tmp_path):
    folder = tmp_path / "out"

    def work(number):
        for turn in range(6):
            results[(number + turn) % 3].save(folder)

    children = []
    for number in range(processes):
        child = os.fork()
        if not child:
            status = 1
            try:
                work(number)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes
    assert contents(folder) in whole
    assert sorted(p.name for p in folder.iterdir()) == sorted(contents(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_in_a_shared_folder_is_not_followed(tmp_path):
    """Somebody puts links where temporary files used to be."""
    (tmp_path / "victim").write_text("mine")
    for name in ("w.safetensors.partial", "w.partial", ".regkit-files.lock"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    try:
        models.save(attack.tiny(), tmp_path / "w.safetensors")
    except OSError:
        pass  # a lock that cannot be taken
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_folder_of_a_living_process_is_not_swept(tmp_path):
    with files.staged(tmp_path) as mine:
        (mine / "a.txt").write_text("a")
        with files.staged(tmp_path) as other:
            (other / "b.txt").write_text("b")
        assert (mine / "a.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.txt"]


SIGNALLED = """
import os, signal, sys
from regkit import cli, io
def stop(*arguments, real=io.write_image):
    real(*arguments)
    os.kill(os.getpid(), getattr(signal, name))
name = sys.argv.pop()
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by jobs in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and by those of nohup
io.write_image = stop
cli.app()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_leaves_nothing(name, code, tmp_path):
    import nibabel

    image = np.random.default_rng(0).random((20, 22)).astype("f4")
    nibabel.save(nibabel.Nifti1Image(image, np.diag([2.2, 2.2, 2.2, 1])), tmp_path / "i.nii")
    models.save(attack.tiny(), tmp_path / "w.safetensors")
    (tmp_path / "s.py").write_text(SIGNALLED)
    before = sorted(p.name for p in tmp_path.iterdir())
    typed = ["register", "i.nii", "i.nii", "--method", "w.safetensors", "--affine", "none"]
    run = subprocess.run(
        [sys.executable, "s.py", *typed, "-o", "out", name],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before
