"""The lecturer's pages: a plan fills its lecture, a sheet has ten points, an answer is folded."""

import json
import re
from pathlib import Path

import pytest
import regkit_teaching as teaching
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "book" / "teaching"
LECTURES = sorted(FOLDER.glob("lecture_*.md"))
PARTS = ("Aims", "Plan", "On the board", "Questions students ask")


def sections(path: Path) -> dict[str, str]:
    """The sections of a page, by their titles."""
    _, *parts = re.split(r"^## (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2]))


def rows(text: str) -> list[list[str]]:
    """The cells of the rows of the tables in a text, without heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [k for k, row in enumerate(cells) if all(set(c) <= set("-: ") for c in row)]
    return [row for k, row in enumerate(cells) if k not in rules and k + 1 not in rules]


def test_there_are_twelve_lectures_and_the_overview_links_each():
    assert [path.stem for path in LECTURES] == [f"lecture_{k:02d}" for k in range(1, 13)]
    overview = (FOLDER / "lectures.md").read_text(encoding="utf-8")
    for path in LECTURES:
        title = path.read_text(encoding="utf-8").splitlines()[0].partition(": ")[2]
        assert f"{{doc}}`{title} <{path.stem}>`" in overview


@pytest.mark.parametrize("path", LECTURES, ids=lambda path: path.stem)
def test_a_plan_fills_ninety_minutes(path):
    found = sections(path)
    assert all(part in found for part in PARTS)
    minutes = [int(row[0]) for row in rows(found["Plan"])]
    assert sum(minutes) == 90
    assert len(re.findall(r'^\*\*"', found["Questions students ask"], re.MULTILINE)) >= 3
    assert "```text" in found["On the board"]


@pytest.mark.parametrize("number", range(1, 11))
def test_a_sheet_of_homework_has_ten_points_and_says_how_to_mark(number):
    path = LECTURES[number - 1]
    table = rows(sections(path)[f"Homework {number} (10 points)"])
    assert sum(int(row[1]) for row in table) == 10
    assert all(len(row) == 4 and row[2] and row[3] for row in table)


def test_the_exam_bank_has_a_folded_answer_for_each_of_its_points():
    text = (FOLDER / "exam.md").read_text(encoding="utf-8")
    asked = re.findall(r"^\*\*(\d\d\.\d+)\*\* \((\d) points?\) \S", text, re.MULTILINE)
    solved = re.findall(
        r"^:::\{admonition\} Solution to (\d\d\.\d+)\n:class: dropdown\n\S", text, re.MULTILINE
    )
    assert len(asked) >= 40 and len({name for name, _ in asked}) == len(asked)
    assert solved == [name for name, _ in asked]
    chapters = sorted(path.name[:2] for path in (ROOT / "notebooks").glob("[0-9]*.md"))
    counts = [len([name for name, _ in asked if name[:2] == chapter]) for chapter in chapters]
    assert sum(counts) == len(asked) and min(counts) >= 4
    points = sum(int(p) for _, p in asked)
    assert text.splitlines()[2].startswith(f"{len(asked)} questions, {points} points")


def test_the_parts_of_the_course_grade_to_a_hundred():
    graded = rows(sections(FOLDER / "lectures.md")["How the course is graded"])
    assert sum(int(row[1]) for row in graded) == 100
    project = sections(FOLDER / "project.md")
    assert sum(int(row[2]) for row in rows(project["Milestones"])) == 40
    assert 4 * len(rows(project["Rubric of the report (20 points)"])) == 20
    assert 2 * len(rows(project["Rubric of the talk (8 points)"])) == 8


def test_every_deck_and_slide_that_a_page_names_exists():
    paths = (ROOT / "book" / "slides").glob("[0-9][0-9].md")
    sizes = {path.stem: len(re.findall(r"(?m)^#{1,2} ", path.read_text("utf-8"))) for path in paths}
    for path in FOLDER.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        named = re.findall(r'href="\.\./\.\./slides/(\d\d)/', text)
        assert set(named) <= sizes.keys(), path.name
        for first, last in re.findall(r"slides? (\d+)(?: (?:to|and) (\d+))?", text):
            assert 0 < int(first) <= int(last or first) <= sizes[named[0]], path.name


def test_every_exercise_and_page_that_a_page_refers_to_exists():
    chapters = [path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").glob("*.md")]
    labels = set(re.findall(r"(?m)^:label: (\S+)$", "".join(chapters)))
    for path in FOLDER.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"\{ref\}`([^`]+)`", text)) <= labels, path.name
        for target in re.findall(r"\{doc\}`(?:[^`<]+<)?([^`>]+)>?`", text):
            assert (FOLDER / f"{target}.md").is_file(), f"{path.name}: {target}"


def test_a_measured_time_is_that_of_the_notebook():
    (path,) = (ROOT / "notebooks").glob("03_*.ipynb")
    seconds = json.loads(path.read_text(encoding="utf-8"))["metadata"]["regkit"]["seconds"]
    assert teaching.measured("03") == teaching.spoken(seconds)
    assert [teaching.spoken(s) for s in (18, 89, 90, 756)] == [
        "18 seconds",
        "89 seconds",
        "2 minutes",
        "13 minutes",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [("77", "names chapter '77'"), ("01 ch01-none .1f", "asks chapter 01 for 'ch01-none'")],
)
def test_a_measured_number_that_does_not_exist_is_an_error(text, said):
    with pytest.raises(ValueError, match=said):
        teaching.measured(text)


def test_a_measured_number_is_what_the_run_has_handed_to_the_prose():
    value = float(teaching.measured("01 ch01-dice-before .4f"))
    assert 0 < value < 1


def test_the_lecturers_part_is_a_part_of_its_own():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    (part,) = [p for p in toc["parts"] if p["caption"] == "For lecturers"]
    listed = [page["file"] for page in part["chapters"]]
    listed += [page["file"] for c in part["chapters"] for page in c.get("sections", [])]
    assert sorted(listed) == sorted(f"book/teaching/{p.stem}" for p in FOLDER.glob("*.md"))


def test_the_page_of_features_says_yes_and_names_files_that_are_there():
    text = (FOLDER / "what_is_there.md").read_text(encoding="utf-8")
    table = rows(text)
    assert len(table) >= 13 and all(row[1].startswith("yes") for row in table)
    for row in table:
        evidence = re.findall(r"`(tests/[\w/]+\.py)`", row[3])
        assert evidence and all((ROOT / name).is_file() for name in evidence), row
        for name in re.findall(r"`((?:regkit|book)/\w+)`", row[2]):
            assert (ROOT / name).is_dir(), name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"(?m)^{target}:", makefile), target


def test_what_a_chapter_holds_is_counted():
    """Beside another count, from the files themselves."""
    found = {row.number: row for row in teaching.what_chapters_hold(ROOT)}
    notebooks = sorted((ROOT / "notebooks").glob("[0-9]*.md"))
    assert sorted(found) == [path.name[:2] for path in notebooks]
    for path in notebooks:
        row, text = found[path.name[:2]], path.read_text(encoding="utf-8")
        checks = re.findall(r'(?m)^check\("\d\d-(\d+)"', text)
        assert row.exercises == len(set(checks)) and row.mistakes >= 3 * row.exercises
        bank = ROOT / "regkit" / "book" / "quizzes" / f"{row.number}.toml"
        items = bank.read_text(encoding="utf-8").count("[[item]]") if bank.is_file() else 0
        assert row.questions == items
        assert 3 <= row.aims <= 10 and row.minutes > 5 and row.seconds > 5
        assert row.views >= 1, f"chapter {row.number} has nothing to look at by hand"
    assert found["01"].views == 2  # its figure by `widgets.amplitude` does not move
    table = teaching.table_of(list(found.values()))
    assert len(table) == 2 + len(found) + 1 and len({line.count("|") for line in table}) == 1
    exercises = sum(row.exercises for row in found.values())
    assert table[-1].split("|")[5].strip() == str(exercises)
