"""What the book says is what results/*.json holds, and that is what the code does."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from fnmatch import fnmatch
from pathlib import Path

import accuracy
import figures
import numpy as np
import pytest
import regkit_book
import torch

from regkit import models, record
from regkit.book import cost
from regkit.training import recipes

ROOT = Path(__file__).parents[1]

HELD = json.loads((ROOT / "results" / "accuracy.json").read_text())


def shown(page: str) -> str:
    """A page of the book, with the numbers that its roles `result` write."""

    def number(role: re.Match) -> str:
        name, keys, *spec = role[1].split()
        value = regkit_book.lookup(ROOT / "results", name, keys)
        return regkit_book.Words().format_field(value, *spec or [""])

    text = (ROOT / "book" / f"{page}.md").read_text(encoding="utf-8")
    return re.sub(r"\{result\}`([^`]+)`", number, text)


def test_every_shipped_weight_has_its_result():
    assert {path.stem for path in (ROOT / "results").glob("*.json")} >= set(models.pretrained())


@pytest.mark.parametrize("name", models.pretrained())
def test_the_page_of_weights_quotes_the_results(name):
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    summary, made = result["summary"], result["made"]
    # the file belongs to the weights that are shipped, and was made by evaluating these
    assert made["training"] == models.load(name).info
    assert made["command"].startswith(f"regkit evaluate {name} ")
    row = re.search(rf"^\| `{name}` \|(.*)\|$", shown("weights"), re.MULTILINE)
    quoted = [float(x) for x in re.findall(r"\d+\.\d+", row[1])]
    keys = ("dice_before", "dice", "dice_ceiling", "hd95", "folding_percent")
    digits = (3, 3, 3, 1, 3)
    if "success" in summary:  # of a known motion
        keys, digits = ("rotation_error", "translation_error", "success"), (2, 2, 1)
    assert quoted == [round(summary[key], n) for key, n in zip(keys, digits, strict=True)]


@pytest.mark.parametrize("name", models.pretrained())
def test_the_weights_say_how_they_were_trained(name):
    """The recipe in the file is what `regkit train` takes today at some budget, but for length,
    seed, and how often it was watched, which changes no weight; where it leaves the precision to
    the device, the file says which one was taken. What recipes have learnt to say since then stands
    at its default."""
    held = models.load(name).info["recipe"]
    changes = {key: held[key] for key in ("steps", "seed", "validate_every")}
    today = [recipes.get(held["name"], budget, **changes) for budget in ("cpu", "gpu")]
    taken = {"precision": held["precision"]}
    today = [recipes.replace(r, **taken) if r.precision == "auto" else r for r in today]
    assert held["precision"] in ("no", "bf16", "fp16")
    defaults = {f.name: f.default for f in fields(recipes.Recipe) if f.default is not MISSING}
    assert {**defaults, **held} in [json.loads(json.dumps(vars(r), default=dict)) for r in today]


def test_the_page_of_weights_quotes_the_real_scans():
    held = json.loads((ROOT / "results" / "real_scans.json").read_text())["rows"]
    page = shown("weights")
    methods = ("affine", "vxm_diff_brain_3d", "unfolding_brain_3d", "any_contrast_brain_3d")
    for name, words in (("oasis", "a pair of OASIS"), ("slabs", "25 slabs of")):
        rows = {row["method"]: row for row in held if row["set"] == name}
        line = re.search(rf"^\| {words}[^|]*\|(.*)\|$", page, re.MULTILINE)
        quoted = [float(x) for x in re.findall(r"\d+\.\d+", line[1])]
        expected = [rows["affine"]["dice"]]
        for method in methods[1:]:
            expected += [rows[method]["dice"], rows[method]["folding_percent"]]
        assert quoted == pytest.approx(expected, abs=5.1e-4)
        # each row belongs to the weights that are shipped
        for method in methods[1:]:
            file = Path(models.__file__).parents[1] / "weights" / f"{method}.safetensors"
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            assert digest.startswith(rows[method]["sha256"])


# --------------------------------------------------------------------- how the numbers were made

RESULTS = sorted((ROOT / "results").glob("*.json"))


def parts(held) -> list[dict]:
    """Every dictionary in a file of results."""
    inner = held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()
    return [held] * isinstance(held, dict) + [part for x in inner for part in parts(x)]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_with_what_from_which_code_and_when_it_was_made(path):
    held = json.loads(path.read_text())
    made = held.get("made", held)
    assert made["command"] and re.match("[0-9a-f]{40}", made["commit"])
    for part in parts(held):
        if "date" in part:
            assert re.fullmatch(r"20\d\d-\d\d-\d\d", part["date"])
        if "device" in part:  # the name of a processor or a GPU, and nothing else
            assert re.search(r"AMD|Intel|NVIDIA|Apple|CPU, model not recorded", part["device"])
            assert "thread" not in part["device"]
        assert part.get("threads", 1) >= 1
    assert made["date"] and made["device"]


def test_the_index_lists_every_file_and_its_study():
    index = (ROOT / "results" / "README.md").read_text()
    listed = [re.findall("`([^`]+)`", line) for line in index.splitlines() if line[:3] == "| `"]
    patterns = [name for names in listed for name in names if name.endswith(".json")]
    for path in RESULTS:
        assert sum(fnmatch(path.name, pattern) for pattern in patterns) == 1, path.name
    studies = {path.name for path in (ROOT / "studies").glob("*.py")} - {"common.py"}
    assert set(re.findall(r"`python studies/(\w+\.py)", index)) == studies


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_no_memory_of_a_process_on_a_cpu_was_read_from_what_survives_exec(path):
    """Since then `record.peak_memory` reads the process's own; a later number has a later date."""
    for part in parts(json.loads(path.read_text())):
        if "memory_gb" in part or "training_memory_gb" in part:
            on_gpu = "NVIDIA" in part.get("device", "")
            assert on_gpu or part.get("date", "2026-11-29") > "2026-11-27"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_measured_peak_names_its_method(path):
    """What studies/cost.py measures; it also estimates, and says so in the name."""
    table = json.loads(path.read_text())
    if any("gigabytes" in part for part in parts(table)):
        assert "VmHWM" in table["made"]["memory_is"]


