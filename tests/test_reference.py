"""The reference in the book: every public name has a docstring and a page."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "book" / "reference"


def extension() -> ModuleType:
    """The local Sphinx extension that writes the reference."""
    path = ROOT / "book" / "_ext" / "regkit_reference.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = extension()


def value_of(full_name: str):
    module, _, name = full_name.rpartition(".")
    return getattr(importlib.import_module(module), name)


def public_methods(value: type) -> list[str]:
    """Methods and properties that a class defines itself."""
    return [
        name
        for name, member in vars(value).items()
        if not name.startswith("_")
        and (inspect.isroutine(member) or isinstance(member, property | staticmethod))
        and not getattr(member, "__name__", name).startswith("_")  # another name of a private one
    ]


def test_every_public_module_has_a_docstring():
    names = REFERENCE.all_modules()
    assert {"regkit", "regkit.spatial", "regkit.models.unfolding", "regkit.training.loop"} <= {
        *names
    }
    assert [n for n in names if not (importlib.import_module(n).__doc__ or "").strip()] == []


@pytest.mark.slow
def test_every_public_name_has_a_docstring():
    names = set(REFERENCE.entries().values())
    assert {"regkit.register", "regkit.spatial.warp", "regkit.models.create"} <= names
    data = {name for name in names if not callable(value_of(name))}
    assert {"regkit.data.LABELS", "regkit.papers.TABLES"} <= data
    assert [name for name in sorted(names - data) if not inspect.getdoc(value_of(name))] == []
    assert [name for name in sorted(data) if not REFERENCE.comment(name)] == []


def test_no_docstring_is_what_python_writes_by_itself():
    """A dataclass or a named tuple without a docstring gets its signature as one."""
    classes = [n for n in set(REFERENCE.entries().values()) if inspect.isclass(value_of(n))]
    assert len(classes) > 50
    own = {name: value_of(name).__dict__.get("__doc__") or "" for name in classes}
    assert [n for n, text in own.items() if text.startswith(f"{n.rpartition('.')[2]}(")] == []


def test_every_public_method_has_a_docstring():
    """Its own, or that of the method which it overrides."""
    classes = [n for n in set(REFERENCE.entries().values()) if inspect.isclass(value_of(n))]
    methods = [(name, method) for name in classes for method in public_methods(value_of(name))]
    assert ("regkit.Result", "save") in methods
    bare = [f"{n}.{m}" for n, m in methods if not inspect.getdoc(getattr(value_of(n), m))]
    assert bare == []


def test_a_section_of_arguments_names_arguments_only():
    """What a docstring explains is there, by that name."""
    strangers = []
    for name in sorted(set(REFERENCE.entries().values())):
        value = value_of(name)
        section = re.search(r"^Args:\n((?: +.*\n?|\n)+)", inspect.getdoc(value) or "", re.MULTILINE)
        if section and callable(value):
            items = re.findall(r"^    (\*{0,2}\w[\w, *]*): ", section[1], re.MULTILINE)
            explained = {item.strip("* ") for line in items for item in line.split(",")}
            strangers += [f"{name}: {x}" for x in explained - arguments(value)]
    assert strangers == []


def arguments(value) -> set[str]:
    """The arguments of a function, or of a class and of the classes it is derived from."""
    names = set(inspect.signature(value).parameters)
    if inspect.isclass(value):
        for base in value.__mro__[1:-1]:
            if base.__module__.startswith("regkit"):
                names |= set(inspect.signature(base).parameters)
    return names


def test_every_module_has_one_page():
    shown = []
    for page in PAGES.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for names in re.findall(r"^```\{api\} (.*)$", text, re.MULTILINE):
            shown += [module for name in names.split() for module in REFERENCE.modules(name)]
        shown += [REFERENCE.COMMANDS] * text.count("```{command-line}\n")
    assert set(REFERENCE.all_modules()) - set(shown) == set(), "no page of book/reference has these"
    assert sorted(shown) == sorted(REFERENCE.all_modules())


def test_a_name_has_its_entry_with_the_package_that_hands_it_on():
    entries = REFERENCE.entries()
    assert entries["regkit.registration.register"] == "regkit.register"
    assert entries["regkit.models.base.Registration"] == "regkit.models.Registration"
    assert "regkit.models.Registration" in REFERENCE.shown("regkit.models")
    assert REFERENCE.shown("regkit.registration") == []
    assert "regkit.cli.train" not in entries


def test_what_a_chapter_may_write():
    names = REFERENCE.chapter_names()
    for text in ("regkit.spatial.warp", "spatial.warp", "warp"):
        assert names[text] == "regkit.spatial.warp"
    assert names["regkit.io"] == "regkit.io"
    assert names["transform.Transform.points"] == "regkit.transform.Transform.points"
    # of a module whose names mean something else on a page, and modules that are plain words
    assert not {"image", "shift", "data", "models", "regkit"} & set(names)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Look at `x_`.", r"Look at ``x_``\ ."),
        ("`a\nb` c", "``a\nb`` c"),
        ("(`a`, `b`)", r"(\ ``a``\ , ``b``\ )"),
        ("a *fixed* point of (B, *S) and |x|", r"a *fixed* point of (B, \*S) and \|x\|"),
        ('"a" or --b_', r"\"a\" or \-\-b\_"),
        ("that is\n\n    y = *x\n\nhere", "that is\n\n::\n\n    y = *x\n\nhere"),
        (">>> f(*x)", ">>> f(*x)"),
        ("- one\n- two", "- one\n- two"),
        (
            "Args:\n    a, b: one\n        more\n    *c: `two`\n\nReturns:\n    It: so.",
            ":Arguments:\n   ``a``\\ , ``b``\n      one\n      more\n   ``*c``\n      ``two``\n\n"
            ":Returns:\n   ``It``\n      so.",
        ),
        ("a: a field\nb: none", "``a``\n   a field\n``b``\n   none"),
        ("that: is no field", "that: is no field"),
    ],
)
def test_a_docstring_becomes_what_sphinx_reads(text, rest):
    lines = REFERENCE.restructured(text.splitlines(), {"a", "b"})
    assert "\n".join(lines).strip() == rest
