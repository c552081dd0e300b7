"""Exact kinds of blocks, as FlexAttention's block lists have them, from a run map that may be conservative."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from attnlang.ir import Environment, evaluate
from attnlang.runtime import eager
from attnlang.sparsity import EMPTY, FULL, PARTIAL, RunMap
from attnlang.sparsity.exchange import as_listed
from attnlang.sparsity.runmap import build_runs

from .api import Attention

__all__ = ["exact_runs"]

Tensor = torch.Tensor

SAMPLES = 16
"""Positions in each direction at which a block is tried before it is evaluated in full."""
TILES = 1 << 17
"""Undecided blocks looked at together: bounds the memory beyond the result."""


def exact_runs(
    attention: Attention, values: Mapping[str, Any], sizes: tuple[int, int, int, int], tile: tuple[int, int]
) -> RunMap:
    """Kinds of blocks as PyTorch counts them, for lengths (B, H, Lq, Lk).

    The analysis may leave a tile PARTIAL that is not. A few points of such a tile settle most of them, because one True
    and one False prove it PARTIAL; only what is left is evaluated. A tile cut by the end of a sequence is never FULL.
    """
    batch, heads, lq, lk = sizes
    runs = attention.run_map(batch, heads, lq, lk, tile=tile, **values)
    points = _Points(attention, values, sizes, tile)
    keep = np.nonzero(runs.kind == FULL)[0]
    pieces = [(runs.row_of_run()[keep], runs.start[keep], runs.end[keep], runs.kind[keep])]
    for row, column in _partial(runs):
        kind = _settle(points, runs, row, column)
        some = np.nonzero(kind != EMPTY)[0]
        ptr, start, end, kind = build_runs(row[some], column[some], column[some] + 1, kind[some], runs.rows)
        pieces.append((np.repeat(np.arange(runs.rows), np.diff(ptr)), start, end, kind))
    row, start, end, kind = (np.concatenate(x) for x in zip(*pieces, strict=True))
    built = build_runs(row, start.astype(np.int64), end.astype(np.int64), kind.astype(np.int64), runs.rows)
    return as_listed(RunMap(runs.tile, runs.sizes, runs.batch, runs.heads, *built))


def _partial(runs: RunMap) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(row, key tile) of the partial tiles, about TILES at a time."""
    pick = np.nonzero(runs.kind == PARTIAL)[0]
    width = runs.end[pick].astype(np.int64) - runs.start[pick]
    total = np.cumsum(width)
    row = runs.row_of_run()[pick]
    at = 0
    while at < len(pick):
        before = int(total[at] - width[at])
        stop = max(at + 1, int(np.searchsorted(total, before + TILES, side="right")))
        w, first = width[at:stop], total[at:stop] - width[at:stop]
        within = np.arange(before, int(total[stop - 1])) - np.repeat(first, w)
        yield np.repeat(row[at:stop], w), np.repeat(runs.start[pick[at:stop]].astype(np.int64), w) + within
        at = stop


def _settle(points: _Points, runs: RunMap, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Exact kinds of tiles that the analysis left partial."""
    slot, i = row // runs.nq, row % runs.nq
    tiles = np.stack([slot // runs.heads, slot % runs.heads, i, column], 1)
    (bm, bn), (lq, lk) = runs.tile, runs.sizes
    cut = ((i + 1) * bm > lq) | ((column + 1) * bn > lk)
    kind = np.full(len(row), PARTIAL, np.int64)
    some, every = points.some_and_every(tiles, SAMPLES)
    open_ = np.nonzero(~(some & (~every | cut)))[0]
    some, every = points.some_and_every(tiles[open_], max(runs.tile))
    kind[open_] = np.where(every, FULL, np.where(some, PARTIAL, EMPTY))
    return kind


class _Points:
    """Evaluates a mask at points of tiles."""

    def __init__(
        self,
        attention: Attention,
        values: Mapping[str, Any],
        sizes: tuple[int, int, int, int],
        tile: tuple[int, int],
    ) -> None:
        batch, heads, lq, lk = sizes
        named = {"B": batch, "H": heads, "Hkv": heads, "Lq": lq, "Lk": lk}
        all_sizes, params, tensors = attention._binder.bind_sizes(named, values, attention._defaults)
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
        self._mask, self._tile, self._ends = attention.program.mask, tile, (lq - 1, lk - 1)
        self._env = Environment({}, all_sizes, params, tensors, {}, torch.float32, device)

    def some_and_every(self, tiles: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Whether the mask is True at some and at every point of ``tiles`` [n, 4] (b, h, row, col).

        At most ``side`` positions are tried in each direction, all of them where a tile has no more.
        """
        spans = (min(n, end + 1) for n, end in zip(self._tile, self._ends, strict=True))
        q, k = (np.unique(np.linspace(0, n - 1, min(side, n)).round().astype(np.int64)) for n in spans)
        step = max(1, eager.BUDGET // (len(q) * len(k)))
        parts = [self._evaluate(tiles[i : i + step], q, k) for i in range(0, len(tiles), step)]
        if not parts:
            return np.zeros(0, bool), np.zeros(0, bool)
        return np.concatenate([some for some, _ in parts]), np.concatenate([every for _, every in parts])

    def _evaluate(self, tiles: np.ndarray, q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        device = self._env.device
        b, h, row, col = (torch.from_numpy(c).to(device).view(-1, 1, 1) for c in tiles.T)
        at_q = row * self._tile[0] + torch.from_numpy(q).to(device).view(1, -1, 1)
        at_k = col * self._tile[1] + torch.from_numpy(k).to(device).view(1, 1, -1)
        # points past the end fall on the last position, which is in the tile as well
        index = {"b": b, "h": h, "q": at_q.clamp(max=self._ends[0]), "k": at_k.clamp(max=self._ends[1])}
        seen = evaluate(self._mask, replace(self._env, indices=index)).expand(len(tiles), len(q), len(k))
        return seen.any(2).any(1).numpy(force=True), seen.all(2).all(1).numpy(force=True)
