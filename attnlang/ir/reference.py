"""The reference semantics: the stages of a program one after the other, dense, in float64.

A pair (q, k) that the mask excludes does not exist: its score is never evaluated. A row without visible keys, or whose
scores are all -inf, has output 0 and lse -inf. Everything here is built of differentiable torch operations, so its
autograd gradients are the reference for gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from .build import s
from .evaluate import Environment, evaluate
from .nodes import Scalar
from .program import Program
from .rowstages import run_rows
from .semantics import Region, attend_region, finish
from .stages import Attend, Output

__all__ = ["dense_mask", "dense_scores", "reference", "reference_attention", "run_stages"]

Tensor = torch.Tensor
RunAttend = Callable[[Attend, Environment], dict[str, Tensor]]


def dense_mask(
    program: Program,
    sizes: Mapping[str, int],
    params: Mapping[str, Scalar | Tensor] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the mask as a bool tensor [B, H, Lq, Lk]."""
    shape = (sizes["B"], sizes["H"], sizes["Lq"], sizes["Lk"])
    axes = {
        axis: torch.arange(n, device=device).view([-1 if d == i else 1 for d in range(4)])
        for i, (axis, n) in enumerate(zip("bhqk", shape, strict=True))
    }
    env = Environment(axes, sizes, params or {}, tensors or {}, {}, torch.float64, torch.device(device))
    return evaluate(program.mask, env).expand(shape)


def run_stages(program: Program, env: Environment, attend: RunAttend) -> dict[str, Tensor]:
    """Run the stages in order and return everything they make, by name.

    ``env`` binds sizes, parameters, captured tensors and the operands q, k and v; ``attend`` runs one Attend stage.
    """
    made: dict[str, Tensor] = {}
    for stage in program.stages:
        here = replace(env, tensors={**env.tensors, **made})
        if isinstance(stage, Attend):
            made |= attend(stage, here)
        else:
            made[stage.name] = run_rows(stage, here)
    return made


def reference(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Mapping[str, int],
    params: Mapping[str, Scalar | Tensor],
    tensors: Mapping[str, Tensor],
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Return every result of the program by name, evaluated densely in ``dtype``.

    Shapes: q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]. Memory is O(B H Lq Lk).
    """
    env = Environment({}, sizes, params, tensors, {}, dtype, q.device, {"q": q, "k": k, "v": v})

    def dense(stage: Attend, here: Environment) -> dict[str, Tensor]:
        lq, lk = (int(evaluate(e, here)) for e in stage.lengths)
        found = attend_region(stage, here, Region.whole(sizes["B"], sizes["H"], lq, lk, q.device), scale)
        return {out.name: finish(out, found[out.name]) for out in stage.outputs}

    made = run_stages(program, env, dense)
    return {name: made[name] for name in program.results}


def dense_scores(
    program: Program,
    q: Tensor,
    k: Tensor,
    sizes: Mapping[str, int],
    params: Mapping[str, Scalar | Tensor],
    tensors: Mapping[str, Tensor],
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the modified scores [B, H, Lq, Lk] of a program of one stage and one branch, -inf where hidden."""
    scores = Output("scores", s, over="", empty=float("-inf"))
    stage = replace(program.attend, outputs=(scores,))
    alone = replace(program, stages=(stage,), returns=("scores",))
    return reference(alone, q, k, k, sizes, params, tensors, scale, dtype)["scores"]


def reference_attention(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Mapping[str, int],
    params: Mapping[str, Scalar | Tensor],
    tensors: Mapping[str, Tensor],
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, Lq, Dv] and the natural-log lse [B, H, Lq] of a program that has both."""
    made = reference(program, q, k, v, sizes, params, tensors, scale, dtype)
    return made["o"], made["lse"]
