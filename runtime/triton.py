"""Run a call with a generated Triton kernel: choose a tile, write the source to the cache, import it, launch it.

With ``TRITON_INTERPRET=1`` the kernel runs on CPU tensors in Triton's interpreter; tests use this.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attnlang.codegen.plan import KernelPlan, make_plan
from attnlang.codegen.triton import Config, emit, padded
from attnlang.codegen.triton_tiles import INTERPRETED, candidates, settle
from attnlang.ir import INT, Program, UsageError
from attnlang.passes.widths import NARROW_LIMIT
from attnlang.sparsity import RunMap

from .cache import Cache
from .call import Call
from .errors import Unavailable

__all__ = ["forward", "target_of"]

MAX_HEAD_DIM = 512
MAX_KERNELS = 512
"""Loaded kernels kept by this process; the least recently used ones go first."""

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_CAPTURED = {
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
}  # fmt: skip

Tensor = torch.Tensor
Table = tuple[Tensor, Tensor, Tensor, Tensor, int, int, int, int]


@functools.cache
def _triton() -> Any:
    try:
        import triton
    except ImportError as error:
        raise Unavailable(f"triton cannot be imported ({error})") from error
    return triton


def _interpreted() -> bool:
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


@dataclass
class _Kernel:
    """A plan with its candidate tiles, and the one a launch settled on."""

    program: Program
    plan: KernelPlan
    configs: tuple[Config, ...]
    chosen: Config | None = None
    loaded: dict[Config, Callable[..., Any]] = field(default_factory=dict)

    def launcher(self, config: Config) -> Callable[..., Any]:
        """Return ``launch`` of the generated module at a tile."""
        if config not in self.loaded:
            self.loaded[config] = _load(emit(self.plan, config, interpreted=_interpreted())).launch
        return self.loaded[config]


_kernels: OrderedDict[Any, _Kernel] = OrderedDict()
_lock = threading.Lock()


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


def _needs_wide(call: Call) -> bool:
    """Whether 32-bit indices or offsets inside a tile could overflow."""
    if any(n >= NARROW_LIMIT for n in call.sizes.values()):
        return True
    if any(isinstance(v, int) and abs(v) >= NARROW_LIMIT for v in call.params.values()):
        return True
    rows = max(t.stride(2) * 256 + t.shape[3] * t.stride(3) for t in (call.q, call.k, call.v))
    return rows >= 2**31 or any(_span(t, range(t.dim())) >= 2**31 for t in call.tensors.values())


def _describable(tensor: Tensor) -> bool:
    """Whether the copy engine can describe [B, H, L, D]: columns adjacent, everything else at multiples of 16 bytes."""
    size = tensor.element_size()
    steps = [s for n, s in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if n > 1]
    aligned = all(s > 0 and s * size % 16 == 0 for s in steps) and tensor.data_ptr() % 16 == 0
    return aligned and tensor.stride(3) == 1 and 0 not in tensor.shape


def _use_descriptors(call: Call, o: Tensor, target: str) -> bool:
    chip = target.partition(":")
    capable = chip[0] == INTERPRETED or (chip[0] == "cuda" and int(chip[2]) >= 90 and call.q.element_size() == 2)
    return capable and all(map(_describable, (call.q, call.k, call.v, o)))


def closed_loops(call: Call, loops: str) -> tuple[str, ...]:
    """Return the axes among ``loops`` along which kernels may compute their run bounds."""
    return tuple(filter(call.closed, loops))


def table_of(call: Call, plan: KernelPlan, config: Config, loop: str) -> Table | tuple[()]:
    """Return the run table for the kernel of ``plan`` that loops over ``loop``, nothing where it needs none."""
    if plan.run_bounds(loop) is not None:
        return ()
    run_map = call.runs(config.tile)
    return _device_table(run_map if loop == "k" else run_map.transpose(), call.q.device)


def _kernel(call: Call, target: str, descriptors: bool) -> _Kernel:
    storage = tuple(call.storage.items())
    dims = (call.q.shape[3], call.v.shape[3])
    closed = closed_loops(call, "k")
    key = (id(call.program), call.q.dtype, dims, storage, _needs_wide(call), target, descriptors, closed)
    with _lock:
        found = _kernels.get(key)
        if found is not None:
            _kernels.move_to_end(key)
            return found
    plan = make_plan(
        call.program,
        dtype=_DTYPES[call.q.dtype],
        head_dim=dims[0],
        value_dim=dims[1],
        storage=dict(storage),
        wide=key[4],
        closed=closed,
    )
    configs = candidates(plan, target, descriptors=descriptors)
    kernel = _Kernel(call.program, plan, configs)  # holds the program, so its id stays taken
    with _lock:
        kernel = _kernels.setdefault(key, kernel)
        while len(_kernels) > MAX_KERNELS:
            _kernels.popitem(last=False)
    return kernel


_tables: weakref.WeakKeyDictionary[RunMap, dict[torch.device, Table]] = weakref.WeakKeyDictionary()


def _device_table(run_map: RunMap, device: torch.device) -> Table:
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


def _output(q: Tensor, value_dim: int) -> Tensor:
    """Return an empty output whose dimensions lie in memory in the order of those of q."""
    shape = (*q.shape[:3], value_dim)
    if q.is_contiguous() or 0 in q.stride() or q.stride(3) != 1:
        return q.new_empty(shape)
    strides = q.stride()
    order = sorted(range(4), key=lambda d: (-strides[d], d))
    return torch.empty_permuted(shape, order, dtype=q.dtype, device=q.device)


def _captured(tensor: Tensor) -> Tensor:
    """Return a captured tensor in a form every Triton version can read."""
    if tensor.numel() == 0:  # every load of an empty tensor is 0
        return tensor.new_zeros(()).expand([1] * tensor.dim())
    return tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor


def _check(call: Call) -> str:
    _triton()
    if call.q.dtype not in _DTYPES:
        raise Unavailable(f"triton kernels are for float16, bfloat16 and float32, not {call.q.dtype}")
    if max(padded(call.q.shape[3]), padded(call.v.shape[3])) > MAX_HEAD_DIM:
        raise Unavailable(f"triton kernels need head dimensions up to {MAX_HEAD_DIM}")
    for name, dtype in call.storage.items():
        if dtype not in _CAPTURED:
            raise Unavailable(f"captured tensor {name} has dtype {dtype}, which triton kernels cannot read")
    return INTERPRETED if _interpreted() else target_of(call.q.device)


def _arguments(call: Call, plan: KernelPlan) -> list[Any]:
    """Captured tensors, scalars and sizes in the order of the generated ``launch``."""
    values: list[Any] = [_captured(call.tensors[t.name]) for t in plan.tensors]
    for param in plan.scalars:
        value = call.params[param.name]
        values.append(int(value) if param.type is not INT and isinstance(value, bool) else value)
    values += [call.sizes[n] for n in plan.sizes if n not in ("B", "H", "Hkv", "Lq", "Lk")]
    return values


def _positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernel takes row maxima before it scales, so the sign of the scale moves into q."""
    if scale > 0:
        return q, scale
    return (torch.neg(q), -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return o [B, H, Lq, Dv] in the dtype of q, and the natural-log lse [B, H, Lq] in float32.

    Raises:
        Unavailable: no GPU that Triton serves, or a dtype or head dimension the kernels do not have.
    """
    target = _check(call)
    o = _output(call.q, call.v.shape[3])
    lse = torch.empty(call.q.shape[:3], dtype=torch.float32, device=call.q.device)
    if lse.numel() == 0:
        return o, lse
    if call.k.shape[2] == 0:
        return o.zero_(), lse.fill_(-torch.inf)
    kernel = _kernel(call, target, _use_descriptors(call, o, target))
    q, scale = _positive_scale(call.q, call.scale)
    captured = _arguments(call, kernel.plan)

    def launch(config: Config) -> int:
        table = table_of(call, kernel.plan, config, "k")
        return _launch(kernel.launcher(config), (q, call.k, call.v, o, lse, scale, *captured, *table))

    if kernel.chosen is None:
        kernel.chosen = _settle(kernel, launch, target)
    else:
        launch(kernel.chosen)
    return o, lse


def _settle(kernel: _Kernel, launch: Callable[[Config], int], target: str) -> Config:
    """Launch tiles in order of preference until one neither runs out of resources nor spills registers."""
    exhausted, last = _out_of_resources(), None

    def spills(config: Config) -> int | None:
        nonlocal last
        last = None
        try:
            amount = launch(config)
        except exhausted:
            return None
        last = config
        return amount

    chosen = settle(kernel.configs, spills)
    if chosen is None:
        raise UsageError(f"no tile of {kernel.program.name} fits {target}; smaller head dimensions would")
    if last is not chosen:
        launch(chosen)
    return chosen


def _out_of_resources() -> type[Exception]:
    _triton()
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def _launch(launch: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Launch on the device of the tensors; return how many registers the kernel spills."""
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel = launch(*arguments)
    else:
        kernel = launch(*arguments)
    return getattr(kernel, "n_spills", 0) or 0
