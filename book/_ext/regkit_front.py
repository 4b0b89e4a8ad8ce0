"""The front door of the book: the buttons and the path of the index, and the cards of weights.

    ```{front-buttons}
    ```

three buttons: read the first chapter; run it in Colab, only where the project is on GitHub;
register two scans of one's own.

    ```{chapter-minutes}
    03 = a U-Net that predicts the displacement {cite:t}`balakrishnan2019`
    ```

a table of the chapters in _toc.yml, with the minutes that each takes: reading, as
book/tools/reading.py counts it, and running, as measured when its outputs were made. A line of the
body says what a chapter is about. A line whose chapter is not in _toc.yml is left out.

    ```{weights-card} vxm_diff_brain_3d
    ```

how shipped weights were made, from what the weights themselves say (results/NAME.json holds it, and
tests/test_results.py compares the two).
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from address import Address, found  # noqa: E402
from measured import Words  # noqa: E402
from reading import of as reading_of  # noqa: E402

from notebooks import COLAB, read_text  # noqa: E402

# the chapters and their minutes ------------------------------------------------------------------


@dataclass(frozen=True)
class Chapter:
    """A chapter in _toc.yml: its page, its number and title, and the minutes that it takes."""

    page: str
    number: str
    title: str
    reading: float
    running: float


def chapters(root: Path) -> list[Chapter]:
    """All chapters that _toc.yml lists, in its order.

    Raises:
        ValueError: a chapter without a title such as "# 03 VoxelMorph", or without a measured time.
    """
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    pages = [page for part in toc["parts"] for page in part["chapters"]]
    pages += [section for page in pages for section in page.get("sections", [])]
    names = [page["file"] for page in pages if page["file"].startswith("notebooks/")]
    return [_chapter(root, name) for name in names]


def _chapter(root: Path, page: str) -> Chapter:
    path = root / f"{page}.md"
    text = path.read_text(encoding="utf-8")
    notebook = json.loads((root / f"{page}.ipynb").read_text(encoding="utf-8"))
    title = re.search(r"(?m)^# (\d\d) (.+)$", text)
    seconds = notebook["metadata"].get("regkit", {}).get("seconds")
    if title is None or seconds is None:
        wanted = "a title such as '# 03 VoxelMorph' and a measured time in its notebook"
        raise ValueError(f"{page} has {title and title[0]!r} and {seconds!r} s, expected {wanted}.")
    return Chapter(page, title[1], title[2], reading_of(read_text(path)).minutes, seconds / 60)


def path_table(found: list[Chapter], about: dict[str, str]) -> list[str]:
    """The lines of a Markdown table: a row a chapter, the sum last.

    Args:
        found: the chapters.
        about: number of a chapter -> what it is about.
    """
    rows = [
        f"| {c.number} | {{doc}}`{c.title} </{c.page}>` | {about.get(c.number, '')} "
        f"| {round(c.reading)} | {max(1, round(c.running))} |"
        for c in found
    ]
    reading, running = sum(c.reading for c in found), sum(c.running for c in found)
    return [
        "| | Chapter | What it is about | Reading, min | Running, min |",
        "|---|---|---|---:|---:|",
        *rows,
        f"| | together | | {round(reading)} | {round(running)} |",
    ]


class ChapterMinutes(SphinxDirective):
    """The table of `path_table`; each line of the body is "NUMBER = what it is about"."""

    has_content = True

    def run(self):
        root = Path(self.env.srcdir)
        about = dict(re.split(r"\s+=\s+", line, maxsplit=1) for line in self.content if line)
        try:
            known = chapters(root)
        except ValueError as error:
            raise self.error(f"{error}") from error
        for chapter in known:
            self.env.note_dependency(str(root / f"{chapter.page}.md"))
            self.env.note_dependency(str(root / f"{chapter.page}.ipynb"))
        self.env.note_dependency(str(root / "_toc.yml"))
        return markdown(self, path_table(known, about))


def markdown(directive: SphinxDirective, lines: list[str]) -> list[nodes.Node]:
    """The nodes of these lines of Markdown."""
    holder = nodes.Element()
    directive.state.nested_parse(StringList(lines), directive.content_offset, holder)
    return holder.children


# buttons -----------------------------------------------------------------------------------------


def colab_link(address: Address | None, page: str, branch: str = "") -> str | None:
    """Where Colab opens the notebook of a page; None where it cannot."""
    if address is None or not address.on_github:
        return None
    repository = address.repository.removeprefix("https://github.com")
    return f"{COLAB}{repository}/blob/{branch or address.ref}/{page}.ipynb"


class FrontButtons(SphinxDirective):
    """Read, run in Colab, register two scans."""

    def run(self):
        root = Path(self.env.srcdir)
        first = chapters(root)[0].page
        branch = os.environ.get("REGKIT_NOTEBOOKS_BRANCH", "")
        colab = colab_link(found(root), first, branch)
        links = [
            f"[Read the first chapter](/{first}.md)",
            *([f"[Run it in Colab]({colab})"] if colab else []),
            "[Register your scans](/book/how_to_use.md#register-two-scans-of-your-own)",
        ]
        box = nodes.container(classes=["front-buttons"])
        box += markdown(self, [" ".join(links)])
        return [box]


# weights -----------------------------------------------------------------------------------------


def chain(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The trainings behind weights, the first one first."""
    earlier = training.get("started_from")
    return [*(chain(earlier) if earlier else []), training]


