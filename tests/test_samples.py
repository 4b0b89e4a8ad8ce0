"""Open samples: the cache, the download (from a server on this machine only), the real bytes."""

import hashlib
import http.server
import itertools
import socket
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from regkit import metrics
from regkit.data import samples as module
from regkit.data.samples import Sample, SampleFile
from regkit.data.subject import Subject
from regkit.transform import resample

CONTENT = {"a.bin": b"first file", "sub/b.bin": b"second file " * 1000}


class Server(http.server.BaseHTTPRequestHandler):
    """CONTENT below /good, other bytes below /broken, a connection that ends early below /cut."""

    requests: list[str] = []

    def do_GET(self):
        self.requests.append(self.path)
        kind, _, name = self.path[1:].partition("/")
        if kind not in ("good", "broken", "cut") or name not in CONTENT:
            self.send_error(404)
            return
        body = b"something else" if kind == "broken" else CONTENT[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + 100 * (kind == "cut")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Server.requests.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Put a sample named `toy` into the table, its files below `base`, and use an empty cache."""
    monkeypatch.setenv("REGKIT_DATA", str(tmp_path / "cache"))

    def use(base: str) -> Path:
        files = tuple(
            SampleFile(path, f"{base}/{path}", hashlib.sha256(data).hexdigest(), len(data), "CC0")
            for path, data in CONTENT.items()
        )
        sample = Sample("toy", "A toy", "none", "anywhere", files)
        monkeypatch.setattr(module, "samples", lambda: {"toy": sample})
        return tmp_path / "cache" / "toy"

    return use


def fill(folder: Path) -> None:
    for path, data in CONTENT.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def test_fetch_downloads_checks_and_keeps(toy, server):
    folder = toy(f"{server}/good")
    assert not module.cached("toy")
    assert module.fetch("toy") == folder
    assert {p: (folder / p).read_bytes() for p in CONTENT} == CONTENT
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["a.bin", "b.bin"]
    assert module.cached("toy")
    asked = len(Server.requests)
    module.fetch("toy")
    assert len(Server.requests) == asked == 2


def test_a_filled_cache_needs_no_network(toy):
    folder = toy("http://127.0.0.1:1")
    fill(folder)
    assert module.cached("toy")
    assert module.fetch("toy") == folder


def test_a_file_with_a_wrong_sum_is_fetched_again(toy, server):
    folder = toy(f"{server}/good")
    fill(folder)
    (folder / "a.bin").write_bytes(b"half a fi")
    assert not module.cached("toy")
    module.fetch("toy")
    assert (folder / "a.bin").read_bytes() == CONTENT["a.bin"]
    assert Server.requests == ["/good/a.bin"]


def test_a_source_with_another_sum_is_refused_and_not_kept(toy, server):
    folder = toy(f"{server}/broken")
    with pytest.raises(ValueError, match="'a.bin' of sample 'toy' came from .*another sum"):
        module.fetch("toy")
    assert Server.requests == ["/broken/a.bin"] * 2
    assert not [p for p in folder.rglob("*") if p.is_file()]


def test_no_cache_and_no_network_says_what_to_fetch_and_where_to_put_it(toy):
    with socket.socket() as closed:  # a port that nobody listens on
        closed.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{closed.getsockname()[1]}"
    folder = toy(base)
    with pytest.raises(FileNotFoundError) as caught:
        module.fetch("toy")
    sentence = str(caught.value)
    assert f"{base}/a.bin and 1 more" in sentence
    assert str(folder / "a.bin") in sentence and "\n" not in sentence


def test_a_download_that_ends_too_early_leaves_nothing(toy, server):
    folder = toy(f"{server}/cut")
    with pytest.raises(FileNotFoundError, match="cannot be downloaded"):
        module.fetch("toy")
    assert not [p for p in folder.rglob("*") if p.is_file()]


def test_a_file_that_is_gone_from_its_source_is_named(toy, server):
    folder = toy(f"{server}/gone")
    fill(folder)
    (folder / "sub/b.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"gone/sub/b\.bin and put it at .*b\.bin"):
        module.fetch("toy")


def test_a_cache_folder_that_cannot_be_written_is_named(toy, server, monkeypatch, tmp_path):
    toy(f"{server}/good")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("REGKIT_DATA", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="cannot be written .*REGKIT_DATA"):
        module.fetch("toy")


def test_progress_bar_only_where_asked_for(toy, server, capsys):
    folder = toy(f"{server}/good")
    module.fetch("toy")
    assert capsys.readouterr().err == ""
    (folder / "a.bin").unlink()
    (folder / "sub/b.bin").unlink()
    module.fetch("toy", progress=True)
    shown = capsys.readouterr().err
    assert "toy" in shown and "100%" in shown and "12.0k" in shown


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="name is 'oasis3d'.*did you mean 'oasis_3d'"):
        module.fetch("oasis3d")
    with pytest.raises(ValueError, match="name is 'xx'.*expected one of oasis_3d, "):
        module.cached("xx")


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("REGKIT_DATA", str(tmp_path))
    assert module.cache_folder() == tmp_path
    monkeypatch.setenv("REGKIT_DATA", "~/images")
    assert module.cache_folder() == Path.home() / "images"
    monkeypatch.delenv("REGKIT_DATA")
    assert module.cache_folder().name == "regkit"


def test_the_table_is_complete_and_pinned():
    table = module.samples()
    assert {
        "oasis_3d",
        "oasis2d_mermaid",
        "ptbp_brain",
        "ants_slices",
        "lung_ct",
        "brain_labelmaps",
        "brainweb_t1_pd_2d",
    } <= set(table)
    for name, sample in table.items():
        assert sample.name == name and sample.title and sample.terms and sample.shown
        assert len({file.path for file in sample.files}) == len(sample.files) > 0
        for file in sample.files:
            host, owner, repository, commit, path = file.url.removeprefix("https://").split("/", 4)
            assert host == "raw.githubusercontent.com" and owner and repository and path
            assert len(commit) == 40 and int(commit, 16) and len(file.sha256) == 64
            assert file.bytes > 0 and file.licence and not Path(file.path).is_absolute()
            assert ".." not in Path(file.path).parts
    assert len(table["oasis2d_mermaid"].files) == 80
    assert sum("original/" in file.path for file in table["ptbp_brain"].files) == 2 * 25


def test_scan_turns_axes_without_resampling():
    """An array that runs to the left, down and to the front comes out right, front, top."""
    array = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    scan = module._scan("toy", module.OASIS_AFFINE, array, array)
    assert scan.image.shape == scan.labels.shape == (1, 2, 4, 3)
    assert scan.image.dtype == torch.float32 and scan.labels.dtype == torch.int16
    assert "".join(nib.aff2axcodes(scan.affine)) == "RAS"
    # the voxel (1, 2, 3) of the file lies where the turned voxel with its value lies
    where = np.argwhere(scan.image[0].numpy() == array[1, 2, 3])[0]
    before = module.OASIS_AFFINE @ [1, 2, 3, 1]
    np.testing.assert_allclose(scan.affine @ [*where, 1], before)
    # so it does in a slice, whose third index is 0
    slab = module._slice(scan, axis=1, index=3, name="slice")
    assert slab.image.shape == (1, 2, 3)
    np.testing.assert_allclose(slab.affine @ [where[0], where[2], 0, 1], before)
    assert float(slab.image[0, where[0], where[2]]) == array[1, 2, 3]
    np.testing.assert_array_equal(scan.nifti(labels=True).get_fdata(), scan.labels[0])


def test_scan_without_labels_says_so():
    scan = Subject("toy", torch.zeros(1, 2, 2), torch.empty(0), np.eye(4))
    with pytest.raises(ValueError, match="labels is True, but the scan 'toy' has no label map"):
        scan.nifti(labels=True)


# --- the real bytes ----------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("name", list(module.samples()))
def test_every_sample_is_cached_with_the_sums_of_the_table(sample, name):
    folder = sample(name)  # skips where the sample is not
    assert module.fetch(name) == folder


@pytest.mark.real
def test_oasis_pair(sample):
    sample("oasis_3d")
    moving, fixed = module.load_oasis_pair()
    assert moving.image.shape == fixed.image.shape == moving.labels.shape == (1, 160, 224, 192)
    assert fixed.labels.numel() == 0
    np.testing.assert_array_equal(moving.affine, fixed.affine)
    assert 0 <= moving.image.min() and moving.image.max() <= 1 and moving.image.max() > 0.9
    # FreeSurfer: 2 is left, 41 right white matter, and left lies at lower index of a R-running axis
    left, right = ((moving.labels[0] == i).nonzero()[:, 0].float().mean() for i in (2, 41))
    assert left < 79.5 < right
    # the cerebellum (8, 47) lies below and behind the cortex (3, 42)
    low, high = (
        torch.isin(moving.labels[0], torch.tensor(ids, dtype=torch.int16)).nonzero().float().mean(0)
        for ids in ((8, 47), (3, 42))
    )
    assert (low[1:] < high[1:] - 10).all()


@pytest.mark.real
def test_oasis_slices_have_the_known_overlap(sample):
    sample("oasis_3d")
    moving, fixed, labels = module.load_oasis_slices()
    assert moving.image.shape == fixed.image.shape == (1, 160, 192)
    np.testing.assert_array_equal(moving.affine, fixed.affine)
    assert len(labels) == 19 and 0 not in labels
    scores = metrics.dice(moving.labels[None], fixed.labels[None], labels)
    assert float(scores.mean()) == pytest.approx(0.602, abs=5e-4)


@pytest.mark.slow
@pytest.mark.real
def test_oasis_heads_and_structures(sample):
    sample("oasis_3d")
    a, b = module.load_oasis_heads()
    assert a.image.shape == a.labels.shape == b.image.shape == (1, 256, 256, 256)
    names = module.oasis_structures()
    assert names[1] == "thalamus" and names[13] == "brain_stem"
    assert set(a.labels.unique().tolist()) == {0, *names}
    merged = module.merge_structures(module.load_oasis_pair()[0].labels)
    assert set(merged.unique().tolist()) == {0, *names}
    # the channels' names are right if the two people's structures have similar sizes
    volumes = [torch.bincount(x.flatten().long())[1:].double() for x in (a.labels, merged)]
    assert float(np.corrcoef(volumes[0].log(), volumes[1].log())[0, 1]) > 0.95


def test_merge_structures():
    labels = torch.tensor([[0, 10, 49, 3, 42, 16, 85]], dtype=torch.int16)
    assert module.merge_structures(labels).tolist() == [[0, 1, 1, 10, 10, 13, 0]]


@pytest.mark.real
def test_oasis_stack(sample):
    folder = sample("oasis2d_mermaid")
    stack = module.load_oasis_stack()
    assert stack.shape == (80, 1, 128, 128) and stack.dtype == torch.float32
    assert float(stack.min()) == 0 and float(stack.max()) == 1
    # NRRD keeps its raw data, x fastest, behind an empty line
    raw = (folder / "original/oasis2d_0001.nrrd").read_bytes().split(b"\n\n", 1)[1]
    by_hand = np.frombuffer(raw, "<f4").reshape(128, 128).T
    np.testing.assert_array_equal(stack[0, 0], by_hand)


@pytest.mark.slow
@pytest.mark.real
def test_ptbp_slices_have_the_known_overlap(sample):
    sample("ptbp_brain")
    scans = module.load_ptbp_slices(indices=(9,))
    assert len(scans) == 25 and all(s.image.shape == s.labels.shape for s in scans)
    assert scans[0].image.shape == (1, 182, 217)
    assert {int(x) for s in scans for x in s.labels.unique()} == {0, 1, 2, 3, 4}
    maps = torch.stack([s.labels for s in scans])
    one, other = zip(*itertools.combinations(range(25), 2), strict=True)
    scores = metrics.dice(maps[list(one)], maps[list(other)], [1, 2, 3, 4])
    # known for 42 scans of these 25 children: 0.692 (.56, .68, .69, .82)
    assert float(scores.mean()) == pytest.approx(0.692, abs=0.01)
    np.testing.assert_allclose(scores.mean(0), [0.56, 0.68, 0.69, 0.82], atol=0.015)
    with pytest.raises(ValueError, match="indices is .*18.*from 0 to 17"):
        module.load_ptbp_slices(indices=(18,))


@pytest.mark.slow
@pytest.mark.real
def test_ptbp_slabs_are_what_their_source_says(sample):
    folder = sample("ptbp_brain") / "original"
    slabs = module.load_ptbp_slabs()
    assert len(slabs) == len({slab.name for slab in slabs}) == 25
    for slab in slabs:
        assert slab.image.shape == slab.labels.shape == (1, 182, 217, 18)
        assert "".join(nib.aff2axcodes(slab.affine)) == "RAS"
        np.testing.assert_array_equal(slab.affine, slabs[0].affine)
        np.testing.assert_allclose(np.linalg.norm(slab.affine[:3, :3], axis=0), 1, atol=1e-6)
        assert slab.labels.unique().tolist() == [0, 1, 2, 3, 4]
        assert slab.image.min() == 0 and slab.image.max() == 1
    # nothing was moved: the brightest voxel lies where the file, of axes (P, S, R), has it
    image = nib.Nifti1Image.from_filename(folder / f"ilist{slabs[3].name[5:]}.nii.gz")
    assert image.shape == (217, 18, 182)
    where = np.array(np.unravel_index(np.argmax(image.get_fdata()), image.shape))
    there = nib.affines.apply_affine(image.affine, where)
    voxel = nib.affines.apply_affine(np.linalg.inv(slabs[3].affine), there).round().astype(int)
    assert float(slabs[3].image[0][tuple(voxel)]) == 1
    # with skull and scalp: a rim of head without labels, a fifth of the brain and more
    assert ((slabs[3].image > 0.1) & (slabs[3].labels == 0)).sum() > (slabs[3].labels > 0).sum() / 5


@pytest.mark.real
def test_ptbp_modalities_lie_on_each_other(sample):
    sample("ptbp_brain")
    scans = module.load_ptbp_modalities()
    assert list(scans) == ["t1", "fa", "cbf"]
    labels = scans["t1"].labels[0]
    assert set(labels.unique().tolist()) == {0, 1, 2, 3, 4}
    for scan in scans.values():
        assert scan.image.shape == scan.labels.shape == (1, 182, 217, 8)
        assert "".join(nib.aff2axcodes(scan.affine)) == "RAS"
        np.testing.assert_array_equal(scan.affine, scans["t1"].affine)
        assert all((scan.image[0, :, :, k] != 0).any() for k in range(8))  # no slice is empty
    # what is known of tissue: white matter (3) is bright in T1 and anisotropic, and less blood
    # flows there than in grey matter (2); which shifted labels would blur
    grey, white = ({k: s.image[0][labels == i].mean() for k, s in scans.items()} for i in (2, 3))
    assert white["t1"] > 1.3 * grey["t1"] and white["fa"] > 2.5 * grey["fa"]
    assert white["cbf"] < 0.75 * grey["cbf"]
    # the first voxel of the filled slab lies where the file has it
    image = nib.Nifti1Image.from_filename(
        sample("ptbp_brain") / "multimodal/PEDS012_20100813_mprage_t1.nii.gz"
    )
    where = np.array(np.unravel_index(np.argmax(image.get_fdata()), image.shape))
    there = nib.affines.apply_affine(image.affine, where)
    voxel = nib.affines.apply_affine(np.linalg.inv(scans["t1"].affine), there).round().astype(int)
    assert float(scans["t1"].image[0][tuple(voxel)]) == image.get_fdata().max()


@pytest.mark.real
def test_prostates_have_the_known_overlap(sample):
    sample("prostate_mr_us")
    patients = module.load_prostates()
    assert [len(points) for _, _, points, _ in patients] == [2, 2, 0, 2, 1, 0, 0, 1]
    for mr, us, points, partners in patients:
        assert mr.image.shape == mr.labels.shape == (1, 64, 64, 60)
        assert us.image.shape == us.labels.shape == (1, 44, 59, 41)
        assert set(mr.labels.unique().tolist()) == set(us.labels.unique().tolist()) == {0, 1}
        assert points.shape == partners.shape
        for scan, places in ((mr, points), (us, partners)):
            centre = (np.array(scan.image.shape[1:]) - 1) / 2
            np.testing.assert_allclose(nib.affines.apply_affine(scan.affine, centre), 0, atol=1e-9)
            voxels = nib.affines.apply_affine(np.linalg.inv(scan.affine), places)
            assert (voxels >= 0).all() and (voxels <= 2 * centre).all()
    # measured by others on the files, with the centres of the grids matched
    for (mr, us, *_), known in zip(patients, (0.554, 0.709)):
        moved = resample(mr.labels[None], mr.grid, us.grid, "nearest")
        assert float(metrics.dice(moved, us.labels[None])) == pytest.approx(known, abs=0.01)


@pytest.mark.real
def test_lung_landmarks_in_physical_space(sample):
    sample("lung_ct")
    baseline, followup, points, partners = module.load_lung()
    assert baseline.image.shape == baseline.labels.shape == (1, 115, 157, 129)
    assert followup.image.shape == followup.labels.shape == (1, 115, 166, 131)
    np.testing.assert_allclose(np.diag(baseline.affine)[:3], [1.366, 1.366, 2.5])
    shift = partners - points
    assert np.linalg.norm(shift, axis=1).mean() == pytest.approx(35.25, abs=0.005)
    rest = np.linalg.norm(shift - shift.mean(0), axis=1).mean()
    assert rest == pytest.approx(4.27, abs=0.005)
    # the affines are right if the points fall into their grids, on half voxels as they were marked
    for scan, mm in ((baseline, points), (followup, partners)):
        voxels = nib.affines.apply_affine(np.linalg.inv(scan.affine), mm)
        assert (voxels >= 0).all() and (voxels <= np.array(scan.image.shape[1:]) - 1).all()
        np.testing.assert_allclose(2 * voxels, (2 * voxels).round(), atol=4e-3)
    # and the same anatomy lies at them: their patches correlate, which shuffled ones do not
    assert patch_correlation(baseline, points, followup, partners) > 0.8
    assert abs(patch_correlation(baseline, points, followup, partners[::-1])) < 0.3


def patch_correlation(one, points, other, partners, radius=3):
    """Mean correlation of the (2 radius + 1)^3 patches around pairs of points in mm."""
    values = []
    for pair in zip(points, partners, strict=True):
        patches = []
        for scan, mm in zip((one, other), pair, strict=True):
            at = nib.affines.apply_affine(np.linalg.inv(scan.affine), mm).round().astype(int)
            if (at < radius).any() or (at > np.array(scan.image.shape[1:]) - 1 - radius).any():
                break
            box = tuple(slice(i - radius, i + radius + 1) for i in at)
            patches.append(scan.image[0][box].flatten().numpy())
        if len(patches) == 2:
            values.append(np.corrcoef(*patches)[0, 1])
    assert len(values) > 20
    return np.mean(values)


@pytest.mark.slow
@pytest.mark.real
def test_labelmaps_have_the_known_overlap(sample):
    sample("brain_labelmaps")
    scans = module.load_labelmaps()
    assert [s.labels.shape for s in scans] == [(1, 148, 187, 155)] * 5
    means = []
    for a, b in itertools.combinations(scans, 2):
        shared = {*a.labels.unique().tolist()} & {*b.labels.unique().tolist()} - {0}
        means.append(metrics.dice(a.labels[None], b.labels[None], sorted(shared)).mean())
    assert float(torch.stack(means).mean()) == pytest.approx(0.367, abs=5e-4)


@pytest.mark.real
def test_brainweb_shift_is_the_one_its_name_says(sample):
    sample("brainweb_t1_pd_2d")
    scans = module.load_brainweb()
    assert {s.image.shape for s in scans.values()} == {(1, 221, 257)}
    pd, shifted = scans["pd"].image[0], scans["pd_shifted"].image[0]
    torch.testing.assert_close(shifted[13:, :-17], pd[:-13, 17:])


@pytest.mark.real
def test_the_matrix_of_two_visits_leads_from_baseline_to_follow_up(sample):
    """It is a rotation and a shift, and aligns the images as it is, not inverted."""
    sample("longitudinal_t1_2d")
    followup, baseline, matrix = module.load_two_visits()
    assert baseline.spacing == pytest.approx((1.0, 1.2), abs=1e-3)
    assert set(baseline.labels.unique().tolist()) == {0, 1}
    np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-4)
    there, back = (
        np.corrcoef(
            resample(followup.image[None], followup.grid, baseline.grid, matrix=m).flatten(),
            baseline.image.flatten(),
        )[0, 1]
        for m in (matrix, np.linalg.inv(matrix))
    )
    assert there > back + 0.3


@pytest.mark.real
def test_ants_slices_have_the_known_correlation(sample):
    sample("ants_slices")
    scans = module.load_ants_slices()
    assert [s.image.shape for s in scans.values()] == [(1, 256, 256)] * 4

    def r(a, b):
        flat = [scans[n].image.flatten().numpy() for n in (a, b)]
        return np.corrcoef(*flat)[0, 1]

    assert r("r16", "r64") == pytest.approx(0.566, abs=1e-3)
    assert r("r62", "r64") == pytest.approx(0.539, abs=1e-3)
    assert r("r27", "r64") == pytest.approx(0.524, abs=1e-3)
