"""The reference semantics: dense attention in float64, written to be read rather than to be fast.

A pair (q, k) that the mask excludes does not exist: its score is never evaluated. A row without visible keys, or whose
scores are all -inf, has output 0 and lse -inf. Everything here is built of differentiable torch operations, so its
autograd gradients are the reference for gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from .evaluate import Environment, evaluate
from .nodes import Scalar
from .program import Address, Program

__all__ = ["dense_mask", "dense_scores", "reference_attention"]

Tensor = torch.Tensor


def _axes(batch: int, heads: int, lq: int, lk: int, device: torch.device) -> dict[str, Tensor]:
    def along(n: int, dim: int) -> Tensor:
        return torch.arange(n, device=device).view([-1 if d == dim else 1 for d in range(4)])

    return {"b": along(batch, 0), "h": along(heads, 1), "q": along(lq, 2), "k": along(lk, 3)}


def _rows(operand: Tensor, address: Address, env: Environment, axis: str, shape: tuple[int, ...]) -> Tensor:
    """Gather rows of ``operand`` [B, H, L, D] by an address map into [B, H, rows, D]."""
    dim = 2 if axis == "q" else 3
    where = [evaluate(e, env) for e in (address.batch, address.head, address.row)]
    index = [w.expand([shape[d] if d in (0, 1, dim) else 1 for d in range(4)]).squeeze(5 - dim) for w in where]
    index = [i.clamp(0, max(n - 1, 0)) for i, n in zip(index, operand.shape, strict=False)]
    if operand.numel() == 0:
        return operand.new_zeros((*index[0].shape, operand.shape[-1]), dtype=env.float_dtype)
    return operand[tuple(index)].to(env.float_dtype)


def _environment(
    program: Program,
    sizes: Mapping[str, int],
    params: Mapping[str, Scalar | Tensor],
    tensors: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Environment:
    axes = _axes(sizes["B"], sizes["H"], sizes["Lq"], sizes["Lk"], device)
    return Environment(axes, sizes, params, tensors, {}, dtype, device)


def dense_mask(
    program: Program,
    sizes: Mapping[str, int],
    params: Mapping[str, Scalar | Tensor] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the mask as a bool tensor [B, H, Lq, Lk]."""
    env = _environment(program, sizes, params or {}, tensors or {}, torch.device(device), torch.float64)
    shape = (sizes["B"], sizes["H"], sizes["Lq"], sizes["Lk"])
    return evaluate(program.mask, env).expand(shape)


def dense_scores(
    program: Program,
    q: Tensor,
    k: Tensor,
    sizes: Mapping[str, int],
    params: Mapping[str, Scalar | Tensor],
    tensors: Mapping[str, Tensor],
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return modified scores [B, H, Lq, Lk] with -inf where masked, and the mask."""
    env = _environment(program, sizes, params, tensors, q.device, dtype)
    (term,) = program.attend.terms
    shape = (sizes["B"], sizes["H"], sizes["Lq"], sizes["Lk"])
    mask = evaluate(program.mask, env).expand(shape)
    rows_q = _rows(q, term.left.address, env, "q", shape)
    rows_k = _rows(k, term.right.address, env, "k", shape)
    raw = (rows_q @ rows_k.transpose(-1, -2)) * scale
    # only visible pairs are evaluated: log(s) or 1 / s of a masked pair must not reach a gradient
    points = mask.nonzero(as_tuple=True)
    visible = Environment(
        dict(zip("bhqk", points, strict=True)), sizes, params, tensors, {"s": raw[points]}, dtype, q.device
    )
    values = evaluate(program.score, visible).expand(points[0].shape)
    scores = torch.full(shape, -math.inf, dtype=dtype, device=q.device).index_put(points, values)
    return scores, mask


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
    """Return the output [B, H, Lq, Dv] and the natural-log lse [B, H, Lq], both in ``dtype``.

    Shapes: q [B, H, Lq, D], k [Bkv, Hkv, Lk, D], v [Bkv, Hkv, Lk, Dv]. Memory is O(B H Lq Lk).
    """
    scores, mask = dense_scores(program, q, k, sizes, params, tensors, scale, dtype)
    shape = tuple(mask.shape)
    env = _environment(program, sizes, params, tensors, q.device, dtype)
    values = next(o.rows for o in program.attend.outputs if o.rows is not None)
    rows_v = _rows(v, values.address, env, "k", shape)
    if shape[-1] == 0:
        empty = scores.new_full(shape[:-1], -math.inf)
        return scores.new_zeros((*shape[:-1], v.shape[-1])), empty
    visible = ~torch.isneginf(scores).all(-1)  # a score of -inf hides a pair as the mask does
    lse = torch.logsumexp(scores.masked_fill(~visible[..., None], 0.0), -1)
    weights = torch.exp(scores - lse[..., None])
    weights = weights.masked_fill(~visible[..., None], 0.0)
    return weights @ rows_v, lse.masked_fill(~visible, -math.inf)
