"""What the Triton kernels of both directions share: loading, run tables, checks, and settling on a tile.

With ``TRITON_INTERPRET=1`` kernels run on CPU tensors in Triton's interpreter; tests use this.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import torch

from attnlang.codegen.plan import KernelPlan, make_plan
from attnlang.codegen.plan_parts import TensorArg
from attnlang.codegen.rows import Covered, RowsPlan, covered_by
from attnlang.codegen.triton_common import Config, padded, sizes_given
from attnlang.codegen.triton_tiles import INTERPRETED, is_compiler_failure, settle
from attnlang.ir import INT, Map, Param, Program
from attnlang.passes.widths import NARROW_LIMIT
from attnlang.sparsity import RunMap

from .cache import Cache
from .call import Call
from .errors import Unavailable

__all__ = [
    "Kernel",
    "Kernels",
    "captured_arguments",
    "check",
    "device_table",
    "interpreted",
    "needs_wide",
    "plan_key",
    "plan_of",
    "read_arguments",
    "readable",
    "table_of",
    "target_of",
]

MAX_HEAD_DIM = 512
MAX_KERNELS = 512
"""Loaded kernels kept by this process; the least recently used ones go first."""

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_CAPTURED = {
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
}  # fmt: skip

Tensor = torch.Tensor
Table: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, int, int, int, int]
Made = TypeVar("Made")
Planned = TypeVar("Planned", KernelPlan, RowsPlan)


@functools.cache
def _triton() -> Any:
    try:
        import triton
    except ImportError as error:
        raise Unavailable(f"triton cannot be imported ({error})") from error
    return triton


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def target_of(device: torch.device) -> str:
    """Return the target name (``cuda:90``, ``hip:gfx942``) of a GPU.

    Raises:
        Unavailable: the device is not a GPU that Triton can compile for.
    """
    if device.type != "cuda":
        raise Unavailable(f"triton kernels need a GPU, the tensors are on {device.type}")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return f"hip:{properties.gcnArchName.partition(':')[0]}"
    if properties.major < 8:
        raise Unavailable(f"triton kernels need compute capability 8.0, {properties.name} has {properties.major}.x")
    return f"cuda:{properties.major}{properties.minor}"


def _dims(plan: KernelPlan | RowsPlan) -> str:
    if isinstance(plan, RowsPlan):
        return ""
    return f" with head dimensions {plan.head_dim} and {plan.value_dim} in {plan.dtype}"


@dataclass
class Kernel(Generic[Planned]):
    """A plan with its candidate tiles, and the one its launches settled on; ``emit`` writes its source at a tile.

    ``program`` is what was planned: the key of a kernel has its id, which must stay taken.
    """

    program: Program
    plan: Planned
    target: str
    configs: tuple[Config, ...]
    emit: Callable[..., str]
    chosen: Config | None = None
    refused: str = ""
    loaded: dict[Config, Callable[..., Any]] = field(default_factory=dict)

    def run(self, arguments: Callable[[Config], tuple[Any, ...]]) -> None:
        """Launch with the arguments that belong to a tile; the first launch settles on one.

        Tiles are tried in order of preference until one compiles, has the resources it needs and spills no registers.

        Raises:
            Unavailable: there is no such tile.
        """
        if self.refused:
            raise Unavailable(self.refused)
        if self.chosen is None:
            self._settle(arguments)
        else:
            _launch(self._launcher(self.chosen), arguments(self.chosen))

    def _settle(self, arguments: Callable[[Config], tuple[Any, ...]]) -> None:
        exhausted, last, why = _out_of_resources(), None, ""

        def spills(config: Config) -> int | None:
            nonlocal last, why
            last = None
            try:
                amount = _launch(self._launcher(config), arguments(config))
            except exhausted:
                return None
            except RuntimeError as error:
                if not is_compiler_failure(str(error)):
                    raise
                why = f"; Triton's compiler fails: {error}"
                return None
            last = config
            return amount

        chosen = settle(self.configs, spills)
        if chosen is None:
            self.refused = f"no tile of {self.plan.program.name}{_dims(self.plan)} fits {self.target}{why}"
            raise Unavailable(self.refused)
        if last is not chosen:  # what ran last holds the results
            _launch(self._launcher(chosen), arguments(chosen))
        self.chosen = chosen

    def _launcher(self, config: Config) -> Callable[..., Any]:
        """Return ``launch`` of the generated module at a tile."""
        if config not in self.loaded:
            self.loaded[config] = _load(self.emit(self.plan, config, interpreted=interpreted())).launch
        return self.loaded[config]


class Kernels(Generic[Made]):
    """Kernels of this process by key, the most recently used ones; safe under threads."""

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, Made] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what belongs to ``key``; made outside the lock, so two threads may both make it and share one."""
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
        made = make()
        with self._lock:
            made = self._made.setdefault(key, made)
            while len(self._made) > MAX_KERNELS:
                self._made.popitem(last=False)
        return made


