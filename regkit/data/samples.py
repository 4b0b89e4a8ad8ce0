"""Real images from public repositories: fetched once, checked by their sums, then read from disk.

`samples.json` beside this file lists every file with its repository, commit, path and sha256. A
file lives at <cache>/<sample>/<file>, where <cache> is the folder named by the environment variable
REGKIT_DATA, or pooch's own cache folder. A file that is there with the right sum is never asked for
again, so a cache that was filled by hand works without a network.

The `load_*` functions read what the book and the tests use. They return `Subject`s whose axes run
to the patient's right, front and top (RAS, the nearest order that needs no resampling), so that
`imshow(image[0].T, origin="lower")` shows a slice upright. The tensor of an image or of labels that
a sample lacks is empty.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pooch
import torch
from torch import Tensor
from tqdm.auto import tqdm

from regkit import io
from regkit.data.cache import cache_folder
from regkit.data.subject import Subject
from regkit.messages import unknown

NONE = torch.empty(0)  # what a sample does not have


@dataclass(frozen=True)
class SampleFile:
    """One file of a sample: where it is in the cache, where it comes from, and its sum."""

    path: str
    url: str
    sha256: str
    bytes: int
    licence: str


@dataclass(frozen=True)
class Sample:
    """An open sample. `terms` is what a reader accepts, `shown` where its pictures may appear."""

    name: str
    title: str
    terms: str
    shown: str
    files: tuple[SampleFile, ...]

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)

    @property
    def licences(self) -> tuple[str, ...]:
        """The licences its repositories state, each once."""
        return tuple(dict.fromkeys(file.licence for file in self.files))


@functools.cache
def _table() -> dict[str, Any]:
    text = resources.files("regkit.data").joinpath("samples.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


@functools.cache
def samples() -> dict[str, Sample]:
    """All open samples by name."""
    return {
        name: Sample(
            name=name,
            title=entry["title"],
            terms=entry["terms"],
            shown=entry["shown"],
            files=tuple(
                SampleFile(
                    path=path,
                    url="https://raw.githubusercontent.com/"
                    f"{source['repository']}/{source['commit']}/{file['path']}",
                    sha256=file["sha256"],
                    bytes=file["bytes"],
                    licence=source["licence"],
                )
                for source in entry["sources"]
                for path, file in source["files"].items()
            ),
        )
        for name, entry in _table()["samples"].items()
    }


def _sample(name: str) -> Sample:
    listed = samples()
    if name not in listed:
        raise unknown("name", name, listed)
    return listed[name]


def _missing(sample: Sample) -> list[SampleFile]:
    """Files that are not in the cache, or there with another sum."""
    folder = cache_folder() / sample.name

    def good(file: SampleFile) -> bool:
        path = folder / file.path
        return path.is_file() and pooch.file_hash(str(path)) == file.sha256

    return [file for file in sample.files if not good(file)]


def cached(name: str) -> bool:
    """Whether every file of the sample is in the cache with the right sum (no network needed)."""
    return not _missing(_sample(name))


def fetch(name: str, progress: bool = False) -> Path:
    """Folder of an open sample, downloaded unless the cache holds it already.

    Args:
        name: one of `samples()`.
        progress: show a progress bar while downloading.

    Returns:
        <cache>/<name>, which holds every file of the sample with the right sum.

    Raises:
        ValueError: no such sample, a file whose sum is wrong also after a second download, or a
            cache folder that cannot be written.
        FileNotFoundError: files are missing and cannot be downloaded; the sentence says what to
            fetch from where, and where to put it.
    """
    sample = _sample(name)
    folder = cache_folder() / sample.name
    missing = _missing(sample)
    if not missing:
        return folder

    import requests  # slow to import, and only needed here

    from regkit.data import download

    sizes = {file.url: file.bytes for file in missing}

    def bounded(url: str, output: Any, pooch: Any) -> None:
        with download.get(url) as answer, Path(output).open("wb") as out:
            download.write(answer, out, sizes[url])

    store = pooch.create(
        path=folder,
        base_url="",
        registry={file.path: f"sha256:{file.sha256}" for file in missing},
        urls={file.path: file.url for file in missing},
        retry_if_failed=1,
    )
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")  # one line per file would tear the progress bar
    total = sum(file.bytes for file in missing)
    try:
        with tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=not progress) as bar:
            for done, file in enumerate(missing):
                try:
                    store.fetch(file.path, downloader=bounded)
                except requests.RequestException as error:
                    left = len(missing) - done
                    more = f" and {left - 1} more of this sample" if left > 1 else ""
                    raise FileNotFoundError(
                        f"sample {name!r} is not in the cache and cannot be downloaded "
                        f"({type(error).__name__}): fetch {file.url}{more} and put it at "
                        f"{folder / file.path} (REGKIT_DATA names the cache folder)."
                    ) from None
                except ValueError:
                    raise ValueError(
                        f"file {file.path!r} of sample {name!r} came from {file.url} with another "
                        f"sum than sha256 {file.sha256}: the download broke or its source changed."
                    ) from None
                bar.update(file.bytes)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"cache folder {folder} cannot be written ({error.strerror or 'no permission'}): "
            "set REGKIT_DATA to a folder that can."
        ) from None
    finally:
        logger.setLevel(level)
    return folder


# --- reading -----------------------------------------------------------------------------------


def _scan(
    name: str, affine: np.ndarray, image: np.ndarray | None = None, labels: np.ndarray | None = None
) -> Subject:
    """Turn and flip the axes (no resampling) until they run right, front, top."""

    to_ras = nib.orientations.io_orientation(affine)

    def turned(array: np.ndarray | None, dtype: type) -> Tensor:
        if array is None:
            return NONE
        array = nib.orientations.apply_orientation(array.astype(dtype), to_ras)
        return torch.from_numpy(np.ascontiguousarray(array))[None]

    shape = next(array.shape for array in (image, labels) if array is not None)
    affine = affine @ nib.orientations.inv_ornt_aff(to_ras, shape)
    return Subject(name, turned(image, np.float32), turned(labels, np.int16), affine)


def _slice(scan: Subject, axis: int, index: int, name: str) -> Subject:
    """One slice across a turned 3D scan; `axis`, which is left out, becomes the third of affine."""
    rest = [a for a in range(3) if a != axis]
    affine = scan.affine[:, [*rest, axis, 3]].copy()
    affine[:, 3] += scan.affine[:, axis] * index
    image, labels = (
        array.select(axis + 1, index).contiguous() if array.numel() else NONE
        for array in (scan.image, scan.labels)
    )
    return Subject(name, image, labels, affine)


def _read(path: Path, labels: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Array (*S) in the file's own order, and its RAS affine."""
    image = io.read(path, path.name, labels)
    return image.data[0, 0].numpy(), image.affine


