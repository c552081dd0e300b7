"""Programs that once went wrong where rows stages met kernels."""

from __future__ import annotations

import pytest
import torch

import attnlang as al
from attnlang.runtime import cpp_common

Tensor = torch.Tensor

CASES = {
    # only a number of each row, no rows of the output
    "no rows": (
        """
pattern p():
    rows turned[Lq, D] = 2.0 * Q[b, h, q, d]
    attend x:
        queries = turned
        mask = k <= q
        output most = max(s, over=k)
    return most
""",
        {},
    ),
    "no attention": (
        """
pattern p(g: float[D]):
    rows m[Lq, D] = Q[b, h, q, d] * g[d]
    return m
""",
        {"g": (12,)},
    ),
    # the rows change an output, and are the queries of the next stage
    "between two": (
        """
pattern p(g: float[Dv]):
    attend a:
        mask = k <= q
    rows m[Lq, D] = a[b, h, q, d] * g[d]
    attend o:
        queries = m
        mask = k <= q
    return o
""",
        {"g": (12,)},
    ),
    # outputs have names of sums that a kernel saves for its gradients
    "names of sums": (
        """
pattern p():
    attend inner:
        mask = k <= q
        output a1 = sum(w * V, over=k)
        output a3 = sum(w * w, over=k)
    rows o[Lq, Dv] = a1[b, h, q, d] * a3[b, h, q]
    return o
""",
        {},
    ),
    # a captured tensor has the name of the table that the stage would read
    "name of a table": (
        """
pattern p(turned_table0: float[Lq, Lk], x: float[D]):
    rows turned[Lq, D] = Q[b, h, q, d] * cos(x[d] * q)
    queries = turned
    score = s + turned_table0[q, k]
""",
        {"turned_table0": (9, 11), "x": (12,)},
    ),
    # Hkv is that of the call, whatever keys a stage has
    "other heads": (
        """
pattern p(old_k: float[B, G, Lk, D], old_v: float[B, G, Lk, Dv]):
    attend inner:
        keys = old_k
        values = old_v
    rows o[Lq, Dv] = inner[b, h, q, d] * (Hkv + 1) + V[b, h * Hkv // H, q, d]
""",
        {"old_k": (2, 4, 11, 12), "old_v": (2, 4, 11, 12)},
    ),
    # elements of p in rows, and the parameter `row`; elements of t_x, and the tensor x_row
    "names in C++": (
        """
pattern p(p: float[N], row: int = 3, t_x: float[Lq], x_row: float[Lq]):
    rows turned[Lq, D] = Q[b, h, q, d] * p[row + q] * p[q] + t_x[q] * x_row[q]
    queries = turned
    mask = k <= q
""",
        {"p": (14,), "t_x": (9,), "x_row": (9,)},
    ),
}
FALLS_BACK = {"name of a table", "other heads", "no attention"}
"""Programs whose rows no kernel of attention takes in."""


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("name", list(CASES))
def test_against_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken_in = []
    run = cpp_common.Loaded.run

    def spy(loaded, *args):
        taken_in.append(any(getattr(loaded.plan, m, None) is not None for m in ("before", "after")))
        return run(loaded, *args)

    monkeypatch.setattr(cpp_common.Loaded, "run", spy)
    text, shapes = CASES[name]
    attention = al.compile(al.parse(text))
    given = [torch.randn(2, 4, 9, 12), torch.randn(2, 2, 11, 12), torch.randn(2, 2, 11, 12)]
    given += [torch.randn(shape) for shape in shapes.values()]
    exact = [t.double() for t in given]

    def results(leaves: list[Tensor]) -> list[Tensor]:
        made = attention(*leaves[:3], **dict(zip(shapes, leaves[3:], strict=True)), return_aux=True)
        return [*made.values()] if isinstance(made, dict) else [made[0], *made[1].values()]

    for got, want in zip(results(given), results(exact), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    assert any(taken_in) == (name not in FALLS_BACK)

    def gradients(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in leaves]
        loss = sum((t.sin().sum() for t in results(leaves)), torch.zeros(()))
        return torch.autograd.grad(loss, leaves, materialize_grads=True)

    for got, want in zip(gradients(given), gradients(exact), strict=True):
        size = max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-4 * size)


def test_no_rows_keep_their_history() -> None:
    text = """
pattern p():
    attend inner:
        mask = k <= q
    rows o[Lq, Dv] = inner[b, h, q, d] + mean_d(inner[b, h, q, d])
"""
    q = torch.randn(1, 2, 0, 8, requires_grad=True)
    made = al.compile(al.parse(text))(q, torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    made.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape
