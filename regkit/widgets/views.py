"""Pictures to compare by hand in any browser: no kernel, no network, no package but regkit's own.

    compare(moving, fixed, moved)          # wipe, flicker, checkerboard
    path(moving, fixed, {1: a, 2: b})      # a slider over displacements
    series(draw, values, label="stage")    # a slider over figures
    volumes(moving, fixed, disp=disp)      # three planes that move together
    show(regkit.register(a, b))            # one of these

Each returns a `View`. Its HTML holds the pictures themselves; views.js, in this folder, turns them
into the tool. Where that script does not run, and on paper, the pictures stand side by side.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from regkit import plot
from regkit.registration import Result
from regkit.spatial import jacobian_determinant, warp
from regkit.widgets.cuts import cuts

Pixels = NDArray[np.uint8]
LONGEST = 96  # voxels along an axis of a volume: seven layers of a head are then about a megabyte
WIDEST = 1000  # pixels along the longer axis of a slice that `show` shows
PLANES = ("sagittal", "coronal", "axial")  # across axis 0, 1 and 2 of an upright volume
GREATEST = 3.0  # the Jacobian determinant in the darkest orange, as in `regkit.plot.jacobian`
FOLDED = 0  # the grey value that stands for a folded voxel
COMMENT = re.compile(r"(^|\s)//\s.*$")  # in a script, up to the end of the line
PAGE_STYLE = """:root { color-scheme: light dark }
body { margin: 1rem auto; max-width: 56rem; padding: 0 1rem; font-family: system-ui, sans-serif }
"""


@cache
def assets() -> str:
    """The script and the style sheet as HTML, on one line each, as notebooks count lines.

    The book loads them once and takes these out.
    """
    folder = files(__name__.rpartition(".")[0])
    style, script = (
        " ".join(
            stripped
            for name in ("stack", "views")
            for line in (folder / f"{name}.{kind}").read_text("utf-8").splitlines()
            if (stripped := COMMENT.sub("", line).strip())
        )
        for kind in ("css", "js")
    )
    return (
        f'<style class="regkit-assets">{style}</style>'
        f'<script class="regkit-assets">{script}</script>'
    )


@dataclass(frozen=True)
class View:
    """What the functions of this module return: a notebook shows it, `save` writes a page.

    markup: the HTML, without the script and the style sheet that all views share.
    """

    markup: str = field(repr=False)  # a notebook stores the repr beside the HTML

    def _repr_html_(self) -> str:
        # each time, as in Colab every cell is a page of its own
        return assets() + self.markup

    def save(self, path: str | os.PathLike[str], title: str = "Two images") -> Path:
        """Write a page that any browser opens, with nothing else beside it."""
        name = html.escape(title)
        page = (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{name}</title><style>{PAGE_STYLE}</style>{assets()}</head>"
            f"<body><h1>{name}</h1>{self.markup}<p>{plot.NOTICE}</p></body></html>\n"
        )
        path = Path(path)
        path.write_text(page, encoding="utf-8")
        return path


def show(result: Result, what: str = "") -> View:
    """What `regkit.register` has found: `compare` for two slices, `volumes` for two volumes.

    Large images are averaged down, so that a saved page has less than about three megabytes.

    Args:
        result: of `regkit.register`.
        what: what the images show, for readers who cannot see them.
    """
    page = {name: result._page[name] for name in ("moving", "fixed", "moved", "spacing")}
    if page["fixed"].ndim == 5:
        planes = PLANES if result._page["orientation"] else [f"axis-{k}" for k in range(3)]
        disp = result._page["disp"]
        return volumes(**page, disp=disp, planes=planes, what=what or "a volume")
    h, w = shape = page["fixed"].shape[2:]
    less = min(1.0, WIDEST / max(shape))
    few = max(1, round(h * less)), max(1, round(w * less))
    for name in ("moving", "fixed", "moved"):
        page[name] = functional.adaptive_avg_pool2d(page[name].float(), few)
    page["spacing"] = [mm * n / m for mm, n, m in zip(page["spacing"], shape, few)]
    return compare(**page, what=what or "a slice")


# ------------------------------------------------------------------------------ two images


def compare(
    moving: Tensor | ArrayLike,
    fixed: Tensor | ArrayLike,
    moved: Tensor | ArrayLike | None = None,
    what: str = "a slice",
    spacing: float | Sequence[float] = 1.0,
    axis: int = 2,
    index: int | None = None,
) -> View:
    """Wipe, flicker and checkerboard of the fixed image and the moved one, or the moving one.

    Args:
        moving, fixed, moved: (1, 1, *S), (1, *S) or S, on the fixed grid; without `moved`, the
            moving image alone is compared.
        what: what they show, for readers who cannot see them.
        spacing: voxel size along each axis.
        axis, index: the plane of a volume, as in `regkit.plot`.

    Raises:
        ValueError: the shapes differ.
    """
    given = {"moving": moving, "fixed": fixed, "moved": moved}
    arrays = {name: plot._spatial(x, name) for name, x in given.items() if x is not None}
    shape = arrays["fixed"].shape
    for name, array in arrays.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected that of fixed, {shape}.")
    limits = {name: plot.window(arrays[_measure(name)]) for name in arrays}
    pictures = {
        name: _upright(plot._cut(_grey(array, limits[name]), axis, index))
        for name, array in arrays.items()
    }
    right, up = plot._in_plane(len(shape), axis)
    size = np.broadcast_to(np.asarray(spacing, dtype=float), len(shape))
    extent = shape[right] * size[right], shape[up] * size[up]
    return View(_root("compare", what, _still(pictures, what, extent)))


def _measure(name: str) -> str:
    """The image whose window a picture is shown in: a moved one in that of the moving one."""
    return "fixed" if name == "fixed" else "moving"


def _grey(array: NDArray[Any], limits: tuple[float, float]) -> Pixels:
    """Intensities as 0 (the lower limit, and NaN) to 255."""
    low, high = limits
    unit = np.clip((np.nan_to_num(array, nan=low) - low) / (high - low), 0, 1)
    grey: Pixels = np.round(255 * unit).astype(np.uint8)
    return grey


def _upright(plane: Pixels) -> Pixels:
    """Array axis 0 to the right, axis 1 up, as `regkit.plot` draws it, in rows from the top."""
    return np.ascontiguousarray(plane.T[::-1])


def _encoded(pixels: Pixels, lossless: bool = False) -> str:
    return _webp(Image.fromarray(pixels).convert("RGB"), quality=80, lossless=lossless)


def _webp(picture: Image.Image, quality: int, lossless: bool = False) -> str:
    """A picture as a data URI; WebP, as a PNG of the same slice has about four times the bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=quality, method=6, lossless=lossless)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _drawn(fig: Figure) -> Image.Image:
    """The figure as a picture, a hundred pixels an inch."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer).convert("RGB")


def _still(pictures: Mapping[str, Pixels], what: str, extent: tuple[float, float]) -> str:
    """The pictures side by side, each with its name: what stands there without the script."""
    shape = f"{extent[0]:g} / {extent[1]:g}"
    figures = (
        f'<figure style="flex: 1 1 9rem; margin: 0"><img data-name="{name}" '
        f'alt="{html.escape(f"{name}: {what}")}" style="aspect-ratio: {shape}; width: 100%" '
        f'src="{_encoded(pixels)}">'
        f"<figcaption>{name}</figcaption></figure>"
        for name, pixels in pictures.items()
    )
    return "".join(figures)


def _root(kind: str, label: str, still: str, data: str = "") -> str:
    """The element that views.js looks for; JupyterLab leaves the keys pressed in it alone."""
    row = "display: flex; flex-wrap: wrap; gap: 0.5rem"
    return (
        f'<div class="regkit-view" data-view="{kind}" data-label="{html.escape(label)}" '
        f'data-lm-suppress-shortcuts="true"><div class="rv-still" style="{row}">{still}</div>'
        f"{data}</div>"
    )


# ----------------------------------------------------------------------------- many figures


def series(
    draw: Callable[[Any], Figure], values: Sequence[float | str], label: str = "", start: int = 0
) -> View:
    """A slider over figures, as `regkit.widgets.frames`, for a browser alone.

    Args:
        draw: value -> figure. All figures should have one size.
        values: what the slider runs through, numbers or names.
        label: what the value is, such as "stage".
        start: position at first.

    Raises:
        ValueError: no values, or a start that is none of their positions.
    """
    if not 0 <= start < len(values):
        raise ValueError(f"start is {start}, expected a position among {len(values)} values.")
    still = []
    for value in values:
        name = value if isinstance(value, str) else f"{value:.3g}"
        text = html.escape(f"{label} {name}".strip())
        picture = _drawn(draw(value))
        columns = " ".join(map(str, cuts(picture)))
        still.append(
            f'<figure style="margin: 0"><img data-name="{text}" data-cuts="{columns}" '
            f'alt="{text}" src="{_webp(picture, quality=50)}" style="max-width: 100%">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    kept = f'<script type="application/json" class="rv-data">{{"start": {start}}}</script>'
    return View(_root("series", label or "value", "".join(still), kept))


def path(
    moving: Tensor,
    fixed: Tensor,
    disps: Mapping[float, Tensor] | Mapping[str, Tensor],
    label: str = "stage",
    start: int = 0,
    size: float = 1.7,
) -> View:
    """A slider over displacements of a pair: moved image, overlay, grid, Jacobian determinant.

    Args:
        moving, fixed: (1, 1, H, W).
        disps: value or name -> (1, 2, H, W), voxels, each from the fixed grid to the moving image.
        label: what the values are, such as "stage".
        start: position at first.
        size: width of a panel, inches. A smaller one takes less of a notebook: at 1.7 a position
            takes about 25 kB.
    """
    limits = plot.window(moving), plot.window(fixed)

    def draw(value: Any) -> Figure:
        disp = disps[value]
        moved = warp(moving, disp)
        fig, axes = plot.panels(4, size=size, height=1.25 * size)
        plot.image(moved, axes[0], "moved", limits[0])
        plot.overlay(fixed, moved, axes[1], "with fixed", (limits[1], limits[0]))
        plot.grid(disp, axes[2], "grid")
        plot.jacobian(disp, axes[3], "Jacobian", bar=False)
        return fig

    return series(draw, list(disps), label, start)


# ---------------------------------------------------------------------------- three planes


def volumes(
    moving: Tensor,
    fixed: Tensor,
    moved: Tensor | None = None,
    disp: Tensor | None = None,
    stages: Sequence[Tensor] = (),
    what: str = "a volume",
    spacing: float | Sequence[float] = 1.0,
    planes: Sequence[str] = PLANES,
    longest: int = LONGEST,
) -> View:
    """Three planes through volumes that move together, with a list of what they show.

    In it are moving, fixed and moved, with `disp` the Jacobian determinant, and the moving image
    after each of the stages. All voxels are in the page, in 8 bits and a lossy format: to look at,
    not to measure.

    Args:
        moving, fixed, moved: (1, 1, *S) with three axes, on the fixed grid; `moved` is made from
            `disp` where it is not given.
        disp: (1, 3, *S), voxels.
        stages: displacements (1, 3, *S), voxels, each from the fixed grid to the moving image.
        what: what they show, for readers who cannot see them.
        spacing: voxel size along each axis.
        planes: names of the planes across axis 0, 1 and 2.
        longest: voxels along the longest axis, in space; larger volumes are averaged down to it.

    Raises:
        ValueError: no three axes, or the shapes differ.
    """
    arrays = {"moving": moving, "fixed": fixed}
    if moved is None and disp is not None:
        moved = warp(moving, disp)
    arrays |= {} if moved is None else {"moved": moved}
    arrays |= {f"stage {k}": warp(moving, one) for k, one in enumerate(stages, start=1)}
    shape = tuple(fixed.shape[2:])
    for name, x in arrays.items():
        if x.ndim != 5 or tuple(x.shape) != (1, 1, *shape):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected (1, 1, *S) with three axes, as fixed."
            )
    size = np.broadcast_to(np.asarray(spacing, dtype=float), 3) * shape
    small = _at_most(longest, shape, size)
    layers = {name: _small(x.detach().cpu().float(), small) for name, x in arrays.items()}
    grey = {name: _grey(x, plot.window(layers[_measure(name)])) for name, x in layers.items()}
    if disp is not None:
        grey["Jacobian"] = _coded(jacobian_determinant(disp.detach().cpu().float()), small)
    data = {
        "shape": small,
        "extent": [float(e) for e in size],
        "voxels": list(shape),
        "planes": list(planes),
        "layers": {name: _encoded(_sprite(x), name == "Jacobian") for name, x in grey.items()},
        "colours": _colours() if disp is not None else "",
    }
    kept = f'<script type="application/json" class="rv-data">{json.dumps(data)}</script>'
    middle = {k: v for k, v in grey.items() if k in ("moving", "fixed", "moved")}
    still = _still(
        {name: _middle_planes(x) for name, x in middle.items()},
        f"{what}, middle planes",
        (2 * small[0] + small[1] + 2, max(small[1], small[2])),
    )
    return View(_root("volumes", what, still, kept))


def _at_most(
    longest: int, shape: Sequence[int], extent: Sequence[float] | NDArray[Any]
) -> tuple[int, int, int]:
    """The shape of a volume whose longest side, in space, gets so many voxels.

    They become cubes at most: an axis of few thick slices keeps them.
    """
    step = max(extent) / longest
    nx, ny, nz = (min(n, max(1, round(size / step))) for n, size in zip(shape, extent, strict=True))
    return nx, ny, nz


def _small(x: Tensor, shape: tuple[int, int, int]) -> NDArray[Any]:
    """(1, 1, *S) as array of another, not larger shape, averaged."""
    small: NDArray[Any] = functional.adaptive_avg_pool3d(x[0], shape)[0].numpy()
    return small


def _coded(det: Tensor, shape: tuple[int, int, int]) -> Pixels:
    """A Jacobian determinant (1, *S) as grey values: 1 to 255 on a log scale about 128, or FOLDED.

    A voxel of the smaller shape counts as folded where one inside it is.
    """
    folded = functional.adaptive_max_pool3d((det <= 0).float(), shape)[0].numpy() > 0
    mean = functional.adaptive_avg_pool3d(det, shape)[0].numpy()
    log = np.log(np.clip(mean, 1 / GREATEST, GREATEST)) / np.log(GREATEST)
    steps = np.round(32 * log) / 32  # 65 colours are enough for an eye, and a third of the bytes
    return np.where(folded, FOLDED, np.round(128 + 127 * steps)).astype(np.uint8)


def _colours() -> str:
    """The colours of `regkit.plot.jacobian` for the grey values 0 to 255, six hex digits each."""
    values = np.concatenate([[0.5], np.linspace(0.12, 0.88, 255)])
    table = np.round(255 * matplotlib.colormaps["PuOr_r"](values)[:, :3]).astype(int)
    table[FOLDED] = 0
    return "".join(f"{r:02x}{g:02x}{b:02x}" for r, g, b in table)


def _sprite(volume: Pixels) -> Pixels:
    """All planes across axis 2 on one sheet, row by row; in a plane axis 0 runs right, 1 down."""
    nx, ny, nz = volume.shape
    columns = int(np.ceil(np.sqrt(nz)))
    rows = -(-nz // columns)
    sheet = np.zeros((rows * columns, ny, nx), np.uint8)
    sheet[:nz] = volume.transpose(2, 1, 0)
    return sheet.reshape(rows, columns, ny, nx).swapaxes(1, 2).reshape(rows * ny, columns * nx)


def _middle_planes(volume: Pixels) -> Pixels:
    """The planes through the middle, side by side, the lowest rows in one line."""
    cuts = [_upright(volume.take(volume.shape[a] // 2, a)) for a in (2, 1, 0)]
    tall = max(cut.shape[0] for cut in cuts)
    return np.hstack([np.pad(c, ((tall - c.shape[0], 0), (0, 1))) for c in cuts])[:, :-1]
