"""Warps against tables, analytic fields, SciPy and SimpleITK."""

import itertools
import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import interpolate, ndimage
from scipy.spatial.transform import Rotation

from regkit import spatial

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SHAPES = [(7, 9), (5, 8, 6)]  # odd and even sizes, no two alike
SINGLETONS = [(1, 9), (7, 1), (5, 1, 6), (1, 8, 6), (5, 8, 1)]
DTYPES = [torch.float32, torch.float64]


def disp_of(*components, dtype=torch.float64):
    """(1, d, *S) displacement from d arrays (*S)."""
    return torch.stack([torch.as_tensor(c, dtype=dtype) for c in components])[None]


def constant(shift, shape, batch=1, dtype=torch.float64):
    shift = torch.tensor(shift, dtype=dtype).reshape(1, -1, *[1] * len(shape))
    return shift.expand(batch, len(shape), *shape).clone()


def periodic(shape, amplitude, dtype=torch.float64):
    """disp_i(x) = amplitude sin(2 pi x_{i+1} / n_{i+1}) cos(2 pi x_i / n_i), far from affine."""
    grid = spatial.identity_grid(shape, dtype=dtype)
    angle = [2 * math.pi * grid[i] / shape[i] for i in range(len(shape))]
    d = len(shape)
    return disp_of(
        *[amplitude * angle[(i + 1) % d].sin() * angle[i].cos() for i in range(d)], dtype=dtype
    )


def interior(x, margin):
    """Cut `margin` voxels off every spatial side of (B, C, *S)."""
    return x[(..., *[slice(margin, -margin)] * (x.ndim - 2))]


def random_affine(d, seed, size=0.1):
    """theta (1, d, d+1) near the identity."""
    generator = torch.Generator().manual_seed(seed)
    linear = torch.eye(d, dtype=torch.float64)
    linear = linear + size * torch.randn(d, d, generator=generator, dtype=torch.float64)
    shift = torch.randn(d, 1, generator=generator, dtype=torch.float64)
    return torch.cat([linear, shift], dim=1)[None]


# --- warp: a table with every number in it -----------------------------------------------------

IMAGE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shift", "mode", "padding", "expected"),
    [
        ((0.0, 0.0), "linear", "zeros", IMAGE),
        ((1.0, 0.0), "linear", "zeros", [[4, 5, 6], [7, 8, 9], [0, 0, 0]]),
        ((-1.0, 0.0), "linear", "zeros", [[0, 0, 0], [1, 2, 3], [4, 5, 6]]),
        ((0.0, 1.0), "linear", "zeros", [[2, 3, 0], [5, 6, 0], [8, 9, 0]]),
        ((1.0, 0.0), "linear", "border", [[4, 5, 6], [7, 8, 9], [7, 8, 9]]),
        ((0.0, -1.0), "linear", "border", [[1, 1, 2], [4, 4, 5], [7, 7, 8]]),
        ((0.5, 0.0), "linear", "zeros", [[2.5, 3.5, 4.5], [5.5, 6.5, 7.5], [3.5, 4, 4.5]]),
        ((0.5, 0.5), "linear", "border", [[3, 4, 4.5], [6, 7, 7.5], [7.5, 8.5, 9]]),
        ((0.25, 0.0), "linear", "zeros", [[1.75, 2.75, 3.75], [4.75, 5.75, 6.75], [5.25, 6, 6.75]]),
        ((0.4, 0.0), "nearest", "zeros", IMAGE),
        ((0.6, 0.0), "nearest", "zeros", [[4, 5, 6], [7, 8, 9], [0, 0, 0]]),
        ((0.6, 0.0), "nearest", "border", [[4, 5, 6], [7, 8, 9], [7, 8, 9]]),
        ((9.0, 0.0), "linear", "zeros", [[0, 0, 0]] * 3),
        ((9.0, 0.0), "linear", "border", [[7, 8, 9]] * 3),
    ],
)
def test_warp_table(shift, mode, padding, expected, dtype, device):
    image = torch.tensor(IMAGE, dtype=dtype, device=device)[None, None]
    disp = constant(shift, (3, 3), dtype=dtype).to(device)
    moved = spatial.warp(image, disp, mode, padding)
    assert moved.dtype == dtype and moved.device == image.device
    torch.testing.assert_close(
        moved[0, 0].cpu(), torch.tensor(expected, dtype=dtype), rtol=0, atol=2e-6
    )


def test_warp_defaults_are_linear_and_zeros():
    image = torch.tensor(IMAGE)[None, None]
    disp = constant((0.5, 0.0), (3, 3), dtype=torch.float32)
    torch.testing.assert_close(
        spatial.warp(image, disp), spatial.warp(image, disp, mode="linear", padding="zeros")
    )