def _picture(path: Path, channel: str = "L") -> Tensor:
    """A 2D picture (1, W, H) float32: axis 0 to the right, axis 1 up, intensities of the file.

    Of a picture in colour its brightness "L", or one of its channels "R", "G", "B".
    """
    if path.suffix == ".mha":
        array = _read(path)[0]
    else:
        from PIL import Image  # comes with matplotlib

        with Image.open(path) as picture:
            colours = picture.convert("L" if channel == "L" else "RGB")
            array = np.asarray(colours.getchannel(channel)).T
    return torch.from_numpy(np.ascontiguousarray(array[:, ::-1], dtype=np.float32))[None]


# (*S) array order of the OASIS npz files, which carry no affine: to the left, down, to the front
# (neurite-oasis). The origin is that of clapirn_B.nii.gz, which lies on the same grid.
OASIS_AFFINE = np.array([[-1.0, 0, 0, 80], [0, 0, 1, -112], [0, -1, 0, 96], [0, 0, 0, 1]])


def load_oasis_pair(progress: bool = False) -> tuple[Subject, Subject]:
    """Two OASIS brains on one 160 x 224 x 192 grid (RAS, 1 mm), aligned affinely.

    Returns:
        moving: vxm_subject, image in [0, 1] and FreeSurfer labels.
        fixed: clapirn_B, image in [0, 1], no labels (an empty tensor).
    """
    folder = fetch("oasis_3d", progress)
    with np.load(folder / "vxm_subject.npz", allow_pickle=False) as arrays:
        moving = _scan("vxm_subject", OASIS_AFFINE, arrays["vol"], arrays["seg"])
    image, affine = _read(folder / "clapirn_B.nii.gz")
    return moving, _scan("clapirn_B", affine, image)


