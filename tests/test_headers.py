"""Every kind of header: what `register` writes is what ITK and ANTs make of the same files.

A cell of this matrix is a kind of header and something done with it. Either SimpleITK and ANTs come
to the same (1 % of the image, 1e-3 mm of a point), or the result says in a sentence where they put
the file, and that sentence is true. The table in book/data.md lists the kinds and what holds.
"""

from __future__ import annotations

import contextlib
import gzip
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image as Picture
from typer.testing import CliRunner

import regkit
from regkit import cli, io, models
from regkit.models import RegistrationModel
from regkit.spatial import identity_grid

PAGE = Path(__file__).parents[1] / "book" / "data.md"
SHAPE = (26, 30, 22)
AFFINE = np.array([[1.5, 0, 0, -20], [0, 1.5, 0, 5], [0, 0, 2.0, 7], [0, 0, 0, 1]])
AWAY = AFFINE + np.array([[0, 0, 0, -14], [0, 0, 0, -25], [0, 0, 0, -4], [0, 0, 0, 0]])
COS, SIN = np.cos(0.3), np.sin(0.3)
TURN = np.array([[COS, -SIN, 0, 0], [SIN, COS, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])
LIA = np.array([[-1.5, 0, 0, 18], [0, 0, 1.5, -9], [0, -1.7, 0, 21], [0, 0, 0, 1]])


class Waves(RegistrationModel):
    """A "network" that answers with a smooth field, a voxel or two long."""

    def estimate(self, moving, fixed):
        shape = fixed.shape[2:]
        grid = identity_grid(shape) / torch.tensor(shape).reshape(-1, *[1] * len(shape))
        axes = range(len(shape))
        waves = [1.2 * torch.sin(3 * grid[i] + 2 * grid[i - 1] + i) for i in axes]
        return {"disp": torch.stack(waves)[None]}


def blobs(shape, seed) -> np.ndarray:
    """Smooth structure in 0 to 1000, about 0 at the border."""
    random, index = np.random.default_rng(seed), np.indices(shape)
    image = np.zeros(shape)
    for _ in range(8):
        middle = [n * random.uniform(0.35, 0.65) for n in shape]
        away = sum((g - c) ** 2 for g, c in zip(index, middle, strict=True))
        image += random.uniform(200, 500) * np.exp(-away / (0.16 * min(shape)) ** 2)
    return np.minimum(image, 1000).astype(np.float32)


# writing files of each kind ---------------------------------------------------------------------


def nifti(affine=AFFINE, shape=SHAPE, **fields: Any) -> Callable[[Path, int], Path]:
    """A NIfTI file whose header fields are set in its bytes, where nibabel would repair them."""

    def make(stem: Path, seed: int) -> Path:
        path = stem.with_suffix(".nii.gz")
        full = nibabel.Nifti1Image(blobs(shape, seed), affine)
        full.header.set_xyzt_units("mm")
        full.set_sform(affine, 1)
        full.set_qform(affine, 1)
        raw = bytearray(full.to_bytes())
        header = nibabel.Nifti1Header(bytes(raw[:348]), check=False)
        for name, value in fields.items():
            if name == "units":
                header.set_xyzt_units(value)
            elif name == "qform":
                header.set_qform(value, int(header["qform_code"]))
            elif name == "pixdim":
                header["pixdim"][1:4] = value
            else:
                header[name] = value
        raw[:348] = header.binaryblock
        path.write_bytes(gzip.compress(bytes(raw)))
        return path

    return make


def flat(axis: int | None) -> Callable[[Path, int], Path]:
    """A slice of a volume, with its one voxel along this axis; None: a file of two axes."""

    def make(stem: Path, seed: int) -> Path:
        values = blobs((30, 26), seed)
        if axis is not None:
            values = np.expand_dims(values, axis)
        image = nibabel.Nifti1Image(values, AFFINE)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, stem.with_suffix(".nii.gz"))
        return stem.with_suffix(".nii.gz")

    return make


def analyze(kind: type) -> Callable[[Path, int], Path]:
    def make(stem: Path, seed: int) -> Path:
        nibabel.save(kind(blobs(SHAPE, seed).astype(np.int16), AFFINE), stem.with_suffix(".img"))
        return stem.with_suffix(".img")

    return make


def by_itk(suffix: str, d: int, turned: bool = False) -> Callable[[Path, int], Path]:
    def make(stem: Path, seed: int) -> Path:
        image = sitk.GetImageFromArray(blobs((SHAPE, (30, 26))[d == 2], seed).T)
        image.SetSpacing((1.5, 1.7, 2.0)[:d])
        image.SetOrigin((-20.0, 11.0, 7.0)[:d])
        if turned:
            image.SetDirection(TURN[:d, :d].ravel().tolist())
        sitk.WriteImage(image, str(stem.with_suffix(suffix)))
        return stem.with_suffix(suffix)

    return make


