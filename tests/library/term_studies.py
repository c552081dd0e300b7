"""Dense definitions of ``score_terms.attn`` and ``branches.attn``."""

from __future__ import annotations

import torch
from library.records import Setup, Shape
from library.region_cases import draw
from library.study import CROSS, SHAPE, Given, Results, Study, heads, onehot, softmax

Tensor = torch.Tensor

# further score terms


def music(x: Given) -> Results:
    """(q_i . k_j + q_i . Er[j - i]) / sqrt(d), distances clipped at the length of the table."""
    length = x.embedding.shape[1]
    at = (x.j - x.i + length - 1).clamp(0, length - 1)
    position = torch.einsum("bhid,hijd->bhij", x.q, x.embedding[:, at])
    near = x.i // x.block - x.j // x.block <= x.back
    return {"o": softmax(x.s + position * x.factor, x.causal & near) @ x.v}


def relative_conv(x: Given) -> Results:
    """(q_i + u) . k_j + (q_i + v) . R[i - j], with v . R given."""
    content = (x.q + x.u[:, None]) @ x.k.mT
    at = (x.i - x.j).clamp(min=0)
    position = torch.einsum("bhid,hijd->bhij", x.q, x.embedding[:, at]) + x.place[:, at]
    return {"o": softmax((content + position) * x.factor, x.causal) @ x.v}


def latent(x: Given) -> Results:
    """scale (q_nope . k_nope + q_rope . k_rope), the rotated key shared by all heads."""
    return {"o": softmax(x.s + x.q_rope @ x.k_rope[:, None].mT * x.factor, x.causal) @ x.v}


def phantom(x: Given) -> Results:
    """One softmax over q.k + q*.k*, two sums of values."""
    w = softmax(x.s + x.more_q @ x.more_k.mT * x.factor, x.causal)
    return {"o": w @ x.v, "o_more": w @ x.more_v}


def additive(x: Given) -> Tensor:
    return torch.einsum("bhijf,f->bhij", torch.tanh(x.q[:, :, :, None] + x.k[:, :, None]), x.weight)


def show_attend_tell(x: Given) -> Results:
    w = softmax(additive(x))
    return {"o": x.beta[..., None] * (w @ x.v), "received": w.sum(2)}


def neural(x: Given) -> Results:
    """A two-layer network on each pair: w . relu(A_i + C_j)."""
    s = torch.einsum("bhijf,f->bhij", torch.relu(x.q[:, :, :, None] + x.k[:, :, None]), x.weight)
    return {"o": softmax(s, x.causal) @ x.v}


def matching(x: Given) -> Results:
    """Minus the L1 distance, four windows of the pixels round a fractional place, blended bilinearly."""
    y, c = x.j[0] // x.width, x.j[0] % x.width
    s = -x.factor * (x.q[:, :, :, None] - x.k[:, :, None]).abs().sum(-1)
    out = torch.zeros(*s.shape[:3], x.v.shape[-1], dtype=torch.float64)
    for n in range(4):
        top, left = x.corner[..., 0] + n // 2, x.corner[..., 1] + n % 2
        near = (y - top[..., None]).abs() <= x.radius
        mask = near & ((c - left[..., None]).abs() <= x.radius)
        out = out + x.blend[..., n, None] * (softmax(s, mask) @ x.v)
    return {"o": out}


def local_linear(x: Given) -> Results:
    """w'_ij = exp(s_ij) (1 - (k_j - q_i) . rho_i), divided by its sum."""
    z = x.k[:, :, None] - x.q[:, :, :, None]
    w = torch.exp(x.s) * (1 - torch.einsum("bhijd,bhid->bhij", z, x.rho)) * x.causal
    return {"o": w / w.sum(-1, keepdim=True) @ x.v}


def local_moments(x: Given) -> Results:
    w = torch.exp(x.s) * x.causal
    t = torch.einsum("bhijd,bhid->bhij", x.k[:, :, None] - x.q[:, :, :, None], x.direction)
    return {"total": w.sum(-1), "keys_sum": w @ x.k, "along": (w * t).sum(-1), "keys_along": (w * t) @ x.k}


