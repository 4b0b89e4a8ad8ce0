"""The book's vendored files are what NOTICE and the table of sums say; its extension works."""

import hashlib
import importlib.util
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import yaml
from address import Address

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "book" / "_static"


def vendored() -> dict[str, Path]:
    """Every file in a library's folder, by its path below book/_static."""
    return {
        p.relative_to(STATIC).as_posix(): p for p in sorted(STATIC.glob("*/**/*")) if p.is_file()
    }


def sums() -> dict[str, str]:
    """The table of sums: file -> sha256."""
    lines = (STATIC / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}


def load(path: str):
    """A file of the folder book as a module."""
    path = ROOT / "book" / path
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_lists_exactly_the_files_that_are_there():
    assert sorted(sums()) == sorted(vendored())
    assert "mathjax/tex-svg-full.js" in sums()


@pytest.mark.parametrize("name", sorted(sums()))
def test_vendored_file_has_its_sum(name):
    assert hashlib.sha256((STATIC / name).read_bytes()).hexdigest() == sums()[name]


def test_every_library_has_its_licence_beside_it_and_a_line_in_notice():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for folder in sorted({name.split("/")[0] for name in vendored()}):
        assert f"{folder}/LICENSE" in vendored()
        assert f"\n{folder}/ " in notice


def test_versions_in_notice_are_those_inside_the_files():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    mathjax = (STATIC / "mathjax" / "tex-svg-full.js").read_text(encoding="utf-8")
    require = (STATIC / "requirejs" / "require.js").read_text(encoding="utf-8")
    assert "mathjax 3.2.2 " in notice and 'VERSION="3.2.2"' in mathjax
    assert "requirejs 2.3.8 " in notice and "RequireJS 2.3.8 " in require


def test_the_configuration_names_files_that_exist_and_no_other_host():
    text = (ROOT / "_config.yml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)["sphinx"]["config"]
    assert "://" not in text
    for name in [config["mathjax_path"], *config["nb_ipywidgets_js"], *config["html_css_files"]]:
        assert (STATIC / name).is_file(), name


def test_the_contents_list_each_page_once():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    sections = [section for chapter in chapters for section in chapter.get("sections", [])]
    listed = [page["file"] for page in chapters + sections] + [toc["root"]]
    folders = ("book", "book/reference", "book/results", "book/teaching")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.md")]
    pages = [path.relative_to(ROOT).with_suffix("").as_posix() for path in files]
    assert len(set(listed)) == len(listed)
    assert sorted(f for f in listed if f.startswith("book/")) == sorted(pages)


def test_the_data_page_names_every_open_sample_and_its_source():
    page = (ROOT / "book" / "data.md").read_text(encoding="utf-8")
    samples = json.loads((ROOT / "regkit" / "data" / "samples.json").read_text(encoding="utf-8"))
    for name, sample in samples["samples"].items():
        assert f"| `{name}` |" in page
        for source in sample["sources"]:
            assert source["repository"] in page


def test_remote_style_sheets_are_taken_out_of_stored_output():
    link = '<link rel="stylesheet"\nhref="https://maxcdn.bootstrapcdn.com/font-awesome/x.css">'
    page = f"<p>a</p>{link}\n<link rel='icon' href='b.svg'><p>c</p>"
    clean = "<p>a</p><link rel='icon' href='b.svg'><p>c</p>"
    assert load("_ext/regkit_book.py").without_remote_styles(page) == clean


def test_buttons_appear_only_with_a_repository_and_colab_only_with_one_on_github():
    options = load("_ext/regkit_book.py").theme_options
    hidden = options(None)
    assert not hidden["launch_buttons"] and not hidden["use_repository_button"]
    assert hidden["repository_url"] == ""
    shown = options(Address("https://github.com/a/b", "v1"))
    assert shown["launch_buttons"]["colab_url"] and shown["use_repository_button"]
    assert shown["repository_url"] == "https://github.com/a/b"
    assert shown["repository_branch"] == "v1"
    elsewhere = options(Address("https://example.org/a/b", "v1"))
    assert elsewhere["use_repository_button"] and not elsewhere["launch_buttons"]


def test_launch_buttons_open_the_branch_that_the_publishing_workflow_writes():
    """Only there: the variable is set in that workflow, whose next job pushes the branch."""
    options = load("_ext/regkit_book.py").theme_options
    address = Address("https://github.com/a/b", "main")
    assert options(address, "colab")["repository_branch"] == "colab"
    workflows = {p.stem: p.read_text() for p in (ROOT / ".github/workflows").glob("*.yml")}
    assert {n for n, text in workflows.items() if "REGKIT_NOTEBOOKS_BRANCH" in text} == {"pages"}


def test_the_figure_of_the_index_shows_what_its_caption_says():
    figure = load("tools/figures.py").idea(shape=(48, 56))
    pictures = {axis.get_title(): axis.images[0].get_array() for axis in figure.axes}
    assert list(pictures) == ["moving", "where each voxel looks", "moved", "fixed"]
    before = abs(pictures["moving"] - pictures["fixed"]).mean()
    after = abs(pictures["moved"] - pictures["fixed"]).mean()
    plt.close(figure)
    assert after < before / 2
