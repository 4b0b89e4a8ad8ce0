"""Keeps the notebooks: `NN_title.md` is what we write, `NN_title.ipynb` is what a reader opens.

    python book/tools/notebooks.py sync         write the setup cell, format the code cells
    python book/tools/notebooks.py try 01       run at REGKIT_BUDGET (default cpu), write nothing
    python book/tools/notebooks.py execute 01   run at REGKIT_BUDGET, write the .ipynb
    python book/tools/notebooks.py check        say what is wrong with the committed pairs
    python book/tools/notebooks.py student DIR  write the notebooks without solutions into DIR

A NAME is a chapter number (`01`) or a path; no NAME means all notebooks.

Execute with all threads of the machine: a chapter that trains ends at other weights with another
OMP_NUM_THREADS, and its checks were set with two.

The .ipynb is made of the text of the .md, in plain Markdown (plain.py), and the outputs of its
code. The book is made of both as well: of the text as it is, and the outputs (`joined`).

A code cell tagged `stub` is for the reader's answer to an exercise. It is never executed here and
has no outputs, so those of a chapter stay when a stub comes or changes; nbval runs it.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import jupytext
import nbformat
import plain
import setup_cell
import typer
import yaml
from address import Address
from jupytext.config import load_jupytext_config
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
SETUP = 'import regkit.book\n\nregkit.book.setup("{}")'  # in the .md; setup_cell makes the reader's
STUB = plain.STUB  # tags a cell that a reader fills in
LECTURERS = "For lecturers"  # the part that a class does not get
KEPT = ("language_info", "regkit", "widgets")  # metadata that an execution makes
MAX_BYTES, MAX_BYTES_ALL = 1_000_000, 10_000_000
WIDGET, WIDGETS = plain.WIDGET, "application/vnd.jupyter.widget-state+json"
PROGRESS_BAR = re.compile(r"\d+%\||\dit \[")  # what tqdm writes as the text of its widget
COLAB = "https://colab.research.google.com/github"
COLAB_BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
CHECK = re.compile(r'check\("\d\d-\d+", \w+\)$')  # how a stub ends
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/|ipykernel_\d+")

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
Names = Annotated[list[str] | None, typer.Argument(help="Chapter numbers or paths; default all.")]


# ---------------------------------------------------------------------- reading and writing


def select(names: list[str] | None) -> list[Path]:
    """The `.md` of the notebooks that `names` mean, in order."""
    every = sorted(FOLDER.glob("*.md"))
    if not names:
        return every
    chosen = []
    for name in names:
        stem = Path(name).stem
        matches = [p for p in every if p.stem == stem or p.stem.startswith(f"{stem}_")]
        if not matches:
            have = ", ".join(p.stem for p in every) or "none"
            raise typer.BadParameter(f"no notebook is called {name!r}; there are: {have}")
        chosen += matches
    return chosen


def read_text(md: Path) -> NotebookNode:
    """The notebook that the `.md` describes, without outputs, with cell ids that stay."""
    notebook = deepcopy(_parsed(md.read_text(encoding="utf-8")))
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


@cache
def _parsed(content: str) -> NotebookNode:
    return jupytext.reads(content, fmt="md:myst")


def canonical(md: Path) -> str:
    """What the `.md` should be: the setup cell filled in, code cells formatted by ruff."""
    notebook = read_text(md)
    for cell in code_cells(notebook):
        if is_setup(cell):
            cell.source = SETUP.format(md.stem[:2])
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.ipynb"
        nbformat.write(notebook, draft)
        command = [sys.executable, "-m", "ruff", "format", "--quiet", "--isolated"]
        subprocess.run([*command, "--line-length=100", str(draft)], check=True)
        for cell, formatted in zip(
            notebook.cells, nbformat.read(draft, as_version=4).cells, strict=True
        ):
            cell.source = formatted.source
    return jupytext.writes(notebook, fmt="md:myst", config=load_jupytext_config(str(ROOT)))


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [c for c in notebook.cells if c.cell_type == "code"]


def is_setup(cell: NotebookNode) -> bool:
    return "setup" in cell.metadata.get("tags", [])


def is_stub(cell: NotebookNode) -> bool:
    return STUB in cell.metadata.get("tags", [])


def executed_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells but for those that a reader fills in."""
    return [c for c in code_cells(notebook) if not is_stub(c)]


