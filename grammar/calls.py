"""Forms that look like calls and are no functions: `sum(w, over=k)`, `softmax(sink=...)`, `dot(Q, r[...])`."""

from __future__ import annotations

from collections.abc import Sequence

from attnlang.ir import BOOL, FLOAT, INT, Const, Expr, Index, build, postorder

from . import syntax as ast
from .apply import widen
from .errors import suggest
from .lower import Lowering, lower
from .scope import Scope

__all__ = ["arguments", "axes_of", "callee_name", "constant", "number", "whole"]


def callee_name(node: ast.Node) -> str:
    """The name that ``node`` calls, or nothing."""
    return node.callee.id if isinstance(node, ast.Call) and isinstance(node.callee, ast.Name) else ""


def arguments(
    call: ast.Call, scope: Scope, positional: Sequence[str], named: Sequence[str], needs: int | None = None
) -> dict[str, ast.Node]:
    """Return the arguments of a form by name; the first ``needs`` positional ones (all by default) must be there."""
    what = callee_name(call)
    known = [*positional, *named]
    given: dict[str, ast.Node] = {}
    for position, argument in enumerate(call.args):
        if argument.name is None:
            if position >= len(positional):
                message = f"`{what}` takes {len(positional)} argument{'s' * (len(positional) != 1)} without a name"
                hint = f"it is `{_signature(what, positional, named)}`"
                raise scope.error(argument, "ATL204", message, hint)
            name = positional[position]
        else:
            name = argument.name.id
            if name not in known:
                hint = suggest(name, known) or f"it is `{_signature(what, positional, named)}`"
                raise scope.error(argument.name, "ATL204", f"`{what}` has no argument `{name}`", hint)
        if name in given:
            raise scope.error(argument, "ATL204", f"argument `{name}` of `{what}` is given twice")
        given[name] = argument.value
    for name in positional[:needs]:
        if name not in given:
            message = f"`{what}` needs its argument `{name}`"
            raise scope.error(call, "ATL204", message, f"it is `{_signature(what, positional, named)}`")
    return given


def _signature(what: str, positional: Sequence[str], named: Sequence[str]) -> str:
    return f"{what}({', '.join([*positional, *(f'{n}=...' for n in named)])})"


def number(node: ast.Node, scope: Scope, what: str) -> Expr:
    """Lower a value that must be a number, as a float."""
    value = lower(node, scope)
    if value.type is BOOL:
        raise scope.error(node, "ATL203", f"{what} must be float, got bool", "write `float(...)`, or `a if c else b`")
    return build.cast(value, FLOAT)


def whole(node: ast.Node, scope: Scope, what: str) -> Expr:
    """Lower a value that must be an int."""
    return widen(lower(node, scope), INT, what, node, scope)


def constant(node: ast.Node, scope: Scope, what: str) -> float:
    """Lower a value that must be a number known here and now."""
    value = Lowering(scope.restricted(what, axes="", tensors=False)).run(node)
    if not isinstance(value, Const) or value.type is BOOL:
        raise scope.error(node, "ATL203", f"{what} must be a constant", "e.g. `0` or `-inf`")
    return float(value.value)


def axes_of(*exprs: Expr) -> set[str]:
    """The axes that expressions depend on."""
    return {n.axis for n in postorder(*exprs) if isinstance(n, Index)}
