"""The backward pass of any streaming stage on the Triton target, from a plan with a pullback.

The two kernels are those of :mod:`.triton_backward` in shape; what they know of a row is the row inputs of the
pullback instead of lse and delta. The queries kernel makes the sweeps first and leaves what they make of their row
inputs to the keys kernel. Softmax attention has templates of its own, which keep scores times log2(e).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnlang.ir import Expr, Input
from attnlang.ir.build import s as RAW_SCORE
from attnlang.passes.levels import Level
from attnlang.passes.pullback import DP

from .plan import KernelPlan, Section
from .plan_parts import needed
from .triton_backward import PairPrinter, emit_keys, emit_queries, grad_texts, rendered
from .triton_backward_arguments import KEYS, LOOP, QUERIES, BackwardArguments, backward_arguments, kernel_name
from .triton_common import Config, Line, comment, kernel_context, lines, mask_text
from .triton_features import gradients_text, scores_text
from .triton_helpers import helper_sources
from .triton_pull_arguments import Reads, kernel_reads, last_pass, pull_arguments, reads_of, swept
from .triton_runs import bounds_text

__all__ = [
    "PRODUCT",
    "PassText",
    "PullPrinter",
    "SumText",
    "TileText",
    "arguments_of",
    "emit_backward",
    "emit_pull",
    "sum_text",
    "tile_text",
]

PRODUCT = "dot_"
"""The product of the value row and the gradient of the output's row; no name of a program ends in one underscore."""


class PullPrinter(PairPrinter):
    """Row and column inputs have an underscore at the end, which no name of a program has here."""

    def input(self, node: Input, at: Level) -> str:
        if node is RAW_SCORE:
            return "s"
        if node is DP:
            return PRODUCT
        if node.axes in ("bhq", "bhk"):
            return self._spread(f"{node.name}_", Level.ROW if node.axes == "bhq" else Level.COL, at)
        return super().input(node, at)


@dataclass(frozen=True)
class TileText:
    """Text of one kind of tile; ``outer`` and ``inner`` are the statements of either vector axis, ``early`` those of
    pairs that the mask and the weight of dv need, ``pair`` the others."""

    outer: list[Line]
    inner: list[Line]
    early: list[Line]
    pair: list[Line]
    mask: str
    reads_outer: bool
    reads_inner: bool
    distance: bool


@dataclass(frozen=True)
class PassText:
    """Text of one pass: sums by the row input they are added to, in the last pass none; then row statements."""

    full: TileText
    partial: TileText
    reads: Reads
    sums: list[tuple[str, str]]
    after: list[Line]


@dataclass(frozen=True)
class SumText:
    """Text of a sum, maximum or minimum over the inner axis: statements for either kind of tile, and what is stored."""

    name: str
    start: str
    full: str
    bounded: str
    stores: list[tuple[str, str]]
    comment: str


_IDENTITY = {"sum": "0.0", "max": '-float("inf")', "min": 'float("inf")'}


def sum_text(name: str, value: str, stores: list[tuple[str, str]], comment: str, monoid: str = "sum") -> SumText:
    """Return the text of the ``monoid`` of ``value`` over the queries; ``stores`` are pointers and what goes there."""
    identity = _IDENTITY[monoid]
    start = "tl.zeros([BLOCK_N], tl.float32)" if monoid == "sum" else f"tl.full([BLOCK_N], {identity}, tl.float32)"

    def taken(text: str) -> str:
        if monoid == "sum":
            return f"{name} += tl.sum({text}, 1)"
        return f"{name} = tl.{monoid}imum({name}, tl.{monoid}({text}, 1))"

    return SumText(name, start, taken(value), taken(f"tl.where(seen, {value}, {identity})"), stores, comment)


def tile_text(
    printer: PullPrinter, section: Section, roots: tuple[Expr, ...], mask: Expr | None, first: tuple[Expr, ...] = ()
) -> TileText:
    printer.used.clear()
    first = (*first, *(() if mask is None else (mask,)))
    row, col = (lines(printer, needed(part, (*roots, *first))) for part in (section.row, section.col))
    early = needed(section.pair, first)
    pair = (v for v in needed(section.pair, roots) if v not in early)
    before, after = lines(printer, early), lines(printer, pair)
    for root in roots:
        printer.text(root, Level.PAIR)
    for grad in printer.plan.grads:
        if grad.level is Level.PAIR and set(grad.load.indices) <= set(roots):
            printer.offsets(grad.load, "grad")
    hidden = "" if mask is None else mask_text(printer, mask)
    outer, inner = (col, row) if printer.flipped else (row, col)
    reads = ["q_idx" in printer.used, "k_idx" in printer.used]
    reads_outer, reads_inner = reversed(reads) if printer.flipped else reads
    return TileText(outer, inner, before, after, hidden, reads_outer, reads_inner, "k_distance" in printer.used)


