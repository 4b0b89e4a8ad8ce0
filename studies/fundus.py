"""The survey's fundus example as it was, and the same experiment working: results/fundus.json.

    python studies/fundus.py

Tan (2023), section 5, trains a 2D VoxelMorph on FIRE, pairs of photographs of the retina that were
never aligned, and reports Dice near zero, of images without any label map. Here its settings run
first (recipe `tan2023_fundus`), then with the wrong sign of the loss, then with no price on the
displacement: so does the public code whose names and printed lines it shows,
github.com/Hsankesara/VoxelMorph-PyTorch, where the moved image is asked to be smooth. Then what
works: vessels made bright (`vessel_contrast`), the whole shift (`regkit.classical.shift`), an
affine map; and after these the same network, or some steps of descent.

FIRE itself is not shipped and its terms are its own: `--data` takes what data_scripts/fire.py has
prepared. By default synthetic pairs (`regkit.data.vessels`) are written in FIRE's layout, prepared
by that script, and split by it, 4 to 1; `SEED` is one at which each category has as many to test
on. And on one pair of real photographs, the open sample `fundus_pair`, networks answer that have
learned from the set: no control points are known there.

`colours` asks where the survey's near zero comes from. That code sums the windows of its squared
correlation over three colours and divides by the 81 pixels of one: its variances then pass through
zero. The same network learns twice from 24 small synthetic pairs in colour, with that code's loss
and optimiser, dividing by 81 and by 243, and each epoch says what has become of the moved image.

A row holds means over the pairs to test on: the error of the control points in pixels of FIRE,
whose photographs are 2912 wide; the area under the success curve, of all pairs and of each category
(S, P, A); Dice of the vessels, where both photographs show the retina; the survey's Dice, of the
grey images themselves; percent of the voxels where the map folds; the median seconds of a pair, and
those of the training. Vessels are what is above `VESSEL` in `vessel_contrast`. A row is written
when it is there, and not measured again unless its settings are others; a training goes on where it
stopped, and then counts the seconds of its last part only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from regkit import classical, metrics, models
from regkit.data import prepared, samples
from regkit.data.subject import Subject
from regkit.data.vessels import VesselPair, vessel_contrast, vessel_pair, write_as_fire
from regkit.record import Row, Rows, rounded
from regkit.spatial import affine_to_disp, compose, invert_theta, warp
from regkit.training import recipes, train
from regkit.training.recipes import Recipe
from regkit.training.tasks import LandmarkTask

sys.path.insert(0, str(common.ROOT / "data_scripts"))
import fire  # noqa: E402

OUT = common.RESULTS / "fundus.json"
WIDTH = 2912  # pixels of FIRE's photographs
VESSEL = 0.3
EPOCHS = 10
STEPS = 60  # of the refinement
SEED = 2
AFFINE = "contrast, shift, affine"
# the network on photographs as they are, and what is not as the survey says
SURVEY: dict[str, dict[str, Any]] = {
    "as the survey says": {},
    "its loss with the wrong sign": {"weights": {"similarity": -1.0, "diffusion": 1.0}},
    "no price on the displacement": {"weights": {"similarity": 1.0}},
}
WORKING: dict[str, dict[str, Any]] = {f"{AFFINE}, its network": {}}

WINDOW = 81  # pixels of a window, of one colour

Pair = tuple[Subject, Subject]
Method = Callable[[Subject, Subject], Tensor]  # moving, fixed -> disp (1, 2, *S)


# ------------------------------------------------------------------------------------ the methods


def nothing(moving: Subject, fixed: Subject) -> Tensor:
    """No registration."""
    return torch.zeros(1, 2, *fixed.image.shape[1:])


def affine_as_they_are(moving: Subject, fixed: Subject) -> Tensor:
    """An affine descent on the correlation of the photographs themselves."""
    theta = classical.fit(moving.image[None], fixed.image[None], "affine", "ncc")
    return affine_to_disp(theta, fixed.image.shape[1:])


def contrasts(moving: Subject, fixed: Subject) -> tuple[Tensor, Tensor]:
    """Both photographs with their vessels bright, (1, 1, *S)."""
    return vessel_contrast(moving.image[None]), vessel_contrast(fixed.image[None])


def theta_of(moving: Subject, fixed: Subject) -> Tensor:
    """(1, 2, 3): first the shift, then the affine map, of the vessels."""
    pair = contrasts(moving, fixed)
    return classical.fit(*pair, "affine", "ncc", classical.shift(*pair), search=False)


def affine(moving: Subject, fixed: Subject) -> Tensor:
    """What `theta_of` finds, as a displacement."""
    return affine_to_disp(theta_of(moving, fixed), fixed.image.shape[1:])


def refined(moving: Subject, fixed: Subject) -> Tensor:
    """The affine map, then `STEPS` steps of descent on the displacement of this pair."""
    return classical.refine(*contrasts(moving, fixed), affine(moving, fixed), STEPS)


CLASSICAL: dict[str, Method] = {
    "unregistered": nothing,
    "affine, photographs as they are": affine_as_they_are,
    AFFINE: affine,
    f"{AFFINE}, refined": refined,
}


def aligned(moving: Subject, fixed: Subject) -> Pair:
    """Both with their vessels bright, the moving one through its affine map, points included."""
    theta = theta_of(moving, fixed)
    shape = fixed.image.shape[1:]
    one, other = contrasts(moving, fixed)
    moved = warp(one, affine_to_disp(theta, shape))
    back, c = invert_theta(theta)[0], (torch.tensor(shape) - 1) / 2
    points = moving.points
    if len(points):
        points = (points - c) @ back[:, :2].T + back[:, 2] + c
    return replace(moving, image=moved[0], points=points), replace(fixed, image=other[0])


def directly(model: models.RegistrationModel) -> Method:
    """A network on the photographs as they are."""

    @torch.no_grad()
    def method(moving: Subject, fixed: Subject) -> Tensor:
        return model(moving.image[None], fixed.image[None]).disp

    return method


def after_affine(model: models.RegistrationModel) -> Method:
    """A network on the vessels, after the affine map."""

    @torch.no_grad()
    def method(moving: Subject, fixed: Subject) -> Tensor:
        start = affine(moving, fixed)
        one, other = contrasts(moving, fixed)
        return compose(start, model(warp(one, start), other).disp)

    return method


# ---------------------------------------------------------------------------------------- the pairs


def synthetic(folder: Path, each: int, size: int, seed: int = SEED) -> Path:
    """A prepared set of `each` synthetic pairs of each category, made once."""
    out = folder / f"vessels-{each}-{size}-{seed}"
    source = out.with_name(f"{out.name}-as-fire")
    if not (out / "dataset.json").is_file() or not prepared.description(out)["complete"]:
        names = [f"{category}{k:02d}" for category in "SPA" for k in range(1, each + 1)]
        write_as_fire((vessel_pair(name, size) for name in names), source)
        fire.main(source, out, accept_terms=True, size=size, seed=seed)
    return out


def real_pair() -> Pair:
    """The sample, means of 6x6 pixels, in [0, 1]; nobody knows control points.

    Raises:
        FileNotFoundError: it is not in the cache and there is no network.
    """
    moving, fixed = (
        Subject(
            scan.name,
            F.avg_pool2d(scan.image, 6) / 255,
            torch.empty(0),
            scan.affine,
            torch.empty(0),
        )
        for scan in samples.load_fundus_pair()
    )
    return moving, fixed


# ------------------------------------------------------------------------------------ the measuring


def vessel_dice(moving: Subject, fixed: Subject, disp: Tensor) -> float:
    """Dice of the vessels, where both photographs show the retina; 0 if they do nowhere."""
    one, other = contrasts(moving, fixed)
    shown = [(scan.image[None] > 0.04 * scan.image.max()).float() for scan in (moving, fixed)]
    both = (warp(shown[0], disp) > 0.5) & (shown[1] > 0)
    masks = [((image > VESSEL) & both).int() for image in (warp(one, disp), other)]
    return float(metrics.dice(*masks, [1]).nan_to_num(0))


def image_dice(moving: Subject, fixed: Subject, disp: Tensor) -> float:
    """The survey's Dice of the grey images."""
    return soft_overlap(warp(moving.image[None], disp), fixed.image[None])


