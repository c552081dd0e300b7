"""Text of the part of a C++ kernel that says which key tiles a block of queries meets."""

from __future__ import annotations

from dataclasses import dataclass

from attnlang.ir import postorder
from attnlang.passes.levels import Level

from .cpp_printer import CppPrinter
from .plan import Value
from .runs import RunBounds

__all__ = ["BoundsText", "bounds_text"]


@dataclass(frozen=True)
class BoundsText:
    """Run bounds in C++: statements, and for each part the texts of its four ends."""

    values: list[Value]
    parts: list[tuple[str, ...]]
    rises: bool

    @property
    def space(self) -> int:
        """Numbers that the runs of a block take: a pair for the full ones and two for the partial ones of a part."""
        return 6 * len(self.parts)


def bounds_text(printer: CppPrinter, runs: RunBounds | None) -> BoundsText | None:
    """Return the text of ``runs``, None where the kernel reads a table."""
    if runs is None:
        return None
    plan = printer.plan
    read = set(postorder(*runs.exprs))
    values = [v for v in plan.grid if v.expr in read] + list(plan.run_values(runs))
    parts = [tuple(printer.text(e, Level.GRID) for e in part.exprs) for part in runs.parts]
    return BoundsText(values, parts, runs.rises)
