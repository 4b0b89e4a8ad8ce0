"""Metrics against tables, a brute-force definition and MONAI."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regkit import metrics, spatial

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SHAPES = [(13, 16), (9, 10, 11)]
DTYPES = [torch.float32, torch.float64]


def maps(rows, dtype=torch.int16):
    return torch.tensor(rows, dtype=dtype)[None, None]


def blobs(shape, batch=2, seed=0):
    """Two label maps 0..4 of smooth blobs that overlap in part."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.nn.AvgPool2d if len(shape) == 2 else torch.nn.AvgPool3d
    smooth = pool(5, 1, 2)
    noise = torch.randn(2, batch, 5, *shape, generator=generator)
    noise[1] += 1.5 * noise[0]
    return [smooth(x).argmax(1, keepdim=True) for x in noise]


# --- Dice --------------------------------------------------------------------------------------

A = maps([[1, 1, 2], [0, 2, 2]])
B = maps([[1, 2, 2], [0, 3, 2]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64]
)
def test_dice_table(dtype, device):
    a, b = A.to(device, dtype), B.to(device, dtype)
    found = metrics.dice(a, b)  # labels 1, 2, 3: those that occur, without 0
    assert found.dtype == torch.float64 and found.device.type == "cpu"
    assert found.tolist() == [[2 * 1 / 3, 2 * 2 / 6, 0.0]]
    found = metrics.dice(a, b, labels=[2, 9, 0, 1])  # in the order asked for
    assert found[0, [0, 2, 3]].tolist() == [2 * 2 / 6, 1.0, 2 * 1 / 3]
    assert math.isnan(found[0, 1])  # in neither


def test_dice_labels_may_repeat_be_a_tensor_or_be_none_at_all():
    assert metrics.dice(A, B, labels=torch.tensor([2, 2])).tolist() == [[2 / 3, 2 / 3]]
    assert metrics.dice(0 * A, 0 * B).shape == (1, 0)
    assert metrics.dice(A, B, labels=[]).shape == (1, 0)


def test_dice_counts_each_image_of_the_batch_for_itself():
    batch = metrics.dice(torch.cat([A, B, A]), torch.cat([B, B, 0 * A]), labels=[1, 2, 3])
    assert batch[0].tolist() == [2 / 3, 2 / 3, 0.0]
    assert batch[1].tolist() == [1.0, 1.0, 1.0]
    assert batch[2, :2].tolist() == [0.0, 0.0] and math.isnan(batch[2, 2])


def test_dice_of_negative_and_large_labels():
    a = maps([[-1, 2035], [2035, 2**31 - 1]], torch.int64)
    b = maps([[-1, 2035], [0, 2**31 - 1]], torch.int64)
    assert metrics.dice(a, b, labels=[-1, 2035, 2**31 - 1]).tolist() == [[1.0, 2 / 3, 1.0]]


@pytest.mark.parametrize("metric", [metrics.dice, metrics.hd95])
def test_labels_beyond_a_dtype_are_not_wrapped_into_it(metric):
    """300 is 44 in uint8; there it occurs nowhere."""
    small = maps([[44, 0, 0, 7]], torch.uint8)
    large = maps([[300, 0, 0, 7]], torch.int64)
    perfect, lost = (1.0, 0.0) if metric is metrics.dice else (0.0, math.inf)
    assert metric(small, large, labels=[7, 44, 300]).tolist() == [[perfect, lost, lost]]
    assert metric(small, large).tolist() == [[perfect, lost, lost]]
    assert metric(small, small, labels=[300, -212]).isnan().all()
    far = maps([[-(2**62), 0, 2**62, 2**62]], torch.int64)
    assert metric(far, far, labels=[2**62, -(2**62), 2**62]).tolist() == [[perfect] * 3]


