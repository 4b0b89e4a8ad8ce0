"""Training: it learns, it resumes to the same weights, and it says what is wrong."""

import copy
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from regkit import device, losses, models
from regkit.data import RandomPairs, chain, population, true_displacement
from regkit.models import Registration
from regkit.spatial import integrate, warp
from regkit.training import data as training_data
from regkit.training import loop, objective, recipes, tasks
from regkit.training.evaluation import evaluate, motion_summary, summary

SMALL = {"subjects": 4, "validation": 2, "shape": (32, 48)}


def small(name="vxm_diff_2d", **changes):
    return recipes.get(name, "smoke", **{**SMALL, "steps": 4, **changes})


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(x.equal(y) for x, y in pairs)


@pytest.mark.slow
def test_training_lowers_the_loss_and_raises_the_dice():
    recipe = small(shape=(48, 64), steps=240, batch=4, lr=3e-3, validate_every=240, subjects=8)
    trained = loop.train(recipe, progress=False)
    losses_seen = [entry["loss"] for entry in trained.history]
    assert sum(losses_seen[-10:]) < 0.95 * sum(losses_seen[:10])
    assert trained.history[-1]["dice"] > trained.history[-1]["dice_before"] + 0.03
    assert not trained.model.training


def test_training_is_what_a_plain_loop_does():
    """The same weights and losses as from three steps written out in PyTorch alone."""
    weights = {"similarity": 1.0, "diffusion": 0.5}
    recipe = small(
        steps=3, validate_every=2, warmup=2, clip=0.01, weights=weights, similarity="mse"
    )
    trained = loop.train(recipe, progress=False, device="cpu")
    torch.manual_seed(recipe.seed)
    model = models.create("vxm_diff", 2).to(memory_format=torch.channels_last)
    pairs = RandomPairs(population(4, (32, 48), seed=0), 6, recipe.seed)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(3):
        batch = [pairs[2 * step], pairs[2 * step + 1]]
        moving, fixed = (torch.stack([pair[k] for pair in batch]) for k in ("moving", "fixed"))
        result = model(moving, fixed)
        loss = losses.mse(result.moved, fixed) + 0.5 * losses.diffusion(result.svf)
        assert trained.history[step]["loss"] == pytest.approx(loss.item(), rel=1e-6)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        rise, fall = min(1, (step + 1) / 2), (1 + math.cos(math.pi * step / 3)) / 2
        optimizer.param_groups[0]["lr"] = recipe.lr * rise * fall
        optimizer.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(trained.model.state_dict()[key], value, atol=1e-6, rtol=1e-4)
    assert not trained.model.training
    assert ["dice" in entry for entry in trained.history] == [False, True, True]


def test_a_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = (loop.train(small(seed=seed), progress=False).model for seed in (0, 0, 1))
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_a_run_that_was_stopped_ends_in_the_same_weights(tmp_path, monkeypatch):
    recipe = small(steps=6, validate_every=2)
    whole = loop.train(recipe, tmp_path / "whole", progress=False)
    real, calls = objective.objective, []

    def stops_at_the_fifth_step(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loop, "objective", stops_at_the_fifth_step)
    with pytest.raises(KeyboardInterrupt):
        loop.train(recipe, tmp_path / "stopped", progress=False)
    monkeypatch.setattr(loop, "objective", real)
    resumed = loop.train(recipe, tmp_path / "stopped", resume=True, progress=False)
    assert [entry["step"] for entry in resumed.history] == [1, 2, 3, 4, 5, 6]
    assert same_weights(whole.model, resumed.model)


# --- killed -----------------------------------------------------------------------------------


