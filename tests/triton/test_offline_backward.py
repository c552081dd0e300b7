"""Backward kernels compiled for chips that are not here; and what their sources promise."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from backward.cases import LEARNABLE, bias

from attnlang.codegen.offline import Compiler
from attnlang.codegen.offline_backward import compile_backward
from attnlang.codegen.plan import KernelPlan, make_plan
from attnlang.codegen.scatter import Scatter, scatter_of
from attnlang.codegen.triton import Config
from attnlang.codegen.triton_backward import KEYS, QUERIES, emit_keys, emit_queries
from attnlang.codegen.triton_backward_arguments import own_name
from attnlang.codegen.triton_backward_tiles import candidates
from attnlang.codegen.triton_printer import RESERVED
from attnlang.codegen.triton_tiles import shared_limit
from attnlang.ir import FLOAT, INT, Load, Program, Size, TensorParam, simple
from attnlang.ir.build import clamp, const, h, k, op, q, s

CASES = {case.id: case.values[0] for case in LEARNABLE}
BUCKETS = (TensorParam("t", FLOAT, (Size("n"),)), TensorParam("bucket", INT, (Size("Lq"), Size("Lk"))))
CASES["bucketed"] = simple("bucketed", score=op("add", s, bias(Load("bucket", (q, k), INT))), tensors=BUCKETS)
CAUSAL = simple("causal", mask=op("le", k, q))
DISTANCE = op("sub", q, k)


def plan_of(program: Program, dim: int = 64, dtype: str = "bfloat16", value_dim: int | None = None) -> KernelPlan:
    return make_plan(
        program,
        dtype=dtype,
        head_dim=dim,
        value_dim=value_dim or dim,
        storage={t.name: "float32" if t.type is FLOAT else "int32" for t in program.tensors},
        backward=True,
        captured_grads=[t.name for t in program.tensors if t.type is FLOAT],
    )


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as made:
        yield made


@pytest.mark.parametrize("kernel", [QUERIES, KEYS])
@pytest.mark.parametrize(
    ("target", "dim"), [("cuda:80", 64), ("cuda:90", 64), ("cuda:90", 128), ("cuda:100", 128), ("hip:gfx942", 64)]
)
def test_causal_kernels_compile_without_spills(compiler, target, dim, kernel):
    made = compile_backward(plan_of(CAUSAL, dim), kernel, target, compiler)
    assert made.spill_bytes == 0
    assert made.shared_bytes <= shared_limit(target)
    assert made.mma


@pytest.mark.parametrize(
    ("target", "name", "kernel"),
    [
        ("cuda:90", "diagonal", QUERIES),
        ("cuda:90", "symmetric", KEYS),
        ("hip:gfx942", "diagonal", QUERIES),
        ("hip:gfx942", "absolute_2d", QUERIES),
        ("cuda:80", "bucketed", QUERIES),
        ("hip:gfx942", "bucketed", QUERIES),
        ("cuda:90", "coarse_factors", QUERIES),
        ("hip:gfx942", "coarse_factors", QUERIES),
    ],
)
def test_captured_gradients_compile(compiler, target, name, kernel):
    made = compile_backward(plan_of(CASES[name]), kernel, target, compiler)
    assert made.shared_bytes <= shared_limit(target)
    assert made.spill_bytes == 0


@pytest.mark.parametrize("name", sorted(CASES))
def test_names_of_the_kernels_are_reserved(name):
    plan = plan_of(CASES[name], 24, value_dim=40)
    for source in (emit_queries(plan, Config(32, 64, 4, 2)), emit_keys(plan, Config(32, 64, 4, 2))):
        tree = ast.parse(source)
        functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("attention_")]
        own = {a.arg for f in functions for a in f.args.args}
        own |= {
            n.id for f in functions for n in ast.walk(f) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        values = {v.name for v in (*plan.grid, *plan.row, *plan.partial.col, *plan.partial.pair)}
        sizes = {"B", "H", "Hkv", "Lq", "Lk", *plan.sizes}
        program = {n for n in own if n in values or n in sizes or n.startswith(("t_", "bucket_"))}
        assert [n for n in own - program if n not in RESERVED and not own_name(n)] == []


def test_sources_are_deterministic():
    def texts() -> tuple[str, str]:
        plan = plan_of(CASES["diagonal"])
        return emit_queries(plan, Config(64, 64, 4, 2)), emit_keys(plan, Config(64, 64, 4, 2))

    assert texts() == texts()


def test_full_tiles_have_no_mask():
    for source in (
        emit_queries(plan_of(CAUSAL), Config(64, 64, 4, 2)),
        emit_keys(plan_of(CAUSAL), Config(64, 64, 4, 2)),
    ):
        full = source[source.index("# FULL tiles") : source.index("# PARTIAL tiles")]
        assert "mask" not in full and "where(seen" not in full


def test_tiles_fit_every_head_dim():
    for target in ("cuda:80", "cuda:89", "cuda:90", "cuda:100", "hip:gfx942", "hip:gfx90a"):
        for dtype in ("bfloat16", "float32"):
            for dim in (16, 64, 100, 128, 256, 512):
                for kernel in (QUERIES, KEYS):
                    assert candidates(plan_of(CASES["diagonal"], dim, dtype), kernel, target)


@pytest.mark.parametrize(
    ("index", "want"),
    [
        ((h, q, k), Scatter.STORE),
        ((k, q), Scatter.STORE),
        ((DISTANCE,), Scatter.DIFFERENCE),
        ((h, op("add", DISTANCE, 7)), Scatter.DIFFERENCE),
        ((op("sub", op("add", q, 7), k),), Scatter.DIFFERENCE),
        ((clamp(op("abs", DISTANCE), 0, 9),), Scatter.DIFFERENCE),
        ((op("mul", DISTANCE, 2), op("mod", op("sub", k, q), 5)), Scatter.DIFFERENCE),
        ((op("where", op("gt", k, q), DISTANCE, 0),), Scatter.DIFFERENCE),
        ((op("where", op("gt", k, 3), DISTANCE, 0),), Scatter.ATOMIC),
        ((op("add", q, k),), Scatter.SUM),
        ((op("add", q, op("mul", k, 2)),), Scatter.ATOMIC),
        ((op("mul", q, k),), Scatter.ATOMIC),
        ((op("bitxor", q, k),), Scatter.ATOMIC),
        ((DISTANCE, q), Scatter.ROWS),
        ((h, q, op("floordiv", k, 8)), Scatter.ROWS),
        ((op("add", q, 1), k), Scatter.ATOMIC),
        ((k, op("mul", q, k), q), Scatter.STORE),
        ((Load("bucket", (q, k), INT),), Scatter.ATOMIC),
        ((Load("position", (DISTANCE,), INT),), Scatter.DIFFERENCE),
    ],
)
def test_scatter_kinds(index, want):
    assert scatter_of(bias(*index), s) is want
    rest = Scatter.FIXED if want in (Scatter.ATOMIC, Scatter.ROWS) else want
    assert scatter_of(bias(*index), const(1.0)) is rest
