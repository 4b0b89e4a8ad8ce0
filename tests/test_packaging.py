"""The lists of versions agree, regkit fits into Colab, and no file says what it must not."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from importlib.metadata import entry_points, packages_distributions, version
from pathlib import Path

import pytest
import yaml
from address import COLAB_BRANCH
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from regkit import widgets

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(r) for r in PROJECT["dependencies"]]
EXTRAS = {
    extra: [Requirement(r) for r in lines]
    for extra, lines in PROJECT["optional-dependencies"].items()
}
CONDA_NAMES = {"pytorch": "torch"}  # conda-forge's name -> the name used elsewhere


def bounds(requirements) -> dict[str, str]:
    return {canonicalize_name(r.name): str(r.specifier) for r in requirements}


def pins(file: str) -> dict[str, str]:
    """name -> version of a file of `name==version` lines."""
    lines = [x for x in (ROOT / file).read_text().splitlines() if x and not x.startswith("#")]
    found = {}
    for line in lines:
        name, pinned = line.split("==")
        found[canonicalize_name(name)] = pinned
    return found


DIRECT = bounds(CORE + [r for rs in EXTRAS.values() for r in rs])


def project_files() -> list[str]:
    """What git tracks; in an unpacked source distribution, what it holds."""
    if (ROOT / ".git").exists():
        listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
        return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    (listed,) = ROOT.glob("*.egg-info/SOURCES.txt")
    return listed.read_text().splitlines()


# ----------------------------------------------------------------------- the lists of versions


def test_environment_yml_has_the_bounds_of_pyproject():
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    from_pip = next(x["pip"] for x in lines if isinstance(x, dict))
    conda = [Requirement(x) for x in lines if isinstance(x, str) and x != "pip"]
    pip = [Requirement(x) for x in from_pip if x != "-e ."]
    assert "-e ." in from_pip
    for requirement in conda:
        requirement.name = CONDA_NAMES.get(requirement.name, requirement.name)
    listed = bounds(conda + pip)
    assert listed.pop("python").startswith(("<3.14,>=3.11", ">=3.11"))
    assert listed == DIRECT


def test_constraints_pin_everything_that_pyproject_names_inside_its_bounds():
    pinned = pins("constraints.txt")
    assert set(DIRECT) <= set(pinned)
    outside = [
        f"{name}=={pinned[name]} is not {bound}"
        for name, bound in DIRECT.items()
        if not Requirement(f"{name}{bound}").specifier.contains(pinned[name])
    ]
    assert outside == []


def test_the_lock_has_the_sums_of_everything_in_constraints_but_torch():
    """What torch alone brings differs from index to index, and has a version only."""
    text = (ROOT / "requirements.lock").read_text()
    entries = [x for x in re.split(r"(?m)^(?=\w)", text) if not x.startswith("#")]
    locked = {}
    for entry in entries:
        name, version = re.match(r"([\w.-]+)==([\w.]+)", entry).groups()
        locked[canonicalize_name(name)] = version
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), name
    assert len(locked) == len(entries)  # each package once
    pinned = pins("constraints.txt")
    assert set(DIRECT) - set(locked) == {"torch"}
    alone = re.compile("torch|triton|nvidia-|cuda-")
    assert {n for n in pinned if not alone.match(n)} <= set(locked)
    assert {n: v for n, v in locked.items() if pinned.get(n, v) != v} == {}
    workflows = [path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")]
    assert all("--require-hashes -r requirements.lock" in workflow for workflow in workflows)


def test_core_has_lower_bounds_only_and_they_admit_what_colab_has():
    colab = pins("tests/colab.txt")
    assert {"torch", "numpy", "ipywidgets"} <= set(colab)
    for requirement in CORE:
        assert [s.operator for s in requirement.specifier] == [">="], str(requirement)
        there = colab.get(canonicalize_name(requirement.name))
        assert there is None or requirement.specifier.contains(there), str(requirement)


def test_requires_python_is_what_the_environment_and_the_workflow_say():
    assert PROJECT["requires-python"] == ">=3.11"
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_version_is_the_same_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert PROJECT["version"] == str(cited) == version("regkit-course")
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_what_needs_a_bound_twice_has_it_twice_alike():
    """The extra `notebook` brings what `train` brings; an extra repeats nothing of the core."""
    assert set(map(str, EXTRAS["train"])) < set(map(str, EXTRAS["notebook"]))
    assert not set(bounds(CORE)) & set(bounds(r for rs in EXTRAS.values() for r in rs))
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    makefile = (ROOT / "Makefile").read_text()
    (everything,) = re.findall(r"(?m)^EXTRAS := (\S+)$", makefile)
    assert set(everything.split(",")) == set(EXTRAS) and ".[notebook," in workflow


# --------------------------------------------------------------------------------- the package


def imports(path: Path) -> set[tuple[str, bool]]:
    """(top module, is it imported with the file) of each import statement of a file."""
    found = set()
    tree = ast.parse(path.read_text())
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) or _for_types_only(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name.split(".")[0], id(node) not in lazy) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module.split(".")[0], id(node) not in lazy))
    return found


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@pytest.mark.parametrize("path", sorted((ROOT / "regkit").rglob("*.py")), ids=lambda p: p.stem)
def test_what_the_package_imports_is_declared(path):
    """At import: the core. Inside functions: also the extras, and what comes with them."""
    owners = packages_distributions()
    core = set(bounds(CORE))
    lazily = set(DIRECT) | {"ipython", "myst-nb"}  # of ipywidgets, of jupyter-book
    for module, at_import in imports(path):
        if module in sys.stdlib_module_names or module == "regkit":
            continue
        names = {canonicalize_name(n) for n in owners.get(module, [module])}
        assert names & (core if at_import else lazily), f"{path.name} imports {module}, undeclared"


def test_a_slider_without_its_extra_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r'ipywidgets is not installed.*"\.\[notebook\]"\.$'):
        widgets.frames(lambda value: None, [0.0, 1.0])


def test_command_exists():
    (command,) = entry_points(group="console_scripts", name="regkit")
    assert callable(command.load())


def test_weights_are_small_and_in_the_distribution():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = {
        path
        for pattern in setuptools["package-data"]["regkit"]
        for path in (ROOT / "regkit").glob(pattern)
    }
    present = {
        p for p in (ROOT / "regkit").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")
    }
    assert present <= shipped


BUILD = "from setuptools import build_meta as b; b.build_sdist('..'); b.build_wheel('..')"


@pytest.fixture(scope="module")
def distribution(tmp_path_factory) -> Path:
    """The wheel and the source distribution, built from what git tracks."""
    folder = tmp_path_factory.mktemp("distribution")
    source = folder / "source"
    for name in project_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def unpacked(distribution) -> Path:
    """The source distribution, unpacked: a folder without git."""
    file = next(distribution.glob("*.tar.gz"))
    shutil.unpack_archive(file, distribution / "unpacked", filter="data")
    return next((distribution / "unpacked").iterdir())


@pytest.mark.slow
def test_the_wheel_holds_weights_licence_and_notice_and_nothing_else(distribution):
    """The weights are made from the MNI152 template, and NOTICE has its terms: they go together."""
    file = next(distribution.glob("*.whl"))
    with zipfile.ZipFile(file) as wheel:
        names = wheel.namelist()
        (notice,) = (name for name in names if name.endswith("/licenses/NOTICE"))
        assert wheel.read(notice) == (ROOT / "NOTICE").read_bytes()
    assert b"MNI152" in (ROOT / "NOTICE").read_bytes()
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    here = {str(p.relative_to(ROOT)) for p in (ROOT / "regkit/weights").glob("*.safetensors")}
    assert here and here <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"regkit", "regkit_course"}
    assert file.stat().st_size < 12_000_000


def test_the_source_distribution_holds_what_git_tracks(unpacked):
    held = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    made = re.compile(r"PKG-INFO|setup\.cfg|regkit_course\.egg-info/")  # by setuptools
    assert {n for n in held if not made.match(n)} == {
        name for name in project_files() if not made.match(name)
    }


@pytest.mark.slow
def test_the_tests_run_in_an_unpacked_source_distribution(unpacked):
    """There is no git there, and regkit is the one of that folder."""
    code = "import regkit; print(regkit.__file__)"
    env = os.environ | {"PYTHONPATH": str(unpacked)}
    place = subprocess.check_output([sys.executable, "-c", code], cwd=unpacked, env=env, text=True)
    assert Path(place.strip()).parent == unpacked / "regkit"
    names = "test_spatial.py", "test_messages.py", "test_site_files.py", "test_packaging.py"
    few = "not distribution and not wheel and not links and not declared and not gradcheck"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", few]
    command += [f"tests/{name}" for name in names]
    done = subprocess.run(command, cwd=unpacked, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50


@pytest.mark.parametrize("repository", ["", "https://example.org/ada/regkit.git"])
def test_the_package_has_links_where_its_address_is_known(unpacked, tmp_path, repository):
    """Built in a folder without git, outside of any workflow: pyproject.toml has the word."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(unpacked / name, tmp_path / name)
    (tmp_path / "book").mkdir()
    shutil.copytree(unpacked / "book" / "tools", tmp_path / "book" / "tools")
    text = (tmp_path / "pyproject.toml").read_text()
    assert text.count('\nrepository = "') == 1
    text = re.sub(r'(?m)^repository = ".*"$', f'repository = "{repository}"', text)
    (tmp_path / "pyproject.toml").write_text(text)
    (tmp_path / "regkit").mkdir()
    code = "from setuptools import build_meta as b; b.prepare_metadata_for_build_wheel('.')"
    unset = ("REGKIT_REPOSITORY", "GITHUB_REPOSITORY")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    metadata = next(tmp_path.glob("*.dist-info/METADATA")).read_text()
    links = dict(re.findall(r"(?m)^Project-URL: (\w+), (\S+)$", metadata))
    address = "https://example.org/ada/regkit"
    ref = tomllib.loads(text)["tool"]["regkit"]["ref"]
    changes = f"{address}/blob/{ref}/CHANGELOG.md"
    named = {"Source": address, "Issues": f"{address}/issues", "Changes": changes}
    assert links == (named if repository else {})


