"""Pictures that answer to the hand: in Jupyter, in Colab, and on a page without a kernel.

`sliders` needs the package `ipywidgets`, and some of it Python behind the page. `views` needs a
browser alone: what it makes also works in a saved file, without network.
"""

from regkit.widgets.sliders import amplitude, explore, frames, moved_by, turn
from regkit.widgets.views import View, compare, path, series, show, volumes

__all__ = [
    "View",
    "amplitude",
    "compare",
    "explore",
    "frames",
    "moved_by",
    "path",
    "series",
    "show",
    "turn",
    "volumes",
]