def soft_overlap(a: Tensor, b: Tensor) -> float:
    """What the survey's code calls Dice: 2 sum(a b) / sum(a + b) of two images."""
    return float(2 * (a * b).sum() / (a + b).sum().clamp(min=1e-5))


def measured(method: Method, pairs: Sequence[Pair]) -> Row:
    """Means over the pairs, see above."""
    errors, rows = [], []
    for moving, fixed in pairs:
        start = time.perf_counter()
        disp = method(moving, fixed)
        seconds = time.perf_counter() - start
        rows.append(
            {
                "vessel_dice": vessel_dice(moving, fixed, disp),
                "image_dice": image_dice(moving, fixed, disp),
                "folding_percent": float(metrics.folding_percent(disp)),
                "seconds": seconds,
            }
        )
        if len(fixed.points):
            scale = WIDTH / fixed.image.shape[1]
            points = fixed.points[None], moving.points[None]
            errors.append(float(metrics.tre(disp, *points, scale).mean()))
    row: Row = {name: sum(r[name] for r in rows) / len(rows) for name in rows[0]}
    row["seconds"] = float(torch.tensor([r["seconds"] for r in rows]).median())
    if errors:
        row |= {"error": sum(errors) / len(errors), "errors": [round(e, 1) for e in errors]}
        row["auc"] = float(metrics.success_auc(torch.tensor(errors)))
        categories = [fixed.name[0] for _, fixed in pairs]
        for category in sorted(set(categories)):
            part = [e for e, c in zip(errors, categories, strict=True) if c == category]
            row[f"auc_{category}"] = float(metrics.success_auc(torch.tensor(part)))
    return row


