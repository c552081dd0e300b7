"""Random row maps: stages that prepare queries, keys or values, and stages that finish what attention makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

from attnlang.ir import FLOAT, INT, Attend, Expr, Index, Input, Load, Map, Operand, Output, Pool, Size, Stage
from attnlang.ir.build import b, const, h, op, q
from attnlang.ir.stages import DEFAULT_OUTPUTS, SOFTMAX

from .random_draws import HEAD, ROW, Choice

LSE = DEFAULT_OUTPUTS[1]
D = Index("d")
Element = Callable[[Expr, Expr, Expr, Expr], Expr]
"""An element of rows by batch element, head, row and feature."""
Made = tuple[Expr, tuple[tuple[str, str, Expr], ...]]
"""The value of a map and its reductions over features."""


def element(source: str) -> Element:
    """The elements of a tensor."""
    return lambda batch, head, row, feature: Load(source, (batch, head, row, feature), FLOAT)


def _let(name: str) -> Expr:
    return Input(name, FLOAT, "bhq")


def _rotated(draw: Choice, at: Element, features: Expr) -> Made:
    """Two halves of the features turned by an angle of the row, which learns."""
    half, angle = op("floordiv", features, 2), Load("angle", (q, D), FLOAT)
    lower, upper = at(b, h, q, op("sub", D, half)), op("neg", at(b, h, q, op("add", D, half)))
    other = op("where", op("ge", D, half), lower, upper)
    return op("add", op("mul", at(b, h, q, D), op("cos", angle)), op("mul", other, op("sin", angle))), ()


def _normed(draw: Choice, at: Element, features: Expr) -> Made:
    own = at(b, h, q, D)
    weight = draw.one((Load("feature", (D,), FLOAT), op("add", HEAD, 1.0)))
    value = op("mul", op("mul", own, op("rsqrt", op("add", _let("power"), 0.1))), weight)
    return value, (("power", "mean", op("mul", own, own)),)


def _centred(draw: Choice, at: Element, features: Expr) -> Made:
    """The second reduction reads the first."""
    apart = op("sub", at(b, h, q, D), _let("middle"))
    value = op("div", apart, op("add", _let("width"), 0.5))
    return value, (("middle", "mean", at(b, h, q, D)), ("width", "max", op("abs", apart)))


def _softened(draw: Choice, at: Element, features: Expr) -> Made:
    """A softmax over the features."""
    over = op("exp", op("sub", at(b, h, q, D), _let("top")))
    return op("div", over, _let("total")), (("top", "max", at(b, h, q, D)), ("total", "sum", over))


def _gated(draw: Choice, at: Element, features: Expr) -> Made:
    """Gates by captured tensors; some are known at h, q or d only, some at all of them."""
    gates = (
        HEAD,
        ROW,
        op("add", HEAD, ROW),
        Load("col", (b, q), FLOAT),
        Load("feature", (D,), FLOAT),
        Load("gate", (b, h, q, D), FLOAT),
        Load("gate", (const(0), h, op("floordiv", q, 2), D), FLOAT),
    )
    return op("mul", at(b, h, q, D), op("sigmoid", draw.one(gates))), ()


def _bent(draw: Choice, at: Element, features: Expr) -> Made:
    own = at(b, h, q, D)
    bent = (op("tanh", own), op("mul", own, op("sigmoid", own)), op("where", op("gt", own, 0.0), own, op("expm1", own)))
    return op("add", draw.one(bent), draw.number()), ()


def _mixed(draw: Choice, at: Element, features: Expr) -> Made:
    """A row and another one: the row before, rows backwards, rows that a table names, other heads and elements."""
    named = op("add", op("mul", Load("page", (b, op("floordiv", q, 4)), INT), 4), op("mod", q, 4))
    other = draw.one(
        (
            op("where", op("gt", q, 0), at(b, h, op("sub", q, 1), D), 0.0),
            at(b, h, op("sub", 5, q), D),
            at(b, h, named, D),
            at(b, op("sub", 1, h), q, D),
            at(const(0), h, q, D),
            at(b, h, op("mul", q, 2), op("sub", op("sub", features, 1), D)),
        )
    )
    share = op("sigmoid", draw.one((HEAD, ROW, const(0.5))))
    return op("add", op("mul", share, at(b, h, q, D)), op("mul", op("sub", 1.0, share), other)), ()


def _joined(draw: Choice, at: Element, features: Expr) -> Made:
    """Rows and rows of the call at the same place, as of a residual connection."""
    heads = op("floordiv", h, op("floordiv", Size("H"), Size("Hkv")))
    there = draw.one((Load("q", (b, h, q, D), FLOAT), Load("k", (b, heads, q, D), FLOAT)))
    return op("add", at(b, h, q, D), op("mul", there, draw.number())), ()


RECIPES: tuple[Callable[[Choice, Element, Expr], Made], ...] = (
    _rotated,
    _normed,
    _centred,
    _softened,
    _gated,
    _bent,
    _mixed,
    _joined,
)
Extents = tuple[Expr, Expr, Expr, Expr]


def _chain(draw: Choice, name: str, extents: Extents, at: Element) -> tuple[Map, ...]:
    """A map called ``name`` of the rows ``at``, or two, one of the other."""
    first = draw.one(RECIPES)(draw, at, extents[3])
    if draw.chance(0.7):
        return (Map(name, extents, *first),)
    then = draw.one(RECIPES)(draw, element(f"{name}_first"), extents[3])
    return Map(f"{name}_first", extents, *first), Map(name, extents, *then)


def prologues(draw: Choice) -> tuple[tuple[Map, ...], dict[str, str]]:
    """Maps that prepare some of q, k and v, and by which names stages read what they make."""
    keys: Extents = (Size("B"), Size("Hkv"), Size("Lk"), Size("D"))
    extents: dict[str, Extents] = {"q": (Size("B"), Size("H"), Size("Lq"), Size("D")), "k": keys}
    extents["v"] = (*keys[:3], Size("Dv"))
    made: list[Map] = []
    prepared = draw.one(("q", "q", "k", "qk", "qk", "v", "kv", "qkv"))
    for source in prepared:
        at, shape = element(source), extents[source]
        if source != "q" and prepared != "k" and draw.chance(0.15):
            at, shape = _for_each_head(at), (shape[0], Size("H"), *shape[2:])
        made += _chain(draw, f"made_{source}", shape, at)
    return tuple(made), {source: f"made_{source}" for source in prepared}


def _for_each_head(at: Element) -> Element:
    """Rows of key heads by heads of queries."""
    group = op("floordiv", Size("H"), Size("Hkv"))
    return lambda batch, head, row, feature: at(batch, op("floordiv", head, group), row, feature)


def reading(stage: Stage, names: Mapping[str, str]) -> Stage:
    """``stage`` with operands of the call replaced by what ``names`` says."""
    if isinstance(stage, Pool):
        return replace(stage, source=names.get(stage.source, stage.source))
    if not isinstance(stage, Attend):
        return stage

    def moved(x: Operand) -> Operand:
        return replace(x, source=names.get(x.source, x.source))

    terms = tuple(replace(t, left=moved(t.left), right=moved(t.right)) for t in stage.terms)
    outputs = tuple(o if o.rows is None else replace(o, rows=moved(o.rows)) for o in stage.outputs)
    return replace(stage, terms=terms, outputs=outputs)


def epilogues(draw: Choice, stage: Attend) -> tuple[Attend, tuple[Map, ...]]:
    """Maps of what ``stage`` makes, and the stage, perhaps with more outputs or other names for them.

    The last map is called ``finished``, or ``o`` in the place of the output of that name.
    """
    rows = [
        o.name for o in stage.outputs if o.rows is not None and o.rows.source == "v" and o.over == "k" and not o.key
    ]
    if not rows:
        return stage, ()
    first, *others = rows
    name = "finished"
    if first == "o" and draw.chance(0.4):
        stage = replace(stage, outputs=tuple(replace(o, name="inner") if o.name == "o" else o for o in stage.outputs))
        first, name = "inner", "o"
    at = element(first)
    for before, other in pairwise(rows):
        stage, share = _share(draw, stage, before if before in others else first, other)
        at = _sum(at, element(other), share)
    if draw.chance(0.2):
        stage, gate = _number(draw, stage)
        at = _product(at, gate)
    made = _chain(draw, name, (Size("B"), Size("H"), stage.lengths[0], Size("Dv")), at)
    return stage, made


def _with(stage: Attend, more: tuple[Output, ...]) -> Attend:
    return replace(stage, outputs=(*stage.outputs, *(o for o in more if o not in stage.outputs)))


def _number(draw: Choice, stage: Attend) -> tuple[Attend, Expr]:
    """A gate made of a number of the row that ``stage`` makes, of its logsumexp where there is no other."""
    numbers = [o.name for o in stage.outputs if o == Output(o.name, o.value, branch=o.branch)]
    if not numbers and stage.branches[0].normalizer == SOFTMAX:
        stage, numbers = _with(stage, (replace(LSE, name="lse_0"),)), ["lse_0"]
    gates = [op("sigmoid", op("max", Load(name, (b, h, q), FLOAT), -20.0)) for name in numbers]
    return stage, draw.one(gates or [op("sigmoid", HEAD)])


def _product(one: Element, factor: Expr) -> Element:
    return lambda *at: op("mul", one(*at), factor)


def _sum(one: Element, other: Element, share: Expr) -> Element:
    return lambda *at: op("add", op("mul", one(*at), share), op("mul", other(*at), op("sub", 1.0, share)))


def _share(draw: Choice, stage: Attend, first: str, other: str) -> tuple[Attend, Expr]:
    """The share of the rows ``first`` in a sum with ``other``: by a gate, or by the logsumexps where both have one."""
    mine, theirs = (next(o for o in stage.outputs if o.name == name) for name in (first, other))
    if any(stage.branches[o.branch].normalizer != SOFTMAX for o in (mine, theirs)) or draw.chance(0.5):
        return stage, op("sigmoid", draw.one((HEAD, ROW, op("mul", ROW, 0.5))))
    found = tuple(replace(LSE, name=f"lse_{o.branch}", branch=o.branch) for o in (mine, theirs))
    a, c = (op("max", Load(o.name, (b, h, q), FLOAT), -20.0) for o in found)
    return _with(stage, found), op("sigmoid", op("sub", a, c))
