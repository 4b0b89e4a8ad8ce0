"""The decks of book/slides refer to their chapters; a wrong reference says what is missing."""

import hashlib
import re
from functools import cache
from html.parser import HTMLParser

import pytest
import slides
from slides import Deck, Slide, decks, read_deck, references

NAMES = [path.stem for path in decks()]


@cache
def deck(name: str) -> Deck:
    return Deck(decks([name])[0])


class Page(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def broken(tmp_path, body: str) -> str:
    """What is said about a deck of chapter 01 with one slide of this body."""
    path = tmp_path / "01.md"
    path.write_text(f"# A title\n\n{body}\n", encoding="utf-8")
    with pytest.raises(ValueError) as raised:
        Deck(path)
    return str(raised.value)


def test_every_chapter_has_a_deck():
    assert NAMES == sorted(path.name[:2] for path in slides.FOLDER.glob("[0-9][0-9]_*.md"))


@pytest.mark.parametrize("name", NAMES)
def test_a_deck_is_a_lecture(name):
    found = read_deck(decks([name])[0])
    assert 25 <= len(found) <= 40
    assert all(slide.title for slide in found)
    assert len({slide.title for slide in found}) == len(found)
    noted = [slide for slide in found if len(slide.notes.split()) >= 8]
    assert len(noted) >= 2 / 3 * len(found)


@pytest.mark.parametrize("name", NAMES)
def test_a_slide_has_few_words_and_shows_parts_of_its_chapter(name):
    found = read_deck(decks([name])[0])
    for slide in found:
        words = re.sub(r"\{[a-z:]+\}`[^`]+`|[|-]+", " ", slide.body).split()
        assert len(words) <= 75, slide.title
    shown = [part for slide in found for part in references(slide)]
    showing = [slide for slide in found if any(references(slide)) or "{result}" in slide.body]
    assert len(showing) >= len(found) / 2
    assert len(set(shown)) == len(shown), "the same part on two slides"
    assert {kind for kind, _ in shown} >= {"figure", "formula"}


@pytest.mark.parametrize("name", NAMES)
def test_every_reference_resolves_and_every_picture_has_its_alt_text(name, tmp_path):
    text = deck(name).write(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("section")) == len(deck(name).slides)
    figures = [n for s in deck(name).slides for kind, n in references(s) if kind == "figure"]
    images = page.all("img")
    assert [image["src"] for image in images] == [f"{n}.png" for n in figures]
    for image in images:
        assert len(image["alt"]) >= 20
        assert (tmp_path / "slides" / name / image["src"]).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "{glue" not in text and "{result" not in text and "://" not in text


def test_a_slide_shows_what_the_chapter_holds():
    source = deck("01").source
    assert r"m\bigl(x + u(x)\bigr)" in source.formula("eq-01-warp")
    assert source.code("def turn_by").splitlines()[-1].strip().startswith("return")
    assert source.printed("['0.0', '9.0'") == "['0.0', '9.0', '0.0', '0.0', '0.0']"
    picture, alt, number, caption = source.figure("fig-01-idea")
    assert number == "Figure 1.2" and alt.startswith("The upper left quarter")
    assert picture[:4] == b"\x89PNG" and caption.startswith("A voxel $x$")


def test_code_ends_at_an_empty_line_and_a_function_at_its_end():
    source = deck("01").source
    assert source.code("shift = torch.zeros").count("\n") == 1
    body = source.code("def fixed_point")
    assert body.startswith("def fixed_point") and body.endswith("return w")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{figure}`fig-01-none`", "the figure 'fig-01-none', which chapter 01_images_grids_warps"),
        ("{formula}`eq-01-none`", "the formula 'eq-01-none', which chapter 01_images_grids_warps"),
        ("{code}`def nobody`", "the code 'def nobody', which chapter 01_images_grids_warps"),
        ("{printed}`no such words`", "the printed text 'no such words', which chapter 01"),
        ("{code}`fig, axes = plot`", "the code 'fig, axes = plot', which stands "),
        ("{printed}`0.0`", "the text '0.0', which "),
        ("{glue:text}`ch01-none`", "'ch01-none'"),
        ("{numref}`fig-01-none`", "'fig-01-none'"),
        ("{dance}`x`", "{dance}"),
    ],
)
def test_a_wrong_reference_names_deck_slide_and_what_is_missing(tmp_path, body, said):
    message = broken(tmp_path, body)
    assert message.startswith("book/slides/01.md, slide 'A title', refers to ")
    assert said in message


def test_a_deck_begins_with_a_title_and_has_a_name(tmp_path):
    assert "expected a title" in broken_start(tmp_path)
    with pytest.raises(ValueError, match="no deck is called '77'; there are: 00, 01"):
        decks(["77"])


def broken_start(tmp_path) -> str:
    path = tmp_path / "01.md"
    path.write_text("Words.\n\n# A title\n", encoding="utf-8")
    with pytest.raises(ValueError) as raised:
        read_deck(path)
    return str(raised.value)


def test_notes_are_apart_from_what_all_see(tmp_path):
    path = tmp_path / "01.md"
    path.write_text("# One\n\nseen\n\nNotes:\nsaid\n\n## Two\n\nNotes: alone\n", encoding="utf-8")
    assert read_deck(path) == [Slide("One", "seen", "said"), Slide("Two", "", "alone")]


def test_a_page_links_its_chapter_only_where_that_was_built(tmp_path):
    bare = deck("01").write(tmp_path).read_text(encoding="utf-8")
    chapter = tmp_path / "notebooks" / "01_images_grids_warps.html"
    chapter.parent.mkdir()
    chapter.touch()
    linked = deck("01").write(tmp_path).read_text(encoding="utf-8")
    assert 'href="../../notebooks/01_images_grids_warps.html"' in linked
    assert "notebooks/" not in bare


def test_the_scripts_beside_a_deck_are_the_vendored_ones(tmp_path):
    slides.copy_scripts(tmp_path)
    page = Page(deck("01").write(tmp_path).read_text(encoding="utf-8"))
    asked = [tag["src"] for tag in page.all("script")]
    asked += [tag["href"] for tag in page.all("link") if tag["rel"] == "stylesheet"]
    assert len(asked) == 7
    sums = (slides.STATIC / "SHA256SUMS").read_text(encoding="utf-8")
    for name in asked:
        path = tmp_path / "slides" / "01" / name
        assert path.is_file(), name
        if path.parent.name != "_static":
            assert hashlib.sha256(path.read_bytes()).hexdigest() in sums, name
    notice = (slides.ROOT / "NOTICE").read_text(encoding="utf-8")
    reveal = (slides.STATIC / "reveal" / "reveal.js").read_text(encoding="utf-8")
    assert re.search(r"reveal\.js (\S+)", notice)[1] == re.search(r"=`(\d+\.\d+\.\d+)`", reveal)[1]
