"""Damaged input by the thousand, from a seed: what strangers' files and typing errors look like.

    python tests/attack.py --count 10000 --seed 0

Each kind of attack makes an input in a folder of its own and hands it to regkit. Then it must have
been used, or refused in one sentence of a ValueError or FileNotFoundError; nothing outside the
folder may have been read or written; what a checksum protects may not be used when it is another;
and the process may not have grown beyond 2 GB. `tests/test_attack.py` runs a few hundred of each.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import io as streams
import json
import os
import re
import shutil
import struct
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
import torch

from regkit import cli, io, models
from regkit.data import prepared
from regkit.papers import comparing, running, tables
from regkit.training import loop, recipes
from regkit.transform import Grid

sys.path.append(str(Path(__file__).parents[1] / "data_scripts"))
import archives  # noqa: E402

GIGABYTE = 1 << 30
SECRET = 77  # the value of an image that lies outside
HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2, 3, 10**6, 10**30, -(10**9), 1e-45, 1e300, float("nan"), float("inf"),
    "", "a", "../x", "/etc/passwd", "a" * 3000, "\x00", [], [1], [[]], [-4, 4], [10**6] * 3,
    ["a"] * 3, [0.5, 0.5], {}, {"a": 1}, [None], "nan", "3",
]  # fmt: skip


@dataclass
class Report:
    """What came of one kind of attack."""

    kind: str
    inputs: int = 0
    used: int = 0
    faults: list[str] = field(default_factory=list)
    sentences: Counter = field(default_factory=Counter)
    peak: int = 0  # bytes above what this process held before the first input

    def __str__(self) -> str:
        return (
            f"{self.kind:<18}{self.inputs:>7} inputs {self.used:>7} used "
            f"{self.inputs - self.used - len(self.faults):>7} refused "
            f"({len(self.sentences)} ways) {self.peak / 1e6:>7.0f} MB {len(self.faults)} faults"
        )


class Silent(AssertionError):
    """Something wrong that nobody was told."""


def attack(kind: str, count: int, seed: int, folder: Path) -> Report:
    """Make `count` inputs of a kind and see what becomes of them."""
    report = Report(kind)
    home = folder / kind
    home.mkdir(parents=True)
    one = KINDS[kind](home)
    _forget_the_peak()
    before_all = _most_held()
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        room = home / "room" / "inside"
        room.mkdir(parents=True)
        (room.parent / "secret.raw").write_bytes(np.full(24**3, SECRET, "f4").tobytes())
        before = _tree(home, room)
        report.inputs += 1
        try:
            one(rng, room)
            report.used += 1
        except (ValueError, FileNotFoundError) as error:
            report.sentences[re.sub(r"\d+", "0", str(error))[:60]] += 1
            if not is_sentence(str(error)):
                report.faults.append(f"{index}: no sentence: {error!r:.300}")
        except Exception as error:
            report.faults.append(f"{index}: {type(error).__name__}: {error!s:.300}")
        if _tree(home, room) != before:
            report.faults.append(f"{index}: something outside has changed")
        shutil.rmtree(home / "room")
    report.peak = _most_held() - before_all
    if report.peak > 2 * GIGABYTE:
        report.faults.append(f"{report.peak / 1e9:.1f} GB at once")
    return report


def is_sentence(text: str) -> bool:
    """One line that ends in a full stop, of a length that can be read."""
    return text.endswith(".") and "\n" not in text and len(text) < 2000


def _tree(home: Path, room: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of all files around `room`, but not of those in it."""
    found = []
    for place, folders, names in os.walk(home):
        folders[:] = [name for name in folders if Path(place, name) != room]
        states = [
            (os.path.join(place, name), os.lstat(os.path.join(place, name))) for name in names
        ]
        found += [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    return sorted(found)


def _forget_the_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _most_held() -> int:
    """The most memory that this process has held since `_forget_the_peak`; 0 if nobody knows."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", text)[1])


def flipped(rng: np.random.Generator, content: bytes, start: int = 0, most: int = 3) -> bytes:
    """A few bits turned over, behind `start`."""
    damaged = bytearray(content)
    for place in rng.integers(8 * start, 8 * len(content), rng.integers(1, most + 1)):
        damaged[place // 8] ^= 1 << (place % 8)
    return bytes(damaged)


def torn(rng: np.random.Generator, content: bytes) -> bytes:
    """Cut short, longer than it was, with a hole, or with bits turned over."""
    place = int(rng.integers(0, len(content)))
    match rng.integers(4):
        case 0:
            return content[:place]
        case 1:
            return content + rng.bytes(int(rng.integers(1, 100)))
        case 2:
            return content[:place] + content[place + int(rng.integers(1, 50)) :]
    return flipped(rng, content)


def hostile(rng: np.random.Generator) -> Any:
    """A value that does not belong where it stands."""
    return copy.deepcopy(HOSTILE[rng.integers(len(HOSTILE))])


def twisted(rng: np.random.Generator, value: Any) -> Any:
    """A JSON value with one or two of its parts replaced, removed or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.integers(1, 3)):
        places: list[tuple[Any, Any]] = []

        def collect(part: Any, places: list = places) -> None:
            keys = part if isinstance(part, dict) else range(len(part))
            for key in list(keys):
                places.append((part, key))
                if isinstance(part[key], dict | list):
                    collect(part[key])

        if isinstance(value, dict | list):
            collect(value)
        if not places or rng.random() < 0.05:
            return hostile(rng)
        part, key = places[rng.integers(len(places))]
        match rng.integers(5):
            case 0:
                del part[key]
            case 1 if isinstance(part, dict):
                part[f"{key}_"] = part.pop(key)
            case _:
                part[key] = hostile(rng)
    return value


