"""Do the notebooks notice a fault? Deliberate ones in the chapters, each named with its guard.

`notebook_faults/NN.toml` holds the list of chapter NN. One piece of source (`old`) of its code
cells, or of the library's `file` where one is named, is replaced by another (`new`). The chapter,
run at budget smoke, must then stop with an AssertionError in the code cell that holds `guard`: a
number that no longer agrees, not a crash. The files stay as they are: the kernel gets changed
cells, and imports a copy of the library.

Add a fault where a line of a chapter could be wrong in a way that a reader would not see.
"""

from __future__ import annotations

import os
import shutil
import tomllib
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import notebooks as tool

TESTS = Path(__file__).parent
FAULTS = [
    {"chapter": file.stem, **fault}
    for file in sorted((TESTS / "notebook_faults").glob("*.toml"))
    for fault in tomllib.loads(file.read_text(encoding="utf-8"))["fault"]
]
each_fault = pytest.mark.parametrize(
    "fault", FAULTS, ids=lambda fault: f"{fault['chapter']}-{fault['name'].replace(' ', '-')}"
)


def chapter(number: str) -> nbformat.NotebookNode:
    (md,) = tool.select([number])
    return tool.read_text(md)


def spoil_cells(notebook: nbformat.NotebookNode, fault: dict[str, str]) -> None:
    for cell in tool.code_cells(notebook):
        cell.source = cell.source.replace(fault["old"], fault["new"])


def spoilt_library(fault: dict[str, str], folder: Path) -> None:
    """A copy of `regkit` in `folder`, of links but for the file with the fault."""
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(
        tool.ROOT / "regkit", folder / "regkit", ignore=compiled, copy_function=os.symlink
    )
    file = folder / fault["file"]
    source = file.read_text(encoding="utf-8")
    file.unlink()
    file.write_text(source.replace(fault["old"], fault["new"]), encoding="utf-8")


@each_fault
def test_a_fault_has_its_place_and_its_guard(fault):
    code = [cell.source for cell in tool.code_cells(chapter(fault["chapter"]))]
    if "file" in fault:
        found = (tool.ROOT / fault["file"]).read_text(encoding="utf-8").count(fault["old"])
    else:
        found = sum(source.count(fault["old"]) for source in code)
    assert found == 1, f"{fault['old']!r} is there {found} times: bring the list up to date"
    guards = sum(fault["guard"] in source for source in code)
    assert guards == 1, f"{fault['guard']!r} is in {guards} cells: bring the list up to date"


@pytest.mark.slow
@each_fault
def test_a_fault_stops_its_chapter(fault, tmp_path, monkeypatch):
    notebook, library = chapter(fault["chapter"]), tool.ROOT
    if "file" in fault:
        library = tmp_path / "library"
        spoilt_library(fault, library)
    else:
        spoil_cells(notebook, fault)
    monkeypatch.setenv("PYTHONPATH", str(library))
    monkeypatch.setenv("REGKIT_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("REGKIT_BUDGET", "smoke")
    place = {"metadata": {"path": str(tool.FOLDER)}}
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources=place,
        # a long traceback parses the sources of all that was called, and may itself fail
        extra_arguments=["--InteractiveShell.xmode=Minimal"],
    )
    with pytest.raises(CellExecutionError) as stopped:
        client.execute()
    (cell,) = [
        cell
        for cell in tool.code_cells(notebook)
        if any(output.output_type == "error" for output in cell.outputs)
        and "raises-exception" not in cell.metadata.get("tags", [])
    ]
    assert stopped.value.ename == "AssertionError", stopped.value.evalue
    assert fault["guard"] in cell.source, f"another cell stopped it:\n{cell.source}"


def test_every_chapter_has_a_fault():
    chapters = {md.stem.partition("_")[0] for md in tool.select(None)}
    assert chapters == {fault["chapter"] for fault in FAULTS}
    assert len(FAULTS) >= 12
    assert [name for name, n in Counter(f["name"] for f in FAULTS).items() if n > 1] == []
