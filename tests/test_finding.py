"""Pages to find things by: equations and tables of the papers, the glossary, what people type."""

import importlib
import re
import sys
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import typer
import yaml
from mdit_py_plugins.anchors.index import slugify

import regkit
from regkit import checks, cli, io, losses, models, spatial
from regkit.papers import TABLES
from regkit.registration import FILES
from regkit.transform import Grid, Transform

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
# Directives whose body is prose that a reader reads. A solution stays folded, and is not counted.
PROSE = {"admonition", "exercise", "figure", "hint", "important", "note", "only", "tip", "warning"}
FENCE = re.compile(r" {0,3}(?P<mark>`{3,}|:{3,}|~{3,})(?:\{(?P<name>[\w-]+)\})?")


def page(name: str) -> str:
    return (BOOK / f"{name}.md").read_text(encoding="utf-8")


def value_of(name: str):
    """The object with this full name; AttributeError or ImportError where there is none."""
    for cut in range(name.count("."), 0, -1):
        parts = name.split(".")
        try:
            found = importlib.import_module(".".join(parts[: cut + 1]))
        except ImportError:
            continue
        for part in parts[cut + 1 :]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


# -------------------------------------------------------------------------------- equations


def sections(text: str) -> dict[str, str]:
    """Heading of the second level -> what stands under it."""
    parts = re.split(r"(?m)^## (.+)$", text)
    return dict(zip(parts[1::2], parts[2::2]))


# How many equations and tables each paper numbers, counted in its text; Tan numbers none, and the
# five there are its formulas in order. Of Peng there is the abstract alone.
NUMBERED = {"Sun 2025": (9, 6), "Zheng 2023": (6, 1), "Hu 2024": (4, 0), "Tan 2023": (5, 0)}


@pytest.mark.parametrize("paper", NUMBERED)
def test_every_numbered_equation_and_table_has_its_line(paper):
    (text,) = [
        body for head, body in sections(page("equations")).items() if head.startswith(f"{paper}:")
    ]
    equations, tables = NUMBERED[paper]
    found = [int(n) for n in re.findall(r"(?m)^\| \((\d+)\) \|", text)]
    assert found == list(range(1, equations + 1))
    found = [int(n) for n in re.findall(r"(?m)^\| Table (\d+) \|", text)]
    assert found == list(range(1, tables + 1))


def test_a_line_names_a_function_or_says_why_there_is_none():
    lines = [line for line in page("equations").splitlines() if line.startswith(("| (", "| Table"))]
    assert len(lines) == sum(map(sum, NUMBERED.values()))
    for line in lines:
        number, _, function, place = (cell.strip() for cell in line.strip("|").split(" | "))
        assert re.search(r"`[\w.-]+`", function) or re.fullmatch(r"– \(.+\)", function), number
        assert "../notebooks/" in place, number


def test_every_function_and_table_named_there_exists():
    names = re.findall(r"`(regkit\.[\w.]+)`", page("equations"))
    assert len(names) > 30
    for name in names:
        value_of(name)
    tables = re.findall(r"`((?:sun|zheng|peng|tan|hu)\d{4}-\w+)`", page("equations"))
    assert len(tables) >= 8 and set(tables) <= set(TABLES)


def anchors(path: Path) -> set[str]:
    """Where a link into a page may lead: its headings, without those inside of code."""
    text = re.sub(r"(?ms)^(`{3,})\{?[\w-]*\}?.*?^\1$", "", path.read_text(encoding="utf-8"))
    return {slugify(head) for head in re.findall(r"(?m)^#{1,3} (.+)$", text)}