@pytest.mark.parametrize("axis", range(3))
def test_each_channel_of_a_3d_displacement_moves_along_its_array_axis(axis):
    image = torch.rand(1, 1, 4, 5, 6, dtype=torch.float64)
    shift = [0.0] * 3
    shift[axis] = 1.0
    moved = spatial.warp(image, constant(shift, (4, 5, 6)))
    expected = torch.zeros_like(image)
    n = image.shape[axis + 2]
    expected.narrow(axis + 2, 0, n - 1).copy_(image.narrow(axis + 2, 1, n - 1))
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.uint16, torch.uint32, torch.int16, torch.int32, torch.int64, torch.bool],
)
def test_nearest_keeps_integer_dtypes_and_values(dtype):
    small = {torch.bool: 1, torch.uint8: 255, torch.uint16: 65535, torch.int16: 32767}
    top = small.get(dtype, 2**31 - 1)
    labels = torch.tensor([[0, top], [1, 0]]).to(dtype)[None, None]
    moved = spatial.warp(labels, constant((0.0, 1.0), (2, 2), dtype=torch.float32), mode="nearest")
    assert moved.dtype == dtype
    assert moved[0, 0].tolist() == torch.tensor([[top, 0], [0, 0]]).to(dtype).tolist()


def test_large_labels_are_warped_exactly_up_to_what_fits():
    zero = torch.zeros(1, 2, 2, 2)
    for top in (2**24, 2**24 + 1, 2**31 + 1, 2**53, -(2**53)):
        labels = torch.tensor([[0, top], [1, top - 1 if top > 0 else top + 1]])[None, None]
        assert torch.equal(spatial.warp(labels, zero, mode="nearest"), labels)
    with pytest.raises(ValueError, match=r"image holds the label 9007199254740993, .* 2\^53"):
        spatial.warp(torch.full((1, 1, 2, 2), 2**53 + 1), zero, mode="nearest")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("shape", SHAPES + SINGLETONS)
def test_warp_agrees_with_scipy(shape, padding, dtype, device):
    """Also for several channels, a batch, and a grid that differs from the image's."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, *shape, dtype=torch.float64, generator=generator)
    out_shape = tuple(n + 2 for n in shape)
    d = len(shape)
    disp = 4 * torch.randn(2, d, *out_shape, dtype=torch.float64, generator=generator)
    moved = spatial.warp(
        image.to(device, dtype), disp.to(device, dtype), padding=padding
    ).cpu().double()  # fmt: skip
    coords = spatial.identity_grid(out_shape, dtype=torch.float64) + disp
    # "zeros" in grid_sample: the image is surrounded by zeros, which linear interpolation sees
    mode, image_, offset = ("nearest", image, 0)
    if padding == "zeros":
        image_ = torch.nn.functional.pad(image, [1] * 2 * d)
        mode, offset = "constant", 1
    for b, c in itertools.product(range(2), range(3)):
        expected = ndimage.map_coordinates(
            image_[b, c].numpy(), (coords[b] + offset).numpy(), order=1, mode=mode, cval=0.0
        )
        # float32 coordinates of a few voxels are good to about 1e-6, where the slope is about 1
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        np.testing.assert_allclose(moved[b, c].numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_nearest_agrees_with_scipy(shape):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 9, (1, 1, *shape), generator=generator)
    disp = 2 * torch.randn(1, len(shape), *shape, dtype=torch.float64, generator=generator)
    moved = spatial.warp(labels, disp, mode="nearest", padding="border")
    coords = spatial.identity_grid(shape, dtype=torch.float64) + disp[0]
    expected = ndimage.map_coordinates(
        labels[0, 0].numpy(), coords.numpy(), order=0, mode="nearest"
    )
    np.testing.assert_array_equal(moved[0, 0].numpy(), expected)


def itk_field(disp):
    """Our (1, d, *S) displacement as ITK's, on unit spacing: vectors in the order x, y, z."""
    d = disp.shape[1]
    vectors = disp[0].flip(0).permute(*range(1, d + 1), 0).numpy()
    return sitk.GetImageFromArray(np.ascontiguousarray(vectors), isVector=True)


@pytest.mark.parametrize("shape", [(17, 21), (9, 12, 15)])
def test_warp_agrees_with_simpleitk(shape):
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(1, 1, *shape, dtype=torch.float64, generator=generator)
    disp = periodic(shape, 2.0)
    transform = sitk.DisplacementFieldTransform(sitk.Image(itk_field(disp)))
    theirs = sitk.Resample(
        sitk.GetImageFromArray(image[0, 0].numpy()), transform, sitk.sitkLinear, 0.0
    )
    ours = spatial.warp(image, disp)[0, 0].numpy()
    # ITK gives the default value beyond half a voxel outside; compare where both look inside
    coords = spatial.identity_grid(shape, dtype=torch.float64) + disp[0]
    top = torch.tensor(shape).reshape(-1, *[1] * len(shape)) - 1
    inside = ((coords >= 0) & (coords <= top)).all(0).numpy()
    assert inside.mean() > 0.6
    np.testing.assert_allclose(ours[inside], sitk.GetArrayFromImage(theirs)[inside], atol=1e-9)


