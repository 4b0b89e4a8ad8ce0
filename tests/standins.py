"""Made-up folders with the names, axes and labels of public sets, for the scripts of data_scripts.

`zoom` repeats every voxel so many times along each axis that has more than one.
"""

import gzip
import pickle
import sys
from pathlib import Path

import nibabel
import numpy as np

from regkit.data import population

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))
import brats  # noqa: E402, F401
import ixi  # noqa: E402
import lpba40  # noqa: E402
import oasis  # noqa: E402


def zoomed(values, zoom):
    """Every voxel `zoom` times along each axis that has more than one."""
    for axis, n in enumerate(values.shape):
        values = values.repeat(zoom if n > 1 else 1, axis)
    return values


# BraTS ------------------------------------------------------------------------------------------

SHAPE = (30, 34, 9)
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # as BraTS has it: array axes to the Left and Posterior
AFFINE[1, 3] = 33.0


def add_case(folder, name, seed, suffix=".nii.gz", labels=True, zoom=1):
    """The files of one patient. The largest slice of the brain is number 5."""
    random = np.random.default_rng(seed)
    brain = np.zeros(SHAPE, bool)
    for k, half in enumerate((0, 3, 5, 7, 8, 10, 8, 6, 3)):
        brain[15 - half : 15 + half, 17 - half : 17 + half, k] = True
    brain = zoomed(brain, zoom)
    (folder / name).mkdir(parents=True)
    for contrast in ("flair", "t1", "t1ce", "t2"):
        values = brain * random.integers(100, 1000, brain.shape)
        image = nibabel.Nifti1Image(values.astype(np.int16), AFFINE)
        nibabel.save(image, folder / name / f"{name}_{contrast}{suffix}")
    if labels:
        seg = (brain & (np.indices(brain.shape)[0] > 18 * zoom)).astype(np.uint8) * 4
        nibabel.save(nibabel.Nifti1Image(seg, AFFINE), folder / name / f"{name}_seg{suffix}")
    return folder / name


# neurite-oasis ----------------------------------------------------------------------------------

LIA = np.array([[-1.0, 0, 0, 10], [0, 0, 1, -14], [0, -1, 0, 12], [0, 0, 0, 1]])
TABLE = """#  a table of FreeSurfer
  0  Unknown       0   0   0   0

  1  Left-White  245 245 245   0
  2  Cortex      205  62  78   0
"""


def add_person(top, number, ndim=3, visit=1, zoom=1):
    """Someone of neurite-oasis: a bright block (label 1) in a grey one (label 2)."""
    shape = (20, 24, 28) if ndim == 3 else (20, 24, 1)
    random = np.random.default_rng(number)
    labels = np.zeros(shape, np.uint8)
    labels[3:17, 4:20] = 2
    labels[5:9, 6 : 8 + number % 5] = 1  # on the left
    labels = zoomed(labels, zoom)
    image = np.choose(labels, (0, 0.7, 0.4)) * random.uniform(0.9, 1, labels.shape)
    folder = top / f"OASIS_OAS1_{number:04d}_MR{visit}"
    folder.mkdir(parents=True)
    files = oasis.FILES[ndim]
    for name, values in ((files.image, image.astype(np.float32)), (files.labels, labels)):
        nibabel.save(nibabel.Nifti1Image(values, LIA), folder / f"{name}.nii.gz")
    (top / files.table).write_text(TABLE)
    return folder


# LPBA40 -----------------------------------------------------------------------------------------

GRID = (26, 32, 28)


