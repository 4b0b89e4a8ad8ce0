"""The affine map in space that cannot disgrace itself: energies, known motions, what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage

import regkit
from regkit import classical, io, losses
from regkit.classical import similarity, space
from regkit.data import population, samples
from regkit.spatial import affine_to_disp, warp
from regkit.transform import resample

# Voxels of 4.4 mm: less than half a voxel of the 20,000 that these searches look at.
NEAR = 0.6


def smooth(seed: int, shape=(18, 20, 16)) -> torch.Tensor:
    """(1, 1, *S) in [0, 1], float64."""
    noise = np.random.default_rng(seed).random(shape)
    image = torch.from_numpy(ndimage.gaussian_filter(noise, 1.2))[None, None]
    return (image - image.min()) / (image.max() - image.min())


def in_place(subject) -> io.Image:
    return io.Image(subject.image[None], subject.affine)


def apart(found, truth, image: io.Image) -> float:
    """How far two maps put a place of the head from each other at most, voxels."""
    voxels = np.argwhere(image.data[0, 0].numpy() > 0.2)[::37]
    points = np.c_[image.grid.to_mm(voxels), np.ones(len(voxels))]
    return float(np.linalg.norm((points @ (found - truth).T)[:, :3], axis=1).max()) / max(
        image.spacing
    )


def turned_about(image: io.Image, axis: int, degrees: float, shift=(0.0, 0.0, 0.0)):
    """The image behind a turn about its centre, and the map that finds its places again."""
    angle, (i, k) = math.radians(degrees), [a for a in range(3) if a != axis]
    matrix, centre = np.eye(4), image.grid.centre
    matrix[i, i] = matrix[k, k] = math.cos(angle)
    matrix[i, k], matrix[k, i] = -math.sin(angle), math.sin(angle)
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre + shift
    moved = resample(image.data, image.grid, image.grid, matrix=np.linalg.inv(matrix))
    return io.Image(moved, image.affine), matrix


# energies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", similarity.ENERGIES)
def test_the_gradient_of_an_energy_is_its_slope(name, masked):
    moving, fixed = smooth(0), (smooth(0) + smooth(1)) / 2
    mask = torch.zeros_like(fixed)
    mask[..., 3:14, 4:17, 2:15] = 1
    energy = similarity.ENERGIES[name](moving, fixed, mask if masked else None)
    moved = (0.1 + 0.8 * moving).requires_grad_(True)
    energy(moved).backward()
    step = 1e-5 * torch.randn(moved.shape, generator=torch.manual_seed(0)).double()
    step += 1e-5 * moved.grad.sign()
    with torch.no_grad():
        slope = (energy(moved + step) - energy(moved - step)) / 2
    assert float((moved.grad * step).sum() / slope) == pytest.approx(1, abs=0.01)


def test_the_slope_of_local_correlation_is_right_where_an_image_is_nearly_flat():
    """There the weights of the windows change with the image, and have a slope of their own."""
    moving, fixed = smooth(0), (smooth(0) + smooth(1)) / 2
    flat = (..., slice(0, 8))
    for image in (moving, fixed):
        image[flat] = image.mean() + 5e-3 * (image[flat] - image.mean())
    energy = similarity.local_correlation(moving, fixed)
    moved = (0.1 + 0.8 * moving).requires_grad_(True)
    energy(moved).backward()
    step = torch.zeros_like(moved)
    step[..., :4] = 1e-7 * moved.grad[..., :4].sign()
    with torch.no_grad():
        slope = (energy(moved + step) - energy(moved - step)) / 2
    assert float((moved.grad * step).sum() / slope) == pytest.approx(1, abs=0.01)


def test_energies_agree_with_the_losses_they_stand_for():
    a, b = smooth(0), (smooth(0) + smooth(1)) / 2
    for name, loss, tolerance in (
        ("ncc", losses.ncc(a, b), 1e-6),
        ("lncc", losses.lncc(a, b, window=5), 2e-3),
        ("mutual_information", losses.mutual_information(a, b), 0.05),
    ):
        assert float(similarity.ENERGIES[name](a, b, None)(a)) == pytest.approx(
            float(loss), abs=tolerance
        )


def test_the_local_correlation_does_not_jump_where_windows_enter_the_background():
    """A speck of 1e-6 in the empty corner: the loss of training gains windows at once."""
    moving, fixed = torch.zeros(2, 1, 1, 24, 24, 24).double()
    fixed[..., 8:20, 8:20, 8:20] = smooth(1, (12, 12, 12))
    moving[..., 8:20, 8:20, 8:20] = smooth(2, (12, 12, 12))
    speck = moving.clone()
    speck[..., 2, 2, 2] = 1e-6
    energy = similarity.ENERGIES["lncc"](moving, fixed, None)
    assert abs(float(energy(speck) - energy(moving))) < 1e-6
    # and a head that has grown pays for the windows that it has gained
    grown = moving.clone()
    grown[..., 1:7, 1:7, 1:7] = smooth(3, (6, 6, 6))
    assert float(energy(grown)) > float(energy(moving)) + 0.01


# known motions ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [90, 180, -90])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_head_turned_by_quarters_about_any_axis_is_found(axis, degrees):
    fixed = in_place(population(1, (40, 48, 40), seed=5)[0])
    moving, truth = turned_about(fixed, axis, degrees, (4.0, -6.0, 3.0))
    found = classical.aligned(moving, fixed, "affine", largest=20_000)
    assert apart(found.matrix, truth, fixed) < NEAR and found.warnings == ()


@pytest.mark.slow
def test_half_an_image_of_shift_is_found():
    fixed = in_place(population(1, (40, 48, 40), seed=5)[0])
    moving, truth = turned_about(fixed, 2, 10)
    away = np.eye(4)
    away[0, 3] = 0.5 * fixed.shape[0] * fixed.spacing[0]
    found = classical.aligned(io.Image(moving.data, away @ moving.affine), fixed, largest=20_000)
    assert apart(found.matrix, away @ truth, fixed) < NEAR and found.warnings == ()


@pytest.mark.slow
def test_a_mirrored_header_is_not_followed():
    """Left is right by the header: no turn undoes that, and no mirrored map is given."""
    fixed = in_place(population(1, (40, 48, 40), seed=5)[0])
    mirrored = np.diag([-1.0, 1, 1, 1]) @ fixed.affine
    found = classical.aligned(io.Image(fixed.data, mirrored), fixed, largest=20_000)
    assert np.linalg.det(found.matrix[:3, :3]) > 0
    assert np.linalg.svd(found.matrix[:3, :3])[1].max() < space.STRETCH


# what is refused ----------------------------------------------------------------------------------


def pair_of_heads() -> space._Pair:
    moving, fixed = map(in_place, population(2, (26, 32, 28), seed=2))
    return space._Pair.of(moving, fixed, None, 50_000)


@pytest.mark.parametrize(
    ("linear_part", "shift", "reason"),
    [
        ((-1.0, 1.0, 1.0), 0.0, "mirrors the image"),
        ((1.0, 2.5, 1.0), 0.0, "stretches the image by a factor of 2.5"),
        ((1.0, 0.2, 1.0), 0.0, "stretches the image by a factor of 5.0"),
        ((1.0, 1.0, 1.0), 25.0, "takes the image out of view"),
        ((1.0, 1.0, 1.0), 8.0, "fits less well than the headers do"),
        ((1.0, 1.0, math.nan), 0.0, "is not finite"),
    ],
)
def test_what_is_no_answer_is_refused(linear_part, shift, reason):
    pair = pair_of_heads()
    theta = torch.cat([torch.diag(torch.tensor(linear_part)), torch.zeros(3, 1)], dim=1)[None]
    theta[0, 0, 3] = shift
    assert reason in str(pair.fault(theta.double(), "mutual_information"))
    assert pair.fault(pair.headers, "mutual_information") is None


@pytest.mark.slow
def test_the_best_sane_answer_is_kept(monkeypatch):
    """An affine step that presses the image flat leaves the rigid map, and a sentence."""
    moving, fixed = map(in_place, population(2, (26, 32, 28), seed=2))
    descent = space._Pair.descent

    def flat(self, theta, kind, similarity):
        if kind == "rigid":
            return descent(self, theta, kind, similarity)
        return theta * torch.tensor([0.3, 1.0, 1.0, 1.0]).to(theta)

    monkeypatch.setattr(space._Pair, "descent", flat)
    found = classical.aligned(moving, fixed, largest=10_000)
    lengths = found.matrix[:3, :3].T @ found.matrix[:3, :3]
    assert np.allclose(lengths, np.eye(3), atol=1e-4)
    (warning,) = found.warnings
    assert "affine map found for the two images is refused: it stretches" in warning


@pytest.mark.slow
def test_two_images_that_show_nothing_alike_stay_where_they_are():
    fixed = in_place(population(1, (26, 32, 28), seed=2)[0])
    noise = torch.rand(fixed.data.shape, generator=torch.manual_seed(1))
    found = classical.aligned(io.Image(noise, fixed.affine), fixed)
    assert np.array_equal(found.matrix, np.eye(4))
    assert "too little alike" in found.warnings[0] and "headers put them" in found.warnings[0]
    away = fixed.affine.copy()
    away[:3, 3] += 1000
    found = classical.aligned(io.Image(noise, away), fixed)
    assert np.allclose(found.matrix[:3, 3], 1000) and "centre on centre" in found.warnings[0]


# bad input ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2), (2, 3, 2), (3, 2, 9)])
def test_images_of_a_few_voxels_have_an_answer(shape):
    images = (
        io.Image(torch.rand(1, 1, *shape, generator=torch.manual_seed(i)), np.eye(4))
        for i in (0, 1)
    )
    found = classical.aligned(*images)
    assert np.isfinite(found.matrix).all() and np.linalg.det(found.matrix) > 0


def test_an_unknown_similarity_is_one_sentence():
    image = io.Image(torch.rand(1, 1, 9, 9), np.eye(4))
    with pytest.raises(ValueError, match="similarity is 'mse', expected one of auto, ncc, lncc"):
        classical.align(image, image, similarity="mse")


def test_only_the_mask_counts():
    """Half of the fixed image is another head: inside the mask the other half counts alone."""
    fixed, other = (s.image[None] for s in population(2, (80, 96), seed=2))
    theta = torch.tensor([[[1.0, 0.0, 4.0], [0.0, 1.0, -3.0]]])
    back = torch.tensor([[[1.0, 0.0, -4.0], [0.0, 1.0, 3.0]]])
    moving = warp(fixed, affine_to_disp(back, fixed.shape[2:]))
    mixed = fixed.clone()
    mixed[..., 48:] = torch.roll(other, 9, 2)[..., 48:]
    mask = torch.zeros_like(fixed)
    mask[..., :44] = 1
    found = classical.fit(moving, mixed, "rigid", "ncc", mask=mask, search=False)
    blind = classical.fit(moving, mixed, "rigid", "ncc", search=False)
    assert (found - theta).abs().max() < 0.05 < (blind - theta).abs().max()


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (torch.ones(1, 1, 8, 9), r"mask has shape \(1, 1, 8, 9\), expected \(1, 1, 9, 9\)"),
        (torch.zeros(1, 1, 9, 9), "mask is 0 everywhere"),
    ],
)
def test_a_mask_that_does_not_fit_is_one_sentence(mask, sentence):
    image = torch.rand(1, 1, 9, 9)
    with pytest.raises(ValueError, match=sentence):
        classical.fit(image, image, mask=mask)
    with pytest.raises(ValueError, match=sentence):
        classical.align(io.Image(image, np.eye(4)), io.Image(image, np.eye(4)), mask=mask)


def test_what_was_not_measured_counts_as_background():
    """-2048 outside the circle of a CT becomes air; the background of a bare brain stays."""
    ct = torch.full((1, 1, 40, 40), -2048.0)
    ct[..., 5:35, 5:35] = -1000.0 + torch.rand(30, 30, generator=torch.manual_seed(0))
    ct[..., 12:28, 12:28] = torch.linspace(-800, 300, 256).reshape(16, 16)
    clean = space.measured(ct)
    assert float(clean.min()) == pytest.approx(-1000, abs=1)
    assert torch.equal(clean[..., 5:35, 5:35].clamp_min(-999), ct[..., 5:35, 5:35].clamp_min(-999))
    brain = torch.zeros(1, 1, 40, 40)
    brain[..., 12:28, 12:28] = 160 + 10 * smooth(0, (16, 16))[0, 0].float()
    brain[..., 20, 12:28] = torch.linspace(100, 200, 16)
    assert torch.equal(space.measured(brain), brain)


# real images --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.real
def test_a_lung_comes_as_near_as_with_other_tools(sample):
    """26 landmarks without the source's outlier: ANTs leaves 6.36 mm, greedy of PICSL 6.19."""
    sample("lung_ct")
    baseline, followup, points, partners = samples.load_lung()
    matrix = classical.align(in_place(followup), in_place(baseline))
    there = np.c_[points, np.ones(len(points))] @ matrix.T
    errors = np.delete(np.linalg.norm(there[:, :3] - partners, axis=1), 9)
    assert errors.mean() < 6.5


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("number", range(8))
def test_mr_and_ultrasound_end_no_worse_than_their_headers(sample, number):
    """A plain `register`: what it does not believe it leaves alone, and says so."""
    images, labels = prostate(sample, number)
    result = regkit.register(*images, moving_labels=labels[0], fixed_labels=labels[1])
    assert result.metrics["dice"]["after"] >= result.metrics["dice"]["before"]
    if result.metrics["method"] == "none":
        assert any("No deformation was looked for" in sentence for sentence in result.warnings)


@pytest.mark.slow
@pytest.mark.real
def test_a_map_that_takes_two_masks_apart_is_refused(sample):
    images, labels = prostate(sample, 3)
    result = regkit.register(
        *images,
        "rigid",
        moving_mask=labels[0],
        fixed_mask=labels[1],
        moving_labels=labels[0],
        fixed_labels=labels[1],
    )
    assert result.metrics["dice"]["after"] >= result.metrics["dice"]["before"]


def prostate(sample, number):
    """MR and ultrasound of a patient as their files have them, and both label maps."""
    folder = Path(sample("prostate_mr_us"))
    scans = samples.load_prostates()[number][:2]
    pairs = []
    for side, scan in zip(("mr", "us"), scans, strict=True):
        affine = io.read(folder / f"{side}_images" / f"case{number:06d}.nii.gz").affine
        values = scan.image[0].numpy().astype("f4"), scan.labels[0].numpy().astype("i2")
        pairs.append([nibabel.Nifti1Image(x, affine) for x in values])
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
