"""Which order of tokens makes a mask over a grid most block-sparse: candidates, and what each would compute.

Candidates come from the grid (strips and patches of a tile's area, transposed orders, a Hilbert curve) and from the
mask (windows and residue classes that it divides coordinates into). Each is judged by the run map of a sample of query
tiles, so that a million tokens in a hopeless order cost no more than their tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch

from attnlang.ir import (
    INT,
    Const,
    Environment,
    Expr,
    Index,
    Load,
    Op,
    Param,
    Program,
    Size,
    UsageError,
    evaluate,
    postorder,
)
from attnlang.ir.build import op
from attnlang.ir.nodes import substitute
from attnlang.passes.simplify import simplify
from attnlang.passes.tabulate import tabulate

from .analyse import analyse
from .classify import numbers
from .layout import Layout, fill
from .orders import Dim, Hilbert, Order, Patches, row_major
from .refine import TILES
from .runmap import PARTIAL

__all__ = ["Proposal", "grids_of", "propose_layouts"]

Tensors = Mapping[str, torch.Tensor]
Extents = tuple[int, ...]

ROUGH, SAMPLE = 8, 32
"""Query tiles whose keys are counted, to find the likeliest orders and to judge those."""
MOST = 96
"""Candidates that are judged."""
FINALISTS = 4
"""Orders judged by a larger sample and more precisely, at least."""
RUN_COST = 8
"""Time that starting a run of key tiles takes, in keys."""
PARTIAL_COST = 1.15
"""Time of a key in a PARTIAL tile, in keys of FULL ones."""
WORTH = 1.1
"""Least gain in time for which tokens are moved, or heads told apart."""


@dataclass(frozen=True)
class Proposal:
    """A layout and what it is expected to do.

    ``gain`` is how many times fewer pairs are computed than in the order as written, ``speedup`` the same in modelled
    time of the kernel. Both are of a sample of query tiles.
    """

    layout: Layout
    gain: float
    speedup: float


@dataclass(frozen=True)
class _Cost:
    """Of each head (or of all alike): keys computed for a query tile, and the time they take in keys."""

    keys: np.ndarray
    time: np.ndarray


@dataclass(frozen=True)
class _Spec:
    """An order for any axis of the grid: side, residues and shift of each coordinate, and which runs fastest."""

    sides: tuple[int, ...]
    major: tuple[int, ...] = ()
    residues: tuple[int, ...] = ()
    shifts: tuple[int, ...] = ()

    def order(self, extents: Extents) -> Order:
        ones, zeros = (1,) * len(extents), (0,) * len(extents)
        parts = zip(extents, self.sides, self.residues or ones, self.shifts or zeros, strict=True)
        return Patches(tuple(Dim(*part) for part in parts), self.major)


def grids_of(program: Program, sizes: Mapping[str, int], params: Mapping[str, Any]) -> dict[str, Extents]:
    """Return the extents of the grid of each axis; an axis without one is a line.

    Raises:
        UsageError: a grid does not have as many tokens as the lengths say.
    """
    env = Environment(sizes=sizes, params=params)
    grids = {axis: tuple(int(evaluate(n, env)) for _, n in dims) for axis, dims in program.grids}
    for axis, have in (("q", sizes["Lq"]), ("k", sizes["Lk"])):
        extents = grids.setdefault(axis, (have,))
        count = reduce(lambda a, n: a * n, extents, 1)
        if count != have:
            shape = " x ".join(map(str, extents))
            raise UsageError(f"the grid of {axis} is {shape} = {count} tokens, but there are {have}")
    return grids


def _coordinates(program: Program, axis: str) -> list[Expr]:
    """The coordinates of an axis as expressions, as the language defines them."""
    extents = [n for _, n in dict(program.grids).get(axis, ())]
    out: list[Expr] = []
    for i, extent in enumerate(extents):
        inner = extents[i + 1 :]
        whole = op("floordiv", Index(axis), reduce(lambda a, c: op("mul", a, c), inner)) if inner else Index(axis)
        out.append(simplify(op("mod", whole, extent) if i else whole))
    return out or [Index(axis)]


def _divided(
    program: Program, sizes: Mapping[str, int], params: Mapping[str, Any]
) -> tuple[list[list[tuple[int, int]]], list[list[int]]]:
    """For each coordinate, the windows (side, shift) and the residue classes that the mask divides it into."""
    env = Environment(sizes=sizes, params=params)
    width = max((len(dims) for _, dims in program.grids), default=1)
    windows: list[list[tuple[int, int]]] = [[] for _ in range(width)]
    residues: list[list[int]] = [[] for _ in range(width)]
    place = {c: d for axis in "qk" for d, c in enumerate(_coordinates(program, axis))}

    def number(node: Expr) -> int | None:
        if not all(isinstance(n, Const | Op | Size | Param) for n in postorder(node)):
            return None
        return int(evaluate(node, env))

    def find(node: Expr) -> tuple[int, int] | None:
        """The coordinate that ``node`` is, and what is added to it."""
        if node in place:
            return place[node], 0
        if not isinstance(node, Op) or node.op not in ("add", "sub", "mod"):
            return None
        base, other = node.args
        if node.op == "add" and find(base) is None:
            base, other = other, base
        inner, more = find(base), number(other)
        if inner is None or more is None:
            return None
        return inner[0], inner[1] + {"add": more, "sub": -more, "mod": 0}[node.op]

    for node in postorder(program.mask):
        if isinstance(node, Op) and node.op in ("mod", "floordiv") and node.type is INT and node not in place:
            found, by = find(node.args[0]), number(node.args[1])
            if found is None or by is None or by < 2:
                continue
            at, added = found
            if node.op == "mod":
                residues[at].append(by)
            else:
                windows[at].append((by, -added % by))
    return [list(dict.fromkeys(w)) for w in windows], [list(dict.fromkeys(r)) for r in residues]


def _specs(
    count: int, area: int, windows: list[list[tuple[int, int]]], residues: list[list[int]], extents: Extents
) -> Iterator[_Spec]:
    """Orders worth judging for grids of ``count`` coordinates, the likeliest first."""
    ones = (1,) * count
    classes = [ones]
    for r in itertools.zip_longest(*residues, fillvalue=1):
        if max(r) > 1:
            classes.append(r)
            classes.append(tuple(-(-n // c) if c > 1 else 1 for n, c in zip(extents, r, strict=True)))
    if any(windows):  # windows first: each is one stretch of slots
        for pick in itertools.islice(itertools.product(*((*w, (1, 0)) for w in windows)), 8):
            yield _Spec(tuple(w for w, _ in pick), shifts=tuple(s for _, s in pick))
    for found in dict.fromkeys(classes):
        for fast in reversed(range(count)):
            others = [d for d in range(count) if d != fast]
            choices = [[(n, 0) for n in range(1, area + 1) if area % n == 0 and n <= extents[d]] for d in others]
            choices = [[*c, *windows[d]] for c, d in zip(choices, others, strict=True)]
            for pick in itertools.product(*choices):
                plain = [n for n, _ in pick if n <= area]
                if reduce(lambda a, n: a * n, plain, 1) > area:
                    continue
                sides, shifts = [1] * count, [0] * count
                for d, (side, shift) in zip(others, pick, strict=True):
                    sides[d], shifts[d] = side, shift
                yield _Spec(tuple(sides), (*others, fast), found, tuple(shifts))


def _candidates(
    program: Program, grids: dict[str, Extents], sizes: Mapping[str, int], params: Mapping[str, Any], area: int
) -> Iterator[tuple[Order, Order]]:
    """Orders of queries and keys to judge; the first is the plain one."""
    q, k = grids["q"], grids["k"]
    yield row_major(q), row_major(k)
    if len(q) != len(k):
        return
    windows, residues = _divided(program, sizes, params)
    for spec in _specs(len(q), area, windows, residues, q):
        yield spec.order(q), spec.order(k)
    if len(q) > 1:
        yield Hilbert(q), Hilbert(k)


def _sampled(length: int, side: int, most: int) -> torch.Tensor:
    """Slots of an even sample of whole query tiles."""
    tiles = length // side
    if not tiles:
        return torch.arange(length)
    pick = np.unique(np.linspace(0, tiles - 1, min(tiles, most)).astype(np.int64))
    return (torch.from_numpy(pick)[:, None] * side + torch.arange(side)).reshape(-1)


class _Judge:
    """Counts what orders compute for a sample of query tiles."""

    def __init__(self, program: Program, sizes: Mapping[str, int], params: Mapping[str, Any], tensors: Tensors) -> None:
        self.made = tabulate(program)
        self.sizes, self.params, self.tensors = sizes, params, tensors
        lengths: dict[Expr, Expr] = {Size(n): Const(sizes[n], INT) for n in ("Lq", "Lk")}
        self.program = self.made.program.with_hooks(mask=substitute(self.made.program.mask, lengths))
        needed = {n.tensor for n in postorder(self.program.mask) if isinstance(n, Load)}
        self.made = replace(self.made, tables=tuple(t for t in self.made.tables if t.name in needed))
        self.device = next((t.device for t in tensors.values()), torch.device("cpu"))

    def cost(self, orders: tuple[Order, Order], tile: tuple[int, int], *, rough: bool = False) -> _Cost:
        """Keys and time of a query tile under ``orders``, of each head or, where all are alike, of one."""
        keys_at = orders[1].tokens()
        queries_at = keys_at if orders[0] == orders[1] else orders[0].tokens()
        places = {
            "q": queries_at[None, _sampled(self.sizes["Lq"], tile[0], ROUGH if rough else SAMPLE)],
            "k": keys_at[None],
        }
        places = {axis: x.to(self.device) for axis, x in places.items()}
        tables = fill(self.made, places, (), self.sizes, self.params, self.tensors)
        sizes = {**self.sizes, "Lq": places["q"].shape[1]}
        captured = {**self.tensors, **tables}
        runs = analyse(self.program, sizes, self.params, captured, tile, precise=False)
        share = self.sizes["Lq"] / max(1, sizes["Lq"])
        if not rough and runs.counts()[1] * share <= TILES:  # the whole map will be refined, too
            runs = analyse(self.program, sizes, self.params, captured, tile)
        keys = (runs.end - runs.start).astype(np.float64) * tile[1]
        time = np.where(runs.kind == PARTIAL, PARTIAL_COST, 1.0) * keys + RUN_COST
        row = runs.row_of_run()

        def per_head(values: np.ndarray) -> np.ndarray:
            total = np.bincount(row, values, runs.rows).reshape(runs.batch, runs.heads, -1)
            return total.mean((0, 2))

        return _Cost(per_head(keys), per_head(time))


def propose_layouts(
    program: Program,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None = None,
    tensors: Tensors | None = None,
    tile: tuple[int, int] = (128, 128),
    limit: int = 3,
    key_tiles: Sequence[int] = (),
) -> tuple[Proposal, ...]:
    """Return the best layouts for a program, the fastest by a simple model first; none where none is worth it.

    A coordinate without a declared grid is a line. Where heads see different things, an order of each head's own is
    among the candidates. The best are tried with the smaller ``key_tiles`` as well.

    Raises:
        UsageError: a grid of the program does not have as many tokens as the lengths say.
    """
    known = numbers(params or {}, program)
    grids = grids_of(program, sizes, known)
    if min(sizes["Lq"], sizes["Lk"]) == 0:
        return ()
    judge = _Judge(program, sizes, known, tensors or {})
    finest = (tile[0], min((tile[1], *key_tiles)))
    candidates = list(itertools.islice(dict.fromkeys(_candidates(program, grids, sizes, known, tile[0])), MOST))
    found = {orders: judge.cost(orders, finest, rough=True) for orders in candidates}
    plain = judge.cost(candidates[0], tile)
    ranked = sorted(found, key=lambda o: float(found[o].time.mean()))[: max(limit, FINALISTS)]
    made = [_layout(judge, [orders], (), tile, key_tiles, plain) for orders in ranked]
    if len(plain.time) > 1:
        made.append(_layout(judge, *_each_head(found, sizes), tile, key_tiles, plain))
    worth = [p for p in made if p.speedup > WORTH]
    best = max((p.speedup for p in worth if not p.layout.per_head), default=1.0)
    worth = [p for p in worth if not p.layout.per_head or p.speedup > WORTH * best]
    return tuple(sorted(worth, key=lambda p: -p.speedup)[:limit])


def _each_head(
    found: Mapping[tuple[Order, Order], _Cost], sizes: Mapping[str, int]
) -> tuple[list[tuple[Order, Order]], tuple[int, ...]]:
    """The orders that heads, or groups of heads that share their keys, are fastest under, and which is whose."""
    orders = list(found)
    heads = sizes["H"]
    group = max(1, heads // max(1, sizes.get("Hkv", heads)))
    time = np.stack([np.broadcast_to(found[o].time, (heads,)) for o in orders])
    best = np.repeat(time.reshape(len(orders), -1, group).sum(2).argmin(0), group)
    used = sorted({int(n) for n in best})
    return [orders[n] for n in used], tuple(used.index(int(n)) for n in best)


def _layout(
    judge: _Judge,
    orders: list[tuple[Order, Order]],
    heads: tuple[int, ...],
    tile: tuple[int, int],
    key_tiles: Sequence[int],
    plain: _Cost,
) -> Proposal:
    """The proposal of these orders, with the key tile that suits them best."""

    def cost(keys: int) -> _Cost:
        each = [judge.cost(o, (tile[0], keys)) for o in orders]
        if not heads:
            return each[0]
        picked = [[getattr(each[n], what)[h] for h, n in enumerate(heads)] for what in ("keys", "time")]
        return _Cost(*(np.array(p) for p in picked))

    costs = {keys: cost(keys) for keys in (tile[1], *(n for n in key_tiles if n < tile[1]))}
    keys = min(costs, key=lambda n: (float(costs[n].time.mean()), -n))
    layout = Layout(
        tuple(o[0] for o in orders),
        tuple(o[1] for o in orders),
        heads if len(orders) > 1 else (),
        keys if key_tiles else 0,
    )
    mean = [float(x.mean()) for x in (plain.keys, costs[keys].keys, plain.time, costs[keys].time)]
    return Proposal(layout, mean[0] / max(mean[1], 1e-9), mean[2] / max(mean[3], 1e-9))
