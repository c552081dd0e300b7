"""The Triton kernel of what an Attend stage sums over its queries: keys outside, from what is saved of each row.

It is the keys kernel of :mod:`.triton_pull` without gradients.
"""

from __future__ import annotations

from attnlang.ir import FLOAT, Const, Expr
from attnlang.passes.levels import Level
from attnlang.passes.streaming import Made, Streaming

from .plan import KernelPlan
from .triton_backward import rendered
from .triton_backward_arguments import KEYS, LOOP, BackwardArguments, Parameters
from .triton_common import Config, comment, kernel_context
from .triton_features import scores_text
from .triton_helpers import helper_sources
from .triton_pull import PRODUCT, PassText, PullPrinter, SumText, sum_text, tile_text
from .triton_pull_arguments import Reads, reads_of
from .triton_runs import bounds_text

__all__ = ["KERNEL_NAME", "column_arguments", "column_outputs", "column_reads", "emit_columns"]

KERNEL_NAME = "attention_columns"


def column_outputs(stream: Streaming) -> tuple[Made, ...]:
    """The outputs that are sums over queries, in the order of the kernel's parameters."""
    return tuple(out for out in stream.outputs if out.column is not None)


def _roots(plan: KernelPlan) -> tuple[Expr, ...]:
    return tuple(value for _, value in plan.columns)


def column_reads(plan: KernelPlan) -> Reads:
    """Return what the kernel reads of rows; their names are those of accumulators."""
    return reads_of(_roots(plan))


def column_arguments(plan: KernelPlan, outputs: tuple[Made, ...]) -> BackwardArguments:
    """Return the parameters of the kernel.

    ``launch`` takes q, k, the accumulators of rows it reads, a buffer for each output, and the rest as for any kernel
    with keys outside.
    """
    made = Parameters()
    made.operands({"q": plan.dtype, "k": plan.dtype}, ("q", "k"))
    made.numbers(column_reads(plan).rows)
    made.numbers(f"{out.name}_out" for out in outputs)
    made.rest(plan, KEYS)
    return made.arguments()


def _sum(printer: PullPrinter, plan: KernelPlan, number: int, outputs: tuple[Made, ...]) -> SumText:
    a, value = plan.columns[number]
    stores = []
    for out in outputs:
        if out.column == a.name:
            seen = f"{a.name}_"
            if a.monoid != "sum":
                nothing, empty = (printer.constant(Const(x, FLOAT), Level.COL) for x in (a.identity, out.empty))
                seen = f"tl.where({seen} == {nothing}, {empty}, {seen})"
            stores.append((f"{out.name}_out_ptr_", seen))
    names = ", ".join(out.name for out in outputs if out.column == a.name)
    return sum_text(f"{a.name}_", printer.tile(value), stores, comment(names), a.monoid)


def emit_columns(plan: KernelPlan, config: Config, outputs: tuple[Made, ...], *, interpreted: bool = False) -> str:
    """Return the Triton source of the kernel for ``outputs`` of the stage, whose accumulators are in ``plan.columns``.

    It reads the transposed run map.
    """
    printer = PullPrinter(plan, interpreted=interpreted, flipped=True)
    roots = _roots(plan)
    full, partial = tile_text(printer, plan.full, roots, None), tile_text(printer, plan.partial, roots, plan.mask)
    reads = column_reads(plan)
    features = scores_text(printer, rows_known=False)
    looped = features is not None and features.distance
    context = kernel_context(plan, config, printer, interpreted=interpreted) | {
        "scored": True,  # nothing is kept times log2(e)
        "kernel_name": KERNEL_NAME,
        "title": comment(f"Attention sums over queries for the program {plan.program.name}"),
        "distance": full.distance or partial.distance or looped,
        "features": features,
        "slopes": None,
        "loop_distance": looped,
        "last": PassText(full, partial, reads, [], []),
        "draw": None,
        "weight": None,
        "reads": reads,
        "product": PRODUCT,
        "sums": [_sum(printer, plan, number, outputs) for number in range(len(plan.columns))],
        "filled": [f"{out.name}_out_" for out in outputs],
        "bounds": bounds_text(printer, plan.run_bounds(LOOP[KEYS])),
        "arguments": column_arguments(plan, outputs),
    }
    context["helpers"] = helper_sources(printer.helpers)
    return rendered(f"triton_pull_{KEYS}.j2", context)
