"""The archive for a room without a network: what is in it, and that its regkit can be installed."""

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import usb

ROOT = Path(__file__).parents[1]


@pytest.fixture
def parts(tmp_path) -> dict[str, Path]:
    """A book of two pages and a deck, a notebook, a wheel, and the wheel of a library."""
    site, notebooks, wheels = (tmp_path / name for name in ("html", "notebooks", "wheels"))
    for page in ("index.html", "book/data.html", "slides/01/index.html", "slides/07/index.html"):
        (site / page).parent.mkdir(parents=True, exist_ok=True)
        (site / page).write_text(f"<h1>{page}</h1>", encoding="utf-8")
    for path in (notebooks / "01_images.ipynb", wheels / "torch-2.6-cp311-x86_64.whl"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{}")
    wheel = tmp_path / "regkit_course-0.3.0-py3-none-any.whl"
    wheel.write_bytes(b"PK")
    return {"wheel": wheel, "site": site, "notebooks": notebooks, "wheels": wheels}


def unpacked(archive: Path, folder: Path) -> Path:
    shutil.unpack_archive(archive, folder)
    return folder / usb.TOP


class Links(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [v for k, v in attrs if k in ("href", "src") and not v.startswith("data:")]


def test_the_archive_holds_pages_slides_notebooks_and_wheels(tmp_path, parts):
    names = usb.pack(tmp_path / "course.zip", **parts)
    assert len(names) == len(set(names))
    assert {name.removeprefix(f"{usb.TOP}/") for name in names} == {
        "START.html",
        "INSTALL.txt",
        "LICENSE",
        "NOTICE",
        "site/index.html",
        "site/book/data.html",
        "site/slides/01/index.html",
        "site/slides/07/index.html",
        "notebooks/01_images.ipynb",
        "wheels/torch-2.6-cp311-x86_64.whl",
        "wheels/regkit_course-0.3.0-py3-none-any.whl",
    }


def test_every_link_of_the_start_page_leads_to_a_file_of_the_archive(tmp_path, parts):
    usb.pack(tmp_path / "course.zip", **parts)
    folder = unpacked(tmp_path / "course.zip", tmp_path / "stick")
    text = (folder / "START.html").read_text(encoding="utf-8")
    links = Links(text).found
    assert "site/slides/07/index.html" in links and "://" not in text
    for link in links:
        assert (folder / link).is_file(), link


def test_the_three_commands_ask_the_network_only_where_the_wheels_are_missing(tmp_path, parts):
    full = usb.pages(parts["site"], parts["wheel"], has_wheels=True)["INSTALL.txt"]
    small = usb.pages(parts["site"], parts["wheel"], has_wheels=False)["INSTALL.txt"]
    commands = [[line for line in t.splitlines() if line.startswith("    ")] for t in (full, small)]
    assert [len(lines) for lines in commands] == [3, 3]
    assert "--no-index --find-links wheels 'regkit-course[notebook]'" in commands[0][1]
    assert "'wheels/regkit_course-0.3.0-py3-none-any.whl[notebook]'" in commands[1][1]
    assert "from the network" in small and "from the network" not in full


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("site/index.html", "expected the built book"),
        ("site/slides/01/index.html", "expected the slides"),
        ("wheel", "expected the wheel of regkit"),
        ("notebooks/01_images.ipynb", "holds no notebook"),
        ("wheels/torch-2.6-cp311-x86_64.whl", "holds no wheel"),
    ],
)
def test_what_is_missing_is_said(tmp_path, parts, name, said):
    first, _, rest = name.partition("/")
    (parts[first] / rest).unlink() if rest else parts[first].unlink()
    with pytest.raises(FileNotFoundError, match=said):
        usb.pack(tmp_path / "course.zip", **parts)
    assert not (tmp_path / "course.zip").exists()


@pytest.mark.slow
def test_regkit_of_the_archive_installs_and_imports_without_a_network(tmp_path, parts):
    """pip may ask nobody, and the package that is imported is the one of the archive."""
    built = tmp_path / "dist"
    build = f"from setuptools import build_meta as b; b.build_wheel({str(built)!r})"
    copy = tmp_path / "source"  # setuptools writes beside what it packs
    listed = ["git", "-C", str(ROOT), "ls-files", "regkit", "*.toml", "*.py", "LICENSE", "NOTICE"]
    listed += ["README.md", "MANIFEST.in"]
    for name in subprocess.check_output(listed, text=True).splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (wheel,) = built.glob("*.whl")
    usb.pack(tmp_path / "course.zip", wheel, parts["site"], parts["notebooks"])
    folder = unpacked(tmp_path / "course.zip", tmp_path / "stick")
    target = tmp_path / "target"
    offline = ["--no-index", "--no-deps", "--disable-pip-version-check", "--target", str(target)]
    install = [sys.executable, "-m", "pip", "install", "--quiet", *offline]
    subprocess.run([*install, str(folder / "wheels" / wheel.name)], check=True)
    code = "import regkit, regkit.data; print(regkit.__file__)"
    env = os.environ | {"PYTHONPATH": str(target)}
    said = subprocess.check_output([sys.executable, "-c", code], env=env, cwd=tmp_path, text=True)
    assert Path(said.strip()).is_relative_to(target)
