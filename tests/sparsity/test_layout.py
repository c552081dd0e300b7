"""Orders of tokens: permutations, programs under a layout, and what is proposed for masks over grids."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_programs import Maker, exact_kinds, violations

import attnlang.library as library
from attnlang.ir import Program, UsageError, dense_mask, reference_attention
from attnlang.sparsity import (
    Dim,
    Hilbert,
    Layout,
    Order,
    Patches,
    Tokens,
    analyse,
    explain,
    lay_out,
    propose_layouts,
)
from attnlang.sparsity.layout_text import parse_layout
from attnlang.sparsity.orders import coordinates, row_major


def sizes(n: int, heads: int = 2) -> dict[str, int]:
    return {"B": 1, "H": heads, "Hkv": heads, "Lq": n, "Lk": n}


DIVIDED = [
    (Dim(8, 4), Dim(12, 6)),
    (Dim(8, 2, 2), Dim(12, 3, 2)),
    (Dim(4, 2), Dim(4, 4), Dim(6, 3)),
    (Dim(6, 1, 3), Dim(4, 2), Dim(4, 1, 4)),
]
RAGGED = [
    (Dim(7, 4), Dim(13, 6)),
    (Dim(9, 2, 2), Dim(11, 3, 4)),
    (Dim(5, 4, 1, 3), Dim(7, 3, 1, 2)),
    (Dim(5, 2), Dim(3, 5), Dim(7, 2, 3, 1)),
    (Dim(10, 4),),
]


def is_permutation(order: torch.Tensor) -> bool:
    return torch.equal(order.sort().values, torch.arange(len(order)))


@pytest.mark.parametrize("dims", DIVIDED)
def test_an_order_is_a_permutation_into_patches(dims: tuple[Dim, ...]) -> None:
    order = Patches(dims).tokens()
    assert is_permutation(order)
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


@pytest.mark.parametrize("dims", RAGGED)
@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_has_to_divide_the_grid(dims: tuple[Dim, ...], reverse: bool) -> None:
    major = tuple(reversed(range(len(dims)))) if reverse else ()
    order = Patches(dims, major).tokens()
    assert is_permutation(order)
    extents = [d.extent for d in dims]
    place = []  # residue class and patch of every token, as a person would say it
    for d, at in zip(dims, coordinates(extents), strict=True):
        moved = (at - d.shift) % d.extent
        place.append((moved % d.residues, moved // d.residues // d.tile))
    patch = np.stack([x for pair in place for x in pair], 1)[order.numpy()]
    starts = 1 + int((patch[1:] != patch[:-1]).any(1).sum())
    assert starts == len(np.unique(patch, axis=0))  # every patch is one stretch of slots


def test_strips_make_patches_of_any_stretch() -> None:
    order = Patches((Dim(16, 4), Dim(20))).tokens()
    y, x = (torch.from_numpy(c)[order] for c in coordinates((16, 20)))
    for start in range(0, 80 - 16, 4):  # inside one strip
        part = slice(start, start + 16)
        assert int(y[part].max() - y[part].min()) == 3
        assert int(x[part].max() - x[part].min()) == 3


@pytest.mark.parametrize("extents", [(8, 8), (4, 4, 4), (16, 16), (1, 1), (2, 2, 2)])
def test_a_hilbert_curve_goes_from_neighbour_to_neighbour(extents: tuple[int, ...]) -> None:
    order = Hilbert(extents).tokens()
    assert is_permutation(order)
    path = np.stack(coordinates(extents), 1)[order.numpy()]
    assert (np.abs(np.diff(path, axis=0)).sum(1) == 1).all()


@pytest.mark.parametrize("extents", [(5, 9), (3, 1, 7), (0, 4), (13,)])
def test_a_hilbert_curve_fits_any_grid(extents: tuple[int, ...]) -> None:
    assert is_permutation(Hilbert(extents).tokens())


LAYOUTS = [
    Layout.patches((9, 11), (4, 3)),
    Layout.patches((9, 11), (2, 1), residues=2, shift=1),
    Layout.both(Hilbert((9, 11))),
    Layout.given(torch.randperm(99, generator=torch.Generator().manual_seed(1))),
    Layout.both(row_major((9, 11)), Patches((Dim(9), Dim(11)), (1, 0)), heads=(1, 0)),
    Layout((Hilbert((9, 11)),), (Patches((Dim(9, 3), Dim(11, 2))),)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", ["nat", "axial"])
def test_a_program_under_a_layout_means_the_same(name: str, layout: Layout) -> None:
    program: Program = getattr(library, name)
    params = {"height": 9, "width": 11, **({"window": 3} if name == "nat" else {})}
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 99, 8, generator=g) for _ in range(3))
    tensors = {"table": torch.randn(2, 5, 5, generator=g)} if name == "nat" else {}
    want, lse = reference_attention(program, q, k, v, sizes(99), params, tensors, 0.3)
    laid = lay_out(program, layout, sizes(99), params, tensors)
    which = torch.tensor(layout.heads or (0, 0))
    here, there = (layout.tokens(axis)[which][None] for axis in "qk")
    moved = [x.gather(2, at[..., None].expand_as(x)) for x, at in ((q, here), (k, there), (v, there))]
    out, moved_lse = reference_attention(laid.program, *moved, laid.sizes, params, laid.tensors, 0.3)
    assert torch.allclose(out, want.gather(2, here[..., None].expand_as(want)))
    assert torch.allclose(moved_lse, lse.gather(2, here))


def random_layout(random: Random, lq: int, lk: int) -> Layout:
    def order(n: int) -> Order:
        g = torch.Generator().manual_seed(random.randrange(1 << 30))
        if random.random() < 0.5:
            return Tokens(torch.randperm(n, generator=g))
        return Patches((Dim(n, random.randrange(1, 9), random.randrange(1, 5), random.randrange(n)),))

    count = random.choice((1, 2))
    heads = tuple(random.randrange(count) for _ in range(2)) if count > 1 else ()
    return Layout(tuple(order(lq) for _ in range(count)), tuple(order(lk) for _ in range(count)), heads)


def test_random_programs_under_random_layouts_are_permuted_and_their_tiles_proved() -> None:
    @settings(max_examples=60, database=None)
    @given(st.integers(0, 2**48))
    def run(seed: int) -> None:
        random = Random(seed)
        problem = Maker(random).problem()
        problem.sizes["Hkv"] = 2  # heads of their own keys, so that any head may have any order
        layout = random_layout(random, problem.sizes["Lq"], problem.sizes["Lk"])
        laid = lay_out(problem.program, layout, *problem.arguments[1:])
        mask = dense_mask(laid.program, laid.sizes, problem.params, laid.tensors)
        plain = dense_mask(*problem.arguments)
        for head, order in enumerate(layout.heads or (0, 0)):
            rows, columns = (layout.tokens(axis)[order] for axis in "qk")
            assert torch.equal(mask[:, head], plain[:, head][:, rows][:, :, columns]), problem.program.mask
        claimed = analyse(laid.program, laid.sizes, problem.params, laid.tensors, problem.tile).dense_kinds()
        assert violations(claimed, exact_kinds(mask, problem.tile)) == 0, problem.program.mask

    run()


def test_tables_are_stored_as_narrow_as_they_are() -> None:
    laid = lay_out(library.neighborhood_2d, Layout.patches((8, 8), (4, 4)), sizes(64), {"height": 8, "width": 8})
    assert {t.dtype for t in laid.tables.values()} == {torch.int16}
    long = lay_out(library.causal, Layout.patches((40000,), (16,)), sizes(40000))
    assert {t.dtype for t in long.tables.values()} == {torch.int32}


@pytest.mark.parametrize(
    ("name", "params", "n", "gain"),
    [
        ("neighborhood_2d", {"height": 128, "width": 128, "window": 13}, 16384, 3.0),
        ("maxvit_grid", {"height": 64, "width": 64, "cells": 8}, 4096, 7.9),
        ("axial", {"height": 64, "width": 64}, 4096, 30.0),
        ("cswin", {"height": 49, "width": 56, "stripe": 7}, 49 * 56, 3.0),
        ("cyclic_window", {"height": 32, "width": 32, "shift_y": 5, "shift_x": 9}, 1024, 1.9),
        ("maxvit_block", {"height": 56, "width": 56, "window": 7}, 3136, 1.3),
        ("dilated_neighborhood_1d", {"window": 63, "dilation": 8}, 4096, 3.0),
    ],
)
def test_proposals_save_tiles(name: str, params: dict[str, int], n: int, gain: float) -> None:
    program = getattr(library, name)
    best = propose_layouts(program, sizes(n), params, tile=(64, 64))[0]
    assert best.gain > gain
    before = analyse(program, sizes(n), params, tile=(64, 64))
    laid = lay_out(program, best.layout, sizes(n), params)
    after = analyse(laid.program, laid.sizes, params, laid.tensors, (64, 64))
    computed = [sum(runs.counts()[1:]) / runs.heads for runs in (before, after)]
    assert computed[0] / computed[1] == pytest.approx(best.gain, rel=0.15)  # which is of a sample
    if dict(program.grids):
        text = str(explain(program, sizes(n), params, tile=(64, 64)))
        assert f"tokens in {best.layout.name} raise tile efficiency" in text
        assert f"tokens in {best.layout.name}" in str(
            explain(program, sizes(n), params, tile=(64, 64), layout=best.layout)
        )


def test_smaller_key_tiles_are_tried_where_they_are_allowed() -> None:
    params = {"height": 64, "width": 64, "window": 7}
    assert propose_layouts(library.neighborhood_2d, sizes(4096), params, tile=(64, 64)) == ()
    best = propose_layouts(library.neighborhood_2d, sizes(4096), params, tile=(64, 64), key_tiles=(16,))[0]
    assert best.layout.key_tile == 16
    assert best.gain > 1.5


def test_nothing_is_proposed_where_nothing_helps() -> None:
    assert propose_layouts(library.causal, sizes(1000)) == ()
    assert propose_layouts(library.neighborhood_2d, sizes(0), {"height": 0, "width": 8, "window": 3}) == ()


def test_heads_that_share_keys_are_given_one_order() -> None:
    shape = {**sizes(1024, 8), "Hkv": 4}
    layout = propose_layouts(library.axial, shape, {"height": 32, "width": 32}, tile=(64, 64))[0].layout
    assert layout.heads == (0, 0, 0, 0, 1, 1, 1, 1)
    layout.check(shape)
    one = propose_layouts(library.axial, {**shape, "Hkv": 1}, {"height": 32, "width": 32}, tile=(64, 64))[0].layout
    assert not one.per_head


def test_grids_are_checked() -> None:
    with pytest.raises(UsageError, match="8 x 9 = 72 tokens, but there are 64"):
        propose_layouts(library.neighborhood_2d, sizes(64), {"height": 8, "width": 9, "window": 3})


def test_layouts_that_are_none_are_refused() -> None:
    for wrong in (torch.tensor([0, 2, 2]), torch.tensor([[0, 1]] * 3)[:, 0], torch.tensor([0.0, 1.0])):
        with pytest.raises(UsageError, match="order of"):
            Layout.given(wrong)
    with pytest.raises(UsageError, match="orders 12 tokens of q, but there are 10"):
        lay_out(library.causal, Layout.patches((3, 4), (2, 2)), sizes(10))
    several = Layout.both(row_major((10,)), Hilbert((10,)), heads=(0, 1))
    with pytest.raises(UsageError, match="for 2 heads, but there are 4"):
        lay_out(library.causal, several, sizes(10, 4))
    with pytest.raises(UsageError, match="heads 0 to 1 share their keys"):
        lay_out(library.causal, several, {**sizes(10), "Hkv": 1})
    with pytest.raises(UsageError, match="says which one each head uses"):
        Layout.both(row_major((10,)), Hilbert((10,)))
    with pytest.raises(UsageError, match="do not fit a grid"):
        Layout.patches((3, 4), (2,))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("plain", "plain order"),
        ("transposed", "transposed order 1 x 0"),
        ("hilbert", "Hilbert order"),
        ("4", "patches of 4 x 4"),
        ("8x1%2", "patches of 8 x 1 in residue classes modulo 2 x 2"),
        ("7x7+3x2", "patches of 7 x 7 shifted by 3 x 2"),
    ],
)
def test_layouts_in_words(text: str, name: str) -> None:
    layout = parse_layout(text, {"q": (9, 11), "k": (9, 11)})
    assert layout.name == name
    assert is_permutation(layout.tokens("q")[0])


@pytest.mark.parametrize(("text", "message"), [("8x8x8", "3 coordinates"), ("0x4", "at least 1"), ("oval", "unknown")])
def test_wrong_words_are_explained(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_layout(text, {"q": (9, 11), "k": (9, 11)})
