"""Gradients of streaming stages on the Triton backend: launch the backward kernels of a plan with a pullback.

Works with ``TRITON_INTERPRET=1`` on CPU tensors, like the other kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from attnlang.codegen.plan import CapturedGrad
from attnlang.codegen.scatter import Scatter
from attnlang.codegen.triton_backward_arguments import KEYS, QUERIES
from attnlang.codegen.triton_pull_arguments import kernel_reads, swept
from attnlang.passes.pullback import Pullback

from .call import Call
from .captured_grads import Gradients, total
from .errors import Unavailable
from .row_gradients import RowGradients
from .triton_backward import kernels_of, launch, scatter, scatter_fits
from .triton_common import check

__all__ = ["pull"]

Tensor = torch.Tensor


def _numbers(names: Iterable[str], found: Mapping[str, Tensor]) -> list[Tensor]:
    return [found[n].float().contiguous() for n in names]


def _fits(call: Call, grad: CapturedGrad) -> None:
    """Refuse sums without a fixed order; no bound is known for sums of integers."""
    if scatter(grad) is Scatter.FIXED:
        raise Unavailable(f"the gradient of {grad.load.tensor} would need additions in an order that is not fixed")
    scatter_fits(call, grad, deterministic=True)


def pull(call: Call, pullback: Pullback, given: RowGradients, wanted: tuple[str, ...]) -> Gradients:
    """Return the gradients of q, k, v and of the captured tensors ``wanted``.

    dq, dk and dv have the dtypes of q, k and v; dv is zero where the stage sums no rows. ``given`` is what
    :func:`.row_gradients.row_gradients` makes of the gradients of the outputs.

    Raises:
        Unavailable: this backend cannot run the call here.
    """
    target = check(call)
    if call.q.numel() == 0 or call.k.numel() == 0 or call.v.numel() == 0:
        raise Unavailable("nothing to run")
    kernels = kernels_of(call, target, wanted)
    plan = kernels.plan
    for grad in plan.grads:
        _fits(call, grad)
    shape = (*call.q.shape[:3], call.v.shape[3])
    do = call.q.new_zeros(()).expand(shape) if given.do is None else given.do.to(call.q.dtype)
    dq, dk, dv = (torch.empty_like(t) for t in (call.q, call.k, call.v))
    rows = dict(given.rows)
    full = {name: torch.empty(shape[:3], dtype=torch.float32, device=call.q.device) for name in swept(plan)}

    def operands(kernel: str, wrote: list[Tensor]) -> tuple[Tensor, ...]:
        reads = kernel_reads(plan, kernel)
        values = [call.v, do] if reads.product else []
        numbers = [*_numbers(reads.rows, rows), *_numbers(reads.columns, given.columns)]
        return (call.q, call.k, *values, *wrote, *numbers)

    sums = launch(call, QUERIES, kernels.queries, (*operands(QUERIES, [dq]), *full.values()))
    rows |= full
    wrote = [dk] if pullback.weight is None else [dk, dv]
    sums |= launch(call, KEYS, kernels.keys, operands(KEYS, wrote))
    grads = (*plan.grads, *plan.feature_grads)
    parts = [sums[i].result() for i in range(len(grads))]
    if pullback.weight is None:
        dv.zero_()
    return Gradients(dq, dk, dv, total(call, wanted, grads, parts))
