"""The body of a score term as a kernel sums it over the features of two rows, and its derivatives.

Inside of the loop over features an expression has the levels it has elsewhere: one feature of the query's row varies
with the query, one of the key's row with the key, and a table of features with neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attnlang.ir import FLOAT, Dot, Expr, Input, Load, postorder, substitute
from attnlang.ir.stages import BODY_LEFT, BODY_RIGHT

from .derivatives import derivatives
from .factors import ZERO
from .levels import axes_of
from .simplify import simplify

__all__ = ["LEFT", "RIGHT", "Body", "body_of", "per_feature"]

LEFT = BODY_LEFT
"""One feature of the query's row."""
RIGHT = Input(BODY_RIGHT.name, FLOAT, "bhkd")
"""One feature of the key's row: kernels read rows that the key alone chooses."""


@dataclass(frozen=True)
class Body:
    """What a feature adds to the term: ``value`` over :data:`LEFT`, :data:`RIGHT`, the feature ``d``, indices and
    captured tensors. ``left`` and ``right`` are its derivatives by the two features, ``loads`` those by what it reads
    of captured tensors."""

    value: Expr
    left: Expr
    right: Expr
    loads: tuple[tuple[Load, Expr], ...]

    def captured(self, wanted: Iterable[str]) -> tuple[tuple[Load, Expr], ...]:
        """Loads of the tensors ``wanted``, each with its derivative."""
        names = set(wanted)
        return tuple((load, value) for load, value in self.loads if load.tensor in names)


def body_of(term: Dot) -> Body | None:
    """The body of ``term``, None where it is a dot product."""
    if term.body is None:
        return None
    value = simplify(substitute(term.body, {BODY_RIGHT: RIGHT}))
    nodes = [n for n in postorder(value) if isinstance(n, Load) and n.type is FLOAT]
    by = derivatives(value, (LEFT, RIGHT, *nodes))
    loads = tuple((n, by[n]) for n in nodes if by[n] is not ZERO)
    return Body(value, by[LEFT], by[RIGHT], loads)


def per_feature(*roots: Expr) -> frozenset[Expr]:
    """The nodes under ``roots`` that differ between features."""
    return frozenset(n for n, axes in axes_of(*roots).items() if "d" in axes)
