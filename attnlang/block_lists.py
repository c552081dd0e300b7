"""Block lists in FlexAttention's layout: given ones, and those of a run map, which are made when they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from attnlang.sparsity import EMPTY, FULL, PARTIAL, RunMap
from attnlang.sparsity.exchange import block_lists

__all__ = ["Blocks", "RunBlocks", "kinds_from_lists"]

Tensor = torch.Tensor

AT_ONCE = 1 << 20
NAMES = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


@dataclass(frozen=True)
class Blocks:
    """Block lists in FlexAttention's layout, int32.

    ``kv_num_blocks`` [B, H, rows] counts the partial blocks of each row of blocks and ``kv_indices`` [B, H, rows, cols]
    names them first; ``full_*`` does the same for full blocks, ``q_*`` for the transpose.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None = None
    full_kv_indices: Tensor | None = None
    q_num_blocks: Tensor | None = None
    q_indices: Tensor | None = None
    full_q_num_blocks: Tensor | None = None
    full_q_indices: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (
            self.kv_num_blocks,
            self.kv_indices,
            self.full_kv_num_blocks,
            self.full_kv_indices,
            self.q_num_blocks,
            self.q_indices,
            self.full_q_num_blocks,
            self.full_q_indices,
        )

    def to(self, device: torch.device) -> Blocks:
        """The lists on another device."""
        return Blocks(*(None if t is None else t.to(device) for t in self.tensors()))  # type: ignore[arg-type]

    def computed(self) -> int:
        """Number of blocks that are not skipped."""
        full = 0 if self.full_kv_num_blocks is None else int(self.full_kv_num_blocks.sum())
        return int(self.kv_num_blocks.sum()) + full

    def with_queries(self) -> Blocks:
        """Add the transposed lists."""
        q_num, q_idx = _transposed(self.kv_num_blocks, self.kv_indices)
        full: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.full_kv_num_blocks is not None and self.full_kv_indices is not None:
            full = _transposed(self.full_kv_num_blocks, self.full_kv_indices)
        return replace(self, q_num_blocks=q_num, q_indices=q_idx, full_q_num_blocks=full[0], full_q_indices=full[1])

    @staticmethod
    def from_kinds(kinds: Tensor, separate_full: bool = True) -> Blocks:
        """Build all lists from kinds [B, H, rows, cols]."""
        if not separate_full:
            return Blocks(*_lists(kinds != EMPTY)).with_queries()
        return Blocks(*_lists(kinds == PARTIAL), *_lists(kinds == FULL)).with_queries()


