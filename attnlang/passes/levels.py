"""Levels: the outermost loop at which an expression can be computed.

A level is decided by the set of axes an expression depends on, so hoisting out of loops is one rule and not a list of
cases.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

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


def _level(axes: Iterable[str]) -> Level:
    row, col = "q" in axes, "k" in axes
    return Level.PAIR if row and col else Level.ROW if row else Level.COL if col else Level.GRID


def levels(*roots: Expr) -> dict[Expr, Level]:
    """Return the level of every node under ``roots``."""
    return {node: _level(axes) for node, axes in axes_of(*roots).items()}
