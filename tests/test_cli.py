"""The command line, through typer's runner and once as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage
from typer.testing import CliRunner

import regkit
from regkit import cli, io, models, widgets
from regkit.data import samples
from regkit.spatial import warp
from regkit.training import recipes
from regkit.transform import Grid, Transform

ROOT = Path(__file__).parents[1]


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def scan(path, shape=(30, 34, 1), seed=0, labels=False):
    """A smooth image, or the same image as label map of three labels."""
    grids = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    away = sum((g - 0.2 * seed) ** 2 for g, n in zip(grids, shape, strict=True) if n > 1)
    values = np.exp(-3 * away) * (1 + 0.3 * np.sin(9 * grids[0] + seed))
    values = (3.9 * values / values.max()).astype("i2") if labels else values.astype("f4")
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-2.0, 2.0, 2.0, 1.0])), path)
    return path


@pytest.fixture
def pair(tmp_path):
    return scan(tmp_path / "m.nii.gz"), scan(tmp_path / "f.nii.gz", seed=1)


def test_help_and_version_in_a_process_that_does_not_load_torch():
    """`python -m regkit` works, and help does not wait for PyTorch."""
    code = (
        "import sys; from typer.testing import CliRunner; from regkit.cli import app;"
        "r = CliRunner().invoke(app, ['--help']); assert r.exit_code == 0;"
        "slow = {'torch', 'numpy', 'nibabel', 'SimpleITK', 'rich.console', 'rich.markdown'};"
        "assert not slow & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "regkit", "--version"],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"regkit {regkit.__version__}\n"


def test_the_version_is_that_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project.get("version", regkit.__version__) == regkit.__version__


def test_every_help_page_opens_and_the_first_says_what_this_is_not():
    words = " ".join(run("--help").stdout.replace("│", " ").split())
    assert "For research and teaching. Not a medical device." in words
    words = " ".join(run("register", "--help").stdout.replace("│", " ").split())
    assert "not a medical device" in words
    for command in ("apply", "demo", "train", "evaluate", "benchmark", "models", "data"):
        assert "Usage" in run(command, "--help").stdout


def test_register_writes_its_five_files_and_says_what_came_out(pair, tmp_path):
    out = tmp_path / "out"
    result = run("register", *pair, "-o", out, "--method", "affine", "--refine", 5)
    names = ["disp.nii.gz", "metrics.json", "moved.nii.gz", "report.html", "report.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<title>Registration</title>" in page and "://" not in page  # asks nobody for anything
    assert "m.nii" not in page and "Not a medical device" in page
    numbers = json.loads((out / "metrics.json").read_text())
    assert numbers["refine"] == 5 and numbers["method"] == "affine"
    assert f"{numbers['lncc']['after']:.4f}" in result.stdout
    assert "100%" in result.stderr  # the progress bar
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.nii.gz", "m.nii.gz", "out"]


def test_a_report_is_never_that_of_another_registration(pair, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = ["-o", out, "--method", "affine", "--device", "cpu"]
    run("register", *pair, *options)

    def fail(*arguments):
        raise RuntimeError("no page today")

    monkeypatch.setattr(widgets, "show", fail)
    run("register", *pair, *options, code=1)
    assert (out / "metrics.json").is_file() and not (out / "report.html").exists()


def test_options_reach_the_library(pair, tmp_path):
    models.save(models.create("vxm_diff", ndim=2), tmp_path / "w.safetensors")
    out = tmp_path / "out"
    options = ["--method", tmp_path / "w.safetensors", "--affine", "none", "--device", "cpu"]
    labels = [
        "--moving-labels",
        scan(tmp_path / "ml.nii.gz", labels=True),
        "--fixed-labels",
        scan(tmp_path / "fl.nii.gz", seed=1, labels=True),
    ]
    run("register", *pair, "-o", out, *options, *labels)
    numbers = json.loads((out / "metrics.json").read_text())
    assert numbers["affine"] == "none" and numbers["method"] == "w.safetensors"
    assert 0 < numbers["dice"]["before"] < 1 and (out / "moved_labels.nii.gz").is_file()


def test_apply_does_again_what_register_did(pair, tmp_path):
    out = tmp_path / "out"
    run("register", *pair, "-o", out, "--method", "affine", "--refine", 5)
    run("apply", pair[0], out / "disp.nii.gz", "-o", tmp_path / "again.nii.gz")
    first, second = (nibabel.load(p) for p in (out / "moved.nii.gz", tmp_path / "again.nii.gz"))
    np.testing.assert_allclose(second.get_fdata(), first.get_fdata(), atol=1e-4)
    np.testing.assert_allclose(second.affine, first.affine)


def test_apply_keeps_labels_whole(pair, tmp_path):
    labels = scan(tmp_path / "labels.nii.gz", labels=True)
    disp = 1.3 * torch.ones(1, 2, 30, 34)
    affine = nibabel.load(pair[1]).affine
    grid = Grid((30, 34), affine, across=2)
    io.write_transform(Transform(grid, grid, np.eye(4), disp), tmp_path / "d.nii.gz")
    run("apply", labels, tmp_path / "d.nii.gz", "-o", tmp_path / "moved.nii.gz", "--labels")
    moved = np.asarray(nibabel.load(tmp_path / "moved.nii.gz").dataobj)
    assert moved.dtype == np.int32
    expected = warp(io.read(labels, labels=True).data, disp, mode="nearest")[0, 0]
    assert (moved[..., 0] == expected.numpy()).all()


@pytest.mark.slow
def test_models_lists_names_and_parameters():
    text = run("models").stdout
    for name in (*models.names(), *models.pretrained()):
        assert name in text
    assert f"{models.parameter_count(models.create('vxm', ndim=3)):,}" in text


def test_data_list_names_every_sample(monkeypatch, tmp_path):
    monkeypatch.setenv("REGKIT_DATA", str(tmp_path))
    text = run("data", "list").stdout
    assert all(name in text for name in samples.samples()) and "MB" in text


def test_columns_are_the_same_in_any_terminal(monkeypatch):
    """Nothing is cut, wrapped or coloured."""
    text = run("data", "list").stdout
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run("data", "list").stdout == text and "\x1b" not in text
    for name, sample in samples.samples().items():
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [name])
        assert line.endswith(sample.title)


def test_data_get_shows_terms_and_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(samples, "fetch", lambda name, progress: tmp_path / name)
    text = run("data", "get", "ants_slices").stdout
    assert samples.samples()["ants_slices"].terms in text and str(tmp_path / "ants_slices") in text


def test_data_get_of_an_unknown_sample_suggests_one():
    result = run("data", "get", "ant_slices", code=2)
    assert "did you mean 'ants_slices'" in result.stderr


@pytest.fixture
def small_weights(monkeypatch, tmp_path):
    """Untrained 2D and 3D weights stand in for the shipped ones, the population is small."""
    from regkit.data import population as _  # noqa: F401 (the module, before it is patched)
    from regkit.data.population import population

    module = sys.modules["regkit.data.population"]
    monkeypatch.setattr(
        module,
        "population",
        lambda n, shape, **options: population(n, [s // 4 for s in shape], **options),
    )
    for d in (2, 3):
        models.save(models.create("vxm_diff", ndim=d), tmp_path / f"w{d}.safetensors")
    load = models.load
    monkeypatch.setattr(models, "pretrained", lambda: ["w2", "w3"])
    about = models.about
    places = {f"w{d}": tmp_path / f"w{d}.safetensors" for d in (2, 3)}
    monkeypatch.setattr(models, "load", lambda name: load(places.get(name, name)))
    monkeypatch.setattr(models, "about", lambda name: about(places.get(name, name)))


@pytest.mark.slow
def test_demo_runs_without_files_and_without_network(monkeypatch, tmp_path, small_weights):
    def unreachable(name, progress=False):
        raise FileNotFoundError("sample 'oasis_3d' is not in the cache and cannot be downloaded.")

    monkeypatch.setattr(samples, "cached", lambda name: False)
    monkeypatch.setattr(samples, "fetch", unreachable)
    result = run("demo", "-o", tmp_path / "demo")
    made = sorted(str(p.relative_to(tmp_path / "demo")) for p in tmp_path.glob("demo/*/*.png"))
    assert made == ["synthetic_2d/report.png", "synthetic_3d/report.png"]
    for name in made:
        assert str(Path(name).with_suffix(".html")) in result.stdout.replace("\n", "")
    assert "dice" in result.stdout and "No real brains: sample 'oasis_3d' is not" in result.stderr


@pytest.mark.slow
@pytest.mark.real
def test_demo_registers_real_slices_where_they_are_cached(sample, tmp_path, small_weights):
    sample("oasis_3d")
    run("demo", "-o", tmp_path / "demo", "--size", "small")
    page = (tmp_path / "demo" / "real_2d" / "report.html").read_text(encoding="utf-8")
    assert "<title>Registration of real_2d</title>" in page
    numbers = json.loads((tmp_path / "demo" / "real_2d" / "metrics.json").read_text())
    assert numbers["dice"]["before"] == pytest.approx(0.602, abs=0.001)  # as the sample's README


def test_weights_that_learnt_to_register_to_an_atlas_are_evaluated_so(tmp_path, monkeypatch):
    monkeypatch.setenv("REGKIT_BUDGET", "smoke")
    run("train", "--recipe", "sun2025_2d", "--steps", 1, "--device", "cpu", "-o", tmp_path / "run")
    weights, file = tmp_path / "run" / "last.safetensors", tmp_path / "e.json"
    run("evaluate", weights, "--pairs", 2, "--device", "cpu", "-o", file)
    pairs = json.loads(file.read_text())["pairs"]
    assert [pair["fixed"] for pair in pairs] == ["population-3-0000"] * 2
    assert [pair["moving"] for pair in pairs] == ["population-2-0000", "population-2-0001"]
    wrong = run("train", "--recipe", "sun2025_lpba40", "-o", tmp_path / "other", code=2)
    assert "expected the folder of the prepared set 'lpba40'" in wrong.stderr
    assert not (tmp_path / "other").exists()


def test_train_and_evaluate_at_the_smallest_budget(tmp_path, monkeypatch):
    out = tmp_path / "run"
    run("train", "--recipe", "vxm_diff_2d", "--budget", "smoke", "-o", out, "--device", "cpu")
    assert (out / "best.safetensors").is_file()
    plan = models.load(out / "best.safetensors").info["recipe"]
    assert plan["steps"] == recipes.get("vxm_diff_2d", "smoke").steps
    run("evaluate", out / "best.safetensors", "--pairs", 2, "-o", tmp_path / "e.json")
    found = json.loads((tmp_path / "e.json").read_text())
    assert len(found["pairs"]) == 2 and 0 < found["summary"]["dice"] < 1
    refused = run("evaluate", out / "best.safetensors", "-o", out, code=2)
    assert "out is a folder, expected the name of a JSON file" in refused.stderr


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["train", "--recipe", "vxm_2", "-o", "OUT"], "vxm_2"),
        (["train", "--recipe", "vxm_2d", "--budget", "huge", "-o", "OUT"], "huge"),
        (["evaluate", "nowhere"], "nowhere"),
        (["evaluate", "nowhere", "--device", "abacus"], "abacus"),
    ],
)
def test_wrong_settings_end_with_2_and_a_sentence(tmp_path, command, sentence):
    result = run(*[tmp_path / "out" if c == "OUT" else c for c in command], code=2)
    assert sentence in result.stderr and "expected" in result.stderr
    assert "Traceback" not in result.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_interrupted_command_leaves_nothing(pair, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(nibabel, "save", interrupt)
    result = CliRunner().invoke(
        cli.app, ["register", *map(str, pair), "-o", str(tmp_path / "out"), "--method", "affine"]
    )
    assert result.exit_code != 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.nii.gz", "m.nii.gz"]


# apply ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_apply_takes_a_series_and_a_displacement_of_simpleitk(pair, tmp_path):
    out = tmp_path / "out"
    run("register", *pair, "-o", out, "--method", "rigid")
    one = nibabel.load(pair[0])
    values = np.asarray(one.dataobj)
    nibabel.save(
        nibabel.Nifti1Image(np.stack([values, 2 * values], -1), one.affine), tmp_path / "s.nii.gz"
    )
    run("apply", tmp_path / "s.nii.gz", out / "disp.nii.gz", "-o", tmp_path / "moved.nii.gz")
    moved = nibabel.load(tmp_path / "moved.nii.gz").get_fdata()
    first = nibabel.load(out / "moved.nii.gz").get_fdata()
    np.testing.assert_allclose(moved[..., 0], first, atol=1e-3 * np.ptp(first))
    np.testing.assert_allclose(moved[..., 1], 2 * moved[..., 0], atol=1e-3 * np.ptp(first))
    field = sitk.ReadImage(str(out / "disp.nii.gz"), sitk.sitkVectorFloat64)
    sitk.WriteImage(field, str(tmp_path / "d.mha"))
    run("apply", pair[0], tmp_path / "d.mha", "-o", tmp_path / "again.nii.gz")
    again = nibabel.load(tmp_path / "again.nii.gz").get_fdata()
    np.testing.assert_allclose(again, first, atol=1e-3 * np.ptp(first))


def test_apply_takes_a_matrix_with_the_image_whose_grid_is_wanted(pair, tmp_path):
    shift = sitk.TranslationTransform(3, (4.0, 0.0, 0.0))
    sitk.WriteTransform(shift, str(tmp_path / "0GenericAffine.mat"))
    command = ["apply", pair[0], tmp_path / "0GenericAffine.mat", "-o", tmp_path / "moved.nii.gz"]
    assert "expected with it the fixed image" in run(*command, code=2).stderr
    run(*command, "--like", pair[1])
    image = sitk.ReadImage(str(pair[0]))
    theirs = sitk.Resample(image, sitk.ReadImage(str(pair[1])), shift, sitk.sitkLinear, -1.0)
    theirs = sitk.GetArrayFromImage(theirs).T
    ours = nibabel.load(tmp_path / "moved.nii.gz").get_fdata()
    seen = ndimage.binary_erosion(theirs[..., 0] >= 0)  # at the border each pads in its way
    assert seen.mean() > 0.5
    assert np.abs(ours - theirs)[seen].max() < 0.01 * np.ptp(ours)


def test_apply_refuses_a_field_that_lies_elsewhere(pair, tmp_path):
    affine = nibabel.load(pair[1]).affine.copy()
    affine[0, 3] += 1000
    grid = Grid((30, 34), affine, across=2)
    io.write_transform(Transform.affine(grid, grid), tmp_path / "d.nii.gz")
    before = sorted(tmp_path.iterdir())
    failed = run("apply", pair[0], tmp_path / "d.nii.gz", "-o", tmp_path / "moved.nii.gz", code=2)
    assert "disp leads nowhere into image" in failed.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_outside_a_map_of_z_values_lies_zero(tmp_path):
    """A slab of values between -8 and 8, on a larger grid: as ITK and ANTs fill it."""
    index = np.indices((40, 40, 40))
    inside = np.sqrt(((index - 19.5) ** 2).sum(0)) < 12
    z = np.where(inside, 8 * np.sin(index[0] / 3), 0).astype(np.float32)
    affine = np.diag([2.0, 2, 2, 1])
    up = affine.copy()
    up[2, 3] += 16
    nibabel.save(nibabel.Nifti1Image(z[:, :, 8:32], up), tmp_path / "z.nii.gz")
    grid = Grid((40, 40, 40), affine)
    io.write_transform(Transform.affine(grid, grid), tmp_path / "d.nii.gz")
    run("apply", tmp_path / "z.nii.gz", tmp_path / "d.nii.gz", "-o", tmp_path / "moved.nii.gz")
    moved = nibabel.load(tmp_path / "moved.nii.gz").get_fdata()
    assert (moved[:, :, :7] == 0).all() and (moved[:, :, 33:] == 0).all()
    np.testing.assert_allclose(moved[:, :, 8:32], z[:, :, 8:32], atol=1e-4)
