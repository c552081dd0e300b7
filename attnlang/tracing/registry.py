"""How ATen operations are registered, and how pointwise ones are applied to traced arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnlang.ir import Expr

from .arrays import Pull, broadcast_index, broadcast_sizes
from .state import current, ir_type
from .tensor import TracedTensor, pull_of, wrap

__all__ = ["TABLE", "VIEWS", "entry", "metadata", "pointwise_call"]

Tensor = torch.Tensor
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# metadata: torch itself says what dtype and shape an operation has ---------------------------------------------------

_meta_cache: dict[Any, tuple[torch.dtype, tuple[int, ...]]] = {}


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype, tuple(value.shape))
    if isinstance(value, (list, tuple)):
        return tuple(_signature(v) for v in value)
    if isinstance(value, (bool, int, float)):
        return type(value)
    return value


SMALL = 256
"""Elements up to which a stand-in is a real tensor: meta tensors make PyTorch import its compiler, seconds of work."""


def _stand_in(value: Any) -> Any:
    return torch.ones(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def _to_meta(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def metadata(func: Any, args: Args, kwargs: Kwargs) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return dtype and shape of the result of a pointwise operation."""
    kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout", "memory_format")}
    key = (func, _signature(args), tuple((k, _signature(v)) for k, v in kwargs.items()))
    found = _meta_cache.get(key)
    if found is None:
        large = any(isinstance(v, Tensor) and v.numel() > SMALL for v in (*args, *kwargs.values()))
        make = _to_meta if large else _stand_in  # one device for all
        out = func(*map(make, args), **{k: make(v) for k, v in kwargs.items()})
        out = out[0] if isinstance(out, tuple) else out
        found = out.dtype, tuple(out.shape)
        if len(_meta_cache) < 4096:
            _meta_cache[key] = found
    return found


def pointwise_call(
    build: Callable[..., Expr], dtype: torch.dtype, shape: tuple[int, ...], args: Args, kwargs: Kwargs
) -> TracedTensor:
    """Apply a scalar builder to every element of the broadcast of the tensors among the arguments."""
    type_ = ir_type(dtype)
    arrays = {n: pull_of(a) for n, a in enumerate(args) if isinstance(a, Tensor)}
    named = {k: pull_of(a) for k, a in kwargs.items() if isinstance(a, Tensor)}
    state = current()
    for array in (*arrays.values(), *named.values()):
        for own, n, size in zip(range(-len(array.shape), 0), array.shape, array.sizes, strict=True):
            if n == 1 and shape[own] != 1:
                state.bake(size, 1)

    def fn(w: tuple[Expr, ...]) -> Expr:
        values = [
            arrays[n].at(broadcast_index(w, arrays[n].shape, shape)) if n in arrays else a for n, a in enumerate(args)
        ]
        more = {
            k: named[k].at(broadcast_index(w, named[k].shape, shape)) if k in named else v for k, v in kwargs.items()
        }
        return build(type_, *values, **more)

    if not shape:
        result = wrap(fn(()), dtype)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        result._lifted = bool(tensors) and all(isinstance(a, TracedTensor) and a._lifted for a in tensors)
        return result
    every = (*arrays.values(), *named.values())
    return wrap(Pull(shape, type_, fn, broadcast_sizes(every, shape)), dtype)


TABLE: dict[str, Callable[..., Any]] = {}
VIEWS: set[str] = set()


def entry(*names: str, view: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def put(fn: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            TABLE[name] = fn
            if view:
                VIEWS.add(name)
        return fn

    return put
