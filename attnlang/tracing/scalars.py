"""Small helpers on scalar expressions: folding of constant indices, sign, wrap of negative indices."""

from __future__ import annotations

from attnlang.ir import BOOL, FLOAT, INT, Const, Expr, Index, Op, Size, Type
from attnlang.ir.build import Like, cast, const, op

__all__ = ["floordiv", "int_add", "int_mul", "is_nonnegative", "mod", "to", "wrap_index"]

ZERO, ONE = Const(0, INT), Const(1, INT)


def to(value: Like, type_: Type) -> Expr:
    """Convert to ``type_``; also folds constants that truncate to an int."""
    node = const(value)
    if isinstance(node, Const) and type_ is INT and node.type is FLOAT and abs(node.value) < 2**31:
        return Const(int(node.value), INT)
    return cast(node, type_)


def int_add(a: Expr, b: Expr) -> Expr:
    if isinstance(a, Const) and isinstance(b, Const):
        return Const(a.value + b.value, INT)
    return b if a is ZERO else a if b is ZERO else op("add", a, b)


def int_mul(a: Expr, b: Expr) -> Expr:
    if isinstance(a, Const) and isinstance(b, Const):
        return Const(a.value * b.value, INT)
    if a is ZERO or b is ZERO:
        return ZERO
    return b if a is ONE else a if b is ONE else op("mul", a, b)


def floordiv(a: Expr, b: Expr) -> Expr:
    if isinstance(a, Const) and isinstance(b, Const) and b.value:
        return Const(a.value // b.value, INT)
    return a if b is ONE else op("floordiv", a, b)


def mod(a: Expr, b: Expr) -> Expr:
    if isinstance(a, Const) and isinstance(b, Const) and b.value:
        return Const(a.value % b.value, INT)
    return ZERO if b is ONE else op("mod", a, b)


_ALL = frozenset({"add", "mul", "min", "floordiv", "bitand", "bitor", "bitxor", "shl", "shr"})
_ANY = frozenset({"max"})


def is_nonnegative(expr: Expr) -> bool:
    """Return True only if ``expr`` cannot be negative; False means unknown. Conservative and iterative."""
    from attnlang.ir import postorder

    known: dict[Expr, bool] = {}
    for node in postorder(expr):
        known[node] = _nonnegative(node, known)
    return known[expr]


def _nonnegative(node: Expr, known: dict[Expr, bool]) -> bool:
    match node:
        case Index() | Size():
            return True
        case Const(value=value):
            return value >= 0
        case Op(op="abs"):
            return True
        case Op(op="mod", operands=(_, divisor)):
            return known[divisor]  # the sign of floor modulo is the divisor's
        case Op(op="where", operands=(_, a, b)):
            return known[a] and known[b]
        case Op(op="to_int" | "to_float", operands=(a,)):
            return a.type is BOOL or known[a]
        case Op(op="mul", operands=(a, b)) if a is b:
            return True
        case Op(op="bitand", operands=(a, b)):
            return known[a] or known[b]
        case Op(op=name, operands=args) if name in _ALL:
            return all(known[a] for a in args)
        case Op(op=name, operands=args) if name in _ANY:
            return any(known[a] for a in args)
    return node.type is BOOL


def wrap_index(index: Expr, size: Expr) -> Expr:
    """Return ``index`` with negative values counted from the end, as PyTorch does."""
    index = to(index, INT)
    if is_nonnegative(index):
        return index
    wrapped = op("add", index, size)
    return wrapped if isinstance(index, Const) else op("where", op("lt", index, 0), wrapped, index)
