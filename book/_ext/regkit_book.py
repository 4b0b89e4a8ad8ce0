"""The book's own Sphinx extension.

It does three things:

* it keeps the built pages free of requests to other hosts, so that the book opens from a disk with
  the network off;
* it asks `book/tools/address.py` where the project is public, and shows the repository and Colab
  buttons only where that is known;
* it writes numbers of results/*.json into a page, so that nobody types them: the role `result` one
  number, the directive `result-table` a table of rows.

      {result}`accuracy turn.voxels power`      # file, keys, format

      :::{result-table} accuracy precision      # file, keys of a list of rows
      :where: largest>1e-6                      # only some rows; also =, !=, <
      :empty: None.                             # what to say where no row is left
      what is done = {operation}
      largest difference = {largest:power}
      :::

A format is Python's, or `power` (3.2·10⁻⁵), `percent` (7.6 %), `time` (180 ms), `bytes` (12.3 MB),
`points` (+1.2, of an interval −0.7 to +0.5); any other list is written 80×96×80. What is not known
(null) is shown as a dash.

A directive, and no cell with pandas: prose pages run no code, and a page shows beside each column's
name what it holds.
"""

import json
import os
import re
import string
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective, SphinxRole

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from address import Address, found  # noqa: E402

# matplotlib's to_jshtml() writes this link into the stored output; the theme ships the same icons.
FONT_AWESOME_CDN = re.compile(r"<link[^>]+maxcdn\.bootstrapcdn\.com[^>]*>\s*")


def without_remote_styles(html: str) -> str:
    """The page body without links to style sheets on other hosts."""
    return FONT_AWESOME_CDN.sub("", html)


def theme_options(address: Address | None, notebooks: str = "") -> dict:
    """Theme options that show the repository; without an address they hide it.

    Args:
        address: where the project is public.
        notebooks: the branch with the notebooks that Colab opens, by default that of the address.
    """
    if address is None:
        return {"repository_url": "", "use_repository_button": False, "launch_buttons": {}}
    colab = {"colab_url": "https://colab.research.google.com"} if address.on_github else {}
    return {
        "repository_url": address.repository,
        "repository_branch": notebooks or address.ref,  # only the launch buttons ask for it
        "path_to_docs": "",
        "use_repository_button": True,
        "use_issues_button": True,
        "launch_buttons": colab,
    }


class Words(string.Formatter):
    """Python's formatting with the formats of this file; None is a dash."""

    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

    def format_field(self, value: Any, spec: str) -> str:
        if value is None:
            return "–"
        if spec == "percent":
            return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
        if spec == "power":
            if abs(value) >= 1e-3 or value == 0:
                return f"{value:.2g}"
            mantissa, exponent = f"{value:.1e}".split("e")
            return f"{mantissa}·10{str(int(exponent)).translate(self.superscript)}"
        if spec == "time":
            return _three_digits(value, {"s": 1, "ms": 1e-3, "µs": 1e-6})
        if spec == "points":  # hundredths, and the two ends of an interval of them
            ends = value if isinstance(value, list) else [value]
            return " to ".join(f"{100 * end:+.1f}".replace("-", "\N{MINUS SIGN}") for end in ends)
        if spec == "bytes":
            return _three_digits(value, {"GB": 1e9, "MB": 1e6, "kB": 1e3})
        if isinstance(value, list):
            return "×".join(map(str, value))
        return super().format_field(value, spec)


def _three_digits(value: float, units: dict[str, float]) -> str:
    """A number in the first unit that it fills, with three digits where it has them."""
    name = next((name for name, size in units.items() if value >= size), list(units)[-1])
    amount = value / units[name]
    return (
        f"{amount:.{2 if amount < 9.995 else 1 if amount < 99.95 else 0}f}\N{NO-BREAK SPACE}{name}"
    )


def lookup(results: Path, name: str, keys: str) -> Any:
    """What results/<name>.json holds at `keys`, such as "brain.inverse" or "scaling.0.shape"."""
    path = results / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"result is {name!r}, expected the name of a file in results.")
    value = json.loads(path.read_text(encoding="utf-8"))
    for key in keys.split("."):
        try:
            value = value[int(key) if isinstance(value, list) else key]
        except (KeyError, IndexError, TypeError, ValueError):
            message = f"keys is {keys!r}, of which results/{name}.json has no {key!r}."
            raise ValueError(message) from None
    return value