def updates(training: dict[str, Any]) -> list[int]:
    """How many updates of each training the weights have gone through."""
    return [run["step"] for run in chain(training)]


def card(name: str, result: dict[str, Any], size: int) -> list[str]:
    """The lines of a card, as a list in Markdown.

    Args:
        name: of the weights.
        result: what results/<name>.json holds.
        size: of the weights' file, in bytes.
    """
    words, made = Words(), result["made"]
    runs = chain(made["training"])
    last, recipe = runs[-1], runs[-1]["recipe"]
    seen = [run["step"] * run["recipe"]["batch"] for run in runs]
    steps = " + ".join(f"{n:,}" for n in updates(made["training"]))
    spacing = words.format_field([f"{side:.2g}" for side in last["spacing"]], "")
    shape = words.format_field(recipe["shape"], "")
    options = ", ".join(f"`{key}={value}`" for key, value in recipe["options"].items())
    terms = ", ".join(f"{key} {weight:g}" for key, weight in recipe["weights"].items())
    return [
        f"- **Network**: `{recipe['model']}` in {recipe['ndim']}D"
        + (f", with {options}" if options else "")
        + f". Source: {recipe['source']}.",
        f"- **Data**: {_data(recipe)}, {shape} voxels of {spacing} mm; {recipe['validation']} more "
        "subjects to watch the training with.",
        f"- **Updates**: {steps}, of {_few([run['recipe']['batch'] for run in runs])}: "
        f"{sum(seen):,} pairs in all, in {_precision(runs)}.",
        f"- **Objective**: {recipe['similarity']}, and weights {terms}.",
        f"- **File**: `{name}.safetensors`, {words.format_field(size, 'bytes')}.",
        f"- **Measured by**: `{made['command']}`, {made['threads']} "
        f"thread{'s' * (made['threads'] > 1)}, on {made['date']}, device: {made['device']}.",
    ]


def _data(recipe: dict[str, Any]) -> str:
    """What a training drew its pairs from."""
    kind = "heads" if recipe["ndim"] == 3 else "axial slices of heads"
    text = f"{recipe['subjects']} synthetic {kind}"
    if recipe.get("painted"):
        return f"{text}, their label maps painted in random contrasts"
    motion = recipe.get("motion")
    names = dict.fromkeys(motion["contrasts"] if motion else [recipe["contrast"]])
    text += " in " + ", ".join(name if name == "random" else name.upper() for name in names)
    if motion:
        text += f", moved by up to {motion['angle']:g}° and {motion['shift']:g} mm"
    return text


def _few(batches: list[int]) -> str:
    """The batch of each training, said once if they agree."""
    agreed = dict.fromkeys(batches)
    return " and ".join(f"{n} pair{'s' * (n > 1)}" for n in agreed)


def _precision(runs: list[dict[str, Any]]) -> str:
    """In which precision the networks ran."""
    names = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
    return " and ".join(dict.fromkeys(names[run["recipe"]["precision"]] for run in runs))


class WeightsCard(SphinxDirective):
    """How the named weights were made."""

    required_arguments = 1

    def run(self):
        root, name = Path(self.env.srcdir), self.arguments[0]
        result = root / "results" / f"{name}.json"
        file = root / "regkit" / "weights" / f"{name}.safetensors"
        for path in (result, file):
            if not path.is_file():
                raise self.error(f"weights-card is {name!r}, expected a name of shipped weights.")
            self.env.note_dependency(str(path))
        held = json.loads(result.read_text(encoding="utf-8"))
        return markdown(self, card(name, held, file.stat().st_size))


def setup(app):
    app.add_directive("front-buttons", FrontButtons)
    app.add_directive("chapter-minutes", ChapterMinutes)
    app.add_directive("weights-card", WeightsCard)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
