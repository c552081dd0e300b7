"""Operands brought to where kernels read them: rows gathered from their addresses, several dot products made one, and
sums by key group made sums of one-hot rows.

Each step returns a stage that means the same and the tensors it reads, made by PyTorch, so gradients flow through them.
Memory is linear in the lengths. A step that does not apply gives the stage back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch

from attnlang.ir import (
    FLOAT,
    KEY_ADDRESS,
    QUERY_ADDRESS,
    Attend,
    Branch,
    Const,
    Dot,
    Environment,
    Expr,
    Input,
    Operand,
    Output,
    Region,
    evaluate,
    index_axes,
    numbers_of,
    operand_rows,
    postorder,
)
from attnlang.ir.build import op
from attnlang.ir.build import s as SCORE
from attnlang.passes.linear import linear

from .addresses import fits, queries_fit

__all__ = ["at_default_addresses", "joined", "joins", "one_hot"]

Tensor = torch.Tensor

LARGEST = 1 << 27
"""Floats of a tensor of gathered rows."""
MOST_GROUPS = 256
"""Key groups of a sum by group, since one row of a kernel holds them all."""


def _names(env: Environment) -> set[str]:
    return {*env.tensors, *env.operands}


def _whole(stage: Attend, env: Environment) -> tuple[Environment, Region]:
    """All pairs of a stage, with the indices to evaluate expressions at."""
    lq, lk = (int(evaluate(e, env)) for e in stage.lengths)
    region = Region.whole(env.sizes["B"], env.sizes["H"], lq, lk, env.device)
    return replace(env, indices=region.axes()), region


def _fits(operand: Operand, env: Environment, region: Region, axis: str) -> bool:
    """Whether a kernel can read the operand as it is."""
    sizes = dict(zip(("B", "H", "Lq", "Lk"), region.shape, strict=True))
    if axis == "q":
        return queries_fit(operand, env.rows(operand.source), sizes)
    return operand.index == KEY_ADDRESS and fits(operand, env.rows(operand.source), sizes)


def at_default_addresses(stage: Attend, env: Environment) -> tuple[Attend, dict[str, Tensor]]:
    """``stage`` with all rows of its score terms and sums at the default addresses, k and v with as many heads."""
    sides = [(t.left, "q") for t in stage.terms] + [(t.right, "k") for t in stage.terms]
    sides += [(o.rows, "k") for o in stage.outputs if o.rows is not None]
    if any(o.rows is not None and o.over != "k" for o in stage.outputs):
        return stage, {}
    if any(not index_axes(*x.index) & {"q", "k"} <= {axis} for x, axis in sides):
        return stage, {}
    here, region = _whole(stage, env)
    b, h, lq, lk = region.shape
    keys = [x for x, axis in sides if axis == "k"]
    heads = {env.rows(x.source).shape[1] if _fits(x, env, region, "k") else h for x in keys}
    made: dict[str, Tensor] = {}
    moved: dict[tuple[Operand, str], Operand] = {}
    for x, axis in dict.fromkeys(sides):
        if _fits(x, env, region, axis) and (axis == "q" or len(heads) == 1):
            continue
        if b * h * (lq if axis == "q" else lk) * env.rows(x.source).shape[-1] > LARGEST:
            return stage, {}
        name = f"{x.source}_at_{axis}{len(made)}"
        made[name] = operand_rows(x, here, region, axis)
        moved[x, axis] = Operand(name, QUERY_ADDRESS if axis == "q" else KEY_ADDRESS)
    if not made or set(made) & _names(env):
        return stage, {}
    terms = tuple(
        replace(t, left=moved.get((t.left, "q"), t.left), right=moved.get((t.right, "k"), t.right)) for t in stage.terms
    )
    outputs = tuple(o if o.rows is None else replace(o, rows=moved.get((o.rows, "k"), o.rows)) for o in stage.outputs)
    return replace(stage, terms=terms, outputs=outputs), made


@functools.lru_cache(maxsize=256)
def _coefficients(stage: Attend) -> tuple[Attend, tuple[Expr, ...]] | None:
    """The stage as one of a single dot product, and what every term is multiplied by; None where it is not.

    All branches must weigh the terms alike, and nothing else may read them.
    """
    inputs = [Input(t.name, FLOAT) for t in stage.terms]
    if len(inputs) < 2 or stage.position or any(t.body is not None for t in stage.terms):
        return None
    branches, found = [], []
    for branch in stage.branches:
        parts = linear(branch.score, inputs)
        if parts is None or set(parts) <= {None}:
            return None
        coefficients = tuple(parts.get(x, Const(0.0, FLOAT)) for x in inputs)
        if any("k" in index_axes(c) for c in coefficients):
            return None
        rest = parts.get(None)
        branches.append(replace(branch, score=SCORE if rest is None else op("add", SCORE, rest)))
        found.append(coefficients)
    if len(set(found)) != 1:
        return None
    alone = replace(stage, branches=tuple(branches), terms=stage.terms[:1])
    others = [b for branch in stage.branches for b in _hooks_beside_score(branch)]
    others += [e for o in stage.outputs for e in (o.value, *o.key)]
    names = {t.name for t in stage.terms[1:]} | {"raw"}
    if any(isinstance(n, Input) and n.name in names for n in postorder(*others)):
        return None
    return alone, found[0]


def _hooks_beside_score(branch: Branch) -> list[Expr]:
    norm = branch.normalizer
    hooks = [branch.mask, branch.weight, branch.group, norm.weight]
    hooks += [e for st in norm.stats for e in (st.lift, st.seed)]
    return [e for e in hooks if e is not None]


def joins(stage: Attend) -> bool:
    """Whether the dot products of a stage can be one."""
    return _coefficients(stage) is not None


def joined(stage: Attend, env: Environment, scale: float) -> tuple[Attend, dict[str, Tensor]]:
    """``stage`` with its dot products as one, of rows side by side; ``scale`` multiplies the first product."""
    found = _coefficients(stage)
    if found is None or not scale:
        return stage, {}
    here, region = _whole(stage, env)
    if not all(_fits(t.left, env, region, "q") and _fits(t.right, env, region, "k") for t in stage.terms):
        return stage, {}
    alone, coefficients = found
    lefts, rights = [], []
    for number, (term, factor) in enumerate(zip(stage.terms, coefficients, strict=True)):
        rows = env.rows(term.left.source).to(env.float_dtype)
        by = evaluate(factor, here)
        by = by[..., 0][..., None] if by.dim() == 4 else by
        lefts.append(rows * (by if number == 0 else by / scale))
        rights.append(env.rows(term.right.source).to(env.float_dtype))
    names = ("joined_queries", "joined_keys")
    if set(names) & _names(env):
        return stage, {}
    term = Dot(SCORE.name, Operand(names[0], QUERY_ADDRESS), Operand(names[1], KEY_ADDRESS))
    return replace(alone, terms=(term,)), {names[0]: torch.cat(lefts, -1), names[1]: torch.cat(rights, -1)}


def _by_key(out: Output) -> bool:
    """Whether an output is a sum by group in which the key alone decides the group."""
    return (
        bool(out.key)
        and out.rows is None
        and out.over == "k"
        and out.monoid == "sum"
        and not index_axes(*out.key) & {"q", "h"}
        and not any(isinstance(n, Input) for n in postorder(*out.key))
    )


def one_hot(
    stage: Attend, env: Environment, heads: int
) -> tuple[Attend, dict[str, Tensor], dict[str, Callable[[Tensor], Tensor]]]:
    """``stage`` with sums by key group as sums of one-hot rows of ``heads`` heads, and what turns these into the
    outputs that were asked for."""
    made: dict[str, Tensor] = {}
    after: dict[str, Callable[[Tensor], Tensor]] = {}
    if not any(map(_by_key, stage.outputs)) or stage.position:
        return stage, {}, {}
    here, region = _whole(stage, env)
    outputs = []
    for out in stage.outputs:
        extents = numbers_of(out.extents, env)
        groups = math.prod(extents)
        name = f"{out.name}_groups"
        if not _by_key(out) or not 0 < groups <= MOST_GROUPS or name in _names(env):
            outputs.append(out)
            continue
        flat, inside = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool)
        for key, extent in zip(out.key, extents, strict=True):
            at = evaluate(key, here)
            inside = inside & (at >= 0) & (at < extent)
            flat = flat * extent + at
        group = torch.where(inside, flat, -1).expand(region.shape[0], 1, 1, region.shape[3])[:, :, 0]
        rows = (group[..., None] == torch.arange(groups, device=group.device)).to(env.float_dtype)
        made[name] = rows.expand(-1, heads, -1, -1)
        after[out.name] = functools.partial(_unflatten, extents=extents)
        outputs.append(replace(out, rows=Operand(name, KEY_ADDRESS), key=(), extents=()))
    return replace(stage, outputs=tuple(outputs)), made, after


def _unflatten(rows: Tensor, extents: tuple[int, ...]) -> Tensor:
    return rows.unflatten(-1, extents)