@pytest.mark.parametrize("shape", [(17, 21), (9, 12, 15)])
def test_jacobian_agrees_with_simpleitk_inside(shape):
    disp = periodic(shape, 1.5)
    theirs = sitk.GetArrayFromImage(
        sitk.DisplacementFieldJacobianDeterminant(itk_field(disp), False)
    )
    ours = spatial.jacobian_determinant(disp)[0].numpy()
    inner = (slice(1, -1),) * len(shape)
    np.testing.assert_allclose(ours[inner], theirs[inner], atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (3, 2, 3)])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_warp_gradients(shape, padding):
    generator = torch.Generator().manual_seed(3)
    d = len(shape)
    image = torch.randn(2, 2, *shape, dtype=torch.float64, generator=generator, requires_grad=True)
    # between voxels, where linear interpolation is differentiable
    disp = 0.2 + 0.6 * torch.rand(2, d, *shape, dtype=torch.float64, generator=generator)
    disp = (disp - (torch.rand(disp.shape, generator=generator) > 0.5).double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, u: spatial.warp(i, u, padding=padding), (image, disp))


def test_a_displacement_of_batch_1_serves_every_image():
    image = torch.rand(3, 2, 7, 9)
    disp = periodic((7, 9), 1.0, torch.float32)
    torch.testing.assert_close(
        spatial.warp(image, disp), spatial.warp(image, disp.repeat(3, 1, 1, 1))
    )


# --- composition, inverse, integration ---------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES + SINGLETONS)
def test_composition_of_translations_adds_up(shape):
    a, b = [0.5 * (i + 1) for i in range(len(shape))], [-1.5, 0.25, 2.0][: len(shape)]
    together = spatial.compose(constant(a, shape), constant(b, shape))
    torch.testing.assert_close(
        together, constant([x + y for x, y in zip(a, b, strict=True)], shape)
    )


@pytest.mark.parametrize("shape", [(31, 33), (21, 23, 25)])
def test_composition_of_affine_maps_is_their_product(shape):
    """Two warps ask the second map first: x -> T_then(x), then T_first of that."""
    d = len(shape)
    first, then = random_affine(d, 0, 0.02), random_affine(d, 1, 0.02)
    matrix = first[0, :, :d] @ then[0, :, :d]
    shift = first[0, :, :d] @ then[0, :, d] + first[0, :, d]
    product = torch.cat([matrix, shift[:, None]], dim=1)[None]
    composed = spatial.compose(
        spatial.affine_to_disp(first, shape), spatial.affine_to_disp(then, shape)
    )
    expected = spatial.affine_to_disp(product, shape)
    torch.testing.assert_close(interior(composed, 6), interior(expected, 6))
    torch.testing.assert_close(spatial.compose_theta(first, then), product)
    # one map serves a batch of others
    torch.testing.assert_close(spatial.compose_theta(first, torch.cat([then, first]))[:1], product)


@pytest.mark.parametrize("shape", [(33, 37), (33, 29, 31)])
def test_warping_twice_is_warping_once_by_the_composition(shape):
    image = spatial.identity_grid(shape, dtype=torch.float64)[None]  # linear: exact under warp
    a, b = periodic(shape, 1.0), periodic(shape, 1.3).flip(1)
    once = spatial.warp(image, spatial.compose(a, b))
    twice = spatial.warp(spatial.warp(image, a), b)
    torch.testing.assert_close(interior(once, 4), interior(twice, 4))
    # and the other order is something else
    assert (interior(spatial.warp(image, spatial.compose(b, a)) - twice, 4)).abs().max() > 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 37), (17, 19, 21)])
def test_inverse_of_a_smooth_field(shape, dtype):
    disp = periodic(shape, 1.2, dtype)
    inverse = spatial.invert(disp, iterations=60)
    assert inverse.dtype == dtype
    # the equation that defines it holds to rounding, when it is given the time
    assert spatial.compose(disp, inverse).abs().max() < (1e-8 if dtype == torch.float64 else 1e-5)
    # from the other side it is interpolated, which costs up to 1/8 of the second differences
    axes = range(2, disp.ndim)
    bound = sum(inverse.diff(n=2, dim=a).abs().max() for a in axes) / 8
    rest = interior(spatial.compose(inverse, disp), 2).abs().max()
    assert rest < bound and rest < 0.1 * disp.abs().max()


