"""Plain Markdown of a chapter, for viewers that know no MyST: Jupyter, Colab, GitHub, VS Code.

A chapter is written in MyST: roles such as {eq}`eq-08-energy`, directives such as :::{admonition}.
markdown-it, which also makes the book's pages, finds the blocks of the text; what stands in them is
replaced by what the page of the book shows, with numbers of the run and of results/.

    book = labels(texts)                   # what has a number, in all chapters
    cells = Chapter(name, ...).cells(notebook)
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from docutils.parsers.rst.directives.misc import TestDirective
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from measured import Words, lookup, numeric, table
from myst_nb.core.variables import format_plain_text
from myst_nb.ext.glue import extract_glue_data_cell
from myst_parser.config.main import MdParserConfig
from myst_parser.mdit_to_docutils.base import default_slugify
from myst_parser.parsers.directives import parse_directive_text
from myst_parser.parsers.mdit import create_md_parser
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell
from pybtex.database import BibliographyData, Entry, parse_file
from pybtex.plugin import find_plugin
from pybtex.richtext import Text

ROOT = Path(__file__).resolve().parents[2]
WIDGET = "application/vnd.jupyter.widget-view+json"
SLIDER = "A slider: run this cell to move it."
STUB, SOLUTION = "stub", "solution"  # tags of cells: for an answer; with what a solution computes
CHECKS = "Numbers and checks of this section (for the book; you may skip it)"

# What may stand inside a line. Code and formulas come first, so that nothing in them is replaced.
INLINE = re.compile(
    r"""(?P<escaped>\\.)
    | \{(?P<role>[a-z:]+)\}`(?P<text>[^`]+)`
    | (?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)
    | (?P<formula>\$\$.+?\$\$|\$[^$]+\$)
    | (?<=\])\((?P<link>[^()\s]+)\)""",
    re.VERBOSE | re.DOTALL,
)


# ------------------------------------------------------------------------------------- blocks


@cache
def _parser() -> MarkdownIt:
    """The parser of the book's pages."""
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    extensions = set(settings["parse"]["myst_enable_extensions"])
    return create_md_parser(MdParserConfig(enable_extensions=extensions), RendererHTML)


@dataclass(frozen=True)
class Block:
    """A block of Markdown that stands in no other.

    Attributes:
        kind: of markdown-it's token, such as "paragraph_open"; of a directive, its name.
        source: its lines.
        content: of a formula, or of a directive.
        label: of a formula or an exercise.
        title: what stands behind the name of a directive.
        options: of a directive.
    """

    kind: str
    source: str
    content: str = ""
    label: str = ""
    title: str = ""
    options: Mapping[str, str] | None = None


@cache
def blocks(text: str) -> list[Block]:
    """The blocks of a text, in order.

    Raises:
        ValueError: for a directive or a labelled formula inside a list or a quotation, and for what
            markdown-it gives no place of its own, such as the target of a link.
    """
    lines, found, covered = text.splitlines(), [], 0
    for token in _parser().parse(text):
        special = token.type in ("math_block_label", "colon_fence") or _directive(token)
        if token.level > 0 and special:
            raise ValueError(f"{token.info or token.type} stands inside a block: {token.content}")
        if token.level == 0 and token.map and token.nesting >= 0:
            start, end = token.map
            if "".join(lines[covered:start]).strip():
                raise ValueError(f"Nothing is known about the lines {lines[covered:start]}.")
            found.append(_block(token, "\n".join(lines[start:end]).rstrip()))
            covered = end
    return found


def _directive(token: Token) -> re.Match | None:
    if token.type not in ("fence", "colon_fence"):
        return None
    return re.match(r"\{([\w-]+)\}\s*(.*)", token.info)


def _block(token: Token, source: str) -> Block:
    if token.type == "math_block_label":
        return Block(token.type, source, token.content.strip(), label=token.info)
    if directive := _directive(token):
        # a class that takes any option: which ones a directive has is checked by the book
        parsed = parse_directive_text(TestDirective, directive[2], token.content)
        options = parsed.options
        body, title = "\n".join(parsed.body), " ".join(parsed.arguments)
        return Block(directive[1], source, body, options.get("label", ""), title, options)
    return Block(token.type, source)


# ------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Label:
    """What a reference to a figure, an equation or an exercise says, and where it stands."""

    chapter: str
    text: str


def labels(texts: Mapping[str, NotebookNode]) -> dict[str, Label]:
    """What has a label, counted as on the pages of the book: Figure 8.1, (8.1), Exercise 8.1.

    Args:
        texts: the chapters by their names, such as "08_deep_unfolding".
    """
    found = {}
    for chapter, notebook in texts.items():
        counts: Counter[str] = Counter()
        for kind, label in _labelled(notebook):
            counts[kind] += 1
            if label:
                found[label] = Label(chapter, kind.format(f"{int(chapter[:2])}.{counts[kind]}"))
    return found


def _labelled(notebook: NotebookNode) -> Iterator[tuple[str, str]]:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            figure = cell.metadata.get("mystnb", {}).get("figure", {})
            if "caption" in figure:
                yield "Figure {}", figure.get("name", "")
        else:
            yield from _labelled_blocks(cell.source)


def _labelled_blocks(text: str) -> Iterator[tuple[str, str]]:
    for block in blocks(text):
        if block.kind == "math_block_label":
            yield "({})", block.label
        elif block.options is not None and block.kind != "result-table":
            if block.kind == "exercise":
                yield "Exercise {}", block.label
            yield from _labelled_blocks(block.content)


# --------------------------------------------------------------------------------- references


@cache
def _bibliography() -> BibliographyData:
    return parse_file(ROOT / "book" / "references.bib")


def _authors(entry: Entry) -> str:
    people = entry.persons["author"]
    names = [str(Text(" ").join(p.rich_prelast_names + p.rich_last_names)) for p in people]
    if len(names) > 2 or "others" in names:
        return f"{names[0]} *et al.*"
    return " and ".join(names)


def references(keys: set[str]) -> str:
    """A list of the entries of references.bib that `keys` name, as on the page of the book."""
    entries = [_bibliography().entries[key] for key in sorted(keys)]
    formatted = find_plugin("pybtex.style.formatting", "plain")().format_entries(entries)
    # pybtex escapes all punctuation; these marks mean nothing inside a line
    lines = [re.sub(r"\\([-.()])", r"\1", entry.text.render_as("markdown")) for entry in formatted]
    return "\n".join(f"- {' '.join(line.split())}" for line in lines)


# ------------------------------------------------------------------------------------ chapter


def escaped(text: str) -> str:
    """Text in which nothing is Markdown."""
    return re.sub(r"([\\`*_\[\]<>|$])", r"\\\1", text)


