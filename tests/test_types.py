"""What a type checker sees of regkit: a user's file, read by mypy --strict."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# an expression of a user's, where x is a Tensor, and what mypy has to say of it
EXPRESSIONS = {
    "regkit.register('a.nii', 'b.nii')": "regkit.registration.Result",
    "regkit.register('a.nii', 'b.nii').disp": "torch._tensor.Tensor",
    "regkit.models.create('vxm', ndim=2)": "regkit.models.base.RegistrationModel",
    "regkit.models.names()": "list[str]",
    "regkit.io.read('a.nii')": "regkit.io.Image",
    "regkit.papers.TABLES": "dict[str, regkit.papers.tables.Table]",
    "regkit.spatial.warp(x, x, mode='nearest')": "torch._tensor.Tensor",
    "regkit.losses.lncc(x, x, window=9)": "torch._tensor.Tensor",
    "regkit.metrics.dice(x, x)": "torch._tensor.Tensor",
    "regkit.spatial.warp(x)": 'Missing positional argument "disp"',
    "regkit.regsiter": 'Module has no attribute "regsiter"',
}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """What mypy says of each expression. It takes what it knows of regkit from its cache."""
    file = tmp_path_factory.mktemp("user") / "user.py"
    lines = ["import regkit", "from torch import Tensor", "def use(x: Tensor) -> None:"]
    lines += [f"    reveal_type({expression})" for expression in EXPRESSIONS]
    file.write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-color-output", file],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": "."},
        capture_output=True,
        text=True,
    )
    said = dict.fromkeys(range(1, len(lines) + 1), "")
    for number, sentence in re.findall(rf"{file.name}:(\d+): \w+: (.*)", done.stdout):
        said[int(number)] += sentence + "\n"
    assert not said[1] + said[2] + said[3], done.stdout
    return {expression: said[4 + i] for i, expression in enumerate(EXPRESSIONS)}


@pytest.mark.slow
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_type_checker_sees_the_real_types(expression, sentences):
    expected = EXPRESSIONS[expression]
    if expected.partition(" ")[0] in ("Missing", "Module"):
        assert expected in sentences[expression]
    else:
        assert sentences[expression] == f'Revealed type is "{expected}"\n'
