"""Files and physical space: the only module that knows about millimetres.

Inside regkit everything is voxels. A file adds an *affine*, the 4x4 matrix that sends a voxel index
to a place in the scanner in millimetres, with the axes to the Right, Anterior and Superior (RAS,
the convention of NIfTI and nibabel). ITK, ANTs, SimpleITK and 3D Slicer point the first two axes
the other way (LPS). The two meet in this module and nowhere else.

Reading refuses what cannot be registered, with one sentence. Writing never leaves half a file
behind: see `regkit.files`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from regkit import files
from regkit.files import check_writable as check_writable
from regkit.files import staged
from regkit.spatial import affine_to_disp, check_disp, identity_grid, warp

# what SimpleITK reads for us; NIfTI and FreeSurfer's MGH go through nibabel
ITK_SUFFIXES = {
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".png": "PNGImageIO",
    ".jpg": "JPEGImageIO",
    ".jpeg": "JPEGImageIO",
    ".tif": "TIFFImageIO",
    ".tiff": "TIFFImageIO",
}
NIBABEL_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS <-> LPS, its own inverse
VECTOR_INTENT = 1007  # NIFTI_INTENT_VECTOR: what ITK and ANTs give a displacement field


@dataclass(frozen=True)
class Image:
    """One image and where it lies.

    data: (1, 1, *S), S of 2 or 3 axes; float32, or int32 for a label map.
    affine: (4, 4) float64, voxel index -> mm, RAS. Also 4x4 in 2D: the slice is a plane in space.
    physical: False for a bare array, whose affine is the identity for want of a better one.
    notes: one sentence for each thing in the header that a user should hear about.
    """

    data: Tensor
    affine: np.ndarray
    physical: bool = True
    notes: tuple[str, ...] = ()

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
        return spacing_of(self.affine, self.ndim)


def spacing_of(affine: np.ndarray, ndim: int) -> tuple[float, ...]:
    """Voxel size along each of the first `ndim` array axes, mm: the lengths of the columns."""
    return tuple(float(n) for n in np.linalg.norm(affine[:3, :ndim], axis=0))


# reading ----------------------------------------------------------------------------------------


def read(path: str | os.PathLike, name: str = "image", labels: bool = False) -> Image:
    """Read a 2D or 3D image.

    Args:
        path: NIfTI (.nii, .nii.gz), or MHA, MHD, NRRD, PNG, JPEG, TIFF (through SimpleITK); of
            pictures the grey ones, also where grey is written as three equal colours.
        name: what the image is called in error messages, for example "moving". The path is never
            repeated there: a file name may hold a patient's name, and messages end up in logs.
        labels: read a label map: whole numbers, int32.

    Returns:
        An `Image`. Trailing axes of size 1 are dropped, so (160, 192, 1) is a 2D image. Integer
        files become float32 unless `labels` is set.

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
        loaded = _load(path, name, "MGH" if "mg" in lower[-3:] else "NIfTI")
        return from_nibabel(loaded, name, labels)
    if lower.endswith(tuple(ITK_SUFFIXES)):
        return _from_itk(path, name, labels)
    known = ", ".join([*NIBABEL_SUFFIXES, *ITK_SUFFIXES])
    raise ValueError(f"{name} is a file of an unknown type, expected one of {known}.")


@contextmanager
def _readable(name: str, kind: str) -> Iterator[None]:
    """Turn whatever a reader throws at a broken file into one sentence."""
    try:
        yield
    except MemoryError:
        raise
    except files.Elsewhere:
        raise ValueError(
            f"{name} is a header that names its data by a path, a list, a pattern or a link, "
            "expected data in the file itself or in a file of a plain name beside it."
        ) from None
    except Exception:  # readers raise OSError, EOFError, zlib.error, ValueError, RuntimeError, ...
        raise ValueError(
            f"{name} cannot be read as {kind}: the file is cut short, damaged or of another type."
        ) from None


def _load(path: Path, name: str, kind: str) -> Any:
    """A nibabel image whose voxels are all there, and undamaged as far as a checksum knows."""
    import nibabel

    with _readable(name, kind):
        loaded: Any = nibabel.load(path)
        claimed = math.prod(loaded.shape) * loaded.get_data_dtype().itemsize
        start = int(loaded.dataobj.offset)
        if start < 0 or min(loaded.shape, default=0) < 0:
            raise ValueError
        files.check_payload(files.packed_by_name(path), start + claimed)
    return loaded