def run_until(recipe, folder, moment):
    """Train in this folder, and die of SIGKILL at a moment: moments are steps and file operations.

    Runs in a process of its own. Audit events tell of a file operation before it happens.
    """
    torch.set_num_threads(1)
    passed = 0

    def count():
        nonlocal passed
        passed += 1
        if passed == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def listen(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            path = "/" if isinstance(arguments[0], int) else os.fsdecode(arguments[0])
            # locks are another test's; the library that takes them makes sure of their folders
            if path.endswith(".lock") or (event == "os.mkdir" and os.path.isdir(path)):
                return
            inside = path.startswith(folder) and "/log" not in path
            if inside or not os.path.isabs(path):  # rmtree names files without their folder
                count()

    def counted(*arguments, real=objective.objective):
        count()
        return real(*arguments)

    loop.objective = counted
    sys.addaudithook(listen)
    loop.train(recipe, folder, resume=True, progress=False, device="cpu")


def start(*arguments):
    context = multiprocessing.get_context("forkserver")
    heavy = ["accelerate", "pytest", "regkit.training.tasks", "torch._dynamo"]
    heavy.append(EventAccumulator.__module__)
    context.set_forkserver_preload(heavy)
    process = context.Process(target=run_until, args=arguments)
    process.start()
    return process


def left_behind(folder):
    """Every file with what is in it. Of the log and the optimiser's state only that they exist."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.parent.name != "log")
    return {
        str(p.relative_to(folder)): p.suffix in (".json", ".safetensors") and p.read_bytes()
        for p in files
    }


def logged(folder):
    """tag -> [(step, value), ...] of the log of a run."""
    events = EventAccumulator(str(folder / "log")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.slow
def test_a_run_killed_at_every_moment_ends_in_the_same_weights(tmp_path):
    """One run after the other is killed at its moment 1, 2, 3, ..., until one has no more of them.

    What is killed goes on in its folder and is killed there again; what ends is compared.
    """
    recipe = small(steps=4, validate_every=2)
    loop.train(recipe, tmp_path / "whole", progress=False)
    whole = left_behind(tmp_path / "whole")
    assert {"last.safetensors", "best.safetensors", "history.json"} < set(whole)
    kills, ended, fresh = 0, 0, True
    while True:
        folder = tmp_path / f"run{ended}"
        process = start(recipe, str(folder), kills + 1)
        process.join()
        if process.exitcode == 0:
            assert left_behind(folder) == whole
            assert [step for step, _ in logged(folder)["train/loss"]] == [1, 2, 3, 4]
            seconds = [file.name.split(".")[3] for file in folder.glob("log/*tfevents*")]
            assert len(set(seconds)) == len(seconds)  # TensorBoard reads them in this order
            ended += 1
            if fresh:
                break
        else:
            assert process.exitcode == -signal.SIGKILL
            kills += 1
        fresh = process.exitcode == 0
    assert kills > 20 and ended > 3
    print(f"{kills} kills, {ended} runs ended in the same weights")


@pytest.mark.slow
def test_a_run_killed_at_random_times_ends_in_the_same_weights(tmp_path):
    """From outside, also in the middle of writing a file."""
    recipe = small(steps=24, validate_every=3)
    for name in ("warm", "whole"):  # the second without what the first of all processes waits for
        began = time.monotonic()
        start(recipe, str(tmp_path / name), 0).join()
        lasts = time.monotonic() - began
    whole = left_behind(tmp_path / "whole")
    generator = random.Random(0)
    kills, ended = 0, 0
    while kills < 12:
        folder = tmp_path / f"run{ended}"
        process = start(recipe, str(folder), 0)
        process.join(generator.uniform(0, lasts) if kills < 11 else 0.8 * lasts)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
        if process.exitcode == 0:
            assert left_behind(folder) == whole
            ended += 1
    loop.train(recipe, folder, resume=True, progress=False, device="cpu")
    assert left_behind(folder) == whole
    assert [step for step, _ in logged(folder)["train/loss"]] == list(range(1, 25))
    print(f"{kills} kills at random times, {ended + 1} runs ended in the same weights")


def test_resuming_without_its_state_is_refused(tmp_path):
    loop.train(small(), tmp_path, progress=False)
    again = loop.train(small(), tmp_path, resume=True, progress=False)  # nothing left to do
    assert same_weights(again.model, models.load(tmp_path / "last.safetensors"))
    assert len(again.history) == 4
    shutil.rmtree(tmp_path / "state")
    with pytest.raises(ValueError, match="expected the folder state/4 in it"):
        loop.train(small(), tmp_path, resume=True, progress=False)


# --- what a run leaves, and what it minimises -------------------------------------------------


def test_the_log_holds_the_history(tmp_path):
    trained = loop.train(small(warmup=2), tmp_path, progress=False)
    found = logged(tmp_path)
    assert set(found) == {
        *(f"train/{name}" for name in ("loss", "similarity", "diffusion", "lr")),
        *(f"validation/{name}" for name in ("dice", "dice_before", "folding_percent")),
    }
    for tag, values in found.items():
        name = tag.split("/")[1]
        if name == "lr":
            continue
        expected = [(e["step"], e[name]) for e in trained.history if name in e]
        assert [step for step, _ in values] == [step for step, _ in expected]
        assert [v for _, v in values] == pytest.approx([v for _, v in expected])
    rates = [3e-3 * min(1, (k + 1) / 2) * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert [rate for _, rate in found["train/lr"]] == pytest.approx(rates)


def test_the_folder_of_a_run(tmp_path):
    recipe = small()
    trained = loop.train(recipe, tmp_path, progress=False)
    last = models.load(tmp_path / "last.safetensors")
    assert same_weights(last, trained.model)
    assert models.load(tmp_path / "best.safetensors").name == "vxm_diff"
    assert last.info["recipe"] == json.loads((tmp_path / "recipe.json").read_text())
    assert last.info["recipe"]["seed"] == 0 and last.info["orientation"] == "RAS"
    assert last.info["spacing"] == pytest.approx([176 / 32, 211.2 / 48])
    assert len(json.loads((tmp_path / "history.json").read_text())) == recipe.steps
    with pytest.raises(ValueError, match="which holds a run: expected resume=True"):
        loop.train(recipe, tmp_path, progress=False)
    with pytest.raises(ValueError, match="another recipe"):
        loop.train(replace(recipe, seed=5), tmp_path, resume=True, progress=False)


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
    terms = objective.objective(result, batch, small(weights=weights, window=5))
    assert terms["similarity"] == losses.lncc(result.moved, batch["fixed"], window=5)
    assert terms["diffusion"] == losses.diffusion(svf)
    assert terms["bending"] == losses.bending(svf)
    assert terms["folding"] == losses.folding(disp)
    both = objective.objective(result, batch, small(bidirectional=True, similarity="mse"))
    back = warp(batch["fixed"], integrate(-svf))
    expected = losses.mse(result.moved, batch["fixed"]) + losses.mse(back, batch["moving"])
    assert torch.allclose(both["similarity"], expected / 2)


def test_the_label_loss_is_low_for_the_true_displacement():
    subjects = population(2, (80, 96))
    batch = batch_of(subjects)
    recipe = small(weights={"dice": 1.0})

    def term(disp):
        return objective.objective(Registration(batch["moving"], disp), batch, recipe)["dice"]

    truth = true_displacement(*subjects)
    assert term(truth) < 0.12 < 0.3 < term(torch.zeros_like(truth))
    assert term(truth.requires_grad_()).requires_grad


def test_semi_supervised_and_bidirectional_training_run():
    recipe = small(weights={"similarity": 1.0, "diffusion": 0.1, "dice": 0.5}, bidirectional=True)
    history = loop.train(recipe, progress=False).history
    assert all(0 < entry["dice_loss"] < 1 for entry in history)
    assert ["dice" in entry for entry in history] == [False, True, False, True]


def test_the_label_loss_of_a_batch_is_the_mean_over_its_pairs():
    subjects = population(3, (48, 64))
    one, other = batch_of(subjects[:2]), batch_of(subjects[1:])
    only_in_one = one["fixed_labels"] == 2
    other["fixed_labels"][only_in_one] = 0
    both = {key: torch.cat([one[key], other[key]]) for key in one}
    recipe = small(weights={"dice": 1.0})

    def term(batch):
        disp = torch.zeros(len(batch["moving"]), 2, 48, 64)
        return objective.objective(Registration(batch["moving"], disp), batch, recipe)["dice"]

    assert torch.allclose(term(both), (term(one) + term(other)) / 2)


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
        ({"precision": "half"}, "precision is 'half', expected 'auto', 'no', 'bf16' or 'fp16'"),
    ],
)
def test_settings_that_do_not_fit(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        loop.train(small(**changes), progress=False)


def test_settings_that_do_not_fit_leave_no_folder(tmp_path):
    for wrong in (
        {"steps": 0},
        {"model": "vxm_dif"},
        {"schedule": "step"},
        {"weights": {"simlarity": 1.0}},
        {"weights": {"similarity": 1.0, "segmentation": 1.0}},  # of a model that does not segment
        {"weights": {"determinant": 1.0}},
        {"model": "dual_prnet", "options": {"correlation": 9}},  # more than its coarsest level
    ):
        with pytest.raises(ValueError):
            loop.train(small(**wrong), tmp_path / "run", progress=False)
    with pytest.raises(ValueError):
        loop.train(small(), tmp_path / "run", progress=False, device="abacus")
    assert not list(tmp_path.iterdir())


# --- images and gradients that are not finite -------------------------------------------------


def test_an_image_that_is_not_finite_is_found_by_the_names_of_its_batch(tmp_path, monkeypatch):
    def one_is_broken(n, shape, seed, **others):
        subjects = population(n, shape, seed, **others)
        if seed == 0:
            subjects[2].image[0, 20, 20] = float("nan")
        return subjects

    monkeypatch.setattr(training_data, "population", one_is_broken)
    recipe = small(batch=1, steps=20)
    pairs = RandomPairs(population(4, (32, 48)), 20, recipe.seed)
    names = [pairs[i]["name"] for i in range(20)]
    first = next(i for i, name in enumerate(names) if "0-0002" in name)
    sentence = rf"term 'similarity' is nan at step {first + 1}, .*this batch \({names[first]}\)\.$"
    with pytest.raises(ValueError, match=sentence) as caught:
        loop.train(recipe, progress=False)
    assert "\n" not in str(caught.value)


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(monkeypatch):
    def steep(result, batch, recipe):
        return {"similarity": (0 * result.disp).square().sum().sqrt()}

    monkeypatch.setattr(loop, "objective", steep)
    with pytest.raises(ValueError, match=r"The gradient is nan at step 1, .*\(population-0-"):
        loop.train(small(), progress=False)


# --- precision --------------------------------------------------------------------------------

HALF = [
    "bf16",
    pytest.param(
        "fp16",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a GPU"),
    ),
]


@pytest.mark.parametrize("precision", HALF)
def test_half_precision_learns_and_leaves_a_model_of_full_precision(precision, tmp_path):
    """One after the other in one process, which Accelerate by itself refuses."""
    recipe = small()
    full = loop.train(recipe, progress=False)
    half = loop.train(replace(recipe, precision=precision), tmp_path, progress=False)
    again = loop.train(recipe, progress=False)
    assert same_weights(full.model, again.model)
    assert not same_weights(full.model, half.model)
    for a, b in zip(full.history, half.history, strict=True):
        assert math.isfinite(b["loss"])
        assert a["loss"] == pytest.approx(b["loss"], rel=0.1)
    moving, fixed = (s.image[None] for s in population(2, (48, 64), seed=2))
    loaded = models.load(tmp_path / "last.safetensors")
    assert half.model(moving, fixed).disp.equal(loaded(moving, fixed).disp)


def gpu(monkeypatch, capability):
    """PyTorch sees a GPU of this compute capability; nothing computes on it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)  # emulation counts


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 6), "bf16"), ((9, 0), "bf16")],
)
def test_the_half_precision_of_a_gpu_is_that_of_its_tensor_cores(capability, expected, monkeypatch):
    """7.5 is a T4, which has no convolution in bfloat16; 8.0 an A100, the first that has."""
    gpu(monkeypatch, capability)
    assert device.half_precision(torch.device("cuda")) == expected
    assert device.half_precision(torch.device("cuda", 0)) == expected


