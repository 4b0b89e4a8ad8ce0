"""Registration across modalities, on real images: writes results/modalities.json.

    python studies/modalities.py

Two parts, each with an open sample: `ptbp_brain` and `prostate_mr_us` (`regkit data get`).

child: T1, FA and CBF of one child lie on one grid, aligned by their source. One of the three is
turned or warped by a known map, and registered to T1 as it is: the error is known in every voxel.
The maps stay in the plane, as the slab is 8 mm thick, and are the same in all its slices. All is
done on voxels of 2 mm, about as wide as those in which FA is measured, and all images are cut out
by the tissue labels, so all show the same outline, which helps every method. Networks learned whole
brains, and ANTs finds nothing in four slices: they get the slab with its two outer slices repeated
`BEYOND` times. T1 to T1 is the control that says what a method can do on such a slab within one
contrast. It is easier than any real pair: both images hold the same noise.

prostate: MR is registered to ultrasound of the same patient, no true map is known. A network learns
from the outlines of the gland alone (weak labels: they are needed to learn, not to register), on 6
of the 8 patients, and is tested on the other 2, four times over. Nothing is chosen by the patients
that are held out: the weights after the last step count, and all folds have the same settings.

Each row is written when it is there, and a row that is there is not measured again, unless its
weights are others: a run that was stopped goes on. After a change of the settings below: `--fresh`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import common
import nibabel as nib
import numpy as np
import torch
import typer
from common import coarser, levels
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset

import regkit
from regkit import classical, io, metrics, models
from regkit.data.samples import load_prostates, load_ptbp_modalities
from regkit.losses import mutual_information
from regkit.record import Row, Rows, fingerprint, rounded
from regkit.spatial import (
    affine_to_disp,
    integrate,
    invert_theta,
    resize,
    resize_disp,
    rigid_theta,
    warp,
)
from regkit.training import train
from regkit.training.recipes import Recipe
from regkit.transform import resample

OUT = common.RESULTS / "modalities.json"
KINDS = ("rigid", "smooth")
SEEDS = (0, 1, 2, 3, 4)  # of the known maps; the smoothness was chosen on seeds 100 and 101
SAME = "vxm_diff_brain_3d"  # learned T1 to T1
ANY = "any_contrast_brain_3d"

# of the descent on mutual information
SMOOTHNESS = 20.0
STEPS = 60  # on each level
LEVELS = 4

ANGLE, SHIFT = 10.0, 6.0  # degrees and mm, of the rigid maps, at most
LENGTH, WAVE = 4.0, 16.0  # mm, of the smooth maps: root mean square, and the width of their blur
MM = 2  # of a voxel
AFFINE = np.diag([MM, MM, MM, 1.0])
TISSUES = (1, 2, 3, 4)
BEYOND = 10

Method = Callable[[Tensor, Tensor], Tensor]  # moving, fixed (1, 1, *S) -> disp (1, d, *S)


# ------------------------------------------------------------------------------------ the methods


def nothing(moving: Tensor, fixed: Tensor) -> Tensor:
    """No registration."""
    return fixed.new_zeros(1, fixed.ndim - 2, *fixed.shape[2:])


def descent(moving: Tensor, fixed: Tensor) -> Tensor:
    """Our own deformable registration by mutual information, from coarse to fine."""
    disp = None
    for shape in levels(fixed.shape[2:], LEVELS):
        pair = [coarser(image, shape) for image in (moving, fixed)]
        start = nothing(*pair) if disp is None else resize_disp(disp, shape)
        disp = classical.refine(*pair, start, STEPS, SMOOTHNESS, dissimilarity=mutual_information)
    assert disp is not None
    return disp


def linear(kind: str, similarity: str = "mutual_information") -> Method:
    """Our own rigid or affine descent."""
    return lambda a, b: affine_to_disp(classical.fit(a, b, kind, similarity), b.shape[2:])


def longer(method: Method) -> Method:
    """The same on a slab that goes on above and below as it ends."""

    def slab(image: Tensor) -> Tensor:
        low, high = (x.expand(*x.shape[:-1], BEYOND) for x in (image[..., :1], image[..., -1:]))
        return torch.cat([low, image, high], dim=-1)

    return lambda moving, fixed: method(slab(moving), slab(fixed))[..., BEYOND:-BEYOND]


def ants_rigid(moving: Tensor, fixed: Tensor) -> Tensor:
    """ANTs' rigid search by mutual information."""
    a, b = io.Image(moving, AFFINE), io.Image(fixed, AFFINE)
    return b.grid.disp_to(a.grid, classical.ants.align(a, b, "rigid"))


