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

__all__ = ["POINTWISE", "Builder", "Unsupported", "as_float", "clamp", "power", "row", "square", "where"]

Builder = Callable[..., Expr]

POINTWISE: dict[str, Builder] = {}
"""ATen name (without overload) to builder."""


def row(*names: str) -> Callable[[Builder], Builder]:
    def put(fn: Builder) -> Builder:
        for name in names:
            POINTWISE[name] = fn
        return fn

    return put


def as_float(value: Like) -> Expr:
    return cast(value, FLOAT)


def where(cond: Like, a: Like, b: Like, type_: Type) -> Expr:
    return op("where", cast(cond, BOOL), to(a, type_), to(b, type_))


# arithmetic ----------------------------------------------------------------------------------------------------------


def _arith(name: str, logic: str) -> Builder:
    def build(t: Type, a: Like, b: Like) -> Expr:
        return op(logic if t is BOOL else name, to(a, t), to(b, t))

    return build


_mul, _min, _max = _arith("mul", "and"), _arith("min", "and"), _arith("max", "or")
POINTWISE |= {"mul": _mul, "multiply": _mul, "minimum": _min, "maximum": _max}


def _ignoring_nan(pick: Builder) -> Builder:
    def build(t: Type, a: Like, b: Like) -> Expr:
        x, y = to(a, t), to(b, t)
        if t is not FLOAT:
            return pick(t, x, y)
        return where(op("ne", x, x), y, where(op("ne", y, y), x, pick(t, x, y), t), t)

    return build


POINTWISE |= {"fmin": _ignoring_nan(_min), "fmax": _ignoring_nan(_max)}


@row("add")
def _add(t: Type, a: Like, b: Like, alpha: Like = 1) -> Expr:
    return op("or" if t is BOOL else "add", to(a, t), to(b, t) if alpha == 1 else _mul(t, b, alpha))


@row("sub", "subtract")
def _sub(t: Type, a: Like, b: Like, alpha: Like = 1) -> Expr:
    return op("sub", to(a, t), to(b, t) if alpha == 1 else _mul(t, b, alpha))


@row("rsub")
def _rsub(t: Type, a: Like, b: Like, alpha: Like = 1) -> Expr:
    return _sub(t, b, a, alpha)


def _trunc_div(a: Expr, b: Expr) -> Expr:
    if a.type is FLOAT:
        return op("trunc", op("div", a, b))
    if is_nonnegative(a) and is_nonnegative(b):
        return op("floordiv", a, b)
    size = op("floordiv", op("abs", a), op("abs", b))
    return op("where", op("xor", op("lt", a, 0), op("lt", b, 0)), op("neg", size), size)


@row("div", "divide", "true_divide")
def _div(t: Type, a: Like, b: Like, rounding_mode: str | None = None) -> Expr:
    if rounding_mode is None:
        return op("div", as_float(a), as_float(b))
    x, y = to(a, t), to(b, t)
    return op("floordiv", x, y) if rounding_mode == "floor" else _trunc_div(x, y)


@row("floor_divide")
def _floor_divide(t: Type, a: Like, b: Like) -> Expr:
    return op("floordiv", to(a, t), to(b, t))


@row("remainder")
def _remainder(t: Type, a: Like, b: Like) -> Expr:
    return op("mod", to(a, t), to(b, t))


@row("fmod")
def _fmod(t: Type, a: Like, b: Like) -> Expr:
    x, y = to(a, t), to(b, t)
    if is_nonnegative(x) and is_nonnegative(y):
        return op("mod", x, y)
    size = op("mod", op("abs", x), op("abs", y))
    return op("where", op("lt", x, 0), op("neg", size), size)


def power(base: Expr, exponent: int) -> Expr:
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


@row("pow")
def _pow(t: Type, a: Like, b: Like) -> Expr:
    base, exponent = to(a, t), const(b)
    if isinstance(exponent, Const) and float(exponent.value).is_integer() and abs(exponent.value) <= 64:
        n = int(exponent.value)
        if n == 0:
            return Const(1 if t is INT else 1.0, t)
        if n > 0:
            return power(base, n)
        if t is FLOAT:
            return op("div", 1.0, power(base, -n))
    if isinstance(exponent, Const) and t is FLOAT and abs(exponent.value) == 0.5:
        return op("sqrt" if exponent.value > 0 else "rsqrt", base)
    if t is INT:
        if isinstance(base, Const) and base.value == 2:
            return where(op("lt", exponent, 0), 0, op("shl", 1, exponent), INT)
        return op("to_int", op("round", op("pow", as_float(base), as_float(exponent))))
    return op("pow", base, as_float(exponent))


