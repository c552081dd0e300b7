"""The body of a pattern: its statements in order, gathered into stages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeAlias

from attnlang.ir import INT, Const, Expr, Stage, TensorParam, build, tensors_made

from . import syntax as ast
from .attend import HOOKS, AttendDraft, BranchDraft
from .errors import AttnError, suggest
from .lower import Lowering
from .rowstages import ROW_STAGES, lower_row_stage
from .scope import Poisoned, Scope

__all__ = ["PatternBody"]

Grids: TypeAlias = "dict[str, tuple[tuple[str, Expr], ...]]"
_AXES_WITH_GRIDS = ("q", "k")
_NAMED = ("output", "term", "position", *ROW_STAGES)
_BLOCKS = ("normalize", "branch", "attend")


class PatternBody:
    """Takes in the statements of one pattern.

    Statements outside of blocks state the main attend stage. It runs where a later stage first reads one of its
    outputs, or last. ``let`` lowers a `let` into a scope, ``part`` guards what may fail alone.
    """

    def __init__(
        self,
        scope: Scope,
        let: Callable[[ast.Let, Scope], None],
        part: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.scope = scope
        self.let, self.part = let, part
        self.grids: Grids = {}
        self.main = AttendDraft("", scope, let)
        self.scope = self.main.scope
        self.failed = False
        self.closed = 0
        """The line that made the main stage end, if one did."""
        self.stages: list[Stage] = []
        self.made: dict[str, TensorParam] = {}
        self.returns: tuple[str, ...] = ()

    def run(self, node: ast.Pattern) -> None:
        """Take in every statement of ``node``; what is wrong is reported through ``part``."""
        for statement in node.statements:
            self._guarded(statement, self.statement)
        with self.part():
            if not self.closed and (self.main.touched or not self.stages) and not self.failed:
                if not self.main.touched:
                    message = f"pattern `{node.name.id}` has neither a mask nor a score"
                    raise self.scope.error(node.name, "ATL206", message, "add a line `mask = ...` or `score = ...`")
                self._close(node.name)

    def _guarded(self, node: ast.Statement, run: Callable[[ast.Statement], None]) -> None:
        """Take in a statement that may fail alone; what it should have named is then known to be broken."""
        ok = False
        with self.part():
            run(node)
            ok = True
        self.failed |= not ok
        if not ok and isinstance(node, ast.Named):
            self.scope.values.setdefault(node.name.id, None)

    def statement(self, node: ast.Statement) -> None:
        if isinstance(node, ast.Let | ast.Named | ast.Block | ast.Returns) and not self.closed:
            self._end_where_read(node)
        match node:
            case ast.Let():
                self.let(node, self.scope)
            case ast.Grid():
                self._grid(node)
            case ast.Returns():
                self._returns(node)
            case ast.Named() if node.kind.id in ROW_STAGES:
                self._add(lower_row_stage(node, self.scope))
            case ast.Block() if node.kind.id == "attend":
                self._attend(node)
            case ast.Block() if node.kind.id == "branch":
                self._open_main(node)
                self._branch(node, self.main)
            case ast.Hook() | ast.Named() | ast.Block():
                self._open_main(node)
                if not self.main.statement(node):
                    raise self._unknown(node)

    # the main stage

    def _end_where_read(self, node: ast.Statement) -> None:
        """End the main stage if ``node`` begins another stage, or a value, that reads an output of it."""
        if isinstance(node, ast.Named) and node.kind.id not in ROW_STAGES:
            return
        if isinstance(node, ast.Block) and node.kind.id != "attend":
            return
        makes = [n for n in self.main.makes() if n not in self.scope.values]
        if any(isinstance(n, ast.Name) and n.id in makes for n in ast.walk(*ast.values(node))):
            self._close(node)

    def _open_main(self, node: ast.Hook | ast.Named | ast.Block) -> None:
        known = isinstance(node, ast.Hook) and node.name.id in HOOKS
        if self.closed and (known or not isinstance(node, ast.Hook)):
            message = f"the attend stage ended on line {self.closed}, where its output is read"
            hint = "move this line up, or state a stage of its own: `attend name:`"
            raise self.scope.error(node, "ATL218", message, hint)

    def _close(self, at: ast.Node) -> None:
        self.closed = at.span.line
        self._finish(self.main, at)

    def _finish(self, draft: AttendDraft, at: ast.Node) -> None:
        makes = draft.makes()
        try:
            stage = draft.finish(at)
        except (AttnError, Poisoned):
            for name in makes:
                self.scope.values.setdefault(name, None)
            raise
        self._add(stage)

    def _add(self, stage: Stage) -> None:
        shapes = {n: t.shape for n, t in self.scope.values.items() if isinstance(t, TensorParam)}
        made = tensors_made(stage, shapes)
        self.stages.append(stage)
        self.made.update(made)
        self.scope.values.update(made)

    # other statements

    def _attend(self, node: ast.Block) -> None:
        if node.name is None:
            raise self.scope.error(node, "ATL218", "a stage in a block needs a name", "e.g. `attend gate:`")
        name = node.name.id
        if name in self.scope.values or name in self.made:
            raise self.scope.error(node.name, "ATL201", f"`{name}` is defined twice", "rename this stage")
        draft = AttendDraft(name, self.scope, self.let)
        for statement in node.statements:
            self._guarded(statement, lambda inner: self._in_attend(inner, draft))
        self._finish(draft, node)

    def _in_attend(self, node: ast.Statement, draft: AttendDraft) -> None:
        match node:
            case ast.Let():
                self.let(node, draft.scope)
            case ast.Block() if node.kind.id == "branch":
                self._branch(node, draft)
            case ast.Hook() | ast.Named() | ast.Block():
                if not draft.statement(node):
                    raise self._unknown(node, "an `attend` block")
            case _:
                message = "this has no place in an `attend` block"
                raise self.scope.error(node, "ATL218", message, "move it out of the block")

    def _branch(self, node: ast.Block, stage: AttendDraft) -> None:
        draft = stage.open_branch(node)
        for statement in node.statements:
            self._guarded(statement, lambda inner: self._in_branch(inner, stage, draft))

    def _in_branch(self, node: ast.Statement, stage: AttendDraft, draft: BranchDraft) -> None:
        match node:
            case ast.Let():
                self.let(node, stage.inner(draft, "a `let`"))
            case ast.Hook() | ast.Named() | ast.Block():
                if not stage.statement(node, draft):
                    raise self._unknown(node, "a branch")
            case _:
                message = "this has no place in a branch"
                raise self.scope.error(node, "ATL217", message, "move it out of the branch")

    def _returns(self, node: ast.Returns) -> None:
        names: list[str] = []
        for item in node.items:
            if not isinstance(item, ast.Name):
                message = "a pattern returns names of what its stages make"
                raise self.scope.error(item, "ATL218", message, "e.g. `return o, lse`; only `def` returns a value")
            if item.id not in self.made:
                if item.id in self.scope.values and self.scope.values[item.id] is None:
                    raise Poisoned
                hint = suggest(item.id, self.made) or f"there is: {', '.join(self.made)}"
                raise self.scope.error(item, "ATL218", f"no stage makes `{item.id}`", hint)
            if item.id in names:
                raise self.scope.error(item, "ATL201", f"`{item.id}` is returned twice")
            names.append(item.id)
        if self.returns:
            raise self.scope.error(node, "ATL206", "a pattern returns once")
        self.returns = tuple(names)

    def _unknown(self, node: ast.Hook | ast.Named | ast.Block, where: str = "") -> Exception:
        scope = self.scope
        if isinstance(node, ast.Hook):
            name = node.name
            if name.id in scope.values and not where:
                message, hint = (
                    f"`{name.id}` cannot be assigned again",
                    "a name keeps its value; use `let` with a new name",
                )
            else:
                message = f"there is no statement `{name.id} = ...`"
                hint = suggest(name.id, HOOKS) or f"write `let {name.id} = ...` to name a value"
            return scope.error(name, "ATL206", message, hint)
        known = _NAMED if isinstance(node, ast.Named) else _BLOCKS
        word = node.kind.id
        message = f"there is no statement `{word} name = ...`" if isinstance(node, ast.Named) else f"no block `{word}:`"
        if word in known:
            message = f"`{word}` has no place in {where}" if where else f"`{word}` has no place here"
            return scope.error(node.kind, "ATL206", message, "" if word != "stat" else "it stands in `normalize:`")
        if word == "stat":
            return scope.error(node.kind, "ATL214", "a statistic stands in a `normalize:` block")
        return scope.error(node.kind, "ATL206", message, suggest(word, known) or f"there is {', '.join(known)}")

    def _grid(self, node: ast.Grid) -> None:
        """Define the coordinates of an index that counts the points of a grid, the last coordinate fastest."""
        scope = self.scope
        inner = scope.restricted("the extent of a grid", axes="", tensors=False)
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
            index = build.q if axis.id == "q" else build.k
            found = build.coordinates(index, [e for _, e in shape])
            scope.grids[axis.id] = {name: e for (name, _), e in zip(shape, found, strict=True)}
            self.grids[axis.id] = tuple(shape)
