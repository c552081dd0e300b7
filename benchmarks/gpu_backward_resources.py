"""What the generated backward kernels need on GPUs: registers, spills, shared memory, for every program of the library.

Gradients of all float captured tensors are asked for, where they can be given without atomic additions. Compiles for
chips that need not be here and writes ``benchmarks/results/gpu_backward_resources.json``. Nothing is executed, so
nothing here is a speed.

    python benchmarks/gpu_backward_resources.py [--targets cuda:90,hip:gfx942] [--dims 64,128] [--programs causal,alibi]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnlang import library
from attnlang.codegen.offline import Compiler, CompilerFailed
from attnlang.codegen.offline_backward import compile_backward
from attnlang.codegen.plan import KernelPlan, make_plan
from attnlang.codegen.triton_backward import KEYS, QUERIES
from attnlang.ir import BOOL, FLOAT, INT, Program
from attnlang.passes.specialise import specialise

TARGETS = ("cuda:80", "cuda:90", "hip:gfx942")
STORAGE = {FLOAT: "float32", INT: "int32", BOOL: "bool"}
RESULTS = Path(__file__).parent / "results" / "gpu_backward_resources.json"


def plan_of(program: Program, dim: int, dtype: str = "bfloat16") -> KernelPlan:
    """Plan a program with captured tensors of 4-byte elements; a static parameter without default becomes 2."""
    missing = {
        p.name: {INT: 2, FLOAT: 2.0, BOOL: True}[p.type] for p in program.scalars if p.static and p.default is None
    }
    return make_plan(
        specialise(program, missing),
        dtype=dtype,
        head_dim=dim,
        value_dim=dim,
        storage={t.name: STORAGE[t.type] for t in program.tensors},
        backward=True,
        captured_grads=[t.name for t in program.tensors if t.type is FLOAT],
    )


def rows(names: list[str], targets: list[str], dims: list[int], compiler: Compiler) -> Iterator[dict[str, Any]]:
    for dim in dims:
        for name in names:
            plan = plan_of(getattr(library, name), dim)
            for target in targets:
                for kernel in (QUERIES, KEYS):
                    try:
                        made = asdict(compile_backward(plan, kernel, target, compiler))
                    except CompilerFailed as error:
                        made = {"target": target, "error": str(error)}
                    yield {"program": name, "kernel": kernel, "head_dim": dim, **made}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--programs", default=",".join(library.names()))
    parser.add_argument("--python", default=sys.executable, help="interpreter whose Triton compiles")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    table = []
    with Compiler(options.python) as compiler:
        names, targets = options.programs.split(","), options.targets.split(",")
        for row in rows(names, targets, [int(d) for d in options.dims.split(",")], compiler):
            table.append(row)
            keys = ("program", "kernel", "target", "head_dim", "config", "registers", "spill_bytes", "error")
            print(*(row[k] for k in keys if k in row), flush=True)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(table, indent=1) + "\n")
    bad = [r for r in table if "error" in r or r["spill_bytes"]]
    print(f"{len(table)} kernels, {len(bad)} that spill or fail; table in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
