"""The views of `regkit.widgets` in a browser: by mouse, by keyboard, without a script, on paper."""

import io

import nibabel
import numpy as np
import pytest
import torch
from page_checks import TIMEOUT_MS
from PIL import Image
from typer.testing import CliRunner

from regkit import cli, plot, widgets

PAGE = "book/seeing.html"
WHOLE_PAGE = 1_500_000  # bytes of a page with views, without the scripts that pages share


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a view, saved as a page, with the network off; fails on an error of its script."""
    errors, contexts = [], []

    def open_view(view, **settings):
        context = browser.new_context(offline=True, **settings)
        contexts.append(context)
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.clock.install(time=0)
        page.goto(view.save(tmp_path / "view.html").as_uri())
        page.clock.pause_at(100_000)  # from here on a test says when time passes
        return page

    yield open_view
    for context in contexts:
        context.close()
    assert errors == []


def pair():
    """Compare a dark moved image with a bright fixed one; the moving image is grey."""
    ramp = torch.linspace(0, 1, 64).repeat(64, 1)[None, None]
    bright = torch.ones_like(ramp)
    bright[..., 0] = 0  # the lowest row: of one grey value alone nobody knows black and white
    return widgets.compare(ramp, bright, torch.zeros_like(ramp), what="two grounds")


def shown(page) -> np.ndarray:
    """What stands on the stage, grey values of 100 by 100 places."""
    picture = Image.open(io.BytesIO(page.locator(".rv-stage").screenshot()))
    return np.asarray(picture.convert("L").resize((100, 100), Image.Resampling.NEAREST)).astype(int)


def test_the_edge_of_the_wipe_moves_by_key_and_by_mouse(opened):
    page = opened(pair())
    place = page.get_by_role("slider", name="place of the edge")
    assert place.get_attribute("aria-valuetext") == "moved up to 50 percent, then fixed"
    seen = shown(page)[50]
    assert seen[:45].max() < 20 and seen[55:].min() > 235
    place.focus()
    page.keyboard.press("Home")
    assert shown(page)[50, 5:].min() > 235
    box = page.locator(".rv-stage").bounding_box()
    page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + 0.5 * box["height"])
    assert abs(int(place.input_value()) - 80) <= 1
    seen = shown(page)[50]
    assert seen[:75].max() < 20 and seen[85:].min() > 235


def test_the_checkerboard_has_squares_of_both(opened):
    page = opened(pair())
    page.get_by_role("button", name="checkerboard").press("Enter")
    squares = page.get_by_role("slider", name="squares along the width")
    squares.press("Home")  # two by two
    seen = shown(page)
    assert seen[20:45, 5:45].min() > 235 and seen[55:95, 55:95].min() > 235
    assert seen[20:45, 55:95].max() < 20 and seen[55:95, 5:45].max() < 20


def test_the_names_on_the_checkerboard_are_those_of_its_upper_corners(opened):
    page = opened(pair())
    page.get_by_role("button", name="checkerboard").click()
    squares = page.get_by_role("slider", name="squares along the width")
    for key, names in (("Home", ["fixed", "moved"]), ("ArrowRight", ["fixed", "fixed"])):
        squares.press(key)  # two, then three along the width
        assert page.locator(".rv-name").all_inner_texts() == names
        for name, place in zip(names, (slice(2, 28), slice(72, 98))):
            square = shown(page)[10:25, place]  # below the name itself
            assert square.min() > 235 if name == "fixed" else square.max() < 20


def test_a_tall_picture_fits_a_screen(opened):
    tall = torch.linspace(0, 1, 150).repeat(50, 1)[None, None]
    page = opened(
        widgets.compare(tall, tall, what="a ramp"), viewport={"width": 1280, "height": 720}
    )
    box = page.locator(".rv-stage").bounding_box()
    assert box["height"] < 600 and box["height"] == pytest.approx(3 * box["width"], rel=0.01)


def test_flicker_changes_the_picture_by_itself_unless_less_motion_is_asked_for(opened):
    page = opened(pair(), reduced_motion="no-preference")
    page.get_by_role("button", name="flicker").click()
    assert page.get_by_role("button", name="flicker").get_attribute("aria-pressed") == "true"
    assert shown(page)[50, 50] < 20
    page.clock.run_for(800)
    assert shown(page)[50, 50] > 235
    page.get_by_role("button", name="stop").click()
    page.clock.run_for(8000)
    assert shown(page)[50, 50] > 235

    page = opened(pair(), reduced_motion="reduce")
    page.get_by_role("button", name="flicker").click()
    page.clock.run_for(8000)
    assert shown(page)[50, 50] < 20
    page.get_by_role("button", name="swap").click()
    assert shown(page)[50, 50] > 235


def test_the_other_image_is_chosen_from_a_list(opened):
    page = opened(pair())
    page.get_by_role("combobox", name="image to compare with fixed").select_option("moving")
    page.get_by_role("slider", name="place of the edge").press("End")
    assert 100 < shown(page)[50, 50] < 155


def test_without_javascript_and_on_paper_the_pictures_stand_side_by_side(opened):
    page = opened(pair(), java_script_enabled=False)
    boxes = [picture.bounding_box() for picture in page.locator(".rv-still img").all()]
    assert len(boxes) == 3 and len({box["y"] for box in boxes}) == 1
    assert min(box["width"] for box in boxes) > 100
    page = opened(pair())
    assert not page.locator(".rv-still").is_visible()
    page.emulate_media(media="print")
    assert page.locator(".rv-still").is_visible() and not page.locator(".rv-live").is_visible()


FOCUSED = "document.activeElement.ariaLabel ?? document.activeElement.innerText"


def test_every_handle_has_a_name_and_is_reached_by_the_tab_key(opened):
    page = opened(pair())
    names = []
    for _ in range(5):
        page.keyboard.press("Tab")
        names.append(page.evaluate(FOCUSED))
    assert names == [
        "wipe", "flicker", "checkerboard", "image to compare with fixed",
        "place of the edge, percent from the left",
    ]  # fmt: skip


def test_a_series_shows_the_figure_of_its_value(opened):
    view = widgets.series(lambda v: plot.panels(1, size=0.5)[0], [0, 1, 4], label="stage", start=1)
    page = opened(view)
    slider = page.get_by_role("slider", name="stage")
    assert page.locator(".rv-live img").get_attribute("alt") == "stage 1"
    slider.press("ArrowRight")
    assert page.locator(".rv-live img").get_attribute("alt") == "stage 4"
    assert slider.get_attribute("aria-valuetext") == "stage 4"


PHONE = {"width": 390, "height": 844}
PARTS = """() => [...document.querySelectorAll(".regkit-stack > div")].map(part => {
    const { width, height, left, top } = part.getBoundingClientRect();
    const [w, h] = part.style.aspectRatio.split("/").map(Number);
    return { width, height, left, top, scale: width / w };
})"""


def in_four(value):
    """Four panels side by side, each of one grey: 0, 40, 80 and 120, and a little more."""
    fig, axes = plot.panels(4, size=1.7)
    for k, ax in enumerate(axes):
        plot.image(torch.full((1, 1, 40, 40), 40.0 * k + value), ax, limits=(0, 255))
    return fig


def test_on_a_phone_the_panels_of_a_series_stand_below_one_another(opened):
    page = opened(widgets.series(in_four, [0, 20], label="stage"), viewport=PHONE)
    page.wait_for_function("document.querySelectorAll('.regkit-stack > div').length === 2")
    first, second = page.evaluate(PARTS)
    assert second["top"] >= first["top"] + first["height"] and first["left"] == second["left"]
    assert first["scale"] == pytest.approx(second["scale"]) and first["scale"] > 0.74
    assert not page.locator(".rv-live img").is_visible()
    assert page.get_by_role("img", name="stage 0").is_visible()

    def middles() -> list[int]:
        greys = []
        for part in page.locator(".regkit-stack > div").all():
            picture = Image.open(io.BytesIO(part.screenshot())).convert("L")
            for share in (0.25, 0.75):
                place = int(share * picture.width), picture.height // 2
                greys.append(picture.getpixel(place))
        return greys

    assert np.allclose(middles(), [0, 40, 80, 120], atol=6)
    page.get_by_role("slider", name="stage").press("ArrowRight")
    page.wait_for_selector(".regkit-stack[aria-label='stage 20']")
    assert np.allclose(middles(), [20, 60, 100, 140], atol=6)
    page.emulate_media(media="print")
    assert not page.locator(".regkit-stack").is_visible()


def test_on_a_desk_a_series_is_whole(opened):
    page = opened(
        widgets.series(in_four, [0], label="stage"), viewport={"width": 900, "height": 700}
    )
    page.wait_for_function("document.querySelector('.rv-live img').naturalWidth > 0")
    assert page.locator(".rv-live img").is_visible() and page.evaluate(PARTS) == []


def test_the_report_of_the_command_line_opens_from_the_disk_and_asks_for_nothing(browser, tmp_path):
    ramp = np.linspace(0, 1, 40, dtype="f4")
    scan = np.minimum.outer(ramp, ramp)[..., None]
    for name in ("m.nii.gz", "f.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(scan, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / name)
    command = ["register", tmp_path / "m.nii.gz", tmp_path / "f.nii.gz", "-o", tmp_path / "out"]
    command += ["--method", "affine", "--device", "cpu"]
    done = CliRunner().invoke(cli.app, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    context = browser.new_context(offline=True)
    page = context.new_page()
    errors, asked = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "out" / "report.html").as_uri())
    page.wait_for_selector(".regkit-view.rv-ready")
    page.get_by_role("button", name="checkerboard").click()
    assert page.get_by_role("heading", name="Registration").is_visible()
    assert errors == [] and [url for url in asked if not url.startswith("data:")] == [page.url]
    context.close()


def head():
    """A volume brighter along axis 0 and one along axis 1, of (12, 14, 16) voxels."""
    i, j, _ = torch.meshgrid(
        torch.arange(12.0), torch.arange(14.0), torch.arange(16.0), indexing="ij"
    )
    return widgets.volumes(i[None, None], j[None, None], disp=torch.zeros(1, 3, 12, 14, 16))


GREY = """canvas => { const [w, h] = [canvas.width, canvas.height];
    const data = canvas.getContext("2d").getImageData(0, 0, w, h).data;
    return [...Array(w * h).keys()].map(p => data[4 * p]); }"""


def plane(page, name) -> np.ndarray:
    """The grey values of a plane, rows from the top."""
    canvas = page.get_by_role("img", name=f"{name} plane")
    tall = canvas.evaluate("canvas => canvas.height")
    return np.array(canvas.evaluate(GREY)).reshape(tall, -1)


def test_a_press_in_one_plane_moves_the_other_two(opened):
    page = opened(head())
    root = page.locator(".regkit-view")
    page.wait_for_selector(".regkit-view[data-at='6 7 8']")
    page.get_by_role("combobox", name="layer", exact=True).select_option("moving")
    axial = page.get_by_role("img", name="axial plane of moving, 9 of 16")
    box = axial.bounding_box()  # axis 0 to the right, axis 1 up
    axial.click(position={"x": box["width"] * 2.5 / 12, "y": box["height"] * 3.5 / 14})
    assert root.get_attribute("data-at") == "2 10 8"
    # the sagittal plane is all of one value now: that of i = 2, between 0 and 11
    assert np.abs(plane(page, "sagittal") - 255 * 2 / 11).max() < 12
    assert np.abs(plane(page, "axial") - np.round(255 * np.arange(12) / 11)).max() < 25
    page.get_by_role("combobox", name="layer", exact=True).select_option("fixed")
    assert np.abs(plane(page, "axial") - 255 * np.arange(13, -1, -1)[:, None] / 13).max() < 25


def test_a_phone_shows_three_planes_at_once_in_one_scale_and_scrolls_over_them(opened):
    page = opened(head(), viewport=PHONE, has_touch=True, is_mobile=True)
    page.wait_for_selector(".regkit-view[data-at='6 7 8']")
    boxes = [canvas.bounding_box() for canvas in page.locator("canvas").all()]
    widths = [box["width"] for box in boxes]  # axis 0, axis 0 and axis 1 run to the right
    assert widths[0] == widths[1] == pytest.approx(widths[2] * 12 / 14, abs=1)
    assert boxes[0]["y"] == pytest.approx(boxes[1]["y"] + boxes[1]["height"] - boxes[0]["height"])
    assert boxes[2]["y"] >= boxes[0]["y"] + boxes[0]["height"]
    assert boxes[2]["y"] + boxes[2]["height"] - boxes[0]["y"] < PHONE["height"]

    page.evaluate("document.body.style.paddingBottom = '2000px'")
    session = page.context.new_cdp_session(page)
    for k, kind in enumerate(["touchStart"] + 14 * ["touchMove"] + ["touchEnd"]):
        finger = {"x": boxes[0]["x"] + 60, "y": boxes[0]["y"] + 90 - 5 * k}
        points = [] if kind == "touchEnd" else [finger]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_timeout(300)
    assert page.evaluate("window.scrollY") > 30


def test_planes_move_by_keys_and_by_their_sliders(opened):
    page = opened(head())
    root = page.locator(".regkit-view")
    page.wait_for_selector(".regkit-view[data-at='6 7 8']")
    page.get_by_role("img", name="coronal plane").focus()
    for key in ("ArrowRight", "ArrowUp", "ArrowUp", "PageUp"):
        page.keyboard.press(key)
    assert root.get_attribute("data-at") == "7 8 10"
    page.get_by_role("slider", name="axial plane, place along axis 2").press("Home")
    page.get_by_role("img", name="sagittal plane").press("ArrowLeft")
    page.get_by_role("img", name="sagittal plane").press("ArrowDown")  # at the lowest already
    assert root.get_attribute("data-at") == "7 7 0"
    assert page.locator(".rv-live output").inner_text() == "voxel 7, 7, 0"


def test_layers_are_in_a_list_and_mix(opened):
    page = opened(head())
    names = page.get_by_role("combobox", name="layer", exact=True).locator("option")
    assert names.all_inner_texts() == ["moving", "fixed", "moved", "Jacobian"]
    page.get_by_role("combobox", name="layer", exact=True).select_option("Jacobian")
    page.wait_for_selector("canvas[aria-label^='axial plane of Jacobian']")
    assert plane(page, "axial").min() > 240  # white: sizes are kept
    page.get_by_role("combobox", name="layer to mix").select_option("moving")
    page.wait_for_function("document.querySelector('.rv-live label[hidden]') === null")
    half = (247 + 255 * np.arange(12) / 11) / 2
    assert np.abs(plane(page, "axial") - half).max() < 20


# ---------------------------------------------------------------------------------- the book


@pytest.fixture(scope="module")
def seeing(browser, book):
    if not (book / PAGE).is_file():
        pytest.fail(f"The book has no page {PAGE}, which holds the views.", pytrace=False)
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    page.goto((book / PAGE).as_uri())
    yield page
    page.close()


def test_the_page_of_the_book_has_each_view_at_work(seeing):
    seeing.wait_for_function("document.querySelectorAll('.regkit-view.rv-ready').length === 3")
    kinds = seeing.evaluate("[...document.querySelectorAll('.rv-ready')].map(r => r.dataset.view)")
    assert kinds == ["compare", "series", "volumes"]
    seeing.wait_for_selector("[data-view='volumes'][data-at]")


def test_the_book_holds_the_script_once_and_the_page_is_light(book):
    page = (book / PAGE).read_bytes()
    assert page.count(b"regkit-assets") == 0 and page.count(b"regkit-views.js") == 1
    assert len(page) < WHOLE_PAGE
    without = (book / "book" / "notation.html").read_text(encoding="utf-8")
    assert "regkit-views.js" not in without
