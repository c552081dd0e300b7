"""Programs beyond a mask and a score: every result and gradient against dense definitions, in float64."""

from __future__ import annotations

import pytest
import torch
from library.studies import STUDIES

import attnlang as al
from attnlang import library

Tensor = torch.Tensor


def results(found: object) -> dict[str, Tensor]:
    """What a call with ``return_aux`` gives, by name."""
    if isinstance(found, dict):
        return found
    assert isinstance(found, tuple)
    o, aux = found
    return {"o": o, **aux}


def loss_of(made: dict[str, Tensor]) -> Tensor:
    """A random linear function of all smooth results."""
    total = torch.zeros((), dtype=torch.float64)
    for name in sorted(made):
        g = torch.Generator().manual_seed(len(name))
        if made[name].requires_grad:
            total = total + (made[name] * torch.randn(made[name].shape, generator=g, dtype=torch.float64)).sum()
    return total


def shaped(made: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results in the shapes of the definition: a row stage keeps a feature of extent 1."""
    return {n: x.squeeze(-1) if x.dim() == like[n].dim() + 1 and x.shape[-1] == 1 else x for n, x in made.items()}


@pytest.mark.parametrize("name", STUDIES)
def test_results_and_gradients(name: str) -> None:
    study = STUDIES[name]
    program = getattr(library, study.program)
    operands, captured = study.make()
    declared = {p.name for p in program.scalars}
    params = {n: x for n, x in study.params.items() if n in declared}
    attention = al.compile(program)
    leaves = {n: x.requires_grad_() for n, x in zip("qkv", operands, strict=True)}
    leaves |= {n: x.requires_grad_() for n, x in captured.items() if x.is_floating_point() and n not in study.fixed}
    want = study.define(operands, captured)
    call = attention(*operands, return_aux=True, scale=study.scale, **params, **captured)
    made = shaped(results(call), want)
    assert set(made) == set(want)
    for result, tensor in want.items():
        got = made[result]
        if tensor.is_floating_point():
            torch.testing.assert_close(got, tensor, rtol=1e-9, atol=1e-10, msg=lambda m, r=result: f"{r}: {m}")
        else:
            assert torch.equal(got, tensor.to(got.dtype)), result
    if not any(x.requires_grad for x in want.values()):
        return
    ours, theirs = (torch.autograd.grad(loss_of(x), [*leaves.values()], allow_unused=True) for x in (made, want))
    for leaf, mine, other in zip(leaves, ours, theirs, strict=True):
        other = torch.zeros_like(leaves[leaf]) if other is None else other
        mine = torch.zeros_like(leaves[leaf]) if mine is None else mine
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9, msg=lambda m, n=leaf: f"gradient of {n}: {m}")


def test_memory_saving_paths_agree_with_the_reference() -> None:
    """The same calls in float32, blockwise, against the dense evaluation of the program."""
    for name in ("cog", "standardized", "dense_and_sparse", "token_maps", "landmark", "moba"):
        study = STUDIES[name]
        program = getattr(library, study.program)
        operands, captured = study.make(seed=1)
        single = [x.float() for x in operands]
        tensors = {n: x.float() if x.is_floating_point() else x for n, x in captured.items()}
        given = {n: x for n, x in study.params.items() if n in {p.name for p in program.scalars}}
        got = results(al.compile(program)(*single, return_aux=True, scale=study.scale, **given, **tensors))
        want = results(al.reference(program, *single, return_aux=True, scale=study.scale, **given, **tensors))
        for result in want:
            torch.testing.assert_close(got[result].double(), want[result].double(), rtol=2e-4, atol=2e-5)
