"""Files: images and transforms, in and out.

regkit reads a header as nibabel does: axes to the Right, Anterior and Superior (RAS), the sform
before the qform, sizes in mm whatever unit the file has. What it writes lies where ITK puts it, and
with it ANTs, SimpleITK and 3D Slicer, whose first two axes point the other way (LPS). The two meet
in this module and nowhere else. Where ITK puts a file elsewhere, `Image.notes` says so.

Reading refuses what cannot be registered, with one sentence. Writing never leaves half a file
behind: see `regkit.files`.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regkit import files
from regkit.files import staged
from regkit.transform import Floats, Grid, Transform, corners_apart, usable

# what SimpleITK reads for us; NIfTI, Analyze and FreeSurfer's MGH go through nibabel
PICTURES = {
    ".png": "PNGImageIO",
    ".jpg": "JPEGImageIO",
    ".jpeg": "JPEGImageIO",
    ".tif": "TIFFImageIO",
    ".tiff": "TIFFImageIO",
}
ITK_SUFFIXES = {
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    **PICTURES,
}
NIBABEL_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh", ".img", ".hdr")
MATRIX_SUFFIXES = (".mat", ".tfm", ".txt", ".h5", ".hdf5")  # of ITK's transforms
LPS: Floats = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS <-> LPS, its own inverse
MILLIMETRES = {"meter": 1e3, "micron": 1e-3}  # of units in NIfTI; others count as mm
# Intents of NIfTI. ITK and ANTs write displacements as VECTOR, in LPS as they are in memory; of a
# file that says DISPVECT they take the vectors as RAS.
VECTOR_INTENT, DISPVECT_INTENT = 1007, 1006


@dataclass(frozen=True, eq=False)
class Image:
    """One image and where it lies.

    data: (1, 1, *S), S of 2 or 3 axes; float32, or int32 for a label map. Of a series (1, T, *S).
    affine: (4, 4) float64, voxel index -> mm, RAS. Also 4x4 in 2D: the slice is a plane in space.
    physical: False for an array without a header; its affine is the identity.
    notes: one sentence for each thing in the header that a user should hear about.
    across: of a slice of a volume the axis of its file that has one voxel, see `Grid`.
    """

    data: Tensor
    affine: Floats
    physical: bool = True
    notes: tuple[str, ...] = ()
    across: int | None = None

    @property
    def grid(self) -> Grid:
        """Its voxels, and where they lie."""
        return Grid(self.shape, self.affine, self.across)

    @property
    def shape(self) -> tuple[int, ...]:
        """S, without batch and channel."""
        return tuple(self.data.shape[2:])

    @property
    def ndim(self) -> int:
        """2 or 3."""
        return self.data.ndim - 2

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size along each array axis, mm."""
        return self.grid.spacing


# reading ----------------------------------------------------------------------------------------


