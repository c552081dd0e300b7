"""Masks solved for the key: unions of intervals of keys a query sees, and their extremes over a block of queries.

Every comparison that is affine in the key, through floor divisions by positive numbers, ``min max abs`` and conditions
on the query, becomes an interval. Bounds are mathematical: :meth:`attnlang.sparsity.ClosedForm.holds` checks that no
step of the mask or of the bounds leaves int64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnlang.ir import BOOL, INT, Const, Expr, Index, Input, Load, Op, Size, postorder
from attnlang.ir.build import FALSE, TRUE, clamp, const, op
from attnlang.passes.value_ranges import value_range

__all__ = ["FIRST", "LAST", "LK", "Keys", "NoClosedForm", "Solver", "direction", "reads", "widths"]

FIRST, LAST = Input("q_first", INT, "bh"), Input("q_last", INT, "bh")
"""The first and the last query (inclusive, in range) of a block of rows."""
LK = Size("Lk")
CASES = 16  # disjuncts before the search gives up
FAR = 3 * 2**59
"""Where a captured bound is cut off, beyond anything it is compared with: if its sum with the rest of a comparison is
proved to stay below 2^61, then the rest is below 2^59, and so is a key times ``STEEP``."""
STEEP = 2**28


class NoClosedForm(Exception):
    """The mask is not one interval of keys a query, as far as these rules can tell."""


@dataclass(frozen=True)
class Keys:
    """Keys in [low, high) for one query; expressions over q."""

    low: Expr
    high: Expr


def reads(expr: Expr, axis: str) -> bool:
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


def _cut(atom: Expr | None) -> Expr | None:
    """``atom``, or a captured int cut off at a number so far away that no comparison with a key can tell."""
    return clamp(atom, -FAR, FAR) if isinstance(atom, Load) else atom


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


class Solver:
    """Solves a mask for k; collects the conditions under which the steps were right."""

    def __init__(self) -> None:
        self.requires: dict[Expr, None] = {}
        """Divisors and factors that must be at least 1."""

    def positive(self, expr: Expr) -> Expr:
        """Require ``expr``, a number known to the host, to be at least 1."""
        if any(isinstance(n, Index | Load) for n in postorder(expr)):
            raise NoClosedForm
        if (value_range(expr).lo or 0) < 1:
            self.requires[expr] = None
        return expr

    # --- masks to unions of intervals

    def keys(self, mask: Expr, wanted: bool = True) -> list[Keys]:
        """Return intervals whose union is the set of keys for which ``mask`` is ``wanted``."""
        if not reads(mask, "k"):
            return self._condition(mask, wanted)
        if not isinstance(mask, Op):
            raise NoClosedForm
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
        raise NoClosedForm

    def _condition(self, mask: Expr, wanted: bool) -> list[Keys]:
        """A condition without k: all keys or none."""
        if mask in (TRUE, FALSE):
            return [Keys(const(0), LK)] if (mask is TRUE) == wanted else []
        if not reads(mask, "q"):
            chosen = mask if wanted else op("not", mask)
            return [Keys(op("where", chosen, 0, LK), LK)]
        if isinstance(mask, Op) and mask.op == "not":
            return self._condition(mask.args[0], not wanted)
        if isinstance(mask, Op) and mask.op in ("and", "or"):
            parts = [self._condition(a, wanted) for a in mask.args]
            return self._both(*parts) if (mask.op == "and") == wanted else self._either(*parts)
        if isinstance(mask, Op) and mask.op in ("lt", "le", "gt", "ge", "eq", "ne") and mask.args[0].type is INT:
            return self._compare(mask.op, mask.args[0], mask.args[1], wanted)
        raise NoClosedForm

    def _both(self, left: list[Keys], right: list[Keys]) -> list[Keys]:
        out = [Keys(_join("max", a.low, b.low), _join("min", a.high, b.high)) for a in left for b in right]
        if len(out) > CASES:
            raise NoClosedForm
        return out

    def _either(self, left: list[Keys], right: list[Keys]) -> list[Keys]:
        """Union; two intervals with a common end are one."""
        out = list(left)
        for b in right:
            for i, a in enumerate(out):
                if a.low is b.low or a.high is b.high:
                    out[i] = Keys(_join("min", a.low, b.low), _join("max", a.high, b.high))
                    break
            else:
                out.append(b)
        if len(out) > CASES:
            raise NoClosedForm
        return out

    # --- comparisons

    def _compare(self, name: str, a: Expr, b: Expr, wanted: bool) -> list[Keys]:
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

    def at_most(self, expr: Expr) -> list[Keys]:
        """Keys with ``expr <= 0``."""
        terms = _linear(expr)
        with_k = [atom for atom in terms if atom is not None and reads(atom, "k")]
        if not with_k:
            near = {_cut(a): n for a, n in terms.items()}
            return [Keys(op("where", op("le", _total(near), 0), 0, LK), LK)]
        if len(with_k) > 1:
            raise NoClosedForm
        atom, c = with_k[0], terms[with_k[0]]
        rest = {
            _cut(a) if isinstance(atom, Index) and abs(c) <= STEEP else a: n for a, n in terms.items() if a is not atom
        }
        minus = _total({a: -n for a, n in rest.items()})
        if c > 0:  # atom <= -rest / c
            return self._upper(atom, minus if c == 1 else op("floordiv", minus, c))
        return self._lower(atom, _total(rest) if c == -1 else op("neg", op("floordiv", minus, -c)))

    def _upper(self, atom: Expr, limit: Expr) -> list[Keys]:
        """Keys with ``atom <= limit``."""
        if isinstance(atom, Index):
            return [Keys(const(0), _tidy(op("add", limit, 1)))]
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
        raise NoClosedForm

    def _lower(self, atom: Expr, limit: Expr) -> list[Keys]:
        """Keys with ``atom >= limit``."""
        if isinstance(atom, Index):
            return [Keys(_tidy(limit), LK)]
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
        raise NoClosedForm

    # --- extremes over a block of rows

    def extreme(self, expr: Expr, most: bool) -> Expr:
        """The least (``most``: greatest) value of ``expr`` over q in [q_first, q_last], or a bound beyond it."""
        if not reads(expr, "q"):
            return expr
        if isinstance(expr, Index):
            return LAST if most else FIRST
        if not isinstance(expr, Op):
            raise NoClosedForm
        args = expr.args
        match expr.op:
            case "add" | "min" | "max":
                return op(expr.op, *(self.extreme(a, most) for a in args))
            case "sub":
                return op("sub", self.extreme(args[0], most), self.extreme(args[1], not most))
            case "neg":
                return op("neg", self.extreme(args[0], not most))
            case "mul":
                x, c = args if not reads(args[1], "q") else args[::-1]
                if reads(c, "q"):
                    raise NoClosedForm
                if isinstance(c, Const):
                    return op("mul", self.extreme(x, most == (int(c.value) >= 0)), c)
                return op("mul", self.extreme(x, most), self.positive(c))
            case "floordiv" if not reads(args[1], "q"):
                return op("floordiv", self.extreme(args[0], most), self.positive(args[1]))
            case "mod" if not reads(args[1], "q"):
                self.positive(args[1])
                return op("sub", args[1], 1) if most else const(0)
            case "abs":
                low, high = self.extreme(args[0], False), self.extreme(args[0], True)
                if most:
                    return op("max", op("neg", low), high)
                return op("max", op("max", low, op("neg", high)), 0)
            case "where" if (rest := _row_condition(expr)) is not None:
                return op("where", op("le", self.extreme(rest, most), 0), 0, LK)
        raise NoClosedForm


def _row_condition(expr: Expr) -> Expr | None:
    """``x`` of ``where(x <= 0, 0, Lk)``, which falls to 0 where x is small, so it rises with x."""
    match expr:
        case Op(op="where", operands=(Op(op="le", operands=(x, zero)), low, high)):
            if zero is const(0) and low is const(0) and high is LK:
                return x
    return None


def direction(expr: Expr) -> int | None:
    """Return 1 where ``expr`` never falls as q rises, -1 where it never rises, 0 without q, None where unknown.

    Signs of factors and divisors that are not constants are taken to be those the solver requires.
    """
    if not reads(expr, "q"):
        return 0
    if isinstance(expr, Index):
        return 1
    inner = _row_condition(expr)
    if inner is not None:
        return direction(inner)
    if not isinstance(expr, Op):
        return None
    args = expr.args
    match expr.op:
        case "add" | "min" | "max" | "sub" | "neg":
            found = [direction(a) for a in args]
            if None in found:
                return None
            last = -1 if expr.op in ("sub", "neg") else 1
            ways = {*(d for d in found[:-1] if d), *(last * d for d in found[-1:] if d)}
            return ways.pop() if len(ways) == 1 else None
        case "mul":
            x, c = args if not reads(args[1], "q") else args[::-1]
            falls = isinstance(c, Const) and int(c.value) < 0
            way = direction(x) if not reads(c, "q") else None
            return way if way is None or not falls else -way
        case "floordiv" if not reads(args[1], "q"):
            return direction(args[0])
    return None


def widths(keys: Keys) -> list[Expr]:
    """Numbers that do not depend on the query, all of which must be positive for any query to see one of ``keys``."""
    lows, highs = _arguments("max", keys.low), _arguments("min", keys.high)
    found = [_tidy(op("sub", high, low)) for low in lows for high in highs]
    return [x for x in dict.fromkeys(found) if not reads(x, "q") and (value_range(x).lo or 0) < 1]


def _arguments(name: str, expr: Expr) -> list[Expr]:
    """What ``expr`` is the extreme of."""
    if isinstance(expr, Op) and expr.op == name:
        return [x for a in expr.args for x in _arguments(name, a)]
    return [expr]


def _tidy(expr: Expr) -> Expr:
    """Collect the constants of a sum."""
    return _total(_linear(expr))


def _join(name: str, a: Expr, b: Expr) -> Expr:
    """``min`` or ``max`` of two bounds, without what says nothing next to the range [0, Lk)."""
    idle = LK if name == "min" else const(0)
    if a is b or b is idle:
        return a
    return b if a is idle else op(name, a, b)
