"""A second look at the tiles that are undecided as a whole: cut them where the mask has its steps.

Coordinates of a grid are ``k // width`` and ``k % width``; in a tile that spans two rows of the grid neither is exact,
in its two halves both are. So undecided tiles are bisected at a multiple of a divisor of the mask where one lies
inside, in the middle otherwise. A tile leaves as soon as a piece that is all visible and a piece that is all hidden are
known: then it *is* partial. What is not decided within the budget stays partial.
"""

from __future__ import annotations

import numpy as np

from attnlang.passes.intervals import Interval

from .classify import Boxes, Classifier
from .runmap import EMPTY, FULL, PARTIAL, RunMap, build_runs
from .settle import partial_tiles
from .terms import Linear

__all__ = ["refine"]

BUDGET = 1 << 17  # pieces classified in all
TILES = 1 << 12  # maps with more partial tiles than this are left as they are


def steps(classifier: Classifier, axis: str) -> list[tuple[int, int]]:
    """(divisor, offset) of the floor divisions and remainders of one index, coarsest first.

    Their value changes where index + offset passes a multiple of the divisor.
    """
    index = classifier.terms.axes[axis]
    found = set()
    for ref in classifier.order:
        node = classifier.nodes[ref]
        if node.op not in ("floordiv", "mod") or not isinstance(node.args[1], Linear) or node.args[1].terms:
            continue
        form, divisor = node.args
        assert isinstance(form, Linear) and isinstance(divisor, Linear)
        inner = [classifier.nodes[r] for r, _ in form.terms]
        direct = any(r == index and abs(c) == 1 for r, c in form.terms)
        nested = len(inner) == 1 and inner[0].op == "mod" and bool(inner[0].reads & classifier.nodes[index].reads)
        if (direct or nested) and divisor.const > 1:
            found.add((divisor.const, form.const if form.terms[0][1] > 0 else -form.const))
    return sorted(found, reverse=True)


def _halves(r: Interval, steps: list[tuple[int, int]]) -> np.ndarray:
    """First position of the upper half of each range (lo + 1 .. hi; meaningless where the range is one position)."""
    middle = (r.lo + r.hi + 1) // 2
    cut = middle.copy()
    open_ = np.ones(len(cut), bool)
    for divisor, offset in steps:
        below = (middle + offset) // divisor * divisor - offset
        for at in (below, below + divisor):
            fits = open_ & (at > r.lo) & (at <= r.hi)
            cut = np.where(fits, at, cut)
            open_ &= ~fits
    return cut


def _bisect(boxes: Boxes, tile: np.ndarray, marks: dict[str, list[tuple[int, int]]]) -> tuple[Boxes, np.ndarray]:
    """Cut every box in two along each axis on which it is longer than one position."""
    for axis in ("q", "k"):
        r: Interval = getattr(boxes, axis)
        cut = _halves(r, marks[axis])
        long = np.nonzero(r.hi > r.lo)[0]
        lower_hi = np.where(r.hi > r.lo, cut - 1, r.hi)
        ranges = {a: getattr(boxes, a) for a in ("q", "k")}
        ranges = {a: Interval(*(np.concatenate([x, x[long]]) for x in v)) for a, v in ranges.items()}
        ranges[axis] = Interval(np.concatenate([r.lo, cut[long]]), np.concatenate([lower_hi, r.hi[long]]))
        boxes = Boxes(
            np.concatenate([boxes.b, boxes.b[long]]), np.concatenate([boxes.h, boxes.h[long]]), ranges["q"], ranges["k"]
        )
        tile = np.concatenate([tile, tile[long]])
    return boxes, tile


def _take(boxes: Boxes, pick: np.ndarray) -> Boxes:
    return Boxes(
        boxes.b[pick], boxes.h[pick], Interval(*(x[pick] for x in boxes.q)), Interval(*(x[pick] for x in boxes.k))
    )


def _corners(boxes: Boxes) -> list[Boxes]:
    """The four corners and the middle of each box as boxes of one pair."""
    middle = ((boxes.q.lo + boxes.q.hi) // 2, (boxes.k.lo + boxes.k.hi) // 2)
    points = [(q, k) for q in boxes.q for k in boxes.k]
    return [Boxes(boxes.b, boxes.h, Interval(q, q), Interval(k, k)) for q, k in [*points, middle]]


def refine(classifier: Classifier, runs: RunMap, tiles: int = TILES, budget: int = BUDGET) -> RunMap:
    """Return ``runs`` with partial tiles decided where their pieces can be (unchanged if there are too many)."""
    if not 0 < runs.counts()[1] <= tiles:
        return runs
    row, column = partial_tiles(runs)
    (bm, bn), (lq, lk) = runs.tile, runs.sizes
    slot, i = row // runs.nq, row % runs.nq
    boxes = Boxes(
        slot // runs.heads,
        slot % runs.heads,
        Interval(i * bm, np.minimum((i + 1) * bm, lq) - 1),
        Interval(column * bn, np.minimum((column + 1) * bn, lk) - 1),
    )
    seen = np.zeros((2, len(row)), bool)  # a piece that is all visible, a piece that is all hidden
    open_ = np.ones(len(row), bool)
    tile = np.arange(len(row))
    for points in _corners(boxes):
        true, false = classifier.classify(points)
        seen[0] |= ~false
        seen[1] |= ~true
    marks = {axis: steps(classifier, axis) for axis in ("q", "k")}
    keep = np.nonzero(~seen.all(0))[0]
    boxes, tile = _take(boxes, keep), tile[keep]
    while len(tile) and budget > 0:
        boxes, tile = _bisect(boxes, tile, marks)
        budget -= len(tile)
        true, false = classifier.classify(boxes)
        seen[0, tile[~false]] = True
        seen[1, tile[~true]] = True
        whole = (boxes.q.lo == boxes.q.hi) & (boxes.k.lo == boxes.k.hi)
        stuck = true & false & whole  # one pair that even so is undecided: a float comparison too close to call
        seen[:, tile[stuck]] = True
        keep = np.nonzero(true & false & ~seen[:, tile].all(0))[0]
        boxes, tile = _take(boxes, keep), tile[keep]
    open_[:] = seen.all(0)
    open_[tile] = True  # the budget ran out
    kind = np.where(open_, PARTIAL, np.where(seen[0], FULL, EMPTY))
    some = np.nonzero(kind != EMPTY)[0]
    full = np.nonzero(runs.kind == FULL)[0]
    ptr, start, end, kinds = build_runs(
        np.concatenate([runs.row_of_run()[full], row[some]]),
        np.concatenate([runs.start[full].astype(np.int64), column[some]]),
        np.concatenate([runs.end[full].astype(np.int64), column[some] + 1]),
        np.concatenate([runs.kind[full].astype(np.int64), kind[some]]),
        runs.rows,
    )
    return RunMap(runs.tile, runs.sizes, runs.batch, runs.heads, ptr, start, end, kinds)
