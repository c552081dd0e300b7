"""What can be stated about a program in Python, as records; the functions that make them check what they can.

A :data:`Value` is a function, which says by the names of its parameters what it reads: ``b h q k`` (also ``q_idx``,
``kv_idx``), sizes (``B H Hkv Lq Lk D Dv``), what earlier stages make, and, where they are known, the score ``s`` (also
``score``), ``raw``, terms, ``w``, ``p`` and statistics. In the place of a function may stand a number, or a tensor
[B, H, ...] that is read at b, h, ...; for a tensor [H], write ``lambda h: t[h]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from attnlang.ir import UsageError

__all__ = [
    "AttendSpec",
    "BranchSpec",
    "Mod",
    "NormalizerSpec",
    "OutputSpec",
    "PoolSpec",
    "RowsSpec",
    "SelectSpec",
    "StageSpec",
    "StatSpec",
    "TermSpec",
    "Value",
    "attend",
    "branch",
    "dot",
    "elementwise",
    "entmax15",
    "normalizer",
    "output",
    "pool",
    "rows",
    "select",
    "softmax",
    "sparsemax",
    "stat",
]

Mod = Callable[..., Any]
Value = Any
"""A function of named inputs, a tensor, or a number."""
Length = Any
"""A size: a number, the words of the language (``"cdiv(Lk, 64)"``), or a function of sizes (``lambda Lk: Lk // 2``)."""

_MONOIDS = ("max", "min", "sum", "root")
_POOLINGS = ("mean", "max", "min", "sum", "first", "last")


@dataclass(frozen=True)
class StatSpec:
    """A row statistic; make one with :func:`stat`."""

    monoid: str
    lift: Value
    seed: Value = None
    grouped: bool = False


@dataclass(frozen=True)
class NormalizerSpec:
    """A normaliser; make one with :func:`softmax`, :func:`elementwise`, ..., or :func:`normalizer`."""

    kind: str
    values: Mapping[str, Value] = field(default_factory=dict)
    divisor: Value = None
    stats: Mapping[str, StatSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputSpec:
    """An output; make one with :func:`output`."""

    value: Value
    over: str
    monoid: str
    key: tuple[Value, ...]
    extent: tuple[Length, ...]
    rows: Value
    empty: float
    branch: str | None = None


@dataclass(frozen=True)
class TermSpec:
    """A score term; make one with :func:`dot` or :func:`sum_d`."""

    left: Value
    right: Value
    body: Value = None


@dataclass(frozen=True)
class BranchSpec:
    """How scores become weights; make one with :func:`branch`. None stands for what the stage states."""

    mask: Value = None
    score: Value = None
    normalize: NormalizerSpec | None = None
    weights: Value = None
    group: Value = None
    groups: Length = None


@dataclass(frozen=True)
class AttendSpec:
    """A stage of attention; make one with :func:`attend`."""

    common: BranchSpec = field(default_factory=BranchSpec)
    branches: Mapping[str, BranchSpec] = field(default_factory=dict)
    outputs: Mapping[str, OutputSpec] = field(default_factory=dict)
    terms: Mapping[str, TermSpec] = field(default_factory=dict)
    queries: Value = None
    keys: Value = None
    values: Value = None
    position: Mapping[str, Value] = field(default_factory=dict)
    lengths: tuple[Length, ...] = ()


@dataclass(frozen=True)
class PoolSpec:
    """A stage that makes a row of each block of rows; make one with :func:`pool`."""

    source: Value
    how: str
    block: Length
    stride: Length = None


@dataclass(frozen=True)
class SelectSpec:
    """A stage that chooses keys for every row; make one with :func:`select`."""

    shape: tuple[Length, ...]
    score: Value
    rule: str
    amount: Value
    candidates: Value = None
    forced: Value = None


@dataclass(frozen=True)
class RowsSpec:
    """A stage that makes rows point by point; make one with :func:`rows`."""

    shape: tuple[Length, ...]
    value: Value


StageSpec: TypeAlias = AttendSpec | PoolSpec | SelectSpec | RowsSpec


def _each(what: str, given: Mapping[str, Any] | None, kind: type, maker: str) -> dict[str, Any]:
    """``given`` as a dict whose values are checked to be of ``kind``."""
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(f"{what}s are a dict of name: {maker}(...), got a {type(given).__name__}")
    for name, found in (given or {}).items():
        if not isinstance(found, kind):
            raise UsageError(f"{what} {name!r} is a {type(found).__name__}; make it with {maker}(...)")
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(f"{what} {name!r} needs a name that a parameter of a function can have")
    return dict(given or {})


# normalisers ---------------------------------------------------------------------------------------------------------


def softmax(sink: Value = None) -> NormalizerSpec:
    """exp(s - m) / l; ``sink`` is a logit that takes weight and has no value. Statistics: ``m`` and ``l``."""
    return NormalizerSpec("softmax", {} if sink is None else {"sink": sink})


def elementwise(value: Value, divisor: Value = None) -> NormalizerSpec:
    """``value`` of each pair, divided by ``divisor``: a value of the row, ``"sum"``, ``"abs"`` or ``"count"``."""
    if isinstance(divisor, str) and divisor not in ("sum", "abs", "count"):
        raise UsageError(f"divisor is {divisor!r}; there is 'sum', 'abs', 'count', and any value of the row")
    return NormalizerSpec("elementwise", {"value": value}, divisor)


def sparsemax() -> NormalizerSpec:
    """max(s - t, 0), which sum to 1. Statistics: ``m`` and ``t``."""
    return NormalizerSpec("sparsemax")


def entmax15() -> NormalizerSpec:
    """max(s / 2 - t, 0) squared, which sum to 1. Statistics: ``m`` and ``t``."""
    return NormalizerSpec("entmax15")


def stat(monoid: str, lift: Value, *, seed: Value = None, by: str | None = None) -> StatSpec:
    """A row statistic: the ``"max"``, ``"min"`` or ``"sum"`` of ``lift``, or the ``"root"`` where it sums to 1.

    With ``by="group"`` there is one for each group of the row, and a pair reads that of its own group.

    Raises:
        UsageError: no such monoid, a root without a seed, or by something else than group.
    """
    if monoid not in _MONOIDS:
        raise UsageError(f"a statistic is one of {', '.join(_MONOIDS)}, got {monoid!r}")
    if monoid == "root" and seed is None:
        raise UsageError("a root needs a seed to search from: stat('root', fn, seed=...)")
    if by not in (None, "group"):
        raise UsageError(f"a statistic is of the row, or by='group', got by={by!r}")
    if monoid == "root" and by is not None:
        raise UsageError("a root is of the whole row: it cannot be by group")
    return StatSpec(monoid, lift, seed, by is not None)


def normalizer(stats: Mapping[str, StatSpec], weight: Value) -> NormalizerSpec:
    """A normaliser of your own: statistics in order, each of which may read those before it, and the weight."""
    return NormalizerSpec("stated", {"weight": weight}, stats=_each("statistic", stats, StatSpec, "stat"))


# attention -----------------------------------------------------------------------------------------------------------


def output(
    value: Value,
    over: str = "k",
    *,
    monoid: str = "sum",
    key: Value = (),
    extent: Length | Sequence[Length] = (),
    rows: Value = None,
    empty: float = 0.0,
    branch: str | None = None,
) -> OutputSpec:
    """An output: ``monoid`` (``sum max min argmax``) of ``value`` over ``"k"``, ``"q"``, ``"qk"`` or nothing (``""``).

    ``key`` is a function, or several, that say which of ``extent`` elements a pair adds to; an extent is a number, a
    size in the language's words, such as ``"cdiv(Lk, 64)"``, or a function of sizes. ``rows`` (``"V"``, the name of
    rows that a stage makes, or a function that returns a row of a tensor) are multiplied by the value and summed.
    ``empty`` is what a maximum of nothing is. ``branch`` names the branch it reads, where the stage has branches.

    Raises:
        UsageError: ``over``, ``monoid`` or the number of keys is not possible.
    """
    axes = "".join(sorted(over, reverse=True)) if isinstance(over, str) else None
    if axes not in ("", "k", "q", "qk"):
        raise UsageError(f"an output reduces over 'k', 'q', 'qk' or '', got {over!r}")
    if monoid not in ("sum", "max", "min", "argmax"):
        raise UsageError(f"an output is a sum, max, min or argmax, got {monoid!r}")
    keys = tuple(key) if isinstance(key, (tuple, list)) else (key,)
    extents = tuple(extent) if isinstance(extent, (tuple, list)) else (extent,)
    if len(keys) != len(extents):
        raise UsageError(f"an output has {len(keys)} key(s) and {len(extents)} extent(s)")
    return OutputSpec(value, axes, monoid, keys, extents, rows, empty, branch)


def dot(left: Value = "Q", right: Value = "K") -> TermSpec:
    """A score term: the product of two rows: ``"Q"``, ``"K"``, the name of rows that a stage makes, or functions that
    return a row of a tensor."""
    return TermSpec(left, right)


def branch(
    mask: Value = None,
    score: Value = None,
    *,
    normalize: NormalizerSpec | None = None,
    weights: Value = None,
    group: Value = None,
    groups: Length = None,
) -> BranchSpec:
    """A branch of a stage of attention: its own way from the shared scores to weights.

    What is not given is as the stage states it. ``group`` gives the group of a pair, from 0 to ``groups`` - 1; a pair
    outside is in none.

    Raises:
        UsageError: ``normalize`` was not made with :func:`softmax` or its kin.
    """
    if normalize is not None and not isinstance(normalize, NormalizerSpec):
        message = "make it with softmax(), elementwise(fn), ..., or normalizer({'m': stat(...)}, weight)"
        raise UsageError(f"normalize is a {type(normalize).__name__}; {message}")
    return BranchSpec(mask, score, normalize, weights, group, groups)


def attend(
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
) -> AttendSpec:
    """A stage of attention among the ``stages`` of a program; the arguments are those of :func:`program`.

    Without outputs of its own, a stage called ``name`` makes ``name`` and ``name_lse``; with them, those.

    Raises:
        UsageError: what is given is not of the form described.
    """
    places = dict(position or {})
    if wrong := [a for a in places if a not in ("q", "k")]:
        raise UsageError(f"{wrong[0]!r} has no position; positions are those of 'q' and 'k'")
    pair = () if lengths is None else tuple(lengths) if isinstance(lengths, (tuple, list)) else (lengths,)
    if lengths is not None and len(pair) != 2:
        raise UsageError(f"lengths are two, of queries and of keys, such as ('Lq', 'cdiv(Lk, 64)'), got {lengths!r}")
    return AttendSpec(
        branch(mask, score, normalize=normalize, weights=weights, group=group, groups=groups),
        _each("branch", branches, BranchSpec, "branch"),
        _each("output", outputs, OutputSpec, "output"),
        _each("term", terms, TermSpec, "dot"),
        queries,
        keys,
        values,
        places,
        pair,
    )


# rows ----------------------------------------------------------------------------------------------------------------


def pool(source: Value, how: str = "mean", *, block: Length, stride: Length = None) -> PoolSpec:
    """A stage: the ``mean``, ``max``, ``min``, ``sum``, ``first`` or ``last`` of each block of rows.

    ``source`` is ``"Q"``, ``"K"``, ``"V"``, the name of what an earlier stage makes, or a float tensor [batch, heads,
    rows, features]. Blocks start every ``stride`` rows (``block`` if not given); the last one may be short.

    Raises:
        UsageError: rows are not pooled like this.
    """
    if how not in _POOLINGS:
        raise UsageError(f"rows are not pooled by {how!r}; there is: {', '.join(_POOLINGS)}")
    return PoolSpec(source, how, block, stride)


def select(
    shape: Sequence[Length],
    score: Value,
    *,
    top: Value = None,
    threshold: Value = None,
    mass: Value = None,
    candidates: Value = None,
    forced: Value = None,
) -> SelectSpec:
    """A stage: chooses keys for every row, as a bool tensor [B, H, rows, keys] that later masks read.

    ``shape`` is (rows, keys), or all four; ``q`` counts rows and ``k`` what is chosen. The rule is one of ``top``, the
    number of largest scores to choose; ``threshold``, the least score; and ``mass``, to choose the fewest largest
    scores whose softmax sums to at least that. Pairs outside ``candidates`` are never chosen, those in ``forced``
    always, and they count. A choice has no gradient.

    Raises:
        UsageError: not one rule, or no shape.
    """
    given = {n: v for n, v in (("top", top), ("threshold", threshold), ("mass", mass)) if v is not None}
    if len(given) != 1:
        raise UsageError(f"select needs one of top, threshold and mass, got {', '.join(given) or 'none'}")
    (rule, amount), *_ = given.items()
    return SelectSpec(_shape("select", shape), score, rule, amount, candidates, forced)


def rows(shape: Sequence[Length], value: Value) -> RowsSpec:
    """A stage: rows [B, H, rows, features] made point by point.

    ``shape`` is (rows, features), or all four. ``value`` reads the row ``q``, the feature ``d``, and elements of ``Q``,
    ``K``, ``V``, of what earlier stages make and of captured tensors by all their indices; inside of it, ``sum_d(e)``,
    ``mean_d(e)`` and ``max_d(e)`` reduce over the features of the row.

    Raises:
        UsageError: no shape.
    """
    return RowsSpec(_shape("rows", shape), value)


def _shape(what: str, shape: Sequence[Length]) -> tuple[Length, ...]:
    found = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if len(found) not in (2, 4):
        raise UsageError(f"{what} needs a shape of 2 or 4 dimensions, such as ('Lq', 'Dv'), got {shape!r}")
    return found
