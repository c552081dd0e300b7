"""flex_attention as a function: outputs, auxiliary outputs, gradients, errors in PyTorch's words."""

from __future__ import annotations

import time

import peer
import pytest
import torch
from peer import B, D, H, K, Q

import attnlang as al

pytestmark = pytest.mark.usefixtures("lightly_optimised")


def causal(b, h, q, k):
    return q >= k


def relative(s, b, h, q, k):
    return s + (k - q) * 0.1


def test_return_types():
    q, k, v = peer.operands()
    out = al.flex_attention(q, k, v)
    assert isinstance(out, torch.Tensor) and out.shape == (B, H, Q, D)
    pair = al.flex_attention(q, k, v, return_lse=True)
    assert isinstance(pair, tuple) and pair[1].shape == (B, H, Q) and pair[1].dtype is torch.float32
    torch.testing.assert_close(pair[0], out)
    out, aux = al.flex_attention(q, k, v, return_aux=al.AuxRequest())
    assert aux == al.AuxOutput(None, None)
    _, aux = al.flex_attention(q, k, v, return_aux=peer.pytorch.AuxRequest(lse=True))
    torch.testing.assert_close(aux.lse, pair[1])
    assert aux.max_scores is None


def test_natural_logarithm_and_empty_rows():
    q, k, v = peer.operands()
    mask = al.create_block_mask(lambda b, h, q, k: q < 60, B, H, Q, K)
    out, lse = al.flex_attention(q, k, v, block_mask=mask, return_lse=True)
    want = torch.logsumexp(q[:, :, :60] @ k.transpose(-1, -2) * D**-0.5, -1)
    torch.testing.assert_close(lse[:, :, :60], want)
    assert (lse[:, :, 60:] == -torch.inf).all() and (out[:, :, 60:] == 0).all()


def test_max_scores():
    q, k, v = peer.operands()
    mask = al.create_block_mask(lambda b, h, q, k: (q >= k) & (q > 10), B, H, Q, K)
    out, aux = al.flex_attention(q, k, v, relative, mask, return_aux=al.AuxRequest(lse=True, max_scores=True))
    i, j = torch.arange(Q)[:, None], torch.arange(K)
    scores = relative(q @ k.transpose(-1, -2) * D**-0.5, 0, 0, i, j)
    scores = scores.masked_fill(~((i >= j) & (i > 10)), -torch.inf)
    torch.testing.assert_close(aux.max_scores, scores.amax(-1))
    torch.testing.assert_close(aux.lse[:, :, 11:], torch.logsumexp(scores[:, :, 11:], -1))
    assert out.shape == q.shape


def test_two_branches_merge_by_lse():
    q, k, v = peer.operands()
    near = al.create_block_mask(lambda b, h, q, k: (q - k).abs() < 40, B, H, Q, K)
    far = al.create_block_mask(al.not_mask(near.mask_mod), B, H, Q, K)
    (o1, l1), (o2, l2) = (al.flex_attention(q, k, v, block_mask=m, return_lse=True) for m in (near, far))
    lse = torch.logaddexp(l1, l2)
    merged = o1 * torch.exp(l1 - lse)[..., None] + o2 * torch.exp(l2 - lse)[..., None]
    torch.testing.assert_close(merged, al.flex_attention(q, k, v), atol=1e-5, rtol=1e-5)


def test_order_of_padding_keys_does_not_matter():
    q, k, v = peer.operands()
    mask = al.create_block_mask(lambda b, h, q, k: (q >= k) & (k < 100), B, H, Q, K)
    out = al.flex_attention(q, k, v, block_mask=mask)
    k[:, :, 100:], v[:, :, 100:] = torch.randn(2, B, H, K - 100, D)
    assert torch.equal(out, al.flex_attention(q, k, v, block_mask=mask))


