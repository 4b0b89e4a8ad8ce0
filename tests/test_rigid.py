"""Rigid and affine networks: their motion, their data, their training, and `register` with them."""

import math
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch

import regkit
from regkit import io, losses, metrics, models
from regkit.data import LABELS, RigidPairs, centre_crop, heads, moved_heads, population
from regkit.data.samples import load_brainweb
from regkit.models import Registration
from regkit.models.resnet import SCALE
from regkit.spatial import affine_to_disp, identity_grid, rigid_theta, warp, warp_points
from regkit.training import loop, objective, recipes
from regkit.training.evaluation import motion_errors
from regkit.transform import resample

SHAPE = (64, 64)
KINDS = [(kind, ndim) for kind in ("rigid", "affine") for ndim in (2, 3)]


def network(kind, ndim, numbers, **options):
    """A network that gives these numbers for every pair."""
    model = models.create(f"{kind}_resnet34", ndim, width=8, **options).eval()
    with torch.no_grad():
        model.numbers.bias.copy_(torch.tensor(numbers) / SCALE)
    return model


def answer(model, shape):
    image = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(image, image)


# the motion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "ndim"), KINDS)
def test_an_untrained_network_answers_with_exactly_the_identity(kind, ndim):
    result = answer(models.create(f"{kind}_resnet34", ndim, width=8), (24, 40, 16)[:ndim])
    assert result.theta.equal(torch.eye(ndim, ndim + 1)[None])
    assert not result.disp.any()


def test_three_numbers_are_an_angle_in_radians_and_two_shifts_in_half_images():
    result = answer(network("rigid", 2, [0.3, 0.1, -0.2]), (40, 60))
    expected = rigid_theta(torch.tensor([[0.3]]), torch.tensor([[3.0, -6.0]]))
    torch.testing.assert_close(result.theta, expected)
    torch.testing.assert_close(result.disp, affine_to_disp(expected, (40, 60)))


def test_a_shift_counts_in_half_images_in_millimetres_on_any_voxels():
    """Half of the longer side is 30 mm: 3 mm and -6 mm, in voxels of 2 mm and 1 mm."""
    result = answer(network("rigid", 2, [0.0, 0.1, -0.2], spacing=(2.0, 1.0)), (20, 60))
    torch.testing.assert_close(result.theta[0, :, -1], torch.tensor([1.5, -6.0]))


def test_six_numbers_are_three_angles_and_three_shifts():
    result = answer(network("rigid", 3, [0.1, 0.2, 0.3, 0.5, 0.0, 0.0]), (16, 20, 24))
    expected = rigid_theta(torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[6.0, 0.0, 0.0]]))
    torch.testing.assert_close(result.theta, expected)


@pytest.mark.parametrize("ndim", [2, 3])
def test_affine_numbers_are_a_matrix_beside_the_identity_and_a_shift(ndim):
    numbers = torch.linspace(-0.2, 0.2, ndim**2 + ndim)
    theta = answer(network("affine", ndim, numbers.tolist()), (20,) * ndim).theta[0]
    torch.testing.assert_close(theta[:, :-1] - torch.eye(ndim), numbers[: ndim**2].view(ndim, ndim))
    torch.testing.assert_close(theta[:, -1], 10 * numbers[ndim**2 :])


@pytest.mark.parametrize("spacing", [(1.0, 2.5), (0.8, 1.2, 3.0)])
def test_a_rigid_motion_keeps_lengths_in_millimetres_on_any_voxels(spacing):
    ndim = len(spacing)
    numbers = [0.4, -0.2, 0.1, 0.1, 0.2, 0.0][: 3 if ndim == 2 else 6]
    shape = (12, 30, 16)[:ndim]
    model = network("rigid", ndim, numbers, spacing=spacing)
    points = (identity_grid(shape) + answer(model, shape).disp[0]).flatten(1)
    size = torch.tensor(spacing)[:, None]
    before = torch.pdist((identity_grid(shape).flatten(1) * size).T[::37])
    torch.testing.assert_close(torch.pdist((points * size).T[::37]), before, rtol=1e-4, atol=1e-3)
    # and blind to it, it would shear
    blind = network("rigid", ndim, numbers)
    points = (identity_grid(shape) + answer(blind, shape).disp[0]).flatten(1)
    assert (torch.pdist((points * size).T[::37]) - before).abs().max() > 0.5


