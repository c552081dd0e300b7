"""Interval rules for the integer operators, written once for proofs and for the tile classifier.

An interval is a pair ``(lo, hi)`` of inclusive bounds. The rules only use ``+ - *``, comparisons, ``& |`` and the few
functions of a :class:`Carrier`, so one table runs on Python ints (proofs for the plan, :mod:`.value_ranges`) and on
numpy arrays (:mod:`attnlang.sparsity`: all tiles of a level at once). The prover and the classifier cannot drift apart.

The reference evaluates ``int`` in int64. A bound at or beyond ``±INF`` (2^61) therefore means "anything an int64 can
hold" on that side, and an operation that could leave that range, and so could wrap, gives the whole of int64. Between
INF and 2^63 the rules are needlessly careful, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

__all__ = [
    "COMPARISONS",
    "INF",
    "INT32_MAX",
    "INT32_MIN",
    "MAYBE",
    "NARROW_LIMIT",
    "RULES",
    "TOP",
    "Array",
    "Carrier",
    "Interval",
    "Narrow",
    "Python",
    "Truth",
]

INF = 2**61
INT32_MAX, INT32_MIN = 2**31 - 1, -(2**31)


class Interval(NamedTuple):
    """Inclusive bounds; in results of :func:`.value_ranges.value_range` None means unbounded on that side."""

    lo: Any
    hi: Any


class Truth(NamedTuple):
    """Which values a boolean may take; at least one is True."""

    true: Any
    false: Any


TOP = Interval(-INF, INF)
MAYBE = Truth(True, True)


class Carrier:
    """What the rules need beyond operators. This one works on Python ints and bools."""

    def minimum(self, a: Any, b: Any) -> Any:
        return a if a <= b else b

    def maximum(self, a: Any, b: Any) -> Any:
        return a if a >= b else b

    def where(self, c: Any, a: Any, b: Any) -> Any:
        return a if c else b

    def product(self, a: Any, b: Any) -> Any:
        """``a * b``, or a number of the same sign at or beyond INF where that is large."""
        return max(-2 * INF, min(2 * INF, a * b))

    def fill(self, a: Any) -> Any:
        """The smallest ``2**n - 1`` that is at least ``a`` (``a >= 0``)."""
        return (1 << a.bit_length()) - 1


class _Array(Carrier):
    """The same functions on numpy int64 and bool arrays mixed with Python numbers, which stay Python numbers."""

    def minimum(self, a: Any, b: Any) -> Any:
        return min(a, b) if isinstance(a, int) and isinstance(b, int) else np.minimum(a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        return max(a, b) if isinstance(a, int) and isinstance(b, int) else np.maximum(a, b)

    def where(self, c: Any, a: Any, b: Any) -> Any:
        if isinstance(c, bool | np.bool_):
            return a if c else b
        return a if a is b else np.where(c, a, b)

    def product(self, a: Any, b: Any) -> Any:
        if isinstance(a, int) and isinstance(b, int):
            return super().product(a, b)
        if isinstance(b, int):
            a, b = b, a
        if isinstance(a, int) and abs(a) <= 2**30 and bool(np.all(np.abs(b) <= 2**31)):
            return a * b
        estimate = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        large = np.abs(estimate) >= INF
        return np.where(large, np.where(estimate > 0, 2 * INF - 1, -2 * INF + 1), np.multiply(a, b))

    def fill(self, a: Any) -> Any:
        if isinstance(a, int):
            return super().fill(a)
        for shift in (1, 2, 4, 8, 16, 32):
            a = a | (a >> shift)
        return a


class _Narrow(_Array):
    """int32 arrays, for values proved to lie within ±2^30: "unbounded" never happens, so INF is never chosen."""

    def where(self, c: Any, a: Any, b: Any) -> Any:
        if isinstance(a, int) and abs(a) >= INF:
            return b
        if isinstance(b, int) and abs(b) >= INF:
            return a
        return super().where(c, a, b)


Python = Carrier()
Array = _Array()
Narrow = _Narrow()
NARROW_LIMIT = 2**30

Rule: TypeAlias = Callable[..., Interval]


def _unbounded(a: Interval) -> Any:
    return (a.lo <= -INF) | (a.hi >= INF)


def _checked(xp: Carrier, lo: Any, hi: Any, wraps: Any = False) -> Interval:
    """``(lo, hi)``, or everything where the operation may have wrapped."""
    bad = (lo <= -INF) | (hi >= INF) | wraps
    if bad is False:
        return Interval(lo, hi)
    return Interval(xp.where(bad, -INF, lo), xp.where(bad, INF, hi))


def _join(xp: Carrier, a: Interval, b: Interval) -> Interval:
    return Interval(xp.minimum(a.lo, b.lo), xp.maximum(a.hi, b.hi))


def _add(xp: Carrier, a: Interval, b: Interval) -> Interval:
    return _checked(xp, a.lo + b.lo, a.hi + b.hi, _unbounded(a) | _unbounded(b))


def _sub(xp: Carrier, a: Interval, b: Interval) -> Interval:
    return _checked(xp, a.lo - b.hi, a.hi - b.lo, _unbounded(a) | _unbounded(b))


def _neg(xp: Carrier, a: Interval) -> Interval:
    return _checked(xp, -a.hi, -a.lo, _unbounded(a))


def _mul(xp: Carrier, a: Interval, b: Interval) -> Interval:
    corners = [xp.product(x, y) for x in a for y in b]
    low, high = corners[0], corners[0]
    for corner in corners[1:]:
        low, high = xp.minimum(low, corner), xp.maximum(high, corner)
    return _checked(xp, low, high)


def _abs(xp: Carrier, a: Interval) -> Interval:
    lo, hi = xp.maximum(a.lo, xp.maximum(-a.hi, 0)), xp.maximum(-a.lo, a.hi)
    wraps = a.lo <= -INF  # abs(INT64_MIN) is INT64_MIN
    return Interval(xp.where(wraps, -INF, lo), xp.where(wraps, INF, hi))


def _min(xp: Carrier, a: Interval, b: Interval) -> Interval:
    return Interval(xp.minimum(a.lo, b.lo), xp.minimum(a.hi, b.hi))


def _max(xp: Carrier, a: Interval, b: Interval) -> Interval:
    return Interval(xp.maximum(a.lo, b.lo), xp.maximum(a.hi, b.hi))


def _sign(xp: Carrier, a: Interval) -> Interval:
    return Interval(*(xp.maximum(-1, xp.minimum(1, x)) for x in a))


def _div_positive(xp: Carrier, a: Interval, b: Interval) -> Interval:
    """``a // b`` for ``b >= 1``: monotone in a; decreasing in b where a >= 0 and increasing where a < 0."""
    if b.lo is b.hi and b.lo == 1:
        return a
    if b.lo is b.hi:
        return Interval(xp.where(a.lo <= -INF, -INF, a.lo // b.lo), xp.where(a.hi >= INF, INF, a.hi // b.lo))
    lo = xp.where(a.lo >= 0, a.lo // b.hi, a.lo // b.lo)
    hi = xp.where(a.hi >= 0, a.hi // b.lo, a.hi // b.hi)
    return Interval(xp.where(a.lo <= -INF, -INF, lo), xp.where(a.hi >= INF, INF, hi))


def _mod_positive(xp: Carrier, a: Interval, b: Interval) -> Interval:
    """``a % b`` for ``b >= 1``: exact in one quotient of a single divisor, or below every divisor."""
    low, high = a.lo // b.lo, a.hi // b.lo
    same = (low == high) & (a.lo > -INF) & (a.hi < INF)
    if b.lo is b.hi:  # one divisor: what lies below it lies in one quotient
        return Interval(xp.where(same, a.lo - low * b.lo, 0), xp.where(same, a.hi - high * b.lo, b.hi - 1))
    same = same & (b.lo == b.hi)
    small = (a.lo >= 0) & (a.hi < b.lo)
    top = b.hi - 1
    top = xp.where((a.lo >= 0) & (a.hi < top), a.hi, top)
    lo = xp.where(small, a.lo, xp.where(same, a.lo - low * b.lo, 0))
    hi = xp.where(small, a.hi, xp.where(same, a.hi - high * b.lo, top))
    return Interval(lo, hi)


def _by_sign(positive: Rule, mirror: Callable[[Carrier, Interval], Interval] | None) -> Rule:
    """Extend a rule for divisors >= 1 to all divisors: -b mirrors the operands, and 0 gives 0."""

    def rule(xp: Carrier, a: Interval, b: Interval) -> Interval:
        if isinstance(b.lo, int) and isinstance(b.hi, int) and b.lo >= 1:
            return positive(xp, a, b)
        some_positive, some_negative = b.hi >= 1, b.lo <= -1
        some_zero = (b.lo <= 0) & (b.hi >= 0)
        lo, hi = xp.where(some_zero, 0, INF), xp.where(some_zero, 0, -INF)
        above = positive(xp, a, Interval(xp.maximum(b.lo, 1), xp.maximum(b.hi, 1)))
        below = positive(xp, _neg(xp, a), Interval(xp.maximum(-b.hi, 1), xp.maximum(-b.lo, 1)))
        if mirror is not None:
            below = mirror(xp, below)
        for part, there in ((above, some_positive), (below, some_negative)):
            lo = xp.where(there, xp.minimum(lo, part.lo), lo)
            hi = xp.where(there, xp.maximum(hi, part.hi), hi)
        return Interval(lo, hi)

    return rule


def _shl(xp: Carrier, a: Interval, n: Interval) -> Interval:
    low, high = (xp.maximum(0, xp.minimum(63, x)) for x in n)
    far = high >= 60
    factor = Interval(1 << xp.minimum(low, 60), 1 << xp.minimum(high, 60))
    out = _mul(xp, a, factor)
    return Interval(xp.where(far, -INF, out.lo), xp.where(far, INF, out.hi))


def _shr(xp: Carrier, a: Interval, n: Interval) -> Interval:
    low, high = (xp.maximum(0, xp.minimum(63, x)) for x in n)
    lo = xp.where(a.lo >= 0, a.lo >> high, a.lo >> low)
    hi = xp.where(a.hi >= 0, a.hi >> low, a.hi >> high)
    return Interval(xp.where(a.lo <= -INF, -INF, lo), xp.where(a.hi >= INF, INF, hi))


def _magnitude(xp: Carrier, *operands: Interval) -> Any:
    """A number 2^n - 1 such that every operand lies in [-2^n, 2^n - 1]."""
    most: Any = 0
    for a in operands:
        most = xp.maximum(most, xp.maximum(a.hi, -a.lo - 1))
    return xp.fill(most)


def _bits(xp: Carrier, lo: Any, hi: Any, *operands: Interval) -> Interval:
    wide = _unbounded(operands[0]) | _unbounded(operands[-1])
    # an unbounded operand leaves a proved sign in place
    return Interval(xp.where(wide & (lo < 0), -INF, lo), xp.where(wide & (hi > 0), INF, hi))


def _bitand(xp: Carrier, a: Interval, b: Interval) -> Interval:
    fill = _magnitude(xp, a, b)
    lo = xp.where((a.lo >= 0) | (b.lo >= 0), 0, -fill - 1)
    hi = xp.where((a.lo >= 0) & (b.lo >= 0), xp.minimum(a.hi, b.hi), fill)
    hi = xp.where((a.lo >= 0) & (b.lo < 0), a.hi, xp.where((b.lo >= 0) & (a.lo < 0), b.hi, hi))
    hi = xp.where((a.hi < 0) & (b.hi < 0), xp.minimum(a.hi, b.hi), hi)
    wide = _unbounded(a) & _unbounded(b)
    return Interval(
        xp.where((lo < 0) & (_unbounded(a) | _unbounded(b)), -INF, lo),
        xp.where((hi > 0) & (wide | ((a.lo < 0) & (b.lo < 0) & (_unbounded(a) | _unbounded(b)))), INF, hi),
    )


def _bitor(xp: Carrier, a: Interval, b: Interval) -> Interval:
    fill = _magnitude(xp, a, b)
    negative = (a.hi < 0) | (b.hi < 0)
    lo = xp.where((a.lo >= 0) & (b.lo >= 0), xp.maximum(a.lo, b.lo), -fill - 1)
    return _bits(xp, lo, xp.where(negative, -1, fill), a, b)


def _bitxor(xp: Carrier, a: Interval, b: Interval) -> Interval:
    fill = _magnitude(xp, a, b)
    same = ((a.lo >= 0) & (b.lo >= 0)) | ((a.hi < 0) & (b.hi < 0))
    differ = ((a.lo >= 0) & (b.hi < 0)) | ((a.hi < 0) & (b.lo >= 0))
    return _bits(xp, xp.where(same, 0, -fill - 1), xp.where(differ, -1, fill), a, b)


def _bitnot(xp: Carrier, a: Interval) -> Interval:
    return _checked(xp, -a.hi - 1, -a.lo - 1, _unbounded(a))


def _where(xp: Carrier, c: Truth, a: Interval, b: Interval) -> Interval:
    both = _join(xp, a, b)
    return Interval(
        xp.where(c.true, xp.where(c.false, both.lo, a.lo), b.lo),
        xp.where(c.true, xp.where(c.false, both.hi, a.hi), b.hi),
    )


RULES: dict[str, Rule] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "floordiv": _by_sign(_div_positive, None),
    "mod": _by_sign(_mod_positive, _neg),
    "neg": _neg,
    "abs": _abs,
    "min": _min,
    "max": _max,
    "sign": _sign,
    "bitand": _bitand,
    "bitor": _bitor,
    "bitxor": _bitxor,
    "bitnot": _bitnot,
    "shl": _shl,
    "shr": _shr,
    "where": _where,
}
"""Operators that take ints (and a condition) to an int: ``rule(carrier, *arguments) -> Interval``."""


def _lt(a: Interval, b: Interval) -> Truth:
    return Truth(a.lo < b.hi, a.hi >= b.lo)


def _le(a: Interval, b: Interval) -> Truth:
    return Truth(a.lo <= b.hi, a.hi > b.lo)


def _eq(a: Interval, b: Interval) -> Truth:
    single = (a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo)
    return Truth((a.lo <= b.hi) & (b.lo <= a.hi), single == False)  # noqa: E712 - elementwise on arrays


def _decided(rule: Callable[[Interval, Interval], Truth]) -> Callable[[Interval, Interval], Truth]:
    """Bounds at ±INF stand for values beyond them, so they decide nothing."""

    def checked(a: Interval, b: Interval) -> Truth:
        out = rule(a, b)
        far = ((a.hi >= INF) & (b.hi >= INF)) | ((a.lo <= -INF) & (b.lo <= -INF))
        return Truth(out.true | far, out.false | far)

    return checked


COMPARISONS: dict[str, Callable[[Interval, Interval], Truth]] = {
    "lt": _decided(_lt),
    "le": _decided(_le),
    "gt": lambda a, b: COMPARISONS["lt"](b, a),
    "ge": lambda a, b: COMPARISONS["le"](b, a),
    "eq": _decided(_eq),
    "ne": lambda a, b: Truth(*reversed(COMPARISONS["eq"](a, b))),
}
"""Comparisons of ints: ``rule(a, b) -> Truth``."""
