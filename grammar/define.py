"""Definitions: helpers and patterns to templates, every mistake of a body reported together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

from attnlang.ir import (
    BOOL,
    FLOAT,
    INT,
    Attend,
    Branch,
    Const,
    Expr,
    InvalidProgram,
    Program,
    build,
    verify,
)
from attnlang.ir.build import op

from . import syntax as ast
from .apply import widen
from .compose import compose
from .errors import AttnError, Diagnostic, Source, suggest
from .explain import RESERVED
from .lower import Lowering
from .parameters import Parameters, check_name, declare, type_named
from .scope import Budget, Names, Poisoned, Scope, Template, Value

__all__ = ["Collector", "define_helper", "define_pattern"]

_AXES_WITH_GRIDS = ("q", "k")


class Collector:
    """Gathers the mistakes of a file, so that one run reports them all."""

    def __init__(self) -> None:
        self.diagnostics: list[Diagnostic] = []

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Record what is raised inside; a use of something broken is silent, since it has been reported."""
        try:
            yield
        except AttnError as error:
            self.diagnostics += error.diagnostics
        except Poisoned:
            pass

    def add(self, errors: list[AttnError]) -> None:
        self.diagnostics += [d for e in errors for d in e.diagnostics]

    def raise_any(self) -> None:
        if self.diagnostics:
            unique = dict.fromkeys(sorted(self.diagnostics, key=lambda d: (d.line, d.column)))
            raise AttnError(*unique)


class _Body:
    """Lowering of the statements of one definition."""

    def __init__(self, scope: Scope, collector: Collector) -> None:
        self.scope = scope
        self.collector = collector
        self.params = Parameters(scope)
        self.failed = False

    @contextmanager
    def part(self) -> Iterator[None]:
        """A part of the body that may fail alone."""
        with self.collector.guard():
            try:
                yield
            except (AttnError, Poisoned):
                self.failed = True
                raise

    def declare(self, params: tuple[ast.ParamDecl, ...]) -> None:
        errors = declare(params, self.params)
        self.failed |= bool(errors) or any(v is None for v in self.scope.values.values())
        self.collector.add(errors)

    def let(self, node: ast.Let) -> None:
        ok = False
        with self.part():
            check_name(node.name, self.scope, "a `let`", self.scope.values)
            lowering = Lowering(self.scope)
            value = lowering.run(node.value)
            self.scope.values[node.name.id] = Value(value, lowering.score)
            ok = True
        if not ok:
            self.scope.values.setdefault(node.name.id, None)


def define_helper(
    node: ast.Helper, source: Source, names: Names, budget: Budget, collector: Collector
) -> Template | None:
    """Lower a helper; None when it is wrong, with the mistakes in ``collector``."""
    scope = Scope(source, names, budget, "a helper, which sees only its arguments", axes=False)
    body = _Body(scope, collector)
    body.declare(node.params)
    scope.later.update({let.name.id: let.span.line for let in node.lets})
    for let in node.lets:
        body.let(let)
    value: Expr | None = None
    with body.part():
        value = Lowering(scope).run(node.value)
        if node.result is not None:
            value = widen(value, type_named(node.result, scope), f"the result of `{node.name.id}`", node.value, scope)
        size = budget.count((value,), source, node.value.span)
    if body.failed or value is None:
        return None
    params = body.params
    return Template(node.name.id, params.scalars, params.tensors, tuple(params.table), size, value=value)


def define_pattern(
    node: ast.Pattern, source: Source, names: Names, budget: Budget, collector: Collector
) -> Template | None:
    """Lower and verify a pattern; None when it is wrong, with the mistakes in ``collector``."""
    scope = Scope(source, names, budget, "a `let`", score=True)
    body = _Body(scope, collector)
    body.declare(node.params)
    if node.composition is not None:
        hooks = _composition(node.composition, body)
    else:
        hooks = _statements(node, body)
    if body.failed or hooks is None:
        return None
    mask, score, grids = hooks
    params = body.params
    stage = Attend(branches=(Branch(mask, score),))
    program = Program(node.name.id, (stage,), params.scalars, params.tensors, grids, node.doc)
    with body.part():
        size = budget.count((mask, score, *(d for t in params.tensors for d in t.shape)), source, node.name.span)
        try:
            verify(program)
        except InvalidProgram as error:
            raise scope.error(node.name, "ATL206", str(error)) from None
    return (
        None
        if body.failed
        else Template(node.name.id, params.scalars, params.tensors, tuple(params.table), size, program=program)
    )


Hooks = tuple[Expr, Expr, tuple[tuple[str, tuple[tuple[str, Expr], ...]], ...]]


