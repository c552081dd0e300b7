"""ATen views, indexing, joins and constant tensors, registered as array operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import shapes
from .arrays import Pull, reshape
from .errors import TraceError, current_location
from .pointwise import POINTWISE
from .registry import TABLE, entry, pointwise_call
from .state import current, ir_type
from .tensor import TracedTensor, pull_of, wrap

__all__ = ["swap"]

Tensor = torch.Tensor


def _view(change: Callable[..., Pull]) -> Callable[..., TracedTensor]:
    return lambda x, *args, **kwargs: wrap(change(pull_of(x), *args, **kwargs), x.dtype)


def _select(array: Pull, dim: int, i: int) -> Pull:
    dim = dim % max(len(array.shape), 1)
    return shapes.select(array, dim, shapes._constant(i, array, dim))


def _slice(array: Pull, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Pull:
    return shapes.slice_(array, dim % len(array.shape), slice(start, end, step))


def swap(array: Pull, a: int, b: int) -> Pull:
    order = list(range(len(array.shape)))
    if order:
        order[a], order[b] = order[b], order[a]
    return shapes.permute(array, order)


def _squeeze(array: Pull, dims: Any = None) -> Pull:
    return shapes.squeeze(array, (dims,) if isinstance(dims, int) else dims)


def _reshape(array: Pull, shape: list[int]) -> Pull:
    target = tuple(torch.empty(array.shape, device="meta").reshape(shape).shape)
    for size, n in zip(array.sizes, array.shape, strict=True):
        if target != array.shape:
            current().bake(size, n)
    return reshape(array, target)


for _names, _change in (
    (("select",), _select),
    (("slice",), _slice),
    (("transpose", "swapaxes", "t"), lambda x, a=0, b=-1: swap(x, a, b)),
    (("permute",), shapes.permute),
    (("unsqueeze",), shapes.unsqueeze),
    (("squeeze",), _squeeze),
    (("expand",), lambda x, shape, implicit=False: shapes.expand(x, shape)),
    (("view", "reshape", "_unsafe_view", "_reshape_alias"), lambda x, shape, *_: _reshape(x, shape)),
    (("diagonal",), shapes.diagonal),
):
    entry(*_names, view=True)(_view(_change))
for _names, _change in (
    (("flip",), shapes.flip),
    (("roll",), lambda x, shifts, dims=(): shapes.roll(x, shifts, dims)),
    (("select_copy",), _select),
):
    entry(*_names)(_view(_change))


@entry("view_as_real", "view_as_complex", "masked_select", "nonzero")
def _never(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise TraceError(
        "this operation gives a tensor whose size depends on values known only when the kernel runs",
        "use torch.where(mask, a, b)",
        current_location(),
    )


@entry("unbind", view=True)
def _unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    return [TABLE["select"](x, dim, i) for i in range(x.shape[dim])]


@entry("split", view=True)
def _split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    return [TABLE["slice"](x, dim, i, i + size) for i in range(0, x.shape[dim], size)]


@entry("split_with_sizes", view=True)
def _split_sizes(x: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    return [TABLE["slice"](x, dim, i, i + n) for i, n in zip(starts, sizes, strict=True)]


def _joined(tensors: list[Tensor]) -> tuple[list[Pull], torch.dtype]:
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    type_ = ir_type(dtype)
    arrays = [pull_of(t) for t in tensors]
    cast = POINTWISE["alias"]
    return [Pull(a.shape, type_, lambda w, a=a: cast(type_, a.at(w)), a.sizes) for a in arrays], dtype  # type: ignore[misc]


@entry("cat", "concatenate")
def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    arrays, dtype = _joined(tensors)
    for a in arrays:
        current().bake(a.sizes[dim], a.shape[dim])
    return wrap(shapes.concatenate(arrays, dim), dtype)


@entry("stack")
def _stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
    arrays, dtype = _joined(tensors)
    rank = len(arrays[0].shape) + 1
    return wrap(shapes.concatenate([shapes.unsqueeze(a, dim) for a in arrays], dim % rank), dtype)


@entry("index", "_unsafe_index")
def _index(x: Tensor, indices: list[Tensor | None]) -> Tensor:
    return wrap(shapes.index(pull_of(x), [None if i is None else pull_of(i) for i in indices]), x.dtype)


@entry("index_select")
def _index_select(x: Tensor, dim: int, where: Tensor) -> Tensor:
    return wrap(shapes.index_select(pull_of(x), dim, pull_of(where)), x.dtype)


@entry("gather")
def _gather(x: Tensor, dim: int, where: Tensor, **_: Any) -> Tensor:
    return wrap(shapes.gather(pull_of(x), dim, pull_of(where)), x.dtype)


@entry("take")
def _take(x: Tensor, where: Tensor) -> Tensor:
    return wrap(shapes.take_flat(pull_of(x), pull_of(where)), x.dtype)


@entry("embedding")
def _embedding(weight: Tensor, where: Tensor, *_: Any) -> Tensor:
    return wrap(shapes.index(pull_of(weight), [pull_of(where)]), weight.dtype)


# values made of constants --------------------------------------------------------------------------------------------


def _filled(value: Any, x: Tensor, shape: list[int], dtype: torch.dtype | None) -> Tensor:
    out = dtype or x.dtype
    node = POINTWISE["full_like"](ir_type(out), None, value)
    return wrap(Pull(shape, node.type, lambda _: node), out)


@entry("new_zeros", "new_empty")
def _new_zeros(x: Tensor, shape: list[int], dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _filled(0, x, shape, dtype)


@entry("new_ones")
def _new_ones(x: Tensor, shape: list[int], dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _filled(1, x, shape, dtype)


@entry("new_full")
def _new_full(x: Tensor, shape: list[int], value: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _filled(value, x, shape, dtype)


@entry("_local_scalar_dense", "item")
def _item(x: TracedTensor) -> Any:
    return x._convert("item")


@entry("is_nonzero")
def _is_nonzero(x: TracedTensor) -> Any:
    return bool(x._convert("bool"))


@entry("log_sigmoid_forward")
def _log_sigmoid(x: Tensor) -> Any:
    out = pointwise_call(POINTWISE["log_sigmoid"], x.dtype, tuple(x.shape), (x,), {})
    return out, out