def test_the_network_may_look_at_a_smaller_image_and_moves_the_whole_one():
    torch.manual_seed(0)
    whole, half = (models.create("rigid_resnet34", 2, width=8, reduce=r).eval() for r in (1, 2))
    half.load_state_dict(whole.state_dict())
    for model in (whole, half):
        torch.nn.init.normal_(model.numbers.weight, std=0.05, generator=torch.manual_seed(1))
    image = torch.rand(1, 2, 48, 64)
    pair = image[:, :1], image[:, 1:]
    small = torch.nn.functional.avg_pool2d(image, 2)
    with torch.no_grad():
        seen = whole(small[:, :1], small[:, 1:]).theta
        full = half(*pair).theta
    torch.testing.assert_close(full[..., :2], seen[..., :2])
    torch.testing.assert_close(full[..., 2], 2 * seen[..., 2])
    with pytest.raises(ValueError, match="reduce is 0, expected 1 or more"):
        models.create("rigid_resnet34", 2, reduce=0)


# the data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(200, 200), (64, 64), (48, 40, 48)])
def test_heads_have_cubic_voxels_and_fit_in(shape):
    subject = heads(1, shape)[0]
    assert subject.image.shape == subject.labels.shape == (1, *shape)
    assert max(subject.spacing) == pytest.approx(min(subject.spacing))
    labels = subject.labels[0]
    if shape[0] == shape[1]:  # nothing is cut off
        assert not (labels[0].any() or labels[-1].any() or labels[:, 0].any())
    assert set(labels.unique().tolist()) <= {0, *LABELS}


def test_a_crop_keeps_the_place_in_space():
    subject = population(1, (48, 64))[0]
    crop = centre_crop(subject, (61, 70))
    where = np.argwhere(crop.labels[0].numpy() == 1).mean(0)
    expected = np.argwhere(subject.labels[0].numpy() == 1).mean(0)
    for found, affine in ((where, crop.affine), (expected, subject.affine)):
        found[:] = (affine @ [*found, 0, 1])[:2]
    np.testing.assert_allclose(where, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(120, 120), (60, 70, 60)])
@pytest.mark.parametrize("contrasts", [("t1",), ("t1", "t2", "flair")])
def test_the_truth_undoes_the_motion(shape, contrasts):
    pairs = moved_heads(2, shape, 0, 6, contrasts=contrasts, angle=20.0, shift=8.0, noise=0.0)
    for index in range(6):
        pair = pairs.pair(index)
        assert pair.moving.name == pair.fixed.name
        back = warp(pair.moving.labels[None], affine_to_disp(pair.theta, shape), mode="nearest")
        before, after = (
            metrics.dice(x, pair.fixed.labels[None]).nanmean()
            for x in (pair.moving.labels[None], back)
        )
        assert after > 0.85 and after > before + 0.2


def test_a_pair_brings_its_answer_as_displacement():
    pairs = moved_heads(2, SHAPE, 0, 3)
    for index in range(3):
        expected = affine_to_disp(pairs.pair(index).theta, SHAPE)[0]
        torch.testing.assert_close(pairs[index]["disp"], expected)


