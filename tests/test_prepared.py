"""Prepared sets are not trusted: dataset.json, headers, images, labels and landmarks."""

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from standins import AFFINE, TABLE, add_case, add_person, brats, oasis

from regkit.data import prepared
from regkit.models import Registration
from regkit.training.evaluation import evaluate

LARGE = 40001  # a label beyond 2^15, such as FreeSurfer's atlases have


def save(folder, shape=(6, 8), names=("a", "b", "c"), contrasts=("t1",), **changes):
    """A set of noise whose every second voxel has the label LARGE."""
    entries = [{"name": name, "split": "train", "labels": True} for name in names]
    random = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for contrast in contrasts:
            write(folder / name / f"{contrast}.nii.gz", random.random(shape, np.float32))
        labels = LARGE * (np.indices(shape).sum(0) % 2)
        write(folder / name / "labels.nii.gz", labels.astype(np.int32))
    held = {"name": "set", "contrasts": list(contrasts), "complete": True, "subjects": entries}
    (folder / "dataset.json").write_text(json.dumps(held | changes))
    return folder


def write(path, values, affine=None):
    nibabel.save(
        nibabel.Nifti1Image(values[..., None], np.eye(4) if affine is None else affine), path
    )


# dataset.json -----------------------------------------------------------------------------------


def entry(**changes):
    return {"subjects": [{"name": "a", "split": "train", "labels": True, **changes}]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        # no JSON, or not that of an object
        (b"", "dataset.json cannot be read, expected that of a prepared set"),
        (b'{"name": "set"', "dataset.json cannot be read"),
        (b"\xff\xfe\x00\x01", "dataset.json cannot be read"),
        (b"[" * 100_000, "dataset.json cannot be read"),
        (b'{"subjects": ' + b"9" * 5000 + b"}", "dataset.json cannot be read"),
        (b"null", "dataset.json has None, expected an object"),
        (b"[1, 2]", r"dataset.json has \[1, 2\], expected an object"),
        # fields of another kind
        ({"name": 3}, "dataset.json has 3 for name, expected a plain name"),
        ({"name": "../set"}, r"dataset.json has '../set' for name, expected a plain name"),
        ({"contrasts": "t1"}, "dataset.json has 't1' for contrasts, expected a list"),
        ({"contrasts": [1]}, r"dataset.json has \[1\] for contrasts, expected plain names"),
        ({"contrasts": ["../t1"]}, "for contrasts, expected plain names of images"),
        ({"contrasts": ["labels"]}, "for contrasts, expected plain names of images"),
        ({"contrasts": ["t1", "t1"]}, "for contrasts, expected each name once"),
        ({"subjects": {"a": 1}}, "for subjects, expected a list with an object for each"),
        ({"subjects": ["a"]}, "dataset.json has 'a' for subjects, expected an object for each"),
        ({"settings": []}, r"dataset.json has \[\] for settings, expected an object"),
        ({"complete": "yes"}, "dataset.json has 'yes' for complete, expected true or false"),
        ({"structures": ["a"]}, "for structures, expected an object of names by label"),
        ({"structures": {"one": "a"}}, "for structures, expected names by label"),
        ({"structures": {"1": 2}}, "for structures, expected names by label"),
        ({"structures": {"0": "a"}}, r"for structures, expected labels from 1 to 2\^31 - 1"),
        ({"structures": {"9999999999": "a"}}, r"for structures, expected labels from 1 to"),
        # subjects
        ({"subjects": [{"split": "train"}]}, "has None for a subject's name, expected the plain"),
        (entry(name=7), "dataset.json has 7 for a subject's name, expected the plain name"),
        (entry(name=""), "has '' for a subject's name"),
        (entry(name=".."), "has '..' for a subject's name"),
        (entry(name="../../elsewhere"), "has '../../elsewhere' for a subject's name"),
        (entry(name="/etc"), "has '/etc' for a subject's name"),
        (entry(name="C:\\a"), "for a subject's name, expected the plain name"),
        (entry(name="a\u0000b"), "for a subject's name, expected the plain name"),
        (entry(name="\ud800"), "for a subject's name, expected the plain name"),
        (entry(name=".hidden"), "for a subject's name, expected the plain name"),
        (entry(name="a" * 300), "for a subject's name, expected the plain name"),
        (entry(name="dataset.json"), "for a subject's name, expected the plain name"),
        (entry(split="learn"), "has 'learn' for the split of a, expected one of fixed, train"),
        (entry(split=["train"]), "for the split of a, expected one of fixed, train"),
        (entry(labels="no"), "has 'no' for the labels of a, expected true or false"),
        (entry(category=3), "has 3 for the category of a, expected a text"),
        ({"subjects": 2 * entry()["subjects"]}, "dataset.json lists 'a' twice, expected each"),
    ],
)  # fmt: skip
def test_a_damaged_description_is_one_sentence(tmp_path, content, sentence):
    folder = save(tmp_path / "set")
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / "dataset.json").read_text()) | content).encode()
    (folder / "dataset.json").write_bytes(content)
    for ask in (
        prepared.description,
        prepared.structures,
        lambda f: prepared.check(f, ("t1",)),
        lambda f: prepared.subjects(f, "t1"),
    ):
        with pytest.raises(ValueError, match=sentence) as caught:
            ask(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_set_of_pairs_names_a_category_for_each(tmp_path):
    folder = save(tmp_path / "set", contrasts=prepared.SIDES)
    with pytest.raises(ValueError, match="has None for the category of a, expected a text"):
        prepared.pairs(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"contrasts": []}, "dataset.json lists no contrasts, expected at least one"),
        ({"subjects": []}, "dataset.json lists no subjects, expected at least one"),
        ({"complete": False}, "folder is not complete: run the script that makes it again"),
    ],
)
def test_a_set_with_nothing_in_it_is_one_sentence(tmp_path, changes, sentence):
    folder = save(tmp_path / "set", **changes)
    assert prepared.description(folder)["name"] == "set"
    with pytest.raises(ValueError, match=sentence):
        prepared.check(folder, ("t1",))


