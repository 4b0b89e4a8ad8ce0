"""Losses against tables, invariances, NumPy, SciPy and MONAI."""

import inspect
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from regkit import losses, spatial

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.float32, torch.float64]
SHAPES = [(13, 16), (9, 10, 11)]
SINGLETONS = [(1, 12), (12, 1), (9, 1, 11)]
SIMILARITIES = [
    losses.mse,
    losses.ncc,
    losses.lncc,
    losses.mutual_information,
    losses.mind_ssc,
]
REGULARISERS = [losses.diffusion, losses.bending, losses.folding]


def images(shape, batch=2, channels=1, dtype=torch.float64, seed=0):
    """Two noisy images with something in common."""
    generator = torch.Generator().manual_seed(seed)
    a, noise = torch.rand(2, batch, channels, *shape, generator=generator, dtype=dtype)
    return a, 0.6 * a + 0.4 * noise


def field(shape, batch=2, dtype=torch.float64, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(batch, len(shape), *shape, generator=generator, dtype=dtype)


# --- what all of them share --------------------------------------------------------------------


@pytest.mark.parametrize("loss", SIMILARITIES)
def test_similarities_take_moved_then_fixed(loss):
    assert list(inspect.signature(loss).parameters)[:2] == ["moved", "fixed"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + SINGLETONS)
def test_every_loss_is_a_finite_number_with_finite_gradients(shape, dtype, device):
    a, b = (x.to(device).requires_grad_() for x in images(shape, dtype=dtype))
    u, v = (field(shape, dtype=dtype, seed=s).to(device).requires_grad_() for s in (1, 2))
    terms = [(loss, (a, b)) for loss in (*SIMILARITIES, losses.soft_dice)]
    terms += [(loss, (u,)) for loss in REGULARISERS] + [(losses.consistency, (u, v))]
    for loss, arguments in terms:
        value = loss(*arguments)
        assert value.shape == () and value.dtype == dtype and value.device == a.device
        assert torch.isfinite(value), loss.__name__
        for gradient in torch.autograd.grad(value, arguments):
            assert torch.isfinite(gradient).all(), loss.__name__


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_losses_compute_in_float32_under_autocast_and_for_half_precision(half):
    a, b = images((13, 16), dtype=torch.float32)
    u = field((13, 16), dtype=torch.float32)
    pairs = [(loss, (a, b)) for loss in SIMILARITIES] + [(loss, (u,)) for loss in REGULARISERS]
    for loss, arguments in pairs:
        expected = loss(*arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(*arguments), expected)
        raised = loss(*[x.to(half) for x in arguments])
        assert raised.dtype == torch.float32
        assert torch.equal(raised, loss(*[x.to(half).float() for x in arguments]))


@pytest.mark.parametrize("loss", SIMILARITIES)
def test_similarities_of_two_dtypes_compute_in_the_wider_one(loss):
    a, b = images((13, 16))
    narrow = a.float().requires_grad_()
    value = loss(narrow, b)
    assert value.dtype == torch.float64
    assert torch.equal(value, loss(narrow.double(), b))
    assert torch.autograd.grad(value, narrow)[0].dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("loss", SIMILARITIES)
def test_what_is_not_a_number_stays_visible(loss, bad):
    a, b = images((13, 16))
    a[0, 0, 3, 4] = bad
    for arguments in ((a, b), (b, a)):
        assert not torch.isfinite(loss(*arguments))


def peak_bytes(call):
    """The most that torch's CPU allocator held during a call, beyond what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return max(held)


def test_lncc_takes_at_most_12_volumes_beside_its_inputs():
    a, b = images((40, 48, 40), batch=1, dtype=torch.float32)
    a.requires_grad_()
    assert peak_bytes(lambda: losses.lncc(a, b).backward()) <= 12 * a.numel() * a.element_size()


@pytest.mark.parametrize("loss", SIMILARITIES)
def test_memory_is_linear_in_the_voxels(loss):
    sizes = []
    for n in (32, 64):
        a, b = images((n, n, n), batch=1, dtype=torch.float32)
        a.requires_grad_()
        sizes.append(peak_bytes(lambda x=a, y=b: loss(x, y).backward()))
    assert sizes[1] <= 8.1 * sizes[0]


# --- mse and ncc -------------------------------------------------------------------------------


def test_mse_table():
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    b = torch.tensor([[1.0, 0.0], [3.0, 1.0]])[None, None]
    assert float(losses.mse(a, b)) == (4 + 9) / 4
    assert float(losses.mse(b, b)) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_ncc_is_one_minus_pearson(shape):
    a, b = images(shape, batch=2, channels=2)
    flat = [x.flatten(2).flatten(0, 1).numpy() for x in (a, b)]
    expected = 1 - np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(*flat, strict=True)])
    assert float(losses.ncc(a, b)) == pytest.approx(expected, abs=1e-12)


def test_ncc_of_perfect_opposite_and_constant_images():
    a, _ = images((13, 16))
    assert float(losses.ncc(a, 3 * a + 7)) == pytest.approx(0, abs=1e-12)
    assert float(losses.ncc(a, -a)) == pytest.approx(2, abs=1e-12)
    assert float(losses.ncc(a, torch.full_like(a, 5))) == 1
    assert float(losses.ncc(torch.zeros_like(a), torch.zeros_like(a))) == 1


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_ncc_does_not_mind_the_scale_in_float32(scale):
    a, b = images((13, 16), dtype=torch.float32)
    assert float(losses.ncc(scale * a, scale * b)) == pytest.approx(
        float(losses.ncc(a, b)), abs=1e-5
    )


def test_ncc_gradient():
    a, b = (x.requires_grad_() for x in images((5, 6), batch=2, channels=2))
    assert torch.autograd.gradcheck(losses.ncc, (a, b))


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, -1000.0, 1e6 / 3, 1e-12])
def test_constant_images_have_no_correlation_and_no_gradient(value):
    """Also once they have been looked up between the voxels, which leaves rounding."""
    flat = torch.full((1, 1, 24, 25), value)
    noisy = spatial.warp(flat, torch.rand(1, 2, 24, 25) - 0.5, padding="border")
    other = torch.rand(1, 1, 24, 25)
    for a, b in itertools.product((flat, noisy), (flat, noisy, other)):
        for x, y in ((a, b), (b, a)):
            x = x.clone().requires_grad_()
            losses.ncc(x, y).backward()
            assert float(losses.ncc(x.detach(), y)) == 1 and not x.grad.any()
    for a, b in itertools.product((flat, noisy), repeat=2):
        assert float(losses.lncc(a, b)) == 0  # no box is left
        assert float(losses.mse(a, b)) <= (2 * torch.finfo().eps * value) ** 2
    assert abs(float(losses.mutual_information(flat, other))) < 1e-7


@pytest.mark.parametrize(("offset", "scale"), [(-1000, 4000), (1e6, 20), (0, 1e-12), (1e4, 1)])
def test_correlations_of_large_numbers_are_those_of_float64(offset, scale):
    """CT, an offset a million times the ulp, very small numbers: what float32 holds of them counts.

    The reference is the same images in float64. Local boxes lose more: see `lncc`.
    """
    a, b = (offset + scale * x.float() for x in images((40, 40, 40)))
    b = (a + b) / 2
    for loss, error in (
        (losses.ncc, 1e-6),
        (losses.mutual_information, 1e-5),
        (losses.lncc, 1e-4),
    ):
        assert float(loss(a, b)) == pytest.approx(float(loss(a.double(), b.double())), abs=error)
    same = float(losses.mse(a.double(), b.double()))
    assert float(losses.mse(a, b)) == pytest.approx(same, rel=1e-5)


def test_ncc_of_a_small_signal_on_a_large_number():
    """The mean of 1e5 is rounded by a hundredth, a tenth of the signal: it is taken off twice."""
    a, b = (1e5 + 0.1 * x.float() for x in images((40, 40, 40)))
    b = (a + b) / 2
    assert float(losses.ncc(a, b)) == pytest.approx(
        float(losses.ncc(a.double(), b.double())), abs=1e-6
    )


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_mutual_information_of_numbers_at_the_ends_of_float32(scale):
    a, b = (x.float() for x in images((20, 20)))
    expected = float(losses.mutual_information(a, a + b))
    found = float(losses.mutual_information(a * scale, (a + b) * scale))
    assert found == pytest.approx(expected, abs=1e-4)


# --- lncc --------------------------------------------------------------------------------------


def lncc_by_hand(a, b, window=9, mask=None):
    """The definition, one window after the other, in NumPy: (*S) arrays."""
    values = []
    radius = window // 2
    for centre in np.ndindex(a.shape):
        if mask is not None and not mask[centre]:
            continue
        box = tuple(slice(max(c - radius, 0), c + radius + 1) for c in centre)
        x, y = a[box].ravel(), b[box].ravel()
        flat = np.ptp(x) == 0, np.ptp(y) == 0
        if all(flat):
            continue
        values.append(0.0 if any(flat) else np.corrcoef(x, y)[0, 1] ** 2)
    return 1 - np.mean(values) if values else 0.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [3, 5, 9])
@pytest.mark.parametrize("shape", [*SHAPES, *SINGLETONS, (4, 5)])
def test_lncc_is_its_definition(shape, window, dtype, device):
    a, b = images(shape, batch=1)
    checkers = spatial.identity_grid(shape, dtype=torch.float64).sum(0) % 2  # no window is flat
    a, b = a + checkers, b - 0.7 * checkers
    expected = lncc_by_hand(a[0, 0].numpy(), b[0, 0].numpy(), window)
    found = losses.lncc(a.to(device, dtype), b.to(device, dtype), window=window)
    assert float(found) == pytest.approx(expected, abs=1e-10 if dtype == torch.float64 else 2e-5)


def test_lncc_agrees_with_monai_inside():
    """MONAI pads with zeros, so only a pair that is 0 near its border has the same windows."""
    monai_losses = pytest.importorskip("monai.losses")
    for shape in SHAPES:
        a, b = images(shape, batch=2, dtype=torch.float32)
        inner = torch.zeros(shape, dtype=torch.bool)
        inner[(slice(4, -4),) * len(shape)] = True  # boxes of 9 centred here lie inside
        mask = inner[None, None].expand(2, 1, *shape)
        ours = losses.lncc(a, b, window=9, mask=mask)
        kernel = monai_losses.LocalNormalizedCrossCorrelationLoss(
            spatial_dims=len(shape), kernel_size=9, reduction="none", smooth_nr=0, smooth_dr=1e-12
        )
        theirs = kernel(a, b)[mask]
        assert float(ours) == pytest.approx(1 + float(theirs.mean()), abs=2e-4)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_lncc_still_sees_faint_texture_in_float32(scale):
    """Texture of 3 % of the image's standard deviation, far from the mean, beside a bright edge."""
    a, b = images((24, 20), batch=1, seed=2)
    edge = 3.5 * (torch.arange(24) > 11).double()[:, None]
    a, b = (scale * (x / x.std() * 0.05 + edge) for x in (a, b))
    expected = lncc_by_hand(a[0, 0].numpy(), b[0, 0].numpy(), 5)
    found = losses.lncc(a.float(), b.float(), window=5)
    assert float(found) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_lncc_of_an_image_with_itself_is_0_background_or_not(shape, dtype):
    a, _ = images(shape, dtype=dtype)
    brain = torch.zeros_like(a)
    window = (..., *[slice(3, 7)] * len(shape))
    brain[window] = a[window]
    for x in (a, brain, torch.zeros_like(a), torch.full_like(a, 7.3), -1000 + 0 * a):
        assert float(losses.lncc(x, x)) == pytest.approx(
            0, abs=1e-12 if dtype == torch.float64 else 1e-5
        )


def test_lncc_windows_where_one_image_is_constant_count_as_no_correlation():
    a, _ = images((13, 16))
    flat = torch.full_like(a, 2.0)
    assert float(losses.lncc(a, flat)) == 1 == float(losses.lncc(flat, a))
    # both constant, but different: nothing to compare anywhere
    assert float(losses.lncc(flat, 0 * flat)) == 0
    # b is constant in the left half, both are at the far right
    b = a.clone()
    a[..., 11:] = 0
    b[..., 11:] = 0
    b[..., :5] = 3.0
    expected = np.mean([lncc_by_hand(*(x[i, 0].numpy() for x in (a, b)), 3) for i in range(2)])
    assert float(losses.lncc(a, b, window=3)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lncc_is_invariant_to_brightness_and_contrast(dtype):
    a, b = images((24, 20), dtype=dtype)
    expected = float(losses.lncc(a, b))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for scale, shift in ((2.0, 0.0), (-1.0, 0.0), (1e3, 1e3), (1e-3, 0.5), (4000.0, -1000.0)):
        assert float(losses.lncc(scale * a + shift, b)) == pytest.approx(expected, abs=tolerance)
        assert float(losses.lncc(a, scale * b + shift)) == pytest.approx(expected, abs=tolerance)


def test_lncc_of_a_batch_is_the_mean_of_its_images_and_channels():
    """However many windows count in each: two halves of a batch average to the whole."""
    a, b = images((13, 16), batch=3, channels=2)
    a[0, 0, :, :12] = b[0, 0, :, :12] = 0  # few windows count
    a[1, 1] = b[1, 1] = 4  # none does
    a[2, 1] *= 1e-6  # faint beside its other channel
    mask = torch.ones(3, 1, 13, 16)
    mask[2, :, 3:] = 0

    def by_hand(n, c):
        return lncc_by_hand(*(x[n, c].numpy() for x in (a, b)), 5, mask[n, 0].numpy())

    expected = np.mean([by_hand(n, c) for n in range(3) for c in range(2)])
    x = a.clone().requires_grad_()
    whole = losses.lncc(x, b, window=5, mask=mask)
    assert whole.item() == pytest.approx(expected, abs=1e-10)
    parts = [losses.lncc(*(t[n : n + 1] for t in (x, b)), 5, mask[n : n + 1]) for n in range(3)]
    assert whole.item() == pytest.approx(sum(parts).item() / 3, abs=1e-12)
    (gradient,) = torch.autograd.grad(whole, x)
    torch.testing.assert_close(torch.autograd.grad(sum(parts) / 3, x)[0], gradient)


@pytest.mark.parametrize("window", [31, 10**9 + 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_lncc_in_a_window_larger_than_the_image_is_its_global_correlation(shape, window):
    a, b = images(shape, batch=1)
    expected = 1 - np.corrcoef(a.numpy().ravel(), b.numpy().ravel())[0, 1] ** 2
    assert float(losses.lncc(a, b, window=window)) == pytest.approx(expected, abs=1e-10)


def test_lncc_has_no_second_derivative_and_says_so():
    a, b = images((6, 7))
    (gradient,) = torch.autograd.grad(losses.lncc(a.requires_grad_(), b), a, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_lncc_mask_chooses_the_windows():
    a, b = images((13, 16), batch=1)
    mask = torch.rand(1, 1, 13, 16, generator=torch.Generator().manual_seed(3)) > 0.7
    expected = lncc_by_hand(a[0, 0].numpy(), b[0, 0].numpy(), 5, mask[0, 0].numpy())
    assert float(losses.lncc(a, b, window=5, mask=mask)) == pytest.approx(expected, abs=1e-10)
    assert float(losses.lncc(a, b, mask=torch.zeros_like(mask))) == 0


@pytest.mark.parametrize("shape", [(5, 4), (4, 3, 5), (6, 1)])
def test_lncc_gradient(shape):
    """Up to the change of the image's own mean and scale, which leaves the value as it is."""
    a, b = (x.requires_grad_() for x in images(shape, batch=1, seed=4))
    assert torch.autograd.gradcheck(lambda x, y: losses.lncc(x, y, window=3), (a, b), atol=1e-6)


def test_lncc_gradient_with_windows_that_are_constant():
    a, b = images((8, 7), batch=2, seed=5)
    a[..., :4], b[..., 5:] = 1.0, 2.0
    mask = torch.rand(2, 1, 8, 7, generator=torch.Generator().manual_seed(6)) > 0.3

    def loss(x):
        # move the textured part only: a constant window that stops being one is a jump
        y = a.clone()
        y[..., 4:] = x
        return losses.lncc(y, b, window=3, mask=mask)

    assert torch.autograd.gradcheck(loss, a[..., 4:].clone().requires_grad_(), atol=1e-6)


# --- MIND-SSC ----------------------------------------------------------------------------------


def mind_by_hand(image, dilation, radius):
    """The formula, one voxel after the other, in NumPy: (*S) -> (K, *S), pairs in no set order."""
    ndim, margin = image.ndim, dilation + radius
    padded = np.pad(image, margin, mode="edge")
    steps = [sign * dilation * row for row in np.eye(ndim, dtype=int) for sign in (1, -1)]
    pairs = [(p, q) for p, q in itertools.combinations(steps, 2) if (p + q).any()]

    def patch(centre):
        return padded[tuple(slice(c + dilation, c + dilation + 2 * radius + 1) for c in centre)]

    distances = np.zeros((len(pairs), *image.shape))
    for voxel in np.ndindex(image.shape):
        for k, (p, q) in enumerate(pairs):
            distances[(k, *voxel)] = np.mean((patch(voxel + p) - patch(voxel + q)) ** 2)
    distances -= distances.min(0)
    variance = distances.mean(0)
    variance = variance.clip(variance.mean() / 1000, variance.mean() * 1000)
    return np.exp(-distances / variance)


def in_order(features):
    """Features (K, *S) with the K numbers of each voxel sorted: pairs may come in any order."""
    return np.sort(np.asarray(features), 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dilation", "radius"), [(1, 0), (2, 1), (1, 2)])
@pytest.mark.parametrize("shape", [(7, 9), (5, 6, 7), (6, 7, 1), (6, 7, 2), (1, 12)])
def test_mind_is_its_formula(shape, dilation, radius, dtype, device):
    image, _ = images(shape, batch=1)
    image.view(-1)[: image.numel() // 3] = 0.5  # a part of one value
    expected = mind_by_hand(image[0, 0].numpy(), dilation, radius)
    found = losses.mind_features(image.to(device, dtype), dilation, radius)
    assert found.shape == (1, 4 if len(shape) == 2 else 12, *shape) and found.dtype == dtype
    np.testing.assert_allclose(
        in_order(found[0].cpu()), in_order(expected), atol=1e-9 if dtype == torch.float64 else 5e-4
    )
    # and pair by pair: each channel is one of the formula's, at all voxels
    for channel in found[0].cpu():
        assert min(np.abs(channel.numpy() - e).max() for e in expected) < 1e-3


@pytest.mark.parametrize("radius", [1, 2])
def test_mind_agrees_with_the_authors_convolutions_inside(radius):
    """Six neighbours, twelve pairs at a squared distance of 2, as two kernels of -1, 0 and 1."""
    image, _ = images((16, 17, 18), batch=1)
    six = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 0, 1], [1, 1, 2], [2, 1, 1], [1, 2, 1]])
    pairs = [(i, j) for i, j in itertools.combinations(range(6), 2)
             if (six[i] - six[j]).square().sum() == 2]  # fmt: skip
    kernel = torch.zeros(12, 1, 3, 3, 3, dtype=image.dtype)
    for k, (i, j) in enumerate(pairs):
        kernel[(k, 0, *six[i])] += 1
        kernel[(k, 0, *six[j])] -= 1
    difference = torch.nn.functional.conv3d(image, kernel, dilation=2)
    distance = torch.nn.functional.avg_pool3d(difference.square(), 2 * radius + 1, stride=1)
    distance = distance - distance.min(1, keepdim=True)[0]
    expected = torch.exp(-distance / distance.mean(1, keepdim=True))  # no limit is reached
    inside = (slice(2 + radius, -2 - radius),) * 3
    found = losses.mind_features(image, 2, radius)[(..., *inside)]
    np.testing.assert_allclose(in_order(found[0]), in_order(expected[0]), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_mind_does_not_mind_brightness_and_contrast(shape):
    a, b = images(shape, dtype=torch.float32)
    expected = losses.mind_features(a)
    for scale, shift in ((-1, 0), (4000, -1000), (-1e-3, 0.5), (1e-12, 0), (-1e12, 0)):
        other = scale * a + shift
        torch.testing.assert_close(losses.mind_features(other), expected, atol=2e-3, rtol=0)
        assert float(losses.mind_ssc(other, a)) < 1e-5 < float(losses.mind_ssc(other, b))


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.0, 1e6 / 3, 1e-12])
def test_mind_of_a_constant_image_is_1(value):
    """Also once it has been looked up between the voxels, which leaves rounding."""
    flat = torch.full((1, 1, 24, 25), value)
    noisy = spatial.warp(flat, torch.rand(1, 2, 24, 25) - 0.5, padding="border").requires_grad_()
    assert (losses.mind_features(flat) == 1).all() and (losses.mind_features(noisy) == 1).all()
    (gradient,) = torch.autograd.grad(losses.mind_ssc(noisy, torch.rand(1, 1, 24, 25)), noisy)
    assert not gradient.any()


def test_mind_lies_between_0_and_1_and_sees_a_shift():
    a, b = images((13, 16))
    assert 0 < float(losses.mind_ssc(a, b)) < 1 and float(losses.mind_ssc(a, a)) == 0
    features = losses.mind_features(a)
    assert 0 < float(features.min()) and float(features.max()) == 1
    # the nearest pair of patches of each voxel has 1
    assert (features.amax(1) == 1).all()


def test_mind_of_channels_and_of_a_batch_is_that_of_each_image():
    a, b = images((9, 10, 11), batch=2, channels=3)
    a[1, 2] *= 1e-6
    a[1, 1, 4:] = 0.5 + 1e-3 * a[1, 1, 4:]  # nearly flat: the limits of the variance are met
    whole = losses.mind_features(a)
    assert whole.shape == (2, 36, 9, 10, 11)
    for n, c in itertools.product(range(2), range(3)):
        alone = losses.mind_features(a[n : n + 1, c : c + 1])
        torch.testing.assert_close(whole[n, 12 * c : 12 * c + 12], alone[0])
    parts = [
        losses.mind_ssc(*(x[n : n + 1, c : c + 1] for x in (a, b)))
        for n, c in itertools.product(range(2), range(3))
    ]
    torch.testing.assert_close(losses.mind_ssc(a, b), torch.stack(parts).mean())


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 3), (4, 3, 1)])
def test_mind_gradient(shape):
    a, b = (x.requires_grad_() for x in images(shape, batch=1, channels=2, seed=4))
    assert torch.autograd.gradcheck(losses.mind_ssc, (a, b), atol=1e-6)


