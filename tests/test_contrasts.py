"""Are two images of one contrast? `regkit.checks.one_kind`, on toys, the population, real scans."""

import json
from pathlib import Path

import contrasts
import pytest
import torch

from regkit import checks
from regkit.data.population import population

HELD = json.loads((Path(__file__).parents[1] / "results" / "contrasts.json").read_text())


def heads(*which, shape=(80, 96)):
    """Of the population: (contrast, index) each, (1, 1, *S)."""
    return [population([index], shape, contrast=c, seed=3)[0].image[None] for c, index in which]


@pytest.mark.parametrize("contrast", ["t1", "t2", "pd", "flair"])
@pytest.mark.parametrize("shape", [(80, 96), (40, 48, 40)])
def test_two_people_of_one_contrast_are_of_one_kind(contrast, shape):
    assert checks.one_kind(*heads((contrast, 0), (contrast, 1), shape=shape))


@pytest.mark.parametrize(
    "pair", [("t1", "t2"), ("t1", "pd"), ("t1", "flair"), ("t2", "flair"), ("pd", "flair")]
)
def test_two_contrasts_are_not(pair):
    """Either way round, of two people who lie roughly alike."""
    a, b = heads((pair[0], 0), (pair[1], 1))
    assert not checks.one_kind(a, b) and not checks.one_kind(b, a)


def test_a_narrow_brightness_is_another_kind():
    """What is bright in both correlates, as in T1 and fractional anisotropy."""
    (t1,) = heads(("t1", 0))
    other = t1**6
    correlation, distance = checks.likeness(t1.clamp_min(0.06), other.clamp_min(0.06))
    assert correlation > 2 * checks.ALIKE and distance > checks.APART
    assert not checks.one_kind(t1.clamp_min(0.06), other.clamp_min(0.06))


def test_brightness_and_gain_of_the_scanner_change_no_distribution():
    (image,) = heads(("t1", 0))
    image = 0.1 + 0.8 * image
    correlation, distance = checks.likeness(image, 0.5 * image + 0.2)
    assert correlation == pytest.approx(1, abs=1e-4) and distance < 1e-4
    # quantiles of a uniform distribution against those of two equal heaps, each with deviation 1:
    # the mean of |(2 u - 1) 3^0.5 - sign(u - 1/2)| for u in [0, 1] is 1 - 1/3^0.5 + 3^0.5/2 - 1 ...
    flat = torch.linspace(0.1, 0.9, 200 * 200).reshape(1, 1, 200, 200)
    heaps = torch.where(flat > 0.5, 0.9, 0.1)
    u = torch.linspace(0.02, 0.98, 49).double()
    expected = (3**0.5 * (2 * u - 1) - (u - 0.5).sign())[u != 0.5].abs().sum() / 49
    found = checks._histogram_distance(flat.flatten(), heaps.flatten())
    assert found == pytest.approx(float(expected), abs=0.03)


@pytest.mark.parametrize("shape", [(3, 4), (200, 300, 2), (1, 50), (40, 40)])
def test_where_there_is_too_little_to_tell_two_images_are_of_one_kind(shape):
    flat = torch.full((1, 1, *shape), 0.5)
    assert checks.one_kind(flat, flat) and checks.one_kind(0 * flat, flat)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 1, *shape, generator=generator)
    assert checks.one_kind(noise, noise)


def test_the_file_counts_its_rows():
    rows = HELD["rows"]
    for line in HELD["summary"]:
        group = [r for r in rows if r["set"] == line["set"] and r["one_kind"] == line["one_kind"]]
        assert line["pairs"] == len(group)
        assert line["wrong"] == sum(r["found"] != r["one_kind"] for r in group)
    for row in rows:
        found = row["correlation"] >= checks.ALIKE and row["distance"] <= checks.APART
        assert row["found"] == found


@pytest.mark.real
def test_t1_and_anisotropy_of_a_child_are_two_kinds(sample):
    sample("ptbp_brain")
    for pair in contrasts.child():
        row = contrasts.measured(pair)
        assert row["found"] == pair.one_kind, pair.name


def test_the_study_writes_a_row_a_pair_and_goes_on(tmp_path, monkeypatch):
    image = torch.rand(1, 1, 30, 30)
    pairs = [contrasts.Pair("toy", f"{k}", k == 0, image, image) for k in range(2)]
    monkeypatch.setattr(contrasts, "SETS", {"toy": lambda: pairs})
    out = tmp_path / "results" / "contrasts.json"
    table = contrasts.run(out)
    assert [row["found"] for row in table["rows"]] == [True, True]
    assert [(x["one_kind"], x["pairs"], x["wrong"]) for x in table["summary"]] == [
        (True, 1, 0),
        (False, 1, 1),
    ]
    assert json.loads(out.read_text()) == json.loads(json.dumps(contrasts.run(out)))
