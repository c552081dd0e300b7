"""Chooses the backend of a call: the named one, else the one of the device, else the eager executor."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch

from attnlang.ir import OUTPUT_NAMES, UsageError

from . import autograd, eager, stages, transforms
from .bind import suggest
from .call import Call
from .errors import Unavailable

__all__ = ["BACKENDS", "attend", "backward_of", "check_backend", "run"]

Tensor = torch.Tensor
Forward: TypeAlias = Callable[[Call], tuple[Tensor, Tensor]]

BACKENDS = ("cpp", "triton", "eager")
_OF_DEVICE = {"cpu": "cpp", "cuda": "triton"}
"""Backend of each device type (HIP tensors have type ``cuda``); every other device is served by eager."""


def check_backend(name: str | None) -> str | None:
    """Return ``name``.

    Raises:
        UsageError: not the name of a backend.
    """
    if name is not None and name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}{suggest(str(name), BACKENDS)}")
    return name


@functools.cache
def _forward(backend: str) -> Forward:
    try:
        return importlib.import_module(f"attnlang.runtime.{backend}").forward
    except ImportError as error:  # Triton is an optional dependency
        raise Unavailable(f"{error.name or backend} is not installed") from error


@functools.cache
def _backward(backend: str) -> autograd.Backward | None:
    """The backward kernels of ``backend``, if it has any."""
    if backend == "eager":
        return None
    try:
        found: autograd.Backward = importlib.import_module(f"attnlang.runtime.{backend}_backward").backward
    except ImportError:
        return None
    return found


@functools.cache
def _warn_once(backend: str, reason: str) -> None:
    warnings.warn(
        f"the {backend} backend cannot run this call: {reason}; using the slower eager backend instead",
        RuntimeWarning,
        stacklevel=6,
    )


def _with_fallback(backend: str, call: Call) -> tuple[Tensor, Tensor]:
    try:
        return _forward(backend)(call)
    except Unavailable as error:
        _warn_once(backend, error.reason)
    return _forward("eager")(call)


def _choose(call: Call) -> str:
    if call.q.dtype is torch.float64:
        return "eager"  # kernels compute in float32
    return _OF_DEVICE.get(call.q.device.type, "eager")


def backward_of(call: Call, backend: str | None = None) -> autograd.Backward | None:
    """Return the backward kernels that belong to :func:`attend` of the same arguments, or None."""
    return _backward(backend or _choose(call))


def run(call: Call, backend: str | None = None) -> dict[str, Tensor]:
    """Return every result of the program of ``call`` by name, recorded by autograd where it has to be.

    Raises:
        Unavailable: ``backend`` was named and cannot run this call.
    """
    if call.program.standard:
        return dict(zip(OUTPUT_NAMES, attend(call, backend), strict=True))
    return stages.run(call, functools.partial(attend, backend=backend), backend)


def attend(call: Call, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Return o [B, H, Lq, Dv] and lse [B, H, Lq], recorded by autograd where it has to be.

    Raises:
        Unavailable: ``backend`` was named and cannot run this call.
    """
    if transforms.without_kernels((call.q, call.k, call.v, *call.tensors.values())):
        if backend not in (None, "eager"):
            raise Unavailable(f"{backend} kernels make no tangents")
        return eager.forward(call)  # differentiable by itself
    chosen = backend or _choose(call)
    forward = _forward(chosen) if backend or chosen == "eager" else functools.partial(_with_fallback, chosen)
    if autograd.wants_gradients(call) or transforms.innermost() is transforms.Kind.GRAD:
        return autograd.attend(call, forward, _backward(chosen))  # which PyTorch runs outside of transforms
    return forward(call)
