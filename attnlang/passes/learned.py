"""Turn float parameters into captured numbers, so that gradients reach them like any other captured tensor."""

from __future__ import annotations

from dataclasses import replace

from attnlang.ir import FLOAT, Attend, Expr, Load, Param, Program, TensorParam, postorder, substitute

from .simplify import map_program

__all__ = ["learnable", "with_captured_numbers"]


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
