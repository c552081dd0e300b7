"""Moving rows: the compiled helper and PyTorch in its place."""

from __future__ import annotations

import pytest
import torch

from attnlang.runtime import rows


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_go_where_the_order_says(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if not compiled:
        monkeypatch.setattr(rows, "_helper", lambda: None)
    jobs = []
    shapes = ((1000, 64, torch.float32), (7, 3, torch.bfloat16), (513, 16, torch.float64), (0, 4, torch.float16))
    for length, width, dtype in shapes:
        source = torch.randn(length, width).to(dtype)
        jobs.append((source, torch.empty_like(source), torch.randperm(length)))
    line, wide = torch.randn(300), torch.randn(40, 300, 2)
    jobs.append((line, torch.empty(300), torch.randperm(300)))
    jobs.append((wide[..., 0].t(), torch.zeros(300, 41)[:, :40], torch.randperm(300)))  # columns, into part of a row
    rows.move(jobs)
    for source, target, order in jobs:
        assert torch.equal(target, source[order])
    rows.move([])
