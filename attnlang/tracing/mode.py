"""The torch function mode a mod runs under: indexing by traced values, constants and products, before ATen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .errors import TraceError, current_location
from .pointwise import POINTWISE
from .reduction_ops import linear, matmul
from .registry import TABLE, pointwise_call
from .shapes import getitem
from .state import current
from .tensor import TracedTensor, pull_of, refuse_conversion, wrap

__all__ = ["TraceMode"]

Tensor = torch.Tensor


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, slice):
        yield from _tensors((value.start, value.stop, value.step))


def _number(value: Any) -> Any:
    """Return a Python number as a traced constant, as torch.where would make a 0-d tensor of it."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool):
        dtype = torch.bool
    elif isinstance(value, int):
        dtype = torch.int64
    elif isinstance(value, float):
        dtype = torch.get_default_dtype()
    else:
        return value
    return pointwise_call(POINTWISE["full_like"], dtype, (), (None, value), {})


def _where(cond: Any, a: Any, b: Any) -> Any:
    a_number, b_number = not isinstance(a, Tensor), not isinstance(b, Tensor)
    x, y = _number(a), _number(b)
    if a_number and not b_number and x.dtype is not y.dtype and _category(x.dtype) <= _category(y.dtype):
        x = x.to(y.dtype)
    if b_number and not a_number and x.dtype is not y.dtype and _category(y.dtype) <= _category(x.dtype):
        y = y.to(x.dtype)
    return torch.where(cond, x, y)


def _category(dtype: torch.dtype) -> int:
    return 2 if dtype.is_floating_point else 0 if dtype is torch.bool else 1


def _getitem(x: Any, key: Any) -> Any:
    return wrap(getitem(pull_of(x), key, pull_of), x.dtype)


def _setitem(x: Any, key: Any, value: Any) -> Any:
    raise TraceError(
        "an element of a tensor is assigned inside a mod",
        "build the value with torch.where(cond, new, old) instead of writing into a tensor",
        current_location(),
    )


def _rmatmul(b: Any, a: Any) -> Any:
    return matmul(a, b)


def _tensor_of(data: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
    """torch.tensor / as_tensor of something with traced values in it."""
    if isinstance(data, (list, tuple)):
        out = torch.stack([d if isinstance(d, Tensor) else _number(d) for d in data])
    else:
        out = data
    return out if dtype is None else out.to(dtype)


def _full(size: Any, value: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
    out = value.expand(tuple(size))
    return out if dtype is None else out.to(dtype)


def _refuse(word: str) -> Callable[..., Any]:
    def refuse(x: Any, *args: Any, **kwargs: Any) -> Any:
        return x._convert(word) if isinstance(x, TracedTensor) else refuse_conversion(next(iter(_tensors(args))), word)  # type: ignore[arg-type]

    return refuse


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _getitem,
    Tensor.__setitem__: _setitem,
    torch.where: _where,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    Tensor.__rmatmul__: _rmatmul,
    torch.nn.functional.linear: linear,
    torch.nn.functional.embedding: lambda x, weight, *a, **k: TABLE["embedding"](weight, x),
    torch.tensor: _tensor_of,
    torch.as_tensor: _tensor_of,
    torch.full: _full,
    Tensor.__bool__: _refuse("bool"),
    Tensor.__int__: _refuse("int"),
    Tensor.__float__: _refuse("float"),
    Tensor.__index__: _refuse("index"),
    Tensor.item: _refuse("item"),
    Tensor.tolist: _refuse("item"),
    Tensor.numpy: _refuse("a NumPy array"),
    Tensor.__array__: _refuse("a NumPy array"),
    Tensor.__contains__: _refuse("bool"),
}
"""Torch functions that are translated whole when one of their arguments is traced."""

_FACTORIES = frozenset(
    (
        torch.tensor,
        torch.as_tensor,
        torch.scalar_tensor,
        torch.full,
        torch.zeros,
        torch.ones,
        torch.arange,
        torch.linspace,
        torch.eye,
    )
)
_LIKES = frozenset(
    (
        torch.zeros_like,
        torch.ones_like,
        torch.full_like,
        Tensor.new_zeros,
        Tensor.new_ones,
        Tensor.new_full,
        Tensor.new_tensor,
    )
)
"""Functions whose result does not depend on the values of the tensors given to them."""


class TraceMode(TorchFunctionMode):
    """Routes calls with traced arguments to the tables and notices constants made by the others."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors(args))
        if kwargs:
            tensors += _tensors(kwargs)
        if any(isinstance(t, TracedTensor) for t in tensors):
            return self._traced(func, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not isinstance(result, TracedTensor):
            self._notice(func, tensors, result)
        return result

    @staticmethod
    def _traced(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        whole = _FUNCTIONS.get(func)
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # nothing below is differentiated: the compiler derives gradients
        try:
            return func(*args, **kwargs) if whole is None else whole(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    @staticmethod
    def _notice(func: Any, tensors: list[Tensor], result: Tensor) -> None:
        state = current()
        if any(result is t for t in tensors):
            return
        made = func in _LIKES or (func in _FACTORIES if not tensors else all(map(state.is_constant, tensors)))
        if made:
            state.mark_constant(result)
