"""Dense definitions of ``basic.attn`` and ``long_context.attn``."""

from __future__ import annotations

from typing import Any

import torch
from library.records import Case, Points, Setup, Shape, cross, flags, ints, square

Tensor = torch.Tensor


def causal_bottom_right(p: Points) -> Tensor:
    return torch.ones(p.shape.Lq, p.shape.Lk, dtype=torch.bool).tril(p.shape.Lk - p.shape.Lq)


def sliding_window(p: Points) -> Tensor:
    return p.rows(lambda i: range(i - p["window"], i + p["window"] + 1))


def causal_sliding_window(p: Points) -> Tensor:
    return p.rows(lambda i: range(i - p["window"], i + 1))


def dilated_window(p: Points) -> Tensor:
    return p.rows(lambda i: (i + step * p["dilation"] for step in range(-p["window"], p["window"] + 1)))


def make_prefix(setup: Setup, g: torch.Generator) -> dict[str, Any]:
    return {"prefix": ints(0, setup.shape.Lk, (setup.shape.B,), g)}


def prefix_lm(p: Points) -> Tensor:
    mask = p.tril().repeat(p.shape.B, 1, 1, 1)
    for b, length in enumerate(p.tensors["prefix"].tolist()):
        mask[b, ..., :length] = True
    return mask


def block_diagonal(p: Points) -> Tensor:
    size = p["block"]
    return p.rows(lambda i: range(i - i % size, i - i % size + size))


def block_causal(p: Points) -> Tensor:
    blocks = -(-p.shape.Lk // p["block"])
    small = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    big = small.repeat_interleave(p["block"], 0).repeat_interleave(p["block"], 1)
    return big[: p.shape.Lq, : p.shape.Lk]


def log_sparse(p: Points) -> Tensor:
    return p.rows(lambda i: [i, *(i - 2**e for e in range(12))])


def make_globals(setup: Setup, g: torch.Generator) -> dict[str, Any]:
    return {"globals": flags((setup.shape.Lk,), 0.1, g)}


def longformer(p: Points) -> Tensor:
    chosen = p.tensors["globals"].nonzero().flatten()
    mask = sliding_window(p)
    mask[chosen, :] = True
    mask[:, chosen] = True
    return mask


def prefix_global(p: Points) -> Tensor:
    mask = sliding_window(p)
    mask[: p["prefix"], :] = True
    mask[:, : p["prefix"]] = True
    return mask


def bigbird_fixed(p: Points) -> Tensor:
    blocks = -(-p.shape.Lk // p["block"])
    distance = torch.arange(blocks)[:, None] - torch.arange(blocks)
    small = distance.abs() <= p["window"]
    chosen = [*range(min(p["first"], blocks)), *range(max(blocks - p["last"], 0), blocks)]
    small[chosen, :] = True
    small[:, chosen] = True
    big = torch.kron(small.int(), torch.ones(p["block"], p["block"], dtype=torch.int32)).bool()
    return big[: p.shape.Lq, : p.shape.Lk]


def sparse_transformer_strided(p: Points) -> Tensor:
    """Section 4.2 of the paper: A1 = {max(0, i - l), ..., i}, A2 = {j <= i: (i - j) mod l = 0}."""
    stride = p["stride"]
    return p.rows(lambda i: {*range(max(0, i - stride), i + 1), *range(i, -1, -stride)})


def sparse_transformer_fixed(p: Points) -> Tensor:
    """A1 = the own block of l up to i; A2 = the last c positions of every block, up to i."""
    stride, summary = p["stride"], p["summary"]

    def visible(i: int) -> set[int]:
        ends = {j for end in range(stride, i + stride + 1, stride) for j in range(end - summary, end)}
        return {j for j in {*range(i // stride * stride, i + 1), *ends} if j <= i}

    return p.rows(visible)


def dilated_segment(p: Points) -> Tensor:
    mask = p.false(p.shape.H)
    for h in range(p.shape.H):
        for start in range(0, p.shape.Lq, p["segment"]):
            stop = min(start + p["segment"], p.shape.Lq)
            members = [i for i in range(start, stop) if (i - h) % p["dilation"] == 0]
            for n, i in enumerate(members):
                mask[h, i, members[: n + 1]] = True
    return mask


def streaming_llm(p: Points) -> Tensor:
    sinks, window = p["sinks"], p["window"]
    return p.rows(lambda i: {*range(min(sinks, i + 1)), *range(max(0, i - window + 1), i + 1)})


def chunked_local(p: Points) -> Tensor:
    return p.rows(lambda i: range(i - i % p["chunk"], i + 1))


CASES = {
    "full": Case("full", square(17), cross(201, 253)),
    "causal": Case("causal", square(19), cross(213, 257), Points.tril),
    "causal_bottom_right": Case("causal_bottom_right", cross(11, 29), cross(187, 255), causal_bottom_right),
    "causal_bottom_right/more_queries": Case(
        "causal_bottom_right", cross(23, 9), Setup(Shape(1, 3, 1, 251, 190)), causal_bottom_right
    ),
    "anti_causal": Case("anti_causal", cross(21, 13), square(233), lambda p: p.q <= p.k),
    "sliding_window": Case("sliding_window", square(23, window=3), cross(245, 209, window=31), sliding_window),
    "causal_sliding_window": Case(
        "causal_sliding_window", square(23, window=5), square(257, window=64), causal_sliding_window
    ),
    "dilated_window": Case(
        "dilated_window", square(29, window=2, dilation=3), square(243, window=9, dilation=4), dilated_window
    ),
    "prefix_lm": Case("prefix_lm", square(17), square(231), prefix_lm, tensors=make_prefix),
    "block_diagonal": Case("block_diagonal", square(22, block=5), cross(219, 247, block=37), block_diagonal),
    "block_causal": Case("block_causal", square(22, block=4), square(247, block=50), block_causal),
    "log_sparse": Case("log_sparse", square(25), square(259), log_sparse),
    "longformer": Case("longformer", square(27, window=2), square(239, window=20), longformer, tensors=make_globals),
    "prefix_global": Case(
        "prefix_global", square(27, prefix=3, window=2), square(239, prefix=17, window=20), prefix_global
    ),
    "bigbird_fixed": Case(
        "bigbird_fixed",
        square(31, block=4, window=1, first=1, last=1),
        square(251, block=16, window=2, first=2, last=1),
        bigbird_fixed,
    ),
    "sparse_transformer_strided": Case(
        "sparse_transformer_strided", square(28, stride=5), square(241, stride=24), sparse_transformer_strided
    ),
    "sparse_transformer_fixed": Case(
        "sparse_transformer_fixed",
        square(28, stride=6, summary=2),
        square(241, stride=32, summary=5),
        sparse_transformer_fixed,
    ),
    "dilated_segment": Case(
        "dilated_segment", square(26, segment=9, dilation=3), square(245, segment=70, dilation=4), dilated_segment
    ),
    "streaming_llm": Case(
        "streaming_llm", square(26, sinks=2, window=4), square(249, sinks=4, window=40), streaming_llm
    ),
    "chunked_local": Case("chunked_local", square(26, chunk=7), square(249, chunk=64), chunked_local),
}
