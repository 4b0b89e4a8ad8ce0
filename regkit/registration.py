"""Register one pair of images: from two files to one displacement, in one call.

    result = regkit.register("moving.nii.gz", "fixed.nii.gz")
    result.save("out")

The pair is brought to a working grid, with voxels as in the network's training; the network answers
there; and the answer is brought back to the grid of the fixed image, in voxels.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import regkit
from regkit import classical, io, losses, metrics, models
from regkit.blocks import AVERAGE_POOL
from regkit.device import choose_device, enough_memory
from regkit.models import RegistrationModel
from regkit.models.resnet import LinearResNet
from regkit.names import unknown
from regkit.spatial import affine_to_disp, warp

# The least `_correlation` of two images of one contrast. Seen with T1 against T1, aligned: 0.31 or
# more on the population, 0.17 at twice its amplitude, 0.36 on real pairs; against T2, PD or FLAIR,
# on both: 0.09 or less. T1 against fractional anisotropy, both bright in white matter: 0.56.
ALIKE = 0.15
APART = 12.0  # mm; the embedded population has up to 9, brains aligned to a template 2
CLASSICAL = ("rigid", "affine")  # methods without a network
SYN = "syn"  # and the deformable one among them
PREFERRED = "vxm_diff"  # what "auto" takes among the shipped weights
# what `Result.save` may write; the last one says that the rest are there
FILES = ("moved.nii.gz", "disp.nii.gz", "moved_labels.nii.gz", "report.png", "metrics.json")
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Result:
    """What `register` found. All tensors are on the CPU.

    moved: (1, 1, *S), the moving image on the fixed grid, in its own units.
    disp: (1, d, *S), voxels, fixed grid -> moving grid: the whole transform, the affine part and
        what the two headers say included. moved(x) = moving(x + disp(x)).
    theta: (1, d, d+1), the part of `disp` that is affine, as in `regkit.spatial.affine_to_disp`;
        None where no affine registration was done.
    metrics: numbers on the fixed grid. `lncc` and `ncc` are correlations in [0, 1] and [-1, 1]
        (1 is best), `mse` is between the intensities scaled to [0, 1] (0 is best), each before and
        after; `folding_percent`, `folding_count` and `sd_log_jacobian` of the map; `seconds`; with
        labels `dice`, before and after. And what is needed to do it again: method, versions, ...
    warnings: one sentence for each thing that looks wrong.
    affine: (4, 4), voxel -> mm, RAS, of the fixed grid, and `moving_affine` of the moving one.
    moved_labels: (1, 1, *S) int32, if labels were given.
    """

    moved: Tensor
    disp: Tensor
    theta: Tensor | None
    metrics: dict[str, Any]
    warnings: list[str]
    affine: np.ndarray
    moving_affine: np.ndarray
    moved_labels: Tensor | None = None
    _page: dict[str, Any] = field(default_factory=dict, repr=False)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write moved.nii.gz, disp.nii.gz, metrics.json and report.png into `folder`.

        `disp.nii.gz` is in the ITK convention, see `regkit.io.write_displacement`. After an error
        nothing is left half-written.

        Raises:
            ValueError: `folder` is a file, or cannot be written.
        """
        with io.staged(folder, together=FILES) as temporary:
            io.write_image(self.moved, self.affine, temporary / "moved.nii.gz")
            io.write_displacement(
                self.disp, self.affine, self.moving_affine, temporary / "disp.nii.gz"
            )
            if self.moved_labels is not None:
                io.write_image(self.moved_labels, self.affine, temporary / "moved_labels.nii.gz")
            text = json.dumps(_plain({**self.metrics, "warnings": self.warnings}), indent=1)
            (temporary / "metrics.json").write_text(text + "\n")
            self.report().savefig(temporary / "report.png")
        return Path(folder)

    def report(self) -> Any:
        """The page of pictures and numbers that `save` writes, as matplotlib figure."""
        from regkit import plot

        shown = ("lncc", "ncc", "dice", "folding_percent", "sd_log_jacobian", "seconds")
        numbers = {name: self.metrics[name] for name in shown if name in self.metrics}
        return plot.report(metrics=numbers, **self._page)