# images -----------------------------------------------------------------------------------------


def other_shape(folder, key):
    write(folder / "b" / f"{key}.nii.gz", np.zeros((5, 8), np.float32))


def not_a_number(folder, key):
    write(folder / "b" / f"{key}.nii.gz", np.full((6, 8), np.nan, np.float32))


def in_bytes(folder, key):
    write(folder / "b" / f"{key}.nii.gz", np.full((6, 8), 255, np.float32))


def elsewhere(folder, key):
    affine = np.eye(4)
    affine[0, 3] = 3
    write(folder / "b" / f"{key}.nii.gz", np.ones((6, 8), np.float32), affine)


def halves(folder, key):
    write(folder / "b" / f"{key}.nii.gz", np.full((6, 8), 0.5, np.float32))


def cut_short(folder, key):
    file = folder / "b" / f"{key}.nii.gz"
    file.write_bytes(file.read_bytes()[:40])


def missing(folder, key):
    (folder / "b" / f"{key}.nii.gz").unlink()


@pytest.mark.parametrize(
    ("damage", "key", "sentence"),
    [
        (other_shape, "t1", r"b, t1 has shape \(5, 8\), expected \(6, 8\) as the first of the set"),
        (other_shape, "labels", r"b, labels has shape \(5, 8\), expected \(6, 8\) as the first"),
        (not_a_number, "t1", "b, t1 "),
        (in_bytes, "t1", "b, t1 has intensities from 255 to 255, expected 0 to 1"),
        (elsewhere, "labels", "b, labels lies elsewhere than t1, expected one grid for both"),
        (halves, "labels", "b, labels holds values that are not whole numbers"),
        (cut_short, "t1", "b, t1 cannot be read as NIfTI"),
        (missing, "t1", "b, t1: there is no such file"),
        (missing, "labels", "b, labels: there is no such file"),
    ],
)
def test_a_damaged_image_is_named_and_others_are_read(tmp_path, damage, key, sentence):
    folder = save(tmp_path / "set")
    damage(folder, key)
    read = prepared.subjects(folder, "t1")
    assert read[0].name == "a" and read[2].name == "c"
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        read[1]


