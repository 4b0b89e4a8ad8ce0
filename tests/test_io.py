"""Files and physical space, against SimpleITK and by hand."""

from __future__ import annotations

import os

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image as Picture

from regkit import files, io
from regkit.spatial import warp_points
from regkit.transform import Grid, Transform, pull


def oblique(angle: float = 0.3, spacing=(1.0, 1.7, 2.5), origin=(-20.0, 11.0, 7.0)) -> np.ndarray:
    """A rotated, anisotropic affine, with its second axis flipped."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, c, -s], [0, s, c]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([1, -1, 1]) * np.asarray(spacing)
    affine[:3, 3] = origin
    return affine


def smooth_image(shape, seed=0) -> torch.Tensor:
    """(1, 1, *shape) in [0, 1], smooth, zero at the border."""
    grids = np.meshgrid(*[np.linspace(0, 1, n) for n in shape], indexing="ij")
    frame = np.prod([np.sin(np.pi * g) for g in grids], axis=0)
    wave = np.prod([np.sin((3 + k + seed) * g + k) for k, g in enumerate(grids)], axis=0)
    return torch.from_numpy((frame * (0.6 + 0.4 * wave)).astype(np.float32))[None, None]


def smooth_disp(shape, size=2.0) -> torch.Tensor:
    """(1, d, *shape) voxels."""
    d = len(shape)
    return torch.cat([size * (smooth_image(shape, seed=k + 1) - 0.3) for k in range(d)], dim=1)


def itk_points(affine: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """Voxels (N, 3) to LPS mm (N, 3), written out by hand."""
    ras = voxels @ affine[:3, :3].T + affine[:3, 3]
    return ras * [-1, -1, 1]


# reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "size"), [("meter", 1000.0), ("micron", 0.001), ("mm", 1.0)])
def test_sizes_in_metres_and_micrometres_are_read_as_millimetres(unit, size):
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.diag([0.5, 0.6, 0.7, 1]))
    image.header.set_xyzt_units(unit)
    np.testing.assert_allclose(io.as_image(image).spacing, np.array([0.5, 0.6, 0.7]) * size)


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_labels_that_are_no_whole_numbers_are_refused(value):
    labels = np.zeros((4, 5), np.float32)
    labels[1, 2] = value
    with pytest.raises(
        ValueError, match="labels holds values that are not whole numbers, expected"
    ):
        io.check_values(labels, "labels", labels=True)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_a_canonical_image_is_that_of_nibabel(order, signs):
    affine = np.eye(4)
    affine[:3, :3] = (oblique(0.2)[:3, :3] * signs)[:, list(order)]
    affine[:3, 3] = (3.0, -5.0, 8.0)
    source = nibabel.Nifti1Image(np.random.default_rng(0).random((4, 5, 6), np.float32), affine)
    closest, image = nibabel.as_closest_canonical(source), io.canonical(io.as_image(source))
    np.testing.assert_array_equal(image.data[0, 0], closest.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(image.affine, closest.affine, atol=1e-5)  # of float32 in the header
    assert image.grid.directions() == ("R", "A", "S")


def test_nifti_round_trip_keeps_values_and_place(tmp_path):
    image, affine = smooth_image((7, 8, 9)), oblique()
    io.write_image(image, affine, tmp_path / "a.nii.gz")
    back = io.read(tmp_path / "a.nii.gz")
    assert torch.equal(back.data, image)
    np.testing.assert_allclose(back.affine, affine, atol=1e-5)
    np.testing.assert_allclose(back.spacing, (1.0, 1.7, 2.5), atol=1e-5)
    assert back.notes == () and back.physical
    other = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    ours = itk_points(affine, np.array([[2.0, 3.0, 4.0]]))[0]
    np.testing.assert_allclose(other.TransformIndexToPhysicalPoint((2, 3, 4)), ours, atol=1e-4)
    assert other[2, 3, 4] == image[0, 0, 2, 3, 4]


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("shape", [(7, 8), (7, 8, 9)])
def test_itk_formats_agree_with_the_same_image_as_nifti(tmp_path, suffix, shape):
    image = smooth_image(shape)
    affine = oblique() if len(shape) == 3 else np.diag([-1.5, -2.0, 1.0, 1.0])
    io.write_image(image, affine, tmp_path / "a.nii.gz")
    itk = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    sitk.WriteImage(itk if len(shape) == 3 else itk[:, :, 0], str(tmp_path / f"a{suffix}"))
    back = io.read(tmp_path / f"a{suffix}")
    assert torch.equal(back.data, image)
    np.testing.assert_allclose(back.affine, affine, atol=1e-5)


def test_integer_files_become_float_and_labels_stay_integer(tmp_path):
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    assert io.read(tmp_path / "a.nii").data.dtype == torch.float32
    labels = io.read(tmp_path / "a.nii", labels=True).data
    assert labels.dtype == torch.int32 and torch.equal(labels[0, 0], torch.from_numpy(values).int())


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_a_grey_picture_is_read_however_it_is_saved(tmp_path, mode):
    """Grey, with a palette (of greys in any order), and as three equal colours."""
    values = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)  # rows, columns
    picture = Picture.fromarray(values)
    if mode == "P":
        picture = Picture.fromarray(255 - values, mode="P")
        picture.putpalette([grey for grey in range(255, -1, -1) for _ in range(3)])
    picture.convert(mode).save(tmp_path / "a.png")
    with Picture.open(tmp_path / "a.png") as saved:
        assert saved.mode == mode
    read = io.read(tmp_path / "a.png")
    assert torch.equal(read.data[0, 0], torch.from_numpy(values.T).float())
    assert read.shape == (7, 5) and read.data.dtype == torch.float32


def test_a_picture_with_one_coloured_pixel_is_refused(tmp_path):
    values = np.full((5, 7, 3), 100, np.uint8)
    values[2, 3] = 100, 100, 101
    Picture.fromarray(values).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="3 values per pixel, expected a grey image"):
        io.read(tmp_path / "a.png")


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_a_field_of_equal_vectors_is_no_picture(tmp_path, dtype):
    field = sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), dtype), isVector=True)
    sitk.WriteImage(field, str(tmp_path / "a.mha"))
    with pytest.raises(ValueError, match="3 values per pixel"):
        io.read(tmp_path / "a.mha")


@pytest.mark.real
def test_real_slices_with_three_equal_colours(sample):
    """ITK's example: the second is the first, shifted by 13 pixels along x and 17 along y."""
    folder = sample("brainweb_t1_pd_2d")
    fixed = io.read(folder / "BrainProtonDensitySliceBorder20.png").data
    moving = io.read(folder / "BrainProtonDensitySliceShifted13x17y.png").data
    assert fixed.shape == moving.shape == (1, 1, 221, 257)
    assert torch.equal(moving[..., 13:, 17:], fixed[..., :-13, :-17])


