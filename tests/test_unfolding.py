"""Deep unfolding against the equations of its paper: stages, identities, objective, options."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from regkit import attention, blocks, losses, models, spatial
from regkit.models import Registration, unfolding
from regkit.training import loop, objective, recipes

both = pytest.mark.parametrize("ndim", [2, 3])
SMALL = {"channels": (8, 8, 16), "layers": 2, "mlp": 24, "width": 8, "depth": 3}
SIZES = {2: (37, 53), 3: (21, 18, 30)}
CHOICES = [
    {},
    {"shared": True},
    {"stages": 1},
    {"transformer": False},
    {"skips": False},
    {"denoiser": "conv"},
    {"denoiser": "unet"},
    {"denoiser": None},
    {"attention": "linear"},
    {"attention": "window", "window": 2},
    {"shared": True, "tolerance": 1e-9},
    {"transformer": False, "skips": False, "denoiser": None, "shared": True},
]
every_choice = pytest.mark.parametrize("options", CHOICES, ids=str)


def create(ndim=2, **options):
    torch.manual_seed(0)
    return models.create("unfolding", ndim, **{**SMALL, **options})


def images(shape, batch=1):
    return torch.rand(2, batch, 1, *shape, generator=torch.Generator().manual_seed(1))


def heads(model):
    return [m.conv for m in model.modules() if isinstance(m, blocks.DispHead)]


def with_visible_output(ndim=2, **options):
    """A model whose heads are not near zero any more: each answers with a voxel or so."""
    model = create(ndim, **options)
    with torch.no_grad():
        for conv in heads(model):
            if conv.weight.abs().max() < 0.5:
                conv.weight.normal_(std=0.02)
    return model.eval()


class Answers(nn.Module):
    """Stands for a fidelity module: gives a known displacement, and keeps what it was shown."""

    def __init__(self, disp):
        super().__init__()
        self.disp, self.seen = disp, None

    def forward(self, pair):
        self.seen = pair
        return self.disp


def waves(shape, seed):
    """A smooth displacement of at most two voxels, another one for each seed."""
    generator = torch.Generator().manual_seed(seed)
    grid = spatial.identity_grid(shape) / shape[0]
    phases = 6.3 * torch.rand(len(shape), len(shape), generator=generator)
    rows = [sum((6.3 * x + p).sin() for x, p in zip(grid, row, strict=True)) for row in phases]
    return 2 / len(shape) * torch.stack(rows)[None]


# --- the network of the paper -----------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@both
def test_parameter_counts_by_hand(ndim, shared):
    """The published weights do not exist: what the docstring says, counted from the layers."""
    c, k, mlp = (16, 32, 48, 64), 3**ndim, 96

    def conv(a, b):
        return k * a * b + b

    norm = 2
    down = sum(conv(a, b) + norm * b for a, b in zip((2, *c[:-1]), c, strict=True))
    up = [(64 + 48, 48), (48 + 32, 32), (32 + 16, 16), (16 + 2, 16)]
    up = sum(conv(a, b) + norm * b for a, b in up)
    of_attention = 4 * (64 * 64 + 64)
    layer = of_attention + (64 * mlp + mlp) + (mlp * 64 + 64) + 2 * norm * 64
    transformer = (k * 64 + 64) + 8 * layer
    fidelity = down + transformer + up + conv(16, ndim)
    denoiser = conv(ndim, 16) + 3 * (conv(16, 16) + norm * 16) + conv(16, ndim)
    total = (1 if shared else 3) * (fidelity + denoiser)
    model = models.create("unfolding", ndim, shared=shared)
    assert models.parameter_count(model) == total
    assert shared or f"{total:,}" in unfolding.__doc__


@every_choice
@both
def test_every_choice_starts_as_the_identity_at_any_size(ndim, options):
    model = create(ndim, **options)
    moving, fixed = images(SIZES[ndim], batch=2)
    result = model(moving, fixed)
    assert len(result.stages) == options.get("stages", 3)
    for displacement in (result.disp, *[x for stage in result.stages for x in stage]):
        assert displacement.shape == (2, ndim, *SIZES[ndim])
        assert displacement.abs().max() < 1e-3
    torch.testing.assert_close(result.moved, moving, atol=1e-3, rtol=0)


@every_choice
def test_with_all_heads_at_zero_it_is_exactly_the_identity(options):
    model = create(**options)
    with torch.no_grad():
        for conv in heads(model):
            conv.weight.zero_()
            conv.bias.zero_()
        result = model(*images(SIZES[2]))
    assert all((x == 0).all() for stage in result.stages for x in stage)
    assert (result.disp == 0).all()


@both
def test_one_stage_without_denoiser_is_the_fidelity_module(ndim):
    model = with_visible_output(ndim, stages=1, denoiser=None)
    moving, fixed = images((24,) * ndim)
    with torch.no_grad():
        result = model(moving, fixed)
        alone = model.stages[0].fidelity(torch.cat([moving, fixed], dim=1))
    assert torch.equal(result.disp, alone) and alone.abs().max() > 0.1
    ((u, v),) = result.stages
    assert torch.equal(u, v) and torch.equal(v, alone)


@both
def test_a_stage_refines_what_the_stage_before_left(ndim):
    """It sees the warped image and the fixed one; the original is then warped by both maps."""
    shape = (24,) * ndim
    model = create(ndim, stages=2, denoiser=None)
    first, second = waves(shape, 3), waves(shape, 4)
    model.stages[0].fidelity, model.stages[1].fidelity = Answers(first), Answers(second)
    moving = waves(shape, 5)[:, :1]
    fixed = torch.rand_like(moving)
    result = model(moving, fixed)
    assert torch.equal(model.stages[0].fidelity.seen, torch.cat([moving, fixed], dim=1))
    warped = spatial.warp(moving, first)
    assert torch.equal(model.stages[1].fidelity.seen, torch.cat([warped, fixed], dim=1))
    assert torch.equal(result.stages[1][0], spatial.compose(first, second))
    twice = spatial.warp(warped, second)
    inner = (..., *[slice(4, -4)] * ndim)
    error = (result.moved - twice)[inner].abs().max()
    other = spatial.warp(spatial.warp(moving, second), first)
    assert error < 0.1 < (other - twice)[inner].abs().max()


def test_v_and_not_u_enters_the_next_stage():
    model = create(stages=2)
    step = waves((24, 24), 3)
    model.stages[0].fidelity = model.stages[1].fidelity = Answers(step)

    class Half(nn.Module):
        def forward(self, u):
            return u / 2

    model.stages[0].denoiser = model.stages[1].denoiser = Half()
    (u1, v1), (u2, v2) = model(*images((24, 24))).stages
    assert torch.equal(u1, step) and torch.equal(v1, step / 2)
    assert torch.equal(u2, spatial.compose(v1, step)) and torch.equal(v2, u2 / 2)


@both
@pytest.mark.parametrize("kind", ["dncnn", "conv", "unet"])
def test_a_denoiser_starts_as_the_identity_and_keeps_units(kind, ndim):
    """N(t u) = t N(u), as the solution of equation 5 for a quadratic R."""
    torch.manual_seed(0)
    denoise = unfolding.Denoiser(kind, ndim, (8, 8, 16), width=8, depth=4)
    u = 3 * torch.randn(2, ndim, *(16,) * ndim)
    with torch.no_grad():
        assert (denoise(u) - u).abs().max() < 1e-3 * u.abs().max()
        for conv in heads(denoise):
            conv.weight.add_(0.05 * torch.randn_like(conv.weight))
        v = denoise(u)
        assert (v - u).abs().max() > 0.1
        for t in (0.25, 4.0):
            torch.testing.assert_close(denoise(t * u), t * v, rtol=1e-3, atol=1e-3 * t)
        assert denoise(0 * u).abs().max() < 0.01
        # each image has its own scale
        torch.testing.assert_close(
            denoise(u * u.new_tensor([1, 2]).reshape(2, *[1] * (ndim + 1)))[:1], v[:1]
        )


def test_a_token_looks_at_all_others():
    torch.manual_seed(0)
    block = attention.Transformer(2, channels=8, heads=2, layers=1, mlp=8)
    x = torch.randn(1, 8, 9, 11, requires_grad=True)
    y = block(x)
    assert y.shape == x.shape
    y[0, :, 0, 0].square().sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()


def test_the_transformer_knows_where_its_tokens_are():
    """Without positions, tokens in another order would give the same answers in that order."""
    torch.manual_seed(0)
    block = attention.Transformer(2, channels=8, heads=2, layers=2, mlp=8).eval()
    x = torch.randn(1, 8, 6, 6)
    order = torch.randperm(36)

    def shuffle(y):
        return y.flatten(2)[:, :, order].reshape(y.shape)

    with torch.no_grad():
        assert (block(shuffle(x)) - shuffle(block(x))).abs().max() > 0.1
        block.position.weight.zero_()
        torch.testing.assert_close(block(shuffle(x)), shuffle(block(x)), atol=1e-5, rtol=0)


# --- attention ------------------------------------------------------------------------------------


def strong(kind, channels=8, heads=2, **options):
    """With weights large enough for some tokens to count far more than others."""
    torch.manual_seed(0)
    made = attention.Attention(channels, heads, kind, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made.eval()


def dense(made, x, weights):
    """Attention written out: `weights(q, k)` for every pair of tokens, then a weighted mean."""
    tokens = x.flatten(1, -2)
    qkv = tokens @ made.in_proj_weight.T + made.in_proj_bias
    heads = []
    for q, k, v in zip(*[part.chunk(made.heads, -1) for part in qkv.chunk(3, -1)]):
        w = weights(q, k)
        heads.append(w / w.sum(-1, keepdim=True) @ v)
    found = torch.cat(heads, -1) @ made.out_proj.weight.T + made.out_proj.bias
    return found.reshape(x.shape)


def softmax_kernel(q, k):
    return torch.einsum("bic,bjc->bij", q, k).div(q.shape[-1] ** 0.5).exp()


def linear_kernel(q, k):
    """Katharopoulos et al. 2020: f(q) f(k), with f(x) = x + 1 above zero and exp(x) below."""
    q, k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    return torch.einsum("bic,bjc->bij", q, k)


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 5)])
@pytest.mark.parametrize(("kind", "kernel"), [("full", softmax_kernel), ("linear", linear_kernel)])
def test_attention_is_the_sum_over_all_pairs_of_tokens(kind, kernel, shape):
    made, x = strong(kind), torch.randn(2, *shape, 8)
    with torch.no_grad():
        torch.testing.assert_close(made(x), dense(made, x, kernel), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("shape", [(8, 8), (7, 10), (3, 9), (4, 5, 6)])
def test_a_token_sees_its_window_and_nothing_else(shape, shift):
    """Windows of 4, cut at 0, 4, 8, ... or, shifted, at 2, 6, ...; a short axis is not cut."""
    made, x = strong("window", window=4, shift=shift), torch.randn(2, *shape, 8)
    cuts = [(torch.arange(n) + 2 * (shift and n > 4)) // 4 * (n > 4) for n in shape]
    window = sum(100**i * c for i, c in enumerate(torch.meshgrid(*cuts, indexing="ij"))).flatten()
    together = window[:, None] == window

    def kernel(q, k):
        return softmax_kernel(q, k) * together

    with torch.no_grad():
        torch.testing.assert_close(made(x), dense(made, x, kernel), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 5)])
def test_one_window_as_large_as_the_image_is_full_attention(shape):
    window, full = strong("window", window=7, shift=True), strong("full")
    x = torch.randn(2, *shape, 8)
    with torch.no_grad():
        torch.testing.assert_close(window(x), full(x))


@both
@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("shift", [False, True])
def test_windows_go_together_again(ndim, side, shift):
    x = torch.randn(2, *(4, 7, 5)[:ndim], 3)
    windows, together, join = attention.cut_windows(x, side, shift)
    assert windows.shape[1:] == (side**ndim, 3)
    assert torch.equal(join(windows), x)
    places = 1 + torch.arange(x[..., 0].numel()).reshape(*x.shape[:-1], 1)
    where = attention.cut_windows(places, side, shift)[0][..., 0]  # 0: padding
    assert torch.equal(where[where > 0].sort().values, places.flatten())
    if together is not None:
        seen = together & (where > 0)[:, :, None]
        assert not (seen & (where == 0)[:, None]).any()
        assert (seen.diagonal(dim1=1, dim2=2) == (where > 0)).all()


def test_the_full_transformer_is_that_of_torch():
    """Weights, their order (which an optimiser's state follows), their start, and the function."""
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True, norm_first=True).eval()
    torch.manual_seed(0)
    ours = attention.TransformerLayer(16, 24, attention.Attention(16, 4)).eval()
    pairs = list(zip(theirs.named_parameters(), ours.named_parameters(), strict=True))
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
    x = 3 * torch.randn(2, 4, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).flatten(1, 2), theirs(x.flatten(1, 2)))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [64, 4096, 50_000])
