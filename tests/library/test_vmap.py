"""Programs of the library under torch.vmap, over each kind of tensor in turn, against a loop over its elements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from library.studies import STUDIES, Study

import attnlang as al
from attnlang import library

Tensor = torch.Tensor
SAMPLED = 7
"""One study in so many is differentiated as well."""


def by_one(study: Study, turn: int) -> tuple[Callable[[Tensor], dict[str, Tensor]], Tensor, bool]:
    """The results as a function of one of the tensors, this tensor, and whether it has gradients."""
    program = getattr(library, study.program)
    operands, captured = study.make()
    given = {**dict(zip("qkv", operands, strict=True)), **captured}
    names = sorted(given, reverse=True)  # captured tensors get their turn, too
    name = names[turn % len(names)]
    declared = {p.name for p in program.scalars}
    params = {n: x for n, x in study.params.items() if n in declared}
    attention = al.compile(program)

    def run(x: Tensor) -> dict[str, Tensor]:
        found = attention(**{**given, name: x}, return_aux=True, scale=study.scale, **params)
        if isinstance(found, dict):
            return found
        return {"o": found[0], **found[1]} if isinstance(found, tuple) else {"o": found}

    t = given[name]
    return run, t, t.is_floating_point() and name not in study.fixed


def loss(made: dict[str, Tensor]) -> Tensor:
    floats = [t for t in made.values() if t.is_floating_point()]
    return torch.stack([(t * torch.arange(t.numel()).view(t.shape).cos()).sum() for t in floats]).sum()


@pytest.mark.parametrize("name", STUDIES)
def test_vmap_is_a_loop(name: str) -> None:
    turn = list(STUDIES).index(name)
    run, t, smooth = by_one(STUDIES[name], turn)
    elements = [t, t * 1.25 if t.is_floating_point() else t.flip(-1)]
    dim = turn % (t.dim() + 1)
    batch = torch.stack(elements, dim)
    got, want = torch.vmap(run, in_dims=dim)(batch), [run(x) for x in elements]
    for result, tensor in got.items():
        assert torch.equal(tensor, torch.stack([one[result] for one in want])), result
    if smooth and turn % SAMPLED == 0:
        grads = [torch.func.grad(lambda x: loss(run(x)))(x) for x in elements]
        made = torch.vmap(torch.func.grad(lambda x: loss(run(x))), in_dims=dim)(batch)
        torch.testing.assert_close(made, torch.stack(grads), rtol=1e-9, atol=1e-9)