def read(
    path: str | os.PathLike[str], name: str = "image", labels: bool = False, series: bool = False
) -> Image:
    """Read a 2D or 3D image.

    Args:
        path: NIfTI (.nii, .nii.gz), Analyze (.img with its .hdr), MGH (.mgz), or MHA, MHD, NRRD,
            PNG, JPEG, TIFF (through SimpleITK); of pictures the grey ones, also where grey is
            written as three equal colours. A pixel of a picture counts as 1 mm, whatever resolution
            for printing its file names.
        name: what the image is called in error messages, for example "moving". The path is never
            repeated there: a file name may hold a patient's name, and messages end up in logs.
        labels: read a label map: whole numbers, int32.
        series: a fourth axis of NIfTI, of time or direction, is let through as channels.

    Returns:
        An `Image`. One axis of size 1 makes a 2D image, wherever it stands: (160, 192, 1), an axial
        slice as a rule, and (1, 192, 160), a sagittal one. Integer files become float32 unless
        `labels` is set.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it may not be read, is a folder, no image, cut short, of 4 or more axes, holds
            NaN or infinity, or its header has no usable affine.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            file.read(1)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{name}: there is no such file.") from None
    except IsADirectoryError:
        raise ValueError(f"{name} is a folder, expected one image file.") from None
    except OSError:
        raise ValueError(f"{name}: the file may not be read; check its permissions.") from None
    lower = path.name.lower()
    if lower.endswith(NIBABEL_SUFFIXES):
        loaded = _load(path, name, _KINDS.get(lower.rsplit(".", 1)[1], "NIfTI"))
        return from_nibabel(loaded, name, labels, path, series)
    if lower.endswith(tuple(ITK_SUFFIXES)):
        return _from_itk(path, name, labels)
    suffixes = ", ".join([*NIBABEL_SUFFIXES, *ITK_SUFFIXES])
    raise ValueError(f"{name} is a file of an unknown type, expected one of {suffixes}.")


_KINDS = {"mgz": "MGH", "mgh": "MGH", "img": "Analyze", "hdr": "Analyze"}


@contextmanager
def _readable(name: str, kind: str) -> Iterator[None]:
    """Turn any exception that a reader raises for a damaged file into one sentence."""
    try:
        yield
    except MemoryError:
        raise
    except files.OutsideFolder:
        raise ValueError(
            f"{name} is a header that names its data by a path, a list, a pattern or a link, "
            "expected data in the file itself or in a file of a plain name beside it."
        ) from None
    except Exception:  # readers raise OSError, EOFError, zlib.error, ValueError, RuntimeError, ...
        raise ValueError(
            f"{name} cannot be read as {kind}: the file is cut short, damaged or of another type."
        ) from None


def _load(path: Path, name: str, kind: str) -> Any:
    """A nibabel image whose voxels are all in its file, undamaged as far as a checksum shows."""
    import nibabel

    with _readable(name, kind):
        loaded: Any = nibabel.load(path)
        claimed = math.prod(loaded.shape) * loaded.get_data_dtype().itemsize
        start = int(loaded.dataobj.offset)
        if start < 0 or min(loaded.shape, default=0) < 0:
            raise ValueError
        data_file = Path(loaded.file_map["image"].filename)  # of Analyze not the header's file
        files.check_payload(files.packed_by_name(data_file), start + claimed)
    return loaded


def from_nibabel(
    image: Any,
    name: str = "image",
    labels: bool = False,
    file: Path | None = None,
    series: bool = False,
) -> Image:
    """An `Image` from a nibabel image in memory. Arguments and errors as in `read`.

    file: where it comes from, so that its header is judged as it stands there.
    """
    with _readable(name, "NIfTI"):
        values = np.asanyarray(image.dataobj)
        affine, notes = _nibabel_affine(image, name)
    if affine is None:
        raise ValueError(
            f"{name} has a header whose matrix cannot be inverted, expected a valid one."
        )
    notes += _itk_notes(image, file, affine, name)
    affine = right_angles(affine, values.shape)
    if not (series and values.ndim == 4):
        flat, plane, across = _flat(values, affine, name)
        return Image(check_values(flat, name, labels)[None, None], plane, True, notes, across)
    volumes = [_flat(values[..., k], affine, name) for k in range(values.shape[3])]
    data = torch.stack([check_values(flat, name, labels) for flat, _, _ in volumes])[None]
    return Image(data, volumes[0][1], True, notes, volumes[0][2])


def read_grid(path: str | os.PathLike[str], name: str = "image") -> Grid:
    """The grid of a NIfTI file as `read` gives it, from its header alone; errors as of `read`."""
    import nibabel

    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: there is no such file.")
    with _readable(name, "NIfTI"):
        image: Any = nibabel.load(path)
        affine, _ = _nibabel_affine(image, name)
    if affine is None:
        raise ValueError(
            f"{name} has a header whose matrix cannot be inverted, expected a valid one."
        )
    voxels = np.broadcast_to(np.float32(0), image.shape)  # takes no memory
    flat, plane, across = _flat(voxels, right_angles(affine, image.shape), name)
    return Grid(flat.shape, plane, across)


def _nibabel_affine(image: Any, name: str) -> tuple[Floats | None, tuple[str, ...]]:
    """The first usable of sform, qform and plain voxel sizes, in mm, and what is odd about it.

    Headers with two matrices that disagree are common after a conversion gone wrong. We follow
    nibabel and take the sform, but never in silence.
    """
    header = image.header
    to_mm = _unit(header)
    matrices: list[tuple[str, Floats]] = []
    for kind in ("sform", "qform"):
        if (matrix := _matrix(header, kind)) is not None:
            with np.errstate(all="ignore"):  # `usable` refuses NaN
                matrices.append((kind, to_mm @ matrix))
    if not matrices:  # neither is set, or another format of nibabel with one affine only
        plain = image.affine if image.affine is not None else header.get_best_affine()
        plain = to_mm @ np.asarray(plain, dtype=np.float64)
        if not usable(plain):
            return None, ()
        note = f"{name} has no orientation in its header; its axes are taken as they come."
        silent = hasattr(header, "get_sform") or not hasattr(header, "get_vox2ras")  # MGH has one
        return plain, (note,) if silent else ()
    usable_ones = [(kind, matrix) for kind, matrix in matrices if usable(matrix)]
    if not usable_ones:
        return None, ()
    kind, affine = usable_ones[0]
    if len(usable_ones) < len(matrices):
        return affine, (f"{name} has one unusable matrix in its header; its {kind} is used.",)
    if len(usable_ones) == 2:
        apart = corners_apart(usable_ones[0][1], usable_ones[1][1], image.shape[:3])
        if apart > 0.1 * min(np.linalg.norm(affine[:3, :3], axis=0)):
            return affine, (
                f"{name} has two matrices in its header that disagree by up to {apart:.1f} mm; "
                "the sform is used.",
            )
    return affine, ()


def _matrix(header: Any, kind: str) -> Floats | None:
    """The sform or qform that a header holds, if its code says so; NaN where it makes no sense."""
    if not hasattr(header, f"get_{kind}"):
        return None
    try:
        matrix = getattr(header, f"get_{kind}")(coded=True)[0]
    except Exception:  # a quaternion that is no rotation
        return np.full((4, 4), np.nan)
    return None if matrix is None else np.asarray(matrix, dtype=np.float64)


def _unit(header: Any) -> Floats:
    """(4, 4): from the unit in which a header gives its sizes to mm."""
    try:
        unit = header.get_xyzt_units()[0]
    except (AttributeError, KeyError):  # no NIfTI, or a code that means nothing
        unit = "unknown"
    return np.diag([*[MILLIMETRES.get(unit, 1.0)] * 3, 1.0])


def _itk_notes(image: Any, file: Path | None, affine: Floats, name: str) -> tuple[str, ...]:
    """A sentence where ITK puts a NIfTI or Analyze file elsewhere than `affine` does.

    ITK itself is asked: it chooses between two matrices by its own rules, takes voxel sizes from
    pixdim, and has no shear.
    """
    import nibabel

    if not isinstance(image, nibabel.AnalyzeImage | nibabel.Nifti1Pair):
        return ()
    with tempfile.TemporaryDirectory() as folder:
        if file is None:  # the header alone is enough for ITK
            header, ending = image.header.copy(), "hdr"
            if isinstance(header, nibabel.Nifti1Header):
                header["magic"], ending = header.single_magic, "nii"
                header["vox_offset"] = header.single_vox_offset
            file = Path(folder) / f"a.{ending}"
            file.write_bytes(header.binaryblock + bytes(4))
        by_itk = _itk_affine(file)
    if by_itk is None:
        written = right_angles(affine, image.shape) is affine
        return (
            f"ITK and ANTs cannot open {name}, whose axes are not at right angles; what is written "
            f"on its grid they {'cannot' if written else 'can'} open.",
        )
    return _apart_note(by_itk, affine, image.shape, name, _itk_choice(image, by_itk))


def _apart_note(
    by_itk: Floats, affine: Floats, shape: Sequence[int], name: str, choice: str
) -> tuple[str, ...]:
    """A sentence where two affines of one file lie more than 1 % of a voxel apart."""
    axes = 3 if len(shape) > 2 else 2  # of a file of two axes ITK knows two coordinates
    flat = np.diag([1.0, 1.0, float(axes == 3), 1.0])
    apart = corners_apart(flat @ by_itk, flat @ affine, shape)
    if apart <= 0.01 * min(np.linalg.norm(affine[:3, :axes], axis=0)):
        return ()
    return (
        f"ITK and ANTs put {name} up to {apart:.3g} mm away from where it is here: they take "
        f"{choice}.",
    )


def _itk_choice(image: Any, by_itk: Floats) -> str:
    """Which part of a header ITK has taken."""
    header, shape = image.header, image.shape
    qform, sform = _matrix(header, "qform"), _matrix(header, "sform")
    if qform is not None and corners_apart(_unit(header) @ qform, by_itk, shape) < 1e-2:
        return "its qform"
    if sform is not None or qform is not None:
        return "its voxel sizes, pixdim, in place of those of its matrix"
    return "its voxel sizes alone, from a corner at 0"


def _itk_affine(file: Path) -> Floats | None:
    """(4, 4) voxel -> mm, RAS, of an image as ITK reads its header; None if it refuses to."""
    import SimpleITK as sitk

    warnings = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(file))
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warnings)
    return _affine_of_itk(reader)


def header_notes(path: str | os.PathLike[str], name: str = "disp") -> tuple[str, ...]:
    """What a user should hear about the header of a NIfTI file that is read already."""
    import nibabel

    if not str(path).lower().endswith(NIBABEL_SUFFIXES):
        return ()
    loaded: Any = nibabel.load(path)
    affine, notes = _nibabel_affine(loaded, name)
    return notes if affine is None else notes + _itk_notes(loaded, Path(path), affine, name)


def _affine_of_itk(image: Any) -> Floats:
    """(4, 4) voxel -> mm, RAS, from what ITK says of an image or of a file that it has opened."""
    d, affine = min(image.GetDimension(), 3), np.eye(4)
    direction = np.asarray(image.GetDirection()).reshape([image.GetDimension()] * 2)[:d, :d]
    affine[:d, :d] = direction * np.asarray(image.GetSpacing())[:d]
    affine[:d, 3] = image.GetOrigin()[:d]
    ras: Floats = LPS @ affine
    return ras


def _from_itk(path: Path, name: str, labels: bool) -> Image:
    """Read through SimpleITK, and turn LPS into RAS."""
    import SimpleITK as sitk

    loaded = _itk_image(path, name)
    channels = loaded.GetNumberOfComponentsPerPixel()
    values = sitk.GetArrayFromImage(loaded)
    if channels > 1:
        # many programs save a grey picture with a palette, or as three equal colours
        picture = channels == 3 and values.dtype in (np.uint8, np.uint16)
        if not (picture and (values == values[..., :1]).all()):
            raise ValueError(
                f"{name} has {channels} values per pixel, expected a grey image: "
                "one value, or three equal ones."
            )
        values = values[..., 0]
    values = values.T  # ITK's arrays are (z, y, x)
    affine = _affine_of_itk(loaded)
    notes: tuple[str, ...] = ()
    if path.suffix.lower() in PICTURES:
        by_itk, affine = affine, LPS.copy()
        notes = _apart_note(by_itk, affine, values.shape, name, "the resolution for printing")
    if not usable(affine):
        raise ValueError(
            f"{name} has a header whose matrix cannot be inverted, expected a valid one."
        )
    flat, plane, across = _flat(values, affine, name)
    return Image(check_values(flat, name, labels)[None, None], plane, True, notes, across)


def _itk_image(path: Path, name: str) -> Any:
    """An image as SimpleITK reads it, if its voxels are all in its own file or in one beside it."""
    import SimpleITK as sitk

    suffix = path.suffix.lower()
    kind = ITK_SUFFIXES[suffix]
    with _readable(name, suffix[1:].upper()):
        if kind == "MetaImageIO":
            payload = files.metaimage_payload(path)
        elif kind == "NrrdImageIO":
            payload = files.nrrd_payload(path)
        else:
            payload = files.Payload(path, packed="other")
        if kind in ("PNGImageIO", "JPEGImageIO"):
            from PIL import Image as Picture

            with Picture.open(path) as opened:  # ITK fills the missing part of a JPEG with grey
                opened.verify() if kind == "PNGImageIO" else opened.load()
        reader = sitk.ImageFileReader()
        reader.SetImageIO(kind)  # the suffix decides, not what the content looks like
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        pixel = sitk.Image([1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
        files.check_payload(
            payload, math.prod(reader.GetSize()) * reader.GetNumberOfComponents() * pixel
        )
        return reader.Execute()


def _flat(
    values: NDArray[Any], affine: Floats, name: str
) -> tuple[NDArray[Any], Floats, int | None]:
    """Values of 2 or 3 axes; the affine, in 2D with its third column across; and `Grid.across`.

    Raises:
        ValueError: a series, or an image without extent along two axes.
    """
    shape = tuple(values.shape)
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or 0 in shape:
        hint = " (one volume, not a series)" if values.ndim > 3 else ""
        raise ValueError(f"{name} has shape {shape}, expected a 2D or 3D image{hint}.")
    single = [axis for axis, n in enumerate(values.shape) if n == 1]
    if len(single) > values.ndim - 2:
        raise ValueError(
            f"{name} has shape {shape}, expected two or more voxels along two axes at least."
        )
    if not single:
        return values, affine, None
    across = single[0]
    columns = [axis for axis in range(3) if axis != across] + [across, 3]
    return values.squeeze(across), affine[:, columns], across


def check_values(values: NDArray[Any] | Tensor, name: str, labels: bool = False) -> Tensor:
    """The values as float32 (or int32 labels), if they are finite real numbers.

    Raises:
        ValueError: complex or structured values, NaN or infinity, labels that are no whole numbers.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # numpy has none
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {array.dtype} values, expected real numbers.")
    if labels:
        if array.dtype.kind == "f" and not (
            np.isfinite(array).all() and (array == np.rint(array)).all()
        ):
            raise ValueError(
                f"{name} holds values that are not whole numbers, expected a label map."
            )
        if array.size and max(abs(int(array.min())), abs(int(array.max()))) >= 2**31:
            raise ValueError(f"{name} holds labels beyond 2^31, expected smaller ones.")
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        noun = "values" if bad > 1 else "value"
        raise ValueError(f"{name} holds {bad} NaN or infinite {noun}, expected finite numbers.")
    return torch.from_numpy(array.copy() if not array.flags.writeable else array)