def test_inverse_where_the_map_more_than_doubles_a_length():
    """Full fixed-point steps never settle there: x -> x + disp(x) with a slope of 2.4."""
    x = torch.arange(41, dtype=torch.float64) - 20
    disp = torch.zeros(1, 2, 41, 5, dtype=torch.float64)
    disp[0, 0] = (1.4 * x.clamp(-4, 4))[:, None]
    inverse = spatial.invert(disp)
    assert spatial.compose(disp, inverse)[:, :, 11:30].abs().max() < 1e-3
    expected = x / 2.4 - x  # inside, where the slope is constant
    torch.testing.assert_close(inverse[0, 0, 12:29, 2], expected[12:29], atol=1e-3, rtol=0)


def test_inverse_of_a_translation_and_of_an_affine_map():
    torch.testing.assert_close(
        spatial.invert(constant((1.5, -2.0), (9, 8))), constant((-1.5, 2.0), (9, 8))
    )
    shape = (31, 33)
    theta = random_affine(2, 4, 0.05)
    matrix = torch.linalg.inv(theta[0, :, :2])
    back = torch.cat([matrix, -matrix @ theta[0, :, 2:]], dim=1)[None]
    torch.testing.assert_close(spatial.invert_theta(theta), back)
    found = spatial.invert(spatial.affine_to_disp(theta, shape))
    torch.testing.assert_close(
        interior(found, 6), interior(spatial.affine_to_disp(back, shape), 6), atol=1e-9, rtol=0
    )


def test_more_iterations_invert_better():
    disp = periodic((33, 37), 2.0)
    rest = [spatial.compose(disp, spatial.invert(disp, n)).abs().max() for n in (1, 3, 10)]
    assert rest[0] > rest[1] > rest[2]


@pytest.mark.parametrize("shape", SHAPES + SINGLETONS)
def test_a_constant_velocity_is_a_translation(shape):
    svf = constant([0.7, -1.1, 2.0][: len(shape)], shape)
    torch.testing.assert_close(spatial.integrate(svf), svf)
    torch.testing.assert_close(spatial.integrate(svf, steps=0), svf)


@pytest.mark.parametrize("shape", [(41, 43), (25, 27, 23)])
def test_a_linear_velocity_integrates_to_the_matrix_exponential(shape):
    """v(x) = M (x - c) flows to x -> c + exp(M)(x - c)."""
    d = len(shape)
    m = 0.1 * torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    zero = torch.zeros(d, 1, dtype=torch.float64)
    eye = torch.eye(d, dtype=torch.float64)
    svf = spatial.affine_to_disp(torch.cat([eye + m, zero], 1)[None], shape)
    expected = spatial.affine_to_disp(torch.cat([torch.linalg.matrix_exp(m), zero], 1)[None], shape)
    margin = 8
    for steps, tolerance in ((4, 0.1), (7, 0.012), (10, 0.0015)):  # first order in 1 / 2^steps
        error = interior(spatial.integrate(svf, steps) - expected, margin).abs().max()
        assert error < tolerance, steps


def test_a_rotating_velocity_preserves_circles():
    """v = w (-y, x): after unit time every point has turned by w about the centre."""
    shape, angle = (41, 41), 0.5
    y, x = spatial.identity_grid(shape, dtype=torch.float64) - 20
    disp = spatial.integrate(disp_of(-angle * x, angle * y), steps=10)[0]
    inside = (y**2 + x**2) < 18**2
    radius = ((y + disp[0]) ** 2 + (x + disp[1]) ** 2).sqrt()
    torch.testing.assert_close(radius[inside], (y**2 + x**2).sqrt()[inside], atol=5e-3, rtol=0)
    at = disp[:, 25, 20] + torch.tensor([5.0, 0.0])
    torch.testing.assert_close(
        at, torch.tensor([5 * math.cos(angle), 5 * math.sin(angle)]).double(), atol=5e-3, rtol=0
    )


