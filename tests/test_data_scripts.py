"""The scripts of data_scripts on made-up folders with the names, axes and labels of each set."""

import gzip
import hashlib
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from regkit import classical, io
from regkit.data import RandomPairs, RigidPairs, chain, prepared, samples
from regkit.models import Registration
from regkit.training import recipes, train
from regkit.training.data import evaluation_pairs
from regkit.training.evaluation import evaluate
from regkit.transform import Grid, resample

SCRIPTS = Path(__file__).parents[1] / "data_scripts"
sys.path.insert(0, str(SCRIPTS))
import archives  # noqa: E402
import arrays  # noqa: E402
import brats  # noqa: E402
import ixi  # noqa: E402
import layout  # noqa: E402
import lpba40  # noqa: E402
import oasis  # noqa: E402
from standins import (  # noqa: E402
    AFFINE,
    GRID,
    LIA,
    SHAPE,
    add_case,
    add_ixi,
    add_lpba,
    add_person,
    ixi_person,
    lpba_brain,
    save_ixi,
    to_the_middle,
)


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


@pytest.mark.slow
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
    assert labels.data.unique().tolist() == [0, 4] and labels.grid.same_as(image.grid)
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
    read = prepared.subjects(tmp_path / "out", "t2")
    assert [s.name for s in read] == ["BraTS2021_00000", "BraTS2021_00001"]
    assert (read[0].labels == 0).all()


def test_what_is_prepared_makes_pairs(source, tmp_path):
    call(source, tmp_path / "out")
    groups = [prepared.subjects(tmp_path / "out", c, split="train") for c in ("t1", "flair")]
    assert [len(group) for group in groups] == [8, 8]
    pair = RigidPairs(groups, 3).pair(0)
    assert pair.fixed.image.shape == (1, 20, 20) and pair.moving.name == pair.fixed.name
    assert pair.fixed.spacing == (1.0, 1.0)
    with pytest.raises(ValueError, match="contrast is 'pd', expected one of flair, t1, t2"):
        prepared.subjects(tmp_path / "out", "pd")
    with pytest.raises(FileNotFoundError, match="no dataset.json"):
        prepared.subjects(tmp_path, "t1")


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
        prepared.subjects(out, "t1")
    before = {p: os.stat(p).st_mtime_ns for p in out.glob("*/*.nii.gz")}
    monkeypatch.setattr(brats, "prepare", prepare_one)
    assert call(source, out)["complete"]
    assert all(os.stat(p).st_mtime_ns == time for p, time in before.items())
    assert len(prepared.subjects(out, "t1")) == 10


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


# what the sets have in common -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6)])
@pytest.mark.parametrize("codes", ["LIA", "PSR", "RAS"])
def test_axes_are_turned_as_nibabel_turns_them(shape, codes):
    """Every value stays at its place; a slice keeps its plane."""
    start = nibabel.orientations.axcodes2ornt("RAS")
    turn = nibabel.orientations.ornt_transform(start, nibabel.orientations.axcodes2ornt(codes))
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = (-4, 5, 6)
    whole = (*shape, 1)[:3]
    values = np.arange(np.prod(whole), dtype=np.float32).reshape(whole)
    source = nibabel.Nifti1Image(values, affine).as_reoriented(turn)
    if len(shape) == 3:
        found = io.canonical(io.from_nibabel(source))
        closest = nibabel.as_closest_canonical(source)
        assert np.array_equal(found.data[0, 0], closest.get_fdata())
        assert np.allclose(found.affine, closest.affine)
        return
    flat = io.Image(torch.arange(30.0).reshape(1, 1, 5, 6), source.affine)
    found = io.canonical(flat)
    assert nibabel.aff2axcodes(found.affine)[:2] == tuple(c for c in "RAS" if c in _axes(codes))
    for i, j in ((0, 0), (4, 5), (2, 1)):
        place = np.linalg.inv(found.affine) @ flat.affine @ [i, j, 0, 1]
        a, b, c = np.rint(place[:3]).astype(int)
        assert c == 0 and found.data[0, 0, a, b] == flat.data[0, 0, i, j]


def _axes(codes):
    """The first two axes, named by their positive ends."""
    return {{"L": "R", "P": "A", "I": "S"}.get(c, c) for c in codes[:2]}


