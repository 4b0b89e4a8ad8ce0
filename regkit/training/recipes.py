"""The settings of each training, as data: what a paper says, and what each budget can afford.

A recipe is an immutable record, down to its dictionaries. `get("vxm_diff_2d")` gives it at the
current budget; the budget is the environment variable REGKIT_BUDGET, one of "smoke" (does it run?),
"cpu" (real learning in minutes on two cores), "gpu" (at most 15 minutes on a Colab T4) and "paper"
(the published protocol).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any

import torch

from regkit.device import half_precision
from regkit.immutable import frozen
from regkit.messages import unknown

BUDGETS = ("smoke", "cpu", "gpu", "paper")


@dataclass(frozen=True)
class Recipe:
    """Everything a training run depends on. It is stored in every checkpoint.

    model, ndim, options: what `regkit.models.create` takes.
    shape: of the images; spacing follows from the population's field of view.
    data: "population", the embedded one, or the name of a prepared set. The folder of a set is an
        argument of `train` and no part of the recipe. Given the folder of another set, training
        learns from that one, see `regkit.training.data.fitted`.
    subjects, validation: how many of the embedded population (seeds 0 and 1; 2 is for tests), at
        most how many of a prepared set.
    atlas: every pair has the same fixed image (the subject of seed 3, or the one that a prepared
        set calls fixed, or else the first of those to learn from, who is then not learned from);
        otherwise a pair is any two subjects.
    contrast, amplitude: of the population. gamma: change the contrast of each image at random,
        x -> x^g with |log g| <= gamma.
    motion: None for pairs of two subjects; else a pair is one head twice, on cubic voxels, and this
        says how the second one is moved: keyword arguments of `regkit.data.RigidPairs`, and the
        `contrasts` of which, or between which, a pair may be formed.
    painted: None, or a pair is two label maps, deformed and painted in any contrast: keyword
        arguments of `regkit.data.contrast.PaintedPairs`, and `brains` of `anatomies` there. Then
        `subjects` says how many anatomies there are, `validation` how many pairs.
    chest: None, or a pair is a synthetic chest before and after a breath: keyword arguments of
        `regkit.data.chest.ChestPairs`. Then `subjects` says how many chests there are, `validation`
        how many pairs, of other chests.
    similarity: "lncc", "mse", "ncc" or "mutual_information". window: of lncc.
    weights: of the terms of the objective: "similarity", "diffusion" (of the velocity where there
        is one, summed over the steps of a cascade, else of the displacement), "bending" (the
        same), "folding", "dice", the label loss, and "endpoint", the distance from the true
        displacement, where it is known. Of models that segment: "segmentation", soft Dice of the
        labels that they find in each image. Of models that find an affine map: "determinant" and
        "orthogonality", which keep it near a rotation. Of models whose stages are pairs (u, v):
        "similarity_u", "diffusion_u" and "consistency", between u and v, of the last stage; with
        "_all" behind the name the mean over all stages. See `regkit.training.objective.TERMS`.
    levels: None, or weights of the levels of a model whose `stages` go from coarse to fine, such as
        dual_prnet, one a level, the finest last: "similarity", "diffusion" and "bending" are then
        sums over the levels, each term of images drawn with half as many voxels along each axis as
        those of the next, and of the displacement on that grid, in its voxels.
    bidirectional: the fixed image is also warped to the moving one, by the inverse map; each
        direction counts half.
    lr, schedule, warmup: of Adam; "constant", or "cosine" down to zero; the first `warmup` steps
        rise from zero. clip: the largest norm of the gradient; longer ones are shortened.
    batch, steps, validate_every, seed.
    precision: "no" (float32), "bf16", "fp16", or "auto": what `regkit.device.half_precision` says
        of the device that the run begins on.
    """

    name: str
    model: str
    ndim: int
    shape: tuple[int, ...]
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    data: str = "population"
    atlas: bool = False
    subjects: int = 100
    validation: int = 8
    contrast: str = "t1"
    amplitude: float = 1.0
    gamma: float = 0.0
    motion: Mapping[str, Any] | None = None
    painted: Mapping[str, Any] | None = None
    chest: Mapping[str, Any] | None = None
    similarity: str = "lncc"
    window: int = 7
    weights: Mapping[str, float] = field(
        default_factory=lambda: {"similarity": 1.0, "diffusion": 0.1}
    )
    levels: tuple[float, ...] | None = None
    bidirectional: bool = False
    lr: float = 3e-3
    schedule: str = "cosine"
    warmup: int = 0
    clip: float = 0.5
    batch: int = 8
    steps: int = 800
    validate_every: int = 200
    seed: int = 0
    precision: str = "no"

    def __post_init__(self) -> None:
        # each recipe holds copies, so that none of them shares a dictionary with another
        for each in fields(self):
            object.__setattr__(self, each.name, frozen(getattr(self, each.name)))


_TMI = "Balakrishnan et al., IEEE TMI 2019; steps, rate and schedule are ours"
_MEDIA = "Dalca et al., Medical Image Analysis 2019, without its variance; rates are ours"
_DENSE = "The network of Zheng et al. 2023, trained as vxm is here"
_DILFORMER = "A reconstruction of the network of Peng et al. 2026; all settings are ours"
_TRANSFORMERS = {
    "vit_v_net": "Chen et al., ViT-V-Net, MIDL 2021",
    "transmorph": "Chen et al., TransMorph, Medical Image Analysis 2022",
    "utsrmorph": "Zhang et al., UTSRMorph, IEEE TMI 2025",
    "h_sganet": "Zhou et al., H-SGANet, 2025",
}  # whose network each is
_PYRAMID = "The network of Hu et al. 2019 and Kang et al. 2022; all settings are ours"

# name -> the recipe at budget "cpu", and what other budgets change
_RECIPES: dict[str, tuple[Recipe, dict[str, dict[str, Any]]]] = {}


def _add(recipe: Recipe, **budgets: dict[str, Any]) -> None:
    precision = {"smoke": "no", "gpu": "auto", "paper": "no"}
    changes = {at: {"precision": precision[at], **budgets[at]} for at in budgets}
    _RECIPES[recipe.name] = (recipe, changes)


_SMOKE_2D = {
    "shape": (48, 64),
    "subjects": 4,
    "validation": 2,
    "batch": 2,
    "steps": 4,
    "validate_every": 2,
}
_SMOKE_3D = {
    "shape": (32, 48, 32),
    "subjects": 3,
    "validation": 2,
    "batch": 1,
    "steps": 2,
    "validate_every": 1,
}

# The steps of a GPU are those that results/t4_budget.json finds room for in 15 minutes of a T4, of
# a recipe and of a chapter that trains several.
_GPU_2D: dict[str, Any] = {
    "shape": (160, 192), "subjects": 400, "batch": 16, "steps": 1500, "validate_every": 250,
}  # fmt: skip
_GPU_3D: dict[str, Any] = {"subjects": 100, "steps": 1500, "validate_every": 250}
_PAPER: dict[str, Any] = {
    "steps": 150_000, "lr": 1e-4, "schedule": "constant", "batch": 1, "validate_every": 1000,
}  # fmt: skip
_PAPER_2D = _PAPER | {"shape": (160, 192), "subjects": 400}
_PAPER_3D = _PAPER | {"shape": (160, 192, 160), "subjects": 200}

# All alike, so that equal updates compare the networks.
for _model, _source in (("vxm1", _TMI), ("vxm2", _TMI), ("vxm", _TMI), ("vxm_diff", _MEDIA)):
    _add(
        Recipe(name=f"{_model}_2d", model=_model, ndim=2, shape=(80, 96), source=_source),
        smoke=_SMOKE_2D,
        gpu=_GPU_2D,
        paper=_PAPER_2D,
    )
    _add(
        Recipe(name=f"{_model}_3d", model=_model, ndim=3, shape=(80, 96, 80), source=_source,
               options={"half_resolution": True} if _model in ("vxm", "vxm_diff") else {},
               subjects=40, validation=3, gamma=0.3, lr=1e-3, warmup=100, batch=1,
               steps=400, validate_every=200),
        smoke=_SMOKE_3D,
        gpu=_GPU_3D,
        paper=_PAPER_3D | {"options": {}},
    )  # fmt: skip

# As vxm, and a term against folding: without it 1.4 % of a field folded after 800 updates (8
# validation pairs). In half precision, which on a CPU that has bfloat16 takes four tenths of the
# time.
_DENSE_2D = Recipe(
    name="dense_unet_eca_2d", model="dense_unet_eca", ndim=2, shape=(80, 96), source=_DENSE,
    weights={"similarity": 1.0, "diffusion": 0.1, "folding": 100.0}, warmup=50, precision="auto",
)  # fmt: skip
_add(_DENSE_2D, smoke=_SMOKE_2D, gpu=_GPU_2D, paper=_PAPER_2D)
_add(
    replace(_DENSE_2D, name="dense_unet_eca_3d", ndim=3, shape=(80, 96, 80), subjects=40,
            validation=3, gamma=0.3, lr=1e-3, warmup=100, batch=1, steps=400),
    smoke=_SMOKE_3D,
    gpu=_GPU_3D,
    paper=_PAPER_3D | {"options": {"save_memory": True}},
)  # fmt: skip

# Transformers learn as the dense U-Net does. In 3D, where a CPU has to do, in their small sizes.
_LIGHT = {"size": "small", "channels": 20, "drop_path": 0.0}
for _model, _source in _TRANSFORMERS.items():
    _small = {"size": "small"} if _model in ("transmorph", "utsrmorph") else {}
    _recipe = replace(
        _DENSE_2D, name=f"{_model}_2d", model=_model,
        source=f"The network of {_source}; trained as vxm is here",
    )  # fmt: skip
    _add(_recipe, smoke=_SMOKE_2D, gpu=_GPU_2D, paper=_PAPER_2D)
    _add(
        replace(_recipe, name=f"{_model}_3d", ndim=3, shape=(80, 96, 80), subjects=40,
                validation=3, gamma=0.3, lr=1e-3, warmup=100, batch=1, steps=400,
                options=_small),
        smoke=_SMOKE_3D,
        gpu=_GPU_3D | {"options": {}},
        paper=_PAPER_3D | {"options": {"save_memory": True}},
    )  # fmt: skip
    if _model == "transmorph":  # the shipped weights: a file of a megabyte
        _add(
            replace(_recipe, name="transmorph_2d_light", options=_LIGHT),
            smoke=_SMOKE_2D, gpu=_GPU_2D, paper=_PAPER_2D,
        )  # fmt: skip

# As vxm, with the terms on every level, at 1/16, ..., 1: each counts half as much as the next.
for _model, _source in (("dual_prnet", _PYRAMID), ("dilformer", _DILFORMER)):
    _recipe = replace(
        _DENSE_2D, name=f"{_model}_2d", model=_model, source=_source,
        levels=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
    )  # fmt: skip
    _add(
        _recipe,
        smoke=_SMOKE_2D,
        gpu=_GPU_2D | {"steps": 1200, "validate_every": 200},
        paper=_PAPER_2D,
    )
    _add(
        replace(_recipe, name=f"{_model}_3d", ndim=3, shape=(80, 96, 80), subjects=40,
                validation=3, gamma=0.3, lr=1e-3, warmup=100, batch=1, steps=400),
        smoke=_SMOKE_3D,
        gpu=_GPU_3D | {"steps": 800, "validate_every": 200},
        paper=_PAPER_3D | {"options": {"save_memory": True}},
    )  # fmt: skip

# Large displacements: subjects twice as far apart. Tables set the network.
_add(
    replace(_recipe, name="pyramids_2d", amplitude=2.0, steps=400),
    smoke=_SMOKE_2D,
    gpu=_GPU_2D | {"steps": 1200, "validate_every": 200},
    paper=_PAPER_2D,
)

# Of Peng et al. only the abstract is public: it names these sets, and no setting. IXI is split as
# in TransMorph, LPBA40 as in sun2025_lpba40; there is one fixed image. Prepared at 1 mm for
# "paper", at 2 mm for "gpu" and "cpu", 4 for "smoke".
_IXI = ("ixi", (40, 56, 48), 403, 58)  # its shape at 4 mm, people to learn from, to validate with
_LPBA40 = ("lpba40", (40, 48, 40), 30, 9)
for _data, _at_4_mm, _learn, _validate in (_IXI, _LPBA40):
    _add(
        replace(_recipe, name=f"peng2026_{_data}", ndim=3, data=_data, atlas=True,
                shape=tuple(2 * n for n in _at_4_mm), subjects=_learn, validation=3, lr=1e-3,
                warmup=100, batch=1, validate_every=200),
        smoke=_SMOKE_3D | {"shape": _at_4_mm},
        gpu=_GPU_3D | {"subjects": _learn, "steps": 800, "validate_every": 200},
        paper=_PAPER_3D | {"options": {"save_memory": True}, "subjects": _learn,
                           "validation": _validate, "shape": tuple(4 * n for n in _at_4_mm)},
    )  # fmt: skip

# The protocol of the paper, sections 4.1 and 4.3: one fixed image, 416 people of OASIS split 4 to
# 1, 2000 epochs, read as 2000 times everyone as moving image. Equation 5 sums the squared gradient
# over the image, where equation 4 takes a mean. Read so, 0.01 would be 307 times the mean over
# 160x192 pixels, beside a squared difference below 1: nothing could move. Here it is the mean, as
# in VoxelMorph, which has the same weight for the same terms. The paper has no validation split:
# its test subjects serve to watch a run.
_ZHENG = Recipe(
    name="zheng2023_2d", model="dense_unet_eca", ndim=2, shape=(80, 96), atlas=True,
    source="Zheng et al. 2023, equations 3 to 5 and section 4.3; at other budgets than 'paper' "
    "steps, rate and schedule are ours",
    similarity="mse", weights={"similarity": 1.0, "diffusion": 0.01}, warmup=50, precision="auto",
)  # fmt: skip
_ZHENG_PAPER: dict[str, Any] = {
    "shape": (160, 192), "subjects": 333, "validation": 83, "steps": 83_250, "lr": 1e-4,
    "schedule": "constant", "warmup": 0, "validate_every": 750,
}  # fmt: skip
_add(
    _ZHENG,
    smoke=_SMOKE_2D,
    gpu={"shape": (160, 192), "subjects": 333, "validation": 16, "steps": 1500,
         "validate_every": 250},
    paper=_ZHENG_PAPER,
)  # fmt: skip
# slices of real children: prepared at 1 mm for "gpu" and "paper", at 2 mm for "cpu", 4 for "smoke"
_add(
    replace(_ZHENG, name="zheng2023_ptbp", data="ptbp_slices"),
    smoke=_SMOKE_2D | {"shape": (40, 48)},
    gpu={"shape": (160, 192), "steps": 1500, "validate_every": 250},
    paper=_ZHENG_PAPER,
)
# slices of neurite-oasis, 24 structures: the sizes as above. 254 people to learn from, the first of
# whom is the fixed image, and 140 to test on (the paper: 333 and 83 of 416). Steps are 2000 times
# everyone who moves.
_add(
    replace(_ZHENG, name="zheng2023_oasis", data="oasis_2d", subjects=253, validation=20),
    smoke=_SMOKE_2D | {"shape": (40, 48)},
    gpu={"shape": (160, 192), "steps": 1500, "validate_every": 250},
    paper=_ZHENG_PAPER
    | {"subjects": 253, "validation": 20, "steps": 63_250, "validate_every": 550},
)

# Equation 7: u is held to the fixed image and to smoothness, v to the fixed image and to u. Once
# with the local correlation of `vxm`; once, below, with the paper's squared difference. The weights
# are the paper's, and with the local correlation they are good ones: lambda2 = 0.1 left 0.4 % of a
# 3D field folded after 400 updates.
_UNFOLD = "Sun et al. 2025, equation 7, with the similarity of vxm; rates are ours"
_SUN = "Sun et al. 2025, equation 7 and section 3.2; norms read as mean squares, u as voxels"
_EQUATION_7 = {"similarity_u": 0.8, "similarity": 0.2, "diffusion_u": 1.0, "consistency": 0.1}
_UNFOLDING_2D = Recipe(
    name="unfolding_2d", model="unfolding", ndim=2, shape=(80, 96), source=_UNFOLD,
    weights=_EQUATION_7, lr=1e-3, warmup=50, steps=600,
)  # fmt: skip
# In 3D the stages share their weights: as good in 2D, a third of the file. And a term against
# folding: with the paper's terms alone, 0.06 % of a field folded after 400 updates (3 validation
# pairs).
_UNFOLDING_3D = replace(
    _UNFOLDING_2D, name="unfolding_3d", ndim=3, shape=(80, 96, 80), options={"shared": True},
    weights=_EQUATION_7 | {"folding": 100.0}, subjects=40, validation=3, gamma=0.3, warmup=100,
    batch=1, steps=800, precision="auto",
)  # fmt: skip
_add(
    _UNFOLDING_2D,
    smoke=_SMOKE_2D,
    gpu=_GPU_2D | {"steps": 400, "validate_every": 100},
    paper=_PAPER_2D,
)
_add(
    _UNFOLDING_3D,
    smoke=_SMOKE_3D,
    gpu={"subjects": 100, "steps": 1000, "validate_every": 100},
    paper={"shape": (160, 192, 160), "options": {"save_memory": True}, "subjects": 30,
           "validation": 9, "steps": 15_000, "lr": 1e-4, "schedule": "constant",
           "validate_every": 500},
)  # fmt: skip

# The protocols of the paper. Section 3.1, LPBA40: one fixed image, 30 people to learn from, 9 to
# test on; OASIS: any two of 254, 20 to validate with, 140 to test on. Section 3.2: 500 epochs, read
# as 500 times everyone as moving image. And both on the embedded population, with LPBA40's counts.
# LPBA40 has no validation split: some training subjects serve to watch a run.
_SUN_2D = replace(
    _UNFOLDING_2D, name="sun2025_2d", source=_SUN, similarity="mse",
    weights=_EQUATION_7, atlas=True, subjects=30, validation=9, steps=300,
    validate_every=100, precision="auto",
)  # fmt: skip
_SUN_3D = replace(
    _SUN_2D, name="sun2025_3d", ndim=3, shape=(80, 96, 80), validation=3, warmup=100, batch=1,
    steps=800, validate_every=200,
)  # fmt: skip
_SUN_PAPER: dict[str, Any] = {
    "steps": 15_000, "lr": 1e-4, "schedule": "constant", "warmup": 0, "batch": 1,
    "validate_every": 500,
}  # fmt: skip
_SUN_GPU: dict[str, Any] = {"steps": 1200, "validate_every": 200}
_OASIS: dict[str, Any] = {"data": "oasis_3d", "atlas": False, "subjects": 254, "validation": 20}
_SAVE_MEMORY: dict[str, Any] = {"options": {"save_memory": True}}
for _recipe in (_SUN_2D, replace(_SUN_2D, name="sun2025_pairs_2d", atlas=False)):
    _add(
        _recipe,
        smoke=_SMOKE_2D,
        gpu=_SUN_GPU | {"shape": (160, 192), "batch": 16},
        paper=_SUN_PAPER | {"shape": (160, 192)},
    )
_SUN_3D_PAPER = _SUN_PAPER | _SAVE_MEMORY | {"shape": (160, 192, 160), "validation": 9}
for _recipe in (_SUN_3D, replace(_SUN_3D, name="sun2025_pairs_3d", atlas=False)):
    _add(_recipe, smoke=_SMOKE_3D, gpu=_SUN_GPU, paper=_SUN_3D_PAPER)
# prepared at 1 mm for "paper", at 2 mm for "gpu" and "cpu" (slices: 1 mm for "gpu"), 4 for "smoke"
_add(
    replace(_SUN_3D, name="sun2025_lpba40", data="lpba40"),
    smoke=_SMOKE_3D | {"shape": (40, 48, 40)},
    gpu=_SUN_GPU,
    paper=_SUN_3D_PAPER,
)
# our axes run to R, A, S: what the paper calls 160x192x224
_add(
    replace(_SUN_3D, name="sun2025_oasis", shape=(80, 112, 96), **_OASIS),
    smoke=_SMOKE_3D | {"shape": (40, 56, 48)},
    gpu=_SUN_GPU,
    paper=_SUN_PAPER
    | _SAVE_MEMORY
    | {"shape": (160, 224, 192), "steps": 127_000, "validate_every": 1000},
)
_add(
    replace(_SUN_2D, name="sun2025_oasis_2d", shape=(80, 96), **_OASIS | {"data": "oasis_2d"}),
    smoke=_SMOKE_2D | {"shape": (40, 48)},
    gpu=_SUN_GPU | {"shape": (160, 192), "batch": 16},
    paper=_SUN_PAPER | {"shape": (160, 192), "steps": 127_000, "validate_every": 1000},
)

# Cascades. At "paper" the published settings: 1 - Pearson's r of the last result; of each step half
# the sum over axes of the mean squared slope, where `diffusion` is the mean over axes; the two
# terms of the affine stem. Images are ours, and so is a constant rate: theirs halves twice, for the
# last two fifths. At other budgets a recipe compares images as `vxm` does, in half the width; and
# as n equal steps have an n-th of the squared slopes of their sum, three of them pay three times.
_CASCADE = "Zhao et al., Recursive cascaded networks, ICCV 2019; below 'paper' only its networks"
_IDEAL = "Tan 2023, section 4, figure 9: affine, then a U-Net, then a warp; settings as of rcn"
_VTN = Recipe(
    name="vtn_2d", model="vtn", ndim=2, shape=(80, 96), source=_CASCADE, options={"channels": 8},
    lr=1e-3, warmup=100,
)  # fmt: skip
_RCN = replace(
    _VTN, name="rcn_2d", model="rcn", options={"channels": 8, "affine_channels": 8},
    weights={"similarity": 1.0, "diffusion": 0.3, "determinant": 0.1, "orthogonality": 0.1},
)  # fmt: skip
_ONE_UNET = {"cascades": 1, "base": "vxm"}
_AFFINE_VXM = replace(
    _RCN, name="affine_vxm_2d", source=_IDEAL, options=_ONE_UNET | {"affine_channels": 8},
    weights={**_RCN.weights, "diffusion": 0.1},
)  # fmt: skip
_RCN_PAPER: dict[str, Any] = {
    "similarity": "ncc", "lr": 1e-4, "schedule": "constant", "warmup": 0, "batch": 4,
    "steps": 100_000, "validate_every": 1000,
}  # fmt: skip
for _recipe, _options in ((_VTN, {}), (_RCN, {}), (_AFFINE_VXM, _ONE_UNET)):
    _add(
        _recipe,
        smoke=_SMOKE_2D,
        gpu=_GPU_2D,
        paper=_RCN_PAPER | {"shape": (160, 192), "subjects": 400, "options": _options,
                            "weights": {**_recipe.weights, "diffusion": 1.0}},
    )  # fmt: skip
    _add(
        replace(_recipe, name=_recipe.name.replace("2d", "3d"), ndim=3, shape=(80, 96, 80),
                subjects=40, validation=3, gamma=0.3, batch=1, steps=400),
        smoke=_SMOKE_3D,
        gpu=_GPU_3D,
        paper=_RCN_PAPER | {"shape": (160, 192, 160), "subjects": 200, "options": _options,
                            "weights": {**_recipe.weights, "diffusion": 1.5}},
    )  # fmt: skip

# Networks compared with a cascade, on subjects twice as far apart as in other recipes; and learning
# from the known displacement, section 3.1 of the survey. Tables set the rest of each.
for _recipe in (
    replace(_RCN, name="cascades_2d", amplitude=2.0, options={"affine_channels": 8}, steps=600,
            source="Zhao et al., Recursive cascaded networks, ICCV 2019; all settings are ours"),
    Recipe(name="supervised_2d", model="vxm", ndim=2, shape=(80, 96), warmup=50, steps=600,
           source="Tan 2023, section 3.1: which target to learn from; all settings are ours"),
):  # fmt: skip
    _add(
        replace(_recipe, precision="auto"),
        smoke=_SMOKE_2D,
        gpu=_GPU_2D,
        paper={"shape": (160, 192), "subjects": 400, "batch": 4, "steps": 100_000, "lr": 1e-4,
               "schedule": "constant", "warmup": 0, "validate_every": 1000},
    )  # fmt: skip

# The survey's two branches on synthetic chests: registration needs no labels, segmentation needs
# those of the lungs. All numbers are ours. At "paper" voxels are about those of the sample lung_ct.
_FCN = "Tan 2023, its figure 6: two branches, unsupervised; what they learn from and how is ours"
_FCN_2D = Recipe(
    name="fcn_2d", model="fcn", ndim=2, shape=(96, 96), source=_FCN, options={"segment": 2},
    subjects=100, validation=8, chest={"field": "chest"},
    weights={"similarity": 1.0, "diffusion": 0.1, "segmentation": 0.5}, lr=1e-3, warmup=50,
)  # fmt: skip
_add(
    _FCN_2D,
    smoke=_SMOKE_2D,
    gpu=_GPU_2D | {"shape": (192, 192)},
    paper=_PAPER_2D | {"shape": (192, 192)},
)
_add(
    replace(_FCN_2D, name="fcn_3d", ndim=3, shape=(64, 80, 64), subjects=40, validation=3,
            chest={"field": "right lung"}, warmup=100, batch=1, steps=400, validate_every=200,
            precision="auto"),
    smoke=_SMOKE_3D,
    gpu=_GPU_3D | {"steps": 1200, "validate_every": 200},
    paper={"shape": (128, 160, 128), "options": {"segment": 2, "save_memory": True},
           "subjects": 200, "steps": 150_000, "lr": 1e-4, "schedule": "constant",
           "validate_every": 1000},
)  # fmt: skip

# The survey's fundus run, as it says: photographs as they are, never aligned first. Its NCC is
# VoxelMorph's, in windows of 9; 10 epochs of the 107 pairs to learn from, one at a time. It crops
# to a multiple of 16, our networks pad. FIRE is prepared for it with --size 208, 64 at "smoke", and
# 416, its default, at "gpu" and "paper".
_TAN = "Tan 2023, section 5; Adam, one pair a step and the size of the images are ours"
_add(
    Recipe(
        name="tan2023_fundus", model="vxm", ndim=2, shape=(208, 208), source=_TAN, data="fire",
        contrast="moving", subjects=107, validation=27, window=9,
        weights={"similarity": 1.0, "diffusion": 1.0}, lr=1e-4, schedule="constant", batch=1,
        steps=1070, validate_every=107, precision="auto",
    ),
    smoke={"shape": (64, 64), "steps": 4, "validate_every": 2},
    gpu={"shape": (416, 416)},
    paper={"shape": (416, 416)},
)  # fmt: skip

# Learned from labels, on images each of which has a random contrast.
_SYNTH = (
    "Hoffmann et al., SynthMorph, IEEE TMI 2022: labels in random contrasts, a loss on labels, "
    "smoothness. Ours: the unfolding network, contrasts that follow tissues, slabs, the mean "
    "square between clean pictures of one contrast beside the labels, rates and weights"
)
_ANY_2D = Recipe(
    name="any_contrast_2d", model="unfolding", ndim=2, shape=(80, 96), source=_SYNTH,
    options={"shared": True},
    subjects=120, validation=24, painted={"labels": None}, similarity="mse",
    weights={"similarity": 1.0, "dice": 1.0, "diffusion": 0.2, "consistency": 0.1},
    lr=1e-3, warmup=50, steps=600,
)  # fmt: skip
_ANY_3D = replace(
    _ANY_2D, name="any_contrast_3d", ndim=3, shape=(80, 96, 80), subjects=24, validation=6,
    painted={"labels": 8, "slabs": 0.5}, weights={**_ANY_2D.weights, "folding": 300.0}, batch=1,
    precision="auto",
)  # fmt: skip
_add(
    _ANY_2D,
    smoke={**_SMOKE_2D, "painted": {"brains": False}},  # needs no download
    gpu=_GPU_2D | {"subjects": 480},
    paper=_PAPER_2D | {"subjects": 480},
)  # fmt: skip
_add(
    _ANY_3D,
    smoke={**_SMOKE_3D, "painted": {"labels": 8, "slabs": 0.5, "brains": False}},
    gpu={"subjects": 96, "steps": 1000, "validate_every": 200},
    paper={"shape": (160, 192, 160), "options": {"shared": True, "save_memory": True},
           "subjects": 192,
           "steps": 100_000, "lr": 1e-4, "schedule": "constant", "validate_every": 1000},
)  # fmt: skip

_HU = "Hu 2024; optimiser, rate and steps are not in the paper: ours"
_SMALL_MOTION = {"angle": 5.0, "shift": 5.0, "contrasts": ("t1",)}  # section 3.2, read as degrees
_RIGID = Recipe(
    name="rigid_resnet34_2d", model="rigid_resnet34", ndim=2, shape=(200, 200), source=_HU,
    options={"width": 16, "reduce": 2}, subjects=200, validation=32, motion=_SMALL_MOTION,
    similarity="ncc", weights={"similarity": 1.0}, lr=1e-3, warmup=100, batch=16, steps=1200,
    validate_every=200,
)  # fmt: skip
for _recipe in (
    _RIGID,
    replace(_RIGID, name="affine_resnet34_2d", model="affine_resnet34"),
    replace(
        _RIGID,
        name="rigid_resnet34_2d_multi",
        similarity="mutual_information",
        motion=_SMALL_MOTION | {"contrasts": ("t1", "t2", "flair")},
    ),
    # Wide motions start far from any peak of a similarity, so these learn from the known answer;
    # `similarity` is what `regkit.register` refines by. Real heads differ in scalp, size and greys.
    replace(
        _RIGID,
        name="rigid_resnet34_2d_wide",
        similarity="mutual_information",
        weights={"endpoint": 1.0},
        subjects=400,
        motion={
            "angle": 30.0,
            "shift": 20.0,
            "contrasts": ("t1", "t1", "t2", "pd", "flair", "random", "random"),
            "tilt": 15.0,
            "size": 0.2,
            "scalp": True,
        },
        gamma=0.3,
    ),
):
    _add(
        _recipe,
        smoke={**_SMOKE_2D, "shape": (48, 48)},
        gpu={"subjects": 400, "batch": 32, "steps": 2500, "validate_every": 250},
        paper={"options": {"width": 64}, "subjects": 1600, "validation": 400,
               "batch": 32, "steps": 50_000, "validate_every": 1000},
    )  # fmt: skip

# The paper's own set: slices of patients in three contrasts, 80 % of 2000 to learn from; 3 and 6
# degrees of freedom; the correlation within a contrast, mutual information between two. Slices are
# prepared with 200x200 pixels, with --size 48 for "smoke". There is no validation split: some
# training subjects serve to watch a run. And the same with the embedded population.
_PATIENTS = ("flair", "t1", "t2")
_HU_MOTION: dict[str, dict[str, Any]] = {
    "single": {"motion": _SMALL_MOTION | {"contrasts": _PATIENTS, "across": False}},
    "multi": {
        "motion": _SMALL_MOTION | {"contrasts": _PATIENTS},
        "similarity": "mutual_information",
    },
}
for _kind, _changes in _HU_MOTION.items():
    for _name, _data in (
        ("rigid", "brats_hu2024"),
        ("affine", "brats_hu2024"),
        ("2d", "population"),
    ):
        _model = "affine_resnet34" if _name == "affine" else "rigid_resnet34"
        _add(
            replace(_RIGID, name=f"hu2024_{_kind}_{_name}", model=_model, data=_data, **_changes),
            smoke={**_SMOKE_2D, "shape": (48, 48)},
            gpu={"subjects": 400, "batch": 32, "steps": 2500, "validate_every": 250},
            paper={"options": {"width": 64}, "subjects": 1600, "validation": 400,
                   "batch": 32, "steps": 50_000, "validate_every": 1000},
        )  # fmt: skip


def names() -> list[str]:
    """The recipes that `get` knows."""
    return list(_RECIPES)


def budget() -> str:
    """The budget of this process: REGKIT_BUDGET, else "gpu" where CUDA is there, else "cpu"."""
    value = os.environ.get("REGKIT_BUDGET") or ("gpu" if torch.cuda.is_available() else "cpu")
    if value not in BUDGETS:
        raise ValueError(f"REGKIT_BUDGET is {value!r}, expected one of {', '.join(BUDGETS)}.")
    return value


def get(name: str, at: str | None = None, **changes: Any) -> Recipe:
    """A recipe by name.

    Args:
        name: one of `names()`.
        at: the budget, by default `budget()`.
        changes: fields to set otherwise, such as steps=1000.
    """
    if name not in _RECIPES:
        raise unknown("recipe", name, names())
    at = at or budget()
    if at not in BUDGETS:
        raise ValueError(f"budget is {at!r}, expected one of {', '.join(BUDGETS)}.")
    recipe, budgets = _RECIPES[name]
    return replace(recipe, **{**budgets.get(at, {}), **changes})


def settled(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with what precision "auto" means on a device, see `regkit.device`."""
    if recipe.precision != "auto":
        return recipe
    return replace(recipe, precision=half_precision(device))


