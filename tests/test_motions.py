"""What chapter 02 measures and prints of methods that find a motion, and of a network's layers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from regkit import metrics, models
from regkit.book import motions, shapes
from regkit.data import RigidPairs, Subject, known_pair, noisy
from regkit.spatial import affine_to_disp, compose_theta, invert_theta, rigid_theta, warp
from regkit.training.evaluation import by_descent, motion_rows

STILL = torch.eye(2, 3)[None]


def theta(degrees=0.0, shift=(0.0, 0.0)):
    """(1, 2, 3) of a turn in degrees and a shift in voxels."""
    return rigid_theta(torch.tensor([[math.radians(degrees)]]), torch.tensor([shift])).float()


def answers(found):
    """A method that gives every pair the same answer."""
    return lambda moving, fixed: SimpleNamespace(theta=found)


def head(spacing=1.0):
    """A bright square with a dark corner on 24 x 24 voxels; its label is 1."""
    image = torch.zeros(1, 24, 24)
    image[:, 6:18, 6:18] = 0.8
    image[:, 6:10, 6:10] = 0.3
    affine = np.diag([spacing, spacing, 1.0, 1.0])
    return Subject("square", image, (image > 0).to(torch.int16), affine)


def test_noise_stands_in_the_head_alone_and_has_the_level_that_is_asked_for():
    image = torch.zeros(1, 100, 100)
    image[:, 20:80, 20:80] = 0.5
    added = noisy(image, 3, 0.1) - image
    assert not added[image == 0].any()
    assert float(added[image > 0].std()) == pytest.approx(0.1, rel=0.05)
    torch.testing.assert_close(noisy(image, 3, 0.1), noisy(image, 3, 0.1))
    assert not torch.equal(noisy(image, 3, 0.1), noisy(image, 4, 0.1))


def test_a_known_pair_is_undone_by_its_motion():
    """A shift by whole voxels: moving(x + t) = fixed(x); a turn undoes its inverse."""
    shifted = known_pair(head(), theta(0, (3.0, -2.0)), noise=0)
    torch.testing.assert_close(shifted.moving.image[:, 3:, :-2], shifted.fixed.image[:, :-3, 2:])
    torch.testing.assert_close(shifted.moving.labels[:, 3:, :-2], shifted.fixed.labels[:, :-3, 2:])
    turned = known_pair(head(), theta(90), noise=0)
    back = warp(turned.moving.image[None], affine_to_disp(theta(90), (24, 24)))[0]
    torch.testing.assert_close(back, head().image, atol=1e-5, rtol=0)
    pair = known_pair(head(), STILL, noise=0.1, seed=1)
    apart = (pair.moving.image - pair.fixed.image)[head().image > 0]
    assert float(apart.std()) == pytest.approx(0.1 * 2**0.5, rel=0.2)  # noise of its own in each


def test_all_pairs_in_order():
    data = RigidPairs([[head(), head()]], length=3, seed=1)
    for index, pair in enumerate(data.pairs()):
        torch.testing.assert_close(pair.theta, data.pair(index).theta)
        torch.testing.assert_close(pair.moving.image, data[index]["moving"])
    assert len(data.pairs()) == 3


def test_how_far_places_inside_the_head_are_off():
    """Off by a shift: its length everywhere. Off by a turn: its mean way over the square."""
    pair = known_pair(head(), theta(10, (1.0, 0.0)), noise=0)
    shifted = theta(10, (1.0, 0.0)) + torch.tensor([[[0, 0, 3.0], [0, 0, 4.0]]])
    (row,) = motion_rows(answers(shifted), [pair], inside=True)
    assert row["endpoint_error"] == pytest.approx(5, abs=1e-5)
    (row,) = motion_rows(answers(theta(16, (1.0, 0.0))), [pair], inside=True)
    places = torch.stack(torch.meshgrid(*2 * [torch.arange(6.0, 18.0)], indexing="ij")) - 11.5
    way = 2 * math.sin(math.radians(3)) * places.norm(dim=0).mean().item()
    assert row["endpoint_error"] == pytest.approx(way, rel=1e-4)
    assert "endpoint_error" not in motion_rows(answers(shifted), [pair])[0]


def test_a_judge_says_medians_successes_and_millimetres(capsys):
    """Two right answers out of three; voxels of 2 mm."""
    data = RigidPairs([[head(spacing=2.0)]], length=3, seed=0)
    truths = [pair.theta for pair in data.pairs()]
    off = theta(4, (3.0, 4.0))
    waiting = iter([truths[0], truths[1], compose_theta(truths[2], off)] + [off] * 3)

    def method(moving, fixed):
        assert moving.shape == fixed.shape == (1, 1, 24, 24)  # one pair at a time
        return SimpleNamespace(theta=next(waiting))

    scores = motions.judge({"mostly right": method, "still": answers(STILL)}, data)
    assert list(scores) == ["mostly right", "still"]
    good, still = scores["mostly right"], scores["still"]
    assert good["success"] == pytest.approx(200 / 3) and good["mm"] == pytest.approx(0, abs=1e-4)
    assert good["rows"][2]["rotation_error"] == pytest.approx(4, abs=1e-3)
    assert good["rows"][2]["translation_error"] == pytest.approx(5, abs=1e-3)
    shifts = sorted(t[0, :, 2].norm().item() for t in truths)
    assert still["mm"] == pytest.approx(2 * shifts[1], rel=1e-5) and still["ms"] > 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("mostly right") and "success  67 %" in first and first.endswith(" ms")
    assert f"{still['rotation_error']:6.3f} degrees {still['mm']:6.3f} mm" in second


def test_how_far_a_method_is_off_when_a_head_is_turned():
    """One that always says 10 degrees, of motions of 0, 10 and 30 degrees."""
    thetas = [theta(degrees) for degrees in (0, 10, 30)]
    found = motions.when_turned({"ten": answers(theta(10))}, [head()] * 3, thetas)
    assert found["ten"] == pytest.approx([10, 0, 20], abs=1e-3)


def test_a_method_that_reads_the_voxel_size_from_a_header(monkeypatch):
    seen = {}

    def register(moving, fixed, method):
        seen.update(moving=moving, fixed=fixed, method=method)
        disp = torch.zeros(1, 2, 5, 6)
        return SimpleNamespace(moved=torch.ones(1, 1, 5, 6), disp=disp, theta=STILL)

    monkeypatch.setattr(motions, "register", register)
    affine = np.diag([2.0, 2.0, 1.0, 1.0])
    a, b = torch.rand(2, 1, 1, 5, 6)
    found = motions.with_header("some weights", affine)(a, b)
    assert seen["method"] == "some weights" and found.theta is STILL
    for name, image in (("moving", a), ("fixed", b)):
        np.testing.assert_array_equal(seen[name].affine, affine)
        np.testing.assert_array_equal(seen[name].get_fdata(dtype=np.float32), image[0, 0])


def test_the_shapes_of_layers(capsys):
    """A convolution of stride 2 with padding 3 and kernel 7 halves: (100 - 1) // 2 + 1 = 50."""
    network = models.create("rigid_resnet34", ndim=2, width=16, reduce=2)
    layers = {"first": network.stem[0], "numbers": network.numbers}
    moving, fixed = torch.rand(2, 1, 1, 200, 200)
    found = shapes(network, layers, moving, fixed)
    torch.testing.assert_close(found.theta, STILL)
    assert capsys.readouterr().out.splitlines() == [
        "first        (2, 100, 100)    -> (16, 50, 50)",
        "numbers      (64,)            -> (3,)",
    ]
    assert not any(layer._forward_hooks for layer in network.modules())


def test_no_hook_stays_where_a_network_fails():
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="shapes"):
        shapes(lambda a, b: layer(a), {"layer": layer}, torch.rand(1, 3), torch.rand(1, 3))
    assert not layer._forward_hooks


def test_the_truth_is_what_registration_looks_for():
    """The answer of a pair undoes the motion of the moving image, not the other way round."""
    pair = known_pair(head(), theta(20, (1.0, 2.0)), noise=0)
    assert metrics.rotation_error(by_descent()(*images(pair)).theta, pair.theta) < 1
    assert metrics.rotation_error(invert_theta(pair.theta), pair.theta) == pytest.approx(
        40, abs=0.1
    )


def images(pair):
    """(1, 1, *S) moving and fixed."""
    return pair.moving.image[None], pair.fixed.image[None]
