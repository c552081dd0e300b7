"""Simplification never changes a value, whatever the arguments."""

import pytest
import torch
from hypothesis import given, settings
from strategies import expressions

from attnlang.ir import BOOL, FLOAT, INT, Environment, ScalarParam, UsageError, evaluate, postorder, simple
from attnlang.ir.build import TRUE, all_of, k, op, param, q
from attnlang.passes.simplify import simplify
from attnlang.passes.specialise import specialise

AXES = {
    a: torch.arange(n).view(shape)
    for a, n, shape in (("b", 2, (2, 1, 1, 1)), ("h", 2, (2, 1, 1)), ("q", 7, (7, 1)), ("k", 9, (9,)))
}
ENV = Environment(
    AXES,
    {"B": 2, "H": 2, "Hkv": 2, "Lq": 7, "Lk": 9},
    {},
    {
        "doc": torch.tensor([0, 0, 1, 1, 2, -1, 5]),
        "flag": torch.tensor([True, False] * 4 + [True]),
        "table": torch.linspace(-2, 2, 18, dtype=torch.float64).view(2, 9),
        "pair": torch.arange(63).view(7, 9) % 5,
    },
    {"s": torch.linspace(-3, 3, 2 * 2 * 7 * 9, dtype=torch.float64).view(2, 2, 7, 9)},
)


@settings(max_examples=300)
@given(expressions(BOOL) | expressions(INT) | expressions(FLOAT, score=True))
def test_values_are_kept(expr):
    before, after = evaluate(expr, ENV), evaluate(simplify(expr), ENV)
    shape = torch.broadcast_shapes(before.shape, after.shape)
    torch.testing.assert_close(after.expand(shape), before.expand(shape), rtol=0, atol=0, equal_nan=True)


def test_specialise_replaces_and_folds():
    w = param("w", INT)
    program = simple("p", mask=all_of(op("lt", op("sub", q, k), w), op("ge", w, 0)), scalars=(ScalarParam("w", INT),))
    bound = specialise(program, {"w": 4})
    assert bound.mask is op("lt", op("sub", q, k), 4) and not bound.scalars
    assert all(n is not w for n in postorder(bound.mask))


def test_specialise_needs_static_values_and_known_names():
    program = simple("p", mask=TRUE, scalars=(ScalarParam("n", INT, static=True),))
    with pytest.raises(UsageError, match="'n'"):
        specialise(program, {})
    with pytest.raises(UsageError, match="no scalar parameter 'm'"):
        specialise(program, {"m": 1})