def source_hash(text: NotebookNode) -> str:
    """Names the code that the outputs belong to: that of the .md without setup cell and stubs."""
    code = [c.source for c in executed_cells(text) if not is_setup(c)]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def joined(md: Path) -> NotebookNode:
    """The text of the .md with the outputs of the .ipynb: what the book shows.

    Raises:
        ValueError: if the outputs come from other code.
    """
    text, notebook = read_text(md), nbformat.read(md.with_suffix(".ipynb"), as_version=4)
    same = notebook.metadata.get("regkit", {}).get("source_hash") == source_hash(text)
    if not same or len(executed_cells(text)) != len(executed_cells(notebook)):
        raise ValueError(f"{md.stem}.ipynb is stale: its outputs come from other code; execute it.")
    for key in KEPT:
        if key in notebook.metadata:
            text.metadata[key] = notebook.metadata[key]
    for cell, known in zip(executed_cells(text), executed_cells(notebook)):
        cell.update(outputs=known.outputs, execution_count=known.execution_count)
    return text


def reader_version(
    md: Path, address: Address | None = None, branch: str = "", solutions: bool = True
) -> NotebookNode:
    """The notebook that a reader opens, in plain Markdown, with the outputs of the .ipynb.

    Args:
        md: of the chapter.
        address: where the project is public: the setup cell then installs from there, a button
            opens the notebook in Colab, and links say the whole address. Without one, links lead
            from file to file.
        branch: on which the notebooks lie, if not on the address's own.
        solutions: False leaves them out, for a class.

    Raises:
        ValueError: if the outputs come from other code, or the text has something of which
            plain.py knows nothing.
    """
    return made_plain(md, joined(md), address, branch, solutions)


def made_plain(
    md: Path,
    text: NotebookNode,
    address: Address | None = None,
    branch: str = "",
    solutions: bool = True,
) -> NotebookNode:
    """The reader's version of a chapter and its outputs."""
    on_github = address is not None and address.on_github
    chapters = f"{address.repository}/blob/{branch or address.ref}/notebooks" if on_github else ""
    pages = f"{address.repository}/blob/{address.ref}" if on_github else ""
    texts = {path.stem: read_text(path) for path in sorted(FOLDER.glob("*.md"))}
    chapter = plain.Chapter(md.stem, texts, plain.glued(text), pages, chapters, solutions)
    notebook = nbformat.v4.new_notebook(cells=chapter.cells(text))
    for key in ("kernelspec", "accelerator", "colab", *KEPT):
        if key in text.metadata:
            notebook.metadata[key] = deepcopy(text.metadata[key])
    for model in notebook.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {}).values():
        # what is null is null by default as well, and makes a notebook with sliders much larger
        model["state"] = {k: v for k, v in model.get("state", {}).items() if v is not None}
    made = text.metadata.regkit
    for cell in filter(is_setup, code_cells(notebook)):
        origin = address.pip if address else ""
        cell.source = setup_cell.source(md.stem[:2], origin, {made.budget: made.seconds})
    if on_github:
        path = f"{chapters}/{md.stem}.ipynb".removeprefix("https://github.com")
        first = notebook.cells[0]
        first.source = f"{COLAB_BADGE}({COLAB}{path})\n\n{first.source}"
    return notebook


# ------------------------------------------------------------------------------- executing


