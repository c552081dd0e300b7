"""The plan of a rows stage: one row after the other, each in loops over its features.

The same statements serve a kernel of its own, the rows of q that a kernel of attention starts from, and the rows of its
output on their way to memory.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from attnlang.ir import Expr, Index, Load, Map, Param, Program, Size, canonical, postorder
from attnlang.passes.fusion import INNER, statistics
from attnlang.passes.levels import Level, levels
from attnlang.passes.simplify import map_record, simplify
from attnlang.passes.widths import Width, assumptions, widths

from .facts import Facts
from .naming import names as value_names
from .plan_parts import TensorArg, Value, needed

__all__ = ["Covered", "RowPass", "RowsPlan", "covered_by", "rows_plan"]

Covered: TypeAlias = tuple[str, str, int, str]
"""A stage, a tensor and a dimension of it, and the axis of the stage whose every index the dimension has."""

_CALLED = {Level.GRID: "head", Level.ROW: "row", Level.COL: "feature", Level.PAIR: "element"}


@dataclass(frozen=True)
class RowPass:
    """One loop over the features of a row: the ``monoid`` (sum, max, mean) of ``value``, from then on ``name``.

    In the last pass ``monoid`` is empty and ``value`` is the element. ``before`` are the statements that a row needs
    first, ``inside`` those of a feature and of an element.
    """

    name: str
    monoid: str
    value: Expr
    before: tuple[Value, ...]
    inside: tuple[Value, ...]


@dataclass(frozen=True)
class RowsPlan(Facts):
    """How the rows of a Map are made. ``program`` has it as its only stage, and declares operands as tensors.

    Here a ROW value is one of a row, a COL value one of a feature, a PAIR value one of an element. ``storage`` is the
    dtype of what is made. ``covered`` are dimensions of tensors that need no clamp.
    """

    program: Program
    storage: str
    tensors: tuple[TensorArg, ...]
    scalars: tuple[Param, ...]
    sizes: tuple[str, ...]
    grid: tuple[Value, ...]
    passes: tuple[RowPass, ...]
    direction: str = "rows"
    wide: bool = False
    covered: frozenset[Covered] = frozenset()
    names: Mapping[Expr, str] = field(default_factory=dict, compare=False, repr=False)
    node_levels: Mapping[Expr, Level] = field(default_factory=dict, compare=False, repr=False)
    node_widths: Mapping[Expr, Width] = field(default_factory=dict, compare=False, repr=False)
    bounds: Mapping[Expr, tuple[int | None, int | None]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def stage(self) -> Map:
        (stage,) = self.program.stages
        assert isinstance(stage, Map)
        return stage

    @property
    def changes(self) -> bool:
        """Whether the rows are made of rows at hand."""
        return any(n is INNER for p in self.passes for n in postorder(p.value))

    @property
    def statistics(self) -> tuple[str, ...]:
        """Outputs of the kernel of attention that are read of the row at hand, as the inputs ``fusion.here``."""
        return statistics(self.stage)

    def load_guards(self, load: Load) -> tuple[tuple[bool, bool], ...]:
        return tuple(
            (
                low,
                high
                and (self.stage.name, load.tensor, d, index.axis if isinstance(index, Index) else "")
                not in self.covered,
            )
            for d, (index, (low, high)) in enumerate(zip(load.indices, super().load_guards(load), strict=True))
        )

    def extent(self, axis: str) -> Expr | None:
        return dict(zip("bhqd", self.stage.extents, strict=True)).get(axis)

    @property
    def digest(self) -> str:
        """Stable hash of everything the plan says, for cache keys."""
        dtypes = ",".join(f"{t.name}:{t.dtype}:{t.rank}" for t in self.tensors)
        text = f"{canonical(self.program)}|rows|{self.storage}|{dtypes}|{self.wide}|{sorted(self.covered)}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def _places(stage: Map) -> tuple[Covered, ...]:
    """Where ``stage`` reads tensors at an index of an axis itself."""
    loads = [n for n in postorder(*stage.roots()) if isinstance(n, Load)]
    found = ((n.tensor, d, i.axis) for n in loads for d, i in enumerate(n.indices) if isinstance(i, Index))
    return tuple((stage.name, *place) for place in dict.fromkeys(found))


def covered_by(stage: Map, shapes: Mapping[str, Sequence[int]], extents: Sequence[int]) -> frozenset[Covered]:
    """Return the dimensions of tensors of ``shapes`` that have every index of the rows of ``extents`` [B, H, L, D]."""
    lengths = dict(zip("bhqd", extents, strict=True))
    return frozenset(p for p in _places(stage) if shapes[p[1]][p[2]] >= lengths[p[3]])


def rows_plan(
    program: Program,
    stage: Map,
    storage: Mapping[str, str],
    *,
    dtype: str = "float32",
    wide: bool = False,
    covered: frozenset[Covered] = frozenset(),
) -> RowsPlan:
    """Plan ``stage``, which reads tensors of ``program``; ``storage`` maps these to dtype names.

    ``covered`` says which dimensions are at least as long as the axis they are read at.
    """
    stage = map_record(stage, simplify)
    roots = (*(e for _, _, e in stage.lets), stage.value)
    found = (*roots, *stage.extents)
    bounds = assumptions(found, storage, wide=wide)
    level_of = levels(*found, row="q", col="d")
    used = {n.tensor for n in postorder(*roots) if isinstance(n, Load)}
    tensors = tuple(t for t in program.tensors if t.name in used)
    read = set(postorder(*roots))
    sizes = tuple(dict.fromkeys(n.name for n in postorder(*roots) if isinstance(n, Size)))
    scalars = tuple(p for p in (Param(p.name, p.type) for p in program.scalars) if p in read)
    taken = (*(t.name for t in tensors), *(p.name for p in scalars), *sizes, *(name for name, _, _ in stage.lets))
    names = value_names(taken, roots, (), level_of, _CALLED)
    values = tuple(Value(name, node, level_of[node]) for node, name in names.items())
    known: set[str] = set()
    passes = []
    for name, monoid, value in (*stage.lets, (stage.name, "", stage.value)):
        mine = needed(values, (value,))
        before = tuple(v for v in mine if v.level is Level.ROW and v.name not in known)
        known |= {v.name for v in before}
        inside = tuple(v for v in mine if v.level in (Level.COL, Level.PAIR))
        passes.append(RowPass(name, monoid, value, before, inside))
    alone = Program(stage.name, (stage,), program.scalars, tensors)
    return RowsPlan(
        program=alone,
        storage=dtype,
        tensors=tuple(TensorArg(t.name, t.type, storage[t.name], len(t.shape)) for t in tensors),
        scalars=scalars,
        sizes=sizes,
        grid=tuple(v for v in values if v.level is Level.GRID),
        passes=tuple(passes),
        wide=wide,
        covered=covered,
        names=names,
        node_levels=level_of,
        node_widths=widths(found, bounds),
        bounds=bounds,
    )
