"""Random programs forward and backward through kernels in float32, against float64 autograd of the reference.

Only programs that have a backward kernel are taken, from ATTNLANG_SEED on; ATTNLANG_FUZZ multiplies their number.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

import attnlang as al
from attnlang.ir import Program, verify
from attnlang.passes.pullback import pullback
from attnlang.passes.streaming import Unstreamable
from attnlang.runtime.stages import softmax_roles
from tests.stages.random_programs import random_program
from tests.stages.test_random import gradients, leaves, results

from .pulls import Launches, cotangents

PROGRAMS = 10 * int(os.environ.get("ATTNLANG_FUZZ", "1"))
START = int(os.environ.get("ATTNLANG_SEED", "0"))


def has_backward_kernel(program: Program) -> bool:
    """Whether gradients are those of a pullback."""
    try:
        pullback(program.attend)
    except Unstreamable:
        return False
    return softmax_roles(program.attend) is None


def programs() -> list[int]:
    """Seeds of programs that have a backward kernel."""
    found = (seed for seed in itertools.count(START) if has_backward_kernel(random_program(seed)))
    return list(itertools.islice(found, PROGRAMS))


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("seed", programs())
def test_random_programs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    program = verify(random_program(seed))
    operands, captured, wanted = leaves(seed)
    made = results(lambda *a, **c: al.reference(program, *a, **c), program, operands, captured)
    grads = cotangents(made, seed)
    exact = gradients({n: made[n] for n in grads}, wanted, grads)
    operands, captured, wanted = leaves(seed, torch.float32)
    made = results(al.compile(program), program, operands, captured)
    got = gradients({n: made[n] for n in grads}, wanted, {n: g.float() for n, g in grads.items()})
    assert launches.count == 1
    for mine, other in zip(got, exact, strict=True):
        size = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(mine.double(), other, atol=1e-4 * size, rtol=1e-4)