def register(
    moving: Any,
    fixed: Any,
    method: str | os.PathLike = "auto",
    affine: Literal["auto", "rigid", "affine", False] = "auto",
    refine: int = 0,
    device: str = "auto",
    *,
    moving_labels: Any = None,
    fixed_labels: Any = None,
    progress: Progress | None = None,
) -> Result:
    """Find where each voxel of the fixed image lies in the moving image.

    Args:
        moving, fixed: two images of 2 or 3 axes; paths or nibabel images, whose place in space is
            respected, so that shape, voxel size and orientation may differ; or arrays or tensors of
            shape S, both on one grid. Integer images are converted to float32.
        method: the name of shipped weights (`regkit.models.pretrained()`), the name of a model with
            shipped weights, a weights file, "rigid" or "affine" (no network), "syn" (ANTs, see
            `regkit.classical.ants.syn`; minutes in 3D), or "auto": the shipped weights for this
            number of axes.
        affine: an affine registration before that: "rigid", "affine", False, or "auto",
            which does one where the headers put the images on different grids, or where a quick
            look finds the images more than 12 mm apart.
        refine: steps of gradient descent on the displacement afterwards, see
            `regkit.classical.refine`. They favour smooth maps more than the training of the shipped
            weights did: a gain on images unlike those, a small loss on images like those.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        moving_labels, fixed_labels: label maps on the grids of the two images, for the Dice.
        progress: called with the name of the stage and the fraction done, 0 to 1.

    Returns:
        A `Result`. A network is run on a grid of the voxel size and orientation it was trained at,
        or of finer voxels in a thin slab (`_fine_enough`), with intensities scaled to its range.
        Arrays have no voxel size: there it runs on the grid as it is, and intensities that are in
        its range already stay as they are.

    Raises:
        FileNotFoundError: an image cannot be found.
        ValueError: anything else that cannot be registered, in one sentence.
    """
    start = time.perf_counter()
    tell = progress or (lambda stage, fraction: None)
    tell("reading", 0.0)
    chosen = choose_device(device)
    _check_settings(method, affine, refine)
    moving_image, fixed_image = _images(moving, fixed)
    d = fixed_image.ndim
    name, model = _method(method, d)
    if affine == "auto" and name in CLASSICAL:
        affine = name  # type: ignore[assignment]
    if affine == "auto" and isinstance(model, LinearResNet):
        affine = False  # it would do the network's work
    labels = _labels(moving_labels, fixed_labels, moving_image, fixed_image)
    warnings = [*moving_image.notes, *fixed_image.notes]
    warnings += _look(moving_image, fixed_image, model)

    matrix = None  # fixed mm -> moving mm
    if affine == "auto":
        affine = "affine" if _need_affine(moving_image, fixed_image) else False
    if affine:
        tell("affine", 0.05)
        matrix = classical.align(
            moving_image, fixed_image, affine, lambda f: tell("affine", 0.05 + 0.4 * f)
        )

    # on the working grid
    tell(SYN if name == SYN else "network", 0.45)
    shape, grid_affine = fixed_image.shape, fixed_image.affine
    spacing = model.info.get("spacing") if model is not None and fixed_image.physical else None
    if spacing:
        # a network that looks at the image as a whole wants the field of view of its training
        size = None
        if isinstance(model, LinearResNet):
            size = model.info.get("recipe", {}).get("shape")
        elif model is not None:
            spacing = _fine_enough(fixed_image, spacing, model.divisor)
        shape, grid_affine = io.working_grid(fixed_image.shape, fixed_image.affine, spacing, size)
    low, high = (model.info.get("range") if model is not None else None) or (0.0, 1.0)
    pair = []
    for image, to_moving in ((moving_image, matrix), (fixed_image, None)):
        values = _scaled(image.data, (low, high), keep=not image.physical)
        on_grid = values
        if image is moving_image or spacing:
            on_grid = io.resample_to(values, image.affine, shape, grid_affine, matrix=to_moving)
        pair.append(on_grid.to(chosen))
    inner = torch.zeros(1, d, *shape, device=chosen)
    found = None
    memory = (
        f"device is {chosen.type!r}, whose memory is too small for a grid of {shape} voxels and "
        f"refine={refine}, expected device='cpu', images cropped to the organ, or refine=0."
    )
    if model is not None:
        with torch.no_grad(), enough_memory(memory):
            found = model.to(chosen)(*pair)
        aligned = found.moved if isinstance(model, LinearResNet) else pair[0]
        known = fixed_image.physical and _one_contrast(model.info)  # arrays may lie apart
        if known and _correlation(aligned, pair[1]) < ALIKE:
            warnings.append(
                "The images seem to be of two contrasts and the network was trained on one: try "
                "method 'syn', or weights that were trained across contrasts."
            )
        inner = found.disp.float()
    elif name == SYN:
        a, b = (io.Image(values.cpu(), grid_affine) for values in pair)
        inner = classical.ants.syn(a, b).to(chosen)
    if refine:
        tell("refining", 0.55)
    if isinstance(model, LinearResNet) and found is not None:
        # a matrix says it all: it joins that of the headers and of an affine registration before
        theta = _linear(model, found.theta, pair, grid_affine, refine)
        warnings += _beyond_training(model, theta)
        world = io.theta_to_world(theta, shape, grid_affine, grid_affine)
        matrix = world if matrix is None else matrix @ world
        inner = torch.zeros_like(inner)
    elif refine:
        with enough_memory(memory):
            inner = classical.refine(
                pair[0], pair[1], inner, refine, progress=lambda f: tell("refining", 0.55 + 0.3 * f)
            )
    inner = inner.cpu()
    if not torch.isfinite(inner).all():
        raise ValueError(f"method {name!r} gave a displacement that is not finite for this pair.")

    # back on the fixed grid
    tell("measuring", 0.85)
    if spacing:
        to_grid = io.voxel_map(fixed_image.affine, grid_affine, d)
        inner = warp(inner, io.map_to_disp(to_grid, fixed_image.shape), padding="border")

    def whole(target: np.ndarray) -> Tensor:
        """The whole transform in voxels of a grid: x -> map(x) + linear part times inner(x)."""
        outer = io.map_to_disp(
            io.voxel_map(fixed_image.affine, target, d, matrix), fixed_image.shape
        )
        linear = io.voxel_map(grid_affine, target, d, matrix)[:d, :d]
        turn = torch.from_numpy(linear).float()
        return outer + (turn @ inner.flatten(2)).reshape(outer.shape)

    disp = whole(moving_image.affine)
    # The same in voxels of the fixed grid. It answers the questions about the map itself: a moving
    # image with other voxels, or a mirrored one, does not fold or stretch anything.
    own = whole(fixed_image.affine)
    moved = io.pull(moving_image.data, disp)
    before = io.resample_to(
        moving_image.data, moving_image.affine, fixed_image.shape, fixed_image.affine
    )
    folds = int(metrics.folding_count(own))
    numbers = {
        **_compare(before, moved, fixed_image.data),
        "folding_percent": 100 * folds / own[0, 0].numel(),
        "folding_count": folds,
        "sd_log_jacobian": float(metrics.sd_log_jacobian(own)),
    }
    moved_labels = None
    if labels is not None:
        moved_labels = io.pull(labels[0].data, disp, "nearest")
        scores, missing = _dice(labels, moved_labels)
        numbers |= scores
        warnings += missing
    warnings += _judge(disp, moving_image.shape, numbers)
    numbers |= {
        "method": name,
        "affine": affine or "none",
        "refine": refine,
        "seconds": round(time.perf_counter() - start, 2),
        "device": chosen.type,
        "seed": 0,  # nothing is drawn at random
        "versions": _versions(),
    }
    tell("done", 1.0)
    return Result(
        moved=moved,
        disp=disp,
        theta=None
        if matrix is None
        else io.map_to_theta(
            io.voxel_map(fixed_image.affine, moving_image.affine, d, matrix), fixed_image.shape
        ).float(),
        metrics=numbers,
        warnings=warnings,
        affine=fixed_image.affine,
        moving_affine=moving_image.affine,
        moved_labels=moved_labels,
        _page=_page(before, fixed_image, moved, own)
        | {"title": "Registration: " + _steps(name, affine, refine)},
    )


