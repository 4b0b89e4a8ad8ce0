"""The reader's notebooks say what the pages of the book say, word for word and number for number.

Sphinx has made the pages; plain.py has made the notebooks. Both are parsed to paragraphs, cells of
tables, headings and numbers of figures, equations and exercises, and compared.
"""

import re

import nbformat
import pytest
from bs4 import BeautifulSoup
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from page_checks import BOOK

NOTEBOOKS = sorted((BOOK.parents[1] / "notebooks").glob("*.ipynb"))
VIEWER = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin)
# Sphinx curls quotation marks, cites as [A, 2024, B, 2025], and writes "and others", as the file.
SIGNS = str.maketrans(
    {"[": "(", "]": ")", ";": ",", "’": "'", "‘": "'", "“": '"', "”": '"', "…": "..."}
)


def words(text: str) -> str:
    text = text.translate(SIGNS).replace(" and others", " et al.")
    return " ".join(re.sub(r"^((Figure|Exercise) \d+\.\d+)\.", r"\1", text.strip()).split())


def said(soup: BeautifulSoup) -> set[str]:
    """Paragraphs, cells and headings, without their formulas."""
    for formula in soup.select(".math, .headerlink"):
        formula.decompose()
    return {words(place.get_text()) for place in soup.select("p, td, th, h1, h2, h3")} - {""}


def rendered(markdown: str) -> BeautifulSoup:
    tokens = VIEWER.parse(markdown)
    for token in tokens:
        token.hidden = False  # a paragraph in each item of a list, as on the pages
    return BeautifulSoup(VIEWER.renderer.render(tokens, VIEWER.options, {}), "html.parser")


def page_of(path) -> BeautifulSoup:
    html = (BOOK / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
    return BeautifulSoup(html, "html.parser").select_one("article")


def prose_of(path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_what_its_page_says(book, path):
    page, prose = page_of(path), prose_of(path)
    folds = ".solution > .admonition-title, .hint > .admonition-title"
    for other in page.select(f"{folds}, summary, .output"):
        other.decompose()
    for title in page.select(".exercise > .admonition-title"):
        number, name = re.fullmatch(r"(Exercise [\d.]+) \((.*)\)", words(title.get_text())).groups()
        title.string = f"{number} {name}"
    prose, _, listed = prose.partition("### Where to find them")
    on_page, in_notebook = said(page), said(rendered(prose))
    assert len(in_notebook) > 100
    assert in_notebook - on_page == set()
    assert on_page - in_notebook == set()
    assert listed.count("\n- ") > 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_numbers_of_equations_are_those_of_the_page(book, path):
    on_page = [
        (number.get_text().strip("()#"), number.parent.get_text())
        for number in page_of(path).select(".math .eqno")
    ]
    formulas = [t.content for t in VIEWER.parse(prose_of(path)) if t.type == "math_block"]
    tagged = [f.strip().removesuffix("}").split(r" \tag{") for f in formulas if r"\tag{" in f]
    assert [number for number, _ in on_page] == [number for _, number in tagged]
    for (_, drawn), (formula, _) in zip(on_page, tagged):
        assert "".join(formula.split()) in "".join(drawn.split())


def test_the_list_of_references_is_that_of_the_bibliography(book):
    html = (BOOK / "book" / "bibliography.html").read_text(encoding="utf-8")
    bibliography = BeautifulSoup(html, "html.parser").select_one("article")
    known = {words(place.get_text()) for place in bibliography.select("div.citation p")}
    for path in NOTEBOOKS:
        listed = prose_of(path).partition("### Where to find them")[2]
        assert {words(place.get_text()) for place in rendered(listed).select("li")} <= known
