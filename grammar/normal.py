"""Normalisers: `normalize = softmax(sink=...)` and the `normalize:` block of a normaliser stated by the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from attnlang.ir import Expr, Input, Normalizer, Stat, normalizers, stat

from . import syntax as ast
from .calls import arguments, callee_name, number
from .errors import suggest
from .parameters import check_name
from .scope import Scope

__all__ = ["NORMALIZERS", "named_normalizer", "stated_normalizer"]

NORMALIZERS = ("softmax", "elementwise", "sparsemax", "entmax15")
MONOIDS = ("max", "min", "sum", "root")
DIVISORS = ("sum", "abs", "count")


def _row(scope: Scope, what: str, stats: Mapping[str, Input]) -> Scope:
    """What a row knows before its keys are read, and the statistics it has so far."""
    return replace(scope.restricted(what, axes="bhq", known=stats), inputs={**scope.inputs, **stats})


def named_normalizer(node: ast.Node, scope: Scope, pair: tuple[str, ...]) -> Normalizer:
    """Lower the value of `normalize = ...`; ``pair`` are the inputs a pair has before normalisation."""
    call = ast.Call(node.span, node, ()) if isinstance(node, ast.Name) else node
    name = callee_name(call)
    if name not in NORMALIZERS:
        hint = suggest(name, NORMALIZERS) or "there is softmax, elementwise, sparsemax, entmax15, and `normalize:`"
        raise scope.error(node, "ATL214", "this is not a normaliser", hint)
    assert isinstance(call, ast.Call)
    if name == "softmax":
        given = arguments(call, scope, (), ("sink",))
        sink = given.get("sink")
        return normalizers.softmax(None if sink is None else number(sink, _row(scope, "a sink", {}), "a sink"))
    if name == "elementwise":
        given = arguments(call, scope, ("value",), ("divisor",))
        value = number(given["value"], scope.restricted("a normaliser", known=pair), "the value of `elementwise`")
        return normalizers.elementwise(value, _divisor(given.get("divisor"), scope))
    arguments(call, scope, (), ())
    return normalizers.sparsemax() if name == "sparsemax" else normalizers.entmax15()


def _divisor(node: ast.Node | None, scope: Scope) -> Expr | str | None:
    if node is None or (isinstance(node, ast.Name) and node.id in DIVISORS and node.id not in scope.values):
        return None if node is None else node.id
    return number(node, _row(scope, "a divisor", {}), "a divisor")


class _Stated:
    """The statements of one `normalize:` block."""

    def __init__(self, scope: Scope, pair: tuple[str, ...], grouped: bool) -> None:
        self.scope = scope
        self.pair = pair
        self.grouped = grouped
        self.stats: list[Stat] = []
        self.inputs: dict[str, Input] = {}
        self.weight: Expr | None = None
        self.seen = 0

    def inner(self, what: str, own: str = "") -> Scope:
        """The scope of a value of a pair; ``own`` is a statistic that may read itself."""
        known = {**self.inputs, **({own: stat(own)} if own else {})}
        inputs = {**self.scope.inputs, **known}
        return replace(self.scope.restricted(what, known=(*self.pair, *known)), inputs=inputs)

    def stat(self, node: ast.Named) -> None:
        scope, name = self.scope, node.name.id
        check_name(node.name, scope, "a statistic", {**scope.values, **self.inputs})
        if name in self.pair or name in ("w", "p"):
            raise scope.error(node.name, "ATL202", f"`{name}` is a value of the pair; a statistic needs another name")
        if node.dims is not None:
            raise scope.error(node, "ATL214", "a statistic has no dimensions", f"write `stat {name} = ...`")
        monoid = callee_name(node.value)
        if monoid not in MONOIDS:
            hint = suggest(monoid, MONOIDS) or f"e.g. `stat {name} = max(s)`"
            raise scope.error(node.value, "ATL214", "a statistic is a max, min, sum or root over the keys", hint)
        assert isinstance(node.value, ast.Call)
        given = arguments(node.value, scope, ("value",), ("seed", "by"))
        grouped = self._by(given.get("by"))
        own = name if monoid == "root" else ""
        lift = number(given["value"], self.inner(f"statistic `{name}`", own), f"statistic `{name}`")
        seed = given.get("seed")
        start = None
        if seed is not None:
            what = f"the seed of `{name}`"
            start = number(seed, _row(self.scope, what, self.inputs), what)
        if monoid == "root" and (start is None or grouped):
            message = f"`{name}` needs a seed to search from, and has one value per row"
            raise scope.error(node.value, "ATL214", message, "e.g. `root(max(s - t, 0), seed=m - 1)`")
        self.stats.append(Stat(name, monoid, lift, start, grouped))
        self.inputs[name] = stat(name)

    def _by(self, node: ast.Node | None) -> bool:
        if node is None:
            return False
        if not isinstance(node, ast.Name) or node.id != "group":
            raise self.scope.error(node, "ATL214", "statistics are taken by row, or `by=group`")
        if not self.grouped:
            message = "there are no groups to take a statistic by"
            raise self.scope.error(node, "ATL214", message, "state `group = ...` and `groups = ...` before")
        return True

    def hook(self, node: ast.Hook) -> None:
        if node.name.id != "weight":
            message = f"a `normalize:` block has no statement `{node.name.id} = ...`"
            hint = suggest(node.name.id, ("weight",)) or "it has `let`, `stat name = ...` and `weight = ...`"
            raise self.scope.error(node.name, "ATL214", message, hint)
        if self.weight is not None:
            message = f"`weight` is given twice; the first is on line {self.seen}"
            raise self.scope.error(node.name, "ATL206", message)
        self.seen = node.span.line
        self.weight = number(node.value, self.inner("a normaliser"), "the weight of a normaliser")


def stated_normalizer(
    node: ast.Block,
    scope: Scope,
    pair: tuple[str, ...],
    grouped: bool,
    let: Callable[[ast.Let, Scope], None],
) -> Normalizer:
    """Lower a `normalize:` block; ``let`` lowers a `let` of it into a scope."""
    body = _Stated(scope, pair, grouped)
    for statement in node.statements:
        match statement:
            case ast.Let():
                let(statement, body.inner("a `let`"))
            case ast.Named() if statement.kind.id == "stat":
                body.stat(statement)
            case ast.Hook():
                body.hook(statement)
            case _:
                message = "this has no place in a `normalize:` block"
                raise scope.error(statement, "ATL214", message, "it has `let`, `stat name = ...` and `weight = ...`")
    if body.weight is None:
        raise scope.error(node, "ATL214", "this normaliser has no weight", "add a line `weight = ...`")
    return Normalizer("stated", tuple(body.stats), body.weight)
