"""Gradients of streaming stages by the C++ backward kernel: every one against float64 autograd of the reference."""

from __future__ import annotations

import pytest
import torch

from attnlang.ir import Expr, Program
from attnlang.ir.build import TRUE, all_of, k, op, q
from tests.passes.test_pullback import GIVEN
from tests.streaming_cases import TENSORS, masked

from .pulls import Launches, Problem, check
from .test_streams import captured

NAMES = sorted(set(GIVEN) - {"softmax"})
"""Plain softmax has a kernel of its own."""
HOLES = all_of(op("ge", op("add", q, 20), k), op("ge", q, 5), op("ne", op("mod", q, 11), 3), op("ne", k, 7))
"""Rows without keys, and tiles of every kind."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


def problem(
    name: str,
    mask: Expr = TRUE,
    heads: tuple[int, int] = (2, 2),
    lengths: tuple[int, int] = (150, 200),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
) -> Problem:
    torch.manual_seed(0)
    (hq, hk), (lq, lk), (d, dv) = heads, lengths, dims
    shapes = {"q": (hq, lq, d), "k": (hk, lk, d), "v": (hk, lk, dv)}
    leaves = {n: torch.randn(batch, *shape).to(dtype) for n, shape in shapes.items()}
    return Problem(Program(name, (masked(GIVEN[name], mask),), (), TENSORS), leaves | captured(hq, lq, lk))


@pytest.mark.parametrize("mask", [TRUE, HOLES], ids=["all", "holes"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_reference(name: str, mask: Expr, launches: Launches) -> None:
    check(problem(name, mask))
    assert launches.count == 1
