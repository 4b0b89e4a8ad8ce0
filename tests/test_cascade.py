"""Cascades against their published sizes, SciPy's interpolation, and what each option promises."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from test_models import pair

from regkit import losses, models, spatial
from regkit.models import Registration, cascade
from regkit.training import recipes, train
from regkit.training.objective import objective

both = pytest.mark.parametrize("ndim", [2, 3])
SMALL = {"channels": 2, "affine_channels": 2}
SHAPE = {2: (24, 31), 3: (12, 15, 10)}


def create(ndim=2, visible=1.0, **options):
    """A small `rcn` whose heads are not zero: each network moves by up to `visible` voxels."""
    torch.manual_seed(2)
    model = models.create("rcn", ndim, **{**SMALL, **options}).eval()
    moving, fixed = pair(SHAPE[ndim])
    with torch.no_grad():
        for network in model.networks:
            head = (
                network.head.weight if hasattr(network.head, "weight") else network.head.conv.weight
            )
            head.normal_(std=1.0)
            head.mul_(visible * len(model.networks) / network(moving, fixed).disp.abs().max())
        if model.stem is not None:
            model.stem.numbers.weight.normal_(std=1.0)
            away = (model.stem(moving, fixed)[0, :, :ndim] - torch.eye(ndim)).abs().max()
            model.stem.numbers.weight.mul_(0.05 / away)
    return model


# --- the networks --------------------------------------------------------------------------------


def encoder_count(ndim):
    k, c = 3**ndim, [2, 16, 32, 64, 128, 256, 512]
    halving = sum(a * b * k + b for a, b in zip(c, c[1:]))
    return halving + sum(b * b * k + b for b in c[3:])


def vtn_count(ndim):
    """Layer by layer: predictions with a bias; doublings, by kernels of 4, without."""
    total, c = encoder_count(ndim), 512
    for skip in (256, 128, 64, 32, 16):
        total += c * ndim * 3**ndim + ndim  # the prediction
        total += ndim * ndim * 4**ndim + c * skip * 4**ndim  # it and the features, doubled
        c = 2 * skip + ndim
    return total + c * ndim * 4**ndim


def test_parameter_counts_are_those_of_the_published_networks():
    """3D: counted from the published code; 2D: the same layers."""
    size = (128, 128, 128)
    published = models.create("rcn", 3, cascades=1, affine_size=size)
    assert models.parameter_count(published.networks[0]) == 28_252_203 == vtn_count(3)
    assert models.parameter_count(published.stem) == 14_166_288 == encoder_count(3) + 512 * 8 * 12
    flat = models.create("rcn", 2)
    assert models.parameter_count(flat.networks[0]) == vtn_count(2)
    assert models.parameter_count(flat.stem) == encoder_count(2) + 512 * 4 * 6
    totals = {
        "vtn": (28_252_203, vtn_count(2)),
        "affine stem": (14_166_288, models.parameter_count(flat.stem)),
        "vtn, ": (14_166_288 + 3 * 28_252_203, models.parameter_count(flat)),
    }
    text = " ".join(cascade.__doc__.split())
    for name, (three, two) in totals.items():
        assert f"{name} {three:,} / {two:,}".replace(",  ", ", ") in text


def test_at_128_the_default_head_is_the_published_one():
    """The last map has 2 voxels along each axis there, so that averaging changes nothing."""
    default = models.create("rcn", 2, **SMALL, cascades=1)
    published = models.create("rcn", 2, **SMALL, cascades=1, affine_size=(128, 128))
    with torch.no_grad():
        default.stem.numbers.weight.normal_(std=0.1)
    published.load_state_dict(default.state_dict())
    with torch.no_grad():
        found = [model.stem(*pair((128, 128))) for model in (default, published)]
    assert torch.equal(*found) and (found[0][0, :, :2] - torch.eye(2)).abs().max() > 1e-3
    # elsewhere the published one has another number of weights
    other = cascade.AffineStem(3, channels=2, size=(160, 192, 65))
    assert other.numbers.weight.shape == (12, 64 * 3 * 3 * 2)


@both
@pytest.mark.parametrize("base", ["vtn", "vxm", "vxm2", "affine_resnet34"])
def test_fresh_heads_are_the_identity(base, ndim):
    options = {"vtn": {"channels": 2}, "affine_resnet34": {"width": 8}}.get(base, {})
    model = models.create("rcn", ndim, cascades=2, base=base, affine_channels=2, **options)
    moving, fixed = pair(SHAPE[ndim], batch=2)
    with torch.no_grad():
        result = model(moving, fixed)
    exact = base in ("vtn", "affine_resnet34")
    assert result.disp.abs().max() <= (0 if exact else 1e-3)
    assert torch.equal(result.theta, torch.eye(ndim, ndim + 1).expand(2, ndim, ndim + 1))
    assert len(result.stages) == len(result.steps) == 2


def test_the_first_weights_keep_the_variance():
    """Uniform in +- sqrt(3 / fan-in), as the published code draws them; biases 0."""
    torch.manual_seed(0)
    model = models.create("vtn", 2)
    conv = model.encoder.levels[4][1].conv
    limit = math.sqrt(3 / (256 * 9))
    assert 0.999 * limit < conv.weight.abs().max() <= limit
    assert conv.bias.abs().max() == 0
    limit = math.sqrt(3 / (256 * 16))  # of a doubling the published code counts the outputs
    assert 0.999 * limit < model.up[0].features.weight.abs().max() <= limit


@both
def test_vtn_gives_20_voxels_per_unit_and_each_size_its_own_grid(ndim):
    model = models.create("vtn", ndim, channels=2).eval()
    with torch.no_grad():
        model.head.weight.normal_(std=0.1)
        seen = {}
        model.head.register_forward_hook(lambda *call: seen.update(last=call[2]))
        for shape in [(33, 1, 17)[:ndim], (16, 7, 5)[:ndim]]:
            disp = model(*pair(shape)).disp
            assert disp.shape == (1, ndim, *shape)
            kept = seen["last"][(..., *[slice(n) for n in shape])]
            assert torch.equal(disp, 20 * kept)
            assert all(s in (n, n + 1) for s, n in zip(seen["last"].shape[2:], shape))


# --- the affine stem ---------------------------------------------------------------------------


@both
def test_the_stem_gives_the_map_that_its_head_says(ndim):
    """Weights w f / |f|^2 on the features f give the numbers w: W row by row, then the shift."""
    model = create(ndim, cascades=1)
    moving, fixed = pair(SHAPE[ndim])
    seen = {}
    model.stem.numbers.register_forward_hook(lambda *call: seen.update(features=call[1][0]))
    wanted = 0.1 * torch.randn(ndim * (ndim + 1))
    with torch.no_grad():
        model.stem(moving, fixed)
        f = seen["features"][0]
        model.stem.numbers.weight.copy_(wanted[:, None] * f / f.square().sum())
        model.networks[0].head.weight.zero_()
        result = model(moving, fixed)
    linear = np.eye(ndim) + wanted[: ndim**2].reshape(ndim, ndim).double().numpy()
    shift = wanted[ndim**2 :].double().numpy() * np.array(SHAPE[ndim]) / 2  # half images
    theta = result.theta[0].double().numpy()
    np.testing.assert_allclose(theta, np.concatenate([linear, shift[:, None]], 1), atol=1e-5)
    # about the centre of the image: where each voxel is looked up
    centre = (np.array(SHAPE[ndim]) - 1) / 2
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE[ndim]), indexing="ij"), -1) - centre
    expected = grid @ linear.T + shift - grid
    found = result.disp[0].movedim(0, -1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_centre_is_that_of_the_image_where_the_network_pads():
    """A U-Net of divisor 16 pads 24x31 by 8 and 1; theta is about the centre of 24x31."""
    model = models.create("rcn", 2, base="vxm", cascades=1, affine_channels=2).eval()
    assert model.divisor == 1
    with torch.no_grad():
        model.stem.numbers.weight.normal_(std=20.0)
        model.networks[0].head.conv.weight.zero_()
        result = model(*pair((24, 31)))
    expected = spatial.affine_to_disp(result.theta, (24, 31))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(result.disp, expected, atol=1e-4, rtol=0)


# --- cascades ------------------------------------------------------------------------------------


def scipy_warp(image, disp, mode):
    """(..., *S) looked up at x + disp(x) by SciPy, in float64."""
    shape = disp.shape[1:]
    where = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")) + disp
    looked = [map_coordinates(c, where, order=1, mode=mode, cval=0) for c in image]
    return np.stack(looked)


@both
def test_steps_are_composed_and_the_image_interpolated_once(ndim):
    """Each network by itself, on images that SciPy has warped, gives the steps; SciPy the rest."""
    model = create(ndim, cascades=3)
    moving, fixed = pair(SHAPE[ndim])
    with torch.no_grad():
        result = model(moving, fixed)
        disp = spatial.affine_to_disp(model.stem(moving, fixed), SHAPE[ndim])[0].double().numpy()
        assert np.abs(disp).max() > 0.1
        for k, network in enumerate(model.networks):
            warped = scipy_warp(moving[0].double().numpy(), disp, "grid-constant")  # zeros
            warped = torch.from_numpy(warped)[None].float()
            step = network(warped, fixed).disp[0].double().numpy() / 3
            disp = step + scipy_warp(disp, step, "nearest")
            np.testing.assert_allclose(result.stages[k][0].numpy(), disp, atol=2e-4)
            np.testing.assert_allclose(result.steps[k][0].numpy(), step, atol=2e-4)
            assert np.abs(step).max() > 0.2
    assert torch.equal(result.stages[-1], result.disp)
    assert torch.equal(result.moved, spatial.warp(moving, result.disp))
    # warping what was warped is another image, and adding steps another displacement
    twice = moving
    first = spatial.affine_to_disp(result.theta, SHAPE[ndim])
    for step in (first, *result.steps):
        twice = spatial.warp(twice, step)
    added = first + sum(result.steps)
    assert (twice - result.moved).abs().mean() > 0.01
    assert (added - result.disp).abs().max() > 0.05


def test_without_a_stem_the_first_network_sees_the_image_itself():
    model = create(2, affine=False, cascades=2)
    moving, fixed = pair(SHAPE[2])
    with torch.no_grad():
        result = model(moving, fixed)
        alone = model.networks[0](moving, fixed).disp
    assert result.theta is None and model.stem is None
    assert torch.equal(result.stages[0], alone / 2)


@pytest.mark.parametrize("affine", [False, True])
@both
def test_repeats_are_the_same_networks_again(ndim, affine, tmp_path):
    once = create(ndim, cascades=2, affine=affine)
    models.save(once, tmp_path / "weights.safetensors")
    again = models.load(tmp_path / "weights.safetensors", repeats=3)
    assert models.parameter_count(again) == models.parameter_count(once)
    moving, fixed = pair(SHAPE[ndim])
    with torch.no_grad():
        result = again(moving, fixed)
        disp = torch.zeros(1, ndim, *SHAPE[ndim])
        if affine:
            disp = spatial.affine_to_disp(once.stem(moving, fixed), SHAPE[ndim])
        first, second = once.networks
        stages = []
        for network in (first, first, first, second, second, second):
            step = network(spatial.warp(moving, disp), fixed).disp / 2
            disp = spatial.compose(disp, step)
            stages.append(disp)
    assert len(result.stages) == 6
    for found, expected in zip(result.stages, stages, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    models.save(again, tmp_path / "again.safetensors")
    assert models.load(tmp_path / "again.safetensors").repeats == 3


def test_any_model_can_be_the_network():
    options = {
        "rigid_resnet34": {"width": 8},
        "affine_resnet34": {"width": 8},
        "vtn": {"channels": 2},
        "unfolding": {"channels": [8, 8], "layers": 1, "mlp": 8, "width": 8, "depth": 3},
    }
    moving, fixed = pair((21, 18))
    for name in models.names():
        if name != "rcn":
            model = models.create(
                "rcn", 2, base=name, cascades=2, affine_channels=2, **options.get(name, {})
            ).eval()
            with torch.no_grad():
                result = model(moving, fixed)
            assert result.disp.abs().max() < 1e-2 and result.svf is None
            assert result.disp.shape == (1, 2, 21, 18) and len(result.stages) == 2


@pytest.mark.parametrize("base", ["vtn", "vxm"])
@both
def test_gradients_reach_every_network_from_the_last_result(ndim, base):
    model = create(ndim, cascades=2) if base == "vtn" else models.create(
        "rcn", ndim, cascades=2, base="vxm", affine_channels=2, encoder=(4,) * 4,
        decoder=(4,) * 4, last=(4,),
    )  # fmt: skip
    with torch.no_grad():
        for network in model.networks if base == "vxm" else ():
            network.head.conv.weight.normal_(std=0.1)
        model.stem.numbers.weight.normal_(std=1e-2)
    moving, fixed = pair((32,) * ndim)
    losses.mse(model.train()(moving, fixed).moved, fixed).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


# --- the objective -----------------------------------------------------------------------------


def test_the_objective_asks_for_smooth_steps_and_a_map_that_is_nearly_a_rotation():
    recipe = recipes.get("rcn_2d", "smoke", similarity="mse")
    assert set(recipe.weights) >= {"similarity", "diffusion", "determinant", "orthogonality"}
    recipe = recipes.get("rcn_2d", "smoke", similarity="mse", weights=dict.fromkeys(
        ["similarity", "diffusion", "bending", "determinant", "orthogonality"], 1.0
    ))  # fmt: skip
    slope = torch.arange(6.0).reshape(1, 1, 6, 1).expand(1, 2, 6, 5)
    bent = slope.square()
    stretch = torch.tensor([[[2.0, 0, 9], [0, 3, 9]]])
    result = Registration(
        moved=torch.full((1, 1, 6, 5), 2.0), disp=100 * bent, theta=stretch,
        stages=(7 * bent, 100 * bent), steps=(slope, 2 * slope + bent),
    )  # fmt: skip
    fixed = torch.zeros(1, 1, 6, 5)
    terms = objective(result, {"moving": fixed, "fixed": fixed}, recipe)
    assert float(terms["similarity"]) == 4  # of `moved` alone
    # along axis 0: 1; and 2 + (1, 3, 5, 7, 9); each counts half, for axis 1 is flat
    expected = 1 / 2 + np.mean((2 + np.array([1, 3, 5, 7, 9])) ** 2) / 2
    assert float(terms["diffusion"]) == pytest.approx(expected)
    assert float(terms["bending"]) == pytest.approx(4)  # second difference 2, squared
    assert float(terms["determinant"]) == pytest.approx((6 - 1) ** 2 / 2)
    assert float(terms["orthogonality"]) == pytest.approx(9 / 4 + 64 / 9, rel=1e-4)


@pytest.mark.slow
def test_a_cascade_is_trained_like_any_other_model(monkeypatch, tmp_path):
    monkeypatch.setenv("REGKIT_DATA", str(tmp_path))
    recipe = recipes.get("rcn_2d", "smoke", options=SMALL, lr=0.01, warmup=0)
    trained = train(recipe, progress=False, device="cpu")
    for entry in trained.history:
        terms = sum(weight * entry[name] for name, weight in recipe.weights.items())
        assert entry["loss"] == pytest.approx(terms, rel=1e-5)
    first, last = trained.history[0], trained.history[-1]
    assert all(first[name] == 0 for name in ("diffusion", "determinant", "orthogonality"))
    assert all(last[name] > 0 for name in ("diffusion", "determinant", "orthogonality"))
    assert "dice" in last


def test_recipes_of_the_papers():
    for name, ndim in (("rcn_2d", 2), ("rcn_3d", 3)):
        recipe = recipes.get(name, "paper")
        assert (recipe.similarity, recipe.lr, recipe.batch, recipe.steps) == (
            "ncc",
            1e-4,
            4,
            100_000,
        )
        # half the sum over axes of the mean square, where ours is the mean over axes
        expected = {"similarity": 1.0, "diffusion": ndim / 2}
        assert recipe.weights == expected | {"determinant": 0.1, "orthogonality": 0.1}
        model = models.create(recipe.model, 2, **recipe.options)
        assert len(model.networks) == 3 and isinstance(model.networks[0], cascade.Vtn)
    ideal = recipes.get("affine_vxm_2d", "smoke")  # Tan 2023, figure 9
    model = models.create(ideal.model, ideal.ndim, **ideal.options)
    assert model.stem is not None and [n.name or type(n).__name__ for n in model.networks] == [
        "Vxm"
    ]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("rcn", {"cascades": 0}, ["cascades is 0", "expected 1 or more"]),
        ("rcn", {"repeats": 0}, ["repeats is 0", "expected 1 or more"]),
        ("rcn", {"base": "vxn"}, ["base is 'vxn'", "expected one of", "did you mean 'vxm"]),
        ("rcn", {"base": "rcn"}, ["base is 'rcn'", "expected one of"]),
        ("rcn", {"colour": "red"}, ["colour"]),
        ("rcn", {"affine_size": (128,)}, ["affine_size is (128,)", "expected 2 positive sizes"]),
        ("rcn", {"affine_size": (128, 0)}, ["affine_size", "expected 2 positive sizes"]),
        ("rcn", {"affine_channels": 0}, ["channels is 0"]),
        ("vtn", {"channels": 0}, ["channels is 0", "expected 1 or more"]),
    ],
)
def test_options_that_make_no_network_are_one_sentence(name, options, parts):
    with pytest.raises(ValueError) as caught:
        models.create(name, 2, **options)
    sentence = str(caught.value)
    for part in (f"do not fit the model {name!r}", *parts):
        assert part in sentence
    assert "\n" not in sentence and sentence.endswith(".") and not sentence.endswith("..")


def test_repeats_of_a_file_must_be_at_least_one(tmp_path):
    models.save(create(2), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="repeats is 0, expected 1 or more"):
        models.load(tmp_path / "weights.safetensors", repeats=0)


@pytest.mark.parametrize("stem", [None, (128, 128)])
def test_an_affine_stem_on_images_of_another_size(stem):
    model = models.create("rcn", 2, **SMALL, affine_size=stem).eval()
    with pytest.raises(ValueError, match=r"moving has shape .*24, 31.* and fixed .*24, 32"):
        model(torch.rand(1, 1, 24, 31), torch.rand(1, 1, 24, 32))
    if stem is not None:
        with pytest.raises(ValueError) as caught:
            model(*pair((120, 128)))
        assert "(120, 128), expected (128, 128)" in str(caught.value)
        assert "affine_size=None" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("term", ["determinant", "orthogonality"])
def test_terms_of_an_affine_map_need_one(term):
    recipe = recipes.get("vxm_2d", "smoke", weights={term: 1.0})
    image = torch.rand(1, 1, 8, 8)
    result = Registration(image, torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match=f"weights names '{term}', expected a model .*affine map"):
        objective(result, {"moving": image, "fixed": image}, recipe)
