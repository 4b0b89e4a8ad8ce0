"""SimpleITK and ANTs behind one call: against a known motion, and against each other."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_register import turned

from regkit import classical, io, metrics
from regkit.classical import ants as by_ants
from regkit.classical import linear
from regkit.classical import sitk as by_sitk
from regkit.data import population
from regkit.losses import diffusion
from regkit.metrics import rotation_error
from regkit.spatial import affine_to_disp, invert_theta, rigid_theta, warp
from regkit.transform import Grid, resample

PEERS = {"SimpleITK": by_sitk.align, "ANTs": by_ants.align}


@pytest.fixture(params=PEERS)
def peer(request):
    if request.param == "ANTs":
        ants = pytest.importorskip("ants")
        request.getfixturevalue("monkeypatch").setattr(ants.config, "_random_seed", 1)
    return PEERS[request.param]


def pair(d: int, truth: np.ndarray, contrast: str = "t1") -> tuple[io.Image, io.Image, np.ndarray]:
    """A head behind a known map, on another grid; the head in T1; points inside, mm, (N, 4)."""
    shape = (112, 128) if d == 2 else (40, 48, 40)
    subject, source = (population(1, shape, seed=2, contrast=c)[0] for c in ("t1", contrast))
    if d == 2:
        affine, shape = subject.affine @ np.diag([-0.9, 1.2, 1, 1]), (130, 110)
        affine[0, 3] *= -1
    else:
        affine, shape = subject.affine @ np.diag([1.1, 0.9, 1.2, 1]), (38, 52, 35)
    there = resample(
        source.image[None], subject.grid, Grid(shape, affine), matrix=np.linalg.inv(truth)
    )
    voxels = np.argwhere(subject.labels[0].numpy() > 0)[::50]
    voxels = np.pad(voxels, ((0, 0), (0, 3 - d)))
    points = np.c_[voxels, np.ones(len(voxels))] @ subject.affine.T
    # brightness has another unit and another zero
    return io.Image(100 * there + 7, affine), io.Image(subject.image[None], subject.affine), points


def apart(a: np.ndarray, b: np.ndarray, points: np.ndarray, fixed: io.Image) -> float:
    """How far two maps put one point of the head from each other at most, voxels."""
    return float(np.linalg.norm((points @ (a - b).T)[:, :3], axis=1).max() / max(fixed.spacing))


@pytest.mark.slow
@pytest.mark.parametrize("metric", by_sitk.METRICS)
@pytest.mark.parametrize("kind", ["rigid", "affine"])
@pytest.mark.parametrize("d", [2, 3])
def test_a_peer_finds_a_known_map(peer, d, kind, metric):
    truth = turned(d, 0.15, (8.0, -5.0, 4.0)[:d], 1.0 if kind == "rigid" else 1.08)
    moving, fixed, points = pair(d, truth)
    if metric == "mutual_information":  # brightness may follow any curve
        moving = replace(moving, data=moving.data.sqrt())
    found = peer(moving, fixed, kind, metric=metric)
    assert apart(np.eye(4), truth, points, fixed) > 2
    assert apart(found, truth, points, fixed) < 0.35


@pytest.mark.parametrize("d", [2, 3])
def test_mutual_information_lays_t2_over_t1(peer, d):
    truth = turned(d, 0.08, (6.0, -4.0, 3.0)[:d])  # with more ANTs goes astray at times
    moving, fixed, points = pair(d, truth, "t2")
    assert apart(peer(moving, fixed, "rigid"), truth, points, fixed) < 0.35


def test_the_peers_and_our_twin_agree():
    pytest.importorskip("ants")
    moving, fixed, points = pair(2, turned(2, -0.1, (4.0, 6.0)))
    found = [align(moving, fixed, "rigid") for align in (*PEERS.values(), classical.align)]
    for other in found[1:]:
        assert apart(found[0], other, points, fixed) < 0.1
    for matrix in found:  # a turn and a shift, in the plane of the slice
        assert np.allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-5)
        assert np.allclose(matrix[2], [0, 0, 1, 0], atol=1e-5)


def test_a_slice_may_lie_in_any_plane(peer):
    """The same two slices, axial and coronal: the same answer, seen from the voxels."""
    moving, fixed, _ = pair(2, turned(2, 0.15, (8.0, -5.0)))
    upright = np.array([[1.0, 0, 0, 5], [0, 0, -1, 7], [0, 1, 0, 9], [0, 0, 0, 1]])
    between = []
    for place in (np.eye(4), upright):
        a, b = (io.Image(x.data, place @ x.affine) for x in (moving, fixed))
        between.append(b.grid.map_to(a.grid, peer(a, b, "rigid")))
    assert np.allclose(*between, atol=0.05)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "similarity"}, "kind is 'similarity', expected 'rigid' or 'affine'"),
        ({"metric": "ncc"}, "metric is 'ncc', expected one of mutual_information, correlation"),
        ({"fixed": io.Image(torch.ones(1, 1, 9, 9), np.eye(4))}, "fixed is constant, expected"),
        ({"fixed": io.Image(torch.rand(1, 1, 9, 9, 9), np.eye(4))}, "moving is 2D and fixed 3D"),
    ],
)
def test_wrong_input_is_one_sentence(peer, change, sentence):
    image = io.Image(torch.rand(1, 1, 9, 9), np.eye(4))
    with pytest.raises(ValueError, match=sentence):
        peer(**{"moving": image, "fixed": image, "kind": "rigid", **change})


def test_simpleitk_samples_with_a_fixed_seed_and_gives_its_threads_back():
    import SimpleITK as sitk

    moving, fixed, points = pair(2, turned(2, 0.1, (4.0, 6.0)))
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    once, again = (by_sitk.align(moving, fixed, "rigid", sampling=0.2) for _ in range(2))
    assert np.array_equal(once, again)
    assert apart(once, turned(2, 0.1, (4.0, 6.0)), points, fixed) < 0.35
    by_sitk.align(moving, fixed, "rigid", threads=2)
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == before
    with pytest.raises(ValueError, match="sampling is 0, expected more than 0"):
        by_sitk.align(moving, fixed, sampling=0)


def test_ants_leaves_no_files(tmp_path, monkeypatch):
    pytest.importorskip("ants")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    moving, fixed, _ = pair(2, turned(2, 0.1, (4.0, 6.0)))
    by_ants.align(moving, fixed, "rigid")
    assert list(tmp_path.iterdir()) == []


def test_without_ants_a_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ants", None)
    image = io.Image(torch.rand(1, 1, 9, 9), np.eye(4))
    with pytest.raises(ImportError, match=r"antspyx: in a clone .* -e \"\.\[baselines\]\"\."):
        by_ants.align(image, image)


@pytest.mark.parametrize("similarity", ["ncc", "lncc", "mutual_information"])
@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_every_energy_finds_a_known_map(similarity, kind):
    fixed = population(1, (80, 96), seed=2)[0].image[None]
    truth = rigid_theta(torch.tensor([[math.radians(15)]]), torch.tensor([[3.0, -4.0]]))
    moving = warp(fixed, affine_to_disp(invert_theta(truth), fixed.shape[2:]))
    found = classical.fit(moving, fixed, kind, similarity)
    apart = affine_to_disp(found, fixed.shape[2:]) - affine_to_disp(truth, fixed.shape[2:])
    assert apart[(fixed > 0.2).expand_as(apart)].abs().max() < 0.3


@pytest.mark.parametrize(("turn", "shift"), [(12, (12.0, -14.0)), (10, (16.0, -14.0))])
def test_levels_widen_the_reach_of_plain_descent(turn, shift):
    """From coarse to fine it comes to where the finest level alone is caught, near the start."""
    fixed = population(1, (80, 96), seed=2)[0].image[None]
    truth = rigid_theta(torch.tensor([[math.radians(turn)]]), torch.tensor([shift]))
    moving = warp(fixed, affine_to_disp(invert_theta(truth), fixed.shape[2:]))
    errors = []
    for levels in (1, None):
        found = classical.fit(
            moving, fixed, "rigid", "mutual_information", search=False, levels=levels
        )
        errors.append(float(rotation_error(found, truth)))
    assert errors[1] < 0.3 < 1 < errors[0]
    with pytest.raises(ValueError, match="levels is 0, expected 1 or more"):
        classical.fit(moving, fixed, levels=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ncc", "mutual_information"])
def test_one_thread_and_two_find_one_map(method):
    """Two subjects, large enough that PyTorch shares the work: the end is no matter of rounding."""
    moving, fixed = (s.image[None] for s in population(2, (36, 40, 36), seed=0))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        theta = classical.fit(moving, fixed, "affine", method, search=False, levels=1)
        found.append(affine_to_disp(theta, fixed.shape[2:]))
    assert (found[0] - found[1]).norm(dim=1).max() < 1e-3
    assert found[0].norm(dim=1).max() > 1


@pytest.mark.parametrize("degrees", [90, 120, 180, -100])
def test_a_head_turned_by_any_angle_is_found(degrees):
    fixed = population(1, (80, 80), seed=5)[0].image[None]
    truth = rigid_theta(torch.tensor([[math.radians(degrees)]]), torch.tensor([[3.0, -2.0]]))
    moving = warp(fixed, affine_to_disp(invert_theta(truth), fixed.shape[2:]))
    found = classical.fit(moving, fixed, "rigid", "mutual_information")
    assert float(rotation_error(found, truth)) < 0.2


@pytest.mark.parametrize(("axis", "quarters"), [(0, 2), (1, 1), (2, 2)])
def test_a_head_on_its_side_or_upside_down_is_found_in_3d(axis, quarters):
    """Turned by whole quarters, voxel by voxel, about each axis."""
    fixed = population(1, (20, 24, 20), seed=5)[0].image[None]
    fixed = torch.nn.functional.pad(fixed, (2, 2, 0, 0, 2, 2))
    angles = torch.zeros(1, 3)
    angles[0, axis] = quarters * math.pi / 2
    truth = rigid_theta(angles, torch.zeros(1, 3))
    moving = warp(fixed, affine_to_disp(invert_theta(truth), fixed.shape[2:]))
    found = classical.fit(moving, fixed, "rigid", "ncc")
    assert float(rotation_error(found, truth)) < 0.2


@pytest.mark.parametrize("shape", [(1, 20, 20), (20, 1, 20), (20, 20, 1), (1, 20)])
def test_an_axis_of_one_voxel_is_one_sentence(shape):
    image = torch.rand(1, 1, *shape)
    with pytest.raises(ValueError, match="moving has shape .*expected 2 voxels or more along each"):
        classical.fit(image, image)
    if len(shape) == 3:
        with pytest.raises(ValueError, match="moving has shape .*expected 2 voxels or more"):
            classical.align(io.Image(image, np.eye(4)), io.Image(image, np.eye(4)))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_descent_takes_its_gradients_wherever_it_is_called(mode):
    """Inside of inference mode too, with images that were made there."""
    moving, fixed = (s.image[None] for s in population(2, (32, 40), seed=0))
    theta = classical.fit(moving, fixed, "affine", "ncc")
    disp = classical.refine(moving, fixed, affine_to_disp(theta, fixed.shape[2:]), 5)
    with mode():
        moving, fixed = moving * 1, fixed * 1
        again = classical.fit(moving, fixed, "affine", "ncc")
        start = affine_to_disp(again, fixed.shape[2:])
        refined = classical.refine(moving, fixed, start, 5)
    assert torch.allclose(again, theta, atol=1e-6) and torch.allclose(refined, disp, atol=1e-5)


# SyN --------------------------------------------------------------------------------------------


def brains(d: int, upright: bool = False) -> tuple[io.Image, io.Image]:
    """Two subjects on grids of their own: oblique, with unequal voxels, axes turned and mirrored.

    upright: seen as two coronal slices, or another such turn of space.
    """
    shape = (72, 80) if d == 2 else (26, 32, 28)
    a, b = population(2, shape, seed=2)
    tilt = turned(d, 0.2, (3.0, -2.0, 1.0)[:d])  # the grids lie obliquely, the brains do not
    grids = (
        (tilt @ a.affine @ np.diag([1.1, 0.9, 1.2 if d == 3 else 1, 1]), a.image, a.affine),
        (tilt @ b.affine @ np.diag([-1.0, 1.25, 0.9 if d == 3 else 1, 1]), b.image, b.affine),
    )
    place = np.array([[1.0, 0, 0, 5], [0, 0, -1, 7], [0, 1, 0, 9], [0, 0, 0, 1]])
    found = []
    for affine, image, old in grids:
        middle = np.append((np.asarray(shape) - 1) / 2, [0.0] * (3 - d) + [1.0])
        affine[:3, 3] += (old @ middle - affine @ middle)[:3]  # one middle with the brain
        there = resample(image[None], Grid(shape, old), Grid(shape, affine))
        found.append(io.Image(there, place @ affine if upright else affine))
    return found[0], found[1]


@pytest.mark.slow
@pytest.mark.parametrize("metric", by_ants.SYN_METRICS)
@pytest.mark.parametrize("d", [2, 3])
def test_syn_warps_as_ants_itself_does(d, metric, monkeypatch):
    ants = pytest.importorskip("ants")
    seen, registration = [], ants.registration

    def spy(fixed, moving, *args, **options):
        found = registration(fixed, moving, *args, **options)
        seen.append(ants.apply_transforms(fixed, moving, found["fwdtransforms"]).numpy())
        return found

    monkeypatch.setattr(ants, "registration", spy)
    moving, fixed = brains(d)
    disp = by_ants.syn(moving, fixed, metric, (30, 15))
    assert disp.shape == (1, d, *fixed.shape) and disp.dtype == torch.float32
    ours = warp(moving.data, disp)[0, 0].numpy()
    inside = np.ones(fixed.shape, bool)  # beyond the moving image the two pad differently
    for axis, n in enumerate(moving.shape):
        place = disp[0, axis].numpy() + np.indices(fixed.shape)[axis]
        inside &= (place > 0) & (place < n - 1)
    assert inside.mean() > 0.5 and np.abs(ours - seen[0])[inside].max() < 1e-4
    # and it has done something: more than the headers do
    before = warp(moving.data, fixed.grid.disp_to(moving.grid))
    after = torch.from_numpy(ours)[None, None]
    assert (after - fixed.data).square().mean() < 0.6 * (before - fixed.data).square().mean()


def test_syn_knows_where_a_slice_lies():
    """Axial and coronal: the same answer, seen from the voxels."""
    pytest.importorskip("ants")
    found = [by_ants.syn(*brains(2, upright), iterations=(20, 10)) for upright in (False, True)]
    assert torch.allclose(*found, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(80, 96), (24, 28, 24)])
def test_syn_brings_the_structures_together_without_folds(shape):
    pytest.importorskip("ants")
    a, b = population(2, shape, seed=2)
    images = (io.Image(x.image[None], x.affine) for x in (a, b))
    disp = by_ants.syn(*images)
    labels = sorted(set(b.labels.unique().tolist()) & set(a.labels.unique().tolist()) - {0})
    before = float(metrics.dice(a.labels[None], b.labels[None], labels).mean())
    moved = warp(a.labels[None], disp, mode="nearest")
    after = float(metrics.dice(moved, b.labels[None], labels).mean())
    assert after - before > (0.25 if len(shape) == 2 else 0.04)  # 7 mm voxels show little
    assert metrics.folding_percent(disp).item() < 0.01


@pytest.mark.slow
def test_syn_with_one_thread_gives_the_same_bits():
    pytest.importorskip("ants")
    code = """
