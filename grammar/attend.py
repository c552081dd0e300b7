"""The statements of an attend stage, gathered into the record of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from attnlang.ir import (
    BOOL,
    DEFAULT_OUTPUTS,
    FLOAT,
    SOFTMAX,
    Attend,
    Branch,
    Dot,
    Expr,
    Input,
    Normalizer,
    Operand,
    Output,
    Size,
    build,
    stat,
)

from . import syntax as ast
from .calls import number, whole
from .errors import AttnError, suggest
from .lower import lower
from .normal import named_normalizer, stated_normalizer
from .operands import lower_term, read_rows, rows_of
from .outputs import Target, lower_output
from .parameters import check_name
from .scope import Poisoned, Scope

__all__ = ["AttendDraft"]

_ROWS = {"queries": "Q", "keys": "K", "values": "V"}
_BRANCH_HOOKS = ("mask", "score", "normalize", "weights", "group", "groups")
HOOKS = (*_BRANCH_HOOKS, *_ROWS, "lengths")
_PAIR = {n: Input(n, FLOAT) for n in ("s", "raw", "w", "p")}


@dataclass
class BranchDraft:
    """What has been stated about one branch."""

    name: str = ""
    hooks: dict[str, Expr] = field(default_factory=dict)
    normalizer: Normalizer = SOFTMAX
    broken: bool = False
    seen: dict[str, int] = field(default_factory=dict)
    places: dict[str, ast.Node] = field(default_factory=dict)

    @property
    def stats(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.normalizer.stats)

    def finish(self) -> Branch:
        hooks = self.hooks
        mask, score = hooks.get("mask", build.TRUE), hooks.get("score", build.s)
        return Branch(mask, score, self.normalizer, hooks.get("weights"), hooks.get("group"), hooks.get("groups"))


class AttendDraft:
    """One attend stage as far as it has been read; ``name`` is empty for the statements outside of blocks.

    ``let`` lowers a `let` into a scope; ``part`` is the guard under which each statement may fail alone.
    """

    def __init__(self, name: str, scope: Scope, let: Callable[[ast.Let, Scope], None]) -> None:
        self.name = name
        self.inputs: dict[str, Input] = {**_PAIR, **{t.name: stat(t.name) for t in SOFTMAX.stats}}
        self.scope = replace(scope, inputs=self.inputs)
        self.let = let
        self.common = BranchDraft()
        self.branches: list[BranchDraft] = []
        self.terms: dict[str, Dot] = {"s": Dot()}
        self.declared: set[str] = set()
        self.own: dict[str, Operand] = {}
        self.without_values = False
        self.outputs: list[Output] = []
        self.position: dict[str, Expr] = {}
        self.lengths: tuple[Expr, Expr] = (Size("Lq"), Size("Lk"))
        self.seen: dict[str, int] = {}
        self.touched = False

    # statements

    def statement(self, node: ast.Statement, branch: BranchDraft | None = None) -> bool:
        """Take in ``node`` if it is a statement of an attend stage, and say whether it was."""
        match node:
            case ast.Hook() if node.name.id in HOOKS:
                self.touched = True
                self._hook(node, branch)
            case ast.Named() if node.kind.id == "output":
                self.touched = True
                self._output(node, branch)
            case ast.Named() if node.kind.id in ("term", "position") and branch is None:
                self.touched = True
                self._term(node) if node.kind.id == "term" else self._position(node)
            case ast.Block() if node.kind.id == "normalize":
                self.touched = True
                self._normalize(node, branch or self.common)
            case _:
                return False
        return True

    def open_branch(self, node: ast.Block) -> BranchDraft:
        """Begin a branch, which starts from what has been stated outside of branches."""
        self.touched = True
        if node.name is None:
            raise self.scope.error(node, "ATL217", "a branch needs a name", "e.g. `branch near:`")
        name = node.name.id
        if any(name == other.name for other in self.branches):
            raise self.scope.error(node.name, "ATL201", f"branch `{name}` is defined twice")
        if self.outputs:
            raise self.scope.error(node, "ATL217", "branches stand before the outputs of all branches")
        draft = replace(self.common, name=name, hooks=dict(self.common.hooks), seen={})
        self.branches.append(draft)
        return draft

    def _once(self, name: ast.Name, seen: dict[str, int], hint: str = "") -> None:
        if name.id in seen:
            message = f"`{name.id}` is given twice; the first is on line {seen[name.id]}"
            raise self.scope.error(name, "ATL206", message, hint)
        seen[name.id] = name.span.line

    def pair(self) -> tuple[str, ...]:
        """Inputs of a pair that exist before normalisation."""
        return tuple(dict.fromkeys(("s", "raw", *self.terms)))

    def _hook(self, node: ast.Hook, branch: BranchDraft | None) -> None:
        name, scope = node.name.id, self.scope
        if name not in _BRANCH_HOOKS:
            if branch is not None:
                message = f"`{name}` holds for all branches of a stage"
                raise scope.error(node.name, "ATL217", message, "state it outside of the branches")
            self._once(node.name, self.seen)
            self._stage_hook(node)
            return
        draft = branch or self.common
        if branch is None and self.branches:
            message = f"`{name}` stands behind the branches, which start from what is stated before them"
            raise scope.error(node.name, "ATL217", message, "move it up, or into the branch it is for")
        self._once(node.name, draft.seen, "join masks with `and`" if name == "mask" else "")
        draft.places[name] = node.name
        if name == "mask":
            draft.hooks["mask"] = self._mask(node.value)
        elif name == "score":
            draft.hooks["score"] = self._score(node.value)
        elif name == "normalize":
            self._set(draft, node, lambda: named_normalizer(node.value, self._inner(draft), self.pair()))
        elif name == "weights":
            if draft.broken:
                raise Poisoned
            known = (*self.pair(), *draft.stats, "w", "p")
            value = number(node.value, self._inner(draft).restricted("weights", known=known), "weights")
            draft.hooks["weights"] = value
        elif name == "group":
            draft.hooks["group"] = whole(node.value, scope.restricted("a group"), "a group")
        else:
            inner = scope.restricted("the number of groups", axes="", tensors=False)
            draft.hooks["groups"] = whole(node.value, inner, "the number of groups")

    def _mask(self, node: ast.Node) -> Expr:
        value = lower(node, self.scope.restricted("a mask"))
        if value.type is not BOOL:
            message = f"a mask must be bool, got {value.type}"
            raise self.scope.error(node, "ATL203", message, "compare it with something, e.g. `... != 0`")
        return value

    def _score(self, node: ast.Node) -> Expr:
        value = lower(node, self.scope.restricted("a score", known=self.terms))
        if value.type is BOOL:
            message = "a score must be float, got bool"
            raise self.scope.error(node, "ATL203", message, "a condition belongs into `mask = ...`")
        return build.cast(value, FLOAT)

    def _stage_hook(self, node: ast.Hook) -> None:
        name, scope = node.name.id, self.scope
        if name == "lengths":
            items = node.value.items if isinstance(node.value, ast.Tuple) else ()
            if len(items) != 2:
                message = "`lengths` are two: the number of queries and of keys"
                raise scope.error(node.value, "ATL216", message, "e.g. `lengths = (Lq, cdiv(Lk, 64))`")
            inner = scope.restricted("a length", axes="", tensors=False)
            left, right = (whole(n, inner, "a length") for n in items)
            self.lengths = left, right
        elif name == "values" and self.outputs:
            raise scope.error(
                node.name, "ATL216", "`values` stands behind an output, which may read them", "move it up"
            )
        elif name == "values" and isinstance(node.value, ast.Name) and node.value.id == "none":
            self.without_values = True
        else:
            axis = "q" if name == "queries" else "k"
            operand = rows_of(node.value, scope, axis)
            self.own[_ROWS[name]] = operand
            if name != "values":
                first = self.terms["s"]
                self.terms["s"] = replace(first, left=operand) if axis == "q" else replace(first, right=operand)

    # normalisers and what follows them

    def inner(self, draft: BranchDraft, what: str) -> Scope:
        """The scope of a `let` that stands in a branch."""
        return replace(self._inner(draft), what=what, known=None)

    def _inner(self, draft: BranchDraft) -> Scope:
        """The scope with the statistics of a branch."""
        inputs = {n: i for n, i in self.inputs.items() if "k" in i.axes}
        return replace(self.scope, inputs={**inputs, **{n: stat(n) for n in draft.stats}})

    def _normalize(self, node: ast.Block, draft: BranchDraft) -> None:
        if node.name is not None:
            raise self.scope.error(node.name, "ATL214", "a normaliser has no name", "write `normalize:`")
        if draft is self.common and self.branches:
            message = "`normalize` stands behind the branches, which start from what is stated before them"
            raise self.scope.error(node, "ATL217", message, "move it up, or into the branch it is for")
        self._once(node.kind, draft.seen)
        grouped = "group" in draft.hooks
        plain = replace(self.scope, inputs={n: i for n, i in self.inputs.items() if "k" in i.axes})
        self._set(draft, node, lambda: stated_normalizer(node, plain, self.pair(), grouped, self.let))

    def _set(self, draft: BranchDraft, node: ast.Hook | ast.Block, lowered: Callable[[], Normalizer]) -> None:
        if "weights" in draft.seen:
            raise self.scope.error(node, "ATL214", "`normalize` stands behind `weights`, which read it", "move it up")
        if self.outputs:
            raise self.scope.error(node, "ATL214", "`normalize` stands behind an output of its weights", "move it up")
        draft.broken = True
        draft.normalizer = lowered()
        draft.broken = False
        if taken := [n for n in draft.stats if n in self.terms]:
            draft.broken = True
            message = f"`{taken[0]}` is a score term and a statistic of this normaliser"
            raise self.scope.error(node, "ATL201", message, "rename the term")
        if draft is self.common:
            for name in [n for n, i in self.inputs.items() if "k" not in i.axes]:
                del self.inputs[name]
            self.inputs.update({n: stat(n) for n in draft.stats})

    def _target(self, branch: BranchDraft | None, argument: ast.Node | None, node: ast.Node) -> Target:
        number_, draft = 0, branch or self.common
        if argument is not None:
            name = argument.id if isinstance(argument, ast.Name) else ""
            names = [d.name for d in self.branches]
            if name not in names:
                hint = suggest(name, names) or (f"there is: {', '.join(names)}" if names else "there is none")
                raise self.scope.error(argument, "ATL217", "this is not a branch of the stage", hint)
            draft = self.branches[names.index(name)]
        if self.branches:
            if draft is self.common:
                message = "there are several branches: say which one this output reads"
                raise self.scope.error(node, "ATL217", message, f"add `branch={self.branches[0].name}`")
            number_ = self.branches.index(draft)
        if draft.broken:
            raise Poisoned
        return Target(number_, self._inner(draft), (*self.pair(), *draft.stats, "w", "p"))

    def _output(self, node: ast.Named, branch: BranchDraft | None) -> None:
        check_name(node.name, self.scope, "an output", self.scope.values)
        if any(out.name == node.name.id for out in self.outputs):
            raise self.scope.error(node.name, "ATL201", f"output `{node.name.id}` is defined twice")
        found = lower_output(
            node,
            self.scope,
            lambda argument, at: self._target(branch, argument, at),
            lambda factor, scope, axis: read_rows(factor, scope, axis, self.own),
        )
        self.outputs.append(found)

    def _term(self, node: ast.Named) -> None:
        name = node.name.id
        if name != "s":
            check_name(node.name, self.scope, "a term", self.scope.values)
        if name in ("raw", "w", "p") or name in self.common.stats:
            message = f"`{name}` is {'a statistic of the normaliser' if name in self.common.stats else 'a weight'}"
            raise self.scope.error(node.name, "ATL202", f"{message}; a term needs another name")
        if node.dims is not None:
            raise self.scope.error(node, "ATL216", "a term has no dimensions", f"write `term {name} = ...`")
        if name in self.declared:
            raise self.scope.error(node.name, "ATL201", f"term `{name}` is defined twice")
        self.declared.add(name)
        self.terms[name] = lower_term(name, node.value, self.scope, self.own)
        self.inputs[name] = Input(name, FLOAT)

    def _position(self, node: ast.Named) -> None:
        axis = node.name.id
        if axis not in ("q", "k"):
            message = f"`{axis}` has no position"
            raise self.scope.error(node.name, "ATL216", message, "positions are those of q and of k")
        if axis in self.position:
            raise self.scope.error(node.name, "ATL206", f"the position of `{axis}` is given twice")
        inner = self.scope.restricted("a position", axes=f"bh{axis}")
        self.position[axis] = whole(node.value, inner, "a position")

    # the record

    def makes(self) -> tuple[str, ...]:
        """Names of the outputs that :meth:`finish` would give."""
        return tuple(out.name for out in self._all_outputs())

    def _all_outputs(self) -> list[Output]:
        declared = {out.name: out for out in self.outputs}
        if self.branches or (self.name and declared):
            return list(self.outputs)
        rows, lse = DEFAULT_OUTPUTS
        names = (self.name, f"{self.name}_lse") if self.name else (rows.name, lse.name)
        rows = replace(rows, name=names[0], rows=self.own.get("V", rows.rows))
        defaults = [] if self.without_values else [rows]
        softmax = self.common.normalizer.name == SOFTMAX.name
        defaults += [replace(lse, name=names[1])] if softmax and not (self.without_values and declared) else []
        first = [declared.pop(out.name, out) for out in defaults]  # one that is declared keeps its place
        return [*first, *declared.values()]

    def finish(self, at: ast.Node) -> Attend:
        """Return the stage.

        Raises:
            AttnError: something is missing.
        """
        drafts = self.branches or [self.common]
        for draft in drafts:
            if draft.broken:
                raise Poisoned
            if ("group" in draft.hooks) != ("groups" in draft.hooks):
                have, missing = ("group", "groups") if "group" in draft.hooks else ("groups", "group")
                message = f"`{have}` needs `{missing} = ...`"
                hint = "a group numbers the group of a pair, and `groups` says how many there are"
                raise self._missing(draft.places.get(have, at), "ATL217", message, hint)
        outputs = self._all_outputs()
        if not outputs:
            hint = "e.g. `output a = sum(w * V, over=k, branch=near)`"
            raise self._missing(at, "ATL215", "this stage has no output", hint)
        return Attend(
            self.name or "attend",
            tuple(self.terms.values()),
            tuple(draft.finish() for draft in drafts),
            tuple(outputs),
            tuple(self.position.items()),
            self.lengths,
        )

    def _missing(self, at: ast.Node, code: str, message: str, hint: str) -> AttnError:
        return self.scope.error(at, code, message, hint)