def load_oasis_slices(progress: bool = False) -> tuple[Subject, Subject, list[int]]:
    """A labelled pair of coronal OASIS slices, (160, 192), 1 mm, aligned affinely.

    Returns:
        moving: slice 100 of vxm_subject.
        fixed: atlas_2d. Its pictures may appear on the reader's machine only.
        labels: the 19 structures of VoxelMorph's list (labels.npz) that both slices hold.
    """
    folder = fetch("oasis_3d", progress)
    moving = _slice(load_oasis_pair()[0], axis=1, index=100, name="vxm_subject[:, :, 100]")
    with np.load(folder / "atlas_2d.npz", allow_pickle=False) as arrays:
        image, seg = arrays["vol"][:, :, None], arrays["seg"][:, :, None]
    affine = OASIS_AFFINE.copy()
    affine[:, 3] += OASIS_AFFINE[:, 2] * 100
    fixed = _slice(_scan("atlas_2d", affine, image, seg), axis=1, index=0, name="atlas_2d")
    with np.load(folder / "labels.npz", allow_pickle=False) as arrays:
        listed = set(arrays["labels"].tolist())
    shared = listed & set(moving.labels.unique().tolist()) & set(fixed.labels.unique().tolist())
    return moving, fixed, sorted(shared)


def oasis_structures() -> dict[int, str]:
    """Names of the 13 structures (left and right merged) of `load_oasis_heads`, by label."""
    return {i: entry["name"] for i, entry in enumerate(_table()["oasis_3d_structures"], 1)}


def merge_structures(labels: Tensor) -> Tensor:
    """FreeSurfer labels -> the 13 structures of `oasis_structures`; all others become 0."""
    merged = torch.zeros_like(labels)
    for i, entry in enumerate(_table()["oasis_3d_structures"], 1):
        merged[torch.isin(labels, torch.tensor(entry["freesurfer"], dtype=labels.dtype))] = i
    return merged


def load_oasis_heads(progress: bool = False) -> tuple[Subject, Subject]:
    """Two OASIS brains on 256^3 grids (RAS, 1 mm) that are NOT aligned: affine registration first.

    Returns:
        c2fvit_A: image in [0, 1] and the 13 structures of `oasis_structures`. Its source names no
            structure; we matched its channels to FreeSurfer's by their overlap with a labelled
            brain after affine registration.
        c2fvit_B: image in [0, 1], no labels.
    """
    folder = fetch("oasis_3d", progress)
    onehot = nib.Nifti1Image.from_filename(folder / "c2fvit_A_seg13_onehot.nii.gz")
    # (256, 256, 256, 13), and the channels do not overlap
    labels = np.asarray(onehot.dataobj).astype(np.int16) @ np.arange(1, 14, dtype=np.int16)
    image, affine = _read(folder / "c2fvit_A.nii.gz")
    a = _scan("c2fvit_A", affine, image, labels)
    image, affine = _read(folder / "c2fvit_B.nii.gz")
    return a, _scan("c2fvit_B", affine, image)


def load_oasis_stack(progress: bool = False) -> Tensor:
    """The 80 aligned axial OASIS slices: (80, 1, 128, 128) float32 in [0, 1], no labels."""
    sample = _sample("oasis2d_mermaid")
    folder = fetch(sample.name, progress)
    slices = [_read(folder / path)[0] for path in sorted(file.path for file in sample.files)]
    return torch.from_numpy(np.stack(slices))[:, None]


def load_ants_slices(progress: bool = False) -> dict[str, Subject]:
    """r16, r27, r62, r64: (256, 256) slices of different people, 0..255, taken as 1 mm, unlabelled.

    Axis 0 runs to the right of the picture, axis 1 up.
    """
    folder = fetch("ants_slices", progress)
    names = ("r16", "r27", "r62", "r64")
    return {n: Subject(n, _picture(folder / f"{n}slice.jpg"), NONE, np.eye(4)) for n in names}


def load_ptbp_slabs(progress: bool = False) -> list[Subject]:
    """Slabs of 18 axial slices of 25 children, (182, 217, 18), RAS, 1 mm, one grid for all.

    T1 images in [0, 1] with skull. Labels 1 CSF, 2 cortical grey, 3 white, 4 deep grey matter (our
    reading; an intensity-driven automatic segmentation). Pictures may appear on the reader's
    machine only.
    """
    folder = fetch("ptbp_brain", progress) / "original"
    numbers = sorted(int(p.name[5:].split(".")[0]) for p in folder.glob("ilist*.nii.gz"))
    slabs = []
    for number in numbers:
        image, affine = _read(folder / f"ilist{number}.nii.gz")
        labels, _ = _read(folder / f"slist{number}.nii.gz", labels=True)
        slabs.append(_scan(f"child{number}", affine, image, labels))
    return slabs


