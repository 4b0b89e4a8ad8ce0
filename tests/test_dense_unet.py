"""`dense_unet_eca` against its definition, written a second time, and ECA against SciPy."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from scipy.special import expit

from regkit import models
from regkit.models import dense_unet
from regkit.models.dense_unet import ECA, eca_kernel
from regkit.training import recipes

ROOT = Path(__file__).parents[1]
both = pytest.mark.parametrize("ndim", [2, 3])
switches = pytest.mark.parametrize("dense", [True, False])
CONV = {2: F.conv2d, 3: F.conv3d}
POOL = {2: F.max_pool2d, 3: F.max_pool3d}
WIDTHS = (3, 4, 5, 6)  # all different, so that no two nodes could be exchanged


def small(ndim, seed=0, **options):
    """Four levels; the head answers with about a voxel."""
    torch.manual_seed(seed)
    model = models.create("dense_unet_eca", ndim, channels=WIDTHS, **options)
    torch.nn.init.normal_(model.head.conv.weight)
    return model.eval()


def places(dense, last):
    """j > 0 of the picture in the docstring: all of the triangle, or its right edge."""
    triangle = [(i, j) for i in range(last + 1) for j in range(1, last + 1 - i)]
    return [(i, j) for i, j in triangle if dense or i + j == last]


def convolution(c_in, c_out, ndim):
    return c_in * c_out * 3**ndim + c_out


# --- ECA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "k"),
    # (log2 C + 1) / 2 is 2, 2.5, 2.8, 3, 3.3, 3.5, 3.8, 4, 4.3, 4.5, 5
    [(8, 3), (16, 3), (24, 3), (32, 3), (48, 3), (64, 3), (96, 3)]
    + [(128, 5), (192, 5), (256, 5), (512, 5)],
)
def test_the_kernel_of_eca_is_the_odd_number_next_to_equation_2(channels, k):
    assert eca_kernel(channels) == k
    assert ECA(channels).conv.weight.shape == (1, 1, k)
    assert abs(k - (math.log2(channels) + 1) / 2) <= 1


@both
@pytest.mark.parametrize("channels", [8, 130])
def test_eca_is_mean_correlation_sigmoid_and_product(ndim, channels):
    eca = ECA(channels)
    assert [name for name, _ in eca.named_parameters()] == ["conv.weight"]  # no bias
    x = 3 * torch.randn(2, channels, *(3, 5, 4)[:ndim])
    with torch.no_grad():
        found, weights = eca(x), eca.weights(x)
    image, kernel = x.double().numpy(), eca.conv.weight.detach().double().numpy()[0, 0]
    mean = image.reshape(2, channels, -1).mean(-1)
    expected = expit(scipy.ndimage.correlate1d(mean, kernel, axis=1, mode="constant"))
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    expected = image * expected.reshape(2, channels, *[1] * ndim)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(weights.numpy()) > 0.01  # and not all the same


# --- the network --------------------------------------------------------------------------------


@both
@switches
@pytest.mark.parametrize("eca", [True, False])
def test_the_network_is_its_definition(ndim, dense, eca):
    """X(i, j) of the docstring, written as a recursion."""
    model = small(ndim, dense=dense, eca=eca)
    moving, fixed = torch.rand(2, 2, 1, *(16, 24, 8)[:ndim])
    weights, last = model.state_dict(), len(WIDTHS) - 1
    where = {place: f"nodes.{n}" for n, place in enumerate(model.places)}
    assert sorted(where) == sorted(places(dense, last))

    def convolve(x, name):
        x = CONV[ndim](x, weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"], padding=1)
        return torch.maximum(x, 0.2 * x)

    @functools.cache
    def node(i, j):
        if j == 0:
            x = POOL[ndim](node(i - 1, 0), 2) if i else torch.cat([moving, fixed], dim=1)
            return convolve(x, f"encoder.{i}")
        name, up = where[i, j], node(i + 1, j - 1)
        for axis in range(2, ndim + 2):
            up = up.repeat_interleave(2, axis)
        if eca and i + j == last:
            kernel = weights[f"{name}.attention.conv.weight"]
            up = up * torch.sigmoid(
                F.conv1d(up.flatten(2).mean(-1)[:, None], kernel, padding=kernel.shape[-1] // 2)
            ).reshape(*up.shape[:2], *[1] * ndim)
        else:
            assert f"{name}.attention.conv.weight" not in weights
        row = [node(i, k) for k in range(j)] if dense else [node(i, 0)]
        return convolve(torch.cat([*row, up], dim=1), name)

    if not dense:  # the right edge has the one below, not X(i + 1, j - 1) by another way
        assert len(where) == last
    x, head = node(0, last), "head.conv"
    expected = CONV[ndim](x, weights[f"{head}.weight"], weights[f"{head}.bias"], padding=1)
    with torch.no_grad():
        found = model(moving, fixed).disp
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# which nodes each node of four levels sees, read off the picture of the docstring
SEEN = {
    "01": "00 10", "11": "10 20", "21": "20 30",
    "02": "00 01 11", "12": "10 11 21",
    "03": "00 01 02 12",
}  # fmt: skip


@both
@pytest.mark.parametrize(
    ("dense", "seen"),
    [(True, SEEN), (False, {"21": "20 30", "12": "10 21", "03": "00 12"})],
)
def test_who_sees_whom(ndim, dense, seen):
    """By the gradient: what a node's own layers take in changes what it gives."""
    model = small(ndim, dense=dense)
    made, asked = {}, {}

    def encoded(i):
        return lambda module, inputs, output: made.setdefault(f"{i}0", output)

    def joined(i, j):
        def hook(module, inputs, output):
            made[f"{i}{j}"] = output
            gradients = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
            asked[f"{i}{j}"] = [x for x, g in zip(inputs, gradients) if g.abs().max() > 0]

        return hook

    for i, conv in enumerate(model.encoder):
        conv.register_forward_hook(encoded(i))
    for place, node in zip(model.places, model.nodes, strict=True):
        node.register_forward_hook(joined(*place))
    shape = (16, 24, 8)[:ndim]
    model(*torch.rand(2, 1, 1, *shape))
    names = {id(x): name for name, x in made.items()}
    assert {k: " ".join(sorted(names[id(x)] for x in v)) for k, v in asked.items()} == seen
    for name, x in made.items():
        i = int(name[0])
        assert x.shape == (1, WIDTHS[i], *(n // 2**i for n in shape))


@both
@switches
@pytest.mark.parametrize("channels", [(16, 32, 32, 32, 32), (3, 4, 130), (8, 16)])
def test_parameters_are_those_that_counting_says(ndim, dense, channels):
    last = len(channels) - 1
    total = convolution(2, channels[0], ndim) + convolution(channels[0], ndim, ndim)
    total += sum(convolution(channels[i], channels[i + 1], ndim) for i in range(last))
    for i, j in places(dense, last):
        left = j * channels[i] if dense else channels[i]
        total += convolution(left + channels[i + 1], channels[i], ndim)
    weighing = sum(5 if c >= 128 else 3 if c >= 8 else 1 for c in channels[1:])
    for eca in (True, False):
        model = models.create("dense_unet_eca", ndim, channels=channels, dense=dense, eca=eca)
        assert models.parameter_count(model) == total + eca * weighing
    if len(channels) == 5:
        assert weighing == 12 and f"{total + 12:,}" in dense_unet.__doc__


@both
@switches
def test_gradients_reach_every_parameter(ndim, dense):
    model = small(ndim, dense=dense).train()
    model(*torch.rand(2, 1, 1, *(16, 24, 8)[:ndim])).disp.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("shape", [(63, 65), (1, 40), (17, 9, 23)])
def test_any_size_starts_at_the_identity(shape):
    model = models.create("dense_unet_eca", len(shape))
    moving, fixed = torch.rand(2, 1, 1, *shape)
    result = model(moving, fixed)
    assert result.disp.shape == (1, len(shape), *shape)
    assert result.disp.abs().max() < 1e-3
    torch.testing.assert_close(result.moved, moving, atol=1e-3, rtol=0)


def kept(model, images):
    """Gradients, and the bytes that the way back needs, each storage once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        total = model.estimate(*images)["disp"].sum()
    total.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    size = sum(s.nbytes() for address, s in storages.items() if address not in weights)
    return [p.grad for p in model.parameters()], size


@both
def test_save_memory_keeps_the_nodes_and_changes_no_number(ndim):
    """What is kept: every node once, the pooled ones and where their maxima were, the images."""
    images = torch.rand(2, 1, 1, *(16, 32, 16)[:ndim])
    plain = models.create("dense_unet_eca", ndim).train()
    saving = models.create("dense_unet_eca", ndim, save_memory=True).train()
    saving.load_state_dict(plain.state_dict())
    (expected, plenty), (found, little) = kept(plain, images), kept(saving, images)
    assert all(map(torch.equal, expected, found))
    widths = (16, 32, 32, 32, 32)
    floats = 2 + sum(c * (5 - i) / 2 ** (i * ndim) for i, c in enumerate(widths))
    # pooled: c values and c places of 8 bytes at the next level
    floats += sum(c * 3 / 2 ** ((i + 1) * ndim) for i, c in enumerate(widths[:-1]))
    assert little == pytest.approx(4 * floats * images[0].numel(), rel=0.02)
    assert little < 0.3 * plenty


def test_a_step_at_full_size_fits_15_gigabytes_as_the_docstring_says():
    """By the estimate of studies/cost.py; above the kept nodes alone, as counted."""
    table = json.loads((ROOT / "results" / "dense_unet_eca_cost.json").read_text())
    rows = {(row["bf16"], row["save_memory"]): row for row in table["rows"]}
    assert table["shape"] == [160, 192, 160]
    text = " ".join(dense_unet.__doc__.split())
    for save, words in ((False, "about {} GB at once"), (True, "{} GB with `save_memory`")):
        peak = rows[False, save]["estimated_peak_gigabytes"]
        assert words.format(round(peak, 1)) in text
        assert 4 * 16 * 5 * math.prod(table["shape"]) / 1e9 < peak < 15


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [[8], [], [8, 0]])
def test_too_few_levels_are_one_sentence(channels):
    with pytest.raises(ValueError, match="channels is .*two levels or more") as caught:
        models.create("dense_unet_eca", channels=channels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", recipes.BUDGETS)
@both
def test_the_recipe_is_that_of_vxm2_with_a_price_on_folds(ndim, budget):
    """And with a warm-up in 2D, as vxm2 has it in 3D, and half precision where that saves time."""
    ours, theirs = (recipes.get(f"{m}_{ndim}d", budget) for m in ("dense_unet_eca", "vxm2"))
    assert ours.model == "dense_unet_eca"
    assert ours.weights == {**theirs.weights, "folding": 100.0}
    assert ours.warmup == (50 if ndim == 2 else theirs.warmup)
    assert ours.precision == ("auto" if budget in ("cpu", "gpu") else "no")
    changed = {"name": "", "model": "", "source": "", "options": {}, "weights": {}, "warmup": 0}
    changed["precision"] = theirs.precision
    assert recipes.replace(ours, **changed) == recipes.replace(theirs, **changed)
    assert ours.options in ({}, {"save_memory": True})


def test_the_protocol_of_the_paper():
    """Sections 4.1 and 4.3."""
    recipe = recipes.get("zheng2023_2d", "paper")
    assert (recipe.model, recipe.shape, recipe.atlas) == ("dense_unet_eca", (160, 192), True)
    assert recipe.subjects + recipe.validation == 416
    assert recipe.subjects == round(416 * 4 / 5)
    assert recipe.similarity == "mse"
    assert recipe.weights == {"similarity": 1.0, "diffusion": 0.01}
    assert (recipe.lr, recipe.schedule, recipe.batch) == (1e-4, "constant", 8)
    assert recipe.steps * recipe.batch == 2000 * recipe.subjects
    for budget in recipes.BUDGETS:
        other = recipes.get("zheng2023_2d", budget)
        assert (other.weights, other.atlas) == (recipe.weights, True)