def as_json(rng: np.random.Generator, value: Any) -> bytes:
    """The text of a twisted value; sometimes no JSON at all."""
    text = json.dumps(twisted(rng, value)).encode()
    match rng.integers(12):
        case 0:
            return torn(rng, text)
        case 1:
            return b"[" * 100_000
        case 2:
            return b'{"a": ' + b"1" * 5000 + b"}"
        case 3:
            return b"\xff\xfe" + text
    return text


# images -----------------------------------------------------------------------------------------

VALUES = (np.indices((12, 13, 11)).sum(0) % 7).astype("f4")
# name -> where it lies in a NIfTI header, and how it is written
FIELDS = {
    "sizeof_hdr": (0, "i"), "dim": (40, "8h"), "intent": (68, "h"), "datatype": (70, "h"),
    "bitpix": (72, "h"), "pixdim": (76, "8f"), "vox_offset": (108, "f"), "scl_slope": (112, "f"),
    "scl_inter": (116, "f"), "units": (123, "b"), "qform": (252, "h"), "sform": (254, "h"),
    "quaternion": (256, "6f"), "srow": (280, "12f"), "magic": (344, "4b"), "extension": (348, "4b"),
    "esize": (352, "2i"),
}  # fmt: skip
NUMBERS = {
    "b": [-128, -1, 0, 1, 2, 8, 16, 127],
    "h": [-32768, -1, 0, 1, 2, 3, 4, 5, 7, 8, 64, 128, 512, 1007, 2000, 30000, 32767],
    "i": [-(2**31), -1, 0, 8, 16, 348, 540, 2**20, 2**31 - 1],
    "f": [0.0, -1.0, 1e-45, 1e-20, 1e20, 3e38, float("nan"), float("inf"), 352.0, 348.5, 1e9, -1e9],
}


def _nifti(rng: np.random.Generator) -> bytes:
    """A NIfTI file with a few fields of its header set to something else."""
    raw = bytearray(nibabel.Nifti1Image(VALUES, np.diag([2, 2, 2, 1])).to_bytes())
    for name in rng.choice(list(FIELDS), rng.integers(1, 4)):
        place, form = FIELDS[name]
        count, kind = int(form[:-1] or 1), form[-1]
        for index in rng.choice(count, rng.integers(1, count + 1), replace=False):
            value = NUMBERS[kind][rng.integers(len(NUMBERS[kind]))]
            struct.pack_into(f"<{kind}", raw, place + struct.calcsize(kind) * int(index), value)
    return bytes(raw)


