"""A browser and the built book, or one sentence that says how to get them."""

import shutil
from pathlib import Path

import pytest
from page_checks import BOOK

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_browser() -> str:
    """The path of a Chromium or Chrome on the PATH; fails the test where there is none."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    pytest.fail(
        "The site test needs Chromium or Chrome on the PATH: install it, on Debian and Ubuntu with "
        "'apt-get install chromium'.",
        pytrace=False,
    )


@pytest.fixture(scope="session")
def browser():
    """A headless browser, shared by all tests."""
    executable = find_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def book() -> Path:
    """The folder of the built book."""
    if not (BOOK / "index.html").is_file():
        pytest.fail(
            "The site test needs the built book in _build/html: run 'make book' first.",
            pytrace=False,
        )
    return BOOK
