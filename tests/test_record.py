"""Results say how they were made, and their file is complete at every moment.

What `regkit.record` says of this machine is compared with what git, Python and /proc say.
"""

import contextlib
import datetime
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import regkit
from regkit import models, record
from regkit.immutable import frozen
from regkit.record import Rows

ROOT = Path(__file__).parents[1]


def git(folder, *words):
    """What git says; it needs a name for whoever commits."""
    names = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    command = ["git", *names, "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def number_in(file, line):
    """A number of kB in a file of /proc, in bytes."""
    (text,) = [x for x in Path(file).read_text().splitlines() if x.startswith(f"{line}:")]
    return 1024 * int(text.split()[1])


# ------------------------------------------------------------------------------------ provenance


def test_how_made_says_on_what_from_which_code_when_and_with_what():
    before = torch.get_num_threads()
    made = record.how_made("regkit x", seed=3, packages=("numpy", "no-such-package"))
    assert list(made) == [
        "command", "device", "threads", "load", "commit", "date", "seed", "versions"
    ]  # fmt: skip
    assert made["command"] == "regkit x" and made["seed"] == 3 and made["threads"] == before
    assert record.made_now(threads=7)["threads"] == 7
    assert made["versions"] == {
        "python": platform.python_version(),
        "regkit": regkit.__version__,
        "torch": torch.__version__,
        "numpy": version("numpy"),
    }
    assert datetime.date.fromisoformat(made["date"]) <= datetime.date.today()
    assert made["load"] == pytest.approx(float(Path("/proc/loadavg").read_text().split()[0]), abs=1)
    assert "seed" not in record.how_made("regkit x")


def test_the_device_is_the_name_of_the_processor(monkeypatch):
    name = record.device_name()
    if Path("/proc/cpuinfo").is_file():
        assert f": {name}\n" in Path("/proc/cpuinfo").read_text()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {device}")
    assert record.device_name("cuda:1") == "NVIDIA cuda:1"


def test_the_command_holds_no_folder(monkeypatch):
    words = ["/a/b/prog.py", "--data", "/b/x/set one", "-o", "runs/a.json", "--out=/r/b.json"]
    words += ["--row", "VoxelMorph, half", "--spacing=1", "--no-syn", "/"]
    monkeypatch.setattr(sys, "argv", words)
    typed = record.typed_command("python studies/lung.py")
    assert shlex.split(typed) == [
        "python", "studies/lung.py", "--data", "set one", "-o", "a.json", "--out=b.json",
        "--row", "VoxelMorph, half", "--spacing=1", "--no-syn", "/",
    ]  # fmt: skip


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout with code of its own; the record's file lies in it."""
    for file in ("regkit/record.py", "studies/one.py", "notes.txt", "results/one.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    monkeypatch.setattr(record, "__file__", str(tmp_path / "regkit" / "record.py"))
    return tmp_path


def test_the_commit_is_what_git_says_and_tells_of_changed_code(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert record.commit() == head and len(head) == 40
    for file in ("notes.txt", "results/one.json"):  # no number comes from these
        (checkout / file).write_text("2\n")
    assert record.commit() == head
    (checkout / "studies" / "one.py").write_text("2\n")
    assert record.commit() == f"{head} with changes"
    git(checkout, "checkout", "--", "studies")
    (checkout / "regkit" / "new.py").write_text("2\n")
    assert record.commit() == f"{head} with changes"


def test_an_installed_package_has_no_commit(checkout, monkeypatch, tmp_path_factory):
    """Even where the environment lies inside somebody's checkout."""
    installed = checkout / "regkit" / "site-packages" / "record.py"
    installed.parent.mkdir()
    installed.write_text("1\n")
    monkeypatch.setattr(record, "__file__", str(installed))
    assert record.commit() is None
    monkeypatch.setattr(record, "__file__", str(tmp_path_factory.mktemp("none") / "record.py"))
    assert record.commit() is None


def test_the_fingerprint_is_of_the_bytes_or_of_shipped_weights(tmp_path, monkeypatch):
    file = tmp_path / "a.bin"
    assert record.fingerprint(file) is None
    file.write_bytes(b"regkit")
    digest = hashlib.sha256(b"regkit").hexdigest()
    assert record.fingerprint(file) == digest[:12] == record.fingerprint(str(file))
    assert record.fingerprint(file, digits=64) == digest
    name = models.pretrained()[0]
    weights = (Path(models.__file__).parents[1] / "weights" / f"{name}.safetensors").read_bytes()
    assert record.fingerprint(name) == hashlib.sha256(weights).hexdigest()[:12]
    assert record.fingerprint(tmp_path / name) is None  # a file of that name, which is not there
    assert record.fingerprint("") is None


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (0.123456, 4, 0.1235),
        (123456.0, 4, 123500.0),
        (123456.0, 5, 123460.0),
        (-2.00004e-7, 4, -2e-7),
        (1 / 3, None, 1 / 3),
        (math.nan, 4, None),
        (-math.inf, None, None),
        (np.float64(1.23456), 3, 1.23),
        ((1.23456, 7), 3, [1.23, 7]),
        ({"a": [{"b": 0.00012345}], "c": "x"}, 2, {"a": [{"b": 0.00012}], "c": "x"}),
        (frozen({"a": [2.5, math.nan]}), 4, {"a": [2.5, None]}),
        (123456, 2, 123456),
        (True, 4, True),
        (None, 4, None),
    ],
)
def test_rounded(value, digits, expected):
    found = record.rounded(value, digits)
    assert found == expected and type(found) in (type(expected), np.float64)
    json.dumps(found, allow_nan=False)


# ---------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system has no /proc")
def test_peak_memory_is_the_high_water_mark_of_this_process():
    low = number_in("/proc/self/status", "VmHWM") / 1e9
    peak = record.peak_memory()
    assert low <= peak <= number_in("/proc/self/status", "VmHWM") / 1e9


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak to clear")
def test_the_peak_inside_forgets_what_was_before():
    big = np.ones(60_000_000)  # 0.48e9 bytes
    del big
    resident = number_in("/proc/self/status", "VmRSS") / 1e9
    with record.peak_inside() as peak:
        assert math.isnan(peak.gigabytes)
        small = np.ones(25_000_000)  # 0.2e9 bytes
        del small
    assert peak.gigabytes == pytest.approx(resident + 0.2, abs=0.05)


def test_the_peak_inside_on_a_gpu_is_that_of_its_allocator(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2_500_000_000)
    with record.peak_inside("cuda:1") as peak:
        assert asked == ["cuda:1"]
    assert peak.gigabytes == 2.5


def test_peak_bytes_counts_what_is_held_at_once():
    x = torch.zeros(1000, 250)  # 1 MB

    def one_after_the_other():
        return (x + 1).sum() + (x + 2).sum()

    def both_at_once():
        a, b = x + 1, x + 2
        return (a * b).sum()  # and their product

    assert record.peak_bytes(one_after_the_other) == pytest.approx(1e6, rel=0.01)
    assert record.peak_bytes(both_at_once) == pytest.approx(3e6, rel=0.01)
    numpy = x.numpy()
    assert record.peak_bytes(lambda: (numpy + 1) * 2) == pytest.approx(2e6, rel=0.01)


def test_timed_counts_the_seconds_of_one_call():
    calls = []
    assert 0.05 <= record.timed(lambda: (calls.append(1), time.sleep(0.05))) < 5
    assert calls == [1]


# ------------------------------------------------------------------------------------------ rows


def held(file):
    return json.loads(file.read_text())


def test_rows_are_written_at_once_and_known_by_their_key(tmp_path):
    file = tmp_path / "new" / "a.json"
    rows = Rows(file, ("set", "method"), {"made": {"date": "today"}})
    assert rows.rows == [] and not file.exists()
    rows.add({"set": "t1", "method": "a", "pairs": 2, "shape": (2, 3), "dice": math.nan})
    rows.add({"set": "t1", "method": "b", "pairs": 2, "dice": 0.5})
    rows.add({"set": "t2", "method": "a", "pairs": 2, "dice": 0.1})
    assert list(held(file)) == ["made", "rows"] and held(file) == rows.table
    assert held(file)["rows"][0] == {
        "set": "t1", "method": "a", "pairs": 2, "shape": [2, 3], "dice": None
    }  # fmt: skip
    assert rows.has({"set": "t1", "method": "a", "pairs": 2, "shape": (2, 3)})
    assert not rows.has({"set": "t1", "method": "a", "pairs": 3})  # measured otherwise
    assert not rows.has({"set": "t1", "method": "c"})
    assert not rows.has({"set": "t1", "method": "b", "shape": (2, 3)})  # it does not say
    rows.add({"set": "t1", "method": "b", "pairs": 3, "dice": 0.6})  # in its place
    assert [(r["set"], r["method"], r["pairs"]) for r in held(file)["rows"]] == [
        ("t1", "a", 2), ("t1", "b", 3), ("t2", "a", 2)
    ]  # fmt: skip
    rows.remove({"set": "t1", "method": "a", "pairs": 9})
    rows.remove({"set": "t9", "method": "a"})
    assert [(r["set"], r["method"]) for r in rows.rows] == [("t1", "b"), ("t2", "a")]
    assert held(file) == rows.table and sorted(file.parent.iterdir()) == [file]


def test_rows_without_a_field_of_the_key_are_told_apart(tmp_path):
    rows = Rows(tmp_path / "a.json", ("part", "at"))
    for row in ({"part": "a", "at": 1}, {"part": "a", "at": 2}, {"part": "a"}):
        rows.add(row)
    assert len(rows.rows) == 3 and rows.has({"part": "a"})


def test_what_else_the_file_says_stays_and_a_second_look_goes_on(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"note": "kept", "made": 1, "rows": [{"name": "a", "x": 1}]}')
    rows = Rows(file, ("name",), {"made": 2, "seed": 3})
    assert rows.has({"name": "a", "x": 1}) and held(file)["made"] == 1  # nothing is written yet
    rows.put(sets=[1, 2])
    assert held(file) == {
        "note": "kept", "made": 2, "rows": [{"name": "a", "x": 1}], "seed": 3, "sets": [1, 2]
    }  # fmt: skip
    rows.add({"name": "b"})
    assert held(file)["sets"] == [1, 2] and [r["name"] for r in held(file)["rows"]] == ["a", "b"]

    anew = Rows(file, ("name",), {"made": 4}, fresh=True)
    assert anew.rows == [] and len(held(file)["rows"]) == 2  # lost with the first row, not before
    anew.add({"name": "c"})
    anew.add({"name": "d"})
    assert held(file) == {"made": 4, "rows": [{"name": "c"}, {"name": "d"}]}


def test_one_file_holds_the_rows_of_two_parts_and_what_follows_from_them(tmp_path):
    file = tmp_path / "a.json"

    def best_first(rows):
        ordered = sorted(rows, key=lambda row: -row["x"])
        return {"mean": sum(row["x"] for row in rows) / len(rows), "rows": ordered}

    one, two = (
        Rows(file, ("name",), {"made": 1}, within=part, derive=best_first) for part in ("p", "q")
    )
    one.add({"name": "a", "x": 1.0})
    two.add({"name": "a", "x": 5.0})
    one.add({"name": "b", "x": 2.0})
    assert held(file) == one.table == {
        "made": 1,
        "p": {"mean": 1.5, "rows": [{"name": "b", "x": 2.0}, {"name": "a", "x": 1.0}]},
        "q": {"mean": 5.0, "rows": [{"name": "a", "x": 5.0}]},
    }  # fmt: skip
    again = Rows(file, ("name",), {"made": 2}, within="p", fresh=True)
    again.add({"name": "c", "x": 0.0})
    assert held(file)["p"]["rows"] == [{"name": "c", "x": 0.0}] and held(file)["q"]["mean"] == 5


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "1", "null", '{"rows": 3}', '{"rows": [1]}', '{"rows": null}', "\xff",
        "[" * 9999,
    ],
    ids=range(10),
)  # fmt: skip
def test_a_file_of_something_else_is_one_sentence_and_stays(tmp_path, content):
    file = tmp_path / "a.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="out is 'a.json', which holds something else, expected"):
        Rows(file, ("name",))
    assert file.read_text(encoding="latin-1") == content
    if content in ('{"rows": 3}', '{"rows": [1]}', '{"rows": null}'):
        file.write_text(f'{{"part": {content}}}')
        with pytest.raises(ValueError, match="holds something else"):
            Rows(file, ("name",), within="part")


