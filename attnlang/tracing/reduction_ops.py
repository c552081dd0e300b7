"""ATen reductions and products, registered as array operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnlang.ir import BOOL, FLOAT

from . import reductions as red
from .pointwise import POINTWISE
from .registry import entry, pointwise_call
from .state import ir_type
from .tensor import pull_of, wrap
from .view_ops import swap

__all__ = ["linear", "matmul"]

Tensor = torch.Tensor


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


_sum = entry("sum")(_reduction("a sum", lambda t: red.fold("add", t, 0), _summed))
_prod = entry("prod")(_reduction("a product", lambda t: red.fold("mul", t, 1), _summed))
_mean = entry("mean")(_reduction("a mean", lambda t: red.mean, _floating))
_any = entry("any")(_reduction("any", lambda t: red.fold("logical_or", BOOL, False), lambda x: torch.bool))
_all = entry("all")(_reduction("all", lambda t: red.fold("logical_and", BOOL, True), lambda x: torch.bool))
_amax = entry("amax")(_reduction("a maximum", lambda t: red.fold("maximum", t), lambda x: x.dtype))
_amin = entry("amin")(_reduction("a minimum", lambda t: red.fold("minimum", t), lambda x: x.dtype))
_lse = entry("logsumexp")(_reduction("a logsumexp", lambda t: red.logsumexp, _floating))
_argmax = entry("argmax")(_reduction("an argmax", lambda t: red.arg_reduce("gt"), lambda x: torch.int64))
_argmin = entry("argmin")(_reduction("an argmin", lambda t: red.arg_reduce("lt"), lambda x: torch.int64))


@entry("max")
def _max(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    best = _amax(x, dim, keepdim)
    return best if dim is None else (best, _argmax(x, dim, keepdim))


@entry("min")
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


_var = entry("var")(_variance(1.0))
_std = entry("std")(_variance(0.5))


@entry("var_mean")
def _var_mean(x: Tensor, dims: Any = None, **named: Any) -> Any:
    return _var(x, dims, **named), _mean(x, dims, named.get("keepdim", False))


@entry("convert_element_type")
def _convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    return pointwise_call(POINTWISE["alias"], dtype, tuple(x.shape), (x,), {})


@entry("linalg_vector_norm")
def _norm(
    x: Tensor, order: float = 2, dims: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    array = pull_of(x)
    out = red.reduce_dims(array, red.dims_of(array, dims), keepdim, FLOAT, "a norm", red.norm(float(order)))
    return wrap(out, dtype or _floating(x))


@entry("mm", "bmm", "mv", "matmul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return wrap(red.matmul(pull_of(a), pull_of(b), ir_type(dtype)), dtype)


@entry("dot", "inner", "vdot", "linalg_vecdot")
def _dot(a: Tensor, b: Tensor, *_: Any) -> Tensor:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return wrap(red.dot_last(pull_of(a), pull_of(b), ir_type(dtype)), dtype)


@entry("addmm", "addmv", "baddbmm")
def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = matmul(a, b)
    out = out if alpha == 1 else out * alpha
    return out + (c if beta == 1 else c * beta)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear."""
    out = matmul(x, _transpose_tensor(weight))
    return out if bias is None else out + bias


def _transpose_tensor(x: Tensor) -> Tensor:
    return wrap(swap(pull_of(x), 0, -1), x.dtype) if x.dim() > 1 else x