def run(notebook: NotebookNode, budget: str) -> None:
    """Execute in place, drop the progress bars, and note in the metadata how it was made."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        # a home of its own: no training goes on from a run of earlier code
        env = os.environ | {"REGKIT_BUDGET": budget, "REGKIT_HOME": home}
        NotebookClient(
            notebook,
            timeout=3600,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            skip_cells_with_tag=STUB,
            resources={"metadata": {"path": str(FOLDER)}},
        ).execute(env=env)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":  # the call stack names files of this machine
                output.traceback = [f"{output.ename}: {output.evalue}"]
    drop_progress_bars(notebook)
    notebook.metadata.regkit = {
        "budget": budget,
        "source_hash": source_hash(notebook),
        "seconds": round(time.perf_counter() - start),
        "cores": os.cpu_count(),
        "torch": version("torch"),
    }


def drop_progress_bars(notebook: NotebookNode) -> None:
    """Remove tqdm's widgets, whose final state says nothing, and keep all other widgets."""
    shown = set()
    for cell in code_cells(notebook):
        cell.outputs = [
            output
            for output in cell.outputs
            if WIDGET not in output.get("data", {})
            or not PROGRESS_BAR.search(output.data.get("text/plain", ""))
        ]
        shown |= {o.data[WIDGET]["model_id"] for o in cell.outputs if WIDGET in o.get("data", {})}

    state = notebook.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    needed, todo = {}, list(shown)
    while todo:  # a widget refers to its parts by "IPY_MODEL_<id>"
        name = todo.pop()
        if name in state and name not in needed:
            needed[name] = state[name]
            todo += re.findall(r"IPY_MODEL_(\w+)", json.dumps(state[name]))
    for name, model in state.items():  # a link belongs to no widget, but joins two of them
        if model["model_name"] in ("LinkModel", "DirectionalLinkModel"):
            if needed.keys() >= set(re.findall(r"IPY_MODEL_(\w+)", json.dumps(model))):
                needed[name] = model
    if needed:
        notebook.metadata.widgets[WIDGETS].state = needed
    else:
        notebook.metadata.pop("widgets", None)


def update(md: Path, budget: str, force: bool = False) -> bool:
    """Bring the `.ipynb` beside `md` up to date; True if that took an execution."""
    path, text = md.with_suffix(".ipynb"), None
    if force or not is_fresh(md, budget):
        text = read_text(md)
        run(text, budget)
    nbformat.write(made_plain(md, text or joined(md)), path)
    return text is not None


def is_fresh(md: Path, budget: str) -> bool:
    """Do the outputs of the `.ipynb` come from the code of the `.md`, at this budget?"""
    path = md.with_suffix(".ipynb")
    made = nbformat.read(path, as_version=4).metadata.get("regkit", {}) if path.exists() else {}
    return made.get("budget") == budget and made.get("source_hash") == source_hash(read_text(md))


# -------------------------------------------------------------------------------- checking


def check_pair(md: Path, budget: str = "cpu") -> list[str]:
    """What is wrong with one pair, a sentence each; empty when it is as it should be."""
    path, problems = md.with_suffix(".ipynb"), []
    if not path.exists():
        return [f"{path.name} is missing: execute it."]
    if canonical(md) != md.read_text():
        problems.append(f"{md.name} is not as `sync` writes it (setup cell, formatting): run sync.")
    try:
        text, notebook = joined(md), nbformat.read(path, as_version=4)
        if reader_version(md) != notebook:
            problems.append(f"{path.name} is not what {md.name} and its outputs make: execute it.")
    except ValueError as error:
        return [*problems, str(error)]
    made, code = notebook.metadata.get("regkit", {}), executed_cells(text)
    if made.get("budget") != budget:
        problems.append(f"{path.name} was executed at budget {made.get('budget')}, not {budget}.")
    if [c.execution_count for c in code] != list(range(1, len(code) + 1)):
        problems.append(f"{path.name} was not executed in order, once, from its first cell.")
    problems += [
        f"{path.name}: a cell tagged `stub` ends in check(...)."
        for cell in filter(is_stub, code_cells(text))
        if not CHECK.match(cell.source.splitlines()[-1])
    ]
    setup = [n for n, c in enumerate(code) if is_setup(c)]
    if setup != [0]:
        problems.append(f"{path.name}: the first code cell, and no other, is tagged `setup`.")
    if path.stat().st_size > MAX_BYTES:
        problems.append(f"{path.name} is larger than {MAX_BYTES} bytes.")
    for number, cell in enumerate(code, 1):
        problems += [f"{path.name}, code cell {number}: {p}" for p in check_outputs(cell)]
    return problems


