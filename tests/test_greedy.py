"""The engine `regkit.classical.greedy`: known warps, what it promises, and what it refuses."""

import re

import numpy as np
import pytest
import torch
from scipy import ndimage

from regkit import classical, data, losses, metrics
from regkit.classical.greedy import _unfolded
from regkit.spatial import affine_to_disp, compose, integrate, warp

KINDS = {2: (96, 80), 3: (40, 48, 44)}


def texture(shape, seed=0, blur=2.0):
    """(1, 1, *S): smooth noise in [0, 1], which shows where every voxel is."""
    noise = np.random.default_rng(seed).normal(size=shape)
    image = ndimage.gaussian_filter(noise, blur)
    image = (image - image.min()) / (image.max() - image.min())
    return torch.from_numpy(image).float()[None, None]


def smooth_map(shape, length=2.5, wave=8.0, seed=1):
    """(1, d, *S), voxels: a known map without folds, `length` voxels root mean square."""
    rng = np.random.default_rng(seed)
    velocity = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), wave) for _ in shape])
    velocity *= length / np.sqrt((velocity**2).sum(0).mean())
    return integrate(torch.from_numpy(velocity).float()[None])


def error(disp, truth, edge=8):
    """Mean distance in voxels, away from the border, where something comes in from outside."""
    inside = (0, slice(None), *[slice(edge, -edge)] * (disp.ndim - 2))
    return float((disp - truth)[inside].square().sum(0).sqrt().mean())


@pytest.fixture(scope="module", params=KINDS, ids=["2D", "3D"])
def known(request):
    shape = KINDS[request.param]
    moving, truth = texture(shape), smooth_map(shape, length=1.25 * len(shape))
    return moving, warp(moving, truth, padding="border"), truth


# what it finds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["lncc", "mse", "mind", "mutual_information"])
def test_a_known_map_is_found(known, similarity):
    moving, fixed, truth = known
    before = error(torch.zeros_like(truth), truth)
    found = classical.greedy(moving, fixed, similarity=similarity, effort="best")
    assert before > 2
    # half a voxel where intensities are followed; the other two see less sharply
    assert error(found.disp, truth) < (0.3 if similarity in ("lncc", "mse") else 0.6) * before
    assert metrics.folding_percent(found.disp) == 0


@pytest.mark.parametrize("seed", [0, 5, 6])
@pytest.mark.parametrize("shape", KINDS.values(), ids=["2D", "3D"])
def test_more_effort_is_closer(shape, seed):
    moving, truth = texture(shape, seed), smooth_map(shape, 1.25 * len(shape), seed=seed + 1)
    fixed = warp(moving, truth, padding="border")
    fast, default, best = (
        error(classical.greedy(moving, fixed, effort=effort).disp, truth)
        for effort in ("fast", "default", "best")
    )
    assert best < default < fast


def test_brightness_and_contrast_do_not_matter_to_lncc(known):
    moving, fixed, _ = known
    plain = classical.greedy(moving, fixed, effort="fast").disp
    other = classical.greedy(-300 * moving + 40, 7 * fixed - 1000, effort="fast").disp
    assert torch.allclose(plain, other, atol=0.02)


