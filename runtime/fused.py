"""Kernels of attention that make their queries, or change the rows of their output, on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from attnlang.ir import Attend, Environment, Map, evaluate
from attnlang.passes.fusion import on_rows_at_hand

from .call import Call
from .compiled import kernel_call
from .cpp import prefers_order
from .errors import Unavailable
from .rows import declaring, for_kernels, read_by

__all__ = ["Maps", "fused"]

Tensor = torch.Tensor
Outputs: TypeAlias = Callable[[Call], dict[str, Tensor]]


@dataclass(frozen=True)
class Maps:
    """Rows stages for one kernel to take in: ``before`` makes its queries, ``after`` changes the rows ``inner``.

    ``names`` are the outputs of the kernel by the names the stages have for them.
    """

    before: Map | None = None
    after: Map | None = None
    inner: str = ""
    names: Mapping[str, str] = field(default_factory=dict)


def fused(call: Call, stage: Attend, here: Environment, maps: Maps, outputs: Outputs) -> dict[str, Tensor]:
    """Return what the program of ``call`` makes, with the rows of ``maps.after`` in place of those it changes.

    ``call`` is ``stage`` as a program of its own, perhaps under other names.

    Raises:
        Unavailable: no kernel can run this; the reason says why.
    """
    bound = kernel_call(call, stage, here, "q" if maps.before else "")
    if call.program.standard and bound.q.device.type == "cpu" and prefers_order(bound):
        raise Unavailable("there is a faster kernel, which takes no other stages in")
    before = _on_the_way(maps.before, bound.q.shape, here)
    after = _on_the_way(_at_hand(maps), (*bound.q.shape[:3], bound.v.shape[3]), here)
    tensors = {**before.tensors, **after.tensors}
    stages = (*before.stages, call.program.attend, *after.stages)
    program = declaring(call.program, stages, tuple((name, t.dim()) for name, t in tensors.items()))
    return outputs(replace(bound, program=program, tensors={**bound.tensors, **tensors}))


def _at_hand(maps: Maps) -> Map | None:
    if maps.after is None:
        return None
    others = {name: own for name, own in maps.names.items() if name not in ("", maps.inner)}
    return on_rows_at_hand(maps.after, maps.inner, others)


@dataclass(frozen=True)
class _Bound:
    stages: tuple[Map, ...]
    tensors: Mapping[str, Tensor]


def _on_the_way(stage: Map | None, shape: tuple[int, ...], here: Environment) -> _Bound:
    if stage is None:
        return _Bound((), {})
    if tuple(int(evaluate(e, here)) for e in stage.extents) != tuple(shape):
        raise Unavailable("the rows have another shape than those of the kernel")
    changed, tensors = for_kernels(stage, here, read_by(stage, here))
    return _Bound((changed,), tensors)
