"""Run a call with a generated Triton kernel: choose a tile, write the source to the cache, import it, launch it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from attnlang.codegen.plan import KernelPlan
from attnlang.codegen.triton import emit
from attnlang.codegen.triton_common import Config
from attnlang.codegen.triton_stream import emit_stream, row_outputs
from attnlang.codegen.triton_tiles import INTERPRETED, candidates
from attnlang.ir import OUTPUT_NAMES
from attnlang.passes.streaming import Unstreamable

from .call import Call
from .errors import Unavailable
from .triton_columns import sums_over_queries
from .triton_common import Kernel, Kernels, captured_arguments, check, plan_key, plan_of, table_of

__all__ = ["forward", "outputs"]

Tensor = torch.Tensor

_kernels: Kernels[Kernel[KernelPlan]] = Kernels()
_streams: Kernels[Kernel[KernelPlan]] = Kernels()


def _kernel(call: Call, target: str, descriptors: bool) -> Kernel[KernelPlan]:
    def make() -> Kernel[KernelPlan]:
        plan = plan_of(call)
        return Kernel(call.program, plan, target, candidates(plan, target, descriptors=descriptors), emit)

    return _kernels.get((*plan_key(call, target), descriptors), make)


def _describable(tensor: Tensor) -> bool:
    """Whether the copy engine can describe [B, H, L, D]: columns adjacent, everything else at multiples of 16 bytes."""
    size = tensor.element_size()
    steps = [s for n, s in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if n > 1]
    aligned = all(s > 0 and s * size % 16 == 0 for s in steps) and tensor.data_ptr() % 16 == 0
    return aligned and tensor.stride(3) == 1 and 0 not in tensor.shape


def _use_descriptors(call: Call, o: Tensor, target: str) -> bool:
    chip = target.partition(":")
    capable = chip[0] == INTERPRETED or (chip[0] == "cuda" and int(chip[2]) >= 90 and call.q.element_size() == 2)
    return capable and call.order == (None, None) and all(map(_describable, (call.q, call.k, call.v, o)))


def _output(q: Tensor, value_dim: int) -> Tensor:
    """Return an empty output whose dimensions lie in memory in the order of those of q."""
    shape = (*q.shape[:3], value_dim)
    if q.is_contiguous() or 0 in q.stride() or q.stride(3) != 1:
        return q.new_empty(shape)
    strides = q.stride()
    order = sorted(range(4), key=lambda d: (-strides[d], d))
    return torch.empty_permuted(shape, order, dtype=q.dtype, device=q.device)


def _positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernel takes row maxima before it scales, so the sign of the scale moves into q."""
    if scale > 0:
        return q, scale
    return (torch.neg(q), -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return o [B, H, Lq, Dv] in the dtype of q, and the natural-log lse [B, H, Lq] in float32.

    Raises:
        Unavailable: no GPU that Triton serves, a dtype or head dimension the kernels do not have, or no tile fits.
    """
    target = check(call)
    o = _output(call.q, call.v.shape[3])
    lse = torch.empty(call.q.shape[:3], dtype=torch.float32, device=call.q.device)
    if lse.numel() == 0:
        return o, lse
    if call.sizes["Lk"] == 0 or call.k.shape[2] == 0:
        return o.zero_(), lse.fill_(-torch.inf)
    kernel = _kernel(call, target, _use_descriptors(call, o, target))
    if kernel.plan.before is not None and call.scale <= 0:
        raise Unavailable("queries that the kernel makes need a positive scale here")
    q, scale = _positive_scale(call.q, call.scale)
    captured = captured_arguments(call, kernel.plan)

    def arguments(config: Config) -> tuple[Any, ...]:
        table = table_of(call, kernel.plan, config, "k")
        return (q, call.k, call.v, o, lse, scale, *captured, *table)

    kernel.run(arguments)
    return o, lse


def _stream(call: Call, target: str) -> Kernel[KernelPlan]:
    def make() -> Kernel[KernelPlan]:
        try:
            plan = plan_of(call)
        except Unstreamable as error:
            raise Unavailable(str(error)) from error
        return Kernel(call.program, plan, target, candidates(plan, target), emit_stream)

    return _streams.get(plan_key(call, target), make)


def outputs(call: Call) -> dict[str, Tensor]:
    """Compute every output of the program's Attend stage by name; its rows stages make the queries and change the rows.

    Weighted rows are [B, H, Lq, Dv] in the dtype of q; numbers of a row [B, H, Lq] float32 (int64 for an argmax).

    Raises:
        Unavailable: as :func:`forward`, or an output is not one value or row for each query.
    """
    target = check(call)
    maps = len(call.program.stages) > 1
    if maps and call.program.attend.standard and not call.saves and call.scale > 0:
        return dict(zip(OUTPUT_NAMES, forward(call), strict=True))
    kernel = _stream(call, target)
    stream = kernel.plan.stream
    assert stream is not None
    columns = [out.name for out in stream.outputs if out.column is not None]
    if columns and kernel.plan.before is not None:
        raise Unavailable("sums over queries have a kernel of their own, which reads the rows of q")
    if columns and not call.saves:  # sums over queries start from what is saved of the rows
        made = outputs(replace(call, saves=True))
        return {out.name: made[out.name] for out in stream.outputs}
    shape, keys = call.q.shape[:3], (call.sizes["Lk"], call.k.shape[2])
    if shape.numel() == 0 or 0 in keys:
        raise Unavailable("there is nothing to launch a kernel for")
    outs = row_outputs(stream)
    made = {
        out.name: _output(call.q, call.v.shape[3])
        if out.rows is not None
        else torch.empty(shape, dtype=torch.int64 if out.integer else torch.float32, device=call.q.device)
        for out in outs
    }
    rows = [made[out.name] for out in outs if out.rows is not None]
    numbers = [made[out.name] for out in outs if out.rows is None]
    captured = captured_arguments(call, kernel.plan)

    def arguments(config: Config) -> tuple[Any, ...]:
        table = table_of(call, kernel.plan, config, "k")
        return (call.q, call.k, call.v, *rows, *numbers, call.scale, *captured, *table)

    if made:
        kernel.run(arguments)
    if columns:
        made |= sums_over_queries(call, target, made)
    return {out.name: made[out.name] for out in stream.outputs}
