"""Models against the published parameter counts and the contract every model keeps."""

import json
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from regkit import losses, models, spatial
from regkit.models import base, cascade, dual_prnet, resnet, unfolding, voxelmorph

CPU = torch.profiler.ProfilerActivity.CPU
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
NAMES = models.names()
# counted by running the published code
PARAMETERS = {
    ("vxm1", 3): 355_579,
    ("vxm1", 2): 104_802,
    ("vxm2", 3): 396_451,
    ("vxm2", 2): 118_386,
    ("vxm", 3): 327_331,
    ("vxm", 2): 109_170,
    ("vxm_diff", 3): 327_331,
    ("vxm_diff", 2): 109_170,
}
# counted by hand: He et al. 2016, table 1, with group normalisation and two fully connected layers
RESNET = {
    ("rigid_resnet34", 2): 21_314_563,
    ("rigid_resnet34", 3): 63_524_806,
    ("affine_resnet34", 2): 21_314_758,
    ("affine_resnet34", 3): 63_525_196,
}
# small enough for many tests; the published sizes are counted
SMALL = {
    "rigid_resnet34": {"width": 8},
    "affine_resnet34": {"width": 8},
    "dense_unet_eca": {"channels": [8, 16, 16, 16]},
    "fcn": {"channels": [8, 8, 16, 16, 16]},
    "vtn": {"channels": 4},
    "rcn": {"cascades": 2, "channels": 4, "affine_channels": 4},
    "dual_prnet": {"channels": [4, 8, 8]},
    "dilformer": {"channels": [4, 12, 12], "layers": 1},
    "vit_v_net": {
        "encoder": [4, 8, 8],
        "decoder": [8, 8, 8, 8, 8],
        "bottom": 16,
        "channels": 12,
        "heads": 2,
        "layers": 2,
        "mlp": 24,
        "dropout": 0.0,
    },
    "transmorph": {
        "size": "tiny",
        "layers": [2, 2, 1, 1],
        "heads": [2, 2, 2, 2],
        "window": 3,
        "drop_path": 0.0,
    },
    "utsrmorph": {
        "channels": 12,
        "layers": [2, 1, 1, 1],
        "heads": [2, 2, 2, 2],
        "window": 3,
        "drop_path": 0.0,
    },
    "h_sganet": {"channels": [8, 8, 16], "hop": 4},
    "unfolding": {"channels": [8, 16, 16], "layers": 2, "mlp": 24, "width": 8, "depth": 3},
}
TOKENS = ("vit_v_net", "transmorph", "utsrmorph")
SIZES = {2: (37, 53), 3: (21, 34, 45)}
every_model = pytest.mark.parametrize(
    ("name", "ndim"), [(name, ndim) for name in NAMES for ndim in (2, 3)]
)


def pair(shape, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, batch, 1, *shape, generator=generator)


def create(name, ndim, **options):
    return models.create(name, ndim=ndim, **SMALL.get(name, {}), **options)


def heads(model):
    """The weights of the last layers, which start near zero or at zero."""
    if isinstance(model, resnet.LinearResNet):
        return [model.numbers.weight]
    if isinstance(model, unfolding.Unfolding):
        return [stage.fidelity.head.conv.weight for stage in model.stages]
    if isinstance(model, cascade.Vtn):
        return [model.head.weight]
    if isinstance(model, cascade.Rcn):
        return [model.stem.numbers.weight, *(net.head.weight for net in model.networks)]
    return [m.conv.weight for m in model.modules() if isinstance(m, voxelmorph.DispHead)]


def with_visible_output(name, ndim, **options):
    """A model whose head is not near zero any more, so that its answer is one: about a voxel."""
    torch.manual_seed(1)
    model = create(name, ndim, **options)
    with torch.no_grad():
        for weight in heads(model):
            weight.normal_(std=1.0)
        # numbers of a motion come out small first, so that the answer grows in proportion
        for weight in heads(model) if isinstance(model, (resnet.LinearResNet, cascade.Rcn)) else []:
            weight.mul_(1e-3)
        result = model.eval()(*pair((32,) * ndim))
        raw = result.disp if result.svf is None else result.svf
        for weight in heads(model):
            weight.div_(raw.abs().max() / 1.5)
    return model


