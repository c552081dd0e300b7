"""Programs with learnable captures, calls of them, and their gradients by autograd through the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnlang.ir import BOOL, FLOAT, Load, Program, Size, TensorParam, reference_attention, simple
from attnlang.ir.build import b, clamp, const, h, k, op, q, s
from attnlang.runtime.call import Call
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
    learnable("head_specific", op("add", s, bias(h, q, k)), ("H", "m", "n"), (4, N, N)),
    learnable("transposed", op("add", s, bias(h, k, q)), ("H", "m", "n"), (4, N, N)),
    learnable("global_tokens", op("where", op("lt", k, 32), op("add", s, bias(clamp(k, 0, 31))), s), ("n",), (32,)),
    learnable("one_of_several", op("add", s, bias(b, h, 1, q)), ("B", "H", "o", "n"), (2, 4, 3, N)),
    learnable("indirect", op("add", s, bias(op("mod", op("mul", q, 7), 31))), ("n",), (31,)),
    learnable("coarse_keys", op("add", s, bias(h, q, op("floordiv", k, 8))), ("H", "m", "n"), (4, N, N // 8 + 1)),
    learnable("short_pairs", op("add", s, bias(q, k)), ("m", "n"), (N - 60, N - 70)),
    learnable("coarse_factors", op("mul", s, bias(h, q, op("floordiv", k, 8))), ("H", "m", "n"), (4, N, N // 8 + 1)),
]
"""The learnable forms of PyTorch's tests of flex_attention, and others."""


def make_call(program: Program, shapes, tensors, dtype=torch.float32, strided=False, params=None):
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
    return with_captures(Call(program, *operands, sizes, params or {}, {}, d**-0.5, None), tensors)


def with_captures(call: Call, tensors) -> Call:
    maps = {}

    def runs(tile):
        if tile not in maps:
            maps[tile] = analyse(call.program, call.sizes, call.params, tensors, tile)
        return maps[tile]

    return replace(call, tensors=tensors, runs=runs)


def wanted(call: Call):
    return tuple(n for n, t in call.tensors.items() if t.is_floating_point())


def exact(call: Call, do, dlse):
    """Return gradients by name from autograd through the dense float64 reference."""
    names = wanted(call)
    leaves = {n: getattr(call, n).double().requires_grad_() for n in "qkv"}
    captured = {n: t.double().requires_grad_() if n in names else t for n, t in call.tensors.items()}
    out, lse = reference_attention(call.program, *leaves.values(), call.sizes, call.params, captured, call.scale)
    loss = (out * do.double()).sum() + (torch.where(torch.isfinite(lse), lse, 0.0) * dlse).sum()
    inputs = [*leaves.values(), *(captured[n] for n in names)]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
    return dict(zip((*"qkv", *names), zeros, strict=True))


def measured(call: Call, forward, backward, do, dlse):
    """Return gradients by name from a backend, in float64."""
    o, lse = forward(call)
    got = backward(call, o, lse, do, dlse, wanted(call))
    return {n: t.double() for n, t in {"q": got.q, "k": got.k, "v": got.v, **got.captured}.items()}


def cotangents(call: Call):
    shape = call.q.shape[:3]
    return torch.randn(*shape, call.v.shape[3]).to(call.q.dtype), torch.randn(shape)


def both(call: Call, forward, backward):
    """Return (ours, reference) gradients by name, in float64."""
    do, dlse = cotangents(call)
    return measured(call, forward, backward, do, dlse), exact(call, do, dlse)


def check(call: Call, forward, backward, tolerance=1e-4):
    ours, want = both(call, forward, backward)
    for name, reference in want.items():
        assert torch.isfinite(ours[name]).all(), name
        scale = max(reference.abs().max().item(), 1e-6) if reference.numel() else 1.0
        error = (ours[name] - reference).abs().max().item() / scale if reference.numel() else 0.0
        assert error < tolerance, (name, error)


def logarithm_call(size: int = 70) -> Call:
    """log(score) under a mask that shows exactly the pairs whose score has a logarithm."""
    tensors = (TensorParam("shown", BOOL, tuple(Size(n) for n in ("B", "H", "Lq", "Lk"))),)
    program = simple("log", mask=Load("shown", (b, h, q, k), BOOL), score=op("log", s), tensors=tensors)
    call = make_call(program, (2, 2, 2, size, size, 16, 16), {"shown": torch.ones(2, 2, size, size, dtype=torch.bool)})
    scores = call.q @ call.k.transpose(-1, -2) * call.scale
    shown = scores > 0.05
    shown[:, :, 3] = False  # a row without keys, whose logarithms are NaN
    return with_captures(call, {"shown": shown})
