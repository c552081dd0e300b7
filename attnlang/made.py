"""Made-up arguments: values for the parameters and captured tensors of a program from their declarations alone.

The command line uses them to run and to draw a program before its owner has written any PyTorch. What an int tensor
holds follows from how the program uses it: ids that are compared with each other are sorted segments, numbers compared
with a position are positions, indices into another tensor stay inside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnlang.ir import (
    BOOL,
    BUILTIN_SIZES,
    FLOAT,
    Const,
    Environment,
    Expr,
    Index,
    Load,
    Op,
    Param,
    Program,
    Size,
    TensorParam,
    UsageError,
    evaluate,
    format_expr,
    postorder,
)

__all__ = ["Made", "make_values"]

Tensor = torch.Tensor

SEGMENTS = 8
TABLE = 33
"""Extent given to a symbolic size of a float tensor (a table of 2 * 16 + 1 relative positions, say)."""

ORDER = {"lt", "le", "gt", "ge"}
COMPARE = ORDER | {"eq", "ne"}


@dataclass(frozen=True)
class Made:
    """Keyword arguments for a call, and one line in words for each that was made up."""

    values: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Use:
    """How a program uses an int tensor: compared with positions, or an index into (tensor, dimension)."""

    position: bool = False
    into: tuple[str, int] | None = None
    offset: bool = False  # entries c and c + 1 bound segment c


def make_values(
    program: Program,
    sizes: Mapping[str, int],
    given: Mapping[str, Any],
    *,
    seed: int = 0,
) -> Made:
    """Return a value for everything ``program`` needs: what ``given`` names, defaults, and made-up values.

    ``sizes`` binds the built-in sizes. ``given`` holds scalars, tensors, and extents of symbolic sizes.

    Raises:
        UsageError: ``given`` names something the program does not have, or a scalar that cannot be guessed is missing.
    """
    symbols = _symbols(program)
    known = [*(p.name for p in program.tensors), *(p.name for p in program.scalars), *symbols]
    for name in given:
        if name not in known:
            have = ", ".join(known) or "no parameters"
            raise UsageError(f"{program.name} has no parameter {name!r} (it has: {have})")
    values = {name: value for name, value in given.items() if name not in symbols}
    notes: list[str] = []
    for name, extent in _grid_extents(program, sizes, values):
        values[name] = extent
        notes.append(f"{name} = {extent}")
    scalars = {p.name: values.get(p.name, p.default) for p in program.scalars}
    missing = [f"{p.name} ({p.type})" for p in program.scalars if scalars[p.name] is None]
    if missing:
        first = missing[0].split()[0]
        raise UsageError(f"{program.name} needs a value for {', '.join(missing)}: add --set {first}=...")

    uses = _uses(program)
    all_sizes = {**sizes, **_extents(program, sizes, given, uses)}
    env = Environment(sizes=all_sizes, params={n: v for n, v in scalars.items() if v is not None})
    shapes = {t.name: tuple(max(0, int(evaluate(d, env))) for d in t.shape) for t in program.tensors}
    maker = _Maker(seed, sizes["Lk"])
    for tensor in program.tensors:
        if tensor.name not in values:
            shape, use = shapes[tensor.name], uses.get(tensor.name, _Use())
            values[tensor.name], what = maker.make(tensor, shape, use, _range(use, shapes, uses))
            dims = ", ".join(format_expr(d) for d in tensor.shape)
            notes.append(f"{tensor.name}: {tensor.type}[{dims}] of shape {list(shape)}, {what}")
    return Made(values, tuple(notes))


def _range(use: _Use, shapes: Mapping[str, tuple[int, ...]], uses: Mapping[str, _Use]) -> int:
    """How many different ids an int tensor holds."""
    if use.into is None:
        return SEGMENTS
    tensor, position = use.into
    return max(1, shapes[tensor][position] - int(uses.get(tensor, _Use()).offset))


def _symbols(program: Program) -> list[str]:
    names = (n.name for t in program.tensors for d in t.shape for n in postorder(d) if isinstance(n, Size))
    return [n for n in dict.fromkeys(names) if n not in BUILTIN_SIZES]


def _extents(
    program: Program, sizes: Mapping[str, int], given: Mapping[str, Any], uses: Mapping[str, _Use]
) -> dict[str, int]:
    """Extents of the symbolic sizes: given, or read off a given tensor, or a customary number."""
    out: dict[str, int] = {}
    for name in _symbols(program):
        out[name] = TABLE
        for tensor in program.tensors:
            for position, dim in enumerate(tensor.shape):
                if dim is Size(name):
                    if isinstance(there := given.get(tensor.name), Tensor) and there.dim() > position:
                        out[name] = there.shape[position]
                    elif tensor.type is not FLOAT:
                        out[name] = SEGMENTS + 1 if uses.get(tensor.name, _Use()).position else SEGMENTS
        if name in given:
            out[name] = int(given[name])
    return out


def _grid_extents(program: Program, sizes: Mapping[str, int], given: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Sides for declared grids whose extents are parameters without a value, as near to equal as they divide."""
    done: set[str] = set()
    for axis, dims in program.grids:
        length = sizes["Lq" if axis == "q" else "Lk"]
        unknown = []
        for _, extent in dims:
            if isinstance(extent, Param):
                value = given.get(extent.name, program.scalar(extent.name).default)
                if value is None:
                    unknown.append(extent.name)
                else:
                    length //= max(1, int(value))
            elif isinstance(extent, Const):
                length //= max(1, int(extent.value))
        for i, name in enumerate(unknown):
            if name in done:
                continue
            side = _divisor(length, len(unknown) - i)
            length //= max(1, side)
            done.add(name)
            yield name, side


