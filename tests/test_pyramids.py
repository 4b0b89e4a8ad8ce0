"""Two-stream pyramids against loops in NumPy, analytic maps, and what each block promises."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from test_acceptance import peak_memory
from test_models import pair
from torch import nn

from regkit import blocks, losses, models, spatial
from regkit.models import Registration, dilformer, dual_prnet
from regkit.training import recipes, train
from regkit.training.objective import objective

both = pytest.mark.parametrize("ndim", [2, 3])
either = pytest.mark.parametrize("name", ["dual_prnet", "dilformer"])
SMALL = {
    "dual_prnet": {"channels": (2, 3, 4)},
    "dilformer": {"channels": (2, 6, 6), "layers": 1},
}
SHAPE = {2: (19, 22), 3: (8, 11, 9)}


def create(name, ndim=2, **options):
    torch.manual_seed(0)
    return models.create(name, ndim, **{**SMALL[name], **options}).eval()


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.5


# --- neighbours ----------------------------------------------------------------------------------


def around(x, shape, radius, dilation):
    """(k, neighbour of x or None where it lies outside) one after the other."""
    steps = itertools.product(range(-radius, radius + 1), repeat=len(shape))
    for k, step in enumerate(steps):
        y = tuple(i + dilation * s for i, s in zip(x, step, strict=True))
        yield k, y if all(0 <= i < n for i, n in zip(y, shape, strict=True)) else None


@both
@pytest.mark.parametrize(("radius", "dilation"), [(1, 1), (2, 1), (1, 3), (1, 9)])
def test_correlation_against_a_loop(radius, dilation, ndim):
    shape = (5, 7) if ndim == 2 else (3, 4, 5)
    a, b = rand(2, 3, *shape, seed=1), rand(2, 3, *shape, seed=2)
    found = blocks.local_correlation(a, b, radius, dilation).numpy()
    a, b = a.numpy(), b.numpy()
    expected = np.zeros((2, (2 * radius + 1) ** ndim, *shape))
    for n, x in itertools.product(range(2), np.ndindex(shape)):
        for k, y in around(x, shape, radius, dilation):
            if y is not None:
                expected[(n, k, *x)] = np.mean(a[(n, slice(None), *x)] * b[(n, slice(None), *y)])
    np.testing.assert_allclose(found, expected, atol=1e-12)


@both
@pytest.mark.parametrize("dilation", [1, 2, 9])
def test_attention_against_a_loop(dilation, ndim):
    """Outside the image nothing is looked at; far apart neighbours leave a place with itself."""
    shape = (5, 4) if ndim == 2 else (3, 4, 3)
    q, k, v = (4 * rand(1, 3, *shape, seed=i) for i in range(3))
    found = blocks.neighbour_attention(q, k, v, dilation=dilation)[0].numpy()
    for x in np.ndindex(shape):
        seen = [y for _, y in around(x, shape, 1, dilation) if y is not None]
        scores = [float(q[(0, slice(None), *x)] @ k[(0, slice(None), *y)]) for y in seen]
        weights = np.exp(np.array(scores) / math.sqrt(3))
        values = np.array([v[(0, slice(None), *y)].numpy() for y in seen])
        np.testing.assert_allclose(
            found[(slice(None), *x)], weights @ values / weights.sum(), atol=1e-12
        )
    if dilation == 9:
        np.testing.assert_allclose(found, v[0].numpy(), atol=1e-12)


@pytest.mark.slow
@both
@pytest.mark.parametrize("dilation", [1, 2])
def test_gradients_of_what_looks_at_neighbours(dilation, ndim):
    shape = (3, 4) if ndim == 2 else (2, 3, 2)
    q, k, v = (rand(1, 2, *shape, seed=i).requires_grad_() for i in range(3))
    assert torch.autograd.gradcheck(
        lambda a, b: blocks.local_correlation(a, b, 1, dilation), (q, k)
    )
    assert torch.autograd.gradcheck(
        lambda *x: blocks.neighbour_attention(*x, dilation=dilation), (q, k, v)
    )


@pytest.mark.parametrize(("ndim", "radius"), [(2, 1), (2, 3), (3, 1), (3, 2)])
def test_the_correlation_takes_little_more_memory_than_its_result(ndim, radius):
    """Beyond its inputs at most 1.5 times its result, ready for a gradient or not."""
    a, b = torch.rand(2, 1, 32, *(64, 48) if ndim == 2 else (16, 12, 20))
    held = []

    def run():
        held.append(blocks.local_correlation(a, b, radius))

    for wants in (False, True):
        a.requires_grad_(wants)
        peak = peak_memory(run)
        own = held[-1].numel() * held[-1].element_size()
        assert own <= peak <= 1.5 * own
    assert peak_memory(lambda: held.append(a[:, :, None] * b[:, :, None])) > 0  # it does count


def test_under_autocast_correlations_are_float32():
    a, b = torch.rand(2, 1, 8, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = blocks.local_correlation(a.bfloat16(), b.bfloat16())
    assert found.dtype == torch.float32


# --- the pyramid ---------------------------------------------------------------------------------


class GivenStep(nn.Module):
    """A head whose step is x -> M x + t, from the corner, in voxels of its level."""

    def __init__(self, linear, shift):
        super().__init__()
        self.linear, self.shift, self.seen = linear, shift, None

    def forward(self, moving, fixed, handed):
        self.seen = moving
        shape = fixed.shape[2:]
        grid = spatial.identity_grid(shape).flatten(1)
        step = self.linear @ grid + self.shift[:, None]
        return step.reshape(1, -1, *shape).expand(len(fixed), -1, *[-1] * len(shape)), None


class Places(nn.Module):
    """Features that say where they are: the places of each level's grid."""

    def __init__(self, levels):
        super().__init__()
        self.levels = levels

    def forward(self, images):
        sizes = [(n - 1) for n in images.shape[2:]]
        shapes = [[n // 2**k + 1 for n in sizes] for k in reversed(range(self.levels))]
        return [spatial.identity_grid(s).expand(len(images), -1, *[-1] * len(s)) for s in shapes]


def given(name, ndim, maps):
    model = create(name, ndim)
    model.describe = Places(len(maps))
    model.heads = nn.ModuleList(GivenStep(*m) for m in maps)
    return model


@either
@both
def test_shifts_of_all_levels_add_up_in_voxels_of_the_image(ndim, name):
    """A level's voxel is 4, 2, 1 voxels of the image: exactly, with the grids of `Pyramid`."""
    shifts = [torch.tensor(t)[:ndim] for t in ([1.0, -0.5, 0.25], [0.5, 1, -1], [-1.0, 0.25, 0])]
    model = given(name, ndim, [(torch.zeros(ndim, ndim), t) for t in shifts])
    result = model(*pair(SHAPE[ndim], batch=2))
    first, second = 4 * shifts[0], 4 * shifts[0] + 2 * shifts[1]
    totals = [first, second, second + shifts[2]]
    assert len(result.stages) == 3
    for stage, total in zip(result.stages, totals, strict=True):
        expected = total.reshape(1, -1, *[1] * ndim).expand(2, ndim, *SHAPE[ndim])
        torch.testing.assert_close(stage, expected, atol=1e-4, rtol=0)
    assert torch.equal(result.stages[-1], result.disp)


@either
@both
def test_levels_are_composed_and_features_follow(ndim, name):
    """Steps that shrink, turn and shift, so that all lookups stay inside: their maps in turn."""
    eye = np.eye(ndim)
    turn = np.zeros((ndim, ndim))
    turn[0, 1], turn[1, 0] = 0.05, -0.04
    maps = [(-0.3 * eye + turn, 0.3), (-0.2 * eye - turn, 0.6), (-0.1 * eye + turn, 0.9)]
    as_tensors = [(torch.tensor(m, dtype=torch.float32), torch.full((ndim,), t)) for m, t in maps]
    shape = (16,) * ndim
    model = given(name, ndim, as_tensors)
    found = model(*pair(shape)).stages
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(ndim, -1)
    for last in range(3):
        y = places.astype(float)
        for k in reversed(range(last + 1)):  # the last step is asked first
            linear, shift = maps[k]
            y = y + linear @ y + shift * 2 ** (2 - k)
        expected = (y - places).reshape(ndim, *shape)
        assert y.min() > 0 and y.max() < 15
        np.testing.assert_allclose(found[last][0].numpy(), expected, atol=1e-4)
    added = sum(m @ places + t * 2 ** (2 - k) for k, (m, t) in enumerate(maps))
    assert np.abs(added.reshape(ndim, *shape) - expected).max() > 0.5  # composing is not adding
    # a head sees the moving features where the levels before it have put them
    assert torch.equal(model.heads[0].seen[0], spatial.identity_grid((5,) * ndim))
    with torch.no_grad():
        inside = (..., *[slice(0, 16)] * ndim)
        seen = model.heads[2].seen[0][inside]
        expected = spatial.identity_grid(shape) + found[1][0]
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)


@either
@both
def test_beyond_the_border_features_are_those_at_the_border(ndim, name):
    """A level that looks out of the image sees its last place again, not zeros."""
    shift = torch.tensor([1.5, -1.25, 1.0])[:ndim]  # at half the size
    still = torch.zeros(ndim, ndim)
    model = given(name, ndim, [(still, shift), (still, torch.zeros(ndim))])
    model(*pair((16,) * ndim))
    places = spatial.identity_grid((17,) * ndim) + 2 * shift.reshape(-1, *[1] * ndim)
    assert places.min() < 0 and places.max() > 16
    torch.testing.assert_close(model.heads[1].seen[0], places.clamp(0, 16), atol=1e-4, rtol=0)


@either
@both
def test_both_streams_have_the_same_weights(ndim, name):
    model = create(name, ndim)
    features = []
    model.describe.register_forward_hook(lambda _, args, out: features.append(out))
    moving, fixed = pair(SHAPE[ndim])
    with torch.no_grad():
        model(moving, fixed), model(fixed, moving), model(fixed, fixed)
    for there, back, same in zip(*features, strict=True):
        assert len(there) == 2  # one image is one stream
        torch.testing.assert_close(there, back.flip(0))
        torch.testing.assert_close(same[0], same[1])
        torch.testing.assert_close(same[0], there[1])
        assert (there[0] - there[1]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"correlation": 1}])
