"""What a page of the built book must not have, found in a browser with the network off.

`problems(browser, page, root)` opens one page over file:// and returns one line for each defect.
test_page_checks.py shows that each defect is found, on small pages made for it.
"""

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

BOOK = Path(__file__).parents[2] / "_build" / "html"
# Bytes of a page and the images it shows.
BUDGET = 3_000_000
TIMEOUT_MS = 30_000  # for a page, and for its widgets, to be drawn
WIDGET_FILES = ("/requirejs/", "/html-manager/", "/_static/widgets.js")

# What the drawn page says about itself, once MathJax and the widgets are done.
REPORT = r"""
async () => {
  const problems = [];
  if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
  for (const img of document.images) {
    img.loading = "eager";
    await img.decode().catch(() => {});
    const name = img.getAttribute("src")?.slice(0, 80) ?? "";
    const alt = img.getAttribute("alt")?.trim() ?? "";
    if (!img.naturalWidth) problems.push(`missing image: ${name}`);
    if (!alt) problems.push(`image without alt text: ${name}`);
    else if (/^\S+\.(png|jpe?g|svg|gif|webp)$/i.test(alt))
      problems.push(`image whose alt text is a file name: ${alt}`);
  }
  for (const math of document.querySelectorAll(".math"))
    if (!math.querySelector("mjx-container"))
      problems.push(`undrawn formula: ${math.textContent.trim().slice(0, 80)}`);
  // MathJax draws an unknown command in red, and any other error as merror.
  const wrong = "mjx-container merror[data-mjx-error], mjx-container mtext[mathcolor=red]";
  for (const error of document.querySelectorAll(wrong))
    problems.push(`undrawn formula: ${error.dataset.mjxError ?? error.textContent}`);
  const tex = /\\\(|\\\[|\$\$|\\begin\{|\$[^$\n]*\\[a-zA-Z]+[^$\n]*\$/;
  const verbatim = "pre, code, script, style, noscript, textarea, .math, mjx-container";
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); )
    if (tex.test(node.data) && !node.parentElement.closest(verbatim))
      problems.push(`undrawn formula: ${node.data.trim().slice(0, 80)}`);
  return problems;
}
"""


class _Anchors(HTMLParser):
    """The targets and the redirection of one page, read from its file."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()
        self.refresh = ""

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.names.update(v for k, v in attrs if v and (k == "id" or (tag == "a" and k == "name")))
        if tag == "meta" and (values.get("http-equiv") or "").lower() == "refresh":
            self.refresh = (values.get("content") or "").partition("url=")[2].strip("\"' ")


@cache
def _anchors(page: Path) -> _Anchors:
    parser = _Anchors()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def broken_link(href: str, root: Path) -> str | None:
    """Why the absolute address `href` leads nowhere; None for a good one or for another host."""
    parts = urlsplit(href)
    if parts.scheme != "file":
        return None
    target = Path(unquote(parts.path)).resolve()
    if not target.is_relative_to(root.resolve()):
        return f"link that leaves the book: {href}"
    if not target.is_file():
        return f"broken link: {target.relative_to(root.resolve())}"
    anchor = unquote(parts.fragment)
    if anchor and target.suffix == ".html" and anchor not in _anchors(target).names:
        return f"broken link: {target.relative_to(root.resolve())}#{anchor}"
    return None


def problems(
    browser, path: Path, root: Path, budget: int = BUDGET, timeout_ms: int = TIMEOUT_MS
) -> list[str]:
    """One line for each defect of the page at `path` in the book at `root`.

    Args:
        browser: a browser started by Playwright.
        budget: bytes that the page and the images it shows may have together.
        timeout_ms: milliseconds that the page, and then its widgets, may take to be drawn.
    """
    refresh = _anchors(path).refresh
    if refresh:
        broken = broken_link((path.parent.resolve() / refresh).as_uri(), root)
        return [broken] if broken else []

    found: list[str] = []
    requested: list[str] = []
    size = path.stat().st_size

    def on_request(request):
        nonlocal size
        requested.append(request.url)
        parts = urlsplit(request.url)
        if parts.scheme not in ("file", "data", "blob"):
            found.append(f"external request: {request.url}")
        elif parts.scheme == "file" and request.resource_type == "image":
            image = Path(unquote(parts.path))
            size += image.stat().st_size if image.is_file() else 0

    def on_failed(request):
        if request.url.startswith("file:"):
            found.append(f"missing file: {request.url.partition(root.resolve().as_uri())[2]}")

    def on_console(message):
        # A file that does not load is told by on_request and on_failed.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            found.append(f"console error: {message.text[:200]}")

    context = browser.new_context(offline=True)
    context.set_default_timeout(timeout_ms)
    try:
        page = context.new_page()
        page.on("request", on_request)
        page.on("requestfailed", on_failed)
        page.on("console", on_console)
        page.on("pageerror", lambda error: found.append(f"script error: {str(error)[:200]}"))
        page.on("websocket", lambda socket: found.append(f"external request: {socket.url}"))
        page.goto(path.resolve().as_uri(), wait_until="load")
        found += page.evaluate(REPORT)
        views = "script[type='application/vnd.jupyter.widget-view+json']"
        if page.locator(views).count():
            found += _undrawn_widgets(page, page.locator(views).count())
        elif any(part in url for url in requested for part in WIDGET_FILES):
            found.append("page without widgets that loads the widget files")
        for href in page.evaluate("[...document.links].map(a => a.href)"):
            broken = broken_link(href, root)
            found += [broken] if broken else []
        _wait_for_silence(page, requested)
    finally:
        context.close()
    if size > budget:
        found.append(f"page of {size} bytes, images included: the budget is {budget}")
    return list(dict.fromkeys(re.sub(r"\s+", " ", line) for line in found))


def _wait_for_silence(page, requested: list[str]) -> None:
    """Until half a second brings no new request.

    Playwright's "networkidle" also waits for all that were made to end, and on a busy machine now
    and then misses an end of one over file://.
    """
    seen = -1
    while seen != len(requested):
        seen = len(requested)
        page.wait_for_timeout(500)


def _undrawn_widgets(page, views: int) -> list[str]:
    """Wait for the stored widgets; say how many views stay undrawn."""
    from playwright.sync_api import TimeoutError as BrowserTimeout

    drawn = ".widget-subarea > *, .jupyter-widgets-view > *, .jupyter-widgets"
    try:
        page.wait_for_function(
            "([drawn, n]) => document.querySelectorAll(drawn).length >= n", arg=[drawn, views]
        )
    except BrowserTimeout:
        return [f"undrawn widgets: {page.locator(drawn).count()} drawn for {views} stored views"]
    error = page.locator("text=Click to show javascript error").count()
    return ["undrawn widget: the page shows a script error in its place"] if error else []
