"""Demons and B-splines by SimpleITK: known warps, directions, units, bad input."""

import numpy as np
import pytest
import torch

from regkit.classical.sitk import bspline, demons
from regkit.data import population
from regkit.metrics import dice, folding_percent
from regkit.spatial import identity_grid, warp

METHODS = {"demons": demons, "bspline": bspline}


def blob(shape, centre, width=4.0):
    """A round spot (1, 1, *S) with its middle at `centre`, in voxels."""
    grid = identity_grid(shape)
    away = sum((grid[i] - c) ** 2 for i, c in enumerate(centre))
    return torch.exp(-away / (2 * width**2))[None, None]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(40, 48), (20, 24, 22)])
def test_a_spot_that_lies_elsewhere_is_looked_up_there(name, shape):
    """moved(x) = moving(x + disp(x)): at the fixed spot disp leads to the moving one, axis by axis,
    in voxels although these are not cubes."""
    middle = [(n - 1) / 2 for n in shape]
    shift = [2.0, -1.5, 1.0][: len(shape)]
    fixed = blob(shape, middle)
    moving = blob(shape, [m + s for m, s in zip(middle, shift)])
    options = {"metric": "mse"} if name == "bspline" else {}
    spacing = [1.0, 1.5, 1.25][: len(shape)]
    found = METHODS[name](moving, fixed, spacing=spacing, iterations=25, **options)
    assert found.disp.shape == (1, len(shape), *shape) and found.disp.dtype == torch.float32
    assert found.inverse is None
    at = (slice(None), slice(None), *(round(m) for m in middle))
    assert np.abs(found.disp[at][0].numpy() - shift).max() < 0.3
    assert (warp(moving, found.disp) - fixed).square().mean() < 0.03 * (
        (moving - fixed).square().mean()
    )
    shapes = [level for level, _ in found.values]
    assert shapes[-1] == shape and shapes == sorted(shapes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [(demons, {"kind": kind}) for kind in ("diffeomorphic", "additive", "thirion")]
    + [(bspline, {"metric": m}) for m in ("mutual_information", "correlation", "mse")],
)
def test_structures_of_two_people_come_together(method, options):
    moving, fixed = population(2, (80, 96), seed=2)
    disp = method(moving.image[None], fixed.image[None], spacing=2.2, **options).disp
    labels = sorted(set(fixed.labels.unique().tolist()) - {0})
    before = float(dice(moving.labels[None], fixed.labels[None], labels).nanmean())
    moved = warp(moving.labels[None], disp, mode="nearest")
    assert float(dice(moved, fixed.labels[None], labels).nanmean()) > before + 0.1
    if options.get("kind") == "diffeomorphic":
        assert float(folding_percent(disp)) == 0


def test_an_affine_map_of_intensities_means_nothing_to_the_correlation():
    """And much to a difference of squares: the metric is the one that was asked for."""
    fixed, moving = blob((40, 48), (19.0, 24.0)), blob((40, 48), (21.0, 23.0))
    plain = bspline(moving, fixed, metric="correlation")
    other = bspline(0.3 + 0.5 * moving, fixed, metric="correlation")
    assert torch.allclose(plain.disp, other.disp, atol=0.05)
    assert plain.values[0][1] < 0 and bspline(moving, fixed, metric="mse").values[0][1] > 0


@pytest.mark.slow
def test_a_coarser_mesh_bends_less():
    moving, fixed = (x.image[None] for x in population(2, (80, 96), seed=2))
    fine, coarse = (
        bspline(moving, fixed, spacing=2.2, metric="mse", mesh=mesh).values[-1][1]
        for mesh in (12.0, 100.0)
    )
    assert fine < 0.8 * coarse


def test_smoothing_of_demons_is_in_voxels():
    """Voxels twice as wide: the same answer in voxels."""
    moving, fixed = (x.image[None] for x in population(2, (40, 48), seed=2))
    one, two = (demons(moving, fixed, spacing=h, levels=(1,)).disp for h in (1.0, 2.0))
    assert torch.allclose(one, two, atol=1e-3)
    rough = demons(moving, fixed, levels=(1,), smoothing=0.5).disp
    assert rough.diff(dim=2).square().mean() > 2 * one.diff(dim=2).square().mean()


@pytest.mark.parametrize("name", METHODS)
def test_progress_rises_to_one_and_threads_are_given_back(name):
    sitk = pytest.importorskip("SimpleITK")
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    moving, fixed = (x.image[None] for x in population(2, (40, 48), seed=2))
    seen = []
    METHODS[name](moving, fixed, iterations=5, progress=seen.append)
    assert seen == sorted(seen) and 0 < seen[0] and 0.6 < seen[-1] <= 1
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == before


IMAGE = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"moving": IMAGE[0]}, r"moving has shape \(1, 12, 12\), expected \(1, 1, H, W\)"),
        ({"moving": IMAGE[..., :11]}, "moving has shape .* the same as fixed"),
        ({"fixed": torch.ones(1, 1, 12, 12)}, "fixed is constant, expected"),
        ({"moving": IMAGE / 0}, "moving holds NaN or infinity, expected"),
        ({"moving": (IMAGE > 0.5).long()}, "moving is torch.int64, expected floating point"),
        ({"moving": IMAGE[..., :1], "fixed": IMAGE[..., :1]}, "expected 2 voxels or more"),
        ({"spacing": -1.0}, "spacing is -1.0, expected one positive number"),
        ({"levels": (2, 0)}, r"levels is \(2, 0\), expected whole numbers of 1 or more"),
        ({"levels": ()}, r"levels is \(\), expected whole numbers of 1 or more"),
        ({"iterations": 0}, "iterations is 0, expected 1 or more"),
    ],
)
def test_wrong_input_is_one_sentence(name, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        METHODS[name](**{"moving": IMAGE, "fixed": IMAGE, **change})


def test_wrong_settings_of_each_are_one_sentence():
    with pytest.raises(ValueError, match="kind is 'fast', expected one of diffeomorphic, additive"):
        demons(IMAGE, IMAGE, kind="fast")
    with pytest.raises(ValueError, match="smoothing is -1, expected 0 voxels or more"):
        demons(IMAGE, IMAGE, smoothing=-1)
    with pytest.raises(ValueError, match="metric is 'lncc', expected one of mse, mutual_inform"):
        bspline(IMAGE, IMAGE, metric="lncc")
    with pytest.raises(ValueError, match="mesh is 0, expected a positive number of mm"):
        bspline(IMAGE, IMAGE, mesh=0)


@pytest.mark.parametrize(
    ("name", "shape"), [("demons", (2, 20, 20)), ("demons", (5, 30)), ("bspline", (5, 30))]
)
def test_thin_images_are_registered(name, shape):
    fixed = blob(shape, [(n - 1) / 2 for n in shape])
    moving = blob(shape, [(n - 1) / 2 + (i > 0) for i, n in enumerate(shape)])
    disp = METHODS[name](moving, fixed, iterations=10).disp
    assert disp.shape == (1, len(shape), *shape) and torch.isfinite(disp).all()


def test_too_few_slices_for_a_blur_are_one_sentence():
    image = torch.rand(1, 1, 3, 20, 20)
    with pytest.raises(ValueError, match="fixed has shape .*expected 4 voxels or more along each"):
        bspline(image, image)
