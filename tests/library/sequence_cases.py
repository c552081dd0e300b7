"""Dense definitions of ``sequences.attn``, ``per_head.attn`` and ``multimodal.attn``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from library.records import Case, Points, Setup, Shape, cross, flags, ids_of, ints, split_lengths, square

Tensor = torch.Tensor
Generator = torch.Generator


# sequences.attn


def make_documents(setup: Setup, g: Generator) -> dict[str, Any]:
    lengths = [split_lengths(setup.shape.Lk, 4, g) for _ in range(setup.shape.B)]
    return {"doc": torch.stack([ids_of(x) for x in lengths]), "_lengths": lengths}


def diagonal_blocks(rows: list[int], columns: list[int]) -> Tensor:
    blocks = [torch.ones(r, c) for r, c in zip(rows, columns, strict=True)]
    return torch.block_diag(*blocks).bool()


def document(p: Points) -> Tensor:
    return torch.stack([diagonal_blocks(x, x) for x in p.tensors["_lengths"]])[:, None]


def make_cross_documents(setup: Setup, g: Generator) -> dict[str, Any]:
    s = setup.shape
    rows = [split_lengths(s.Lq, 3, g) for _ in range(s.B)]
    columns = [split_lengths(s.Lk, 3, g) for _ in range(s.B)]
    q_doc, k_doc = (torch.stack([ids_of(x) for x in side]) for side in (rows, columns))
    return {"q_doc": q_doc, "k_doc": k_doc, "_rows": rows, "_columns": columns}


def cross_document(p: Points) -> Tensor:
    pairs = zip(p.tensors["_rows"], p.tensors["_columns"], strict=True)
    return torch.stack([diagonal_blocks(r, c) for r, c in pairs])[:, None]


def make_lengths(setup: Setup, g: Generator) -> dict[str, Any]:
    lengths = ints(1, setup.shape.Lk, (setup.shape.B,), g)
    lengths[-1] = 0
    return {"lengths": lengths}


def padding(p: Points) -> Tensor:
    mask = p.false(p.shape.B, 1)
    for b, length in enumerate(p.tensors["lengths"].tolist()):
        mask[b, :, :, :length] = True
    return mask


def make_jagged(setup: Setup, g: Generator) -> dict[str, Any]:
    rows, columns = split_lengths(setup.shape.Lq, 4, g), split_lengths(setup.shape.Lk, 4, g)
    offsets = torch.tensor([0, *columns]).cumsum(0).to(torch.int32)
    return {"sequence": ids_of(rows), "offsets": offsets, "_rows": rows, "_columns": columns}


def jagged(p: Points) -> Tensor:
    return diagonal_blocks(p.tensors["_rows"], p.tensors["_columns"])


def make_packed_keys(setup: Setup, g: Generator) -> dict[str, Any]:
    lengths = split_lengths(setup.shape.Lk, setup.shape.B, g)
    return {"offsets": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), "_lengths": lengths}


def packed_keys(p: Points) -> Tensor:
    owner = torch.cat([torch.full((n,), b) for b, n in enumerate(p.tensors["_lengths"])])
    return torch.nn.functional.one_hot(owner, p.shape.B).bool().T[:, None, None, :]


def make_shared_prefix(setup: Setup, g: Generator) -> dict[str, Any]:
    prefix = min(setup.params["prefix"], setup.shape.Lk)
    lengths = [[prefix, *split_lengths(setup.shape.Lk - prefix, 3, g)] for _ in range(setup.shape.B)]
    return {"doc": torch.stack([ids_of(x) for x in lengths]), "_lengths": lengths}


def shared_prefix(p: Points) -> Tensor:
    mask = document(p)
    mask[..., : p["prefix"]] = True
    return mask & p.tril()


def random_parents(n: int, g: Generator) -> list[int]:
    """A forest in topological order: -1 for a root, else an earlier token."""
    return [int(torch.randint(-1, max(i, 1), (1,), generator=g)) if i else -1 for i in range(n)]


def paths(parents: list[int]) -> list[list[int]]:
    """The tokens from each token up to its root."""
    out: list[list[int]] = []
    for i, parent in enumerate(parents):
        out.append([i, *(out[parent] if parent >= 0 else [])])
    return out


def make_tree_ancestors(setup: Setup, g: Generator) -> dict[str, Any]:
    drafts = setup.shape.Lq
    table = torch.zeros(drafts, drafts, dtype=torch.bool)
    parents = random_parents(drafts, g)
    for i in range(drafts):
        at = i
        while at >= 0:
            table[i, at] = True
            at = parents[at]
    return {"ancestor": table, "_parents": parents}


def tree_ancestors(p: Points) -> Tensor:
    up, context = paths(p.tensors["_parents"]), p["context"]
    return p.rows(lambda i: [*range(context), *(context + j for j in up[i])])


def walk(parents: list[int]) -> tuple[list[int], list[int]]:
    """Depth-first entry and exit times."""
    children: dict[int, list[int]] = {}
    for i, parent in enumerate(parents):
        children.setdefault(parent, []).append(i)
    enter, leave, clock = [0] * len(parents), [0] * len(parents), 0
    stack = [(i, False) for i in reversed(children.get(-1, []))]
    while stack:
        token, done = stack.pop()
        if done:
            leave[token] = clock
            continue
        enter[token], clock = clock, clock + 1
        stack += [(token, True), *((i, False) for i in reversed(children.get(token, [])))]
    return enter, leave


def make_tree_intervals(setup: Setup, g: Generator) -> dict[str, Any]:
    parents = [random_parents(setup.shape.Lk, g) for _ in range(setup.shape.B)]
    enter, leave = zip(*(walk(x) for x in parents), strict=True)
    as_int = {"enter": torch.tensor(enter), "leave": torch.tensor(leave)}
    return {**{name: value.to(torch.int32) for name, value in as_int.items()}, "_parents": parents}


def tree_intervals(p: Points) -> Tensor:
    return torch.stack([p.rows(paths(x).__getitem__) for x in p.tensors["_parents"]])[:, None]


def make_arrow(setup: Setup, g: Generator) -> dict[str, Any]:
    made = make_documents(setup, g)
    return {"segment": made["doc"], "_lengths": made["_lengths"]}


def arrow(p: Points) -> Tensor:
    mask = document(p)
    for b, lengths in enumerate(p.tensors["_lengths"]):
        mask[b, :, : lengths[0], :] = True
        mask[b, :, :, : lengths[0]] = True
    return mask


# per_head.attn


def per_head(p: Points, visible: Any) -> Tensor:
    """Stack masks [H, Lq, Lk] from ``visible(h, i)``, the keys that query i of head h sees, cut causally."""
    heads = [p.rows(lambda i, h=h: visible(h, i)) for h in range(p.shape.H)]
    return torch.stack(heads) & p.tril()


def make_head_windows(setup: Setup, g: Generator) -> dict[str, Any]:
    return {"window": ints(1, setup.shape.Lk // 2, (setup.shape.H,), g)}


def head_windows(p: Points) -> Tensor:
    windows = p.tensors["window"].tolist()
    return per_head(p, lambda h, i: range(i - windows[h] + 1, i + 1))


def make_moa(setup: Setup, g: Generator) -> dict[str, Any]:
    return {"span": ints(1, setup.shape.Lk // 2, (setup.shape.H,), g)}


def moa(p: Points) -> Tensor:
    spans = p.tensors["span"].tolist()
    return per_head(p, lambda h, i: [*range(p["sinks"]), *range(i - spans[h] + 1, i + 1)])


def make_adaptive_span(setup: Setup, g: Generator) -> dict[str, Any]:
    return {"span": ints(0, 2 * setup.shape.Lk, (setup.shape.H,), g) / 4.0 + 0.125}  # no distance is on a kink


def span_weights(p: Points) -> Tensor:
    """The paper's soft mask m(x) = min(max((R + z - x) / R, 0), 1) by head and distance, spread over the pairs."""
    ramp, span = p["ramp"], p.tensors["span"].double()
    distance = torch.arange(p.shape.Lq).double()
    soft = ((ramp + span[:, None] - distance) / ramp).clamp(0, 1)
    return soft[:, (p.q - p.k).clamp(min=0)[0, 0]]


