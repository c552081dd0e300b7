"""What the generated backward kernels need on GPUs: registers, spills, shared memory, for every program of the library.

Gradients of all float captured tensors are asked for, where they can be given without atomic additions. Compiles for
chips that need not be here and writes ``benchmarks/results/gpu_backward_resources.json``; kernels whose figures are
there already are not compiled again. Nothing is executed, so nothing here is a speed.

    python benchmarks/gpu_backward_resources.py [--targets cuda:90,hip:gfx942] [--dims 64,128] [--programs causal,alibi]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from resource_table import Case, Table, options, plan_of

from attnlang.codegen.offline import Compiler, Resources
from attnlang.codegen.offline_backward import compile_backward
from attnlang.codegen.triton_backward import KEYS, QUERIES

TARGETS = ("cuda:90", "cuda:80", "hip:gfx942")
DIMS = (64, 128)
RESULTS = Path(__file__).parent / "results" / "gpu_backward_resources.json"


def compile_case(name: str, kernel: str, target: str, dim: int, compiler: Compiler) -> Resources:
    return compile_backward(plan_of(name, dim, backward=True), kernel, target, compiler)


def cases(names: list[str], targets: list[str], dims: list[int]) -> Iterator[Case]:
    for target in targets:
        for dim in dims:
            for name in names:
                for kernel in (QUERIES, KEYS):
                    row = {"target": target, "head_dim": dim, "program": name, "kernel": kernel}
                    yield row, functools.partial(compile_case, name, kernel, target, dim)


def main() -> int:
    chosen = options(__doc__, TARGETS, DIMS, RESULTS)
    table = Table(chosen.output, ("target", "head_dim", "program", "kernel"))
    total = 2 * len(chosen.programs) * len(chosen.targets) * len(chosen.dims)
    table.fill(cases(chosen.programs, chosen.targets, chosen.dims), total, chosen.python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
