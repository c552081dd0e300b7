"""How the gradient of a captured tensor that is read once a pair is added up.

The index map of the load decides. Where q and k are indices of their own, every pair has an element of its own. Where
the indices depend on the pair through q - k or q + k only, sums along diagonals come first and are few. Where q is
an index of its own, a query has elements of its own, and whoever holds the query adds to them in order. Anything else
is a scatter, which only atomic additions can do in parallel: of integers, whose order does not matter, where a bound of
the sums is known, and of floats otherwise.
"""

from __future__ import annotations

import enum

from attnlang.ir import Const, Expr, Index, Load, Op, postorder

__all__ = ["Scatter", "place_in_row", "scatter_of"]


class Scatter(enum.Enum):
    """``STORE``: one pair an element. ``DIFFERENCE``, ``SUM``: a function of k - q or q + k.

    ``FIXED``: any map, and the derivative is a constant, so that fixed-point sums are bounded. ``ROWS``: elements of
    one query, told apart by one index. ``ATOMIC``: the rest.
    """

    STORE = "store"
    DIFFERENCE = "difference"
    SUM = "sum"
    FIXED = "fixed"
    ROWS = "rows"
    ATOMIC = "atomic"

    @property
    def is_diagonal(self) -> bool:
        return self in (Scatter.DIFFERENCE, Scatter.SUM)


_COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})


def _slopes(node: Expr) -> tuple[int, int] | None:
    """Return the coefficients of q and k in an expression that is affine in them, None for any other."""
    if isinstance(node, Index):
        return int(node.axis == "q"), int(node.axis == "k")
    if not node.args and not hasattr(node, "axes"):
        return 0, 0
    inner = [_slopes(a) for a in node.args]
    if all(x == (0, 0) for x in inner):
        return 0, 0
    if not isinstance(node, Op) or any(x is None for x in inner):
        return None
    found = [x for x in inner if x is not None]
    match node.op:
        case "add":
            return found[0][0] + found[1][0], found[0][1] + found[1][1]
        case "sub":
            return found[0][0] - found[1][0], found[0][1] - found[1][1]
        case "neg":
            return -found[0][0], -found[0][1]
        case "mul":
            for factor, other in ((node.args[0], found[1]), (node.args[1], found[0])):
                if isinstance(factor, Const):
                    return int(factor.value) * other[0], int(factor.value) * other[1]
    return None


def _only_through(node: Expr, sign: int) -> bool:
    """Whether ``node`` depends on q and k through k + sign * q only."""
    slopes = _slopes(node)
    if slopes is None and isinstance(node, Op) and node.op in _COMPARISONS:  # a < b is a - b < 0
        left, right = map(_slopes, node.args)
        slopes = left and right and (left[0] - right[0], left[1] - right[1])
    if slopes is not None:
        return slopes[0] == sign * slopes[1]
    return bool(node.args) and all(_only_through(a, sign) for a in node.args)


def place_in_row(load: Load) -> int | None:
    """The one dimension whose index depends on the key, where another has q for its index; None for any other load."""
    found = [
        n
        for n, index in enumerate(load.indices)
        if any(isinstance(node, Index) and node.axis == "k" for node in postorder(index))
    ]
    owned = any(isinstance(index, Index) and index.axis == "q" for index in load.indices)
    return found[0] if owned and len(found) == 1 else None


def scatter_of(load: Load, derivative: Expr) -> Scatter:
    """Return how gradients at the index of ``load``, which depends on the pair, are added up.

    ``derivative`` is that of the score with respect to the load.
    """
    plain = {index.axis for index in load.indices if isinstance(index, Index)}
    if {"q", "k"} <= plain:
        return Scatter.STORE
    for kind, sign in ((Scatter.DIFFERENCE, -1), (Scatter.SUM, 1)):
        if all(_only_through(index, sign) for index in load.indices):
            return kind
    if isinstance(derivative, Const):
        return Scatter.FIXED
    return Scatter.ATOMIC if place_in_row(load) is None else Scatter.ROWS