@pytest.mark.parametrize("function", ["integrate", "invert", "jacobian_determinant"])
def test_gradients_of_field_functions(function):
    disp = 0.2 * torch.rand(1, 2, 3, 4, dtype=torch.float64) + 0.1
    arguments = {"integrate": (2,), "invert": (3,), "jacobian_determinant": ()}[function]
    assert torch.autograd.gradcheck(
        lambda u: getattr(spatial, function)(u, *arguments), disp.requires_grad_()
    )


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    scale=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_zero_is_neutral_for_any_grid(shape, scale, seed):
    d = len(shape)
    disp = scale * torch.randn(
        1, d, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    zero = torch.zeros_like(disp)
    torch.testing.assert_close(spatial.compose(zero, disp), disp)
    torch.testing.assert_close(spatial.compose(disp, zero), disp)
    assert spatial.integrate(zero).abs().max() == 0 and spatial.invert(zero).abs().max() == 0
    assert (spatial.jacobian_determinant(zero) == 1).all()
    image = torch.rand(1, 1, *shape, dtype=torch.float64)
    torch.testing.assert_close(spatial.warp(image, zero), image)
    torch.testing.assert_close(spatial.resize_disp(disp, shape), disp)


# --- Jacobian ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [2, 3])
def test_jacobian_of_an_affine_map_is_its_determinant_everywhere(d, dtype):
    theta = random_affine(d, 6)
    disp = spatial.affine_to_disp(theta, (6, 7, 5)[:d]).to(dtype)
    expected = torch.linalg.det(theta[0, :, :d]).to(dtype)
    det = spatial.jacobian_determinant(disp)
    assert det.shape == (1, *(6, 7, 5)[:d]) and det.dtype == dtype
    torch.testing.assert_close(det, expected.expand_as(det), atol=1e-5, rtol=0)


def test_jacobian_table():
    """u = (x0^2 / 4, 0): central difference x0 / 2, one-sided (1/4 and 5/4) at the border."""
    x0 = torch.arange(4, dtype=torch.float64)[:, None].expand(4, 3)
    det = spatial.jacobian_determinant(disp_of(x0**2 / 4, 0 * x0))
    expected = torch.tensor([1.25, 1.5, 2.0, 2.25], dtype=torch.float64)[:, None].expand(4, 3)
    torch.testing.assert_close(det[0], expected)


@pytest.mark.parametrize("shape", [(9, 200, 210), (3, 300, 500), (2, 300, 500), (700, 401)])
def test_jacobian_of_a_field_that_is_larger_than_the_cache(shape):
    """It is worked out in slabs: where two meet, value and gradient are those of the whole."""
    d = len(shape)
    disp = torch.randn(
        1, d, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(13)
    ).requires_grad_()
    rows = [
        torch.stack([x + (i == k) for k, x in enumerate(torch.gradient(disp[0, i]))], -1)
        for i in range(d)
    ]
    expected = torch.linalg.det(torch.stack(rows, -2))
    det = spatial.jacobian_determinant(disp)
    torch.testing.assert_close(det[0], expected)
    gradients = [torch.autograd.grad(x.square().mean(), disp)[0] for x in (det, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(64, 48), (24, 32, 28)])
def test_jacobian_of_a_periodic_field(shape):
    """u_0 = a sin(k x_0): det = 1 + a k cos(k x_0), where central differences give sin(k) for k."""
    k, a = 2 * math.pi / shape[0], 1.5
    x0 = spatial.identity_grid(shape, dtype=torch.float64)[0]
    disp = torch.zeros(1, len(shape), *shape, dtype=torch.float64)
    disp[:, 0] = a * (k * x0).sin()
    det = spatial.jacobian_determinant(disp)[0]
    torch.testing.assert_close(det[1:-1], (1 + a * math.sin(k) * (k * x0).cos())[1:-1])


def test_reflection_has_a_negative_determinant_and_a_singleton_axis_adds_nothing():
    grid = spatial.identity_grid((5, 4), dtype=torch.float64)
    flipped = disp_of(-2 * grid[0], 0 * grid[1])
    assert (spatial.jacobian_determinant(flipped) == -1).all()
    grid = spatial.identity_grid((5, 4, 1), dtype=torch.float64)
    stretched = disp_of(grid[0], 0 * grid[1], 7 + 0 * grid[2])
    assert (spatial.jacobian_determinant(stretched) == 2).all()


# --- affine maps -------------------------------------------------------------------------------


def test_a_quarter_turn_in_2d_is_written_in_array_axis_order():
    """R = [[0, -1], [1, 0]]: the fixed voxel one step along axis 0 looks one step along axis 1."""
    theta = spatial.rigid_theta(torch.tensor([[math.pi / 2]]), torch.tensor([[0.0, 0.0]]))
    torch.testing.assert_close(
        theta, torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]]), atol=1e-6, rtol=0
    )
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 4] = 1
    moved = spatial.warp(image, spatial.affine_to_disp(theta, (5, 5)))
    expected = torch.zeros(5, 5)
    expected[4, 2] = 1
    torch.testing.assert_close(moved[0, 0], expected, atol=1e-5, rtol=0)


