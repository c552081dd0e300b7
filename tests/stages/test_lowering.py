"""Stages that are rewritten for kernels mean what they meant, in values and gradients."""

from __future__ import annotations

import pytest
import torch

import attnlang as al
from attnlang.ir import (
    DEFAULT_OUTPUTS,
    FLOAT,
    Attend,
    Branch,
    Dot,
    Input,
    Output,
    Program,
    Size,
    TensorParam,
    reference,
)
from attnlang.ir import Operand as Rows
from attnlang.ir.build import h, k, op, q, s
from attnlang.ir.stages import QUERY, VALUE, WEIGHT
from attnlang.runtime.lowering import apart

CAUSAL = op("ge", q, k)
NEAR = op("le", op("abs", op("sub", q, k)), 9)
OUT, LSE = DEFAULT_OUTPUTS


def relative() -> Program:
    """A score term of q with a table of distances for every head."""
    row = op("add", op("sub", k, q), op("sub", Size("R"), 1))
    score = op("add", s, op("mul", Input("t", FLOAT), 0.3))
    terms = (Dot(), Dot("t", QUERY, Rows("table", (h, row))))
    stage = Attend(terms=terms, branches=(Branch(CAUSAL, score),))
    return Program("relative", (stage,), (), (TensorParam("table", FLOAT, (Size("H"), Size("R"), Size("D"))),))


def branched() -> Program:
    """Two branches, one of them with two sums of rows."""
    outputs = (
        OUT,
        Output("squares", op("mul", WEIGHT, WEIGHT), VALUE),
        Output("near", WEIGHT, VALUE, branch=1),
        Output("reach", op("mul", WEIGHT, op("to_float", op("sub", q, k))), branch=1),
        LSE,
    )
    return Program("branched", (Attend(branches=(Branch(CAUSAL), Branch(NEAR, op("mul", s, 2.0))), outputs=outputs),))


def test_stages_are_taken_apart_by_branch_and_sum_of_rows() -> None:
    parts = apart(branched().attend)
    assert [part.made for part in parts] == [("o", "lse"), ("squares",), ("near", "reach")]
    assert apart(Attend()) == (Attend(),)


@pytest.mark.parametrize("make", [relative, branched])
def test_rewritten_stages_mean_the_same(make: object) -> None:
    torch.manual_seed(0)
    program: Program = make()  # type: ignore[operator]
    leaves = {n: torch.randn(1, heads, 70, 16) for n, heads in (("q", 4), ("k", 2), ("v", 2))}
    leaves |= {t.name: torch.randn(4, 70, 16) for t in program.tensors}
    found = []
    for dtype in (torch.float64, torch.float32):
        given = {n: t.to(dtype).requires_grad_() for n, t in leaves.items()}
        operands, others = [given.pop(n) for n in "qkv"], dict(given)
        if dtype is torch.float64:
            sizes = {"B": 1, "H": 4, "Hkv": 2, "Lq": 70, "Lk": 70, "R": 70, "D": 16}
            made = reference(program, *operands, sizes, {}, others, 0.25)
        else:
            o, lse, rest = al.compile(program, backend="cpp")(*operands, **others, return_lse=True, return_aux=True)
            made = {"o": o, "lse": lse, **rest}
        loss = torch.stack([(t.double() * torch.linspace(-1, 1, t.shape[2])[:, None]).sum() if t.dim() == 4 else t.sum()
                            for t in (made[n] for n in program.results)]).sum()  # fmt: skip
        grads = torch.autograd.grad(loss, [*operands, *others.values()])
        found.append(([made[n].double() for n in program.results], [g.double() for g in grads]))
    for want, got in zip(found[0], found[1], strict=True):
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, atol=2e-4, rtol=2e-4)
