"""Draw the figures of the book's prose pages: from the embedded population, and from results/.

    python book/tools/figures.py [NAME ...]

in the project's folder draws them again, all or the named ones. A figure whose numbers come from a
file in results/ carries the sha256 of that file; a test compares the two.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullLocator, ScalarFormatter
from PIL import Image

from regkit import record
from regkit.data import population, true_displacement
from regkit.plot import GREY, STYLE
from regkit.spatial import identity_grid, warp

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "studies"))
from accuracy import slice_to_turn, turns  # noqa: E402

FOLDER = ROOT / "book" / "_figures"
ORANGE = "#e69f00"  # of the colour-blind safe Okabe-Ito palette


def idea(shape: tuple[int, int] = (160, 192), step: int = 6) -> plt.Figure:
    """Moving image, where each voxel of the fixed grid looks, moved image, fixed image.

    The displacement is the true one of two synthetic subjects, so nothing is learned or fitted.

    Args:
        shape: (H, W) of the two slices.
        step: voxels between two lines of the drawn grid.
    """
    moving, fixed = population([3, 8], shape)
    disp = true_displacement(moving, fixed)
    moved = warp(moving.image[None], disp)[0]
    target = (identity_grid(shape) + disp[0]).numpy()  # (2, H, W): x + u(x)

    figure, axes = plt.subplots(1, 4, figsize=(11, 3.7), layout="constrained")
    pictures = {
        "moving": moving.image,
        "where each voxel looks": moving.image,
        "moved": moved,
        "fixed": fixed.image,
    }
    for axis, (title, image) in zip(axes, pictures.items(), strict=True):
        axis.imshow(image[0].T.numpy(), origin="lower", cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=12)
        axis.set_axis_off()
        if title == "where each voxel looks":
            axis.plot(target[0, ::step].T, target[1, ::step].T, color=ORANGE, lw=0.5)
            axis.plot(target[0, :, ::step], target[1, :, ::step], color=ORANGE, lw=0.5)
            axis.set(xlim=(-0.5, shape[0] - 0.5), ylim=(-0.5, shape[1] - 0.5))
        else:  # the outlines of the fixed brain and of its ventricles, the same in each picture
            for mask in (fixed.labels[0] > 0, fixed.labels[0] == 5):
                axis.contour(np.asarray(mask).T, levels=[0.5], colors=ORANGE, linewidths=1.0)
    return figure


def results(name: str) -> dict[str, Any]:
    """What results/<name>.json holds."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def fingerprint(name: str) -> str | None:
    """The sha256 of results/<name>.json."""
    return record.fingerprint(ROOT / "results" / f"{name}.json", digits=64)


def _ticks(axis, values) -> None:
    """Label a logarithmic axis at these values, written as plain numbers."""
    axis.set_ticks(values)
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_locator(NullLocator())


def accuracy_warp() -> plt.Figure:
    """Interpolation: error of a warped wave and of a composed field, by wavelength."""
    numbers = results("accuracy")
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.0))
    rows = numbers["interpolation"]
    x = [row["wavelength"] for row in rows]
    left.loglog(x, [row["bound"] for row in rows], color=GREY, ls="--", label="worst case")
    left.loglog(x, [row["largest"] for row in rows], "o-", label="largest")
    left.loglog(x, [row["rms"] for row in rows], "s-", label="root mean square")
    left.set(title="warp: an image wave of height 1", ylabel="error (intensity)")
    rows = numbers["composition"]
    x = [row["wavelength"] for row in rows]
    right.loglog(x, [row["largest"] for row in rows], "o-", label="largest")
    right.loglog(x, [row["mean"] for row in rows], "s-", label="mean")
    right.set(title="compose: fields of 3 voxels", ylabel="error (voxels)")
    for axis in (left, right):
        axis.set_xlabel("wavelength (voxels)")
        _ticks(axis.xaxis, x)
        axis.legend()
    return figure


def accuracy_turn() -> plt.Figure:
    """A brain slice, the same after 36 warps of ten degrees, and after one composed warp."""
    image, _ = slice_to_turn()
    result = turns(image)
    figure, axes = plt.subplots(1, 3, figsize=(7.6, 2.9))
    pictures = {
        "before": image,
        "36 warps": result["many"],
        "36 compositions, 1 warp": result["once"],
    }
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture[0, 0, 30:-30, 15:-15].T.numpy(), vmin=0, vmax=1)
        axis.set_title(title)
        axis.set_axis_off()
    return figure


def accuracy_inverse() -> plt.Figure:
    """Residual of the inverse, by slope in both orders, and by iterations."""
    rows = results("accuracy")["inverse"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.2))
    floor = 1e-7  # below it everything is rounding

    def curve(axis, by: str, key: str, fixed: dict[str, float], **style) -> None:
        chosen = [row for row in rows if all(row[k] == v for k, v in fixed.items())]
        values = [max(row[key], floor) for row in chosen]
        axis.semilogy([row[by] for row in chosen], values, **style)

    usual = {"iterations": 30}
    curve(left, "steepness", "residual", usual, marker="o", label="compose(disp, w)")
    curve(left, "steepness", "other_order", usual, marker="s", label="compose(w, disp)")
    left.axvspan(-1.6, -1, color=GREY, alpha=0.2, lw=0)
    left.text(-1.3, 3e-3, "folds", ha="center")
    left.axvline(13 / 7, color=GREY, ls="--")
    left.set(
        title="30 iterations", xlabel="steepest derivative of disp", ylabel="residual (voxels)"
    )
    left.set(xlim=(-1.6, 2.15))
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 0.3))
    for s, marker in ((0.5, "o"), (-0.9, "s"), (1.5, "^"), (1.8, "v"), (2.0, "D")):
        curve(
            right,
            "iterations",
            "residual",
            {"steepness": s},
            marker=marker,
            label=f"{s:g}".replace("-", "−"),
        )
    right.set_xscale("log")
    _ticks(right.xaxis, [1, 3, 10, 30, 100])
    right.set(title="compose(disp, w)", xlabel="iterations")
    right.legend(title="derivative", loc="lower left")
    return figure