def test_headers_tell_what_does_not_fit_before_anything_is_read(tmp_path):
    folder = save(tmp_path / "set", contrasts=("t1", "t2"))
    assert prepared.check(folder, ("t1", "t2")) == (6, 8)
    write(folder / "c" / "t2.nii.gz", np.zeros((6, 9), np.float32))
    assert prepared.check(folder, ("t1",)) == (6, 8)
    with pytest.raises(ValueError, match=r"c, t2 has shape \(6, 9\), expected \(6, 8\)"):
        prepared.check(folder, ("t1", "t2"))
    write(folder / "c" / "t2.nii.gz", np.zeros((6, 8), np.float32), np.diag([1, 2.0, 1, 1]))
    with pytest.raises(ValueError, match="c, t2 has voxels of 1 x 2 mm, expected 1 x 1 mm"):
        prepared.check(folder, ("t1", "t2"))
    save(tmp_path / "set", contrasts=("t1", "t2"))
    elsewhere(folder, "labels")
    with pytest.raises(ValueError, match="b, labels lies elsewhere than t1, expected one grid"):
        prepared.check(folder, ("t1", "t2"))


@pytest.mark.parametrize("shape", [(6, 8, 1), (6, 1, 8), (1, 6, 8)])
def test_a_slice_may_lie_across_any_axis_and_in_any_unit(tmp_path, shape):
    """As headers tell it and as it is read: one shape, in mm."""
    folder = save(tmp_path / "set", names=("a", "b"))
    for name in ("a", "b"):
        for key, kind in (("t1", np.float32), ("labels", np.int32)):
            image = nibabel.Nifti1Image(np.ones(shape, kind), np.diag([2000.0, 2000, 2000, 1]))
            image.header.set_xyzt_units("micron")
            nibabel.save(image, folder / name / f"{key}.nii.gz")
    assert prepared.check(folder, ("t1",)) == (6, 8)
    subject = prepared.subjects(folder, "t1")[1]
    assert subject.image.shape == (1, 6, 8) and subject.spacing == pytest.approx((2, 2))
    for key, kind in (("t1", np.float32), ("labels", np.int32)):  # the same numbers, in mm
        image = nibabel.Nifti1Image(np.ones(shape, kind), np.diag([2000.0, 2000, 2000, 1]))
        image.header.set_xyzt_units("mm")
        nibabel.save(image, folder / "b" / f"{key}.nii.gz")
    with pytest.raises(ValueError, match="b, t1 has voxels of 2000 x 2000 mm, expected 2 x 2 mm"):
        prepared.check(folder, ("t1",))


@pytest.mark.parametrize(
    ("affine", "said"),
    [
        (np.diag([-1.0, 1, 1, 1]), "L, A"),
        (np.eye(4)[[1, 0, 2, 3]], "A, R"),
        (np.diag([1.0, -1, 1, 1])[[0, 2, 1, 3]], "R, I"),
        (np.eye(4)[[0, 2, 1, 3]], None),  # a coronal slice: right, superior
        (np.eye(4)[[2, 0, 1, 3]], None),  # a sagittal one: anterior, superior
    ],
)
def test_axes_run_as_the_scripts_turn_them(tmp_path, affine, said):
    """`register` turns an image to R, A, S before a network sees it."""
    folder = save(tmp_path / "set", names=("a",))
    for key, kind in (("t1", np.float32), ("labels", np.int32)):
        write(folder / "a" / f"{key}.nii.gz", np.zeros((6, 8), kind), affine)
    if said is None:
        assert prepared.check(folder, ("t1",)) == (6, 8)
        return
    with pytest.raises(ValueError, match=f"a, t1 has axes to {said}, expected to R, A and S in"):
        prepared.check(folder, ("t1",))


def test_a_slice_of_subjects_is_lazy_and_shares_what_is_held(tmp_path):
    folder = save(tmp_path / "set")
    missing(folder, "t1")
    everyone = prepared.subjects(folder, "t1")
    part = everyone[1:]
    assert len(part) == 2 and [s.name for s in everyone[::2]] == ["a", "c"]
    assert part[-1] is everyone[2] and part[1] is everyone[-1]
    with pytest.raises(IndexError):
        part[2]


