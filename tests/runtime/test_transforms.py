"""Gradients of gradients and the transforms of torch.func, on kernels, against the same of dense PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._pytree import tree_leaves

import attnlang as al
from attnlang.grammar import parse
from attnlang.runtime.runs import run_maps

TEXT = """
pattern causal:
    mask = k <= q

pattern sigmoid_of_scores:
    mask = k <= q
    normalize = elementwise(sigmoid(s))

pattern pages(page: int[P]):
    keys = K[b, h, page[k // 4] * 4 + k % 4]
    values = V[b, h, page[k // 4] * 4 + k % 4]
    mask = k <= q

pattern in_groups:
    mask = k <= q
    group = k % 2
    groups = 2
    normalize:
        stat m = max(s)
        stat own = sum(exp(s - m), by=group)
        weight = exp(s - m) / own
"""
PROGRAMS = parse(TEXT).patterns
PAGE = torch.tensor([1, 0, 1])
Tensor = torch.Tensor
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(name: str) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if name == "pages":
            row = (PAGE[:, None] * 4 + torch.arange(4)).flatten()[: k.shape[2]]
            k, v = k[:, :, row], v[:, :, row]
        s = q @ k.mT * q.shape[-1] ** -0.5
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        if name == "sigmoid_of_scores":
            return torch.where(seen, torch.sigmoid(s), 0.0) @ v
        parts = [seen]
        if name == "in_groups":
            parts = [seen & (torch.arange(k.shape[2]) % 2 == n) for n in range(2)]
        return sum(torch.where(p, s.masked_fill(~p, -1e30).softmax(-1), 0.0) for p in parts) @ v

    return attend


def ours(name: str) -> Attention:
    run_maps.clear()  # so that they are made inside of the transform
    attn, given = al.compile(PROGRAMS[name]), {"page": PAGE} if name == "pages" else {}
    return lambda q, k, v: attn(q, k, v, **given)


def rows() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))


def same(got: object, want: object) -> None:
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        size = max([1.0, *b.detach().abs().flatten().tolist()])
        torch.testing.assert_close(a, b, atol=2e-5 * size, rtol=2e-4, check_dtype=False)


def twice(attend: Attention, dtype: torch.dtype) -> list[Tensor]:
    """First and second derivatives where q, k and v are one tensor, or made of each other."""
    found = []
    for made in (lambda x: (x, x, x), lambda x: (x, x * 2 - 0.5, x.flip(-1) * x)):
        x = rows()[0].to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(attend(*made(x)).square().sum(), x, create_graph=True)
        found += [first, *torch.autograd.grad(first.square().sum(), x)]
    return found


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("name", PROGRAMS)
def test_operands_made_of_each_other(name: str) -> None:
    same(twice(ours(name), torch.float32), twice(dense(name), torch.float64))


def _value(attend: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v).square().sum()


def _without_recording(attend: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        made = attend(q, k, v).sum()
    return q.sum() * made


TRANSFORMS: dict[str, Callable[[Attention, Tensor, Tensor, Tensor], object]] = {
    "grad": lambda f, *x: torch.func.grad(lambda *y: _value(f, *y), argnums=(0, 1, 2))(*x),
    "grad of grad": lambda f, q, k, v: torch.func.grad(
        lambda q: torch.func.grad(lambda k: _value(f, q, k, v))(k).square().sum()
    )(q),
    "grad without recording": lambda f, *x: torch.func.grad(lambda q: _without_recording(f, q, *x[1:]))(x[0]),
    "grad by something else": lambda f, *x: torch.func.grad(lambda y: (y * f(*x)).sum())(torch.ones(())),
    "vjp": lambda f, *x: torch.func.vjp(lambda *y: f(*y), *x)[1](x[0] * 2),
    "jvp": lambda f, *x: torch.func.jvp(lambda *y: f(*y), x, (x[1], x[2], x[0])),
    "jacrev": lambda f, q, k, v: torch.func.jacrev(lambda v: f(q, k, v)[0, 0, 5, :3])(v),
    "jacfwd": lambda f, q, k, v: torch.func.jacfwd(lambda k: f(q, k[..., :1] + q, v)[0, 0, 5, :3])(k[..., :1]),
    "vmap by something else": lambda f, *x: torch.vmap(lambda y: y * f(*x))(torch.ones(2)),
}


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_transforms(name: str, transform: str) -> None:
    run = TRANSFORMS[transform]
    same(run(ours(name), *rows()), run(dense(name), *(x.double() for x in rows())))


def _twice_batched(f: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    both, more = torch.stack([q, q + 1]), torch.stack([k, k - 1, k * 2], -1)
    return torch.vmap(torch.vmap(f, in_dims=(None, -1, None)), in_dims=(0, None, None), out_dims=1)(both, more, v)


def _each(transform: Callable[..., Callable[..., object]], which: int) -> Callable[..., object]:
    """A transform by one operand, under vmap over the values."""

    def run(f: Attention, q: Tensor, k: Tensor, v: Tensor) -> object:
        rows, many = [q, k], torch.stack([v, v.flip(-1) * 2], 2)

        def one(v: Tensor) -> object:
            by = lambda x: _value(f, *rows[:which], x, *rows[which + 1 :], v)  # noqa: E731
            return transform(by)(rows[which])

        return torch.vmap(one, in_dims=2)(many)

    return run


def _tangent(by: Callable[[Tensor], Tensor]) -> Callable[[Tensor], object]:
    return lambda x: torch.func.jvp(by, (x,), (x.flip(-1),))


VMAPS: dict[str, Callable[..., object]] = {
    "twice": _twice_batched,
    "of grad": _each(torch.func.grad, 0),
    "of grad of grad": _each(lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum()), 1),
    "of jvp": _each(_tangent, 0),
    "of nothing": lambda f, q, k, v: torch.vmap(f, in_dims=(0, None, None))(q.new_empty(0, *q.shape), k, v),
    "in grad": lambda f, q, k, v: torch.func.grad(
        lambda k: torch.vmap(lambda q: f(q, k, v))(torch.stack([q, q + 1])).square().sum()
    )(k),
    "of something else in grad": lambda f, q, k, v: torch.func.grad(
        lambda k: torch.vmap(lambda y: y * f(q, k, v))(torch.ones(2)).square().sum()
    )(k),
    "of something else of grad": lambda f, q, k, v: torch.vmap(
        lambda y: torch.func.grad(lambda k: (y * f(q, k, v)).sum())(k)
    )(torch.arange(2.0)),
    "in backward": lambda f, q, k, v: torch.autograd.grad(
        torch.vmap(lambda q: f(q, k, v))(torch.stack([q, q + 1])).square().sum(), k
    ),
}


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("transform", VMAPS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_vmap(name: str, transform: str) -> None:
    run, (q, k, v) = VMAPS[transform], rows()
    k.requires_grad_(transform == "in backward")
    same(run(ours(name), q, k, v), run(dense(name), q, k, v))


@pytest.mark.usefixtures("unoptimised")
def test_tangents_are_not_lost() -> None:
    q, k, v = rows()
    want = torch.func.jvp(lambda q: dense("causal")(q, k, v), (q,), (k,))[1]
    with torch.autograd.forward_ad.dual_level():
        made = ours("causal")(torch.autograd.forward_ad.make_dual(q, k), k, v)
        same(torch.autograd.forward_ad.unpack_dual(made).tangent, want)


SECOND: dict[str, Callable[..., Callable[..., object]]] = {
    "hessian": torch.func.hessian,
    "tangents of gradients": lambda f: _tangent(torch.func.grad(f)),
    "vmap of hessian": lambda f: lambda x: torch.vmap(torch.func.hessian(f))(torch.stack([x, x.flip(-1)])),
}


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("transform", SECOND)
@pytest.mark.parametrize("name", PROGRAMS)
def test_tangents_around_gradients(name: str, transform: str) -> None:
    q, k, v = (x[:, :1, :, :2] for x in rows())

    def run(f: Attention) -> object:
        return SECOND[transform](lambda q: _value(f, q, k, v))(q)

    same(run(ours(name)), run(dense(name)))


CAPTURES: dict[str, Callable[[Tensor], Callable[..., Tensor]]] = {
    "nothing": lambda t: lambda s, b, h, q, k: s * 2,
    "elements": lambda t: lambda s, b, h, q, k: s + t[q, k],
    "views": lambda t: lambda s, b, h, q, k: s + t.view(-1)[q] * t.T[q, k],
    "elements that are taken": lambda t: lambda s, b, h, q, k: s + t[0].take(k) + t.index_select(0, q.view(1))[0, k],
    "what is computed of it": lambda t: lambda s, b, h, q, k: torch.where(q > k, (t * 2)[q, k], s),
    "rows": lambda t: lambda s, b, h, q, k: s + t[q] @ t[k],
}
AROUND: dict[str, Callable[..., Callable[..., object]]] = {
    "grad": torch.func.grad,
    "vmap of grad": lambda f: lambda t: torch.vmap(torch.func.grad(f))(torch.stack([t, t * 2])),
    "jvp": _tangent,
}


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("transform", AROUND)
@pytest.mark.parametrize("captured", CAPTURES)
def test_functions_traced_inside_of_transforms(captured: str, transform: str) -> None:
    """Such operations made a program that read memory which does not exist."""
    q, k, v = (x[:1, :2, :6] for x in rows())

    def ours(t: Tensor) -> Tensor:
        return al.flex_attention(q, k, v, score_mod=CAPTURES[captured](t)).square().sum()

    def dense(t: Tensor) -> Tensor:
        score, at = CAPTURES[captured](t), torch.arange(6)
        s = q @ k.mT * q.shape[-1] ** -0.5
        made = [[score(s[..., i, j], 0, 0, at[i], at[j]) for j in range(6)] for i in range(6)]
        scores = torch.stack([torch.stack(row, -1) for row in made], -2)
        return (scores.softmax(-1) @ v).square().sum()

    t = torch.randn(6, 6)
    same(AROUND[transform](ours)(t), AROUND[transform](dense)(t))
