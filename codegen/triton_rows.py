"""The Triton target of rows stages: a function that makes a tile of rows, in a kernel of its own or one of attention.

A tile is ``[BLOCK_M, columns]``, whole rows with their features padded to a power of two, so that sums over the
features stay in registers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from attnlang.ir import FLOAT, Expr, Input, format_expr
from attnlang.passes.fusion import INNER, here
from attnlang.passes.levels import Level

from .rows import RowPass, RowsPlan
from .triton_common import (
    Arguments,
    Config,
    Line,
    comment,
    lines,
    padded,
    program_lines,
    template,
    tensor_parameters,
    wrapped,
)
from .triton_helpers import helper_sources
from .triton_printer import TritonExpressions, safe_name

__all__ = [
    "KERNEL_NAME",
    "MOST_FEATURES",
    "RowsText",
    "arguments",
    "candidates",
    "change_output",
    "emit",
    "given_name",
    "helpers_of",
    "make_queries",
]

KERNEL_NAME = "attention_rows"

MOST_FEATURES = 8192
"""Features of a row that a tile can hold."""

ELEMENTS = 4096
"""Elements of a tile of the kernel of its own, where rows are not longer."""


_LEAST = '-float("inf")'


class _Printer(TritonExpressions[RowsPlan]):
    axes: ClassVar[Mapping[str, tuple[str, Level]]] = {
        "b": ("b", Level.GRID),
        "h": ("h", Level.GRID),
        "q": ("q_idx", Level.ROW),
        "d": ("d_idx", Level.COL),
    }

    def input(self, node: Input, at: Level) -> str:
        if node is INNER:
            return "inner_"
        given = {here(name): given_name(name) for name in self.plan.statistics}
        return self._spread(given.get(node) or self.value_name(node.name), self.plan.level(node), at)


def given_name(name: str) -> str:
    """Return the parameter for an output of the kernel of attention; no name of a program is like it."""
    return f"{here(name).name}_"


@dataclass(frozen=True)
class PassText:
    """The reduction ``value`` of ``element_`` over the features, what that is, and the statements it needs."""

    statements: list[Line]
    name: str
    element: str
    value: str


@dataclass(frozen=True)
class RowsText:
    """A function ``name`` that makes rows of ``features`` elements in tiles of ``block`` columns.

    It ``changes`` rows at hand or makes them of tensors alone. ``statistics`` are the outputs of the kernel of
    attention that it is given of a row, after the rows; ``parameters`` what follows.
    """

    name: str
    about: str
    features: str
    block: str
    ragged: bool
    reads_feature: bool
    changes: bool
    statistics: tuple[str, ...]
    parameters: tuple[str, ...]
    grid: list[Line]
    passes: list[PassText]
    last: list[Line]
    value: str
    helpers: frozenset[str]

    @property
    def given(self) -> list[str]:
        """Parameters for ``statistics``."""
        return [given_name(name) for name in self.statistics]

    @property
    def own(self) -> tuple[str, ...]:
        """Parameters of the function."""
        inner = ("inner_",) if self.changes else ()
        return ("b", "h", "q_idx", *inner, *self.given, *self.parameters)

    def call(self, *given: str) -> list[str]:
        """Lines of the arguments of a call; ``given`` are the rows at hand and the statistics."""
        text = ", ".join(("b", "h", "q_idx", *given, *self.parameters))
        return textwrap.wrap(f"{text},", 108, break_long_words=False)


def _parameters(plan: RowsPlan) -> tuple[str, ...]:
    tensors = (name for t in plan.tensors for name, _ in tensor_parameters(t))
    return (*tensors, *(safe_name(p.name) for p in plan.scalars), *map(safe_name, plan.sizes))


def _text(plan: RowsPlan, name: str, constants: tuple[str, str], width: int, interpreted: bool) -> RowsText:
    """Print the function of ``plan`` for rows of ``width`` features, whose number and padding ``constants`` name."""
    printer = _Printer(plan, interpreted=interpreted)
    features, block = constants
    ragged = padded(width) != width
    known: set[str] = set()

    def tile(root: Expr) -> str:
        """``root`` as a full tile."""
        text = printer.text(root, Level.PAIR)
        if root.type is not FLOAT:
            text = f"({text}).to(tl.float32)"
        if plan.level(root) is not Level.PAIR:
            text = f"tl.zeros([BLOCK_M, {block}], tl.float32) + {text}"
        return text

    def statements(step: RowPass) -> list[Line]:
        mine = [v for v in (*step.before, *step.inside) if v.name not in known]
        known.update(v.name for v in mine)
        return lines(printer, mine)

    def reduced(step: RowPass) -> PassText:
        found = statements(step)
        nothing = _LEAST if step.monoid == "max" else "0.0"
        element = f"tl.where(d_mask[None, :], element_, {nothing})" if ragged else "element_"
        if step.monoid == "max":
            printer.helpers.add("greatest")
            value = f"greatest({element})"
        else:
            value = f"tl.sum({element}, 1)" + (f" / {features}" if step.monoid == "mean" else "")
        return PassText(found, printer.value_name(step.name), tile(step.value), value)

    *sums, last = plan.passes
    grid = lines(printer, plan.grid)
    passes = [reduced(step) for step in sums]
    ending, value = statements(last), tile(last.value)
    extents = ", ".join(map(format_expr, plan.stage.extents))
    return RowsText(
        name=name,
        about=comment(f"{plan.stage.name}[{extents}]").replace("\\", "/").replace('"', "'"),
        features=features,
        block=block,
        ragged=ragged,
        reads_feature="d_idx" in printer.used,
        changes=plan.changes,
        statistics=plan.statistics,
        parameters=_parameters(plan),
        grid=grid,
        passes=passes,
        last=ending,
        value=value,
        helpers=frozenset(printer.helpers),
    )


def make_queries(plan: RowsPlan | None, head_dim: int, *, interpreted: bool) -> RowsText | None:
    """Return the function that makes the rows of q in a kernel of attention, None where these are read."""
    constants = ("HEAD_DIM", "BLOCK_D")
    return None if plan is None else _text(plan, "make_queries", constants, head_dim, interpreted)


def change_output(plan: RowsPlan | None, value_dim: int, *, interpreted: bool) -> RowsText | None:
    """Return the function that changes the rows of the output, None where these are stored as they are."""
    constants = ("VALUE_DIM", "BLOCK_DV")
    return None if plan is None else _text(plan, "change_output", constants, value_dim, interpreted)


def candidates(features: int, *, interpreted: bool = False) -> tuple[Config, ...]:
    """Return tiles of the kernel of its own in order of preference: rows, and features padded."""
    block = padded(features)
    rows = dict.fromkeys(max(1, n // block) for n in (ELEMENTS, ELEMENTS // 4))
    return tuple(Config(16 if interpreted else n, block, 4, 1) for n in rows)


def arguments(plan: RowsPlan) -> Arguments:
    """Return the parameters of the kernel of ``plan``; ``launch`` takes o [B, H, L, D] and what it reads."""
    pairs = [("o_ptr", "o"), ("heads_", "o.shape[1]"), ("rows_", "o.shape[2]")]
    pairs += [pair for t in plan.tensors for pair in tensor_parameters(t)]
    numbers = [safe_name(n) for n in (*(p.name for p in plan.scalars), *plan.sizes)]
    pairs += [(n, n) for n in numbers]
    names = {t.name: safe_name(t.name) for t in plan.tensors}
    extents = [f"{names[t.name]}_size{d}" for t in plan.tensors for d in range(t.rank)]
    return Arguments(
        kernel=tuple(name for name, _ in pairs),
        host=("o", *names.values(), *numbers),
        call=tuple(text for _, text in pairs),
        loose=("heads_", "rows_", *extents, *numbers),
        pointers={name: f"{safe}_ptr" for name, safe in names.items()},
        last_strides=tuple(f"{names[t.name]}_stride{t.rank - 1}" for t in plan.tensors if t.rank),
        float_scalars=tuple(safe_name(p.name) for p in plan.scalars if p.type is FLOAT),
    )


def emit(plan: RowsPlan, config: Config, *, features: int, interpreted: bool = False) -> str:
    """Return the Triton source of a kernel that makes all rows of ``plan``, which have ``features`` elements."""
    made = _text(plan, "make_rows", ("FEATURES", "BLOCK_D"), features, interpreted)
    text = template("triton_rows.j2").render(
        title=comment(f"The rows {plan.stage.name}, point by point"),
        program_text=program_lines(plan),
        config=config,
        features=features,
        kernel_name=KERNEL_NAME,
        made=made,
        helpers=helper_sources(made.helpers),
        arguments=arguments(plan),
    )
    return "".join(map(wrapped, str(text).splitlines(keepends=True)))


def helpers_of(maps: Iterable[RowsText | None]) -> set[str]:
    """Helpers that functions of rows call."""
    return {helper for made in maps if made is not None for helper in made.helpers}