# ------------------------------------------------------------------------------ the wheel alone


def needed(names: set[str]) -> set[str]:
    """These distributions and all that they bring into this environment."""
    found, new = set(), set(names)
    while new:
        found |= new
        lines = {Requirement(line) for name in new for line in metadata.requires(name) or []}
        used = {r for r in lines if r.marker is None or r.marker.evaluate({"extra": ""})}
        new = {canonicalize_name(r.name) for r in used} - found
    return found


@pytest.mark.slow
def test_the_wheel_alone_registers_two_scans(distribution, tmp_path):
    """In an environment that shows what the wheel names as needed, and nothing else.

    `make wheel-test` does the same in one into which pip has installed it.
    """
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = next(venv.glob("bin/python"))
    site = next(venv.glob("lib/python3*/site-packages"))
    wheel = next(distribution.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
    command += ["--no-index", "--quiet", "--disable-pip-version-check", wheel]
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    subprocess.run(command, check=True, env=kept)
    for name in needed(set(bounds(CORE))):
        files = metadata.distribution(name)
        for top in {file.parts[0] for file in files.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(files.locate_file(top))
    assert not any((site / name).exists() for name in ("accelerate", "ipywidgets", "tensorboard"))
    env = kept | {"REGKIT_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    env |= dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    code = "import regkit; print(regkit.__version__, regkit.__file__)"
    said = subprocess.check_output([python, "-c", code], cwd=tmp_path, env=env, text=True).split()
    assert said[0] == PROJECT["version"] and Path(said[1]).is_relative_to(venv)
    command = [venv / "bin/regkit", "demo", "--size", "small", "--device", "cpu", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = {path.name for path in (tmp_path / "out/synthetic_2d").iterdir()}
    assert {"disp.nii.gz", "metrics.json", "moved.nii.gz", "report.png"} <= made


# ------------------------------------------------------------------------------- the workflows

MAY_WRITE = {
    ("pages", "deploy"): {"pages", "id-token"},
    ("pages", "notebooks"): {"contents"},
    ("release", "publish"): {"contents"},
}
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.y*ml"))


def test_the_branch_for_colab_holds_what_the_build_made_and_no_settings_of_git():
    """An archive could bring hooks, which git would run with the right to write."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/pages.yml").read_text())["jobs"]
    steps = [step.get("run", "") for step in jobs["notebooks"]["steps"]]
    (unpacks,) = (n for n, step in enumerate(steps) if step.startswith("tar "))
    assert "--exclude=.git" in steps[unpacks].split()
    assert all("git -C branch" not in step for step in steps[:unpacks])
    assert steps[-1].endswith(f" {COLAB_BRANCH}") and "notebooks" in jobs["deploy"]["needs"]
    (build,) = (step for step in jobs["build"]["steps"] if step.get("run") == "make book")
    assert build["env"] == {"REGKIT_NOTEBOOKS_BRANCH": COLAB_BRANCH}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_pinned_actions_with_rights_to_read(path):
    """A tag can be moved to other code, a commit cannot. Only jobs that publish may write."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        uses = [step["uses"] for step in job["steps"] if "uses" in step]
        for action in uses:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action), action
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
        writes = {k for k, v in job.get("permissions", {}).items() if v == "write"}
        assert writes == MAY_WRITE.get((path.stem, name), set())
        if writes:  # nothing that the project or its dependencies say is run there
            assert not any("checkout" in action for action in uses)
            commands = [step["run"].strip() for step in job["steps"] if "run" in step]
            assert {command.split()[0] for command in commands} <= {"gh", "git", "tar"}
            assert not any(re.search(r"[\n;&|`]|\$\(", command) for command in commands)
        else:
            assert "github.token" not in str(job) and "secrets." not in str(job)
    lines = [line for line in path.read_text().splitlines() if "uses:" in line]
    assert all(re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line) for line in lines)


# ---------------------------------------------------------------------------------- every file


def tracked() -> dict[str, str]:
    """Text of each file of the project, without what others wrote (book/_static/<library>/)."""
    texts = {}
    for name in project_files():
        if re.match(r"book/_static/[^/]+/", name):
            continue
        data = (ROOT / name).read_bytes()
        if b"\0" not in data:
            texts[name] = data.decode("utf-8")
    return texts


# Written so that this file does not contain what it looks for.
FORBIDDEN = {
    "the index's name `regkit` belongs to somebody else": r'pip install (-\S+ )*"?regkit(?!-|\w)',
    "the index's name `regkit-course` is nobody's yet": r'install (-\S+ )*"?regkit-course\[',
    "the name of a package registry's host": r"py[p]i\.org|python[h]osted\.org|npm[j]s\.",
    "a path of one machine": r"(?<![\w.:/*])/(?:work|root|home/\w+|Users/\w+)/",
    "code in a data file may run when it is read": r"pickle\.loads?\(|allow_pickle=Tru[e]",
    "a shell, or an archive that may write anywhere": r"shell=Tru[e]|extractal[l]\(",
}


@pytest.mark.parametrize("reason", FORBIDDEN)
def test_no_file_says_what_it_must_not(reason):
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for name, text in tracked().items()
        for match in re.finditer(FORBIDDEN[reason], text)
    ]
    assert found == []


def test_contributing_has_at_most_a_thousand_words():
    assert len((ROOT / "CONTRIBUTING.md").read_text().split()) <= 1000


def test_no_address_is_typed_into_a_page():
    """A fork would inherit it; `address.found` says where a build is public."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["regkit"]
    assert set(settings) == {"repository", "ref"}
    if not settings["repository"]:
        pages = {n: text for n, text in tracked().items() if n.endswith((".md", ".ipynb"))}
        assert [n for n, text in pages.items() if "colab.research.google" in text] == []
