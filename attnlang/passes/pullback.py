"""The gradient of a streaming stage: what a backward kernel sums, pair by pair, once rows know their cotangents.

A stage is accumulators over the keys and row expressions of them (:mod:`.streaming`). The row expressions are small and
differentiated by whoever holds the rows; that gives every accumulator its *cotangent*. What is left is a sum over pairs

    d logit = sum over accumulators c of cotangent(c) * d value_c / d logit

where the cotangent of the accumulator of weighted rows is ``dp * factor``: dp is the product of the gradient of the
output's row and the pair's value row. An accumulator that values of later passes read gets a part of its cotangent from
their pairs: that is a *sweep* over the keys before the last one. Softmax is the case of one sum without sweeps, whose
cotangent is minus the usual delta.

The shift of the exponentials is a constant here: a stage is the same function whatever is subtracted, which
:func:`.shifts.is_only_a_shift` checks. All results are expressions over the raw score ``s`` and the inputs below, so no
target knows a normaliser by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce

from attnlang.ir import FLOAT, Attend, Const, Expr, Input, Load, Operand, postorder, substitute
from attnlang.ir.build import op
from attnlang.ir.build import s as RAW_SCORE
from attnlang.ir.stages import RAW

from .bodies import Body, body_of
from .derivatives import derivatives
from .factors import ONE, SHIFTED, ZERO
from .levels import Level, levels
from .shifts import is_only_a_shift
from .simplify import simplify
from .streaming import Accumulator, Made, Streaming, Unstreamable, accumulated, streaming

__all__ = [
    "DP",
    "FACTOR",
    "LOGIT",
    "SETTLED",
    "Pullback",
    "Sweep",
    "cotangent",
    "is_zero",
    "pair_value",
    "pullback",
    "row_outputs",
    "saved",
    "saving",
    "settled_of",
]

LOGIT = Input("logit", FLOAT)
"""The modified score, while derivatives are taken."""
DP = Input("dp", FLOAT)
"""Of a pair: the product of the value row and the gradient of the output row, before the row factor."""
FACTOR = Input("factor", FLOAT, "bhq")
"""What the sum of weighted rows is multiplied by to give the output."""
SETTLED = Input("settled", FLOAT, "bhq")
"""What passes after the first subtract from scores, where a seed may have raised it above the maximum."""


@dataclass(frozen=True)
class Sweep:
    """A pass over the keys that sums, for every (cotangent, pair expression), the expression and adds it to that
    row input."""

    sums: tuple[tuple[Input, Expr], ...]


@dataclass(frozen=True)
class Pullback:
    """The backward pass of a stage as pair expressions.

    ``draw`` is the gradient of the raw score of a visible pair and ``weight`` that of a value row by the output row:
    ``dv[k] = sum over q of weight * do[q]``; it is None where no rows are summed. Expressions read the raw score ``s``,
    :data:`DP`, row inputs (over b, h, q) and column inputs (over b, h, k); ``rows`` and ``columns`` name these, in a
    fixed order. A row input is an accumulator's final value by its own name, its :func:`cotangent`, :data:`FACTOR` or
    :data:`SETTLED`. ``body`` says how the raw score comes of the rows, None where it is their dot product.
    """

    stream: Streaming
    draw: Expr
    weight: Expr | None
    sweeps: tuple[Sweep, ...]
    loads: tuple[tuple[Load, Expr], ...]
    body: Body | None = None

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the captured tensors that a gradient can reach through pairs."""
        through = () if self.body is None else self.body.loads
        return frozenset(load.tensor for load, _ in (*self.loads, *through))

    @property
    def operand(self) -> Operand | None:
        """The operand whose rows are summed, if any."""
        return self.stream.rows

    def captured(self, wanted: Iterable[str]) -> tuple[tuple[Load, Expr], ...]:
        """Loads of the tensors ``wanted``, each with the gradient a pair gives the element it reads."""
        names = set(wanted)
        return tuple((load, value) for load, value in self.loads if load.tensor in names)

    def roots(self, wanted: Iterable[str] = ()) -> tuple[Expr, ...]:
        """Every expression a kernel computes for a pair."""
        last = (self.draw, *(() if self.weight is None else (self.weight,)), *(e for _, e in self.captured(wanted)))
        return (*(e for sweep in self.sweeps for _, e in sweep.sums), *last)

    def _inputs(self, wanted: Iterable[str], axes: str) -> tuple[str, ...]:
        swept = [name for sweep in self.sweeps for name, _ in sweep.sums]
        found = [n for n in postorder(*self.roots(wanted), *swept) if isinstance(n, Input) and n.axes == axes]
        return tuple(n.name for n in found)

    def rows(self, wanted: Iterable[str] = ()) -> tuple[str, ...]:
        """Names of the row inputs a kernel reads."""
        return self._inputs(wanted, "bhq")

    def columns(self, wanted: Iterable[str] = ()) -> tuple[str, ...]:
        """Names of the column inputs a kernel reads."""
        return self._inputs(wanted, "bhk")


