"""BlockMask: lazy block lists, slicing, cropping, masks given by block lists."""

from __future__ import annotations

import tracemalloc

import peer
import pytest
import torch
from peer import B, H, K, Q

import attnlang as al
from attnlang import flex
from attnlang.block_mask import BlockMask


def causal(b, h, q, k):
    return q >= k


def by_head(b, h, q, k):
    return q + 10 * h >= k


def both(mask=causal, **kwargs):
    q, k, _ = peer.operands()
    return peer.masks(mask, q, k, BLOCK_SIZE=32, **kwargs)


def test_nothing_is_computed_before_it_is_read(monkeypatch):
    monkeypatch.setattr(flex, "exact_runs", None)
    mask = al.create_block_mask(causal, 1, 1, 1 << 20, 1 << 20)
    assert mask.shape == (1, 1, 1 << 20, 1 << 20) and mask.BLOCK_SIZE == (128, 128)
    assert "mask_mod=causal" in repr(mask)
    q, k, v = peer.operands(1, 1, 64, 64)
    al.flex_attention(q, k, v, block_mask=al.create_block_mask(causal, 1, 1, 64, 64))


def test_lists_at_a_million_tokens_stay_small():
    mask = al.create_block_mask(lambda b, h, q, k: (q - k).abs() < 512, 1, 1, 1 << 18, 1 << 18, BLOCK_SIZE=4096)
    assert mask.kv_num_blocks.shape == (1, 1, 64)
    assert int(mask.kv_num_blocks.max()) == 3


@pytest.mark.parametrize("block", [16, 24, (16, 40), (100, 128), 1000])
@pytest.mark.parametrize("separate", [True, False])
def test_lists_are_theirs_at_every_block_size(block, separate):
    ours = al.create_block_mask(by_head, 2, 2, 150, 130, "cpu", block, separate_full_blocks=separate)
    kwargs = {"BLOCK_SIZE": block, "separate_full_blocks": separate}
    peer.same_blocks(ours, peer.pytorch.create_block_mask(by_head, 2, 2, 150, 130, "cpu", **kwargs))


def test_nothing_but_the_list_that_is_read_is_made():
    """At a million tokens each list is 256 MiB; counts, sparsity and the picture need none of them."""
    mask = al.create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 4096), None, None, 1 << 20, 1 << 20)
    tracemalloc.start()
    assert mask.run_map().counts()[0] == 66839056
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) == 16352 + 253456
    assert torch.equal(mask.kv_num_blocks.sum(), mask.q_num_blocks.sum())
    assert mask.sparsity() == pytest.approx(99.597955)
    assert "█" in mask.to_string() or "░" in mask.to_string()
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_a_list_needs_its_own_memory_and_little_more():
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(3000, 3000, generator=generator) < 0.5
    mask = al.create_block_mask(lambda b, h, q, k: table[q, k], None, None, 3000, 3000, BLOCK_SIZE=1)
    runs = mask.blocks.runs
    assert len(runs.start) > 1e6
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    lists = [getattr(mask, f"{axis}_indices") for axis in ("kv", "q", "full_kv", "full_q")]
    beyond = tracemalloc.get_traced_memory()[1] - before - sum(t.numel() * 4 for t in lists)
    tracemalloc.stop()
    assert beyond < sum(t.numel() * 4 for t in lists)
    order = torch.argsort(table.T.int(), dim=1, descending=True, stable=True)
    assert torch.equal(mask.full_q_indices[0, 0], order.int())