# what was asked for -----------------------------------------------------------------------------


def _check_settings(method: Any, affine: Any, refine: Any) -> None:
    if affine not in ("auto", "rigid", "affine", False):
        raise ValueError(f"affine is {affine!r}, expected 'auto', 'rigid', 'affine' or False.")
    if method in CLASSICAL and affine not in ("auto", method, False):
        raise ValueError(f"affine is {affine!r} and method {method!r}, expected one of them alone.")
    if not isinstance(refine, int) or refine < 0:
        raise ValueError(f"refine is {refine!r}, expected a number of steps, 0 or more.")
    if _is_file(method):
        return
    known = ["auto", *CLASSICAL, SYN, *models.names(), *models.pretrained()]
    if method not in known:
        raise unknown("method", str(method), known)


def _is_file(method: Any) -> bool:
    return isinstance(method, os.PathLike) or str(method).endswith(".safetensors")


def _method(method: str | os.PathLike, d: int) -> tuple[str, RegistrationModel | None]:
    """The name that goes into the metrics, and the network; None for a classical method."""
    if method in CLASSICAL:
        return str(method), None
    if method == SYN:
        try:
            classical.ants.load()
        except ImportError as error:
            raise ValueError(str(error)) from None
        return SYN, None
    if _is_file(method) or method in models.pretrained():
        name, model = Path(method).name, models.load(method)
        if model.ndim != d:
            raise ValueError(f"method {name!r} is a {model.ndim}D network and the images are {d}D.")
        return name, model
    shipped = {name: models.load(name) for name in models.pretrained()}
    fitting = [name for name, model in shipped.items() if model.ndim == d]
    if method != "auto":
        fitting = [name for name in fitting if shipped[name].name == method]
    elif not fitting:
        raise ValueError(f"method is 'auto', and no weights for {d}D images are shipped.")
    if not fitting:
        raise ValueError(
            f"method is {method!r}, for which no {d}D weights are shipped, expected a weights file "
            f"(`regkit train` makes one) or one of {', '.join(shipped) or 'rigid, affine'}."
        )
    name = min(fitting, key=lambda name: (shipped[name].name != PREFERRED, name))
    return name, shipped[name]


