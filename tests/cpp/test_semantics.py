"""What a kernel promises beyond arithmetic: empty rows, hidden pairs, large scores, threads, wide numbers."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given, settings

from attnlang.ir import BOOL, FLOAT, INT, Expr, Load, Op, ScalarParam, Size, TensorParam, postorder, simple
from attnlang.ir.build import h, k, op, param, q, s
from attnlang.ir.reference import dense_scores
from attnlang.runtime import cpp
from attnlang.runtime.cpp_common import schedule_of
from attnlang.runtime.errors import Unavailable
from tests.strategies import TENSORS, expressions

from .support import check, make_call

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("lightly_optimised")

CAUSAL = simple("causal", mask=op("ge", q, k))


def qkv(batch: int = 1, heads: int = 2, lq: int = 130, lk: int = 130, d: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, heads, lq, d), torch.randn(batch, heads, lk, d), torch.randn(batch, heads, lk, d)


def test_rows_without_keys() -> None:
    program = simple("late", mask=op("and", op("ge", q, 70), op("lt", k, 5)))
    for partial in (False, True):
        o, lse = check(make_call(program, *qkv(), partial=partial))
        assert not o[:, :, :70].any() and bool((lse[:, :, :70] == -math.inf).all())


def test_all_pairs_hidden() -> None:
    o, lse = check(make_call(simple("none", mask=op("lt", q, 0)), *qkv(), partial=True))
    assert not o.any() and bool((lse == -math.inf).all())


def test_hidden_pairs_do_not_leak() -> None:
    """log of a negative distance is NaN and 1 / 0 infinite, at pairs the mask excludes."""
    distance = op("to_float", op("sub", q, k))
    score = op("add", op("add", s, op("log", op("add", distance, 1.0))), op("div", 1.0, op("add", distance, 1.0)))
    check(make_call(simple("leaky", mask=op("ge", q, k), score=score), *qkv(), partial=True))


def test_visible_nan_is_reported_and_stays_in_its_row() -> None:
    queries, keys, values = qkv()
    queries[0, 1, 40, 3] = math.nan
    o, lse = check(make_call(CAUSAL, queries, keys, values))
    assert o[0, 1, 40].isnan().all() and lse[0, 1, 40].isnan() and o.isnan().sum() == o.shape[-1]


@pytest.mark.parametrize("gain", [30.0, -30.0, 1e4])
def test_large_scores(gain: float) -> None:
    """The running maximum moves at every chunk; exact inputs keep float32 products exact."""
    queries, keys, values = (x.mul(4).round().div(4) for x in qkv(lk=700))
    ramp = op("mul", op("to_float", k), gain)
    check(make_call(simple("ramp", score=op("add", s, ramp)), queries, keys, values, scale=1.0))
    check(make_call(simple("ramp", mask=op("ge", q, k), score=op("sub", s, ramp)), queries, keys, values, scale=1.0))


def test_very_small_weights_are_zero_and_fast() -> None:
    """Weights near 2^-126 must not become subnormal: some processors take a hundred cycles for each."""
    slope = op("mul", op("to_float", op("sub", k, q)), 0.02)
    check(make_call(simple("slope", score=op("add", s, slope)), *qkv(lk=9000, lq=40)))


@pytest.mark.parametrize("dtype, unit", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_half_types_lose_no_more_than_dense_pytorch(dtype: torch.dtype, unit: float) -> None:
    program = simple("cap", mask=op("ge", q, k), score=op("mul", op("tanh", op("div", s, 2.0)), 2.0))
    queries, keys, values = (x.to(dtype) for x in qkv(d=64))
    call = make_call(program, queries, keys, values)
    o, _ = cpp.forward(call)
    want = dense_scores(program, queries, keys, call.sizes, {}, {}, call.scale)
    want = torch.softmax(want, -1) @ values.double()
    raw = torch.tanh((queries @ keys.transpose(-1, -2)) * call.scale / 2) * 2
    raw = raw.masked_fill(~torch.ones(130, 130).tril().bool(), -math.inf)
    dense = torch.softmax(raw, -1) @ values
    assert (o - want).abs().max() <= 2 * (dense - want).abs().max()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_thread_counts_agree_bit_for_bit(threads: int) -> None:
    call = make_call(CAUSAL, *qkv(3, 2, 200, 200))
    one = cpp._kernels.get(call, isa := cpp.select_isa(200))(call, schedule_of(call, isa), 1)
    many = cpp._kernels.get(call, isa)(call, schedule_of(call, isa), threads)
    assert all(torch.equal(a, c) for a, c in zip(one.values(), many.values(), strict=True))


def test_calls_from_many_threads() -> None:
    call = make_call(simple("fresh", mask=op("ge", op("add", q, 3), k)), *qkv())
    want = check(call)[0]
    results: list[Tensor] = []
    workers = [threading.Thread(target=lambda: results.append(cpp.forward(call)[0])) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 6 and all(torch.equal(want, r) for r in results)


def test_wide_numbers() -> None:
    """An int parameter of 2^30 and more selects the kernel that computes in int64."""
    shifted = op(
        "sub", op("mul", op("add", q, param("offset", INT)), 4), op("mul", op("add", k, param("offset", INT)), 4)
    )
    table = Load("table", (op("add", op("sub", q, k), 50),), FLOAT)
    program = simple(
        "far",
        mask=op("and", op("ge", shifted, 0), op("ne", op("mod", op("add", k, param("offset", INT)), 7), h)),
        score=op("add", s, table),
        scalars=(ScalarParam("offset", INT),),
        tensors=(TensorParam("table", FLOAT, (Size("N"),)),),
    )
    for offset in (5, 2**30, 2**40 + 1):
        tensors = {"table": torch.randn(200)}
        check(make_call(program, *qkv(), params={"offset": offset}, tensors=tensors, sizes={"N": 200}))


def test_what_cannot_run_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="float64"):
        cpp.forward(make_call(CAUSAL, *(x.double() for x in qkv())))
    with pytest.raises(Unavailable, match="1 to 512"):
        cpp.forward(make_call(CAUSAL, *qkv(d=513)))


SMOOTH = """
    add sub mul neg abs min max sign bitand bitor bitxor bitnot shl shr and or xor not lt le gt ge eq ne where
    to_float to_bool floordiv mod tanh sigmoid sin cos atan erf exp2 log1p sqrt
