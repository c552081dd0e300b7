"""Symbolic derivatives against autograd through the reference evaluator."""

import pytest
import torch
from hypothesis import given, settings
from strategies import expressions

from attnlang.ir import FLOAT, OPS, Environment, Load, evaluate, postorder
from attnlang.ir.build import clamp, h, k, op, q, s
from attnlang.passes.derivatives import DERIVATIVES, derivatives

AXES = {
    a: torch.arange(n).view(shape)
    for a, n, shape in (("b", 1, (1, 1, 1, 1)), ("h", 2, (2, 1, 1)), ("q", 5, (5, 1)), ("k", 6, (6,)))
}
TABLE = Load("table", (h, k), FLOAT)
SIZES = {"B": 1, "H": 2, "Hkv": 2, "Lq": 5, "Lk": 6}


def environment(values, table):
    captured = {
        "table": table,
        "doc": torch.tensor([0, 0, 1, 1, 2]),
        "flag": torch.tensor([True, False] * 3),
        "pair": torch.arange(30).view(5, 6) % 5,
    }
    return Environment(AXES, SIZES, {}, captured, {"s": values})


def check(expr, values):
    values = values.clone().requires_grad_()
    # one leaf an element of the dense grid, so that autograd gives pointwise derivatives of the load as well
    table = torch.linspace(-1.5, 1.7, 12, dtype=torch.float64).view(2, 6)
    got = derivatives(expr, (s,))[s]
    env = environment(values, table)
    out = evaluate(expr, env).expand(values.shape)
    if out.requires_grad:
        (want,) = torch.autograd.grad(out.sum(), values, allow_unused=True)
    else:
        want = None
    want = torch.zeros_like(values) if want is None else want
    have = evaluate(got, env).expand(values.shape).detach()
    finite = torch.isfinite(want) & torch.isfinite(have) & torch.isfinite(out)
    torch.testing.assert_close(have[finite], want[finite], rtol=1e-8, atol=1e-9)


VALUES = torch.tensor([-2.3, -1.0, -0.4, 0.0, 0.3, 1.0, 1.7, 2.9], dtype=torch.float64)


def grid():
    return VALUES.repeat(8)[:60].view(1, 2, 5, 6)


SMOOTH = [n for n, o in OPS.items() if o.result is FLOAT and set(o.args) == {"f"} and len(o.args) == 1]


@pytest.mark.parametrize("name", SMOOTH)
def test_functions_of_one_argument(name):
    check(op("mul", op(name, s), 1.5), grid())


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "min", "max", "mod"])
def test_both_arguments(name):
    check(op(name, op("mul", s, 2.0), op("add", s, 0.7)), grid())


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.0, -1.0])
def test_powers(exponent):
    check(op("pow", s, exponent), grid())
    check(op("pow", op("abs", s), op("add", op("mul", s, s), 0.5)), grid())


def test_kinks_follow_pytorch():
    check(op("abs", s), grid())
    check(op("sign", s), grid())
    check(op("max", s, 0.0), grid())
    check(clamp(s, -0.4, 1.0), grid())
    check(op("where", op("gt", s, 0.0), op("mul", s, 3.0), op("exp", s)), grid())


def test_captured_tensors_and_sharing():
    expr = op("tanh", op("mul", op("add", s, TABLE), op("add", TABLE, 0.5)))
    out = derivatives(expr, (s, TABLE))
    assert expr in set(postorder(out[s])), "the derivative reuses the forward value"
    table = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    env = environment(grid(), table)
    (want,) = torch.autograd.grad(evaluate(expr, env).sum(), table)
    torch.testing.assert_close(evaluate(out[TABLE], env).sum((0, 2)).detach(), want)


def test_what_does_not_reach_the_result_is_zero():
    out = derivatives(op("to_float", op("sub", q, k)), (s, TABLE))
    assert all(repr(v) == "0.0" for v in out.values())


@settings(max_examples=200)
@given(expressions(FLOAT, score=True))
def test_random_expressions(expr):
    check(expr, torch.linspace(-2.9, 3.1, 60, dtype=torch.float64).view(1, 2, 5, 6))


def test_every_float_operator_is_considered():
    silent = {"to_float"}
    for name, spec in OPS.items():
        floats = spec.result is FLOAT or spec.result in ("n", "x")
        assert not floats or name in DERIVATIVES or name in silent, name