@pytest.mark.slow
def test_peak_memory_is_that_of_this_process_in_units_of_1e9_bytes():
    """Not that of the process which started it; and it grows with what is held."""
    code = """if True:
        import sys
        import numpy as np
        from regkit.record import peak_memory
        before = peak_memory()
        held = np.ones(25_000_000)  # 0.2e9 bytes
        print(before, peak_memory() - before)
    """
    ours = np.ones(2 * 10**8, dtype=np.int8)  # we are larger than what we start
    big = np.ones(100_000_000)  # 0.8e9 bytes
    before, more = map(float, subprocess.check_output([sys.executable, "-c", code]).split())
    assert record.peak_memory() > 0.8 + 0.2 * len(ours) / 2e8
    assert 0.19 < more < 0.22 and before < 0.6
    del big


def test_cost_is_the_peak_in_the_same_units():
    assert cost()[1] == pytest.approx(record.peak_memory(), rel=1e-6)
    assert record.device_name() and record.made_now()["device"] == record.device_name()


# ---------------------------------------------------------------- what chapters 04 to 06 reach


def rows_of(name: str) -> dict[str, dict]:
    rows = json.loads((ROOT / "results" / f"{name}.json").read_text())["rows"]
    return {row.get("label") or row["method"]: row for row in rows}


def test_three_cascades_beat_one_and_further_looks_do_no_harm():
    rows = rows_of("zhao2019-cascades_2d_cpu")
    gain = rows["3 cascades"]
    assert gain["difference"] >= 0.01 and gain["difference_interval"][0] > 0
    assert len(gain["seeds"]) == 3
    for label in ("3 cascades, each applied 2 times", "3 cascades, each applied 3 times"):
        assert rows[label]["dice"] > gain["dice"] - 0.001


def test_pyramids_beat_voxelmorph_on_large_deformations_and_hardly_fold():
    rows = rows_of("peng2026-pyramids_2d_cpu")
    two_streams = rows["Dual-PRNet"]
    assert two_streams["difference"] >= 0.02 and two_streams["difference_interval"][0] > 0.02
    assert rows["Dilformer"]["dice"] > rows["VoxelMorph"]["dice"] + 0.02
    for label in ("Dual-PRNet", "Dilformer"):
        assert rows[label]["folding_percent"] < 0.1 and len(rows[label]["seeds"]) == 3


