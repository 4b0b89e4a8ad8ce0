"""Figures show what they say: orientation, proportions, directions, folds, text of the report."""

import io

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver

from regkit import plot


@pytest.fixture
def ax():
    return plot.panels(1)[1][0]


def lines(ax) -> list[np.ndarray]:
    return [
        np.asarray(segment)
        for collection in ax.collections
        if isinstance(collection, LineCollection)
        for segment in collection.get_segments()
    ]


def shown(ax) -> np.ndarray:
    return np.ma.getdata(ax.images[0].get_array())


def test_panels_come_as_one_row_or_as_rows_and_columns():
    assert plot.panels(3)[1].shape == (3,)
    assert plot.panels(3, 2)[1].shape == (2, 3)


def test_axis_0_runs_right_and_axis_1_up_in_true_proportions(ax):
    image = torch.zeros(1, 1, 4, 3)
    image[0, 0, 3, 0] = 1  # the last along axis 0, the first along axis 1
    plot.image(image, ax, spacing=(1.0, 2.5))
    assert ax.images[0].origin == "lower"
    assert shown(ax)[0, 3] == 1  # row 0 is the lowest row, column 3 the rightmost
    assert ax.get_aspect() == 2.5  # a voxel is 2.5 times as high as wide
    assert ax.get_xlim() == (-0.5, 3.5) and ax.get_ylim() == (-0.5, 2.5)


@pytest.mark.parametrize(
    ("axis", "expected"), [(0, (1, 2)), (1, (0, 2)), (2, (0, 1)), (-1, (0, 1))]
)
def test_a_plane_of_a_volume_keeps_the_order_of_its_axes(ax, axis, expected):
    volume = np.arange(24.0).reshape(2, 3, 4)
    spacing = np.array([1.0, 2.0, 4.0])
    plot.image(volume, ax, axis=axis, index=1, spacing=spacing)
    assert np.array_equal(shown(ax), volume.take(1, axis).T)
    assert ax.get_aspect() == spacing[expected[1]] / spacing[expected[0]]


def test_without_an_index_the_middle_plane_is_shown(ax):
    volume = np.arange(24.0).reshape(2, 3, 4)
    plot.image(volume, ax, axis=1)
    assert np.array_equal(shown(ax), volume[:, 1].T)


@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (1, 1, 4, 5)])
def test_images_are_taken_with_and_without_batch_and_channel(ax, shape):
    plot.image(torch.arange(20.0).reshape(shape), ax)
    assert np.array_equal(shown(ax), np.arange(20.0).reshape(4, 5).T)


def test_a_label_is_outlined_along_the_edges_of_its_voxels(ax):
    labels = torch.zeros(1, 1, 5, 5, dtype=torch.int16)
    labels[..., 2, 3] = 7
    plot.outlines(labels, ax)
    corners = {tuple(point) for line in lines(ax) for point in line}
    assert len(lines(ax)) == 4
    assert corners == {(1.5, 2.5), (1.5, 3.5), (2.5, 2.5), (2.5, 3.5)}


def test_only_the_labels_asked_for_are_outlined(ax):
    labels = torch.tensor([[1, 0, 2], [0, 0, 0], [0, 0, 0]])
    plot.outlines(labels, ax, only=[2])
    assert {tuple(p) for line in lines(ax) for p in line} == {
        (-0.5, 1.5),
        (-0.5, 2.5),
        (0.5, 1.5),
        (0.5, 2.5),
    }


def test_each_region_has_its_colour_and_the_background_is_white(ax):
    drawn = plot.regions(torch.tensor([[0, 1], [2, 3]]), ax)
    colours = drawn.cmap(drawn.norm(np.arange(4)))
    assert colours[0].tolist() == [1, 1, 1, 1]
    assert len({tuple(colour) for colour in colours}) == 4


def test_an_overlay_is_grey_where_the_images_agree(ax):
    a = torch.rand(1, 1, 6, 7)
    b = a.clone()
    b[..., 2, 2] = 0
    a[..., 2, 2] = 1
    plot.overlay(a, b, ax, limits=((0, 1), (0, 1)))
    colours = shown(ax)
    assert colours[2, 2].tolist() == [0, 1, 0]  # only a: green
    same = np.ones((7, 6), dtype=bool)
    same[2, 2] = False
    assert np.ptp(colours[same], axis=-1).max() == 0


