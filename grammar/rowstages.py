"""Stages that work on rows: `pool`, `select` and `rows`, and the shapes of what stages make."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from attnlang.ir import (
    BOOL,
    FLOAT,
    INT,
    Attend,
    Const,
    Expr,
    Input,
    Map,
    Output,
    Pool,
    Select,
    Size,
    TensorParam,
    build,
    is_map,
    postorder,
)

from . import syntax as ast
from .calls import arguments, callee_name, number, whole
from .errors import suggest
from .functions import cdiv
from .lower import Lowering, lower
from .parameters import check_name
from .scope import Poisoned, Scope
from .words import OPERANDS

__all__ = ["ROW_STAGES", "Shapes", "lower_row_stage"]

ROW_STAGES = ("pool", "select", "rows")
POOLINGS = ("mean", "max", "min", "sum", "first", "last")
RULES = ("top", "threshold", "mass")
B, H, HKV = Size("B"), Size("H"), Size("Hkv")


@dataclass
class Shapes:
    """Tensors that stages have made so far, as later stages read them."""

    tensors: dict[str, TensorParam] = field(default_factory=dict)

    def rows(self, source: str, scope: Scope) -> tuple[Expr, ...]:
        """Shape of a tensor that has rows."""
        operands = {
            "q": (B, H, Size("Lq"), Size("D")),
            "k": (B, HKV, Size("Lk"), Size("D")),
            "v": (B, HKV, Size("Lk"), Size("Dv")),
        }
        if source in operands:
            return operands[source]
        tensor = scope.values.get(source)
        assert isinstance(tensor, TensorParam)
        return tensor.shape

    def of_attend(self, stage: Attend, scope: Scope) -> dict[str, TensorParam]:
        return {out.name: self._output(out, stage, scope) for out in stage.outputs}

    def _output(self, out: Output, stage: Attend, scope: Scope) -> TensorParam:
        queries, keys = stage.lengths
        shape: list[Expr] = [B, H]
        shape += [queries] if "q" not in out.over else []
        shape += [keys] if is_map(out) or out.over == "q" else []
        branch = stage.branches[out.branch]
        grouped = {t.name for t in branch.normalizer.stats if t.grouped}
        reads = {n.name for n in postorder(out.value) if isinstance(n, Input)}
        if out.over == "" and not is_map(out) and grouped & reads and branch.groups is not None:
            shape.append(branch.groups)
        shape += out.extents
        shape += [self.rows(out.rows.source, scope)[-1]] if out.rows is not None else []
        return TensorParam(out.name, INT if out.monoid == "argmax" else FLOAT, tuple(shape))


def lower_row_stage(node: ast.Named, scope: Scope, shapes: Shapes) -> tuple[Pool | Select | Map, TensorParam]:
    """Lower one `pool`, `select` or `rows` statement and return it with the tensor it makes."""
    check_name(node.name, scope, "a stage", scope.values)
    if node.kind.id == "pool":
        return _pool(node, scope, shapes)
    return _select(node, scope) if node.kind.id == "select" else _rows(node, scope)


def _pool(node: ast.Named, scope: Scope, shapes: Shapes) -> tuple[Pool, TensorParam]:
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
    b, h, length, features = shapes.rows(source, scope)
    made = TensorParam(name, FLOAT, (b, h, cdiv(length, stride or block), features))
    return Pool(name, source, block, how, stride), made


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


def _select(node: ast.Named, scope: Scope) -> tuple[Select, TensorParam]:
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
    stage = Select(name, extents, score, **conditions, **{rule: limit})
    return stage, TensorParam(name, BOOL, extents)


def _condition(node: ast.Node, scope: Scope, what: str) -> Expr:
    value = lower(node, scope)
    if value.type is not BOOL:
        raise scope.error(node, "ATL203", f"`{what}` must be bool, got {value.type}", "compare it with something")
    return value


def _rows(node: ast.Named, scope: Scope) -> tuple[Map, TensorParam]:
    name = node.name.id
    extents = _extents(node, scope, f"rows {name}[B, H, Lq, Dv] = ...")
    lets: dict[tuple[str, Expr], Input] = {}
    inner = replace(scope.restricted("`rows`", axes="bhqd"), elements=True, over_d=lets)
    value = Lowering(inner).run(node.value)
    if value.type is BOOL:
        raise scope.error(node.value, "ATL203", "rows must be float, got bool", "write `a if c else b`")
    found = tuple((given.name, monoid, e) for (monoid, e), given in lets.items())
    return Map(name, extents, build.cast(value, FLOAT), found), TensorParam(name, FLOAT, extents)