def plan_key(call: Call, target: str) -> tuple[Hashable, ...]:
    """Return what a plan depends on; what is kept under it has to keep the program, so that its id stays taken."""
    dims = (call.q.shape[3], call.v.shape[3])
    storage = tuple(call.storage.items())
    kind = (needs_wide(call), _closed(call), call.saves, call.order, _covered(call))
    return id(call.program), call.q.dtype, dims, storage, *kind, target


def _covered(call: Call) -> frozenset[Covered]:
    """Return the dimensions of captured tensors that rows made and changed on their way need no clamp for."""
    stages = call.program.stages
    if len(stages) == 1:
        return frozenset()
    at = stages.index(call.program.attend)
    shapes = {name: t.shape for name, t in call.tensors.items()}
    extents = dict.fromkeys(stages[at + 1 :], (*call.q.shape[:3], call.v.shape[3]))
    extents |= {stage: tuple(call.q.shape) for stage in stages[:at]}
    return frozenset().union(*(covered_by(s, shapes, found) for s, found in extents.items() if isinstance(s, Map)))


def _closed(call: Call) -> tuple[str, ...]:
    """Return the axes along which kernels may compute their run bounds."""
    return tuple(filter(call.closed, "kq"))


def plan_of(
    call: Call, *, backward: bool = False, columns: bool = False, captured_grads: tuple[str, ...] = ()
) -> KernelPlan:
    """Plan the kernel of a call; ``columns`` and ``captured_grads`` as in :func:`attnlang.codegen.plan.make_plan`."""
    loops = "kq" if backward else "q" if columns else "k"
    return make_plan(
        call.program,
        dtype=_DTYPES[call.q.dtype],
        head_dim=call.q.shape[3],
        value_dim=call.v.shape[3],
        storage=dict(call.storage),
        wide=needs_wide(call),
        backward=backward,
        saves=call.saves and not backward,
        columns=columns,
        captured_grads=captured_grads,
        closed=filter(call.closed, loops),
        order=(None, None) if backward or columns else call.order,
        covered=_covered(call),
    )


