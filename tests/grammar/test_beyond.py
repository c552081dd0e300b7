"""Each mechanism of section 6, as text, against the formula written out with dense PyTorch in float64."""

import pytest
import torch

import attnlang as al

B, H, HKV, LQ, LK, D = 2, 4, 2, 10, 12, 8
random = torch.Generator().manual_seed(3)


def draw(*shape):
    return torch.randn(shape, generator=random, dtype=torch.float64)


q, k, v = draw(B, H, LQ, D), draw(B, HKV, LK, D), draw(B, HKV, LK, D)
K, V = (t.repeat_interleave(2, 1) for t in (k, v))
RAW = q @ K.transpose(-1, -2) * D**-0.5
i, j = torch.arange(LQ)[:, None], torch.arange(LK)
CAUSAL = j <= i
S = RAW.masked_fill(~CAUSAL, -torch.inf)
gate, rel, page = torch.rand(H, generator=random, dtype=torch.float64), draw(9, D), torch.tensor([[2, 0, 1], [1, 1, 0]])


def softmax(s, sink=None):
    if sink is None:
        return torch.softmax(s, -1).nan_to_num(0.0)
    wide = torch.cat([s, sink[:, None, None].expand(B, H, LQ, 1)], -1)
    return torch.softmax(wide, -1)[..., :-1]


def relative():
    which = (j - i + 4).clamp(0, 8)
    return torch.einsum("bhqd,qkd->bhqk", q, rel[which])