def as_image(source: Any, name: str = "image", labels: bool = False) -> Image:
    """An `Image` from a path, a nibabel image, an array or a tensor.

    An array has the shape S of two or three axes; leading axes of size 1 (batch, channel) may stand
    before them and are dropped, so (1, 160, 192) is a 2D image. It lies on a grid of 1 mm. Three or
    four values beside two longer axes are the colours of a picture, and refused.
    """
    if isinstance(source, Image):
        return source
    if isinstance(source, str | os.PathLike):
        return read(source, name, labels)
    if hasattr(source, "dataobj"):
        return from_nibabel(source, name, labels)
    if not isinstance(source, np.ndarray | Tensor):
        raise ValueError(
            f"{name} is of type {type(source).__name__}, "
            "expected a path, a nibabel image, an array or a tensor."
        )
    shape = tuple(source.shape)
    while source.ndim > 2 and source.shape[0] == 1:
        source = source[0]
    values = check_values(source, name, labels)
    flat, affine, across = _flat(values.numpy(), np.eye(4), name)
    small, *others = sorted(flat.shape)
    if len(others) == 2 and small in (3, 4) and others[0] >= 16:
        raise ValueError(
            f"{name} has shape {shape}, which looks like a colour picture, expected one value a "
            "pixel, such as its green channel alone."
        )
    data = torch.from_numpy(flat)[None, None]
    return Image(data, affine, physical=False, across=across)