def test_both_images_of_a_pair_lie_alike_and_the_truth_still_undoes_the_motion():
    shape = (120, 120)
    motion = {"contrasts": ("t1", "t2"), "angle": 20.0, "shift": 8.0, "noise": 0.0}
    plain = moved_heads(1, shape, 0, 12, **motion)
    posed = moved_heads(1, shape, 0, 12, **motion, tilt=40.0, size=0.25)
    head = plain.subjects[0][0].labels
    sizes, turns = [], []
    for index in range(12):
        pair = posed.pair(index)
        assert pair.moving.image.equal(posed[index]["moving"])
        theta = affine_to_disp(pair.theta, shape)
        back = warp(pair.moving.labels[None], theta, mode="nearest")
        assert metrics.dice(back, pair.fixed.labels[None]).nanmean() > 0.8
        torch.testing.assert_close(pair.theta, plain.pair(index).theta)  # the motion is the same
        sizes.append(float((pair.fixed.labels > 0).sum() / (head > 0).sum()) ** 0.5)
        turns.append(axis_of(pair.fixed.labels[0]) - axis_of(head[0]))
    assert 0.75 < min(sizes) < 0.9 < 1.1 < max(sizes) < 1.3
    assert -41 < min(turns) < -15 < 15 < max(turns) < 41
    with pytest.raises(ValueError, match="tilt is 9.0 and size 0.0 for images in 3D, expected 0"):
        moved_heads(1, (32, 32, 32), 0, 1, tilt=9.0)


def axis_of(labels):
    """Degrees from left to right white matter."""
    left, right = (np.argwhere(labels.numpy() == which).mean(0) for which in (1, 2))
    return math.degrees(math.atan2(*(right - left)[::-1]))


def test_every_second_head_gets_a_scalp_of_one_thickness_in_all_contrasts():
    bare, clad = (heads(4, (100, 100), scalp=scalp) for scalp in (False, True))
    other = heads(4, (100, 100), contrast="t2", scalp=True)
    for index in range(4):
        outside = bare[index].labels == 0
        assert clad[index].labels.equal(bare[index].labels)
        if index % 2 == 0:
            assert clad[index].image.equal(bare[index].image)
            continue
        ring = (clad[index].image > 0.25) & outside
        assert ring.sum() > 200 and not torch.equal(ring, outside)
        brain = ~outside
        apart = (clad[index].image - bare[index].image)[brain].abs().mean()
        assert apart < 0.05  # the brain stays as it was, a little blurred
        overlap = ring & (other[index].image > 0.25)
        assert overlap.sum() > 0.7 * ring.sum()


def test_a_pair_depends_on_seed_and_index_alone_and_stays_in_range():
    a, b = (moved_heads(3, SHAPE, 0, n, draw=4) for n in (5, 50))
    other = moved_heads(3, SHAPE, 0, 5, draw=5)
    for index in range(5):
        assert a[index]["moving"].equal(b[index]["moving"])
        assert not a[index]["moving"].equal(other[index]["moving"])
        assert a[index]["moving"].equal(a.pair(index).moving.image)
    thetas = torch.cat([b.pair(i).theta for i in range(50)])
    angles = metrics.rotation_error(thetas, torch.eye(2, 3).expand(50, 2, 3))
    assert 4 < angles.max() <= 5.0001
    millimetres = thetas[:, :, 2].norm(dim=1) * a.subjects[0][0].spacing[0]
    assert 3 < millimetres.max() <= 5 * math.sqrt(2) + 1e-4


def test_two_images_of_a_pair_share_no_noise():
    """With the same noise in both, a similarity could lock onto it."""
    pairs = moved_heads(1, SHAPE, 0, 1, angle=0.0, shift=0.0, noise=0.05)
    quiet = moved_heads(1, SHAPE, 0, 1, angle=0.0, shift=0.0, noise=0.0)
    inside = (quiet[0]["fixed"] > 0.2) & (quiet[0]["fixed"] < 0.8)
    noise = [(pairs[0][k] - quiet[0][k])[inside] for k in ("moving", "fixed")]
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.1
    assert float(noise[0].std()) == pytest.approx(0.05, rel=0.1)


def test_different_contrasts_are_different_images_of_one_head():
    pairs = moved_heads(1, SHAPE, 0, 12, contrasts=("t1", "t2"), angle=0.0, shift=0.0, noise=0.0)
    for index in range(12):
        pair = pairs.pair(index)
        assert pair.moving.labels.equal(pair.fixed.labels)
        assert losses.ncc(pair.moving.image[None], pair.fixed.image[None]) > 0.3


