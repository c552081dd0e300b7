"""A patch under which every table is summarised in cells, and small tables have several of them."""

from __future__ import annotations

import sys

import pytest

from attnlang.sparsity import captured, classify


def small_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summarise every table in cells of 2 x 2."""
    monkeypatch.setattr(classify, "is_large", lambda t: t.dim() >= 2 and t.numel() > 0)
    for module in (sys.modules["attnlang.sparsity.cells"], captured):
        monkeypatch.setattr(module, "SIDE", 2)
