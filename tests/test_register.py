"""`regkit.register`, with maps that are known: shifts, rotations, other grids."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch

import regkit
from regkit import checks, classical, io, losses, metrics, models, plot, registration
from regkit.classical import space
from regkit.data.population import population
from regkit.models import RegistrationModel
from regkit.registration import Result
from regkit.spatial import affine_to_disp, warp
from regkit.transform import Grid, resample

RAS = np.diag([2.0, 2.0, 2.0, 1.0])
# axes to the left, down and to the front, as FreeSurfer stores them, with unequal voxels
LIA = np.array([[-1.5, 0, 0, 40], [0, 0, 2.0, -30], [0, -1.0, 0, 35], [0, 0, 0, 1.0]])


class Constant(RegistrationModel):
    """A "network" that always answers with one shift, in voxels of the grid it is run on."""

    def __init__(self, shift, **info):
        super().__init__(len(shift))
        self.shift, self.info, self.name = shift, info, "constant"
        self.seen: list[torch.Tensor] = []

    def estimate(self, moving, fixed):
        self.seen = [moving, fixed]
        d = self.ndim
        shift = torch.tensor(self.shift).reshape(1, d, *[1] * d)
        return {"disp": shift.expand(1, d, *fixed.shape[2:]).clone()}


@pytest.fixture
def network(monkeypatch):
    """`network(shift, **info)` makes `register(..., "constant.safetensors")` answer that shift."""

    def make(shift, **info):
        model = Constant(shift, **info)
        monkeypatch.setattr(models, "load", lambda path: model)
        return model

    return make


def blobs(shape, seed=0) -> np.ndarray:
    """Smooth structure in [0, 1] that fades out towards the border."""
    grids = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    random = np.random.default_rng(seed)
    image = np.zeros(shape)
    for _ in range(25):
        centre = random.uniform(-0.5, 0.5, len(shape))
        width = random.uniform(0.1, 0.25)
        away = sum((g - c) ** 2 for g, c in zip(grids, centre, strict=True))
        image += random.uniform(0.3, 1) * np.exp(-away / width**2)
    return (image / image.max()).astype(np.float32)


def nifti(values: np.ndarray, affine: np.ndarray) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image(values if values.ndim == 3 else values[..., None], affine)


# grids ------------------------------------------------------------------------------------------


def test_a_shift_on_the_working_grid_is_the_same_shift_in_mm_everywhere(network):
    """2 voxels of 3 mm to the right, up and forward, whatever the files' axes are."""
    model = network([2.0, -1.0, 0.5], spacing=[3.0, 3.0, 3.0], orientation="RAS", range=[0, 1])
    shift_mm = np.array([6.0, -3.0, 1.5])
    fixed = nifti(blobs((30, 40, 28)), LIA)
    moving_affine = np.diag([1.8, 2.2, 1.6, 1.0])
    moving_affine[:3, 3] = (-25, -30, -25)
    moving = nifti(blobs((28, 36, 32), seed=1), moving_affine)
    result = regkit.register(moving, fixed, "constant.safetensors", affine=False)
    # by hand: voxel -> mm -> shifted -> moving voxel
    voxels = np.moveaxis(np.indices(fixed.shape), 0, -1)
    mm = voxels @ LIA[:3, :3].T + LIA[:3, 3] + shift_mm
    there = (mm - moving_affine[:3, 3]) / np.diag(moving_affine)[:3]
    expected = np.moveaxis(there - voxels, -1, 0)
    assert np.abs(result.disp[0].numpy() - expected).max() < 1e-3
    assert result.disp.shape == (1, 3, 30, 40, 28) and result.moved.shape == (1, 1, 30, 40, 28)
    assert model.seen[0].shape[2:] == (16, 19, 14)  # 43.5 x 54 x 39 mm in voxels of 3 mm
    assert result.theta is None
    # a mirrored grid with other voxels neither folds nor stretches anything
    assert result.metrics["folding_count"] == 0
    assert result.metrics["sd_log_jacobian"] < 1e-4


