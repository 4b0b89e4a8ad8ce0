"""One lung, scanned twice: writes results/lung.json.

    python studies/lung.py

The open sample `lung_ct` (`regkit data get lung_ct`): CT of a right lung at two visits, on
different grids, with lung masks and 26 pairs of landmarks. The baseline is fixed, the follow-up
moves. Landmark 34 of the source is an outlier, more than 10 mm from where an affine map fitted to
the others puts it: it is reported apart (`tre_34`), and no other number here contains it.

Every method gets Hounsfield units scaled to [0, 1] and answers with where each voxel of the fixed
scan lies in the moving one; landmarks and mask go through that answer, once. Networks and our own
refinement work on voxels `factor` times as wide as those of the fixed scan, after one affine
registration (`regkit.classical.align`, by mutual information); ANTs on the voxels of the scan,
after its own affine one. No method sees the landmarks, and none but the segmentation branch the
masks: that branch learns from them, so its own Dice on this lung (`found_dice`) says how well it
remembers.

`fcn` learns from breaths of synthetic chests and, every second pair, of these two scans themselves
(`regkit.data.chest`); never from one beside the other. Without its branch it is unsupervised. A
training lives in `--runs` and goes on where it stopped.

A row holds the mean, median and largest error of the landmarks in mm, the Dice of the lung mask,
percent of the voxels where the map folds, and seconds from the two scans to the answer, the affine
registration included, the training not. Each row is written when it is there, and a row that is
there is not measured again, unless settings or weights are others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import common
import nibabel as nib
import numpy as np
import torch
import typer
from common import coarser, levels
from torch import Tensor

from regkit import classical, io, metrics, models
from regkit.data import samples
from regkit.data.chest import scaled
from regkit.data.subject import Subject
from regkit.record import Row, Rows, fingerprint
from regkit.spatial import identity_grid, resize_disp, warp_points
from regkit.training import recipes, train
from regkit.training.recipes import Recipe
from regkit.training.tasks import ChestTask
from regkit.transform import Grid, map_points, pull, resample

OUT = common.RESULTS / "lung.json"
OUTLIER = 9  # the row of the source's landmark 34
COARSE = 40_000  # voxels that the affine search looks at: refinement makes up for the rest
PYRAMID = 3  # its levels
BRANCHES = {"fcn": False, "fcn, segmenting": True}


@dataclass(frozen=True)
class Lung:
    """The two scans, and the grid on which networks work. Points are in mm, (26, 3).

    factor: width of that grid's voxels, in voxels of the fixed scan.
    """

    moving: Subject
    fixed: Subject
    moving_points: np.ndarray
    fixed_points: np.ndarray
    factor: float = 2.0

    @cached_property
    def grid(self) -> Grid:
        return self.fixed.grid.covering([self.factor * h for h in self.fixed.grid.spacing])

    @cached_property
    def affine(self) -> tuple[np.ndarray, float]:
        """(4, 4), fixed mm -> moving mm, and the seconds it took."""
        start = time.perf_counter()
        pair = [io.Image(_image(scan), scan.affine) for scan in (self.moving, self.fixed)]
        return classical.align(*pair, "affine", largest=COARSE), time.perf_counter() - start

    def on_grid(self, scan: Subject, matrix: np.ndarray | None = None) -> Tensor:
        """(1, 1, *S) in [0, 1]: a scan on the grid; matrix: fixed mm -> its mm."""
        return resample(_image(scan), scan.grid, self.grid, matrix=matrix)

    def whole(self, matrix: np.ndarray, disp: Tensor | None = None) -> Tensor:
        """(1, 3, *S), voxels, grid -> moving scan: first `disp` on the grid, then the matrix."""
        start = identity_grid(self.grid.shape)[None]
        target = start if disp is None else start + disp
        return map_points(self.grid.map_to(self.moving.grid, matrix), target) - start


def lung(factor: float = 2.0) -> Lung:
    """The sample."""
    baseline, followup, points, partners = samples.load_lung()
    return Lung(followup, baseline, partners, points, factor)


def _image(scan: Subject) -> Tensor:
    return scaled(scan.image)[None]


def volumes(pair: Lung) -> list[Subject]:
    """Both scans to learn from, on grids of one shape, each in its own place."""
    scans = []
    for scan in (pair.fixed, pair.moving):
        spacing = [pair.factor * h for h in pair.fixed.grid.spacing]
        grid = scan.grid.covering(spacing, pair.grid.shape)
        image = resample(_image(scan), scan.grid, grid)
        mask = resample(scan.labels[None], scan.grid, grid, "nearest")
        scans.append(Subject(scan.name, image[0], mask[0], grid.affine, torch.empty(0)))
    return scans


# ------------------------------------------------------------------------------------ the measuring


def measured(pair: Lung, whole: Tensor, affine: np.ndarray) -> Row:
    """Landmarks, mask and folding of a map from a grid, given by its affine, to the moving scan."""
    voxels = nib.affines.apply_affine(np.linalg.inv(affine), pair.fixed_points)
    partners = warp_points(torch.from_numpy(voxels)[None], whole.double())[0].numpy()
    places = nib.affines.apply_affine(pair.moving.affine, partners)
    errors = np.linalg.norm(places - pair.moving_points, axis=1)
    rest = np.delete(errors, OUTLIER)
    moved = pull(pair.moving.labels[None], whole, "nearest")
    grid = Grid(tuple(whole.shape[2:]), affine)
    mask = resample(pair.fixed.labels[None], pair.fixed.grid, grid, "nearest")
    return {
        "tre": float(rest.mean()),
        "tre_median": float(np.median(rest)),
        "tre_largest": float(rest.max()),
        "tre_34": float(errors[OUTLIER]),
        "lung_dice": float(metrics.dice(moved, mask, [1])),
        "folding_percent": float(metrics.folding_percent(whole)),
    }


def refined(moving: Tensor, fixed: Tensor, disp: Tensor, steps: int) -> Tensor:
    """`regkit.classical.refine`, from coarse to fine; `steps` on each grid."""
    for shape in levels(fixed.shape[2:], PYRAMID):
        pair = [coarser(image, shape) for image in (moving, fixed)]
        disp = classical.refine(*pair, resize_disp(disp, shape), steps)
    return disp


def after_affine(pair: Lung, model: models.RegistrationModel | None = None, steps: int = 0) -> Row:
    """The affine registration, then a network if there is one, then so many steps of descent."""
    matrix, seconds = pair.affine
    start = time.perf_counter()
    moving, fixed = pair.on_grid(pair.moving, matrix), pair.on_grid(pair.fixed)
    disp = torch.zeros(1, 3, *fixed.shape[2:])
    row: Row = {}
    if model is not None:
        with torch.no_grad():
            result = model(moving, fixed)
        disp = result.disp
        if result.logits and not steps:
            row["found_dice"] = _found_dice(pair, result.logits[1])
    if steps:
        disp = refined(moving, fixed, disp, steps)
    seconds += time.perf_counter() - start
    return {**measured(pair, pair.whole(matrix, disp), pair.grid.affine), **row, "seconds": seconds}


def _found_dice(pair: Lung, logits: Tensor) -> float:
    """Dice of the lung that the branch finds in the fixed scan, with its mask."""
    mask = resample(pair.fixed.labels[None], pair.fixed.grid, pair.grid, "nearest")
    return float(metrics.dice(logits.argmax(dim=1, keepdim=True), mask, [1]))


def ants(pair: Lung, metric: str = "correlation") -> Row:
    """ANTs' affine registration and SyN, on the voxels of the fixed scan; metric: of SyN.

    Raises:
        ImportError: antspyx is not installed.
    """
    start = time.perf_counter()
    moving, fixed = (io.Image(_image(scan), scan.affine) for scan in (pair.moving, pair.fixed))
    matrix = classical.ants.align(moving, fixed, "affine")
    placed = replace(moving, affine=np.linalg.inv(matrix) @ moving.affine)
    whole = classical.ants.syn(placed, fixed, metric)
    seconds = time.perf_counter() - start
    return {**measured(pair, whole, pair.fixed.affine), "seconds": seconds}


# ------------------------------------------------------------------------------------ the networks


def plan(pair: Lung, segments: bool, steps: int, subjects: int) -> Recipe:
    """`fcn_3d` on the grid of this pair."""
    recipe = common.recipe_of("fcn_3d")
    changed: dict[str, Any] = {}
    if not segments:
        weights = {k: v for k, v in recipe.weights.items() if k != "segmentation"}
        changed = {"options": {}, "weights": weights}
    return replace(
        recipe,
        shape=pair.grid.shape,
        steps=steps,
        validate_every=max(1, steps // 4),
        subjects=subjects,
        **changed,
    )


def learned(pair: Lung, recipe: Recipe, folder: Path) -> models.RegistrationModel:
    """The network after all steps, trained if it is not there yet."""
    weights = folder / "last.safetensors"
    history = folder / "history.json"
    if not history.is_file() or len(json.loads(history.read_text())) < recipe.steps:
        task = ChestTask(recipe, volumes(pair))
        train(recipe, folder, resume=(folder / "recipe.json").is_file(), device="cpu", task=task)
    return models.load(weights)


# ----------------------------------------------------------------------------------------- the file


def run(
    pair: Lung,
    out: Path = OUT,
    runs: Path = common.RUNS,
    train_steps: int = 4000,
    subjects: int = 40,
    steps: int = 60,
    networks: Sequence[str] = tuple(BRANCHES),
    syn: bool = True,
    fresh: bool = False,
) -> Row:
    """Measure what is not there yet, and write the file after each row. Arguments as in `main`."""
    common.check_names("networks", networks, BRANCHES)
    if steps < 1 or train_steps < 1:
        raise ValueError(f"steps is {steps} and {train_steps}, expected 1 or more of each.")
    rows = Rows(out, ("method",), {"made": common.made(__file__)}, fresh=fresh)

    def add(method: str, measure: Callable[[], Row], **settings: Any) -> None:
        key = {"method": method, "factor": pair.factor, **settings}
        common.measure_once(rows, key, method, measure, _in_short)

    still = pair.whole(np.eye(4))
    add("unregistered", lambda: {**measured(pair, still, pair.grid.affine), "seconds": 0.0})
    add("affine", lambda: after_affine(pair))
    add("affine, refined", lambda: after_affine(pair, None, steps), steps=steps)
    for name in networks:
        recipe = plan(pair, BRANCHES[name], train_steps, subjects)
        identity = recipes.identity(recipe)
        branches = "two-branches" if BRANCHES[name] else "one-branch"
        folder = runs / f"lung-{branches}-{identity}"
        model = learned(pair, recipe, folder)
        weights = fingerprint(folder / "last.safetensors")
        key = {"trained": train_steps, "recipe": identity, "sha256": weights}
        add(f"affine, {name}", partial(after_affine, pair, model), **key)
        improved = partial(after_affine, pair, model, steps)
        add(f"affine, {name}, refined", improved, steps=steps, **key)
    if syn:
        add("ANTs affine and SyN, mutual information", lambda: ants(pair, "mutual_information"))
        add("ANTs affine and SyN", lambda: ants(pair))
    return rows.table


def _in_short(row: Row) -> str:
    return (
        f"{row['tre']:.2f} mm (landmark 34: {row['tre_34']:.1f}), lung {row['lung_dice']:.4f}, "
        f"folding {row['folding_percent']:.4f} %, {row['seconds']:.0f} s"
    )


def main(
    factor: Annotated[float, typer.Option(help="Width of a voxel, in those of the scan.")] = 2.0,
    train_steps: Annotated[int, typer.Option(help="Updates of each network.")] = 4000,
    subjects: Annotated[int, typer.Option(help="Synthetic chests to learn from.")] = 40,
    steps: Annotated[int, typer.Option(help="Of the refinement, on each of its grids.")] = 60,
    network: Annotated[
        list[str] | None, typer.Option(help="Only this network; may be repeated.")
    ] = None,
    networks: Annotated[bool, typer.Option(help="Also networks, which are trained here.")] = True,
    syn: Annotated[bool, typer.Option(help="Also ANTs.")] = True,
    threads: common.Threads = 2,
    out: common.Out = OUT,
    runs: Annotated[Path, typer.Option(help="Folder of the trainings.")] = common.RUNS,
    fresh: common.Fresh = False,
) -> None:
    """Register the lung by affine maps, by `fcn`, by refinement and by ANTs."""
    common.use_threads(threads)
    chosen = tuple(network or BRANCHES) if networks else ()
    run(lung(factor), out, runs, train_steps, subjects, steps, chosen, syn, fresh)


if __name__ == "__main__":
    common.start(main)
