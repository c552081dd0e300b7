"""Interval rules for float operators that hold for every backend at once.

The reference computes in float64, kernels in float32 with their own ``exp`` and ``log``. A :class:`FloatRange` contains
every value any of them can get: results are widened outward by more than the rounding of float32, except where the
values are integers small enough to be exact in it. A comparison decided on disjoint ranges is therefore decided the
same way everywhere. ``nan`` says that the value may be NaN. The rules run on numpy float64 arrays and scalars alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .intervals import Interval, Truth

__all__ = ["ANY", "FLOAT_COMPARISONS", "FLOAT_RULES", "FloatRange", "from_int", "point", "to_int"]


class FloatRange(NamedTuple):
    """Inclusive float64 bounds, and whether the value may be NaN."""

    lo: Any
    hi: Any
    nan: Any


ANY = FloatRange(-np.inf, np.inf, True)
RELATIVE, FUNCTION, TINY, HUGE = 2.0**-22, 2.0**-18, 2e-38, 1e38
EXACT = 2.0**24  # integers up to here are exact in float32


def _widen(
    lo: Any, hi: Any, nan: Any, integral: bool, relative: float = RELATIVE, absolute: float = TINY
) -> FloatRange:
    """Round outward, to infinity where float32 may overflow; exact small integers stay as they are."""
    lo, hi = np.where(np.isnan(lo), -np.inf, lo), np.where(np.isnan(hi), np.inf, hi)
    room_low, room_high = (np.where(np.isinf(x), 0.0, np.abs(x) * relative + absolute) for x in (lo, hi))
    low, high = lo - room_low, hi + room_high
    if relative == RELATIVE:  # rounding keeps the sign
        low, high = np.where(lo >= 0, np.maximum(low, 0.0), low), np.where(hi <= 0, np.minimum(high, 0.0), high)
    low, high = np.where(low < -HUGE, -np.inf, low), np.where(high > HUGE, np.inf, high)
    low, high = np.where(low > HUGE, HUGE, low), np.where(high < -HUGE, -HUGE, high)
    if integral:
        small = (np.abs(lo) <= EXACT) & (np.abs(hi) <= EXACT)
        low, high = np.where(small, lo, low), np.where(small, hi, high)
    return FloatRange(low, high, nan)


def from_int(a: Interval) -> FloatRange:
    """The range of ``to_float`` of an int."""
    return _widen(np.asarray(a.lo, np.float64), np.asarray(a.hi, np.float64), False, True)


def point(value: float) -> FloatRange:
    """The range of a number that kernels may round to float32."""
    if np.isnan(value):
        return ANY
    exact = bool(np.float64(np.float32(value)) == value) if abs(value) < HUGE else False
    return FloatRange(value, value, False) if exact else _widen(value, value, False, False)


def to_int(a: FloatRange) -> Interval:
    """The range of ``to_int``: truncation, saturation at int32, and 0 for NaN."""
    lo, hi = (np.trunc(np.clip(x, -(2.0**31), 2.0**31 - 1)).astype(np.int64) for x in (a.lo, a.hi))
    lo, hi = np.where(a.nan, np.minimum(lo, 0), lo), np.where(a.nan, np.maximum(hi, 0), hi)
    return Interval(lo, hi) if np.ndim(lo) else Interval(int(lo), int(hi))


def _infinite(a: FloatRange) -> Any:
    return np.isinf(a.lo) | np.isinf(a.hi)


def _add(a: FloatRange, b: FloatRange, integral: bool) -> FloatRange:
    return _widen(a.lo + b.lo, a.hi + b.hi, a.nan | b.nan | (_infinite(a) & _infinite(b)), integral)


def _sub(a: FloatRange, b: FloatRange, integral: bool) -> FloatRange:
    return _add(a, _neg(b, integral), integral)


def _neg(a: FloatRange, integral: bool) -> FloatRange:
    return FloatRange(-a.hi, -a.lo, a.nan)


def _corners(fn: Callable[[Any, Any], Any], a: FloatRange, b: FloatRange) -> tuple[Any, Any]:
    corners = [fn(x, y) for x in a[:2] for y in b[:2]]
    corners = [np.where(np.isnan(c), 0.0, c) for c in corners]
    return np.minimum.reduce(corners), np.maximum.reduce(corners)


def _mul(a: FloatRange, b: FloatRange, integral: bool) -> FloatRange:
    wild = _infinite(a) | _infinite(b)
    lo, hi = _corners(np.multiply, a, b)
    return _widen(np.where(wild, -np.inf, lo), np.where(wild, np.inf, hi), a.nan | b.nan | wild, integral)


def _div(a: FloatRange, b: FloatRange, integral: bool) -> FloatRange:
    wild = _infinite(a) | _infinite(b) | ((b.lo <= TINY) & (b.hi >= -TINY))
    lo, hi = _corners(np.divide, a, b)
    return _widen(np.where(wild, -np.inf, lo), np.where(wild, np.inf, hi), a.nan | b.nan | wild, False)


def _floordiv(a: FloatRange, b: FloatRange, integral: bool) -> FloatRange:
    out = _div(a, b, False)
    zero = (b.lo <= 0) & (b.hi >= 0)  # the quotient by 0 is 0
    lo, hi = np.floor(out.lo), np.floor(out.hi)
    return FloatRange(np.where(zero, np.minimum(lo, 0), lo), np.where(zero, np.maximum(hi, 0), hi), out.nan)


def _mod(a: FloatRange, b: FloatRange, integral: bool) -> FloatRange:
    top = np.maximum(np.abs(b.lo), np.abs(b.hi))
    lo, hi = np.where(b.lo >= 0, 0.0, -top), np.where(b.hi <= 0, 0.0, top)
    least = np.where((b.lo <= 0) & (b.hi >= 0), 0.0, np.minimum(np.abs(b.lo), np.abs(b.hi)))
    overflow = np.maximum(np.abs(a.lo), np.abs(a.hi)) >= HUGE * np.minimum(least, 1.0)  # of the quotient on the way
    return _widen(lo, hi, a.nan | b.nan | _infinite(a) | _infinite(b) | overflow, integral)


def _abs(a: FloatRange, integral: bool) -> FloatRange:
    return FloatRange(np.maximum(0.0, np.maximum(a.lo, -a.hi)), np.maximum(-a.lo, a.hi), a.nan)


def _sign(a: FloatRange, integral: bool) -> FloatRange:
    lo, hi = np.sign(a.lo), np.sign(a.hi)  # the sign of NaN is 0 in PyTorch
    return FloatRange(np.where(a.nan, np.minimum(lo, 0.0), lo), np.where(a.nan, np.maximum(hi, 0.0), hi), a.nan)


def _extreme(pick: Callable[[Any, Any], Any]) -> Callable[[FloatRange, FloatRange, bool], FloatRange]:
    def rule(a: FloatRange, b: FloatRange, integral: bool) -> FloatRange:
        nan = a.nan | b.nan  # backends differ in what min(NaN, x) is: any of NaN and x
        lo = np.where(nan, np.minimum(a.lo, b.lo), pick(a.lo, b.lo))
        return FloatRange(lo, np.where(nan, np.maximum(a.hi, b.hi), pick(a.hi, b.hi)), nan)

    return rule


def _rising(
    fn: Callable[[Any], Any], low: float = -np.inf, closed: bool = False
) -> Callable[[FloatRange, bool], FloatRange]:
    """A function that never falls, defined above ``low`` (and at it, if ``closed``); elsewhere it may be NaN."""

    def rule(a: FloatRange, integral: bool) -> FloatRange:
        outside = ((a.lo < low) | ((a.lo == low) & (not closed))) if np.isfinite(low) else False
        lo = np.where(outside, -np.inf, fn(np.maximum(a.lo, low)))
        return _widen(lo, fn(np.maximum(a.hi, low)), a.nan | outside, False, FUNCTION, FUNCTION)

    return rule


def _exact_step(fn: Callable[[Any], Any]) -> Callable[[FloatRange, bool], FloatRange]:
    return lambda a, integral: FloatRange(fn(a.lo), fn(a.hi), a.nan)


def _wave(a: FloatRange, integral: bool) -> FloatRange:
    one = np.ones_like(a.lo)
    return FloatRange(-one, one, a.nan | _infinite(a))


def _rsqrt(a: FloatRange, integral: bool) -> FloatRange:
    bad = a.lo <= TINY
    safe = np.maximum(a.lo, 1e-30)
    lo = np.where(bad, 0.0, 1 / np.sqrt(np.maximum(a.hi, safe)))
    return _widen(lo, np.where(bad, np.inf, 1 / np.sqrt(safe)), a.nan | bad, False, FUNCTION, FUNCTION)


def _pow(a: FloatRange, b: FloatRange, integral: bool) -> FloatRange:
    bad = (a.lo <= TINY) | _infinite(a) | _infinite(b)
    lo, hi = _corners(np.power, FloatRange(np.where(bad, 1.0, a.lo), np.where(bad, 1.0, a.hi), False), b)
    lo, hi = np.where(bad, -np.inf, lo), np.where(bad, np.inf, hi)
    return _widen(lo, hi, a.nan | b.nan | bad, False, FUNCTION * 64, FUNCTION)


def _any(a: FloatRange, integral: bool) -> FloatRange:
    return ANY


def _logistic(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


FLOAT_RULES: dict[str, Callable[..., FloatRange]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "floordiv": _floordiv,
    "mod": _mod,
    "neg": _neg,
    "abs": _abs,
    "min": _extreme(np.minimum),
    "max": _extreme(np.maximum),
    "sign": _sign,
    "pow": _pow,
    "exp": _rising(np.exp),
    "exp2": _rising(np.exp2),
    "expm1": _rising(np.expm1),
    "log": _rising(np.log, 0.0),
    "log2": _rising(np.log2, 0.0),
    "log1p": _rising(np.log1p, -1.0),
    "sqrt": _rising(np.sqrt, 0.0, closed=True),
    "rsqrt": _rsqrt,
    "sin": _wave,
    "cos": _wave,
    "tan": _any,
    "atan": _rising(np.arctan),
    "tanh": _rising(np.tanh),
    "sigmoid": _rising(_logistic),
    "erf": _wave,
    "floor": _exact_step(np.floor),
    "ceil": _exact_step(np.ceil),
    "round": _exact_step(np.round),
    "trunc": _exact_step(np.trunc),
}
"""Operators that take floats to a float: ``rule(*arguments, integral)``, under ``np.errstate(all="ignore")``."""


def _lt(a: FloatRange, b: FloatRange) -> Truth:
    return Truth(a.lo < b.hi, (a.hi >= b.lo) | a.nan | b.nan)


def _le(a: FloatRange, b: FloatRange) -> Truth:
    return Truth(a.lo <= b.hi, (a.hi > b.lo) | a.nan | b.nan)


def _eq(a: FloatRange, b: FloatRange) -> Truth:
    differ = (a.lo != b.hi) | (a.hi != b.lo)
    return Truth((a.lo <= b.hi) & (b.lo <= a.hi), differ | a.nan | b.nan)


FLOAT_COMPARISONS: dict[str, Callable[[FloatRange, FloatRange], Truth]] = {
    "lt": _lt,
    "le": _le,
    "gt": lambda a, b: _lt(b, a),
    "ge": lambda a, b: _le(b, a),
    "eq": _eq,
    "ne": lambda a, b: Truth(*reversed(_eq(a, b))),
}
"""Comparisons of floats; one with NaN is False, except ``!=``."""
