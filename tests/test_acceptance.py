"""Ten checks that a registration library owes its users, one test each.

They come from what users of other libraries report again and again: odd sizes, losses that explode,
axes and directions, points, inverses, Jacobians, file formats, checkpoints, seeds and memory.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import regkit
from regkit import io, losses, models, spatial
from regkit.training import train
from regkit.training.recipes import get
from regkit.transform import Grid, Transform

both = pytest.mark.parametrize("ndim", [2, 3])
ODD = {2: (37, 53), 3: (21, 34, 45)}


def smooth(shape, seed, batch=1, channels=1, width=9):
    """Smooth random tensors (batch, channels, *S) with values of about 1."""
    noise = torch.randn(
        batch, channels, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    pool = torch.nn.functional.avg_pool2d if len(shape) == 2 else torch.nn.functional.avg_pool3d
    for _ in range(2):
        noise = pool(noise, width, 1, width // 2, count_include_pad=False)
    return noise / noise.abs().max()


@pytest.mark.slow
@both
@pytest.mark.parametrize("name", models.names())
def test_01_odd_sizes_pass_through_the_model_and_register(name, ndim, tmp_path):
    torch.manual_seed(0)
    model = models.create(name, ndim=ndim)
    moving, fixed = torch.rand(2, *ODD[ndim])
    result = model(moving[None, None], fixed[None, None])
    assert result.moved.shape == (1, 1, *ODD[ndim])
    assert result.disp.shape == (1, ndim, *ODD[ndim])
    models.save(model, tmp_path / "weights.safetensors", range=[0, 1])
    registered = regkit.register(
        moving, fixed, method=tmp_path / "weights.safetensors", device="cpu"
    )
    assert registered.moved.shape == (1, 1, *ODD[ndim])
    assert registered.disp.shape == (1, ndim, *ODD[ndim])
    assert torch.isfinite(registered.disp).all()
    torch.testing.assert_close(registered.moved[0, 0], moving, atol=1e-3, rtol=0)


@both
def test_02_lncc_is_invariant_and_finite_on_ct(ndim):
    shape = ODD[ndim]
    a, b = smooth(shape, 0).float(), smooth(shape, 1).float()
    noise = 0.1 * torch.rand(2, 1, 1, *shape, generator=torch.Generator().manual_seed(2))
    a, b = a + noise[0], 0.5 * a + 0.5 * b + noise[1]
    assert float(losses.lncc(a, a)) == pytest.approx(0, abs=1e-5)
    value = float(losses.lncc(a, b))
    assert 0.1 < value < 0.9
    assert float(losses.lncc(3 * a + 5, b)) == pytest.approx(value, abs=1e-4)
    assert float(losses.lncc(a, -2 * b - 1)) == pytest.approx(value, abs=1e-4)
    assert float(losses.lncc(torch.full_like(a, 3), torch.full_like(a, 3))) == 0
    # Hounsfield units, with a large region of air at -1024
    ct = [(1000 * x).requires_grad_() for x in (a, b)]
    air = (torch.arange(shape[0]) < shape[0] // 3).reshape(-1, *[1] * (ndim - 1))
    loss = losses.lncc(*[torch.where(air, -1024.0, x) for x in ct])
    loss.backward()
    assert 0 <= loss.item() <= 1
    assert all(torch.isfinite(x.grad).all() for x in ct)


@both
def test_03_a_displacement_of_one_voxel_along_axis_0_pulls_the_content_by_one_index(ndim):
    """disp = +1 along axis 0 looks one index further: the content moves to the index before."""
    shape = ODD[ndim]
    image = torch.rand(1, 1, *shape)
    disp = torch.zeros(1, ndim, *shape)
    disp[:, 0] = 1
    moved = spatial.warp(image, disp)
    torch.testing.assert_close(moved[:, :, :-1], image[:, :, 1:])
    assert (moved[:, :, -1] == 0).all()
    assert torch.equal(moved, spatial.warp(image, disp, mode="linear", padding="zeros"))


@both
def test_04_warped_points_reproduce_a_known_affine_map(ndim):
    shape = ODD[ndim]
    generator = torch.Generator().manual_seed(3)
    linear = torch.eye(ndim) + 0.1 * torch.randn(ndim, ndim, generator=generator)
    shift = torch.randn(ndim, 1, generator=generator)
    disp = spatial.affine_to_disp(torch.cat([linear, shift], dim=1)[None], shape)
    top = torch.tensor(shape) - 1.0
    points = torch.rand(1, 50, ndim, generator=generator) * top
    expected = (points - top / 2) @ linear.T + top / 2 + shift.T
    found = spatial.warp_points(points, disp)
    assert (found - expected).abs().max() < 1e-4
    assert regkit.metrics.tre(disp, points, expected).max() < 1e-4


@both
def test_05_exp_of_minus_v_undoes_exp_of_v(ndim):
    shape = (64, 64) if ndim == 2 else (40, 40, 40)
    svf = 2 * smooth(shape, 4, channels=ndim, width=17)  # largest component: 2 voxels
    assert float(svf.abs().max()) == pytest.approx(2)
    both_ways = spatial.compose(spatial.integrate(svf), spatial.integrate(-svf))
    inner = (..., *[slice(4, -4)] * ndim)  # what is looked up beyond the border is unknown
    assert both_ways[inner].norm(dim=1).max() < 0.05


@both
def test_06_the_jacobian_of_an_affine_map_is_exact_inside(ndim):
    generator = torch.Generator().manual_seed(5)
    linear = torch.eye(ndim) + 0.2 * torch.randn(ndim, ndim, generator=generator)
    theta = torch.cat([linear, torch.ones(ndim, 1)], dim=1)[None].double()
    det = spatial.jacobian_determinant(spatial.affine_to_disp(theta, ODD[ndim]))
    torch.testing.assert_close(
        det, torch.linalg.det(linear.double()).expand_as(det), atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_07_simpleitk_maps_points_as_we_do_on_oblique_anisotropic_images(seed, tmp_path):
    """Voxels -> file -> SimpleITK, compared in millimetres with what we mean; and back again."""
    random = np.random.default_rng(seed)
    shape = (18, 14, 12)

    def oblique(spacing):
        rotation = np.linalg.qr(random.standard_normal((3, 3)))[0]
        affine = np.eye(4)
        affine[:3, :3] = rotation * spacing
        affine[:3, 3] = random.uniform(-50, 50, 3)
        return affine

    fixed, moving = oblique((0.8, 1.3, 3.0)), oblique((2.0, 0.9, 1.1))
    disp = 3 * smooth(shape, 6, channels=3)
    grids = Grid(shape, fixed), Grid(shape, moving)
    io.write_transform(Transform.from_voxels(disp, *grids), tmp_path / "disp.nii.gz")
    field = sitk.ReadImage(str(tmp_path / "disp.nii.gz"), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(field)

    def lps(affine, voxels):
        return (voxels @ affine[:3, :3].T + affine[:3, 3]) * [-1, -1, 1]

    voxels = random.uniform(0.5, np.array(shape) - 1.5, (60, 3))
    mapped = spatial.warp_points(torch.from_numpy(voxels)[None], disp)[0].numpy()
    theirs = np.array([transform.TransformPoint(p) for p in lps(fixed, voxels).tolist()])
    assert np.abs(theirs - lps(moving, mapped)).max() < 1e-3  # mm
    back = io.read_transform(tmp_path / "disp.nii.gz", grids[1])
    apart = (back.voxels() - disp)[0].flatten(1).T.double().numpy() @ moving[:3, :3].T  # mm
    assert np.abs(apart).max() < 1e-3 and np.abs(back.fixed.affine - fixed).max() < 1e-4


@pytest.mark.slow
@both
@pytest.mark.parametrize("name", models.names())
def test_08_a_checkpoint_works_at_another_image_size(name, ndim, tmp_path):
    torch.manual_seed(0)
    model = models.create(name, ndim=ndim).train()
    small = torch.rand(2, 1, 1, *(16,) * ndim)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):  # so that it is not the identity any more
        losses.mse(model(*small).moved, small[1]).backward()
        optimiser.step()
    models.save(model, tmp_path / "weights.safetensors")
    loaded = models.load(tmp_path / "weights.safetensors")
    other = torch.rand(2, 1, 1, *ODD[ndim])
    with torch.no_grad():
        expected = model.eval()(*other).disp
        assert torch.equal(loaded(*other).disp, expected)
    assert expected.shape == (1, ndim, *ODD[ndim]) and expected.abs().max() > 1e-3


@pytest.mark.slow
def test_09_seeds_reproduce_a_training_run_bit_by_bit(monkeypatch, tmp_path):
    monkeypatch.setenv("REGKIT_DATA", str(tmp_path))
    recipe = get("vxm_diff_2d", at="smoke")
    first, second = (train(recipe, progress=False, device="cpu") for _ in range(2))
    other = train(get("vxm_diff_2d", at="smoke", seed=1), progress=False, device="cpu")
    assert [e["loss"] for e in first.history] == [e["loss"] for e in second.history]
    weights, again, different = (t.model.state_dict() for t in (first, second, other))
    assert all(torch.equal(weights[k], again[k]) for k in weights)
    assert not all(torch.equal(weights[k], different[k]) for k in weights)


def peak_memory(run) -> int:
    """Most bytes that PyTorch held on the CPU at once during `run`, beyond what was there."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max())


