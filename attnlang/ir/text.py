"""Programs as ``.attn`` text, for people, and so that it can be read back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from . import normalizers
from .build import TRUE
from .build import s as _s
from .nodes import Expr, Input, Op, substitute
from .printer import format_expr
from .program import Program
from .stages import (
    DEFAULT_OUTPUTS,
    KEY,
    KEY_ADDRESS,
    QUERY,
    QUERY_ADDRESS,
    SOFTMAX,
    STAGE_INPUTS,
    VALUE,
    Attend,
    Branch,
    Dot,
    Map,
    Normalizer,
    Operand,
    Output,
    Pool,
    Select,
    Stage,
)
from .types import FLOAT

__all__ = ["format_program"]

MAIN = Attend().name
"""Name of the stage that the statements outside of blocks are."""
_RULES = ("top", "threshold", "mass")


def _rows(operand: Operand) -> str:
    name = operand.source.upper() if operand.source in STAGE_INPUTS else operand.source
    if operand.index in (QUERY_ADDRESS, KEY_ADDRESS):
        return name
    return f"{name}[{_listed(operand.index)}]"


def _listed(exprs: tuple[Expr, ...]) -> str:
    return ", ".join(map(format_expr, exprs))


def _several(exprs: tuple[Expr, ...]) -> str:
    return _listed(exprs) if len(exprs) == 1 else f"({_listed(exprs)})"


def _normalizer(norm: Normalizer, indent: str = "    ") -> Iterator[str]:
    if norm == SOFTMAX:
        return
    if norm.name == "softmax" and norm.stats[0].seed is not None:
        yield f"normalize = softmax(sink={format_expr(norm.stats[0].seed)})"
    elif norm in (normalizers.sparsemax(), normalizers.entmax15()):
        yield f"normalize = {norm.name}()"
    elif norm.name == "elementwise" and (text := _elementwise(norm)):
        yield f"normalize = elementwise({text})"
    else:
        yield "normalize:"
        for found in norm.stats:
            seed = "" if found.seed is None else f", seed={format_expr(found.seed)}"
            grouped = ", by=group" if found.grouped else ""
            yield f"{indent}stat {found.name} = {found.monoid}({format_expr(found.lift)}{seed}{grouped})"
        yield f"{indent}weight = {format_expr(norm.weight)}"


def _elementwise(norm: Normalizer) -> str:
    """The arguments of `elementwise` that give ``norm``, or nothing."""
    if not norm.stats:
        return format_expr(norm.weight)
    lift, weight = norm.stats[0].lift, norm.weight
    quotient = weight.args[2].args if isinstance(weight, Op) and weight.op == "where" else ()
    tried = [("sum", lift), ("count", quotient[0] if quotient else lift)]
    tried += [("abs", lift.args[0])] if isinstance(lift, Op) and lift.op == "abs" else []
    for divisor, value in tried:
        if normalizers.elementwise(value, divisor) == norm:
            return f"{format_expr(value)}, divisor={divisor}"
    return ""


def _branch(branch: Branch, alone: bool) -> Iterator[str]:
    if branch.mask is not TRUE:
        yield f"mask = {format_expr(branch.mask)}"
    if branch.score is not _s or alone:
        yield f"score = {format_expr(branch.score)}"
    if branch.group is not None and branch.groups is not None:
        yield f"group = {format_expr(branch.group)}"
        yield f"groups = {format_expr(branch.groups)}"
    yield from _normalizer(branch.normalizer)
    if branch.weight is not None:
        yield f"weights = {format_expr(branch.weight)}"


def _output(out: Output, several: bool) -> str:
    value = format_expr(out.value)
    if out.rows is not None:
        value = f"{value if not out.value.args else f'({value})'} * {_rows(out.rows)}"
    which = f", branch=branch_{out.branch}" if several else ""
    empty = f", empty={out.empty!r}" if out.empty != 0.0 else ""
    if not out.over:
        return f"output {out.name} = " + (f"each({value}{which}{empty})" if which or empty else value)
    over = "(q, k)" if out.over == "qk" else out.over
    key = f", key={_several(out.key)}, extent={_several(out.extents)}" if out.key else ""
    return f"output {out.name} = {out.monoid}({value}, over={over}{key}{which}{empty})"


def _attend(stage: Attend) -> Iterator[str]:
    if stage.lengths != Attend().lengths:
        yield f"lengths = ({_listed(stage.lengths)})"
    for axis, expr in stage.position:
        yield f"position {axis} = {format_expr(expr)}"
    for term in stage.terms:
        if term.name == Dot().name and term.body is None:
            if term.left != QUERY:
                yield f"queries = {_rows(term.left)}"
            if term.right != KEY:
                yield f"keys = {_rows(term.right)}"
            continue
        rows = f"{_rows(term.left)}, {_rows(term.right)}"
        form = f"dot({rows})" if term.body is None else f"sum_d({format_expr(term.body)}, {rows})"
        yield f"term {term.name} = {form}"
    yield from _values(stage)
    several = len(stage.branches) > 1
    for number, branch in enumerate(stage.branches):
        lines = list(_branch(branch, not several))
        if several:
            yield f"branch branch_{number}:"
            lines = [f"    {line}" for line in lines or ["score = s"]]
        yield from lines
    yield from (_output(out, several) for out in _stated(stage))


def _defaults(stage: Attend) -> tuple[Output, ...]:
    """The outputs a stage has without stating them."""
    if len(stage.branches) > 1:
        return ()
    o, lse = DEFAULT_OUTPUTS
    first = next((out.rows for out in stage.outputs if out.rows is not None), None)
    rows = first if first is not None and len(first.index) == 3 else VALUE
    names = (o.name, lse.name) if stage.name == MAIN else (stage.name, f"{stage.name}_lse")
    both: tuple[Output, ...] = (replace(o, name=names[0], rows=rows), replace(lse, name=names[1]))
    both = both if stage.branch.normalizer.name == SOFTMAX.name else both[:1]
    if stage.name != MAIN and stage.outputs != both:
        return ()
    return both if both[0] in stage.outputs else ()


def _values(stage: Attend) -> Iterator[str]:
    defaults = _defaults(stage)
    if defaults and defaults[0].rows != VALUE and defaults[0].rows is not None:
        yield f"values = {_rows(defaults[0].rows)}"
    if not defaults and stage.name == MAIN and len(stage.branches) == 1 and "o" not in stage.made:
        yield "values = none"


def _stated(stage: Attend) -> list[Output]:
    defaults = _defaults(stage)
    return [out for out in stage.outputs if out not in defaults]


def _map(stage: Map) -> str:
    """Reductions over the features stand where they are read."""
    texts: dict[Expr, Expr] = {}
    for name, monoid, expr in stage.lets:
        text = format_expr(substitute(expr, texts))
        texts[Input(name, FLOAT, "bhq")] = Input(f"{monoid}_d({text})", FLOAT, "bhq")
    value = format_expr(substitute(stage.value, texts))
    return f"rows {stage.name}[{_listed(stage.extents)}] = {value}"


def _stage(stage: Stage) -> list[str]:
    if isinstance(stage, Attend):
        lines = list(_attend(stage))
        return lines if stage.name == MAIN else [f"attend {stage.name}:", *(f"    {line}" for line in lines)]
    if isinstance(stage, Map):
        return [_map(stage)]
    if isinstance(stage, Pool):
        source = stage.source.upper() if stage.source in STAGE_INPUTS else stage.source
        stride = "" if stage.stride is None else f", stride={format_expr(stage.stride)}"
        return [f"pool {stage.name} = {stage.how}({source}, block={format_expr(stage.block)}{stride})"]
    return [_select(stage)]


def _select(stage: Select) -> str:
    ((rule, amount),) = [(n, getattr(stage, n)) for n in _RULES if getattr(stage, n) is not None]
    text = f"{rule}({format_expr(stage.score)}, {format_expr(amount)}"
    text += "" if stage.candidates is TRUE else f", candidates={format_expr(stage.candidates)}"
    text += "" if stage.forced is Select.forced else f", forced={format_expr(stage.forced)}"
    return f"select {stage.name}[{_listed(stage.extents)}] = {text})"


def format_program(program: Program) -> str:
    """Return ``program`` as ``.attn`` text; very long expressions are cut with an ellipsis."""
    params = []
    for scalar in program.scalars:
        default = "" if scalar.default is None else f" = {_literal(scalar.default)}"
        params.append(f"{'static ' if scalar.static else ''}{scalar.name}: {scalar.type}{default}")
    for tensor in program.tensors:
        params.append(f"{tensor.name}: {tensor.type}[{_listed(tensor.shape)}]")
    lines = [f"pattern {program.name}({', '.join(params)}):"]
    for stage in program.stages:
        lines += [f"    {line}" for line in _stage(stage)]
    if program.returns:
        lines.append(f"    return {', '.join(program.returns)}")
    return "\n".join(lines)


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)