@both
def test_the_features_have_the_sizes_of_their_levels(ndim, options):
    for name in ("dual_prnet", "dilformer"):
        model = create(name, ndim, **options if name == "dual_prnet" else {})
        features = model.describe(torch.rand(1, 1, *(17,) * ndim))
        assert [f.shape[2] for f in features] == [5, 9, 17]
        assert model.divisor == 4 and model.levels == 3


def conv(c_in, c_out, ndim, kernel=3):
    return c_in * c_out * kernel**ndim + c_out


def count_dual_prnet(ndim, correlation):
    c = (8, 16, 16, 32, 32)
    total = sum(conv(a, b, ndim) for a, b in zip((1, *c), c, strict=False))
    total += sum(conv(a + b, b, ndim) for b, a in itertools.pairwise(c))
    for n in c:
        total += conv(2 * n + (3**ndim if correlation else 0), n, ndim) + 3 * conv(n, n, ndim)
        total += conv(n, ndim, ndim)
    return total


def count_dilformer(ndim, msr=True, dilformer=True, srf=True):
    c = (8, 16, 32, 48, 96)
    total = conv(1, c[0], ndim) + sum(conv(a, b, ndim) for a, b in itertools.pairwise(c))
    if msr:
        total += sum(conv(n, n // 2, ndim) + conv(n // 2, n // 2, ndim) + n * n + n for n in c[1:])
    for k, (above, n) in enumerate(itertools.pairwise((0, *c[::-1]))):
        total += 2 * n * n + n + conv(n, ndim, ndim)  # the join and the step
        one_filter = 3**ndim + 1  # a channel
        if k < 2 and dilformer:  # position; norms; attention; the wider part and its filters
            layer = n * one_filter + 4 * n + (3 * n * n + 3 * n) + (n * n + n)
            total += 2 * (layer + (2 * n * n + 2 * n) + 2 * n * one_filter + (2 * n * n + n))
        wide = above + n
        total += (wide * n + n + ndim * (3 * n * n + n)) if srf else conv(wide, n, ndim)
    return total


def test_parameter_counts_layer_by_layer_and_in_the_docstrings():
    for module, name, count in (
        (dual_prnet, "dual_prnet", lambda d: count_dual_prnet(d, 0)),
        (dilformer, "dilformer", count_dilformer),
    ):
        found = [models.parameter_count(models.create(name, d)) for d in (3, 2)]
        assert found == [count(3), count(2)]
        assert f"{name} {found[0]:,} / {found[1]:,}" in " ".join(module.__doc__.split())
    plus = [models.parameter_count(models.create("dual_prnet", d, correlation=1)) for d in (3, 2)]
    assert plus == [count_dual_prnet(3, 1), count_dual_prnet(2, 1)]
    assert f"with correlation=1 {plus[0]:,} / {plus[1]:,}" in " ".join(dual_prnet.__doc__.split())
    assert count_dilformer(3) <= 5_000_000  # issue: at most 5 million
    for switch in ("msr", "dilformer", "srf"):
        for d in (2, 3):
            model = models.create("dilformer", d, **{switch: False})
            assert models.parameter_count(model) == count_dilformer(d, **{switch: False})


def test_correlations_find_a_shift_that_features_alone_do_not_point_to():
    """Features of one voxel moved by one: the product is where it went."""
    fixed = torch.zeros(1, 1, 7, 7)
    fixed[0, 0, 3, 3] = 1
    moving = torch.roll(fixed, (1, -1), (2, 3))
    found = blocks.local_correlation(fixed, moving)[0, :, 3, 3]
    assert blocks.neighbours(2)[int(found.argmax())] == (1, -1)


# --- Dilformer -----------------------------------------------------------------------------------


def reach(module, channels, ndim, size=17):
    """Places along the first axis that the middle of the answer depends on, from its gradient."""
    x = torch.rand(1, channels, *(size,) * ndim, requires_grad=True)
    middle = (slice(None), slice(None), *[size // 2] * ndim)
    module(x)[middle].square().sum().backward()
    others = tuple(i for i in range(x.ndim) if i != 2)
    seen = torch.nonzero(x.grad.abs().sum(others)).flatten() - size // 2
    return seen.tolist()


@both
def test_each_rate_sees_as_far_as_it_says(ndim):
    for rate in (1, 2, 3):
        for layer in (dilformer.DilatedAttention, dilformer.DilatedMLP):
            torch.manual_seed(0)
            assert reach(layer(ndim, 2, (rate,)), 2, ndim, 9) == [-rate, 0, rate]
    for layer in (dilformer.DilatedAttention, dilformer.DilatedMLP):
        mixed = layer(ndim, 6, (1, 2, 3))
        assert reach(mixed, 6, ndim, 9) == list(range(-3, 4))
    # a layer: 1 for the position, 3 for the attention, 3 for the wider part
    whole = reach(dilformer.DilformerLayer(ndim, 6, (1, 2, 3)), 6, ndim, 15)
    assert whole == list(range(-7, 8))


@both
def test_msr_and_srf_see_what_their_kernels_say(ndim):
    torch.manual_seed(0)
    assert reach(dilformer.MSR(ndim, 4), 4, ndim, 9) == list(range(-2, 3))
    fuse = dilformer.SRF(ndim, 5, 3)
    assert reach(fuse, 5, ndim, 9) == [-1, 0, 1]
    shapes = [tuple(m.weight.shape[2:]) for m in fuse.along_axes if hasattr(m, "weight")]
    assert shapes == [tuple(3 if i == axis else 1 for i in range(ndim)) for axis in range(ndim)]


@pytest.mark.parametrize(
    ("switch", "part"),
    [("msr", dilformer.MSR), ("dilformer", dilformer.DilformerLayer), ("srf", dilformer.SRF)],
)
def test_each_switch_takes_its_block_away_and_no_other(switch, part):
    parts = (dilformer.MSR, dilformer.DilformerLayer, dilformer.SRF)
    whole, less = create("dilformer"), create("dilformer", **{switch: False})
    for kind in parts:
        before, after = (sum(isinstance(m, kind) for m in x.modules()) for x in (whole, less))
        assert before > 0 and after == (0 if kind is part else before)
    assert less(*pair(SHAPE[2])).disp.shape == (1, 2, *SHAPE[2])


def test_without_multi_resolution_the_answer_is_the_same_and_shows_no_levels():
    many, one = create("dilformer"), create("dilformer", multi_resolution=False)
    found, alone = many(*pair(SHAPE[2])), one(*pair(SHAPE[2]))
    assert torch.equal(found.disp, alone.disp) and len(found.stages) == 3
    assert alone.stages == () and one.levels == 0


# --- the objective -------------------------------------------------------------------------------


def halved(image):
    """Mean of the 3 x 3 voxels around every second one, as far as they exist."""
    rows, columns = image.shape
    result = np.zeros(((rows + 1) // 2, (columns + 1) // 2))
    for i, j in np.ndindex(result.shape):
        block = image[max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2]
        result[i, j] = block.mean()
    return result


def test_the_objective_on_every_level_against_a_computation_by_hand():
    generator = np.random.default_rng(0)
    moving, fixed = generator.random((2, 9, 13))
    rows = np.arange(9.0)[:, None] + np.zeros((9, 13))
    finest = np.stack([0 * rows, 0 * rows + 1])  # one voxel along axis 1
    middle = np.stack([0.2 * rows, 0 * rows])
    coarsest = np.stack([0 * rows + 4, 0 * rows])  # one voxel at 1/4
    stages = tuple(torch.tensor(u, dtype=torch.float32)[None] for u in (coarsest, middle, finest))
    images = {
        name: torch.tensor(image, dtype=torch.float32)[None, None]
        for name, image in (("moving", moving), ("fixed", fixed))
    }
    result = Registration(
        moved=spatial.warp(images["moving"], stages[-1]), disp=stages[-1], stages=stages
    )
    recipe = recipes.get(
        "vxm_2d", "smoke", similarity="mse", levels=(0.25, 0.5, 2.0),
        weights={"similarity": 1.0, "diffusion": 0.1},
    )  # fmt: skip
    terms = objective(result, images, recipe)

    shifted = np.concatenate([moving[:, 1:], np.zeros((9, 1))], axis=1)
    expected = 2.0 * np.mean((shifted - fixed) ** 2)
    m, f = halved(moving), halved(fixed)  # 5 x 7
    places = np.stack(np.meshgrid(np.arange(5) * 1.2, np.arange(7), indexing="ij"))
    padded = np.pad(m, 1)
    looked_up = map_coordinates(padded, places + 1, order=1, mode="constant")
    expected += 0.5 * np.mean((looked_up - f) ** 2)
    m, f = halved(m), halved(f)  # 3 x 4
    expected += 0.25 * np.mean((np.concatenate([m[1:], np.zeros((1, 4))]) - f) ** 2)
    assert float(terms["similarity"]) == pytest.approx(expected, rel=1e-5)
    # only the middle one has a slope: 0.2 of component 0 along axis 0, also in its own voxels
    by_hand = 0.5 * float(losses.diffusion(torch.tensor(middle)[None]))
    assert by_hand > 0 and float(terms["diffusion"]) == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("shape", [(16, 40), (20, 16, 24)])
def test_images_too_small_to_be_compared_on_every_level_are_one_sentence(shape, tmp_path):
    """The network takes 16 voxels; the last image but one of its objective has two, and no mean."""
    sentence = "expected at least 17 voxels along each axis, so that images can be compared on 5"
    recipe = recipes.get(f"dual_prnet_{len(shape)}d", "smoke", shape=shape)
    with pytest.raises(ValueError, match=sentence):
        train(recipe, tmp_path / "run", progress=False, device="cpu")
    assert not list(tmp_path.iterdir())


def test_weights_of_levels_count_each_its_own():
    model = create("dual_prnet")
    with torch.no_grad():
        for head in model.heads:
            head.step.conv.bias.normal_()
    moving, fixed = pair((20, 24))
    with torch.no_grad():
        result = model(moving, fixed)
        batch = {"moving": moving, "fixed": fixed}
        plain = recipes.get("vxm_2d", "smoke", similarity="mse")

        def at(*levels):
            recipe = recipes.replace(plain, levels=levels)
            return {k: float(v) for k, v in objective(result, batch, recipe).items()}

        alone = objective(result, batch, plain)
        last = at(0.0, 0.0, 1.0)
        assert last == pytest.approx({k: float(v) for k, v in alone.items()}, rel=1e-6, abs=1e-9)
        parts = [at(1.0, 0.0, 0.0), at(0.0, 1.0, 0.0), last]
        whole = at(0.25, 3.0, 2.0)
    for term in ("similarity", "diffusion"):
        expected = sum(w * p[term] for w, p in zip((0.25, 3.0, 2.0), parts, strict=True))
        assert whole[term] == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_recipes_without_levels_keep_their_identity():
    recipe = recipes.get("vxm_2d", "cpu")
    told = json.loads(json.dumps(recipes.plan(recipe)))
    assert told.pop("levels") is None
    assert recipes.complete(told)["levels"] is None
    assert recipes.identity(recipe) != recipes.identity(recipes.replace(recipe, levels=(1.0,)))
    for name in ("dual_prnet_2d", "dual_prnet_3d", "dilformer_2d", "dilformer_3d"):
        for budget in recipes.BUDGETS:
            recipe = recipes.get(name, budget)
            model = models.create(recipe.model, recipe.ndim, **recipe.options)
            assert len(recipe.levels) == model.levels == 5
            assert min(recipe.shape) >= model.divisor


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
@either
def test_a_pyramid_is_trained_like_any_other_model(name, precision, monkeypatch, tmp_path):
    monkeypatch.setenv("REGKIT_DATA", str(tmp_path))
    recipe = recipes.get(
        f"{name}_2d", "smoke", options=SMALL[name], levels=(0.25, 0.5, 1.0), precision=precision,
        steps=2, validate_every=2, shape=(32, 40), lr=0.01, warmup=0,
    )  # fmt: skip
    trained = train(recipe, progress=False, device="cpu")
    for entry in trained.history:
        terms = sum(weight * entry[name] for name, weight in recipe.weights.items())
        assert entry["loss"] == pytest.approx(terms, rel=1e-5)
    assert trained.history[0]["diffusion"] < 1e-6 < trained.history[1]["diffusion"]
    assert "dice" in trained.history[-1]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "levels", "parts"),
    [
        ("dual_prnet", SMALL["dual_prnet"], (1.0, 1.0), ["expected", "'dual_prnet' 3 numbers"]),
        ("dual_prnet", SMALL["dual_prnet"], (), ["levels is ()", "3 numbers, one a level"]),
        ("dilformer", {"multi_resolution": False}, (1.0,), ["'dilformer' None", "no levels"]),
        ("vxm", {}, (1.0,), ["levels is (1.0,)", "'vxm' None: it shows no levels"]),
    ],
)
def test_weights_of_levels_that_do_not_fit(model, options, levels, parts, tmp_path):
    recipe = recipes.get("vxm_2d", "smoke", model=model, options=options, levels=levels)
    with pytest.raises(ValueError) as caught:
        train(recipe, out=tmp_path / "run", progress=False, device="cpu")
    sentence = str(caught.value)
    for part in parts:
        assert part in sentence
    assert "\n" not in sentence and sentence.endswith(".")
    assert not (tmp_path / "run").exists()
    stage = torch.zeros(1, 2, 8, 8)
    image = torch.rand(1, 1, 8, 8)
    result = Registration(moved=image, disp=stage, stages=(stage,) * 4)
    with pytest.raises(ValueError, match="levels is .*expected for the model .* 4 numbers"):
        objective(result, {"moving": image, "fixed": image}, recipe)


def test_both_directions_of_a_pyramid_are_refused():
    model = create("dual_prnet")
    recipe = recipes.get("dual_prnet_2d", "smoke", bidirectional=True, levels=(1.0, 1.0, 1.0))
    moving, fixed = pair((16, 16))
    with pytest.raises(ValueError, match="bidirectional is on .*expected a model with a velocity"):
        objective(model(moving, fixed), {"moving": moving, "fixed": fixed}, recipe)


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("dual_prnet", {"channels": (8,)}, ["channels is (8,)", "at least 2 levels"]),
        ("dilformer", {"channels": (8, 0)}, ["channels is (8, 0)", "a positive number a level"]),
        ("dual_prnet", {"correlation": -1}, ["correlation is -1", "expected 0 or more"]),
        ("dilformer", {"channels": (2, 4, 6)}, ["channels is (2, 4, 6)", "multiples of 3"]),
        ("dilformer", {"dilations": ()}, ["dilations is ()", "1 or more"]),
        ("dilformer", {"dilations": (1, 0)}, ["dilations is (1, 0)", "1 or more"]),
        ("dilformer", {"layers": 0}, ["layers is 0", "dilformer=False"]),
        ("dilformer", {"colour": "red"}, ["colour"]),
    ],
)
def test_options_that_make_no_network_are_one_sentence(name, options, parts):
    with pytest.raises(ValueError) as caught:
        models.create(name, 2, **options)
    sentence = str(caught.value)
    for part in (f"do not fit the model {name!r}", *parts):
        assert part in sentence
    assert "\n" not in sentence and sentence.endswith(".") and not sentence.endswith("..")


@either
@both
def test_images_too_small_for_the_levels(ndim, name):
    """The smallest size that is named is taken, one voxel less is not."""
    model = create(name, ndim)
    small = (3, *(20,) * (ndim - 1))
    with pytest.raises(ValueError) as caught:
        model(*pair(small))
    sentence = str(caught.value)
    assert f"fixed has the size {small}, expected at least 4 voxels along each axis" in sentence
    assert "3 levels" in sentence and "\n" not in sentence and sentence.endswith(".")
    assert model(*pair((4, *small[1:]))).disp.shape == (1, ndim, 4, *small[1:])


@both
def test_correlations_that_reach_further_than_the_coarsest_level(ndim):
    model = create("dual_prnet", ndim, correlation=3)
    shape = (8, *(16,) * (ndim - 1))  # 3 voxels at 1/4, counting both corners
    with pytest.raises(ValueError) as caught:
        model(*pair(shape))
    sentence = str(caught.value)
    assert f"correlation is 3, expected at most 2 for images of size {shape}" in sentence
    assert "3 voxels along an axis" in sentence and sentence.endswith(".")
    assert "\n" not in sentence
    reach_two = create("dual_prnet", ndim, correlation=2)
    assert reach_two(*pair(shape)).disp.shape == (1, ndim, *shape)