def test_rotations_in_3d_agree_with_scipy():
    """R = R0 R1 R2, each by the right-hand rule about an array axis: intrinsic angles 'XYZ'."""
    generator = torch.Generator().manual_seed(7)
    angles = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    theta = spatial.rigid_theta(angles, torch.zeros(4, 3, dtype=torch.float64))
    expected = Rotation.from_euler("XYZ", angles.numpy()).as_matrix()
    np.testing.assert_allclose(theta[:, :, :3].numpy(), expected, atol=1e-12)
    for axis in range(3):
        one = torch.zeros(1, 3, dtype=torch.float64)
        one[0, axis] = 0.3
        vector = np.zeros(3)
        vector[axis] = 0.3
        found = spatial.rigid_theta(one, torch.zeros(1, 3, dtype=torch.float64))
        np.testing.assert_allclose(
            found[0, :, :3].numpy(), Rotation.from_rotvec(vector).as_matrix(), atol=1e-12
        )


@pytest.mark.parametrize("spacing", [(1.0, 2.5), (0.8, 1.2, 3.0)])
def test_a_rotation_keeps_lengths_in_millimetres_not_in_voxels(spacing):
    d = len(spacing)
    angles = torch.full((1, 1 if d == 2 else 3), 0.4, dtype=torch.float64)
    shift = torch.ones(1, d, dtype=torch.float64)
    theta = spatial.rigid_theta(angles, shift, spacing)
    assert theta.shape == (1, d, d + 1)
    torch.testing.assert_close(theta[:, :, d], shift)
    size = torch.diag(torch.tensor(spacing, dtype=torch.float64))
    rotation = size @ theta[0, :, :d] @ torch.linalg.inv(size)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(d, dtype=torch.float64))
    torch.testing.assert_close(rotation, spatial.rigid_theta(angles, shift)[0, :, :d])
    assert not torch.allclose(theta[0, :, :d], rotation)


@pytest.mark.parametrize("shape", SHAPES + SINGLETONS)
def test_affine_acts_about_the_centre(shape):
    d = len(shape)
    theta = torch.cat([random_affine(d, 8), random_affine(d, 9)])
    disp = spatial.affine_to_disp(theta, shape)
    centre = (np.array(shape) - 1) / 2
    x = np.moveaxis(np.indices(shape), 0, -1)
    for b in range(2):
        a, t = theta[b, :, :d].numpy(), theta[b, :, d].numpy()
        expected = (x - centre) @ a.T + centre + t - x
        np.testing.assert_allclose(disp[b].movedim(0, -1).numpy(), expected, atol=1e-12)


# --- resizing and padding ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [((5, 9), (9, 17)), ((9, 17), (5, 9)), ((4, 7), (11, 3)), ((3, 5, 4), (7, 6, 9))],
)
def test_resize_disp_factors(old, new):
    """Corner voxels stay corner voxels: a linear map keeps being that map, with new numbers."""
    factors = [(n - 1) / (o - 1) for n, o in zip(new, old, strict=True)]
    shift = [1.0, -2.0, 3.0][: len(old)]
    resized = spatial.resize_disp(constant(shift, old), new)
    torch.testing.assert_close(
        resized, constant([s * f for s, f in zip(shift, factors, strict=True)], new)
    )
    # stretching by 2 about voxel 0, u = x, is the same map on every grid
    grid = spatial.identity_grid(old, dtype=torch.float64)
    torch.testing.assert_close(
        spatial.resize_disp(grid[None], new)[0], spatial.identity_grid(new, dtype=torch.float64)
    )


def test_resize_disp_leaves_values_along_a_singleton_axis():
    resized = spatial.resize_disp(constant((3.0, 1.0), (1, 5)), (4, 9))
    torch.testing.assert_close(resized, constant((3.0, 2.0), (4, 9)))
    resized = spatial.resize_disp(constant((3.0, 1.0), (4, 5)), (1, 5))
    torch.testing.assert_close(resized, constant((0.0, 1.0), (1, 5)))


@pytest.mark.parametrize(("old", "new"), [((5, 9), (17, 33)), ((2, 6), (7, 11)), ((4, 5, 6),) * 2])
def test_a_spline_of_control_points_is_that_of_scipy(old, new):
    """Beyond the corner points the points go on in a straight line, as they do inside here."""
    points = torch.rand(1, len(old), *old, dtype=torch.float64)
    expected = points[0, 1].numpy()
    for axis, (n, m) in enumerate(zip(old, new, strict=True)):
        x = np.moveaxis(expected, axis, 0)
        x = np.concatenate([2 * x[:1] - x[1:2], x, 2 * x[-1:] - x[-2:-1]])
        spline = interpolate.BSpline(np.arange(-2.0, n + 4) - 1, x, 3)
        expected = np.moveaxis(spline(np.linspace(0, n - 1, m)), 0, axis)
    np.testing.assert_allclose(spatial.spline_disp(points, new)[0, 1], expected, atol=1e-12)


