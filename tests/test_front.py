"""The front door: the README, the first page of the book, and the page of shipped weights."""

import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import figures
import matplotlib
import numpy as np
import pytest
import regkit_front
import yaml
from address import Address
from PIL import Image, ImageFont

from regkit import models
from regkit.training import recipes

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "book" / "_static"

README = (ROOT / "README.md").read_text(encoding="utf-8")
WEIGHTS = (ROOT / "book" / "weights.md").read_text(encoding="utf-8")
INDEX = (ROOT / "book" / "index.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------ README


def test_the_readme_is_one_page_that_begins_with_a_picture_that_is_there():
    assert len(README.splitlines()) < 100
    (alt, name) = re.search(r"!\[([^\]]+)\]\(([\w./]+)\)", README[:600]).groups()
    assert len(alt) > 50 and (ROOT / name).is_file()
    assert figures.FIGURES[Path(name).stem]  # drawn by the project


def test_the_readme_links_to_files_that_are_there():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 15
    for link in links:
        assert link == "../../tree/colab" or (ROOT / link).is_file(), link


@pytest.mark.slow
def test_the_python_of_the_readme_registers_two_scans(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```$", README)
    assert 15 <= len(code.splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(code, "README", "exec"), scope)
    dice = scope["result"].metrics["dice"]
    assert dice["after"] > dice["before"] + 0.1
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written >= {"moved.nii.gz", "disp.nii.gz", "metrics.json", "report.png"}
    assert all(name in code for name in ("moved.nii.gz", "disp.nii.gz", "report.png"))


def test_the_one_line_of_results_is_what_was_measured():
    rows = json.loads((ROOT / "results" / "what_you_get.json").read_text())["summary"]
    dice = {row["method"]: row["dice"] for row in rows if row["set"] == "oasis"}
    (line,) = re.findall(r"(?s)\*\*What to expect:\*\*.*?\n\n", README)
    named = ("affine", "auto", "greedy", "syn_as_it_comes")
    assert re.findall(r"0\.\d+", line) == [f"{dice[method]:.3f}" for method in named]
    assert dice["auto"] > dice["greedy"] > dice["syn_as_it_comes"] > dice["affine"]
    assert "13 structures" in line and "`results/what_you_get.json`" in line


def test_the_badges_say_what_is_so():
    """Counted anew, and as wide as what they say."""
    font = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    letters = ImageFont.truetype(str(font), 11)  # has the widths of Verdana
    shown = re.findall(r"!\[[^\]]+\]\((book/_figures/badge_\w+\.svg)\)", README)
    texts = figures.badge_texts()
    assert shown == [f"book/_figures/badge_{name}.svg" for name in texts]
    for name, (left, right) in zip(shown, texts.values()):
        drawn = (ROOT / name).read_text(encoding="utf-8")
        assert drawn == figures.badge_svg(left, right), "python book/tools/figures.py badges"
        badge = ElementTree.fromstring(drawn)
        assert badge.get("aria-label") == f"{left}: {right}"
        for text in badge.iter("{http://www.w3.org/2000/svg}text"):
            assert abs(float(text.get("textLength")) - letters.getlength(text.text)) < 3
    stubs = [
        re.findall(r'(?m)^check\("(\d\d-\d+)"', path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "notebooks").glob("[0-9]*.md"))
    ]
    assert texts["chapters"][1] == str(len(stubs))
    assert texts["exercises"][1] == str(sum(len(set(found)) for found in stubs))


# ---------------------------------------------------------------------------- the first page


def test_the_logo_is_what_its_script_draws_and_small():
    text = (STATIC / "logo.svg").read_text(encoding="utf-8")
    assert text == figures.logo_svg() and len(text) < 5000
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert config["logo"] == config["html"]["favicon"] == "book/_static/logo.svg"
    points = [
        float(x) for x in re.findall(r"[\d.]+(?=[, \"])", "".join(re.findall(r'd="M.*"', text)))
    ]
    assert 0 < min(points) and max(points) < 64


def test_the_grid_of_the_logo_never_crosses_itself():
    """The map keeps each distance from the middle, and its Jacobian is 1 everywhere."""
    x = np.stack(np.meshgrid(*[np.linspace(-1, 1, 41)] * 2), -1).reshape(-1, 2)
    step = 1e-5
    slopes = [
        (figures.twisted(x + e) - figures.twisted(x - e)) / (2 * step)
        for e in (np.array([step, 0]), np.array([0, step]))
    ]
    determinant = slopes[0][:, 0] * slopes[1][:, 1] - slopes[0][:, 1] * slopes[1][:, 0]
    assert np.abs(determinant - 1).max() < 1e-6


def test_the_moving_picture_is_small_short_and_has_a_still():
    moving, still = STATIC / "hero.webp", STATIC / "hero_still.webp"
    assert moving.stat().st_size + still.stat().st_size <= 300_000
    with Image.open(moving) as picture, Image.open(still) as last:
        assert picture.info["loop"] == 3 and picture.n_frames >= 10
        assert picture.size == last.size == (720, 288)
        total = 0
        for frame in range(picture.n_frames):
            picture.seek(frame)
            picture.load()
            total += picture.info["duration"]
        assert 3 * total <= 5000  # longer, and a reader would need a way to stop it
        end = np.asarray(picture.convert("RGB"), float)
        assert np.abs(end - np.asarray(last.convert("RGB"), float)).mean() < 5
    source, image = re.search(
        r'(?s)<source media="(.*?)".*?<img src="[^"]*" (.*?)>', INDEX
    ).groups()
    assert source == "(prefers-reduced-motion: reduce)"
    assert len(re.search(r'alt="(.*?)"', image)[1]) > 50


@pytest.mark.slow
def test_the_moving_picture_ends_where_the_outlines_fit():
    frames = figures.hero_frames(shape=(48, 56), count=3)
    middles = [np.asarray(frame.axes[1].images[0].get_array()) for frame in frames]
    fixed = np.asarray(frames[0].axes[2].images[0].get_array())
    away = [np.abs(middle - fixed).mean() for middle in middles]
    assert away[0] > 2 * away[-1] and away[0] > away[1] > away[2]
    for frame in frames:
        figures.plt.close(frame)


PAGE = """---
kernelspec: {name: python3, display_name: Python}
---

# 09 A title

One two three.

```{code-cell} ipython3
:tags: [hide-input]
no = "line of this counts"
```

```{code-cell} ipython3
a = 1
b = 2
c = 3
```

It is ten.

## Exercises

Nothing of this.
"""


def small_book(folder: Path, seconds=90) -> Path:
    (folder / "notebooks").mkdir()
    toc = {"parts": [{"chapters": [{"file": "book/a"}, {"file": "notebooks/09_title"}]}]}
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc))
    (folder / "notebooks/09_title.md").write_text(PAGE.replace("ten", "ten " * 600))
    metadata = {"metadata": {"regkit": {"seconds": seconds} if seconds else {}}}
    (folder / "notebooks/09_title.ipynb").write_text(json.dumps(metadata))
    return folder


def test_a_chapter_has_its_number_its_title_and_its_minutes(tmp_path):
    (chapter,) = regkit_front.chapters(small_book(tmp_path))
    assert (chapter.page, chapter.number, chapter.title) == ("notebooks/09_title", "09", "A title")
    # words: the three of the title, one to three, it is, 600 times ten; three lines of open code
    assert chapter.running == 1.5 and chapter.reading == pytest.approx(608 / 200 + 3 / 6)
    table = regkit_front.path_table([chapter, chapter], {"09": "its subject", "10": "not there"})
    assert table[2] == "| 09 | {doc}`A title </notebooks/09_title>` | its subject | 4 | 2 |"
    assert table[-1] == "| | together | | 7 | 3 |" and "not there" not in "".join(table)


def test_a_chapter_that_was_never_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"notebooks/09_title has .*None s, expected a title such"):
        regkit_front.chapters(small_book(tmp_path, seconds=None))


def test_every_chapter_says_on_the_first_page_what_it_is_about():
    (body,) = re.findall(r"(?s)```\{chapter-minutes\}\n(.*?)```", INDEX)
    about = {line.split(" = ")[0] for line in body.splitlines()}
    assert {chapter.number for chapter in regkit_front.chapters(ROOT)} <= about
    assert "planned" not in INDEX


def test_a_chapter_is_read_and_run_within_ninety_minutes():
    for chapter in regkit_front.chapters(ROOT):
        assert 5 < chapter.reading + chapter.running <= 90, chapter


def test_colab_has_a_button_only_where_the_project_is_on_github():
    link = regkit_front.colab_link
    assert link(None, "notebooks/01") is None
    assert link(Address("https://example.org/a/b", "main"), "notebooks/01") is None
    there = link(Address("https://github.com/a/b", "main"), "notebooks/01", "colab")
    assert there.endswith(".google.com/github/a/b/blob/colab/notebooks/01.ipynb")
    assert link(Address("https://github.com/a/b", "v1"), "n").endswith("/a/b/blob/v1/n.ipynb")


# --------------------------------------------------------------------------------- the weights


def test_every_shipped_weight_has_a_card_that_says_what_it_is_not_for():
    parts = re.split(r"(?m)^## (\w+)$", WEIGHTS)
    cards = dict(zip(parts[1::2], parts[2::2]))
    assert set(cards) >= set(models.pretrained())
    for name in models.pretrained():
        assert f"```{{weights-card}} {name}\n```" in cards[name]
        assert "**For**:" in cards[name] and "**Not for**:" in cards[name]


def result_of(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_a_card_counts_the_updates_that_the_weights_have_gone_through():
    training = result_of("vxm_diff_brain_3d")["made"]["training"]
    assert regkit_front.updates(training) == [
        1800,
        1600,
        1400,
    ]  # the first gave its best, not its last
    text = "\n".join(regkit_front.card("x", result_of("vxm_diff_brain_3d"), 1_258_812))
    assert "1,800 + 1,600 + 1,400, of 1 pair: 4,800 pairs in all, in float32" in text
    assert "40 synthetic heads in T1, 80×96×80 voxels of 2.2×2.2×2.2 mm" in text
    assert "`vxm_diff` in 3D, with `half_resolution=True`" in text
    assert "lncc, and weights similarity 1, diffusion 0.1" in text
    assert "1.26\N{NO-BREAK SPACE}MB" in text and "2 threads" in text
    text = "\n".join(regkit_front.card("x", result_of("any_contrast_brain_3d"), 1))
    assert (
        "800 + 300 + 600" in text and "painted in random contrasts" in text and "bfloat16" in text
    )
    text = "\n".join(regkit_front.card("x", result_of("rigid_resnet34_2d_multi"), 1))
    assert "of 16 pairs" in text and "in T1, T2, FLAIR, moved by up to 5° and 5 mm" in text


def options(line: str) -> dict[str, str]:
    words = shlex.split(line)
    return dict(zip(words[2::2], words[3::2]))


def test_the_commands_of_the_cards_are_those_of_the_trainings():
    """Recipe, steps and seed of every run behind the weights, in the order in which they ran."""
    bash = "".join(re.findall(r"(?ms)^```bash\n(.*?)^```$", WEIGHTS)).replace("\\\n", " ")
    calls = [options(line) for line in bash.splitlines() if line.startswith("regkit train")]
    typed = {(c["--recipe"], c.get("--steps"), c.get("--seed", "0")) for c in calls}
    assert all(c["--budget"] == "cpu" for c in calls)
    made = set()
    for name in models.pretrained():
        for run in regkit_front.chain(models.load(name).info):
            recipe = run["recipe"]
            by_itself = recipes.get(recipe["name"], "cpu").steps == recipe["steps"]
            steps = None if by_itself else str(recipe["steps"])
            made.add((recipe["name"], steps, str(recipe["seed"])))
    assert typed == made


def test_what_the_cards_compare_is_so():
    scans = json.loads((ROOT / "results" / "real_scans.json").read_text())["rows"]
    by = {(row["set"], row["method"]): row for row in scans}
    three = ("vxm_diff_brain_3d", "unfolding_brain_3d", "any_contrast_brain_3d")
    for name in ("oasis", "slabs"):  # the first brings the least
        dice = [round(by[name, method]["dice"], 3) for method in three]
        assert dice == sorted(set(dice))
    folds = [by["oasis", method]["folding_percent"] for method in three]
    assert max(folds) == folds[1] > folds[2] > folds[0]
    pairs = [sum(regkit_front.updates(result_of(name)["made"]["training"])) for name in three]
    assert pairs[1] < pairs[0]  # it has seen fewer pairs; both have batches of one
    synthetic = [result_of(name)["summary"]["dice"] for name in three]
    assert synthetic[2] < min(synthetic[:2])
    slices = [
        round(result_of(f"{name}_brain_2d")["summary"]["dice"], 3)
        for name in ("transmorph", "dense_unet_eca", "vxm_diff")
    ]
    assert slices[0] < min(slices[1:])  # the transformer is behind
    success = result_of("rigid_resnet34_2d_wide")["summary"]["success"]
    assert success < 50  # no last answer
