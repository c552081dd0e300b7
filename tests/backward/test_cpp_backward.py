"""Gradients of the generated C++ backward kernel against autograd through the float64 reference."""

from __future__ import annotations

import functools

import pytest
import torch
from backward import cases
from backward.cases import CAUSAL, LEARNABLE, N, make_call

from attnlang.ir import FLOAT, INT, Load, Size, TensorParam, simple
from attnlang.ir.build import all_of, h, k, op, q, s
from attnlang.runtime import cpp, cpp_backward

pytestmark = pytest.mark.usefixtures("lightly_optimised")

both = functools.partial(cases.both, forward=cpp.forward, backward=cpp_backward.backward)
check = functools.partial(cases.check, forward=cpp.forward, backward=cpp_backward.backward)


@pytest.mark.parametrize("program, dims", LEARNABLE)
def test_learnable_captures(program, dims):
    tensors = {"t": torch.rand(dims) + 0.5} if program.tensors else {}
    check(make_call(program, (2, 4, 2, N, N, 16, 16), tensors))


@pytest.mark.parametrize("lq, lk", [(1, 1), (7, 129), (64, 64), (65, 131), (127, 1), (200, 333)])
def test_lengths(lq, lk):
    check(make_call(simple("window", mask=op("le", op("abs", op("sub", q, k)), 40)), (1, 2, 2, lq, lk, 16, 16), {}))


@pytest.mark.parametrize("d, dv", [(1, 8), (8, 8), (24, 40), (64, 64), (80, 16), (128, 128), (256, 64)])
def test_head_dims(d, dv):
    check(make_call(simple("causal", mask=CAUSAL), (1, 2, 1, 90, 90, d, dv), {}))


@pytest.mark.parametrize("batch, heads, kv_heads", [(1, 1, 1), (3, 6, 2), (2, 20, 20)])
def test_head_groups(batch, heads, kv_heads):
    check(make_call(simple("causal", mask=CAUSAL), (batch, heads, kv_heads, 130, 130, 16, 16), {}))


def test_strides_and_documents():
    doc = torch.randint(4, (180,)).sort().values
    same = op("eq", Load("doc", (q,), INT), Load("doc", (k,), INT))
    program = simple("doc", mask=all_of(same, CAUSAL), tensors=(TensorParam("doc", INT, (Size("Lq"),)),))
    check(make_call(program, (2, 2, 2, 180, 180, 32, 32), {"doc": doc}, strided=True))


def test_rows_without_keys_have_zero_gradients():
    call = make_call(simple("late", mask=op("ge", q, 70)), (1, 2, 2, 140, 90, 16, 16), {})
    ours, _ = both(call)
    assert (ours["q"][:, :, :70] == 0).all()
    check(call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_dense(dtype):
    call = make_call(simple("causal", mask=CAUSAL), (1, 2, 2, 200, 200, 64, 64), {}, dtype)
    ours, want = both(call)
    eps = torch.finfo(dtype).eps
    for name, reference in want.items():
        error = (ours[name] - reference).abs().max() / reference.abs().max()
        assert error < 2 * eps, (name, error)


def test_logarithms_of_hidden_scores_stay_away():
    call = cases.logarithm_call()
    ours, _ = both(call)
    assert (ours["q"][:, :, 3] == 0).all()
    check(call)


def test_indices_read_from_a_tensor():
    tensors = (TensorParam("t", FLOAT, (Size("n"),)), TensorParam("offset", INT, (Size("Lq"),)))
    score = op("add", s, Load("t", (Load("offset", (q,), INT),), FLOAT))
    program = simple("indirect", mask=CAUSAL, score=score, tensors=tensors)
    captured = {"t": torch.rand(20), "offset": torch.randint(20, (90,))}
    check(make_call(program, (1, 2, 2, 90, 90, 16, 16), captured))


def test_strided_and_broadcast_tables():
    program, _ = next(x.values for x in LEARNABLE if x.id == "head_specific")
    check(make_call(program, (1, 4, 2, 90, 90, 16, 16), {"t": torch.rand(90, 90, 4).permute(2, 1, 0)}))
    check(make_call(program, (1, 4, 2, 90, 90, 16, 16), {"t": torch.rand(1, 90, 1).expand(4, 90, 90)}))


BOTH_WAYS = simple(
    "everything",
    mask=op("le", op("abs", op("sub", q, k)), 100),
    score=op("add", op("add", op("mul", s, Load("gate", (h,), FLOAT)), Load("row", (q,), FLOAT)),
             op("add", op("add", Load("col", (h, k), FLOAT), Load("pair", (q, k), FLOAT)),
                Load("far", (op("mod", op("add", op("mul", q, 3), k), 11),), FLOAT))),
    tensors=tuple(TensorParam(n, FLOAT, tuple(map(Size, dims))) for n, dims in
                  (("gate", ("H",)), ("row", ("Lq",)), ("col", ("H", "Lk")), ("pair", ("Lq", "Lk")), ("far", ("n",)))),
)  # fmt: skip
"""A program with a captured gradient of every kind: once a head, a query, a key and a pair, and scattered."""


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 1), (6, 3)])
def test_gradients_are_the_same_bits_in_every_run_with_any_number_of_threads(heads, kv_heads):
    length = 400
    shapes = {"gate": (heads,), "row": (length,), "col": (heads, length), "pair": (length, length), "far": (11,)}
    tensors = {n: torch.rand(shape) for n, shape in shapes.items()}
    call = make_call(BOTH_WAYS, (1, heads, kv_heads, length, length, 16, 16), tensors)
    check(call)
    o, lse = cpp.forward(call)
    do, dlse = cases.cotangents(call)
    before = torch.get_num_threads()
    seen = []
    try:
        for run in range(20):
            torch.set_num_threads((1, 2, 5)[run % 3])
            got = cpp_backward.backward(call, o, lse, do, dlse, tuple(shapes))
            seen.append((got.q, got.k, got.v, *(got.captured[n] for n in shapes)))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(x, y) for x, y in zip(seen[0], other, strict=True))


def test_source_is_deterministic():
    call = make_call(simple("causal", mask=CAUSAL), (1, 2, 2, 64, 64, 16, 16), {})
    from attnlang.codegen.cpp_backward import emit_backward
    from attnlang.codegen.isa import ISAS
    from attnlang.codegen.plan import make_plan

    def text():
        plan = make_plan(call.program, dtype="float32", head_dim=16, value_dim=16, storage={}, backward=True)
        return emit_backward(plan, ISAS["avx512"])

    assert text() == text()
