"""A stage of attention as stated in Python, traced into its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import TypeAlias

from attnlang.ir import (
    BOOL,
    DEFAULT_OUTPUTS,
    FLOAT,
    INT,
    KEY,
    QUERY,
    SOFTMAX,
    Attend,
    Branch,
    Dot,
    Expr,
    Index,
    Input,
    Normalizer,
    Operand,
    Output,
    Stat,
    UsageError,
    build,
    normalizers,
)
from attnlang.ir import stat as row_stat
from attnlang.runtime.bind import suggest

from .reading import AXES, Reader
from .specs import AttendSpec, BranchSpec, NormalizerSpec, OutputSpec, TermSpec

__all__ = ["attend_stage", "outputs_of"]

Inputs: TypeAlias = "dict[str, Expr]"
Kind: TypeAlias = "Callable[[str], str]"

_PLACES = {"queries": "Q", "keys": "K", "values": "V"}
_ROW = {a: AXES[a] for a in "bhq"}
_AFTER: Inputs = {"w": Input("w", FLOAT), "p": Input("p", FLOAT)}


def outputs_of(name: str, spec: AttendSpec) -> list[str]:
    """Names of what a stage makes, in order; ``name`` is empty for the main one."""
    declared = list(spec.outputs)
    if spec.branches or (name and declared):
        return declared
    o, lse = (name, f"{name}_lse") if name else ("o", "lse")
    without = spec.values == "none" if isinstance(spec.values, str) else False
    softmax = spec.common.normalize is None or spec.common.normalize.kind == "softmax"
    plain = [] if without else [o]
    plain += [lse] if softmax and not (without and declared) else []
    return [*plain, *(n for n in declared if n not in plain)]


def attend_stage(name: str, spec: AttendSpec, at: Reader) -> Attend:
    """Trace a stage of attention; ``name`` is empty for the main one.

    Raises:
        UsageError: what is stated does not fit together.
        TraceError: a function does something that cannot be compiled.
    """
    own = {
        _PLACES[n]: at.operand(at.named(n), _PLACES[n], value)
        for n, value in (("queries", spec.queries), ("keys", spec.keys), ("values", spec.values))
        if value is not None and not (n == "values" and isinstance(value, str) and value == "none")
    }
    if taken := [n for n in spec.terms if n in (*AXES, "raw", "w", "p")]:
        raise UsageError(f"a term cannot be called {taken[0]!r}")
    terms = {"s": Dot("s", own.get("Q", QUERY), own.get("K", KEY))}
    terms |= {n: _term(n, term, at, own) for n, term in spec.terms.items()}
    scores: Inputs = {n: Input(n, FLOAT) for n in terms}
    pair = {**scores, "raw": Input("raw", FLOAT)}
    stated = {n: _over(spec.common, branch) for n, branch in spec.branches.items()} or {"": spec.common}
    branches = tuple(_branch(n, branch, at, scores, pair, bool(spec.terms)) for n, branch in stated.items())
    made = {n: _output(n, out, at, list(stated), branches, pair, own) for n, out in spec.outputs.items()}
    names = outputs_of(name, spec)
    if not names:
        message = f"{at.where or 'a stage with branches'} has no output"
        hint = "say what is made: outputs={'o': output(lambda w: w, rows='V', branch='...')}"
        raise UsageError(f"{message}; {hint}")
    o, lse = DEFAULT_OUTPUTS
    plain = {name or "o": replace(o, rows=own.get("V", o.rows)), f"{name}_lse" if name else "lse": lse}
    outputs = tuple(made[n] if n in made else replace(plain[n], name=n) for n in names)
    position = tuple(
        (axis, at.value(at.named(f"position of {axis}"), value, {a: AXES[a] for a in ("b", "h", axis)}, INT))
        for axis, value in spec.position.items()
    )
    stage = Attend(name or "attend", tuple(terms.values()), branches, outputs, position)
    if not spec.lengths:
        return stage
    queries, keys = (at.size(at.named("a length"), value) for value in spec.lengths)
    return replace(stage, lengths=(queries, keys))


def _over(common: BranchSpec, own: BranchSpec) -> BranchSpec:
    """A branch with what it does not state as the stage states it."""
    given = {f.name: getattr(own, f.name) for f in fields(own) if getattr(own, f.name) is not None}
    return replace(common, **given)


def _term(name: str, spec: TermSpec, at: Reader, own: Mapping[str, Operand]) -> Dot:
    left = at.rows(f"left of {name}", spec.left, "q", own)
    right = at.rows(f"right of {name}", spec.right, "k", own)
    if spec.body is None:
        return Dot(name, left, right)
    known = {**AXES, "x": Input("x", FLOAT, "bhqd"), "y": Input("y", FLOAT, "bhqkd"), "d": Index("d")}
    return Dot(name, left, right, at.value(f"body of {name}", spec.body, known, FLOAT))


def _branch(name: str, spec: BranchSpec, at: Reader, scores: Inputs, pair: Inputs, by_name: bool) -> Branch:
    where = name or at.where

    def kind(what: str, alone: str = "") -> str:
        return f"{what} of {where}" if where else alone or what

    if (spec.group is None) != (spec.groups is None):
        have, lacks = ("group", "groups") if spec.groups is None else ("groups", "group")
        hint = "group gives the group of a pair, and groups says how many there are"
        raise UsageError(f"{kind(have)} is given without {lacks}; {hint}")
    mask = None if spec.mask is None else at.pairwise(kind("mask", "mask_mod"), spec.mask, AXES, BOOL)
    score = None
    if spec.score is not None and by_name:
        score = at.value(kind("score"), spec.score, {**AXES, **scores}, FLOAT)
    elif spec.score is not None:
        score = at.pairwise(kind("score", "score_mod"), spec.score, {"s": build.s, **AXES}, FLOAT)
    grouped = spec.group is not None
    normal = SOFTMAX if spec.normalize is None else _normalizer(spec.normalize, at, pair, grouped, kind)
    stats = {t.name: row_stat(t.name) for t in normal.stats}
    known = {**AXES, **pair, **_AFTER, **stats}
    return Branch(
        build.TRUE if mask is None else mask,
        build.s if score is None else score,
        normal,
        None if spec.weights is None else at.value(kind("weights"), spec.weights, known, FLOAT),
        at.value(kind("group"), spec.group, AXES, INT) if grouped else None,
        at.size(kind("the number of groups"), spec.groups) if grouped else None,
    )


def _normalizer(spec: NormalizerSpec, at: Reader, pair: Inputs, grouped: bool, kind: Kind) -> Normalizer:
    if spec.kind == "softmax":
        sink = spec.values.get("sink")
        return normalizers.softmax(None if sink is None else at.value(kind("sink"), sink, _ROW, FLOAT))
    if spec.kind == "elementwise":
        value = at.value(kind("elementwise"), spec.values["value"], {**AXES, **pair}, FLOAT)
        given = spec.divisor
        if given is None or isinstance(given, str):
            return normalizers.elementwise(value, given)
        return normalizers.elementwise(value, at.value(kind("divisor"), given, _ROW, FLOAT))
    if spec.kind in ("sparsemax", "entmax15"):
        return normalizers.sparsemax() if spec.kind == "sparsemax" else normalizers.entmax15()
    known: Inputs = {}
    stats: list[Stat] = []
    for name, found in spec.stats.items():
        if found.grouped and not grouped:
            hint = "give group=lambda k: ..., and groups=, the number of groups"
            raise UsageError(f"{kind(f'statistic {name}')} is by group, and there are no groups; {hint}")
        own = {name: row_stat(name)} if found.monoid == "root" else {}
        lift = at.value(kind(f"statistic {name}"), found.lift, {**AXES, **pair, **known, **own}, FLOAT)
        seed = found.seed
        start = None if seed is None else at.value(kind(f"seed of {name}"), seed, {**_ROW, **known}, FLOAT)
        stats.append(Stat(name, found.monoid, lift, start, found.grouped))
        known[name] = row_stat(name)
    weight = at.value(kind("weight"), spec.values["weight"], {**AXES, **pair, **known}, FLOAT)
    return Normalizer("stated", tuple(stats), weight)


def _number(name: str, spec: OutputSpec, branches: list[str]) -> int:
    """The number of the branch that an output reads."""
    alone = branches == [""]
    if spec.branch is None:
        if alone:
            return 0
        hint = f"such as output(..., branch={branches[0]!r})"
        raise UsageError(f"output {name} does not say which branch it reads; add it, {hint}")
    if alone:
        raise UsageError(f"output {name} reads branch {spec.branch!r}, and the stage has no branches")
    if spec.branch not in branches:
        raise UsageError(f"output {name} reads branch {spec.branch!r}{suggest(spec.branch, branches)}")
    return branches.index(spec.branch)


def _output(
    name: str,
    spec: OutputSpec,
    at: Reader,
    names: list[str],
    branches: tuple[Branch, ...],
    pair: Inputs,
    own: Mapping[str, Operand],
) -> Output:
    number = _number(name, spec, names)
    stats = {t.name: row_stat(t.name) for t in branches[number].normalizer.stats}
    value = at.value(f"output {name}", spec.value, {**AXES, **pair, **_AFTER, **stats}, FLOAT)
    keys = tuple(at.value(f"key of {name}", key, AXES, INT) for key in spec.key)
    axis = "q" if spec.over == "q" else "k"
    rows = None if spec.rows is None else at.rows(f"rows of {name}", spec.rows, axis, own)
    extents = tuple(at.size(f"extent of {name}", e) for e in spec.extent)
    return Output(name, value, rows, spec.over, spec.monoid, keys, extents, number, spec.empty)
