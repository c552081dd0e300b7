"""Programs whose keys and values live at addresses of their own, with the tensors of a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import attnlang as al

Tensor = torch.Tensor

TEXT = """
pattern pages(page: int[B, P], static size: int = 8):
    let row = page[b, k // size] * size + k % size
    keys = K[b, 0, row]
    values = V[b, 0, row]
    lengths = (Lq, P * size)
    mask = k <= q + 9

pattern one_batch(page: int[H, P]):
    \"\"\"Every head has pages of its own of one batch element; some are beyond the cache.\"\"\"
    let row = page[h, k // 4] * 4 + k % 4
    keys = K[0, h // 2, row]
    values = V[0, h // 2, row]
    mask = (row + q) % 3 > 0
    normalize = elementwise(sigmoid(s))
    output size = sum(-w * log(w), over=k)

pattern backwards(by: int[H]):
    keys = K[b + 1 - 2 * (b % 2), by[h], Lk - 1 - k]
    values = V[b + 1 - 2 * (b % 2), by[h], Lk - 1 - k]
    mask = q >= k
    score = s * 0.5 - 0.01 * (q - k)
    weights = w * 0.5
    output best = argmax(w, over=k)

pattern heads(by: int[H]):
    keys = K[b, by[h], k]
    values = V[b, by[h], k]
    mask = k <= q
"""


@dataclass(frozen=True)
class Case:
    """A program, its call, and the shape [batch, heads, rows] of k and v."""

    name: str
    shape: tuple[int, int, int]
    tensors: dict[str, Tensor]


def _cases() -> list[Case]:
    g = torch.Generator().manual_seed(3)
    mixed = torch.stack([torch.randperm(9, generator=g)[:5] for _ in range(2)])
    follow = torch.tensor([[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]])
    far = torch.randint(-3, 20, (4, 10), generator=g)
    return [
        Case("pages", (2, 1, 72), {"page": mixed}),
        Case("pages", (2, 1, 72), {"page": follow.to(torch.int32)}),
        Case("one_batch", (1, 2, 37), {"page": far}),
        Case("backwards", (2, 3, 37), {"by": torch.tensor([2, 0, 1, 7])}),
        Case("heads", (2, 3, 37), {"by": torch.tensor([2, 0, -1, 7])}),
    ]


CASES = _cases()
IDS = ["mixed pages", "pages in a row", "one batch", "backwards", "heads"]


def operands(case: Case, dtype: torch.dtype, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [2, 4, 37, features], and k and v that are views of a larger cache."""
    q = torch.randn(2, 4, 37, features).to(dtype)
    batch, heads, rows = case.shape
    k, v = (torch.randn(batch, rows, heads + 1, features).to(dtype).transpose(1, 2)[:, 1:] for _ in range(2))
    return q, k, v


def results(case: Case, q: Tensor, k: Tensor, v: Tensor, backend: str) -> list[Tensor]:
    """Everything a call gives back: the rows, and the declared outputs by name."""
    program = al.parse(TEXT, case.name)
    found = al.compile(program, backend=backend)(q, k, v, return_aux=True, **case.tensors)
    o, rest = found if isinstance(found, tuple) else (found, {})
    return [o, *(rest[name] for name in sorted(rest))]


def check(case: Case, backend: str, dtype: torch.dtype, features: int) -> None:
    """Compare a backend with the float64 executor on the same numbers."""
    q, k, v = operands(case, dtype, features)
    want = results(case, q.double(), k.double(), v.double(), "eager")
    loose = 2e-5 if dtype is torch.float32 else 2e-2
    for a, b in zip(results(case, q, k, v, backend), want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=loose, rtol=loose)
