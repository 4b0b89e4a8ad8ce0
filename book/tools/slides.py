"""Make the slides of a chapter: a reveal.js deck of a few words, with the chapter's own figures.

    python book/tools/slides.py FOLDER [NN ...]

writes FOLDER/slides/NN/index.html of book/slides/NN.md, for all decks or the named ones, and puts
the vendored scripts below FOLDER/_static. `make slides` and `make book` name the folder of the
built book, _build/html.

A deck is Markdown. `## Title` begins a slide (`# Title` the first one), a line `Notes:` begins what
only the lecturer sees. Nothing of a chapter is copied into it. A paragraph refers to it instead:

    {figure}`fig-01-pair`            the picture of the cell whose figure has this name
    {formula}`eq-01-warp`            the formula with this label
    {code}`def turn_by`              the lines from the one that begins so up to an empty line; all
                                     of a function or a class
    {printed}`mean Dice`             what the one cell has printed whose output holds this text

and inside a line the roles of a chapter: {numref}, {eq}, {cite}, {glue:text} and {result}. So a
number on a slide is the number of the run. A reference to what the chapter lacks is an error.
"""

import re
import shutil
import sys
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import plain
from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from notebooks import FOLDER, ROOT, code_cells, is_setup, joined, read_text, select

DECKS = ROOT / "book" / "slides"
STATIC = ROOT / "book" / "_static"
VENDORED = ("reveal", "mathjax")
OWN = ("slides.css", "slides.js")
STYLE = "a11y-high-contrast-light"  # comes with the theme of the book
REFERENCE = re.compile(r"\{(figure|formula|code|printed)\}`([^`]+)`")
HEADING = re.compile(r"^#{1,2} +(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Slide:
    """A slide as it is written: its title, what all see, and what the lecturer sees."""

    title: str
    body: str
    notes: str


def read_deck(path: Path) -> list[Slide]:
    """The slides of a deck, in order.

    Raises:
        ValueError: for text before the first title.
    """
    before, *parts = HEADING.split(path.read_text(encoding="utf-8"))
    if before.strip():
        raise ValueError(f"{path.name} begins with {before.strip()[:40]!r}, expected a title (#).")
    found = []
    for title, text in zip(parts[::2], parts[1::2]):
        body, _, notes = re.sub(r"^Notes:", "\0", text, flags=re.MULTILINE).partition("\0")
        found.append(Slide(title.strip(), body.strip(), notes.strip()))
    return found


def references(slide: Slide) -> Iterator[tuple[str, str]]:
    """The parts of the chapter that a slide shows: kind and name."""
    for block in re.split(r"\n\s*\n", slide.body):
        if match := REFERENCE.fullmatch(block.strip()):
            yield match[1], match[2]


# -------------------------------------------------------------------- what a chapter can show


class Source:
    """A chapter with its outputs, and how to find its parts by their names.

    Args:
        md: of the chapter.

    Raises:
        ValueError: if the outputs come from other code.
    """

    def __init__(self, md: Path) -> None:
        self.name, self.notebook = md.stem, joined(md)
        texts = {path.stem: read_text(path) for path in sorted(FOLDER.glob("*.md"))}
        self.chapter = plain.Chapter(md.stem, texts, plain.glued(self.notebook))
        self.cells = [cell for cell in code_cells(self.notebook) if not is_setup(cell)]

    def missing(self, what: str, name: str) -> ValueError:
        return ValueError(f"the {what} {name!r}, which chapter {self.name} does not have")

    def figure(self, name: str) -> tuple[bytes, str, str, str]:
        """The picture (PNG), its alt text, its number and its caption."""
        for cell in self.cells:
            settings = cell.metadata.get("mystnb", {})
            if settings.get("figure", {}).get("name") == name:
                pictures = [
                    o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})
                ]
                if pictures:
                    number = self.chapter.labels[name].text
                    caption = " ".join(settings["figure"]["caption"].split())
                    alt = " ".join(settings["image"]["alt"].split())
                    return b64decode(pictures[-1]), alt, number, caption
        raise self.missing("figure", name)

    def formula(self, label: str) -> str:
        """The TeX of a formula."""
        for cell in self.notebook.cells:
            for block in plain.blocks(cell.source) if cell.cell_type == "markdown" else ():
                if block.kind == "math_block_label" and block.label == label:
                    return block.content
        raise self.missing("formula", label)

    def code(self, start: str) -> str:
        """The lines that begin with `start`, up to an empty line; all of a function or a class."""
        found = []
        for cell in self.cells:
            lines = cell.source.splitlines()
            found += [lines[k:] for k, line in enumerate(lines) if line.strip().startswith(start)]
        if not found:
            raise self.missing("code", start)
        if len(found) > 1:
            raise ValueError(f"the code {start!r}, which stands {len(found)} times in {self.name}")
        first, *rest = found[0]
        depth, kept = len(first) - len(first.lstrip()), [first]
        whole = re.match(r"\s*(def|class) ", first)
        for line in rest:
            inside = not line.strip() or line.startswith(" " * (depth + 1))
            if not inside if whole else not line.strip():
                break
            kept.append(line)
        return "\n".join(line[depth:] for line in kept).rstrip()

    def printed(self, text: str) -> str:
        """What the one cell has printed whose output holds `text`."""
        outputs = [o.text for c in self.cells for o in c.outputs if o.output_type == "stream"]
        found = [output for output in outputs if text in output]
        if not found:
            raise self.missing("printed text", text)
        if len(found) > 1:
            raise ValueError(f"the text {text!r}, which {len(found)} cells of {self.name} print")
        return found[0].rstrip()