@row("neg", "negative")
def _neg(t: Type, a: Like) -> Expr:
    return op("neg", to(a, t))


@row("positive", "clone", "alias", "detach", "lift_fresh", "lift", "contiguous", "_to_copy", "real", "conj")
def _same(t: Type, a: Like, **_: Any) -> Expr:
    return to(a, t)


@row("abs", "absolute")
def _abs(t: Type, a: Like) -> Expr:
    return const(a) if t is BOOL else op("abs", to(a, t))


@row("sign", "sgn")
def _sign(t: Type, a: Like) -> Expr:
    return const(a) if t is BOOL else op("sign", to(a, t))


@row("signbit")
def _signbit(t: Type, a: Like) -> Expr:
    value = const(a)
    return build.FALSE if value.type is BOOL else op("lt", value, 0)


@row("square")
def square(t: Type, a: Like) -> Expr:
    return _mul(t, a, a)


@row("reciprocal")
def _reciprocal(t: Type, a: Like) -> Expr:
    return op("div", 1.0, as_float(a))


@row("clamp", "clip")
def clamp(t: Type, a: Like, min: Like | None = None, max: Like | None = None) -> Expr:
    out = to(a, t)
    if min is not None:
        out = op("max", out, to(min, t))
    return out if max is None else op("min", out, to(max, t))


@row("clamp_min")
def _clamp_min(t: Type, a: Like, min: Like) -> Expr:
    return clamp(t, a, min)


@row("clamp_max")
def _clamp_max(t: Type, a: Like, max: Like) -> Expr:
    return clamp(t, a, None, max)


@row("lerp")
def _lerp(t: Type, a: Like, b: Like, weight: Like) -> Expr:
    return op("add", as_float(a), op("mul", as_float(weight), op("sub", as_float(b), as_float(a))))


@row("addcmul")
def _addcmul(t: Type, a: Like, b: Like, c: Like, value: Like = 1) -> Expr:
    return _add(t, a, _mul(t, b, c), value)


@row("addcdiv")
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


@row("logical_not")
def _logical_not(t: Type, a: Like) -> Expr:
    return op("not", cast(a, BOOL))


@row("bitwise_not")
def _bitwise_not(t: Type, a: Like) -> Expr:
    return op("not" if t is BOOL else "bitnot", to(a, t))


@row("__lshift__", "bitwise_left_shift")
def _shl(t: Type, a: Like, n: Like) -> Expr:
    return op("shl", to(a, INT), to(n, INT))


@row("__rshift__", "bitwise_right_shift")
def _shr(t: Type, a: Like, n: Like) -> Expr:
    return op("shr", to(a, INT), to(n, INT))


@row("where")
def _where(t: Type, cond: Like, a: Like, b: Like) -> Expr:
    return where(cond, a, b, t)


@row("masked_fill")
def _masked_fill(t: Type, a: Like, mask: Like, value: Like) -> Expr:
    return where(mask, value, a, t)


@row("isnan")
def _isnan(t: Type, a: Like) -> Expr:
    return op("ne", as_float(a), as_float(a))


@row("isinf")
def _isinf(t: Type, a: Like) -> Expr:
    return op("eq", op("abs", as_float(a)), math.inf)


@row("isfinite")
def _isfinite(t: Type, a: Like) -> Expr:
    return op("lt", op("abs", as_float(a)), math.inf)


@row("isposinf")
def _isposinf(t: Type, a: Like) -> Expr:
    return op("eq", as_float(a), math.inf)


@row("isneginf")
def _isneginf(t: Type, a: Like) -> Expr:
    return op("eq", as_float(a), -math.inf)


@row("heaviside")
def _heaviside(t: Type, a: Like, at_zero: Like) -> Expr:
    x = to(a, join(t, INT))
    return where(op("eq", x, 0), at_zero, cast(op("gt", x, 0), t), t)


# tensors of constants ------------------------------------------------------------------------------------------------


@row("ones_like")
def _ones_like(t: Type, a: Like, **_: Any) -> Expr:
    return to(1, t)


@row("zeros_like", "empty_like")
def _zeros_like(t: Type, a: Like, **_: Any) -> Expr:
    return to(0, t)


@row("full_like")
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
