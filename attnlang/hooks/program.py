"""``program``: Python functions to a program, of one stage or of several in the order in which they are stated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from attnlang.ir import (
    BOOL,
    FLOAT,
    INT,
    Const,
    Expr,
    Index,
    Input,
    Map,
    Pool,
    Select,
    Size,
    Stage,
    UsageError,
    tensors_made,
)
from attnlang.runtime.bind import suggest
from attnlang.tracing import Ask, NamedTensor, Traced, captured_shapes, trace_stages, unwrap

from .attention import attend_stage, outputs_of
from .reading import ALIASES, AXES, OPERANDS, SIZES, Reader, is_function
from .specs import (
    AttendSpec,
    BranchSpec,
    Length,
    NormalizerSpec,
    OutputSpec,
    PoolSpec,
    RowsSpec,
    SelectSpec,
    StageSpec,
    TermSpec,
    Value,
    attend,
)

__all__ = ["program"]

_ROW = {a: AXES[a] for a in "bhq"}
_RESERVED = frozenset((*AXES, *SIZES, *ALIASES, *OPERANDS, *OPERANDS.values(), *"sdwp", "raw", "none"))
"""Names that nothing a stage makes can have: functions read something else by them."""


class _Stages:
    """Traces stages in order; each may read by name what those before it make.

    The main stage runs where another stage first reads something that it makes, or last.
    """

    def __init__(self, main: AttendSpec | None, specs: Mapping[str, StageSpec], ask: Ask) -> None:
        self.specs: dict[str, StageSpec] = dict(specs)
        if main is not None:
            self.specs[""] = main
        self.ask = ask
        self.begun: set[str] = set()
        self.stages: list[Stage] = []
        self.tensors: dict[str, NamedTensor] = {}

    def run(self) -> tuple[Stage, ...]:
        for name in self.specs:
            if name not in self.begun:
                self._stage(name)
        return tuple(self.stages)

    def _stage(self, name: str) -> None:
        self.begun.add(name)
        spec, at = self.specs[name], Reader(self.ask, name, self)
        stage: Stage
        if isinstance(spec, AttendSpec):
            stage = attend_stage(name, spec, at)
        elif isinstance(spec, PoolSpec):
            stage = _pool(name, spec, at)
        elif isinstance(spec, SelectSpec):
            stage = _select(name, spec, at)
        else:
            stage = _rows(name, spec, at)
        shapes = {n: t.sizes for n, t in self.tensors.items()} | captured_shapes()
        made = tensors_made(stage, shapes)
        self.stages.append(stage)
        self.tensors |= {n: NamedTensor(n, t.type, t.shape) for n, t in made.items()}

    # what stages may read: see reading.Made

    def find(self, name: str) -> NamedTensor | None:
        main = self.specs.get("")
        if isinstance(main, AttendSpec) and "" not in self.begun and name in outputs_of("", main):
            self._stage("")
        return self.tensors.get(name)

    def names(self) -> list[str]:
        return list(self.tensors)

    def missing(self, name: str) -> str:
        for stage, spec in self.specs.items():
            made = _makes(stage, spec)
            if name in made and name not in self.tensors:
                what = f"stage {stage!r}" if stage else "the main stage"
                return f"{what} makes it, and has not run at that point; a stage reads what stages before it make"
            if name == stage and made:
                return f"that is a stage, which makes {', '.join(made)}"
        return ""


def _makes(name: str, spec: StageSpec) -> list[str]:
    return outputs_of(name, spec) if isinstance(spec, AttendSpec) else [name]


def _extents(name: str, shape: tuple[Length, ...], at: Reader) -> tuple[Expr, Expr, Expr, Expr]:
    """Four extents; where two are given they follow batch and heads."""
    found = [at.size(f"the shape of {name}", e) for e in shape]
    batch, heads, rows, last = found if len(found) == 4 else (Size("B"), Size("H"), *found)
    return batch, heads, rows, last


def _pool(name: str, spec: PoolSpec, at: Reader) -> Pool:
    kind = f"the source of {name}"
    if isinstance(spec.source, str):
        source = at.source(kind, spec.source).name
    elif isinstance(spec.source, torch.Tensor) and spec.source.dim() == 4:
        source = at.rows(kind, spec.source, "q", {}).source
    else:
        hint = "give 'Q', 'K', 'V', the name of what a stage makes, or a tensor [batch, heads, rows, features]"
        raise UsageError(f"{kind} has no rows; {hint}")
    stride = None if spec.stride is None else at.size(f"the stride of {name}", spec.stride)
    return Pool(name, source, at.size(f"the block of {name}", spec.block), spec.how, stride)


def _select(name: str, spec: SelectSpec, at: Reader) -> Select:
    extents = _extents(name, spec.shape, at)
    known: dict[str, Expr | NamedTensor] = {**AXES, **at.elements}
    score = at.value(f"the score of {name}", spec.score, known, FLOAT)
    want = INT if spec.rule == "top" else FLOAT
    row: dict[str, Expr | NamedTensor] = {**_ROW, **at.elements}
    amount = at.value(f"{spec.rule} of {name}", spec.amount, row, want)
    if spec.rule == "top" and isinstance(amount, Const) and amount.value < 1:
        raise UsageError(f"top of {name} is at least 1, got {amount.value}")
    given = {"candidates": spec.candidates, "forced": spec.forced}
    conditions = {n: at.value(f"{n} of {name}", v, known, BOOL) for n, v in given.items() if v is not None}
    rule = {spec.rule: amount}
    return Select(name, extents, score, **conditions, **rule)


def _rows(name: str, spec: RowsSpec, at: Reader) -> Map:
    lets: dict[tuple[str, Expr], Input] = {}
    known: dict[str, Expr | NamedTensor] = {**_ROW, "d": Index("d"), **at.elements}
    extents = _extents(name, spec.shape, at)
    value = at.value(f"rows {name}", spec.value, known, FLOAT, over_d=lets)
    return Map(name, extents, value, tuple((own.name, monoid, e) for (monoid, e), own in lets.items()))


def _checked(main: AttendSpec | None, stages: Mapping[str, StageSpec] | None) -> dict[str, StageSpec]:
    """The stages, each with a name of its own for everything it makes."""
    if stages is not None and not isinstance(stages, Mapping):
        raise UsageError(f"stages are a dict of name: attend(...), pool(...), ..., got a {type(stages).__name__}")
    found = dict(stages or {})
    taken: set[str] = set()
    for stage, spec in {**({"": main} if main is not None and found else {}), **found}.items():
        if not isinstance(spec, (AttendSpec, PoolSpec, SelectSpec, RowsSpec)):
            hint = "make it with attend(...), pool(...), select(...) or rows(...)"
            raise UsageError(f"stage {stage!r} is a {type(spec).__name__}; {hint}")
        for name in dict.fromkeys((*([stage] if spec is not main else []), *_makes(stage, spec))):
            if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
                why = "functions read something else by it" if name in _RESERVED else "it is no name of a parameter"
                raise UsageError(f"nothing that a stage makes can be called {name!r}: {why}")
            if name in taken:
                own = name in ("o", "lse") and main is not None and name in _makes("", main)
                hint = "make the main stage one of them, stages={'inner': attend(...), ...}" if own else "rename one"
                raise UsageError(f"two stages make {name!r}; {hint}")
            taken.add(name)
    return found


def _functions(value: Any) -> Iterator[Any]:
    """Every function that is stated, in order."""
    if is_dataclass(value) and not isinstance(value, type) and not callable(value):
        for f in fields(value):
            yield from _functions(getattr(value, f.name))
    elif isinstance(value, Mapping):
        yield from _functions(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _functions(item)
    elif is_function(value) and (mod := unwrap(value)) is not None:
        yield mod


def program(
    mask: Value = None,
    score: Value = None,
    *,
    normalize: NormalizerSpec | None = None,
    weights: Value = None,
    group: Value = None,
    groups: Length = None,
    branches: Mapping[str, BranchSpec] | None = None,
    outputs: Mapping[str, OutputSpec] | None = None,
    terms: Mapping[str, TermSpec] | None = None,
    queries: Value = None,
    keys: Value = None,
    values: Value = None,
    position: Mapping[str, Value] | None = None,
    lengths: Sequence[Length] | None = None,
    stages: Mapping[str, StageSpec] | None = None,
    returns: str | Sequence[str] = (),
    name: str | None = None,
) -> Traced:
    """Trace Python functions into a program.

    Args:
        mask: ``mask(b, h, q_idx, kv_idx) -> bool``, as FlexAttention's, under any names; further parameters are read by
            name. A function of fewer parameters, or whose first ones have names of other things, reads all by name.
        score: ``score(score, b, h, q_idx, kv_idx)``, the same; with ``terms`` it reads everything by name.
        normalize: made with :func:`softmax` or its kin.
        weights: what replaces the weight ``w`` of a pair.
        group, groups: the group of a pair, and the number of groups, for statistics by group.
        branches: several ways from scores to weights, by name, made with :func:`branch`; each starts from what is
            stated here, and every output says which one it reads.
        outputs: made with :func:`output`.
        terms: further score terms, made with :func:`dot` and :func:`sum_d`.
        queries, keys, values: rows in the place of those of the call: the name of rows that a stage makes, a function
            that returns a row of a tensor, or three functions for batch element, head and row. ``values="none"``: there
            is no ``o``.
        position: the positions that functions see in the place of ``"q"`` and ``"k"``.
        lengths: how many queries and keys there are, if not ``("Lq", "Lk")``.
        stages: further stages by name, in order, made with :func:`attend`, :func:`pool`, :func:`select` and
            :func:`rows`. All of the above is one stage more, the main one, if any of it is given; it runs where another
            stage first reads what it makes, or last. Functions read what earlier stages make as tensors, by name.
        returns: names of the results; what the last stage makes if not given.
        name: of the program; the functions' names if not given.

    Tensors the functions close over become captured tensors, numbers parameters with the traced values as defaults.

    Raises:
        ProgramError: a function does something that cannot be compiled; the message names the line.
        UsageError: what is given is not of the form described.
    """
    stated = attend(
        mask,
        score,
        normalize=normalize,
        weights=weights,
        group=group,
        groups=groups,
        branches=branches,
        outputs=outputs,
        terms=terms,
        queries=queries,
        keys=keys,
        values=values,
        position=position,
        lengths=lengths,
    )
    given = (mask, score, normalize, weights, group, groups, branches, outputs, terms, queries, keys, values)
    main = stated if not stages or any(x is not None for x in (*given, position, lengths)) else None
    specs = _checked(main, stages)
    results = (returns,) if isinstance(returns, str) else tuple(returns)
    made = [n for stage, spec in {**specs, **({"": main} if main else {})}.items() for n in _makes(stage, spec)]
    if wrong := [n for n in results if n not in made]:
        raise UsageError(f"no stage makes {wrong[0]!r}, which returns names{suggest(wrong[0], made)}")
    if len(set(results)) < len(results):
        raise UsageError(f"returns names {max(results, key=results.count)!r} twice")
    functions = list(_functions((stated, specs)))
    return trace_stages(
        functions, lambda ask: _Stages(main, specs, ask).run(), name=name, taken=made if specs else (), returns=results
    )
