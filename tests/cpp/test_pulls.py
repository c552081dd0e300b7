"""Gradients of streaming stages by the C++ backward kernel: every one against float64 autograd of the reference."""

from __future__ import annotations

import math
import subprocess
from dataclasses import replace

import pytest
import torch

from attnlang.codegen.cpp_backward import emit_backward
from attnlang.codegen.isa import COMMON_FLAGS, ISAS
from attnlang.codegen.plan import make_plan
from attnlang.ir import Expr, Program
from attnlang.ir.build import TRUE, all_of, any_of, k, op, q, s
from attnlang.runtime import cpp_common
from attnlang.runtime.toolchain import find_compiler
from tests.passes.test_pullback import GIVEN
from tests.streaming_cases import TENSORS, masked

from .pulls import Launches, Problem, check, cotangents, gradients
from .test_streams import captured

Tensor = torch.Tensor
NAMES = sorted(set(GIVEN) - {"softmax"})
"""Plain softmax has a kernel of its own."""
CAUSAL = op("ge", q, k)
HOLES = all_of(
    op("ge", op("add", q, 20), k),
    op("ge", q, 5),
    any_of(op("ne", op("mod", q, 11), 3), op("gt", q, 70)),
    op("ne", k, 7),
)
"""Rows without keys, and tiles of every kind."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


def problem(
    name: str,
    mask: Expr = TRUE,
    heads: tuple[int, int] = (2, 2),
    lengths: tuple[int, int] = (200, 210),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
) -> Problem:
    torch.manual_seed(0)
    (hq, hk), (lq, lk), (d, dv) = heads, lengths, dims
    shapes = {"q": (hq, lq, d), "k": (hk, lk, d), "v": (hk, lk, dv)}
    leaves = {n: torch.randn(batch, *shape).to(dtype) for n, shape in shapes.items()}
    return Problem(Program(name, (masked(GIVEN[name], mask),), (), TENSORS), leaves | captured(hq, lq, lk))


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_reference(name: str, launches: Launches) -> None:
    check(problem(name, HOLES))
    assert launches.count == 1


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("name", ["columns", "entropy_alone", "decay", "dropout"])
def test_without_a_mask(name: str, launches: Launches) -> None:
    check(problem(name))
    assert launches.count == 1


@pytest.mark.parametrize("name", ["both_ways", "columns", "renormalised"])
def test_optimised_kernels(name: str, launches: Launches) -> None:
    check(problem(name, HOLES))
    assert launches.count == 1


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize(
    "name, mask, heads, lengths, dims",
    [
        ("sink", CAUSAL, (4, 2), (333, 333), (80, 24)),
        ("columns", HOLES, (4, 1), (127, 129), (8, 24)),
        ("columns", CAUSAL, (2, 2), (1, 70), (8, 8)),
        ("both_ways", HOLES, (2, 1), (65, 1), (24, 8)),
        ("entropy_alone", HOLES, (4, 2), (7, 200), (24, 40)),
        ("entropy_alone", TRUE, (2, 2), (3, 3), (3, 5)),
        ("renormalised", CAUSAL, (4, 2), (190, 64), (24, 80)),
        ("dropout", HOLES, (6, 3), (64, 130), (16, 8)),
    ],
)
def test_every_shape(
    name: str,
    mask: Expr,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    dims: tuple[int, int],
    launches: Launches,
) -> None:
    check(problem(name, mask, heads, lengths, dims, batch=2))
    assert launches.count == 1


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("name", ["sink", "columns", "sigmoid"])
def test_rows_without_keys_have_zero_gradients(name: str, launches: Launches) -> None:
    got = check(problem(name, HOLES))
    assert launches.count == 1
    assert (got["q"][:, :, :5] == 0).all() and (got["k"][:, :, 7] == 0).all() and (got["v"][:, :, 7] == 0).all()


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("name", ["dropout", "gate"])
def test_strides_and_captured_values_that_masks_hide(name: str, launches: Launches) -> None:
    made = problem(name, HOLES, heads=(4, 2))
    leaves = {n: t.transpose(1, 2).contiguous().transpose(1, 2) if n in "qkv" else t for n, t in made.leaves.items()}
    want = check(Problem(made.program, leaves))
    leaves["noise"][:5], leaves["gate"][:, 7] = torch.nan, torch.inf
    outs, given = Problem(made.program, leaves).ours()
    got = gradients(outs, given, made.wanted, cotangents(outs))
    assert launches.count == 2
    for n, grad in want.items():
        assert torch.equal(got[n], grad), n


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("name", ["gate", "cut", "columns"])
def test_rows_whose_scores_are_all_minus_infinity(name: str, launches: Launches) -> None:
    found = GIVEN[name]
    score = op("where", op("gt", op("add", q, op("mul", k, 3)), 200), s, -math.inf)
    branch = replace(found.branch, mask=CAUSAL, score=score)
    program = Program(name, (replace(found, branches=(branch,)),), (), TENSORS)
    check(Problem(program, problem(name).leaves))
    assert launches.count == 1


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sink", "sigmoid"])
def test_half_types_lose_no_more_than_dense_pytorch(name: str, dtype: torch.dtype, launches: Launches) -> None:
    made = problem(name, lengths=(130, 130), dims=(32, 32), dtype=dtype)
    outs, given = made.exact()
    grads = {"o": cotangents(outs)["o"].to(dtype).double()}
    want = gradients(outs, given, list("qkv"), grads)
    outs, given = made.ours()
    got = gradients(outs, given, list("qkv"), grads)
    assert launches.count == 1
    dense = {n: made.leaves[n].detach().requires_grad_() for n in "qkv"}
    scores = dense["q"] @ dense["k"].mT * 32**-0.5
    if name == "sink":
        more = made.leaves["sink"].to(dtype).view(1, 2, 1, 1).expand(1, 2, 130, 1)
        weights = torch.softmax(torch.cat([scores, more], -1), -1)[..., :-1]
    else:
        weights = torch.sigmoid(scores - 2)
    lost = gradients({"o": weights @ dense["v"]}, dense, list("qkv"), grads)
    for n, expected in want.items():
        assert (got[n] - expected).abs().max() <= 2 * (lost[n] - expected).abs().max(), n


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("name", ["columns", "dropout", "entropy_alone"])
def test_gradients_are_the_same_bits_in_every_run_with_any_number_of_threads(name: str, launches: Launches) -> None:
    made = problem(name, HOLES, heads=(4, 1), lengths=(300, 300))
    before, seen = torch.get_num_threads(), []
    outs, given = made.ours()
    grads = cotangents(outs)
    try:
        for run in range(9):
            torch.set_num_threads((1, 2, 5)[run % 3])
            seen.append(gradients(outs, given, made.wanted, grads, again=True))
    finally:
        torch.set_num_threads(before)
    assert launches.count == 9
    for other in seen[1:]:
        assert all(torch.equal(t, other[n]) for n, t in seen[0].items())


@pytest.mark.usefixtures("unoptimised")
def test_wide_lengths(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_common, "NARROW_LIMIT", 8)
    check(problem("dropout", HOLES))
    check(problem("columns", HOLES))
    assert launches.count == 2


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("wanted", ["o", "entropy", "lse"])
def test_gradients_of_some_outputs(wanted: str, launches: Launches) -> None:
    made = problem("both_ways", HOLES)
    outs, given = made.exact()
    grads = {wanted: cotangents(outs)[wanted]}
    want = gradients(outs, given, made.wanted, grads)
    outs, given = made.ours()
    got = gradients(outs, given, made.wanted, grads)
    assert launches.count == 1
    for n, expected in want.items():
        torch.testing.assert_close(got[n].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["both_ways", "dropout", "entropy_alone"])
def test_source_has_no_warnings_and_is_deterministic(name: str) -> None:
    def text() -> str:
        program = Program(name, (masked(GIVEN[name], HOLES),), (), TENSORS)
        types = {"dtype": "float16", "storage": {t.name: "float16" for t in TENSORS}}
        wanted = [t.name for t in TENSORS]
        plan = make_plan(program, head_dim=40, value_dim=40, backward=True, captured_grads=wanted, **types)
        return emit_backward(plan, ISAS["generic"])

    source = text()
    assert text() == source
    flags = [f for f in COMMON_FLAGS if f not in ("-O3", "-shared")]
    command = [*find_compiler().command, *flags, "-fsyntax-only", "-Wall", "-Wextra", "-Wno-unused-variable", "-Werror"]
    done = subprocess.run([*command, "-x", "c++", "-"], input=source, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr[:2000]
