"""Every operator of the table at every level and width, read off exactly.

With the mask ``k == q`` each row sees one key, so lse is the score of that pair; integer and boolean results are
compared exactly through the mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from attnlang.ir import BOOL, FLOAT, INT, OPS, Expr, Load, ScalarParam, Size, TensorParam, Type, simple
from attnlang.ir.build import all_of, const, k, op, param, q, s
from attnlang.ir.evaluate import Environment, evaluate
from attnlang.runtime.cpp import forward

from .support import diagonal, make_call

pytestmark = pytest.mark.usefixtures("lightly_optimised")

Tensor = torch.Tensor

EDGE_INTS = {
    "int8": [0, 1, -1, 2, -3, 7, 31, 33, 63, 64, 100, -100, 127, -128],
    "int32": [0, 1, -1, 3, -7, 31, 32, 63, 64, 2**16, -(2**16) - 1, 2**31 - 1, -(2**31)],
    "int64": [0, 1, -1, 3, -7, 31, 63, 64, 2**31, -(2**33) - 5, 2**62, 2**63 - 1, -(2**63)],
}
EDGE_FLOATS = [0.0, -0.0, 0.25, 0.5, -0.5, 1.0, -1.0, 1.5, 2.5, -2.5, 3.75, -7.3, 12.0, 31.0, -60.0, 88.0, -104.0, 1e-6]
EDGE_FLOATS += [1e-40, 300.0, 4194305.5, -8388609.0, 3e9, -3e9, 1e30, float("inf"), float("-inf"), float("nan")]
LEVELS = {"pair": (q, k), "row": (q, q), "col": (k, k)}
SAMPLES = 400
EXACT = ("add", "sub", "mul", "div", "neg", "abs", "min", "max", "sign", "where", "to_float", "sqrt")
"""Operators whose float results are correctly rounded, also where float32 is subnormal or overflows."""
WHICH = param("which", INT)


@dataclass(frozen=True)
class Probe:
    """One operator applied to loads of columns ``x<type><position>``."""

    name: str
    expr: Expr


def _column(type_: Type, dtype: str, generator: torch.Generator) -> Tensor:
    """Edge values and plain values, mixed at random."""
    if type_ is BOOL:
        return torch.rand(SAMPLES, generator=generator) < 0.5
    edges = torch.tensor(EDGE_FLOATS if type_ is FLOAT else EDGE_INTS[dtype], dtype=getattr(torch, dtype))
    picked = edges[torch.randint(len(edges), (SAMPLES,), generator=generator)]
    plain = torch.randn(SAMPLES, generator=generator) * 4 if type_ is FLOAT else torch.randint(-20, 20, (SAMPLES,))
    return torch.where(torch.rand(SAMPLES, generator=generator) < 0.6, picked, plain.to(picked.dtype))


def _columns(dtype: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    storage = {INT: dtype, FLOAT: "float32", BOOL: "bool"}
    return {f"x{t}{i}": _column(t, storage[t], generator) for t in storage for i in range(3)}


def _signatures(name: str) -> list[tuple[Type, ...]]:
    kinds = OPS[name].args
    shared = {"n": (INT, FLOAT), "x": (BOOL, INT, FLOAT)}
    free = next((shared[c] for c in kinds if c in shared), (FLOAT,))
    fixed = {"i": INT, "f": FLOAT, "b": BOOL}
    return [tuple(fixed.get(c) or choice for c in kinds) for choice in free]


def _probes(result: Type, argument: Callable[[Type, int], Expr]) -> list[Probe]:
    """Every operator with results of type ``result``, on every signature."""
    found = []
    for name in OPS:
        for types in _signatures(name):
            expr = op(name, *(argument(t, i) for i, t in enumerate(types)))
            if expr.type is result:
                found.append(Probe(name, expr))
    return found


def _choose(probes: list[Probe]) -> Expr:
    """The probe the parameter ``which`` asks for: one kernel serves all of them."""
    chosen = probes[0].expr
    for i, probe in enumerate(probes[1:], 1):
        chosen = op("where", op("eq", WHICH, i), probe.expr, chosen)
    return chosen


def _run(
    probes: list[Probe], values: dict[str, Tensor], given: dict[str, float]
) -> Iterator[tuple[Probe, Tensor, Tensor]]:
    """Yield each probe with the lse of its rows and the values wanted.

    Row i sees key i: with score ``probe`` if that is a float, and if ``probe == want`` otherwise.
    """
    points = torch.arange(SAMPLES)
    type_ = probes[0].expr.type
    tensors = tuple(TensorParam(n, Type[n[1:-1].upper()], (Size("Lq"),)) for n in values)
    scalars = (
        ScalarParam("which", INT),
        *(ScalarParam(n, FLOAT if "float" in n else INT if "int" in n else BOOL) for n in given),
    )
    mask, score = op("eq", q, k), s
    chosen = _choose(probes)
    if type_ is FLOAT:
        score = chosen
    else:
        want_tensor = Load("want", (q,), type_)
        tensors += (TensorParam("want", type_, (Size("Lq"),)),)
        mask = all_of(
            mask, op("eq", chosen, want_tensor) if type_ is INT else op("not", op("xor", chosen, want_tensor))
        )
    program = simple("probe", mask=mask, score=score, tensors=tensors, scalars=scalars)
    qkv = [torch.zeros(1, 1, SAMPLES, 8)] * 3
    env = Environment(dict.fromkeys("qk", points), {"Lq": SAMPLES, "Lk": SAMPLES}, given, values)
    for i, probe in enumerate(probes):
        want = evaluate(probe.expr, env).expand(SAMPLES).contiguous()
        bound = values if type_ is FLOAT else {**values, "want": want}
        call = make_call(program, *qkv, tensors=bound, params={**given, "which": i}, runs=diagonal)
        yield probe, forward(call)[1][0, 0], want


def _check(probe: Probe, lse: Tensor, want: Tensor, values: dict[str, Tensor]) -> None:
    if want.dtype is torch.float64:
        want = want.float().double() if probe.name in EXACT else want
        finite = want.isfinite() & (want.abs() <= torch.finfo(torch.float32).max)
        tolerance = 4e-6 if probe.name in ("pow", "tan", "sin", "cos") else 2e-6
        close = torch.isclose(lse.double(), want, atol=1e-37, rtol=tolerance) | ~finite
        assert close.all(), (probe, lse[~close][:5], want[~close][:5])
        assert not lse[~finite].isfinite().any(), probe
    else:
        wrong = (lse != 0).nonzero().flatten().tolist()
        assert not wrong, (probe, {i: {n: v[i].item() for n, v in values.items()} for i in wrong[:3]})


@pytest.mark.parametrize("result", [FLOAT, INT, BOOL], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", EDGE_INTS)
def test_operators_on_captured_values(dtype: str, level: str, result: Type) -> None:
    values = _columns(dtype)
    at = LEVELS[level]
    probes = _probes(result, lambda t, i: Load(f"x{t}{i}", (at[i % 2],), t))
    for probe, lse, want in _run(probes, values, {}):
        _check(probe, lse, want, values)


@pytest.mark.parametrize("dtype", EDGE_INTS)
def test_integer_edges_in_every_combination(dtype: str) -> None:
    pairs = list(itertools.product(EDGE_INTS[dtype], repeat=2))
    pairs += [(0, 1)] * (SAMPLES - len(pairs))
    columns = torch.tensor(pairs, dtype=getattr(torch, dtype)).unbind(1)
    values = {f"xint{i}": c.contiguous() for i, c in enumerate(columns)}
    loads = [Load(n, (at,), INT) for n, at in zip(values, (q, k), strict=True)]
    probes = [Probe(n, op(n, *loads)) for n in ("floordiv", "mod", "shl", "shr", "add", "mul", "min")]
    for probe, lse, want in _run(probes, values, {}):
        _check(probe, lse, want, values)


@pytest.mark.parametrize("result", [FLOAT, INT, BOOL], ids=str)
def test_operators_on_parameters(result: Type) -> None:
    """GRID level: scalars of the kernel."""
    probes = _probes(result, lambda t, i: param(f"p{t}{i}", t))
    for numbers in ((7, -2, 1), (-7, 0, 3), (-5, 3, 0), (1000, 40, 2)):
        given = {f"pint{i}": n for i, n in enumerate(numbers)}
        given |= {f"pfloat{i}": n / 4 for i, n in enumerate(numbers)} | {
            f"pbool{i}": n > 0 for i, n in enumerate(numbers)
        }
        for probe, lse, want in _run(probes, {}, given):
            _check(probe, lse, want, {})


def test_constants_of_every_size() -> None:
    probes = [
        Probe("const", op("add", const(x), op("mul", q, 0)))
        for x in (0, -1, 2**31 - 1, -(2**31), 2**31, -(2**63), 2**63 - 1)
    ]
    for probe, lse, want in _run(probes, {}, {}):
        _check(probe, lse, want, {})
    probes = [
        Probe("abs", op("add", const(x), op("to_float", op("mul", q, 0)))) for x in (1e-45, 3e38, 0.1, -2.5, 1e10)
    ]
    for probe, lse, want in _run(probes, {}, {}):
        _check(probe, lse, want, {})
