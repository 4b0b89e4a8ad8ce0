"""The book's own Sphinx extension.

It does five things:

* it keeps the built pages free of requests to other hosts, so that the book opens from a disk with
  the network off;
* it asks `book/tools/address.py` where the project is public, and shows the repository and Colab
  buttons only where that is known;
* it writes numbers of results/*.json into a page, so that nobody types them: the role `result` one
  number, the directive `result-table` a table of rows.

      {result}`accuracy turn.voxels power`      # file, keys, format
      {result}`sun2025-table?_2d_cpu order.of`  # several files: the sum

      :::{result-table} accuracy precision      # file, keys of a list of rows
      :where: largest>1e-6                      # only some rows; also =, !=, <
      :empty: None.                             # what to say where no row is left
      what is done = {operation}
      largest difference = {largest:power}
      :::

  The formats are those of book/tools/measured.py. A directive, and no cell with pandas: prose pages
  run no code, and a page shows beside each column's name what it holds;
* it reads a chapter from its text, notebooks/NN_title.md, and the outputs of its notebook
  (book/tools/notebooks.py makes both one), so that nothing is executed for a page;
* it counts figures, equations and exercises anew in each chapter: Figure 8.1, (8.1), Exercise 8.1.
"""

import os
import re
import sys
from pathlib import Path

import nbformat
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective, SphinxRole

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from address import Address, found  # noqa: E402
from measured import Words, lookup, numeric, table  # noqa: E402

from notebooks import joined  # noqa: E402

PROCESSES = 4  # that read and write pages; eight were no faster on two cores

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


class Result(SphinxRole):
    """{result}`file keys format`: a number of results/, in running text."""

    def run(self):
        name, keys, *spec = self.text.split()
        results = Path(self.env.srcdir) / "results"
        for file in results.glob(f"{name}.json"):
            self.env.note_dependency(str(file))
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
        head, body = nodes.thead(), nodes.tbody()
        group += [head, body]
        for i, line in enumerate(lines):
            row = nodes.row()
            for cell, right in zip(line, numeric(lines)):
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
    # It numbers sections when all pages have been read, but does not say so.
    app.extensions["sphinx_multitoc_numbering"].parallel_read_safe = True
    config.hide_solutions = bool(os.environ.get("REGKIT_STUDENT"))  # `make book-student`
    # Jupyter Book always loads sphinx-thebe, which names a CDN in a script of every page.
    for listeners in app.events.listeners.values():
        for listener in list(listeners):
            if listener.handler.__module__.startswith("sphinx_thebe"):
                app.disconnect(listener.id)
    app.registry.css_files = [f for f in app.registry.css_files if f[0] != "sphinx-thebe.css"]


def _read_chapter(app, docname, source):
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".ipynb":
        app.env.note_dependency(str(path.with_suffix(".md")))
        source[0] = nbformat.writes(joined(path.with_suffix(".md")))


def _count_by_chapter(app, env):
    """Number what has a number from one on in each page, in a chapter behind its own number."""
    for docname, kinds in env.toc_fignumbers.items():
        chapter = re.match(r"notebooks/(\d+)", docname)
        prefix = (int(chapter[1]),) if chapter else ()
        for kind, numbers in kinds.items():
            kinds[kind] = {name: (*prefix, n) for n, name in enumerate(numbers, 1)}
    return []


def _clean_page(app, pagename, templatename, context, doctree):
    if "body" in context:
        context["body"] = without_remote_styles(context["body"])


def setup(app):
    app.parallel = PROCESSES  # Jupyter Book has no option for it
    app.add_role("result", Result())
    app.add_directive("result-table", ResultTable)
    app.connect("config-inited", _configure)
    app.connect("source-read", _read_chapter)
    app.connect("env-get-updated", _count_by_chapter, priority=900)  # after Sphinx has numbered
    app.connect("html-page-context", _clean_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
