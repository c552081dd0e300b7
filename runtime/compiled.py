"""Compiled kernels for Attend stages that are not softmax attention in disguise.

What a stage must be for that is decided by :mod:`attnlang.passes.streaming`, not by names. Gradients of such a stage
come from the blockwise executor, which recomputes one block of pairs at a time.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace

import torch

from attnlang.ir import KEY_ADDRESS, QUERY_ADDRESS, Attend, Operand, Program
from attnlang.passes.streaming import Unstreamable, streaming

from .call import Call
from .errors import Unavailable
from .regions import Work

__all__ = ["has_kernel", "kernel_of"]

Tensor = torch.Tensor


_OF_DEVICE = {"cpu": "cpp", "cuda": "triton"}


@functools.cache
def _outputs(backend: str) -> Callable[[Call], dict[str, Tensor]]:
    try:
        found: Callable[[Call], dict[str, Tensor]] = importlib.import_module(f"attnlang.runtime.{backend}").outputs
    except ImportError as error:  # Triton is an optional dependency
        raise Unavailable(f"{error.name or backend} is not installed") from error
    return found


@functools.lru_cache(maxsize=256)
def _rows(stage: Attend) -> Operand | None:
    """The operand whose rows the kernel sums, None where it sums none.

    Raises:
        Unavailable: no kernel of ours can run the stage; the reason says why.
    """
    try:
        found = streaming(stage).rows
    except Unstreamable as error:
        raise Unavailable(str(error)) from error
    (term,) = stage.terms
    if term.left.index != QUERY_ADDRESS or term.right.index != KEY_ADDRESS:
        raise Unavailable("its score reads rows at addresses of their own")
    if found is not None and found.index != KEY_ADDRESS:
        raise Unavailable("it sums rows at addresses of their own")
    return found


def has_kernel(stage: Attend) -> bool:
    """Whether :func:`kernel_of` has a kernel for such a stage."""
    try:
        _rows(stage)
    except Unavailable:
        return False
    return True


def kernel_of(
    call: Call, alone: Program, work: Work, backend: str | None
) -> Callable[[Work], dict[str, Tensor] | None]:
    """Return what computes every output of ``work`` by a kernel, or None where it cannot (raises where it was named).

    ``alone`` is the stage as a program of its own; ``backend`` names one, None stands for that of the device. The
    function may be given the same work on other tensors.

    Raises:
        Unavailable: there is no kernel for such a stage, or not for the device and dtype of ``call``.
    """
    stage = work.stage
    found = _rows(stage)
    (term,) = stage.terms
    chosen = backend or _OF_DEVICE.get(call.q.device.type)
    if chosen is None:
        raise Unavailable(f"no compiled backend runs on {call.q.device}")
    if call.q.dtype is torch.float64:
        raise Unavailable("kernels compute in float32")

    def run(work: Work) -> dict[str, Tensor] | None:
        q, k = (work.env.rows(x.source).to(call.q.dtype) for x in (term.left, term.right))
        v = k if found is None else work.env.rows(found.source).to(call.q.dtype)
        sizes = {**work.env.sizes, "Hkv": k.shape[1]}
        try:
            _check(q, k, v, sizes)
            return _outputs(chosen)(replace(call, program=alone, q=q, k=k, v=v, sizes=sizes, tensors=work.env.tensors))
        except Unavailable:
            if backend is not None:
                raise
            return None

    return run


def _check(q: Tensor, k: Tensor, v: Tensor, sizes: dict[str, int]) -> None:
    b, h, lq, lk = (sizes[n] for n in ("B", "H", "Lq", "Lk"))
    if q.shape[:3] != (b, h, lq) or k.shape[0] != b or k.shape[2] != lk or v.shape[:3] != k.shape[:3]:
        raise Unavailable("its operands have other shapes than the stage")
    if q.shape[3] != k.shape[3] or not k.shape[1] or h % k.shape[1]:
        raise Unavailable("its operands do not fit each other")
