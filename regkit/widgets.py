"""Sliders that work in Jupyter, in Colab, and on a page of the book that has no kernel behind it.

A slider with a Python callback is dead on such a page. Here every position of the slider is drawn
beforehand, and the browser alone switches between the pictures.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from regkit import plot
from regkit.spatial import warp

if TYPE_CHECKING:
    import ipywidgets

# The pictures are the pages of a Tab (ipywidgets 7 has no Stack), whose own bar is hidden.
HIDE_BAR = """<style>
.regkit-frames > .p-TabBar, .regkit-frames > .lm-TabBar { display: none !important; }
.regkit-frames > .widget-tab-contents { border: none !important; padding: 0 !important; }
.regkit-frames img { max-width: 100%; }
</style>"""


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
    import ipywidgets

    pages = [ipywidgets.HTML(_picture(draw(v), f"{label} {v:.3g}".strip())) for v in values]
    stack = ipywidgets.Tab(children=pages, selected_index=start)
    stack.add_class("regkit-frames")
    slider = ipywidgets.IntSlider(
        value=start, max=len(pages) - 1, readout=False, description=label
    )  # no Play button: the book's theme replaces its icon, which the button then cannot find
    ipywidgets.jslink((slider, "value"), (stack, "selected_index"))
    return ipywidgets.VBox([ipywidgets.HTML(HIDE_BAR), slider, stack])


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