def plan(learn: Sequence[Pair], epochs: int = EPOCHS, **changes: Any) -> Recipe:
    """`tan2023_fundus` for these pairs."""
    steps = epochs * len(learn)
    return common.recipe_of(
        "tan2023_fundus", shape=tuple(learn[0][1].image.shape[1:]), subjects=len(learn),
        validation=min(4, len(learn)), steps=steps, validate_every=len(learn), **changes,
    )  # fmt: skip


def learned(recipe: Recipe, learn: Sequence[Pair], folder: Path) -> models.RegistrationModel:
    """The network after all steps, trained if it is not there yet; `seconds.json` says how long."""
    weights, spent = folder / "last.safetensors", folder / "seconds.json"
    if not spent.is_file():
        start = time.perf_counter()
        task = LandmarkTask(recipe, learn, learn[: recipe.validation])
        train(recipe, folder, resume=(folder / "recipe.json").is_file(), device="cpu", task=task)
        spent.write_text(json.dumps(time.perf_counter() - start))
    return models.load(weights)


# ----------------------------------------------------------------------------- that code, in colour


def squared_correlation(moved: Tensor, fixed: Tensor, count: int) -> Tensor:
    """Mean squared correlation of windows of 9x9 over all colours of (1, C, H, W).

    count: how many values a window is said to hold. It holds 81 C.
    """
    kernel = torch.ones(1, moved.shape[1], 9, 9)

    def total(values: Tensor) -> Tensor:
        return F.conv2d(values, kernel, padding=1)

    a, b = total(moved), total(fixed)
    cross = total(moved * fixed) - a * b / count
    variances = (total(moved**2) - a**2 / count) * (total(fixed**2) - b**2 / count)
    return (cross**2 / (variances + 2.2e-16)).mean()


def colours(count: int, pairs: Sequence[VesselPair], epochs: int) -> list[Row]:
    """What becomes of the moved image in a training with that code's loss, a row an epoch."""
    torch.manual_seed(0)
    model = models.create("vxm", 2)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.99)
    rows = []
    for epoch in range(1, epochs + 1):
        sums = {"loss": 0.0, "image_dice": 0.0, "brightness": 0.0}
        for k in torch.randperm(len(pairs)).tolist():
            moving, fixed = (scan.image[None] for scan in (pairs[k].moving, pairs[k].fixed))
            moved, target = pairs[k].moving_rgb[None], pairs[k].fixed_rgb[None]
            moved = warp(moved, model(moving, fixed).disp)
            rough = (moved.diff(dim=2).square().mean() + moved.diff(dim=3).square().mean()) / 2
            loss = rough - squared_correlation(moved, target, count)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            sums["loss"] += float(loss.detach())
            sums["image_dice"] += soft_overlap(moved.detach(), target)
            sums["brightness"] += float(moved.detach().mean())
        means = {name: value / len(pairs) for name, value in sums.items()}
        rows.append(rounded({"divided_by": count, "epoch": epoch, **means}))
    return rows


# ----------------------------------------------------------------------------------------- the file


