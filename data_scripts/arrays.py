"""NumPy arrays out of a pickle that nobody opens.

A pickle is a program, and whoever opens one runs it. Here none is run: fickling translates the file
into the syntax tree of the Python that it amounts to, and of that tree the few forms are read in
which NumPy writes numbers down. Whatever else stands in it is refused unseen, and never called.
"""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np


def arrays(file: Path) -> list[np.ndarray]:
    """The arrays of a pickle that holds a tuple or a list of them, and nothing else, in order.

    Args:
        file: pickled with a protocol up to 4, the default of Python 3.8 to 3.13.

    Raises:
        ValueError: it holds something other than arrays of numbers, or is damaged.
        ImportError: fickling is not installed.
    """
    try:
        from fickling.fickle import Pickled  # of the extra "data"
    except ImportError:
        raise ImportError(
            "fickling is not installed, expected it where a set comes as pickles: install this "
            "project with its extra 'data'."
        ) from None
    data = file.read_bytes()
    try:
        return _told(Pickled.load(data).ast)
    except Exception as error:  # a damaged file raises whatever comes
        raise ValueError("file holds something other than arrays of numbers.") from error


def _told(program: ast.Module) -> list[np.ndarray]:
    """What the lines of the program say, one after the other; a name may be another's."""
    held: dict[str, bytes | np.dtype | np.ndarray] = {}
    first: dict[str, str] = {}

    def found(name: str) -> bytes | np.dtype | np.ndarray:
        return held[first.get(name, name)]

    for line in program.body:
        match line:
            case ast.ImportFrom():  # says where a name comes from; nothing is imported
                pass
            case ast.Assign([ast.Name("result")], ast.Tuple(parts) | ast.List(parts)):
                whole = [found(part.id) for part in parts if isinstance(part, ast.Name)]
                if len(whole) == len(parts) and all(isinstance(a, np.ndarray) for a in whole):
                    return whole  # type: ignore[return-value]
                break
            case ast.Assign([ast.Name(name)], ast.Name(other)):
                first[name] = first.get(other, other)
            case ast.Assign([ast.Name(_)], ast.Call(ast.Name("_reconstruct"))):
                pass  # an array of no size yet, whose state follows
            case ast.Assign(
                [ast.Name(name)],
                ast.Call(ast.Name("encode"), [ast.Constant(text), ast.Constant("latin1")]),
            ):  # how protocol 2 writes bytes
                held[name] = text.encode("latin1")
            case ast.Assign(
                [ast.Name(name)], ast.Call(ast.Name("dtype"), [ast.Constant(code), *_])
            ):
                held[name] = np.dtype(code)
            case ast.Expr(ast.Call(ast.Attribute(ast.Name(name), "__setstate__"), [state])):
                name = first.get(name, name)
                match state:
                    case ast.Tuple([ast.Constant(3), ast.Constant(order), *_]):  # of a dtype
                        held[name] = found(name).newbyteorder(order)
                    case ast.Tuple(
                        [ast.Constant(1), shape, ast.Name(kind), ast.Constant(columns), numbers]
                    ):
                        data = (
                            found(numbers.id)
                            if isinstance(numbers, ast.Name)
                            else ast.literal_eval(numbers)
                        )
                        held[name] = np.frombuffer(data, found(kind)).reshape(
                            ast.literal_eval(shape), order="F" if columns else "C"
                        )
                    case _:
                        break
            case _:
                break
    raise ValueError("the program does something else than write arrays down")
