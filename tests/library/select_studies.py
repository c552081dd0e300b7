"""Dense definitions of ``routing.attn``: keys chosen by a first look at them."""

from __future__ import annotations

import math

import torch
from library.records import Shape
from library.region_cases import draw
from library.study import Given, Results, Study, softmax

Tensor = torch.Tensor


def blocks(x: Tensor, size: int) -> Tensor:
    """Mean of each block of rows; the last may be short."""
    return torch.stack([x[:, :, t : t + size].mean(2) for t in range(0, x.shape[2], size)], 2)


def best(scores: Tensor, count: int) -> Tensor:
    """Which entries are among the ``count`` greatest of their row; -inf never is."""
    order = scores.argsort(-1, descending=True)[..., :count]
    return torch.zeros_like(scores).scatter(-1, order, 1.0).bool() & (scores > -torch.inf)


def covering(shares: Tensor, least: float) -> Tensor:
    """The fewest greatest entries whose sum is at least a share of the whole."""
    order = shares.argsort(-1, descending=True)
    before = shares.gather(-1, order).cumsum(-1) - shares.gather(-1, order)
    taken = before < least * shares.sum(-1, keepdim=True)
    return torch.zeros_like(taken).scatter(-1, order, taken)


def spread(table: Tensor, lq: int, lk: int, rows: int, columns: int) -> Tensor:
    """A table of blocks as a mask of tokens."""
    return table.repeat_interleave(rows, 2)[:, :, :lq].repeat_interleave(columns, 3)[..., :lk]


def moba(x: Given) -> Results:
    with torch.no_grad():
        gate = x.q @ blocks(x.k, x.block).mT
        own, block = x.i // x.block, torch.arange(gate.shape[-1])
        gate = gate.masked_fill(block > own, -torch.inf).masked_fill(block == own, torch.inf)
        seen = spread(best(gate, x.count), *x.s.shape[-2:], 1, x.block)
    return {"o": softmax(x.s, seen & x.causal) @ x.v}


def seer(x: Given) -> Results:
    """A gate over pooled queries and prepared block keys; the last two rows of blocks are dense."""
    with torch.no_grad():
        gate = blocks(x.gate_q, x.block) @ x.gate_k.mT
        n = gate.shape[-1]
        gate = gate.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf)
        table = best(gate, x.count)
        table[:, :, -2:] = True
        table |= torch.eye(n).bool()
        seen = spread(table, *x.s.shape[-2:], x.block, x.block)
    return {"o": softmax(x.s, seen & x.causal) @ x.v}


def biformer(x: Given) -> Results:
    """Gather the keys of the routed regions for each region of queries."""
    regions = x.q.shape[2] // x.region
    routed = (blocks(x.q, x.region) @ blocks(x.k, x.region).mT).topk(x.count, -1).indices
    k, v = (y.unflatten(2, (regions, x.region)) for y in (x.k, x.v))
    out = []
    for r in range(regions):
        at = routed[:, :, r, :, None, None].expand(-1, -1, -1, x.region, -1)
        keys, values = (y.gather(2, at.expand(*at.shape[:-1], y.shape[-1])).flatten(2, 3) for y in (k, v))
        queries = x.q[:, :, r * x.region : (r + 1) * x.region]
        out.append(softmax(queries @ keys.mT * x.scale) @ values)
    return {"o": torch.cat(out, 2)}


def sample(x: Given) -> Results:
    """Column sums of a few exact rows choose stripes that hold a share of the weight."""
    with torch.no_grad():
        rows = softmax(x.s, x.causal)[:, :, :: x.stride]
        stripe = covering(rows.sum(2), x.share)[:, :, None]
    return {"o": softmax(x.s, x.causal & ((x.i - x.j < x.window) | stripe)) @ x.v}


def mosa(x: Given) -> Results:
    """Gather each head's best tokens, attend causally among them, weigh by the router, scatter back."""
    out = torch.zeros(*x.q.shape[:3], x.v.shape[-1], dtype=torch.float64)
    for b in range(x.q.shape[0]):
        for h in range(x.q.shape[1]):
            own = x.router[b, h].topk(x.count).indices.sort().values
            s = x.q[b, h, own] @ x.k[b, h, own].mT * x.scale
            w = softmax(s, own[None] <= own[:, None])
            out[b, h, own] = x.router[b, h, own, None] * (w @ x.v[b, h, own])
    return {"o": out}


