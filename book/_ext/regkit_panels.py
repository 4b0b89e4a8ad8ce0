"""Figures of many panels on a phone: where each picture of a page may be cut.

When a page is written, each of its pictures gets an attribute `data-cuts`: the columns between its
panels, found from the paper that parts them (`regkit.widgets.cuts`). stack.js of regkit/widgets
then shows the panels below one another where the screen is too narrow for the whole.

A drawing that makes no sense in pieces has the class `regkit-whole`, in the header of its cell:
`mystnb: {image: {classes: regkit-whole}}`.
"""

import re
from functools import cache
from pathlib import Path

from PIL import Image
from regkit_static import copy_to_static

FILES = {name: f"regkit-{name}" for name in ("stack.js", "stack.css")}
IMAGE = re.compile(r'<img\b(?P<before>[^>]*?)\bsrc="[^"]*?_images/(?P<name>[^"/]+\.png)"[^>]*?>')
WHOLE = "regkit-whole"


@cache
def cuts_of(path: Path) -> list[int]:
    """Where the picture may be cut."""
    from regkit.widgets.cuts import cuts

    with Image.open(path) as picture:
        return cuts(picture)


def with_cuts(body: str, paths: dict[str, Path]) -> str:
    """The page body with `data-cuts` in each picture that can be cut.

    Args:
        body: HTML.
        paths: name in `_images/` -> file.
    """

    def marked(match: re.Match) -> str:
        tag, path = match[0], paths.get(match["name"])
        if path is None or WHOLE in tag or "data-cuts" in tag:
            return tag
        columns = " ".join(map(str, cuts_of(path)))
        return tag.replace("<img", f'<img data-cuts="{columns}"', 1) if columns else tag

    return IMAGE.sub(marked, body)


def _mark(app, pagename, templatename, context, doctree):
    paths = {name: Path(app.srcdir) / source for source, name in app.builder.images.items()}
    if "body" in context:
        context["body"] = with_cuts(context["body"], paths)


def setup(app):
    app.connect("builder-inited", lambda app: copy_to_static(app, FILES))
    app.connect("html-page-context", _mark)
    app.add_css_file(FILES["stack.css"])
    app.add_js_file(FILES["stack.js"])
    return {"parallel_read_safe": True, "parallel_write_safe": True}
