"""The reference evaluator against hand-written PyTorch."""

import math

import pytest
import torch

from attnlang.ir import FLOAT, INT, Load, ScalarParam, Size, TensorParam, dense_mask, reference_attention, simple
from attnlang.ir.build import all_of, h, k, op, param, q, s

B, H, HKV, LQ, LK, D, DV = 2, 4, 2, 9, 13, 8, 5
SIZES = {"B": B, "H": H, "Hkv": HKV, "Lq": LQ, "Lk": LK}
ROW, COL = torch.arange(LQ)[:, None], torch.arange(LK)[None, :]


def tensors(requires_grad=False):
    shapes = [(B, H, LQ, D), (B, HKV, LK, D), (B, HKV, LK, DV)]
    return [torch.randn(x, dtype=torch.float64, requires_grad=requires_grad) for x in shapes]


def dense(q_, k_, v_, mask, score, scale=D**-0.5):
    k_, v_ = k_.repeat_interleave(H // HKV, 1), v_.repeat_interleave(H // HKV, 1)
    scores = score(torch.einsum("bhid,bhjd->bhij", q_, k_) * scale).masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.nan_to_num(torch.softmax(scores, -1), 0.0)
    return weights @ v_, lse


def causal():
    return simple("causal", mask=op("le", k, q)), {}, {}, COL <= ROW, lambda x: x


def window():
    w = param("w", INT)
    program = simple("window", mask=op("le", op("abs", op("sub", q, k)), w), scalars=(ScalarParam("w", INT),))
    return program, {"w": 3}, {}, (ROW - COL).abs() <= 3, lambda x: x


def alibi():
    slope = torch.rand(H, dtype=torch.float64)
    score = op("add", s, op("mul", Load("slope", (h,), FLOAT), op("sub", k, q)))
    program = simple("alibi", score=score, tensors=(TensorParam("slope", FLOAT, (Size("H"),)),))
    full = torch.ones(LQ, LK, dtype=torch.bool)
    return program, {}, {"slope": slope}, full, lambda x: x + slope[:, None, None] * (COL - ROW)


def document():
    dq, dk = torch.randint(3, (LQ,)), torch.randint(3, (LK,))
    same = op("eq", Load("dq", (q,), INT), Load("dk", (k,), INT))
    program = simple(
        "doc",
        mask=all_of(same, op("le", k, q)),
        tensors=(TensorParam("dq", INT, (Size("Lq"),)), TensorParam("dk", INT, (Size("Lk"),))),
    )
    return program, {}, {"dq": dq, "dk": dk}, (dq[:, None] == dk[None]) & (COL <= ROW), lambda x: x


@pytest.mark.parametrize("case", [causal, window, alibi, document])
def test_agrees_with_dense_pytorch(case):
    program, params, captured, mask, score = case()
    q_, k_, v_ = tensors()
    out, lse = reference_attention(program, q_, k_, v_, SIZES, params, captured, D**-0.5)
    want, want_lse = dense(q_, k_, v_, mask, score)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)
    assert torch.equal(dense_mask(program, SIZES, params, captured), mask.expand(B, H, LQ, LK))


def test_gradients_agree_with_dense_pytorch():
    program, params, captured, mask, score = alibi()
    leaves = tensors(True)
    slope = captured["slope"].requires_grad_()
    out, lse = reference_attention(program, *leaves, SIZES, params, captured, D**-0.5)
    want, want_lse = dense(*leaves, mask, score)
    weights = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad([out, lse], [*leaves, slope], weights)
    expected = torch.autograd.grad([want, want_lse], [*leaves, slope], weights)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_rows_without_keys_are_zero_with_finite_gradients():
    program = simple("late", mask=op("ge", q, 5))
    leaves = tensors(True)
    out, lse = reference_attention(program, *leaves, SIZES, {}, {}, 0.3)
    assert (out[:, :, :5] == 0).all() and torch.isneginf(lse[:, :, :5]).all()
    assert out[:, :, 5:].abs().min() > 0
    for grad in torch.autograd.grad(out.sum() + lse[:, :, 5:].sum(), leaves):
        assert torch.isfinite(grad).all()


def test_masked_pairs_never_reach_the_score():
    poison = op("div", 1.0, op("sub", q, k))  # infinite on the diagonal, which the mask excludes
    program = simple("poison", mask=op("lt", k, q), score=op("add", s, poison))
    leaves = tensors(True)
    out, _ = reference_attention(program, *leaves, SIZES, {}, {}, 0.3)
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("lq, lk", [(0, 5), (5, 0), (0, 0)])
def test_zero_lengths(lq, lk):
    sizes = {**SIZES, "Lq": lq, "Lk": lk}
    q_, k_, v_ = torch.randn(B, H, lq, D), torch.randn(B, HKV, lk, D), torch.randn(B, HKV, lk, DV)
    out, lse = reference_attention(causal()[0], q_, k_, v_, sizes, {}, {}, 1.0)
    assert out.shape == (B, H, lq, DV) and (out == 0).all()
    assert lse.shape == (B, H, lq) and torch.isneginf(lse).all()


def test_loads_clamp():
    program = simple(
        "clamp",
        mask=op("gt", Load("t", (op("sub", q, 3),), INT), 0),
        tensors=(TensorParam("t", INT, (Size("n"),)),),
    )
    mask = dense_mask(program, SIZES, {}, {"t": torch.tensor([1, 0, 1])})
    assert mask[0, 0, :, 0].tolist() == [True] * 4 + [False] + [True] * 4


def test_scores_of_minus_infinity_hide_pairs():
    hidden = op("where", op("lt", q, 4), -math.inf, s)
    leaves = tensors(True)
    out, lse = reference_attention(simple("hidden", score=hidden), *leaves, SIZES, {}, {}, 0.3)
    assert (out[:, :, :4] == 0).all() and torch.isneginf(lse[:, :, :4]).all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert torch.isfinite(grad).all()
