"""Each sentence of conclusion in book/results holds, at the digits that its page shows.

A table that is measured again may turn one of them around: then the sentence has to follow.
"""

import json
import re
from pathlib import Path

import pytest
from measured import lookup

from regkit.papers.tables import LAMBDA2

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "book" / "results"
WITH_CLAIMS = ("hu2024", "peng2026", "tan2023", "zhao2019")


def rows(name: str) -> list[dict]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def labelled(name: str) -> dict[str, dict]:
    return {row["label"]: row for row in rows(name)}


def points(row: dict) -> float:
    """A difference as the page shows it."""
    return round(100 * row["difference"], 1)


def above(row: dict) -> bool:
    """Is the whole interval on the side of a better Dice, as shown?"""
    return round(100 * row["difference_interval"][0], 1) > 0


def below(row: dict) -> bool:
    return round(100 * row["difference_interval"][1], 1) < 0


def not_shown(row: dict) -> bool:
    low, high = row["difference_interval"]
    return low <= 0 <= high


# ------------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("page", WITH_CLAIMS)
def test_the_claims_that_held_are_counted(page):
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    verdicts = re.findall(r"\| (yes|no|not shown) \|$", text, re.MULTILINE)
    said = re.search(r"^\*Claims that held:\* (\d) of (\d)", text, re.MULTILINE)
    assert [int(n) for n in said.groups()] == [verdicts.count("yes"), len(verdicts)]
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    line = re.search(rf"<{page}>` \|.*\| (\d) of (\d) claims \|$", index, re.MULTILINE)
    assert line.groups() == said.groups()


def test_a_name_with_a_wildcard_is_the_sum_over_its_files(tmp_path):
    for n in (1, 2, 3):
        (tmp_path / f"table{n}.json").write_text(json.dumps({"order": {"held": n}}))
    (tmp_path / "other.json").write_text(json.dumps({"order": {"held": 100}}))
    assert lookup(tmp_path, "table?", "order.held") == 6
    with pytest.raises(ValueError, match=r"result is 'chair\?', which fits no file"):
        lookup(tmp_path, "chair?", "order.held")


# ------------------------------------------------------------------------------------- Sun 2025


@pytest.mark.parametrize("name", ["sun2025-table1_2d_cpu", "sun2025-table1_3d_cpu"])
def test_searches_are_ahead_of_unfolding_here_and_behind_it_in_the_paper(name):
    found = labelled(name)
    for method in ("LDDMM", "SyN"):
        assert points(found[method]) > 0 > found[method]["paper_difference"]


def test_in_3d_unfolding_is_ahead_and_the_other_networks_stand_in_the_opposite_order():
    found = labelled("sun2025-table1_3d_cpu")
    others = [found[name] for name in ("VoxelMorph", "H-SGANet", "UTSRMorph", "TransMorph")]
    assert all(points(row) < 0 and row["paper_difference"] < 0 for row in others)
    ours, printed = ([round(row[key], 3) for row in others] for key in ("dice", "paper_dice"))
    assert ours == sorted(set(ours), reverse=True) and printed == sorted(set(printed))
    networks = [*others, found["VoxelMorph, half resolution"], found["Unfolding"]]
    assert {row["updates"] for row in networks} == {800}
    assert {len(row["seeds"]) for row in networks} == {1}
    weights = {row["label"]: row["parameters"] / 1e6 for row in others}
    assert round(weights["H-SGANet"], 1) == 0.4 and round(weights["UTSRMorph"]) == 20


def test_in_2d_unfolding_is_ahead_of_each_network_and_voxelmorph_is_last():
    name = "sun2025-table1_2d_cpu"
    found = labelled(name)
    networks = ("VoxelMorph", "TransMorph", "UTSRMorph", "H-SGANet")
    assert all(found[label]["difference_interval"][1] < 0 for label in networks)
    assert {len(found[label]["seeds"]) for label in (*networks, "Unfolding")} == {3}
    for key in ("dice", "paper_dice"):
        plain, *others = (round(found[label][key], 3) for label in networks)
        assert plain < min(others)
    file = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
    low, high = file["order"]["kendall_tau_interval"]
    assert low < 0 < high


def test_only_the_skips_are_worth_a_point():
    found = labelled("sun2025-table2_2d_cpu")
    assert points(found["without skips"]) < -1
    for label in ("without transformer", "plain convolutions as denoiser"):
        assert abs(points(found[label])) < 0.5


@pytest.mark.parametrize("number", [3, 4, 5])
def test_no_row_is_more_than_half_a_point_away(number):
    others = [row for row in rows(f"sun2025-table{number}_2d_cpu") if not row["default"]]
    assert others and all(abs(points(row)) <= 0.5 for row in others)


