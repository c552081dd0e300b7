"""Kernels of rows stages, and of attention that takes them in, compile for chips that are not here."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import attnlang as al
from attnlang.codegen.offline import Compiler, compile_plan
from attnlang.codegen.offline_rows import compile_rows
from attnlang.codegen.plan import KernelPlan, make_plan
from attnlang.codegen.rows import RowsPlan, covered_by, rows_plan
from attnlang.codegen.triton_common import Config
from attnlang.codegen.triton_rows import emit
from attnlang.codegen.triton_stream import emit_forward
from attnlang.codegen.triton_tiles import shared_limit
from attnlang.ir import FLOAT, Map, Program, Size, TensorParam
from attnlang.passes.fusion import fusions, on_rows_at_hand

TEXT = """
pattern turned_and_normed(cos: float[N, F], sin: float[N, F], gate: float[H]):
    let half = D // 2
    rows turned[Lq, D] = Q[b, h, q, d] * cos[q, d] + sin[q, d] * (
        Q[b, h, q, d - half] if d >= half else -Q[b, h, q, d + half]
    )
    attend inner:
        queries = turned
        mask = k <= q
        HOOKS
    rows o[Lq, Dv] = inner[b, h, q, d] * rsqrt(mean_d(inner[b, h, q, d] ** 2) + 1e-6) * gate[h] + sigmoid(
        STATISTIC[b, h, q]
    )
    return o
"""
SOFTMAX = TEXT.replace("HOOKS", "score = s").replace("STATISTIC", "inner_lse")
SIGMOID = """normalize = elementwise(sigmoid(s))
        output inner = sum(w * V, over=k)
        output total = sum(w, over=k)"""
STREAM = TEXT.replace("HOOKS", SIGMOID).replace("STATISTIC", "total")
LENGTH, DIM = 4096, 128


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as made:
        yield made


def declared(program: Program) -> Program:
    """``program`` with the rows of q as a tensor that stages may read, as calls have it."""
    q = TensorParam("q", FLOAT, tuple(Size(f"q_{d}") for d in range(4)))
    return replace(program, tensors=(*program.tensors, q))


def shapes(dim: int) -> dict[str, tuple[int, ...]]:
    return {"q": (2, 8, LENGTH, dim), "cos": (LENGTH, dim), "sin": (LENGTH, dim), "gate": (8,)}


STORAGE = {"cos": "float32", "sin": "float32", "gate": "float32", "q": "bfloat16"}


def plan_of(text: str, dim: int = DIM) -> KernelPlan:
    program = declared(al.parse(text))
    attend = program.attend
    fusion = fusions(program)[attend.name]
    assert fusion.before is not None and fusion.after is not None
    softmax = text is SOFTMAX
    after = on_rows_at_hand(fusion.after, fusion.rows[0], (("inner_lse", "lse") if softmax else ("total", "total"),))
    alone = al.library.causal.attend if softmax else replace(attend, terms=al.library.causal.attend.terms)
    program = replace(program, stages=(fusion.before, alone, after), returns=())
    covered = frozenset().union(*(covered_by(m, shapes(dim), (2, 8, LENGTH, dim)) for m in (fusion.before, after)))
    return make_plan(
        program, dtype="bfloat16", head_dim=dim, value_dim=dim, storage=STORAGE, closed="k", covered=covered
    )


def rows_of(dim: int = DIM) -> RowsPlan:
    program = declared(al.parse(SOFTMAX))
    stage = next(s for s in program.stages if isinstance(s, Map))
    return rows_plan(program, stage, STORAGE, covered=covered_by(stage, shapes(dim), (2, 8, LENGTH, dim)))


@pytest.mark.parametrize(
    ("target", "unit", "kind"),
    [
        ("cuda:90", "wgmma", "softmax"),
        ("cuda:90", "wgmma", "described"),
        ("cuda:90", "wgmma", "stream"),
        ("hip:gfx942", "mfma", "softmax"),
        ("hip:gfx942", "mfma", "stream"),
    ],
)
def test_attention_that_takes_rows_in(kind: str, target: str, unit: str, compiler: Compiler) -> None:
    plan = plan_of(STREAM if kind == "stream" else SOFTMAX)
    assert plan.softmax == (kind != "stream")
    made = compile_plan(plan, target, descriptors=kind == "described", compiler=compiler)
    assert made.shared_bytes <= shared_limit(target)
    assert made.spill_bytes == 0
    assert made.mma.keys() == {unit}
    assert not made.serialised


@pytest.mark.parametrize(("target", "features"), [("cuda:90", 128), ("hip:gfx942", 80), ("cuda:80", 3000)])
def test_rows(target: str, features: int, compiler: Compiler) -> None:
    made = compile_rows(rows_of(features), features, target, compiler)
    assert made.spill_bytes == 0
    assert not made.mma


def test_sources(tmp_path: Path) -> None:
    """They are the same each time, and Python without unknown or unused names."""

    def sources() -> dict[str, str]:
        config = Config(64, 64, 4, 2)
        found = {
            f"{name}_{dim}": emit_forward(plan_of(text, dim), config)
            for name, text in (("softmax", SOFTMAX), ("stream", STREAM))
            for dim in (64, 80)
        }
        return found | {f"rows_{dim}": emit(rows_of(dim), config, features=dim) for dim in (64, 80)}

    found = sources()
    assert sources() == found
    for name, source in found.items():
        ast.parse(source)
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    ruff = shutil.which("ruff", path=os.path.dirname(sys.executable)) or shutil.which("ruff")
    if ruff is not None:
        command = [ruff, "check", "--isolated", "--select", "F,E9,E3,W", "--preview", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
