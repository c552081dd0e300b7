"""Orders of tokens: permutations, programs under a layout, and what is proposed for masks over grids."""

from __future__ import annotations

import pytest
import torch

import attnlang.library as library
from attnlang.ir import UsageError, reference_attention
from attnlang.sparsity import Layout, analyse, explain, propose_layouts
from attnlang.sparsity.layout import Dim


def sizes(n: int) -> dict[str, int]:
    return {"B": 1, "H": 2, "Hkv": 2, "Lq": n, "Lk": n}


LAYOUTS = [
    (Dim(8, 4), Dim(12, 6)),
    (Dim(8, 2, 2), Dim(12, 3, 2)),
    (Dim(4, 2), Dim(4, 4), Dim(6, 3)),
    (Dim(6, 1, 3), Dim(4, 2), Dim(4, 1, 4)),
]


@pytest.mark.parametrize("dims", LAYOUTS)
def test_a_layout_is_a_permutation_into_patches(dims: tuple[Dim, ...]) -> None:
    layout = Layout((("q", dims), ("k", dims)))
    order = layout.permutation("q")
    assert torch.equal(order.sort().values, torch.arange(len(order)))
    size = 1
    for d in dims:
        size *= d.tile
    for patch in order.view(-1, size):  # the tokens of a patch fill a box of each coordinate
        rest = patch
        for d in reversed(dims):
            coordinate, rest = rest % d.extent, rest // d.extent
            steps = coordinate.unique()
            assert len(steps) == d.tile
            assert (steps.diff() == d.residues).all()


def test_a_program_under_a_layout_means_the_same() -> None:
    program, params = library.nat, {"height": 8, "width": 12, "window": 3}
    n, layout = 96, Layout((("q", (Dim(8, 4), Dim(12, 3))), ("k", (Dim(8, 4), Dim(12, 3)))))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8, generator=g) for _ in range(3))
    tensors = {"table": torch.randn(2, 5, 5, generator=g)}
    want, lse = reference_attention(program, q, k, v, sizes(n), params, tensors, 0.3)
    order = layout.permutation("q")
    moved = (x[:, :, order] for x in (q, k, v))
    out, moved_lse = reference_attention(layout.apply(program), *moved, sizes(n), params, tensors, 0.3)
    assert torch.allclose(out, want[:, :, order])
    assert torch.allclose(moved_lse, lse[:, :, order])


@pytest.mark.parametrize(
    ("name", "params", "n", "gain"),
    [
        ("neighborhood_2d", {"height": 128, "width": 128, "window": 13}, 16384, 3.0),
        ("maxvit_grid", {"height": 64, "width": 64, "cells": 8}, 4096, 7.9),
        ("axial", {"height": 64, "width": 64}, 4096, 4.0),
    ],
)
def test_proposals_save_tiles(name: str, params: dict[str, int], n: int, gain: float) -> None:
    program = getattr(library, name)
    best = propose_layouts(program, sizes(n), params, tile=(64, 64))[0]
    assert best.gain > gain
    assert best.runs.counts() == analyse(best.layout.apply(program), sizes(n), params, tile=(64, 64)).counts()
    text = str(explain(program, sizes(n), params, tile=(64, 64)))
    assert f"tokens in {best.layout.name} raise tile efficiency" in text


def test_nothing_is_proposed_where_nothing_helps() -> None:
    params = {"height": 64, "width": 64, "window": 7}
    assert propose_layouts(library.neighborhood_2d, sizes(4096), params, tile=(64, 64)) == ()


def test_grids_are_required_and_checked() -> None:
    with pytest.raises(UsageError, match="declares no grid"):
        propose_layouts(library.causal, sizes(64))
    with pytest.raises(UsageError, match="8 x 9 = 72 tokens, but there are 64"):
        propose_layouts(library.neighborhood_2d, sizes(64), {"height": 8, "width": 9, "window": 3})
