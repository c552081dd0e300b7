"""The peak float32 rate of this machine, measured: independent fused multiply-adds in registers, on every thread."""

from __future__ import annotations

import ctypes
import tempfile
import threading
import time
from pathlib import Path

from attnlang.codegen.isa import best_isa
from attnlang.runtime.toolchain import compile_library, find_compiler, processor_features

__all__ = ["peak_gflops"]

CHAINS = 24  # enough independent additions to hide their latency on every processor of today

SOURCE = """
typedef float vfloat __attribute__((vector_size(4 * {lanes})));
extern "C" float multiply_add(long long count, float x, float y) {{
  vfloat sum[{chains}];
  for (int j = 0; j < {chains}; ++j) sum[j] = (float)j - vfloat{{}};
#pragma GCC unroll 1
  for (long long i = 0; i < count; ++i)
#pragma GCC unroll {chains}
    for (int j = 0; j < {chains}; ++j) sum[j] = sum[j] * x + y;
  float total = 0;
  for (int j = 0; j < {chains}; ++j) total += sum[j][0];
  return total;
}}
"""


def peak_gflops(threads: int, rounds: int = 7, count: int = 4_000_000) -> float:
    """Return the best rate of ``threads`` threads together, in GFLOP/s (a multiply-add is two)."""
    isa = best_isa(processor_features())
    chains = CHAINS if isa.lanes == 16 else CHAINS // 2
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.cpp", Path(folder) / "peak.so"
        source.write_text(SOURCE.format(lanes=isa.lanes, chains=chains))
        compile_library(find_compiler(), source, library, isa.flags)
        run = ctypes.CDLL(str(library)).multiply_add
    run.argtypes, run.restype = (ctypes.c_longlong, ctypes.c_float, ctypes.c_float), ctypes.c_float
    best = float("inf")
    for _ in range(rounds):
        workers = [threading.Thread(target=run, args=(count, 0.5, 1.0)) for _ in range(threads)]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - began)
    return threads * count * chains * isa.lanes * 2 / best / 1e9


if __name__ == "__main__":
    import torch

    for threads in sorted({1, torch.get_num_threads()}):
        print(f"{threads} thread(s): {peak_gflops(threads):.0f} GFLOP/s")