def load_ptbp_slices(indices: Sequence[int] = (4, 9, 14), progress: bool = False) -> list[Subject]:
    """Axial slices of 25 children, (182, 217), 1 mm: of each slab of `load_ptbp_slabs` some.

    Args:
        indices: which of the slab's 18 slices, 0 the lowest.
    """
    if not all(0 <= i < 18 for i in indices):
        raise ValueError(f"indices is {tuple(indices)}, expected slice numbers from 0 to 17.")
    return [
        _slice(slab, axis=2, index=i, name=f"{slab.name}_slice{i}")
        for slab in load_ptbp_slabs(progress)
        for i in indices
    ]


def load_ptbp_modalities(progress: bool = False) -> dict[str, Subject]:
    """One child as "t1", "fa" and "cbf": (182, 217, 8), 1 mm, one grid: aligned by their source.

    All three in the units of their files and with the tissue labels of `load_ptbp_slices`. T1 shows
    the head, the fractional anisotropy is cut out along the brain, the blood flow (which may be
    negative) along a rougher outline. Of the slab's 18 slices only 8 are filled: those are here.
    Pictures may appear on the reader's machine only.
    """
    folder = fetch("ptbp_brain", progress) / "multimodal"
    files = {"t1": "mprage_t1", "fa": "30dir_fa_anatomical", "cbf": "MeanCBFWarpedToT1"}
    name = "PEDS012_20100813_"
    labels, affine = _read(folder / f"{name}BrainSegmentation.nii.gz", labels=True)
    affine = affine.copy()
    affine[:, 3] += affine[:, 1] * 5  # the slices run along axis 1 of the files
    scans = {}
    for key, file in files.items():
        image, _ = _read(folder / f"{name}{file}.nii.gz")
        scans[key] = _scan(f"child_{key}", affine, image[:, 5:13], labels[:, 5:13])
    return scans


def load_prostates(progress: bool = False) -> list[tuple[Subject, Subject, np.ndarray, np.ndarray]]:
    """MR and ultrasound of 8 prostates, on DIFFERENT grids: work in the units of their affines.

    Pictures may appear on the reader's machine only.

    Returns:
        Per patient mr (64, 64, 60) and ultrasound (44, 59, 41): images 0..255, blurred by their
            source, labels 1 = gland. The files' headers do not say how the two lie to each other;
            here both grids have their centre at 0, and a voxel is 0.4 units wide, as they say.
        mr_points, ultrasound_points: (N, 3), in these units, the centres of N corresponding
            landmarks. N is 0, 1 or 2; 8 pairs of points in all.
    """
    folder = fetch("prostate_mr_us", progress)
    patients = []
    for number in range(8):
        scans, points = [], []
        for side in ("mr", "us"):
            file = f"case{number:06d}.nii.gz"
            image, _ = _read(folder / f"{side}_images" / file)
            channels = np.asarray(
                nib.Nifti1Image.from_filename(folder / f"{side}_labels" / file).dataobj
            )
            channels = channels.reshape(*image.shape, -1)  # the first one is the gland
            affine = np.diag([0.4, 0.4, 0.4, 1.0])
            affine[:3, 3] = -0.2 * (np.array(image.shape) - 1)
            scans.append(_scan(f"{side}{number}", affine, image, channels[..., 0]))
            places = [np.argwhere(mark).mean(0) for mark in np.moveaxis(channels, -1, 0)[1:] > 0]
            points.append(nib.affines.apply_affine(affine, np.array(places).reshape(-1, 3)))
        patients.append((*scans, *points))
    return patients


