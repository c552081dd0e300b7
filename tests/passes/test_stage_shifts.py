"""Which extrema of a stage with groups are nothing but shifts."""

from __future__ import annotations

import pytest

from attnlang import library
from attnlang.grammar import parse
from attnlang.ir import Attend
from attnlang.passes.shifts import moves_nothing

TEXT = """
pattern within:
    group = k % 3
    groups = 3
    normalize:
        stat top = max(s, by=group)
        stat part = sum(exp(s - top), by=group)
        weight = exp(s - top) / part

pattern share_of_all:
    group = k % 3
    groups = 3
    normalize:
        stat top = max(s, by=group)
        stat all = sum(exp(s - top))
        weight = exp(s - top) / all

pattern gain:
    group = k % 3
    groups = 3
    normalize:
        stat top = max(s, by=group)
        stat part = sum(exp(s - top), by=group)
        weight = exp(s - top) / part
    weights = w * sigmoid(top)

pattern read:
    group = k % 3
    groups = 3
    normalize:
        stat top = max(s, by=group)
        stat part = sum(exp(s - top), by=group)
        weight = exp(s - top) / part
    output tops = top
"""
STAGES: dict[str, Attend] = {name: pattern.attend for name, pattern in parse(TEXT).patterns.items()}


@pytest.mark.parametrize(
    ("name", "want"), [("within", True), ("share_of_all", False), ("gain", False), ("read", False)]
)
def test_a_shift_moves_no_weight_and_no_output(name: str, want: bool) -> None:
    assert moves_nothing(STAGES[name], "top") is want


def test_choices_between_pairs_are_all_met() -> None:
    """Landmark attention asks where a pair is before it reads either maximum."""
    stage = library.landmark.attend
    assert moves_nothing(stage, "m") and moves_nothing(stage, "top")
