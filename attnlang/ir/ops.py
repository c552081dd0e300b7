"""The operator table: the one place where an operator of the language is defined.

A row gives the argument kinds, the result type, how the operator is written, and its meaning as a function on torch
tensors (int64, float64 or float32, bool). Every operator is total: no argument values raise or trap. Printers of
target languages, the abstract domain and the derivatives each keep a table keyed by the same names; a test asserts that
no table misses a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .types import BOOL, FLOAT, INT, Type, join

__all__ = ["OPS", "OpSpec", "result_type"]

Tensor = torch.Tensor

INT32_MAX = 2**31 - 1
INT32_MIN = -(2**31)


@dataclass(frozen=True)
class OpSpec:
    """One operator.

    ``args``: kind of each argument: ``n`` int or float (all ``n`` arguments agree), ``i`` int, ``f`` float, ``b`` bool,
    ``x`` any (all ``x`` arguments agree). ``result``: a type, or ``n``/``x`` for the type those arguments share.
    ``symbol``: infix symbol for printing, empty for function notation.
    """

    name: str
    args: str
    result: Type | str
    evaluate: Callable[..., Tensor]
    symbol: str = ""
    precedence: int = 100
    commutative: bool = False


def _nonzero(b: Tensor) -> tuple[Tensor, Tensor]:
    zero = b == 0
    return zero, torch.where(zero, torch.ones_like(b), b)


def _floordiv(a: Tensor, b: Tensor) -> Tensor:
    zero, safe = _nonzero(b)
    if not a.is_floating_point():
        minus = safe == -1  # INT_MIN // -1 traps on some processors; negation wraps instead
        safe = torch.where(minus, torch.ones_like(safe), safe)
        out = torch.div(a, safe, rounding_mode="floor")
        out = torch.where(minus, -a, out)
    else:
        out = torch.floor(a / safe)
    return torch.where(zero, torch.zeros_like(out), out)


def _mod(a: Tensor, b: Tensor) -> Tensor:
    zero, safe = _nonzero(b)
    if not a.is_floating_point():
        safe = torch.where(safe == -1, torch.ones_like(safe), safe)
    out = torch.remainder(a, safe)
    return torch.where(zero, torch.zeros_like(out), out)


def _to_int(a: Tensor) -> Tensor:
    if not a.is_floating_point():
        return a.to(torch.int64)
    finite = torch.nan_to_num(a.double(), nan=0.0, posinf=INT32_MAX, neginf=INT32_MIN)
    return finite.clamp(INT32_MIN, INT32_MAX).trunc().to(torch.int64)


def _shift(fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, n: fn(a, n.clamp(0, 63))


def _select(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(c, a, b)


_ROWS = (
    # arithmetic
    OpSpec("add", "nn", "n", torch.add, "+", 60, True),
    OpSpec("sub", "nn", "n", torch.sub, "-", 60),
    OpSpec("mul", "nn", "n", torch.mul, "*", 70, True),
    OpSpec("div", "ff", FLOAT, torch.div, "/", 70),
    OpSpec("floordiv", "nn", "n", _floordiv, "//", 70),
    OpSpec("mod", "nn", "n", _mod, "%", 70),
    OpSpec("neg", "n", "n", torch.neg, "-", 80),
    OpSpec("abs", "n", "n", torch.abs),
    OpSpec("min", "nn", "n", torch.minimum, commutative=True),
    OpSpec("max", "nn", "n", torch.maximum, commutative=True),
    OpSpec("sign", "n", "n", torch.sign),
    OpSpec("pow", "ff", FLOAT, torch.pow, "**", 90),
    # integer bits
    OpSpec("bitand", "ii", INT, torch.bitwise_and, "&", 50, True),
    OpSpec("bitor", "ii", INT, torch.bitwise_or, "|", 48, True),
    OpSpec("bitxor", "ii", INT, torch.bitwise_xor, "^", 49, True),
    OpSpec("bitnot", "i", INT, torch.bitwise_not, "~", 80),
    OpSpec("shl", "ii", INT, _shift(torch.bitwise_left_shift), "<<", 55),
    OpSpec("shr", "ii", INT, _shift(torch.bitwise_right_shift), ">>", 55),
    # logic
    OpSpec("and", "bb", BOOL, torch.logical_and, "and", 20, True),
    OpSpec("or", "bb", BOOL, torch.logical_or, "or", 10, True),
    OpSpec("xor", "bb", BOOL, torch.logical_xor, "!=", 40, True),
    OpSpec("not", "b", BOOL, torch.logical_not, "not ", 30),
    # comparisons
    OpSpec("lt", "nn", BOOL, torch.lt, "<", 40),
    OpSpec("le", "nn", BOOL, torch.le, "<=", 40),
    OpSpec("gt", "nn", BOOL, torch.gt, ">", 40),
    OpSpec("ge", "nn", BOOL, torch.ge, ">=", 40),
    OpSpec("eq", "nn", BOOL, torch.eq, "==", 40, True),
    OpSpec("ne", "nn", BOOL, torch.ne, "!=", 40, True),
    # choice and conversion
    OpSpec("where", "bxx", "x", _select),
    OpSpec("to_float", "x", FLOAT, lambda a: a.to(torch.float64)),  # the evaluator passes its own float dtype
    OpSpec("to_int", "x", INT, _to_int),
    OpSpec("to_bool", "n", BOOL, lambda a: a != 0),
    # float functions
    OpSpec("exp", "f", FLOAT, torch.exp),
    OpSpec("exp2", "f", FLOAT, torch.exp2),
    OpSpec("expm1", "f", FLOAT, torch.expm1),
    OpSpec("log", "f", FLOAT, torch.log),
    OpSpec("log2", "f", FLOAT, torch.log2),
    OpSpec("log1p", "f", FLOAT, torch.log1p),
    OpSpec("sqrt", "f", FLOAT, torch.sqrt),
    OpSpec("rsqrt", "f", FLOAT, torch.rsqrt),
    OpSpec("sin", "f", FLOAT, torch.sin),
    OpSpec("cos", "f", FLOAT, torch.cos),
    OpSpec("tan", "f", FLOAT, torch.tan),
    OpSpec("atan", "f", FLOAT, torch.atan),
    OpSpec("tanh", "f", FLOAT, torch.tanh),
    OpSpec("sigmoid", "f", FLOAT, torch.sigmoid),
    OpSpec("erf", "f", FLOAT, torch.erf),
    OpSpec("floor", "f", FLOAT, torch.floor),
    OpSpec("ceil", "f", FLOAT, torch.ceil),
    OpSpec("round", "f", FLOAT, torch.round),
    OpSpec("trunc", "f", FLOAT, torch.trunc),
)

OPS: dict[str, OpSpec] = {row.name: row for row in _ROWS}
"""Every operator by name."""

_KIND = {"i": INT, "f": FLOAT, "b": BOOL}


def result_type(op: str, args: tuple[Type, ...]) -> Type:
    """Return the result type of ``op`` on arguments of exactly these types.

    Raises:
        KeyError: ``op`` is not in the table.
        TypeError: the number of arguments or their types do not fit the row; nothing is promoted here.
    """
    spec = OPS[op]
    if len(args) != len(spec.args):
        raise TypeError(f"{op} takes {len(spec.args)} argument(s), got {len(args)}")
    shared: dict[str, Type] = {}
    for kind, got in zip(spec.args, args, strict=True):
        if kind in _KIND:
            if got is not _KIND[kind]:
                raise TypeError(f"{op} needs {_KIND[kind]}, got {got}")
        elif kind == "n" and got is BOOL:
            raise TypeError(f"{op} needs a number, got bool")
        elif shared.setdefault(kind, got) is not got:
            raise TypeError(f"{op} needs arguments of one type, got {', '.join(map(str, args))}")
    return spec.result if isinstance(spec.result, Type) else shared[spec.result]


def promote_args(op: str, args: tuple[Type, ...]) -> tuple[Type, ...]:
    """Return the types ``args`` should be converted to before ``op`` is applied.

    bool promotes to int and int to float, as in Python; nothing is ever narrowed.

    Raises:
        TypeError: no promotion makes the arguments fit.
    """
    spec = OPS[op]
    if len(args) != len(spec.args):
        raise TypeError(f"{op} takes {len(spec.args)} argument(s), got {len(args)}")
    shared: dict[str, Type] = {}
    for kind, got in zip(spec.args, args, strict=True):
        if kind in "nx":
            floor = INT if kind == "n" else BOOL
            shared[kind] = join(shared.get(kind, floor), got)
    wanted = tuple(_KIND.get(kind) or shared[kind] for kind in spec.args)
    for want, got in zip(wanted, args, strict=True):
        if got.value > want.value:
            raise TypeError(f"{op} needs {want}, got {got}")
    return wanted
