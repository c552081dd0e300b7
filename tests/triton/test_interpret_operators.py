"""Every operator of the table, in a score and in a mask, and captured tensors of every kind, against the reference."""

from __future__ import annotations

import pytest
import torch
from triton_checks import check, make_call, qkv

from attnlang.codegen.triton_printer import TritonPrinter
from attnlang.ir import BOOL, FLOAT, INT, OPS, Const, Load, Param, Program, ScalarParam, Size, TensorParam, simple
from attnlang.ir.build import b, cast, const, h, k, op, q, s, size

LQ, LK = 35, 37
DIFF = op("sub", q, k)
INTS = {"a": op("sub", op("mul", DIFF, 3), 7), "b": op("sub", op("mod", op("add", q, k), 7), 3)}
"""Two ints of both signs; the second is 0 for some pairs."""

SPECIAL = [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 1.0, -1.0, 3.0, 1e-3, -1e-3, 1e-6, 0.3, -0.7, 20.0, -20.0, 90.0]
FLOATS = TensorParam("x", FLOAT, (Size("Lq"), Size("Lk"))), TensorParam("y", FLOAT, (Size("Lq"), Size("Lk")))
X, Y = (Load(t.name, (q, k), FLOAT) for t in FLOATS)

DOMAIN = {"log": 0.0, "log2": 0.0, "sqrt": 0.0, "rsqrt": 0.0}
"""Smallest argument at which an operator of a score is compared; below it the result is NaN everywhere."""


def operand(kind: str, which: int, shared: str):
    if kind == "f" or (kind in "nx" and shared == "float"):
        return (X, Y)[which]
    if kind == "i" or kind in "nx":
        return (INTS["a"], INTS["b"])[which]
    return (op("lt", k, q), op("eq", op("mod", k, 3), 0))[which]


def float_captures() -> dict[str, torch.Tensor]:
    x = torch.cat([torch.tensor(SPECIAL), torch.randn(LQ * LK - len(SPECIAL)) * 3])
    y = torch.cat([torch.randn(LQ * LK - len(SPECIAL)), torch.tensor(SPECIAL)]).abs() + 0.1
    y[::5] *= -1
    y[3::11] = 0
    return {"x": x.view(LQ, LK), "y": y.view(LQ, LK)}


def variants() -> list[tuple[str, str]]:
    return [
        (name, t) for name, spec in OPS.items() for t in (("int", "float") if set(spec.args) & set("nx") else ("",))
    ]


def apply(name: str, shared: str):
    which = iter((0, 1))
    kinds = OPS[name].args
    if name == "where":
        return op("where", op("lt", k, q), *(operand("x", i, shared) for i in (0, 1)))
    return op(name, *(operand(kind, next(which), shared) for kind in kinds))


def with_captures(name: str, *, mask=None, score=None) -> Program:
    return simple(name, mask=const(True) if mask is None else mask, score=s if score is None else score, tensors=FLOATS)


def test_every_operator_is_printed():
    special = {n.removeprefix("_op_") for n in dir(TritonPrinter) if n.startswith("_op_")}
    assert set(OPS) == set(TritonPrinter.formats) | special


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "shared"), variants(), ids=lambda x: x or "-")
def test_operator_in_a_score(name, shared):
    captured = float_captures()
    if name in DOMAIN:
        captured["x"] = captured["x"].abs() + 1e-3
    if name == "pow":
        captured = {"x": captured["x"].abs() + 1e-2, "y": captured["y"].clamp(-2, 2)}
    if name in ("exp", "exp2", "expm1", "div", "tan"):
        captured["x"] = captured["x"].clamp(-3, 1.5)
        captured["y"] = captured["y"].abs() + 0.5
    value = cast(apply(name, shared), FLOAT)
    score = op("add", s, op("mul", value, 0.125))
    check(make_call(with_captures(name, score=score), *qkv(1, 1, LQ, LK), captured), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "shared"), variants(), ids=lambda x: x or "-")
def test_operator_in_a_mask(name, shared):
    value = apply(name, shared)
    if value.type is FLOAT:  # away from the rounding of a result
        mask = op("gt", op("add", value, 0.0371), 0.0)
        mask = op("and", mask, op("gt", op("abs", op("add", value, 0.0371)), 1e-4))
    else:
        mask = value if value.type is BOOL else op("gt", value, 0)
    check(make_call(with_captures(name, mask=mask), *qkv(1, 1, LQ, LK), float_captures()), atol=1e-4, rtol=1e-4)