def test_a_linear_displacement_of_control_points_is_that_of_the_voxels():
    ramp = 3 * torch.arange(5, dtype=torch.float64).reshape(1, 1, 5, 1).expand(1, 2, 5, 1)
    found = spatial.spline_disp(ramp, (13, 4))
    expected = torch.arange(13, dtype=torch.float64).reshape(1, 1, 13, 1).expand(1, 2, 13, 4)
    torch.testing.assert_close(found, expected)  # 12 over 4 steps, in 12 steps
    shift = constant((2.0, -1.0, 0.5), (1, 2, 3))
    torch.testing.assert_close(
        spatial.spline_disp(shift, (4, 1, 9)), constant((2.0, -1.0, 0.5), (4, 1, 9))
    )


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 20), min_size=2, max_size=3), k=st.integers(1, 16))
def test_padding_reaches_the_next_multiple_and_crop_undoes_it(shape, k):
    image = torch.rand(2, 1, *shape) + 1
    padded, crop = spatial.pad_to_multiple(image, k)
    for n, m in zip(shape, padded.shape[2:], strict=True):
        assert m % k == 0 and n <= m < n + k
    assert torch.equal(crop(padded), image)
    assert float(padded.sum()) == pytest.approx(float(image.sum()), rel=1e-5)  # zeros were added
    several = torch.cat([padded, 2 * padded], dim=1)
    assert torch.equal(crop(several), torch.cat([image, 2 * image], dim=1))


# --- points ------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 3])
def test_points_go_from_fixed_to_moving_as_the_affine_map_says(d):
    shape = (12, 15, 11)[:d]
    theta = torch.cat([random_affine(d, 10), random_affine(d, 11)])
    centre = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    generator = torch.Generator().manual_seed(12)
    points = torch.rand(2, 20, d, dtype=torch.float64, generator=generator) * (2 * centre)
    expected = (points - centre) @ theta[:, :, :d].mT + centre + theta[:, None, :, d]
    found = spatial.warp_points(points, spatial.affine_to_disp(theta, shape))
    torch.testing.assert_close(found, expected)


def test_points_and_image_agree():
    """A bright voxel of the moving image shows in the moved image at the point that maps to it."""
    moving = torch.zeros(1, 1, 9, 9)
    moving[0, 0, 6, 3] = 1
    disp = constant((2.0, -1.0), (9, 9), dtype=torch.float32)
    where = (spatial.warp(moving, disp)[0, 0] == 1).nonzero().float()
    torch.testing.assert_close(spatial.warp_points(where[None], disp), torch.tensor([[[6.0, 3.0]]]))


def test_points_between_voxels_and_outside():
    x0 = torch.arange(3, dtype=torch.float64)[:, None].expand(3, 2)
    disp = disp_of(x0, 0 * x0 + 1)
    points = torch.tensor([[[0.5, 0.0], [-4.0, 0.5], [9.0, 1.0]]], dtype=torch.float64)
    expected = torch.tensor([[[1.0, 1.0], [-4.0, 1.5], [11.0, 2.0]]], dtype=torch.float64)
    torch.testing.assert_close(spatial.warp_points(points, disp), expected)


def test_no_points_at_all():
    assert spatial.warp_points(torch.zeros(1, 0, 2), torch.zeros(1, 2, 4, 4)).shape == (1, 0, 2)


