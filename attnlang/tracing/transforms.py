"""Traces inside of transforms of ``torch.func``: operations on traced values are none of theirs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .tensor import TracedTensor, pull_of, wrap

__all__ = ["outside_of_transforms"]

_functorch = torch._C._functorch


def outside_of_transforms() -> AbstractContextManager[Any]:
    """Keep transforms from wrapping traced values; real tensors are computed with as usual."""
    return nullcontext() if _functorch.peek_interpreter_stack() is None else _Outside()


class _Outside(TorchFunctionMode):
    """A tensor that a transform follows is captured as it is before an operation meets it beside a traced value, as
    outside of the transform nothing knows what it belongs to."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _has_traced((args, kwargs)):
            return func(*args, **kwargs)
        with torch._C._DisableFuncTorch():
            return func(*_captured(args), **_captured(kwargs))


def _has_traced(value: Any) -> bool:
    if type(value) in (tuple, list):
        return any(map(_has_traced, value))
    return any(map(_has_traced, value.values())) if type(value) is dict else type(value) is TracedTensor


def _captured(value: Any) -> Any:
    if type(value) in (tuple, list):
        return type(value)(map(_captured, value))
    if type(value) is dict:
        return {name: _captured(x) for name, x in value.items()}
    followed = type(value) is not TracedTensor and isinstance(value, torch.Tensor)
    return wrap(pull_of(value), value.dtype) if followed and _functorch.is_functorch_wrapped_tensor(value) else value