def dense(q, k, v, bias, mask):
    scores = q @ k.transpose(-1, -2) * D**-0.5 + bias
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ v


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_reach_operands_and_biases(masked):
    """Learnable biases of PyTorch's tests: relative, per head, indirect, read twice, transposed."""
    tables = {
        "relative": torch.randn(Q + K, requires_grad=True),
        "head": torch.randn(H, requires_grad=True),
        "rows": torch.randn(10, K, requires_grad=True),
        "token": torch.randn(Q, requires_grad=True),
        "pair": torch.randn(K, Q, requires_grad=True),
    }
    offsets = torch.randint(0, 10, (Q,))
    relative, head, rows, token, pair = tables.values()

    def score(s, b, h, q, k):
        return s + relative[q - k + K] + head[h] + rows[offsets[q], k] + token[q] * token[k] + pair.t()[q, k]

    q, k, v = (t.requires_grad_() for t in peer.operands())
    mask = al.create_block_mask(causal, B, H, Q, K) if masked else None
    i, j = torch.arange(Q)[:, None], torch.arange(K)
    bias = relative[i - j + K] + rows[offsets] + token[:, None] * token + pair.t()
    bias = bias + head[:, None, None]
    want = dense(q, k, v, bias, i >= j if masked else torch.ones(Q, K, dtype=torch.bool))
    got = al.flex_attention(q, k, v, score, mask)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(want)
    inputs = (q, k, v, *tables.values())
    for a, b in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


def test_gradient_of_a_bias_alone_and_of_a_0d_scale():
    q, k, v = peer.operands()
    factor = torch.tensor(0.7, requires_grad=True)
    al.flex_attention(q, k, v, lambda s, b, h, q, k: s * factor).square().sum().backward()
    got, factor.grad = factor.grad, None
    (torch.softmax(q @ k.transpose(-1, -2) * D**-0.5 * factor, -1) @ v).square().sum().backward()
    torch.testing.assert_close(got, factor.grad, atol=1e-3, rtol=1e-3)


def test_gradient_of_a_tensor_made_inside_the_function():
    q, k, v = peer.operands()
    table = torch.randn(H, 2, requires_grad=True)
    al.flex_attention(q, k, v, lambda s, b, h, q, k: s + table.exp()[h].sum() * k).sum().backward()
    assert table.grad is not None and torch.isfinite(table.grad).all()


def test_a_score_that_ignores_the_score():
    q, k, v = (t.requires_grad_() for t in peer.operands())
    al.flex_attention(q, k, v, lambda s, b, h, q, k: (q - k).abs() * -0.1).sum().backward()
    assert (q.grad == 0).all() and (k.grad == 0).all() and (v.grad != 0).any()


def test_gradients_through_the_lse():
    q, k, v = (t.requires_grad_() for t in peer.operands())
    out, lse = al.flex_attention(q, k, v, return_lse=True)
    got = torch.autograd.grad(out.sum() + lse.square().sum(), (q, k, v))
    scores = q @ k.transpose(-1, -2) * D**-0.5
    loss = (torch.softmax(scores, -1) @ v).sum() + torch.logsumexp(scores, -1).square().sum()
    torch.testing.assert_close(got, torch.autograd.grad(loss, (q, k, v)), atol=1e-4, rtol=1e-3)


def test_autocast_casts_the_operands():
    q, k, v = peer.operands()
    with torch.autocast("cpu", torch.bfloat16):
        out = al.flex_attention(q, k, v)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, al.flex_attention(*(t.bfloat16() for t in (q, k, v))))


def test_keys_of_lower_precision_are_widened():
    q, k, v = peer.operands()
    out = al.flex_attention(q, k.half(), v.half())
    torch.testing.assert_close(out, al.flex_attention(q, k.half().float(), v.half().float()))


def test_kernel_options_are_accepted():
    q, k, v = peer.operands()
    options = {"BLOCK_M": 32, "num_stages": 2}
    torch.testing.assert_close(al.flex_attention(q, k, v, kernel_options=options), al.flex_attention(q, k, v))


def test_many_batches():
    q, k, v = peer.operands(3000, 2, 8, 8, dim=4)
    torch.testing.assert_close(
        al.flex_attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5
    )


