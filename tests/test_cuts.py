"""Where a figure of panels may be cut for a phone."""

import base64
import io
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_site_files import load

from notebooks import select
from regkit import plot
from regkit.widgets.cuts import NARROW, cuts


def drawn(*boxes, size=(400, 100), mode="RGB"):
    """Black boxes (left, right) on white, or on nothing."""
    picture = Image.new(mode, size, "white" if mode == "RGB" else (0, 0, 0, 0))
    for left, right in boxes:
        ImageDraw.Draw(picture).rectangle((left, 10, right - 1, 90), fill="black")
    return picture


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_two_panels_are_cut_in_the_middle_of_what_parts_them(mode):
    assert cuts(drawn((10, 180), (220, 390), mode=mode)) == [200]


def test_one_panel_and_empty_paper_are_not_cut():
    assert cuts(drawn((10, 390))) == cuts(drawn()) == []
    assert cuts(drawn((10, 180), (183, 390))) == []  # 3 pixels of paper are none


def test_what_is_narrow_belongs_to_its_nearer_neighbour():
    name, bar = (0, 12), (175, 190)
    assert cuts(drawn(name, (20, 160), bar, (220, 390))) == [205]
    assert cuts(drawn((0, 150), (190, 205), (215, 390))) == [170]  # the name of the second


def test_a_name_written_upwards_belongs_to_the_axis_on_its_right():
    """Though the panel on its left is nearer; a colour bar of the same width is solid."""
    picture = drawn((10, 170), (220, 390))
    for top in range(20, 80, 12):  # letters
        ImageDraw.Draw(picture).rectangle((180, top, 190, top + 8), fill="black")
    assert cuts(picture) == [175]
    assert cuts(drawn((10, 170), (180, 191), (220, 390))) == [205]


@pytest.mark.parametrize("rows", [1, 3])
def test_panels_of_a_figure_are_found(rows):
    """With titles above, names on the left and a colour bar on the right."""
    fig, axes = plot.panels(5, rows, size=1.6, height=1.8)
    image, disp = torch.rand(1, 1, 40, 48), torch.zeros(1, 2, 40, 48)
    for row in np.atleast_2d(axes):
        for k, ax in enumerate(row[:4]):
            plot.image(image, ax, f"panel {k}")
        plot.jacobian(disp, row[4], "Jacobian")
        row[0].set_ylabel("a row")
    buffer = io.BytesIO()
    fig.savefig(buffer)
    found = cuts(Image.open(buffer))
    boxes = [ax.get_window_extent() for ax in np.atleast_2d(axes)[0]]
    assert len(found) == 4
    assert all(left.x1 < x < right.x0 for left, x, right in zip(boxes, found, boxes[1:]))


# ---------------------------------------------------------------------- the figures of the book


@cache
def figures() -> dict[str, Image.Image]:
    """Every picture that the book shows, by a name."""
    found = {}
    for md in select(None):
        notebook = nbformat.read(md.with_suffix(".ipynb"), 4)
        for number, cell in enumerate(notebook.cells):
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    data = base64.b64decode(output["data"]["image/png"])
                    found[f"{md.stem[:2]}, cell {number}"] = Image.open(io.BytesIO(data))
    for path in sorted((Path(__file__).parents[1] / "book" / "_figures").glob("*.png")):
        found[path.stem] = Image.open(path)
    return found


def test_no_cut_goes_through_ink_and_no_part_is_a_sliver():
    assert len(figures()) > 80
    for name, picture in figures().items():
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture.convert("RGBA"))
        dark = np.asarray(white.convert("L")) < 240
        edges = [0, *cuts(picture), picture.width]
        for left, right in zip(edges, edges[1:]):
            assert dark[:, left:right].any(axis=0).sum() >= NARROW / 2, name
        for edge in edges[1:-1]:
            assert not dark[:, edge - 2 : edge + 3].any(), name


def test_most_figures_of_the_book_can_be_cut():
    wide = [picture for picture in figures().values() if picture.width > 480]
    assert sum(bool(cuts(picture)) for picture in wide) > 0.8 * len(wide)


def test_a_page_says_where_its_pictures_may_be_cut(tmp_path):
    panels = load("_ext/regkit_panels.py")
    paths = {}
    for name, boxes in (("two.png", ((10, 180), (220, 390))), ("one.png", ((10, 390),))):
        paths[name] = tmp_path / name
        drawn(*boxes).save(paths[name])
    two = '<img alt="a &gt; b" src="../_images/two.png" />'
    assert panels.with_cuts(two, paths) == two.replace("<img", '<img data-cuts="200"')
    for same in (
        '<img alt="" src="../_images/one.png" />',
        '<img alt="" src="../_images/gone.png" />',
        '<img src="data:image/webp;base64,AAAA" />',
        '<img class="regkit-whole" src="../_images/two.png" />',
        '<img src="../_images/two.png" class="regkit-whole" />',
    ):
        assert panels.with_cuts(same, paths) == same
