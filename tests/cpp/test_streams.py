"""Stages beyond plain softmax on the C++ backend: every output against the reference, at every kind of shape."""

from __future__ import annotations

import subprocess

import pytest
import torch

import attnlang as al
from attnlang.codegen.cpp import emit
from attnlang.codegen.isa import COMMON_FLAGS, ISAS
from attnlang.codegen.plan import make_plan
from attnlang.ir import Expr, Output, Program, reference
from attnlang.ir.build import TRUE, all_of, const, k, op, q, s
from attnlang.runtime import cpp
from attnlang.runtime.call import Call
from attnlang.runtime.errors import Unavailable
from attnlang.runtime.toolchain import find_compiler
from tests.streaming_cases import CASES, TENSORS, masked, stage

from .support import make_call

Tensor = torch.Tensor
MIXED = all_of(op("ge", op("add", q, 100), k), op("ge", q, 5), op("ne", k, 7))
"""Rows without keys, and tiles of every kind."""


def captured(h: int, lq: int, lk: int) -> dict[str, Tensor]:
    shapes = {"sink": (h,), "rate": (h,), "gate": (h, lk), "noise": (lq, lk)}
    made = {t.name: torch.randn(shapes[t.name]) for t in TENSORS}
    return {**made, "rate": made["rate"].abs() * 0.1}


def run(
    name: str,
    mask: Expr = TRUE,
    heads: tuple[int, int] = (2, 2),
    lengths: tuple[int, int] = (130, 150),
    dims: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-5,
    batch: int = 1,
) -> None:
    torch.manual_seed(0)
    program = Program(name, (masked(CASES[name], mask),), (), TENSORS)
    (hq, hk), (lq, lk), (d, dv) = heads, lengths, dims
    queries, keys, values = (
        torch.randn(batch, h, n, w).to(dtype) for h, n, w in ((hq, lq, d), (hk, lk, d), (hk, lk, dv))
    )
    tensors = captured(hq, lq, lk)
    call = make_call(program, queries, keys, values, tensors=tensors, scale=1.5 * d**-0.5)
    got = cpp.outputs(call)
    want = reference(program, queries, keys, values, call.sizes, {}, tensors, call.scale, torch.float64)
    for out in program.attend.outputs:
        assert got[out.name].shape == want[out.name].shape, out.name
        assert got[out.name].dtype is (dtype if out.rows else torch.int64 if out.monoid == "argmax" else torch.float32)
        size = max(1.0, float(want[out.name].double().nan_to_num(0, 0, 0).abs().max())) if lq and lk else 1.0
        torch.testing.assert_close(
            got[out.name].double(),
            want[out.name].double(),
            atol=tolerance * size,
            rtol=tolerance,
            msg=lambda text, n=out.name: f"{name}.{n}: {text}",
        )


NAMES = (
    *("sink", "sigmoid", "relu2_sum", "relu2_length", "decay", "cog", "gate", "distance", "temperature", "both_ways"),
    *("peak", "columns", "sigmoid_columns", "cut"),
)
"""The other cases differ in expressions alone; the test of the pass has them all."""


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_reference(name: str) -> None:
    run(name, MIXED, lengths=(200, 330))


@pytest.mark.parametrize(
    "name, heads, lengths, dims",
    [
        ("columns", (4, 2), (127, 1), (8, 24)),
        ("columns", (4, 2), (1, 127), (8, 24)),
        ("columns", (4, 2), (0, 127), (8, 24)),
        ("columns", (4, 2), (127, 0), (8, 24)),
        ("sink", (4, 1), (1000, 127), (80, 64)),
        ("entropy", (1, 1), (33, 1000), (64, 80)),
    ],
)
def test_every_shape(name: str, heads: tuple[int, int], lengths: tuple[int, int], dims: tuple[int, int]) -> None:
    run(name, TRUE, heads, lengths, dims, batch=2)


