"""Orders of the tokens of one axis: which token is in which slot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from attnlang.ir import UsageError

__all__ = ["Dim", "Hilbert", "Order", "Patches", "Tokens", "coordinates", "row_major"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Dim:
    """One coordinate of a grid: its extent, the side of a patch, the number of residue classes kept apart, a shift.

    Patches start at coordinate ``shift`` and go round the border, as a cyclic roll of the grid would have it. Nothing
    has to divide anything: the last patches of a side are smaller.
    """

    extent: int
    tile: int = 1
    residues: int = 1
    shift: int = 0

    @property
    def patches(self) -> int:
        """Patches of the largest residue class."""
        members = -(-self.extent // self.residues)
        return -(-members // self.tile)


@dataclass(frozen=True)
class Patches:
    """Tokens of a grid by residue class, then by patch, then inside the patch.

    ``major`` lists the coordinates from the one that runs slowest to the one that runs fastest, in each of the three;
    empty: as they are. All sides 1 is the plain order, with another ``major`` a transposed one; side 1 in the fastest
    coordinate alone makes strips, of which any stretch of slots is a patch.
    """

    dims: tuple[Dim, ...]
    major: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return math.prod(d.extent for d in self.dims)

    @property
    def name(self) -> str:
        dims = self.dims
        major = self.major or tuple(range(len(dims)))
        if all(d.tile == 1 for d in dims):
            text = "plain order" if major == tuple(sorted(major)) else f"transposed order {_sides(major)}"
        else:
            text = "patches of " + _sides(d.tile for d in dims)
            text += "" if major == tuple(sorted(major)) else f" in transposed order {_sides(major)}"
        if any(d.residues > 1 for d in dims):
            text += " in residue classes modulo " + _sides(d.residues for d in dims)
        if any(d.shift for d in dims):
            text += " shifted by " + _sides(d.shift for d in dims)
        return text

    def tokens(self) -> Tensor:
        """Return int64 [count]: the token in each slot."""
        digits: list[list[tuple[np.ndarray, int]]] = [[], [], []]
        for d, at in zip(self.dims, coordinates([d.extent for d in self.dims]), strict=True):
            moved = (at - d.shift) % d.extent if d.shift else at
            along = moved // d.residues
            digits[0].append((moved % d.residues, d.residues))
            digits[1].append((along // d.tile, d.patches))
            digits[2].append((along % d.tile, d.tile))
        key, keys = np.zeros(self.count, np.int64), 1
        for group in digits:
            for n in self.major or range(len(self.dims)):
                digit, base = group[n]
                if base > 1:
                    key, keys = key * base + digit, keys * base
        return _by_key(key, keys)


@dataclass(frozen=True)
class Hilbert:
    """Tokens of a grid along a Hilbert curve through the smallest cube of a power of two around it."""

    extents: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.extents)

    @property
    def name(self) -> str:
        return "Hilbert order"

    def tokens(self) -> Tensor:
        """Return int64 [count]: the token in each slot (Skilling's transposition of coordinates)."""
        x = coordinates(self.extents)
        bits = max(1, max((n - 1).bit_length() for n in self.extents))
        for bit in reversed(range(1, bits)):
            low = (1 << bit) - 1
            for i in range(len(x)):
                here = (x[i] >> bit & 1).astype(bool)
                swap = np.where(here, 0, (x[0] ^ x[i]) & low)
                x[0] = np.where(here, x[0] ^ low, x[0] ^ swap)
                if i:
                    x[i] = x[i] ^ swap
        for i in range(1, len(x)):
            x[i] = x[i] ^ x[i - 1]
        flip = np.zeros_like(x[0])
        for bit in reversed(range(1, bits)):
            flip = np.where((x[-1] >> bit & 1).astype(bool), flip ^ ((1 << bit) - 1), flip)
        key = np.zeros_like(x[0])
        for bit in reversed(range(bits)):
            for c in x:
                key = key * 2 + ((c ^ flip) >> bit & 1)
        return _by_key(key, 1 << bits * len(x))


@dataclass(frozen=True, eq=False)
class Tokens:
    """A given order: ``given`` int [count] holds the token in each slot."""

    given: Tensor

    def __post_init__(self) -> None:
        t = self.given
        if t.dim() != 1 or t.dtype not in (torch.int16, torch.int32, torch.int64):
            raise UsageError(f"an order of tokens is an int tensor of one dimension, got {t.dtype} {tuple(t.shape)}")
        if not torch.equal(t.cpu().long().sort().values, torch.arange(len(t))):
            raise UsageError(f"an order of {len(t)} tokens must hold every number from 0 to {len(t) - 1} once")
        object.__setattr__(self, "given", t.detach().cpu().long().clone())

    @property
    def count(self) -> int:
        return len(self.given)

    @property
    def name(self) -> str:
        return "a given order"

    def tokens(self) -> Tensor:
        """Return int64 [count]: the token in each slot."""
        return self.given


Order: TypeAlias = Patches | Hilbert | Tokens


def row_major(extents: tuple[int, ...]) -> Patches:
    """The order in which tokens are given."""
    return Patches(tuple(map(Dim, extents)))


def coordinates(extents: tuple[int, ...] | list[int]) -> list[np.ndarray]:
    """Return the coordinates of every token of a grid whose last coordinate runs fastest, int64 [tokens] each."""
    rest, out = np.arange(math.prod(extents)), []
    for n in reversed(extents):
        out.append(rest % max(n, 1))
        rest = rest // max(n, 1)
    return out[::-1]


def _sides(numbers: Iterable[int]) -> str:
    return " x ".join(map(str, numbers))


def _by_key(key: np.ndarray, keys: int) -> Tensor:
    """Tokens by ascending ``key`` [tokens], which are different numbers below ``keys``."""
    if keys > 4 * len(key):
        return torch.from_numpy(np.argsort(key))
    at = np.full(keys, -1)
    at[key] = np.arange(len(key))
    return torch.from_numpy(at[at >= 0])