def picture(suffix: str, dpi: int | None) -> Callable[[Path, int], Path]:
    def make(stem: Path, seed: int) -> Path:
        shown = Picture.fromarray((blobs((40, 36), seed) / 1000 * 255).astype(np.uint8))
        options: dict[str, Any] = {} if dpi is None else {"dpi": (dpi, dpi)}
        shown.save(stem.with_suffix(suffix), **options)
        return stem.with_suffix(suffix)

    return make


@dataclass(frozen=True)
class Kind:
    """A kind of header. says: what the sentence names, "" where ITK comes to the same."""

    make: Callable[[Path, int], Path]
    says: str = ""


SHEARED = AFFINE @ np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
ROUNDED = AFFINE @ np.array([[1, 2e-5, 0, 0], [0, 1, -2e-5, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
SKEWED = AFFINE @ np.array([[1, 3e-4, 0, 0], [0, 1, -2e-4, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
SMALL, LARGE = np.diag([1e3, 1e3, 1e3, 1]) @ AFFINE, np.diag([1e-3, 1e-3, 1e-3, 1]) @ AFFINE
CORNER, QFORM, PIXDIM = "voxel sizes alone", "its qform", "pixdim"
ANGLES, PRINT = "not at right angles", "resolution for printing"

KINDS = {
    "NIfTI, one matrix, mm": Kind(nifti(qform_code=0)),
    "no unit": Kind(nifti(units="unknown")),
    "micrometres": Kind(nifti(SMALL, units="micron")),
    "metres": Kind(nifti(LARGE, units="meter")),
    "both codes 0": Kind(nifti(sform_code=0, qform_code=0), CORNER),
    "sform and qform agree": Kind(nifti()),
    "qform alone": Kind(nifti(sform_code=0)),
    "sform of code 1, another qform": Kind(nifti(qform=AWAY)),
    "sform of code 2, another qform": Kind(nifti(sform_code=2, qform=AWAY), QFORM),
    "sform of code 4, another qform": Kind(nifti(sform_code=4, qform=AWAY), QFORM),
    "pixdim against sform": Kind(nifti(pixdim=(1, 1, 1), qform_code=0), PIXDIM),
    "mirrored": Kind(nifti(AFFINE @ MIRROR)),
    "oblique": Kind(nifti(TURN @ AFFINE)),
    "axes to L, I, A": Kind(nifti(LIA)),
    "shear of rounding size": Kind(nifti(ROUNDED, qform_code=0)),
    "shear of rounding size, with qform": Kind(nifti(ROUNDED)),
    "shear of less than 1 % of a voxel": Kind(nifti(SKEWED, qform_code=0), ANGLES),
    "shear": Kind(nifti(SHEARED, qform_code=0), ANGLES),
    "shear, with qform": Kind(nifti(SHEARED), QFORM),
    "slice (1, Y, Z)": Kind(flat(0)),
    "slice (X, 1, Z)": Kind(flat(1)),
    "slice (X, Y, 1)": Kind(flat(2)),
    "two axes": Kind(flat(None)),
    "Analyze": Kind(analyze(nibabel.AnalyzeImage), CORNER),
    "Analyze of SPM": Kind(analyze(nibabel.Spm99AnalyzeImage), CORNER),
    "MHA": Kind(by_itk(".mha", 3)),
    "MHA, oblique": Kind(by_itk(".mha", 3, turned=True)),
    "MHA, two axes": Kind(by_itk(".mha", 2)),
    "NRRD": Kind(by_itk(".nrrd", 3, turned=True)),
    "PNG": Kind(picture(".png", None)),
    "PNG, 72 dpi": Kind(picture(".png", 72)),
    "TIFF, 300 dpi": Kind(picture(".tif", 300), PRINT),
    "JPEG, 72 dpi": Kind(picture(".jpg", 72), PRINT),
}
every = pytest.mark.parametrize("kind", KINDS)
same = pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.says])
other = pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.says])


@dataclass
class Case:
    moving: Path
    fixed: Path
    result: Any
    out: Path


@pytest.fixture(scope="module")
def made() -> dict[str, Case]:
    return {}


@pytest.fixture
def case(kind, made, tmp_path_factory, monkeypatch) -> Case:
    """A pair with this kind of header, registered by `Waves` and saved."""
    if kind not in made:
        folder, make = tmp_path_factory.mktemp("kind"), KINDS[kind].make
        moving, fixed = make(folder / "m", 0), make(folder / "x", 1)
        d = io.read(fixed).ndim
        monkeypatch.setattr(models, "load", lambda path: Waves(d))
        labels = {f"{n}_labels": bright(path) for n, path in (("moving", moving), ("fixed", fixed))}
        result = regkit.register(moving, fixed, "waves.safetensors", False, **labels)
        made[kind] = Case(moving, fixed, result, result.save(folder / "out"))
    return made[kind]


def bright(path: Path) -> np.ndarray:
    """A label map of one structure."""
    values = io.read(path).data[0, 0].numpy()
    return (values > 0.3 * values.max()).astype(np.int32)


def field(path: Path) -> sitk.DisplacementFieldTransform:
    return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))


