"""Our numbers against other people's code: SciPy, MONAI, SimpleITK, ANTs and scikit-learn.

What coincides by definition is compared to rounding, on shapes, spacings and dtypes drawn by
Hypothesis. Where a definition differs, the test says how, and compares where both mean the same.
Single cases of this kind also stand in test_spatial, test_losses, test_metrics and test_io.
"""

from __future__ import annotations

import contextlib
import io as text
import itertools
import math
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.integrate import solve_ivp
from scipy.spatial.transform import Rotation
from torch.nn import functional as F

from regkit import io, losses, metrics, spatial
from regkit.transform import Grid, Transform

some = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)
dtypes = st.sampled_from([torch.float32, torch.float64])
INTEGERS = [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64]


def shapes(smallest=1, largest=9):
    return st.lists(st.integers(smallest, largest), min_size=2, max_size=3).map(tuple)


def spacings(d):
    return st.lists(st.floats(0.3, 4.0), min_size=d, max_size=d).map(tuple)


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def related(seed, shape, batch=1):
    """Two noisy images (batch, 1, *S) in [0, 1] with something in common."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, batch, 1, *shape, generator=generator, dtype=torch.float64)
    return a, 0.5 * a + 0.5 * b


def quadratic(seed, shape, size):
    """A displacement (1, d, *S) whose channels are random quadratic forms of x, up to `size`.

    Central differences are exact on it, whatever their order.
    """
    d = len(shape)
    grid = spatial.identity_grid(shape, dtype=torch.float64)
    top = torch.tensor(shape).reshape(-1, *[1] * d)
    x = 2 * grid / (top - 1) - 1
    products = [x[i] * x[k] for i, k in itertools.combinations_with_replacement(range(d), 2)]
    terms = torch.stack([*x, *products])
    weights = noise(seed, d, len(terms))
    return (size / len(terms)) * torch.einsum("ct,t...->c...", weights, terms)[None]


def smooth(seed, shape, size, width=2.5):
    """A displacement (1, d, *S) of noise, blurred by `width`, of up to `size` voxels."""
    values = noise(seed, len(shape), *shape).numpy()
    values = np.stack([ndimage.gaussian_filter(v, width, mode="nearest") for v in values])
    return torch.from_numpy(size * values / np.abs(values).max())[None]


# --- SciPy, NumPy, and PyTorch's own gradients --------------------------------------------------


@some
@given(
    shape=shapes(),
    out=st.data(),
    dtype=dtypes,
    padding=st.sampled_from(["zeros", "border"]),
    size=st.floats(0, 6),
    seed=seeds,
)
def test_warp_is_scipys_linear_interpolation(shape, out, dtype, padding, size, seed):
    """On any grid, also one that is not the image's."""
    d = len(shape)
    out_shape = out.draw(st.tuples(*[st.integers(1, 9)] * d))
    image = noise(seed, 2, 2, *shape)
    disp = size * noise(seed + 1, 2, d, *out_shape)
    found = spatial.warp(image.to(dtype), disp.to(dtype), padding=padding)
    assert found.dtype == dtype and found.shape == (2, 2, *out_shape)
    coords = spatial.identity_grid(out_shape, dtype=torch.float64) + disp
    # "zeros" is an image that goes on as zeros: one voxel of them is what interpolation can see
    rim = 1 if padding == "zeros" else 0
    padded = F.pad(image, [rim] * 2 * d).numpy()
    mode = "constant" if rim else "nearest"
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    for b, c in itertools.product(range(2), range(2)):
        expected = ndimage.map_coordinates(padded[b, c], coords[b] + rim, order=1, mode=mode)
        np.testing.assert_allclose(found[b, c].numpy(), expected, rtol=0, atol=tolerance)


@some
@given(shape=shapes(), seed=seeds, dtype=st.sampled_from(INTEGERS))
def test_nearest_warp_is_scipys(shape, seed, dtype):
    labels = torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    disp = 2 * noise(seed, 1, len(shape), *shape)
    found = spatial.warp(labels[None, None], disp, mode="nearest", padding="border")
    coords = spatial.identity_grid(shape, dtype=torch.float64) + disp[0]
    expected = ndimage.map_coordinates(labels.numpy(), coords.numpy(), order=0, mode="nearest")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found[0, 0].numpy(), expected)


