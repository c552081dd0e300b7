"""The printed source: clean under warnings for every instruction set, deterministic, self-contained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnlang.codegen.cpp import emit
from attnlang.codegen.isa import AMX, COMMON_FLAGS, ISAS, few_rows
from attnlang.codegen.plan import KernelPlan, make_plan
from attnlang.ir import BOOL, FLOAT, INT, Load, Program, ScalarParam, Size, TensorParam, simple
from attnlang.ir.build import k, op, q, s
from attnlang.runtime.errors import Unavailable
from attnlang.runtime.toolchain import find_compiler, processor_features

from .support import check, make_call
from .test_operators import _choose, _probes

VARIANTS = {v.name: v for isa in ISAS.values() for v in (isa, few_rows(isa))} | {AMX.name: AMX}
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def everything() -> Program:
    """A program that uses every operator on every kind of type, at pair level."""
    at = (q, k)
    masks = [_choose(_probes(t, lambda u, i: Load(f"x{u}{i}", (at[i % 2],), u))) for t in (INT, BOOL)]
    score = _choose(_probes(FLOAT, lambda u, i: Load(f"x{u}{i}", (at[i % 2],), u)))
    tensors = tuple(TensorParam(f"x{t}{i}", t, (Size("Lq"),)) for t in (BOOL, INT, FLOAT) for i in range(3))
    mask = op("and", op("gt", masks[0], 0), masks[1])
    scalars = (ScalarParam("which", INT),)
    doc = "ends in a backslash \\"
    return simple("everything", mask=mask, score=op("add", s, score), tensors=tensors, scalars=scalars, doc=doc)


def plan_of(program: Program, dtype: str = "float32", wide: bool = False) -> KernelPlan:
    storage = {t.name: {BOOL: "bool", INT: "int8", FLOAT: "float16"}[t.type] for t in program.tensors}
    return make_plan(program, dtype=dtype, head_dim=40, value_dim=27, storage=storage, wide=wide)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_without_warnings(name: str, wide: bool, tmp_path: Path) -> None:
    if sys.platform != "linux" or not processor_features():
        assert not processor_features() or name == "generic"
        return
    isa = VARIANTS[name]
    for program in (simple("plain"), everything()):
        source = tmp_path / "kernel.cpp"
        source.write_text(emit(plan_of(program, "bfloat16", wide), isa))
        compiler = find_compiler().command
        flags = ["-O1" if f == "-O3" else f for f in COMMON_FLAGS]  # faster, with the same warnings
        command = [*compiler, *flags, *isa.flags, *WARNINGS, str(source), "-o", str(tmp_path / "kernel.so")]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0 and not run.stderr, run.stderr[:2000]


def test_variants_for_few_rows() -> None:
    for isa in ISAS.values():
        for rows in range(1, 200):
            variant = few_rows(isa, rows)
            assert variant.rows >= min(rows, isa.rows) and variant.rows <= isa.rows
            assert variant is isa or variant.rows < 2 * rows or variant.rows == isa.lanes
        assert len({few_rows(isa, rows) for rows in range(1, 200)}) <= 5


def runnable() -> list[str]:
    return [isa.name for isa in ISAS.values() if isa.needs <= processor_features()]


@pytest.mark.parametrize("lengths", [(130, 150), (3, 150), (20, 150)])
@pytest.mark.parametrize("name", runnable())
def test_every_instruction_set_agrees(name: str, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNLANG_ISA", name)
    program = simple("cap", mask=op("ge", op("add", q, 90), k), score=op("mul", op("tanh", op("div", s, 3.0)), 3.0))
    lq, lk = lengths
    operands = torch.randn(1, 2, lq, 40), torch.randn(1, 2, lk, 40), torch.randn(1, 2, lk, 27)
    check(make_call(program, *operands))
    check(make_call(simple("plain"), *(x.half() for x in operands)), 2e-3, 2e-3)


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNLANG_ISA", "vax")
    with pytest.raises(Unavailable, match="avx512, avx2, generic"):
        check(make_call(simple("plain"), *[torch.randn(1, 1, 4, 8)] * 3))


SCRIPT = """
from attnlang.codegen.cpp import emit
from attnlang.codegen.isa import ISAS
from attnlang.codegen.plan import make_plan
from attnlang.ir import simple
from attnlang.ir.build import k, op, q, s
program = simple("p", mask=op("ge", q, k), score=op("tanh", op("exp", op("floordiv", s, 3.0))))
plan = make_plan(program, dtype="float32", head_dim=64, value_dim=64, storage={})
print(emit(plan, ISAS["avx2"]))
"""


def test_equal_text_in_every_process() -> None:
    texts = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT], env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(texts) == 1


def test_only_what_is_used_is_printed() -> None:
    plain = emit(plan_of(simple("plain")), ISAS["avx512"])
    assert "namespace op" not in plain or "tanh" not in plain
    assert "pattern plain():" in plain and "-mavx512f" in plain


def test_names_of_the_user_cannot_clash() -> None:
    names = ("int", "a", "query", "first", "rows", "top", "count", "weights", "double")
    tensors = tuple(TensorParam(n, FLOAT, (Size("Lk"),)) for n in names)
    score = s
    for name in names:
        score = op("add", score, Load(name, (k,), FLOAT))
    values = {n: torch.randn(20) for n in names}
    check(make_call(simple("clash", score=score, tensors=tensors), *[torch.randn(1, 1, 20, 8)] * 3, tensors=values))


def test_a_missing_or_failing_compiler_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    call = make_call(simple("odd", mask=op("ge", op("add", q, 17), k)), *[torch.randn(1, 1, 4, 8)] * 3)
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    with pytest.raises(Unavailable, match="CXX"):
        check(call)
    script = tmp_path / "cxx"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exec echo broken 1.0\necho "x.cpp: error: no" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(Unavailable, match="error: no"):
        check(call)
