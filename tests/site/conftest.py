"""A browser and the built book, or one sentence that says how to get them."""

from pathlib import Path

import pytest
from browser import FLAGS, find
from page_checks import BOOK


def find_browser() -> str:
    """The path of a Chromium or Chrome on the PATH; fails the test where there is none."""
    try:
        return find()
    except FileNotFoundError as error:
        pytest.fail(f"The site test needs a browser. {error}", pytrace=False)


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
