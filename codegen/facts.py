"""What is known of the expressions of a plan: levels, widths, and what the range analysis proves."""

from __future__ import annotations

from collections.abc import Mapping

from attnlang.ir import Const, Expr, Index, Load, Op, Param, Program, Size
from attnlang.passes.levels import Level
from attnlang.passes.value_ranges import value_range
from attnlang.passes.widths import Width

from .plan_parts import TensorArg

__all__ = ["Facts"]


_EXTENTS: dict[str, Expr] = {"b": Size("B"), "h": Size("H"), "q": Size("Lq"), "k": Size("Lk")}


class Facts:
    """Questions a printer has about a plan, which the dataclasses derived from this hold the answers to."""

    program: Program
    tensors: tuple[TensorArg, ...]
    scalars: tuple[Param, ...]
    sizes: tuple[str, ...]
    wide: bool
    names: Mapping[Expr, str]
    node_levels: Mapping[Expr, Level]
    node_widths: Mapping[Expr, Width]
    bounds: Mapping[Expr, tuple[int | None, int | None]]

    def level(self, node: Expr) -> Level:
        return self.node_levels[node]

    def width(self, node: Expr) -> Width:
        return self.node_widths[node]

    def never_negative(self, node: Expr) -> bool:
        """Whether the int ``node`` is proved to be at least 0."""
        low = value_range(node, self.bounds).lo
        return low is not None and low >= 0

    def never_zero(self, node: Expr) -> bool:
        """Whether the int ``node`` is proved to be non-zero."""
        span = value_range(node, self.bounds)
        return (span.lo is not None and span.lo > 0) or (span.hi is not None and span.hi < 0)

    def load_guards(self, load: Load) -> tuple[tuple[bool, bool], ...]:
        """For each index of ``load``, whether it needs a clamp from below and from above.

        The kernel hands hooks row and key indices that are already inside Lq and Lk, also in tail tiles.
        """
        shape = self.program.tensor(load.tensor).shape
        return tuple(
            (not self.never_negative(index), not self._below(index, dim))
            for index, dim in zip(load.indices, shape, strict=True)
        )

    def extent(self, axis: str) -> Expr | None:
        """What an index of ``axis`` is below."""
        return _EXTENTS.get(axis)

    def _below(self, index: Expr, dim: Expr) -> bool:
        if isinstance(index, Index):
            return dim is self.extent(index.axis)
        if isinstance(index, Op) and index.op == "mod" and index.args[1] is dim:
            return self.never_negative(index.args[0])
        if isinstance(dim, Const):
            high = value_range(index, self.bounds).hi
            return high is not None and high < int(dim.value)
        return False