def _images(moving: Any, fixed: Any) -> tuple[io.Image, io.Image]:
    """Both images, or the reason why they are no pair."""
    a, b = io.as_image(moving, "moving"), io.as_image(fixed, "fixed")
    if a.ndim != b.ndim:
        raise ValueError(
            f"moving is {a.ndim}D {a.shape} and fixed {b.ndim}D {b.shape}, "
            "expected the same number of axes."
        )
    if not (a.physical and b.physical):
        if a.shape != b.shape:
            raise ValueError(
                f"moving has shape {a.shape} and fixed {b.shape}, expected the same: arrays are on "
                "one grid (files and nibabel images may differ)."
            )
        # an array beside a file lies on the file's grid
        affine = a.affine if a.physical else b.affine
        physical = a.physical or b.physical
        a, b = (io.Image(x.data, affine, physical, x.notes) for x in (a, b))
    io.voxel_map(b.affine, a.affine, a.ndim)  # slices of different planes are refused here
    return a, b


def _labels(
    moving_labels: Any, fixed_labels: Any, moving: io.Image, fixed: io.Image
) -> tuple[io.Image, io.Image, Tensor] | None:
    """Both label maps, and the moving one brought to the fixed grid by the headers alone."""
    if moving_labels is None and fixed_labels is None:
        return None
    if moving_labels is None or fixed_labels is None:
        missing = "moving_labels" if moving_labels is None else "fixed_labels"
        raise ValueError(f"{missing} is missing, expected label maps of both images or of none.")
    maps = []
    for name, source, image in (
        ("moving_labels", moving_labels, moving),
        ("fixed_labels", fixed_labels, fixed),
    ):
        found = io.as_image(source, name, labels=True)
        if not found.physical:
            found = io.Image(found.data, image.affine)
        if found.shape != image.shape:
            raise ValueError(
                f"{name} has shape {found.shape}, expected that of its image, {image.shape}."
            )
        if image.physical and not io.same_grid(found, image):
            raise ValueError(f"{name} lies elsewhere in space than its image, expected one grid.")
        maps.append(found)
    before = io.resample_to(maps[0].data, moving.affine, fixed.shape, fixed.affine, "nearest")
    return maps[0], maps[1], before


