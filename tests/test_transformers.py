"""Windows with relative positions, TransMorph and ViT-V-Net against their definitions, by hand."""

import itertools
import math

import pytest
import torch
from torch import nn

from regkit import attention, blocks, losses, models, spatial
from regkit.models import transmorph, vit_v_net

both = pytest.mark.parametrize("ndim", [2, 3])
# an image, and a window: some fit, some do not, some are larger, some axes have one place
GRIDS = [
    ((6, 9), (2, 3)),
    ((7, 10), (3, 4)),
    ((1, 9), (5, 4)),
    ((5, 3), (5, 6)),
    ((4, 5, 6), (2, 3, 7)),
    ((3, 1, 7), (2, 2, 3)),
]
TINY = {"size": "tiny", "layers": (2, 2, 1, 1), "heads": (2, 2, 2, 2), "window": 2}
NARROW = {
    "encoder": (4, 4, 4),
    "decoder": (4, 4, 4, 4, 4),
    "bottom": 8,
    "channels": 8,
    "heads": 2,
    "layers": 2,
    "mlp": 8,
    "dropout": 0.0,
}


def bytes_held(call):
    """What a call returns, and how many bytes it leaves behind for the way back."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(profile_memory=True, activities=[cpu]) as profile:
        answer = call()
    events = profile.profiler.kineto_results.events()
    return answer, sum(event.nbytes() for event in events if event.name() == "[memory]")


def strong(window, *, channels=6, heads=2, **options):
    """Window attention with weights large enough for some tokens to count far more than others."""
    torch.manual_seed(0)
    made = attention.WindowAttention(channels, heads, window, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made.eval()


def window_of(place, shape, window, shift):
    """Where a place lies: cuts at 0, w, 2w, ..., or w // 2 further on where the axis is longer."""
    found = []
    for x, n, w in zip(place, shape, window, strict=True):
        found.append((x - (w // 2 if shift and w < n else 0)) // min(w, n))
    return found


def one_by_one(made, x):
    """Liu et al. 2021, equation 4, token by token, and no mask: strangers are left out."""
    shape, (heads, window) = x.shape[1:-1], (made.heads, made.window)
    c = x.shape[-1] // heads
    q, k, v = made.qkv(x).unflatten(-1, (3, heads, c)).unbind(-3)
    places = list(itertools.product(*map(range, shape)))
    result = torch.empty_like(x)
    for here in places:
        mine = window_of(here, shape, window, made.shift)
        seen = [p for p in places if window_of(p, shape, window, made.shift) == mine]
        scores = []
        for there in seen:
            row = 0
            for a, b, w in zip(here, there, window, strict=True):
                row = row * (2 * w - 1) + (a - b + w - 1)
            score = (q[:, *here] * k[:, *there]).sum(-1) / math.sqrt(c) + made.bias[row]
            scores.append(score)  # (B, heads)
        weights = torch.stack(scores).softmax(0)
        mean = sum(w[..., None] * v[:, *p] for w, p in zip(weights, seen, strict=True))
        result[:, *here] = mean.flatten(-2)
    return result @ made.out.weight.T + made.out.bias


# --- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("shape", "window"), GRIDS)
def test_window_attention_is_its_equation_token_by_token(shape, window, shift):
    made, x = strong(window, shift=shift, qkv_bias=shift), torch.randn(2, *shape, 6)
    with torch.no_grad():
        torch.testing.assert_close(made(x), one_by_one(made, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("shape", "window"), GRIDS)
def test_a_token_sees_its_window_and_nothing_else(shape, window, shift):
    """The receptive field of one layer, by the gradient of one token of the answer."""
    made = strong(window, shift=shift)
    for place in ([0] * len(shape), [n - 1 for n in shape], [n // 2 for n in shape]):
        x = torch.randn(1, *shape, 6, requires_grad=True)
        made(x)[0, *place].sum().backward()
        mine = window_of(place, shape, window, shift)
        for there in itertools.product(*map(range, shape)):
            sees = window_of(there, shape, window, shift) == mine
            assert bool((x.grad[0, *there] != 0).any()) == sees


def test_two_layers_see_across_the_cuts():
    """Without shift a cut is never crossed, however many layers there are."""
    x = torch.randn(1, 12, 12, 6)
    for shifts, widest in (((False, False), 4), ((False, True), 8)):
        torch.manual_seed(0)
        layers = nn.Sequential(*(attention.SwinLayer(6, 2, (4, 4), shift=s).eval() for s in shifts))
        x.grad = None
        layers(x.requires_grad_())[0, 5, 5].sum().backward()
        rows = (x.grad[0] != 0).any(-1).any(-1)
        assert int(rows.sum()) == widest


def test_a_window_as_large_as_the_image_is_full_attention_with_a_bias():
    made, x = strong((5, 7)), torch.randn(2, 5, 7, 6)
    with torch.no_grad():
        made.bias.zero_()
        full = attention.Attention(6, 2)
        full.in_proj_weight.copy_(made.qkv.weight)
        full.out_proj.load_state_dict(made.out.state_dict())
        torch.testing.assert_close(made(x), full(x))


@both
def test_weights_fit_images_of_any_size(ndim):
    """One window of a smaller image takes the differences of places that it has."""
    made = strong((4, 5, 6)[:ndim])
    small = torch.randn(1, *(2, 3, 1)[:ndim], 6)
    fitting = strong(tuple(small.shape[1:-1]))
    differences = itertools.product(
        *(range(-(n - 1), n) for n in small.shape[1:-1])
    )  # of the small window, in array order
    with torch.no_grad():
        for row, difference in enumerate(differences):
            entry = 0
            for step, w in zip(difference, made.window, strict=True):
                entry = entry * (2 * w - 1) + step + w - 1
            fitting.bias[row] = made.bias[entry]
        fitting.qkv.load_state_dict(made.qkv.state_dict())
        fitting.out.load_state_dict(made.out.state_dict())
        torch.testing.assert_close(made(small), fitting(small))


def test_the_bias_tells_left_from_right_and_depends_on_the_difference_alone():
    index = attention.relative_index((3, 4), (3, 4))
    places = list(itertools.product(range(3), range(4)))
    found = {}
    for i, j in itertools.product(range(12), repeat=2):
        difference = tuple(a - b for a, b in zip(places[i], places[j], strict=True))
        assert found.setdefault(difference, int(index[i, j])) == int(index[i, j])
    assert sorted(found.values()) == list(range(5 * 7))


def test_relative_places_of_keys_in_a_larger_window():
    """UTSRMorph's windows of 4 and 6: 9 differences along each axis, none of them negative."""
    index = attention.relative_index((4, 4, 4), (4, 4, 4), (6, 6, 6), (6, 6, 6))
    assert index.shape == (64, 216) and int(index.min()) == 0 and int(index.max()) == 728
    assert len(index.unique()) == 729
    assert int(index[0, 0]) == 5 * 81 + 5 * 9 + 5 and int(index[0, 1]) == int(index[0, 0]) - 1


def test_padding_and_the_other_end_are_not_looked_at():
    """A layer of a long image answers at its ends as that of a shorter one."""
    made, x = strong((4,) * 2, shift=True), torch.randn(1, 10, 4, 6)
    with torch.no_grad():
        whole = made(x)
        # cuts at 2 and 6: the first window holds two rows, the last one, behind 6, four
        torch.testing.assert_close(whole[:, 2:6], made(x[:, 2:6]))
        first = strong((4, 4))
        torch.testing.assert_close(whole[:, :2], first(x[:, :2]))
        torch.testing.assert_close(whole[:, 6:], first(x[:, 6:]))


@pytest.mark.parametrize("shift", [False, True])
def test_the_gradient_of_a_swin_layer(shift):
    torch.manual_seed(0)
    layer = attention.SwinLayer(4, 2, (2, 3), shift=shift, mlp_ratio=1).double()
    with torch.no_grad():
        layer.attention.bias.normal_()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    weights = dict(layer.named_parameters())

    def answer(bias):
        return torch.func.functional_call(layer, {**weights, "attention.bias": bias}, (x.detach(),))

    assert torch.autograd.gradcheck(answer, (layer.attention.bias,))


def test_a_swin_layer_is_its_two_residuals():
    torch.manual_seed(0)
    layer, x = attention.SwinLayer(6, 2, (3, 3)).eval(), torch.randn(2, 6, 7, 6)
    norm = nn.functional.layer_norm
    with torch.no_grad():
        y = x + layer.attention(norm(x, (6,)))
        hidden = nn.functional.gelu(norm(y, (6,)) @ layer.mlp[0].weight.T + layer.mlp[0].bias)
        expected = y + hidden @ layer.mlp[2].weight.T + layer.mlp[2].bias
        assert hidden.shape[-1] == 24
        torch.testing.assert_close(layer(x), expected)


def test_drop_path_leaves_out_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = attention.DropPath(0.3), torch.ones(20_000, 2, 3)
    found = drop(x)
    values = found[:, 0, 0]
    assert (found == values[:, None, None]).all()
    assert {round(float(v), 4) for v in values.unique()} == {0.0, round(1 / 0.7, 4)}
    # four standard errors of a share of 0.3 among 20,000
    assert abs(float((values == 0).double().mean()) - 0.3) < 4 * math.sqrt(0.21 / 20_000)
    assert torch.equal(drop.eval()(x), x)
    with pytest.raises(ValueError, match=r"share is 1, expected a number from 0 to below 1\."):
        attention.DropPath(1)


@both
def test_merging_puts_neighbours_side_by_side(ndim):
    """Half the size, rounded up; the neighbours in array order, zeros beyond the end."""
    shape = (3, 4, 1)[:ndim]
    merge, x = attention.PatchMerging(ndim, 2), torch.randn(1, *shape, 2)
    merge.norm, merge.linear = nn.Identity(), nn.Identity()
    found = merge(x)
    assert found.shape == (1, *(2, 2, 1)[:ndim], 2**ndim * 2)
    for place in itertools.product(*map(range, found.shape[1:-1])):
        for k, step in enumerate(itertools.product((0, 1), repeat=ndim)):
            source = [2 * a + b for a, b in zip(place, step, strict=True)]
            inside = all(a < n for a, n in zip(source, shape, strict=True))
            expected = x[0, *source] if inside else torch.zeros(2)
            assert torch.equal(found[0, *place][2 * k : 2 * k + 2], expected)


# --- blocks of the decoders -----------------------------------------------------------------------


def test_doubling_keeps_places_where_they_are():
    """The centre of place k lies between 2k and 2k + 1, at odd sizes as at even ones."""
    ramp = torch.arange(6.0).reshape(1, 1, 6, 1)
    for n in (12, 11):
        found = blocks.doubled(ramp, like=torch.empty(1, 3, n, 1))
        assert found.shape == (1, 1, n, 1)
        middle = torch.arange(1, 10)
        torch.testing.assert_close(found[0, 0, middle, 0], (middle - 0.5) / 2)


def test_an_instance_block_is_its_formula():
    torch.manual_seed(0)
    block, x = blocks.InstanceBlock(2, 3, 4), torch.randn(2, 3, 5, 6)
    assert [key for key, _ in block.named_parameters()] == ["conv.weight"]
    with torch.no_grad():
        y = nn.functional.conv2d(x, block.conv.weight, padding=1)
        y = (y - y.mean((2, 3), keepdim=True)) / (y.var((2, 3), False, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(block(x), torch.where(y > 0, y, 0.01 * y))
        one = torch.randn(2, 3, 1, 1)
        y = nn.functional.conv2d(one, block.conv.weight, padding=1)  # nothing to compare with
        torch.testing.assert_close(block(one), torch.where(y > 0, y, 0.01 * y))


@pytest.mark.parametrize("save_memory", [False, True])
def test_a_level_up_joins_its_features_again_for_the_gradient(save_memory):
    torch.manual_seed(0)
    level = blocks.UpBlock(2, 3, 2, 4)
    x, skip = torch.randn(1, 3, 8, 9, requires_grad=True), torch.randn(1, 2, 16, 17)
    skip.requires_grad_()

    def plain():
        up = nn.functional.interpolate(x, scale_factor=2, mode="bilinear")[..., :17]
        y = torch.cat([up, skip], dim=1)
        return level.second.layers(level.first.layers(y))

    inputs = (x, skip, *level.parameters())
    expected = torch.autograd.grad(plain().square().sum(), inputs)
    if save_memory:
        level.apply(blocks.checkpointed)
    found = torch.autograd.grad(level(x, skip).square().sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("save_memory", "channels"), [(False, 21), (True, 4)])
def test_what_a_level_up_holds(save_memory, channels):
    """The 5 joined channels, and 4 before and behind each of two norms; or the answer alone."""
    level = blocks.UpBlock(2, 3, 2, 4)
    if save_memory:
        level.apply(blocks.checkpointed)
    x, skip = torch.randn(1, 3, 64, 72, requires_grad=True), torch.randn(1, 2, 128, 144)
    answer, held = bytes_held(lambda: level(x, skip))
    assert channels <= held / answer[0, 0].nbytes < channels + 1


# --- networks -----------------------------------------------------------------------------------

PUBLISHED = {"tiny": 244_527, "small": 11_757_195, "base": 46_771_251, "large": 108_343_907}


def counted(ndim, size):
    """TransMorph, from the layers of its paper's figure and table."""
    e, layers, heads = transmorph.SIZES[size]
    k, window = 3**ndim, (5, 6, 7)[:ndim]
    table = math.prod(2 * w - 1 for w in window)
    total, c = 2 * 4**ndim * e + e + 2 * e, e  # patches and their norm
    for level, (n, h) in enumerate(zip(layers, heads, strict=True)):
        if level:
            total += 2 * 2**ndim * c + 2**ndim * c * 2 * c
            c *= 2
        attend = 3 * c * c + c * c + c + table * h
        total += n * (attend + (4 * c * c + 4 * c) + (4 * c * c + c) + 4 * c) + 2 * c
    total += k * 2 * (e // 2) + k * 2 * 16
    for a, skip, b in (
        (8 * e, 4 * e, 4 * e),
        (4 * e, 2 * e, 2 * e),
        (2 * e, e, e),
        (e, e // 2, e // 2),
        (e // 2, 16, 16),
    ):
        total += k * (a + skip) * b + k * b * b
    return total + k * 16 * ndim + ndim


@pytest.mark.parametrize("size", transmorph.SIZES)
@both
def test_parameters_of_transmorph(ndim, size):
    with torch.device("meta"):
        made = models.create("transmorph", ndim, size=size)
    count = models.parameter_count(made)
    assert count == counted(ndim, size)
    assert ndim == 2 or count == PUBLISHED[size]
    assert f"{count:,}" in transmorph.__doc__


@both
def test_parameters_of_vit_v_net(ndim):
    k, c, mlp, tokens = 3**ndim, 252, 3072, math.prod((5, 6, 7)[:ndim])
    total = sum(
        k * a * b + b + k * b * b + b for a, b in ((2, 16), (16, 32), (32, 32))
    )  # with bias
    total += 32 * 8**ndim * c + c + tokens * c
    total += 12 * (4 * (c * c + c) + (c * mlp + mlp) + (mlp * c + c) + 4 * c) + 2 * c
    total += k * c * 512 + 2 * 512
    for a, skip, b in ((512, 32, 96), (96, 32, 48), (48, 32, 32), (32, 32, 32), (32, 16, 16)):
        total += k * (a + skip) * b + k * b * b + 4 * b
    total += k * 16 * ndim + ndim
    with torch.device("meta"):
        count = models.parameter_count(models.create("vit_v_net", ndim))
    assert count == total
    assert ndim == 2 or count == 31_560_079
    assert f"{count:,}" in vit_v_net.__doc__


def visible(name, ndim=2, **options):
    torch.manual_seed(0)
    model = models.create(name, ndim, **options)
    with torch.no_grad():
        model.head.conv.weight.normal_(std=0.02)
    return model.eval()


def test_each_level_of_transmorph_looks_in_shifted_windows_in_turn_and_drops_more():
    model = models.create("transmorph", 3, size="tiny")
    layers = [layer for stage in model.encoder.stages for layer in stage]
    assert [layer.attention.shift for layer in layers] == [False, True] * 5
    shares = [layer.drop.share for layer in layers]
    assert shares == pytest.approx([0.3 * i / 9 for i in range(10)])
    assert all(layer.attention.window == (5, 6, 7) for layer in layers)


@pytest.mark.parametrize("name", ["transmorph", "vit_v_net"])
def test_levels_have_half_the_size_rounded_up(name):
    model = visible(name, **(TINY if name == "transmorph" else NARROW))
    sizes = []
    for module in model.up:
        module.register_forward_hook(lambda *call: sizes.append(tuple(call[2].shape[2:])))
    with torch.no_grad():
        assert model(*torch.rand(2, 1, 1, 36, 50)).disp.shape == (1, 2, 36, 50)
    # 36 and 52 after padding to multiples of 4
    assert sizes == [(3, 4), (5, 7), (9, 13), (18, 26), (36, 52)]


@pytest.mark.parametrize("name", ["transmorph", "vit_v_net"])
@pytest.mark.parametrize("shape", [(3, 2), (1, 40), (1, 1), (5, 1, 18), (1, 1, 1)])
def test_images_smaller_than_the_patch(name, shape):
    model = visible(name, len(shape), **(TINY if name == "transmorph" else NARROW))
    for made in (model, model.train()):
        disp = made(*torch.rand(2, 1, 1, *shape)).disp
        assert disp.shape == (1, len(shape), *shape) and disp.isfinite().all()


@both
def test_a_window_larger_than_the_image_is_the_image(ndim):
    small, large = (visible("transmorph", ndim, **TINY | {"window": w}) for w in (4, 9))
    pair = torch.rand(2, 1, 1, *(16,) * ndim)
    with torch.no_grad():
        for module in (*small.modules(), *large.modules()):
            if isinstance(module, attention.WindowAttention):
                module.bias.zero_()  # their tables have different sizes
        rest = {k: v for k, v in small.state_dict().items() if not k.endswith("attention.bias")}
        large.load_state_dict(rest, strict=False)
        torch.testing.assert_close(small(*pair).disp, large(*pair).disp)


@both
def test_a_diffeomorphic_transmorph_integrates_its_velocity(ndim):
    model = visible("transmorph", ndim, **TINY, diffeomorphic=True)
    assert model.steps == 7 and len(model.up) == 4  # the level at full size is not there
    pair = torch.rand(2, 1, 1, *(24, 28, 20)[:ndim])
    with torch.no_grad():
        model.head.conv.weight.zero_()
        model.head.conv.bias.fill_(0.75)
        result = model(*pair)
        full = torch.tensor([(n - 1) / (n // 2 - 1) * 0.75 for n in pair.shape[3:]])
    expected = full.reshape(1, ndim, *[1] * ndim).expand_as(result.disp)
    torch.testing.assert_close(result.svf, expected)
    torch.testing.assert_close(result.disp, expected)  # the flow of a constant is that constant
    with torch.no_grad():
        model.head.conv.weight.normal_(std=0.3)
        result = model(*pair)
    assert (result.disp - result.svf).abs().max() > 0.01
    assert (spatial.jacobian_determinant(result.disp) > 0).float().mean() > 0.99


@both
def test_a_transmorph_of_splines_writes_control_points_a_patch_apart(ndim):
    model = visible("transmorph", ndim, **TINY, bspline=True)
    assert len(model.up) == 3 and model.stem_half is None and model.stem_full is None
    pair = torch.rand(2, 1, 1, *(24, 28, 20)[:ndim])
    points = []
    model.head.register_forward_hook(lambda module, inputs, output: points.append(output))
    with torch.no_grad():
        model.head.conv.weight.normal_(std=0.3)
        disp = model(*pair).disp
    assert points[0].shape[2:] == (6, 7, 5)[:ndim] and points[0].std() > 0.1
    torch.testing.assert_close(disp, spatial.spline_disp(points[0], pair.shape[3:]))
    with pytest.raises(ValueError, match="bspline is True, expected False where diffeomorphic"):
        models.create("transmorph", ndim, **TINY, bspline=True, diffeomorphic=True)


@pytest.mark.parametrize("name", ["transmorph", "vit_v_net"])
@both
def test_saving_memory_gives_the_same_gradients(name, ndim):
    options = TINY | {"drop_path": 0.3} if name == "transmorph" else NARROW
    plain = visible(name, ndim, **options).train()
    saving = models.create(name, ndim, **options, save_memory=True).train()
    saving.load_state_dict(plain.state_dict())
    moving, fixed = torch.rand(2, 2, 1, *(40 if ndim == 2 else 24,) * ndim)
    found, kept = [], []
    for model in (plain, saving):
        torch.manual_seed(3)  # the same images are left out
        loss, held = bytes_held(lambda net=model: losses.mse(net(moving, fixed).moved, fixed))
        kept.append(held)
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))
    assert 0 < kept[1] < 0.8 * kept[0]


def test_positions_are_as_learned_on_their_grid_and_interpolated_elsewhere():
    torch.manual_seed(0)
    model = models.create("vit_v_net", 2, **NARROW, base=(64, 96))
    vit = model.vit
    assert vit.position.shape == (1, 8, 2, 3)
    with torch.no_grad():
        vit.patches.weight.zero_()
        vit.patches.bias.zero_()
        vit.position.copy_(torch.tensor([0.0, 1.0, 2.0]).expand(1, 8, 2, 3))
        vit.layers, vit.norm = nn.Identity(), nn.Identity()
        learned = vit(torch.rand(1, 4, 16, 24))
        assert torch.equal(learned, vit.position)
        finer = vit(torch.rand(1, 4, 31, 48))[0, 0, 0]  # each token in two, 6 along the axis
    torch.testing.assert_close(finer, torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.0]))


def test_dropout_is_there_in_training_alone():
    torch.manual_seed(0)
    made = attention.Attention(8, 2)
    layer = attention.TransformerLayer(8, 16, made, activation=nn.functional.gelu, dropout=0.5)
    x = torch.randn(1, 5, 8)
    assert (layer(x) - layer(x)).abs().max() > 0
    layer.eval()
    with torch.no_grad():
        y = x + made(nn.functional.layer_norm(x, (8,)))
        expected = y + layer.linear2(
            nn.functional.gelu(layer.linear1(nn.functional.layer_norm(y, (8,))))
        )
        torch.testing.assert_close(layer(x), expected)


def test_train_and_eval_return_the_model():
    model = models.create("transmorph", 2, **TINY)
    assert model.train() is model and model.eval() is model


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("transmorph", {"size": "bas"}, "size is 'bas', expected one of .* did you mean 'base'"),
        ("transmorph", {"window": (5, 6, 7)}, r"window is \(5, 6, 7\), .* or 2 of them"),
        ("transmorph", {"window": 0}, "window is 0, expected one number of 1 or more"),
        ("transmorph", {"window": (4, -1)}, r"window is \(4, -1\), expected one number of 1"),
        ("transmorph", {"window": 1000}, "window is 1000, expected at most 64"),
        ("transmorph", {"heads": (5, 2, 2, 2)}, r"heads is \(5, 2, 2, 2\), expected divisors"),
        ("transmorph", {"heads": (2, 2)}, r"heads is \(2, 2\), expected divisors"),
        ("transmorph", {"heads": (0, 2, 2, 2)}, "expected divisors of the channels"),
        ("transmorph", {"layers": (2, 2)}, r"layers is \(2, 2\), expected four numbers"),
        ("transmorph", {"channels": 0}, "channels is 0, expected an even number"),
        ("transmorph", {"channels": 7}, "channels is 7, expected an even number"),
        ("transmorph", {"drop_path": 1.0}, "share is 1.0, expected a number from 0 to below 1"),
        ("transmorph", {"steps": -1}, "steps is -1, expected 0 or more"),
        ("vit_v_net", {"heads": 5}, "heads is 5, expected a divisor of 252"),
        ("vit_v_net", {"heads": 0}, "heads is 0, expected a divisor of 252"),
        ("vit_v_net", {"base": (160, 192, 224)}, r"base is \(160, 192, 224\), expected 2 numbers"),
        ("vit_v_net", {"base": (0, 192)}, r"base is \(0, 192\), expected 2 numbers of voxels"),
        ("vit_v_net", {"encoder": (16, 32)}, r"encoder is \(16, 32\).*expected 3, 5, 1 and 1"),
        ("vit_v_net", {"decoder": (16,) * 4}, "expected 3, 5, 1 and 1 positive numbers"),
        ("vit_v_net", {"dropout": 1.0}, "dropout is 1.0 and layers 12, expected a share below 1"),
    ],
)
def test_options_that_make_no_network(name, options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        models.create(name, 2, **options)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and not text.endswith("..")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: attention.WindowAttention(6, 4, (2, 2)), "heads is 4, expected a divisor of 6"),
        (lambda: attention.WindowAttention(6, 2, (2, 0)), r"window is \(2, 0\), expected numbers"),
        (lambda: attention.WindowAttention(6, 2, ()), r"window is \(\), expected numbers of 1"),
        (
            lambda: attention.WindowAttention(6, 2, (2, 2))(torch.rand(1, 4, 4, 4, 6)),
            r"x has shape \(1, 4, 4, 4, 6\), expected .* window \(2, 2\) has",
        ),
    ],
)
def test_layers_that_cannot_be(call, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("name", ["transmorph", "vit_v_net"])
def test_weights_of_the_plane_are_refused_for_volumes(name, tmp_path):
    options = TINY if name == "transmorph" else NARROW
    path = tmp_path / "weights.safetensors"
    models.save(models.create(name, 2, **options), path)
    loaded = models.load(path)
    with pytest.raises(ValueError, match=r"moving has shape .* for this 2D model\."):
        loaded(*torch.rand(2, 1, 1, 8, 8, 8))
    volume = models.create(name, 3, **options)
    with pytest.raises(RuntimeError, match="size mismatch|Missing key"):
        volume.load_state_dict(loaded.state_dict())
