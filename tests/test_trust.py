"""How far a registration may be trusted: known errors, and what `register` makes of the map."""

import json
import re

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from test_greedy import smooth_map, texture
from test_register import RAS, blobs, nifti
from typer.testing import CliRunner

import regkit
from regkit import checks, classical, plot, trust
from regkit.cli import app
from regkit.data.population import population, true_displacement
from regkit.spatial import invert, warp

SHAPES = {2: (96, 80), 3: (40, 48, 44)}


@pytest.fixture(scope="module", params=SHAPES, ids=["2D", "3D"])
def known(request):
    """moving, fixed, the true map and its inverse."""
    moving, truth = texture(SHAPES[request.param]), smooth_map(SHAPES[request.param])
    return moving, warp(moving, truth, padding="border"), truth, invert(truth)


# what it says of known answers --------------------------------------------------------------------


def test_the_true_map_is_trusted(known):
    _, fixed, truth, inverse = known
    inside = (0, 0, *[slice(8, -8)] * len(fixed.shape[2:]))
    found = trust.trust_map(fixed, fixed, truth, inverse)
    assert found.shape == fixed.shape and found.dtype == torch.float32
    assert 0 <= float(found.min()) and float(found.max()) <= 1
    assert float(found[inside].mean()) > 0.85


@pytest.mark.parametrize("second", [True, False])
def test_the_half_where_a_map_is_wrong_is_trusted_less(known, second):
    moving, fixed, truth, inverse = known
    step = torch.linspace(-8, 8, fixed.shape[2]).sigmoid()  # from 0 to 1, without a fold
    wrong = truth.clone()
    wrong[:, 0] += 4 * step.reshape(-1, *[1] * (fixed.ndim - 3))
    moved = warp(moving, wrong, padding="border")
    found = trust.trust_map(moved, fixed, wrong, inverse if second else None)[0, 0]
    third = fixed.shape[2] // 3
    right, off = float(found[:third].mean()), float(found[-third:].mean())
    assert off < right - (0.4 if second else 0.1)


