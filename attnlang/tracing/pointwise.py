"""Pointwise ATen operations as functions on scalar expressions.

Every function takes the IR type of the result first, then expressions or Python values in ATen's order. torch has
already chosen the result type; here values are converted to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from attnlang.ir import BOOL, FLOAT, INT, Const, Expr, Type, build, join
from attnlang.ir.build import Like, cast, const, op

from .errors import TraceError, current_location
from .scalars import is_nonnegative, to

__all__ = ["POINTWISE"]

Builder = Callable[..., Expr]

POINTWISE: dict[str, Builder] = {}
"""ATen name (without overload) to builder."""


def _row(*names: str) -> Callable[[Builder], Builder]:
    def put(fn: Builder) -> Builder:
        for name in names:
            POINTWISE[name] = fn
        return fn

    return put


def _f(value: Like) -> Expr:
    return cast(value, FLOAT)


def where(cond: Like, a: Like, b: Like, type_: Type) -> Expr:
    return op("where", cast(cond, BOOL), to(a, type_), to(b, type_))


# arithmetic ----------------------------------------------------------------------------------------------------------


def _arith(name: str, logic: str) -> Builder:
    def build(t: Type, a: Like, b: Like) -> Expr:
        return op(logic if t is BOOL else name, to(a, t), to(b, t))

    return build


_mul, _min, _max = _arith("mul", "and"), _arith("min", "and"), _arith("max", "or")
POINTWISE |= {"mul": _mul, "multiply": _mul, "minimum": _min, "maximum": _max, "fmin": _min, "fmax": _max}


@_row("add")
def _add(t: Type, a: Like, b: Like, alpha: Like = 1) -> Expr:
    return op("or" if t is BOOL else "add", to(a, t), to(b, t) if alpha == 1 else _mul(t, b, alpha))


@_row("sub", "subtract")
def _sub(t: Type, a: Like, b: Like, alpha: Like = 1) -> Expr:
    return op("sub", to(a, t), to(b, t) if alpha == 1 else _mul(t, b, alpha))


@_row("rsub")
def _rsub(t: Type, a: Like, b: Like, alpha: Like = 1) -> Expr:
    return _sub(t, b, a, alpha)


def _trunc_div(a: Expr, b: Expr) -> Expr:
    if a.type is FLOAT:
        return op("trunc", op("div", a, b))
    if is_nonnegative(a) and is_nonnegative(b):
        return op("floordiv", a, b)
    size = op("floordiv", op("abs", a), op("abs", b))
    return op("where", op("xor", op("lt", a, 0), op("lt", b, 0)), op("neg", size), size)


@_row("div", "divide", "true_divide")
def _div(t: Type, a: Like, b: Like, rounding_mode: str | None = None) -> Expr:
    if rounding_mode is None:
        return op("div", _f(a), _f(b))
    x, y = to(a, t), to(b, t)
    return op("floordiv", x, y) if rounding_mode == "floor" else _trunc_div(x, y)


@_row("floor_divide")
def _floor_divide(t: Type, a: Like, b: Like) -> Expr:
    return op("floordiv", to(a, t), to(b, t))


@_row("remainder")
def _remainder(t: Type, a: Like, b: Like) -> Expr:
    return op("mod", to(a, t), to(b, t))


@_row("fmod")
def _fmod(t: Type, a: Like, b: Like) -> Expr:
    x, y = to(a, t), to(b, t)
    if is_nonnegative(x) and is_nonnegative(y):
        return op("mod", x, y)
    size = op("mod", op("abs", x), op("abs", y))
    return op("where", op("lt", x, 0), op("neg", size), size)


def _power(base: Expr, exponent: int) -> Expr:
    """Return ``base ** exponent`` for exponent >= 1 by repeated squaring."""
    out: Expr | None = None
    while exponent:
        if exponent & 1:
            out = base if out is None else op("mul", out, base)
        exponent >>= 1
        if exponent:
            base = op("mul", base, base)
    assert out is not None
    return out


@_row("pow")
def _pow(t: Type, a: Like, b: Like) -> Expr:
    base, exponent = to(a, t), const(b)
    if isinstance(exponent, Const) and float(exponent.value).is_integer() and abs(exponent.value) <= 64:
        n = int(exponent.value)
        if n == 0:
            return Const(1 if t is INT else 1.0, t)
        if n > 0:
            return _power(base, n)
        if t is FLOAT:
            return op("div", 1.0, _power(base, -n))
    if isinstance(exponent, Const) and t is FLOAT and abs(exponent.value) == 0.5:
        return op("sqrt" if exponent.value > 0 else "rsqrt", base)
    if t is INT:
        if isinstance(base, Const) and base.value == 2:
            return where(op("lt", exponent, 0), 0, op("shl", 1, exponent), INT)
        return op("to_int", op("round", op("pow", _f(base), _f(exponent))))
    return op("pow", base, _f(exponent))


@_row("neg", "negative")
def _neg(t: Type, a: Like) -> Expr:
    return op("neg", to(a, t))


@_row("positive", "clone", "alias", "detach", "lift_fresh", "lift", "contiguous", "_to_copy", "real", "conj")
def _same(t: Type, a: Like, **_: Any) -> Expr:
    return to(a, t)


@_row("abs", "absolute")
def _abs(t: Type, a: Like) -> Expr:
    return const(a) if t is BOOL else op("abs", to(a, t))


@_row("sign", "sgn")
def _sign(t: Type, a: Like) -> Expr:
    return const(a) if t is BOOL else op("sign", to(a, t))


@_row("signbit")
def _signbit(t: Type, a: Like) -> Expr:
    value = const(a)
    return build.FALSE if value.type is BOOL else op("lt", value, 0)


@_row("square")
def _square(t: Type, a: Like) -> Expr:
    return _mul(t, a, a)


@_row("reciprocal")
def _reciprocal(t: Type, a: Like) -> Expr:
    return op("div", 1.0, _f(a))


@_row("clamp", "clip")
def _clamp(t: Type, a: Like, min: Like | None = None, max: Like | None = None) -> Expr:
    out = to(a, t)
    if min is not None:
        out = op("max", out, to(min, t))
    return out if max is None else op("min", out, to(max, t))


@_row("clamp_min")
def _clamp_min(t: Type, a: Like, min: Like) -> Expr:
    return _clamp(t, a, min)


@_row("clamp_max")
def _clamp_max(t: Type, a: Like, max: Like) -> Expr:
    return _clamp(t, a, None, max)


@_row("lerp")
def _lerp(t: Type, a: Like, b: Like, weight: Like) -> Expr:
    return op("add", _f(a), op("mul", _f(weight), op("sub", _f(b), _f(a))))


@_row("addcmul")
def _addcmul(t: Type, a: Like, b: Like, c: Like, value: Like = 1) -> Expr:
    return _add(t, a, _mul(t, b, c), value)


@_row("addcdiv")
def _addcdiv(t: Type, a: Like, b: Like, c: Like, value: Like = 1) -> Expr:
    return _add(t, a, _div(t, b, c), value)


# comparisons, logic, bits --------------------------------------------------------------------------------------------


def _compare(name: str) -> Builder:
    def build(t: Type, a: Like, b: Like) -> Expr:
        x, y = const(a), const(b)
        if x.type is y.type is BOOL and name in ("eq", "ne"):
            return op("xor", x, y) if name == "ne" else op("not", op("xor", x, y))
        common = join(x.type, y.type, INT)
        return op(name, to(x, common), to(y, common))

    return build


_COMPARISONS = (
    ("lt", "less"),
    ("le", "less_equal"),
    ("gt", "greater"),
    ("ge", "greater_equal"),
    ("eq", "eq"),
    ("ne", "not_equal"),
)
for _name, _alias in _COMPARISONS:
    POINTWISE[_name] = POINTWISE[_alias] = _compare(_name)


def _bits(name: str, logic: str) -> Builder:
    def build(t: Type, a: Like, b: Like) -> Expr:
        return op(logic if t is BOOL else name, to(a, t), to(b, t))

    return build


for _name, _word in (("and", "and"), ("or", "or"), ("xor", "xor")):
    POINTWISE[f"bitwise_{_name}"] = POINTWISE[f"__{_name}__"] = _bits(f"bit{_name}", _word)


def _logic(name: str) -> Builder:
    return lambda t, a, b: op(name, cast(a, BOOL), cast(b, BOOL))


for _name in ("and", "or", "xor"):
    POINTWISE[f"logical_{_name}"] = _logic(_name)


@_row("logical_not")
def _logical_not(t: Type, a: Like) -> Expr:
    return op("not", cast(a, BOOL))


@_row("bitwise_not")
def _bitwise_not(t: Type, a: Like) -> Expr:
    return op("not" if t is BOOL else "bitnot", to(a, t))


@_row("__lshift__", "bitwise_left_shift")
def _shl(t: Type, a: Like, n: Like) -> Expr:
    return op("shl", to(a, INT), to(n, INT))


@_row("__rshift__", "bitwise_right_shift")
def _shr(t: Type, a: Like, n: Like) -> Expr:
    return op("shr", to(a, INT), to(n, INT))


@_row("where")
def _where(t: Type, cond: Like, a: Like, b: Like) -> Expr:
    return where(cond, a, b, t)


@_row("masked_fill")
def _masked_fill(t: Type, a: Like, mask: Like, value: Like) -> Expr:
    return where(mask, value, a, t)


@_row("isnan")
def _isnan(t: Type, a: Like) -> Expr:
    return op("ne", _f(a), _f(a))


@_row("isinf")
def _isinf(t: Type, a: Like) -> Expr:
    return op("eq", op("abs", _f(a)), math.inf)


@_row("isfinite")
def _isfinite(t: Type, a: Like) -> Expr:
    return op("lt", op("abs", _f(a)), math.inf)


@_row("isposinf")
def _isposinf(t: Type, a: Like) -> Expr:
    return op("eq", _f(a), math.inf)


@_row("isneginf")
def _isneginf(t: Type, a: Like) -> Expr:
    return op("eq", _f(a), -math.inf)


@_row("heaviside")
def _heaviside(t: Type, a: Like, at_zero: Like) -> Expr:
    x = to(a, join(t, INT))
    return where(op("eq", x, 0), at_zero, cast(op("gt", x, 0), t), t)


# float functions -----------------------------------------------------------------------------------------------------

_FLOAT_FUNCTIONS = (
    *("exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt"),
    *("sin", "cos", "tan", "atan", "tanh", "sigmoid", "erf"),
)
for _name in _FLOAT_FUNCTIONS:
    POINTWISE[_name] = (lambda name: lambda t, a: op(name, _f(a)))(_name)


def _rounding(name: str) -> Builder:
    return lambda t, a: op(name, to(a, FLOAT)) if t is FLOAT else to(a, t)


for _name in ("floor", "ceil", "trunc"):
    POINTWISE[_name] = _rounding(_name)
POINTWISE["fix"] = POINTWISE["trunc"]
POINTWISE["arctan"] = POINTWISE["atan"]
POINTWISE["special_expit"] = POINTWISE["sigmoid"]


@_row("round")
def _round(t: Type, a: Like, decimals: int = 0) -> Expr:
    if t is not FLOAT:
        return to(a, t)
    if decimals == 0:
        return op("round", _f(a))
    factor = 10.0**decimals
    return op("div", op("round", op("mul", _f(a), factor)), factor)


@_row("frac")
def _frac(t: Type, a: Like) -> Expr:
    return op("sub", _f(a), op("trunc", _f(a)))


@_row("log10")
def _log10(t: Type, a: Like) -> Expr:
    return op("mul", op("log", _f(a)), 1.0 / math.log(10.0))


@_row("sinh")
def _sinh(t: Type, a: Like) -> Expr:
    x = _f(a)
    return op("mul", 0.5, op("sub", op("expm1", x), op("expm1", op("neg", x))))


@_row("cosh")
def _cosh(t: Type, a: Like) -> Expr:
    x = _f(a)
    return op("mul", 0.5, op("add", op("exp", x), op("exp", op("neg", x))))


@_row("asin", "arcsin")
def _asin(t: Type, a: Like) -> Expr:
    x = _f(a)
    other = op("mul", op("sub", 1.0, x), op("add", 1.0, x))
    return op("atan", op("div", x, op("sqrt", other)))


@_row("acos", "arccos")
def _acos(t: Type, a: Like) -> Expr:
    return op("sub", math.pi / 2, _asin(t, a))


@_row("atan2", "arctan2")
def _atan2(t: Type, a: Like, b: Like) -> Expr:
    y, x = _f(a), _f(b)
    base = op("atan", op("div", y, x))
    turn = where(op("lt", y, 0.0), -math.pi, math.pi, FLOAT)
    axis = where(op("gt", y, 0.0), math.pi / 2, where(op("lt", y, 0.0), -math.pi / 2, 0.0, FLOAT), FLOAT)
    left = where(op("lt", x, 0.0), op("add", base, turn), base, FLOAT)
    return where(op("eq", x, 0.0), axis, left, FLOAT)


@_row("hypot")
def _hypot(t: Type, a: Like, b: Like) -> Expr:
    return op("sqrt", op("add", _square(FLOAT, a), _square(FLOAT, b)))


@_row("erfc", "special_erfc")
def _erfc(t: Type, a: Like) -> Expr:
    return op("sub", 1.0, op("erf", _f(a)))


@_row("logaddexp")
def _logaddexp(t: Type, a: Like, b: Like) -> Expr:
    x, y = _f(a), _f(b)
    tail = op("log1p", op("exp", op("neg", op("abs", op("sub", x, y)))))
    top = op("max", x, y)
    return where(op("eq", x, y), op("add", top, math.log(2.0)), op("add", top, tail), FLOAT)


@_row("xlogy", "special_xlogy")
def _xlogy(t: Type, a: Like, b: Like) -> Expr:
    x = _f(a)
    return where(op("eq", x, 0.0), 0.0, op("mul", x, op("log", _f(b))), FLOAT)


@_row("nan_to_num")
def _nan_to_num(
    t: Type, a: Like, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Expr:
    if t is not FLOAT:
        return to(a, t)
    big = 3.4028234663852886e38  # the largest float32: what kernels compute in
    x = _f(a)
    out = where(op("ne", x, x), nan or 0.0, x, FLOAT)
    out = where(op("eq", x, math.inf), big if posinf is None else posinf, out, FLOAT)
    return where(op("eq", x, -math.inf), -big if neginf is None else neginf, out, FLOAT)


# activations ---------------------------------------------------------------------------------------------------------


@_row("relu")
def _relu(t: Type, a: Like) -> Expr:
    return op("max", to(a, t), to(0, t))


@_row("leaky_relu")
def _leaky_relu(t: Type, a: Like, slope: Like = 0.01) -> Expr:
    x = _f(a)
    return where(op("gt", x, 0.0), x, op("mul", x, _f(slope)), FLOAT)


@_row("threshold")
def _threshold(t: Type, a: Like, threshold: Like, value: Like) -> Expr:
    x = to(a, t)
    return where(op("gt", x, to(threshold, t)), x, value, t)


@_row("hardtanh")
def _hardtanh(t: Type, a: Like, low: Like = -1.0, high: Like = 1.0) -> Expr:
    return _clamp(t, a, low, high)


@_row("silu")
def _silu(t: Type, a: Like) -> Expr:
    return op("mul", _f(a), op("sigmoid", _f(a)))


@_row("gelu")
def _gelu(t: Type, a: Like, approximate: str = "none") -> Expr:
    x = _f(a)
    if approximate == "tanh":
        cubic = op("add", x, op("mul", 0.044715, _power(x, 3)))
        gate = op("tanh", op("mul", math.sqrt(2.0 / math.pi), cubic))
    else:
        gate = op("erf", op("mul", x, math.sqrt(0.5)))
    return op("mul", op("mul", 0.5, x), op("add", 1.0, gate))


@_row("softplus")
def _softplus(t: Type, a: Like, beta: Like = 1, threshold: Like = 20) -> Expr:
    x = _f(a)
    scaled = op("mul", x, _f(beta))
    # log(1 + e^x) = max(x, 0) + log1p(e^-|x|) does not overflow
    value = op("add", op("max", scaled, 0.0), op("log1p", op("exp", op("neg", op("abs", scaled)))))
    return where(op("gt", scaled, _f(threshold)), x, op("div", value, _f(beta)), FLOAT)


@_row("log_sigmoid")
def _log_sigmoid(t: Type, a: Like) -> Expr:
    return op("neg", _softplus(t, op("neg", _f(a)), 1, math.inf))


@_row("elu")
def _elu(t: Type, a: Like, alpha: Like = 1, scale: Like = 1, input_scale: Like = 1) -> Expr:
    x = _f(a)
    low = op("mul", _f(alpha), op("expm1", op("mul", op("min", x, 0.0), _f(input_scale))))
    return op("mul", where(op("gt", x, 0.0), x, low, FLOAT), _f(scale))


# tensors of constants ------------------------------------------------------------------------------------------------


@_row("ones_like")
def _ones_like(t: Type, a: Like, **_: Any) -> Expr:
    return to(1, t)


@_row("zeros_like", "empty_like")
def _zeros_like(t: Type, a: Like, **_: Any) -> Expr:
    return to(0, t)


@_row("full_like")
def _full_like(t: Type, a: Like, value: Like, **_: Any) -> Expr:
    return to(value, t)


class Unsupported(TraceError):
    """An operation has no translation."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the operation torch.{name} cannot be used on traced values",
            "write it with arithmetic, comparisons, torch.where and indexing of captured tensors, or compute it before "
            "the function is defined and capture the result",
            current_location(),
        )
