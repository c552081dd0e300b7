"""Captured tensors of every dtype, rank, level and layout, and layouts of q, k and v."""

from __future__ import annotations

import pytest
import torch

from attnlang.ir import BOOL, FLOAT, INT, Expr, Load, ScalarParam, Size, TensorParam, simple
from attnlang.ir.build import b, clamp, h, k, op, param, q, s

from .support import check, make_call

pytestmark = pytest.mark.usefixtures("lightly_optimised")

Tensor = torch.Tensor

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


def qkv(batch: int = 2, heads: int = 2, lq: int = 70, lk: int = 90, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, heads, lq, d), torch.randn(batch, heads, lk, d), torch.randn(batch, heads, lk, d)


def bias(*at: Expr) -> Expr:
    return op("add", s, Load("table", at, FLOAT))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_float_captures(dtype: torch.dtype) -> None:
    program = simple(
        "biases",
        score=op("add", bias(b, h, q, k), op("add", Load("row", (q,), FLOAT), Load("col", (h, k), FLOAT))),
        tensors=(
            TensorParam("table", FLOAT, (Size("B"), Size("H"), Size("Lq"), Size("Lk"))),
            TensorParam("row", FLOAT, (Size("Lq"),)),
            TensorParam("col", FLOAT, (Size("H"), Size("Lk"))),
        ),
    )
    tensors = {"table": torch.randn(2, 2, 70, 90), "row": torch.randn(70), "col": torch.randn(2, 90)}
    check(make_call(program, *qkv(), tensors={n: t.to(dtype) for n, t in tensors.items()}))


def test_half_floats_are_read_exactly() -> None:
    """Every float16 bit pattern that is finite, among them the subnormals."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    every = every[every.isfinite()][:: 16 * 7]
    program = simple(
        "diagonal",
        mask=op("eq", q, k),
        score=Load("x", (q,), FLOAT),
        tensors=(TensorParam("x", FLOAT, (Size("Lq"),)),),
    )
    n = len(every)
    _, lse = check(make_call(program, *qkv(1, 1, n, n), tensors={"x": every}))
    assert torch.equal(lse[0, 0], every.float())


@pytest.mark.parametrize("dtype", INTS, ids=str)
def test_int_captures(dtype: torch.dtype) -> None:
    """Document ids of rows and columns, and a table of ids per pair of ids."""
    same = op("eq", Load("rows", (q,), INT), Load("cols", (k,), INT))
    looked_up = op("gt", Load("pairs", (Load("rows", (q,), INT), Load("cols", (k,), INT)), INT), 1)
    program = simple(
        "documents",
        mask=op("or", same, looked_up),
        tensors=(
            TensorParam("rows", INT, (Size("Lq"),)),
            TensorParam("cols", INT, (Size("Lk"),)),
            TensorParam("pairs", INT, (Size("N"), Size("M"))),
        ),
    )
    tensors = {"rows": torch.arange(70) // 9, "cols": torch.arange(90) // 7 % 9, "pairs": torch.randint(0, 4, (8, 9))}
    tensors = {n: t.to(dtype) for n, t in tensors.items()}
    check(make_call(program, *qkv(), tensors=tensors, sizes={"N": 8, "M": 9}))


def test_bool_captures_and_padding() -> None:
    program = simple(
        "padded",
        mask=op("and", Load("keep", (b, k), BOOL), op("not", Load("skip", (q, h), BOOL))),
        tensors=(
            TensorParam("keep", BOOL, (Size("B"), Size("Lk"))),
            TensorParam("skip", BOOL, (Size("Lq"), Size("H"))),
        ),
    )
    tensors = {"keep": torch.rand(2, 90) < 0.7, "skip": torch.rand(70, 2) < 0.3}
    o, lse = check(make_call(program, *qkv(), tensors=tensors))
    empty = tensors["skip"].T[None].expand(2, 2, 70)
    assert not o[empty].any() and bool((lse[empty] == -torch.inf).all())


def test_indices_are_clamped() -> None:
    at = op("sub", op("mul", op("sub", q, k), 3), 5)
    program = simple("clamped", score=bias(at), tensors=(TensorParam("table", FLOAT, (Size("N"),)),))
    check(make_call(program, *qkv(), tensors={"table": torch.randn(40)}, sizes={"N": 40}))
    check(make_call(program, *qkv(), tensors={"table": torch.randn(0)}, sizes={"N": 0}))


def test_relative_table_of_rank_two_and_scalar_tensor() -> None:
    distance = clamp(op("add", op("sub", q, k), 20), 0, 40)
    program = simple(
        "relative",
        score=op("add", bias(h, distance), Load("shift", (), FLOAT)),
        tensors=(TensorParam("table", FLOAT, (Size("H"), Size("N"))), TensorParam("shift", FLOAT, ())),
    )
    tensors = {"table": torch.randn(2, 41), "shift": torch.tensor(0.5)}
    check(make_call(program, *qkv(), tensors=tensors, sizes={"N": 41}))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "reversed_dims", "sliced"])
def test_layouts_of_captures(layout: str) -> None:
    program = simple(
        "laid_out", score=bias(h, q, k), tensors=(TensorParam("table", FLOAT, (Size("H"), Size("Lq"), Size("Lk"))),)
    )
    table = {
        "transposed": torch.randn(2, 90, 70).transpose(1, 2),
        "expanded": torch.randn(1, 70, 1).expand(2, 70, 90),
        "reversed_dims": torch.randn(90, 70, 2).permute(2, 1, 0),
        "sliced": torch.randn(2, 140, 270)[:, ::2, ::3],
    }[layout]
    check(make_call(program, *qkv(), tensors={"table": table}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["blhd", "last", "expanded", "sliced"])
def test_layouts_of_operands(layout: str, dtype: torch.dtype) -> None:
    def rows(length: int) -> Tensor:
        return {
            "blhd": torch.randn(2, length, 2, 24).transpose(1, 2),
            "last": torch.randn(2, 2, 24, length).transpose(2, 3),
            "expanded": torch.randn(1, 1, length, 24).expand(2, 2, length, 24),
            "sliced": torch.randn(2, 2, 2 * length, 48)[:, :, ::2, 1:25],
        }[layout].to(dtype)

    program = simple("causal", mask=op("ge", op("add", q, 20), k))
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    check(make_call(program, rows(70), rows(90), rows(90)), tolerance, tolerance)


def test_keys_shared_by_the_batch() -> None:
    queries, keys, values = qkv()
    check(make_call(simple("full"), queries, keys[:1], values[:1]))


def test_parameters_do_not_recompile() -> None:
    program = simple(
        "window",
        mask=op("lt", op("abs", op("sub", q, k)), param("width", INT)),
        score=op("mul", s, param("gain", FLOAT)),
        scalars=(ScalarParam("width", INT), ScalarParam("gain", FLOAT)),
    )
    for width, gain in ((1, 1.0), (30, -2.0), (1000, 0.5)):
        check(make_call(program, *qkv(), params={"width": width, "gain": gain}))
