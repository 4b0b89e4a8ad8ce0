"""Register one pair of images: from two files to one transform, in one call.

    result = regkit.register("moving.nii.gz", "fixed.nii.gz")
    result.save("out")

In four steps. *Prepare*: read the pair and bring it to a working grid, with voxels as in the
network's training, behind an affine registration where one is needed. *Answer*: the network, or a
classical method, finds a displacement there. *Bring back*: the affine part and that displacement
become one `Transform` from the fixed to the moving image. *Judge*: measure before and after, and
say what looks wrong.
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
from regkit import checks, classical, files, io, losses, metrics, models
from regkit.device import choose_device, enough_memory
from regkit.messages import unknown
from regkit.models import Registration, RegistrationModel
from regkit.models.resnet import LinearResNet
from regkit.spatial import warp
from regkit.transform import Floats, Grid, Transform, background, pull, resample

APART = 12.0  # mm; the embedded population has up to 9, brains aligned to a template 2
CLASSICAL = ("rigid", "affine")  # methods without a network
SYN = "syn"  # and the deformable one among them
PREFERRED = "vxm_diff"  # the model whose shipped weights "auto" takes
# what `Result.save` may write; when the last one is there, the others are complete
FILES = ("moved.nii.gz", "disp.nii.gz", "moved_labels.nii.gz", "report.png", "metrics.json")
Progress = Callable[[str, float], None]


@dataclass(frozen=True, eq=False)
class Result:
    """What `register` found. All tensors are on the CPU.

    moved: (1, 1, *S), the moving image on the fixed grid, in its own units. Where the fixed voxels
        are more than 1.5 times as large, it is averaged over them, see `regkit.transform.blur`.
    disp: (1, d, *S), the whole transform, with the affine part and what the two headers say: voxels
        of the fixed grid in, voxels of the moving grid out, so that `regkit.spatial.warp` takes it:
        moved(x) = moving(x + disp(x)). Where the two grids are one, it is also the displacement of
        that grid, and may be inverted, composed, and asked for its Jacobian. Where they differ, it
        may only be warped with: a mirrored header would look like folding, smaller voxels like
        growth. Ask `transform` then.
    transform: the same map in space, see `regkit.transform.Transform`: `points`, `inverse`, `then`,
        `jacobian_determinant`, `moved` for other images.
    theta: (1, d, d+1), the part of `disp` that is affine, as in `regkit.spatial.affine_to_disp`;
        None where no affine registration was done.
    metrics: numbers on the fixed grid. `lncc` and `ncc` are correlations in [0, 1] and [-1, 1]
        (1 is best), `mse` is between the intensities scaled to [0, 1] (0 is best), each before and
        after, of one image sampled in one way; `folding_percent`, `folding_count` and
        `sd_log_jacobian` of the map; `seconds`; with labels `dice`, before and after. And what is
        needed to do it again: method, versions, ...
    warnings: one sentence for each thing that looks wrong.
    moved_labels: (1, 1, *S) int32, if labels were given.
    """

    moved: Tensor
    disp: Tensor
    theta: Tensor | None
    metrics: dict[str, Any]
    warnings: list[str]
    transform: Transform
    moved_labels: Tensor | None = None
    _page: dict[str, Any] = field(default_factory=dict, repr=False)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write moved.nii.gz, disp.nii.gz, metrics.json and report.png into `folder`.

        `disp.nii.gz` is in the ITK convention, see `regkit.io.write_transform`. After an error
        nothing is left half-written.

        Raises:
            ValueError: `folder` is a file, or cannot be written.
        """
        grid = self.transform.fixed
        with files.staged(folder, together=FILES) as temporary:
            io.write_image(self.moved, grid.affine, temporary / "moved.nii.gz", grid.across)
            io.write_transform(self.transform, temporary / "disp.nii.gz")
            if self.moved_labels is not None:
                labels = temporary / "moved_labels.nii.gz"
                io.write_image(self.moved_labels, grid.affine, labels, grid.across)
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
    method: str | os.PathLike[str] = "auto",
    affine: Literal["auto", "rigid", "affine", False] = "auto",
    refine: int = 0,
    device: str = "auto",
    *,
    moving_labels: Any = None,
    fixed_labels: Any = None,
    progress: Progress | None = None,
) -> Result:
    """Find where each voxel of the fixed image lies in the moving image.

    With affine=False the network starts within a second of reading two heads of 1 mm. An affine
    registration before it, and the quick look of "auto", take seconds of their own: they are
    searches, and import PyTorch's optimisers.

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
        progress: called with the name of the stage ("reading", "affine", "network", "syn",
            "refining", "measuring", "done") and the fraction done, 0 to 1.

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
    progress = progress or (lambda stage, fraction: None)
    progress("reading", 0.0)
    work = _prepare(moving, fixed, method, affine, refine, device)
    work.labels = _labels(moving_labels, fixed_labels, work.moving, work.fixed)
    _align(work, progress)
    disp = _answer(work, _on_working_grid(work), progress)
    progress("measuring", 0.85)
    result = _judge(work, _bring_back(work, disp))
    result.metrics["seconds"] = round(time.perf_counter() - start, 2)
    progress("done", 1.0)
    return result


# prepare ----------------------------------------------------------------------------------------


@dataclass
class _Work:
    """A pair between two steps of `register`.

    name, model: of the method; no model for a classical one. affine, refine, device: as asked for.
    matrix: (4, 4), fixed mm -> moving mm, once an affine map is found.
    grid: the working grid, on which the method answers.
    labels: of both images, and the moving one where the headers put it; None without labels.
    """

    moving: io.Image
    fixed: io.Image
    name: str
    model: RegistrationModel | None
    affine: str | bool
    refine: int
    device: torch.device
    warnings: list[str]
    grid: Grid
    matrix: Floats | None = None
    labels: tuple[io.Image, io.Image, Tensor] | None = None


def _prepare(
    moving: Any,
    fixed: Any,
    method: Any,
    affine: Any,
    refine: Any,
    device: str,
) -> _Work:
    """The pair and the method, or the reason why they do not fit; and the working grid."""
    chosen = choose_device(device)
    _check_settings(method, affine, refine)
    a, b = _images(moving, fixed)
    name, model = _method(method, b.ndim)
    if affine == "auto" and name in CLASSICAL:
        affine = name
    if affine == "auto" and isinstance(model, LinearResNet):
        affine = False  # it would do the network's work
    warnings = checks.against_pair(a, b, model)
    work = _Work(a, b, name, model, affine, refine, chosen, warnings, b.grid)
    spacing = model.info.get("spacing") if model is not None and b.physical else None
    if spacing:
        # a network that takes in the image as a whole needs the field of view of its training
        size = None
        if isinstance(model, LinearResNet):
            size = model.info.get("recipe", {}).get("shape")
        elif model is not None:
            spacing = _fine_enough(b, spacing, model.divisor)
        work.grid = b.grid.covering(spacing, size)
        checks.small_enough(b.grid, work.grid)
    return work


def _check_settings(method: Any, affine: Any, refine: Any) -> None:
    if affine not in ("auto", "rigid", "affine", False):
        raise ValueError(f"affine is {affine!r}, expected 'auto', 'rigid', 'affine' or False.")
    if method in CLASSICAL and affine not in ("auto", method):
        raise ValueError(f"affine is {affine!r} and method {method!r}, expected one of them alone.")
    if not isinstance(refine, int) or refine < 0:
        raise ValueError(f"refine is {refine!r}, expected a number of steps, 0 or more.")
    if _is_file(method):
        return
    methods = ["auto", *CLASSICAL, SYN, *models.names(), *models.pretrained()]
    if method not in methods:
        raise unknown("method", str(method), methods)


def _is_file(method: Any) -> bool:
    return isinstance(method, os.PathLike) or str(method).endswith(".safetensors")


def _method(method: str | os.PathLike[str], d: int) -> tuple[str, RegistrationModel | None]:
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
    shipped = {name: models.about(name) for name in models.pretrained()}
    fitting = [name for name, about in shipped.items() if about.ndim == d]
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
    return name, models.load(name)


def _images(moving: Any, fixed: Any) -> tuple[io.Image, io.Image]:
    """Both images, or the reason why they are no pair."""
    a, b = io.as_image(moving, "moving"), io.as_image(fixed, "fixed")
    checks.are_a_pair(a, b)
    if a.physical != b.physical:  # an array beside a file lies on the file's grid
        read = a if a.physical else b
        a, b = (io.Image(x.data, read.affine, True, x.notes, read.across) for x in (a, b))
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
        labels = io.as_image(source, name, labels=True)
        if not labels.physical:
            labels = io.Image(labels.data, image.affine, across=image.across)
        checks.labels_fit(name, labels, image)
        maps.append(labels)
    return maps[0], maps[1], resample(maps[0].data, moving.grid, fixed.grid, "nearest")


def _align(work: _Work, progress: Progress) -> None:
    """The affine registration that was asked for, or that the pair needs."""
    if work.affine == "auto":
        work.affine = "affine" if _need_affine(work.moving, work.fixed) else False
    if work.affine:
        progress("affine", 0.05)
        work.matrix = classical.align(
            work.moving, work.fixed, str(work.affine), lambda f: progress("affine", 0.05 + 0.4 * f)
        )


def _need_affine(moving: io.Image, fixed: io.Image) -> bool:
    """Whether the images lie on different grids, or lie apart on one grid.

    Many scans are resampled to one grid without being aligned (FreeSurfer's 256^3, say), so that
    one grid does not mean that they are. A rigid search on coarse copies finds out.
    """
    if not moving.grid.same_as(fixed.grid):
        return True
    if not fixed.physical:
        return False
    try:
        matrix = classical.align(moving, fixed, "rigid", largest=30_000)
    except ValueError:  # a constant image
        return False
    size = torch.tensor(fixed.spacing, dtype=torch.float32)
    mm = fixed.grid.disp_to(fixed.grid, matrix)[0].movedim(0, -1) * size
    bright = fixed.data[0, 0] > fixed.data.mean()
    return bool(mm[bright].square().sum(-1).mean().sqrt() > APART)


def _fine_enough(image: io.Image, spacing: Sequence[float], least: int) -> list[float]:
    """The voxel size to work at: that of a network's training, or half or a quarter of it.

    At its lowest level a network sees `least` voxels, its divisor, as one. Of a slab that is
    thinner than that at the voxels of the training it would see almost nothing. Then the voxels are
    halved, until the slab has as many, or they are as fine as its own.
    """
    spacing = list(spacing)

    def thickness() -> int:
        return min(image.grid.covering(spacing).shape)

    while thickness() < least and min(spacing) / 2 > 0.9 * min(image.spacing):
        spacing = [x / 2 for x in spacing]
    return spacing


def _on_working_grid(work: _Work) -> tuple[Tensor, Tensor]:
    """Both images as the method wants them: on the working grid, in its range."""
    limits = work.model.info.get("range") if work.model is not None else None
    keep = not work.fixed.physical
    a, b = (_scaled(x.data, limits or (0.0, 1.0), keep) for x in (work.moving, work.fixed))
    a = resample(a, work.moving.grid, work.grid, matrix=work.matrix)
    b = resample(b, work.fixed.grid, work.grid)
    return a.to(work.device), b.to(work.device)


# answer -----------------------------------------------------------------------------------------


def _answer(work: _Work, images: tuple[Tensor, Tensor], progress: Progress) -> Tensor:
    """The displacement that the method finds between the images on the working grid, in its voxels.

    The motion of a rigid or affine network goes into `work.matrix`, and the displacement is zero.
    """
    progress(SYN if work.name == SYN else "network", 0.45)
    memory = (
        f"device is {work.device.type!r}, whose memory is too small for a grid of "
        f"{work.grid.shape} voxels and refine={work.refine}, expected device='cpu', images cropped "
        "to the organ, or refine=0."
    )
    shape = 1, work.fixed.ndim, *work.grid.shape
    disp = torch.zeros(shape, dtype=torch.float32, device=work.device)
    with enough_memory(memory):
        if work.model is not None:
            disp = _network(work, work.model, images, progress)
        elif work.name == SYN:
            a, b = (io.Image(values.cpu(), work.grid.affine) for values in images)
            disp = classical.ants.syn(a, b).to(work.device)
        if work.refine and not isinstance(work.model, LinearResNet):
            progress("refining", 0.55)
            disp = classical.refine(
                *images, disp, work.refine, progress=lambda f: progress("refining", 0.55 + 0.3 * f)
            )
    disp = disp.cpu()
    if not torch.isfinite(disp).all():
        raise ValueError(
            f"method {work.name!r} gave a displacement that is not finite for this pair."
        )
    return disp


def _network(
    work: _Work, model: RegistrationModel, images: tuple[Tensor, Tensor], progress: Progress
) -> Tensor:
    """The displacement that the network finds on the working grid; of a rigid or affine one zero,
    and `work.matrix` has its motion."""
    with torch.no_grad():
        answer: Registration = model.to(work.device)(*images)
    linear = isinstance(model, LinearResNet)
    aligned = answer.moved if linear else images[0]
    work.warnings += checks.against_contrast(model, aligned, images[1], work.fixed.physical)
    if not isinstance(model, LinearResNet):
        return answer.disp.float()
    if work.refine:
        progress("refining", 0.55)
    theta = _linear(model, answer.theta, images, work.grid.spacing, work.refine)
    work.warnings += checks.beyond_training(model, theta)
    # the motion comes before the matrix of an affine registration
    motion = work.grid.matrix_of(theta, work.grid)
    work.matrix = motion if work.matrix is None else work.matrix @ motion
    return torch.zeros_like(answer.disp)


def _linear(
    model: LinearResNet,
    theta: Tensor | None,
    images: Sequence[Tensor],
    spacing: Sequence[float],
    refine: int,
) -> Tensor:
    """The network's motion, (1, d, d+1) on the CPU, after `refine` steps of descent per level."""
    assert theta is not None
    theta = theta.cpu().float()
    if not refine:
        return theta
    similarity = model.info.get("recipe", {}).get("similarity", "mutual_information")
    moving, fixed = (image.cpu() for image in images)
    return classical.fit(
        moving, fixed, model.kind, similarity, theta, spacing, refine, search=False
    )


# bring back, judge ------------------------------------------------------------------------------


def _bring_back(work: _Work, disp: Tensor) -> Transform:
    """The displacement on the working grid, and the matrix, as one map from fixed to moving."""
    fixed = work.fixed.grid
    if work.grid.shape != fixed.shape or not np.array_equal(work.grid.affine, fixed.affine):
        disp = warp(disp, fixed.disp_to(work.grid), padding="border")
        linear = torch.from_numpy(work.grid.map_to(fixed)[:-1, :-1]).float()
        disp = (linear @ disp.flatten(2)).reshape(disp.shape)
    matrix = np.eye(4) if work.matrix is None else work.matrix
    return Transform(fixed, work.moving.grid, matrix, disp)


def _judge(work: _Work, transform: Transform) -> Result:
    """The moved image, measured beside the moving one where its header puts it, and judged."""
    moving, fixed = work.moving, work.fixed
    fill = background(moving.data)
    source = transform.antialiased(moving.data)  # one image for both, or blur would look like gain
    disp, in_fixed_voxels = transform.voxels(), transform.voxels(fixed.grid)
    moved = pull(source, disp, fill=fill)
    before = pull(source, fixed.grid.disp_to(moving.grid), fill=fill)
    folds = int(metrics.folding_count(in_fixed_voxels))
    numbers: dict[str, Any] = {
        **_compare(before, moved, fixed.data),
        "folding_percent": 100 * folds / in_fixed_voxels[0, 0].numel(),
        "folding_count": folds,
        "sd_log_jacobian": float(metrics.sd_log_jacobian(in_fixed_voxels)),
    }
    moved_labels = None
    if work.labels is not None:
        moved_labels = transform.moved(work.labels[0].data, "nearest")
        scores, warnings = _dice(work.labels, moved_labels)
        numbers |= scores
        work.warnings += warnings
    work.warnings += checks.against_answer(transform, numbers)
    numbers |= {
        "method": work.name,
        "affine": work.affine or "none",
        "refine": work.refine,
        "device": work.device.type,
        "seed": 0,  # nothing is drawn at random
        "versions": _versions(),
    }
    theta = None
    if work.matrix is not None:
        theta = fixed.grid.theta_to(moving.grid, work.matrix).float()
    title = "Registration: " + _steps(work.name, work.affine, work.refine)
    page = _page(before, fixed, moved, in_fixed_voxels) | {"title": title}
    return Result(moved, disp, theta, numbers, work.warnings, transform, moved_labels, page)


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
    unit: Tensor = ((image - bottom) / (top - bottom)).clamp(0, 1)
    return unit * (high - low) + low


def _compare(before: Tensor, after: Tensor, fixed: Tensor) -> dict[str, dict[str, float]]:
    """Similarity to the fixed image before and after, intensities scaled to [0, 1]."""
    target = _scaled(fixed)
    scores: dict[str, dict[str, float]] = {"lncc": {}, "ncc": {}, "mse": {}}
    for when, image in (("before", before), ("after", after)):
        image = _scaled(image)
        scores["lncc"][when] = 1 - float(losses.lncc(image, target))
        scores["ncc"][when] = 1 - float(losses.ncc(image, target))
        scores["mse"][when] = float(losses.mse(image, target))
    return scores


def _dice(
    labels: tuple[io.Image, io.Image, Tensor], moved_labels: Tensor
) -> tuple[dict[str, Any], list[str]]:
    """Dice before and after over the labels that both maps hold; a sentence about the others."""
    moving, fixed, before = labels
    in_moving, in_fixed = ({*image.data.unique().tolist()} - {0} for image in (moving, fixed))
    shared = sorted(in_moving & in_fixed)
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
    in_one = sorted(in_moving ^ in_fixed)
    if not in_one:
        return numbers, []
    noun = "labels" if len(in_one) > 1 else "label"
    verb = "are" if len(in_one) > 1 else "is"
    listed = ", ".join(map(str, in_one[:10])) + (" and more" if len(in_one) > 10 else "")
    return numbers, [f"{noun} {listed} {verb} in one image only and left out of the Dice."]


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
    """A value that JSON can represent: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _steps(name: str, affine: str | bool, refine: int) -> str:
    """What was done, for the report's title."""
    first = [str(affine)] if affine and affine != name else []
    last = [f"{refine} steps of refinement"] if refine else []
    return ", ".join([*first, name, *last])


def _page(before: Tensor, fixed: io.Image, moved: Tensor, disp: Tensor) -> dict[str, Any]:
    """What the report shows, on `Grid.canonical`, where a brain stands upright.

    disp: in voxels of the fixed grid.
    """
    order, upright = fixed.grid.axis_order(), fixed.grid.canonical()
    signs = disp.new_tensor([float(sign) for _, sign in order]).reshape(1, -1, *[1] * fixed.ndim)
    turned = fixed.grid.to_canonical
    return {
        "moving": turned(before),
        "fixed": turned(fixed.data),
        "moved": turned(moved),
        "disp": turned(disp)[:, [axis for axis, _ in order]] * signs,
        "spacing": list(upright.spacing),
        "orientation": upright.directions() if fixed.physical else (),
    }
