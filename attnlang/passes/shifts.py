"""Whether an extremum that a stage subtracts from its scores is nothing but a shift.

Then outputs are the same whatever is subtracted, and derivatives may take it for a constant. The check is an identity
test: outputs of a stage with random numbers for everything it reads, computed with two different shifts. Expressions
are analytic almost everywhere, so two that agree at random points in float64 are the same function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from attnlang.ir import (
    BOOL,
    COMBINE,
    IDENTITY,
    INT,
    Attend,
    Environment,
    Expr,
    Input,
    Load,
    Op,
    Param,
    Size,
    Stat,
    evaluate,
    postorder,
    substitute,
)

from .factors import SHIFTED
from .levels import axes_of
from .streaming import Streaming, accumulated

__all__ = ["is_only_a_shift", "moves_nothing"]

Tensor = torch.Tensor
ROWS, KEYS = 3, 5
DRAWS = 4
TOLERANCE = 1e-8


@functools.lru_cache(maxsize=512)
def is_only_a_shift(stream: Streaming, name: str) -> bool:
    """Whether no output of ``stream`` changes when accumulator ``name``, an extremum, is another number."""
    return all(_agrees(stream, name, seed) for seed in range(DRAWS))


def _exprs(stream: Streaming) -> tuple[Expr, ...]:
    settled = () if stream.settled is None else (stream.settled,)
    return (*(a.value for a in stream.accumulators), *(out.value for out in stream.outputs), *settled)


class _Random:
    """Random numbers for whatever expressions read: rows along the first dimension, keys along the second."""

    def __init__(self, exprs: tuple[Expr, ...], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5

        self.loads: dict[Expr, Expr] = {}
        self.inputs: dict[str, Tensor] = {"s": 2 * draw(ROWS, KEYS) - 1, "raw": draw(ROWS, KEYS)}
        axes = axes_of(*exprs)
        params: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        for n in postorder(*exprs):
            if isinstance(n, Load):
                name = f"load {len(self.loads)}"
                shape = (ROWS if "q" in axes[n] else 1, KEYS if "k" in axes[n] else 1)
                value = draw(*shape)
                self.inputs[name] = value > 1 if n.type is BOOL else (value * 4).long() if n.type is INT else value
                self.loads[n] = Input(name, n.type, "".join(sorted(axes[n])))
            elif isinstance(n, Param):
                params[n.name] = draw()
            elif isinstance(n, Size):
                sizes[n.name] = 7
        one = torch.zeros(1, 1, dtype=torch.int64)
        indices = {"b": one, "h": one, "q": torch.arange(ROWS)[:, None] + KEYS, "k": torch.arange(KEYS)[None]}
        self.rows = draw(1, KEYS)
        self.base = Environment(indices, sizes, params, {}, {}, torch.float64)

    def value(self, expr: Expr, more: Mapping[str, Tensor], settled: Mapping[Expr, Expr]) -> Tensor:
        env = self.base
        known = Environment(env.indices, env.sizes, env.params, {}, {**self.inputs, **more}, torch.float64)
        return evaluate(_without(substitute(expr, settled), self.loads), known)


def _without(expr: Expr, loads: Mapping[Expr, Expr]) -> Expr:
    """``expr`` with the outermost ``loads`` replaced, whatever their own indices read."""
    done: dict[Expr, Expr] = {}
    for node in postorder(expr):
        args = tuple(done[a] for a in node.args)
        done[node] = loads.get(node) or (node if args == node.args else node.with_args(args))
    return done[expr]


def _agrees(stream: Streaming, name: str, seed: int) -> bool:
    random = _Random(_exprs(stream), seed)
    first, second = (_outputs(stream, random, name, by) for by in (0.0, 0.375))
    for a, b in zip(first, second, strict=True):
        if not torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=False):
            return False
    return True


_REDUCE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sum": lambda v, d: v.sum(d, keepdim=True),
    "max": lambda v, d: v.amax(d, keepdim=True),
    "min": lambda v, d: v.amin(d, keepdim=True),
    "argmax": lambda v, d: v.argmax(d, keepdim=True).double(),
}


def _outputs(stream: Streaming, random: _Random, name: str, by: float) -> list[Tensor]:
    """Every output where accumulator ``name`` is its true value plus ``by``."""
    top = random.inputs["s"].amax(1, keepdim=True)
    moved = by if name == stream.shift else 0.0
    held: dict[str, Tensor] = {}
    named: dict[Expr, Expr] = {}
    for number, accumulators in enumerate(stream.passes):
        shift = held["settled value"] if number and named else top + moved
        values = {**held, SHIFTED.name: torch.exp(random.inputs["s"] - shift)}
        for a in accumulators:
            if a.name == stream.shift:
                continue
            value = random.value(a.value, values, named).expand(ROWS, KEYS)
            value = value * random.rows if a.rows is not None else value
            along = 1 if a.over == "k" else 0
            held[a.name] = _REDUCE[a.monoid](value, along) + (by if a.name == name else 0.0)
        if number == 0 and stream.shift is not None:
            held[stream.shift] = top + moved
            if stream.settled is not None and stream.settled is not accumulated(stream.shift):
                held["settled value"] = random.value(stream.settled, {**held, stream.shift: top}, {}) + 2 * moved
                named = {stream.settled: Input("settled value", accumulated(stream.shift).type, "bhq")}
    found = []
    for out in stream.outputs:
        if out.column is not None:
            found.append(held[out.column])
            continue
        value = random.value(out.value, held, named)
        if out.integer:
            continue
        found.append(value * held[out.rows] if out.rows is not None else value)
    return found


GROUPS = 2


@functools.lru_cache(maxsize=256)
def moves_nothing(stage: Attend, name: str) -> bool:
    """Whether no weight and no output of a pair changes when extremum ``name`` of a stage is another number, in every
    row and group another. The stage has one branch, and no roots."""
    return all(_stays(stage, name, seed) for seed in range(DRAWS))


def _stays(stage: Attend, name: str, seed: int) -> bool:
    branch = stage.branch
    exprs = [branch.normalizer.weight, *(out.value for out in stage.outputs)]
    exprs += [] if branch.weight is None else [branch.weight]
    for st in branch.normalizer.stats:
        exprs += [st.lift, *(() if st.seed is None else (st.seed,))]
    random = _Random(tuple(exprs), seed)
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(GROUPS, (ROWS, KEYS), generator=generator)
    by = torch.rand(ROWS, GROUPS, generator=generator, dtype=torch.float64)
    chosen = _conditions(exprs, random, generator)
    for term in stage.terms:
        random.inputs.setdefault(term.name, torch.rand(ROWS, KEYS, generator=generator, dtype=torch.float64) + 0.5)
    found = []
    for far in (0.0, 1.0):
        held = dict(chosen)
        for st in branch.normalizer.stats:
            held[st.name] = _statistic(st, random, held, chosen, group)
            if st.name == name:
                held[st.name] = held[st.name] + far * (by.gather(1, group) if st.grouped else by[:, :1])
        held["p"] = held["w"] = _value(branch.normalizer.weight, random, held, chosen)
        if branch.weight is not None:
            held["w"] = _value(branch.weight, random, held, chosen)
        found.append([held["w"], *(_value(out.value, random, held, chosen) for out in stage.outputs)])
    return all(map(_same, *found))


def _same(a: Tensor, b: Tensor) -> bool:
    finite = torch.isfinite(a)
    if not bool(finite.any()) or not torch.equal(finite, torch.isfinite(b)):
        return False
    return torch.allclose(a[finite], b[finite], rtol=TOLERANCE, atol=TOLERANCE)


def _conditions(exprs: list[Expr], random: _Random, generator: torch.Generator) -> dict[str, Tensor]:
    """Random truth for every comparison of a pair that reads nothing of the row, so that each choice is met."""
    found: dict[str, Tensor] = {}
    for n in postorder(*exprs):
        compares = isinstance(n, Op) and n.type is BOOL and n.operands[0].type is not BOOL
        if compares and not any(isinstance(m, Input) for m in postorder(n)):
            name = f"condition {len(found)}"
            found[name] = torch.rand(ROWS, KEYS, generator=generator) > 0.5
            random.loads[n] = Input(name, BOOL)
    return found


def _value(expr: Expr, random: _Random, held: Mapping[str, Tensor], chosen: Mapping[str, Tensor]) -> Tensor:
    return random.value(expr, {**held, **chosen}, {}).double().expand(ROWS, KEYS)


def _statistic(
    st: Stat, random: _Random, held: Mapping[str, Tensor], chosen: Mapping[str, Tensor], group: Tensor
) -> Tensor:
    """What every pair reads of a statistic."""
    lift = _value(st.lift, random, held, chosen)[:, None, :].expand(ROWS, KEYS, KEYS)
    if st.grouped:
        lift = torch.where(group[:, :, None] == group[:, None, :], lift, IDENTITY[st.monoid])
    value = _REDUCE[st.monoid](lift, 2)[..., 0]
    if st.seed is None:
        return value
    seed = _value(st.seed, random, held, chosen)
    return COMBINE[st.monoid](value, seed)
