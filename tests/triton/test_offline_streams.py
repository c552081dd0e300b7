"""Kernels of normalisers, weights and outputs compile for chips that are not here, inside their shared memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from streaming_cases import CASES, TENSORS, masked

from attnlang.codegen.offline import Compiler, compile_plan
from attnlang.codegen.offline_backward import compile_backward, compile_columns
from attnlang.codegen.plan import KernelPlan, make_plan
from attnlang.codegen.triton_backward_arguments import KEYS, QUERIES
from attnlang.codegen.triton_tiles import shared_limit
from attnlang.ir import Program
from attnlang.ir.build import k, op, q


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as made:
        yield made


def plan_of(name: str, **kind: object) -> KernelPlan:
    program = Program(name, (masked(CASES[name], op("le", k, q)),), tensors=TENSORS)
    storage = {t.name: "float32" for t in TENSORS}
    return make_plan(program, dtype="bfloat16", head_dim=64, value_dim=64, storage=storage, **kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
@pytest.mark.parametrize("name", ["sink", "sigmoid", "cog", "decay", "entropy", "cut", "peak"])
def test_compiles(compiler: Compiler, name: str, target: str) -> None:
    made = compile_plan(plan_of(name), target, descriptors=False, compiler=compiler)
    assert made.shared_bytes <= shared_limit(target)
    assert made.mma


@pytest.mark.parametrize(
    ("target", "name", "kernel"),
    [
        ("cuda:90", "sigmoid", KEYS),
        ("cuda:90", "cut", QUERIES),
        ("hip:gfx942", "columns", KEYS),
        ("hip:gfx942", "gate", QUERIES),
    ],
)
def test_gradients_compile(compiler: Compiler, name: str, kernel: str, target: str) -> None:
    plan = plan_of(name, backward=True, captured_grads=[t.name for t in TENSORS])
    made = compile_backward(plan, kernel, target, compiler)
    assert made.shared_bytes <= shared_limit(target)
    assert made.spill_bytes == 0
    assert made.mma


@pytest.mark.parametrize(("target", "name"), [("cuda:90", "columns"), ("hip:gfx942", "column_peak")])
def test_sums_over_queries_compile(compiler: Compiler, name: str, target: str) -> None:
    made = compile_columns(plan_of(name, columns=True), target, compiler)
    assert made.shared_bytes <= shared_limit(target)
    assert made.spill_bytes == 0
    assert made.mma