def canonical(image: Image) -> Image:
    """The same image with its axes to R, A, S, as nearly as they go; of a slice, two of them.

    nibabel's `as_closest_canonical` for an `Image`, which may have two axes: voxels are reordered
    and flipped, none is interpolated.
    """
    grid = image.grid.canonical()
    values = image.grid.to_canonical(image.data).contiguous()
    return Image(values, grid.affine, image.physical, image.notes, image.across)


# writing ----------------------------------------------------------------------------------------


def write_image(
    data: Tensor, affine: Floats, path: str | os.PathLike[str], across: int | None = 2
) -> None:
    """Write (1, 1, *S), or a series (1, T, *S), as NIfTI; `affine` (4, 4) is voxel -> mm, RAS.

    A 2D image becomes a volume of one slice, with that slice along axis `across`, or, for None, a
    file of two axes. Labels of 64 bits are written with 32, half precision as float32. The header
    is new: nothing of the input's description fields gets into it.

    Raises:
        ValueError: labels beyond 2^31; a file that cannot be written.
    """
    values = data[0].detach().cpu()
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    array = values.numpy()
    if array.dtype.kind in "biu" and array.dtype.itemsize > 4:
        array = check_values(array, "data", labels=True).numpy()
    array = np.moveaxis(array.astype(np.uint8) if array.dtype == bool else array, 0, -1)
    if array.ndim == 3:
        array, affine = _unflat(array, affine, across)
    _save_nifti(array[..., 0] if array.shape[-1] == 1 else array, affine, path)