def run(
    data: Path | None = None,
    out: Path = OUT,
    runs: Path = common.RUNS,
    each: int = 15,
    size: int = 192,
    epochs: int = EPOCHS,
    real: bool = True,
    fresh: bool = False,
) -> Row:
    """Measure what is not there yet, and write the file after each row. Arguments as in `main`."""
    if data is None and (each < 5 or size < 64):
        raise ValueError(f"each is {each} and size {size}, expected at least 5 and 64.")
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}, expected 1 or more.")
    folder = synthetic(runs, each, size) if data is None else data
    if (content := prepared.description(folder)["name"]) != "fire":
        raise ValueError(f"data holds the set {content!r}, expected 'fire'.")
    name = "synthetic" if data is None else "fire"
    learn, test = (list(prepared.pairs(folder, split)) for split in ("train", "test"))
    sets: dict[str, list[Pair]] = {name: test} | (_real_set() if real else {})
    rows = Rows(out, ("set", "method"), {"made": common.made(__file__)}, fresh=fresh)
    shape = list(test[0][1].image.shape[1:])

    def add(which: str, method: str, answer: Method, **settings: Any) -> None:
        pairs = sets[which]
        key = {"set": which, "method": method, "pairs": len(pairs), "shape": shape, **settings}
        title = f"{which}, {method}"
        common.measure_once(rows, key, title, lambda: measured(answer, pairs), _in_short)

    for which in sets:
        for method, answer in CLASSICAL.items():
            add(which, method, answer)
    if data is None:
        add(name, "true map", lambda _, fixed: vessel_pair(fixed.name, size).disp)
    steps = epochs // 2 + 1
    if len(rows.table.get("colours", [])) != 2 * steps:
        small = [vessel_pair(f"{c}{k:02d}", 64) for c in "SPA" for k in range(1, 9)]
        rows.put(colours=[row for n in (WINDOW, 3 * WINDOW) for row in colours(n, small, steps)])
    for method, network, settings in networks(learn, epochs, runs, name):
        for which in sets:
            add(which, method, network, **settings)
    return rows.table


def _real_set() -> dict[str, list[Pair]]:
    """The real pair as a set, where it can be had."""
    try:
        return {"fundus_pair": [real_pair()]}
    except FileNotFoundError as error:
        typer.echo(f"The real pair is left out. {error}", err=True)
        return {}


def networks(
    learn: Sequence[Pair], epochs: int, runs: Path, name: str
) -> Iterator[tuple[str, Method, Row]]:
    """Each network, trained if it is not there yet: its row's method, itself, what it depends on.

    Args:
        learn: pairs to learn from; `WORKING` learns from them with vessels bright, aligned.
        name: of the set that they are from.
    """
    for method, changes in SURVEY.items():
        recipe = plan(learn, epochs, **changes)
        model, settings = _trained(recipe, learn, runs, f"raw-{name}")
        yield method, directly(model), settings
    placed = [aligned(*pair) for pair in learn]
    for method, changes in WORKING.items():
        recipe = plan(learn, epochs, **changes)
        model, settings = _trained(recipe, placed, runs, f"aligned-{name}")
        yield method, after_affine(model), settings


def _trained(
    recipe: Recipe, pairs: Sequence[Pair], runs: Path, name: str
) -> tuple[models.RegistrationModel, Row]:
    """The network of a recipe, from its folder below `runs`, and what its rows depend on."""
    identity = recipes.identity(recipe)
    folder = runs / f"fundus-{name}-{identity}"
    model = learned(recipe, pairs, folder)
    seconds = round(json.loads((folder / "seconds.json").read_text()), 1)
    return model, {"trained": recipe.steps, "recipe": identity, "seconds_learning": seconds}


def _in_short(row: Row) -> str:
    points = "" if "error" not in row else f"{row['error']:.1f} pixels, AUC {row['auc']:.2f}, "
    return f"{points}vessels {row['vessel_dice']:.3f}"


def main(
    data: Annotated[
        Path | None, typer.Option(help="FIRE, as data_scripts/fire.py prepares it.")
    ] = None,
    each: Annotated[int, typer.Option(help="Synthetic pairs of each category.")] = 15,
    size: Annotated[int, typer.Option(help="Pixels of a synthetic photograph.")] = 192,
    epochs: Annotated[int, typer.Option(help="Of each training.")] = EPOCHS,
    real: Annotated[bool, typer.Option(help="Also the real pair.")] = True,
    runs: Annotated[Path, typer.Option(help="Folder of pairs and trainings.")] = common.RUNS,
    threads: common.Threads = 1,
    out: common.Out = OUT,
    fresh: common.Fresh = False,
) -> None:
    """Register photographs of the retina as the survey did, and as it works."""
    common.use_threads(threads)
    run(data, out, runs, each, size, epochs, real, fresh)


if __name__ == "__main__":
    common.start(main)
