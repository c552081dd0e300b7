"""Score and mask functions of PyTorch's FlexAttention tests, unchanged, against PyTorch's eager FlexAttention."""

from __future__ import annotations

import functools

import peer
import pytest
import torch
from peer import B, D, H, K, Q, agree

import attnlang as al

pytestmark = pytest.mark.usefixtures("lightly_optimised")

# --- score functions


def identity(score, b, h, q, k):
    return score


def causal(score, b, h, q, k):
    return torch.where(q >= k, score, float("-inf"))


def inverse_causal(score, b, h, q, k):
    return torch.where(q <= k, score, float("-inf"))


def times_two(score, b, h, q, k):
    return score * 2


def squared(score, b, h, q, k):
    return score * score


def relative_bias(score, b, h, q, k):
    return score + (q - k)


def relative_causal(score, b, h, q, k):
    return torch.where(q >= k, score + (q - k), float("-inf"))


def alibi(score, b, h, q, k):
    return score + (k - q) * torch.exp2(-((h + 1) * 8.0 / H))


def trig(score, b, h, q, k):
    return torch.sin(torch.cos(score)) + torch.tan(b)


def trig2(score, b, h, q, k):
    cos_score = torch.cos(score)
    sin_score = torch.sin(score)
    return cos_score * sin_score + torch.tan(b)


def silu(score, b, h, q, k):
    return torch.nn.functional.silu(score)


def floored(score, b, h, q, k):
    return score - q // (1 + k)


def skip_odd_keys(score, b, h, q, k):
    return torch.where(k % 2 == 0, score, float("-inf"))


def softcap(score, b, h, q, k):
    return 20.0 * torch.tanh(score / 20.0)


PLAIN = (
    identity,
    causal,
    inverse_causal,
    times_two,
    squared,
    relative_bias,
    relative_causal,
    alibi,
    trig,
    trig2,
    silu,
    floored,
    skip_odd_keys,
    softcap,
)


@pytest.mark.parametrize("mod", PLAIN, ids=lambda f: f.__name__)
def test_builtin_score_mods(mod):
    agree(mod)


@pytest.mark.parametrize("mod", PLAIN[:8], ids=lambda f: f.__name__)
def test_score_mods_at_different_lengths(mod):
    agree(mod, operands_=peer.operands(q_len=70, kv_len=200))


