"""Sliders of ipywidgets that work in Jupyter, in Colab, and on a page of the book without a kernel.

A slider with a Python callback is dead on such a page. Here every position of the slider is drawn
beforehand, and the browser alone switches between the pictures. Where a widget has live sliders as
well, they carry the class `regkit-live`, and the book's style sheet hides them.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from regkit import losses, plot
from regkit.messages import install
from regkit.spatial import affine_to_disp, rigid_theta, warp

if TYPE_CHECKING:
    import ipywidgets

# The pictures are the pages of a Tab (ipywidgets 7 has no Stack), whose own bar is hidden.
HIDE_BAR = """<style>
.regkit-frames > .p-TabBar, .regkit-frames > .lm-TabBar { display: none !important; }
.regkit-frames > .widget-tab-contents { border: none !important; padding: 0 !important; }
.regkit-frames img { max-width: 100%; }
</style>"""


def _ipywidgets() -> Any:
    """The package `ipywidgets`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import ipywidgets
    except ImportError:
        raise ImportError(
            f"ipywidgets is not installed, expected it for sliders: {install('notebook')}."
        ) from None
    return ipywidgets


def frames(
    draw: Callable[[float], Figure], values: Sequence[float], label: str = "", start: int = 0
) -> ipywidgets.VBox:
    """A slider over figures: draw(value) for each of the values, shown one at a time.

    Args:
        draw: value -> figure. All figures should have one size.
        values: what the slider runs through. Ten small figures take about 0.25 MB of the notebook.
        label: what the value is, for the caption and for readers who cannot see the picture.
        start: position at first.
    """
    kit = _ipywidgets()

    pages = [kit.HTML(_picture(draw(v), f"{label} {v:.3g}".strip())) for v in values]
    stack = kit.Tab(children=pages, selected_index=start)
    stack.add_class("regkit-frames")
    slider = kit.IntSlider(
        value=start, max=len(pages) - 1, readout=False, description=label
    )  # no Play button: the book's theme replaces its icon, which the button then cannot find
    kit.jslink((slider, "value"), (stack, "selected_index"))
    return kit.VBox([kit.HTML(HIDE_BAR), slider, stack])


