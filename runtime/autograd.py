"""Gradients of any forward backend, recomputed blockwise in PyTorch from the saved row statistics.

With p = exp(score - lse), dp = do v^T and delta = rowsum(p * dp):

    d score = p * (dp - delta + dlse)        dv = p^T do
    d raw, d captured = pullback of the score expression
    dq = scale * d raw k                     dk = scale * d raw^T q

delta is taken from p and dp and not, as is usual, from do * o, whose rounding costs half-precision gradients their
digits where contributions cancel. Memory is linear in the lengths. Gradients of gradients go through the differentiable
eager executor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from . import eager
from .call import Call
from .errors import Unavailable

__all__ = ["attend", "differentiable", "gradients", "wants_gradients"]

Tensor = torch.Tensor
Forward: TypeAlias = Callable[[Call], tuple[Tensor, Tensor]]
Backward: TypeAlias = Callable[[Call, Tensor, Tensor, Tensor, "Tensor | None", "tuple[str, ...]"], Any]
"""(call, o, lse, do, dlse, wanted captured tensors) to a record of gradients; see ``cpp_backward.Gradients``."""


def wants_gradients(call: Call) -> bool:
    """Whether autograd must record this call."""
    if not torch.is_grad_enabled():
        return False
    return any(t.requires_grad for t in (call.q, call.k, call.v, *call.tensors.values()))


def attend(call: Call, forward: Forward, backward: Backward | None = None) -> tuple[Tensor, Tensor]:
    """Run ``forward`` so that o and lse are differentiable in q, k, v and every float captured tensor.

    ``backward`` is the backward kernel of the backend; where there is none, or it cannot run the call, gradients are
    recomputed blockwise in PyTorch.
    """
    names = tuple(call.tensors)
    # the record outlives the forward pass: it must not keep the tensors that save_for_backward manages
    none = call.q.new_empty(0)
    spec = _Spec(replace(call, q=none, k=none, v=none, tensors={}), names, forward, backward)
    out = _Attend.apply(spec, call.q, call.k, call.v, *call.tensors.values())
    return out[0], out[1]


@dataclass(frozen=True)
class _Spec:
    """A call without its tensors; ``names`` are the captured ones, in the order they are passed beside it."""

    call: Call
    names: tuple[str, ...]
    forward: Forward
    backward: Backward | None

    def restore(self, q: Tensor, k: Tensor, v: Tensor, captured: tuple[Tensor, ...]) -> Call:
        return replace(self.call, q=q, k=k, v=v, tensors=dict(zip(self.names, captured, strict=True)))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(spec: _Spec, q: Tensor, k: Tensor, v: Tensor, *captured: Tensor) -> tuple[Tensor, Tensor]:
        return spec.forward(spec.restore(q, k, v, captured))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        spec, *tensors = inputs
        ctx.spec = spec
        ctx.save_for_backward(*output, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        o, lse, q, k, v, *captured = ctx.saved_tensors
        spec, needs = ctx.spec, ctx.needs_input_grad[1:]
        do, dlse = grads
        if do is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        call = spec.restore(q, k, v, tuple(captured))
        if torch.is_grad_enabled():
            return (None, *_differentiable(call, spec.names, needs, do, dlse))
        return (None, *gradients(call, spec.backward, needs, o, lse, do, dlse))


def gradients(
    call: Call,
    backward: Backward | None,
    needs: tuple[bool, ...],
    o: Tensor,
    lse: Tensor,
    do: Tensor | None,
    dlse: Tensor | None,
) -> list[Tensor | None]:
    """Return gradients of q, k, v and the captured tensors of ``call``, None where ``needs`` says no.

    They come from the backend's backward kernel, or from PyTorch where it has none for this call.
    """
    names = tuple(call.tensors)
    with torch.autocast(call.q.device.type, enabled=False):
        if backward is not None:
            wanted = tuple(n for n, need in zip(names, needs[3:], strict=True) if need)
            try:
                got = backward(call, o, lse, torch.zeros_like(o) if do is None else do, dlse, wanted)
            except Unavailable:
                pass
            else:
                grads = [g if need else None for g, need in zip((got.q, got.k, got.v), needs, strict=False)]
                captured = [got.captured[n].to(call.tensors[n].dtype) if n in wanted else None for n in names]
                return [*grads, *captured]
        return _Backward(call, names, needs, lse, do, dlse).run()


def differentiable(
    forward: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of ``forward(inputs)`` as differentiable functions of the inputs and of ``grads``.

    Each input gets what passes through itself alone, also where inputs are one tensor or made of each other.
    """

    def weighed(*wanted: Tensor) -> Tensor:
        found = iter(wanted)
        made = forward([next(found) if need else t for t, need in zip(inputs, needs, strict=True)])
        return torch.stack([(t * g.to(t.dtype)).sum() for t, g in zip(made, grads, strict=True)]).sum()

    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.func.grad(weighed, argnums=tuple(range(len(wanted))))(*wanted))
    return [next(found) if need else None for need in needs]