def _need_affine(moving: io.Image, fixed: io.Image) -> bool:
    """Whether the images lie on different grids, or lie apart on one grid.

    Many scans are resampled to one grid without being aligned (FreeSurfer's 256^3, say): the grid
    alone says little. A rigid search on a coarse copy takes a second or two.
    """
    if not io.same_grid(moving, fixed):
        return True
    if not fixed.physical:
        return False
    try:
        matrix = classical.align(moving, fixed, "rigid", largest=30_000)
    except ValueError:  # nothing to align by
        return False
    theta = io.map_to_theta(
        io.voxel_map(fixed.affine, fixed.affine, fixed.ndim, matrix), fixed.shape
    )
    away = affine_to_disp(theta, fixed.shape)[0].movedim(0, -1) * torch.tensor(fixed.spacing)
    bright = fixed.data[0, 0] > fixed.data.mean()
    return bool(away[bright].square().sum(-1).mean().sqrt() > APART)


def _fine_enough(image: io.Image, spacing: Sequence[float], least: int) -> list[float]:
    """The voxel size to work at: that of a network's training, or half or a quarter of it.

    At its lowest level a network sees `least` voxels, its divisor, as one. A slab that is thinner
    than that at the voxels of the training leaves it next to nothing to look at. Then the voxels
    are halved, until the slab is as thick, or they are as fine as its own.
    """
    spacing = list(spacing)

    def thickness() -> int:
        return min(io.working_grid(image.shape, image.affine, spacing)[0])

    while thickness() < least and min(spacing) / 2 > 0.9 * min(image.spacing):
        spacing = [x / 2 for x in spacing]
    return spacing


# intensities and numbers ------------------------------------------------------------------------


def _scaled(image: Tensor, to: tuple[float, float] = (0.0, 1.0), keep: bool = False) -> Tensor:
    """Intensities scaled to a range; a thousandth at either end is cut off.

    keep: leave them alone if they are in the range already.
    """
    low, high = to
    if keep and image.min() >= low and image.max() <= high:
        return image
    bottom, top = np.percentile(image.numpy(), (0.1, 99.9))
    if not top > bottom:
        bottom, top = float(image.min()), float(image.max())
    if not top > bottom:
        return torch.full_like(image, low)
    return ((image - bottom) / (top - bottom)).clamp(0, 1) * (high - low) + low


def _compare(before: Tensor, after: Tensor, fixed: Tensor) -> dict[str, dict[str, float]]:
    """Similarity to the fixed image before and after, intensities scaled to [0, 1]."""
    target = _scaled(fixed)
    found: dict[str, dict[str, float]] = {"lncc": {}, "ncc": {}, "mse": {}}
    for when, image in (("before", before), ("after", after)):
        image = _scaled(image)
        found["lncc"][when] = 1 - float(losses.lncc(image, target))
        found["ncc"][when] = 1 - float(losses.ncc(image, target))
        found["mse"][when] = float(losses.mse(image, target))
    return found