def adaptive_span(p: Points) -> Tensor:
    return (span_weights(p) > 0) & p.tril()


def adaptive_span_score(s: Tensor, p: Points) -> Tensor:
    soft = span_weights(p)
    return s + torch.where(soft > 0, soft, 1.0).log()  # where it is 0 the pair is masked, and has no gradient


def make_duo(setup: Setup, g: Generator) -> dict[str, Any]:
    return {"retrieval": torch.tensor([True, False])[: setup.shape.Hkv]}


def duo_attention(p: Points) -> Tensor:
    sinks, window = p["sinks"], p["window"]
    streaming = p.rows(lambda i: [*range(sinks), *range(i - window + 1, i + 1)]) & p.tril()
    by_key_head = [p.tril() if full else streaming for full in p.tensors["retrieval"].tolist()]
    return torch.stack(by_key_head).repeat_interleave(p.shape.H // p.shape.Hkv, 0)


def short_long_heads(p: Points) -> Tensor:
    return per_head(p, lambda h, i: range(i - p["window"] + 1 if h < p["short"] else 0, i + 1))


def head_strides(p: Points) -> Tensor:
    mask = p.false(p.shape.H)
    for h in range(p.shape.H):
        mask[h, :, h % p["stride"] :: p["stride"]] = True
    return mask


def make_shards(setup: Setup, g: Generator) -> dict[str, Any]:
    stride = torch.tensor([3, 1], dtype=torch.int32)
    return {"stride": stride, "shard": torch.tensor([1, 0], dtype=torch.int32)}


def context_shards(p: Points) -> Tensor:
    size, blocks = p["block"], -(-p.shape.Lk // p["block"])
    heads = []
    for h in range(p.shape.H):
        g = h * p.shape.Hkv // p.shape.H
        stride, shard = p.tensors["stride"][g].item(), p.tensors["shard"][g].item()
        kept = [kb for kb in range(blocks) if (kb + shard) % stride == 0]
        small = torch.zeros(blocks, blocks, dtype=torch.bool)
        for qb in range(blocks):
            small[qb, [*kept, *range(max(0, qb - p["local"] + 1), qb + 1)]] = True
        heads.append(small.repeat_interleave(size, 0).repeat_interleave(size, 1)[: p.shape.Lq, : p.shape.Lk])
    return torch.stack(heads) & p.tril()


def make_blindsight(setup: Setup, g: Generator) -> dict[str, Any]:
    image = torch.stack([ids_of(split_lengths(setup.shape.Lk, 5, g)) for _ in range(setup.shape.B)])
    image = torch.where(image % 2 == 0, -1, image // 2)  # text, image 0, text, image 1, text
    starts = torch.cat([torch.ones(setup.shape.B, 1, dtype=torch.bool), image[:, 1:] != image[:, :-1]], 1)
    return {"kind": torch.arange(setup.shape.H, dtype=torch.int32) % 4, "image": image, "sink": starts & (image >= 0)}


def blindsight(p: Points) -> Tensor:
    mask = p.tril().repeat(p.shape.B, p.shape.H, 1, 1)
    for b in range(p.shape.B):
        image, sink = p.tensors["image"][b], p.tensors["sink"][b]
        pixels = (image >= 0).nonzero().flatten()
        own = torch.eye(3, dtype=torch.bool)[image[pixels]][:, image[pixels]]
        sinks = sink[pixels].expand(len(pixels), -1)
        seen = {0: torch.ones_like(own), 1: sinks, 2: own, 3: own | sinks}
        for h, kind in enumerate(p.tensors["kind"].tolist()):
            mask[b, h, pixels[:, None], pixels[None, :]] &= seen[kind]
    return mask


# multimodal.attn


def make_transfusion(setup: Setup, g: Generator) -> dict[str, Any]:
    lengths = [split_lengths(setup.shape.Lk, 5, g) for _ in range(setup.shape.B)]
    ids = torch.stack([ids_of(x) for x in lengths])
    return {"image": torch.where(ids % 2 == 1, ids // 2 + 1, 0).to(torch.int32), "_lengths": lengths}


def transfusion(p: Points) -> Tensor:
    mask = p.tril().repeat(p.shape.B, 1, 1, 1)
    for b, lengths in enumerate(p.tensors["_lengths"]):
        edges = torch.tensor([0, *lengths]).cumsum(0).tolist()
        for n in (1, 3):
            mask[b, :, edges[n] : edges[n + 1], edges[n] : edges[n + 1]] = True
    return mask


def block_diffusion(p: Points) -> Tensor:
    """Section 3 of the paper by segments: [block diagonal | offset block causal; nothing | block causal]."""
    half, size = p.shape.Lk // 2, p["block"]
    mask = p.false()
    for start in range(0, half, size):
        stop = min(start + size, half)
        mask[start:stop, start:stop] = True
        mask[start:stop, half : half + start] = True
        mask[half + start : half + stop, half : half + stop] = True
    return mask


def make_scales(setup: Setup, g: Generator) -> dict[str, Any]:
    return {"level": ids_of([n * n for n in range(1, 30)])[: setup.shape.Lk].contiguous()}


def next_scale(p: Points) -> Tensor:
    ends = torch.tensor([n * n for n in range(1, 30)]).cumsum(0)
    return p.rows(lambda i: range(int(ends[ends > i][0])))


def make_mutual(setup: Setup, g: Generator) -> dict[str, Any]:
    shape = (setup.shape.B, setup.shape.Lk)
    return {"image": flags(shape, 0.4, g), "question": flags(shape, 0.3, g)}


def modality_mutual(p: Points) -> Tensor:
    image, question = (p.tensors[name].double() for name in ("image", "question"))
    return p.tril() | torch.einsum("bi,bj->bij", image, question).bool()[:, None]


def make_visual(setup: Setup, g: Generator) -> dict[str, Any]:
    return {"visual": flags((setup.shape.B, setup.shape.Lk), 0.5, g)}


def visual_keys_only(p: Points) -> Tensor:
    mask = p.tril().repeat(p.shape.B, 1, 1, 1)
    for b in range(p.shape.B):
        seen = p.tensors["visual"][b].nonzero().flatten()
        mask[b, 0, seen[:, None], seen[None, :]] = False
        mask[b, 0, seen, seen] = True
    return mask


def text_over_visual(p: Points) -> Tensor:
    visual = min(p["visual"], p.shape.Lk)
    text = torch.ones(p.shape.Lq, p.shape.Lk - visual, dtype=torch.bool).tril()
    return torch.cat([torch.ones(p.shape.Lq, visual, dtype=torch.bool), text], 1)


def make_scale_dit(setup: Setup, g: Generator) -> dict[str, Any]:
    return {"window": ints(-1, 4, (setup.shape.Lk,), g)}


def scale_dit(p: Points) -> Tensor:
    window = p.tensors["window"].tolist()
    low = {j for j, w in enumerate(window) if w == -1}
    return p.rows(lambda i: low | ({j for j, w in enumerate(window) if w == window[i]} if window[i] >= 0 else set()))


def many(tiny: Setup, medium: Setup, mask: Any, tensors: Any = None, program: str | None = None) -> Case:
    kwargs = {} if tensors is None else {"tensors": tensors}
    return Case(program or mask.__name__, tiny, medium, mask, **kwargs)


_ALL = (
    many(square(23), square(251), document, make_documents),
    many(square(23), square(251), lambda p: document(p) & p.tril(), make_documents, "causal_document"),
    many(cross(19, 27), cross(203, 251), cross_document, make_cross_documents),
    many(cross(17, 29), cross(201, 257), padding, make_lengths),
    many(square(29), square(243), lambda p: padding(p) & p.tril(), make_lengths, "causal_padding"),
    many(cross(21, 30), cross(233, 255), jagged, make_jagged),
    many(cross(7, 30), Setup(Shape(3, 4, 2, 129, 255)), packed_keys, make_packed_keys),
    many(square(27, prefix=5), square(247, prefix=60), shared_prefix, make_shared_prefix),
    many(cross(11, 24, context=13), cross(61, 275, context=199), tree_ancestors, make_tree_ancestors),
    many(square(25), square(229), tree_intervals, make_tree_intervals),
    many(square(25), square(229), arrow, make_arrow),
    many(square(25), square(229), head_windows, make_head_windows),
    many(square(25, sinks=2), square(229, sinks=7), moa, make_moa),
    many(square(25, sinks=2, window=4), square(229, sinks=7, window=33), duo_attention, make_duo),
    many(square(25, short=3, window=4), square(229, short=2, window=33), short_long_heads),
    many(cross(13, 25, stride=3), cross(201, 243, stride=4), head_strides),
    many(square(29, block=4, local=2), square(241, block=16, local=3), context_shards, make_shards),
    many(square(29), square(241), blindsight, make_blindsight),
    many(square(29), square(241), transfusion, make_transfusion),
    many(square(26, block=4), square(250, block=16), block_diffusion),
    many(square(30), square(237), next_scale, make_scales),
    many(square(27), square(237), modality_mutual, make_mutual),
    many(square(27), square(237), visual_keys_only, make_visual),
    many(cross(14, 31, visual=17), cross(99, 250, visual=151), text_over_visual),
    many(square(31), square(249), scale_dit, make_scale_dit),
)
CASES = {case.program: replace(case, resizable=case.program != "block_diffusion") for case in _ALL} | {
    "adaptive_span": Case(
        "adaptive_span",
        square(27, ramp=4.0),
        square(237, ramp=32.0),
        adaptive_span,
        adaptive_span_score,
        make_adaptive_span,
    )
}
