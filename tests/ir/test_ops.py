"""Every operator is total and means what Python means where Python is defined."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlang.ir import BOOL, FLOAT, INT, OPS
from attnlang.ir.ops import promote_args, result_type

INTS = [0, 1, -1, 2, -2, 7, -7, 63, 64, 2**31 - 1, -(2**31), 2**62, -(2**63), 2**63 - 1]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 1e30, -1e30, math.inf, -math.inf, math.nan]
SAMPLES = {
    "i": torch.tensor(INTS),
    "f": torch.tensor(FLOATS, dtype=torch.float64),
    "b": torch.tensor([True, False]),
}


def grids(kinds):
    axes = [SAMPLES[c] for c in kinds]
    return [a.view([-1 if d == i else 1 for d in range(len(axes))]) for i, a in enumerate(axes)]


@pytest.mark.parametrize("name", OPS)
def test_every_operator_is_total(name):
    spec = OPS[name]
    for shared in "if" + "b" * ("x" in spec.args):
        kinds = [c if c in SAMPLES else shared for c in spec.args]
        if "b" in kinds and "n" in spec.args:
            continue
        out = spec.evaluate(*grids(kinds))
        expected = spec.result if spec.result in (BOOL, INT, FLOAT) else {"i": INT, "f": FLOAT, "b": BOOL}[shared]
        assert out.dtype == {BOOL: torch.bool, INT: torch.int64, FLOAT: torch.float64}[expected]


small = st.integers(-50, 50)


@given(small, small)
def test_floor_division_and_remainder_follow_python(a, c):
    x, y = torch.tensor(a), torch.tensor(c)
    assert OPS["floordiv"].evaluate(x, y).item() == (a // c if c else 0)
    assert OPS["mod"].evaluate(x, y).item() == (a % c if c else 0)


@given(st.floats(-50, 50), st.floats(-50, 50).filter(lambda v: v == 0 or abs(v) > 1e-3))
def test_float_remainder_has_the_sign_of_the_divisor(a, c):
    got = OPS["mod"].evaluate(torch.tensor(a, dtype=torch.float64), torch.tensor(c, dtype=torch.float64)).item()
    assert got == pytest.approx(a % c if c else 0.0, abs=1e-9)


def test_smallest_integer_divided_by_minus_one_wraps():
    low = torch.tensor(-(2**63))
    assert OPS["floordiv"].evaluate(low, torch.tensor(-1)).item() == -(2**63)
    assert OPS["mod"].evaluate(low, torch.tensor(-1)).item() == 0


@pytest.mark.parametrize("value, want", [(2.9, 2), (-2.9, -2), (math.nan, 0), (1e20, 2**31 - 1), (-math.inf, -(2**31))])
def test_conversion_to_int_truncates_and_saturates(value, want):
    assert OPS["to_int"].evaluate(torch.tensor(value)).item() == want


def test_shift_distances_are_clamped():
    one = torch.tensor(1)
    assert OPS["shl"].evaluate(one, torch.tensor(-3)).item() == 1
    assert OPS["shr"].evaluate(torch.tensor(-8), torch.tensor(200)).item() == -1


def test_types_are_checked_and_promoted():
    assert result_type("where", (BOOL, INT, INT)) is INT
    assert promote_args("where", (BOOL, INT, FLOAT)) == (BOOL, FLOAT, FLOAT)
    with pytest.raises(TypeError):
        result_type("where", (BOOL, INT, FLOAT))
    with pytest.raises(TypeError):
        result_type("lt", (BOOL, BOOL))
    with pytest.raises(KeyError):
        result_type("frobnicate", (INT,))
