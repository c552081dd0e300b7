"""The tables of GPU resources: what they read from a compiler, and that they compile only what they do not know."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from attnlang.codegen.offline import Compiler, CompilerFailed, Job, Resources, first_that_fits
from attnlang.codegen.triton import Config

ROOT = Path(__file__).resolve().parents[2]


def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_accumulation_registers_are_counted_once() -> None:
    path = list(sys.path)
    worker = module("codegen/offline_worker.py")
    sys.path[:] = path
    # the metadata of a kernel for gfx942 whose assembly says NumVgprs: 256, NumAgprs: 7, TotalNumVgprs: 263
    text = """
  - .agpr_count:     7
    .private_segment_fixed_size: {}
    .vgpr_count:     263
    .vgpr_spill_count: 3
"""
    assert worker._amd(text.format(20)) == (263, 12, 20, False)
    assert worker._amd(text.format(0)) == (263, 0, 0, False), "spilled to accumulation registers, not to memory"


SOURCE = '''
# a comment
@triton.jit
def kernel(x):
    """What it is for."""
    return x + {number}  # another comment


def launch(x):
    return kernel[(1,)](x)
'''


class Toolchain:
    """Stands for the compiling process: 4 bytes of local memory per warp above 4."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, int]] = []
        self.version = "3.9.0"

    def ask(self, job: dict[str, object]) -> dict[str, object]:
        if "path" not in job:
            return {"triton": self.version}
        self.compiled.append((str(job["target"]), int(str(job["warps"]))))
        if job["target"] == "cuda:1":
            return {"error": "no such chip"}
        stack = 4 * (int(str(job["warps"])) - 4)
        answer = {"registers": 99, "spill_bytes": stack, "stack_bytes": stack, "shared_bytes": 8, "mma": {"mma": 2}}
        return answer | {"serialised": False, "triton": self.version, "binary_bytes": 7}


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Toolchain:
    made = Toolchain()
    monkeypatch.setattr(Compiler, "_ask", lambda _, job: made.ask(job))
    return made


def fill(path: Path, *, source: str = SOURCE, number: int = 1, targets: tuple[str, ...] = ("cuda:90",)) -> str:
    """Fill the table at ``path`` as a new process would, with one program whose first tile spills; return the file."""
    tables = module("benchmarks/resource_table.py")
    configs = (Config(64, 64, 8, 2), Config(64, 64, 4, 2))

    def compile_on(target: str) -> Callable[[Compiler], Resources]:
        job = Job("causal", source.format(number=number), "kernel", configs[0], {"types": {"x": "i32"}})
        return lambda compiler: first_that_fits("causal", configs, lambda c: replace(job, config=c), target, compiler)

    cases = [({"target": t, "program": "causal"}, compile_on(t)) for t in targets]
    tables.Table(path, ("target", "program")).fill(cases, len(cases), sys.executable)
    return path.read_text()


def test_a_second_run_compiles_nothing_and_writes_the_same(tools, tmp_path):
    path = tmp_path / "table.json"
    first = fill(path)
    assert tools.compiled == [("cuda:90", 8), ("cuda:90", 4)]
    (row,) = json.loads(first)
    assert row["config"] == "m64n64w4s2" and row["spill_bytes"] == 0
    assert [(r["config"], r["spill_bytes"]) for r in row["rejected"]] == [("m64n64w8s2", 16)]
    assert fill(path) == first
    assert len(tools.compiled) == 2


def test_only_what_changed_is_compiled(tools, tmp_path):
    path = tmp_path / "table.json"
    fill(path)
    fill(path, source=SOURCE.replace("another comment", "words").replace("What it", "Whatever it"))
    assert len(tools.compiled) == 2, "comments do not reach the compiler"
    fill(path, number=2)
    assert len(tools.compiled) == 4
    tools.version = "4.0.0"
    fill(path, number=2)
    assert len(tools.compiled) == 6
    fill(path, number=2, targets=("cuda:90", "cuda:80"))
    assert tools.compiled[6:] == [("cuda:80", 8), ("cuda:80", 4)]


def test_rows_are_sorted_and_failures_are_tried_again(tools, tmp_path):
    path = tmp_path / "table.json"
    fill(path, targets=("cuda:90", "cuda:1"))
    rows = json.loads(fill(path, targets=("cuda:80",)))
    assert [r["target"] for r in rows] == ["cuda:1", "cuda:80", "cuda:90"]
    assert "no such chip" in rows[0]["error"]
    before = len(tools.compiled)
    fill(path, targets=("cuda:1",))
    assert len(tools.compiled) == before + 1


def test_the_tile_of_a_launch_is_the_one_without_local_memory(tools):
    configs = (Config(64, 64, 8, 2), Config(64, 64, 6, 2))
    job = Job("causal", SOURCE, "kernel", configs[0], {})
    found = first_that_fits("causal", configs, lambda c: replace(job, config=c), "cuda:80", Compiler())
    assert found.config == "m64n64w6s2" and found.stack_bytes == 8
    with pytest.raises(CompilerFailed, match="causal for cuda:1 at m64n64w8s2: no such chip"):
        first_that_fits("causal", configs, lambda c: replace(job, config=c), "cuda:1", Compiler())
