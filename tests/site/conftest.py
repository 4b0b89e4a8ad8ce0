"""A browser and the built book, or one sentence that says how to get them."""

from pathlib import Path

import pytest
from browser import find, opened
from page_checks import BOOK


@pytest.fixture(scope="session")
def browser():
    """A headless browser, shared by all tests."""
    try:
        find()
    except FileNotFoundError as error:
        pytest.fail(f"The site test needs a browser. {error}", pytrace=False)
    with opened() as browser:
        yield browser


@pytest.fixture(scope="session")
def book() -> Path:
    """The folder of the built book."""
    if not (BOOK / "index.html").is_file():
        pytest.fail(
            "The site test needs the built book in _build/html: run 'make book' first.",
            pytrace=False,
        )
    return BOOK
