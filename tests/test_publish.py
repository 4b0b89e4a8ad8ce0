"""What the branch for Colab holds: notebooks with an address, and a page that opens each."""

from pathlib import Path

import nbformat
import pytest
import typer
from address import COLAB_BRANCH, Address

pytest.importorskip("jupytext")  # of the extra book, which Colab lacks
import publish  # noqa: E402

import notebooks  # noqa: E402

ROOT = Path(__file__).parents[1]


def test_the_branch_for_colab_holds_every_notebook_with_the_address(tmp_path, monkeypatch):
    asked = []

    def version(md, address, branch):
        asked.append((md.stem, address, branch))
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(address.pip)])

    monkeypatch.setattr(notebooks, "reader_version", version, raising=False)
    address = Address("https://github.com/a/b", "main")
    written = publish.publish(tmp_path / "out", address)
    chapters = sorted((ROOT / "notebooks").glob("*.md"))
    assert [path.name for path in written] == [f"{md.stem}.ipynb" for md in chapters]
    assert asked == [(md.stem, address, COLAB_BRANCH) for md in chapters]
    assert all("git+https://github.com/a/b@main" in path.read_text() for path in written)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "\n- 02 Rigid and affine registration: [" in readme
    for path in written:
        place = f"github/a/b/blob/colab/notebooks/{path.name}"
        assert f"(https://colab.research.google.com/{place})" in readme


def test_without_an_address_on_github_there_is_no_branch_for_colab(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    for address in ("", "https://git.example.org/a/b"):
        monkeypatch.setenv("REGKIT_REPOSITORY", address)
        monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
        with pytest.raises(typer.BadParameter, match="no address on GitHub"):
            publish.main(tmp_path / "out")
    assert not (tmp_path / "out").exists()