def chosen_maps(x: Given) -> Results:
    """Rows or columns of preserved pixels take the source's map, the others the own one."""
    keep = (x.keep[:, :, None] | x.keep[:, None, :])[:, None]
    source = softmax(x.source_q @ x.source_k.mT * x.factor)
    return {"o": torch.where(keep, source, softmax(x.s)) @ x.v}


def steered(x: Given) -> Results:
    """Foreground rows take the map of the correlation diffuser."""
    source = softmax(x.source_q @ x.source_k.mT * x.factor)
    return {"o": torch.where(x.region[:, None, :, None], source, softmax(x.s)) @ x.v}


def histogram_values(x: Given) -> Results:
    """Weights binned by 3-D offset, for a table of values beside the ordinary output."""
    w = softmax(x.s)
    offset = ((x.query_place[:, :, None] - x.key_place[:, None]) / x.step).floor().long() + 3
    bins = torch.einsum("bhij,bijal->abhil", w, onehot(offset.clamp(0, 5), 6))
    return {"o": w @ x.v, **{f"bins_{axis}": found for axis, found in zip("xyz", bins, strict=True)}}


# branches


def convit(x: Given) -> Results:
    y, c = x.i[:, 0] // x.width, x.i[:, 0] % x.width
    dy, dx = (a[None] - a[:, None] for a in (y, c))
    r = torch.stack([dx, dy, dx**2 + dy**2], -1).double()
    position = torch.einsum("ijf,hf->hij", r, x.position)
    gate = torch.sigmoid(x.gate)[:, None, None]
    return {"o": ((1 - gate) * softmax(x.s) + gate * softmax(position)) @ x.v}


def gated_duo(x: Given) -> Results:
    """alpha times full attention plus 1 - alpha times sinks and a window."""
    stream = x.causal & ((x.j < x.sinks) | (x.i - x.j < x.window))
    alpha = heads(x.alpha)
    return {"o": alpha * (softmax(x.s, x.causal) @ x.v) + (1 - alpha) * (softmax(x.s, stream) @ x.v)}


def self_and_cross(x: Given) -> Results:
    same = (x.image[:, :, None] == x.image[:, None, :])[:, None]
    return {"o_self": softmax(x.s, same) @ x.v, "o_cross": softmax(x.s, ~same) @ x.v}


def bilateral(x: Given) -> Results:
    """Windows of the image and clusters of the features, over the same queries and keys."""
    window = x.i // x.block == x.j // x.block
    cluster = (x.cluster[:, :, None] == x.cluster[:, None, :])[:, None]
    return {"o_image": softmax(x.s, window) @ x.v, "o_feature": softmax(x.s, cluster) @ x.v}


def decoupled(x: Given) -> Results:
    image = softmax(x.image_q @ x.image_k.mT * x.scale, x.seen[:, None, None])
    return {"o": softmax(x.s) @ x.v + x.gate[:, None, None] * (image @ x.image_v)}


def memory(x: Given) -> Results:
    """Causal context, plus tanh(g) times a look at the image tokens seen so far."""
    seen = (x.position[:, None, :] <= x.i)[:, None]
    image = softmax(x.memory_q @ x.image_k.mT * x.scale, seen)
    return {"o": softmax(x.s, x.causal) @ x.v + torch.tanh(x.gate) * (image @ x.image_v)}


def regional(x: Given) -> Results:
    """Each text's own softmax, combined by gates per pixel that are normalised."""
    parts = torch.stack([softmax(x.s, (x.text == g)[:, None, None]) @ x.v for g in range(3)], -1)
    gate = x.gate[:, None, :, None]
    return {"o": (parts * gate).sum(-1) / gate.sum(-1)}


def split(x: Given) -> Results:
    """m times foreground attention plus 1 - m times background attention."""
    front = softmax(x.s, x.front[:, None, None]) @ x.v
    back = softmax(x.s, ~x.front[:, None, None]) @ x.v
    m = x.share[:, None, :, None]
    return {"o": m * front + (1 - m) * back}