def test_linear_attention_in_half_precision_is_that_of_float64(half, tokens):
    """A sum over thousands of tokens is more than float16 holds: it must not be taken there."""
    q, k, v = (2 * torch.randn(3, 1, 2, tokens, 32)).to(half)
    found = attention.linear_attention(q, k, v)
    expected = attention.linear_attention(*(x.double() for x in (q, k, v)))
    assert found.dtype == half and expected.dtype == torch.float64
    size = expected.abs().max()
    assert (found.double() - expected).abs().max() < 2 * torch.finfo(half).eps * size
    assert (found != 0).double().mean() > 0.99
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = attention.linear_attention(q.float(), k.float(), v.float())
    assert (again.double() - expected).abs().max() < 1e-4 * size


@pytest.mark.parametrize("kind", attention.ATTENTION)
def test_attention_in_half_precision_is_that_of_float64(kind):
    """Whole layers, weights and all: sums over tokens or channels are taken in float32."""
    layer = attention.TransformerLayer(32, 64, attention.Attention(32, 4, kind)).double()
    x = torch.randn(1, 40, 48, 32, dtype=torch.float64)
    expected = layer(x)
    for half in (torch.float16, torch.bfloat16):
        found = layer.to(half)(x.to(half)).double()
        layer.double()
        assert (found - expected).abs().max() < 16 * torch.finfo(half).eps * expected.abs().max()


