"""A set in the form in which it was got: a folder, an archive, or the address of an archive.

No address stands here: whoever uses a set takes it from its owner's page.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Annotated

import pooch
import requests
import typer
from tqdm import tqdm

from regkit import io

BLOCK = 1 << 16  # bytes; a download that stops loses at most one block
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
    found = pooch.file_hash(str(archive))
    if sha256 is not None and found != sha256.lower():
        if archive.parent == beside:
            archive.unlink()  # so that the next run fetches it anew
        raise ValueError(f"source has the sha256 {found}, expected {sha256.lower()}.")
    folder = beside / f"files_{found[:16]}"
    if not folder.is_dir():
        _unpack(archive, folder)
    return folder


def _download(address: str, file: Path) -> None:
    """Write what lies at an address, from where an earlier run stopped."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    held = part.stat().st_size if part.is_file() else 0
    headers = {"Range": f"bytes={held}-", "Accept-Encoding": "identity"}
    try:
        with requests.get(address, headers=headers, stream=True, timeout=30) as answer:
            if answer.status_code == 416:  # nothing is left, or the file has become shorter
                part.unlink(missing_ok=True)
            answer.raise_for_status()
            with (
                part.open("ab" if answer.status_code == 206 else "wb") as out,
                tqdm(
                    total=int(answer.headers.get("Content-Length", 0)) or None,
                    desc="download", unit="B", unit_scale=True, disable=None,
                ) as bar,
            ):  # fmt: skip
                for block in answer.iter_content(BLOCK):
                    bar.update(out.write(block))
    except requests.RequestException as error:
        reason = error.response.reason if error.response is not None else type(error).__name__
        raise ValueError(
            f"source cannot be fetched ({reason}): run this again, and it goes on where it stopped."
        ) from None
    os.replace(part, file)


def _unpack(archive: Path, folder: Path) -> None:
    """Into a folder that appears when all is there. No file lands outside of it."""
    try:
        with io.staged(folder) as temporary:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as held:
                    inside = temporary.resolve()
                    for name in held.namelist():
                        if not (inside / name).resolve().is_relative_to(inside):
                            raise zipfile.BadZipFile
                shutil.unpack_archive(archive, temporary, "zip")
            elif tarfile.is_tarfile(archive):
                shutil.unpack_archive(archive, temporary, "tar", filter="data")
            else:
                raise ValueError("source is a file, expected a zip or tar archive.")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError):
        raise ValueError(
            "source cannot be unpacked: it is damaged, cut short, or leads out of its folder."
        ) from None
    except (RuntimeError, NotImplementedError):  # what zipfile says of them
        raise ValueError(
            "source is encrypted or packed in a rare way, expected a plain zip or tar archive."
        ) from None
