"""A program may have made float64 its default: regkit does the same, in the same types."""

import importlib

import pytest
import torch

import regkit
from regkit import classical, data, losses, metrics, models
from regkit.data import chest, rigid, vessels
from regkit.data.anatomies import anatomies
from regkit.data.contrast import PaintedPairs
from regkit.spatial import affine_to_disp

SHAPE = (48, 56)
population = importlib.import_module("regkit.data.population")  # not the function


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pair(dtype=torch.float32):
    return [s.image[None].to(dtype) for s in data.population(2, SHAPE)]


def items() -> dict:
    """An item of every data set, made and not read from the cache."""
    subjects = [population._make(SHAPE, 0, index, 1.0, "t1") for index in range(2)]
    eye = vessels.vessel_pair(size=64)
    return {
        "random": data.RandomPairs(subjects, 1, with_truth=True)[0],
        "rigid": data.RigidPairs([subjects], 1, tilt=10, size=0.1)[0],
        "scalp": {"image": rigid.with_scalp(subjects[0], 0, 1, "t1").image},
        "chest": chest.ChestPairs(chest.chests(1, 2), SHAPE, 1)[0],
        "painted": PaintedPairs(anatomies(2, SHAPE, brains=False), SHAPE, 1)[0],
        "vessels": {**vars(eye), "image": eye.moving.image, "points": eye.moving.points},
        "contrast": {"image": vessels.vessel_contrast(eye.moving.image[None])},
    }


def test_data_sets_are_the_same(request):
    before = items()
    request.getfixturevalue("double")
    for name, item in items().items():
        for key, value in item.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == before[name][key].dtype, (name, key)
                assert torch.allclose(value, before[name][key], atol=1e-6), (name, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_descent_is_the_same(request, dtype):
    found = []
    for _ in range(2):
        moving, fixed = pair(dtype)
        theta = classical.fit(moving, fixed, "affine", "ncc", search=False, levels=2)
        start = affine_to_disp(theta, SHAPE)
        shift = classical.shift(moving, fixed)
        found.append([theta, start, classical.refine(moving, fixed, start, 3), shift])
        request.getfixturevalue("double")
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_metrics_are_the_same(request, dtype):
    found = []
    for _ in range(2):
        moving, fixed = (x.requires_grad_() for x in pair(dtype))
        disp = 0.1 * torch.stack([moving, fixed], dim=2)[:, 0].detach()
        values = [
            *(f(moving, fixed) for f in (losses.mse, losses.ncc, losses.lncc)),
            losses.mutual_information(moving, fixed),
            *(f(disp) for f in (losses.diffusion, losses.bending, losses.folding)),
            *torch.autograd.grad(losses.ncc(moving, fixed), [moving, fixed]),
            metrics.sd_log_jacobian(disp),
            metrics.endpoint_error(disp, 0 * disp),
            metrics.tre(disp, torch.ones(1, 3, 2).to(disp), torch.zeros(1, 3, 2).to(disp)),
        ]
        found.append([value.detach() for value in values])
        request.getfixturevalue("double")
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype == dtype and torch.allclose(a, b, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_a_model_made_before_answers_the_same_afterwards(request, name):
    model = models.create(name, 2).eval()
    with torch.no_grad():
        before = model(*pair())
        request.getfixturevalue("double")
        after = model(*pair())
        made = models.create(name, 2).eval()(*pair(torch.float64))
    assert after.disp.dtype == before.disp.dtype == torch.float32
    assert torch.allclose(before.disp, after.disp, atol=1e-6)
    assert made.disp.dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vxm_diff_brain_2d", "rigid", "rigid_resnet34_2d"])
def test_register_is_the_same(request, method):
    found = []
    for _ in range(2):
        moving, fixed = (x[0, 0].numpy() for x in pair())
        result = regkit.register(moving, fixed, method, affine="auto", refine=2)
        assert result.disp.dtype == result.moved.dtype == torch.float32
        found.append(result.disp)
        if len(found) == 1:
            request.getfixturevalue("double")
    torch.testing.assert_close(*found, atol=1e-2, rtol=0)
