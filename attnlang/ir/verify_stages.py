"""What a legal stage is: types, which names each hook may read, and that rules are complete."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .nodes import Expr, Input, index_axes, postorder
from .semantics import is_map
from .stages import INNER, STAGE_INPUTS, Attend, Branch, Map, Operand, Output, Pool, Select, Stage
from .types import BOOL, FLOAT, INT, Type

__all__ = ["Made", "check_stage", "made_by"]

MONOIDS = ("max", "min", "sum", "root")
REDUCTIONS = ("sum", "max", "min", "argmax")
POOLINGS = ("mean", "max", "min", "sum", "first", "last")


@dataclass(frozen=True)
class Made:
    """Element type and number of dimensions of a tensor that stages may read."""

    type: Type
    rank: int


def made_by(stage: Stage) -> dict[str, Made]:
    """What ``stage`` makes, by name."""
    if isinstance(stage, Select):
        return {stage.name: Made(BOOL, 4)}
    if not isinstance(stage, Attend):
        return {stage.name: Made(FLOAT, 4)}
    return {o.name: Made(INT if o.monoid == "argmax" else FLOAT, _rank(o, stage)) for o in stage.outputs}


def _rank(out: Output, stage: Attend) -> int:
    grouped: set[str] = set()
    if out.branch < len(stage.branches):
        grouped = {st.name for st in stage.branches[out.branch].normalizer.stats if st.grouped}
    rank = 2 + ("q" not in out.over) + (is_map(out) or out.over == "q") + len(out.extents) + (out.rows is not None)
    return rank + (out.over == "" and not is_map(out) and bool(_inputs(out.value) & grouped))


def _inputs(expr: Expr) -> set[str]:
    return {n.name for n in postorder(expr) if isinstance(n, Input)}


def _typed(what: str, expr: Expr | None, want: Type) -> Iterator[str]:
    if expr is not None and expr.type is not want:
        yield f"{what} has type {expr.type}, expected {want}"


def _reads(what: str, expr: Expr | None, allowed: Iterable[str], axes: str = "bhqk") -> Iterator[str]:
    if expr is None:
        return
    if extra := _inputs(expr) - set(allowed):
        yield f"{what} cannot read {', '.join(sorted(extra))}"
    if extra := index_axes(expr) - set(axes):
        yield f"{what} cannot depend on {', '.join(sorted(extra))}"


def check_stage(stage: Stage, known: Mapping[str, Made]) -> Iterator[str]:
    """Yield what is wrong with ``stage``, which may read the tensors in ``known`` and the operands of the call."""
    if isinstance(stage, Attend):
        yield from _check_attend(stage, known)
    elif isinstance(stage, Map):
        names: list[str] = []
        for name, monoid, expr in stage.lets:
            yield from _reads(f"{name} of {stage.name}", expr, names, "bhqd")
            if monoid not in ("sum", "max", "mean"):
                yield f"{name} of {stage.name} is a {monoid}; a row map knows sum, max and mean"
            names.append(name)
        yield from _typed(stage.name, stage.value, FLOAT)
        yield from _reads(stage.name, stage.value, names, "bhqd")
    elif isinstance(stage, Pool):
        if stage.how not in POOLINGS:
            yield f"{stage.name} pools by {stage.how!r}; there is: {', '.join(POOLINGS)}"
        yield from _rows_of(stage.name, stage.source, 4, known)
    else:
        yield from _check_select(stage)


def _check_select(stage: Select) -> Iterator[str]:
    yield from _typed(f"the score of {stage.name}", stage.score, FLOAT)
    for what, expr in (("candidates", stage.candidates), ("forced", stage.forced)):
        yield from _typed(f"{what} of {stage.name}", expr, BOOL)
    yield from _typed(f"top of {stage.name}", stage.top, INT)
    yield from _typed(f"threshold of {stage.name}", stage.threshold, FLOAT)
    yield from _typed(f"mass of {stage.name}", stage.mass, FLOAT)
    for expr in (stage.score, stage.candidates, stage.forced):
        yield from _reads(stage.name, expr, ())
    for rule in stage.rules:
        yield from _reads(f"the rule of {stage.name}", rule, (), "bhq")
    if len(stage.rules) != 1:
        yield f"{stage.name} needs exactly one of top, threshold and mass, and has {len(stage.rules)}"


def _rows_of(what: str, source: str, rank: int, known: Mapping[str, Made]) -> Iterator[str]:
    if source in STAGE_INPUTS:
        found = Made(FLOAT, 4)
    elif source in known:
        found = known[source]
    else:
        yield f"{what} reads rows of {source!r}, which nothing makes"
        return
    if found.type is not FLOAT:
        yield f"{what} reads rows of {source}, which holds {found.type} values"
    if found.rank != rank:
        yield f"{source} has {found.rank} dimension(s), and {what} addresses rows of {rank - 1}"


def _check_operand(what: str, operand: Operand, known: Mapping[str, Made], axes: str) -> Iterator[str]:
    yield from _rows_of(what, operand.source, len(operand.index) + 1, known)
    for index in operand.index:
        yield from _typed(f"an address of {what}", index, INT)
        yield from _reads(f"an address of {what}", index, ())
    outer = set().union(*(index_axes(e) for e in operand.index)) if operand.index else set()
    if {"q", "k"} <= outer:  # which row depends on the pair: only the last index may
        for index in operand.index[:-1]:
            yield from _reads(f"an address of {what}", index, (), "bh")
    elif extra := outer - set("bh" + axes):
        yield f"an address of {what} cannot depend on {', '.join(sorted(extra))}"


def _check_attend(stage: Attend, known: Mapping[str, Made]) -> Iterator[str]:
    if not stage.terms or not stage.branches or not stage.outputs:
        yield f"{stage.name} needs a term, a branch and an output"
    terms = [t.name for t in stage.terms]
    for name in terms:
        if terms.count(name) > 1 or name in INNER:
            yield f"term {name!r} has a name that is taken"
    for term in stage.terms:
        yield from _check_operand(f"term {term.name}", term.left, known, "q")
        yield from _check_operand(f"term {term.name}", term.right, known, "k")
        yield from _typed(f"the body of term {term.name}", term.body, FLOAT)
        yield from _reads(f"the body of term {term.name}", term.body, ("x", "y"), "bhqkd")
        for side in (term.left, term.right):
            if term.body is not None and {"q", "k"} <= index_axes(*side.index):
                yield f"term {term.name} has a body, and which row of {side.source} it reads depends on the pair"
    for branch in stage.branches:
        yield from _check_branch(branch, terms)
    for axis, expr in stage.position:
        yield from _typed(f"position {axis}", expr, INT)
        yield from _reads(f"position {axis}", expr, (), f"bh{axis}")
    if len(set(stage.made)) < len(stage.made):
        yield f"{stage.name} has two outputs of one name"
    for out in stage.outputs:
        yield from _check_output(out, stage, terms, known)


def _check_branch(branch: Branch, terms: list[str]) -> Iterator[str]:
    yield from _typed("mask", branch.mask, BOOL)
    yield from _reads("a mask", branch.mask, ())
    yield from _typed("score", branch.score, FLOAT)
    yield from _reads("a score", branch.score, terms)
    yield from _typed("group", branch.group, INT)
    yield from _reads("a group", branch.group, ())
    yield from _typed("the number of groups", branch.groups, INT)
    yield from _reads("the number of groups", branch.groups, (), "")
    if (branch.group is None) != (branch.groups is None):
        yield "a group needs the number of groups"
    names: list[str] = []
    pair = {"s", "raw", *terms}
    for found in branch.normalizer.stats:
        what = f"statistic {found.name}"
        if found.name in names or found.name in pair or found.name in INNER:
            yield f"{what} has a name that is taken"
        if found.monoid not in MONOIDS:
            yield f"{what} is a {found.monoid}; there is: {', '.join(MONOIDS)}"
        own = [found.name] if found.monoid == "root" else []
        yield from _typed(what, found.lift, FLOAT)
        yield from _reads(what, found.lift, [*pair, *names, *own])
        yield from _typed(f"the seed of {what}", found.seed, FLOAT)
        yield from _reads(f"the seed of {what}", found.seed, names, "bhq")
        if found.monoid == "root" and (found.seed is None or found.grouped):
            yield f"{what} needs a seed to search from and cannot be grouped"
        if found.grouped and branch.group is None:
            yield f"{what} is grouped, and the branch has no groups"
        names.append(found.name)
    yield from _typed("a normaliser's weight", branch.normalizer.weight, FLOAT)
    yield from _reads("a normaliser's weight", branch.normalizer.weight, [*pair, *names])
    yield from _typed("weights", branch.weight, FLOAT)
    yield from _reads("weights", branch.weight, [*pair, *names, "w", "p"])


def _check_output(out: Output, stage: Attend, terms: list[str], known: Mapping[str, Made]) -> Iterator[str]:
    what = f"output {out.name}"
    if out.branch >= len(stage.branches):
        yield f"{what} reads branch {out.branch}, and there are {len(stage.branches)}"
        return
    names = [s.name for s in stage.branches[out.branch].normalizer.stats]
    yield from _typed(what, out.value, FLOAT)
    yield from _reads(what, out.value, [*names, "s", "raw", "w", "p", *terms])
    if out.over not in ("", "q", "k", "qk"):
        yield f"{what} reduces over {out.over!r}; there is: q, k, qk and nothing"
    if out.monoid not in REDUCTIONS:
        yield f"{what} is a {out.monoid}; there is: {', '.join(REDUCTIONS)}"
    if len(out.key) != len(out.extents):
        yield f"{what} has {len(out.key)} key(s) and {len(out.extents)} extent(s)"
    for key in out.key:
        yield from _typed(f"a key of {what}", key, INT)
        yield from _reads(f"a key of {what}", key, ())
    for extent in out.extents:
        yield from _typed(f"an extent of {what}", extent, INT)
        yield from _reads(f"an extent of {what}", extent, (), "")
    if out.key and not out.over:
        yield f"{what} has a key and reduces over nothing"
    if out.monoid == "argmax" and (out.over != "k" or out.key or out.rows is not None):
        yield f"{what}: an argmax is over k, without key and rows"
    if out.rows is not None:
        if out.monoid != "sum" or out.over not in ("k", "q"):
            yield f"{what}: rows are summed over k or over q"
        axes = "q" if out.over == "q" else "k"
        yield from _check_operand(what, out.rows, known, axes)
