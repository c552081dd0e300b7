"""What gradients can reach: float parameters, read as captured numbers, and captured tensors that a score reads."""

from __future__ import annotations

from dataclasses import replace

from attnlang.ir import FLOAT, Attend, Expr, Load, Param, Program, TensorParam, postorder, substitute
from attnlang.ir.build import TRUE

from .simplify import map_program

__all__ = ["learnable", "only_in_masks", "with_captured_numbers"]


def only_in_masks(program: Program) -> frozenset[str]:
    """Return the names of the float captured tensors that masks read and nothing else does."""
    masks = [branch.mask for stage in program.stages if isinstance(stage, Attend) for branch in stage.branches]
    hidden = {n.tensor for n in postorder(*masks) if isinstance(n, Load)}
    stages = tuple(
        replace(stage, branches=tuple(replace(branch, mask=TRUE) for branch in stage.branches))
        if isinstance(stage, Attend)
        else stage
        for stage in program.stages
    )
    seen = {n.tensor for stage in stages for n in postorder(*stage.roots()) if isinstance(n, Load)}
    return frozenset(t.name for t in program.tensors if t.type is FLOAT and t.name in hidden - seen)


def learnable(program: Program) -> frozenset[str]:
    """Return the names of the float parameters that a gradient can reach: those that no mask reads."""
    masks = [branch.mask for stage in program.stages if isinstance(stage, Attend) for branch in stage.branches]
    hard = {n.name for n in postorder(*masks) if isinstance(n, Param)}
    hard |= {n.name for t in program.tensors for n in postorder(*t.shape) if isinstance(n, Param)}
    return frozenset(p.name for p in program.scalars if p.type is FLOAT and not p.static and p.name not in hard)


def with_captured_numbers(program: Program, names: frozenset[str]) -> Program:
    """Return ``program`` with the float parameters ``names`` read from 0-d captured tensors of the same names."""
    nodes: dict[Expr, Expr] = {Param(n, FLOAT): Load(n, (), FLOAT) for n in names}
    changed = map_program(program, lambda e: substitute(e, nodes))
    numbers = tuple(TensorParam(p.name, FLOAT, ()) for p in program.scalars if p.name in names)
    scalars = tuple(p for p in program.scalars if p.name not in names)
    return replace(changed, scalars=scalars, tensors=(*changed.tensors, *numbers))