def paged():
    rows = torch.stack([page[b, torch.arange(LK) // 4] * 4 + torch.arange(LK) % 4 for b in range(B)])
    at = rows[:, None, :, None].expand(B, H, LK, D)
    keys, values = K[:, :1].expand(B, H, LK, D).gather(2, at), V[:, :1].expand(B, H, LK, D).gather(2, at)
    return softmax(q @ keys.transpose(-1, -2) * D**-0.5) @ values


def by_groups():
    e = torch.exp(RAW - RAW.amax(-1, keepdim=True))
    own = e.unflatten(-1, (3, 4)).sum(-1).repeat_interleave(4, -1)
    return (e / own / 3) @ V


def routed():
    means = k.unflatten(2, (3, 4)).mean(3).repeat_interleave(2, 1)
    liking = q @ means.transpose(-1, -2) * D**-0.5
    allowed, own = torch.arange(3) * 4 <= i, i // 4 == torch.arange(3)
    liking = liking.masked_fill(~allowed, -torch.inf).masked_fill(own, torch.inf)
    chosen = torch.zeros(B, H, LQ, 3, dtype=torch.bool).scatter_(-1, liking.topk(2).indices, True) & allowed
    return softmax(S.masked_fill(~chosen.repeat_interleave(4, -1), -torch.inf)) @ V


def gated():
    o = softmax(S) @ V
    return o * o.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * gate[:, None, None]


CASES = {
    "sink": (
        "pattern p(gate: float[H]):\n    mask = k <= q\n    normalize = softmax(sink=gate[h])",
        lambda: {"o": softmax(S, gate) @ V},
    ),
    "elementwise": (
        "pattern p:\n    mask = k <= q\n    normalize = elementwise(sigmoid(s), divisor=count)",
        lambda: {"o": (torch.sigmoid(RAW) * CAUSAL / CAUSAL.sum(-1, keepdim=True)) @ V},
    ),
    "stated": (
        "pattern p:\n    normalize:\n        stat n = sum(1.0)\n        stat c = sum(s / n)\n"
        "        weight = s - c + 1 / n",
        lambda: {"o": (RAW - RAW.mean(-1, keepdim=True) + 1 / LK) @ V},
    ),
    "weights": (
        "pattern p(gate: float[H]):\n    mask = k <= q\n    weights = w * gate[h] if k < 4 else w",
        lambda: {"o": torch.where(j < 4, softmax(S) * gate[:, None, None], softmax(S)) @ V},
    ),
    "outputs": (
        "pattern p:\n    mask = k <= q\n    output received = sum(w, over=q)\n"
        "    output mass = sum(w, over=k, key=k // 4, extent=3)\n    output top = m\n"
        "    output best = argmax(s, over=k)",
        lambda: {
            "o": softmax(S) @ V,
            "received": softmax(S).sum(-2),
            "mass": softmax(S).unflatten(-1, (3, 4)).sum(-1),
            "top": S.amax(-1),
            "best": S.argmax(-1),
        },
    ),
    "terms": (
        "pattern p(rel: float[9, D]):\n    term t = dot(Q, rel[clamp(k - q + 4, 0, 8)])\n    score = s + t",
        lambda: {"o": softmax(RAW + relative()) @ V},
    ),
    "additive": (
        "pattern p:\n    term a = sum_d(tanh(x + y), Q, K)\n    score = a",
        lambda: {"o": softmax(torch.tanh(q[..., :, None, :] + K[..., None, :, :]).sum(-1)) @ V},
    ),
    "addresses": (
        "pattern p(page: int[B, 3]):\n    let row = page[b, k // 4] * 4 + k % 4\n"
        "    keys = K[b, 0, row]\n    values = V[b, 0, row]",
        lambda: {"o": paged()},
    ),
    "positions": (
        "pattern p:\n    position q = q + 2\n    mask = k <= q",
        lambda: {"o": softmax(RAW.masked_fill(j > i + 2, -torch.inf)) @ V},
    ),
    "branches": (
        "pattern p:\n    branch near:\n        mask = k <= q\n    branch all:\n"
        "        normalize = elementwise(relu(s))\n"
        "    output a = sum(w * V, over=k, branch=near)\n    output c = sum(w * V, over=k, branch=all)\n"
        "    rows o[Lq, Dv] = a[b, h, q, d] + c[b, h, q, d]",
        lambda: {"o": softmax(S) @ V + torch.relu(RAW) @ V},
    ),
    "groups": (
        "pattern p:\n    group = k // 4\n    groups = 3\n    normalize:\n        stat m = max(s)\n"
        "        stat own = sum(exp(s - m), by=group)\n        weight = exp(s - m) / own / 3",
        lambda: {"o": by_groups()},
    ),
    "routing": (
        "pattern p:\n    pool kp = mean(K, block=4)\n    attend g:\n        lengths = (Lq, cdiv(Lk, 4))\n"
        "        keys = kp\n"
        "        output like = s\n"
        "    select sel[Lq, cdiv(Lk, 4)] = top(like[b, h, q, k], 2, candidates=k * 4 <= q, forced=q // 4 == k)\n"
        "    mask = sel[b, h, q, k // 4] and k <= q",
        lambda: {"o": routed()},
    ),
    "rows": (
        "pattern p(gate: float[H]):\n    attend a: mask = k <= q\n"
        "    rows o[Lq, Dv] = a[b, h, q, d] * rsqrt(mean_d(a[b, h, q, d] ** 2) + 1e-6) * gate[h]",
        lambda: {"o": gated()},
    ),
    "composition": (
        "pattern causal: mask = k <= q\npattern sink(gate: float[H]): normalize = softmax(sink=gate[h])\n"
        "pattern bent: score = 2 * tanh(s / 2)\npattern p = sink & causal & bent",
        lambda: {"o": softmax((2 * torch.tanh(RAW / 2)).masked_fill(~CAUSAL, -torch.inf), gate) @ V},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_text_means_the_formula(name):
    text, formula = CASES[name]
    program = al.parse(text)
    given = {t.name: {"gate": gate, "rel": rel, "page": page}[t.name] for t in program.tensors}
    found = al.compile(program)(q, k, v, return_aux=True, backend="eager", **given)
    o, aux = found if isinstance(found, tuple) else (found, {})
    made, want = {"o": o, **aux}, formula()
    assert made.keys() == want.keys()
    for result, t in made.items():
        torch.testing.assert_close(t, want[result], msg=lambda m, r=result: f"{r}: {m}")
