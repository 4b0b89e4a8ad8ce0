"""What README and CHANGELOG say of the shipped weights is what results/*.json holds."""

import json
import re
from pathlib import Path

import pytest

from regkit import models, recipes

ROOT = Path(__file__).parents[1]


def test_every_shipped_weight_has_its_result():
    assert {path.stem for path in (ROOT / "results").glob("*.json")} >= set(models.pretrained())


@pytest.mark.parametrize("name", models.pretrained())
def test_the_readme_quotes_the_results(name):
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    summary, made = result["summary"], result["made"]
    # the file belongs to the weights that are shipped, and was made by evaluating these
    assert made["training"] == models.load(name).info
    assert made["command"].startswith(f"regkit evaluate {name} ")
    row = re.search(rf"^\| `{name}` \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    quoted = [float(x) for x in re.findall(r"\d+\.\d+", row[1])]
    keys = ("dice_before", "dice", "dice_ceiling", "hd95", "folding_percent")
    digits = (3, 3, 3, 1, 3)
    assert quoted == [round(summary[key], n) for key, n in zip(keys, digits, strict=True)]


@pytest.mark.parametrize("name", models.pretrained())
def test_the_weights_say_how_they_were_trained(name):
    """The recipe in the file is what `regkit train` takes today, but for length and seed."""
    held = models.load(name).info["recipe"]
    today = recipes.get(held["name"], "cpu", steps=held["steps"], seed=held["seed"])
    assert held == json.loads(json.dumps(vars(today), default=dict))
