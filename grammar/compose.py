"""Compositions: `pattern name = causal & sliding_window(512) & softcap`."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TypeAlias

from attnlang.ir import Attend, Expr, Stage, build, substitute
from attnlang.ir.build import op

from . import syntax as ast
from .apply import Substitution, bind_scalar, bind_tensor, check_shapes, match_arguments
from .errors import AttnError
from .lower import lower
from .parameters import Parameters, rename_open
from .scope import Scope, Template
from .words import callee, only_hooks

__all__ = ["Composed", "compose"]

Grids: TypeAlias = "dict[str, tuple[tuple[str, Expr], ...]]"


@dataclass(frozen=True)
class Composed:
    """Hooks of a composition; ``scored`` names the first pattern in it that changes the score.

    ``stages`` are those of the pattern in it that is more than a mask and a score, called ``extra``, with the mask and
    score of the others worked in; ``returns`` is what that pattern gives back.
    """

    mask: Expr
    score: Expr
    scored: str = ""
    extra: str = ""
    stages: tuple[Stage, ...] = ()
    returns: tuple[str, ...] = ()


Steps: TypeAlias = Generator["ast.Node", Composed, Composed]


def compose(root: ast.Node, scope: Scope, params: Parameters) -> tuple[Composed, Grids]:
    """Evaluate a composition; parameters it leaves open are added to ``params``.

    Raises:
        AttnError, Poisoned: as :func:`attnlang.grammar.lower.lower`.
    """
    composer = _Composer(scope, params)
    stack = [composer.steps(root)]
    value: Composed | None = None
    while stack:
        try:
            child = stack[-1].send(value)  # type: ignore[arg-type]
        except StopIteration as done:
            stack.pop()
            value = done.value
            continue
        scope.budget.charge(1, scope.source, child.span)
        stack.append(composer.steps(child))
        value = None
    assert value is not None
    return value, composer.grids


class _Composer:
    def __init__(self, scope: Scope, params: Parameters) -> None:
        self.scope = scope
        self.params = params
        self.grids: Grids = {}

    def steps(self, node: ast.Node) -> Steps:
        if isinstance(node, ast.Binary) and node.op == "&":
            left = yield node.left
            right = yield node.right
            return self._both(left, right, node)
        if isinstance(node, ast.Binary) and node.op == "|":
            left = yield node.left
            self._need_mask(left, "|", node.left)
            right = yield node.right
            self._need_mask(right, "|", node.right)
            return Composed(build.any_of(left.mask, right.mask), build.s)
        if isinstance(node, ast.Unary) and node.op == "~":
            inner = yield node.operand
            self._need_mask(inner, "~", node.operand)
            return Composed(op("not", inner.mask), build.s)
        if isinstance(node, ast.Name | ast.Attribute):
            node = ast.Call(node.span, node, ())
        if isinstance(node, ast.Call):
            return self._pattern(node)
        raise self._not_a_composition(node)

    def _not_a_composition(self, node: ast.Node) -> AttnError:
        hint = "a composition joins patterns with `&`, `|` and `~`; other conditions go into a body: `mask = ...`"
        if isinstance(node, ast.Binary | ast.Unary) and node.op in ("and", "or", "not"):
            sign = {"and": "&", "or": "|", "not": "~"}[node.op]
            hint = f"patterns are joined with `{sign}`"
        return self.scope.error(node, "ATL210", "this is not a pattern or a composition of patterns", hint)

    def _both(self, left: Composed, right: Composed, node: ast.Node) -> Composed:
        """Masks are and-ed; the score of the left is the `s` of the right."""
        if left.extra and right.extra:
            message = f"`{left.extra}` and `{right.extra}` are both more than a mask and a score"
            hint = "at most one pattern of a composition has a normaliser, weights, outputs or stages"
            raise self.scope.error(node, "ATL210", message, hint)
        scored = left.scored or right.scored
        if not left.extra and not right.extra:
            return Composed(build.all_of(left.mask, right.mask), self._scores(left.score, right.score, node), scored)
        whole = left if left.extra else right
        place = max(i for i, stage in enumerate(whole.stages) if isinstance(stage, Attend))
        stage = whole.stages[place]
        assert isinstance(stage, Attend)
        branches = []
        for branch in stage.branches:
            if left.extra:
                mask, score = build.all_of(branch.mask, right.mask), self._scores(branch.score, right.score, node)
            else:
                mask, score = build.all_of(left.mask, branch.mask), self._scores(left.score, branch.score, node)
            branches.append(replace(branch, mask=mask, score=score))
        stages = (*whole.stages[:place], replace(stage, branches=tuple(branches)), *whole.stages[place + 1 :])
        return replace(whole, stages=stages, scored=scored)

    def _scores(self, left: Expr, right: Expr, node: ast.Node) -> Expr:
        """The score of ``right`` with that of ``left`` as its `s`."""
        if right is build.s or left is build.s:
            return left if right is build.s else right
        size = self.scope.budget.count((right,), self.scope.source, node.span)
        self.scope.budget.charge(size, self.scope.source, node.span)
        return substitute(right, {build.s: left})

    def _need_mask(self, part: Composed, sign: str, node: ast.Node) -> None:
        if name := part.extra or part.scored:
            does = "is more than a mask" if part.extra else "changes the score"
            message = f"`{sign}` needs patterns that only mask, but `{name}` {does}"
            raise self.scope.error(node, "ATL210", message, f"take `{name}` out and join it with `&`")

    def _pattern(self, call: ast.Call) -> Composed:
        scope = self.scope
        template = callee(call.callee, scope, [])
        program = template.program
        if program is None:
            message = f"`{template.name}` is a helper, not a pattern"
            raise scope.error(call, "ATL210", message, "use it inside a body: `mask = ...`")
        into = self._bind(template, call)
        scope.budget.charge(template.size, scope.source, call.span)
        for axis, coordinates in program.grids:
            extents = into.apply(*(extent for _, extent in coordinates))
            names = [name for name, _ in coordinates]
            self.grids.setdefault(axis, tuple(zip(names, extents, strict=True)))
        if not only_hooks(program):
            stages = tuple(into.stage(stage) for stage in program.stages)
            return Composed(build.TRUE, build.s, "", template.name, stages, program.returns)
        mask, score = into.apply(program.mask, program.score)
        return Composed(mask, score, "" if program.score is build.s else template.name)

    def _bind(self, template: Template, call: ast.Call) -> Substitution:
        scope = self.scope.restricted("an argument of a pattern")
        given = match_arguments(template, call, scope)
        into = Substitution()
        for tensor in template.tensors:
            if tensor.name in given:
                bind_tensor(template, tensor, given[tensor.name], scope, into)
        for scalar in template.scalars:
            if scalar.name in given:
                argument = given[scalar.name]
                bind_scalar(template, scalar, argument, lower(argument.value, scope), scope, into)
        for name in template.order:
            if name not in given:
                self._open(template, name, call, into)
        check_shapes(template, given, scope, into)
        return into

    def _open(self, template: Template, name: str, call: ast.Call, into: Substitution) -> None:
        self.params.inherit(template, rename_open(template.param(name), into), call)