def test_the_dice_grows_with_the_stages():
    found = labelled("sun2025-table6_2d_cpu")
    dice, paper = (
        [round(found[f"K = {k}"][key], 3) for k in (2, 3, 5)] for key in ("dice", "paper_dice")
    )
    assert dice == sorted(set(dice)) and max(paper) == paper[1]


def test_what_a_weight_of_smoothness_changes():
    squared, local = (labelled(f"sun2025-lambda2_2d{kind}_cpu") for kind in ("", "_lncc"))
    for network, weight in LAMBDA2.items():  # the tables train with the best of the sweep
        dice = {
            label.rpartition(" = ")[2]: round(row["dice"], 3)
            for label, row in squared.items()
            if label.startswith(f"{network},") and row["state"] == "done"
        }
        best = dice.pop(str(weight))
        assert {"1.0", "0.03"} <= set(dice) and best > max(dice.values())
        assert best - dice["1.0"] > 0.05
    of_local = [row for label, row in local.items() if label.startswith("unfolding")]
    dice = [row["dice"] for row in of_local]
    folded = [row["folding_percent"] for row in of_local]
    assert max(dice) / min(dice) < 1.02 and max(folded) > 10 * min(folded)
    assert folded[0] == min(folded) and local["unfolding, lambda2 = 1.0"] is of_local[0]
    assert max(dice) - of_local[0]["dice"] < 0.005  # chapter 08: "costs little"


def test_the_papers_two_wishes():
    for row in rows("adaptive_stages"):
        if row["sign"] == "change" and 0.3 <= row["tolerance"] <= 0.8:
            stages = [round(row["stages"][a], 1) for a in ("0.5", "1.0", "2.0")]
            assert stages == sorted(set(stages))
    found = {
        (row["at"], row["attention"]): row["seconds"]
        for row in rows("light_transformer")
        if row["part"] == "bottleneck" and row["shape"] == [160, 192, 160]
    }
    assert found["1/8", "full"] > 10 * found["1/8", "linear"]
    assert found["1/16", "full"] < 0.1
    dice = [row["dice"] for row in rows("light_transformer") if row["part"] == "accuracy"]
    assert max(dice) - min(dice) < 0.01


# ------------------------------------------------------------------------------------ the others


def test_zheng():
    found = labelled("zheng2023-table1_2d_cpu")
    assert not_shown(found["Dense U-Net, ECA"])
    found = labelled("zheng2023-table1_ptbp_cpu")
    assert above(found["Dense U-Net, ECA"]) and below(found["without dense skips"])
    assert not_shown(found["without ECA"])
    gains = {}
    for kind in ("2d", "ptbp"):
        networks = rows(f"zheng2023-table1_{kind}_on_oasis_slices_cpu")[1:]
        gains[kind] = [round(r["dice"], 3) - round(r["dice_before"], 3) for r in networks]
    assert min(gains["ptbp"]) > 0 > min(gains["2d"])


def test_zhao():
    found = labelled("zhao2019-cascades_2d_cpu")
    for label in ("3 cascades", "stem, then 3 VoxelMorph", "3 cascades, each applied 2 times"):
        assert above(found[label])
    longer = found["1 cascade, 3 times the updates"]
    assert (
        not_shown(longer) and longer["folding_percent"] > 2 * found["3 cascades"]["folding_percent"]
    )


def test_tan():
    assert above(labelled("zhao2019-cascades_2d_cpu")["stem, then VoxelMorph"])
    alone, known, both = rows("tan2023-supervised_2d_cpu")
    assert below(known) and not_shown(both)
    assert both["folding_percent"] < alone["folding_percent"] / 2
    eyes = {r["method"]: r["auc"] for r in rows("fundus") if r["set"] == "synthetic"}
    assert rows("fundus")[9]["method"] == "as the survey says"
    first = [auc for method, auc in eyes.items() if method.startswith("contrast, shift, affine")]
    assert len(first) == 3 and min(first) > 0.4 and eyes.pop("true map") == 1
    assert sum(auc > 0 for auc in eyes.values()) == 3


def test_peng():
    found = labelled("peng2026-pyramids_2d_cpu")
    for label in ("without MSR", "without loss on every level"):
        assert below(found[label])
    for label in ("Dilformer", "without Dilformer layers", "without SRF"):
        assert not_shown(found[label])
    steps = {row["label"]: abs(points(row)) for row in found.values() if row["difference"]}
    del steps["SyN (ANTs)"]
    assert max(steps, key=steps.get) == "Dual-PRNet"
    for amplitude in (1, 3):
        at = labelled(f"peng2026-pyramids_2d_at_{amplitude}_cpu")
        assert above(at["Dual-PRNet"]) and below(at["without MSR"])


