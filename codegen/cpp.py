"""The C++ target: one self-contained translation unit from a kernel plan."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.bccache import Bucket

from attnlang.ir import Expr, Index, Input, format_program, postorder
from attnlang.passes.levels import Level
from attnlang.passes.pullback import Pullback
from attnlang.passes.streaming import Accumulator
from attnlang.passes.widths import Width

from .cpp_arguments import arguments
from .cpp_features import FeaturePrinter, scores_text
from .cpp_printer import ELEMENTS, VECTORS, CppPrinter, comment, declaration
from .cpp_runs import bounds_text
from .cpp_steps import epilogue, state, step_text
from .isa import COMMON_FLAGS, Isa
from .plan import KernelPlan, Section, Step, SweepStep

__all__ = ["ENTRY", "SPACE", "emit", "keep_templates"]

ENTRY = "attnlang_forward"
"""Name of the exported function."""

SPACE = "attnlang_space"
"""Name of the function that says how much memory a kernel for a matrix unit needs."""

_POLYNOMIALS = {
    # minimax fits, lowest power first, relative error in parentheses; float32 rounding comes on top
    "exp2": ("1.0", "0.693147004", "0.240222424", "0.0555073358", "0.00967151299", "0.00132647238"),  # 9e-8
    "exp2_long": (  # 2e-9
        "1.0",
        "0.693147182",
        "0.240226477",
        "0.0555033237",
        "0.00961843692",
        "0.0013398875",
        "0.000153533605",
    ),
    "exp": ("0.49999994", "0.166665211", "0.041668389", "0.00836871006", "0.00138146136"),  # 3e-9
    "log": ("0.666666627", "0.400003344", "0.285373092", "0.235821575"),  # 1e-11 before rounding
    "tanh": ("-0.333332837", "0.133314908", "-0.0537434928", "0.0206505749", "-0.00571703259"),  # 4e-9
}

_NEEDS = {
    **dict.fromkeys(("floor", "ceil", "round", "trunc"), ("whole",)),
    **dict.fromkeys(("exp", "exp2"), ("scaled",)),
    **dict.fromkeys(("tanh", "sigmoid"), ("exp", "scaled")),
    **dict.fromkeys(("log", "log2"), ("logarithm",)),
    **dict.fromkeys(("floordiv", "mod"), ("divide",)),
    "rsqrt": ("sqrt",),
}
"""Helpers that the definition of an operator stands on."""


@dataclass(frozen=True)
class _Loop:
    """Text of the key loop of one kind of tile."""

    col: list[str]
    pair: list[str]
    score: str
    mask: str
    uses_key: bool
    uses_row: bool
    uses_score: bool
    changes: bool
    by_halves: bool = False
    """Whether the mask is known before the scores, and corners it hides are left out."""


class _Compiled(jinja2.FileSystemBytecodeCache):
    """Compiled templates on disk; a folder that cannot be used costs time and nothing else."""

    def load_bytecode(self, bucket: Bucket) -> None:
        with contextlib.suppress(OSError):
            super().load_bytecode(bucket)

    def dump_bytecode(self, bucket: Bucket) -> None:
        with contextlib.suppress(OSError):
            super().dump_bytecode(bucket)


_compiled: _Compiled | None = None


def keep_templates(folder: Path) -> None:
    """Keep compiled templates, before any is rendered, in a folder only its user can write."""
    global _compiled
    if _compiled is None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            _compiled = _Compiled(str(folder))


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        bytecode_cache=_compiled,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )


def emit(plan: KernelPlan, isa: Isa) -> str:
    """Return the C++ source of the forward kernel of ``plan`` for ``isa``; equal inputs give equal text."""
    if isa.matrix and not (plan.plain and plan.in_order):
        raise ValueError("kernels for a matrix unit know the two sums of softmax and rows in order only")
    printer = FeaturePrinter(plan)
    stream = plan.stream
    assert stream is not None
    sight, partial = _partial(printer, isa)
    pieces = {
        "full": loop_text(printer, plan.full, plan.score, None),
        "partial": partial,
        "sight": sight,
        "steps": [step_text(printer, step, i) for i, step in enumerate(plan.steps)],
        "held": state(printer),
        "epilogue": epilogue(printer),
        "outputs": stream.outputs,
        "sums": next((out.name for out in stream.outputs if out.rows is not None), ""),
        "scores": scores_text(printer),
        "shares": [(out.column, out.name) for out in stream.outputs if out.column is not None],
    }
    return render("cpp_forward.j2", **kernel_text(printer, isa), **pieces, arguments=arguments(plan, isa))


def render(template: str, **text: Any) -> str:
    """Render a template of the target; a name it misses is an error."""
    return _environment().get_template(template).render(**text)


def kernel_text(printer: CppPrinter, isa: Isa) -> dict[str, Any]:
    """Return the text every kernel of a plan needs; call it last, when ``printer`` knows all the helpers."""
    plan = printer.plan
    grid = [declaration(printer, v) for v in plan.grid]
    row = [line for v in plan.row for line in (f"// {v.comment}", f"{v.name}[w] = {printer.value(v)};")]
    passes: tuple[Step | SweepStep, ...] = (*plan.steps, *plan.sweeps)
    later = (v for step in passes for v in step.after if not isa.matrix)
    addresses = {name: printer.text(getattr(plan, name), Level.GRID) for name in ("key_batch", "key_head")}
    rows = {
        "key_row": "" if plan.key_row is None else printer.text(plan.key_row, Level.COL),
        "query_row": "" if plan.query_row is None else printer.text(plan.query_row, Level.ROW),
        "key_values": [declaration(printer, v) for v in plan.key_values],
    }
    bounds = bounds_text(printer, plan.run_bounds("k"))
    return {
        "header": _header(plan, isa),
        "bounds": bounds,
        "bounds_lines": [declaration(printer, v) for v in bounds.values] if bounds else [],
        "isa": isa,
        "head_dim": plan.head_dim,
        "value_dim": plan.value_dim,
        "element": ELEMENTS[plan.dtype],
        "operators": printer.helpers | {need for name in printer.helpers for need in _NEEDS.get(name, ())},
        "poly": _POLYNOMIALS,
        "grid": grid,
        "row": row,
        "row_declarations": [f"{VECTORS[plan.width(v.expr)]} {v.name}[ROW_VECTORS];" for v in (*plan.row, *later)],
        "uses_query": _reads_query(plan),
        "query_type": VECTORS[Width.I32],
        "fold": "(float)(a.scale * 1.4426950408889634)" if plan.binary else "(float)a.scale",
        "unit": "1.0f" if plan.binary else "LOG2_E",
        "key_blocks": _block_sizes(isa.keys),
        **addresses,
        **rows,
    }


def _block_sizes(keys: int) -> list[int]:
    """Register blocks of the keys of a chunk, largest first: what is left over is taken in powers of two."""
    return [keys, *(n for n in (8, 4, 2, 1) if n < keys)]


def _header(plan: KernelPlan, isa: Isa) -> str:
    d, dv, rows = plan.head_dim, plan.value_dim, "Lk" if plan.key_row is None else "rows"
    lines = [
        f"Attention {'forward' if plan.stream else 'backward'}, generated by attnlang for {isa.name}.",
        "",
        *format_program(plan.program).splitlines(),
        "",
        f"{plan.dtype} q [B, H, Lq, {d}], k [B, Hkv, {rows}, {d}], v [B, Hkv, {rows}, {dv}], o [B, H, Lq, {dv}].",
        *(r.needs for r in plan.runs if r.needs),
        *_passes(plan),
        f"Build: c++ {' '.join((*COMMON_FLAGS, *isa.flags))} FILE.cpp -o FILE.so",
    ]
    return "\n".join(comment(f"// {line}") for line in lines)


def _passes(plan: KernelPlan) -> list[str]:
    """What each pass over the keys accumulates."""
    lines = [] if plan.pull is None else _pulled(plan.pull)
    for number, step in enumerate(plan.steps, 1):
        found = (f"{a.name} = {a.monoid}_{a.over}({CppPrinter.source(a.value)}{_times(a)})" for a in step.accumulators)
        lines.append(f"Pass {number} of {len(plan.steps)} over the keys: {', '.join(found)}.")
    shift = None if plan.stream is None else plan.stream.shift
    return lines if shift is None else [*lines, f"Here e is exp(s - {shift}), with the maximum so far in pass 1."]


def _pulled(pull: Pullback) -> list[str]:
    """What each pass over the keys of a backward kernel sums."""
    lines = []
    for number, sweep in enumerate(pull.sweeps, 1):
        found = (f"{name.name} += sum_k({CppPrinter.source(value)})" for name, value in sweep.sums)
        lines.append(f"Pass {number} of {len(pull.sweeps) + 1} over the keys: {', '.join(found)}.")
    lines.append(f"The raw score of a pair gets the gradient {CppPrinter.source(pull.draw)}.")
    if pull.weight is not None:
        lines.append(f"Its value row gets do times {CppPrinter.source(pull.weight)}; dp is its product with do.")
    return lines


def _times(a: Accumulator) -> str:
    return "" if a.rows is None else f" * {a.rows.source}"


def _partial(printer: CppPrinter, isa: Isa) -> tuple[_Loop | None, _Loop]:
    """The loop that finds the visible pairs, where they are wanted before the scores, and the loop over the scores."""
    plan = printer.plan
    if plan.mask is None or plan.body is not None or isa.matrix or isa.vectors % 2:
        return None, loop_text(printer, plan.partial, plan.score, plan.mask)
    sight = loop_text(printer, plan.partial.needed(plan.mask), None, plan.mask)
    scores = () if plan.score is None else (plan.score,)
    rest = loop_text(printer, plan.partial.needed(*scores), plan.score, None)
    return sight, replace(rest, mask="visible_pairs.pairs[j * VECTORS + v]", changes=True, by_halves=True)


def loop_text(printer: CppPrinter, section: Section, score: Expr | None, mask: Expr | None) -> _Loop:
    col = [declaration(printer, v) for v in section.col]
    pair = [declaration(printer, v) for v in section.pair]
    roots = [e for e in (score, mask) if e is not None]
    texts = [printer.text(e, Level.PAIR) for e in roots]
    nodes = list(postorder(*roots))
    text = texts[0] if score is not None else ""
    return _Loop(
        col=col,
        pair=pair,
        score=text or "s",
        mask=texts[-1] if mask is not None else "",
        uses_key=any(_is_axis(n, "k") for n in nodes),
        uses_row=any("[w]" in line for line in (*pair, *texts)),
        uses_score=score is None or any(isinstance(n, Input) for n in postorder(score)),
        changes=bool(roots),
    )


def _is_axis(node: Expr, axis: str) -> bool:
    return isinstance(node, Index) and node.axis == axis


def _reads_query(plan: KernelPlan) -> bool:
    roots = [e for e in (plan.score, plan.mask, plan.dscore, plan.query_row) if e is not None]
    roots += [e for g in plan.grads for e in (g.derivative, *g.load.indices)]
    if plan.pull is not None:
        roots += plan.pull.roots()
    roots += [v.expr for v in plan.features] + ([] if plan.body is None else [plan.body.value])
    if plan.stream is not None:
        roots += [a.value for a in plan.stream.accumulators] + [out.value for out in plan.stream.outputs]
    return any(_is_axis(n, "q") for n in postorder(*roots))
