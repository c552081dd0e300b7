"""Float rules: hold the value of every backend, float64 and float32, at random points inside the arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlang.ir import OPS
from attnlang.passes.float_intervals import FLOAT_COMPARISONS, FLOAT_RULES, FloatRange, point, to_int

BIG, SMALL = 2.0**126, 2.0**-133  # exact in float32, near its ends
EDGES = np.array([-np.inf, -BIG, -7.5, -1.0, -0.25, -SMALL, 0.0, SMALL, 0.25, 1.0, 2.0, 7.5, 90.0, BIG, np.inf])


def ranges(count: int, seed: int) -> FloatRange:
    """Random ranges; every fourth may be NaN, too."""
    r = np.random.default_rng(seed)
    a, b = EDGES[r.integers(0, len(EDGES), count)], EDGES[r.integers(0, len(EDGES), count)]
    return FloatRange(np.minimum(a, b), np.maximum(a, b), r.integers(0, 4, count) == 0)


def inside(a: FloatRange, seed: int) -> np.ndarray:
    """One value of each range: an end, something between, or NaN where that is allowed."""
    r = np.random.default_rng(seed)
    pick = r.integers(0, 3, len(a.lo))
    low, high = np.clip(a.lo, -BIG, BIG), np.clip(a.hi, -BIG, BIG)
    pick = np.where(a.lo == a.hi, 0, pick)
    between = np.clip(low + (high - low) * r.random(len(low)) ** 6, low, high)
    found = np.where(pick == 0, a.lo, np.where(pick == 1, a.hi, between))
    return np.where(a.nan & (r.integers(0, 2, len(low)) == 0), np.nan, found)


def check_rule(name: str) -> None:
    """Assert that a rule holds what float64 and float32 give."""
    arity, count = len(OPS[name].args), 4000
    args = [ranges(count, 10 * i + 1) for i in range(arity)]
    with np.errstate(all="ignore"):
        out = FLOAT_RULES[name](*args, False)
    lo, hi, nan = (np.broadcast_to(x, (count,)) for x in out)
    assert not np.isnan(lo).any() and not np.isnan(hi).any()
    for seed in range(4):
        values = [inside(a, 100 * seed + i) for i, a in enumerate(args)]
        for dtype in (torch.float64, torch.float32):
            got = OPS[name].evaluate(*(torch.from_numpy(v).to(dtype) for v in values)).double().numpy()
            held = np.where(np.isnan(got), nan, (lo <= got) & (got <= hi))
            bad = int(np.argmin(held))
            assert held[bad], (dtype, [v[bad] for v in values], got[bad], (lo[bad], hi[bad]))


def check_comparison(name: str) -> None:
    """Assert that a comparison decides nothing that a pair of values contradicts."""
    a, b = ranges(4000, 1), ranges(4000, 2)
    out = FLOAT_COMPARISONS[name](a, b)
    for seed in range(6):
        x, y = inside(a, seed), inside(b, seed + 50)
        got = OPS[name].evaluate(torch.from_numpy(x), torch.from_numpy(y)).numpy()
        held = np.where(got, out.true, out.false)
        assert held[int(np.argmin(held))]


@pytest.mark.parametrize("name", sorted(FLOAT_RULES))
def test_rules_hold_the_values_of_both_widths(name: str) -> None:
    check_rule(name)


@pytest.mark.parametrize("name", sorted(FLOAT_COMPARISONS))
def test_comparisons_hold(name: str) -> None:
    check_comparison(name)


def test_the_sign_of_nan_is_zero() -> None:
    """Found by fuzzing, seed 68146: ``sign(log1p(-2.0)) >= 0`` is true."""
    beyond = FLOAT_RULES["log1p"](point(-2.0), False)
    assert beyond.nan
    sign = FLOAT_RULES["sign"](beyond, True)
    assert sign.lo <= 0 <= sign.hi
    assert FLOAT_COMPARISONS["ge"](sign, point(0.0)).true


def test_small_integers_stay_exact() -> None:
    three = FloatRange(3.0, 3.0, False)
    assert FLOAT_RULES["mul"](three, three, True)[:2] == (9.0, 9.0)
    assert FLOAT_RULES["mul"](three, three, False).lo < 9.0
    assert point(0.5) == (0.5, 0.5, False)
    assert point(0.1).lo < 0.1 < point(0.1).hi
    assert point(float("nan")).nan


def test_to_int_saturates_and_takes_nan_as_zero() -> None:
    assert to_int(FloatRange(-np.inf, np.inf, True)) == (-(2**31), 2**31 - 1)
    assert to_int(FloatRange(3.7, 9.9, True)) == (0, 9)
    assert to_int(FloatRange(-3.7, 9.9, False)) == (-3, 9)