def _composition(node: ast.Node, body: _Body) -> Hooks | None:
    with body.part():
        composed, grids = compose(node, body.scope, body.params)
        return composed.mask, composed.score, tuple(grids.items())
    return None


def _statements(node: ast.Pattern, body: _Body) -> Hooks | None:
    scope = body.scope
    scope.later.update({s.name.id: s.span.line for s in node.statements if isinstance(s, ast.Let)})
    hooks: dict[str, Expr] = {}
    extents: dict[str, tuple[tuple[str, Expr], ...]] = {}
    seen: dict[str, int] = {}
    for statement in node.statements:
        match statement:
            case ast.Let():
                body.let(statement)
            case ast.Grid():
                with body.part():
                    _grid(statement, scope, extents)
            case ast.Hook():
                with body.part():
                    _hook(statement, scope, hooks, seen)
    if not seen and not body.failed:
        with body.part():
            message = f"pattern `{node.name.id}` has neither a mask nor a score"
            raise scope.error(node.name, "ATL206", message, "add a line `mask = ...` or `score = ...`")
    return hooks.get("mask", build.TRUE), hooks.get("score", build.s), tuple(extents.items())


def _hook(node: ast.Hook, scope: Scope, hooks: dict[str, Expr], seen: dict[str, int]) -> None:
    name = node.name.id
    if name in RESERVED:
        raise scope.error(node.name, "ATL108", f"`{name}` is reserved for a later version: {RESERVED[name]}")
    if name not in ("mask", "score"):
        if name in scope.values:
            message, hint = f"`{name}` cannot be assigned again", "a name keeps its value; use `let` with a new name"
        else:
            message = f"there is no statement `{name} = ...`"
            hint = suggest(name, ("mask", "score")) or f"write `let {name} = ...` to name a value"
        raise scope.error(node.name, "ATL206", message, hint)
    if name in seen:
        message = f"`{name}` is given twice; the first is on line {seen[name]}"
        raise scope.error(node.name, "ATL206", message, "join masks with `and`" if name == "mask" else "")
    seen[name] = node.span.line
    lowering = Lowering(scope.restricted(f"a {name}", score=name == "score"))
    value = lowering.run(node.value)
    if name == "mask":
        if value.type is not BOOL:
            message = f"a mask must be bool, got {value.type}"
            raise scope.error(node.value, "ATL203", message, "compare it with something, e.g. `... != 0`")
    elif value.type is BOOL:
        message = "a score must be float, got bool"
        raise scope.error(node.value, "ATL203", message, "a condition belongs into `mask = ...`")
    else:
        value = build.cast(value, FLOAT)
    hooks[name] = value


def _grid(node: ast.Grid, scope: Scope, extents: dict[str, tuple[tuple[str, Expr], ...]]) -> None:
    """Define the coordinates of an index that counts the points of a grid, the last coordinate fastest."""
    inner = scope.restricted("the extent of a grid", axes=False, tensors=False)
    shape: list[tuple[str, Expr]] = []
    if len(node.coordinates) > 3:
        raise scope.error(node, "ATL209", f"a grid has at most 3 coordinates, got {len(node.coordinates)}")
    for coordinate in node.coordinates:
        name = coordinate.name.id
        if any(name == other for other, _ in shape):
            raise scope.error(coordinate.name, "ATL201", f"coordinate `{name}` is defined twice")
        extent = Lowering(inner).run(coordinate.extent)
        if extent.type is not INT:
            message = f"the extent of `{name}` must be int, got {extent.type}"
            raise scope.error(coordinate.extent, "ATL209", message)
        if isinstance(extent, Const) and extent.value < 1:
            raise scope.error(coordinate.extent, "ATL209", f"the extent of `{name}` cannot be {extent.value}")
        shape.append((name, extent))
    for axis in node.axes:
        if axis.id not in _AXES_WITH_GRIDS:
            raise scope.error(axis, "ATL209", f"`{axis.id}` cannot have a grid", "grids are declared for q and k")
        if axis.id in scope.grids:
            raise scope.error(axis, "ATL201", f"`{axis.id}` has a grid already")
        scope.grids[axis.id] = _coordinates(axis.id, shape)
        extents[axis.id] = tuple(shape)


def _coordinates(axis: str, shape: list[tuple[str, Expr]]) -> dict[str, Expr]:
    index: Expr = build.q if axis == "q" else build.k
    out: dict[str, Expr] = {}
    for i, (name, extent) in enumerate(shape):
        inner = [e for _, e in shape[i + 1 :]]
        value = op("floordiv", index, reduce(lambda a, c: op("mul", a, c), inner)) if inner else index
        out[name] = op("mod", value, extent) if i else value
    return out
