"""Run maps from and to the tensors of PyTorch's ``BlockMask``."""

from __future__ import annotations

import numpy as np
import torch

from attnlang.ir import UsageError

from .runmap import FULL, PARTIAL, RunMap, build_runs

__all__ = ["from_block_mask", "to_block_mask_tensors"]

Tensor = torch.Tensor


def _entries(num: Tensor, indices: Tensor, nk: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the listed blocks of an ordered block list."""
    counts = num.detach().cpu().reshape(-1).numpy().astype(np.int64)
    table = indices.detach().cpu().reshape(len(counts), indices.shape[-1]).numpy()
    if len(counts) and (counts.min() < 0 or counts.max() > table.shape[1]):
        raise UsageError(f"{what}_num_blocks must lie between 0 and the {table.shape[1]} columns of {what}_indices")
    row, at = np.nonzero(np.arange(table.shape[1])[None, :] < counts[:, None])
    column = table[row, at].astype(np.int64)
    if len(column) and (column.min() < 0 or column.max() >= nk):
        raise UsageError(f"{what}_indices lists block {int(column.max())}, but there are only {nk} key blocks")
    return row.astype(np.int64), column


def from_block_mask(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    full_kv_num_blocks: Tensor | None,
    full_kv_indices: Tensor | None,
    block_size: tuple[int, int],
    sizes: tuple[int, int] | None = None,
) -> RunMap:
    """Build a run map from ordered block lists.

    ``kv_num_blocks`` int [B, H, nq], ``kv_indices`` int [B, H, nq, columns] list the partial blocks, the ``full_`` pair
    (or None) the full ones. ``sizes`` (lq, lk) defaults to whole blocks. A block listed as both is partial.

    Raises:
        UsageError: shapes do not fit, or an index is out of range.
    """
    if kv_num_blocks.dim() != 3 or kv_indices.dim() != 4 or kv_indices.shape[:3] != kv_num_blocks.shape:
        raise UsageError(
            "expected kv_num_blocks [B, H, rows] and kv_indices [B, H, rows, columns], got "
            f"{list(kv_num_blocks.shape)} and {list(kv_indices.shape)}"
        )
    batch, heads, nq = kv_num_blocks.shape
    bm, bn = block_size
    lq, lk = sizes if sizes is not None else (nq * bm, kv_indices.shape[3] * bn)
    if -(-lq // bm) != nq:
        raise UsageError(f"{nq} rows of blocks of {bm} do not cover query length {lq}")
    nk = -(-lk // bn)
    row, column = _entries(kv_num_blocks, kv_indices, nk, "kv")
    kind = np.full(len(row), PARTIAL, np.int64)
    if full_kv_num_blocks is not None and full_kv_indices is not None:
        more = _entries(full_kv_num_blocks, full_kv_indices, nk, "full_kv")
        row, column = np.concatenate([row, more[0]]), np.concatenate([column, more[1]])
        kind = np.concatenate([kind, np.full(len(more[0]), FULL, np.int64)])
    # one entry a block; PARTIAL < FULL, so a block listed twice keeps the careful kind
    key = np.unique((row * max(nk, 1) + column) * 4 + kind)
    cell, kind = key >> 2, key & 3
    first = np.ones(len(cell), bool)
    first[1:] = cell[1:] != cell[:-1]
    cell, kind = cell[first], kind[first]
    ptr, start, end, kinds = build_runs(
        cell // max(nk, 1), cell % max(nk, 1), cell % max(nk, 1) + 1, kind, batch * heads * nq
    )
    return RunMap((bm, bn), (lq, lk), batch, heads, ptr, start, end, kinds)


def _ordered(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """Numbers of chosen blocks and their indices first, the others after them, as PyTorch orders them."""
    order = np.argsort(~chosen, axis=-1, kind="stable").astype(np.int32)
    return torch.from_numpy(chosen.sum(-1).astype(np.int32)), torch.from_numpy(order)


def to_block_mask_tensors(runs: RunMap) -> dict[str, Tensor]:
    """Return every index tensor of a ``BlockMask``, int32, by PyTorch's names.

    As PyTorch does, a block cut by the end of the queries or of the keys counts as partial. Memory is that of
    FlexAttention's lists, four numbers for every block, so call it only when someone reads them.
    """
    kinds = runs.dense_kinds()
    for axis, (length, side) in enumerate(zip(runs.sizes, runs.tile, strict=True)):
        if length % side:
            edge = kinds[:, :, -1, :] if axis == 0 else kinds[:, :, :, -1]
            edge[edge == FULL] = PARTIAL
    out: dict[str, Tensor] = {}
    for prefix, kind in (("", PARTIAL), ("full_", FULL)):
        chosen = kinds == kind
        out[f"{prefix}kv_num_blocks"], out[f"{prefix}kv_indices"] = _ordered(chosen)
        out[f"{prefix}q_num_blocks"], out[f"{prefix}q_indices"] = _ordered(np.swapaxes(chosen, 2, 3))
    return out
