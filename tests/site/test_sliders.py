"""A slider of `regkit.widgets` moves its pictures in the built book, without a kernel."""

import pytest
from page_checks import TIMEOUT_MS

PAGE = "notebooks/01_images_grids_warps.html"
SHOWN = """() => [...document.querySelectorAll(".regkit-frames img")]
    .filter(image => image.offsetParent !== null).map(image => image.alt)"""


def test_the_slider_switches_the_picture(browser, book):
    if not (book / PAGE).is_file():
        pytest.fail(f"The book has no page {PAGE}, which holds the slider.", pytrace=False)
    page = browser.new_page()
    page.goto((book / PAGE).as_uri())
    handle = page.locator(".noUi-handle").first
    handle.wait_for(timeout=TIMEOUT_MS)
    assert page.evaluate(SHOWN) == ["amplitude 0"]
    handle.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f'({SHOWN})()[0] === "amplitude 1"', timeout=TIMEOUT_MS)
    assert page.evaluate(SHOWN) == ["amplitude 1"]
    page.close()
