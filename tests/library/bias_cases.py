"""Dense definitions of ``score_bias.attn``."""

from __future__ import annotations

import math
from typing import Any

import torch
from library.records import Case, Points, Setup, cross, floats, ints, square

Tensor = torch.Tensor
Generator = torch.Generator


def positive(name: str, low: float = 0.1) -> Any:
    """Builder of one positive number for each head."""
    return lambda setup, g: {name: torch.rand(setup.shape.H, generator=g) + low}


def make_slopes(setup: Setup, g: Generator) -> dict[str, Any]:
    heads = setup.shape.H
    return {"slope": torch.tensor([2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)])}


def distances(p: Points) -> Tensor:
    """The signed distance from query to key, [Lq, Lk]."""
    return torch.arange(p.shape.Lk).double() - torch.arange(p.shape.Lq)[:, None]


def alibi(s: Tensor, p: Points) -> Tensor:
    return s + torch.einsum("h,qk->hqk", p.tensors["slope"].double(), distances(p))


def symmetric_alibi(s: Tensor, p: Points) -> Tensor:
    return s - torch.einsum("h,qk->hqk", p.tensors["slope"].double(), distances(p).abs())


def softcap(s: Tensor, p: Points) -> Tensor:
    grown = torch.exp(2 * s / p["cap"])
    return p["cap"] * (grown - 1) / (grown + 1)


def gemma2_local(p: Points) -> Tensor:
    return p.rows(lambda i: range(i - p["window"] + 1, i + 1))


def make_relative(setup: Setup, g: Generator) -> dict[str, Any]:
    return {"table": floats((setup.shape.H, 9), g)}


def relative_table(s: Tensor, p: Points) -> Tensor:
    """A Toeplitz matrix cut from the table with its ends repeated."""
    table = p.tensors["table"].double()
    lq, lk, reach = p.shape.Lq, p.shape.Lk, table.shape[1] // 2
    line = torch.cat([table[:, :1].expand(-1, lq), table, table[:, -1:].expand(-1, lk)], 1)
    rows = [line[:, lq + reach - i : lq + reach - i + lk] for i in range(lq)]
    return s + torch.stack(rows, 1) if rows else s


