"""Every page of the built book, opened in a browser over file:// with the network off."""

import pytest
import yaml
from page_checks import BOOK, problems

PAGES = sorted(
    p.relative_to(BOOK).as_posix() for p in BOOK.rglob("*.html") if "_static" not in p.parts
)


@pytest.mark.parametrize("name", PAGES or ["index.html"])
def test_page(browser, book, name):
    assert problems(browser, book / name, book) == []


def test_every_page_of_the_contents_was_built(book):
    toc = yaml.safe_load((book.parents[1] / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    sections = [section for chapter in chapters for section in chapter.get("sections", [])]
    files = [toc["root"], *(page["file"] for page in chapters + sections)]
    assert [f for f in files if not (book / f"{f}.html").is_file()] == []


def test_the_book_publishes_no_sources_and_no_path_of_the_machine(book):
    assert not (book / "_sources").exists()
    machine = str(book.parents[1])
    named = [p.name for p in book.rglob("*.html") if machine in p.read_text(encoding="utf-8")]
    assert named == []
