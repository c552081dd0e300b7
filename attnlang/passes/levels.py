"""Levels: the outermost loop at which an expression can be computed.

A level is decided by the set of axes an expression depends on, so hoisting out of loops is one rule and not a list of
cases.
"""

from __future__ import annotations

import enum

from attnlang.ir import Expr, Index, Input, postorder

__all__ = ["Level", "axes_of", "levels"]


class Level(enum.Enum):
    """``GRID``: once per (b, h). ``ROW``: once per query. ``COL``: once per key. ``PAIR``: once per pair."""

    GRID = "grid"
    ROW = "row"
    COL = "col"
    PAIR = "pair"


def axes_of(*roots: Expr) -> dict[Expr, frozenset[str]]:
    """Return for every node under ``roots`` the axes its value depends on."""
    out: dict[Expr, frozenset[str]] = {}
    for node in postorder(*roots):
        if isinstance(node, Index):
            out[node] = frozenset(node.axis)
        elif isinstance(node, Input):
            out[node] = frozenset(node.axes)
        else:
            out[node] = frozenset().union(*(out[a] for a in node.args))
    return out


def levels(*roots: Expr, row: str = "q", col: str = "k") -> dict[Expr, Level]:
    """Return the level of every node under ``roots``; ``row`` and ``col`` are the axes of a tile."""
    found = {(False, False): Level.GRID, (True, False): Level.ROW, (False, True): Level.COL, (True, True): Level.PAIR}
    return {node: found[row in axes, col in axes] for node, axes in axes_of(*roots).items()}
