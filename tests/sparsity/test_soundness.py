"""The contract: no empty tile holds a True, no full tile a False, on random programs. Never weaken this test."""

from __future__ import annotations

import os
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_programs import Maker, brute_force, violations

from attnlang.sparsity import analyse

FUZZ = int(os.environ.get("ATTNLANG_FUZZ", "1"))
SHARDS, EXAMPLES = 8, 650


def check(random: Random) -> None:
    problem = Maker(random).problem()
    claimed = analyse(*problem.arguments, problem.tile).dense_kinds()
    assert violations(claimed, brute_force(problem)) == 0, problem.program.mask


@pytest.mark.parametrize("shard", range(SHARDS))
def test_no_empty_tile_holds_a_true_and_no_full_tile_a_false(shard: int) -> None:
    @settings(max_examples=EXAMPLES * FUZZ, database=None)
    @given(st.integers(0, 2**48))
    def run(seed: int) -> None:
        check(Random(seed * SHARDS + shard))

    run()