def test_dilformer_takes_at_most_twice_the_time_of_vxm():
    """At 160x192x160, each setting of precision and layout beside its own."""
    ours, theirs = (
        json.loads((ROOT / "results" / f"{name}_cost.json").read_text())
        for name in ("dilformer", "vxm")
    )
    assert ours["shape"] == theirs["shape"] == [160, 192, 160]
    for a, b in zip(ours["rows"], theirs["rows"], strict=True):
        assert (a["bf16"], a["channels_last"]) == (b["bf16"], b["channels_last"])
        assert a["seconds"] <= 2 * b["seconds"]


def test_the_lung_ends_within_two_millimetres_and_not_above_ants():
    rows = rows_of("lung")
    ants = rows["ANTs affine and SyN, mutual information"]
    assert rows["affine, refined"]["tre"] <= 2.0
    assert rows["affine, refined"]["tre"] <= ants["tre"]
    assert rows["unregistered"]["tre"] > 30  # what it was


# ------------------------------------------------------------------------------- accuracy.json


def near(rows, held) -> bool:
    """Equal but for rounding: to three digits, or both below a billionth."""
    assert len(rows) == len(held)
    for row, other in zip(rows, held, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            is_number = not isinstance(value, str)
            assert value == (pytest.approx(other[key], 2e-3, 1e-9) if is_number else other[key])
    return True


def test_no_warp_of_a_wave_is_worse_than_the_formula():
    rows = accuracy.interpolation(accuracy.WAVELENGTHS)
    assert all(row["largest"] <= row["bound"] * (1 + 1e-9) for row in rows)
    assert rows[0]["bound"] == pytest.approx(0.5)  # three voxels: 1 - cos(60 degrees)
    assert near(rows, HELD["interpolation"])


def test_composition_is_as_the_page_says():
    rows = accuracy.composition(accuracy.WAVELENGTHS)
    assert near(rows, HELD["composition"])
    by = {row["wavelength"]: row["largest"] for row in rows}
    assert 3.5 < by[24] / by[48] < 4.5  # twice the wavelength, a quarter of the error


def test_the_inverse_settles_where_the_formula_says_and_shows_folds_in_one_order_only():
    rows = accuracy.inversion(accuracy.STEEPNESS, (30, 100))
    assert near(rows, [row for row in HELD["inverse"] if row["iterations"] in (30, 100)])
    for row in (row for row in rows if row["iterations"] == 100):
        if row["steepness"] < -1:
            assert row["residual"] < 1e-9 and row["other_order"] > 1
        else:  # the error shrinks to |0.3 - 0.7 s| of itself in each iteration, or grows
            assert (row["residual"] < 0.02) == (abs(0.3 - 0.7 * row["steepness"]) < 1)


@pytest.mark.parametrize("field", [accuracy.stretch, accuracy.vortex])
def test_a_closed_form_follows_its_velocity(field):
    """The displacement after time t belongs to the size 2t; its slope in t is v(x + disp)."""
    x = torch.rand(1, 2, 40, 40, dtype=torch.float64) * 40
    (_, before), (_, after) = field(x, 2.0 - 2e-5), field(x, 2.0 + 2e-5)
    velocity, _ = field(x + field(x, 2.0)[1], 2.0)
    assert ((after - before) / 2e-5 - velocity).abs().max() < 1e-6


def test_there_and_back_in_time_is_below_a_twentieth_of_a_voxel():
    rows = accuracy.exponentials((0.5, 1, 2), (7,))
    held = [row for row in HELD["exponential"] if row["steps"] == 7 and row["size"] <= 2]
    assert near(rows, held)
    worst = max(row["residual"] for row in rows)
    assert worst < 0.05 and worst == pytest.approx(HELD["exponential_worst"], rel=2e-3)


def test_there_and_back_in_time_on_a_brain_is_as_the_page_says():
    svf = accuracy.population(1, accuracy.BRAIN)[0].svf
    rows = accuracy.brain_exponentials(svf, (2,), (7,))
    (held,) = [
        row for row in HELD["brain"]["exponential"] if row["size"] == 2 and row["steps"] == 7
    ]
    assert near(rows, [held])
    assert rows[0]["largest"] < 0.05 < rows[0]["with_border"]


def test_a_full_turn_blurs_a_brain_unless_it_is_composed():
    turn = accuracy.full_turn()
    assert turn["many"] == pytest.approx(HELD["turn"]["many"], rel=2e-3)
    assert turn["once"] < 1e-4 and turn["voxels"] < 1e-3
    assert max(HELD["turn"]["once"], HELD["turn"]["voxels"]) < 1e-3


def test_single_precision_costs_less_than_a_thousandth_of_a_voxel():
    assert all(row["largest"] < 1e-3 for row in HELD["precision"])
    rows = accuracy.precision(torch.rand(1, 3, 12, 12, 12))
    assert all(0 < row["largest"] < 1e-3 for row in rows)


# ------------------------------------------------------------------- numbers and figures in pages


@pytest.mark.parametrize("name", [name for name, (_, source) in figures.FIGURES.items() if source])
def test_a_figure_is_drawn_from_the_numbers_that_are_there(name):
    """Else: python book/tools/figures.py NAME."""
    assert figures.drawn_from(name) == figures.fingerprint(figures.FIGURES[name][1])


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (0.0000321, "power", "3.2·10⁻⁵"),
        (0.0243, "power", "0.024"),
        (0.0, "power", "0"),
        (0.0764, "percent", "7.6 %"),
        (7.0512, "time", "7.05 s"),
        (0.18, "time", "180 ms"),
        (0.0123, "time", "12.3 ms"),
        (0.00000012, "time", "0.12 µs"),
        (0.9996, "time", "1000 ms"),
        (123456789, "bytes", "123 MB"),
        (0.0123, "points", "+1.2"),
        ([-0.0068, 0.0049], "points", "\N{MINUS SIGN}0.7 to +0.5"),
        (1.5, ".2f", "1.50"),
        (None, "time", "–"),
        ([80, 96, 80], "", "80×96×80"),
        ("lncc", "", "lncc"),
    ],
)
def test_how_a_number_of_a_result_is_written(value, spec, text):
    written = regkit_book.Words().format("{value:" + spec + "}", value=value)
    assert written.replace("\N{NO-BREAK SPACE}", " ") == text


