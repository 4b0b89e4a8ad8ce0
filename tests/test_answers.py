"""What checks a reader's answers: stubs are open, references right, and each mistake gets its hint.

That the worked solutions of the chapters are right is asserted in test_book.py, where they run.
"""

import ast
import re
from itertools import combinations

import numpy as np
import pytest
import torch

import notebooks as tool
from regkit import book
from regkit.book.exercise import OPEN, Exercise, Mistake
from regkit.book.exercises import EXERCISES

every_exercise = pytest.mark.parametrize("name", EXERCISES)
CHAPTERS = [md for md in tool.select(None) if f"{md.stem[:2]}-1" in EXERCISES]
every_chapter = pytest.mark.parametrize("md", CHAPTERS, ids=lambda md: md.stem)


def handed_over(exercise: Exercise, maker):
    """What a reader hands over: the function, or the value that it makes."""
    return maker if exercise.inputs else maker()


# -------------------------------------------------------------------------------- every exercise


@every_exercise
def test_the_reference_is_right(name):
    exercise = EXERCISES[name]
    verdict = book.check(name, handed_over(exercise, exercise.reference))
    assert verdict and verdict.state == "right" and verdict.text.startswith("Right."), verdict


def forms(value) -> dict:
    """A value in other types and containers; a word, in capitals."""
    if isinstance(value, str):
        return {"capitals": value.upper()}
    x = torch.as_tensor(value, dtype=None if torch.is_tensor(value) else torch.float64)
    found = {"array": x.numpy(), "list": x.tolist()}
    if x.is_floating_point():
        found |= {"single": x.float(), "double": x.double()}
    return found


@every_exercise
def test_a_right_answer_is_right_in_any_type_and_container(name):
    exercise = EXERCISES[name]
    torch.manual_seed(0)
    arguments = exercise.inputs()[0] if exercise.inputs else ()
    for form in forms(exercise.reference(*arguments)):

        def answer(*given, form=form):
            return forms(exercise.reference(*given))[form]

        assert book.check(name, handed_over(exercise, answer)), form


@every_exercise
def test_each_mistake_is_recognised_and_gets_its_own_hint(name):
    exercise = EXERCISES[name]
    assert len(exercise.mistakes) >= 3
    for mistake in exercise.mistakes:
        verdict = book.check(name, handed_over(exercise, mistake.answer))
        assert not verdict and verdict.state == "wrong"
        assert (verdict.mistake, verdict.text) == (mistake.name, mistake.hint)
    assert len({m.hint for m in exercise.mistakes}) == len(exercise.mistakes)
    assert len({m.name for m in exercise.mistakes}) == len(exercise.mistakes)
    for mistake in exercise.mistakes:
        assert 30 < len(mistake.hint) < 260 and mistake.hint[-1] in ".?"


@every_exercise
def test_no_two_mistakes_are_alike(name):
    """Of two alike the second would never be named."""
    exercise = EXERCISES[name]
    torch.manual_seed(0)
    calls = exercise.inputs and exercise.inputs()
    makers = {"right": exercise.reference} | {m.name: m.answer for m in exercise.mistakes}
    values = {
        which: exercise._compared(exercise._known(maker, calls)) for which, maker in makers.items()
    }
    for (a, these), (b, those) in combinations(values.items(), 2):
        assert not all(map(exercise._same, these, those)), f"{a} and {b}"


@every_exercise
def test_nothing_handed_over_is_not_answered_yet(name):
    def raises(*arguments):
        raise NotImplementedError

    stubs = [None, ...]
    if EXERCISES[name].inputs:
        stubs += [lambda *given: None, lambda *given: ..., raises]
    for stub in stubs:
        verdict = book.check(name, stub)
        assert (verdict.state, verdict.text) == ("open", OPEN) and not verdict


@every_exercise
def test_what_is_no_answer_is_refused_in_a_sentence(name):
    exercise = EXERCISES[name]
    nonsense = [
        "text",
        {"a": 1},
        object(),
        1 + 2j,
        torch.full((2, 2, 2), torch.nan),
        [],
        [[1], [2, 3]],
    ]
    if not exercise.inputs:
        nonsense.append(lambda: 1)
    for given in nonsense:
        answers = [given] + ([lambda *arguments, g=given: g] if exercise.inputs else [])
        for answer in answers:
            verdict = book.check(name, answer)
            assert verdict.state == "wrong" and verdict.mistake == "", answer
            assert 10 < len(verdict.text) < 300 and verdict.text.endswith("."), verdict.text


# ------------------------------------------------------------------------------------- chapters


def stubs(md) -> list:
    return [cell for cell in tool.code_cells(tool.read_text(md)) if tool.is_stub(cell)]