def _sound(image: io.Image) -> None:
    if not torch.isfinite(image.data.double()).all() or not np.isfinite(image.affine).all():
        raise Silent("an image that is not finite was read")
    if (image.data == SECRET).all():
        raise Silent("a file outside was read")


def nifti_headers(home: Path) -> Callable:
    def one(rng: np.random.Generator, room: Path) -> None:
        raw, packed = _nifti(rng), rng.random() < 0.5
        if rng.random() < 0.2:
            raw = flipped(rng, raw[:352], most=8) + raw[352:]
        path = room / ("m.nii.gz" if packed else "m.nii")
        path.write_bytes(gzip.compress(raw) if packed else raw)
        if rng.random() < 0.2:
            io.read_transform(path, Grid((12, 13, 11), np.eye(4)))
        else:
            _sound(io.read(path, "moving", labels=rng.random() < 0.3))

    return one


def nifti_payload(home: Path) -> Callable:
    """What gzip's checksum protects: refused, or what it was."""
    nibabel.save(nibabel.Nifti1Image(VALUES, np.eye(4)), home / "good.nii.gz")
    nibabel.save(nibabel.MGHImage(VALUES, np.eye(4)), home / "good.mgz")

    def one(rng: np.random.Generator, room: Path) -> None:
        suffix = ("nii.gz", "mgz")[rng.integers(2)]
        content = torn(rng, (home / f"good.{suffix}").read_bytes())
        (room / f"m.{suffix}").write_bytes(content)
        found = io.read(room / f"m.{suffix}", "moving").data[0, 0].numpy()
        if not np.array_equal(found, VALUES):
            raise Silent("other voxels than those that were written were read")

    return one


def other_images(home: Path) -> Callable:
    """MetaImage, NRRD and pictures: text headers with other words, bytes with other bits."""
    image = sitk.GetImageFromArray(VALUES)
    picture = sitk.GetImageFromArray((VALUES[0] * 30).astype("u1"))
    for suffix in ("mha", "mhd", "nrrd", "nhdr"):
        for packed in (False, True):
            (home / f"{packed}").mkdir(exist_ok=True)
            sitk.WriteImage(image, str(home / f"{packed}" / f"m.{suffix}"), packed)
    for suffix in ("png", "jpg", "tif"):
        sitk.WriteImage(picture, str(home / "True" / f"m.{suffix}"))
        sitk.WriteImage(picture, str(home / "False" / f"m.{suffix}"))
    outside = str(home / "room" / "secret.raw")
    words = [
        "../secret.raw", outside, "LIST", "LOCAL", "%03d.raw 1 3 1", "link.raw", "..", "", "raw",
        "-1", "0", "1e99", "nan", "100000 100000 100000", "4 4", "gzip", "True", "MET_DOUBLE",
        "double", "999999999999", "(1,0,0) (0,0,0) (0,0,1)", "hex", "a" * 5000,
    ]  # fmt: skip

    def one(rng: np.random.Generator, room: Path) -> None:
        shutil.copytree(home / ("True", "False")[rng.integers(2)], room, dirs_exist_ok=True)
        (room / "link.raw").symlink_to(room.parent / "secret.raw")
        paths = sorted(room.glob("m.*"))
        path = paths[rng.integers(len(paths))]
        content = path.read_bytes()
        if path.suffix in (".mha", ".mhd", ".nrrd", ".nhdr") and rng.random() < 0.7:
            lines = content.split(b"\n")
            text = [i for i, line in enumerate(lines[:14]) if re.match(rb"[\w ]+ ?[=:] ?", line)]
            i = text[rng.integers(len(text))]
            if rng.random() < 0.3:  # the line that names the data
                i = next((k for k in text if re.match(rb"ElementDataFile|data file", lines[k])), i)
            key = re.match(rb"[\w ]+ ?[=:] ?", lines[i])[0]
            lines[i] = key + words[rng.integers(len(words))].encode()
            if rng.random() < 0.2:
                lines.insert(int(rng.integers(0, i + 1)), b"# " + lines[i])
            content = b"\n".join(lines)
        else:
            content = torn(rng, content)
        path.write_bytes(content)
        if path.suffix in (".mha", ".mhd", ".nrrd", ".nhdr", ".png", ".jpg", ".tif"):
            _sound(io.read(path, "moving", labels=rng.random() < 0.2))
        else:
            io.read(path, "moving")

    return one


