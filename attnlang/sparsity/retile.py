"""Run maps at another tile size, and set operations on maps: one sweep over the boundaries of runs."""

from __future__ import annotations

import numpy as np

from .runmap import EMPTY, FULL, PARTIAL, RunMap, _within, build_runs

__all__ = ["retile"]


def _sweep(
    row: np.ndarray, start: np.ndarray, end: np.ndarray, full: np.ndarray, need: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Kinds of the stretches that overlapping pieces make: FULL where ``need[row]`` full pieces lie on each other.

    Pieces are half-open ranges with ``full`` 1 or 0. Returns (row, start, end, kind) without empty stretches.
    """
    rows = np.concatenate([row, row])
    at = np.concatenate([start, end])
    some = np.concatenate([np.ones_like(full), -np.ones_like(full)])
    covered = np.concatenate([full, -full])
    order = np.lexsort((at, rows))
    rows, at = rows[order], at[order]
    some, covered = np.cumsum(some[order]), np.cumsum(covered[order])
    kind = np.where(covered == need[rows], FULL, np.where(some > 0, PARTIAL, EMPTY))
    nxt = np.append(at[1:], 0)
    keep = np.nonzero((kind != EMPTY) & (some > 0) & (nxt > at))[0]  # counts return to 0 at the end of a row
    return rows[keep], at[keep], nxt[keep], kind[keep]


def retile(runs: RunMap, tile: tuple[int, int]) -> RunMap:
    """Return the facts of ``runs`` for tiles of another size.

    A new tile is EMPTY where every old tile it touches is, FULL where every one is, and PARTIAL otherwise. Exact where
    the new sides divide the old ones; otherwise sound, because a PARTIAL tile is masked pair by pair.
    """
    if tile == runs.tile:
        return runs
    (bm, bn), (lq, lk), (em, en) = runs.tile, runs.sizes, tile
    old_q, new_q, new_k = runs.nq, -(-lq // em), -(-lk // en)
    row = runs.row_of_run()
    slot, i = (row // old_q, row % old_q) if old_q else (row, row)
    # rows of new tiles that each old row touches
    first, last = i * bm // em, (np.minimum((i + 1) * bm, lq) - 1) // em
    height = last - first + 1
    pick = np.repeat(np.arange(len(row)), height)
    new_row = slot[pick] * new_q + first[pick] + _within(height)
    low, high = runs.start[pick].astype(np.int64) * bn, np.minimum(runs.end[pick].astype(np.int64) * bn, lk)
    full = (runs.kind[pick] == FULL).astype(np.int64)
    # a piece touches the tiles [low // en, cdiv(high, en)); a full piece fills [cdiv(low, en), high // en) of them
    outer = low // en, -(-high // en)
    inner_low, inner_high = -(-low // en), np.where(high == lk, new_k, high // en)
    ok = np.nonzero((full == 1) & (inner_low < inner_high))[0]
    pieces = (
        np.concatenate([new_row, new_row[ok]]),
        np.concatenate([outer[0], inner_low[ok]]),
        np.concatenate([outer[1], inner_high[ok]]),
        np.concatenate([np.zeros_like(full), np.ones(len(ok), np.int64)]),
    )
    edges = np.arange(new_q, dtype=np.int64) * em
    touched = (np.minimum(edges + em, lq) - 1) // bm - edges // bm + 1
    swept = _sweep(*pieces, np.tile(touched, runs.batch * runs.heads))
    ptr, start, end, kind = build_runs(*swept, runs.batch * runs.heads * new_q)
    return RunMap(tile, runs.sizes, runs.batch, runs.heads, ptr, start, end, kind)
