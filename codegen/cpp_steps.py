"""Text of the passes over the keys: how accumulators start, take in a chunk of scores, and become outputs."""

from __future__ import annotations

from dataclasses import dataclass

from attnlang.ir import Expr, Index, Input, postorder
from attnlang.passes.factors import ONE, SHIFTED
from attnlang.passes.levels import Level
from attnlang.passes.streaming import Accumulator, Made

from .cpp_printer import CppPrinter, declaration
from .plan import Section, Step

__all__ = ["StepText", "epilogue", "state", "step_text"]

_IDENTITY = {0.0: "vfloat{}", float("inf"): "all_float(INFINITE)", float("-inf"): "all_float(-INFINITE)"}


@dataclass(frozen=True)
class Held:
    """An accumulator as text; ``value`` is what a visible pair brings."""

    name: str
    kind: str
    identity: str
    comment: str
    value: str = ""
    power: int = 0
    vanishes: bool = False
    is_column: bool = False

    def chosen(self, hidden: bool) -> str:
        """What a pair brings; with ``hidden`` some pairs of the tile may bring nothing."""
        return self.value if self.vanishes or not hidden else f"(seen ? {self.value} : {self.identity})"

    def update(self, hidden: bool) -> str:
        """The statement that takes a pair in."""
        value = self.chosen(hidden)
        if self.is_column:
            return f"{self.name}[v] = exists[w] ? {value} : {self.identity};"
        name = f"{self.name}[v]"
        match self.kind:
            case "sum":
                return f"{name} += {value};"
            case "max":
                return f"{name} = larger({name}, {value});"
            case "min":
                return f"{name} = smallest({name}, {value});"
        return f"place({name}, {self.name}_at[v], {value}, key);"


@dataclass(frozen=True)
class StepText:
    """Text of one pass: ``follow`` names the running maximum, ``base`` is what scores are relative to elsewhere."""

    held: tuple[Held, ...]
    columns: tuple[Held, ...]
    rows: Held | None
    follow: str
    base: str
    uses_shifted: bool
    uses_raw: bool
    uses_key: bool
    uses_score: bool
    uses_row: bool
    needs_seen: bool
    col: tuple[str, ...]
    pair: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def has_pairs(self) -> bool:
        """Whether anything but the maximum is done with a pair."""
        return bool(self.held or self.columns or self.rows)


def _reads(name: str, *roots: Expr) -> bool:
    return any(isinstance(n, Input) and n.name == name for n in postorder(*roots))


def _held(printer: CppPrinter, a: Accumulator) -> Held:
    text = printer.text(a.value, Level.PAIR)
    comment = f"{a.monoid} over {a.over} of {printer.source(a.value)}"
    return Held(a.name, a.monoid, _IDENTITY[a.identity], comment, text, a.power, a.vanishes, is_column=a.over == "q")


def state(printer: CppPrinter) -> list[Held]:
    """Accumulators that live as long as a query block, one vector for every vector of queries."""
    stream = printer.plan.stream
    assert stream is not None
    return [_held(printer, a) for a in stream.accumulators if a.rows is None and a.over == "k"]


def step_text(printer: CppPrinter, step: Step, number: int) -> StepText:
    """Print one pass."""
    plan = printer.plan
    stream = plan.stream
    assert stream is not None
    follow = stream.shift if number == 0 and stream.shift is not None else ""
    rest = [a for a in step.accumulators if a.name != follow]
    roots = [a.value for a in rest]
    shifted = _reads(SHIFTED.name, *roots)
    base = printer.text(stream.settled, Level.ROW) if shifted and not follow and stream.settled is not None else ""
    section: Section = step.values
    col = tuple(declaration(printer, v) for v in section.col)
    pair = tuple(declaration(printer, v) for v in section.pair)
    texts = [_held(printer, a) for a in rest]
    needs = any(not t.vanishes for t in texts)
    lines = (*pair, *(t.value for t in texts))
    uses_key = any(isinstance(n, Index) and n.axis == "k" for n in postorder(*roots))
    return StepText(
        held=tuple(t for t, a in zip(texts, rest, strict=True) if a.rows is None and a.over == "k"),
        columns=tuple(t for t in texts if t.is_column),
        rows=next((t for t, a in zip(texts, rest, strict=True) if a.rows is not None), None),
        follow=follow,
        base=base,
        uses_shifted=shifted,
        uses_raw=_reads("raw", *roots),
        uses_key=uses_key or any(a.monoid == "argmax" for a in rest),
        uses_score=_reads("s", *roots) or shifted,
        uses_row=any("[w]" in line for line in lines),
        needs_seen=needs,
        col=col,
        pair=pair,
        after=tuple(f"{v.name}[w] = {printer.value(v)};  // {printer.source(v.expr)}" for v in step.after),
    )


def epilogue(printer: CppPrinter) -> list[str]:
    """Statements that write what vector ``w`` of the queries has become."""
    stream = printer.plan.stream
    assert stream is not None
    lines = []
    for out in stream.outputs:
        if out.column is None:
            lines.append(_write(printer, out))
    return lines


def _write(printer: CppPrinter, out: Made) -> str:
    if out.rows is not None:
        text = "all_float(1.0f)" if out.value is ONE else printer.text(out.value, Level.ROW)
        return f"factor[w] = {text};"
    if out.integer:
        assert isinstance(out.value, Input)
        return f"put(a.y_{out.name} + row, rows.{out.value.name}_at[w], places + w * LANES, count - w * LANES);"
    return f"put(a.y_{out.name} + row, {printer.text(out.value, Level.ROW)}, places + w * LANES, count - w * LANES);"
