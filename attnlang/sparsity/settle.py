"""Exact answers for tiles that the analysis left undecided: evaluate the mask on those tiles alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from attnlang.ir import Environment, Program, evaluate

from .classify import numbers
from .runmap import FULL, PARTIAL, RunMap, _within, build_runs

__all__ = ["partial_tiles", "settle", "visible_pairs", "visible_shares"]

PAIRS_AT_ONCE = 1 << 21
SIDE = 1 << 10  # of the pieces in which large tiles are looked at


def partial_tiles(runs: RunMap) -> tuple[np.ndarray, np.ndarray]:
    """Return (row, key tile) of every partial tile, int64."""
    pick = np.nonzero(runs.kind == PARTIAL)[0]
    width = (runs.end[pick] - runs.start[pick]).astype(np.int64)
    return np.repeat(runs.row_of_run()[pick], width), np.repeat(runs.start[pick], width) + _within(width)


def tile_areas(runs: RunMap, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Return the number of pairs in range in each tile."""
    (bm, bn), (lq, lk) = runs.tile, runs.sizes
    i = row % runs.nq
    return (np.minimum((i + 1) * bm, lq) - i * bm) * (np.minimum((column + 1) * bn, lk) - column * bn)


def visible_pairs(
    program: Program,
    runs: RunMap,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None,
    tensors: Mapping[str, torch.Tensor] | None,
    row: np.ndarray,
    column: np.ndarray,
) -> np.ndarray:
    """Return the number of visible pairs in each of the given tiles, by evaluating the mask there and nowhere else.

    Work is the area of the tiles, memory a fixed number of pairs. Runs on the device of the captured tensors.
    """
    # a tile may be larger than the problem; a large one is looked at in pieces
    high, wide = (min(side, length) for side, length in zip(runs.tile, runs.sizes, strict=True))
    seen = np.zeros(len(row), np.int64)
    for q in range(0, high, SIDE):
        for k in range(0, wide, SIDE):
            at = np.arange(q, min(q + SIDE, high)), np.arange(k, min(k + SIDE, wide))
            seen += _look(program, runs, sizes, params, tensors, row, column, *at)[0]
    return seen


def visible_shares(
    program: Program,
    runs: RunMap,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None,
    tensors: Mapping[str, torch.Tensor] | None,
    row: np.ndarray,
    column: np.ndarray,
    side: int,
) -> np.ndarray:
    """Return about which share of each given tile is visible, by looking at ``side`` x ``side`` of its pairs."""
    spans = (min(n, length) for n, length in zip(runs.tile, runs.sizes, strict=True))
    at = [np.unique(np.linspace(0, n - 1, min(side, n)).round().astype(np.int64)) for n in spans]
    seen, inside = _look(program, runs, sizes, params, tensors, row, column, *at)
    return np.asarray(seen / np.maximum(inside, 1))


def _look(
    program: Program,
    runs: RunMap,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None,
    tensors: Mapping[str, torch.Tensor] | None,
    row: np.ndarray,
    column: np.ndarray,
    at_q: np.ndarray,
    at_k: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Visible pairs and pairs in range in each tile, of those at the given offsets."""
    captured = dict(tensors or {})
    device = next((t.device for t in captured.values()), torch.device("cpu"))
    (bm, bn), (lq, lk) = runs.tile, runs.sizes
    known = numbers(params or {}, program)
    offset_q, offset_k = (torch.from_numpy(x).to(device) for x in (at_q, at_k))
    step = max(1, PAIRS_AT_ONCE // max(1, len(at_q) * len(at_k)))
    out = [np.zeros((2, 0), np.int64)]
    for i in range(0, len(row), step):
        r, c = (torch.from_numpy(np.ascontiguousarray(x[i : i + step])).to(device) for x in (row, column))
        slot = r // runs.nq
        q = (r % runs.nq * bm)[:, None, None] + offset_q[None, :, None]
        k = (c * bn)[:, None, None] + offset_k[None, None, :]
        inside = (q < lq) & (k < lk)
        axes = {
            "b": (slot // runs.heads)[:, None, None],
            "h": (slot % runs.heads)[:, None, None],
            "q": q.clamp(max=lq - 1),
            "k": k.clamp(max=lk - 1),
        }
        env = Environment(axes, dict(sizes), known, captured, device=device)
        seen = evaluate(program.mask, env) & inside
        out.append(torch.stack([seen.sum((1, 2)), inside.expand(seen.shape).sum((1, 2))]).cpu().numpy())
    seen, inside = np.concatenate(out, axis=1)
    return seen, inside


def settle(
    program: Program,
    runs: RunMap,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> RunMap:
    """Return ``runs`` with every partial tile looked at: those with nothing visible or nothing hidden are decided."""
    row, column = partial_tiles(runs)
    seen = visible_pairs(program, runs, sizes, params, tensors, row, column)
    kind = np.where(seen == tile_areas(runs, row, column), FULL, PARTIAL)
    some = np.nonzero(seen)[0]
    keep = np.nonzero(runs.kind == FULL)[0]
    ptr, start, end, kinds = build_runs(
        np.concatenate([runs.row_of_run()[keep], row[some]]),
        np.concatenate([runs.start[keep].astype(np.int64), column[some]]),
        np.concatenate([runs.end[keep].astype(np.int64), column[some] + 1]),
        np.concatenate([runs.kind[keep].astype(np.int64), kind[some]]),
        runs.rows,
    )
    return RunMap(runs.tile, runs.sizes, runs.batch, runs.heads, ptr, start, end, kinds)
