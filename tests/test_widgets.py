"""Views hold the right pixels, the right way round, and nothing that asks for another host."""

import ast
import base64
import importlib.util
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import regkit_static
import torch
from PIL import Image

from regkit import plot, register, widgets
from regkit.data import population
from regkit.registration import Result
from regkit.widgets import sliders, views

ROOT = Path(__file__).parents[1]


def extension():
    path = ROOT / "book" / "_ext" / "regkit_views.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pixels(uri: str) -> np.ndarray:
    """The grey values of a picture in a page, rows from the top."""
    data = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)[..., 0]


class Pictures(HTMLParser):
    """The attributes of every image of a page."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.found: list[dict[str, str]] = []
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.found.append(dict(attrs))


def pictures(view) -> dict[str, dict[str, str]]:
    return {picture["data-name"]: picture for picture in Pictures(view.markup).found}


def stored(view) -> dict:
    """What a view keeps for its script."""
    (text,) = re.findall(r'class="rv-data">(.*?)</script>', view.markup)
    return json.loads(text)


def blocks() -> torch.Tensor:
    """48 voxels along axis 0, 32 along axis 1; bright where axis 0 is high and axis 1 low."""
    image = torch.zeros(1, 1, 48, 32)
    image[..., 32:, :16] = 1
    return image


# ----------------------------------------------------------------------------------- compare


def test_axis_0_runs_right_and_axis_1_up_in_the_picture():
    shown = pixels(pictures(widgets.compare(blocks(), blocks()))["fixed"]["src"])
    assert shown.shape == (32, 48)
    assert shown[18:30, 34:46].min() > 240  # below on the right
    assert max(shown[:14].max(), shown[:, :30].max()) < 15


def test_the_moved_image_has_the_grey_values_of_the_moving_one():
    view = widgets.compare(blocks(), 7 * blocks(), 0.5 * blocks())
    found = {name: pixels(one["src"])[24, 40] for name, one in pictures(view).items()}
    assert list(found) == ["moving", "fixed", "moved"]
    assert found["moving"] > 250 and found["fixed"] > 250  # each in its own window
    assert abs(found["moved"] - 127.5) < 5


def test_a_plane_of_a_volume_has_its_true_proportions():
    volume = torch.zeros(8, 24, 40)
    volume[5] = 1
    view = widgets.compare(volume, volume, axis=0, index=5, spacing=(1, 2, 4))
    fixed = pictures(view)["fixed"]
    assert pixels(fixed["src"]).shape == (40, 24) and "aspect-ratio: 48 / 160" in fixed["style"]
    assert pixels(fixed["src"]).min() > 250


def test_every_picture_says_what_it_shows_and_markup_in_it_is_text():
    found = pictures(widgets.compare(blocks(), blocks(), blocks(), what='a "<b>slice</b>'))
    assert [one["alt"] for one in found.values()] == [
        f'{name}: a "<b>slice</b>' for name in ("moving", "fixed", "moved")
    ]


def test_shapes_that_differ_are_one_sentence():
    with pytest.raises(ValueError, match=r"^moving has shape \(4, 5\), expected that of fixed, "):
        widgets.compare(torch.zeros(4, 5), torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"^moved has shape"):
        widgets.compare(torch.zeros(4, 5), torch.zeros(4, 5), torch.zeros(4, 6))


def test_missing_intensities_are_black():
    image = torch.where(blocks() > 0, blocks(), torch.nan)
    assert pixels(pictures(widgets.compare(image, blocks()))["moving"]["src"])[4, 4] < 5


def test_a_slice_takes_less_than_100_kb_with_its_script():
    one, two, three = (subject.image[None] for subject in population(3, (160, 192)))
    assert len(widgets.compare(one, two, three)._repr_html_()) < 100_000


def test_grey_values_are_stored_with_a_small_loss():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    assert len(views._encoded(noise)) < 0.8 * len(views._encoded(noise, lossless=True))


# ------------------------------------------------------------------------------------ series


def test_a_series_draws_every_value_and_names_it():
    drawn = []

    def draw(value):
        drawn.append(value)
        return plot.panels(1, size=0.5)[0]

    view = widgets.series(draw, [0.0, 0.5, "all"], label="share", start=2)
    assert drawn == [0.0, 0.5, "all"] and stored(view) == {"start": 2}
    assert [one["alt"] for one in pictures(view).values()] == ["share 0", "share 0.5", "share all"]


@pytest.mark.parametrize(("values", "start"), [([], 0), ([1.0], 1), ([1.0], -1)])
def test_a_start_is_a_position_among_the_values(values, start):
    with pytest.raises(ValueError, match=rf"^start is {start}, expected a position among"):
        widgets.series(lambda value: plot.panels(1)[0], values, start=start)


def test_a_path_shows_each_displacement_by_its_name(monkeypatch):
    monkeypatch.setattr(views, "series", lambda *arguments: arguments)
    shift = torch.zeros(1, 2, 48, 32)
    shift[:, 0] = 4  # what is seen lies 4 voxels farther along axis 0
    draw, names, label, start = widgets.path(
        blocks(), 3 * blocks(), {"before": 0 * shift, "1/2": shift}, "level", 1
    )
    assert (names, label, start) == (["before", "1/2"], "level", 1)
    axes = draw("1/2").axes
    assert [ax.get_title() for ax in axes] == ["moved", "with fixed", "grid", "Jacobian"]
    moved = np.asarray(axes[0].images[0].get_array())
    assert (moved[:16, 28:44] == 1).all() and (moved[:, :28] == 0).all()
    overlay = np.asarray(axes[1].images[0].get_array())  # red, green, blue
    assert overlay[4, 30].tolist() == [1, 0, 1] and overlay[4, 40].tolist() == [1, 1, 1]


# ----------------------------------------------------------------------------------- volumes


def test_the_sheet_holds_each_plane_where_the_script_looks_for_it():
    volume = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    sheet, columns = views._sprite(volume), 3  # 5 planes: two rows of three
    assert sheet.shape == (2 * 4, 3 * 3)
    for i, j, k in np.ndindex(3, 4, 5):
        assert sheet[(k // columns) * 4 + j, (k % columns) * 3 + i] == volume[i, j, k]


def layer(view, name: str) -> np.ndarray:
    """A layer (X, Y, Z) of a view, unpacked as the script does it."""
    data = stored(view)
    nx, ny, nz = data["shape"]
    columns = int(np.ceil(nz**0.5))
    sheet = pixels(data["layers"][name])
    sheet = sheet.reshape(-1, ny, columns, nx).swapaxes(1, 2).reshape(-1, ny, nx)
    return sheet[:nz].transpose(2, 1, 0)


def test_layers_are_what_they_say():
    moving = torch.zeros(1, 1, 16, 18, 20)
    moving[..., 8:, :, :] = 1
    shift = torch.zeros(1, 3, 16, 18, 20)
    shift[:, 0] = 4  # what is seen lies 4 voxels farther along axis 0
    view = widgets.volumes(moving, moving, disp=shift, stages=[0 * shift], spacing=(1, 1, 2))
    data = stored(view)
    assert list(data["layers"]) == ["moving", "fixed", "moved", "stage 1", "Jacobian"]
    assert data["shape"] == data["voxels"] == [16, 18, 20] and data["extent"] == [16, 18, 40]
    for name, edge in (("moving", 8), ("stage 1", 8), ("moved", 4)):
        found = layer(view, name)
        assert found[: edge - 1].max() < 30 and found[edge + 1 : 11].min() > 225, name
    assert (layer(view, "Jacobian") == 128).all()  # a shift keeps sizes


def test_layers_keep_the_grey_values_of_the_moving_image():
    moving = torch.zeros(1, 1, 16, 18, 20)
    moving[..., 8:, :, :] = 1
    view = widgets.volumes(moving, moving, 0.5 * moving)
    assert abs(layer(view, "moved")[14, 9, 10] - 127.5) < 8


def test_the_jacobian_is_coded_on_a_log_scale_and_folds_are_kept():
    det = torch.ones(1, 8, 8, 8)
    det[..., 0, 0], det[..., 2, 2], det[..., 4, 4] = 3, 1 / 3, 3**0.5
    det[0, 7, 7, 7] = -1
    coded = views._coded(det, (8, 8, 8))
    assert [coded[0, k, k] for k in (0, 2, 4, 6)] == [255, 1, 192, 128]
    assert coded[7, 7, 7] == 0 and (coded == 0).sum() == 1
    assert views._coded(det, (2, 2, 2))[1, 1, 1] == 0  # one of 64 voxels folds


def test_the_colours_are_those_of_the_plot():
    table = [tuple(bytes.fromhex(c)) for c in re.findall("......", views._colours())]
    assert len(table) == 256 and table[0] == (0, 0, 0)
    axes = plot.panels(1)[1]
    field = torch.zeros(1, 2, 8, 8)
    shown = plot.jacobian(field, axes[0], bar=False)  # its limit is 3, as that of a view
    for code, det in ((255, 3.0), (128, 1.0), (1, 1 / 3)):
        assert np.allclose(table[code], shown.to_rgba(np.log(det), bytes=True)[:3], atol=2)


def test_a_large_volume_is_averaged_to_the_longest_side():
    volume = torch.rand(1, 1, 40, 20, 30)
    data = stored(widgets.volumes(volume, volume, longest=20))
    assert data["shape"] == [20, 10, 15] and data["voxels"] == [40, 20, 30]
    small = views._small(volume, (20, 10, 15))
    assert np.allclose(small[0, 0, 0], volume[0, 0, :2, :2, :2].mean(), atol=1e-6)


def test_the_picture_of_three_planes_has_each_in_its_place():
    volume = np.zeros((4, 6, 8), np.uint8)
    volume[2], volume[:, 3], volume[:, :, 4] = 10, 20, 30
    shown = views._middle_planes(volume)
    assert shown.shape == (8, 4 + 1 + 4 + 1 + 6)  # across axis 2, 1 and 0
    assert (shown[2:, :2] == 30).all() and (shown[:2, :4] == 0).all()
    assert shown[-1, 5] == 20 and shown[-1, 10] == 10


def test_volumes_of_another_shape_are_one_sentence():
    good = torch.zeros(1, 1, 6, 6, 6)
    for moving, fixed in ((good[..., :5], good), (good[0], good), (good[..., 0], good[..., 0])):
        with pytest.raises(ValueError, match=r"^moving has shape .*, expected \(1, 1, \*S\) with"):
            widgets.volumes(moving, fixed)


def test_a_few_thick_slices_are_kept():
    volume = torch.rand(1, 1, 40, 20, 5)
    data = stored(widgets.volumes(volume, volume, longest=20, spacing=(1, 1, 8)))
    assert data["shape"] == [20, 10, 5]  # voxels of 2 mm, and of 8 mm as they were


@pytest.mark.slow
def test_seven_layers_of_a_head_take_less_than_a_page_may():
    one, two = (subject.image[None] for subject in population(2, (80, 96, 80)))
    disp = torch.zeros(1, 3, 80, 96, 80)
    view = widgets.volumes(one, two, disp=disp, stages=[disp, disp, disp])
    assert len(view._repr_html_()) < 1_200_000


# -------------------------------------------------------------------------- pages and notebooks


def test_a_saved_page_needs_nothing_beside_it(tmp_path):
    path = widgets.compare(blocks(), blocks()).save(tmp_path / "look.html", title="a < b")
    page = path.read_text(encoding="utf-8")
    assert "<title>a &lt; b</title>" in page and "://" not in page
    assert all(one["src"].startswith("data:") for one in Pictures(page).found)
    assert page.count("<script class") == 1 and "Not a medical device" in page


@pytest.mark.slow
def test_what_was_registered_is_shown_on_its_upright_grid():
    """An image whose first axis runs to the left is turned; the still picture says which way."""
    affine = np.diag([-1.0, 2.0, 1.0, 1.0])
    image = nib.Nifti1Image(blocks()[0, 0, :, :, None].numpy(), affine)
    result = register(image, image, method="greedy", effort="fast", device="cpu")
    found = pictures(widgets.show(result, what="a block"))
    assert list(found) == ["moving", "fixed", "moved"]
    assert found["fixed"]["alt"] == "fixed: a block" and "48 / 64" in found["fixed"]["style"]
    shown = pixels(found["fixed"]["src"])
    assert shown[18:30, 2:14].min() > 240 and shown[:, 18:].max() < 15  # below on the left now


def shown_result(shape, spacing, orientation=()):
    """A result of which `show` sees its pictures alone."""
    image = torch.rand(1, 1, *shape)
    disp = torch.zeros(1, len(shape), *shape)
    names = ("moving", "fixed", "moved")
    page = dict.fromkeys(names, image) | {"disp": disp, "spacing": spacing}
    page["orientation"] = orientation
    return Result(image, disp, None, {}, [], None, None, None, page)


def test_a_large_slice_is_averaged_for_a_page():
    view = widgets.show(shown_result((3000, 1500), [0.5, 1.0]))
    fixed = pictures(view)["fixed"]
    assert pixels(fixed["src"]).shape == (500, 1000)  # the first axis runs to the right
    assert "aspect-ratio: 1500 / 1500" in fixed["style"]


def test_planes_have_anatomical_names_where_the_header_tells_them():
    named, plain = (
        stored(widgets.show(shown_result((8, 9, 10), [1.0, 1.0, 1.0], letters)))["planes"]
        for letters in ("RAS", ())
    )
    assert named == ["sagittal", "coronal", "axial"] and plain == ["axis-0", "axis-1", "axis-2"]


def test_a_notebook_stores_a_view_once():
    assert repr(widgets.compare(blocks(), blocks())) == "View()"


def test_the_script_is_on_one_line_and_keeps_what_is_no_comment():
    script = re.search(r'<script class="regkit-assets">(.*?)</script>', views.assets(), re.DOTALL)
    assert "\n" not in script[1] and "//" not in script[1]
    for name in ("stack", "views"):
        text = (Path(views.__file__).parent / f"{name}.js").read_text(encoding="utf-8")
        code = [line for line in text.splitlines() if not line.strip().startswith("//")]
        assert all(line.split(" // ")[0].strip() in script[1] for line in code)


def test_the_book_takes_the_script_out_of_stored_outputs():
    view, found = widgets.compare(blocks(), blocks()), extension()
    assert found.INLINE.sub("", view._repr_html_()) == view.markup


def test_the_book_copies_the_files_that_pages_load(tmp_path):
    app = SimpleNamespace(outdir=tmp_path)
    regkit_static.copy_to_static(app, extension().FILES)
    for name in ("views.js", "views.css"):
        copied = tmp_path / "_static" / f"regkit-{name}"
        assert copied.read_bytes() == (Path(views.__file__).parent / name).read_bytes()


def test_code_on_a_page_ends_in_a_value_and_shares_its_names():
    value_of, names = extension().value_of, {}
    assert value_of("a = 2\na + 1", names) == 3
    assert value_of("a * 5", names) == 10
    with pytest.raises(ValueError, match=r"^The last line gives no value"):
        value_of("a = 2", names)


# Both in ipywidgets 7.8 and in 8.1, where their arguments mean the same.
IN_BOTH = {"FloatSlider", "HTML", "IntSlider", "Tab", "VBox", "jslink"}


def test_sliders_use_what_ipywidgets_7_and_8_both_have():
    tree = ast.parse(Path(sliders.__file__).read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("kit", "ipywidgets")
    }
    assert used == IN_BOTH