def test_a_checkerboard_takes_squares_of_both_in_turn(ax):
    a, b = np.zeros((8, 8)), np.ones((8, 8))
    a[0, 7], b[0, 7] = 1, 0  # so that both have black and white
    plot.checkerboard(a, b, ax, squares=4)
    expected = np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((2, 2)))
    expected[0, 7] = 1 - expected[0, 7]
    assert np.array_equal(shown(ax), expected.T)


def test_a_difference_is_a_minus_b_with_white_at_zero(ax):
    drawn = plot.difference(np.full((3, 3), 2.0), np.eye(3), ax, limit=4)
    assert np.array_equal(shown(ax), 2 - np.eye(3))
    assert drawn.get_clim() == (-4, 4)


@pytest.mark.parametrize("d", [2, 3])
def test_the_grid_is_drawn_where_the_fixed_grid_looks(ax, d):
    shape = (5, 4, 3)[:d]
    disp = torch.zeros(1, d, *shape)
    disp[:, 0], disp[:, 1] = 2.0, -1.0
    plot.grid(disp, ax, step=1)
    assert len(lines(ax)) == 5 + 4
    assert np.array_equal(lines(ax)[0], [(2, j - 1) for j in range(4)])
    assert np.array_equal(lines(ax)[5], [(i + 2, -1) for i in range(5)])


def test_across_another_axis_the_grid_uses_the_components_of_its_plane(ax):
    disp = torch.zeros(1, 3, 5, 4, 3)
    disp[:, 1], disp[:, 2] = 0.5, 1.0
    plot.grid(disp, ax, step=1, axis=0)
    assert np.array_equal(lines(ax)[0], [(0.5, j + 1) for j in range(3)])


@pytest.mark.parametrize("d", [2, 3])
def test_a_grid_may_be_coloured_by_the_length_of_the_displacement(ax, d):
    disp = torch.zeros(1, d, *(3, 4, 5)[:d])
    disp[:, 0, 2] = 3.0
    disp[:, -1, 2] += 4.0  # in 3D along the axis that one looks along, which counts as well
    plot.grid(disp, ax, step=1, limit=6)
    (drawn,) = ax.collections
    assert drawn.get_clim() == (0, 6)
    length = dict(zip(((*a, *b) for a, b in lines(ax)), drawn.get_array(), strict=True))
    assert len(length) == 3 * 3 + 4 * 2  # three lines of three pieces, four of two
    up = 4 if d == 2 else 0
    assert length[0, 0, 0, 1] == 0
    assert length[5, up, 5, up + 1] == 5
    assert length[1, 0, 5, up] == 2.5  # the mean of its ends


def test_arrows_lead_to_where_a_voxel_looks(ax):
    disp = torch.zeros(1, 2, 6, 6)
    disp[:, 0], disp[:, 1] = 1.5, -2.0
    plot.arrows(disp, ax, step=2)
    arrows = next(c for c in ax.collections if isinstance(c, Quiver))
    assert (arrows.U == 1.5).all() and (arrows.V == -2).all()
    assert arrows.angles == "xy" and arrows.scale == 1 and arrows.N == 9


@pytest.mark.parametrize("d", [2, 3])
def test_the_jacobian_is_shown_as_logarithm_and_folds_are_masked(ax, d):
    grid = np.stack(np.meshgrid(*[np.arange(6.0)] * d, indexing="ij"))
    doubled = grid.copy()
    doubled[1:] = 0  # x -> 2x along axis 0: determinant 2
    plot.jacobian(doubled, ax)
    assert np.allclose(shown(ax), np.log(2))
    assert not np.ma.getmaskarray(ax.images[0].get_array()).any()
    plot.jacobian(-2 * doubled, other := plot.panels(1)[1][0], bar=False)  # x -> -x
    assert np.ma.getmaskarray(other.images[0].get_array()).all()
    assert other.images[0].cmap.get_bad().tolist() == [0, 0, 0, 1]