@pytest.mark.parametrize(
    ("thick", "own", "voxel"),
    [
        (20, 1.0, 1.0),  # 10 voxels of the training's 2 mm, 20 of 1 mm
        (40, 1.0, 2.0),  # 20 voxels of 2 mm are enough
        (10, 2.0, 2.0),  # finer voxels than the scan's own would show nothing more
        (20, 0.4, 0.5),  # 8 mm: 4 voxels of 2 mm, 8 of 1 mm, 16 of 0.5 mm
    ],
)
def test_a_thin_slab_is_shown_to_a_network_in_finer_voxels(network, thick, own, voxel):
    model = network([0.0, 0.0, 0.0], spacing=[2.0, 2.0, 2.0], range=[0, 1])
    model.divisor = 16
    affine = np.diag([own, own, own, 1.0])
    image = nifti(blobs((64, 64, thick)), affine)
    result = regkit.register(image, image, "constant.safetensors", affine=False)
    expected = np.ceil((np.array([64, 64, thick]) - 1) * own / voxel) + 1
    padded = -(-expected // 16) * 16
    assert list(model.seen[1].shape[2:]) == padded.tolist()
    assert result.disp.abs().max() < 1e-4


def test_a_shift_seen_in_finer_voxels_is_the_same_shift_in_mm(network):
    model = network([2.0, -1.0, 0.5], spacing=[2.0, 2.0, 2.0], range=[0, 1])
    model.divisor = 16
    image = nifti(blobs((64, 64, 20)), np.diag([1.0, 1.0, 1.0, 1.0]))
    result = regkit.register(image, image, "constant.safetensors", affine=False)
    # halved voxels are of 1 mm, as those of the image
    assert torch.allclose(result.disp[0, :, 32, 32, 10], torch.tensor([2.0, -1.0, 0.5]), atol=1e-4)


def test_a_2d_shift_on_the_working_grid(network):
    network([2.0, -1.0], spacing=[3.0, 3.0], orientation="RAS", range=[0, 1])
    affine = np.diag([-1.5, 2.0, 1.0, 1.0])  # the first axis runs to the left
    image = nifti(blobs((40, 30)), affine)
    result = regkit.register(image, image, "constant.safetensors")
    assert torch.allclose(result.disp[0, 0], torch.tensor(6.0 / -1.5), atol=1e-4)
    assert torch.allclose(result.disp[0, 1], torch.tensor(-3.0 / 2.0), atol=1e-4)


def test_arrays_go_to_the_network_as_they_are(network):
    model = network([1.0, 2.0], spacing=[3.0, 3.0], range=[0, 1])
    moving, fixed = blobs((37, 53)), blobs((37, 53), seed=1)
    result = regkit.register(moving, torch.from_numpy(fixed), "constant.safetensors")
    assert torch.equal(model.seen[0][0, 0], torch.from_numpy(moving))
    assert torch.equal(model.seen[1][0, 0], torch.from_numpy(fixed))
    assert (result.disp[0, 0] == 1).all() and (result.disp[0, 1] == 2).all()
    # moved(x) = moving(x + disp): content moves against the displacement
    np.testing.assert_allclose(result.moved[0, 0, :-1, :-2], moving[1:, 2:], atol=1e-5)


@pytest.mark.slow
def test_intensities_are_scaled_for_the_network_and_kept_in_the_result(network):
    model = network([0.0, 0.0, 0.0], spacing=[2.0, 2.0, 2.0], range=[0, 1])
    values = (1000 * blobs((20, 24, 22))).astype(np.int16)  # integers, converted
    result = regkit.register(nifti(values, RAS), nifti(values, RAS), "constant.safetensors")
    assert 0 <= model.seen[0].min() and 0.9 < model.seen[0].max() <= 1
    np.testing.assert_allclose(result.moved[0, 0], values, atol=1e-2)
    assert result.moved.dtype == torch.float32


@pytest.mark.parametrize("shape", [(37, 53), (21, 34, 45)])
def test_odd_sizes_pass_through_a_real_network(tmp_path, shape):
    """Untrained, a network answers the identity; odd sizes are padded and cut by the model."""
    models.save(models.create("vxm_diff", ndim=len(shape)), tmp_path / "w.safetensors")
    moving = blobs(shape)
    result = regkit.register(moving, blobs(shape, seed=1), tmp_path / "w.safetensors")
    assert isinstance(result, Result) and result.disp.shape == (1, len(shape), *shape)
    np.testing.assert_allclose(result.moved[0, 0], moving, atol=1e-2)
    assert torch.allclose(result.moved, warp(torch.from_numpy(moving)[None, None], result.disp))


def test_moved_is_the_moving_image_looked_up_through_disp(network):
    network([0.7, -0.4, 0.2], spacing=[2.5, 2.5, 2.5])
    moving, fixed = nifti(blobs((20, 24, 22)), RAS), nifti(blobs((26, 30, 31), seed=2), LIA)
    result = regkit.register(moving, fixed, "constant.safetensors", affine=False)
    again = warp(io.as_image(moving).data, result.disp)
    assert (again - result.moved).abs().max() < 1e-4


@pytest.mark.slow
def test_the_same_call_gives_the_same_bits():
    a, b = nifti(blobs((24, 26)), RAS), nifti(blobs((24, 26), seed=1), RAS)
    first, second = (regkit.register(a, b, "affine", refine=3) for _ in range(2))
    assert torch.equal(first.disp, second.disp)


# affine -----------------------------------------------------------------------------------------


def turned(d: int, angle: float, shift, scale: float = 1.0) -> np.ndarray:
    """A rotation in the first two axes, a shift and a scale, in mm."""
    matrix = np.eye(4)
    c, s = np.cos(angle), np.sin(angle)
    matrix[:2, :2] = [[c, -s], [s, c]]
    matrix[:d, :d] *= scale
    matrix[:d, 3] = shift
    return matrix


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rigid", "affine"])
@pytest.mark.parametrize("d", [2, 3])
def test_align_finds_a_known_map(d, kind):
    """The moving image is the fixed one behind a known map, on another grid, other contrast."""
    shape = (64, 72) if d == 2 else (40, 48, 40)
    subject = population(1, shape, seed=2)[0]
    truth = turned(d, 0.15, (8.0, -5.0, 4.0)[:d], 1.0 if kind == "rigid" else 1.08)
    fixed = io.Image(subject.image[None], subject.affine)
    if d == 2:
        moving_affine, moving_shape = subject.affine @ np.diag([-0.9, 1.2, 1, 1]), (75, 62)
        moving_affine[0, 3] *= -1
    else:
        moving_affine, moving_shape = subject.affine @ np.diag([1.1, 0.9, 1.2, 1]), (38, 52, 35)
    there = resample(
        fixed.data, fixed.grid, Grid(moving_shape, moving_affine), matrix=np.linalg.inv(truth)
    )
    moving = io.Image(100 * there.sqrt() + 7, moving_affine)
    found = classical.align(moving, fixed, kind)
    voxels = np.argwhere(subject.labels[0].numpy() > 0)[::50]
    voxels = np.pad(voxels, ((0, 0), (0, 3 - d)))
    mm = np.c_[voxels, np.ones(len(voxels))] @ fixed.affine.T
    error = np.linalg.norm((mm @ (found - truth).T)[:, :3], axis=1)
    assert error.max() < 0.35 * max(fixed.spacing)  # a fraction of a voxel


def test_theta_and_disp_say_the_same():
    shape = (48, 56)
    subject = population(1, shape, seed=2)[0]
    matrix = turned(2, 0.1, (5.0, 3.0))
    there = resample(
        subject.image[None],
        subject.grid,
        Grid((50, 60), subject.affine),
        matrix=np.linalg.inv(matrix),
    )
    moving = nifti(there[0, 0].numpy(), subject.affine)
    fixed = nifti(subject.image[0].numpy(), subject.affine)
    result = regkit.register(moving, fixed, "rigid")
    assert result.theta.shape == (1, 2, 3)
    assert torch.allclose(affine_to_disp(result.theta, shape), result.disp, atol=1e-3)
    after, before = result.metrics["ncc"]["after"], result.metrics["ncc"]["before"]
    assert after > 0.98 > before


@pytest.mark.slow
def test_auto_aligns_where_the_grids_differ_and_only_there(network):
    network([0.0, 0.0])
    a = nifti(blobs((40, 44)), RAS)
    shifted = RAS.copy()
    shifted[0, 3] = 6.0
    assert regkit.register(a, a, "constant.safetensors").metrics["affine"] == "none"
    result = regkit.register(nifti(blobs((40, 44)), shifted), a, "constant.safetensors")
    assert result.metrics["affine"] == "affine"
    assert result.metrics["ncc"]["after"] > 0.99


@pytest.mark.slow
def test_simpleitk_has_the_same_moved_image_from_our_files(tmp_path):
    """The acceptance check of the contract, end to end: register, save, resample with SimpleITK."""
    angle = np.deg2rad(20)
    oblique = turned(3, angle, (-30.0, 22.0, 5.0)) @ np.diag([1.6, -2.1, 2.8, 1.0])
    values = blobs((30, 26, 20))
    io.write_image(torch.from_numpy(values)[None, None], oblique, tmp_path / "moving.nii.gz")
    fixed_affine = turned(3, 0.1, (-28.0, 25.0, 3.0)) @ np.diag([2.0, -1.7, 2.2, 1.0])
    other = blobs((26, 30, 24), seed=0)
    io.write_image(torch.from_numpy(other)[None, None], fixed_affine, tmp_path / "fixed.nii.gz")
    regkit.register(tmp_path / "moving.nii.gz", tmp_path / "fixed.nii.gz", "affine", refine=5).save(
        tmp_path / "out"
    )
    field = sitk.ReadImage(str(tmp_path / "out" / "disp.nii.gz"), sitk.sitkVectorFloat64)
    # Half a voxel beyond the border ITK repeats the last value, and ours falls to 0: so does ITK's
    # with a voxel of 0 around the image.
    moving = sitk.ConstantPad(sitk.ReadImage(str(tmp_path / "moving.nii.gz")), [1] * 3, [1] * 3)
    theirs = sitk.Resample(
        moving,
        sitk.ReadImage(str(tmp_path / "fixed.nii.gz")),
        sitk.DisplacementFieldTransform(field),
        sitk.sitkLinear,
        0.0,
    )
    theirs = sitk.GetArrayFromImage(theirs).T
    ours = nibabel.load(tmp_path / "out" / "moved.nii.gz").get_fdata()
    assert (theirs > 0.01).mean() > 0.2 and np.abs(ours - theirs).max() < 1e-3


# what it does not need --------------------------------------------------------------------------

# neither a compiler nor what trainings, notebooks and figures need: each takes seconds to import
HEAVY = "torch._dynamo accelerate tensorboard ipywidgets matplotlib nilearn monai ants pandas"
START = """
import sys
import numpy as np
import regkit
image = np.random.default_rng(0).random((48, 56), np.float32)
class Started(Exception):
    pass
def progress(stage, fraction):
    if stage == "network":
        print([name for name in sys.argv[1:] if name in sys.modules])
        raise Started
try:
    regkit.register(image, image, affine=False, progress=progress)
except Started:
    pass
"""


@pytest.mark.slow
def test_a_network_starts_without_importing_what_it_does_not_need():
    """The seconds between reading and the network were the import of PyTorch's compiler."""
    command = [sys.executable, "-c", START, *HEAVY.split()]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# refinement -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 44), (24, 26, 28)])
def test_refinement_improves_what_it_minimises_and_comes_closer_to_the_truth(shape):
    d = len(shape)
    image = torch.from_numpy(blobs(shape))[None, None]
    truth = 2 * torch.cat(
        [torch.from_numpy(blobs(shape, seed=k + 5))[None, None] for k in range(d)], 1
    )
    fixed = warp(image, truth)
    start = torch.zeros_like(truth)
    found = classical.refine(image, fixed, start, 60)
    assert losses.lncc(warp(image, found), fixed) < 0.5 * losses.lncc(image, fixed)
    seen = (fixed > 0.2).float()
    error = [float(metrics.endpoint_error(x, truth, seen)) for x in (start, found)]
    assert error[1] < 0.6 * error[0]
    assert torch.equal(classical.refine(image, fixed, start, 0), start)


def test_refinement_is_part_of_register(network):
    a, b = blobs((40, 44)), np.roll(blobs((40, 44)), 3, axis=0)
    network([0.0, 0.0])
    plain, refined = (regkit.register(a, b, "constant.safetensors", refine=n) for n in (0, 30))
    assert refined.metrics["lncc"]["after"] > plain.metrics["lncc"]["after"] + 0.1
    assert refined.metrics["refine"] == 30


# numbers, warnings ------------------------------------------------------------------------------


def test_metrics_are_those_of_the_library(network):
    network([1.0, 0.0])
    moving, fixed = blobs((30, 34)), blobs((30, 34), seed=1)
    numbers = regkit.register(moving, fixed, "constant.safetensors").metrics
    a, b = (torch.from_numpy(x)[None, None] for x in (moving, fixed))
    after = warp(a, torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 30, 34))
    # intensities are scaled by percentiles first, to which lncc and ncc hardly react
    assert numbers["lncc"]["before"] == pytest.approx(1 - float(losses.lncc(a, b)), abs=0.01)
    assert numbers["ncc"]["after"] == pytest.approx(1 - float(losses.ncc(after, b)), abs=0.01)
    assert {"method", "device", "seed", "seconds", "versions"} <= set(numbers)