@pytest.mark.parametrize("name", ["equations", "what_people_type", "weights", "index"])
def test_every_place_that_is_named_exists(name):
    links = re.findall(r"\]\(([\w./]+\.md)(?:#([\w-]+))?\)", page(name))
    labels = re.findall(r"\{eq\}`([\w-]+)`", page(name))
    assert links or labels or name in ("weights", "index")
    for target, anchor in links:
        path = (BOOK / target).resolve()
        assert path.is_file(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"
    every = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").glob("*.md"))
    assert [label for label in labels if f"({label})" not in every] == []


# --------------------------------------------------------------------------------- glossary


@cache
def glossary() -> dict[str, list[str]]:
    """Term -> its other names, of which the first is Chinese."""
    body = re.search(r":::\{glossary\}\n(.*?)\n:::", page("glossary"), re.DOTALL)[1]
    blocks = re.split(r"\n\n(?=\S)", body)
    heads = [[x for x in block.splitlines() if not x.startswith(" ")] for block in blocks]
    assert all(block.splitlines()[len(head)].startswith("  ") for block, head in zip(blocks, heads))
    return {head[0]: head[1:] for head in heads}


def test_every_term_has_a_chinese_name():
    terms = glossary()
    assert len(terms) > 100 and list(terms) == sorted(terms, key=str.lower)
    for term, others in terms.items():
        assert len(others) == 1, term
        assert re.search(r"[\u4e00-\u9fff]", others[0]), term
        # beside Chinese characters only Latin letters of a name, digits, a percent sign
        assert re.fullmatch(r"[\u4e00-\u9fffA-Za-z0-9% ]+", others[0]), term
    names = [names[0] for names in terms.values()]
    assert len(set(names)) == len(names)


def test_the_words_that_the_chapters_use_are_there():
    asked = "ablation, Adam, attention, batch, bootstrap, ceiling, decoder, encoder, gap, "
    asked += "group normalisation, hook, learning rate, receptive field, recipe, skip connection, "
    asked += "token, U-Net"
    assert set(asked.split(", ")) <= set(glossary())


def prose(text: str) -> str:
    """What a reader reads of a page in MyST: no code, no formulas, no solutions, no options."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    kept: list[str] = []
    fences: list[tuple[str, bool]] = []  # its mark, and whether what it holds is read
    for line in text.splitlines():
        if fences and line.strip() == fences[-1][0]:
            fences.pop()
        elif fences and not fences[-1][1]:
            continue
        elif match := FENCE.match(line):
            fences.append((match["mark"], match["name"] in PROSE))
        elif not re.match(r"\s*:[\w-]+:|\([\w-]+\)=$", line):
            kept.append(line)
    return re.sub(r"\$\$.*?\$\$(\s*\([\w-]+\))?", "", "\n".join(kept), flags=re.DOTALL)


def test_a_story_has_no_code_no_formula_and_no_solution():
    page = """---
kernelspec: {name: python3}
---

One two three.
(eq-label)=

```{code-cell} ipython3
:tags: [hide-input]
no = "word of this counts"
```

$$ x = a word $$ (eq-09)

````{exercise} Not its title
:label: ex-09
Six seven.
````

````{solution} ex-09
Nothing of this.
```python
or = "this"
```
Nor this.
````

:::{figure} file.png
:alt: not this
Eight.
:::

Nine.
"""
    assert prose(page).split() == "One two three. Six seven. Eight. Nine.".split()


def told(text: str) -> list[str]:
    """The paragraphs of a chapter's story: no title, objectives, tables, summary, references."""
    text = re.sub(r"(?m)^\|.*$", "", text)
    text = re.sub(r"(?ms)^(:{3,}|`{3,})\{admonition\}.*?^\1$", "", text)
    parts = re.split(r"(?m)^(?=## )", prose(text))
    parts[0] = re.sub(r"(?m)^# .*$", "", parts[0])
    kept = [part for part in parts if not re.match("## (Summary|References)", part)]
    return [paragraph for part in kept for paragraph in re.split(r"\n\s*\n", part)]


def first_uses() -> dict[str, tuple[str, str]]:
    """Term -> the first chapter whose story has it, and the story up to that paragraph."""
    found = {}
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [page["file"] for part in toc["parts"] for page in part["chapters"]]
    patterns = {
        term: re.compile(rf"(?i)(?<![\w-]){term.replace(' ', chr(92) + 's+')}s?(?![\w-])")
        for term in glossary()
    }
    for file in (file for file in files if file.startswith("notebooks/")):
        before = ""
        for paragraph in told((ROOT / f"{file}.md").read_text(encoding="utf-8")):
            before = f"{before}\n\n{paragraph}"
            words = re.sub(
                r"\{(?!term)\w[\w:]*\}`[^`]*`|(?<!\{term\})`[^`{]*`|\]\([^)]*\)", "", paragraph
            )
            for term in [term for term, pattern in patterns.items() if pattern.search(words)]:
                found[term] = (file[10:12], before)
                del patterns[term]
    return found


def explained(term: str, text: str) -> bool:
    """Whether a text links a term to the glossary, stresses it, or has it in a heading."""
    text = re.sub(r"(?<!\n)\n(?![\n#])", " ", text)  # a paragraph on one line
    ways = rf"\{{term\}}`[^`]*{term}|\*(?=\S)[^*\n]*{term}[^*\n]*(?<=\S)\*|^##.*{term}"
    return bool(re.search(f"(?im){ways}", text))


# Terms that are everyday words as well, whose first use in the chapters is of that kind.
EVERYDAY = (
    "amplitude, cascade, contrast, deformation, engine, feature, gap, loss, MIND, population, "
    "registration, residual, transformer, value, warp, weights"
).split(", ")


def test_a_term_is_linked_or_explained_where_it_is_used_first():
    """By a link to the glossary or in italics, as the chapters write a word that they explain."""
    uses = first_uses()
    assert len(uses) > 80
    bare = {f"{place} {term}" for term, (place, text) in uses.items() if not explained(term, text)}
    assert {line for line in bare if line[3:] not in EVERYDAY} == set()


def test_an_unmarked_term_is_noticed():
    assert explained("fold", "Where it folds\n\nis a *fold*.") and explained("fold", "## A fold")
    assert explained("fold", "{term}`Folds <fold>`") and not explained(
        "fold", "It folds. *x* fold *y*"
    )


# ------------------------------------------------------------------------- what people type


def blocks(language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", page("what_people_type"))


def commands(text: str) -> list[list[str]]:
    """The words of each call of regkit in the bash blocks of a page."""
    found = re.findall(r"(?ms)^```bash\n(.*?)^```$", text)
    lines = "".join(found).replace("\\\n", " ").splitlines()
    lines = [line.split("  #")[0].split() for line in lines]
    return [line[1:] for line in lines if line and line[0].rsplit("/", 1)[-1] == "regkit"]


def parse(words: list[str]) -> None:
    """Ask the command line whether it takes these words; nothing is run."""
    command = typer.main.get_command(cli.app)
    context = command.make_context("regkit", list(words), resilient_parsing=True)
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, list(words), parent=context)


PAGES = {
    "what_people_type": page("what_people_type"),
    "weights": page("weights"),
    "how_to_use": page("how_to_use"),
    "README": (ROOT / "README.md").read_text(encoding="utf-8"),
}


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_one_that_the_command_line_takes(name):
    found = commands(PAGES[name])
    assert len(found) >= 2
    for words in found:
        parse(words)


def test_a_command_with_a_wrong_option_is_noticed():
    with pytest.raises(Exception, match="No such option"):
        parse("register a.nii b.nii -o out --methods syn".split())


def test_every_file_of_a_result_is_explained():
    table = re.findall(
        r"(?m)^\| `([\w.]+\.(?:nii\.gz|png|html|json))` \| ", page("what_people_type")
    )
    assert table == list(FILES)


def test_every_extra_is_explained():
    extras = re.findall(r"(?m)^\| `(\w+)` \| ", page("what_people_type"))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"(?s)optional-dependencies\]\n(.*?)\n\[", text)[1]
    assert extras == re.findall(r"(?m)^(\w+) = ", listed)


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[-1][:40])
def test_every_block_of_python_runs(code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "what_people_type", "exec"), {})


