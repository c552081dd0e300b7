"""Functions that ``torch.compile`` does not look into: it breaks its graph there and calls them as they are."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

__all__ = ["opaque"]

F = TypeVar("F", bound=Callable[..., Any])


def opaque(function: F) -> F:
    """Decorate like ``torch.compiler.disable``, without its import of PyTorch's compiler, which takes seconds.

    The real decorator is applied once that compiler has been imported by someone who uses it.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if disabled:
            return disabled[0](*args, **kwargs)
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        disabled.append(sys.modules["torch._dynamo"].disable(function))
        return disabled[0](*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(F, call)
