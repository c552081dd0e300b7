"""Constructors that promote argument types, for front ends, passes and tests.

``add(q, 1)`` builds the same node from a Python number, a node or a mixture; Python operators on nodes are deliberately
not overloaded, because ``==`` on interned nodes means identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TypeAlias

from .nodes import Const, Expr, Index, Input, Op, Param, Scalar, Size
from .ops import promote_args, result_type
from .types import BOOL, FLOAT, INT, Type

__all__ = [
    "FALSE",
    "TRUE",
    "Like",
    "all_of",
    "any_of",
    "b",
    "cast",
    "cdiv",
    "clamp",
    "const",
    "coordinates",
    "h",
    "k",
    "op",
    "param",
    "q",
    "s",
    "size",
]

Like: TypeAlias = Expr | Scalar

b, h, q, k = Index("b"), Index("h"), Index("q"), Index("k")
s = Input("s", FLOAT)
TRUE, FALSE = Const(True, BOOL), Const(False, BOOL)


def const(value: Like) -> Expr:
    """Return ``value`` as a node; Python bool, int and float become constants of that type."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, bool):
        return TRUE if value else FALSE
    if isinstance(value, int):
        return Const(value, INT)
    if isinstance(value, float):
        return Const(value, FLOAT)
    raise TypeError(f"expected a number or an expression, got {type(value).__name__}")


def size(name: str) -> Expr:
    return Size(name)


def param(name: str, type: Type) -> Expr:
    return Param(name, type)


def cast(value: Like, to: Type) -> Expr:
    """Convert to ``to``: float to int truncates towards zero and saturates at int32, to bool means ``!= 0``."""
    node = const(value)
    if node.type is to:
        return node
    if isinstance(node, Const) and to is not INT:
        return Const({BOOL: bool, FLOAT: float}[to](node.value), to)
    if isinstance(node, Const) and node.type is BOOL:
        return Const(int(node.value), INT)
    return Op({BOOL: "to_bool", INT: "to_int", FLOAT: "to_float"}[to], (node,), to)


def op(name: str, *args: Like) -> Expr:
    """Apply operator ``name`` of the table, promoting bool to int to float where the row asks for it.

    Raises:
        KeyError: unknown operator.
        TypeError: the arguments do not fit even after promotion.
    """
    nodes = tuple(const(a) for a in args)
    wanted = promote_args(name, tuple(n.type for n in nodes))
    nodes = tuple(cast(n, t) for n, t in zip(nodes, wanted, strict=True))
    return Op(name, nodes, result_type(name, wanted))


def all_of(*terms: Like) -> Expr:
    """Conjunction of boolean terms; ``True`` when there are none."""
    nodes = [n for n in map(const, terms) if n is not TRUE]
    return reduce(lambda a, c: op("and", a, c), nodes) if nodes else TRUE


def any_of(*terms: Like) -> Expr:
    """Disjunction of boolean terms; ``False`` when there are none."""
    nodes = [n for n in map(const, terms) if n is not FALSE]
    return reduce(lambda a, c: op("or", a, c), nodes) if nodes else FALSE


def clamp(x: Like, low: Like, high: Like) -> Expr:
    """``min(max(x, low), high)``."""
    return op("min", op("max", x, low), high)


def cdiv(a: Expr, b: Expr) -> Expr:
    """The smallest whole number not below a / b, for ints and b > 0."""
    if a.type is FLOAT or b.type is FLOAT:
        raise TypeError("cdiv needs int")
    return op("floordiv", op("sub", op("add", a, b), 1), b)


def coordinates(index: Expr, extents: Sequence[Expr]) -> tuple[Expr, ...]:
    """The coordinates of ``index``, which counts the points of a grid, the last coordinate fastest.

    The first extent does not enter: what lies beyond the grid has a first coordinate beyond it.
    """
    found: list[Expr] = []
    for i, extent in enumerate(extents):
        inner = extents[i + 1 :]
        value = op("floordiv", index, reduce(lambda a, c: op("mul", a, c), inner)) if inner else index
        found.append(op("mod", value, extent) if i else value)
    return tuple(found)
