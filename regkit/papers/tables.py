"""The tables of the papers, as data: what each row is, and what the paper prints.

`regkit.papers.running` runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from regkit.immutable import frozen

# Weight of the smoothness of u (unfolding) or of the displacement (all others), where neither row
# nor call says one. The paper's 1 belongs to sums or units that it does not name.
LAMBDA2 = {"unfolding": 0.1, "vxm": 0.1, "transmorph": 0.1, "utsrmorph": 0.1, "h_sganet": 0.1}


class Printed(NamedTuple):
    """What the paper prints: Dice in percent, percent of non-positive Jacobians, seconds a pair."""

    dice: float
    folding: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table.

    label: in the results, unique in its table. method: of a model, or a classical one.
    options: of the model, beside those of its recipe; or of the classical method.
    lambda1, lambda2, lambda3: of equation 7; the last two of models without pairs (u, v): none but
        lambda2, the weight of smoothness. None: `LAMBDA2`.
    lpba40, oasis, ixi: what the paper prints for this set. deviation: what it prints as the
        standard deviation of the Dice over labels, percent. note: what a reader should know.
    weights: of the objective, instead of the protocol's. updates: times those of the protocol.
    at_test: options of the trained model that its training did not know.
    default: the row that others are compared with. against: the label of another one, for this row.
    in_3d: options that a classical method takes besides, in 3D.
    """

    label: str
    method: str = "unfolding"
    options: Mapping[str, Any] = field(default_factory=dict)
    lambda1: float = 0.8
    lambda2: float | None = None
    lambda3: float = 0.1
    lpba40: Printed | None = None
    oasis: Printed | None = None
    ixi: Printed | None = None
    deviation: float | None = None
    note: str = ""
    weights: Mapping[str, float] | None = None
    updates: float = 1
    at_test: Mapping[str, Any] = field(default_factory=dict)
    default: bool = False
    against: str = ""
    in_3d: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # rows hold copies, so that none of them shares a dictionary with another
        for name in ("options", "in_3d", "weights", "at_test"):
            object.__setattr__(self, name, frozen(getattr(self, name)))


@dataclass(frozen=True)
class Table:
    """A table.

    paper: whose. recipes: the recipes whose names begin so, followed by an underscore, are its
        protocols; of several for one set the first.
    split: on whom it is measured, "test" or "validation". note: what to know of it.
    atlas, pairs: with which of the paper's sets a run is compared where all go to one fixed image,
        and where a pair is any two.
    alike: every row learns as the protocol says, and only the network differs. Else the rate is
        that of the model's own recipe, and the weights are those of equation 7 of Sun et al.
    measure: "dice", "landmarks" (distance of control points) or "motion" (error of a known one).
    """

    title: str
    paper: str
    recipes: tuple[str, ...]
    rows: tuple[Row, ...]
    split: str = "test"
    note: str = ""
    atlas: str = "lpba40"
    pairs: str = "oasis"
    alike: bool = True
    measure: str = "dice"


def _sun(title: str, rows: tuple[Row, ...], **more: Any) -> Table:
    """A table of Sun et al. (2025), whose models keep the rates of their own recipes."""
    return Table(title, "Sun et al. 2025", ("sun2025",), rows, alike=False, **more)


# of the paper's own network, in its tables 1 and 3
_LPBA40, _OASIS = Printed(70.1, 0.010, 0.55), Printed(79.9, 0.010, 0.37)


def _default(label: str, lpba40: Printed = _LPBA40, **more: Any) -> Row:
    """The paper's own setting; it is one training, whatever the tables call it."""
    return Row(label, lpba40=lpba40, default=True, **more)


_TICKS = (
    "The paper's ticks stand at Conv for this row; its text says that the denoiser stays DnCNN "
    "here, which is what we run."
)
_OURS = "Not in the paper: our ablation."
_OTHER_DEFAULT = (
    "The paper prints 69.5 here and 70.1 in tables 1, 2, 3, 5 and 6 for the same setting."
)

_PLAIN = {"similarity": 1.0, "diffusion": 0.1}  # as the recipe of vxm has it
_VTN = {"channels": 8}
# in 3D the finest level takes four times as long as all others
_SYN_3D = {"iterations": (100, 70, 50, 0)}
_LDDMM_3D = {"levels": (4, 2), "steps": 6, "iterations": 20}