def _unflat(
    values: NDArray[Any], affine: Floats, across: int | None
) -> tuple[NDArray[Any], Floats]:
    """Undoes `_flat`: (X, Y, ...) with the axis of size 1 where the file had it."""
    if across is None:
        return values, affine
    columns = [0, 1]
    columns.insert(across, 2)
    return np.expand_dims(values, across), affine[:, [*columns, 3]]


def _save_nifti(
    values: NDArray[Any], affine: Floats, path: str | os.PathLike[str], intent: int = 0
) -> None:
    """Write NIfTI with sform and, where it can say the same, qform; in place when complete."""
    import nibabel

    affine = right_angles(affine, values.shape)
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.header.set_intent(intent)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1, strip_shears=True)
    if not np.allclose(image.get_qform(), affine, atol=1e-3):
        image.set_qform(None, code=0)  # a sheared grid: a quaternion cannot say it
    path = Path(path)
    with staged(path.parent) as folder:
        nibabel.save(image, folder / path.name)


def right_angles(affine: Floats, shape: Sequence[int]) -> Floats:
    """The affine with axes at right angles, which is all that ITK opens, where that moves no corner
    of the grid by more than 1 % of a voxel: rounding in a header moves less. Else as it is."""
    size = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / size)
    square = affine.copy()
    square[:3, :3] = left @ right * size
    middle = np.append((np.asarray((*shape, 1, 1)[:3]) - 1) / 2, 1.0)
    square[:3, 3] += ((affine - square) @ middle)[:3]  # about the centre
    apart = corners_apart(affine, square, shape[:3]) / min(size)
    return square if 1e-6 < apart < 0.01 else affine


