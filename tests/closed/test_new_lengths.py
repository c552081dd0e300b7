"""A new length needs no new kernel and no new analysis where the mask has a closed form; elsewhere an analysis."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import attnlang as al
from attnlang.runtime import cpp_common

CLOSED = ("causal", "sliding_window", "prefix_lm", "block_causal")
LENGTHS = (64, 100, 193, 257)
VALUES: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 40},
    "prefix_lm": {"prefix": torch.tensor([30])},
    "block_causal": {"block": 24},
}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many kernels are built, and how many masks are searched for tiles."""
    seen: Counter[str] = Counter()
    module = __import__("attnlang.sparsity.analyse", fromlist=["descend"])
    built, descend = cpp_common._built, module.descend

    def counted_build(*arguments: Any) -> Any:
        seen["kernels"] += 1
        return built(*arguments)

    def counted_search(*arguments: Any) -> Any:
        seen["searches"] += 1
        return descend(*arguments)

    monkeypatch.setattr(cpp_common, "_built", counted_build)
    monkeypatch.setattr(module, "descend", counted_search)
    return seen


def call(attention: al.Attention, lq: int, lk: int, *, train: bool = False, **values: Any) -> None:
    q = torch.randn(1, 2, lq, 16, requires_grad=train)
    k, v = torch.randn(1, 2, lk, 16), torch.randn(1, 2, lk, 16)
    o = attention(q, k, v, **values)
    torch.testing.assert_close(o, al.reference(attention, q, k, v, **values).float(), atol=2e-5, rtol=2e-5)
    if train:
        o.sum().backward()


@pytest.mark.parametrize("name", CLOSED)
def test_kernels_serve_every_length(name: str, counts: Counter[str]) -> None:
    attention = al.compile(getattr(al.library, name), backend="cpp")
    for lq in LENGTHS:
        for lk in LENGTHS:
            call(attention, lq, lk, **VALUES.get(name, {}))
    assert counts == {"kernels": 1}


def test_so_does_the_kernel_of_the_backward_pass(counts: Counter[str]) -> None:
    attention = al.compile(al.library.causal, backend="cpp")
    for length in LENGTHS:
        call(attention, length, length, train=True)
    assert counts == {"kernels": 2}


@pytest.mark.parametrize("name", CLOSED)
def test_the_eager_executor_needs_no_analysis(name: str, counts: Counter[str]) -> None:
    attention = al.compile(getattr(al.library, name), backend="eager")
    for length in LENGTHS:
        call(attention, length, length + 1, **VALUES.get(name, {}))
    assert counts == {}


def test_a_condition_that_fails_is_served_by_the_table(counts: Counter[str]) -> None:
    attention = al.compile(al.library.block_causal, backend="cpp")
    for length in LENGTHS:
        call(attention, length, length, block=0)
        call(attention, length, length, block=16)
    assert counts == {"kernels": 2, "searches": len(LENGTHS)}


def test_other_masks_are_analysed_at_every_length(counts: Counter[str]) -> None:
    attention = al.compile(al.library.dilated_window, backend="eager")
    for length in LENGTHS:
        call(attention, length, length)
    assert counts == {"searches": len(LENGTHS)}
