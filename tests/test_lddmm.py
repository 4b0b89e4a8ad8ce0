"""LDDMM: what a geodesic keeps, the kernel against a dense solve, maps and their inverses."""

import numpy as np
import pytest
import torch

from regkit import classical
from regkit.classical.lddmm import Flow
from regkit.data import population
from regkit.metrics import dice, folding_percent
from regkit.spatial import compose, identity_grid, warp


def spot(shape, centre, radii):
    """A soft ellipse (1, 1, *S)."""
    grid = identity_grid(shape)
    away = sum(((grid[i] - c) / r) ** 2 for i, (c, r) in enumerate(zip(centre, radii)))
    return torch.sigmoid(4 * (1 - away.sqrt()))[None, None]


def bump(shape, dtype=torch.float64):
    """A momentum that shears and pushes in the middle of a torus (1, d, *S)."""
    grid = identity_grid(shape, dtype=dtype)
    away = sum((grid[i] - (n - 1) / 2) ** 2 for i, n in enumerate(shape))
    weight = torch.exp(-away / 18)
    return torch.stack([(i + 1) * weight * (grid[-1 - i] / shape[-1 - i] - 0.2)
                        for i in range(len(shape))])[None]  # fmt: skip


@pytest.mark.parametrize("shape", [(7, 6), (4, 5, 6)])
def test_the_kernel_solves_the_operator(shape):
    """v = K m against a dense matrix of (1 - width^2 Laplacian)^2 on a torus, voxels unequal."""
    spacing, width = [1.0, 2.0, 1.5][: len(shape)], 2.5
    m = torch.randn(1, len(shape), *shape, dtype=torch.float64)
    flow = Flow(shape, spacing, width, like=m)
    n = int(np.prod(shape))
    index, matrix = np.arange(n).reshape(shape), np.eye(n)
    for axis, h in enumerate(spacing):
        for by in (1, -1):
            matrix[index.ravel(), np.roll(index, by, axis).ravel()] -= width**2 / h**2
        matrix += np.eye(n) * 2 * width**2 / h**2
    for i, h in enumerate(spacing):  # momentum and velocity in voxels
        solved = np.linalg.solve(matrix @ matrix, m[0, i].numpy().ravel() / h) / h
        assert np.allclose(flow.velocity(m)[0, i].numpy().ravel(), solved, atol=1e-10)
    whitened = torch.randn_like(m)
    momentum = flow.momentum(whitened)
    assert torch.allclose((momentum * flow.velocity(momentum)).sum(), whitened.square().sum())


@pytest.mark.parametrize("shape", [(48, 48), pytest.param((28,) * 3, marks=pytest.mark.slow)])
def test_a_geodesic_keeps_its_energy_and_its_momentum(shape):
    """<m, K m>, and the sum of m: K is the same everywhere. Both follow from EPDiff."""
    m = bump(shape)
    flow = Flow(shape, [1.0] * len(shape), 3.0, steps=20, like=m)
    m = m * 2.5 / flow.velocity(m).abs().max()
    path = list(flow.path(m))
    energies = torch.stack([(now * velocity).sum() for _, _, now, velocity in path])
    totals = torch.stack([now.sum(dim=tuple(range(2, now.ndim)))[0] for _, _, now, _ in path])
    assert len(path) == 21 and path[-1][0].norm(dim=1).max() > 1.5
    assert (energies / energies[0] - 1).abs().max() < 0.03
    assert (totals - totals[0]).abs().max() < 0.03 * m.abs().sum()
    assert (path[-1][2] - m).abs().max() > 0.1 * m.abs().max()  # it is carried, not kept in place
    disp, inverse = path[-1][:2]
    assert torch.equal(disp, flow.shoot(m))
    # of a voxel, where maps bend most: they are linear between voxels
    assert compose(disp, inverse).norm(dim=1).max() < 0.2
    assert compose(inverse, disp).norm(dim=1).max() < 0.2


def test_gradients_of_shooting_are_those_of_differences():
    m = bump((12, 12))
    flow = Flow((12, 12), (1.0, 1.0), 3.0, steps=3, like=m)
    m = (m / flow.velocity(m).abs().max()).requires_grad_()
    weights = torch.randn(1, 2, 12, 12, dtype=torch.float64, generator=torch.manual_seed(0))

    def value(momentum):
        return (flow.shoot(momentum) * weights).sum()

    value(m).backward()
    way = torch.randn(m.shape, dtype=torch.float64, generator=torch.manual_seed(1))
    with torch.no_grad():
        slope = (value(m + 1e-6 * way) - value(m - 1e-6 * way)) / 2e-6
    assert float((m.grad * way).sum()) == pytest.approx(float(slope), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(40, 48), (20, 24, 22)])
def test_a_spot_becomes_an_ellipse_elsewhere(shape):
    """And the displacement at its middle is the shift, in voxels that are no cubes."""
    middle = [(n - 1) / 2 for n in shape]
    shift = [2.0, -1.5, 1.0][: len(shape)]
    fixed = spot(shape, middle, [7.0, 5.0, 6.0][: len(shape)])
    moving = spot(shape, [m + s for m, s in zip(middle, shift)], [6.0] * len(shape))
    spacing = [1.0, 1.5, 1.25][: len(shape)]
    found = classical.lddmm(
        moving, fixed, spacing=spacing, similarity="mse", width=8.0, levels=(2, 1), iterations=10
    )
    error = (warp(moving, found.disp) - fixed).square().mean()
    assert error < 0.05 * (moving - fixed).square().mean()
    at = (0, slice(None), *(round(m) for m in middle))
    assert np.abs(found.disp[at].numpy() - shift).max() < 0.5
    assert float(folding_percent(found.disp)) == 0
    inside = (slice(None), slice(None), *[slice(4, -4)] * len(shape))
    assert compose(found.disp, found.inverse)[inside].norm(dim=1).max() < 0.3
    assert [level for level, _ in found.values][-1] == shape


@pytest.mark.slow
def test_structures_of_two_people_come_together_without_folds():
    moving, fixed = population(2, (80, 96), seed=2)
    disp = classical.lddmm(moving.image[None], fixed.image[None], spacing=2.2).disp
    labels = sorted(set(fixed.labels.unique().tolist()) - {0})
    before = float(dice(moving.labels[None], fixed.labels[None], labels).nanmean())
    moved = warp(moving.labels[None], disp, mode="nearest")
    assert float(dice(moved, fixed.labels[None], labels).nanmean()) > before + 0.2
    assert float(folding_percent(disp)) == 0


IMAGE = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"moving": IMAGE[..., :11]}, "moving has shape .* the same as fixed"),
        ({"fixed": torch.ones(1, 1, 12, 12)}, "fixed is constant, expected"),
        ({"moving": IMAGE / 0}, "moving holds NaN or infinity, expected"),
        ({"similarity": "lnc"}, "similarity is 'lnc', expected one of .*did you mean 'lncc'"),
        ({"width": 0}, "width is 0, expected a positive number"),
        ({"sigma": -1}, "sigma is -1, expected a positive number"),
        ({"power": 0}, "power is 0, expected a positive number"),
        ({"steps": 0}, "steps is 0, expected 1 or more"),
        ({"iterations": 0}, "iterations is 0, expected 1 or more"),
        ({"levels": (0,)}, r"levels is \(0,\), expected whole numbers"),
        ({"spacing": (1.0,) * 3}, "spacing is .* expected one positive number or 2"),
    ],
)
def test_wrong_input_is_one_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        classical.lddmm(**{"moving": IMAGE, "fixed": IMAGE, **change})
