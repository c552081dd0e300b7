"""Text of the loop over features on the Triton target, where the score term has a body."""

from __future__ import annotations

from dataclasses import dataclass

from attnlang.ir import Expr
from attnlang.passes.levels import Level

from .features import needed
from .plan import CapturedGrad, KernelPlan
from .triton_backward_arguments import belongs
from .triton_common import Line, comment, lines
from .triton_printer import TritonPrinter

__all__ = ["FeatureGrad", "FeatureText", "gradients_text", "scores_text"]


@dataclass(frozen=True)
class FeatureGrad:
    """The gradient of what the body reads of a captured tensor: ``kind`` is row, grid or col, ``value`` what a pair
    adds."""

    name: str
    kind: str
    value: str
    comment: str


@dataclass(frozen=True)
class FeatureText:
    """Statements of a feature, and what is summed: the score, or a derivative by the outer row and gradients."""

    lines: list[Line]
    distance: bool
    value: str
    grads: list[FeatureGrad]


def _text(
    printer: TritonPrinter, root: Expr, rows_known: bool, grads: list[FeatureGrad], more: tuple[Expr, ...] = ()
) -> FeatureText:
    printer.used.clear()
    found = lines(printer, needed(printer.plan.features, (root, *more), rows_known=rows_known))
    value = printer.text(root, Level.PAIR)
    for expr in more:
        printer.text(expr, Level.PAIR)
    return FeatureText(found, "k_distance" in printer.used, value, grads)


def scores_text(printer: TritonPrinter, *, rows_known: bool) -> FeatureText | None:
    """The sum that is the raw score, None where that is a dot product; ``rows_known`` where the kernel has the
    statements of rows before its loop over keys."""
    body = printer.plan.body
    return None if body is None else _text(printer, body.value, rows_known, [])


def _own(plan: KernelPlan, kernel: str) -> list[tuple[int, CapturedGrad]]:
    found = enumerate(plan.feature_grads, len(plan.grads))
    return [(number, grad) for number, grad in found if belongs(grad, kernel)]


def gradients_text(printer: TritonPrinter, kernel: str, by: Expr, *, rows_known: bool) -> FeatureText | None:
    """The sums of ``kernel`` that are gradients of what the raw score is made of, numbered after those of pairs.

    ``by`` is the derivative by the row that the kernel has outside.
    """
    plan = printer.plan
    if plan.body is None:
        return None
    own = _own(plan, kernel)
    grads = [
        FeatureGrad(f"grad{n}", g.level.value, printer.text(g.derivative, Level.PAIR), comment(str(g.load.tensor)))
        for n, g in own
    ]
    return _text(printer, by, rows_known, grads, tuple(g.derivative for _, g in own))