def test_a_file_that_cannot_be_written_is_known_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out is a file or lies below one, expected a folder"):
        Rows(tmp_path / "file" / "a.json", ("name",))
    with pytest.raises(ValueError, match="which holds something else"):
        Rows(tmp_path, ("name",))


ADDING = """if True:
    import sys
    from regkit.record import Rows
    file, name, count = sys.argv[1:]
    rows = Rows(file, ("who", "number"), {"made": name})
    print("ready", flush=True)
    for number in range(int(count)):
        if not rows.has({"who": name, "number": number}):
            rows.add({"who": name, "number": number, "text": 2000 * "x"})
"""


def adding(file, name, count):
    """Another process that adds rows."""
    command = [sys.executable, "-c", ADDING, str(file), name, str(count)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_two_processes_fill_one_file(tmp_path):
    file = tmp_path / "a.json"
    ours = Rows(file, ("who", "number"))
    with adding(file, "other", 20) as other:
        for number in range(20):
            ours.add({"who": "us", "number": number})
        assert other.wait(60) == 0
    rows = [(row["who"], row["number"]) for row in held(file)["rows"]]
    assert len(rows) == 40 and set(rows) == {(w, n) for w in ("us", "other") for n in range(20)}
    ours.remove({"who": "us", "number": 0})
    assert len(ours.rows) == 39  # those of the other process are seen


@pytest.mark.slow
def test_a_process_killed_between_rows_leaves_a_complete_file_to_go_on_from(tmp_path):
    file = tmp_path / "a.json"
    for wanted in (3, 6):
        with adding(file, "a", 10_000) as process:
            while not file.exists() or len(held(file)["rows"]) < wanted:  # complete at any time
                assert process.poll() is None
            process.send_signal(signal.SIGKILL)
        rows = held(file)["rows"]
        numbers = [row["number"] for row in rows]
        assert numbers == list(range(len(numbers))) and len(numbers) >= wanted
        assert all(len(row["text"]) == 2000 for row in rows)
    with adding(file, "a", len(numbers) + 1) as process:
        assert process.wait(60) == 0
    assert len(held(file)["rows"]) == len(numbers) + 1
    assert held(file)["rows"][:-1] == rows
    with contextlib.suppress(FileNotFoundError):  # what the killed ones left goes with the next
        (tmp_path / f".regkit-{file.name}.lock").unlink()
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "a.json"
    rows = Rows(file, ("name",))
    rows.add({"name": "a"})
    before = file.read_bytes()
    with pytest.raises(TypeError):
        rows.add({"name": "b", "what": object()})
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    assert not rows.has({"name": "b"})
    rows.add({"name": "c"})
    assert [row["name"] for row in held(file)["rows"]] == ["a", "c"]
