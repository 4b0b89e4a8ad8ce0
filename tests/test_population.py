"""The embedded population: it must look like a population, and its truth must be true."""

import functools

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from regkit import losses, metrics, spatial
from regkit.data import LABELS, RandomPairs, chain, population, template, true_displacement

SOME = {(80, 96): 6, (160, 192): 4, (80, 96, 80): 2}  # how many subjects of each shape


@pytest.fixture(autouse=True, scope="module")
def empty_cache(tmp_path_factory):
    """Nothing that an earlier run left behind is tested here."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGKIT_DATA", str(folder))
        yield folder


@pytest.fixture(scope="module", params=SOME)
def shape(request):
    """Module scope: pytest then runs all tests of one shape in a row."""
    return request.param


@pytest.fixture(scope="module")
def subjects():
    return functools.cache(lambda shape: population(SOME[shape], shape))


@pytest.fixture(scope="module")
def pairs(subjects):
    """(moving, fixed, true displacement) of neighbours in the chain."""
    return functools.cache(
        lambda shape: [(m, f, true_displacement(m, f)) for m, f in chain(subjects(shape))]
    )


def mean_dice(a, b):
    return float(metrics.dice(a[None], b[None]).nanmean())


@pytest.mark.slow
def test_subjects_are_what_the_contract_says(subjects, shape):
    d = len(shape)
    for i, subject in enumerate(subjects(shape)):
        assert subject.name == f"population-0-{i:04d}"
        assert subject.image.shape == subject.labels.shape == (1, *shape)
        assert subject.image.dtype == torch.float32 and subject.labels.dtype == torch.int16
        assert subject.image.min() >= 0 and 0.7 < subject.image.max() <= 1
        assert subject.svf.shape == (1, d, *shape)
        assert set(subject.labels.unique().tolist()) <= {0, *LABELS}
        assert len(subject.labels.unique()) - 1 >= (12 if d == 2 else 24)
        # nothing but noise-free air outside the head
        air = ~ndimage.binary_dilation(subject.labels[0].numpy() > 0, iterations=3)
        assert subject.image[0][torch.from_numpy(air)].max() < 0.3


@pytest.mark.slow
def test_the_affine_places_left_front_and_top_where_they_belong(subjects, shape):
    subject = subjects(shape)[0]
    assert "".join(nib.aff2axcodes(subject.affine)) == "RAS"
    spacing = np.abs(np.diag(subject.affine))[: len(shape)]
    np.testing.assert_allclose(subject.spacing, spacing)
    np.testing.assert_allclose(
        spacing * shape, (spacing * shape)[0] * np.array([1, 1.2, 1])[: len(shape)]
    )

    def centre(*names):
        ids = torch.tensor([i for i, name in LABELS.items() if name in names])
        voxels = torch.isin(subject.labels[0].long(), ids).nonzero().double().mean(0)
        return nib.affines.apply_affine(subject.affine, np.pad(voxels.numpy(), (0, 3 - len(shape))))

    assert centre("left white matter")[0] < -10 and centre("right white matter")[0] > 10
    front, back = centre("left frontal pole"), centre("left medial occipital")
    assert front[1] > back[1] + 80
    if len(shape) == 3:
        assert centre("left cerebellum", "right cerebellum")[2] < centre("ventricles")[2] - 20


@pytest.mark.slow
def test_unregistered_subjects_overlap_like_real_ones_and_the_truth_aligns_them(pairs, shape):
    before, after = [], []
    for moving, fixed, disp in pairs(shape):
        before.append(mean_dice(moving.labels, fixed.labels))
        assert disp.shape == (1, len(shape), *shape)
        warped = spatial.warp(moving.labels[None], disp, mode="nearest")[0]
        after.append(mean_dice(warped, fixed.labels))
        # the images agree too, as far as contrast, shading and noise let them
        moved = spatial.warp(moving.image[None], disp)
        score = losses.ncc(moved, fixed.image[None])
        assert score < 0.05 and score < 0.5 * losses.ncc(moving.image[None], fixed.image[None])
    assert 0.50 < np.mean(before) < 0.65
    assert np.mean(after) >= 0.90


@pytest.mark.slow
def test_true_maps_do_not_fold(pairs, shape):
    for _, fixed, disp in pairs(shape):
        assert metrics.folding_count(spatial.integrate(fixed.svf)).item() == 0
        assert metrics.folding_count(disp).item() == 0


@pytest.mark.slow
def test_truth_there_and_back_is_no_displacement(pairs, shape):
    a, b, disp = pairs(shape)[0]
    inner = (..., *[slice(n // 10, -n // 10) for n in shape])
    rest = spatial.compose(disp, true_displacement(b, a))[inner]
    assert rest.norm(dim=1).mean() < 0.05 and rest.norm(dim=1).max() < 0.5
    assert true_displacement(a, a)[inner].norm(dim=1).max() < 0.3


def test_the_truth_goes_from_fixed_to_moving(subjects):
    """The wrong way round it is no use."""
    for moving, fixed in chain(subjects((80, 96))):
        wrong = spatial.warp(moving.labels[None], true_displacement(fixed, moving), mode="nearest")
        assert mean_dice(wrong[0], fixed.labels) < mean_dice(moving.labels, fixed.labels)


# --- determinism and the cache -----------------------------------------------------------------


def same(a, b):
    return (
        a.name == b.name
        and torch.equal(a.image, b.image)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.svf, b.svf)
        and np.array_equal(a.affine, b.affine)
    )


def test_a_subject_depends_on_seed_and_index_alone(subjects, monkeypatch, tmp_path):
    shape = (80, 96)
    cached = population(3, shape)
    assert all(map(same, subjects(shape)[:3], cached))  # from the cache, the same bits
    monkeypatch.setenv("REGKIT_DATA", str(tmp_path))
    torch.manual_seed(123)
    (alone,) = population([2], shape)  # made again, alone, in another cache
    assert same(alone, cached[2])
    (other,) = population([2], shape, seed=1)
    assert not torch.equal(other.svf, alone.svf) and not torch.equal(other.image, alone.image)
    assert other.name == "population-1-0002"


@pytest.mark.parametrize("contrast", ["t2", "random"])
def test_anatomy_does_not_depend_on_contrast_or_size(subjects, contrast):
    subject = subjects((80, 96))[1]
    (recoloured,) = population([1], (80, 96), contrast=contrast)
    assert torch.equal(recoloured.labels, subject.labels)
    assert torch.equal(recoloured.svf, subject.svf)
    assert not torch.equal(recoloured.image, subject.image)
    larger = subjects((160, 192))[1]
    small = torch.nn.functional.avg_pool2d(larger.image[None], 2)
    assert float(losses.ncc(small, subject.image[None])) < 0.02


def test_no_half_written_file_stays_in_the_cache(empty_cache, subjects):
    subjects((80, 96))
    suffixes = {path.suffix for path in empty_cache.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors"}


def test_without_amplitude_everybody_is_the_template():
    a, b = population(2, (80, 96), amplitude=0)
    assert torch.equal(a.labels, b.labels)
    assert a.svf.abs().max() == 0 == true_displacement(a, b).abs().max()


def test_more_amplitude_less_overlap(subjects):
    small = population(4, (80, 96), amplitude=0.5)
    for (a, b), (c, d) in zip(chain(small), chain(subjects((80, 96))[:4]), strict=True):
        assert mean_dice(a.labels, b.labels) > mean_dice(c.labels, d.labels)


@pytest.mark.slow
def test_labels_are_at_least_three_voxels_thick(shape):
    """On the template, almost every labelled voxel lies in a cross of three voxels of its label."""
    (subject,) = population(1, shape, amplitude=0)
    labels = subject.labels[0].numpy()
    cross = ndimage.generate_binary_structure(len(shape), 1)
    for label in np.unique(labels[labels > 0]):
        mask = labels == label
        kept = ndimage.binary_opening(mask, cross)
        assert kept.sum() > 0.9 * mask.sum(), LABELS[int(label)]


# --- contrast ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contrast", "order"),
    [
        ("t1", ["ventricles", "cortex", "deep", "white"]),
        ("t2", ["white", "cortex", "ventricles"]),
        ("t2", ["deep", "cortex"]),
        ("pd", ["white", "ventricles", "deep", "cortex"]),
        ("flair", ["ventricles", "white", "deep", "cortex"]),
    ],
)
def test_each_contrast_has_its_order_of_tissues(contrast, order):
    for subject in population(3, (160, 192), contrast=contrast):
        labels = subject.labels[0].numpy()
        ids = {
            "white": (1, 2),
            "deep": (3, 4),
            "ventricles": (5,),
            "cortex": tuple(range(10, 38)),
        }
        means = []
        for tissue in order:
            mask = np.isin(labels, ids[tissue])
            core = ndimage.binary_erosion(mask, iterations=2 if tissue != "cortex" else 1)
            means.append(float(np.median(subject.image[0].numpy()[core])))
        assert means == sorted(means), dict(zip(order, means, strict=True))


def test_random_contrast_differs_from_subject_to_subject():
    images = population(4, (80, 96), contrast="random")
    whites = [float(s.image[(s.labels == 1)].median()) for s in images]
    assert np.ptp(whites) > 0.1


# --- pairs -------------------------------------------------------------------------------------


def test_pairs_are_of_two_different_subjects_and_named_by_their_index(subjects):
    some = subjects((80, 96))
    pairs, again, other = (RandomPairs(some, 40, seed=s) for s in (0, 0, 1))
    assert len(pairs) == 40
    drawn = []
    for i in range(40):
        item = pairs[i]
        assert item["name"] == again[i]["name"]
        images = [k for k in item if k != "name"]
        assert all(torch.equal(item[k], again[i][k]) for k in images)
        found = [
            next(j for j, s in enumerate(some) if torch.equal(s.image, item[k]))
            for k in ("moving", "fixed")
        ]
        assert found[0] != found[1]
        assert item["name"] == " to ".join(some[k].name for k in found)
        assert torch.equal(item["moving_labels"], some[found[0]].labels)
        assert torch.equal(item["fixed_labels"], some[found[1]].labels)
        drawn.append(tuple(found))
    assert len(set(drawn)) > 15  # of 30 that there are
    assert any(not torch.equal(pairs[i]["moving"], other[i]["moving"]) for i in range(5))


def test_pairs_may_hold_their_answer():
    """The true displacement leads the moving labels to the fixed ones, but for interpolation."""
    some = population(3, (64, 80))
    pairs = RandomPairs(some, 4, with_truth=True)
    for index in range(4):
        item = pairs[index]
        moved = spatial.warp(item["moving_labels"][None], item["disp"][None], mode="nearest")
        overlap = float(metrics.dice(moved, item["fixed_labels"][None]).nanmean())
        before = float(
            metrics.dice(item["moving_labels"][None], item["fixed_labels"][None]).nanmean()
        )
        assert overlap > 0.85 > before
    assert "disp" not in RandomPairs(some, 4)[0]


def test_a_chain_uses_every_subject_twice():
    assert chain(["a", "b", "c"]) == [("a", "b"), ("b", "c"), ("c", "a")]


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: population(1, (80,)), ["shape", "(80,)", "two or three"]),
        (lambda: population(1, (8, 96)), ["shape", "(8, 96)", "at least 16"]),
        (lambda: population(1, (80, 96), contrast="T1"), ["contrast", "'T1'", "t1, t2"]),
        (lambda: population(1, (80, 96), amplitude=-1), ["amplitude", "-1", "0 or more"]),
        (lambda: population(-1, (80, 96)), ["n is -1", "0 or more"]),
        (lambda: RandomPairs(["one"], 10), ["subjects", "1", "at least 2"]),
    ],
)
def test_bad_input_is_one_sentence(call, parts):
    with pytest.raises(ValueError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truth_between_different_sizes_is_refused(subjects):
    with pytest.raises(ValueError, match=r"moving_subject.*\(1, 80, 96\).*\(1, 160, 192\)"):
        true_displacement(subjects((80, 96))[0], subjects((160, 192))[0])


def test_a_velocity_in_voxels_is_that_in_mm_over_the_voxel_size():
    """3 mm per unit time everywhere, on voxels of 4.4 x 2.2 mm (176 x 211.2 mm in all)."""
    lattice = [round(size / template.LATTICE) + 1 for size in template.FIELD_OF_VIEW[:2]]
    svf = template.resample_velocity(torch.full((2, *lattice), 3.0), (40, 96))
    expected = torch.tensor([3 / 4.4, 3 / 2.2]).reshape(1, 2, 1, 1).expand(1, 2, 40, 96)
    torch.testing.assert_close(svf, expected)
