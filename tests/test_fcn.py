"""`fcn` against its definition, written a second time; its segmentation branch and its loss."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from regkit import losses, models, spatial
from regkit.models import fcn
from regkit.training import loop, recipes
from regkit.training.objective import objective

both = pytest.mark.parametrize("ndim", [2, 3])
branch = pytest.mark.parametrize("segment", [None, 3])
CONV = {2: F.conv2d, 3: F.conv3d}
POOL = {2: F.max_pool2d, 3: F.max_pool3d}
WIDTHS = (3, 4, 5, 6)  # all different, so that no two levels could be exchanged


def small(ndim, **options):
    """Four levels, so an answer at half size, of about a voxel."""
    torch.manual_seed(0)
    model = models.create("fcn", ndim, channels=WIDTHS, **options)
    for head in model.registration.heads:
        torch.nn.init.normal_(head.conv.weight)
    return model.eval()


def pair(ndim, shape=(16, 24, 8), batch=1):
    return torch.rand(2, batch, 1, *shape[:ndim], generator=torch.Generator().manual_seed(1))


def parameters(ndim, c_in, c_out, kernel, channels):
    """Two convolutions of kernel 3 a level, and a head on each of the last three."""
    total = 0
    for a, b in zip((c_in, *channels), channels):
        total += a * b * 3**ndim + b * b * 3**ndim + 2 * b
    return total + sum(c * c_out * kernel**ndim + c_out for c in channels[-3:])


@both
@pytest.mark.parametrize("channels", [(16, 32, 32, 64, 64), (2, 3, 4)])
def test_parameters_are_those_that_counting_says(ndim, channels):
    for segment in (None, 2, 4):
        known = 0 if segment is None else 2 * (segment - 1)
        total = parameters(ndim, 2 + known, ndim, 3, channels)
        total += parameters(ndim, 1, segment, 1, channels) if segment else 0
        model = models.create("fcn", ndim, channels=channels, segment=segment)
        assert models.parameter_count(model) == total
        if len(channels) == 5 and segment != 4:
            assert f"{total:,}" in fcn.__doc__


@both
@branch
def test_the_network_is_its_definition(ndim, segment):
    """Answers at 1/2, 1/4 and 1/8; the coarse ones are enlarged and added; then to full size."""
    model = small(ndim, segment=segment)
    moving, fixed = pair(ndim, batch=2)
    weights = model.state_dict()

    def answer(x, name, head, padding, rescale):
        shape, found = x.shape[2:], None
        answers = []
        for level in range(4):
            x = POOL[ndim](x, 2) if level else x
            for k in (0, 1):
                at = f"{name}.levels.{level}.{k}.conv"
                x = CONV[ndim](x, weights[f"{at}.weight"], weights[f"{at}.bias"], padding=1)
                x = torch.maximum(x, 0.2 * x)
            if level:
                at = f"{name}.heads.{level - 1}{head}"
                w, b = weights[f"{at}.weight"], weights[f"{at}.bias"]
                answers.append(CONV[ndim](x, w, b, padding=padding))
        for x in (*reversed(answers), torch.zeros(1, 1, *shape)):
            if found is not None:
                old = found.shape[2:]
                mode = "bilinear" if ndim == 2 else "trilinear"
                found = F.interpolate(found, x.shape[2:], mode=mode, align_corners=True)
                if rescale:
                    ratio = [(n - 1) / (m - 1) if m > 1 else 1 for n, m in zip(x.shape[2:], old)]
                    found = found * torch.tensor(ratio).reshape(1, -1, *[1] * ndim)
            found = x if found is None else found + x
        return found

    seen, logits = [moving, fixed], []
    if segment:
        for image in (moving, fixed):
            logits.append(answer(image, "segmentation", "", 0, rescale=False))
            seen.append(logits[-1].softmax(1)[:, 1:])
    expected = answer(torch.cat(seen, 1), "registration", ".conv", 1, rescale=True)
    with torch.no_grad():
        result = model(moving, fixed)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(result.disp, expected, atol=1e-4, rtol=1e-4)
    assert len(result.logits) == len(logits) == (2 if segment else 0)
    for found, known in zip(result.logits, logits, strict=True):
        assert found.shape == (2, 3, *moving.shape[2:])
        torch.testing.assert_close(found, known, atol=1e-5, rtol=1e-5)


@branch
@pytest.mark.parametrize("shape", [(63, 65), (1, 40), (17, 9, 23)])
def test_any_size_starts_at_the_identity_exactly(shape, segment):
    model = models.create("fcn", len(shape), segment=segment)
    moving, fixed = torch.rand(2, 1, 1, *shape)
    result = model(moving, fixed)
    assert result.disp.shape == (1, len(shape), *shape) and (result.disp == 0).all()
    torch.testing.assert_close(result.moved, moving, atol=1e-5, rtol=0)
    assert [x.shape for x in result.logits] == [(1, 3, *shape)] * (2 if segment else 0)


@both
@branch
def test_gradients_reach_every_parameter_of_both_branches(ndim, segment):
    """From the displacement alone: the branch that segments is part of the way to it."""
    model = small(ndim, segment=segment).train()
    model(*pair(ndim)).disp.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
    if segment:  # and from the segmentation, to its own branch and to no other
        model.zero_grad()
        sum(x.square().sum() for x in model(*pair(ndim)).logits).backward()
        for key, parameter in model.named_parameters():
            own = key.startswith("segmentation")
            assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == own, key


@both
def test_each_image_is_segmented_for_itself(ndim):
    model = small(ndim, segment=2)
    moving, fixed = pair(ndim)
    with torch.no_grad():
        there, back, other = model(moving, fixed), model(fixed, moving), model(moving, moving)
    for a, b in zip(there.logits, reversed(back.logits), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(other.logits[1], there.logits[0])
    assert not torch.equal(*there.logits)


@both
def test_save_memory_changes_no_number(ndim):
    found = []
    for save_memory in (False, True):
        model = small(ndim, segment=2, save_memory=save_memory).train()
        result = model(*pair(ndim))
        (result.disp.square().mean() + result.logits[0].square().mean()).backward()
        found.append([result.disp, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"segment": 1}, "segment is 1, expected 2 classes or more, or None"),
        ({"segment": 0}, "segment is 0, expected 2 classes or more, or None"),
        ({"channels": (8, 8)}, r"channels is \(8, 8\), expected 3 levels or more"),
    ],
)
def test_impossible_options(options, said):
    with pytest.raises(ValueError, match=said):
        models.create("fcn", 2, **options)


# --- the term "segmentation" --------------------------------------------------------------------


def answer(logits):
    moved = torch.zeros(len(logits), 1, *logits.shape[2:])
    disp = torch.zeros(len(logits), 2, *logits.shape[2:])
    return models.Registration(moved, disp, logits=(logits, logits))


def test_the_segmentation_term_is_soft_dice_of_probabilities():
    recipe = recipes.get("fcn_2d", "smoke", weights={"segmentation": 1.0})
    labels = torch.randint(0, 4, (2, 1, 6, 5), dtype=torch.int16)  # label 3 is not among 3 classes
    logits = torch.randn(2, 3, 6, 5)
    nothing = torch.zeros(2, 1, 6, 5)
    batch = {"moving": nothing, "fixed": nothing, "moving_labels": labels, "fixed_labels": labels}
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    dices = [
        2 * p[b, k][labels[b, 0] == k].sum() / (p[b, k].sum() + (labels[b, 0] == k).sum())
        for b in range(2)
        for k in (1, 2)
    ]
    found = objective(answer(logits), batch, recipe)["segmentation"]
    torch.testing.assert_close(found, 1 - sum(dices) / 4)
    sure = 100 * F.one_hot(torch.where(labels == 3, 0, labels)[:, 0].long(), 3).movedim(-1, 1)
    assert objective(answer(sure.float()), batch, recipe)["segmentation"] < 1e-6
    # the mean over both images
    other = dict(batch, fixed_labels=torch.full_like(labels, 3))
    half = objective(answer(sure.float()), other, recipe)["segmentation"]
    torch.testing.assert_close(half, torch.tensor(0.5), atol=1e-5, rtol=0)


def test_the_segmentation_term_says_what_it_needs():
    recipe = recipes.get("fcn_2d", "smoke", weights={"segmentation": 1.0})
    nothing = torch.zeros(1, 1, 4, 4)
    batch = {"moving": nothing, "fixed": nothing}
    with pytest.raises(ValueError, match="expected a model that segments, such as fcn with"):
        objective(models.Registration(nothing, torch.zeros(1, 2, 4, 4)), batch, recipe)
    with pytest.raises(ValueError, match="'segmentation', expected pairs with labels"):
        objective(answer(torch.zeros(1, 2, 4, 4)), batch, recipe)
    others = torch.full((1, 1, 4, 4), 17, dtype=torch.int16)
    batch |= {"moving_labels": others, "fixed_labels": others}
    sentence = "of the labels 1 to 1, expected pairs that have them: these have 17"
    with pytest.raises(ValueError, match=sentence):
        objective(answer(torch.zeros(1, 2, 4, 4)), batch, recipe)


def test_both_branches_start_with_signals_of_one_strength():
    """What arrives at the coarsest level varies about as much as the image, not a thousandth."""
    torch.manual_seed(0)
    model = models.create("fcn", 2, segment=2)
    for branch, channels in ((model.registration, 4), (model.segmentation, 1)):
        x = torch.randn(1, channels, 64, 64)
        for i, level in enumerate(branch.levels):
            x = level(branch.pool(x) if i else x)
        assert 0.3 < x.std() < 5
        assert all((head.conv.weight == 0).all() for head in model.registration.heads)


def test_the_branch_learns_what_is_bright():
    """Forty steps: a square on a dark ground, found at half size."""
    torch.manual_seed(0)
    model = models.create("fcn", 2, channels=(8, 8, 8, 8), segment=2).train()
    recipe = recipes.get("fcn_2d", "smoke", weights={"segmentation": 1.0})
    labels = torch.zeros(1, 1, 32, 32, dtype=torch.int16)
    labels[..., 8:20, 10:26] = 1
    image = 0.2 + 0.6 * labels.float()
    batch = {"moving": image, "fixed": image.flip(2), "moving_labels": labels}
    batch["fixed_labels"] = labels.flip(2)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        result = model(batch["moving"], batch["fixed"])
        loss = objective(result, batch, recipe)["segmentation"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.15
    known = (result.logits[1].argmax(1, keepdim=True) == batch["fixed_labels"]).float().mean()
    assert known > 0.93


@both
@pytest.mark.parametrize("budget", recipes.BUDGETS)
def test_the_recipe_has_both_branches(ndim, budget):
    recipe = recipes.get(f"fcn_{ndim}d", budget)
    model = models.create(recipe.model, ndim, **recipe.options)
    assert model.segmentation is not None and recipe.chest is not None
    assert set(recipe.weights) == {"similarity", "diffusion", "segmentation"}  # no truth, no pairs
    assert all(n % model.divisor == 0 for n in recipe.shape)


def test_without_the_branch_the_same_recipe_is_unsupervised():
    recipe = recipes.get(
        "fcn_2d",
        "smoke",
        options={"channels": (4, 4, 4, 4, 4)},
        weights={"similarity": 1.0, "diffusion": 0.1},
        shape=(32, 32),
        subjects=1,
        validation=1,
        steps=2,
        validate_every=2,
    )
    history = loop.train(recipe, progress=False, device="cpu").history
    assert set(history[0]) == {"step", "loss", "similarity", "diffusion"}
    wrong = dataclasses.replace(recipe, weights={**recipe.weights, "segmentation": 1.0})
    with pytest.raises(ValueError, match="expected a model that segments"):
        loop.train(wrong, progress=False, device="cpu")


def test_soft_dice_of_a_shifted_mask_is_what_the_label_term_says():
    """The two terms measure different things: "dice" the displacement, "segmentation" the image."""
    recipe = recipes.get("fcn_2d", "smoke", weights={"dice": 1.0, "segmentation": 1.0})
    labels = torch.zeros(1, 1, 16, 16, dtype=torch.int16)
    labels[..., 4:8, 4:12] = 1
    fixed = torch.roll(labels, 2, 2)
    disp = torch.zeros(1, 2, 16, 16)
    disp[:, 0] = -2
    logits = [40.0 * torch.cat([1 - x, x], 1).float() for x in (labels, fixed)]
    result = models.Registration(spatial.warp(labels.float(), disp), disp, logits=tuple(logits))
    batch = {"moving": labels.float(), "fixed": fixed.float()}
    batch |= {"moving_labels": labels, "fixed_labels": fixed}
    terms = objective(result, batch, recipe)
    assert terms["dice"] < 1e-6 and terms["segmentation"] < 1e-6
    still = dataclasses.replace(result, disp=torch.zeros_like(disp))
    assert objective(still, batch, recipe)["dice"] == losses.soft_dice(
        labels.float(), fixed.float()
    )
