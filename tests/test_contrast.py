"""Images painted from label maps: what a pair holds, and that its labels and shapes fit."""

import numpy as np
import pytest
import torch

from regkit import metrics
from regkit.data import LABELS
from regkit.data import anatomies as module
from regkit.data.anatomies import FREESURFER, LEARNED, MATERIALS, anatomies, fine
from regkit.data.contrast import PaintedPairs, _painted
from regkit.training import loop, objective, recipes

SHAPE = (32, 40, 32)
IMAGES = ("moving", "fixed")


@pytest.fixture(scope="module")
def template():
    return anatomies(3, SHAPE, brains=False)


def test_an_anatomy_depends_on_seed_and_index_alone(template):
    again = anatomies(2, SHAPE, brains=False)
    for one, other in zip(template, again):
        assert one.name == other.name
        assert one.labels.equal(other.labels)
    assert not template[0].labels.equal(template[1].labels)
    assert not anatomies(1, SHAPE, seed=1, brains=False)[0].labels.equal(template[0].labels)
    made = module._make("template", 0, SHAPE, 0, 0)  # the cache keeps what is made
    assert made.labels.equal(template[0].labels)


def test_anatomies_hold_known_labels_on_fine_voxels(template):
    assert fine((80, 96, 80)) == (160, 192, 160) and fine((160, 192, 160)) == (160, 192, 160)
    listed = [label for labels, _ in MATERIALS["template"] for label in labels]
    assert sorted(listed) == sorted(LABELS)  # every label is painted, once
    assert sorted(label for labels, _ in MATERIALS["brains"] for label in labels) == [*FREESURFER]
    for anatomy in template:
        assert anatomy.labels.shape == (1, *fine(SHAPE)) and anatomy.labels.dtype == torch.uint8
        assert set(anatomy.labels.unique().tolist()) <= {0, *LABELS}


def test_a_coarse_voxel_is_the_mean_of_what_it_covers():
    labels = torch.tensor([[[2, 2, 3, 0], [2, 3, 0, 0]]], dtype=torch.uint8)
    own, common = torch.zeros(256), torch.zeros(256)
    own[2], own[3], common[3] = 0.8, 0.4, 1.0
    found = _painted(labels, own, common, 2)
    assert torch.allclose(found, torch.tensor([[[[0.7, 0.1]], [[0.25, 0.25]]]]))


def test_items_depend_on_seed_and_index_alone(template):
    pairs, again = (
        PaintedPairs(template, SHAPE, 20, seed=3),
        PaintedPairs(template, SHAPE, 5, seed=3),
    )
    for i in range(3):
        one, other = pairs[i], again[i]
        assert one.keys() == other.keys() and one["name"] == other["name"]
        assert all(one[k].equal(other[k]) for k in one if k != "name")
    assert not pairs[0]["fixed"].equal(PaintedPairs(template, SHAPE, 5, seed=4)[0]["fixed"])


def test_an_item_is_what_training_takes(template):
    pairs = PaintedPairs(template, SHAPE, 6, labels=4)
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
    pairs = PaintedPairs(template, SHAPE, 24, labels=None)
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
    item = PaintedPairs(template, SHAPE, 4)[1]
    inside = item["fixed_clean"][item["fixed_clean"] > 0]
    assert 0.3 < float(inside.std()) < 1.2


def test_slabs_are_thin_and_have_fine_voxels():
    shape = (32, 40, 64)  # a slab and the room to turn it in fit into twice the last axis
    pairs = PaintedPairs(anatomies(2, shape, brains=False), shape, 40, slabs=1.0)
    for i in range(4):
        item = pairs[i]
        sizes = {item[k].shape for k in item if k != "name"}
        assert len(sizes) == 1
        *rest, thick = sizes.pop()
        assert rest == [1, *fine(shape)[:2]] and 16 <= thick <= 24
        assert (item["fixed"] > 0).flatten(0, 2).any(0).all()  # through the brain


def test_pairs_for_validation_hold_the_same_images(template):
    pairs = PaintedPairs(template, SHAPE, 3, labels=None)
    moving, fixed = pairs.subjects(2)
    assert moving.image.equal(pairs[2]["moving"]) and fixed.labels.equal(pairs[2]["fixed_labels"])
    assert fixed.spacing == pytest.approx([5.5, 5.28, 5.5])


def test_bad_input(template):
    with pytest.raises(ValueError, match="shape is .*8.*, expected two or three sizes"):
        anatomies(2, (8, 8))
    with pytest.raises(ValueError, match="anatomies holds 1 of the family 'template', expected at"):
        PaintedPairs(template[:1], SHAPE, 3)
    with pytest.raises(ValueError, match="anatomies is empty"):
        PaintedPairs([], SHAPE, 3)


def test_recipes_train_and_say_that_contrast_is_free():
    recipe = recipes.get("any_contrast_2d", "smoke")
    trained = loop.train(recipe, progress=False)
    assert trained.model.info["contrast"] == "any"
    assert {"similarity", "dice_loss", "diffusion", "dice"} <= trained.history[-1].keys()
    assert all(np.isfinite(list(entry.values())).all() for entry in trained.history)


def test_a_similarity_looks_at_the_clean_pictures(template):
    from torch.utils.data import default_collate

    from regkit.models import Registration

    recipe = recipes.get("any_contrast_3d", "smoke", weights={"similarity": 1.0})
    batch = default_collate([PaintedPairs(template, SHAPE, 2)[0]])
    still = Registration(batch["moving"], torch.zeros(1, 3, *SHAPE))
    expected = (batch["moving_clean"] - batch["fixed_clean"]).square().mean()
    found = objective.objective(still, batch, recipe)["similarity"]
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.real
def test_real_label_maps_lie_over_the_template(sample):
    sample("brain_labelmaps")
    made = anatomies(6, SHAPE)
    assert [a.family for a in made] == ["template", "brains", "brains"] * 2
    template, *brains = made[0], made[1], made[2], made[4], made[5]
    for brain in brains:
        assert set(brain.labels.unique().tolist()) <= {0, *FREESURFER}
        overlap = metrics.dice((brain.labels > 0).int()[None], (template.labels > 0).int()[None])
        assert float(overlap[0, 0]) > 0.8


@pytest.mark.slow
@pytest.mark.real
def test_real_label_maps_lie_over_each_other(sample):
    sample("brain_labelmaps")
    maps = [torch.from_numpy(labels)[None, None] for labels in module._aligned_brains()]
    pairs = [(a, b) for i, a in enumerate(maps) for b in maps[:i]]
    scores = [metrics.dice(a, b, LEARNED["brains"]).mean() for a, b in pairs]
    assert float(torch.stack(scores).mean()) > 0.6  # 0.367 as they come, says their source
