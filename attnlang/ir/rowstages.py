"""What the stages that work on rows mean: Map, Pool and Select, in differentiable PyTorch."""

from __future__ import annotations

from dataclasses import replace

import torch

from .build import FALSE
from .evaluate import Environment, evaluate
from .nodes import Expr, Index, Load, index_axes, input_names, postorder, rewrite
from .nodes import Input as Named
from .stages import Map, Pool, Select
from .types import FLOAT

__all__ = ["index_grid", "run_rows"]

Tensor = torch.Tensor

BLOCK = 1 << 18
"""Elements of a row map evaluated at once, so that what lies between stays in the cache."""


def run_rows(stage: Map | Pool | Select, env: Environment) -> Tensor:
    """Return what ``stage`` makes of the tensors that ``env`` binds: rows [B, H, L, D], or a choice (bool)."""
    if isinstance(stage, Map):
        return _map(stage, env)
    if isinstance(stage, Pool):
        return _pool(stage, env)
    return _select(stage, env)


def index_grid(extents: tuple[int, ...], axes: str, env: Environment) -> Environment:
    """Return ``env`` with index tensors for ``axes``, one dimension each; ``-`` is a dimension without an index."""
    rank = len(axes)
    vectors = [
        torch.arange(n, device=env.device).view([-1 if d == i else 1 for d in range(rank)])
        for i, n in enumerate(extents)
    ]
    return replace(env, indices=dict(zip(axes, vectors, strict=True)))


def _views(roots: tuple[Expr, ...], axes: str, extents: tuple[int, ...], env: Environment) -> dict[Load, Tensor]:
    """Loads whose dimensions belong to distinct axes, in order, each to all of an axis or to an expression of it alone:
    views and selections along dimensions, where a gather, and even more its derivative, would be slow."""
    found: dict[Load, Tensor] = {}
    for node in postorder(*roots):
        if not isinstance(node, Load) or node.type is not FLOAT:
            continue
        names = [_axis(i) for i in node.indices]
        places = [axes.find(n) if n else -1 for n in names]
        t = env.tensor(node.tensor)
        if -1 in places or places != sorted(set(places)):
            continue
        dims = list(zip(node.indices, t.shape, places, strict=True))
        if any(n != extents[place] if isinstance(index, Index) else not n for index, n, place in dims):
            continue
        for dim, (index, n, place) in enumerate(dims):
            if not isinstance(index, Index):
                along = replace(env, indices={axes[place]: torch.arange(extents[place], device=env.device)})
                t = t.index_select(dim, evaluate(index, along).clamp(0, n - 1).expand(extents[place]))
        shape = [1] * len(axes)
        for dim, place in enumerate(places):
            shape[place] = t.shape[dim]
        found[node] = t.reshape(shape).to(env.float_dtype)
    return found


def _axis(index: Expr) -> str:
    """The one axis that ``index`` is an expression of, or nothing."""
    axes = index_axes(index)
    return next(iter(axes)) if len(axes) == 1 and not input_names(index) else ""


