"""The dispatcher: one ATen operation on traced values, looked up in the tables."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from . import functions, reduction_ops, view_ops  # noqa: F401  fill the tables
from .errors import TraceError, current_location
from .pointwise import POINTWISE, Unsupported
from .registry import TABLE, VIEWS, Args, Kwargs, metadata, pointwise_call
from .state import current
from .tensor import TracedTensor

__all__ = ["dispatch"]


@lru_cache(4096)
def _resolve(func: Any) -> tuple[str, bool]:
    """Return the functional name of an overload and whether it writes to its first argument."""
    name = func._schema.name.removeprefix("aten::").removeprefix("prims::")
    inplace = name.endswith("_") and not name.endswith("__")
    return (name[:-1] if inplace else name), inplace


def _decompose(func: Any, args: Args, kwargs: Kwargs) -> Any:
    out = func.decompose(*args, **kwargs)
    if out is not NotImplemented:
        return out
    from torch._decomp import decomposition_table

    rule = decomposition_table.get(func)
    if rule is None:
        raise Unsupported(_resolve(func)[0])
    try:
        return rule(*args, **kwargs)
    except Unsupported:
        pass
    raise Unsupported(_resolve(func)[0])


def _write(target: Any, value: Any) -> Any:
    if not isinstance(target, TracedTensor) or target._aliased or tuple(target.shape) != tuple(value.shape):
        raise TraceError(
            "an in-place operation writes to a captured tensor or to a view",
            "write it out of place: x = x + y instead of x += y or x[...] = y",
            current_location(),
        )
    if value.dtype is not target.dtype:
        value = value.to(target.dtype)
    target._pull = value._pull
    return target


def dispatch(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Translate one ATen operation that has a traced value among its arguments.

    Raises:
        TraceError: the operation has no translation, with the user's line.
    """
    name, inplace = _resolve(func)
    current().count()
    if "out" in kwargs:
        raise TraceError("an out= argument cannot be used in a mod", "assign the result instead", current_location())
    entry = TABLE.get(name)
    if entry is not None:
        result = entry(*args, **kwargs)
        if name in VIEWS and isinstance(args[0], TracedTensor):
            args[0]._aliased = True
            for part in result if isinstance(result, list) else (result,):
                part._aliased = True
    elif name in POINTWISE:
        dtype, shape = metadata(func, args, kwargs) if not inplace else _functional_metadata(func, args, kwargs)
        result = pointwise_call(POINTWISE[name], dtype, shape, args, _without_options(kwargs))
    elif inplace or not func._schema.name.startswith("aten::"):
        raise Unsupported(func._schema.name.removeprefix("aten::"))
    else:
        result = _decompose(func, args, kwargs)
    return _write(args[0], result) if inplace else result


def _without_options(kwargs: Kwargs) -> Kwargs:
    return {k: v for k, v in kwargs.items() if k not in ("dtype", "device", "pin_memory", "layout", "memory_format")}


def _functional_metadata(func: Any, args: Args, kwargs: Kwargs) -> tuple[torch.dtype, tuple[int, ...]]:
    return args[0].dtype, tuple(args[0].shape)
