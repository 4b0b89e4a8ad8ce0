"""Each defect that page_checks looks for is found on a small page that has it, and only there."""

import base64
import json
from pathlib import Path

import pytest
from page_checks import problems

STATIC = Path(__file__).parents[2] / "book" / "_static"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
MATHJAX = '<script src="_static/mathjax/tex-svg-full.js"></script>'
MATH = r'<span class="math">\(x + u(x)\)</span>'


@pytest.fixture
def site(tmp_path):
    """A folder with an image, a second page and the vendored files; write(body) adds page.html."""
    (tmp_path / "dot.png").write_bytes(PIXEL)
    (tmp_path / "other.html").write_text('<h1 id="there">Other</h1>', encoding="utf-8")
    (tmp_path / "_static").symlink_to(STATIC)
    (tmp_path / "page.html").touch()
    return tmp_path


@pytest.fixture
def widget():
    """A stored slider, as MyST-NB puts it into a page."""
    from ipywidgets import IntSlider
    from ipywidgets.embed import embed_data

    data = embed_data(views=[IntSlider(description="$a^2$")])
    mime = "application/vnd.jupyter.widget-"
    state = f'<script type="{mime}state+json">{json.dumps(data["manager_state"])}</script>'
    view = f'<script type="{mime}view+json">{json.dumps(data["view_specs"][0])}</script>'
    return f"<div>{view}</div>{state}"


def check(browser, site, body, **options):
    page = site / "page.html"
    text = f'<!doctype html><html><head><meta charset="utf-8"></head><body>{body}</body></html>'
    page.write_text(text, encoding="utf-8")
    return problems(browser, page, site, **options)


def test_a_good_page_has_no_problem(browser, site):
    body = (
        '<img src="dot.png" alt="a dot"><a href="other.html#there">there</a><a href="#">top</a>'
        '<a href="https://example.org/">elsewhere</a><pre>\\(raw\\) and $$ in code</pre>'
        f"<p>It costs $5 or $6.</p>{MATH}{MATHJAX}"
    )
    assert check(browser, site, body) == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('<script src="https://example.org/a.js"></script>', "external request: https://example"),
        ('<img src="http://example.org/a.png" alt="x">', "external request: http://example.org"),
        ("<script>fetch('https://example.org/')</script>", "external request: https://example"),
        ("<script>new WebSocket('wss://example.org/')</script>", "external request: wss://example"),
        (
            '<style>@import "https://example.org/a.css";</style>',
            "external request: https://example",
        ),
        ("<script>console.error('oh')</script>", "console error: oh"),
        ("<script>throw new Error('oh')</script>", "script error: oh"),
        ('<script src="absent.js"></script>', "missing file: /absent.js"),
        ('<a href="absent.html">x</a>', "broken link: absent.html"),
        ('<a href="other.html#nowhere">x</a>', "broken link: other.html#nowhere"),
        ('<a href="#nowhere">x</a>', "broken link: page.html#nowhere"),
        ('<a href="../../x.html">x</a>', "link that leaves the book: file://"),
        ('<img src="absent.png" alt="x">', "missing image: absent.png"),
        ('<img src="absent.png" alt="x" loading="lazy">', "missing image: absent.png"),
        ('<img src="dot.png">', "image without alt text: dot.png"),
        ('<img src="dot.png" alt=" ">', "image without alt text: dot.png"),
        ('<img src="dot.png" alt="_images/dot.png">', "image whose alt text is a file name"),
        (MATH, r"undrawn formula: \(x + u(x)\)"),
        (r"<p>So $\alpha + 1$ it is.</p>", r"undrawn formula: So $\alpha + 1$"),
        (MATHJAX + r'<span class="math">\(\frac{1}\)</span>', "undrawn formula: Missing"),
        (MATHJAX + r'<span class="math">\(\unknown\)</span>', r"undrawn formula: \unknown"),
        ('<script src="_static/requirejs/require.js"></script>', "page without widgets that loads"),
        ("<p>" + "x" * 5000 + "</p>", "page of 5"),
    ],
)
def test_a_defect_is_found(browser, site, body, said):
    found = check(browser, site, body, budget=4000)
    assert any(line.startswith(said) for line in found), found


def test_the_images_of_a_page_count_in_its_size(browser, site):
    (site / "dot.png").write_bytes(PIXEL + b"\0" * 9000)
    body = '<img src="dot.png" alt="a dot">'
    assert check(browser, site, body) == []
    assert check(browser, site, body, budget=9000)[0].startswith("page of 9")


def test_a_redirection_is_a_link(browser, site):
    page = site / "start.html"
    page.write_text('<meta http-equiv="Refresh" content="0; url=other.html">', encoding="utf-8")
    assert problems(browser, page, site) == []
    (site / "start2.html").write_text(
        '<meta http-equiv="Refresh" content="0; url=absent.html">', encoding="utf-8"
    )
    assert problems(browser, site / "start2.html", site) == ["broken link: absent.html"]


WIDGET_SCRIPTS = "".join(
    f'<script src="_static/{name}"></script>'
    for name in ("requirejs/require.js", "widgets.js", "html-manager/embed-amd.js")
)


def test_a_page_with_widgets_draws_them_from_the_vendored_files(browser, site, widget):
    math = f'{MATH}<script async src="_static/mathjax/tex-svg-full.js"></script>'
    assert check(browser, site, widget + WIDGET_SCRIPTS) == []
    assert check(browser, site, widget + WIDGET_SCRIPTS + math) == []


def test_an_undrawn_widget_is_found(browser, site, widget):
    found = check(browser, site, widget, timeout_ms=2000)
    assert found == ["undrawn widgets: 0 drawn for 1 stored views"]