@some
@given(shape=shapes(2), data=st.data(), seed=seeds)
def test_a_rotation_in_millimetres_is_scipys_affine_transform(shape, data, seed):
    """The matrix by SciPy's Rotation, in mm, about the middle of a grid with any voxel size."""
    d = len(shape)
    spacing = np.array(data.draw(spacings(d)))
    generator = np.random.default_rng(seed)
    angles, shift = generator.normal(size=1 if d == 2 else 3), generator.normal(size=d)
    if d == 2:
        turn = Rotation.from_rotvec([0, 0, angles[0]]).as_matrix()[:2, :2]
    else:
        turn = Rotation.from_euler("XYZ", angles).as_matrix()
    matrix = np.diag(1 / spacing) @ turn @ np.diag(spacing)
    centre = (np.array(shape) - 1) / 2
    image = noise(seed, 1, 1, *shape)
    expected = ndimage.affine_transform(
        np.pad(image[0, 0].numpy(), 1),
        matrix,
        offset=matrix @ -(centre + 1) + centre + 1 + shift,
        output_shape=[n + 2 for n in shape],
        order=1,
    )[(slice(1, -1),) * d]
    theta = spatial.rigid_theta(*(torch.from_numpy(x)[None] for x in (angles, shift)), spacing)
    found = spatial.warp(image, spatial.affine_to_disp(theta, shape))
    np.testing.assert_allclose(found[0, 0].numpy(), expected, rtol=0, atol=1e-9)


@some
@given(shape=shapes(), seed=seeds)
def test_points_move_by_scipys_interpolation_of_the_displacement(shape, seed):
    d = len(shape)
    disp = 3 * noise(seed, 1, d, *shape)
    points = 6 * noise(seed + 1, 1, 11, d)  # some far outside: the border holds there
    found = spatial.warp_points(points, disp)[0].numpy()
    at = points[0].T.numpy()
    moves = [ndimage.map_coordinates(u, at, order=1, mode="nearest") for u in disp[0].numpy()]
    np.testing.assert_allclose(found, points[0].numpy() + np.stack(moves, 1), rtol=0, atol=1e-9)


@some
@given(shape=shapes(2), data=st.data(), seed=seeds)
def test_resize_is_interpolation_between_corners(shape, data, seed):
    new = data.draw(st.tuples(*[st.integers(2, 12)] * len(shape)))
    disp = noise(seed, 1, len(shape), *shape)
    places = np.meshgrid(*[np.linspace(0, n - 1, m) for n, m in zip(shape, new)], indexing="ij")
    found = spatial.resize_disp(disp, new)[0].numpy()
    for axis, values in enumerate(disp[0].numpy()):
        expected = ndimage.map_coordinates(values, places, order=1, mode="nearest")
        expected = expected * (new[axis] - 1) / (shape[axis] - 1)
        np.testing.assert_allclose(found[axis], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(31, 34), (23, 21, 24)])
def test_integrate_follows_the_path_that_scipy_solves(shape):
    """Every voxel carried through the velocity field by an ODE solver, interpolated by SciPy."""
    d = len(shape)
    svf = smooth(2, shape, 4.0, width=5)
    start = np.indices(shape).reshape(d, -1)

    def velocity(_, at):
        at = at.reshape(d, -1)
        values = [ndimage.map_coordinates(v, at, order=1, mode="nearest") for v in svf[0].numpy()]
        return np.ravel(values)

    end = solve_ivp(velocity, (0, 1), start.ravel(), max_step=0.02).y[:, -1].reshape(d, -1)
    inner = (..., *[slice(5, -5)] * d)  # nothing that started here has left the grid
    forth, back = (spatial.integrate(v, steps=9)[0].numpy() for v in (svf, -svf))
    path = (end - start).reshape(d, *shape)
    assert np.abs(path[inner]).max() > 0.8
    np.testing.assert_allclose(forth[inner], path[inner], rtol=0, atol=0.02)
    # backwards from where they ended, they come home
    home = [ndimage.map_coordinates(u, end, order=1).reshape(shape) for u in back]
    np.testing.assert_allclose(np.stack(home)[inner], -path[inner], rtol=0, atol=0.02)


@some
@given(shape=shapes(2), seed=seeds)
def test_jacobian_determinant_is_numpys_gradient_and_determinant(shape, seed):
    """NumPy's gradient is also one-sided at the border."""
    disp = noise(seed, 2, len(shape), *shape)
    found = spatial.jacobian_determinant(disp).numpy()
    for u, det in zip(disp.numpy(), found, strict=True):
        slopes = [np.gradient(c) for c in u]  # [channel][axis]
        matrix = np.moveaxis(np.array(slopes), (0, 1), (-2, -1)) + np.eye(len(shape))
        np.testing.assert_allclose(det, np.linalg.det(matrix), rtol=0, atol=1e-10)


