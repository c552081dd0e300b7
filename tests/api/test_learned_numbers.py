"""Float parameters given as tensors: they get gradients, under torch.compile too, unless a mask reads them."""

import pytest
import torch

import attnlang as al

PROGRAM = """
pattern capped(cap: float = 20.0, tilt: float = 0.1, wide: float = 30.0):
    mask = k <= q and q - k < wide
    score = cap * tanh(s / cap) + tilt * (k - q)
"""


def operands(dtype=torch.float32, length=70):
    return tuple(torch.randn(2, 2, length, 16, dtype=dtype, requires_grad=True) for _ in range(3))


def dense(q, k, v, cap, tilt=0.1, wide=30.0):
    at = torch.arange(q.shape[2])
    distance = at[:, None] - at
    scores = q @ k.transpose(-1, -2) * 0.25
    scores = cap * torch.tanh(scores / cap) - tilt * distance
    return torch.softmax(scores.masked_fill((distance < 0) | (distance >= wide), -torch.inf), -1) @ v


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_gradients_of_parameters(backend):
    attn = al.compile(al.parse(PROGRAM), backend=backend)
    q, k, v = operands()
    cap, tilt = torch.tensor(1.5, requires_grad=True), torch.tensor(0.05, requires_grad=True)
    inputs = (q, k, v, cap, tilt)
    do = torch.randn(2, 2, 70, 16)
    got = torch.autograd.grad(attn(q, k, v, cap=cap, tilt=tilt), inputs, do)
    want = torch.autograd.grad(dense(*inputs), inputs, do)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_other_parameters_keep_their_defaults_and_may_be_numbers():
    attn = al.compile(al.parse(PROGRAM))
    q, k, v = operands()
    cap = torch.nn.Parameter(torch.tensor(2.0))
    torch.testing.assert_close(attn(q, k, v, cap=cap), dense(q, k, v, 2.0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        attn(q, k, v, cap=cap, tilt=0.3, wide=9), dense(q, k, v, 2.0, 0.3, 9), atol=1e-5, rtol=1e-4
    )
    with torch.no_grad():
        torch.testing.assert_close(attn(q, k, v, cap=cap), attn(q, k, v, cap=2.0))


def test_exact_and_twice_differentiable_in_float64():
    attn = al.compile(al.parse(PROGRAM))
    inputs = (*operands(torch.float64, 7), torch.tensor(1.5, dtype=torch.float64, requires_grad=True))
    run = lambda q, k, v, cap: attn(q, k, v, cap=cap)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, atol=1e-4, fast_mode=True)


def test_parameters_of_traced_functions():
    cap = 3.0
    attn = al.compile(al.program(score=lambda s, b, h, q, k: cap * torch.tanh(s / cap)))
    (name,) = (p.name for p in attn.program.scalars)
    value = torch.tensor(2.0, requires_grad=True)
    q, k, v = operands()
    attn(q, k, v, **{name: value}).sum().backward()
    got, value.grad = value.grad, None
    scores = value * torch.tanh(q @ k.transpose(-1, -2) * 0.25 / value)
    (torch.softmax(scores, -1) @ v).sum().backward()
    torch.testing.assert_close(got, value.grad, atol=1e-4, rtol=1e-3)


def test_under_compile():
    attn = al.compile(al.parse(PROGRAM))
    q, k, v = operands()
    cap = torch.tensor(1.5, requires_grad=True)
    function = torch.compile(lambda *x: attn(*x[:3], cap=x[3]), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(function(q, k, v, cap).sum(), (q, cap))
    want = torch.autograd.grad(dense(q, k, v, cap).sum(), (q, cap))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def test_what_the_mask_reads_has_no_gradient():
    attn = al.compile(al.parse(PROGRAM))
    with pytest.raises(al.UsageError, match="'wide' of capped cannot be a tensor: the mask reads it"):
        attn(*operands(), wide=torch.tensor(9.0, requires_grad=True))


def test_only_numbers():
    attn = al.compile(al.parse(PROGRAM))
    with pytest.raises(al.UsageError, match="cap must have 0 dimension"):
        attn(*operands(), cap=torch.ones(2))
    with pytest.raises(al.UsageError, match="cap must hold float values"):
        attn(*operands(), cap=torch.tensor(2))