def test_mind_finds_what_is_bright_in_one_contrast_and_dark_in_the_other():
    """Two contrasts of one piece, one with each intensity folded about its middle."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 1, 40, 40, generator=generator)
    image = torch.nn.functional.interpolate(noise[..., :8, :8], size=(40, 40), mode="bicubic")
    other = (image - image.mean()).abs()
    at_rest = float(losses.mind_ssc(other, image))
    for shift in (3, -3, 5):
        for axis in (2, 3):
            assert float(losses.mind_ssc(other.roll(shift, axis), image)) > 1.5 * at_rest


# --- mutual information ------------------------------------------------------------------------


def mi_by_hand(a, b, bins):
    """Mattes: cubic B-spline histogram with two bins of margin, by SciPy, one image."""
    spline = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)

    def weights(x):
        position = 2 + (x - x.min()) / np.ptp(x) * (bins - 5)
        return np.nan_to_num(spline(position[:, None] - np.arange(bins)))

    joint = weights(a.ravel()).T @ weights(b.ravel()) / a.size
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / outer[seen])).sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 40)])
@pytest.mark.parametrize("bins", [8, 32])
def test_mutual_information_agrees_with_its_histogram_in_numpy(bins, shape, device):
    a, b = images(shape, batch=3)
    expected = -np.mean(
        [mi_by_hand(x[0].numpy(), y[0].numpy(), bins) for x, y in zip(a, b, strict=True)]
    )
    found = losses.mutual_information(a.to(device), b.to(device), bins=bins)
    assert float(found) == pytest.approx(expected, abs=1e-10)


def test_mutual_information_agrees_with_numpys_histogram_where_bins_are_sharp():
    """Two levels far apart fill no common bin: the MI of a 2 x 2 table, whatever the windows."""
    generator = torch.Generator().manual_seed(0)
    a = (torch.rand(1, 1, 50, 50, generator=generator) > 0.4).double()
    flip = (torch.rand(a.shape, generator=generator) > 0.9).double()
    b = (a - flip).abs()
    joint, _, _ = np.histogram2d(a.numpy().ravel(), b.numpy().ravel(), bins=2)
    joint /= joint.sum()
    outer = joint.sum(1, keepdims=True) @ joint.sum(0, keepdims=True)
    expected = (joint * np.log(joint / outer)).sum()
    assert float(losses.mutual_information(a, b)) == pytest.approx(-expected, abs=1e-9)
    # it only asks whether one image predicts the other
    for swapped in (1 - b, 5 - 3 * b):
        assert float(losses.mutual_information(a, swapped)) == pytest.approx(-expected, abs=1e-9)
    assert float(losses.mutual_information(a, a)) == pytest.approx(
        float((joint.sum(1) * np.log(joint.sum(1))).sum()), abs=1e-9
    )


def test_mutual_information_of_strangers_and_of_a_constant():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, 1, 1, 200, 200, generator=generator, dtype=torch.float64)
    assert -0.02 < float(losses.mutual_information(a, b, bins=16)) < 0
    assert float(losses.mutual_information(a, 0 * b)) == pytest.approx(0, abs=1e-9)
    assert float(losses.mutual_information(a, a)) < -1


def test_mutual_information_of_a_constant_image_has_no_gradient():
    a, _ = images((13, 16))
    flat = torch.full_like(a, 7.3)
    for arguments in ((a, flat), (flat, a), (flat, flat)):
        x, y = (t.clone().requires_grad_() for t in arguments)
        value = losses.mutual_information(x, y)
        assert value.item() == pytest.approx(0, abs=1e-12)
        for gradient in torch.autograd.grad(value, (x, y)):
            assert gradient.abs().max() < 1e-12


def test_mutual_information_gradient():
    a, b = (x.requires_grad_() for x in images((6, 7), batch=1, seed=7))

    def loss(x, y):
        # the extremes set the scale and count as constants; hold them fixed
        frame = torch.tensor([[-0.2] * 7, [1.2] * 7], dtype=x.dtype)[None, None]
        return losses.mutual_information(
            torch.cat([x, frame], 2), torch.cat([y, frame.flip(3)], 2), bins=8
        )

    assert torch.autograd.gradcheck(loss, (a, b), atol=1e-6)


def test_mutual_information_sums_over_chunks():
    a, b = images((400, 300), batch=1)  # more than one chunk
    expected = -mi_by_hand(a.numpy(), b.numpy(), 32)
    assert float(losses.mutual_information(a, b)) == pytest.approx(expected, abs=1e-10)


# --- regularisers ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES + SINGLETONS)
@pytest.mark.parametrize("loss", REGULARISERS)
def test_regularisers_are_0_for_a_translation(loss, shape):
    disp = torch.arange(1.0, len(shape) + 1).reshape(1, -1, *[1] * len(shape))
    assert float(loss(disp.expand(2, len(shape), *shape))) == 0


def test_diffusion_table():
    """u_0 = x_0^2 on 3 rows: forward differences 1 and 3 along axis 0, none along axis 1."""
    x = spatial.identity_grid((3, 4), dtype=torch.float64)
    disp = torch.stack([x[0] ** 2, 0 * x[0]])[None]
    # along axis 0 half the channels have mean (1 + 9) / 2; the mean of the two axes is half of it
    assert float(losses.diffusion(disp)) == pytest.approx(5 / 2 / 2)


@pytest.mark.parametrize("d", [2, 3])
def test_diffusion_of_a_linear_map_is_the_mean_of_its_squared_slopes(d):
    generator = torch.Generator().manual_seed(8)
    slopes = torch.randn(d, d, generator=generator, dtype=torch.float64)
    theta = torch.cat([torch.eye(d) + slopes, torch.zeros(d, 1)], 1)[None]
    disp = spatial.affine_to_disp(theta, (6, 7, 5)[:d])
    assert float(losses.diffusion(disp)) == pytest.approx(float(slopes.square().mean()))


@pytest.mark.parametrize("d", [2, 3])
def test_bending_is_0_for_affine_maps_and_known_for_quadratic_ones(d):
    shape = (6, 7, 8)[:d]
    generator = torch.Generator().manual_seed(9)
    theta = torch.randn(1, d, d + 1, generator=generator, dtype=torch.float64)
    disp = spatial.affine_to_disp(theta, shape)
    assert float(losses.bending(disp)) == pytest.approx(0, abs=1e-20)
    x = spatial.identity_grid(shape, dtype=torch.float64)
    bent = torch.zeros(1, d, *shape, dtype=torch.float64)
    bent[0, 0] = 3 * x[0] ** 2 / 2 + 2 * x[0] * x[1]
    # d2/d0d0 = 3 and d2/d0d1 = 2 (counted twice) in one of d channels
    assert float(losses.bending(bent)) == pytest.approx((3**2 + 2 * 2**2) / d)


def test_bending_agrees_with_monai_up_to_the_stencil():
    """MONAI takes central differences twice; on a smooth field both approach the derivative."""
    monai_losses = pytest.importorskip("monai.losses")
    shape = (64, 64)
    x = 2 * math.pi * spatial.identity_grid(shape, dtype=torch.float64) / 64
    disp = torch.stack([(x[0] + 2 * x[1]).sin(), (2 * x[0]).cos() * x[1].sin()])[None]
    with warnings.catch_warnings():  # MONAI 1.6 indexes in a way that PyTorch has deprecated
        warnings.simplefilter("ignore", UserWarning)
        theirs = float(monai_losses.BendingEnergyLoss()(disp))
        their_diffusion = float(monai_losses.DiffusionLoss()(disp))
    assert float(losses.bending(disp)) == pytest.approx(theirs, rel=0.03)
    # its diffusion sums over axes what ours averages, again with central differences
    theirs = their_diffusion / 2
    assert float(losses.diffusion(disp)) == pytest.approx(theirs, rel=0.02)


def test_folding_table():
    grid = spatial.identity_grid((5, 4), dtype=torch.float64)
    twice_over = torch.stack([-3 * grid[0], 0 * grid[1]])[None]  # det = -2 everywhere
    assert float(losses.folding(twice_over)) == 2
    half = torch.cat([twice_over, 0 * twice_over])
    assert float(losses.folding(half)) == 1


def test_regularisers_see_every_axis_and_gradcheck():
    disp = 2 * field((4, 5), batch=1, seed=10)
    for loss in REGULARISERS:
        assert torch.autograd.gradcheck(loss, disp.clone().requires_grad_())
        swapped = disp.flip(1).transpose(2, 3)  # the same field with its axes renamed
        assert float(loss(swapped)) == pytest.approx(float(loss(disp)))


def test_consistency_table():
    u = torch.zeros(1, 2, 3, 4)
    assert float(losses.consistency(u, u + 2)) == 4
    assert float(losses.consistency(u, u)) == 0


# --- affine maps -------------------------------------------------------------------------------


def maps(d, count=5, dtype=torch.float64):
    """theta (count, d, d+1), not far from the identity."""
    generator = torch.Generator().manual_seed(12)
    noise = torch.randn(count, d, d + 1, generator=generator, dtype=dtype)
    return torch.eye(d, d + 1, dtype=dtype) + 0.3 * noise


def turns(d, dtype=torch.float64):
    angles = torch.tensor([[0.3, -1.2, 2.0][: 1 if d == 2 else 3]], dtype=dtype)
    return spatial.rigid_theta(angles, torch.full((1, d), 7.0, dtype=dtype))


def scaled(*factors):
    return torch.cat([torch.diag(torch.tensor(factors)), torch.ones(len(factors), 1)], 1)[None]


@pytest.mark.parametrize("d", [2, 3])
def test_affine_terms_are_0_for_rigid_maps(d):
    for loss in (losses.determinant, losses.orthogonality):
        assert float(loss(turns(d))) == pytest.approx(0, abs=1e-12)
    mirror = scaled(-1.0, *[1.0] * (d - 1))
    assert float(losses.determinant(mirror)) == 2
    assert float(losses.orthogonality(mirror)) == 0


def test_determinant_table():
    assert float(losses.determinant(scaled(2.0, 3.0))) == pytest.approx(25 / 2)
    assert float(losses.determinant(scaled(2.0, 3.0, 0.5))) == pytest.approx(4 / 2)
    shear = torch.tensor([[[1.0, 4.0, 9.0], [0.0, 1.0, 9.0]]])
    assert float(losses.determinant(shear)) == 0
    batch = torch.cat([scaled(2.0, 3.0), shear])
    assert float(losses.determinant(batch)) == pytest.approx(25 / 4)


def test_orthogonality_table():
    """A stretch by a costs (a - 1/a)^2, and so does one by 1/a."""
    for factor in (2.0, 0.5):
        found = float(losses.orthogonality(scaled(factor, 1.0)))
        assert found == pytest.approx(2.25, rel=1e-4)
    assert float(losses.orthogonality(scaled(2.0, 3.0, 1.0))) == pytest.approx(
        9 / 4 + 64 / 9, rel=1e-4
    )
    batch = torch.cat([scaled(2.0, 1.0), scaled(1.0, 1.0)])
    assert float(losses.orthogonality(batch)) == pytest.approx(2.25 / 2, rel=1e-4)
    # the squared singular values of this shear are (3 +- sqrt 5) / 2, and (s - 1)^2 = s for both
    shear = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]])
    assert float(losses.orthogonality(shear)) == pytest.approx(2, rel=1e-4)
    # nothing left of the image is dear, but a number with a gradient
    flat = torch.zeros(1, 3, 4, requires_grad=True)
    value = losses.orthogonality(flat)
    value.backward()
    assert value.item() == pytest.approx(3e5)
    assert torch.isfinite(flat.grad).all()


@pytest.mark.parametrize("d", [2, 3])
def test_affine_terms_are_the_published_ones(d):
    """By the elementary symmetric polynomials of C = A^T A + epsilon, as the published code."""
    epsilon, expected, areas = 1e-5, [], []
    for theta in maps(d).numpy():
        c = theta[:, :d].T @ theta[:, :d] + epsilon * np.eye(d)
        s1, last = np.trace(c), np.linalg.det(c)
        if d == 3:
            s2 = c[0, 0] * c[1, 1] + c[1, 1] * c[2, 2] + c[2, 2] * c[0, 0]
            s2 -= c[0, 1] * c[1, 0] + c[1, 2] * c[2, 1] + c[2, 0] * c[0, 2]
            expected.append(s1 + (1 + epsilon) ** 2 * s2 / last - 6 * (1 + epsilon))
        else:
            expected.append(s1 + (1 + epsilon) ** 2 * s1 / last - 4 * (1 + epsilon))
        areas.append((np.linalg.det(theta[:, :d]) - 1) ** 2 / 2)
    assert float(losses.orthogonality(maps(d))) == pytest.approx(np.mean(expected), rel=1e-9)
    assert float(losses.determinant(maps(d))) == pytest.approx(np.mean(areas), rel=1e-9)
    assert np.mean(expected) > 0.1 and np.mean(areas) > 0.01


@pytest.mark.parametrize("d", [2, 3])
def test_affine_terms_see_small_stretches_in_float32(d):
    """1 part in 1000: the published sum of eigenvalues is lost in rounding there."""
    turn = turns(d, torch.float32)
    turn[:, :, :d] *= 1.001
    assert float(losses.orthogonality(turn)) == pytest.approx(d * 4.0e-6, rel=0.01)
    assert float(losses.determinant(turn)) == pytest.approx((1.001**d - 1) ** 2 / 2, rel=0.01)


@pytest.mark.parametrize("loss", [losses.determinant, losses.orthogonality])
@pytest.mark.parametrize("d", [2, 3])
def test_affine_terms_gradient(d, loss):
    assert torch.autograd.gradcheck(loss, maps(d, 3).requires_grad_())
    half = maps(d, dtype=torch.float32).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(half).dtype == torch.float32
    assert torch.equal(loss(half), loss(half.float()))
    gone = maps(d)
    gone[0, 0, 0] = math.nan
    assert loss(gone).isnan()


# --- soft Dice ---------------------------------------------------------------------------------


def test_soft_dice_table():
    a = torch.tensor([[1.0, 1.0], [0.0, 0.0]])[None, None]
    b = torch.tensor([[1.0, 0.0], [0.0, 0.0]])[None, None]
    assert float(losses.soft_dice(a, b)) == pytest.approx(1 - 2 / 3)
    assert float(losses.soft_dice(a, a)) == 0
    assert float(losses.soft_dice(a, 1 - a)) == 1
    empty = torch.zeros_like(a)
    assert float(losses.soft_dice(empty, empty)) == 0
    assert float(losses.soft_dice(a, empty)) == 1
    # a label that is empty in both is left out of the mean, one that is empty in one counts 0
    three = torch.cat([a, empty, a], 1), torch.cat([b, empty, empty], 1)
    assert float(losses.soft_dice(*three)) == pytest.approx(1 - (2 / 3 + 0) / 2)


def test_soft_dice_agrees_with_monai():
    monai_losses = pytest.importorskip("monai.losses")
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(11)
        maps = [
            torch.nn.functional.one_hot(
                torch.randint(0, 4, (2, *shape), generator=generator), 4
            ).movedim(-1, 1).double()
            for _ in range(2)
        ]  # fmt: skip
        theirs = monai_losses.DiceLoss(smooth_nr=0, smooth_dr=1e-12)(*maps)
        assert float(losses.soft_dice(*maps)) == pytest.approx(float(theirs), abs=1e-9)


def test_soft_dice_gradient():
    a, b = (x.requires_grad_() for x in images((3, 4), channels=2))
    assert torch.autograd.gradcheck(losses.soft_dice, (a, b))


# --- bad input ---------------------------------------------------------------------------------


def bad_calls():
    image, other = torch.zeros(1, 1, 4, 5), torch.zeros(1, 1, 5, 4)
    shapes = ["moved", "(1, 1, 4, 5)", "fixed", "(1, 1, 5, 4)", "expected the same"]
    for loss in SIMILARITIES:
        yield loss, (image, other), {}, shapes
        yield loss, (image.long(), image), {}, ["moved", "int64", "expected floating point"]
        yield loss, (image[0, 0], image[0, 0]), {}, ["(4, 5)", "expected"]
    yield losses.soft_dice, (image, other), {}, ["a has", "(1, 1, 5, 4)", "expected the same"]
    yield losses.lncc, (image, image), {"window": 4}, ["window", "4", "odd"]
    yield losses.lncc, (image, image), {"window": -1}, ["window", "-1", "odd"]
    yield losses.lncc, (image, image), {"mask": other}, ["mask", "(1, 1, 5, 4)", "expected (B, 1"]
    two = torch.zeros(1, 2, 4, 5)
    yield losses.lncc, (image, image), {"mask": two}, ["mask", "(1, 2, 4, 5)", "expected (B, 1"]
    yield losses.mutual_information, (image, image), {"bins": 3}, ["bins", "3", "6 or more"]
    yield losses.mind_features, (image[0],), {}, ["image has", "(1, 4, 5)", "expected"]
    yield losses.mind_ssc, (image, image), {"dilation": 0}, ["dilation is 0", "at least 1"]
    yield losses.mind_ssc, (image, image), {"radius": -1}, ["radius -1", "at least 1 and 0"]
    for loss in REGULARISERS:
        yield loss, (image,), {}, ["disp", "(1, 1, 4, 5)", "expected"]
    u, v = torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 5, 4)
    yield losses.consistency, (u, v), {}, ["u has", "(1, 2, 4, 5)", "v", "expected the same"]
    yield losses.consistency, (image, u), {}, ["u has", "(1, 1, 4, 5)"]
    for loss in (losses.determinant, losses.orthogonality):
        for bad in (torch.zeros(1, 3, 3), torch.zeros(2, 3), torch.zeros(1, 4, 5)):
            yield loss, (bad,), {}, ["theta has", str(tuple(bad.shape)), "(B, 2, 3) or (B, 3, 4)"]


@pytest.mark.parametrize(("loss", "arguments", "options", "parts"), list(bad_calls()))
def test_bad_input_is_one_sentence(loss, arguments, options, parts):
    with pytest.raises(ValueError) as caught:
        loss(*arguments, **options)
    sentence = str(caught.value)
    for part in parts:
        assert part in sentence
    assert "\n" not in sentence and sentence.endswith(".")