def _differentiable(
    call: Call, names: tuple[str, ...], needs: tuple[bool, ...], do: Tensor | None, dlse: Tensor | None
) -> list[Tensor | None]:
    """First-order gradients as differentiable functions of the inputs and of do and dlse."""
    given = (do, dlse)

    def forward(inputs: Sequence[Tensor]) -> list[Tensor]:
        q, k, v, *captured = inputs
        tensors = dict(zip(names, captured, strict=True))
        made = eager.forward(replace(call, q=q, k=k, v=v, tensors=tensors))
        return [t for t, g in zip(made, given, strict=True) if g is not None]

    inputs = [call.q, call.k, call.v, *(call.tensors[n] for n in names)]
    return differentiable(forward, inputs, needs, [g for g in given if g is not None])


@dataclass(frozen=True)
class _Here:
    """What one block of queries works on: its rows, the rows of its key heads, and where their gradients go."""

    block: eager.Block
    q: Tensor
    k: Tensor
    v: Tensor
    dk: Tensor
    dv: Tensor
    lse: Tensor
    do: Tensor | None


@dataclass(frozen=True)
class _Pairs:
    """One chunk of pairs [b, h, m, n]: raw scores, modified scores (recorded), visibility, weights, d weights."""

    raw: Tensor
    scores: Tensor
    seen: Tensor
    p: Tensor
    dp: Tensor

    @property
    def delta(self) -> Tensor:
        """Contribution to rowsum(p * dp), [b, h, m, 1]."""
        return torch.where(self.seen, self.p * self.dp, 0.0).sum(-1, keepdim=True)


