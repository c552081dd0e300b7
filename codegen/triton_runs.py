"""Text of the part of a Triton kernel that says which tiles a row of tiles meets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attnlang.ir import Expr, postorder
from attnlang.passes.levels import Level
from attnlang.passes.widths import Width

from .plan import KernelPlan
from .runs import RunBounds
from .triton_common import RUN_TABLE
from .triton_printer import TritonPrinter

__all__ = ["BoundsText", "bounds_text", "table_arguments"]


def table_arguments(plan: KernelPlan, loop: str) -> tuple[str, ...]:
    """Return the parameters for the run table of the kernel of ``plan`` whose inner loop is over ``loop``."""
    return RUN_TABLE if plan.run_bounds(loop) is None else ()


@dataclass(frozen=True)
class _Line:
    name: str
    text: str


@dataclass(frozen=True)
class BoundsText:
    """Run bounds in Triton: statements, and the ascending ranges [start, end) of full and of partial tiles."""

    first: str
    last: str
    reads_first: bool
    reads_last: bool
    values: list[_Line]
    full: list[tuple[str, str]]
    part: list[tuple[str, str]]
    rises: bool
    needs: str


def bounds_text(printer: TritonPrinter, runs: RunBounds | None) -> BoundsText | None:
    """Return the text of ``runs``, None where the kernel reads a table."""
    if runs is None:
        return None
    plan = printer.plan
    values = [_Line(printer.value_name(v.name), printer.value(v)) for v in plan.run_values(runs)]

    def end(expr: Expr) -> str:
        text = printer.text(expr, Level.GRID)
        return f"{text}.to(tl.int32)" if plan.width(expr) is Width.I64 else text

    ends = [tuple(map(end, part.exprs)) for part in runs.parts]
    read = set(postorder(*runs.exprs))
    return BoundsText(
        first=runs.first.name,
        last=runs.last.name,
        reads_first=runs.first in read,
        reads_last=runs.last in read,
        values=values,
        full=_ranges((e[1], e[2]) for e in ends),
        part=_ranges(pair for e in ends for pair in ((e[0], e[1]), (e[2], e[3]))),
        rises=runs.rises,
        needs=runs.needs,
    )


def _ranges(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The ranges that are not empty by their very text; at least one."""
    return [pair for pair in pairs if pair[0] != pair[1]] or [("0", "0")]