INDICES = [
    0,
    -1,
    (1, 2),
    (slice(0, 1), slice(1, 3)),
    (slice(None), 0),
    (0, slice(None), torch.tensor([1], dtype=torch.int32)),
    (slice(None), slice(None), slice(2, 4)),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slicing(index):
    ours, theirs = both(by_head)
    peer.same_blocks(ours[index], theirs[index])


def test_a_sliced_mask_needs_a_new_function():
    ours, _ = both(by_head)
    sliced = ours[:, 1:3]
    q, k, v = peer.operands(heads=2)
    with pytest.raises(RuntimeError, match="Cannot use mask_mod from a sliced BlockMask"):
        al.flex_attention(q, k, v, block_mask=sliced)
    with pytest.raises(RuntimeError, match="sliced BlockMask"):
        sliced.mask_mod(*(torch.zeros(()),) * 4)
    sliced.mask_mod = lambda b, h, q, k: by_head(b, h + 1, q, k)
    got = al.flex_attention(q, k, v, block_mask=sliced)
    direct = al.create_block_mask(sliced.mask_mod, B, 2, Q, K)
    torch.testing.assert_close(got, al.flex_attention(q, k, v, block_mask=direct))


def test_their_sliced_mask_needs_a_new_function():
    _, theirs = both(by_head)
    q, k, v = peer.operands(heads=1)
    with pytest.raises(RuntimeError, match="sliced BlockMask"):
        al.flex_attention(q, k, v, block_mask=theirs[:, 0])


@pytest.mark.parametrize("lengths", [(150, 150), (100, 120), (32, 64), (1, 1)])
def test_cropping(lengths):
    ours, theirs = both(by_head)
    small, want = ours._adjust(*lengths), theirs._adjust(*lengths)
    assert small.shape == want.shape
    rows, cols = small.kv_indices.shape[-2:]
    assert torch.equal(small.to_dense(), ours.to_dense()[..., :rows, :cols])
    q, k, v = peer.operands(q_len=lengths[0], kv_len=lengths[1])
    theirs_out = peer.pytorch.flex_attention(q, k, v, block_mask=want)
    torch.testing.assert_close(al.flex_attention(q, k, v, block_mask=small), theirs_out, atol=1e-5, rtol=1e-5)


def test_moving():
    ours, _ = both()
    assert ours.to("meta").kv_indices.device.type == "meta"
    assert torch.equal(ours.to("cpu").kv_indices, ours.kv_indices)
    assert ours.to("cpu").mask_mod is causal


@pytest.mark.parametrize("flatten", [True, False])
def test_as_tuple_has_their_layout(flatten):
    ours, theirs = both()
    got, want = ours.as_tuple(flatten), theirs.as_tuple(flatten)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b
    assert isinstance(BlockMask(*got[:1], *got[1:9]) if not flatten else ours, BlockMask)


@pytest.mark.parametrize("grid", [-1, 3, (2, 5)])
@pytest.mark.parametrize("limit", [1, 4, 100])
def test_pictures(grid, limit):
    ours, theirs = both(by_head)
    if grid == -1:
        assert ours.to_string(grid, limit).count("\n") >= 5
        return
    assert ours.to_string(grid, limit) == theirs.to_string(grid, limit)


def lists(kinds: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Block lists of kinds [B, H, rows, cols] (1 partial, 2 full), shuffled past what counts."""
    out = []
    for kind in (1, 2):
        here = (kinds == kind).int()
        out += [here.sum(-1).int(), torch.argsort(here, dim=-1, descending=True, stable=True).int()]
    return tuple(out)


def dense(q, k, v, mask):
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    seen = mask.any(-1, keepdim=True)
    weights = torch.softmax(torch.where(seen, scores, 0.0), -1)
    return torch.where(seen, weights, 0.0) @ v


@pytest.mark.parametrize("make", [al.BlockMask.from_kv_blocks, peer.pytorch.BlockMask.from_kv_blocks])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (B, 1), (1, H), (B, H), (1, 2)])
def test_block_lists_restrict_the_function(make, batch, heads):
    """A pair is visible where its block is full, or partial and the function says so."""
    generator = torch.Generator().manual_seed(batch * 10 + heads)
    kinds = torch.randint(0, 3, (batch, heads, 5, 5), generator=generator)
    mask = make(*lists(kinds), BLOCK_SIZE=32, mask_mod=causal, seq_lengths=(Q, K))
    assert torch.equal(mask.to_dense().bool(), kinds > 0)
    q, k, v = peer.operands()
    i, j = torch.arange(Q)[:, None], torch.arange(K)
    kind = kinds.repeat(B // batch, H // heads, 1, 1)[:, :, i // 32, j // 32]
    want = dense(q, k, v, (kind == 2) | ((kind == 1) & (i >= j)))
    torch.testing.assert_close(al.flex_attention(q, k, v, block_mask=mask), want, atol=1e-5, rtol=1e-5)


def test_block_lists_without_function_and_without_full_blocks():
    kinds = torch.eye(5, dtype=torch.int64)[None, None]
    partial_num, partial_idx, _, _ = lists(kinds)
    q, k, v = peer.operands(q_len=160, kv_len=160)
    mask = al.BlockMask.from_kv_blocks(partial_num, partial_idx, BLOCK_SIZE=32)
    assert mask.shape == (1, 1, 160, 160) and mask.full_kv_num_blocks is None
    same_block = torch.arange(160)[:, None] // 32 == torch.arange(160) // 32
    torch.testing.assert_close(al.flex_attention(q, k, v, block_mask=mask), dense(q, k, v, same_block[None, None]))


def test_a_function_assigned_later_keeps_the_blocks():
    mask = al.create_block_mask(lambda b, h, q, k: k < 32, 1, 1, Q, K, BLOCK_SIZE=32)
    mask.mask_mod = causal
    q, k, v = peer.operands()
    i, j = torch.arange(Q)[:, None], torch.arange(K)
    want = dense(q, k, v, ((j < 32) & (i >= j) | ((i < 128) & (j < 32)))[None, None])
    torch.testing.assert_close(al.flex_attention(q, k, v, block_mask=mask), want, atol=1e-5, rtol=1e-5)


def test_block_lists_are_seen_by_the_analysis():
    """Empty blocks cost nothing: the run map of a restricted program skips them."""
    kinds = torch.eye(8, dtype=torch.int64)[None, None] * 2
    mask = al.BlockMask.from_kv_blocks(*lists(kinds), BLOCK_SIZE=128)
    program, values = flex._traced(None, None)
    program = flex._restricted(program, mask.kinds(), (128, 128), 1, 1)
    run_map = al.compile(program).run_map(1, 1, 1024, 1024, **{**values, flex.KINDS: mask.kinds()})
    assert run_map.counts() == (56, 0, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda q, k: q >= k, 1, 1, 8, 8), "needs a mask_mod"),
        ((lambda s, b, h, q, k: s, 1, 1, 8, 8), "needs a mask_mod"),
        ((causal, 1, 1, -1, 8), "Q_LEN must not be negative, got -1"),
        ((causal, 1, 1, 8, -8), "KV_LEN must not be negative, got -8"),
        ((causal, -1, 1, 8, 8), "B must not be negative, got -1"),
        ((causal, 1, 1, 8, 8, None, 0), "BLOCK_SIZE must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(al.UsageError, match=message):
        al.create_block_mask(*arguments)


def test_bad_block_lists():
    with pytest.raises(RuntimeError, match="at least 2 dimensions"):
        al.BlockMask.from_kv_blocks(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    num, idx, full_num, _ = lists(torch.ones(1, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(al.UsageError, match="must be both given or omitted"):
        al.BlockMask.from_kv_blocks(num, idx, full_num)


def test_zero_lengths():
    mask = al.create_block_mask(causal, 1, 1, 0, 0)
    assert mask.sparsity() == 0.0 and mask.numel() == 0
    q, k, v = peer.operands(1, 1, 0, 0)
    assert al.flex_attention(q, k, v, block_mask=mask).shape == (1, 1, 0, peer.D)