class _Backward:
    """One first-order backward pass."""

    def __init__(
        self,
        call: Call,
        names: tuple[str, ...],
        needs: tuple[bool, ...],
        lse: Tensor,
        do: Tensor | None,
        dlse: Tensor | None,
    ) -> None:
        self.call, self.needs = call, needs
        dtype = eager.compute_dtype(call.q.dtype)
        (term,) = call.program.attend.terms
        values = next(x.rows for x in call.program.attend.outputs if x.rows is not None)
        with torch.enable_grad():
            self.leaves = [
                t.detach().requires_grad_(need) for t, need in zip((call.q, call.k, call.v), needs, strict=False)
            ]
            self.rows = [
                eager.expand_rows(leaf, address, call, axis)
                for leaf, address, axis in zip(
                    self.leaves,
                    (term.left.address, term.right.address, values.address),
                    ("q", "k", "k"),
                    strict=True,
                )
            ]
        self.q, self.k, self.v = (r.detach().to(dtype) for r in self.rows)
        self.dq, self.dk, self.dv = (torch.zeros_like(r) for r in (self.q, self.k, self.v))
        self.lse = lse.to(dtype)
        self.do = None if do is None else do.to(dtype)
        self.dlse = None if dlse is None else dlse.to(dtype)
        self.captured = {
            n: _at_least(call.tensors[n].detach(), dtype).requires_grad_()
            for n, need in zip(names, needs[3:], strict=True)
            if need
        }
        self.dcaptured = {n: torch.zeros_like(t) for n, t in self.captured.items()}
        self.inner = replace(call, tensors={**call.tensors, **self.captured})

    def run(self) -> list[Tensor | None]:
        for block in eager.blocks(self.call):
            self._block(block)
        grads = [
            self._pull(leaf, rows, grad) if need else None
            for leaf, rows, grad, need in zip(
                self.leaves, self.rows, (self.dq, self.dk, self.dv), self.needs, strict=False
            )
        ]
        captured: list[Tensor | None] = []
        for (name, tensor), need in zip(self.call.tensors.items(), self.needs[3:], strict=True):
            captured.append(self.dcaptured[name].to(tensor.dtype) if need else None)
        return [*grads, *captured]

    @staticmethod
    def _pull(leaf: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
        """Bring the gradient of gathered rows back to the operand."""
        if rows is leaf:
            return grad.to(leaf.dtype)
        return torch.autograd.grad(rows, leaf, grad.to(rows.dtype))[0]

    def _block(self, block: eager.Block) -> None:
        heads = self.call.sizes["H"]
        k, v, dk, dv = (eager.pick_heads(t, block, heads) for t in (self.k, self.v, self.dk, self.dv))
        rows = (block.batch, block.heads, block.rows)
        do = None if self.do is None else self.do[rows]
        here = _Here(block, self.q[rows], k, v, dk, dv, self.lse[rows], do)
        shift = 0.0 if self.dlse is None else self.dlse[rows][..., None]
        if len(block.chunks) == 1:
            pairs = self._pairs(here, block.chunks[0])
            self._chunk(here, block.chunks[0], pairs, shift - pairs.delta)
            return
        if here.do is not None and block.chunks:  # delta needs all keys of a row, so pairs are computed twice
            shift = shift - sum(self._pairs(here, chunk).delta for chunk in block.chunks)
        for chunk in block.chunks:
            self._chunk(here, chunk, self._pairs(here, chunk), shift)

    def _pairs(self, here: _Here, chunk: eager.KeyChunk) -> _Pairs:
        """Recompute the weights of a chunk, recording the score expression."""
        shape = here.q.shape[:3]
        keys, values = chunk.rows(here.k), chunk.rows(here.v)
        raw = (eager.grouped(here.q, keys.shape[1]) @ keys.transpose(-1, -2)).reshape(*shape, -1) * self.call.scale
        with torch.enable_grad():
            raw.requires_grad_()
            scores, mask = eager.chunk_scores(self.inner, here.block, chunk, raw)
        some = torch.isfinite(here.lse)[..., None]
        seen = some.expand(raw.shape) if mask is None else mask & some
        p = torch.where(seen, torch.exp(scores.detach() - here.lse[..., None]), 0.0)
        dp = torch.zeros_like(p)
        if here.do is not None:
            dp = (eager.grouped(here.do, values.shape[1]) @ values.transpose(-1, -2)).reshape(*shape, -1)
        return _Pairs(raw, scores, seen, p, dp)

    def _chunk(self, here: _Here, chunk: eager.KeyChunk, pairs: _Pairs, shift: Tensor | float) -> None:
        keys = chunk.rows(here.k)
        dscores = torch.where(pairs.seen, pairs.p * (pairs.dp + shift), 0.0)
        draw = eager.grouped(self._pullback(pairs.scores, pairs.raw, dscores) * self.call.scale, keys.shape[1])
        block = here.block
        self.dq[block.batch, block.heads, block.rows] += (draw @ keys).reshape(here.q.shape)
        _add(here.dk, chunk, draw.transpose(-1, -2) @ eager.grouped(here.q, keys.shape[1]))
        if here.do is not None:
            p = eager.grouped(pairs.p, here.v.shape[1])
            _add(here.dv, chunk, p.transpose(-1, -2) @ eager.grouped(here.do, here.v.shape[1]))

    def _pullback(self, scores: Tensor, raw: Tensor, dscores: Tensor) -> Tensor:
        """Gradient of the raw scores; gradients of captured tensors are added up on the way."""
        if not scores.requires_grad:
            return torch.zeros_like(raw)
        inputs = [raw, *self.captured.values()]
        draw, *captured = torch.autograd.grad(scores, inputs, dscores, allow_unused=True)
        for total, found in zip(self.dcaptured.values(), captured, strict=True):
            if found is not None:
                total += found
        return torch.zeros_like(raw) if draw is None else draw


def _at_least(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Widen ``t`` to ``dtype``, so that many small contributions to its gradient are not rounded one by one."""
    return t.to(torch.promote_types(t.dtype, dtype))


def _add(total: Tensor, chunk: eager.KeyChunk, found: Tensor) -> None:
    if chunk.span:
        total[..., chunk.span[0] : chunk.span[1], :] += found
    else:
        total.index_add_(-2, chunk.index, found)
