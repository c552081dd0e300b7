"""Pointwise float functions and activations, added to the table of pointwise."""

from __future__ import annotations

import math

from attnlang.ir import FLOAT, Expr, Type
from attnlang.ir.build import Like, op

from .pointwise import POINTWISE, Builder, as_float, clamp, power, row, square, where
from .scalars import to

# float functions -----------------------------------------------------------------------------------------------------

_FLOAT_FUNCTIONS = (
    *("exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt"),
    *("sin", "cos", "tan", "atan", "tanh", "sigmoid", "erf"),
)
for _name in _FLOAT_FUNCTIONS:
    POINTWISE[_name] = (lambda name: lambda t, a: op(name, as_float(a)))(_name)


def _rounding(name: str) -> Builder:
    return lambda t, a: op(name, to(a, FLOAT)) if t is FLOAT else to(a, t)


for _name in ("floor", "ceil", "trunc"):
    POINTWISE[_name] = _rounding(_name)
POINTWISE["fix"] = POINTWISE["trunc"]
POINTWISE["arctan"] = POINTWISE["atan"]
POINTWISE["special_expit"] = POINTWISE["sigmoid"]


@row("round")
def _round(t: Type, a: Like, decimals: int = 0) -> Expr:
    if t is not FLOAT:
        return to(a, t)
    if decimals == 0:
        return op("round", as_float(a))
    factor = 10.0**decimals
    return op("div", op("round", op("mul", as_float(a), factor)), factor)


@row("frac")
def _frac(t: Type, a: Like) -> Expr:
    return op("sub", as_float(a), op("trunc", as_float(a)))


@row("log10")
def _log10(t: Type, a: Like) -> Expr:
    return op("mul", op("log", as_float(a)), 1.0 / math.log(10.0))


@row("sinh")
def _sinh(t: Type, a: Like) -> Expr:
    x = as_float(a)
    return op("mul", 0.5, op("sub", op("expm1", x), op("expm1", op("neg", x))))


@row("cosh")
def _cosh(t: Type, a: Like) -> Expr:
    x = as_float(a)
    return op("mul", 0.5, op("add", op("exp", x), op("exp", op("neg", x))))


@row("asin", "arcsin")
def _asin(t: Type, a: Like) -> Expr:
    x = as_float(a)
    other = op("mul", op("sub", 1.0, x), op("add", 1.0, x))
    return op("atan", op("div", x, op("sqrt", other)))


@row("acos", "arccos")
def _acos(t: Type, a: Like) -> Expr:
    return op("sub", math.pi / 2, _asin(t, a))


@row("atan2", "arctan2")
def _atan2(t: Type, a: Like, b: Like) -> Expr:
    y, x = as_float(a), as_float(b)
    base = op("atan", op("div", y, x))
    turn = where(op("lt", y, 0.0), -math.pi, math.pi, FLOAT)
    axis = where(op("gt", y, 0.0), math.pi / 2, where(op("lt", y, 0.0), -math.pi / 2, 0.0, FLOAT), FLOAT)
    left = where(op("lt", x, 0.0), op("add", base, turn), base, FLOAT)
    return where(op("eq", x, 0.0), axis, left, FLOAT)


@row("hypot")
def _hypot(t: Type, a: Like, b: Like) -> Expr:
    return op("sqrt", op("add", square(FLOAT, a), square(FLOAT, b)))


@row("erfc", "special_erfc")
def _erfc(t: Type, a: Like) -> Expr:
    return op("sub", 1.0, op("erf", as_float(a)))


@row("logaddexp")
def _logaddexp(t: Type, a: Like, b: Like) -> Expr:
    x, y = as_float(a), as_float(b)
    tail = op("log1p", op("exp", op("neg", op("abs", op("sub", x, y)))))
    top = op("max", x, y)
    return where(op("eq", x, y), op("add", top, math.log(2.0)), op("add", top, tail), FLOAT)


@row("xlogy", "special_xlogy")
def _xlogy(t: Type, a: Like, b: Like) -> Expr:
    x = as_float(a)
    return where(op("eq", x, 0.0), 0.0, op("mul", x, op("log", as_float(b))), FLOAT)


@row("nan_to_num")
def _nan_to_num(
    t: Type, a: Like, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Expr:
    if t is not FLOAT:
        return to(a, t)
    big = 3.4028234663852886e38  # the largest float32: what kernels compute in
    x = as_float(a)
    out = where(op("ne", x, x), nan or 0.0, x, FLOAT)
    out = where(op("eq", x, math.inf), big if posinf is None else posinf, out, FLOAT)
    return where(op("eq", x, -math.inf), -big if neginf is None else neginf, out, FLOAT)


# activations ---------------------------------------------------------------------------------------------------------


@row("relu")
def _relu(t: Type, a: Like) -> Expr:
    return op("max", to(a, t), to(0, t))


@row("leaky_relu")
def _leaky_relu(t: Type, a: Like, slope: Like = 0.01) -> Expr:
    x = as_float(a)
    return where(op("gt", x, 0.0), x, op("mul", x, as_float(slope)), FLOAT)


@row("threshold")
def _threshold(t: Type, a: Like, threshold: Like, value: Like) -> Expr:
    x = to(a, t)
    return where(op("gt", x, to(threshold, t)), x, value, t)


@row("hardtanh")
def _hardtanh(t: Type, a: Like, low: Like = -1.0, high: Like = 1.0) -> Expr:
    return clamp(t, a, low, high)


@row("silu")
def _silu(t: Type, a: Like) -> Expr:
    return op("mul", as_float(a), op("sigmoid", as_float(a)))


@row("gelu")
def _gelu(t: Type, a: Like, approximate: str = "none") -> Expr:
    x = as_float(a)
    if approximate == "tanh":
        cubic = op("add", x, op("mul", 0.044715, power(x, 3)))
        gate = op("tanh", op("mul", math.sqrt(2.0 / math.pi), cubic))
    else:
        gate = op("erf", op("mul", x, math.sqrt(0.5)))
    return op("mul", op("mul", 0.5, x), op("add", 1.0, gate))


@row("softplus")
def _softplus(t: Type, a: Like, beta: Like = 1, threshold: Like = 20) -> Expr:
    x = as_float(a)
    scaled = op("mul", x, as_float(beta))
    # log(1 + e^x) = max(x, 0) + log1p(e^-|x|) does not overflow
    value = op("add", op("max", scaled, 0.0), op("log1p", op("exp", op("neg", op("abs", scaled)))))
    return where(op("gt", scaled, as_float(threshold)), x, op("div", value, as_float(beta)), FLOAT)


@row("log_sigmoid")
def _log_sigmoid(t: Type, a: Like) -> Expr:
    return op("neg", _softplus(t, op("neg", as_float(a)), 1, math.inf))


@row("elu")
def _elu(t: Type, a: Like, alpha: Like = 1, scale: Like = 1, input_scale: Like = 1) -> Expr:
    x = as_float(a)
    low = op("mul", as_float(alpha), op("expm1", op("mul", op("min", x, 0.0), as_float(input_scale))))
    return op("mul", where(op("gt", x, 0.0), x, low, FLOAT), as_float(scale))