@pytest.mark.parametrize(("faster", "expected"), [(True, "bf16"), (False, "no")])
def test_half_precision_of_the_cpu_is_measured(faster, expected, monkeypatch):
    monkeypatch.setattr(device, "_bfloat16_is_faster", lambda: faster)
    assert device.half_precision(torch.device("cpu")) == expected


@pytest.mark.parametrize(("factor", "expected"), [(0.5, True), (0.9, False), (2.0, False)])
def test_bfloat16_is_taken_where_a_convolution_is_clearly_faster(factor, expected, monkeypatch):
    """A clock that advances by what a convolution of each kind is said to take."""
    now = [0.0]

    def convolution(image, weight, padding):
        now[0] += factor if image.dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(device.F, "conv2d", convolution)
    monkeypatch.setattr(device.time, "perf_counter", lambda: now[0])
    threads = torch.get_num_threads()
    assert device._bfloat16_is_faster.__wrapped__() is expected
    assert torch.get_num_threads() == threads


def test_a_run_keeps_the_precision_that_it_has_taken(tmp_path, monkeypatch):
    """It begins where bfloat16 is fast, and goes on where it is not."""
    recipe = small(precision="auto")
    monkeypatch.setattr(device, "_bfloat16_is_faster", lambda: True)
    whole = loop.train(recipe, tmp_path / "whole", progress=False, device="cpu")
    half = loop.train(small(precision="bf16"), progress=False, device="cpu")
    assert same_weights(whole.model, half.model)
    assert whole.recipe == replace(recipe, precision="bf16")
    saved = models.load(tmp_path / "whole" / "last.safetensors").info
    assert saved["recipe"]["precision"] == "bf16"

    loop.train(recipe, tmp_path / "run", progress=False, device="cpu", minutes=1e-9)
    monkeypatch.setattr(device, "_bfloat16_is_faster", lambda: False)
    resumed = loop.train(recipe, tmp_path / "run", True, progress=False, device="cpu")
    assert resumed.recipe.precision == "bf16"
    assert same_weights(resumed.model, whole.model)
    fresh = loop.train(recipe, tmp_path / "fresh", progress=False, device="cpu")
    assert fresh.recipe.precision == "no"
    with pytest.raises(ValueError, match="another recipe"):
        loop.train(small(precision="no"), tmp_path / "run", resume=True, progress=False)


