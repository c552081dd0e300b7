"""Stages with groups and keys run as stages without: what :mod:`attnlang.passes.buckets` makes of a stage, in order.

Operands of a stage in buckets are views of those of the call with the buckets as batch, stride 0; gradients flow
through these views. Numbers of rows are [buckets, B * H, Lq] there and become [B, H, Lq, buckets] without a copy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import torch

from attnlang.ir import (
    COMBINE,
    INT,
    Attend,
    Branch,
    Environment,
    Expr,
    Load,
    Output,
    Program,
    ScalarParam,
    Size,
    Stat,
    TensorParam,
    evaluate,
    finish,
    index_grid,
    input_names,
    numbers_of,
    postorder,
    scatter,
    substitute,
)
from attnlang.passes.buckets import FIRST, KEYS, QUERIES, VALUES, WHOLE, Bucketed, InBuckets, bucket_keys, tensor_of

from .call import Call
from .gathers import LARGEST

if TYPE_CHECKING:
    from attnlang.sparsity import RunMap

__all__ = ["TILE", "fits", "run"]

Tensor = torch.Tensor
Attending: TypeAlias = Callable[[Call, Attend, Environment], dict[str, Tensor]]
"""Runs a stage of one program, all of whose tensors the environment binds."""
RunsOf: TypeAlias = "Callable[[Call, Attend, Environment], RunMap]"

MOST = 1 << 25
"""Floats of operands of the buckets that run at once: gradients of q, k and v are made for each bucket."""
FEW = 16
"""Buckets that are run without a look at their run map, and passes over all pairs that those of one key may come to: on
a CPU about what the blockwise executor takes for one without a mask."""
MANY = 1 << 12
"""Buckets that are too many to look at."""
TILE = (128, 128)
"""The tile at which passes are counted."""


def _heads(env: Environment) -> int:
    return env.sizes["B"] * env.sizes["H"]


def _lengths(stage: Attend, env: Environment) -> tuple[int, int]:
    lq, lk = (int(evaluate(e, env)) for e in stage.lengths)
    return lq, lk


def _number(extents: tuple[Expr, ...], env: Environment) -> int:
    return math.prod(max(0, n) for n in numbers_of(extents, env))


def fits(found: Bucketed, stage: Attend, call: Call, env: Environment, runs: RunsOf) -> bool:
    """Whether there is something to run, no tensor of all buckets is too large, and their pairs lie in few tiles.

    ``runs`` gives the run map of a stage at :data:`TILE`.
    """
    lq, lk = _lengths(stage, env)
    taken = {*env.tensors, *env.operands, *env.sizes, *env.params}
    made = {tensor_of(st) for level in found.levels for st in level.stats}
    if ({QUERIES, KEYS, VALUES, FIRST.name, *WHOLE.values()} | made) & taken:
        return False
    (term,), (batch, heads) = stage.terms, (env.sizes["B"], env.sizes["H"])
    keys = [env.rows(x.source) for x in (term.right, *(part.rows for part in found.buckets)) if x is not None]
    shared = keys[0].shape[1]
    if not all((batch, heads, lq, lk, shared)) or env.rows(term.left.source).shape[:3] != (batch, heads, lq):
        return False
    if any(t.shape[:3] != (batch, shared, lk) for t in keys) or heads % shared:
        return False
    for part in found.buckets:
        count = _number(part.extents, env)
        features = 1 if part.rows is None else env.rows(part.rows.source).shape[-1]
        rows = max(lk if out.over == "q" else lq for out in part.stage.outputs)
        if not 0 < count <= MANY or _heads(env) * rows * count * features > LARGEST:
            return False
    return all(_passes(part, stage, call, env, runs) <= FEW for part in found.buckets)


def _passes(part: InBuckets, stage: Attend, call: Call, env: Environment, runs: RunsOf) -> float:
    """How many times all pairs the tiles of all buckets are."""
    count = _number(part.extents, env)
    if count <= FEW:
        return count
    bare = replace(part.stage, branches=(Branch(part.stage.branch.mask),), outputs=())
    found = runs(*_bound(replace(part, stage=bare), stage, call, env, 0, count))
    return float(found.row_tiles().sum()) / (found.heads * found.nq * found.nk) * (count / found.batch)


def run(found: Bucketed, stage: Attend, call: Call, env: Environment, attend: Attending) -> dict[str, Tensor]:
    """Every output of ``stage`` by name, in the float dtype of ``env`` where buckets made it."""
    made: dict[str, Tensor] = {}
    stats: dict[str, Tensor] = {}
    for level in found.levels:
        here = replace(env, tensors={**env.tensors, **made})
        values: dict[str, Tensor] = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not level.constant):
            if level.whole is not None:
                values |= attend(call, level.whole, here)
            if level.grouped is not None:
                values |= _in_buckets(level.grouped, stage, call, here, attend)
        for st in level.stats:
            value = _seeded(st, values[tensor_of(st)].to(env.float_dtype), stage, env, stats)
            stats[st.name] = value.detach() if level.constant else value
            made[tensor_of(st)] = stats[st.name]
    here = replace(env, tensors={**env.tensors, **made})
    outputs = {} if found.rest is None else dict(attend(call, found.rest, here))
    for part in found.keyed:
        outputs |= _in_buckets(part, stage, call, here, attend)
    for out in stage.outputs:
        if out in found.reduced:
            outputs[out.name] = _reduced(out, outputs[out.name].to(env.float_dtype), stage, env)
        elif out.key:
            outputs[out.name] = finish(out, outputs[out.name].unflatten(3, numbers_of(out.extents, env)))
    if found.seen is not None:
        seen = attend(call, found.seen, here)["seen"][..., None] > 0
        for out in found.wide:
            safe = {n: torch.where(seen if t.dim() == 4 else seen[..., 0], t, 1.0) for n, t in stats.items()}
            outputs[out.name] = torch.where(seen, _row(out.value, stage, env, safe), out.empty)
    return {out.name: outputs[out.name] for out in stage.outputs}


def _row(expr: Expr, stage: Attend, env: Environment, stats: Mapping[str, Tensor]) -> Tensor:
    """A function of a row and of statistics as [B, H, Lq, groups], or [..., 1] where no group is read."""
    shape = (env.sizes["B"], env.sizes["H"], _lengths(stage, env)[0])
    inputs = {n: stats[n] if stats[n].dim() == 4 else stats[n][..., None] for n in input_names(expr)}
    grid = index_grid((*shape, 1), "bhq-", env)
    value = evaluate(expr, replace(grid, inputs=inputs)).to(env.float_dtype)
    return value.expand(*shape, value.shape[-1] if value.dim() else 1)


def _seeded(st: Stat, value: Tensor, stage: Attend, env: Environment, stats: Mapping[str, Tensor]) -> Tensor:
    """A statistic with its seed. A row that nothing is visible to has an infinite extremum, which no seed may meet."""
    if st.seed is None:
        return value
    safe = {n: torch.where(t.isinf(), 0.0, t) if t.dim() == 3 else t for n, t in stats.items()}
    seed = _row(st.seed, stage, env, safe)
    seed = seed if st.grouped else seed[..., 0]
    return COMBINE[st.monoid](value, seed)


def _sources(part: InBuckets, stage: Attend) -> dict[str, str]:
    """Where the operands of a stage in buckets come from."""
    (term,) = stage.terms
    found = {QUERIES: term.left.source, KEYS: term.right.source}
    return found if part.rows is None else {**found, VALUES: part.rows.source}


def _bound(
    part: InBuckets, stage: Attend, call: Call, env: Environment, first: int, count: int
) -> tuple[Call, Attend, Environment]:
    """What runs ``count`` buckets from ``first`` on."""
    rows = {name: env.rows(source).flatten(0, 1)[None] for name, source in _sources(part, stage).items()}
    sizes = {**env.sizes, **{there: env.sizes[a] for a, there in WHOLE.items()}}
    sizes |= {"B": count, "H": rows[QUERIES].shape[1], "Hkv": rows[KEYS].shape[1]}
    params = {**call.params, FIRST.name: first}
    tensors = {**_read(part.stage, env), **{name: t.expand(count, -1, -1, -1) for name, t in rows.items()}}
    here = replace(env, sizes=sizes, params=params, tensors=tensors, operands={})
    inner = replace(call, program=_program(call.program, part.stage), sizes=sizes, params=params)
    return inner, part.stage, here


def _in_buckets(part: InBuckets, stage: Attend, call: Call, env: Environment, attend: Attending) -> dict[str, Tensor]:
    """What every bucket makes, by name: [B, H, rows, buckets] and the features of summed rows after that."""
    buckets = _number(part.extents, env)
    features = max(env.rows(source).shape[-1] for source in _sources(part, stage).values())
    step = max(1, min(buckets, MOST // max(1, _heads(env) * max(_lengths(stage, env)) * features)))
    found = [
        attend(*_bound(part, stage, call, env, first, min(step, buckets - first))) for first in range(0, buckets, step)
    ]
    return {
        out.name: torch.cat([made[out.name].to(env.float_dtype) for made in found])
        .unflatten(1, (env.sizes["B"], env.sizes["H"]))
        .movedim(0, 3)
        for out in part.stage.outputs
    }


def _read(stage: Attend, env: Environment) -> dict[str, Tensor]:
    """The captured tensors that a stage in buckets reads."""
    names = dict.fromkeys(n.tensor for n in postorder(*stage.roots()) if isinstance(n, Load))
    return {n: env.tensor(n) for n in names}


@functools.lru_cache(maxsize=256)
def _program(program: Program, stage: Attend) -> Program:
    """A program of the parameters and captured tensors that a stage in buckets reads."""
    moved: dict[Expr, Expr] = {Size(a): Size(there) for a, there in WHOLE.items()}
    names = {n.tensor for n in postorder(*stage.roots()) if isinstance(n, Load)}
    tensors = tuple(
        TensorParam(t.name, t.type, tuple(substitute(e, moved) for e in t.shape))
        for t in program.tensors
        if t.name in names
    )
    return Program(program.name, (stage,), (*program.scalars, ScalarParam(FIRST.name, INT)), tensors)


def _reduced(out: Output, rows: Tensor, stage: Attend, env: Environment) -> Tensor:
    """An output over (q, k) from what its rows are: [B, H, Lq] or [B, H, Lq, buckets]."""
    lq, at = _lengths(stage, env)[0], bucket_keys(out)
    values = (rows if rows.dim() == 4 else rows[..., None]).transpose(-1, -2)  # [B, H, buckets, Lq]
    extents = numbers_of(out.extents, env)
    others = [n for n in range(len(extents)) if n not in at]
    flat = torch.zeros((1, 1, 1, lq), dtype=torch.int64, device=values.device)
    inside = torch.ones_like(flat, dtype=torch.bool)
    grid = index_grid((env.sizes["B"], env.sizes["H"], 1, lq), "bh-q", env)
    for n in others:
        key = evaluate(out.key[n], grid)
        inside = inside & (key >= 0) & (key < extents[n])
        flat = flat * extents[n] + key
    held = scatter(out.monoid, values, torch.where(inside, flat, -1), math.prod(extents[n] for n in others))
    held = held.unflatten(-1, [extents[n] for n in others]) if others else held[..., 0]
    held = held.unflatten(2, [extents[n] for n in at]) if at else held.squeeze(2)
    order = [2 + (*at, *others).index(n) for n in range(len(extents))]
    return finish(out, held.permute(0, 1, *order))