"""
VALUES = {
    "doc": lambda: torch.randint(0, 4, (50,)),
    "flag": lambda: torch.rand(70) < 0.5,
    "table": lambda: torch.randn(3, 70),
    "pair": lambda: torch.randint(-3, 9, (50, 70), dtype=torch.int32),
}
DIMS = {"doc": ("Lq",), "flag": ("Lk",), "table": ("H", "Lk"), "pair": ("Lq", "Lk")}


def _reads_float(expr: Expr) -> bool:
    return any(a.type is FLOAT for n in postorder(expr) if isinstance(n, Op) and n.type is not FLOAT for a in n.args)


@settings(max_examples=25)
@given(expressions(BOOL, 4, ops=SMOOTH.split()), expressions(FLOAT, 3, score=True, ops=SMOOTH.split()))
def test_random_programs(mask: Expr, score: Expr) -> None:
    """Where float32 decides a comparison otherwise than float64, programs differ by definition: those are left out."""
    if _reads_float(mask) or _reads_float(score):
        return
    torch.manual_seed(1)
    tensors = tuple(TensorParam(n, t, tuple(map(Size, DIMS[n]))) for n, (t, _) in TENSORS.items())
    program = simple("random", mask=mask, score=score, tensors=tensors)
    values = {n: make() for n, make in VALUES.items()}
    call = make_call(program, *qkv(2, 3, 50, 70, 16), tensors=values)
    exact = dense_scores(program, call.q, call.k, call.sizes, {}, values, call.scale)
    seen = exact[exact.isfinite()].abs()
    largest = float(seen.max()) if len(seen) else 0.0
    if not torch.isfinite(exact.masked_fill(exact == -math.inf, 0)).all() or largest > 1e4:
        return
    check(call, *(2e-5 * max(1.0, largest / 16),) * 2)


def test_many_short_calls_on_many_threads() -> None:
    """Helpers that start after the work is done must neither be waited for nor touch what is gone."""
    calls = [
        make_call(CAUSAL, *(x.to(dtype) for x in qkv(2, 2, 100, 100))) for dtype in (torch.float32, torch.bfloat16)
    ]
    kernels = [(cpp._kernels.get(c, isa := cpp.select_isa(100)), schedule_of(c, isa)) for c in calls]
    want = [kernel(call, runs, 1) for call, (kernel, runs) in zip(calls, kernels, strict=True)]
    for i in range(300):
        kernel, runs = kernels[i % 2]
        got = kernel(calls[i % 2], runs, 8)
        assert all(torch.equal(a, c) for a, c in zip(got.values(), want[i % 2].values(), strict=True))
