"""The CPU backend: build, load and call generated C++ kernels."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attnlang.codegen.cpp import ENTRY, SPACE, emit
from attnlang.codegen.cpp_arguments import Field, arguments
from attnlang.codegen.cpp_printer import ELEMENTS
from attnlang.codegen.isa import AMX, COMMON_FLAGS, ISAS, Isa, best_isa, few_rows
from attnlang.codegen.plan import KernelPlan, make_plan

from attnlang.ir import BOOL, INT, Program
from attnlang.passes.widths import NARROW_LIMIT

from .cache import Cache
from .call import Call
from .errors import Unavailable
from .toolchain import compile_library, find_compiler, matrix_registers, processor_features

__all__ = ["Kernel", "forward", "select_isa"]

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
MAX_DIM = 512
MOST_ROWS = max(isa.rows for isa in ISAS.values())
LIBRARY = "kernel.so"
THREAD_WORK = 1e6
"""Multiplications a processor does in the time it takes to start and join a thread."""

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Schedule:
    """A run map as kernels want it: int32 arrays and the order in which query blocks are worked on.

    ``work`` is the number of pairs in the tiles of all its lines; ``keep`` is the run map itself, so that no other gets
    its id while the schedule is remembered.
    """

    full_ptr: np.ndarray
    full_runs: np.ndarray
    part_ptr: np.ndarray
    part_runs: np.ndarray
    order: np.ndarray
    map_batch: int
    map_heads: int
    work: float
    keep: Any

    def threads(self, call: Call) -> int:
        """Threads that a call has work for; starting one takes as long as THREAD_WORK multiplications."""
        heads = call.q.shape[0] * call.q.shape[1] / (self.map_batch * self.map_heads)
        return 1 + int(self.work * heads * (call.q.shape[3] + call.v.shape[3]) / THREAD_WORK)

    def value(self, name: str) -> int:
        field = getattr(self, name)
        return field if isinstance(field, int) else field.ctypes.data


class Kernel:
    """A loaded kernel of one plan and instruction set."""

    def __init__(self, plan: KernelPlan, isa: Isa, library: Path) -> None:
        self.plan, self.isa = plan, isa
        fields = arguments(plan, isa).fields
        self._pack = struct.Struct("=" + "".join(f.code for f in fields)).pack
        self._getters = tuple(map(_getter, fields))
        loaded = ctypes.CDLL(str(library))
        self._entry = getattr(loaded, ENTRY)
        self._entry.argtypes = (ctypes.c_char_p, ctypes.c_int)
        self._entry.restype = None
        self._space = getattr(loaded, SPACE) if isa.matrix else None
        if self._space is not None:
            self._space.argtypes = (ctypes.c_int64,) * 3
            self._space.restype = ctypes.c_int64

    def __call__(self, call: Call, schedule: _Schedule, threads: int) -> tuple[Tensor, Tensor]:
        q, v = call.q, call.v
        batch, heads, length, _ = q.shape
        o = torch.empty((batch, heads, length, v.shape[3]), dtype=q.dtype)
        lse = torch.empty((batch, heads, length), dtype=torch.float32)
        tensors = {"q": q, "k": call.k, "v": v, "o": o, "lse": lse}
        if self._space is not None:
            tensors["space"] = torch.empty(self._space(*call.k.shape[:3]), dtype=torch.uint8)
        packed = self._pack(*(get(call, tensors, schedule) for get in self._getters))
        self._entry(packed, min(threads, schedule.threads(call)))
        return o, lse


_Getter = Callable[[Call, Mapping[str, Tensor], _Schedule], Any]
_NOTHING = torch.zeros(1, dtype=torch.float64)  # what loads from a tensor without elements read


def _getter(field: Field) -> _Getter:
    """Return the function that finds the value of ``field`` in a call."""
    kind, *rest = field.source
    name = rest[0] if rest else ""
    axis = int(rest[1]) if len(rest) > 1 else 0
    match kind:
        case "pointer":
            return lambda call, tensors, runs: tensors[name].data_ptr()
        case "stride":
            return lambda call, tensors, runs: tensors[name].stride(axis)
        case "extent":
            return lambda call, tensors, runs: tensors[name].shape[axis]
        case "size":
            return lambda call, tensors, runs: call.sizes[name]
        case "scale":
            return lambda call, tensors, runs: call.scale
        case "runs":
            return lambda call, tensors, runs: runs.value(name)
        case "data":
            return lambda call, tensors, runs: (
                call.tensors[name] if call.tensors[name].numel() else _NOTHING
            ).data_ptr()
        case "step":
            return lambda call, tensors, runs: call.tensors[name].stride(axis) if call.tensors[name].numel() else 0
        case "length":
            return lambda call, tensors, runs: call.tensors[name].shape[axis]
        case "param":
            convert = float if field.code == "d" else int
            return lambda call, tensors, runs: convert(call.params[name])
    raise TypeError(f"unknown argument {field}")


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
    kernel = _kernel(call, isa)
    schedule = _schedule(call, isa)
    return kernel(call, schedule, torch.get_num_threads())


def _use_matrix(rows: int) -> bool:
    """Whether the matrix unit exists and has enough queries to pay for packing keys and values."""
    if rows < AMX.rows or os.environ.get("ATTNLANG_ISA"):
        return False
    return processor_features() >= AMX.needs and matrix_registers()


# kernels by what they depend on; programs are kept alive, so that an id is never reused
_kernels: dict[tuple[Any, ...], tuple[Program, Kernel]] = {}
_lock = threading.Lock()
MAX_KERNELS = 1024


def _kernel(call: Call, isa: Isa) -> Kernel:
    dtypes = tuple(t.dtype for t in call.tensors.values())
    wide = _is_wide(call)
    key = (id(call.program), call.q.dtype, call.q.shape[3], call.v.shape[3], dtypes, wide, isa)
    found = _kernels.get(key)
    if found is not None:
        return found[1]
    with _lock:
        if key not in _kernels:
            if len(_kernels) >= MAX_KERNELS:
                _kernels.clear()
            _kernels[key] = (call.program, _build(_plan(call, wide), isa))
        return _kernels[key][1]


def _is_wide(call: Call) -> bool:
    """Whether a number of the call is too large for the narrow kernel."""
    if any(n >= NARROW_LIMIT for n in call.sizes.values()):
        return True
    if any(abs(p) >= NARROW_LIMIT for p in call.params.values() if isinstance(p, int)):
        return True
    return any(t.numel() and _span(t) >= 2**31 for t in call.tensors.values())


def _span(tensor: Tensor) -> int:
    return sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _plan(call: Call, wide: bool) -> KernelPlan:
    q, v = call.q, call.v
    if q.dtype not in DTYPES:
        raise Unavailable(f"the C++ backend computes in float32, bfloat16 and float16, not in {q.dtype}")
    for what, n in (("head", q.shape[3]), ("value", v.shape[3])):
        if not 1 <= n <= MAX_DIM:
            raise Unavailable(f"the C++ backend takes {what} dimensions of 1 to {MAX_DIM}, got {n}")
    storage = call.storage
    for name, dtype in storage.items():
        if dtype not in ELEMENTS:
            raise Unavailable(f"the C++ backend cannot read {name}, which has dtype {dtype}")
        declared = call.program.tensor(name).type
        if declared in (INT, BOOL) and call.tensors[name].dtype.is_floating_point:
            raise Unavailable(f"{name} is declared {declared} and holds {dtype}")
    return make_plan(
        call.program,
        dtype=DTYPES[q.dtype],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        storage=storage,
        wide=wide,
    )


def _build(plan: KernelPlan, isa: Isa) -> Kernel:
    """Compile ``plan`` or find it in the cache. The key covers the source text, flags and compiler."""
    compiler = find_compiler()
    source = emit(plan, isa)
    recipe = "\0".join((source, *COMMON_FLAGS, *isa.flags, compiler.identity))
    key = f"cpp-{plan.digest}-{isa.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:24]}"

    def build(library: Path) -> None:
        path = library.with_suffix(".cpp")
        path.write_text(source)
        compile_library(compiler, path, library, isa.flags)

    library = Cache().get_or_build(key, LIBRARY, build)
    try:
        return Kernel(plan, isa, library)
    except OSError as error:
        raise Unavailable(f"the compiled kernel cannot be loaded: {error}") from error


_schedules: dict[int, _Schedule] = {}
PARTIAL_COST = 1.25
"""Time of a PARTIAL tile in FULL tiles, for the order of work."""


def _schedule(call: Call, isa: Isa) -> _Schedule:
    runs = call.runs((isa.rows, isa.tile))
    found = _schedules.get(id(runs))
    if found is not None:
        return found
    table = runs.launch_table()
    arrays = [_int32(a) for a in (table.full_ptr, table.full_runs, table.part_ptr, table.part_runs)]
    full, part = _weights(arrays[0], arrays[1]), _weights(arrays[2], arrays[3])
    blocks = -(-call.q.shape[2] // isa.rows)
    cost = (full + PARTIAL_COST * part).reshape(-1, blocks)
    order = np.ascontiguousarray(np.argsort(-cost, axis=1, kind="stable").astype(np.int32))
    work = float(cost.sum()) * isa.rows * isa.tile
    made = _Schedule(arrays[0], arrays[1], arrays[2], arrays[3], order, runs.batch, runs.heads, work, runs)
    if len(_schedules) >= 64:
        _schedules.clear()
    _schedules[id(runs)] = made
    return made


def _int32(values: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(values), dtype=np.int32)


def _weights(ptr: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Number of tiles in the runs of every line."""
    lengths = np.concatenate(([0], np.cumsum(runs.reshape(-1, 2)[:, 1] - runs.reshape(-1, 2)[:, 0])))
    return lengths[ptr[1:]] - lengths[ptr[:-1]]
