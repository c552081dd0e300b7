"""The source of a helper that moves rows of memory on several threads; it depends on no program."""

from __future__ import annotations

from .cpp import render

__all__ = ["ENTRY", "emit_rows"]

ENTRY = "attnlang_move"
"""Name of the exported function."""

USUAL = (2, 4, 8, 32, 64, 128, 256, 512)
"""Bytes of a row that are copied without a call."""


def emit_rows() -> str:
    """Return the C++ source."""
    return render("cpp_rows.j2", usual=USUAL)
