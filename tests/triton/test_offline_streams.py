"""Kernels of normalisers, weights and outputs compile for chips that are not here, inside their shared memory."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace

import pytest
from address_cases import TEXT
from body_cases import program
from streaming_cases import CASES, TENSORS, masked

import attnlang as al
from attnlang.codegen.offline import Compiler, compile_plan
from attnlang.codegen.offline_backward import compile_backward, compile_columns
from attnlang.codegen.plan import KernelPlan, make_plan
from attnlang.codegen.triton_backward_arguments import KEYS, QUERIES, own_name
from attnlang.codegen.triton_columns import column_outputs, emit_columns
from attnlang.codegen.triton_common import Config
from attnlang.codegen.triton_printer import RESERVED
from attnlang.codegen.triton_pull import emit_backward
from attnlang.codegen.triton_tiles import shared_limit
from attnlang.ir import INT, Load, Program, Size, TensorParam
from attnlang.ir.build import k, op, q
from attnlang.passes.streaming import streaming
from attnlang.passes.terms import alone


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as made:
        yield made


def plan_of(name: str, **kind: object) -> KernelPlan:
    program = Program(name, (masked(CASES[name], op("le", k, q)),), tensors=TENSORS)
    storage = {t.name: "float32" for t in TENSORS}
    return make_plan(program, dtype="bfloat16", head_dim=64, value_dim=64, storage=storage, **kind)  # type: ignore[arg-type]


NAMES = ("sink", "sigmoid", "cog", "decay", "entropy", "cut", "peak")
TARGETS = ("cuda:90", "hip:gfx942")
EVERY = [(name, TARGETS[(i + j) % 2]) for j in range(2) for i, name in enumerate(NAMES)]
"""The first half is compiled with every change, `make test-long` compiles the rest."""


@pytest.mark.parametrize("name, target", [*EVERY[:7], *(pytest.param(*x, marks=pytest.mark.long) for x in EVERY[7:])])
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


@pytest.mark.parametrize("name", ["columns", "gate", "entropy_alone", "renormalised"])
def test_names_of_the_kernels_are_reserved(name: str) -> None:
    """Names of a kernel are set aside, or end in one underscore, which no name of a program does."""
    plan = plan_of(name, backward=True, captured_grads=[t.name for t in TENSORS])
    sources = [emit_backward(plan, Config(32, 64, 4, 2), kernel) for kernel in (QUERIES, KEYS)]
    plans = [plan]
    if name == "columns":
        plans.append(plan_of(name, columns=True))
        sources.append(emit_columns(plans[1], Config(32, 64, 4, 2), column_outputs(streaming(CASES[name]))))
    values = {n for p in plans for n in p.names.values()} | {"B", "H", "Hkv", "Lq", "Lk"}
    for source in sources:
        tree = ast.parse(source)
        (kernel,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("attention_"))
        own = {a.arg for a in kernel.args.args}
        own |= {n.id for n in ast.walk(kernel) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own -= values | {n for n in own if n.startswith(tuple(f"{t.name}_" for t in TENSORS))}
        assert [n for n in own if n not in RESERVED and not own_name(n) and not n.endswith("_")] == []


def body_plan(name: str, **kind: object) -> KernelPlan:
    found = program(name)
    stage = alone(found.attend)[0]
    storage = {t.name: "float32" for t in found.tensors}
    return make_plan(
        replace(found, stages=(stage,)), dtype="bfloat16", head_dim=64, value_dim=64, storage=storage, **kind
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_scores_that_are_no_dot_product_compile(compiler: Compiler, target: str) -> None:
    made = compile_plan(body_plan("additive"), target, descriptors=False, compiler=compiler)
    assert made.shared_bytes <= shared_limit(target)
    assert made.mma


@pytest.mark.parametrize(
    ("target", "name", "kernel"),
    [
        ("cuda:90", "additive", QUERIES),
        ("cuda:90", "l1", KEYS),
        ("hip:gfx942", "by_key", KEYS),
    ],
)
def test_gradients_of_bodies_compile(compiler: Compiler, name: str, kernel: str, target: str) -> None:
    plan = body_plan(name, backward=True, captured_grads=[t.name for t in program(name).tensors])
    made = compile_backward(plan, kernel, target, compiler)
    assert made.shared_bytes <= shared_limit(target)
    assert made.spill_bytes == 0
    assert made.mma


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_keys_at_addresses_of_their_own_compile(compiler: Compiler, target: str) -> None:
    program = al.parse(TEXT, "one_batch")
    plan = make_plan(program, dtype="bfloat16", head_dim=64, value_dim=64, storage={"page": "int32"})
    made = compile_plan(plan, target, descriptors=False, compiler=compiler)
    assert made.shared_bytes <= shared_limit(target)
    assert made.mma


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_rows_in_another_order_compile(compiler: Compiler, target: str) -> None:
    tables = tuple(TensorParam(f"token_of_{a}", INT, (Size(f"L{a}"),)) for a in "qk")
    program = replace(al.library.causal, tensors=tables)
    order = (Load("token_of_q", (q,), INT), Load("token_of_k", (k,), INT))
    storage = {t.name: "int32" for t in tables}
    plan = make_plan(program, dtype="bfloat16", head_dim=64, value_dim=64, storage=storage, order=order)
    made = compile_plan(plan, target, descriptors=False, compiler=compiler)
    assert made.shared_bytes <= shared_limit(target)
    assert made.spill_bytes == 0
    assert made.mma