@pytest.mark.slow
@both
@pytest.mark.parametrize("name", models.names())
def test_10_peak_memory_of_a_training_step(name, ndim):
    """Not far above what the features have to take, and linear in the number of voxels.

    With REGKIT_RECORD=FOLDER the numbers are written to FOLDER/memory.json.
    """
    torch.manual_seed(0)
    model = models.create(name, ndim=ndim).train()
    shapes = {2: [(80, 96), (160, 96)], 3: [(32, 48, 32), (64, 48, 32)]}[ndim]
    peaks = []
    for shape in shapes:
        moving, fixed = torch.rand(2, 1, 1, *shape)

        def step(moving=moving, fixed=fixed):
            result = model(moving, fixed)
            (losses.mse(result.moved, fixed) + losses.diffusion(result.disp)).backward()

        step()  # gradients are there from now on
        peaks.append(peak_memory(step))
    per_voxel = [p / math.prod(s) / 4 for p, s in zip(peaks, shapes, strict=True)]
    # at least the features of the last level at full resolution and what is concatenated there;
    # at most a few times the about 100 to 250 channels of all levels together
    assert 30 < per_voxel[1] < 1500
    assert peaks[1] < 2.5 * peaks[0]  # the larger image has twice as many voxels
    if folder := os.environ.get("REGKIT_RECORD"):
        path = Path(folder) / "memory.json"
        record = json.loads(path.read_text()) if path.is_file() else {}
        record["how"] = {
            "command": "REGKIT_RECORD=results pytest tests/test_acceptance.py -k test_10",
            "what": "peak of one training step (mse + diffusion), batch 1, float32, CPU, bytes",
            "torch": torch.__version__,
        }
        size = "x".join(map(str, shapes[1]))
        record.setdefault("bytes", {})[f"{name} {ndim}D {size}"] = peaks[1]
        path.write_text(json.dumps(record, indent=1) + "\n")
