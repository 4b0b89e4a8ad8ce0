"""Wrong input gets one sentence that says what came and what is expected, and leaves no file."""

from __future__ import annotations

import gzip
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from typer.testing import CliRunner

import regkit
from regkit import cli, io, models


def save(path, values, affine=None):
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def good(folder, shape=(20, 22)):
    return save(folder / "good.nii.gz", np.random.default_rng(0).random(shape).astype("f4"))


def truncated(folder, suffix):
    """A file of which the second half is missing."""
    whole = save(folder / f"whole{suffix}", np.random.default_rng(0).random((20, 22, 24)))
    content = whole.read_bytes()
    path = folder / f"bad{suffix}"
    path.write_bytes(content[: len(content) // 2])
    return path


def text(folder, name="bad.nii"):
    (folder / name).write_text("not an image")
    return folder / name


def with_value(folder, value):
    values = np.ones((20, 22), "f4")
    values[3, 4] = value
    return save(folder / "bad.nii.gz", values)


def flat_header(folder):
    """The sform is all zeros, and there is no qform: nibabel never writes that, others do."""
    path = save(folder / "bad.nii", np.ones((20, 22), "f4"))
    content = bytearray(path.read_bytes())
    content[252:256] = bytes([0, 0, 1, 0])  # qform_code, sform_code
    content[280:328] = bytes(48)  # srow_x, srow_y, srow_z
    path.write_bytes(content)
    return path


def colour(folder):
    values = np.full((20, 22, 3), 7, np.uint8)
    values[3, 4, 2] = 8  # one bluish pixel
    picture = sitk.GetImageFromArray(values, isVector=True)
    sitk.WriteImage(picture, str(folder / "bad.png"))
    return folder / "bad.png"


def gzipped_rubbish(folder):
    with gzip.open(folder / "bad.nii.gz", "wb") as file:
        file.write(b"rubbish" * 100)
    return folder / "bad.nii.gz"


def coronal(folder):
    affine = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    return save(folder / "bad.nii", np.ones((20, 22, 1), "f4"), affine)


# what is given as `moving` (fixed is a good 2D image), and what the sentence must hold
FILES = {
    "missing": (lambda f: f / "nowhere.nii", "no such file"),
    "below a file": (lambda f: text(f) / "x.nii", "no such file"),
    "a folder": (lambda f: f, "is a folder, expected one image file"),
    "unknown type": (lambda f: text(f, "bad.docx"), "unknown type, expected one of .nii"),
    "text": (text, "cannot be read as NIfTI"),
    "text as mha": (lambda f: text(f, "bad.mha"), "cannot be read as MHA"),
    "empty file": (lambda f: (f / "e.nii").touch() or f / "e.nii", "cannot be read as NIfTI"),
    "rubbish in gzip": (gzipped_rubbish, "cannot be read as NIfTI"),
    "truncated": (lambda f: truncated(f, ".nii"), "cannot be read as NIfTI"),
    "truncated gzip": (lambda f: truncated(f, ".nii.gz"), "cannot be read as NIfTI"),
    "4D": (
        lambda f: save(f / "bad.nii", np.ones((4, 5, 6, 7), "f4")),
        r"shape \(4, 5, 6, 7\), expected a 2D or 3D image \(one volume",
    ),
    "5D": (
        lambda f: save(f / "bad.nii", np.ones((4, 5, 6, 1, 3), "f4")),
        r"shape \(4, 5, 6, 1, 3\), expected a 2D or 3D image",
    ),
    "NaN": (lambda f: with_value(f, np.nan), "1 NaN or infinite value, expected finite"),
    "infinity": (lambda f: with_value(f, np.inf), "1 NaN or infinite value, expected finite"),
    "colour": (colour, "3 values per pixel, expected a grey image"),
    "no affine": (flat_header, "matrix cannot be inverted"),
    "another plane": (coronal, "another plane than fixed"),
}
ARRAYS = {
    "1D": (lambda f: np.ones(5), r"shape \(5,\), expected a 2D or 3D image"),
    "empty array": (lambda f: np.ones((0, 5)), r"shape \(0, 5\), expected a 2D or 3D image"),
    "batch of two": (lambda f: np.ones((2, 1, 20, 22)), r"shape \(2, 1, 20, 22\), expected"),
    "NaN in a tensor": (lambda f: torch.full((20, 22), torch.nan), "440 NaN or infinite values"),
    "complex": (lambda f: np.ones((20, 22), complex), "complex128 values, expected real"),
    "colour array": (lambda f: np.ones((20, 22, 3), "u1"), "looks like a colour picture, expected"),
    "colours first": (lambda f: torch.ones(1, 3, 20, 22), "looks like a colour picture, expected"),
    "3D with 2D": (
        lambda f: np.ones((20, 22, 24)),
        r"moving is 3D \(20, 22, 24\) and fixed 2D \(20, 22\), expected the same number of axes",
    ),
    "other shape": (
        lambda f: np.ones((20, 23)),
        r"moving has shape \(20, 23\) and fixed \(20, 22\), expected the same",
    ),
    "no image at all": (lambda f: 7, "of type int, expected a path, a nibabel image, an array"),
}


@pytest.mark.parametrize("case", [*FILES, *ARRAYS])
def test_images_that_cannot_be_registered(case, tmp_path):
    make, sentence = (FILES | ARRAYS)[case]
    fixed = good(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        regkit.register(make(tmp_path), fixed, "affine")
    check_sentence(str(caught.value), sentence)
    assert str(caught.value).startswith("moving")


@pytest.mark.parametrize("case", FILES)
def test_the_command_line_says_the_same_and_leaves_nothing(case, tmp_path):
    make, sentence = FILES[case]
    bad, fixed = make(tmp_path), good(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    command = ["register", str(bad), str(fixed), "-o", str(out), "--method", "affine"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2 and result.stdout == ""
    check_sentence(result.stderr.split("regkit: ", 1)[1], sentence)
    assert "Traceback" not in result.stderr and str(tmp_path) not in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def check_sentence(message: str, expected: str) -> None:
    assert re.search(expected, message), message
    message = message.strip()
    assert message.endswith(".") and "\n" not in message
    assert len(re.findall(r"\.(?:\s|$)", message)) == 1, f"more than one sentence: {message}"


SETTINGS = {
    "unknown method": ({"method": "vxm_dif"}, "method is 'vxm_dif', .* did you mean 'vxm_diff'"),
    "nothing like it": ({"method": "xyzzy"}, "method is 'xyzzy', expected one of auto, rigid"),
    "no such weights": ({"method": "nowhere.safetensors"}, "nowhere.safetensors.* expected"),
    "a model without weights": (
        {"method": "vxm2"},
        "no 2D weights are shipped, expected a weights",
    ),
    "affine and method": (
        {"method": "rigid", "affine": "affine"},
        "affine is 'affine' and method 'rigid', expected one of them alone",
    ),
    "affine": ({"affine": "similarity"}, "affine is 'similarity', expected 'auto', 'rigid'"),
    "negative steps": ({"refine": -1}, "refine is -1, expected a number of steps, 0 or more"),
    "half a step": ({"refine": 0.5}, "refine is 0.5, expected a number of steps"),
    "device": ({"device": "abacus"}, "device is 'abacus', expected 'auto', 'cpu' or 'cuda'"),
    "another device": ({"device": "meta"}, "device is 'meta', expected 'auto', 'cpu' or 'cuda'"),
    "one label map": ({"moving_labels": np.ones((20, 22), int)}, "fixed_labels is missing"),
    "labels of another shape": (
        {"moving_labels": np.ones((20, 23), int), "fixed_labels": np.ones((20, 22), int)},
        r"moving_labels has shape \(20, 23\), expected that of its image, \(20, 22\)",
    ),
    "labels that are no labels": (
        {"moving_labels": np.full((20, 22), 0.5), "fixed_labels": np.ones((20, 22), int)},
        "moving_labels holds values that are not whole numbers",
    ),
    "labels in one image only": (
        {"moving_labels": np.full((20, 22), 1), "fixed_labels": np.full((20, 22), 2)},
        "share no label, expected at least one",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_make_no_sense(case):
    changes, sentence = SETTINGS[case]
    image = np.random.default_rng(0).random((20, 22))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        regkit.register(image, image, **{"method": "rigid", **changes})
    check_sentence(str(caught.value), sentence)


def test_labels_that_lie_elsewhere(tmp_path):
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((20, 22, 1)), np.eye(4))
    labels = nibabel.Nifti1Image(np.ones((20, 22, 1), np.int16), np.diag([2, 2, 2, 1]))
    with pytest.raises(ValueError, match=r"^moving_labels lies elsewhere in space") as caught:
        regkit.register(image, image, "affine", moving_labels=labels, fixed_labels=labels)
    check_sentence(str(caught.value), "expected one grid")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none():
    image = np.random.default_rng(0).random((20, 22))
    with pytest.raises(ValueError, match="PyTorch sees no such GPU here") as caught:
        regkit.register(image, image, "rigid", device="cuda")
    check_sentence(str(caught.value), "device is 'cuda'")


def test_a_network_of_another_dimension(tmp_path):
    models.save(models.create("vxm", ndim=3), tmp_path / "w.safetensors")
    image = np.random.default_rng(0).random((20, 22))
    with pytest.raises(ValueError, match="3D network and the images are 2D") as caught:
        regkit.register(image, image, tmp_path / "w.safetensors")
    check_sentence(str(caught.value), "w.safetensors")


def test_weights_of_another_program(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"PK\x03\x04 a pickle, perhaps")
    image = np.random.default_rng(0).random((20, 22))
    with pytest.raises(ValueError, match="safetensors") as caught:
        regkit.register(image, image, tmp_path / "w.safetensors")
    check_sentence(str(caught.value), "expected")


# places that cannot be read or written ----------------------------------------------------------


def test_an_output_that_is_a_file(tmp_path):
    image = good(tmp_path)
    for out in (image, image / "below"):
        result = CliRunner().invoke(
            cli.app, ["register", str(image), str(image), "-o", str(out), "--method", "affine"]
        )
        assert result.exit_code == 2 and "out is a file or lies below one" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["good.nii.gz"]


def test_an_output_that_cannot_be_written(tmp_path, monkeypatch):
    """Also where the test runs as root, who may write everywhere."""
    image = good(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    result = CliRunner().invoke(
        cli.app,
        ["register", str(image), str(image), "-o", str(tmp_path / "o"), "--method", "affine"],
    )
    assert result.exit_code == 2
    check_sentence(result.stderr, "out: the folder cannot be written")
    assert [p.name for p in tmp_path.iterdir()] == ["good.nii.gz"]


def test_an_image_that_may_not_be_read(tmp_path, monkeypatch):
    image = good(tmp_path)

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(image), "open", refuse)
    with pytest.raises(ValueError) as caught:
        io.read(image, "moving")
    check_sentence(str(caught.value), "moving: the file may not be read")


@contextmanager
def as_ordinary_user():
    """Root may read and write everywhere, so as root go on as nobody for a while."""
    root = os.geteuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)


def test_permissions_of_the_file_system():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to others
        folder = Path(name)
        folder.chmod(0o755)
        image, closed = good(folder), folder / "closed"
        closed.mkdir(mode=0o555)
        image.chmod(0)
        with as_ordinary_user():
            with pytest.raises(ValueError, match="out: the folder cannot be written"):
                io.check_writable(closed / "out")
            with pytest.raises(ValueError, match="moving: the file may not be read"):
                io.read(image, "moving")


def test_a_full_disk_leaves_nothing_and_names_no_path(tmp_path, monkeypatch):
    image = good(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(nibabel, "save", full)
    result = CliRunner().invoke(
        cli.app,
        ["register", str(image), str(image), "-o", str(tmp_path / "o"), "--method", "affine"],
    )
    assert result.exit_code == 2
    check_sentence(result.stderr.splitlines()[-1], "No space left on device")
    assert str(tmp_path) not in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["good.nii.gz"]


# displacements ----------------------------------------------------------------------------------

DISPLACEMENTS = {
    "missing": (lambda f: f / "nowhere.nii", "no such file"),
    "a folder": (lambda f: f, "is a folder, expected one displacement file"),
    "text": (text, "cannot be read as NIfTI"),
    "an image": (good, r"shape \(20, 22\), expected \(X, Y, Z, 1, 3\)"),
    "NaN": (
        lambda f: save(f / "d.nii", np.full((20, 22, 1, 1, 3), np.nan, "f4")),
        "holds NaN or infinite values",
    ),
}


@pytest.mark.parametrize("case", DISPLACEMENTS)
def test_displacements_that_are_none(case, tmp_path):
    make, sentence = DISPLACEMENTS[case]
    bad, image = make(tmp_path), good(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command = ["apply", str(image), str(bad), "-o", str(tmp_path / "out.nii.gz")]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2
    check_sentence(result.stderr.split("regkit: ", 1)[1], sentence)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_displacement_of_another_dimension(tmp_path):
    image = good(tmp_path)
    disp = save(tmp_path / "d.nii", np.zeros((20, 22, 5, 1, 3), "f4"))
    command = ["apply", str(image), str(disp), "-o", str(tmp_path / "out.nii.gz")]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2
    check_sentence(result.stderr, r"image is 2D \(20, 22\) and disp 3D, expected the same")


@pytest.mark.parametrize("name", ["out.png", "out", "good.nii.gz/out.nii"])
def test_apply_wants_a_nifti_file_name(tmp_path, name):
    image = good(tmp_path)
    disp = save(tmp_path / "d.nii", np.zeros((20, 22, 1, 1, 3), "f4"))
    result = CliRunner().invoke(
        cli.app, ["apply", str(image), str(disp), "-o", str(tmp_path / name)]
    )
    assert result.exit_code == 2 and "out" in result.stderr and "expected" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.nii", "good.nii.gz"]
