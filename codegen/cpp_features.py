"""Text of the loop over features on the C++ target, where the score term has a body."""

from __future__ import annotations

from dataclasses import dataclass

from attnlang.ir import Expr, Index, Input, postorder
from attnlang.passes.bodies import LEFT, RIGHT, per_feature
from attnlang.passes.levels import Level

from .cpp_printer import VECTORS, CppPrinter, declaration
from .features import needed
from .plan import CapturedGrad, KernelPlan, Value

__all__ = ["FeatureGrad", "FeaturePrinter", "FeatureText", "gradients_text", "scores_text"]


class FeaturePrinter(CppPrinter):
    """In the loop over features, what differs between queries is an array of the vectors of a register block."""

    def __init__(self, plan: KernelPlan) -> None:
        super().__init__(plan)
        self._inside = per_feature(*(v.expr for v in plan.features))

    def reference(self, node: Expr, name: str, at: Level) -> str:
        if node in self._inside and self.plan.level(node) is Level.ROW:
            return f"{name}[v]"
        return super().reference(node, name, at)

    def input(self, node: Input, at: Level) -> str:
        if node is LEFT:
            return "x[v]"
        return self.spread("y", node, at) if node is RIGHT else super().input(node, at)


@dataclass(frozen=True)
class FeatureGrad:
    """The gradient of what the body reads of a captured tensor: where its sums are, and what a pair adds."""

    name: str
    level: Level
    value: str

    @property
    def in_lanes(self) -> bool:
        """Whether it is summed over the keys first."""
        return self.level is not Level.COL

    @property
    def is_row(self) -> bool:
        return self.level is Level.ROW

    @property
    def pointer(self) -> str:
        """Statement that finds the sums of a query block, or of a head."""
        place = {
            Level.GRID: "(head * query_blocks(a) + block)",
            Level.ROW: "head * a.n_Lq",
            Level.COL: "head * a.n_Lk",
        }
        return f"float *{self.name} = a.{self.name} + {place[self.level]} * HEAD_DIM;"


@dataclass(frozen=True)
class FeatureText:
    """Statements by level, and the sums: ``value`` of the score, or the derivatives of the others."""

    grid: list[str]
    arrays: list[str]
    row: list[str]
    col: list[str]
    pair: list[str]
    uses_key: bool
    row_uses_rows: bool
    pair_uses_rows: bool
    reads_left: bool
    reads_right: bool
    value: str = ""
    left: str = ""
    right: str = ""
    grads: tuple[FeatureGrad, ...] = ()


def _text(printer: FeaturePrinter, roots: tuple[Expr, ...], **sums: object) -> FeatureText:
    found = needed(printer.plan.features, roots, rows_known=True)
    of: dict[Level, list[Value]] = {level: [v for v in found if v.level is level] for level in Level}
    grid, col, pair = ([declaration(printer, v) for v in of[x]] for x in (Level.GRID, Level.COL, Level.PAIR))
    row = [f"{v.name}[v] = {printer.value(v)};  // {printer.source(v.expr)}" for v in of[Level.ROW]]
    nodes = set(postorder(*roots))
    texts = [*pair, *(printer.text(e, Level.PAIR) for e in roots)]
    return FeatureText(
        grid=grid,
        arrays=[f"{VECTORS[printer.plan.width(v.expr)]} {v.name}[VECTORS];" for v in of[Level.ROW]],
        row=row,
        col=col,
        pair=pair,
        uses_key=any(isinstance(n, Index) and n.axis == "k" for n in nodes),
        row_uses_rows=any("[w]" in text for text in row),
        pair_uses_rows=any("[w]" in text for text in texts),
        reads_left=LEFT in nodes,
        reads_right=RIGHT in nodes,
        **sums,  # type: ignore[arg-type]
    )


def scores_text(printer: FeaturePrinter) -> FeatureText | None:
    """The sum that is the raw score, None where that is a dot product."""
    body = printer.plan.body
    return None if body is None else _text(printer, (body.value,), value=printer.text(body.value, Level.PAIR))


def _grad(printer: FeaturePrinter, grad: CapturedGrad, number: int) -> FeatureGrad:
    return FeatureGrad(f"d{number}", grad.level, printer.text(grad.derivative, Level.PAIR))


def gradients_text(printer: FeaturePrinter) -> FeatureText | None:
    """The sums that are gradients of what the raw score is made of, numbered after the gradients of pairs."""
    plan = printer.plan
    if plan.body is None:
        return None
    roots = (plan.body.left, plan.body.right, *(g.derivative for g in plan.feature_grads))
    left, right = (printer.text(e, Level.PAIR) for e in roots[:2])
    grads = tuple(_grad(printer, g, len(plan.grads) + i) for i, g in enumerate(plan.feature_grads))
    return _text(printer, roots, left=left, right=right, grads=grads)