def by_simpleitk(moving: Path, like: Path, disp: Path, mode: int = sitk.sitkLinear) -> np.ndarray:
    source = sitk.Cast(sitk.ReadImage(str(moving)), sitk.sitkFloat32)
    if source.GetNumberOfComponentsPerPixel() > 1:
        source = sitk.VectorIndexSelectionCast(source, 0)
    moved = sitk.Resample(source, sitk.ReadImage(str(like)), field(disp), mode, -1.0)
    return sitk.GetArrayFromImage(moved).T


def inside(transform) -> np.ndarray:
    """Where the map looks between voxels: at the border programs pad each in their way."""
    place = transform.voxels()[0] + identity_grid(transform.fixed.shape)
    ends = torch.tensor(transform.moving.shape).reshape(-1, *[1] * len(place[1:].shape[1:]))
    ends = ends.reshape(-1, *[1] * (place.ndim - 1)) - 1
    return ((place >= 0) & (place <= ends)).all(0).numpy()


def as_written(values: np.ndarray, transform) -> np.ndarray:
    across = transform.fixed.across
    return values if across is None else np.expand_dims(values, across)


# the cells --------------------------------------------------------------------------------------


@same
def test_itk_and_ants_come_to_the_same_image(kind, case):
    ants = pytest.importorskip("ants")
    assert not [s for s in case.result.warnings if "ITK" in s]
    ours = nibabel.load(case.out / "moved.nii.gz").get_fdata()
    seen = as_written(inside(case.result.transform), case.result.transform)
    assert seen.mean() > 0.5
    theirs = by_simpleitk(case.moving, case.out / "moved.nii.gz", case.out / "disp.nii.gz")
    assert theirs.shape == ours.shape
    assert np.abs(ours - theirs)[seen].max() < 0.01 * np.ptp(ours)
    image = ants.image_read(str(case.moving)) if case.moving.suffix != ".png" else None
    if image is None:  # ANTs reads a picture by way of SimpleITK's file
        sitk.WriteImage(sitk.ReadImage(str(case.moving)), str(case.out / "m.mha"))
        image = ants.image_read(str(case.out / "m.mha"))
    theirs = ants.apply_transforms(
        ants.image_read(str(case.out / "moved.nii.gz")),
        image,
        [str(case.out / "disp.nii.gz")],
    ).numpy()
    assert np.abs(ours - theirs)[seen].max() < 0.01 * np.ptp(ours)


@same
def test_the_fixed_file_and_moved_are_one_grid_for_itk(kind, case):
    """Whoever resamples onto the fixed file itself gets the same."""
    fixed = sitk.ReadImage(str(case.fixed))
    moved = sitk.ReadImage(str(case.out / "moved.nii.gz"))
    assert fixed.GetSize() == moved.GetSize()
    for index in ((0,) * fixed.GetDimension(), tuple(n - 1 for n in fixed.GetSize())):
        apart = np.subtract(
            fixed.TransformIndexToPhysicalPoint(index), moved.TransformIndexToPhysicalPoint(index)
        )
        assert np.abs(apart).max() < 0.01 * min(fixed.GetSpacing())


@same
def test_labels_are_the_same(kind, case):
    transform = case.result.transform
    labels = case.out / "labels.nii.gz"
    own = torch.from_numpy(bright(case.moving))[None, None]
    io.write_image(own, transform.moving.affine, labels, transform.moving.across)
    theirs = by_simpleitk(
        labels, case.out / "moved.nii.gz", case.out / "disp.nii.gz", sitk.sitkNearestNeighbor
    )
    seen = as_written(inside(transform), transform)
    ours = nibabel.load(case.out / "moved_labels.nii.gz").get_fdata()
    assert ours.any() and (ours != theirs)[seen].mean() < 2e-3  # ties of nearest


