"""Draw the figures of the book's prose pages: from the embedded population, and from results/.

    python book/tools/figures.py [NAME ...]

in the project's folder draws them again, all or the named ones. A figure whose numbers come from a
file in results/ carries the sha256 of that file; a test compares the two. `hero`, the moving
picture of the index, and `logo` go to book/_static; `badges` of the README say what is counted.
"""

import io
import json
import math
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from matplotlib.ticker import NullLocator, ScalarFormatter
from PIL import Image

from regkit import record
from regkit.book.exercises import EXERCISES
from regkit.book.quiz import chapters as chapters_with_quiz
from regkit.book.quiz import quiz
from regkit.data import population, true_displacement
from regkit.plot import GREY, STYLE
from regkit.spatial import identity_grid, warp

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "studies"))
from accuracy import slice_to_turn, turns  # noqa: E402

FOLDER = ROOT / "book" / "_figures"
STATIC = ROOT / "book" / "_static"
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


def hero_frames(
    shape: tuple[int, int] = (160, 192), count: int = 12, step: int = 8
) -> list[plt.Figure]:
    """The pair of `idea`, by parts of its displacement: where to look, what is found, fixed.

    Args:
        shape: (H, W) of the slices.
        count: of the frames; the first has no displacement, the last all of it.
        step: voxels between two lines of the drawn grid.
    """
    moving, fixed = population([3, 8], shape)
    disp = true_displacement(moving, fixed)
    frames = []
    for part in np.linspace(0, 1, count):
        moved = warp(moving.image[None], part * disp)[0]
        target = (identity_grid(shape) + part * disp[0]).numpy()  # (2, H, W)
        figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.88), dpi=100, facecolor="black")
        figure.subplots_adjust(0, 0, 1, 1, wspace=0)
        for axis, image in zip(axes, (moving.image, moved, fixed.image)):
            axis.imshow(image[0].T.numpy(), origin="lower", cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
        axes[0].plot(target[0, ::step].T, target[1, ::step].T, color=ORANGE, lw=0.7)
        axes[0].plot(target[0, :, ::step], target[1, :, ::step], color=ORANGE, lw=0.7)
        axes[0].set(xlim=(-0.5, shape[0] - 0.5), ylim=(-0.5, shape[1] - 0.5))
        for axis in axes[1:]:
            for mask in (fixed.labels[0] > 0, fixed.labels[0] == 5):
                axis.contour(np.asarray(mask).T, levels=[0.5], colors=ORANGE, linewidths=1.2)
        frames.append(figure)
    return frames


def hero() -> None:
    """Write hero.webp, which plays three times within five seconds, and its last frame as a still.

    A reader who asks for little motion gets the still, and nobody has to stop the other.
    """
    pictures = []
    for figure in hero_frames():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        plt.close(figure)
        pictures.append(Image.open(buffer).convert("RGB"))
    times = [300, *[70] * (len(pictures) - 2), 600]  # milliseconds
    pictures[0].save(
        STATIC / "hero.webp",
        save_all=True,
        append_images=pictures[1:],
        duration=times,
        loop=3,
        quality=55,
        method=6,
    )
    pictures[-1].save(STATIC / "hero_still.webp", quality=70, method=6)


def twisted(points: np.ndarray, turn: float = 0.9, width: float = 0.55) -> np.ndarray:
    """Points (N, 2) in [-1, 1], turned about the middle, less and less towards the border.

    The turn keeps the distance to the middle, so that lines bend and never cross themselves.
    """
    angle = turn * np.exp(-(points**2).sum(axis=1) / (2 * width**2))
    x, y = points.T
    return np.stack(
        [x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], 1
    )


def logo_svg(size: int = 64, lines: int = 3) -> str:
    """The logo: a grid that bends, white on blue, so that it shows on light and dark pages."""
    along = np.linspace(-0.95, 0.95, 41)
    paths = []
    for at in np.linspace(-0.6, 0.6, lines):
        for points in (np.stack([along, 0 * along + at], 1), np.stack([0 * along + at, along], 1)):
            drawn = size / 2 * (1 + 0.82 * twisted(points))
            paths.append("M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" role="img" '
        'aria-label="regkit: a grid that bends">\n'
        f'<rect width="{size}" height="{size}" rx="{size // 6}" fill="#0072b2"/>\n'
        f'<g fill="none" stroke="#ffffff" stroke-width="{size / 18:.1f}" stroke-linecap="round">\n'
        + "".join(f'<path d="{path}"/>\n' for path in paths)
        + "</g>\n</svg>\n"
    )


def logo() -> None:
    """Write logo.svg, which is also the icon of the pages."""
    (STATIC / "logo.svg").write_text(logo_svg(), encoding="utf-8")


def badge_texts() -> dict[str, tuple[str, str]]:
    """What the badges of the README say, counted here: file name -> left, right."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chapters = {path.name[:2] for path in (ROOT / "notebooks").glob("[0-9]*.md")}
    questions = sum(len(quiz(number).items) for number in chapters_with_quiz())
    return {
        "python": ("Python", project["requires-python"].replace(">=", "") + " or newer"),
        "licence": ("licence", f"{project['license']}, text CC BY 4.0"),
        "chapters": ("chapters", str(len(chapters))),
        "exercises": ("exercises that check answers", str(len(EXERCISES))),
        "questions": ("quiz questions", str(questions)),
    }


def badge_svg(left: str, right: str, height: int = 20) -> str:
    """A badge: two words side by side, as wide as in DejaVu Sans, which has Verdana's widths."""
    font = FontProperties(family="DejaVu Sans", size=11)
    widths = (TextToPath().get_text_width_height_descent(t, font, False)[0] for t in (left, right))
    first, second = (math.ceil(width) + 12 for width in widths)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{first + second}" height="{height}" '
        f'role="img" aria-label="{left}: {right}">\n'
        f'<rect width="{first}" height="{height}" fill="#444444"/>\n'
        f'<rect x="{first}" width="{second}" height="{height}" fill="#0072b2"/>\n'
        '<g fill="#ffffff" font-family="Verdana, DejaVu Sans, sans-serif" font-size="11">\n'
        + "".join(
            f'<text x="{x + 6}" y="14" textLength="{width - 12}">{text}</text>\n'
            for x, width, text in ((0, first, left), (first, second, right))
        )
        + "</g>\n</svg>\n"
    )


def badges() -> None:
    """Write the badges of the README to book/_figures."""
    for name, (left, right) in badge_texts().items():
        (FOLDER / f"badge_{name}.svg").write_text(badge_svg(left, right), encoding="utf-8")


# what is no figure: hero and logo go to book/_static, which holds what pages name without Sphinx
FRONT: dict[str, Callable[[], None]] = {"hero": hero, "logo": logo, "badges": badges}

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
    for name in names or [*FIGURES, *FRONT]:
        if name in FRONT:
            FRONT[name]()
            continue
        draw, source = FIGURES[name]
        metadata = {"Source": fingerprint(source)} if source else {}
        with matplotlib.rc_context({} if name == "idea" else STYLE):
            draw().savefig(FOLDER / f"{name}.png", dpi=130, metadata=metadata)


if __name__ == "__main__":
    main(sys.argv[1:])