def test_kinds_of_attention_share_their_weights_and_differ_in_their_answer():
    found = []
    pair = images((48, 64))
    for kind in ("full", "linear", "window"):
        model = with_visible_output(attention=kind, window=2)
        model.load_state_dict(with_visible_output().state_dict())
        with torch.no_grad():
            found.append(model(*pair).disp)
    assert (found[0] - found[1]).abs().max() > 1e-3 < (found[0] - found[2]).abs().max()


# --- as many stages as a pair needs ---------------------------------------------------------------


class Towards(nn.Module):
    """Stands for a fidelity module: each pair's step is its own fixed image, a uniform shift, the
    moving image (how often it has been asked is written there) decides nothing."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.asked = factor, 0

    def forward(self, pair):
        self.asked += 1
        size = pair[:, 1:].mean(tuple(range(1, pair.ndim)), keepdim=True)
        step = size * self.factor ** (self.asked - 1)
        return step.expand(-1, pair.ndim - 2, *pair.shape[2:])


def adaptive(**options):
    """Steps of s, s/2, s/4, ... voxels along each axis, s the intensity of the fixed image."""
    model = create(shared=True, stages=6, denoiser=None, **options).eval()
    model.stages[0].fidelity = Towards(0.5)
    return model


def sized(*sizes):
    fixed = torch.ones(len(sizes), 1, 16, 16) * torch.tensor(sizes).reshape(-1, 1, 1, 1)
    return torch.rand_like(fixed), fixed


def test_each_pair_stops_where_its_change_is_small():
    """Changes of s sqrt(2) / 2^(k-1): below 0.4 at stage 1 for s = 0.1, 3 for 1, 5 for 4."""
    result = adaptive(tolerance=0.4)(*sized(1.0, 0.1, 4.0))
    assert len(result.stages) == 5
    assert unfolding.stages_used(result.stages).tolist() == [3, 1, 5]
    expected = [1.75, 0.1, 4 * (2 - 2**-4)]
    for v, value in zip(result.disp, expected, strict=True):
        torch.testing.assert_close(v, torch.full_like(v, value))
    torch.testing.assert_close(result.disp, result.stages[-1][1])


def test_a_pair_stops_alike_alone_and_in_a_batch():
    torch.manual_seed(0)
    model = with_visible_output(shared=True, stages=6)
    model.settled = "change"
    moving, fixed = torch.rand(2, 3, 1, 24, 24) * torch.tensor([0.1, 1, 3]).reshape(3, 1, 1, 1)
    with torch.no_grad():
        plain = model(moving, fixed)
        v = torch.stack([torch.zeros_like(plain.disp), *(v for _, v in plain.stages)])
        changes = (v[1:] - v[:-1]).norm(dim=2).mean((2, 3))  # (stages, pairs)
        model.tolerance = float(changes[:4].min(0).values.median()) * 1.0001
        whole = model(moving, fixed)
        alone = [model(a[None], b[None]) for a, b in zip(moving, fixed)]
    used = unfolding.stages_used(whole.stages)
    below = changes <= model.tolerance
    expected = [int(b.float().argmax()) + 1 if b.any() else 6 for b in below.T]
    assert used.tolist() == expected and len(set(expected)) > 1
    for k, one in enumerate(alone):
        assert len(one.stages) == expected[k]
        torch.testing.assert_close(one.disp, whole.disp[k : k + 1])
        torch.testing.assert_close(plain.stages[expected[k] - 1][1][k], whole.disp[k])


def test_the_split_of_u_and_v_may_decide():
    class Shrinks(nn.Module):
        def forward(self, u):
            return u - 0.3 / 2**0.5  # so |u - v| = 0.3 everywhere

    for tolerance, used in ((0.31, 1), (0.29, 6)):
        model = adaptive(tolerance=tolerance, settled="split")
        model.stages[0].denoiser = Shrinks()
        assert len(model(*sized(4.0)).stages) == used


def test_training_takes_all_stages():
    model = adaptive(tolerance=100.0)
    assert len(model(*sized(1.0)).stages) == 1
    assert len(model.train()(*sized(1.0)).stages) == 6


def test_without_tolerance_every_pair_takes_all_stages():
    stages = with_visible_output(shared=True)(*images((24, 24), batch=2)).stages
    assert unfolding.stages_used(stages).tolist() == [3, 3]
    assert unfolding.stages_used(stages[:1]).tolist() == [1, 1]


# --- training -----------------------------------------------------------------------------------

EQUATION_7 = {"similarity_u": 0.8, "similarity": 0.2, "diffusion_u": 1.0, "consistency": 0.1}


def recipe(**changes):
    return replace(recipes.get("unfolding_2d", "smoke"), similarity="mse", **changes)


@every_choice
def test_the_first_gradient_reaches_every_parameter_of_every_stage(options):
    model = create(**options).train()
    moving, fixed = images((32, 40))
    terms = objective.objective(
        model(moving, fixed), {"moving": moving, "fixed": fixed}, recipe(weights=EQUATION_7)
    )
    torch.stack([EQUATION_7[k] * v for k, v in terms.items()]).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, key


@both
def test_saving_memory_gives_the_same_gradients(ndim):
    plain = with_visible_output(ndim).train()
    saving = create(ndim, save_memory=True).train()
    saving.load_state_dict(plain.state_dict())
    moving, fixed = images((48, 64) if ndim == 2 else (16, 24, 16))
    kept, found = [], []
    for model in (plain, saving):
        total = 0

        def count(x):
            nonlocal total
            total += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = losses.mse(model(moving, fixed).moved, fixed)
        loss.backward()
        kept.append(total)
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))
    assert kept[1] < 0.8 * kept[0]


def test_equation_7():
    """Two displacements of which every norm is known."""
    moving, fixed = images((16, 20))
    grid = spatial.identity_grid((16, 20))[None]
    u = 0.1 * grid  # forward differences: 0.1 along its own axis, 0 along the other
    v = u + torch.tensor([3.0, -1.0]).reshape(1, 2, 1, 1)
    other = (3 * u, 3 * u)
    result = Registration(spatial.warp(moving, v), v, stages=(other, (u, v)))
    batch = {"moving": moving, "fixed": fixed}
    terms = objective.objective(result, batch, recipe(weights=EQUATION_7))
    assert list(terms) == list(EQUATION_7)
    expected = {
        "similarity_u": (spatial.warp(moving, u) - fixed).square().mean(),
        "similarity": (spatial.warp(moving, v) - fixed).square().mean(),
        "diffusion_u": torch.tensor(0.1**2 / 2),
        "consistency": torch.tensor((9 + 1) / 2),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=0)
    every = {f"{k}_all": 1.0 for k in EQUATION_7 if k != "similarity"}
    terms = objective.objective(result, batch, recipe(weights=every))
    first = (spatial.warp(moving, 3 * u) - fixed).square().mean()
    expected = {
        "similarity_u_all": (expected["similarity_u"] + first) / 2,
        "diffusion_u_all": 5 * expected["diffusion_u"],
        "consistency_all": expected["consistency"] / 2,
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["consistency", "similarity_u_all", "diffusion_u"])
@pytest.mark.parametrize("stages", [(), (torch.zeros(1, 2, 8, 8),)])
def test_terms_of_the_split_need_its_pairs(name, stages):
    zero = torch.zeros(1, 2, 8, 8)
    moving, fixed = images((8, 8))
    with pytest.raises(ValueError, match=f"weights names '{name}', expected a model whose stages"):
        objective.objective(
            Registration(moving, zero, stages=stages),
            {"moving": moving, "fixed": fixed},
            recipe(weights={name: 1.0}),
        )


@pytest.mark.parametrize("name", ["unfolding_2d", "unfolding_3d", "sun2025_2d", "sun2025_3d"])
def test_recipes_hold_the_weights_of_equation_7(name):
    for budget in recipes.BUDGETS:
        weights = recipes.get(name, budget).weights
        assert weights["similarity_u"] == 0.8 and weights["similarity"] == pytest.approx(1 - 0.8)
        assert weights["consistency"] == 0.1
    if name.startswith("sun2025"):
        paper = recipes.get(name, "paper")
        assert paper.weights["diffusion_u"] == 1.0 and paper.similarity == "mse"
        assert (paper.lr, paper.batch, paper.schedule) == (1e-4, 1, "constant")
        if paper.ndim == 3:
            assert paper.shape == (160, 192, 160)


def test_a_recipe_trains():
    changes = {"subjects": 3, "shape": (32, 48), "options": SMALL}
    for name in ("unfolding_2d", "sun2025_2d"):
        trained = loop.train(recipes.get(name, "smoke", **changes), progress=False)
        assert all(entry["consistency"] >= 0 for entry in trained.history)
        assert set(EQUATION_7) < set(trained.history[0])


def test_a_gpu_whose_memory_is_too_small_is_one_sentence(monkeypatch):
    def too_large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(loop, "objective", too_large)
    with pytest.raises(ValueError, match=r"batch 2, expected a step that fits .*save_memory=True"):
        loop.train(recipe(subjects=3, shape=(32, 48), options=SMALL), progress=False)


# --- weights of another K, and bad options ------------------------------------------------------


def test_shared_weights_fit_any_number_of_stages():
    three, five = create(shared=True), create(shared=True, stages=5)
    five.load_state_dict(with_visible_output(shared=True).state_dict())
    three.load_state_dict(five.state_dict())
    pair = images((24, 24))
    with torch.no_grad():
        for (u, v), (x, y) in zip(three.eval()(*pair).stages, five.eval()(*pair).stages[:3]):
            assert torch.equal(u, x) and torch.equal(v, y)
    assert len(five(*pair).stages) == 5


def test_a_file_of_shared_weights_is_loaded_with_another_number_of_stages(tmp_path):
    path, pair = tmp_path / "weights.safetensors", images((24, 24))
    models.save(with_visible_output(shared=True), path)
    with torch.no_grad():
        held = models.load(path)(*pair)
        more = models.load(path, stages=5, tolerance=1e-9)
        result = more(*pair)
    assert len(held.stages) == 3 and len(result.stages) == 5
    assert torch.equal(held.disp, result.stages[2][1])
    assert more.options == {**SMALL, "shared": True, "stages": 5, "tolerance": 1e-9} | {
        "channels": list(SMALL["channels"])
    }
    models.save(create(), path)
    with pytest.raises(ValueError, match="weights are those of 3 stages, expected 5: with shared"):
        models.load(path, stages=5)
    with pytest.raises(ValueError, match="options .* do not fit the model 'unfolding'"):
        models.load(path, colour="red")


@pytest.mark.parametrize(("held", "wanted"), [(3, 5), (5, 3), (1, 2)])
def test_weights_of_another_number_of_stages_are_refused(held, wanted, tmp_path):
    path = tmp_path / "weights.safetensors"
    models.save(create(stages=held), path)
    assert len(models.load(path)(*images((16, 16))).stages) == held
    sentence = f"weights are those of {held} stages, expected {wanted}: with shared=True"
    with pytest.raises(ValueError, match=sentence):
        create(stages=wanted).load_state_dict(models.load(path).state_dict())
    start = recipe(subjects=3, shape=(32, 48), options={**SMALL, "stages": wanted})
    with pytest.raises(ValueError, match=sentence):
        loop.train(start, progress=False, start=path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"stages": 0}, "stages is 0, expected 1 or more"),
        ({"stages": -2, "shared": True}, "stages is -2, expected 1 or more"),
        ({"denoiser": "bm3d"}, "denoiser is 'bm3d', expected 'dncnn', 'conv', 'unet' or None"),
        ({"heads": 5}, r"heads is 5, expected a divisor of the last of channels \(8, 8, 16\)"),
        ({"heads": 0}, "heads is 0, expected a divisor"),
        ({"channels": ()}, r"channels is \(\), expected one positive number a level"),
        ({"channels": (8, 0)}, r"channels is \(8, 0\), expected one positive"),
        ({"depth": 1}, "depth is 1, expected 2 or more"),
        ({"width": 3, "denoiser": "conv"}, "width is 3, expected 6 or more"),
        ({"attention": "swin"}, "attention is 'swin', expected 'full', 'linear' or 'window'"),
        ({"window": 0}, "window is 0, expected 1 or more"),
        ({"tolerance": 0.5}, "tolerance is 0.5 and shared False, expected .* shared=True"),
        ({"tolerance": -1, "shared": True}, "tolerance is -1 .* expected a positive tolerance"),
        ({"settled": "soon"}, "settled is 'soon', expected 'change' or 'split'"),
        ({"stages": "three"}, "options .* do not fit the model 'unfolding'"),
        ({"colour": "red"}, "options .* do not fit the model 'unfolding'"),
    ],
)
def test_options_that_make_no_network(options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        create(**options)
    assert "\n" not in str(caught.value)
