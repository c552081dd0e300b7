"""Rows of the catalogue that take more than one call, or tables made from queries: whole formulas, with gradients.

Each is written twice, from the paper in plain PyTorch and with programs of the library, in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import attnlang as al
from attnlang import library

Tensor = torch.Tensor
B, H, D = 2, 2, 6
SCALE = D**-0.5


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


def agree(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Both functions give the same output and the same gradients."""
    got, want = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    seed = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for mine, other in zip(
        torch.autograd.grad(got, inputs, seed), torch.autograd.grad(want, inputs, seed), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


def softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    return torch.softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf), -1)


def eager(program: str) -> al.Attention:
    return al.compile(getattr(library, program), backend="eager")


def test_botnet() -> None:
    """s_ij = q_i . k_j + q_i . (r_h[dy] + r_w[dx]), gradients to the embeddings."""
    height, width = 3, 4
    n = height * width
    inputs = draw((B, H, n, D), (B, H, n, D), (B, H, n, D), (2 * height - 1, D), (2 * width - 1, D))
    y, x = torch.arange(n) // width, torch.arange(n) % width
    dy, dx = (a[None, :] - a[:, None] + side - 1 for a, side in ((y, height), (x, width)))

    def dense(q: Tensor, k: Tensor, v: Tensor, rh: Tensor, rw: Tensor) -> Tensor:
        position = torch.einsum("bhid,ijd->bhij", q, rh[dy] + rw[dx])
        return softmax((q @ k.mT + position) * SCALE) @ v

    def ours(q: Tensor, k: Tensor, v: Tensor, rh: Tensor, rw: Tensor) -> Tensor:
        tables = {"rows": q @ rh.T * SCALE, "columns": q @ rw.T * SCALE}
        return eager("botnet")(q, k, v, height=height, width=width, **tables)

    agree(ours, dense, inputs)


