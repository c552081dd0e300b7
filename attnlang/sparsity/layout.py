"""Token orders that turn a mask over a grid into a block-sparse one.

In row-major order a tile of 128 tokens of an image is a thin strip, and the neighbours of a strip are everywhere. In
the order "patches of 8 x 16 pixels" the same 128 tokens are a patch, and its neighbours are a few patches. A
:class:`Layout` gives the position of the token in each slot as closed arithmetic, so a program under a layout is again
a program: its indices are replaced by positions, and q, k, v and the output are permuted around the call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnlang.ir import Environment, Expr, Index, Op, Program, Size, UsageError, evaluate, postorder, rewrite
from attnlang.ir.build import const, op

from .analyse import analyse
from .classify import numbers
from .runmap import RunMap

__all__ = ["Dim", "Layout", "Proposal", "propose_layouts"]

Grid = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Dim:
    """One coordinate of a grid: its extent, the side of a patch, and the number of residue classes kept apart.

    ``tile`` divides ``extent // residues`` and ``residues`` divides ``extent``.
    """

    extent: int
    tile: int
    residues: int = 1

    @property
    def patches(self) -> int:
        return self.extent // (self.residues * self.tile)


@dataclass(frozen=True)
class Layout:
    """An order of tokens for each axis (``q``, ``k``): residue classes first, then patches, then tokens in a patch.

    Within each of the three, the last coordinate runs fastest.
    """

    axes: tuple[tuple[str, tuple[Dim, ...]], ...]

    @property
    def name(self) -> str:
        dims = self.axes[0][1]
        text = "patches of " + " x ".join(str(d.tile) for d in dims)
        if any(d.residues > 1 for d in dims):
            text += " in residue classes modulo " + " x ".join(str(d.residues) for d in dims)
        return text

    def position(self, axis: str) -> Expr:
        """Return the original index of the token in slot ``Index(axis)``."""
        dims = dict(self.axes)[axis]
        rest: Expr = Index(axis)
        digits: list[list[Expr]] = []
        for sides in ([d.tile for d in dims], [d.patches for d in dims], [d.residues for d in dims]):
            found: list[Expr] = []
            for side in reversed(sides):
                found.append(const(0) if side == 1 else op("mod", rest, side))
                rest = rest if side == 1 else op("floordiv", rest, side)
            digits.append(found[::-1])
        out: Expr = const(0)
        for d, inner, patch, residue in zip(dims, *digits, strict=True):
            along = op("add", op("mul", patch, d.tile), inner)
            out = op("add", op("mul", out, d.extent), op("add", op("mul", along, d.residues), residue))
        return out

    def permutation(self, axis: str) -> torch.Tensor:
        """Return int64 [tokens]: the original index of the token in each slot."""
        count = 1
        for d in dict(self.axes)[axis]:
            count *= d.extent
        slots = torch.arange(count)
        return evaluate(self.position(axis), Environment({axis: slots})).expand(count)

    def apply(self, program: Program) -> Program:
        """Return the program whose rows are slots: call it on q, k, v permuted, and un-permute its output."""
        moved: dict[Expr, Expr] = {Index(axis): self.position(axis) for axis, _ in self.axes}
        mask, score = rewrite((program.mask, program.score), lambda node: moved.get(node, node))
        return program.with_hooks(mask=mask, score=score)


@dataclass(frozen=True)
class Proposal:
    """A layout and its run map; ``gain`` is how many times fewer tiles it computes than the program as written."""

    layout: Layout
    runs: RunMap
    gain: float


def _computed(runs: RunMap) -> int:
    return sum(runs.counts()[1:])


def _grids(program: Program, sizes: Mapping[str, int], params: Mapping[str, Any]) -> Grid:
    env = Environment(sizes=sizes, params=params)
    return {axis: tuple(int(evaluate(extent, env)) for _, extent in dims) for axis, dims in program.grids}


def _sides(extents: tuple[int, ...], area: int) -> Iterator[tuple[int, ...]]:
    """Sides of patches of ``area`` tokens that divide the extents."""
    if not extents:
        if area == 1:
            yield ()
        return
    for side in range(1, min(extents[0], area) + 1):
        if area % side == 0 and extents[0] % side == 0:
            for more in _sides(extents[1:], area // side):
                yield (side, *more)


def _residues(program: Program, grid: tuple[int, ...], params: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Numbers of residue classes worth trying: divisors that the mask takes remainders by."""
    env = Environment(sizes={}, params=params)
    found = set()
    for node in postorder(program.mask):
        if isinstance(node, Op) and node.op in ("mod", "floordiv"):
            divisor = node.args[1]
            if not any(isinstance(n, Index | Size) for n in postorder(divisor)):
                found.add(int(evaluate(divisor, env)))
    out = [(1,) * len(grid)]
    for r in sorted(found):
        if r > 1 and all(n % r == 0 and r < n for n in grid):
            out.append((r,) * len(grid))
            out.append(tuple(n // r for n in grid))
    return list(dict.fromkeys(out))


def _candidates(program: Program, grids: Grid, params: Mapping[str, Any], tile: tuple[int, int]) -> Iterator[Layout]:
    first = next(iter(grids.values()))
    for residues in _residues(program, first, params):
        for sides in _sides(tuple(n // r for n, r in zip(first, residues, strict=True)), tile[0]):
            axes = []
            for axis, extents in grids.items():
                fits = len(extents) == len(first) and all(
                    n % (r * t) == 0 for n, r, t in zip(extents, residues, sides, strict=True)
                )
                if fits:
                    axes.append((axis, tuple(Dim(n, t, r) for n, t, r in zip(extents, sides, residues, strict=True))))
            if len(axes) == len(grids):
                yield Layout(tuple(axes))


def propose_layouts(
    program: Program,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    tile: tuple[int, int] = (128, 128),
    limit: int = 3,
) -> tuple[Proposal, ...]:
    """Return the best layouts for a program that declares grids, fewest computed tiles first.

    Every patch shape of ``tile[0]`` tokens that divides the grid is analysed, alone and within the residue classes that
    the mask's remainders suggest. Layouts that do not save a tile are left out.

    Raises:
        UsageError: the program declares no grid, or its grid does not have as many tokens as the lengths say.
    """
    known = numbers(params or {}, program)
    grids = _grids(program, sizes, known)
    if not grids:
        raise UsageError(f"{program.name} declares no grid; layouts are proposed for programs with 'grid q, k = ...'")
    for axis, extents in grids.items():
        count, have = 1, sizes["Lq" if axis == "q" else "Lk"]
        for n in extents:
            count *= n
        if count != have:
            shape = " x ".join(map(str, extents))
            raise UsageError(f"the grid of {axis} is {shape} = {count} tokens, but there are {have}")
    before = _computed(analyse(program, sizes, known, tensors, tile))
    found: list[tuple[int, int, str, Layout]] = []
    for layout in itertools.islice(_candidates(program, grids, known, tile), 64):
        runs = analyse(layout.apply(program), sizes, known, tensors, tile, precise=False)
        found.append((_computed(runs), -runs.counts()[2], layout.name, layout))
    out = []
    for _, _, _, layout in sorted(found, key=lambda x: x[:3])[:limit]:
        runs = analyse(layout.apply(program), sizes, known, tensors, tile)
        if _computed(runs) < before:
            out.append(Proposal(layout, runs, before / max(1, _computed(runs))))
    return tuple(sorted(out, key=lambda p: -p.gain))
