"""Where a kernel gets its runs from, as facts of a plan: the run table, or bounds it computes from its block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from attnlang.ir import INT, Expr, Input, Op, Program, format_expr, rewrite
from attnlang.passes.value_ranges import value_range
from attnlang.passes.widths import NARROW_LIMIT
from attnlang.sparsity.closed_form import (
    K_FIRST,
    K_LAST,
    KEY_TILE,
    Q_FIRST,
    Q_LAST,
    QUERY_TILE,
    RANGES,
    ClosedForm,
    TileBounds,
    closed_form,
)

__all__ = ["NAMES", "RunBounds", "forms_of", "ranges_of", "run_bounds"]

NAMES = ("tile_start", "full_start", "full_end", "tile_end")
"""What kernels call the bounds of a part, in ascending order."""

Ranges = Mapping[Expr, tuple[int | None, int | None]]


@dataclass(frozen=True)
class RunBounds:
    """The tiles along the axis ``loop`` that a block of rows meets, as arithmetic.

    Each of ``parts``, in ascending order, is a range of partial tiles, one of full tiles and one of partial tiles, as
    GRID-level expressions over ``first`` and ``last``, the first and the last row of the block (inclusive, in range),
    and ``tile``, the length of a tile. ``rises`` says that later blocks meet more tiles; ``positive`` must be at least
    1 in every launch.
    """

    loop: str
    parts: tuple[TileBounds, ...]
    first: Input
    last: Input
    tile: Input
    rises: bool
    positive: tuple[Expr, ...] = ()

    @property
    def needs(self) -> str:
        """A sentence on what a launch must see to, empty where there is nothing."""
        return f"Needs {', '.join(f'{format_expr(e)} >= 1' for e in self.positive)}." if self.positive else ""

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return tuple(e for part in self.parts for e in part.exprs)

    def __str__(self) -> str:
        return f"{self.loop}: {'; '.join(map(format_expr, self.exprs))} {'rises' if self.rises else ''}"


def forms_of(program: Program, loops: Iterable[str]) -> tuple[ClosedForm, ...]:
    """Return the closed forms that exist for inner loops over these axes."""
    found = (closed_form(program, loop) for loop in loops)
    return tuple(form for form in found if form is not None)


def ranges_of(forms: Iterable[ClosedForm], ranges: Ranges, *, wide: bool) -> dict[Expr, tuple[int | None, int | None]]:
    """Return what else is known at a launch that uses these forms: where rows lie, and which numbers are positive."""
    length = 2**31 - 1 if wide else NARROW_LIMIT
    out = dict(RANGES)
    out.update(dict.fromkeys((Q_FIRST, Q_LAST, K_FIRST, K_LAST), (0, length - 1)))
    for form in forms:
        for expr in form.positive:
            low, high = ranges.get(expr, (None, None))
            out[expr] = (1 if low is None else max(low, 1), high)
    return out


def run_bounds(form: ClosedForm, ranges: Ranges) -> RunBounds:
    """Return the bounds of ``form`` without the comparisons that ``ranges`` prove idle."""
    loop, tile = ("k", KEY_TILE) if form.first is Q_FIRST else ("q", QUERY_TILE)

    def settle(node: Expr) -> Expr:
        return _extreme(node, ranges) if isinstance(node, Op) and node.op in ("min", "max") else node

    exprs = rewrite((e for part in form.tile_bounds(tile) for e in part.exprs), settle)
    parts = tuple(TileBounds(*exprs[i : i + 4]) for i in range(0, len(exprs), 4))
    return RunBounds(loop, parts, form.first, form.last, tile, form.rises, form.positive)


def _extreme(node: Op, ranges: Ranges) -> Expr:
    """``node``, or the argument that is always the one it takes."""
    if node.type is not INT:
        return node
    for mine, other in (node.args, node.args[::-1]):
        a, b = value_range(mine, ranges), value_range(other, ranges)
        least, most = (a.lo, b.hi) if node.op == "max" else (b.lo, a.hi)
        if least is not None and most is not None and least >= most:
            return mine
    return node
