"""A thousand random differentiable scores a run: gradients of the C++ kernels against float64 autograd.

40 kernels of 25 scores each, one a head, are compiled without optimisation, which would take longer than everything
else; a few more scores have kernels to themselves, compiled as users get them. ATTNLANG_FUZZ multiplies the numbers and
ATTNLANG_SEED starts elsewhere (make fuzz-grad).
"""

from __future__ import annotations

import os

import pytest
from backward.scores import batch, check

from attnlang.runtime import cpp, cpp_backward

FUZZ = int(os.environ.get("ATTNLANG_FUZZ", "1"))
START = int(os.environ.get("ATTNLANG_SEED", "0"))
KERNELS, HEADS, ALONE = 40, 25, 8


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("seed", range(START, START + KERNELS * FUZZ))
def test_random_scores(seed):
    check(batch(seed, HEADS, 70, 83), cpp.forward, cpp_backward.backward)


@pytest.mark.parametrize("seed", range(START, START + ALONE * FUZZ))
def test_random_scores_with_kernels_of_their_own(seed):
    check(batch(10**6 + seed, 1, 130, 150), cpp.forward, cpp_backward.backward)
