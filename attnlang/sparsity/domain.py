"""One step of abstract evaluation: the range of a node from the ranges of its arguments, on either carrier."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlang.ir import BOOL, FLOAT
from attnlang.passes.float_intervals import FLOAT_COMPARISONS, FLOAT_RULES, FloatRange, from_int, point, to_int
from attnlang.passes.intervals import COMPARISONS, RULES, TOP, Carrier, Interval, Truth

if TYPE_CHECKING:
    from .terms import Node

__all__ = ["TRUTH_RULES", "apply"]


def _as_bit(xp: Carrier, a: Truth) -> Interval:
    return Interval(xp.where(a.false, 0, 1), xp.where(a.true, 1, 0))


def _bool_to_float(a: Truth) -> FloatRange:
    return FloatRange(np.where(a.false, 0.0, 1.0), np.where(a.true, 1.0, 0.0), False)


def _select_float(c: Truth, a: FloatRange, b: FloatRange) -> FloatRange:
    lo = np.where(c.true, np.where(c.false, np.minimum(a.lo, b.lo), a.lo), b.lo)
    hi = np.where(c.true, np.where(c.false, np.maximum(a.hi, b.hi), a.hi), b.hi)
    return FloatRange(lo, hi, (c.true & a.nan) | (c.false & b.nan))


def _conjunction(*args: Truth) -> Truth:
    true, false = args[0]
    for a in args[1:]:
        true, false = true & a.true, false | a.false
    return Truth(true, false)


def _disjunction(*args: Truth) -> Truth:
    true, false = args[0]
    for a in args[1:]:
        true, false = true | a.true, false & a.false
    return Truth(true, false)


TRUTH_RULES: dict[str, Callable[..., Truth]] = {
    "lt0": lambda a: Truth(a.lo < 0, a.hi >= 0),
    "eq0": lambda a: Truth((a.lo <= 0) & (a.hi >= 0), (a.lo != 0) | (a.hi != 0)),
    "lt": COMPARISONS["lt"],
    "le": COMPARISONS["le"],
    "eq": COMPARISONS["eq"],
    "and": _conjunction,
    "or": _disjunction,
    "not": lambda a: Truth(a.false, a.true),
    "xor": lambda a, b: Truth((a.true & b.false) | (a.false & b.true), (a.true & b.true) | (a.false & b.false)),
    "ite": lambda c, a, b: Truth((c.true & a.true) | (c.false & b.true), (c.true & a.false) | (c.false & b.false)),
    "nonzero": lambda a: FLOAT_COMPARISONS["ne"](a, FloatRange(0.0, 0.0, False)),
}
"""Nodes with a truth value beside comparisons of floats (``f`` and a name of FLOAT_COMPARISONS)."""


def _truth(node: Node, args: list[Any]) -> Truth:
    rule = TRUTH_RULES.get(node.op)
    return rule(*args) if rule else FLOAT_COMPARISONS[node.op[1:]](*args)


def _float(node: Node, args: list[Any]) -> FloatRange:
    match node.op:
        case "const":
            return point(float.fromhex(node.data))
        case "fto_float":
            return _bool_to_float(args[0]) if isinstance(args[0], Truth) else from_int(args[0])
        case "fwhere":
            return _select_float(*args)
    return FLOAT_RULES[node.op[1:]](*args, node.integral)


def apply(xp: Carrier, node: Node, args: list[Any], _: None = None) -> Any:
    """Return an Interval, Truth or FloatRange according to ``node.type``.

    ``args`` are the ranges of the node's arguments. Loads and indices are not computed here. Call it under
    ``np.errstate(all="ignore")``.
    """
    if node.type is BOOL:
        return _truth(node, args)
    if node.type is FLOAT:
        return _float(node, args)
    match node.op:
        case "far":
            return TOP
        case "to_int":
            return _as_bit(xp, args[0]) if isinstance(args[0], Truth) else to_int(args[0])
    return RULES[node.op](xp, *args)
