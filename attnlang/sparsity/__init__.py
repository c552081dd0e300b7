"""Proved sparsity: three-valued evaluation of masks over tiles, and run maps."""

from .analyse import analyse
from .classify import EMPTY, FULL, PARTIAL, classify_tile
from .runmap import LaunchTable, RunMap

__all__ = ["EMPTY", "FULL", "PARTIAL", "LaunchTable", "RunMap", "analyse", "classify_tile"]
