"""Kernels of attention that make their queries, or change the rows of their output, on the way."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from attnlang.ir import Attend, Environment, Map, Output, Program, evaluate
from attnlang.passes.fusion import Fusion, in_place, loads_of, on_rows_at_hand

from .alone import softmax_roles
from .call import Call
from .compiled import kernel_call
from .errors import Unavailable
from .rows import declaring, for_kernels, load_axes, read_by, sizes_of, tabulated

__all__ = ["Maps", "fused", "maps_of", "taking_in", "with_maps"]

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


def taking_in(fusion: Fusion, parts: Sequence[Attend], changed: Container[str] = ()) -> Attend | None:
    """The part that can take ``fusion.after`` in: the last one whose rows it changes, if what else it reads of that
    part is a number of its own row. Outputs in ``changed`` are not what the parts make."""
    if fusion.after is None:
        return None
    for part in reversed(parts):
        rows = [out.name for out in part.outputs if out.rows is not None]
        if len(rows) == 1 and rows[0] in fusion.rows and rows[0] not in changed:
            others = [out for out in part.outputs if out.name != rows[0] and out.name in loads_of(fusion.after)]
            return part if all(_of_row(out, fusion.after) for out in others) else None
    return None


def _of_row(out: Output, after: Map) -> bool:
    """Whether an output is a number of a row that ``after`` reads of its own row."""
    return out.over in ("k", "") and not out.key and out.monoid != "argmax" and in_place(after, out.name, 3)


def maps_of(part: Attend, fusion: Fusion) -> Maps | None:
    """What a kernel of ``part`` takes in, None where that is nothing."""
    after = fusion.after if taking_in(fusion, (part,)) is not None else None
    if after is None and fusion.before is None:
        return None
    roles = softmax_roles(part)
    names = {out.name: out.name for out in part.outputs}
    if roles is not None:
        names = {roles[3]: "o", roles[4] or "": "lse"}
    rows = next((out.name for out in part.outputs if out.rows is not None), "")
    return Maps(fusion.before, after, rows, names)


def fused(call: Call, stage: Attend, here: Environment, maps: Maps, outputs: Outputs) -> dict[str, Tensor]:
    """Return the outputs of ``stage`` by name, with the rows of ``maps.after`` in place of those it changes.

    ``call`` is ``stage`` as a program of its own, perhaps under other names.

    Raises:
        Unavailable: no kernel can run this; the reason says why.
    """
    from .cpp import prefers_order  # templates are loaded with the first kernel

    bound = kernel_call(call, stage, here, "q" if maps.before else "")
    if call.program.standard and bound.q.device.type == "cpu" and prefers_order(bound):
        raise Unavailable("there is a faster kernel, which takes no other stages in")
    before = _on_the_way(maps.before, bound.q.shape, bound.sizes, here)
    after = _on_the_way(_at_hand(maps), (*bound.q.shape[:3], bound.v.shape[3]), bound.sizes, here)
    tensors = {**before.tensors, **after.tensors}
    stages = (*before.stages, call.program.attend, *after.stages)
    program = declaring(call.program, stages, tuple((name, t.dim()) for name, t in tensors.items()))
    made = outputs(replace(bound, program=program, tensors={**bound.tensors, **tensors}))
    found = {name: made[own] for name, own in maps.names.items() if name}
    return found if maps.after is None else {(maps.after.name if n == maps.inner else n): t for n, t in found.items()}


def with_maps(alone: Program, maps: Maps, ranks: Mapping[str, int]) -> Program:
    """Return the program of the kernel that takes ``maps`` in; ``ranks`` are dimensions of what stages read."""
    found, known = [], dict(ranks)
    for stage in (maps.before, _at_hand(maps)):
        if stage is not None:
            changed, tables = tabulated(stage)
            known |= {name: len(load_axes(e)) for name, e in tables}
            found.append(changed)
    stages = (*found[: maps.before is not None], alone.attend, *found[maps.before is not None :])
    read = dict.fromkeys(name for stage in found for name in loads_of(stage))
    return declaring(alone, stages, tuple((name, known[name]) for name in sorted(read)))


def _at_hand(maps: Maps) -> Map | None:
    if maps.after is None:
        return None
    others = tuple((name, own) for name, own in maps.names.items() if name not in ("", maps.inner))
    return on_rows_at_hand(maps.after, maps.inner, others)


@dataclass(frozen=True)
class _Bound:
    stages: tuple[Map, ...]
    tensors: Mapping[str, Tensor]


def _on_the_way(stage: Map | None, shape: tuple[int, ...], sizes: Mapping[str, int], here: Environment) -> _Bound:
    if stage is None:
        return _Bound((), {})
    if tuple(int(evaluate(e, here)) for e in stage.extents) != tuple(shape):
        raise Unavailable("the rows have another shape than those of the kernel")
    if any(sizes[name] != here.sizes[name] for name in sizes_of(stage)):
        raise Unavailable("the rows read a size that is another one in the kernel")
    changed, tensors = for_kernels(stage, here, read_by(stage, here))
    return _Bound((changed,), tensors)
