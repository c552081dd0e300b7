"""Definitions: helpers and patterns to templates, every mistake of a body reported together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attnlang.ir import Attend, Branch, Expr, InvalidProgram, Program, verify

from . import syntax as ast
from .apply import widen
from .body import PatternBody
from .compose import compose
from .errors import AttnError, Diagnostic, Source
from .lower import Lowering
from .parameters import Parameters, check_name, declare, type_named
from .scope import Budget, Names, Poisoned, Scope, Template, Value

__all__ = ["Collector", "define_helper", "define_pattern"]


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

    def let(self, node: ast.Let, scope: Scope | None = None) -> None:
        """Lower a `let`, which may read what ``scope`` knows; its name is known from there on."""
        ok = False
        with self.part():
            check_name(node.name, self.scope, "a `let`", self.scope.values)
            lowering = Lowering(scope or self.scope)
            value = lowering.run(node.value)
            self.scope.values[node.name.id] = Value(value, frozenset(lowering.reads))
            ok = True
        if not ok:
            self.scope.values.setdefault(node.name.id, None)


def define_helper(
    node: ast.Helper, source: Source, names: Names, budget: Budget, collector: Collector
) -> Template | None:
    """Lower a helper; None when it is wrong, with the mistakes in ``collector``."""
    scope = Scope(source, names, budget, "a helper, which sees only its arguments", axes="")
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
    scope = Scope(source, names, budget, "a `let`", known=None)
    body = _Body(scope, collector)
    body.declare(node.params)
    program = _composition(node, body) if node.composition is not None else _statements(node, body)
    if body.failed or program is None:
        return None
    params = body.params
    with body.part():
        roots = [e for stage in program.stages for e in stage.roots()]
        size = budget.count((*roots, *(d for t in params.tensors for d in t.shape)), source, node.name.span)
        try:
            verify(program)
        except InvalidProgram as error:
            raise scope.error(node.name, "ATL206", str(error)) from None
    return (
        None
        if body.failed
        else Template(node.name.id, params.scalars, params.tensors, tuple(params.table), size, program=program)
    )


def _composition(node: ast.Pattern, body: _Body) -> Program | None:
    assert node.composition is not None
    with body.part():
        composed, grids = compose(node.composition, body.scope, body.params)
        stages = composed.stages or (Attend(branches=(Branch(composed.mask, composed.score),)),)
        params = body.params
        return Program(
            node.name.id, stages, params.scalars, params.tensors, tuple(grids.items()), node.doc, composed.returns
        )
    return None


def _statements(node: ast.Pattern, body: _Body) -> Program | None:
    body.scope.later.update({s.name.id: s.span.line for s in node.statements if isinstance(s, ast.Let)})
    found = PatternBody(body.scope, body.let, body.part)
    found.run(node)
    if body.failed:
        return None
    params = body.params
    stages, grids = tuple(found.stages), tuple(found.grids.items())
    return Program(node.name.id, stages, params.scalars, params.tensors, grids, node.doc, found.returns)
