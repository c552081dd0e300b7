"""Programs whose keys and values live at addresses of their own, with the tensors of a call."""

from __future__ import annotations

from dataclasses import dataclass, field

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

pattern written(step: int, place: float[B, N]):
    \"\"\"Keys and values at computed places: a parameter and an operator that nothing else reads.\"\"\"
    keys = K[b, h % step, int(place[b, k]) + step]
    values = V[b, h % step, int(place[b, k]) + step]
    lengths = (Lq, N)
    mask = k <= q

pattern one_row(at: int[B]):
    \"\"\"All keys of a batch element are one row.\"\"\"
    keys = K[b, h, at[b]]
    values = V[b, h, at[b]]
    mask = k <= q
    normalize = softmax(sink=0)

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
    numbers: dict[str, int] = field(default_factory=dict)


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
        Case("written", (2, 2, 37), {"place": torch.rand(2, 21, generator=g) * 40}, {"step": 2}),
        Case("one_row", (2, 4, 37), {"at": torch.tensor([36, -4])}),
    ]


CASES = _cases()
IDS = ["mixed pages", "pages in a row", "one batch", "backwards", "heads", "written", "one row"]


def operands(case: Case, dtype: torch.dtype, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [2, 4, 37, features], and k and v that are views of a larger cache."""
    q = torch.randn(2, 4, 37, features).to(dtype)
    batch, heads, rows = case.shape
    k, v = (torch.randn(batch, rows, heads + 1, features).to(dtype).transpose(1, 2)[:, 1:] for _ in range(2))
    return q, k, v


def results(case: Case, q: Tensor, k: Tensor, v: Tensor, backend: str) -> list[Tensor]:
    """Everything a call gives back: the rows, and the declared outputs by name."""
    program = al.parse(TEXT, case.name)
    found = al.compile(program, backend=backend)(q, k, v, return_aux=True, **case.tensors, **case.numbers)
    o, rest = found if isinstance(found, tuple) else (found, {})
    return [o, *(rest[name] for name in sorted(rest))]


def check(case: Case, backend: str, dtype: torch.dtype, features: int) -> None:
    """Compare a backend with the float64 executor on the same numbers."""
    q, k, v = operands(case, dtype, features)
    want = results(case, q.double(), k.double(), v.double(), "eager")
    loose = 2e-5 if dtype is torch.float32 else 2e-2
    for a, b in zip(results(case, q, k, v, backend), want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=loose, rtol=loose)