def _sweeps(printer: PullPrinter, plan: KernelPlan, all_roots: tuple[Expr, ...]) -> list[PassText]:
    found = []
    for sweep in plan.sweeps:
        roots = tuple(e for _, e in sweep.sums)
        full, partial = tile_text(printer, sweep.full, roots, None), tile_text(printer, sweep.partial, roots, plan.mask)
        sums = [(f"{name.name}_", printer.tile(e)) for name, e in sweep.sums]
        found.append(PassText(full, partial, reads_of(roots), sums, lines(printer, needed(sweep.after, all_roots))))
    return found


def _context(plan: KernelPlan, config: Config, kernel: str, interpreted: bool) -> dict[str, Any]:
    pull = plan.pull
    assert pull is not None
    printer = PullPrinter(plan, interpreted=interpreted, flipped=kernel == KEYS)
    roots, known = last_pass(plan, kernel), kernel == QUERIES
    features = scores_text(printer, rows_known=known)
    by = None if plan.body is None else plan.body.left if kernel == QUERIES else plan.body.right
    slopes = None if by is None else gradients_text(printer, kernel, by, rows_known=known)
    mask = () if plan.mask is None else (plan.mask,)
    every = (*roots, *mask, *(e for sweep in plan.sweeps for _, e in sweep.sums))
    first = (pull.weight,) if kernel == KEYS and pull.weight is not None else ()
    full, partial = (
        tile_text(printer, part, roots, hidden, first)
        for part, hidden in ((plan.full, None), (plan.partial, plan.mask))
    )
    last = PassText(full, partial, reads_of(roots), [], [])
    sweeps = _sweeps(printer, plan, every) if kernel == QUERIES else []
    tiles = [tile for found in (*sweeps, last) for tile in (found.full, found.partial)]
    grads = grad_texts(printer, plan, kernel)
    context = kernel_context(plan, config, printer, interpreted=interpreted) | {
        "scored": True,  # nothing is kept times log2(e)
        "kernel_name": kernel_name(kernel),
        "title": comment(f"Attention backward over {kernel} for the program {plan.program.name}"),
        "distance": any(part.distance for part in (*tiles, features, slopes) if part is not None),
        "row_values": lines(printer, needed(plan.row, (*every, *(v.expr for v in plan.features)))),
        "features": features,
        "slopes": slopes,
        "loop_distance": any(part.distance for part in (features, slopes) if part is not None),
        "sweeps": sweeps,
        "last": last,
        "draw": printer.tile(pull.draw),
        "weight": None if pull.weight is None else printer.tile(pull.weight),
        "reads": kernel_reads(plan, kernel),
        "swept": swept(plan),
        "product": PRODUCT,
        "grads": grads,
        "sums": [sum_text(f"{g.name}_sum", g.value, [(f"{g.name}_ptr", f"{g.name}_sum")], g.comment) for g in grads],
        "filled": [g.name for g in grads],
        "diagonal": [g for g in grads if g.kind in ("difference", "sum")],
        "scattered": [g for g in grads if not g.summed],
        "bounds": bounds_text(printer, plan.run_bounds(LOOP[kernel])),
        "arguments": pull_arguments(plan, kernel),
    }
    context["helpers"] = helper_sources(printer.helpers)
    return context


def emit_pull(plan: KernelPlan, config: Config, kernel: str, *, interpreted: bool = False) -> str:
    """Return the Triton source of the ``queries`` or the ``keys`` kernel of a plan with a pullback.

    ``config.block_m`` must be at most ``config.block_n`` where gradients are summed along diagonals.
    """
    return rendered(f"triton_pull_{kernel}.j2", _context(plan, config, kernel, interpreted))


def emit_backward(plan: KernelPlan, config: Config, kernel: str, *, interpreted: bool = False) -> str:
    """Return the Triton source of the ``queries`` or the ``keys`` kernel of any backward plan."""
    if plan.pull is not None:
        return emit_pull(plan, config, kernel, interpreted=interpreted)
    return (emit_queries if kernel == QUERIES else emit_keys)(plan, config, interpreted=interpreted)


def arguments_of(plan: KernelPlan, kernel: str) -> BackwardArguments:
    """Return the parameters of the kernel that :func:`emit_backward` writes."""
    return (backward_arguments if plan.pull is None else pull_arguments)(plan, kernel)
