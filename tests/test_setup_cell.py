"""The first cell of a reader's notebook: alone in an empty folder, in a Python without regkit."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
import setup_cell
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CHAPTERS = [md.stem for md in sorted((ROOT / "notebooks").glob("*.md"))]
# as Jupyter runs a cell, in Colab
RUN = """
import sys
import google.colab
from IPython.core.interactiveshell import InteractiveShell
code = open(sys.argv[1], encoding="utf-8").read()
done = InteractiveShell.instance(colors="NoColor").run_cell(code)
sys.exit(type(done.error_in_exec).__name__ if done.error_in_exec else None)
"""


class Runtime:
    """A Python that has what is installed here, but no regkit; and an empty folder.

    What is installed is linked, so that nothing is copied. pip sees no index and no network.
    """

    def __init__(self, folder: Path) -> None:
        self.empty = folder / "empty"
        self.empty.mkdir(parents=True)
        self.extra = folder / "extra"  # on the path, before what is installed
        (self.extra / "google" / "colab").mkdir(parents=True)
        (self.extra / "google" / "colab" / "__init__.py").touch()
        venv.create(folder / "venv", with_pip=False)
        self.python = next((folder / "venv").glob("bin/python"))
        (self.site,) = (folder / "venv").glob("lib/python3*/site-packages")
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if "regkit" not in entry.name.lower():
                (self.site / entry.name).symlink_to(entry)

    def run(self, code: str, folder: Path | None = None, **environment: str):
        """(what it printed, the name of the error or "", what was printed for the error)."""
        (self.extra / "run.py").write_text(RUN, encoding="utf-8")
        (self.extra / "cell.py").write_text(code, encoding="utf-8")
        unset = ("PYTHONHOME", "REGKIT_REPOSITORY", "REGKIT_HOME")
        kept = {name: value for name, value in os.environ.items() if name not in unset}
        kept |= {"PYTHONPATH": str(self.extra), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
        kept |= {"OMP_NUM_THREADS": "1", "REGKIT_DATA": str(self.extra / "data")}
        done = subprocess.run(
            [self.python, self.extra / "run.py", self.extra / "cell.py"],
            cwd=folder or self.empty, env=kept | environment, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout.splitlines(), done.stderr.strip()

    def stopped(self, code: str, folder: Path | None = None, **environment: str) -> str:
        """The one sentence with which the cell stops."""
        said, error = self.run(code, folder, **environment)
        assert error == "SetupError", (said, error)
        assert not any("Traceback" in line or line.startswith("---") for line in said)
        assert said[-1].startswith("Setup stopped: ") and said[-1].endswith(".")
        return said[-1].removeprefix("Setup stopped: ")


@pytest.fixture
def runtime(tmp_path) -> Runtime:
    return Runtime(tmp_path)


def package(folder: Path, version: str, book: str = "", needs: str = "") -> Path:
    """The source of a regkit of that version, whose `regkit.book` is this code."""
    (folder / "regkit" / "book").mkdir(parents=True)
    (folder / "regkit" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    (folder / "regkit" / "book" / "__init__.py").write_text(book)
    return described(folder, "regkit-course", version, needs, ["regkit", "regkit.book"])


def described(folder: Path, name: str, version: str, needs: str = "", packages=()) -> Path:
    """The source of a distribution that needs another."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "{name}"\nversion = "{version}"\n'
        f"dependencies = {[needs] if needs else []}\noptional-dependencies.notebook = []\n"
        f"[tool.setuptools]\npackages = {list(packages)}\n"
    )
    return folder


def wheel(source: Path) -> Path:
    code = "from setuptools import build_meta as b; b.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next((source / "dist").glob("*.whl"))


SAYS = "def setup(*given, **named): print(given, named)\n"


# ---------------------------------------------------------------------------------- its source


def test_the_cell_is_code_that_names_its_chapter_and_its_address():
    address = "git+https://github.com/a/b@v1"
    cell = setup_cell.source("08", address, {"cpu": 519})
    assert cell.startswith("# @title ")  # what Colab shows where it folds the code
    assert f'"{address}"' in cell
    assert cell.endswith('\nregkit.book.setup("08", seconds={"cpu": 519})')
    assert setup_cell.source("01").endswith('\nregkit.book.setup("01")')
    assert {type(ast.parse(cell)), type(ast.parse(setup_cell.source("01")))} == {ast.Module}


def test_the_wanted_version_is_one_that_there_is():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert Version(setup_cell.WANTED) <= Version(project["version"])


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_text_of_a_chapter_has_the_short_cell(name):
    text = (ROOT / "notebooks" / f"{name}.md").read_text(encoding="utf-8")
    (cell,) = re.findall(r"(?m)^:tags: \[setup.*\]\n\n((?:.*\n)*?)```$", text)
    assert cell == f'import regkit.book\n\nregkit.book.setup("{name[:2]}")\n'


# --------------------------------------------------------------------------- where it finds regkit


def test_a_checkout_above_is_used_and_nothing_is_installed(runtime, tmp_path):
    checkout = package(tmp_path / "checkout", setup_cell.WANTED, SAYS)
    (checkout / "notebooks").mkdir()
    said, error = runtime.run(setup_cell.source("08"), checkout / "notebooks")
    assert (said, error) == (["('08',) {}"], "")


def test_an_installed_regkit_is_used(runtime):
    shutil.copytree(
        package(runtime.extra / "made", "99.1", SAYS) / "regkit", runtime.site / "regkit"
    )
    (runtime.site / "regkit_course-99.1.dist-info").mkdir()
    (runtime.site / "regkit_course-99.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: regkit-course\nVersion: 99.1\n"
    )
    said, error = runtime.run(setup_cell.source("08", seconds={"gpu": 60}))
    assert (said, error) == (["('08',) {'seconds': {'gpu': 60}}"], "")


