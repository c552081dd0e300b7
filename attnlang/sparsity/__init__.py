"""Proved sparsity: three-valued evaluation of masks over tiles, and run maps."""

from .analyse import analyse
from .classify import EMPTY, FULL, PARTIAL, classify_tile
from .closed_form import ClosedForm, closed_form
from .explain import Clause, Report, clause_report, explain
from .layout import Layout, Proposal, propose_layouts
from .runmap import LaunchTable, RunMap
from .settle import settle, visible_pairs

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "Clause",
    "ClosedForm",
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