def test_scale_and_slope_of_the_header_are_applied(tmp_path):
    image = nibabel.Nifti1Image(np.full((2, 2, 2), 10, dtype=np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, -1.0)
    nibabel.save(image, tmp_path / "a.nii")
    assert (
        io.read(tmp_path / "a.nii").data == nibabel.load(tmp_path / "a.nii").get_fdata()[0, 0, 0]
    ).all()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 6, 1), (5, 6)), ((5, 6, 7, 1), (5, 6, 7)), ((5, 1, 6), (5, 6)), ((1, 5, 6), (5, 6))],
)
def test_an_axis_of_size_one_is_dropped(shape, expected):
    image = nibabel.Nifti1Image(np.ones(shape, np.float32), np.eye(4))
    assert io.from_nibabel(image).shape == expected


def test_leading_axes_of_arrays_are_dropped():
    for shape in [(5, 6), (1, 5, 6), (1, 1, 5, 6)]:
        image = io.as_image(np.ones(shape))
        assert image.shape == (5, 6) and image.ndim == 2 and not image.physical
    assert io.as_image(torch.ones(1, 1, 4, 5, 6)).data.shape == (1, 1, 4, 5, 6)
    half = io.as_image(torch.full((4, 5), 0.5, dtype=torch.bfloat16)).data  # numpy has no bfloat16
    assert half.dtype == torch.float32 and (half == 0.5).all()


def test_a_broken_sform_falls_back_to_the_qform_with_a_note():
    image = nibabel.Nifti1Image(np.ones((4, 5, 6), np.float32), None)
    image.set_qform(oblique(), code=1)
    image.header["sform_code"] = 1  # and all its rows are zero
    back = io.from_nibabel(image)
    np.testing.assert_allclose(back.affine, oblique(), atol=1e-4)
    assert "qform is used" in back.notes[0]


def test_disagreeing_matrices_are_noted_with_the_distance():
    image = nibabel.Nifti1Image(np.ones((4, 5, 6), np.float32), np.eye(4))
    image.set_sform(np.eye(4), code=1)
    moved = np.eye(4)
    moved[0, 3] = 12.0
    image.set_qform(moved, code=1)
    back = io.from_nibabel(image)
    np.testing.assert_array_equal(back.affine, np.eye(4))
    assert ["disagree by up to 12.0 mm" in note for note in back.notes[:1]] == [True]


def test_a_header_without_orientation_is_noted():
    image = nibabel.Nifti1Image(np.ones((4, 5, 6), np.float32), None)
    assert "no orientation" in io.from_nibabel(image).notes[0]


