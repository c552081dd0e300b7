"""Gradients of captured tensors: sums over pairs, brought from the axes they were summed along to the tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from attnlang.codegen.plan import CapturedGrad
from attnlang.ir import Environment, Index, Load, evaluate, postorder
from attnlang.passes.levels import Level

from .call import Call

__all__ = ["Gradients", "axes_of", "bring_back", "total"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Gradients:
    """Gradients of q, k, v in their dtypes and of the wanted captured tensors, by name, in float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    captured: Mapping[str, Tensor]


def _positions(call: Call, axis: str, n: int, device: torch.device) -> dict[str, Tensor]:
    """Index values along one axis of sums: ``b h q k d``, ``-`` for k - q from 1 - Lq on, ``+`` for q + k."""
    at = torch.arange(n, device=device)
    last = call.sizes["Lq"] - 1
    if axis == "-":  # any pair of the diagonal will do
        at = at - last
        q = (-at).clamp(min=0)
        return {"q": q, "k": at + q}
    if axis == "+":
        q = at.clamp(max=last)
        return {"q": q, "k": at - q}
    return {axis: at}


def bring_back(call: Call, load: Load, sums: Tensor, axes: str) -> Tensor:
    """Add ``sums``, one dimension for each letter of ``axes``, to the elements ``load`` reads; always in one order.

    ``axes`` are of ``b h q k d``, or ``-`` and ``+`` for sums along the diagonals k - q and q + k.
    """
    tensor = call.tensors[load.tensor]
    if not load.indices:
        return sums.sum()
    read = {n.axis for index in load.indices for n in postorder(index) if isinstance(n, Index)}
    keep = [d for d, axis in enumerate(axes) if axis in read or (axis in "-+" and read & {"q", "k"})]
    drop = [d for d in range(len(axes)) if d not in keep]
    sums = sums.sum(drop) if drop else sums
    grid: dict[str, Tensor] = {}
    for i, d in enumerate(keep):
        shape = [-1 if e == i else 1 for e in range(len(keep))]
        places = _positions(call, axes[d], sums.shape[i], sums.device)
        grid |= {axis: at.view(shape) for axis, at in places.items()}
    env = Environment(grid, call.sizes, call.params, call.tensors, device=sums.device)
    index = [evaluate(e, env).clamp(0, max(n - 1, 0)) for e, n in zip(load.indices, tensor.shape, strict=True)]
    index = [i.expand(sums.shape) for i in index]
    out = torch.zeros(tensor.shape, device=sums.device)
    return out.index_put_(tuple(index), sums, accumulate=True) if out.numel() else out


def axes_of(grad: CapturedGrad) -> str:
    """The axes of the sums of a gradient that no pair decides where to add, for :func:`bring_back`."""
    axes = {Level.GRID: "bh", Level.ROW: "bhq", Level.COL: "bhk"}[grad.level]
    return axes + "d" if grad.by_feature else axes


def total(
    call: Call, wanted: Iterable[str], grads: Sequence[CapturedGrad], parts: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Add up the gradients of all loads of each wanted tensor; one the score does not read gets zeros."""
    out: dict[str, Tensor] = {}
    for grad, part in zip(grads, parts, strict=True):
        name = grad.load.tensor
        out[name] = out[name] + part if name in out else part
    for name in wanted:
        if name not in out:
            out[name] = torch.zeros(call.tensors[name].shape, device=call.q.device)
    return out
