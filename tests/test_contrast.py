"""Images painted from label maps: what a pair holds, and that its labels and shapes fit."""

import numpy as np
import pytest
import torch

from regkit import metrics, recipes, train
from regkit.data import LABELS
from regkit.data import anatomies as module
from regkit.data.anatomies import CORTEX, CSF, FREESURFER, TISSUES, TOO_SMALL, WHITE, anatomies
from regkit.data.contrast import PaintedPairs

SHAPE = (32, 40, 32)
IMAGES = ("moving", "fixed")


@pytest.fixture(scope="module")
def template():
    return anatomies(3, SHAPE, brains=False)


def test_an_anatomy_depends_on_seed_and_index_alone(template):
    again = anatomies(2, SHAPE, brains=False)
    for one, other in zip(template, again):
        assert one.name == other.name and one.maps.equal(other.maps)
        assert one.labels.equal(other.labels)
    assert not template[0].labels.equal(template[1].labels)
    assert not anatomies(1, SHAPE, seed=1, brains=False)[0].labels.equal(template[0].labels)
    made = module._make("template", 0, SHAPE, 0, 0)  # the cache keeps what is made
    assert made.maps.equal(template[0].maps) and made.labels.equal(template[0].labels)


def test_the_shares_of_a_voxel_add_up_and_follow_the_labels(template):
    for anatomy in template:
        tissue = anatomy.maps[:4].float() / module.WHOLE
        total = tissue.sum(0)
        assert tissue.min() >= 0 and total.max() < 1.03  # each is rounded
        white = [label for label, name in LABELS.items() if name.endswith("white matter")]
        cortex = [label for label in LABELS if label >= 10]
        for labels, kind in ((white, WHITE), (cortex, CORTEX), ([5, 6], CSF)):
            inside = torch.isin(anatomy.labels[0], torch.tensor(labels, dtype=torch.int16))
            assert tissue[kind][inside].mean() > 2 * tissue[kind][~inside].mean()
            assert tissue[kind][inside].mean() > 0.3
        assert set(anatomy.labels.unique().tolist()) <= {0, *LABELS}


def test_items_depend_on_seed_and_index_alone(template):
    pairs, again = PaintedPairs(template, 20, seed=3), PaintedPairs(template, 5, seed=3)
    for i in range(3):
        one, other = pairs[i], again[i]
        assert one.keys() == other.keys() and one["name"] == other["name"]
        assert all(one[k].equal(other[k]) for k in one if k != "name")
    assert not pairs[0]["fixed"].equal(PaintedPairs(template, 5, seed=4)[0]["fixed"])


def test_an_item_is_what_training_takes(template):
    pairs = PaintedPairs(template, 6, labels=4)
    for item in (pairs[i] for i in range(6)):
        for side in IMAGES:
            image, labels, clean = item[side], item[f"{side}_labels"], item[f"{side}_clean"]
            assert image.shape == labels.shape == clean.shape == (1, *SHAPE)
            assert image.dtype == clean.dtype == torch.float32 and labels.dtype == torch.int16
            assert image.min() == 0 and 0.9 < float(image.max()) <= 1
            assert len(labels.unique()) == 1 + 4  # background, and the labels kept
            # labels lie where the image is, and around the head there is nothing, not even noise
            assert (image[labels > 0] > 0).float().mean() > 0.95
            assert (image == 0).float().mean() > 0.2
        kept = [set(item[f"{side}_labels"].unique().tolist()) for side in IMAGES]
        assert kept[0] == kept[1]


def test_contrasts_are_random_but_clean_pictures_share_one(template):
    pairs = PaintedPairs(template, 24, labels=None)
    alike = correlated = 0
    for item in (pairs[i] for i in range(24)):
        means = {}
        for key in ("moving", "fixed", "moving_clean", "fixed_clean"):
            labels = item[key.removesuffix("_clean") + "_labels"]
            wanted = [[1, 2], [3, 4], [5], list(range(10, 38))]  # white, deep, CSF, cortex
            groups = [torch.isin(labels, torch.tensor(g, dtype=torch.int16)) for g in wanted]
            means[key] = torch.stack([item[key][g].mean() for g in groups])
        clean, other = means["moving_clean"], means["fixed_clean"]
        assert torch.allclose(clean, other, atol=0.35 * float(other.max() - other.min()) + 0.1)
        together = torch.corrcoef(torch.stack([means["moving"], means["fixed"]]))[0, 1]
        correlated += bool(together > 0.9)
        alike += bool(together < 0.3)
    assert correlated >= 6 and alike >= 3  # about half are of one contrast, the others are not


