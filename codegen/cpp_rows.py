"""The C++ target of rows stages: a kernel of its own, or a function inside of a kernel of attention.

Lanes are neighbouring features of one row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from attnlang.ir import FLOAT, Expr, Index, Input, Load, Op, format_program
from attnlang.passes.fusion import INNER, here
from attnlang.passes.levels import Level

from .cpp_arguments import Arguments, Field, captured
from .cpp_printer import ELEMENTS, CppExpressions, comment, declaration
from .cpp_render import needs, render
from .isa import COMMON_FLAGS, Isa
from .rows import RowPass, RowsPlan

__all__ = ["ENTRY", "RowsText", "arguments", "emit", "rows_text"]

ENTRY = "attnlang_rows"
"""Name of the exported function."""


class _Printer(CppExpressions[RowsPlan]):
    laned = frozenset((Level.COL, Level.PAIR))

    def reference(self, node: Expr, name: str, at: Level) -> str:
        return name if self.plan.level(node) in self.laned else self.spread(name, node, at)

    def index(self, node: Index, at: Level) -> str:
        if node.axis == "d":
            return "feature"
        return self.spread({"q": "row"}.get(node.axis, node.axis), node, at)

    def input(self, node: Input, at: Level) -> str:
        return node.name if node is INNER else self.spread(node.name, node, at)

    def load(self, node: Load, at: Level) -> str:
        start = self._start(node) if at in self.laned else None
        if start is None:
            return super().load(node, at)
        base = [f"t_{node.tensor}"]
        name = f"t_{node.tensor}"
        along = ""
        for d, (index, (low, high)) in enumerate(zip(node.indices, self.plan.load_guards(node), strict=True)):
            if self.plan.level(index) in self.laned:
                along = f"{name}_s{d}, {start}, a.{name}_n{d}"
            else:
                text = self.clamped(index, Level.GRID, False, f"a.{name}_n{d}", low, high)
                base.append(f"(int64){text} * {name}_s{d}")
        return f"along({' + '.join(base)}, {along})"

    def _start(self, node: Load) -> str | None:
        """Where the elements are that belong to the lanes, if these follow each other along one dimension."""
        moving = [i for i in node.indices if self.plan.level(i) in self.laned]
        if node.type is not FLOAT or len(moving) != 1:
            return None
        (index,) = moving
        if index is Index("d"):
            return "first"
        if not isinstance(index, Op) or index.op not in ("add", "sub"):
            return None
        a, b = index.args
        if b is Index("d") and index.op == "add":
            a, b = b, a
        if a is not Index("d") or self.plan.level(b) in self.laned:
            return None
        return f"first {'+' if index.op == 'add' else '-'} {self.text(b, Level.GRID)}"


@dataclass(frozen=True)
class PassText:
    """One loop over features: statements, and the sum or the element they are for."""

    name: str
    monoid: str
    before: list[str]
    inside: list[str]
    value: str


@dataclass(frozen=True)
class RowsText:
    """A function that makes rows; it reads rows at hand where it ``changes`` them.

    ``statistics`` are names of numbers of the row at hand, and the outputs of the kernel that they are.
    """

    name: str
    about: str
    locals: tuple[str, ...]
    grid: list[str]
    passes: list[PassText]
    reads_feature: bool
    changes: bool
    statistics: tuple[tuple[str, str], ...]
    helpers: frozenset[str]


def rows_text(plan: RowsPlan) -> RowsText:
    """Print the function of ``plan``."""
    printer = _Printer(plan)

    def text(step: RowPass) -> PassText:
        value = printer.text(step.value, Level.PAIR)
        inside = _used([(v.name, declaration(printer, v)) for v in step.inside], value)
        before = [declaration(printer, v) for v in step.before]
        return PassText(step.name, step.monoid, before, inside, value)

    grid = [declaration(printer, v) for v in plan.grid]
    passes = [text(step) for step in plan.passes]
    lines = (*(line.partition("//")[0] for p in passes for line in p.inside), *(p.value for p in passes))
    return RowsText(
        name=f"{plan.stage.name}_rows",
        about=comment(f"{plan.stage.name}[{', '.join(map(printer.source, plan.stage.extents))}]"),
        locals=captured(plan)[1],
        grid=grid,
        passes=passes,
        reads_feature=any("feature" in line for line in lines),
        changes=plan.changes,
        statistics=tuple((here(name).name, name) for name in plan.statistics),
        helpers=frozenset(printer.helpers),
    )


def _used(statements: list[tuple[str, str]], value: str) -> list[str]:
    """The statements that ``value`` needs; indices of elements that follow each other are not computed."""
    kept: list[str] = []
    for name, line in reversed(statements):
        code = [value, *(known.partition("//")[0].partition("=")[2] for known in kept)]
        if any(re.search(rf"\b{name}\b", text) for text in code):
            kept.append(line)
    return kept[::-1]


def arguments(plan: RowsPlan) -> Arguments:
    """Return the argument record of the kernel of ``plan``."""
    fields = [Field("y", "void *", ("pointer", "y"))]
    fields += [Field(f"y_n{d}", "int64", ("extent", "y", str(d))) for d in range(4)]
    fields += [Field(f"n_{name}", "int64", ("size", name)) for name in plan.sizes]
    found, _ = captured(plan)
    return Arguments((*fields, *found), ())


def emit(plan: RowsPlan, isa: Isa) -> str:
    """Return the C++ source of a kernel that makes all rows of ``plan``; equal inputs give equal text."""
    text = rows_text(plan)
    header = [
        f"Rows made point by point, generated by attnlang for {isa.name}.",
        "",
        *format_program(plan.program).splitlines(),
        "",
        f"Build: c++ {' '.join((*COMMON_FLAGS, *isa.flags))} FILE.cpp -o FILE.so",
    ]
    return render(
        "cpp_rows.j2",
        header="\n".join(comment(f"// {line}") for line in header),
        isa=isa,
        operators=needs(text.helpers),
        arguments=arguments(plan),
        made=text,
        element=ELEMENTS[plan.storage],
        entry=ENTRY,
    )
