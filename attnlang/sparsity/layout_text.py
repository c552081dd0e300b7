"""Layouts in words, for options and keyword arguments: ``8x8``, ``8x1%2``, ``7x7+3``, ``hilbert``, ``transposed``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from attnlang.ir import UsageError

from .layout import Layout
from .orders import Dim, Hilbert, Order, Patches, row_major

__all__ = ["SYNTAX", "parse_layout"]

SYNTAX = "auto, plain, transposed, hilbert, or sides of patches such as 8x8, 8x1%2 (residue classes), 7x7+3 (shifted)"

_PATCHES = re.compile(r"(?P<sides>\d+(x\d+)*)(%(?P<residues>\d+(x\d+)*))?(\+(?P<shifts>\d+(x\d+)*))?\Z")


def parse_layout(text: str, grids: Mapping[str, tuple[int, ...]]) -> Layout:
    """Return the layout that ``text`` names for the grids of ``q`` and ``k`` (see :data:`SYNTAX`, ``auto`` aside).

    A single number counts for every coordinate.

    Raises:
        UsageError: not of that form, or with another number of coordinates than a grid.
    """
    words = text.strip().lower()
    found = [_order(words, text, grids[axis]) for axis in ("q", "k")]
    return Layout((found[0],), (found[1],))


def _order(words: str, text: str, extents: tuple[int, ...]) -> Order:
    count = len(extents)
    if words == "plain":
        return row_major(extents)
    if words == "transposed":
        return Patches(tuple(map(Dim, extents)), tuple(reversed(range(count))))
    if words == "hilbert":
        return Hilbert(extents)
    match = _PATCHES.match(words)
    if match is None:
        raise UsageError(f"unknown layout {text!r}; there is {SYNTAX}")

    def numbers(name: str, otherwise: int, least: int) -> tuple[int, ...]:
        parts = tuple(map(int, match[name].split("x"))) if match[name] else (otherwise,)
        parts = parts * count if len(parts) == 1 else parts
        if len(parts) != count:
            shape = " x ".join(map(str, extents))
            raise UsageError(f"layout {text!r} has {len(parts)} coordinates, the grid {shape} has {count}")
        if min(parts) < least:
            raise UsageError(f"the {name} of layout {text!r} must be at least {least}")
        return parts

    sides, residues, shifts = numbers("sides", 1, 1), numbers("residues", 1, 1), numbers("shifts", 0, 0)
    return Patches(tuple(map(Dim, extents, sides, residues, shifts)))