def _map(stage: Map, env: Environment) -> Tensor:
    extents = tuple(int(evaluate(e, env)) for e in stage.extents)
    grid = index_grid(extents, "bhqd", env)
    roots = (*(e for _, _, e in stage.lets), stage.value)
    whole = _views(roots, "bhqd", extents, env)
    views = {load: Named(f"view {i}", FLOAT, "bhqd") for i, load in enumerate(whole)}
    roots = rewrite(roots, lambda n: views.get(n, n) if isinstance(n, Load) else n)
    inputs = {views[load].name: view for load, view in whole.items()}

    def rows(start: int, end: int) -> Tensor:
        shape = (*extents[:2], end - start, extents[3])
        at = replace(grid, indices={**grid.indices, "q": grid.indices["q"][:, :, start:end]})
        found = {n: t if t.shape[2] == 1 else t[:, :, start:end] for n, t in inputs.items()}
        for (name, monoid, _), expr in zip(stage.lets, roots, strict=False):
            value = evaluate(expr, replace(at, inputs=found)).to(env.float_dtype).expand(shape)
            found[name] = _reduced(monoid, value)
        return evaluate(roots[-1], replace(at, inputs=found)).to(env.float_dtype).expand(shape)

    step = max(1, BLOCK // max(1, extents[0] * extents[1] * extents[3]))
    if step >= extents[2] or _recorded(env):
        return rows(0, extents[2])
    made = torch.empty(extents, dtype=env.float_dtype, device=env.device)
    for start in range(0, extents[2], step):
        end = min(start + step, extents[2])
        made[:, :, start:end] = rows(start, end)
    return made


def _recorded(env: Environment) -> bool:
    """Whether somebody follows the operations one by one: autograd, a function transform, a GPU's queue."""
    tensors = (*env.tensors.values(), *env.operands.values())
    if torch.device(env.device).type != "cpu" or any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _reduced(monoid: str, value: Tensor) -> Tensor:
    """Reduce the features to one, kept as a dimension."""
    if monoid == "max":
        return value.amax(-1, keepdim=True)
    total = value.sum(-1, keepdim=True)
    return total / value.shape[-1] if monoid == "mean" else total


def _pool(stage: Pool, env: Environment) -> Tensor:
    rows = env.rows(stage.source).to(env.float_dtype)
    block = max(1, int(evaluate(stage.block, env)))
    stride = block if stage.stride is None else max(1, int(evaluate(stage.stride, env)))
    length = rows.shape[2]
    starts = torch.arange(0, length, stride, device=rows.device)
    where = starts[:, None] + torch.arange(block, device=rows.device)
    inside = where < length
    if not len(starts):
        return rows
    if stage.how in ("first", "last"):
        at = starts if stage.how == "first" else (starts + block - 1).clamp(max=length - 1)
        return rows.index_select(2, at)
    picked = rows[:, :, where.clamp(max=length - 1)]  # [B, H, blocks, block, D]
    if stage.how in ("max", "min"):
        sign = 1.0 if stage.how == "max" else -1.0
        masked = torch.where(inside[..., None], picked * sign, -torch.inf)
        return masked.amax(-2) * sign
    total = torch.where(inside[..., None], picked, 0.0).sum(-2)
    return total / inside.sum(-1)[:, None] if stage.how == "mean" else total


def _select(stage: Select, env: Environment) -> Tensor:
    extents = tuple(int(evaluate(e, env)) for e in stage.extents)
    with torch.no_grad():
        grid = index_grid(extents, "bhqk", env)
        score = evaluate(stage.score, grid).to(env.float_dtype).expand(extents)
        candidates = evaluate(stage.candidates, grid).expand(extents)
        forced = evaluate(stage.forced, grid).expand(extents) if stage.forced is not FALSE else None
        if not extents[-1]:
            return candidates.contiguous()
        chosen = _choose(stage, env, score, candidates, forced)
        return chosen if forced is None else chosen | forced


def _choose(stage: Select, env: Environment, score: Tensor, candidates: Tensor, forced: Tensor | None) -> Tensor:
    (rule,) = stage.rules
    at = index_grid(tuple(score.shape[:3]), "bhq", env)
    amount = evaluate(rule, at)
    amount = amount.expand(score.shape[:3])[..., None] if amount.dim() == 3 else amount
    if stage.threshold is not None:
        return candidates & (score >= amount)
    score = torch.where(torch.isnan(score), -torch.inf, score)
    if forced is not None:  # forced pairs come first, and count
        score = torch.where(forced, torch.inf, score)
        candidates = candidates | forced
    score = torch.where(candidates, score, -torch.inf)
    order = score.argsort(stable=True, dim=-1, descending=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order)
    )
    if stage.top is not None:
        return candidates & (rank < amount)
    plain = torch.where(torch.isposinf(score), torch.finfo(score.dtype).max, score)
    weights = torch.softmax(plain, -1).gather(-1, order).nan_to_num(0.0)
    before = weights.cumsum(-1) - weights  # the mass of all that is larger
    return candidates & (before < amount).gather(-1, rank)
