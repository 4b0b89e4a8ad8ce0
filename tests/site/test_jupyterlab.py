"""A chapter opened in JupyterLab, as a reader does: no kernel, no extension of ours."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from page_checks import BOOK

ROOT = BOOK.parents[1]
CHAPTER = "08_deep_unfolding"
WAIT_MS = 120_000
# All cells are drawn at once, not only those in view; nothing is asked of another host.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none", "autoStartDefaultKernel": False},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab that shows the notebooks, with settings of its own."""
    home = tmp_path_factory.mktemp("jupyter")
    for name, settings in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    (home / "files" / "book").mkdir(parents=True)
    (home / "files" / "notebooks").symlink_to(ROOT / "notebooks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    folders = {f"JUPYTER_{name}_DIR": str(home / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{n.upper()}_DIR": str(home / n) for n in ("settings", "workspaces")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.root_dir={home / 'files'}", f"--port={port}", "--port-retries=0"]
    command += ["--IdentityProvider.token=", "--ServerApp.ip=127.0.0.1"]
    with open(home / "log", "wb") as log:
        server = subprocess.Popen(command, env=os.environ | folders, stdout=log, stderr=log)
        try:
            _wait_for(f"{address}/api", server, home / "log")
            yield address
        finally:
            server.terminate()
            server.wait(30)


def _wait_for(address, server, log):
    for _ in range(WAIT_MS // 500):
        try:
            urlopen(address, timeout=5).close()
            return
        except URLError:
            time.sleep(0.5)
        if server.poll() is not None:
            break
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}", pytrace=False)


@pytest.fixture(scope="module")
def page(browser, lab):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(WAIT_MS)
    page.goto(f"{lab}/doc/tree/notebooks/{CHAPTER}.ipynb")
    cells = len(notebook().cells)
    page.wait_for_function(f"document.querySelectorAll('.jp-Cell').length === {cells}")
    # the last formula that is drawn: behind it all cells have been
    page.wait_for_function(
        "[...document.querySelectorAll('.jp-RenderedMarkdown')].every(e => e.innerText.trim())"
        " && document.querySelectorAll('mjx-container').length > 100"
    )
    page.wait_for_timeout(2000)
    yield page
    page.close()


def notebook():
    return nbformat.read(ROOT / "notebooks" / f"{CHAPTER}.ipynb", as_version=4)


def test_formulas_are_drawn_and_no_markup_is_left(page):
    prose = page.evaluate(
        """() => [...document.querySelectorAll(".jp-RenderedMarkdown")].map(place => {
            const copy = place.cloneNode(true);
            for (const part of copy.querySelectorAll("code, pre, mjx-container")) part.remove();
            return copy.textContent;
        }).join("\\n")"""
    )
    assert len(prose) > 20_000
    raw = r"\{[a-z:]+\}|:::|\$|\\[a-z]+|^#+ |\*\*|</?[a-z]+>|\]\("
    assert re.findall(raw, prose, re.MULTILINE) == []
    text = "\n\n".join(c.source for c in notebook().cells if c.cell_type == "markdown")
    text = re.sub(r"```.*?```|`[^`]+`", "", text, flags=re.DOTALL)
    formulas = len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, re.DOTALL))
    assert page.locator("mjx-container").count() == formulas
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0


def test_numbers_of_equations_stand_beside_them(page):
    tags = page.evaluate(  # MathJax draws letters by classes such as mjx-c28, which is "("
        """() => [...document.querySelectorAll("mjx-labels mjx-mtd")].map(label =>
            [...label.querySelectorAll("mjx-c")].map(letter =>
                String.fromCharCode(parseInt(/mjx-c([0-9A-F]+)/.exec(letter.className)[1], 16))
            ).join(""))"""
    )
    assert tags == [f"(8.{n})" for n in range(1, len(tags) + 1)]
    assert len(tags) >= 8


def test_solutions_are_folded_and_open_with_coloured_code(page):
    details = page.locator(
        ".jp-RenderedMarkdown details", has=page.locator("summary", has_text="Solution to")
    )
    written = (ROOT / "notebooks" / f"{CHAPTER}.md").read_text(encoding="utf-8")
    assert details.count() == written.count("````{solution}") > 0
    code = details.first.locator("pre")
    assert not code.is_visible()
    details.first.locator("summary").click()
    assert code.is_visible()
    assert code.locator("span").count() > 50  # keywords and strings in colours
    assert details.first.locator("mjx-container").first.is_visible()
    titles = page.locator(".jp-RenderedMarkdown h3").all_inner_texts()
    assert "Exercise 8.1. Is the formula the minimum?" in [t.strip("¶") for t in titles]


def test_captions_stand_below_their_pictures(page):
    """Those of figures; a view has its words inside."""
    below = page.evaluate(
        """() => [...document.querySelectorAll(".jp-Cell")].filter(
            cell => cell.querySelector(".jp-OutputArea img") && !cell.querySelector(".regkit-view")
        ).map(cell => {
            const caption = cell.nextElementSibling.querySelector(".jp-RenderedMarkdown");
            const picture = cell.querySelector(".jp-OutputArea img");
            const bottom = picture.getBoundingClientRect().bottom;
            const gap = caption.getBoundingClientRect().top - bottom;
            return [caption.innerText.split(". ")[0], gap >= 0 && gap < 100];
        })"""
    )
    assert below == [[f"Figure 8.{n}", True] for n in range(1, len(below) + 1)]
    written = (ROOT / "notebooks" / f"{CHAPTER}.md").read_text(encoding="utf-8")
    assert len(below) == written.count(f"name: fig-{CHAPTER[:2]}-") > 5


def test_cells_of_the_author_are_one_line_each(page):
    hidden = [
        cell.source.splitlines()[0]
        for cell in notebook().cells
        if cell.cell_type == "code" and cell.metadata.get("jupyter", {}).get("source_hidden")
    ]
    shown = page.locator(".jp-CodeCell .jp-InputPlaceholder").all_inner_texts()
    assert [text.strip() for text in shown] == hidden
    assert all(title.startswith("# @title ") for title in hidden)
    heights = page.evaluate(
        "[...document.querySelectorAll('.jp-InputPlaceholder')].map(e => e.offsetHeight)"
    )
    assert max(heights) < 60
