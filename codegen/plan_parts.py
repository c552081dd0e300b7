"""What kernel plans are made of: statements, the passes they belong to, tensors and gradients of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attnlang.ir import Expr, Input, Load, Type, format_expr, postorder
from attnlang.passes.levels import Level
from attnlang.passes.streaming import Accumulator

__all__ = ["CapturedGrad", "Section", "Step", "SweepStep", "TensorArg", "Value", "needed"]


@dataclass(frozen=True)
class TensorArg:
    """A captured tensor as the kernel sees it: a pointer, one stride and one extent per dimension."""

    name: str
    type: Type
    dtype: str
    rank: int


@dataclass(frozen=True)
class Value:
    """One statement ``name = expr``; inside ``expr`` printing stops at nodes that are values themselves."""

    name: str
    expr: Expr
    level: Level

    @property
    def comment(self) -> str:
        """The source expression, for a comment in the generated kernel."""
        text = format_expr(self.expr)
        return text if len(text) <= 90 else text[:87] + "..."


@dataclass(frozen=True)
class Section:
    """What one kind of tile computes: per-query, per-key and per-pair statements.

    A pass with queries outside hoists the row statements of the PARTIAL section (they include those of the FULL one)
    out of the key loop; a pass with keys outside hoists the column statements instead.
    """

    col: tuple[Value, ...]
    pair: tuple[Value, ...]
    row: tuple[Value, ...] = ()

    def needed(self, *roots: Expr) -> Section:
        """The statements that ``roots`` are made of."""
        return Section(needed(self.col, roots), needed(self.pair, roots), needed(self.row, roots))


def needed(values: Iterable[Value], roots: Iterable[Expr]) -> tuple[Value, ...]:
    """Those of ``values`` that ``roots`` are made of."""
    found = set(postorder(*roots))
    return tuple(v for v in values if v.expr in found)


@dataclass(frozen=True)
class Step:
    """One pass over the keys: its accumulators, the statements their values need, and the row statements after it."""

    accumulators: tuple[Accumulator, ...]
    values: Section
    after: tuple[Value, ...]

    @property
    def weights(self) -> Accumulator | None:
        """The accumulator that sums weighted rows, if this pass has it."""
        return next((a for a in self.accumulators if a.rows is not None), None)


@dataclass(frozen=True)
class SweepStep:
    """A pass over the keys before the last one of a backward kernel.

    It sums every pair expression of ``sums`` over the visible keys and adds it to that row input; ``after`` are the
    row statements that wait for it.
    """

    sums: tuple[tuple[Input, Expr], ...]
    full: Section
    partial: Section
    after: tuple[Value, ...]


@dataclass(frozen=True)
class CapturedGrad:
    """How one load of a captured tensor takes part in the backward pass.

    The gradient of the tensor is the sum over visible pairs of ``ds' * derivative`` at ``load``'s index, where ds' is
    the gradient of the modified score; in a plan with a pullback it is the sum of ``derivative`` itself. ``level`` is
    the level of the index: a ROW load is summed over keys in registers and written once a query, a COL load once a key,
    a GRID load once a (b, h); only a PAIR load needs a scatter.

    A gradient ``by_feature`` is that of a load in the body of the score term: it has a sum for every feature, of the
    raw score's gradient times ``derivative``, and no PAIR load.
    """

    load: Load
    derivative: Expr
    level: Level
    by_feature: bool = False
