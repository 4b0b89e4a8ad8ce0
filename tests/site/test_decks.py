"""Every deck, opened in a browser over file:// with the network off, slide by slide."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from page_checks import TIMEOUT_MS, problems
from slides import Deck, copy_scripts, decks

NAMES = [path.stem for path in decks()]
WIDTH, HEIGHT = 1280, 720

# Each slide in turn: what sticks out of it, and how large its pictures are.
MEASURE = r"""
async () => {
  const found = [];
  for (const [k, section] of Reveal.getSlides().entries()) {
    Reveal.slide(k);
    await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
    const title = `slide ${k + 1} (${section.querySelector("h1, h2")?.textContent ?? "no title"})`;
    if (section.scrollHeight > section.clientHeight || section.scrollWidth > section.clientWidth)
      found.push(`${title} overflows: ${section.scrollWidth} x ${section.scrollHeight}`);
    for (const part of section.querySelectorAll("pre, .formula, table, p, ul, ol"))
      if (part.scrollWidth > part.clientWidth + 1 || part.offsetLeft + part.scrollWidth > 1280)
        found.push(`${title}: ${part.tagName} is ${part.scrollWidth} wide in ${part.clientWidth}`);
    for (const code of section.querySelectorAll("pre")) {
      const lines = document.createRange(), box = code.getBoundingClientRect();
      lines.selectNodeContents(code);
      const free = (box.right - lines.getBoundingClientRect().right) * code.offsetWidth / box.width;
      if (free < 10) found.push(`${title}: code ends ${free | 0} from the edge of its box`);
    }
    for (const image of section.querySelectorAll("img")) {
      const shown = Math.min(image.clientWidth / image.naturalWidth,
                             image.clientHeight / image.naturalHeight);
      const [w, h] = [shown * image.naturalWidth, shown * image.naturalHeight];
      if (w < 640 && h < 360) found.push(`${title}: a picture of ${w | 0} x ${h | 0}`);
    }
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Callable[[str], Path]:
    """Makes a deck of this checkout, alone in a folder with its scripts: its page."""
    folder = tmp_path_factory.mktemp("decks")
    copy_scripts(folder)
    return cache(lambda name: Deck(decks([name])[0]).write(folder))


def opened(browser, path: Path):
    context = browser.new_context(offline=True, viewport={"width": WIDTH, "height": HEIGHT})
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    return page


@pytest.mark.parametrize("name", NAMES)
def test_a_deck_has_no_defect_of_a_page(browser, built, name):
    page = built(name)
    assert problems(browser, page, page.parents[2]) == []


@pytest.mark.parametrize("name", NAMES)
def test_nothing_sticks_out_of_a_slide(browser, built, name):
    page = opened(browser, built(name))
    assert page.evaluate(MEASURE) == []
    page.context.close()


def test_keys_move_on_and_open_the_lecturers_view(browser, built):
    page = opened(browser, built("01"))
    page.keyboard.press("ArrowRight")
    assert page.evaluate("Reveal.getIndices().h") == 1
    assert page.locator("section.present .number").inner_text().startswith("2 / ")
    with page.expect_popup() as popup:
        page.keyboard.press("s")
    notes = popup.value
    notes.wait_for_selector(".speaker-controls-notes:not(.hidden) .value")
    assert "Read them aloud" in notes.locator(".speaker-controls-notes .value").inner_text()
    page.context.close()


def test_a_deck_prints_one_page_a_slide(browser, built, tmp_path):
    address = built("01").as_uri()
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(f"{address}?print-pdf")
    page.wait_for_selector("html[data-ready=yes]")
    page.wait_for_selector(".pdf-page")
    assert page.locator(".pdf-page").count() == page.locator(".pdf-page section").count() >= 25
    context.close()


def test_a_deck_without_scripts_shows_all_its_words(browser, built):
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(built("01").as_uri())
    assert page.locator("section h2", has_text="Take home").is_visible()
    context.close()
