"""Dense definitions of ``readouts.attn``: attention read without ever forming its map."""

from __future__ import annotations

import torch
from library.records import Setup, Shape
from library.region_cases import draw
from library.study import CROSS, SHAPE, Given, Results, Study, heads, onehot, softmax

Tensor = torch.Tensor


def plain(x: Given) -> Tensor:
    return softmax(x.s, x.causal)


def attended(w: Tensor, x: Given, **more: Tensor) -> Results:
    return {"o": w @ x.v, **more}


# sums over the keys of a row


def key_mass(x: Given) -> Results:
    """sum_j w_ij m_j for one captured row of marks."""
    w = softmax(x.s)
    return attended(w, x, mass=(w * x.mark[:, None, None]).sum(-1))


def region_mass(x: Given) -> Results:
    w = plain(x)
    return attended(w, x, mass=w @ onehot(x.region, x.regions)[:, None])


def bounded(x: Given) -> Results:
    """Bounded self-attention, and each subject's share of a row's weight."""
    a, b = x.subject[:, None, :, None], x.subject[:, None, None, :]
    w = softmax(x.s, (a == 0) | (b == 0) | (a == b))
    return attended(w, x, mass=w @ onehot(x.subject, x.subjects)[:, None])


def weighted_sources(x: Given) -> Results:
    """Each source's keys scaled by its gain, and the weight that goes to it."""
    source = onehot(x.origin, x.gain.shape[0])
    w = softmax(x.s * (source @ x.gain))
    return attended(w, x, mass=w @ source)


def boosted_image(x: Given) -> Results:
    image = x.image[:, None, None].double()
    e = torch.exp(x.s) * (1 + (x.factor - 1) * image) * x.causal
    w = e / e.sum(-1, keepdim=True)
    return attended(w, x, mass=(w * image).sum(-1))


def visual_heads(x: Given) -> Results:
    """Weight on the image, and the entropy of the weights inside it."""
    w = plain(x)
    inside = w * x.image[:, None, None]
    mass = inside.sum(-1)
    share = inside / mass.clamp(min=1e-300)[..., None]
    entropy = -(share * torch.where(share > 0, share, 1.0).log()).sum(-1)
    return {"o": w @ x.v, "mass": mass, "concentration": entropy}


def knockout(x: Given) -> Results:
    blocked = (onehot(x.group, 3) @ x.blocked.double() @ onehot(x.group, 3).mT).bool()[:, None]
    w = softmax(x.s, x.causal & ~blocked)
    return attended(w, x, mass=w @ onehot(x.group, 3)[:, None])


def distances(x: Given) -> Results:
    """Mean distance of a ViT's attention on the grid, and its histogram over offsets."""
    n = x.s.shape[-1]
    y, c = torch.arange(n) // x.width, torch.arange(n) % x.width
    dy, dx = y[None] - y[:, None], c[None] - c[:, None]
    w = softmax(x.s)
    height = n // x.width
    histogram = torch.zeros(*w.shape[:2], 2 * height - 1, 2 * x.width - 1, dtype=torch.float64)
    for a in range(1 - height, height):
        for b in range(1 - x.width, x.width):
            histogram[:, :, a + height - 1, b + x.width - 1] = (w * ((dy == a) & (dx == b))).sum((-1, -2))
    return attended(w, x, distance=(w * (dy**2 + dx**2).double().sqrt()).sum(-1), offsets=histogram)


def rings(x: Given) -> Results:
    """Weight by Chebyshev distance from the query's patch."""
    n = x.s.shape[-1]
    y, c = torch.arange(n) // x.width, torch.arange(n) % x.width
    ring = torch.maximum((y[None] - y[:, None]).abs(), (c[None] - c[:, None]).abs())
    w = softmax(x.s)
    return attended(w, x, rings=torch.stack([(w * (ring == r)).sum(-1) for r in range(x.count)], -1))