@some
@given(shape=shapes(1, 12), k=st.integers(1, 9))
def test_padding_is_numpys_by_as_much_on_both_sides(shape, k):
    """Where the number of missing voxels is odd, one more comes after."""
    image = noise(0, 1, 1, *shape)
    sides = [(-n % k // 2, -(-(-n % k) // 2)) for n in shape]
    expected = np.pad(image[0, 0].numpy(), sides)
    np.testing.assert_array_equal(spatial.pad_to_multiple(image, k)[0][0, 0].numpy(), expected)


@pytest.mark.parametrize("shape", [(700, 500), (60, 70, 80), (1, 600, 500), (300_001, 2)])
def test_jacobian_determinant_of_a_large_image_is_numpys(shape):
    """Worked out in slabs, seams included. Its gradient against PyTorch's own of the formula."""
    disp = noise(0, 1, len(shape), *shape).requires_grad_()
    weight = noise(1, 1, *shape)
    found = spatial.jacobian_determinant(disp)
    slopes = [
        torch.gradient(disp, dim=axis)[0] if disp.shape[axis] > 1 else torch.zeros_like(disp)
        for axis in range(2, disp.ndim)
    ]
    matrix = torch.stack(slopes, -1).movedim(1, -2) + torch.eye(len(shape), dtype=disp.dtype)
    expected = torch.from_numpy(np.linalg.det(matrix.detach().numpy()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    theirs = torch.autograd.grad((torch.linalg.det(matrix) * weight).sum(), disp)[0]
    ours = torch.autograd.grad((found * weight).sum(), disp)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@some
@given(shape=shapes(1, 6), window=st.sampled_from([1, 3, 5, 7]), seed=seeds)
def test_lncc_is_numpys_correlation_window_by_window(shape, window, seed):
    """On images of a few voxels, where windows hold one voxel, or all of them."""
    a, b = (x.round(decimals=1) for x in related(seed, shape))  # equal values: constant windows
    squares = []
    for centre in np.ndindex(shape):
        box = tuple(slice(max(c - window // 2, 0), c + window // 2 + 1) for c in centre)
        x, y = (v[0, 0].numpy()[box].ravel() for v in (a, b))
        flat = np.ptp(x) == 0, np.ptp(y) == 0
        if not all(flat):
            squares.append(0.0 if any(flat) else np.corrcoef(x, y)[0, 1] ** 2)
    expected = 1 - np.mean(squares) if squares else 0.0
    assert float(losses.lncc(a, b, window)) == pytest.approx(expected, abs=1e-9)


@some
@given(shape=shapes(1, 5), seed=seeds)
def test_diffusion_and_bending_have_the_value_and_gradient_of_the_plain_formula(shape, seed):
    """Also where an axis is too short for a difference. PyTorch differentiates the formula."""
    d = len(shape)
    disp = noise(seed, 2, d, *shape).requires_grad_()
    first, second = [], []
    for i in range(2, d + 2):
        first += [disp.diff(dim=i).square().mean() / d] if shape[i - 2] > 1 else []
        for k in range(2, d + 2):  # each mixed derivative twice
            difference = disp.diff(dim=i).diff(dim=k)
            second += [difference.square().mean()] if difference.numel() else []
    for loss, terms in ((losses.diffusion, first), (losses.bending, second)):
        expected = sum(terms) + 0 * disp.sum()
        torch.testing.assert_close(loss(disp), expected)
        ours, theirs = (torch.autograd.grad(3 * x, disp)[0] for x in (loss(disp), expected))
        torch.testing.assert_close(ours, theirs)


@some
@given(d=st.integers(2, 3), seed=seeds, small=st.sampled_from([1.0, 1e-4]))
def test_rotation_and_translation_error_are_scipys_angle_and_numpys_length(d, seed, small):
    """Of rigid maps. The scale of an affine map does not turn anything."""
    generator = np.random.default_rng(seed)
    first = Rotation.from_rotvec(generator.normal(size=(4, 3)) * [d == 3, d == 3, 1])
    turn = Rotation.from_rotvec(small * generator.normal(size=(4, 3)) * [d == 3, d == 3, 1])
    shifts = generator.normal(size=(2, 4, d, 1))
    thetas = [
        np.concatenate([scale * r.as_matrix()[:, :d, :d], t], axis=-1)
        for r, t, scale in zip((turn * first, first), shifts, (1.2, 1.0), strict=True)
    ]
    found = metrics.rotation_error(*map(torch.from_numpy, thetas))
    np.testing.assert_allclose(found, np.rad2deg(turn.magnitude()), rtol=1e-6, atol=1e-9)
    found = metrics.translation_error(*map(torch.from_numpy, thetas))
    np.testing.assert_allclose(found, np.linalg.norm(shifts[0] - shifts[1], axis=1)[:, 0])


def test_float32_sums_over_millions_of_voxels_are_numpys_in_float64():
    """A slope that is the same everywhere is the worst case of a sum that runs on and on."""
    shape = (100, 90, 110)
    grid = spatial.identity_grid(shape, dtype=torch.float64)
    disp = (0.1 * grid + 0.1 * grid.roll(1, 0) + 0.01 * noise(0, 3, *shape))[None].float()
    u = disp[0].double().numpy()
    slopes = [np.mean(np.diff(u, axis=k) ** 2) for k in (1, 2, 3)]
    assert float(losses.diffusion(disp)) == pytest.approx(np.mean(slopes), rel=1e-5)
    bent = 0.05 * grid.square()[None].float()
    second = [np.mean(np.diff(bent[0].double().numpy(), 2, axis=k) ** 2) for k in (1, 2, 3)]
    assert float(losses.bending(bent)) == pytest.approx(np.sum(second), rel=1e-4)
    a, b = disp[:, :1], disp[:, 1:2] + disp[:, :1]
    x, y = (v.double().numpy() for v in (a, b))
    assert float(losses.mse(a, b)) == pytest.approx(np.mean((x - y) ** 2), rel=1e-5)
    r = np.corrcoef(x.ravel(), y.ravel())[0, 1]
    assert float(losses.ncc(a, b)) == pytest.approx(1 - r, rel=1e-4)
    assert float(losses.soft_dice(a / a.max(), b / b.max())) == pytest.approx(
        1 - 2 * np.sum(x / x.max() * y / y.max()) / (x.sum() / x.max() + y.sum() / y.max()),
        rel=1e-4,
    )
    error = np.linalg.norm(u, axis=0).mean()
    assert float(metrics.endpoint_error(disp, 0 * disp)) == pytest.approx(error, rel=1e-5)


@some
@given(shape=shapes(), data=st.data(), seed=seeds)
def test_endpoint_error_consistency_and_tre_are_numpys_lengths(shape, data, seed):
    d = len(shape)
    spacing = data.draw(spacings(d))
    disp, truth = noise(seed, 2, 2, d, *shape)
    squares = np.mean((disp - truth).numpy() ** 2)
    assert float(losses.consistency(disp, truth)) == pytest.approx(squares)
    mask = noise(seed + 1, 2, 1, *shape) > -0.5
    mask.view(2, -1)[:, 0] = True
    lengths = np.linalg.norm((disp - truth).numpy(), axis=1)
    expected = [x[m].mean() for x, m in zip(lengths, mask[:, 0].numpy(), strict=True)]
    np.testing.assert_allclose(metrics.endpoint_error(disp, truth, mask), expected, rtol=1e-9)
    fixed = torch.randint(0, min(shape), (2, 5, d), generator=torch.Generator().manual_seed(seed))
    moving = fixed + noise(seed + 2, 2, 5, d)
    moved = [p + u[(slice(None), *p.T)].T for p, u in zip(fixed.numpy(), disp.numpy(), strict=True)]
    expected = np.linalg.norm((np.stack(moved) - moving.numpy()) * spacing, axis=-1)
    found = metrics.tre(disp, fixed.double(), moving, spacing)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


# --- MONAI -------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet():
    """MONAI warns about its own indexing and about extensions that are not compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@some
@given(shape=shapes(2), seed=seeds, steps=st.integers(1, 8))
def test_integrate_and_warp_are_monais(shape, seed, steps):
    blocks = pytest.importorskip("monai.networks.blocks")
    svf = noise(seed, 2, len(shape), *shape)
    image = noise(seed + 1, 2, 2, *shape)
    with quiet():
        theirs = blocks.DVF2DDF(num_steps=steps, padding_mode="border")(svf)
        moved = {p: blocks.Warp(padding_mode=p)(image, svf) for p in ("zeros", "border")}
    torch.testing.assert_close(spatial.integrate(svf, steps), theirs)
    for padding, expected in moved.items():
        torch.testing.assert_close(spatial.warp(image, svf, padding=padding), expected)


@settings(max_examples=10, deadline=None)
@given(shape=shapes(7, 10), window=st.sampled_from([3, 5, 7]), seed=seeds)
def test_lncc_and_its_gradient_are_monais_inside(shape, window, seed):
    """Away from the border, where MONAI pads with zeros: ours leaves those windows to a mask.

    Theirs differentiates through automatic differentiation, ours in closed form.
    """
    monai_losses = pytest.importorskip("monai.losses")
    a, b = (x.requires_grad_() for x in related(seed, shape, batch=2))
    inner = torch.zeros(shape, dtype=torch.bool)
    inner[(slice(window // 2, -(window // 2)),) * len(shape)] = True
    mask = inner.expand(2, 1, *shape)
    kernel = monai_losses.LocalNormalizedCrossCorrelationLoss(
        spatial_dims=len(shape),
        kernel_size=window,
        reduction="none",
        smooth_nr=0,
        smooth_dr=1e-12,
    ).double()
    with quiet():
        theirs = 1 + kernel(a, b)[mask].mean()
    ours = losses.lncc(a, b, window=window, mask=mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for x, y in zip(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(theirs, (a, b))):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


@some
@given(shape=shapes(3), seed=seeds, dtype=dtypes)
def test_bending_and_diffusion_are_monais_on_quadratic_fields(shape, seed, dtype):
    """There every second difference is the derivative, so that stencil and border do not matter.

    MONAI's diffusion sums over axes where ours averages; it is compared on a linear field.
    """
    monai_losses = pytest.importorskip("monai.losses")
    disp = quadratic(seed, shape, 4.0).to(dtype)
    theta = noise(seed, 1, len(shape), len(shape) + 1, dtype=dtype)
    linear = spatial.affine_to_disp(theta, shape)
    with quiet():
        bending = monai_losses.BendingEnergyLoss()(disp)
        diffusion = monai_losses.DiffusionLoss()(linear) / len(shape)
    torch.testing.assert_close(losses.bending(disp), bending, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(losses.diffusion(linear), diffusion, rtol=1e-3, atol=1e-9)


@settings(max_examples=10, deadline=None)
@given(data=st.data(), shape=shapes(5, 12), seed=seeds)
def test_dice_and_hd95_are_monais(data, shape, seed):
    """No label touches the image's border, which MONAI does not count as outside."""
    monai_metrics = pytest.importorskip("monai.metrics")
    spacing = data.draw(spacings(len(shape)))
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, 4, (2, 2, 1, *shape), generator=generator)
    rim = torch.ones(shape, dtype=torch.bool)
    rim[(slice(1, -1),) * len(shape)] = False
    a, b = maps.masked_fill(rim, 0)
    onehot = [F.one_hot(x[:, 0], 4).movedim(-1, 1) for x in (a, b)]
    with quiet():
        overlap = monai_metrics.compute_dice(*onehot, include_background=False).double()
        distance = monai_metrics.compute_hausdorff_distance(
            *onehot, percentile=95, spacing=spacing, include_background=False
        ).double()
    both = torch.tensor(
        [[(x == i).any() and (y == i).any() for i in (1, 2, 3)] for x, y in zip(a, b)]
    )
    ours = metrics.dice(a, b, [1, 2, 3])  # a label in one map only: 0 for us, NaN or 0 for them
    torch.testing.assert_close(ours[both], overlap[both], rtol=1e-6, atol=0)
    ours = metrics.hd95(a, b, [1, 2, 3], spacing)
    torch.testing.assert_close(ours[both], distance[both], rtol=1e-5, atol=1e-5)


# --- SimpleITK ---------------------------------------------------------------------------------


def direction(seed, d):
    """A random rotation (d, d), its axes permuted and one of them flipped at times."""
    generator = np.random.default_rng(seed)
    if d == 3:
        return Rotation.random(random_state=seed).as_matrix() * generator.choice([-1, 1], 3)
    return np.diag(generator.choice([-1.0, 1.0], 2))  # ITK has 2D images in the axial plane only


def frame(seed, shape, spacing):
    """An affine (4, 4), voxel -> mm RAS, whose grid has its middle near the origin."""
    d = len(shape)
    affine = np.eye(4)
    affine[:d, :d] = direction(seed, d) * spacing
    middle = np.append((np.array(shape) - 1) / 2, np.zeros(3 - d))
    affine[:3, 3] = np.random.default_rng(seed).normal(size=3) - affine[:3, :3] @ middle
    affine[2, 3] *= d == 3
    return affine


def to_itk(values, affine):
    """An array (*S) as an ITK image, on the same grid: RAS to LPS written out by hand."""
    d = values.ndim
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    spacing = np.linalg.norm(affine[:d, :d], axis=0)
    lps = np.diag([-1.0, -1.0, 1.0])[:d, :d]
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps @ affine[:d, :d] / spacing).ravel().tolist())
    image.SetOrigin((lps @ affine[:d, 3]).tolist())
    return image


def field_file(folder, disp, fixed_affine, moving_affine):
    shape = tuple(disp.shape[2:])
    grids = Grid(shape, fixed_affine), Grid(shape, moving_affine)
    io.write_transform(Transform.from_voxels(disp, *grids), folder / "disp.nii.gz")
    return folder / "disp.nii.gz"


def read_field(path):
    return sitk.ReadImage(str(path), sitk.sitkVectorFloat64)


@st.composite
def grids(draw, smallest=8, largest=14):
    """Two grids that overlap, of any voxel size and direction, and a displacement between them."""
    shape = draw(shapes(smallest, largest))
    d = len(shape)
    other = draw(st.tuples(*[st.integers(smallest, largest)] * d))
    seed = draw(seeds)
    fixed = frame(seed, shape, draw(spacings(d)))
    moving = frame(seed + 1, other, draw(spacings(d)))
    disp = Grid(shape, fixed).disp_to(Grid(shape, moving)).double() + smooth(seed, shape, 1.5)
    return disp, fixed, moving, other, seed


@some
@given(grids())
def test_a_warp_on_oblique_grids_is_simpleitks(tmp_path_factory, case):
    disp, fixed, moving, other, seed = case
    shape = tuple(disp.shape[2:])
    image = noise(seed + 2, 1, 1, *other)
    labels = torch.randint(1, 9, (1, 1, *other), generator=torch.Generator().manual_seed(seed))
    path = field_file(tmp_path_factory.mktemp("warp"), disp, fixed, moving)
    transform = sitk.DisplacementFieldTransform(read_field(path))
    target = to_itk(np.zeros(shape), fixed)

    coords = (spatial.identity_grid(shape, dtype=torch.float64) + disp[0]).numpy()
    top = np.array(other).reshape(-1, *[1] * len(other)) - 1
    inside = ((coords > 1e-3) & (coords < top - 1e-3)).all(0)  # beyond, ITK has its own rules
    ours = spatial.warp(image, disp)[0, 0].numpy()
    theirs = sitk.Resample(to_itk(image[0, 0].numpy(), moving), target, transform, sitk.sitkLinear)
    apart = np.abs(ours - sitk.GetArrayFromImage(theirs).T)[inside]
    assert apart.size == 0 or apart.max() < 1e-3  # the file holds float32 mm

    ours = spatial.warp(labels, disp, mode="nearest")[0, 0].numpy()
    theirs = sitk.Resample(
        to_itk(labels[0, 0].numpy(), moving), target, transform, sitk.sitkNearestNeighbor
    )
    clear = inside & (np.abs(coords % 1 - 0.5) > 1e-3).all(0)  # halfway between voxels: a tie
    np.testing.assert_array_equal(ours[clear], sitk.GetArrayFromImage(theirs).T[clear])


@some
@given(grids())
def test_a_jacobian_determinant_on_oblique_grids_is_simpleitks(tmp_path_factory, case):
    """In millimetres it is ours times the ratio of the two voxels' volumes, with its sign.

    ITK's filter divides by the spacing and takes no notice of the direction of the grid. Its
    vectors therefore have to be turned into the grid's own axes first; the determinant stays.
    """
    disp, fixed, moving, *_ = case
    d = disp.shape[1]
    ours = spatial.jacobian_determinant(disp)[0].numpy()
    ours = ours * np.linalg.det(moving[:d, :d]) / np.linalg.det(fixed[:d, :d])
    field = read_field(field_file(tmp_path_factory.mktemp("det"), disp, fixed, moving))
    turn = np.array(field.GetDirection()).reshape(d, d)
    vectors = sitk.GetArrayFromImage(field) @ turn  # each v becomes turn^T v
    turned = sitk.GetImageFromArray(vectors, isVector=True)
    turned.SetSpacing(field.GetSpacing())
    theirs = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(turned, True)).T
    inner = (slice(1, -1),) * d  # at the border ITK repeats the last voxel, ours is one-sided
    np.testing.assert_allclose(ours[inner], theirs[inner], rtol=1e-3, atol=1e-4)


def unit_field(disp):
    """A displacement (1, d, *S) as ITK's transform on a grid of unit spacing."""
    vectors = disp[0].flip(0).movedim(0, -1).numpy()
    return sitk.GetImageFromArray(np.ascontiguousarray(vectors), isVector=True)


@pytest.mark.parametrize("shape", [(21, 24), (14, 17, 15)])
def test_compose_is_simpleitks_composite_transform(shape):
    """ITK asks the transform that was added last first, as we ask the second warp."""
    d = len(shape)
    first, then = smooth(1, shape, 2.0), smooth(2, shape, 2.0)
    both = [sitk.DisplacementFieldTransform(unit_field(u)) for u in (first, then)]
    target = to_itk(np.zeros(shape[::-1]), np.eye(4))
    theirs = sitk.TransformToDisplacementField(
        sitk.CompositeTransform(both),
        sitk.sitkVectorFloat64,
        target.GetSize(),
        [0.0] * d,
        [1.0] * d,
        np.eye(d).ravel().tolist(),
    )
    theirs = np.moveaxis(sitk.GetArrayFromImage(theirs), -1, 0)[::-1]
    inner = (..., *[slice(3, -3)] * d)  # beyond its border ITK's field is 0, ours holds on
    ours = spatial.compose(first, then)[0].numpy()
    np.testing.assert_allclose(ours[inner], theirs[inner], rtol=0, atol=1e-9)
    assert np.abs(spatial.compose(then, first)[0].numpy() - theirs)[inner].max() > 0.05


@pytest.mark.parametrize("shape", [(25, 28), (16, 18, 17)])
def test_invert_is_simpleitks_inverse_field(shape):
    disp = smooth(3, shape, 1.5)
    theirs = sitk.InvertDisplacementField(
        unit_field(disp), maximumNumberOfIterations=200, maxErrorToleranceThreshold=1e-4,
        meanErrorToleranceThreshold=1e-6, enforceBoundaryCondition=False,
    )  # fmt: skip
    theirs = np.moveaxis(sitk.GetArrayFromImage(theirs), -1, 0)[::-1]
    inner = (..., *[slice(4, -4)] * len(shape))
    ours = spatial.invert(disp, iterations=60)[0].numpy()
    assert np.abs(ours - theirs)[inner].max() < 0.02 < np.abs(ours + disp[0].numpy())[inner].max()


@some
@given(shape=shapes(4, 13), radius=st.integers(1, 4), seed=seeds)
def test_lncc_is_that_of_itk_and_ants_borders_included(shape, radius, seed):
    """ITK's neighbourhood correlation (Avants et al. 2008) is the mean of the negative square."""
    a, b = related(seed, shape)
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsANTSNeighborhoodCorrelation(radius)
    method.SetInitialTransform(sitk.TranslationTransform(len(shape)))
    fixed, moving = (sitk.GetImageFromArray(x[0, 0].numpy()) for x in (b, a))
    theirs = 1 + method.MetricEvaluate(fixed, moving)
    ours = float(losses.lncc(a, b, window=2 * radius + 1))
    assert ours == pytest.approx(theirs, abs=1e-9)


def correlated(seed, r, n=20_000):
    """Two Gaussian images (1, 1, H, W) with Pearson correlation r, clipped at three deviations."""
    a, b = noise(seed, 2, 1, 1, n // 100, 100)
    return a.clamp(-3, 3), (r * a + math.sqrt(1 - r * r) * b).clamp(-3, 3)


def test_mutual_information_rises_and_falls_with_that_of_itk():
    """Mattes's estimate in ITK smooths one image only: near ours, and in the same order."""
    ours, theirs = [], []
    for r in (0.0, 0.3, 0.6, 0.8, 0.95):
        a, b = correlated(0, r)
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(32)
        method.SetInitialTransform(sitk.TranslationTransform(2))
        fixed, moving = (sitk.GetImageFromArray(x[0, 0].numpy()) for x in (b, a))
        theirs.append(method.MetricEvaluate(fixed, moving))
        ours.append(float(losses.mutual_information(a, b, bins=32)))
    assert (np.diff(ours) < 0).all() and (np.diff(theirs) < 0).all()
    np.testing.assert_allclose(ours, theirs, rtol=0.15, atol=0.02)


# --- ANTs --------------------------------------------------------------------------------------


def to_ants(values, affine):
    """An array (*S) as an ANTs image on the same grid."""
    ants = pytest.importorskip("ants")
    image = to_itk(values, affine)
    d = values.ndim
    return ants.from_numpy(
        np.asarray(values, dtype=np.float32),
        origin=image.GetOrigin(),
        spacing=image.GetSpacing(),
        direction=np.array(image.GetDirection()).reshape(d, d),
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(18, 21), (14, 16, 12)])
def test_ants_applies_our_field_file_as_we_do(tmp_path, shape, seed):
    ants = pytest.importorskip("ants")
    d = len(shape)
    other = tuple(n + 3 for n in shape)
    fixed = frame(seed, shape, (1.0, 1.7, 2.5)[:d])
    moving = frame(seed + 10, other, (1.4, 1.2, 2.0)[:d])
    disp = Grid(shape, fixed).disp_to(Grid(shape, moving)).double() + smooth(seed, shape, 2.0)
    path = field_file(tmp_path, disp, fixed, moving)
    image = torch.rand(1, 1, *other, dtype=torch.float64)
    theirs = ants.apply_transforms(
        to_ants(np.zeros(shape), fixed),
        to_ants(image[0, 0].numpy(), moving),
        transformlist=[str(path)],
        interpolator="linear",
        defaultvalue=-1,
    ).numpy()
    coords = (spatial.identity_grid(shape, dtype=torch.float64) + disp[0]).numpy()
    top = np.array(other).reshape(-1, *[1] * d) - 1
    inside = ((coords > 1e-3) & (coords < top - 1e-3)).all(0)
    ours = spatial.warp(image, disp)[0, 0].numpy()
    assert inside.mean() > 0.3 and np.abs(ours - theirs)[inside].max() < 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_the_jacobian_determinant_is_that_of_ants(tmp_path, seed):
    """ANTs differentiates the map in mm, direction included, by a stencil of its own.

    Of a quadratic displacement every central stencil has the derivative itself. ANTs cuts the
    determinant off at 0, so nothing folds here.
    """
    ants = pytest.importorskip("ants")
    shape = (14, 16, 12)
    fixed = frame(seed, shape, (1.0, 1.7, 2.5))
    moving = frame(seed + 10, shape, (1.4, 1.2, 2.0))
    ratio = np.linalg.det(moving) / np.linalg.det(fixed)
    if ratio < 0:  # a mirror image has negative determinants
        moving[:3, 0] *= -1
        ratio = -ratio
    disp = Grid(shape, fixed).disp_to(Grid(shape, moving)).double()
    disp = disp + quadratic(seed, shape, 5.0)
    path = field_file(tmp_path, disp, fixed, moving)
    ours = ratio * spatial.jacobian_determinant(disp)[0].numpy()
    with contextlib.redirect_stdout(text.StringIO()):
        theirs = ants.create_jacobian_determinant_image(
            to_ants(np.zeros(shape), fixed), str(path), do_log=False, geom=False
        ).numpy()
    inner = (slice(2, -2),) * 3
    assert ours[inner].min() > 0.1 and np.ptp(ours[inner]) > 0.2
    np.testing.assert_allclose(ours[inner], theirs[inner], rtol=1e-3)


# --- scikit-learn ------------------------------------------------------------------------------


@some
@given(shape=shapes(4, 12), levels=st.integers(2, 6), noisy=st.floats(0, 1), seed=seeds)
def test_mutual_information_of_few_levels_is_scikit_learns(shape, levels, noisy, seed):
    """Levels four bins apart share no bin, so that the windows change nothing."""
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, levels, (1, 1, *shape), generator=generator)
    other = torch.randint(0, levels, a.shape, generator=generator)
    b = torch.where(torch.rand(a.shape, generator=generator) < noisy, other, levels - 1 - a)
    for x in (a, b):  # the extremes set the scale
        x.view(-1)[:2] = torch.tensor([0, levels - 1])
    expected = sklearn_metrics.mutual_info_score(a.flatten(), b.flatten())
    found = losses.mutual_information(a.double(), b.double(), bins=4 * (levels - 1) + 5)
    assert -float(found) == pytest.approx(expected, abs=1e-9)


def test_mutual_information_rises_with_scikit_learns():
    """On grey values: nearest to theirs where both have as many bins, both below the true value."""
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    ours, theirs, true = [], [], []
    for r in (0.3, 0.6, 0.8, 0.95):
        a, b = correlated(1, r)
        binned = [np.digitize(x.numpy().ravel(), np.linspace(-3, 3, 28)) for x in (a, b)]
        theirs.append(sklearn_metrics.mutual_info_score(*binned))
        ours.append(-float(losses.mutual_information(a, b, bins=32)))
        true.append(-math.log(1 - r * r) / 2)  # of two Gaussians
    assert (np.diff(ours) > 0).all() and (np.diff(theirs) > 0).all()
    np.testing.assert_allclose(ours, theirs, rtol=0.15, atol=0.02)
    np.testing.assert_allclose(ours, true, rtol=0.2, atol=0.02)


@some
@given(shape=shapes(1, 9), seed=seeds)
@example(shape=(300, 500), seed=0)  # more than one chunk
def test_dice_is_scikit_learns_f1_score(shape, seed):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randint(0, 5, (2, 1, 1, *shape), generator=generator)
    present = [label for label in range(5) if (a == label).any() or (b == label).any()]
    expected = sklearn_metrics.f1_score(
        b.flatten(), a.flatten(), labels=present, average=None, zero_division=0.0
    )
    np.testing.assert_allclose(metrics.dice(a, b, present)[0], expected, rtol=1e-12)