# labels and landmarks ---------------------------------------------------------------------------


def test_a_label_beyond_two_bytes_keeps_its_value(tmp_path):
    """Also through the warp and the Dice of an evaluation."""
    folder = save(tmp_path / "set", structures={str(LARGE): "every second voxel"})
    subject = prepared.subjects(folder, "t1")[0]
    assert subject.labels.dtype == torch.int32 and subject.labels.unique().tolist() == [0, LARGE]

    def one_voxel(moving, fixed):
        disp = torch.zeros(1, 2, 6, 8)
        disp[:, 1] = 1  # every second voxel then lies on none of them
        return Registration(moving, disp)

    labels = list(prepared.structures(folder))
    (row,) = evaluate(one_voxel, [(subject, subject)], labels)
    assert row["dice_before"] == 1 and row["dice_per_label"] == {LARGE: 0.0}


def test_scripts_keep_labels_beyond_two_bytes(tmp_path):
    case = add_case(tmp_path / "brats", "BraTS19_X_1", 0)
    file = case / f"{case.name}_seg.nii.gz"
    values = np.asarray(nibabel.load(file).dataobj).astype(np.int32) // 4 * LARGE
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), file)
    brats.main([tmp_path / "brats"], tmp_path / "a", accept_terms=True, size=20)
    assert prepared.subjects(tmp_path / "a", "t1")[0].labels.unique().tolist() == [0, LARGE]

    for number in (1, 2):
        person = add_person(tmp_path / "oasis", number, ndim=2)
        file = person / "slice_seg24.nii.gz"
        image = nibabel.load(file)
        values = np.where(np.asarray(image.dataobj) == 1, LARGE, 0).astype(np.int32)
        nibabel.save(nibabel.Nifti1Image(values, image.affine), file)
    (tmp_path / "oasis" / "seg24_labels.txt").write_text(f"{TABLE}  {LARGE}  Large  0 0 0 0\n")
    oasis.main(tmp_path / "oasis", tmp_path / "b", accept_terms=True, ndim=2)
    assert prepared.structures(tmp_path / "b")[LARGE] == "Large"
    assert prepared.subjects(tmp_path / "b", "t1")[0].labels.unique().tolist() == [0, LARGE]


@pytest.fixture
def paired(tmp_path):
    folder = save(tmp_path / "set", names=("a",), contrasts=prepared.SIDES, **entry(category="S"))
    points(folder).write_text("fixed_0,fixed_1,moving_0,moving_1\n1,2,3,4\n5,6,7,8.5\n")
    return folder


def points(folder: Path) -> Path:
    return folder / "a" / "points.csv"


def test_landmarks_are_those_of_the_file(paired):
    ((moving, fixed),) = prepared.pairs(paired)
    assert moving.points.tolist() == [[3, 4], [7, 8.5]] and fixed.points.tolist() == [
        [1, 2],
        [5, 6],
    ]
    points(paired).unlink()
    assert prepared.pairs(paired)[0][1].points.shape == (0, 2)


@pytest.mark.parametrize(
    "content",
    [
        b"fixed_0,fixed_1\n1,2\n",
        b"fixed_0,fixed_1,moving_0,moving_1\n1,2,three,4\n",
        b"fixed_0,fixed_1,moving_0,moving_1\n1,2,nan,4\n",
        b"fixed_0,fixed_1,moving_0,moving_1\n1,2,3\n",
        b"fixed_0,fixed_1,moving_0,moving_1\n1,2,3,\xff\n",
        b"fixed_0,fixed_1,moving_0,moving_1\n1,2,3,\x00\n",
    ],
)
def test_damaged_landmarks_are_one_sentence(paired, content):
    points(paired).write_bytes(content)
    sentence = "a, points.csv cannot be read, expected the columns moving_0, moving_1 and finite"
    with pytest.raises(ValueError, match=sentence):
        prepared.pairs(paired)[0]


def test_a_file_that_is_no_folder_of_a_set_is_one_sentence(tmp_path):
    shutil.copy(__file__, tmp_path / "file")
    for folder in (tmp_path / "file", tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="folder has no dataset.json, expected a"):
            prepared.description(folder)