def test_hu():
    found = {(row["set"], row["method"]): row for row in rows("hu2024_cpu")}
    t1 = {method: row for (kind, method), row in found.items() if kind == "t1"}
    three, six = (round(t1[m]["rotation_median"], 2) for m in ("network", "affine network"))
    assert three < six < 1.5 * three and t1["network"]["success"] > 0.9
    wide, search = t1["network, width 64"]["seconds"], t1["SimpleITK, correlation"]["seconds"]
    assert 1 < search / wide < 10 and t1["network + 10 steps"]["rotation_median"] < 0.01
    order = [row["method"] for row in rows("hu2024_cpu")]
    assert [order[i] for i in (0, 2, 3, 6)] == [
        "network", "network, width 64", "affine network", "SimpleITK, correlation"
    ]  # fmt: skip
    between = {
        method: row["success"] for (kind, method), row in found.items() if kind == "contrasts"
    }
    for method in ("network", "descent", "SimpleITK, Mattes", "ANTs"):
        assert between[method] > 0.9
    assert between["SimpleITK, correlation"] < 0.5
    far = {method: row["success"] for (kind, method), row in found.items() if kind == "wide"}
    assert far["network"] < 0.5 and far["network + 10 steps"] > 0.95


# ------------------------------------------- what chapters 05 and 12 say of their tables in prose


def test_chapter_05_reads_its_table():
    found = labelled("zhao2019-cascades_2d_cpu")
    one, two, three = (found[f"{n} cascade{'s' * (n > 1)}"] for n in (1, 2, 3))
    dice = [round(row["dice"], 3) for row in (one, two, three)]
    folded = [round(row["folding_percent"], 3) for row in (one, two, three)]
    assert dice == sorted(set(dice)) and folded == sorted(set(folded))[::-1]
    twice, thrice = (found[f"1 cascade, applied {n} times"]["difference"] for n in (2, 3))
    assert 0.5 * two["difference"] < min(twice, thrice)  # "a good part of"
    assert max(twice, thrice) < three["difference"] / 2  # "less than half of"
    for n in (2, 3):
        assert above(found[f"3 cascades, each applied {n} times"])
    assert not_shown(found["3 cascades, each applied 5 times"])  # "do no good"
    longer = found["1 cascade, 3 times the updates"]["difference"]
    assert -longer < three["difference"] / 2  # "most of what three networks gain is time"
    affine = found["Affine only"]
    assert round(affine["dice"], 3) < round(affine["dice_before"], 3)  # "a little worse"
    assert found["SyN (ANTs)"]["folding_percent"] == 0
    learned = [row for row in found.values() if row["method"] not in ("syn", "affine")]
    assert max(learned, key=lambda row: row["dice"])["label"] == "stem, then 3 VoxelMorph"


def test_chapter_12_reads_the_framework():
    found = labelled("zhao2019-cascades_2d_cpu")
    alone, stem = (found[k] for k in ("VoxelMorph alone", "stem, then VoxelMorph"))
    assert round(stem["folding_percent"], 1) > round(alone["folding_percent"], 1)
    assert 0 < points(stem) < 2  # "the gain is small"


def test_chapter_12_reads_what_supervision_teaches():
    alone, known, both = rows("tan2023-supervised_2d_cpu")
    errors = [round(row["endpoint_error"], 2) for row in (alone, known, both)]
    assert abs(errors[1] - errors[0]) < 0.2 and min(errors) == errors[2] < min(errors[:2])
    assert both["folding_percent"] / alone["folding_percent"] == pytest.approx(0.2, abs=0.05)


def test_chapter_12_reads_the_lung():
    by_method = {row["method"]: row for row in rows("lung")}
    search, ants = by_method["affine, refined"], rows("lung")[7]
    ends = [row["tre"] for method, row in by_method.items() if method.endswith("refined")]
    assert max(ends) - min(ends) < 0.1  # "about there from wherever it starts"
    assert min(row["tre"] for row in rows("lung")) == search["tre"]  # "the best ... no network"
    assert round(ants["lung_dice"], 3) > round(search["lung_dice"], 3)
    assert ants["folding_percent"] == 0 and ants["tre"] > search["tre"]
    one_look, affine = by_method["affine, fcn"], by_method["affine"]
    assert one_look["tre"] < affine["tre"] / 2  # "most of the way"
    assert one_look["seconds"] - affine["seconds"] < 1  # "a second of one core, or less"