def test_fixed_clean_has_unit_spread(template):
    item = PaintedPairs(template, 4)[1]
    inside = item["fixed_clean"][item["fixed_clean"] > 0]
    assert 0.3 < float(inside.std()) < 1.2


def test_slabs_are_thin_and_cut_alike(template):
    pairs = PaintedPairs(template, 40, slabs=1.0)
    spacing = float(template[0].affine[2, 2])
    for i in range(5):
        item = pairs[i]
        thick = {item[k].shape for k in item if k != "name"}
        assert len(thick) == 1 and thick.pop()[:3] == (1, *SHAPE[:2])
        assert 14 <= spacing * (item["fixed"].shape[-1] + 0.5)
        assert spacing * (item["fixed"].shape[-1] - 0.5) <= 32
        assert (item["fixed"] > 0).flatten(0, 2).any(0).all()  # through the brain


def test_pairs_for_validation_hold_the_same_images(template):
    pairs = PaintedPairs(template, 3, labels=None)
    moving, fixed = pairs.subjects(2)
    assert moving.image.equal(pairs[2]["moving"]) and fixed.labels.equal(pairs[2]["fixed_labels"])
    assert fixed.spacing == pytest.approx([5.5, 5.28, 5.5])


def test_bad_input(template):
    with pytest.raises(ValueError, match="shape is .*8.*, expected two or three sizes"):
        anatomies(2, (8, 8))
    with pytest.raises(ValueError, match="anatomies holds 1 of the family 'template', expected at"):
        PaintedPairs(template[:1], 3)
    with pytest.raises(ValueError, match="anatomies is empty"):
        PaintedPairs([], 3)


def test_recipes_train_and_say_that_contrast_is_free():
    recipe = recipes.get("any_contrast_2d", "smoke")
    trained = train.train(recipe, progress=False)
    assert trained.model.info["contrast"] == "any"
    assert {"similarity", "dice_loss", "diffusion", "dice"} <= trained.history[-1].keys()
    assert all(np.isfinite(list(entry.values())).all() for entry in trained.history)


def test_a_similarity_looks_at_the_clean_pictures(template):
    from torch.utils.data import default_collate

    from regkit.models import Registration

    recipe = recipes.get("any_contrast_3d", "smoke", weights={"similarity": 1.0})
    batch = default_collate([PaintedPairs(template, 2)[0]])
    still = Registration(batch["moving"], torch.zeros(1, 3, *SHAPE))
    expected = (batch["moving_clean"] - batch["fixed_clean"]).square().mean()
    found = train.objective(still, batch, recipe)["similarity"]
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.real
def test_real_label_maps_lie_over_the_template(sample):
    sample("brain_labelmaps")
    made = anatomies(6, SHAPE)
    assert [a.family for a in made] == ["template", "brains", "brains"] * 2
    template, *brains = made[0], made[1], made[2], made[4], made[5]
    for brain in brains:
        assert len(brain.maps) == len(TISSUES["brains"]) == len(FREESURFER) + 1
        assert set(brain.labels.unique().tolist()) <= {0, *FREESURFER} - set(TOO_SMALL)
        assert brain.maps.float().sum(0).max() < 1.06 * module.WHOLE
        overlap = metrics.dice((brain.labels > 0).int()[None], (template.labels > 0).int()[None])
        assert float(overlap[0, 0]) > 0.75  # the template's labels hold the CSF around the brain
    # two of them share their structures after all that: each is somewhere near its fellow
    shared = metrics.dice(brains[0].labels[None], brains[1].labels[None], [2, 3, 8, 16])
    assert float(shared.mean()) > 0.35