def delta(x: Given) -> Results:
    """Sparse attention, plus for each group what dense attention changes in its first row."""
    near = (x.j < x.sinks) | (x.i - x.j < x.window)
    sparse = softmax(x.s, x.causal & near) @ x.v
    dense = softmax(x.s, x.causal) @ x.v
    anchor = (x.i[:, 0] // x.stride) * x.stride
    return {"o": sparse + (dense - sparse)[:, :, anchor]}


def nested(x: Given) -> Results:
    """The subject's value is an attention of its own: sum of w_ij v_j without it, plus w_is times that."""
    inner = softmax(x.q @ x.inner_k.mT * x.scale) @ x.inner_v
    w = softmax(x.s)
    subject = (x.j[0] == x.subject).double()
    return {"o": (w * (1 - subject)) @ x.v + (w * subject).sum(-1, keepdim=True) * inner}


def sorted_and_centres(x: Given) -> Results:
    """Own and next group of the sorted tokens, plus a softmax over the centres."""
    a, b = x.i // x.group, x.j // x.group
    local = softmax(x.s, (b == a) | (b == a + 1)) @ x.v
    return {"o": local + softmax(x.q @ x.center_k.mT * x.scale) @ x.center_v}


def agents(x: Given) -> Results:
    """Agents, the mean queries of blocks, read all tokens, and every token reads the agents."""
    n, d = x.q.shape[2:]
    a = torch.stack([x.q[:, :, t : t + x.block].mean(2) for t in range(0, n, x.block)], 2)
    inner = softmax(a @ x.k.mT * x.scale + x.bias_in) @ x.v
    return {"o": softmax(x.q @ a.mT * d**-0.5 + x.bias_out) @ inner}


def high_and_low(x: Given) -> Results:
    """The first heads attend inside windows, the others to each window's mean key and value."""
    windows = softmax(x.s, x.i // x.block == x.j // x.block) @ x.v
    starts = range(0, x.k.shape[2], x.block)
    k, v = (torch.stack([y[:, :, t : t + x.block].mean(2) for t in starts], 2) for y in (x.k, x.v))
    return {"o": torch.cat([windows[:, : x.local], (softmax(x.q @ k.mT * x.scale) @ v)[:, x.local :]], 1)}


def relational(x: Given) -> Results:
    """sum_j a_ij v_j, and the relations sum_j a_ij <q2_i, k2_j>."""
    w = softmax(x.s)
    found = torch.einsum("bhij,blid,bljd->lbhi", w, x.relation_q, x.relation_k)
    return {"o": w @ x.v, **{f"relation_{n}": part for n, part in enumerate(found)}}


FLOAT = "float"


def features(heads: str = "H", rows: str | int = "K", width: int = 6) -> tuple[tuple[str | int, ...], str]:
    return ("B", heads, rows, width), FLOAT


def make_matching(setup: Setup, g: torch.Generator) -> dict[str, Tensor]:
    s = setup.shape
    corner = torch.randint(0, 3, (s.B, s.H, s.Lq, 2), generator=g, dtype=torch.int32)
    y, x = torch.rand(s.B, s.H, s.Lq, 2, generator=g).unbind(-1)
    blend = torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], -1)
    return {"corner": corner, "blend": blend}


_IMAGE = Shape(2, 2, 1, 12, 12)
_SOURCE = {"source_q": features(rows="Q"), "source_k": features()}