def test_a_coarser_grid_lies_on_voxels_of_the_old_one():
    affine = np.array([[0, 2.0, 0, 5], [-1, 0, 0, 6], [0, 0, 3.0, 7], [0, 0, 0, 1]])
    for step, first in ((1, 0), (2, 0), (4, 1)):
        new = layout.coarser(Grid((160, 192, 160), affine), step)
        assert new.shape == (160 // step, 192 // step, 160 // step)
        for voxel in ((0, 0, 0), (3, 1, 2)):
            old = np.linalg.inv(affine) @ new.affine @ [*voxel, 1]
            assert np.allclose(old[:3], np.array(voxel) * step + first)
    with pytest.raises(ValueError, match="spacing is 3, expected 1, 2 or 4"):
        layout.coarser(Grid((8, 8), affine), 3)


# neurite-oasis ----------------------------------------------------------------------------------


@pytest.fixture
def neurite(tmp_path):
    """Seven people of neurite-oasis; one has come twice."""
    for number in range(1, 8):
        add_person(tmp_path / "neurite-oasis", number)
    add_person(tmp_path / "neurite-oasis", 3, visit=2)
    return tmp_path / "neurite-oasis"


def call_oasis(source, out, **options):
    oasis.main(source, out, **{"accept_terms": True, "ndim": 3, "spacing": 1, "seed": 0, **options})
    return json.loads((out / "dataset.json").read_text())


def test_the_parts_of_oasis_are_those_of_the_paper():
    names = [f"OASIS_OAS1_{i:04d}_MR1" for i in range(414)]
    parts = list(layout.split(names, 0, oasis.PARTS).values())
    counts = {part: parts.count(part) for part in parts}
    assert counts == {"train": 254, "validation": 20, "test": 140}
    assert parts != list(layout.split(names, 1, oasis.PARTS).values())


@pytest.mark.slow
def test_oasis_from_the_command_line(neurite, tmp_path):
    command = [sys.executable, str(SCRIPTS / "oasis.py"), str(neurite), "--accept-terms"]
    run = subprocess.run(
        [*command, "--spacing", "2", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0 and "Data Use Agreement" in run.stderr
    assert "7 people: 4 for train, 1 for validation, 2 for test." in run.stdout
    assert prepared.subjects(tmp_path / "out", "t1")[0].image.shape == (1, 10, 14, 12)


def test_volumes_of_oasis_keep_their_place_and_make_pairs(neurite, tmp_path):
    out = tmp_path / "out"
    description = call_oasis(neurite, out)
    assert description["complete"] and prepared.structures(out) == {1: "Left-White", 2: "Cortex"}
    everyone = prepared.subjects(out, "t1")
    assert [s.name[-8:-4] for s in everyone] == [f"{i:04d}" for i in range(1, 8)]
    for subject in (everyone[0], everyone[-1]):
        whole = nibabel.load(neurite / subject.name / "aligned_norm.nii.gz")
        assert subject.image.shape == (1, 20, 28, 24) and (np.diag(subject.affine) == 1).all()
        i, j, k = np.rint(np.linalg.inv(LIA) @ subject.affine @ [4, 20, 7, 1])[:3].astype(int)
        assert subject.image[0, 4, 20, 7] == whole.dataobj[i, j, k]
        places = np.argwhere(subject.labels[0].numpy() == 1)
        assert places.mean(axis=0)[0] > 9.5  # the arrays run to the left: block 5 to 8 lies right
    parts = {p: prepared.subjects(out, "t1", p) for p in ("fixed", "train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [0, 4, 1, 2]
    item = RandomPairs(parts["train"], 3)[0]
    assert item["moving"].shape == (1, 20, 28, 24) and item["moving_labels"].unique().tolist() == [
        0,
        1,
        2,
    ]
    assert len(chain(parts["test"])) == 2


def test_subjects_are_read_when_needed_and_kept_or_not(neurite, tmp_path):
    call_oasis(neurite, tmp_path / "out")
    kept = prepared.subjects(tmp_path / "out", "t1")
    fresh = prepared.subjects(tmp_path / "out", "t1", keep=False)
    assert kept[2] is kept[2] and fresh[2] is not fresh[2]
    assert torch.equal(kept[2].image, fresh[2].image) and kept[-1] is kept[6]
    with pytest.raises(IndexError):
        kept[7]
    with pytest.raises(ValueError, match="split is 'tests', expected one of 'fixed', 'train'"):
        prepared.subjects(tmp_path / "out", "t1", "tests")


def test_slices_of_oasis(tmp_path):
    for number in (1, 2, 3):
        add_person(tmp_path / "in", number, ndim=2)
    description = call_oasis(tmp_path / "in", tmp_path / "out", ndim=2)
    assert description["name"] == "oasis_2d" and description["contrasts"] == ["t1"]
    subject = prepared.subjects(tmp_path / "out", "t1")[0]
    whole = nibabel.load(tmp_path / "in" / subject.name / "slice_norm.nii.gz")
    assert subject.image.shape == (1, 20, 24) and subject.spacing == (1.0, 1.0)
    assert nibabel.aff2axcodes(subject.affine)[:2] == ("R", "S")
    assert np.array_equal(subject.image[0], whole.get_fdata(dtype=np.float32)[::-1, ::-1, 0])
    place = subject.affine @ [19, 23, 0, 1]
    assert np.allclose(place, LIA @ [0, 0, 0, 1])


def test_what_is_prepared_can_be_evaluated(tmp_path):
    """Without registration; distances are in mm, also where no axis of a slice runs to A."""
    for number in (1, 2, 4):
        add_person(tmp_path / "in", number, ndim=2)
    call_oasis(tmp_path / "in", tmp_path / "out", ndim=2, spacing=2)
    pairs = chain(prepared.subjects(tmp_path / "out", "t1"))
    labels = list(prepared.structures(tmp_path / "out"))

    def nothing(moving, fixed):
        return Registration(moving, torch.zeros(1, 2, *fixed.shape[2:]))

    rows = evaluate(nothing, pairs, labels, distances=True)
    assert [list(row["dice_per_label"]) for row in rows] == [[1, 2]] * 3
    assert all(0.5 < row["dice"] < 1 for row in rows)
    # the bright blocks are 1, 2 and 3 voxels of 2 mm wide, and begin at one place
    assert all(0 < row["hd95"] < 4 and row["hd95_infinite"] == 0 for row in rows)


def _no_labels(folder):
    (folder / "aligned_seg35.nii.gz").unlink()


def _bytes(folder):
    path = folder / "aligned_norm.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(image.get_fdata() * 255, LIA), path)


def _unknown_label(folder):
    values = np.full((20, 24, 28), 77, np.uint8)
    nibabel.save(nibabel.Nifti1Image(values, LIA), folder / "aligned_seg35.nii.gz")


def _elsewhere(folder):
    for path in folder.iterdir():
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), 2 * LIA), path)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_no_labels, "OASIS_OAS1_0002_MR1, aligned_seg35: there is no such file, expected"),
        (_bytes, "OASIS_OAS1_0002_MR1, aligned_norm has intensities from 0 to 1"),
        (_unknown_label, "aligned_seg35 holds label 77, expected those of seg35_labels.txt"),
        (_elsewhere, "0002_MR1, aligned_norm lies on another grid than that of OASIS_OAS1_0001"),
    ],
)
def test_a_broken_person_of_oasis_is_named_and_the_rest_goes_on(tmp_path, damage, sentence):
    add_person(tmp_path / "in", 1)
    good = tmp_path / "good"
    second = add_person(tmp_path / "in", 2)
    shutil.copytree(second, good)
    damage(second)
    with pytest.raises(ValueError, match=sentence):
        call_oasis(tmp_path / "in", tmp_path / "out")
    made = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert made == ["OASIS_OAS1_0001_MR1", "dataset.json"]
    before = os.stat(tmp_path / "out" / made[0] / "t1.nii.gz").st_mtime_ns
    shutil.rmtree(second)
    shutil.move(good, second)
    assert call_oasis(tmp_path / "in", tmp_path / "out")["complete"]
    assert os.stat(tmp_path / "out" / made[0] / "t1.nii.gz").st_mtime_ns == before


