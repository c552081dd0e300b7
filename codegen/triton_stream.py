"""The Triton kernel of an Attend stage with any row statistics and outputs, from the streaming part of a plan.

Plain softmax has a template of its own (:mod:`.triton`), which keeps scores times log2(e) and reads through tensor
descriptors; everything else that streams is printed here, one loop over the keys for each pass of the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from attnlang.ir import Expr, Input, postorder
from attnlang.passes.factors import ONE, SHIFTED
from attnlang.passes.levels import Level
from attnlang.passes.streaming import Accumulator, Made, Streaming

from .plan import KernelPlan, Step
from .triton import arguments, emit, score_text, section_text
from .triton_common import Arguments, Config, comment, kernel_context, lines, template, wrapped
from .triton_features import scores_text
from .triton_helpers import helper_sources
from .triton_printer import TritonPrinter
from .triton_rows import change_output, given_name, helpers_of, make_queries
from .triton_runs import bounds_text

__all__ = ["KERNEL_NAME", "emit_forward", "emit_stream", "forward_arguments", "row_outputs", "stream_arguments"]

KERNEL_NAME = "attention_forward"
_IDENTITY = {"sum": "0.0", "max": '-float("inf")', "min": 'float("inf")', "argmax": '-float("inf")'}


class _Printer(TritonPrinter):
    """Accumulators have an underscore at the end, which no name of a program has here."""

    def input(self, node: Input, at: Level) -> str:
        if not {"q", "k"} & set(node.axes) or "d" in node.axes:
            return super().input(node, at)
        if node is SHIFTED:
            return "shifted_"
        if node.name == "raw":
            return "raw_"
        if "k" in node.axes:
            return "s"
        return self._spread(f"{node.name}_", Level.ROW, at)


@dataclass(frozen=True)
class _Held:
    """An accumulator as text: how a tile is taken in."""

    chosen: str
    moved: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class _StepText:
    follow: str
    base: str
    uses_shifted: bool
    uses_raw: bool
    needs_seen: bool
    distance: bool
    starts: tuple[str, ...]
    held: tuple[_Held, ...]
    rows: _Held | None
    col: list[Any]
    pair: list[Any]
    after: list[Any]


def _reads(node: Input, *roots: Expr) -> bool:
    return any(n is node for n in postorder(*roots))


def _held(printer: _Printer, a: Accumulator, follows: bool) -> _Held:
    text = printer.text(a.value, Level.PAIR)
    if printer.plan.level(a.value) is not Level.PAIR:
        text = f"tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + {text}"
    chosen = text if a.vanishes else f"tl.where(seen_, {text}, {_IDENTITY[a.monoid]})"
    power = a.power if follows else 0
    factor = " * ".join(["factor_"] * power)
    moved = f" * ({factor})[:, None]" if power > 1 else " * factor_[:, None]" if power else ""
    name = f"{a.name}_"
    scaled = f"{name} * {factor}" if power else name
    match a.monoid:
        case "sum":
            found = [f"{name} = {scaled} + tl.sum({chosen}, 1)"]
        case "max":
            found = [f"{name} = tl.maximum({name}, tl.max({chosen}, 1))"]
        case "min":
            found = [f"{name} = tl.minimum({name}, tl.min({chosen}, 1))"]
        case _:  # equal values: the first key wins, whatever the order of the tiles
            found = [
                f"new_ = {chosen}",
                "best_ = tl.max(new_, 1)",
                "place_ = tl.min(tl.where(new_ == best_[:, None], k_idx[None, :], Lk), 1)",
                f'wins_ = (best_ > {name}) | ((best_ == {name}) & (place_ < {name}at) & (best_ > -float("inf")))',
                f"{name} = tl.where(wins_, best_, {name})",
                f"{name}at = tl.where(wins_, place_, {name}at)",
            ]
    return _Held(chosen, moved, tuple(found))


def _starts(step: Step) -> tuple[str, ...]:
    found = []
    for a in step.accumulators:
        if a.rows is None and a.over == "k":
            value = _IDENTITY[a.monoid]
            start = "tl.zeros([BLOCK_M], tl.float32)" if value == "0.0" else f"tl.full([BLOCK_M], {value}, tl.float32)"
            found.append(f"{a.name}_ = {start}")
        if a.monoid == "argmax":
            found.append(f"{a.name}_at = tl.full([BLOCK_M], -1, tl.int32)")
    return tuple(found)


def _step(printer: _Printer, step: Step, number: int) -> _StepText:
    stream = printer.plan.stream
    assert stream is not None
    follows = number == 0 and stream.shift is not None
    rest = [a for a in step.accumulators if a.over == "k" and not (follows and a.name == stream.shift)]
    roots = [a.value for a in rest]
    shifted = _reads(SHIFTED, *roots)
    base = ""
    if shifted and not follows and stream.settled is not None:
        base = printer.text(stream.settled, Level.ROW)
    printer.used.clear()
    within = set(postorder(*roots))
    col, pair = (lines(printer, (v for v in part if v.expr in within)) for part in (step.values.col, step.values.pair))
    held = {a.name: _held(printer, a, follows) for a in rest}
    return _StepText(
        follow=f"{stream.shift}_" if follows else "",
        base=base,
        uses_shifted=shifted,
        uses_raw=any(isinstance(n, Input) and n.name == "raw" for n in postorder(*roots)),
        needs_seen=any(not a.vanishes for a in rest),
        distance="k_distance" in printer.used,
        starts=_starts(step),
        held=tuple(held[a.name] for a in rest if a.rows is None),
        rows=next((held[a.name] for a in rest if a.rows is not None), None),
        col=col,
        pair=pair,
        after=lines(printer, step.after),
    )


def row_outputs(stream: Streaming) -> tuple[Made, ...]:
    """The outputs of the kernel: all but the sums over queries."""
    return tuple(out for out in stream.outputs if out.column is None)


def stream_arguments(plan: KernelPlan, config: Config) -> Arguments:
    """Return the parameters of the kernel: like those of plain attention, with a pointer for every output."""
    assert plan.stream is not None
    base = arguments(plan, replace(config, descriptors=False))
    rows = plan.stream.rows is not None
    drop = {"lse_ptr"} if rows else {"lse_ptr", "o_ptr", "v_ptr", *(f"{x}_stride_{a}" for x in "ov" for a in "bhnd")}
    pairs = [p for p in zip(base.kernel, base.call, strict=True) if p[0] not in drop]
    outs = [(f"{out.name}_out_", f"{out.name}_out_") for out in row_outputs(plan.stream) if out.rows is None]
    host = [n for n in base.host if n != "lse" and (rows or n != "o")]
    at = host.index("scale")
    host[at:at] = [name for name, _ in outs]
    pairs[:0] = outs
    return replace(base, kernel=tuple(n for n, _ in pairs), call=tuple(t for _, t in pairs), host=tuple(host))


@dataclass(frozen=True)
class _Out:
    """An output: what it is, or how rows are scaled. Text that has a ``name`` is a statement, which others read."""

    rows: bool
    text: str
    pointer: str
    name: str = ""


def _outputs(printer: _Printer, plan: KernelPlan) -> list[_Out]:
    assert plan.stream is not None
    read = () if plan.after is None else plan.after.statistics
    found = []
    for out in row_outputs(plan.stream):
        pointer = f"{out.name}_out_"
        if out.integer:
            assert isinstance(out.value, Input)
            found.append(_Out(False, f"{out.value.name}_at.to(tl.int64)", pointer))
        elif out.rows is not None:
            text = "tl.full([BLOCK_M], 1.0, tl.float32)" if out.value is ONE else printer.text(out.value, Level.ROW)
            found.append(_Out(True, f"({text})", pointer))
        else:
            text = printer.text(out.value, Level.ROW)
            if plan.level(out.value) is not Level.ROW:
                text = f"tl.zeros([BLOCK_M], tl.float32) + {text}"
            found.append(_Out(False, text, pointer, given_name(out.name) if out.name in read else ""))
    return found


def emit_forward(plan: KernelPlan, config: Config, *, interpreted: bool = False) -> str:
    """Return the Triton source of the forward kernel of any plan; see :func:`emit_stream`."""
    return (emit if plan.softmax else emit_stream)(plan, config, interpreted=interpreted)


def forward_arguments(plan: KernelPlan, config: Config) -> Arguments:
    """Return the parameters of the kernel that :func:`emit_forward` writes."""
    return arguments(plan, config) if plan.softmax else stream_arguments(plan, config)


def emit_stream(plan: KernelPlan, config: Config, *, interpreted: bool = False) -> str:
    """Return the Triton source of the forward kernel of ``plan`` at the tile of ``config``.

    Sums over queries, which no instance of the kernel can finish alone, have a kernel of their own
    (:mod:`.triton_columns`).
    """
    if plan.query_row is not None:
        raise ValueError("queries of this kernel are in order")
    config = replace(config, descriptors=False)
    printer = _Printer(plan, interpreted=interpreted)
    full = section_text(printer, plan.full, (plan.score,))
    partial = section_text(printer, plan.partial, (plan.score, plan.mask))
    kept = [(i, step) for i, step in enumerate(plan.steps) if any(a.over == "k" for a in step.accumulators)]
    steps = [_step(printer, step, number) for number, step in kept]
    features = scores_text(printer, rows_known=True)
    distance = full["distance"] or partial["distance"] or any(s.distance for s in steps)
    assert plan.stream is not None
    before = make_queries(plan.before, plan.head_dim, interpreted=interpreted)
    after = change_output(plan.after, plan.value_dim, interpreted=interpreted)
    context = kernel_context(plan, config, printer, interpreted=interpreted) | {
        "offset_bits": 64 if plan.wide else 32,
        "kernel_name": KERNEL_NAME,
        "title": comment(f"Attention forward for the program {plan.program.name}"),
        "grid_doc": "one instance for each (b, h) and tile of BLOCK_M queries.",
        **score_text(printer, plan),
        "row_values": lines(printer, plan.row),
        "plan_full": full,
        "plan_partial": partial,
        "steps": steps,
        "features": features,
        "distance": distance or (features is not None and features.distance),
        "values": plan.stream.rows is not None,
        "outputs": _outputs(printer, plan),
        "bounds": bounds_text(printer, plan.run_bounds("k")),
        "arguments": stream_arguments(plan, config),
        "before": before,
        "after": after,
    }
    context["helpers"] = helper_sources(printer.helpers | helpers_of((before, after)))
    text = str(template("triton_stream.j2").render(**context))
    return "".join(map(wrapped, text.splitlines(keepends=True)))