def test_a_fold_is_not_trusted_at_all(known):
    _, fixed, truth, inverse = known
    folded = truth.clone()
    at = (0, 0, *[n // 2 for n in fixed.shape[2:]])
    folded[at] += 3  # its left neighbour comes to lie behind its right one
    found = trust.trust_map(fixed, fixed, folded, inverse)
    around = [n // 2 for n in fixed.shape[2:]]
    around[0] += 1
    assert found[(0, 0, *around)] == 0
    assert float((found == 0).float().mean()) < 0.01


def test_a_disagreement_counts_in_mm_along_its_axis():
    image, still = texture((40, 44)), torch.zeros(1, 2, 40, 44)
    for axis, mm in ((0, 3.0), (1, 15.0)):
        shift = still.clone()
        shift[:, axis] = 3
        found = trust.cues(image, image, shift, still, (1.0, 5.0))["consistency"]
        assert torch.allclose(found.exp(), torch.tensor(mm + trust.LEAST), rtol=1e-4)
    far, near = (trust.trust_map(image, image, shift, still, size).mean() for size in (2.0, 0.5))
    assert far < near - 0.2


def test_the_second_run_starts_where_the_first_one_ends():
    """A map x -> 2x / (its inverse x / 2): composed in the wrong order, they would not undo."""
    image = texture((48, 48))
    at = torch.arange(48.0)[None, None, :, None].expand(1, 2, 48, 48).clone()
    at[:, 1] = 0
    there, back = 0.2 * at, at / 1.2 - at
    found = trust.cues(image, image, there, back)["consistency"].exp() - trust.LEAST
    assert float(found[..., :24, :].max()) < 1e-3


def test_a_mean_is_that_of_a_box_applied_twice():
    random = torch.Generator().manual_seed(0)
    disp, still = torch.zeros(1, 2, 40, 44), torch.zeros(1, 2, 40, 44)
    disp[:, 0] = torch.rand(40, 44, generator=random)
    image = texture((40, 44))
    found = trust.cues(image, image, disp, still, 5.0)["consistency"].exp() - trust.LEAST
    mean = 5 * disp[0, 0].numpy()
    for _ in range(2):
        mean = ndimage.uniform_filter(mean, 3)  # 15 mm
    assert np.allclose(found[0, 0, 3:-3, 3:-3], mean[3:-3, 3:-3], atol=1e-4)


def test_texture_is_the_bound_on_a_shift():
    """In windows of one voxel the tensor is g g^T, of which the inverse is known."""
    image, still = texture((40, 44)), torch.zeros(1, 2, 40, 44)
    found = trust.cues(image, image, still, None, 15.0)["texture"]
    squared = sum(g**2 for g in np.gradient(image[0, 0].double().numpy(), 15.0))
    squared /= (squared**2).sum() / squared.sum()
    expected = 0.5 * np.log(1 / (squared + 1e-3) + 1 / 1e-3)
    assert np.allclose(found[0, 0], expected, atol=1e-3)


def test_along_an_edge_there_is_less_to_go_by():
    rows = torch.linspace(0, 20, 96).sin()[:, None].expand(96, 80)
    edges, dots = rows[None, None].contiguous(), texture((96, 80))
    slopes = [torch.gradient(x, dim=(2, 3)) for x in (edges, dots)]
    sizes = [sum(g.square().mean() for g in pair).sqrt() for pair in slopes]
    parts = [x / size for x, size in zip((edges, dots), sizes, strict=True)]
    image = torch.cat(parts, 3)  # both with slopes of one size
    found = trust.cues(image, image, torch.zeros(1, 2, 96, 160))["texture"]
    assert float(found[..., 12:68].mean()) > float(found[..., 92:148].mean()) + 0.5


def test_the_difference_is_what_a_line_leaves(known):
    _, fixed, truth, _ = known
    still = torch.zeros_like(truth)
    noise = texture(fixed.shape[2:], seed=5)
    for moved, least, most in ((fixed, 0, 0.01), (7 - 300 * fixed, 0, 0.01), (noise, 0.6, 1)):
        found = trust.cues(moved, fixed, still)["difference"]
        assert least <= float(found.mean()) <= most


def test_images_that_say_nothing_give_numbers_all_the_same():
    flat = torch.ones(1, 1, 30, 34)
    for shape in ((30, 34), (2, 3), (1, 20), (30, 34, 1), (3, 2, 2)):
        image, still = texture(shape), torch.zeros(1, len(shape), *shape)
        for a, b in ((image, image), (flat.expand(1, 1, 30, 34), texture((30, 34)))):
            disp = still if a is image else torch.zeros(1, 2, 30, 34)
            found = trust.trust_map(a, b, disp, disp)
            assert torch.isfinite(found).all() and found.shape == b.shape
    still = torch.zeros(1, 2, 30, 34)
    nothing = trust.trust_map(flat, flat, still, None)
    assert float(nothing.max()) < 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moved": torch.rand(1, 1, 8, 9)}, "moved has shape (1, 1, 8, 9), expected (1, 1, 8, 8)"),
        ({"fixed": torch.rand(1, 2, 8, 8)}, "fixed has shape (1, 2, 8, 8), expected (1, 1, 8, 8)"),
        ({"disp": torch.rand(1, 3, 8, 8)}, "disp has shape (1, 3, 8, 8)"),
        ({"inverse": torch.zeros(1, 2, 8, 9)}, "inverse has shape (1, 2, 8, 9), expected that of"),
        ({"spacing": (1.0, 2.0, 3.0)}, "spacing is (1.0, 2.0, 3.0), expected"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    image, still = torch.rand(1, 1, 8, 8), torch.zeros(1, 2, 8, 8)
    given = {"moved": image, "fixed": image, "disp": still} | change
    with pytest.raises(ValueError, match=re.escape(words)):
        trust.trust_map(**given)


# the second run -----------------------------------------------------------------------------------


def test_the_second_run_goes_back(known):
    moving, fixed, _, inverse = known
    found = trust.second_run(moving, fixed)
    inside = (0, slice(None), *[slice(8, -8)] * len(fixed.shape[2:]))
    before, after = (float(x[inside].norm(dim=0).mean()) for x in (inverse, found - inverse))
    assert after < 0.3 * before


def test_the_second_run_is_short_where_an_image_is_large(monkeypatch):
    seen = []

    def greedy(moving, fixed, **options):
        seen.append((moving, fixed, options))
        return classical.Deformation(torch.zeros(1, 2, 4, 4))

    monkeypatch.setattr(classical, "greedy", greedy)
    images = [torch.rand(1, 1, 4, 4) for _ in range(4)]
    for few, effort in ((17, "best"), (16, "fast")):
        monkeypatch.setattr(trust, "FEW", few)
        trust.second_run(*images[:2], 2.0, "mind", *images[2:])
        moving, fixed, options = seen[-1]
        assert moving is images[1] and fixed is images[0]  # and the masks change places too
        assert options["mask"] is images[3] and options["moving_mask"] is images[2]
        assert (options["effort"], options["similarity"]) == (effort, "mind")


@pytest.mark.parametrize(("shape", "similarity"), [((5, 6), "mind"), ((4, 5, 6), "lncc")])
def test_the_second_run_of_a_slice_looks_at_something_else(monkeypatch, shape, similarity):
    def greedy(moving, fixed, **options):
        assert options["similarity"] == similarity
        return classical.Deformation(torch.zeros(1, len(shape), *shape))

    monkeypatch.setattr(classical, "greedy", greedy)
    trust.second_run(torch.rand(1, 1, *shape), torch.rand(1, 1, *shape))


@pytest.mark.slow
def test_the_order_agrees_with_that_of_the_true_errors():
    """On people that the weights have not seen; more of them are in results/trust.json."""
    subjects = population(4, (80, 96), seed=12)
    size = torch.tensor(subjects[0].grid.spacing, dtype=torch.float32)
    ranks = []
    for moving, fixed in zip(subjects, subjects[1:]):
        images = moving.image[None], fixed.image[None]
        disp = classical.greedy(*images, spacing=size).disp
        back = trust.second_run(*images, spacing=size)
        found = trust.trust_map(warp(images[0], disp), images[1], disp, back, size)
        error = (disp - true_displacement(moving, fixed))[0].movedim(0, -1) * size
        brain = fixed.labels[0] > 0
        ranks.append(stats.spearmanr(1 - found[0, 0][brain], error.norm(dim=-1)[brain]).statistic)
    assert np.mean(ranks) >= 0.4


# in `register` ------------------------------------------------------------------------------------


def scans(tmp_path):
    """Two files that show one thing, 3 mm apart."""
    image = blobs((40, 44))
    paths = tmp_path / "m.nii.gz", tmp_path / "f.nii.gz"
    for path, values in zip(paths, (image, np.roll(image, 3, 0)), strict=True):
        nibabel.save(nifti(values, RAS), path)
    return paths


@pytest.mark.slow
def test_register_maps_trust_where_it_is_asked_to(tmp_path):
    paths = scans(tmp_path)
    plain = regkit.register(*paths, "greedy", effort="fast")
    assert plain.trust is None and "trust" not in plain.metrics
    result = regkit.register(*paths, "greedy", effort="fast", trust=True)
    assert torch.equal(result.disp, plain.disp) and result.warnings == plain.warnings == []
    assert result.trust.shape == result.moved.shape
    assert 0 <= float(result.trust.min()) and float(result.trust.max()) <= 1
    numbers = result.metrics["trust"]
    assert numbers["least"] <= numbers["mean"] and numbers["mean"] > 0.5

    folder = result.save(tmp_path / "out")
    written = nibabel.load(folder / "trust.nii.gz")
    np.testing.assert_allclose(written.affine, nibabel.load(paths[1]).affine)
    np.testing.assert_allclose(written.get_fdata().squeeze(), result.trust[0, 0], atol=1e-6)
    assert json.loads((folder / "metrics.json").read_text())["trust"] == pytest.approx(numbers)
    assert "trust" in [ax.get_title() for ax in result.report().axes]
    plain.save(folder)  # the map of another answer does not stay beside it
    assert not (folder / "trust.nii.gz").exists()


def test_trust_is_of_the_affine_part_too(tmp_path):
    """The second run starts from the images as the affine map lays them."""
    result = regkit.register(*scans(tmp_path), "affine", trust=True)
    assert float(result.transform.disp.abs().max()) == 0
    assert result.metrics["trust"]["mean"] > 0.5


def test_a_mask_says_where_trust_is_counted(tmp_path):
    paths = scans(tmp_path)
    mask = np.zeros((40, 44), dtype=np.float32)
    mask[10:20, 12:30] = 1
    nibabel.save(nifti(mask, RAS), tmp_path / "mask.nii.gz")
    result = regkit.register(
        *paths, "affine", affine="affine", fixed_mask=tmp_path / "mask.nii.gz", trust=True
    )
    inside = result.trust[0, 0][torch.from_numpy(mask) > 0]
    assert result.metrics["trust"]["mean"] == pytest.approx(float(inside.mean()), abs=1e-6)


def test_the_command_line_writes_the_map(tmp_path):
    paths = [str(path) for path in scans(tmp_path)]
    options = ["--method", "greedy", "--effort", "fast", "--trust"]
    done = CliRunner().invoke(app, ["register", *paths, "-o", str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    mean = json.loads((tmp_path / "out" / "metrics.json").read_text())["trust"]["mean"]
    assert re.search(rf"^trust +{mean:.4f}", done.stdout, re.MULTILINE)
    assert (tmp_path / "out" / "trust.nii.gz").is_file()


def test_a_constant_image_is_not_trusted():
    image = blobs((40, 44))
    result = regkit.register(np.ones_like(image), image, "greedy", trust=True)
    assert float(result.trust.max()) < 0.5


# images that show nothing alike -------------------------------------------------------------------

SENTENCE = "This registration cannot be trusted: "


def noise(shape=(80, 96)):
    return np.random.default_rng(3).random(shape, dtype=np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "affine"])
def test_noise_laid_on_a_brain_is_not_trusted(method):
    brain = population(1, (80, 96), seed=12)[0].image[0].numpy()
    for pair in ((noise(), brain), (brain, noise())):
        for option in (False, True):
            found = regkit.register(*pair, method, trust=option)
            sentences = [w for w in found.warnings if w.startswith(SENTENCE)]
            assert ["show little alike" in w for w in sentences] == [True]


@pytest.mark.slow
def test_two_brains_are_not_warned_of():
    first, second = (s.image[0].numpy() for s in population(2, (80, 96), seed=12))
    for method in ("greedy", "affine", "vxm_diff_brain_2d"):
        assert regkit.register(first, second, method, trust=True).warnings == []


def test_a_second_run_that_leads_elsewhere_is_told_of(monkeypatch):
    """Alike by both correlations, but pulled by another 20 mm on the way back."""
    elsewhere = torch.full((1, 2, 40, 44), 10.0)
    monkeypatch.setattr("regkit.registration.second_run", lambda *args: elsewhere)
    image = blobs((40, 44))
    pair = nifti(image, RAS), nifti(np.roll(image, 1, 0), RAS)
    assert regkit.register(*pair, "greedy", effort="fast").warnings == []
    warnings = regkit.register(*pair, "greedy", effort="fast", trust=True).warnings
    assert [w.startswith(SENTENCE) and "leads elsewhere" in w for w in warnings] == [True]


def test_noise_in_the_air_is_no_reason_to_mistrust():
    brain = population(1, (80, 96), seed=12)[0].image[None]
    wide = [torch.zeros(1, 1, 240, 288) for _ in range(2)]
    shown = torch.zeros(1, 1, 240, 288, dtype=torch.bool)
    for seed, image in enumerate(wide):
        random = torch.Generator().manual_seed(seed)
        image += 0.02 * torch.rand(image.shape, generator=random)
        image[..., 80:160, 96:192] += brain
    shown[..., 80:160, 96:192] = brain > 0.1
    low = 1 - float(regkit.losses.lncc(*wide))
    assert low < checks.LOW
    assert checks.against_unlike(*wide, shown, True, 0.9, low) == []
    assert len(checks.against_unlike(*wide, ~shown, True, 0.9, low)) == 1
    assert checks.against_unlike(*wide, ~shown, False, 0.9, low) == []  # may still become alike


@pytest.mark.slow
@pytest.mark.real
def test_real_pairs_are_not_warned_of(sample):
    from regkit.data import samples

    for name in ("oasis_3d", "ants_slices", "brainweb_t1_pd_2d"):
        sample(name)
    oasis, ants = samples.load_oasis_slices()[:2], samples.load_ants_slices()
    brainweb = samples.load_brainweb()
    pairs = [oasis, (ants["r16"], ants["r64"]), (brainweb["t1"], brainweb["pd"])]
    for moving, fixed in pairs:
        found = regkit.register(moving.nifti(), fixed.nifti(), "greedy", "affine", trust=True)
        assert not [w for w in found.warnings if w.startswith(SENTENCE)]


@pytest.mark.slow
@pytest.mark.real
def test_a_brain_and_a_fundus_are_warned_of(sample):
    from regkit.data import samples

    for name in ("oasis_3d", "fundus_pair"):
        sample(name)
    brain = samples.load_oasis_slices()[0].image[0]
    fundus = torch.nn.functional.interpolate(
        samples.load_fundus_pair()[0].image[None], brain.shape, mode="area"
    )[0, 0]
    for pair in ((fundus, brain), (brain, fundus)):
        for option in (False, True):
            found = regkit.register(*pair, "greedy", trust=option)
            assert len([w for w in found.warnings if w.startswith(SENTENCE)]) == 1


# its picture --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "planes"), [((30, 34), 1), ((14, 16, 12), 3)])
def test_the_report_has_a_panel_of_trust_with_a_bar(shape, planes):
    image, still = texture(shape), torch.zeros(1, len(shape), *shape)
    given = image, image, image, still
    plain = plot.report(*given)
    fig = plot.report(*given, trust=image)
    assert len(fig.axes) == len(plain.axes) + 2 * planes
    assert "trust" in [ax.get_title() for ax in fig.axes]
    boxes = [ax.get_position() for ax in fig.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert "the redder the less" in " ".join(t.get_text() for t in fig.texts)


def test_what_is_trusted_keeps_its_grey_and_the_air_is_left_alone():
    fixed = torch.zeros(1, 1, 20, 24)
    fixed[..., 5:15, 6:18] = torch.linspace(0.5, 1, 12)
    values = torch.ones_like(fixed)
    values[..., :10, :] = 0
    _, (ax,) = plot.panels(1)
    shown = plot.trust(values, fixed, ax)
    drawn = shown.to_rgba(shown.get_array())  # (columns, rows, 4)
    assert np.allclose(drawn[6:18, 5:10, 3], 1) and np.allclose(drawn[6:18, 10:15, 3], 0)
    red, green, _ = drawn[6, 5, :3]
    assert red > 2 * green
    assert np.ma.getmaskarray(shown.get_array())[:5].all()  # the air
