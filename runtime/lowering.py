"""Stages rewritten into ones that kernels run: branches and sums of rows apart, score terms as tensors of products,
operands where kernels read them.

What a rewrite computes is what the stage means; the rewritten parts are differentiable, so gradients flow through them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from attnlang.ir import (
    FLOAT,
    INT,
    QUERY_ADDRESS,
    Attend,
    Dot,
    Environment,
    Expr,
    Input,
    Load,
    Output,
    Region,
    evaluate,
    index_axes,
    substitute,
    term_values,
)
from attnlang.ir.build import b, h, k, q
from attnlang.passes.simplify import map_record

from .addresses import in_place
from .gathers import at_default_addresses, joined, joins, one_hot
from .separate import separated
from .transforms import without_kernels

__all__ = ["Lowered", "apart", "lowered", "recorded", "with_products", "with_shared_rows"]

Tensor = torch.Tensor

LARGEST = 1 << 26
"""Floats of a tensor of products; larger ones would cost more memory than the blockwise executor needs time."""


@functools.lru_cache(maxsize=256)
def apart(stage: Attend) -> tuple[Attend, ...]:
    """``stage`` as stages of one branch and at most one sum of rows each; together they make the same outputs."""
    parts: list[Attend] = []
    for number, branch in enumerate(stage.branches):
        mine = [replace(out, branch=0) for out in stage.outputs if out.branch == number]
        sums = [out for out in mine if out.rows is not None]
        others = [out for out in mine if out.rows is None]
        groups: list[list[Output]] = [[out] for out in sums] or [[]]
        groups[0] += others
        for found in groups:
            if found:
                name = f"{stage.name}_{len(parts)}"
                parts.append(replace(stage, name=name, branches=(branch,), outputs=tuple(found)))
    return tuple(parts) if len(parts) > 1 else (stage,)


def _by_pair(term: Dot) -> bool:
    """Whether rows of q meet rows of a table that the pair chooses."""
    return (
        term.body is None
        and term.left.index == QUERY_ADDRESS
        and {"q", "k"} <= index_axes(*term.right.index)
        and not index_axes(*term.right.index[:-1]) & {"q", "k"}
    )


def _loads(stage: Attend, names: tuple[str, ...]) -> Attend:
    found: list[tuple[Expr, Expr]] = []
    for term, name in zip(stage.terms[1:], names, strict=True):
        found.append((Input(term.name, FLOAT), Load(name, (b, h, q, term.right.index[-1]), FLOAT)))
    return _reading(stage, tuple(found))


@functools.lru_cache(maxsize=256)
def _reading(stage: Attend, loads: tuple[tuple[Expr, Expr], ...]) -> Attend:
    """``stage`` of its first term, with the others replaced by loads."""
    found = dict(loads)
    change: Callable[[Expr], Expr] = lambda e: substitute(e, found)  # noqa: E731
    branches = tuple(map_record(branch, change) for branch in stage.branches)
    outputs = tuple(map_record(out, change) for out in stage.outputs)
    return replace(stage, terms=stage.terms[:1], branches=branches, outputs=outputs)


def with_products(stage: Attend, env: Environment) -> tuple[Attend, dict[str, Tensor]]:
    """``stage`` with further score terms q x table read from tensors [B, H, Lq, rows of the table], and these tensors.

    A stage with terms of another kind is returned as it is.
    """
    more = stage.terms[1:]
    if not more or stage.position or not all(map(_by_pair, more)):
        return stage, {}
    made: dict[str, Tensor] = {}
    lq = int(evaluate(stage.lengths[0], env))
    for term in more:
        rows = env.rows(term.left.source)
        table = env.rows(term.right.source)
        if rows.shape[2] != lq or rows.shape[0] * rows.shape[1] * lq * table.shape[-2] > LARGEST:
            return stage, {}
        made[f"{term.name}_products"] = _products(rows.to(env.float_dtype), table.to(env.float_dtype), term, env)
    if set(made) & {*env.tensors, *env.operands}:
        return stage, {}
    return _loads(stage, tuple(made)), made


def _products(rows: Tensor, table: Tensor, term: Dot, env: Environment) -> Tensor:
    batch, heads = rows.shape[:2]
    device = rows.device
    grid = {"b": torch.arange(batch, device=device)[:, None], "h": torch.arange(heads, device=device)[None]}
    where = replace(env, indices=grid)
    lead = [evaluate(e, where).expand(batch, heads) for e in term.right.index[:-1]]
    lead = [w.clamp(0, max(n - 1, 0)) for w, n in zip(lead, table.shape, strict=False)]
    return rows @ (table[tuple(lead)] if lead else table).mT


def _by_key(term: Dot) -> bool:
    """Whether rows of q meet rows that the key chooses, the same for all batch elements and heads."""
    return (
        term.body is None
        and term.left.index == QUERY_ADDRESS
        and index_axes(term.right.index[-1]) == {"k"}
        and not index_axes(*term.right.index[:-1]) & {"q", "k"}
    )


def with_shared_rows(stage: Attend, env: Environment) -> tuple[Attend, dict[str, Tensor]]:
    """``stage`` with further score terms whose keys share few rows read from tensors [B, H, Lq, rows], and these.

    A stage that :func:`.gathers.joined` can make one product of is returned as it is, and so is one with other terms.
    """
    more = stage.terms[1:]
    if not more or stage.position or not all(map(_by_key, more)) or joins(stage):
        return stage, {}
    made: dict[str, Tensor] = {}
    found: dict[Expr, Expr] = {}
    lq, lk = (int(evaluate(e, env)) for e in stage.lengths)
    keys = replace(env, indices={"k": torch.arange(lk, device=env.device)})
    for term in more:
        rows, table = env.rows(term.left.source), env.rows(term.right.source)
        at = evaluate(term.right.index[-1], keys).expand(lk).clamp(0, max(table.shape[-2] - 1, 0))
        chosen, which = at.unique(return_inverse=True)
        if rows.shape[2] != lq or 2 * len(chosen) > lk or rows.shape[:3].numel() * len(chosen) > LARGEST:
            return stage, {}
        few = table.to(env.float_dtype).index_select(-2, chosen)
        name = f"{term.name}_products"
        made |= {name: _products(rows.to(env.float_dtype), few, term, env), f"{name}_row": which}
        found[Input(term.name, FLOAT)] = Load(name, (b, h, q, Load(f"{name}_row", (k,), INT)), FLOAT)
    if set(made) & {*env.tensors, *env.operands}:
        return stage, {}
    return _reading(stage, tuple(found.items())), made


def _of_one_term(stage: Attend, env: Environment) -> tuple[Attend, dict[str, Dot]]:
    """``stage`` of its first term, with further dot products read from tensors [B, H, Lq, Lk], and what these are.

    A stage with bodies among them, or whose tensors would be too large, is returned as it is.
    """
    more = {f"{term.name}_pairs": term for term in stage.terms[1:] if term.body is None}
    lq, lk = (int(evaluate(e, env)) for e in stage.lengths)
    pairs = env.sizes["B"] * env.sizes["H"] * lq * lk
    if not more or len(more) < len(stage.terms) - 1 or stage.position or len(more) * pairs > LARGEST:
        return stage, {}
    if set(more) & {*env.tensors, *env.operands}:
        return stage, {}
    loads = ((Input(term.name, FLOAT), Load(name, (b, h, q, k), FLOAT)) for name, term in more.items())
    return _reading(stage, tuple(loads)), more


def _of_all_pairs(terms: Mapping[str, Dot], stage: Attend, env: Environment) -> dict[str, Tensor]:
    lq, lk = (int(evaluate(e, env)) for e in stage.lengths)
    region = Region.whole(env.sizes["B"], env.sizes["H"], lq, lk, env.device)
    slots = replace(env, indices=region.axes())
    return {name: term_values(term, slots, region) for name, term in terms.items()}


@dataclass(frozen=True)
class Lowered:
    """A stage as ``parts`` that together make its outputs, reading also ``tensors``; ``after`` turns what the parts
    make for some of the outputs into these."""

    parts: tuple[Attend, ...]
    tensors: Mapping[str, Tensor]
    after: Mapping[str, Callable[[Tensor], Tensor]]


def recorded(env: Environment) -> bool:
    """Whether gradients may be asked for, whose kernels read rows at the usual addresses only."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*env.operands.values(), *env.tensors.values()))