def test_names():
    assert NAMES[:2] == ["rigid_resnet34", "affine_resnet34"]
    assert NAMES[2:7] == ["vxm1", "vxm2", "vxm", "vxm_diff", "dense_unet_eca"]
    assert NAMES[7:12] == ["fcn", "vtn", "rcn", "dual_prnet", "dilformer"]
    assert NAMES[12:] == ["vit_v_net", "transmorph", "utsrmorph", "h_sganet", "unfolding"]
    assert {name for name, _ in PARAMETERS} <= set(NAMES)


@pytest.mark.parametrize(("name", "ndim"), list(PARAMETERS))
def test_parameter_counts_are_the_published_ones_and_those_of_the_docstring(name, ndim):
    expected = PARAMETERS[name, ndim]
    assert models.parameter_count(models.create(name, ndim=ndim)) == expected
    assert f"{expected:,}" in voxelmorph.__doc__


@pytest.mark.parametrize(("name", "ndim"), list(RESNET))
def test_parameter_counts_of_the_residual_networks(name, ndim):
    """Convolutions of ResNet-34 without its classifier; two numbers a channel for each norm."""
    model = models.create(name, ndim=ndim)
    assert models.parameter_count(model) == RESNET[name, ndim]
    assert f"{RESNET[name, ndim]:,}" in resnet.__doc__
    k, total, c_in = 3**ndim, 2 * 7**ndim * 64 + 2 * 64, 64
    for blocks, c in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True):
        total += c_in * c * k + c * c * k + 4 * c  # the first block
        total += (c_in * c + 2 * c) if c_in != c else 0  # its shortcut
        total += (blocks - 1) * (2 * c * c * k + 4 * c)
        c_in = c
    outputs = {"rigid": {2: 3, 3: 6}, "affine": {2: 6, 3: 12}}[name.split("_")[0]][ndim]
    assert RESNET[name, ndim] == total + (512 * 64 + 64) + (64 * outputs + outputs)


@every_model
def test_an_untrained_model_is_the_identity(name, ndim):
    model = create(name, ndim)
    moving, fixed = pair(SIZES[ndim], batch=2)
    result = model(moving, fixed)
    assert isinstance(result, models.Registration)
    assert result.moved.shape == moving.shape
    assert result.disp.shape == (2, ndim, *SIZES[ndim])
    assert result.disp.abs().max() < 1e-3
    assert (result.disp != 0).any() or name in SMALL  # exactly the identity
    torch.testing.assert_close(result.moved, moving, atol=1e-3, rtol=0)


