"""H-SGANet and UTSRMorph: their layers against loops, formulas and PyTorch; what they refuse."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from regkit import models
from regkit.models import h_sganet


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
    images = torch.rand(2, 1, 1, *(32,) * plain.ndim)
    gradients, kept = [], []
    for model in (plain, saving):
        storages = {}

        def keep(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            result = model.train()(*images)
        kept.append(sum(s.nbytes() for s in storages.values()))
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


# --- both ----------------------------------------------------------------------------------------

SMALL = {"h_sganet": {"channels": (8, 8, 16), "hop": 4}}


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
