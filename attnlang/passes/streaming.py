"""How an Attend stage streams over the keys: what is accumulated, in which pass, and what rows make of it.

The value of an output is composed with the weight hook and the normaliser, and multiplied out into terms that are a
*pair part* times a *row part*. Pair parts are summed while keys stream by; row parts are applied once a row, at the
end. A statistic ``m`` that is the maximum of the score, and that pair parts read only as ``exp(s - m)``, is the
*shift*: it may be the running maximum, since a sum of ``exp(s - m) ** n`` times anything moves to a new maximum by a
factor. Softmax is the case of two such sums. A pair part that reads statistics in another way waits for a pass over
the keys after the one that finds them. Everything is an expression, so no target knows a normaliser by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce

from attnlang import ir
from attnlang.ir import FLOAT, Attend, Const, Expr, Input, Op, Operand, Output, Stat, is_map, postorder, substitute
from attnlang.ir.build import op
from attnlang.ir.build import s as SCORE
from attnlang.ir.stages import PLAIN, RAW, WEIGHT

from .factors import ONE, SHIFTED, ZERO, Expander, Term, product, reads_rows
from .simplify import simplify

__all__ = ["SHIFTED", "Accumulator", "Made", "Streaming", "Unstreamable", "accumulated", "streaming"]

MOST_PARTS = 2
"""Sums an output may be multiplied out into; more (a variance) would cancel badly."""
IDENTITY = {**ir.IDENTITY, "argmax": -math.inf}


class Unstreamable(Exception):
    """The stage is outside what one row at a time can accumulate; the text says why."""


@dataclass(frozen=True)
class Accumulator:
    """The ``monoid`` over visible keys of ``value``, for every row: a number, or with ``rows`` a sum of weighted rows.

    ``value`` reads the modified score ``s``, ``raw``, :data:`SHIFTED`, indices, captured tensors, and accumulators of
    earlier passes as :func:`accumulated`. In the pass of the shift, a step of the maximum multiplies the accumulator by
    ``exp(old - new) ** power``. Where ``vanishes``, a score of minus infinity contributes nothing by itself; other
    values need a choice at hidden pairs. ``over`` is ``k``, or ``q`` for one number a key instead of one a row.
    """

    name: str
    monoid: str
    value: Expr
    power: int = 0
    rows: Operand | None = None
    vanishes: bool = False
    over: str = "k"

    @property
    def identity(self) -> float:
        """What the accumulator is where nothing was seen."""
        return IDENTITY[self.monoid]


@dataclass(frozen=True)
class Made:
    """An output: ``value`` is a row expression over :func:`accumulated`, and a factor of the accumulator ``rows``.

    ``column`` names the accumulator of an output over q, whose value is the accumulator itself with ``empty`` where
    nothing was seen.
    """

    name: str
    value: Expr
    rows: str | None = None
    column: str | None = None
    integer: bool = False
    empty: float = 0.0


@dataclass(frozen=True)
class Streaming:
    """Passes over the keys, each a tuple of accumulators, and the outputs. ``shift`` names an accumulator of the first
    pass and ``settled`` is what passes after it take for the shift (seeds may have raised it). ``stats`` are the row
    statistics of the stage as expressions over accumulators."""

    passes: tuple[tuple[Accumulator, ...], ...]
    shift: str | None
    settled: Expr | None
    outputs: tuple[Made, ...]
    stats: tuple[tuple[str, Expr], ...]

    @property
    def accumulators(self) -> tuple[Accumulator, ...]:
        return tuple(a for found in self.passes for a in found)

    @property
    def rows(self) -> Operand | None:
        """The operand whose rows are summed, if any."""
        return next((a.rows for a in self.accumulators if a.rows is not None), None)


def accumulated(name: str) -> Input:
    """What accumulator ``name`` holds at the end of its pass, as row expressions and later passes read it."""
    return Input(name, FLOAT, "bhq")


def _inputs(expr: Expr) -> set[str]:
    return {n.name for n in postorder(expr) if isinstance(n, Input)}


class _Builder:
    """Places accumulators in passes, one for every distinct pair part."""

    def __init__(self, stage: Attend) -> None:
        self.stage = stage
        self.branch = stage.branch
        self.found: list[tuple[int, Accumulator]] = []
        self.stats: dict[Expr, Expr] = {}  # statistic to its value over accumulators
        self.shift: Accumulator | None = None
        self.bare = self.branch.score is SCORE
        shift = self._shift()
        self.expander = Expander(None if shift is None else self._stat_input(shift))
        for stat in self.branch.normalizer.stats:
            self._stat(stat, shift)

    @staticmethod
    def _stat_input(stat: Stat) -> Input:
        return Input(stat.name, FLOAT, "bhq")

    def _shift(self) -> Stat | None:
        """The maximum of the score, if there is one."""
        for stat in self.branch.normalizer.stats:
            if stat.monoid == "max" and not stat.grouped and self.pair(stat.lift) is SCORE:
                return stat
        return None

    def pair(self, expr: Expr) -> Expr:
        """``expr`` with the raw score replaced where it is the score."""
        return simplify(substitute(expr, {RAW: SCORE})) if self.bare else simplify(expr)

    def final(self, expr: Expr) -> Expr:
        """``expr`` with statistics replaced by what they are."""
        return simplify(substitute(expr, self.stats))

    def passes_of(self, expr: Expr) -> int:
        """The number of passes after which everything ``expr`` reads is known."""
        names = _inputs(expr)
        known = [number + 1 for number, a in self.found if a.name in names]
        return max(known, default=0)

    def add(self, monoid: str, value: Expr, power: int = 0, rows: Operand | None = None, over: str = "k") -> Expr:
        """What is accumulated, as a row expression; equal accumulators are one."""
        value = self.final(value)
        first = self.passes_of(value)
        power = power if first == 0 else 0
        if power == 0 and SHIFTED in set(postorder(value)):  # nothing moves it along with the running maximum
            first = max(first, 1)
        vanishes = _vanishes(monoid, value)
        made = Accumulator(f"a{len(self.found)}", monoid, value, power, rows, vanishes, over)
        for number, old in self.found:
            if number == first and replace(old, name=made.name) == made:
                made = old
                break
        else:
            self.found.append((first, made))
        result: Expr = accumulated(made.name)
        if power and self.shift is not None and rows is None:
            return self._moved(result, power)
        return result

    def _moved(self, result: Expr, power: int) -> Expr:
        """``result`` relative to the final shift, which a seed may have raised."""
        factor = self.raised
        return result if factor is ONE else product((*(factor,) * power, result))

    @property
    def raised(self) -> Expr:
        """The factor of ``e`` from the running maximum at its end to the statistic."""
        if self.shift is None:
            return ONE
        running = accumulated(self.shift.name)
        assert self.expander.shift is not None
        final = self.stats[self.expander.shift]
        return ONE if final is running else op("exp", op("sub", running, final))

    def _stat(self, stat: Stat, shift: Stat | None) -> None:
        if stat.monoid == "root" or stat.grouped:
            what = "is found by iteration" if stat.monoid == "root" else "has one value a group"
            raise Unstreamable(f"statistic {stat.name} {what}")
        lift = self.pair(stat.lift)
        seed = None if stat.seed is None else self.final(stat.seed)
        value = self.sum(lift) if stat.monoid == "sum" else self.add(stat.monoid, lift)
        if stat is shift:
            self.shift = self.found[-1][1]
        if seed is not None:
            value = op("add" if stat.monoid == "sum" else stat.monoid, value, seed)
        self.stats[self._stat_input(stat)] = simplify(value)

    def parts(self, value: Expr) -> list[Term]:
        """``value`` as terms with distinct pair parts, or as one pair part where that is all one can do."""
        merged: dict[tuple[Expr, int], list[Term]] = {}
        for t in self.expander.terms(value):
            merged.setdefault((t.pair, t.power), []).append(t)
        whole = Term(pairs=(value,))
        if len(merged) > MOST_PARTS or (len(merged) > 1 and any(reads_rows(pair) for pair, _ in merged)):
            return [whole]
        out = []
        for found in merged.values():
            row = reduce(lambda a, b: op("add", a, b), (t.row for t in found))
            out.append(replace(found[0], coefficient=1.0, rows=() if row is ONE else (row,)))
        return out

    def sum(self, value: Expr) -> Expr:
        """The sum over keys of ``value`` as a row expression."""
        total: Expr | None = None
        for t in self.parts(value):
            part = product((self.add("sum", t.pair, t.power), self.final(t.row)))
            total = part if total is None else op("add", total, part)
        return ZERO if total is None else total

    def rows(self, value: Expr, rows: Operand) -> tuple[Expr, str]:
        """The row factor and the accumulator of a sum of weighted rows."""
        parts = self.parts(value)
        (t,) = parts if len(parts) == 1 else [Term(pairs=(value,))]
        sums = self.add("sum", t.pair, t.power, rows)
        assert isinstance(sums, Input)
        held = next(a for _, a in self.found if a.name == sums.name)
        return self._moved(self.final(t.row), held.power), sums.name

    def weighed(self, value: Expr) -> Expr:
        """``value`` as one pair expression, for reductions that no row part can be taken out of."""
        terms = self.expander.terms(value)
        if len(terms) != 1:
            return value
        (t,) = terms
        return product((t.pair, t.row))

    def seen(self) -> Expr:
        """Whether a row has a visible key; a row of NaN, which a maximum may miss, shows in the sum of exponentials."""
        some = op("ne", self.add("max", SCORE), -math.inf)
        for _, a in self.found:
            if a.monoid == "sum" and a.value is SHIFTED and a.rows is None and a.over == "k":
                return op("or", some, op("ne", accumulated(a.name), 0.0))
        return some


def _vanishes(monoid: str, value: Expr) -> bool:
    """Whether the value at a score of minus infinity is the identity of the monoid."""
    if monoid == "max":
        return value is SCORE
    factors = [value]
    while isinstance(factors[-1], Op) and factors[-1].op == "mul" and factors[-1].args[1] is SHIFTED:
        factors.append(factors[-1].args[0])
    return monoid == "sum" and factors[-1] is SHIFTED


def streaming(stage: Attend) -> Streaming:
    """Return how ``stage`` streams.

    Raises:
        Unstreamable: it has several terms or branches, or an output or statistic that no row accumulates.
    """
    if len(stage.terms) != 1 or len(stage.branches) != 1:
        raise Unstreamable("it has several score terms or branches")
    (term,), branch = stage.terms, stage.branch
    if stage.position or term.name != SCORE.name:
        raise Unstreamable("its score is not its only term, or sees other positions than it reads rows of")
    if branch.group is not None:
        raise Unstreamable("its branch has groups")
    builder = _Builder(stage)
    made = tuple(_output(builder, out) for out in stage.outputs)
    operands = {a.rows for _, a in builder.found if a.rows is not None}
    if len(operands) > 1 or sum(a.rows is not None for _, a in builder.found) > 1:
        raise Unstreamable("it sums rows with several weights")
    last = max((number for number, _ in builder.found), default=0)
    passes = tuple(tuple(a for number, a in builder.found if number == n) for n in range(last + 1))
    used = any(SHIFTED in set(postorder(a.value)) for _, a in builder.found)
    shift = builder.shift.name if builder.shift is not None and used else None
    stats = tuple((k.name, v) for k, v in builder.stats.items() if isinstance(k, Input))
    settled = None if shift is None or builder.expander.shift is None else builder.stats[builder.expander.shift]
    return Streaming(passes, shift, settled, made, stats)


def _output(builder: _Builder, out: Output) -> Made:
    if out.key or out.over == "qk" or is_map(out) or (out.over == "q" and out.rows is not None):
        raise Unstreamable(f"output {out.name} is not a reduction to one value a row or a key")
    norm = builder.branch.normalizer.weight
    weight = PLAIN if builder.branch.weight is None else substitute(builder.branch.weight, {WEIGHT: PLAIN})
    value = builder.pair(substitute(substitute(out.value, {WEIGHT: weight}), {PLAIN: norm}))
    if out.over == "":
        row = builder.final(value)
        return Made(out.name, op("where", builder.seen(), row, out.empty))
    if out.over == "q":
        held = builder.add(out.monoid, builder.weighed(value), over="q")
        assert isinstance(held, Input)
        return Made(out.name, ONE, column=held.name, empty=out.empty)
    if out.rows is not None:
        factor, name = builder.rows(value, out.rows)
        return Made(out.name, factor if factor is ONE else op("where", builder.seen(), factor, ZERO), name)
    if out.monoid == "sum":
        row = builder.sum(value)
        bare = isinstance(row, Input)
        return Made(out.name, row if bare else op("where", builder.seen(), row, ZERO))
    held = builder.add(out.monoid, builder.weighed(value))
    if out.monoid == "argmax":
        return Made(out.name, held, integer=True)
    nothing = op("eq", held, IDENTITY[out.monoid])
    return Made(out.name, op("where", nothing, Const(out.empty, FLOAT), held))