STUDIES: dict[str, Study] = {
    "music_transformer": Study(
        "music_transformer", SHAPE, music, draw(embedding=(("H", 8, 6), FLOAT)), {"block": 4, "back": 1, "factor": 0.4}
    ),
    "relative_conv": Study(
        "relative_conv",
        SHAPE,
        relative_conv,
        draw(u=(("H", 6), FLOAT), place=(("H", 13), FLOAT), embedding=(("H", 13, 6), FLOAT)),
        {"factor": 0.4},
        scale=0.4,
    ),
    "latent": Study(
        "latent",
        SHAPE,
        latent,
        draw(q_rope=features(rows="Q", width=3), k_rope=(("B", "K", 3), FLOAT)),
        {"factor": 0.3},
    ),
    "phantom": Study(
        "phantom",
        SHAPE,
        phantom,
        draw(more_q=features(rows="Q"), more_k=features(), more_v=features(width=4)),
        {"factor": 0.3},
    ),
    "show_attend_tell": Study(
        "show_attend_tell",
        CROSS,
        show_attend_tell,
        draw(weight=((6,), FLOAT), beta=(("B", "H", "Q"), FLOAT)),
        scale=1.0,
    ),
    "neural_attention": Study("neural_attention", SHAPE, neural, draw(weight=((6,), FLOAT)), scale=1.0),
    "match_attention": Study(
        "match_attention", _IMAGE, matching, make_matching, {"width": 4, "radius": 1, "factor": 0.4}, scale=1.0
    ),
    "local_linear": Study("local_linear", SHAPE, local_linear, draw(rho=features(rows="Q"))),
    "local_linear_moments": Study("local_linear_moments", SHAPE, local_moments, draw(direction=features(rows="Q"))),
    "preserved_maps": Study(
        "preserved_maps", SHAPE, chosen_maps, draw(keep=(("B", "K"), 0.4), **_SOURCE), {"factor": 0.4}
    ),
    "steered_rows": Study("steered_rows", SHAPE, steered, draw(region=(("B", "Q"), 0.5), **_SOURCE), {"factor": 0.4}),
    "value_table": Study(
        "value_table",
        CROSS,
        histogram_values,
        draw(query_place=(("B", "Q", 3), "positive"), key_place=(("B", "K", 3), "positive")),
        {"step": 0.2},
        fixed=frozenset({"query_place", "key_place"}),
    ),
    "convit": Study("convit", _IMAGE, convit, draw(position=(("H", 3), FLOAT), gate=(("H",), FLOAT)), {"width": 4}),
    "gated_duo": Study("gated_duo", SHAPE, gated_duo, draw(alpha=(("H",), FLOAT)), {"sinks": 2, "window": 3}),
    "self_and_cross": Study("self_and_cross", SHAPE, self_and_cross, draw(image=(("B", "K"), 2))),
    "bilateral": Study("bilateral", SHAPE, bilateral, draw(cluster=(("B", "K"), 3)), {"block": 4}),
    "decoupled_cross": Study(
        "decoupled_cross",
        CROSS,
        decoupled,
        draw(
            image_q=features(rows="Q"),
            image_k=features(rows=7),
            image_v=features(rows=7, width=5),
            seen=(("B", 7), 0.7),
            gate=(("H",), FLOAT),
        ),
    ),
    "memory_path": Study(
        "memory_path",
        SHAPE,
        memory,
        draw(
            memory_q=features(rows="Q"),
            image_k=features(rows=7),
            image_v=features(rows=7, width=5),
            position=(("B", 7), 9),
            gate=((), FLOAT),
        ),
    ),
    "regional_texts": Study(
        "regional_texts", CROSS, regional, draw(text=(("B", "K"), 3), gate=(("B", "Q", 3), "positive"))
    ),
    "split_cross": Study("split_cross", CROSS, split, draw(front=(("B", "K"), 0.5), share=(("B", "Q"), "positive"))),
    "delta_attention": Study("delta_attention", SHAPE, delta, params={"sinks": 2, "window": 3, "stride": 4}),
    "nested_attention": Study(
        "nested_attention",
        CROSS,
        nested,
        draw(inner_k=features(rows=7), inner_v=features(rows=7, width=5)),
        {"subject": 3},
    ),
    "content_aware_groups": Study(
        "content_aware_groups",
        SHAPE,
        sorted_and_centres,
        draw(center_k=features(rows=4), center_v=features(rows=4, width=5)),
        {"group": 4},
    ),
    "agent_attention": Study(
        "agent_attention",
        SHAPE,
        agents,
        draw(bias_in=(("H", 4, "K"), FLOAT), bias_out=(("H", "Q", 4), FLOAT)),
        {"block": 4},
    ),
    "high_low": Study("high_low", SHAPE, high_and_low, params={"block": 4, "local": 1}),
    "relational": Study(
        "relational",
        CROSS,
        relational,
        draw(relation_q=(("B", 3, "Q", 4), FLOAT), relation_k=(("B", 3, "K", 4), FLOAT)),
    ),
}
