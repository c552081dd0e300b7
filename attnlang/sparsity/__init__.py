"""Proved sparsity: three-valued evaluation of masks over tiles, and run maps."""

from .analyse import analyse
from .classify import EMPTY, FULL, PARTIAL, classify_tile
from .clauses import Clause, clause_report
from .closed_form import ClosedForm, closed_form
from .explain import Efficiency, Report, explain
from .layout import Layout, Proposal, propose_layouts
from .runmap import LaunchTable, RunMap
from .settle import settle, visible_pairs

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "Clause",
    "ClosedForm",
    "Efficiency",
    "LaunchTable",
    "Layout",
    "Proposal",
    "Report",
    "RunMap",
    "analyse",
    "classify_tile",
    "clause_report",
    "closed_form",
    "explain",
    "propose_layouts",
    "settle",
    "visible_pairs",
]