def sitk_image(image: torch.Tensor, affine: np.ndarray) -> sitk.Image:
    """The same image in SimpleITK, by way of LPS written out by hand."""
    out = sitk.GetImageFromArray(image[0, 0].numpy().T)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    flip = np.diag([-1.0, -1.0, 1.0])
    out.SetSpacing(spacing.tolist())
    out.SetDirection((flip @ (affine[:3, :3] / spacing)).ravel().tolist())
    out.SetOrigin((flip @ affine[:3, 3]).tolist())
    return out


# displacements ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warped(tmp_path_factory):
    """A displacement between two oblique, anisotropic 3D grids, and the file it was written to."""
    folder = tmp_path_factory.mktemp("disp")
    fixed_affine = oblique(0.3, (1.0, 1.7, 2.5), (-20.0, 11.0, 7.0))
    moving_affine = oblique(0.2, (1.4, 1.2, 2.0), (-21.0, 12.0, 6.0))
    shape, moving_shape = (20, 16, 12), (17, 21, 14)
    fixed, moving = Grid(shape, fixed_affine), Grid(moving_shape, moving_affine)
    disp = fixed.disp_to(moving) + smooth_disp(shape)
    io.write_transform(Transform.from_voxels(disp, fixed, moving), folder / "disp.nii.gz")
    return folder / "disp.nii.gz", disp, fixed_affine, moving_affine, moving_shape


def test_the_file_is_what_itk_calls_a_displacement_field(warped):
    path, disp, *_ = warped
    image = nibabel.load(path)
    assert image.shape == (20, 16, 12, 1, 3)
    assert image.header["intent_code"] == 1007 and image.get_data_dtype() == np.float32


def test_simpleitk_maps_points_as_we_do(warped):
    path, disp, fixed_affine, moving_affine, _ = warped
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    voxels = np.random.default_rng(0).uniform(1, 10, size=(50, 3))
    voxels[:20] = np.rint(voxels[:20])  # some on grid points, some between
    ours = warp_points(torch.from_numpy(voxels)[None], disp.double())[0].numpy()
    ours = itk_points(moving_affine, ours)
    theirs = [transform.TransformPoint(p) for p in itk_points(fixed_affine, voxels).tolist()]
    assert np.abs(ours - np.array(theirs)).max() < 1e-3  # mm


def test_simpleitk_warps_an_image_as_we_do(warped):
    path, disp, fixed_affine, moving_affine, moving_shape = warped
    moving = smooth_image(moving_shape)
    ours = pull(moving, disp)[0, 0].numpy()
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    fixed = sitk_image(torch.zeros(1, 1, *disp.shape[2:]), fixed_affine)
    theirs = sitk.Resample(
        sitk_image(moving, moving_affine), fixed, transform, sitk.sitkLinear, -1.0
    )
    theirs = sitk.GetArrayFromImage(theirs).T
    inside = theirs >= 0
    assert inside.mean() > 0.4 and np.abs(ours - theirs)[inside].max() < 1e-4


def test_a_displacement_comes_back_from_its_file(warped):
    path, disp, fixed_affine, moving_affine, moving_shape = warped
    back = io.read_transform(path, Grid(moving_shape, moving_affine))
    assert (back.voxels() - disp).abs().max() < 1e-4
    np.testing.assert_allclose(back.fixed.affine, fixed_affine, atol=1e-5)


@pytest.mark.parametrize("plane", ["axial", "coronal"])
def test_a_2d_displacement_comes_back_from_its_file(tmp_path, plane):
    fixed = np.diag([-1.0, 1.5, 1.0, 1.0]) if plane == "axial" else oblique()[:, [0, 2, 1, 3]]
    moving = fixed.copy()
    moving[:3, 3] += moving[:3, 2] * 4 + moving[:3, 0]  # another slice, and shifted by one voxel
    disp, grids = smooth_disp((14, 11)), (Grid((14, 11), fixed), Grid((14, 11), moving))
    io.write_transform(Transform.from_voxels(disp, *grids), tmp_path / "d.nii.gz")
    shape = nibabel.load(tmp_path / "d.nii.gz").shape
    assert shape == (14, 11, 1, 1, 2 if plane == "axial" else 3)
    back = io.read_transform(tmp_path / "d.nii.gz", grids[1]).voxels()
    assert back.shape == disp.shape and (back - disp).abs().max() < 1e-4


@pytest.mark.parametrize("across", [0, 1, 2])
def test_a_slice_of_a_volume_has_a_field_of_two_equal_slices(tmp_path, across):
    """In 3D, as the volume is; one slice alone ITK would read as a 2D field."""
    grid = Grid((14, 11), np.diag([2.0, 2.0, 3.0, 1.0]), across)
    transform = Transform.from_voxels(smooth_disp((14, 11)), grid, grid)
    io.write_transform(transform, tmp_path / "d.nii.gz")
    field = sitk.ReadImage(str(tmp_path / "d.nii.gz"))
    size = [14, 11]
    size.insert(across, 2)
    assert list(field.GetSize()) == size
    first, second = np.split(sitk.GetArrayFromImage(field), 2, axis=2 - across)
    np.testing.assert_array_equal(first, second)


