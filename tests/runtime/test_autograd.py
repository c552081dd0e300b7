"""Gradients of every backend: exact in float64, equal to the reference's, of any order."""

from __future__ import annotations

from collections.abc import Callable

import programs
import pytest
import torch

import attnlang as al
from attnlang.ir import Program, reference_attention
from attnlang.runtime import autograd, dispatch, eager

pytestmark = pytest.mark.usefixtures("lightly_optimised")

Tensor = torch.Tensor
SMALL = {"batch": 2, "heads": 2, "lq": 9, "lk": 9}


def leaves(program: Program, dtype: torch.dtype = torch.float64, **shape) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Operands and captured float tensors that want gradients, and the other captured tensors."""
    own = {"kv_heads": 1, "dim": 3, "value_dim": 2, **shape}
    tensors = programs.captured(program, **{n: own[n] for n in ("batch", "heads", "lq", "lk")})
    floats = {n: t.to(dtype) for n, t in tensors.items() if t.is_floating_point()}
    inputs = [*programs.operands(dtype=dtype, **own), *floats.values()]
    rest = {n: t for n, t in tensors.items() if n not in floats}
    return [t.clone().requires_grad_() for t in inputs], rest


def function(program: Program, rest: dict[str, Tensor], call: Callable) -> Callable[..., tuple[Tensor, Tensor]]:
    names = [t.name for t in program.tensors if t.name not in rest]

    def run(q: Tensor, k: Tensor, v: Tensor, *floats: Tensor) -> tuple[Tensor, Tensor]:
        return call(q, k, v, return_lse=True, **rest, **dict(zip(names, floats, strict=True)))

    return run


def finite(run: Callable) -> Callable:
    """Replace the lse of empty rows, which no finite difference can see, by 0."""

    def out(*args: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = run(*args)
        return o, torch.where(torch.isinf(lse), 0.0, lse)

    return out


@pytest.mark.parametrize("make", programs.ALL, ids=lambda f: f.__name__)
def test_gradcheck(make):
    program = make()
    inputs, rest = leaves(program, **SMALL)
    assert torch.autograd.gradcheck(finite(function(program, rest, al.compile(program))), inputs, fast_mode=True)


@pytest.mark.parametrize("make", [programs.causal, programs.biased, programs.poisonous], ids=lambda f: f.__name__)
def test_gradgradcheck(make):
    program = make()
    inputs, rest = leaves(program, **{**SMALL, "batch": 1, "lq": 5, "lk": 5})
    run = finite(function(program, rest, al.compile(program)))
    assert torch.autograd.gradgradcheck(run, inputs, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("budget", [1 << 15, 1 << 22])
@pytest.mark.parametrize("make", programs.ALL, ids=lambda f: f.__name__)
def test_gradients_equal_those_of_the_reference(make, backend, budget, monkeypatch):
    monkeypatch.setattr(eager, "BUDGET", budget)
    program = make()
    inputs, rest = leaves(program, torch.float32, batch=2, heads=4, kv_heads=2, lq=200, lk=200, dim=16, value_dim=8)
    run = function(program, rest, al.compile(program, backend=backend))
    reference = function(program, rest, lambda *args, **kwargs: al.reference(program, *args, **kwargs))
    do, dlse = torch.randn(2, 4, 200, 8), torch.randn(2, 4, 200)

    def gradients(call: Callable) -> tuple[Tensor, ...]:
        o, lse = call(*inputs)
        loss = (o * do).sum() + (torch.where(torch.isinf(lse), 0.0, lse) * dlse).sum()
        return torch.autograd.grad(loss, inputs)

    for got, want in zip(gradients(run), gradients(reference), strict=True):
        size = max(1.0, want.abs().max().item())
        torch.testing.assert_close(got, want, atol=5e-5 * size, rtol=1e-3)


def test_rows_without_keys_get_and_give_no_gradient():
    program = programs.some_rows()
    inputs, _ = leaves(program, torch.float32, batch=2, heads=2, lq=40, lk=40)
    q, k, v = inputs
    o, _lse = al.compile(program)(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad(o.sum(), inputs)
    assert (dq[0, :, :30] == 0).all() and (dq[1] == 0).all()
    assert (dk[1] == 0).all() and (dv[1] == 0).all()
    assert all(torch.isfinite(t).all() for t in (dq, dk, dv))


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (4,), (0, 4)])
def test_only_what_is_asked_for(which):
    program = programs.biased()
    inputs, rest = leaves(program, torch.float32, batch=1, heads=2, lq=70, lk=70)
    inputs = [t.detach().requires_grad_(i in which) for i, t in enumerate(inputs)]
    run = function(program, rest, al.compile(program))
    reference = function(program, rest, lambda *args, **kwargs: al.reference(program, *args, **kwargs))
    run(*inputs)[0].square().sum().backward()
    got = [None if t.grad is None else t.grad.clone() for t in inputs]
    for t in inputs:
        t.grad = None
    reference(*inputs)[0].square().sum().backward()
    for i, (t, g) in enumerate(zip(inputs, got, strict=True)):
        assert (g is not None) == (i in which)
        if g is not None:
            torch.testing.assert_close(g, t.grad, atol=1e-4, rtol=1e-3)


def test_gradient_of_the_lse_alone():
    program = programs.causal()
    inputs, _ = leaves(program, torch.float32, **SMALL)
    lse = al.compile(program)(*inputs, return_lse=True)[1]
    want = al.reference(program, *inputs, return_lse=True)[1]
    got = torch.autograd.grad(lse.sum(), inputs[:2])
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), inputs[:2]), atol=1e-5, rtol=1e-4)


def test_a_shared_batch_of_keys_gets_the_sum():
    q = torch.randn(3, 2, 20, 4, requires_grad=True)
    k, v = (torch.randn(1, 2, 20, 4, requires_grad=True) for _ in range(2))
    al.compile(programs.causal())(q, k, v).square().sum().backward()
    got = k.grad.clone(), v.grad.clone()
    k.grad = v.grad = None
    al.reference(programs.causal(), q, k, v).square().sum().backward()
    torch.testing.assert_close(got, (k.grad, v.grad), atol=1e-5, rtol=1e-4)


def test_address_maps():
    program, call = programs.first_batch_call()
    inputs = [t.requires_grad_() for t in (call.q, call.k, call.v)]
    do = torch.randn(3, 4, 200, 8)
    got = torch.autograd.grad(autograd.attend(call, eager.forward)[0], inputs, do)
    o, _ = reference_attention(program, *inputs, call.sizes, {}, {}, call.scale)
    torch.testing.assert_close(got, torch.autograd.grad(o, inputs, do.double()), atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_as_good_as_those_of_dense_pytorch(dtype):
    program = programs.documents()
    inputs, rest = leaves(program, dtype, batch=1, heads=2, lq=140, lk=140, dim=16)
    q, k = torch.arange(140)[:, None], torch.arange(140)
    mask = (q >= k) & (rest["doc"][0][:, None] == rest["doc"][0])

    def dense(queries: Tensor, keys: Tensor, values: Tensor, slope: Tensor) -> Tensor:
        scores = queries @ keys.transpose(-1, -2) * 0.25 + slope[:, None, None] * (k - q)
        return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ values

    def gradients(call: Callable, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*inputs).square().sum(), inputs)

    run = function(program, rest, al.compile(program))
    got = gradients(lambda *args: run(*args)[0], inputs)
    eager_half = gradients(dense, inputs)
    exact = gradients(dense, [t.detach().double().requires_grad_() for t in inputs])
    for g, other, want in zip(got, eager_half, exact, strict=True):
        assert g.dtype is dtype
        assert (g.double() - want).norm() <= 2 * (other.double() - want).norm() + 1e-3


def test_captured_tensors_of_another_float_dtype():
    program = programs.documents()
    inputs, rest = leaves(program, torch.float32, batch=1, heads=2, lq=30, lk=30)
    slope = inputs[3].detach().double().requires_grad_()
    al.compile(program)(*inputs[:3], **rest, slope=slope).sum().backward()
    assert slope.grad is not None and slope.grad.dtype is torch.float64


def test_nothing_is_recorded_without_need():
    q, k, v = programs.operands(lq=10, lk=10)
    assert al.compile(programs.causal())(q, k, v).grad_fn is None
    with torch.no_grad():
        assert al.compile(programs.causal())(q.requires_grad_(), k, v).grad_fn is None


def test_in_place_changes_between_forward_and_backward_are_refused():
    program = programs.documents()
    inputs, rest = leaves(program, torch.float32, batch=1, heads=2, lq=30, lk=30)
    out = function(program, rest, al.compile(program))(*inputs)[0].sum()
    rest["doc"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_memory_of_training_is_linear(monkeypatch):
    """Between forward and backward only operands, outputs and captured tensors are kept."""
    kept = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    q, k, v = (t.requires_grad_() for t in programs.operands(1, 1, 1, 1000, 1000, 4, 4))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = al.compile(programs.causal())(q, k, v)
    assert sum(kept) <= 6 * 4000
    out.sum().backward()


def test_functional_transforms():
    q, k, v = programs.operands(1, 2, 2, 20, 20, 4, 4)
    attn = al.compile(programs.causal(), backend="eager")
    got = torch.func.grad(lambda q: attn(q, k, v).square().sum())(q)
    want = torch.func.grad(lambda q: al.reference(programs.causal(), q, k, v).square().sum())(q)
    torch.testing.assert_close(got, want.to(got.dtype), atol=1e-4, rtol=1e-3)


def test_the_forward_of_a_named_backend_is_used(monkeypatch):
    used = []
    monkeypatch.setattr(dispatch, "_forward", lambda name: lambda call: used.append(name) or eager.forward(call))
    q, k, v = programs.operands(1, 1, 1, 5, 5)
    al.compile(programs.causal(), backend="triton")(q.requires_grad_(), k, v).sum().backward()
    assert used == ["triton"]
