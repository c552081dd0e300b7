"""Random programs that stream, forward and backward through interpreted Triton kernels, against the reference."""

from __future__ import annotations

import os

import pytest
import torch
from stages.random_programs import random_program
from stages.test_random import gradients, leaves, results

import attnlang as al
from attnlang.ir import Attend
from attnlang.passes.pullback import pullback
from attnlang.passes.streaming import Unstreamable
from attnlang.runtime.compiled import has_kernel

FIRST = 100 * int(os.environ.get("ATTNLANG_FUZZ", "1"))
CHUNK = 50


def has_kernels(program) -> bool:
    """Whether kernels can run the first stage in both directions, and there is more to it than plain softmax."""
    stage = program.stages[0]
    assert isinstance(stage, Attend)
    if program.standard or not has_kernel(stage):
        return False
    try:
        pullback(stage)
    except Unstreamable:
        return False
    return True


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_random_programs(made: list[bool]) -> None:
    for seed in range(FIRST, FIRST + CHUNK):
        program = random_program(seed)
        if not has_kernels(program):
            continue
        operands, captured, wanted = leaves(seed)
        want = results(lambda *a, _p=program, **c: al.reference(_p, *a, **c), program, operands, captured)
        theirs, mine, single = leaves(seed, torch.float32)
        got = results(al.compile(program, backend="triton"), program, theirs, mine)
        generator = torch.Generator().manual_seed(seed)
        cotangents = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in want.items()}
        for n, value in want.items():
            torch.testing.assert_close(
                got[n].double(), value, rtol=1e-4, atol=1e-4, msg=lambda m, s=seed, n=n: f"{s} {n} {m}"
            )
        floats = {n: t.float() for n, t in cotangents.items()}
        pairs = zip(gradients(got, single, floats), gradients(want, wanted, cotangents), strict=True)
        for a, c in pairs:
            size = max(1.0, float(c.abs().max()) if c.numel() else 0.0)
            torch.testing.assert_close(a.double(), c, rtol=0, atol=5e-4 * size, msg=lambda m, s=seed: f"{s} {m}")
    assert made.count(True) > 1
