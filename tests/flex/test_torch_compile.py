"""torch.compile around attnlang: it does not look inside, and the results are the same."""

from __future__ import annotations

import subprocess
import sys

import peer
import pytest
import torch

import attnlang as al

pytestmark = pytest.mark.filterwarnings("ignore")


def causal(b, h, q, k):
    return q >= k


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def check(function, *inputs):
    want = function(*inputs)
    got = torch.compile(function, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, want)
    leaves = [t.clone().requires_grad_() for t in inputs]
    grads = torch.autograd.grad(torch.compile(function, backend="aot_eager")(*leaves).sum(), leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(function(*leaves).sum(), leaves))


def test_a_compiled_model_calls_a_program():
    attention = al.compile(al.program(mask=causal))
    check(lambda q, k, v: attention(q * 2, k, v) + 1, *peer.operands())


def test_a_compiled_model_calls_flex_attention():
    table = torch.randn(peer.H)
    mask = al.create_block_mask(causal, None, None, peer.Q, peer.K)

    def model(q, k, v):
        return al.flex_attention(q + 1, k, v, lambda s, b, h, q, k: s * table[h], mask) * 2

    check(model, *peer.operands())


def test_a_mask_made_in_a_compiled_model():
    def model(q, k, v):
        mask = al.create_block_mask(causal, None, None, peer.Q, peer.K)
        return al.flex_attention(q, k, v, block_mask=mask)

    check(model, *peer.operands())


def test_compiling_the_functions_themselves_changes_nothing():
    """Code written for PyTorch compiles flex_attention; with the import changed it goes on working."""
    q, k, v = peer.operands()
    mask = torch.compile(al.create_block_mask)(causal, None, None, peer.Q, peer.K)
    want = al.flex_attention(q, k, v, block_mask=mask)
    torch.testing.assert_close(torch.compile(al.flex_attention)(q, k, v, block_mask=mask), want)
    torch.testing.assert_close(torch.compile(al.compile(al.program(mask=causal)))(q, k, v), want)


def test_the_compiler_of_pytorch_is_not_imported():
    code = """
import sys, torch, attnlang as al
al.flex_attention, al.compile
heavy = [m for m in ("torch._dynamo", "triton", "sympy", "lark", "jinja2", "rich", "typer") if m in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
