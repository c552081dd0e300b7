"""Run bounds as arithmetic: the same map as the analysis, without a search, at every length."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from library.cases import CASES
from mask_programs import Maker, brute_force, exact_kinds, missed, violations

import attnlang.library as library
from attnlang.ir import BUILTIN_SIZES, Environment, Size, dense_mask, evaluate, simple
from attnlang.ir.build import TRUE, all_of, k, op, q
from attnlang.sparsity import FULL, analyse, closed_form

WITH_FORM = {
    "full", "causal", "causal_bottom_right", "anti_causal", "sliding_window", "causal_sliding_window", "prefix_lm",
    "block_diagonal", "block_causal", "chunked_local", "padding", "causal_padding", "packed_keys", "neighborhood_1d",
    "gna_1d", "divided_space", "head_windows", "short_long_heads", "causal_alibi", "gemma2_local",
}  # fmt: skip
WITHOUT = {"longformer", "dilated_window", "document", "shifted_window", "neighborhood_2d", "log_sparse"}


@pytest.mark.parametrize("name", sorted(WITH_FORM))
def test_library_programs_with_a_closed_form(name: str) -> None:
    program = getattr(library, name)
    form = closed_form(program)
    assert form is not None
    instance = CASES[name].instance("medium")
    params = {**{s.name: s.default for s in program.scalars}, **instance.params}
    tensors = instance.captured
    sizes = instance.shape.sizes()
    for tensor in program.tensors:
        for dim, extent in zip(tensor.shape, tensors[tensor.name].shape, strict=True):
            if isinstance(dim, Size) and dim.name not in BUILTIN_SIZES:
                sizes[dim.name] = extent
    assert form.holds(sizes, params)
    for tile in ((16, 16), (64, 32)):
        runs = form.run_map(program, sizes, params, tensors, tile)
        exact = exact_kinds(dense_mask(program, sizes, params, tensors), tile)
        assert violations(runs.dense_kinds(), exact) == 0
        assert missed(runs.dense_kinds(), exact) == (0, 0)


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_masks_of_several_intervals_have_none(name: str) -> None:
    assert closed_form(getattr(library, name)) is None


@pytest.mark.parametrize("lengths", [(0, 0), (0, 7), (7, 0), (1, 1), (127, 129), (1000, 300), (300, 1000)])
def test_one_form_for_every_length(lengths: tuple[int, int]) -> None:
    program = simple("window", mask=all_of(op("ge", q, k), op("lt", op("sub", q, k), 90)))
    form = closed_form(program)
    assert form is not None
    sizes = {"B": 1, "H": 1, "Lq": lengths[0], "Lk": lengths[1]}
    for tile in ((64, 64), (48, 16)):
        got = form.run_map(program, sizes, tile=tile)
        want = analyse(program, sizes, tile=tile)
        assert (got.dense_kinds() == want.dense_kinds()).all()


def test_tile_bounds_are_what_a_kernel_walks() -> None:
    program = library.causal_sliding_window
    form = closed_form(program)
    assert form is not None
    lq, lk, bm, bn = 1000, 900, 64, 48
    sizes = {"B": 1, "H": 1, "Lq": lq, "Lk": lk}
    runs = form.run_map(program, sizes, {"window": 200}, tile=(bm, bn))
    table = runs.launch_table()
    for row in range(runs.nq):
        params = {"window": 200, "q_first": row * bm, "q_last": min(lq, (row + 1) * bm) - 1}
        values = [int(evaluate(e, Environment(sizes=sizes, params=params))) for e in form.tile_bounds(bn)]
        start, full_start, full_end, end = values
        assert 0 <= start <= full_start <= full_end <= end
        full = table.full_runs[int(table.full_ptr[row]) : int(table.full_ptr[row + 1])].tolist()
        assert full == ([[full_start, full_end]] if full_start < full_end else [])
        part = table.part_runs[int(table.part_ptr[row]) : int(table.part_ptr[row + 1])].tolist()
        assert sum(e - a for a, e in part) == (full_start - start) + (end - full_end)


def test_random_programs_with_a_closed_form_are_sound() -> None:
    found = 0
    for seed in range(4000):
        random = Random(seed)
        maker = Maker(random)
        problem = maker.problem(maker.boolean(2))
        form = closed_form(problem.program)
        if form is None or problem.program.mask is TRUE or not form.holds(problem.sizes, problem.params):
            continue
        found += 1
        runs = form.run_map(*problem.arguments, problem.tile)
        assert violations(runs.dense_kinds(), brute_force(problem)) == 0, problem.program.mask
    assert found > 300


def test_conditions_are_checked_on_the_host() -> None:
    program = library.block_diagonal
    form = closed_form(program)
    assert form is not None
    sizes = {"B": 1, "H": 1, "Lq": 64, "Lk": 64}
    assert form.holds(sizes, {"block": 8})
    assert not form.holds(sizes, {"block": 0})


def test_a_closed_form_per_batch_element() -> None:
    program = library.padding
    form = closed_form(program)
    assert form is not None
    lengths = torch.tensor([0, 64, 100])
    runs = form.run_map(program, {"B": 3, "H": 2, "Lq": 64, "Lk": 128}, {}, {"lengths": lengths}, (64, 64))
    assert (runs.batch, runs.heads) == (3, 1)
    assert runs.dense_kinds()[1].tolist() == [[[FULL, 0]]]
    assert np.asarray(runs.dense_kinds()[0]).sum() == 0
