"""Images of any contrast, painted from label maps: what a network learns from that is to register
scans of any kind.

Source of the idea: SynthMorph, Hoffmann et al., "SynthMorph: learning contrast-invariant
registration without acquired images", IEEE TMI 2022. Take a label map, deform it at random, give
each label a random brightness, blur, shade and disturb the picture. Two such pictures of two
deformed label maps are a training pair: nothing in their greys can be trusted but the shapes, and
the labels say where the shapes are. No acquired image is seen.

How a pair is made here. `regkit.data.anatomies` deforms two families of brains by the random maps
of the embedded population: the MNI152 template, with the population's labels, and the five brains
of the open sample `brain_labelmaps`. `PaintedPairs` draws two of a family, paints them on voxels
half as wide as those of the images, and takes means.

Ours, not SynthMorph's: the means; half of the contrasts follow tissues, as real ones do, and half
of the pairs have one contrast; CSF around the brains, or none, as skull stripping leaves it; slabs;
and the clean pictures beside the pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from regkit.data.anatomies import LEARNED, MATERIALS, OUTER_CSF, Anatomy
from regkit.data.cache import place_of
from regkit.data.population import CONTRASTS
from regkit.data.subject import Subject
from regkit.data.template import affine_of
from regkit.spatial import affine_to_disp, rigid_theta, warp

POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}
ROOM = 8  # voxels beside a slab, to turn it in


class PaintedPairs(Dataset[dict[str, Tensor | str]]):
    """Two different anatomies of a family, painted at random; the same for the same (seed, index).

    Args:
        anatomies: at least two of each family that is among them, all for `shape`.
        shape: of the images.
        length: how many pairs there are.
        seed: of the draw.
        labels: how many labels a pair keeps, drawn at random; all others become 0. The label loss
            takes time for each. None keeps all.
        slabs: the share of pairs (3D) that are slabs across the last axis, 16 to 24 voxels thick,
            with the fine voxels of the anatomies: a thin slab has too few coarse ones. Such items
            have another shape: only for batches of 1.

    Each item is a dictionary of `moving` and `fixed`, (1, *S) in [0, 1], 0 outside the head;
    `moving_labels` and `fixed_labels`, (1, *S) int16; `name`; and `moving_clean` and `fixed_clean`,
    (1, *S), both anatomies in the contrast of the fixed image before anything disturbed it, scaled
    to a standard deviation of 1 inside the fixed head (less where all of it is alike): a similarity
    may compare them where it could not compare the images.
    """

    def __init__(
        self,
        anatomies: Sequence[Anatomy],
        shape: Sequence[int],
        length: int,
        seed: int = 0,
        labels: int | None = 8,
        slabs: float = 0.0,
    ):
        self.families = {
            family: [a for a in anatomies if a.family == family]
            for family in sorted({a.family for a in anatomies})
        }
        if not self.families:
            raise ValueError("anatomies is empty, expected at least 2 to make pairs.")
        for family, members in self.families.items():
            if len(members) < 2:
                raise ValueError(
                    f"anatomies holds {len(members)} of the family {family!r}, expected at least 2 "
                    "to make pairs."
                )
        self.anatomies, self.shape, self.length, self.seed = anatomies, tuple(shape), length, seed
        self.labels, self.slabs = labels, slabs
        self.factor = anatomies[0].labels.shape[1] // self.shape[0]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        index = place_of(index, self)
        random = np.random.default_rng([self.seed, index])
        first = self.anatomies[int(random.integers(len(self.anatomies)))]
        others = [a for a in self.families[first.family] if a is not first]
        pair = {"moving": first, "fixed": others[int(random.integers(len(others)))]}

        contrast = {"fixed": _draw_contrast(random, first.family)}
        alike = random.random() < 0.5
        contrast["moving"] = contrast["fixed"] if alike else _draw_contrast(random, first.family)
        slab = len(self.shape) == 3 and random.random() < self.slabs
        window, factor = slice(None), self.factor
        if slab:
            window, factor = _draw_slab(random, self.shape[-1] * factor), 1

        places = _draw_places(random, pair["fixed"].labels[..., window].shape[1:], factor)
        item: dict[str, Tensor] = {}
        for (side, anatomy), place in zip(pair.items(), places, strict=True):
            labels = anatomy.labels[..., window]
            image, clean = warp(_painted(labels, contrast[side], contrast["fixed"], factor), place)[
                0
            ]
            item[side] = _disturbed(random, image)[None]
            item[f"{side}_clean"] = clean[None]
            every = (slice(None), *[slice(None, None, factor)] * len(self.shape))
            item[f"{side}_labels"] = warp(labels[every][None], place, mode="nearest")[0]
            # by NumPy: PyTorch adds up in another order where it has more threads, or fewer
            inside = clean[clean > 0.01].numpy()
            spread = max(float(inside.std(ddof=1)), 0.2)  # in the end of the fixed one
        for side in pair:
            item[f"{side}_clean"] = item[f"{side}_clean"] / spread
        if slab:
            item = {key: value[..., ROOM:-ROOM] for key, value in item.items()}
        if random.random() < 0.5:  # left and right
            item = {key: value.flip(1) for key, value in item.items()}
        item |= _fewer(random, item, LEARNED[first.family], self.labels)
        return {**item, "name": f"{pair['moving'].name} to {pair['fixed'].name}, pair {index}"}

    def subjects(self, index: int) -> tuple[Subject, Subject]:
        """The pair of this index as `regkit.training.evaluation` takes it (without a velocity)."""
        item = self[index]
        moving, fixed = (
            Subject(
                name=f"{item['name']} ({side})",
                image=item[side],  # type: ignore[arg-type]
                labels=item[f"{side}_labels"],  # type: ignore[arg-type]
                affine=affine_of(self.shape),
            )
            for side in ("moving", "fixed")
        )
        return moving, fixed


def _draw_contrast(random: np.random.Generator, family: str) -> Tensor:
    """The brightness of each label, (256,).

    Half of the time each material has its own; else it follows the tissue, whose brightness is that
    of a known contrast or any.
    """
    materials = MATERIALS[family]
    tissues = np.array([tissue for _, tissue in materials])
    kind = random.random()
    if kind < 0.5:
        means = random.uniform(0.1, 1.0, len(materials))
    elif kind < 0.75:
        means = random.permutation(np.linspace(0.15, 0.95, 4))[tissues]
    else:
        name = random.choice(list(CONTRASTS))
        means = np.array(CONTRASTS[name][:4])[tissues]
    means = means * random.uniform(0.9, 1.1, len(materials))
    brightness = torch.zeros(256, dtype=torch.float32)
    for (labels, _), mean in zip(materials, means, strict=True):
        brightness[list(labels)] = float(mean)
    if random.random() < 0.4:
        brightness[OUTER_CSF[family]] = 0  # skull stripping took it
    return brightness


def _painted(labels: Tensor, own: Tensor, common: Tensor, factor: int) -> Tensor:
    """(1, 2, *S): labels (1, *F) in their own contrast and in the common one."""
    index = labels.int()
    painted = torch.stack([own[index], common[index]], dim=1)
    return POOL[labels.ndim - 1](painted, factor) if factor > 1 else painted


def _draw_slab(random: np.random.Generator, size: int) -> slice:
    """Where a slab lies across the last axis: through the inner part of the brain, with room."""
    thick = min(int(random.integers(16, 25)), size // 2 - 2 * ROOM) + 2 * ROOM
    low, high = int(0.25 * size), int(0.8 * size) - thick
    start = int(random.integers(low, max(high, low) + 1))
    return slice(start, start + thick)


def _draw_places(random: np.random.Generator, shape: Sequence[int], factor: int) -> list[Tensor]:
    """Displacements (1, d, *S) that turn and scale both images together, and a little each.

    Brains differ in size more than those made from one template, and an affine registration leaves
    something over. shape: of the anatomies, factor times S.
    """
    d = len(shape)
    size = tuple(n // factor for n in shape)
    turns = 1 if d == 2 else 3
    scale = random.uniform(0.95, 1.25)  # above 1 looks further out: a smaller brain
    turn = random.uniform(-6, 6, turns)
    places = []
    for _ in range(2):
        angles = np.radians(turn + random.uniform(-1.5, 1.5, turns))
        shift = random.uniform(-2, 2, d) / (1.1 * factor)  # mm to voxels, about
        theta = rigid_theta(
            torch.from_numpy(angles).float()[None], torch.from_numpy(shift).float()[None]
        )
        theta[:, :, :d] *= torch.from_numpy(scale * random.uniform(0.98, 1.02, d)).float()
        places.append(affine_to_disp(theta, size))
    return places


def _disturbed(random: np.random.Generator, image: Tensor) -> Tensor:
    """Blur, shading, noise and another gamma, then scaled to [0, 1]; 0 where no head is."""
    d = image.ndim
    coarse = torch.from_numpy(random.standard_normal([4] * d)).float()[None, None]
    mode = "bilinear" if d == 2 else "trilinear"
    shading = F.interpolate(coarse, image.shape, mode=mode, align_corners=True)[0, 0]
    shaded = image * (random.uniform(0, 0.25) * shading).exp()
    blurred = ndimage.gaussian_filter(shaded.numpy(), random.uniform(0, 0.8))
    noise = random.standard_normal(image.shape, dtype=np.float32) * random.uniform(0.0, 0.05)
    inside = image.numpy() > 0.04  # half a voxel of the darkest material
    values = np.where(inside, np.maximum(blurred + noise, 0), 0)
    largest = np.percentile(values, 99.9)
    if largest > 0:
        values = np.clip(values / largest, 0, 1)
    return torch.from_numpy(values.astype(np.float32)) ** float(np.exp(random.uniform(-0.3, 0.3)))


def _fewer(
    random: np.random.Generator, item: dict[str, Tensor], learned: Sequence[int], count: int | None
) -> dict[str, Tensor]:
    """The label maps of a pair, reduced to `count` of the learned labels that both hold."""
    maps = [item[f"{side}_labels"] for side in ("moving", "fixed")]
    present = [set(labels.unique().tolist()) for labels in maps]
    shared = sorted(present[0] & present[1] & set(learned))
    if count is not None and len(shared) > count:
        shared = random.choice(shared, count, replace=False).tolist()
    kept = torch.zeros(256, dtype=torch.int16)
    kept[shared] = torch.tensor(shared, dtype=torch.int16)
    return {
        f"{side}_labels": kept[labels.int()]
        for side, labels in zip(("moving", "fixed"), maps, strict=True)
    }
