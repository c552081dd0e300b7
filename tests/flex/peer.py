"""Comparison of attnlang's drop-in functions with PyTorch's own eager FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import flex_attention as pytorch

import attnlang as al

pytorch._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True  # eager: PyTorch's definition of the semantics

B, H, Q, K, D = 2, 4, 150, 150, 16
LISTS = tuple(
    f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
)


def operands(
    batch: int = B,
    heads: int = H,
    q_len: int = Q,
    kv_len: int = K,
    *,
    kv_heads: int | None = None,
    dim: int = D,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kv_heads = heads if kv_heads is None else kv_heads
    value_dim = dim if value_dim is None else value_dim
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, value_dim))
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    return q, k, v


def masks(mask_mod: Callable, q: torch.Tensor, k: torch.Tensor, shared: bool = False, **kwargs: Any) -> tuple[Any, Any]:
    """The block masks of both libraries for these operands."""
    shape = (None if shared else q.shape[0], None if shared else q.shape[1], q.shape[2], k.shape[2])
    ours = al.create_block_mask(mask_mod, *shape, **kwargs)
    theirs = pytorch.create_block_mask(mask_mod, *shape, device="cpu", **kwargs)
    return ours, theirs


def same_blocks(ours: Any, theirs: Any) -> None:
    """The block lists, and everything computed from them, are equal."""
    assert ours.shape == theirs.shape and ours.numel() == theirs.numel()
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE and ours.seq_lengths == theirs.seq_lengths
    for name in LISTS:
        got, want = getattr(ours, name), getattr(theirs, name)
        assert (got is None) == (want is None), name
        if want is not None:
            assert got.dtype == want.dtype, name
            assert torch.equal(got, want), name
    assert ours.sparsity() == theirs.sparsity()
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert str(ours) == str(theirs)


def agree(
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    operands_: tuple[torch.Tensor, ...] | None = None,
    *,
    tolerance: float = 1e-4,
    mask_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Output and lse agree with PyTorch's for both kinds of BlockMask."""
    q, k, v = operands() if operands_ is None else operands_
    ours, theirs = masks(mask_mod, q, k, **(mask_kwargs or {})) if mask_mod else (None, None)
    aux = pytorch.AuxRequest(lse=True)
    want, want_aux = pytorch.flex_attention(q, k, v, score_mod, theirs, return_aux=aux, **kwargs)
    want, want_lse = torch.nan_to_num(want), want_aux.lse
    for block_mask in (ours, theirs) if mask_mod else (None,):
        got, got_aux = al.flex_attention(q, k, v, score_mod, block_mask, return_aux=aux, **kwargs)
        assert got.dtype is want.dtype and got.shape == want.shape
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(got_aux.lse, want_lse, atol=tolerance, rtol=tolerance)
