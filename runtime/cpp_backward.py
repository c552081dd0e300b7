"""Gradients on the CPU backend: call the generated backward kernel and bring its sums back to the tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from attnlang.codegen.cpp_backward import ENTRY, backward_arguments, emit_backward, private_axes
from attnlang.codegen.isa import Isa
from attnlang.codegen.plan import CapturedGrad
from attnlang.ir import KEY_ADDRESS, Index
from attnlang.passes.levels import Level

from .call import Call
from .captured_grads import Gradients, axes_of, bring_back, total
from .cpp import select_isa
from .cpp_common import KernelCache, Loaded, plan_of, schedule_of
from .errors import Unavailable

__all__ = ["Gradients", "backward", "launch"]

Tensor = torch.Tensor

SHARES = 16
"""Buffers of a scattered gradient when few key heads exist; a constant, so that sums do not depend on threads."""
TURN = 8
"""Numbers in a turn record of the kernel, which fills a cache line."""
BUFFER_LIMIT = 1 << 28
"""Floats of private buffers a scattered gradient may take before the PyTorch fallback is used."""


def _make(call: Call, isa: Isa, wide: bool, wanted: tuple[str, ...]) -> Loaded:
    plan = plan_of(call, wide, wanted)
    return Loaded(plan, isa, emit_backward(plan, isa), backward_arguments(plan, isa), ENTRY)


_kernels = KernelCache(_make)


def backward(call: Call, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, wanted: tuple[str, ...]) -> Gradients:
    """Differentiate a forward call of this backend.

    ``o`` and ``lse`` are what it returned, ``do`` [B, H, Lq, Dv] and ``dlse`` [B, H, Lq] the incoming gradients, and
    ``wanted`` the captured float tensors whose gradients are needed.

    Raises:
        Unavailable: this backend cannot run the call here.
    """
    (term,) = call.program.attend.terms
    values = next(x.rows for x in call.program.attend.outputs if x.rows is not None)
    if term.right.address != KEY_ADDRESS or values.address != KEY_ADDRESS:
        raise Unavailable("the C++ backward pass takes the default key address only")
    if call.q.numel() == 0 or call.k.numel() == 0 or call.v.numel() == 0:
        raise Unavailable("nothing to run")
    rows = {"o": o.contiguous(), "lse": lse.contiguous()}
    rows["dlse"] = _zeros(lse.shape) if dlse is None else dlse.float().contiguous()
    return launch(call, rows, do, wanted)


def launch(call: Call, inputs: Mapping[str, Tensor], do: Tensor | None, wanted: tuple[str, ...]) -> Gradients:
    """Run the backward kernel of a call that is not empty.

    ``inputs`` is what the kernel reads beside q, k, v and ``do`` [B, H, Lq, Dv], contiguous float32 (o in the dtype of
    q) by the names its record has for them. A plan that sums no rows reads no ``do``, and its gradient of v is 0.

    Raises:
        Unavailable: this backend cannot run the call here.
    """
    isa = select_isa(call.q.shape[2], call.key_tile)
    kernel = _kernels.get(call, isa, wanted)
    (batch, heads, lq, dim), (kv_batch, kv_heads, lk, _) = call.q.shape, call.k.shape
    blocks = -(-lq // isa.rows)
    places = kv_batch * kv_heads
    shares = max(1, min(blocks, SHARES // places))
    pad = lambda n: -(-n // isa.lanes) * isa.lanes  # noqa: E731
    shape = (batch, heads, lq, call.v.shape[3])
    tensors = {
        "q": call.q,
        "k": call.k,
        "v": call.v,
        **inputs,
        "dout": torch.zeros(shape, dtype=call.q.dtype) if do is None else do.to(call.q.dtype).contiguous(),
        "dq": torch.empty((batch, heads, lq, dim), dtype=call.q.dtype),
        "dk": _zeros((kv_batch, kv_heads, lk, pad(dim))),
        "dv": _zeros((kv_batch, kv_heads, lk, pad(call.v.shape[3]))),
        "turns": torch.zeros((batch * heads * blocks + places + 1, TURN), dtype=torch.int64),
        "shares": torch.empty(shares),
    }
    grads = (*kernel.plan.grads, *kernel.plan.feature_grads)
    for i, grad in enumerate(grads):
        tensors[f"d{i}"] = _buffer(call, grad, shares, blocks)
    schedule, threads = schedule_of(call, isa, kernel.plan), torch.get_num_threads()
    if schedule is not None:
        threads = min(threads, schedule.threads(call))
    kernel.run(call, tensors, schedule, threads)
    parts = [_gather(call, grad, tensors[f"d{i}"]) for i, grad in enumerate(grads)]
    captured = total(call, wanted, grads, parts)
    dk, dv = (tensors[n][..., : t.shape[3]].to(t.dtype) for n, t in (("dk", call.k), ("dv", call.v)))
    return Gradients(tensors["dq"], dk, dv, captured)


def _zeros(shape: Sequence[int]) -> Tensor:
    """Zeros in float32 that take memory only where they are written: fresh pages are zero already."""
    return torch.from_numpy(np.zeros(tuple(shape), np.float32))


def _buffer(call: Call, grad: CapturedGrad, shares: int, blocks: int) -> Tensor:
    """Return zeros for the sums of one captured gradient, laid out as the kernel expects."""
    batch, heads, lq, lk = (call.sizes[n] for n in ("B", "H", "Lq", "Lk"))
    if grad.level is not Level.PAIR:
        last = {Level.GRID: blocks, Level.ROW: lq, Level.COL: lk}[grad.level]
        shape = (batch, heads, last, call.q.shape[3])
        return _zeros(shape if grad.by_feature else shape[:3])
    private = set(private_axes(grad.load))
    own = call.tensors[grad.load.tensor].shape
    for index, n in zip(grad.load.indices, own, strict=True):
        # a plain index that is clamped into a short dimension does not keep pairs apart
        if isinstance(index, Index) and index.axis in "bhq":
            needed = {"b": batch, "h": heads, "q": lq}[index.axis]
            if n < needed:
                private.add(index.axis)
    counts = [
        n if axis in private else 1 for axis, n in zip("bhq", (call.k.shape[0], call.k.shape[1], shares), strict=True)
    ]
    floats = math.prod(counts) * max(1, own.numel())
    if floats > BUFFER_LIMIT:
        raise Unavailable(f"the gradient of {grad.load.tensor} would need {floats * 4 >> 20} MB of buffers")
    out = _zeros((*counts, *own))
    strides = [0 if n == 1 else s for n, s in zip(counts, out.stride(), strict=False)]
    return out.as_strided(out.shape, (*strides, *out.stride()[3:]))


def _gather(call: Call, grad: CapturedGrad, buffer: Tensor) -> Tensor:
    """Bring the sums of one gradient to the shape of the tensor, always in the same order."""
    if grad.level is Level.PAIR:
        shared = [d for d in range(3) if buffer.shape[d] > 1]
        return (buffer.sum(shared, keepdim=True) if shared else buffer)[0, 0, 0]
    sums = buffer.sum(2) if grad.level is Level.GRID else buffer
    return bring_back(call, grad.load, sums, axes_of(grad))