def seeds():
    """Label -> a point of MNI mm, roughly where the structure lies."""
    lobes = {20: (40, 30), 40: (-45, 48), 60: (-85, 10), 80: (-20, -18)}  # y, z
    places = {}
    for k, number in enumerate(lpba40.PAIRS):
        y, z = lobes.get(number // 20 * 20, (0, 8))
        y, z = (-15, 58) if number in (27, 41) else (y, z)
        x = 14 + 11 * (k % 4)
        places[number], places[number + 1] = (-x, y + 6 * (k % 3), z), (x, y + 6 * (k % 3), z)
    return places | {181: (0, -65, -35), 182: (0, -30, -40)}


def lpba_brain(index):
    """A head of the embedded population, cut into the 56 structures by the nearest seed."""
    subject = population(index + 1, GRID, seed=2)[index]
    voxels = np.moveaxis(np.indices(GRID), 0, -1)
    mm = voxels @ subject.affine[:3, :3].T + subject.affine[:3, 3]
    points = seeds()
    away = np.stack([np.linalg.norm(mm - seed, axis=-1) for seed in points.values()])
    labels = np.array(list(points))[away.argmin(axis=0)]
    return subject, np.where(subject.image[0].numpy() > 0.1, labels, 0).astype(np.uint8)


def add_lpba(top, name, index=0, turn="LAS", ends=(".hdr", ".img.gz")):
    """Someone of LPBA40, as Analyze: a header without directions, a trailing axis."""
    subject, labels = lpba_brain(index)
    folder = top / "delineation_space" / name
    folder.mkdir(parents=True)
    for kind, values in ((lpba40.BRAIN, 500 * subject.image[0].numpy()), (lpba40.LABELS, labels)):
        image = nibabel.Nifti1Image(values.astype(np.int16), subject.affine)
        ways = nibabel.orientations.axcodes2ornt(turn)
        image = image.as_reoriented(
            nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), ways)
        )
        plain = nibabel.AnalyzeImage(np.asarray(image.dataobj)[..., None], None)
        plain.header.set_zooms((*image.header.get_zooms(), 1))
        plain.to_filename(folder / f"{name}.{kind}.img")
        for end in ends:
            if end.endswith(".gz"):
                path = folder / f"{name}.{kind}{end[:-3]}"
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
    return folder


def to_the_middle(moving, fixed, kind):
    """What `classical.align` would find: the made-up volumes lie about the middle of the head."""
    matrix = np.eye(4)
    matrix[:3, 3] = -np.asarray(lpba40.CENTRE)
    return matrix


# IXI --------------------------------------------------------------------------------------------

IXI_SHAPE = (16, 20, 24)  # axes to L, I, A
FILES = {"fixed": [ixi.ATLAS], "Train": [0, 4, 10], "Val": [2], "Test": [1, 3]}


def ixi_person(seed):
    """Image and labels: 30 structures about points where they roughly are, in the order L, I, A."""
    random = np.random.default_rng(seed)
    points = {14: (0, 0, 1), 15: (0, -6, -5), 16: (0, -2, -7), 24: (0, 4, 7)}  # to R, A, S
    for k, (left, right) in enumerate(ixi.PAIRS.values()):
        x, y, z = 2 + k % 5, k % 7 - 3, k % 4 * 3 - 4
        if right in (50, 51):
            y, z = 7, 2
        if right == 47:
            x, y, z = 3, -7, -5
        if right == 49:
            y, z = -2, 3
        points[left], points[right] = (-x, y, z), (x, y, z)
    i, j, k = np.indices(IXI_SHAPE)
    mm = np.stack([7.5 - i, k - 11.5, 9.5 - j], axis=-1)
    away = np.stack([np.linalg.norm(mm - np.array(p), axis=-1) for p in points.values()])
    brain = (mm**2 / np.array([7, 11, 9]) ** 2).sum(axis=-1) < 1
    labels = np.where(brain, np.array(list(points))[away.argmin(axis=0)], 0)
    labels[away.min(axis=0) > 6] = 0
    return (brain * random.uniform(0.2, 1, IXI_SHAPE)).astype(np.float32), labels.astype(np.int16)


def save_ixi(path, *volumes, protocol=4):
    """As TransMorph's set comes: image and labels in a tuple."""
    path.write_bytes(pickle.dumps(volumes, protocol=protocol))


def add_ixi(top, protocol=4, zoom=1, rim=0):
    """The atlas and six people; `rim` voxels of nothing about each."""
    for seed, (part, names) in enumerate(FILES.items()):
        for name in names:
            path = top / "IXI_data" / part / f"subject_{name}.pkl"
            if part == "fixed":
                path = top / "IXI_data" / f"{name}.pkl"
            path.parent.mkdir(parents=True, exist_ok=True)
            person = ixi_person(seed * 100 + (0 if part == "fixed" else name))
            volumes = [np.pad(zoomed(volume, zoom), rim) for volume in person]
            save_ixi(path, *volumes, protocol=protocol)
    return top / "IXI_data"
