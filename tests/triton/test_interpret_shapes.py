"""Shapes, strides, dtypes and empty rows of the Triton forward, in Triton's interpreter against the reference."""

from __future__ import annotations

import pytest
import torch
from triton_checks import check, make_call, qkv

from attnlang.ir import BOOL, FLOAT, INT, Load, Size, TensorParam, UsageError, simple
from attnlang.ir.build import b, const, h, k, op, q, s
from attnlang.runtime import Unavailable
from attnlang.runtime import triton as backend

CAUSAL = simple("causal", mask=op("le", k, q))
FULL = simple("full")
WINDOW = simple("window", mask=op("and", op("le", k, q), op("lt", op("sub", q, k), 20)))
ALIBI = simple(
    "alibi",
    mask=op("le", k, q),
    score=op("add", s, op("mul", Load("slope", (h,), FLOAT), op("sub", k, q))),
    tensors=(TensorParam("slope", FLOAT, (Size("H"),)),),
)


@pytest.mark.parametrize("lengths", [(1, 1), (7, 33), (33, 7), (129, 1), (1, 129), (33, 129)])
@pytest.mark.parametrize("program", [FULL, CAUSAL, WINDOW], ids=lambda p: p.name)
def test_lengths(program, lengths):
    check(make_call(program, *qkv(1, 2, *lengths)))


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(lengths):
    check(make_call(CAUSAL, *qkv(1, 2, *lengths)))


@pytest.mark.parametrize("shape", [(0, 2), (2, 0)])
def test_no_batch_or_no_heads(shape):
    q_, k_, v_ = qkv(*shape, 5, 5)
    o, lse = backend.forward(make_call(FULL, q_, k_, v_))
    assert o.shape == q_.shape
    assert lse.shape == q_.shape[:3]


@pytest.mark.parametrize("dims", [(1, 1), (8, 24), (24, 8), (64, 80), (80, 16), (160, 3)])
def test_head_dimensions(dims):
    check(make_call(CAUSAL, *qkv(1, 1, 35, 37, dims[0], value_dim=dims[1])))


@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (6, 3)])
def test_grouped_queries(heads):
    q_, k_, v_ = qkv(2, heads[0], 20, 40, kv_heads=heads[1])
    check(make_call(ALIBI, q_, k_, v_, {"slope": torch.randn(heads[0])}))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("program", [FULL, WINDOW], ids=lambda p: p.name)
def test_half_precision(program, dtype, tolerance):
    check(make_call(program, *qkv(1, 2, 50, 50, 32, dtype=dtype)), atol=tolerance, rtol=tolerance)


def test_transposed_inputs_keep_their_memory_order():
    q_, k_, v_ = (torch.randn(2, 33, 3, 16).transpose(1, 2) for _ in range(3))
    call = make_call(CAUSAL, q_, k_, v_)
    check(call)
    assert backend.forward(call)[0].transpose(1, 2).is_contiguous()


def test_any_strides():
    q_ = torch.randn(2, 2, 33, 32)[..., ::2]
    k_ = torch.randn(16, 40, 2, 2).permute(3, 2, 1, 0)
    v_ = torch.randn(1, 2, 40, 16).expand(2, 2, 40, 16)
    check(make_call(CAUSAL, q_, k_, v_))


def test_rows_without_visible_keys():
    check(make_call(simple("later", mask=op("gt", k, op("add", q, 10))), *qkv(1, 2, 33, 33)))
    check(make_call(simple("none", mask=const(False)), *qkv(1, 2, 33, 33)))


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_big_scores(size):
    q_, k_, v_ = qkv(1, 1, 33, 33)
    check(make_call(CAUSAL, q_ * size, k_, v_), atol=size * 1e-6, rtol=1e-3)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scale_of_any_sign(scale):
    check(make_call(WINDOW, *qkv(1, 2, 33, 33), scale=scale))
    check(make_call(simple("shifted", score=op("add", s, 1.0)), *qkv(1, 2, 33, 33), scale=scale))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_of_hidden_pairs_do_not_leak(bad):
    program = simple("bad", mask=op("le", k, q), score=op("where", op("gt", k, q), bad, s))
    check(make_call(program, *qkv(1, 2, 40, 40)))


def test_the_batch_of_a_mask():
    lengths = TensorParam("length", INT, (Size("B"),))
    program = simple("padded", mask=op("lt", k, Load("length", (b,), INT)), tensors=(lengths,))
    check(make_call(program, *qkv(3, 2, 20, 50), tensors={"length": torch.tensor([50, 0, 17])}))


def test_the_heads_of_a_mask():
    program = simple(
        "heads",
        mask=op("and", Load("on", (h,), BOOL), op("le", k, q)),
        tensors=(TensorParam("on", BOOL, (Size("H"),)),),
    )
    check(make_call(program, *qkv(2, 3, 40, 40), tensors={"on": torch.tensor([True, False, True])}))


def test_unsupported_calls_are_refused(monkeypatch):
    with pytest.raises(Unavailable, match="float64"):
        backend.forward(make_call(FULL, *(t.double() for t in qkv())))
    with pytest.raises(Unavailable, match="512"):
        backend.forward(make_call(FULL, *qkv(dim=513)))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises((Unavailable, UsageError), match="GPU"):
        backend.forward(make_call(FULL, *qkv()))