def preplan(x: Given) -> Results:
    """WAAD_i = sum_j w_ij min(i - j, W), FAI_j = mean of w_ij over lo < i - j <= hi."""
    w = plain(x)
    gap = x.i - x.j
    later = ((gap > x.low) & (gap <= x.high)).double()
    return attended(w, x, distance=(w * gap.clamp(max=x.window)).sum(-1), influence=(w * later).sum(2))


# the columns of chosen keys, the rows of chosen queries


def make_tokens(setup: Setup, g: torch.Generator) -> dict[str, Tensor]:
    """Three distinct keys, and their slots."""
    token = torch.randperm(setup.shape.Lk, generator=g)[:3]
    slot = torch.full((setup.shape.Lk,), -1)
    slot[token] = torch.arange(3)
    return {"slot": slot.to(torch.int32)}


def by_slot(x: Given) -> Results:
    """Columns picked from the map, the slots turned round."""
    w = softmax(x.s)
    columns = [w[..., (x.slot == n).nonzero().item()] for n in range(x.tokens)]
    return attended(w, x, maps=torch.stack(columns, -1))


def probes(x: Given) -> Results:
    """The map of other keys, and the ordinary output."""
    return attended(softmax(x.s), x, maps=softmax(x.q @ x.probe.mT * x.scale))


def magnets(x: Given) -> Results:
    """Keys other than global sinks are seen; the heat of content words, and how much each key receives."""
    w = softmax(x.s, ~x.sink[:, None, None])
    return attended(w, x, heat=(w * x.content[:, None, None]).sum(-1), received=w.sum(2))


def query_rows(x: Given) -> Results:
    w = softmax(x.s)
    rows = [w[:, :, (x.slot == n).nonzero().item()] for n in range(x.rows)]
    return attended(w, x, maps=torch.stack(rows, -1))


def class_row(x: Given) -> Results:
    """The class token's row, its entropy, and the row weighed by the values' sizes."""
    w = softmax(x.s)
    row = w[:, :, 0]
    entropy = -(w * w.log()).sum(-1)
    return attended(w, x, row=row, entropy=entropy)


def last_row(x: Given) -> Results:
    w = plain(x)
    entropy = -(w * torch.where(w > 0, w, 1.0).log()).sum(-1)
    return attended(w, x, row=w[:, :, -1], image_mass=(w * x.image[:, None, None]).sum(-1), entropy=entropy)


# sums over the queries of a column


def received(x: Given) -> Results:
    """sum_i r_i w_ij."""
    w = softmax(x.s)
    return attended(w, x, received=torch.einsum("bi,bhij->bhj", x.weight, w))


def causal_received(x: Given) -> Results:
    """Mean weight a key gets from the queries that can see it."""
    w = plain(x)
    n = w.shape[-1]
    return attended(w, x, received=w.sum(2) / torch.arange(n, 0, -1).double())


def diversity(x: Given) -> Results:
    """Cosine of each row of the map with the mean row, from two sums over the row."""
    w = softmax(x.s)
    mean = w.mean(2)
    return attended(w, x, along=torch.einsum("bhij,bhj->bhi", w, mean), square=(w**2).sum(-1), mean=mean)


def gradient_map(x: Given) -> Results:
    """sum_i w_ij relu(dy / dw_ij), with dy / dw_ij = <do_i, v_j>."""
    w = softmax(x.s)
    return attended(w, x, cam=(w * torch.relu(x.grad @ x.v.mT)).sum(2))


def contributions(x: Given) -> Results:
    """w_cls,j (v_j . t): what each patch adds to the class token's output along a text direction."""
    w = softmax(x.s)
    projected = torch.einsum("bhjd,hd->bhj", x.v, x.direction)
    return attended(w, x, contribution=w[:, :, 0] * projected)


def most_similar(x: Given) -> Results:
    """max over other tokens of the similarity."""
    own = torch.eye(x.s.shape[-1]).bool()
    s = x.s.masked_fill(own, -torch.inf)
    return {"closest": s.amax(-1), "which": s.argmax(-1)}


