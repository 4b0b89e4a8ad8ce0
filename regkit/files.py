"""Files that are read whole or not at all, and written whole or not at all.

Reading: before anything is allotted for an image, `check_payload` compares what its header claims
with what the file can hold, and reads what is compressed to its end, where a checksum stands; and
no header names a file elsewhere on the disk.

Writing: `staged` collects new files in a hidden folder and moves them to their place when all of
them are complete. What a killed process leaves hidden, the next one that writes there removes.
"""

from __future__ import annotations

import gzip
import mmap
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from filelock import BaseFileLock, FileLock, Timeout

DEFLATE = 1032  # deflate, the method of gzip, zlib and PNG, makes nothing smaller than this
BLOCK = 1 << 20  # bytes read at a time
LONGEST = 500  # characters of a field in the header of a MetaImage or NRRD file
SLACK = 1 << 24  # bytes that may stand behind the voxels
WAIT = 60.0  # seconds for another process to move its files

# reading ----------------------------------------------------------------------------------------


class OutsideFolder(ValueError):
    """A header that names its data in a way that could lead out of its folder."""


class Payload(NamedTuple):
    """Where the voxels of an image lie.

    file, start: they begin at this byte. packed: "" (as they are), "gzip", "zlib", or "other", by
    a method which only the reader of the image undoes, and which is at most as dense as deflate.
    """

    file: Path
    start: int = 0
    packed: str = ""


def check_payload(payload: Payload, claimed: int) -> None:
    """Compare what a header claims with what is there, before anything is allotted for it.

    What is packed by gzip or zlib is read to its end, where its checksum stands.

    Args:
        payload: where the voxels are.
        claimed: how many bytes of voxels the header claims, unpacked.

    Raises:
        ValueError: there is less, much more, or it is damaged; OSError, EOFError and zlib.error
            where the compressed stream is.
    """
    stored = payload.file.stat().st_size - payload.start
    if claimed < 0 or claimed > stored * (DEFLATE if payload.packed else 1):
        raise ValueError("the header claims more than the file can hold")
    if payload.packed not in ("gzip", "zlib"):
        return
    with payload.file.open("rb") as file:
        file.seek(payload.start)
        unpacked = 0
        for block in _gunzip(file) if payload.packed == "gzip" else _inflate(file):
            unpacked += len(block)
            if unpacked > 2 * claimed + SLACK:
                raise ValueError("the file holds much more than its header says")
    if unpacked < claimed:
        raise ValueError("the file holds less than its header claims")


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unpacked:
        while block := unpacked.read(BLOCK):
            yield block


def _inflate(file: IO[bytes]) -> Iterator[bytes]:
    unpack = zlib.decompressobj()
    while not unpack.eof:
        packed = unpack.unconsumed_tail or file.read(BLOCK)
        if not packed:
            raise EOFError
        yield unpack.decompress(packed, BLOCK)


def packed_by_name(path: Path) -> Payload:
    """The payload of a file whose name alone says whether gzip packed it."""
    return Payload(path, 0, "gzip" if path.name.lower().endswith(("gz",)) else "")


_METAIMAGE = re.compile(rb"ElementDataFile[ \t]*[=:]?[ \t]*([^\r\n]*)\r?\n?")
_NRRD = re.compile(rb"data ?file[ \t]*:[ \t]*([^\r\n]*)", re.IGNORECASE)


def metaimage_payload(path: Path) -> Payload:
    """Of an MHA or MHD file.

    Raises:
        OutsideFolder: its data are not LOCAL and not in a file of a plain name beside it.
        ValueError: it is no MetaImage.
    """
    with _mapped(path) as header:
        # each place that looks like the field counts, so that none can hide behind another
        fields = list(_METAIMAGE.finditer(header))
        if not fields:
            raise ValueError("no ElementDataFile")
        names = [field[1].strip() for field in fields]
        text = header[: fields[-1].start()]
        start = fields[-1].end()
    _check_lines(text.splitlines())
    axes = re.search(rb"NDims[ \t]*[=:][ \t]*(\d+)", text)
    if axes is None or not 1 <= int(axes[1][:4]) <= 4:
        raise ValueError("the number of axes is none that an image has")
    packed = "zlib" if re.search(rb"CompressedData[ \t]*[=:][ \t]*[Tt1]", text) else ""
    outside = [name for name in names if name.upper() != b"LOCAL"]
    if not outside:
        return Payload(path, start, packed)
    return Payload(_beside(path, outside), 0, packed)


def nrrd_payload(path: Path) -> Payload:
    """Of an NRRD or NHDR file; errors as of `metaimage_payload`."""
    with _mapped(path) as header:
        names = [match[1].strip() for match in _NRRD.finditer(header)]
        end = re.search(rb"\r?\n\r?\n", header)
        text = header[: end.start()] if end else header[:]
        start = end.end() if end else len(header)
    # notes of any length follow # or stand behind :=
    _check_lines(line for line in text.splitlines() if line[:1] != b"#" and b":=" not in line)
    encoding = re.search(rb"encoding[ \t]*:[ \t]*(\w+)", text, re.IGNORECASE)
    word = encoding[1].lower() if encoding else b"raw"
    packed = {b"raw": "", b"gzip": "gzip", b"gz": "gzip"}.get(word, "other")
    if re.search(rb"(line|byte) ?skip", text, re.IGNORECASE):
        packed = "other" if packed else ""
    if not names:
        return Payload(path, start, packed)
    return Payload(_beside(path, names), 0, packed)


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield mapped


def _check_lines(lines: Iterable[bytes]) -> None:
    """Refuse a field that is longer than any: it overwrites memory in ITK's readers."""
    if any(len(line) > LONGEST for line in lines):
        raise ValueError("a field of the header is too long")


