"""data_scripts/brats.py on a made-up folder with the names, shapes and axes of BraTS."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from regkit import io
from regkit.data import RigidPairs

SCRIPTS = Path(__file__).parents[1] / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
import brats  # noqa: E402
import layout  # noqa: E402

SHAPE = (30, 34, 9)
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # as BraTS has it: array axes to the Left and Posterior
AFFINE[1, 3] = 33.0


def add_case(folder, name, seed, suffix=".nii.gz", labels=True):
    """The files of one patient. The largest slice of the brain is number 5."""
    random = np.random.default_rng(seed)
    brain = np.zeros(SHAPE, bool)
    for k, half in enumerate((0, 3, 5, 7, 8, 10, 8, 6, 3)):
        brain[15 - half : 15 + half, 17 - half : 17 + half, k] = True
    (folder / name).mkdir(parents=True)
    for contrast in ("flair", "t1", "t1ce", "t2"):
        values = brain * random.integers(100, 1000, SHAPE)
        image = nibabel.Nifti1Image(values.astype(np.int16), AFFINE)
        nibabel.save(image, folder / name / f"{name}_{contrast}{suffix}")
    if labels:
        seg = (brain & (np.indices(SHAPE)[0] > 18)).astype(np.uint8) * 4
        nibabel.save(nibabel.Nifti1Image(seg, AFFINE), folder / name / f"{name}_seg{suffix}")
    return folder / name


@pytest.fixture
def source(tmp_path):
    """Ten patients, in the folders of 2019; another file lies about."""
    top = tmp_path / "MICCAI_BraTS_2019_Data_Training"
    for i in range(10):
        add_case(top / ("HGG" if i < 6 else "LGG"), f"BraTS19_CBICA_AA{i}_1", i)
    (top / "name_mapping.csv").write_text("a,b\n")
    return top


def prepare(source, out, *more):
    """Exit code, and what was said."""
    command = [sys.executable, str(SCRIPTS / "brats.py"), str(source), "--out", str(out), *more]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in run.stderr, run.stderr
    return run.returncode, run.stdout + run.stderr


def call(source, out, **options):
    options = {"accept_terms": True, "patients": None, "size": 20, "seed": 0, **options}
    brats.main([source], out, **options)
    return json.loads((out / "dataset.json").read_text())


def test_the_command_shows_the_terms_first_and_then_works(source, tmp_path):
    out = tmp_path / "out"
    code, said = prepare(source, out, "--size", "20")
    assert code == 2 and "do not pass it on" in said and "--accept-terms" in said
    assert not out.exists()
    code, said = prepare(source, out, "--size", "20", "--accept-terms")
    assert code == 0 and "do not pass it on" in said
    assert "10 patients, 8 to learn from and 2 to test on." in said
    code, said = prepare(source, out, "--size", "24", "--accept-terms")
    assert code == 2 and said.splitlines()[-1] == (
        "out holds a set made from other files or with other settings, expected a new folder."
    )


def test_the_slice_is_the_largest_cropped_about_its_centre_at_its_place(source, tmp_path):
    out = tmp_path / "out"
    description = call(source, out)
    assert description["complete"] and description["contrasts"] == ["flair", "t1", "t2"]
    name = description["subjects"][0]["name"]
    case = source / "HGG" / name
    for contrast in ("flair", "t1", "t2"):
        whole = nibabel.load(case / f"{name}_{contrast}.nii.gz")
        image = io.read(out / name / f"{contrast}.nii.gz")
        assert image.shape == (20, 20) and 0 <= image.data.min() and image.data.max() == 1
        # the voxel at a place in the scanner has the value that it had there
        for voxel in ((0, 0), (4, 15), (19, 3)):
            place = image.affine @ [*voxel, 0, 1]
            i, j, k = np.rint(np.linalg.inv(whole.affine) @ place)[:3].astype(int)
            slice_ = whole.get_fdata()[:, :, 5]
            top = np.percentile(slice_[slice_ > 0], 99.5)
            assert k == 5
            expected = min(1.0, slice_[i, j] / top)
            assert float(image.data[0, 0][voxel]) == pytest.approx(expected, abs=1e-6)
        assert (np.diag(image.affine)[:3] > 0).all()  # to R, A, S
    labels = io.read(out / name / "labels.nii.gz", labels=True)
    assert labels.data.unique().tolist() == [0, 4] and io.same_grid(labels, image)
    assert not (out / name / "t1ce.nii.gz").exists()


def test_a_patient_is_on_one_side_of_the_split(source, tmp_path):
    splits = {}
    for seed in (0, 1):
        subjects = call(source, tmp_path / f"{seed}", seed=seed)["subjects"]
        assert len({entry["name"] for entry in subjects}) == 10
        assert sum(entry["split"] == "train" for entry in subjects) == 8
        splits[seed] = [entry["split"] for entry in subjects]
    assert splits[0] != splits[1]
    assert len(call(source, tmp_path / "some", patients=5)["subjects"]) == 5


def test_the_folders_of_2021_without_labels_and_packing(tmp_path):
    for i in range(2):
        add_case(tmp_path / "in", f"BraTS2021_0000{i}", i, suffix=".nii", labels=False)
    description = call(tmp_path / "in", tmp_path / "out")
    assert [entry["labels"] for entry in description["subjects"]] == [False, False]
    read = layout.subjects(tmp_path / "out", "t2")
    assert [s.name for s in read] == ["BraTS2021_00000", "BraTS2021_00001"]
    assert (read[0].labels == 0).all()


def test_what_is_prepared_makes_pairs(source, tmp_path):
    call(source, tmp_path / "out")
    groups = [layout.subjects(tmp_path / "out", c, split="train") for c in ("t1", "flair")]
    assert [len(group) for group in groups] == [8, 8]
    pair = RigidPairs(groups, 3).pair(0)
    assert pair.fixed.image.shape == (1, 20, 20) and pair.moving.name == pair.fixed.name
    assert pair.fixed.spacing == (1.0, 1.0)
    with pytest.raises(ValueError, match="contrast is 'pd', expected one of flair, t1, t2"):
        layout.subjects(tmp_path / "out", "pd")
    with pytest.raises(FileNotFoundError, match="no dataset.json"):
        layout.subjects(tmp_path, "t1")


def test_a_stopped_run_goes_on_and_is_not_taken_for_a_whole_one(source, tmp_path, monkeypatch):
    out, made = tmp_path / "out", []
    prepare_one = brats.prepare

    def stops(folder, size):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(folder.name)
        return prepare_one(folder, size)

    monkeypatch.setattr(brats, "prepare", stops)
    with pytest.raises(KeyboardInterrupt):
        call(source, out)
    assert sorted(p.name for p in out.iterdir()) == [*made, "dataset.json"]
    with pytest.raises(ValueError, match="folder is not complete"):
        layout.subjects(out, "t1")
    before = {p: os.stat(p).st_mtime_ns for p in out.glob("*/*.nii.gz")}
    monkeypatch.setattr(brats, "prepare", prepare_one)
    assert call(source, out)["complete"]
    assert all(os.stat(p).st_mtime_ns == time for p, time in before.items())
    assert len(layout.subjects(out, "t1")) == 10


def _missing(case):
    (case / f"{case.name}_t2.nii.gz").unlink()


def _cut_short(case):
    path = case / f"{case.name}_t1.nii.gz"
    path.write_bytes(path.read_bytes()[:500])


def _other_grid(case):
    image = nibabel.Nifti1Image(np.ones((30, 34, 8), np.int16), AFFINE)
    nibabel.save(image, case / f"{case.name}_t1.nii.gz")


def _empty(case):
    image = nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), AFFINE)
    nibabel.save(image, case / f"{case.name}_flair.nii.gz")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_missing, "BraTS19_X_1, t2: there is no such file, expected flair, t1, t2."),
        (_cut_short, "BraTS19_X_1, t1 cannot be read as NIfTI"),
        (_other_grid, "BraTS19_X_1, t1 lies on another grid than flair, expected the same."),
        (_empty, "BraTS19_X_1, flair is empty, expected a brain."),
    ],
)
def test_a_broken_patient_is_named_and_leaves_nothing(tmp_path, damage, sentence):
    damage(add_case(tmp_path / "in", "BraTS19_X_1", 0))
    with pytest.raises(ValueError, match=sentence):
        call(tmp_path / "in", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["dataset.json"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": 31}, r"BraTS19_CBICA_AA0_1 has slices of \(30, 34\), expected 31x31 or larger"),
        ({"size": 3}, "size is 3, expected at least 16"),
        ({"patients": 11}, "patients is 11, expected 1 to 10"),
        ({"accept_terms": False}, "terms above are not accepted"),
    ],
)
def test_wrong_options_are_one_sentence(source, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(source, tmp_path / "out", **options)


def test_a_wrong_folder_is_one_sentence(source, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="source has no file NAME/NAME_flair.nii.gz"):
        call(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="source is no folder"):
        call(tmp_path / "empty.zip", tmp_path / "out")
    add_case(source / "again", "BraTS19_CBICA_AA0_1", 0)
    with pytest.raises(ValueError, match="BraTS19_CBICA_AA0_1 is there twice"):
        call(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (source / "again" / "BraTS19_CBICA_AA0_1").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="out is a folder with other files in it"):
        call(source, source)


def test_the_split_is_four_to_one_for_any_number():
    for n in (1, 5, 101):
        parts = layout.split([f"{i}" for i in range(n)], seed=3)
        assert len(parts) == n and sum(p == "train" for p in parts.values()) == round(0.8 * n)
