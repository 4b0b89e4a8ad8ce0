"""One exercise: what is asked, what is right, which mistakes are known, what is said of an answer.

A mistake is written down as somebody would make it, as an answer of its own. An answer that is not
right is compared with each of them. What goes wrong everywhere, such as a wrong shape or a swapped
sign, is recognised for all exercises alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

Asked = Literal["number", "numbers", "tensor", "choice"]
State = Literal["right", "open", "wrong"]
Value = Tensor | str

OPEN = "Not answered yet: put your answer where the three dots are, and run the cell again."
UNKNOWN = "Not right, and it is no mistake that this exercise knows."


@dataclass(frozen=True, repr=False)
class Verdict:
    """What is said of an answer. It is true where the answer is right.

    exercise: its name, such as "02-3".
    state: "right", "open" (not answered yet) or "wrong".
    text: one or two sentences for the reader.
    mistake: the name of the mistake that was recognised, "" if none.
    """

    exercise: str
    state: State
    text: str
    mistake: str = ""

    def __bool__(self) -> bool:
        return self.state == "right"

    def __repr__(self) -> str:
        return f"{self.exercise}: {self.text}"

    def _repr_markdown_(self) -> str:
        chapter, _, number = self.exercise.partition("-")
        return f"**Exercise {int(chapter)}.{number}.** {self.text}"


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that people give.

    name: a few words.
    answer: makes the wrong answer; where a function is asked, it is the wrong function.
    hint: one or two sentences that help and do not give the answer away.
    """

    name: str
    answer: Callable[..., Any]
    hint: str


@dataclass(frozen=True)
class Exercise:
    """What is asked, and what is known of the answers.

    asks: "number"; "numbers", a few in a row; "tensor"; or "choice", one of some words.
    reference: makes the right answer; where a function is asked, it is the right function.
    mistakes: known wrong answers, no two of them alike.
    inputs: makes the arguments of each call where a function is asked, which returns what
        `asks` says; None where a value is asked.
    measure: what is compared of an answer that is free, such as "does it fold?"; of the
        reference and of mistakes as well. None: the answer itself.
    tolerance: two numbers a and b are alike if |a - b| is at most tolerance (1 + |b|).
    remark: what is said beside "Right.", for instance what was not checked.
    """

    asks: Asked
    reference: Callable[..., Any]
    mistakes: tuple[Mistake, ...]
    inputs: Callable[[], Sequence[tuple[Any, ...]]] | None = None
    measure: Callable[[Tensor], Any] | None = None
    tolerance: float = 1e-3
    remark: str = ""

    def judge(self, name: str, answer: Any) -> Verdict:
        """What to say of an answer to this exercise; nothing that a reader hands over raises.

        Args:
            name: of the exercise, such as "02-3".
            answer: anything.
        """
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            calls = None if self.inputs is None else self.inputs()
            try:
                return self._judged(name, answer, calls)
            except _Open:
                return Verdict(name, "open", OPEN)
            except _Refused as reason:
                return Verdict(name, "wrong", str(reason))

    def _judged(self, name: str, answer: Any, calls: Sequence[tuple[Any, ...]] | None) -> Verdict:
        given, comment = self._given(answer, calls)
        raw = self._known(self.reference, calls)
        expected = self._compared(raw)
        if self.measure is not None:
            _check_numbers(given, raw)
        measured = self._compared(given)
        if all(map(self._same, measured, expected)):
            if self.asks == "tensor":
                _check_integers(given, raw)
            return Verdict(name, "right", " ".join(filter(None, ("Right.", self.remark, comment))))
        for mistake in self.mistakes:
            known = self._compared(self._known(mistake.answer, calls))
            if all(map(self._same, measured, known)):
                return Verdict(name, "wrong", mistake.hint, mistake.name)
        _check_choice(given, self._choices() if self.asks == "choice" else [])
        _check_numbers(given, raw)
        self._diagnose(measured, expected)

    # --- answers as values

    def _given(
        self, answer: Any, calls: Sequence[tuple[Any, ...]] | None
    ) -> tuple[list[Value], str]:
        """The values of an answer, and a sentence about its type where that is not what was asked.

        Raises:
            _Open: it is a stub.
            _Refused: it is nothing that can be compared.
        """
        _check_answered(answer)
        if calls is None:
            if callable(answer):
                raise _Refused("The answer is a function: call it, and hand over what it returns.")
            found = [answer]
        else:
            if not callable(answer):
                raise _Refused(
                    f"The answer is {_kind(answer)}: hand over the function itself, and do not "
                    "call it."
                )
            found = [_called(answer, arguments) for arguments in calls]
        comment = _comment(found[0]) if self.asks == "tensor" else ""
        return [_value(x, self.asks) for x in found], comment

    def _known(
        self, maker: Callable[..., Any], calls: Sequence[tuple[Any, ...]] | None
    ) -> list[Value]:
        """The values of the reference or of a mistake."""
        found = [maker()] if calls is None else [maker(*_copied(c)) for c in calls]
        return [_value(x, self.asks) for x in found]

    def _compared(self, values: list[Value]) -> list[Value]:
        if self.measure is None:
            return values
        return [_value(self.measure(x), "numbers") if isinstance(x, Tensor) else x for x in values]

    def _same(self, a: Value, b: Value) -> bool:
        if isinstance(a, str) or isinstance(b, str):
            return a == b
        a, b, limit = a.double(), b.double(), self.tolerance
        return a.shape == b.shape and torch.allclose(a, b, limit, limit, equal_nan=True)

    def _choices(self) -> list[str]:
        return sorted(str(m()) for m in (self.reference, *(m.answer for m in self.mistakes)))

    # --- what goes wrong everywhere

    def _diagnose(self, given: list[Value], expected: list[Value]) -> NoReturn:
        """Say what is wrong with values of the right shape.

        Raises:
            _Refused: always.
        """
        pairs = [
            (a.double(), b.double())
            for a, b in zip(given, expected)
            if isinstance(a, Tensor) and isinstance(b, Tensor)
        ]
        if self.measure is not None:
            raise _Refused(UNKNOWN)
        if all(self._same(-a, b) for a, b in pairs):
            raise _Refused("Every number has the wrong sign.")
        if all(a.ndim > 2 and a.shape[1] in (2, 3) for a, _ in pairs) and all(
            self._same(a.flip(1), b) for a, b in pairs
        ):
            raise _Refused(
                "The components are in the opposite order: component i goes along array axis i."
            )
        if self.asks == "number":
            larger = {bool(a > b) for a, b in pairs if not self._same(a, b)}
            if len(larger) == 1:
                raise _Refused(f"{UNKNOWN} It is too {'large' if larger.pop() else 'small'}.")
            raise _Refused(f"{UNKNOWN} It is too large for some arguments, too small for others.")
        off = sum(
            int((~torch.isclose(a, b, self.tolerance, self.tolerance)).sum()) for a, b in pairs
        )
        raise _Refused(f"{UNKNOWN} {off} of {sum(a.numel() for a, _ in pairs)} numbers are off.")


