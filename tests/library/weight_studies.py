"""Dense definitions of ``edited_weights.attn`` and ``normalizers.attn``."""

from __future__ import annotations

import torch
from library.records import Setup, Shape
from library.region_cases import draw
from library.study import CROSS, SHAPE, Given, Results, Study, heads, onehot, softmax

Tensor = torch.Tensor


def plain(x: Given) -> Tensor:
    return softmax(x.s, x.causal)


# weights after the softmax


def head_gates(x: Given) -> Results:
    return {"o": heads(x.gate) * (plain(x) @ x.v)}


def mixture_of_heads(x: Given) -> Results:
    return {"o": x.gate[..., None] * (plain(x) @ x.v)}


def pruned_graph(x: Given) -> Results:
    """Graphormer's bias, kept nodes, gated heads."""
    mask = (x.keep[:, :, None] & x.keep[:, None, :])[:, None]
    bias = torch.einsum("bijn,hn->bhij", onehot(x.distance, x.table.shape[1]), x.table)
    return {"o": heads(x.gate) * (softmax(x.s + bias, mask) @ x.v)}


def toward_identity(x: Given) -> Results:
    u = heads(x.strength)
    return {"o": ((1 - u) * softmax(x.s) + u * torch.eye(x.s.shape[-1]).double()) @ x.v}


def word_weights(x: Given) -> Results:
    return {"o": softmax(x.s) @ (x.v * x.weight[:, None, :, None])}


def refined_words(x: Given) -> Results:
    """Columns of unchanged words come from the source's finished map, the others from the own one."""
    scores = x.source_q @ x.source_k.mT * x.factor
    source = torch.exp(scores - x.source_lse[..., None])
    torch.testing.assert_close(source, softmax(scores))
    kept = x.align >= 0
    moved = source[..., x.align.clamp(min=0).long()]
    return {"o": torch.where(kept, moved, softmax(x.s)) @ x.v}


def make_refined(setup: Setup, g: torch.Generator) -> dict[str, Tensor]:
    s = setup.shape
    q, k = (torch.randn(s.B, s.H, n, 6, generator=g, dtype=torch.float64) for n in (s.Lq, s.Lk))
    lse = torch.logsumexp(q @ k.mT * setup.params["factor"], -1)
    align = torch.tensor([-1, *range(s.Lk - 1)], dtype=torch.int32)
    return {"source_q": q, "source_k": k, "source_lse": lse, "align": align}


def cog(x: Given) -> Results:
    size = torch.exp(x.s.abs()) * x.causal
    return {"o": torch.sign(x.s) * size / size.sum(-1, keepdim=True) @ x.v}


def decayed_linear(x: Given) -> Results:
    """o_i = sum over j <= i of lambda_h ** (i - j) (q_i . k_j) v_j, by the recurrence over a state."""
    lam = torch.exp(-x.slope)[:, None, None]
    state = torch.zeros(*x.k.shape[:2], x.k.shape[-1], x.v.shape[-1], dtype=torch.float64)
    rows = []
    for t in range(x.q.shape[2]):
        state = lam * state + x.k[:, :, t, :, None] * x.v[:, :, t, None, :]
        rows.append(x.q[:, :, t, None, :] @ state * x.scale)
    return {"o": torch.cat(rows, 2)}


def redistributed(x: Given) -> Results:
    """Visual sinks give a share of their weight to the other visual tokens, in proportion, in chosen heads and rows."""
    w = plain(x)
    sink, seen = (x.kind == 2)[:, None, None].double(), (x.kind == 1)[:, None, None].double()
    s_sink, s_seen = (w * sink).sum(-1, keepdim=True), (w * seen).sum(-1, keepdim=True)
    total = s_sink + s_seen
    on = (total >= x.least) & (s_seen >= x.ratio * total)
    moved = w * (1 - x.share * sink) + seen * w * x.share * s_sink / s_seen.clamp(min=1e-300)
    return {"o": torch.where(on, moved, w) @ x.v}


def calibrated(x: Given) -> Results:
    """Sink weights times beta; what is freed goes to the non-sink tokens, but not to the first, so rows sum to 1."""
    w = plain(x)
    first = (x.j == 0).double()
    sink = x.sink[:, None, None].double() * (1 - first)
    rest = (1 - sink) * (1 - first)
    s_sink, s_rest = (w * sink).sum(-1, keepdim=True), (w * rest).sum(-1, keepdim=True)
    moved = w * first + x.beta * w * sink + w * rest * (1 + (1 - x.beta) * s_sink / s_rest.clamp(min=1e-300))
    moved = torch.where(s_rest > 0, moved, w)
    return {"o": torch.where(heads(x.chosen), moved, w) @ x.v}