@same
def test_points_are_the_same(kind, case):
    transform, d = case.result.transform, case.result.transform.fixed.ndim
    random = np.random.default_rng(0)
    voxels = random.uniform(2, np.array(transform.fixed.shape) - 3, (40, d))
    mm = transform.fixed.to_mm(voxels)
    there = transform.points(mm)
    lps = np.diag([-1, -1, 1.0])
    theirs = field(case.out / "disp.nii.gz")
    axes = theirs.GetDimension()
    mapped = np.array([theirs.TransformPoint(p) for p in (mm @ lps)[:, :axes].tolist()])
    assert np.abs(mapped - (there @ lps)[:, :axes]).max() < 2e-3
    np.testing.assert_allclose(
        transform.points(voxels, unit="voxel"), transform.moving.to_voxels(there), atol=1e-6
    )


@every
def test_the_inverse_leads_back(kind, case):
    transform = case.result.transform
    voxels = np.random.default_rng(0).uniform(
        4, np.array(transform.fixed.shape) - 5, (40, transform.fixed.ndim)
    )
    mm = transform.fixed.to_mm(voxels)
    size = min(transform.fixed.spacing)
    back = transform.points(transform.points(mm), start="moving")
    assert np.linalg.norm(back - mm, axis=1).max() < 1e-3 * size
    # as a field on the moving grid it is only as exact as the interpolation between its voxels
    again = transform.inverse().points(transform.points(mm))
    assert np.linalg.norm(again - mm, axis=1).max() < 0.03 * size


@same
def test_the_inverse_is_a_file_for_itk_too(kind, case):
    back = case.result.transform.inverse()
    io.write_transform(back, case.out / "back.nii.gz")
    grid = back.fixed
    io.write_image(torch.zeros(1, 1, *grid.shape), grid.affine, case.out / "g.nii.gz", grid.across)
    theirs = by_simpleitk(case.fixed, case.out / "g.nii.gz", case.out / "back.nii.gz")
    ours = as_written(back.moved(io.read(case.fixed))[0, 0].numpy(), back)
    seen = as_written(inside(back), back)
    assert np.abs(ours - theirs)[seen].max() < 0.01 * np.ptp(ours)


@every
def test_apply_does_again_what_register_did(kind, case):
    command = ["apply", case.moving, case.out / "disp.nii.gz", "-o", case.out / "again.nii.gz"]
    done = CliRunner().invoke(cli.app, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    again, moved = (nibabel.load(case.out / f"{n}.nii.gz") for n in ("again", "moved"))
    assert again.shape == moved.shape
    np.testing.assert_allclose(again.get_fdata(), moved.get_fdata(), atol=1e-3 * 1000)
    np.testing.assert_allclose(again.affine, moved.affine, atol=1e-4)
    said = [s for s in io.read(case.moving, "image").notes if "ITK" in s]
    assert all(sentence in done.stderr for sentence in said)  # notes of the header are shown


@every
def test_no_kind_of_header_folds_anything(kind, case):
    assert case.result.metrics["folding_percent"] == 0
    det = case.result.transform.jacobian_determinant()
    assert 0.4 < float(det.min()) and float(det.max()) < 2


@other
def test_what_is_said_of_itk_is_true(kind, case):
    """ITK itself is asked where it puts the corners of the file."""
    word = KINDS[kind].says
    said = [s for s in case.result.warnings if word in s and "moving" in s]
    assert len(said) == 1 and said[0].count(". ") == 0 and said[0].endswith(".")
    if word == ANGLES:
        with pytest.raises(RuntimeError, match="orthonormal"):
            sitk.ReadImage(str(case.moving))
        for name in ("disp", "moved"):
            opens = "they can open" in said[0]
            with contextlib.nullcontext() if opens else pytest.raises(RuntimeError):
                sitk.ReadImage(str(case.out / f"{name}.nii.gz"))
        assert opens == (kind != "shear")
        return
    image, ours = sitk.ReadImage(str(case.moving)), case.result.transform.moving
    size = image.GetSize()
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in size])).reshape(len(size), -1).T
    theirs = np.array([image.TransformIndexToPhysicalPoint(c) for c in corners.tolist()])
    there = (ours.to_mm(corners) * [-1, -1, 1])[:, : len(size)]
    apart = np.linalg.norm(theirs - there, axis=1).max()
    assert float(re.search(r"up to ([\d.e+]+) mm", said[0])[1]) == pytest.approx(apart, rel=0.01)


def test_the_table_of_the_book_is_this_matrix():
    rows = re.findall(r"^\| ([^|]+?) \| [^|]+ \| ([^|]+?) \|$", PAGE.read_text(), re.MULTILINE)
    table = {name: what for name, what in rows if name in KINDS}
    assert set(table) == set(KINDS)
    for name, kind in KINDS.items():
        assert ("the same" in table[name]) == (not kind.says), name
        assert kind.says in ("", CORNER, PIXDIM, ANGLES, PRINT, QFORM)
