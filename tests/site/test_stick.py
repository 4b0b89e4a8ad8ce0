"""The archive of the built book, unpacked and opened in a browser with every request refused."""

import shutil
from pathlib import Path

import pytest
import usb
from page_checks import TIMEOUT_MS, problems

PAGES = (
    "START.html",
    "site/index.html",
    "site/notebooks/03_voxelmorph.html",
    "site/slides/03/index.html",
)


@pytest.fixture(scope="module")
def stick(book, tmp_path_factory) -> Path:
    """The unpacked archive, without the wheels of the libraries."""
    folder = tmp_path_factory.mktemp("stick")
    wheel = folder / "regkit_course-0-py3-none-any.whl"  # tests/test_usb.py installs a real one
    wheel.touch()
    notebooks = book.parents[1] / "notebooks"
    usb.pack(folder / "course.zip", wheel, book, notebooks)
    shutil.unpack_archive(folder / "course.zip", folder)
    return folder / usb.TOP


@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_the_stick_opens_without_a_network(browser, stick, name):
    assert problems(browser, stick / name, stick) == []


def test_the_stick_leads_from_its_start_to_a_slide_and_asks_nobody(browser, stick):
    asked = []
    context = browser.new_context(offline=True)
    context.set_default_timeout(TIMEOUT_MS)
    context.route("http*://**", lambda route: (asked.append(route.request.url), route.abort()))
    page = context.new_page()
    page.goto((stick / "START.html").as_uri())
    page.get_by_role("link", name="01", exact=True).click()
    page.wait_for_selector("html[data-ready=yes]")
    page.get_by_role("link", name="The chapter").click()
    page.wait_for_url("**/01_images_grids_warps.html")
    assert page.locator("article h1").inner_text().startswith("01 Images")
    assert asked == []
    context.close()