@functools.lru_cache(maxsize=MAX_KERNELS)
def _load(source: str) -> Any:
    """Import a generated source from the disk cache; Triton reads kernels from files."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:24]

    def build(path: Path) -> None:
        path.write_text(source, encoding="utf-8")

    path = Cache().get_or_build(f"triton-{digest}", "kernel.py", build, None)
    name = f"attnlang_generated.kernel_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _span(tensor: Tensor, dims: range) -> int:
    """Largest element offset inside the dimensions ``dims``."""
    return sum((tensor.shape[d] - 1) * abs(tensor.stride(d)) for d in dims if tensor.shape[d] > 1)


def needs_wide(call: Call) -> bool:
    """Whether 32-bit indices or offsets inside a tile could overflow."""
    if any(n >= NARROW_LIMIT for n in call.sizes.values()):
        return True
    if any(isinstance(v, int) and abs(v) >= NARROW_LIMIT for v in call.params.values()):
        return True
    rows = max(t.stride(2) * 256 + t.shape[3] * t.stride(3) for t in (call.q, call.k, call.v))
    return rows >= 2**31 or any(_span(t, range(t.dim())) >= 2**31 for t in call.tensors.values())


_tables: weakref.WeakKeyDictionary[RunMap, dict[torch.device, Table]] = weakref.WeakKeyDictionary()


def device_table(run_map: RunMap, device: torch.device) -> Table:
    """Return the launch table of a run map on ``device``; moved there once for each map."""
    tables = _tables.setdefault(run_map, {})
    if device not in tables:
        host = run_map.launch_table()
        parts = (host.full_ptr, host.full_runs, host.part_ptr, host.part_runs)
        # an empty list of runs is never read, but the kernel needs a pointer
        full, runs, part, other = (a.to(device) if a.numel() else torch.zeros(2, dtype=a.dtype, device=device)
                                   for a in parts)  # fmt: skip
        work = run_map.row_tiles()
        last_is_heavy = work[run_map.nq - 1] > work[0]
        order = (run_map.nq - 1, -1) if last_is_heavy else (0, 1)
        tables[device] = (full, runs, part, other, run_map.batch, run_map.heads, *order)
    return tables[device]


def table_of(call: Call, plan: KernelPlan, config: Config, loop: str) -> Table | tuple[()]:
    """Return the run table for the kernel of ``plan`` that loops over ``loop``, nothing where it needs none."""
    if plan.run_bounds(loop) is not None:
        return ()
    run_map = call.runs(config.tile)
    return device_table(run_map if loop == "k" else run_map.transpose(), call.q.device)


def _captured(tensor: Tensor) -> Tensor:
    """Return a captured tensor in a form every Triton version can read."""
    if tensor.numel() == 0:  # every load of an empty tensor is 0
        return tensor.new_zeros(()).expand([1] * tensor.dim())
    return tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor


def check(call: Call) -> str:
    """Return the target that serves a call of kernels of attention.

    Raises:
        Unavailable: no GPU that Triton serves, or a dtype or head dimension the kernels do not have.
    """
    _triton()
    if call.q.dtype not in _DTYPES:
        raise Unavailable(f"triton kernels are for float16, bfloat16 and float32, not {call.q.dtype}")
    if max(padded(call.q.shape[3]), padded(call.v.shape[3])) > MAX_HEAD_DIM:
        raise Unavailable(f"triton kernels need head dimensions up to {MAX_HEAD_DIM}")
    if len(call.program.stages) > 1 and call.order != (None, None):
        raise Unavailable("rows that are made or changed on their way are in order")
    return readable(call)


def readable(call: Call) -> str:
    """Return the target that serves any kernel of ``call``.

    Raises:
        Unavailable: no GPU that Triton serves, or a captured tensor of another dtype than kernels can read.
    """
    _triton()
    for name, dtype in call.storage.items():
        if dtype not in _CAPTURED:
            raise Unavailable(f"captured tensor {name} has dtype {dtype}, which triton kernels cannot read")
    return INTERPRETED if interpreted() else target_of(call.q.device)


def captured_arguments(call: Call, plan: KernelPlan) -> list[Any]:
    """Captured tensors, scalars and sizes in the order of the generated ``launch``."""
    return read_arguments(call, plan.all_tensors, plan.all_scalars, sizes_given(plan))


def read_arguments(
    call: Call, tensors: Iterable[TensorArg], scalars: Iterable[Param], sizes: Iterable[str]
) -> list[Any]:
    """What expressions read, as ``launch`` takes it."""
    values: list[Any] = [_captured(call.tensors[t.name]) for t in tensors]
    for param in scalars:
        value = call.params[param.name]
        values.append(int(value) if param.type is not INT and isinstance(value, bool) else value)
    values += [call.sizes[n] for n in sizes]
    return values


def _out_of_resources() -> type[Exception]:
    _triton()
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def _launch(launch: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Launch on the device of the tensors; return the words of local memory that a thread of the kernel needs."""
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel = launch(*arguments)
    else:
        kernel = launch(*arguments)
    return getattr(kernel, "n_spills", 0) or 0
