"""Grids of positions: objects that turn an index into coordinates, inside of functions that are traced and outside."""

from __future__ import annotations

import functools
import keyword
from collections import namedtuple
from typing import Any

import torch

from attnlang.ir import INT, Const, Environment, Expr, UsageError, build, evaluate
from attnlang.tracing import TracedTensor, on_grid, wrap

from .reading import SIZES, in_words, is_function, sizes_asked
from .specs import Length

__all__ = ["Grid", "grid"]

MOST = 3
"""Coordinates of a grid."""


class Grid:
    """A grid of positions, made with :func:`grid`: ``grid(index)`` are coordinates, by name and in order.

    Extents are attributes, so that numbers among them become parameters as other numbers of functions do.
    """

    def __init__(self, /, **extents: Length) -> None:
        vars(self).update(extents)

    def __call__(self, index: Any) -> Any:
        """Return the coordinates of ``index``, an int or an int tensor, as a named tuple.

        Raises:
            UsageError: an extent is known in a program only, or the index holds no ints.
            TraceError: the index or an extent is not what a grid can be made of.
        """
        extents = vars(self)
        point = _point(tuple(extents))
        if isinstance(index, TracedTensor):
            return point(*on_grid(index, {name: _traced(name, value) for name, value in extents.items()}))
        if unknown := [name for name, value in extents.items() if type(value) is not int]:
            raise UsageError(f"the extent of {unknown[0]!r} is known in the function of a program only")
        if type(index) is not int and not isinstance(index, torch.Tensor):
            raise UsageError(f"a grid is given a {type(index).__name__}; an index is an int or an int tensor")
        where = torch.as_tensor(index)
        if where.dtype is torch.bool or where.is_floating_point() or where.is_complex():
            raise UsageError(f"a grid is given a {where.dtype} tensor; an index is an int or an int tensor")
        numbers = [Const(value, INT) for value in extents.values()]
        found = build.coordinates(build.q, numbers)
        return point(*(evaluate(e, Environment({"q": where}, device=where.device)) for e in found))

    def __repr__(self) -> str:
        return f"grid({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def grid(**extents: Length) -> Any:
    """A grid whose points positions count, the last coordinate fastest, such as ``grid(y=height, x=width)``.

    Called with an index, inside of functions of a program, it gives the coordinates: ``grid(q).y``, or
    ``y, x = grid(q)``. An extent is a number (a parameter of the program where functions close over the grid), a size
    in the language's words, a function of sizes, or, inside of a function, what that computes from sizes. The first
    grid that ``q`` or ``k`` is given to tells layouts and pictures how tokens lie.

    Raises:
        UsageError: not one to three coordinates with names and extents of at least 1.
    """
    if not 1 <= len(extents) <= MOST:
        hint = "for example al.grid(y=height, x=width)"
        raise UsageError(f"a grid has one to three coordinates, got {len(extents)}; {hint}")
    for name, value in extents.items():
        if name.startswith("_") or keyword.iskeyword(name):
            raise UsageError(f"a coordinate cannot be called {name!r}")
        if not isinstance(value, (torch.Tensor, str)) and not is_function(value):
            if isinstance(value, bool) or not isinstance(value, int):
                hint = "give an int, a size such as 'Lq // 8', or a function such as lambda Lq: Lq // 8"
                raise UsageError(f"the extent of {name!r} is {value!r}; {hint}")
            if value < 1:
                raise UsageError(f"the extent of {name!r} is at least 1, got {value}")
    return Grid(**extents)


@functools.lru_cache(64)
def _point(names: tuple[str, ...]) -> Any:
    return namedtuple("Point", names)


def _traced(name: str, value: Length) -> Any:
    """An extent inside of a function that is traced."""
    kind = f"the extent of {name!r}"
    if isinstance(value, (torch.Tensor, Expr)):
        return value
    if isinstance(value, str):
        return in_words(kind, value)
    if not is_function(value):
        return value
    return value(*(wrap(SIZES[n], torch.int64) for n in sizes_asked(kind, value)))