def test_every_recipe_trains_in_half_precision_on_a_gpu(monkeypatch):
    for name in recipes.names():
        assert recipes.get(name, "gpu").precision == "auto"
        assert recipes.get(name, "paper").precision == "no"
        assert recipes.get(name, "smoke").precision == "no"
        assert recipes.get(name, "cpu").precision in ("no", "auto")


# --- time -------------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch):
    """The time on a clock, in a list of one number: it advances by a second with each update."""
    seconds, real = [0.0], objective.objective

    def a_second(*arguments):
        seconds[0] += 1.0
        return real(*arguments)

    monkeypatch.setattr(loop, "objective", a_second)
    monkeypatch.setattr(loop.time, "monotonic", lambda: seconds[0])
    return seconds


def test_the_seconds_of_a_run_are_those_of_all_sittings(tmp_path, now):
    """2 + 2 steps, and 100 s between them."""
    recipe = small(steps=4, validate_every=2)
    assert loop.train(recipe, progress=False).seconds == 4.0
    now[0] += 100.0
    first = loop.train(recipe, tmp_path, progress=False, minutes=3 / 60)
    assert [entry["step"] for entry in first.history] == [1, 2] and first.seconds == 2.0
    now[0] += 100.0
    whole = loop.train(recipe, tmp_path, resume=True, progress=False)
    assert [entry["step"] for entry in whole.history] == [1, 2, 3, 4] and whole.seconds == 4.0
    assert loop.train(recipe, tmp_path, resume=True, progress=False).seconds == 4.0
    (tmp_path / "state" / "4" / "seconds.txt").unlink()  # as of an earlier version
    assert math.isnan(loop.train(recipe, tmp_path, resume=True, progress=False).seconds)


