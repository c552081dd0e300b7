"""The tensor a mod is called with: a wrapper whose every ATen operation is translated through one table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from attnlang.ir import Const, Expr, Param, postorder

from .arrays import Pull, scalar
from .errors import TraceError, current_location
from .state import current, ir_type

__all__ = ["LiftedScalarUsed", "TracedTensor", "pull_of", "refuse_conversion", "wrap"]

Tensor = torch.Tensor


class LiftedScalarUsed(TraceError):
    """A Python number that was lifted to a runtime scalar is needed while tracing: bake it and trace again."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        super().__init__(f"the values of {', '.join(sorted(names))} are needed while tracing")


def _what(word: str) -> tuple[str, str]:
    if word == "bool":
        return (
            "Python needs to know whether a traced value is true (an `if`, `while`, `and`, `or`, `not`, `in` or a "
            "chained comparison such as `a < q < b` on it), but it has a value only when the kernel runs",
            "write torch.where(cond, a, b) for a choice, `&`, `|` and `~` for and, or and not, torch.minimum/maximum "
            "for min and max, and `(a < q) & (q < b)` for a chained comparison",
        )
    how = {"int": "int()", "float": "float()", "index": "an index, a range or a shape", "item": ".item() or .tolist()"}
    return (
        f"a traced value is turned into a Python number by {how.get(word, word)}, but it has a value only when the "
        "kernel runs",
        "keep it a tensor: use torch operations, .to(dtype) for conversions, and index captured *tensors* (not lists) "
        "with it",
    )


def _unlift(value: TracedTensor) -> None:
    """Ask for another trace if ``value`` is made of lifted Python numbers only."""
    if not value._pull.shape:
        nodes = list(postorder(value._pull.at(())))
        params = frozenset(n.name for n in nodes if isinstance(n, Param))
        if params and all(n.args or isinstance(n, (Const, Param)) for n in nodes):
            raise LiftedScalarUsed(params)


def refuse_conversion(value: TracedTensor, word: str) -> NoReturn:
    """Raise for a traced value that must become a Python number."""
    _unlift(value)
    raise TraceError(*_what(word), current_location())


def constant_of(value: TracedTensor) -> bool | int | float | None:
    if value._pull.shape:
        return None
    expr = value._pull.at(())
    return expr.value if isinstance(expr, Const) else None


class TracedTensor(torch.Tensor):
    """A tensor that stands for a :class:`Pull`. All operations go through ``__torch_dispatch__``."""

    _pull: Pull
    _aliased: bool
    _lifted: bool

    @staticmethod
    def __new__(cls, pull: Pull, dtype: torch.dtype, device: torch.device) -> TracedTensor:
        return torch.Tensor._make_wrapper_subclass(cls, pull.shape, dtype=dtype, device=device)

    def __init__(self, pull: Pull, dtype: torch.dtype, device: torch.device) -> None:
        self._pull = pull
        self._aliased = False  # whether a view of it exists
        self._lifted = False  # whether it is a lifted Python number, or computed from such only

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from .table import dispatch

        return dispatch(func, args, kwargs or {})

    def _convert(self, word: str) -> Any:
        value = constant_of(self)
        if value is None:
            refuse_conversion(self, word)
        return value

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self._lifted:
            _unlift(self)
        return f"traced({self._pull.at(())!r})" if not self.shape else f"traced{tuple(self.shape)}"

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance looks here when the type itself is not what is asked for, in the user's code as in torch's parser
        if self._lifted and "isinstance" in sys._getframe(1).f_code.co_names:
            _unlift(self)
        return TracedTensor

    def __hash__(self) -> int:
        if self._lifted:
            _unlift(self)
        return id(self)

    def __format__(self, spec: str) -> str:
        return format(self._convert("a format string"), spec)


def _conversion(name: str, to: Callable[[Any], Any]) -> None:
    word = name.strip("_")

    def convert(self: TracedTensor) -> Any:
        return to(self._convert(word))

    convert.__name__ = name
    setattr(TracedTensor, name, convert)


for _name, _to in (
    ("__bool__", bool),
    ("__int__", int),
    ("__float__", float),
    ("__index__", int),
    ("item", lambda v: v),
    ("tolist", lambda v: v),
):
    _conversion(_name, _to)


def wrap(pull: Pull | Expr, dtype: torch.dtype) -> TracedTensor:
    """Return a traced tensor on the device of the current trace."""
    array = pull if isinstance(pull, Pull) else scalar(pull)
    if array.type is not ir_type(dtype):
        raise AssertionError(f"{array.type} value wrapped as {dtype}")
    return TracedTensor(array, dtype, current().device)


def pull_of(value: Any) -> Pull:
    """Return a traced or captured tensor as an array."""
    return value._pull if isinstance(value, TracedTensor) else current().capture(value)
