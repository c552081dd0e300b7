"""Transforms of ``torch.func`` and forward-mode differentiation: what kernels, which read memory, know nothing of."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = ["Kind", "innermost", "outside", "under_vmap", "unwrapped", "without_kernels"]

Tensor = torch.Tensor
_functorch = torch._C._functorch


class Kind(enum.Enum):
    """What is done to tensors that are made now. Those of ``GRAD`` and ``TANGENT`` are wrapped, and have no memory."""

    NONE, GRAD, TANGENT, BATCH = "none", "Grad", "Jvp", "Vmap"


def innermost() -> Kind:
    """The transform that sees what is done now first."""
    found = _functorch.peek_interpreter_stack()
    names = {kind.value for kind in Kind}
    return Kind.NONE if found is None or found.key().name not in names else Kind(found.key().name)


def outside() -> AbstractContextManager[Any]:
    """Make tensors that belong to no transform: what is remembered outlives it, and what the host reads has memory."""
    return nullcontext() if _functorch.peek_interpreter_stack() is None else torch._C._DisableFuncTorch()


def unwrapped(t: Tensor) -> Tensor:
    """The numbers of a tensor that a transform differentiates by."""
    while _functorch.is_gradtrackingtensor(t):
        t = _functorch.get_unwrapped(t)
    return t


def _among(kind: Kind) -> bool:
    """Whether any of the transforms is of ``kind``."""
    if _functorch.peek_interpreter_stack() is None:
        return False
    return any(found.key().name == kind.value for found in _functorch.get_interpreter_stack())


def under_vmap() -> bool:
    """Whether any of the transforms is vmap: what runs may then have to do with batches, whatever it is given."""
    return _among(Kind.BATCH)


def without_kernels(tensors: Iterable[Tensor]) -> bool:
    """Whether ``tensors`` are what no kernel can be given, even by an ``autograd.Function``: those that forward-mode
    differentiation follows, perhaps from outside of other transforms."""
    if _among(Kind.TANGENT):
        return True
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
