"""Programs inside graphs that PyTorch captures."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import attnlang as al

TEXT = """
pattern packed(window: int = 40, cap: float = 5.0, doc: int[B, Lk], bias: float[H]):
    mask = 0 <= q - k < window and doc[b, q] == doc[b, k]
    score = cap * tanh(s / cap) + bias[h]
"""


@pytest.fixture(scope="module")
def attention() -> al.Attention:
    return al.compile(al.parse(TEXT))


def arguments(length: int = 90, grad: bool = True):
    q, k, v = (torch.randn(2, n, length, 16, requires_grad=grad) for n in (4, 2, 2))
    doc = torch.randint(3, (2, length)).sort().values
    return q, k, v, doc, torch.randn(4, requires_grad=grad)


def test_fullgraph_forward_and_backward(attention: al.Attention) -> None:
    def layer(q, k, v, doc, bias):
        o, lse = attention(q * 1.5, k, v, doc=doc, bias=bias, window=25, return_lse=True)
        return (o.sin().sum() + lse.sum()) * 2.0

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    q, k, v, doc, bias = arguments()
    want = layer(q, k, v, doc, bias)
    expected = torch.autograd.grad(want, (q, k, v, bias))
    got = compiled(q, k, v, doc, bias)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (q, k, v, bias)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_new_length_runs(attention: al.Attention) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def layer(q, k, v, doc, bias):
        return attention(q, k, v, doc=doc, bias=bias)

    for length in (33, 64, 101):
        args = arguments(length, grad=False)
        torch.testing.assert_close(layer(*args), attention(*args[:3], doc=args[3], bias=args[4]))


def test_the_operator_passes_pytorchs_own_checks(attention: al.Attention) -> None:
    q, k, v, doc, bias = arguments(20)
    args = (q, k, v, [doc, bias], [40], [5.0], 0.25, attention._handle)
    torch.library.opcheck(torch.ops.attnlang.attend.default, args)


def test_activation_checkpointing(attention: al.Attention) -> None:
    q, k, v, doc, bias = arguments()

    def layer(q, k, v):
        return attention(q, k, v, doc=doc, bias=bias)

    want = torch.autograd.grad(layer(q, k, v).sum(), (q, k, v, bias))
    got = torch.autograd.grad(checkpoint(layer, q, k, v, use_reentrant=False).sum(), (q, k, v, bias))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_copies_work_in_graphs(attention: al.Attention) -> None:
    q, k, v, doc, bias = arguments(grad=False)
    want = attention(q, k, v, doc=doc, bias=bias)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        run = torch.compile(
            lambda q, k, v, o=other: o(q, k, v, doc=doc, bias=bias), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(run(q, k, v), want)


def test_missing_arguments_are_named(attention: al.Attention) -> None:
    q, k, v, doc, _ = arguments(grad=False)
    with pytest.raises(Exception, match="bias"):
        torch.compile(lambda q, k, v: attention(q, k, v, doc=doc), fullgraph=True, backend="aot_eager")(q, k, v)


GENERAL = """
pattern measured(rate: float[H], window: int = 30):
    mask = 0 <= q - k < window
    normalize = softmax(sink=rate[h])
    output received = sum(w, over=q)
    output entropy = sum(-(w * log(w)), over=k)
"""


def test_results_of_a_programs_own_in_one_graph() -> None:
    attention = al.compile(al.parse(GENERAL))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 70, 16, requires_grad=True) for n in (4, 2, 2))
    rate = torch.randn(4, requires_grad=True)

    def layer(q, k, v, rate):
        o, rest = attention(q * 1.5, k, v, rate=rate, window=25, return_aux=True)
        return o.sin().sum() + rest["received"].square().sum() + rest["entropy"].sum()

    want = layer(q, k, v, rate)
    expected = torch.autograd.grad(want, (q, k, v, rate))
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v, rate)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (q, k, v, rate)), expected, strict=True):
        torch.testing.assert_close(a, b)
    args = (q, k, v, [rate], [25], [], 0.25, attention._handle)
    torch.library.opcheck(torch.ops.attnlang.run.default, args)


def test_vmap_in_one_graph() -> None:
    bias, general = (
        al.compile(al.parse("pattern p(t: float[Lq, Lk]): score = s + t[q, k]")),
        al.compile(al.parse(GENERAL)),
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1, n, 9, 4, requires_grad=True) for n in (4, 2, 2))
    t, rate = torch.randn(9, 9, 2, requires_grad=True), torch.randn(4, requires_grad=True)

    def one(q, k, v, t):
        return bias(q, k, v, t=t) * general(q, k, v, rate=rate, return_aux=True)[1]["entropy"][..., None]

    batch = torch.vmap(one, in_dims=(0, 0, 0, -1))
    want, got = batch(q, k, v, t), torch.compile(batch, fullgraph=True, backend="aot_eager")(q, k, v, t)
    torch.testing.assert_close(got, want)
    found, expected = (torch.autograd.grad(x.sin().sum(), (q, k, v, t, rate)) for x in (got, want))
    torch.testing.assert_close(found, expected)