def test_the_bar_of_the_jacobian_is_labelled_with_determinants():
    fig, (ax,) = plot.panels(1)
    plot.jacobian(np.zeros((2, 6, 6)), ax, limit=4)
    bar = next(other for other in fig.axes if other is not ax)
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0.25", "1", "4"]


def test_curves_are_named_at_their_ends(ax):
    plot.curves({"loss": [3, 2, 1], "dice": [0, 1, 2]}, ax, x=[0, 10, 20], ylabel="value")
    assert [line.get_ydata().tolist() for line in ax.lines] == [[3, 2, 1], [0, 1, 2]]
    assert [(t.get_text().strip(), t.xy) for t in ax.texts] == [
        ("loss", (20, 1)),
        ("dice", (20, 2)),
    ]


def test_a_smoothed_curve_is_a_running_mean(ax):
    plot.curves({"loss": [0, 3, 6, 9, 12]}, ax, smooth=3)
    assert ax.lines[0].get_ydata().tolist() == [0, 3, 6, 9, 12]
    assert ax.lines[1].get_xdata().tolist() == [1, 2, 3]
    assert np.allclose(ax.lines[1].get_ydata(), [3, 6, 9])


@pytest.mark.parametrize(
    ("draw", "argument", "message"),
    [
        (plot.image, torch.zeros(2, 1, 4, 4), "image has shape"),
        (plot.image, torch.zeros(5), "image has shape"),
        (plot.outlines, torch.zeros(2, 1, 4, 4), "labels has shape"),
        (plot.grid, torch.zeros(1, 3, 4, 4), "disp has shape"),
        (plot.jacobian, torch.zeros(2, 2, 4, 4), "disp has shape"),
    ],
)
def test_a_wrong_shape_is_named(ax, draw, argument, message):
    with pytest.raises(ValueError, match=message):
        draw(argument, ax)


def pair(shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, 1, 1, *shape, generator=generator)
    return (*images, 0.3 * torch.randn(1, len(shape), *shape, generator=generator))


def texts(fig: Figure) -> list[str]:
    titles = [ax.get_title() for ax in fig.axes]
    return [t.get_text() for t in fig.texts] + [t for t in titles if t]


@pytest.mark.parametrize(
    ("shape", "planes"),
    [((12, 14), 1), ((12, 14, 10), 3), ((1, 14, 10), 1), ((12, 14, 1), 1), ((1, 1, 9), 3)],
)
def test_a_report_shows_before_after_grid_and_jacobian_of_each_plane(shape, planes):
    fig = plot.report(*pair(shape), {"dice": 0.5})
    panels = 8 if len(shape) == 2 else 7
    assert len(fig.axes) == planes * (panels + 1)  # and a colour bar each
    assert {"fixed", "moving", "moved", "overlay before", "overlay after", "grid"} < set(texts(fig))
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")


def test_a_report_says_what_it_is_for_and_what_was_measured():
    metrics = {
        "dice": {"before": 0.52, "after": 0.7123},
        "folding_percent": 0.0,
        "steps": 12,
        "method": "vxm_diff",
        "per_label": [1, 2, 3],
    }
    fig = plot.report(*pair((12, 14)), metrics, title="Subject to fixed", orientation="RA")
    assert "For research and teaching. Not a medical device." in texts(fig)
    assert "Subject to fixed" in texts(fig)
    (line,) = [t for t in texts(fig) if "dice" in t]
    for word in ("dice 0.52 → 0.712", "folding percent 0", "steps 12", "method vxm_diff"):
        assert word in line
    assert "per label" not in line
    assert [t.get_text() for t in fig.axes[0].texts] == ["R", "A"]


def test_a_report_of_constant_images_is_drawn():
    image = torch.zeros(1, 1, 8, 8, 8)
    plot.report(image, image, image, torch.zeros(1, 3, 8, 8, 8)).savefig(io.BytesIO())


def test_figures_are_not_kept_by_pyplot():
    plot.report(*pair((12, 14)))
    plot.panels(2)
    assert pyplot.get_fignums() == []


def test_the_style_of_others_is_left_alone():
    before = dict(pyplot.rcParams)
    plot.report(*pair((12, 14))).savefig(io.BytesIO())
    assert dict(pyplot.rcParams) == before