def t5_bucket(relative: Tensor, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    """Bucket of (key - query), with the logarithm in float32 as in the released models."""
    start = torch.zeros_like(relative)
    if bidirectional:
        buckets //= 2
        start = start + (relative > 0) * buckets
        relative = relative.abs()
    else:
        relative = -relative.clamp(max=0)
    exact = buckets // 2
    growth = torch.log(relative.float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    large = (exact + growth.clamp(min=0).long()).clamp(max=buckets - 1)
    return start + torch.where(relative < exact, relative, large)


def make_t5(setup: Setup, g: Generator) -> dict[str, Any]:
    return {"table": floats((32 if setup.shape.Lk > 100 else 8, setup.shape.H), g)}


def t5(bidirectional: bool) -> Any:
    def score(s: Tensor, p: Points) -> Tensor:
        table = p.tensors["table"].double()
        bucket = t5_bucket(distances(p).long(), bidirectional, table.shape[0], p["max_distance"])
        return s + torch.nn.functional.embedding(bucket, table).permute(2, 0, 1)

    return score


def make_kerple(second: str) -> Any:
    def make(setup: Setup, g: Generator) -> dict[str, Any]:
        shape = (setup.shape.H,)
        return {name: torch.rand(shape, generator=g) + 0.1 for name in ("strength", second)}

    return make


def kerple_log(s: Tensor, p: Points) -> Tensor:
    strength, rate = (p.tensors[name].double()[:, None, None] for name in ("strength", "rate"))
    return s - strength * torch.log1p(rate * distances(p).abs())


def kerple_power(s: Tensor, p: Points) -> Tensor:
    strength, power = (p.tensors[name].double()[:, None, None] for name in ("strength", "power"))
    return s - strength * torch.pow(distances(p).abs(), power)


def make_localness(setup: Setup, g: Generator) -> dict[str, Any]:
    s = setup.shape
    center = torch.rand(s.B, s.H, s.Lq, generator=g) * s.Lk
    return {"center": center, "width": torch.rand(s.B, s.H, s.Lq, generator=g) * s.Lk + 2.0}


def localness(s: Tensor, p: Points) -> Tensor:
    center, width = (p.tensors[name].double().unsqueeze(-1) for name in ("center", "width"))
    deviation = width / 2
    return s - (p.k - center).square() / (2 * deviation.square())


def make_forgetting(setup: Setup, g: Generator) -> dict[str, Any]:
    s = setup.shape
    gates = -ints(0, 128, (s.B, s.H, s.Lk), g).double() / 256  # multiples of 1/256: their sums are exact in float32
    return {"decay": gates.cumsum(-1).float(), "_gates": gates}


def forgetting(s: Tensor, p: Points) -> Tensor:
    """D[i, j] is the sum of the log gates of j + 1, ..., i, row by row."""
    gates = p.tensors["_gates"]
    decay = torch.zeros_like(s)
    for i in range(1, p.shape.Lq):
        decay[:, :, i, :i] = decay[:, :, i - 1, :i] + gates[:, :, i, None]
    return s + decay


def make_pair_bias(setup: Setup, g: Generator) -> dict[str, Any]:
    s = setup.shape
    return {"bias": floats((s.B, s.H, s.Lq, s.Lk), g)}


def make_graph(setup: Setup, g: Generator) -> dict[str, Any]:
    """Shortest paths of random graphs, by powers of the adjacency matrix; 7 for far or unreachable."""
    s = setup.shape
    links = torch.rand(s.B, s.Lk, s.Lk, generator=g) < 2.0 / max(s.Lk, 1)
    links = links | links.transpose(1, 2) | torch.eye(s.Lk, dtype=torch.bool)
    reached = torch.eye(s.Lk).expand(s.B, -1, -1)
    distance = torch.zeros(s.B, s.Lk, s.Lk, dtype=torch.int32)
    for _ in range(7):
        distance += reached == 0
        reached = ((reached @ links.float()) > 0).float()
    return {"distance": distance[:, : s.Lq].contiguous(), "table": floats((s.H, 8), g)}


def graph_distance(s: Tensor, p: Points) -> Tensor:
    onehot = torch.nn.functional.one_hot(p.tensors["distance"].long(), 8).double()
    return s + torch.einsum("bqkn,hn->bhqk", onehot, p.tensors["table"].double())


def make_key_bias(setup: Setup, g: Generator) -> dict[str, Any]:
    return {"bias": floats((setup.shape.B, setup.shape.Lk), g)}


def make_token_sizes(setup: Setup, g: Generator) -> dict[str, Any]:
    return {"size": ints(1, 9, (setup.shape.B, setup.shape.Lk), g)}


def make_temperature(setup: Setup, g: Generator) -> dict[str, Any]:
    temperature = floats((setup.shape.H,), g)
    temperature[-1] = 6.0  # above the cap
    return {"temperature": temperature}


def cosine_temperature(s: Tensor, p: Points) -> Tensor:
    return s * p.tensors["temperature"].double().exp().clamp(max=100.0).view(-1, 1, 1)


def make_selective(setup: Setup, g: Generator) -> dict[str, Any]:
    s = setup.shape
    return {"temperature": torch.rand(s.B, s.H, s.Lq, generator=g) + 0.5}


def scalable_softmax(s: Tensor, p: Points) -> Tensor:
    visible = p.tril().sum(-1).double().log()
    return s * p.tensors["strength"].double()[:, None, None] * visible[:, None]


CASES = {
    "alibi": Case("alibi", cross(15, 21), square(231), score=alibi, tensors=make_slopes),
    "causal_alibi": Case("causal_alibi", square(21), square(231), Points.tril, alibi, make_slopes),
    "symmetric_alibi": Case("symmetric_alibi", square(21), square(231), score=symmetric_alibi, tensors=make_slopes),
    "softcap": Case("softcap", square(21, cap=2.0), cross(211, 231, cap=30.0), score=softcap),
    "gemma2_local": Case(
        "gemma2_local", square(21, window=5, cap=1.5), square(231, window=64, cap=50.0), gemma2_local, softcap
    ),
    "relative_table": Case(
        "relative_table", cross(15, 21), cross(231, 199), score=relative_table, tensors=make_relative
    ),
    "t5_bidirectional": Case(
        "t5_bidirectional", square(31, max_distance=16), square(257, max_distance=128), score=t5(True), tensors=make_t5
    ),
    "t5_causal": Case(
        "t5_causal", square(31, max_distance=16), square(257, max_distance=128), Points.tril, t5(False), make_t5
    ),
    "kerple_log": Case("kerple_log", square(21), square(231), Points.tril, kerple_log, make_kerple("rate")),
    "kerple_power": Case("kerple_power", square(21), square(231), Points.tril, kerple_power, make_kerple("power")),
    "localness": Case("localness", cross(15, 21), square(231), score=localness, tensors=make_localness),
    "forgetting": Case("forgetting", square(21), square(231), Points.tril, forgetting, make_forgetting),
    "pair_bias": Case(
        "pair_bias",
        cross(15, 21),
        cross(181, 231),
        score=lambda s, p: s + p.tensors["bias"].double(),
        tensors=make_pair_bias,
    ),
    "graph_distance": Case("graph_distance", cross(15, 21), square(191), score=graph_distance, tensors=make_graph),
    "key_bias": Case(
        "key_bias",
        cross(15, 21),
        square(231),
        score=lambda s, p: s + p.tensors["bias"].double()[:, None, None],
        tensors=make_key_bias,
    ),
    "proportional_attention": Case(
        "proportional_attention",
        cross(15, 21),
        square(231),
        score=lambda s, p: s + p.tensors["size"].double().log()[:, None, None],
        tensors=make_token_sizes,
    ),
    "cosine_temperature": Case(
        "cosine_temperature",
        square(21),
        square(231),
        score=cosine_temperature,
        tensors=make_temperature,
        magnitude=0.25,
    ),
    "selective_temperature": Case(
        "selective_temperature",
        square(21),
        square(231),
        score=lambda s, p: s * p.tensors["temperature"].double()[..., None],
        tensors=make_selective,
    ),
    "scalable_softmax": Case(
        "scalable_softmax", square(21), square(231), Points.tril, scalable_softmax, positive("strength")
    ),
}
