"""Rows of operands: which row of which tensor a term multiplies, or an output sums."""

from __future__ import annotations

from dataclasses import replace

from attnlang.ir import (
    FLOAT,
    INT,
    KEY_ADDRESS,
    QUERY_ADDRESS,
    Address,
    Const,
    Dot,
    Expr,
    Input,
    Operand,
    TensorParam,
    build,
)

from . import syntax as ast
from .calls import arguments, axes_of, callee_name, number
from .lower import lower
from .scope import Poisoned, Scope
from .words import OPERANDS

__all__ = ["lower_term", "read_rows", "rows_of"]

_TERMS = ("dot", "sum_d")


def read_rows(node: ast.Node, scope: Scope, axis: str, own: dict[str, Operand] | None = None) -> Operand | None:
    """Return the rows that ``node`` stands for, one for each step along ``axis``, or None if it is a plain value.

    ``own`` are the operands of the stage, which a bare ``Q``, ``K`` or ``V`` means.
    """
    if isinstance(node, ast.Name):
        return _bare(node, scope, axis, own or {})
    if not isinstance(node, ast.Subscript) or not isinstance(node.base, ast.Name):
        return None
    name = node.base.id
    if name in OPERANDS and not isinstance(scope.values.get(name), TensorParam):
        if len(node.indices) != 3:
            message = f"a row of `{name}` is found by 3 indices, got {len(node.indices)}"
            raise scope.error(node, "ATL216", message, f"e.g. `{name}[b, h, {axis}]`: batch element, head, row")
        return Operand(OPERANDS[name], Address(*_indices(node, scope, axis)))
    tensor = scope.values.get(name)
    if not isinstance(tensor, TensorParam) or len(node.indices) != len(tensor.shape) - 1:
        return None
    if tensor.type is not FLOAT:
        raise scope.error(node, "ATL216", f"rows of `{name}` would be {tensor.type} values; they must be float")
    index = _indices(node, scope, axis)
    return Operand(_source(tensor, node, scope), Address(*index) if len(index) == 3 else index)


def _bare(node: ast.Name, scope: Scope, axis: str, own: dict[str, Operand]) -> Operand | None:
    address = QUERY_ADDRESS if axis == "q" else KEY_ADDRESS
    tensor = scope.values.get(node.id)
    if isinstance(tensor, TensorParam):
        if tensor.type is not FLOAT or not tensor.shape:
            return None
        if len(tensor.shape) != 4:
            index = ", ".join("h" if str(d) == "H" else axis for d in tensor.shape[:-1])
            message = f"`{node.id}` does not say which row"
            raise scope.error(
                node, "ATL216", message, f"index all its dimensions but the last, e.g. `{node.id}[{index}]`"
            )
        return Operand(_source(tensor, node, scope), address)
    if node.id not in OPERANDS or node.id in scope.values:
        return None
    if node.id in own:
        return own[node.id]
    return Operand(OPERANDS[node.id], address)


def _source(tensor: TensorParam, node: ast.Node, scope: Scope) -> str:
    if tensor.name in OPERANDS.values():
        message = f"rows of a captured tensor called `{tensor.name}` cannot be told from those of the call"
        raise scope.error(node, "ATL202", message, "give the tensor another name")
    return tensor.name


def _indices(node: ast.Subscript, scope: Scope, axis: str) -> tuple[Expr, ...]:
    inner = scope.restricted("an address")
    found: list[Expr] = []
    for child in node.indices:
        index = lower(child, inner)
        if index.type is FLOAT:
            raise scope.error(child, "ATL203", f"an index must be int, got {index.type}", "convert it with `int(...)`")
        if isinstance(index, Const) and index.value < 0:
            message = f"index {index.value} is negative, and indices do not count from the end"
            raise scope.error(child, "ATL205", message)
        found.append(build.cast(index, INT))
    pairs = {"q", "k"} <= axes_of(*found)
    for place, (child, index) in enumerate(zip(node.indices, found, strict=True)):
        axes = axes_of(index)
        if pairs and place < len(found) - 1 and axes & {"q", "k"}:
            message = "where the row depends on the pair, only the last index may depend on q and k"
            raise scope.error(child, "ATL216", message)
        if not pairs and (extra := axes - {"b", "h", axis}):
            which = "queries" if axis == "q" else "keys"
            message = f"an address of {which} cannot depend on {', '.join(sorted(extra))}"
            raise scope.error(child, "ATL216", message)
    return tuple(found)


def rows_of(node: ast.Node, scope: Scope, axis: str, own: dict[str, Operand] | None = None) -> Operand:
    """Like :func:`read_rows`, for a place where nothing but rows can stand."""
    if isinstance(node, ast.Name) and node.id in scope.values and scope.values[node.id] is None:
        raise Poisoned
    found = read_rows(node, scope, axis, own)
    if found is None:
        base = node.base.id if isinstance(node, ast.Subscript) and isinstance(node.base, ast.Name) else ""
        tensor = scope.values.get(base)
        if isinstance(tensor, TensorParam) and isinstance(node, ast.Subscript):
            message = f"`{base}` has {len(tensor.shape)} dimension(s); a row has {len(tensor.shape) - 1} indices"
            raise scope.error(node, "ATL216", message, f"got {len(node.indices)}; the features have no index")
        if isinstance(node, ast.Name):
            lower(node, scope.restricted("the place of rows"))  # an unknown name has an error of its own
        hint = "`Q`, `K`, `V`, or all indices but the last of a float tensor, e.g. `table[h, k - q + reach]`"
        raise scope.error(node, "ATL216", "this does not stand for rows", hint)
    return found


def lower_term(name: str, node: ast.Node, scope: Scope, own: dict[str, Operand]) -> Dot:
    """Lower the value of `term name = ...`."""
    form = callee_name(node)
    if form not in _TERMS:
        hint = "`dot(Q, table[...])`, or `sum_d(body over x and y, Q, K)`"
        raise scope.error(node, "ATL216", "a term is a sum over the features of two rows", hint)
    assert isinstance(node, ast.Call)
    positional = ("left", "right") if form == "dot" else ("body", "left", "right")
    given = arguments(node, scope, positional, ())
    left, right = rows_of(given["left"], scope, "q", own), rows_of(given["right"], scope, "k", own)
    if form == "dot":
        return Dot(name, left, right)
    both = {"x": Input("x", FLOAT, "bhqd"), "y": Input("y", FLOAT, "bhqkd")}
    inner = scope.restricted("the body of a term", axes="bhqkd", known=both)
    values = {n: v for n, v in scope.values.items() if n not in both}
    inner = replace(inner, inputs={**scope.inputs, **both}, values=values)
    return Dot(name, left, right, number(given["body"], inner, "the body of a term"))
