"""Proved sparsity: three-valued evaluation of masks over tiles, and run maps."""

from .analyse import analyse
from .classify import EMPTY, FULL, PARTIAL, classify_tile
from .clauses import Clause, clause_report
from .closed_form import ClosedForm, closed_form
from .explain import Efficiency, Report, explain
from .layout import LaidOut, Layout, lay_out
from .orders import Dim, Hilbert, Order, Patches, Tokens
from .propose import Proposal, propose_layouts
from .runmap import LaunchTable, RunMap
from .settle import settle, visible_pairs

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "Clause",
    "ClosedForm",
    "Dim",
    "Efficiency",
    "Hilbert",
    "LaidOut",
    "LaunchTable",
    "Layout",
    "Order",
    "Patches",
    "Proposal",
    "Report",
    "RunMap",
    "Tokens",
    "analyse",
    "classify_tile",
    "clause_report",
    "closed_form",
    "explain",
    "lay_out",
    "propose_layouts",
    "settle",
    "visible_pairs",
]