def test_points_have_gradients():
    points = torch.tensor([[[0.4, 1.3], [1.7, 0.2]]], dtype=torch.float64, requires_grad=True)
    disp = torch.rand(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(spatial.warp_points, (points, disp))


# --- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_to_float32(half):
    image = torch.rand(1, 1, 7, 9)
    disp = periodic((7, 9), 1.0, torch.float32)
    assert spatial.warp(image.to(half), disp.to(half)).dtype == torch.float32
    assert spatial.integrate(disp.to(half)).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(spatial.warp(image, disp), spatial.warp(image, disp))
        inside = spatial.affine_to_disp(random_affine(2, 3).float(), (7, 9))
    outside = spatial.affine_to_disp(random_affine(2, 3).float(), (7, 9))
    assert torch.equal(inside, outside)


# --- bad input: one sentence that names the argument, what came and what is expected -----------

GOOD = torch.zeros(1, 2, 4, 5)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: spatial.warp(torch.zeros(1, 1, 4, 5), torch.zeros(1, 3, 4, 5)),
         ["disp", "(1, 3, 4, 5)", "expected (B, 2, H, W) or (B, 3, D, H, W)"]),
        (lambda: spatial.warp(torch.zeros(1, 1, 4, 5), torch.zeros(2, 4, 5)),
         ["disp", "(2, 4, 5)", "expected"]),
        (lambda: spatial.warp(torch.zeros(4, 5), GOOD), ["image", "(4, 5)", "expected (B, C, *S)"]),
        (lambda: spatial.warp(torch.zeros(1, 1, 4, 5, 6), GOOD), ["image", "(1, 1, 4, 5, 6)"]),
        (lambda: spatial.warp(torch.zeros(3, 1, 4, 5), torch.zeros(2, 2, 4, 5)),
         ["image", "(3, 1, 4, 5)", "(2, 2, 4, 5)"]),
        (lambda: spatial.warp(torch.zeros(1, 1, 4, 5), GOOD, mode="cubic"),
         ["mode", "'cubic'", "'linear' or 'nearest'"]),
        (lambda: spatial.warp(torch.zeros(1, 1, 4, 5), GOOD, padding="reflect"),
         ["padding", "'reflect'", "'zeros' or 'border'"]),
        (lambda: spatial.warp(torch.zeros(1, 1, 4, 5, dtype=torch.int64), GOOD),
         ["image", "int64", "expected floating point", "nearest"]),
        (lambda: spatial.warp(torch.zeros(1, 1, 4, 5), GOOD.long()),
         ["disp", "int64", "expected floating point"]),
        (lambda: spatial.compose(torch.zeros(1, 1, 4, 5), GOOD), ["first", "(1, 1, 4, 5)"]),
        (lambda: spatial.compose(GOOD, torch.zeros(1, 1, 4, 5)), ["then", "(1, 1, 4, 5)"]),
        (lambda: spatial.integrate(torch.zeros(1, 4, 5)), ["svf", "(1, 4, 5)"]),
        (lambda: spatial.integrate(GOOD, steps=-1), ["steps", "-1", "expected 0 or more"]),
        (lambda: spatial.invert(GOOD, iterations=0), ["iterations", "0", "expected 1 or more"]),
        (lambda: spatial.compose(GOOD, torch.zeros(2, 2, 4, 5)),
         ["first", "(1, 2, 4, 5)", "then", "(2, 2, 4, 5)", "same batch"]),
        (lambda: spatial.compose(GOOD, torch.zeros(1, 3, 4, 5, 6)), ["first", "number of axes"]),
        (lambda: spatial.invert(torch.zeros(1, 4, 5)), ["disp", "(1, 4, 5)"]),
        (lambda: spatial.jacobian_determinant(torch.zeros(4, 5)), ["disp", "(4, 5)"]),
        (lambda: spatial.rigid_theta(torch.zeros(1, 3), torch.zeros(1, 2)),
         ["angles", "(1, 3)", "(1, 2)", "expected"]),
        (lambda: spatial.rigid_theta(torch.zeros(1, 2), torch.zeros(1, 3)), ["angles", "(1, 2)"]),
        (lambda: spatial.rigid_theta(torch.zeros(1, 1), torch.zeros(1, 2), (1.0, 1.0, 1.0)),
         ["spacing", "2"]),
        (lambda: spatial.rigid_theta(torch.zeros(1, 1), torch.zeros(1, 2), 0.0),
         ["spacing", "0", "positive"]),
        (lambda: spatial.affine_to_disp(torch.zeros(1, 2, 2), (4, 5)),
         ["theta", "(1, 2, 2)", "expected (B, 2, 3)"]),
        (lambda: spatial.affine_to_disp(torch.zeros(1, 2, 3), (4, 5, 6)),
         ["theta", "(1, 2, 3)", "(B, 3, 4)"]),
        (lambda: spatial.resize_disp(GOOD, (4, 5, 6)), ["shape", "(4, 5, 6)", "2"]),
        (lambda: spatial.resize_disp(GOOD, (0, 5)), ["shape", "(0, 5)"]),
        (lambda: spatial.spline_disp(GOOD, (4, 5, 6)), ["shape", "(4, 5, 6)", "2"]),
        (lambda: spatial.spline_disp(GOOD[0], (4, 5)), ["points"]),
        (lambda: spatial.pad_to_multiple(torch.zeros(1, 1, 4, 5), 0), ["k is 0", "expected 1"]),
        (lambda: spatial.pad_to_multiple(torch.zeros(4, 5), 4), ["image", "(4, 5)", "expected"]),
        (lambda: spatial.warp_points(torch.zeros(1, 7, 3), GOOD),
         ["points", "(1, 7, 3)", "expected (1, N, 2)"]),
        (lambda: spatial.warp_points(torch.zeros(7, 2), GOOD), ["points", "(7, 2)"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(call, parts):
    with pytest.raises(ValueError) as caught:
        call()
    sentence = str(caught.value)
    for part in parts:
        assert part in sentence
    assert "\n" not in sentence and sentence.endswith(".")
