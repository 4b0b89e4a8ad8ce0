"""A set in the form in which it was got: a folder, an archive, or the address of an archive.

No address stands here: whoever uses a set takes it from its owner's page.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any

import pooch
import requests
import typer
from tqdm import tqdm

from regkit import files
from regkit.data import download

BLOCK = 1 << 16  # bytes read at a time
MOST = 1 << 40  # bytes of an archive: more than any public set of images has
MARGIN = 1 << 28  # bytes of the disk that stay free
DAMAGED = (
    "source cannot be unpacked: it is damaged, cut short, leads out of its folder or holds "
    "something other than files and folders."
)
Source = Annotated[
    str, typer.Argument(help="The folder of the set, an archive (zip, tar) or its address.")
]
Sha256 = Annotated[
    str | None, typer.Option(help="What the archive's sum must be; without it nothing is checked.")
]


def folder_of(source: str | os.PathLike, out: Path, sha256: str | None = None) -> Path:
    """The folder of a set, fetched and unpacked where it has to be.

    Args:
        source: a folder, which is returned as it is; a zip or tar archive, packed or not; or an
            address, http or https, of one.
        out: the folder to write the prepared set to. What is fetched and unpacked goes into
            NAME_source beside it. A download that was stopped goes on where it was, and what has
            been unpacked once is not unpacked again.
        sha256: of the archive, hexadecimal. Another sum ends in an error; without it none is
            checked.

    Raises:
        ValueError: `source` is nothing of that kind, has another sum, cannot be fetched, is damaged
            or holds names that lead out of the folder.
    """
    beside = out.absolute().parent / f"{out.name}_source"
    archive = Path(source)
    if archive.is_dir():
        return archive
    if str(source).startswith(("http://", "https://")):
        archive = beside / hashlib.sha256(str(source).encode()).hexdigest()[:16]
        if not archive.is_file():
            _download(str(source), archive)
    elif not archive.is_file():
        raise ValueError("source is no folder, no archive and no address, expected one of them.")
    digest = pooch.file_hash(str(archive))
    if sha256 is not None and digest != sha256.lower():
        if archive.parent == beside:
            archive.unlink()  # so that the next run fetches it anew
        raise ValueError(f"source has the sha256 {digest}, expected {sha256.lower()}.")
    folder = beside / f"files_{digest[:16]}"
    if not folder.is_dir():
        try:
            _unpack(archive, folder)
        except ValueError:
            if archive.parent == beside:
                archive.unlink()  # a login page or a cut body is not kept for the next run
            raise
    return folder


def _download(address: str, file: Path) -> None:
    """Write what lies at an address, from where an earlier run stopped."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    held = part.stat().st_size if part.is_file() else 0
    headers = {"Range": f"bytes={held}-", "Accept-Encoding": "identity"}
    try:
        with download.get(address, headers) as answer:
            if answer.status_code == 416:  # nothing is left, or the file has become shorter
                part.unlink(missing_ok=True)
                raise requests.RequestException
            if answer.headers.get("Content-Type", "").startswith("text/html"):
                raise ValueError(
                    "source answers with a web page, expected an archive: log in where the set is "
                    "offered, and give the file that you get there."
                )
            most = int(min(MOST, shutil.disk_usage(file.parent).free - MARGIN))
            with (
                part.open("ab" if answer.status_code == 206 else "wb") as out,
                tqdm(
                    total=int(answer.headers.get("Content-Length", 0)) or None,
                    desc="download", unit="B", unit_scale=True, disable=None,
                ) as bar,
            ):  # fmt: skip
                download.write(answer, out, most, bar.update)
    except requests.RequestException as error:
        reason = error.response.reason if error.response is not None else type(error).__name__
        raise ValueError(
            f"source cannot be fetched ({reason}): run this again, and it goes on where it stopped."
        ) from None
    except download.TooLong:
        part.unlink(missing_ok=True)
        raise ValueError("source is larger than the disk, expected an archive that fits.") from None
    os.replace(part, file)


def _unpack(archive: Path, folder: Path) -> None:
    """Into a folder that appears when all is there: regular files and folders, and nothing else.

    No file lands outside of it, no link and no device is made, and it takes no more room than the
    archive can honestly hold or the disk has. Checksums are read, that of gzip as well.
    """
    is_zip = zipfile.is_zipfile(archive)
    try:
        if not is_zip and not tarfile.is_tarfile(archive):
            raise ValueError("source is a file, expected a zip or tar archive.")
    except (EOFError, zlib.error, lzma.LZMAError, UnicodeError):
        raise ValueError(DAMAGED) from None
    with files.staged(folder) as temporary:
        free = shutil.disk_usage(temporary).free - MARGIN
        room = _Room(temporary, min(free, files.DEFLATE * archive.stat().st_size))
        try:
            if is_zip:
                _unpack_zip(archive, room)
            else:
                _unpack_tar(archive, room)
        except (RuntimeError, NotImplementedError):  # what zipfile says of them
            raise ValueError(
                "source is encrypted or packed in a rare way, expected a plain zip or tar archive."
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                DAMAGED
            ) from None  # names too long, a file where a folder should be, ...
        except (
            zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError,
            struct.error, ArithmeticError, LookupError, ValueError,
        ):  # fmt: skip
            raise ValueError(DAMAGED) from None


class _Room:
    """A folder to unpack into, and how many bytes and files it may still take."""

    def __init__(self, folder: Path, most: int):
        self.folder, self.left, self.entries = folder, most, 1_000_000

    def place(self, name: str) -> Path:
        """Where an entry goes; ValueError if that is not inside."""
        self.entries -= 1
        parts = PurePosixPath(name).parts
        plain = not re.search(r"[\\:\0]", name) and ".." not in parts
        if not plain or PurePosixPath(name).is_absolute() or self.entries < 0:
            raise ValueError
        return self.folder.joinpath(*parts)

    def fill(self, name: str, source: IO[bytes]) -> None:
        """Write a regular file; ValueError if there is no more room."""
        file = self.place(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            while block := source.read(BLOCK):
                self.left -= len(block)
                if self.left < 0:
                    raise ValueError
                out.write(block)


def _unpack_zip(archive: Path, room: _Room) -> None:
    with zipfile.ZipFile(archive) as held:
        for entry in held.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ValueError
            if entry.is_dir():
                room.place(entry.filename).mkdir(parents=True, exist_ok=True)
            else:
                with held.open(entry) as source:
                    room.fill(entry.filename, source)


class _Entry(tarfile.TarInfo):
    """An entry of a tar archive, whose long names and notes are not read without a bound."""

    @classmethod
    def frombuf(cls, *arguments: Any) -> tarfile.TarInfo:
        entry = super().frombuf(*arguments)
        if not (entry.isreg() or entry.isdir()) and entry.size > 1 << 20:
            raise tarfile.ReadError
        return entry


def _unpack_tar(archive: Path, room: _Room) -> None:
    with archive.open("rb") as file:
        start = file.read(6)
    opened: dict[bytes, Callable[[Path], Any]] = {
        b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open,
    }  # fmt: skip
    packed = (make for magic, make in opened.items() if start.startswith(magic))
    with next(packed, lambda path: path.open("rb"))(archive) as stream:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Entry) as held:
            for entry in held:
                if entry.isdir():
                    room.place(entry.name).mkdir(parents=True, exist_ok=True)
                    continue
                source = held.extractfile(entry) if entry.isreg() else None
                if source is None or entry.issparse():
                    raise ValueError
                room.fill(entry.name, source)
        while rest := stream.read(BLOCK):  # to the checksum
            room.left -= len(rest)
            if room.left < 0:
                raise ValueError