def _dice(
    labels: tuple[io.Image, io.Image, Tensor], moved_labels: Tensor
) -> tuple[dict[str, Any], list[str]]:
    """Dice before and after over the labels that both maps hold; a sentence about the others."""
    moving, fixed, before = labels
    found = [set(image.data.unique().tolist()) - {0} for image in (moving, fixed)]
    shared = sorted(found[0] & found[1])
    if not shared:
        raise ValueError("moving_labels and fixed_labels share no label, expected at least one.")
    scores = [metrics.dice(x, fixed.data, shared)[0].tolist() for x in (before, moved_labels)]
    numbers = {
        "dice": {w: float(np.mean(s)) for w, s in zip(("before", "after"), scores, strict=True)},
        "dice_per_label": {
            str(label): {"before": b, "after": a}
            for label, b, a in zip(shared, *scores, strict=True)
        },
    }
    lost = sorted(found[0] ^ found[1])
    if not lost:
        return numbers, []
    noun = "labels" if len(lost) > 1 else "label"
    verb = "are" if len(lost) > 1 else "is"
    listed = ", ".join(map(str, lost[:10])) + (" and more" if len(lost) > 10 else "")
    return numbers, [f"{noun} {listed} {verb} in one image only and left out of the Dice."]


def _look(moving: io.Image, fixed: io.Image, model: RegistrationModel | None) -> list[str]:
    """What can be said against the pair before anything is computed."""
    found = []
    for name, image in (("moving", moving), ("fixed", fixed)):
        if image.data.min() == image.data.max():
            found.append(f"{name} has the same intensity everywhere.")
        elif model is not None and image.physical and image.data.min() < -200:
            found.append(
                f"{name} has intensities down to {float(image.data.min()):.0f}, as in a CT: "
                "the network was trained on brain MR."
            )
    covered = _covered(
        io.map_to_disp(io.voxel_map(fixed.affine, moving.affine, fixed.ndim), fixed.shape),
        moving.shape,
    )
    if covered < 0.25:
        found.append(
            f"By their headers the images hardly overlap ({100 * covered:.0f} % of the fixed grid)."
        )
    if model is not None and model.info.get("spacing") and fixed.physical:
        if fixed.ndim == 2:
            import nibabel

            seen = "".join(sorted(nibabel.aff2axcodes(fixed.affine)[:2]))
            if any(letter in seen for letter in "SI"):
                found.append("The images are no axial slices, which the network was trained on.")
        shape, _ = io.working_grid(fixed.shape, fixed.affine, model.info["spacing"])
        if max(shape) > 400:
            found.append(f"The field of view is large for the network: {shape} of its voxels.")
    return found


def _one_contrast(info: Mapping[str, Any]) -> bool:
    """Whether the weights say that they have seen pairs of one contrast alone."""
    recipe = info.get("recipe")
    if not recipe or recipe.get("painted") or info.get("contrast") == "any":
        return False
    seen = (recipe.get("motion") or {}).get("contrasts") or [recipe.get("contrast", "t1")]
    return len(set(seen)) == 1 and "random" not in seen


def _correlation(moving: Tensor, fixed: Tensor) -> float:
    """Of two aligned images, where both are brighter than 0.7 of their head's median, in [-1, 1].

    CSF is dark in T1 and in FLAIR and would make them look alike. What is left is grey against
    white matter, whose order differs between T1 and T2, PD or FLAIR. Taken at about 96 voxels along
    the longest axis, where what a deformation leaves apart still overlaps.
    """
    coarse = max(1, round(max(fixed.shape) / 96))
    pool = AVERAGE_POOL[fixed.ndim - 2](coarse, ceil_mode=True)
    moving, fixed = pool(moving), pool(fixed)
    bright = torch.ones_like(fixed, dtype=torch.bool)
    for image in (moving, fixed):
        bright &= image > 0.7 * image[image > 0.05].median()
    if bright.sum() < 100:
        return 1.0
    return float(torch.corrcoef(torch.stack([moving[bright], fixed[bright]]))[0, 1])