#: The tables by name, as `regkit benchmark` takes it.
TABLES: dict[str, Table] = {
    "sun2025-table1": _sun(
        "Methods",
        (
            Row("LDDMM", "lddmm", in_3d=_LDDMM_3D, lpba40=Printed(67.3, 0, 89.24),
                oasis=Printed(75.2, 0, 132.99)),
            Row("SyN", "syn", in_3d=_SYN_3D, lpba40=Printed(69.5, 0, 18.74),
                oasis=Printed(76.0, 0, 30.98)),
            Row("VoxelMorph", "vxm", options={"half_resolution": False},
                lpba40=Printed(68.3, 0.030, 0.45), oasis=Printed(77.6, 0.002, 0.17)),
            Row("VoxelMorph, half resolution", "vxm", options={"half_resolution": True},
                note="Not in the paper: as our 3D recipe has it, several times faster."),
            Row("TransMorph", "transmorph", lpba40=Printed(69.9, 0.004, 0.35),
                oasis=Printed(79.8, 0.005, 0.36)),
            Row("UTSRMorph", "utsrmorph", lpba40=Printed(69.5, 0.010, 0.35),
                oasis=Printed(78.1, 0.005, 0.27)),
            Row("H-SGANet", "h_sganet", lpba40=Printed(69.1, 0.080, 0.28),
                oasis=Printed(81.4, 0.020, 0.26),
                note="The paper copies these numbers from that of H-SGANet, on other people."),
            _default("Unfolding", oasis=_OASIS),
        ),
        note="The paper trains each rival with its own code and settings; here all share one loss.",
    ),
    "sun2025-table2": _sun(
        "Parts of the network",
        (
            _default("TransUNet, DnCNN"),
            Row("without transformer", options={"transformer": False},
                lpba40=Printed(68.1, 0.019, 0.36), note=_TICKS),
            Row("without skips", options={"skips": False},
                lpba40=Printed(67.7, 0.005, 0.54), note=_TICKS),
            Row("plain convolutions as denoiser", options={"denoiser": "conv"},
                lpba40=Printed(68.9, 0.016, 0.50)),
        ),
    ),
    "sun2025-table3": _sun(
        "Denoiser",
        (
            Row("U-Net", options={"denoiser": "unet"}, lpba40=Printed(68.5, 0.017, 0.60),
                oasis=Printed(78.3, 0.015, 0.44)),
            _default("DnCNN", oasis=_OASIS),
        ),
    ),
    "sun2025-table4": _sun(
        "Weights of the objective",
        (
            *(Row(f"lambda1 = {value}, lambda3 = 0.1", lambda1=value, lpba40=printed)
              for value, printed in ((0.0, Printed(67.3, 0.003)), (0.2, Printed(67.8, 0.006)),
                                     (0.5, Printed(68.7, 0.008)))),
            _default("lambda1 = 0.8, lambda3 = 0.1", Printed(69.5, 0.010), note=_OTHER_DEFAULT),
            Row("lambda1 = 1.0, lambda3 = 0.1", lambda1=1.0, lpba40=Printed(69.1, 0.011)),
            Row("lambda1 = 0.8, lambda3 = 1.0", lambda3=1.0, lpba40=Printed(69.3, 0.007)),
            Row("lambda1 = 0.8, lambda3 = 10.0", lambda3=10.0, lpba40=Printed(68.7, 0.007)),
        ),
    ),
    "sun2025-table5": _sun(
        "Transformer",
        (
            _default("4 heads, 8 layers, MLP 96"),
            Row("2 heads", options={"heads": 2}, lpba40=Printed(68.5, 0.030, 0.55)),
            Row("8 heads", options={"heads": 8}, lpba40=Printed(70.2, 0.020, 0.57)),
            Row("4 layers", options={"layers": 4}, lpba40=Printed(69.7, 0.002, 0.47)),
            Row("MLP 64", options={"mlp": 64}, lpba40=Printed(69.1, 0.040, 0.58)),
            Row("MLP 256", options={"mlp": 256}, lpba40=Printed(70.3, 0.003, 0.50)),
        ),
        note="The paper prints the first row three times, once for each parameter.",
    ),
    "sun2025-table6": _sun(
        "Number of stages",
        (
            Row("K = 2", options={"stages": 2}, lpba40=Printed(69.2, 0.040, 0.54)),
            _default("K = 3"),
            Row("K = 5", options={"stages": 5}, lpba40=Printed(68.3, 0.003, 0.56)),
        ),
        note="The times that the paper prints hardly grow with K, although each stage is a network "
        "of its own.",
    ),
    "sun2025-lambda2": _sun(
        "Weight of smoothness, on validation subjects",
        tuple(
            Row(f"{method}, lambda2 = {value}", method, lambda2=value)
            for method in LAMBDA2
            for value in (1.0, 0.1, 0.03, 0.01, 0.003)
        ),
        split="validation",
        note="Not in the paper. It chooses each model's weight, for tables that compare models.",
    ),
    # The last line of its table 1: means over five test images, of the Dice and of its deviation.
    "zheng2023-table1": Table(
        "Dense U-Net with ECA", "Zheng et al. 2023", ("zheng2023",),
        (
            Row("Affine only", "affine", oasis=Printed(53.15), deviation=26.35,
                note="The affine map of each pair, by descent; nothing is learned."),
            Row("VoxelMorph-1", "vxm1", oasis=Printed(73.71), deviation=23.21),
            Row("VoxelMorph-2", "vxm2", oasis=Printed(76.13), deviation=21.34, default=True),
            Row("Dense U-Net, ECA", "dense_unet_eca", oasis=Printed(79.63), deviation=17.20),
            *(Row(f"without {what}", "dense_unet_eca", options, note=_OURS,
                  against="Dense U-Net, ECA")
              for what, options in (("dense skips", {"dense": False}), ("ECA", {"eca": False}),
                                    ("both", {"dense": False, "eca": False}))),
            Row("VoxelMorph-2, 4 times the updates", "vxm2", updates=4, against="Dense U-Net, ECA",
                note="About the time of the dense U-Net on a CPU."),
        ),
        note="The paper aligns its people, 416 of OASIS, beforehand by an affine map; the "
        "real slices come so. The population lies in one template's space, as networks get it.",
        atlas="oasis",
    ),
    "zhao2019-cascades": Table(
        "Cascades on large deformations", "Zhao et al. 2019", ("cascades",),
        (
            Row("Affine only", "affine", note="The affine map of each pair, by descent."),
            Row("VTN alone", "vtn", {"channels": _VTN["channels"]}, weights=_PLAIN),
            Row("1 cascade", "rcn", _VTN | {"cascades": 1}, lambda2=0.1, default=True,
                note="The affine stem, then one VTN, as in all rows of cascades."),
            Row("2 cascades", "rcn", _VTN | {"cascades": 2}, lambda2=0.2),
            Row("3 cascades", "rcn", _VTN | {"cascades": 3}, lambda2=0.3),
            *(Row(f"1 cascade, applied {n} times", "rcn", _VTN | {"cascades": 1}, lambda2=0.1,
                  at_test={"repeats": n}) for n in (2, 3, 5)),
            *(Row(f"3 cascades, each applied {n} times", "rcn", _VTN | {"cascades": 3},
                  lambda2=0.3, at_test={"repeats": n}, against="3 cascades") for n in (2, 3, 5)),
            Row("VoxelMorph alone", "vxm", weights=_PLAIN),
            Row("stem, then VoxelMorph", "rcn", {"cascades": 1, "base": "vxm"}, lambda2=0.1,
                against="VoxelMorph alone", note="The framework of Tan (2023), figure 9."),
            Row("stem, then 3 VoxelMorph", "rcn", {"cascades": 3, "base": "vxm"}, lambda2=0.3,
                against="stem, then VoxelMorph"),
            Row("SyN (ANTs)", "syn", in_3d=_SYN_3D),
            Row("1 cascade, 3 times the updates", "rcn", _VTN | {"cascades": 1}, lambda2=0.1,
                updates=3, against="3 cascades", note="About as long as three cascades learn."),
        ),
        note="Subjects lie twice as far apart as in other tables. Equal steps have an n-th of the "
        "squared slopes of their sum, so n cascades pay n times for smoothness.",
    ),
    "peng2026-pyramids": Table(
        "Dual-stream pyramids on large deformations", "Peng et al. 2026", ("pyramids", "peng2026"),
        (
            Row("VoxelMorph", "vxm", default=True),
            Row("Dual-PRNet", "dual_prnet"),
            Row("Dual-PRNet++", "dual_prnet", {"correlation": 1}, against="Dual-PRNet"),
            Row("Dilformer", "dilformer", against="Dual-PRNet", ixi=Printed(76.9, seconds=0.29),
                note="A reconstruction. The paper also prints HD95 8.937 and negative Jacobians "
                "0.029, in units that it does not name."),
            *(Row(f"without {what}", "dilformer", {switch: False}, against="Dilformer")
              for what, switch in (("MSR", "msr"), ("Dilformer layers", "dilformer"),
                                   ("SRF", "srf"), ("loss on every level", "multi_resolution"))),
            Row("SyN (ANTs)", "syn", in_3d=_SYN_3D),
        ),
        note="Subjects of the population lie twice as far apart as in other tables. Pyramids learn "
        "on every level, VoxelMorph has one.",
    ),
    "tan2023-supervised": Table(
        "What to learn from", "Tan 2023", ("supervised",),
        (
            Row("similarity", "vxm", weights=_PLAIN, default=True),
            Row("known displacement", "vxm", weights={"endpoint": 1.0}),
            Row("both", "vxm", weights=_PLAIN | {"endpoint": 0.1}),
        ),
        note="The same network, pairs and updates. The known displacement counts everywhere, also "
        "where there is nothing to see.",
    ),
    "tan2023-fundus": Table(
        "Photographs of the retina", "Tan 2023", ("tan2023",),
        (
            Row("VoxelMorph", "vxm", default=True),
            Row("Affine only", "affine", note="By descent on the photographs as they are."),
            Row("SyN (ANTs)", "syn"),
        ),
        note="The error of FIRE's control points, and the area under its success curve. The survey "
        "shows pictures and prints no number.",
        pairs="fire",
        measure="landmarks",
    ),
    **{
        f"hu2024-{kind}": Table(
            title, "Hu 2024", (f"hu2024_{kind}",),
            (
                Row("3 degrees of freedom", "rigid_resnet34", default=True),
                Row("6 degrees of freedom", "affine_resnet34"),
            ),
            note="The error of known motions. The paper prints no number; it says that both differ "
            "little, and that 3 are a little better.",
            pairs="brats",
            measure="motion",
        )
        for kind, title in (
            ("single", "Rigid motion within a contrast"),
            ("multi", "Rigid motion between contrasts"),
        )
    },
}  # fmt: skip
