"""Layouts in Triton's interpreter: the kernel finds the rows of its slots, and nothing is moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnlang as al
from attnlang.runtime import layouts
from attnlang.sparsity import Dim, Hilbert, Layout, Patches

EXTENTS = (7, 9)
CHOICES: dict[str, Any] = {
    "patches": "4x4",
    "heads": Layout.both(Hilbert(EXTENTS), Patches((Dim(7), Dim(9)), (1, 0)), heads=(0, 0, 1, 1)),
    "keys": (torch.arange(63), torch.randperm(63, generator=torch.Generator().manual_seed(7))),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_layouts(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = al.parse("""
pattern near(height: int, width: int, keep: bool[H, Lk]):
    grid q, k = (y: height, x: width)
    mask = abs(q.y - k.y) <= 2 and abs(q.x - k.x) <= 1 + h or keep[h, k]
    score = s + 0.1 * float(q.x - k.y)
""")
    q, k, v = torch.randn(2, 4, 63, 16), torch.randn(2, 2, 63, 16), torch.randn(2, 2, 63, 24)
    given = {"height": 7, "width": 9, "keep": torch.rand(4, 63) < 0.05}
    want = al.reference(program, q, k, v, return_lse=True, **given)
    monkeypatch.setattr(layouts, "_index", None)  # which is how rows are moved
    found = al.compile(program, layout=CHOICES[choice], backend="triton")(q, k, v, return_lse=True, **given)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-5, rtol=2e-5)