def test_pairs_within_a_contrast_are_of_each_in_turn():
    motion = {"contrasts": ("t1", "t2", "flair"), "angle": 0.0, "shift": 0.0, "noise": 0.0}
    within = moved_heads(1, SHAPE, 0, 30, **motion, across=False)
    between = moved_heads(1, SHAPE, 0, 30, **motion)
    originals = [group[0].image for group in within.subjects]
    seen = []
    for index in range(30):
        moving, fixed = within[index]["moving"], within[index]["fixed"]
        torch.testing.assert_close(moving, fixed, atol=1e-5, rtol=0)
        seen.append([torch.equal(fixed, image) for image in originals].index(True))
        assert not torch.allclose(between[index]["moving"], between[index]["fixed"], atol=0.1)
    assert all(5 <= seen.count(contrast) <= 15 for contrast in range(3))


@pytest.mark.parametrize("groups", [[], [[]], [[1], [1, 2]]])
def test_lists_of_heads_that_do_not_fit(groups):
    with pytest.raises(ValueError, match="subjects has lists of .* expected one list per contrast"):
        RigidPairs(groups, 1)


# training and measuring ---------------------------------------------------------------------------


@pytest.mark.slow
def test_training_finds_the_motion():
    motion = {"angle": 5.0, "shift": 30.0, "contrasts": ("t1",)}
    recipe = recipes.get(
        "rigid_resnet34_2d", "smoke", shape=SHAPE, subjects=6, validation=8, batch=8, steps=200,
        validate_every=200, warmup=10, options={"width": 8}, motion=motion,
    )  # fmt: skip
    trained = loop.train(recipe, progress=False)
    held_out = moved_heads(8, SHAPE, 1, 8, **motion)
    still = motion_errors(
        lambda a, b: Registration(a, a, theta=torch.eye(2, 3).expand(len(a), 2, 3)),
        [held_out.pair(i) for i in range(8)],
    )
    last = trained.history[-1]
    assert last["translation_error"] < 0.5 * still["translation_error"]
    assert trained.model.info["motion"] == [5.0, 30.0]


@pytest.mark.slow
def test_training_may_use_the_known_answer():
    motion = {"angle": 5.0, "shift": 30.0, "contrasts": ("t1", "t2")}
    recipe = recipes.get(
        "rigid_resnet34_2d", "smoke", shape=SHAPE, subjects=6, validation=8, batch=8, steps=120,
        validate_every=120, warmup=10, options={"width": 8}, motion=motion,
        weights={"endpoint": 1.0}, lr=3e-3,
    )  # fmt: skip
    history = loop.train(recipe, progress=False).history
    assert set(history[0]) == {"step", "endpoint", "loss"}
    first, last = (np.mean([e["endpoint"] for e in part]) for part in (history[:10], history[-10:]))
    assert last < 0.6 * first
    pairs = moved_heads(2, SHAPE, 0, 4)
    items = [pairs[i] for i in range(4)]
    batch = {k: torch.stack([item[k] for item in items]) for k in ("moving", "fixed", "disp")}
    still = Registration(batch["moving"], torch.zeros_like(batch["disp"]))
    # the mean length of the displacement, and no mean of squares
    expected = batch["disp"].square().sum(1).sqrt().mean()
    torch.testing.assert_close(objective.objective(still, batch, recipe)["endpoint"], expected)
    del batch["disp"]
    with pytest.raises(ValueError, match="weights names 'endpoint', expected pairs whose answer"):
        objective.objective(still, batch, recipe)