WRONG = {
    "rank": (lambda q, k, v: (q[0], k[0], v[0], {}), NotImplementedError, "must be 4D tensors"),
    "heads": (lambda q, k, v: (q, k[:, :2], v[:, :2], {}), ValueError, "Try setting enable_gqa=True"),
    "ratio": (
        lambda q, k, v: (q, k[:, :3], v[:, :3], {"enable_gqa": True}),
        ValueError,
        "multiple of kv heads for GQA but got Hq=4 and Hkv=3",
    ),
    "embedding": (lambda q, k, v: (q, k[..., :8], v, {}), ValueError, "same embedding dimension"),
    "batch": (lambda q, k, v: (q, k[:1], v[:1], {}), ValueError, "or non-none block_mask"),
    "mask batch": (
        lambda q, k, v: (q, k[:1], v[:1], {"block_mask": al.create_block_mask(causal, None, None, Q, K)}),
        ValueError,
        "B_block_mask=1",
    ),
    "device": (lambda q, k, v: (q, k.to("meta"), v, {}), ValueError, "same device type"),
    "shorter mask": (
        lambda q, k, v: (q, k, v, {"block_mask": al.create_block_mask(causal, B, H, Q - 1, K)}),
        ValueError,
        "block_mask was created for block_mask.shape=.* smaller length",
    ),
    "longer mask": (
        lambda q, k, v: (q, k, v, {"block_mask": al.create_block_mask(causal, B, H, Q + 9, K)}),
        ValueError,
        "block_mask was created for block_mask.shape=.* larger length",
    ),
    "mask device": (
        lambda q, k, v: (q, k, v, {"block_mask": al.create_block_mask(causal, B, H, Q, K, device="meta")}),
        RuntimeError,
        "q/k/v and block_mask to be on the same device",
    ),
    "no mask": (lambda q, k, v: (q, k, v, {"block_mask": causal}), ValueError, "must be a BlockMask, got function"),
    "both": (
        lambda q, k, v: (q, k, v, {"return_lse": True, "return_aux": al.AuxRequest()}),
        ValueError,
        "Cannot specify both return_lse and return_aux",
    ),
    "scale": (lambda q, k, v: (q, k, v, {"scale": float("nan")}), ValueError, "scale must be finite"),
    "dtype": (lambda q, k, v: (q.int(), k.int(), v.int(), {}), ValueError, "must be float16, bfloat16"),
    "score": (
        lambda q, k, v: (q, k, v, {"score_mod": lambda s, b, h, q, k: s if s > 0 else -s}),
        al.ProgramError,
        "test_flex.py",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    make, kind, message = WRONG[name]
    q, k, v, kwargs = make(*peer.operands())
    with pytest.raises(kind, match=message) as error:
        al.flex_attention(q, k, v, **kwargs)
    assert isinstance(error.value, al.AttnlangError)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.zeros(2, 3, 4)], layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="NestedTensor"):
        al.flex_attention(nested, nested, nested)


@pytest.mark.parametrize("mods", [(1,), (causal, None)])
def test_combining_what_is_no_function(mods):
    for combine in (al.and_masks, al.or_masks):
        with pytest.raises(RuntimeError, match="callable mask_mods"):
            combine(*mods)


def test_the_overhead_of_a_call_is_small():
    """Tracing, binding, finding run map and kernel: under a millisecond on an idle machine, 5 ms on a busy one."""
    doc, slope = torch.arange(16) // 4, torch.randn(1)

    def score(s, b, h, q, k):
        return s + slope[h] * (k - q)

    def mask(b, h, q, k):
        return (q >= k) & (doc[q] == doc[k])

    q, k, v = peer.operands(1, 1, 16, 16)
    block_mask = al.create_block_mask(mask, 1, 1, 16, 16)
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        al.flex_attention(q, k, v, score, block_mask)
        times.append(time.perf_counter() - begin)
    assert min(times) < 5e-3
