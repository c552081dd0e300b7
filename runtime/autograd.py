"""Gradients of any forward backend, recomputed blockwise in PyTorch from the saved row statistics.

With p = exp(score - lse), delta = rowsum(do * o) and dp = do v^T:

    d score = p * (dp - delta + dlse)        dv = p^T do
    d raw, d captured = pullback of the score expression
    dq = scale * d raw k                     dk = scale * d raw^T q

Memory is linear in the lengths. Gradients of gradients go through the differentiable eager executor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from . import eager
from .call import Call

__all__ = ["attend", "wants_gradients"]

Tensor = torch.Tensor
Forward: TypeAlias = Callable[[Call], tuple[Tensor, Tensor]]


def wants_gradients(call: Call) -> bool:
    """Whether autograd must record this call."""
    if not torch.is_grad_enabled():
        return False
    return any(t.requires_grad for t in (call.q, call.k, call.v, *call.tensors.values()))


def attend(call: Call, forward: Forward) -> tuple[Tensor, Tensor]:
    """Run ``forward`` so that o and lse are differentiable in q, k, v and every float captured tensor."""
    names = tuple(call.tensors)
    # the record outlives the forward pass: it must not keep the tensors that save_for_backward manages
    none = call.q.new_empty(0)
    spec = _Spec(replace(call, q=none, k=none, v=none, tensors={}), names, forward)
    out = _Attend.apply(spec, call.q, call.k, call.v, *call.tensors.values())
    return out[0], out[1]


@dataclass(frozen=True)
class _Spec:
    """A call without its tensors; ``names`` are the captured ones, in the order they are passed beside it."""

    call: Call
    names: tuple[str, ...]
    forward: Forward

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
        with torch.autocast(q.device.type, enabled=False):
            return (None, *_Backward(call, spec.names, needs, o, lse, do, dlse).run())


def _differentiable(
    call: Call, names: tuple[str, ...], needs: tuple[bool, ...], do: Tensor | None, dlse: Tensor | None
) -> list[Tensor | None]:
    """First-order gradients as differentiable functions of the inputs and of do and dlse."""
    inputs = [call.q, call.k, call.v, *(call.tensors[n] for n in names)]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    outputs = [(out, d) for out, d in zip(eager.forward(call), (do, dlse), strict=True) if d is not None]
    outputs = [(out, d) for out, d in outputs if out.requires_grad]
    if not outputs:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [out for out, _ in outputs], wanted, [d for _, d in outputs], create_graph=True, allow_unused=True
        )
    )
    return [next(found) if need else None for need in needs]


class _Backward:
    """One first-order backward pass."""

    def __init__(
        self,
        call: Call,
        names: tuple[str, ...],
        needs: tuple[bool, ...],
        o: Tensor,
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
        shift = torch.zeros_like(self.lse) if dlse is None else dlse.to(dtype)
        self.shift = shift if self.do is None else shift - (self.do * o.to(dtype)).sum(-1)
        self.captured = {
            n: call.tensors[n].detach().requires_grad_() for n, need in zip(names, needs[3:], strict=True) if need
        }
        self.dcaptured = {n: torch.zeros(t.shape, dtype=dtype, device=t.device) for n, t in self.captured.items()}
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
        where = (block.batch, block.heads, block.rows)
        q, lse, shift = self.q[where], self.lse[where], self.shift[where]
        k, v = eager.pick_heads(self.k, block, heads), eager.pick_heads(self.v, block, heads)
        dk, dv = eager.pick_heads(self.dk, block, heads), eager.pick_heads(self.dv, block, heads)
        do = None if self.do is None else self.do[where]
        shape = q.shape[:3]
        for chunk in block.chunks:
            keys, values = chunk.rows(k), chunk.rows(v)
            queries = eager.grouped(q, keys.shape[1])
            raw = (queries @ keys.transpose(-1, -2)).reshape(*shape, -1) * self.call.scale
            with torch.enable_grad():
                raw.requires_grad_()
                scores, mask = eager.chunk_scores(self.inner, block, chunk, raw)
            seen = torch.isfinite(lse)[..., None] if mask is None else mask & torch.isfinite(lse)[..., None]
            p = torch.where(seen, torch.exp(scores.detach() - lse[..., None]), 0.0)
            dp = shift[..., None]
            if do is not None:
                rows = eager.grouped(do, values.shape[1])
                dp = dp + (rows @ values.transpose(-1, -2)).reshape(*shape, -1)
                _add(dv, chunk, eager.grouped(p, values.shape[1]).transpose(-1, -2) @ rows)
            draw = self._pullback(scores, raw, torch.where(seen, p * dp, 0.0)) * self.call.scale
            draw = eager.grouped(draw, keys.shape[1])
            self.dq[where] += (draw @ keys).reshape(*shape, -1)
            _add(dk, chunk, draw.transpose(-1, -2) @ queries)

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


def _add(total: Tensor, chunk: eager.KeyChunk, found: Tensor) -> None:
    if chunk.span:
        total[..., chunk.span[0] : chunk.span[1], :] += found
    else:
        total.index_add_(-2, chunk.index, found)