def from_nibabel(image: Any, name: str = "image", labels: bool = False) -> Image:
    """An `Image` from a nibabel image in memory. Arguments and errors as in `read`."""
    with _readable(name, "NIfTI"):
        values = np.asanyarray(image.dataobj)
        affine, notes = _nifti_affine(image, name)
    if affine is None:
        raise ValueError(
            f"{name} has a header whose matrix cannot be inverted, expected a valid one."
        )
    return Image(_tensor(values, name, labels), affine, True, notes)


def _nifti_affine(image: Any, name: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The first usable of sform, qform and plain voxel sizes, and what is odd about it.

    Headers with two matrices that disagree are common after a conversion gone wrong. We follow
    nibabel and take the sform, but never in silence.
    """
    header = image.header
    found = []
    for kind in ("sform", "qform"):
        if hasattr(header, f"get_{kind}"):
            try:
                matrix = getattr(header, f"get_{kind}")(coded=True)[0]
            except Exception:  # a quaternion that is no rotation
                matrix = np.full((4, 4), np.nan)
            if matrix is not None:
                found.append((kind, np.asarray(matrix, dtype=np.float64)))
    if not found:  # neither is set, or another format of nibabel with one affine only
        plain = image.affine if image.affine is not None else header.get_best_affine()
        if not _usable(plain):
            return None, ()
        note = f"{name} has no orientation in its header; its axes are taken as they come."
        return np.asarray(plain, np.float64), (note,) if hasattr(header, "get_sform") else ()
    usable = [(kind, matrix) for kind, matrix in found if _usable(matrix)]
    if not usable:
        return None, ()
    kind, affine = usable[0]
    if len(usable) < len(found):
        return affine, (f"{name} has one unusable matrix in its header; its {kind} is used.",)
    if len(usable) == 2:
        apart = _apart(usable[0][1], usable[1][1], image.shape[:3])
        if apart > 0.1 * min(spacing_of(affine, 3)):
            return affine, (
                f"{name} has two matrices in its header that disagree by up to {apart:.1f} mm; "
                "the sform is used.",
            )
    return affine, ()


def _apart(a: np.ndarray, b: np.ndarray, shape: Sequence[int]) -> float:
    """How far two affines put one corner of a grid from each other at most, mm."""
    sizes = (*shape, 1)[:3]
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in sizes])).reshape(3, -1)
    return float(np.abs((a - b)[:3, :3] @ corners + (a - b)[:3, 3:]).max())


def _usable(affine: np.ndarray) -> bool:
    """Finite, invertible, and not flat for want of precision."""
    if not np.isfinite(affine).all():
        return False
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    return bool((sizes > 0).all() and abs(np.linalg.det(affine[:3, :3] / sizes)) > 1e-3)


def _from_itk(path: Path, name: str, labels: bool) -> Image:
    """Read through SimpleITK, and turn LPS into RAS."""
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

            with Picture.open(path) as opened:  # ITK fills what a JPEG lacks with grey
                opened.verify() if kind == "PNGImageIO" else opened.load()
        reader = sitk.ImageFileReader()
        reader.SetImageIO(kind)  # the suffix decides, not what the content looks like
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        pixel = sitk.Image([1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
        files.check_payload(
            payload, math.prod(reader.GetSize()) * reader.GetNumberOfComponents() * pixel
        )
        loaded = reader.Execute()
    d, channels = loaded.GetDimension(), loaded.GetNumberOfComponentsPerPixel()
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
    if d > 3:  # refused below, by its shape
        return Image(_tensor(values, name, labels), np.eye(4))
    affine = np.eye(4)
    direction = np.asarray(loaded.GetDirection()).reshape(d, d)
    affine[:d, :d] = direction * np.asarray(loaded.GetSpacing())
    affine[:d, 3] = loaded.GetOrigin()
    if not _usable(affine):
        raise ValueError(
            f"{name} has a header whose matrix cannot be inverted, expected a valid one."
        )
    return Image(_tensor(values, name, labels), LPS @ affine)


def _tensor(values: np.ndarray, name: str, labels: bool) -> Tensor:
    """(1, 1, *S) float32 (or int32) from an array of a file, or the reason why not."""
    shape = tuple(values.shape)
    while values.ndim > 2 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or 0 in shape:
        hint = " (one volume, not a series)" if values.ndim > 3 else ""
        raise ValueError(f"{name} has shape {shape}, expected a 2D or 3D image{hint}.")
    return check_values(values, name, labels)[None, None]


def check_values(values: np.ndarray | Tensor, name: str, labels: bool = False) -> Tensor:
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
    if source.ndim not in (2, 3) or 0 in shape:
        raise ValueError(f"{name} has shape {shape}, expected a 2D or 3D image.")
    small, *others = sorted(source.shape)
    if len(others) == 2 and small in (3, 4) and others[0] >= 16:
        raise ValueError(
            f"{name} has shape {shape}, which looks like a colour picture, expected one value a "
            "pixel, such as its green channel alone."
        )
    return Image(check_values(source, name, labels)[None, None], np.eye(4), physical=False)


# from grid to grid ------------------------------------------------------------------------------


def voxel_map(
    fixed_affine: np.ndarray,
    moving_affine: np.ndarray,
    ndim: int,
    matrix: np.ndarray | None = None,
) -> np.ndarray:
    """The matrix that sends a voxel of the fixed grid to the voxel of the moving grid it lies on.

    fixed voxel -> mm -> (matrix) -> mm -> moving voxel. In 2D both grids are planes in space; what
    leads out of the plane is dropped.

    Args:
        fixed_affine, moving_affine: (4, 4), voxel -> mm, RAS.
        ndim: 2 or 3.
        matrix: (4, 4), fixed mm -> moving mm, for example from `regkit.classical.align`.

    Returns:
        (ndim + 1, ndim + 1) float64, homogeneous.

    Raises:
        ValueError: two slices that lie in different planes.
    """
    full = np.linalg.inv(moving_affine) @ (np.eye(4) if matrix is None else matrix) @ fixed_affine
    if ndim == 3:
        return full
    flat = full[np.ix_([0, 1, 3], [0, 1, 3])]
    area = [np.linalg.norm(np.cross(a[:3, 0], a[:3, 1])) for a in (fixed_affine, moving_affine)]
    if abs(np.linalg.det(flat[:2, :2])) * area[1] / area[0] < 0.7:  # the cosine between the planes
        raise ValueError(
            "moving is a slice of another plane than fixed, expected two slices of one orientation."
        )
    return flat


def map_to_theta(matrix: np.ndarray, shape: Sequence[int]) -> Tensor:
    """A voxel map (d+1, d+1) as theta (1, d, d+1) float64, about the centre of `shape`."""
    d = len(shape)
    centre = (np.asarray(shape) - 1) / 2
    linear, offset = matrix[:d, :d], matrix[:d, d]
    theta = np.concatenate([linear, (linear @ centre + offset - centre)[:, None]], axis=1)
    return torch.from_numpy(theta)[None]


def theta_to_world(
    theta: Tensor, shape: Sequence[int], fixed_affine: np.ndarray, moving_affine: np.ndarray
) -> np.ndarray:
    """(1, d, d+1) as (4, 4), fixed mm -> moving mm: undoes `map_to_theta(voxel_map(...))`.

    In 2D slice 0 goes to slice 0.
    """
    d = len(shape)
    centre = (np.asarray(shape) - 1) / 2
    linear, shift = theta[0, :, :d].double().numpy(), theta[0, :, d].double().numpy()
    full, keep = np.eye(4), [*range(d), 3]
    full[np.ix_(keep[:d], keep[:d])] = linear
    full[keep[:d], 3] = centre + shift - linear @ centre
    return moving_affine @ full @ np.linalg.inv(fixed_affine)


def map_to_disp(matrix: np.ndarray, shape: Sequence[int]) -> Tensor:
    """A voxel map (d+1, d+1) as displacement (1, d, *shape) float32: matrix x - x."""
    return affine_to_disp(map_to_theta(matrix, shape), shape).float()


def map_points(matrix: np.ndarray, points: Tensor) -> Tensor:
    """Send voxel coordinates (1, d, *S) through a voxel map (d+1, d+1)."""
    d = points.shape[1]
    m = torch.from_numpy(matrix).to(points)
    return (m[:d, :d] @ points.flatten(2) + m[:d, d:]).reshape(points.shape)


def pull(image: Tensor, disp: Tensor, mode: str = "linear") -> Tensor:
    """`regkit.spatial.warp`, with the image's smallest value outside it.

    Zero is the background of a skull-stripped brain, but water in a CT, where air is -1000. Label
    maps (mode "nearest") have 0 outside.
    """
    if mode == "nearest":
        return warp(image, disp, mode="nearest")
    lowest = image.min()
    return warp(image - lowest, disp) + lowest


def resample_to(
    image: Tensor,
    affine: np.ndarray,
    shape: Sequence[int],
    new_affine: np.ndarray,
    mode: str = "linear",
    matrix: np.ndarray | None = None,
) -> Tensor:
    """Bring an image to another grid: (1, C, *M) to (1, C, *shape).

    Args:
        image: (1, C, *M), on the grid of `affine`.
        affine: (4, 4), voxel -> mm, RAS.
        shape, new_affine: the new grid.
        mode: "linear", or "nearest" for label maps. Where the new voxels are larger, "linear" first
            blurs by the difference, so that fine detail does not turn into noise.
        matrix: (4, 4), new mm -> old mm, if the image is to move as well.
    """
    to_old = voxel_map(new_affine, affine, len(shape), matrix)
    if tuple(shape) == tuple(image.shape[2:]) and np.allclose(
        to_old, np.eye(len(to_old)), atol=1e-6
    ):
        return image
    if mode == "linear":
        step = np.linalg.norm(to_old[: len(shape), : len(shape)], axis=1)  # new voxel in old ones
        image = _blur(image, step)
    return pull(image, map_to_disp(to_old, shape), mode)


def _blur(image: Tensor, step: np.ndarray) -> Tensor:
    """Blur voxels of width 1 to voxels of width `step`, axis by axis.

    A voxel is seen as a Gaussian of its width at half height; widths add up in squares.
    """
    sigma = np.sqrt(np.maximum(step**2 - 1, 0)) / 2.355
    if (sigma < 0.2).all():
        return image
    blurred = ndimage.gaussian_filter(image.numpy(), (0, 0, *sigma), mode="nearest", truncate=3)
    return torch.from_numpy(blurred)


def same_grid(a: Image, b: Image) -> bool:
    """Whether two images have one grid: the same shape, and corners within 1 % of a voxel."""
    return a.shape == b.shape and _apart(a.affine, b.affine, a.shape) <= 0.01 * min(a.spacing)


def axis_order(affine: np.ndarray, ndim: int) -> list[tuple[int, int]]:
    """Which array axis runs along R, then A, then S, and which way: (axis, +1 or -1).

    In 2D: the two axes of the slice in the order of the world axes they run along.
    """
    import nibabel

    world = nibabel.io_orientation(affine)[:ndim]  # per array axis: world axis, sign
    order = np.argsort(world[:, 0])
    return [(int(k), int(world[k, 1])) for k in order]


def working_grid(
    shape: Sequence[int],
    affine: np.ndarray,
    spacing: Sequence[float],
    size: Sequence[int] | None = None,
) -> tuple[tuple[int, ...], np.ndarray]:
    """A grid that covers another one, its axes to R, A, S (as nearly as they go) with a voxel size.

    The new axes run along the old ones, reordered and flipped, about the same centre. An oblique
    scan keeps its obliqueness. With `size` the new grid has that many voxels, whether they cover
    the old one or not.

    Returns:
        (new shape, new affine).
    """
    d = len(shape)
    old_spacing = spacing_of(affine, d)
    new_affine = np.eye(4)
    new_affine[:3, 2] = affine[:3, 2]  # in 2D: across the slice, as it was
    new_shape, centre = [], np.append((np.asarray(shape) - 1) / 2, [0.0] * (3 - d) + [1.0])
    for k, (axis, sign) in enumerate(axis_order(affine, d)):
        extent = (shape[axis] - 1) * old_spacing[axis]
        new_shape.append(int(np.ceil(extent / spacing[k] - 1e-3)) + 1 if size is None else size[k])
        new_affine[:3, k] = sign * affine[:3, axis] / old_spacing[axis] * spacing[k]
    middle = np.append((np.asarray(new_shape) - 1) / 2, [0.0] * (3 - d))
    new_affine[:3, 3] = (affine @ centre)[:3] - new_affine[:3, :3] @ middle
    return tuple(new_shape), new_affine


# writing ----------------------------------------------------------------------------------------


def write_image(data: Tensor, affine: np.ndarray, path: str | os.PathLike) -> None:
    """Write (1, 1, *S) as NIfTI. A 2D image becomes a volume of one slice: its plane is kept.

    The header is new: nothing of the input's description fields gets into it.
    """
    values = data[0, 0].detach().cpu().numpy()
    if values.ndim == 2:
        values = values[..., None]
    _save_nifti(values, affine, path)


def _save_nifti(
    values: np.ndarray, affine: np.ndarray, path: str | os.PathLike, intent: int = 0
) -> None:
    """Write NIfTI with sform and, where it can say the same, qform; in place when complete."""
    import nibabel

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


def _is_axial(affine: np.ndarray) -> bool:
    """Whether a slice lies in the x-y plane, where ITK has 2D images."""
    return bool(np.allclose(affine[2, :2], 0) and np.allclose(affine[:2, 2], 0))


def write_displacement(
    disp: Tensor, fixed_affine: np.ndarray, moving_affine: np.ndarray, path: str | os.PathLike
) -> None:
    """Write a displacement the way ITK, ANTs, SimpleITK and 3D Slicer read it.

    A 5D NIfTI file (X, Y, Z, 1, 3) on the fixed grid with vector intent (1007). Each vector, in mm
    and LPS, leads from a point of the fixed image to its counterpart in the moving image; ITK
    resamples the moving image onto the fixed grid with it.

    In 2D the file is (X, Y, 1, 1, 2), the 2D field of ITK, if both slices are axial. Otherwise it
    is (X, Y, 1, 1, 3), which `read_displacement` understands and ITK's 2D reader does not: ITK has
    no 2D images in other planes.

    Args:
        disp: (1, d, *S), voxels, fixed grid -> moving grid.
        fixed_affine, moving_affine: (4, 4), voxel -> mm, RAS, of the two grids.
        path: ends in .nii or .nii.gz.
    """
    check_disp(disp)
    d, shape = disp.shape[1], tuple(disp.shape[2:])
    grid = identity_grid(shape, dtype=torch.float64)[None]
    start = _to_mm(grid, fixed_affine)
    end = _to_mm(grid + disp.detach().cpu().double(), moving_affine)
    vectors = (end - start) * np.diag(LPS)[:3]  # RAS -> LPS
    flat = d == 2 and _is_axial(fixed_affine) and _is_axial(moving_affine)
    values = vectors[..., : 2 if flat else 3].reshape(*shape, *[1] * (4 - d), -1)
    _save_nifti(values.astype(np.float32), fixed_affine, path, VECTOR_INTENT)


def _to_mm(voxels: Tensor, affine: np.ndarray) -> np.ndarray:
    """Voxel coordinates (1, d, *S) to mm, (*S, 3), RAS."""
    d = voxels.shape[1]
    return np.moveaxis(voxels[0].numpy(), 0, -1) @ affine[:3, :d].T + affine[:3, 3]


def read_displacement(
    path: str | os.PathLike, moving_affine: np.ndarray, name: str = "disp"
) -> tuple[Tensor, np.ndarray]:
    """Read a displacement in the ITK convention: the inverse of `write_displacement`.

    Args:
        path: NIfTI of shape (X, Y, Z, 1, 3), or (X, Y, 1, 1, 2) in 2D, as ITK and ANTs write them.
        moving_affine: (4, 4), voxel -> mm, RAS, of the image that will be warped.
        name: what the file is called in error messages.

    Returns:
        disp (1, d, *S) float32, voxels, fixed grid -> moving grid; and the fixed grid's affine.

    Raises:
        FileNotFoundError, ValueError: as in `read`, or it is no displacement.
    """
    path = Path(path)
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{name} is a folder, expected one displacement file.")
        raise FileNotFoundError(f"{name}: there is no such file.")
    loaded = _load(path, name, "NIfTI")
    with _readable(name, "NIfTI"):
        values = np.asarray(loaded.dataobj, dtype=np.float64)
        affine, _ = _nifti_affine(loaded, name)
    shape = tuple(values.shape)
    if len(shape) != 5 or shape[3] != 1 or not (shape[4] == 3 or shape[4] == 2 and shape[2] == 1):
        raise ValueError(f"{name} has shape {shape}, expected (X, Y, Z, 1, 3) or (X, Y, 1, 1, 2).")
    if affine is None:
        raise ValueError(
            f"{name} has a header whose matrix cannot be inverted, expected a valid one."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite values, expected finite numbers.")
    d = 2 if shape[2] == 1 else 3
    vectors = np.zeros((*shape[:3], 3))
    vectors[..., : shape[4]] = values[:, :, :, 0]
    vectors *= np.diag(LPS)[:3]
    voxels = np.moveaxis(np.indices(shape[:3], dtype=np.float64), 0, -1)
    end = voxels @ affine[:3, :3].T + affine[:3, 3] + vectors
    back = np.linalg.inv(moving_affine)
    moved = end @ back[:3, :3].T + back[:3, 3]
    disp = np.moveaxis(moved - voxels, -1, 0)[:d]
    if d == 2:
        disp = disp[..., 0]
    return torch.from_numpy(np.ascontiguousarray(disp, dtype=np.float32))[None], affine