def captured_score_mods():
    head_offset = torch.rand(H)
    slopes = torch.randn(H)
    bias_bq, bias_bh = torch.randn(B, Q), torch.randn(B, H)
    bias_qk, bias_bqk = torch.randn(Q, K), torch.randn(B, Q, K)
    bias_full, weird = torch.randn(B, H, Q, K), torch.randn(4, B, H, Q)
    rel = torch.randn(Q + K)
    rel_h = torch.randn(B, H, Q, K // 10 + 1)
    offsets = torch.randint(0, 9, (Q,))
    table = torch.randn(9, K)
    points = torch.randn(max(Q, K), 3)
    scale0, scale1 = torch.tensor(0.5), torch.tensor([2.0])
    token, batch, head = torch.randn(Q), torch.randn(B), torch.randn(H)
    flag = True
    return {
        "head_offset": lambda s, b, h, q, k: s * head_offset[h],
        "slopes": lambda s, b, h, q, k: s + slopes[h] * (k - q),
        "index_multiple": lambda s, b, h, q, k: s + bias_bq[b][q],
        "index_pair": lambda s, b, h, q, k: s + bias_bh[b, h],
        "index_weird1": lambda s, b, h, q, k: s + weird[0][b, h][q],
        "index_weird2": lambda s, b, h, q, k: s + weird[b][h % 2][h, q],
        "bias_qk": lambda s, b, h, q, k: s + bias_qk[q, k],
        "bias_bqk": lambda s, b, h, q, k: s + bias_bqk[b, q, k],
        "bias_bhqk": lambda s, b, h, q, k: s + bias_full[b, h, q, k],
        "bias_transposed": lambda s, b, h, q, k: s + bias_qk.t()[k, q],
        "relative_table": lambda s, b, h, q, k: s + rel[(q - k) + K],
        "view_buffer": lambda s, b, h, q, k: s + rel_h[b, h, q, k // 10],
        "indirect": lambda s, b, h, q, k: s + table[offsets[q], k],
        "all_biases": lambda s, b, h, q, k: s + token[q] + batch[b] + head[h],
        "scale_0d": lambda s, b, h, q, k: s * scale0,
        "scale_1d": lambda s, b, h, q, k: s * scale1[0],
        "closure_flag": lambda s, b, h, q, k: s + 1 if flag else s - 1,
        "two_indexings": lambda s, b, h, q, k: s + token[q] * token[k % Q],
        "sigmoid_gate": lambda s, b, h, q, k: s * torch.sigmoid(head[h]),
        "distance": lambda s, b, h, q, k: s * torch.exp(-(points[q] - points[k]).pow(2).sum(-1).sqrt() / 4.0),
        "clamped": lambda s, b, h, q, k: s + rel[torch.clamp(q - k + 16, 0, 32)],
        "flipped": lambda s, b, h, q, k: s + bias_qk[k, q],
        "sum_of_positions": lambda s, b, h, q, k: s + rel[q + k],
        "multiplicative": lambda s, b, h, q, k: s * token[q],
    }


CAPTURED = captured_score_mods()


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_score_mods(name):
    agree(CAPTURED[name])


def test_function_composition():
    def both(score, b, h, q, k):
        return relative_bias(softcap(score, b, h, q, k), b, h, q, k)

    agree(both)


def test_a_changed_closure_is_seen():
    add = True

    def mod(score, b, h, q, k):
        return score + q if add else score * 2

    agree(mod)
    add = False
    agree(mod)


def test_changed_contents_are_seen():
    bias = torch.zeros(H)
    doc = torch.zeros(Q, dtype=torch.int64)

    def score(s, b, h, q, k):
        return s + bias[h] * q

    def mask(b, h, q, k):
        return doc[q] == doc[k]

    agree(score, mask)
    bias.copy_(torch.randn(H))
    doc.copy_(torch.arange(Q) // 40)
    agree(score, mask)


def test_changed_lengths_are_seen():
    doc = torch.arange(300) // 40

    def mask(b, h, q, k):
        return (doc[q] == doc[k]) & (q >= k)

    for length in (50, 129, 300, 128):
        agree(None, mask, peer.operands(q_len=length, kv_len=length))


# --- mask functions


def mask_mods():
    lengths = torch.tensor([100, 37])
    doc = torch.arange(Q) // 40
    by_batch = torch.stack([torch.arange(Q) // 40, torch.arange(Q) // 33])
    offset = torch.tensor([0, 50])
    random_bq = torch.rand(B, Q) > 0.5
    random_all = torch.rand(B, H, Q, K) > 0.5
    window, width = 32, 10
    empty_rows = 70

    def causal_mask(b, h, q, k):
        return q >= k

    def sliding(b, h, q, k):
        return q - k <= window

    def natten(b, h, q, k):
        qy, qx, ky, kx = q // width, q % width, k // width, k % width
        return ((qy - ky).abs() <= 3) & ((qx - kx).abs() <= 3)

    def partial_base(shift, b, h, q, k):
        return q + shift >= k

    class Window:
        def __init__(self, size):
            self.size = size

        def __call__(self, b, h, q, k):
            return (q - k).abs() < self.size

    return {
        "causal": causal_mask,
        "inverse_causal": lambda b, h, q, k: q <= k,
        "noop": al.noop_mask,
        "their_noop": peer.pytorch.noop_mask,
        "padding": lambda b, h, q, k: (q < lengths[b]) & (k < lengths[b]),
        "document": lambda b, h, q, k: doc[q] == doc[k],
        "document_by_batch": lambda b, h, q, k: by_batch[b, q] == by_batch[b, k],
        "causal_offset": lambda b, h, q, k: q + offset[b] >= k,
        "random_rows": lambda b, h, q, k: ~random_bq[b, q],
        "random": lambda b, h, q, k: random_all[b, h, q, k],
        "flip_by_batch": lambda b, h, q, k: torch.where(b % 2 == 0, q >= k, q <= k),
        "tail_only": lambda b, h, q, k: k >= 140,
        "empty_rows": lambda b, h, q, k: q < empty_rows,
        "nothing": lambda b, h, q, k: q < 0,
        "two_ends": lambda b, h, q, k: (k < 30) | (k >= 130),
        "natten": natten,
        "and": al.and_masks(causal_mask, sliding),
        "or": al.or_masks(sliding, lambda b, h, q, k: k < 5),
        "not": al.not_mask(sliding),
        "their_and": peer.pytorch.and_masks(causal_mask, sliding),
        "their_or": peer.pytorch.or_masks(sliding, lambda b, h, q, k: k < 5),
        "partial": functools.partial(partial_base, 20),
        "callable": Window(17),
        "modular": lambda b, h, q, k: q % 16 == k % 16,
        "dilated": lambda b, h, q, k: ((q - k).abs() <= 60) & ((q - k) % 7 == 0),
        "per_head": lambda b, h, q, k: q - k <= 10 * (h + 1),
        "prefix": lambda b, h, q, k: (q >= k) | (k < 20),
    }


MASKS = mask_mods()


@pytest.mark.parametrize("name", MASKS)
def test_mask_mods(name):
    agree(None, MASKS[name])


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("block", [128, 32, (64, 16), 37])
def test_block_lists_are_those_of_pytorch(name, block):
    q, k, _ = peer.operands()
    peer.same_blocks(*peer.masks(MASKS[name], q, k, BLOCK_SIZE=block))


@pytest.mark.parametrize("name", ["causal", "document", "padding", "empty_rows"])
def test_block_lists_without_full_blocks(name):
    q, k, _ = peer.operands()
    peer.same_blocks(*peer.masks(MASKS[name], q, k, BLOCK_SIZE=32, separate_full_blocks=False))


@pytest.mark.parametrize("name", ["causal", "document", "and", "empty_rows", "random"])
def test_score_and_mask_together(name):
    agree(relative_bias, MASKS[name])
    agree(CAPTURED["slopes"], MASKS[name])


def test_mask_shared_by_batch_and_heads():
    q, k, v = peer.operands()
    ours, theirs = peer.masks(MASKS["causal"], q, k, shared=True)
    peer.same_blocks(ours, theirs)
    want = peer.pytorch.flex_attention(q, k, v, block_mask=theirs)
    torch.testing.assert_close(al.flex_attention(q, k, v, block_mask=ours), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mod", [MASKS["causal"], MASKS["padding"], MASKS["random"], causal, skip_odd_keys])
def test_create_mask(mod):
    got = al.create_mask(mod, B, H, Q, K)
    want = peer.pytorch.create_mask(mod, B, H, Q, K, device="cpu")
    assert got.dtype is torch.bool and torch.equal(got, want)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 129), (129, 1), (7, 300), (128, 256)])
def test_small_and_unequal_lengths(q_len, kv_len):
    agree(relative_bias, MASKS["causal"], peer.operands(q_len=q_len, kv_len=kv_len))


@pytest.mark.parametrize("dim", [1, 17, 24, 94, 121])
def test_head_dimensions(dim):
    agree(relative_causal, None, peer.operands(dim=dim, value_dim=2 * dim + 1))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_queries(kv_heads):
    given = peer.operands(kv_heads=kv_heads)
    agree(CAPTURED["slopes"], MASKS["per_head"], given, enable_gqa=True)


def test_shared_batch_of_keys():
    q, _, _ = peer.operands()
    _, k, v = peer.operands(batch=1)
    agree(None, MASKS["causal"], (q, k, v))


@pytest.mark.parametrize("scale", [1.0, 0.01, -0.5])
def test_scale(scale):
    agree(relative_bias, MASKS["causal"], scale=scale)


def test_strided_operands():
    def strided(t):
        return torch.stack([t, t], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0]

    q, k, v = map(strided, peer.operands())
    agree(None, MASKS["document"], (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-9}[dtype]
    agree(softcap, MASKS["causal"], peer.operands(dtype=dtype), tolerance=tolerance)


def test_poison_behind_the_mask():
    """Scores that are NaN or infinite on masked pairs do not reach the output."""
    mass = torch.full((K,), 2.0)
    mass[0] = 0.0

    def log_mass(s, b, h, q, k):
        return s + torch.log(mass[k])

    def inverse(s, b, h, q, k):
        return s / (q - k)

    def root(s, b, h, q, k):
        return s + torch.sqrt((q - k).float())

    q, k, v = peer.operands()
    for score, mask in (
        (log_mass, lambda b, h, q, k: k > 0),
        (inverse, lambda b, h, q, k: q > k),
        (root, lambda b, h, q, k: q >= k),
    ):
        block_mask = al.create_block_mask(mask, None, None, Q, K)
        q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        out = al.flex_attention(q, k, v, score, block_mask)
        dense = (q @ k.transpose(-1, -2)) * D**-0.5
        i, j = torch.arange(Q)[:, None], torch.arange(K)
        seen = mask(0, 0, i, j).expand(Q, K)
        scores = torch.full_like(dense, -torch.inf)
        b, h, x, y = seen.expand(B, H, Q, K).nonzero(as_tuple=True)
        scores = scores.index_put((b, h, x, y), score(dense[b, h, x, y], b, h, x, y))
        scores = torch.where(seen.any(-1)[:, None], scores, 0.0)
        want = torch.where(seen.any(-1)[:, None], torch.softmax(scores, -1) @ v, 0.0)
        torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)
        got = torch.autograd.grad(out.square().sum(), (q, k, v))
        expected = torch.autograd.grad(want.square().sum(), (q, k, v))
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