def test_a_table_of_a_result_holds_the_chosen_rows():
    rows = [{"name": "a", "size": 1, "seconds": None}, {"name": "b", "size": 2, "seconds": 0.5}]
    templates = ["what = `{name}`", "time = {seconds:time}"]
    assert regkit_book.table(rows, templates) == [
        ["what", "time"],
        ["`a`", "–"],
        ["`b`", "500\N{NO-BREAK SPACE}ms"],
    ]
    assert regkit_book.table(rows, templates, "size=2") == [
        ["what", "time"],
        ["`b`", "500\N{NO-BREAK SPACE}ms"],
    ]
    for where in ("seconds!=None", "seconds<1", "size>1 name=b"):
        assert regkit_book.table(rows, templates, where)[1:] == [["`b`", "500\N{NO-BREAK SPACE}ms"]]
    assert regkit_book.table(rows, templates, "size=3") == [["what", "time"]]
    rows = [{"name": "a"}, {"name": "b", "seconds": 0.5}]
    assert regkit_book.table(rows, templates, "name=a")[1:] == [["`a`", "–"]]
    with pytest.raises(KeyError):
        regkit_book.table(rows, ["time = {second:time}"])


def test_a_number_that_a_result_does_not_hold_is_one_sentence(tmp_path):
    (tmp_path / "made.json").write_text('{"rows": [{"a": 1}]}')
    assert regkit_book.lookup(tmp_path, "made", "rows.0.a") == 1
    with pytest.raises(ValueError, match="keys is 'rows.1.a'.* no '1'"):
        regkit_book.lookup(tmp_path, "made", "rows.1.a")
    with pytest.raises(ValueError, match="result is 'other'"):
        regkit_book.lookup(tmp_path, "other", "rows")