def cotangent(a: Accumulator) -> Input:
    """The gradient of what an accumulator without rows holds: a row input, or a column input where it is over q."""
    return Input(f"d_{a.name}", FLOAT, "bhq" if a.over == "k" else "bhk")


def saved(stream: Streaming) -> dict[str, str]:
    """What a backward pass starts from, a number a row each: accumulators, with the outputs of :func:`saving` for them.

    Names of such outputs are none of the stage's own.
    """
    taken = {out.name for out in stream.outputs}
    found: dict[str, str] = {}
    for a in stream.accumulators:
        if a.over == "k" and a.rows is None and a.monoid != "argmax":
            name = f"saved_{a.name}"
            while name in taken:
                name += "_"
            found[a.name] = name
    return found


def saving(stream: Streaming) -> Streaming:
    """``stream`` with further outputs: what a backward pass starts from."""
    more = tuple(Made(name, accumulated(a)) for a, name in saved(stream).items())
    return replace(stream, outputs=(*stream.outputs, *more))


def row_outputs(stream: Streaming) -> tuple[Made, ...]:
    """Every float row expression of the outputs, the factor of the summed rows among them, with the shift settled."""
    return tuple(out for out in stream.outputs if not out.integer and out.column is None)


def _sum(parts: Iterable[Expr]) -> Expr:
    return simplify(reduce(lambda a, b: op("add", a, b), [p for p in parts if p is not ZERO] or [ZERO]))


def _times(a: Expr, b: Expr) -> Expr:
    if ZERO in (a, b):
        return ZERO
    return b if a is ONE else a if b is ONE else op("mul", a, b)


def settled_of(stream: Streaming) -> dict[Expr, Expr]:
    """The substitution that reads :data:`SETTLED` instead of computing it; nothing where no seed raises the shift."""
    if stream.shift is None or stream.settled is None or stream.settled is accumulated(stream.shift):
        return {}
    return {stream.settled: SETTLED}


def pair_value(value: Expr, shift: Expr | None) -> Expr:
    """What a pair brings to an accumulator, in terms of the raw score ``s`` and :data:`LOGIT`, with exponentials
    relative to ``shift``."""
    names: dict[Expr, Expr] = {RAW_SCORE: LOGIT, RAW: RAW_SCORE}
    if shift is not None:
        names[SHIFTED] = op("exp", op("sub", LOGIT, shift))
    return substitute(value, names)


def _values(stream: Streaming) -> dict[str, Expr]:
    """What a pair brings to every accumulator, in terms of the raw score ``s`` and :data:`LOGIT`."""
    settled = settled_of(stream)
    found: dict[str, Expr] = {}
    for number, accumulators in enumerate(stream.passes):
        shift = None
        if stream.shift is not None:
            shift = accumulated(stream.shift) if number == 0 or not settled else SETTLED
        for a in accumulators:
            found[a.name] = pair_value(substitute(a.value, settled), shift)
    return found


def _is_smooth(a: Accumulator, stream: Streaming) -> bool:
    return a.monoid == "sum" and a.name != stream.shift