def _rows_at_once(shape: torch.Size) -> int:
    """Rows of a block list that are worked on together, so that nothing is larger than the lists themselves."""
    return max(1, AT_ONCE // max(1, math.prod(shape) // max(1, shape[-2])))


def _lists(present: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.empty(present.shape, dtype=torch.int32, device=present.device)
    step = _rows_at_once(present.shape)
    for out, part in zip(order.split(step, -2), present.split(step, -2), strict=True):
        out.copy_(torch.argsort(part.to(torch.uint8), dim=-1, descending=True, stable=True))
    return present.sum(-1, dtype=torch.int32), order


def _present(num_blocks: Tensor, indices: Tensor, columns: int | None = None) -> Tensor:
    """bool [..., rows, columns]: which blocks the lists name."""
    columns = indices.shape[-1] if columns is None else columns
    # one spare column for what is not listed
    out = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.bool, device=indices.device)
    step = _rows_at_once(indices.shape)
    parts = zip(out.split(step, -2), indices.split(step, -2), num_blocks.split(step, -1), strict=True)
    for seen, index, number in parts:
        listed = torch.arange(index.shape[-1], device=index.device) < number[..., None]
        target = torch.where(listed, index, columns).long().clamp(0, columns)
        seen.scatter_(-1, target, torch.ones_like(listed))
    return out[..., :columns]


def _transposed(num_blocks: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return _lists(_present(num_blocks, indices).transpose(-1, -2))


def kinds_from_lists(blocks: Any) -> Tensor:
    """Return kinds int8 [..., rows, cols] of anything with FlexAttention's block lists."""
    partial = _present(blocks.kv_num_blocks, blocks.kv_indices)
    kinds = partial.to(torch.int8) * PARTIAL
    if blocks.full_kv_num_blocks is not None:
        full = _present(blocks.full_kv_num_blocks, blocks.full_kv_indices, kinds.shape[-1])
        kinds = torch.where(full, FULL, kinds)
    return kinds


class RunBlocks:
    """The same lists as :class:`Blocks`, of a run map that counts blocks as PyTorch does; each made on first use.

    ``shape`` is the batch and the heads of the lists, which repeat the map where it has 1. Numbers of blocks cost the
    runs; a list costs its own memory and a fixed amount beyond.
    """

    def __init__(
        self, runs: RunMap, shape: tuple[int, int], separate_full: bool = True, device: torch.device | None = None
    ) -> None:
        self.runs, self.shape, self.device = runs, shape, device
        self._separate = separate_full
        self._made: dict[tuple[bool, bool, int], Tensor] = {}

    def to(self, device: torch.device) -> RunBlocks:
        """The lists on another device."""
        return RunBlocks(self.runs, self.shape, self._separate, device)

    def _list(self, full: bool, transposed: bool, part: int) -> Tensor | None:
        if full and not self._separate:
            return None
        key = (full, transposed, part)
        if key not in self._made:
            kinds = (FULL,) if full else (PARTIAL,) if self._separate else (PARTIAL, FULL)
            made = block_lists(self.runs, kinds, transposed)[1] if part else self._counts(kinds, transposed)
            self._made[key] = self._placed(made)
        return self._made[key]

    def _counts(self, kinds: tuple[int, ...], transposed: bool) -> Tensor:
        runs = self.runs
        keep = np.nonzero(np.isin(runs.kind, kinds))[0]
        row, start, end = runs.row_of_run()[keep], runs.start[keep].astype(np.int64), runs.end[keep].astype(np.int64)
        shape = (runs.batch, runs.heads, runs.nk if transposed else runs.nq)
        if transposed:  # columns are entered at the start of a run and left at its end
            step = np.zeros(runs.batch * runs.heads * (runs.nk + 1), np.int64)
            slot = row // runs.nq * (runs.nk + 1)
            np.add.at(step, slot + start, 1)
            np.subtract.at(step, slot + end, 1)
            count = np.cumsum(step.reshape(-1, runs.nk + 1), axis=1)[:, :-1]
        else:
            count = np.bincount(row, weights=end - start, minlength=runs.rows)
        return torch.from_numpy(count.reshape(shape).astype(np.int32))

    def _placed(self, t: Tensor) -> Tensor:
        return t.expand(*self.shape, *t.shape[2:]).contiguous().to(self.device)

    kv_num_blocks = property(lambda self: self._list(False, False, 0))
    kv_indices = property(lambda self: self._list(False, False, 1))
    full_kv_num_blocks = property(lambda self: self._list(True, False, 0))
    full_kv_indices = property(lambda self: self._list(True, False, 1))
    q_num_blocks = property(lambda self: self._list(False, True, 0))
    q_indices = property(lambda self: self._list(False, True, 1))
    full_q_num_blocks = property(lambda self: self._list(True, True, 0))
    full_q_indices = property(lambda self: self._list(True, True, 1))

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in NAMES)

    def kinds(self) -> Tensor:
        """Kinds int8 [B, H, rows, cols]."""
        kinds = self.runs.dense_kinds().view(np.int8)
        return self._placed(torch.from_numpy(kinds if self._separate else np.minimum(kinds, PARTIAL)))

    def coverage(self, index: tuple[int, ...], step_q: int, step_k: int) -> np.ndarray:
        """Share of blocks that are not skipped in each cell of ``step_q`` x ``step_k`` blocks of one (b, h)."""
        return self.runs.coverage(index[0], index[1], step_q, step_k)

    def computed(self) -> int:
        """Number of blocks that are not skipped, over the whole batch and all heads."""
        _, partial, full = self.runs.counts()
        copies = (self.shape[0] if self.runs.batch == 1 else 1) * (self.shape[1] if self.runs.heads == 1 else 1)
        return (partial + full) * copies
