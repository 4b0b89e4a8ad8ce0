"""Wrong input gets one sentence that says what came and what is expected, and leaves no file."""

from __future__ import annotations

import gzip
import os
import re
import struct
import tempfile
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from typer.testing import CliRunner

import regkit
from regkit import cli, files, io, models
from regkit.classical.greedy import _Level
from regkit.device import enough_memory, free_memory


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


# files of strangers ----------------------------------------------------------------------------


def claims(folder, shape, suffix, offset=None):
    """A small NIfTI file whose header claims another shape."""
    raw = bytearray(nibabel.Nifti1Image(np.zeros((12, 13, 11)), np.eye(4)).to_bytes())
    struct.pack_into("<4h", raw, 40, 3, *shape)
    path = folder / f"m{suffix}"
    path.write_bytes(gzip.compress(bytes(raw)) if suffix.endswith("gz") else bytes(raw))
    return path


def peak_of(work) -> int:
    """How many bytes more than before were held at once (by Python and NumPy) while it ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("shape", [(2000, 1000, 500), (32767, 32767, 32767), (-3, 13, 11)])
def test_a_claim_that_the_file_cannot_hold_takes_no_memory(suffix, shape, tmp_path):
    path = claims(tmp_path, shape, suffix)

    def refused():
        with pytest.raises(ValueError) as caught:
            io.read(path, "moving")
        check_sentence(str(caught.value), "moving cannot be read as NIfTI: the file is cut short")

    assert peak_of(refused) < 50e6


def test_a_header_of_text_claims_nothing_either(tmp_path):
    for packed in ("False", "True"):
        (tmp_path / "m.mha").write_text(
            f"ObjectType = Image\nNDims = 3\nDimSize = 1500 1500 1500\nElementType = MET_UCHAR\n"
            f"CompressedData = {packed}\nElementDataFile = LOCAL\n"
        )
        with pytest.raises(ValueError, match="moving cannot be read as MHA"):
            io.read(tmp_path / "m.mha", "moving")


@pytest.mark.parametrize("suffix", [".nii.gz", ".mgz", ".mha", ".nrrd", ".png"])
def test_a_bit_that_has_turned_over_is_seen_by_its_checksum(suffix, tmp_path):
    """Each of 60 single bits of the second half: refused, or the voxels are what they were."""
    values = np.random.default_rng(0).integers(0, 200, (20, 22)).astype("u1")
    good_path, path = tmp_path / f"good{suffix}", tmp_path / f"bad{suffix}"
    if suffix in (".nii.gz", ".mgz"):
        make = nibabel.MGHImage if suffix == ".mgz" else nibabel.Nifti1Image
        nibabel.save(make(values[..., None], np.eye(4)), good_path)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(values), str(good_path), True)
    content, whole = good_path.read_bytes(), io.read(good_path).data
    refused = 0
    for bit in np.random.default_rng(1).integers(4 * len(content), 8 * len(content), 60):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bytes(damaged))
        try:
            assert torch.equal(io.read(path).data, whole)
        except ValueError as error:
            check_sentence(str(error), "cannot be read as")
            refused += 1
    assert refused > 45


def test_a_picture_that_is_cut_short_is_not_filled_with_grey(tmp_path):
    values = np.random.default_rng(0).integers(0, 200, (60, 62)).astype("u1")
    for suffix in (".jpg", ".png", ".tif"):
        path = tmp_path / f"m{suffix}"
        sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match="cut short"):
            io.read(path)


ELSEWHERE = ["../secret.raw", "{secret}", "LIST", "s%d.raw 1 3 1", "link.raw", "..", "C:secret.raw"]


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("suffix", [".mhd", ".mha", ".nhdr", ".nrrd"])
def test_a_header_that_names_a_file_elsewhere(suffix, name, tmp_path):
    """SimpleITK itself reads it, wherever it lies."""
    inside = tmp_path / "inside"
    inside.mkdir()
    secret = tmp_path / "secret.raw"
    kind = ".mhd" if suffix[1] == "m" else ".nhdr"
    sitk.WriteImage(sitk.Image([20, 22], sitk.sitkFloat32) + 77, str(inside / f"m{kind}"))
    (inside / "m.raw").rename(secret)
    (inside / "link.raw").symlink_to(secret)
    text = (inside / f"m{kind}").read_text()
    name = name.format(secret=secret)
    (inside / f"m{suffix}").write_text(text.replace("m.raw", name))
    if name == str(secret) and suffix == kind:
        assert (sitk.GetArrayFromImage(sitk.ReadImage(str(inside / f"m{kind}"))) == 77).all()
    sentence = "expected data in the file itself or in a file of a plain name beside it"
    decoy = "Comment = ElementDataFile = LOCAL\n" if suffix[1] == "m" else ""
    for front in ("", decoy):
        (inside / f"m{suffix}").write_text(front + text.replace("m.raw", name))
        with pytest.raises(ValueError) as caught:
            io.read(inside / f"m{suffix}", "moving")
        check_sentence(str(caught.value), sentence)
    (inside / "beside.raw").write_bytes(secret.read_bytes())
    (inside / f"m{suffix}").write_text(text.replace("m.raw", "beside.raw"))
    assert (io.read(inside / f"m{suffix}").data == 77).all()


def test_a_field_that_overwrites_memory_in_the_reader_of_itk(tmp_path):
    """It ended the process with a segmentation fault."""
    image = sitk.Image([20, 22, 24], sitk.sitkFloat32)
    for suffix, fields in ((".nrrd", ("space origin", "kinds")), (".mha", ("Offset", "DimSize"))):
        path = tmp_path / f"m{suffix}"
        sitk.WriteImage(image, str(path))
        content = path.read_bytes()
        for field in fields:
            line = re.compile(rb"(" + field.encode() + rb" ?[=:] ?)[^\n]*")
            path.write_bytes(line.sub(rb"\1" + b"a" * 5000, content, count=1))
            with pytest.raises(ValueError, match="cannot be read as"):
                io.read(path)


def test_the_suffix_chooses_the_reader(tmp_path):
    """Other readers of ITK look at the content, and their formats may name files elsewhere."""
    sitk.WriteImage(sitk.Image([20, 22], sitk.sitkUInt8), str(tmp_path / "m.mha"))
    (tmp_path / "m.mha").rename(tmp_path / "m.png")
    with pytest.raises(ValueError, match="moving cannot be read as PNG"):
        io.read(tmp_path / "m.png", "moving")


# what ends a command ------------------------------------------------------------------------------

ENDS = {
    "our sentence": (ValueError("x is 1, expected 2."), 2, "x is 1, expected 2."),
    "Python's words": (ValueError("too many values to unpack"), 1, "ValueError: .* a fault of"),
    "a fault": (KeyError("split"), 1, "KeyError: this is a fault of regkit's"),
    "memory": (MemoryError(), 2, "The memory is too small"),
    "memory of PyTorch": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
        2,
        "The memory is too small",
    ),
    "memory of a GPU": (torch.OutOfMemoryError("CUDA out of memory."), 2, "memory is too small"),
    "a missing package": (
        ModuleNotFoundError("No module named 'x'", name="x"), 2, "The package x is not installed",
    ),
    "the system": (OSError(28, "No space left", "/home/me"), 2, "failed: No space left"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "stopped"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_whatever_happens_a_command_ends_in_one_sentence(case, monkeypatch):
    error, code, sentence = ENDS[case]

    def stop():
        raise error

    monkeypatch.setattr(models, "names", stop)
    result = CliRunner().invoke(cli.app, ["models"])
    assert result.exit_code == code
    assert result.stderr.startswith("regkit: ")
    check_sentence(result.stderr.removeprefix("regkit: "), sentence)
    assert "/home/me" not in result.stderr


@pytest.mark.parametrize("case", ["memory of PyTorch", "memory of a GPU", "Ctrl-C"])
def test_an_engine_that_stops_half_way_leaves_nothing(case, tmp_path, monkeypatch):
    error, code, _ = ENDS[case]
    levels = []

    def climb(self, maps, steps):
        levels.append(steps)
        yield 1.0
        if len(levels) > 1:
            raise error

    monkeypatch.setattr(_Level, "climb", climb)
    images = [
        save(tmp_path / f"{name}.nii", np.random.default_rng(k).random((60, 64), np.float32))
        for k, name in enumerate(("moving", "fixed"))
    ]
    options = ["--method", "greedy", "--affine", "none", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, ["register", *map(str, images), *options])
    assert result.exit_code == code and len(levels) > 1, result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fixed.nii", "moving.nii"]
    last = result.stderr.strip().splitlines()[-1]
    check_sentence(last, "stopped" if code == 130 else r"memory|grid of \(60, 64\) voxels")


def test_the_traceback_of_a_fault_can_be_seen(monkeypatch):
    monkeypatch.setattr(models, "names", lambda: {}["split"])
    monkeypatch.setenv("REGKIT_DEBUG", "1")
    assert isinstance(CliRunner().invoke(cli.app, ["models"]).exception, KeyError)


def test_memory_of_the_machine_that_is_not_there_is_a_sentence():
    with pytest.raises(ValueError, match=r"^too large\.$"), enough_memory("too large."):
        torch.empty(1 << 60)
    with pytest.raises(ValueError, match=r"^too large\.$"), enough_memory("too large."):
        np.empty(1 << 55)
    with pytest.raises(RuntimeError, match="size"), enough_memory("too large."):
        torch.ones(2) @ torch.ones(3)
    assert 1e6 < free_memory(torch.device("cpu")) < 1e15


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
                files.check_writable(closed / "out")
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
