"""The CPU backend: build, load and call generated C++ kernels."""

from __future__ import annotations

import ctypes
import functools
import math
import os

import torch

from attnlang.codegen.cpp import ENTRY, SPACE, emit
from attnlang.codegen.cpp_arguments import arguments
from attnlang.codegen.isa import AMX, ISAS, Isa, best_isa, few_rows, with_key_tile
from attnlang.codegen.plan import KernelPlan
from attnlang.passes.streaming import Accumulator, Made

from .call import Call
from .cpp_common import KernelCache, Loaded, Schedule, plan_of, schedule_of
from .errors import Unavailable
from .runs import warn_blind
from .toolchain import matrix_registers, processor_features

__all__ = ["Kernel", "forward", "outputs", "prefers_order", "select_isa"]

MOST_ROWS = max(isa.rows for isa in ISAS.values())

Tensor = torch.Tensor


class Kernel:
    """A loaded forward kernel of one plan and instruction set."""

    def __init__(self, plan: KernelPlan, isa: Isa) -> None:
        self.plan, self.isa = plan, isa
        stream = plan.stream
        assert stream is not None
        columns = {a.name: a for a in stream.accumulators}
        self._outputs = [(out, None if out.column is None else columns[out.column]) for out in stream.outputs]
        self._loaded = Loaded(plan, isa, emit(plan, isa), arguments(plan, isa), ENTRY)
        self._space = getattr(self._loaded.library, SPACE) if isa.matrix else None
        if self._space is not None:
            self._space.argtypes = (ctypes.c_int64,) * 3
            self._space.restype = ctypes.c_int64

    def __call__(self, call: Call, schedule: Schedule | None, threads: int) -> dict[str, Tensor]:
        """Return every output of the plan by name."""
        made = {out.name: _start(out, column, call) for out, column in self._outputs}
        tensors = {"q": call.q, "k": call.k, "v": call.v, **made}
        if self._space is not None:
            tensors["space"] = torch.empty(self._space(*call.k.shape[:3]), dtype=torch.uint8)
        if schedule is not None:
            threads = min(threads, schedule.threads(call))
        self._loaded.run(call, tensors, schedule, threads)
        return {out.name: _finish(out, column, made[out.name]) for out, column in self._outputs}

    def nothing(self, call: Call) -> dict[str, Tensor]:
        """Every output of a call without queries."""
        return {out.name: _finish(out, column, _start(out, column, call)) for out, column in self._outputs}


def _start(out: Made, column: Accumulator | None, call: Call) -> Tensor:
    batch, heads, length, _ = call.q.shape
    if column is not None:
        shares = max(1, SHARES // max(1, batch * heads))
        return torch.full((shares, batch, heads, call.sizes["Lk"]), column.identity, dtype=torch.float32)
    if out.rows is not None:
        return torch.empty((batch, heads, length, call.v.shape[3]), dtype=call.q.dtype)
    return torch.empty((batch, heads, length), dtype=torch.int64 if out.integer else torch.float32)


def _finish(out: Made, column: Accumulator | None, made: Tensor) -> Tensor:
    if column is None:
        return made
    if column.monoid == "sum":
        return made.sum(0)
    best = made.amax(0) if column.monoid == "max" else made.amin(0)
    return torch.where(best == column.identity, out.empty, best)


SHARES = 16
"""Pieces the queries of all heads are cut into where sums over queries are made; a constant, so that sums do not depend
on threads."""

_kernels = KernelCache(lambda call, isa, wide, wanted: Kernel(plan_of(call, wide), isa))


def select_isa(rows: int, key_tile: int = 0) -> Isa:
    """Return the instruction set for a call of ``rows`` queries; ``ATTNLANG_ISA`` names one to use instead."""
    return _isa(os.environ.get("ATTNLANG_ISA", ""), min(rows, MOST_ROWS), key_tile)


@functools.lru_cache(maxsize=256)
def _isa(chosen: str, rows: int, key_tile: int) -> Isa:
    if chosen and chosen not in ISAS:
        raise Unavailable(f"ATTNLANG_ISA={chosen!r} is not one of {', '.join(ISAS)}")
    isa = ISAS[chosen] if chosen else best_isa(processor_features())
    if not isa.needs <= processor_features():
        raise Unavailable(f"this processor lacks {', '.join(sorted(isa.needs - processor_features()))}")
    return with_key_tile(few_rows(isa, rows), key_tile)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Compute (o [B, H, Lq, Dv] in the dtype of q, lse [B, H, Lq] float32, natural logarithm) of a standard program.

    Raises:
        Unavailable: this backend cannot run the call here; the reason says why.
    """
    if not call.q.shape[0] * call.q.shape[1] * call.q.shape[2]:
        o = torch.empty((*call.q.shape[:3], call.v.shape[3]), dtype=call.q.dtype)
        return o, torch.empty(call.q.shape[:3], dtype=torch.float32)
    made = outputs(call)
    lse = made["lse"]
    # where no run map was made, which would have said so; most calls are past it with one number
    if call.sizes["Lk"] and call.closed("k") and lse[-1, -1, -1].item() == -math.inf and bool((lse == -math.inf).all()):
        warn_blind(call.program.mask, call.program.name)
    return made["o"], lse


def outputs(call: Call) -> dict[str, Tensor]:
    """Compute every output of the program's Attend stage by name.

    Weighted rows are [B, H, Lq, Dv] in the dtype of q; numbers of a row [B, H, Lq], and of a key [B, H, Lk], float32
    (int64 for an argmax).

    Raises:
        Unavailable: this backend cannot run the call here; the reason says why.
    """
    if call.q.device.type != "cpu":
        raise Unavailable(f"the C++ backend runs on CPU tensors, q is on {call.q.device}")
    isa = select_isa(max(1, call.q.shape[2]), call.key_tile)
    kernel = _kernels.get(call, isa)
    if prefers_order(call) and kernel.plan.plain and kernel.plan.in_order:
        isa = AMX
        kernel = _kernels.get(call, isa)
    if not call.q.shape[0] * call.q.shape[1] * call.q.shape[2]:
        return kernel.nothing(call)
    return kernel(call, schedule_of(call, isa, kernel.plan), torch.get_num_threads())


def prefers_order(call: Call) -> bool:
    """Whether a faster kernel runs ``call`` where rows are in order: one for the matrix unit, which packs them."""
    return call.q.dtype is torch.bfloat16 and _use_matrix(call.q.shape[2])


def _use_matrix(rows: int) -> bool:
    """Whether the matrix unit exists and has enough queries to pay for packing keys and values."""
    if rows < AMX.rows or os.environ.get("ATTNLANG_ISA"):
        return False
    return processor_features() >= AMX.needs and matrix_registers()