def peaks(x: Given) -> Results:
    """Where each row's weight peaks and how high, and heads switched off."""
    w = plain(x)
    return {"o": heads(x.on.double()) * (w @ x.v), "peak": w.amax(-1), "place": w.argmax(-1)}


def block_maxima(x: Given) -> Results:
    """The largest weight of each block of queries and keys."""
    w = plain(x)
    size = x.block
    blocks = -(-w.shape[-1] // size)
    parts = [[w[:, :, a * size : (a + 1) * size, c * size : (c + 1) * size].amax((-1, -2)) for c in range(blocks)]
             for a in range(blocks)]  # fmt: skip
    return attended(w, x, maxima=torch.stack([torch.stack(row, -1) for row in parts], -2))


def head_outputs(x: Given) -> Results:
    """Each head's output with and without the image, scaled heads."""
    image = x.image[:, None, None]
    seen = plain(x) @ x.v
    return {"o": heads(x.factor) * seen, "with_image": seen, "text_only": softmax(x.s, x.causal & ~image) @ x.v}


_BK, _BQ = ("B", "K"), ("B", "Q")

STUDIES: dict[str, Study] = {
    "key_mass": Study("key_mass", SHAPE, key_mass, draw(mark=(_BK, "float"))),
    "region_mass": Study("region_mass", SHAPE, region_mass, draw(region=(_BK, 4)), {"regions": 3}),
    "bounded_mass": Study("bounded_mass", SHAPE, bounded, draw(subject=(_BK, 3)), {"subjects": 3}),
    "source_mass": Study("source_mass", CROSS, weighted_sources, draw(origin=(("K",), 3), gain=((3,), "positive"))),
    "image_mass": Study("image_mass", SHAPE, boosted_image, draw(image=(_BK, 0.5), factor=((), "positive"))),
    "visual_heads": Study("visual_heads", SHAPE, visual_heads, draw(image=(_BK, 0.6))),
    "knockout_mass": Study("knockout_mass", SHAPE, knockout, draw(group=(_BK, 3), blocked=((3, 3), 0.4))),
    "attention_distance": Study("attention_distance", Shape(2, 2, 1, 12, 12), distances, params={"width": 4}),
    "attention_rings": Study("attention_rings", Shape(2, 2, 1, 12, 12), rings, params={"width": 4, "count": 4}),
    "preplan": Study("preplan", SHAPE, preplan, params={"window": 4, "low": 1, "high": 5}),
    "token_maps": Study("token_maps", CROSS, by_slot, make_tokens, {"tokens": 3}),
    "probe_maps": Study("probe_maps", CROSS, probes, draw(probe=(("B", "H", 5, 6), "float"))),
    "magnets": Study("magnets", CROSS, magnets, draw(sink=(_BK, 0.2), content=(_BK, 0.5))),
    "query_maps": Study(
        "query_maps",
        CROSS,
        query_rows,
        lambda setup, g: {"slot": torch.tensor([-1, 2, -1, -1, 0, -1, 1, -1, -1, -1, -1], dtype=torch.int32)},
        {"rows": 3},
    ),
    "class_row": Study("class_row", SHAPE, class_row),
    "last_row": Study("last_row", SHAPE, last_row, draw(image=(_BK, 0.5))),
    "received": Study("received", CROSS, received, draw(weight=(_BQ, "float"))),
    "causal_received": Study("causal_received", SHAPE, causal_received),
    "diversity": Study("diversity", CROSS, diversity),
    "gradient_map": Study("gradient_map", CROSS, gradient_map, draw(grad=(("B", "H", "Q", 5), "float"))),
    "contributions": Study("contributions", SHAPE, contributions, draw(direction=(("H", 5), "float"))),
    "most_similar": Study("most_similar", SHAPE, most_similar),
    "peaks": Study("peaks", SHAPE, peaks, draw(on=(("H",), 0.6))),
    "block_maxima": Study("block_maxima", SHAPE, block_maxima, params={"block": 4}),
    "head_divergence": Study(
        "head_divergence", SHAPE, head_outputs, draw(image=(_BK, 0.5), factor=(("H",), "positive"))
    ),
}