def plan(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON holds it, in checkpoints and in the folder of a run."""
    as_json: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return as_json


def complete(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored plan, perhaps of an earlier version: the fields it lacks are at their default."""
    return {f.name: f.default for f in fields(Recipe) if f.default is not MISSING} | dict(stored)


def restored(stored: Any) -> Recipe:
    """The recipe of a stored plan, such as that in a weights file.

    Raises:
        ValueError: it is none, or has fields that this version does not know.
    """
    try:
        recipe = Recipe(**complete(stored))
    except (TypeError, ValueError):
        recipe = None
    if recipe is None or not _valid(recipe):
        raise ValueError("method holds a recipe that cannot be read, expected one of regkit train.")
    return recipe


_MOTION = {"angle", "shift", "noise", "tilt", "size", "contrasts", "scalp", "across"}
_CHEST = {"field", "depth", "other", "width", "noise"}


def _valid(recipe: Recipe) -> bool:
    """Whether the fields that evaluation reads have their type, and a size to work with."""
    return (
        all(isinstance(text, str) for text in (recipe.name, recipe.data, recipe.contrast))
        and recipe.ndim in (2, 3)
        and isinstance(recipe.shape, tuple)
        and len(recipe.shape) == recipe.ndim
        and all(type(n) is int and n > 0 for n in recipe.shape)
        and math.prod(recipe.shape) <= 2**25
        and all(map(_in_range, (recipe.amplitude, recipe.gamma)))
        and isinstance(recipe.atlas, bool)
        and isinstance(recipe.painted, (Mapping, type(None)))
        and _valid_options(recipe.motion, _MOTION)
        and _valid_options(recipe.chest, _CHEST)
    )


def _in_range(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= 500


def _valid_options(options: Any, allowed: set[str]) -> bool:
    """None, or some of these options: numbers, a text, or `contrasts`, at least one."""
    if options is None:
        return True
    return (
        isinstance(options, Mapping)
        and set(options) <= allowed
        and all(_in_range(v) for k, v in options.items() if k not in ("contrasts", "field"))
        and isinstance(options.get("field", ""), str)
        and isinstance(names := options.get("contrasts", ("t1",)), tuple)
        and len(names) > 0
        and all(isinstance(name, str) for name in names)
    )


def identity(recipe: Recipe) -> str:
    """Twelve hexadecimal digits that are the same for recipes that ask for the same training.

    The name and the source of a recipe do not count, and neither do fields at their default, so
    that a field which is new to recipes changes no identity.
    """
    defaults = complete({})
    settings = {k: v for k, v in plan(recipe).items() if k not in ("name", "source")}
    changed = {k: v for k, v in settings.items() if k not in defaults or v != defaults[k]}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]
