"""Expressions that are linear in some inputs: which coefficient each has, and what is left."""

from __future__ import annotations

from collections.abc import Iterable

from attnlang.ir import Expr, Op, postorder
from attnlang.ir.build import op

from .factors import ONE, ZERO
from .simplify import simplify

__all__ = ["linear"]

Parts = dict[Expr | None, Expr]
"""Coefficients by input; None is what reads no input."""


def _add(a: Parts, b: Parts, sign: str = "add") -> Parts:
    out = dict(a)
    for key, value in b.items():
        if key in out:
            out[key] = op(sign, out[key], value)
        else:
            out[key] = value if sign == "add" else op("neg", value)
    return out


def _times(parts: Parts, factor: Expr) -> Parts:
    return {key: factor if value is ONE else op("mul", value, factor) for key, value in parts.items()}


def linear(expr: Expr, inputs: Iterable[Expr]) -> Parts | None:
    """Write ``expr`` as the sum of ``coefficient * input`` and a rest that reads no input; None where it is not one.

    The coefficients read no input either. Inputs that do not occur have no coefficient.
    """
    wanted = set(inputs)
    done: dict[Expr, Parts | None] = {}
    for node in postorder(expr):
        if node in wanted:
            done[node] = {node: ONE}
        elif not any(a in done and done[a] != {None: a} for a in node.args):
            done[node] = {None: node}
        else:
            done[node] = _combined(node, [done[a] for a in node.args])
    found = done[expr]
    return None if found is None else {key: simplify(value) for key, value in found.items()}


def _combined(node: Expr, args: list[Parts | None]) -> Parts | None:
    parts = [a for a in args if a is not None]
    if not isinstance(node, Op) or len(parts) != len(args):
        return None
    free = [set(a) <= {None} for a in parts]
    match node.op:
        case "add" | "sub":
            return _add(parts[0], parts[1], node.op)
        case "neg":
            return {key: op("neg", value) for key, value in parts[0].items()}
        case "mul" if free[1]:
            return _times(parts[0], parts[1][None])
        case "mul" if free[0]:
            return _times(parts[1], parts[0][None])
        case "div" if free[1]:
            return {key: op("div", value, parts[1][None]) for key, value in parts[0].items()}
        case "where" if free[0]:
            condition, keys = parts[0][None], dict.fromkeys((*parts[1], *parts[2]))
            return {key: op("where", condition, parts[1].get(key, ZERO), parts[2].get(key, ZERO)) for key in keys}
    return None