class _Open(Exception):
    """There is no answer yet."""


class _Refused(Exception):
    """The answer is wrong; the text says why."""


def _check_answered(answer: Any) -> None:
    if answer is None or isinstance(answer, EllipsisType) or answer is NotImplemented:
        raise _Open
    if isinstance(answer, NotImplementedError) or answer is NotImplementedError:
        raise _Open
    if isinstance(answer, list | tuple) and any(isinstance(x, EllipsisType) for x in answer):
        raise _Open


def _called(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        with torch.enable_grad():  # an answer may ask for a slope
            result = function(*_copied(arguments))
    except NotImplementedError:
        raise _Open from None
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        raise _Refused(
            f"The function stops with {type(error).__name__}{f': {said}' if said else ''}"
            f"{'' if said.endswith('.') else '.'}"
        ) from None
    if callable(result):
        raise _Refused("The function returns a function: call it, and return what that returns.")
    _check_answered(result)
    return result


def _copied(arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments that a function may change without harm."""
    return [x.clone() if isinstance(x, Tensor) else np.copy(x) if isinstance(x, np.ndarray) else x
            for x in arguments]  # fmt: skip


def _kind(answer: Any) -> str:
    name = type(answer).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _comment(answer: Any) -> str:
    """About a right answer in another container than a tensor."""
    if isinstance(answer, Tensor):
        return ""
    maker = "torch.from_numpy" if isinstance(answer, np.ndarray) else "torch.tensor"
    return f"It is {_kind(answer)} where a tensor is asked: `{maker}` makes one of it."


def _value(answer: Any, asked: Asked) -> Value:
    """An answer as a tensor on the CPU, or as a word.

    Raises:
        _Refused: it is something else.
    """
    if asked == "choice":
        if not isinstance(answer, str):
            raise _Refused(f"The answer is {_kind(answer)}, expected a word in quotation marks.")
        return answer.strip().lower()
    x = _tensor(answer, asked)
    if asked == "number":
        if x.numel() != 1:
            raise _Refused(f"The answer holds {x.numel()} numbers, expected one.")
        return x.reshape(())
    return x.flatten() if asked == "numbers" else x


def _tensor(answer: Any, asked: Asked) -> Tensor:
    wanted = {"number": "a number", "numbers": "numbers", "tensor": "a tensor"}[asked]
    wrong = _Refused(f"The answer is {_kind(answer)}, expected {wanted}.")
    if isinstance(answer, str | bytes | dict) or (asked == "number" and isinstance(answer, bool)):
        raise wrong
    if isinstance(answer, Tensor):
        x = answer.detach().cpu()
    else:
        parts = answer
        if isinstance(answer, list | tuple):
            parts = [p.detach().cpu().numpy() if isinstance(p, Tensor) else p for p in answer]
        try:
            x = torch.from_numpy(np.array(parts))
        except (TypeError, ValueError):  # of objects, or of unlike lengths
            raise wrong from None
    if x.is_complex():
        raise _Refused("The answer holds complex numbers, expected real ones.")
    return x.to_dense()


def _check_choice(given: list[Value], choices: list[str]) -> None:
    if choices and given[0] not in choices:
        listed = ", ".join(f'"{x}"' for x in choices)
        raise _Refused(f'The answer is "{given[0]}", expected one of {listed}.')


def _check_numbers(given: list[Value], expected: list[Value]) -> None:
    """Refuse numbers of another shape, and those that are none."""
    for a, b in zip(given, expected):
        if isinstance(a, str) or isinstance(b, str):
            continue
        if not a.isfinite().all():
            what = "NaN (not a number)" if a.isnan().any() else "infinite numbers"
            raise _Refused(f"The answer holds {what}.")
        if a.shape != b.shape:
            how = ""
            if a.squeeze().shape == b.squeeze().shape:
                how = " Only axes of length 1 differ."
            elif sorted(a.shape) == sorted(b.shape):
                how = " The axes are in another order."
            raise _Refused(
                f"The answer has shape {tuple(a.shape)}, expected {tuple(b.shape)}.{how}"
            )


def _check_integers(given: list[Value], expected: list[Value]) -> None:
    """Refuse names of structures that have become fractions."""
    for a, b in zip(given, expected):
        if isinstance(a, str) or isinstance(b, str) or b.is_floating_point() or b.ndim == 0:
            continue
        if a.is_floating_point():
            raise _Refused(
                f"The values are right, but their type is {a.dtype}, expected whole numbers."
            )
