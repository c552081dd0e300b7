"""Run bounds as arithmetic: the same map as the analysis, without a search, at every length."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from library.cases import CASES
from mask_programs import Maker, brute_force, exact_kinds, missed, violations

import attnlang.library as library
from attnlang.ir import (
    BUILTIN_SIZES,
    INT,
    Environment,
    Load,
    Program,
    Size,
    TensorParam,
    dense_mask,
    evaluate,
    simple,
)
from attnlang.ir.build import TRUE, all_of, b, k, op, q
from attnlang.sparsity import FULL, PARTIAL, analyse, closed_form
from attnlang.sparsity.closed_form import TileBounds

WITH_FORM = {
    "full", "causal", "causal_bottom_right", "anti_causal", "sliding_window", "causal_sliding_window", "prefix_lm",
    "block_diagonal", "block_causal", "chunked_local", "padding", "causal_padding", "packed_keys", "neighborhood_1d",
    "gna_1d", "divided_space", "head_windows", "short_long_heads", "causal_alibi", "gemma2_local", "streaming_llm",
    "duo_attention", "moa", "text_over_visual",
}  # fmt: skip
TRANSPOSED = {
    "full", "causal", "causal_bottom_right", "anti_causal", "sliding_window", "causal_sliding_window", "prefix_lm",
    "block_diagonal", "block_causal", "chunked_local", "padding", "causal_padding", "divided_space", "head_windows",
    "gemma2_local", "text_over_visual",
}  # fmt: skip
WITHOUT = {"longformer", "dilated_window", "document", "shifted_window", "neighborhood_2d", "log_sparse"}


def storage(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {n: str(t.dtype).removeprefix("torch.") for n, t in tensors.items()}


def library_case(name: str) -> tuple[Program, dict[str, int], dict[str, Any], dict[str, torch.Tensor]]:
    program = getattr(library, name)
    instance = CASES[name].instance("medium")
    params = {**{s.name: s.default for s in program.scalars}, **instance.params}
    tensors = instance.captured
    sizes = instance.shape.sizes()
    for tensor in program.tensors:
        for dim, extent in zip(tensor.shape, tensors[tensor.name].shape, strict=True):
            if isinstance(dim, Size) and dim.name not in BUILTIN_SIZES:
                sizes[dim.name] = extent
    return program, sizes, params, tensors


@pytest.mark.parametrize("name", sorted(WITH_FORM))
def test_library_programs_with_a_closed_form(name: str) -> None:
    program, sizes, params, tensors = library_case(name)
    form = closed_form(program)
    assert form is not None and form.exact
    assert form.holds(sizes, params, storage(tensors))
    for tile in ((16, 16), (64, 32)):
        runs = form.run_map(program, sizes, params, tensors, tile)
        exact = exact_kinds(dense_mask(program, sizes, params, tensors), tile)
        assert violations(runs.dense_kinds(), exact) == 0
        assert missed(runs.dense_kinds(), exact) == (0, 0)


@pytest.mark.parametrize("name", sorted(TRANSPOSED))
def test_library_programs_with_a_closed_form_of_the_transposed_mask(name: str) -> None:
    program, sizes, params, tensors = library_case(name)
    form = closed_form(program, "q")
    assert form is not None and form.exact
    assert form.holds(sizes, params, storage(tensors))
    for tile in ((16, 16), (64, 32)):
        bounds = form.tile_bounds(tile[0], whole_edge=True)
        exact = exact_kinds(dense_mask(program, sizes, params, tensors), tile)
        for batch, head, column in np.ndindex(exact.shape[0], exact.shape[1], exact.shape[3]):
            first = column * tile[1]
            inputs = {"k_first": torch.tensor(first), "k_last": torch.tensor(min(sizes["Lk"], first + tile[1]) - 1)}
            axes = {"b": torch.tensor(batch), "h": torch.tensor(head)}
            env = Environment(axes, sizes, params, tensors, inputs)
            assert (kinds_of(bounds, env, exact.shape[2]) == exact[batch, head, :, column]).all()


def kinds_of(bounds: tuple[TileBounds, ...], env: Environment, tiles: int) -> np.ndarray:
    """Kinds of a row of tiles; every tile belongs to at most one range."""
    kinds = np.zeros(tiles, np.uint8)
    at = 0
    for part in bounds:
        start, full_start, full_end, end = (int(evaluate(e, env)) for e in part.exprs)
        assert at <= start <= full_start <= full_end <= end <= tiles
        kinds[start:end], kinds[full_start:full_end] = PARTIAL, FULL
        at = end
    return kinds


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
    (bounds,) = form.tile_bounds(bn)
    for row in range(runs.nq):
        inputs = {"q_first": torch.tensor(row * bm), "q_last": torch.tensor(min(lq, (row + 1) * bm) - 1)}
        env = Environment(sizes=sizes, params={"window": 200}, inputs=inputs)
        start, full_start, full_end, end = (int(evaluate(e, env)) for e in bounds.exprs)
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
        if form is None or problem.program.mask is TRUE:
            continue
        if not form.holds(problem.sizes, problem.params, storage(problem.tensors)):
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
    assert form.holds(sizes, {"block": 8}, {})
    assert not form.holds(sizes, {"block": 0}, {})


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("end", [-(2**63), -5, 0, 17, 2**31 - 1, 2**31, 2**63 - 1])
def test_captured_bounds_may_be_any_number(end: int, dtype: str) -> None:
    """A bound that keys are compared with is right wherever it lies; one that could wrap on the way is not used."""
    if dtype == "int32" and not -(2**31) <= end < 2**31:
        return
    length = Load("length", (b,), INT)
    tensors = {"length": torch.tensor([end], dtype=getattr(torch, dtype))}
    params = (TensorParam("length", INT, (Size("B"),)),)
    sizes = {"B": 1, "H": 1, "Lq": 40, "Lk": 70}
    for mask in (op("lt", k, length), op("ge", k, length), op("gt", length, q), op("lt", op("mul", k, 3), length)):
        program = simple("bound", mask=mask, tensors=params)
        form = closed_form(program)
        assert form is not None and form.holds(sizes, {}, {"length": dtype})
        got = form.run_map(program, sizes, {}, tensors, (16, 8)).dense_kinds()
        assert violations(got, exact_kinds(dense_mask(program, sizes, {}, tensors), (16, 8))) == 0
    far = closed_form(simple("bound", mask=op("lt", k, op("add", length, 5)), tensors=params))
    assert far is not None and far.holds(sizes, {}, {"length": dtype}) == (dtype == "int32")


@pytest.mark.parametrize("window", [-(2**63), -(2**62), 2**62, 2**63 - 1])
def test_numbers_that_could_wrap_are_refused(window: int) -> None:
    form = closed_form(library.sliding_window)
    assert form is not None
    sizes = {"B": 1, "H": 1, "Lq": 64, "Lk": 64}
    assert not form.holds(sizes, {"window": window}, {})


def test_a_closed_form_per_batch_element() -> None:
    program = library.padding
    form = closed_form(program)
    assert form is not None
    lengths = torch.tensor([0, 64, 100])
    runs = form.run_map(program, {"B": 3, "H": 2, "Lq": 64, "Lk": 128}, {}, {"lengths": lengths}, (64, 64))
    assert (runs.batch, runs.heads) == (3, 1)
    assert runs.dense_kinds()[1].tolist() == [[[FULL, 0]]]
    assert np.asarray(runs.dense_kinds()[0]).sum() == 0