import torch
from regkit import io
from regkit.classical import ants
from regkit.data import population
a, b = (io.Image(x.image[None], x.affine) for x in population(2, (40, 48), seed=2))
assert torch.equal(ants.syn(a, b), ants.syn(a, b))
"""
    one = {"ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | one, check=True, timeout=300)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"metric": "lncc"}, "metric is 'lncc', expected one of mutual_information, correlation"),
        ({"iterations": ()}, r"iterations is \(\), expected a number, 0 or more, per level"),
        ({"iterations": (10, -1)}, r"iterations is \(10, -1\), expected a number, 0 or more"),
        ({"fixed": io.Image(torch.ones(1, 1, 9, 9), np.eye(4))}, "fixed is constant, expected"),
        ({"moving": io.Image(torch.rand(1, 1, 9, 3), np.eye(4))}, r"moving has shape \(9, 3\), ex"),
        ({"fixed": io.Image(torch.rand(1, 1, 9, 9, 9), np.eye(4))}, "moving is 2D and fixed 3D"),
    ],
)
def test_wrong_input_of_syn_is_one_sentence(change, sentence):
    image = io.Image(torch.rand(1, 1, 9, 9), np.eye(4))
    with pytest.raises(ValueError, match=sentence):
        by_ants.syn(**{"moving": image, "fixed": image, **change})


def test_syn_leaves_no_files_also_when_it_fails(tmp_path, monkeypatch):
    ants = pytest.importorskip("ants")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    moving, fixed = brains(2)
    by_ants.syn(moving, fixed, iterations=(5,))
    assert list(tmp_path.iterdir()) == []

    def fail(*args, outprefix, **options):
        (tmp_path / outprefix / "1Warp.nii.gz").write_bytes(b"half")
        raise RuntimeError("Registration failed with error code 1")

    monkeypatch.setattr(ants, "registration", fail)
    with pytest.raises(ValueError, match="moving and fixed could not be registered, expected"):
        by_ants.syn(moving, fixed)
    assert list(tmp_path.iterdir()) == []


def test_without_ants_syn_names_the_extra_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "ants", None)
    image = io.Image(torch.rand(1, 1, 9, 9), np.eye(4))
    with pytest.raises(ImportError, match=r"antspyx: in a clone .* -e \"\.\[baselines\]\"\."):
        by_ants.syn(image, image)


def test_a_motion_is_rigid_in_millimetres():
    """R^T R = 1 of the map in mm, by voxels of 1 x 2 x 3 mm."""
    size = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    motion = linear._Motion("rigid", (20, 18, 16), size)
    theta = motion.theta(torch.tensor([3.0, -2.0, 4.0, 1.0, 2.0, -3.0], dtype=torch.float64))
    mm = size[:, None] * theta[0, :, :3] / size
    torch.testing.assert_close(mm.T @ mm, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(size * theta[0, :, 3], torch.tensor([1.0, 2.0, -3.0]).double())


def test_a_map_between_levels_sends_the_same_places_to_the_same():
    """Corner voxels stay corner voxels: a place is a fraction of the way between them."""
    theta = torch.tensor([[[1.1, 0.2, 3.0], [-0.1, 0.9, -2.0]]], dtype=torch.float64)
    fixed, small, moving, small_moving = (41, 31), (21, 11), (51, 36), (26, 15)
    level = linear._at_level(theta, fixed, small, moving, small_moving)

    def sent(theta, start, shape):
        centre = (torch.tensor(shape, dtype=torch.float64) - 1) / 2
        return theta[0, :, :2] @ (start - centre) + centre + theta[0, :, 2]

    x = torch.tensor([10.0, 24.0], dtype=torch.float64)  # and (5, 8) on the level
    whole = sent(theta, x, fixed) / (torch.tensor(moving) - 1)
    coarse = sent(level, torch.tensor([5.0, 8.0]).double(), small) / (
        torch.tensor(small_moving) - 1
    )
    torch.testing.assert_close(coarse, whole)


def smooth_pair() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(x.image[None] for x in population(2, (40, 48), seed=2))


def test_refinement_returns_the_best_iterate():
    """At a rate that makes every step worse, that is where it started."""
    moving, fixed = smooth_pair()
    start = torch.zeros(1, 2, 40, 48)
    end = classical.refine(moving, fixed, start, 3, rate=50.0)
    assert torch.equal(end, start)


def test_smoothness_holds_a_displacement_back():
    moving, fixed = smooth_pair()
    start = torch.zeros(1, 2, 40, 48)
    free, held = (classical.refine(moving, fixed, start, 20, smoothness=s) for s in (0.0, 100.0))
    assert 3 * diffusion(held) < diffusion(free)


@pytest.mark.parametrize("by", [(7, -9), (-3, 4), (0, 11)])
def test_the_shift_between_two_images_is_counted(by):
    """fixed(x) = moving(x + t): the bright square of the moving image lies t further on."""
    moving, fixed = torch.zeros(2, 1, 1, 40, 44)
    fixed[..., 15:20, 18:24] = 1
    moving[..., 15 + by[0] : 20 + by[0], 18 + by[1] : 24 + by[1]] = 1
    assert classical.shift(moving, fixed)[0, :, 2].tolist() == list(by)
