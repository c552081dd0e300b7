"""Score terms whose body is made of products of what the query knows and what the key knows, as dot products of other
rows.

A body is one such product, or a sum of them that is linear in the two features: the sums of its parts are then as good
as if features had been rounded, which those of ``x x - 2 x y + y y`` are not. The rows are made by PyTorch, point by
point and linear in the lengths, so gradients flow through them.
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
from attnlang.passes.linear import linear
from attnlang.passes.simplify import simplify

from .gathers import LARGEST, joins

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


def _sides(value: Expr) -> tuple[Expr, Expr] | None:
    """The products of what the query and of what the key knows, None where a factor needs both."""
    left: Expr = ONE
    right: Expr = ONE
    for factor in _factors(value):
        axes = axes_of(factor)[factor]
        if {"q", "k"} <= axes:
            return None
        if "k" in axes:
            right = op("mul", right, factor)
        else:
            left = op("mul", left, factor)
    return simplify(left), simplify(right)


@functools.lru_cache(maxsize=256)
def _products(term: Dot) -> tuple[tuple[Expr, Expr], ...]:
    """Pairs of sides whose products add up to the body of ``term``; none where there are no such."""
    body = body_of(term)
    if body is None:
        return ()
    whole = _sides(body.value)
    if whole is not None:
        return (whole,)
    parts = linear(body.value, (LEFT, RIGHT)) or {}
    found = [_sides(value if x is None else op("mul", x, value)) for x, value in parts.items()]
    return tuple(sides for sides in found if sides is not None) if None not in found else ()


def _rows(value: Expr, given: Input, rows: Tensor, axis: str, env: Environment) -> Tensor:
    """``value`` of every feature of ``rows`` [B, heads, length, features], which it reads as ``given``."""
    grid = index_grid(tuple(rows.shape), f"bh{axis}d", env)
    made = evaluate(value, replace(grid, inputs={given.name: rows}))
    return made.expand(rows.shape)


def _beside(products: tuple[tuple[Expr, Expr], ...], queries: Tensor, keys: Tensor, env: Environment) -> list[Tensor]:
    """Rows of both sides whose dot product is the sum of ``products``; what one side alone knows is one feature."""
    lefts, rights = [], []
    for left, right in products:
        if right is ONE:
            lefts.append(_rows(left, LEFT, queries, "q", env).sum(-1, keepdim=True))
            rights.append(torch.ones_like(keys[..., :1]))
        elif "q" not in axes_of(left)[left]:
            lefts.append(torch.ones_like(queries[..., :1]))
            rights.append(_rows(op("mul", left, right), RIGHT, keys, "k", env).sum(-1, keepdim=True))
        else:
            lefts.append(_rows(left, LEFT, queries, "q", env))
            rights.append(_rows(right, RIGHT, keys, "k", env))
    return [torch.cat(lefts, -1), torch.cat(rights, -1)]


def separated(stage: Attend, env: Environment) -> tuple[Attend, dict[str, Tensor]]:
    """``stage`` with dot products in the place of bodies that are made of products of a query's and a key's factors.

    The rows of those are tensors [B, H, length, features]; a body of another kind stays, as do all where kernels would
    read the rows in float16, whose range they may leave.
    """
    if env.operands["q"].dtype is torch.float16:
        return stage, {}
    made: dict[str, Tensor] = {}
    terms = []
    added: list[int] = []
    lq, lk = (int(evaluate(e, env)) for e in stage.lengths)
    region = Region.whole(env.sizes["B"], env.sizes["H"], lq, lk, env.device)
    here = replace(env, indices=region.axes())
    for number, term in enumerate(stage.terms):
        products = _products(term)
        width = env.rows(term.left.source).shape[-1] * len(products)
        if not products or max(lq, lk) * region.shape[0] * region.shape[1] * width > LARGEST:
            terms.append(term)
            continue
        places = ((term.left, LEFT, "q", QUERY_ADDRESS), (term.right, RIGHT, "k", KEY_ADDRESS))
        names = [f"{term.name}_{axis}_features" for _, _, axis, _ in places]
        if len(products) > 1:
            added.append(number)
            sides = [operand_rows(old, here, region, axis) for old, _, axis, _ in places]
            made |= zip(names, _beside(products, sides[0], sides[1], env), strict=True)
            operands = [Operand(name, address) for name, (*_, address) in zip(names, places, strict=True)]
        else:
            operands = []
            for value, name, (old, given, axis, address) in zip(products[0], names, places, strict=True):
                if value is given:
                    operands.append(old)
                    continue
                few = old.index == KEY_ADDRESS and not {"b", "h"} & axes_of(value)[value]  # heads of keys stay as few
                rows = env.rows(old.source).to(env.float_dtype) if few else operand_rows(old, here, region, axis)
                made[name] = _rows(value, given, rows, axis, env)
                operands.append(Operand(name, address))
        terms.append(replace(term, left=operands[0], right=operands[1], body=None))
    if set(made) & {*env.tensors, *env.operands}:
        return stage, {}
    found = replace(stage, terms=tuple(terms))
    if env.operands["q"].dtype is torch.bfloat16 and added and (0 in added or joins(found)):
        return stage, {}  # kernels would round the sums that are features
    return found, made