def _refuse_others(stream: Streaming, values: dict[str, Expr]) -> None:
    """Refuse what has a gradient through the place of a maximum."""
    smooth = {a.name for a in stream.accumulators if _is_smooth(a, stream)}
    for a in stream.accumulators:
        if a.name in smooth or a.name == stream.shift:
            continue
        if any(out.column == a.name for out in stream.outputs):
            raise Unstreamable(f"the gradient of a {a.monoid} over queries goes to the pair that made it")
        readers = [out.value for out in row_outputs(stream)] + [values[n] for n in smooth]
        node = accumulated(a.name)
        reached = any(derivatives(e, (node,))[node] is not ZERO for e in readers)
        if reached and (a.monoid == "argmax" or not is_only_a_shift(stream, a.name)):
            raise Unstreamable(f"the gradient of a {a.monoid} goes to the pair that made it")


def pullback(stage: Attend) -> Pullback:
    """Return the backward pass of ``stage``.

    Raises:
        Unstreamable: no kernel can stream the stage, or its gradient is more than sums over pairs.
    """
    stream = streaming(stage)
    body = body_of(stage.terms[0])
    if body is not None and any(level is Level.PAIR for level in map(_level, body.loads)):
        raise Unstreamable("the body of its score reads a captured tensor by pair")
    values = _values(stream)
    _refuse_others(stream, values)
    if stream.shift is not None and not is_only_a_shift(stream, stream.shift):
        raise Unstreamable("it reads the maximum of the scores as a number")
    if sum(out.rows is not None for out in stream.outputs) > 1:
        raise Unstreamable("two outputs share one sum of rows")
    smooth = [a for a in stream.accumulators if _is_smooth(a, stream)]
    factor = next((out.value for out in stream.outputs if out.rows is not None), ONE)
    factor = ONE if factor is ONE else FACTOR

    def given(a: Accumulator) -> Expr:
        return cotangent(a) if a.rows is None else _times(DP, factor)

    score = simplify(stage.branch.score)
    to_score: dict[Expr, Expr] = {LOGIT: score}
    # a score of minus infinity hides its pair; what reads it as a number must not meet it
    hides = score is not RAW_SCORE and any(RAW_SCORE in set(postorder(a.value)) for a in smooth)

    def finished(expr: Expr) -> Expr:
        expr = substitute(expr, to_score)
        if hides and expr is not ZERO:
            expr = op("where", op("ne", score, -math.inf), expr, ZERO)
        return simplify(expr)

    def by(node: Expr, readers: Iterable[Accumulator]) -> Expr:
        return _sum(_times(given(c), derivatives(values[c.name], (node,))[node]) for c in readers)

    sweeps = []
    for number in reversed(range(len(stream.passes) - 1)):
        later = [a for a in smooth if any(a in found for found in stream.passes[number + 1 :])]
        sums = []
        for a in stream.passes[number]:
            if a in smooth and a.rows is None and a.over == "k":
                part = by(accumulated(a.name), later)
                if part is not ZERO:
                    sums.append((cotangent(a), finished(part)))
        if sums:
            sweeps.append(Sweep(tuple(sums)))

    dlogit, direct = by(LOGIT, smooth), by(RAW_SCORE, smooth)
    nodes = [n for n in postorder(score, *values.values()) if isinstance(n, Load) and n.type is FLOAT]
    through = derivatives(score, (RAW_SCORE, *nodes))
    draw = _sum((_times(dlogit, through[RAW_SCORE]), direct))
    loads = [(n, _sum((_times(dlogit, through[n]), by(n, smooth)))) for n in nodes]
    summed = next((a for a in smooth if a.rows is not None), None)
    weight = None if summed is None else finished(_times(factor, values[summed.name]))
    kept = tuple((n, finished(e)) for n, e in loads if e is not ZERO)
    return Pullback(stream, finished(draw), weight, tuple(sweeps), kept, body)


def _level(found: tuple[Load, Expr]) -> Level:
    return levels(found[0])[found[0]]


def is_zero(expr: Expr) -> bool:
    """Whether a gradient vanishes by itself."""
    return isinstance(expr, Const) and expr.value == 0