@every_chapter
def test_each_exercise_has_a_hint_a_stub_and_a_solution_that_ask_for_the_same(md):
    text = md.read_text(encoding="utf-8").partition("## Exercises")[2]
    labels = re.findall(r"^`{4}\{exercise\} .*\n:label: (\S+)", text, re.MULTILINE)
    assert len(labels) >= 5
    assert len(labels) == sum(name.startswith(f"{md.stem[:2]}-") for name in EXERCISES)
    for number, (label, part) in enumerate(
        zip(labels, re.split(r"^`{4}\{exercise\} ", text, flags=re.MULTILINE)[1:]), 1
    ):
        call = rf'^check\("{md.stem[:2]}-{number}", .+\)$'
        question, folded = part.split("\n:::{hint}\n:class: dropdown\n")
        hint, rest = folded.split("\n:::\n", 1)
        assert "Hint" not in question and len(hint) > 40
        stub, solution = rest.split(f"````{{solution}} {label}\n")
        assert stub.count(":tags: [stub]") == 1 and len(re.findall(call, stub, re.M)) == 1
        assert len(re.findall(call, solution, re.M)) == 1 and ":class: dropdown" in solution


@every_chapter
def test_a_stub_runs_by_itself_and_says_that_nothing_is_answered(md):
    for number, cell in enumerate(stubs(md), 1):
        body = ast.parse(cell.source)
        last = ast.Expression(body.body.pop().value)
        names: dict = {}
        exec(compile(body, "stub", "exec"), names)
        verdict = eval(compile(last, "stub", "eval"), names)
        assert (verdict.exercise, verdict.state) == (f"{md.stem[:2]}-{number}", "open")


@every_chapter
def test_a_stub_takes_no_name_that_the_chapter_uses(md):
    taken: set[str] = set()
    used: set[str] = set()
    for cell in tool.code_cells(tool.read_text(md)):
        nodes = list(ast.walk(ast.parse(cell.source)))
        names = [n for n in nodes if isinstance(n, ast.Name)]
        if tool.is_stub(cell):
            taken |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
            taken |= {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
        else:
            used |= {n.id for n in names}
    assert taken & used == set()


# ----------------------------------------------------------------------------------- the checker


def test_a_name_that_does_not_exist_is_refused_with_the_nearest():
    text = "exercise is '01-99', expected one of 01-1, [^;]*, 01-6; did you mean '01-"
    with pytest.raises(ValueError, match=text):
        book.check("01-99", 1)
    for name in ("99-1", "", None, 3):
        with pytest.raises(ValueError, match="expected one of 00-1"):
            book.check(name, 1)


def test_a_verdict_is_a_sentence_in_a_terminal_and_in_a_notebook():
    verdict = book.check("01-1", None)
    assert repr(verdict) == f"01-1: {OPEN}"
    assert verdict._repr_markdown_() == f"**Exercise 1.1.** {OPEN}"


def values(asks: str, right, **options) -> Exercise:
    """An exercise whose right answer is `right`."""
    return Exercise(asks, lambda: right, (), **options)


def said(exercise: Exercise, answer) -> str:
    return exercise.judge("01-1", answer).text


FIELD = torch.arange(24.0).reshape(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (FIELD, "Right."),
        (FIELD.double().requires_grad_(), "Right."),
        (FIELD.numpy(), "Right. It is a ndarray where a tensor is asked: `torch.from_numpy` makes"),
        (FIELD.tolist(), "Right. It is a list where a tensor is asked: `torch.tensor` makes"),
        (FIELD.long(), "Right."),
        (FIELD[0], "The answer has shape (2, 3, 4), expected (1, 2, 3, 4). Only axes of length 1"),
        (FIELD.mT, "The answer has shape (1, 2, 4, 3), expected (1, 2, 3, 4). The axes are in an"),
        (FIELD[..., :2], "The answer has shape (1, 2, 3, 2), expected (1, 2, 3, 4)."),
        (FIELD / 0, "The answer holds NaN (not a number)."),
        ((FIELD + 1) / 0, "The answer holds infinite numbers."),
        (-FIELD, "Every number has the wrong sign."),
        (FIELD.flip(1), "The components are in the opposite order"),
        (
            FIELD.where(FIELD > 4, 7.0),
            "Not right, and it is no mistake that this exercise knows. 5",
        ),
        (3.0, "The answer has shape (), expected (1, 2, 3, 4)."),
        (torch.ones(3, dtype=torch.complex64), "The answer holds complex numbers, expected real"),
        (FIELD.to_sparse(), "Right."),
        (np.array(["a"]), "The answer is a ndarray, expected a tensor."),
        (torch.relu, "The answer is a function: call it"),
    ],
)
def test_what_goes_wrong_everywhere_with_a_tensor(answer, text):
    assert said(values("tensor", FIELD), answer).startswith(text)


