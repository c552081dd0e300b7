"""The table from ATen operations to array operations, and the dispatcher that reads it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from attnlang.ir import BOOL, FLOAT, Expr

from . import reductions as red
from . import shapes
from .arrays import Pull, broadcast_index, broadcast_sizes, reshape
from .errors import TraceError, current_location
from .pointwise import POINTWISE, Unsupported
from .state import current, ir_type
from .tensor import TracedTensor, pull_of, wrap

__all__ = ["dispatch", "pointwise_call"]

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


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value


def metadata(func: Any, args: Args, kwargs: Kwargs) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return dtype and shape of the result of a pointwise operation."""
    kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout", "memory_format")}
    key = (func, _signature(args), tuple((k, _signature(v)) for k, v in kwargs.items()))
    found = _meta_cache.get(key)
    if found is None:
        out = func(*map(_to_meta, args), **{k: _to_meta(v) for k, v in kwargs.items()})
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


# structured operations -----------------------------------------------------------------------------------------------

TABLE: dict[str, Callable[..., Any]] = {}
VIEWS: set[str] = set()


def _entry(*names: str, view: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def put(fn: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            TABLE[name] = fn
            if view:
                VIEWS.add(name)
        return fn

    return put


def _view(change: Callable[..., Pull]) -> Callable[..., TracedTensor]:
    return lambda x, *args, **kwargs: wrap(change(pull_of(x), *args, **kwargs), x.dtype)


def _select(array: Pull, dim: int, i: int) -> Pull:
    dim = dim % max(len(array.shape), 1)
    return shapes.select(array, dim, shapes._constant(i, array, dim))


def _slice(array: Pull, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Pull:
    return shapes.slice_(array, dim % len(array.shape), slice(start, end, step))


def _transpose(array: Pull, a: int, b: int) -> Pull:
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
    (("transpose", "swapaxes", "t"), lambda x, a=0, b=-1: _transpose(x, a, b)),
    (("permute",), shapes.permute),
    (("unsqueeze",), shapes.unsqueeze),
    (("squeeze",), _squeeze),
    (("expand",), lambda x, shape, implicit=False: shapes.expand(x, shape)),
    (("view", "reshape", "_unsafe_view", "_reshape_alias"), lambda x, shape, *_: _reshape(x, shape)),
    (("diagonal",), shapes.diagonal),
):
    _entry(*_names, view=True)(_view(_change))
for _names, _change in (
    (("flip",), shapes.flip),
    (("roll",), lambda x, shifts, dims=(): shapes.roll(x, shifts, dims)),
    (("select_copy",), _select),
):
    _entry(*_names)(_view(_change))


@_entry("view_as_real", "view_as_complex", "masked_select", "nonzero")
def _never(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise TraceError(
        "this operation gives a tensor whose size depends on values known only when the kernel runs",
        "use torch.where(mask, a, b)",
        current_location(),
    )


@_entry("unbind", view=True)
def _unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    return [TABLE["select"](x, dim, i) for i in range(x.shape[dim])]


@_entry("split", view=True)
def _split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    return [TABLE["slice"](x, dim, i, i + size) for i in range(0, x.shape[dim], size)]


@_entry("split_with_sizes", view=True)
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


@_entry("cat", "concatenate")
def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    arrays, dtype = _joined(tensors)
    for a in arrays:
        current().bake(a.sizes[dim], a.shape[dim])
    return wrap(shapes.concatenate(arrays, dim), dtype)


@_entry("stack")
def _stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
    arrays, dtype = _joined(tensors)
    rank = len(arrays[0].shape) + 1
    return wrap(shapes.concatenate([shapes.unsqueeze(a, dim) for a in arrays], dim % rank), dtype)


@_entry("index", "_unsafe_index")
def _index(x: Tensor, indices: list[Tensor | None]) -> Tensor:
    return wrap(shapes.index(pull_of(x), [None if i is None else pull_of(i) for i in indices]), x.dtype)


@_entry("index_select")
def _index_select(x: Tensor, dim: int, where: Tensor) -> Tensor:
    return wrap(shapes.index_select(pull_of(x), dim, pull_of(where)), x.dtype)


@_entry("gather")
def _gather(x: Tensor, dim: int, where: Tensor, **_: Any) -> Tensor:
    return wrap(shapes.gather(pull_of(x), dim, pull_of(where)), x.dtype)


@_entry("take")
def _take(x: Tensor, where: Tensor) -> Tensor:
    return wrap(shapes.take_flat(pull_of(x), pull_of(where)), x.dtype)


@_entry("embedding")
def _embedding(weight: Tensor, where: Tensor, *_: Any) -> Tensor:
    return wrap(shapes.index(pull_of(weight), [pull_of(where)]), weight.dtype)


# reductions ----------------------------------------------------------------------------------------------------------


def _reduction(
    what: str, combine: Callable[[Any], red.Fold], dtype_of: Callable[[Tensor], torch.dtype]
) -> Callable[..., Tensor]:
    def call(x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
        out = dtype or dtype_of(x)
        array = pull_of(x)
        type_ = ir_type(out)
        return wrap(red.reduce_dims(array, red.dims_of(array, dims), keepdim, type_, what, combine(type_)), out)

    return call


def _summed(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype.is_floating_point else torch.int64


def _floating(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype.is_floating_point else torch.get_default_dtype()


_sum = _entry("sum", "nansum")(_reduction("a sum", lambda t: red.fold("add", t, 0), _summed))
_prod = _entry("prod")(_reduction("a product", lambda t: red.fold("mul", t, 1), _summed))
_mean = _entry("mean")(_reduction("a mean", lambda t: red.mean, _floating))
_any = _entry("any")(_reduction("any", lambda t: red.fold("logical_or", BOOL, False), lambda x: torch.bool))
_all = _entry("all")(_reduction("all", lambda t: red.fold("logical_and", BOOL, True), lambda x: torch.bool))
_amax = _entry("amax")(_reduction("a maximum", lambda t: red.fold("maximum", t), lambda x: x.dtype))
_amin = _entry("amin")(_reduction("a minimum", lambda t: red.fold("minimum", t), lambda x: x.dtype))
_lse = _entry("logsumexp")(_reduction("a logsumexp", lambda t: red.logsumexp, _floating))
_argmax = _entry("argmax")(_reduction("an argmax", lambda t: red.arg_reduce("gt"), lambda x: torch.int64))
_argmin = _entry("argmin")(_reduction("an argmin", lambda t: red.arg_reduce("lt"), lambda x: torch.int64))


@_entry("max")
def _max(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    best = _amax(x, dim, keepdim)
    return best if dim is None else (best, _argmax(x, dim, keepdim))


@_entry("min")
def _min(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    best = _amin(x, dim, keepdim)
    return best if dim is None else (best, _argmin(x, dim, keepdim))


def _variance(power: float) -> Callable[..., Tensor]:
    def call(x: Tensor, dims: Any = None, *options: Any, **named: Any) -> Tensor:
        # overloads: (x, unbiased), (x, dims, unbiased, keepdim) and (x, dims, *, correction, keepdim)
        if isinstance(dims, bool):
            named["unbiased"], dims = dims, None
        named |= dict(zip(("unbiased", "keepdim"), options, strict=False))
        correction = named.get("correction")
        correction = float(named.get("unbiased", True)) if correction is None else correction
        array = pull_of(x)
        axes = red.dims_of(array, dims)
        keepdim = named.get("keepdim", False)
        return wrap(
            red.reduce_dims(array, axes, keepdim, FLOAT, "a variance", red.variance(correction, power)), x.dtype
        )

    return call


_var = _entry("var")(_variance(1.0))
_std = _entry("std")(_variance(0.5))


@_entry("var_mean")
def _var_mean(x: Tensor, dims: Any = None, **named: Any) -> Any:
    return _var(x, dims, **named), _mean(x, dims, named.get("keepdim", False))


@_entry("convert_element_type")
def _convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    return pointwise_call(POINTWISE["alias"], dtype, tuple(x.shape), (x,), {})


@_entry("linalg_vector_norm")
def _norm(
    x: Tensor, order: float = 2, dims: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    array = pull_of(x)
    out = red.reduce_dims(array, red.dims_of(array, dims), keepdim, FLOAT, "a norm", red.norm(float(order)))
    return wrap(out, dtype or _floating(x))


@_entry("mm", "bmm", "mv", "matmul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return wrap(red.matmul(pull_of(a), pull_of(b), ir_type(dtype)), dtype)


@_entry("dot", "inner", "vdot", "linalg_vecdot")
def _dot(a: Tensor, b: Tensor, *_: Any) -> Tensor:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return wrap(red.dot_last(pull_of(a), pull_of(b), ir_type(dtype)), dtype)


@_entry("addmm", "addmv", "baddbmm")
def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = matmul(a, b)
    out = out if alpha == 1 else out * alpha
    return out + (c if beta == 1 else c * beta)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear."""
    out = matmul(x, _transpose_tensor(weight))
    return out if bias is None else out + bias


def _transpose_tensor(x: Tensor) -> Tensor:
    return wrap(_transpose(pull_of(x), 0, -1), x.dtype) if x.dim() > 1 else x


# values made of constants --------------------------------------------------------------------------------------------


def _filled(value: Any, x: Tensor, shape: list[int], dtype: torch.dtype | None) -> Tensor:
    out = dtype or x.dtype
    node = POINTWISE["full_like"](ir_type(out), None, value)
    return wrap(Pull(shape, node.type, lambda _: node), out)


@_entry("new_zeros", "new_empty")
def _new_zeros(x: Tensor, shape: list[int], dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _filled(0, x, shape, dtype)


@_entry("new_ones")
def _new_ones(x: Tensor, shape: list[int], dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _filled(1, x, shape, dtype)


@_entry("new_full")
def _new_full(x: Tensor, shape: list[int], value: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _filled(value, x, shape, dtype)


@_entry("_local_scalar_dense", "item")
def _item(x: TracedTensor) -> Any:
    return x._convert("item")


@_entry("is_nonzero")
def _is_nonzero(x: TracedTensor) -> Any:
    return bool(x._convert("bool"))


@_entry("log_sigmoid_forward")
def _log_sigmoid(x: Tensor) -> Any:
    out = pointwise_call(POINTWISE["log_sigmoid"], x.dtype, tuple(x.shape), (x,), {})
    return out, out


# the dispatcher ------------------------------------------------------------------------------------------------------


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