# weights ----------------------------------------------------------------------------------------


def tiny() -> models.RegistrationModel:
    """A small network in 2D."""
    return models.create("vxm", 2, encoder=(4, 4), decoder=(4, 4), last=(4,))


OPTIONS = (
    "encoder", "decoder", "last", "channels", "steps", "stages", "cascades", "base", "repeats",
    "correlation", "layers", "dilations", "heads", "width", "depth", "window", "segment", "reduce",
    "affine_size", "affine", "shared", "tolerance", "half_resolution", "ndim", "name", "kind",
)  # fmt: skip


def weights(home: Path) -> Callable:
    info = {
        "spacing": [2.2, 2.2], "range": [0, 1], "orientation": "RAS", "motion": [5.0, 5.0],
        "recipe": {"shape": [48, 64], "similarity": "ncc", "motion": None, "contrast": "t1"},
    }  # fmt: skip
    models.save(tiny(), home / "good.safetensors", **info)
    content = (home / "good.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, numbers = json.loads(content[8 : 8 + size]), content[8 + size :]
    said = json.loads(header["__metadata__"]["regkit"])

    def one(rng: np.random.Generator, room: Path) -> None:
        held = copy.deepcopy(header)
        choice = rng.integers(5)
        if choice == 0:
            made = torn(rng, content)
        elif choice == 1:  # the header of safetensors itself
            text = as_json(rng, held)
            made = struct.pack("<Q", len(text)) + text + numbers
        else:
            changed = twisted(rng, said)
            if isinstance(changed, dict) and rng.random() < 0.5:
                changed = copy.deepcopy(said)
                changed["name"] = models.names()[rng.integers(len(models.names()))]
                option = OPTIONS[rng.integers(len(OPTIONS))]
                changed["options"] = {option: hostile(rng)}
            held["__metadata__"]["regkit"] = json.dumps(changed)
            if rng.random() < 0.1:
                held["__metadata__"]["regkit"] = as_json(rng, changed).decode("latin1")
            text = json.dumps(held).encode()
            made = struct.pack("<Q", len(text)) + text + numbers
        (room / "w.safetensors").write_bytes(made)
        model = models.load(room / "w.safetensors")
        with torch.no_grad():
            model(*torch.rand(2, 1, 1, *[16] * model.ndim))

    return one


# folders of sets, runs and results --------------------------------------------------------------


def manifests(home: Path) -> Callable:
    """dataset.json of a prepared set, and the files of its subjects."""
    said = {
        "name": "toy", "complete": True, "contrasts": ["t1"],
        "structures": {"1": "one", "2": "two"}, "shape": [12, 13, 11], "spacing": [1.0, 1.0, 1.0],
        "subjects": [
            {"name": name, "split": split, "labels": True, "category": "a"}
            for name, split in (("s1", "train"), ("s2", "validation"), ("s3", "test"))
        ],
    }  # fmt: skip
    good = home / "good"
    for entry in said["subjects"]:
        (good / entry["name"]).mkdir(parents=True)
        for name, values in (("t1", VALUES / VALUES.max()), ("labels", VALUES.astype("i2"))):
            image = nibabel.Nifti1Image(values, np.eye(4))
            nibabel.save(image, good / entry["name"] / f"{name}.nii.gz")

    (good / "dataset.json").write_text(json.dumps(said))

    def use(folder: Path) -> None:
        prepared.description(folder)
        prepared.structures(folder)
        for subject in prepared.subjects(folder, "t1"):
            if not torch.isfinite(subject.image).all():
                raise Silent("an image that is not finite was read")

    use(good)  # what is not damaged is used

    def one(rng: np.random.Generator, room: Path) -> None:
        folder = room / "set"
        shutil.copytree(good, folder)
        if rng.random() < 0.8:
            (folder / "dataset.json").write_bytes(as_json(rng, said))
        else:
            files = sorted(folder.rglob("*.nii.gz"))
            file = files[rng.integers(len(files))]
            file.write_bytes(torn(rng, file.read_bytes()))
        use(folder)

    return one


def run_folders(home: Path) -> Callable:
    """A run that has ended: gone on with, or refused with nothing in it changed."""
    recipe = recipes.get(
        "vxm_diff_2d", "smoke", subjects=2, validation=2, shape=(32, 48), batch=1, steps=2,
        validate_every=1, options={"encoder": (4, 4), "decoder": (4, 4), "last": (4,)},
    )  # fmt: skip
    loop.train(recipe, home / "good", progress=False, device="cpu")
    names = [
        str(p.relative_to(home / "good"))
        for p in sorted((home / "good").rglob("*"))
        if p.is_file() and p.parent.name != "log"
    ]

    def one(rng: np.random.Generator, room: Path) -> None:
        folder = room / "run"
        shutil.copytree(home / "good", folder)
        file = folder / names[rng.integers(len(names))]
        content = file.read_bytes()
        match rng.integers(4):
            case 0:
                file.unlink()
            case 1:
                file.write_bytes((b"", b"[]", b"{}", b"null", b"text")[rng.integers(5)])
            case 2 if file.suffix == ".json":
                file.write_bytes(as_json(rng, json.loads(content)))
            case _:
                file.write_bytes(content[: rng.integers(0, len(content))])
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        try:
            loop.train(recipe, folder, resume=True, progress=False, device="cpu")
        except ValueError:
            after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            if before != after:
                raise Silent("a run that was refused has changed") from None
            raise

    return one


def results_files(home: Path) -> Callable:
    name, table = next(iter(tables.TABLES.items()))
    rows = [
        {
            "label": row.label, "method": row.method, "state": "done", "key": "0", "dice": 0.7,
            "dice_sd": 0.1, "folding_percent": 0.0, "seconds": 0.1, "dice_pairs": [0.6, 0.8],
            "dice_pairs_seeds": [[0.6, 0.8]], "parameters": 1000,
        }
        for row in table.rows[:3]
    ]  # fmt: skip
    held = {"table": name, "rows": rows}

    def one(rng: np.random.Generator, room: Path) -> None:
        (room / "r.json").write_bytes(as_json(rng, held))
        lines = comparing.compare(table, running.read_rows(room / "r.json"))
        said = {"table": name, "title": "", "split": "test", "paper_set": "lpba40"}
        comparing.as_text({**said, "rows": lines, "order": comparing.orders(lines)})

    return one


# archives ---------------------------------------------------------------------------------------

NAMES = (
    "a.bin", "deep/a.bin", "../a.bin", "../../a.bin", "/tmp/regkit-escaped", "./a.bin", "a/../../b",
    "C:/a.bin", "..\\a.bin", "a" * 300, "", ".", "..", "deep", "deep/deep/deep/a", "link/a.bin",
    "a\x00b",
)  # fmt: skip


def archive_files(home: Path) -> Callable:
    def tar(rng: np.random.Generator, path: Path) -> None:
        mode = ("w", "w:gz", "w:bz2", "w:xz")[rng.integers(4)]
        with tarfile.open(path, mode) as held:
            for _ in range(rng.integers(1, 5)):
                entry = tarfile.TarInfo(NAMES[rng.integers(len(NAMES))].replace("\x00", "_"))
                entry.type = (
                    tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE,
                    tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE,
                )[rng.integers(7)]  # fmt: skip
                entry.linkname = ("../..", "/etc/passwd", "a.bin", "link")[rng.integers(4)]
                content = rng.bytes(int(rng.integers(0, 3000)))
                if entry.type == tarfile.REGTYPE:
                    entry.size = len(content)
                held.addfile(entry, streams.BytesIO(content))

    def zipped(rng: np.random.Generator, path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as held:
            for _ in range(rng.integers(1, 5)):
                entry = zipfile.ZipInfo(NAMES[rng.integers(len(NAMES))] or "x")
                if rng.random() < 0.2:
                    entry.external_attr = 0o120777 << 16  # a link
                held.writestr(entry, rng.bytes(int(rng.integers(0, 3000))))

    def one(rng: np.random.Generator, room: Path) -> None:
        path = room / "archive"
        (tar if rng.random() < 0.6 else zipped)(rng, path)
        if rng.random() < 0.5:
            path.write_bytes(torn(rng, path.read_bytes()))
        folder = archives.folder_of(path, room / "out")
        for file in folder.rglob("*"):
            if file.is_symlink() or not (file.is_file() or file.is_dir()):
                raise Silent("something other than files and folders was unpacked")
        if Path("/tmp/regkit-escaped").exists():
            raise Silent("a file outside was written")

    return one


# command lines ----------------------------------------------------------------------------------


def command_lines(home: Path) -> Callable:
    """Words that do not belong together. None of them starts anything that takes long."""
    from typer.testing import CliRunner

    image = np.random.default_rng(0).random((20, 22)).astype("f4")
    nibabel.save(nibabel.Nifti1Image(image, np.diag([2.2, 2.2, 2.2, 1])), home / "i.nii.gz")
    nibabel.save(nibabel.Nifti1Image(image[:, :, None, None, None] * [0, 0, 0], np.eye(4)),
                 home / "d.nii.gz")  # fmt: skip
    models.save(tiny(), home / "w.safetensors", spacing=[2.2, 2.2], range=[0, 1])
    (home / "t.txt").write_text("text")
    files = [str(home / name) for name in ("i.nii.gz", "d.nii.gz", "w.safetensors", "t.txt")]
    words = [*files, str(home), "nowhere.nii", "", "-1", "0", "3", "nan", "é", "\ud800", "a" * 300]
    commands = {
        "register": ["--method", "--affine", "--refine", "--device", "--moving-labels", "--out"],
        "apply": ["--out", "--labels"],
        "evaluate": ["--pairs", "--seed", "--device", "--out"],
        "train": ["--recipe", "--steps", "--start", "--data", "--device", "--budget"],
        "benchmark": ["--budget", "--ndim", "--protocol", "--data", "--seed", "--row", "--test"],
        "data": ["get", "list", "--help"],
        "nothing": ["--version", "--help"],
    }

    def one(rng: np.random.Generator, room: Path) -> None:
        name = list(commands)[rng.integers(len(commands))]
        typed = [name]
        for _ in range(rng.integers(0, 3)):
            typed.append(words[rng.integers(len(words))])
        for _ in range(rng.integers(0, 4)):
            option = commands[name][rng.integers(len(commands[name]))]
            typed += [option, words[rng.integers(len(words))]]
        if name == "register" and rng.random() < 0.7:
            typed = [name, *rng.choice(files, 2), "--method", files[2], "--affine", "none"]
        if name in ("register", "apply", "train") and rng.random() < 0.7:
            typed += ["--out", str(room / ("out", "out.nii.gz")[rng.integers(2)])]
        result = CliRunner().invoke(cli.app, typed)
        if result.exit_code not in (0, 2) or "Traceback" in result.output:
            raise Silent(f"exit code {result.exit_code}: {typed} {result.output[-300:]}")
        if result.exit_code and list(room.iterdir()):
            raise Silent(f"{typed} was refused and left {[p.name for p in room.iterdir()]}")

    return one


KINDS: dict[str, Callable[[Path], Callable]] = {
    "nifti_headers": nifti_headers,
    "nifti_payload": nifti_payload,
    "other_images": other_images,
    "weights": weights,
    "manifests": manifests,
    "run_folders": run_folders,
    "results_files": results_files,
    "archives": archive_files,
    "command_lines": command_lines,
}
# of all inputs, how many are of a kind; those that take longer come less often
SHARES = {
    "nifti_headers": 0.25, "nifti_payload": 0.15, "other_images": 0.15, "weights": 0.15,
    "manifests": 0.1, "run_folders": 0.01, "results_files": 0.07, "archives": 0.1,
    "command_lines": 0.02,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), default=None)
    asked = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind, share in SHARES.items():
            if asked.kind not in (None, kind):
                continue
            count = asked.count if asked.kind else round(share * asked.count)
            report = attack(kind, count, asked.seed, Path(folder))
            print(report, flush=True)
            for fault in report.faults[:20]:
                print(f"    {fault}")
            faults += len(report.faults)
    print(f"{faults} faults")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