# transforms -------------------------------------------------------------------------------------


def write_transform(transform: Transform, path: str | os.PathLike[str]) -> None:
    """Write a transform the way ITK, ANTs, SimpleITK and 3D Slicer read it: as displacements.

    A 5D NIfTI file (X, Y, Z, 1, 3) on the fixed grid with vector intent (1007). Each vector, in mm
    and LPS, leads from a point of the fixed image to its counterpart in the moving image; ITK
    resamples the moving image onto the fixed grid with it.

    A slice of a volume has a field of two equal slices, itself and the next: one alone would be
    read by ITK as a 2D field, which does not fit a volume. An image whose file has two axes has a
    2D field, (X, Y, 1, 1, 2), if both images lie in the plane of x and y. Otherwise it is
    (X, Y, 1, 1, 3), which `read_transform` understands and ITK's 2D reader does not: ITK has no 2D
    images in other planes.

    Args:
        transform: of 2 or 3 axes.
        path: ends in .nii or .nii.gz.
    """
    fixed, moving = transform.fixed, transform.moving
    d, across = fixed.ndim, fixed.across
    index = np.moveaxis(np.indices(fixed.shape, dtype=np.float64), 0, -1).reshape(-1, d)
    ends = moving.to_mm(index + transform.voxels().double().flatten(2)[0].T.numpy())
    # from where ITK will find the voxels of the file
    start = Grid(fixed.shape, right_angles(fixed.affine, fixed.shape)).to_mm(index)
    vectors = ((ends - start) * np.diag(LPS)[:3]).reshape(*fixed.shape, 3)  # RAS -> LPS
    affine = fixed.affine
    if d == 2 and across is not None:
        vectors, affine = _unflat(vectors, affine, across)
        vectors = np.repeat(vectors, 2, axis=across)
    elif d == 2:
        vectors = vectors[:, :, None]
        if _is_axial(fixed.affine) and _is_axial(moving.affine):
            vectors = vectors[..., :2]
    _save_nifti(vectors[:, :, :, None].astype(np.float32), affine, path, VECTOR_INTENT)


