"""The training example: compiled and dense attention give the same losses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "examples" / "train_char_model.py"


def test_loss_curves_lie_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("train_char_model", PATH)
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "LENGTH", 150)
    monkeypatch.setattr(example, "BATCH", 2)
    alphabet, data = example.batches(4)
    dense, _ = example.train("dense", example.dense, alphabet, data)
    ours, _ = example.train("attnlang", example.compiled(), alphabet, data)
    assert ours == pytest.approx(dense, abs=1e-4)
    assert ours[-1] < ours[0]
