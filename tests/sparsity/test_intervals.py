"""Interval rules: sound against the operators themselves, and exact where exactness is promised."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from attnlang.ir import BOOL, INT, OPS, Index, Load, Param, Size
from attnlang.ir.build import cast, clamp, op, q
from attnlang.passes.intervals import COMPARISONS, INF, RULES, TOP, Array, Interval, Python, Truth
from attnlang.passes.value_ranges import value_range

EDGES = (-9, -4, -3, -1, 0, 1, 2, 5, 8)
INTERVALS = [Interval(a, b) for a, b in itertools.combinations_with_replacement(EDGES, 2)]
BINARY = [n for n, r in RULES.items() if len(OPS[n].args) == 2]
UNARY = [n for n, r in RULES.items() if len(OPS[n].args) == 1]


def values(name: str, *intervals: Interval) -> torch.Tensor:
    axes = [torch.arange(i.lo, i.hi + 1) for i in intervals]
    grids = torch.meshgrid(*axes, indexing="ij")
    return OPS[name].evaluate(*grids)


def check_rule(name: str) -> None:
    """Assert that a rule holds every value, and for one argument nothing else."""
    arity = len(OPS[name].args)
    for operands in itertools.product(INTERVALS, repeat=arity):
        out = RULES[name](Python, *operands)
        got = values(name, *operands)
        assert out.lo <= int(got.min()) and int(got.max()) <= out.hi, (name, operands, out)
        assert arity == 2 or name == "bitnot" or (out.lo, out.hi) == (int(got.min()), int(got.max()))


def check_comparison(name: str) -> None:
    """Assert that a comparison is decided exactly where all pairs of values agree."""
    for a, b in itertools.product(INTERVALS, INTERVALS):
        got = values(name, a, b)
        assert tuple(map(bool, COMPARISONS[name](a, b))) == (bool(got.any()), not bool(got.all()))


@pytest.mark.parametrize("name", [*BINARY, *UNARY])
def test_rules_hold_every_value(name: str) -> None:
    check_rule(name)


@pytest.mark.parametrize("name", sorted(COMPARISONS))
def test_comparisons_are_exact_on_independent_intervals(name: str) -> None:
    check_comparison(name)


@pytest.mark.parametrize("name", BINARY)
def test_both_carriers_agree(name: str) -> None:
    pairs = list(itertools.product([*INTERVALS, TOP, Interval(0, INF), Interval(-INF, 3)], repeat=2))
    left = Interval(*(np.array([getattr(a, s) for a, _ in pairs], np.int64) for s in ("lo", "hi")))
    right = Interval(*(np.array([getattr(b, s) for _, b in pairs], np.int64) for s in ("lo", "hi")))
    out = RULES[name](Array, left, right)
    for i, (a, b) in enumerate(pairs):
        assert (int(out.lo[i]), int(out.hi[i])) == tuple(RULES[name](Python, a, b)), (name, a, b)


def test_unbounded_sides_decide_nothing() -> None:
    half = Interval(0, INF)
    assert COMPARISONS["lt"](half, half) == Truth(True, True)
    assert COMPARISONS["eq"](Interval(INF, INF), Interval(INF, INF)) == Truth(True, True)
    assert COMPARISONS["ge"](half, Interval(0, 0)) == Truth(True, False)


def test_wrapping_gives_everything() -> None:
    assert RULES["add"](Python, Interval(0, INF), Interval(1, 1)) == TOP
    assert RULES["mul"](Python, Interval(0, 2**40), Interval(0, 2**40)) == TOP
    assert RULES["abs"](Python, Interval(-INF, 0)) == TOP
    assert RULES["shl"](Python, Interval(1, 1), Interval(0, 63)) == TOP


def test_division_corners() -> None:
    a = Interval(-7, 9)
    assert RULES["floordiv"](Python, a, Interval(2, 2)) == (-4, 4)
    assert RULES["floordiv"](Python, a, Interval(0, 0)) == (0, 0)
    assert RULES["mod"](Python, Interval(6, 9), Interval(5, 5)) == (1, 4)
    assert RULES["mod"](Python, Interval(3, 9), Interval(5, 5)) == (0, 4)
    assert RULES["mod"](Python, Interval(2, 3), Interval(5, 100)) == (2, 3)


def test_value_range_defaults_and_bounds() -> None:
    k, n, w = Index("k"), Size("Lk"), Param("w", INT)
    table = Load("t", (q,), INT)
    assert value_range(q) == (0, 2**31 - 2)
    assert value_range(n) == (0, 2**31 - 1)
    assert value_range(w) == (None, None)
    assert value_range(table) == (None, None)
    assert value_range(op("sub", q, k), {q: (0, 99), k: (0, 49)}) == (-49, 99)
    assert value_range(op("floordiv", q, 7), {q: (0, 99)}) == (0, 14)
    assert value_range(op("mod", op("sub", q, k), 8)) == (0, 7)
    assert value_range(clamp(w, 0, op("sub", n, 1)), {n: (5, 5)}) == (0, 4)
    assert value_range(op("max", table, 0)) == (0, None)
    assert value_range(op("add", op("max", table, 0), 1)) == (None, None)
    assert value_range(cast(op("lt", q, k), INT)) == (0, 1)
    assert value_range(op("where", op("ge", q, 0), 3, w)) == (3, 3)
    assert value_range(cast(Param("x", BOOL), INT)) == (0, 1)
    assert value_range(q, {q: (None, 5)}) == (0, 5)
    with pytest.raises(TypeError):
        value_range(op("lt", q, k))
