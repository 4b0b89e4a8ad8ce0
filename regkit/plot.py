"""Figures: what registration looks like. Every function draws on matplotlib axes it is given.

    fig, (left, right) = plot.panels(2)
    plot.image(fixed, left, title="fixed")
    plot.grid(disp, right)
    fig

Array axis 0 runs to the right and axis 1 up, so a slice whose axes run to the patient's right and
front stands upright. Coordinates in a figure are voxel indices; `spacing` stretches the picture to
its true proportions. Of a volume, one plane is shown: `axis` is the array axis one looks along,
`index` the voxel on it (the middle by default).

Images are taken as (1, 1, *S), (1, *S) or S, displacements as (1, d, *S) or (d, *S), tensors or
arrays. Figures are plain `Figure` objects: nothing here touches pyplot's list of open figures.
Colours are safe for colour-blind readers and keep their order of lightness in grey print.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from regkit.spatial import jacobian_determinant
from regkit.transform import background

# Okabe and Ito's palette, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, GREY = "#56B4E9", "#E69F00", "#6E6E6E"

STYLE: Any = {
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, PINK, SKY, AMBER]),
    "axes.grid": False,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.figsize": (6.0, 3.0),
    "font.size": 9,
    "image.cmap": "gray",
    "image.interpolation": "nearest",
    "image.origin": "lower",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "savefig.dpi": 100,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
NOTICE = "For research and teaching. Not a medical device."
KEY = (
    "Overlays: green is fixed, magenta is the other image, grey is agreement. "
    "Jacobian: purple is enlarged, orange is squeezed, black is folded."
)
KEY_OF_TRUST = " Trust: the redder the less."


def panels(
    columns: int, rows: int = 1, size: float = 2.4, height: float | None = None
) -> tuple[Figure, NDArray[Any]]:
    """A new figure and its axes: an array of `columns` axes, or (rows, columns) of them.

    Args:
        columns, rows: how many panels.
        size: width of a panel, inches.
        height: height of a panel, inches; `size` by default.
    """
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(columns * size, rows * (height or size)), layout="compressed")
        axes = fig.subplots(rows, columns, squeeze=False)
    return fig, axes[0] if rows == 1 else axes


# ------------------------------------------------------------------------ arrays and planes


def _numbers(x: Tensor | ArrayLike) -> NDArray[Any]:
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() else x
    return np.asarray(x)


def _spatial(x: Tensor | ArrayLike, name: str = "image") -> NDArray[Any]:
    """An image as array of shape S, from (1, 1, *S), (1, *S) or S."""
    array = _numbers(x)
    if array.ndim in (4, 5) and array.shape[:2] == (1, 1):
        return array.reshape(array.shape[2:])
    if array.ndim in (3, 4) and array.shape[0] == 1:
        return array.reshape(array.shape[1:])
    if array.ndim not in (2, 3):
        raise ValueError(
            f"{name} has shape {array.shape}, expected one image: (1, 1, *S), (1, *S) or S."
        )
    return array


def _displacement(disp: Tensor | ArrayLike) -> NDArray[Any]:
    """A displacement as array of shape (d, *S), from (1, d, *S) or (d, *S)."""
    array = _numbers(disp)
    if array.ndim in (4, 5) and array.shape[:2] == (1, array.ndim - 2):
        return array.reshape(array.shape[1:])
    if array.ndim in (3, 4) and array.shape[0] == array.ndim - 1:
        return array
    raise ValueError(
        f"disp has shape {array.shape}, expected one displacement: (1, d, *S) or (d, *S)."
    )


def _in_plane(d: int, axis: int) -> list[int]:
    """The two array axes one sees: the first is drawn to the right, the second up."""
    return [0, 1] if d == 2 else [i for i in range(3) if i != axis % 3]


def _cut(x: NDArray[Any], axis: int, index: int | None) -> NDArray[Any]:
    """The plane `index` of a volume across `axis`; a 2D array is its own plane."""
    if x.ndim == 2:
        return x
    plane: NDArray[Any] = x.take(x.shape[axis] // 2 if index is None else index, axis)
    return plane


def _frame(
    ax: Axes,
    shape: Sequence[int],
    axis: int = 2,
    spacing: float | Sequence[float] = 1.0,
    title: str = "",
) -> None:
    """Give axes the limits and proportions of an image plane, without ticks."""
    d = len(shape)
    right, up = _in_plane(d, axis)
    size = np.broadcast_to(np.asarray(spacing, dtype=float), d)
    ax.set(xlim=(-0.5, shape[right] - 0.5), ylim=(-0.5, shape[up] - 0.5), xticks=[], yticks=[])
    ax.set_aspect(size[up] / size[right])
    for spine in ax.spines.values():
        spine.set_visible(False)
    if title:
        ax.set_title(title)


def window(image: Tensor | ArrayLike) -> tuple[float, float]:
    """Intensities to show as black and white: the 0.5th and 99.5th percentile."""
    low, high = np.nanpercentile(_numbers(image), [0.5, 99.5])
    return float(low), float(high if high > low else low + 1)


def _unit(image: NDArray[Any], limits: tuple[float, float]) -> NDArray[Any]:
    unit: NDArray[Any] = np.clip((image - limits[0]) / (limits[1] - limits[0]), 0, 1)
    return unit


# -------------------------------------------------------------------------- images and labels


def image(
    x: Tensor | ArrayLike,
    ax: Axes,
    title: str = "",
    limits: tuple[float, float] | None = None,
    cmap: str | Colormap = "gray",
    spacing: float | Sequence[float] = 1.0,
    axis: int = 2,
    index: int | None = None,
) -> AxesImage:
    """Show an image, or one plane of a volume. Voxels are drawn as they are, not smoothed.

    Args:
        x: (1, 1, *S), (1, *S) or S.
        limits: intensities drawn as black and white; percentiles of `x` by default.
    """
    array = _spatial(x)
    low, high = limits or window(array)
    _frame(ax, array.shape, axis, spacing, title)
    return ax.imshow(
        _cut(array, axis, index).T,
        origin="lower",
        interpolation="nearest",
        aspect=ax.get_aspect(),
        cmap=cmap,
        vmin=low,
        vmax=high,
    )


def outlines(
    labels: Tensor | ArrayLike,
    ax: Axes,
    colour: str = ORANGE,
    width: float = 0.8,
    only: Sequence[int] | None = None,
    axis: int = 2,
    index: int | None = None,
) -> None:
    """Draw the borders of a label map over what the axes already show.

    Args:
        labels: (1, 1, *S), (1, *S) or S, whole numbers; 0 is background.
        only: which labels, all by default.
    """
    plane = _cut(_spatial(labels, "labels"), axis, index)
    if only is not None:
        plane = np.where(np.isin(plane, list(only)), plane, 0)
    ax.add_collection(LineCollection(_borders(plane), colors=colour, linewidths=width))


def _borders(plane: NDArray[Any]) -> list[NDArray[Any]]:
    """Line segments between voxels that differ, along voxel edges."""
    padded = np.pad(plane, 1)
    i, j = np.nonzero(padded[1:] != padded[:-1])  # between rows i and i + 1: an edge along axis 1
    across = np.stack([np.stack([i, j - 1], 1), np.stack([i, j], 1)], 1) - np.array([0.5, 0.5])
    k, m = np.nonzero(padded[:, 1:] != padded[:, :-1])
    along = np.stack([np.stack([k - 1, m], 1), np.stack([k, m], 1)], 1) - np.array([0.5, 0.5])
    return list(np.concatenate([across, along]))


def regions(
    labels: Tensor | ArrayLike,
    ax: Axes,
    title: str = "",
    spacing: float | Sequence[float] = 1.0,
    axis: int = 2,
    index: int | None = None,
) -> AxesImage:
    """Fill each label with a colour of its own (neighbouring numbers far apart); 0 is white."""
    array = _spatial(labels, "labels").astype(int)
    count = max(int(array.max()), 1)
    golden = (np.arange(count) * 0.618034) % 1
    colours = np.vstack([[1, 1, 1, 1], matplotlib.colormaps["viridis"](golden)])
    shown = image(
        array, ax, title, (-0.5, count + 0.5), ListedColormap(colours), spacing, axis, index
    )
    outlines(array, ax, "white", 0.6, axis=axis, index=index)
    return shown


# ----------------------------------------------------------------------------- comparing two


def overlay(
    a: Tensor | ArrayLike,
    b: Tensor | ArrayLike,
    ax: Axes,
    title: str = "",
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None,
    spacing: float | Sequence[float] = 1.0,
    axis: int = 2,
    index: int | None = None,
) -> AxesImage:
    """Two images in one: `a` in green, `b` in magenta. Where they agree the picture is grey.

    Args:
        a, b: (1, 1, *S), (1, *S) or S, of the same S.
        limits: intensities drawn as black and white, for `a` and for `b`.
    """
    array_a, array_b = _spatial(a, "a"), _spatial(b, "b")
    limit_a, limit_b = limits or (window(array_a), window(array_b))
    green = _unit(_cut(array_a, axis, index), limit_a).T
    magenta = _unit(_cut(array_b, axis, index), limit_b).T
    _frame(ax, array_a.shape, axis, spacing, title)
    return ax.imshow(
        np.stack([magenta, green, magenta], axis=-1),
        origin="lower",
        interpolation="nearest",
        aspect=ax.get_aspect(),
    )


def checkerboard(
    a: Tensor | ArrayLike,
    b: Tensor | ArrayLike,
    ax: Axes,
    title: str = "",
    squares: int = 8,
    spacing: float | Sequence[float] = 1.0,
    axis: int = 2,
    index: int | None = None,
) -> AxesImage:
    """Squares of `a` and `b` in turn: edges run on across the squares where the two agree."""
    array_a, array_b = _spatial(a, "a"), _spatial(b, "b")
    plane_a = _unit(_cut(array_a, axis, index), window(array_a))
    plane_b = _unit(_cut(array_b, axis, index), window(array_b))
    i, j = np.indices(plane_a.shape)
    edge = max(max(plane_a.shape) / squares, 1)
    chosen = (i // edge + j // edge) % 2 == 0
    _frame(ax, array_a.shape, axis, spacing, title)
    return ax.imshow(
        np.where(chosen, plane_a, plane_b).T,
        origin="lower",
        interpolation="nearest",
        aspect=ax.get_aspect(),
        cmap="gray",
        vmin=0,
        vmax=1,
    )


def difference(
    a: Tensor | ArrayLike,
    b: Tensor | ArrayLike,
    ax: Axes,
    title: str = "",
    limit: float | None = None,
    spacing: float | Sequence[float] = 1.0,
    axis: int = 2,
    index: int | None = None,
) -> AxesImage:
    """a - b: white where they agree, orange where `a` is brighter, purple where `b` is.

    Args:
        limit: the difference drawn in the darkest colour; the 99.5th percentile by default.
    """
    delta = _spatial(a, "a") - _spatial(b, "b")
    top = limit or float(np.nanpercentile(abs(delta), 99.5)) or 1.0
    return image(delta, ax, title, (-top, top), "PuOr_r", spacing, axis, index)


# ----------------------------------------------------------------------------- displacements


def grid(
    disp: Tensor | ArrayLike,
    ax: Axes,
    title: str = "",
    step: int | None = None,
    colour: str | None = None,
    width: float = 0.7,
    limit: float | None = None,
    spacing: float | Sequence[float] = 1.0,
    axis: int = 2,
    index: int | None = None,
) -> None:
    """Draw the lines of the fixed grid at x + disp(x): where they look in the moving image.

    The picture lives in the moving image, so it can be drawn over it. Lines that crowd together
    read a small part of the moving image, which the warp therefore enlarges; lines far apart make
    what lies between them smaller. Where lines cross over, the map folds. This is the pull-back map
    itself; a grid that is warped like an image would show its inverse.

    Args:
        disp: (1, d, *S) or (d, *S), voxels. Of a volume the two components in the plane are drawn.
        step: voxels between lines; about 24 lines along the longer side by default.
        colour: by default blue on paper, amber over an image.
        limit: colour each piece of a line by the length of the displacement there instead, from
            pale where nothing moves to dark at `limit` voxels.
    """
    field = _displacement(disp)
    shape = field.shape[1:]
    right, up = _in_plane(len(shape), axis)
    u, v = _cut(field[right], axis, index), _cut(field[up], axis, index)
    i, j = np.indices(u.shape)
    nodes = np.stack([i + u, j + v], axis=-1)
    step = step or max(1, round(max(u.shape) / 24))
    lines = [nodes[k] for k in _every(step, u.shape[0])]
    lines += [nodes[:, k] for k in _every(step, u.shape[1])]
    colour = colour or (AMBER if ax.images else BLUE)
    if not ax.images:  # over an image the frame is already there
        _frame(ax, shape, axis, spacing)
    if title:
        ax.set_title(title)
    if limit is None:
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=width))
        return
    length = _cut(np.linalg.norm(field, axis=0), axis, index)
    lengths = [length[k] for k in _every(step, u.shape[0])]
    lengths += [length[:, k] for k in _every(step, u.shape[1])]
    pieces = np.concatenate([np.stack([line[:-1], line[1:]], axis=1) for line in lines])
    colours = matplotlib.colormaps["cividis_r"](np.linspace(0.08, 1, 255))  # yellow fades on paper
    drawn = LineCollection(list(pieces), cmap=ListedColormap(colours), linewidths=width)
    drawn.set_array(np.concatenate([(at[:-1] + at[1:]) / 2 for at in lengths]))
    drawn.set_clim(0, limit)
    ax.add_collection(drawn)


def _every(step: int, n: int) -> range:
    """Each `step`-th index, with the same margin on both sides."""
    return range(((n - 1) % step) // 2, n, step)


def arrows(
    disp: Tensor | ArrayLike,
    ax: Axes,
    title: str = "",
    step: int | None = None,
    colour: str | None = None,
    spacing: float | Sequence[float] = 1.0,
    axis: int = 2,
    index: int | None = None,
) -> None:
    """Draw arrows in true length from voxels x of the fixed grid to x + disp(x), where they look.

    Args and defaults as in `grid`.
    """
    field = _displacement(disp)
    shape = field.shape[1:]
    right, up = _in_plane(len(shape), axis)
    u, v = _cut(field[right], axis, index), _cut(field[up], axis, index)
    step = step or max(1, round(max(u.shape) / 24))
    i, j = np.meshgrid(_every(step, u.shape[0]), _every(step, u.shape[1]), indexing="ij")
    colour = colour or (AMBER if ax.images else BLUE)
    if not ax.images:
        _frame(ax, shape, axis, spacing)
    if title:
        ax.set_title(title)
    ax.quiver(
        i, j, u[i, j], v[i, j],
        angles="xy", scale_units="xy", scale=1, color=colour,
        width=0.006, headwidth=4, headlength=4.5, minlength=0.2,
    )  # fmt: skip


def jacobian(
    disp: Tensor | ArrayLike,
    ax: Axes,
    title: str = "",
    limit: float = 3.0,
    bar: bool = True,
    spacing: float | Sequence[float] = 1.0,
    axis: int = 2,
    index: int | None = None,
) -> AxesImage:
    """Map the Jacobian determinant of x + disp(x), in log scale about 1; folded voxels are black.

    White: size is kept. Purple: below 1, a small part of the moving image is enlarged. Orange:
    above 1, a large part is squeezed. Black: 0 or less, the map folds there.

    Args:
        disp: (1, d, *S) or (d, *S), voxels.
        limit: the determinant drawn in the darkest orange; 1/limit has the darkest purple.
        bar: add a colour bar.
    """
    field = np.ascontiguousarray(_displacement(disp))
    det = jacobian_determinant(torch.from_numpy(field)[None])[0].numpy()
    plane = _cut(det, axis, index)
    folded = plane <= 0
    log = np.where(folded, np.nan, np.log(np.where(folded, 1, plane)))  # NaN is drawn as bad
    # without the darkest ends, so that black stands out
    colours = matplotlib.colormaps["PuOr_r"](np.linspace(0.12, 0.88, 255))
    _frame(ax, det.shape, axis, spacing, title)
    top = float(np.log(limit))
    shown = ax.imshow(
        log.T,
        origin="lower",
        interpolation="nearest",
        aspect=ax.get_aspect(),
        cmap=ListedColormap(colours).with_extremes(bad="black"),
        vmin=-top,
        vmax=top,
    )
    if bar:
        _beside(ax, shown, _log_bar)
    return shown


def _beside(ax: Axes, shown: AxesImage, draw: Callable[..., None]) -> None:
    """A colour bar beside one panel."""
    figure = ax.figure
    assert isinstance(figure, Figure)
    draw(figure, shown, None, ax=ax, shrink=0.8, pad=0.03, aspect=18)


def _log_bar(fig: Figure, shown: AxesImage, cax: Axes | None, **where: Any) -> None:
    """A colour bar for `jacobian`, labelled with determinants."""
    bar = fig.colorbar(shown, cax=cax, **where)
    top = shown.get_clim()[1] or 0.0
    bar.set_ticks([-top, 0, top], labels=[f"{np.exp(t):.2g}" for t in (-top, 0, top)])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def trust(
    values: Tensor | ArrayLike,
    fixed: Tensor | ArrayLike,
    ax: Axes,
    title: str = "",
    bar: bool = True,
    spacing: float | Sequence[float] = 1.0,
    axis: int = 2,
    index: int | None = None,
) -> AxesImage:
    """Draw how far a registration may be trusted over the fixed image, where that shows something.

    Grey: trusted, the image is as it is. From yellow to dark red: less and less.

    Args:
        values: (1, 1, *S), (1, *S) or (S), in [0, 1], as of `regkit.trust.trust_map`.
        fixed: of the same shape.
        bar: add a colour bar.
    """
    target, unsure = _spatial(fixed, "fixed"), 1 - _spatial(values, "values")
    image(fixed, ax, title=title, spacing=spacing, axis=axis, index=index)
    greys = _unit(target, window(target))
    empty = float(background(torch.from_numpy(np.ascontiguousarray(greys))[None, None]))
    plane = np.where(np.abs(greys - empty) < 0.05, np.nan, unsure)
    colours = matplotlib.colormaps["YlOrRd"](np.linspace(0.1, 1, 256))
    colours[:, 3] = np.linspace(0, 1, 256) ** 0.5  # what is trusted stays visible
    shown = ax.imshow(
        _cut(plane, axis, index).T,
        origin="lower",
        interpolation="nearest",
        aspect=ax.get_aspect(),
        cmap=ListedColormap(colours),
        vmin=0,
        vmax=1,
    )
    if bar:
        _beside(ax, shown, _trust_bar)
    return shown


def _trust_bar(fig: Figure, shown: AxesImage, cax: Axes | None, **where: Any) -> None:
    """A colour bar for `trust`, with 1, trusted, at its top."""
    bar = fig.colorbar(shown, cax=cax, **where)
    bar.ax.invert_yaxis()
    bar.set_ticks([0, 0.5, 1], labels=["1", "0.5", "0"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


# ------------------------------------------------------------------------------------ curves


def curves(
    values: Mapping[str, Sequence[float]],
    ax: Axes,
    x: Sequence[float] | None = None,
    xlabel: str = "step",
    ylabel: str = "",
    log: bool = False,
    smooth: int = 1,
) -> None:
    """Draw one line per name, with the name written at its end instead of in a legend.

    Args:
        values: name -> numbers, such as the terms of a loss.
        x: positions; 0, 1, 2, ... by default.
        smooth: width of a running mean; the raw values stay as a thin line behind it.
    """
    for colour, (name, numbers) in zip(
        STYLE["axes.prop_cycle"].by_key()["color"] * 9, values.items()
    ):
        y = np.asarray(numbers, dtype=float)
        at = np.arange(len(y)) if x is None else np.asarray(x, dtype=float)
        if smooth > 1 and len(y) > smooth:
            ax.plot(at, y, color=colour, linewidth=0.5, alpha=0.35)
            y = np.convolve(y, np.full(smooth, 1 / smooth), mode="valid")
            at = at[smooth // 2 : smooth // 2 + len(y)]
        ax.plot(at, y, color=colour)
        if len(y):
            ax.annotate(
                f" {name}", (at[-1], y[-1]), color=colour, va="center", annotation_clip=False
            )
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if log:
        ax.set_yscale("log")
    elif not ax.get_legend():
        ax.yaxis.set_major_locator(MaxNLocator(5))


# ------------------------------------------------------------------------------------ report


def report(
    moving: Tensor,
    fixed: Tensor,
    moved: Tensor,
    disp: Tensor,
    metrics: Mapping[str, Any] | None = None,
    title: str = "Registration",
    spacing: float | Sequence[float] = 1.0,
    orientation: Sequence[str] = (),
    trust: Tensor | None = None,
) -> Figure:
    """One page on one registration: before and after, the deformation grid, the Jacobian, numbers.

    A row per plane (three of a volume, one of a slice), through the middle of what is bright in the
    fixed image. The overlays show fixed in green and the other image in magenta: grey is agreement.

    Args:
        moving, fixed, moved: (1, 1, *S), all on the fixed grid.
        disp: (1, d, *S), voxels.
        metrics: name -> number, text, or {"before": number, "after": number}; anything else is
            left out.
        title: the first line. Keep names of people and files out of it.
        spacing: voxel size along each axis, mm.
        orientation: where each array axis runs to, such as "RAS"; letters at the edges say so.
        trust: (1, 1, *S), as of `regkit.trust.trust_map`; a panel more.

    Returns:
        A figure; `figure.savefig(path)` writes it.
    """
    d = disp.shape[1]
    target = _spatial(fixed, "fixed")
    limits, target_limits = window(moving), window(fixed)
    size = np.broadcast_to(np.asarray(spacing, dtype=float), d)
    middle = _middle(target)
    planes = [2] if d == 2 else [2, 1, 0]
    planes = [a for a in planes if all(target.shape[k] > 1 for k in _in_plane(d, a))] or planes
    both = (target_limits, limits)
    draw: dict[str, Callable[..., Any]] = {
        "fixed": partial(image, fixed, limits=target_limits),
        "moving": partial(image, moving, limits=limits),
        "moved": partial(image, moved, limits=limits),
        "checkerboard": partial(checkerboard, fixed, moved),
        "overlay before": partial(overlay, fixed, moving, limits=both),
        "overlay after": partial(overlay, fixed, moved, limits=both),
        "grid": partial(grid, disp),
        "Jacobian": partial(jacobian, disp, bar=False),
    }
    if d == 3:
        del draw["checkerboard"]
    if trust is not None:
        draw["trust"] = partial(draw_trust, trust, fixed, bar=False)

    page = _Page(
        d, [size[k] * n for k, n in enumerate(target.shape)], planes, list(draw), metrics or {}
    )
    with matplotlib.rc_context(STYLE | {"figure.constrained_layout.use": False}):
        fig = Figure(figsize=(page.width, page.height), facecolor="white", dpi=150)
        for name, axis, box in page.boxes():
            ax = fig.add_axes(box)
            shown = draw[name](ax, axis=axis, index=middle[axis % d], spacing=size)
            if d == 2 or axis == planes[0]:
                ax.set_title(name)
            if name == "fixed" and len(orientation) == d:
                _edge_letters(ax, [orientation[k] for k in _in_plane(d, axis)])
            if name in BARS and shown is not None:
                BARS[name](fig, shown, fig.add_axes(page.bar_box(box)))
        page.write(fig, title)
    return fig


draw_trust = trust  # `report` has an argument of that name
BARS: dict[str, Callable[..., None]] = {"Jacobian": _log_bar, "trust": _trust_bar}


@dataclass
class _Page:
    """Where the parts of a `report` stand, in inches, from the top: title, numbers, panels, notice.

    extent: of the image, mm. planes: the axes that its rows look along. names: of the panels.
    """

    d: int
    extent: Sequence[float]
    planes: Sequence[int]
    names: Sequence[str]
    metrics: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.panel, self.gap, self.margin = (1.9, 0.08, 0.3) if self.d == 3 else (2.6, 0.1, 0.3)
        self.above, self.bar = 0.3, 0.75  # room for titles over a row, and for a colour bar
        most = len(self.names) if self.d == 3 else (len(self.names) + 1) // 2
        parts = [self.names[k : k + most] for k in range(0, len(self.names), most)]
        self.width = 2 * self.margin + max(map(self.room, parts))
        self.lines = _metric_lines(self.metrics, int(self.width / 2.3))
        self.rows = [(axis, part) for axis in self.planes for part in parts]
        self.heights = []
        for axis, _ in self.rows:
            right, up = (self.extent[k] for k in _in_plane(self.d, axis))
            self.heights.append(self.panel * float(np.clip(up / right, 0.3, 2.0)))
        self.titled = [self.d == 2 or n == 0 for n in range(len(self.rows))]
        self.head = 0.65 + 0.24 * len(self.lines)
        panels = sum(self.heights) + self.above * sum(self.titled) + self.gap * len(self.rows)
        self.height = self.head + panels + 0.6

    def room(self, names: Sequence[str]) -> float:
        """How wide some panels are, with their colour bars."""
        return len(names) * (self.panel + self.gap) + self.bar * sum(name in BARS for name in names)

    def boxes(self) -> Iterator[tuple[str, int, tuple[float, float, float, float]]]:
        """Of each panel its name, the axis it looks along, and (left, bottom, width, height) in
        fractions of the page."""
        top = self.height - self.head
        for (axis, row), tall, titled in zip(self.rows, self.heights, self.titled):
            top -= self.above if titled else 0
            for column, name in enumerate(row):
                left = self.margin + self.room(row[:column])
                place = left / self.width, (top - tall) / self.height
                yield name, axis, (*place, self.panel / self.width, tall / self.height)
            top -= tall + self.gap

    def bar_box(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """The box of a colour bar to the right of a panel."""
        left, bottom, width, height = box
        return (
            left + width + 0.1 / self.width,
            bottom + 0.1 * height,
            0.1 / self.width,
            0.8 * height,
        )

    def write(self, fig: Figure, title: str) -> None:
        """The title, the numbers and the notice."""
        start = self.margin / self.width
        # the title may hold the name of a file: two dollar signs in it are no formula
        place = start, 1 - 0.2 / self.height
        fig.text(*place, title, fontsize=14, weight="bold", va="top", parse_math=False)
        for n, line in enumerate(self.lines):
            fig.text(start, 1 - (0.55 + 0.24 * n) / self.height, line, fontsize=10, va="top")
        key = KEY + (KEY_OF_TRUST if "trust" in self.names else "")
        fig.text(start, 0.34 / self.height, key, fontsize=9)
        fig.text(start, 0.14 / self.height, NOTICE, fontsize=9, color=GREY)


def _middle(target: NDArray[Any]) -> list[int]:
    """The voxel in the middle of what is brighter than the mean."""
    bright = np.nonzero(target > target.mean())
    return [int(i.mean()) if len(i) else n // 2 for i, n in zip(bright, target.shape)]


def _metric_lines(metrics: Mapping[str, Any], per_line: int) -> list[str]:
    """The numbers as text, several to a line."""

    def text(value: Any) -> str | None:
        if isinstance(value, Mapping) and set(value) == {"before", "after"}:
            return f"{text(value['before'])} \u2192 {text(value['after'])}"
        if isinstance(value, str):
            return value
        if isinstance(value, int | np.integer):  # True and False too
            return str(value)
        if isinstance(value, float | np.floating):
            return f"{value:.3g}"
        return None

    written = {str(name).replace("_", " "): text(value) for name, value in metrics.items()}
    words = [f"{name} {value}" for name, value in written.items() if value is not None]
    return ["     ".join(words[k : k + per_line]) for k in range(0, len(words), per_line)]


def _edge_letters(ax: Axes, towards: Sequence[str]) -> None:
    """Letters at the right and upper edge: what the drawn axes run to."""
    style: dict[str, Any] = {"transform": ax.transAxes, "color": AMBER, "fontsize": 9}
    ax.text(0.98, 0.5, towards[0], ha="right", va="center", **style)
    ax.text(0.5, 0.98, towards[1], ha="center", va="top", **style)
