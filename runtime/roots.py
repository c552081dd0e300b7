"""Row statistics that are roots, found by kernels: every step of the search is one pass over the keys.

The search is that of :mod:`attnlang.ir.semantics`. Its last step is recorded by autograd: with the root t of
F(t, x) = 1, ``t - (F(t, x) - 1) / F'(t)`` has the value and, F' taken for a constant, the derivative of the root.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from attnlang.ir import FLOAT, Attend, Environment, Expr, Load, Output, Stat, evaluate, stat, substitute
from attnlang.ir.build import b, const, h, q
from attnlang.ir.stages import WEIGHT
from attnlang.passes.derivatives import derivatives
from attnlang.passes.simplify import map_record

__all__ = ["has_roots", "probe", "without_roots"]

Tensor = torch.Tensor
STEPS = 100
"""Most steps of a search, and most times its end is moved out."""


def has_roots(stage: Attend, env: Environment) -> bool:
    """Whether the one branch of ``stage`` has a root among its statistics, and a name for it is free in ``env``."""
    if len(stage.branches) != 1:
        return False
    found = [st for st in stage.branch.normalizer.stats if st.monoid == "root"]
    return bool(found) and not {_place(st).tensor for st in found} & {*env.tensors, *env.operands}


def _first(stage: Attend) -> tuple[int, Stat]:
    return next((i, st) for i, st in enumerate(stage.branch.normalizer.stats) if st.monoid == "root")


def _place(found: Stat) -> Load:
    return Load(f"{found.name}_root", (b, h, q), FLOAT)


@functools.lru_cache(maxsize=64)
def probe(stage: Attend) -> Attend:
    """A stage that reads a candidate for its first root from a tensor and makes of a row: ``sum`` of the lift, its
    ``slope``, ``start`` of the search and ``seen``, the number of visible keys."""
    number, found = _first(stage)
    assert found.seed is not None
    own: dict[Expr, Expr] = {stat(found.name): _place(found)}
    lift = substitute(found.lift, own)
    slope = substitute(derivatives(found.lift, (stat(found.name),))[stat(found.name)], own)
    norm = replace(stage.branch.normalizer, stats=stage.branch.normalizer.stats[:number], weight=lift)
    outputs = (
        Output("sum", WEIGHT),
        Output("slope", slope),
        Output("start", found.seed, over=""),
        Output("seen", const(1.0)),
    )
    branch = replace(stage.branch, normalizer=norm, weight=None)
    return replace(stage, name=f"{stage.name}_probe", branches=(branch,), outputs=outputs)


@functools.lru_cache(maxsize=64)
def _rest(stage: Attend) -> Attend:
    """The stage with its first root read from a tensor."""
    number, found = _first(stage)
    own: dict[Expr, Expr] = {stat(found.name): _place(found)}
    change: Callable[[Expr], Expr] = lambda e: substitute(e, own)  # noqa: E731
    stats = stage.branch.normalizer.stats
    branch = replace(
        stage.branch, normalizer=replace(stage.branch.normalizer, stats=stats[:number] + stats[number + 1 :])
    )
    outputs = tuple(map_record(out, change) for out in stage.outputs)
    return replace(stage, branches=(map_record(branch, change),), outputs=outputs)


def without_roots(
    stage: Attend, env: Environment, attend: Callable[[Attend, Environment], dict[str, Tensor]]
) -> tuple[Attend, dict[str, Tensor]]:
    """``stage`` with its roots read from tensors, and these; ``attend`` runs a stage."""
    made: dict[str, Tensor] = {}
    while has_roots(stage, env):
        name = _place(_first(stage)[1]).tensor
        here = replace(env, tensors={**env.tensors, **made})
        made[name] = _root(probe(stage), name, here, attend)
        stage = _rest(stage)
    return stage, made


def _root(
    asked: Attend, name: str, env: Environment, attend: Callable[[Attend, Environment], dict[str, Tensor]]
) -> Tensor:
    def ask(t: Tensor) -> dict[str, Tensor]:
        return attend(asked, replace(env, tensors={**env.tensors, name: t}))

    shape = (env.sizes["B"], env.sizes["H"], int(evaluate(asked.lengths[0], env)))
    with torch.no_grad():
        first = ask(torch.zeros(shape, dtype=env.float_dtype, device=env.device))
        some = first["seen"] > 0
        low = torch.where(some, first["start"], 0.0).to(env.float_dtype)
        high = low + 1.0
        for _ in range(STEPS):
            short = some & (ask(high)["sum"] > 1)
            if not bool(short.any()):
                break
            high = torch.where(short, high + 2 * (high - low), high)
        t = low
        for _ in range(STEPS):
            found = ask(t)
            value, gradient = found["sum"] - 1.0, found["slope"]
            low, high = torch.where(value >= 0, t, low), torch.where(value < 0, t, high)
            step = t - value / torch.where(gradient < 0, gradient, -1.0)
            inside = (gradient < 0) & (step >= low) & (step <= high)
            moved = torch.where(some, torch.where(inside, step, (low + high) / 2), 0.0)
            done = bool((moved - t).abs().le(torch.finfo(t.dtype).eps * (1 + t.abs())).all())
            t = moved
            if done:
                break
    last = ask(t)
    gradient = last["slope"].detach()
    return torch.where(some, t - (last["sum"] - 1.0) / torch.where(gradient < 0, gradient, -1.0), 0.0)
