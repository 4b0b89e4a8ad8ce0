"""Views of `regkit.widgets` on a page that no notebook stands behind.

    :::{view}
    from regkit import widgets
    ...
    widgets.compare(moving, fixed, moved)
    :::

runs the code while the book is built, shows the `View` that its last line gives, and the code below
it, folded. Sphinx keeps the result with the page, and runs the code again when the page changes.
All `view`s of a page share their names, as the cells of a notebook do.

Pages with a view load views.js and views.css of regkit/widgets from _static/; the copies that a
stored notebook carries in its outputs are taken out.
"""

import ast
import re

from docutils import nodes
from regkit_static import copy_to_static
from sphinx.util.docutils import SphinxDirective

FILES = {name: f"regkit-{name}" for name in ("views.js", "views.css")}
INLINE = re.compile(r'<(style|script) class="regkit-assets">.*?</\1>', re.DOTALL)


def value_of(code: str, names: dict):
    """Run code with these names; the value of its last line."""
    *before, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        raise ValueError("The last line gives no value, expected a view.")
    exec(compile(ast.Module(before, []), "<view>", "exec"), names)  # the book's own pages
    return eval(compile(ast.Expression(last.value), "<view>", "eval"), names)


class ShowView(SphinxDirective):
    """{view}: code whose last line is a `regkit.widgets.View`."""

    has_content = True

    def run(self):
        code = "\n".join(self.content)
        names = self.env.temp_data.setdefault("regkit_views", {})
        try:
            markup = value_of(code, names).markup
        except Exception as error:  # whatever it is, the page and the line should be named
            raise self.error(f"{type(error).__name__}: {error}") from error
        block = nodes.literal_block(code, code, language="python")
        fold = '<details class="regkit-code"><summary>The code of this view</summary>'
        return [
            nodes.raw("", markup, format="html"),
            nodes.raw("", fold, format="html"),
            block,
            nodes.raw("", "</details>", format="html"),
        ]


def _share(app, pagename, templatename, context, doctree):
    if 'class="regkit-view"' in context.get("body", ""):
        context["body"] = INLINE.sub("", context["body"])
        app.add_css_file(FILES["views.css"])
        app.add_js_file(FILES["views.js"], loading_method="defer")


def setup(app):
    app.add_directive("view", ShowView)
    app.connect("builder-inited", lambda app: copy_to_static(app, FILES))
    app.connect("html-page-context", _share)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