@pytest.mark.parametrize("name", ["both_ways", "peak", "sigmoid_columns"])
def test_source_has_no_warnings(name: str) -> None:
    program = Program(name, (masked(CASES[name], MIXED),), (), TENSORS)
    storage = {t.name: "float16" for t in TENSORS}
    source = emit(make_plan(program, dtype="float16", head_dim=40, value_dim=27, storage=storage), ISAS["generic"])
    flags = [f for f in COMMON_FLAGS if f not in ("-O3", "-shared")]
    command = [*find_compiler().command, *flags, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-x", "c++", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr[:2000]


@pytest.mark.parametrize("threads", [1, 3])
def test_sums_over_queries_do_not_depend_on_threads(threads: int) -> None:
    call = columns_call()
    before = torch.get_num_threads()
    want = cpp.outputs(call)["column"]
    torch.set_num_threads(threads)
    try:
        assert torch.equal(cpp.outputs(call)["column"], want)
    finally:
        torch.set_num_threads(before)


def columns_call() -> Call:
    torch.manual_seed(1)
    program = Program("columns", (masked(CASES["columns"], MIXED),), (), TENSORS)
    q_, k_, v_ = (torch.randn(1, 2, n, 32) for n in (200, 330, 330))
    return make_call(program, q_, k_, v_, tensors=captured(2, 200, 330))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sink", "sigmoid"])
def test_half_types_lose_no_more_than_dense_pytorch(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    program = Program(name, (CASES[name],), (), TENSORS)
    q_, k_, v_ = (torch.randn(1, 2, 130, 32).to(dtype) for _ in range(3))
    tensors = captured(2, 130, 130)
    call = make_call(program, q_, k_, v_, tensors=tensors)
    want = reference(program, q_, k_, v_, call.sizes, {}, tensors, call.scale, torch.float64)["o"]
    scores = (q_ @ k_.transpose(-1, -2)) * call.scale
    if name == "sink":
        more = tensors["sink"].to(dtype).view(1, 2, 1, 1).expand(1, 2, 130, 1)
        dense = torch.softmax(torch.cat([scores, more], -1), -1)[..., :-1] @ v_
    else:
        dense = torch.sigmoid(scores - 2) @ v_
    assert (cpp.outputs(call)["o"] - want).abs().max() <= 2 * (dense - want).abs().max()


@pytest.mark.parametrize("name", ["cog", "column_peak"])
def test_gradients_of_what_kernels_computed(name: str) -> None:
    torch.manual_seed(0)
    program = Program(name, (masked(CASES[name], MIXED),), (), TENSORS)
    leaves = {n: torch.randn(1, h, 140, 16) for n, h in (("q", 4), ("k", 2), ("v", 2))}
    leaves |= captured(4, 140, 140)
    weights: dict[str, Tensor] = {}

    def loss(made: dict[str, Tensor]) -> Tensor:
        found = {n: t for n, t in made.items() if t.is_floating_point()}
        for n, t in found.items():
            weights.setdefault(n, torch.randn(t.shape, dtype=torch.float64))
        parts = [(t.double().nan_to_num(neginf=0.0) * weights[n]).sum() for n, t in found.items()]
        return torch.stack(parts).sum()

    def gradients(dtype: torch.dtype) -> dict[str, Tensor]:
        given = {n: t.to(dtype).requires_grad_() for n, t in leaves.items()}
        operands, others = [given[n] for n in "qkv"], {t.name: given[t.name] for t in TENSORS}
        if dtype is torch.float64:
            sizes = {"B": 1, "H": 4, "Hkv": 2, "Lq": 140, "Lk": 140}
            made = reference(program, *operands, sizes, {}, others, 16**-0.5)
        else:
            attention = al.compile(program, backend="cpp")
            both = {"return_lse": True} if "lse" in program.results else {}
            made = attention(*operands, **others, return_aux=True, **both)
            made = made if isinstance(made, dict) else {**dict(zip(("o", "lse"), made[:-1], strict=False)), **made[-1]}
        grads = torch.autograd.grad(loss(made), list(given.values()), allow_unused=True)
        return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(given.items(), grads, strict=True)}

    want, got = gradients(torch.float64), gradients(torch.float32)
    for n, grad in want.items():
        torch.testing.assert_close(got[n].double(), grad, atol=1e-4, rtol=1e-4, msg=lambda text, n=n: f"{n}: {text}")


def test_stages_without_a_kernel_say_so_and_still_run() -> None:
    many = Output("mass", op("exp", s), key=(op("add", q, k),), extents=(const(5000),))
    program = Program("buckets", (stage(outputs=(many,)),))
    operands = [torch.randn(1, 1, 9, 8) for _ in range(3)]
    with pytest.raises(Unavailable, match=r"output mass .* backend='eager'"):
        al.compile(program, backend="cpp")(*operands)
    assert al.compile(program)(*operands)["mass"].shape == (1, 1, 9, 5000)
