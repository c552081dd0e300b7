"""Compiled kernels for Attend stages that are not softmax attention in disguise.

What a stage must be for that is decided by :mod:`attnlang.passes.streaming`, not by names. Gradients of such a stage
come from the blockwise executor, which recomputes one block of pairs at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from attnlang.ir import KEY_ADDRESS, QUERY_ADDRESS, Attend, Operand, Program
from attnlang.passes.streaming import Unstreamable, streaming

from .call import Call
from .errors import Unavailable
from .regions import Work

__all__ = ["kernel_of"]

Tensor = torch.Tensor


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


def kernel_of(call: Call, alone: Program, work: Work, strict: bool) -> Callable[[Work], dict[str, Tensor] | None]:
    """Return what computes every output of ``work`` by a kernel, or None where it cannot (``strict``: raises).

    ``alone`` is the stage as a program of its own. The function may be given the same work on other tensors.

    Raises:
        Unavailable: there is no kernel for such a stage, or not for the device and dtype of ``call``.
    """
    from . import cpp

    stage = work.stage
    found = _rows(stage)
    (term,) = stage.terms
    if call.q.device.type != "cpu":
        raise Unavailable(f"the C++ backend runs on CPU tensors, q is on {call.q.device}")
    if call.q.dtype is torch.float64:
        raise Unavailable("kernels compute in float32")

    def run(work: Work) -> dict[str, Tensor] | None:
        q, k = (work.env.rows(x.source).to(call.q.dtype) for x in (term.left, term.right))
        v = k if found is None else work.env.rows(found.source).to(call.q.dtype)
        sizes = {**work.env.sizes, "Hkv": k.shape[1]}
        try:
            _check(q, k, v, sizes)
            return cpp.outputs(replace(call, program=alone, q=q, k=k, v=v, sizes=sizes, tensors=work.env.tensors))
        except Unavailable:
            if strict:
                raise
            return None

    return run


def _check(q: Tensor, k: Tensor, v: Tensor, sizes: dict[str, int]) -> None:
    b, h, lq, lk = (sizes[n] for n in ("B", "H", "Lq", "Lk"))
    if q.shape[:3] != (b, h, lq) or k.shape[0] != b or k.shape[2] != lk or v.shape[:3] != k.shape[:3]:
        raise Unavailable("its operands have other shapes than the stage")
    if q.shape[3] != k.shape[3] or not k.shape[1] or h % k.shape[1]:
        raise Unavailable("its operands do not fit each other")
