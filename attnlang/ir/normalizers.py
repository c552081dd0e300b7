"""Normalisers the language knows by name. Each is a record like one a user states: nothing else knows their names."""

from __future__ import annotations

from .build import Like, const, op
from .build import s as _s
from .nodes import Const, Expr
from .stages import SOFTMAX, Normalizer, Stat, stat

__all__ = ["elementwise", "entmax15", "ratio", "softmax", "sparsemax"]


def ratio(a: Like, b: Like) -> Expr:
    """``a / b``, and 0 where b is 0; so is its derivative."""
    top, bottom = const(a), const(b)
    zero = op("eq", bottom, 0.0)
    return op("where", zero, 0.0, op("div", top, op("where", zero, 1.0, bottom)))


def softmax(sink: Expr | None = None) -> Normalizer:
    """exp(s) / (sum of exp(s) + exp(sink)); ``sink`` is a float that a row knows. Statistics: ``m`` and ``l``."""
    if sink is None:
        return SOFTMAX
    shifted = op("exp", op("sub", _s, stat("m")))
    extra = op("exp", op("sub", sink, stat("m")))
    stats = (Stat("m", "max", _s, sink), Stat("l", "sum", shifted, extra))
    return Normalizer("softmax", stats, op("div", shifted, stat("l")))


def elementwise(value: Expr, divisor: Expr | str | None = None) -> Normalizer:
    """``value`` of each score, divided by ``divisor`` where there is one, 0 where that is 0.

    ``divisor`` is a float that a row knows, or ``"sum"``, ``"abs"`` or ``"count"``: the row's sum of values, of their
    magnitudes, or its number of visible keys, which is then the statistic ``total``.
    """
    if divisor is None:
        return Normalizer("elementwise", (), value)
    if isinstance(divisor, str):
        lift = {"sum": value, "abs": op("abs", value), "count": const(1.0)}[divisor]
        return Normalizer("elementwise", (Stat("total", "sum", lift),), ratio(value, stat("total")))
    plain = isinstance(divisor, Const) and divisor.value != 0
    return Normalizer("elementwise", (), op("div", value, divisor) if plain else ratio(value, divisor))


def sparsemax() -> Normalizer:
    """max(s - t, 0), with the t for which these sum to 1. Statistics: ``m`` and ``t``."""
    weight = op("max", op("sub", _s, stat("t")), 0.0)
    stats = (Stat("m", "max", _s), Stat("t", "root", weight, op("sub", stat("m"), 1.0)))
    return Normalizer("sparsemax", stats, weight)


def entmax15() -> Normalizer:
    """max(s / 2 - t, 0) squared, with the t for which these sum to 1. Statistics: ``m`` and ``t``."""
    half = op("max", op("sub", op("mul", _s, 0.5), stat("t")), 0.0)
    weight = op("mul", half, half)
    start = op("sub", op("mul", stat("m"), 0.5), 1.0)
    return Normalizer("entmax15", (Stat("m", "max", _s), Stat("t", "root", weight, start)), weight)
