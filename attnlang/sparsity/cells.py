"""Large tables in cells: the least and the largest value of every square of elements, made where the table is.

A table [..., rows, columns] has as many elements as there are pairs, and what the analysis would add to answer exactly
about any box of it has several times as many. Of squares of 8 x 8 elements it needs 1/32 of them, and boxes made of
whole squares, which tiles are that read a table at q and k, are answered as exactly. Others are rounded out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from attnlang.ir import BOOL, FLOAT, Type

__all__ = ["SIDE", "Cells", "cells", "is_large"]

Tensor = torch.Tensor

SIDE = 8
"""Rows and columns of a cell."""
LARGE = 1 << 22
"""Elements up to which a table is looked at one by one: all tiles of such lengths are found at once in any case."""
STRIP = 1 << 21
"""Elements that are worked on at a time, which bounds the memory of what lies between."""


@dataclass(frozen=True)
class Cells:
    """Tensors [..., ceil(rows / SIDE), ceil(columns / SIDE)] in the dtype of the table, on its device.

    NaN counts as neither low nor high; ``nan`` (0-d bool) says whether there is any.
    """

    low: Tensor
    high: Tensor
    nan: Tensor


def is_large(tensor: Tensor) -> bool:
    """Whether a captured tensor is a table that is better summarised in cells."""
    return tensor.dim() >= 2 and tensor.numel() > LARGE and min(tensor.shape[-2:]) > SIDE**2


def cells(tensor: Tensor, type_: Type) -> Cells:
    """Return the cells of ``tensor``, without waiting for its device."""
    if type_ is BOOL and tensor.dtype is not torch.bool:
        tensor = tensor != 0
    lows, highs = [], []
    nan = torch.zeros((), dtype=torch.bool, device=tensor.device)
    for strip in _strips(tensor):
        low = high = strip
        if type_ is FLOAT and strip.is_floating_point():
            missing = strip.isnan()
            nan = nan | missing.any()
            low, high = strip.masked_fill(missing, torch.inf), strip.masked_fill(missing, -torch.inf)
        lows.append(_reduced(_reduced(low, -2, torch.amin), -1, torch.amin))
        highs.append(_reduced(_reduced(high, -2, torch.amax), -1, torch.amax))
    return Cells(torch.cat(lows, -2), torch.cat(highs, -2), nan)


def _strips(tensor: Tensor) -> Iterator[Tensor]:
    rows = tensor.shape[-2]
    step = max(1, STRIP * rows // tensor.numel() // SIDE) * SIDE
    for start in range(0, rows, step):
        yield tensor.narrow(-2, start, min(step, rows - start))


def _reduced(t: Tensor, dim: int, fn: Callable[..., Tensor]) -> Tensor:
    """One value of every SIDE along ``dim``; the last may stand for fewer."""
    count = t.shape[dim]
    whole = count // SIDE * SIDE
    # dim counts from the end: after the split it is the elements of a cell
    parts = [fn(t.narrow(dim, 0, whole).unflatten(dim, (-1, SIDE)), dim=dim)] if whole else []
    if whole < count:
        parts.append(fn(t.narrow(dim, whole, count - whole), dim=dim, keepdim=True))
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
