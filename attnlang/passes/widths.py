"""Storage widths: int32 where ranges prove it enough, int64 elsewhere."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from attnlang.ir import BOOL, FLOAT, Const, Expr, Index, Load, Param, Size, postorder

from .value_ranges import value_ranges

__all__ = ["INT_RANGES", "NARROW_LIMIT", "Width", "assumptions", "widths"]

NARROW_LIMIT = 2**28
"""Kernels of the narrow kind are launched only when every length and int parameter is below this in magnitude.

Small enough that sums of a few of them, as in ``q - k + window - 1``, are proved to fit int32.
"""

INT_RANGES = {
    "int8": (-(2**7), 2**7 - 1),
    "uint8": (0, 2**8 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "bool": (0, 1),
}


class Width(enum.Enum):
    """How a kernel stores a value."""

    BOOL = "bool"
    I32 = "int32"
    I64 = "int64"
    F32 = "float32"


def assumptions(
    roots: tuple[Expr, ...], storage: Mapping[str, str], *, wide: bool = False
) -> dict[Expr, tuple[int | None, int | None]]:
    """Return bounds of the leaves of ``roots`` that hold at every launch of a narrow (or wide) kernel."""
    limit = 2**62 if wide else NARROW_LIMIT
    length = 2**31 if wide else NARROW_LIMIT
    bounds: dict[Expr, tuple[int | None, int | None]] = {}
    for node in postorder(*roots):
        match node:
            case Index():
                bounds[node] = (0, length - 1)
            case Size():
                bounds[node] = (0, length)
            case Param():
                bounds[node] = (-limit, limit)
            case Load(tensor=name):
                bounds[node] = INT_RANGES.get(storage.get(name, ""), (None, None))
    return bounds


def widths(roots: tuple[Expr, ...], bounds: Mapping[Expr, tuple[int | None, int | None]]) -> dict[Expr, Width]:
    """Return the width of every node under ``roots``."""
    out: dict[Expr, Width] = {}
    ranges = value_ranges(*roots, bounds=bounds)
    for node in postorder(*roots):
        if node.type is BOOL:
            out[node] = Width.BOOL
        elif node.type is FLOAT:
            out[node] = Width.F32
        else:
            span = ranges[node]
            fits = span.lo is not None and span.hi is not None and span.lo >= -(2**31) and span.hi < 2**31
            operands_fit = isinstance(node, (Const, Load)) or all(out[a] is not Width.I64 for a in node.args)
            out[node] = Width.I32 if fits and operands_fit else Width.I64
    return out
