"""A thousand random differentiable scores a run: gradients of the C++ kernels against float64 autograd.

40 kernels of 25 scores each, one a head, are compiled without optimisation, which would take longer than everything
else; a few more scores have kernels to themselves, compiled as users get them. ATTNLANG_FUZZ multiplies the numbers and
ATTNLANG_SEED starts elsewhere (make fuzz-grad).
"""

from __future__ import annotations

import os

import pytest
from backward.scores import batch, check

from attnlang.runtime import cpp, cpp_backward, cpp_common, toolchain

FUZZ = int(os.environ.get("ATTNLANG_FUZZ", "1"))
START = int(os.environ.get("ATTNLANG_SEED", "0"))
KERNELS, HEADS, ALONE = 40, 25, 8


@pytest.fixture
def quick_compiler(monkeypatch):
    flags = tuple("-O0" if f == "-O3" else f for f in toolchain.COMMON_FLAGS)
    monkeypatch.setattr(toolchain, "COMMON_FLAGS", flags)
    monkeypatch.setattr(cpp_common, "COMMON_FLAGS", flags)


@pytest.mark.parametrize("seed", range(START, START + KERNELS * FUZZ))
def test_random_scores(seed, quick_compiler):
    check(batch(seed, HEADS, 70, 83), cpp.forward, cpp_backward.backward)


@pytest.mark.parametrize("seed", range(START, START + ALONE * FUZZ))
def test_random_scores_with_kernels_of_their_own(seed):
    check(batch(10**6 + seed, 1, 130, 150), cpp.forward, cpp_backward.backward)
