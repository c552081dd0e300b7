"""Random programs over the whole language: what runs them on a CPU against the dense reference in float64.

Seeds start at ATTNLANG_SEED; ATTNLANG_FUZZ multiplies their number. Triton's turn is in
``tests/triton/test_interpret_random.py``.
"""

from __future__ import annotations

import os

import pytest

from attnlang.passes.fusion import fusions
from attnlang.runtime import cpp_common, regions

from .random_programs import random_program
from .random_runs import Launches, case, check

PROGRAMS, CHUNK = 500 * int(os.environ.get("ATTNLANG_FUZZ", "1")), 20
START = int(os.environ.get("ATTNLANG_SEED", "0"))


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.filterwarnings("ignore:.*the output is zero:RuntimeWarning")
@pytest.mark.parametrize("first", range(START, START + PROGRAMS, CHUNK))
def test_on_a_cpu(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blockwise executor over small blocks in float64, and in float32 what a call runs, mostly kernels."""
    launches = Launches()
    monkeypatch.setattr(cpp_common.Loaded, "run", launches.count(cpp_common.Loaded.run))
    for seed in range(first, first + CHUNK):
        launches.seed, this = seed, case(seed)
        with monkeypatch.context() as small:
            small.setattr(regions, "TILE", (4, 4))
            check(this, values=1e-8, grads=1e-7, backend="eager")
        check(this, values=1e-4, grads=5e-4)
    assert len(launches.forward) >= CHUNK * 3 // 10
    assert len(launches.backward) >= CHUNK // 5


def test_programs_have_rows_to_take_in() -> None:
    found = [fusions(random_program(seed)).values() for seed in range(100)]
    assert sum(any(f.before for f in fused) for fused in found) >= 3
    assert sum(any(f.after for f in fused) for fused in found) >= 6
