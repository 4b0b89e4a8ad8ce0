"""H-SGANet and UTSRMorph: their layers against loops, formulas and PyTorch; what they refuse."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from regkit import attention, models
from regkit.models import h_sganet, super_resolution, utsrmorph


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def count(module):
    return sum(p.numel() for p in module.parameters())


# --- the graph -----------------------------------------------------------------------------------


def neighbours_by_hand(place, shape, hop):
    """Places a multiple of hop away along one axis, inside the image."""
    for axis, size in enumerate(shape):
        for there in range(size):
            if there != place[axis] and (there - place[axis]) % hop == 0:
                yield (*place[:axis], there, *place[axis + 1 :])


@pytest.mark.parametrize(
    ("shape", "hop"),
    [((7, 10), 3), ((9, 4), 4), ((6, 1), 2), ((4, 5, 6), 2), ((5, 1, 3), 1), ((3, 7, 2), 3)],
)
def test_max_relative_is_a_loop_over_voxels(shape, hop):
    x = drawn(2, 3, *shape)
    found = h_sganet.max_relative(x, hop)
    for place in itertools.product(*map(range, shape)):
        at = (..., *place)
        others = [x[(..., *other)] - x[at] for other in neighbours_by_hand(place, shape, hop)]
        expected = torch.stack(others).amax(0) if others else torch.zeros(2, 3)
        assert torch.equal(found[at], expected), place


def test_a_relative_value_may_be_negative_and_a_tie_is_zero():
    x = torch.tensor([5.0, 1.0, 4.0, 1.0, 4.0, 1.0]).reshape(1, 1, 1, 6)
    expected = torch.tensor([-1.0, 0.0, 1.0, 0.0, 1.0, 0.0]).reshape(1, 1, 1, 6)
    assert torch.equal(h_sganet.max_relative(x, 2), expected)


def test_nothing_comes_in_from_the_far_border():
    """7 places, a hop of 3: rolling by 3 and 6 would bring the last place beside the third."""
    x = torch.zeros(1, 1, 1, 7)
    x[..., 6] = 1.0
    reached = h_sganet.max_relative(x, 3)[0, 0, 0]
    assert reached.tolist() == [1, 0, 0, 1, 0, 0, -1]  # 0, 3 and 6 are one class


@pytest.mark.parametrize("sides", [(12, 8), (8, 4, 12)])
def test_where_the_hop_divides_the_side_rolling_meets_the_same_neighbours(sides):
    x, hop = drawn(1, 2, *sides), 4
    rolled = [
        torch.roll(x, i, axis) - x
        for axis, n in enumerate(sides, start=2)
        for i in range(hop, n, hop)
    ]
    assert torch.equal(h_sganet.max_relative(x, hop), torch.stack(rolled).amax(0))


def test_a_hop_beyond_the_image_connects_nothing():
    assert not h_sganet.max_relative(drawn(1, 2, 8, 5), 8).any()
    assert h_sganet.max_relative(drawn(1, 2, 9, 5), 8).any()


def test_the_gradient_goes_through_the_neighbours():
    x = drawn(1, 2, 5, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: h_sganet.max_relative(x, 2), x)
    # of the relative value at one place: 1 at the neighbour that wins, -1 at the place
    y = torch.tensor([[[[0.0, 9.0, 3.0, 9.0, 2.0]]]], requires_grad=True)
    h_sganet.max_relative(y, 2)[0, 0, 0, 0].backward()
    assert y.grad.flatten().tolist() == [-1, 0, 1, 0, 0]


@pytest.mark.parametrize("ndim", [2, 3])
def test_gradients_of_a_graph_block(ndim):
    torch.manual_seed(0)
    block = h_sganet.GraphBlock(ndim, 8, 2).double()
    x = drawn(1, 8, *(3,) * ndim, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(block, x)


def test_a_graph_block_adds_to_what_it_sees():
    torch.manual_seed(0)
    block, x = h_sganet.GraphBlock(2, 8, 3), drawn(2, 8, 7, 5)
    y = block.before(x)
    expected = x + block.after(
        F.gelu(block.mix(torch.cat([y, h_sganet.max_relative(y, 3)], dim=1)))
    )
    torch.testing.assert_close(block(x), expected)


# --- separable attention -------------------------------------------------------------------------


def test_separable_attention_is_its_formula():
    torch.manual_seed(0)
    layer, x = h_sganet.SeparableAttention(5), drawn(2, 7, 5)
    for image in range(2):
        scores = torch.stack([layer.score.weight[0] @ token for token in x[image]])
        weights = scores.exp() / scores.exp().sum()
        context = sum(w * layer.key(token) for w, token in zip(weights, x[image], strict=True))
        for n, token in enumerate(x[image]):
            expected = layer.out(layer.value(token).clamp(min=0) * context)
            torch.testing.assert_close(layer(x)[image, n], expected)


def test_separable_attention_does_not_mind_the_order_of_tokens():
    torch.manual_seed(0)
    layer, x, order = h_sganet.SeparableAttention(4), drawn(1, 9, 4), torch.randperm(9)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])
    assert torch.autograd.gradcheck(
        layer.double(), drawn(1, 3, 4, dtype=torch.float64).requires_grad_()
    )


def test_the_bottleneck_sees_one_token_a_voxel(monkeypatch):
    """For any size the tokens are voxels and their features the channels."""
    seen = []
    forward = h_sganet.SeparableAttention.forward

    def watch(layer, x):
        seen.append(tuple(x.shape))
        return forward(layer, x)

    monkeypatch.setattr(h_sganet.SeparableAttention, "forward", watch)
    models.create("h_sganet", 2)(*torch.rand(2, 3, 1, 37, 50))
    models.create("h_sganet", 3, channels=(8, 8, 16))(*torch.rand(2, 1, 1, 8, 13, 4))
    assert seen == [(3, 5 * 7, 32), (1, 2 * 4 * 1, 16)]


def test_the_bottleneck_tells_places_from_channels():
    """What attention answers for the features of a place comes back to it, channel by channel."""
    torch.manual_seed(0)
    model, seen = models.create("h_sganet", 2), []
    model.graphs[-1].register_forward_hook(lambda m, x, y: seen.append(y))
    model.up[0].register_forward_hook(lambda m, x, y: seen.append(x[0]))
    model(*torch.rand(2, 1, 1, 24, 40))
    features, handed = seen
    places = [(i, j) for i in range(3) for j in range(5)]
    tokens = torch.stack([features[0, :, i, j] for i, j in places])
    answers = model.attention(tokens[None])[0]
    for answer, (i, j) in zip(answers, places, strict=True):
        torch.testing.assert_close(handed[0, :, i, j], torch.cat([answer, features[0, :, i, j]]))


# --- h_sganet ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ndim", "total"), [(3, 366_291), (2, 134_306)])
def test_parameters_of_h_sganet_are_counted_by_hand(ndim, total):
    """And those of the published code, as its description has them: 367,764 in 3D."""
    k, widths = 3**ndim, (16, 32, 32, 32)
    pairs = list(zip((2, *widths), widths, strict=False))
    down = sum(k * a * b for a, b in pairs)
    skips = list(zip((32, *widths[::-1]), widths[::-1], strict=False))
    up = sum(k * (above + c) * c + k * c * c for above, c in skips)
    head = k * 16 * ndim + ndim
    norms = 3 * sum(widths) + 3 * 2 * sum(widths)  # bias, and two numbers of a norm, a channel
    graphs = sum(c * c + 2 * c * c + c * c + 3 * 3 * c for c in widths)
    attention = 32 + 3 * (32 * 32 + 32)
    model = models.create("h_sganet", ndim)
    assert models.parameter_count(model) == down + up + head + norms + graphs + attention == total
    assert count(model.graphs) == graphs and count(model.attention) == attention
    for text in (h_sganet.__doc__, h_sganet.HSGANet.__doc__):
        assert f"{total:,}" in text
    if ndim == 3:
        columns = 28 + 1 + 3 * (28 * 28 + 28)
        left = 367_764 - down - up - head - columns
        assert (norms, attention - columns, graphs - left) == (1_008, 735, -3_216)
        said = h_sganet.HSGANet.__doc__
        assert "367,764 + 735 + 1,008 - 3,216 = 366,291" in said
        assert f"{graphs:,}" in said and f"{left:,}" in said


def test_the_hop_shrinks_with_the_grid():
    assert [g.hop for g in models.create("h_sganet", 2).graphs] == [20, 10, 5, 2]
    assert [g.hop for g in models.create("h_sganet", 2, hop=3).graphs] == [3, 1, 1, 1]


def test_each_level_hands_on_what_its_graph_block_adds():
    """With the convolution of a level at zero, what it hands on would be its shortcut alone."""
    torch.manual_seed(0)
    model = models.create("h_sganet", 2, channels=(8, 8, 8)).eval()
    images = torch.rand(2, 1, 1, 24, 24)
    given = []
    for conv in model.down[1:]:
        conv.register_forward_hook(lambda m, inputs, answer: given.append(inputs[0]))
    answers = []
    for graph in model.graphs:
        graph.register_forward_hook(lambda m, inputs, answer: answers.append(answer))
    model(*images)
    for x, answer in zip(given, answers, strict=False):
        torch.testing.assert_close(x, F.avg_pool2d(answer, 2))


@pytest.mark.parametrize("ndim", [2, 3])
def test_h_sganet_saves_memory_with_the_same_gradients(ndim):
    options = {"channels": (8, 8, 16), "hop": 4}
    torch.manual_seed(0)
    plain = models.create("h_sganet", ndim, **options)
    compare_saving(plain, models.create("h_sganet", ndim, save_memory=True, **options))


def compare_saving(plain, saving):
    """The same bits, and fewer bytes kept for the way back."""
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.05 * torch.randn_like(p))
    saving.load_state_dict(plain.state_dict())
    images = torch.rand(2, 1, 1, *(40,) * plain.ndim)  # two tokens along an axis at 1/32
    gradients, kept = [], []
    for model in (plain, saving):
        storages = {}

        def keep(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            result = model.train()(*images)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(s.nbytes() for at, s in storages.items() if at not in weights))
        result.moved.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
    assert all(g.abs().max() > 0 for g in gradients[0])
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"channels": (16,)}, r"channels is \(16,\), expected multiples of 8.* at least 2 levels"),
        ({"channels": (16, 20)}, r"channels is \(16, 20\), expected multiples of 8"),
        ({"channels": (16, 0)}, "expected multiples of 8"),
        ({"hop": 0}, "hop is 0, expected 1 or more"),
    ],
)
def test_h_sganet_refuses_in_one_sentence(options, sentence):
    refused("h_sganet", options, sentence)


def refused(name, options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        models.create(name, 2, **options)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


# --- super-resolution ----------------------------------------------------------------------------


def test_pixel_shuffle_is_that_of_pytorch_and_a_loop_in_3d():
    x = drawn(2, 12, 3, 5)
    assert torch.equal(super_resolution.pixel_shuffle(x), torch.nn.PixelShuffle(2)(x))
    x = drawn(2, 16, 3, 1, 2)
    found = super_resolution.pixel_shuffle(x)
    assert found.shape == (2, 2, 6, 2, 4)
    for c, i, j, k in itertools.product(range(2), range(6), range(2), range(4)):
        part = 8 * c + 4 * (i % 2) + 2 * (j % 2) + k % 2
        assert torch.equal(found[:, c, i, j, k], x[:, part, i // 2, j // 2, k // 2])


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("shape", "mode"), [((5, 1), "bilinear"), ((3, 4, 2), "trilinear")])
def test_super_resolution_starts_as_linear_interpolation(shape, mode, alone):
    x = drawn(2, 3, *shape)
    found = super_resolution.SuperResolution(len(shape), 3, alone)(x)
    torch.testing.assert_close(found, F.interpolate(x, scale_factor=2, mode=mode))


def test_each_channel_alone_or_all_of_them():
    x = drawn(1, 3, 4, 4).requires_grad_()
    for alone in (True, False):
        layer = super_resolution.SuperResolution(2, 3, alone)
        torch.nn.init.normal_(layer.conv.weight)
        gradient = torch.autograd.grad(layer(x)[:, 1].sum(), x)[0][0]
        seen = [bool(channel.abs().max() > 0) for channel in gradient]
        assert seen == ([False, True, False] if alone else [True, True, True])


# --- overlapping windows -------------------------------------------------------------------------


def test_overlapping_windows_are_those_of_unfold():
    x = drawn(2, 8, 12, 3)
    found = utsrmorph.overlapping_windows(x, (4, 4), 1)
    columns = F.unfold(x.movedim(-1, 1), kernel_size=6, stride=4, padding=1)  # (B, 3 * 36, windows)
    expected = columns.unflatten(1, (3, 36)).permute(0, 3, 2, 1).flatten(0, 1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(5, 9), (2, 7, 4)])
def test_overlapping_windows_lie_around_the_others(shape):
    """Window for window the inner places are those of `cut_windows`."""
    x, sides = drawn(2, *shape, 3), [min(4, n) for n in shape]
    larger = utsrmorph.overlapping_windows(x, sides, 1).unflatten(1, [s + 2 for s in sides])
    inner = larger[(slice(None), *[slice(1, -1)] * len(shape))].flatten(1, -2)
    assert torch.equal(inner, attention.cut_windows(x, 4)[0])


def looked_at(layer, x):
    """Overlapping attention of one image (*S, C), place by place."""
    c, heads = x.shape[-1], utsrmorph.OVERLAP_HEADS
    places = list(itertools.product(*map(range, x.shape[:-1])))
    q, k, v = (F.linear(x, w).unflatten(-1, (heads, -1)) for w in layer.qkv.weight.chunk(3))
    result = torch.zeros_like(x)
    for a in places:
        begin = [4 * (i // 4) for i in a]  # of its window
        seen = [b for b in places if all(s - 1 <= i <= s + 4 for i, s in zip(b, begin))]
        found = []
        for h in range(heads):
            scores = []
            for b in seen:
                row = 0  # key - query, each from -4 to 4 but never both ends: 0 ... 8
                for i, j, s in zip(a, b, begin, strict=True):
                    row = 9 * row + (i - s) - (j - s + 1) + 5
                scores.append(q[a][h] @ k[b][h] / math.sqrt(c / heads) + layer.bias[row, h])
            weights = torch.stack(scores).softmax(0)
            found.append(sum(w * v[b][h] for w, b in zip(weights, seen, strict=True)))
        result[a] = layer.out(torch.cat(found))
    return result


@pytest.mark.parametrize("shape", [(6, 5), (3, 9), (5, 2, 3)])
def test_overlapping_attention_is_a_loop_over_places(shape):
    torch.manual_seed(0)
    layer, x = utsrmorph.OverlapLayer(len(shape), 8), drawn(2, *shape, 8)
    torch.nn.init.normal_(layer.bias)
    with torch.no_grad():
        found = layer.attend(x)
        for one, image in zip(found, x, strict=True):
            torch.testing.assert_close(one, looked_at(layer, image), atol=1e-5, rtol=1e-5)
        mixed = x + layer.attend(layer.norm1(x))
        torch.testing.assert_close(layer(x), mixed + layer.mlp(layer.norm2(mixed)))


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_table_of_positions_is_read_from_its_first_entry_to_its_last(ndim):
    """81 or 729 differences of a query window of 4 and a key window of 6: none negative."""
    index = attention.relative_index((4,) * ndim, (4,) * ndim, (6,) * ndim, (6,) * ndim)
    assert index.unique().tolist() == list(range(9**ndim))
    assert utsrmorph.OverlapLayer(ndim, 8).bias.shape == (9**ndim, 4)


# --- the other layers of utsrmorph ---------------------------------------------------------------


def swin(ndim, channels=8):
    return attention.SwinLayer(channels, 2, (3,) * ndim, shift=True)


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_fusion_layer_is_a_swin_layer_with_a_branch(ndim):
    torch.manual_seed(0)
    layer, x = utsrmorph.FusionLayer(ndim, 8, swin(ndim)), drawn(2, *(4, 5, 3)[:ndim], 8)
    parts = layer.swin
    normed = parts.norm1(x)
    mixed = x + parts.attention(normed) + 0.01 * layer.branch(normed)
    torch.testing.assert_close(layer(x), mixed + parts.mlp(parts.norm2(mixed)))
    torch.nn.init.zeros_(layer.branch.convs[2].weight)
    torch.nn.init.zeros_(layer.branch.convs[2].bias)
    torch.testing.assert_close(layer(x), parts(x))


def test_the_branch_weighs_each_channel_of_each_image():
    torch.manual_seed(0)
    branch, x = utsrmorph.ChannelBranch(2, 60), drawn(2, 5, 4, 60)
    assert branch.convs[0].out_channels == 20 and branch.weigh[0].out_features == 2
    for image, answer in zip(x, branch(x), strict=True):
        features = branch.convs(image.permute(2, 0, 1)[None])[0]
        weights = branch.weigh(torch.stack([channel.mean() for channel in features]))
        assert 0 < weights.min() and weights.max() < 1
        expected = torch.stack([w * f for w, f in zip(weights, features, strict=True)], dim=-1)
        torch.testing.assert_close(answer, expected)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: utsrmorph.FusionLayer(2, 4, swin(2, 4)), (1, 3, 2, 4)),
        (lambda: utsrmorph.OverlapLayer(2, 4), (1, 2, 3, 4)),
        (lambda: super_resolution.SuperResolution(3, 2, True), (1, 2, 2, 1, 2)),
    ],
)
def test_gradients_of_small_layers(make, shape):
    torch.manual_seed(0)
    layer = make().double()
    assert torch.autograd.gradcheck(layer, drawn(*shape, dtype=torch.float64).requires_grad_())


# --- utsrmorph -----------------------------------------------------------------------------------

# counted by running the published code
PUBLISHED = {
    ("oasis", "small"): 20_417_999,
    ("oasis", "base"): 89_943_159,
    ("oasis", "large"): 421_495_867,
    ("ixi", "small"): 62_737_103,
    ("ixi", "base"): 250_633_919,
    ("ixi", "large"): 321_842_143,
}


def counted(form, size, ndim):
    """Parameters of UTSRMorph, layer by layer."""
    e, depths, heads = utsrmorph.SIZES[form][size]
    k, parts, windows = 3**ndim, 2**ndim, (5, 6, 7)[:ndim]
    total = 2 * e * 4**ndim + e + 2 * e  # patches and their norm
    for level, (layers, h) in enumerate(zip(depths, heads, strict=True)):
        c = e * 2**level
        table = math.prod(2 * w - 1 for w in windows) * h
        block = 4 * c * c + c + 8 * c * c + 5 * c + 4 * c  # attention, MLP, two norms
        narrow, squeezed = c // 3, c // 30
        branch = 2 * k * c * narrow + narrow + c + 2 * c * squeezed + squeezed + c
        total += layers * (block + table + branch) + block + 9**ndim * 4
        total += 2 * c  # the norm behind a level
        total += 2 * parts * c + 2 * parts * c * c if level < 3 else 0  # merging
    skips = [4 * e, 2 * e, e, e // 2, 16][: 4 if form == "oasis" else 5]
    outputs, c = [*skips[:-1], 16], 8 * e
    for skip, out in zip(skips, outputs, strict=True):
        total += k * parts * c * (1 if form == "oasis" else c) + parts * c
        total += k * (c + skip) * out + k * out * out
        c = out
    total += k * 2 * e // 2 + (0 if form == "oasis" else k * 2 * 16)  # stems
    total += k * 16 * ndim + ndim
    return total + (parts * ndim * (k + 1) if form == "oasis" else 0)


@pytest.mark.parametrize(("form", "size"), list(PUBLISHED))
@pytest.mark.parametrize("ndim", [2, 3])
def test_parameters_of_utsrmorph_are_the_published_ones(form, size, ndim):
    with torch.device("meta"), models._NothingDrawn():
        model = models.create("utsrmorph", ndim, form=form, size=size)
    found = models.parameter_count(model)
    assert found == counted(form, size, ndim)
    assert f"{found:,}" in utsrmorph.__doc__
    if ndim == 3:
        assert found == PUBLISHED[form, size]


def test_by_default_it_is_base_in_3d_and_small_in_2d():
    for ndim, size in ((3, "base"), (2, "small")):
        with torch.device("meta"), models._NothingDrawn():
            made = [models.create("utsrmorph", ndim, **o) for o in ({}, {"size": size})]
        assert count(made[0]) == count(made[1])
        assert f"{count(made[0]):,}" in utsrmorph.UTSRMorph.__doc__


TINY = {"channels": 12, "layers": (1, 2, 1, 1), "heads": (2, 2, 2, 2), "window": 3}


def tiny(ndim, **options):
    torch.manual_seed(0)
    return models.create("utsrmorph", ndim, **{**TINY, "drop_path": 0.0, **options})


@pytest.mark.parametrize("form", utsrmorph.SIZES)
def test_a_constant_head_is_a_translation_in_voxels_of_the_image(form):
    model = tiny(2, form=form)
    with torch.no_grad():
        model.head.conv.weight.zero_()
        model.head.conv.bias.copy_(torch.tensor([1.5, -0.75]))
        disp = model(*torch.rand(2, 1, 1, 21, 40)).disp
    expected = torch.tensor([1.5, -0.75]).reshape(1, 2, 1, 1).expand(1, 2, 21, 40)
    torch.testing.assert_close(disp, expected)


def test_the_ends_of_both_forms():
    """ "oasis" answers on half the grid and brings the displacement to the whole."""
    for form, share in (("oasis", 2), ("ixi", 1)):
        model, seen = tiny(2, form=form), []
        model.head.register_forward_hook(lambda m, x, y, seen=seen: seen.append(y.shape[2:]))
        model(*torch.rand(2, 1, 1, 24, 40))
        assert seen == [(24 // share, 40 // share)]


def test_each_level_ends_in_an_overlapping_layer_and_shifts_every_second_window():
    for stage in tiny(2, layers=(2, 3, 1, 1)).encoder.stages:
        *layers, last = stage
        assert isinstance(last, utsrmorph.OverlapLayer)
        shifts = [layer.swin.attention.shift for layer in layers]
        assert shifts == [i % 2 == 1 for i in range(len(layers))]


def test_without_its_own_layers_it_is_a_transmorph():
    """Branches at 0, no overlapping layers, a super-resolution as it starts: "ixi" is the same."""
    torch.manual_seed(0)
    options = {**TINY, "drop_path": 0.0}
    plain = models.create("transmorph", 2, **options)
    model = tiny(2, form="ixi")
    encoder, other = model.encoder, plain.encoder
    for stage, theirs in zip(encoder.stages, other.stages, strict=True):
        for layer, swin_layer in zip(stage, theirs, strict=False):
            layer.swin.load_state_dict(swin_layer.state_dict())
            layer.branch = torch.nn.Module()
            layer.branch.forward = torch.zeros_like
        stage[-1].layers = lambda x: x
    for part in ("down", "norms"):
        getattr(encoder, part).load_state_dict(getattr(other, part).state_dict())
    for part in ("stem_half", "stem_full", "head"):
        getattr(model, part).load_state_dict(getattr(plain, part).state_dict())
    for block, theirs in zip(model.up, plain.up, strict=True):
        block.first, block.second = theirs.first, theirs.second
    images = torch.rand(2, 1, 1, 37, 50)
    with torch.no_grad():
        expected = plain(*images).disp
        torch.testing.assert_close(
            model(*images).disp, expected, atol=1e-4 * float(expected.abs().max()), rtol=0
        )


@pytest.mark.parametrize(("form", "ndim"), [("oasis", 2), ("oasis", 3), ("ixi", 2)])
def test_utsrmorph_saves_memory_with_the_same_gradients(form, ndim):
    compare_saving(tiny(ndim, form=form), tiny(ndim, form=form, save_memory=True))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": "bas"}, "size is 'bas', expected one of small, base, large; did you mean 'base'"),
        ({"form": "OASIS"}, "form is 'OASIS', expected one of oasis, ixi"),
        ({"channels": 6}, "channels is 6, expected a multiple of 4"),
        ({"channels": 12, "heads": (5, 4, 4, 4)}, r"heads is \(5, 4, 4, 4\), expected divisors"),
        ({"channels": 12, "layers": (2, 2)}, r"layers is \(2, 2\), expected four"),
        ({"window": 0}, "window is 0, expected one number of 1 or more"),
        ({"window": (2, 3, 4)}, r"window is \(2, 3, 4\), expected"),
        ({"channels": 12, "heads": (2, 2, 2, 2), "drop_path": 1.0}, "share is .*below 1"),
    ],
)
def test_utsrmorph_refuses_in_one_sentence(options, sentence):
    refused("utsrmorph", options, sentence)


# --- both ----------------------------------------------------------------------------------------

SMALL = {
    "h_sganet": {"channels": (8, 8, 16), "hop": 4},
    "utsrmorph": {**TINY, "drop_path": 0.0},
}


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, s) for name in SMALL for s in [(1, 1), (3, 2), (1, 21), (1, 1, 1), (5, 1, 9)]],
)
def test_images_smaller_than_a_patch_and_axes_of_one_voxel(name, shape):
    model = models.create(name, len(shape), **SMALL[name]).train()
    result = model(*torch.rand(2, 2, 1, *shape))
    assert result.disp.shape == (2, len(shape), *shape) and torch.isfinite(result.disp).all()


@pytest.mark.parametrize("name", SMALL)
def test_double_precision_and_weights_of_another_dimension(name, tmp_path):
    model = models.create(name, 2, **SMALL[name]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    images = torch.rand(2, 1, 1, 20, 24, dtype=torch.float64)
    double = model(*images).disp
    assert double.dtype == torch.float64
    torch.testing.assert_close(
        model.float()(*images.float()).disp.double(), double, atol=1e-3, rtol=1e-3
    )
    with pytest.raises(ValueError, match=r"expected \(B, 1, H, W\) for this 2D model"):
        model(*torch.rand(2, 1, 1, 8, 8, 8))