def syn(moving: Tensor, fixed: Tensor) -> Tensor:
    """ANTs' SyN by mutual information."""
    pair = [io.Image(image, AFFINE) for image in (moving, fixed)]
    return classical.ants.syn(*pair, metric="mutual_information")


def engine(similarity: str) -> Method:
    """Our own engine, at its default effort."""
    return lambda moving, fixed: (
        classical.greedy(moving, fixed, spacing=(MM,) * 3, similarity=similarity).disp
    )


def network(weights: str) -> Method:
    """A network in 3D: shipped weights by name, or a file.

    Raises:
        FileNotFoundError: the weights are not there.
    """
    models.load(weights)

    def method(moving: Tensor, fixed: Tensor) -> Tensor:
        pair = [nib.Nifti1Image(image[0, 0].numpy(), AFFINE) for image in (moving, fixed)]
        return regkit.register(*pair, method=weights, affine=False, device="cpu").disp

    return method


# ------------------------------------------------------------------------------ a child, known maps


@dataclass(frozen=True)
class Child:
    """One child, cut out of the head: images (1, 1, *S) in [0, 1], 2 mm, and tissue labels."""

    images: dict[str, Tensor]
    labels: Tensor


@cache
def child() -> Child:
    """T1, FA and CBF, with 16 mm of air around the brain in its plane."""
    scans = load_ptbp_modalities()
    whole = scans["t1"].labels
    assert whole is not None
    where = whole[0].nonzero()
    low, high = where.min(0).values - 16, where.max(0).values + 17
    box = (slice(None), *(slice(max(int(a), 0), int(b)) for a, b in zip(low[:2], high[:2])))
    inside = whole[box] > 0
    labels = whole[box][:, ::MM, ::MM, ::MM]
    images = {}
    for name, scan in scans.items():
        image = scan.image[box] * inside
        bottom, top = np.percentile(image[inside].numpy(), (0.5, 99.5))
        image = ((image - bottom) / (top - bottom)).clamp(0, 1) * inside
        blurred = ndimage.gaussian_filter(image[0].numpy(), 0.5 * (MM**2 - 1) ** 0.5)
        images[name] = torch.from_numpy(blurred)[None, None, ::MM, ::MM, ::MM].contiguous()
    return Child(images, labels[None].contiguous())