@every_model
def test_the_gradient_reaches_every_parameter(name, ndim):
    model = with_visible_output(name, ndim).train()
    # a token that is alone at 1/32 learns nothing about where others lie: 40 leave two
    moving, fixed = pair((40 if name in TOKENS else 32,) * ndim)
    result = model(moving, fixed)
    (losses.mse(result.moved, fixed) + losses.diffusion(result.disp)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, key


@pytest.mark.slow
@every_model
def test_a_few_steps_of_training_lower_the_loss(name, ndim):
    shape = (16,) * ndim
    grid = spatial.identity_grid(shape) - 7.5
    blob = torch.exp(-grid.square().sum(0) / 18)[None, None]
    moving = spatial.warp(blob, torch.full((1, ndim, *shape), 1.5))
    torch.manual_seed(0)
    model = create(name, ndim).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = losses.mse(model(moving, blob).moved, blob)
        loss.backward()
        optimiser.step()
        history.append(float(loss.detach()))
    assert min(history[-5:]) < 0.7 * history[0]


@every_model
def test_moved_is_the_moving_image_looked_up_through_disp(name, ndim):
    model = with_visible_output(name, ndim)
    moving, fixed = pair(SIZES[ndim], batch=2)
    with torch.no_grad():
        result = model(moving, fixed)
    assert 0.2 < result.disp.abs().max() < 20
    assert torch.equal(result.moved, spatial.warp(moving, result.disp))
    # each image of the batch is registered for itself
    with torch.no_grad():
        second = model(moving[1:], fixed[1:])
    torch.testing.assert_close(second.disp, result.disp[1:], atol=1e-4, rtol=0)


@every_model
def test_any_size_is_the_padded_size_cut_back(name, ndim):
    model = with_visible_output(name, ndim)
    moving, fixed = pair(SIZES[ndim])
    padded, crop = spatial.pad_to_multiple(moving, model.divisor)
    with torch.no_grad():
        expected = crop(model(padded, spatial.pad_to_multiple(fixed, model.divisor)[0]).disp)
        assert torch.equal(model(moving, fixed).disp, expected)
        for shape in [(1, 40), (16, 3), (63, 65), (5, 1, 18)]:
            if isinstance(model, dual_prnet.Pyramid):  # which names the smallest size it takes
                shape = [max(n, model.divisor) for n in shape]
            if len(shape) == ndim:
                result = model(*pair(shape))
                assert result.disp.shape == (1, ndim, *shape)
                assert torch.isfinite(result.disp).all()
                assert result.svf is None or result.svf.shape == result.disp.shape


@pytest.mark.parametrize("half_resolution", [False, True])
@pytest.mark.parametrize("ndim", [2, 3])
def test_vxm_diff_integrates_its_velocity_to_an_invertible_map(ndim, half_resolution):
    model = with_visible_output("vxm_diff", ndim, half_resolution=half_resolution)
    with torch.no_grad():
        result = model(*pair((48,) * ndim if ndim == 2 else (32,) * 3))
    svf, disp = result.svf, result.disp
    assert svf.shape == disp.shape and 0.5 < svf.abs().max() < 5
    # the velocity is worked with at half resolution: the integral on the full grid is close
    inner = (..., *[slice(6, -6)] * ndim)
    direct = spatial.integrate(svf)
    assert (direct - disp)[inner].abs().max() < 0.15 * disp.abs().max()
    there_and_back = spatial.compose(direct, spatial.integrate(-svf))
    assert there_and_back[inner].abs().mean() < 0.05 * disp.abs().mean()
    assert (spatial.jacobian_determinant(disp) > 0).float().mean() > 0.999


@pytest.mark.parametrize("name", [n for n in NAMES if n != "vxm_diff"])
def test_only_models_that_integrate_have_a_velocity(name):
    assert models.create(name, ndim=2)(*pair((32, 32))).svf is None


def test_vxm_diff_with_a_constant_velocity_is_a_translation():
    """Also across the change to half resolution, which must rescale and not only resample."""
    model = models.create("vxm_diff", ndim=2)
    with torch.no_grad():
        model.head.conv.weight.zero_()
        model.head.conv.bias.copy_(torch.tensor([1.5, -0.75]))
        result = model(*pair((32, 48)))
    expected = torch.tensor([1.5, -0.75]).reshape(1, 2, 1, 1).expand(1, 2, 32, 48)
    torch.testing.assert_close(result.svf, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.disp, expected, atol=1e-5, rtol=0)


def test_half_resolution_is_rescaled_to_the_image_grid():
    model = models.create("vxm", ndim=2, half_resolution=True)
    with torch.no_grad():
        model.head.conv.weight.zero_()
        model.head.conv.bias.copy_(torch.tensor([1.0, 2.0]))
        disp = model(*pair((32, 48))).disp
    expected = torch.tensor([31 / 15, 2 * 47 / 23]).reshape(1, 2, 1, 1).expand(1, 2, 32, 48)
    torch.testing.assert_close(disp, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@every_model
def test_displacements_are_float32_under_autocast(name, ndim, device):
    model = with_visible_output(name, ndim).to(device)
    moving, fixed = (x.to(device) for x in pair((32,) * ndim))
    with torch.no_grad():
        expected = model(moving, fixed).disp
        with torch.autocast(device, dtype=torch.bfloat16):
            result = model(moving, fixed)
    assert result.disp.dtype == result.moved.dtype == torch.float32
    assert result.disp.device.type == device
    assert (result.disp - expected).abs().mean() < 0.1 * expected.abs().mean()


U_NETS = [(name, {}) for name in ("vxm1", "vxm2", "vxm", "vxm_diff")]
U_NETS += [(name, {"half_resolution": True}) for name in ("vxm", "vxm_diff")]


def gradients_and_bytes(model, shape):
    """Gradients of a step, and how many bytes lie between its way there and its way back."""
    moving, fixed = pair(shape)
    with torch.profiler.profile(profile_memory=True, activities=[CPU]) as profile:
        loss = losses.mse(model(moving, fixed).moved, fixed)
    events = profile.profiler.kineto_results.events()
    kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
    loss.backward()
    return [p.grad for p in model.parameters()], kept


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize(("name", "options"), U_NETS)
def test_saving_memory_gives_the_same_gradients(name, options, ndim):
    """Activations that are computed again instead of kept: the same bits."""
    plain = with_visible_output(name, ndim, **options).train()
    saving = models.create(name, ndim=ndim, save_memory=True, **options).train()
    saving.load_state_dict(plain.state_dict())
    shape = (128, 128) if ndim == 2 else (32, 32, 32)
    (expected, plenty), (found, kept) = (gradients_and_bytes(m, shape) for m in (plain, saving))
    assert all(map(torch.equal, expected, found))
    assert all(g.abs().max() > 0 for g in found)
    assert 0 < kept < 0.9 * plenty


@every_model
def test_images_of_numpys_float64_meet_weights_of_float32(name, ndim):
    model = with_visible_output(name, ndim)
    moving, fixed = pair(SIZES[ndim])
    plain, double = model(moving, fixed), model(moving.double(), fixed.double())
    assert torch.equal(plain.disp, double.disp)
    assert double.moved.dtype == torch.float64
    assert torch.allclose(plain.moved, double.moved.float(), atol=1e-5)


@every_model
def test_the_same_seed_makes_the_same_model(name, ndim):
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(create(name, ndim).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


# --- files -------------------------------------------------------------------------------------


@every_model
def test_save_and_load(name, ndim, tmp_path):
    path = tmp_path / "weights.safetensors"
    model = with_visible_output(name, ndim)
    models.save(model, path, spacing=[2.0] * ndim, orientation="RAS", seed=7)
    loaded = models.load(path)
    assert (loaded.name, loaded.ndim, loaded.options) == (name, ndim, model.options)
    assert loaded.info == {"spacing": [2.0] * ndim, "orientation": "RAS", "seed": 7}
    assert not loaded.training
    for shape in [(16,) * ndim, SIZES[ndim]]:  # no size is written into the file
        with torch.no_grad():
            torch.testing.assert_close(
                loaded(*pair(shape)).disp, model(*pair(shape)).disp, atol=0, rtol=0
            )
    # nothing but parameters, and no half-written file beside it
    assert set(load_file(path)) == {key for key, _ in model.named_parameters()}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    # what was loaded can be saved again, with more to say
    models.save(loaded, path, seed=8)
    assert models.load(str(path)).info == {"spacing": [2.0] * ndim, "orientation": "RAS", "seed": 8}


@pytest.mark.parametrize("name", ["rigid_resnet34", "vxm"])
def test_half_the_bytes_and_nearly_the_same_answer(name, tmp_path):
    model = with_visible_output(name, 2)
    for half in (False, True):
        models.save(model, tmp_path / f"{half}.safetensors", half=half)
    whole, small = (tmp_path / f"{half}.safetensors" for half in (False, True))
    assert small.stat().st_size < 0.6 * whole.stat().st_size
    loaded = models.load(small)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    images = pair((32, 32))
    with torch.no_grad():
        torch.testing.assert_close(loaded(*images).disp, model(*images).disp, atol=0.03, rtol=0)


def test_options_travel_with_the_weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    models.save(models.create("vxm_diff", ndim=2, steps=5, half_resolution=True), path)
    loaded = models.load(path)
    assert loaded.options == {"steps": 5, "half_resolution": True} and loaded.steps == 5
    models.save(models.create("vxm", ndim=2, encoder=[8, 8, 8, 8], last=(8,)), path)
    assert models.parameter_count(models.load(path)) < 60_000


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    weights = {k: v.clone() for k, v in models.create("vxm1", ndim=2).state_dict().items()}
    header = {"name": "vxm", "ndim": 2, "options": {}, "info": {}}
    save_file(weights, path, metadata={"regkit": json.dumps(header)})
    with pytest.raises(ValueError, match=r"weights\.safetensors.*do not fit.*'vxm'"):
        models.load(path)
    # the same network in 3D
    weights = {k: v.clone() for k, v in models.create("vxm", ndim=3).state_dict().items()}
    save_file(weights, path, metadata={"regkit": json.dumps(header)})
    with pytest.raises(ValueError, match="do not fit"):
        models.load(path)


class Bomb:
    """Unpickling it creates a file: nothing here may ever unpickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_ever_unpickled(tmp_path):
    for name in ("weights.pt", "weights.safetensors"):
        with open(tmp_path / name, "wb") as file:
            pickle.dump(Bomb(tmp_path / "boom"), file)
        with pytest.raises(ValueError, match="expected a safetensors file written by regkit"):
            models.load(tmp_path / name)
        torch.save({"a": torch.zeros(2)}, tmp_path / name)
        with pytest.raises(ValueError, match="expected a safetensors file"):
            models.load(tmp_path / name)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "header",
    [
        None,
        "not JSON",
        "[]",
        "{}",
        '{"name": "vxm"}',
        '{"name": "vxn", "ndim": 2, "options": {}, "info": {}}',
        '{"name": "vxm", "ndim": 5, "options": {}, "info": {}}',
        '{"name": "vxm", "ndim": 2, "options": {"colour": 1}, "info": {}}',
        '{"name": "vxm", "ndim": 2, "options": {"encoder": 3}, "info": {}}',
    ],
)
def test_safetensors_that_we_did_not_write_are_refused(header, tmp_path):
    path = tmp_path / "weights.safetensors"
    metadata = None if header is None else {"regkit": header}
    save_file({"a": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(ValueError) as caught:
        models.load(path)
    assert "\n" not in str(caught.value)


def test_truncated_and_absent_files(tmp_path):
    path = tmp_path / "weights.safetensors"
    models.save(models.create("vxm", ndim=2), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="expected a safetensors file"):
        models.load(path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors.*expected a weights file"):
        models.load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="expected a weights file"):
        models.load(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="path is .*weights.*a folder that exists") as caught:
        models.save(models.create("vxm", ndim=2), tmp_path / "absent" / "weights.safetensors")
    assert "\n" not in str(caught.value)


def test_shipped_weights_say_what_they_expect():
    shipped = models.pretrained()
    assert "vxm_diff_brain_3d" in shipped
    for name in shipped:
        model = models.load(name)
        assert len(model.info["spacing"]) == model.ndim and min(model.info["spacing"]) > 0
        assert model.info["orientation"] == "RAS" and model.info["range"] == [0, 1]
        assert isinstance(model.info["recipe"]["seed"], int)
    folder = models.resources.files("regkit") / "weights"
    assert sum(p.stat().st_size for p in folder.iterdir()) < 20e6


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: models.create("vxm_dif"), ["name is 'vxm_dif'", "did you mean 'vxm_diff'"]),
        (lambda: models.create("unet"), ["name is 'unet'", "expected one of rigid_resnet34"]),
        (lambda: models.create("vxm", ndim=4), ["ndim is 4", "2 or 3"]),
        (lambda: models.create("vxm", colour="red"), ["options", "'vxm'", "colour"]),
        (lambda: models.create("vxm", encoder=(16, 32)), ["options", "encoder"]),
    ],
)
def test_creating_what_does_not_exist(call, parts):
    with pytest.raises(ValueError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def bad_pairs():
    good = torch.rand(1, 1, 16, 16)
    for position, name in enumerate(("moving", "fixed")):

        def swap(bad, position=position):
            return (bad, good) if position == 0 else (good, bad)

        yield swap(torch.rand(1, 1, 4, 4, 4)), [name, "(1, 1, 4, 4, 4)", "(B, 1, H, W)", "2D model"]
        yield swap(torch.rand(16, 16)), [name, "(16, 16)", "expected (B, 1, H, W)"]
        yield swap(torch.rand(1, 3, 16, 16)), [name, "(1, 3, 16, 16)", "of a colour picture one"]
        yield swap(good.to(torch.uint8)), [name, "uint8", "expected a floating point"]
        yield swap(good / 0 * 0), [name, "NaN"]
        yield swap(good.clone().index_fill(2, torch.tensor(3), math.inf)), [name, "infinity"]
        yield swap(torch.rand(1, 1, 16, 20)), [name, "(1, 1, 16, 20)", "same grid"]
        yield swap(torch.rand(2, 1, 16, 16)), [name, "(2, 1, 16, 16)"]


@pytest.mark.parametrize(("images", "parts"), list(bad_pairs()))
def test_bad_images_are_one_sentence(images, parts):
    model = models.create("vxm", ndim=2).eval()
    with pytest.raises(ValueError) as caught:
        model(*images)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_model_without_estimate_says_so():
    class Empty(base.RegistrationModel):
        pass

    with pytest.raises(NotImplementedError, match="Empty does not define estimate"):
        Empty(2)(*pair((4, 4)))


# --- files of strangers --------------------------------------------------------------------------

TINY = {"encoder": [4, 4], "decoder": [4, 4], "last": [4]}


def stranger(path, **said):
    """A weights file of a tiny network whose header says something else."""
    model = models.create("vxm", 2, **TINY)
    header = {"name": "vxm", "ndim": 2, "options": TINY, "info": {}, **said}
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(weights, path, metadata={"regkit": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    "said",
    [
        {"name": ["vxm"]},
        {"name": None},
        {"ndim": 2.0},
        {"ndim": True},
        {"options": None},
        {"options": {"ndim": 2}},
        {"options": {"name": "vxm"}},
        {"options": {"encoder": []}},
        {"options": {**TINY, "encoder": [-4, 4]}},
        {"options": {**TINY, "encoder": [10**6, 10**6]}},
        {"options": {**TINY, "encoder": [4.0, 4]}},
        {"options": {**TINY, "encoder": [True, 4]}},
        {"options": {**TINY, "encoder": [4] * 1000}},
        {"options": {**TINY, "half_resolution": "yes"}},
        {"name": "rcn", "options": {"cascades": 10**6}},
        {"name": "rcn", "options": {"base": "rcn"}},
        {"name": "rcn", "options": {"base": ["vxm"]}},
        {"name": "rcn", "options": {"cascades": 100, "base": "unfolding", "stages": 100}},
        {"name": "unfolding", "options": {"stages": 10**6}},
        {"name": "unfolding", "options": {"layers": 100, "stages": 100}},
        {"name": "unfolding", "options": {"tolerance": float("nan"), "shared": True}},
        {"name": "dual_prnet", "options": {"correlation": 10**4}},
        {"name": "vxm_diff", "options": {**TINY, "steps": 10**6}},
        {"name": "vtn", "options": {"channels": 10**30}},
        {"name": "rigid_resnet34", "options": {"spacing": [1.0, "1"]}},
        {"info": []},
    ],
)
def test_a_header_of_a_stranger_is_a_sentence_before_anything_is_made(said, tmp_path, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("weights were read")

    path = stranger(tmp_path / "w.safetensors", **said)
    monkeypatch.setattr(torch.Tensor, "to", never)
    with pytest.raises(ValueError) as caught:
        models.load(path)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 800


@pytest.mark.parametrize("text", ["[" * 100_000, '{"name": ' + "1" * 5000 + "}", "\x00", "null"])
def test_a_header_that_json_chokes_on(text, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata={"regkit": text})
    with pytest.raises(ValueError, match="expected a safetensors file written by regkit"):
        models.load(path)


@pytest.mark.parametrize(
    ("info", "sentence"),
    [
        ({"spacing": 2.0}, "spacing is 2.0, expected 2 voxel sizes"),
        ({"spacing": [2.0, 2.0, 2.0]}, "spacing is .*, expected 2 voxel sizes"),
        ({"spacing": [2.0, 0.0]}, "expected 2 voxel sizes"),
        ({"spacing": [2.0, 1e-45]}, "expected 2 voxel sizes"),
        ({"spacing": [2.0, float("nan")]}, "expected 2 voxel sizes"),
        ({"spacing": ["2", 2.0]}, "expected 2 voxel sizes"),
        ({"range": [1, 0]}, r"range is \[1, 0\], expected two numbers, the lower one first"),
        ({"range": "01"}, "expected two numbers"),
        ({"motion": 5}, "motion is 5, expected an angle and a shift"),
        ({"motion": [5, 5]}, "motion has no spacing beside it"),
        ({"recipe": []}, r"recipe is \[\], expected the settings of a training"),
        ({"recipe": {"shape": [48]}}, "recipe: shape is .*, expected 2 numbers of voxels"),
        ({"recipe": {"shape": [10**9, 10**9]}}, "expected 2 numbers of voxels"),
        ({"recipe": {"similarity": ["ncc"]}}, "recipe: similarity is .*, expected a word"),
        ({"recipe": {"motion": 3}}, "recipe: motion is 3, expected settings or None"),
    ],
)
def test_what_weights_say_of_their_training_is_of_its_kind(info, sentence, tmp_path):
    path = stranger(tmp_path / "w.safetensors", info=info)
    for read in (models.load, models.about):
        with pytest.raises(ValueError, match=sentence) as caught:
            read(path)
        assert str(caught.value).startswith("path_or_name is 'w.safetensors'")


def test_what_a_file_says_of_itself_is_read_without_its_weights():
    for name in models.pretrained():
        about, model = models.about(name), models.load(name)
        assert (about.name, about.ndim, about.options, about.info) == (
            model.name, model.ndim, model.options, model.info,
        )  # fmt: skip
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        assert {key: shape for key, (_, shape) in about.tensors.items()} == shapes
    with pytest.raises(FileNotFoundError, match="expected a weights file or one of"):
        models.about("nowhere.safetensors")


def test_loading_draws_no_random_numbers_and_keeps_nothing_of_the_file(tmp_path):
    torch.manual_seed(3)
    path = tmp_path / "w.safetensors"
    model = with_visible_output("vxm", 2)
    models.save(model, path)
    before = torch.random.get_rng_state()
    loaded = models.load(path)
    assert torch.equal(torch.random.get_rng_state(), before)
    path.write_bytes(bytes(path.stat().st_size))  # the file is overwritten in place
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_types_of_all_options_are_known(name):
    """Each keyword argument of a model's class, and of its parents where it hands them on."""
    known = models._known_options(name, {})
    assert "ndim" not in known and known
    if name == "vxm_diff":
        assert {"steps", "encoder", "half_resolution"} <= set(known)
    if name == "rcn":
        assert {"cascades", "base", "channels"} <= set(known)
    with pytest.raises(ValueError, match="colour.* is no option"):
        models.create(name, 2, colour=1)


def test_a_network_of_more_levels_takes_any_size():
    """The images are padded to what its levels need."""
    wide = {"encoder": [4] * 6, "decoder": [4] * 6, "last": [4]}
    assert models.create("vxm", 2, **wide)(*pair((20, 22))).disp.shape == (1, 2, 20, 22)
