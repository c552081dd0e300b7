"""Algebraic simplification: constants are folded and identities of the total operators applied, bottom up.

Every rule keeps the value for all arguments, including the totalised ones (``x // 0 == 0``), so there is no rule that
needs a proof. Float rules are limited to those exact in IEEE arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from attnlang.ir import BOOL, FLOAT, INT, OPS, Const, Expr, Op, Program, map_record, rewrite
from attnlang.ir.build import FALSE, TRUE

__all__ = ["map_program", "map_record", "simplify"]

_TORCH = {BOOL: torch.bool, INT: torch.int64, FLOAT: torch.float64}
_INT64 = 2**63


def _fold(node: Op) -> Expr:
    tensors = []
    for arg in node.args:
        assert isinstance(arg, Const)
        if arg.type is INT and not -_INT64 <= int(arg.value) < _INT64:
            return node
        tensors.append(torch.tensor(arg.value, dtype=_TORCH[arg.type]))
    return Const(OPS[node.op].evaluate(*tensors).item(), node.type)


def _is(node: Expr, value: float) -> bool:
    return isinstance(node, Const) and node.type is not BOOL and node.value == value


def _additive(op: str, a: Expr, b: Expr) -> Expr | None:
    exact = a.type is INT  # x + 0.0 turns -0.0 into 0.0
    if exact and _is(b, 0):
        return a
    if exact and op == "add" and _is(a, 0):
        return b
    if exact and op == "sub" and a is b:
        return Const(0, INT)
    return None


def _multiplicative(op: str, a: Expr, b: Expr) -> Expr | None:
    if _is(b, 1) and op != "mod":
        return a if op != "floordiv" or a.type is INT else None
    if op == "mul" and _is(a, 1):
        return b
    if a.type is not INT:
        return None
    if (op == "mod" and _is(b, 1)) or _is(b, 0) or (_is(a, 0)):
        return Const(0, INT)
    return None


def _logical(op: str, a: Expr, b: Expr) -> Expr | None:
    absorb, neutral = (FALSE, TRUE) if op == "and" else (TRUE, FALSE)
    if absorb in (a, b):
        return absorb
    if a is neutral or a is b:
        return b
    return a if b is neutral else None


def _compare(op: str, a: Expr, b: Expr) -> Expr | None:
    if a is b and a.type is INT:
        return TRUE if op in ("le", "ge", "eq") else FALSE
    return None


def _min_max(op: str, a: Expr, b: Expr) -> Expr | None:
    return a if a is b else None


_BINARY: dict[str, Callable[[str, Expr, Expr], Expr | None]] = {
    "add": _additive,
    "sub": _additive,
    "mul": _multiplicative,
    "floordiv": _multiplicative,
    "mod": _multiplicative,
    "and": _logical,
    "or": _logical,
    "min": _min_max,
    "max": _min_max,
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), _compare),
}


def _rule(node: Expr) -> Expr:
    if not isinstance(node, Op):
        return node
    if all(isinstance(a, Const) for a in node.args):
        return _fold(node)
    if node.op in _BINARY:
        return _BINARY[node.op](node.op, *node.args) or node
    if node.op == "not":
        inner = node.args[0]
        return inner.args[0] if isinstance(inner, Op) and inner.op == "not" else node
    if node.op == "where":
        cond, yes, no = node.args
        if isinstance(cond, Const):
            return yes if cond.value else no
        if yes is no:
            return yes
    return node


def simplify(expr: Expr) -> Expr:
    """Return an expression with the same value everywhere and no more nodes than ``expr``."""
    return rewrite((expr,), _rule)[0]


def map_program(program: Program, change: Callable[[Expr], Expr]) -> Program:
    """Apply ``change`` to every expression of every stage."""
    return replace(program, stages=tuple(map_record(stage, change) for stage in program.stages))
