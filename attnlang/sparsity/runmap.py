"""Run maps: which tiles of (queries, keys) are empty, full or partial, as runs along each row of tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from attnlang.ir import UsageError

__all__ = ["EMPTY", "FULL", "PARTIAL", "LaunchTable", "RunMap", "build_runs"]

EMPTY, PARTIAL, FULL = 0, 1, 2
DENSE_LIMIT = 2**28


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class LaunchTable:
    """What a kernel walks: for each row of tiles, runs of full tiles and runs of partial tiles.

    int32 tensors: ``*_ptr`` [rows + 1] and ``*_runs`` [runs, 2] with half-open tile ranges. Row ``(b, h, i)`` is
    ``(b * heads + h) * nq + i``.
    """

    full_ptr: torch.Tensor
    full_runs: torch.Tensor
    part_ptr: torch.Tensor
    part_runs: torch.Tensor

    def to(self, device: torch.device | str) -> LaunchTable:
        return LaunchTable(*(x.to(device) for x in (self.full_ptr, self.full_runs, self.part_ptr, self.part_runs)))


@dataclass(frozen=True, eq=False)
class RunMap:
    """For each (b, h, row of tiles) the FULL and PARTIAL runs of key tiles, ascending and disjoint; the rest is EMPTY.

    ``tile`` is (bm, bn), ``sizes`` (lq, lk); ``batch`` and ``heads`` are 1 where the mask does not depend on them.
    ``ptr`` int64 [batch * heads * nq + 1] into ``start``, ``end`` (int32, tile units, half open) and ``kind`` (uint8).
    FULL says that every pair *in range* is visible; a kernel still has to guard a tile that ends past the last key.
    """

    tile: tuple[int, int]
    sizes: tuple[int, int]
    batch: int
    heads: int
    ptr: np.ndarray
    start: np.ndarray
    end: np.ndarray
    kind: np.ndarray
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def nq(self) -> int:
        return _cdiv(self.sizes[0], self.tile[0])

    @property
    def nk(self) -> int:
        return _cdiv(self.sizes[1], self.tile[1])

    @property
    def rows(self) -> int:
        return self.batch * self.heads * self.nq

    @property
    def memory_bytes(self) -> int:
        return sum(x.nbytes for x in (self.ptr, self.start, self.end, self.kind))

    def row_of_run(self) -> np.ndarray:
        """Return the row index of every run."""
        return np.repeat(np.arange(self.rows, dtype=np.int64), np.diff(self.ptr))

    def runs(self, row: int) -> list[tuple[int, int, int]]:
        """Return the runs (start, end, kind) of one row."""
        s = slice(int(self.ptr[row]), int(self.ptr[row + 1]))
        return list(zip(self.start[s].tolist(), self.end[s].tolist(), self.kind[s].tolist(), strict=True))

    # --- facts

    def counts(self) -> tuple[int, int, int]:
        """Return the numbers of (empty, partial, full) tiles over the map's batch and heads."""
        width = (self.end - self.start).astype(np.int64)
        full = int(width[self.kind == FULL].sum())
        partial = int(width.sum()) - full
        return self.rows * self.nk - full - partial, partial, full

    def sparsity(self) -> float:
        """Return ``100 * (1 - pairs computed / pairs)``, the number BlockMask.sparsity gives: cut tiles count whole."""
        pairs = self.batch * self.heads * self.sizes[0] * self.sizes[1]
        _, partial, full = self.counts()
        return 100.0 * (1 - (partial + full) * self.tile[0] * self.tile[1] / pairs) if pairs else 0.0

    def row_tiles(self) -> np.ndarray:
        """Return the number of tiles to compute in each row, int64 [rows]: the cost model of a schedule."""
        total = np.zeros(len(self.start) + 1, np.int64)
        np.cumsum(self.end - self.start, out=total[1:])
        return total[self.ptr[1:]] - total[self.ptr[:-1]]

    def rows_maybe_empty(self) -> np.ndarray:
        """Return bool [rows]: rows of tiles in which some query may see no key (False: none does)."""
        has_full = np.zeros(self.rows, bool)
        has_full[self.row_of_run()[self.kind == FULL]] = True
        return ~has_full

    @property
    def always_empty(self) -> bool:
        """Whether no pair at all is visible."""
        return len(self.start) == 0

    # --- other forms

    def transpose(self) -> RunMap:
        """Return the map with queries and keys exchanged: runs of query tiles for each row of key tiles."""
        if "transpose" not in self._memo:
            self._memo["transpose"] = _transpose(self)
        out: RunMap = self._memo["transpose"]
        return out

    def launch_table(self, edge_demote: bool = True) -> LaunchTable:
        """Return the CSR tables for kernels, cached.

        With ``edge_demote`` a full tile that is cut by the last key becomes partial, because only the partial loop of a
        kernel checks ``k < Lk``.
        """
        key = ("launch", edge_demote)
        if key not in self._memo:
            self._memo[key] = _launch_table(self, edge_demote)
        out: LaunchTable = self._memo[key]
        return out

    def tile_kinds(self, b: int = 0, h: int = 0, limit: int = 4096) -> np.ndarray:
        """Return uint8 [nq', nk'] of kinds for a picture, at most ``limit`` cells a side.

        A cell of several tiles is EMPTY or FULL where all its tiles are, and PARTIAL otherwise.
        """
        step_q, step_k = max(1, _cdiv(self.nq, limit)), max(1, _cdiv(self.nk, limit))
        some, most, area = self._cells(b, h, step_q, step_k)
        return np.where(most == area, FULL, np.where(some > 0, PARTIAL, EMPTY)).astype(np.uint8)

    def coverage(self, b: int, h: int, step_q: int, step_k: int) -> np.ndarray:
        """Return the share of tiles that are not EMPTY in each cell of ``step_q`` x ``step_k`` tiles, float64."""
        some, _, area = self._cells(b, h, step_q, step_k)
        return some / area

    def _cells(self, b: int, h: int, step_q: int, step_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers of tiles that are not EMPTY, that are FULL, and of all, in cells of ``step_q`` x ``step_k`` tiles."""
        shape = (_cdiv(self.nq, step_q), _cdiv(self.nk, step_k))
        first = (min(b, self.batch - 1) * self.heads + min(h, self.heads - 1)) * self.nq
        lo, hi = int(self.ptr[first]), int(self.ptr[first + self.nq])
        row = np.repeat(np.arange(self.nq), np.diff(self.ptr[first : first + self.nq + 1])) // step_q
        some = _paint(shape, row, self.start[lo:hi], self.end[lo:hi], step_k)
        full = self.kind[lo:hi] == FULL
        most = _paint(shape, row[full], self.start[lo:hi][full], self.end[lo:hi][full], step_k)
        high = np.minimum(np.arange(1, shape[0] + 1) * step_q, self.nq) - np.arange(shape[0]) * step_q
        wide = np.minimum(np.arange(1, shape[1] + 1) * step_k, self.nk) - np.arange(shape[1]) * step_k
        return some, most, high[:, None] * wide[None, :]

    def to_dense(self) -> torch.Tensor:
        """Return int32 [batch, heads, nq, nk]: 1 where a tile is not empty (small maps only).

        Raises:
            UsageError: the dense map would have more than 2^28 entries.
        """
        return torch.from_numpy((self.dense_kinds() != EMPTY).astype(np.int32))

    def dense_kinds(self) -> np.ndarray:
        """Return uint8 [batch, heads, nq, nk] of tile kinds (small maps only)."""
        if self.rows * self.nk > DENSE_LIMIT:
            raise UsageError(f"a dense map of {self.rows} x {self.nk} tiles is too large; use tile_kinds for a picture")
        step = np.zeros((self.rows, self.nk + 1), np.int8)
        row = self.row_of_run()
        np.add.at(step, (row, self.start), self.kind.astype(np.int8))
        np.subtract.at(step, (row, self.end), self.kind.astype(np.int8))
        kinds = np.cumsum(step, axis=1, dtype=np.int8)[:, :-1].astype(np.uint8)
        return kinds.reshape(self.batch, self.heads, self.nq, self.nk)

    @staticmethod
    def from_tiles(kinds: np.ndarray, tile: tuple[int, int], sizes: tuple[int, int]) -> RunMap:
        """Build a map from kinds [batch, heads, nq, nk] (or [nq, nk]).

        Raises:
            UsageError: the array does not fit ``sizes`` and ``tile``.
        """
        kinds = np.asarray(kinds, np.uint8)
        kinds = kinds.reshape((1,) * (4 - kinds.ndim) + kinds.shape)
        batch, heads, nq, nk = kinds.shape
        want = (_cdiv(sizes[0], tile[0]), _cdiv(sizes[1], tile[1]))
        if (nq, nk) != want:
            raise UsageError(f"lengths {sizes} in tiles of {tile} are {want[0]} x {want[1]} tiles, got {nq} x {nk}")
        flat = np.zeros((batch * heads * nq, nk + 2), np.int8)
        flat[:, 1:-1] = kinds.reshape(batch * heads * nq, nk)
        change = np.diff(flat, axis=1) != 0
        row, at = np.nonzero(change)  # every boundary; a run lies between two of them where the kind is not empty
        kind = flat[row, at + 1]
        keep = np.nonzero(kind != EMPTY)[0]
        ptr = np.searchsorted(row[keep], np.arange(batch * heads * nq + 1))
        start, end = at[keep], at[keep + 1] if len(keep) else at[keep]
        return RunMap(
            tile, sizes, batch, heads, ptr.astype(np.int64), start.astype(np.int32), end.astype(np.int32),
            kind[keep].astype(np.uint8),
        )  # fmt: skip

    @staticmethod
    def from_block_mask(
        kv_num_blocks: torch.Tensor,
        kv_indices: torch.Tensor,
        full_kv_num_blocks: torch.Tensor | None,
        full_kv_indices: torch.Tensor | None,
        block_size: tuple[int, int],
        sizes: tuple[int, int] | None = None,
    ) -> RunMap:
        """Build a map from FlexAttention's block lists (:func:`attnlang.sparsity.exchange.from_block_mask`)."""
        from .exchange import from_block_mask

        return from_block_mask(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, block_size, sizes)

    def to_block_mask_tensors(self) -> dict[str, torch.Tensor]:
        """Return FlexAttention's eight index tensors, built now and cached."""
        from .exchange import to_block_mask_tensors

        if "block_mask" not in self._memo:
            self._memo["block_mask"] = to_block_mask_tensors(self)
        out: dict[str, torch.Tensor] = self._memo["block_mask"]
        return out

    def retile(self, tile: tuple[int, int]) -> RunMap:
        """Return the facts of this map for tiles of another size, finer or coarser, cached."""
        from .retile import retile

        if ("tile", tile) not in self._memo:
            self._memo["tile", tile] = retile(self, tile)
        out: RunMap = self._memo["tile", tile]
        return out

    def __repr__(self) -> str:
        empty, partial, full = self.counts()
        return (
            f"RunMap(sizes={self.sizes}, tile={self.tile}, batch={self.batch}, heads={self.heads}, "
            f"runs={len(self.start)}, empty={empty}, partial={partial}, full={full})"
        )

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        return (self.runs(row) for row in range(self.rows))


def _paint(shape: tuple[int, int], row: np.ndarray, start: np.ndarray, end: np.ndarray, step: int) -> np.ndarray:
    """Number of tiles that runs cover in each cell of a coarser picture."""
    slope = np.zeros((shape[0], shape[1] + 2), np.int64)  # second differences of the covered length up to a cell edge
    for edge, sign in ((start.astype(np.int64), 1), (end.astype(np.int64), -1)):
        cell, rest = edge // step, edge % step
        np.add.at(slope, (row, cell), sign * (step - rest))
        np.add.at(slope, (row, cell + 1), sign * rest)
    return np.cumsum(slope, axis=1)[:, : shape[1]]


def build_runs(
    row: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    kind: np.ndarray,
    rows: int,
    height: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sort disjoint pieces by row and start, join neighbours of one kind, and return (ptr, start, end, kind).

    A piece covers ``height`` rows from ``row`` on (default 1).
    """
    side = max(1, int(end.max()).bit_length()) if len(end) else 1
    shift = 2 * side + 2
    if shift + max(1, rows).bit_length() <= 62:  # one sortable number a piece: row, start, end, kind
        packed = (row.astype(np.int64) << shift) | (start.astype(np.int64) << (side + 2)) | (end << 2) | kind
        if height is not None:
            packed = np.repeat(packed, height)
            packed += _within(height) << shift
        packed.sort()
        mask = (1 << side) - 1
        row, tail = packed >> shift, packed & ((1 << shift) - 1)
        # neighbours join if this end, and the kind, are the next start and its kind
        ahead = (tail[:-1] >> 2 & mask) == tail[1:] >> (side + 2)
        first = np.ones(len(packed), bool)
        first[1:] = (row[1:] != row[:-1]) | ((tail[1:] ^ tail[:-1]) & 3 != 0) | (ahead == False)  # noqa: E712
        at = np.nonzero(first)[0]
        last = np.append(at[1:], len(row)) - 1 if len(at) else at
        start, end, kind = tail[at] >> (side + 2), tail[last] >> 2 & mask, tail[at] & 3
    else:
        if height is not None:
            row = np.repeat(row, height) + _within(height)
            start, end, kind = (np.repeat(x, height) for x in (start, end, kind))
        order = np.lexsort((start, row))
        row, start, end, kind = row[order], start[order], end[order], kind[order]
        first = np.ones(len(row), bool)
        first[1:] = (row[1:] != row[:-1]) | (kind[1:] != kind[:-1]) | (start[1:] != end[:-1])
        at = np.nonzero(first)[0]
        last = np.append(at[1:], len(row)) - 1 if len(at) else at
        start, end, kind = start[at], end[last], kind[at]
    ptr = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(row[at], minlength=rows), out=ptr[1:])
    return ptr, start.astype(np.int32), end.astype(np.int32), kind.astype(np.uint8)


def _transpose(runs: RunMap) -> RunMap:
    """Runs along columns, by the same sort: a run is cut where the set of rows that have it changes."""
    nq, nk, slots = runs.nq, runs.nk, runs.batch * runs.heads
    row = runs.row_of_run()
    slot, i = (row // nq, row % nq) if nq else (row, row)
    # runs with the same (slot, start, end, kind) in consecutive rows form rectangles; cut and expand those
    order = np.lexsort((i, runs.kind, runs.end, runs.start, slot))
    s, a, e, c, r = slot[order], runs.start[order], runs.end[order], runs.kind[order], i[order]
    new = np.ones(len(r), bool)
    new[1:] = (s[1:] != s[:-1]) | (a[1:] != a[:-1]) | (e[1:] != e[:-1]) | (c[1:] != c[:-1]) | (r[1:] != r[:-1] + 1)
    at = np.nonzero(new)[0]
    last = np.append(at[1:], len(r)) - 1 if len(at) else at
    height = (e[at] - a[at]).astype(np.int64)
    ptr, start, end, kind = build_runs(s[at] * nk + a[at], r[at], r[last] + 1, c[at], slots * nk, height)
    sizes, tile = (runs.sizes[1], runs.sizes[0]), (runs.tile[1], runs.tile[0])
    return RunMap(tile, sizes, runs.batch, runs.heads, ptr, start, end, kind)


def _within(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... counts[0]-1, 0, 1, ... counts[1]-1, ..."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64) - np.repeat(ends - counts, counts)


def _launch_table(runs: RunMap, edge_demote: bool) -> LaunchTable:
    row, start, end, kind = runs.row_of_run(), runs.start, runs.end, runs.kind
    if edge_demote and runs.sizes[1] % runs.tile[1]:
        cut = (kind == FULL) & (end == runs.nk)
        extra = np.nonzero(cut)[0]
        end = np.where(cut, end - 1, end)
        row, start = np.append(row, row[extra]), np.append(start, np.full(len(extra), runs.nk - 1, np.int32))
        end = np.append(end, np.full(len(extra), runs.nk, np.int32))
        kind = np.append(kind, np.full(len(extra), PARTIAL, np.uint8))
        keep = start < end
        row, start, end, kind = row[keep], start[keep], end[keep], kind[keep]
    tables = []
    for which in (FULL, PARTIAL):
        pick = kind == which
        ptr, a, e, _ = build_runs(row[pick], start[pick], end[pick], kind[pick], runs.rows)
        tables += [torch.from_numpy(ptr.astype(np.int32)), torch.from_numpy(np.stack([a, e], 1))]
    return LaunchTable(*tables)
