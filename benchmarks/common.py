"""What the benchmarks share: describing the machine, comparing with PyTorch in one run, and keeping results.

Run a benchmark as a script from anywhere: ``python benchmarks/NAME.py``. Results go to
``benchmarks/results/NAME.json``; ``python benchmarks/report.py`` writes the tables of README and docs from them, so no
number there is typed by hand.
"""

from __future__ import annotations

import functools
import json
import math
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import attnlang as al
from attnlang.measure import interleaved
from attnlang.peers import Bindings, CannotExpress, flex, sdpa

__all__ = ["RESULTS", "Case", "Row", "compare", "machine", "print_rows", "save"]

RESULTS = Path(__file__).resolve().parent / "results"

OURS = "attnlang"
FLEX = "flex_attention"
SDPA = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Case:
    """One program at one shape. ``values`` are the keyword arguments of the call; ``pairs`` how many (b, h, q, k) the
    mask keeps (None: counted from the mask, which is dense)."""

    name: str
    program: Any
    batch: int = 1
    heads: int = 8
    length: int = 4096
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    values: Mapping[str, Any] | None = None
    pairs: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of a table. ``ratio``: how many times attnlang is as fast; None where a peer cannot run the case."""

    case: str
    dtype: str
    implementation: str
    ms: float | None
    gflops: float | None
    ratio: float | None
    error: float | None
    note: str = ""


def machine(device: torch.device | None = None) -> dict[str, str]:
    """Describe what is measured on: processor or GPU, threads, versions; nothing that identifies a person or a host."""
    out = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.system()}
    if device is not None and device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        out["gpu"] = properties.name
        out["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        out["triton"] = triton.__version__
        out["driver"] = str(torch.version.cuda or torch.version.hip)
    else:
        out["processor"] = _processor()
        out["threads"] = str(torch.get_num_threads())
    return out


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _pairs(attention: Any, bound: Bindings, device: torch.device) -> int:
    from attnlang.ir import dense_mask

    total = 0
    for b in range(bound.sizes["B"]):  # one batch element at a time, to bound the memory
        tensors = {n: t[b : b + 1] if _by_batch(attention.program, n) else t for n, t in bound.tensors.items()}
        sizes = {**bound.sizes, "B": 1}
        total += int(dense_mask(attention.program, sizes, bound.params, tensors, device).sum())
    return total


def _by_batch(program: Any, tensor: str) -> bool:
    from attnlang.ir import Size

    shape = program.tensor(tensor).shape
    return bool(shape) and shape[0] is Size("B")


def compare(case: Case, device: torch.device, *, rounds: int = 9, seconds: float = 30.0) -> list[Row]:
    """Check, then time a case with attnlang, compiled flex_attention and SDPA, interleaved in this process.

    A peer that cannot express or run the case gets a row that says so. ``error`` is the greatest difference of a peer's
    output from ours; that ours is right is what the tests show.
    """
    random = torch.Generator().manual_seed(0)
    shape = (case.batch, case.heads, case.length, case.head_dim)
    q, k, v = (torch.randn(shape, generator=random).to(device, case.dtype) for _ in range(3))
    attention = al.compile(case.program)
    values = dict(case.values or {})
    bound = attention._binder.bind(q, k, v, values, attention._defaults)
    bindings = Bindings(bound.sizes, bound.params, bound.tensors)
    makers: dict[str, Callable[[], Callable[..., Any]]] = {
        OURS: lambda: lambda q, k, v: attention(q, k, v, **values),
        FLEX: lambda: flex(attention.program, bindings, bound.scale, device),
        SDPA: lambda: sdpa(attention.program, bindings, bound.scale, case.dtype, device),
    }
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    mine = None
    for name, make in makers.items():
        try:
            run = make()
            out = run(q, k, v)
        except CannotExpress as error:
            notes[name] = f"cannot express it: {error}"
            continue
        except Exception as error:
            if name == OURS:
                raise
            notes[name] = f"does not run: {(str(error).strip().splitlines() or [type(error).__name__])[0][:100]}"
            continue
        mine = out if mine is None else mine
        errors[name] = float((out.double() - mine.double()).abs().max()) if out.numel() else 0.0
        calls[name] = functools.partial(run, q, k, v)
    times = interleaved(calls, device, rounds=rounds, seconds=seconds)
    pairs = _pairs(attention, bindings, device) if case.pairs is None else case.pairs
    flops = 4.0 * pairs * case.head_dim
    dtype = str(case.dtype).removeprefix("torch.")
    rows = []
    for name in makers:
        if name not in times:
            rows.append(Row(case.name, dtype, name, None, None, None, None, notes[name]))
            continue
        ms = times[name].median
        ratio = ms / times[OURS].median
        rows.append(Row(case.name, dtype, name, ms, flops / ms / 1e6, ratio, errors[name]))
    return rows


def print_rows(rows: Iterable[Row]) -> None:
    """Print rows as they come."""
    for row in rows:
        if row.ms is None or row.gflops is None or row.ratio is None or row.error is None:
            print(f"{row.case:<16} {row.dtype:<9} {row.implementation:<29} {row.note}", flush=True)
            continue
        print(
            f"{row.case:<16} {row.dtype:<9} {row.implementation:<29} {row.ms:9.2f} ms {row.gflops:8.0f} GFLOP/s "
            f"x{row.ratio:5.2f}  differs {row.error:.1e}",
            flush=True,
        )


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def save(name: str, rows: Iterable[Any], device: torch.device | None = None, **more: Any) -> Path:
    """Write ``results/NAME.json`` with the machine, the command and the rows (dataclasses or dicts)."""
    RESULTS.mkdir(exist_ok=True)
    content = {
        "benchmark": name,
        "command": " ".join(("python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:])),
        "machine": machine(device),
        **more,
        "rows": [row if isinstance(row, dict) else asdict(row) for row in rows],
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path