@pytest.mark.parametrize("shape", SHAPES)
def test_dice_agrees_with_monai(shape):
    monai_metrics = pytest.importorskip("monai.metrics")
    a, b = blobs(shape)
    onehot = [torch.nn.functional.one_hot(x[:, 0], 5).movedim(-1, 1) for x in (a, b)]
    theirs = monai_metrics.compute_dice(*onehot, include_background=False)
    np.testing.assert_allclose(metrics.dice(a, b, [1, 2, 3, 4]), theirs, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_dice_is_its_definition(pairs):
    a, b = (maps([list(x)], torch.int64) for x in zip(*pairs, strict=True))
    found = metrics.dice(a, b, labels=range(5))[0]
    for label in range(5):
        x, y = (a == label).numpy(), (b == label).numpy()
        if x.any() or y.any():
            assert float(found[label]) == 2 * (x & y).sum() / (x.sum() + y.sum())
        else:
            assert math.isnan(found[label])
    assert metrics.dice(b, a, labels=range(5)).nan_to_num(-1).tolist() == [
        found.nan_to_num(-1).tolist()
    ]


# --- HD95 --------------------------------------------------------------------------------------


def hd95_by_hand(x, y, spacing):
    """All pairwise distances between the surfaces of two masks."""

    def surface(mask):
        padded = np.pad(mask, 1)
        neighbours = [np.roll(padded, step, axis) for axis in range(mask.ndim) for step in (-1, 1)]
        inner = np.logical_and.reduce(neighbours)[(slice(1, -1),) * mask.ndim]
        return np.argwhere(mask & ~inner) * np.array(spacing)

    p, q = surface(x), surface(y)
    distance = np.linalg.norm(p[:, None] - q[None], axis=-1)
    return max(np.percentile(distance.min(1), 95), np.percentile(distance.min(0), 95))


@pytest.mark.parametrize("device", DEVICES)
def test_hd95_table(device):
    a = torch.zeros(1, 1, 9, 9, dtype=torch.int16, device=device)
    b = a.clone()
    a[..., 2, 2] = 1
    b[..., 5, 6] = 1
    assert metrics.hd95(a, b).tolist() == [[5.0]]
    assert metrics.hd95(a, b, spacing=2.0).tolist() == [[10.0]]
    assert metrics.hd95(a, b, spacing=(4.0, 1.25)).tolist() == [[13.0]]
    assert metrics.hd95(a, a).tolist() == [[0.0]]


def test_hd95_of_labels_that_are_missing():
    a, b = maps([[1, 0, 2]]), maps([[1, 0, 0]])
    found = metrics.hd95(torch.cat([a, a]), torch.cat([b, a]), labels=[1, 2, 3])
    assert found[0, :2].tolist() == [0.0, math.inf] and math.isnan(found[0, 2])
    assert found[1, :2].tolist() == [0.0, 0.0] and math.isnan(found[1, 2])
    assert metrics.hd95(a, b).tolist() == [[0.0, math.inf]]  # 1 and 2 occur


def test_hd95_takes_the_larger_direction_and_the_95th_percentile():
    """40 voxels in a row against the first 20: from the long row 20 distances 0, then 1 to 20."""
    long = torch.zeros(1, 1, 3, 50, dtype=torch.int64)
    short = long.clone()
    long[..., 1, 5:45] = 1
    short[..., 1, 5:25] = 1
    expected = np.percentile([0] * 20 + list(range(1, 21)), 95)
    assert metrics.hd95(long, short).item() == pytest.approx(expected)
    assert metrics.hd95(short, long).item() == pytest.approx(expected)


def test_hd95_looks_at_surfaces_not_at_volumes():
    """A square and the one inside it are 1 apart; in more than 5 % of voxels, the corners, 1.4."""
    a = torch.zeros(1, 1, 15, 15, dtype=torch.int64)
    b = a.clone()
    a[..., 2:13, 2:13] = 1
    b[..., 3:12, 3:12] = 1
    assert metrics.hd95(a, b).item() == pytest.approx(math.sqrt(2))
    b = a.clone()
    b[..., 7, 7] = 0  # a hole far inside has a surface of its own, of four voxels
    assert metrics.hd95(a, b).item() == pytest.approx(
        hd95_by_hand(a[0, 0].numpy() == 1, b[0, 0].numpy() == 1, (1, 1))
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_hd95_is_its_definition(shape):
    a, b = blobs(shape)
    spacing = (0.8, 1.5, 3.0)[: len(shape)]
    found = metrics.hd95(a, b, labels=range(1, 5), spacing=spacing)
    for i in range(2):
        for label in range(1, 5):
            x, y = (z[i, 0].numpy() == label for z in (a, b))
            assert float(found[i, label - 1]) == pytest.approx(hd95_by_hand(x, y, spacing))


@pytest.mark.parametrize("shape", SHAPES)
def test_hd95_agrees_with_monai(shape):
    """Where no label touches the image border, which MONAI does not count as outside."""
    monai_metrics = pytest.importorskip("monai.metrics")
    a, b = blobs(shape, seed=1)
    rim = torch.ones(shape, dtype=torch.bool)
    rim[(slice(1, -1),) * len(shape)] = False
    a, b = (x.masked_fill(rim, 0) for x in (a, b))
    onehot = [torch.nn.functional.one_hot(x[:, 0], 5).movedim(-1, 1) for x in (a, b)]
    spacing = (0.8, 1.5, 3.0)[: len(shape)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = monai_metrics.compute_hausdorff_distance(
            *onehot, percentile=95, spacing=spacing, include_background=False
        )
    np.testing.assert_allclose(metrics.hd95(a, b, range(1, 5), spacing), theirs, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(1, 7), min_size=2, max_size=3), seed=st.integers(0, 10**6))
def test_hd95_is_symmetric_and_0_for_the_same_map(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randint(0, 3, (2, 1, 1, *shape), generator=generator)
    forward, backward = (metrics.hd95(x, y, labels=[1, 2]) for x, y in ((a, b), (b, a)))
    assert forward.nan_to_num(-1).tolist() == backward.nan_to_num(-1).tolist()
    assert metrics.hd95(a, a, labels=[1, 2]).nan_to_num(0).sum() == 0


# --- folding and the Jacobian ------------------------------------------------------------------


def half_folded(dtype=torch.float64):
    """(2, 2, 4, 6): in the first the last 2 of 4 rows fold (slope -2), the second is the identity.

    u_0 = 0, 0, -2, -4 along axis 0: central differences 0, -1, -2, one-sided -2; det = 1 + slope.
    """
    u = torch.tensor([0.0, 0.0, -2.0, -4.0], dtype=dtype)[:, None].expand(4, 6)
    folded = torch.stack([u, torch.zeros_like(u)])
    return torch.stack([folded, torch.zeros_like(folded)])


@pytest.mark.parametrize("device", DEVICES)
def test_folding_table(device):
    disp = half_folded().to(device)
    # rows with det 1, 0, -1, -1: a determinant of 0 counts as folded
    assert metrics.folding_count(disp).tolist() == [18, 0]
    assert metrics.folding_percent(disp).tolist() == [75.0, 0.0]


def test_sd_log_jacobian_table():
    assert metrics.sd_log_jacobian(torch.zeros(3, 2, 5, 4)).tolist() == [0.0] * 3
    # dets 1, 0, -1, -1 are clipped to 1e-9 where they fold
    logs = np.log([1, 1e-9, 1e-9, 1e-9])
    found = metrics.sd_log_jacobian(half_folded())
    assert found.tolist() == pytest.approx([np.std(logs), 0.0])
    # a uniform magnification has a constant determinant, and no spread
    grid = spatial.identity_grid((5, 6, 4), dtype=torch.float64)
    assert float(metrics.sd_log_jacobian(0.3 * grid[None])) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sd_log_jacobian_of_a_known_field(dtype):
    """u_0 = x_0^2 / 40: central differences give det = 1 + x_0 / 20 inside."""
    x = spatial.identity_grid((12, 5), dtype=dtype)
    disp = torch.stack([x[0] ** 2 / 40, 0 * x[0]])[None]
    det = 1 + np.array([0.5, *range(1, 11), 10.5]) / 20
    assert float(metrics.sd_log_jacobian(disp)) == pytest.approx(np.log(det).std(), rel=1e-5)


# --- endpoint error and landmarks --------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_endpoint_error_table(dtype, device):
    disp = torch.zeros(2, 2, 3, 4, dtype=dtype, device=device)
    truth = disp.clone()
    truth[0, :, 0] = torch.tensor([3.0, 4.0]).to(truth)[:, None]  # one of three rows is 5 off
    found = metrics.endpoint_error(disp, truth)
    assert found.tolist() == pytest.approx([5 / 3, 0.0])
    mask = torch.zeros(2, 1, 3, 4, device=device)
    mask[:, :, :2] = 1
    assert metrics.endpoint_error(disp, truth, mask).tolist() == pytest.approx([2.5, 0.0])
    one = metrics.endpoint_error(disp, truth, mask[:1].bool())
    assert one.tolist() == pytest.approx([2.5, 0.0])
    assert math.isnan(metrics.endpoint_error(disp, truth, 0 * mask)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_tre_table(device):
    disp = torch.zeros(1, 2, 10, 10, device=device)
    disp[:, 0] = 2.0
    fixed = torch.tensor([[[1.0, 1.0], [4.0, 5.0]]], device=device)
    moving = torch.tensor([[[3.0, 1.0], [9.0, 9.0]]], device=device)
    found = metrics.tre(disp, fixed, moving)
    assert found.tolist() == [[0.0, 5.0]]
    assert metrics.tre(disp, fixed, moving, spacing=2.0).tolist() == [[0.0, 10.0]]
    assert metrics.tre(disp, fixed, moving, spacing=(4.0, 1.25)).tolist() == [[0.0, 13.0]]


def test_tre_goes_from_fixed_to_moving():
    """The right displacement brings it to 0, its inverse doubles it."""
    disp = torch.zeros(1, 3, 8, 8, 8)
    disp[:, 1] = 1.5
    fixed = torch.tensor([[[3.0, 3.0, 3.0]]])
    moving = fixed + torch.tensor([0.0, 1.5, 0.0])
    assert metrics.tre(disp, fixed, moving).item() == 0
    assert metrics.tre(-disp, fixed, moving).item() == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_success_auc_table(dtype):
    """By hand: below 1, 2, 3, 4, 5 pixels lie 1, 2, 2, 3 and 3 of the four errors."""
    errors = torch.tensor([0.5, 1.0, 3.0, 30.0], dtype=dtype)
    assert metrics.success_auc(errors, limit=5).item() == pytest.approx(11 / 20)
    # below 1 to 25: 25, 24, 22 and 0 times of 25
    assert metrics.success_auc(errors).item() == pytest.approx(71 / 100)
    assert metrics.success_auc(torch.zeros(3, dtype=dtype)).item() == 1
    failed = torch.tensor([0.0, torch.inf, torch.nan, 25.0], dtype=dtype)
    assert metrics.success_auc(failed).item() == 0.25


# --- bad input ---------------------------------------------------------------------------------


def bad_calls():
    image = torch.zeros(1, 1, 4, 5, dtype=torch.int64)
    for metric in (metrics.dice, metrics.hd95):
        yield metric, (image, image[..., :3]), {}, ["a has", "(1, 1, 4, 5)", "(1, 1, 4, 3)"]
        yield metric, (image.float(), image), {}, ["a is", "float32", "integer label maps"]
        yield metric, (image[0, 0], image[0, 0]), {}, ["(4, 5)", "expected the same (B, 1, H, W)"]
        yield metric, (image.repeat(1, 2, 1, 1),) * 2, {}, ["(1, 2, 4, 5)", "expected"]
        yield metric, (image, image), {"labels": [2**64]}, ["labels", str(2**64), "int64"]
        yield metric, (image, image), {"labels": [1, 2.5]}, ["labels", "2.5", "whole numbers"]
    yield metrics.hd95, (image, image), {"spacing": (1.0, 1.0, 1.0)}, ["spacing", "2"]
    yield metrics.hd95, (image, image), {"spacing": 0.0}, ["spacing", "positive"]
    for metric in (metrics.folding_count, metrics.folding_percent, metrics.sd_log_jacobian):
        yield metric, (torch.zeros(1, 1, 4, 5),), {}, ["disp", "(1, 1, 4, 5)", "expected"]
    disp = torch.zeros(1, 2, 4, 5)
    yield metrics.endpoint_error, (disp, disp[..., :3]), {}, ["true_disp", "(1, 2, 4, 3)"]
    yield metrics.endpoint_error, (disp[0], disp[0]), {}, ["disp", "(2, 4, 5)"]
    mask = torch.zeros(1, 1, 4, 3)
    yield metrics.endpoint_error, (disp, disp), {"mask": mask}, ["mask", "(1, 1, 4, 3)"]
    mask = torch.zeros(3, 1, 4, 5)
    yield metrics.endpoint_error, (disp, disp), {"mask": mask}, ["mask", "(3, 1, 4, 5)"]
    points = torch.zeros(1, 6, 2)
    yield metrics.tre, (disp, points, points[:, :5]), {}, ["moving_points", "(1, 5, 2)"]
    yield metrics.tre, (disp, points[..., :1], points[..., :1]), {}, ["points", "(1, 6, 1)"]
    yield metrics.tre, (disp, points, points), {"spacing": (1, 1, 1)}, ["spacing", "2"]
    yield metrics.success_auc, (torch.zeros(2, 3),), {}, ["errors", "(2, 3)", "(P,)"]
    yield metrics.success_auc, (torch.zeros(0),), {}, ["errors", "(0,)", "(P,)"]
    yield metrics.success_auc, (torch.tensor([-1.0]),), {}, ["errors holds -1", "0 or more"]
    yield metrics.success_auc, (torch.zeros(2),), {"limit": 0}, ["limit is 0", "1 or more"]


@pytest.mark.parametrize(("metric", "arguments", "options", "parts"), list(bad_calls()))
def test_bad_input_is_one_sentence(metric, arguments, options, parts):
    with pytest.raises(ValueError) as caught:
        metric(*arguments, **options)
    sentence = str(caught.value)
    for part in parts:
        assert part in sentence
    assert "\n" not in sentence and sentence.endswith(".")