def _beside(path: Path, names: Iterable[bytes]) -> Path:
    """The one data file that a header names, if it lies beside the header and is no link."""
    plain = {name.decode("utf-8", "replace").removeprefix("./") for name in names}
    name = plain.pop()
    file = path.parent / name
    if (
        plain
        or not re.fullmatch(r"[^/\\:%*?]+", name)
        or re.match(r"\.\.?$|LIST\b", name)
        or file.is_symlink()
    ):
        raise OutsideFolder
    return file


# writing ----------------------------------------------------------------------------------------

STAGED = ".regkit-new-"  # a hidden folder with files that are not complete yet
COMING = ".regkit-coming"  # a complete set; files of the set before it may still be there
PLACING = ".regkit-placing"  # the same, when those are gone


@contextmanager
def staged(
    folder: str | os.PathLike[str], name: str = "out", together: Sequence[str] = ()
) -> Iterator[Path]:
    """A temporary folder to write into; its files go to `folder` when the block succeeds.

    After an error nothing is left behind: no half-written file, and no new folder. A new folder
    appears in one step; into an existing one each file is moved in one step. Hidden folders of
    processes that were killed are removed; those of running ones are locked and stay.

    Args:
        folder: where the files go. Other files there stay as they are.
        name: what the folder is called in error messages.
        together: names of files that belong to one another, the last one the witness of the rest.
            Those that an earlier run has left in `folder` are removed, all of them, before the
            first new one appears. The witness goes first and comes last, so while it is there, the
            set is whole. A process that is killed in between leaves the new set complete in a
            hidden folder, and the next one that writes here puts it into place first.

    Raises:
        ValueError: `folder` is a file, cannot be written, or another process does not let go of it.
    """
    folder = Path(folder)
    check_writable(folder, name)
    parent = folder
    while not parent.is_dir():
        parent = parent.parent
    temporary: Path | None = None
    try:
        for place in {parent, folder.parent}:
            _sweep(place, name)
        with alone(parent, name, WAIT):
            # 64 random bits, and an error where the name is taken: nobody can put a link there
            temporary = parent / f"{STAGED}{secrets.token_hex(8)}"
            temporary.mkdir()
            owner = _lock(temporary, "owner")
            owner.acquire()
        try:
            yield temporary
            folder.parent.mkdir(parents=True, exist_ok=True)
            with alone(parent, name, WAIT):
                _forget(owner)
                if parent == folder:
                    _move(temporary, folder, name, together)
                elif not _renamed(temporary, folder):  # another process has created it meanwhile
                    with alone(folder, name, WAIT):
                        _move(temporary, folder, name, together)
        finally:
            owner.release()
    except PermissionError:
        raise ValueError(f"{name}: the folder cannot be written; check its permissions.") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_writable(folder: str | os.PathLike[str], name: str = "out") -> None:
    """Raise, before hours of work, if `folder` could not be written. Errors as in `staged`."""
    parent = Path(folder)
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ValueError(f"{name} is a file or lies below one, expected a folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: the folder cannot be written; check its permissions.")


@contextmanager
def alone(folder: Path, name: str, wait: float = -1, work: str = "files") -> Iterator[None]:
    """Work in an existing folder while no other process does so; one that ends releases it.

    Args:
        folder: it holds the lock's file, hidden, while the block runs.
        name: what the folder is called in error messages.
        wait: seconds for another process to end its work; negative: as long as it takes.
        work: what is done there; works of another name may go on at the same time.

    Raises:
        ValueError: another process still works there.
    """
    lock = _lock(folder, work)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise ValueError(
            f"{name} is a folder that another process works in, expected one for this run alone."
        ) from None
    try:
        yield
    finally:
        _forget(lock)


def _lock(folder: Path, work: str = "files") -> BaseFileLock:
    return FileLock(folder / f".regkit-{work}.lock")


def _forget(lock: BaseFileLock) -> None:
    """Release a lock and leave no file; a process that waits for that file takes a new one."""
    if os.name == "nt":  # which removes no open file
        lock.release()
    with suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


def _sweep(place: Path, name: str) -> None:
    """Remove the hidden folders of processes that have ended: nobody holds their locks any more."""
    hidden = [*place.glob(f"{STAGED}*"), *place.glob(Path(_lock(place).lock_file).name)]
    if not hidden or not os.access(place, os.W_OK | os.X_OK):
        return
    with alone(place, name, WAIT):
        for leftover in place.glob(f"{STAGED}*"):
            owner = _lock(leftover, "owner")
            with suppress(Timeout, OSError):
                owner.acquire(timeout=0)
                shutil.rmtree(leftover, ignore_errors=True)
            owner.release()


def _renamed(temporary: Path, folder: Path) -> bool:
    """Whether `temporary` became the new `folder`, in one step."""
    try:
        os.replace(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
        return False
    return True


def _move(temporary: Path, folder: Path, name: str, together: Sequence[str]) -> None:
    """Move files into an existing folder; those of a set after the old ones of it are removed."""
    for file in sorted(temporary.iterdir()):
        if (folder / file.name).is_dir():
            raise ValueError(f"{name} holds a folder {file.name!r}, expected none of that name.")
    if not together:
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)
        return
    finish(folder, together)
    os.replace(temporary, folder / COMING)
    finish(folder, together)


def finish(folder: Path, together: Sequence[str]) -> None:
    """Put a complete set of files into place, also one whose process was killed while it did so."""
    coming, placing = folder / COMING, folder / PLACING
    if coming.is_dir():
        for name in reversed(together):
            (folder / name).unlink(missing_ok=True)
        os.replace(coming, placing)
    if placing.is_dir():
        for file in sorted(placing.iterdir(), key=lambda file: file.name == together[-1]):
            os.replace(file, folder / file.name)
        placing.rmdir()
