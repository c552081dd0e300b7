"""Gradients of rows stages as rows stages, so that the same kernels make them.

An element that is read at its own place gets its gradient there. One that is read at another feature, as in
``Q[b, h, q, d - 1]``, belongs to that feature, which the numbers of a call tell: the map of features must be one to one
wherever the derivative is not 0. Gradients of tensors without some of the axes are sums over these.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from attnlang.ir import (
    FLOAT,
    INT,
    Const,
    Environment,
    Expr,
    Index,
    Load,
    Map,
    evaluate,
    index_axes,
    input_names,
    postorder,
    substitute,
)
from attnlang.ir.build import all_of, const, op
from attnlang.passes.row_derivatives import Let, adjoint, support
from attnlang.passes.simplify import simplify

__all__ = ["GRADIENT", "RowGradient", "gradient_of"]

Tensor = torch.Tensor

GRADIENT = "gradient"
"""Name of the tensor that holds the gradient of the rows."""
_PLACE = tuple(Index(axis) for axis in "bhqd")
_D = _PLACE[3]
_ZERO = Const(0.0, FLOAT)


@dataclass(frozen=True)
class RowGradient:
    """The ``stage`` whose rows, summed over all axes that are not among ``axes``, are the gradient of a tensor.

    It reads ``tables``, the gradient of the rows, and what the stage itself reads.
    """

    stage: Map
    axes: str
    tables: Mapping[str, Tensor] = field(default_factory=dict)

    def summed(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Return the gradient, of ``shape``, from the rows of the stage."""
        missing = [i for i, axis in enumerate("bhqd") if axis not in self.axes]
        found = rows.sum(missing) if missing else rows
        if found.shape == shape:
            return found
        whole = found.new_zeros(shape)  # of a tensor with more elements than the rows read
        whole[tuple(slice(n) for n in found.shape)] = found
        return whole


@dataclass(frozen=True)
class _Read:
    """How a stage reads a tensor: the axes of its dimensions, the loads, and what each of them gets at (b, h, q, d)."""

    axes: str
    loads: tuple[Load, ...]
    values: tuple[Expr, ...]
    lets: tuple[Let, ...]


@functools.lru_cache(maxsize=256)
def _read(stage: Map, name: str) -> _Read | None:
    """None where a dimension is not that of one axis, or is read at other places than features are."""
    loads = tuple(n for n in postorder(*stage.roots()) if isinstance(n, Load) and n.tensor == name)
    found = {tuple(_axis(i) for i in load.indices) for load in loads}
    if len(found) != 1:
        return None
    (axes,) = found
    places = ["bhqd".find(axis) if axis else -1 for axis in axes]
    if -1 in places or places != sorted(set(places)):
        return None
    made = adjoint(stage, loads, Load(GRADIENT, _PLACE, FLOAT))
    return None if made is None else _Read("".join(axes), loads, made[1], made[0])


def _axis(index: Expr) -> str:
    """The axis of a dimension that is read along all of it, or along features in some order."""
    if isinstance(index, Index):
        return index.axis
    return "d" if index_axes(index) == {"d"} and not input_names(index) else ""


def gradient_of(stage: Map, name: str, env: Environment, extents: tuple[int, ...]) -> RowGradient | None:
    """Return how rows give the gradient of the tensor ``name``, None where that is not known."""
    read = _read(stage, name)
    shape = env.tensor(name).shape
    if read is None or GRADIENT in env.tensors or GRADIENT in env.operands:
        return None
    if any(n < extents["bhqd".index(axis)] for n, axis in zip(shape, read.axes, strict=True)):
        return None
    total: Expr = _ZERO
    tables: dict[str, Tensor] = {}
    for load, value in zip(read.loads, read.values, strict=True):
        moved = value
        if "d" in read.axes and load.indices[-1] is not _D:
            table = f"{name}_from{len(tables)}"
            found = _at_its_feature(load.indices[-1], value, table, shape[-1], replace(env, indices={}), extents[3])
            if found is None or table in env.tensors:
                return None
            moved, more = found
            tables |= more
        total = op("add", total, moved)
    made = Map(f"{stage.name}_{name}", stage.extents, simplify(total), read.lets)
    return RowGradient(made, read.axes, tables)


def _at_its_feature(
    index: Expr, value: Expr, table: str, length: int, env: Environment, features: int
) -> tuple[Expr, dict[str, Tensor]] | None:
    """``value``, of feature d, at the feature ``index`` that it belongs to."""
    at = torch.arange(features, device=env.device)
    here = replace(env, indices={"d": at})
    to = evaluate(index, here).expand(features)
    some = evaluate(support(value), here).expand(features)
    if length != features or bool((some & ((to < 0) | (to >= length))).any()):
        return None
    places, sources = to[some], at[some]
    if not len(places):
        return _ZERO, {}
    if len(places.unique()) < len(places):
        return None
    steps = (places - sources).unique()
    if len(steps) == 1:
        source = op("sub", _D, const(int(steps)))
        inside = all_of(op("ge", source, 0), op("lt", source, features))
        return op("where", inside, substitute(value, {_D: source}), _ZERO), {}
    back = torch.full((length,), -1, device=env.device)
    back[places] = sources
    source = Load(table, (_D,), INT)
    return op("where", op("ge", source, 0), substitute(value, {_D: source}), _ZERO), {table: back}
