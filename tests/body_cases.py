"""Programs whose score term is no dot product, by name, and their operands and captured tensors."""

from __future__ import annotations

import torch

import attnlang as al
from attnlang.ir import Program

__all__ = ["CASES", "leaves", "program"]

Tensor = torch.Tensor

CASES = {
    "additive": """pattern additive(u: float[H, D]):
    term s = sum_d(u[h, d] * tanh(x + y), Q, K)
    mask = k <= q + 2 and k != 3
""",
    "l1": """pattern l1:
    term s = sum_d(abs(x - y), Q, K)
    score = -s
""",
    "gaussian": """pattern gaussian(rate: float[H]):
    term a = sum_d((x - y) ** 2, Q, K)
    score = -a * rate[h] / 8
    weights = w * sigmoid(a)
""",
    "relu": """pattern relu_net(u: float[H, D], out: float[D]):
    term s = sum_d(out[d] * relu(x * u[h, d] + y), Q, K)
    mask = abs(q - k) <= 9
    output received = sum(w, over=q)
""",
    "by_query": """pattern by_query(center: float[B, Lq, D], width: float[B, Lq]):
    term s = sum_d(x * exp(-0.5 * ((k - center[b, q, d]) / width[b, q]) ** 2), Q, K)
    normalize = elementwise(s)
""",
    "by_key": """pattern by_key(shift: float[H, Lk, D], rate: float[H]):
    term s = sum_d(cos(x + shift[h, k, d]) * sin(y), Q, K)
    score = s - rate[h] * abs(q - k)
    mask = k <= q
    normalize = softmax(sink=rate[h])
""",
    "by_pair": """pattern by_pair(rate: float[H]):
    term s = sum_d((x if (q + k + d) % 3 == 0 else -x) * y * exp(-rate[h] * abs(q - k)), Q, K)
""",
}


def program(name: str) -> Program:
    """The program of a case."""
    return al.parse(CASES[name], next(iter(CASES[name].split()[1:])).partition("(")[0].rstrip(":"))


def leaves(name: str, heads: tuple[int, int], lengths: tuple[int, int], dims: tuple[int, int]) -> dict[str, Tensor]:
    """Operands ``q k v`` of two batch elements and the captured tensors of a case, random and in float32."""
    (h, hk), (lq, lk), (d, dv) = heads, lengths, dims
    shapes = {"q": (2, h, lq, d), "k": (2, hk, lk, d), "v": (2, hk, lk, dv)}
    own = {"u": (h, d), "out": (d,), "rate": (h,), "center": (2, lq, d), "width": (2, lq), "shift": (h, lk, d)}
    shapes |= {t.name: own[t.name] for t in program(name).tensors}
    made = {n: torch.randn(shape) for n, shape in shapes.items()}
    positive = {n: made[n].abs() * 0.1 + 0.05 for n in ("rate",) if n in made}
    if "center" in made:
        positive |= {"center": made["center"].abs() * lk / 4, "width": made["width"].abs() + 3.0}
    return made | positive
