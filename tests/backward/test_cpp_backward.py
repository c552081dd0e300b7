"""Gradients of the generated C++ backward kernel against autograd through the float64 reference."""

from __future__ import annotations

import functools

import pytest
import torch
from backward import cases
from backward.cases import CAUSAL, LEARNABLE, N, make_call

from attnlang.ir import INT, Load, Size, TensorParam, simple
from attnlang.ir.build import all_of, k, op, q
from attnlang.runtime import cpp, cpp_backward

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


@pytest.mark.parametrize("program, dims", LEARNABLE[:1] + LEARNABLE[6:7] + LEARNABLE[14:15])
def test_gradients_are_the_same_bits_for_any_number_of_threads(program, dims):
    call = make_call(program, (1, 4, 1, N, N, 16, 16), {"t": torch.rand(dims)})
    o, lse = cpp.forward(call)
    do = torch.randn_like(o)
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            got = cpp_backward.backward(call, o, lse, do, None, ("t",))
            seen.append((got.q, got.k, got.v, got.captured["t"]))
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
