"""How the pages look where most readers do not look: in the dark, on a phone, on paper."""

import pytest
from browser import COMPLETE
from page_checks import TIMEOUT_MS

PAGES = (
    "notebooks/01_images_grids_warps.html",
    "notebooks/03_voxelmorph.html",
    "notebooks/08_deep_unfolding.html",
    "notebooks/11_classical_deformable.html",
    "book/what_you_get.html",
    "book/seeing.html",
)
PHONE = {"width": 390, "height": 844}


@pytest.fixture(params=PAGES)
def opened(request, browser, book):
    """Opens one page, with settings of the browser."""
    contexts = []

    def open_page(**settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.goto((book / request.param).as_uri())
        if page.locator("script[type='application/vnd.jupyter.widget-view+json']").count():
            page.wait_for_selector(".jupyter-widgets img")
        page.evaluate(COMPLETE)
        return page

    yield open_page
    for context in contexts:
        context.close()


# Elements, pictures apart, brighter than half and larger than the handle of a slider.
BRIGHT = """() => [...document.querySelectorAll("body, body *")].filter(element => {
    const pictures = "img, canvas, svg *, .rv-name, option, .regkit-stack > div"; // in parts, too
    if (element.matches(pictures)) return false;
    const box = element.getBoundingClientRect();
    if (box.width < 40 || box.height < 10 || box.bottom <= 0) return false;
    const style = getComputedStyle(element);
    const [r, g, b, a] = style.backgroundColor.match(/[\\d.]+/g).map(Number);
    return (a ?? 1) > 0.5 && 0.3 * r + 0.59 * g + 0.11 * b > 127 && style.visibility !== "hidden";
}).map(element => `${element.tagName} ${element.className}`.slice(0, 80))"""

# Text that is hard to read on its ground: contrast below 3, the least for large letters.
PALE = """() => {
    const lightness = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    const ground = element => {
        for (let at = element; at; at = at.parentElement) {
            const colour = numbers(getComputedStyle(at).backgroundColor);
            if ((colour[3] ?? 1) > 0.5) return colour;
        }
        return [255, 255, 255];
    };
    return [...document.querySelectorAll(".bd-article .cell_output *, .bd-article .regkit-view *")]
        .filter(element => [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
        .filter(element => element.offsetParent && !element.matches("option, style, script"))
        .filter(element => {
            const [a, b] = [numbers(getComputedStyle(element).color), ground(element)]
                .map(lightness).sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05) < 3;
        }).map(element => `${element.tagName} ${element.textContent.trim().slice(0, 40)}`);
}"""


# Scans are shown with their own grey values; figures on white paper may be dimmed.
FILTERED = """() => [...document.querySelectorAll(".bd-article :is(img, canvas)")]
  .filter(picture => {
    const { filter } = getComputedStyle(picture);
    const scan = picture.closest("[data-view='compare'], [data-view='volumes']");
    return scan ? filter !== "none" : /contrast|invert/.test(filter);
}).map(picture => picture.alt ?? picture.ariaLabel)"""


def test_nothing_but_pictures_is_bright_in_the_dark_and_all_can_be_read(opened):
    page = opened(color_scheme="dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate(BRIGHT) == []
    assert page.evaluate(PALE) == []
    assert page.evaluate(FILTERED) == []


# Figures at less than three quarters of their size: letters of 9 points have under 9 pixels then.
SMALL = """() => [...document.querySelectorAll(".bd-article :is(.cell_output, figure) img")]
    .filter(image => image.offsetParent && !image.closest(".widget-subarea, .rv-still, .rv-stage"))
    .filter(image => image.clientWidth < 0.74 * image.naturalWidth)
    .map(image => `${image.clientWidth} of ${image.naturalWidth}: ${image.alt.slice(0, 40)}`)"""


# Figures in parts: those whose parts do not add up to the whole, or are too small.
TORN = """() => [...document.querySelectorAll(".regkit-stacked")].map(box => {
    const image = box.querySelector("img");
    const parts = [...box.querySelectorAll(".regkit-stack > div")].map(part => {
        const [w, h] = part.style.aspectRatio.split("/").map(Number);
        return { w, h, scale: part.getBoundingClientRect().width / w };
    });
    const whole = parts.reduce((sum, part) => sum + part.w, 0) === image.naturalWidth;
    const tall = parts.every(part => part.h === image.naturalHeight);
    return whole && tall && parts.length > 1 && parts.every(part => part.scale > 0.74)
        ? "" : `${image.alt.slice(0, 40)}: ${JSON.stringify(parts)}`;
}).filter(Boolean)"""


def test_a_phone_shows_figures_in_parts_that_can_be_read(opened):
    page = opened(viewport=PHONE)
    assert page.evaluate(TORN) == []
    stacks = page.locator(".regkit-stacked > .regkit-stack")
    for stack in stacks.all():
        assert stack.get_attribute("role") == "img" and stack.get_attribute("aria-label")
    if "notebooks/" in page.url:
        assert stacks.count() > 3
    page.emulate_media(media="print")
    assert [stack for stack in stacks.all() if stack.is_visible()] == []


def test_a_phone_scrolls_figures_by_finger_and_key_and_not_the_page(opened):
    page = opened(viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate(SMALL) == []
    boxes = page.locator(".regkit-wide")
    for box in boxes.all():
        assert box.get_attribute("tabindex") == "0" and box.get_attribute("role") == "region"
        assert "scrolls sideways" in box.get_attribute("aria-label")
    if boxes.count():
        boxes.first.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("document.querySelector('.regkit-wide').scrollLeft > 0")


# Columns as high as a page break what pages break, and the browser says where its boxes lie.
BROKEN = """height => {
    const article = document.querySelector(".bd-article");
    for (const part of document.querySelectorAll("details")) part.open = true;
    const width = 680;
    article.style.cssText += `;columns: auto ${width}px; column-fill: auto; column-gap: 40px;
        height: ${height}px; width: ${width}px; max-width: none; overflow: visible`;
    const parts = ".cell_input, div.highlight, .cell_output img, figure img, tr";
    return [...article.querySelectorAll(parts)].filter(part => {
        const boxes = [...part.getClientRects()];
        const tall = boxes.reduce((sum, box) => sum + box.height, 0);
        return boxes.length > 1 && tall < 0.9 * height;
    }).map(part => `${part.tagName}: ${part.textContent.trim().slice(0, 60)}`);
}"""


def test_paper_is_white_without_handles_and_breaks_nothing_that_fits_on_a_sheet(opened):
    page = opened(color_scheme="dark", viewport={"width": 794, "height": 1123})
    page.emulate_media(media="print")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)"
    for hidden in (".bd-header-article", ".bd-sidebar-primary", ".prev-next-footer", ".rv-live"):
        assert [part for part in page.locator(hidden).all() if part.is_visible()] == [], hidden
    assert page.evaluate(BROKEN, 960) == []
