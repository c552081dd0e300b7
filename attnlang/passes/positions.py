"""Positions: hooks that see other numbers than those rows are counted by, as hooks that compute them."""

from __future__ import annotations

import functools
from dataclasses import replace

from attnlang.ir import Attend, Expr, Index, map_record, substitute

__all__ = ["at_slots"]


@functools.lru_cache(maxsize=256)
def at_slots(stage: Attend) -> Attend:
    """``stage`` without positions of its own: its hooks read them as expressions of the slots.

    Rows, their addresses and the bodies of terms are about slots in any case.
    """
    if not stage.position:
        return stage
    seen: dict[Expr, Expr] = {Index(axis): e for axis, e in stage.position}

    def change(e: Expr) -> Expr:
        return substitute(e, seen)

    branches = tuple(map_record(branch, change) for branch in stage.branches)
    outputs = tuple(replace(o, value=change(o.value), key=tuple(map(change, o.key))) for o in stage.outputs)
    return replace(stage, branches=branches, outputs=outputs, position=())
