"""Numbers of results/*.json as words and as rows of a table, so that nobody types them.

A format is Python's, or `power` (3.2·10⁻⁵), `percent` (7.6 %), `time` (180 ms), `bytes` (12.3 MB),
`points` (+1.2, of an interval −0.7 to +0.5); any other list is written 80×96×80. What is not known
(null) is shown as a dash.
"""

import json
import re
import string
from pathlib import Path
from typing import Any


class Words(string.Formatter):
    """Python's formatting with the formats of this file; None is a dash."""

    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

    def format_field(self, value: Any, spec: str) -> str:
        if value is None:
            return "–"
        if spec == "percent":
            return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
        if spec == "power":
            if abs(value) >= 1e-3 or value == 0:
                return f"{value:.2g}"
            mantissa, exponent = f"{value:.1e}".split("e")
            return f"{mantissa}·10{str(int(exponent)).translate(self.superscript)}"
        if spec == "time":
            return _three_digits(value, {"s": 1, "ms": 1e-3, "µs": 1e-6})
        if spec == "points":  # hundredths, and the two ends of an interval of them
            ends = value if isinstance(value, list) else [value]
            return " to ".join(f"{100 * end:+.1f}".replace("-", "\N{MINUS SIGN}") for end in ends)
        if spec == "bytes":
            return _three_digits(value, {"GB": 1e9, "MB": 1e6, "kB": 1e3})
        if isinstance(value, list):
            return "×".join(map(str, value))
        return super().format_field(value, spec)


def _three_digits(value: float, units: dict[str, float]) -> str:
    """A number in the first unit that it fills, with three digits where it has them."""
    name = next((name for name, size in units.items() if value >= size), list(units)[-1])
    amount = value / units[name]
    return (
        f"{amount:.{2 if amount < 9.995 else 1 if amount < 99.95 else 0}f}\N{NO-BREAK SPACE}{name}"
    )


def lookup(results: Path, name: str, keys: str) -> Any:
    """What results/<name>.json holds at `keys`, such as "brain.inverse" or "scaling.0.shape".

    A name with `?` or `*` means several files: the sum of what they hold there.
    """
    if re.search(r"[?*]", name):
        files = sorted(results.glob(f"{name}.json"))
        if not files:
            raise ValueError(f"result is {name!r}, which fits no file in results.")
        return sum(lookup(results, file.stem, keys) for file in files)
    path = results / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"result is {name!r}, expected the name of a file in results.")
    value = json.loads(path.read_text(encoding="utf-8"))
    for key in keys.split("."):
        try:
            value = value[int(key) if isinstance(value, list) else key]
        except (KeyError, IndexError, TypeError, ValueError):
            message = f"keys is {keys!r}, of which results/{name}.json has no {key!r}."
            raise ValueError(message) from None
    return value


def _holds(row: dict[str, Any], condition: str) -> bool:
    """Whether a row meets a condition: key=value, key!=value, key<number or key>number."""
    key, sign, value = re.fullmatch(r"(\w+)(!?=|<|>)(\S*)", condition).groups()
    if sign in "<>":
        known = row[key] is not None
        return known and (row[key] < float(value) if sign == "<" else row[key] > float(value))
    return (str(row[key]) == value) == (sign == "=")


def numeric(lines: list[list[str]]) -> list[bool]:
    """For each column of a table with a head: does it hold numbers only?"""
    return [all(re.match(r"[\d–]", cell) for cell in column) for column in zip(*lines[1:])]


def table(rows: list[dict[str, Any]], templates: list[str], where: str = "") -> list[list[str]]:
    """The head and the body of a table of `rows`.

    Args:
        rows: of a results file.
        templates: a column each, "head = text with {key:format} of the row".
        where: only rows that meet these conditions, separated by spaces.
    """
    known = {key for row in rows for key in row}
    rows = [dict.fromkeys(known) | row for row in rows]  # what only other rows have is a dash
    rows = [row for row in rows if all(_holds(row, condition) for condition in where.split())]
    columns = [[part.strip() for part in template.split(" = ", 1)] for template in templates]
    words = Words()
    return [
        [head for head, _ in columns],
        *[[words.format(text, **row) for _, text in columns] for row in rows],
    ]
