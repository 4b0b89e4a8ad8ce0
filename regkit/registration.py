"""Register one pair of images: from two files to one transform, in one call.

    result = regkit.register("moving.nii.gz", "fixed.nii.gz")
    result.save("out")

In five steps. *Prepare*: read the pair and bring it to a working grid, with voxels as in the
network's training, behind an affine registration where one is needed. *Answer*: the network, or a
classical method, finds a displacement there. *Improve*: the engine, `regkit.classical.greedy`, goes
on from it on the voxels of the fixed image. *Bring back*: the affine part and that displacement
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
from regkit.spatial import compose, warp
from regkit.transform import Floats, Grid, Transform, background, pull, resample
from regkit.trust import second_run, trust_map

APART = 12.0  # mm; the embedded population has up to 9, brains aligned to a template 2
CLASSICAL = ("rigid", "affine")  # methods without a network
SYN = "syn"
ENGINE = "greedy"
NONE = "none"  # what "auto" chooses for two images that cannot be aligned
NOTHING_ALIKE = (
    "No deformation was looked for, as it would follow what the images do not share: name a "
    "method, or register label maps of the organ as images."
)
PAIRWISE: dict[str, Callable[..., classical.Deformation]] = {
    "lddmm": classical.lddmm,
    "demons": classical.sitk.demons,
    "bspline": classical.sitk.bspline,
}
DEFORMABLE = (ENGINE, *PAIRWISE, SYN)
# The weights that "auto" starts from: for any contrast where there are such, as it is not told.
IN_VIEW = 0.75  # of what a start had inside the moving image, the engine has to leave so much in it
PREFERRED = {2: "vxm_diff_brain_2d", 3: "any_contrast_brain_3d"}
CT = -200.0  # an image with lower intensities is no brain MR
# What `Result.save` may write; when the last one is there, the others are complete. report.html is
# added by the command line; `save` removes that of an earlier run.
FILES = (
    "moved.nii.gz",
    "disp.nii.gz",
    "moved_labels.nii.gz",
    "trust.nii.gz",
    "report.png",
    "report.html",
    "metrics.json",
)
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
    trust: (1, 1, *S) in [0, 1], if it was asked for: how far each voxel may be trusted, see
        `regkit.trust`. `metrics["trust"]` has its mean and its 5th percentile ("least") over what
        the fixed image, or its mask, shows.
    """

    moved: Tensor
    disp: Tensor
    theta: Tensor | None
    metrics: dict[str, Any]
    warnings: list[str]
    transform: Transform
    moved_labels: Tensor | None = None
    trust: Tensor | None = None
    _page: dict[str, Any] = field(default_factory=dict, repr=False)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write moved.nii.gz, disp.nii.gz, metrics.json and report.png into `folder`.

        And moved_labels.nii.gz and trust.nii.gz, where there are such.
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
            if self.trust is not None:
                io.write_image(self.trust, grid.affine, temporary / "trust.nii.gz", grid.across)
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
    effort: str = "default",
    similarity: str = "auto",
    symmetric: bool = False,
    moving_mask: Any = None,
    fixed_mask: Any = None,
    moving_labels: Any = None,
    fixed_labels: Any = None,
    trust: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Result:
    """Find where each voxel of the fixed image lies in the moving image.

    Args:
        moving, fixed: two images of 2 or 3 axes; paths or nibabel images, whose place in space is
            respected, so that shape, voxel size and orientation may differ; or arrays or tensors of
            shape S, both on one grid. Integer images are converted to float32.
        method: "auto": the answer of shipped weights where they fit the pair and bring it closer,
            and from there the engine. "greedy": the engine alone, see `regkit.classical.greedy`.
            The name of shipped weights (`regkit.models.pretrained()`), the name of a model with
            shipped weights, or a weights file: one pass of the network. "rigid" or "affine". Or
            another classical method: "lddmm" (`regkit.classical.lddmm`), "demons" and "bspline"
            (`regkit.classical.sitk`), "syn" (ANTs, see `regkit.classical.ants.syn`).
        affine: an affine registration before that: "rigid", "affine", False, or "auto",
            which does one where the headers put the images on different grids, or where a quick
            look finds the images more than 12 mm apart.
        refine: steps of the engine after another method's answer, on each of its levels at most;
            on the image's own voxels no more than the effort's. After a rigid or affine network, of
            descent on each level.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        effort: of the engine: "fast", "default" or "best".
        similarity: of the engine: "lncc", "mse", "mind", "mutual_information"; "auto" is lncc for
            images that seem to be of one contrast, else mind.
        symmetric: let the engine move both images half-way; the answer comes with an inverse, whose
            error is measured.
        moving_mask, fixed_mask: on the grids of the two images; affine search and engine look at
            what lies where they are not 0, alone.
        moving_labels, fixed_labels: label maps on the grids of the two images, for the Dice.
        trust: map how far each place may be trusted, see `regkit.trust`; takes a second run.
        progress: called with the name of the stage ("reading", "affine", "network", the name of a
            classical method, "refining", "measuring", "done") and the fraction done, 0 to 1.
        tell: called with sentences, on what was chosen and why, and how long the engine may take;
            they are in `metrics["choices"]` as well.

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
    engine = _Engine(effort, similarity, symmetric, refine, method in ("auto", ENGINE), trust)
    work = _prepare(moving, fixed, method, affine, engine, device)
    work.tell = tell
    work.labels = _labels(moving_labels, fixed_labels, work.moving, work.fixed)
    work.masks = _masks(moving_mask, fixed_mask, work.moving, work.fixed)
    _align(work, progress)
    disp = _on_fixed_grid(work, _answer(work, progress))
    if engine.wanted and work.name != NONE and not isinstance(work.model, LinearResNet):
        disp = _improve(work, disp, progress)
    progress("measuring", 0.85)
    matrix = np.eye(4) if work.matrix is None else work.matrix
    result = _judge(work, Transform(work.fixed.grid, work.moving.grid, matrix, disp))
    result.metrics["seconds"] = round(time.perf_counter() - start, 2)
    progress("done", 1.0)
    return result


# prepare ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Engine:
    """What is asked of the engine, see `register`.

    alone: also without a number of steps. trust: a second run, for the map of trust.
    """

    effort: str
    similarity: str
    symmetric: bool
    refine: int
    alone: bool
    trust: bool = False

    @property
    def wanted(self) -> bool:
        return self.alone or self.refine > 0


@dataclass
class _Work:
    """A pair between two steps of `register`.

    name, model: of the method; no model for a classical one. affine, engine, device: as asked for.
    auto: whether the network was chosen for the user, and may be left out.
    grid: the working grid, on which the method answers.
    matrix: (4, 4), fixed mm -> moving mm, once an affine map is found.
    labels: of both images, and the moving one where the headers put it; None without labels.
    masks: of the moving and the fixed image, on their grids; None where there is none.
    numbers: of the engine, for the metrics. choices: what `say` has said.
    """

    moving: io.Image
    fixed: io.Image
    name: str
    model: RegistrationModel | None
    affine: str | bool
    engine: _Engine
    device: torch.device
    warnings: list[str]
    grid: Grid
    auto: bool = False
    matrix: Floats | None = None
    labels: tuple[io.Image, io.Image, Tensor] | None = None
    masks: tuple[Tensor | None, Tensor | None] = (None, None)
    numbers: dict[str, Any] = field(default_factory=dict)
    choices: list[str] = field(default_factory=list)
    tell: Callable[[str], None] | None = None

    def say(self, sentence: str) -> None:
        """Keep a sentence on what was chosen, and tell it to the user."""
        self.choices.append(sentence)
        if self.tell is not None:
            self.tell(sentence)


def _prepare(
    moving: Any,
    fixed: Any,
    method: Any,
    affine: Any,
    engine: _Engine,
    device: str,
) -> _Work:
    """The pair and the method, or the reason why they do not fit; and the working grid."""
    chosen = choose_device(device)
    _check_settings(method, affine, engine)
    a, b = _images(moving, fixed)
    name, model = _method(method, b.ndim)
    if method == "auto" and min(float(a.data.min()), float(b.data.min())) < CT:
        name, model = ENGINE, None
    if affine == "auto" and name in CLASSICAL:
        affine = name
    if affine == "auto" and isinstance(model, LinearResNet):
        affine = False  # it would do the network's work
    warnings = checks.against_pair(a, b, model)
    work = _Work(a, b, name, model, affine, engine, chosen, warnings, b.grid, method == "auto")
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


def _check_settings(method: Any, affine: Any, engine: _Engine) -> None:
    if affine not in ("auto", "rigid", "affine", False):
        raise ValueError(f"affine is {affine!r}, expected 'auto', 'rigid', 'affine' or False.")
    if method in CLASSICAL and affine not in ("auto", method):
        raise ValueError(f"affine is {affine!r} and method {method!r}, expected one of them alone.")
    if not isinstance(engine.refine, int) or engine.refine < 0:
        raise ValueError(f"refine is {engine.refine!r}, expected a number of steps, 0 or more.")
    if engine.effort not in classical.EFFORTS:
        raise unknown("effort", engine.effort, classical.EFFORTS)
    if engine.similarity not in ("auto", *classical.DISSIMILARITIES):
        raise unknown("similarity", engine.similarity, ["auto", *classical.DISSIMILARITIES])
    if _is_file(method):
        return
    methods = ["auto", *CLASSICAL, *DEFORMABLE, *models.names(), *models.pretrained()]
    if method not in methods:
        raise unknown("method", str(method), methods)


def _is_file(method: Any) -> bool:
    return isinstance(method, os.PathLike) or str(method).endswith(".safetensors")


def _method(method: str | os.PathLike[str], d: int) -> tuple[str, RegistrationModel | None]:
    """The name that goes into the metrics, and the network; None for a classical method."""
    if method == SYN:
        try:
            classical.ants.load()
        except ImportError as error:
            raise ValueError(str(error)) from None
    if method in (*CLASSICAL, *DEFORMABLE):
        return str(method), None
    if method == "auto":
        method = PREFERRED[d]
        if method not in models.pretrained():
            return ENGINE, None
    if _is_file(method) or method in models.pretrained():
        name, model = Path(method).name, models.load(method)
        if model.ndim != d:
            raise ValueError(f"method {name!r} is a {model.ndim}D network and the images are {d}D.")
        return name, model
    shipped = {name: models.about(name) for name in models.pretrained()}
    fitting = [name for name, about in shipped.items() if about.ndim == d and about.name == method]
    if not fitting:
        raise ValueError(
            f"method is {method!r}, for which no {d}D weights are shipped, expected a weights file "
            f"(`regkit train` makes one) or one of {', '.join(shipped) or 'rigid, affine'}."
        )
    name = min(fitting)
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


def _masks(
    moving_mask: Any, fixed_mask: Any, moving: io.Image, fixed: io.Image
) -> tuple[Tensor | None, Tensor | None]:
    """Both masks, (1, 1, *M) and (1, 1, *S), 0 and 1; None for one that is not given."""
    masks: list[Tensor | None] = []
    for name, source, image in (
        ("moving_mask", moving_mask, moving),
        ("fixed_mask", fixed_mask, fixed),
    ):
        if source is None:
            masks.append(None)
            continue
        mask = io.as_image(source, name, labels=True)
        if not mask.physical:
            mask = io.Image(mask.data, image.affine, across=image.across)
        checks.labels_fit(name, mask, image)
        inside = (mask.data != 0).float()
        if not inside.any():
            raise ValueError(f"{name} is empty, expected voxels that are not 0.")
        masks.append(inside)
    return masks[0], masks[1]


def _align(work: _Work, progress: Progress) -> None:
    """The affine registration that was asked for, or that the pair needs."""
    if work.affine == "auto":
        apart = _apart(work.moving, work.fixed)
        work.affine = "affine" if apart else False
        work.say(
            f"An affine registration first: {apart}."
            if apart
            else "No affine registration: the images lie on one grid, less than "
            f"{APART:.0f} mm apart."
        )
    if work.affine:
        progress("affine", 0.05)
        found = classical.aligned(
            work.moving,
            work.fixed,
            str(work.affine),
            lambda f: progress("affine", 0.05 + 0.4 * f),
            mask=work.masks[1],
        )
        work.warnings += found.warnings
        believed = found.believed and _masks_agree(work, found.matrix)
        work.matrix = found.matrix if believed or not found.believed else np.eye(4)
        if work.auto and not believed:
            work.name, work.model = NONE, None
            work.warnings.append(NOTHING_ALIKE)


def _masks_agree(work: _Work, matrix: Floats) -> bool:
    """Whether two masks overlap at least as well after a map as by the headers; if not, say so."""
    moving_mask, mask = work.masks
    if moving_mask is None or mask is None:
        return True
    before, after = (
        float(metrics.dice(moved.int(), mask.int(), [1])[0, 0])
        for moved in (
            resample(moving_mask, work.moving.grid, work.fixed.grid, "nearest", found)
            for found in (np.eye(4), matrix)
        )
    )
    if after < before:
        work.warnings.append(
            f"The {work.affine} map found for the two images is refused: the two masks overlap "
            f"less after it, with a Dice of {after:.2f} instead of {before:.2f}."
        )
    return after >= before


def _apart(moving: io.Image, fixed: io.Image) -> str:
    """Why an affine registration is needed: different grids, or images apart on one grid. Or "".

    Many scans are resampled to one grid without being aligned (FreeSurfer's 256^3, say), so that
    one grid does not mean that they are. A rigid search on coarse copies finds out.
    """
    if not moving.grid.same_as(fixed.grid):
        return "the images lie on different grids"
    if not fixed.physical:
        return ""
    try:
        matrix = classical.align(moving, fixed, "rigid", largest=30_000)
    except ValueError:  # a constant image
        return ""
    size = torch.tensor(fixed.spacing, dtype=torch.float32)
    mm = fixed.grid.disp_to(fixed.grid, matrix)[0].movedim(0, -1) * size
    bright = fixed.data[0, 0] > fixed.data.mean()
    distance = float(mm[bright].square().sum(-1).mean().sqrt())
    return f"a quick look finds the images {distance:.0f} mm apart" if distance > APART else ""


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


def _on_grid(work: _Work, grid: Grid) -> tuple[Tensor, Tensor]:
    """Both images as the method wants them: on one grid, in the network's range or in [0, 1]."""
    limits = work.model.info.get("range") if work.model is not None else None
    keep = not work.fixed.physical
    a, b = (_scaled(x.data, limits or (0.0, 1.0), keep) for x in (work.moving, work.fixed))
    a = resample(a, work.moving.grid, grid, matrix=work.matrix)
    b = resample(b, work.fixed.grid, grid)
    return a.to(work.device), b.to(work.device)


def _masks_on_grid(work: _Work) -> tuple[Tensor | None, Tensor | None]:
    """Both masks on the fixed grid."""
    moving_mask, mask = work.masks
    if moving_mask is not None:
        grids = work.moving.grid, work.fixed.grid
        moving_mask = resample(moving_mask, *grids, "nearest", work.matrix)
    both = [None if x is None else x.to(work.device) for x in (moving_mask, mask)]
    return both[0], both[1]


# answer -----------------------------------------------------------------------------------------


def _answer(work: _Work, progress: Progress) -> Tensor:
    """The displacement that the method finds between the images on the working grid, in its voxels.

    The motion of a rigid or affine network goes into `work.matrix`, and the displacement is zero.
    """
    disp = torch.zeros(1, work.fixed.ndim, *work.grid.shape)
    if work.name in (*CLASSICAL, ENGINE, NONE):
        return disp
    progress("network" if work.model is not None else work.name, 0.45)
    images = _on_grid(work, work.grid)
    with enough_memory(_too_small(work, work.grid)):
        if work.model is not None:
            disp = _network(work, work.model, images, progress)
        elif work.name == SYN:
            a, b = (io.Image(values.cpu(), work.grid.affine) for values in images)
            disp = classical.ants.syn(a, b)
        else:
            disp = PAIRWISE[work.name](*images, spacing=work.grid.spacing).disp
    return _finite(work, disp)


def _finite(work: _Work, disp: Tensor) -> Tensor:
    disp = disp.cpu()
    if not torch.isfinite(disp).all():
        raise ValueError(
            f"method {work.name!r} gave a displacement that is not finite for this pair."
        )
    return disp


def _too_small(work: _Work, grid: Grid) -> str:
    """What to say where the memory does not suffice."""
    return (
        f"device is {work.device.type!r}, whose memory is too small for a grid of "
        f"{grid.shape} voxels and refine={work.engine.refine}, expected device='cpu', images "
        "cropped to the organ, effort='fast', or refine=0."
    )


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
    if work.engine.refine:
        progress("refining", 0.55)
    theta = _linear(model, answer.theta, images, work.grid.spacing, work.engine.refine)
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


# improve ----------------------------------------------------------------------------------------


def _on_fixed_grid(work: _Work, disp: Tensor) -> Tensor:
    """A displacement on the working grid as one on the fixed grid, in its voxels."""
    fixed = work.fixed.grid
    if work.grid.shape == fixed.shape and np.array_equal(work.grid.affine, fixed.affine):
        return disp
    disp = warp(disp, fixed.disp_to(work.grid), padding="border")
    linear = torch.from_numpy(work.grid.map_to(fixed)[:-1, :-1]).float()
    return (linear @ disp.flatten(2)).reshape(disp.shape)


def _improve(work: _Work, disp: Tensor, progress: Progress) -> Tensor:
    """The engine's displacement on the fixed grid, from the one that another method has found."""
    engine, grid = work.engine, work.fixed.grid
    moving, fixed = _on_grid(work, grid)
    for name, image in (("moving", moving), ("fixed", fixed)):
        if image.min() == image.max():
            work.warnings.append(f"{name} shows nothing, so that no deformation was looked for.")
            return disp
    similarity = _similarity(work, moving, fixed)
    moving_mask, mask = _masks_on_grid(work)

    def value(disp: Tensor) -> float:
        return classical.disagreement(moving, fixed, disp, similarity, mask, moving_mask)

    disp = disp.to(work.device)
    with enough_memory(_too_small(work, grid)):
        before = value(torch.zeros_like(disp))
        first = value(disp) if disp.any() else before
        if work.auto and work.model is not None:
            disp, first = _start(work, disp, before, first)
        seconds, memory = classical.expected(
            fixed,
            spacing=grid.spacing,
            similarity=similarity,
            effort=engine.effort,
            symmetric=engine.symmetric,
        )
        work.say(
            f"Engine, effort {engine.effort}: at most about {max(1.0, seconds):.0f} s and "
            f"{max(0.1, memory / 2**30):.1f} GiB."
        )
        found = classical.greedy(
            moving,
            fixed,
            disp,
            spacing=grid.spacing,
            similarity=similarity,
            effort=engine.effort,
            mask=mask,
            moving_mask=moving_mask,
            symmetric=engine.symmetric,
            steps=engine.refine or None,
            progress=lambda done, value: progress("refining", 0.55 + 0.3 * done),
        )
        after, steps = value(found.disp), len(found.values)
    if after > first:  # a few steps from a good start
        work.say("The engine did not bring the images closer: the start is kept.")
        found, after = classical.Deformation(disp), first
    elif _out_of_view(found.disp, disp):
        work.warnings.append(
            "The engine led the images apart, so that its map was not taken: they may show "
            "different parts, or too little that agrees."
        )
        found, after = classical.Deformation(disp), first
    work.numbers = {
        "similarity": similarity,
        "effort": engine.effort,
        "steps": steps,
        "dissimilarity": {"before": before, "after": after},
    }
    if found.inverse is not None:
        apart = compose(found.disp, found.inverse)[0].movedim(0, -1).cpu()
        mm = (apart * torch.tensor(grid.spacing, dtype=torch.float32)).square().sum(-1).sqrt()
        work.numbers["inverse_error_mm"] = {"mean": float(mm.mean()), "largest": float(mm.max())}
    return _finite(work, found.disp)


def _out_of_view(found: Tensor, start: Tensor) -> bool:
    """Whether a map looks beside the moving image where it did not from the start."""
    shape = tuple(start.shape[2:])
    inside, before = (checks.coverage(x.cpu(), shape) for x in (found, start))
    return inside < IN_VIEW * before


def _trusted(work: _Work, disp: Tensor) -> Tensor:
    """How far the displacement on the fixed grid may be trusted, (1, 1, *S) on the CPU.

    A second run goes from the fixed image to the moving one as the affine part has it.
    """
    grid = work.fixed.grid
    moving, fixed = _on_grid(work, grid)
    moving_mask, mask = _masks_on_grid(work)
    disp, back = disp.to(work.device), None
    with enough_memory(_too_small(work, grid)):
        if moving.min() < moving.max() and fixed.min() < fixed.max():  # else nothing to go by
            similarity = work.numbers.get("similarity") or _similarity(work, moving, fixed)
            back = second_run(moving, fixed, grid.spacing, similarity, mask, moving_mask)
        moved = warp(moving, disp, padding="border")
        return trust_map(moved, fixed, disp, back, grid.spacing).cpu()


def _similarity(work: _Work, moving: Tensor, fixed: Tensor) -> str:
    """The engine's similarity: as asked for, or what the images call for."""
    if work.engine.similarity != "auto":
        return work.engine.similarity
    one = checks.one_kind(moving.cpu(), fixed.cpu())
    work.say(
        "Similarity lncc: the images seem to be of one contrast."
        if one
        else "Similarity mind: the images seem to be of two contrasts."
    )
    return "lncc" if one else "mind"


def _start(work: _Work, disp: Tensor, without: float, after: float) -> tuple[Tensor, float]:
    """The network's displacement, where it brings the images closer, else none; and its value."""
    better = after < without
    work.say(
        f"{work.name} takes the dissimilarity from {without:.4f} to {after:.4f}: the engine starts "
        + ("there." if better else "without it.")
    )
    if better:
        return disp, after
    work.name = ENGINE
    return torch.zeros_like(disp), without


# judge ------------------------------------------------------------------------------------------


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
    shown, correlations = _shown(work), [numbers[name]["after"] for name in ("ncc", "lncc")]
    deformed = bool(transform.disp.any())
    images = _scaled(moved), _scaled(fixed.data)
    unlike = checks.against_unlike(*images, shown, deformed, *correlations)
    trust = _trusted(work, transform.disp) if work.engine.trust else None
    if trust is not None:
        inside = trust[shown]
        least = float(np.quantile(inside, 0.05))
        numbers["trust"] = {"mean": float(inside.mean()), "least": least}
        unlike = unlike or checks.against_trust(numbers["trust"]["mean"])
    work.warnings += unlike
    numbers |= {
        "method": work.name,
        "affine": work.affine or "none",
        "refine": work.engine.refine,
        "engine": work.numbers,
        "choices": work.choices,
        "device": work.device.type,
        "seed": 0,  # nothing is drawn at random
        "versions": _versions(),
    }
    theta = None
    if work.matrix is not None:
        theta = fixed.grid.theta_to(moving.grid, work.matrix).float()
    title = "Registration: " + _steps(work)
    page = _page(before, fixed, moved, in_fixed_voxels) | {"title": title}
    if trust is not None:
        page["trust"] = fixed.grid.to_canonical(trust)
    return Result(moved, disp, theta, numbers, work.warnings, transform, moved_labels, trust, page)


def _shown(work: _Work) -> Tensor:
    """Which voxels of the fixed grid count for the mean trust, (1, 1, *S) bool: the mask's, or
    those that differ from the background; all where none does."""
    mask, fixed = work.masks[1], _scaled(work.fixed.data)
    shown = mask > 0.5 if mask is not None else (fixed - background(fixed)).abs() > 0.05
    return shown if shown.any() else torch.ones_like(shown)


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


def _steps(work: _Work) -> str:
    """What was done, for the report's title."""
    steps = [str(work.affine)] if work.affine and work.affine != work.name else []
    steps.append(work.name)
    if work.engine.wanted and work.name != ENGINE:
        refine = work.engine.refine
        steps.append(f"{refine} steps of refinement" if refine else ENGINE)
    return ", ".join(steps)


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