def test_halonet() -> None:
    height, width, block, radius = 4, 4, 2, 1
    n, reach = height * width, block + radius
    inputs = draw((B, H, n, D), (B, H, n, D), (B, H, n, D), (H, 2 * reach - 1, D), (H, 2 * reach - 1, D))
    y, x = torch.arange(n) // width, torch.arange(n) % width
    dy, dx = (a[None, :] - a[:, None] for a in (y, x))
    top, left = (a // block * block for a in (y, x))
    near = [(a >= t[:, None] - radius) & (a < t[:, None] + reach) for a, t in ((y, top), (x, left))]
    mask = near[0] & near[1]

    def dense(q: Tensor, k: Tensor, v: Tensor, rh: Tensor, rw: Tensor) -> Tensor:
        at = [(d.clamp(1 - reach, reach - 1) + reach - 1) for d in (dy, dx)]
        position = torch.einsum("bhid,hijd->bhij", q, rh[:, at[0]] + rw[:, at[1]])
        return softmax(q @ k.mT * SCALE + position, mask) @ v

    def ours(q: Tensor, k: Tensor, v: Tensor, rh: Tensor, rw: Tensor) -> Tensor:
        tables = {"rows": q @ rh.mT, "columns": q @ rw.mT}
        return eager("halonet")(q, k, v, height=height, width=width, block=block, radius=radius, **tables)

    agree(ours, dense, inputs)


def test_slot_attention() -> None:
    """Softmax over slots, then each slot takes the mean of the inputs by its share of them."""
    slots, n = 4, 11
    inputs = draw((B, 1, slots, D), (B, 1, n, D), (B, 1, n, D))

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share = torch.softmax(q @ k.mT * SCALE, 2)
        return share / share.sum(-1, keepdim=True) @ v

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, column = eager("full")(k, q, q, return_lse=True)
        return eager("head_key_bias")(q, k, v, bias=-column)

    agree(ours, dense, inputs)


def test_head_embeddings() -> None:
    """One projection for all heads; head h adds e_h to queries, keys and values."""
    n = 9
    inputs = draw((B, 1, n, D), (B, 1, n, D), (B, 1, n, D), (3, H, 1, D))

    def dense(q: Tensor, k: Tensor, v: Tensor, e: Tensor) -> Tensor:
        return softmax((q + e[0]) @ (k + e[1]).mT * SCALE) @ (v + e[2])

    def ours(q: Tensor, k: Tensor, v: Tensor, e: Tensor) -> Tensor:
        bias = torch.einsum("bjd,hd->bhj", k[:, 0], e[0, :, 0]) * SCALE
        return eager("head_key_bias")(q.expand(-1, H, -1, -1), k, v, bias=bias) + e[2] + 0.0 * e[1]

    agree(ours, dense, inputs)


def test_agent_attention() -> None:
    """softmax(Q A' + B2) (softmax(A K' + B1) V), agents pooled from the queries."""
    n, agents = 12, 3
    inputs = draw((B, H, n, D), (B, H, n, D), (B, H, n, D), (H, agents, n), (H, n, agents))

    def pool(q: Tensor) -> Tensor:
        return q.view(B, H, agents, n // agents, D).mean(3)

    def dense(q: Tensor, k: Tensor, v: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        a = pool(q)
        return softmax(q @ a.mT * SCALE + b2) @ (softmax(a @ k.mT * SCALE + b1) @ v)

    def ours(q: Tensor, k: Tensor, v: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        a, attention = pool(q), eager("head_pair_table")
        return attention(q, a, attention(a, k, v, bias=b1), bias=b2)

    agree(ours, dense, inputs)


def test_combiner() -> None:
    """p(j | i) over the own block and the summaries of earlier ones, each an expectation over its region."""
    n, size = 12, 4
    regions = n // size
    inputs = draw((B, H, n, D), (B, H, n, D), (B, H, n, D))

    def pooled(x: Tensor) -> Tensor:
        return x.view(B, H, regions, size, D).amax(3)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        local = [slice(r * size, (r + 1) * size) for r in range(regions)]
        inner = [softmax(pooled(q)[:, :, r, None] @ k[:, :, at].mT * SCALE) @ v[:, :, at] for r, at in enumerate(local)]
        rows = []
        for i in range(n):
            r = i // size
            keys = torch.cat([k[:, :, r * size : i + 1], pooled(k)[:, :, :r]], 2)
            values = torch.cat([v[:, :, r * size : i + 1], *inner[:r]], 2)
            rows.append(softmax(q[:, :, i, None] @ keys.mT * SCALE) @ values)
        return torch.cat(rows, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        summary = eager("block_summary")(pooled(q), k, v, block=size)
        keys, values = torch.cat([k, pooled(k)], 2), torch.cat([v, summary], 2)
        return eager("combiner")(q, keys, values, block=size)

    agree(ours, dense, inputs)


def test_core_context_attention() -> None:
    """Core keys and values by the attention of each group's last query, beside the tokens of an aligned window."""
    n, group, window = 13, 3, 3
    inputs = draw((B, H, n, D), (B, H, n, D), (B, H, n, D))

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cores = []
        for c in range(n // group):
            at = slice(c * group, (c + 1) * group)
            share = softmax(q[:, :, at][:, :, -1:] @ k[:, :, at].mT * SCALE)
            cores.append((share @ k[:, :, at], share @ v[:, :, at]))
        rows = []
        for i in range(n):
            first = next(
                t for t in range(0, n, group) if t + group > i + 1 - window
            )  # group of the window's first token
            far = cores[: first // group]
            keys = torch.cat([*(x for x, _ in far), k[:, :, first : i + 1]], 2)
            values = torch.cat([*(x for _, x in far), v[:, :, first : i + 1]], 2)
            rows.append(softmax(q[:, :, i, None] @ keys.mT * SCALE) @ values)
        return torch.cat(rows, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        last, pool = q[:, :, group - 1 :: group], eager("block_summary")
        core = pool(last, k, torch.cat([k, v], -1), block=group)
        keys, values = torch.cat([core[..., :D], k], 2), torch.cat([core[..., D:], v], 2)
        return eager("core_context")(q, keys, values, group=group, window=window)

    agree(ours, dense, inputs)


def test_razor_attention() -> None:
    """A head whose cache was cut weighs the mean of what it dropped by the number of tokens dropped."""
    prompt, new, sinks, window = 14, 4, 2, 3
    inputs = draw((B, H, new, D), (B, H, prompt + new, D), (B, H, prompt + new, D))
    gone = slice(sinks, prompt - window)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for i in range(new):
            now = prompt + i + 1
            whole = softmax(q[:, :1, i, None] @ k[:, :1, :now].mT * SCALE) @ v[:, :1, :now]
            kept = [*range(sinks), *range(prompt - window, now)]
            exact = torch.exp(q[:, 1:, i, None] @ k[:, 1:, kept].mT * SCALE)
            count = gone.stop - gone.start
            mean_k, mean_v = (x[:, 1:, gone].mean(2, keepdim=True) for x in (k, v))
            extra = count * torch.exp(q[:, 1:, i, None] @ mean_k.mT * SCALE)
            cut = (exact @ v[:, 1:, kept] + extra * mean_v) / (exact.sum(-1, keepdim=True) + extra)
            rows.append(torch.cat([whole, cut], 1))
        return torch.cat(rows, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.cat([x, x[:, :, gone].mean(2, keepdim=True)], 2) for x in (k, v))
        retrieval = torch.tensor([True, False])
        return eager("compensation")(q, k, v, prompt=prompt, sinks=sinks, window=window, retrieval=retrieval)

    agree(ours, dense, inputs)


def test_local_linear_attention() -> None:
    """Each query's kernel-weighted ridge regression of values on k - q, whose intercept is the output."""
    n, ridge = 9, 0.5
    q, k, v = (x.detach() for x in draw((B, H, n, D), (B, H, n, D), (B, H, n, D)))

    z = k[:, :, None] - q[:, :, :, None]
    w = torch.exp(q @ k.mT * SCALE).tril()
    rows = torch.cat([torch.ones_like(z[..., :1]), z], -1)
    normal = torch.einsum("bhij,bhijd,bhije->bhide", w, rows, rows)
    normal = normal + ridge * torch.diag(torch.tensor([0.0] + [1.0] * D, dtype=torch.float64))
    want = torch.linalg.solve(normal, torch.einsum("bhij,bhijd,bhjf->bhidf", w, rows, v))[..., 0, :]

    moments = eager("local_linear_moments")

    def product(p: Tensor) -> tuple[Tensor, Tensor]:
        """S p and mu from one pass over the keys."""
        found = moments(q, k, v, direction=p)
        step = found["keys_along"] - q * found["along"][..., None] + ridge * p
        return step, found["keys_sum"] - q * found["total"][..., None]

    rho = torch.zeros_like(q)
    residual = product(rho)[1]
    direction, size = residual, residual.square().sum(-1, keepdim=True)
    for _ in range(D):  # conjugate gradients are exact after as many steps as there are features
        step, _ = product(direction)
        length = size / (direction * step).sum(-1, keepdim=True)
        rho, residual = rho + length * direction, residual - length * step
        before, size = size, residual.square().sum(-1, keepdim=True)
        direction = residual + size / before * direction
    got = eager("local_linear")(q, k, v, rho=rho)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