def values_of(name: str, arguments: torch.Tensor, second: torch.Tensor | None = None) -> torch.Tensor:
    """Evaluate a float operator elementwise: with one visible key the lse is the score."""
    n = arguments.numel()
    tensors = (TensorParam("x", FLOAT, (Size("Lq"),)), TensorParam("y", FLOAT, (Size("Lq"),)))
    args = [Load(t.name, (q,), FLOAT) for t in tensors][: len(OPS[name].args)]
    program = simple(name, score=op(name, *args), tensors=tensors)
    other = torch.zeros(n) if second is None else second
    call = make_call(program, *qkv(1, 1, n, 1), {"x": arguments.float(), "y": other.float()})
    from attnlang.runtime import triton as backend

    return backend.forward(call)[1][0, 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "erf", "atan", "expm1", "log1p", "round", "trunc", "tan"])
def test_own_formulas_are_accurate(name):
    x = torch.cat([torch.linspace(-12, 12, 301), torch.logspace(-6, 1.5, 60), -torch.logspace(-6, -0.2, 60)])
    if name == "log1p":
        x = x[x > -0.95]
    if name == "tan":
        x = x[torch.cos(x).abs() > 0.05]
    want = OPS[name].evaluate(x.double())
    torch.testing.assert_close(values_of(name, x).double(), want, atol=3e-7, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_powers_at_special_arguments():
    inf = float("inf")
    pairs = [
        (0, 0),
        (0, 2),
        (-2, 3),
        (-2, 2),
        (-2, 0.5),
        (1, inf),
        (2, -inf),
        (inf, -1),
        (-inf, 3),
        (-inf, -2),
        (0.5, inf),
    ]
    x, y = (torch.tensor(c, dtype=torch.float64) for c in zip(*pairs, strict=True))
    got = values_of("pow", x, y)
    torch.testing.assert_close(got.double(), torch.pow(x, y), equal_nan=True)


@pytest.mark.parametrize("divisor", [8, 1, 7, -8, -3, 0, -1])
@pytest.mark.parametrize("name", ["floordiv", "mod"])
def test_division_by_constants(name, divisor):
    value = op(name, op("sub", q, op("mul", k, 2)), const(divisor))
    program = simple(name, mask=op("ne", op("mod", value, 3), 1), score=op("add", s, cast(value, FLOAT)))
    check(make_call(program, *qkv(1, 1, LQ, LK)), atol=1e-4)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 0.5, 1.0, -1.5])
def test_constant_powers(exponent):
    score = op("add", s, op("pow", cast(op("add", q, 1), FLOAT), const(exponent)))
    check(make_call(simple("power", score=op("mul", score, 0.01)), *qkv(1, 1, LQ, LK)), atol=1e-4)


LEVELS = {"grid": (b, h), "row": (b, q), "col": (h, k), "pair": (q, k), "scalar": (const(1), const(0))}
DIMS = {"grid": ("B", "H"), "row": ("B", "Lq"), "col": ("H", "Lk"), "pair": ("Lq", "Lk"), "scalar": ("N", "M")}
FLOAT_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INT_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def shape_of(level: str) -> tuple[int, ...]:
    sizes = {"B": 2, "H": 2, "Lq": LQ, "Lk": LK, "N": 3, "M": 2}
    return tuple(sizes[n] for n in DIMS[level])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_float_captures(level, dtype):
    param = TensorParam("bias", FLOAT, tuple(Size(n) for n in DIMS[level]))
    bias = torch.randn(*shape_of(level)).to(dtype)
    program = simple("bias", score=op("add", s, Load("bias", LEVELS[level], FLOAT)), tensors=(param,))
    check(make_call(program, *qkv(2, 2, LQ, LK), {"bias": bias}))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [*INT_DTYPES, torch.bool], ids=str)
def test_int_and_bool_captures(level, dtype):
    kind = BOOL if dtype is torch.bool else INT
    value = Load("x", LEVELS[level], kind)
    mask = value if kind is BOOL else op("ne", op("mod", op("add", value, k), 3), 0)
    param = TensorParam("x", kind, tuple(Size(n) for n in DIMS[level]))
    x = torch.randint(0, 2 if kind is BOOL else 100, shape_of(level)).to(dtype)
    check(make_call(simple("ints", mask=mask, tensors=(param,)), *qkv(2, 2, LQ, LK), {"x": x}))


def test_captures_with_any_strides_and_ranks():
    tensors = (
        TensorParam("zero", FLOAT, ()),
        TensorParam("four", FLOAT, (Size("B"), Size("H"), Size("Lq"), Size("Lk"))),
    )
    bias = op("mul", Load("zero", (), FLOAT), Load("four", (b, h, q, k), FLOAT))
    captured = {"zero": torch.tensor(0.7), "four": torch.randn(LK, 2, LQ, 1).permute(3, 1, 2, 0).expand(2, 2, LQ, LK)}
    check(make_call(simple("four", score=op("add", s, bias), tensors=tensors), *qkv(2, 2, LQ, LK), captured))