def _divisor(n: int, root: int) -> int:
    """The largest divisor of ``n`` that is at most its ``root``-th root."""
    if root == 1 or n < 1:
        return max(n, 1)
    for side in range(math.floor(n ** (1 / root) + 1e-9), 0, -1):
        if n % side == 0:
            return side
    return 1


def _outer_nodes(expr: Expr) -> Iterator[Expr]:
    """Nodes of ``expr`` that are not inside the index of a load."""
    stack, seen = [expr], set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            if not isinstance(node, Load):
                stack.extend(node.args)


def _has_position(expr: Expr) -> bool:
    return any(isinstance(n, Index) and n.axis in "qk" for n in _outer_nodes(expr))


def _loads(expr: Expr) -> Iterable[str]:
    return (n.tensor for n in _outer_nodes(expr) if isinstance(n, Load))


def _uses(program: Program) -> dict[str, _Use]:
    out: dict[str, _Use] = {}
    for node in postorder(program.mask, program.score):
        if isinstance(node, Op) and node.op in COMPARE:
            left, right = node.args
            for one, other in ((left, right), (right, left)):
                if node.op in ORDER and _has_position(other) and not _has_position(one):
                    for name in _loads(one):
                        out[name] = _Use(True, *_rest(out.get(name)))
        elif isinstance(node, Load):
            for position, index in enumerate(node.indices):
                if isinstance(index, Op) and index.op == "add" and any(isinstance(a, Const) for a in index.args):
                    old = out.get(node.tensor, _Use())
                    out[node.tensor] = _Use(old.position, old.into, True)
                for name in _loads(index):
                    old = out.get(name, _Use())
                    out[name] = _Use(old.position, (node.tensor, position), old.offset)
    return out


def _rest(use: _Use | None) -> tuple[tuple[str, int] | None, bool]:
    return (use.into, use.offset) if use else (None, False)


class _Maker:
    """Makes tensors; equal seeds give equal tensors, and segments and their offsets agree with each other."""

    def __init__(self, seed: int, length: int) -> None:
        self.length = length
        self.seed = seed
        self.random = torch.Generator().manual_seed(seed)

    def make(self, param: TensorParam, shape: tuple[int, ...], use: _Use, count: int) -> tuple[Tensor, str]:
        """Return a tensor and what it holds in words; ``count`` is the number of ids for tensors of ids."""
        dims = [d.name for d in param.shape if isinstance(d, Size)]
        if param.type is BOOL:
            share = 1 / 16 if "Lq" in dims or "Lk" in dims else 1 / 2
            return torch.rand(shape, generator=self.random) < share, f"random, {share:.0%} true"
        if param.type is FLOAT and param.shape == (Size("H"),):
            slopes = 2.0 ** (-8.0 * torch.arange(1, shape[0] + 1) / max(1, shape[0]))
            return slopes, "slopes 2**(-8 (h + 1) / H)"
        if param.type is FLOAT:
            return torch.randn(shape, generator=self.random), "normal"
        if use.position:
            return self._positions(shape, ordered=len(dims) == 1 and dims[0] not in BUILTIN_SIZES)
        per_token = bool({"Lq", "Lk"} & set(dims)) and not {"Lq", "Lk"} <= set(dims)
        if per_token and shape[-1]:
            return self._segments(shape, count)
        low, high = (0, count) if use.into else (1, 5)
        return torch.randint(low, high, shape, generator=self.random), f"random from {low} to {high - 1}"

    def _positions(self, shape: tuple[int, ...], ordered: bool) -> tuple[Tensor, str]:
        if ordered:
            return self._cuts(shape[0]), f"offsets from 0 to {self.length}"
        low = max(1, self.length // 4)
        made = torch.randint(low, max(low, self.length) + 1, shape, generator=self.random)
        return made, f"random positions from {low} to {self.length}"

    def _segments(self, shape: tuple[int, ...], count: int) -> tuple[Tensor, str]:
        cuts = self._cuts(count + 1)[1:-1] * shape[-1] // max(1, self.length)
        ids = torch.searchsorted(cuts, torch.arange(shape[-1]), right=True)
        return ids.expand(shape).clone(), f"{count} sorted segments"

    def _cuts(self, count: int) -> Tensor:
        """``count`` non-decreasing positions from 0 to the length, unevenly spaced."""
        random = torch.Generator().manual_seed(self.seed + count)
        steps = torch.rand(max(count - 1, 1), generator=random) + 0.25
        inner = (torch.cumsum(steps, 0) / steps.sum() * self.length).round().long()
        return torch.cat([torch.zeros(1, dtype=torch.long), inner])[:count]
