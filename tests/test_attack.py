"""A few hundred damaged inputs of each kind, the same ones each time: see tests/attack.py.

REGKIT_ATTACK says how many there are in all; `make attack` runs ten thousand.
"""

import os

import attack
import numpy as np
import pytest

COUNT = int(os.environ.get("REGKIT_ATTACK", "1500"))


def count(kind):
    return max(8, round(attack.SHARES[kind] * COUNT))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in attack.KINDS if kind != "manifests"])
def test_damaged_input_is_used_as_it_should_be_or_refused_in_one_sentence(kind, tmp_path):
    report = attack.attack(kind, count(kind), 0, tmp_path)
    print(report)
    assert report.faults == []


def test_damaged_prepared_sets_are_used_or_refused_in_one_sentence(tmp_path):
    report = attack.attack("manifests", count("manifests"), 0, tmp_path)
    print(report)
    assert report.faults == []


def test_the_attack_itself_notices(tmp_path, monkeypatch):
    """Faults that are put in: a traceback, a message of Python's, a file outside, much memory.

    The memory is what the inputs add: the process that runs the tests may hold more than the bound.
    """
    held = np.ones(300_000_000)

    def harmless(home):
        return lambda rng, room: None

    def raises(error):
        def make(home):
            def one(rng, room):
                raise error

            return one

        return make

    def escapes(home):
        return lambda rng, room: (room.parent / "outside").write_text("x")

    def greedy(home):
        return lambda rng, room: np.ones(300_000_000)  # 2.4 GB at once

    made = {
        "greedy": (greedy, 1),
        "harmless": (harmless, 0),
        "traceback": (raises(KeyError("split")), 1),
        "raw": (raises(ValueError("Expecting value: line 1 column 1 (char 0)")), 1),
        "sentence": (raises(ValueError("dataset.json cannot be read.")), 0),
        "escapes": (escapes, 1),
    }
    for kind, (make, faults) in made.items():
        monkeypatch.setitem(attack.KINDS, kind, make)
        assert len(attack.attack(kind, 1, 0, tmp_path).faults) == faults, kind
    assert held.size  # was held all the time
