"""Run maps from and to the tensors of PyTorch's ``BlockMask``."""

from __future__ import annotations

import numpy as np
import torch

from attnlang.ir import UsageError

from .runmap import FULL, PARTIAL, RunMap, build_runs

__all__ = ["as_listed", "block_lists", "from_block_mask", "to_block_mask_tensors"]

Tensor = torch.Tensor
AT_ONCE = 1 << 20  # tiles whose places in the lists are worked out together


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


def as_listed(runs: RunMap) -> RunMap:
    """Return ``runs`` as PyTorch counts blocks: one cut by the end of the queries or of the keys is never full."""
    cut_q, cut_k = (length % side != 0 for length, side in zip(runs.sizes, runs.tile, strict=True))
    full = runs.kind == FULL
    if not (full.any() and (cut_q or cut_k)):
        return runs
    row = runs.row_of_run()
    kind = np.where(full & cut_q & (row % runs.nq == runs.nq - 1), PARTIAL, runs.kind).astype(np.int64)
    last = np.nonzero((kind == FULL) & cut_k & (runs.end == runs.nk))[0]
    end = runs.end.astype(np.int64)
    end[last] -= 1
    edge = np.full(len(last), runs.nk - 1)
    row, start = np.concatenate([row, row[last]]), np.concatenate([runs.start.astype(np.int64), edge])
    end, kind = np.concatenate([end, edge + 1]), np.concatenate([kind, np.full(len(last), PARTIAL)])
    keep = np.nonzero(start < end)[0]
    built = build_runs(row[keep], start[keep], end[keep], kind[keep], runs.rows)
    return RunMap(runs.tile, runs.sizes, runs.batch, runs.heads, *built)


def _ordered(chosen: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write for each row the chosen columns, then the others, both ascending, to ``out``; return how many are chosen.

    Works on stretches of equal columns: a row of the result is a few ascending ranges, one behind the other.
    """
    rows, n = chosen.shape
    edge = np.ones((rows, n), bool)
    np.not_equal(chosen[:, 1:], chosen[:, :-1], out=edge[:, 1:])
    at = np.flatnonzero(edge)
    row, start = at // n, at % n
    length = np.diff(at, append=rows * n)
    order = np.argsort(2 * row + ~chosen.reshape(-1)[at], kind="stable")
    row, start, length = row[order], start[order], length[order]
    jump = start.copy()
    jump[1:] -= np.where(row[1:] == row[:-1], start[:-1] + length[:-1] - 1, 0)
    out.fill(1)
    out.reshape(-1)[np.cumsum(length) - length] = jump
    np.cumsum(out, axis=1, out=out)
    return np.count_nonzero(chosen, axis=1)


def _chosen(row: np.ndarray, start: np.ndarray, end: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """bool [rows, columns]: what disjoint runs cover."""
    step = np.zeros((shape[0], shape[1] + 1), np.int8)
    flat, width = step.reshape(-1), shape[1] + 1
    flat[row * width + start] += 1
    flat[row * width + end] -= 1
    return np.cumsum(step, axis=1, dtype=np.int8)[:, :-1].view(bool)


def block_lists(runs: RunMap, kinds: tuple[int, ...], transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Return the number of tiles of the given kinds in each row, int32 [batch, heads, rows], and the ordered indices of
    tiles, int32 [batch, heads, rows, columns]; rows are those of key tiles if ``transposed``.

    Needs the result and a fixed amount of memory beyond it.
    """
    outer, inner = (runs.nk, runs.nq) if transposed else (runs.nq, runs.nk)
    slots = runs.batch * runs.heads
    num, indices = np.zeros((slots, outer), np.int32), np.empty((slots, outer, inner), np.int32)
    step = max(1, AT_ONCE // max(1, inner))
    for slot in range(slots if inner else 0):
        for low in range(0, outer, step):
            high = min(low + step, outer)
            first, last = (
                (slot * runs.nq, (slot + 1) * runs.nq) if transposed else (slot * outer + low, slot * outer + high)
            )
            part = slice(int(runs.ptr[first]), int(runs.ptr[last]))
            row = np.repeat(np.arange(last - first), np.diff(runs.ptr[first : last + 1]))
            start, end = runs.start[part], runs.end[part]
            keep = np.isin(runs.kind[part], kinds)
            if transposed:
                keep &= (start < high) & (end > low)
                start, end = np.maximum(start[keep] - low, 0), np.minimum(end[keep], high) - low
                chosen = np.ascontiguousarray(_chosen(row[keep], start, end, (inner, high - low)).T)
            else:
                chosen = _chosen(row[keep], start[keep], end[keep], (high - low, inner))
            num[slot, low:high] = _ordered(chosen, indices[slot, low:high])
    shape = (runs.batch, runs.heads, outer)
    return torch.from_numpy(num.reshape(shape)), torch.from_numpy(indices.reshape(*shape, inner))


def to_block_mask_tensors(runs: RunMap) -> dict[str, Tensor]:
    """Return every index tensor of a ``BlockMask``, int32, by PyTorch's names.

    As PyTorch does, a block cut by the end of the queries or of the keys counts as partial. Memory is that of
    FlexAttention's lists, four numbers for every block, so call it only when someone reads them.
    """
    listed = as_listed(runs)
    out: dict[str, Tensor] = {}
    for prefix, kind in (("", PARTIAL), ("full_", FULL)):
        out[f"{prefix}kv_num_blocks"], out[f"{prefix}kv_indices"] = block_lists(listed, (kind,))
        out[f"{prefix}q_num_blocks"], out[f"{prefix}q_indices"] = block_lists(listed, (kind,), transposed=True)
    return out
