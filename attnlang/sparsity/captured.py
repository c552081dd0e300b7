"""Captured tensors: O(n) summaries that answer "which values lie in this range of indices?" for many ranges at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from attnlang.ir import BOOL, FLOAT, INT, Type
from attnlang.passes.float_intervals import FloatRange
from attnlang.passes.intervals import INF, Interval, Truth

from .cells import SIDE

__all__ = ["Captured", "CapturedCells"]

BLOCK = 64

Ranges = Sequence[Interval]


def _numbers(host: torch.Tensor, type_: Type) -> np.ndarray:
    if type_ is BOOL:
        host = host.to(torch.bool)
    elif type_ is INT:
        host = host.to(torch.int64) if host.dtype not in (torch.int32, torch.int64) else host
    elif host.dtype is not torch.float64:
        host = host.to(torch.float32)
    return np.ascontiguousarray(host.numpy())


class _Line:
    """Minimum (or maximum) over any range of the last axis of ``values`` [rows, n].

    Running minima from both ends of every block of 64 and a sparse table over blocks: linear memory, exact except for a
    range strictly inside one block, where the bound is that of the two running minima.
    """

    def __init__(self, values: np.ndarray, fn: np.ufunc) -> None:
        rows, n = values.shape
        self.fn = fn
        self.blocks = -(-n // BLOCK)
        pad = self.blocks * BLOCK - n
        padded = np.pad(values, ((0, 0), (0, pad)), mode="edge").reshape(rows, self.blocks, BLOCK)
        self.width = self.blocks * BLOCK
        self.forward = fn.accumulate(padded, axis=2).reshape(-1)
        self.backward = np.ascontiguousarray(fn.accumulate(padded[:, :, ::-1], axis=2)[:, :, ::-1]).reshape(-1)
        level = fn.reduce(padded, axis=2)
        self.table = [level]
        while 2 ** len(self.table) <= self.blocks:
            half = 2 ** (len(self.table) - 1)
            level = fn(level[:, : level.shape[1] - half], level[:, half:])
            self.table.append(np.ascontiguousarray(level))

    def query(self, row: Any, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
        first, last = lo // BLOCK, hi // BLOCK
        head, tail = self.backward[row * self.width + lo], self.forward[row * self.width + hi]
        opposite = np.maximum if self.fn is np.minimum else np.minimum
        out = np.where(first == last, opposite(head, tail), self.fn(head, tail))
        between = last - first - 1
        for level, table in enumerate(self.table):
            pick = np.nonzero((between >= 2**level) & (between < 2 ** (level + 1)))[0]
            if len(pick):
                at = row[pick] if np.ndim(row) else row
                left, right = table[at, first[pick] + 1], table[at, last[pick] - 2**level]
                out[pick] = self.fn(out[pick], self.fn(left, right))
        return out


class Captured:
    """A captured tensor on the host with the summaries its queries need, each built on first use.

    Indices outside a dimension are clamped into it, as the IR defines; a tensor without elements reads as zero.
    """

    exact = True
    """Whether there is one number for each element."""

    def __init__(self, tensor: torch.Tensor, type_: Type) -> None:
        self.type = type_
        self.values = _numbers(tensor, type_)
        if self.values.size == 0:
            self.values = np.zeros((1,) * self.values.ndim, self.values.dtype)
        self.shape = self.values.shape
        self._lines: dict[tuple[Any, ...], Any] = {}
        self._cells: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

    @cached_property
    def nan(self) -> bool:
        return self.type is FLOAT and bool(np.isnan(self.values).any())

    @cached_property
    def _sorted_values(self) -> tuple[np.ndarray, np.ndarray]:
        """Values for minima and for maxima: NaN never hides a number."""
        if not self.nan:
            return self.values, self.values
        missing = np.isnan(self.values)
        return np.where(missing, np.inf, self.values), np.where(missing, -np.inf, self.values)

    @cached_property
    def whole(self) -> Any:
        """The range over all elements, as plain Python numbers."""
        low, high = self._sorted_values
        return self._pack(low.min().item(), high.max().item())

    def _pack(self, lo: Any, hi: Any) -> Any:
        if self.type is BOOL:
            return Truth(hi, lo == False)  # noqa: E712 - elementwise on arrays
        if self.type is INT:
            if isinstance(lo, int):
                return Interval(max(lo, -INF), min(hi, INF))
            lo, hi = lo.astype(np.int64), hi.astype(np.int64)
            if lo.size and (lo.min() <= -INF or hi.max() >= INF):
                lo, hi = np.maximum(lo, -INF), np.minimum(hi, INF)
            return Interval(lo, hi)
        lo, hi = np.asarray(lo, np.float64), np.asarray(hi, np.float64)
        if self.values.dtype == np.float64:  # kernels read it as float32
            lo, hi = lo - np.abs(lo) * 2.0**-23 - 2e-38, hi + np.abs(hi) * 2.0**-23 + 2e-38
        hidden = lo > hi  # nothing but NaN in the range
        return FloatRange(np.where(hidden, -np.inf, lo), np.where(hidden, np.inf, hi), self.nan)

    def query(self, ranges: Ranges, count: int) -> Any:
        """Return the range of values over each of ``count`` boxes of indices; scalars where no index varies."""
        clamped = [self._clamp(r, n) for r, n in zip(ranges, self.shape, strict=True)]
        ranged = [d for d, r in enumerate(clamped) if r.lo is not r.hi and not np.array_equal(r.lo, r.hi)]
        if not ranged:
            at = tuple(r.lo for r in clamped)
            low, high = (values[at] for values in self._sorted_values)
            return self._pack(low.item(), high.item()) if np.ndim(low) == 0 else self._pack(low, high)
        full = [Interval(*(np.broadcast_to(np.asarray(x, np.int64), (count,)) for x in r)) for r in clamped]
        return self._line(full, ranged[0]) if len(ranged) == 1 else self._box(full)

    @staticmethod
    def _clamp(r: Interval, n: int) -> Interval:
        if isinstance(r.lo, int) and isinstance(r.hi, int):
            return Interval(max(0, min(n - 1, r.lo)), max(0, min(n - 1, r.hi)))
        lo = np.clip(r.lo, 0, n - 1)
        return Interval(lo, lo if r.lo is r.hi else np.clip(r.hi, 0, n - 1))

    def _row(self, ranges: Ranges, axis: int) -> Any:
        row: Any = 0
        for d, r in enumerate(ranges):
            if d != axis:
                row = row * self.shape[d] + r.lo
        return row

    def _along(self, values: np.ndarray, axis: int) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(values, axis, -1)).reshape(-1, self.shape[axis])

    def _line(self, ranges: Ranges, axis: int) -> Any:
        row, (lo, hi) = self._row(ranges, axis), ranges[axis]
        direction = self._monotone(axis)
        if direction:
            flat, n = self._flat(axis), self.shape[axis]
            first, last = flat[row * n + lo], flat[row * n + hi]
            return self._pack(first, last) if direction > 0 else self._pack(last, first)
        if self.type is BOOL:
            counts, n = self._counts(axis), self.shape[axis] + 1
            true = counts[row * n + hi + 1] - counts[row * n + lo]
            return Truth(true > 0, true <= hi - lo)
        low, high = self._extremes(axis)
        return self._pack(low.query(row, lo, hi), high.query(row, lo, hi))

    def all_mixed(self, ranges: Ranges, axis: int, side: int) -> np.ndarray | None:
        """For flags: whether every aligned stretch of ``side`` elements that a box touches along ``axis`` holds both.

        Then no part of the box of that size is decided either. None for tensors that are not flags.
        """
        if self.type is not BOOL or not self.exact or self.shape[axis] < side:
            return None

        def make() -> np.ndarray:
            v = self._along(self.values, axis)
            parts = np.pad(v, ((0, 0), (0, -v.shape[1] % side)), mode="edge").reshape(v.shape[0], -1, side)
            out = np.zeros((v.shape[0], parts.shape[1] + 1), np.int32)
            np.cumsum(parts.all(2) | ~parts.any(2), axis=1, out=out[:, 1:])
            return out

        plain = self._memo(("mixed", axis, side), make)
        clamped = [self._clamp(r, n) for r, n in zip(ranges, self.shape, strict=True)]
        row, (lo, hi) = self._row(clamped, axis), clamped[axis]
        return plain[row, hi // side + 1] == plain[row, lo // side]

    def _memo(self, key: tuple[Any, ...], make: Any) -> Any:
        if key not in self._lines:
            self._lines[key] = make()
        return self._lines[key]

    def _flat(self, axis: int) -> np.ndarray:
        return self._memo(("flat", axis), lambda: self._along(self.values, axis).reshape(-1))

    def _monotone(self, axis: int) -> int:
        """1 where values never fall along ``axis``, -1 where they never rise, 0 otherwise."""

        def find() -> int:
            if self.nan or not self.exact:
                return 0
            v = self._along(self.values, axis)
            before, after = v[:, :-1], v[:, 1:]
            return 1 if bool((after >= before).all()) else -1 if bool((after <= before).all()) else 0

        return self._memo(("monotone", axis), find)

    def _counts(self, axis: int) -> np.ndarray:
        def make() -> np.ndarray:
            v = self._along(self.values, axis)
            out = np.zeros((v.shape[0], v.shape[1] + 1), np.int32)
            np.cumsum(v, axis=1, out=out[:, 1:])
            return out.reshape(-1)

        return self._memo(("counts", axis), make)

    def _extremes(self, axis: int) -> tuple[_Line, _Line]:
        def make() -> tuple[_Line, _Line]:
            low, high = self._sorted_values
            return _Line(self._along(low, axis), np.minimum), _Line(self._along(high, axis), np.maximum)

        return self._memo(("extremes", axis), make)

    def _box(self, ranges: Ranges) -> Any:
        if self.type is BOOL:
            return self._sums(ranges)
        return self._pack(self._cell_query("low", ranges), self._cell_query("high", ranges))

    def _sums(self, ranges: Ranges) -> Truth:
        """any and all over boxes of any rank, exact."""
        total = self._area("sums", self.values, ranges)
        return Truth(total > 0, total < _volume(ranges))

    def _area(self, name: str, flags: np.ndarray, ranges: Ranges) -> Any:
        """How many flags of a box are set, from a summed-area table."""

        def make() -> np.ndarray:
            out = np.zeros([n + 1 for n in flags.shape], np.int32 if flags.size < 2**31 else np.int64)
            inner = out[(slice(1, None),) * flags.ndim]
            inner[...] = flags
            for d in range(flags.ndim):
                np.cumsum(inner, axis=d, out=inner)
            return out

        table = self._memo((name,), make)
        total: Any = 0
        for corner in range(1 << len(ranges)):
            sign, index = 1, []
            for d, r in enumerate(ranges):
                if corner >> d & 1:
                    index.append(r.lo)
                    sign = -sign
                else:
                    index.append(r.hi + 1)
            total = total + sign * table[tuple(index)].astype(np.int64)
        return total

    def _cell_query(self, side: str, ranges: Ranges) -> np.ndarray:
        """Extremes over boxes of any rank, rounded out to whole cells of 2^level elements a side."""
        fn = np.minimum if side == "low" else np.maximum
        levels = [np.log2(np.maximum(r.hi - r.lo + 1, 1)).astype(np.int64) for r in ranges]
        key = np.zeros_like(levels[0])
        for level in levels:
            key = key * 64 + level
        out = np.empty(len(key), self.values.dtype)
        for code in np.unique(key):
            pick = np.nonzero(key == code)[0]
            level = tuple(int(x[pick[0]]) for x in levels)
            cells = self._cell(side, fn, level)
            lows = [r.lo[pick] >> n for r, n in zip(ranges, level, strict=True)]
            highs = [r.hi[pick] >> n for r, n in zip(ranges, level, strict=True)]
            best = None
            for offset in np.ndindex(*(int((b - a).max()) + 1 for a, b in zip(lows, highs, strict=True))):
                at = tuple(np.minimum(a + o, b) for a, b, o in zip(lows, highs, offset, strict=True))
                best = cells[at] if best is None else fn(best, cells[at])
            out[pick] = best
        return out

    def _cell(self, side: str, fn: np.ufunc, level: tuple[int, ...]) -> np.ndarray:
        """The table reduced to cells of 2^level elements along each dimension."""
        if (side, level) in self._cells:
            return self._cells[side, level]
        if not any(level):
            out = self._sorted_values[side == "high"]
        else:
            d = int(np.argmax(level))
            finer = self._cell(side, fn, (*level[:d], level[d] - 1, *level[d + 1 :]))
            if finer.shape[d] % 2:
                last = np.take(finer, [-1], axis=d)
                finer = np.concatenate([finer, last], axis=d)
            even, odd = (finer[(slice(None),) * d + (slice(s, None, 2),)] for s in (0, 1))
            out = fn(even, odd)
        self._cells[side, level] = out
        return out


def _volume(ranges: Ranges) -> Any:
    volume: Any = 1
    for r in ranges:
        volume = volume * (r.hi - r.lo + 1)
    return volume


class CapturedCells(Captured):
    """A table of which only the extremes of its cells are known (see :mod:`.cells`)."""

    exact = False

    def __init__(self, low: torch.Tensor, high: torch.Tensor, nan: bool, type_: Type, shape: Sequence[int]) -> None:
        super().__init__(low, type_)
        self.nan = nan
        self._sorted_values = self.values, _numbers(high, type_)
        self._extents = tuple(shape)

    def query(self, ranges: Ranges, count: int) -> Any:
        """As :meth:`Captured.query`, for boxes rounded out to whole cells."""
        inside = [self._clamp(r, n) for r, n in zip(ranges, self._extents, strict=True)]
        return super().query([*inside[:-2], *map(_cells_of, inside[-2:])], count)

    def _line(self, ranges: Ranges, axis: int) -> Any:
        return self._sums(ranges) if self.type is BOOL else super()._line(ranges, axis)

    def _sums(self, ranges: Ranges) -> Truth:
        low, high = self._sorted_values
        return Truth(self._area("high", high, ranges) > 0, self._area("low", low, ranges) < _volume(ranges))


def _cells_of(r: Interval) -> Interval:
    lo = r.lo // SIDE
    return Interval(lo, lo if r.lo is r.hi else r.hi // SIDE)
