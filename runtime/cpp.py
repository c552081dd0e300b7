"""The CPU backend: build, load and call generated C++ kernels."""

from __future__ import annotations

import ctypes
import functools
import os

import torch

from attnlang.codegen.cpp import ENTRY, SPACE, emit
from attnlang.codegen.cpp_arguments import arguments
from attnlang.codegen.isa import AMX, ISAS, Isa, best_isa, few_rows
from attnlang.codegen.plan import KernelPlan

from .call import Call
from .cpp_common import KernelCache, Loaded, Schedule, plan_of, schedule_of
from .errors import Unavailable
from .toolchain import matrix_registers, processor_features

__all__ = ["Kernel", "forward", "select_isa"]

MOST_ROWS = max(isa.rows for isa in ISAS.values())

Tensor = torch.Tensor


class Kernel:
    """A loaded forward kernel of one plan and instruction set."""

    def __init__(self, plan: KernelPlan, isa: Isa) -> None:
        self.plan, self.isa = plan, isa
        self._loaded = Loaded(plan, isa, emit(plan, isa), arguments(plan, isa), ENTRY)
        self._space = getattr(self._loaded.library, SPACE) if isa.matrix else None
        if self._space is not None:
            self._space.argtypes = (ctypes.c_int64,) * 3
            self._space.restype = ctypes.c_int64

    def __call__(self, call: Call, schedule: Schedule | None, threads: int) -> tuple[Tensor, Tensor]:
        q, v = call.q, call.v
        batch, heads, length, _ = q.shape
        o = torch.empty((batch, heads, length, v.shape[3]), dtype=q.dtype)
        lse = torch.empty((batch, heads, length), dtype=torch.float32)
        tensors = {"q": q, "k": call.k, "v": v, "o": o, "lse": lse}
        if self._space is not None:
            tensors["space"] = torch.empty(self._space(*call.k.shape[:3]), dtype=torch.uint8)
        if schedule is not None:
            threads = min(threads, schedule.threads(call))
        self._loaded.run(call, tensors, schedule, threads)
        return o, lse


_kernels = KernelCache(lambda call, isa, wide, wanted: Kernel(plan_of(call, wide), isa))


def select_isa(rows: int) -> Isa:
    """Return the instruction set for a call of ``rows`` queries; ``ATTNLANG_ISA`` names one to use instead."""
    return _isa(os.environ.get("ATTNLANG_ISA", ""), min(rows, MOST_ROWS))


@functools.lru_cache(maxsize=256)
def _isa(chosen: str, rows: int) -> Isa:
    if chosen and chosen not in ISAS:
        raise Unavailable(f"ATTNLANG_ISA={chosen!r} is not one of {', '.join(ISAS)}")
    isa = ISAS[chosen] if chosen else best_isa(processor_features())
    if not isa.needs <= processor_features():
        raise Unavailable(f"this processor lacks {', '.join(sorted(isa.needs - processor_features()))}")
    return few_rows(isa, rows)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Compute (o [B, H, Lq, Dv] in the dtype of q, lse [B, H, Lq] float32, natural logarithm).

    Raises:
        Unavailable: this backend cannot run the call here; the reason says why.
    """
    q, v = call.q, call.v
    if q.device.type != "cpu":
        raise Unavailable(f"the C++ backend runs on CPU tensors, q is on {q.device}")
    if q.numel() == 0 or v.shape[3] == 0:
        o = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
        if o.numel() == 0 and q.shape[0] * q.shape[1] * q.shape[2] == 0:
            return o, torch.empty(q.shape[:3], dtype=torch.float32)
    isa = select_isa(q.shape[2])
    if q.dtype is torch.bfloat16 and _use_matrix(q.shape[2]):
        isa = AMX
    kernel = _kernels.get(call, isa)
    return kernel(call, schedule_of(call, isa, kernel.plan), torch.get_num_threads())


def _use_matrix(rows: int) -> bool:
    """Whether the matrix unit exists and has enough queries to pay for packing keys and values."""
    if rows < AMX.rows or os.environ.get("ATTNLANG_ISA"):
        return False
    return processor_features() >= AMX.needs and matrix_registers()
