"""Symbolic derivatives of a float expression, in reverse mode over the shared graph.

The derivative expressions reuse nodes of the expression itself (``tanh`` appears in its own derivative), so a kernel
that computes both computes shared parts once. Where a function has no derivative the convention is PyTorch's: ``abs``
and ``sign`` give 0 at 0, ties of ``min`` and ``max`` split evenly, rounding gives 0, integers and comparisons pass
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from attnlang.ir import FLOAT, Const, Expr, Op, postorder
from attnlang.ir.build import op

from .simplify import simplify

__all__ = ["DERIVATIVES", "derivatives"]

Rule = Callable[[Op, Expr], tuple[Expr | None, ...]]
"""Given a node and the derivative of the result with respect to it, the contribution to each argument."""

ZERO, ONE = Const(0.0, FLOAT), Const(1.0, FLOAT)


def _mul(a: Expr, b: Expr) -> Expr:
    if a is ONE:
        return b
    return a if b is ONE else op("mul", a, b)


def _one(factor: Callable[[Expr, Expr], Expr]) -> Rule:
    """Rule of a function of one argument from its derivative, given the node and its argument."""
    return lambda node, g: (_mul(g, factor(node, node.args[0])),)


def _none(node: Op, g: Expr) -> tuple[Expr | None, ...]:
    return tuple(None for _ in node.args)


def _extremum(strict: str) -> Rule:
    def rule(node: Op, g: Expr) -> tuple[Expr | None, ...]:
        a, b = node.args
        half = op("where", op("eq", a, b), op("mul", g, 0.5), ZERO)
        return (
            op("where", op(strict, a, b), g, half),
            op("where", op(strict, b, a), g, half),
        )

    return rule


def _where(node: Op, g: Expr) -> tuple[Expr | None, ...]:
    cond = node.args[0]
    return None, op("where", cond, g, ZERO), op("where", cond, ZERO, g)


def _pow(node: Op, g: Expr) -> tuple[Expr | None, ...]:
    a, b = node.args
    base = op("where", op("eq", b, 0.0), ZERO, op("mul", b, op("pow", a, op("sub", b, 1.0))))
    at_zero = op("where", op("ge", b, 0.0), op("eq", a, 0.0), op("lt", ONE, ZERO))
    exponent = op("where", at_zero, ZERO, op("mul", node, op("log", a)))
    return _mul(g, base), None if isinstance(b, Const) else _mul(g, exponent)


def _mod(node: Op, g: Expr) -> tuple[Expr | None, ...]:
    a, b = node.args
    return g, op("neg", _mul(g, op("floordiv", a, b)))


DERIVATIVES: dict[str, Rule] = {
    "add": lambda n, g: (g, g),
    "sub": lambda n, g: (g, op("neg", g)),
    "mul": lambda n, g: (_mul(g, n.args[1]), _mul(g, n.args[0])),
    "div": lambda n, g: (op("div", g, n.args[1]), op("neg", op("div", _mul(g, n), n.args[1]))),
    "neg": lambda n, g: (op("neg", g),),
    "abs": _one(lambda n, x: op("sign", x)),
    "min": _extremum("lt"),
    "max": _extremum("gt"),
    "mod": _mod,
    "pow": _pow,
    "where": _where,
    "exp": _one(lambda n, x: n),
    "exp2": _one(lambda n, x: op("mul", n, math.log(2.0))),
    "expm1": _one(lambda n, x: op("add", n, 1.0)),
    "log": lambda n, g: (op("div", g, n.args[0]),),
    "log2": lambda n, g: (op("div", g, op("mul", n.args[0], math.log(2.0))),),
    "log1p": lambda n, g: (op("div", g, op("add", n.args[0], 1.0)),),
    "sqrt": lambda n, g: (op("div", op("mul", g, 0.5), n),),
    "rsqrt": _one(lambda n, x: op("mul", op("mul", op("mul", n, n), n), -0.5)),
    "sin": _one(lambda n, x: op("cos", x)),
    "cos": _one(lambda n, x: op("neg", op("sin", x))),
    "tan": _one(lambda n, x: op("add", op("mul", n, n), 1.0)),
    "atan": lambda n, g: (op("div", g, op("add", op("mul", n.args[0], n.args[0]), 1.0)),),
    "tanh": _one(lambda n, x: op("sub", 1.0, op("mul", n, n))),
    "sigmoid": _one(lambda n, x: op("mul", n, op("sub", 1.0, n))),
    "erf": _one(lambda n, x: op("mul", op("exp", op("neg", op("mul", x, x))), 2.0 / math.sqrt(math.pi))),
    **dict.fromkeys(("floordiv", "sign", "floor", "ceil", "round", "trunc"), _none),
}
"""Rules of the float operators; an operator without a row passes no derivative (comparisons, casts, integers)."""


def derivatives(expr: Expr, wrt: Iterable[Expr]) -> dict[Expr, Expr]:
    """Return ``d expr / d node`` for every node of ``wrt`` (float leaves: Input, Load, Param), simplified.

    Nodes that do not reach ``expr`` get the constant 0.
    """
    wrt = tuple(wrt)
    wanted = set(wrt)
    order = list(postorder(expr))
    reaches: dict[Expr, bool] = {}
    for node in order:
        through = isinstance(node, Op) and node.type is FLOAT and any(reaches[a] for a in node.args)
        reaches[node] = node in wanted or through
    adjoint: dict[Expr, Expr] = {expr: ONE}
    for node in reversed(order):
        if node not in adjoint or not isinstance(node, Op) or node.op not in DERIVATIVES or not reaches[node]:
            continue
        for arg, part in zip(node.args, DERIVATIVES[node.op](node, adjoint[node]), strict=True):
            if part is not None and arg.type is FLOAT and reaches[arg]:
                adjoint[arg] = op("add", adjoint[arg], part) if arg in adjoint else part
    return {node: simplify(adjoint[node]) if reaches.get(node) and node in adjoint else ZERO for node in wrt}