@pytest.mark.slow
def test_it_is_installed_from_a_wheel_that_replaces_nothing(runtime, tmp_path):
    """After that it is there; and in a runtime that was reset the cell installs it again."""
    file = wheel(package(tmp_path / "source", setup_cell.WANTED, SAYS))
    before = {path.name for path in runtime.site.iterdir()}
    cell = setup_cell.source("08", "git+https://127.0.0.1:9/a/b@main")
    said, error = runtime.run(cell, REGKIT_REPOSITORY=str(file))
    assert error == "" and said[-1] == "('08',) {}"
    assert said[0].startswith(f"Installing regkit from {file.as_uri()}, ") and len(said) == 2
    new = {path.name for path in runtime.site.iterdir()} - before
    assert {name.split("-")[0] for name in new} == {"regkit", "regkit_course"}
    assert all((runtime.site / name).is_symlink() for name in before)
    assert runtime.run(cell) == (["('08',) {}"], "")
    reset = Runtime(tmp_path / "reset")
    assert reset.run(cell, REGKIT_REPOSITORY=str(file))[0] == said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("needs", "installed"),
    [
        ("lens", {"lens": "1", "glass": "1"}),  # lens 2 would need a newer glass than is here
        ("glass>=2", {"glass": "2"}),  # nothing else would do
    ],
)
def test_what_is_here_stays_as_long_as_anything_fits_it(needs, installed, runtime, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    offered = (("glass", "1", ""), ("glass", "2", ""), ("lens", "1", "glass"))
    for name, version, need in (*offered, ("lens", "2", "glass>=2")):
        file = wheel(described(tmp_path / f"{name}-{version}", name, version, need))
        shutil.copy(file, links)
    (glass,) = links.glob("glass-1-*")
    shutil.unpack_archive(glass, runtime.site, "zip")
    file = wheel(package(tmp_path / "source", setup_cell.WANTED, SAYS, needs))
    said, error = runtime.run(
        setup_cell.source("08"), REGKIT_REPOSITORY=str(file), PIP_FIND_LINKS=str(links)
    )
    assert error == "" and said[-1] == "('08',) {}"
    found = {path.name.split("-")[0]: path.name for path in runtime.site.glob("*.dist-info")}
    for name in ("lens", "glass"):
        version = installed.get(name)
        assert found.get(name) == (version and f"{name}-{version}.dist-info")
    assert (runtime.site / "numpy").is_symlink() and (runtime.site / "torch").is_symlink()


# ----------------------------------------------------------------------------- where it cannot


def test_without_an_address_it_says_what_to_do(runtime):
    sentence = runtime.stopped(setup_cell.source("08"))
    assert 'pip install ".[notebook]"' in sentence and "REGKIT_REPOSITORY" in sentence


@pytest.mark.slow
def test_without_network_it_says_from_where_it_could_not_install(runtime):
    sentence = runtime.stopped(setup_cell.source("08", "git+https://127.0.0.1:9/a/b@main"))
    assert sentence.startswith(
        "pip could not install regkit from git+https://127.0.0.1:9/a/b@main (fatal: "
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("named", "asked"),
    [
        ("missing.whl", "file://{empty}/missing.whl"),
        ("https://127.0.0.1:9/a/b", "git+https://127.0.0.1:9/a/b"),
        ("https://127.0.0.1:9/r-1-py3-none-any.whl", "https://127.0.0.1:9/r-1-py3-none-any.whl"),
    ],
)
def test_the_environment_may_name_another_source(named, asked, runtime):
    cell = setup_cell.source("08", "git+https://127.0.0.1:9/never/asked@main")
    sentence = runtime.stopped(cell, REGKIT_REPOSITORY=named)
    asked = asked.format(empty=runtime.empty.resolve())
    assert sentence.startswith(f"pip could not install regkit from {asked} (")


def test_an_old_regkit_is_named_with_the_version_that_is_wanted(runtime, tmp_path):
    old = package(tmp_path / "old", "0.2.0", SAYS)
    sentence = runtime.stopped(setup_cell.source("08"), old)
    assert f"wants regkit {setup_cell.WANTED} or newer, and 0.2.0 is here" in sentence


def test_a_checkout_whose_dependencies_are_missing_names_the_first(runtime, tmp_path):
    checkout = package(tmp_path / "checkout", setup_cell.WANTED, "import not_installed_here\n")
    sentence = runtime.stopped(setup_cell.source("08"), checkout)
    assert "'not_installed_here'" in sentence and 'pip install -e ".[notebook]"' in sentence


# ------------------------------------------------------------------------------- the real wheel


@pytest.fixture(scope="module")
def real_wheel(tmp_path_factory) -> Path:
    """Built as `make wheel` does, from the files that a wheel is made of."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source / name)
    for name in ("regkit", "book/tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    return wheel(source)


@pytest.mark.slow
def test_the_setup_cells_of_all_notebooks_run_in_an_empty_folder(runtime, real_wheel):
    """The first one installs the library, and those after it find it."""
    cells = [setup_cell.source(name[:2], seconds={"cpu": 60}) for name in CHAPTERS]
    said, error = runtime.run(
        "\n".join(cells), REGKIT_REPOSITORY=str(real_wheel), REGKIT_BUDGET="cpu"
    )
    assert error == "", said
    assert said[0].startswith("Installing regkit from file://")
    ends = [f"budget cpu; chapter {name[:2]} takes about 1 min." for name in CHAPTERS]
    assert all(line.endswith(end) for line, end in zip(said[1::2], ends, strict=True))
    assert all("mount your Google Drive" in line for line in said[2::2])
    assert list(runtime.empty.iterdir()) == []