def accuracy_exponential() -> plt.Figure:
    """exp(v) o exp(-v), by steps and by the largest velocity: closed forms and a brain."""
    numbers = results("accuracy")
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.2), sharey=True)
    for size, marker in ((8, "o"), (4, "s"), (2, "^"), (1, "v"), (0.5, "D")):
        rows = [row for row in numbers["exponential"] if row["size"] == size]
        steps = sorted({row["steps"] for row in rows})
        worst = [max(row["residual"] for row in rows if row["steps"] == k) for k in steps]
        left.semilogy(steps, worst, marker=marker, label=f"{size:g}")
        rows = [row for row in numbers["brain"]["exponential"] if row["size"] == size]
        right.semilogy(
            [row["steps"] for row in rows], [row["largest"] for row in rows], marker=marker
        )
    left.set(title="stretch and vortex, the worse", ylabel="largest residual (voxels)")
    right.set(title="velocity of a brain, inside")
    for axis in (left, right):
        axis.axhline(0.05, color=GREY, ls="--")
        axis.set(xlabel="steps", xticks=steps)
    right.set_xlim(left.get_xlim())
    right.text(1, 0.053, "0.05", va="bottom")
    figure.legend(*left.get_legend_handles_labels(), title="max |v|", loc="outside right center")
    return figure


def speed_ratios() -> plt.Figure:
    """How many times faster than each peer, and what was asked for."""
    rows = sorted(results("bench-cpu")["speed"], key=lambda row: row["ratio"])
    ratios = [row["ratio"] for row in rows]
    figure, axis = plt.subplots(figsize=(7.6, 0.6 + 0.26 * len(rows)))
    axis.barh(range(len(rows)), [r - 1 for r in ratios], left=1, height=0.6)
    for i, row in enumerate(rows):
        if row["asked"]:
            axis.plot([row["asked"]] * 2, [i - 0.45, i + 0.45], color="black", lw=2.5)
    names = [f"{row['operation']} | {row['peer']}" for row in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.axvline(1, color=GREY)
    axis.set(xscale="log", xlabel="times faster than the peer")
    axis.set_xlim(min(0.5, 0.8 * ratios[0]), 1.4 * ratios[-1])
    _ticks(axis.xaxis, [x for x in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if x < 1.4 * ratios[-1]])
    return figure


def speed_scaling() -> plt.Figure:
    """Time and memory per voxel of each operation, over the size of the image."""
    rows = results("bench-cpu")["scaling"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.2))
    for name, marker in zip(dict.fromkeys(row["operation"] for row in rows), "os^vDPX*<>"):
        chosen = [row for row in rows if row["operation"] == name]
        voxels = [float(np.prod(row["shape"])) for row in chosen]
        times = [row["ns_per_voxel"] for row in chosen]
        left.loglog(voxels, times, marker=marker, label=name)
        right.loglog(voxels, [row["volumes"] for row in chosen], marker=marker)
    for axis, key in ((left, "ns_per_voxel"), (right, "volumes")):
        values = [row[key] for row in rows]
        nice = [m * 10.0**k for k in range(5) for m in (1, 2, 5)]
        _ticks(axis.yaxis, [x for x in nice if 0.8 * min(values) < x < 1.2 * max(values)])
    left.set(xlabel="voxels", ylabel="nanoseconds per voxel")
    right.set(xlabel="voxels", ylabel="peak memory (volumes)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


# figure -> how it is drawn, and the file in results/ that its numbers come from
FIGURES: dict[str, tuple[Callable[[], plt.Figure], str | None]] = {
    "idea": (idea, None),
    "accuracy_warp": (accuracy_warp, "accuracy"),
    "accuracy_turn": (accuracy_turn, None),
    "accuracy_inverse": (accuracy_inverse, "accuracy"),
    "accuracy_exponential": (accuracy_exponential, "accuracy"),
    "speed_ratios": (speed_ratios, "bench-cpu"),
    "speed_scaling": (speed_scaling, "bench-cpu"),
}


def drawn_from(name: str) -> str | None:
    """The sha256 that the picture of a figure carries."""
    with Image.open(FOLDER / f"{name}.png") as picture:
        return picture.info.get("Source")


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in names or FIGURES:
        draw, source = FIGURES[name]
        metadata = {"Source": fingerprint(source)} if source else {}
        with matplotlib.rc_context({} if name == "idea" else STYLE):
            draw().savefig(FOLDER / f"{name}.png", dpi=130, metadata=metadata)


if __name__ == "__main__":
    main(sys.argv[1:])
