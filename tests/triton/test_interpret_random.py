"""Random programs over the whole language through interpreted Triton kernels, as calls on a GPU would run them.

Seeds start at ATTNLANG_SEED; ATTNLANG_FUZZ multiplies their number.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
from stages.random_runs import Launches, case, check
from triton_interpreter import without_overflow_checks

from attnlang.runtime import compiled, dispatch, triton_common

PROGRAMS, CHUNK = 500 * int(os.environ.get("ATTNLANG_FUZZ", "1")), 20
START = int(os.environ.get("ATTNLANG_SEED", "0"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("first", range(START, START + PROGRAMS, CHUNK))
def test_on_triton(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiled.DEVICES, "cpu", "triton")
    monkeypatch.setitem(dispatch._OF_DEVICE, "cpu", "triton")
    launches = Launches()
    monkeypatch.setattr(triton_common.Kernel, "run", launches.count(triton_common.Kernel.run))
    checks_cost = first % (5 * CHUNK) != 0  # checks of integer overflow are slow: every fifth group has them
    with without_overflow_checks() if checks_cost else nullcontext():
        for seed in range(first, first + CHUNK):
            launches.seed = seed
            check(case(seed), values=1e-4, grads=5e-4)
    assert len(launches.forward) >= CHUNK * 3 // 10
    assert len(launches.backward) >= CHUNK // 5
