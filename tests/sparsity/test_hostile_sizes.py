"""Hostile and degenerate input: nothing overflows, crashes or is claimed without proof."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mask_programs import exact_kinds, violations

from attnlang.ir import BOOL, FLOAT, INT, Load, Param, ScalarParam, Size, TensorParam, UsageError, dense_mask, simple
from attnlang.ir.build import all_of, cast, const, k, op, q
from attnlang.sparsity import PARTIAL, analyse, classify_tile, settle

LAST = 2**31 - 1


def sizes(lq: int, lk: int) -> dict[str, int]:
    return {"B": 1, "H": 1, "Hkv": 1, "Lq": lq, "Lk": lk}


@pytest.mark.parametrize("tile", [(2**20, 2**20), (2**20 - 7, 2**19 + 3)])
def test_lengths_up_to_the_last_int32(tile: tuple[int, int]) -> None:
    program = simple("band", mask=all_of(op("ge", q, k), op("lt", op("sub", op("mul", q, 3), op("mul", k, 3)), 300)))
    runs = analyse(program, sizes(LAST, LAST), tile=tile)
    assert runs.runs(0)[0][0] == 0
    assert runs.runs(runs.nq - 1)[-1][1] == runs.nk
    assert runs.counts()[2] == 0


def test_products_near_int64_decide_nothing_they_should_not() -> None:
    square = op("mul", op("mul", q, q), op("mul", q, q))  # wraps in int64
    program = simple("wraps", mask=op("lt", square, 0))
    assert classify_tile(program, sizes(LAST, 8), {}, {}, (2**30, 2**30 + 4), (0, 8)) == PARTIAL
    huge = simple("huge", mask=op("lt", op("add", q, const(2**63 - 4)), 0))
    exact = exact_kinds(dense_mask(huge, sizes(16, 4)), (4, 4))
    assert violations(analyse(huge, sizes(16, 4), tile=(4, 4)).dense_kinds(), exact) == 0


def test_a_tensor_shorter_than_the_keys_reads_its_last_element() -> None:
    doc = TensorParam("doc", INT, (Size("N"),))
    program = simple("short", mask=op("eq", Load("doc", (q,), INT), Load("doc", (k,), INT)), tensors=(doc,))
    tensors = {"doc": torch.tensor([0, 0, 1, 1, 2])}
    given = {**sizes(40, 40), "N": 5}
    exact = exact_kinds(dense_mask(program, given, {}, tensors), (8, 8))
    assert (analyse(program, given, {}, tensors, (8, 8)).dense_kinds() == exact).all()


@pytest.mark.parametrize("ids", [[-5, -5, -1, 3], [2**63 - 1, -(2**63), 0, 0], [2**62, 2**62, 2**62, 2**62]])
def test_negative_and_extreme_ids(ids: list[int]) -> None:
    doc = TensorParam("doc", INT, (Size("Lk"),))
    same = op("eq", Load("doc", (q,), INT), Load("doc", (k,), INT))
    later = op("lt", op("sub", Load("doc", (q,), INT), Load("doc", (k,), INT)), 3)
    tensors = {"doc": torch.tensor(ids).repeat_interleave(5)}
    for mask in (same, later):
        program = simple("ids", mask=mask, tensors=(doc,))
        exact = exact_kinds(dense_mask(program, sizes(20, 20), {}, tensors), (5, 5))
        assert violations(analyse(program, sizes(20, 20), {}, tensors, (5, 5)).dense_kinds(), exact) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_floats_stay_sound(value: float) -> None:
    bias = TensorParam("bias", FLOAT, (Size("Lk"),))
    numbers = torch.linspace(-1, 1, 32)
    numbers[13] = value
    for name in ("lt", "ge", "eq", "ne"):
        mask = op(name, op("add", Load("bias", (k,), FLOAT), 0.25), Load("bias", (q,), FLOAT))
        program = simple("bias", mask=mask, tensors=(bias,))
        exact = exact_kinds(dense_mask(program, sizes(32, 32), {}, {"bias": numbers}), (8, 8))
        runs = analyse(program, sizes(32, 32), {}, {"bias": numbers}, (8, 8))
        assert violations(runs.dense_kinds(), exact) == 0
        assert (settle(program, runs, sizes(32, 32), {}, {"bias": numbers}).dense_kinds() == exact).all()


def test_one_element_that_is_nan_may_be_any_number() -> None:
    """Seed 109,446 of the fuzz: a tensor that every pair reads the same element of; int(NaN) is 0."""
    bias = TensorParam("bias", FLOAT, (Size("Lk"),))
    program = simple("nan", mask=op("ne", op("sub", q, 1), cast(Load("bias", (q,), FLOAT), INT)), tensors=(bias,))
    tensors = {"bias": torch.tensor([math.nan])}
    exact = exact_kinds(dense_mask(program, sizes(8, 1), {}, tensors), (4, 4))
    assert violations(analyse(program, sizes(8, 1), {}, tensors, (4, 4)).dense_kinds(), exact) == 0


def test_a_float_comparison_too_close_for_float32_is_left_to_the_kernel() -> None:
    x = Param("x", FLOAT)
    program = simple("close", mask=op("lt", x, 0.1 + 1e-9), scalars=(ScalarParam("x", FLOAT),))
    assert analyse(program, sizes(8, 8), {"x": 0.1}, tile=(8, 8)).counts() == (0, 1, 0)
    assert analyse(program, sizes(8, 8), {"x": 0.0}, tile=(8, 8)).counts() == (0, 0, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_tensors_of_every_width(dtype: torch.dtype) -> None:
    bias = TensorParam("bias", FLOAT, (Size("Lk"),))
    program = simple("bias", mask=op("gt", Load("bias", (k,), FLOAT), 0.0), tensors=(bias,))
    numbers = torch.linspace(-1, 1, 64).to(dtype)
    runs = analyse(program, sizes(8, 64), {}, {"bias": numbers}, (8, 8))
    exact = exact_kinds(dense_mask(program, sizes(8, 64), {}, {"bias": numbers}), (8, 8))
    assert (runs.dense_kinds() == exact).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_int_tensors_of_every_width_and_stride(dtype: torch.dtype) -> None:
    doc = TensorParam("doc", INT, (Size("Lk"),))
    program = simple("doc", mask=op("eq", Load("doc", (q,), INT), Load("doc", (k,), INT)), tensors=(doc,))
    ids = (torch.arange(128) // 10).to(dtype)[::2]
    exact = exact_kinds(dense_mask(program, sizes(64, 64), {}, {"doc": ids}), (16, 16))
    assert (analyse(program, sizes(64, 64), {}, {"doc": ids}, (16, 16)).dense_kinds() == exact).all()


def test_an_empty_tensor_reads_as_zero() -> None:
    flags = TensorParam("flags", BOOL, (Size("N"),))
    program = simple("none", mask=Load("flags", (k,), BOOL), tensors=(flags,))
    runs = analyse(program, {**sizes(8, 8), "N": 0}, {}, {"flags": torch.zeros(0, dtype=torch.bool)}, (8, 8))
    assert runs.counts() == (1, 0, 0)


def test_ten_thousand_nested_operators() -> None:
    expr = q
    for i in range(9000):
        expr = op("add", op("max", expr, i % 7), 1) if i % 3 else op("abs", expr)
    runs = analyse(simple("deep", mask=op("ge", expr, k)), sizes(64, 64), tile=(16, 16))
    assert runs.counts() == (0, 0, 16)


def test_many_cases_do_not_explode() -> None:
    total = const(0)
    for i in range(40):
        total = op("add", total, op("abs", op("sub", q, op("add", k, i))))
    program = simple("abs", mask=op("lt", total, 900))
    exact = exact_kinds(dense_mask(program, sizes(64, 64)), (16, 16))
    assert (analyse(program, sizes(64, 64), tile=(16, 16)).dense_kinds() == exact).all()


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"sizes": {"Lq": 4}}, "'Lk' must be given"),
        ({"sizes": {"Lq": -1, "Lk": 4}}, "not negative"),
        ({"sizes": {"Lq": 2**31, "Lk": 4}}, "2\\^31"),
        ({"tile": (0, 4)}, "tile sides"),
        ({"mask": op("lt", k, Param("w", INT))}, "parameter 'w' has no value"),
        ({"mask": Load("t", (k,), BOOL)}, "tensor 't' has no value"),
        ({"mask": op("lt", k, Size("N"))}, "size 'N' has no value"),
    ],
)
def test_mistakes_are_named(given: dict[str, object], part: str) -> None:
    program = simple("m", mask=given.get("mask", op("ge", q, k)))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=part):
        analyse(program, given.get("sizes", sizes(8, 8)), tile=given.get("tile", (4, 4)))  # type: ignore[arg-type]


def test_runs_of_a_big_problem_stay_small() -> None:
    runs = analyse(simple("causal", mask=op("ge", q, k)), sizes(2**20, 2**20))
    assert runs.memory_bytes < 2**19
    assert np.asarray(runs.tile_kinds(limit=256)).shape == (256, 256)