def _describe(output: NotebookNode, alt: str | None) -> None:
    """Say in words what an output shows, for viewers that do not show it."""
    data = output.get("data", {})
    for kind in data:
        if kind.startswith("image/") and alt:
            output.metadata[kind] = {"alt": alt}
    if WIDGET in data:  # Jupyter draws no widget of a notebook that it does not trust yet
        data["text/plain"] = SLIDER


def folded(title: str, markdown: str) -> str:
    """What opens with a click, in every viewer."""
    return f"<details>\n<summary>{title}</summary>\n\n{markdown}\n\n</details>"


def quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def quiz_of(chapter: str) -> str:
    """The questions of a chapter's quiz with folded answers, and how to have them counted."""
    from regkit.book.quiz import invitation, quiz  # with torch: only where it is needed

    return f"{invitation(chapter)}\n\n{quiz(chapter).markdown()}"


def glued(notebook: NotebookNode) -> dict[str, str]:
    """The values that the code has handed to the prose, by name, as Python writes them."""
    found = {}
    for cell in deepcopy(notebook).cells:
        for name, output in extract_glue_data_cell(cell) if cell.cell_type == "code" else ():
            found[name] = output["data"]["text/plain"]
    return found


class Chapter:
    """The text of one chapter with all its roles and directives resolved.

    Args:
        name: of the chapter, such as "08_deep_unfolding".
        texts: all chapters, by name.
        values: what the code of this chapter has handed to its prose.
        pages: address of the folder of the repository's files, "" for links between files.
        chapters: address of the folder of the notebooks, "" for links between files.
        solutions: False leaves out worked solutions, and cells tagged `solution`.
    """

    def __init__(
        self,
        name: str,
        texts: Mapping[str, NotebookNode],
        values: Mapping[str, str],
        pages: str = "",
        chapters: str = "",
        solutions: bool = True,
    ) -> None:
        self.name, self.texts, self.values = name, texts, values
        self.pages, self.chapters, self.solutions = pages, chapters, solutions
        self.labels = labels(texts)
        self.cited: set[str] = set()

    def cells(self, notebook: NotebookNode) -> list[NotebookNode]:
        """The cells of the reader's notebook; those of code are copies, in order.

        A cell of text begins at each heading, so that Jupyter and Colab can fold the sections.
        """
        found = []
        for cell in notebook.cells:
            if cell.cell_type == "code":
                kept = self.solutions or SOLUTION not in cell.metadata.get("tags", [])
                found += self.code(cell) if kept else []
            else:
                found += map(new_markdown_cell, self.sections(cell.source))
        if self.cited:
            text = f"### Where to find them\n\n{references(self.cited)}"
            found.append(new_markdown_cell(text))
        for number, cell in enumerate(found):
            cell.id = f"cell-{number}"
        return found

    # --- code

    def code(self, cell: NotebookNode) -> list[NotebookNode]:
        """A code cell, folded where the book hides it, and the caption of its figure."""
        tags = cell.metadata.get("tags", [])
        settings = cell.metadata.get("mystnb", {})
        figure = settings.get("figure", {})
        number = self.known(self.labels, figure["name"]).text if "caption" in figure else ""
        code = new_code_cell(
            cell.source,
            outputs=deepcopy(cell.outputs),
            execution_count=cell.execution_count,
            metadata={"tags": tags} if tags else {},
        )
        if {"hide-input", "remove-cell", "setup"} & set(tags):
            code.metadata.update(cellView="form", jupyter={"source_hidden": True})
            title = CHECKS if "remove-cell" in tags else f"Code of {number.lower() or 'this cell'}"
            if "setup" not in tags:  # it has a title of its own
                code.source = f"# @title {title}\n{cell.source}"
        for output in code.outputs:
            _describe(output, settings.get("image", {}).get("alt"))
        if not number:
            return [code]
        caption = f"**{number}.** {self.inline(figure['caption'])}"
        return [code, new_markdown_cell(caption, metadata={"tags": ["caption"]})]

    # --- text

    def sections(self, text: str) -> list[str]:
        """The Markdown of a text, cut at its headings."""
        found: list[str] = []
        for block in self.blocks(text):
            markdown = self.block(block)
            if found and not markdown.startswith("#"):
                found[-1] += f"\n\n{markdown}"
            else:
                found.append(markdown)
        return found

    def markdown(self, text: str) -> str:
        return "\n\n".join(self.block(block) for block in self.blocks(text))

    def blocks(self, text: str) -> list[Block]:
        return [b for b in blocks(text) if self.solutions or b.kind != "solution"]

    def block(self, block: Block) -> str:
        """The Markdown of one block.

        Raises:
            ValueError: for a block of which nothing is known.
        """
        if block.kind == "math_block_label":
            number = self.labels[block.label].text.strip("()")
            return f"$$\n{block.content} \\tag{{{number}}}\n$$"
        if block.kind in ("math_block", "fence"):
            return block.source
        if block.kind == "result-table":
            return self.result_table(block)
        if block.kind in ("admonition", "note"):
            if "$$" in block.content:  # Jupyter would take the marks of the quotation into it
                raise ValueError(f"A formula has a line of its own in an admonition: {block.title}")
            title = self.inline(block.title) or block.kind.capitalize()
            return quoted(f"**{title}**\n\n{self.markdown(block.content)}")
        if block.kind == "exercise":
            title = f"{self.labels[block.label].text}. {self.inline(block.title)}"
            return f"### {title}\n\n{self.markdown(block.content)}"
        if block.kind == "solution":
            title = f"Solution to {self.labels[block.title].text.lower()}"
            return folded(title, self.markdown(block.content))
        if block.kind == "quiz":
            return quiz_of(block.title)
        if block.kind == "predict":
            return self.predict(block)
        if block.kind == "hint":
            return folded("Hint", self.markdown(block.content))
        if block.options is not None or block.kind.startswith("myst"):
            raise ValueError(f"No plain Markdown is known for {block.kind}: {block.source[:80]!r}.")
        return self.inline(block.source)

    def predict(self, block: Block) -> str:
        """A question in bold, what one may guess, and the folded answer."""
        parts = [f"**{self.inline(block.title)}**"]
        if guesses := (block.options or {}).get("guess"):
            parts.append("\n".join(f"- {self.inline(g.strip())}" for g in guesses.split("|")))
        if block.content:
            parts.append(folded("Look", self.markdown(block.content)))
        return "\n\n".join(parts)

    def result_table(self, block: Block) -> str:
        name, keys = block.title.split()
        rows = lookup(ROOT / "results", name, keys)
        lines = table(rows, block.content.splitlines(), block.options.get("where", ""))
        if len(lines) == 1:
            return block.options["empty"]
        rule = ["--:" if right else "---" for right in numeric(lines)]
        head, *body = ([cell.replace("|", r"\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))

    # --- inside a line

    def inline(self, text: str) -> str:
        """A text with its roles and links resolved, and each formula on one line."""

        def replace(match: re.Match) -> str:
            if match["role"]:
                return self.role(match["role"], " ".join(match["text"].split()))
            if match["link"]:
                return f"({self.link(match['link'])})"
            return " ".join(match[0].split()) if match["formula"] else match[0]

        return INLINE.sub(replace, text)

    def role(self, role: str, text: str) -> str:
        """What a role says.

        Raises:
            ValueError: for a role of which nothing is known, and for what it asks and nobody has.
        """
        title, target = re.fullmatch(r"(?:(.+?)\s*<(.+)>|.+)", text).groups()
        target = target or text
        if role == "glue:text":
            name, _, spec = text.partition(":")
            return escaped(format_plain_text(self.known(self.values, name), spec or "s"))
        if role == "result":
            name, keys, *spec = text.split()
            value = lookup(ROOT / "results", name, keys)
            return escaped(Words().format_field(value, *spec or [""]))
        if role == "term":
            return f"[{title or text}]({self.link('../book/glossary.md')})"
        if role == "doc":
            return f"[{title or text}]({self.link(f'{target}.md')})"
        if role in ("cite", "cite:t"):
            return self.citation(text, in_text=role == "cite:t")
        if role in ("eq", "numref", "ref"):
            label = self.known(self.labels, target)
            if label.chapter == self.name:
                return title or label.text
            return f"[{title or label.text}]({self.link(f'{label.chapter}.md')})"
        raise ValueError(f"No plain Markdown is known for {{{role}}}`{text}`.")

    def known(self, names: Mapping, name: str):
        if name not in names:
            raise ValueError(f"{self.name} refers to {name!r}, which does not exist.")
        return names[name]

    def citation(self, text: str, in_text: bool) -> str:
        found = []
        for key in text.split(","):
            entry = self.known(_bibliography().entries, key.strip())
            self.cited.add(key.strip())
            year = entry.fields["year"]
            found.append(_authors(entry) + (f" ({year})" if in_text else f", {year}"))
        return ", ".join(found) if in_text else f"({'; '.join(found)})"

    def link(self, target: str) -> str:
        """The address behind a link of the text, which is relative to the folder of the chapters.

        Raises:
            ValueError: for a file or a heading that does not exist.
        """
        if "://" in target:
            return target
        path, _, anchor = target.partition("#")
        name = path.removesuffix(".md")
        if name in self.texts:
            folder = f"{self.chapters}/" if self.chapters else ""
            heading = f"#{self.heading(name, anchor)}" if anchor else ""
            return f"{folder}{name}.ipynb{heading}"
        if not (ROOT / "notebooks" / path).is_file():
            raise ValueError(f"{self.name} links to {target}, which does not exist.")
        return f"{self.pages}/{target.removeprefix('../')}" if self.pages else target

    def heading(self, chapter: str, anchor: str) -> str:
        """The anchor that Jupyter and GitHub give to a heading to which MyST gives `anchor`."""
        for cell in self.texts[chapter].cells:
            for block in blocks(cell.source) if cell.cell_type == "markdown" else ():
                title = block.source.lstrip("# ").replace("`", "")
                if block.kind == "heading_open" and default_slugify(title) == anchor:
                    return title.replace(" ", "-")
        raise ValueError(f"{self.name} links to {chapter}#{anchor}, which does not exist.")