def test_wrong_options_of_oasis_are_one_sentence(neurite, tmp_path, capfd):
    for options, sentence in (
        ({"accept_terms": False}, "terms above are not accepted"),
        ({"ndim": 4}, "ndim is 4, expected 2 or 3"),
        ({"spacing": 3}, "spacing is 3, expected 1, 2 or 4"),
        ({"ndim": 2}, "source has no file OASIS_OAS1_0000_MR1/slice_norm.nii.gz or alike"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call_oasis(neurite, tmp_path / "out", **options)
    assert "do not try to find out who" in capfd.readouterr().err
    (neurite / "seg35_labels.txt").write_text("nothing\n")
    with pytest.raises(ValueError, match="seg35_labels.txt names no structure"):
        call_oasis(neurite, tmp_path / "out")
    (neurite / "seg35_labels.txt").unlink()
    with pytest.raises(ValueError, match="source has no file seg35_labels.txt"):
        call_oasis(neurite, tmp_path / "out")
    with pytest.raises(ValueError, match="source is no folder"):
        call_oasis(neurite / "neurite-oasis.v1.0.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# LPBA40 -----------------------------------------------------------------------------------------


@pytest.fixture
def aligned(monkeypatch):
    monkeypatch.setattr(classical, "align", to_the_middle)
    monkeypatch.setattr(lpba40, "template", lambda: None)


def call_lpba(source, out, **options):
    lpba40.main(source, out, **{"accept_terms": True, "spacing": 4, "fixed": "S01", **options})
    return json.loads((out / "dataset.json").read_text())


def test_lpba40_has_54_structures_and_the_population_s_middle():
    from regkit.data.template import CENTRE

    assert len(lpba40.STRUCTURES) == 54 and lpba40.STRUCTURES[166] == "right hippocampus"
    assert np.allclose(lpba40.CENTRE, CENTRE)
    grid = lpba40.grid(1)
    assert grid.shape == (160, 192, 160)
    assert np.allclose(grid.affine @ [79.5, 95.5, 79.5, 1], [*CENTRE, 1])


@pytest.mark.parametrize(
    ("turn", "ends"),
    [("LAS", (".hdr", ".img.gz")), ("RAS", (".hdr", ".img")), ("SPL", (".hdr.gz", ".img.gz"))],
)
def test_the_structures_say_which_way_the_axes_run(tmp_path, aligned, turn, ends):
    add_lpba(tmp_path / "in", "S01", turn=turn, ends=ends)
    call_lpba(tmp_path / "in", tmp_path / "out")
    found = prepared.subjects(tmp_path / "out", "t1", "fixed")[0]
    assert found.image.shape == (1, 40, 48, 40) and found.spacing == (4.0, 4.0, 4.0)
    subject, labels = lpba_brain(0)
    voxels = np.argwhere(found.labels[0].numpy() > 0)[::97]
    mm = np.c_[voxels, np.ones(len(voxels))] @ found.affine.T
    there = np.rint(mm @ np.linalg.inv(subject.affine).T)[:, :3].astype(int)
    mine = found.labels[0].numpy()[tuple(voxels.T)]
    assert (mine == labels[tuple(there.T)]).mean() > 0.97  # all but ties between two voxels
    assert 0.99 < found.image.max() <= 1
    assert set(prepared.structures(tmp_path / "out")) == set(lpba40.STRUCTURES)


def test_one_is_fixed_and_the_others_are_divided_as_in_the_paper(tmp_path, aligned, monkeypatch):
    top = tmp_path / "in" / "delineation_space"
    first = add_lpba(tmp_path / "in", "S01")
    brain, labels = lpba40.read(first, "S01")
    for i in range(2, 41):
        (top / f"S{i:02d}").mkdir()
        (top / f"S{i:02d}" / f"S{i:02d}.{lpba40.BRAIN}.img.gz").touch()
    monkeypatch.setattr(lpba40, "read", lambda folder, person: (brain, labels))
    small = io.Image(brain.data[..., :2, :2, :2], brain.affine)
    monkeypatch.setattr(lpba40, "prepare", lambda *args: {"t1": small, "labels": small})
    out = tmp_path / "out"
    call_lpba(tmp_path / "in", out)
    names = {p: [s["name"] for s in _parts(out) if s["split"] == p] for p in prepared.SPLITS}
    assert names["fixed"] == ["S01"] and names["validation"] == []
    assert names["test"] == [f"S{i:02d}" for i in range(2, 11)]
    assert names["train"] == [f"S{i:02d}" for i in range(11, 41)]
    call_lpba(tmp_path / "in", tmp_path / "other", fixed="S40")
    parts = {s["name"]: s["split"] for s in _parts(tmp_path / "other")}
    assert parts["S40"] == "fixed" and parts["S01"] == "test"
    assert sum(p == "train" for p in parts.values()) == 30


def _parts(out):
    return json.loads((out / "dataset.json").read_text())["subjects"]


@pytest.mark.slow
def test_a_tilted_brain_is_laid_over_the_template(tmp_path, monkeypatch):
    """The whole way, with the alignment: where the structures should be, there they are."""
    monkeypatch.setattr(classical, "align", partial(classical.align, largest=30_000))
    subject, labels = lpba_brain(0)
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(0.15), -np.sin(0.15)], [np.sin(0.15), np.cos(0.15)]]
    tilt[:3, 3] = (5, -8, 4)
    images = [
        resample(values[None], Grid(GRID, subject.affine), Grid(GRID, subject.affine), mode, tilt)
        for values, mode in (
            (subject.image, "linear"),
            (torch.from_numpy(labels.astype(np.int32))[None], "nearest"),
        )
    ]
    monkeypatch.setattr(
        lpba40, "read", lambda *args: tuple(io.Image(x, subject.affine) for x in images)
    )
    made = lpba40.prepare(tmp_path, "S01", lpba40.template(), 4)
    whole, grid = Grid(GRID, subject.affine), lpba40.grid(4)
    truth = resample(torch.from_numpy(labels.astype(np.int32))[None, None], whole, grid, "nearest")
    before = resample(images[1], whole, grid, "nearest")
    inside = truth > 0
    right, wrong = (
        float((x == truth)[inside].float().mean()) for x in (made["labels"].data, before)
    )
    assert right > 0.7 > 0.5 > wrong


def _sixth(folder):
    (folder / f"S06.{lpba40.LABELS}.img.gz").unlink()


def _half(folder):
    path = folder / f"S06.{lpba40.BRAIN}.img.gz"
    path.write_bytes(path.read_bytes()[:900])


def _header(folder):
    (folder / f"S06.{lpba40.BRAIN}.hdr").write_bytes(b"no header")


def _without_hippocampus(folder):
    path = folder / f"S06.{lpba40.LABELS}.img.gz"
    values = np.frombuffer(gzip.decompress(path.read_bytes()), np.int16)
    path.write_bytes(gzip.compress(np.where(values == 166, 0, values).astype(np.int16).tobytes()))


def _other_label(folder):
    path = folder / f"S06.{lpba40.LABELS}.img.gz"
    values = np.frombuffer(gzip.decompress(path.read_bytes()), np.int16)
    path.write_bytes(gzip.compress(np.where(values == 166, 7, values).astype(np.int16).tobytes()))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_sixth, r"S06.delineation.structure.label: there is no such file, expected"),
        (_half, "S06.delineation.skullstripped cannot be read as NIfTI"),
        (_header, "S06.delineation.skullstripped cannot be read as Analyze"),
        (_without_hippocampus, "S06 lacks label 166, expected all of LPBA40"),
        (_other_label, "S06 holds label 7, expected those of LPBA40"),
    ],
)
def test_a_broken_person_of_lpba40_is_named(tmp_path, aligned, damage, sentence):
    damage(add_lpba(tmp_path / "in", "S06"))
    with pytest.raises(ValueError, match=sentence):
        call_lpba(tmp_path / "in", tmp_path / "out", fixed="S06")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["dataset.json"]