def _holds(row: dict[str, Any], condition: str) -> bool:
    """Whether a row meets a condition: key=value, key!=value, key<number or key>number."""
    key, sign, value = re.fullmatch(r"(\w+)(!?=|<|>)(\S*)", condition).groups()
    if sign in "<>":
        known = row[key] is not None
        return known and (row[key] < float(value) if sign == "<" else row[key] > float(value))
    return (str(row[key]) == value) == (sign == "=")


def table(rows: list[dict[str, Any]], templates: list[str], where: str = "") -> list[list[str]]:
    """The head and the body of a table of `rows`.

    Args:
        rows: of a results file.
        templates: a column each, "head = text with {key:format} of the row".
        where: only rows that meet these conditions, separated by spaces.
    """
    known = {key for row in rows for key in row}
    rows = [dict.fromkeys(known) | row for row in rows]  # what only other rows have is a dash
    rows = [row for row in rows if all(_holds(row, condition) for condition in where.split())]
    columns = [[part.strip() for part in template.split(" = ", 1)] for template in templates]
    words = Words()
    return [
        [head for head, _ in columns],
        *[[words.format(text, **row) for _, text in columns] for row in rows],
    ]


class Result(SphinxRole):
    """{result}`file keys format`: a number of results/, in running text."""

    def run(self):
        name, keys, *spec = self.text.split()
        results = Path(self.env.srcdir) / "results"
        self.env.note_dependency(str(results / f"{name}.json"))
        try:
            value = lookup(results, name, keys)
        except ValueError as error:
            return [], [self.inliner.reporter.error(str(error), line=self.lineno)]
        return [nodes.Text(Words().format_field(value, *spec or [""]))], []


class ResultTable(SphinxDirective):
    """A table of results/: the arguments name file and keys, each line of the body is a column."""

    required_arguments = 2
    has_content = True
    option_spec = {"where": directives.unchanged, "empty": directives.unchanged}

    def run(self):
        results = Path(self.env.srcdir) / "results"
        self.env.note_dependency(str(results / f"{self.arguments[0]}.json"))
        try:
            rows = lookup(results, *self.arguments)
            lines = table(rows, list(self.content), self.options.get("where", ""))
        except (AttributeError, KeyError, ValueError) as error:
            raise self.error(f"{error}") from error
        if len(lines) == 1:
            if "empty" not in self.options:
                raise self.error("No row is left, expected some or the option :empty:.")
            return [nodes.paragraph(text=self.options["empty"])]
        group = nodes.tgroup(cols=len(lines[0]))
        group += [nodes.colspec(colwidth=1) for _ in lines[0]]
        numeric = [all(re.match(r"[\d–]", cell) for cell in column) for column in zip(*lines[1:])]
        head, body = nodes.thead(), nodes.tbody()
        group += [head, body]
        for i, line in enumerate(lines):
            row = nodes.row()
            for cell, right in zip(line, numeric):
                text, messages = self.state.inline_text(cell, self.lineno)
                entry = nodes.entry("", nodes.paragraph("", "", *text), *messages)
                if right:
                    entry["classes"].append("text-right")
                row += entry
            (body if i else head).append(row)
        return [nodes.table("", group, classes=["colwidths-auto"])]


def _configure(app, config):
    address = found(Path(app.srcdir))
    # the workflow that publishes the book also writes this branch
    notebooks = os.environ.get("REGKIT_NOTEBOOKS_BRANCH", "")
    config.html_theme_options.update(theme_options(address, notebooks))
    if address and address.on_github:
        app.tags.add("public")  # {only} public: text that needs Colab
    # Jupyter Book always loads sphinx-thebe, which names a CDN in a script of every page.
    for listeners in app.events.listeners.values():
        for listener in list(listeners):
            if listener.handler.__module__.startswith("sphinx_thebe"):
                app.disconnect(listener.id)
    app.registry.css_files = [f for f in app.registry.css_files if f[0] != "sphinx-thebe.css"]


def _clean_page(app, pagename, templatename, context, doctree):
    if "body" in context:
        context["body"] = without_remote_styles(context["body"])


def setup(app):
    app.add_role("result", Result())
    app.add_directive("result-table", ResultTable)
    app.connect("config-inited", _configure)
    app.connect("html-page-context", _clean_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