def check_outputs(cell: NotebookNode) -> list[str]:
    """What is wrong with the outputs of one code cell."""
    problems = []
    tags = cell.metadata.get("tags", [])
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "error" and "raises-exception" not in tags:
            problems.append(f"holds an error ({output.ename}: {output.evalue}).")
        if output.output_type == "stream" and output.name == "stderr":
            problems.append(f"wrote to stderr: {output.text.strip()[:80]!r}.")
        if any(kind.startswith("image/") for kind in data):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            if len(alt) < 20:
                problems.append("shows a picture without alt text (mystnb: image: alt).")
        texts = [output.get("text", ""), output.get("evalue", "")]
        texts += [str(v) for k, v in data.items() if k.startswith("text/")]
        if any(MACHINE_PATH.search(t) for t in texts):
            problems.append("prints a path of one machine.")
        if any("regkit data get" in t for t in texts):  # as regkit.book.sample says it
            problems.append("was executed without an open sample that it shows.")
    return problems


def check_all(names: list[str] | None = None) -> list[str]:
    """What is wrong with the pairs, and with all of them together."""
    problems = [problem for md in select(names) for problem in check_pair(md)]
    executed = sorted(FOLDER.glob("*.ipynb"))
    problems += [f"{p.name} has no .md." for p in executed if not p.with_suffix(".md").exists()]
    if sum(p.stat().st_size for p in executed) > MAX_BYTES_ALL:
        problems.append(f"The notebooks are larger than {MAX_BYTES_ALL} bytes together.")
    return problems


# --------------------------------------------------------------------------- command line


@app.command("sync")
def sync_command(names: Names = None) -> None:
    """Write the setup cell and format the code cells of each .md."""
    for md in select(names):
        wanted = canonical(md)
        if wanted != md.read_text():
            md.write_text(wanted)
            print(f"rewrote {md.name}")


@app.command("try")
def try_command(names: Names = None) -> None:
    """Run at REGKIT_BUDGET (default cpu) and write nothing."""
    for md in select(names):
        notebook = read_text(md)
        with cell_errors_as_text(md):
            run(notebook, budget_now())
        print(f"{md.name}: {notebook.metadata.regkit.seconds} s at budget {budget_now()}")


@app.command("execute")
def execute_command(
    names: Names = None,
    force: Annotated[bool, typer.Option(help="Run also what only changed in its text.")] = False,
) -> None:
    """Run at REGKIT_BUDGET (default cpu) and write each .ipynb."""
    sync_command(names)
    for md in select(names):
        with cell_errors_as_text(md):
            ran = update(md, budget_now(), force)
        print(f"{md.with_suffix('.ipynb').name}: {'executed' if ran else 'kept its outputs'}")


@app.command("check")
def check_command(names: Names = None) -> None:
    """Say what is wrong with the committed pairs."""
    problems = check_all(names)
    print("\n".join(problems) or "The notebooks are in order.")
    raise typer.Exit(bool(problems))


def student_contents() -> str:
    """The table of contents of the book without the lecturer's part."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    kept = [part for part in contents["parts"] if part["caption"] != LECTURERS]
    return yaml.safe_dump(contents | {"parts": kept}, sort_keys=False)


@app.command("student")
def student_command(folder: Path, names: Names = None) -> None:
    """Write each notebook without its solutions, and the book's contents, into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_toc.yml").write_text(student_contents(), encoding="utf-8")
    for md in select(names):
        nbformat.write(reader_version(md, solutions=False), folder / f"{md.stem}.ipynb")


def budget_now() -> str:
    return os.environ.get("REGKIT_BUDGET", "cpu")


@contextmanager
def cell_errors_as_text(md: Path) -> Iterator[None]:
    """Show a failing cell as a reader would see it, without the tool's own call stack."""
    try:
        yield
    except CellExecutionError as error:
        print(f"{md.name} failed:\n{error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
