"""Kernels that make rows on GPUs."""

from __future__ import annotations

import functools
from typing import Any

import torch

from attnlang.codegen.rows import RowsPlan, covered_by, rows_plan
from attnlang.codegen.triton_common import Config
from attnlang.codegen.triton_rows import MOST_FEATURES, candidates, emit
from attnlang.ir import Map
from attnlang.passes.widths import NARROW_LIMIT

from .call import Call
from .errors import Unavailable
from .triton_common import Kernel, Kernels, interpreted, needs_wide, read_arguments, readable

__all__ = ["make"]

Tensor = torch.Tensor

_kernels: Kernels[Kernel[RowsPlan]] = Kernels()


def make(call: Call, extents: tuple[int, ...]) -> Tensor:
    """Return the rows of the program's Map, float32 of shape ``extents``.

    Raises:
        Unavailable: this backend cannot run the call here; the reason says why.
    """
    (stage,) = call.program.stages
    assert isinstance(stage, Map)
    target = readable(call)
    features = extents[3]
    if features > MOST_FEATURES:
        raise Unavailable(f"triton kernels make rows of up to {MOST_FEATURES} features")
    wide = needs_wide(call) or max(extents) >= NARROW_LIMIT
    storage = call.storage
    covered = covered_by(stage, {name: t.shape for name, t in call.tensors.items()}, extents)

    def planned() -> Kernel[RowsPlan]:
        plan = rows_plan(call.program, stage, storage, wide=wide, covered=covered)
        tiles = candidates(features, interpreted=interpreted())
        return Kernel(call.program, plan, target, tiles, functools.partial(emit, features=features))

    kernel = _kernels.get((id(call.program), features, tuple(storage.items()), wide, covered, target), planned)
    plan = kernel.plan
    made = torch.empty(extents, dtype=torch.float32, device=call.q.device)
    read = read_arguments(call, plan.tensors, plan.scalars, plan.sizes)

    def arguments(config: Config) -> tuple[Any, ...]:
        return (made, *read)

    if made.numel():
        kernel.run(arguments)
    return made
