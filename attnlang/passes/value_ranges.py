"""What values an int expression can take wherever it is evaluated: the interval rules, walked over the expression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnlang.ir import BOOL, INT, Const, Expr, Index, Op, Size, postorder

from .intervals import COMPARISONS, INF, INT32_MAX, INT32_MIN, MAYBE, RULES, TOP, Interval, Python, Truth

__all__ = ["value_range", "value_ranges"]


def _logic(name: str, args: list[Truth]) -> Truth:
    a, c = args[0], args[-1]
    match name:
        case "not":
            return Truth(a.false, a.true)
        case "and":
            return Truth(a.true & c.true, a.false | c.false)
        case "or":
            return Truth(a.true | c.true, a.false & c.false)
        case "xor":
            return Truth((a.true & c.false) | (a.false & c.true), (a.true & c.true) | (a.false & c.false))
    return MAYBE


def _leaf(node: Expr) -> Any:
    match node:
        case Const(value=value) if node.type is INT:
            return Interval(int(value), int(value)) if abs(value) < INF else TOP
        case Const(value=value) if node.type is BOOL:
            return Truth(bool(value), not value)
        case Index():
            return Interval(0, INT32_MAX - 1)
        case Size():
            return Interval(0, INT32_MAX)
    return MAYBE if node.type is BOOL else TOP


def _apply(node: Op, args: list[Any]) -> Any:
    name, kind = node.op, node.args[0].type
    if name in COMPARISONS and kind is INT:
        return COMPARISONS[name](*args)
    if name == "to_int":
        if kind is INT:
            return args[0]
        return Interval(int(not args[0].false), int(args[0].true)) if kind is BOOL else Interval(INT32_MIN, INT32_MAX)
    if name == "to_bool" and kind is INT:
        return COMPARISONS["ne"](args[0], Interval(0, 0))
    if node.type is INT:
        return RULES[name](Python, *args)
    if name == "where" and node.type is BOOL:
        c, a, b = args
        return Truth((c.true & a.true) | (c.false & b.true), (c.true & a.false) | (c.false & b.false))
    return _logic(name, args) if node.type is BOOL and kind is BOOL else _leaf(node)


def value_ranges(
    *roots: Expr, bounds: Mapping[Expr, tuple[int | None, int | None]] | None = None
) -> dict[Expr, Interval]:
    """Return what :func:`value_range` says of every int node under ``roots``, in one walk."""
    known = bounds or {}
    done: dict[Expr, Any] = {}
    for node in postorder(*roots):
        args = [done[a] for a in node.args]
        value = _apply(node, args) if isinstance(node, Op) else _leaf(node)
        if node in known and node.type is INT:
            lo, hi = known[node]
            lo, hi = (-INF if lo is None else lo), (INF if hi is None else hi)
            value = Interval(max(value.lo, lo), min(value.hi, hi))
        done[node] = value
    return {
        node: Interval(None if x.lo <= -INF else x.lo, None if x.hi >= INF else x.hi)
        for node, x in done.items()
        if node.type is INT
    }


def value_range(expr: Expr, bounds: Mapping[Expr, tuple[int | None, int | None]] | None = None) -> Interval:
    """Return bounds that hold for ``expr`` (an int) wherever it is evaluated; None where it has none.

    ``bounds`` gives known ranges of any nodes (indices, sizes, parameters, loads, whole sub-expressions). Defaults:
    an ``Index`` lies in [0, 2^31 - 2], a ``Size`` in [0, 2^31 - 1], a parameter or load anywhere in int64.

    Raises:
        TypeError: ``expr`` is not an int.
    """
    if expr.type is not INT:
        raise TypeError(f"value_range needs an int expression, got {expr.type}")
    return value_ranges(expr, bounds=bounds)[expr]
