"""The blockwise executor agrees with the dense float64 reference."""

from __future__ import annotations

import programs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnlang as al
from attnlang.ir import Program, reference_attention
from attnlang.runtime import eager


def compare(program: Program, q, k, v, tolerance: float = 2e-5, **captured) -> None:
    o, lse = al.compile(program, backend="eager")(q, k, v, return_lse=True, **captured)
    want, want_lse = al.reference(program, q, k, v, return_lse=True, **captured)
    assert o.dtype is q.dtype and o.shape == want.shape
    assert lse.dtype is (torch.float64 if q.dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(o.double(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("make", programs.ALL, ids=lambda f: f.__name__)
def test_programs(make):
    program = make()
    compare(program, *programs.operands(), **programs.captured(program))


@pytest.mark.parametrize("make", programs.ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("budget", [1 << 14, 1 << 16])
def test_small_budgets_cut_keys_heads_and_batch(make, budget, monkeypatch):
    monkeypatch.setattr(eager, "BUDGET", budget)
    program = make()
    shape = {"batch": 3, "heads": 4, "lq": 300, "lk": 400}
    if make in (programs.documents,):
        shape["lq"] = 400
    compare(program, *programs.operands(kv_heads=2, **shape), **programs.captured(program, **shape))


@pytest.mark.parametrize(("lq", "lk"), [(0, 0), (0, 5), (5, 0), (1, 1), (7, 129), (127, 128), (129, 1), (128, 257)])
@pytest.mark.parametrize("make", [programs.full, programs.causal, programs.window, programs.some_rows])
def test_lengths(make, lq, lk):
    compare(make(), *programs.operands(lq=lq, lk=lk))


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(0, 4, 2), (1, 1, 1), (2, 6, 1), (3, 6, 3), (2, 0, 0)])
def test_batches_and_heads(batch, heads, kv_heads):
    compare(programs.window(), *programs.operands(batch, heads, kv_heads, 150, 150))


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (8, 24), (80, 64), (192, 128), (513, 7)])
def test_head_dimensions(dim, value_dim):
    compare(programs.causal(), *programs.operands(dim=dim, value_dim=value_dim, lq=140, lk=140))


def test_shared_batch_of_keys():
    q, _, _ = programs.operands(batch=3)
    _, k, v = programs.operands(batch=1)
    compare(programs.causal(), q, k, v)


def test_strided_operands():
    q, k, v = programs.operands()
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.stack([k, k], -1)[..., 0]
    v = v[:, :, :, ::2]
    compare(programs.documents(), q, k, v, **programs.captured(programs.documents()))


def test_double_precision_is_exact():
    program = programs.biased()
    compare(program, *programs.operands(dtype=torch.float64), tolerance=1e-12, **programs.captured(program))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [programs.causal, programs.documents])
def test_half_precision_loses_no_more_than_dense_pytorch_does(dtype, make):
    program = make()
    q, k, v = programs.operands(dtype=dtype)
    given = programs.captured(program)
    o = al.compile(program, backend="eager")(q, k, v, **given)
    want = al.reference(program, q, k, v, **given)
    rounding = (want.to(dtype).double() - want).abs().max()
    assert (o.double() - want).abs().max() <= 2 * rounding + 1e-6


def test_address_maps():
    """Maps of K and V rows other than grouped heads are gathered; the reference reads the same maps."""
    program, call = programs.first_batch_call()
    o, lse = eager.forward(call)
    sizes, scale = call.sizes, call.scale
    want, want_lse = reference_attention(program, call.q, call.k, call.v, sizes, {}, {}, scale)
    torch.testing.assert_close(o.double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=2e-5)


def test_scores_of_minus_infinity_are_invisible():
    program = al.program(score=lambda s, b, h, q, k: torch.where(q - 100 >= k, s, -float("inf")))
    masked = al.program(mask=lambda b, h, q, k: q - 100 >= k)
    q, k, v = programs.operands()
    got = al.compile(program, backend="eager")(q, k, v, return_lse=True)
    want = al.compile(masked, backend="eager")(q, k, v, return_lse=True)
    torch.testing.assert_close(got, want)
    assert (got[0][:, :, :100] == 0).all() and (got[1][:, :, :100] == -torch.inf).all()


def test_values_of_invisible_keys_do_not_leak():
    q, k, v = programs.operands()
    o = al.compile(programs.causal(), backend="eager")(q, k, v)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 150:], v2[:, :, 150:] = 1e30, 1e30
    again = al.compile(programs.causal(), backend="eager")(q, k2, v2)
    torch.testing.assert_close(again[:, :, :150], o[:, :, :150], atol=0, rtol=0)


def test_autocast_does_not_reach_inside():
    q, k, v = programs.operands()
    o = al.compile(programs.causal(), backend="eager")(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(al.compile(programs.causal(), backend="eager")(q, k, v), o, atol=0, rtol=0)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor any operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_no_tensor_grows_with_the_square_of_the_length(monkeypatch):
    monkeypatch.setattr(eager, "BUDGET", 1 << 15)
    q, k, v = programs.operands(1, 1, 1, 1024, 1024, 8, 8)
    attention = al.compile(programs.causal(), backend="eager")
    attention(q, k, v)
    with Largest() as largest:
        attention(q, k, v)
        attention(q.requires_grad_(), k, v).sum().backward()
    assert largest.size <= 1 << 15
