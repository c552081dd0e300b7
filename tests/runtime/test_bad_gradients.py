"""What is wrong with a request for gradients is said as PyTorch says it, or better."""

import programs
import pytest
import torch

import attnlang as al
from attnlang.runtime import cpp_backward

MASKED = """
pattern masked(keep: float[Lk], other: float[Lk]):
    mask = keep[k] > 0
    score = s + other[k]
"""


def attention():
    q, k, v = (t.requires_grad_() for t in programs.operands(1, 2, 2, 40, 40, 8, 8))
    return (q, k, v), al.compile(programs.causal())(q, k, v)


def test_gradients_of_integers():
    program = programs.documents()
    tensors = programs.captured(program, batch=1, heads=2, lq=40, lk=40)
    q, k, v = (t.requires_grad_() for t in programs.operands(1, 2, 2, 40, 40, 8, 8))
    out = al.compile(program)(q, k, v, **tensors)
    with pytest.raises(RuntimeError, match="only Tensors of floating point"):
        tensors["doc"].requires_grad_()
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(out.sum(), tensors["doc"])


def test_gradients_of_what_only_a_mask_reads():
    attn = al.compile(al.parse(MASKED))
    operands = programs.operands(1, 2, 2, 40, 40, 8, 8)
    keep, other = torch.randn(40, requires_grad=True), torch.randn(40, requires_grad=True)
    with pytest.raises(al.UsageError, match=r"(?s)keep wants a gradient, but only the mask.*straight through"):
        attn(*operands, keep=keep, other=other)
    with torch.no_grad():
        attn(*operands, keep=keep, other=other)
    attn(*operands, keep=keep.detach(), other=other).sum().backward()
    assert other.grad is not None


@pytest.mark.parametrize("which", ["q", "k", "v", "slope"])
def test_changes_in_place_before_the_backward_pass(which):
    program = programs.documents()
    tensors = programs.captured(program, batch=1, heads=2, lq=40, lk=40)
    named = dict(zip("qkv", programs.operands(1, 2, 2, 40, 40, 8, 8), strict=True)) | {"slope": tensors["slope"]}
    copies = {n: t.clone().requires_grad_() * 1 for n, t in named.items()}
    out = al.compile(program)(copies["q"], copies["k"], copies["v"], doc=tensors["doc"], slope=copies["slope"])
    with torch.no_grad():
        copies[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_shapes_of_incoming_gradients():
    inputs, out = attention()
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        torch.autograd.grad(out, inputs, torch.ones(1, 2, 40, 7))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "double"])
def test_layouts_of_incoming_gradients(layout):
    inputs, out = attention()
    do = {
        "transposed": lambda: torch.randn(1, 2, 8, 40).transpose(2, 3),
        "expanded": lambda: torch.randn(1, 1, 40, 1).expand(1, 2, 40, 8),
        "sliced": lambda: torch.randn(1, 2, 40, 16)[..., ::2],
        "double": lambda: torch.randn(1, 2, 40, 8, dtype=torch.float64),
    }[layout]()
    got = torch.autograd.grad(out, inputs, do, retain_graph=True)
    assert all(
        torch.equal(x, y) for x, y in zip(got, torch.autograd.grad(out, inputs, do.float().contiguous()), strict=True)
    )


def test_a_second_backward_pass_needs_the_graph():
    inputs, out = attention()
    torch.autograd.grad(out.sum(), inputs)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out.sum(), inputs)


def test_vmap_of_gradients():
    attn = al.compile(programs.causal())
    q, k, v = (torch.randn(3, 1, 2, 20, 4) for _ in range(3))
    got = torch.func.vmap(torch.func.grad(lambda *x: attn(*x).square().sum(), argnums=(0, 1, 2)))(q, k, v)
    for i in range(3):
        inputs = [t[i].clone().requires_grad_() for t in (q, k, v)]
        want = torch.autograd.grad(attn(*inputs).square().sum(), inputs)
        torch.testing.assert_close(tuple(g[i] for g in got), want, atol=1e-4, rtol=1e-3)


def test_autocast_of_a_training_step():
    layer, attn = torch.nn.Linear(8, 24), al.compile(programs.causal())
    x = torch.randn(1, 2, 40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = layer(x).chunk(3, -1)
        out = attn(q, k, v)
    assert out.dtype is torch.bfloat16
    out.float().square().sum().backward()
    got, layer.weight.grad = layer.weight.grad.clone(), None
    q, k, v = layer(x).chunk(3, -1)
    al.reference(programs.causal(), q, k, v).square().sum().backward()
    assert (got - layer.weight.grad).norm() < 0.05 * layer.weight.grad.norm()


def test_kernels_are_asked_only_for_what_is_wanted(monkeypatch):
    asked = []
    kernel = cpp_backward.backward
    monkeypatch.setattr(
        "attnlang.runtime.dispatch._backward", lambda name: lambda *x: asked.append(x[-1]) or kernel(*x)
    )
    attn = al.compile(al.parse(MASKED))
    q, k, v = programs.operands(1, 2, 2, 40, 40, 8, 8)
    tensors = {"keep": torch.rand(40), "other": torch.randn(40)}
    attn(q.requires_grad_(), k, v, **tensors).sum().backward()
    attn(q, k, v, keep=tensors["keep"], other=tensors["other"].requires_grad_()).sum().backward()
    assert asked == [(), ("other",)]
