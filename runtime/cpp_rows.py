"""Kernels that make rows on the CPU."""

from __future__ import annotations

import torch

from attnlang.codegen.cpp_printer import ELEMENTS
from attnlang.codegen.cpp_rows import ENTRY, arguments, emit
from attnlang.codegen.isa import Isa
from attnlang.codegen.rows import rows_plan
from attnlang.ir import Map

from .call import Call
from .cpp import select_isa
from .cpp_common import KernelCache, Loaded
from .errors import Unavailable

__all__ = ["make"]

Tensor = torch.Tensor

ALONE = 1 << 15
"""Elements that one thread makes while others would start."""


def _loaded(call: Call, isa: Isa, wide: bool, wanted: tuple[str, ...]) -> Loaded:
    (stage,) = call.program.stages
    assert isinstance(stage, Map)
    storage = call.storage
    for name, dtype in storage.items():
        if dtype not in ELEMENTS:
            raise Unavailable(f"the C++ backend cannot read {name}, which has dtype {dtype}")
    plan = rows_plan(call.program, stage, storage, wide=wide)
    return Loaded(plan, isa, emit(plan, isa), arguments(plan), ENTRY)


_kernels = KernelCache(_loaded)


def make(call: Call, extents: tuple[int, ...]) -> Tensor:
    """Return the rows of the program's Map, float32 of shape ``extents``.

    Raises:
        Unavailable: this backend cannot run the call here; the reason says why.
    """
    kernel = _kernels.get(call, select_isa(extents[2]))
    made = torch.empty(extents, dtype=torch.float32)
    kernel.run(call, {"y": made}, None, torch.get_num_threads() if made.numel() > ALONE else 1)
    return made
