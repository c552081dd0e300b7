"""What the generated GPU kernels need: registers, spills, shared memory, for every program of the library.

Compiles for chips that need not be here and writes ``benchmarks/results/gpu_resources.json``; kernels whose figures are
there already are not compiled again. Nothing is executed, so nothing here is a speed.

    python benchmarks/gpu_resources.py [--targets cuda:90,hip:gfx942] [--dims 64,128] [--programs causal,alibi]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from resource_table import Case, Table, options, plan_of

from attnlang.codegen.offline import Compiler, Resources, compile_plan

TARGETS = {"cuda:90": True, "cuda:80": False, "cuda:100": True, "hip:gfx942": False}
"""Target to whether its kernels read through tensor descriptors."""
DIMS = (64, 128, 256)
RESULTS = Path(__file__).parent / "results" / "gpu_resources.json"


def compile_case(name: str, target: str, dim: int, compiler: Compiler) -> Resources:
    return compile_plan(plan_of(name, dim), target, descriptors=TARGETS[target], compiler=compiler)


def cases(names: list[str], targets: list[str], dims: list[int]) -> Iterator[Case]:
    for target in targets:
        for dim in dims:
            for name in names:
                row = {"target": target, "head_dim": dim, "program": name}
                yield row, functools.partial(compile_case, name, target, dim)


def main() -> int:
    chosen = options(__doc__, TARGETS, DIMS, RESULTS)
    table = Table(chosen.output, ("target", "head_dim", "program"))
    total = len(chosen.programs) * len(chosen.targets) * len(chosen.dims)
    table.fill(cases(chosen.programs, chosen.targets, chosen.dims), total, chosen.python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