def known_map(kind: str, seed: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A map in the plane of the first two axes, and its inverse: (1, 3, *S), voxels of `MM`.

    Args:
        kind: "rigid", a turn and a shift within `ANGLE` and `SHIFT`; or "smooth", the flow of a
            velocity that is white noise, blurred by `WAVE` and made `LENGTH` strong.
    """
    random = np.random.default_rng(seed)
    if kind == "rigid":
        angle = np.radians(random.uniform(-ANGLE, ANGLE))
        shift = [*random.uniform(-SHIFT, SHIFT, 2) / MM, 0.0]
        theta = rigid_theta(torch.tensor([[0.0, 0.0, angle]]), torch.tensor([shift]))
        disp, inverse = (affine_to_disp(x.float(), shape) for x in (theta, invert_theta(theta)))
        return disp, inverse
    noise = random.standard_normal((2, *shape[:2]))
    blurred = ndimage.gaussian_filter(noise, (0, WAVE / MM, WAVE / MM), mode="wrap")
    blurred *= LENGTH / MM / np.sqrt((blurred**2).sum(0).mean())
    svf = torch.zeros(1, 3, *shape)
    svf[0, :2] = torch.from_numpy(blurred)[..., None]
    return integrate(svf), integrate(-svf)


def child_row(method: Method, kind: str, moving: str, seed: int) -> Row:
    """One known map, one method: errors in mm inside the brain, before and after."""
    whole = child()
    brain, fixed = whole.labels > 0, whole.images["t1"]
    truth, inverse = known_map(kind, seed, fixed.shape[2:])
    # registration finds disp with moved(x) = moving(x + disp(x)); of moving(x) = image(x + i(x))
    # that makes the image again where disp undoes i
    image = warp(whole.images[moving], inverse)
    labels = warp(whole.labels, inverse, mode="nearest")
    start = time.perf_counter()
    disp = method(image, fixed)
    seconds = time.perf_counter() - start

    def dice(field: Tensor) -> float:
        moved = warp(labels, field, mode="nearest")
        return float(metrics.dice(moved, whole.labels, TISSUES).mean())

    def error(field: Tensor) -> float:
        return MM * float(metrics.endpoint_error(field, truth, brain))

    return {
        "error_before": error(nothing(image, fixed)),
        "error": error(disp),
        "dice_before": dice(nothing(image, fixed)),
        "dice": dice(disp),
        "dice_ceiling": dice(truth),
        "folding_percent": float(metrics.folding_percent(disp)),
        "seconds": seconds,
    }


# --------------------------------------------------------------------------- prostates, weak labels


@dataclass(frozen=True)
class Patient:
    """MR and ultrasound on the grid of the MR, 0.4 units, centre on centre.

    moving, fixed: (1, 1, *S) in [0, 1]. moving_labels, fixed_labels: (1, 1, *S), 1 = gland.
    moving_points, fixed_points: (1, N, 3), voxels.
    """

    name: str
    moving: Tensor
    fixed: Tensor
    moving_labels: Tensor
    fixed_labels: Tensor
    moving_points: Tensor
    fixed_points: Tensor


UNIT = 0.4
FOLDS = ((0, 1), (2, 3), (4, 5), (6, 7))  # who is held out
Way = Callable[[Patient], Tensor]  # a patient at half the resolution -> disp there


@cache
def patients() -> list[Patient]:
    """The eight patients."""
    people = []
    for number, (mr, us, *points) in enumerate(load_prostates()):
        image, labels = (
            resample(x[None], us.grid, mr.grid, mode)
            for x, mode in ((us.image, "linear"), (us.labels, "nearest"))
        )
        to_voxels = np.linalg.inv(mr.affine)
        voxels = [
            torch.from_numpy(nib.affines.apply_affine(to_voxels, p)).float()[None] for p in points
        ]
        people.append(
            Patient(
                f"patient {number}",
                mr.image[None] / 255,
                image / 255,
                mr.labels[None],
                labels,
                *voxels,
            )
        )
    return people


class AugmentedPairs(Dataset):
    """Patients at half the resolution; each image turned, shifted, scaled and warped at random.

    MR and ultrasound are moved apart from each other, so that six patients are not learned by
    heart, and each image's contrast is changed by x -> x^g with |log g| <= 0.3. The same for the
    same (seed, index). Items as in `regkit.data.RandomPairs`.
    """

    ANGLE, SHIFT, SIZE, LENGTH, WAVE = (
        12.0,
        2.0,
        0.1,
        1.0,
        5.0,
    )  # degrees, voxels, log, voxels, voxels

    def __init__(self, people: Sequence[Patient], length: int, seed: int):
        self.people = people
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        random = np.random.default_rng([self.seed, index])
        person = self.people[random.integers(len(self.people))]
        item: dict[str, Tensor | str] = {"name": person.name}
        for side in ("moving", "fixed"):
            image, labels = getattr(person, side), getattr(person, f"{side}_labels")
            disp = self.drawn(random, image.shape[2:])
            power = float(np.exp(random.uniform(-0.3, 0.3)))
            item[side] = warp(image, disp, padding="border")[0] ** power
            item[f"{side}_labels"] = warp(labels, disp, mode="nearest")[0]
        return item

    def drawn(self, random: np.random.Generator, shape: Sequence[int]) -> Tensor:
        """A random map (1, 3, *S)."""
        angles = np.radians(random.uniform(-self.ANGLE, self.ANGLE, (1, 3)))
        shift = random.uniform(-self.SHIFT, self.SHIFT, (1, 3))
        theta = rigid_theta(torch.from_numpy(angles), torch.from_numpy(shift)).float()
        theta[:, :, :3] *= float(np.exp(random.uniform(-self.SIZE, self.SIZE)))
        noise = random.standard_normal((3, *shape))
        blurred = ndimage.gaussian_filter(noise, (0, *[self.WAVE] * 3), mode="wrap")
        blurred *= self.LENGTH / np.sqrt((blurred**2).sum(0).mean())
        return affine_to_disp(theta, shape) + torch.from_numpy(blurred).float()[None]


def halved(person: Patient) -> Patient:
    """Every second voxel, about; corner voxels stay corner voxels."""
    shape = [n // 2 for n in person.fixed.shape[2:]]
    scale = (torch.tensor(shape) - 1) / (torch.tensor(person.fixed.shape[2:]) - 1)
    return Patient(
        person.name,
        coarser(person.moving, shape),
        coarser(person.fixed, shape),
        *(
            (resize(x.float(), shape) > 0.5).to(x.dtype)
            for x in (person.moving_labels, person.fixed_labels)
        ),
        *(points * scale for points in (person.moving_points, person.fixed_points)),
    )


WEAK = Recipe(
    name="prostate_labels",
    model="unfolding",
    ndim=3,
    shape=(32, 32, 30),
    source="label loss alone, as in Hu et al., Medical Image Analysis 2018; the rest is ours",
    options={"stages": 2, "channels": (8, 16, 32, 32), "layers": 2, "width": 8, "depth": 3},
    weights={"dice": 1.0, "diffusion": 0.3},
    lr=2e-3,
    warmup=20,
    batch=2,
    steps=160,
    validate_every=160,
)


class GlandsTask:
    """The glands of some patients, to learn from: a task for `train`, see `training.tasks.Task`.

    overlap: of the model's answers for these patients. Only a look at those it learns from: the
        patients held out have no say in anything.
    """

    def __init__(
        self,
        people: Sequence[Patient],
        recipe: Recipe,
        overlap: Callable[[models.RegistrationModel], float],
    ) -> None:
        self.pairs = AugmentedPairs(people, recipe.steps * recipe.batch, recipe.seed)
        self.info = {"range": [0, 1]}
        self.overlap = overlap

    def validate(self, model: models.RegistrationModel, device: torch.device) -> dict[str, float]:
        return {"dice": self.overlap(model)}

    def score(self, scores: dict[str, float]) -> float:
        return scores["dice"]


def learned(recipe: Recipe, people: Sequence[Patient]) -> Way:
    """A network that has learned from the glands of these patients."""

    def way(model: models.RegistrationModel) -> Way:
        def answer(person: Patient) -> Tensor:
            with torch.no_grad():
                return model(person.moving, person.fixed).disp.float()

        return answer

    task = GlandsTask(people, recipe, lambda model: overlap(way(model), people))
    return way(train(recipe, progress=False, device="cpu", task=task).model)


def mean_shift(people: Sequence[Patient]) -> Way:
    """The shift that lays the gland of an average patient over the other: what needs no image."""

    def centre(labels: Tensor) -> Tensor:
        return labels[0, 0].nonzero().double().mean(0)

    shifts = [centre(p.moving_labels) - centre(p.fixed_labels) for p in people]
    shift = torch.stack(shifts).mean(0).float().reshape(1, 3, 1, 1, 1)
    return lambda person: nothing(person.moving, person.fixed) + shift


def by_images(method: Method) -> Way:
    """A method that needs the two images alone."""
    return lambda person: method(person.moving, person.fixed)


def by_outlines(person: Patient) -> Tensor:
    """The affine map between the two glands themselves: it has to know both outlines."""
    masks = [
        torch.from_numpy(ndimage.gaussian_filter(x[0, 0].float().numpy(), 1.0))[None, None]
        for x in (person.moving_labels, person.fixed_labels)
    ]
    return linear("affine", "ncc")(*masks)


def overlap(way: Way, people: Sequence[Patient]) -> float:
    """Mean Dice of the gland at half the resolution."""
    scores = []
    for person in people:
        moved = warp(person.moving_labels, way(person), mode="nearest")
        scores.append(float(metrics.dice(moved, person.fixed_labels, [1])))
    return float(np.mean(scores))


def prostate_row(
    make: Callable[[Sequence[Patient]], Way], fold: Sequence[int], learns: bool = False
) -> Row:
    """One method on the patients that are held out; it may look at the others before.

    Where it learns from them, their Dice says how much of that is memory. Dice of the gland and
    distances of the landmarks, in units (0.4 a voxel), at full resolution.
    """
    people = patients()
    others = [halved(p) for i, p in enumerate(people) if i not in fold]
    start = time.perf_counter()
    way = make(others)
    learning = time.perf_counter() - start
    row: Row = {"patients": list(fold), "dices": [], "distances": []}
    folding, seconds = [], []
    for person in (people[i] for i in fold):
        small = halved(person)
        start = time.perf_counter()
        disp = resize_disp(way(small), person.fixed.shape[2:])
        seconds.append(time.perf_counter() - start)
        moved = warp(person.moving_labels, disp, mode="nearest")
        row["dices"].append(round(float(metrics.dice(moved, person.fixed_labels, [1])), 4))
        apart = metrics.tre(disp, person.fixed_points, person.moving_points, UNIT)[0]
        row["distances"] += [round(x, 4) for x in apart.tolist()]
        folding.append(float(metrics.folding_percent(disp)))
    if learns:
        row["dice_of_the_others"] = overlap(way, others)
    return row | {
        "dice": float(np.mean(row["dices"])),
        "folding_percent": float(np.mean(folding)),
        "seconds": float(np.mean(seconds)),
        "seconds_learning": learning,
    }


# -------------------------------------------------------------------------------- rows and the file


@dataclass(frozen=True)
class Entry:
    """A row to be: what names it, and how to measure it."""

    key: Row
    measure: Callable[[], Row]


def child_entries(weights: str, seeds: Sequence[int]) -> list[Entry]:
    """Every map, pair and method."""

    def measured(make: Callable[[], Method], *which: Any) -> Row:
        return child_row(make(), *which)

    methods: list[tuple[str, Sequence[str], Callable[[], Method], str | None]] = [
        ("same-contrast network", KINDS, lambda: longer(network(SAME)), SAME),
        ("any-contrast network", KINDS, lambda: longer(network(weights)), weights),
        ("rigid descent, MI", ("rigid",), lambda: linear("rigid"), None),
        ("ANTs rigid, MI", ("rigid",), lambda: longer(ants_rigid), None),
        ("descent, MI", ("smooth",), lambda: descent, None),
        ("SyN, MI", ("smooth",), lambda: longer(syn), None),
        ("engine, MIND", ("smooth",), lambda: longer(engine("mind")), None),
        ("engine, MI", ("smooth",), lambda: longer(engine("mutual_information")), None),
    ]
    entries = []
    for name, kinds, make, learned_from in methods:
        for kind, moving, seed in itertools.product(kinds, ("fa", "cbf", "t1"), seeds):
            key: Row = {"map": kind, "moving": moving, "method": name, "seed": seed}
            if learned_from is not None:
                key |= {"weights": Path(learned_from).name, "sha256": fingerprint(learned_from)}
            entries.append(Entry(key, partial(measured, make, kind, moving, seed)))
    return entries


def prostate_entries(recipe: Recipe) -> list[Entry]:
    """Every fold and method."""
    ways: list[tuple[str, Callable[[Sequence[Patient]], Way]]] = [
        ("no registration", lambda others: by_images(nothing)),
        ("mean shift of the other glands", mean_shift),
        ("affine descent, MI", lambda others: by_images(linear("affine"))),
        ("descent, MI", lambda others: by_images(descent)),
        ("engine, MIND", lambda others: by_images(engine("mind"))),
        ("engine, MI", lambda others: by_images(engine("mutual_information"))),
        ("network, weak labels", partial(learned, recipe)),
        ("affine between the outlines", lambda others: by_outlines),
    ]
    entries = []
    for name, make in ways:
        for number, fold in enumerate(FOLDS):
            key: Row = {"method": name, "fold": number}
            learns = name.startswith("network")
            if learns:
                key |= {"steps": recipe.steps, "seed": recipe.seed}
            entries.append(Entry(key, partial(prostate_row, make, fold, learns)))
    return entries


def summary(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Mean and standard deviation over the rows that differ in seed or fold only."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    lines = []
    for key, group in groups.items():
        line: Row = dict(zip(names, key)) | {"rows": len(group)}
        lists = {"dices": "dice", "distances": "distance"}
        for name, value in group[0].items():
            values = [row[name] for row in group]
            if name in lists:  # one number a patient, or a landmark
                values = [x for row in group for x in row[name]]
                if values:
                    line |= {lists[name]: float(np.mean(values)), f"{lists[name]}_n": len(values)}
                    line[f"{lists[name]}_sd"] = float(np.std(values))
            elif isinstance(value, float):
                line[name] = float(np.mean(values))
                if name in ("error", "dice", "error_before"):
                    line[f"{name}_sd"] = float(np.std(values))
        lines.append(rounded(line))
    return lines


PARTS = {"child": ("map", "moving", "method"), "prostate": ("method",)}


def run(
    out: Path = OUT,
    weights: str = ANY,
    parts: Sequence[str] = tuple(PARTS),
    seeds: Sequence[int] = SEEDS,
    recipe: Recipe = WEAK,
    threads: int = 1,
    fresh: bool = False,
) -> Row:
    """Measure what is not there yet, and write the file after each row. Arguments as in `main`."""
    common.check_names("parts", parts, PARTS)
    if threads < 1 or not seeds:
        raise ValueError(f"threads is {threads} and seeds {seeds}, expected at least one of each.")
    common.use_threads(threads)
    fields = {"made": common.made(__file__), "settings": _settings(recipe)}
    table: Row = {}
    for part in parts:
        entries = child_entries(weights, seeds) if part == "child" else prostate_entries(recipe)
        key = (*PARTS[part], "fold", "seed")
        summarise = partial(_summarised, PARTS[part])
        rows = Rows(out, key, fields, fresh=fresh, within=part, derive=summarise)
        missing: set[str] = set()
        for entry in entries:
            method = entry.key["method"]
            if method in missing:
                continue
            which = [str(entry.key[name]) for name in key if name in entry.key and name != "method"]
            title = f"{part}: {' '.join(which)} {method}"
            if not common.measure_once(rows, entry.key, title, entry.measure, _in_short):
                missing.add(method)
                for other in entries:
                    if other.key["method"] == method:
                        rows.remove(other.key)
        table = rows.table
    return table


def _settings(recipe: Recipe) -> Row:
    """What all rows depend on."""
    return {
        "mm": MM,
        "beyond": BEYOND,
        "smoothness": SMOOTHNESS,
        "steps": STEPS,
        "levels": LEVELS,
        "rigid": {"degrees": ANGLE, "mm": SHIFT},
        "smooth": {"rms_mm": LENGTH, "blur_mm": WAVE},
        "folds": [list(fold) for fold in FOLDS],
        "prostate": vars(recipe),
    }


def _summarised(names: Sequence[str], rows: list[Row]) -> Row:
    return {"summary": summary(rows, names)}


def _in_short(row: Row) -> str:
    return f"Dice {row['dice']:.3f}"


def main(
    weights: Annotated[str, typer.Option(help="Of the any-contrast network: file or name.")] = ANY,
    parts: Annotated[list[str] | None, typer.Option(help="Only this part; repeatable.")] = None,
    threads: common.Threads = 1,
    out: common.Out = OUT,
    fresh: common.Fresh = False,
) -> None:
    """Measure registration across modalities on real images."""
    run(out, weights, parts or tuple(PARTS), SEEDS, WEAK, threads, fresh)


if __name__ == "__main__":
    common.start(main)