def test_errors_of_the_truth_of_doing_nothing_and_of_half_a_motion():
    pairs = [moved_heads(4, SHAPE, 0, 6).pair(i) for i in range(6)]
    truth = torch.cat([pair.theta for pair in pairs])

    def method(theta):
        return lambda moving, fixed: Registration(moving, moving, theta=theta)

    perfect = motion_errors(method(truth), pairs)
    assert perfect["success"] == 100
    assert max(perfect["rotation_error_mean"], perfect["translation_error_mean"]) < 1e-5
    still = motion_errors(method(torch.eye(2, 3).expand(6, 2, 3)), pairs)
    turns = torch.atan2(truth[:, 1, 0], truth[:, 0, 0]).rad2deg().abs()
    assert still["rotation_error_mean"] == pytest.approx(float(turns.mean()), abs=1e-4)
    shifts = truth[:, :, 2].norm(dim=1)
    assert still["translation_error"] == pytest.approx(float(shifts.median()), abs=1e-4)
    with pytest.raises(ValueError, match="gave no theta"):
        motion_errors(lambda a, b: Registration(a, a), pairs)


# register -----------------------------------------------------------------------------------------


def saved(tmp_path, numbers, **info):
    """A weights file whose network turns and shifts every image the same way."""
    path = tmp_path / "rigid.safetensors"
    model = network("rigid", 2, numbers)
    info = {"spacing": [1.0, 1.0], "orientation": "RAS", "range": [0, 1], **info}
    models.save(model, path, **info)
    return path


def test_register_with_a_rigid_network_gives_its_matrix_and_polishes_it(tmp_path):
    fixed = heads(1, SHAPE, seed=2)[0].image[0]
    truth = rigid_theta(torch.tensor([[0.1]]), torch.tensor([[2.0, -1.0]]))
    inverse = torch.linalg.inv(truth[0, :, :2])
    theta = torch.cat([inverse, -inverse @ truth[0, :, 2:]], 1)[None]
    moving = warp(fixed[None, None], affine_to_disp(truth, SHAPE))[0, 0]
    numbers = [-0.07, -1.5 / 32, 0.6 / 32]
    method = saved(tmp_path, numbers, motion=[30.0, 20.0], recipe={"similarity": "ncc"})
    plain = regkit.register(moving, fixed, method=method)
    expected = rigid_theta(torch.tensor([[-0.07]]), torch.tensor([[-1.5, 0.6]]))
    torch.testing.assert_close(plain.theta, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.disp, affine_to_disp(expected, SHAPE), atol=1e-3, rtol=0)
    assert plain.metrics["affine"] == "none" and not plain.warnings
    polished = regkit.register(moving, fixed, method=method, refine=10)
    assert metrics.rotation_error(polished.theta, theta) < 0.3
    assert metrics.translation_error(polished.theta, theta) < 0.1
    assert metrics.folding_count(polished.disp) == 0


@pytest.mark.parametrize("shape", [(64, 64), (96, 120), (50, 80)])
def test_a_file_is_looked_at_through_the_field_of_view_of_the_training(tmp_path, shape):
    """A shift counts in half images: of those that the network has learned on."""
    image = nibabel.Nifti1Image(np.random.default_rng(0).random(shape, np.float32), np.eye(4))
    method = saved(tmp_path, [0.0, 0.1, -0.05], spacing=[1.0, 1.0], recipe={"shape": list(SHAPE)})
    theta = regkit.register(image, image, method=method).theta
    torch.testing.assert_close(theta[0, :, 2], torch.tensor([3.2, -1.6]), atol=1e-4, rtol=0)


def test_an_answer_beyond_what_was_trained_is_said(tmp_path):
    image = heads(1, SHAPE, seed=2)[0].image[0]
    method = saved(tmp_path, [0.2, 0.0, 0.0], motion=[5.0, 5.0])
    warnings = regkit.register(image, image, method=method).warnings
    assert any("11.5 degrees and 0.0 mm, lies outside what the network was" in w for w in warnings)


@pytest.mark.slow
def test_the_classical_twin_solves_what_the_network_was_not_trained_for():
    fixed = heads(1, (100, 100), seed=2)[0].image[0]
    truth = rigid_theta(torch.tensor([[math.radians(50)]]), torch.tensor([[4.0, -9.0]]))
    moving = warp(fixed[None, None], affine_to_disp(truth, (100, 100)))[0, 0]
    found = regkit.register(moving, fixed, method="rigid").theta
    inverse = torch.linalg.inv(truth[0, :, :2])
    theta = torch.cat([inverse, -inverse @ truth[0, :, 2:]], 1)[None]
    assert metrics.rotation_error(found, theta) < 0.3
    assert metrics.translation_error(found, theta) < 0.3