@pytest.mark.parametrize(("minutes", "steps"), [(1.9 / 60, 1), (2 / 60, 2), (3.5 / 60, 3), (1, 4)])
def test_a_run_ends_before_its_minutes_have_passed(minutes, steps, now, tmp_path, monkeypatch):
    """Each update takes a second and is validated: a step that would end too late is not begun."""
    recipe = small(steps=4, validate_every=1)
    monkeypatch.setattr(loop, "_rehearse", lambda *arguments: None)
    trained = loop.train(recipe, tmp_path, progress=False, minutes=minutes)
    assert len(trained.history) == steps
    now[0] += 1000.0
    monkeypatch.setattr(loop, "objective", objective.objective)
    whole = loop.train(recipe, tmp_path, resume=True, progress=False)
    assert same_weights(whole.model, loop.train(recipe, progress=False).model)


@pytest.mark.parametrize("minutes", [0, -1, math.nan])
def test_minutes_without_a_folder_or_without_time_are_refused(minutes, tmp_path):
    with pytest.raises(ValueError, match="minutes is 1 and out is not given, expected more than 0"):
        loop.train(small(), progress=False, minutes=1)
    with pytest.raises(ValueError, match="expected more than 0 and a folder"):
        loop.train(small(), tmp_path / "run", progress=False, minutes=minutes)
    assert not (tmp_path / "run").exists()


def test_fp16_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="precision is 'fp16' on the CPU, expected 'auto', 'no'"):
        loop.train(small(precision="fp16"), progress=False, device="cpu")


@pytest.mark.slow
def test_fp16_with_scaling_gives_finite_losses_and_gradients():
    """What Accelerate does on a GPU, by hand: it has no fp16 for the CPU, PyTorch does."""
    recipe = small("vxm_diff_2d")
    batch = batch_of(population(2, (32, 48)))
    model = models.create("vxm_diff", ndim=2).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # too large: the first steps are lost
    losses_seen = []
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.float16):
            result = model(batch["moving"], batch["fixed"])
        terms = objective.objective(result, batch, recipe)
        assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
        loss = torch.stack([recipe.weights[k] * v for k, v in terms.items()]).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        losses_seen.append(loss.item())
    assert scaler.get_scale() < 2.0**24
    assert losses_seen[0] == losses_seen[1] and losses_seen[-1] < losses_seen[0]
    assert all(p.isfinite().all() for p in model.parameters())


# --- two processes ----------------------------------------------------------------------------

