"""Advice: what would make fewer tiles computed, or more of them without mask code. Every piece of it was tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from attnlang.ir import INT, Program, UsageError

from .analyse import analyse
from .classify import numbers
from .layout import Layout
from .propose import propose_layouts
from .runmap import RunMap

__all__ = ["advise"]

GRID_TILES = 1 << 20  # tiles up to which the whole map of another order is made
NEAR = 4  # a parameter may move by a quarter of its value
SMALL = 64  # no smaller side is proposed: smaller tiles cost more than they save
Tensors = Mapping[str, torch.Tensor] | None


def _share_full(runs: RunMap) -> float:
    _, partial, full = runs.counts()
    return full / (partial + full) if partial + full else 0.0


def computed_pairs(runs: RunMap) -> int:
    """Number of pairs in computed tiles, over the batch elements and heads of the map."""
    _, partial, full = runs.counts()
    return (partial + full) * runs.tile[0] * runs.tile[1]


def _candidates(value: int, side: int) -> Iterator[int]:
    """Multiples of the tile next to a value, near first, and their neighbours (``<`` and ``<=`` want other ones)."""
    found = []
    for multiple in dict.fromkeys((-(-value // side) * side, value // side * side)):
        for candidate in (multiple, multiple - 1, multiple + 1):
            if 0 < candidate != value and abs(candidate - value) <= value // NEAR:
                found.append((abs(candidate - value) > side // 2, abs(candidate - multiple), candidate))
    yield from (candidate for *_, candidate in sorted(found))


def _round_parameters(
    program: Program,
    runs: RunMap,
    sizes: Mapping[str, int],
    params: Mapping[str, Any],
    tensors: Tensors,
    layout: Layout | None,
) -> Iterator[str]:
    """Int parameters that a multiple of the tile nearby would suit better: the share of full tiles jumps."""
    known = numbers(params, program)
    now = _share_full(runs)
    for scalar in program.scalars:
        value = known.get(scalar.name)
        if scalar.type is not INT or isinstance(value, bool) or not isinstance(value, int) or value < 2:
            continue
        best, share = value, now
        for candidate in _candidates(value, runs.tile[1]):
            moved = {**known, scalar.name: candidate}
            then = _share_full(analyse(program, sizes, moved, tensors, runs.tile, layout=layout))
            if then > share + (0.02 if best == value else 0.1):
                best, share = candidate, then
        if best != value:
            yield (
                f"{scalar.name} {value} -> {best} makes {100 * share:.0f} % of the computed tiles full "
                f"(now {100 * now:.0f} %)"
            )


def _shrink_tiles(
    program: Program,
    runs: RunMap,
    sizes: Mapping[str, int],
    params: Mapping[str, Any],
    tensors: Tensors,
    now: float,
    layout: Layout | None,
) -> Iterator[str]:
    """A smaller tile, where it saves a quarter of the pairs or more."""
    if now > 0.75 or runs.always_empty:
        return
    tiles = {(max(SMALL, runs.tile[0] // a), max(SMALL, runs.tile[1] // b)) for a, b in ((1, 2), (2, 1), (2, 2))}
    found = []
    for tile in tiles - {runs.tile}:
        if tile[0] <= runs.tile[0] and tile[1] <= runs.tile[1]:
            smaller = analyse(program, sizes, params, tensors, tile, layout=layout)
            found.append((computed_pairs(smaller), -tile[0] * tile[1], tile))
    for pairs, _, (bm, bn) in sorted(found)[:1]:
        gain = computed_pairs(runs) / max(1, pairs)
        if gain >= 4 / 3:
            yield f"tile {bm}x{bn} raises efficiency from {now:.2f} to {min(1.0, now * gain):.2f}"


def _order_tokens(
    program: Program, runs: RunMap, sizes: Mapping[str, int], params: Mapping[str, Any], tensors: Tensors, now: float
) -> Iterator[str]:
    """The best order of tokens for a mask over a grid, where it saves a fifth of the tiles or more."""
    if not program.grids or now > 0.8 or runs.always_empty:
        return
    try:
        best = propose_layouts(program, sizes, params, tensors, runs.tile, limit=1)
    except UsageError:  # the lengths are not those of the grid
        return
    for p in best:
        gain = p.gain  # of a sample of query tiles
        if runs.nq * runs.nk <= GRID_TILES:
            moved = analyse(program, sizes, params, tensors, runs.tile, layout=p.layout)
            slots = runs.batch * runs.heads / (moved.batch * moved.heads)
            gain = computed_pairs(runs) / max(1.0, computed_pairs(moved) * slots)
        if gain > 1.2:
            yield f"tokens in {p.layout.name} raise tile efficiency from {now:.2f} to {min(1.0, now * gain):.2f}"


def _contradiction(runs: RunMap) -> Iterator[str]:
    if runs.always_empty and min(runs.sizes) > 0:
        yield "no query can see any key: the mask contradicts itself at these lengths"


def advise(
    program: Program,
    runs: RunMap,
    sizes: Mapping[str, int],
    params: Mapping[str, Any],
    tensors: Tensors,
    efficiency: float,
    layout: Layout | None = None,
) -> tuple[str, ...]:
    """Return sentences about a program with the run map ``runs``, the most useful first."""
    common = (program, runs, sizes, params, tensors)
    return (
        *_contradiction(runs),
        *(_order_tokens(*common, efficiency) if layout is None else ()),
        *_round_parameters(*common, layout),
        *_shrink_tiles(*common, efficiency, layout),
    )
