"""From a classifier to a run map: start with the whole problem and cut only what is undecided.

A box is a rectangle of tiles whose sides are powers of two. Each round classifies all boxes of a level at once, keeps
the decided ones as rectangles and cuts the others into 4 along each axis that can still tell something. The number of
boxes follows the length of the mask's boundary; a saturated clause (``k % 4 == 0`` on tiles of 128) is not cut at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnlang.passes.intervals import Interval

from .classify import Boxes, Classifier
from .runmap import FULL, PARTIAL, RunMap, build_runs

__all__ = ["descend"]

CUT = 2  # a cut makes 2^CUT parts along an axis
FOLD = 1 << 21  # rows of pieces kept before they are joined
CHUNK = 1 << 15  # boxes classified at once: bounds the memory of a level


@dataclass(frozen=True)
class _Level:
    """Undecided boxes: slot (b, h), first tile and log2 of the side along each axis; int32 arrays of one length."""

    slot: np.ndarray
    q: np.ndarray
    k: np.ndarray
    eq: np.ndarray
    ek: np.ndarray

    def take(self, pick: np.ndarray) -> _Level:
        return _Level(self.slot[pick], self.q[pick], self.k[pick], self.eq[pick], self.ek[pick])

    def __len__(self) -> int:
        return len(self.slot)


def _cut(level: _Level, wish: np.ndarray, shape: tuple[int, int]) -> _Level:
    """Cut boxes along the axes wished for, dropping parts beyond the problem."""
    cut_q = np.where(wish & 4, np.minimum(level.eq, CUT), 0)
    cut_k = np.where(wish & 8, np.minimum(level.ek, CUT), 0)
    parts = []
    for cq in range(CUT + 1):
        for ck in range(CUT + 1):
            pick = np.nonzero((cut_q == cq) & (cut_k == ck))[0]
            if len(pick):
                parts.append(_split(level.take(pick), cq, ck, shape))
    return parts[0] if len(parts) == 1 else _Level(*(np.concatenate(x) for x in zip(*map(_fields, parts), strict=True)))


def _fields(level: _Level) -> tuple[np.ndarray, ...]:
    return level.slot, level.q, level.k, level.eq, level.ek


def _split(level: _Level, cq: int, ck: int, shape: tuple[int, int]) -> _Level:
    """Cut every box into 2^cq x 2^ck parts."""
    grid = (len(level), 1 << cq, 1 << ck)
    eq, ek = level.eq - cq, level.ek - ck
    q = level.q[:, None, None] + (np.arange(1 << cq, dtype=eq.dtype)[None, :, None] << eq[:, None, None])
    k = level.k[:, None, None] + (np.arange(1 << ck, dtype=ek.dtype)[None, None, :] << ek[:, None, None])
    keep = np.nonzero(((q < shape[0]) & (k < shape[1])).reshape(-1))[0]
    every = len(keep) == grid[0] * grid[1] * grid[2]
    fields = (level.slot[:, None, None], q, k, eq[:, None, None], ek[:, None, None])
    flat = (np.broadcast_to(x, grid).reshape(-1) for x in fields)
    return _Level(*(x if every else x[keep] for x in flat))


class _Pieces:
    """Decided rectangles of tiles, folded into runs whenever there are many, so that memory follows the result."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.weight = self.limit = FOLD

    def add(self, row: np.ndarray, height: np.ndarray, start: np.ndarray, end: np.ndarray, kind: np.ndarray) -> None:
        self.parts.append((row, height, start, end, kind))
        self.weight -= int(height.sum())
        if self.weight < 0:
            ptr, start, end, kind = self.runs()
            row = np.repeat(np.arange(self.rows), np.diff(ptr))
            self.parts = [(row, np.ones_like(row), start, end, kind)]
            self.weight = self.limit = max(self.limit, len(row))

    def runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        none = np.zeros(0, np.int64)
        row, height, start, end, kind = (
            (np.concatenate(x) for x in zip(*self.parts, strict=True)) if self.parts else (none,) * 5
        )
        return build_runs(row, start, end, kind, self.rows, height)


def _boxes(level: _Level, tile: tuple[int, int], sizes: tuple[int, int], batch: int, heads: int) -> Boxes:
    """The pairs in each box; b and h are one zero, which broadcasts, where the mask does not read them."""
    none = np.zeros(1, level.q.dtype)
    q = Interval(level.q * tile[0], np.minimum((level.q + (1 << level.eq)) * tile[0], sizes[0]) - 1)
    k = Interval(level.k * tile[1], np.minimum((level.k + (1 << level.ek)) * tile[1], sizes[1]) - 1)
    return Boxes(level.slot // heads if batch > 1 else none, level.slot % heads if heads > 1 else none, q, k)


def descend(classifier: Classifier, tile: tuple[int, int], sizes: tuple[int, int], batch: int, heads: int) -> RunMap:
    """Return the run map of the mask; ``batch`` and ``heads`` are 1 where the mask does not read them."""
    side = (min(tile[0], max(1, sizes[0])), min(tile[1], max(1, sizes[1])))  # no number beyond the lengths
    nq, nk = -(-sizes[0] // side[0]), -(-sizes[1] // side[1])
    slots = batch * heads
    dtype = np.int32 if max(*sizes, slots) < 2**28 else np.int64
    found = _Pieces(slots * nq)
    pending: list[_Level] = []
    if slots and nq and nk:
        slot = np.arange(slots, dtype=dtype)
        top = [np.full(slots, (n - 1).bit_length(), dtype) for n in (nq, nk)]
        pending.append(_Level(slot, np.zeros_like(slot), np.zeros_like(slot), *top))
    while pending:
        level = pending.pop()
        if len(level) > CHUNK:
            pending += [level.take(np.arange(i, min(i + CHUNK, len(level)))) for i in range(0, len(level), CHUNK)]
            continue
        values = classifier.values(_boxes(level, side, sizes, batch, heads))
        true, false = classifier.decide(values, len(level))
        wish = np.where(true & false, classifier.wishes(values, len(level)), 0)
        wish = np.where(level.eq > 0, wish, wish & ~4)
        wish = np.where(level.ek > 0, wish, wish & ~8)
        done = np.nonzero(true & (wish == 0))[0]
        if len(done):
            at = level.take(done)
            height = np.minimum(1 << at.eq, nq - at.q)
            end = np.minimum(at.k + (1 << at.ek), nk)
            found.add(at.slot.astype(np.int64) * nq + at.q, height, at.k, end, np.where(false[done], PARTIAL, FULL))
        rest = np.nonzero(wish)[0]
        if len(rest):
            pending.append(_cut(level.take(rest), wish[rest], (nq, nk)))
    return RunMap(tile, sizes, batch, heads, *found.runs())
