"""Layouts: programs whose slots hold the tokens in another order than the caller's.

In row-major order a tile of 128 tokens of an image is a thin strip, and the neighbours of a strip are everywhere. In
the order "patches of 8 x 16" the same 128 tokens are a patch, and its neighbours are a few patches. The mask stays as
it was written, about the tokens' own positions: a program under a layout reads what it knows of each slot's token from
tables (:mod:`attnlang.passes.tabulate`), so one mechanism serves every order there is. q, k and v are permuted on the
way in and o and lse on the way out; the run time does that inside the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from attnlang.ir import BOOL, Environment, Program, UsageError, evaluate
from attnlang.passes.tabulate import Table, Tabulated, tabulate

from .classify import numbers
from .orders import Dim, Order, Patches, Tokens

__all__ = ["LaidOut", "Layout", "lay_out"]

Tensor = torch.Tensor

_INTS = (torch.int16, torch.int32, torch.int64)
_AXES = ("q", "k")


@dataclass(frozen=True)
class Layout:
    """Orders of the queries and of the keys, as many of the one as of the other.

    ``heads`` says which order each head uses; empty: every head the first. ``key_tile`` is the number of keys in a tile
    that suits the layout on a CPU, 0 where the usual one does.
    """

    q: tuple[Order, ...]
    k: tuple[Order, ...]
    heads: tuple[int, ...] = ()
    key_tile: int = 0

    def __post_init__(self) -> None:
        if len(self.q) != len(self.k) or not self.q:
            raise UsageError(
                f"a layout needs as many orders of queries as of keys, got {len(self.q)} and {len(self.k)}"
            )
        if any(not 0 <= n < len(self.q) for n in self.heads):
            raise UsageError(f"a layout of {len(self.q)} order(s) cannot give a head order {max(self.heads)}")
        if len(self.q) > 1 and not self.heads:
            raise UsageError("a layout of several orders says which one each head uses")
        for orders in (self.q, self.k):
            if len({o.count for o in orders}) > 1:
                raise UsageError("all orders of an axis must have the same number of tokens")

    @classmethod
    def both(cls, *orders: Order, heads: tuple[int, ...] = (), key_tile: int = 0) -> Layout:
        """The same orders for queries and keys."""
        return cls(orders, orders, heads, key_tile)

    @classmethod
    def patches(cls, extents: tuple[int, ...], sides: tuple[int, ...], residues: int = 1, shift: int = 0) -> Layout:
        """Patches of ``sides`` on a grid that queries and keys share."""
        if len(sides) != len(extents):
            raise UsageError(f"patches of {len(sides)} side(s) do not fit a grid of {len(extents)} coordinate(s)")
        if min((*sides, residues)) < 1:
            raise UsageError("the sides of a patch and the number of residue classes are at least 1")
        return cls.both(Patches(tuple(Dim(n, s, residues, shift) for n, s in zip(extents, sides, strict=True))))

    @classmethod
    def given(cls, q: Tensor, k: Tensor | None = None) -> Layout:
        """The order that tensors list: int [tokens], or [heads, tokens] for an order of each head's own.

        Raises:
            UsageError: a row is not a permutation.
        """
        k = q if k is None else k
        if q.dim() != k.dim() or q.dim() not in (1, 2):
            raise UsageError("orders of tokens are int tensors [tokens] or [heads, tokens]")
        if q.dim() == 1:
            return cls((Tokens(q),), (Tokens(k),))
        rows = [tuple(Tokens(row) for row in t) for t in (q, k)]
        return cls(rows[0], rows[1], tuple(range(len(q))))

    @property
    def per_head(self) -> bool:
        """Whether heads differ in their order."""
        return len(self.q) > 1

    @property
    def name(self) -> str:
        """What people are told it is."""
        names = [a.name if a.name == b.name else f"{a.name} / {b.name}" for a, b in zip(self.q, self.k, strict=True)]
        if not self.per_head:
            return names[0]
        used = [self.heads.count(n) for n in range(len(names))]
        return ", ".join(f"{name} in {n} head{'s' * (n != 1)}" for name, n in zip(names, used, strict=True) if n)

    def orders(self, axis: str) -> tuple[Order, ...]:
        return self.q if axis == "q" else self.k

    @cached_property
    def _tokens(self) -> dict[str, Tensor]:
        found = {"q": torch.stack([o.tokens() for o in self.q])}
        found["k"] = found["q"] if self.k == self.q else torch.stack([o.tokens() for o in self.k])
        return found

    def tokens(self, axis: str) -> Tensor:
        """Return int64 [orders, slots]: the token in each slot."""
        return self._tokens[axis]

    def check(self, sizes: Mapping[str, int]) -> None:
        """Check that the layout is one of these lengths.

        Raises:
            UsageError: another number of tokens or of heads, or heads that share keys differ in their order.
        """
        for axis, length in (("q", sizes["Lq"]), ("k", sizes["Lk"])):
            if (count := self.orders(axis)[0].count) != length:
                raise UsageError(f"the layout orders {count} tokens of {axis}, but there are {length}")
        if not self.heads:
            return
        heads, shared = sizes.get("H", 1), sizes.get("Hkv", sizes.get("H", 1))
        if len(self.heads) != heads:
            raise UsageError(f"the layout is for {len(self.heads)} heads, but there are {heads}")
        group = heads // max(1, shared)
        for first in range(0, heads, max(1, group)):
            if len(set(self.heads[first : first + group])) > 1:
                raise UsageError(f"heads {first} to {first + group - 1} share their keys, so they need one order")


@dataclass(frozen=True)
class LaidOut:
    """A program under a layout at known sizes, parameters and captured tensors.

    ``program`` reads ``tables``, which ``tensors`` has beside the captured ones. Its slots are positions of q, k and v
    after permutation. ``sizes`` has the sizes that the tables add.
    """

    layout: Layout
    program: Program
    sizes: dict[str, int]
    captured: dict[str, Tensor]
    tables: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.captured, **self.tables}


def lay_out(
    program: Program,
    layout: Layout,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
) -> LaidOut:
    """Return ``program`` with its slots in the order of ``layout``.

    Tables live on ``device``, by default where the captured tensors do.

    Time and memory are linear in the lengths.

    Raises:
        UsageError: the layout is not one of these sizes.
    """
    layout.check(sizes)
    made = tabulate(program, layout.per_head)
    captured = dict(tensors or {})
    device = device or next((t.device for t in captured.values()), torch.device("cpu"))
    tokens = {axis: layout.tokens(axis).to(device) for axis in _AXES}
    tables = fill(made, tokens, layout.heads, sizes, numbers(params or {}, program), captured)
    extra = {made.orders: len(layout.q)} if made.orders else {}
    return LaidOut(layout, made.program, {**sizes, **extra}, captured, tables)


def fill(
    made: Tabulated,
    tokens: Mapping[str, Tensor],
    heads: tuple[int, ...],
    sizes: Mapping[str, int],
    params: Mapping[str, Any],
    captured: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the tables of a tabulated program; ``tokens`` int64 [orders, slots] for each axis are its positions."""
    device = tokens["q"].device
    which = torch.tensor(heads or [0], device=device)
    out = {t.name: _fill(t, tokens, which, sizes, params, captured) for t in made.tables}
    if made.order_of_head:
        out[made.order_of_head] = which.to(torch.int32)
    return out


