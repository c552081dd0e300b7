"""The C++ forward against the reference over shapes, layouts and thread counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from attnlang.ir import simple
from attnlang.ir.build import h, k, op, q, s
from tests.cpp.support import check, make_call

CAUSAL = simple("causal", mask=op("ge", q, k))
FULL = simple("full")
SOFTCAP = simple("softcap", mask=op("le", k, op("add", q, 3)), score=op("mul", op("tanh", op("div", s, 5.0)), 5.0))
STRIPES = simple("stripes", mask=op("eq", op("mod", op("add", q, h), 3), op("mod", k, 3)))
PROGRAMS = {p.name: p for p in (CAUSAL, FULL, SOFTCAP, STRIPES)}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def qkv(lq: int, lk: int, d: int = 32, dv: int | None = None, heads: int = 2, kv: int = 2) -> tuple[torch.Tensor, ...]:
    return torch.randn(1, heads, lq, d), torch.randn(1, kv, lk, d), torch.randn(1, kv, lk, dv or d)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    "lengths", [(1, 1), (7, 7), (127, 129), (129, 127), (1, 1000), (16, 200), (17, 65), (1000, 64)]
)
def test_lengths(name: str, lengths: tuple[int, int]) -> None:
    check(make_call(PROGRAMS[name], *qkv(*lengths)))


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0), (70, 0)])
def test_empty_lengths(lengths: tuple[int, int]) -> None:
    o, lse = check(make_call(CAUSAL, *qkv(*lengths)))
    assert not o.any() and bool((lse == -torch.inf).all())


@pytest.mark.parametrize(
    "dims", [(1, 1), (8, 8), (24, 24), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (64, 7), (512, 512)]
)
def test_head_dims(dims: tuple[int, int]) -> None:
    check(make_call(CAUSAL, *qkv(70, 90, *dims)))


@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (6, 3)])
def test_grouped_queries(heads: tuple[int, int]) -> None:
    check(make_call(STRIPES, *qkv(65, 65, heads=heads[0], kv=heads[1])))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    "shape", [(64, 64, 64, 64), (130, 1, 32, 32), (65, 161, 24, 7), (200, 100, 33, 65), (70, 300, 256, 1)]
)
def test_bfloat16(name: str, shape: tuple[int, int, int, int]) -> None:
    """Shapes around the blocks of a matrix unit, where the machine has one."""
    lq, lk, d, dv = shape
    q, k, v = (x.bfloat16() for x in qkv(lq, lk, d, dv, heads=4, kv=2))
    check(make_call(PROGRAMS[name], q, k, v), 2e-2, 2e-2)
    check(make_call(PROGRAMS[name], q, k, v, scale=-0.3, partial=True), 2e-2, 2e-2)