def test_a_brain_that_leaves_the_grid_is_named(tmp_path, aligned, monkeypatch):
    add_lpba(tmp_path / "in", "S01")
    away = np.eye(4)
    away[0, 3] = 90.0  # mm
    monkeypatch.setattr(classical, "align", lambda *args: away)
    with pytest.raises(ValueError, match="S01 lost the .* when it was aligned and cropped"):
        call_lpba(tmp_path / "in", tmp_path / "out")


def test_wrong_options_of_lpba40_are_one_sentence(tmp_path, aligned, capfd):
    add_lpba(tmp_path / "in", "S01")
    (tmp_path / "empty").mkdir()
    for source, options, sentence in (
        ("in", {"accept_terms": False}, "terms above are not accepted"),
        ("in", {"spacing": 5}, "spacing is 5, expected 1, 2 or 4"),
        ("in", {"fixed": "S02"}, "fixed is 'S02', expected one of S01"),
        ("empty", {}, "source has no file S01/S01.delineation.skullstripped.img.gz or alike"),
        ("nowhere", {}, "source is no folder, no archive and no address"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call_lpba(tmp_path / source, tmp_path / "out", **options)
    assert "licence of LONI" in capfd.readouterr().err
    shutil.copytree(tmp_path / "in", tmp_path / "in" / "again")
    with pytest.raises(ValueError, match="S01 is there twice"):
        call_lpba(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# archives ---------------------------------------------------------------------------------------


class Archives(http.server.BaseHTTPRequestHandler):
    """`files` below /, from the byte that is asked for; the first answer below /cut ends early."""

    files: dict[str, bytes] = {}
    asked: list[str] = []

    def do_GET(self):
        name, wanted = self.path.rsplit("/", 1)[1], self.headers["Range"]
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if name not in self.files or start >= len(self.files[name]):
            self.send_error(416 if name in self.files else 404)
            return
        rest = self.files[name][start:]
        self.send_response(206)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        cut = self.path.startswith("/cut/") and len(self.asked) == 1
        self.wfile.write(rest[: len(rest) // 2] if cut else rest)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine only."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Archives.files.clear()
    Archives.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Archives) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def packed(folder, kind):
    """The bytes of an archive of a folder."""
    made = shutil.make_archive(folder.parent / f"{folder.name}_packed", kind, folder)
    return Path(made).read_bytes()


@pytest.fixture
def small(tmp_path):
    """A folder to pack, with a file of 300 kB that does not pack well."""
    (tmp_path / "set" / "deep").mkdir(parents=True)
    content = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "set" / "deep" / "a.bin").write_bytes(content)
    return tmp_path / "set"


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_an_archive_and_its_address_give_the_same_folder(small, server, tmp_path, kind):
    Archives.files["set"] = packed(small, kind)
    (tmp_path / "archive").write_bytes(Archives.files["set"])
    before = archives.folder_of(tmp_path / "archive", tmp_path / "a")
    fetched = archives.folder_of(f"{server}/set", tmp_path / "b")
    assert fetched.parent == tmp_path / "b_source"
    for folder in (before, fetched):
        assert (folder / "deep" / "a.bin").read_bytes() == (small / "deep" / "a.bin").read_bytes()
    assert archives.folder_of(f"{server}/set", tmp_path / "b") == fetched
    assert Archives.asked == ["bytes=0-"]  # what is there is not fetched again
    assert archives.folder_of(small, tmp_path / "c") == small


def test_a_download_that_was_cut_goes_on(small, server, tmp_path):
    whole = Archives.files["set"] = packed(small, "zip")
    address, out = f"{server}/cut/set", tmp_path / "out"
    with pytest.raises(ValueError, match="run this again, and it goes on where it stopped"):
        archives.folder_of(address, out)
    (part,) = (tmp_path / "out_source").iterdir()
    held = part.stat().st_size
    assert 0 < held < len(whole) and part.read_bytes() == whole[:held]
    folder = archives.folder_of(address, out, hashlib.sha256(whole).hexdigest().upper())
    assert Archives.asked == ["bytes=0-", f"bytes={held}-"]
    assert (folder / "deep" / "a.bin").read_bytes() == (small / "deep" / "a.bin").read_bytes()


def test_another_sum_is_refused_and_fetched_anew(small, server, tmp_path):
    Archives.files["set"] = packed(small, "zip")
    right = hashlib.sha256(Archives.files["set"]).hexdigest()
    Archives.files["set"] = b"something else"
    with pytest.raises(ValueError, match=f"source has the sha256 .*, expected {right}"):
        archives.folder_of(f"{server}/set", tmp_path / "out", right)
    assert list((tmp_path / "out_source").iterdir()) == []
    mine = tmp_path / "mine.zip"
    mine.write_bytes(b"something else")
    with pytest.raises(ValueError, match="source has the sha256"):
        archives.folder_of(mine, tmp_path / "out", right)
    assert mine.exists()


def test_what_leads_out_of_the_folder_is_not_unpacked(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "file").write_text("x")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as held:
        held.write(inside / "file", "../../escaped")
    with tarfile.open(tmp_path / "a.tar", "w") as held:
        held.add(inside / "file", "../../escaped")
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
    with tarfile.open(tmp_path / "b.tar", "w") as held:
        held.addfile(link)
    before = sorted(tmp_path.iterdir())
    for name in ("a.zip", "a.tar", "b.tar"):
        with pytest.raises(ValueError, match="source cannot be unpacked: .* leads out of"):
            archives.folder_of(tmp_path / name, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_no_archive_is_one_sentence(small, server, tmp_path):
    (tmp_path / "short.tar.gz").write_bytes(packed(small, "gztar")[:50_000])
    (tmp_path / "text").write_text("no archive")
    (small / "numbers").write_text(" ".join(map(str, range(50_000))))  # this packs well
    torn = bytearray(packed(small, "xztar"))
    torn[-5_000] ^= 255
    (tmp_path / "torn.tar.xz").write_bytes(torn)
    secret = bytearray(packed(small, "zip"))
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # of a file, and of its entry
        place = secret.find(mark)
        while place >= 0:
            secret[place + flags] |= 1  # "encrypted"
            place = secret.find(mark, place + 1)
    (tmp_path / "secret.zip").write_bytes(secret)
    for source, sentence in (
        (tmp_path / "torn.tar.xz", "source cannot be unpacked: it is damaged, cut short"),
        (tmp_path / "secret.zip", "source is encrypted or packed in a rare way, expected a plain"),
        (tmp_path / "nowhere", "source is no folder, no archive and no address"),
        (tmp_path / "text", "source is a file, expected a zip or tar archive"),
        (tmp_path / "short.tar.gz", "source cannot be unpacked: it is damaged, cut short"),
        (f"{server}/missing", r"source cannot be fetched \(Not Found\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            archives.folder_of(source, tmp_path / "out")
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".regkit-")]


def test_lpba40_from_an_address_is_lpba40_from_its_folder(tmp_path, aligned, server):
    add_lpba(tmp_path / "in", "S01")
    Archives.files["lpba40.tar.gz"] = packed(tmp_path / "in", "gztar")
    call_lpba(tmp_path / "in", tmp_path / "folder")
    call_lpba(f"{server}/lpba40.tar.gz", tmp_path / "address")
    a, b = (prepared.subjects(tmp_path / out, "t1")[0] for out in ("folder", "address"))
    assert torch.equal(a.image, b.image) and torch.equal(a.labels, b.labels)


# IXI --------------------------------------------------------------------------------------------


def call_ixi(source, out, **options):
    ixi.main(source, out, **{"accept_terms": True, "spacing": 1, "sha256": None, **options})
    return json.loads((out / "dataset.json").read_text())


VOLUME = np.random.default_rng(0).normal(size=(3, 4, 5))


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize(
    "made",
    [
        (VOLUME.astype(np.float32), (VOLUME * 100).astype(np.int16)),
        [np.asfortranarray(VOLUME), VOLUME.astype(">f4"), VOLUME.T],  # the last is columns first
        (VOLUME > 0, VOLUME.astype(np.uint8), np.arange(3)),
        (VOLUME, VOLUME),  # one thing twice
    ],
)
def test_arrays_of_a_pickle_are_those_that_numpy_wrote(tmp_path, made, protocol):
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(made, protocol))
    found = arrays.arrays(tmp_path / "file.pkl")
    assert len(found) == len(made)
    for mine, theirs in zip(found, made):
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)


@pytest.mark.parametrize("made", [{"image": VOLUME}, VOLUME, "text", (VOLUME, 1.0), (VOLUME, b"1")])
def test_what_is_no_tuple_of_arrays_is_refused(tmp_path, made):
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(made, 4))
    with pytest.raises(ValueError, match="something other than arrays of numbers"):
        arrays.arrays(tmp_path / "file.pkl")


def test_without_fickling_one_sentence_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fickling.fickle", None)
    (tmp_path / "file.pkl").touch()
    with pytest.raises(ImportError, match="fickling is not installed, expected"):
        arrays.arrays(tmp_path / "file.pkl")


def test_ixi_has_30_structures_of_freesurfer():
    """The numbers that stand in the file of labels that comes with TransMorph."""
    assert len(ixi.STRUCTURES) == 30
    for number, name in ((17, "left hippocampus"), (53, "right hippocampus"), (2, "left cerebral")):
        assert ixi.STRUCTURES[number].startswith(name)
    assert {3, 42, 4, 43, 8, 47, 24, 14, 15, 16, 31, 63} < set(ixi.STRUCTURES)
    assert not {5, 26, 30, 44, 58, 62, 72, 77, 80, 85, 251} & set(ixi.STRUCTURES)


@pytest.mark.real
def test_the_structures_of_freesurfer_say_how_a_real_brain_lies(sample):
    """On the scan that comes with VoxelMorph, of the same size, labels and axes as those of IXI."""
    with np.load(sample("oasis_3d") / "vxm_subject.npz") as arrays:
        labels = arrays["seg"].astype(np.int16)
    found = layout.upright(labels[::2, ::2, ::2], (2, 2, 2), ixi.ENDS, "vxm_subject")
    assert np.array_equal(found[:3, :3] / 2, samples.OASIS_AFFINE[:3, :3])
    assert nibabel.aff2axcodes(found) == ("L", "I", "A")
    assert set(ixi.STRUCTURES) < set(np.unique(labels).tolist())


@pytest.mark.slow
def test_ixi_from_an_address_on_the_command_line(tmp_path, server):
    add_ixi(tmp_path / "in")
    Archives.files["ixi"] = packed(tmp_path / "in", "zip")
    command = [sys.executable, str(SCRIPTS / "ixi.py"), f"{server}/ixi", "--spacing", "2"]
    command += ["--out", str(tmp_path / "out"), "--accept-terms"]
    command += ["--sha256", hashlib.sha256(Archives.files["ixi"]).hexdigest()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "ShareAlike 3.0" in run.stderr
    assert "The whole set has 403, 58 and 115." in run.stderr
    assert "6 people: 3 for train, 1 for validation, 2 for test." in run.stdout
    assert prepared.subjects(tmp_path / "out", "t1")[0].image.shape == (1, 8, 12, 10)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_volumes_of_ixi_keep_their_values_and_turn_upright(tmp_path, protocol):
    out = tmp_path / "out"
    description = call_ixi(add_ixi(tmp_path / "in", protocol), out)
    assert description["complete"] and prepared.structures(out) == dict(
        sorted(ixi.STRUCTURES.items())
    )
    everyone = prepared.subjects(out, "t1")
    assert [s.name for s in everyone] == ["atlas", *(f"subject_{n}" for n in (0, 1, 2, 3, 4, 10))]
    image, labels = ixi_person(110)  # of Train, number 10
    found = everyone[-1]
    assert found.image.shape == (1, 16, 24, 20) and (np.diag(found.affine) == 1).all()
    for mine, theirs in ((found.image, image), (found.labels, labels)):
        turned = theirs.transpose(0, 2, 1)[::-1, :, ::-1]
        assert np.abs(mine[0].numpy() - turned).max() < 1e-6
    parts = {p: prepared.subjects(out, "t1", p) for p in prepared.SPLITS}
    assert [len(part) for part in parts.values()] == [1, 3, 1, 2]
    item = RandomPairs(parts["train"], 3, fixed=parts["fixed"][0])[0]
    assert item["moving"].shape == (1, 16, 24, 20) and item["name"].endswith("to atlas")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ixi", "lpba40"])
def test_dilformer_learns_from_what_the_scripts_prepare(tmp_path, aligned, name):
    """The recipes for the sets of Peng et al. (2026): from files, over a step, to Dice and HD95."""
    if name == "ixi":
        call_ixi(add_ixi(tmp_path / "in"), tmp_path / "out")
        changes = {
            "shape": (16, 24, 20),
            "options": {"channels": (6, 6, 12, 12)},
            "levels": (0.125, 0.25, 0.5, 1.0),
        }
    else:
        for k in range(3):
            add_lpba(tmp_path / "in", f"S0{k + 1}", k)
        call_lpba(tmp_path / "in", tmp_path / "out")
        changes = {}
    recipe = recipes.get(f"peng2026_{name}", "smoke", steps=2, validate_every=2, **changes)
    run = train(recipe, progress=False, device="cpu", data=tmp_path / "out")
    assert run.model.name == "dilformer" and len(run.history) == 2
    last = run.history[-1]
    assert np.isfinite([last["loss"], last["folding_percent"]]).all() and 0 < last["dice"] <= 1
    pairs, labels = evaluation_pairs(recipe, "validation", 1, tmp_path / "out")
    rows = evaluate(run.model, pairs, labels, distances=True)
    assert len(labels) == (30 if name == "ixi" else 54) and rows[0]["hd95"] >= 0


def test_the_parts_of_ixi_are_its_folders(tmp_path, monkeypatch, capfd):
    top = add_ixi(tmp_path / "in")
    numbers = iter(range(5, 1000))
    for part, count in (("Train", 403), ("Val", 58), ("Test", 115)):
        while len(list((top / part).iterdir())) < count:
            (top / part / f"subject_{next(n for n in numbers if n != 10)}.pkl").touch()
    (top / "Train" / "._subject_0.pkl").touch()  # as macOS leaves behind
    described = []
    monkeypatch.setattr(layout, "build", lambda *args: described.append(args[1]))
    ixi.main(top, tmp_path / "out", accept_terms=True)
    assert [len(d["subjects"]) for d in described] == [577]
    assert described[0]["subjects"][0] == {"name": "atlas", "split": "fixed", "labels": True}
    said = capfd.readouterr()
    assert "576 people: 403 for train, 58 for validation, 115 for test." in said.out
    assert "The whole set" not in said.err


class Harm:
    """What a file of strangers may hold: a call that runs when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def _stranger(path, person):
    save_ixi(path, person[0], Harm(path.parent / "harmed"))


def _stranger_inside(path, person):
    save_ixi(path, person[0], np.array([Harm(path.parent / "harmed")], dtype=object))


def _first_half(path, person):
    path.write_bytes(path.read_bytes()[:5000])


def _one_array(path, person):
    save_ixi(path, person[0])


def _flat(path, person):
    save_ixi(path, person[0][0], person[1][0])


def _other_size(path, person):
    save_ixi(path, *(x[:-1] for x in person))


def _in_bytes(path, person):
    save_ixi(path, person[0] * 255, person[1])


def _not_a_number(path, person):
    person[0][3, 3, 3] = np.nan
    save_ixi(path, *person)


def _blurred(path, person):
    save_ixi(path, person[0], person[1] / 2)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_stranger, "subject_4 cannot be read as a pickle of two arrays"),
        (_stranger_inside, "subject_4 cannot be read as a pickle of two arrays"),
        (_first_half, "subject_4 cannot be read as a pickle of two arrays"),
        (_one_array, "subject_4 holds something else, expected two volumes of one shape"),
        (_flat, "subject_4 holds something else, expected two volumes of one shape"),
        (_other_size, r"subject_4 has shape \(15, 20, 24\), expected the atlas' \(16, 20, 24\)"),
        (_in_bytes, "subject_4 has intensities from 0 to 25"),
        (_not_a_number, "subject_4 has intensities from nan to nan"),
        (_blurred, "subject_4 has labels from 0 to 31.5, expected whole numbers"),
    ],
)
def test_a_broken_person_of_ixi_is_named_and_nothing_is_run(tmp_path, damage, sentence):
    top = add_ixi(tmp_path / "in")
    damage(top / "Train" / "subject_4.pkl", ixi_person(7))
    with pytest.raises(ValueError, match=sentence):
        call_ixi(top, tmp_path / "out")
    assert not list(top.rglob("harmed")) and not (tmp_path / "out" / "subject_4").exists()
    assert (tmp_path / "out" / "subject_3").is_dir()


def test_wrong_options_of_ixi_are_one_sentence(tmp_path):
    top, out = add_ixi(tmp_path / "in"), tmp_path / "out"
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "IXI002-Guys-0828-T1.nii.gz").touch()
    shutil.copytree(top, tmp_path / "alone" / "IXI_data")
    for part in ("Train", "Val", "Test"):
        shutil.rmtree(tmp_path / "alone" / "IXI_data" / part)
    shutil.copytree(top, tmp_path / "headless")
    (tmp_path / "headless" / "atlas.pkl").unlink()
    shutil.copytree(top, tmp_path / "lying")
    image, labels = ixi_person(0)
    labels[labels == 16] = 0
    save_ixi(tmp_path / "lying" / "atlas.pkl", image, labels)
    shutil.copytree(top, tmp_path / "twice")
    shutil.copy(top / "Test" / "subject_1.pkl", tmp_path / "twice" / "Train")
    for source, options, sentence in (
        ("http://127.0.0.1:1/ixi", {"accept_terms": False}, "terms above are not accepted"),
        (top, {"spacing": 3}, "spacing is 3, expected 1, 2 or 4"),
        (raw, {}, "scans as IXI publishes them, which have no label maps"),
        (tmp_path / "headless", {}, "source has no file atlas.pkl in it"),
        (tmp_path / "alone", {}, "source has no file Train/subject_0.pkl or alike"),
        (tmp_path / "lying", {}, "atlas lacks label 16, which tells how its axes run"),
        (tmp_path / "twice", {}, "subject_1 is there twice"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call_ixi(source, out, **options)
    assert not out.exists()