def test_the_losses_say_what_the_page_says_of_their_sign():
    x = torch.rand(1, 1, 24, 24)
    for loss in (losses.ncc, losses.lncc, losses.mse):
        assert loss(x, x).abs() < 1e-6
    assert losses.mutual_information(x, x) < 0
    flat = torch.zeros(1, 1, 24, 24)
    assert losses.lncc(flat, flat) == 0
    scan = 3000 * x - 1000
    assert 0 <= losses.lncc(scan, 2 * scan + 500) < 1e-3


@pytest.mark.slow
def test_one_call_gives_one_answer_on_one_machine():
    fixed = np.random.default_rng(0).random((40, 48))
    first, second = (regkit.register(np.roll(fixed, 2, 0), fixed, "rigid").disp for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.slow
def test_points_go_from_fixed_to_moving():
    fixed = np.zeros((40, 48))
    fixed[15:22, 18:30] = np.random.default_rng(0).random((7, 12)) + 1
    result = regkit.register(np.roll(fixed, 2, axis=0), fixed, "rigid")
    there = np.asarray(result.transform.points([[20.0, 24.0]], unit="voxel"))
    assert np.abs(there - [[22.0, 24.0]]).max() < 0.3
    back = np.asarray(result.transform.points([[22.0, 24.0]], start="moving", unit="voxel"))
    assert np.abs(back - [[20.0, 24.0]]).max() < 0.3


def said(function, *arguments, **options) -> str:
    """The sentence with which a call ends."""
    with pytest.raises((ValueError, FileNotFoundError, ImportError)) as caught:
        function(*arguments, **options)
    return str(caught.value)


def shift_of(voxels: float) -> Transform:
    grid = Grid((20, 22), np.eye(4))
    return Transform(grid, grid, np.eye(4), torch.full((1, 2, 20, 22), voxels))


def sentences(folder: Path, monkeypatch) -> set[str]:
    """Each error and warning of the page, as regkit says it."""
    good, other = (
        np.random.default_rng(0).random((20, 22)),
        np.random.default_rng(1).random((20, 23)),
    )
    bad = good.copy()
    bad[3, 4] = np.nan
    (folder / "bad.nii").write_text("not an image")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setitem(sys.modules, "ants", None)
    scan = nibabel.Nifti1Image(good[..., None], np.eye(4))
    far = np.eye(4)
    far[:3, 3] = 500
    labels = nibabel.Nifti1Image(np.ones((20, 22, 1), np.int16), np.diag([2, 2, 2, 1]))
    image, away = io.as_image(scan), io.as_image(nibabel.Nifti1Image(good[..., None], far))
    nibabel.save(scan, folder / "image.nii")
    io.write_transform(shift_of(0.0), folder / "disp.nii.gz")
    nibabel.save(nibabel.Nifti1Image(good[..., None], far), folder / "away.nii")
    network = models.create("vxm", ndim=2)
    worse = {"folding_percent": 2.0, "lncc": {"before": 0.5, "after": 0.3}}
    fine = {"folding_percent": 0.0, "lncc": {"before": 0.5, "after": 0.6}}
    one = models.load("vxm_diff_brain_2d")
    ramp = torch.linspace(0.1, 1, 96)[None, None, :, None].expand(1, 1, 96, 80)
    apply = [str(folder / "away.nii"), str(folder / "disp.nii.gz"), "-o", str(folder / "x.nii")]
    return {
        said(regkit.register, other, good),
        said(regkit.register, np.ones((20, 22, 24)), good),
        said(regkit.register, bad, good),
        said(regkit.register, folder / "nowhere.nii", good),
        said(regkit.register, folder / "bad.nii", good),
        said(regkit.register, good, good, effort="high"),
        said(regkit.register, good, good, device="cuda"),
        said(regkit.register, scan, scan, "rigid", moving_labels=labels, fixed_labels=labels),
        said(regkit.classical.ants.load),
        said(spatial.warp, torch.ones(1, 1, 20, 24, dtype=int), torch.zeros(1, 2, 20, 24)),
        said(network, torch.rand(1, 1, 20, 24), torch.rand(1, 1, 20, 22)),
        said(typer.main.get_command(cli.app).commands["apply"].main, apply, standalone_mode=False),
        cli._sentence(MemoryError())[1],
        *checks.against_answer(shift_of(0.0), worse),
        *checks.against_answer(shift_of(99.0), fine),
        *checks.against_pair(image, away, None),
        *checks.against_contrast(one, ramp, 1.1 - ramp, True),
        checks.against_trust(0.05)[0],
    }


def test_every_error_and_warning_of_the_page_is_what_regkit_says(tmp_path, monkeypatch):
    written = {line for block in blocks("text") for line in block.splitlines()}
    assert len(written) > 15
    assert written == sentences(tmp_path, monkeypatch)
