"""Sums over the queries on the Triton backend: launch the kernel that makes them once the rows are known."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnlang.codegen.plan import KernelPlan
from attnlang.codegen.triton_backward_arguments import KEYS, LOOP
from attnlang.codegen.triton_backward_tiles import candidates
from attnlang.codegen.triton_columns import column_outputs, column_reads, emit_columns
from attnlang.codegen.triton_common import Config
from attnlang.passes.pullback import saved
from attnlang.passes.streaming import Made, streaming

from .call import Call
from .triton_common import Kernel, Kernels, captured_arguments, plan_key, plan_of, table_of

__all__ = ["sums_over_queries"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Columns:
    """The kernel, its outputs, and the names of what it reads among what a forward kernel saves."""

    kernel: Kernel[KernelPlan]
    outputs: tuple[Made, ...]
    reads: tuple[str, ...]


_kernels: Kernels[_Columns] = Kernels()


def _columns(call: Call, target: str) -> _Columns:
    def make() -> _Columns:
        plan, stream = plan_of(call, columns=True), streaming(call.program.attend)
        outs, names = column_outputs(stream), saved(stream)
        emit = functools.partial(emit_columns, outputs=outs)
        kernel = Kernel(call.program, plan, target, candidates(plan, KEYS, target), emit)
        return _Columns(kernel, outs, tuple(names[a] for a in column_reads(plan).rows))

    return _kernels.get(plan_key(call, target), make)


def sums_over_queries(call: Call, target: str, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs over q by name, float32 [B, H, Lk].

    ``held`` is what the forward kernel of a plan that saves its accumulators made, by name, float32 [B, H, Lq].
    """
    found = _columns(call, target)
    kernel, rows = found.kernel, [held[name] for name in found.reads]
    shape = (*call.q.shape[:2], call.k.shape[2])
    made = {out.name: torch.empty(shape, dtype=torch.float32, device=call.q.device) for out in found.outputs}
    captured = captured_arguments(call, kernel.plan)

    def arguments(config: Config) -> tuple[Any, ...]:
        table = table_of(call, kernel.plan, config, LOOP[KEYS])
        return (call.q, call.k, *rows, *made.values(), call.scale, *captured, *table)

    kernel.run(arguments)
    return made
