"""SimpleITK and ANTs behind one call: against a known motion, and against each other."""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_register import turned

from regkit import classical, io
from regkit.classical import ants as by_ants
from regkit.classical import sitk as by_sitk
from regkit.data import population
from regkit.metrics import rotation_error
from regkit.spatial import affine_to_disp, invert_theta, rigid_theta, warp

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
    there = io.resample_to(
        source.image[None], subject.affine, shape, affine, matrix=np.linalg.inv(truth)
    )
    voxels = np.argwhere(subject.labels[0].numpy() > 0)[::50]
    voxels = np.pad(voxels, ((0, 0), (0, 3 - d)))
    points = np.c_[voxels, np.ones(len(voxels))] @ subject.affine.T
    # brightness has another unit and another zero
    return io.Image(100 * there + 7, affine), io.Image(subject.image[None], subject.affine), points


def apart(a: np.ndarray, b: np.ndarray, points: np.ndarray, fixed: io.Image) -> float:
    """How far two maps put one point of the head from each other at most, voxels."""
    return float(np.linalg.norm((points @ (a - b).T)[:, :3], axis=1).max() / max(fixed.spacing))


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
        between.append(io.voxel_map(b.affine, a.affine, 2, peer(a, b, "rigid")))
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
    with pytest.raises(ImportError, match=r"antspyx: pip install \"regkit-course\[baselines\]\""):
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


def test_levels_widen_the_reach_of_plain_descent():
    """From coarse to fine it comes to where the finest level alone is caught."""
    fixed = population(1, (80, 96), seed=2)[0].image[None]
    truth = rigid_theta(torch.tensor([[math.radians(12)]]), torch.tensor([[14.0, -12.0]]))
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
