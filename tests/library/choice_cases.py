"""Dense definitions of ``choices.attn`` and ``summaries.attn``."""

from __future__ import annotations

import math
from typing import Any

import torch
from library.records import Case, Points, Setup, Shape, floats, ints, light, small
from library.region_cases import draw

Tensor = torch.Tensor
Generator = torch.Generator


# choices.attn


def routed_heads(p: Points) -> Tensor:
    mask = p.false(p.shape.B, p.shape.H)
    for b, h in torch.cartesian_prod(torch.arange(p.shape.B), torch.arange(p.shape.H)).tolist():
        own = p.tensors["keep"][b, h].nonzero().flatten()
        for n, i in enumerate(own):
            mask[b, h, i, own[: n + 1]] = True
    return mask


def make_types(setup: Setup, g: Generator) -> dict[str, Any]:
    s = setup.shape
    kind = ints(0, 3, (s.B, s.Hkv, s.Lk), g)
    expiry = torch.full_like(kind, s.Lk)
    for j in range(s.Lk - 2, -1, -1):
        expiry[..., j] = torch.where(kind[..., j + 1] == 0, j + 1, expiry[..., j + 1])
    return {"kind": kind, "expiry": expiry}


def token_types(p: Points) -> Tensor:
    kind = p.listed("kind")

    def seen(b: int, h: int, i: int, j: int) -> bool:
        mine = kind[b][h * p.shape.Hkv // p.shape.H]
        if j > i or mine[j] == 0:
            return j <= i
        if mine[j] == 1:
            return 0 not in mine[j + 1 : i]  # no global token strictly between: it lives until the next one
        return i - j < p["window"]

    return p.pairs("bh", seen)


def task_heads(p: Points) -> Tensor:
    whole, middle = p.listed("whole"), p.listed("middle")

    def seen(b: int, h: int, i: int, j: int) -> bool:
        near = j in range(p["sinks"]) or i - j in range(p["recent"])
        return j <= i and (whole[b][h] or near or middle[b][h][j])

    return p.pairs("bh", seen)


KEPT = 5


def make_importance(setup: Setup, g: Generator) -> dict[str, Any]:
    s = setup.shape
    importance = floats((s.B, s.Hkv, s.Lk), g)
    best = [importance[..., : i + 1].topk(min(KEPT, i + 1), -1).values[..., -1] for i in range(s.Lq)]
    return {"importance": importance, "threshold": torch.stack(best, -1)}


def dynamic_mask(p: Points) -> Tensor:
    """The top keys of each prefix, by sorting it."""
    importance = p.tensors["importance"].detach().repeat_interleave(p.shape.H // p.shape.Hkv, 1)
    mask = p.false(p.shape.B, p.shape.H)
    for i in range(p.shape.Lq):
        best = importance[..., : i + 1].argsort(-1, descending=True)[..., :KEPT]
        mask[:, :, i].scatter_(-1, best, True)
    return mask


def dynamic_score(s: Tensor, p: Points) -> Tensor:
    return s + p.floats("importance").repeat_interleave(p.shape.H // p.shape.Hkv, 1)[:, :, None]


def stripes(p: Points) -> Tensor:
    band = p.rows(lambda i: range(i - p["window"] + 1, i + 1))
    return (band | p.tensors["stripe"][:, :, None]) & p.tril()


def make_bag(setup: Setup, g: Generator) -> dict[str, Any]:
    """Half of the four greatest logits of each branch are dropped."""
    s = setup.shape
    logit = floats((s.B, s.Lq, s.Lk), g)
    top = logit.topk(4, -1).indices[..., ::2]
    return {"logit": logit, "dropped": torch.zeros(s.B, s.Lq, s.Lk).scatter(-1, top, 1.0).bool()}


def make_sets(setup: Setup, g: Generator) -> dict[str, Any]:
    """Three windows of voxels in random token order, cut into sets of at most four."""
    s = setup.shape
    sizes = [9, 4, s.Lk - 13]
    order = torch.stack([torch.randperm(s.Lk, generator=g) for _ in range(s.B)])
    window = torch.cat([torch.full((n,), w) for w, n in enumerate(sizes)])
    rank = torch.cat([torch.arange(n) for n in sizes])
    sets = torch.tensor([[math.ceil(n / 4) for n in sizes]] * s.B)
    made = {"window": window[order], "rank": rank[order], "voxels": torch.tensor([sizes] * s.B), "sets": sets}
    return {name: x.to(torch.int32) for name, x in made.items()}


def sorted_sets(p: Points) -> Tensor:
    """Cut the sorted voxels of each window by the paper's floor(rank * sets / voxels), set by set."""
    mask = p.false(p.shape.B, 1)
    for b in range(p.shape.B):
        window, rank = p.tensors["window"][b], p.tensors["rank"][b]
        for w in range(3):
            members = (window == w).nonzero().flatten()
            members = members[rank[members].argsort()]
            sets = int(p.tensors["sets"][b, w])
            number = [math.floor(n * sets / len(members)) for n in range(len(members))]
            for c in range(sets):
                own = members[torch.tensor(number) == c]
                mask[b, 0, own[:, None], own] = True
    return mask


def make_points(setup: Setup, g: Generator) -> dict[str, Any]:
    s = setup.shape
    rank = torch.stack([torch.randperm(s.Lk, generator=g) for _ in range(s.B)]).to(torch.int32)
    return {"rank": rank, "count": torch.tensor([s.Lk] * s.B, dtype=torch.int32)}


def flattened_groups(p: Points) -> Tensor:
    """Sort, cut, and let the short last group read the last points."""
    mask = p.false(p.shape.B, 1)
    for b in range(p.shape.B):
        order = p.tensors["rank"][b].argsort()
        for part in order.split(p["group"]):
            keys = part if len(part) == p["group"] else order[-p["group"] :]
            mask[b, 0, part[:, None], keys] = True
    return mask


def make_voxels(setup: Setup, g: Generator) -> dict[str, Any]:
    s, long = setup.shape, setup.params["long"]
    return {"place": ints(0, 2 * long, (s.B, s.Lk, 3), g), "table": floats((s.H, 3, 2 * long - 1), g)}


def tri_plane(p: Points) -> Tensor:
    """The union of the windows (L, L, t), (L, t, L) and (t, L, L)."""
    place, thin, long = p.tensors["place"], p["thin"], p["long"]
    mask = p.false(p.shape.B, 1)
    for sizes in ((long, long, thin), (long, thin, long), (thin, long, long)):
        cell = place // torch.tensor(sizes)
        mask |= (cell[:, :, None] == cell[:, None]).all(-1)[:, None]
    return mask


def tri_plane_score(s: Tensor, p: Points) -> Tensor:
    table, place = p.floats("table"), p.tensors["place"].long()
    reach = p["long"] - 1
    offset = (place[:, None] - place[:, :, None]).clamp(-reach, reach) + reach
    return s + sum(table[:, a][:, offset[..., a]].transpose(0, 1) for a in range(3))


# summaries.attn


def block_summary(p: Points) -> Tensor:
    return p.rows(lambda c: range(c * p["block"], (c + 1) * p["block"]))


def combiner(p: Points) -> Tensor:
    n, size = p.shape.Lq, p["block"]
    return p.rows(lambda i: [*range(i - i % size, i + 1), *(n + r for r in range(i // size))])


def core_context(p: Points) -> Tensor:
    """Tokens back to the first group that is wholly farther than the window; core tokens for that group and before."""
    group, window = p["group"], p["window"]
    cores = p.shape.Lq // group

    def visible(i: int) -> list[int]:
        first = i + 1 - window  # tokens at first and later are near
        whole = max(0, first // group)  # groups 0 .. whole - 1 end before the window
        return [*range(whole), *(cores + t for t in range(whole * group, i + 1))]

    return p.rows(visible)


def compensation(p: Points) -> Tensor:
    prompt, sinks, window = p["prompt"], p["sinks"], p["window"]
    cache = [j for j in range(prompt) if j < sinks or j >= prompt - window]
    extra = [p.shape.Lk - 1] if len(cache) < prompt else []
    full = p.listed("retrieval")

    def seen(h: int, i: int, j: int) -> bool:
        new = range(prompt, prompt + i + 1)
        return j in new or j in (range(prompt) if full[h * p.shape.Hkv // p.shape.H] else cache + extra)

    return p.pairs("h", seen)


def compensation_score(s: Tensor, p: Points) -> Tensor:
    dropped = p["prompt"] - p["sinks"] - p["window"]
    return torch.cat([s[..., :-1], s[..., -1:] + math.log(dropped)], -1)


def chunk_states(p: Points) -> Tensor:
    chunks = p.shape.Lk - p.shape.Lq
    return p.rows(lambda i: [*range(i // p["chunk"]), chunks + i])


def meta_window(p: Points) -> Tensor:
    meta, window = p["meta"], p["window"]
    return p.rows(lambda i: [*range(meta), *(meta + t for t in range(max(0, i - window + 1), i + 1))])


_BHK = ("B", "H", "K")
_RAZOR = Setup(Shape(2, 4, 2, 6, 27), {"prompt": 20, "sinks": 2, "window": 5})

CASES: dict[str, Case] = {
    "routed_heads": light("routed_heads", small(22), routed_heads, tensors=draw(keep=(_BHK, 0.5))),
    "token_types": light("token_types", Setup(Shape(2, 4, 2, 22, 22), {"window": 4}), token_types, tensors=make_types),
    "task_heads": light(
        "task_heads",
        Setup(Shape(2, 3, 1, 24, 24), {"sinks": 2, "recent": 4}),
        task_heads,
        tensors=draw(whole=(("B", "H"), 0.4), middle=(_BHK, 0.2)),
    ),
    "dynamic_mask": light(
        "dynamic_mask", Setup(Shape(2, 4, 2, 23, 23)), dynamic_mask, dynamic_score, tensors=make_importance
    ),
    "stripes": light("stripes", small(24, window=5), stripes, tensors=draw(stripe=(_BHK, 0.2))),
    "skip_top_instances": light(
        "skip_top_instances",
        small(5, 26),
        lambda p: ~p.tensors["dropped"][:, None],
        lambda s, p: s * 0.0 + p.floats("logit")[:, None],
        tensors=make_bag,
    ),
    "sorted_sets": light("sorted_sets", small(24), sorted_sets, tensors=make_sets),
    "flattened_groups": light("flattened_groups", small(26, group=8), flattened_groups, tensors=make_points),
    "tri_plane": light("tri_plane", small(24, thin=1, long=3), tri_plane, tri_plane_score, tensors=make_voxels),
    "block_summary": light("block_summary", small(5, 23, block=5), block_summary),
    "combiner": light("combiner", small(22, 27, block=5), combiner),
    "core_context": light("core_context", small(22, 27, group=4, window=8), core_context),
    "compensation": light(
        "compensation",
        _RAZOR,
        compensation,
        compensation_score,
        tensors=lambda setup, g: {"retrieval": torch.tensor([True, False])},
    ),
    "chunk_states": light("chunk_states", small(22, 27, chunk=5), chunk_states),
    "meta_window": light("meta_window", small(22, 25, meta=3, window=5), meta_window),
    "head_pair_table": light(
        "head_pair_table",
        small(6, 23),
        score=lambda s, p: s + p.floats("bias"),
        tensors=draw(bias=(("H", "Q", "K"), "float")),
    ),
}
