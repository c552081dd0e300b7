"""Sums over the queries by a kernel with the keys outside, which finds every row statistic already known.

An accumulator over q is one number a key. A kernel whose instances are tiles of queries cannot finish it; one whose
instances are tiles of keys can, once the accumulators of the rows have their final values.
"""

from __future__ import annotations

from attnlang.ir import Expr, substitute
from attnlang.ir.build import op
from attnlang.ir.build import s as RAW_SCORE

from .pullback import LOGIT, pair_value
from .simplify import simplify
from .streaming import Accumulator, Streaming, accumulated

__all__ = ["column_values"]


def column_values(stream: Streaming, score: Expr) -> tuple[tuple[Accumulator, Expr], ...]:
    """Every accumulator over the queries, with what a visible pair brings to it.

    Values read the raw score ``s``, indices, captured tensors, and the final values of accumulators of rows as
    :func:`.streaming.accumulated`. ``score`` is the modified score; where it is minus infinity, a pair brings nothing.
    """
    found = []
    for a in stream.accumulators:
        if a.over != "q":
            continue
        final = None if stream.shift is None else stream.settled or accumulated(stream.shift)
        value = substitute(pair_value(a.value, final), {LOGIT: score})
        if score is not RAW_SCORE:  # in a row where all scores are minus infinity, so is what they are relative to
            value = op("where", op("ne", score, float("-inf")), value, a.identity)
        found.append((a, simplify(value)))
    return tuple(found)
