"""Gradients of every program that changes scores, in float64, against autograd through its dense definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from library.cases import CASES, Instance, program_of

import attnlang as al
from attnlang.ir import FLOAT

Tensor = torch.Tensor

# Float tensors that only a mask reads, or that a definition makes from something else.
WITHOUT_GRADIENT = {
    "forgetting": {"decay"},  # its definition sums the gates row by row
    "foveal": {"box"},
    "inhibition": {"focus"},
    "dynamic_mask": {"threshold"},
    "contextual_position": {"query_place", "key_place"},
}


def leaves(instance: Instance) -> tuple[Instance, dict[str, Tensor]]:
    """The same call with captured floats as float64 leaves, and the leaves."""
    skipped = WITHOUT_GRADIENT.get(instance.case.program, set())
    floats = {n: x for n, x in instance.captured.items() if x.is_floating_point()}
    made: dict[str, Any] = dict(instance.made)
    for n, x in floats.items():
        made[n] = x.double().requires_grad_(n not in skipped)
    return replace(instance, made=made), {n: made[n] for n in floats if n not in skipped}


def gradients(call: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    o, lse = call(*inputs[:3])
    g = torch.Generator().manual_seed(7)
    do, dlse = (torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (o, lse))
    loss = (o * do).sum() + (torch.where(torch.isinf(lse), 0.0, lse) * dlse).sum()
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.score is not None])
def test_gradients_are_the_dense_ones(name: str) -> None:
    instance, learned = leaves(CASES[name].instance("tiny"))
    program = program_of(instance)
    static = {p.name for p in program.scalars if p.static}
    attention = al.compile(program, backend="eager", **{n: x for n, x in instance.params.items() if n in static})
    given = {n: x for n, x in instance.params.items() if n not in static}
    assert set(learned) | WITHOUT_GRADIENT.get(program.name, set()) == {
        t.name for t in program.tensors if t.type is FLOAT
    }
    operands = [x.double().requires_grad_() for x in instance.operands(d=8, dv=6)]
    inputs = [*operands, *learned.values()]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = attention(q, k, v, return_lse=True, **given, **instance.captured)
        return result

    want = gradients(instance.dense_attention, inputs)
    for what, ours_, theirs in zip(("q", "k", "v", *learned), gradients(ours, inputs), want, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-9, atol=1e-10, msg=lambda m, what=what: f"{what}: {m}")
