"""Precision: what can be proved is proved, and a settled map is exact."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from library.cases import CASES
from mask_programs import Maker, brute_force, exact_kinds, missed, violations

import attnlang.library as library
from attnlang.ir import BOOL, INT, Expr, Load, Program, Size, TensorParam, dense_mask, simple
from attnlang.ir.build import all_of, any_of, k, op, q
from attnlang.sparsity import EMPTY, FULL, PARTIAL, analyse, classify_tile, settle

N = 1000


def distance(limit: int) -> Expr:
    return op("le", op("abs", op("sub", q, k)), limit)


def same(name: str, size: int, shift: int = 0) -> Expr:
    return op("eq", op(name, op("add", q, shift), size), op(name, op("add", k, shift), size))


def near(name: str, size: int, radius: int) -> Expr:
    return op("le", op("abs", op("sub", op(name, q, size), op(name, k, size))), radius)


CAUSAL = op("ge", q, k)
DOC = op("eq", Load("doc", (q,), INT), Load("doc", (k,), INT))
FLAGS = Load("flags", (q,), BOOL), Load("flags", (k,), BOOL)
TENSORS = (TensorParam("doc", INT, (Size("Lk"),)), TensorParam("flags", BOOL, (Size("Lk"),)))
MASKS = {
    "all": simple("all").mask,
    "causal": CAUSAL,
    "causal window": all_of(CAUSAL, op("lt", op("sub", q, k), 100)),
    "window": distance(64),
    "not window and causal": all_of(CAUSAL, op("not", distance(130))),
    "prefix lm": any_of(CAUSAL, op("lt", k, 200)),
    "global and window": any_of(distance(64), op("lt", q, 10), op("lt", k, 10)),
    "scattered global and window": any_of(distance(64), *FLAGS),
    "sink and window": all_of(CAUSAL, any_of(op("lt", op("sub", q, k), 100), op("lt", k, 4))),
    "block causal": op("ge", op("floordiv", q, 96), op("floordiv", k, 96)),
    "block diagonal": same("floordiv", 96),
    "document": DOC,
    "causal document": all_of(CAUSAL, DOC),
    "dilated window": all_of(distance(100), op("eq", op("mod", op("sub", q, k), 4), 0)),
    "strided": all_of(CAUSAL, any_of(op("lt", op("sub", q, k), 32), op("eq", op("mod", k, 32), 31))),
    "2-D neighbourhood": all_of(near("floordiv", 32, 3), near("mod", 32, 3)),
    "2-D neighbourhood, width off the tile": all_of(near("floordiv", 37, 3), near("mod", 37, 3)),
    "shifted windows": all_of(same("floordiv", 64, 5), same("mod", 64, 5)),
    "shifted blocks": same("floordiv", 64, 32),
    "contradiction": all_of(op("gt", q, k), op("lt", q, k)),
    "parity": op("eq", op("mul", q, 2), op("add", op("mul", k, 2), 1)),
}


def problem(mask: Expr) -> tuple[Program, dict[str, int], dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "doc": torch.sort(torch.randint(0, 9, (N,), generator=g)).values,
        "flags": torch.rand(N, generator=g) < 0.004,
    }
    return simple("mask", mask=mask, tensors=TENSORS), {"B": 1, "H": 1, "Lq": N, "Lk": N}, tensors


@pytest.mark.parametrize("tile", [(64, 64), (128, 128), (48, 80)])
@pytest.mark.parametrize("name", list(MASKS))
def test_every_empty_and_every_full_tile_is_found(name: str, tile: tuple[int, int]) -> None:
    program, sizes, tensors = problem(MASKS[name])
    exact = exact_kinds(dense_mask(program, sizes, {}, tensors), tile)
    claimed = analyse(program, sizes, {}, tensors, tile).dense_kinds()
    assert violations(claimed, exact) == 0
    assert missed(claimed, exact) == (0, 0)


GOLDEN = {
    "causal": (120, 16, 120),
    "causal window": (211, 45, 0),
    "prefix lm": (114, 16, 126),
    "document": (198, 48, 10),
    "block diagonal": (220, 25, 11),
    "2-D neighbourhood": (182, 74, 0),
}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_golden_counts(name: str) -> None:
    program, sizes, tensors = problem(MASKS[name])
    assert analyse(program, sizes, {}, tensors, (64, 64)).counts() == GOLDEN[name]


@pytest.mark.parametrize("name", list(CASES))
def test_library_programs_at_99_percent(name: str) -> None:
    case = CASES[name]
    instance = case.instance("medium")
    program = getattr(library, case.program)
    sizes = instance.shape.sizes()
    for tensor in program.tensors:
        for dim, n in zip(tensor.shape, instance.captured[tensor.name].shape, strict=True):
            if isinstance(dim, Size):
                sizes.setdefault(dim.name, n)
    for tile in ((16, 16), (64, 32)):
        exact = exact_kinds(dense_mask(program, sizes, _params(program, instance.params), instance.captured), tile)
        claimed = analyse(program, sizes, instance.params, instance.captured, tile).dense_kinds()
        assert violations(claimed, exact) == 0
        assert sum(missed(claimed, exact)) <= 0.01 * max(1, int((exact != PARTIAL).sum()))


def _params(program: Program, given: object) -> dict[str, object]:
    return {**{s.name: s.default for s in program.scalars}, **dict(given)}  # type: ignore[call-overload]


@pytest.mark.parametrize("seed", range(150))
def test_settled_maps_are_exact(seed: int) -> None:
    made = Maker(Random(seed)).problem()
    runs = settle(made.program, analyse(*made.arguments, made.tile), *made.arguments[1:])
    exact = brute_force(made)
    assert (np.broadcast_to(runs.dense_kinds(), exact.shape) == exact).all()


def test_one_tile() -> None:
    program, sizes, tensors = problem(CAUSAL)
    assert classify_tile(program, sizes, {}, tensors, (64, 128), (0, 64)) == FULL
    assert classify_tile(program, sizes, {}, tensors, (0, 64), (64, 128)) == EMPTY
    assert classify_tile(program, sizes, {}, tensors, (0, 64), (0, 64)) == PARTIAL
    assert classify_tile(program, sizes, {}, tensors, (0, 64), (N, N + 64)) == EMPTY


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0), (1, 1), (3, 700)])
@pytest.mark.parametrize("tile", [(1, 1), (16, 64), (4096, 4096)])
def test_odd_lengths_and_tiles(lengths: tuple[int, int], tile: tuple[int, int]) -> None:
    sizes = {"B": 1, "H": 1, "Lq": lengths[0], "Lk": lengths[1]}
    program = simple("causal", mask=CAUSAL)
    runs = analyse(program, sizes, tile=tile)
    assert (runs.dense_kinds() == exact_kinds(dense_mask(program, sizes), tile)).all()


def test_batch_and_heads_appear_only_where_the_mask_reads_them() -> None:
    from attnlang.ir.build import b, h

    sizes = {"B": 3, "H": 4, "Lq": 256, "Lk": 256}
    lengths = TensorParam("len", INT, (Size("B"),))
    padded = simple("padding", mask=op("lt", k, Load("len", (b,), INT)), tensors=(lengths,))
    runs = analyse(padded, sizes, {}, {"len": torch.tensor([0, 128, 200])})
    assert (runs.batch, runs.heads) == (3, 1)
    assert list(runs) == [[], [], [(0, 1, FULL)], [(0, 1, FULL)], *[[(0, 1, FULL), (1, 2, PARTIAL)]] * 2]
    heads = simple("heads", mask=op("lt", k, op("mul", h, 128)))
    assert (analyse(heads, sizes).batch, analyse(heads, sizes).heads) == (1, 4)