def test_an_inverted_contrast_is_found_by_mind(known):
    moving, fixed, truth = known
    inverted = fixed.clone()
    half = (..., slice(fixed.shape[-1] // 2, None))
    inverted[half] = 1 - inverted[half]  # bright is dark in one half, and not in the other
    found = classical.greedy(moving, inverted, similarity="mind", effort="best")
    assert error(found.disp, truth) < 0.6 * error(torch.zeros_like(truth), truth)


def test_the_map_of_equal_images_is_none(known):
    moving, _, _ = known
    found = classical.greedy(moving, moving)
    assert found.disp.abs().max() < 0.05


def test_it_starts_where_it_is_told(known):
    moving, fixed, truth = known
    assert torch.equal(classical.greedy(moving, fixed, truth, steps=0).disp, truth)
    near, zero = (classical.greedy(moving, fixed, start, steps=2) for start in (truth, None))
    assert error(near.disp, truth) < error(zero.disp, truth)
    assert near.values[0][1] < zero.values[0][1]


def test_a_step_comes_before_the_map():
    """From a start that turns by 40 degrees, the rest of the way is turned as well."""
    moving, shape = texture((64, 64)), (64, 64)
    angle = torch.tensor(40.0).deg2rad()
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(1, 2, 2)
    start = affine_to_disp(torch.cat([turn, torch.zeros(1, 2, 1)], dim=2), shape)
    step = torch.zeros(1, 2, *shape)
    step[:, 0] = 1.5
    truth = compose(start, step)
    fixed = warp(moving, truth, padding="border")
    found = classical.greedy(moving, fixed, start, steps=30).disp
    assert error(found, truth, edge=16) < 0.1


def test_values_are_those_of_the_loss(known):
    moving, fixed, truth = known
    for similarity, loss in (
        ("mse", losses.mse),
        ("mutual_information", losses.mutual_information),
    ):
        value = classical.disagreement(moving, fixed, truth, similarity)
        assert value == pytest.approx(float(loss(warp(moving, truth, padding="border"), fixed)))


def test_the_values_fall_on_every_level(known):
    moving, fixed, _ = known
    values = classical.greedy(moving, fixed, effort="best").values
    for grid in {grid for grid, _ in values}:
        level = [value for shape, value in values if shape == grid]
        assert min(level[1:]) < level[0]


@pytest.mark.slow
def test_population_in_two_dimensions():
    """Beside the true map of subjects that differ in contrast, shading and noise."""
    moving, fixed = data.population(2, (160, 192), seed=5)
    truth = data.true_displacement(moving, fixed)
    brain = fixed.labels[None] > 0
    found = classical.greedy(moving.image[None], fixed.image[None], spacing=fixed.grid.spacing)
    none = metrics.endpoint_error(torch.zeros_like(truth), truth, brain)
    assert metrics.endpoint_error(found.disp, truth, brain) < 0.4 * none
    overlap = [
        metrics.dice(x, fixed.labels[None]).nanmean()
        for x in (moving.labels[None], warp(moving.labels[None], found.disp, "nearest"))
    ]
    assert overlap[1] > overlap[0] + 0.15
    assert metrics.folding_percent(found.disp) <= 0.01


# symmetric ----------------------------------------------------------------------------------------


def test_symmetric_gives_both_directions(known):
    moving, fixed, truth = known
    found = classical.greedy(moving, fixed, symmetric=True)
    assert error(found.disp, truth) < 0.4 * error(torch.zeros_like(truth), truth)
    assert error(compose(found.disp, found.inverse), torch.zeros_like(truth)) < 0.1
    assert error(warp_back(found.inverse, truth), torch.zeros_like(truth)) < 1


def warp_back(inverse, truth):
    """0 where `inverse` undoes `truth`."""
    return compose(truth, inverse)


def test_symmetric_prefers_neither(known):
    moving, fixed, _ = known
    there = classical.greedy(moving, fixed, symmetric=True)
    back = classical.greedy(fixed, moving, symmetric=True)
    assert torch.allclose(there.disp, back.inverse, atol=1e-2)


# millimetres, masks -------------------------------------------------------------------------------


def test_thick_slices_do_not_move_as_far_as_they_are_thick():
    """Slices 5 mm apart: noise between them must not pull by whole slices."""
    shape, spacing = (64, 64, 8), (1.0, 1.0, 5.0)
    moving = texture((64, 64, 40))[..., ::5].contiguous()
    shift = torch.zeros(1, 3, *shape)
    shift[:, 0] = 2.0
    fixed = warp(moving, shift, padding="border")
    found = classical.greedy(moving, fixed, spacing=spacing)
    inside = (0, slice(None), slice(10, -10), slice(10, -10), slice(1, -1))
    along, across, through = found.disp[inside].abs().flatten(1).mean(1)
    assert along == pytest.approx(2, abs=0.3)
    assert across < 0.2 and through * 5 < 0.5  # mm


def test_one_pair_has_one_map_in_millimetres_however_wide_its_voxels_are():
    """A step from 1 mm voxels and one from voxels that are 4 mm long along one axis."""
    found = []
    for shape, spacing in (((97, 97), (1.0, 1.0)), ((97, 25), (1.0, 4.0))):
        y, x = torch.meshgrid(
            *[(torch.arange(n) - (n - 1) / 2) * h for n, h in zip(shape, spacing, strict=True)],
            indexing="ij",
        )
        moving, fixed = (
            torch.exp(-((y - a) ** 2 + (x - b) ** 2) / 72)[None, None]
            for a, b in ((0, 0), (3, 2))  # mm
        )
        disp = classical.greedy(moving, fixed, spacing=spacing, similarity="mse", steps=1).disp
        found.append(disp * torch.tensor(spacing)[None, :, None, None])
    fine, coarse = found[0][..., ::4], found[1]
    assert float((coarse - fine).norm() / fine.norm()) < 0.05


def test_levels_have_one_width_in_millimetres():
    values = classical.greedy(
        texture((64, 64, 8)), texture((64, 64, 8), 1), spacing=(1, 1, 4)
    ).values
    grids = list(dict.fromkeys(grid for grid, _ in values))
    assert grids == [(17, 17, 8), (33, 33, 8), (64, 64, 8)]


def test_what_a_mask_leaves_out_does_not_count(known):
    moving, fixed, truth = known
    spoilt, mask = fixed.clone(), torch.ones_like(fixed)
    hole = (..., *[slice(n // 3, n // 2) for n in fixed.shape[2:]])
    spoilt[hole], mask[hole] = texture(fixed.shape[2:], 9)[hole], 0
    with_mask = classical.greedy(moving, spoilt, mask=mask).disp
    without = classical.greedy(moving, spoilt).disp
    near = (0, slice(None), *[slice(n // 3 - 3, n // 2 + 3) for n in fixed.shape[2:]])

    def off(disp):
        return float((disp - truth)[near].square().sum(0).sqrt().mean())

    assert off(with_mask) < 0.4 * off(torch.zeros_like(truth)) and off(with_mask) < off(without)


def test_the_moving_mask_moves_along(known):
    """Half of the moving image is spoilt; its mask says so, wherever that half comes to lie."""
    moving, fixed, truth = known
    spoilt, mask = moving.clone(), torch.ones_like(moving)
    half = (..., slice(moving.shape[-1] // 2, None))
    spoilt[half], mask[half] = texture(moving.shape[2:], 9)[half], 0
    kept = (0, slice(None), ..., slice(8, moving.shape[-1] // 2 - 8))
    found = classical.greedy(spoilt, fixed, moving_mask=mask).disp
    assert float((found - truth)[kept].square().sum(0).sqrt().mean()) < 1


# what it refuses ----------------------------------------------------------------------------------

A, B = texture((32, 32)), texture((32, 32), 1)
WRONG = {
    "start of another grid": (
        {"start": torch.zeros(1, 2, 16, 16)},
        "start has shape (1, 2, 16",
    ),
    "start of another kind": (
        {"start": torch.zeros(1, 3, 32, 32)},
        "start has shape (1, 3, 32",
    ),
    "similarity": ({"similarity": "ncd"}, "similarity is 'ncd', expected one of lncc, mse"),
    "effort": ({"effort": "bst"}, "did you mean 'best'"),
    "steps": ({"steps": -1}, "steps is -1"),
    "spacing": ({"spacing": (1.0, 0.0)}, "spacing is (1.0, 0.0)"),
    "mask of another grid": ({"mask": torch.ones(1, 1, 8, 8)}, "mask has shape (1, 1, 8, 8)"),
    "empty mask": ({"mask": torch.zeros(1, 1, 32, 32)}, "The mask is empty"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    arguments, sentence = WRONG[wrong]
    with pytest.raises(ValueError, match=re.escape(sentence)) as raised:
        classical.greedy(A, B, **arguments)
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


def test_masks_without_overlap():
    left, right = torch.zeros(2, 1, 1, 32, 32)
    left[..., :10], right[..., 20:] = 1, 1
    with pytest.raises(ValueError, match="have no voxel in common"):
        classical.greedy(A, B, mask=left, moving_mask=right)


@pytest.mark.parametrize("constant", ["moving", "fixed"])
def test_a_constant_image(constant):
    images = {"moving": A, "fixed": B, constant: torch.full_like(A, 3)}
    with pytest.raises(ValueError, match=f"{constant} is constant"):
        classical.greedy(images["moving"], images["fixed"])


@pytest.mark.parametrize("shape", [(2, 2), (3, 40), (1, 30), (2, 3, 2), (40, 40, 1), (1, 1, 9)])
def test_a_few_voxels(shape):
    moving, fixed = (
        torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(k)) for k in (0, 1)
    )
    for similarity in classical.DISSIMILARITIES:
        found = classical.greedy(moving, fixed, similarity=similarity)
        assert found.disp.shape == (1, len(shape), *shape)
        assert found.disp.isfinite().all()


def test_huge_motion_and_nothing_alike_stay_finite_and_unfolded():
    far = warp(A, affine_to_disp(torch.tensor([[[1.0, 0, 20], [0, 1, 0]]]), (32, 32)))
    for other in (far, B):
        found = classical.greedy(A, other)
        assert found.disp.isfinite().all()
        assert metrics.folding_percent(found.disp) <= 0.01


def test_it_runs_in_inference_mode_and_leaves_its_arguments_alone():
    with torch.inference_mode():
        moving, fixed = A.clone(), B.clone()
        found = classical.greedy(moving, fixed, effort="fast")
    assert torch.equal(moving, A) and torch.equal(fixed, B)
    assert torch.equal(found.disp, classical.greedy(A, B, effort="fast").disp)


def test_progress_ends_at_one_or_before_and_has_the_value():
    seen = []
    found = classical.greedy(A, B, progress=lambda done, value: seen.append((done, value)))
    done = [fraction for fraction, _ in seen]
    assert done == sorted(done) and 0 < done[0] and done[-1] <= 1
    assert [value for _, value in seen] == [value for _, value in found.values]


def test_it_says_what_to_expect():
    seconds, memory = classical.expected(torch.zeros(1, 1, 160, 192, 160), effort="default")
    more, twice = classical.expected(
        torch.zeros(1, 1, 160, 192, 160), effort="best", symmetric=True
    )
    assert 0.1 < seconds < more
    assert memory == 25 * 4 * 160 * 192 * 160 and twice == 2 * memory


@pytest.mark.parametrize("shape", [(40, 36), (28, 24, 20)])
def test_a_fold_is_smoothed_away_and_the_rest_of_the_map_stays(shape):
    smooth = torch.rand(1, len(shape), *shape, generator=torch.Generator().manual_seed(0)) / 4
    folded = smooth.clone()
    folded[0, 0, 8, 8] += 3.0
    assert metrics.folding_count(smooth) == 0 < metrics.folding_count(folded)
    found = _unfolded(folded)
    assert metrics.folding_count(found) == 0
    torch.testing.assert_close(found[:, :, 20:], smooth[:, :, 20:])
    assert torch.equal(_unfolded(smooth), smooth)


@pytest.mark.slow
@pytest.mark.real
def test_two_contrasts_of_a_slab_are_not_led_out_of_it(sample):
    """Perfusion and T1 of one head, which lie on each other: eight slices, 1 mm apart."""
    sample("ptbp_brain")
    scans = data.samples.load_ptbp_modalities()
    inside = scans["t1"].labels > 0
    moving, fixed = scans["cbf"].image[None], scans["t1"].image[None]
    for similarity in ("mind", "mutual_information"):
        found = classical.greedy(moving, fixed, similarity=similarity, effort="fast")
        through = found.disp[:, 2][inside].abs().mean()
        assert through < 4  # mm; once 10, with a coarsest level of 12 x 15 x 4 voxels