def test_indices_out_of_range_are_clamped():
    table = TensorParam("table", FLOAT, (Size("N"),))
    score = op("add", s, Load("table", (op("add", op("sub", k, q), 4),), FLOAT))
    program = simple("table", score=score, tensors=(table,))
    check(make_call(program, *qkv(1, 1, LQ, LK), {"table": torch.randn(9)}))
    check(make_call(program, *qkv(1, 1, LQ, LK), {"table": torch.randn(0)}))


def test_gathers_through_captured_indices():
    tensors = (TensorParam("at", INT, (Size("Lk"),)), TensorParam("table", FLOAT, (Size("N"), Size("H"))))
    score = op("add", s, Load("table", (op("sub", Load("at", (k,), INT), q), h), FLOAT))
    captured = {"at": torch.randint(-5, 50, (LK,)), "table": torch.randn(11, 2)}
    check(make_call(simple("gather", score=score, tensors=tensors), *qkv(1, 2, LQ, LK), captured))


def test_runtime_scalars_of_every_type():
    scalars = (ScalarParam("window", INT, 5), ScalarParam("cap", FLOAT, 2.0), ScalarParam("on", BOOL, True))
    near = op("le", op("abs", DIFF), Param("window", INT))
    mask = op("or", near, op("not", Param("on", BOOL)))
    score = op("mul", Param("cap", FLOAT), op("tanh", op("div", s, Param("cap", FLOAT))))
    program = simple("scalars", mask=mask, score=score, scalars=scalars)
    for params in ({"window": 5, "cap": 2.0, "on": True}, {"window": 1, "cap": 30.0, "on": False}):
        check(make_call(program, *qkv(1, 1, LQ, LK), params=params))


def test_names_that_mean_something_else():
    scalars = tuple(ScalarParam(n, INT, 3) for n in ("lambda", "tl", "acc", "square", "q_ptr", "start"))
    total = op("add", *(Param(n, INT) for n in ("lambda", "tl")))
    for name in ("acc", "square", "q_ptr", "start"):
        total = op("add", total, Param(name, INT))
    tensors = (TensorParam("k_local", INT, (Size("Lk"),)), TensorParam("triton", INT, (Size("Lq"),)))
    total = op("add", total, op("add", Load("k_local", (k,), INT), Load("triton", (q,), INT)))
    program = simple("names", mask=op("lt", DIFF, total), scalars=scalars, tensors=tensors)
    captured = {"k_local": torch.randint(0, 5, (LK,)), "triton": torch.randint(-9, 5, (LQ,))}
    check(make_call(program, *qkv(1, 1, LQ, LK), captured, {p.name: 3 for p in scalars}))


def test_scores_and_masks_that_do_not_depend_on_the_pair():
    for score in (const(0.5), cast(q, FLOAT), cast(k, FLOAT), cast(h, FLOAT), cast(size("Lq"), FLOAT)):
        check(make_call(simple("flat", score=score), *qkv(1, 2, LQ, LK)))
    for mask in (op("lt", q, 9), op("lt", k, 9), op("eq", h, 1), op("gt", size("Lk"), 5)):
        check(make_call(simple("flat", mask=mask), *qkv(1, 2, LQ, LK)))


def test_wide_arithmetic():
    big = ScalarParam("big", INT, 2**40)
    product = op("mod", op("mul", Param("big", INT), op("add", q, k)), 1009)
    program = simple("wide", mask=op("lt", product, 500), scalars=(big,))
    check(make_call(program, *qkv(1, 1, LQ, LK), params={"big": 2**40 + 12345}))
    ids = simple(
        "ids",
        mask=op("eq", Load("id", (q,), INT), Load("id", (k,), INT)),
        tensors=(TensorParam("id", INT, (Size("Lk"),)),),
    )
    check(make_call(ids, *qkv(1, 1, LQ, LK), {"id": torch.randint(0, 2, (LK,)) * 2**33 + torch.randint(0, 3, (LK,))}))


def test_shifts_of_any_distance():
    distance = op("sub", op("mod", k, 70), 3)
    for name in ("shl", "shr"):
        value = op("mod", op(name, op("sub", q, 9), distance), 13)
        check(make_call(simple(name, mask=op("gt", value, 3)), *qkv(1, 1, LQ, 80)))


def test_saturating_conversion_to_int():
    x = torch.tensor([1e20, -1e20, float("nan"), float("inf"), 2.7, -2.7, 2147483520.0])
    program = simple(
        "saturate",
        score=cast(op("shr", op("to_int", Load("x", (q,), FLOAT)), 1), FLOAT),
        tensors=(TensorParam("x", FLOAT, (Size("Lq"),)),),
    )
    check(make_call(program, *qkv(1, 1, 7, 3), {"x": x}))


def test_constants_are_folded_to_the_same_values():
    assert isinstance(const(3), Const)
    score = op("add", s, op("where", op("lt", q, k), const(float("-inf")), const(0.25)))
    check(make_call(simple("constants", score=score), *qkv(1, 1, LQ, LK)))
