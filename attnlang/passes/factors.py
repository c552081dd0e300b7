"""Products and sums of a pair part and a row part: how a value that reads row statistics is taken apart.

Terms are ``coefficient * pair part * e ** power * row part``, where e is ``exp(s - m)`` for the maximum m of the score.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

from attnlang.ir import FLOAT, Const, Expr, Input, Op, postorder, reads_pair
from attnlang.ir.build import op
from attnlang.ir.build import s as SCORE

from .simplify import simplify

__all__ = ["ONE", "SHIFTED", "ZERO", "Expander", "Term", "product", "reads_rows"]

SHIFTED = Input("e", FLOAT)
"""``exp(score - shift)`` of a pair; the shift is the running maximum in the first pass, the final one afterwards."""

MOST_TERMS = 8
ZERO, ONE = Const(0.0, FLOAT), Const(1.0, FLOAT)


@dataclass(frozen=True)
class Term:
    """``coefficient * product(pairs) * e ** power * product(rows)``."""

    coefficient: float = 1.0
    pairs: tuple[Expr, ...] = ()
    rows: tuple[Expr, ...] = ()
    power: int = 0

    def times(self, other: Term) -> Term:
        return Term(
            self.coefficient * other.coefficient,
            self.pairs + other.pairs,
            self.rows + other.rows,
            self.power + other.power,
        )

    @property
    def pair(self) -> Expr:
        return product((*(SHIFTED,) * self.power, *self.pairs))

    @property
    def row(self) -> Expr:
        first = () if self.coefficient == 1.0 else (Const(self.coefficient, FLOAT),)
        return product((*first, *self.rows))


Terms = tuple[Term, ...]


def product(factors: Iterable[Expr]) -> Expr:
    found = [f for f in factors if f is not ONE]
    return simplify(reduce(lambda a, b: op("mul", a, b), found)) if found else ONE


class Expander:
    """Multiplies expressions out; ``shift`` is the statistic that may run."""

    def __init__(self, shift: Expr | None) -> None:
        self.shift = shift

    def terms(self, expr: Expr) -> Terms:
        """``expr`` as a sum; what cannot be split is a pair part as it is."""
        done: dict[Expr, Terms] = {}
        for node in postorder(expr):
            if node.type is not FLOAT:
                continue
            if isinstance(node, Const):
                done[node] = (Term(float(node.value)),)
            elif not reads_pair(node):
                done[node] = (Term(rows=(node,)),)
            else:
                found = self._split(node, done) if reads_rows(node) else None
                done[node] = found if found and len(found) <= MOST_TERMS else (Term(pairs=(node,)),)
        return done[expr]

    def _split(self, node: Expr, done: Mapping[Expr, Terms]) -> Terms | None:
        if not isinstance(node, Op):
            return None
        args = [done.get(a, ()) for a in node.args]
        match node.op:
            case "add":
                return args[0] + args[1]
            case "sub":
                return args[0] + _negated(args[1])
            case "neg":
                return _negated(args[0])
            case "mul":
                return tuple(a.times(b) for a in args[0] for b in args[1])
            case "div":
                over = _reciprocal(node.args[1], args[1])
                return None if over is None else tuple(a.times(over) for a in args[0])
            case "exp":
                return self._exp(args[0])
            case "log":
                return self._log(args[0])
            case "where" if not reads_rows(node.args[0]) and reads_pair(node.args[0]):
                return _chosen(node.args[0], args[1], args[2])
        return None

    def _exp(self, argument: Terms) -> Terms | None:
        """``exp(n s + pair + row) = e ** n * exp(pair) * exp(row + n m)``, where the maximum m cancels as a rule."""
        if self.shift is None:
            return None
        powers = [t for t in argument if t.pairs == (SCORE,) and not t.rows and not t.power]
        rows = [t for t in argument if not t.pairs and not t.power]
        others = [t for t in argument if t not in powers and t not in rows]
        power = sum(t.coefficient for t in powers)
        if power < 1 or power != int(power) or any(t.rows or t.power for t in others):
            return None
        pairs = tuple(op("exp", product((Const(t.coefficient, FLOAT), *t.pairs))) for t in others)
        found: list[Expr] = []
        left = power
        for t in rows:
            if t.rows == (self.shift,):
                left += t.coefficient
            else:
                found.append(t.row)
        if left:
            found.append(product((Const(left, FLOAT), self.shift)))
        row = (op("exp", reduce(lambda a, b: op("add", a, b), found)),) if found else ()
        return (Term(1.0, pairs, row, int(power)),)

    def _log(self, argument: Terms) -> Terms | None:
        """The logarithm of a product whose pair part is a power of e, so that its sign is that of the row part."""
        if len(argument) != 1 or argument[0].pairs or not argument[0].power or self.shift is None:
            return None
        (t,) = argument
        power = float(t.power)
        out = [Term(power, (SCORE,)), Term(-power, (), (self.shift,))]
        below = [r.args[1] for r in t.rows if isinstance(r, Op) and r.op == "div" and r.args[0] is ONE]
        above = [r for r in t.rows if not (isinstance(r, Op) and r.op == "div" and r.args[0] is ONE)]
        if t.coefficient != 1.0 or above:
            out.append(Term(rows=(op("log", Term(t.coefficient, (), tuple(above)).row),)))
        if below:
            out.append(Term(-1.0, (), (op("log", product(below)),)))
        return tuple(out)


def _negated(terms: Terms) -> Terms:
    return tuple(replace(t, coefficient=-t.coefficient) for t in terms)


def _reciprocal(expr: Expr, terms: Terms) -> Term | None:
    if not reads_pair(expr):
        return Term(1.0 / float(expr.value)) if isinstance(expr, Const) and expr.value else _over((), (expr,))
    if len(terms) != 1 or terms[0].power:
        return None
    (t,) = terms
    found = _over(t.pairs, t.rows)
    return replace(found, coefficient=1.0 / t.coefficient) if t.coefficient else None


def _over(pairs: tuple[Expr, ...], rows: tuple[Expr, ...]) -> Term:
    return Term(1.0, tuple(op("div", 1.0, p) for p in pairs), tuple(op("div", 1.0, r) for r in rows))


def _chosen(condition: Expr, yes: Terms, no: Terms) -> Terms:
    """A choice by a pair condition: a pair part is chosen or 0."""
    out = []
    for terms, first in ((yes, True), (no, False)):
        for t in terms:
            if t.coefficient == 0.0:
                continue
            inner = product(t.pairs)
            pair = op("where", condition, inner, ZERO) if first else op("where", condition, ZERO, inner)
            out.append(replace(t, pairs=(pair,)))
    return tuple(out)


def reads_rows(expr: Expr) -> bool:
    """Whether it reads what is accumulated for a row."""
    return any(isinstance(n, Input) and "k" not in n.axes for n in postorder(expr))
