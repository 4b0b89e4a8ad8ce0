"""Images of any contrast, painted from label maps: what a network learns from that is to register
scans of any kind.

Source of the idea: SynthMorph, Hoffmann et al., "SynthMorph: learning contrast-invariant
registration without acquired images", IEEE TMI 2022. Take a label map, deform it at random, give
each label a random brightness, blur, shade and disturb the picture. Two such pictures of two
deformed label maps are a training pair: nothing in their greys can be trusted but the shapes, and
the labels say where the shapes are. No acquired image is seen.

How a pair is made here. `anatomies` deforms two families of brains by the random maps of the
embedded population: the MNI152 template, with the population's labels, and the five brains of the
open sample `brain_labelmaps`, laid over the template by an affine map. Each is kept as the
share that every *material* has in every voxel, so that a voxel of 2.2 mm which is half cortex and
half CSF is painted so. `PaintedPairs` draws two of a family and paints them.

Ours, not SynthMorph's: shares instead of whole voxels; half of the contrasts follow tissues, as
real ones do, and half of the pairs have one contrast; CSF around the brains, or none, as skull
stripping leaves it; slabs; and the clean pictures beside the pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from regkit.data.anatomies import TISSUES, WHOLE, Anatomy
from regkit.data.population import CONTRASTS, Subject
from regkit.spatial import affine_to_disp, rigid_theta, warp


class PaintedPairs(Dataset):
    """Two different anatomies of a family, painted at random; the same for the same (seed, index).

    Args:
        anatomies: at least two of each family that is among them, all of one shape.
        length: how many pairs there are.
        seed: of the draw.
        labels: how many labels a pair keeps, drawn at random; all others become 0. The label loss
            takes time for each. None keeps all.
        slabs: the share of pairs (3D) cut down to a slab of 14 to 32 mm across the last axis. Such
            items have another shape: only for batches of 1.

    Each item is a dictionary of `moving` and `fixed`, (1, *S) in [0, 1], 0 outside the head;
    `moving_labels` and `fixed_labels`, (1, *S) int16; `name`; and `moving_clean` and `fixed_clean`,
    (1, *S), both anatomies in the contrast of the fixed image before anything disturbed it, scaled
    to a standard deviation of 1 inside the fixed head (less where all of it is alike): a similarity
    may compare them where it could not compare the images.
    """

    def __init__(
        self,
        anatomies: Sequence[Anatomy],
        length: int,
        seed: int = 0,
        labels: int | None = 8,
        slabs: float = 0.0,
    ):
        self.families = {
            family: [a for a in anatomies if a.family == family]
            for family in sorted({a.family for a in anatomies})
        }
        for family, members in self.families.items():
            if len(members) < 2:
                raise ValueError(
                    f"anatomies holds {len(members)} of the family {family!r}, expected at least 2 "
                    "to make pairs."
                )
        if not self.families:
            raise ValueError("anatomies is empty, expected at least 2 to make pairs.")
        self.anatomies, self.length, self.seed = anatomies, length, seed
        self.labels, self.slabs = labels, slabs

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        random = np.random.default_rng([self.seed, index])
        first = self.anatomies[int(random.integers(len(self.anatomies)))]
        others = [a for a in self.families[first.family] if a is not first]
        pair = {"moving": first, "fixed": others[int(random.integers(len(others)))]}

        contrast = {"fixed": _draw_contrast(random, first.family)}
        alike = random.random() < 0.5
        contrast["moving"] = contrast["fixed"] if alike else _draw_contrast(random, first.family)
        places = _draw_places(random, tuple(first.labels.shape[1:]), first.affine)
        item: dict[str, Tensor] = {}
        for (side, anatomy), place in zip(pair.items(), places, strict=True):
            painted = _painted(anatomy, contrast[side], contrast["fixed"])
            image, clean, head = warp(painted, place)[0]
            item[side] = _disturbed(random, image, head)[None]
            item[f"{side}_clean"] = clean[None]
            item[f"{side}_labels"] = warp(anatomy.labels[None], place, mode="nearest")[0]
            spread = max(float(clean[head > 0.5].std()), 0.2)  # in the end of the fixed one
        for side in pair:
            item[f"{side}_clean"] = item[f"{side}_clean"] / spread
        if random.random() < 0.5:  # left and right
            item = {key: value.flip(1) for key, value in item.items()}
        if first.maps.ndim == 4 and random.random() < self.slabs:
            item = _slab(random, item, first.affine[2, 2])
        item |= _fewer(random, item, self.labels)
        return {**item, "name": f"{pair['moving'].name} to {pair['fixed'].name}, pair {index}"}

    def subjects(self, index: int) -> tuple[Subject, Subject]:
        """The pair of this index as `regkit.evaluate` takes it (without a velocity)."""
        item = self[index]
        moving, fixed = (
            Subject(
                name=f"{item['name']} ({side})",
                image=item[side],  # type: ignore[arg-type]
                labels=item[f"{side}_labels"],  # type: ignore[arg-type]
                affine=self.anatomies[0].affine,
                velocity=torch.zeros(0),
            )
            for side in ("moving", "fixed")
        )
        return moving, fixed


def _draw_contrast(random: np.random.Generator, family: str) -> np.ndarray:
    """The brightness of each material, (M,).

    Half of the time each has its own; else it follows the tissue, whose brightness is that of a
    known contrast or any.
    """
    tissues = np.array(TISSUES[family])
    kind = random.random()
    if kind < 0.5:
        means = random.uniform(0.1, 1.0, len(tissues))
    elif kind < 0.75:
        means = random.permutation(np.linspace(0.15, 0.95, 4))[tissues]
    else:
        name = random.choice(list(CONTRASTS))
        means = np.array(CONTRASTS[name][:4])[tissues]
    means = means * random.uniform(0.9, 1.1, len(tissues))
    if family == "template":
        return np.append(means, random.choice([-0.5, 0.5, 1.0]))  # of its texture
    if random.random() < 0.4:
        means[-1] = 0  # skull stripping took the CSF
    return means


def _painted(anatomy: Anatomy, own: np.ndarray, common: np.ndarray) -> Tensor:
    """(1, 3, *S): the anatomy in its own contrast and in the common one, and where it is."""
    head = (own[: len(TISSUES[anatomy.family])] > 0).astype(float)
    head = np.append(head, [0.0] * (len(own) - len(head)))
    weights = torch.from_numpy(np.stack([own, common, head])).float() / WHOLE
    painted = weights @ anatomy.maps.flatten(1).float()
    return painted.reshape(1, 3, *anatomy.maps.shape[1:])


def _draw_places(
    random: np.random.Generator, shape: tuple[int, ...], affine: np.ndarray
) -> list[Tensor]:
    """Displacements (1, d, *S) that turn and scale both images together, and a little each.

    Brains differ in size more than those made from one template, and an affine registration leaves
    something over.
    """
    d = len(shape)
    spacing = affine.diagonal()[:d].copy()
    turns = 1 if d == 2 else 3
    size = random.uniform(0.95, 1.25)  # above 1 looks further out: a smaller brain
    turn = random.uniform(-6, 6, turns)
    found = []
    for _ in range(2):
        angles = np.radians(turn + random.uniform(-1.5, 1.5, turns))
        shift = random.uniform(-2, 2, d) / spacing  # mm
        theta = rigid_theta(
            torch.from_numpy(angles).float()[None],
            torch.from_numpy(shift).float()[None],
            torch.from_numpy(spacing).float(),
        )
        theta[:, :, :d] *= torch.from_numpy(size * random.uniform(0.98, 1.02, d)).float()
        found.append(affine_to_disp(theta, shape))
    return found


def _disturbed(random: np.random.Generator, image: Tensor, head: Tensor) -> Tensor:
    """Blur, shading, noise and another gamma, then scaled to [0, 1]; 0 where no head is."""
    d = image.ndim
    coarse = torch.from_numpy(random.standard_normal([4] * d)).float()[None, None]
    mode = "bilinear" if d == 2 else "trilinear"
    shading = F.interpolate(coarse, image.shape, mode=mode, align_corners=True)[0, 0]
    image = image * (random.uniform(0, 0.25) * shading).exp()
    blurred = ndimage.gaussian_filter(image.numpy(), random.uniform(0, 0.8))
    noise = random.standard_normal(image.shape, dtype=np.float32) * random.uniform(0.0, 0.05)
    inside = head.numpy() > 0.5
    values = np.where(inside, np.maximum(blurred + noise, 0), 0)
    largest = np.percentile(values, 99.9)
    if largest > 0:
        values = np.clip(values / largest, 0, 1)
    return torch.from_numpy(values.astype(np.float32)) ** float(np.exp(random.uniform(-0.3, 0.3)))


def _slab(
    random: np.random.Generator, item: dict[str, Tensor], spacing: float
) -> dict[str, Tensor]:
    """Both images cut down to a slab across the last axis, through the inner part of the brain.

    The moving image loses a little more at either end, as an affine registration leaves it.
    """
    size = item["fixed"].shape[-1]
    thick = min(size, max(4, round(random.uniform(14, 32) / spacing)))
    low, high = int(0.25 * size), int(0.75 * size) - thick
    start = random.integers(low, max(high, low) + 1)
    cut = {k: v[..., start : start + thick].clone() for k, v in item.items()}
    ends = random.integers(0, 2, 2)
    for key, value in cut.items():
        if key.startswith("moving"):
            value[..., : ends[0]] = 0
            value[..., thick - ends[1] :] = 0
    return cut


def _fewer(
    random: np.random.Generator, item: dict[str, Tensor], count: int | None
) -> dict[str, Tensor]:
    """The label maps of a pair, reduced to `count` of the labels that both hold."""
    maps = [item[f"{side}_labels"] for side in ("moving", "fixed")]
    found = [set(labels.unique().tolist()) - {0} for labels in maps]
    shared = sorted(found[0] & found[1])
    if count is not None and len(shared) > count:
        shared = random.choice(shared, count, replace=False).tolist()
    kept = torch.tensor(shared, dtype=torch.int16)
    return {
        f"{side}_labels": torch.where(torch.isin(labels, kept), labels, 0)
        for side, labels in zip(("moving", "fixed"), maps, strict=True)
    }
