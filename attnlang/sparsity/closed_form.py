"""Run bounds as arithmetic: where a mask is one interval of keys for each query, no table is needed at all.

For masks made of comparisons affine in q and k, floor divisions by positive numbers, ``min max abs`` and conditions on
the query, the keys that a block of queries q_first..q_last sees follow from its ends: bounds that rise with q are least
at q_first and greatest at q_last. :func:`closed_form` solves every comparison for k and returns four expressions in the
IR over ``q_first``, ``q_last``, sizes, parameters and per-batch or per-head captures. A kernel can evaluate them from
its program id; :meth:`ClosedForm.run_map` evaluates them for all rows at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attnlang.ir import BOOL, INT, Const, Environment, Expr, Index, Load, Op, Param, Program, Size, evaluate, postorder
from attnlang.ir.build import FALSE, TRUE, clamp, const, op
from attnlang.passes.intervals import value_range

from .classify import numbers
from .runmap import FULL, PARTIAL, RunMap, build_runs

__all__ = ["Q_FIRST", "Q_LAST", "ClosedForm", "closed_form"]

Q_FIRST, Q_LAST = Param("q_first", INT), Param("q_last", INT)
"""The first and the last query (inclusive, in range) of a block of rows."""
LK = Size("Lk")
CASES = 16  # disjuncts before the search gives up


class _NoClosedForm(Exception):
    """The mask is not one interval of keys a query, as far as these rules can tell."""


@dataclass(frozen=True)
class ClosedForm:
    """Keys that rows q_first..q_last see, as int expressions.

    No row sees a key outside [touched_lo, touched_hi); every row sees every key in [full_lo, full_hi). The bounds are
    not clamped to the keys, and an interval may be empty with lo > hi. ``requires`` are conditions on sizes and
    parameters (divisors are positive) under which this holds; check them on the host and use the run map where one
    fails.
    """

    touched_lo: Expr
    touched_hi: Expr
    full_lo: Expr
    full_hi: Expr
    requires: tuple[Expr, ...]

    def tile_bounds(self, bn: int) -> tuple[Expr, Expr, Expr, Expr]:
        """Return (start, full_start, full_end, end), ascending from 0 or above, in key tiles of ``bn``.

        Tiles [start, full_start) and [full_end, end) are partial, [full_start, full_end) full; a tile cut by the last
        key is not among the full ones.
        """
        low, high = (clamp(x, 0, LK) for x in (self.touched_lo, self.touched_hi))
        start = op("floordiv", low, bn)
        end = op("max", start, op("floordiv", op("add", high, bn - 1), bn))
        full_low, full_high = (clamp(x, 0, LK) for x in (self.full_lo, self.full_hi))
        full_start = clamp(op("floordiv", op("add", full_low, bn - 1), bn), start, end)
        full_end = clamp(op("floordiv", full_high, bn), full_start, end)
        return start, full_start, full_end, end

    def holds(self, sizes: Mapping[str, int], params: Mapping[str, Any]) -> bool:
        """Return whether the conditions are met by these sizes and parameters."""
        env = Environment(sizes=sizes, params=params)
        return all(bool(evaluate(condition, env)) for condition in self.requires)

    def run_map(
        self,
        program: Program,
        sizes: Mapping[str, int],
        params: Mapping[str, Any] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        tile: tuple[int, int] = (128, 128),
    ) -> RunMap:
        """Evaluate the bounds for every row of tiles: the run map without any search, in O(rows)."""
        bm, bn = tile
        lq, lk = sizes["Lq"], sizes["Lk"]
        nq, nk = -(-lq // bm), -(-lk // bn)
        exprs = (self.touched_lo, self.touched_hi, self.full_lo, self.full_hi)
        read = {n.axis for n in postorder(*exprs) if isinstance(n, Index)}
        batch, heads = (sizes.get(n, 1) if a in read else 1 for a, n in (("b", "B"), ("h", "H")))
        first = torch.arange(nq).view(1, 1, -1) * bm
        given = {**numbers(params or {}, program), "q_first": first, "q_last": (first + bm).clamp(max=lq) - 1}
        axes = {"b": torch.arange(batch).view(-1, 1, 1), "h": torch.arange(heads).view(1, -1, 1)}
        env = Environment(axes, sizes, given, {n: t.cpu() for n, t in (tensors or {}).items()})
        low, high, full_low, full_high = (
            evaluate(e, env).clamp(0, lk).expand(batch, heads, nq).reshape(-1).numpy() for e in exprs
        )
        start, end = low // bn, -(-high // bn)
        full_start = np.clip(-(-full_low // bn), start, np.maximum(start, end))
        full_end = np.clip(np.where(full_high == lk, nk, full_high // bn), full_start, np.maximum(full_start, end))
        row = np.arange(batch * heads * nq)
        parts = []
        for a, b, kind in ((start, full_start, PARTIAL), (full_start, full_end, FULL), (full_end, end, PARTIAL)):
            # an interval that is empty as a whole touches nothing, wherever its ends lie
            pick = np.nonzero((a < b) & (low < high))[0]
            parts.append((row[pick], a[pick], b[pick], np.full(len(pick), kind)))
        columns = [np.concatenate(x) for x in zip(*parts, strict=True)]
        runs = build_runs(columns[0], columns[1], columns[2], columns[3], batch * heads * nq)
        return RunMap(tile, (lq, lk), batch, heads, *runs)


@dataclass(frozen=True)
class _Keys:
    """Keys in [low, high) for one query; expressions over q."""

    low: Expr
    high: Expr


def _reads(expr: Expr, axis: str) -> bool:
    return any(isinstance(n, Index) and n.axis == axis for n in postorder(expr))


def _linear(expr: Expr) -> dict[Expr | None, int]:
    """``expr`` as a sum of coefficient * atom; None is the atom of the constant."""
    done: dict[Expr, dict[Expr | None, int]] = {}
    for node in postorder(expr):
        out: dict[Expr | None, int] = {node: 1}
        if isinstance(node, Const) and node.type is INT:
            out = {None: int(node.value)}
        elif isinstance(node, Op) and node.type is INT and node.op in ("add", "sub", "neg"):
            scales = {"add": (1, 1), "sub": (1, -1), "neg": (-1,)}[node.op]
            out = {}
            for arg, scale in zip(node.args, scales, strict=True):
                for atom, c in done[arg].items():
                    out[atom] = out.get(atom, 0) + scale * c
        elif isinstance(node, Op) and node.op == "mul" and node.type is INT:
            for fixed, other in (node.args, node.args[::-1]):
                if isinstance(fixed, Const):
                    out = {atom: c * int(fixed.value) for atom, c in done[other].items()}
        done[node] = {atom: c for atom, c in out.items() if c}
    return done[expr]


def _total(terms: Mapping[Expr | None, int]) -> Expr:
    out: Expr = const(terms.get(None, 0))
    for atom, c in terms.items():
        if atom is not None:
            term = atom if abs(c) == 1 else op("mul", atom, abs(c))
            if out is const(0) and c > 0:
                out = term
            else:
                out = op("add" if c > 0 else "sub", out, term)
    return out


class _Solver:
    """Solves a mask for k; collects the conditions under which the steps were right."""

    def __init__(self) -> None:
        self.requires: dict[Expr, None] = {}

    def positive(self, expr: Expr) -> Expr:
        """Require ``expr``, a number known to the host, to be at least 1."""
        if any(isinstance(n, Index | Load) for n in postorder(expr)):
            raise _NoClosedForm
        if (value_range(expr).lo or 0) < 1:
            self.requires[op("ge", expr, 1)] = None
        return expr

    # --- masks to unions of intervals

    def keys(self, mask: Expr, wanted: bool = True) -> list[_Keys]:
        """Return intervals whose union is the set of keys for which ``mask`` is ``wanted``."""
        if not _reads(mask, "k"):
            return self._condition(mask, wanted)
        if not isinstance(mask, Op):
            raise _NoClosedForm
        match mask.op:
            case "not":
                return self.keys(mask.args[0], not wanted)
            case "and" | "or":
                parts = [self.keys(a, wanted) for a in mask.args]
                return self._both(*parts) if (mask.op == "and") == wanted else self._either(*parts)
            case "where" if mask.type is BOOL:
                c, a, b = mask.args
                chosen = self._both(self.keys(c), self.keys(a, wanted))
                return self._either(chosen, self._both(self.keys(c, False), self.keys(b, wanted)))
            case "lt" | "le" | "gt" | "ge" | "eq" | "ne" if mask.args[0].type is INT:
                return self._compare(mask.op, mask.args[0], mask.args[1], wanted)
        raise _NoClosedForm

    def _condition(self, mask: Expr, wanted: bool) -> list[_Keys]:
        """A condition without k: all keys or none."""
        if mask in (TRUE, FALSE):
            return [_Keys(const(0), LK)] if (mask is TRUE) == wanted else []
        if not _reads(mask, "q"):
            chosen = mask if wanted else op("not", mask)
            return [_Keys(op("where", chosen, 0, LK), LK)]
        if isinstance(mask, Op) and mask.op == "not":
            return self._condition(mask.args[0], not wanted)
        if isinstance(mask, Op) and mask.op in ("and", "or"):
            parts = [self._condition(a, wanted) for a in mask.args]
            return self._both(*parts) if (mask.op == "and") == wanted else self._either(*parts)
        if isinstance(mask, Op) and mask.op in ("lt", "le", "gt", "ge", "eq", "ne") and mask.args[0].type is INT:
            return self._compare(mask.op, mask.args[0], mask.args[1], wanted)
        raise _NoClosedForm

    def _both(self, left: list[_Keys], right: list[_Keys]) -> list[_Keys]:
        out = [_Keys(_join("max", a.low, b.low), _join("min", a.high, b.high)) for a in left for b in right]
        if len(out) > CASES:
            raise _NoClosedForm
        return out

    def _either(self, left: list[_Keys], right: list[_Keys]) -> list[_Keys]:
        """Union; two intervals with a common end are one."""
        out = list(left)
        for b in right:
            for i, a in enumerate(out):
                if a.low is b.low or a.high is b.high:
                    out[i] = _Keys(_join("min", a.low, b.low), _join("max", a.high, b.high))
                    break
            else:
                out.append(b)
        if len(out) > CASES:
            raise _NoClosedForm
        return out

    # --- comparisons

    def _compare(self, name: str, a: Expr, b: Expr, wanted: bool) -> list[_Keys]:
        if not wanted:
            name = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}[name]
        match name:
            case "lt":
                return self.at_most(op("add", op("sub", a, b), 1))
            case "le":
                return self.at_most(op("sub", a, b))
            case "gt" | "ge":
                return self._compare("lt" if name == "gt" else "le", b, a, True)
            case "eq":
                return self._both(self._compare("le", a, b, True), self._compare("le", b, a, True))
        return self._either(self._compare("lt", a, b, True), self._compare("lt", b, a, True))

    def at_most(self, expr: Expr) -> list[_Keys]:
        """Keys with ``expr <= 0``."""
        terms = _linear(expr)
        with_k = [atom for atom in terms if atom is not None and _reads(atom, "k")]
        if not with_k:
            return [_Keys(op("where", op("le", _total(terms), 0), 0, LK), LK)]
        if len(with_k) > 1:
            raise _NoClosedForm
        atom, c = with_k[0], terms[with_k[0]]
        rest = {a: n for a, n in terms.items() if a is not atom}
        minus = _total({a: -n for a, n in rest.items()})
        if c > 0:  # atom <= -rest / c
            return self._upper(atom, minus if c == 1 else op("floordiv", minus, c))
        return self._lower(atom, _total(rest) if c == -1 else op("neg", op("floordiv", minus, -c)))

    def _upper(self, atom: Expr, limit: Expr) -> list[_Keys]:
        """Keys with ``atom <= limit``."""
        if isinstance(atom, Index):
            return [_Keys(const(0), _tidy(op("add", limit, 1)))]
        match atom:
            case Op(op="floordiv", operands=(x, c)):
                self.positive(c)
                top = op("sub", op("mul", op("add", limit, 1), c), 1)
                return self.at_most(op("sub", x, top))
            case Op(op="abs", operands=(x,)):
                return self._both(self.at_most(op("sub", x, limit)), self.at_most(op("sub", op("neg", x), limit)))
            case Op(op="max", operands=(x, y)):
                return self._both(self.at_most(op("sub", x, limit)), self.at_most(op("sub", y, limit)))
            case Op(op="min", operands=(x, y)):
                return self._either(self.at_most(op("sub", x, limit)), self.at_most(op("sub", y, limit)))
        raise _NoClosedForm

    def _lower(self, atom: Expr, limit: Expr) -> list[_Keys]:
        """Keys with ``atom >= limit``."""
        if isinstance(atom, Index):
            return [_Keys(_tidy(limit), LK)]
        match atom:
            case Op(op="floordiv", operands=(x, c)):
                self.positive(c)
                return self.at_most(op("sub", op("mul", limit, c), x))
            case Op(op="abs", operands=(x,)):
                return self._either(self.at_most(op("sub", limit, x)), self.at_most(op("add", limit, x)))
            case Op(op="max", operands=(x, y)):
                return self._either(self.at_most(op("sub", limit, x)), self.at_most(op("sub", limit, y)))
            case Op(op="min", operands=(x, y)):
                return self._both(self.at_most(op("sub", limit, x)), self.at_most(op("sub", limit, y)))
        raise _NoClosedForm

    # --- extremes over a block of rows

    def extreme(self, expr: Expr, most: bool) -> Expr:
        """The least (``most``: greatest) value of ``expr`` over q in [q_first, q_last], or a bound beyond it."""
        if not _reads(expr, "q"):
            return expr
        if isinstance(expr, Index):
            return Q_LAST if most else Q_FIRST
        if not isinstance(expr, Op):
            raise _NoClosedForm
        args = expr.args
        match expr.op:
            case "add" | "min" | "max":
                return op(expr.op, *(self.extreme(a, most) for a in args))
            case "sub":
                return op("sub", self.extreme(args[0], most), self.extreme(args[1], not most))
            case "neg":
                return op("neg", self.extreme(args[0], not most))
            case "mul":
                x, c = args if not _reads(args[1], "q") else args[::-1]
                if _reads(c, "q"):
                    raise _NoClosedForm
                if isinstance(c, Const):
                    return op("mul", self.extreme(x, most == (int(c.value) >= 0)), c)
                return op("mul", self.extreme(x, most), self.positive(c))
            case "floordiv" if not _reads(args[1], "q"):
                return op("floordiv", self.extreme(args[0], most), self.positive(args[1]))
            case "mod" if not _reads(args[1], "q"):
                self.positive(args[1])
                return op("sub", args[1], 1) if most else const(0)
            case "abs":
                low, high = self.extreme(args[0], False), self.extreme(args[0], True)
                if most:
                    return op("max", op("neg", low), high)
                return op("max", op("max", low, op("neg", high)), 0)
            case "where" if self._is_row_condition(expr):
                rest = args[0].args[0]
                return op("where", op("le", self.extreme(rest, most), 0), 0, LK)
        raise _NoClosedForm

    def _is_row_condition(self, expr: Op) -> bool:
        """``where(x <= 0, 0, Lk)``: falls to 0 where x is small, so it rises with x."""
        c, a, b = expr.args
        return isinstance(c, Op) and c.op == "le" and c.args[1] is const(0) and a is const(0) and b is LK


def _tidy(expr: Expr) -> Expr:
    """Collect the constants of a sum."""
    return _total(_linear(expr))


def _join(name: str, a: Expr, b: Expr) -> Expr:
    """``min`` or ``max`` of two bounds, without what says nothing next to the range [0, Lk)."""
    idle = LK if name == "min" else const(0)
    if a is b or b is idle:
        return a
    return b if a is idle else op(name, a, b)


def closed_form(program: Program) -> ClosedForm | None:
    """Return the run bounds of ``program`` as arithmetic, or None where its mask is not one interval a query."""
    solver = _Solver()
    try:
        union = solver.keys(program.mask)
        if len(union) != 1:
            return None
        (keys,) = union
        return ClosedForm(
            solver.extreme(keys.low, False),
            solver.extreme(keys.high, True),
            solver.extreme(keys.low, True),
            solver.extreme(keys.high, False),
            tuple(solver.requires),
        )
    except _NoClosedForm:
        return None
