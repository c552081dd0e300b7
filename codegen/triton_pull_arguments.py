"""What the two backward kernels of a plan with a pullback read, and their parameters on the Triton target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attnlang.ir import Expr, Input, postorder
from attnlang.ir.build import s as RAW_SCORE
from attnlang.passes.levels import Level
from attnlang.passes.pullback import DP

from .plan import KernelPlan
from .triton_backward_arguments import KEYS, QUERIES, BackwardArguments, Parameters, belongs

__all__ = ["Reads", "kernel_reads", "last_pass", "pull_arguments", "reads_of", "swept"]


def swept(plan: KernelPlan) -> tuple[str, ...]:
    """Names of the row inputs that sweeps add to: the queries kernel writes them in full for the keys kernel."""
    return tuple(dict.fromkeys(name.name for sweep in plan.sweeps for name, _ in sweep.sums))


def last_pass(plan: KernelPlan, kernel: str) -> tuple[Expr, ...]:
    """Return every pair expression that ``kernel`` computes in its last pass."""
    pull = plan.pull
    assert pull is not None
    own = [grad for grad in plan.grads if belongs(grad, kernel)]
    index = [i for grad in own if grad.level is Level.PAIR for i in grad.load.indices]
    weight = (pull.weight,) if kernel == KEYS and pull.weight is not None else ()
    return (pull.draw, *weight, *(grad.derivative for grad in own), *index)


@dataclass(frozen=True)
class Reads:
    """What expressions of pairs need: row and column inputs by name, the raw score, the product of do and v."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    score: bool
    product: bool


def reads_of(roots: Iterable[Expr]) -> Reads:
    """Return what ``roots`` read."""
    found = [n for n in postorder(*roots) if isinstance(n, Input)]
    rows, columns = (tuple(n.name for n in found if n.axes == axes) for axes in ("bhq", "bhk"))
    return Reads(rows, columns, RAW_SCORE in found, DP in found)


def kernel_reads(plan: KernelPlan, kernel: str) -> Reads:
    """Return what all passes of ``kernel`` read; ``product`` is also true of a keys kernel that needs do for dv."""
    pull = plan.pull
    assert pull is not None
    sweeps = [part for sweep in plan.sweeps for sums in sweep.sums for part in sums] if kernel == QUERIES else []
    found = reads_of((*sweeps, *last_pass(plan, kernel)))
    product = found.product or (kernel == KEYS and pull.weight is not None)
    return Reads(found.rows, found.columns, found.score, product)


def pull_arguments(plan: KernelPlan, kernel: str) -> BackwardArguments:
    """Return the parameters of the ``queries`` or ``keys`` kernel of a plan with a pullback.

    ``launch`` takes q, k, with ``product`` v and do, then the gradients that the kernel writes, row inputs and column
    inputs, for the queries kernel buffers for what sweeps make of theirs, and the rest as for any backward kernel.
    """
    made, reads = Parameters(), kernel_reads(plan, kernel)
    assert plan.pull is not None
    values = ("v", "do") if reads.product else ()
    wrote = ("dq",) if kernel == QUERIES else ("dk", "dv") if plan.pull.weight is not None else ("dk",)
    rows = ("q", "k", *values, *wrote)
    made.operands(dict.fromkeys(rows, plan.dtype), rows)
    made.numbers((*reads.rows, *reads.columns))
    if kernel == QUERIES:
        made.numbers(f"{name}_full" for name in swept(plan))
    made.rest(plan, kernel)
    return made.arguments()