def test_chapter_12_reads_the_photographs():
    eyes = {row["method"]: row for row in rows("fundus") if row["set"] == "synthetic"}
    first = eyes["contrast, shift, affine"]
    assert max(first["errors"]) < 25 <= min(min(eyes[m]["errors"]) for m in eyes if "as they" in m)
    for further in ("refined", "its network"):
        assert eyes[f"contrast, shift, affine, {further}"]["error"] < first["error"]
    truth, refined = eyes["true map"], eyes["contrast, shift, affine, refined"]
    assert round(eyes["unregistered"]["image_dice"], 2) > round(truth["image_dice"], 2)
    assert round(refined["vessel_dice"], 2) > round(truth["vessel_dice"], 2)


def test_chapter_12_reads_other_scans():
    found = {(row["set"], row["method"]): row for row in rows("real_scans")}
    before = found["slabs", "affine"]["dice_per_pair"]
    after = found["slabs", "any_contrast_brain_3d"]["dice_per_pair"]
    gains = [round(100 * (b - a), 1) for a, b in zip(before, after)]
    assert len(gains) == 25 and min(gains) == 3.5
    for kind in ("oasis", "slabs"):
        best = found[kind, "any_contrast_brain_3d"]["gain"]
        assert best > found[kind, "unfolding_brain_3d"]["gain"]
    held = json.loads((ROOT / "results" / "modalities.json").read_text(encoding="utf-8"))
    smooth = [row for row in held["child"]["summary"] if row["map"] == "smooth"]
    error = {(row["moving"], row["method"]): round(row["error"], 1) for row in smooth}
    start = round(smooth[0]["error_before"], 1)
    for kind in ("fa", "cbf"):
        networks = [error[kind, f"{name}-contrast network"] for name in ("any", "same")]
        assert start < networks[0] < networks[1]  # "both do harm", one less of it
        others = [error[kind, name] for name in ("descent, MI", "SyN, MI")]
        assert error[kind, "engine, MIND"] < min(others) and max(others) < start
    prostate = {row["method"]: row for row in held["prostate"]["summary"]}
    none, network = prostate["no registration"], prostate["network, weak labels"]
    assert 5 <= 100 * (network["dice"] - none["dice"]) <= 6
    assert network["distance"] > none["distance"] and round(network["folding_percent"]) == 2
    methods = {name: row for name, row in prostate.items() if name != "affine between the outlines"}
    nearest = min(methods, key=lambda name: round(methods[name]["distance"], 1))
    assert nearest == "engine, MI" and len(methods) == len(prostate) - 1
    assert none["dice"] < prostate[nearest]["dice"] < network["dice"]  # "a smaller gain"


def test_chapter_07_reads_equal_means():
    table = json.loads((ROOT / "results" / "transformers.json").read_text(encoding="utf-8"))
    found = {row["equal"]: row for row in table["comparisons"]}
    assert all(row["seeds"] == 3 for row in found.values())
    assert all(above(found[f"equal {what}"]) for what in ("updates", "parameters"))
    assert below(found["equal time"])
    assert above(found["4 heads"]) and above(found["16 heads"])
    mean = {(row["network"], row["subjects"]): row for row in table["means"]}
    assert list(mean)[:2] + list(mean)[4:5] + list(mean)[7:] == [
        *(("vxm", 100), ("transmorph", 100), ("vxm, equal time", 100)),
        *(("vxm", 4), ("transmorph", 4)),
    ]
    few, many = mean["transmorph", 4], mean["transmorph", 100]
    vxm_few, vxm_many = mean["vxm", 4], mean["vxm", 100]
    lost = round(many["dice"], 3) - round(few["dice"], 3)
    assert 0 < lost < round(vxm_many["dice"], 3) - round(vxm_few["dice"], 3)
    folded = round(few["folding_percent"], 3)
    assert folded > round(many["folding_percent"], 3) and folded > round(
        vxm_few["folding_percent"], 3
    )
    gained = folded - round(many["folding_percent"], 3)
    assert gained > vxm_few["folding_percent"] - vxm_many["folding_percent"]
    assert many["parameters"] > 10 * vxm_many["parameters"]  # "many times"
    wider = mean["vxm, 36 channels", 100]["parameters"] / vxm_many["parameters"]
    assert 1 < wider < 1.3  # "slightly"
    # a shift is found less, and no head that differs three times as much is aligned
    assert all(
        round(many["shift_found"][k], 1) < round(vxm_many["shift_found"][k], 1) for k in (1, 2, 4)
    )
    assert round(many["gap_at"][3]) < 15