def test_simpleitk_maps_2d_points_as_we_do(tmp_path):
    affine = np.diag([-1.2, 1.5, 1.0, 1.0])
    affine[:2, 3] = (40.0, -30.0)
    disp, grid = smooth_disp((14, 11)), Grid((14, 11), affine)
    io.write_transform(Transform.from_voxels(disp, grid, grid), tmp_path / "d.nii.gz")
    field = sitk.ReadImage(str(tmp_path / "d.nii.gz"), sitk.sitkVectorFloat64)
    assert field.GetDimension() == 2
    transform = sitk.DisplacementFieldTransform(field)
    start = itk_points(affine, np.array([[3.0, 4.0, 0.0]]))[0, :2]
    end = np.array([[3.0, 4.0, 0.0]])
    end[0, :2] += disp[0, :, 3, 4].numpy()
    ours = itk_points(affine, end)[0, :2]
    assert np.abs(np.array(transform.TransformPoint(start.tolist())) - ours).max() < 1e-3


def test_ants_warps_an_image_as_we_do(warped, tmp_path):
    ants = pytest.importorskip("ants")
    path, disp, fixed_affine, moving_affine, moving_shape = warped
    moving = smooth_image(moving_shape)
    io.write_image(moving, moving_affine, tmp_path / "m.nii.gz")
    io.write_image(torch.zeros(1, 1, *disp.shape[2:]), fixed_affine, tmp_path / "f.nii.gz")
    theirs = ants.apply_transforms(
        ants.image_read(str(tmp_path / "f.nii.gz")),
        ants.image_read(str(tmp_path / "m.nii.gz")),
        transformlist=[str(path)],
        defaultvalue=-1,
    ).numpy()
    inside = theirs >= 0
    ours = pull(moving, disp)[0, 0].numpy()
    assert inside.mean() > 0.4 and np.abs(ours - theirs)[inside].max() < 1e-3


# writing ----------------------------------------------------------------------------------------


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), files.staged(tmp_path / "new" / "out") as folder:
        (folder / "half.txt").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_an_older_result_alone(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), files.staged(tmp_path) as folder:
        (folder / "a.txt").write_text("new")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and (
        tmp_path / "a.txt"
    ).read_text() == "old"


def test_a_new_folder_has_the_usual_permissions(tmp_path):
    with files.staged(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
    (tmp_path / "usual").mkdir()
    assert os.stat(tmp_path / "out").st_mode == os.stat(tmp_path / "usual").st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "usual"]


def test_nothing_of_the_input_header_is_written(tmp_path):
    image = nibabel.Nifti1Image(np.ones((4, 4, 4)), np.eye(4))
    image.header["descrip"] = b"Jane Roe 1970-01-01"
    nibabel.save(image, tmp_path / "Roe_Jane.nii")
    read = io.read(tmp_path / "Roe_Jane.nii")
    io.write_image(read.data, read.affine, tmp_path / "out.nii")
    content = (tmp_path / "out.nii").read_bytes()
    assert b"Roe" not in content and b"Jane" not in content


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16]
)
def test_every_kind_of_number_can_be_written(tmp_path, dtype):
    """nibabel refuses 64-bit integers and half precision; a label map may come as either."""
    values = torch.arange(24).reshape(1, 1, 2, 3, 4) % 2
    io.write_image(values.to(dtype), np.eye(4), tmp_path / "a.nii.gz")
    assert torch.equal(io.read(tmp_path / "a.nii.gz", labels=True).data, values.int())
    with pytest.raises(ValueError, match="holds labels beyond 2"):
        io.write_image(values + 2**40, np.eye(4), tmp_path / "b.nii.gz")


def test_a_picture_s_resolution_for_printing_is_no_voxel_size(tmp_path):
    picture = Picture.fromarray(np.arange(120, dtype=np.uint8).reshape(10, 12))
    for name, dpi in (("a.tif", 72), ("b.tif", 300)):
        picture.save(tmp_path / name, dpi=(dpi, dpi))
        image = io.read(tmp_path / name)
        assert image.spacing == (1.0, 1.0) and "resolution for printing" in image.notes[0]
    picture.save(tmp_path / "c.tif")
    assert io.read(tmp_path / "c.tif").notes == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_refused(value):
    image = np.zeros((4, 5))
    image[2, 3] = value
    with pytest.raises(ValueError, match="holds 1 NaN or infinite value, expected finite"):
        io.as_image(image, "moving")
