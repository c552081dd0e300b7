"""Stages that work on rows: `pool`, `select` and `rows`."""

from __future__ import annotations

from dataclasses import replace

from attnlang.ir import (
    BOOL,
    FLOAT,
    Const,
    Expr,
    Input,
    Map,
    Pool,
    Select,
    Size,
    TensorParam,
    build,
)

from . import syntax as ast
from .calls import arguments, callee_name, number, whole
from .errors import suggest
from .lower import Lowering, lower
from .parameters import check_name
from .scope import Poisoned, Scope
from .words import OPERANDS

__all__ = ["ROW_STAGES", "lower_row_stage"]

ROW_STAGES = ("pool", "select", "rows")
POOLINGS = ("mean", "max", "min", "sum", "first", "last")
RULES = ("top", "threshold", "mass")
B, H = Size("B"), Size("H")


def lower_row_stage(node: ast.Named, scope: Scope) -> Pool | Select | Map:
    """Lower one `pool`, `select` or `rows` statement."""
    check_name(node.name, scope, "a stage", scope.values)
    if node.kind.id == "pool":
        return _pool(node, scope)
    return _select(node, scope) if node.kind.id == "select" else _rows(node, scope)


def _pool(node: ast.Named, scope: Scope) -> Pool:
    name, how = node.name.id, callee_name(node.value)
    if node.dims is not None:
        raise scope.error(node, "ATL218", "the shape of a pool follows from its source", f"write `pool {name} = ...`")
    if how not in POOLINGS:
        hint = suggest(how, POOLINGS) or f"there is: {', '.join(POOLINGS)}"
        raise scope.error(node.value, "ATL218", "rows are not pooled like this", hint)
    assert isinstance(node.value, ast.Call)
    given = arguments(node.value, scope, ("source",), ("block", "stride"))
    if "block" not in given:
        raise scope.error(node.value, "ATL204", f"`{how}` needs its argument `block`", f"e.g. `{how}(K, block=64)`")
    source = _source(given["source"], scope)
    inner = scope.restricted("the size of a block", axes="", tensors=False)
    block = _positive(given["block"], inner, "a block")
    stride = _positive(given["stride"], inner, "a stride") if "stride" in given else None
    return Pool(name, source, block, how, stride)


def _positive(node: ast.Node, scope: Scope, what: str) -> Expr:
    value = whole(node, scope, what)
    if isinstance(value, Const) and value.value < 1:
        raise scope.error(node, "ATL218", f"{what} has at least one row, got {value.value}")
    return value


def _source(node: ast.Node, scope: Scope) -> str:
    """The tensor [B, heads, rows, features] that a pool reads."""
    name = node.id if isinstance(node, ast.Name) else ""
    tensor = scope.values.get(name)
    if name in scope.values and tensor is None:
        raise Poisoned
    if isinstance(tensor, TensorParam) and tensor.type is FLOAT and len(tensor.shape) == 4:
        return name
    if name in OPERANDS and tensor is None:
        return OPERANDS[name]
    hint = "`Q`, `K`, `V`, or a float tensor with 4 dimensions [batch, heads, rows, features]"
    raise scope.error(node, "ATL218", "this has no rows to pool", hint)


def _extents(node: ast.Named, scope: Scope, example: str) -> tuple[Expr, Expr, Expr, Expr]:
    """Four extents; where two are given they follow batch and heads."""
    inner = scope.restricted("the shape of a stage", axes="", tensors=False)
    dims = node.dims or ()
    if len(dims) not in (2, 4):
        message = f"`{node.name.id}` needs its shape, of 2 or 4 dimensions, got {len(dims)}"
        raise scope.error(node, "ATL218", message, f"e.g. `{example}`")
    found = [whole(d, inner, "a dimension") for d in dims]
    b, h, rows, last = found if len(found) == 4 else (B, H, *found)
    return b, h, rows, last


def _select(node: ast.Named, scope: Scope) -> Select:
    name, rule = node.name.id, callee_name(node.value)
    extents = _extents(node, scope, f"select {name}[Lq, cdiv(Lk, 64)] = top(...)")
    if rule not in RULES:
        hint = suggest(rule, RULES) or "`top(score, count)`, `threshold(score, least)` or `mass(score, share)`"
        raise scope.error(node.value, "ATL218", "keys are not selected like this", hint)
    assert isinstance(node.value, ast.Call)
    amount = {"top": "count", "threshold": "least", "mass": "share"}[rule]
    given = arguments(node.value, scope, ("score", amount), ("candidates", "forced"))
    inner = replace(scope.restricted("a selection"), elements=True)
    score = number(given["score"], inner, "the score of a selection")
    row = replace(scope.restricted(f"`{amount}`", axes="bhq"), elements=True)
    limit = whole(given[amount], row, f"`{amount}`") if rule == "top" else number(given[amount], row, f"`{amount}`")
    if rule == "top" and isinstance(limit, Const) and limit.value < 1:
        raise scope.error(given[amount], "ATL218", f"a selection of {limit.value} keys is none")
    conditions = {n: _condition(given[n], inner, n) for n in ("candidates", "forced") if n in given}
    return Select(name, extents, score, **conditions, **{rule: limit})


def _condition(node: ast.Node, scope: Scope, what: str) -> Expr:
    value = lower(node, scope)
    if value.type is not BOOL:
        raise scope.error(node, "ATL203", f"`{what}` must be bool, got {value.type}", "compare it with something")
    return value


def _rows(node: ast.Named, scope: Scope) -> Map:
    name = node.name.id
    extents = _extents(node, scope, f"rows {name}[B, H, Lq, Dv] = ...")
    lets: dict[tuple[str, Expr], Input] = {}
    inner = replace(scope.restricted("`rows`", axes="bhqd"), elements=True, over_d=lets)
    value = Lowering(inner).run(node.value)
    if value.type is BOOL:
        raise scope.error(node.value, "ATL203", "rows must be float, got bool", "write `a if c else b`")
    found = tuple((given.name, monoid, e) for (monoid, e), given in lets.items())
    return Map(name, extents, build.cast(value, FLOAT), found)
