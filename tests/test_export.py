"""The core and the models as graphs: `torch.export`, full-graph `torch.compile` and `torch.vmap`.

Each result is compared with that of the plain call. `aot_eager` and `eager` need no C++ compiler
and take the same graph as the others.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regkit import losses, models, spatial

# as narrow as a model can be, for graphs that are quick to make
NARROW: dict[str, dict] = {
    "rigid_resnet34": {"width": 4, "hidden": 4},
    "affine_resnet34": {"width": 4, "hidden": 4},
    "vxm1": {"encoder": (2, 2, 2, 2), "decoder": (2, 2, 2, 2, 2, 2)},
    "vxm2": {"encoder": (2, 2, 2, 2), "decoder": (2, 2, 2, 2, 2, 2, 2)},
    "vxm": {"encoder": (2, 2), "decoder": (2, 2), "last": (2,)},
    "vxm_diff": {"encoder": (2, 2), "decoder": (2, 2), "last": (2,), "steps": 2},
    "dense_unet_eca": {"channels": (2, 2, 2)},
    "fcn": {"channels": (2, 2, 2), "segment": 2},
    "vtn": {"channels": 1},
    "rcn": {"base": "vxm", "encoder": (2,), "decoder": (2,), "last": (2,), "affine_channels": 1},
    "dual_prnet": {"channels": (2, 2), "correlation": 1},
    "dilformer": {"channels": (2, 2), "dilations": (2,), "layers": 1},
    "vit_v_net": {
        "encoder": (2, 2, 2),
        "decoder": (2, 2, 2, 2, 2),
        "bottom": 2,
        "channels": 4,
        "heads": 2,
        "layers": 1,
        "mlp": 4,
    },
    "transmorph": {
        "channels": 2,
        "layers": (1, 2, 1, 1),
        "heads": (1, 1, 1, 1),
        "window": 2,
    },
    "utsrmorph": {
        "channels": 4,
        "layers": (1, 2, 1, 1),
        "heads": (1, 1, 1, 1),
        "window": 2,
    },
    "h_sganet": {"channels": (8, 8), "hop": 3},
    "unfolding": {
        "channels": (4,),
        "heads": 2,
        "layers": 1,
        "mlp": 4,
        "width": 6,
        "depth": 2,
        "stages": 2,
    },
}
SHAPES = {2: (12, 16), 3: (8, 8, 8)}


class Called(nn.Module):
    """A function or method as a module, which `torch.export` takes."""

    def __init__(self, call, owner: nn.Module | None = None):
        super().__init__()
        self.call, self.owner = call, owner

    def forward(self, *arguments):
        return self.call(*arguments)


def tensors(answer) -> list[Tensor]:
    """Those in dictionaries and tuples, in order."""
    return [x for x in torch.utils._pytree.tree_leaves(answer) if isinstance(x, Tensor)]


def assert_alike(answer, expected) -> None:
    found, wanted = tensors(answer), tensors(expected)
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def arguments(ndim: int) -> dict[str, tuple]:
    image, fixed = torch.rand(2, 2, 1, *SHAPES[ndim])
    disp = 2 * torch.randn(2, ndim, *SHAPES[ndim])
    return {"warp": (image, disp), "lncc": (image, fixed, 5), "integrate": (disp, 3)}


CORE = {"warp": spatial.warp, "lncc": losses.lncc, "integrate": spatial.integrate}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ndim"), [("warp", 2), ("warp", 3), ("lncc", 2), ("integrate", 2)]
)
def test_the_core_compiles_as_one_graph_with_its_gradient(name, ndim):
    torch.compiler.reset()
    compiled = torch.compile(CORE[name], backend="aot_eager", fullgraph=True)
    image, *others = arguments(ndim)[name]
    one, other = image.clone().requires_grad_(), image.clone().requires_grad_()
    found, expected = compiled(one, *others), CORE[name](other, *others)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()
    found.square().sum().backward()
    expected.square().sum().backward()
    assert other.grad.abs().max() > 0
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CORE)
def test_the_core_is_exported(name):
    given = arguments(2)[name]
    program = torch.export.export(Called(CORE[name]), given)
    torch.testing.assert_close(program.module()(*given), CORE[name](*given))


@pytest.mark.parametrize("name", CORE)
def test_the_core_under_vmap(name):
    """Over batches: each argument with several, and one argument with one that serves all."""
    many = [arguments(2)[name] for _ in range(3)]
    first, second, *rest = zip(*many)
    maps = isinstance(second[0], Tensor)
    first = torch.stack(first)
    second = torch.stack(second) if maps else second[0]
    found = torch.vmap(CORE[name], in_dims=(0, 0 if maps else None, *[None] * len(rest)))(
        first, second, *[x[0] for x in rest]
    )
    expected = torch.stack([CORE[name](*one) for one in many])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if maps:
        options = [x[0] for x in rest]
        for dims in ((1, None), (None, 1)):
            given = [x.movedim(0, 1) if dim else x[0] for x, dim in zip((first, second), dims)]
            found = torch.vmap(CORE[name], in_dims=(*dims, *[None] * len(rest)))(*given, *options)
            for k, one in enumerate(found):
                each = [x[k if dim else 0] for x, dim in zip((first, second), dims)]
                torch.testing.assert_close(one, CORE[name](*each, *options), rtol=0, atol=0)


def test_masks_and_gradients_of_lncc_under_vmap():
    moved = torch.rand(3, 2, 1, 12, 16, requires_grad=True)
    fixed, mask = torch.rand(3, 2, 1, 12, 16), torch.rand(3, 2, 1, 12, 16) > 0.3
    expected = torch.stack([losses.lncc(*x[:2], 5, x[2]) for x in zip(moved, fixed, mask)])
    (slopes,) = torch.autograd.grad(expected.sum(), moved)
    found = torch.vmap(lambda *x: losses.lncc(*x[:2], 5, x[2]))(moved, fixed, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert slopes.abs().max() > 0
    torch.testing.assert_close(torch.autograd.grad(found.sum(), moved)[0], slopes)
    gradient = torch.func.grad(lambda *x: losses.lncc(*x[:2], 5, x[2]))
    torch.testing.assert_close(torch.vmap(gradient)(moved.detach(), fixed, mask), slopes)


def test_labels_are_warped_in_a_graph():
    """Any whole numbers: a graph does not look at their size."""
    torch.compiler.reset()
    labels = torch.randint(0, 2**40, (2, 1, 12, 16))
    disp = 3 * torch.randn(2, 2, 12, 16)
    compiled = torch.compile(spatial.warp, backend="eager", fullgraph=True)
    assert compiled(labels, disp, "nearest").equal(spatial.warp(labels, disp, "nearest"))


def made(name: str, ndim: int) -> tuple[models.RegistrationModel, tuple[Tensor, Tensor]]:
    """A narrow model whose first answer is not the identity, and images for it."""
    model = models.create(name, ndim, **NARROW[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    shape = [max(n, model.divisor) for n in SHAPES[ndim]]
    moving, fixed = torch.rand(2, 1, 1, *shape)
    return model, (moving, fixed)


CASES = [(name, 2) for name in NARROW] + [("vxm_diff", 3), ("fcn", 3)]


def test_every_model_is_among_them():
    assert list(NARROW) == models.names()


@pytest.mark.slow
@pytest.mark.parametrize("name, ndim", CASES)
def test_a_model_compiles_as_one_graph(name, ndim):
    torch.compiler.reset()
    model, images = made(name, ndim)
    with torch.no_grad():
        expected = model.estimate(*images)
        assert expected["disp"].abs().max() > 0.01
        assert all(x.is_contiguous() for x in tensors(expected))
        found = torch.compile(model.estimate, backend="eager", fullgraph=True)(*images)
    assert_alike(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name, ndim", CASES)
def test_a_model_is_exported(name, ndim):
    model, images = made(name, ndim)
    with torch.no_grad():
        program = torch.export.export(Called(model.estimate, model), images)
        found = program.module()(*images)
        assert_alike(found, model.estimate(*images))


def test_a_whole_model_is_one_graph_at_any_size():
    """Its border too: checks of shapes, padding, the warp and the cut."""
    torch.compiler.reset()
    model, _ = made("vxm", 2)
    moving, fixed = torch.rand(2, 1, 1, 13, 15)
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(moving, fixed)
        expected = model(moving, fixed)
    assert_alike([found.moved, found.disp], [expected.moved, expected.disp])
    assert found.disp.is_contiguous()


def test_an_adaptive_model_runs_all_stages_in_a_graph():
    """Stages behind the last one that a pair takes leave its answer alone."""
    torch.compiler.reset()
    options = {**NARROW["unfolding"], "stages": 3, "shared": True, "tolerance": 1e3}
    model = models.create("unfolding", 2, **options).eval()
    images = torch.rand(2, 1, 1, 12, 16)
    with torch.no_grad():
        expected = model.estimate(*images)
        found = torch.compile(model.estimate, backend="eager", fullgraph=True)(*images)
    assert (len(expected["stages"]), len(found["stages"])) == (1, 3)
    torch.testing.assert_close(found["disp"], expected["disp"])