def _in_place(stage: Attend, env: Environment) -> bool:
    if without_kernels((*env.operands.values(), *env.tensors.values())):
        return False
    lq, lk = (int(evaluate(e, env)) for e in stage.lengths)
    return in_place(stage, env, {**env.sizes, "Lq": lq, "Lk": lk})


def lowered(stage: Attend, env: Environment, scale: float, pays: Callable[[Attend], bool] = lambda _: False) -> Lowered:
    """Rewrite ``stage`` as far as that brings it closer to kernels; ``scale`` multiplies its first score term.

    ``pays`` says of a stage of one term whether it is worth that PyTorch makes the other terms of all pairs.
    """
    made: dict[str, Tensor] = {}

    def here() -> Environment:
        return replace(env, tensors={**env.tensors, **made})

    stage, more = with_products(stage, env)
    made |= more
    stage, more = with_shared_rows(stage, here())
    made |= more
    if any(term.body is not None for term in stage.terms):
        stage, more = separated(stage, here())
        made |= more
    if recorded(env) or not _in_place(stage, here()):
        stage, more = at_default_addresses(stage, here())
        made |= more
    stage, more = joined(stage, here(), scale)
    made |= more
    keys = here().rows(stage.terms[0].right.source)
    stage, more, after = one_hot(stage, here(), keys.shape[1] if keys.dim() == 4 else env.sizes["H"])
    made |= more
    alone, terms = _of_one_term(stage, here())
    if terms and pays(alone):
        made |= _of_all_pairs(terms, stage, here())
        stage = alone
    return Lowered(apart(stage), made, after)