def entity_weights(x: Given) -> Results:
    mask = (x.entity == 0)[:, None, None] | (x.entity[:, None, None, :] == x.group[:, None, :, None])
    factor = (onehot(x.entity, x.weight.shape[0]) @ x.weight)[:, None, None]
    return {"o": softmax(x.s, mask) * factor @ x.v}


def edited_heads(x: Given) -> Results:
    w = plain(x).clone()
    w[:, x.edited, -1] = x.row[:, x.edited]
    return {"o": w @ x.v}


def recall_rows(x: Given) -> Results:
    """Active rows attend, times their gate; the others give 0."""
    gate = (x.gate * x.active)[:, None, :, None]
    return {"o": gate * (plain(x) @ x.v)}


# other normalisers


def rectified(x: Given) -> Results:
    return {"o": torch.relu(x.s) * x.causal @ x.v}


def laplace(x: Given) -> Results:
    """0.5 (1 + erf((s - mu) / (sigma sqrt 2))), mu = sqrt(1/2), sigma = sqrt(1/(4 pi)), inside causal chunks."""
    n = x.table.shape[0] // 2 + 1
    s = x.s + x.table[x.j - x.i + n - 1]
    mean, deviation = (torch.tensor(value**0.5, dtype=torch.float64) for value in (1 / 2, 1 / (4 * torch.pi)))
    w = torch.distributions.Normal(mean, deviation).cdf(s)
    return {"o": w * (x.causal & (x.i // x.chunk == x.j // x.chunk)) @ x.v}


def fastmax(x: Given) -> Results:
    f = (1 + x.s + x.s**2 / 2) * x.causal
    return {"o": f / f.sum(-1, keepdim=True) @ x.v}


def linear(x: Given) -> Results:
    """phi(q) (phi(k)' v) / (phi(q) sum phi(k)), with products in the linear order; phi is the caller's."""
    state, total = x.k.mT @ x.v, x.k.sum(2, keepdim=True)
    return {"o": x.q @ state / (x.q @ total.mT)}


def unnormalized(x: Given) -> Results:
    return {"o": x.q @ (x.k.mT @ x.v) * x.scale}


def large_kernel(x: Given) -> Results:
    """A depthwise convolution with zero padding."""
    b, h, n, d = x.v.shape
    image = x.v.transpose(2, 3).reshape(b, h * d, x.height, x.width)
    kernel = x.kernel.repeat_interleave(d, 0)[:, None]
    out = torch.nn.functional.conv2d(image, kernel, padding=x.radius, groups=h * d)
    return {"o": out.view(b, h, d, n).transpose(2, 3)}


def injective(x: Given) -> Results:
    """(scale / N) q K'V + (1 - scale q . mean k) mean v: the released, linear form."""
    n = x.k.shape[2]
    mean_k, mean_v = x.k.mean(2, keepdim=True), x.v.mean(2, keepdim=True)
    return {"o": x.scale / n * x.q @ (x.k.mT @ x.v) + (1 - x.scale * x.q @ mean_k.mT) * mean_v}


def standardized(x: Given) -> Results:
    rows = []
    for i in range(x.q.shape[2]):
        s = x.s[:, :, i, : i + 1]
        mean, deviation = s.mean(-1, keepdim=True), s.std(-1, correction=0, keepdim=True)
        w = x.gain[:, None] * (s - mean) / (deviation + x.eps) + x.bias[:, None]
        rows.append(w[:, :, None] @ x.v[:, :, : i + 1])
    return {"o": torch.cat(rows, 2)}


def entmax15(s: Tensor) -> Tensor:
    """alpha = 1.5 by sorting: p = [s / 2 - tau]+ squared (Peters et al., 2019)."""
    z = s / 2
    top = z.sort(-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1)
    mean, square = top.cumsum(-1) / count, (top**2).cumsum(-1) / count
    tau = mean - torch.sqrt(((1 - count * (square - mean**2)) / count).clamp(min=0))
    size = (tau <= top).sum(-1, keepdim=True)
    return torch.relu(z - tau.gather(-1, size - 1)) ** 2


def dense_and_sparse(x: Given) -> Results:
    return {"o": ((1 - x.mix) * softmax(x.s) + x.mix * entmax15(x.s)) @ x.v}


def sentinel(x: Given) -> Results:
    """Softmax over the regions and one more logit, whose value is the sentinel."""
    z = torch.einsum("bhijf,f->bhij", torch.tanh(x.q[:, :, :, None] + x.k[:, :, None]), x.weight)
    a = torch.softmax(torch.cat([z, x.logit[..., None]], -1), -1)
    beta = a[..., -1]
    return {"o": a[..., :-1] @ x.v + beta[..., None] * x.sentinel, "beta": beta}


def mixture_of_gaussians(x: Given) -> Results:
    """alpha_ij = sum over m of weight_im exp(-(j - mean_im)^2 / (2 width_im^2)), no content."""
    j = x.j[None].double()[..., None]
    terms = x.weight[:, :, None] * torch.exp(-((j - x.center[:, :, None]) ** 2) / (2 * x.width[:, :, None] ** 2))
    return {"o": terms.sum(-1)[:, None] @ x.v}


def location(x: Given) -> Results:
    energy = torch.tanh(x.location) @ x.weight + x.prior.log()
    return {"o": softmax(energy[:, None, None].expand(*x.s.shape)) @ x.v}


def sparsemax(s: Tensor) -> Tensor:
    """Projection onto the simplex, by sorting (Martins and Astudillo, 2016)."""
    top = s.sort(-1, descending=True).values
    count = torch.arange(1, s.shape[-1] + 1)
    size = (1 + count * top > top.cumsum(-1)).sum(-1, keepdim=True)
    tau = (top.cumsum(-1).gather(-1, size - 1) - 1) / size
    return torch.relu(s - tau)


def coarse_to_fine(x: Given) -> Results:
    """p(z) = sum over cells of p(cell) p(z | cell)."""

    def energy(k: Tensor) -> Tensor:
        return torch.einsum("bhijf,f->bhij", torch.tanh(x.q[:, :, :, None] + k[:, :, None]), x.weight)

    share, fine = sparsemax(energy(x.coarse_k)), energy(x.k)
    o = torch.zeros(*x.q.shape[:3], x.v.shape[-1], dtype=torch.float64)
    for c in range(share.shape[-1]):
        o = o + share[..., c, None] * (softmax(fine, (x.cell == c)[None, None, None]) @ x.v)
    return {"o": o, "share": share}


def landmark(x: Given) -> Results:
    """Softmax inside each earlier block times the softmax of its landmark among own tokens and landmarks."""
    size = x.block
    rows = []
    for i in range(x.q.shape[2]):
        own = i // size
        marks = [(c + 1) * size - 1 for c in range(own)]
        tokens = list(range(own * size, i + 1))
        top = torch.softmax(x.s[:, :, i, marks + tokens], -1)
        o = top[..., None, own:] @ x.v[:, :, tokens]
        for c in range(own):
            inside = list(range(c * size, (c + 1) * size - 1))
            part = torch.softmax(x.s[:, :, i, inside], -1)[..., None, :] @ x.v[:, :, inside]
            o = o + top[..., c, None, None] * part
        rows.append(o)
    return {"o": torch.cat(rows, 2)}


def late_interaction(x: Given) -> Results:
    """Each image token's best text token among the real ones, and the other way round."""
    s = x.s.masked_fill(~x.real[:, None, None], -torch.inf)
    return {"best": s.amax(-1), "which": s.argmax(-1), "best_image": x.s.amax(2) * x.real[:, None]}


def slots(x: Given) -> Results:
    share = torch.softmax(x.s, 2)
    return {"o": share / share.sum(-1, keepdim=True) @ x.v}


def sinkhorn(x: Given) -> Results:
    """Three rounds of row and column scaling of exp(s / eps) to uniform marginals, then rows once more."""
    plan = torch.exp(x.s / x.eps)
    n, m = plan.shape[-2:]
    for _ in range(3):
        plan = plan / plan.sum(-1, keepdim=True) / n
        plan = plan / plan.sum(-2, keepdim=True) / m
    plan = plan / plan.sum(-1, keepdim=True) / n
    return {"o": plan @ x.v}


def latent_alignment(x: Given) -> Results:
    """Soft context under the prior, a sample by the Gumbel trick, and the KL of the inference network's alignment."""
    prior, log_prior = torch.softmax(x.s, -1), torch.log_softmax(x.s, -1)
    log_post = torch.log_softmax(x.post_q @ x.post_k.mT, -1)
    kl = (log_post.exp() * (log_post - log_prior)).sum(-1)
    return {"o": prior @ x.v, "sample": (x.s + x.noise).argmax(-1), "kl": kl}


_BK, _BH = ("B", "K"), ("B", "H")

STUDIES: dict[str, Study] = {
    "head_gates": Study("head_gates", SHAPE, head_gates, draw(gate=(_BH, "float"))),
    "mixture_of_heads": Study("mixture_of_heads", SHAPE, mixture_of_heads, draw(gate=(("B", "H", "Q"), "float"))),
    "pruned_graph": Study(
        "pruned_graph",
        SHAPE,
        pruned_graph,
        draw(keep=(_BK, 0.7), distance=(("B", "Q", "K"), 5), table=(("H", 5), "float"), gate=(("H",), "float")),
    ),
    "toward_identity": Study("toward_identity", SHAPE, toward_identity, draw(strength=(_BH, "positive"))),
    "word_weights": Study("word_weights", CROSS, word_weights, draw(weight=(_BK, "positive"))),
    "refined_words": Study("refined_words", CROSS, refined_words, make_refined, {"factor": 0.4}),
    "cog": Study("cog", SHAPE, cog),
    "decayed_linear": Study("decayed_linear", SHAPE, decayed_linear, draw(slope=(("H",), "positive"))),
    "redistributed": Study(
        "redistributed", SHAPE, redistributed, draw(kind=(_BK, 3)), {"share": 0.6, "least": 0.2, "ratio": 0.4}
    ),
    "calibrated": Study("calibrated", SHAPE, calibrated, draw(sink=(_BK, 0.3), chosen=(("H",), 0.5)), {"beta": 0.4}),
    "entity_weights": Study(
        "entity_weights",
        CROSS,
        entity_weights,
        draw(entity=(_BK, 4), group=(("B", "Q"), 4), weight=((4,), "positive")),
    ),
    "edited_heads": Study(
        "edited_heads", SHAPE, edited_heads, draw(edited=(("H",), 0.5), row=(("B", "H", "K"), "positive"))
    ),
    "recall_rows": Study(
        "recall_rows", SHAPE, recall_rows, draw(active=(("B", "Q"), 0.5), gate=(("B", "Q"), "positive"))
    ),
    "rectified": Study("rectified", SHAPE, rectified),
    "laplace": Study("laplace", SHAPE, laplace, draw(table=((25,), "float")), {"chunk": 5}),
    "fastmax": Study("fastmax", SHAPE, fastmax),
    "normalized_linear": Study("normalized_linear", CROSS, linear, positive=True),
    "unnormalized_linear": Study("unnormalized_linear", CROSS, unnormalized),
    "large_kernel": Study(
        "large_kernel",
        Shape(2, 2, 1, 12, 12),
        large_kernel,
        draw(kernel=(("H", 3, 3), "float")),
        {"height": 3, "width": 4, "radius": 1},
    ),
    "injective": Study("injective", CROSS, injective),
    "standardized": Study(
        "standardized", SHAPE, standardized, draw(gain=(("H",), "float"), bias=(("H",), "float")), {"eps": 1e-3}
    ),
    "dense_and_sparse": Study("dense_and_sparse", CROSS, dense_and_sparse, params={"mix": 2.0}),
    "sentinel": Study(
        "sentinel",
        CROSS,
        sentinel,
        draw(weight=((6,), "float"), logit=(("B", "H", "Q"), "float"), sentinel=(("B", "H", "Q", 5), "float")),
        scale=1.0,
    ),
    "gaussian_mixture": Study(
        "gaussian_mixture",
        CROSS,
        mixture_of_gaussians,
        draw(weight=(("B", "Q", 3), "positive"), center=(("B", "Q", 3), "float"), width=(("B", "Q", 3), "positive")),
        scale=1.0,
    ),
    "location_attention": Study(
        "location_attention",
        Shape(2, 2, 1, 1, 9),
        location,
        draw(weight=((4,), "float"), location=(("B", "K", 4), "float"), prior=(("B", "K"), "positive")),
        scale=1.0,
    ),
    "coarse_to_fine": Study(
        "coarse_to_fine",
        CROSS,
        coarse_to_fine,
        draw(weight=((6,), "float"), coarse_k=(("B", "H", 3, 6), "float"), cell=(("K",), 3)),
        scale=1.0,
    ),
    "landmark": Study("landmark", SHAPE, landmark, params={"block": 4, "factor": 6**-0.5}),
    "late_interaction": Study("late_interaction", CROSS, late_interaction, draw(real=(_BK, 0.7))),
    "slots": Study("slots", Shape(2, 1, 1, 4, 11), slots),
    "sinkhorn": Study("sinkhorn", Shape(2, 1, 1, 4, 11), sinkhorn, params={"eps": 0.7}),
    "latent_alignment": Study(
        "latent_alignment",
        CROSS,
        latent_alignment,
        draw(
            post_q=(("B", "H", "Q", 4), "float"),
            post_k=(("B", "H", "K", 4), "float"),
            noise=(("B", "H", "Q", "K"), "float"),
        ),
        fixed=frozenset({"noise"}),
    ),
}
