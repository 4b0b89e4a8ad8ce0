"""Training: it learns, it resumes to the same weights, and it says what is wrong."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from regkit import losses, models, recipes, train
from regkit.data import RandomPairs, chain, population, true_displacement
from regkit.evaluate import evaluate, summary
from regkit.models import Registration
from regkit.spatial import integrate, warp

SMALL = {"subjects": 4, "validation": 2, "shape": (32, 48)}


def small(name="vxm_diff_2d", **changes):
    return recipes.get(name, "smoke", **{**SMALL, "steps": 4, **changes})


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(x.equal(y) for x, y in pairs)


def test_training_lowers_the_loss_and_raises_the_dice():
    recipe = small(shape=(48, 64), steps=120, batch=4, lr=3e-3, validate_every=120, subjects=8)
    trained = train.train(recipe, progress=False)
    losses_seen = [entry["loss"] for entry in trained.history]
    assert sum(losses_seen[-10:]) < 0.95 * sum(losses_seen[:10])
    assert trained.history[-1]["dice"] > trained.history[-1]["dice_before"] + 0.01
    assert not trained.model.training


def test_a_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = (
        train.train(small(seed=seed), progress=False).model for seed in (0, 0, 1)
    )
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_a_run_that_was_stopped_ends_in_the_same_weights(tmp_path, monkeypatch):
    recipe = small(steps=6, validate_every=2)
    whole = train.train(recipe, tmp_path / "whole", progress=False)
    real, calls = train.objective, []

    def stops_at_the_fifth_step(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train, "objective", stops_at_the_fifth_step)
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe, tmp_path / "stopped", progress=False)
    monkeypatch.setattr(train, "objective", real)
    resumed = train.train(recipe, tmp_path / "stopped", resume=True, progress=False)
    assert [entry["step"] for entry in resumed.history] == [1, 2, 3, 4, 5, 6]
    assert same_weights(whole.model, resumed.model)


def test_the_folder_of_a_run(tmp_path):
    recipe = small()
    trained = train.train(recipe, tmp_path, progress=False)
    last = models.load(tmp_path / "last.safetensors")
    assert same_weights(last, trained.model)
    assert models.load(tmp_path / "best.safetensors").name == "vxm_diff"
    assert last.info["recipe"] == json.loads((tmp_path / "recipe.json").read_text())
    assert last.info["recipe"]["seed"] == 0 and last.info["orientation"] == "RAS"
    assert last.info["spacing"] == pytest.approx([176 / 32, 211.2 / 48])
    assert len(json.loads((tmp_path / "history.json").read_text())) == recipe.steps
    with pytest.raises(ValueError, match="which holds a run: expected resume=True"):
        train.train(recipe, tmp_path, progress=False)
    with pytest.raises(ValueError, match="another recipe"):
        train.train(replace(recipe, seed=5), tmp_path, resume=True, progress=False)


def batch_of(subjects):
    moving, fixed = subjects
    return {
        "moving": moving.image[None],
        "fixed": fixed.image[None],
        "moving_labels": moving.labels[None],
        "fixed_labels": fixed.labels[None],
    }


def test_the_terms_of_the_objective_are_those_of_the_losses():
    batch = batch_of(population(2, (48, 64)))
    svf = 0.5 * torch.randn(1, 2, 48, 64)
    disp = integrate(svf)
    result = Registration(warp(batch["moving"], disp), disp, svf)
    weights = {"similarity": 1.0, "diffusion": 1.0, "bending": 1.0, "folding": 1.0}
    terms = train.objective(result, batch, small(weights=weights, window=5))
    assert terms["similarity"] == losses.lncc(result.moved, batch["fixed"], window=5)
    assert terms["diffusion"] == losses.diffusion(svf)
    assert terms["bending"] == losses.bending(svf)
    assert terms["folding"] == losses.folding(disp)
    both = train.objective(result, batch, small(bidirectional=True, similarity="mse"))
    back = warp(batch["fixed"], integrate(-svf))
    expected = losses.mse(result.moved, batch["fixed"]) + losses.mse(back, batch["moving"])
    assert torch.allclose(both["similarity"], expected / 2)


def test_the_label_loss_is_low_for_the_true_displacement():
    subjects = population(2, (80, 96))
    batch = batch_of(subjects)
    recipe = small(weights={"dice": 1.0})

    def term(disp):
        return train.objective(Registration(batch["moving"], disp), batch, recipe)["dice"]

    truth = true_displacement(*subjects)
    assert term(truth) < 0.12 < 0.3 < term(torch.zeros_like(truth))
    assert term(truth.requires_grad_()).requires_grad


def test_semi_supervised_and_bidirectional_training_run():
    recipe = small(weights={"similarity": 1.0, "diffusion": 0.1, "dice": 0.5}, bidirectional=True)
    history = train.train(recipe, progress=False).history
    assert all(0 < entry["dice"] < 1 for entry in history)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"similarity": "ssim"}, "similarity is 'ssim', expected one of lncc"),
        ({"weights": {"jacobian": 1.0}}, "weights names 'jacobian', expected similarity"),
        ({"schedule": "step"}, "schedule is 'step', expected 'constant' or 'cosine'"),
        ({"model": "vxm_dif"}, "did you mean 'vxm_diff'"),
        ({"model": "vxm", "bidirectional": True}, "expected a model with a velocity field"),
        ({"lr": 1e30}, "is (nan|inf) at step 2, expected a finite loss"),
        ({"subjects": 1}, "subjects holds 1, expected at least 2"),
        ({"steps": 0}, "steps is 0, expected 1 or more"),
        ({"batch": 0}, "batch is 0, expected 1 or more"),
        ({"validate_every": 0}, "validate_every is 0, expected 1 or more"),
        ({"validation": 0}, "validation is 0, expected 1 or more"),
        ({"weights": {}}, "weights is empty, expected at least one term"),
    ],
)
def test_settings_that_do_not_fit(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        train.train(small(**changes), progress=False)


def test_settings_that_do_not_fit_leave_no_folder(tmp_path):
    for wrong in ({"steps": 0}, {"model": "vxm_dif"}, {"schedule": "step"}):
        with pytest.raises(ValueError):
            train.train(small(**wrong), tmp_path / "run", progress=False)
    with pytest.raises(ValueError):
        train.train(small(), tmp_path / "run", progress=False, device="abacus")
    assert not list(tmp_path.iterdir())


def test_two_processes_learn_what_one_does(tmp_path):
    """They share each batch. With mse the mean over the halves is the mean over the batch."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from regkit import recipes, train\n"
        f"changes = {SMALL} | {{'similarity': 'mse', 'batch': 2, 'steps': 6}}\n"
        "recipe = recipes.get('vxm_2d', 'smoke', **changes)\n"
        "train.train(recipe, sys.argv[1], progress=False, device='cpu')\n"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, how in (("one", []), ("two", launch)):
        command = [sys.executable, *how, str(script), str(tmp_path / name)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
    one, two = (models.load(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    for (key, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), key


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_cuda_when_asked_for():
    with pytest.raises(ValueError, match="device is 'cuda'"):
        train.train(small(), progress=False, device="cuda")


def test_training_starts_from_given_weights(tmp_path):
    first = train.train(small(), tmp_path, progress=False)
    weights = tmp_path / "last.safetensors"
    still = train.train(small(lr=0.0, seed=3), progress=False, start=weights)
    assert same_weights(first.model, still.model)
    assert still.model.info["started_from"]["recipe"]["seed"] == 0
    with pytest.raises(ValueError, match="start holds weights of vxm_diff in 2D, expected .*vxm1"):
        train.train(small("vxm1_2d"), progress=False, start=weights)
    other = small(options={"last": (16, 16, 16)})
    with pytest.raises(ValueError, match="start holds weights of vxm_diff with options"):
        train.train(other, progress=False, start=weights)


def test_resume_needs_a_folder():
    with pytest.raises(ValueError, match="out is not given"):
        train.train(small(), resume=True, progress=False)


def test_recipes_and_budgets(monkeypatch):
    for name in recipes.names():
        for budget in recipes.BUDGETS:
            recipe = recipes.get(name, budget)
            assert recipe.name == name and len(recipe.shape) == recipe.ndim
            assert recipe.steps % recipe.validate_every == 0
            models.create(recipe.model, recipe.ndim, **recipe.options)
    monkeypatch.setenv("REGKIT_BUDGET", "smoke")
    assert recipes.get("vxm_2d").steps < 10
    monkeypatch.setenv("REGKIT_BUDGET", "huge")
    with pytest.raises(ValueError, match="REGKIT_BUDGET is 'huge', expected one of smoke"):
        recipes.get("vxm_2d")
    with pytest.raises(ValueError, match="recipe is 'vxm_4d', expected one of"):
        recipes.get("vxm_4d", "cpu")


def test_random_pairs_depend_on_seed_and_index_alone():
    subjects = population(5, (32, 48))
    pairs, again = RandomPairs(subjects, 100, seed=3), RandomPairs(subjects, 10, seed=3)
    assert all(pairs[i]["moving"].equal(again[i]["moving"]) for i in range(10))
    assert not all(p["moving"].equal(p["fixed"]) for p in (pairs[i] for i in range(100)))
    seen = {tuple(pairs[i]["moving"][0, 16, ::8].tolist()) for i in range(100)}
    assert len(seen) == 5
    brighter = RandomPairs(subjects, 10, seed=3, gamma=0.5)[0]["moving"]
    power = brighter.log() / pairs[0]["moving"].log()
    power = power[(pairs[0]["moving"] > 0.1) & (pairs[0]["moving"] < 0.9)]
    assert power.std() < 1e-3 and 0.6 < float(power.mean()) < 1.65


def test_evaluation_of_the_truth_and_of_doing_nothing():
    subjects = population(3, (80, 96), seed=2)
    pairs = chain(subjects)
    assert [(a.name, b.name) for a, b in pairs][-1] == (subjects[2].name, subjects[0].name)
    truths = iter([true_displacement(a, b) for a, b in pairs])

    def know_it_all(moving, fixed):
        disp = next(truths)
        return Registration(warp(moving, disp), disp)

    best = summary(evaluate(know_it_all, pairs, distances=True, ceiling=True))
    assert best["gap_closed"] == pytest.approx(100)
    assert best["endpoint_error"] == pytest.approx(0)
    assert best["hd95"] < 2 * 2.2 + 0.1 and best["hd95_infinite"] == 0

    def nothing(moving, fixed):
        return Registration(moving, torch.zeros(1, 2, 80, 96))

    none = summary(evaluate(nothing, pairs, ceiling=True))
    assert none["gap_closed"] == 0 and none["dice"] == none["dice_before"] < best["dice"]
    assert none["folding_percent"] == none["sd_log_jacobian"] == 0
    with pytest.raises(ValueError, match="rows is empty"):
        summary([])
