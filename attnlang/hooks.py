"""What a program states beyond mask and score, in Python: normalisers, weights, outputs, score terms and addresses.

Functions say by the names of their parameters what they read: ``b h q k`` (also ``q_idx``, ``kv_idx``), the score ``s``
(also ``score``), ``raw``, ``w``, ``p``, statistics and terms by name, each a 0-d tensor. In the place of a function may
stand a number, or a tensor [B, H, ...] that is read at b, h, ...; for a tensor [H], write ``lambda h: t[h]``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from attnlang.ir import (
    BOOL,
    DEFAULT_OUTPUTS,
    FLOAT,
    INT,
    KEY,
    QUERY,
    SOFTMAX,
    VALUE,
    Address,
    Attend,
    Branch,
    Dot,
    Expr,
    Index,
    Input,
    Load,
    Normalizer,
    Operand,
    Output,
    Stat,
    Type,
    UsageError,
    build,
    normalizers,
)
from attnlang.ir import stat as row_stat
from attnlang.ir.random import LOW, MULTIPLIERS, SHIFTS
from attnlang.tracing import Hook, Traced, trace, trace_hooks

__all__ = [
    "dot",
    "dropout",
    "elementwise",
    "entmax15",
    "normalizer",
    "output",
    "program",
    "random",
    "softmax",
    "sparsemax",
    "stat",
    "sum_d",
]

Mod = Callable[..., Any]
Value = Any
"""A function of named inputs, a tensor, or a number."""

_AXES: dict[str, Expr] = {"b": build.b, "h": build.h, "q": build.q, "k": build.k}
_ALIASES = {"q_idx": "q", "kv_idx": "k", "batch": "b", "head": "h", "score": "s"}
_MONOIDS = ("max", "min", "sum", "root")
OPERANDS = {"Q": QUERY, "K": KEY, "V": VALUE}


@dataclass(frozen=True)
class StatSpec:
    """A row statistic; make one with :func:`stat`."""

    monoid: str
    lift: Value
    seed: Value = None


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
    extent: tuple[int | str, ...]
    rows: Value
    empty: float


@dataclass(frozen=True)
class TermSpec:
    """A score term; make one with :func:`dot` or :func:`sum_d`."""

    left: Value
    right: Value
    body: Value = None


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


def stat(monoid: str, lift: Value, *, seed: Value = None) -> StatSpec:
    """A row statistic: the ``"max"``, ``"min"`` or ``"sum"`` of ``lift``, or the ``"root"`` where it sums to 1.

    Raises:
        UsageError: no such monoid, or a root without a seed.
    """
    if monoid not in _MONOIDS:
        raise UsageError(f"a statistic is one of {', '.join(_MONOIDS)}, got {monoid!r}")
    if monoid == "root" and seed is None:
        raise UsageError("a root needs a seed to search from: stat('root', fn, seed=...)")
    return StatSpec(monoid, lift, seed)


def normalizer(stats: Mapping[str, StatSpec], weight: Value) -> NormalizerSpec:
    """A normaliser of your own: statistics in order, each of which may read those before it, and the weight."""
    for name, found in stats.items():
        if not isinstance(found, StatSpec):
            raise UsageError(f"statistic {name!r} is a {type(found).__name__}; make it with stat('max', fn)")
    return NormalizerSpec("stated", {"weight": weight}, stats=dict(stats))


def output(
    value: Value,
    over: str = "k",
    *,
    monoid: str = "sum",
    key: Value = (),
    extent: int | str | Sequence[int | str] = (),
    rows: Value = None,
    empty: float = 0.0,
) -> OutputSpec:
    """An output: ``monoid`` (``sum max min argmax``) of ``value`` over ``"k"``, ``"q"``, ``"qk"`` or nothing.

    ``key`` is a function, or several, that say which of ``extent`` elements a pair adds to; an extent is a number or a
    size in the language's words, such as ``"cdiv(Lk, 64)"``. ``rows`` (``"V"``, or a function that returns a row of a
    tensor) are multiplied by the value and summed. ``empty`` is what a maximum of nothing is.

    Raises:
        UsageError: ``over``, ``monoid`` or the number of keys is not possible.
    """
    axes = "".join(sorted(over, reverse=True))
    if axes not in ("", "k", "q", "qk"):
        raise UsageError(f"an output reduces over 'k', 'q', 'qk' or '', got {over!r}")
    if monoid not in ("sum", "max", "min", "argmax"):
        raise UsageError(f"an output is a sum, max, min or argmax, got {monoid!r}")
    keys = tuple(key) if isinstance(key, (tuple, list)) else (key,)
    extents = (extent,) if isinstance(extent, (int, str)) else tuple(extent)
    if len(keys) != len(extents):
        raise UsageError(f"an output has {len(keys)} key(s) and {len(extents)} extent(s)")
    return OutputSpec(value, axes, monoid, keys, extents, rows, empty)


def dot(left: Value = "Q", right: Value = "K") -> TermSpec:
    """A score term: the product of two rows, ``"Q"``, ``"K"``, or functions that return a row of a tensor."""
    return TermSpec(left, right)


def sum_d(body: Value, left: Value = "Q", right: Value = "K") -> TermSpec:
    """A score term: the sum over features ``d`` of ``body``, which reads ``x`` and ``y``, one feature of each row."""
    return TermSpec(left, right, body)


class _Builder:
    """Collects what is to be traced, then puts the record of the stage together from its expressions."""

    def __init__(self) -> None:
        self.hooks: list[Hook] = []
        self.found: tuple[Expr, ...] = ()

    def ask(self, kind: str, mod: Value, known: Mapping[str, Expr], want: Type | str) -> Callable[[], Expr]:
        """Trace ``mod``; the function returned gives its expression once that is done."""
        args: tuple[Expr, ...]
        if callable(mod) and not isinstance(mod, torch.Tensor):
            args = tuple(_named(kind, mod, known))
        elif isinstance(mod, (bool, int, float, torch.Tensor)):
            args = tuple(known[a] for a in "bhqk" if a in known)
        else:
            raise UsageError(f"{kind} is a {type(mod).__name__}; give a function, a tensor or a number")
        return self.add(Hook(kind, mod, args, want))

    def add(self, hook: Hook) -> Callable[[], Expr]:
        """Trace ``hook``; the function returned gives its expression once that is done."""
        number = len(self.hooks)
        self.hooks.append(hook)
        return lambda: self.found[number]

    def rows(self, kind: str, value: Value, axis: str) -> Callable[[], Operand]:
        """Rows of an operand of the call, or of a tensor that a function indexes."""
        if isinstance(value, str):
            if value not in OPERANDS:
                raise UsageError(f"{kind} is {value!r}; there is 'Q', 'K', 'V', and a function that returns a row")
            return lambda: OPERANDS[value]
        found = self.ask(kind, value, _AXES, "rows")

        def operand() -> Operand:
            load = found()
            assert isinstance(load, Load)
            index = load.indices[:-1]
            return Operand(load.tensor, Address(*index) if len(index) == 3 else index)

        return operand

    def address(self, kind: str, value: Value, axis: str) -> tuple[Callable[[], Expr], ...]:
        """Three functions of b, h and the row: batch element, head and row of an operand."""
        parts = tuple(value) if isinstance(value, (tuple, list)) else ()
        if len(parts) != 3:
            raise UsageError(f"{kind} are three functions: batch element, head and row, got {value!r}")
        known = {a: _AXES[a] for a in ("b", "h", axis)}
        return tuple(self.ask(f"{kind}[{i}]", part, known, INT) for i, part in enumerate(parts))


def _named(kind: str, mod: Mod, known: Mapping[str, Expr]) -> list[Expr]:
    """What the parameters of ``mod`` ask for by their names."""
    try:
        parameters = inspect.signature(mod).parameters.values()
    except (TypeError, ValueError):
        raise UsageError(f"{kind}: the parameters of {mod!r} cannot be read; wrap it in a lambda") from None
    found: list[Expr] = []
    for parameter in parameters:
        name = _ALIASES.get(parameter.name, parameter.name)
        if name in known:
            found.append(known[name])
        elif parameter.default is inspect.Parameter.empty and parameter.kind in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ):
            raise UsageError(f"{kind} reads {parameter.name!r}; what it can read is: {', '.join(known)}")
        else:
            break  # captured values, as defaults
    return found


def _normalizer(spec: NormalizerSpec, at: _Builder, pair: Mapping[str, Expr]) -> Callable[[], Normalizer]:
    row = {a: _AXES[a] for a in "bhq"}
    if spec.kind == "softmax":
        sink = at.ask("sink", spec.values["sink"], row, FLOAT) if "sink" in spec.values else None
        return lambda: normalizers.softmax(None if sink is None else sink())
    if spec.kind == "elementwise":
        value = at.ask("elementwise", spec.values["value"], {**_AXES, **pair}, FLOAT)
        given = spec.divisor
        if given is None or isinstance(given, str):
            return lambda: normalizers.elementwise(value(), given)
        divisor = at.ask("divisor", given, row, FLOAT)
        return lambda: normalizers.elementwise(value(), divisor())
    if spec.kind in ("sparsemax", "entmax15"):
        return normalizers.sparsemax if spec.kind == "sparsemax" else normalizers.entmax15
    known: dict[str, Expr] = {}
    stats: list[Callable[[], Stat]] = []
    for name, found in spec.stats.items():
        own = {name: row_stat(name)} if found.monoid == "root" else {}
        lift = at.ask(f"statistic {name}", found.lift, {**_AXES, **pair, **known, **own}, FLOAT)
        seed = None if found.seed is None else at.ask(f"seed of {name}", found.seed, {**row, **known}, FLOAT)
        stats.append(
            lambda n=name, f=found, e=lift, x=seed: Stat(n, f.monoid, e(), None if x is None else x())  # type: ignore[misc]
        )
        known[name] = row_stat(name)
    weight = at.ask("weight", spec.values["weight"], {**_AXES, **pair, **known}, FLOAT)
    return lambda: Normalizer("stated", tuple(s() for s in stats), weight())


def _stat_names(spec: NormalizerSpec | None) -> tuple[str, ...]:
    if spec is None or spec.kind == "softmax":
        return tuple(t.name for t in SOFTMAX.stats)
    if spec.kind == "elementwise":
        return ("total",) if isinstance(spec.divisor, str) else ()
    return ("m", "t") if spec.kind in ("sparsemax", "entmax15") else tuple(spec.stats)


def _extent(value: int | str) -> Expr:
    """A number, or a size in the words of the language."""
    if isinstance(value, int):
        return build.const(value)
    from attnlang.grammar import parse

    text = f"pattern extent: output x = sum(w, over=k, key=k, extent={value})"
    return parse(text, filename=f"extent {value!r}").default.attend.outputs[-1].extents[0]


def _output(name: str, spec: OutputSpec, at: _Builder, known: Mapping[str, Expr]) -> Callable[[], Output]:
    value = at.ask(f"output {name}", spec.value, known, FLOAT)
    keys = [at.ask(f"key of {name}", key, _AXES, INT) for key in spec.key]
    rows = None if spec.rows is None else at.rows(f"rows of {name}", spec.rows, spec.over)
    extents = tuple(map(_extent, spec.extent))
    return lambda: Output(
        name,
        value(),
        None if rows is None else rows(),
        spec.over,
        spec.monoid,
        tuple(key() for key in keys),
        extents,
        0,
        spec.empty,
    )


def program(
    mask: Mod | None = None,
    score: Mod | None = None,
    *,
    normalize: NormalizerSpec | None = None,
    weights: Value = None,
    outputs: Mapping[str, OutputSpec] | None = None,
    terms: Mapping[str, TermSpec] | None = None,
    queries: Sequence[Value] | None = None,
    keys: Sequence[Value] | None = None,
    values: Sequence[Value] | str | None = None,
    name: str | None = None,
) -> Traced:
    """Trace Python functions into a program.

    ``mask(b, h, q_idx, kv_idx)`` and ``score(score, b, h, q_idx, kv_idx)`` have FlexAttention's signatures; with
    ``terms``, the score says by the names of its parameters what it reads. ``normalize`` is made with :func:`softmax`
    and its kin, ``outputs`` with :func:`output`, ``terms`` with :func:`dot` and :func:`sum_d`. ``queries``, ``keys``
    and ``values`` are addresses: functions for batch element, head and row; ``values="none"``: there is no ``o``.
    Tensors the functions close over become captured tensors, numbers parameters with the traced values as defaults.
    Branches, groups and stages are stated in ``.attn`` text.

    Raises:
        ProgramError: a function does something that cannot be compiled; the message names the line.
        UsageError: what is given is not of the form described.
    """
    more = (normalize, weights, outputs, terms, queries, keys, values)
    if all(x is None for x in more):
        return trace(mask, score, name=name)
    at = _Builder()
    pair: dict[str, Expr] = {"s": build.s, "raw": Input("raw", FLOAT)}
    named = dict(terms or {})
    if taken := [n for n in named if n in (*_AXES, "raw", "w", "p")]:
        raise UsageError(f"a term cannot be called {taken[0]!r}")
    pair |= {n: Input(n, FLOAT) for n in named}
    dots = [_term(n, spec, at) for n, spec in named.items()]
    moved = {
        n: at.address(n, given, axis)
        for n, given, axis in (("queries", queries, "q"), ("keys", keys, "k"), ("values", values, "k"))
        if given is not None and not isinstance(given, str)
    }
    masked = None if mask is None else at.add(Hook("mask_mod", mask, tuple(_AXES.values()), BOOL))
    scored = None
    if score is not None and named:
        scored = at.ask("score", score, {**_AXES, **{n: e for n, e in pair.items() if n != "raw"}}, FLOAT)
    elif score is not None:
        scored = at.add(Hook("score_mod", score, (build.s, *_AXES.values()), FLOAT))
    normal = None if normalize is None else _normalizer(normalize, at, pair)
    stats = {n: row_stat(n) for n in _stat_names(normalize)}
    known = {**_AXES, **pair, "w": Input("w", FLOAT), "p": Input("p", FLOAT), **stats}
    weighted = None if weights is None else at.ask("weights", weights, known, FLOAT)
    made = [_output(n, spec, at, known) for n, spec in (outputs or {}).items()]

    def assemble(found: tuple[Expr, ...]) -> tuple[Attend, ...]:
        at.found = found
        branch = Branch(
            build.TRUE if masked is None else masked(),
            build.s if scored is None else scored(),
            SOFTMAX if normal is None else normal(),
            None if weighted is None else weighted(),
        )
        place = {n: Address(*(e() for e in found_)) for n, found_ in moved.items()}
        left = replace(QUERY, index=place.get("queries", QUERY.index))
        right = replace(KEY, index=place.get("keys", KEY.index))
        rows = replace(VALUE, index=place.get("values", VALUE.index))
        every = {"s": Dot("s", left, right)} | {t.name: t for t in (make() for make in dots)}
        own = [make() for make in made]
        declared = [out.name for out in own]
        plain = [replace(DEFAULT_OUTPUTS[0], rows=rows)] if values != "none" else []
        plain += [DEFAULT_OUTPUTS[1]] if branch.normalizer.name == "softmax" and not (values == "none" and own) else []
        results = (*(out for out in plain if out.name not in declared), *own)
        return (Attend(terms=tuple(every.values()), branches=(branch,), outputs=results),)

    return trace_hooks(at.hooks, assemble, name=name)


def _term(name: str, spec: TermSpec, at: _Builder) -> Callable[[], Dot]:
    left, right = at.rows(f"left of {name}", spec.left, "q"), at.rows(f"right of {name}", spec.right, "k")
    if spec.body is None:
        return lambda: Dot(name, left(), right())
    x, y = Input("x", FLOAT, "bhqd"), Input("y", FLOAT, "bhqkd")
    body = at.ask(f"body of {name}", spec.body, {**_AXES, "x": x, "y": y, "d": Index("d")}, FLOAT)
    return lambda: Dot(name, left(), right(), body())


def random(seed: Any, *counters: Any) -> Any:
    """A number in [0, 1) that depends on ints alone, as ``random`` of the language; for use inside of hooks.

    Arguments are ints or int64 tensors, 0-d inside of hooks; the result is float32.
    """

    def mix(x: Any) -> Any:
        for shift, factor in zip(SHIFTS, MULTIPLIERS, strict=False):
            x = x ^ (x >> shift)
            x = (x * factor) & LOW
        return x ^ (x >> SHIFTS[-1])

    x = mix(seed & LOW)
    for counter in counters:
        x = mix(x ^ (counter & LOW))
    return (x >> 8) * 2.0**-24


def dropout(value: Any, share: Any, seed: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    """0 for a random ``share`` of all pairs, ``value / (1 - share)`` for the others; for use inside of hooks."""
    return torch.where(random(seed, b, h, q, k) >= share, value / (1 - share), 0.0)