@pytest.mark.parametrize("which", ["moving", "fixed"])
def test_an_empty_image_cannot_be_aligned(which):
    image = heads(1, SHAPE)[0].image[0]
    pair = {"moving": image, "fixed": image, which: torch.zeros(SHAPE)}
    with pytest.raises(ValueError, match=f"{which} is constant, .* correlation is undefined"):
        regkit.register(**pair, method="rigid")


def test_the_noise_of_a_recipe_is_part_of_its_motion():
    recipe = recipes.get("rigid_resnet34_2d", "smoke")
    loud = replace(recipe, motion={**recipe.motion, "noise": 0.3}, steps=1, validate_every=1)
    a, b = (loop.train(r, progress=False).history[0]["similarity"] for r in (recipe, loud))
    assert b > a


# real images --------------------------------------------------------------------------------------

WIDE = {"method": "rigid_resnet34_2d_wide", "refine": 10}
WAYS = [{"method": "rigid"}, WIDE]


def degrees_mm(theta, spacing):
    """The angle of a 2D motion that is rigid in millimetres."""
    size = torch.tensor(spacing, dtype=theta.dtype)
    turn = theta[0, :, :2] * size[:, None] / size
    return math.degrees(math.atan2(turn[1, 0], turn[0, 0]))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("way", WAYS, ids=["twin", "network"])
def test_brainweb_by_the_twin_and_by_network_and_descent(sample, way):
    """Its names say the shift, x to the right and y downwards, and in one case the angle."""
    sample("brainweb_t1_pd_2d")
    scans = load_brainweb()
    shifted = regkit.register(scans["pd_shifted"].nifti(), scans["pd"].nifti(), **way)
    truth = torch.tensor([[[1.0, 0.0, 13.0], [0.0, 1.0, -17.0]]])  # our axis 1 points up
    assert metrics.rotation_error(shifted.theta, truth) < 0.5
    assert metrics.translation_error(shifted.theta, truth) < 0.5
    for fixed in ("pd", "t1"):
        turned = regkit.register(scans["pd_rotated"].nifti(), scans[fixed].nifti(), **way)
        assert abs(abs(degrees_mm(turned.theta, (1.0, 1.0))) - 10) < 0.5


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("way", WAYS, ids=["twin", "network"])
def test_two_visits_by_the_twin_and_by_network_and_descent(sample, way):
    """The published matrix takes RAS millimetres of the baseline to the follow-up scan."""
    folder = sample("longitudinal_t1_2d")
    paths = [folder / f"t1longi_2d_{visit}.nii.gz" for visit in ("fu", "bl")]
    followup, baseline = map(io.read, paths)
    known = np.eye(4)
    known[np.ix_([0, 1, 3], [0, 1, 3])] = np.loadtxt(folder / "t1longi_2d_rigid.mat")
    # the direction is not stated: as it is, it aligns the images
    there, back = (
        losses.ncc(
            resample(followup.data, followup.grid, baseline.grid, matrix=matrix),
            baseline.data,
        )
        for matrix in (known, np.linalg.inv(known))
    )
    assert there < back - 0.3
    result = regkit.register(*paths, **way)
    angle = math.degrees(math.atan2(known[1, 0], known[0, 0]))
    # axes 0 and 1 are -y and x, which lie to each other as x and y do
    assert abs(degrees_mm(result.theta, baseline.spacing) - angle) < 0.5
    mask = io.read(folder / "t1longi_2d_bl_mask.nii.gz", labels=True)
    centre = mask.data[0, 0].nonzero().double().mean(0)
    found = warp_points(centre[None, None].float(), result.disp)[0, 0]
    wanted = known @ baseline.affine @ [*centre, 0, 1]
    assert np.linalg.norm((followup.affine @ [*found, 0, 1] - wanted)[:2]) < 0.5