def vote(x: Given) -> Results:
    """Softmax votes of all heads for the tokens of a cache; the best, the first and the last are read."""
    with torch.no_grad():
        votes = softmax(x.s).sum((1, 2))
        n = votes.shape[-1]
        fixed = (torch.arange(n) < x.first) | (torch.arange(n) >= n - x.last)
        seen = best(votes.masked_fill(fixed, -torch.inf), x.count) | fixed
    return {"o": softmax(x.s, seen[:, None, None]) @ x.v}


def full_step(x: Given) -> Results:
    """Full attention of a decoding step, and the most attended keys of each key head."""
    w = softmax(x.s)
    row = w.unflatten(1, (x.key_heads, -1)).sum((2, 3))
    return {"o": w @ x.v, "chosen": best(row, x.count)[:, :, None]}


def chosen_keys(x: Given) -> Results:
    groups = x.q.shape[1] // x.chosen.shape[1]
    seen = x.chosen.repeat_interleave(groups, 1) | (x.j >= x.since)
    return {"o": softmax(x.s, seen) @ x.v}


def anchor(x: Given) -> Results:
    """Keys whose pooled score is within theta of the pooled row maximum over first and near keys."""
    near = x.causal & ((x.j < x.first) | (x.i // x.block == x.j // x.block))
    with torch.no_grad():
        top = x.s.masked_fill(~near, -torch.inf).amax(-1, keepdim=True)
        keep = blocks(top, x.block) - blocks(x.q, x.block) @ x.k.mT * x.scale <= x.theta
        seen = spread(keep, *x.s.shape[-2:], x.block, 1)
    return {"o": softmax(x.s, x.causal & (near | seen)) @ x.v}


def sparsifiner(x: Given) -> Results:
    """The best keys by a low-rank guess of the map."""
    with torch.no_grad():
        seen = best(x.code @ x.basis.mT, x.count)
    return {"o": softmax(x.s, seen) @ x.v}


_SHAPE = Shape(2, 2, 1, 18, 18)

STUDIES: dict[str, Study] = {
    "moba": Study("moba", _SHAPE, moba, params={"block": 4, "count": 3}),
    "seer": Study(
        "seer",
        Shape(2, 2, 1, 23, 23),
        seer,
        draw(gate_q=(("B", "H", "Q", 4), "float"), gate_k=(("B", "H", math.ceil(23 / 4), 4), "float")),
        {"block": 4, "count": 2},
        fixed=frozenset({"gate_q", "gate_k"}),
    ),
    "biformer": Study("biformer", Shape(2, 2, 1, 16, 16), biformer, params={"region": 4, "count": 2}),
    "sample_attention": Study("sample_attention", _SHAPE, sample, params={"stride": 5, "share": 0.6, "window": 3}),
    "mosa": Study("mosa", _SHAPE, mosa, draw(router=(("B", "H", "Q"), "positive")), {"count": 6}),
    "token_votes": Study("token_votes", Shape(2, 4, 2, 1, 18), vote, params={"count": 5, "first": 2, "last": 3}),
    "full_step": Study("full_step", Shape(2, 4, 2, 1, 18), full_step, params={"count": 5, "key_heads": 2}),
    "chosen_keys": Study(
        "chosen_keys", Shape(2, 4, 2, 1, 18), chosen_keys, draw(chosen=(("B", "G", 1, "K"), 0.3)), {"since": 15}
    ),
    "anchor": Study("anchor", _SHAPE, anchor, params={"block": 4, "first": 2, "theta": 1.0}),
    "sparsifiner": Study(
        "sparsifiner",
        Shape(2, 2, 1, 14, 14),
        sparsifiner,
        draw(code=(("B", "H", "Q", 3), "float"), basis=(("B", "H", "K", 3), "float")),
        {"count": 4},
        fixed=frozenset({"code", "basis"}),
    ),
}
