"""Shapes of what stages make, as expressions over sizes and parameters: what front ends know of a tensor by name."""

from __future__ import annotations

from collections.abc import Mapping

from .build import cdiv, size
from .nodes import Expr, Input, postorder
from .program import TensorParam
from .semantics import is_map
from .stages import Attend, Output, Pool, Select, Stage
from .types import BOOL, FLOAT, INT

__all__ = ["OPERAND_SHAPES", "tensors_made"]

Shape = tuple[Expr, ...]

OPERAND_SHAPES: dict[str, Shape] = {
    "q": (size("B"), size("H"), size("Lq"), size("D")),
    "k": (size("B"), size("Hkv"), size("Lk"), size("D")),
    "v": (size("B"), size("Hkv"), size("Lk"), size("Dv")),
}


def tensors_made(stage: Stage, shapes: Mapping[str, Shape]) -> dict[str, TensorParam]:
    """What ``stage`` makes, by name; ``shapes`` are those of captured tensors and earlier outputs it has rows of."""
    known = {**shapes, **OPERAND_SHAPES}
    if isinstance(stage, Attend):
        return {out.name: _output(out, stage, known) for out in stage.outputs}
    if isinstance(stage, Pool):
        batch, heads, length, features = known[stage.source]
        blocks = cdiv(length, stage.block if stage.stride is None else stage.stride)
        return {stage.name: TensorParam(stage.name, FLOAT, (batch, heads, blocks, features))}
    return {stage.name: TensorParam(stage.name, BOOL if isinstance(stage, Select) else FLOAT, stage.extents)}


def _output(out: Output, stage: Attend, shapes: Mapping[str, Shape]) -> TensorParam:
    queries, keys = stage.lengths
    shape = [size("B"), size("H")]
    shape += [queries] if "q" not in out.over else []
    shape += [keys] if is_map(out) or out.over == "q" else []
    branch = stage.branches[out.branch]
    grouped = {t.name for t in branch.normalizer.stats if t.grouped}
    reads = {n.name for n in postorder(out.value) if isinstance(n, Input)}
    if out.over == "" and not is_map(out) and grouped & reads and branch.groups is not None:
        shape.append(branch.groups)
    shape += out.extents
    shape += [shapes[out.rows.source][-1]] if out.rows is not None else []
    return TensorParam(out.name, INT if out.monoid == "argmax" else FLOAT, tuple(shape))
