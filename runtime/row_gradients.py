"""The row part of a streaming stage's gradient: from cotangents of outputs to what a backward kernel reads of a row.

Row expressions are functions of a few numbers a row, so PyTorch differentiates them. Memory is linear in the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from attnlang.ir import Const, Environment, Expr, Op, evaluate, substitute
from attnlang.passes.pullback import FACTOR, SETTLED, Pullback, cotangent, is_zero, row_outputs, settled_of

__all__ = ["RowGradients", "VanishingFactor", "row_gradients"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class RowGradients:
    """``rows`` [B, H, Lq] and ``columns`` [B, H, Lk] by input name, float32 or wider; ``do`` is the gradient of the
    rows output (None where there is none or it is zero); ``captured`` holds the gradients that reach captured tensors
    through row expressions alone."""

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    do: Tensor | None
    captured: dict[str, Tensor]


def _unseen(pull: Pullback, held: Mapping[str, Tensor]) -> Tensor | None:
    """Rows that no key is visible to, where an accumulator shows it."""
    for a in pull.stream.accumulators:
        if a.name in held and a.monoid in ("max", "min"):
            return held[a.name] == a.identity
    return None


def row_gradients(
    pull: Pullback,
    env: Environment,
    held: Mapping[str, Tensor],
    finals: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    wanted: Sequence[str],
) -> RowGradients:
    """Differentiate the row expressions of a stage.

    ``held`` are the accumulators that :func:`.pullback.saved` names, ``finals`` the outputs and ``grads`` the gradients
    of some of them, by name. ``env`` binds sizes, parameters and captured tensors; gradients of captured tensors are
    given for ``wanted``.

    Raises:
        VanishingFactor: an output was multiplied by zero, which hides what it was made of.
    """
    stream, dtype = pull.stream, env.float_dtype
    device = env.device
    batch, heads, lq = (env.sizes[n] for n in ("B", "H", "Lq"))
    unseen = _unseen(pull, held)
    safe = {}
    for a in stream.accumulators:
        if a.name in held:
            value = held[a.name].to(dtype)
            fill = 1.0 if a.monoid == "sum" else 0.0
            safe[a.name] = value if unseen is None else torch.where(unseen, fill, value)
    axes = {
        "b": torch.arange(batch, device=device)[:, None, None],
        "h": torch.arange(heads, device=device)[:, None],
        "q": torch.arange(lq, device=device),
    }
    rows = dict(safe)  # and not what is held: pairs of a row whose scores are all minus infinity come to 0, not to NaN
    base = replace(env, indices=axes, inputs=safe)
    settled: dict[Expr, Expr] = settled_of(stream)
    if settled:
        (expr,) = settled
        with torch.no_grad():
            safe[SETTLED.name] = evaluate(expr, base).expand(batch, heads, lq)
        rows[SETTLED.name] = safe[SETTLED.name]

    smooth = [a for a in stream.accumulators if a.monoid == "sum" and a.over == "k" and a.rows is None]
    leaves = {a.name: safe[a.name].detach().requires_grad_() for a in smooth}
    tensors = {n: env.tensors[n].detach().to(dtype).requires_grad_() for n in wanted}
    here = replace(base, inputs={**safe, **leaves}, tensors={**env.tensors, **tensors})
    made, given = [], []
    do: Tensor | None = None
    for out in row_outputs(stream):
        if out.name not in grads and out.rows is None:
            continue
        expr = substitute(out.value, settled)
        with torch.enable_grad():
            value = evaluate(expr, here).expand(batch, heads, lq)
        if out.rows is None:
            grad = grads[out.name].to(dtype)
        else:
            rows[FACTOR.name] = value.detach()
            do = grads.get(out.name)
            if do is None:
                continue
            grad = _by_factor(value.detach(), finals[out.name], do, expr, unseen)
        if value.requires_grad:
            made.append(value)
            given.append(grad if unseen is None else torch.where(unseen, 0.0, grad))
    inputs = [*leaves.values(), *tensors.values()]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if made and inputs:
        found = torch.autograd.grad(made, inputs, given, allow_unused=True)
    for a, g in zip(smooth, found, strict=False):
        rows[cotangent(a).name] = torch.zeros_like(safe[a.name]) if g is None else g
    captured = {n: g for n, g in zip(tensors, found[len(smooth) :], strict=True) if g is not None}
    columns = {}
    for out in stream.outputs:
        if out.column is not None:
            a = next(a for a in stream.accumulators if a.name == out.column)
            shape = (batch, heads, env.sizes["Lk"])
            columns[cotangent(a).name] = (
                grads[out.name] if out.name in grads else torch.zeros(shape, dtype=dtype, device=device)
            )
    return RowGradients(rows, columns, do, captured)


class VanishingFactor(Exception):
    """A row factor is zero, so the sum of rows behind an output cannot be told from the output."""


def _by_factor(factor: Tensor, o: Tensor, do: Tensor, expr: Expr, unseen: Tensor | None) -> Tensor:
    """The gradient of the row factor: the product of the output's gradient and the sum of rows, which is o / factor."""
    dot = (o.to(factor.dtype) * do.to(factor.dtype)).sum(-1)
    if _never_zero(expr):
        return dot / factor
    zero = factor == 0
    if bool((zero if unseen is None else zero & ~unseen).any()):
        raise VanishingFactor
    return torch.where(zero, 0.0, dot / factor)


def _never_zero(expr: Expr) -> bool:
    """Whether a factor is zero nowhere but in rows that no key is visible to."""
    match expr:
        case Const(value=value):
            return value != 0
        case Op(op="where", operands=(_, first, second)) if is_zero(second):
            return _never_zero(first)
        case Op(op="exp"):
            return True
        case Op(op="neg", operands=(a,)) | Op(op="div", operands=(a, _)):
            return _never_zero(a)
        case Op(op="mul", operands=(a, b)):
            return _never_zero(a) and _never_zero(b)
    return False