def test_dice_before_and_after_a_known_shift(network):
    """A square of 10 x 10 and its copy 5 voxels further: Dice 1/2 before, 1 after."""
    network([5.0, 0.0])
    fixed_labels = np.zeros((40, 40), np.uint8)
    fixed_labels[10:20, 10:20] = 3
    moving_labels = np.roll(fixed_labels, 5, axis=0)
    moving_labels[35:, 35:] = 9  # in one image only
    result = regkit.register(
        blobs((40, 40)),
        blobs((40, 40)),
        "constant.safetensors",
        moving_labels=moving_labels,
        fixed_labels=fixed_labels,
    )
    assert result.metrics["dice"] == {"before": 0.5, "after": 1.0}
    assert result.metrics["dice_per_label"] == {"3": {"before": 0.5, "after": 1.0}}
    assert "label 9 is in one image only and left out of the Dice." in result.warnings
    assert result.moved_labels.dtype == torch.int32


@pytest.mark.slow
def test_warnings_name_what_looks_wrong(network):
    network([0.0, 0.0, 0.0], spacing=[2.0, 2.0, 2.0])
    image = nifti(blobs((20, 22, 24)), RAS)
    away = RAS.copy()
    away[0, 3] = 38.0
    far = regkit.register(image, nifti(blobs((20, 22, 24)), away), "constant.safetensors", False)
    assert any("hardly overlap" in w for w in far.warnings)
    assert any("lies inside the moving image" in w for w in far.warnings)
    flat = regkit.register(image, nifti(np.ones((20, 22, 24), "f4"), RAS), "constant.safetensors")
    assert "fixed has the same intensity everywhere." in flat.warnings
    scan = nifti(2000 * blobs((20, 22, 24)) - 1000, RAS)
    ct = regkit.register(scan, scan, "constant.safetensors")
    assert any("as in a CT" in w for w in ct.warnings)
    assert regkit.register(image, image, "constant.safetensors").warnings == []


