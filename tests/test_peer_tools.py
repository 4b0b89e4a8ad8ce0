"""The wrappers of other people's registration: greedy and elastix, on a warp that is known."""

from __future__ import annotations

import sys
import tempfile

import numpy as np
import pytest
import torch

from regkit.classical import elastix, picsl
from regkit.classical.frame import in_millimetres, to_voxels
from regkit.spatial import identity_grid, warp

TOOLS = {"greedy": ("picsl_greedy", picsl.greedy), "elastix": ("itk", elastix.bspline)}
SPACING = {2: (1.0, 2.0), 3: (1.0, 2.0, 1.5)}


# loading ITK's Python package takes longer than a quick test may
@pytest.fixture(params=["greedy", pytest.param("elastix", marks=pytest.mark.slow)])
def tool(request):
    package, function = TOOLS[request.param]
    pytest.importorskip(package)
    return function


def blobs(shape: tuple[int, ...], shift: tuple[float, ...] = ()) -> torch.Tensor:
    """(1, 1, *S) in [0, 1]: four round bumps without any symmetry, moved by `shift` voxels."""
    x = identity_grid(shape) - torch.tensor(shift or (0.0,) * len(shape)).reshape(
        -1, *[1] * len(shape)
    )
    places = ((0.4, 0.4, 0.5), (0.65, 0.45, 0.4), (0.5, 0.65, 0.6), (0.35, 0.6, 0.35))
    image = torch.zeros(shape)
    for height, place in zip((1.0, 0.7, 0.5, 0.85), places):
        centre = torch.tensor([p * n for p, n in zip(place, shape)])
        square = (x - centre.reshape(-1, *[1] * len(shape))).square().sum(0)
        image += height * torch.exp(-square / (2 * 3.0**2))
    return image.clamp(max=1)[None, None]


@pytest.mark.parametrize("shape", [(40, 48), pytest.param((28, 32, 30), marks=pytest.mark.slow)])
def test_a_peer_finds_a_shift_in_voxels_along_the_array_axes(tool, shape):
    """Another shift along each axis, on voxels of unequal size: fixed(x) = moving(x + shift)."""
    shift = (2.0, -1.0, 1.5)[: len(shape)]
    moving, fixed = blobs(shape, shift), blobs(shape)
    found = tool(moving, fixed, spacing=SPACING[len(shape)])
    assert found.disp.shape == (1, len(shape), *shape) and found.disp.dtype == torch.float32
    inside = fixed[0, 0] > 0.3
    at = found.disp[0][:, inside].mean(1)
    torch.testing.assert_close(at, torch.tensor(shift), atol=0.25, rtol=0)
    before, after = ((x - fixed).square().mean() for x in (moving, warp(moving, found.disp)))
    assert after < 0.5 * before


def test_millimetres_of_itk_become_voxels_of_the_array():
    """ITK's array has the axes the other way round, the components in the order of its axes."""
    field = np.zeros((5, 4, 3, 3))
    field[4, 2, 1] = (2.0, 6.0, 1.5)  # at x = 1, y = 2, z = 4
    fixed = torch.rand(1, 1, 3, 4, 5)
    disp = to_voxels(field, (2.0, 3.0, 0.5), fixed)
    assert disp.shape == (1, 3, 3, 4, 5)
    assert disp[0, :, 1, 2, 4].tolist() == [1.0, 2.0, 3.0] and int(disp.count_nonzero()) == 3
    image, _ = in_millimetres(fixed, fixed, (2.0, 3.0, 0.5))
    assert image.spacing.tolist() == [2.0, 3.0, 0.5] and image.values.shape == (3, 4, 5)


def test_a_peer_says_in_one_sentence_what_is_wrong(tool):
    image = torch.rand(1, 1, 12, 12)
    with pytest.raises(ValueError, match=r"moving has shape \(1, 1, 9, 12\), expected"):
        tool(image[..., :9, :], image)
    with pytest.raises(ValueError, match="fixed is constant, expected an image"):
        tool(image, torch.ones_like(image))
    with pytest.raises(ValueError, match="metric is 'lncc', expected one of"):
        tool(image, image, metric="lncc")
    with pytest.raises(ValueError, match="spacing is"):
        tool(image, image, spacing=(1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"radius": 0}, "radius is 0, expected 1 or more voxels"),
        ({"iterations": "100,50"}, "iterations is '100,50', expected numbers such as"),
    ],
)
def test_wrong_settings_of_greedy_are_one_sentence(change, sentence):
    image = torch.rand(1, 1, 12, 12)
    with pytest.raises(ValueError, match=sentence):
        picsl.greedy(image, image, **change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"control": 0.0}, "control is 0.0, expected more than 0 mm"),
        ({"iterations": 0}, "iterations is 0, expected 1 or more"),
    ],
)
def test_wrong_settings_of_elastix_are_one_sentence(change, sentence):
    image = torch.rand(1, 1, 12, 12)
    with pytest.raises(ValueError, match=sentence):
        elastix.bspline(image, image, **change)


@pytest.mark.parametrize(("name", "package"), [("greedy", "picsl_greedy"), ("elastix", "itk")])
def test_without_the_package_a_sentence_names_the_extra(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    image = torch.rand(1, 1, 12, 12)
    with pytest.raises(ImportError, match=r"in a clone .* -e \"\.\[baselines\]\"\."):
        TOOLS[name][1](image, image)


@pytest.mark.slow
def test_elastix_leaves_no_files_and_gives_the_threads_of_itk_back(tmp_path, monkeypatch):
    itk = pytest.importorskip("itk")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = itk.MultiThreaderBase.GetGlobalDefaultNumberOfThreads()
    moving, fixed = blobs((24, 24), (1.0, 0.5)), blobs((24, 24))
    elastix.bspline(moving, fixed, iterations=2, threads=1)
    assert itk.MultiThreaderBase.GetGlobalDefaultNumberOfThreads() == before
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]