def _linear(
    model: LinearResNet,
    theta: Tensor | None,
    pair: Sequence[Tensor],
    grid_affine: np.ndarray,
    refine: int,
) -> Tensor:
    """The network's motion, (1, d, d+1) on the CPU, after `refine` steps of descent per level."""
    assert theta is not None
    theta = theta.cpu().float()
    if not refine:
        return theta
    similarity = model.info.get("recipe", {}).get("similarity", "mutual_information")
    spacing = io.spacing_of(grid_affine, model.ndim)
    moving, fixed = (image.cpu() for image in pair)
    return classical.fit(
        moving, fixed, model.kind, similarity, theta, spacing, refine, search=False
    )


def _beyond_training(model: RegistrationModel, theta: Tensor) -> list[str]:
    """A sentence where a rigid or affine network answers with more than it has been taught."""
    if "motion" not in model.info:
        return []
    angle, shift = model.info["motion"]
    turned = float(metrics.rotation_error(theta, torch.eye(*theta.shape[1:])[None])[0])
    spacing = torch.tensor(model.info["spacing"])
    moved = float((theta[0, :, -1] * spacing).abs().max())
    if turned <= angle and moved <= shift:
        return []
    return [
        f"The motion found, {turned:.1f} degrees and {moved:.1f} mm, lies outside what the "
        f"network was trained on ({angle:g} degrees, {shift:g} mm): try method 'rigid'."
    ]


def _judge(disp: Tensor, moving_shape: tuple[int, ...], numbers: Mapping[str, Any]) -> list[str]:
    """What can be said against the answer."""
    found = []
    covered = _covered(disp, moving_shape)
    if covered < 0.5:
        found.append(f"Only {100 * covered:.0f} % of the fixed image lies inside the moving image.")
    if numbers["folding_percent"] > 1:
        found.append(f"The displacement folds in {numbers['folding_percent']:.1f} % of the voxels.")
    if numbers["lncc"]["after"] < numbers["lncc"]["before"] - 0.01:
        found.append("The images agree less after registration than before (LNCC).")
    return found


def _covered(disp: Tensor, moving_shape: tuple[int, ...]) -> float:
    """The fraction of the fixed grid that looks into the moving image, not beside it."""
    inside = torch.ones(disp.shape[2:], dtype=torch.bool)
    for axis, n in enumerate(moving_shape):
        index = torch.arange(disp.shape[axis + 2]).reshape(
            [-1 if k == axis else 1 for k in range(inside.ndim)]
        )
        place = disp[0, axis] + index
        inside &= (place > -0.5) & (place < n - 0.5)
    return float(inside.float().mean())


def _versions() -> dict[str, str]:
    import nibabel

    return {
        "regkit": regkit.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "nibabel": nibabel.__version__,
    }


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _steps(name: str, affine: str | bool, refine: int) -> str:
    """What was done, in words."""
    first = [str(affine)] if affine and affine != name else []
    last = [f"{refine} steps of refinement"] if refine else []
    return ", ".join([*first, name, *last])


def _page(before: Tensor, fixed: io.Image, moved: Tensor, own: Tensor) -> dict[str, Any]:
    """What the report shows, turned and flipped so that a brain stands upright."""
    import nibabel

    order = io.axis_order(fixed.affine, fixed.ndim)
    axes = [0, 1, *(axis + 2 for axis, _ in order)]
    flipped = [k + 2 for k, (_, sign) in enumerate(order) if sign < 0]

    def turned(x: Tensor) -> Tensor:
        return x.permute(axes).flip(flipped)

    signs = torch.tensor([float(sign) for _, sign in order]).reshape(1, -1, *[1] * fixed.ndim)
    letters: tuple[str, ...] = ()
    if fixed.physical:
        codes = nibabel.aff2axcodes(fixed.affine)
        opposite = dict(zip("RLAPSI", "LRPAIS", strict=True))
        letters = tuple(codes[a] if s > 0 else opposite[codes[a]] for a, s in order)
    return {
        "moving": turned(before),
        "fixed": turned(fixed.data),
        "moved": turned(moved),
        "disp": turned(own)[:, [axis for axis, _ in order]] * signs,
        "spacing": [fixed.spacing[axis] for axis, _ in order],
        "orientation": letters,
    }
