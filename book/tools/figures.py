"""Draw the figures of the book's prose pages from the embedded population.

Run `python book/tools/figures.py` in the project's folder to make them again.
"""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from regkit.data import population, true_displacement
from regkit.spatial import identity_grid, warp

FOLDER = Path(__file__).parents[1] / "_figures"
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


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    idea().savefig(FOLDER / "idea.png", dpi=130)


if __name__ == "__main__":
    main()