def test_labels_keep_their_type():
    labels = torch.tensor([[0, 3, 7]])
    assert said(values("tensor", labels), labels.short()) == "Right."
    text = "The values are right, but their type is torch.float32, expected whole numbers."
    assert said(values("tensor", labels), labels.float()) == text


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (2.0, "Right."),
        (torch.tensor([2.0]), "Right."),
        (np.float32(2), "Right."),
        (2.001, "Right."),
        (2.1, "Not right, and it is no mistake that this exercise knows. It is too large."),
        (1, "Not right, and it is no mistake that this exercise knows. It is too small."),
        (-2, "Every number has the wrong sign."),
        (float("nan"), "The answer holds NaN (not a number)."),
        ([1, 2], "The answer holds 2 numbers, expected one."),
        ("2", "The answer is a str, expected a number."),
        (True, "The answer is a bool, expected a number."),
    ],
)
def test_what_goes_wrong_everywhere_with_a_number(answer, text):
    assert said(values("number", 2), answer) == text


def test_a_few_numbers_come_in_any_container():
    exercise = values("numbers", (1, 0.5))
    for answer in ((1, 0.5), [torch.tensor(1.0), np.float64(0.5)], np.array([[1, 0.5]])):
        assert said(exercise, answer) == "Right."
    assert said(values("numbers", (1, 2)), torch.tensor([1.0, 2.0])) == "Right."
    assert said(exercise, 1.0) == "The answer has shape (1,), expected (2,)."
    assert said(exercise, (1, ...)) == OPEN


def test_a_word_is_one_of_those_that_are_known():
    exercise = Exercise("choice", lambda: "fixed", (Mistake("m", lambda: "moving", "No."),))
    assert said(exercise, " Fixed ") == "Right."
    assert said(exercise, "moving") == "No."
    assert said(exercise, "both") == 'The answer is "both", expected one of "fixed", "moving".'
    assert said(exercise, 3) == "The answer is an int, expected a word in quotation marks."


def doubled(**options) -> Exercise:
    inputs = options.pop("inputs", lambda: [(torch.ones(2),), (torch.arange(2.0),)])
    return Exercise("tensor", lambda x: 2 * x, (), inputs=inputs, **options)


def test_a_function_is_called_with_arguments_of_the_exercise():
    def spoils(x):
        x *= 2
        return x

    assert said(doubled(), lambda x: x + x) == "Right."
    assert said(doubled(), spoils) == "Right."  # it got a copy
    assert said(doubled(), lambda x: 2 * x.ceil()) == "Right."
    assert said(doubled(), lambda x: 2 * torch.ones(2)).endswith("1 of 4 numbers are off.")
    text = "The answer is a Tensor: hand over the function itself, and do not call it."
    assert said(doubled(), torch.ones(2)) == text
    assert said(doubled(), lambda x: x.nothing).startswith("The function stops with AttributeError")
    assert said(doubled(), lambda: 1).startswith("The function stops with TypeError: ")
    assert said(doubled(), lambda x: abs).startswith("The function returns a function")


def test_a_function_may_ask_for_a_slope():
    def slope(x):
        x.requires_grad_()
        x.square().sum().backward()
        return x.grad

    assert said(doubled(), slope) == "Right."
    assert said(doubled(), lambda x: 2 * x.requires_grad_()) == "Right."


def test_a_measure_compares_what_is_asked_of_a_free_answer():
    exercise = values("tensor", torch.tensor([1.0, 2.0]), measure=lambda x: x.sum() > 2)
    assert said(exercise, torch.tensor([5.0, 6.0])) == "Right."
    assert said(exercise, torch.tensor([0.0, 1.0])).startswith("Not right")
    assert said(exercise, torch.tensor([5.0])) == "The answer has shape (1,), expected (2,)."
    assert said(exercise, torch.tensor([5.0, torch.nan])) == "The answer holds NaN (not a number)."


def test_a_check_leaves_the_random_numbers_of_the_chapter_alone():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    book.check("01-5", lambda disp: disp + torch.rand(1))
    assert torch.equal(torch.rand(2), wanted)


def test_a_mistake_that_gives_nan_is_recognised():
    mistake = Mistake("m", lambda: torch.tensor([torch.nan, 1.0]), "Overflow.")
    exercise = Exercise("tensor", lambda: torch.ones(2), (mistake,))
    assert said(exercise, torch.tensor([torch.nan, 1.0])) == "Overflow."


def test_a_remark_is_said_beside_right():
    assert said(values("number", 1, remark="The rest is yours."), 1) == "Right. The rest is yours."