def load_lung(progress: bool = False) -> tuple[Subject, Subject, np.ndarray, np.ndarray]:
    """Baseline and follow-up CT of one right lung, on DIFFERENT grids: work in millimetres.

    Returns:
        baseline, followup: image in Hounsfield units (-2048 outside the scan circle), labels = lung
            mask; 1.366 x 1.366 x 2.5 mm.
        baseline_points, followup_points: (26, 3) corresponding landmarks, RAS mm, those of the
            source's 100 pairs that lie well inside both images. Before registration they are
            35.25 mm apart on average, 4.27 mm after the mean translation.
    """
    folder = fetch("lung_ct", progress)
    scans = []
    for name in ("baseline", "followup"):
        image, affine = _read(folder / f"3DCT_lung_{name}.mha")
        mask, _ = _read(folder / f"3DCT_lung_{name}_mask.mha", labels=True)
        scans.append(_scan(name, affine, image, mask))
    table = _table()["lung_ct_landmarks"]
    flip = np.diag(io.LPS)[:3]  # the table is the source's: LPS
    points = [np.array(table[name]) * flip for name in ("baseline", "followup")]
    return scans[0], scans[1], points[0], points[1]


def load_labelmaps(progress: bool = False) -> list[Subject]:
    """FreeSurfer-style label maps of 5 brains, (148, 187, 155), RAS, 1 mm; no images.

    Their headers place them differently; voxel by voxel they agree with a mean Dice of 0.367.
    """
    folder = fetch("brain_labelmaps", progress)
    scans = []
    for i in range(1, 6):
        labels, affine = _read(folder / f"brain{i}_labels.nii.gz", labels=True)
        scans.append(_scan(f"brain{i}", affine, labels=labels))
    return scans


def load_brainweb(progress: bool = False) -> dict[str, Subject]:
    """Simulated T1 and proton density slices of one head, (221, 257), 1 mm, 0..255.

    Axis 0 runs to the right of the picture, axis 1 up. "t1" and "pd" are aligned. "pd_shifted" is
    pd moved by 13 mm to the right and 17 mm down; "pd_rotated" is turned by 10 degrees first, and
    "pd_scaled" made larger by 1.2 as well.
    """
    folder = fetch("brainweb_t1_pd_2d", progress)
    files = {
        "t1": "BrainT1SliceBorder20",
        "pd": "BrainProtonDensitySliceBorder20",
        "pd_shifted": "BrainProtonDensitySliceShifted13x17y",
        "pd_rotated": "BrainProtonDensitySliceR10X13Y17",
        "pd_scaled": "BrainProtonDensitySliceR10X13Y17S12",
    }
    pictures = {n: _picture(folder / f"{f}.png") for n, f in files.items()}
    return {n: Subject(n, picture, NONE, np.eye(4)) for n, picture in pictures.items()}


def load_two_visits(progress: bool = False) -> tuple[Subject, Subject, np.ndarray]:
    """One person's T1 slice at two visits, voxels of 1 x 1.2 mm, and the motion between the two.

    Pictures may appear on the reader's machine only.

    Returns:
        followup, baseline: images in the units of their files, on the files' own axes; the baseline
            has the label 1 in the head.
        matrix: (4, 4), RAS mm, as published: the answer of another program. The source does not say
            which way it leads; as it is, baseline to follow-up, it aligns the images.
    """
    folder = fetch("longitudinal_t1_2d", progress)
    scans = []
    for name, visit in (("followup", "fu"), ("baseline", "bl")):
        image, affine = _read(folder / f"t1longi_2d_{visit}.nii.gz")
        scans.append(Subject(name, torch.from_numpy(image)[None], NONE, affine))
    mask = _read(folder / "t1longi_2d_bl_mask.nii.gz", labels=True)[0]
    followup, baseline = scans
    matrix = np.eye(4)
    matrix[np.ix_([0, 1, 3], [0, 1, 3])] = np.loadtxt(folder / "t1longi_2d_rigid.mat")
    return followup, replace(baseline, labels=torch.from_numpy(mask)[None]), matrix


def load_fundus_pair(progress: bool = False) -> tuple[Subject, Subject]:
    """Two photographs of one retina, (1382, 1382), 0..255, far apart and without landmarks.

    The green channel, which shows vessels best; axis 0 runs to the right of the picture, axis 1 up,
    a pixel is taken as 1 mm. Pictures may appear on the reader's machine only.

    Returns:
        moving: query.jpg. fixed: refer.jpg.
    """
    folder = fetch("fundus_pair", progress)
    moving, fixed = (
        Subject(name, _picture(folder / f"{name}.jpg", "G"), NONE, np.eye(4))
        for name in ("query", "refer")
    )
    return moving, fixed
