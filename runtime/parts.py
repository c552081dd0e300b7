"""The kernels of a program of several stages, as far as they are known without operands."""

from __future__ import annotations

from dataclasses import replace

from attnlang.ir import Attend, Expr, Map, Program, Size, TensorParam, tensors_made
from attnlang.ir.shapes import OPERAND_SHAPES
from attnlang.passes.fusion import Fusion, fusions
from attnlang.passes.positions import at_slots
from attnlang.passes.terms import alone

from .alone import program_of
from .compiled import has_kernel
from .fused import maps_of, taking_in, with_maps
from .lowering import apart
from .rows import as_rows

__all__ = ["parts_of"]

_QUERIES = (Size("B"), Size("H"), Size("Lq"))


def parts_of(program: Program) -> dict[str, Program]:
    """Return every part of ``program`` that may be a kernel of its own, by name, as a program over its own lengths.

    A part is a stage of attention of one branch, with the rows stages its kernel takes in, or a rows stage. Without
    operands nothing is known of rewrites that make tensors (``lowering``), so calls may run other kernels; those that
    record gradients take no stages in.
    """
    shapes: dict[str, tuple[Expr, ...]] = {**OPERAND_SHAPES, **{t.name: t.shape for t in program.tensors}}
    made: list[TensorParam] = []
    names = {stage.name for stage in program.stages}
    found = {name: _provable(fusion) for name, fusion in fusions(program).items()}
    taken: set[str] = set()
    parts: list[tuple[str, Program]] = []
    for stage in program.stages:
        own = tensors_made(stage, shapes)
        shapes |= {name: t.shape for name, t in own.items()}
        if isinstance(stage, Attend):
            lengths = zip(("Lq", "Lk"), stage.lengths, strict=True)
            changed = tuple(name for name, length in lengths if length is not Size(name))
            mine = apart(alone(at_slots(stage))[0])
            fusion = found.get(stage.name, Fusion())
            before = fusion.before if len(mine) == 1 and has_kernel(mine[0]) else None
            last = taking_in(fusion, mine)
            for part in mine:
                after = fusion.after if part is last and has_kernel(part) else None
                whole = program_of(program, part, tuple(made), changed)
                maps = maps_of(part, Fusion(before, after, fusion.rows))
                if maps is not None:
                    taken |= {m.name for m in (maps.before, maps.after) if m is not None}
                    whole = with_maps(whole, maps, {name: len(shape) for name, shape in shapes.items()})
                name = part.name
                while name in names and name != stage.name:
                    name += "_"
                parts.append((name, whole))
        elif isinstance(stage, Map):
            parts.append((stage.name, as_rows(program, stage, {name: len(shape) for name, shape in shapes.items()})))
        made += [replace(t, shape=tuple(Size(f"{n}_{d}") for d in range(len(t.shape)))) for n, t in own.items()]
    return {name: part for name, part in parts if name not in taken}


def _provable(fusion: Fusion) -> Fusion:
    """What is left of ``fusion`` where rows must have the shape of q or of the output in every call."""
    before, after = fusion.before, fusion.after
    if before is not None and before.extents != (*_QUERIES, Size("D")):
        before = None
    if after is not None and after.extents != (*_QUERIES, Size("Dv")):
        after = None
    return Fusion(before, after, fusion.rows)
