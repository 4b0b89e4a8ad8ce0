"""The folder of a training run: damaged, shared, on a full disk, or of a run that was refused."""

import errno
import json
import os
import shutil
import signal
import time

import pytest
import torch
from accelerate import Accelerator
from typer.testing import CliRunner

from regkit import cli, files, models
from regkit.papers import running
from regkit.training import checkpoints, loop, recipes, tasks


def tiny(**changes):
    small = {"encoder": (4, 4), "decoder": (4, 4), "last": (4,)}
    settings = {"subjects": 2, "validation": 2, "shape": (32, 48), "batch": 1, "steps": 4}
    return recipes.get("vxm_diff_2d", "smoke", options=small, **settings | changes)


def run(folder, recipe=None, **options):
    return loop.train(recipe or tiny(), folder, progress=False, device="cpu", **options)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of a run of 4 steps, validated every 2."""
    folder = tmp_path_factory.mktemp("run") / "run"
    run(folder)
    return folder


def edit(folder, change):
    file = folder / "history.json"
    history = json.loads(file.read_text())
    change(history)
    file.write_text(json.dumps(history))


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def gone(name):
    return lambda folder: (folder / name).unlink()


# damage, and what the sentence must hold
DAMAGE = {
    "no text in the history": (written("history.json", b""), "history.json that cannot be read"),
    "an empty history": (written("history.json", b"[]"), "does not go with its states"),
    "null": (written("history.json", b"null"), "does not go with its states"),
    "a history of numbers": (written("history.json", b"[1, 2, 3, 4]"), "does not go with"),
    "a nested history": (written("history.json", b"[" * 100_000), "cannot be read"),
    "other bytes": (written("history.json", b"\xff\xfe"), "history.json that cannot be read"),
    "a history cut short": (cut("history.json"), "history.json that cannot be read"),
    "a step less": (lambda f: edit(f, lambda h: h.pop()), "does not go with its states"),
    "another order": (lambda f: edit(f, lambda h: h.reverse()), "does not go with its states"),
    "a word for a loss": (lambda f: edit(f, lambda h: h[0].update(loss="a")), "does not go with"),
    "no validation": (lambda f: edit(f, lambda h: h[3].pop("dice")), "validations lack 'dice'"),
    "no history": (gone("history.json"), "does not go with its states"),
    "no recipe": (gone("recipe.json"), "holds a run without its recipe.json"),
    "a recipe cut short": (cut("recipe.json"), "recipe.json that cannot be read"),
    "a recipe of numbers": (written("recipe.json", b"[1]"), "a run of another recipe"),
    "no state": (lambda f: shutil.rmtree(f / "state" / "4"), "expected the folder state/4 in it"),
    "a state cut short": (cut("state/4/optimizer.bin"), "state of step 4 that cannot be read"),
    "weights of the state cut short": (cut("state/4/model.safetensors"), "that cannot be read"),
    "random states cut short": (cut("state/4/random_states_0.pkl"), "that cannot be read"),
    "random states gone": (gone("state/4/random_states_0.pkl"), "that cannot be read"),
    "an optimiser gone": (gone("state/4/optimizer.bin"), "state of step 4 that cannot be read"),
    "best weights cut short": (cut("best.safetensors"), "expected a safetensors file"),
    "last weights gone": (gone("last.safetensors"), "expected a weights file"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_one_sentence_and_stays_as_it_is(case, ended, tmp_path):
    damage, sentence = DAMAGE[case]
    folder = tmp_path / "run"
    shutil.copytree(ended, folder)
    damage(folder)
    before = contents(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        run(folder, resume=True)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert contents(folder) == before


def test_a_run_whose_state_has_no_name_yet_goes_on(ended, tmp_path):
    """Killed after the history was written, before the state that it names got its name."""
    folder = tmp_path / "run"
    shutil.copytree(ended, folder)
    (folder / "state" / "4").rename(folder / "state" / "new-4")
    assert len(run(folder, resume=True).history) == 4
    assert [p.name for p in (folder / "state").iterdir()] == ["4"]


class ScriptedTask(tasks.SubjectsTask):
    """Its validations have these errors, one after the other; it keeps the weights of each."""

    def __init__(self, recipe, errors):
        super().__init__(recipe)
        self.errors, self.seen = iter(errors), []

    def validate(self, model, device):
        self.seen.append({key: value.clone() for key, value in model.state_dict().items()})
        return {"tre": next(self.errors)}

    def score(self, scores):
        return -scores["tre"]


def test_the_best_weights_are_those_of_the_best_validation(tmp_path):
    """The third of six validations is the best; the fifth only reaches it. Also after resuming."""
    recipe = tiny(steps=6, validate_every=1)
    task = ScriptedTask(recipe, [5.0, 3.0, 1.0, 2.0, 1.0, 4.0])
    run(tmp_path / "whole", recipe, task=task)
    with pytest.raises(StopIteration):
        run(tmp_path / "stopped", recipe, task=ScriptedTask(recipe, [5.0, 3.0, 1.0]))
    run(tmp_path / "stopped", recipe, task=ScriptedTask(recipe, [2.0, 1.5, 4.0]), resume=True)
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        assert (folder / "best.safetensors").is_file()
        best, last = (models.load(folder / f"{name}.safetensors") for name in ("best", "last"))
        assert best.info["step"] == 3 and best.info["validation"] == {"tre": 1.0}
        assert last.info["step"] == 6 and last.info["validation"] == {"tre": 4.0}
        for model, validation in ((best, 2), (last, 5)):
            for key, value in model.state_dict().items():
                assert torch.equal(value, task.seen[validation][key])


def test_two_trainings_do_not_write_one_run(ended, tmp_path):
    """The second is refused while the first works, and goes on when the first is gone."""
    folder = tmp_path / "run"
    shutil.copytree(ended, folder)
    before = contents(folder)
    child = os.fork()
    if not child:
        with files.alone(folder, "out", 0, "run"):
            (tmp_path / "holds").touch()
            time.sleep(60)
        os._exit(0)
    try:
        while not (tmp_path / "holds").exists():
            time.sleep(0.01)
        with pytest.raises(ValueError, match="out is a folder that another process works in"):
            run(folder, resume=True)
        changed = contents(folder)
        changed.pop(".regkit-run.lock")
        assert changed == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(run(folder, resume=True).history) == 4
    assert not list(folder.glob(".regkit-*"))


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torn(*arguments, **options):
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (Accelerator, "save_state", full),
        (Accelerator, "save_state", torn),
        (models, "save", full),
        (checkpoints, "write_json", full),
    ],
)
def test_a_full_disk_keeps_what_was_saved(owner, name, error, tmp_path, monkeypatch):
    """The disk is full at the second validation; with room again the run ends as any other."""
    whole = run(tmp_path / "whole").model.state_dict()
    real, calls = getattr(owner, name), []
    # before the second validation: models.save writes last and best, write_json the history
    allowed = {"save_state": 1, "save": 2, "write_json": 1}[name]

    def at_last(*arguments, **options):
        calls.append(1)
        return (real if len(calls) <= allowed else error)(*arguments, **options)

    monkeypatch.setattr(owner, name, at_last)
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="out cannot hold the state of step 4") as caught:
        run(folder)
    assert "resume=True goes on from it" in str(caught.value)
    assert [p.name for p in (folder / "state").iterdir()] == ["2"]
    assert len(json.loads((folder / "history.json").read_text())) == 2
    monkeypatch.setattr(owner, name, real)
    resumed = run(folder, resume=True)
    assert [entry["step"] for entry in resumed.history] == [1, 2, 3, 4]
    for key, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole[key])


def test_a_disk_that_is_full_from_the_start_is_one_sentence_and_leaves_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "write_json", full)
    with pytest.raises(
        ValueError, match="out cannot be written .No space left on device."
    ) as caught:
        run(tmp_path / "run")
    assert str(caught.value).endswith(".") and list(tmp_path.iterdir()) == []


def test_what_is_refused_for_its_data_leaves_nothing_and_the_corrected_run_works(
    tmp_path, monkeypatch
):
    def refuses(*arguments):
        raise ValueError("data holds no one for 'train', expected at least one.")

    folder = tmp_path / "new" / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "task_of", refuses)
        with pytest.raises(ValueError, match="data holds no one"):
            run(folder)
    assert list(tmp_path.iterdir()) == []
    # one that ends before anything was saved does not stand in the way of another recipe
    with pytest.raises(ValueError, match="expected a finite loss"):
        run(folder, tiny(lr=1e30))
    assert len(run(folder, tiny(lr=1e-3)).history) == 4
    with pytest.raises(ValueError, match="which holds a run: expected resume=True"):
        run(folder, tiny(lr=1e-4))


# results of tables --------------------------------------------------------------------------------

TABLE = "sun2025-table1"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"rows": 3}', b'{"rows": [3]}',
        b'{"rows": [{"label": 3, "state": "done"}]}', b'{"rows": [{"label": "SyN"}]}',
        b'{"rows": [{"label": "SyN", "state": "done", "dice": "high"}]}',
        b'{"rows": [{"label": "SyN", "state": "done", "dice_pairs": 3}]}',
        b'{"rows": [{"label": "SyN", "state": "done", "dice_pairs_seeds": [[1, 2], [3]]}]}',
    ],
)  # fmt: skip
def test_a_damaged_results_file_is_one_sentence_and_stays(content, tmp_path):
    (tmp_path / "r.json").write_bytes(content)
    typed = ["benchmark", TABLE, "--budget", "smoke", "--ndim", "2", "--row", "VoxelMorph"]
    typed += ["--out", str(tmp_path / "r.json"), "--runs", str(tmp_path / "runs")]
    result = CliRunner().invoke(cli.app, typed)
    assert result.exit_code == 2
    assert "'r.json', which holds something else, expected a results file" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert (tmp_path / "r.json").read_bytes() == content


def test_the_exit_code_tells_that_a_row_was_left_out(tmp_path, monkeypatch):
    def diverges(*arguments, **options):
        raise ValueError("term 'similarity' is nan at step 1.")

    monkeypatch.setattr(running, "train", diverges)
    typed = ["benchmark", TABLE, "--budget", "smoke", "--ndim", "2", "--pairs", "2"]
    typed += ["--out", str(tmp_path / "r.json"), "--runs", str(tmp_path / "runs")]
    result = CliRunner().invoke(cli.app, [*typed, "--row", "VoxelMorph"])
    assert result.exit_code == 2 and "left out because of an error: 'VoxelMorph'" in result.stderr
    assert "left out: term 'similarity' is nan" in (tmp_path / "r.json").read_text()
    # a row that was not asked for does not count
    assert CliRunner().invoke(cli.app, [*typed, "--row", "SyN"]).exit_code == 0
