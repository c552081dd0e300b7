"""Stages with groups or keys as stages without: a bucket of pairs is a batch element.

A statistic that has one value a group, and an output that a key spreads over buckets, are what a row has in each
*bucket* of its pairs. The stage with one more conjunct in its mask, ``key == number of the batch element``, makes that
for all buckets at once; whatever it needs to know of other pairs it reads from tensors by then. What is left of the
stage reads the statistics at the group of a pair, and streams.

A stage in buckets has the batch elements and heads of the call side by side as heads, since buckets take the place of
the batch. Run maps skip what is outside of a bucket: where the mask is local in the buckets (blocks of keys), all of
them together are about one pass over the keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from attnlang.ir import (
    FLOAT,
    INT,
    KEY_ADDRESS,
    QUERY_ADDRESS,
    Attend,
    Branch,
    Dot,
    Expr,
    Load,
    Normalizer,
    Operand,
    Output,
    Param,
    Size,
    Stat,
    index_axes,
    input_names,
    is_map,
    stat,
    substitute,
)
from attnlang.ir.build import all_of, b, const, h, op, q
from attnlang.ir.stages import PLAIN, WEIGHT

from .shifts import moves_nothing
from .simplify import map_record, simplify
from .streaming import IDENTITY

__all__ = [
    "FIRST",
    "KEYS",
    "QUERIES",
    "VALUES",
    "WHOLE",
    "Bucketed",
    "InBuckets",
    "Level",
    "bucket_keys",
    "in_buckets",
    "tensor_of",
]

FIRST = Param("first_bucket", INT)
"""The bucket of the first batch element."""
QUERIES, KEYS, VALUES = "bucket_queries", "bucket_keys", "bucket_values"
"""Names of the operands of a stage in buckets."""
WHOLE = {name: f"{name}_whole" for name in ("B", "H", "Hkv")}
"""Names that sizes of the call have in a stage in buckets."""
_BUCKET = Param("number of the bucket", INT)  # no name of a program; it stands for the batch element until that is free
_NOTHING = Normalizer("none", (), const(1.0))
_Kind: TypeAlias = tuple[tuple[Expr, ...], tuple[Expr, ...], bool, str]
"""Outputs that one stage makes in buckets: keys, extents, whether over q, and the name of one that sums rows."""


@dataclass(frozen=True)
class InBuckets:
    """``stage`` makes, in bucket ``FIRST + b``, what its outputs say; ``extents`` are the numbers of buckets in sizes
    of the call, and ``rows`` the operand whose rows it sums."""

    stage: Attend
    extents: tuple[Expr, ...]
    rows: Operand | None


@dataclass(frozen=True)
class Level:
    """Statistics that read only those of levels before: some over all pairs of a row, some in buckets. Where
    ``constant``, they are shifts, which pass no gradient."""

    stats: tuple[Stat, ...]
    whole: Attend | None
    grouped: InBuckets | None
    constant: bool


@dataclass(frozen=True)
class Bucketed:
    """A stage as levels of statistics that are read from tensors, what ``rest`` makes over all pairs, and what is made
    in buckets. Outputs in ``reduced`` come as numbers of rows, which are yet to be reduced; ``wide`` ones are functions
    of a row and a group, of the rows in which ``seen`` counts a pair."""

    levels: tuple[Level, ...]
    rest: Attend | None
    keyed: tuple[InBuckets, ...]
    reduced: tuple[Output, ...]
    wide: tuple[Output, ...]
    seen: Attend | None

    @property
    def buckets(self) -> tuple[InBuckets, ...]:
        """Everything that is made in buckets."""
        return (*(level.grouped for level in self.levels if level.grouped is not None), *self.keyed)

    @property
    def smooth(self) -> tuple[Attend, ...]:
        """Every stage that gradients pass through."""
        levels = [level for level in self.levels if not level.constant]
        buckets = (*(level.grouped for level in levels if level.grouped is not None), *self.keyed)
        found = (*(level.whole for level in levels), self.rest, *(x.stage for x in buckets))
        return tuple(s for s in found if s is not None)

    @property
    def stages(self) -> tuple[Attend, ...]:
        """Every stage."""
        found = (*(level.whole for level in self.levels), self.rest, self.seen, *(x.stage for x in self.buckets))
        return tuple(s for s in found if s is not None)


def tensor_of(found: Stat) -> str:
    """The tensor a statistic is read from, and the output that makes it: [B, H, Lq] or [B, H, Lq, groups]."""
    return f"{found.name}_statistic"


def _place(found: Stat, group: Expr | None) -> Load:
    """Where a pair reads a statistic."""
    places = (b, h, q) if group is None or not found.grouped else (b, h, q, group)
    return Load(tensor_of(found), places, FLOAT)


def bucket_keys(out: Output) -> tuple[int, ...]:
    """The keys of an output that need buckets: not those that number a row which is reduced over anyway."""
    return tuple(n for n, key in enumerate(out.key) if out.over != "qk" or "k" in index_axes(key))


def _parts(found: Stat) -> tuple[Expr, ...]:
    return (found.lift,) if found.seed is None else (found.lift, found.seed)


def _made(found: Stat) -> Output:
    return Output(tensor_of(found), found.lift, monoid=found.monoid, empty=IDENTITY[found.monoid])


class _Stages:
    """Makes stages of a stage, in which statistics ``needed`` are read from tensors."""

    def __init__(self, stage: Attend) -> None:
        self.stage, self.branch = stage, stage.branch
        self.stats = self.branch.normalizer.stats
        self.needed: set[str] = set()

    def composed(self, value: Expr) -> Expr:
        """``value`` over scores and statistics alone."""
        weight = PLAIN if self.branch.weight is None else substitute(self.branch.weight, {WEIGHT: PLAIN})
        return substitute(substitute(value, {WEIGHT: weight}), {PLAIN: self.branch.normalizer.weight})

    def closed(self, names: set[str]) -> set[str]:
        """Statistics among ``names`` and whatever they read."""
        found = set(names)
        for st in reversed(self.stats):
            if st.name in found:
                found |= input_names(*_parts(st))
        return {st.name for st in self.stats if st.name in found}

    def reads(self, outputs: Iterable[Output]) -> set[str]:
        """Statistics behind ``outputs``."""
        return self.closed(input_names(*(self.composed(out.value) for out in outputs)))

    def places(self, group: Expr | None) -> dict[Expr, Expr]:
        return {stat(st.name): _place(st, group) for st in self.stats if st.name in self.needed}

    def whole(self, name: str, outputs: Iterable[Output]) -> Attend:
        """A stage over all pairs that reads every statistic from a tensor."""
        found = self.places(self.branch.group)
        outputs = tuple(replace(out, value=substitute(self.composed(out.value), found)) for out in outputs)
        branch = Branch(self.branch.mask, self.branch.score, _NOTHING)
        return replace(self.stage, name=name, branches=(branch,), outputs=outputs)

    def rest(self, outputs: tuple[Output, ...]) -> Attend:
        """A stage over all pairs that makes ``outputs`` and keeps the statistics it can make itself.

        Where it reads one of a group, it takes what this one was made with from tensors, too: one number everywhere.
        """
        grouped, norm = {st.name for st in self.stats if st.grouped}, self.branch.normalizer
        if grouped & self.reads(outputs):
            found = self.places(self.branch.group)
            kept = tuple(st for st in self.stats if st.name not in self.needed)
            branch = replace(self.branch, normalizer=replace(norm, stats=kept), group=None, groups=None)
            changed = replace(self.stage, branches=(branch,), outputs=outputs)
            return map_record(changed, lambda e: substitute(e, found))
        kept = tuple(st for st in self.stats if not grouped & self.closed({st.name}))
        branch = replace(self.branch, normalizer=replace(norm, stats=kept), group=None, groups=None)
        if grouped & self.closed(input_names(self.composed(WEIGHT))):  # which no output reads
            branch = replace(branch, normalizer=replace(_NOTHING, stats=kept), weight=None)
        return replace(self.stage, branches=(branch,), outputs=outputs)

    def bucketed(
        self, name: str, outputs: Iterable[Output], keys: tuple[Expr, ...], extents: tuple[Expr, ...]
    ) -> InBuckets:
        """A stage that makes ``outputs`` in every bucket of ``keys``."""
        own = keys == (self.branch.group,)  # then a pair's group is the bucket, and its statistic a number of the row
        found = self.places(_BUCKET if own else self.branch.group)
        moved: dict[Expr, Expr] = {Size(a): Size(there) for a, there in WHOLE.items()}
        moved |= {b: op("floordiv", h, Size(WHOLE["H"])), h: op("mod", h, Size(WHOLE["H"]))}
        moved[_BUCKET] = op("add", b, FIRST)

        def change(e: Expr) -> Expr:
            return substitute(substitute(self.composed(e), found), moved)

        inside: list[Expr] = []
        place: Expr = _BUCKET
        for number, (key, extent) in reversed(list(enumerate(zip(keys, extents, strict=True)))):
            inside.append(op("eq", key, op("mod", place, extent) if number else place))
            place = op("floordiv", place, extent)
        mask = simplify(change(all_of(*inside, self.branch.mask)))
        made = [replace(o, value=change(o.value), key=(), extents=(), branch=0) for o in outputs]
        rows = next((o.rows for o in made if o.rows is not None), None)
        values = Operand(VALUES, KEY_ADDRESS)
        stage = Attend(
            name,
            (Dot(left=Operand(QUERIES, QUERY_ADDRESS), right=Operand(KEYS, KEY_ADDRESS)),),
            (Branch(mask, change(self.branch.score), _NOTHING),),
            tuple(o if o.rows is None else replace(o, rows=values) for o in made),
            lengths=(change(self.stage.lengths[0]), change(self.stage.lengths[1])),
        )
        return InBuckets(stage, extents, rows)

    def _is_shift(self, found: Stat) -> bool:
        return found.monoid != "sum" and moves_nothing(self.stage, found.name)

    def levels(self) -> tuple[Level, ...]:
        """The statistics that are needed, in an order in which they can be made."""
        depth: dict[str, int] = {}
        for st in self.stats:
            depth[st.name] = 1 + max((depth[n] for n in input_names(*_parts(st)) & depth.keys()), default=-1)
        shifts = {st.name for st in self.stats if st.name in self.needed and self._is_shift(st)}
        made = []
        for number, smooth in sorted({(depth[n], n not in shifts) for n in self.needed}):
            found = tuple(
                st
                for st in self.stats
                if st.name in self.needed and (depth[st.name], st.name not in shifts) == (number, smooth)
            )
            rows, groups = ([_made(st) for st in found if st.grouped == grouped] for grouped in (False, True))
            name = f"{self.stage.name}_statistics_{number}"
            grouped = None
            if groups:
                assert self.branch.group is not None and self.branch.groups is not None
                grouped = self.bucketed(f"{name}_grouped", groups, (self.branch.group,), (self.branch.groups,))
            made.append(Level(found, self.whole(name, rows) if rows else None, grouped, not smooth))
        return tuple(made)


@functools.lru_cache(maxsize=256)
def in_buckets(stage: Attend) -> Bucketed | None:
    """``stage``, of one branch and one dot product of rows in their order, as stages without groups and keys.

    None where it has neither, or what no bucket makes: a root, a map, or a sum of rows of queries.
    """
    (term, *terms), (branch, *branches) = stage.terms, stage.branches
    plain = Dot(left=Operand(term.left.source, QUERY_ADDRESS), right=Operand(term.right.source, KEY_ADDRESS))
    if terms or branches or term != plain or stage.position or any(is_map(out) for out in stage.outputs):
        return None
    if any(st.monoid == "root" for st in branch.normalizer.stats):
        return None
    if any(o.rows is not None and (o.over == "q" or o.rows.index != KEY_ADDRESS) for o in stage.outputs):
        return None
    stages = _Stages(stage)
    grouped = {st.name for st in stages.stats if st.grouped}
    keyed = [out for out in stage.outputs if bucket_keys(out)]
    wide = tuple(out for out in stage.outputs if out.over == "" and grouped & input_names(out.value))
    reduced = tuple(out for out in stage.outputs if out.over == "qk")
    others = [out for out in stage.outputs if out not in keyed and out not in wide]
    if branch.group is None and not (keyed or reduced):
        return None
    inside = stages.reads(others) & grouped
    stages.needed = stages.closed(stages.reads((*keyed, *wide)) | inside)
    rest = tuple(_of_rows(out) if out in reduced else out for out in others)
    together: dict[_Kind, list[Output]] = {}
    for out in keyed:
        at = bucket_keys(out)
        keys, extents = (tuple(found[n] for n in at) for found in (out.key, out.extents))
        kind = (keys, extents, out.over == "q", "" if out.rows is None else out.name)
        together.setdefault(kind, []).append(_of_rows(out))
    return Bucketed(
        stages.levels(),
        stages.rest(rest) if rest else None,
        tuple(
            stages.bucketed(f"{stage.name}_in_buckets_{number}", outs, keys, extents)
            for number, ((keys, extents, *_), outs) in enumerate(together.items())
        ),
        reduced,
        wide,
        stages.whole(f"{stage.name}_seen", (Output("seen", const(1.0)),)) if wide else None,
    )


def _of_rows(out: Output) -> Output:
    """An output before rows are reduced, in one bucket."""
    return replace(out, over="q" if out.over == "q" else "k", key=(), extents=(), empty=IDENTITY[out.monoid])
