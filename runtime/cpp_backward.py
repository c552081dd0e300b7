"""Gradients on the CPU backend: call the generated backward kernel and bring its sums back to the tensors."""

from __future__ import annotations

import ctypes
import hashlib
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attnlang.codegen.cpp_backward import ENTRY, backward_arguments, emit_backward, private_axes
from attnlang.codegen.isa import COMMON_FLAGS, Isa
from attnlang.codegen.plan import CapturedGrad, KernelPlan, make_plan

from attnlang.ir import KEY_ADDRESS, Index
from attnlang.passes.levels import Level

from . import cpp
from .cache import Cache
from .call import Call
from .captured_grads import Gradients, bring_back, total
from .errors import Unavailable
from .toolchain import compile_library, find_compiler

__all__ = ["Gradients", "backward"]

Tensor = torch.Tensor

SHARES = 16
"""Pieces the work is cut into when few key heads exist; a constant, so that sums do not depend on threads."""
BUFFER_LIMIT = 1 << 28
"""Floats of private buffers a scattered gradient may take before the PyTorch fallback is used."""


class _Kernel:
    """A loaded backward kernel."""

    def __init__(self, plan: KernelPlan, isa: Isa, library: Path) -> None:
        self.plan, self.isa = plan, isa
        fields = backward_arguments(plan).fields
        self._pack = struct.Struct("=" + "".join(f.code for f in fields)).pack
        self._getters = tuple(map(cpp._getter, fields))
        self._entry = getattr(ctypes.CDLL(str(library)), ENTRY)
        self._entry.argtypes = (ctypes.c_char_p, ctypes.c_int)
        self._entry.restype = None

    def __call__(self, call: Call, tensors: Mapping[str, Tensor], schedule: Any, threads: int) -> None:
        self._entry(self._pack(*(get(call, tensors, schedule) for get in self._getters)), threads)


_kernels: dict[tuple[Any, ...], tuple[Any, _Kernel]] = {}
_lock = threading.Lock()


def _kernel(call: Call, isa: Isa, wanted: tuple[str, ...]) -> _Kernel:
    dtypes = tuple(t.dtype for t in call.tensors.values())
    wide = cpp._is_wide(call)
    key = (id(call.program), call.q.dtype, call.q.shape[3], call.v.shape[3], dtypes, wide, isa, wanted)
    found = _kernels.get(key)
    if found is not None:
        return found[1]
    with _lock:
        if key not in _kernels:
            cpp._plan(call, wide)  # refuses what this backend cannot run
            plan = make_plan(
                call.program,
                dtype=cpp.DTYPES[call.q.dtype],
                head_dim=call.q.shape[3],
                value_dim=call.v.shape[3],
                storage=call.storage,
                wide=wide,
                backward=True,
                captured_grads=wanted,
            )
            _kernels[key] = (call.program, _build(plan, isa))
        return _kernels[key][1]


def _build(plan: KernelPlan, isa: Isa) -> _Kernel:
    compiler = find_compiler()
    source = emit_backward(plan, isa)
    recipe = "\0".join((source, *COMMON_FLAGS, *isa.flags, compiler.identity))
    key = f"cpp-{plan.digest}-{isa.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:24]}"

    def build(library: Path) -> None:
        path = library.with_suffix(".cpp")
        path.write_text(source)
        compile_library(compiler, path, library, isa.flags)

    return _Kernel(plan, isa, Cache().get_or_build(key, cpp.LIBRARY, build))


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
    isa = cpp.select_isa(call.q.shape[2])
    kernel = _kernel(call, isa, wanted)
    (batch, heads, lq, dim), (kv_batch, kv_heads, lk, _) = call.q.shape, call.k.shape
    blocks = -(-lq // isa.rows)
    splits = max(1, min(blocks, SHARES // (kv_batch * kv_heads)))
    do = do.to(call.q.dtype).contiguous()
    delta = (do.float() * o.float()).sum(-1)
    if dlse is not None:
        delta = delta - dlse.float()
    pad = lambda n: -(-n // isa.lanes) * isa.lanes  # noqa: E731
    tensors = {
        "q": call.q,
        "k": call.k,
        "v": call.v,
        "o": o,
        "lse": lse.contiguous(),
        "dout": do,
        "delta": delta.contiguous(),
        "dq": torch.empty((batch, heads, lq, dim), dtype=call.q.dtype),
        "dk": torch.zeros((splits, kv_batch, kv_heads, lk, pad(dim))),
        "dv": torch.zeros((splits, kv_batch, kv_heads, lk, pad(call.v.shape[3]))),
    }
    for i, grad in enumerate(kernel.plan.grads):
        tensors[f"d{i}"] = _buffer(call, grad, splits, blocks)
    kernel(call, tensors, cpp._schedule(call, isa), torch.get_num_threads())
    parts = [_gather(call, grad, tensors[f"d{i}"]) for i, grad in enumerate(kernel.plan.grads)]
    captured = total(call, wanted, kernel.plan.grads, parts)
    dk, dv = (
        (tensors[n][0] if splits == 1 else tensors[n].sum(0))[..., : t.shape[3]].to(t.dtype)
        for n, t in (("dk", call.k), ("dv", call.v))
    )
    return Gradients(tensors["dq"], dk, dv, captured)


def _buffer(call: Call, grad: CapturedGrad, splits: int, blocks: int) -> Tensor:
    """Return zeros for the sums of one captured gradient, laid out as the kernel expects."""
    batch, heads, lq, lk = (call.sizes[n] for n in ("B", "H", "Lq", "Lk"))
    if grad.level is Level.GRID:
        return torch.zeros((batch, heads, blocks))
    if grad.level is Level.ROW:
        return torch.zeros((batch, heads, lq))
    if grad.level is Level.COL:
        return torch.zeros((splits, batch, heads, lk))
    private = set(private_axes(grad.load))
    shape = call.tensors[grad.load.tensor].shape
    for index, n in zip(grad.load.indices, shape, strict=True):
        # a plain index that is clamped into a short dimension does not keep pairs apart
        if isinstance(index, Index) and index.axis in "bhq":
            needed = {"b": batch, "h": heads, "q": lq}[index.axis]
            if n < needed:
                private.add(index.axis)
    shares = [
        n if axis in private else 1 for axis, n in zip("bhq", (call.k.shape[0], call.k.shape[1], splits), strict=True)
    ]
    floats = shares[0] * shares[1] * shares[2] * max(1, shape.numel())
    if floats > BUFFER_LIMIT:
        raise Unavailable(f"the gradient of {grad.load.tensor} would need {floats * 4 >> 20} MB of buffers")
    out = torch.zeros((*shares, *shape))
    strides = [0 if n == 1 else s for n, s in zip(shares, out.stride(), strict=False)]
    return out.as_strided(out.shape, (*strides, *out.stride()[3:]))


def _gather(call: Call, grad: CapturedGrad, buffer: Tensor) -> Tensor:
    """Bring the sums of one gradient to the shape of the tensor, always in the same order."""
    match grad.level:
        case Level.PAIR:
            return buffer.sum((0, 1, 2))
        case Level.GRID:
            return bring_back(call, grad.load, buffer.sum(-1), "bh")
        case Level.ROW:
            return bring_back(call, grad.load, buffer, "bhq")
    return bring_back(call, grad.load, buffer.sum(0), "bhk")
