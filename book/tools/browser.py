"""The browser that opens, prints and photographs the built pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Resolves when all that a page shows is there: pictures below the window, and formulas.
COMPLETE = """async () => {
    for (const image of document.images) {
        image.loading = "eager";
        await image.decode().catch(() => {});
    }
    if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
}"""


def find() -> str:
    """The path of a Chromium or Chrome.

    Raises:
        FileNotFoundError: none is on the PATH.
    """
    for name in NAMES:
        if path := shutil.which(name):
            return path
    raise FileNotFoundError(
        "No Chromium or Chrome is on the PATH: install it, on Debian and Ubuntu with "
        "'apt-get install chromium'."
    )


@contextmanager
def opened() -> Iterator[Browser]:
    """A browser without a window. Only one may be open in a process.

    Raises:
        FileNotFoundError: as `find`.
    """
    path = find()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()