TOGETHER = """
import sys
from dataclasses import replace
from regkit.training import recipes
from regkit.training import loop, objective, tasks

changes = {changes} | {{"batch": 4, "steps": 6, "validate_every": 2}}
recipe = recipes.get("vxm_diff_2d", "smoke", **changes)
out = sys.argv[1]


def run(name, recipe, **options):
    loop.train(recipe, out + "/" + name, progress=False, device="cpu", **options)


for similarity in ("mse", "lncc"):
    weights = {{"similarity": 1.0, "diffusion": 0.1, "dice": 0.5}}
    run(similarity, replace(recipe, similarity=similarity, weights=weights))

real, calls = objective.objective, []


def stops_at_the_fifth_step(*arguments):
    calls.append(1)
    if len(calls) == 5:
        raise KeyboardInterrupt
    return real(*arguments)


loop.objective = stops_at_the_fifth_step
try:
    run("stopped", recipe)
except KeyboardInterrupt:
    loop.objective = real
run("stopped", recipe, resume=True)

try:
    run("broken", replace(recipe, lr=1e30))
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    """They share each batch: the mean over the halves is the mean over the batch."""
    script = tmp_path / "script.py"
    script.write_text(TOGETHER.format(changes=SMALL))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, how in (("one", []), ("two", launch)):
        command = [sys.executable, *how, str(script), str(tmp_path / name)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        # each process says it; two that speak at once may share a line
        sentences = run.stdout.split("expected a finite loss")[1:]
        assert len(sentences) == (2 if how else 1), run.stdout
        assert all(part.count("population-0-") == 8 for part in sentences)  # all four pairs
    for case in ("mse", "lncc", "stopped"):
        one, two = (tmp_path / n / case for n in ("one", "two"))
        for a, b in zip(*(json.loads((f / "history.json").read_text()) for f in (one, two))):
            assert a.keys() == b.keys()
            for term in ("loss", "similarity", "diffusion"):
                assert a[term] == pytest.approx(b[term], abs=1e-4), (case, a["step"])
        state, other = (models.load(f / "last.safetensors").state_dict() for f in (one, two))
        # Adam's first steps have one length, whatever the gradient: where it is nearly zero, its
        # last bits decide. So the mean over a layer is held to 1 % of a step of 3e-3.
        for key, value in state.items():
            assert (value - other[key]).abs().mean() < 3e-5, (case, key)


# --- without the extra "train" ----------------------------------------------------------------

WITHOUT = """
import sys

sys.modules |= {"accelerate": None, "tensorboard": None}
import regkit.cli
from regkit import models
from regkit.training import checkpoints, data, held_out, objective, tasks, train
from regkit.training.evaluation import evaluate, summary
from regkit.training.recipes import get

