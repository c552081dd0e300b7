"""The backward pass on the Triton target: two kernels, each the only writer of what it computes.

The queries kernel walks the run map row by row and gives dq, delta and the gradients of captured tensors that are sums
over keys; the keys kernel walks the transposed map and gives dk, dv and sums over queries, over all query heads of a
group. Weights are recomputed from the saved lse. Neither needs atomic additions, so gradients are the same bits in
every run; a captured tensor read through an arbitrary map of the pair is the exception (``Scatter.FIXED``, ``ATOMIC``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from attnlang.ir import Expr, Load, Op
from attnlang.passes.levels import Level

from .plan import KernelPlan, Section, Value
from .scatter import Scatter, place_in_row
from .triton_backward_arguments import (
    KEYS,
    LOOP,
    QUERIES,
    SCATTERED,
    backward_arguments,
    belongs,
    kernel_name,
    kind_of,
    rename,
)
from .triton_common import LINE, Config, Line, comment, kernel_context, lines, mask_text, template, wrapped
from .triton_helpers import helper_sources
from .triton_printer import TritonPrinter, safe_name
from .triton_runs import bounds_text

__all__ = ["KEYS", "QUERIES", "GradText", "PairPrinter", "emit_keys", "emit_queries", "grad_texts", "rendered"]


class PairPrinter(TritonPrinter):
    """Pairs are [queries, keys], or [keys, queries] where ``flipped``."""

    def __init__(self, plan: KernelPlan, *, interpreted: bool, flipped: bool) -> None:
        super().__init__(plan, interpreted=interpreted)
        self.flipped = flipped

    def text(self, node: Expr, at: Level) -> str:
        return rename(super().text(node, at))

    def value(self, value: Value) -> str:
        return rename(super().value(value))

    def value_name(self, name: str) -> str:
        return rename(super().value_name(name))

    def _spread(self, text: str, have: Level, at: Level) -> str:
        out = super()._spread(text, have, at)
        if not self.flipped or out == text:
            return out
        for old, new in (("[:, None]", "[None, :]"), ("[None, :]", "[:, None]")):
            if out.endswith(old):
                return out.removesuffix(old) + new
        return out

    def _distance(self, node: Expr, at: Level) -> str | None:
        text = super()._distance(node, at)
        if text is None or not self.flipped or (isinstance(node, Op) and node.op == "abs"):
            return text
        return text.replace("[:, None]", "[?]").replace("[None, :]", "[:, None]").replace("[?]", "[None, :]")

    def tile(self, expr: Expr) -> str:
        """Print ``expr`` as a tile of pairs, also where it depends on less."""
        text = self.text(expr, Level.PAIR)
        if self.plan.level(expr) is Level.PAIR:
            return text
        return f"{text} + tl.zeros([{'BLOCK_N, BLOCK_M' if self.flipped else 'BLOCK_M, BLOCK_N'}], tl.float32)"

    def offsets(self, load: Load, buffer: str) -> list[str]:
        """Offsets of the elements ``load`` reads in a buffer with strides of its own, one term a dimension."""
        terms = []
        for dim, (index, guard) in enumerate(zip(load.indices, self.plan.load_guards(load), strict=True)):
            level = self.plan.level(index)
            text = rename(self._position(index, f"{safe_name(load.tensor)}_size{dim}", guard, level))
            terms.append(f"{self._spread(f'({text})', level, Level.PAIR)} * {buffer}_stride{dim}")
        return terms

    def in_row(self, load: Load, buffer: str) -> tuple[list[str], str, str]:
        """Offsets of the row of the buffer that a query has, one term a dimension; the place of a pair in the row, and
        the stride of places."""
        terms, place, number = [], "", place_in_row(load)
        for dim, (index, guard) in enumerate(zip(load.indices, self.plan.load_guards(load), strict=True)):
            level = self.plan.level(index)
            text = rename(self._position(index, f"{safe_name(load.tensor)}_size{dim}", guard, level))
            if dim == number:
                place = self._spread(f"({text})", level, Level.PAIR)
            else:
                terms.append(f"({text}) * {buffer}_stride{dim}")
        return terms, place, f"{buffer}_stride{number}"


@dataclass(frozen=True)
class GradText:
    """Text for one captured gradient: ``kind`` is that of :func:`.triton_backward_arguments.kind_of`.

    ``offsets`` are terms of where a pair adds; where it adds to a row of its query, terms of where the row is, and then
    it adds at ``place`` times ``step``.
    """

    name: str
    kind: str
    value: str
    offsets: list[str]
    comment: str
    place: str = ""
    step: str = ""

    @property
    def summed(self) -> bool:
        """Whether it is summed in registers along the inner axis."""
        return self.kind in ("row", "grid", "col")


@dataclass(frozen=True)
class _Loop:
    """Text of the inner loop of one kind of tile; ``outer`` and ``inner`` are the statements of either vector axis."""

    outer: list[Line]
    inner: list[Line]
    pair: list[Line]
    score: str
    dscore: str
    mask: str
    reads_outer: bool
    reads_inner: bool
    distance: bool


def _times(first: str, factor: str) -> str:
    return first if factor == "1.0" else f"{first} * ({factor})"


def _loop(printer: PairPrinter, section: Section, plan: KernelPlan, mask: Expr | None) -> _Loop:
    printer.used.clear()
    row, col, pair = (lines(printer, part) for part in (section.row, section.col, section.pair))
    score = "" if plan.score is None else printer.tile(plan.score)
    dscore = "dlogit" if plan.dscore is None else f"dlogit * ({printer.text(plan.dscore, Level.PAIR)})"
    hidden = "" if mask is None else mask_text(printer, mask)
    for grad in plan.grads:
        printer.text(grad.derivative, Level.PAIR)
        if grad.level is Level.PAIR:
            printer.offsets(grad.load, "grad")
    outer, inner = (col, row) if printer.flipped else (row, col)
    reads = [name in printer.used for name in ("q_idx", "k_idx")]
    reads_outer, reads_inner = reversed(reads) if printer.flipped else reads
    distance = "k_distance" in printer.used
    return _Loop(outer, inner, pair, score, dscore, hidden, reads_outer, reads_inner, distance)


def grad_texts(printer: PairPrinter, plan: KernelPlan, kernel: str, factor: str = "") -> list[GradText]:
    """Print what every pair gives to the captured gradients of ``kernel``, times ``factor``."""
    out = []
    for i, grad in enumerate(plan.grads):
        if belongs(grad, kernel):
            kind = kind_of(grad)
            offsets: list[str] = []
            place, step = "", ""
            if kind == Scatter.ROWS.value:
                offsets, place, step = printer.in_row(grad.load, f"grad{i}")
            elif kind in SCATTERED:
                offsets = printer.offsets(grad.load, f"grad{i}")
            each = grad.derivative
            value = _times(factor, printer.text(each, Level.PAIR)) if factor else printer.tile(each)
            out.append(GradText(f"grad{i}", kind, value, offsets, comment(str(grad.load.tensor)), place, step))
    return out


def _context(plan: KernelPlan, config: Config, kernel: str, interpreted: bool) -> dict[str, Any]:
    printer = PairPrinter(plan, interpreted=interpreted, flipped=kernel == KEYS)
    full = _loop(printer, plan.full, plan, None)
    partial = _loop(printer, plan.partial, plan, plan.mask)
    grads = grad_texts(printer, plan, kernel, "dlogit")
    context = kernel_context(plan, config, printer, interpreted=interpreted) | {
        "kernel_name": kernel_name(kernel),
        "title": comment(f"Attention backward over {kernel} for the program {plan.program.name}"),
        "distance": full.distance or partial.distance,
        "full": full,
        "partial": partial,
        "grads": grads,
        "diagonal": [g for g in grads if g.kind in ("difference", "sum")],
        "scattered": [g for g in grads if not g.summed],
        "bounds": bounds_text(printer, plan.run_bounds(LOOP[kernel])),
        "arguments": backward_arguments(plan, kernel),
    }
    context["helpers"] = helper_sources(printer.helpers)
    return context


def _split(line: str) -> str:
    """Give every argument of a long assigned call a line of its own."""
    match = re.fullmatch(r"( *)([\w, ]+ = [\w.]+\()(.*)\)\n", line)
    if len(line) <= LINE + 1 or match is None:
        return line
    indent, head, inside = match.groups()
    depths = list(accumulate((c in "([") - (c in ")]") for c in inside))
    if min(depths) < 0:
        return line
    starts = [0, *(i + 2 for i, c in enumerate(inside) if c == "," and depths[i] == 0), len(inside) + 2]
    parts = [inside[a : b - 2] for a, b in pairwise(starts)]
    if len(parts) == 1:
        return line
    return f"{indent}{head}\n" + "".join(f"{indent}    {part},\n" for part in parts) + f"{indent})\n"


def rendered(name: str, context: dict[str, Any]) -> str:
    """Render the template ``name`` of a backward kernel or of one like it, with no line too long."""
    text = str(template(name).render(c=context, **context))
    return "".join(_split(wrapped(line)) for line in text.splitlines(keepends=True))


def _emit(plan: KernelPlan, config: Config, kernel: str, interpreted: bool) -> str:
    return rendered(f"triton_backward_{kernel}.j2", _context(plan, config, kernel, interpreted))


def emit_queries(plan: KernelPlan, config: Config, *, interpreted: bool = False) -> str:
    """Return the Triton source of the kernel for dq, delta and sums over keys; equal inputs give equal text.

    ``config.block_m`` must be at most ``config.block_n`` where gradients are summed along diagonals.
    """
    return _emit(plan, config, QUERIES, interpreted)


def emit_keys(plan: KernelPlan, config: Config, *, interpreted: bool = False) -> str:
    """Return the Triton source of the kernel for dk, dv and sums over queries; it reads the transposed run map."""
    return _emit(plan, config, KEYS, interpreted)