def test_a_coronal_slice_is_no_axial_slice(network):
    network([0.0, 0.0], spacing=[2.0, 2.0])
    coronal = nifti(blobs((30, 34)), LIA)
    warnings = regkit.register(coronal, coronal, "constant.safetensors").warnings
    assert any("no axial slices" in w for w in warnings)


def test_folding_is_warned_about(monkeypatch, network):
    model = network([0.0, 0.0])
    saw = 3.0 * (torch.arange(40) % 3).float()  # 0, 3, 6, 0, 3, 6: falls by 1.5 a voxel at places
    disp = torch.zeros(1, 2, 40, 40) + saw[:, None]
    monkeypatch.setattr(model, "estimate", lambda moving, fixed: {"disp": disp})
    result = regkit.register(blobs((40, 40)), blobs((40, 40)), "constant.safetensors")
    assert result.metrics["folding_percent"] > 1
    assert any("folds in" in w for w in result.warnings)


def test_progress_never_runs_backwards():
    seen = []
    image = nifti(blobs((30, 34)), RAS)
    regkit.register(
        image, image, "affine", refine=3, progress=lambda stage, f: seen.append((stage, f))
    )
    fractions = [round(f, 9) for _, f in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    assert {"reading", "affine", "refining", "measuring"} <= {stage for stage, _ in seen}


def test_coverage_is_counted_by_hand():
    """Of 10 x 6 voxels moved by 2.7 and -1.2, places from -0.5 to 9.5 and 5.5 are inside."""
    disp = torch.tensor([2.7, -1.2]).reshape(1, 2, 1, 1).expand(1, 2, 10, 6)
    assert checks.coverage(disp, (10, 6)) == pytest.approx(7 / 10 * 5 / 6)
    assert checks.coverage(disp, (12, 3)) == pytest.approx(9 / 10 * 3 / 6)


@pytest.mark.parametrize(
    ("voxels", "working", "enough"),
    [(40, 150, True), (40, 170, False), (80, 210, True), (80, 220, False), (150, 345, False)],
)
def test_a_working_grid_is_bounded_by_the_voxels_of_the_image(voxels, working, enough):
    """4 million, or 20 times those of the image if that is more, and never more than 40 million."""
    grids = (Grid((n, n, n), np.eye(4)) for n in (voxels, working))
    if enough:
        checks.small_enough(*grids)
    else:
        with pytest.raises(ValueError, match="million voxels of the network's size"):
            checks.small_enough(*grids)


def test_the_report_shows_everything_on_one_upright_grid(network):
    """`moved` is `moving` looked up through `disp`, also when all three are turned to R, A, S."""
    network([0.6, -0.4, 0.3], spacing=[2.0, 2.0, 2.0])
    image = nifti(blobs((20, 22, 24)), LIA)
    page = regkit.register(image, image, "constant.safetensors", affine=False)._page
    assert page["orientation"] == ("R", "A", "S") and page["spacing"] == [1.5, 2.0, 1.0]
    again = warp(page["moving"], page["disp"])
    inside = (slice(None), slice(None), *[slice(2, -2)] * 3)
    torch.testing.assert_close(again[inside], page["moved"][inside], atol=1e-4, rtol=0)


# saving -----------------------------------------------------------------------------------------


@pytest.fixture
def result(network):
    network([0.5, 0.0, 0.25], spacing=[2.0, 2.0, 2.0])
    image = nifti(blobs((20, 22, 24)), LIA)
    return regkit.register(image, image, "constant.safetensors")


@pytest.mark.parametrize("refine", [0, 5])
def test_a_gpu_whose_memory_is_too_small_is_one_sentence(network, monkeypatch, refine):
    model = network([0.0, 0.0])

    def too_large(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    if refine:
        monkeypatch.setattr(classical, "greedy", too_large)
    else:
        monkeypatch.setattr(model, "estimate", too_large)
    image = blobs((30, 34))
    with pytest.raises(ValueError, match=r"grid of \(30, 34\) voxels .*device='cpu'") as caught:
        regkit.register(image, image, "constant.safetensors", refine=refine)
    assert "\n" not in str(caught.value)


def test_a_map_that_leads_out_of_the_moving_image_is_not_taken(monkeypatch):
    """The similarity may well have fallen: beside an image there is nothing to disagree with."""
    image = blobs((30, 34))
    other = np.roll(image, 2, 0)
    away = torch.zeros(1, 2, 30, 34)
    away[:, 0] = 20.0

    def lost(moving, fixed, start=None, **options):
        return classical.Deformation(away)

    monkeypatch.setattr(classical, "greedy", lost)
    monkeypatch.setattr(classical, "disagreement", lambda *given: float(given[2].mean() == 0))
    result = regkit.register(other, image, "greedy", affine=False)
    assert not result.disp.any()
    assert any("led the images apart" in sentence for sentence in result.warnings)


ONE = {"recipe": {"contrast": "t1"}}
contrasts = pytest.mark.parametrize("other", ["t2", "pd", "flair"])


def contrast_warnings(network, moving, fixed, **info):
    network([0.0] * moving.image[0].ndim, **info)
    images = (nifti(x.image[0].numpy(), x.affine) for x in (moving, fixed))
    found = regkit.register(*images, "constant.safetensors", affine=False).warnings
    return [sentence for sentence in found if "two contrasts" in sentence]


@contrasts
@pytest.mark.parametrize("shape", [(80, 96), (40, 48, 40)])
def test_another_contrast_is_warned_of_on_either_side(network, shape, other):
    t1 = population(2, shape, seed=2)
    others = population(2, shape, seed=2, contrast=other)
    for pair in ((t1[0], others[1]), (others[0], t1[1])):
        assert len(contrast_warnings(network, *pair, **ONE)) == 1
    assert contrast_warnings(network, *t1, **ONE) == []


@pytest.mark.parametrize(
    "info",
    [
        {},
        {**ONE, "contrast": "any"},
        {"recipe": {"contrast": "random"}},
        {"recipe": {"contrast": "t1", "painted": {"size": 3}}},
        {"recipe": {"contrast": "t1", "motion": {"contrasts": ["t1", "t2"]}}},
    ],
    ids=str,
)
def test_weights_that_know_several_contrasts_do_not_warn(network, info):
    t1, t2 = (population(2, (80, 96), seed=2, contrast=c) for c in ("t1", "t2"))
    assert contrast_warnings(network, t1[0], t2[1], **info) == []


@pytest.mark.slow
@pytest.mark.real
def test_real_pairs_of_one_contrast_and_of_two(network, sample):
    from regkit.data import samples

    for name in ("oasis_3d", "ants_slices", "brainweb_t1_pd_2d"):
        sample(name)
    oasis, ants = samples.load_oasis_slices(), list(samples.load_ants_slices().values())
    brainweb = samples.load_brainweb()
    pairs = [oasis[:2], ants[:2], ants[2:], (brainweb["t1"], brainweb["pd"])]
    network([0.0, 0.0], spacing=[2.2, 2.2], orientation="RAS", range=[0, 1], **ONE)
    warned = []
    for pair in pairs:
        found = regkit.register(*(x.nifti() for x in pair), "constant.safetensors").warnings
        warned.append(any("two contrasts" in sentence for sentence in found))
    assert warned == [False, False, False, True]


@pytest.mark.slow
def test_save_writes_four_files(result, tmp_path):
    folder = result.save(tmp_path / "a" / "b")
    names = ["disp.nii.gz", "metrics.json", "moved.nii.gz", "report.png"]
    assert sorted(p.name for p in folder.iterdir()) == names
    moved = nibabel.load(folder / "moved.nii.gz")
    np.testing.assert_allclose(moved.affine, LIA, atol=1e-5)
    np.testing.assert_allclose(moved.get_fdata(), result.moved[0, 0], atol=1e-6)
    numbers = json.loads((folder / "metrics.json").read_text())
    assert numbers["lncc"] == result.metrics["lncc"] and numbers["warnings"] == result.warnings
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.slow
def test_a_failure_in_the_middle_of_saving_leaves_nothing(result, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no figure today")

    monkeypatch.setattr(plot, "report", fail)
    with pytest.raises(RuntimeError):
        result.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_failure_keeps_the_result_of_last_time_whole(result, tmp_path, monkeypatch):
    result.save(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def fail(*args, **kwargs):
        raise RuntimeError("no figure today")

    monkeypatch.setattr(plot, "report", fail)
    with pytest.raises(RuntimeError):
        result.save(tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


@pytest.mark.slow
def test_numbers_that_are_not_finite_become_null(result, tmp_path):
    result.metrics["odd"] = float("nan")
    result.save(tmp_path / "out")
    text = (tmp_path / "out" / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["odd"] is None


def test_no_name_and_no_path_get_out(tmp_path, capfd):
    """A patient's name in the header, in the file name and in the folder: none of it comes out."""
    secret = tmp_path / "Roe_Jane_1970"
    secret.mkdir()
    for kind, seed in (("moving", 0), ("fixed", 1)):
        image = nifti(blobs((30, 34), seed), RAS)
        image.header["descrip"] = b"ROE^JANE 19700101"
        image.header["aux_file"] = b"Jane Roe"
        image.header["db_name"] = b"JaneRoe"
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Jane Roe"))
        nibabel.save(image, secret / f"Roe_Jane_{kind}.nii.gz")
    weights = secret / "w.safetensors"
    models.save(models.create("vxm_diff", ndim=2), weights)
    result = regkit.register(
        secret / "Roe_Jane_moving.nii.gz", secret / "Roe_Jane_fixed.nii.gz", weights
    )
    folder = result.save(tmp_path / "out")
    written = [
        capfd.readouterr().out.encode(),
        capfd.readouterr().err.encode(),
        str(result.metrics).encode(),
    ]
    for file in folder.iterdir():
        written.append(file.read_bytes())
        if file.name.endswith(".nii.gz"):
            image = nibabel.load(file)
            assert not image.header.extensions
            written.append(image.header.binaryblock)
    for content in written:
        assert b"roe" not in content.lower() and b"jane" not in content.lower()
        assert os.fsencode(tmp_path) not in content


# what is shipped, and real brains ---------------------------------------------------------------


def shipped(d: int) -> str:
    names = [name for name in models.pretrained() if models.load(name).ndim == d]
    if not names:
        pytest.fail(f"no {d}D weights are shipped.")
    return names[0]


@pytest.mark.slow
@pytest.mark.parametrize("d", [2, 3])
def test_auto_takes_shipped_weights_and_registers_unseen_subjects(d):
    assert shipped(d)
    shape = (160, 192) if d == 2 else (80, 96, 80)
    moving, fixed = population(2, shape, seed=2)
    result = regkit.register(
        nifti(moving.image[0].numpy(), moving.affine),
        nifti(fixed.image[0].numpy(), fixed.affine),
        moving_labels=moving.labels,
        fixed_labels=fixed.labels,
    )
    gained = result.metrics["dice"]["after"] - result.metrics["dice"]["before"]
    assert gained > 0.1 and result.metrics["folding_percent"] < 0.5
    assert result.metrics["method"] in models.pretrained()


@pytest.mark.slow
@pytest.mark.real
def test_two_real_brains_in_3d(sample):
    from regkit.data import samples

    sample("oasis_3d")
    moving, fixed = samples.load_oasis_pair()
    result = regkit.register(moving.nifti(), fixed.nifti())
    assert result.metrics["affine"] == "none"
    assert result.metrics["lncc"]["after"] > result.metrics["lncc"]["before"] + 0.1
    assert result.metrics["folding_percent"] < 0.5


@pytest.mark.slow
@pytest.mark.real
def test_refining_the_labelled_real_slices_raises_their_dice(sample):
    from regkit.data import samples

    sample("oasis_3d")
    moving, fixed, shared = samples.load_oasis_slices()
    kept = [
        nifti(np.where(np.isin(x.labels[0], shared), x.labels[0], 0).astype("i2"), x.affine)
        for x in (moving, fixed)
    ]
    result = regkit.register(
        moving.nifti(),
        fixed.nifti(),
        "affine",
        refine=100,
        moving_labels=kept[0],
        fixed_labels=kept[1],
    )
    assert result.metrics["dice"]["before"] == pytest.approx(
        0.602, abs=0.001
    )  # the sample's README
    assert result.metrics["dice"]["after"] > 0.67
    assert result.metrics["folding_percent"] < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "expected"), [(2, "none"), (10, "affine")])
def test_auto_aligns_on_one_grid_where_the_images_lie_apart(network, shift, expected):
    """4 mm are the network's business, 20 mm are not."""
    network([0.0, 0.0])
    subject = population(1, (80, 96), seed=2)[0]
    image = subject.image[0].numpy()
    pair = nifti(np.roll(image, shift, axis=1), RAS), nifti(image, RAS)
    assert regkit.register(*pair, "constant.safetensors").metrics["affine"] == expected


@pytest.mark.parametrize(("shift", "needed"), [(4.0, False), (11.5, False), (12.5, True)])
def test_an_affine_step_is_needed_where_a_look_finds_more_than_12_mm(shift, needed, monkeypatch):
    matrix = np.eye(4)
    matrix[1, 3] = shift  # mm
    monkeypatch.setattr(classical, "align", lambda *args, **options: matrix)
    image = io.as_image(nifti(blobs((30, 34)), RAS))
    assert bool(registration._apart(image, image)) is needed


@pytest.mark.slow
@pytest.mark.real
def test_two_heads_that_are_not_aligned(sample):
    """As far as ANTs gets with mutual information (correlation 0.869; 0.775 before)."""
    from regkit.data import samples

    sample("oasis_3d")
    moving, fixed = samples.load_oasis_heads()
    a, b = (io.Image(x.image[None], x.affine) for x in (moving, fixed))
    matrix = classical.align(a, b, "affine")
    after = resample(a.data, a.grid, b.grid, matrix=matrix)
    assert 1 - losses.ncc(after, b.data) > 0.86


@pytest.mark.slow
@pytest.mark.real
def test_structures_of_two_heads_that_are_not_aligned(sample):
    """Descent on lncc lays structures over each other that descent on ncc leaves apart.

    The Dice where it ends, 0.602, differs by 0.003 between processors, since the energy jumps where
    a window of background enters or leaves its mean; so the ends of two energies are compared, of
    one processor. SimpleITK comes to 0.57 with mutual information, 0.59 with correlation.
    """
    from regkit.data import samples

    sample("oasis_3d")
    moving, fixed = samples.load_oasis_pair()[0], samples.load_oasis_heads()[0]
    a, b = (io.Image(x.image[None], x.affine) for x in (moving, fixed))
    labels = samples.merge_structures(moving.labels)[None].int()
    structures = list(samples.oasis_structures())
    (small_moving, moving_grid), (small_fixed, grid) = (space.to_isotropic(x) for x in (a, b))
    theta = grid.theta_to(moving_grid)
    dice: dict[str, float] = {}
    energy: dict[str, float] = {}
    for similarity in ("ncc", "lncc"):  # one after the other, as `align` does for lncc
        search, levels = similarity == "ncc", None if similarity == "ncc" else 1
        theta = classical.fit(
            small_moving, small_fixed, "affine", similarity, theta, search=search, levels=levels
        )
        disp = b.grid.disp_to(a.grid, grid.matrix_of(theta, moving_grid))
        moved = warp(labels, disp, mode="nearest")
        dice[similarity] = float(metrics.dice(moved, fixed.labels[None].int(), structures).mean())
        energy[similarity] = float(losses.lncc(warp(a.data, disp), b.data, window=5))
    assert energy["lncc"] < energy["ncc"]
    assert dice["lncc"] > dice["ncc"] + 0.002 and dice["ncc"] > 0.59


# SyN --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("apart", [0.0, 20.0])
def test_syn_gains_dice_and_is_aligned_first_where_that_is_needed(apart):
    pytest.importorskip("ants")
    a, b = population(2, (80, 96), seed=2)
    away = a.affine.copy()
    away[0, 3] += apart  # mm
    moving = nifti(a.image[0].numpy(), away), nifti(a.labels[0].numpy(), away)
    fixed = nifti(b.image[0].numpy(), b.affine), nifti(b.labels[0].numpy(), b.affine)
    found = regkit.register(
        moving[0], fixed[0], "syn", moving_labels=moving[1], fixed_labels=fixed[1]
    )
    assert found.metrics["method"] == "syn"
    assert found.metrics["affine"] == ("affine" if apart else "none")
    assert found.metrics["dice"]["after"] > 0.85 > found.metrics["dice"]["before"] + 0.2
    assert found.metrics["folding_percent"] < 0.01 and found.warnings == []
    assert found.disp.shape == (1, 2, 80, 96)


def test_syn_may_be_refined():
    pytest.importorskip("ants")
    a, b = (x.image[0].numpy() for x in population(2, (64, 72), seed=2))
    plain, refined = (regkit.register(a, b, "syn", refine=n) for n in (0, 30))
    assert plain.theta is None and refined.metrics["refine"] == 30
    moving, fixed = (torch.from_numpy(x)[None, None] for x in (a, b))
    objective = [float(losses.lncc(warp(moving, x.disp), fixed)) for x in (plain, refined)]
    assert objective[1] < objective[0]
    assert refined.metrics["folding_count"] == 0


@pytest.mark.slow
def test_ants_applies_what_syn_has_left_in_a_file(tmp_path):
    """Oblique grids of different voxels; ANTs reads our files, and nothing else."""
    ants = pytest.importorskip("ants")
    a, b = population(2, (26, 32, 28), seed=2)
    for name, subject, tilt, shape in (
        ("moving", a, turned(3, 0.2, (-4.0, 3.0, 2.0)), (20, 22, 18)),
        ("fixed", b, turned(3, -0.1, (2.0, 1.0, -3.0)), (19, 25, 20)),
    ):
        affine = tilt @ subject.affine @ np.diag([1.4, -1.3 if name == "moving" else 1.3, 1.5, 1])
        middle = [(n - 1) / 2 for n in shape]
        affine[:3, 3] = -affine[:3, :3] @ middle + (0, -17, 5)  # about the middle of the brain
        image = resample(subject.image[None], subject.grid, Grid(shape, affine))
        io.write_image(image, affine, tmp_path / f"{name}.nii.gz")
    paths = [str(tmp_path / f"{name}.nii.gz") for name in ("moving", "fixed")]
    result = regkit.register(*paths, "syn", affine=False)
    result.save(tmp_path / "out")
    theirs = ants.apply_transforms(
        ants.image_read(paths[1]),
        ants.image_read(paths[0]),
        [str(tmp_path / "out" / "disp.nii.gz")],
    ).numpy()
    ours = nibabel.load(tmp_path / "out" / "moved.nii.gz").get_fdata()
    inside = np.ones(ours.shape, bool)  # beyond the moving image the two pad differently
    for axis, n in enumerate((20, 22, 18)):
        place = result.disp[0, axis].numpy() + np.indices(ours.shape)[axis]
        inside &= (place > 0) & (place < n - 1)
    assert inside.mean() > 0.5 and np.abs(ours - theirs)[inside].max() < 1e-3


def test_the_command_line_knows_syn(tmp_path, monkeypatch):
    pytest.importorskip("ants")
    from typer.testing import CliRunner

    from regkit.cli import app

    for name, seed in (("moving", 0), ("fixed", 1)):
        nibabel.save(nifti(blobs((30, 34), seed), RAS), tmp_path / f"{name}.nii.gz")
    command = ["register", str(tmp_path / "moving.nii.gz"), str(tmp_path / "fixed.nii.gz")]
    command += ["--method", "syn", "--affine", "none", "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["method"] == "syn"
    monkeypatch.setitem(sys.modules, "ants", None)
    command[-1] = str(tmp_path / "again")
    failed = CliRunner().invoke(app, command)
    assert failed.exit_code == 2 and not (tmp_path / "again").exists()
    assert "antspyx" in failed.output and 'pip install -e ".[baselines]"' in failed.output


# what must not come out wrong, or in silence ----------------------------------------------------


@pytest.mark.parametrize("size", [20.0, 50.0])
def test_voxels_of_centimetres_are_refused_before_anything_is_allotted(network, size):
    """A header in micrometres read as mm: 40 voxels of 50 mm are 700 million of a network's."""
    model = network([0.0, 0.0, 0.0], spacing=[2.2, 2.2, 2.2])
    image = nifti(blobs((40, 40, 40)), np.diag([size, size, size, 1]))
    with pytest.raises(ValueError, match=r"fixed covers .* mm, \d+ million voxels .* in mm"):
        regkit.register(image, image, "constant.safetensors", affine=False)
    assert model.seen == []


def test_a_rigid_search_without_an_affine_step_is_refused():
    image = blobs((20, 22))
    with pytest.raises(ValueError, match="affine is False and method 'rigid', expected one of"):
        regkit.register(image, np.roll(image, 5, 0), "rigid", affine=False)


def test_auto_reads_one_network_and_draws_no_random_number(monkeypatch):
    loaded, load = [], models.load
    monkeypatch.setattr(models, "load", lambda name: loaded.append(name) or load(name))
    image = blobs((32, 36))
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    regkit.register(image, image)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded == ["vxm_diff_brain_2d"]


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("way", [{}, {"method": "rigid"}])
def test_a_slice_is_2d_whichever_of_its_axes_has_one_voxel(axis, way):
    """The same two slices in each plane: the same answer, and files with their axis in place."""
    a, b = (x.image[0].numpy() for x in population(2, (48, 56), seed=5))
    images = [
        nibabel.Nifti1Image(np.expand_dims(x, axis), np.diag([2.2] * 3 + [1])) for x in (a, b)
    ]
    upright = [nibabel.Nifti1Image(x[..., None], np.diag([2.2] * 3 + [1])) for x in (a, b)]
    found, axial = regkit.register(*images, **way), regkit.register(*upright, **way)
    assert found.disp.shape == (1, 2, 48, 56)
    torch.testing.assert_close(found.disp, axial.disp, atol=0.01, rtol=0)
    assert found.transform.fixed.across == axis


@pytest.mark.slow
def test_before_and_after_are_sampled_in_one_way():
    """One picture at 0.5 and at 2 mm, aligned: nothing gets worse, and nothing is noise."""
    (subject,) = population(1, (384, 448), seed=5)
    fine = subject.image[0].numpy()
    noise = np.random.default_rng(0).normal(0, 0.15, fine.shape).astype(np.float32)
    fine = fine + noise * (fine > 0)
    small = fine.reshape(96, 4, 112, 4).mean((1, 3))
    affines = np.diag([0.5, 0.5, 0.5, 1]), np.diag([2.0, 2, 2, 1])
    affines[1][:2, 3] = 0.75
    images = (nifti(x, affine) for x, affine in zip((fine, small), affines, strict=True))
    result = regkit.register(*images, method="rigid")
    assert result.metrics["lncc"]["after"] >= result.metrics["lncc"]["before"] - 0.01
    assert result.warnings == []
    moved, inside = result.moved[0, 0].numpy(), small > 0.1
    grid = result.transform.moving
    ideal = resample(torch.from_numpy(fine)[None, None], grid, result.transform.fixed)[0, 0].numpy()
    errors = [np.sqrt(((x - small)[inside] ** 2).mean()) for x in (moved, ideal)]
    assert errors[0] < 1.3 * errors[1]


@pytest.mark.slow
def test_a_2d_affine_that_shrinks_by_half_is_no_tilted_plane():
    (subject,) = population(1, (96, 112), seed=2)
    half = np.diag([0.5, 0.5, 1, 1])
    grid = Grid(subject.grid.shape, subject.affine)
    moving = resample(subject.image[None], grid, grid, matrix=np.linalg.inv(half))
    pair = nifti(moving[0, 0].numpy(), subject.affine), nifti(subject.image[0].numpy(), grid.affine)
    result = regkit.register(*pair, "affine")
    assert result.metrics["ncc"]["after"] > 0.95
    assert np.linalg.det(result.theta[0, :, :2]) == pytest.approx(0.25, rel=0.1)


def test_a_slice_of_a_volume_beside_a_file_of_two_axes_is_warned_of(network):
    network([0.0, 0.0])
    values = blobs((30, 34))
    flat, volume = nibabel.Nifti1Image(values, RAS), nibabel.Nifti1Image(values[..., None], RAS)
    said = regkit.register(flat, volume, "constant.safetensors", False).warnings
    assert ["fixed is a slice of a volume" in sentence for sentence in said] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("refine", [1, 30])
def test_the_engine_keeps_a_start_that_it_cannot_improve(refine):
    """One step a level shakes the answer of a network; many lead on from it."""
    moving, fixed = (s.image[0].numpy() for s in population(2, (160, 192), seed=3))
    start = regkit.register(moving, fixed, "vxm_diff_brain_2d")
    result = regkit.register(moving, fixed, "vxm_diff_brain_2d", refine=refine)
    kept = any("the start is kept" in sentence for sentence in result.metrics["choices"])
    assert kept == (refine == 1) == torch.equal(result.disp, start.disp)
    assert result.metrics["lncc"]["after"] >= start.metrics["lncc"]["after"]
