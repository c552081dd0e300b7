"""What the C++ kernels of both directions share: plans, building, argument records and schedules."""

from __future__ import annotations

import ctypes
import hashlib
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from attnlang.codegen.cpp_arguments import Arguments, Field
from attnlang.codegen.cpp_printer import ELEMENTS
from attnlang.codegen.cpp_render import keep_templates
from attnlang.codegen.isa import COMMON_FLAGS, Isa
from attnlang.codegen.plan import KernelPlan, make_plan
from attnlang.ir import BOOL, INT, Program
from attnlang.passes.widths import NARROW_LIMIT

from .cache import Cache, default_root
from .call import Call
from .errors import Unavailable
from .team import team
from .toolchain import compile_library, find_compiler

__all__ = ["KernelCache", "Loaded", "Schedule", "is_wide", "plan_of", "schedule_of"]

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
MAX_DIM = 512
LIBRARY = "kernel.so"

Tensor = torch.Tensor
K = TypeVar("K")

THREAD_WORK = 1e6
"""Multiplications a processor does in the time it takes to start and join a thread."""


@dataclass(frozen=True)
class Schedule:
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


_Getter = Callable[[Call, Mapping[str, Tensor], Any], Any]
_NOTHING = torch.zeros(1, dtype=torch.float64)  # what loads from a tensor without elements read


def getter(field: Field) -> _Getter:
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


class Loaded:
    """A function of a compiled library that takes one argument record and a number of threads."""

    def __init__(self, plan: KernelPlan, isa: Isa, source: str, record: Arguments, entry: str) -> None:
        """Compile ``source`` or find it in the cache: the key covers the text, flags and compiler.

        Raises:
            Unavailable: there is no compiler, it fails, or what it made cannot be loaded.
        """
        self.plan, self.isa = plan, isa
        self._pack = struct.Struct("=" + "".join(f.code for f in record.fields)).pack
        self._getters = tuple(map(getter, record.fields))
        try:
            self.library = ctypes.CDLL(str(_built(plan, isa, source)))
        except OSError as error:
            raise Unavailable(f"the compiled kernel cannot be loaded: {error}") from error
        self._entry = getattr(self.library, entry)
        self._entry.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p)
        self._entry.restype = None

    def run(self, call: Call, tensors: Mapping[str, Tensor], schedule: Schedule | None, threads: int) -> None:
        """Call the function; ``tensors`` are q, k, v, outputs and whatever else the record points to.

        ``schedule`` is what :func:`schedule_of` gave for this kernel.
        """
        record = self._pack(*(get(call, tensors, schedule) for get in self._getters))
        shared = team() if threads > 1 else 0
        self._entry(record, torch.get_num_threads() if shared else threads, shared)


def _built(plan: KernelPlan, isa: Isa, source: str) -> Path:
    compiler = find_compiler()
    recipe = "\0".join((source, *COMMON_FLAGS, *isa.flags, compiler.identity))
    key = f"cpp-{plan.digest}-{isa.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:24]}"

    def build(library: Path) -> None:
        path = library.with_suffix(".cpp")
        path.write_text(source)
        compile_library(compiler, path, library, isa.flags)

    return Cache().get_or_build(key, LIBRARY, build)


class KernelCache(Generic[K]):
    """Kernels in memory, by everything they depend on; programs are kept alive, so that an id is never reused."""

    MOST = 1024

    def __init__(self, make: Callable[[Call, Isa, bool, tuple[str, ...]], K]) -> None:
        self._make = make
        self._found: dict[tuple[Any, ...], tuple[Program, K]] = {}
        self._lock = threading.Lock()

    def get(self, call: Call, isa: Isa, wanted: tuple[str, ...] = ()) -> K:
        """Return the kernel for ``call``, built now if it is new."""
        dtypes = tuple(t.dtype for t in call.tensors.values())
        wide, closed = is_wide(call), call.closed("k")
        numbers = (call.q.dtype, call.q.shape[3], call.v.shape[3], dtypes, wide)
        key = (id(call.program), *numbers, closed, call.saves, call.order, isa, wanted)
        found = self._found.get(key)
        if found is not None:
            return found[1]
        with self._lock:
            if key not in self._found:
                keep_templates(default_root() / "templates")
                if len(self._found) >= self.MOST:
                    self._found.clear()
                self._found[key] = (call.program, self._make(call, isa, wide, wanted))
            return self._found[key][1]


def is_wide(call: Call) -> bool:
    """Whether a number of the call is too large for the narrow kernel."""
    if any(n >= NARROW_LIMIT for n in call.sizes.values()):
        return True
    if any(abs(p) >= NARROW_LIMIT for p in call.params.values() if isinstance(p, int)):
        return True
    return any(t.numel() and _span(t) >= 2**31 for t in call.tensors.values())


def _span(tensor: Tensor) -> int:
    return sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def plan_of(call: Call, wide: bool, captured_grads: Iterable[str] | None = None) -> KernelPlan:
    """Plan the forward pass, or the backward pass with gradients of ``captured_grads``.

    Raises:
        Unavailable: this backend cannot run the call; the reason says why.
    """
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
        backward=captured_grads is not None,
        saves=call.saves and captured_grads is None,
        captured_grads=captured_grads or (),
        closed=("k",) if call.closed("k") else (),
        order=call.order if captured_grads is None else (None, None),
    )


_schedules: dict[int, Schedule] = {}
PARTIAL_COST = 1.25
"""Time of a PARTIAL tile in FULL tiles, for the order of work."""

LARGE_BLOCK = 1 / 32
"""The part of a head's work from which on a query block counts as large."""


def schedule_of(call: Call, isa: Isa, plan: KernelPlan | None = None) -> Schedule | None:
    """Return the run map of ``call`` as kernels want it, None for a kernel of ``plan`` that needs none."""
    if plan is not None and plan.run_bounds("k") is not None:
        return None
    runs = call.runs((isa.rows, isa.tile))
    found = _schedules.get(id(runs))
    if found is not None:
        return found
    table = runs.launch_table()
    arrays = [_int32(a) for a in (table.full_ptr, table.full_runs, table.part_ptr, table.part_runs)]
    full, part = _weights(arrays[0], arrays[1]), _weights(arrays[2], arrays[3])
    blocks = -(-call.q.shape[2] // isa.rows)
    cost = (full + PARTIAL_COST * part).reshape(-1, blocks)
    order = _order(cost)
    work = float(cost.sum()) * isa.rows * isa.tile
    made = Schedule(arrays[0], arrays[1], arrays[2], arrays[3], order, runs.batch, runs.heads, work, runs)
    if len(_schedules) >= 64:
        _schedules.clear()
    _schedules[id(runs)] = made
    return made


def _order(cost: np.ndarray) -> np.ndarray:
    """The order in which the query blocks of each line are worked on.

    Neighbours share keys, which are still near the processor when they follow each other. Only where single blocks are
    a large part of the work do the dearest ones come first, so that no thread starts one last.
    """
    if cost.size and cost.max() <= LARGE_BLOCK * cost.sum(axis=1).min():
        return np.ascontiguousarray(np.broadcast_to(np.arange(cost.shape[1], dtype=np.int32)[::-1], cost.shape))
    return np.ascontiguousarray(np.argsort(-cost, axis=1, kind="stable").astype(np.int32))


def _int32(values: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(values), dtype=np.int32)


def _weights(ptr: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Number of tiles in the runs of every line."""
    lengths = np.concatenate(([0], np.cumsum(runs.reshape(-1, 2)[:, 1] - runs.reshape(-1, 2)[:, 0])))
    return lengths[ptr[1:]] - lengths[ptr[:-1]]
