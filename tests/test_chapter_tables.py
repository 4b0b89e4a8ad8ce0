"""What chapters 02, 04, 06 and 07 say of their result tables, against the numbers in `results/`.

A chapter's own numbers are asserted in its cells. Those of a table come from a file that another
program wrote, so that a sentence about them could become false without a cell that notices.
"""

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent.parent / "results"
DENSE, VXM2 = "Dense U-Net, ECA", "VoxelMorph-2"


def table(name: str, key: str = "label", **where: str) -> dict[str, dict]:
    """The finished rows of a file of results, by their label."""
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    wanted = {"state": "done"} | where
    return {r[key]: r for r in found if all(r.get(k, v) == v for k, v in wanted.items())}


def sure(row: dict) -> bool:
    """Whether the interval of the row's difference is clear of zero."""
    low, high = row["difference_interval"]
    return low > 0 or high < 0


def test_the_correlation_of_another_program_ends_in_the_valley_too():
    """Chapter 02, of the second table."""
    rows = table("hu2024_cpu", "method", set="contrasts")
    errors = {
        name: row["rotation_median"] for name, row in rows.items() if "rotation_median" in row
    }
    assert errors["SimpleITK, correlation"] > 1 > 0.1 > errors["SimpleITK, Mattes"]


def test_the_papers_order_does_not_come_back_on_synthetic_heads():
    """Chapter 04, of its first table."""
    rows = table("zheng2023-table1_2d_cpu")
    assert not sure(rows[DENSE]) and rows[DENSE]["paper_difference"] > 0.03
    assert not sure(rows["without ECA"]) and not sure(rows[f"{VXM2}, 4 times the updates"])
    assert round(rows[DENSE]["lncc"], 2) > round(rows[VXM2]["lncc"], 2)
    assert round(rows[DENSE]["endpoint_error"], 2) > round(rows[VXM2]["endpoint_error"], 2)
    assert all(row["folding_percent"] > 0 for name, row in rows.items() if name != "Affine only")


def test_the_short_skips_gain_on_children_and_eca_does_not():
    """Chapter 04, of its second table."""
    rows = table("zheng2023-table1_ptbp_cpu")
    assert sure(rows[DENSE]) and rows[DENSE]["difference"] > 0
    assert min(rows[DENSE]["dice_seeds"]) > max(rows[VXM2]["dice_seeds"])
    less, longer = rows["without dense skips"], rows[f"{VXM2}, 4 times the updates"]
    assert sure(less) and less["difference"] < 0 and not sure(rows["without ECA"])
    assert abs(less["dice"] - rows[VXM2]["dice"]) < 0.005
    assert sure(longer) and 0 < -longer["difference"] < rows[DENSE]["difference"] / 2
    for name in ("2d", "ptbp"):  # an update of one takes "about as long as three" of the other
        timed = table(f"zheng2023-table1_{name}_cpu")
        dense, vxm2 = (timed[row]["training_seconds"] for row in (DENSE, VXM2))
        assert 2.5 < dense / vxm2 < 3.5
    assert round(rows[DENSE]["lncc"], 2) > round(less["lncc"], 2)
    synthetic = table("zheng2023-table1_2d_cpu")["without dense skips"]
    assert less["difference"] < synthetic["difference"]


def test_what_networks_of_children_gain_on_a_pair_that_is_unlike_them():
    """Chapter 04, of its last two tables."""
    gained = {}
    for name in ("2d", "ptbp"):
        rows = table(f"zheng2023-table1_{name}_on_oasis_slices_cpu")
        gained[name] = {k: 100 * (row["dice"] - row["dice_before"]) for k, row in rows.items()}
        assert gained[name].pop("Affine only") < 0
    assert max(gained["2d"].values()) <= 1 and min(gained["2d"].values()) < 0
    assert 1 <= min(gained["ptbp"].values()) <= max(gained["ptbp"].values()) <= 3.5


def test_which_blocks_of_a_pyramid_make_a_difference():
    """Chapter 06, of its ablation."""
    rows = table("peng2026-pyramids_2d_cpu")
    syn = rows.pop("SyN (ANTs)")
    steps = {name: row["difference"] for name, row in rows.items() if row["difference"] is not None}
    large = steps.pop("Dual-PRNet")
    assert large > 5 * max(abs(step) for step in steps.values())  # the one large step
    assert rows["without loss on every level"]["dice"] > rows["VoxelMorph"]["dice"] + 0.1
    clear = {name for name, row in rows.items() if row["difference"] is not None and sure(row)}
    assert clear == {"Dual-PRNet", "without MSR", "without loss on every level"}
    assert all(row["folding_percent"] < 0.1 for row in rows.values())
    assert syn["dice"] > max(row["dice"] for row in rows.values()) + 0.05


@pytest.mark.parametrize("amplitude", [1, 3])
def test_the_order_of_the_pyramids_at_both_ends(amplitude):
    """Chapter 06, of its tables at other amplitudes."""
    rows = table(f"peng2026-pyramids_2d_at_{amplitude}_cpu")
    syn = rows.pop("SyN (ANTs)")
    assert rows["Dual-PRNet"]["difference"] > 0.05 and sure(rows["Dual-PRNet"])
    assert not sure(rows["Dual-PRNet++"]) and not sure(rows["Dilformer"])
    assert sure(rows["without MSR"])
    assert sure(rows["without loss on every level"]) == (amplitude == 3)
    folding = {name for name, row in rows.items() if row["folding_percent"] > 0.1}
    assert folding == ({"VoxelMorph", "without SRF"} if amplitude == 3 else set())
    assert syn["dice"] > max(row["dice"] for row in rows.values())