# ---------------------------------------------------------------------------------- the pages


def _markdown() -> MarkdownIt:
    def formula(content: str, options: dict) -> str:
        left, right = (r"\[", r"\]") if options["display_mode"] else (r"\(", r"\)")
        return f'<span class="math">{left}{escape(content)}{right}</span>'

    parser = MarkdownIt("commonmark").enable("table")
    return parser.use(dollarmath_plugin, renderer=formula, double_inline=True)


class Deck:
    """The page of one deck.

    Args:
        path: of the deck, book/slides/NN.md.

    Raises:
        ValueError: if the chapter's outputs come from other code, or a slide refers to something
            that the chapter does not have.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.slides = path, read_deck(path)
        self.source = Source(select([path.stem])[0])
        self.markdown = _markdown()
        self.pictures: dict[str, bytes] = {}
        self.pages = [self.page(slide) for slide in self.slides]

    def page(self, slide: Slide) -> dict[str, str]:
        """The HTML of a slide: title, body and notes."""
        try:
            notes, body = [self.text(slide.notes)], []
            for block in re.split(r"\n\s*\n", slide.body):
                match = REFERENCE.fullmatch(block.strip())
                body.append(self.shown(*match.groups(), notes) if match else self.text(block))
            title = self.markdown.renderInline(self.source.chapter.inline(slide.title))
        except ValueError as error:
            raise ValueError(
                f"book/slides/{self.path.name}, slide {slide.title!r}, refers to {error}."
            ) from error
        return {"title": title, "body": "\n".join(body), "notes": "\n".join(notes)}

    def text(self, text: str) -> str:
        return self.markdown.render(self.source.chapter.inline(text))

    def shown(self, kind: str, name: str, notes: list[str]) -> str:
        """The HTML of a part of the chapter; the caption of a figure goes to the notes."""
        if kind == "figure":
            picture, alt, number, caption = self.source.figure(name)
            self.pictures[f"{name}.png"] = picture
            notes.append(self.text(f"*{number}.* {caption}"))
            image = f'<img src="{name}.png" alt="{escape(alt)}">'
            return f"<figure>{image}<figcaption>{number}</figcaption></figure>"
        if kind == "formula":
            tex = escape(self.source.formula(name))
            return f'<div class="formula"><span class="math">\\[{tex}\\]</span></div>'
        if kind == "code":
            formatter = HtmlFormatter(style=STYLE, noclasses=True, nobackground=True)
            return highlight(self.source.code(name), PythonLexer(), formatter)
        return f'<pre class="printed">{escape(self.source.printed(name))}</pre>'

    def write(self, folder: Path) -> Path:
        """Write the page and its pictures; where the book is built, the page links its chapter."""
        target = folder / "slides" / self.path.stem
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name, picture in self.pictures.items():
            (target / name).write_bytes(picture)
        chapter = f"notebooks/{self.source.name}.html"
        environment = Environment(autoescape=True, undefined=StrictUndefined)
        template = environment.from_string((DECKS / "deck.html").read_text(encoding="utf-8"))
        page = template.render(
            title=self.slides[0].title,
            number=self.path.stem,
            slides=self.pages,
            chapter=chapter if (folder / chapter).is_file() else "",
        )
        (target / "index.html").write_text(page, encoding="utf-8")
        return target / "index.html"


def decks(names: list[str] | None = None) -> list[Path]:
    """The sources of the decks, all or those of some chapters.

    Raises:
        ValueError: for a chapter that has no deck.
    """
    every = {path.stem: path for path in sorted(DECKS.glob("[0-9][0-9].md"))}
    if unknown := set(names or ()) - every.keys():
        raise ValueError(f"no deck is called {sorted(unknown)[0]!r}; there are: {', '.join(every)}")
    return [every[name] for name in names or every]


def copy_scripts(folder: Path) -> None:
    """Put what the decks load below FOLDER/_static, where the book has it too."""
    for name in VENDORED:
        shutil.copytree(STATIC / name, folder / "_static" / name, dirs_exist_ok=True)
    for name in OWN:
        shutil.copy(STATIC / name, folder / "_static" / name)


def main(arguments: list[str]) -> None:
    if not arguments:
        raise SystemExit("usage: python book/tools/slides.py FOLDER [NN ...]")
    folder, *names = arguments
    try:
        made = [Deck(path) for path in decks(names)]
    except ValueError as error:
        raise SystemExit(f"The slides were not made: {error}") from None
    copy_scripts(Path(folder))
    for deck in made:
        print(f"{deck.write(Path(folder))}: {len(deck.slides)} slides")


if __name__ == "__main__":
    main(sys.argv[1:])
