"""Do the tests notice a fault? Deliberate ones in the core, each named with the test to catch it.

`mutations/*.toml` hold the list: in one module of `regkit`, one piece of source (`old`) is replaced
by another (`new`), and `test` must then fail, with a comparison that no longer holds rather than
with a crash. The files stay as they are: a second Python process gets the changed source from an
import hook, and runs the one test.

Add a fault where a new line of code could be wrong in a way that a reader would not see. When the
code changes, the snippet has to follow; a snippet that is not found exactly once fails.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import importlib.util
import io
import multiprocessing
import os
import sys
import tomllib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CORE = TESTS.parent / "regkit"
MODULES = ("spatial", "losses", "metrics")
FILES = sorted((TESTS / "mutations").glob("*.toml"))
FAULTS = [f for file in FILES for f in tomllib.loads(file.read_text(encoding="utf-8"))["fault"]]

pytestmark = pytest.mark.slow

# how a test says that a number is wrong; anything else is a crash, which proves less
NOTICED = {"AssertionError", "Failed", "GradcheckError"}


def file_of(module: str) -> Path:
    """Of a module such as "spatial" or "training.loop"."""
    return CORE.joinpath(*module.split(".")).with_suffix(".py")


def source_of(module: str) -> str:
    return file_of(module).read_text(encoding="utf-8")


# --- in the second process ----------------------------------------------------------------------


class Changed(importlib.machinery.SourceFileLoader):
    """Loads one module of regkit from a changed source."""

    source: str

    def get_code(self, fullname):
        return compile(self.source, self.path, "exec")


class Hook:
    """Sends the import of one module to `Changed`."""

    def __init__(self, module: str, source: str) -> None:
        self.name = f"regkit.{module}"
        self.loader = Changed(self.name, str(file_of(module)))
        self.loader.source = source

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self.loader) if name == self.name else None


class Listener:
    """A pytest plugin that keeps what went wrong: test, kind of exception, first line."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, str, str]] = []

    def pytest_exception_interact(self, node, call) -> None:
        message = str(call.excinfo.value).strip().partition("\n")[0]
        self.failures.append((node.nodeid, call.excinfo.type.__name__, message))


def prepare() -> None:
    """Once: Hypothesis draws the same examples each time, and does not look for smaller ones."""
    from hypothesis import Phase, settings

    settings.register_profile(
        "faults", derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
    )
    settings.load_profile("faults")
    os.environ.pop("PYTEST_ADDOPTS", None)


def run(tests: list[str], module: str = "", source: str = "") -> tuple[int, list, str]:
    """pytest's exit code, the failures and the printed report, with one module changed or none."""
    for name in list(sys.modules):  # all that holds on to the code of the last run
        if name.partition(".")[0] in ("regkit", "conftest") or (
            name.startswith("test_") and name != __name__
        ):
            del sys.modules[name]
    hook = Hook(module, source) if module else None
    if hook:
        sys.meta_path.insert(0, hook)
    listener, report = Listener(), io.StringIO()
    options = ["-x", "-q", "--tb=line", "--rootdir", str(TESTS.parent)]
    options += ["-c", str(TESTS.parent / "pyproject.toml"), "-p", "no:cacheprovider"]
    options += ["-p", "no:xdist", "-p", "no:unraisableexception", "--timeout=120"]
    try:
        with contextlib.redirect_stdout(report):
            code = pytest.main([*options, *[str(TESTS / t) for t in tests]], plugins=[listener])
    finally:
        if hook:
            sys.meta_path.remove(hook)
    return int(code), listener.failures, report.getvalue()


# --- the tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere():
    """One process for all faults: PyTorch is loaded once."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=prepare) as pool:
        yield lambda *arguments: pool.submit(run, *arguments).result()


def test_the_named_tests_pass_as_the_code_is(elsewhere):
    code, failures, report = elsewhere(sorted({fault["test"] for fault in FAULTS}))
    assert (code, failures) == (0, []), report


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault["name"].replace(" ", "-"))
def test_a_fault_is_noticed(fault, elsewhere):
    source = source_of(fault["module"])
    found = source.count(fault["old"])
    assert found == 1, f"{fault['old']!r} is there {found} times: bring mutations/ up to date"
    changed = source.replace(fault["old"], fault["new"])
    code, failures, report = elsewhere([fault["test"]], fault["module"], changed)
    assert code == pytest.ExitCode.TESTS_FAILED, report
    assert {kind for _, kind, _ in failures} <= NOTICED, failures


def test_every_function_of_the_core_has_a_fault():
    without = []
    for module in MODULES:
        source = source_of(module)
        snippets = [fault["old"] for fault in FAULTS if fault["module"] == module]
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                code = ast.get_source_segment(source, node)
                if not any(snippet in code for snippet in snippets):
                    without.append(f"{module}.{node.name}")
    assert without == []
    assert len(FAULTS) >= 35
    assert [name for name, n in Counter(f["name"] for f in FAULTS).items() if n > 1] == []
