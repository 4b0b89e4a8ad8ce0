"""The lecturer's pages of the book, book/teaching: what a chapter has measured, in running text.

    {measured}`03`                          how long the chapter took when its outputs were made
    {measured}`03 ch03-gap .0f`             a number that the chapter's run has handed to its prose

The first is the metadata that book/tools/notebooks.py writes. So nobody types a time, and a chapter
that is executed again says its new one.
"""

import sys
from functools import cache
from pathlib import Path

import nbformat
from docutils import nodes
from sphinx.util.docutils import SphinxRole

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import plain  # noqa: E402

from notebooks import joined, select  # noqa: E402


def spoken(seconds: float) -> str:
    """A time as one says it: seconds up to a minute and a half, else minutes."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes"


@cache
def _glued(number: str) -> dict[str, str]:
    return plain.glued(joined(select([number])[0]))


def measured(text: str) -> str:
    """What the role says.

    Raises:
        ValueError: if there is no such chapter, it was not executed, or it has no such number.
    """
    number, *rest = text.split()
    paths = [path for path in select(None) if path.stem.startswith(f"{number}_")]
    if not paths:
        raise ValueError(f"measured names chapter {number!r}, which does not exist.")
    if rest:
        name, spec = rest[0], rest[1] if len(rest) > 1 else ""
        if name not in _glued(number):
            raise ValueError(f"measured asks chapter {number} for {name!r}, which it lacks.")
        return format(float(_glued(number)[name]), spec)
    made = nbformat.read(paths[0].with_suffix(".ipynb"), as_version=4).metadata.get("regkit", {})
    if made.get("budget") != "cpu":
        raise ValueError(f"measured asks how long chapter {number} takes: execute it first.")
    return spoken(made["seconds"])


class Measured(SphinxRole):
    """{measured}`chapter`, or {measured}`chapter name format`."""

    def run(self):
        for path in select(None):
            self.env.note_dependency(str(path.with_suffix(".ipynb")))
        try:
            return [nodes.Text(measured(self.text))], []
        except ValueError as error:
            return [], [self.inliner.reporter.error(str(error), line=self.lineno)]


def setup(app):
    app.add_role("measured", Measured())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
