"""Gradients of the generated C++ backward kernel against autograd through the float64 reference."""

from __future__ import annotations

import pytest
import torch
from attnlang.runtime import cpp, cpp_backward
from attnlang.runtime.call import Call

from attnlang.ir import FLOAT, INT, Load, Program, Size, TensorParam, reference_attention, simple
from attnlang.ir.build import all_of, b, clamp, const, h, k, op, q, s
from attnlang.sparsity import analyse

CAUSAL = op("le", k, q)


def bias(*index):
    return Load("t", tuple(const(i) for i in index), FLOAT)


def tensor(*shape):
    return (TensorParam("t", FLOAT, tuple(Size(n) for n in shape)),)


def learnable(name, score, shape, dims, mask=CAUSAL):
    return pytest.param(simple(name, mask=mask, score=score, tensors=tensor(*shape)), dims, id=name)


N = 150
S = 2 * N
LEARNABLE = [
    learnable("relative_1d", op("add", s, bias(op("abs", op("sub", q, k)))), ("n",), (S,)),
    learnable("rows", op("add", s, bias(q)), ("n",), (N,)),
    learnable("columns", op("add", s, bias(k)), ("n",), (N,)),
    learnable("symmetric", op("add", op("add", s, bias(q)), bias(k)), ("n",), (N,)),
    learnable("product", op("add", s, op("mul", bias(q), bias(k))), ("n",), (N,)),
    learnable("head_scale", op("mul", s, bias(h)), ("H",), (4,)),
    learnable("head_gate", op("mul", s, op("sigmoid", bias(h))), ("H",), (4,)),
    learnable("scalar", op("add", s, bias()), (), ()),
    learnable("absolute_2d", op("add", s, bias(q, k)), ("m", "n"), (N, N)),
    learnable("flipped", op("add", s, bias(k, q)), ("m", "n"), (N, N)),
    learnable("batch_head", op("add", s, bias(b, h)), ("B", "H"), (2, 4)),
    learnable("batch_head_multiplicative", op("mul", s, bias(b, h, q, k)), ("B", "H", "m", "n"), (2, 4, N, N)),
    learnable("broadcast_batch", op("add", s, bias(b, h, q, k)), ("o", "H", "m", "n"), (1, 4, N, N)),
    learnable("local_window", op("add", s, bias(clamp(op("add", op("sub", q, k), 8), 0, 16))), ("n",), (17,)),
    learnable("diagonal", op("add", s, bias(h, op("add", op("sub", q, k), N))), ("H", "n"), (4, S)),
    learnable("sum", op("add", s, bias(op("add", q, k))), ("n",), (S,)),
    learnable("distinct", op("mul", op("add", s, bias(q, 0)), op("exp", bias(k, 1))), ("m", "n"), (N, 2)),
    learnable("capped", op("mul", op("tanh", op("div", op("add", s, bias(h)), 2.0)), 2.0), ("H",), (4,)),
    learnable("only_bias", op("add", op("mul", s, 0.0), bias(q)), ("n",), (N,)),
    learnable("reciprocal", op("div", s, op("sub", op("to_float", q), k)), (), (), mask=op("lt", k, q)),
]


def make_call(program: Program, shapes, tensors, dtype=torch.float32, strided=False):
    batch, heads, kv_heads, lq, lk, d, dv = shapes
    generator = torch.Generator().manual_seed(0)

    def rows(*shape):
        if strided:
            shape = (shape[0], shape[2], shape[1], shape[3])
            return torch.randn(shape, generator=generator).to(dtype).transpose(1, 2)
        return torch.randn(shape, generator=generator).to(dtype)

    operands = rows(batch, heads, lq, d), rows(batch, kv_heads, lk, d), rows(batch, kv_heads, lk, dv)
    sizes = {"B": batch, "H": heads, "Hkv": kv_heads, "Lq": lq, "Lk": lk}
    for param in program.tensors:
        sizes |= {dim.name: n for dim, n in zip(param.shape, tensors[param.name].shape, strict=True)}
    maps = {}

    def runs(tile):
        if tile not in maps:
            maps[tile] = analyse(program, sizes, {}, tensors, tile)
        return maps[tile]

    return Call(program, *operands, sizes, {}, tensors, d**-0.5, runs)


def both(call: Call):
    """Return (ours, reference) gradients by name, in float64."""
    o, lse = cpp.forward(call)
    do, dlse = torch.randn(o.shape).to(o.dtype), torch.randn(lse.shape)
    wanted = tuple(n for n, t in call.tensors.items() if t.is_floating_point())
    got = cpp_backward.backward(call, o, lse, do, dlse, wanted)
    ours = {"q": got.q, "k": got.k, "v": got.v, **got.captured}
    leaves = {n: getattr(call, n).double().requires_grad_() for n in "qkv"}
    captured = {n: t.double().requires_grad_() if n in wanted else t for n, t in call.tensors.items()}
    out, ref_lse = reference_attention(call.program, *leaves.values(), call.sizes, {}, captured, call.scale)
    seen = torch.isfinite(ref_lse)
    loss = (out * do.double()).sum() + (torch.where(seen, ref_lse, 0.0) * dlse).sum()
    inputs = [*leaves.values(), *(captured[n] for n in wanted)]
    want = torch.autograd.grad(loss, inputs, allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, want, strict=True)]
    return {n: t.double() for n, t in ours.items()}, dict(zip((*"qkv", *wanted), zeros, strict=True))


def check(call: Call, tolerance=1e-4):
    ours, want = both(call)
    for name, reference in want.items():
        assert torch.isfinite(ours[name]).all(), name
        scale = max(reference.abs().max().item(), 1e-6) if reference.numel() else 1.0
        error = (ours[name] - reference).abs().max().item() / scale if reference.numel() else 0.0
        assert error < tolerance, (name, error)


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