recipe = get("vxm_2d", "smoke", shape=(32, 48))
pairs, labels = data.evaluation_pairs(recipe, "test", 2)
assert 0 < summary(evaluate(models.create("vxm", 2), pairs, labels))["dice"] < 1
try:
    train(recipe, sys.argv[1])
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_all_but_training_works_without_accelerate(tmp_path):
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("accelerate is not installed, expected what training needs: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["accelerate", "tensorboard"])
def test_training_names_what_is_not_installed(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf'{name} is not installed, .* -e "\.\[train\]"\.$'):
        loop.train(small(), tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_cuda_when_asked_for():
    with pytest.raises(ValueError, match="device is 'cuda'"):
        loop.train(small(), progress=False, device="cuda")


def test_training_starts_from_given_weights(tmp_path):
    first = loop.train(small(), tmp_path, progress=False)
    weights = tmp_path / "last.safetensors"
    still = loop.train(small(lr=0.0, seed=3), progress=False, start=weights)
    assert same_weights(first.model, still.model)
    assert still.model.info["started_from"]["recipe"]["seed"] == 0
    with pytest.raises(ValueError, match="start holds weights of vxm_diff in 2D, expected .*vxm1"):
        loop.train(small("vxm1_2d"), progress=False, start=weights)
    other = small(options={"last": (16, 16, 16)})
    with pytest.raises(ValueError, match="start holds weights of vxm_diff with options"):
        loop.train(other, progress=False, start=weights)


def test_resume_needs_a_folder():
    with pytest.raises(ValueError, match="out is not given"):
        loop.train(small(), resume=True, progress=False)


@pytest.mark.slow
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


def test_what_is_asked_for_stands_above_the_budget():
    plain, smoke, longer = (
        recipes.get("vxm_2d", budget, **changes)
        for budget, changes in (("cpu", {}), ("smoke", {}), ("smoke", {"steps": 77}))
    )
    assert (smoke.steps, longer.steps) == (4, 77)
    assert longer == replace(smoke, steps=77) and smoke != plain


def test_a_recipe_shares_nothing_and_cannot_be_changed():
    """Two recipes that are made of the same words hold dictionaries of their own."""
    for name in recipes.names():
        for budget in recipes.BUDGETS:
            recipe = recipes.get(name, budget)
            assert hash(recipe) == hash(recipes.get(name, budget))
            assert recipes.Recipe(**recipes.plan(recipe)) == recipe  # also from JSON
    recipe = recipes.get("rigid_resnet34_2d", "cpu")
    for change in (
        lambda: recipe.motion.update(angle=90.0),
        lambda: recipe.weights.__setitem__("similarity", 2.0),
        lambda: recipe.weights.__ior__({"similarity": 2.0}),
        lambda: recipe.options.pop("width"),
        lambda: recipe.options.clear(),
    ):
        with pytest.raises(TypeError, match="settings cannot be changed in place"):
            change()
    assert recipe == recipes.get("rigid_resnet34_2d", "cpu")
    mine = {"similarity": 1.5}
    held = replace(recipe, weights=mine)
    mine["similarity"] = 5.0
    assert held.weights == {"similarity": 1.5}
    copied = copy.deepcopy(recipe)
    assert copied == recipe and hash(copied) == hash(recipe)
    assert len({recipe, held, replace(recipe)}) == 2


def test_sun_s_thirty_people_to_learn_from_are_thirty_everywhere():
    """Section 3.1: of the 40 of LPBA40 one is fixed, 30 are learned from and 9 tested on."""
    for name in ("unfolding_3d", "sun2025_3d", "sun2025_lpba40"):
        recipe = recipes.get(name, "paper")
        assert (recipe.subjects, recipe.validation) == (30, 9)
        assert recipe.steps == 500 * recipe.subjects


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


# --- protocols --------------------------------------------------------------------------------


def test_the_embedded_population_teaches_by_its_answers():
    """The term "endpoint": at the start the mean length of the true displacement."""
    recipe = recipes.get("supervised_2d", "smoke", weights={"endpoint": 1.0}, steps=1, batch=2)
    history = loop.train(recipe, progress=False, device="cpu").history
    subjects = population(recipe.subjects, recipe.shape, 0)
    named = {subject.name: subject for subject in subjects}
    pairs = RandomPairs(subjects, 2, recipe.seed)
    lengths = []
    for index in range(2):
        names = pairs[index]["name"].split(" to ")
        truth = true_displacement(*(named[name] for name in names))
        lengths.append(float(truth.norm(dim=1).mean()))
    assert history[0]["endpoint"] == pytest.approx(sum(lengths) / 2, rel=1e-3)


def test_pairs_with_one_fixed_image_show_everyone_once_an_epoch():
    *learn, fixed = population(6, (32, 48))
    pairs, again = (RandomPairs(learn, 15, seed=3, fixed=fixed) for _ in range(2))
    assert all(pairs[i]["fixed"].equal(fixed.image) for i in range(15))
    names = [pairs[i]["name"].removesuffix(f" to {fixed.name}") for i in range(15)]
    assert names == [again[i]["name"].removesuffix(f" to {fixed.name}") for i in range(15)]
    epochs = [names[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(epoch) == [subject.name for subject in learn] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert len(RandomPairs(learn[:1], 3, fixed=fixed)) == 3
    with pytest.raises(ValueError, match="subjects holds 0, expected at least 1"):
        RandomPairs([], 3, fixed=fixed)


def test_an_atlas_is_nobody_to_learn_from_or_to_test_on():
    recipe = recipes.get("sun2025_2d", "smoke", shape=(32, 48))
    for split, seed in (("validation", 1), ("test", 2)):
        pairs, labels = training_data.evaluation_pairs(recipe, split, 3)
        assert labels is None and {fixed.name for _, fixed in pairs} == {"population-3-0000"}
        assert [moving.name for moving, _ in pairs] == [
            f"population-{seed}-{i:04}" for i in range(3)
        ]
    assert training_data.subjects(recipe, "train", 1)[0].name == "population-0-0000"
    between, _ = training_data.evaluation_pairs(replace(recipe, atlas=False), "test", 3)
    assert [(a.name[-1], b.name[-1]) for a, b in between] == [("0", "1"), ("1", "2"), ("2", "0")]


@pytest.mark.slow
def test_a_model_learns_to_register_to_an_atlas():
    weights = {"similarity": 1.0, "diffusion": 0.03}
    changes = {"model": "vxm2", "options": {}, "weights": weights, "lr": 3e-3, "warmup": 0}
    size = {"shape": (48, 64), "subjects": 8, "batch": 4, "steps": 60, "validate_every": 60}
    recipe = small("sun2025_2d", **changes, **size)
    last = loop.train(recipe, progress=False, device="cpu").history[-1]
    assert last["dice"] > last["dice_before"] + 0.01


def test_the_protocols_are_those_of_the_paper():
    """Sun et al. (2025), sections 3.1 and 3.2: people, sizes, 500 epochs, Adam at 1e-4, batch 1."""
    lpba40, oasis = (recipes.get(f"sun2025_{name}", "paper") for name in ("lpba40", "oasis"))
    assert lpba40.atlas and not oasis.atlas
    assert (lpba40.subjects, oasis.subjects, oasis.validation) == (30, 254, 20)
    assert lpba40.shape == (160, 192, 160) and sorted(oasis.shape) == [160, 192, 224]
    embedded = recipes.get("sun2025_3d", "paper")
    for recipe in (lpba40, oasis, embedded, recipes.get("sun2025_pairs_3d", "paper")):
        assert recipe.steps == 500 * recipe.subjects and recipe.batch == 1
        assert (recipe.lr, recipe.schedule, recipe.warmup) == (1e-4, "constant", 0)
    assert embedded == replace(lpba40, name=embedded.name, data="population")


def test_a_run_whose_recipe_was_stored_before_there_were_protocols_goes_on(tmp_path):
    recipe = small()
    loop.train(recipe, tmp_path, progress=False)
    held = json.loads((tmp_path / "recipe.json").read_text())
    older = {key: value for key, value in held.items() if key not in ("data", "atlas")}
    (tmp_path / "recipe.json").write_text(json.dumps(older))
    assert len(loop.train(recipe, tmp_path, resume=True, progress=False).history) == 4
    (tmp_path / "recipe.json").write_text(json.dumps(older | {"atlas": True}))
    with pytest.raises(ValueError, match="another recipe"):
        loop.train(recipe, tmp_path, resume=True, progress=False)


def test_a_run_goes_on_when_the_text_of_its_source_was_worded_anew(tmp_path):
    recipe = small()
    loop.train(recipe, tmp_path, progress=False)
    reworded = replace(recipe, source="the same settings, in other words")
    assert len(loop.train(reworded, tmp_path, resume=True, progress=False).history) == 4


def test_a_set_that_is_not_there_leaves_no_folder(tmp_path):
    recipe = recipes.get("sun2025_lpba40", "smoke")
    for data, error in ((None, ValueError), (tmp_path, FileNotFoundError)):
        with pytest.raises(error, match="prepared set"):
            loop.train(recipe, tmp_path / "run", progress=False, device="cpu", data=data)
    assert not list(tmp_path.iterdir())


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


def test_evaluation_of_an_image_with_itself():
    (subject,) = population(1, (80, 96), seed=2)

    def nothing(moving, fixed):
        return Registration(moving, torch.zeros(1, 2, 80, 96))

    (row,) = evaluate(nothing, [(subject, subject)], distances=True, ceiling=True)
    assert row["dice"] == row["dice_before"] == row["dice_ceiling"] == 1
    assert row["lncc"] == pytest.approx(1) and row["hd95"] == row["hd95_infinite"] == 0
    unlike = replace(subject, image=torch.rand(1, 80, 96))
    assert evaluate(nothing, [(subject, unlike)])[0]["lncc"] < 0.5


def test_the_summary_of_known_rows():
    rows = [
        {"moving": "a", "dice_before": 0.3, "dice": 0.5, "dice_ceiling": 0.8, "hd95": 2.0},
        {"moving": "b", "dice_before": 0.5, "dice": 0.7, "dice_ceiling": 1.0},
    ]
    means = {"dice_before": 0.4, "dice": 0.6, "dice_ceiling": 0.9, "hd95": 2.0}
    assert summary(rows) == pytest.approx({**means, "dice_sd": 0.1, "gap_closed": 40.0})
    keys = ("rotation_error", "translation_error")
    motions = [dict(zip(keys, errors)) for errors in ((0.1, 0.2), (0.3, 0.9), (3.2, 0.4))]
    expected = {"rotation_error": 0.3, "translation_error": 0.4, "success": 100 / 3}
    expected |= {"rotation_error_mean": 1.2, "translation_error_mean": 0.5}
    assert motion_summary(motions) == pytest.approx(expected)


def test_a_motion_that_is_found_better_scores_higher():
    task = tasks.RigidTask.__new__(tasks.RigidTask)  # its heads would take a minute
    scores = [
        task.score({"rotation_error": turn, "translation_error": shift})
        for turn, shift in ((2.0, 2.0), (1.0, 2.0), (1.0, 0.5))
    ]
    assert scores == sorted(scores) and len(set(scores)) == 3


def test_labels_that_nobody_has_are_refused_not_averaged(monkeypatch, tmp_path):
    """Where label maps hold other ids than the list of structures says."""
    pairs = chain(population(2, (80, 96), seed=2))

    def nothing(moving, fixed):
        return Registration(moving, torch.zeros(1, 2, 80, 96))

    own = int(pairs[0][1].labels.max())
    rows = evaluate(nothing, pairs, labels=[own, 1001])
    assert list(rows[0]["dice_per_label"]) == [own, 1001] and rows[0]["dice"] > 0
    sentence = r"labels is 1001, 1002, of which 'population-2-0001' has none, expected some of \d"
    with pytest.raises(ValueError, match=sentence):
        evaluate(nothing, pairs, labels=[1001, 1002])
    monkeypatch.setattr(tasks, "evaluation_pairs", lambda *args: (pairs, [1001]))
    with pytest.raises(ValueError, match="labels is 1001, of which"):
        loop.train(small(), progress=False, device="cpu")
