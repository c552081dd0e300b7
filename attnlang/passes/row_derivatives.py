"""Derivatives of rows stages: what each element that is read gets from the gradient of the rows, as rows again."""

from __future__ import annotations

from attnlang.ir import BOOL, FLOAT, Const, Expr, Input, Load, Map, Op, index_axes, postorder
from attnlang.ir.build import FALSE, TRUE, all_of, any_of, op

from .derivatives import derivatives
from .simplify import simplify

__all__ = ["Let", "adjoint", "support"]

Let = tuple[str, str, Expr]
"""A reduction over the features of a row, as in :class:`attnlang.ir.Map`."""


def adjoint(stage: Map, loads: tuple[Load, ...], gradient: Expr) -> tuple[tuple[Let, ...], tuple[Expr, ...]] | None:
    """The reductions of a row, and what each of ``loads`` gets at (b, h, q, d) from the ``gradient`` of that element.

    None where the stage has a maximum over features.
    """
    if any(monoid == "max" for _, monoid, _ in stage.lets):
        return None
    lets = list(stage.lets)
    known: list[tuple[Expr, Expr]] = [(stage.value, gradient)]  # expressions, and what their elements get

    def of(leaf: Expr) -> Expr:
        terms = [op("mul", weight, derivatives(e, (leaf,))[leaf]) for e, weight in known]
        total = terms[0]
        for term in terms[1:]:
            total = op("add", total, term)
        return simplify(total)

    for name, monoid, value in reversed(stage.lets):
        mine = f"{name}_gradient"
        lets.append((mine, "sum", of(Input(name, FLOAT, "bhq"))))
        weight: Expr = Input(mine, FLOAT, "bhq")
        if monoid == "mean":
            weight = op("div", weight, op("to_float", stage.extents[3]))
        known.append((value, weight))
    return tuple(lets), tuple(of(load) for load in loads)


def support(root: Expr) -> Expr:
    """A condition on the index d that holds wherever ``root`` may be other than 0."""
    found: dict[Expr, Expr] = {}
    for node in postorder(root):
        if node.type is not FLOAT:
            continue
        args = [found.get(a, TRUE) for a in node.args]
        if isinstance(node, Const):
            found[node] = FALSE if node.value == 0.0 else TRUE
        elif not isinstance(node, Op):
            found[node] = TRUE
        elif node.op == "mul":
            found[node] = all_of(*args)
        elif node.op in ("add", "sub"):
            found[node] = any_of(*args)
        elif node.op in ("neg", "div"):
            found[node] = args[0]
        elif node.op == "where":
            known = _of_features(node.args[0])
            yes, no = (node.args[0], op("not", node.args[0])) if known else (TRUE, TRUE)
            found[node] = any_of(all_of(yes, args[1]), all_of(no, args[2]))
        else:
            found[node] = TRUE
    return simplify(found[root])


def _of_features(condition: Expr) -> bool:
    """Whether a condition can be decided of a feature alone."""
    assert condition.type is BOOL
    return not any(isinstance(n, Load | Input) for n in postorder(condition)) and index_axes(condition) <= {"d"}
