"""Run bounds as arithmetic: where a mask is an interval of keys for each query, no table is needed at all.

For masks made of comparisons affine in q and k, floor divisions by positive numbers, ``min max abs`` and conditions on
the query, the keys that a block of queries q_first..q_last sees follow from its ends: bounds that rise with q are least
at q_first and greatest at q_last. :func:`closed_form` solves every comparison for k and returns expressions in the IR
over ``q_first``, ``q_last``, sizes, parameters and per-batch or per-head captures. A kernel evaluates them from its
program id; :meth:`ClosedForm.run_map` evaluates them for all rows at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from attnlang.ir import (
    INT,
    Environment,
    Expr,
    Index,
    Input,
    Load,
    Op,
    Param,
    Program,
    Scalar,
    Size,
    evaluate,
    postorder,
    substitute,
)
from attnlang.ir.build import Like, const, op
from attnlang.passes.simplify import simplify
from attnlang.passes.value_ranges import value_range, value_ranges
from attnlang.passes.widths import INT_RANGES

from .analyse import check_sizes
from .classify import numbers
from .runmap import FULL, PARTIAL, RunMap, build_runs
from .solve import FIRST, LAST, LK, Keys, NoClosedForm, Solver, direction, widths

__all__ = [
    "KEY_TILE",
    "K_FIRST",
    "K_LAST",
    "QUERY_TILE",
    "Q_FIRST",
    "Q_LAST",
    "RANGES",
    "ClosedForm",
    "Part",
    "TileBounds",
    "closed_form",
]

Q_FIRST, Q_LAST = FIRST, LAST
K_FIRST, K_LAST = Input("k_first", INT, "bh"), Input("k_last", INT, "bh")
"""The first and the last key (inclusive, in range) of a block of rows of the transposed mask."""
KEY_TILE, QUERY_TILE = Input("key_tile", INT, ""), Input("query_tile", INT, "")
"""Keys and queries of a tile, for bounds whose tile is not known yet."""
RANGES: dict[Expr, tuple[int | None, int | None]] = {
    **dict.fromkeys((Q_FIRST, Q_LAST, K_FIRST, K_LAST), (0, 2**31 - 2)),
    **dict.fromkeys((KEY_TILE, QUERY_TILE), (1, 2**16)),
}
"""What holds for the inputs of bounds at every launch."""
REMEMBERED = 4096
"""Sizes and parameters whose conditions are remembered."""


@dataclass(frozen=True)
class Part:
    """Keys that rows q_first..q_last see, as int expressions.

    No row sees a key outside [touched_lo, touched_hi); every row sees every key in [full_lo, full_hi). The bounds are
    not clamped to the keys, and an interval may be empty with lo > hi; it is where one of ``widths`` is not positive.
    """

    touched_lo: Expr
    touched_hi: Expr
    full_lo: Expr
    full_hi: Expr
    widths: tuple[Expr, ...] = ()

    @property
    def exprs(self) -> tuple[Expr, Expr, Expr, Expr]:
        return self.touched_lo, self.touched_hi, self.full_lo, self.full_hi


@dataclass(frozen=True)
class TileBounds:
    """Ascending numbers of key tiles: [start, full_start) and [full_end, end) partial, [full_start, full_end) full."""

    start: Expr
    full_start: Expr
    full_end: Expr
    end: Expr

    @property
    def exprs(self) -> tuple[Expr, Expr, Expr, Expr]:
        return self.start, self.full_start, self.full_end, self.end


@dataclass(frozen=True)
class ClosedForm:
    """Keys that a block of rows sees, as the union of ``parts``; each begins at or after the one before it.

    Rows are queries and ``length`` is Lk; in the form of a transposed mask rows are keys and ``length`` is Lq.
    ``positive`` are expressions over sizes and parameters that must be at least 1 for this to hold
    (:meth:`holds`). ``rises`` says whether later rows see more keys. ``exact`` says that the bounds are those of the
    rows and not beyond them.
    """

    mask: Expr
    parts: tuple[Part, ...]
    positive: tuple[Expr, ...]
    length: Size
    first: Input
    last: Input
    rises: bool
    exact: bool
    _known: dict[Any, bool] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def exprs(self) -> tuple[Expr, ...]:
        """Every bound and width of every part."""
        return tuple(e for part in self.parts for e in (*part.exprs, *part.widths))

    def tile_bounds(self, tile: Like, *, whole_edge: bool = False) -> tuple[TileBounds, ...]:
        """Return for each part its bounds in key tiles of ``tile`` keys; what parts share belongs to the first.

        A tile cut by the last key is not among the full ones, except with ``whole_edge``.
        """
        out: list[TileBounds] = []
        done: Expr = const(0)
        for low, high, full_low, full_high in self._apart():
            start = _greater(_whole_tiles(low, tile), done)
            end = _greater(start, _tiles(high, tile))
            if low is not const(0):  # an interval that is empty as a whole touches nothing
                end = op("where", op("lt", low, high), end, start)
            full_start = _greater(start, _tiles(full_low, tile))
            full_start = full_start if full_start is start else op("min", full_start, end)
            full_end = _whole_tiles(full_high, tile)
            if whole_edge:
                full_end = op("where", op("eq", full_high, self.length), _tiles(full_high, tile), full_end)
            full_end = _greater(full_start, op("min", full_end, end))
            out.append(TileBounds(start, full_start, full_end, end))
            done = end
        return tuple(out)

    def _apart(self) -> list[tuple[Expr, Expr, Expr, Expr]]:
        """The bounds of each part within [0, length]; where two parts meet in every row, the first is both of them."""
        parts = [self._inside_all(part) for part in self.parts]
        if len(parts) == 2:
            (low, high, full_low, full_high), (low2, high2, full_low2, full_high2) = parts
            meet = op("le", full_low2, full_high)
            high, full_high = (
                op("where", meet, op("max", a, c), a) for a, c in ((high, high2), (full_high, full_high2))
            )
            high2, full_high2 = (op("where", meet, 0, a) for a in (high2, full_high2))
            parts = [(low, high, full_low, full_high), (low2, high2, full_low2, full_high2)]
        return parts

    def _inside_all(self, part: Part) -> tuple[Expr, Expr, Expr, Expr]:
        low, high, full_low, full_high = map(self._inside, part.exprs)
        for width in part.widths:
            high, full_high = (op("where", op("gt", width, 0), x, 0) for x in (high, full_high))
        return low, high, full_low, full_high

    def _inside(self, bound: Expr) -> Expr:
        """``bound`` moved into [0, length], without the comparisons that are known to change nothing."""
        bound = _greater(bound, const(0))
        return bound if bound in (const(0), self.length) else op("min", bound, self.length)

    # --- whether it holds

    @cached_property
    def _reads(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Names of the sizes, parameters and tensors the mask depends on."""
        nodes = list(postorder(self.mask, *self.exprs, *self.positive))
        return (
            tuple(dict.fromkeys(("Lq", "Lk", *(n.name for n in nodes if isinstance(n, Size))))),
            tuple(dict.fromkeys(n.name for n in nodes if isinstance(n, Param))),
            tuple(dict.fromkeys(n.tensor for n in nodes if isinstance(n, Load))),
        )

    def holds(self, sizes: Mapping[str, int], params: Mapping[str, Scalar], storage: Mapping[str, str]) -> bool:
        """Return whether the bounds are right at these sizes and parameters, for tensors of these dtypes.

        Divisors must be positive, and no int of the mask or of the bounds may leave 62 bits, where they could wrap.
        """
        names = self._reads
        key = (
            tuple([sizes[n] for n in names[0]]),
            tuple([params[n] for n in names[1]]),
            tuple([storage[n] for n in names[2]]),
        )
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            found = self._known[key] = self._holds(sizes, params, storage)
        return found

    def _holds(self, sizes: Mapping[str, int], params: Mapping[str, Scalar], storage: Mapping[str, str]) -> bool:
        roots = (self.mask, *self.exprs, *self.positive)
        bounds: dict[Expr, tuple[int | None, int | None]] = {}
        for node in postorder(*roots):
            match node:
                case Size(name=name):
                    bounds[node] = (sizes[name], sizes[name])
                case Param(name=name, type=type_) if type_ is INT:
                    bounds[node] = (int(params[name]), int(params[name]))
                case Load(tensor=name):
                    bounds[node] = INT_RANGES.get(storage[name], (None, None))
        queries, keys = ((0, max(0, sizes[n] - 1)) for n in ("Lq", "Lk"))
        bounds |= {Index("q"): queries, Q_FIRST: queries, Q_LAST: queries}
        bounds |= {Index("k"): keys, K_FIRST: keys, K_LAST: keys}
        found = value_ranges(*roots, bounds=bounds)
        if not all(_at_least(found[e].lo, 1) for e in self.positive):
            return False
        return all(None not in span for node, span in found.items() if not _passes_on(node))

    # --- evaluation

    def run_map(
        self,
        program: Program,
        sizes: Mapping[str, int],
        params: Mapping[str, Any] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        tile: tuple[int, int] = (128, 128),
    ) -> RunMap:
        """Evaluate the bounds for every row of tiles: the run map without any search, in O(rows).

        Raises:
            UsageError: a size or tile is out of range.
        """
        check_sizes(sizes, tile)
        bm, bn = tile
        lq, lk = sizes["Lq"], sizes["Lk"]
        nq = -(-lq // bm)
        bounds = self.tile_bounds(bn, whole_edge=True)
        read = {n.axis for n in postorder(*self.exprs) if isinstance(n, Index)}
        batch, heads = (sizes.get(n, 1) if a in read else 1 for a, n in (("b", "B"), ("h", "H")))
        first = torch.arange(nq).view(1, 1, -1) * bm
        inputs = {self.first.name: first, self.last.name: (first + bm).clamp(max=lq) - 1}
        axes = {"b": torch.arange(batch).view(-1, 1, 1), "h": torch.arange(heads).view(1, -1, 1)}
        captured = {n: (tensors or {})[n].cpu() for n in self._reads[2]}
        env = Environment(axes, sizes, numbers(params or {}, program), captured, inputs)
        row = np.arange(batch * heads * nq)
        columns: list[list[np.ndarray]] = [[], [], [], []]
        for part in bounds:
            start, full_start, full_end, end = (
                evaluate(e, env).expand(batch, heads, nq).reshape(-1).numpy() for e in part.exprs
            )
            for a, b, kind in ((start, full_start, PARTIAL), (full_start, full_end, FULL), (full_end, end, PARTIAL)):
                pick = np.nonzero(a < b)[0]
                for column, values in zip(columns, (row, a, b), strict=False):
                    column.append(values[pick])
                columns[3].append(np.full(len(pick), kind))
        joined = [np.concatenate(x) for x in columns]
        runs = build_runs(joined[0], joined[1], joined[2], joined[3], len(row))
        return RunMap(tile, (lq, lk), batch, heads, *runs)


def _passes_on(node: Expr) -> bool:
    """Whether ``node`` is a value that exists or one of its arguments, so that it cannot wrap by itself."""
    return isinstance(node, Load) or (isinstance(node, Op) and node.op in ("min", "max", "where"))


def _at_least(low: int | None, limit: int) -> bool:
    return low is not None and low >= limit


def _greater(a: Expr, b: Expr) -> Expr:
    """``max(a, b)``, without the comparison where one is 0 and the other known not to be negative."""
    for zero, other in ((b, a), (a, b)):
        if zero is const(0) and _at_least(value_range(other, RANGES).lo, 0):
            return other
    return op("max", a, b)


def _whole_tiles(keys: Expr, tile: Like) -> Expr:
    """Tiles that lie within the keys [0, keys)."""
    return keys if keys is const(0) else op("floordiv", keys, tile)


def _tiles(keys: Expr, tile: Like) -> Expr:
    """Tiles that hold the keys [0, keys)."""
    return keys if keys is const(0) else op("floordiv", simplify(op("add", op("sub", keys, 1), tile)), tile)


def closed_form(program: Program, loop: str = "k") -> ClosedForm | None:
    """Return the run bounds of ``program`` as arithmetic, None where its mask is not a short union of intervals.

    ``loop`` is the axis the intervals lie on: with ``"q"`` they are those of the transposed mask, the queries that see
    a block of keys.
    """
    return _solve(program.mask, loop)


@lru_cache(maxsize=512)
def _solve(mask: Expr, loop: str) -> ClosedForm | None:
    """Solve for k, after an exchange of the roles of queries and keys where the loop is over queries."""
    swap: dict[Expr, Expr] = {}
    if loop == "q":
        swap = {Index("q"): Index("k"), Index("k"): Index("q"), LK: Size("Lq"), Size("Lq"): LK}
    solver = Solver()
    try:
        union = _ascending(solver.keys(substitute(mask, swap)))
        ends = [
            (
                solver.extreme(x.low, False),
                solver.extreme(x.high, True),
                solver.extreme(x.low, True),
                solver.extreme(x.high, False),
            )
            for x in union
        ]
    except NoClosedForm:
        return None
    back: dict[Expr, Expr] = {LK: Size("Lq"), Size("Lq"): LK, FIRST: K_FIRST, LAST: K_LAST} if swap else {}

    def again(expr: Expr) -> Expr:
        return simplify(substitute(expr, back))

    def part(keys: Keys, bounds: tuple[Expr, Expr, Expr, Expr]) -> Part:
        low, high, full_low, full_high = map(again, bounds)
        return Part(low, high, full_low, full_high, tuple(map(again, widths(keys))))

    ways = [direction(e) for x in union for e in (x.low, x.high)]
    return ClosedForm(
        mask,
        tuple(part(x, bounds) for x, bounds in zip(union, ends, strict=True)),
        tuple(map(again, solver.requires)),
        Size("Lq") if swap else LK,
        K_FIRST if swap else Q_FIRST,
        K_LAST if swap else Q_LAST,
        rises=direction(union[-1].high) != 0 and all(direction(x.low) in (0, -1) for x in union),
        exact=None not in ways,
    )


def _ascending(union: Iterable[Keys]) -> list[Keys]:
    """Intervals in an order in which none begins before the one before it: the first of two begins at key 0."""
    found = sorted(union, key=lambda x: x.low is not const(0))
    if not found:
        return [Keys(const(0), const(0))]
    if len(found) > 2 or (len(found) == 2 and found[0].low is not const(0)):
        raise NoClosedForm
    return found
