"""A chapter whose kernel is killed while it trains, and that is run again."""

import json
import os
import signal
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

import regkit

STEPS = 80
# What a chapter does: the setup cell, a training in the chapter's folder, and something after it.
CELLS = (
    'import regkit.book\n\nregkit.book.setup("08")',
    f"""
from regkit.book import run_folder
from regkit.training import recipes, train

recipe = recipes.get(
    "vxm_diff_2d", subjects=2, validation=2, shape=(32, 48), batch=1,
    steps={STEPS}, validate_every=10,
    options={{"encoder": (4, 4), "decoder": (4, 4), "last": (4,)}},
)
trained = train(recipe, out=run_folder("08", recipe), resume=True, progress=False)
""",
    """
import hashlib
import json

weights = trained.model.state_dict()
digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in weights.values())).hexdigest()
print(json.dumps({"weights": digest, "history": trained.history}))
""",
)


def notebook() -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])


def run(folder: Path) -> dict:
    """Run the notebook from its first cell to its last; what the last one prints."""
    executed = NotebookClient(
        notebook(), timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
    ).execute()
    return json.loads(executed.cells[-1].outputs[0].text)


def run_until_killed(folder: Path, home: Path) -> None:
    """Run the notebook, and kill its kernel as soon as the training has saved something."""
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(folder))
    try:
        for cell in CELLS:
            client.execute(cell)
        for _ in range(6000):  # two minutes and more
            if list(home.glob("runs/08/*/history.json")):
                break
            time.sleep(0.02)
        os.kill(manager.provisioner.pid, signal.SIGKILL)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_chapter_killed_while_it_trains_goes_on_when_it_is_run_again(tmp_path, monkeypatch):
    """From the last validation that was saved, to the weights of an unbroken run."""
    monkeypatch.setenv("PYTHONPATH", str(Path(regkit.__file__).parents[1]))
    monkeypatch.setenv("REGKIT_BUDGET", "smoke")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("REGKIT_HOME", str(tmp_path / "whole"))
    whole = run(tmp_path)
    assert len(whole["history"]) == STEPS

    monkeypatch.setenv("REGKIT_HOME", str(tmp_path / "killed"))
    run_until_killed(tmp_path, tmp_path / "killed")
    (file,) = (tmp_path / "killed").glob("runs/08/vxm_diff_2d_smoke_*/history.json")
    saved = json.loads(file.read_text())
    assert 0 < len(saved) < STEPS and saved == whole["history"][: len(saved)]

    saved[0]["loss"] = 7.0  # a training that began anew would not keep this
    file.write_text(json.dumps(saved))
    resumed = run(tmp_path)
    assert resumed["weights"] == whole["weights"]
    assert resumed["history"] == saved + whole["history"][len(saved) :]
