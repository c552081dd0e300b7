"""The loop over features of a plan whose score term has a body: what it computes and what it sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attnlang.ir import Expr, postorder
from attnlang.passes.bodies import Body, per_feature
from attnlang.passes.levels import Level, levels

from .plan_parts import CapturedGrad, Value

__all__ = ["body_roots", "feature_grads", "needed", "statements"]


def feature_grads(body: Body | None, wanted: Iterable[str]) -> tuple[CapturedGrad, ...]:
    """The gradients of what ``body`` reads of the captured tensors ``wanted``."""
    found = () if body is None else body.captured(wanted)
    level_of = levels(*(load for load, _ in found))
    return tuple(CapturedGrad(load, value, level_of[load], by_feature=True) for load, value in found)


def body_roots(body: Body | None, grads: Iterable[CapturedGrad], *, backward: bool) -> tuple[Expr, ...]:
    """Every expression that a kernel computes of a feature."""
    if body is None:
        return ()
    return (body.value, body.left, body.right, *(g.derivative for g in grads)) if backward else (body.value,)


def statements(roots: tuple[Expr, ...], names: Mapping[Expr, str], level_of: Mapping[Expr, Level]) -> tuple[Value, ...]:
    """The statements of the loop: what ``roots`` need, but for what is known once a (b, h). Arguments before users."""
    found, inside = set(postorder(*roots)), per_feature(*roots)
    return tuple(
        Value(name, node, level_of[node])
        for node, name in names.items()
        if node in found and (node in inside or level_of[node] is not Level.GRID)
    )


def needed(values: Iterable[Value], roots: tuple[Expr, ...], *, rows_known: bool) -> tuple[Value, ...]:
    """Those of the statements ``values`` that ``roots`` need; where ``rows_known``, without those that differ between
    queries and not between features, which were made before."""
    found, inside = set(postorder(*roots)), per_feature(*roots)
    return tuple(
        v for v in values if v.expr in found and not (rows_known and v.level is Level.ROW and v.expr not in inside)
    )
