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
    q = level.q[:, None, None] + (np.arange(1 << cq)[None, :, None] << eq[:, None, None])
    k = level.k[:, None, None] + (np.arange(1 << ck)[None, None, :] << ek[:, None, None])
    keep = np.nonzero(((q < shape[0]) & (k < shape[1])).reshape(-1))[0]
    every = len(keep) == grid[0] * grid[1] * grid[2]
    fields = (level.slot[:, None, None], q, k, eq[:, None, None], ek[:, None, None])
    flat = (np.broadcast_to(x, grid).reshape(-1) for x in fields)
    return _Level(*(x if every else x[keep] for x in flat))


def descend(classifier: Classifier, tile: tuple[int, int], sizes: tuple[int, int], batch: int, heads: int) -> RunMap:
    """Return the run map of the mask; ``batch`` and ``heads`` are 1 where the mask does not read them."""
    bm, bn = tile
    lq, lk = sizes
    nq, nk = -(-lq // bm), -(-lk // bn)
    slots = batch * heads
    none = np.zeros(1, np.int64)  # broadcasts where the mask does not read b or h
    found: list[tuple[np.ndarray, ...]] = []
    pending: list[_Level] = []
    if slots and nq and nk:
        slot = np.arange(slots, dtype=np.int64)
        top = [np.full(slots, n.bit_length() if n & (n - 1) else n.bit_length() - 1, np.int64) for n in (nq, nk)]
        pending.append(_Level(slot, np.zeros_like(slot), np.zeros_like(slot), *top))
    while pending:
        level = pending.pop()
        if len(level) > CHUNK:
            pending += [level.take(np.arange(i, min(i + CHUNK, len(level)))) for i in range(0, len(level), CHUNK)]
            continue
        q1, k1 = np.minimum(level.q + (1 << level.eq), nq), np.minimum(level.k + (1 << level.ek), nk)
        boxes = Boxes(
            level.slot // heads if batch > 1 else none,
            level.slot % heads if heads > 1 else none,
            Interval(level.q * bm, np.minimum(q1 * bm, lq) - 1),
            Interval(level.k * bn, np.minimum(k1 * bn, lk) - 1),
        )
        values = classifier.values(boxes)
        true, false = classifier.decide(values, len(level))
        undecided = true & false
        wish = np.where(undecided, classifier.wishes(values, len(level)), 0)
        wish = np.where(level.eq > 0, wish, wish & ~4)
        wish = np.where(level.ek > 0, wish, wish & ~8)
        done = np.nonzero(true & (wish == 0))[0]
        if len(done):
            kind = np.where(false[done], PARTIAL, FULL)
            found.append((level.slot[done], level.q[done], q1[done], level.k[done], k1[done], kind))
        rest = np.nonzero(wish)[0]
        if len(rest):
            pending.append(_cut(level.take(rest), wish[rest], (nq, nk)))
    return _collect(found, tile, sizes, batch, heads)


def _collect(
    found: list[tuple[np.ndarray, ...]], tile: tuple[int, int], sizes: tuple[int, int], batch: int, heads: int
) -> RunMap:
    """Turn rectangles of tiles into runs of rows."""
    nq = -(-sizes[0] // tile[0])
    none = np.zeros(0, np.int64)
    slot, q0, q1, k0, k1, kind = (np.concatenate(x) for x in zip(*found, strict=True)) if found else (none,) * 6
    ptr, start, end, kinds = build_runs(slot * nq + q0, k0, k1, kind, batch * heads * nq, q1 - q0)
    return RunMap(tile, sizes, batch, heads, ptr, start, end, kinds)
