"""Random programs of one stage forward and backward through one kernel each, more exactly than those of any kind.

Only programs that have a backward kernel are taken, from ATTNLANG_SEED on; ATTNLANG_FUZZ multiplies their number.
"""

from __future__ import annotations

import itertools
import os

import pytest

from attnlang.ir import Attend, Program
from attnlang.passes.pullback import pullback
from attnlang.passes.streaming import Unstreamable
from attnlang.runtime.stages import softmax_roles
from tests.stages.random_programs import random_program
from tests.stages.random_runs import case, check

from .pulls import Launches

PROGRAMS = 10 * int(os.environ.get("ATTNLANG_FUZZ", "1"))
START = int(os.environ.get("ATTNLANG_SEED", "0"))


def has_backward_kernel(program: Program) -> bool:
    """Whether gradients are those of one pullback."""
    if sum(isinstance(stage, Attend) for stage in program.stages) > 1:
        return False
    try:
        pullback(program.attend)
    except Unstreamable:
        return False
    smooth = any(out.monoid != "argmax" for out in program.attend.outputs)
    return smooth and softmax_roles(program.attend) is None


def programs() -> list[int]:
    """Seeds of programs that have a backward kernel."""
    found = (seed for seed in itertools.count(START) if has_backward_kernel(random_program(seed)))
    return list(itertools.islice(found, PROGRAMS))


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("seed", programs())
def test_random_programs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    check(case(seed), values=1e-4, grads=1e-4)
    assert launches.count == 1
