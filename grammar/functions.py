"""The table of built-in functions: to add one, add a row (and an operator to ``attnlang.ir.ops`` if it needs one)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce

from attnlang.ir import BOOL, FLOAT, INT, Expr, build, dropout, normalizers, random
from attnlang.ir.build import cdiv, op

__all__ = ["CONSTANTS", "FUNCTIONS", "Function", "builtin_functions"]


@dataclass(frozen=True)
class Function:
    """One built-in function. ``most`` is None when it takes any number of arguments from ``least`` up.

    A function of the ``pair`` also reads all indices of the place that calls it.

    ``build`` receives typed nodes and returns a node, or raises TypeError when a type does not fit.
    """

    name: str
    signature: str
    meaning: str
    build: Callable[..., Expr]
    least: int = 1
    most: int | None = 1
    pair: bool = False


def _float1(name: str, meaning: str) -> Function:
    return Function(name, f"{name}(x: float) -> float", meaning, partial(op, name))


def _cast(name: str, to: object, meaning: str) -> Function:
    return Function(name, f"{name}(x) -> {name}", meaning, lambda x: build.cast(x, to))  # type: ignore[arg-type]


def _many(name: str, meaning: str) -> Function:
    return Function(name, f"{name}(a, b, ...)", meaning, lambda *xs: reduce(partial(op, name), xs), 2, None)


def _isnan(x: Expr) -> Expr:
    x = build.cast(x, FLOAT)
    return op("ne", x, x)


def _ratio(a: Expr, b: Expr) -> Expr:
    return normalizers.ratio(build.cast(a, FLOAT), build.cast(b, FLOAT))


def _softplus(x: Expr) -> Expr:
    return op("add", op("max", x, 0.0), op("log1p", op("exp", op("neg", op("abs", x)))))


def _gelu(x: Expr) -> Expr:
    return op("mul", op("mul", 0.5, x), op("add", 1.0, op("erf", op("mul", x, math.sqrt(0.5)))))


_ROWS = (
    Function("abs", "abs(x)", "absolute value; keeps int or float", partial(op, "abs")),
    Function("sign", "sign(x)", "-1, 0 or 1; keeps int or float", partial(op, "sign")),
    _many("min", "smallest of two or more"),
    _many("max", "largest of two or more"),
    Function("clamp", "clamp(x, low, high)", "min(max(x, low), high)", build.clamp, 3, 3),
    Function("where", "where(c: bool, a, b)", "a if c else b", partial(op, "where"), 3, 3),
    Function("cdiv", "cdiv(a: int, b: int) -> int", "a / b rounded up, for b > 0", cdiv, 2, 2),
    Function("ratio", "ratio(a: float, b: float) -> float", "a / b, and 0 where b is 0", _ratio, 2, 2),
    _cast("float", FLOAT, "conversion; true is 1.0"),
    _cast("int", INT, "conversion; truncates towards zero, saturates at 32 bits, NaN is 0"),
    _cast("bool", BOOL, "x != 0"),
    Function("isnan", "isnan(x: float) -> bool", "whether x is not a number", _isnan),
    _float1("exp", "e to the power x"),
    _float1("exp2", "2 to the power x"),
    _float1("expm1", "exp(x) - 1, exact near 0"),
    _float1("log", "natural logarithm"),
    _float1("log2", "logarithm to base 2"),
    _float1("log1p", "log(1 + x), exact near 0"),
    _float1("sqrt", "square root"),
    _float1("rsqrt", "1 / sqrt(x)"),
    _float1("sin", "sine"),
    _float1("cos", "cosine"),
    _float1("tan", "tangent"),
    _float1("atan", "arc tangent"),
    _float1("tanh", "hyperbolic tangent"),
    _float1("sigmoid", "1 / (1 + exp(-x))"),
    _float1("erf", "error function"),
    _float1("floor", "largest whole number not above x, as a float"),
    _float1("ceil", "smallest whole number not below x, as a float"),
    _float1("round", "nearest whole number, ties to even, as a float"),
    _float1("trunc", "whole part of x, as a float"),
    Function(
        "random", "random(seed: int, i: int, ...) -> float", "in [0, 1), the same for the same ints", random, 1, None
    ),
    Function(
        "dropout",
        "dropout(x: float, share: float, seed: int) -> float",
        "0 for a random share of the pairs, x / (1 - share) for others",
        dropout,
        3,
        3,
        True,
    ),
    Function("relu", "relu(x)", "max(x, 0); keeps int or float", lambda x: op("max", x, 0)),
    Function("softplus", "softplus(x: float) -> float", "log(1 + exp(x)), without overflow", _softplus),
    Function("silu", "silu(x: float) -> float", "x * sigmoid(x)", lambda x: op("mul", x, op("sigmoid", x))),
    Function("gelu", "gelu(x: float) -> float", "x * Phi(x), the exact form", _gelu),
)

FUNCTIONS = {row.name: row for row in _ROWS}
"""Every built-in function by name."""

CONSTANTS = {"inf": math.inf, "nan": math.nan, "pi": math.pi}
"""Named float constants."""


def builtin_functions() -> tuple[Function, ...]:
    """Return every built-in function, in the order of the reference."""
    return _ROWS
