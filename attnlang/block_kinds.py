"""Exact kinds of blocks, as FlexAttention's block lists have them, from a run map that may be conservative."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from attnlang.ir import Environment, evaluate
from attnlang.runtime import eager

from .api import Attention
from .block_mask import EMPTY, FULL, PARTIAL

__all__ = ["exact_kinds"]

Tensor = torch.Tensor

SAMPLES = 16
"""Positions in each direction at which a block is tried before it is evaluated in full."""


def exact_kinds(
    attention: Attention, values: Mapping[str, Any], sizes: tuple[int, int, int, int], tile: tuple[int, int]
) -> Tensor:
    """Kinds of blocks as PyTorch counts them, int8 [B, H, rows, cols].

    The analysis may leave a tile PARTIAL that is not. A few points of such a tile settle most of them, because one True
    and one False prove it PARTIAL; only what is left is evaluated. A tile cut by the end of a sequence is never FULL.
    """
    batch, heads, lq, lk = sizes
    kinds = attention.run_map(batch, heads, lq, lk, tile=tile, **values).dense_kinds().astype(np.int8)
    cut = np.zeros(kinds.shape, bool)
    cut[:, :, -1:] |= bool(lq % tile[0])
    cut[..., -1:] |= bool(lk % tile[1])
    points = _Points(attention, values, sizes, tile)
    open_ = np.argwhere(kinds == PARTIAL)
    some, every = points.some_and_every(open_, SAMPLES)
    open_ = open_[~(some & (~every | cut[tuple(open_.T)]))]
    some, every = points.some_and_every(open_, max(tile))
    kinds[tuple(open_.T)] = np.where(every, FULL, np.where(some, PARTIAL, EMPTY))
    kinds[cut] = np.minimum(kinds[cut], PARTIAL)
    return torch.from_numpy(kinds).expand(batch, heads, -1, -1)


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
        q, k = (np.unique(np.linspace(0, n - 1, min(side, n)).round().astype(np.int64)) for n in self._tile)
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
