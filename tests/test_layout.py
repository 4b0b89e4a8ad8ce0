"""Rooms and arrows: what a module of regkit may import, and how long one of its functions may be.

A room is a module or package directly below `regkit`. Each stands on one floor of `FLOORS` and may
import from lower floors only; inside a package there is no circle.
"""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

CODE = Path(__file__).parents[1] / "regkit"
FLOORS = (  # the ground floor first
    "messages immutable files device autograd",
    "spatial record",
    "blocks losses metrics",
    "attention transform",
    "io",
    "models data classical plot",
    "trust checks",
    "registration training",
    "papers widgets book",
    "cli",
    "__main__ __init__",
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
LONGEST = 80  # lines of a function
FILES = sorted(CODE.rglob("*.py"))


def module_of(path: Path) -> str:
    """Such as "training.loop"; a package is named without `__init__`."""
    parts = list(path.relative_to(CODE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported(path: Path, modules: set[str]) -> Iterator[tuple[str, int]]:
    """(module of regkit, line) of each import of a file, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, inner = name.partition(".")
            while top == "regkit" and inner and inner not in modules:  # a name inside a module
                inner = inner.rpartition(".")[0]
            if top == "regkit" and inner:
                yield inner, node.lineno


def arrows() -> list[tuple[str, str, int]]:
    """(from module, to module, line) of every import inside regkit."""
    modules = {module_of(path) for path in FILES}
    return [
        (module_of(path), target, line)
        for path in FILES
        for target, line in imported(path, modules)
    ]


def test_every_room_stands_on_one_floor():
    rooms = {module_of(path).split(".")[0] for path in FILES}
    assert rooms == set(FLOOR)
    assert sum(len(rooms.split()) for rooms in FLOORS) == len(FLOOR)


def test_no_import_runs_up():
    wrong = [
        f"{source}, line {line}, imports {target}"
        for source, target, line in arrows()
        if (start := source.split(".")[0]) != (end := target.split(".")[0])
        and FLOOR[end] >= FLOOR[start]
    ]
    assert wrong == []


def test_no_circle_inside_a_package():
    graph: dict[str, set[str]] = {}
    for source, target, _ in arrows():
        if "." in source and "." in target and source.split(".")[0] == target.split(".")[0]:
            graph.setdefault(source, set()).add(target)
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_a_function_fits_on_a_screen():
    long = {
        f"{module_of(path)}.{node.name}": lines
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := node.end_lineno - node.lineno + 1) > LONGEST
    }
    assert long == {}