def _fill(
    table: Table,
    tokens: Mapping[str, Tensor],
    which: Tensor,
    sizes: Mapping[str, int],
    params: Mapping[str, Any],
    captured: Mapping[str, Tensor],
) -> Tensor:
    at = table.axes[-1]
    places = tokens[at]
    if "o" not in table.axes:
        places = places[which] if "h" in table.axes else places[0]
    device, rank = places.device, len(table.axes)
    indices = {at: places}
    shape = [places.shape[-1]]
    for back, axis in enumerate(reversed(table.axes[:-1]), 2):
        n = len(places) if axis == "o" else sizes["B" if axis == "b" else "H"]
        shape.insert(0, n)
        if axis != "o":
            indices[axis] = torch.arange(n, device=device).view(n, *(1,) * (back - 1))
    assert len(shape) == rank
    values = evaluate(table.expr, Environment(indices, sizes, params, captured, device=device))
    return _narrow(values.expand(shape), table)


def _narrow(values: Tensor, table: Table) -> Tensor:
    """Store ``values`` in the least dtype that holds them, so that kernels compute with them in 32 bits."""
    if table.expr.type is BOOL:
        return values.contiguous()
    low, high = (int(x) for x in values.aminmax()) if values.numel() else (0, 0)
    dtype = next(d for d in _INTS if torch.iinfo(d).min <= low and high <= torch.iinfo(d).max)
    return values.to(dtype).contiguous()