def _is_axial(affine: Floats) -> bool:
    """Whether a slice lies in the x-y plane, where ITK has 2D images."""
    return bool(np.allclose(affine[2, :2], 0) and np.allclose(affine[:2, 2], 0))


def read_transform(
    path: str | os.PathLike[str], moving: Grid, fixed: Grid | None = None, name: str = "disp"
) -> Transform:
    """Read a transform in the ITK convention: the inverse of `write_transform`.

    Args:
        path: a displacement field: NIfTI of shape (X, Y, Z, 1, 3), or (X, Y, 1, 1, 2) in 2D, as ITK
            and ANTs write them, or MHA or NRRD with a vector per voxel. Or an affine transform of
            ITK or ANTs (.mat, .tfm, .txt, .h5), which needs `fixed`.
        moving: the grid of the image that will be warped.
        fixed: where the result is wanted, of a file that has no grid of its own.
        name: what the file is called in error messages.

    Raises:
        FileNotFoundError, ValueError: as in `read`, or it is no transform of this kind.
    """
    path = Path(path)
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{name} is a folder, expected one displacement file.")
        raise FileNotFoundError(f"{name}: there is no such file.")
    if path.name.lower().endswith(MATRIX_SUFFIXES):
        if fixed is None:
            raise ValueError(
                f"{name} is a matrix without a grid, expected with it the fixed image, whose grid "
                "the result shall have (--like on the command line)."
            )
        return Transform.affine(fixed, moving, _itk_matrix(path, name))
    vectors, affine = _field(path, name)
    for axis in range(3):  # of a slice, see `write_transform`
        if moving.ndim == 2 and vectors.shape[axis] == 2:
            first, second = np.split(vectors, 2, axis=axis)
            vectors = first if np.array_equal(first, second) else vectors
    flat, affine, across = _flat(np.zeros(vectors.shape[:-1]), affine, name)
    if vectors.shape[-1] == 2:  # a 2D field: its file has two axes
        across = None
    grid, d = Grid(flat.shape, affine, across), flat.ndim
    if d != moving.ndim:
        raise ValueError(
            f"image is {moving.ndim}D {moving.shape} and {name} {d}D, "
            "expected the same number of axes."
        )
    index = np.moveaxis(np.indices(flat.shape, dtype=np.float64), 0, -1).reshape(-1, d)
    ends = grid.to_mm(index)
    ends[:, : vectors.shape[-1]] += vectors.reshape(len(index), -1)
    disp = (moving.to_voxels(ends) - index).T.reshape(1, d, *flat.shape)
    return Transform.from_voxels(torch.from_numpy(disp), grid, moving)


