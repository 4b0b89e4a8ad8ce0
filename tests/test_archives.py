"""What a stranger's archive or server may do: files and folders inside, and no more than fits."""

import gzip
import hashlib
import http.server
import io
import os
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from regkit.data import download

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))
import archives  # noqa: E402

KINDS = {
    "link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE,
    "disk": tarfile.BLKTYPE, "pipe": tarfile.FIFOTYPE,
}  # fmt: skip
OUTSIDE = ["../a", "deep/../../a", "/tmp/regkit-a", "..", "C:a", "..\\a"]


def tar(path, *entries, mode="w:gz"):
    """An archive of (name, type, content)."""
    with tarfile.open(path, mode) as held:
        for name, kind, content in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = kind, "../../secret", len(content)
            held.addfile(entry, io.BytesIO(content))
    return path


def refused(path, folder, sentence="source cannot be unpacked: .* leads out of its folder"):
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=sentence) as caught:
        archives.folder_of(path, folder / "out")
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before
    assert not Path("/tmp/regkit-a").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tar_archive_makes_files_and_folders_alone(kind, tmp_path):
    (tmp_path / "secret").write_text("secret")
    refused(tar(tmp_path / "a", ("x", KINDS[kind], b"")), tmp_path)
    # a file behind a link lands nowhere
    refused(tar(tmp_path / "a", ("x", KINDS[kind], b""), ("x/y", tarfile.REGTYPE, b"a")), tmp_path)


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_the_folder(name, tmp_path):
    for mode in ("w", "w:gz", "w:bz2", "w:xz"):
        refused(tar(tmp_path / "a", (name, tarfile.REGTYPE, b"a"), mode=mode), tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as held:
        entry = zipfile.ZipInfo("x")
        entry.filename = name  # as it is
        held.writestr(entry, b"a")
    refused(tmp_path / "a.zip", tmp_path)


def test_a_link_in_a_zip_archive_is_no_file(tmp_path):
    entry = zipfile.ZipInfo("x")
    entry.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as held:
        held.writestr(entry, "../../secret")
    refused(tmp_path / "a.zip", tmp_path)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_what_an_honest_archive_holds_is_there(mode, tmp_path):
    entries = [("deep", tarfile.DIRTYPE, b""), ("deep/a", tarfile.REGTYPE, b"abc")]
    long = "b" * 150 + "/" + "c" * 120  # a name that tar writes beside its header
    tar(tmp_path / "a", *entries, ("./d", tarfile.REGTYPE, b""), (long, tarfile.REGTYPE, b"long"),
        mode=mode)  # fmt: skip
    folder = archives.folder_of(tmp_path / "a", tmp_path / "out")
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert files == {"deep/a": b"abc", "d": b"", long: b"long"}


def test_the_checksum_of_gzip_is_read(tmp_path):
    """tarfile itself stops where the entries end."""
    content = os.urandom(5000)
    path = tar(tmp_path / "a", ("a", tarfile.REGTYPE, content))
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    with tarfile.open(path) as held:
        assert held.extractfile("a").read() == content
    refused(path, tmp_path)


def test_an_archive_takes_no_more_room_than_it_can_honestly_hold(tmp_path, monkeypatch):
    """100 MB of zeros in layers of bzip2; and a disk that has less than the archive says."""
    path = tar(tmp_path / "a", ("a", tarfile.REGTYPE, bytes(100_000_000)), mode="w:bz2")
    assert path.stat().st_size < 1000
    refused(path, tmp_path)
    path = tar(tmp_path / "a", ("a", tarfile.REGTYPE, os.urandom(5000)))
    monkeypatch.setattr(archives, "MARGIN", 1 << 62)
    refused(path, tmp_path)


def test_a_name_of_a_gigabyte_is_not_read(tmp_path):
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    head = entry.tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "a").write_bytes(gzip.compress(head + b"a" * (1 << 21)))
    refused(tmp_path / "a", tmp_path, "source cannot be unpacked|source is a file")


class Pages(http.server.BaseHTTPRequestHandler):
    """A login page, an archive that is cut without a word of its length, a slow one."""

    body = b""
    kind = "application/zip"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", self.kind)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/set.zip"
        httpd.shutdown()
        thread.join()


def test_a_login_page_or_a_cut_body_is_not_kept(server, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as held:
        held.writestr("a", os.urandom(5000))
    whole = (tmp_path / "a.zip").read_bytes()
    out = tmp_path / "out"
    for kind, body, sentence in (
        ("text/html; charset=utf-8", b"<html>Log in</html>", "source answers with a web page"),
        ("application/zip", b"<html>Log in</html>", "source is a file, expected a zip or tar"),
        ("application/zip", whole[:3000], "source is a file, expected a zip or tar archive"),
        ("application/zip", whole[:2000] + bytes(100) + whole[2100:], "source cannot be unpacked"),
    ):
        monkeypatch.setattr(Pages, "kind", kind)
        monkeypatch.setattr(Pages, "body", body)
        with pytest.raises(ValueError, match=sentence):
            archives.folder_of(server, out)
        assert list((tmp_path / "out_source").iterdir()) == []
    monkeypatch.setattr(Pages, "body", whole)
    folder = archives.folder_of(server, out, hashlib.sha256(whole).hexdigest())
    assert (folder / "a").stat().st_size == 5000


def test_a_body_without_end_is_not_taken(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Pages, "body", bytes(1_000_000))
    monkeypatch.setattr(archives, "MOST", 300_000)
    with pytest.raises(ValueError, match="source is larger than the disk"):
        archives.folder_of(server, tmp_path / "out")
    assert list((tmp_path / "out_source").iterdir()) == []


def test_a_server_that_never_ends_is_left(server, monkeypatch):
    """Time stands still but for the download."""
    monkeypatch.setattr(Pages, "body", bytes(200_000))
    moments = iter(range(0, 10_000, 100))
    monkeypatch.setattr(download.time, "monotonic", lambda: next(moments))
    with (
        download.get(server) as answer,
        pytest.raises(download.requests.Timeout, match="too slow"),
    ):
        download.write(answer, io.BytesIO(), 1 << 30)
