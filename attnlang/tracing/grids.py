"""Coordinates of traced indices that count the points of a grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attnlang.ir import INT, Const, Expr, Index, Input, Load, build, postorder

from .errors import TraceError, current_location
from .named import NamedTensor
from .state import current
from .tensor import TracedTensor, pull_of, wrap

__all__ = ["on_grid"]


def on_grid(index: Any, extents: Mapping[str, Any]) -> tuple[TracedTensor, ...]:
    """Return the coordinates of a traced ``index`` on a grid of these ``extents``: ints, expressions, traced ints.

    Where the index is ``q`` or ``k``, the program gets the grid of this axis, if it has none yet.

    Raises:
        TraceError: the index or an extent is no int, has dimensions, or an extent depends on the pair.
    """
    where = _int("a grid is given", index)
    shape = tuple((name, _extent(name, extent)) for name, extent in extents.items())
    if isinstance(where, Index) and where.axis in ("q", "k"):
        current().grids.setdefault(where.axis, shape)
    return tuple(wrap(e, torch.int64) for e in build.coordinates(where, [e for _, e in shape]))


def _extent(name: str, value: Any) -> Expr:
    found = _int(f"the extent of {name!r} is", value)
    for node in postorder(found):
        if isinstance(node, (Index, Load, Input)):
            what = node.axis if isinstance(node, Index) else node.tensor if isinstance(node, Load) else node.name
            raise TraceError(
                f"the extent of {name!r} reads {what}; a grid is the same for all pairs",
                "make extents of numbers and sizes, for example al.grid(y=Lq // width, x=width)",
                current_location(),
            )
    if isinstance(found, Const) and found.value < 1:
        raise TraceError(f"the extent of {name!r} is {found.value}", "an extent is at least 1", current_location())
    return found


def _int(what: str, value: Any) -> Expr:
    """The expression of a traced int, or of an int."""
    if type(value) is NamedTensor:
        raise value.refused()
    if isinstance(value, torch.Tensor):  # first: a lifted number that is asked whether it is anything else is baked
        array = pull_of(value)
        if not array.shape and array.type is INT:
            return array.at(())
        kind = f"a tensor of shape {list(array.shape)}" if array.shape else f"a {array.type} value"
    elif isinstance(value, Expr):
        return value
    elif isinstance(value, int) and not isinstance(value, bool):
        return Const(value, INT)
    else:
        kind = f"a {type(value).__name__}"
    raise TraceError(f"{what} {kind}", "it is an int without dimensions, such as q", current_location())