def _picture(fig: Figure, alt: str) -> str:
    """The figure as an HTML image that carries its own bytes, and the value below it."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="webp", dpi=90, pil_kwargs={"quality": 40})
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(alt)
    return f'<img alt="{text}" src="data:image/webp;base64,{data}"><div>{text}</div>'


def amplitude(image: Tensor, disp: Tensor, values: Sequence[float] = (1, 2, 3)) -> Figure:
    """Several multiples of a displacement: the moved image, the grid, the Jacobian determinant.

    The figure on paper that `explore` is on screen.

    Args:
        image: (1, 1, H, W).
        disp: (1, 2, H, W), voxels.
        values: the multiples, one column each.
    """
    fig, axes = plot.panels(len(values), 3, size=1.5, height=1.8)
    for column, value in zip(axes.T, values):
        _draw(image, value * disp, column)
        column[0].set_title(f"{value:g} × disp")
    for ax, name in zip(axes[:, 0], ("moved", "grid", "Jacobian")):
        ax.set_ylabel(name)
    return fig


def explore(image: Tensor, disp: Tensor, values: Sequence[float] | None = None) -> ipywidgets.VBox:
    """A slider for the amplitude of a 2D displacement, with the three pictures of `amplitude`.

    Args and units as in `amplitude`; by default seven multiples from 0 to 3.
    """

    def draw(value: float) -> Figure:
        fig, axes = plot.panels(3, size=1.9, height=2.3)
        _draw(image, value * disp, axes)
        return fig

    values = np.linspace(0, 3, 7).tolist() if values is None else values
    return frames(draw, values, label="amplitude")


def _draw(image: Tensor, disp: Tensor, axes: Sequence[Axes] | np.ndarray) -> None:
    plot.image(warp(image, disp), axes[0], limits=plot.window(image))
    plot.image(image, axes[1])
    plot.grid(disp, axes[1])
    plot.jacobian(disp, axes[2], bar=False)


def turn(
    moving: Tensor,
    fixed: Tensor,
    angles: Sequence[float] | None = None,
    shift: tuple[float, float] = (0.0, 0.0),
) -> ipywidgets.VBox:
    """Register a pair by hand: turn the moving image, and watch how alike the two are.

    One slider runs through pictures that are drawn beforehand and works everywhere. Below it, where
    Python is listening, three more turn and shift to any place.

    Args:
        moving, fixed: (1, 1, H, W).
        angles: degrees, for the pictures drawn beforehand; by default 13 from -12 to 12.
        shift: voxels, for the same pictures.
    """
    kit = _ipywidgets()

    angles = np.linspace(-12, 12, 13).tolist() if angles is None else list(angles)
    curve = [(angle, *_alike(moved_by(moving, angle, shift), fixed)) for angle in angles]

    def draw(angle: float, shift: tuple[float, float] = shift) -> Figure:
        return _by_hand(moving, fixed, angle, shift, curve)

    start = min(range(len(angles)), key=lambda k: abs(angles[k]))
    ready = frames(draw, angles, label="degrees", start=start)

    def slider(name: str, reach: float, step: float) -> ipywidgets.FloatSlider:
        return kit.FloatSlider(min=-reach, max=reach, step=step, description=name)

    by_hand = [slider("degrees", 30, 0.5), slider("axis 0", 20, 0.5), slider("axis 1", 20, 0.5)]
    picture = kit.HTML()

    def show(_: object = None) -> None:
        angle, *there = (one.value for one in by_hand)
        moved = moved_by(moving, angle, (there[0], there[1]))
        r, mi = _alike(moved, fixed)
        text = f"{angle:g} degrees, {there[0]:g} and {there[1]:g} voxels: r {r:.3f}, MI {mi:.3f}"
        picture.value = _picture(draw(angle, (there[0], there[1])), text)

    for one in by_hand:
        one.observe(show, "value")
    show()
    live = kit.VBox([*by_hand, picture])
    live.add_class("regkit-live")
    return kit.VBox([ready, live])


def moved_by(moving: Tensor, angle: float, shift: Sequence[float] = (0.0, 0.0)) -> Tensor:
    """The moving image (1, 1, H, W) after a rigid motion in 2D.

    Args:
        angle: degrees.
        shift: voxels, along each axis.
    """
    theta = rigid_theta(
        torch.tensor([[math.radians(angle)]], dtype=torch.float32),
        torch.tensor([list(shift)], dtype=torch.float32),
    )
    return warp(moving, affine_to_disp(theta.to(moving), moving.shape[2:]))


def _alike(moved: Tensor, fixed: Tensor) -> tuple[float, float]:
    """Correlation, and mutual information in nats."""
    return 1 - float(losses.ncc(moved, fixed)), -float(losses.mutual_information(moved, fixed))


def _by_hand(
    moving: Tensor,
    fixed: Tensor,
    angle: float,
    shift: tuple[float, float],
    curve: Sequence[tuple[float, float, float]],
) -> Figure:
    """Overlay, difference image, and the two similarities over the angle with a dot for this one.

    curve: (angle, correlation, mutual information), the lines on which the dots run.
    """
    fig, axes = plot.panels(4, size=1.9, height=2.2)
    moved = moved_by(moving, angle, shift)
    limits = plot.window(fixed)
    plot.overlay(fixed, moved, axes[0], "overlay")
    plot.image((fixed - moved).abs(), axes[1], "|fixed \u2212 moved|", (0, limits[1] / 2))
    at, *lines = zip(*curve)
    colours = plot.BLUE, plot.ORANGE
    for ax, name, line, now, colour in zip(
        axes[2:], ("correlation", "mutual information"), lines, _alike(moved, fixed), colours
    ):
        ax.plot(at, line, color=colour)
        ax.plot([angle], [now], "o", color=colour, markersize=8)
        top, low = max(*line, now), min(*line, now)
        room = 0.1 * (top - low) or 0.1
        ax.set(ylim=(low - room, top + room), xlabel="degrees", title=name)
    return fig
