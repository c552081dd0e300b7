"""Score terms whose body is a product of what the query knows and what the key knows, as dot products of other rows.

The rows are made by PyTorch, point by point and linear in the lengths, so gradients flow through them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from attnlang.ir import (
    FLOAT,
    KEY_ADDRESS,
    QUERY_ADDRESS,
    Attend,
    Const,
    Dot,
    Environment,
    Expr,
    Input,
    Op,
    Operand,
    Region,
    evaluate,
    index_grid,
    operand_rows,
)
from attnlang.ir.build import op
from attnlang.passes.bodies import LEFT, RIGHT, body_of
from attnlang.passes.levels import axes_of
from attnlang.passes.simplify import simplify

from .gathers import LARGEST

__all__ = ["separated"]

Tensor = torch.Tensor

ONE, MINUS = Const(1.0, FLOAT), Const(-1.0, FLOAT)


def _factors(expr: Expr) -> Iterator[Expr]:
    match expr:
        case Op(op="mul", operands=(a, b)):
            yield from _factors(a)
            yield from _factors(b)
        case Op(op="neg", operands=(a,)):
            yield MINUS
            yield from _factors(a)
        case _:
            yield expr


@functools.lru_cache(maxsize=256)
def _sides(term: Dot) -> tuple[Expr, Expr] | None:
    """The products of what the query and of what the key knows, None where a factor of the body needs both."""
    body = body_of(term)
    if body is None:
        return None
    left: Expr = ONE
    right: Expr = ONE
    for factor in _factors(body.value):
        axes = axes_of(factor)[factor]
        if {"q", "k"} <= axes:
            return None
        if "k" in axes:
            right = op("mul", right, factor)
        else:
            left = op("mul", left, factor)
    return simplify(left), simplify(right)


def _rows(value: Expr, given: Input, rows: Tensor, axis: str, env: Environment) -> Tensor:
    """``value`` of every feature of ``rows`` [B, heads, length, features], which it reads as ``given``."""
    grid = index_grid(tuple(rows.shape), f"bh{axis}d", env)
    made = evaluate(value, replace(grid, inputs={given.name: rows}))
    return made.expand(rows.shape)


def separated(stage: Attend, env: Environment) -> tuple[Attend, dict[str, Tensor]]:
    """``stage`` with dot products in the place of bodies that are products of a query's and a key's factors.

    The rows of those are tensors [B, H, length, features]; a body of another kind stays, as do all where kernels would
    read the rows in float16, whose range they may leave.
    """
    if env.operands["q"].dtype is torch.float16:
        return stage, {}
    made: dict[str, Tensor] = {}
    terms = []
    lq, lk = (int(evaluate(e, env)) for e in stage.lengths)
    region = Region.whole(env.sizes["B"], env.sizes["H"], lq, lk, env.device)
    here = replace(env, indices=region.axes())
    for term in stage.terms:
        sides = _sides(term)
        width = env.rows(term.left.source).shape[-1]
        if sides is None or max(lq, lk) * region.shape[0] * region.shape[1] * width > LARGEST:
            terms.append(term)
            continue
        operands = []
        for value, given, old, axis in zip(sides, (LEFT, RIGHT), (term.left, term.right), "qk", strict=True):
            if value is given:
                operands.append(old)
                continue
            plain = old.index == KEY_ADDRESS and not {"b", "h"} & axes_of(value)[value]  # heads of keys stay as few
            rows = env.rows(old.source).to(env.float_dtype) if plain else operand_rows(old, here, region, axis)
            name = f"{term.name}_{axis}_features"
            made[name] = _rows(value, given, rows, axis, env)
            operands.append(Operand(name, QUERY_ADDRESS if axis == "q" else KEY_ADDRESS))
        terms.append(replace(term, left=operands[0], right=operands[1], body=None))
    if set(made) & {*env.tensors, *env.operands}:
        return stage, {}
    return replace(stage, terms=tuple(terms)), made