def _field(path: Path, name: str) -> tuple[NDArray[Any], Floats]:
    """(X, Y, Z, 2 or 3) float64 vectors, mm, RAS, and the affine of their grid."""
    by_itk = path.name.lower().endswith(tuple(ITK_SUFFIXES))
    values, affine = (_itk_field if by_itk else _nifti_field)(path, name)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite values, expected finite numbers.")
    return values * np.diag(LPS)[: values.shape[-1]], affine


def _itk_field(path: Path, name: str) -> tuple[NDArray[Any], Floats]:
    """(X, Y, Z, 2 or 3) vectors, LPS, and the affine of their grid, RAS."""
    import SimpleITK as sitk

    field = _itk_image(path, name)
    size, d, channels = field.GetSize(), field.GetDimension(), field.GetNumberOfComponentsPerPixel()
    if d > 3 or channels != d:
        raise ValueError(
            f"{name} has shape {size} and {channels} values per voxel, "
            "expected one vector per voxel."
        )
    values = np.moveaxis(sitk.GetArrayFromImage(field), -1, 0).T  # (x, y, z, component)
    return values.reshape(*size, *[1] * (3 - d), d).astype(np.float64), _affine_of_itk(field)


def _nifti_field(path: Path, name: str) -> tuple[NDArray[Any], Floats]:
    """As `_itk_field`, whatever the intent of the file says of its vectors."""
    loaded = _load(path, name, "NIfTI")
    with _readable(name, "NIfTI"):
        values = np.asarray(loaded.dataobj, dtype=np.float64)
        affine, _ = _nibabel_affine(loaded, name)
    shape = tuple(values.shape)
    if len(shape) != 5 or shape[3] != 1 or not (shape[4] == 3 or shape[4] == 2 and shape[2] == 1):
        raise ValueError(f"{name} has shape {shape}, expected (X, Y, Z, 1, 3) or (X, Y, 1, 1, 2).")
    if affine is None:
        raise ValueError(
            f"{name} has a header whose matrix cannot be inverted, expected a valid one."
        )
    values = values[:, :, :, 0]
    if loaded.header.get_intent("code")[0] == DISPVECT_INTENT:
        values = values * np.diag(LPS)[: shape[4]]
    return values, affine


def _itk_matrix(path: Path, name: str) -> Floats:
    """(4, 4) fixed mm -> moving mm, RAS, of an affine or rigid transform as ITK writes it."""
    import SimpleITK as sitk

    with _readable(name, "an ITK transform"):
        transform = sitk.ReadTransform(str(path))
    if not transform.IsLinear():
        raise ValueError(f"{name} is no affine transform, expected one, or a displacement field.")
    d = transform.GetDimension()
    origin = np.array(transform.TransformPoint([0.0] * d))
    matrix = np.eye(4)
    matrix[:d, :d] = np.array([transform.TransformPoint(row) for row in np.eye(d).tolist()]).T
    matrix[:d, :d] -= origin[:, None]
    matrix[:d, 3] = origin
    ras: Floats = LPS @ matrix @ LPS
    return ras
