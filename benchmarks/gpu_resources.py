"""What the generated GPU kernels need: registers, spills, shared memory, for every program of the library.

Compiles for chips that need not be here and writes ``benchmarks/results/gpu_resources.json``. Nothing is executed, so
nothing here is a speed.

    python benchmarks/gpu_resources.py [--targets cuda:90,hip:gfx942] [--dims 64,128] [--programs causal,alibi]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnlang import library
from attnlang.codegen.offline import Compiler, CompilerFailed, compile_plan
from attnlang.codegen.plan import KernelPlan, make_plan
from attnlang.ir import BOOL, FLOAT, INT, Program
from attnlang.passes.specialise import specialise

TARGETS = {"cuda:80": False, "cuda:90": True, "cuda:100": True, "hip:gfx942": False}
"""Target to whether its kernels read through tensor descriptors."""
DIMS = (64, 128, 256)
STORAGE = {FLOAT: "float32", INT: "int32", BOOL: "bool"}
RESULTS = Path(__file__).parent / "results" / "gpu_resources.json"


def plan_of(program: Program, dim: int, dtype: str = "bfloat16") -> KernelPlan:
    """Plan a program with captured tensors of 4-byte elements; a static parameter without default becomes 2."""
    missing = {
        p.name: {INT: 2, FLOAT: 2.0, BOOL: True}[p.type] for p in program.scalars if p.static and p.default is None
    }
    storage = {t.name: STORAGE[t.type] for t in program.tensors}
    return make_plan(specialise(program, missing), dtype=dtype, head_dim=dim, value_dim=dim, storage=storage)


def rows(names: list[str], targets: list[str], dims: list[int], compiler: Compiler) -> Iterator[dict[str, Any]]:
    for name in names:
        for target in targets:
            for dim in dims:
                start = time.perf_counter()
                try:
                    plan = plan_of(getattr(library, name), dim)
                    made = asdict(compile_plan(plan, target, descriptors=TARGETS[target], compiler=compiler))
                except CompilerFailed as error:
                    made = {"target": target, "error": str(error)}
                yield {"program": name, "head_dim": dim, **made, "seconds": round(time.perf_counter() - start, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--dims", default=",".join(map(str, DIMS)))
    parser.add_argument("--programs", default=",".join(library.names()))
    parser.add_argument("--python", default=sys.executable, help="interpreter whose Triton compiles")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    table = []
    with Compiler(options.python) as compiler:
        names, targets = options.programs.split(","), options.targets.split(",")
        for row in rows(names, targets, [int(d) for d in options.dims.split(",")], compiler):
            table.append(row)
            shown = {
                k: row.get(k) for k in ("program", "target", "head_dim", "config", "registers", "spill_bytes", "error")
            }
            print(*(v for v in shown.values() if v is not None), flush=True)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(table, indent=1) + "\n")
    bad = [r for r in table if "error" in r or r["spill_bytes"]]
    print(f"{len(table)} kernels, {len(bad)} that spill or fail; table in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
