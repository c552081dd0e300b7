"""Outputs of an attend stage: `output name = sum(w * V, over=k)` and its kin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attnlang.ir import Const, Expr, Operand, Output, build

from . import syntax as ast
from .calls import arguments, callee_name, constant, number, whole
from .scope import Scope

__all__ = ["REDUCTIONS", "Rows", "Target", "lower_output"]

REDUCTIONS = ("sum", "max", "min", "argmax")
NAMED = ("over", "key", "extent", "branch", "empty")

Rows = Callable[["ast.Node", "Scope", str], "Operand | None"]
"""Reads a factor that stands for rows of an operand, along an axis; None where it is an ordinary value."""


@dataclass(frozen=True)
class Target:
    """The branch an output reads: its number, and the inputs its pairs have (statistics among them)."""

    number: int
    scope: Scope
    known: tuple[str, ...]


def _is_reduction(node: ast.Node) -> bool:
    name = callee_name(node)
    if name in ("sum", "argmax"):
        return True
    return name in REDUCTIONS and isinstance(node, ast.Call) and any(a.name is not None for a in node.args)


def lower_output(
    node: ast.Named, scope: Scope, branch: Callable[[ast.Node | None, ast.Node], Target], rows: Rows
) -> Output:
    """Lower one `output` statement; ``branch`` finds the branch an argument names (None where there is none)."""
    name = node.name.id
    if node.dims is not None:
        message = "the shape of an output follows from what it reduces"
        raise scope.error(node, "ATL215", message, f"write `output {name} = ...`")
    if callee_name(node.value) == "each":
        assert isinstance(node.value, ast.Call)
        given = arguments(node.value, scope, ("value",), ("branch", "empty"))
        empty = constant(given["empty"], scope, "`empty`") if "empty" in given else 0.0
        return _plain(name, given["value"], branch(given.get("branch"), node), empty)
    if not _is_reduction(node.value):
        return _plain(name, node.value, branch(None, node), 0.0)
    call = node.value
    assert isinstance(call, ast.Call)
    given = arguments(call, scope, ("value",), NAMED)
    over = _over(given.get("over"), call, scope)
    target = branch(given.get("branch"), node)
    inner = target.scope.restricted("an output", known=target.known)
    monoid = callee_name(call)
    value, operand = _value(given["value"], inner, "q" if over == "q" else "k", rows)
    if operand is not None and (monoid != "sum" or over not in ("q", "k")):
        message = "rows are summed, over k or over q"
        raise scope.error(given["value"], "ATL215", message, f"write `output {name} = sum(w * V, over=k)`")
    if monoid == "argmax" and (over != "k" or "key" in given):
        raise scope.error(call, "ATL215", "an argmax is over k, and without a key")
    key, extents = _buckets(given, call, target.scope)
    empty = constant(given["empty"], scope, "`empty`") if "empty" in given else 0.0
    return Output(name, value, operand, over, monoid, key, extents, target.number, empty)


def _plain(name: str, node: ast.Node, target: Target, empty: float) -> Output:
    """A function of row statistics, or a value of every pair."""
    value = number(node, target.scope.restricted("an output", known=target.known), "an output")
    return Output(name, value, over="", branch=target.number, empty=empty)


def _over(node: ast.Node | None, call: ast.Call, scope: Scope) -> str:
    if node is None:
        hint = "`over=k` for each row, `over=q` for each key, or `over=(q, k)`"
        raise scope.error(call, "ATL215", "say over what this reduces", hint)
    items = node.items if isinstance(node, ast.Tuple) else (node,)
    names = [n.id if isinstance(n, ast.Name) else "" for n in items]
    if sorted(names) not in (["k"], ["q"], ["k", "q"]):
        raise scope.error(node, "ATL215", "an output reduces over q, over k, or over (q, k)")
    return "qk" if len(names) == 2 else names[0]


def _value(node: ast.Node, scope: Scope, axis: str, rows: Rows) -> tuple[Expr, Operand | None]:
    """A value of the pair, perhaps times a row of an operand."""
    if (operand := rows(node, scope, axis)) is not None:
        return build.const(1.0), operand
    if isinstance(node, ast.Binary) and node.op == "*":
        for side, other in ((node.right, node.left), (node.left, node.right)):
            if (operand := rows(side, scope, axis)) is not None:
                return number(other, scope, "an output"), operand
    return number(node, scope, "an output"), None


def _buckets(given: dict[str, ast.Node], call: ast.Call, scope: Scope) -> tuple[tuple[Expr, ...], tuple[Expr, ...]]:
    """The elements of further dimensions that pairs add to."""
    keys, extents = (_items(given.get(n)) for n in ("key", "extent"))
    if len(keys) != len(extents):
        at = given.get("extent") or given.get("key") or call
        message = f"there are {len(keys)} key(s) and {len(extents)} extent(s)"
        raise scope.error(at, "ATL215", message, "each key says which of `extent` elements a pair adds to")
    inner = scope.restricted("the key of an output")
    size = scope.restricted("the extent of an output", axes="", tensors=False)
    lowered = tuple(whole(n, inner, "a key") for n in keys)
    return lowered, tuple(_extent(n, size) for n in extents)


def _extent(node: ast.Node, scope: Scope) -> Expr:
    value = whole(node, scope, "an extent")
    if isinstance(value, Const) and value.value < 1:
        raise scope.error(node, "ATL215", f"an extent cannot be {value.value}")
    return value


def _items(node: ast.Node | None) -> tuple[ast.Node, ...]:
    return () if node is None else node.items if isinstance(node, ast.Tuple) else (node,)
